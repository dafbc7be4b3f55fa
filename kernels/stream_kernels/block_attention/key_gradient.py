"""Second half of the backward (formulas: `README.md`): dk and dv, one Triton launch, no atomics.

One program owns `TILE_KEYS` keys of one key block and walks the slots that keep the block, in the order of
`inverted.py`, over all heads that share the keys. A block kept very often is several programs' work.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from stream_kernels.block_attention.arguments import Call, strides
from stream_kernels.block_attention.configs import compile_constants
from stream_kernels.block_attention.inverted import Inverted
from stream_kernels.block_attention.tile import (
    LOG2_E,
    base2_scores,
    load_key_ok,
    load_rows,
    softcap_slope,
    store_rows,
    visible,
)
from stream_kernels.launch import launch


@triton.jit(do_not_specialize=["k_blocks", "kv_heads", "q_blocks", "slots", "query_len", "key_len", "offset", "window"])
def _key_gradient_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    gate_ptr,  # [batch, head, q_blocks, slots]
    key_mask_ptr,  # [batch, key_len]
    grad_out_ptr,
    logsumexp_ptr,  # [batch, head, query_len]
    delta_ptr,  # [batch, head, query_len]
    entries_ptr,  # flat positions in indices, sorted by the key block they keep
    item_block_ptr,  # [items]: (batch * kv_heads + kv_head) * k_blocks + block
    item_first_ptr,  # [items]: first and one past the last entry
    item_last_ptr,
    item_part_ptr,  # [items]: -1 when the item has the whole block, else its row of the parts
    dk_ptr,  # written: [batch, kv_head, k_blocks * K_BLOCK, D]
    dv_ptr,
    dk_parts_ptr,  # written: [parts, K_BLOCK, D]
    dv_parts_ptr,
    stride_qb,
    stride_qh,
    stride_qt,
    stride_kb,
    stride_kh,
    stride_kt,
    stride_vb,
    stride_vh,
    stride_vt,
    stride_gb,
    stride_gh,
    stride_gt,
    heads,
    kv_heads,
    q_blocks,
    k_blocks,
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
    rows = tl.arange(0, TILE_ROWS)
    keys = tl.arange(0, TILE_KEYS)
    item = tl.program_id(0)
    key_in_block = tl.program_id(1) * TILE_KEYS + keys
    item_block = tl.load(item_block_ptr + item)
    batch_head = item_block // k_blocks  # of the key heads
    batch = (batch_head // kv_heads).to(tl.int64)
    kv_head = (batch_head % kv_heads).to(tl.int64)
    first_key = (item_block % k_blocks) * K_BLOCK + tl.program_id(1) * TILE_KEYS
    key = first_key + keys
    key_ok = (key_in_block < K_BLOCK) & (key < key_len)
    k_base = k_ptr + batch * stride_kb + kv_head * stride_kh + first_key.to(tl.int64) * stride_kt
    k = load_rows(k_base, keys, key_ok, stride_kt, D, D_PAD)
    v_base = v_ptr + batch * stride_vb + kv_head * stride_vh + first_key.to(tl.int64) * stride_vt
    v = load_rows(v_base, keys, key_ok, stride_vt, D, D_PAD)
    key_ok = load_key_ok(key_mask_ptr, batch, key, key_ok, key_len, HAS_KEY_MASK)

    dk = tl.zeros([TILE_KEYS, D_PAD], tl.float32)
    dv = tl.zeros([TILE_KEYS, D_PAD], tl.float32)
    first_entry = tl.load(item_first_ptr + item)
    steps = (tl.load(item_last_ptr + item) - first_entry) * ROW_PARTS
    for step in range(steps):
        entry = tl.load(entries_ptr + first_entry + step // ROW_PARTS)
        block_row = entry // slots
        q_index, batch_query_head = block_row % q_blocks, (block_row // q_blocks).to(tl.int64)
        head = batch_query_head - batch * heads
        row_in_block = (step % ROW_PARTS) * TILE_ROWS + rows
        first_row = q_index * Q_BLOCK + (step % ROW_PARTS) * TILE_ROWS
        row_ok = (row_in_block < Q_BLOCK) & (first_row + rows < query_len)
        row_position = offset + first_row + rows
        first = first_row.to(tl.int64)
        q = load_rows(
            q_ptr + batch * stride_qb + head * stride_qh + first * stride_qt, rows, row_ok, stride_qt, D, D_PAD
        )
        grad_base = grad_out_ptr + batch * stride_gb + head * stride_gh + first * stride_gt
        grad_out = load_rows(grad_base, rows, row_ok, stride_gt, D, D_PAD)
        row_base = batch_query_head * query_len + first
        delta = tl.load(delta_ptr + row_base + rows, mask=row_ok, other=0.0)
        logsumexp2 = tl.load(logsumexp_ptr + row_base + rows, mask=row_ok, other=0.0) * LOG2_E
        logsumexp2 = tl.where(logsumexp2 == float("-inf"), 0.0, logsumexp2)

        scores2 = base2_scores(tl.dot(k, tl.trans(q), input_precision="ieee"), scale, softcap, HAS_SOFTCAP)
        seen = visible(row_position[None, :], key[:, None], key_ok[:, None], window, HAS_WINDOW) & row_ok[None, :]
        p = tl.exp2(tl.where(seen, scores2, float("-inf")) - logsumexp2[None, :])
        dp = tl.dot(v, tl.trans(grad_out), input_precision="ieee")
        gated = p
        if HAS_GATE:
            gate = tl.load(gate_ptr + entry)
            gated = p * gate
            dp *= gate
        dv = tl.dot(gated.to(grad_out.dtype), grad_out, dv, input_precision="ieee")
        ds = p * (dp - delta[None, :])
        if HAS_SOFTCAP:
            ds *= softcap_slope(scores2, softcap)
        dk = tl.dot(ds.to(q.dtype), q, dk, input_precision="ieee")

    dk *= scale
    stored = key_in_block < K_BLOCK
    part = tl.load(item_part_ptr + item).to(tl.int64)
    if part < 0:
        base = (batch_head.to(tl.int64) * k_blocks * K_BLOCK + first_key) * D
        store_rows(dk_ptr + base, dk, keys, stored, D, D, D_PAD)
        store_rows(dv_ptr + base, dv, keys, stored, D, D, D_PAD)
    else:
        base = (part * K_BLOCK + tl.program_id(1) * TILE_KEYS) * D
        store_rows(dk_parts_ptr + base, dk, keys, stored, D, D, D_PAD)
        store_rows(dv_parts_ptr + base, dv, keys, stored, D, D, D_PAD)


def key_gradient(
    call: Call, inverted: Inverted, grad_out: Tensor, logsumexp: Tensor, delta: Tensor
) -> tuple[Tensor, Tensor]:
    """``dk`` and ``dv``, [batch, kv_head, key, d_head]."""
    query_len = call.q.shape[2]
    batch, kv_heads, key_len, d_head = call.k.shape
    constants = compile_constants(
        "key_gradient",
        call.architecture,
        call.q.dtype,
        d_head=d_head,
        q_block=call.q_block,
        k_block=call.k_block,
        query_len=query_len,
    )
    whole_blocks = (batch, kv_heads, call.k_blocks * call.k_block, d_head)
    dk, dv = (torch.empty(whole_blocks, dtype=call.q.dtype, device=call.q.device) for _ in range(2))
    parts = (inverted.parts, call.k_block, d_head)
    dk_parts, dv_parts = (torch.empty(parts, dtype=torch.float32, device=call.q.device) for _ in range(2))
    arguments = call.kernel_arguments() | constants | strides("g", grad_out)
    del arguments["groups"]
    arguments |= {
        "grad_out_ptr": grad_out,
        "logsumexp_ptr": logsumexp,
        "delta_ptr": delta,
        "entries_ptr": inverted.entries,
        "item_block_ptr": inverted.item_block,
        "item_first_ptr": inverted.item_first,
        "item_last_ptr": inverted.item_last,
        "item_part_ptr": inverted.item_part,
        "dk_ptr": dk,
        "dv_ptr": dv,
        "dk_parts_ptr": dk_parts,
        "dv_parts_ptr": dv_parts,
        "kv_heads": kv_heads,
        "k_blocks": call.k_blocks,
    }
    grid = (inverted.item_block.numel(), -(-call.k_block // constants["TILE_KEYS"]))
    launch(_key_gradient_kernel, grid, call.q.device, arguments)
    for gradient, its_parts in ((dk, dk_parts), (dv, dv_parts)):
        inverted.add_up(its_parts, gradient.view(-1, call.k_block, d_head))
    return dk[:, :, :key_len], dv[:, :, :key_len]
