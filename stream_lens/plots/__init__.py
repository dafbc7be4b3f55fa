"""Pictures, in plotly. Every function gives a Figure; `write_html` makes one page of it."""

from stream_lens.plots.masks import mask_figure, mask_image
from stream_lens.plots.theme import write_html

__all__ = ["mask_figure", "mask_image", "write_html"]
