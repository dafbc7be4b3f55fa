"""One reasoning trace: a problem, the reasoning inside ``<think>``, an answer; and its sentences in tokens."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from stream_lens.circuits.segmentation import spans
from stream_lens.circuits.segments import Segments
from stream_lens.circuits.sentence_splitter import sentence_spans
from stream_lens.circuits.text_tokens import Span

_OPENING = re.compile(r"(?:<think>\s*)+\Z")
_LEAST_SENTENCE = 10


@dataclass(frozen=True)
class ReasoningTrace:
    """A problem and how a model, or a person, reasoned about it.

    Attributes:
        problem: the problem as stated.
        reasoning: what stands between ``<think>`` and ``</think>``, outer spaces not counted.
        answer: the final answer; "" when the trace has none.
        sentences: the reasoning's sentences in order, or None when nobody split it. Spaces and line breaks may differ
            from the reasoning's; text between them or after the last one belongs to none.
        categories: one category a sentence (`circuits.categories.CATEGORIES`, or any other name), None where unknown.
        source: where the trace comes from, in words.
        full_cot: the whole text as the model wrote it, prompt and tags included; None to put it together from the
            problem, the reasoning and the answer.

    Raises:
        ValueError: no problem or no reasoning; tags inside the reasoning; a sentence that it does not hold after the
            one before; categories without sentences or not one a sentence; a full_cot around another reasoning.
    """

    problem: str
    reasoning: str
    answer: str = ""
    sentences: tuple[str, ...] | None = None
    categories: tuple[str | None, ...] | None = None
    source: str = ""
    full_cot: str | None = None

    def __post_init__(self) -> None:
        if not self.problem.strip():
            raise ValueError("problem is empty: a trace needs the problem as stated.")
        if not self.reasoning.strip():
            raise ValueError("reasoning is empty: a trace needs the text between <think> and </think>.")
        if self.reasoning != self.reasoning.strip():
            object.__setattr__(self, "reasoning", self.reasoning.strip())
        if self.full_cot is None:
            if re.search("</?think>", self.reasoning):
                raise ValueError("reasoning holds a <think> tag: give what stands between the tags, or a full_cot.")
        else:
            start, stop = think_span(self.full_cot)
            if self.full_cot[start:stop] != self.reasoning:
                raise ValueError("full_cot does not hold this reasoning between its last <think> and </think>.")
        if self.categories is not None and self.sentences is None:
            raise ValueError("categories label sentences: give the sentences too.")
        if self.sentences is not None:
            if self.categories is not None and len(self.categories) != len(self.sentences):
                raise ValueError(
                    f"{len(self.sentences)} sentences need as many categories (null where unknown), "
                    f"got {len(self.categories)}."
                )
            locate_sentences(self.reasoning, self.sentences)

    @property
    def text(self) -> str:
        """What to run the model on (teacher forcing): the problem, the reasoning in its tags, the answer.

        That is `full_cot` unchanged when there is one.
        """
        if self.full_cot is not None:
            return self.full_cot
        answer = f"\n\n{self.answer}" if self.answer else ""
        return f"{self.problem}\n\n<think>\n{self.reasoning}\n</think>{answer}"

    @property
    def reasoning_span(self) -> Span:
        """The characters [start, stop) of `text` that are the reasoning."""
        if self.full_cot is not None:
            return think_span(self.full_cot)
        start = len(f"{self.problem}\n\n<think>\n")
        return start, start + len(self.reasoning)

    @property
    def sentence_spans(self) -> tuple[Span, ...]:
        """The characters [start, stop) of `text` of each sentence; the space after a sentence belongs to it.

        Without `sentences` they are pysbd's, those below 10 characters merged into the next (Thought Anchors' rule).
        """
        begin, _ = self.reasoning_span
        if self.sentences is None:
            found = sentence_spans(self.reasoning, min_chars=_LEAST_SENTENCE)
        else:
            found = locate_sentences(self.reasoning, self.sentences)
        return tuple((begin + start, begin + stop) for start, stop in found)

    def segments(self, tokenizer: Any, *, with_problem_and_answer: bool = False, prepend_bos: bool = True) -> Segments:
        """The sentences of the reasoning as segments of `text`, "sentence 0", …, with their categories.

        Args:
            tokenizer: a fast Hugging Face tokenizer.
            with_problem_and_answer: put a segment "problem" (all text before ``<think>``) before them and a segment
                "answer" (all text after ``</think>``) behind them, where there is any; their category is None.
            prepend_bos: whether the model's position 0 is a BOS.

        Raises:
            TypeError: the tokenizer is not a fast one.
        """
        sentences = self.sentence_spans
        categories = self.categories or (None,) * len(sentences)
        rows = [
            (span, f"sentence {j}", category)
            for j, (span, category) in enumerate(zip(sentences, categories, strict=True))
        ]
        if with_problem_and_answer:
            start, stop = self.reasoning_span
            opening = _OPENING.search(self.text, 0, start)
            before = opening.start() if opening else start
            after = len(self.text) - len(after_reasoning(self.text, stop))
            if self.text[:before].strip():
                rows.insert(0, ((0, before), "problem", None))
            if self.text[after:].strip():
                rows.append(((after, len(self.text)), "answer", None))
        return spans(
            self.text,
            tokenizer,
            [span for span, _, _ in rows],
            labels=[label for _, label, _ in rows],
            categories=[category for _, _, category in rows],
            prepend_bos=prepend_bos,
        )


def think_span(full_cot: str) -> Span:
    """The characters [start, stop) between the last ``<think>`` and its ``</think>`` (or the end), spaces cut.

    The last one, because a prompt may speak of the tag, or open it before the model opens it once more.

    Raises:
        ValueError: there is no ``<think>``.
    """
    tag = full_cot.rfind("<think>")
    if tag < 0:
        raise ValueError("full_cot has no <think>: give the text with its tags, or the reasoning without any.")
    body = full_cot[tag + len("<think>") :].partition("</think>")[0]
    start = tag + len("<think>") + len(body) - len(body.lstrip())
    return start, start + len(body.strip())


def after_reasoning(text: str, stop: int) -> str:
    """What follows the ``</think>`` that closes a reasoning which ends at character `stop`."""
    return text[stop:].lstrip().removeprefix("</think>")


def locate_sentences(reasoning: str, sentences: Sequence[str]) -> list[Span]:
    """The characters [start, stop) of each sentence, one after the other; any run of spaces matches any other.

    The space after a sentence belongs to it where the next one follows.

    Raises:
        ValueError: a sentence is empty, or is not there after the one before.
    """
    exact: list[Span] = []
    for j, sentence in enumerate(sentences):
        words = sentence.split()
        if not words:
            raise ValueError(f"sentence {j} is empty.")
        position = exact[-1][1] if exact else 0
        match = re.compile(r"\s+".join(re.escape(word) for word in words)).search(reasoning, position)
        if match is None:
            where = f"after sentence {j - 1}" if j else "there"
            raise ValueError(f"sentence {j} is not in the reasoning {where}: {sentence[:80]!r}.")
        exact.append(match.span())
    nexts = [start for start, _ in exact[1:]]
    nexts.append(len(reasoning))
    return [
        (start, following if not reasoning[stop:following].strip() else stop)
        for (start, stop), following in zip(exact, nexts, strict=True)
    ]
