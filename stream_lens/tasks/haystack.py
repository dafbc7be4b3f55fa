"""What needles are hidden in: RULER's repeated noise, an essay from a file, or other needles."""

from __future__ import annotations

import random
import uuid
from bisect import bisect_right
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, lru_cache
from itertools import accumulate, pairwise
from os import PathLike
from pathlib import Path

from stream_lens.circuits.sentence_splitter import sentence_spans
from stream_lens.tasks.ruler import NEEDLE, NOISE

_CHUNK_WORDS = 500


@dataclass(frozen=True)
class Haystack:
    """Text of any size, in units that a needle may stand between.

    Attributes:
        separator: what stands between units, and between a unit and a needle.
        units: a size to the list of units. One more of size never makes fewer characters.
    """

    separator: str
    units: Callable[[int], list[str]]


def noise_haystack() -> Haystack:
    """RULER's five sentences, a line each time; the size counts words, so the last line may be cut short."""
    return Haystack("\n", lambda size: _cut_words([NOISE], size))


def essay_haystack(path: str | PathLike[str]) -> Haystack:
    """The text file's words in sentences, begun anew when it ends; the size counts words.

    Raises:
        ValueError: the file holds no words.
    """
    words = Path(path).read_text(encoding="utf-8").split()
    if not words:
        raise ValueError(f"The essay file {path} holds no words.")
    return Haystack(" ", lambda size: _cut_words(_first_sentences(words, size), size))


def needle_haystack(key_kind: str, value_kind: str, seed: int, taken: set[str]) -> Haystack:
    """Other needles, a line each; the size counts needles. Keys and values are none of `taken` and never repeat."""
    rng = random.Random(f"{seed} haystack")
    made: list[str] = []

    def units(size: int) -> list[str]:
        while len(made) < size:
            key, value = draw(key_kind, rng, taken), draw(value_kind, rng, taken)
            made.append(NEEDLE.format(type_needle_v=value_kind, key=key, value=value))
        return made[:size]

    return Haystack("\n", units)


def draw(kind: str, rng: random.Random, taken: set[str]) -> str:
    """A key or value as RULER makes them, "words", "numbers" or "uuids", that is not in `taken`; added to it."""
    while True:
        if kind == "words":
            adjectives, nouns = _words()
            drawn = f"{rng.choice(adjectives)}-{rng.choice(nouns)}"
        elif kind == "numbers":
            drawn = str(rng.randint(10**6, 10**7 - 1))
        else:
            drawn = str(uuid.UUID(int=rng.getrandbits(128), version=4))
        if drawn not in taken:
            taken.add(drawn)
            return drawn


def _first_sentences(words: list[str], size: int) -> list[str]:
    """Sentences that hold at least `size` words, all of them when there are fewer: a book is not split to its end."""
    sentences: list[str] = []
    taken, n_words, open_sentence = 0, 0, ""
    while taken < len(words) and n_words < size:
        split = _sentences(" ".join([open_sentence, *words[taken : taken + _CHUNK_WORDS]]).strip())
        taken += _CHUNK_WORDS
        # The last sentence may go on in the next chunk, unless it is all there is: text without any full stop.
        closed = split if taken >= len(words) or len(split) == 1 else split[:-1]
        open_sentence = "" if closed is split else split[-1]
        sentences += closed
        n_words += sum(len(sentence.split()) for sentence in closed)
    return sentences


@lru_cache(maxsize=1024)
def _sentences(text: str) -> tuple[str, ...]:
    # The splitter may see a boundary inside a word ("v1.2.Next"); a word stays whole.
    starts = [start for start, _ in sentence_spans(text) if start == 0 or text[start - 1] == " "]
    return tuple(text[start:stop].strip() for start, stop in pairwise([*starts, len(text)]))


def _cut_words(sentences: list[str], size: int) -> list[str]:
    """The first `size` words of the sentences, repeated as often as it takes; the last sentence may be cut."""
    if size == 0:
        return []
    ends = list(accumulate(len(sentence.split()) for sentence in sentences))
    rounds, rest = divmod(size, ends[-1])
    whole = bisect_right(ends, rest)
    units = sentences * rounds + sentences[:whole]
    missing = rest - (ends[whole - 1] if whole else 0)
    return [*units, " ".join(sentences[whole].split()[:missing])] if missing else units


@cache
def _words() -> tuple[list[str], list[str]]:
    import wonderwords

    source = wonderwords.RandomWord()
    return sorted(source.filter(include_categories=["adjective"])), sorted(source.filter(include_categories=["noun"]))
