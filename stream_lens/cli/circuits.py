"""`stream-lens minimal-k`, `receivers`, `diff` and `routes`: the circuit tools, each a call and a table."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from stream_lens.blocks import StreamConfig
from stream_lens.cli.frames import print_frame, write_result
from stream_lens.cli.inputs import Prompt, prompt_of
from stream_lens.cli.options import (
    As,
    Fraction,
    K,
    KBlock,
    Layers,
    Model,
    Out,
    QBlock,
    Selector,
    Threads,
    load,
    stream_config,
)

Depth = Annotated[float, typer.Option(help="Where the needle lies: 0 first, 1 last.", min=0, max=1)]
Seed = Annotated[int, typer.Option(help="Which needle.")]
Text = Annotated[Path | None, typer.Option(help="A text file of your own. Default: a needle text of --tokens (RULER).")]
Tokens = Annotated[int, typer.Option(help="Length of the needle text, in tokens.", min=128)]


def minimal_k_command(
    model: Model = "gemma-3-270m",
    as_: As = None,
    text: Text = None,
    tokens: Tokens = 1000,
    depth: Depth = 0.5,
    seed: Seed = 0,
    n_match: Annotated[int, typer.Option(help="How many of the dense model's next tokens have to stay.", min=1)] = 2,
    linear: Annotated[
        bool, typer.Option(help="Also try every smaller k: keeping the answer need not be monotone.")
    ] = False,
    per: Annotated[
        str, typer.Option(help="Then lower k for each 'layer' or 'head' apart; 'model' stops before.")
    ] = "model",
    q_block: QBlock = 32,
    k_block: KBlock = 32,
    layers: Layers = None,
    controls: Annotated[bool, typer.Option(help="Also find the minimal k of the control selectors.")] = True,
    out: Out = Path("out/minimal-k"),
    threads: Threads = None,
) -> None:
    """The smallest k that keeps the dense model's next tokens, with the runs that show it."""
    from stream_lens.circuits.minimal_k import minimal_k

    console = Console()
    prompt = _prompt(console, model, as_, text, tokens, depth, seed, threads)
    config = stream_config(16, None, q_block, k_block, layers, "stream")
    for selector in ("stream", *(("exhaustive", "window_sinks", "random") if controls else ())):
        result = minimal_k(
            prompt.model,
            prompt.tokens,
            replace(config, selector=selector),
            n_match=n_match,
            linear=linear,
            per=per if selector == "stream" else "model",  # type: ignore[arg-type]
        )
        answer = prompt.model.tokenizer.decode(list(result.answer))
        console.print(
            f"{selector}: minimal k = {result.k} of {-(-result.n_tokens // k_block)} blocks "
            f"({result.kept_fraction:.1%} of the last row) for {answer!r}; k - 1 "
            f"{'fails' if result.fails_below else 'was not tried'}; {result.passes} forwards",
            highlight=False,
        )
        if selector == "stream":
            print_frame(console, "Runs", result.to_frame(), rows=20)
            write_result(console, result, out, "minimal_k")


def receivers_command(
    model: Model = "smollm2-135m",
    as_: As = None,
    traces: Annotated[
        Path | None,
        typer.Option(help="Reasoning traces, JSON Lines. Default: three short ones that come with the package."),
    ] = None,
    k: K = 16,
    fraction: Fraction = None,
    q_block: QBlock = 16,
    k_block: KBlock = 16,
    selector: Selector = "stream",
    top_n: Annotated[int, typer.Option(help="How many heads to call receiver heads.", min=1)] = 20,
    controls: Annotated[
        bool, typer.Option(help="Compare the ranking with the dense one, for this selector and the controls.")
    ] = True,
    out: Out = Path("out/receivers"),
    threads: Threads = None,
) -> None:
    """Receiver heads of reasoning traces: heads whose attention gathers on few sentences (Thought Anchors)."""
    from stream_lens.backend import run_with_masks
    from stream_lens.circuits.receiver_heads import rank_correlation, receiver_heads
    from stream_lens.tasks.reasoning import example_traces, read_jsonl

    console = Console()
    listed = example_traces() if traces is None else read_jsonl(traces)
    loaded = load(model, as_, None, threads)
    segments = [trace.segments(loaded.tokenizer) for trace in listed]
    config = stream_config(k, fraction, q_block, k_block, None, selector)

    def rank(choice: StreamConfig, *, observe: bool = False) -> Any:
        caches = [run_with_masks(loaded, trace.text, choice, observe=observe)[1] for trace in listed]
        return receiver_heads(caches, segments, top_n=top_n)

    result = rank(config)
    print_frame(
        console, f"Receiver heads over n = {len(listed)} texts, split-half r = {result.split_half}", result.to_frame()
    )
    if controls:
        dense = rank(replace(config, k=_all_blocks(segments, k_block)), observe=True)
        for name in dict.fromkeys((selector, "exhaustive", "window_sinks", "random")):
            other = result if name == selector else rank(replace(config, selector=name))
            found = rank_correlation(dense, other)
            console.print(
                f"{name}: Spearman with the dense ranking {found.spearman:.3f} over {found.heads} heads, "
                f"{found.top_shared:.0%} of the top {top_n} shared",
                highlight=False,
            )
    write_result(console, result, out, "receivers")


def diff_command(
    success: Annotated[
        Path, typer.Argument(help="Cache file of a run that succeeded (stream-lens trace --save-cache).")
    ],
    failure: Annotated[Path, typer.Argument(help="Cache file of a run that failed, of the same length and blocks.")],
    out: Out = Path("out/diff"),
) -> None:
    """What a successful run attends to and a failed one does not, by layer and head, from two saved caches."""
    from stream_lens.cache import load as load_cache
    from stream_lens.circuits.mask_diff import mask_diff

    console = Console()
    result = mask_diff(load_cache(success), load_cache(failure))
    print_frame(console, "By layer: blocks kept by success alone, by failure alone, by both", result.by_layer())
    print_frame(console, "Largest differences in attention", result.to_frame().drop(columns=["p_value", "q_value"]))
    console.print(
        "One pair says nothing about chance: give mask_diff several pairs in Python for p values and a control.",
        style="dim",
    )
    write_result(console, result, out, "diff")


def routes_command(
    cache: Annotated[Path, typer.Argument(help="Cache file (stream-lens trace --save-cache).")],
    source: Annotated[str, typer.Option(help="Tokens START:STOP that routes start from, such as the needle's.")],
    target: Annotated[str, typer.Option(help="Token, or START:STOP, that they lead to; -1 is the last.")] = "-1",
    heads: Annotated[str, typer.Option(help="How a layer's heads become one weight: mean or max.")] = "mean",
    paths: Annotated[int, typer.Option(help="How many of the strongest paths to show.", min=1)] = 5,
    out: Out = Path("out/routes"),
) -> None:
    """Layer by layer, how kept blocks lead from some tokens to the output. Also written as GraphML."""
    from stream_lens.cache import load as load_cache
    from stream_lens.circuits.routes import routes

    console = Console()
    result = routes(load_cache(cache), _place(source), _place(target), heads=heads, paths=paths)  # type: ignore[arg-type]
    if not result.reachable:
        console.print("No way leads from the source to the target through the cached layers.")
        raise typer.Exit(1)
    console.print(f"{result.flow:.2%} of the target comes from the source by attention rollout", highlight=False)
    print_frame(console, f"Hops of the {paths} strongest paths", result.paths_frame(), rows=30)
    print_frame(console, "Heads by the flow that they carry", result.by_head())
    write_result(console, result, out, "routes")
    result.write_graph(out / "routes.graphml")


def _prompt(
    console: Console,
    model: str,
    as_: str | None,
    text: Path | None,
    tokens: int,
    depth: float,
    seed: int,
    threads: int | None,
) -> Prompt:
    with console.status(f"loading {model}"):
        return prompt_of(model, as_, text, tokens, depth, seed, threads)


def _place(text: str) -> int | tuple[int, int]:
    first, colon, last = text.partition(":")
    try:
        return (int(first), int(last)) if colon else int(first)
    except ValueError:
        raise ValueError(f"{text!r} is no place: write a token as 17 or -1, tokens as 985:1010.") from None


def _all_blocks(segments: list[Any], k_block: int) -> int:
    return max(-(-one.n_tokens // k_block) for one in segments) + 1
