"""Options that several commands share, and how they become arguments of the library."""

from __future__ import annotations

import logging
import warnings
from pathlib import Path
from typing import Annotated, Any

import typer

from stream_lens.blocks import SELECTORS, FractionOfPrefix, StreamConfig

Model = Annotated[
    str,
    typer.Option(help="gemma-3-270m or smollm2-135m (demo models), a hub name, or a folder of transformers weights."),
]
As = Annotated[
    str | None,
    typer.Option("--as", help="hooked (HookedTransformer) or bridge (TransformerBridge); by default what can be had."),
]
K = Annotated[int, typer.Option(help="Key blocks kept for each query block, forced ones included.", min=1)]
Fraction = Annotated[
    float | None,
    typer.Option(help="Keep this share of each query block's prefix instead of a constant --k: 0.05 prunes 95%."),
]
QBlock = Annotated[int, typer.Option(help="Queries in a query block; 32 is about a sentence.", min=1)]
KBlock = Annotated[int, typer.Option(help="Keys in a key block.", min=1)]
Layers = Annotated[
    str | None, typer.Option(help="Layers to run sparse, such as 5,11,17 or 0-3; the others run dense. Default: all.")
]
Selector = Annotated[str, typer.Option(help=f"How blocks are chosen: {', '.join(SELECTORS)}.")]
Out = Annotated[Path, typer.Option(help="Folder for pictures and tables; made if it is not there.", file_okay=False)]
Depth = Annotated[float, typer.Option(help="Where the needle lies: 0 first, 1 last.", min=0, max=1)]
Seed = Annotated[int, typer.Option(help="Which needle.")]
Text = Annotated[
    Path | None,
    typer.Option(help="A text file of your own. Default: a needle text of --tokens (RULER).", show_default=False),
]
Tokens = Annotated[int, typer.Option(help="Length of the needle text, in tokens.", min=128)]
Controls = Annotated[
    bool,
    typer.Option(help="Also run exhaustive, window_sinks and random at the same budget, and the dense model."),
]
CacheModel = Annotated[
    str | None, typer.Option(help="Model to run the controls with. Default: the caches'.", show_default=False)
]
AnswerTokens = Annotated[int, typer.Option(help="Tokens of each greedy answer beside the controls.", min=0)]
Threads = Annotated[int | None, typer.Option(help="CPU threads for torch; default: torch's own choice.", min=1)]


def stream_config(
    k: int, fraction: float | None, q_block: int, k_block: int, layers: str | None, selector: str
) -> StreamConfig:
    """A StreamConfig from options."""
    return StreamConfig(
        k=k if fraction is None else FractionOfPrefix(fraction),
        q_block=q_block,
        k_block=k_block,
        layers=None if layers is None else numbers(layers),
        selector=selector,
    )


def numbers(text: str) -> tuple[int, ...]:
    """Whole numbers from "5,11,17" or "0-3,7". `ValueError` on anything else."""
    found: list[int] = []
    for part in text.split(","):
        first, dash, last = part.strip().partition("-")
        if not first.isdigit() or (dash and not (last.isdigit() and int(first) <= int(last))):
            raise ValueError(f"{text!r} is no list of numbers: write them as 5,11,17 or 0-3,7.")
        found += range(int(first), int(last if dash else first) + 1)
    return tuple(found)


def decimals(text: str) -> tuple[float, ...]:
    """Numbers from "0.1,0.5". `ValueError` on anything else."""
    try:
        return tuple(float(part) for part in text.split(","))
    except ValueError:
        raise ValueError(f"{text!r} is no list of numbers: write them as 0.1,0.5,0.9.") from None


def load(model: str, as_: str | None, n_ctx: int | None, threads: int | None) -> Any:
    """The model, loaded quietly."""
    import torch

    if threads is not None:
        torch.set_num_threads(threads)
    warnings.filterwarnings("ignore", message="HookedTransformer is deprecated")
    logging.getLogger().setLevel(logging.ERROR)
    from stream_lens.models import load_model

    return load_model(model, as_=as_, n_ctx=n_ctx)  # type: ignore[arg-type]
