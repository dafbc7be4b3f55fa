"""Calibration on tiny models: the budget is met, windows are left alone, and mass goes where a plain loop puts it."""

from __future__ import annotations

import pytest
import torch

import stream_lens as sl
from stream_lens.circuits.calibration import calibrate
from tests.backend.hooked_models import VOCAB, hooked_model, tokens_of
from tests.backend.tiny_models import tiny_bridge

CONFIG = sl.StreamConfig(q_block=8, k_block=8, k=4)


def test_every_head_gets_a_share_and_the_total_is_the_budget():
    model = tiny_bridge("LlamaForCausalLM")
    tokens = [torch.randint(3, VOCAB, (1, 200), generator=torch.Generator().manual_seed(seed)) for seed in (0, 1)]
    config = calibrate(model, tokens, 5.5, CONFIG, most=12)
    assert sorted(config.overrides) == [(layer, head) for layer in range(3) for head in range(4)]
    assert sum(config.overrides.values()) == int(5.5 * 12)
    assert min(config.overrides.values()) >= CONFIG.forced_blocks
    assert max(config.overrides.values()) <= 12
    assert config.k == 4
    assert not sl.is_streamed(model)


def test_it_keeps_more_mass_than_one_k_for_all():
    model = tiny_bridge("LlamaForCausalLM")
    with torch.no_grad():  # the first head of the first layer becomes sharp; the others are all but even
        model.original_model.model.layers[0].self_attn.q_proj.weight[:16] *= 50
    tokens = torch.randint(3, VOCAB, (1, 256), generator=torch.Generator().manual_seed(2))
    calibrated = calibrate(model, [tokens], 5, CONFIG, most=16)
    assert calibrated.overrides[0, 0] != 5

    def gathered(config):
        exact = sl.StreamConfig(**{**vars(config), "selector": "exhaustive"})
        with sl.stream(model, exact, observe=True):
            _, cache = sl.run_with_masks(model, tokens)
        return sum(float(cache["pattern", layer].block_mass.sum()) for layer in range(3))

    assert gathered(calibrated) > gathered(CONFIG.with_k(5))


def test_layers_with_a_window_keep_their_own_k():
    model = tiny_bridge("Gemma3ForCausalLM")
    tokens = torch.randint(3, VOCAB, (1, 128), generator=torch.Generator().manual_seed(3))
    config = calibrate(model, [tokens], 4, CONFIG, most=8)
    assert {layer for layer, _ in config.overrides} == {1}


def test_what_cannot_be_calibrated_is_refused():
    model = tiny_bridge("Gemma3ForCausalLM")
    tokens = torch.randint(3, VOCAB, (1, 64), generator=torch.Generator().manual_seed(4))
    with pytest.raises(ValueError, match="texts is empty"):
        calibrate(model, [], 4)
    with pytest.raises(ValueError, match="budget=1 is not allowed"):
        calibrate(model, [tokens], 1, CONFIG, most=8)
    with pytest.raises(ValueError, match="every streamed layer has a sliding window"):
        calibrate(model, [tokens], 4, sl.StreamConfig(q_block=8, k_block=8, layers=(0, 2)), most=8)


@pytest.mark.hooked
def test_hooked_models_too():
    model = hooked_model("llama")
    config = calibrate(model, [tokens_of(1, 100)], 3, CONFIG, most=8)
    assert sum(config.overrides.values()) == 3 * len(config.overrides)
