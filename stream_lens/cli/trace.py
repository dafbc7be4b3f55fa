"""`stream-lens trace`: a text through a model, dense and sparse, with a table, a picture and, if asked, the cache."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from stream_lens.blocks import StreamConfig
from stream_lens.cli.frames import plain_console
from stream_lens.cli.inputs import prompt_of
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
    stream_config,
)


def trace_command(
    model: Model = "gemma-3-270m",
    as_: As = None,
    text: Annotated[
        Path | None,
        typer.Option(help="A text file of your own. Default: a needle hidden in --tokens of noise (RULER)."),
    ] = None,
    tokens: Annotated[int, typer.Option(help="Length of the needle text, in tokens.", min=128)] = 2000,
    depth: Annotated[float, typer.Option(help="Where the needle lies: 0 first, 1 last.", min=0, max=1)] = 0.5,
    seed: Annotated[int, typer.Option(help="Which needle.")] = 0,
    k: K = 16,
    fraction: Fraction = None,
    q_block: QBlock = 32,
    k_block: KBlock = 32,
    layers: Layers = None,
    selector: Selector = "stream",
    answer_tokens: Annotated[int, typer.Option(help="Tokens of each greedy answer.", min=1)] = 12,
    dense: Annotated[
        bool | None,
        typer.Option(help="Also run the dense model, at O(T²) time. Default: up to 8192 tokens.", show_default=False),
    ] = None,
    out: Out = Path("out"),
    save_cache: Annotated[
        Path | None, typer.Option(help="Also write the masks and block masses to this safetensors file.")
    ] = None,
    report: Annotated[
        Path | None, typer.Option(help="Also write a page with the text, every head's mask and the layers' table.")
    ] = None,
    threads: Threads = None,
) -> None:
    """Trace one text: the dense and the sparse answer, what every layer pruned, and a picture of the masks.

    [dim]Examples[/]

      stream-lens trace

      stream-lens trace --tokens 8000 --fraction 0.1 --depth 0.9

      stream-lens trace --model smollm2-135m --text notes.txt --k 24 --save-cache notes.safetensors
    """
    console = plain_console()
    config = stream_config(k, fraction, q_block, k_block, layers, selector)
    with console.status(f"loading {model}"):
        prompt = prompt_of(model, as_, text, tokens, depth, seed, threads, room=answer_tokens)
    loaded, ids, expected, spans = prompt.model, prompt.tokens, prompt.expected, prompt.spans
    dense = dense if dense is not None else ids.shape[-1] <= 8192
    _print_estimate(console, loaded, ids.shape[-1], config)
    result = _run(console, loaded, ids, config, answer_tokens, dense, expected, spans)
    _print_answers(console, result)
    _print_layers(console, result)
    _write(console, result, out, save_cache)
    if report is not None:
        from stream_lens.report import write_report

        written = write_report(result, report, loaded.tokenizer)
        console.print(f"Report: {written} ({_size(written.stat().st_size)})", highlight=False, soft_wrap=True)


def _print_estimate(console: Console, model: Any, n_tokens: int, config: StreamConfig) -> None:
    from stream_lens.backend import memory_estimate

    need = memory_estimate(model, n_tokens, config)
    console.print(
        f"{n_tokens} tokens: the sparse run needs about {_size(need.total)} (weights {_size(need.weights)}, masks "
        f"{_size(need.masks)}, queries and keys {_size(need.queries_keys)}); dense scores and patterns alone would be "
        f"{_size(need.dense_patterns)}.",
        highlight=False,
    )


def _run(
    console: Console,
    model: Any,
    ids: Any,
    config: StreamConfig,
    answer_tokens: int,
    dense: bool,
    expected: Any,
    spans: Any,
) -> Any:
    from stream_lens.trace import trace

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.completed}/{task.total}"),
        TimeElapsedColumn(),
    )
    with Progress(*columns, console=console, transient=True) as progress:
        total = len(config.layers) if config.layers else model.cfg.n_layers
        bar = progress.add_task("sparse run with cache", total=total)

        def on_step(step: str) -> None:
            if step != "sparse run with cache":
                progress.update(bar, description=step, total=None)

        return trace(
            model,
            ids,
            config,
            answer_tokens=answer_tokens,
            dense=dense,
            expected=expected,
            spans=spans,
            on_step=on_step,
            on_layer=lambda _: progress.advance(bar),
        )


def _print_answers(console: Console, result: Any) -> None:
    table = Table(title="Greedy answers", title_justify="left")
    for name in ("run", "answer", "right" if result.expected else "same as dense", "seconds"):
        table.add_column(name)
    answers = {"dense": result.dense_answer, "sparse": result.sparse_answer}
    for name, answer in answers.items():
        if answer is None:
            table.add_row(name, "not run (--dense runs it)", "", "")
            continue
        if result.expected:
            verdict = "yes" if result.expected in answer else f"no, expected {result.expected}"
        else:
            verdict = "" if result.dense_answer is None or name == "dense" else str(answer == result.dense_answer)
        table.add_row(name, repr(answer), verdict, f"{result.seconds[f'{name} answer']:.1f}")
    console.print(table)
    if result.spans:
        places = ", ".join(f"{name} {start}:{stop}" for name, (start, stop) in result.spans.items())
        console.print(f"Tokens of the spans (for routes --source): {places}", highlight=False)


def _print_layers(console: Console, result: Any) -> None:
    frame = result.to_frame()
    marked = [column for column in frame.columns if column.startswith("heads_keeping_")]
    for title, part in (
        ("Global layers", frame[frame.window == 0]),
        (f"Layers with a window of {frame.window.max()}, which alone hides most", frame[frame.window > 0]),
    ):
        if part.empty:
            continue
        dense = _size(part.dense_bytes.iloc[0])
        table = Table(title=f"{title}; dense, each pattern is {dense}", title_justify="left")
        table.add_column("layer", justify="right")
        table.add_column("k", justify="right")
        for name in ("causal half", "T²", "visible"):
            table.add_column(f"pruned of\n{name}", justify="right")
        table.add_column("mask and\nmass", justify="right")
        for column in marked:
            table.add_column(f"heads keeping\nthe {column.removeprefix('heads_keeping_')}", justify="right")
        for row in part.to_dict("records"):
            table.add_row(
                str(row["layer"]),
                str(row["k"]),
                f"{row['pruned_causal']:.1%}",
                f"{row['pruned_full']:.1%}",
                f"{row['pruned_visible']:.1%}",
                _size(row["mask_bytes"]),
                *(str(row[column]) for column in marked),
            )
        console.print(table)
    total = result.cache.compression()
    console.print(
        f"All masks and masses: {_size(total.sparse_bytes)}; dense patterns: {_size(total.dense_bytes)} "
        f"({total.by_bytes:,.0f} × in bytes, {total.by_entries:,.0f} × in entries, the paper's count). "
        f"Sparse run with cache: {result.seconds['sparse run with cache']:.1f} s.",
        highlight=False,
    )


def _write(console: Console, result: Any, out: Path, save_cache: Path | None) -> None:
    from stream_lens.plots import write_html

    picture = write_html(result.plot(), out / "trace.html")
    console.print(f"Picture: {picture}", highlight=False, soft_wrap=True)
    if save_cache is not None:
        result.cache.without_scores().save(save_cache)
        console.print(f"Cache: {save_cache} ({_size(save_cache.stat().st_size)})", highlight=False, soft_wrap=True)


def _size(n: float) -> str:
    for unit in ("B", "KB", "MB", "GB"):
        if n < 1000:
            return f"{n:.0f} {unit}" if unit == "B" else f"{n:.1f} {unit}"
        n /= 1000
    return f"{n:.1f} TB"
