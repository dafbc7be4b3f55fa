"""`stream-lens receivers`: receiver heads of reasoning traces, and how like the dense ranking theirs is."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from stream_lens.cli.frames import plain_console, print_frame, show, title_of, write_result
from stream_lens.cli.inputs import load
from stream_lens.cli.options import (
    As,
    Controls,
    Fraction,
    K,
    KBlock,
    Model,
    Out,
    QBlock,
    Selector,
    Threads,
    stream_config,
)


def receivers_command(
    model: Model = "smollm2-135m",
    as_: As = None,
    traces: Annotated[
        Path | None,
        typer.Option(
            help="Reasoning traces, JSON Lines. Default: three short ones that come with the package.",
            show_default=False,
        ),
    ] = None,
    k: K = 16,
    fraction: Fraction = None,
    q_block: QBlock = 16,
    k_block: KBlock = 16,
    selector: Selector = "stream",
    top_n: Annotated[int, typer.Option(help="How many heads to call receiver heads.", min=1)] = 20,
    controls: Controls = True,
    out: Out = Path("out/receivers"),
    threads: Threads = None,
) -> None:
    """Receiver heads of reasoning traces: heads whose attention gathers on few sentences (Thought Anchors)."""
    from stream_lens.backend import run_with_masks
    from stream_lens.circuits.controls import receiver_controls
    from stream_lens.circuits.receiver_heads import receiver_heads
    from stream_lens.tasks.reasoning import example_traces, read_jsonl

    console = plain_console()
    config = stream_config(k, fraction, q_block, k_block, None, selector)
    listed = example_traces() if traces is None else read_jsonl(traces)
    with console.status(f"loading {model}"):
        loaded = load(model, as_, None, threads)
    bos = getattr(loaded.cfg, "default_prepend_bos", True) is not False  # Qwen's texts have none
    segments = [trace.segments(loaded.tokenizer, prepend_bos=bos) for trace in listed]
    with console.status(f"running {selector}"):
        caches = [run_with_masks(loaded, trace.text, config, prepend_bos=bos)[1] for trace in listed]
        result = receiver_heads(caches, segments, top_n=top_n)
    half = "" if result.split_half is None else f"; split-half r = {result.split_half:.2f}"
    about = f"{title_of(caches, model)}, n = {len(listed)} texts{half}"
    print_frame(console, f"Receiver heads: {about}", result.to_frame())
    write_result(console, result, out, "receivers")
    if controls:
        with console.status("running the controls") as status:
            frame = receiver_controls(
                loaded, caches, segments, top_n=top_n, on_run=lambda run: status.update(f"running {run}")
            )
        title = f"Rankings against the dense one, n = {len(listed)} texts; top_shared: of the top {top_n}"
        show(console, title, frame, out, "controls", hidden=("pruned_causal", "texts"))
