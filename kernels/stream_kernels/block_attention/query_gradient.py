"""First half of the backward (formulas: `README.md`): dq, dgate and delta, one Triton launch.

One program owns `TILE_ROWS` query rows and walks their block's kept slots as the forward does.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from stream_kernels.block_attention.arguments import Call, strides, sum_parts, used_slots
from stream_kernels.block_attention.configs import compile_constants
from stream_kernels.block_attention.tile import (
    LOG2_E,
    base2_scores,
    load_columns,
    load_key_ok,
    load_rows,
    softcap_slope,
    store_rows,
    visible,
)
from stream_kernels.launch import launch


@triton.jit(do_not_specialize=["q_blocks", "slots", "query_len", "key_len", "offset", "window"])
def _query_gradient_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    indices_ptr,  # [batch, head, q_blocks, slots]
    used_slots_ptr,  # [batch, head, q_blocks]: one more than the last slot in use
    gate_ptr,  # like indices
    key_mask_ptr,  # [batch, key_len]
    out_ptr,  # [batch, head, query_len, D]
    grad_out_ptr,
    logsumexp_ptr,  # [batch, head, query_len]
    delta_ptr,  # written: [batch, head, query_len], sum over d of grad_out · out
    dq_ptr,  # written: [batch, head, query_len, D]
    gate_parts_ptr,  # written: [tiles, slots * KEY_PARTS]
    stride_qb,
    stride_qh,
    stride_qt,
    stride_kb,
    stride_kh,
    stride_kt,
    stride_vb,
    stride_vh,
    stride_vt,
    stride_ob,
    stride_oh,
    stride_ot,
    stride_gb,
    stride_gh,
    stride_gt,
    heads,
    groups,
    q_blocks,
    slots,
    query_len,
    key_len,
    offset,
    window,
    scale,
    softcap,
    D: tl.constexpr,
    D_PAD: tl.constexpr,
    Q_BLOCK: tl.constexpr,
    K_BLOCK: tl.constexpr,
    TILE_ROWS: tl.constexpr,
    TILE_KEYS: tl.constexpr,
    HAS_GATE: tl.constexpr,
    HAS_KEY_MASK: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    HAS_WINDOW: tl.constexpr,
):
    ROW_PARTS: tl.constexpr = (Q_BLOCK + TILE_ROWS - 1) // TILE_ROWS
    KEY_PARTS: tl.constexpr = (K_BLOCK + TILE_KEYS - 1) // TILE_KEYS
    rows = tl.arange(0, TILE_ROWS)
    keys = tl.arange(0, TILE_KEYS)
    tile = tl.program_id(0)
    block_row = tile // ROW_PARTS
    q_index, batch_head = block_row % q_blocks, block_row // q_blocks
    head = (batch_head % heads).to(tl.int64)
    batch = (batch_head // heads).to(tl.int64)
    kv_head = head // groups
    row_in_block = (tile % ROW_PARTS) * TILE_ROWS + rows
    first_row = q_index * Q_BLOCK + (tile % ROW_PARTS) * TILE_ROWS
    row_ok = (row_in_block < Q_BLOCK) & (first_row + rows < query_len)
    row_position = offset + first_row + rows

    first = first_row.to(tl.int64)
    q_base = q_ptr + batch * stride_qb + head * stride_qh + first * stride_qt
    q = load_rows(q_base, rows, row_ok, stride_qt, D, D_PAD)
    grad_base = grad_out_ptr + batch * stride_gb + head * stride_gh + first * stride_gt
    grad_out = load_rows(grad_base, rows, row_ok, stride_gt, D, D_PAD)
    out_base = out_ptr + batch * stride_ob + head * stride_oh + first * stride_ot
    out = load_rows(out_base, rows, row_ok, stride_ot, D, D_PAD)
    row_base = batch_head.to(tl.int64) * query_len + first
    delta = tl.sum(grad_out.to(tl.float32) * out.to(tl.float32), 1)
    tl.store(delta_ptr + row_base + rows, delta, mask=row_ok)
    logsumexp2 = tl.load(logsumexp_ptr + row_base + rows, mask=row_ok, other=0.0) * LOG2_E
    # A row that sees nothing: its scores are all -inf, and -inf - -inf would be NaN.
    logsumexp2 = tl.where(logsumexp2 == float("-inf"), 0.0, logsumexp2)

    k_base = k_ptr + batch * stride_kb + kv_head * stride_kh
    v_base = v_ptr + batch * stride_vb + kv_head * stride_vh
    slot_base = block_row.to(tl.int64) * slots
    if HAS_GATE:
        part_base = gate_parts_ptr + tile.to(tl.int64) * slots * KEY_PARTS
    dq = tl.zeros([TILE_ROWS, D_PAD], tl.float32)
    used_steps = tl.load(used_slots_ptr + block_row) * KEY_PARTS
    used_steps = tl.where(first_row < query_len, used_steps, 0)
    for step in range(used_steps):
        block = tl.load(indices_ptr + slot_base + step // KEY_PARTS)
        key_in_block = (step % KEY_PARTS) * TILE_KEYS + keys
        first_key = block * K_BLOCK + (step % KEY_PARTS) * TILE_KEYS
        key = first_key + keys
        key_ok = (key >= 0) & (key < key_len) & (key_in_block < K_BLOCK)  # an empty slot, -1, has key < 0
        k = load_rows(k_base + first_key.to(tl.int64) * stride_kt, keys, key_ok, stride_kt, D, D_PAD)
        v = load_columns(v_base + first_key.to(tl.int64) * stride_vt, keys, key_ok, stride_vt, D, D_PAD)
        key_ok = load_key_ok(key_mask_ptr, batch, key, key_ok, key_len, HAS_KEY_MASK)

        scores2 = base2_scores(tl.dot(q, tl.trans(k), input_precision="ieee"), scale, softcap, HAS_SOFTCAP)
        seen = visible(row_position[:, None], key[None, :], key_ok[None, :], window, HAS_WINDOW)
        p = tl.exp2(tl.where(seen, scores2, float("-inf")) - logsumexp2[:, None])
        dp = tl.dot(grad_out, v, input_precision="ieee")
        if HAS_GATE:
            tl.store(part_base + step, tl.sum(tl.sum(p * dp, 1), 0))
            dp *= tl.load(gate_ptr + slot_base + step // KEY_PARTS)
        ds = p * (dp - delta[:, None])
        if HAS_SOFTCAP:
            ds *= softcap_slope(scores2, softcap)
        dq = tl.dot(ds.to(k.dtype), k, dq, input_precision="ieee")
    if HAS_GATE:
        for step in range(used_steps, slots * KEY_PARTS):
            tl.store(part_base + step, 0.0)
    store_rows(dq_ptr + row_base * D, dq * scale, rows, row_ok, D, D, D_PAD)


def query_gradient(
    call: Call, out: Tensor, grad_out: Tensor, logsumexp: Tensor
) -> tuple[Tensor, Tensor, Tensor | None]:
    """``dq`` like q, ``delta`` [batch, head, query] float32, ``dgate`` like indices or None without a gate."""
    batch, heads, query_len, d_head = call.q.shape
    constants = compile_constants(
        "query_gradient",
        call.architecture,
        call.q.dtype,
        d_head=d_head,
        q_block=call.q_block,
        k_block=call.k_block,
        query_len=query_len,
    )
    row_parts = -(-call.q_block // constants["TILE_ROWS"])
    steps = call.slots * -(-call.k_block // constants["TILE_KEYS"])
    dq = torch.empty(call.q.shape, dtype=call.q.dtype, device=call.q.device)
    delta = torch.empty((batch, heads, query_len), dtype=torch.float32, device=call.q.device)
    gate_parts = None
    if call.gate is not None:
        gate_parts = torch.empty((batch, heads, call.q_blocks, row_parts, steps), device=call.q.device)
    arguments = call.kernel_arguments() | constants
    arguments |= strides("o", out) | strides("g", grad_out)
    arguments |= {
        "indices_ptr": call.indices,
        "used_slots_ptr": used_slots(call.indices),
        "out_ptr": out,
        "grad_out_ptr": grad_out,
        "logsumexp_ptr": logsumexp,
        "delta_ptr": delta,
        "dq_ptr": dq,
        "gate_parts_ptr": gate_parts,
    }
    grid = (batch * heads * call.q_blocks * row_parts,)
    launch(_query_gradient_kernel, grid, call.q.device, arguments)
    return dq, delta, None if gate_parts is None else sum_parts(gate_parts, call.slots)
