"""Generation with a KV cache: at full k token for token what the dense model gives, and decode steps see their past.

The reference of a bridge is the same random model in plain transformers: with transformers 5.24, dense bridges of
TransformerLens up to 4.3 lose the KV cache (its keyword was renamed) and generate as if there were no prompt.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from stream_lens import stream
from tests.backend.hooked_models import WINDOW, hooked_model, tokens_of
from tests.backend.runs import worst
from tests.backend.tiny_models import CONFIGS, tiny_bridge, tiny_hf_model

NEW = 12
FULL: dict[str, Any] = {"q_block": 16, "k_block": 8, "k": 32}
LENGTH = WINDOW + 9
SOME = ["LlamaForCausalLM", "MistralForCausalLM", "Gemma2ForCausalLM", "GPT2LMHeadModel", "OPTForCausalLM"]


def generated(model: Any, tokens: Tensor) -> Tensor:
    with torch.no_grad():
        return model.generate(
            tokens, max_new_tokens=NEW, do_sample=False, stop_at_eos=False, verbose=False, return_type="tokens"
        )


def generated_by_transformers(model: Any, tokens: Tensor, mask: Tensor | None = None) -> Tensor:
    mask = torch.ones_like(tokens) if mask is None else mask
    with torch.no_grad():
        return model.generate(
            tokens, attention_mask=mask, max_new_tokens=NEW, do_sample=False, eos_token_id=None, pad_token_id=0
        )


@pytest.mark.parametrize("name", list(CONFIGS))
def test_bridges_generate_the_dense_tokens_past_the_window(name: str) -> None:
    model, tokens = tiny_bridge(name), tokens_of(2, LENGTH)
    dense = generated_by_transformers(tiny_hf_model(name, attn_implementation="eager"), tokens)
    assert dense.shape == (2, LENGTH + NEW)
    with stream(model, **FULL):
        assert torch.equal(generated(model, tokens), dense)


@pytest.mark.parametrize("layers", [(1,), (0, 2)])
def test_bridges_with_some_layers_dense_generate_the_dense_tokens(layers: tuple[int, ...]) -> None:
    model, tokens = tiny_bridge("MistralForCausalLM"), tokens_of(2, LENGTH)
    dense = generated_by_transformers(tiny_hf_model("MistralForCausalLM"), tokens)
    with stream(model, **FULL, layers=layers):
        assert torch.equal(generated(model, tokens), dense)


@pytest.mark.hooked
@pytest.mark.parametrize("name", ["llama", "gpt2", "local", "softcap"])
def test_hooked_transformers_generate_the_dense_tokens_past_the_window(name: str) -> None:
    model, tokens = hooked_model(name), tokens_of(2, LENGTH)
    dense = generated(model, tokens)
    with stream(model, **FULL):
        assert torch.equal(generated(model, tokens), dense)


@pytest.mark.parametrize("name", ["LlamaForCausalLM", "MistralForCausalLM", "Gemma3ForCausalLM", "OPTForCausalLM"])
def test_left_padded_batches_generate_the_dense_tokens(name: str) -> None:
    model, tokens = tiny_bridge(name), tokens_of(2, LENGTH)
    mask = torch.ones_like(tokens)
    tokens[1, :13], mask[1, :13] = 0, 0
    dense = generated_by_transformers(tiny_hf_model(name), tokens, mask)
    with stream(model, **FULL):
        assert torch.equal(generated_by_transformers(model.original_model, tokens, mask), dense)


@pytest.mark.parametrize("name", SOME)
def test_decode_steps_have_the_logits_of_the_whole_text(name: str) -> None:
    model, tokens = tiny_bridge(name), tokens_of(2, LENGTH + 4)
    with torch.no_grad():
        whole = model(tokens)
        with stream(model, **FULL):
            past = model.original_model(tokens[:, :-4], use_cache=True).past_key_values
            pieces = [tokens[:, -4:-3], tokens[:, -3:-1], tokens[:, -1:]]  # two tokens at once stand in one block
            steps = [model.original_model(piece, past_key_values=past, use_cache=True).logits for piece in pieces]
    assert worst((torch.cat(steps, 1), whole[:, -4:])) <= 1e-5


def test_patterns_of_a_decode_step_reach_back_over_the_whole_past() -> None:
    model, tokens = tiny_bridge("LlamaForCausalLM"), tokens_of(1, 40)
    with torch.no_grad(), stream(model, q_block=16, k_block=8, k=4):
        past = model.original_model(tokens[:, :-1], use_cache=True).past_key_values
        _, cache = model.run_with_cache(tokens[:, -1:], past_key_values=past, use_cache=True)
    pattern = cache["pattern", 1]
    assert list(pattern.shape) == [1, 4, 1, 40]
    assert pattern.mask.offset == 39
    assert pattern.mask.indices[..., 0].tolist() == [[[0]] * 4]  # the sink
    assert bool(pattern.mask.contains(torch.full((1, 4, 1, 1), 4)).all())  # the block that the query stands in
    assert torch.allclose(pattern.block_mass.sum(-1), torch.ones(1, 4, 1))


@pytest.mark.parametrize("name", ["LlamaForCausalLM", "Gemma3ForCausalLM", "OPTForCausalLM"])
def test_a_small_k_generates(name: str) -> None:
    model, tokens = tiny_bridge(name), tokens_of(2, 60)
    with stream(model, q_block=8, k_block=8, k=3):
        made = generated(model, tokens)
    assert made.shape == (2, 60 + NEW)
    assert torch.equal(made[:, :60], tokens)


@pytest.mark.hooked
def test_decode_steps_of_a_hooked_transformer_have_the_logits_of_the_whole_text() -> None:
    from transformer_lens.cache.key_value_cache import TransformerLensKeyValueCache

    from tests.backend.tiny_models import tiny_tokenizer

    model, tokens = hooked_model("local"), tokens_of(2, LENGTH + 4)
    model.set_tokenizer(tiny_tokenizer())
    with torch.no_grad():
        whole = model(tokens)
        with stream(model, **FULL):
            past = TransformerLensKeyValueCache.init_cache(model.cfg, "cpu", 2)
            model(tokens[:, :-4], past_kv_cache=past)
            pieces = [tokens[:, -4:-3], tokens[:, -3:-1], tokens[:, -1:]]
            steps = [model(piece, past_kv_cache=past) for piece in pieces]
    assert worst((torch.cat(steps, 1), whole[:, -4:])) <= 1e-5
