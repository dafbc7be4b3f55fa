"""Do sparse runs rank the same receiver heads as dense ones? Spearman's correlation over all heads, at 90% pruned.

Reasoning traces for SmolLM2, prose for both models. Runs of each text: dense patterns; the sparse model (its masks in
every layer) with the search and, at the same budget, with each control; and masks observed beside the dense output,
which tells what is lost by dropping blocks from what is lost because the run drifts.
`python -m tests.benchmarks.receivers [--threads N] [--texts N] [--fraction F]`.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import scipy.stats
import torch
from rich.console import Console

import stream_lens as sl
from stream_lens.circuits.receiver_heads import ReceiverHeads, rank_correlation, receiver_heads
from stream_lens.circuits.segmentation import sentences
from stream_lens.circuits.segments import Segments
from stream_lens.circuits.vertical_scores import VerticalScores, vertical_scores
from stream_lens.models import load_demo_model
from stream_lens.tasks.reasoning import example_traces
from tests.benchmarks.measuring import print_table, write_results
from tests.benchmarks.real_heads import text_of

PROSE_CHARS = 3_000
PATTERNS = "attn.hook_pattern"
WAYS = {  # selector, whether dense outputs flow on
    "sparse": ("stream", False),
    "observed": ("stream", True),
    "exhaustive": ("exhaustive", False),
    "exhaustive observed": ("exhaustive", True),
    "window_sinks": ("window_sinks", False),
    "random": ("random", False),
}
SETS = (("smollm2-135m", "traces"), ("smollm2-135m", "prose"), ("gemma-3-270m", "prose"))


def texts_of(kind: str, model: Any, count: int) -> Iterator[tuple[str, Segments]]:
    """Texts of up to about 1,000 tokens with their sentences: `count` of prose, or the three traces that we have."""
    if kind == "traces":
        for trace in example_traces()[:count]:
            segments = trace.segments(model.tokenizer, with_problem_and_answer=True)
            yield segments.text, segments
        return
    prose = text_of("prose", model.tokenizer, 0)
    for number in range(count):
        text = prose[number * 4 * PROSE_CHARS :][:PROSE_CHARS]
        assert len(text) == PROSE_CHARS, f"the prose has no {count} texts"
        yield text, sentences(text, model.tokenizer, min_chars=10)


@torch.no_grad()
def scored(
    kind: str, model: Any, count: int, config: sl.StreamConfig
) -> tuple[dict[str, VerticalScores], float, float, list[int]]:
    """Vertical scores of every way to run the texts; pruned share of the causal half, and of T²; tokens a text."""
    ways: dict[str, list[Any]] = {"dense": [], **{way: [] for way in WAYS}}
    segments, causal, full, tokens_of = [], [], [], []
    for text, own in texts_of(kind, model, count):
        tokens = model.to_tokens(text)
        assert tokens.shape[1] == own.n_tokens
        tokens_of.append(own.n_tokens)
        segments.append(own)
        cached = {"names_filter": lambda hook: hook.endswith(PATTERNS)}
        ways["dense"].append(vertical_scores(model.run_with_cache(tokens, **cached)[1], own))
        for way, (selector, observe) in WAYS.items():
            with sl.stream(model, replace(config, selector=selector), observe=observe):
                _, cache = model.run_with_cache(tokens, **cached)
            ways[way].append(vertical_scores(cache, own))
        causal += [mask.sparsity("causal") for mask in cache.masks().values()]
        full += [mask.sparsity("full") for mask in cache.masks().values()]
    joined = {way: _joined(scores, tuple(segments)) for way, scores in ways.items()}
    return joined, float(np.mean(causal)), float(np.mean(full)), tokens_of


def stable_heads(dense: ReceiverHeads) -> np.ndarray:
    """[layer, head]: the half of the heads whose dense kurtosis varies least over texts, as a share of its mean."""
    finite = np.isfinite(dense.by_text).all(0)
    spread = np.where(finite, dense.by_text.std(0) / np.abs(dense.by_text.mean(0)), np.inf)
    return finite & (spread <= np.median(spread[finite]))


def _row(way: str, heads: dict[str, ReceiverHeads]) -> dict[str, Any]:
    dense, ours = heads["dense"], heads[way]
    alike, stable = rank_correlation(dense, ours), stable_heads(dense) & np.isfinite(ours.kurtosis)
    each = [
        scipy.stats.spearmanr(one.ravel(), other.ravel(), nan_policy="omit").statistic
        for one, other in zip(dense.by_text, ours.by_text, strict=True)
    ]
    return {
        "run": way,
        "spearman": alike.spearman,
        "heads": alike.heads,
        "top20_shared": alike.top_shared,
        "spearman_one_text_mean": float(np.mean(each)),
        "spearman_stable": float(scipy.stats.spearmanr(dense.kurtosis[stable], ours.kurtosis[stable]).statistic),
        "stable_heads": int(stable.sum()),
        "split_half_dense": dense.split_half,
        "split_half": ours.split_half,
    }


def _joined(scores: list[VerticalScores], segments: tuple[Segments, ...]) -> VerticalScores:
    first = scores[0]
    every = tuple(text for each in scores for text in each.scores)
    return VerticalScores(every, segments, first.layers, first.min_distance, first.control_depth, first.exact)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--texts", type=int, default=8, help="texts of prose; there are three traces")
    parser.add_argument("--fraction", type=float, default=0.1, help="share of the prefix kept")
    parser.add_argument("--models", nargs="+", default=["smollm2-135m", "gemma-3-270m"])
    parser.add_argument("--name", default="receivers", help="of the result file")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    # At about 700 tokens a tenth of the causal half is two blocks of 32 a row, no more than the sink and the diagonal.
    config = sl.StreamConfig(q_block=8, k_block=8, k=sl.FractionOfPrefix(options.fraction))
    choices = {"q_block": 8, "k_block": 8, "k": f"{options.fraction:g} of the prefix"}
    rows = []
    for name, kind in SETS:
        if name not in options.models:
            continue
        scores, causal, full, tokens = scored(kind, load_demo_model(name), options.texts, config)
        heads = {way: receiver_heads(each, top_n=20) for way, each in scores.items()}
        about = {"model": name, "kind": kind, "texts": len(tokens), "tokens": f"{min(tokens)}-{max(tokens)}"}
        pruned = {"pruned_of_causal": causal, "pruned_of_full": full}
        rows += [{**about, **pruned, **_row(way, heads)} for way in WAYS]
        path = write_results(options.name, rows, choices=choices)  # after each set: the run takes minutes
    print_table("Receiver heads, sparse against dense", rows)
    Console().print(f"written to {path}")


if __name__ == "__main__":
    main()
