"""Where a budget of kept blocks goes, and what that does to retrieval: schedules at the same total, on needle prompts.

    OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 python -m tests.benchmarks.needle_budget --k 6 --cases 20

Gemma 3 270M; its three global layers are pruned, its windows kept whole. Every schedule's total of kept blocks is
matched to the constant k's. A case is a needle of its own at one of ten depths. It counts as found if all digits of the
answer are the most likely next token when the prompt, a colon and the digits before are given: one forward a case.
Cases that dense attention fails are counted and left out.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from torch import Tensor

import stream_lens as sl
from stream_lens.backend.long_inputs import last_logits_only
from stream_lens.circuits.calibration import calibrate
from stream_lens.tasks.needle import needle_case
from tests.benchmarks.real_heads import text_of

GLOBAL = (5, 11, 17)
WHOLE_WINDOW = sl.StreamConfig(k=19, selector="window_sinks", sink_blocks=0)
"""Keeps every block that a row of a window of 512 sees."""
DENSE = sl.StreamConfig(k=1024, selector="window_sinks")
EVERY = "every layer"
CALIBRATION = ((0.25, 900), (0.75, 901))
"""Depths and seeds of the prompts calibrated on; no case has these seeds."""


def prompt_and_answer(model: Any, tokens: int, depth: float, seed: int) -> tuple[Tensor, int]:
    """Token ids of prompt, colon and answer, and how many digits end them (one token each)."""
    case = needle_case("single_1", model.tokenizer, tokens=tokens, depth=depth, seed=seed)
    # After the prompt the model writes a colon and a space; then come the digits.
    answer = model.tokenizer(f": {case.answers[0]}", add_special_tokens=False, return_tensors="pt").input_ids
    return torch.cat([model.to_tokens(case.prompt), answer], 1), len(case.answers[0])


@torch.no_grad()
def below(model: Any, ids: Tensor) -> Tensor:
    """The residual stream before the first pruned layer, the same for every schedule."""
    with sl.stream(model, WHOLE_WINDOW, keep_scores=False):
        return model(ids, stop_at_layer=GLOBAL[0])


@torch.no_grad()
def run(model: Any, config: sl.StreamConfig, ids: Tensor, digits: int, start: Tensor | None = None) -> dict[str, Any]:
    """Whether the answer is found, its log-probability, and the pruned share of the global layers' causal half."""
    start = below(model, ids) if start is None else start
    pruned: list[float] = []
    with sl.stream(model, WHOLE_WINDOW, keep_scores=False), last_logits_only(model, digits + 1):
        for layer in model.__dict__["_stream_session"].layers:
            if layer.number in GLOBAL:
                layer.config = config
        hooks = [
            (f"blocks.{layer}.attn.hook_pattern", lambda pattern, hook: pruned.append(pattern.mask.sparsity("causal")))
            for layer in GLOBAL
        ]
        logits = model.run_with_hooks(start, start_at_layer=GLOBAL[0], fwd_hooks=hooks)
    return judged(logits, ids, digits, pruned)


@torch.no_grad()
def run_every_layer(model: Any, config: sl.StreamConfig, ids: Tensor, digits: int) -> dict[str, Any]:
    """The same with the windows pruned to k blocks too; `pruned` counts what a row can see, windows included.

    `pruned_global` is of the global layers' causal half.
    """
    with sl.stream(model, config, keep_scores=False):
        logits, cache = sl.run_with_masks(model, ids, last_logits=digits + 1)
    masks = [cache["pattern", layer].mask for layer in range(model.cfg.n_layers)]
    of_global = [float(masks[layer].sparsity("causal")) for layer in GLOBAL]
    found = judged(logits, ids, digits, [mask.sparsity("visible") for mask in masks])
    return {**found, "pruned_global": sum(of_global) / len(of_global)}


def judged(logits: Tensor, ids: Tensor, digits: int, pruned: list[float]) -> dict[str, Any]:
    logits, wanted = logits[0, :-1].float(), ids[0, -digits:]
    return {
        "found": bool((logits.argmax(-1) == wanted).all()),
        "log_probability": float(logits.log_softmax(-1).gather(1, wanted[:, None]).sum()),
        "pruned": sum(map(float, pruned)) / len(pruned),
    }


def halved(low: float, high: float, steps: int, too_many: Callable[[float], bool]) -> float:
    """The largest value found, by halving, that is not too many."""
    for _ in range(steps):
        middle = (low + high) / 2
        low, high = (low, middle) if too_many(middle) else (middle, high)
    return low


def calibrated(model: Any, tokens: int, k: int) -> dict[str, dict[tuple[int, int], int]]:
    """The k of every head, by what it was calibrated on; the last is a control, the same numbers at the wrong heads."""
    needles = [prompt_and_answer(model, tokens, depth, seed)[0] for depth, seed in CALIBRATION]
    prose = model.to_tokens(text_of("prose", model.tokenizer, 2 * tokens), truncate=False)
    # Two pieces, each with the first token that the model expects.
    pieces = [torch.cat([prose[:, :1], prose[:, 1 + i * tokens :][:, : tokens - 1]], 1) for i in range(2)]
    last = calibrate(model, needles, k, most=8 * k, last_q_blocks=1).overrides
    ks = list(last.values())
    random.Random(0).shuffle(ks)
    return {
        "all rows": dict(calibrate(model, needles, k, most=8 * k).overrides),
        "last block": dict(last),
        "last block of prose": dict(calibrate(model, pieces, k, most=8 * k, last_q_blocks=1).overrides),
        "last block, shuffled": dict(zip(last, ks, strict=True)),
    }


def schedules(model: Any, tokens: int, k: int, note: Callable[[str], None]) -> dict[str, sl.StreamConfig]:
    """Every way to spend k blocks a row on average; nothing here looks at a case."""
    visible = torch.arange(1, math.ceil(tokens / 32) + 1)
    total = int(visible.clamp(max=k).sum())

    def fraction(share: float) -> sl.FractionOfPrefix:
        return sl.FractionOfPrefix(max(share, 1e-6), minimum=2)

    share = halved(0, 1, 20, lambda x: int(torch.minimum(fraction(x).blocks(visible), visible).sum()) > total)
    ids, digits = prompt_and_answer(model, tokens, *CALIBRATION[0])
    target = run(model, sl.StreamConfig(k=k), ids, digits)["pruned"]

    def threshold(mass: float) -> sl.StreamConfig:
        return sl.StreamConfig(k=sl.MassThreshold(mass, 4 * k))

    mass = halved(0.05, 1, 6, lambda x: run(model, threshold(x), ids, digits)["pruned"] < target)
    heads = calibrated(model, tokens, k)
    note(f"fraction {share:.4f}, mass {mass:.3f}, { ({name: list(ks.values()) for name, ks in heads.items()}) }")
    return {
        "constant": sl.StreamConfig(k=k),
        "constant, ranked by max": sl.StreamConfig(k=k, rank="max"),
        "constant, ranked by peak": sl.StreamConfig(k=k, rank="peak"),
        "fraction of prefix": sl.StreamConfig(k=fraction(share)),
        "mass threshold": threshold(mass),
        **{f"calibrated, {name}": sl.StreamConfig(k=k, overrides=ks) for name, ks in heads.items()},
        "constant, oracle by mass": sl.StreamConfig(k=k, selector="exhaustive"),
        "constant, oracle by max": sl.StreamConfig(k=k, selector="exhaustive", rank="max"),
        "window + sink": sl.StreamConfig(k=k, selector="window_sinks"),
        f"constant, {EVERY}": sl.StreamConfig(k=k),
        f"calibrated, last block, {EVERY}": sl.StreamConfig(k=k, overrides=heads["last block"]),
    }


def table(rows: list[dict[str, Any]]) -> pd.DataFrame:
    """Success over the cases that dense answers; the mean log-probability over the same."""
    frame = pd.DataFrame(rows)
    groups = frame.groupby("schedule", sort=False)
    summed = groups.agg(
        found=("found", "sum"),
        n=("found", "size"),
        log_probability=("log_probability", "mean"),
        pruned=("pruned", "mean"),
    )
    return summed.round(4).reset_index()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=int, default=4000)
    parser.add_argument("--k", type=int, default=6)
    parser.add_argument("--cases", type=int, default=20, help="cases that dense must answer")
    parser.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float32"))
    parser.add_argument("--resume", action="store_true", help="take from the output file what is there already")
    parser.add_argument("--out", type=Path, default=None)
    options = parser.parse_args()
    out = options.out or Path(__file__).parent / "results" / f"needle_budget_{options.tokens}_k{options.k}.json"
    model = sl.load_model("gemma-3-270m", as_="hooked", n_ctx=options.tokens + 32, dtype=getattr(torch, options.dtype))
    began = time.perf_counter()

    def note(text: str) -> None:
        print(f"{time.perf_counter() - began:7.0f} s  {text}", flush=True)

    ways = schedules(model, options.tokens, options.k, note)
    before = known(out, ways) if options.resume else {}
    rows: list[dict[str, Any]] = []
    failed: list[int] = []
    answered = seed = 0
    while answered < options.cases:
        where = {"seed": seed, "depth": round((3 * seed % 10) / 9, 3)}
        case = prompt_and_answer(model, options.tokens, where["depth"], seed)
        start = below(model, case[0])
        dense = before.get(("dense", seed)) or {"schedule": "dense", **where, **run(model, DENSE, *case, start)}
        seed += 1
        if not dense["found"]:
            failed.append(where["seed"])
            note(f"seed {where['seed']}: dense fails")
            continue
        answered += 1
        rows.append(dense)
        for name, config in ways.items():
            row = before.get((name, where["seed"]))
            if row is None:
                found = run_every_layer(model, config, *case) if EVERY in name else run(model, config, *case, start)
                row = {"schedule": name, **where, **found}
            rows.append(row)
        overall = table(rows)
        note(f"seed {where['seed']}: n = {answered} {dict(zip(overall.schedule, overall.found, strict=True))}")
        result = {
            "tokens": options.tokens,
            "k": options.k,
            "dtype": options.dtype,
            "dense_failed": failed,
            "configs": {name: config.to_json() for name, config in ways.items()},
            "overall": overall.to_dict("records"),
            "cases": rows,
        }
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(json.dumps(result) + "\n")
    print(overall.to_string(index=False))


def known(out: Path, ways: dict[str, sl.StreamConfig]) -> dict[tuple[str, int], dict[str, Any]]:
    """Rows of an earlier run whose configuration is the same now."""
    if not out.exists():
        return {}
    result = json.loads(out.read_text())
    same = {"dense"} | {name for name, config in ways.items() if result["configs"].get(name) == config.to_json()}
    return {(row["schedule"], row["seed"]): row for row in result["cases"] if row["schedule"] in same}


if __name__ == "__main__":
    main()
