"""`stream-lens minimal-k`: the smallest k that keeps the dense answer, beside that of the control selectors."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from stream_lens.cli.frames import plain_console, print_frame, show, write_result
from stream_lens.cli.inputs import prompt_of
from stream_lens.cli.options import (
    As,
    Controls,
    Depth,
    KBlock,
    Layers,
    Model,
    Out,
    QBlock,
    Seed,
    Text,
    Threads,
    Tokens,
    stream_config,
)


def minimal_k_command(
    model: Model = "gemma-3-270m",
    as_: As = None,
    text: Text = None,
    tokens: Tokens = 1000,
    depth: Depth = 0.5,
    seed: Seed = 0,
    n_match: Annotated[int, typer.Option(help="How many of the dense model's next tokens have to stay.", min=1)] = 2,
    high: Annotated[
        int | None, typer.Option(help="Largest k to try. Default: all blocks.", min=1, show_default=False)
    ] = None,
    linear: Annotated[
        bool, typer.Option(help="Also try every smaller k: keeping the answer need not be monotone.")
    ] = False,
    per: Annotated[
        str, typer.Option(help="Then lower k for each 'layer' or 'head' apart; 'model' stops before.")
    ] = "model",
    q_block: QBlock = 32,
    k_block: KBlock = 32,
    layers: Layers = None,
    controls: Controls = True,
    out: Out = Path("out/minimal-k"),
    threads: Threads = None,
) -> None:
    """The smallest k that keeps the dense model's next tokens, with the runs that show it."""
    from stream_lens.circuits.controls import minimal_k_controls
    from stream_lens.circuits.minimal_k import minimal_k

    console = plain_console()
    config = stream_config(16, None, q_block, k_block, layers, "stream")
    with console.status(f"loading {model}"):
        prompt = prompt_of(model, as_, text, tokens, depth, seed, threads)
    with console.status("running stream"):
        result = minimal_k(
            prompt.model,
            prompt.tokens,
            config,
            n_match=n_match,
            high=high,
            linear=linear,
            per=per,  # type: ignore[arg-type]
        )
    print_frame(
        console,
        f"{model}, T = {result.n_tokens}, blocks of {q_block} × {k_block}: minimal k = {result.k} of "
        f"{-(-result.n_tokens // k_block)} blocks ({1 - result.kept_fraction:.1%} of the last row pruned); its runs",
        result.to_frame(),
        rows=20,
    )
    _print_answer(console, prompt, result)
    if result.budgets:
        mean = sum(result.budgets.values()) / len(result.budgets)
        console.print(f"Mean k of a head after lowering each {per}: {mean:.2f}", highlight=False)
    write_result(console, result, out, "minimal_k")
    if controls:
        with console.status("running the controls") as status:
            frame = minimal_k_controls(
                prompt.model,
                prompt.tokens,
                result,
                high=high,
                linear=linear,
                on_run=lambda run: status.update(f"running {run}"),
            )
        limit = "all blocks" if high is None else f"k = {high}"
        frame["k"] = frame["k"].astype(object).where(frame["k"].notna(), f"none up to {limit}")
        show(
            console,
            "Minimal k by selector, for the same dense answer, n = 1 text",
            frame,
            out,
            "controls",
            hidden=("texts",),
        )


def _print_answer(console: Console, prompt: Any, result: Any) -> None:
    answer = repr(prompt.model.tokenizer.decode(list(result.answer)))
    wanted = "" if prompt.expected is None else f" (the needle is {prompt.expected})"
    console.print(f"Dense answer that had to stay: {answer}{wanted}", highlight=False)
    if result.fails_below is None:
        console.print("No smaller k was possible: the blocks that are always kept were enough.", highlight=False)
