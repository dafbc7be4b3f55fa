"""Kernels of stream_lens and their float64 references. Imports neither stream_lens nor transformers."""
