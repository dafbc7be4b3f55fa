"""`stream-lens routes`: how kept blocks lead from some tokens to the output, from a saved cache."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from stream_lens.cli.frames import plain_console, print_frame, show, title_of, write_result
from stream_lens.cli.inputs import caches_of, model_of
from stream_lens.cli.options import AnswerTokens, As, CacheModel, Controls, Out, Threads


def routes_command(
    cache: Annotated[Path, typer.Argument(help="Cache file (stream-lens trace --save-cache).")],
    source: Annotated[
        str, typer.Option(help="Tokens START:STOP that routes start from, such as the needle's, which trace prints.")
    ],
    target: Annotated[str, typer.Option(help="Token, or START:STOP, that they lead to; -1 is the last.")] = "-1",
    heads: Annotated[str, typer.Option(help="How a layer's heads become one weight: mean or max.")] = "mean",
    paths: Annotated[int, typer.Option(help="How many of the strongest paths to show.", min=1)] = 5,
    model: CacheModel = None,
    as_: As = None,
    controls: Controls = True,
    answer_tokens: AnswerTokens = 8,
    out: Out = Path("out/routes"),
    threads: Threads = None,
) -> None:
    """Layer by layer, how kept blocks lead from some tokens to the output. Also written as GraphML.

    The controls run the text again with the model; --no-controls needs the file only.
    """
    from stream_lens.circuits.controls import route_controls
    from stream_lens.circuits.routes import routes

    console = plain_console()
    caches, places = caches_of(cache), (_place(source), _place(target))
    if len(caches) > 1:
        raise ValueError(f"{cache} holds {len(caches)} caches, and routes takes one: name the file.")
    result = routes(caches[0], *places, heads=heads, paths=paths)  # type: ignore[arg-type]
    console.print(title_of(caches) + ", n = 1 text", highlight=False)
    if result.reachable:
        console.print(
            f"{result.flow:.2%} of the target comes from the source by attention rollout; the flows below are shares "
            "of that.",
            highlight=False,
        )
        print_frame(console, f"Hops of the {paths} strongest paths", result.paths_frame(), rows=30)
        print_frame(console, "Heads by the flow that they carry", result.by_head())
        write_result(console, result, out, "routes")
        result.write_graph(out / "routes.graphml")
    else:
        console.print("No way leads from the source to the target through the cached layers.")
    if controls:
        with console.status("loading the model of the cache") as status:
            loaded = model_of(caches, model, as_, threads, room=answer_tokens)
            frame = route_controls(
                loaded,
                caches[0],
                *places,
                heads=heads,
                paths=1,
                answer_tokens=answer_tokens,
                on_run=lambda run: status.update(f"running {run}"),
            )
        title = "Flow from source to target under controls (share of the target), n = 1 text"
        show(console, title, frame, out, "controls", hidden=("pruned_causal", "texts"))
    if not result.reachable:
        raise typer.Exit(1)


def _place(text: str) -> int | tuple[int, int]:
    first, colon, last = text.partition(":")
    try:
        return (int(first), int(last)) if colon else int(first)
    except ValueError:
        raise ValueError(f"{text!r} is no place: write a token as 17 or -1, tokens as 985:1010.") from None
