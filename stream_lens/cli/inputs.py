"""A model and the text to run it on: the user's own file, or a needle text."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from stream_lens.cli.options import load


@dataclass(frozen=True, eq=False)
class Prompt:
    """Model, token ids [1, position], what a right answer contains (None for free text), token spans by name."""

    model: Any
    tokens: Tensor
    expected: str | None = None
    spans: dict[str, tuple[int, int]] = field(default_factory=dict)


def prompt_of(
    model: str,
    as_: str | None,
    text: Path | None,
    tokens: int,
    depth: float,
    seed: int,
    threads: int | None,
    *,
    room: int = 64,
) -> Prompt:
    """Load the model and make the prompt. `room` is how many tokens more the context should have.

    Raises ValueError where the file is missing or empty, or the text is longer than the model's context.
    """
    from stream_lens.backend.long_inputs import tokens_within_context

    content = None if text is None else _read(text)
    loaded = load(model, as_, None if content is not None else _context(model, tokens + room), threads)
    if content is not None:
        return Prompt(loaded, tokens_within_context(loaded, content))
    from stream_lens.tasks.needle import needle_case

    case = needle_case("single_1", loaded.tokenizer, tokens=tokens, depth=depth, seed=seed)
    segments = case.segments(loaded.tokenizer)
    spans = {name: segments.token_spans[segments.labels.index(name)] for name in ("needle", "question")}
    return Prompt(loaded, tokens_within_context(loaded, case.prompt, prepend_bos=True), case.answers[0], spans)


def caches_of(path: Path) -> list[Any]:
    """The cache of a file, or those of a folder in order of their names. `ValueError` where there is none."""
    from stream_lens.cache import load as load_cache

    files = sorted(path.glob("*.safetensors")) if path.is_dir() else [path]
    if not files:
        raise ValueError(f"the folder {path} has no cache files (*.safetensors): make some with trace --save-cache.")
    return [load_cache(file) for file in files]


def model_of(caches: list[Any], model: str | None, as_: str | None, threads: int | None, *, room: int) -> Any:
    """The model that made the caches, or the one named, with `room` tokens more than the longest.

    Raises ValueError where the caches do not name one model that can be loaded.
    """
    names = {cache.info.model_name for cache in caches} if model is None else {model}
    if len(names) > 1:
        raise ValueError(f"the caches are of the models {', '.join(sorted(names))}: give caches of one.")
    name = _demo_name(names.pop())
    longest = max((cache.info.tokens.shape[-1] for cache in caches if cache.info.tokens is not None), default=0)
    try:
        return load(name, as_, _context(name, longest + room), threads)
    except ValueError as error:
        raise ValueError(f"{error} The controls need it: name it with --model, or give --no-controls.") from error


def _demo_name(name: str) -> str:
    """The demo model that TransformerLens calls so, else the name itself."""
    from stream_lens.models import DEMO_MODELS

    called = {one: demo.name for demo in DEMO_MODELS.values() for one in (demo.hub_name, demo.hub_name.split("/")[-1])}
    return called.get(name, name)


def _read(path: Path) -> str:
    if not path.is_file():
        raise ValueError(f"--text {path} is not a file.")
    content = path.read_text(encoding="utf-8")
    if not content.strip():
        raise ValueError(f"--text {path} is empty.")
    return content


def _context(model: str, needed: int) -> int | None:
    from stream_lens.models import DEMO_MODELS

    demo = DEMO_MODELS.get(model)
    return min(demo.n_ctx, max(needed, 1024)) if demo else None
