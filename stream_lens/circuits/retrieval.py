"""Retrieval heads: those that look at a token in the context and say it next (arXiv 2404.15574)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float, Int
from torch import Tensor

from stream_lens.backend.long_inputs import tokens_within_context
from stream_lens.backend.pattern import SparsePattern
from stream_lens.blocks import StreamConfig
from stream_lens.circuits.ablation import Head
from stream_lens.circuits.edited_runs import Edit, run_edited, streamed_for_now, streamed_layers
from stream_lens.circuits.head_controls import HeadsAgainstRandom, heads_against_random
from stream_lens.circuits.metrics import MetricFunction, answer_log_probability, with_answer
from stream_lens.circuits.results import json_of
from stream_lens.circuits.text_tokens import Span, text_tokens

By = Literal["token", "block"]


@dataclass(frozen=True, eq=False)
class RetrievalCase:
    """A prompt, the tokens that should follow, and where in the prompt they stand to be copied from.

    Attributes:
        prompt: token ids [1, position].
        answer: token ids [n] of the right continuation; at least one of them stands in a source.
        sources: spans of token positions [start, stop) that hold what is to be copied.
    """

    prompt: Int[Tensor, "1 position"]
    answer: Int[Tensor, "n"]
    sources: tuple[Span, ...]

    def __post_init__(self) -> None:
        if self.prompt.ndim != 2 or self.prompt.shape[0] != 1 or self.answer.ndim != 1 or not len(self.answer):
            raise ValueError(
                f"a case has a prompt [1, position] and an answer [n]; got {list(self.prompt.shape)} and "
                f"{list(self.answer.shape)}."
            )
        for start, stop in self.sources:
            if not 0 <= start < stop <= self.prompt.shape[1]:
                raise ValueError(f"source [{start}, {stop}) is not in the prompt of {self.prompt.shape[1]} tokens.")
        if not self.sources:
            raise ValueError("a case needs at least one source span to copy from.")
        if not any(torch.isin(self.answer, self.prompt[0, start:stop]).any() for start, stop in self.sources):
            raise ValueError("no token of the answer stands in a source span, so that no head could copy one.")


@dataclass(frozen=True, eq=False)
class RetrievalScores:
    """How much of the answer each head copies: mean over the cases that the model answered.

    Attributes:
        scores: [layer, head], 0 to 1: the share of the source's tokens that the head looked at when they were said.
        layers: the number of each layer in `scores`.
        by_case: [case, layer, head], of the answered cases.
        cases: how many were given.
        answered: in which of them the sparse model said all answer tokens that stand in a source; the others are left
            out.
        by: "token" or "block".
        about: the model's name, for titles.
    """

    scores: Float[np.ndarray, "layer head"]
    layers: tuple[int, ...]
    by_case: Float[np.ndarray, "case layer head"]
    cases: int
    answered: tuple[bool, ...]
    by: str
    about: str = ""

    def top_heads(self, n: int = 10) -> tuple[Head, ...]:
        """The n heads that copy most, best first."""
        order = np.argsort(-self.scores.ravel(), kind="stable")[:n]
        heads = self.scores.shape[1]
        return tuple((self.layers[place // heads], int(place % heads)) for place in order)

    def to_frame(self) -> pd.DataFrame:
        """One row a head, best first: layer, head, score, std (over cases), cases."""
        layer, head = np.indices(self.scores.shape)
        frame = pd.DataFrame(
            {
                "layer": np.array(self.layers)[layer.ravel()],
                "head": head.ravel(),
                "score": self.scores.ravel(),
                "std": self.by_case.std(0).ravel(),
                "cases": len(self.by_case),
            }
        )
        return frame.sort_values("score", ascending=False, kind="stable", ignore_index=True)

    def plot(self, **options: Any) -> Any:
        """`stream_lens.plots.retrieval` of this result."""
        from stream_lens import plots

        return plots.retrieval(self, **options)

    def to_json(self) -> str:
        """All of it as a JSON object."""
        return json_of(self)


def retrieval_case(case: Any, tokenizer: Any) -> RetrievalCase:
    """A `stream_lens.tasks.needle.NeedleCase` with one answer as token ids. The value in the needle is the source.

    Raises:
        ValueError: it asks for several values, or the answer's tokens merge with the prompt's.
    """
    if len(case.answers) != 1:
        raise ValueError(f"the case asks for {len(case.answers)} values: retrieval scores take a task with one.")
    prompt = text_tokens(case.prompt, tokenizer, prepend_bos=case.prepend_bos)
    whole = text_tokens(f"{case.prompt} {case.answers[0]}", tokenizer, prepend_bos=case.prepend_bos)
    if not np.array_equal(whole.token_ids[: prompt.n_tokens], prompt.token_ids):
        raise ValueError("the tokenizer merges the end of the prompt with the answer: end the prompt at a whole token.")
    start, stop = case.value_spans[0]
    inside = np.flatnonzero((prompt.stops > start) & (prompt.starts < stop))
    return RetrievalCase(
        torch.from_numpy(prompt.token_ids.copy())[None],
        torch.from_numpy(whole.token_ids[prompt.n_tokens :].copy()),
        ((int(inside[0]), int(inside[-1]) + 1),),
    )


def retrieval_scores(
    model: Any,
    cases: Sequence[RetrievalCase],
    config: StreamConfig | None = None,
    *,
    by: By = "token",
) -> RetrievalScores:
    """Score every head by the share of the source that it copies while the model gives the answer.

    When the model says answer token w, a head copies a source position j if w stands there and j is where the head's
    row attends most; each position counts once, and the score is their number over the source's length. The answer is
    fed in, in one forward: the model says each of its tokens exactly if that token has the largest logit. A case where
    it does not is left out; answer tokens that stand in no source, such as a space before a number, may differ. Only
    the answer's rows of the patterns are made dense, one layer at a time.

    Args:
        model: HookedTransformer or TransformerBridge; streamed already, or streamed for this call.
        cases: as `retrieval_case` makes them of needle prompts, or your own.
        config: as for `stream`; only for a model that is not streamed yet.
        by: "token" compares single keys; "block" takes the key block that holds most of the row, which copies every
            source position in it that holds w: coarser.

    Raises:
        ValueError: no case is given, or none was answered, so that there is nothing to score.
    """
    if not cases:
        raise ValueError("retrieval_scores needs at least 1 case.")
    if by not in ("token", "block"):
        raise ValueError(f"by={by!r} is not known: choose token or block.")
    found, answered = [], []
    with streamed_for_now(model, config):
        layers = streamed_layers(model)
        for case in cases:
            right, scores = _scores_of_case(model, case, by)
            answered.append(right)
            if right:
                found.append(np.stack([scores[layer] for layer in layers]))
    if not found:
        raise ValueError(
            f"the sparse model answered none of the {len(cases)} cases, so there is nothing to score: raise k, or take "
            "prompts that the model answers."
        )
    by_case = np.stack(found)
    name = str(model.cfg.model_name)
    return RetrievalScores(by_case.mean(0), tuple(layers), by_case, len(cases), tuple(answered), by, name)


def mask_retrieval_heads(
    model: Any,
    cases: Sequence[RetrievalCase],
    scores: RetrievalScores,
    config: StreamConfig | None = None,
    *,
    top: int = 10,
    seeds: int = 5,
    same_layers: bool = False,
) -> HeadsAgainstRandom:
    """The answer's log-probability without the `top` heads and without as many random ones (the paper's control).

    Give other cases than the scores were made of. Arguments and errors as for `heads_against_random`.
    """
    inputs: list[tuple[Tensor, MetricFunction]] = [
        (with_answer(case.prompt, case.answer), answer_log_probability(case.answer)) for case in cases
    ]
    heads = scores.top_heads(top)
    return heads_against_random(model, inputs, heads, config, seeds=seeds, same_layers=same_layers)


@torch.no_grad()
def _scores_of_case(model: Any, case: RetrievalCase, by: By) -> tuple[bool, Mapping[int, Float[np.ndarray, " head"]]]:
    tokens = tokens_within_context(model, with_answer(case.prompt, case.answer))
    answer = case.answer.to(tokens.device)
    count, length = len(answer), tokens.shape[1]
    source = torch.zeros(length, dtype=torch.bool, device=tokens.device)
    for start, stop in case.sources:
        source[start:stop] = True
    copyable = source & (tokens[0] == answer[:, None])  # [step, position]
    scores: dict[int, np.ndarray] = {}

    def read(layer: int) -> Edit:
        def score(pattern: SparsePattern) -> SparsePattern:
            rows = pattern.to_dense(rows=slice(length - count, length))[0]
            looked_at = _looked_at(rows, by, pattern.mask.k_block)
            copied = (looked_at & copyable).any(1)  # [head, position]
            scores[layer] = (copied.sum(-1) / source.sum()).cpu().numpy()
            return pattern

        return score

    logits = run_edited(model, tokens, {layer: read(layer) for layer in streamed_layers(model)}, count)
    said = logits[0].argmax(-1) == answer
    return bool((said | ~copyable.any(1)).all()), scores


def _looked_at(rows: Float[Tensor, "head step key"], by: By, k_block: int) -> Tensor:
    """Which keys each row's largest probability (or largest block of it) points at: bool [head, step, key]."""
    keys = rows.shape[-1]
    if by == "token":
        return torch.nn.functional.one_hot(rows.argmax(-1), keys).bool()
    blocks = torch.nn.functional.pad(rows, (0, -keys % k_block)).unflatten(-1, (-1, k_block)).sum(-1)
    best = torch.nn.functional.one_hot(blocks.argmax(-1), blocks.shape[-1]).bool()
    return best.repeat_interleave(k_block, -1)[..., :keys]
