"""Characters ↔ tokens of one text, both ways, from a fast tokenizer's offsets.

A model's token positions are those of `TransformerLens.to_tokens`: one BOS first (when asked for), no EOS last.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Int
from torch import Tensor

Span = tuple[int, int]


@dataclass(frozen=True, eq=False)
class TextTokens:
    """A text, its tokens, and which characters each token holds.

    Token i holds the characters ``text[starts[i]:stops[i]]``. Starts and stops never decrease, and together the
    tokens hold every character: characters that the tokenizer left out (trimmed spaces) belong to the next
    token, at the end of the text to the last one. A character that takes several tokens (a rare letter in
    byte-level BPE) is held by all of them. The BOS holds no character.

    Attributes:
        text: the text, without the prepended BOS.
        token_ids: [token], with the prepended BOS.
        starts, stops: [token], characters.
        n_bos: how many first tokens come from no character: 0 or 1.
    """

    text: str
    token_ids: Int[np.ndarray, " token"]
    starts: Int[np.ndarray, " token"]
    stops: Int[np.ndarray, " token"]
    n_bos: int

    @property
    def n_tokens(self) -> int:
        """T: the number of tokens, the BOS counted."""
        return len(self.token_ids)

    def char_span(self, start: int, stop: int) -> Span:
        """The characters [start, stop) that the tokens [start, stop) hold."""
        _check_span("token", start, stop, self.n_tokens)
        if start == stop:
            char = int(self.starts[start]) if start < self.n_tokens else len(self.text)
            return char, char
        return int(self.starts[start]), int(self.stops[stop - 1])

    def token_span(self, start: int, stop: int) -> Span:
        """The shortest run [start, stop) of tokens that holds every one of the characters [start, stop)."""
        _check_span("character", start, stop, len(self.text))
        first = int(np.searchsorted(self.stops, start, side="right"))
        if start == stop:
            return first, first
        return first, int(np.searchsorted(self.starts, stop, side="left"))

    def check(self, tokens: Sequence[int] | Tensor | np.ndarray) -> None:
        """Raise ValueError unless `tokens` [token] or [1, token] are exactly these tokens.

        Call it with what the model was run on: ``to_tokens`` may have cut the text at ``n_ctx`` or added a BOS.
        """
        given = np.asarray(tokens.detach().cpu() if isinstance(tokens, Tensor) else tokens)
        if given.ndim == 2 and len(given) == 1:
            given = given[0]
        if given.ndim != 1:
            raise ValueError(f"Tokens of shape {given.shape} are not one text: give [token] or [1, token].")
        shared = min(len(given), self.n_tokens)
        differing = np.flatnonzero(given[:shared] != self.token_ids[:shared])
        if len(differing) or len(given) != self.n_tokens:
            place = int(differing[0]) if len(differing) else shared
            raise ValueError(
                f"The text makes {self.n_tokens} tokens, {len(given)} were given, and they differ from position "
                f"{place} on: tokenize with the same prepend_bos ({bool(self.n_bos)} here) and without truncation."
            )


def text_tokens(text: str, tokenizer: Any, *, prepend_bos: bool = True) -> TextTokens:
    """Tokenize `text` as TransformerLens's ``to_tokens`` does, and keep each token's characters.

    Args:
        text: plain text. A chat prompt that already begins with the BOS string wants ``prepend_bos=False``.
        tokenizer: a fast Hugging Face tokenizer (``tokenizer.is_fast``); only these report offsets.
        prepend_bos: whether position 0 is the BOS. Exactly one is put there, whether the tokenizer adds one itself
            or not. An EOS that the tokenizer appends is dropped.

    Raises:
        TypeError: the tokenizer is not a fast one.
        ValueError: a BOS is asked for and the tokenizer has none, or has one that is not a single token.
    """
    if not getattr(tokenizer, "is_fast", False):
        raise TypeError(
            f"{type(tokenizer).__name__} reports no character offsets: give a fast Hugging Face tokenizer "
            "(AutoTokenizer.from_pretrained(name, use_fast=True))."
        )
    added_bos = _encode(tokenizer, "a").sequence_ids[0] is None
    prefix = ""
    if prepend_bos and not added_bos:
        prefix = _atomic_bos(tokenizer)
    encoding = _encode(tokenizer, prefix + text)
    from_text = np.array([sequence is not None for sequence in encoding.sequence_ids], dtype=bool)
    n_prefix = 1 if prefix else 0
    ids = np.array(encoding.ids, dtype=np.int64)[from_text][n_prefix:]
    offsets = np.array(encoding.offsets, dtype=np.int64).reshape(-1, 2)[from_text][n_prefix:] - len(prefix)
    starts, stops = _fill_gaps(offsets, len(text))
    if prepend_bos:
        bos_id = tokenizer.convert_tokens_to_ids(prefix) if prefix else encoding.ids[0]
        ids = np.concatenate([[bos_id], ids])
        starts, stops = np.concatenate([[0], starts]), np.concatenate([[0], stops])
    return TextTokens(text, ids, starts, stops, n_bos=int(prepend_bos))


def _encode(tokenizer: Any, text: str) -> Any:
    return tokenizer(text, return_offsets_mapping=True, truncation=False, padding=False, verbose=False).encodings[0]


def _atomic_bos(tokenizer: Any) -> str:
    bos = tokenizer.bos_token
    if bos is None:
        raise ValueError("The tokenizer has no BOS token: give prepend_bos=False.")
    if len(tokenizer(bos, add_special_tokens=False)["input_ids"]) != 1:
        raise ValueError(f"The tokenizer's BOS {bos!r} is not one token of its own: give prepend_bos=False.")
    return bos


def _fill_gaps(offsets: Int[np.ndarray, "token 2"], n_chars: int) -> tuple[np.ndarray, np.ndarray]:
    """Starts and stops that never decrease and leave no character out."""
    if not len(offsets):
        return offsets[:, 0], offsets[:, 1]
    stops = np.maximum.accumulate(offsets[:, 1])
    stops[-1] = n_chars
    before = np.concatenate([[0], stops[:-1]])
    starts = np.maximum.accumulate(np.minimum(offsets[:, 0], before))
    return starts, stops


def _check_span(unit: str, start: int, stop: int, length: int) -> None:
    if not 0 <= start <= stop <= length:
        raise ValueError(f"{unit} span [{start}, {stop}) must lie in [0, {length}) and not run backwards.")
