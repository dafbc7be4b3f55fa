"""The hierarchical search for key blocks in one launch a layer: definition in `reference.py`, formulas in `README.md`.

Importing this package imports no Triton.

- ``stream_kernels.select_blocks.select.select_blocks_triton(q, k, rule, *, first, sink_stop, local_start, stop, free,
  slots, rounds, q_block, k_block, representative, reduce, rank, oversample, query_stride)`` -> the finished indices,
  ascending int32 [batch, head, q_blocks, slots], forced blocks included;
- ``stream_kernels.select_blocks.configs.unsupported(*, d_head, q_block, k_block, slots, representative, reduce, rank,
  oversample, query_stride)`` -> why the kernel cannot run such a search, or None (imports no Triton).

Ask `stream_kernels.launch.why_not_triton` as well. On CPU tensors the kernel runs in Triton's interpreter, for tests.
"""
