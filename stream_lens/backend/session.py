"""One model's streaming: which objects were changed, and how to change them back."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from stream_lens.backend.layer import StreamedLayer
from stream_lens.backend.lazy_mask import IMPLEMENTATION


@dataclass(eq=False)
class Session:
    """What `install` changed on a model. It lives in the model, so that a deep copy of the model has its own.

    Attributes:
        model: the streamed model.
        layers: the streamed layers' state.
        swapped: objects whose class was swapped, with the class they had.
        marked: objects that hold an attribute of ours, with its name.
        configs: transformers' configs whose attention implementation is "stream_lens" while the model runs.
        handles: hooks on the transformers model, removed on leaving.
    """

    model: Any
    layers: list[StreamedLayer]
    swapped: list[tuple[Any, type]] = field(default_factory=list)
    marked: list[tuple[Any, str]] = field(default_factory=list)
    configs: list[Any] = field(default_factory=list)
    handles: list[Any] = field(default_factory=list)
    implementations: list[Any] = field(default_factory=list)
    """The configs' own implementations, while a forward runs; empty otherwise."""
    depth: int = 0

    def swap(self, thing: Any, methods: dict[str, Callable[..., Any]]) -> None:
        """Give one object methods of its own, through a class made for it. Hooks, names and weights stay."""
        cls = type(thing)
        # A single base and copied methods: with a second base Python reports "object layout differs".
        streamed = type(f"Streamed{cls.__name__}", (cls,), {"__module__": cls.__module__, **methods})
        self.swapped.append((thing, cls))
        object.__setattr__(thing, "__class__", streamed)

    def mark(self, thing: Any, name: str, value: Any) -> None:
        """Set an attribute past the object's own `__setattr__`: bridges hand that on to the module they wrap."""
        self.marked.append((thing, name))
        thing.__dict__[name] = value

    def watch(self, transformers_model: Any) -> None:
        """Make "stream_lens" the attention implementation of a transformers model while its forward runs."""
        modules = transformers_model.modules()
        configs = [module.__dict__["config"] for module in modules if "config" in module.__dict__]
        known = {id(config): config for config in configs if hasattr(config, "_attn_implementation_internal")}
        self.configs = list(known.values())
        self.handles = [
            transformers_model.register_forward_pre_hook(self.enter_forward),
            transformers_model.register_forward_hook(self.check_all_ran),
            transformers_model.register_forward_hook(self.leave_forward, always_call=True),
        ]

    def restore(self) -> None:
        """Undo everything; safe to call twice."""
        self.leave_forward()
        while self.handles:
            self.handles.pop().remove()
        while self.swapped:
            thing, cls = self.swapped.pop()
            object.__setattr__(thing, "__class__", cls)
        while self.marked:
            thing, name = self.marked.pop()
            thing.__dict__.pop(name, None)

    # transformers reads its implementation from a config that another model may share, so it is ours only while this
    # model's forward runs.

    def enter_forward(self, *_: Any) -> None:
        """Forward pre-hook of a transformers model."""
        self.depth += 1
        if self.depth == 1:
            self.implementations = [config._attn_implementation_internal for config in self.configs]
            for config in self.configs:
                config._attn_implementation_internal = IMPLEMENTATION
            for layer in self.layers:
                layer.runs = 0
                layer.pattern = None

    def leave_forward(self, *_: Any) -> None:
        """Forward hook of a transformers model, called after errors too."""
        self.depth = max(0, self.depth - 1)
        if self.depth == 0:
            for config, implementation in zip(self.configs, self.implementations, strict=False):
                config._attn_implementation_internal = implementation
            self.implementations = []

    def check_all_ran(self, *_: Any) -> None:
        """Forward hook of a transformers model, called after a whole forward only."""
        if self.depth <= 1:
            _require_runs(self.layers)


def checked_forward(forward: Callable[..., Any]) -> Callable[..., Any]:
    """An attention's forward that afterwards demands that the layer's kernel ran exactly once."""

    @functools.wraps(forward)
    def run(self: Any, *args: Any, **kwargs: Any) -> Any:
        layer: StreamedLayer = self.__dict__["_streamed_layer"]
        before, layer.pattern = layer.runs, None
        result = forward(self, *args, **kwargs)
        if layer.runs != before + 1:
            raise RuntimeError(
                f"{layer.name} finished its forward with {layer.runs - before} streamed attentions instead of 1: it "
                "ran dense. This attention cannot be streamed; please report it with the model's name."
            )
        return result

    return run


def _require_runs(layers: list[StreamedLayer]) -> None:
    idle = [layer.name for layer in layers if layer.runs == 0]
    if idle:
        raise RuntimeError(
            f"{', '.join(idle)} did not run the streamed attention in this forward, so they may have run dense. "
            "Please report it with the model's name."
        )
