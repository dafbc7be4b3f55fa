"""Gate attribution against real ablation on a real model: `python -m tests.benchmarks.attribution`.

Two samples of kept blocks, each ablated by one forward: uniform, and by rank of |score| (a uniform sample holds few
blocks that matter). Writes results/attribution.json beside this file.
"""

from __future__ import annotations

import argparse
import json
import platform
import time
from pathlib import Path
from typing import Any

import torch

import stream_lens as sl
from stream_lens.circuits.attribution import GateAttribution, gate_attribution
from stream_lens.circuits.metrics import answer_log_probability, with_answer
from stream_lens.circuits.pruning import prune
from stream_lens.circuits.text_tokens import text_tokens
from stream_lens.tasks.needle import needle_case

RESULTS = Path(__file__).parent / "results" / "attribution.json"


def needle_input(model: Any, tokens: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """A needle prompt and its answer, as token ids [1, position] and [n]."""
    case = needle_case("single_1", model.tokenizer, tokens=tokens, depth=0.5, seed=seed)
    prompt = text_tokens(case.prompt, model.tokenizer, prepend_bos=case.prepend_bos)
    whole = text_tokens(f"{case.prompt} {case.answers[0]}", model.tokenizer, prepend_bos=case.prepend_bos)
    ids = torch.as_tensor(whole.token_ids)
    assert torch.equal(ids[: prompt.n_tokens], torch.as_tensor(prompt.token_ids)), (
        "the answer must not change the prompt"
    )
    return ids[None, : prompt.n_tokens], ids[prompt.n_tokens :]


def checked(attribution: GateAttribution, sample: Any, n: int, seed: int) -> dict[str, Any]:
    """Correlations of one sample, and how large its effects are."""
    check = attribution.check_by_ablation(n, seed, sample=sample)
    size = check.table["effect"].abs()
    # Where a few blocks decide Pearson's r, the report must show which.
    largest = check.table.loc[size.nlargest(5).index]
    rest = check.table.drop(largest.index)
    return {
        "n": check.n,
        "pearson": check.pearson,
        "spearman": check.spearman,
        "largest_effect": float(size.max()),
        "median_effect": float(size.median()),
        "blocks_over_0.01_nats": int((size > 0.01).sum()),
        "pearson_without_5_largest_effects": float(rest["score"].corr(rest["effect"])),
        "largest_effects": largest[["layer", "head", "q_block", "k_block", "score", "effect"]].to_dict("records"),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="gemma-3-270m")
    parser.add_argument("--tokens", type=int, default=1000)
    parser.add_argument("--k", type=int, default=16)
    parser.add_argument("-n", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, nargs="*", default=[1])
    parser.add_argument("--skip-pruning", action="store_true")
    choices = parser.parse_args()
    model = sl.load_demo_model(choices.model)
    prompt, answer = needle_input(model, choices.tokens, choices.seed)
    metric, config = answer_log_probability(answer), sl.StreamConfig(k=choices.k)
    results: dict[str, Any] = {
        "model": choices.model,
        "tokens": int(prompt.shape[1]),
        "answer_tokens": len(answer),
        "k": choices.k,
        "q_block": config.q_block,
        "k_block": config.k_block,
        "seed": choices.seed,
        "torch": torch.__version__,
        "machine": platform.machine(),
        "runs": [],
    }
    for steps in choices.steps:
        started = time.perf_counter()
        attribution = gate_attribution(model, with_answer(prompt, answer), metric, config, steps=steps)
        seconds = time.perf_counter() - started
        run: dict[str, Any] = {
            "steps": steps,
            "log_probability": attribution.value,
            "kept_blocks": len(attribution.edges()[1]),
            "seconds": seconds,
        }
        for sample in ("uniform", "by_rank"):
            run[sample] = checked(attribution, sample, choices.n, choices.seed)
            print(json.dumps({"steps": steps, sample: run[sample]}), flush=True)
        if not choices.skip_pruning:
            pruned = prune(attribution, 0.9)
            run["pruned_to_90_percent"] = {
                "edges": pruned.edges,
                "of": pruned.all_edges,
                "faithfulness": pruned.faithfulness,
                "random": pruned.random,
                "full": pruned.full,
                "none": pruned.none,
            }
        results["runs"].append(run)
    RESULTS.parent.mkdir(exist_ok=True)
    RESULTS.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    print(RESULTS.read_text(encoding="utf-8"))


if __name__ == "__main__":
    main()
