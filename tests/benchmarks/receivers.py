"""Do sparse runs rank the same receiver heads as dense ones? Spearman's correlation over all heads, at 90% pruned.

Reasoning traces for SmolLM2, prose for Gemma. Three runs of each text: dense patterns, the sparse model (its masks in
every layer), and masks observed beside the dense output. `python -m tests.benchmarks.receivers [--threads N]`.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from typing import Any

import torch
from rich.console import Console

import stream_lens as sl
from stream_lens.circuits.receiver_heads import rank_correlation, receiver_heads
from stream_lens.circuits.segmentation import sentences
from stream_lens.circuits.segments import Segments
from stream_lens.circuits.vertical_scores import VerticalScores, vertical_scores
from stream_lens.models import load_demo_model
from stream_lens.tasks.reasoning import example_traces
from tests.benchmarks.measuring import print_table, write_results
from tests.benchmarks.real_heads import text_of

# At about 700 tokens a tenth of the causal half is two blocks of 32 a row, no more than the sink and the diagonal.
CHOICES = {"q_block": 8, "k_block": 8, "k": sl.FractionOfPrefix(0.1)}
PROSE_CHARS = 3_000
PATTERNS = "attn.hook_pattern"


def texts_of(name: str, model: Any) -> Iterator[tuple[str, Segments]]:
    """At least three texts of up to about 900 tokens, with their sentences."""
    if name == "smollm2-135m":
        for trace in example_traces():
            segments = trace.segments(model.tokenizer, with_problem_and_answer=True)
            yield segments.text, segments
        return
    prose = text_of("prose", model.tokenizer, 0)
    for number in range(3):
        text = prose[number * 4 * PROSE_CHARS :][:PROSE_CHARS]
        yield text, sentences(text, model.tokenizer, min_chars=10)


@torch.no_grad()
def scored(name: str, model: Any) -> tuple[dict[str, VerticalScores], float, float, list[int]]:
    """Vertical scores of every way to run the texts; pruned share of the causal half, and of T²; tokens a text."""
    ways: dict[str, list[Any]] = {"dense": [], "sparse": [], "observed": []}
    segments, causal, full, tokens_of = [], [], [], []
    for text, own in texts_of(name, model):
        tokens = model.to_tokens(text)
        assert tokens.shape[1] == own.n_tokens
        tokens_of.append(own.n_tokens)
        segments.append(own)
        cached = {"names_filter": lambda hook: hook.endswith(PATTERNS)}
        ways["dense"].append(vertical_scores(model.run_with_cache(tokens, **cached)[1], own))
        for way, observe in (("sparse", False), ("observed", True)):
            with sl.stream(model, observe=observe, **CHOICES):
                _, cache = model.run_with_cache(tokens, **cached)
            ways[way].append(vertical_scores(cache, own))
        causal += [mask.sparsity("causal") for mask in cache.masks().values()]
        full += [mask.sparsity("full") for mask in cache.masks().values()]
    joined = {way: _joined(scores, tuple(segments)) for way, scores in ways.items()}
    return joined, sum(causal) / len(causal), sum(full) / len(full), tokens_of


def _joined(scores: list[VerticalScores], segments: tuple[Segments, ...]) -> VerticalScores:
    first = scores[0]
    every = tuple(text for each in scores for text in each.scores)
    return VerticalScores(every, segments, first.layers, first.min_distance, first.control_depth, first.exact)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--models", nargs="+", default=["smollm2-135m", "gemma-3-270m"])
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    rows = []
    for name in options.models:
        scores, causal, full, tokens = scored(name, load_demo_model(name))
        heads = {way: receiver_heads(each, top_n=20) for way, each in scores.items()}
        for way in ("sparse", "observed"):
            alike = rank_correlation(heads["dense"], heads[way])
            rows.append(
                {
                    "model": name,
                    "run": way,
                    "texts": len(tokens),
                    "tokens": f"{min(tokens)}-{max(tokens)}",
                    "pruned_of_causal": causal,
                    "pruned_of_full": full,
                    "spearman": alike.spearman,
                    "heads": alike.heads,
                    "top20_shared": alike.top_shared,
                    "split_half_dense": heads["dense"].split_half,
                    "split_half": heads[way].split_half,
                }
            )
        choices = {"q_block": 8, "k_block": 8, "k": "a tenth of the prefix"}
        path = write_results("receivers", rows, choices=choices)  # after each model: the run takes minutes
    print_table("Receiver heads, sparse against dense", rows)
    Console().print(f"written to {path}")


if __name__ == "__main__":
    main()
