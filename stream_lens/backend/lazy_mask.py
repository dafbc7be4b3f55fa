"""LazyMask: what transformers' mask functions give while a bridge is streamed, instead of a T × T mask.

transformers makes one mask a forward and hands it down to every layer. Its mask interface lets an attention
implementation choose the function that makes it; ours keeps what is needed to mask the keys of kept blocks only.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool
from torch import Tensor
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS

IMPLEMENTATION = "stream_lens"


@dataclass(frozen=True, eq=False)
class LazyMask:
    """Causality, window and padding of one forward.

    Attributes:
        offset: position of the first query among the keys that the layer sees.
        window: sliding window in keys, None for none.
        key_mask: [batch, key], False where a key is padding; None when nothing is padded.
        call: arguments that transformers gave, to make the dense mask for layers that are not streamed.
    """

    offset: int
    window: int | None
    key_mask: Bool[Tensor, "batch key"] | None
    call: dict[str, Any]

    def dense(self, implementation: str) -> Tensor | None:
        """The mask that transformers would have made for `implementation`."""
        made = ALL_MASK_ATTENTION_FUNCTIONS[implementation](**self.call)
        return made if isinstance(made, Tensor) or made is None else made.to_dense()


def lazy_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int = 0,
    kv_offset: int = 0,
    mask_function: Callable[..., Any] | None = None,
    attention_mask: Tensor | None = None,
    **kwargs: Any,
) -> LazyMask:
    """The mask function that transformers calls for the implementation "stream_lens"."""
    call = {
        "batch_size": batch_size,
        "q_length": q_length,
        "kv_length": kv_length,
        "q_offset": q_offset,
        "kv_offset": kv_offset,
        "mask_function": mask_function,
        "attention_mask": attention_mask,
        **kwargs,
    }
    q_offset, kv_offset = int(q_offset), int(kv_offset)
    window = None
    if mask_function is not None:
        window = _window_of(mask_function, q_length, kv_length, q_offset, kv_offset)
        _check_is_causal(mask_function, batch_size, q_length, kv_length, q_offset, kv_offset, window)
    key_mask = None
    if attention_mask is not None:
        key_mask = attention_mask.bool()[:, kv_offset : kv_offset + kv_length]
        key_mask = torch.nn.functional.pad(key_mask, (0, kv_length - key_mask.shape[1]))
        if bool(key_mask.all()):
            key_mask = None
    return LazyMask(q_offset - kv_offset, window, key_mask, call)


def _window_of(
    mask_function: Callable[..., Any], q_length: int, kv_length: int, q_offset: int, kv_offset: int
) -> int | None:
    """The sliding window, read off the last query's row; None where that row sees everything before it."""
    last = q_offset + q_length - 1
    key = torch.arange(kv_offset, min(kv_offset + kv_length, last + 1))
    zero = torch.zeros_like(key)
    given = torch.as_tensor(_called(mask_function, zero, zero, torch.full_like(key, last), key)).expand_as(key)
    seen = int(given.sum())
    return None if seen == len(key) else seen


def _called(mask_function: Callable[..., Any], *index: Tensor) -> Any:
    try:
        return mask_function(*index)
    except Exception as error:
        raise NotImplementedError(
            "this model builds its attention mask with a function that stream_lens cannot read: only causal and "
            "sliding-window masks, with padding, are supported."
        ) from error


def _check_is_causal(
    mask_function: Callable[..., Any],
    batch: int,
    q_length: int,
    kv_length: int,
    q_offset: int,
    kv_offset: int,
    window: int | None,
) -> None:
    """Compare transformers' mask function with causality and the window, at probe points: edges and a random sample.

    Packed sequences, chunked attention and custom overlays differ from it, and a block mask does not know them.
    """
    generator = torch.Generator().manual_seed(0)
    rows = torch.cat([torch.tensor([0, q_length - 1]), torch.randint(q_length, (62,), generator=generator)]) + q_offset
    near = torch.tensor([-1, 0, 1])
    edge = near if window is None else torch.cat([near, near - window])
    keys = torch.cat(
        [
            rows[:, None] + edge,
            kv_offset + torch.randint(kv_length, (64, 64), generator=generator),
            torch.full((64, 1), kv_offset),
        ],
        1,
    ).clamp(min=kv_offset, max=kv_offset + kv_length - 1)
    rows = rows[:, None].expand_as(keys)
    expected = (keys <= rows) & (keys > rows - window if window is not None else True)
    head = torch.zeros_like(rows)
    for row in range(batch):
        given = _called(mask_function, torch.full_like(rows, row), head, rows, keys)
        if not bool((torch.as_tensor(given).to(expected.device) == expected).all()):
            raise NotImplementedError(
                "this model's attention mask is neither causal nor a causal sliding window (packed sequences, chunked "
                "or bidirectional attention, or a custom mask): stream_lens does not support it."
            )


def register() -> None:
    """Tell transformers of the mask function; doing so twice is harmless."""
    ALL_MASK_ATTENTION_FUNCTIONS.register(IMPLEMENTATION, lazy_mask)
