"""select_blocks: which key blocks each query block of one layer keeps."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Literal, overload

import torch
from jaxtyping import Float, Int
from torch import Tensor

from stream_kernels.rule import ScoreRule
from stream_lens.blocks.block_mask import BlockMask, trimmed
from stream_lens.blocks.config import StreamConfig
from stream_lens.blocks.controls import exhaustive, random, window_sinks
from stream_lens.blocks.geometry import BlockRanges, block_ranges
from stream_lens.blocks.hierarchical import SearchRound, hierarchical
from stream_lens.blocks.kernel_choice import Kernel, choose_search, run_search
from stream_lens.blocks.schedule import FractionOfPrefix, MassThreshold
from stream_lens.blocks.search import Picker, Search, assembled, mask_of

SELECTORS: dict[str, Picker] = {
    "stream": hierarchical,
    "exhaustive": exhaustive,
    "window_sinks": window_sinks,
    "random": random,
}

LEAST_FREE = 4
"""Free blocks that `oversample` counts where there are fewer, so that enough branches compete for them."""


def register_selector(name: str) -> Callable[[Picker], Picker]:
    """Decorator that makes a function of a `Search` available as `StreamConfig(selector=name)`.

    The function returns int [batch, head, q_blocks, slots]: at most `search.free` blocks of each query block's search
    range, -1 in empty slots. Forced blocks are added for it. Raises ValueError if the name is taken.
    """

    def register(picker: Picker) -> Picker:
        if name in SELECTORS:
            raise ValueError(f"a selector named {name!r} exists already: choose another name.")
        SELECTORS[name] = picker
        return picker

    return register


@overload
def select_blocks(
    q: Tensor,
    k: Tensor,
    config: StreamConfig,
    rule: ScoreRule | None = ...,
    *,
    layer: int | None = ...,
    return_rounds: Literal[False] = ...,
    kernel: Kernel = ...,
) -> BlockMask: ...


@overload
def select_blocks(
    q: Tensor,
    k: Tensor,
    config: StreamConfig,
    rule: ScoreRule | None = ...,
    *,
    layer: int | None = ...,
    return_rounds: Literal[True],
    kernel: Kernel = ...,
) -> tuple[BlockMask, list[SearchRound]]: ...


@torch.no_grad()
def select_blocks(
    q: Float[Tensor, "batch head query d_head"],
    k: Float[Tensor, "batch kv_head key d_head"],
    config: StreamConfig,
    rule: ScoreRule | None = None,
    *,
    layer: int | None = None,
    return_rounds: bool = False,
    kernel: Kernel = "auto",
) -> BlockMask | tuple[BlockMask, list[SearchRound]]:
    """Choose the key blocks of every query block.

    Args:
        q, k: after rotary embedding and any q/k norm. Query head h uses key head h // (heads / kv_heads).
        config: what to keep, and how to search.
        rule: scale, soft-cap, causal offset, window and padding; by default a scale of d_head ** -0.5 and the queries
            as the last positions of the keys.
        layer: which layer this is, for `config.overrides`.
        return_rounds: also return the state of every round (selector "stream" only); all query blocks in one piece, so
            for short texts, and in plain torch.
        kernel: "auto", or a path to force: "triton" (CUDA, ROCm), "cpp" (CPU, float32 and bfloat16), "torch". All keep
            the same blocks, but for scores that differ by rounding only.

    Returns:
        The mask, or the mask and the rounds.

    Raises:
        ValueError: shapes do not fit, the selector is not known, or rounds are asked of another selector.
        RuntimeError: a forced kernel cannot run here; the message says why.
    """
    rule = rule or ScoreRule(q.shape[-1] ** -0.5, offset=k.shape[2] - q.shape[2])
    check_shapes(q, k, rule)
    if config.selector not in SELECTORS:
        raise ValueError(f"selector={config.selector!r} is not known: choose one of {', '.join(SELECTORS)}.")
    if return_rounds and config.selector != "stream":
        raise ValueError(f"selector {config.selector!r} has no rounds: use selector='stream'.")
    if return_rounds and kernel not in ("auto", "torch"):
        raise ValueError(f"kernel={kernel!r} has no rounds to return: use kernel='torch'.")
    search = prepared(q, k, rule, config, layer)
    rounds: list[SearchRound] = []
    path = "torch" if return_rounds else choose_search(kernel, search)
    if path != "torch":
        mask = mask_of(search, run_search(path, search))
    else:
        mask = assembled(search, hierarchical(search, rounds) if return_rounds else SELECTORS[config.selector](search))
    if isinstance(config.k, MassThreshold):
        mask = _trimmed_to_mass(q, k, rule, mask, search, config.k.mass)
    return (mask, rounds) if return_rounds else mask


def prepared(q: Tensor, k: Tensor, rule: ScoreRule, config: StreamConfig, layer: int | None) -> Search:
    """The search problem of one layer: ranges, budgets and the number of rounds."""
    batch, heads, query_len, _ = q.shape
    key_len = k.shape[2]
    ranges = block_ranges(rule, query_len, key_len, config, batch=batch, device=q.device)
    budget = budgets(config, ranges, heads, layer)
    free = torch.minimum(budget - ranges.forced[:, None], (ranges.local_start - ranges.sink_stop)[:, None]).clamp(min=0)
    # Bounds from sizes alone, so that compiled code does not wait for data.
    k_blocks = -(-min(key_len, rule.offset + query_len) // config.k_block)
    if rule.window is not None:
        k_blocks = min(k_blocks, (rule.window + config.q_block - 2) // config.k_block + 2)
    # A query block that starts inside a key block stands in one more of them.
    forced = config.forced_blocks + (rule.offset % config.k_block != 0)
    most, fewest = _budget_bounds(config, layer, k_blocks)
    slots = min(max(most, forced), k_blocks)
    # Where there is a range to search, it lies between all sinks, unless a window hides them, and all local blocks.
    always = config.local_blocks + 1 + (0 if rule.window is not None else config.sink_blocks)
    free_slots = max(0, slots - always)
    config = with_enough_branches(config, free_slots)
    branches = config.oversample * max(1, fewest - forced)
    rounds = (-(-k_blocks // branches) - 1).bit_length()
    return Search(q, k, rule, config, ranges, free, slots, free_slots, rounds)


def with_enough_branches(config: StreamConfig, free_slots: int) -> StreamConfig:
    """The config with `oversample` raised where fewer than LEAST_FREE blocks are free: as many branches as for those.

    With one free block and an oversample of 6 the search followed six branches of 250 blocks and lost needles that the
    oracle keeps. The paper's form (an oversample of 1) stays as it is.
    """
    if config.oversample == 1 or free_slots >= LEAST_FREE:
        return config
    return replace(config, oversample=-(-LEAST_FREE * config.oversample // max(1, free_slots)))


def budgets(
    config: StreamConfig, ranges: BlockRanges, heads: int, layer: int | None
) -> Int[Tensor, "batch head q_blocks"]:
    """Blocks each query block may keep, forced ones included; never fewer than the forced ones."""
    if isinstance(config.k, FractionOfPrefix):
        wanted = config.k.blocks(ranges.visible)
    else:
        k = config.k.maximum if isinstance(config.k, MassThreshold) else config.k
        wanted = torch.full_like(ranges.visible, k)
    budget = wanted[:, None].repeat(1, heads, 1)
    for (where, head), k in config.overrides.items():
        if where == layer:
            if head >= heads:
                raise ValueError(f"overrides[{(where, head)}] names a head that layer {layer} lacks: it has {heads}.")
            budget[:, head] = k
    return torch.maximum(budget, ranges.forced[:, None])


def _budget_bounds(config: StreamConfig, layer: int | None, k_blocks: int) -> tuple[int, int]:
    """The most and the fewest blocks that any query block may be given, from sizes alone."""
    if isinstance(config.k, FractionOfPrefix):
        bounds = [config.k.minimum, math.ceil(config.k.fraction * k_blocks)]
    else:
        bounds = [config.k.maximum if isinstance(config.k, MassThreshold) else config.k]
    bounds += [k for (where, _), k in config.overrides.items() if where == layer]
    return max(bounds), min(bounds)


def check_shapes(q: Tensor, k: Tensor, rule: ScoreRule) -> None:
    """Raise ValueError unless q, k and the rule describe one attention."""
    if q.ndim != 4 or k.ndim != 4:
        raise ValueError(
            f"q and k must be [batch, head, position, d_head]; got shapes {tuple(q.shape)} and {tuple(k.shape)}."
        )
    if 0 in q.shape or 0 in k.shape:
        raise ValueError(f"q {tuple(q.shape)} and k {tuple(k.shape)} must not be empty.")
    if q.shape[0] != k.shape[0] or q.shape[3] != k.shape[3]:
        raise ValueError(f"q {tuple(q.shape)} and k {tuple(k.shape)} must agree in batch and d_head.")
    if q.dtype != k.dtype:
        raise ValueError(f"q and k must share one dtype; got {q.dtype} and {k.dtype}.")
    if q.shape[1] % k.shape[1]:
        raise ValueError(
            f"{q.shape[1]} query heads cannot share {k.shape[1]} key heads: query heads must be a multiple of key "
            "heads."
        )
    _check_rule(rule, q.shape[1])
    if rule.offset + q.shape[2] > k.shape[2]:
        raise ValueError(
            f"queries at positions {rule.offset} to {rule.offset + q.shape[2] - 1} need as many keys; got {k.shape[2]}."
        )
    if rule.key_mask is not None and tuple(rule.key_mask.shape) != (k.shape[0], k.shape[2]):
        raise ValueError(
            f"key_mask must be [batch, key] = {[k.shape[0], k.shape[2]]}; got {list(rule.key_mask.shape)}."
        )


def _check_rule(rule: ScoreRule, heads: int) -> None:
    if rule.offset < 0:
        raise ValueError(f"offset={rule.offset} is not allowed: the first query stands at 0 or later.")
    if rule.window is not None and rule.window < 1:
        raise ValueError(f"window={rule.window} is not allowed: a row sees 1 key or more; give None for no window.")
    if rule.softcap is not None and not rule.softcap > 0:
        raise ValueError(f"softcap={rule.softcap} is not allowed: give a positive cap or None.")
    if rule.key_mask is not None and rule.key_mask.dtype != torch.bool:
        raise ValueError(f"key_mask must be bool; got {rule.key_mask.dtype}: use `attention_mask.bool()`.")
    if rule.sinks is not None and tuple(rule.sinks.shape) != (heads,):
        raise ValueError(f"sinks must have one logit per head, {[heads]}; got {list(rule.sinks.shape)}.")


def _trimmed_to_mass(
    q: Tensor, k: Tensor, rule: ScoreRule, mask: BlockMask, search: Search, threshold: float
) -> BlockMask:
    """The fewest blocks, forced ones and then best first, that hold `threshold` of the mass the mask holds."""
    from stream_lens.blocks.attention import block_sparse_attention

    mass = block_sparse_attention(q, k, k, mask, rule).block_mass
    blocks = mask.indices
    ranges = search.ranges
    forced = (blocks < ranges.sink_stop[:, None, :, None]) | (blocks >= ranges.local_start[:, None, :, None])
    forced &= blocks >= 0
    rank = torch.where(forced, torch.inf, mass).masked_fill(blocks < 0, -torch.inf)
    order = rank.sort(dim=-1, descending=True, stable=True).indices
    ordered = mass.gather(-1, order)
    before = ordered.cumsum(-1) - ordered
    enough = before >= threshold * ordered.sum(-1, keepdim=True)
    keep = torch.zeros_like(forced).scatter_(-1, order, ~enough) | forced
    indices = mask.where(keep).indices
    # How many slots are in use is known to the data only; compiled code keeps the empty ones.
    return replace(mask, indices=indices if torch.compiler.is_compiling() else trimmed(indices))
