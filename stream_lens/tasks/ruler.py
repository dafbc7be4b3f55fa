"""RULER's needle tasks and their words (arXiv 2404.06654, github.com/NVIDIA/RULER, Apache-2.0)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

NOISE = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again."
NEEDLE = "One of the special magic {type_needle_v} for {key} is: {value}."
_TEMPLATE = (
    "Some special magic {type_needle_v} are hidden within the following text. Make sure to memorize it. "
    "I will quiz you about the {type_needle_v} afterwards.\n{context}\n",
    "What are all the special magic {type_needle_v} for {query} mentioned in the provided text?",
    " The special magic {type_needle_v} for {query} mentioned in the provided text are",
)


@dataclass(frozen=True)
class NeedleTask:
    """One row of RULER's table: what the haystack is, what keys and values are, and how many of each.

    `keys` counts the distinct keys in the text, `values` the values of each, `queries` the keys asked for.
    """

    haystack: Literal["noise", "essay", "needle"]
    key: Literal["words", "uuids"]
    value: Literal["numbers", "uuids"]
    keys: int = 1
    values: int = 1
    queries: int = 1


TASKS: dict[str, NeedleTask] = {
    "single_1": NeedleTask("noise", "words", "numbers"),
    "single_2": NeedleTask("essay", "words", "numbers"),
    "single_3": NeedleTask("essay", "words", "uuids"),
    "multikey_1": NeedleTask("essay", "words", "numbers", keys=4),
    "multikey_2": NeedleTask("needle", "words", "numbers"),
    "multikey_3": NeedleTask("needle", "uuids", "uuids"),
    "multivalue": NeedleTask("essay", "words", "numbers", values=4),
    "multiquery": NeedleTask("essay", "words", "numbers", keys=4, queries=4),
}


def wording(kind: NeedleTask, keys: Sequence[str]) -> tuple[str, str, str]:
    """RULER's text before the question (with ``{context}``), question and answer prefix."""
    query = keys[0] if len(keys) == 1 else ", ".join(keys[:-1]) + ", and " + keys[-1]
    before, question, prefix = _TEMPLATE
    values: str = kind.value
    if kind.queries * kind.values == 1:
        before, question, prefix = (
            text.replace("Some", "A").replace("are all", "is").replace("are", "is") for text in _TEMPLATE
        )
        values = values[:-1]
    filled = {"type_needle_v": values, "query": query, "context": "{context}"}
    return before.format(**filled), question.format(**filled), prefix.format(**filled)
