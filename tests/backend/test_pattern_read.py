"""What can be read off a SparsePattern: dense rows, masses, slices and copies; what cannot raises and says what can."""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
import pytest
import torch

from stream_lens import SparsePattern, stream
from stream_lens.backend import NoScoresError, PatternIndexError, SparseActivationCache
from tests.backend.hooked_models import tokens_of
from tests.backend.runs import PATTERN, with_hook, worst
from tests.backend.tiny_models import tiny_bridge

T, Q, K = 61, 16, 8


@cache
def model_of(name: str = "LlamaForCausalLM") -> Any:
    return tiny_bridge(name)


def cached(k: int = 5, name: str = "LlamaForCausalLM", batch: int = 2, **options: Any) -> SparseActivationCache:
    run = {key: options.pop(key) for key in ("remove_batch_dim", "pos_slice", "names_filter") if key in options}
    with torch.no_grad(), stream(model_of(name), q_block=Q, k_block=K, k=k, **options):
        return model_of(name).run_with_cache(tokens_of(batch, T), **run)[1]


def dense_blocks(pattern: SparsePattern) -> torch.Tensor:
    """Sums of the dense pattern over the kept blocks, counted one by one."""
    dense, mask = pattern.to_dense().double(), pattern.mask
    mass = torch.zeros(mask.indices.shape, dtype=torch.float64)
    for b, h, i, n in mask.kept.nonzero().tolist():
        j = int(mask.indices[b, h, i, n])
        mass[b, h, i, n] = dense[b, h, i * Q : (i + 1) * Q, j * K : (j + 1) * K].sum()
    return mass


@pytest.mark.parametrize("name", ["LlamaForCausalLM", "Gemma2ForCausalLM", "GptOssForCausalLM", "OPTForCausalLM"])
def test_masses_are_those_of_the_dense_rows(name: str) -> None:
    pattern = cached(k=4, name=name)["pattern", 1]
    assert worst((pattern.block_mass, dense_blocks(pattern))) <= 1e-5
    if name != "GptOssForCausalLM":  # whose rows give a share to the sink
        assert worst((pattern.to_dense().sum(-1), torch.ones(2, 4, T))) <= 1e-5


def test_shape_type_and_text() -> None:
    pattern = cached()["pattern", 1]
    assert isinstance(pattern, SparsePattern)
    assert (list(pattern.shape), pattern.ndim, pattern.dtype) == ([2, 4, T, T], 4, torch.float32)
    assert len(pattern) == 2
    assert "q_block=16" in repr(pattern)
    assert pattern.nbytes == pattern.mask.nbytes + pattern.block_mass.nbytes
    assert pattern.scores_nbytes == 2 * T * 16 * (4 + 2) * 4  # 4 query and 2 key heads of 16 floats


def test_dense_rows_and_heads_are_parts_of_the_whole() -> None:
    pattern = cached()["pattern", 1]
    whole = pattern.to_dense()
    assert torch.equal(pattern.to_dense(rows=slice(20, 40)), whole[:, :, 20:40])
    assert torch.equal(pattern.to_dense(heads=[3, 1]), whole[:, [3, 1]])
    assert torch.equal(pattern.to_dense(heads=2), whole[:, 2])
    assert torch.equal(pattern.to_dense(rows=slice(-5, None), heads=slice(1, 3)), whole[:, 1:3, -5:])


@pytest.mark.parametrize(
    "index",
    [
        (0,),
        (slice(None), 2),
        (slice(None), -1),
        (1, 3),
        (slice(None), [3, 0]),
        ([1, 0], slice(1, 3)),
        (np.array([1, 0]),),
        (slice(None), torch.tensor([True, False, False, True])),
        (Ellipsis, slice(16, 48), slice(None)),
        (slice(None), 1, slice(32, None)),
        (0, slice(None), slice(5, 9)),  # inside a query block
        (0, 1, 7),
        (slice(None), slice(None), 33, slice(None)),
    ],
    ids=str,
)
def test_a_slice_is_the_slice_of_the_dense_pattern(index: Any) -> None:
    pattern = cached()["pattern", 1]
    part, expected = pattern[index], pattern.to_dense()[index]
    assert list(part.shape) == list(expected.shape)
    assert worst((part.to_dense(), expected)) <= 1e-6
    rows = part.mask.q_len
    total = pattern.to_dense().sum((-1, -2)) if rows == T else None
    masses = part.block_mass
    if total is not None:
        assert worst((masses.sum((-1, -2)), total[index])) <= 1e-4
    else:
        assert worst((masses.sum().reshape(1), expected.sum().reshape(1))) <= 1e-4


def test_slices_of_slices() -> None:
    pattern = cached()["pattern", 1]
    assert worst((pattern[:, [3, 1]][1][0].to_dense(), pattern.to_dense()[1, 3])) <= 1e-6
    assert worst((pattern[1][:, 16:48][2].to_dense(), pattern.to_dense()[1, 2, 16:48])) <= 1e-6


@pytest.mark.parametrize(
    ("index", "message"),
    [
        ((slice(None), slice(None), slice(None), slice(0, 8)), "to_dense"),
        ((0, 0, 0, 3), "to_dense"),
        ((slice(None), slice(None), slice(0, None, 2)), "step 1"),
        ((slice(None), 9), "out of range"),
        ((None,), "new axes"),
        ((0, 0, 0, 0, 0), "5 indices"),
    ],
    ids=str,
)
def test_an_index_that_blocks_cannot_express_raises(index: Any, message: str) -> None:
    with pytest.raises(PatternIndexError, match=message):
        cached()["pattern", 1][index]


@pytest.mark.parametrize(
    "read",
    [
        lambda p: p + 1,
        lambda p: p.sum(),
        lambda p: p.mean(-1),
        lambda p: torch.stack([p, p]),
        lambda p: p.max(),
        lambda p: p.numpy(),
        lambda p: p.tolist(),
        lambda p: p > 0.5,
        lambda p: torch.log(p),
        lambda p: p.transpose(-1, -2),
        lambda p: p.reshape(-1),
        lambda p: p.topk(3),
        lambda p: torch.zeros_like(p) + 1,
    ],
)
def test_what_needs_the_dense_pattern_raises_and_says_what_to_call(read: Any) -> None:
    with pytest.raises((TypeError, RuntimeError), match=r"to_dense|pattern\.scale"):
        read(cached()["pattern", 1])


def test_rows_and_heads_that_are_none() -> None:
    pattern = cached()["pattern", 1]
    for wrong in ({"rows": 5}, {"heads": 9}, {"heads": [True, False]}, {"heads": 1.5}):
        with pytest.raises(PatternIndexError, match=r"rows=5|heads?"):
            pattern.to_dense(**wrong)
    mask = [False, True, True, False]
    assert torch.equal(pattern.to_dense(heads=mask), pattern.to_dense(heads=[1, 2]))
    assert torch.equal(pattern.to_dense(heads=np.int64(2)), pattern.to_dense(heads=2))
    assert f"{pattern}" == repr(pattern)


def test_the_cache_options_of_transformer_lens() -> None:
    whole = cached(batch=1)["pattern", 1]
    flat = cached(batch=1, remove_batch_dim=True)["pattern", 1]
    assert list(flat.shape) == [4, T, T]
    assert torch.equal(flat.to_dense(), whole.to_dense()[0])
    assert torch.equal(flat.block_mass, whole.block_mass[0])
    only = cached(names_filter=lambda name: name.endswith(PATTERN))
    assert len(only) == 3
    assert all(isinstance(value, SparsePattern) for value in only.values())


@pytest.mark.hooked
@pytest.mark.parametrize("pos_slice", [-1, (16, 48), (5, 9), 0])
def test_pos_slice(pos_slice: Any) -> None:
    from tests.backend.hooked_models import hooked_model

    model, tokens = hooked_model("llama"), tokens_of(2, T)
    with torch.no_grad(), stream(model, q_block=Q, k_block=K, k=3):
        whole = model.run_with_cache(tokens)[1]["pattern", 1].to_dense()
        part = model.run_with_cache(tokens, pos_slice=pos_slice)[1]["pattern", 1]
    rows = slice(*pos_slice) if isinstance(pos_slice, tuple) else [pos_slice]  # an axis that TransformerLens keeps
    assert worst((part.to_dense(), whole[:, :, rows])) <= 1e-6
    assert worst((part.block_mass.sum().reshape(1), whole[:, :, rows].sum().reshape(1))) <= 1e-4


def test_masses_reach_copies_that_were_made_before_the_layer_ran() -> None:
    seen: list[SparsePattern] = []
    with stream(model_of(), q_block=Q, k_block=K, k=3, keep_scores=False):

        def copy(pattern: SparsePattern) -> None:
            seen.extend([pattern.detach(), pattern.detach().to("meta"), pattern.detach()[:, 1]])

        with_hook(model_of(), tokens_of(2, T), copy)
    here, elsewhere, part = seen
    assert here.block_mass.shape == (2, 4, 4, 3)
    assert torch.equal(part.block_mass, here.block_mass[:, 1])
    assert elsewhere.device.type == "meta"
    assert elsewhere.data_.cell.value is not None


def test_without_scores_masses_remain_and_dense_rows_raise() -> None:
    pattern, whole = cached(keep_scores=False)["pattern", 1], cached()["pattern", 1]
    assert torch.equal(pattern.block_mass, whole.block_mass)
    assert pattern.scores_nbytes == 0
    with pytest.raises(NoScoresError, match="keep_scores=True"):
        pattern.to_dense()
    light = cached().without_scores()["pattern", 1]
    assert torch.equal(light.block_mass, whole.block_mass)
    with pytest.raises(NoScoresError, match="keep_scores=True"):
        light[:, :, 5:9].block_mass  # noqa: B018


def test_a_pattern_times_values_is_attention() -> None:
    pattern = cached()["pattern", 1]
    values = torch.randn(2, 4, T, 16)
    assert worst((pattern @ values, pattern.to_dense() @ values)) <= 1e-5
    part, dense = pattern[1, [2, 0]].unsqueeze(0), pattern.to_dense()[1:, [2, 0]]
    assert worst((part @ values[:1, :2], dense @ values[:1, :2])) <= 1e-5
    grouped = values[:, :2]  # a head of values for two heads of queries
    assert worst((pattern @ grouped, pattern.to_dense() @ grouped.repeat_interleave(2, 1))) <= 1e-5
