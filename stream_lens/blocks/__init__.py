"""From q and k to a BlockMask, and attention over it. Torch only: nothing here knows TransformerLens."""

from stream_kernels.rule import ScoreRule
from stream_lens.blocks.attention import SparseAttention, block_sparse_attention
from stream_lens.blocks.block_mask import BlockMask
from stream_lens.blocks.config import StreamConfig
from stream_lens.blocks.flex import from_flex, to_flex
from stream_lens.blocks.hierarchical import SearchRound
from stream_lens.blocks.schedule import FractionOfPrefix, MassThreshold
from stream_lens.blocks.search import Search
from stream_lens.blocks.selection import SELECTORS, register_selector, select_blocks

__all__ = [
    "SELECTORS",
    "BlockMask",
    "FractionOfPrefix",
    "MassThreshold",
    "ScoreRule",
    "Search",
    "SearchRound",
    "SparseAttention",
    "StreamConfig",
    "block_sparse_attention",
    "from_flex",
    "register_selector",
    "select_blocks",
    "to_flex",
]
