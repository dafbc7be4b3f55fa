"""stream_lens: sparse attention patterns for long contexts, as a TransformerLens backend.

    import stream_lens as sl

    with sl.stream(model, q_block=32, k_block=32, k=16):
        logits, cache = model.run_with_cache(tokens)
    cache["pattern", 5]  # a SparsePattern

Names are imported when first used, so that ``import stream_lens`` is quick.
"""

from importlib import import_module
from typing import Any

_PLACES = {
    "stream_lens.blocks": (
        "BlockMask",
        "FractionOfPrefix",
        "MassThreshold",
        "ScoreRule",
        "StreamConfig",
        "block_sparse_attention",
        "from_flex",
        "register_selector",
        "select_blocks",
        "to_flex",
    ),
    "stream_lens.backend": (
        "SparseActivationCache",
        "SparsePattern",
        "Streamed",
        "UnsupportedArchitectureError",
        "install",
        "is_streamed",
        "memory_estimate",
        "run_with_masks",
        "stream",
        "stream_transformers",
        "uninstall",
    ),
    "stream_lens.cache": ("CacheFileError",),
    "stream_lens.circuits.ablation": (
        "Ablation",
        "AblationEffects",
        "ablate",
        "drop_beyond",
        "drop_heads",
        "drop_spans",
    ),
    "stream_lens.circuits.attribution": ("GateAttribution", "gate_attribution"),
    "stream_lens.circuits.calibration": ("calibrate",),
    "stream_lens.circuits.controls": (
        "diff_controls",
        "minimal_k_controls",
        "receiver_controls",
        "route_controls",
    ),
    "stream_lens.circuits.head_controls": ("HeadsAgainstRandom", "heads_against_random"),
    "stream_lens.circuits.mask_diff": ("MaskDiff", "mask_diff"),
    "stream_lens.circuits.metrics": ("Metric", "answer_log_probability", "kl_to", "logit_difference", "with_answer"),
    "stream_lens.circuits.minimal_k": ("MinimalK", "minimal_k"),
    "stream_lens.circuits.pruning": ("AblationCheck", "PrunedEdges", "check_by_ablation", "prune"),
    "stream_lens.circuits.receiver_heads": ("ReceiverHeads", "rank_correlation", "receiver_heads"),
    "stream_lens.circuits.retrieval": (
        "RetrievalCase",
        "RetrievalScores",
        "mask_retrieval_heads",
        "retrieval_case",
        "retrieval_scores",
    ),
    "stream_lens.circuits.route_results": ("RouteDiff", "Routes", "route_diff"),
    "stream_lens.circuits.routes": ("routes",),
    "stream_lens.circuits.suppression": ("SegmentSuppression", "segment_suppression"),
    "stream_lens.circuits.thought_anchors": ("ThoughtAnchors", "thought_anchors"),
    "stream_lens.circuits.vertical_scores": ("VerticalScores", "vertical_scores"),
    "stream_lens.models": ("load_demo_model", "load_model"),
}
_MODULE_OF = {name: module for module, names in _PLACES.items() for name in names}

__all__ = sorted(_MODULE_OF)


def __getattr__(name: str) -> Any:
    if name not in _MODULE_OF:
        raise AttributeError(f"module 'stream_lens' has no attribute {name!r}")
    value = getattr(import_module(_MODULE_OF[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return __all__
