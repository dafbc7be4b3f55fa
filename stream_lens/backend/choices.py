"""What a user chose for a streamed run, checked before a model is changed."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, get_args

from stream_lens.blocks import StreamConfig
from stream_lens.blocks.kernel_choice import Kernel
from stream_lens.blocks.selection import SELECTORS


def configured(config: StreamConfig | None, choices: dict[str, Any], *, also: str) -> StreamConfig:
    """The configuration with the choices that were given by name; `also` lists what else the caller takes by name.

    Raises:
        TypeError: not a StreamConfig, or a name that nothing has.
        ValueError: a choice is out of range.
    """
    if config is not None and not isinstance(config, StreamConfig):
        raise TypeError(f"config={config!r} is not a StreamConfig: give one, or choices by name, as in k=16.")
    unknown = set(choices) - set(StreamConfig.__dataclass_fields__)
    if unknown:
        raise TypeError(
            f"{', '.join(sorted(unknown))} is no choice of stream: give fields of StreamConfig "
            f"({', '.join(StreamConfig.__dataclass_fields__)}), {also}."
        )
    config = replace(config or StreamConfig(), **choices)
    if config.selector not in SELECTORS:
        raise ValueError(f"selector={config.selector!r} is not known: choose one of {', '.join(SELECTORS)}.")
    return config


def require_kernel(kernel: Any) -> None:
    """`ValueError` unless it is a kernel's name."""
    if kernel not in get_args(Kernel):
        raise ValueError(f"kernel={kernel!r} is not known: choose one of {', '.join(get_args(Kernel))}.")


def wanted_layers(config: StreamConfig, existing: list[int], heads: int) -> set[int]:
    """Numbers of the layers to stream. `ValueError` if `layers` or `overrides` name what the model has not."""
    wanted = set(existing if config.layers is None else config.layers)
    missing = wanted - set(existing)
    if missing:
        raise ValueError(f"layers {sorted(missing)} do not exist: the model's attention layers are {existing}.")
    beyond = {layer for layer, _ in config.overrides} - wanted
    if beyond:
        raise ValueError(f"overrides name layers {sorted(beyond)}, which are not streamed.")
    lacking = {head for _, head in config.overrides if head >= heads}
    if lacking:
        raise ValueError(f"overrides name heads {sorted(lacking)}; the model's layers have heads 0 to {heads - 1}.")
    return wanted
