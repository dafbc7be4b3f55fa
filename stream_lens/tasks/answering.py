"""Let a model answer a needle case, dense or streamed, and score it."""

from __future__ import annotations

from typing import Any

from stream_lens.backend.greedy import greedy_tokens
from stream_lens.backend.long_inputs import tokens_within_context
from stream_lens.tasks.needle import NeedleCase, NeedleScore, score


def answer(model: Any, case: NeedleCase, *, max_new_tokens: int | None = None) -> str:
    """The model's greedy continuation of the case's prompt.

    `max_new_tokens` None takes what the answers need and a third more (RULER's 128 leaves room to talk first).
    Raises ValueError if prompt and answer do not fit into the model's context.
    """
    tokens = tokens_within_context(model, case.prompt, prepend_bos=case.prepend_bos)
    if max_new_tokens is None:
        needed = len(model.tokenizer(", ".join(case.answers), add_special_tokens=False)["input_ids"])
        max_new_tokens = 4 + needed + needed // 3
    return model.tokenizer.decode(greedy_tokens(model, tokens, max_new_tokens)[0].tolist())


def answered(model: Any, case: NeedleCase, *, max_new_tokens: int | None = None) -> NeedleScore:
    """RULER's score of `answer`."""
    return score(case, answer(model, case, max_new_tokens=max_new_tokens))
