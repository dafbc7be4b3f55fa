"""The picture of a mask against the mask: which cells are kept, and a row's share of attention in each."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from stream_lens.blocks import (
    FractionOfPrefix,
    MassThreshold,
    ScoreRule,
    StreamConfig,
    block_sparse_attention,
    select_blocks,
)
from stream_lens.plots import mask_image
from stream_lens.plots.masks import config_text


@pytest.mark.parametrize("length", [64, 75])
@pytest.mark.parametrize("largest", [512, 4])
def test_shares_of_a_row(length: int, largest: int) -> None:
    q, k = torch.randn(2, 1, 2, length, 16, generator=torch.Generator().manual_seed(0))
    mask = select_blocks(q, k, StreamConfig(q_block=8, k_block=8, k=4), ScoreRule(0.25))
    mass = block_sparse_attention(q, k, k, mask, ScoreRule(0.25)).block_mass
    image, row_tokens, column_tokens = mask_image(mask, mass, head=1, largest=largest)
    # Every query's probabilities sum to 1, the short last block's too.
    assert np.nansum(image, axis=1) == pytest.approx(np.ones(len(image)), abs=1e-5)
    kept = mask.to_dense()[0, 1].numpy()
    for row in range(len(image)):
        for column in range(image.shape[1]):
            tokens = kept[
                row * row_tokens : (row + 1) * row_tokens, column * column_tokens : (column + 1) * column_tokens
            ]
            assert tokens.any() == (not np.isnan(image[row, column]))


@pytest.mark.parametrize(
    ("k", "said"),
    [
        (16, "k = 16, blocks of 32 × 32"),
        (FractionOfPrefix(0.2), "k = 0.2 of the prefix, 4 or more, blocks of 32 × 32"),
        (MassThreshold(0.9, 64), "k = 0.9 of the mass, 64 or fewer, blocks of 32 × 32"),
    ],
)
def test_titles_say_what_was_kept_in_words(k: int | FractionOfPrefix | MassThreshold, said: str) -> None:
    assert config_text(StreamConfig(k=k, q_block=32, k_block=32)) == said
