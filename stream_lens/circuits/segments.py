"""Segments of a text (sentences, a needle, a question …) and where they lie in characters, tokens and blocks."""

from __future__ import annotations

import json
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from itertools import pairwise

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float, Int
from torch import Tensor

from stream_lens.circuits.text_tokens import Span, TextTokens

_SPACES = np.array([code for code in range(0x3001) if chr(code).isspace()], dtype=np.uint32)


@dataclass(frozen=True)
class Segments:
    """Ascending, disjoint stretches of one text. Every index below counts segments, tokens or blocks from 0.

    The makers (`stream_lens.circuits.segmentation`) build it. Token positions are the model's: the prepended BOS is
    position 0 and belongs to no segment. A segment may hold no token, when all its characters lie in tokens that
    its neighbours have more of.

    Attributes:
        text: the whole text, without the prepended BOS.
        labels: one name a segment.
        categories: one of `categories.CATEGORIES`, any other name, or None when not known; one a segment.
        char_spans: [start, stop) in characters of `text`, one a segment.
        token_spans: [start, stop) in token positions, one a segment.
        n_tokens: T, all of the text's tokens and the BOS.
        n_bos: 1 when position 0 is a BOS, else 0.
    """

    text: str
    labels: tuple[str, ...]
    categories: tuple[str | None, ...]
    char_spans: tuple[Span, ...]
    token_spans: tuple[Span, ...]
    n_tokens: int
    n_bos: int

    def __post_init__(self) -> None:
        counts = [len(field) for field in (self.labels, self.categories, self.char_spans, self.token_spans)]
        if len(set(counts)) > 1:
            raise ValueError(
                f"Segments need as many labels as categories, character spans and token spans; got {counts}."
            )
        check_ascending("character", self.char_spans, len(self.text))
        check_ascending("token", self.token_spans, self.n_tokens)

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def texts(self) -> tuple[str, ...]:
        """The text of every segment. Joined, those of sentences, paragraphs and windows are the whole text."""
        return tuple(self.text[start:stop] for start, stop in self.char_spans)

    def text_of(self, j: int) -> str:
        """The text of segment j."""
        start, stop = self.char_spans[j]
        return self.text[start:stop]

    def token_span(self, j: int) -> Span:
        """The token positions [start, stop) of segment j."""
        return self.token_spans[j]

    def of_token(self, i: int) -> int | None:
        """The segment that token position i belongs to, or None (the BOS, text between segments)."""
        if not 0 <= i < self.n_tokens:
            raise IndexError(f"Token {i} is out of range: the text has {self.n_tokens} tokens.")
        # Of the segments that begin here all but the last are empty.
        j = bisect_right(self.token_spans, i, key=lambda span: span[0]) - 1
        return j if j >= 0 and i < self.token_spans[j][1] else None

    def of_block(self, b: int, block_size: int) -> tuple[int, ...]:
        """The segments with at least one token in block b, ascending."""
        if not 0 <= b < self.n_blocks(block_size):
            raise IndexError(f"Block {b} is out of range: {self.n_tokens} tokens make {self.n_blocks(block_size)}.")
        begin, end = b * block_size, (b + 1) * block_size
        first = bisect_right(self.token_spans, begin, key=lambda span: span[1])
        last = bisect_right(self.token_spans, end - 1, key=lambda span: span[0])
        return tuple(j for j in range(first, last) if self.token_spans[j][0] < self.token_spans[j][1])

    def n_blocks(self, block_size: int) -> int:
        """⌈T / block_size⌉; the last block may be short."""
        if block_size < 1:
            raise ValueError(f"block_size must be at least 1 token, got {block_size}.")
        return -(-self.n_tokens // block_size)

    def block_overlap(self, block_size: int) -> Float[Tensor, "segment block"]:
        """How many tokens of each segment lie in each block: sparse COO, float32, coalesced.

        It has at most segments + blocks entries; ``.to_dense()`` is for short texts. Divide a row by its sum for the
        share of a segment in each block, a column by the block size for the share of a block in each segment.
        """
        shape = (len(self), self.n_blocks(block_size))
        spans = np.array(self.token_spans, dtype=np.int64).reshape(-1, 2)
        cuts = np.unique(np.concatenate([spans.ravel(), np.arange(0, self.n_tokens, block_size), [self.n_tokens]]))
        starts, lengths = cuts[:-1], np.diff(cuts)
        filled = np.flatnonzero(spans[:, 0] < spans[:, 1])
        owner = np.searchsorted(spans[filled, 0], starts, side="right") - 1
        inside = owner >= 0
        inside[inside] = starts[inside] < spans[filled[owner[inside]], 1]
        indices = np.stack([filled[owner[inside]], starts[inside] // block_size])
        values = torch.tensor(lengths[inside], dtype=torch.float32)
        return torch.sparse_coo_tensor(torch.tensor(indices), values, shape, is_coalesced=True, check_invariants=True)

    def with_categories(self, categories: Sequence[str | None]) -> Segments:
        """The same segments with these categories, one a segment (`categories.label_by_keywords(segments.texts)`)."""
        return replace(self, categories=tuple(categories))

    def to_frame(self) -> pd.DataFrame:
        """One row a segment: label, category, char_start, char_stop, token_start, token_stop, tokens, text."""
        chars = np.array(self.char_spans, dtype=np.int64).reshape(-1, 2)
        tokens = np.array(self.token_spans, dtype=np.int64).reshape(-1, 2)
        columns = {
            "label": self.labels,
            "category": self.categories,
            "char_start": chars[:, 0],
            "char_stop": chars[:, 1],
            "token_start": tokens[:, 0],
            "token_stop": tokens[:, 1],
            "tokens": tokens[:, 1] - tokens[:, 0],
            "text": self.texts,
        }
        return pd.DataFrame(columns).rename_axis("segment")

    def to_json(self) -> str:
        """All of it as a JSON object; `from_json` gives it back equal."""
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, document: str) -> Segments:
        """Read what `to_json` wrote. Raises ValueError when it is something else."""
        try:
            fields = json.loads(document)
            return cls(
                text=fields["text"],
                labels=tuple(fields["labels"]),
                categories=tuple(fields["categories"]),
                char_spans=tuple((int(start), int(stop)) for start, stop in fields["char_spans"]),
                token_spans=tuple((int(start), int(stop)) for start, stop in fields["token_spans"]),
                n_tokens=int(fields["n_tokens"]),
                n_bos=int(fields["n_bos"]),
            )
        except (TypeError, KeyError, json.JSONDecodeError) as error:
            raise ValueError(f"Not a Segments document as Segments.to_json writes it: {error!r}.") from error


def make_segments(
    tokens: TextTokens,
    char_spans: Sequence[Span],
    labels: Sequence[str],
    categories: Sequence[str | None] | None = None,
) -> Segments:
    """Segments of an already tokenized text; `tokens_of_spans` says which tokens each span gets."""
    categories = [None] * len(char_spans) if categories is None else categories
    check_ascending("character", char_spans, len(tokens.text))
    return Segments(
        text=tokens.text,
        labels=tuple(labels),
        categories=tuple(categories),
        char_spans=tuple((int(start), int(stop)) for start, stop in char_spans),
        token_spans=tuple(tokens_of_spans(tokens, char_spans)),
        n_tokens=tokens.n_tokens,
        n_bos=tokens.n_bos,
    )


def tokens_of_spans(tokens: TextTokens, char_spans: Sequence[Span]) -> list[Span]:
    """The token run [start, stop) of each of these ascending, disjoint character spans.

    A token that straddles a boundary goes to the side that holds more of its characters, spaces not counted (they
    count when it has nothing else); in a tie to the earlier side. Text outside of all spans is a side too. Not
    counting spaces keeps the token “ I” with the sentence it opens.
    """
    edges, owners = _regions(char_spans, len(tokens.text))
    starts, stops = tokens.starts[tokens.n_bos :], tokens.stops[tokens.n_bos :]
    last_region = len(owners) - 1
    first = np.clip(np.searchsorted(edges, starts, side="right") - 1, 0, last_region)
    last = np.clip(np.searchsorted(edges, np.maximum(stops - 1, starts), side="right") - 1, 0, last_region)
    region = first.copy()
    letters = _letters_before(tokens.text)
    for token in np.flatnonzero(first != last):
        sides = range(first[token], last[token] + 1)
        inside = [(max(edges[r], starts[token]), min(edges[r + 1], stops[token])) for r in sides]
        counts = [letters[stop] - letters[start] for start, stop in inside]
        if not any(counts):
            counts = [stop - start for start, stop in inside]
        region[token] = sides[int(np.argmax(counts))]
    return _runs(owners[region], len(char_spans), tokens.n_bos)


def check_ascending(unit: str, spans: Sequence[Span], length: int) -> None:
    """Raise ValueError unless the spans are in range, in order and do not overlap."""
    for start, stop in spans:
        if not 0 <= start <= stop <= length:
            raise ValueError(f"{unit} span [{start}, {stop}) must lie in [0, {length}) and not run backwards.")
    for (start, stop), following in pairwise(spans):
        if following[0] < stop:
            raise ValueError(
                f"{unit} spans must ascend without overlap: [{following[0]}, {following[1]}) comes after "
                f"[{start}, {stop}). Sort them, or make one Segments for each layer of them."
            )


def _regions(char_spans: Sequence[Span], n_chars: int) -> tuple[Int[np.ndarray, " edge"], Int[np.ndarray, " region"]]:
    """The text as regions without gaps: region r is [edges[r], edges[r + 1]) of segment owners[r], -1 for none."""
    edges, owners = [0], []
    for j, (start, stop) in enumerate(char_spans):
        if start == stop:
            continue
        if start > edges[-1]:
            edges.append(start)
            owners.append(-1)
        edges.append(stop)
        owners.append(j)
    if n_chars > edges[-1] or not owners:
        edges.append(n_chars)
        owners.append(-1)
    return np.array(edges, dtype=np.int64), np.array(owners, dtype=np.int64)


def _letters_before(text: str) -> Int[np.ndarray, " char_plus_one"]:
    """How many of the characters before each place are not spaces."""
    codes = np.frombuffer(text.encode("utf-32-le", "surrogatepass"), dtype="<u4")
    return np.concatenate([[0], np.cumsum(~np.isin(codes, _SPACES))])


def _runs(owner: Int[np.ndarray, " token"], n_segments: int, n_bos: int) -> list[Span]:
    """[start, stop) of each segment's tokens; an empty segment stands where the one before it ends."""
    found, firsts, counts = np.unique(owner, return_index=True, return_counts=True)
    runs = {int(j): (int(f) + n_bos, int(f + c) + n_bos) for j, f, c in zip(found, firsts, counts, strict=True)}
    spans: list[Span] = []
    for j in range(n_segments):
        here = spans[-1][1] if spans else n_bos
        spans.append(runs.get(j, (here, here)))
    return spans
