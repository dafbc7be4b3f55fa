"""Retrieval scores against a count on the dense pattern, and needle cases turned into tokens."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

import stream_lens as sl
from stream_lens.circuits.retrieval import RetrievalCase, mask_retrieval_heads, retrieval_case, retrieval_scores
from stream_lens.tasks.needle import NeedleCase
from tests.backend.hooked_models import hooked_model, tokens_of
from tests.backend.tiny_models import tiny_bridge, tiny_tokenizer

CONFIG = sl.StreamConfig(q_block=8, k_block=8, k=32)
MODELS = {
    "bridge": lambda: tiny_bridge("LlamaForCausalLM"),
    "delegated": lambda: tiny_bridge("OPTForCausalLM"),
    "hooked": lambda: hooked_model("llama"),
}


@pytest.fixture(scope="module", params=["bridge", "delegated", pytest.param("hooked", marks=pytest.mark.hooked)])
def model(request):
    return MODELS[request.param]()


def greedy(model, tokens, count):
    with torch.no_grad():
        for _ in range(count):
            tokens = torch.cat([tokens, model(tokens)[:, -1:].argmax(-1)], 1)
    return tokens[0, -count:]


def answered_case(model, seed, count=4):
    """A prompt that holds, all over, tokens that the model says next, so that heads can copy them."""
    tokens = tokens_of(1, 70, seed)
    for _ in range(20):
        answer = greedy(model, tokens, count)
        if torch.isin(answer, tokens[0, 4:64]).any():
            return RetrievalCase(tokens, answer, ((4, 64),))
        tokens[0, 4:64] = torch.where(torch.arange(60) % 3 == 0, tokens[0, 4:64], answer.repeat(15))
    raise AssertionError("the model's answer never came to stand in its prompt")


def full_patterns(model, tokens):
    """Dense patterns by layer; where the dense model gives none (delegated attention), those of all blocks."""
    with torch.no_grad():
        _, cache = model.run_with_cache(tokens)
        if "blocks.0.attn.hook_pattern" in cache:
            return [cache["pattern", layer] for layer in range(3)]
        with sl.stream(model, CONFIG):
            _, cache = model.run_with_cache(tokens)
        return [cache["pattern", layer].to_dense() for layer in range(3)]


@pytest.mark.parametrize("by", ["token", "block"])
def test_scores_count_what_dense_rows_point_at(model, by):
    cases = [answered_case(model, seed) for seed in range(3)]
    result = retrieval_scores(model, cases, CONFIG, by=by)
    assert result.answered == (True,) * 3
    assert result.scores.any()
    for case, scores in zip(cases, result.by_case, strict=True):
        tokens = torch.cat([case.prompt[0], case.answer[:-1]])
        patterns = full_patterns(model, tokens[None])
        for layer in range(3):
            for head in range(4):
                copied = set()
                for step, token in enumerate(case.answer.tolist()):
                    row = patterns[layer][0, head, 69 + step]
                    if by == "token":
                        looked = [int(row.argmax())]
                    else:
                        masses = [float(row[n : n + 8].sum()) for n in range(0, len(row), 8)]
                        best = int(np.argmax(masses))
                        looked = list(range(8 * best, min(8 * best + 8, len(row))))
                    copied |= {j for j in looked if 4 <= j < 64 and int(tokens[j]) == token}
                assert scores[layer, head] == pytest.approx(len(copied) / 60)


def test_cases_that_are_not_answered_are_left_out_and_counted(model):
    good = answered_case(model, 0)
    other = next(token for token in good.prompt[0, 4:64].tolist() if token != good.answer[0])
    bad = RetrievalCase(good.prompt, torch.tensor([other]), good.sources)
    result = retrieval_scores(model, [bad, good], CONFIG)
    assert (result.cases, result.answered, len(result.by_case)) == (2, (False, True), 1)
    with pytest.raises(ValueError, match="none of the 1 cases"):
        retrieval_scores(model, [bad], CONFIG)


def test_answer_tokens_that_stand_in_no_source_may_differ(model):
    good = answered_case(model, 0)
    absent = next(token for token in range(3, 90) if token not in good.answer)
    grown = RetrievalCase(good.prompt, torch.cat([torch.tensor([absent]), good.answer[:1]]), good.sources)
    with sl.stream(model, CONFIG), torch.no_grad():
        said = int(model(torch.cat([good.prompt, torch.tensor([[absent]])], 1))[0, -1].argmax())
    if said == int(good.answer[0]):
        assert retrieval_scores(model, [grown], CONFIG).answered == (True,)
    else:
        with pytest.raises(ValueError, match="none of the 1 cases"):
            retrieval_scores(model, [grown], CONFIG)


def test_top_heads_are_masked_against_random_ones(model):
    case = answered_case(model, 0)
    scores = retrieval_scores(model, [case], CONFIG)
    frame = scores.to_frame()
    first = (int(frame["layer"].iloc[0]), int(frame["head"].iloc[0]))
    assert scores.top_heads(3)[0] == first
    result = mask_retrieval_heads(model, [case], scores, CONFIG, top=3, seeds=2)
    assert result.heads == scores.top_heads(3)
    assert len(result.random_effects) == 2
    assert json.loads(scores.to_json())["by"] == "token"
    np.testing.assert_array_equal(scores.plot().data[0].z, scores.scores)


def needle(prompt, answer, value_span, answers=1):
    nothing = (0, 0)
    return NeedleCase(
        prompt, (answer,) * answers, "single_1", 20, 20, 0.5, 0, True, ("t3",), (nothing,), (value_span,), (), nothing,
        nothing,
    )  # fmt: skip


def test_a_needle_case_becomes_tokens():
    tokenizer = tiny_tokenizer()
    prompt = "t5 t6 t42 t43 t8 t9"
    case = retrieval_case(needle(prompt, "t42 t43", (6, 13)), tokenizer)
    ids = case.prompt[0].tolist()
    assert case.answer.tolist() == tokenizer("t42 t43", add_special_tokens=False)["input_ids"]
    ((start, stop),) = case.sources
    assert ids[start:stop] == case.answer.tolist()
    with pytest.raises(ValueError, match="2 values"):
        retrieval_case(needle(prompt, "t42", (6, 9), answers=2), tokenizer)


def test_a_case_that_makes_no_sense_is_refused():
    prompt, answer = tokens_of(1, 20), torch.tensor([4])
    prompt[0, 3] = 4
    with pytest.raises(ValueError, match="not in the prompt"):
        RetrievalCase(prompt, answer, ((3, 30),))
    with pytest.raises(ValueError, match="at least one source"):
        RetrievalCase(prompt, answer, ())
    with pytest.raises(ValueError, match="no token of the answer"):
        RetrievalCase(prompt, torch.tensor([2]), ((3, 4),))
    with pytest.raises(ValueError, match="an answer"):
        RetrievalCase(prompt, answer[:0], ((3, 4),))
    with pytest.raises(ValueError, match="by='head'"):
        retrieval_scores(tiny_bridge("LlamaForCausalLM"), [RetrievalCase(prompt, answer, ((3, 4),))], CONFIG, by="head")
    with pytest.raises(ValueError, match="at least 1 case"):
        retrieval_scores(tiny_bridge("LlamaForCausalLM"), [], CONFIG)
