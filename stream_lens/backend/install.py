"""`stream` and `install`: make a model's attention sparse, and give it back as it was."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from stream_lens.backend import bridge, delegated, hooked_transformer, lazy_mask
from stream_lens.backend.architectures import attention_kind
from stream_lens.backend.choices import configured, require_kernel, wanted_layers
from stream_lens.backend.layer import StreamedLayer
from stream_lens.backend.refusal import UnsupportedArchitectureError
from stream_lens.backend.session import Session, checked_forward
from stream_lens.backend.sparse_cache import run_with_cache_of
from stream_lens.blocks import StreamConfig
from stream_lens.blocks.kernel_choice import Kernel

_SESSION = "_stream_session"


@dataclass(frozen=True, eq=False)
class Streamed:
    """A model being streamed.

    Attributes:
        model: the same object that was given, now sparse.
        config: what its layers keep.
        observe: whether dense outputs flow on.
    """

    model: Any
    config: StreamConfig
    observe: bool

    @property
    def layers(self) -> list[int]:
        """Numbers of the streamed layers."""
        session: Session | None = self.model.__dict__.get(_SESSION)
        return [] if session is None else [layer.number for layer in session.layers]

    def uninstall(self) -> None:
        """Give the model back as it was. Calling it again does nothing."""
        if is_streamed(self.model):
            uninstall(self.model)


def install(
    model: Any,
    config: StreamConfig | None = None,
    *,
    observe: bool = False,
    kernel: Kernel = "auto",
    keep_scores: bool = True,
    allow_untested: bool = False,
    **choices: Any,
) -> Streamed:
    """Make `model`'s attention sparse until `uninstall`. `stream` is the same as a context manager.

    Hooks, names, weights and every other activation stay; `hook_pattern` yields a `SparsePattern`, and
    `model.run_with_cache` gives a `SparseActivationCache`. After `uninstall` outputs are bit-identical to before.

    Args:
        model: HookedTransformer (TransformerLens 3.x) or TransformerBridge, in eval mode.
        config: what to keep; None for the defaults. Fields of StreamConfig may be given by name instead or besides:
            ``install(model, k=8, q_block=64)``.
        observe: let the dense output flow on and only record masks and their share of the dense pattern, at O(T²) time
            and O(T) memory. Edits of the pattern then raise.
        kernel: "auto", or a path to force: "triton", "cpp", "torch".
        keep_scores: cached patterns refer to their queries and keys, so that `to_dense`, patching and masses of edited
            patterns work later. False drops them: O(T · d_head) less for each layer kept.
        allow_untested: try an architecture that has no test; MLA, ALiBi and the like stay refused.

    Raises:
        UnsupportedArchitectureError: the model's attention cannot be streamed; the message says why.
        RuntimeError: the model is streamed already.
        TypeError: not a model of TransformerLens.
        ValueError: a choice is out of range, or a layer does not exist.
    """
    config = configured(config, choices, also="observe, kernel, keep_scores or allow_untested")
    require_kernel(kernel)
    if is_streamed(model):
        raise RuntimeError(
            "this model is streamed already: leave that `with` block or call uninstall() on what install gave, then "
            "stream again with the new choices."
        )
    kind = _kind(model)
    modules = (
        hooked_transformer.attention_modules(model)
        if kind == "hooked"
        else bridge.attention_modules(model, allow_untested)
    )
    wanted = wanted_layers(config, [number for number, _, _ in modules], model.cfg.n_heads)
    layers = [
        StreamedLayer(number, name, config, kernel, observe, keep_scores)
        for number, name, _ in modules
        if number in wanted
    ]
    session = Session(model, layers)
    try:
        _change(session, modules, kind)
    except BaseException:
        session.restore()
        raise
    return Streamed(model, config, observe)


def uninstall(model: Any) -> None:
    """Give a streamed model, or a copy made while it was streamed, back as it was. `RuntimeError` if it is not."""
    session: Session | None = model.__dict__.get(_SESSION)
    if session is None:
        raise RuntimeError("this model is not streamed: there is nothing to uninstall.")
    session.restore()


def is_streamed(model: Any) -> bool:
    """Whether `install` or `stream` is at work on the model."""
    return _SESSION in getattr(model, "__dict__", {})


@contextmanager
def stream(model: Any, config: StreamConfig | None = None, **choices: Any) -> Iterator[Streamed]:
    """`install` for the length of a `with` block; the model is given back also when the block raises.

    >>> with stream(model, q_block=32, k_block=32, k=16):  # doctest: +SKIP
    ...     logits, cache = model.run_with_cache(tokens)
    """
    streamed = install(model, config, **choices)
    try:
        yield streamed
    finally:
        streamed.uninstall()


@contextmanager
def with_whole_kv_cache(model: Any) -> Iterator[None]:
    """A dense bridge that decodes with its KV cache, by streaming none of its layers; other models stay as they are.

    transformers 5.24 renamed the cache, and bridges of TransformerLens up to 4.3 then attend to the last token alone
    (see `stream_lens.backend.bridge`). What `install` does to all layers of a bridge mends that, and with layers=()
    leaves their attention dense. Where the bridge cannot be streamed its decoding is TransformerLens' own.
    """
    if is_streamed(model) or not hasattr(model, "original_model"):
        yield
        return
    try:
        streamed = install(model, layers=())
    except UnsupportedArchitectureError:
        yield
        return
    try:
        yield
    finally:
        streamed.uninstall()


def _kind(model: Any) -> str:
    names = {cls.__name__ for cls in type(model).__mro__}
    for name, kind in (("HookedTransformer", "hooked"), ("TransformerBridge", "bridge")):
        if name in names:
            return kind
    if names & {"HookedEncoder", "HookedEncoderDecoder", "HookedAudioEncoder"}:
        raise UnsupportedArchitectureError(f"{type(model).__name__} cannot be streamed: its attention is not causal.")
    raise TypeError(
        f"a {type(model).__name__} was given: stream takes a HookedTransformer or a TransformerBridge. For a plain "
        "transformers model boot a bridge (TransformerBridge.boot_transformers(name, hf_model=model)), or use "
        "stream_lens.stream_transformers."
    )


def _change(session: Session, modules: list[tuple[int, str, Any]], kind: str) -> None:
    model = session.model
    streamed = {layer.number: layer for layer in session.layers}
    for number, _, attn in modules:
        if number in streamed:
            _stream_attention(session, streamed[number], attn, kind)
        elif kind == "bridge":
            _keep_attention_dense(session, attn)
    if kind == "bridge":
        _change_transformers_model(session)
    session.mark(model, _SESSION, session)
    session.swap(model, {"run_with_cache": run_with_cache_of(type(model).run_with_cache)})


def _stream_attention(session: Session, layer: StreamedLayer, attn: Any, kind: str) -> None:
    is_delegated = kind == "bridge" and attention_kind(attn).delegated
    methods = hooked_transformer.overrides(attn) if kind == "hooked" else bridge.overrides(attn)
    session.mark(attn, "_streamed_layer", layer)
    session.swap(attn, {**methods, "forward": checked_forward(type(attn).forward)})
    if is_delegated:
        session.mark(attn.original_component, "_streamed_layer", layer)
        # In a tuple, so that the module does not register its own bridge as a submodule.
        session.mark(attn.original_component, "_stream_bridge", (attn,))


def _keep_attention_dense(session: Session, attn: Any) -> None:
    component = attn.original_component if attention_kind(attn).delegated else attn
    implementation = session.model.original_model.config._attn_implementation or "eager"
    session.mark(component, "_dense_implementation", implementation)
    if component is attn:
        session.swap(attn, bridge.dense_overrides(attn))


def _change_transformers_model(session: Session) -> None:
    lazy_mask.register()
    delegated.register()
    session.watch(session.model.original_model)
