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

GLOBAL = (5, 11, 17)
WHOLE_WINDOW = sl.StreamConfig(k=19, selector="window_sinks", sink_blocks=0)
"""Keeps every block that a row of a window of 512 sees."""
DENSE = sl.StreamConfig(k=1024, selector="window_sinks")
CALIBRATION = ((0.25, 900), (0.75, 901))
"""Depths and seeds of the prompts calibrated on; no case has these seeds."""


def prompt_and_answer(model: Any, tokens: int, depth: float, seed: int) -> tuple[Tensor, int]:
    """Token ids of prompt, colon and answer, and how many digits end them (one token each)."""
    case = needle_case("single_1", model.tokenizer, tokens=tokens, depth=depth, seed=seed)
    # After the prompt the model writes a colon and a space; then come the digits.
    answer = model.tokenizer(f": {case.answers[0]}", add_special_tokens=False, return_tensors="pt").input_ids
    return torch.cat([model.to_tokens(case.prompt), answer], 1), len(case.answers[0])


@torch.no_grad()
def run(model: Any, config: sl.StreamConfig, ids: Tensor, digits: int) -> dict[str, Any]:
    """Whether the answer is found, its log-probability, and the pruned share of the global layers' causal half."""
    pruned = []
    with sl.stream(model, WHOLE_WINDOW, keep_scores=False), last_logits_only(model, digits + 1):
        for layer in model.__dict__["_stream_session"].layers:
            if layer.number in GLOBAL:
                layer.config = config
        hooks = [
            (f"blocks.{layer}.attn.hook_pattern", lambda pattern, hook: pruned.append(pattern.mask.sparsity("causal")))
            for layer in GLOBAL
        ]
        logits = model.run_with_hooks(ids, fwd_hooks=hooks)[0, :-1].float()
    wanted = ids[0, -digits:]
    log_probability = logits.log_softmax(-1).gather(1, wanted[:, None]).sum()
    return {
        "found": bool((logits.argmax(-1) == wanted).all()),
        "log_probability": float(log_probability),
        "pruned": sum(map(float, pruned)) / len(pruned),
    }


def halved(low: float, high: float, steps: int, too_many: Callable[[float], bool]) -> float:
    """The largest value found, by halving, that is not too many."""
    for _ in range(steps):
        middle = (low + high) / 2
        low, high = (low, middle) if too_many(middle) else (middle, high)
    return low


def schedules(model: Any, tokens: int, k: int, note: Callable[[str], None]) -> dict[str, sl.StreamConfig]:
    """Every way to spend k blocks a row, those of the same total after calibration on prompts that are no case."""
    blocks = math.ceil(tokens / 32)
    visible = torch.arange(1, blocks + 1)
    total = int(visible.clamp(max=k).sum())

    def fraction(share: float) -> sl.FractionOfPrefix:
        return sl.FractionOfPrefix(share, minimum=2)

    share = halved(
        0.0, 1.0, 20, lambda x: int(torch.minimum(fraction(max(x, 1e-6)).blocks(visible), visible).sum()) > total
    )
    prompts = [prompt_and_answer(model, tokens, depth, seed) for depth, seed in CALIBRATION]
    texts = [ids for ids, _ in prompts]
    every = calibrate(model, texts, k, most=8 * k).overrides
    last = calibrate(model, texts, k, most=8 * k, last_rows=1).overrides
    ids, digits = prompts[0]
    target = run(model, sl.StreamConfig(k=k), ids, digits)["pruned"]
    mass = halved(
        0.05,
        1.0,
        6,
        lambda x: run(model, sl.StreamConfig(k=sl.MassThreshold(x, 4 * k)), ids, digits)["pruned"] < target,
    )
    note(
        f"fraction {share:.4f}, mass {mass:.3f}, calibrated {list(every.values())}, on last rows {list(last.values())}"
    )
    return {
        "constant": sl.StreamConfig(k=k),
        "constant, ranked by max": sl.StreamConfig(k=k, rank="max"),
        "fraction of prefix": sl.StreamConfig(k=fraction(share)),
        "mass threshold": sl.StreamConfig(k=sl.MassThreshold(mass, 4 * k)),
        "calibrated heads": sl.StreamConfig(k=k, overrides=every),
        "calibrated heads, last rows": sl.StreamConfig(k=k, overrides=last),
        "constant, oracle by mass": sl.StreamConfig(k=k, selector="exhaustive"),
        "constant, oracle by max": sl.StreamConfig(k=k, selector="exhaustive", rank="max"),
        "window + sink": sl.StreamConfig(k=k, selector="window_sinks"),
        "random": sl.StreamConfig(k=k, selector="random"),
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
    parser.add_argument("--out", type=Path, default=None)
    options = parser.parse_args()
    out = options.out or Path(__file__).parent / "results" / f"needle_budget_{options.tokens}_k{options.k}.json"
    model = sl.load_model("gemma-3-270m", as_="hooked", n_ctx=options.tokens + 32, dtype=getattr(torch, options.dtype))
    start = time.perf_counter()

    def note(text: str) -> None:
        print(f"{time.perf_counter() - start:7.0f} s  {text}", flush=True)

    ways = schedules(model, options.tokens, options.k, note)
    rows: list[dict[str, Any]] = []
    failed = answered = seed = 0
    while answered < options.cases:
        depth = (3 * seed % 10) / 9
        case = prompt_and_answer(model, options.tokens, depth, seed)
        dense = run(model, DENSE, *case)
        seed += 1
        if not dense["found"]:
            failed += 1
            note(f"case {seed}: dense fails")
            continue
        answered += 1
        where = {"seed": seed - 1, "depth": round(depth, 3)}
        rows.append({"schedule": "dense", **where, **dense})
        rows += [{"schedule": name, **where, **run(model, config, *case)} for name, config in ways.items()]
        overall = table(rows)
        note(f"case {seed}: n = {answered} {dict(zip(overall.schedule, overall.found, strict=True))}")
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


if __name__ == "__main__":
    main()
