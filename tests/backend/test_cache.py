"""SparseActivationCache: TransformerLens' own methods on it, its sizes, and its files in every way they can be bad."""

from __future__ import annotations

import copy
import json
import pickle
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

import stream_lens.cache as files
from stream_lens import SparseActivationCache, SparsePattern, stream
from stream_lens.backend import NoScoresError
from stream_lens.cache import CacheFileError, RunInfo, load, save
from tests.backend.hooked_models import tokens_of
from tests.backend.runs import with_hook, worst
from tests.backend.tiny_models import tiny_bridge

T = 61


@cache
def model_of(name: str) -> Any:
    return tiny_bridge(name)


def cached(name: str = "LlamaForCausalLM", batch: int = 2, **options: Any) -> SparseActivationCache:
    streaming = {key: options.pop(key) for key in ("keep_scores", "observe") if key in options}
    with torch.no_grad(), stream(model_of(name), q_block=16, k_block=8, k=5, **streaming):
        return model_of(name).run_with_cache(tokens_of(batch, T), **options)[1]


def same(a: SparsePattern, b: SparsePattern) -> bool:
    return (
        torch.equal(a.mask.indices, b.mask.indices)
        and torch.equal(a.block_mass, b.block_mass)
        and (a.shape, a.dtype, a.mask.shape, a.mask.window) == (b.shape, b.dtype, b.mask.shape, b.mask.window)
    )


def test_stacking() -> None:
    patterns = cached().stack_activation("pattern")
    assert [pattern.data_.layer for pattern in patterns] == [0, 1, 2]
    assert cached().stack_activation("z").shape == (3, 2, T, 4, 16)
    assert len(cached().stack_activation("pattern", layer=2)) == 2


@pytest.mark.parametrize("part", [1, (0, 1), [1, 0], None])
def test_slices_of_the_batch(part: Any) -> None:
    whole = cached()
    ours = whole.apply_slice_to_batch_dim(part)
    index = (
        {1: 1, (0, 1): slice(0, 1)}.get(tuple(part) if isinstance(part, tuple) else part) if part != [1, 0] else part
    )
    index = slice(None) if part is None else index
    assert isinstance(ours, SparseActivationCache)
    assert ours.has_batch_dim == (part != 1)
    assert torch.equal(ours["pattern", 1].to_dense(), whole["pattern", 1].to_dense()[index])
    assert torch.equal(ours["pattern", 1].block_mass, whole["pattern", 1].block_mass[index])
    assert torch.equal(ours["resid_post", 1], whole["resid_post", 1][index])
    assert ours.info.tokens is not None
    assert torch.equal(ours.info.tokens, tokens_of(2, T)[index].reshape(-1, T))


def test_without_a_batch_axis() -> None:
    ours = cached(batch=1)
    pattern = ours["pattern", 1].to_dense()
    ours.remove_batch_dim()
    assert not ours.has_batch_dim
    assert torch.equal(ours["pattern", 1].to_dense(), pattern[0])


def test_moved() -> None:
    whole, moved = cached(), cached()
    moved.to("meta")
    assert moved["pattern", 1].device.type == "meta"
    moved = cached()
    moved.to("cpu")
    assert same(moved["pattern", 1], whole["pattern", 1])


def test_what_the_run_was() -> None:
    ours = cached(observe=True)
    assert ours.info.config is not None
    assert (ours.info.config.k, ours.info.observe) == (5, True)
    assert torch.equal(ours.info.tokens, tokens_of(2, T))
    text = "<bos> t5 t6 t7"
    model = model_of("LlamaForCausalLM")
    with torch.no_grad(), stream(model):
        of_text = model.run_with_cache(text)[1]
    assert of_text.info.tokens is not None
    assert torch.equal(of_text.info.tokens, model.to_tokens(text))


def test_sizes_are_those_of_what_is_stored() -> None:
    ours = cached(names_filter=lambda name: name.endswith("hook_pattern"))
    slots = [pattern.mask.indices.numel() for pattern in ours.patterns().values()]
    kept = [sum(1 for i in p.mask.indices.flatten().tolist() if i >= 0) for p in ours.patterns().values()]
    sizes = ours.compression()
    dense = 3 * 2 * 4 * T * T
    assert sizes.dense_bytes == dense * 4
    assert sizes.sparse_bytes == sum(slots) * (4 + 4)  # an int32 index and a float32 mass
    assert sizes.by_entries == pytest.approx(dense / sum(kept))
    assert sizes.by_bytes == pytest.approx(dense * 4 / (sum(slots) * 8))
    assert ours.nbytes == sum(slots) * 8 + 3 * 2 * T * 16 * (4 + 2) * 4
    light = ours.without_scores()
    assert light.nbytes == sum(slots) * 8
    with pytest.raises(ValueError, match="names_filter"):
        cached(names_filter=lambda name: name.endswith("hook_z")).compression()


@pytest.mark.parametrize("scores", [False, True])
@pytest.mark.parametrize("name", ["LlamaForCausalLM", "Gemma2ForCausalLM", "GptOssForCausalLM"])
def test_a_file_gives_back_the_cache(name: str, scores: bool, tmp_path: Path) -> None:
    whole, path = cached(name), tmp_path / "run.safetensors"
    whole.save(path, scores=scores)
    ours = SparseActivationCache.load(path)
    assert set(ours.keys()) == {key for key in whole.keys() if not key.endswith("attn_scores")}  # noqa: SIM118
    assert (ours.info.config, ours.info.model_name, ours.has_batch_dim) == (
        whole.info.config,
        whole.info.model_name,
        True,
    )
    assert torch.equal(ours["resid_post", 2], whole["resid_post", 2])
    for layer in range(3):
        assert same(ours["pattern", layer], whole["pattern", layer])
        if scores:
            assert worst((ours["pattern", layer].to_dense(), whole["pattern", layer].to_dense())) <= 1e-6
        else:
            with pytest.raises(NoScoresError):
                ours["pattern", layer].to_dense()
    assert torch.equal(load(path, model_of(name)).stack_activation("z"), whole.stack_activation("z"))


def test_padding_and_cut_patterns_survive_a_file(tmp_path: Path) -> None:
    mask = torch.ones(2, T, dtype=torch.long)
    mask[1, :20] = 0
    whole = cached(attention_mask=mask).apply_slice_to_batch_dim(1)
    whole.cache_dict["blocks.1.attn.hook_pattern"] = whole["pattern", 1][[3, 1], 16:]
    whole.save(tmp_path / "run", scores=True)
    ours = load(tmp_path / "run")
    assert not ours.has_batch_dim
    for layer in range(3):
        assert ours["pattern", layer].shape == whole["pattern", layer].shape
        assert worst((ours["pattern", layer].to_dense(), whole["pattern", layer].to_dense())) <= 1e-6


def test_edited_patterns_survive_a_file(tmp_path: Path) -> None:
    whole = cached()
    other = cached()["pattern", 0]
    patched = whole["pattern", 1]
    patched[:, 1] = other[:, 2]
    patched[:, 3] = 0
    whole.cache_dict["blocks.1.attn.hook_pattern"] = patched
    with pytest.raises(ValueError, match="scores=False"):
        save(whole, tmp_path / "run", scores=True)
    save(whole, tmp_path / "run")
    ours = load(tmp_path / "run")["pattern", 1]
    assert same(ours, patched)
    assert torch.equal(ours.gate, patched.gate)
    assert ours.data_.edited
    light = cached(keep_scores=False)
    light.cache_dict["blocks.1.attn.hook_pattern"] = light["pattern", 1].drop(heads=1)
    save(light, tmp_path / "light")
    with pytest.raises(NoScoresError):
        load(tmp_path / "light")["pattern", 1].block_mass  # noqa: B018


def test_a_loaded_pattern_can_be_patched_into_a_run(tmp_path: Path) -> None:
    model, whole = model_of("LlamaForCausalLM"), cached()
    whole.save(tmp_path / "run", scores=True)
    other = load(tmp_path / "run")["pattern", 1]
    with stream(model, q_block=16, k_block=8, k=5):
        expected = with_hook(model, tokens_of(2, T, seed=3), lambda p: whole["pattern", 1])
        assert worst((with_hook(model, tokens_of(2, T, seed=3), lambda p: other), expected)) <= 1e-6


def written(tmp_path: Path) -> tuple[Path, dict[str, torch.Tensor], dict[str, str]]:
    path = tmp_path / "run.safetensors"
    cached(names_filter=lambda name: name.endswith("hook_pattern")).save(path, scores=True)
    with safe_open(path, framework="pt") as file:
        return path, {name: file.get_tensor(name) for name in file.keys()}, dict(file.metadata())  # noqa: SIM118


def test_copies_and_pickles() -> None:
    whole = cached()
    whole.model = None
    for copied in (copy.deepcopy(whole), pickle.loads(pickle.dumps(whole))):
        assert same(copied["pattern", 1], whole["pattern", 1])
        assert torch.equal(copied["pattern", 1].to_dense(), whole["pattern", 1].to_dense())
        assert copied["attn_scores", 1].shape == whole["attn_scores", 1].shape


def test_layers_from_the_end_without_a_model(tmp_path: Path) -> None:
    cached().save(tmp_path / "run")
    with pytest.raises(ValueError, match=r"load\(path, model\)"):
        load(tmp_path / "run")["pattern", -1]
    assert load(tmp_path / "run", model_of("LlamaForCausalLM"))["pattern", -1].data_.layer == 2


def test_no_file_and_no_safetensors(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no cache file"):
        load(tmp_path / "absent")
    with pytest.raises(FileNotFoundError, match="it is a folder"):
        load(tmp_path)
    cached().save(tmp_path / "run")
    with pytest.raises(ValueError, match="device='nonsense' cannot be used"):
        load(tmp_path / "run", device="nonsense")
    (tmp_path / "text").write_text("not a cache")
    (tmp_path / "empty").touch()
    for name in ("text", "empty"):
        with pytest.raises(CacheFileError, match="not a whole safetensors file"):
            load(tmp_path / name)


@pytest.mark.parametrize("share", [0.01, 0.5, 0.999])
def test_truncated_files(share: float, tmp_path: Path) -> None:
    path, _, _ = written(tmp_path)
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * share)])
    with pytest.raises(CacheFileError, match="cut off"):
        load(path)


def test_foreign_and_newer_files(tmp_path: Path) -> None:
    path, tensors, meta = written(tmp_path)
    save_file(tensors, path)
    with pytest.raises(CacheFileError, match="not a cache of stream_lens"):
        load(path)
    for version in ("99", "x"):
        save_file(tensors, path, metadata={**meta, "version": version})
        with pytest.raises(CacheFileError, match="newer"):
            load(path)


def shorter(x: torch.Tensor) -> torch.Tensor:
    return x[:, :, :-1].contiguous()


def one_head(x: torch.Tensor) -> torch.Tensor:
    return x[:, :1].contiguous()


@pytest.mark.parametrize(
    ("part", "change"),
    [
        *((part, change) for part in ("indices", "q") for change in (shorter, one_head, None)),
        *(("mass", change) for change in (shorter, one_head)),  # a file may lack masses, of edited patterns
        *(("k", change) for change in (shorter, None)),  # one key head serves any number of query heads
    ],
)
def test_files_that_do_not_fit_together(part: str, change: Any, tmp_path: Path) -> None:
    path, tensors, meta = written(tmp_path)
    name = f"{part}:blocks.1.attn.hook_pattern"
    if change is None:
        del tensors[name]
    else:
        tensors[name] = change(tensors[name])
    save_file(tensors, path, metadata=meta)
    with pytest.raises(CacheFileError, match="fit together"):
        load(path)


@pytest.mark.parametrize(
    ("field", "value"),
    [("q_block", 8), ("q_len", 999), ("kv_len", 5), ("dtype", "float7"), ("present", [7]), ("k_block", 0)],
)
def test_changed_metadata(field: str, value: Any, tmp_path: Path) -> None:
    path, tensors, meta = written(tmp_path)
    patterns = json.loads(meta["patterns"])
    patterns["blocks.1.attn.hook_pattern"][field] = value
    for changed in ({"patterns": json.dumps(patterns)}, {"patterns": "{"}, {"token_count": "3"}):
        save_file(tensors, path, metadata={**meta, **changed})
        with pytest.raises(CacheFileError, match="fit together"):
            load(path)


def test_indices_beyond_the_keys_or_out_of_order(tmp_path: Path) -> None:
    path, tensors, meta = written(tmp_path)
    name = "indices:blocks.1.attn.hook_pattern"
    good = tensors[name].clone()
    for bad in (good + 1000, good.flip(-1)):
        save_file({**tensors, name: bad}, path, metadata=meta)
        with pytest.raises(CacheFileError, match="query block"):
            load(path)


def test_a_write_that_fails_leaves_the_old_file_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, _, _ = written(tmp_path)
    content = path.read_bytes()

    def fails(tensors: Any, aside: str, metadata: Any) -> None:
        Path(aside).write_bytes(b"half")
        raise OSError("no space left")

    monkeypatch.setattr(files, "save_file", fails)
    with pytest.raises(OSError, match="no space"):
        cached().save(path)
    assert path.read_bytes() == content
    assert list(tmp_path.iterdir()) == [path]


def test_saving_copies_only_what_shares_storage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    big = torch.rand(3, 40, 8)
    views = {"blocks.0.hook_a": big, "blocks.0.hook_b": big[1], "blocks.0.hook_c": big.transpose(1, 2)}
    written: dict[str, torch.Tensor] = {}

    def watched(tensors: dict[str, torch.Tensor], aside: str, metadata: dict[str, str]) -> None:
        written.update(tensors)
        save_file(tensors, aside, metadata)

    monkeypatch.setattr(files, "save_file", watched)
    SparseActivationCache(dict(views), None, True, RunInfo("tiny", None, False, None)).save(tmp_path / "run")
    assert written["tensor:blocks.0.hook_a"].data_ptr() == big.data_ptr()
    loaded = load(tmp_path / "run")
    for name, value in views.items():
        assert torch.equal(loaded[name], value)
