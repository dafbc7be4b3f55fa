"""Pictures, in plotly. Every function gives a Figure; `write_html` makes one page of it."""

from stream_lens.plots.ablation_check import ablation_check
from stream_lens.plots.budgets import ablation, attribution, minimal_k
from stream_lens.plots.head_grid import head_grid
from stream_lens.plots.heads import kurtosis, thought_anchors, vertical_scores
from stream_lens.plots.mask_diff import mask_diff
from stream_lens.plots.masks import mask_figure, mask_image
from stream_lens.plots.needle import needle_heatmap
from stream_lens.plots.panels import four_panels
from stream_lens.plots.pruning import pruning
from stream_lens.plots.retrieval import retrieval
from stream_lens.plots.rounds import search_rounds
from stream_lens.plots.routes import routes
from stream_lens.plots.scaling import scaling_curve
from stream_lens.plots.suppression import suppression
from stream_lens.plots.theme import write_html

__all__ = [
    "ablation",
    "ablation_check",
    "attribution",
    "four_panels",
    "head_grid",
    "kurtosis",
    "mask_diff",
    "mask_figure",
    "mask_image",
    "minimal_k",
    "needle_heatmap",
    "pruning",
    "retrieval",
    "routes",
    "scaling_curve",
    "search_rounds",
    "suppression",
    "thought_anchors",
    "vertical_scores",
    "write_html",
]
