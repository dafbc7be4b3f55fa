"""Block-sparse attention: definition in `reference.py`, formulas in `README.md`, Triton kernels for GPUs.

Importing this package imports no Triton. The kernels are

- ``stream_kernels.block_attention.forward.block_attention_forward(q, k, v, indices, rule, *, q_block, k_block, gate)``
  -> ``out, logsumexp, block_mass``;
- ``stream_kernels.block_attention.backward.block_attention_backward(q, k, v, indices, rule, logsumexp, out, grad_out,
  *, q_block, k_block, gate)`` -> ``dq, dk, dv, dgate`` (``dgate`` is None without a gate).

Ask `stream_kernels.launch.why_not_triton` first whether they can run. On CPU tensors they run in Triton's interpreter,
for tests only: a caller that chooses paths by itself must ask for a GPU tensor as well.
"""
