"""Files of a SparseActivationCache: one safetensors file, written aside and renamed, checked before it is believed."""

from __future__ import annotations

import json
import os
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from stream_kernels.rule import ScoreRule
from stream_lens.backend.lazy_tensor import UncomputedScores
from stream_lens.backend.pattern import SparsePattern
from stream_lens.backend.pattern_data import MassCell, NoScoresError, PatternData, block_mass
from stream_lens.backend.scores import Scores
from stream_lens.backend.sparse_cache import Compression, RunInfo, SparseActivationCache
from stream_lens.blocks import BlockMask, StreamConfig
from stream_lens.blocks.selection import check_shapes
from stream_lens.devices import require_device
from stream_lens.files import written_aside

__all__ = ["CacheFileError", "Compression", "RunInfo", "SparseActivationCache", "load", "save"]

FORMAT = "stream_lens.cache"
VERSION = 1


class CacheFileError(ValueError):
    """A file is not a cache of stream_lens, is damaged, or was written by a newer version; the message says which."""


def save(cache: SparseActivationCache, path: str | os.PathLike[str], *, scores: bool = False) -> None:
    """Write `cache` to `path` (overwriting it) as safetensors; a half-written file never stands under that name.

    Args:
        cache: to write; scores that were never made are left out.
        scores: also write the queries and keys that patterns refer to, so that `to_dense` works after loading:
            O(T · d_head) for each layer, usually far more than the masks.

    Raises:
        ValueError: a pattern mixes runs (it was patched) and scores are asked for.
        OSError: the folder cannot be written.
    """
    tensors: dict[str, Tensor] = {}
    patterns: dict[str, Any] = {}
    for name, value in cache.cache_dict.items():
        if isinstance(value, SparsePattern):
            patterns[name] = _pattern_parts(name, value.data_, tensors, scores)
        elif not isinstance(value, UncomputedScores):
            tensors[f"tensor:{name}"] = value
    if cache.info.tokens is not None:
        tensors["tokens"] = cache.info.tokens
    meta = {
        "format": FORMAT,
        "version": str(VERSION),
        "model": cache.info.model_name,
        "config": json.dumps(None if cache.info.config is None else cache.info.config.to_json()),
        "observe": json.dumps(cache.info.observe),
        "has_batch_dim": json.dumps(cache.has_batch_dim),
        "token_count": str(_token_count(cache)),
        "patterns": json.dumps(patterns),
    }
    ready = _ready_to_write(tensors)
    written_aside(path, lambda aside: save_file(ready, aside, metadata=meta))


def _ready_to_write(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """As safetensors takes them: on the CPU, contiguous, no two of one storage; what is so already is not copied."""
    ready: dict[str, Tensor] = {}
    storages: set[int] = set()
    for name, tensor in tensors.items():
        plain = tensor.detach().cpu().contiguous()
        if plain.untyped_storage().data_ptr() in storages:
            plain = plain.clone()
        storages.add(plain.untyped_storage().data_ptr())
        ready[name] = plain
    return ready


def load(path: str | os.PathLike[str], model: Any = None, device: str | torch.device = "cpu") -> SparseActivationCache:
    """Read a file that `save` wrote.

    Args:
        path: the file.
        model: for the cache's methods that need one (negative layers, logit attribution); none for circuits on masks.
        device: where the tensors go.

    Raises:
        CacheFileError: foreign, truncated, inconsistent or newer than this version; the message says which.
        FileNotFoundError: there is no such file.
        ValueError: there is no such device.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"there is no cache file {path}{' (it is a folder)' * Path(path).is_dir()}.")
    require_device(device)
    try:
        with safe_open(path, framework="pt", device=str(device)) as file:
            meta = file.metadata() or {}
            _check_format(path, meta)
            names = set(file.keys())
            tensors = {name: file.get_tensor(name) for name in names}
    except SafetensorError as error:
        raise CacheFileError(f"{path} is not a whole safetensors file: {error}. It may have been cut off.") from error
    try:
        return _assembled(meta, tensors, model)
    except KeyError as error:
        raise CacheFileError(f"{path} does not fit together: it lacks {error}. It was changed.") from error
    except (AttributeError, TypeError, ValueError, IndexError) as error:
        raise CacheFileError(
            f"{path} does not fit together: {error}. It was changed or written by something else."
        ) from error


def _check_format(path: str | os.PathLike[str], meta: dict[str, str]) -> None:
    if meta.get("format") != FORMAT:
        raise CacheFileError(f"{path} is a safetensors file, but not a cache of stream_lens.")
    version = meta.get("version", "")
    if not version.isdigit() or int(version) > VERSION:
        raise CacheFileError(
            f"{path} has format version {version!r}; this stream_lens reads up to {VERSION}: install a newer one."
        )


def _pattern_parts(name: str, data: PatternData, tensors: dict[str, Tensor], scores: bool) -> dict[str, Any]:
    mask = data.mask
    pattern = SparsePattern(data)
    tensors[f"indices:{name}"] = mask.indices
    if data.gate is not None:
        tensors[f"gate:{name}"] = data.gate
    with suppress(NoScoresError):  # masses of an edited pattern without scores cannot be known: they are left out
        tensors[f"mass:{name}"] = block_mass(data)
    plain: dict[str, Any] = {
        "q_block": mask.q_block,
        "k_block": mask.k_block,
        "q_len": mask.q_len,
        "kv_len": mask.kv_len,
        "offset": mask.offset,
        "window": mask.window,
        "dtype": str(pattern.dtype).removeprefix("torch."),
        "present": list(data.present),
        "layer": data.layer,
        "edited": data.edited,
        "first_keys": None if data.first_keys is None else [data.first_keys[row] for row in data.cell_rows[0]],
        "rule": None,
    }
    if scores:
        plain["rule"] = _score_parts(name, data, tensors)
    return plain


def _score_parts(name: str, data: PatternData, tensors: dict[str, Tensor]) -> dict[str, Any] | None:
    if len(data.sources) > 1:
        raise ValueError(f"{name} was patched together from several runs: save it with scores=False.")
    whole = data.sources[0]
    if whole is None:
        return None
    own = whole.of(*data.cell_rows[:2]).rows_of(data.mask)
    tensors[f"q:{name}"], tensors[f"k:{name}"] = own.q, own.k
    for part, value in (("key_mask", own.rule.key_mask), ("sinks", own.rule.sinks)):
        if value is not None:
            tensors[f"{part}:{name}"] = value
    return {"scale": own.rule.scale, "softcap": own.rule.softcap}


def _assembled(meta: dict[str, str], tensors: dict[str, Tensor], model: Any) -> SparseActivationCache:
    config = json.loads(meta["config"])
    cached: dict[str, Tensor] = {
        name.removeprefix("tensor:"): value for name, value in tensors.items() if name.startswith("tensor:")
    }
    for name, plain in json.loads(meta["patterns"]).items():
        cached[name] = _read_pattern(name, plain, tensors)
    info = RunInfo(
        meta["model"],
        None if config is None else StreamConfig.from_json(config),
        json.loads(meta["observe"]),
        tensors.get("tokens"),
    )
    cache = SparseActivationCache(cached, model, json.loads(meta["has_batch_dim"]), info)
    if _token_count(cache) != int(meta["token_count"]):
        raise ValueError(f"it should hold {meta['token_count']} tokens and holds {_token_count(cache)}")
    return cache


def _read_pattern(name: str, plain: dict[str, Any], tensors: dict[str, Tensor]) -> SparsePattern:
    indices = tensors[f"indices:{name}"]
    sizes = {field: plain[field] for field in ("q_block", "k_block", "q_len", "kv_len", "offset", "window")}
    mask = BlockMask(indices, **sizes).check()
    gate, mass = tensors.get(f"gate:{name}"), tensors.get(f"mass:{name}")
    for part, value in (("gate", gate), ("mass", mass)):
        if value is not None and value.shape != indices.shape:
            raise ValueError(f"the {part} of {name} has shape {list(value.shape)}, its blocks {list(indices.shape)}")
    first_keys = plain.get("first_keys")
    if first_keys is not None and len(first_keys) != indices.shape[0]:
        raise ValueError(f"first_keys of {name} are of {len(first_keys)} texts, its blocks of {indices.shape[0]}")
    data = PatternData(
        mask=mask,
        gate=gate,
        cell=MassCell(mask, mass),
        cell_rows=(list(range(indices.shape[0])), list(range(indices.shape[1])), 0),
        sources=(_read_scores(name, plain, tensors, mask),),
        present=tuple(plain["present"]),
        dtype=getattr(torch, plain["dtype"]),
        edited=plain["edited"],
        first_keys=None if first_keys is None else tuple(first_keys),
        layer=plain["layer"],
    )
    return SparsePattern(data)


def _read_scores(name: str, plain: dict[str, Any], tensors: dict[str, Tensor], mask: BlockMask) -> Scores | None:
    if plain["rule"] is None:
        return None
    rule = ScoreRule(
        plain["rule"]["scale"],
        mask.offset,
        mask.window,
        plain["rule"]["softcap"],
        tensors.get(f"key_mask:{name}"),
        tensors.get(f"sinks:{name}"),
    )
    scores = Scores(tensors[f"q:{name}"], tensors[f"k:{name}"], rule)
    check_shapes(scores.q, scores.k, rule)
    if (*scores.q.shape[:3], scores.k.shape[2]) != mask.shape:
        raise ValueError(f"the queries and keys of {name} do not make its pattern of {list(mask.shape)}")
    return scores


def _token_count(cache: SparseActivationCache) -> int:
    if cache.info.tokens is not None:
        return cache.info.tokens.shape[-1]
    return max((pattern.mask.kv_len for pattern in cache.patterns().values()), default=0)
