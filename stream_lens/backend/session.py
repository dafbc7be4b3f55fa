"""One model's streaming: which objects were changed, and how to change them back."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
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
        marked: objects that hold an attribute of ours, with its name and, by name, the one of their own that it covers.
        configs: transformers' configs whose attention implementation is "stream_lens" while the model runs.
    """

    model: Any
    layers: list[StreamedLayer]
    swapped: list[tuple[Any, type]] = field(default_factory=list)
    marked: list[tuple[Any, str, dict[str, Any]]] = field(default_factory=list)
    configs: list[Any] = field(default_factory=list)
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
        covered = {name: thing.__dict__[name]} if name in thing.__dict__ else {}
        self.marked.append((thing, name, covered))
        thing.__dict__[name] = value

    def watch(self, transformers_model: Any) -> None:
        """Make "stream_lens" the attention implementation of a transformers model while its forward runs."""
        modules = transformers_model.modules()
        configs = [module.__dict__["config"] for module in modules if "config" in module.__dict__]
        known = {id(config): config for config in configs if hasattr(config, "_attn_implementation_internal")}
        self.configs = list(known.values())
        # Not hooks: those that torch always calls are skipped when a forward is interrupted from the keyboard.
        watched = functools.partial(_watched_forward, self, transformers_model.forward)
        watched.__signature__ = inspect.signature(transformers_model.forward)  # type: ignore[attr-defined]
        self.mark(transformers_model, "forward", watched)

    def restore(self) -> None:
        """Undo everything; safe to call twice."""
        while self.swapped:
            thing, cls = self.swapped.pop()
            object.__setattr__(thing, "__class__", cls)
        while self.marked:
            thing, name, covered = self.marked.pop()
            thing.__dict__.pop(name, None)
            thing.__dict__.update(covered)

    @contextmanager
    def running(self) -> Iterator[None]:
        """While a transformers model's forward runs; one may run inside another, started by a hook.

        transformers reads its implementation from a config that another model may share, so it is ours only here.
        """
        if self.depth == 0:
            self.implementations = [config._attn_implementation_internal for config in self.configs]
            for config in self.configs:
                config._attn_implementation_internal = IMPLEMENTATION
            for layer in self.layers:
                layer.runs = 0
                layer.pattern = None
        self.depth += 1
        try:
            yield
        finally:
            self.depth -= 1
            if self.depth == 0:
                for config, implementation in zip(self.configs, self.implementations, strict=True):
                    config._attn_implementation_internal = implementation
                self.implementations = []


def _watched_forward(session: Session, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """A transformers model's forward in which all streamed layers have to run."""
    with session.running():
        result = forward(*args, **kwargs)
        if session.depth == 1:
            _require_runs(session.layers)
    return result


def checked_forward(forward: Callable[..., Any]) -> Callable[..., Any]:
    """An attention's forward that afterwards demands that the layer's kernel ran exactly once."""

    @functools.wraps(forward)
    def run(self: Any, *args: Any, **kwargs: Any) -> Any:
        layer: StreamedLayer = self.__dict__["_streamed_layer"]
        # A pattern is waiting for its values only where a hook of this very layer calls the model again.
        waiting, before = layer.pattern, layer.runs
        layer.pattern, layer.runs = None, 0
        try:
            result = forward(self, *args, **kwargs)
            runs = layer.runs
        finally:
            layer.pattern, layer.runs = waiting, before + (waiting is None)
        if runs != 1:
            raise RuntimeError(
                f"{layer.name} finished its forward with {runs} streamed attentions instead of 1: it ran dense. This "
                "attention cannot be streamed; please report it with the model's name."
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
