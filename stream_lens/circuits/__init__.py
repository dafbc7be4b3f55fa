"""Circuits: what can be read from caches, masks and texts. Every tool gives a small frozen dataclass.

The public names are `stream_lens`' own (`stream_lens.routes`, …). They are not repeated here, where each has the name
of the module that it lives in.
"""
