"""Pictures, in plotly. Every function gives a Figure; `write_html` makes one page of it."""

from stream_lens.plots.masks import mask_figure, mask_image
from stream_lens.plots.needle import needle_heatmap
from stream_lens.plots.pruning import pruning
from stream_lens.plots.retrieval import retrieval
from stream_lens.plots.suppression import suppression
from stream_lens.plots.theme import write_html

__all__ = ["mask_figure", "mask_image", "needle_heatmap", "pruning", "retrieval", "suppression", "write_html"]
