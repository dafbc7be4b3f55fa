"""Where sentences begin: pysbd's rules, kept lossless and linear in the text's length."""

from __future__ import annotations

from functools import cache
from itertools import pairwise
from typing import Any

from stream_lens.circuits.text_tokens import Span

# pysbd takes quadratic time in what it is given, so it sees one window at a time.
_WINDOW = 4096
_LONGEST_SENTENCE = 32768


def sentence_spans(text: str, *, min_chars: int = 0, language: str = "en") -> list[Span]:
    """Character spans [start, stop) of the sentences of `text`, tiling it: nothing is left out, spaces included.

    A boundary stands where a sentence begins, so the space between two sentences belongs to the earlier one.
    pysbd drops text with some rare symbols: such text joins the sentence before it.

    Args:
        text: any text; an empty one has no sentences.
        min_chars: a sentence of fewer characters (outer spaces not counted) is merged into the next one, the last
            into the one before: 10 in Thought Anchors (arXiv 2506.19143, its splitter), 0 keeps all.
        language: pysbd's language code.
    """
    starts = _sentence_starts(text, language)
    return _merge_short(text, list(pairwise([*starts, len(text)])), min_chars)


def _sentence_starts(text: str, language: str) -> list[int]:
    starts: list[int] = []
    position, size = 0, _WINDOW
    while position < len(text):
        window = text[position : position + size]
        found = [position + start for start in _starts_in(window, language)]
        if position + size >= len(text):
            return starts + found
        if len(found) > 1:
            # The last sentence may go on beyond the window: it opens the next one.
            starts, position, size = starts + found[:-1], found[-1], _WINDOW
        elif size < _LONGEST_SENTENCE:
            size *= 2
        else:
            starts, position, size = [*starts, position], position + size, _WINDOW
    return starts


def _starts_in(window: str, language: str) -> list[int]:
    """Ascending starts of the window's sentences, the first of them 0."""
    starts, position = [0], 0
    for sentence in _segmenter(language).segment(window):
        start = window.find(sentence.strip(), position)
        if not sentence.strip() or start < 0:
            continue
        position = start + len(sentence.strip())
        if window[:start].strip():
            starts.append(start)
    return starts


def _merge_short(text: str, spans: list[Span], min_chars: int) -> list[Span]:
    merged: list[Span] = []
    open_start: int | None = None
    for start, stop in spans:
        begin = start if open_start is None else open_start
        if len(text[begin:stop].strip()) < min_chars:
            open_start = begin
            continue
        merged.append((begin, stop))
        open_start = None
    if open_start is not None:
        begin = merged.pop()[0] if merged else open_start
        merged.append((begin, len(text)))
    return merged


@cache
def _segmenter(language: str) -> Any:
    import pysbd

    return pysbd.Segmenter(language=language, clean=False)
