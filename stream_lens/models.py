"""Load any model that TransformerLens or transformers can load, or one of the two demo models."""

from __future__ import annotations

import contextlib
import logging
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import torch

from stream_lens.demo_models import DEMO_MODELS, DemoModel, DemoModelError, demo_folder
from stream_lens.devices import require_device

__all__ = ["DEMO_MODELS", "DemoModel", "DemoModelError", "load_demo_model", "load_model"]

Form = Literal["hooked", "bridge"]

_CONTEXT_FIELDS = ("n_positions", "max_position_embeddings", "max_context_length", "seq_length", "max_sequence_length")


def load_demo_model(name: str, as_: Form | None = None, n_ctx: int | None = None) -> Any:
    """Load "gemma-3-270m" or "smollm2-135m" (see DEMO_MODELS) in float32, from installed distributions.

    The first load converts the weights (about a minute) into the cache folder ($STREAM_LENS_CACHE), later ones take
    seconds. `as_`, `n_ctx`, the default device and the errors are those of `load_model`; n_ctx defaults to all that
    the model has. Also raises DemoModelError where the weights are not installed or not the expected ones.
    """
    if name not in DEMO_MODELS:
        raise ValueError(f"Unknown demo model {name!r}: choose one of {', '.join(DEMO_MODELS)}, or use load_model.")
    return load_model(name, as_=as_, n_ctx=n_ctx)


def load_model(
    name_or_folder: str | os.PathLike[str],
    as_: Form | None = None,
    n_ctx: int | None = None,
    dtype: torch.dtype = torch.float32,
    device: str | torch.device | None = None,
) -> Any:
    """Load a model, in eval mode, by the name of a demo model, a local folder, or a hub name.

    as_: "hooked" for a HookedTransformer (weights unprocessed; TransformerLens 3.x and the names it lists), "bridge"
        for a TransformerBridge; None takes "hooked" where TransformerLens lists the name, else "bridge".
    n_ctx: context length in tokens; None keeps the loader's own (a demo model: all that it has).
    device: None takes a GPU where there is one.

    Raises ValueError for an as_ that this model or TransformerLens version does not offer, a device that this machine
    has not, an n_ctx above what the model has, or a name that is neither a demo model, a model folder, nor a hub model
    that can be loaded; TypeError for a dtype that is not a floating-point one.
    """
    name = os.fspath(name_or_folder)
    demo = DEMO_MODELS.get(name)
    if as_ not in (None, "hooked", "bridge"):
        raise ValueError(f'as_={as_!r} is not known: use "hooked", "bridge" or None.')
    if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
        raise TypeError(f"dtype={dtype!r} is not a floating-point torch dtype: give torch.float32, torch.bfloat16, ...")
    if demo is None and Path(name).is_dir() and not (Path(name) / "config.json").is_file():
        raise ValueError(f"The folder {name} has no config.json: give a folder written by save_pretrained.")
    if device is not None:
        require_device(device)
    form = as_ or ("bridge" if _why_not_hooked(name, demo) else "hooked")
    if form == "hooked" and (reason := _why_not_hooked(name, demo)):
        raise ValueError(f'{name} cannot load as_="hooked" because {reason}: use as_="bridge".')
    try:
        if n_ctx is not None:
            _check_n_ctx(name, n_ctx, demo.n_ctx if demo else _longest_context(name, form))
        with contextlib.redirect_stdout(sys.stderr):  # TransformerLens prints; stdout belongs to the caller
            load = _load_hooked if form == "hooked" else _load_bridge
            model = load(name, demo, n_ctx=n_ctx, dtype=dtype, device=device)
    except OSError as error:
        if demo:
            raise  # about the cache folder, not about the name
        known = ", ".join(DEMO_MODELS)
        first_line = str(error).strip().partition("\n")[0]
        raise ValueError(
            f"{name!r} is neither a demo model ({known}), nor a model folder, nor a hub model that could be loaded: "
            f"{first_line}"
        ) from error
    return model.eval()


def _load_hooked(name: str, demo: DemoModel | None, n_ctx: int | None, **placement: Any) -> Any:
    from transformer_lens import HookedTransformer

    if demo is None:
        with _without_context_warning():
            return HookedTransformer.from_pretrained_no_processing(name, n_ctx=n_ctx, **placement)
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = demo_folder(demo)
    with _without_context_warning():
        return HookedTransformer.from_pretrained_no_processing(
            demo.hub_name,
            hf_model=AutoModelForCausalLM.from_pretrained(folder, dtype=placement["dtype"]),
            tokenizer=AutoTokenizer.from_pretrained(folder),
            n_ctx=n_ctx or demo.n_ctx,
            **placement,
        )


def _load_bridge(name: str, demo: DemoModel | None, n_ctx: int | None, **placement: Any) -> Any:
    from transformer_lens.model_bridge import TransformerBridge

    source = str(demo_folder(demo)) if demo else name
    model = TransformerBridge.boot_transformers(source, n_ctx=n_ctx, **placement)
    if demo:
        model.cfg.model_name = demo.name  # not the cache folder's path
    return model


def _why_not_hooked(name: str, demo: DemoModel | None) -> str | None:
    """Why HookedTransformer cannot load the model, as the end of a sentence; None where it can."""
    try:
        from transformer_lens import HookedTransformer  # noqa: F401
        from transformer_lens.loading_from_pretrained import get_official_model_name
    except ImportError:
        return "this TransformerLens has no HookedTransformer (3.x has)"
    if demo is None and Path(name).is_dir():
        return "HookedTransformer loads listed names, not folders"
    try:
        get_official_model_name(demo.hub_name if demo else name)
    except ValueError:
        return "HookedTransformer does not list this model"
    return None


def _longest_context(name: str, form: Form) -> int | None:
    """The most tokens the model has positions for; None where neither transformers nor TransformerLens says."""
    from transformers import AutoConfig

    listed = None
    if form == "hooked":
        from transformer_lens.loading_from_pretrained import get_official_model_name, get_pretrained_model_config

        name = get_official_model_name(name)
        listed = get_pretrained_model_config(name).n_ctx
    try:
        config = AutoConfig.from_pretrained(name).get_text_config()
    except OSError:
        if listed is None:
            raise
        return listed  # some of TransformerLens' own models have no configuration that transformers can read
    for field in _CONTEXT_FIELDS:
        if isinstance(length := getattr(config, field, None), int):
            # TransformerLens' table is cautious for some models (8192 for Gemma 3), so the longer one counts.
            return max(length, listed or 0)
    return listed


def _check_n_ctx(name: str, n_ctx: int, longest: int | None) -> None:
    if isinstance(n_ctx, bool) or not isinstance(n_ctx, int) or n_ctx < 1:
        raise ValueError(f"n_ctx={n_ctx!r} is not a number of tokens: give an integer of at least 1.")
    if longest is not None and n_ctx > longest:
        raise ValueError(f"n_ctx={n_ctx} is more than the {longest} tokens that {name} has: give at most {longest}.")


@contextlib.contextmanager
def _without_context_warning() -> Iterator[None]:
    """Hide TransformerLens' warning about an n_ctx above its table's: n_ctx was checked against the model's own."""

    def other(record: logging.LogRecord) -> bool:
        return not record.getMessage().startswith("You are setting n_ctx=")

    root = logging.getLogger()
    root.addFilter(other)
    try:
        yield
    finally:
        root.removeFilter(other)
