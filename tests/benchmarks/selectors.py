"""How much of the dense attention each way of selecting blocks finds, on real queries and keys, and at what cost.

    OMP_NUM_THREADS=1 python -m tests.benchmarks.selectors [--quick]

Every selector has the same budget. Its recall is compared with the exhaustive oracle's (the best k blocks by mass), in
total and *distant*: outside the first block, the diagonal block and the one before it, since a window with the sink
finds most of the rest without looking. Rows that see no more than 2k blocks are left out. Time is that of the selection
alone, summed over all cells and divided by the published default's in the same process.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from stream_kernels.rule import ScoreRule
from stream_lens.blocks import BlockMask, StreamConfig, select_blocks
from tests.benchmarks.real_heads import LAYERS, TEXTS, Heads, captured

BLOCK = 32
DEFAULT = "default"
PAPER = {"representative": "centre", "reduce": "max", "oversample": 1, "query_stride": 2}
SELECTORS: dict[str, dict[str, Any]] = {
    DEFAULT: {},
    "representative mean": {"representative": "mean"},
    "representative centre": {"representative": "centre"},
    "representative first": {"representative": "first"},
    "rounds by max": {"reduce": "max"},
    "rounds by peak": {"reduce": "peak"},
    "ranked by max": {"rank": "max"},
    "ranked by peak": {"rank": "peak"},
    "oversample 1 (no exact ranking)": {"oversample": 1},
    "oversample 2": {"oversample": 2},
    "oversample 4": {"oversample": 4},
    "oversample 8": {"oversample": 8},
    "every row scored": {"query_stride": 1},
    "every eighth row scored": {"query_stride": 8},
    "one local block": {"local_blocks": 1},
    "mean, oversample 4, ranked by max": {"representative": "mean", "oversample": 4, "rank": "max"},
    "centre, max, oversample 1": PAPER,
    "window + sink": {"selector": "window_sinks"},
    "random": {"selector": "random"},
}


def dense_block_mass(heads: Heads) -> Float[Tensor, "head q_blocks k_blocks"]:
    """Attention of the dense softmax summed over each block's rows and keys."""
    _, n_heads, length, _ = heads.q.shape
    group = n_heads // heads.k.shape[1]
    blocks = -(-length // BLOCK)
    mass = torch.zeros(n_heads, blocks, blocks)
    for head in range(n_heads):
        for first in range(0, blocks, 8):
            rows = slice(first * BLOCK, min((first + 8) * BLOCK, length))
            scores = heads.scale * heads.q[0, head, rows] @ heads.k[0, head // group, : rows.stop].T
            position = torch.arange(rows.start, rows.stop)[:, None]
            pattern = scores.masked_fill(torch.arange(rows.stop) > position, -torch.inf).softmax(-1)
            padded = torch.nn.functional.pad(pattern, (0, -rows.stop % BLOCK, 0, -len(pattern) % BLOCK))
            here = padded.unflatten(0, (-1, BLOCK)).unflatten(2, (-1, BLOCK)).sum((1, 3))
            mass[head, first : first + len(here), : here.shape[1]] = here
    return mass


def oracle(mass: Tensor, k: int) -> Bool[Tensor, "head q_blocks k_blocks"]:
    """The k blocks of most mass, the first and the diagonal one always among them."""
    block = torch.arange(mass.shape[1])
    visible = block[None, :] <= block[:, None]
    score = mass.masked_fill(~visible, -1)
    score[:, block, block] = score[:, :, 0] = torch.inf
    best = score.topk(min(k, len(block)), -1).indices
    return torch.zeros_like(visible).expand_as(mass).clone().scatter_(2, best, True) & visible


def kept(mask: BlockMask) -> Bool[Tensor, "head q_blocks k_blocks"]:
    index = mask.indices[0].long()
    blocks = index.shape[1]
    found = torch.zeros(*index.shape[:2], blocks + 1, dtype=torch.bool)
    return found.scatter_(2, torch.where(index < 0, blocks, index), True)[..., :blocks]


def recall(mass: Tensor, chosen: Tensor, k: int) -> tuple[Float[Tensor, "head"], Float[Tensor, "head"]]:
    """Each head's share of all, and of the distant attention, that lies in the chosen blocks."""
    block = torch.arange(mass.shape[1])
    distant = mass * ((block[None, :] >= 1) & (block[None, :] < block[:, None] - 1))
    shares = []
    for part in (mass, distant):
        part = part[:, 2 * k :]
        shares.append((part * chosen[:, 2 * k :]).sum((1, 2)) / part.sum((1, 2)))
    return shares[0], shares[1]


def measure(heads: Heads, mass: Tensor, k: int) -> list[dict[str, Any]]:
    """One row a selector and head."""
    best_total, best_distant = recall(mass, oracle(mass, k), k)
    rows = []
    for name, choices in SELECTORS.items():
        start = time.perf_counter()
        mask = select_blocks(heads.q, heads.k, StreamConfig(k=k, **choices), ScoreRule(heads.scale))
        seconds = time.perf_counter() - start
        total, distant = recall(mass, kept(mask), k)
        rows += [
            {
                "model": heads.model,
                "text": heads.text,
                "tokens": heads.q.shape[2],
                "k": k,
                "layer": heads.layer,
                "head": head,
                "selector": name,
                "total": float(total[head]),
                "distant": float(distant[head]),
                "total_of_oracle": float(total[head] / best_total[head]),
                "distant_of_oracle": float(distant[head] / best_distant[head]),
                "seconds": seconds / len(total),
            }
            for head in range(len(total))
        ]
    return rows


def summary(rows: pd.DataFrame, keys: list[str]) -> pd.DataFrame:
    """Mean and tenth percentile over heads, layers and what else `keys` leaves out."""
    groups = rows.groupby(keys, sort=False)
    table = groups[["total", "distant", "total_of_oracle", "distant_of_oracle"]].mean()
    for name in ("total_of_oracle", "distant_of_oracle"):
        table[f"{name}_p10"] = groups[name].quantile(0.1)
    table["heads"] = groups.size()
    seconds = groups.seconds.sum().reset_index()
    others = [key for key in keys if key != "selector"]
    default = seconds[seconds.selector == DEFAULT]
    base = seconds[others].merge(default, on=others).seconds if others else default.seconds.iloc[0]
    table["time"] = (seconds.seconds / base).to_numpy()
    return table.round(4).reset_index()


def cut(heads: Heads, tokens: int) -> Heads:
    """The first tokens only: with causal attention the same as a capture of the shorter text."""
    return Heads(heads.model, heads.text, heads.layer, heads.q[:, :, :tokens], heads.k[:, :, :tokens], heads.scale)


def collect(budgets: dict[int, int], cache: Path | None) -> pd.DataFrame:
    """Rows for every length and its k."""
    rows: list[dict[str, Any]] = []
    for name in LAYERS:
        for text in TEXTS:
            # A needle prompt ends with its question, so each length is a prompt of its own; other texts are cut.
            for longest in budgets if text == "needle" else [max(budgets)]:
                for heads in captured(name, text, longest, cache):
                    mass = dense_block_mass(heads)
                    for tokens in [longest] if text == "needle" else budgets:
                        blocks = -(-tokens // BLOCK)
                        rows += measure(cut(heads, tokens), mass[:, :blocks, :blocks], budgets[tokens])
    return pd.DataFrame(rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="2,048 tokens only")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "selectors.json")
    parser.add_argument("--cache", type=Path, help="folder that keeps queries and keys for the next run")
    options = parser.parse_args()
    rows = collect({2048: 8} if options.quick else {2048: 8, 4096: 8, 8192: 16}, options.cache)
    # The nominal length names a cell: a needle prompt is a few tokens shorter.
    rows["tokens"] = (rows.tokens / 1024).round().astype(int) * 1024
    overall = summary(rows, ["selector"])
    by_model = summary(rows, ["model", "selector"])
    cells = summary(rows, ["model", "text", "tokens", "k", "selector"])
    layers = summary(rows, ["model", "layer", "selector"])
    shown = ("default", "window + sink", "random")
    heads = rows[rows.selector.isin(shown)].drop(columns="seconds").round(4)
    print(overall.to_string(index=False))
    print(by_model.to_string(index=False))
    tables = {"overall": overall, "by_model": by_model, "by_layer": layers, "cells": cells}
    result: dict[str, Any] = {
        "default": {name: getattr(StreamConfig(), name) for name in ("representative", "reduce", "oversample", "rank")},
        **{name: table.to_dict("records") for name, table in tables.items()},
        "heads": {"columns": list(heads.columns), "rows": heads.to_numpy().tolist()},
    }
    if not options.quick or options.out != parser.get_default("out"):
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(json.dumps(result) + "\n")


if __name__ == "__main__":
    main()
