"""Makers of `Segments`: sentences, paragraphs, windows, matches of a pattern, given spans, chat messages."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from functools import partial
from itertools import pairwise
from typing import Any

from stream_lens.circuits.segments import Segments, make_segments
from stream_lens.circuits.sentence_splitter import sentence_spans
from stream_lens.circuits.text_tokens import Span, TextTokens, text_tokens

_BLANK_LINE = re.compile(r"\n[^\S\n]*\n\s*")
_THINK = re.compile(r"<think>(.*?)(?:</think>|\Z)", re.DOTALL)


def sentences(
    text: str,
    tokenizer: Any,
    *,
    min_chars: int = 0,
    think_only: bool = False,
    language: str = "en",
    prepend_bos: bool = True,
) -> Segments:
    """The sentences of `text` (pysbd's rules), labelled "sentence 0", "sentence 1", …

    They tile the text: joined they give it back, and the space between two belongs to the earlier.

    Args:
        text: the text the model is run on, without the BOS.
        tokenizer: a fast Hugging Face tokenizer.
        min_chars: a shorter sentence is merged into the next one (Thought Anchors uses 10); 0 keeps all.
        think_only: split only what stands inside ``<think>…</think>`` (each pair; an unclosed one runs to the end).
            The tags and the rest of the text then belong to no segment.
        language: pysbd's language code.
        prepend_bos: whether the model's position 0 is a BOS (TransformerLens's default).

    Raises:
        ValueError: `think_only` and the text has no ``<think>``.
        TypeError: the tokenizer is not a fast one.
    """
    regions = [match.span(1) for match in _THINK.finditer(text)] if think_only else [(0, len(text))]
    if not regions:
        raise ValueError("think_only=True, but the text has no <think>: put the tag back or give think_only=False.")
    found = [
        (begin + start, begin + stop)
        for begin, end in regions
        for start, stop in sentence_spans(text[begin:end], min_chars=min_chars, language=language)
    ]
    return _numbered("sentence", text_tokens(text, tokenizer, prepend_bos=prepend_bos), found)


def paragraphs(text: str, tokenizer: Any, *, prepend_bos: bool = True) -> Segments:
    """The paragraphs of `text`, parted by blank lines, labelled "paragraph 0", …

    They tile the text; blank lines belong to the paragraph before them (those that open the text, to the first).
    """
    cuts = [match.end() for match in _BLANK_LINE.finditer(text) if text[: match.start()].strip()]
    found = list(pairwise(sorted({0, *cuts, len(text)})))
    return _numbered("paragraph", text_tokens(text, tokenizer, prepend_bos=prepend_bos), found)


def windows(text: str, tokenizer: Any, *, tokens: int, prepend_bos: bool = True) -> Segments:
    """Fixed windows of `tokens` token positions, labelled "window 0", …; with ``tokens=k_block`` they are the blocks.

    Windows are counted from position 0, so the first has one token less when that is the BOS. They tile the text; a
    character whose tokens stand in two windows belongs to the earlier.

    Raises:
        ValueError: `tokens` is below 1.
    """
    if tokens < 1:
        raise ValueError(f"A window needs at least 1 token, got tokens={tokens}.")
    whole = text_tokens(text, tokenizer, prepend_bos=prepend_bos)
    edges = sorted({whole.n_bos, *range(tokens, whole.n_tokens, tokens), whole.n_tokens})
    token_spans = list(pairwise(edges))
    # Not the token's start but the stop of the one before it: tokens that share a character start at the same place.
    char_edges = [0, *(int(whole.stops[start - 1]) for start, _ in token_spans[1:]), len(text)]
    return Segments(
        text=text,
        labels=tuple(f"window {j}" for j in range(len(token_spans))),
        categories=(None,) * len(token_spans),
        char_spans=tuple(pairwise(char_edges)) if token_spans else (),
        token_spans=tuple(token_spans),
        n_tokens=whole.n_tokens,
        n_bos=whole.n_bos,
    )


def by_regex(
    text: str, tokenizer: Any, pattern: str | re.Pattern[str], *, label: str = "match", prepend_bos: bool = True
) -> Segments:
    """The matches of `pattern`, left to right, labelled by the named group that matched last, else "match 0", …

    Raises:
        ValueError: the pattern matches nowhere, or matches the empty text.
    """
    matches = list(re.finditer(pattern, text))
    if not matches:
        raise ValueError(f"The pattern {pattern!r} matches nowhere in the text.")
    if any(match.start() == match.end() for match in matches):
        raise ValueError(f"The pattern {pattern!r} matches the empty text: make it match at least one character.")
    labels = [match.lastgroup or f"{label} {j}" for j, match in enumerate(matches)]
    return spans(text, tokenizer, [match.span() for match in matches], labels=labels, prepend_bos=prepend_bos)


def spans(
    text: str,
    tokenizer: Any,
    char_spans: Sequence[Span],
    *,
    labels: Sequence[str] | None = None,
    categories: Sequence[str | None] | None = None,
    prepend_bos: bool = True,
) -> Segments:
    """Segments at the given character spans [start, stop), ascending and disjoint; gaps belong to no segment.

    Raises:
        ValueError: spans out of range, out of order or overlapping; not one label or category a span.
    """
    labels = [f"span {j}" for j in range(len(char_spans))] if labels is None else labels
    return make_segments(text_tokens(text, tokenizer, prepend_bos=prepend_bos), char_spans, labels, categories)


def chat(
    messages: Sequence[Mapping[str, str]],
    tokenizer: Any,
    *,
    add_generation_prompt: bool = True,
    prepend_bos: bool = False,
) -> Segments:
    """The messages of a chat, found inside the text that the tokenizer's chat template makes of them.

    Labels are the roles; ``segments.text`` is the templated text to run the model on. Its tokens are those of that
    text, so give the model ``to_tokens(segments.text, prepend_bos=False)`` (most templates write the BOS).

    Raises:
        ValueError: the tokenizer has no chat template, or the template changed a message (some drop the reasoning of
            earlier turns), so that it cannot be found.
    """
    if not getattr(tokenizer, "chat_template", None):
        raise ValueError("The tokenizer has no chat template: write the prompt as plain text and use spans().")
    marked = [{**message, "content": f"\uf8ff{number}\uf8ff"} for number, message in enumerate(messages)]
    render = partial(tokenizer.apply_chat_template, tokenize=False, add_generation_prompt=add_generation_prompt)
    text, frame = render(list(messages)), re.split("\uf8ff\\d+\uf8ff", render(marked))
    found: list[Span] = []
    position = 0
    for number, message in enumerate(messages):
        # The template's own words around the message say where it is, however short it is; some templates strip it.
        before, after = (frame[number], frame[number + 1]) if len(frame) == len(messages) + 1 else ("\uf8ff", "")
        start = position + len(before)
        fits = [
            content
            for content in (message["content"], message["content"].strip())
            if text.startswith(before + content + after, position)
        ]
        if not fits:
            raise ValueError(
                f"Message {number} ({message['role']}) is not in the templated text: the chat template rewrote it. "
                "Give the templated text and its spans to spans() instead."
            )
        position = start + len(fits[0])
        found.append((start, position))
    labels = [message["role"] for message in messages]
    return spans(text, tokenizer, found, labels=labels, prepend_bos=prepend_bos)


def _numbered(name: str, tokens: TextTokens, char_spans: Sequence[Span]) -> Segments:
    return make_segments(tokens, char_spans, [f"{name} {j}" for j in range(len(char_spans))])
