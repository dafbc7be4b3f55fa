"""The TransformerLens side: a model's attention made sparse, its patterns, its cache."""

from stream_lens.backend.install import Streamed, install, is_streamed, stream, uninstall
from stream_lens.backend.lazy_tensor import DenseNeededError
from stream_lens.backend.long_inputs import MemoryEstimate, memory_estimate, run_with_masks
from stream_lens.backend.pattern import SparsePattern
from stream_lens.backend.pattern_data import NoScoresError
from stream_lens.backend.pattern_index import PatternIndexError
from stream_lens.backend.plain import StreamedTransformers, stream_transformers
from stream_lens.backend.refusal import UnsupportedArchitectureError
from stream_lens.backend.sparse_cache import Compression, RunInfo, SparseActivationCache

__all__ = [
    "Compression",
    "DenseNeededError",
    "MemoryEstimate",
    "NoScoresError",
    "PatternIndexError",
    "RunInfo",
    "SparseActivationCache",
    "SparsePattern",
    "Streamed",
    "StreamedTransformers",
    "UnsupportedArchitectureError",
    "install",
    "is_streamed",
    "memory_estimate",
    "run_with_masks",
    "stream",
    "stream_transformers",
    "uninstall",
]
