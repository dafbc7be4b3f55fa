"""The rounds of one query block's search: which branches competed, what each scored, and which survived."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pandas as pd
import plotly.graph_objects as go

from stream_lens.blocks import BlockMask, SearchRound, StreamConfig
from stream_lens.plots.masks import config_text
from stream_lens.plots.theme import COLOURS, SCALE, pale, styled

_SCORES = {
    "max": "largest score of a row and key",
    "mass": "attention that the branch would get, summed over rows",
    "peak": "largest share of a row's attention",
}


def search_rounds(
    mask: BlockMask,
    rounds: Sequence[SearchRound],
    config: StreamConfig,
    *,
    q_block: int,
    head: int = 0,
    batch: int = 0,
    title: str = "Search rounds",
) -> go.Figure:
    """The branches of every round where they lie among the keys, coloured by score, survivors outlined.

    The lowest row is what the mask keeps in the end: with `oversample` > 1 a ranking by exact scores follows the
    rounds.

    Args:
        mask, rounds: what `select_blocks(…, return_rounds=True)` returns.
        config: of that call; says what a score is.
        q_block: which query block; negative ones count from the last.
        head, batch: which head of which text.
        title: its first words; head, query block, T, k and the pruned share follow.

    Raises:
        ValueError: there are no rounds (every block was a branch of its own from the start), or no such query block.
    """
    frame = _checked(mask, rounds, q_block, head, batch)
    q_block %= mask.q_blocks
    figure = go.Figure()
    linear = config.reduce == "max"
    # Survivors last, so that their outlines lie on top.
    frame = frame.sort_values("survives", kind="stable")
    known = frame[np.isfinite(frame["score"])]
    value = known["score"] if linear else np.log10(known["score"].clip(lower=1e-30))
    figure.add_trace(_bars(known, mask, {"color": value, "coloraxis": "coloraxis"}, "branch"))
    unseen = frame[~np.isfinite(frame["score"])]
    if len(unseen):
        figure.add_trace(_bars(unseen, mask, {"color": pale("grey")}, "seen by no row"))
    for trace in _kept(mask, rounds, q_block, head, batch):
        figure.add_trace(trace)
    first = mask.offset + q_block * mask.q_block
    last = min(first + mask.q_block, mask.offset + mask.q_len)
    _lay_out(figure, first, last, len(rounds))
    figure.update_layout(coloraxis=_axis(value, linear=linear))
    pruned = mask.select(batch=slice(batch, batch + 1), heads=[head]).sparsity("causal")
    about = f"T = {mask.kv_len:,}, {config_text(config)}, {pruned:.1%} of the causal half pruned"
    return styled(
        figure,
        f"{title}: head {head}, query block {q_block} (tokens {first:,} to {last - 1:,})<br><sup>{about}; "
        f"colour: {_SCORES[config.reduce]}; outlined: survives; green: the queries</sup>",
        height=62 * len(rounds) + 290,
    )


def _lay_out(figure: go.Figure, first: int, last: int, rounds: int) -> None:
    """Rounds downwards, keys across, and a band where the queries are."""
    figure.add_vrect(x0=first, x1=last, fillcolor=COLOURS["green"], opacity=0.15, line_width=0, layer="below")
    figure.update_xaxes(title_text="key token", range=[0, last], showgrid=False, zeroline=False)
    figure.update_yaxes(
        tickvals=list(range(rounds + 1)),
        ticktext=[*(f"round {number}" for number in range(1, rounds + 1)), "kept"],
        range=[rounds + 0.55, -0.55],
        ticks="outside",
        tickcolor="white",
    )
    figure.update_layout(barmode="overlay", bargap=0, legend={"orientation": "h", "y": -0.2, "x": 0})


def _checked(mask: BlockMask, rounds: Sequence[SearchRound], q_block: int, head: int, batch: int) -> pd.DataFrame:
    if not rounds:
        raise ValueError(
            "this search had no rounds: every key block was a branch of its own. Give a longer text, a smaller k, or "
            "oversample=1."
        )
    if not -mask.q_blocks <= q_block < mask.q_blocks:
        raise ValueError(f"query block {q_block} is not there: the mask has {mask.q_blocks}.")
    return rounds_frame(rounds, q_block=q_block, head=head, batch=batch)


def rounds_frame(rounds: Sequence[SearchRound], *, q_block: int, head: int = 0, batch: int = 0) -> pd.DataFrame:
    """One row a branch that competed: round (from 0), start and stop in key blocks, score, survives."""
    parts = []
    for number, state in enumerate(rounds):
        fields = {name: getattr(state, name)[batch, head, q_block] for name in ("start", "stop", "score", "survives")}
        part = pd.DataFrame({"round": number, **{name: field.cpu().numpy() for name, field in fields.items()}})
        parts.append(part[part["stop"] > part["start"]])
    return pd.concat(parts, ignore_index=True)


def _bars(frame: pd.DataFrame, mask: BlockMask, marker: dict[str, object], name: str) -> go.Bar:
    survives = frame["survives"].to_numpy()
    start, stop = _tokens(frame, mask)
    line = {
        "color": np.where(survives, COLOURS["red"], "white"),
        "width": np.where(survives, 1.6, 0.5),
    }
    return go.Bar(
        x=stop - start,
        base=start,
        y=frame["round"],
        orientation="h",
        width=0.72,
        marker={**marker, "line": line},
        name=name,
        showlegend=False,
        customdata=[
            f"key blocks {row.start} to {row.stop - 1}, tokens {first:,} to {last - 1:,}<br>score "
            f"{row.score:.3g}: {'survives' if row.survives else 'dropped'}"
            for row, first, last in zip(frame.itertuples(index=False), start, stop, strict=True)
        ],
        hovertemplate="%{customdata}<extra></extra>",
    )


def _kept(mask: BlockMask, rounds: Sequence[SearchRound], q_block: int, head: int, batch: int) -> list[go.Bar]:
    """What the mask keeps: found by the search, and kept without one."""
    slots = mask.indices[batch, head, q_block].cpu().numpy()
    blocks = slots[slots >= 0]
    last = rounds_frame(rounds[-1:], q_block=q_block, head=head, batch=batch)
    searched = np.isin(blocks, last.loc[last["survives"], "start"])
    traces = []
    for which, colour, name in ((searched, "blue", "kept by the search"), (~searched, "grey", "kept without a search")):
        part = pd.DataFrame({"start": blocks[which], "stop": blocks[which] + 1})
        start, stop = _tokens(part, mask)
        traces.append(
            go.Bar(
                x=stop - start,
                base=start,
                y=np.full(len(part), len(rounds)),
                orientation="h",
                width=0.72,
                marker={"color": COLOURS[colour], "line": {"color": "white", "width": 0.5}},
                name=name,
                customdata=part["start"],
                hovertemplate="key block %{customdata}<extra>" + name + "</extra>",
            )
        )
    return traces


def _tokens(frame: pd.DataFrame, mask: BlockMask) -> tuple[np.ndarray, np.ndarray]:
    start, stop = (frame[name].to_numpy() * mask.k_block for name in ("start", "stop"))
    return start, np.minimum(stop, mask.kv_len)


def _axis(value: pd.Series, *, linear: bool) -> dict[str, object]:
    """Logits as they are; shares by their logarithm, where all below a ten-thousandth of the best look alike."""
    bar: dict[str, object] = {"title": {"text": "score", "side": "right"}, "thickness": 12}
    lowest, highest = (float(value.min()), float(value.max())) if len(value) else (0.0, 1.0)
    if not linear:
        lowest = max(lowest, highest - 4)
        ticks = np.arange(np.ceil(lowest), np.floor(highest) + 1)
        bar |= {"tickvals": ticks, "ticktext": [f"10<sup>{tick:.0f}</sup>" for tick in ticks]}
    return {"cmin": lowest, "cmax": highest, "colorscale": SCALE, "colorbar": bar}
