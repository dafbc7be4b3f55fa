"""`stream-lens diff`: what runs that succeeded attend to and runs that failed do not, from saved caches."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from stream_lens.cli.frames import plain_console, print_frame, show, title_of, write_result
from stream_lens.cli.inputs import caches_of, model_of
from stream_lens.cli.options import AnswerTokens, As, CacheModel, Controls, Out, Threads


def diff_command(
    success: Annotated[
        Path,
        typer.Argument(
            help="Cache file of a run that succeeded (stream-lens trace --save-cache), or a folder of such files."
        ),
    ],
    failure: Annotated[
        Path,
        typer.Argument(
            help="Cache file of a run that failed, of the same length and blocks; or a folder of as many, paired with "
            "the others in order of their names."
        ),
    ],
    model: CacheModel = None,
    as_: As = None,
    controls: Controls = True,
    answer_tokens: AnswerTokens = 8,
    out: Out = Path("out/diff"),
    threads: Threads = None,
) -> None:
    """What a successful run attends to and a failed one does not, by layer and head, from saved caches.

    The controls run both texts again with the model; --no-controls needs the files only.

    [dim]Example[/]

      stream-lens trace --depth 0.5 --tokens 1000 --save-cache success.safetensors

      stream-lens trace --depth 0.9 --tokens 1000 --save-cache failure.safetensors

      stream-lens diff success.safetensors failure.safetensors
    """
    from stream_lens.circuits.controls import diff_controls
    from stream_lens.circuits.mask_diff import mask_diff

    console = plain_console()
    groups = caches_of(success), caches_of(failure)
    result = mask_diff(*groups)
    both = [*groups[0], *groups[1]]
    about = f"{title_of(both)}, n = {result.pairs} pair{'s' * (result.pairs > 1)}"
    layers = result.by_layer().dropna(axis="columns", how="all")
    print_frame(console, f"{about}\nBlocks that success alone, failure alone and both keep, all heads", layers, rows=30)
    cells = result.to_frame().drop(columns=["query_label", "key_label", "kept"]).dropna(axis="columns", how="all")
    print_frame(console, "Largest differences in attention (share of a row), by query and key block", cells)
    write_result(console, result, out, "diff")
    if controls:
        with console.status("loading the model of the caches") as status:
            loaded = model_of(both, model, as_, threads, room=answer_tokens)
            frame = diff_controls(
                loaded,
                *groups,
                answer_tokens=answer_tokens,
                on_run=lambda run: status.update(f"running {run}"),
            )
        hidden = ("pruned_causal", "pairs", "control_pairs")
        title = f"The same under controls, n = {result.pairs}, random pairs {result.control_pairs}"
        show(console, title, frame, out, "controls", hidden=hidden)
    if result.pairs == 1:
        console.print(
            "One pair says nothing about chance: give folders of several for p values and random pairs beside them.",
            style="dim",
        )
