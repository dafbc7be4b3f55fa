"""RULER's needle in a haystack, with the needle's depth as an axis and the prompt fitted to a token count.

Wording, task table and metric are RULER's (`stream_lens.tasks.ruler`). What differs:
the depth is chosen instead of drawn; keys, like values, never repeat within a prompt; the haystack is cut to the word,
so that the length is met to about a token; no tokens are set aside for the answer; essays are the caller's own text.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache
from itertools import accumulate
from numbers import Integral
from os import PathLike
from typing import Any

import numpy as np

from stream_lens.circuits.segmentation import spans
from stream_lens.circuits.segments import Segments
from stream_lens.circuits.text_tokens import Span, text_tokens
from stream_lens.tasks.haystack import Haystack, draw, essay_haystack, needle_haystack, noise_haystack
from stream_lens.tasks.ruler import NEEDLE, TASKS, NeedleTask, wording

# A slope over fewer units of haystack says more about those few words than about the text.
_LEAST_SECANT = 16


@dataclass(frozen=True)
class NeedleCase:
    """One prompt and what it asks for. All spans are characters [start, stop) of `prompt`.

    Attributes:
        prompt: ends with the answer prefix, so a base model's continuation is the answer.
        answers: the values asked for.
        task: a name in TASKS.
        tokens: the token count asked for.
        n_tokens: the prompt's own token count, the BOS counted when `prepend_bos`; at most `tokens`.
        depth: where the first needle that answers stands: 0 before the haystack, 1 after it.
        seed: what keys, values and the places of the other needles were drawn from.
        prepend_bos: whether `n_tokens` counts a BOS.
        keys: the keys asked for.
        needle_spans: the needles that answer, whole sentences, in text order.
        value_spans: the values inside them, in the same order.
        distractor_spans: the other needles (multikey_1), in text order.
        question_span: the question.
        answer_prefix_span: the answer prefix that ends the prompt, its leading space counted.
    """

    prompt: str
    answers: tuple[str, ...]
    task: str
    tokens: int
    n_tokens: int
    depth: float
    seed: int
    prepend_bos: bool
    keys: tuple[str, ...]
    needle_spans: tuple[Span, ...]
    value_spans: tuple[Span, ...]
    distractor_spans: tuple[Span, ...]
    question_span: Span
    answer_prefix_span: Span

    @property
    def answer_prefix(self) -> str:
        """The words that end the prompt."""
        return self.prompt[slice(*self.answer_prefix_span)]

    def segments(self, tokenizer: Any) -> Segments:
        """Needles, distractors, question and answer prefix as segments, labelled so; the haystack is in none."""
        labelled = [
            *((span, "needle") for span in self.needle_spans),
            *((span, "distractor") for span in self.distractor_spans),
            (self.question_span, "question"),
            (self.answer_prefix_span, "answer prefix"),
        ]
        labelled.sort()
        return spans(
            self.prompt,
            tokenizer,
            [span for span, _ in labelled],
            labels=[label for _, label in labelled],
            prepend_bos=self.prepend_bos,
        )


@dataclass(frozen=True)
class NeedleScore:
    """`string_match_all` in percent, and whether every answer was found."""

    string_match_all: float
    found: bool


def needle_case(
    task: str,
    tokenizer: Any,
    *,
    tokens: int,
    depth: float = 0.5,
    seed: int = 0,
    essay: str | PathLike[str] | None = None,
    prepend_bos: bool = True,
) -> NeedleCase:
    """Make a prompt of at most `tokens` tokens, and as near to it as the haystack can be cut.

    The haystack is cut to the word, in the “all needles” tasks (multikey_2, multikey_3) to the needle. The same
    arguments give the same prompt; with another length or depth the same seed keeps keys and values.

    Args:
        task: a name in TASKS.
        tokenizer: a fast Hugging Face tokenizer: the model's own.
        tokens: the most tokens the prompt may have, the BOS counted when `prepend_bos`.
        depth: 0 to 1. The needle stands at the sentence boundary nearest to depth × the haystack's characters (noise
            has one boundary every five sentences, as in RULER); when several needles answer (multivalue, multiquery)
            the first stands there and the others at the boundaries after it. Distractors (multikey_1) stand anywhere.
        seed: any integer.
        essay: a text file for the tasks whose haystack is an essay: single_2, single_3, multikey_1, multivalue,
            multiquery. Repeated when short.
        prepend_bos: whether the model's position 0 is a BOS.

    Raises:
        ValueError: an unknown task; a depth outside 0 to 1; no essay for an essay task, or one where none is used;
            fewer tokens than the question and the needles alone take.
        TypeError: the tokenizer is not a fast one; `tokens` is not an integer.
    """
    if task not in TASKS:
        raise ValueError(f"Unknown needle task {task!r}: choose one of {', '.join(TASKS)}.")
    if not isinstance(tokens, Integral):
        raise TypeError(f"tokens={tokens!r} is not a number of tokens: give an integer.")
    if not 0 <= depth <= 1:
        raise ValueError(f"depth must lie in 0 (first) to 1 (last), got {depth}.")
    kind, taken = TASKS[task], set[str]()
    needles = _draw_needles(kind, random.Random(f"{seed} needles"), taken)
    haystack = _haystack(task, essay, seed, taken)

    @cache
    def build(size: int) -> NeedleCase:
        case = _build(task, haystack, size, needles, depth)
        n_tokens = text_tokens(case.prompt, tokenizer, prepend_bos=prepend_bos).n_tokens
        return replace(case, tokens=int(tokens), n_tokens=n_tokens, seed=seed, prepend_bos=prepend_bos)

    least = build(0).n_tokens
    if least > tokens:
        raise ValueError(f"Task {task} takes {least} tokens without any haystack: ask for more than tokens={tokens}.")
    return build(_largest_fitting(lambda size: build(size).n_tokens, tokens))


def score(case: NeedleCase, generated_text: str) -> NeedleScore:
    """RULER's `string_match_all`: the share of answers that the text contains, letter case ignored, in percent."""
    hits = [answer.lower() in generated_text.lower() for answer in case.answers]
    return NeedleScore(string_match_all=100 * sum(hits) / len(hits), found=all(hits))


@dataclass(frozen=True)
class _Needle:
    key: str
    value: str
    sentence: str
    answers: bool
    place: float


def _draw_needles(kind: NeedleTask, rng: random.Random, taken: set[str]) -> list[_Needle]:
    """All needles, those of the keys asked for marked; `place` is where a distractor stands, 0 to 1."""
    keys = [draw(kind.key, rng, taken) for _ in range(kind.keys)]
    asked = rng.sample(keys, kind.queries)
    needles = []
    for key in [*asked, *(key for key in keys if key not in asked)]:
        for _ in range(kind.values):
            value = draw(kind.value, rng, taken)
            sentence = NEEDLE.format(type_needle_v=kind.value, key=key, value=value)
            needles.append(_Needle(key, value, sentence, answers=key in asked, place=rng.random()))
    return needles


def _haystack(task: str, essay: str | PathLike[str] | None, seed: int, taken: set[str]) -> Haystack:
    kind = TASKS[task]
    if kind.haystack == "essay":
        if essay is None:
            raise ValueError(
                f"Task {task} hides its needles in an essay, and none is shipped: give essay= a text file "
                "(RULER's are Paul Graham's, copyrighted), or use single_1, multikey_2 or multikey_3."
            )
        return essay_haystack(essay)
    if essay is not None:
        raise ValueError(
            f"Task {task} has a built-in haystack ({kind.haystack}), so essay= has no effect: leave it out."
        )
    return noise_haystack() if kind.haystack == "noise" else needle_haystack(kind.key, kind.value, seed, taken)


def _build(task: str, haystack: Haystack, size: int, needles: list[_Needle], depth: float) -> NeedleCase:
    """The case for a haystack of this size; what does not depend on it is left for the caller to fill in."""
    keys = tuple(dict.fromkeys(needle.key for needle in needles if needle.answers))
    before, question, prefix = wording(TASKS[task], keys)
    head, tail = before.split("{context}")
    units = haystack.units(size)
    placed = zip(_boundaries(units, haystack.separator, needles, depth), needles, strict=True)
    context, spans_of = _lay_out(units, haystack.separator, sorted(placed, key=lambda pair: pair[0]), len(head))
    prompt = head + context + tail + question + prefix
    asked = [(needle, span) for needle, span in spans_of if needle.answers]
    return NeedleCase(
        prompt=prompt,
        answers=tuple(needle.value for needle in needles if needle.answers),
        task=task,
        tokens=0,
        n_tokens=0,
        depth=depth,
        seed=0,
        prepend_bos=True,
        keys=keys,
        needle_spans=tuple(span for _, span in asked),
        value_spans=tuple((stop - 1 - len(needle.value), stop - 1) for needle, (_, stop) in asked),
        distractor_spans=tuple(span for needle, span in spans_of if not needle.answers),
        question_span=(len(prompt) - len(prefix) - len(question), len(prompt) - len(prefix)),
        answer_prefix_span=(len(prompt) - len(prefix), len(prompt)),
    )


def _lay_out(
    units: list[str], separator: str, placed: list[tuple[int, _Needle]], start: int
) -> tuple[str, list[tuple[_Needle, Span]]]:
    """The context with the needles in it, and each needle's characters when the context begins at `start`."""
    pieces: list[str] = []
    numbers: list[int] = []
    last = 0
    for boundary, needle in placed:
        pieces += units[last:boundary]
        numbers.append(len(pieces))
        pieces.append(needle.sentence)
        last = boundary
    pieces += units[last:]
    begins = list(accumulate((len(piece) + len(separator) for piece in pieces), initial=start))
    found = [
        (needle, (begins[number], begins[number] + len(pieces[number])))
        for number, (_, needle) in zip(numbers, placed, strict=True)
    ]
    return separator.join(pieces), found


def _boundaries(units: list[str], separator: str, needles: list[_Needle], depth: float) -> list[int]:
    """For each needle before which unit it stands; len(units) is after the last."""
    lengths = np.array([len(unit) + len(separator) for unit in units], dtype=np.int64)
    places = np.concatenate([[0], np.cumsum(lengths)])

    def nearest(place: float) -> int:
        return int(np.argmin(np.abs(places - place * places[-1])))

    n_answers = sum(needle.answers for needle in needles)
    first = max(0, min(nearest(depth), len(units) - (n_answers - 1)))
    answering = iter(range(first, first + n_answers))
    return [min(next(answering), len(units)) if needle.answers else nearest(needle.place) for needle in needles]


def _largest_fitting(count: Callable[[int], int], tokens: int) -> int:
    """A size that fits while the next one does not, by secant steps: every count tokenizes a whole prompt.

    `count(0)` must fit. Every fourth step halves the bracket instead, so that uneven text cannot make it slow.
    """
    low, size = 0, 64
    high: int | None = None
    last_size, last_count, rate = 0, count(0), 0.0
    steps = 0
    while high is None or high - low > 1:
        n_tokens, steps = count(size), steps + 1
        if n_tokens <= tokens:
            low = size
        else:
            high = size
        if abs(size - last_size) >= _LEAST_SECANT:
            rate = max((n_tokens - last_count) / (size - last_size), 0.01)
        last_size, last_count = size, n_tokens
        if high is None:
            size = max(low + 1, size + math.floor((tokens - n_tokens) / rate))
        elif steps % 4 == 0:
            size = (low + high) // 2
        else:
            size = min(max(low + 1, size + math.floor((tokens - n_tokens) / rate)), high - 1)
    return low
