"""Block-sparse attention, forward (definition: `reference.py`, formulas: `README.md`): one Triton launch.

One program at a time owns `TILE_ROWS` query rows of one query block and walks the block's kept slots with an
online softmax. It notes log2 of each slot's row sums in its own strip of scratch and turns them into block
mass when the rows' logsumexp is known.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from jaxtyping import Float, Int
from torch import Tensor

from stream_kernels.block_attention.arguments import prepare, sum_parts, used_slots
from stream_kernels.block_attention.configs import compile_constants
from stream_kernels.block_attention.tile import (
    LOG2_E,
    base2_scores,
    load_columns,
    load_key_ok,
    load_rows,
    store_rows,
    visible,
)
from stream_kernels.launch import launch
from stream_kernels.rule import ScoreRule

SCRATCH_BYTES = 256 << 20  # all programs together; longer jobs make each program walk several tiles
MIN_PROGRAMS = 512  # enough to fill any GPU even when one program's scratch is large


@triton.jit(do_not_specialize=["tiles", "q_blocks", "slots", "query_len", "key_len", "offset", "window"])
def _block_attention_fwd_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    indices_ptr,  # [batch, head, q_blocks, slots]
    used_slots_ptr,  # [batch, head, q_blocks]: one more than the last slot in use
    gate_ptr,  # like indices
    key_mask_ptr,  # [batch, key_len]
    sinks_ptr,  # [head]
    out_ptr,  # [batch, head, query_len, D]
    logsumexp_ptr,  # [batch, head, query_len]
    mass_ptr,  # [tiles, slots * KEY_PARTS]
    scratch_ptr,  # [programs, slots * KEY_PARTS, TILE_ROWS]
    stride_qb,
    stride_qh,
    stride_qt,
    stride_kb,
    stride_kh,
    stride_kt,
    stride_vb,
    stride_vh,
    stride_vt,
    tiles,
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
    HAS_SINKS: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    HAS_WINDOW: tl.constexpr,
):
    ROW_PARTS: tl.constexpr = (Q_BLOCK + TILE_ROWS - 1) // TILE_ROWS
    KEY_PARTS: tl.constexpr = (K_BLOCK + TILE_KEYS - 1) // TILE_KEYS
    MASS_STEPS: tl.constexpr = 16
    steps = slots * KEY_PARTS
    rows = tl.arange(0, TILE_ROWS)
    keys = tl.arange(0, TILE_KEYS)
    program, programs = tl.program_id(0), tl.num_programs(0)
    scratch = scratch_ptr + program.to(tl.int64) * steps * TILE_ROWS

    for turn in range((tiles - program + programs - 1) // programs):
        tile = program + turn * programs
        block_row = tile // ROW_PARTS
        q_index, batch_head = block_row % q_blocks, block_row // q_blocks
        batch, head = batch_head // heads, batch_head % heads
        kv_head = head // groups
        row_in_block = (tile % ROW_PARTS) * TILE_ROWS + rows
        first_row = q_index * Q_BLOCK + (tile % ROW_PARTS) * TILE_ROWS
        row_ok = (row_in_block < Q_BLOCK) & (first_row + rows < query_len)
        row_position = offset + first_row + rows

        q_base = q_ptr + batch.to(tl.int64) * stride_qb + head.to(tl.int64) * stride_qh
        q = load_rows(q_base + first_row.to(tl.int64) * stride_qt, rows, row_ok, stride_qt, D, D_PAD)
        k_base = k_ptr + batch.to(tl.int64) * stride_kb + kv_head.to(tl.int64) * stride_kh
        v_base = v_ptr + batch.to(tl.int64) * stride_vb + kv_head.to(tl.int64) * stride_vh
        slot_base = block_row.to(tl.int64) * slots

        top = tl.full([TILE_ROWS], float("-inf"), tl.float32)
        total = tl.zeros([TILE_ROWS], tl.float32)
        if HAS_SINKS:
            sink = tl.load(sinks_ptr + head) * LOG2_E
            top = tl.zeros([TILE_ROWS], tl.float32) + sink
            total = tl.where(top == float("-inf"), 0.0, 1.0)
        acc = tl.zeros([TILE_ROWS, D_PAD], tl.float32)

        used_steps = tl.load(used_slots_ptr + block_row) * KEY_PARTS
        used_steps = tl.where(first_row < query_len, used_steps, 0)
        for step in range(used_steps):
            block = tl.load(indices_ptr + slot_base + step // KEY_PARTS)
            key_in_block = (step % KEY_PARTS) * TILE_KEYS + keys
            first_key = block * K_BLOCK + (step % KEY_PARTS) * TILE_KEYS
            key = first_key + keys
            key_ok = (key >= 0) & (key < key_len) & (key_in_block < K_BLOCK)  # an empty slot, -1, has key < 0
            k = load_columns(k_base + first_key.to(tl.int64) * stride_kt, keys, key_ok, stride_kt, D, D_PAD)
            v = load_rows(v_base + first_key.to(tl.int64) * stride_vt, keys, key_ok, stride_vt, D, D_PAD)
            key_ok = load_key_ok(key_mask_ptr, batch, key, key_ok, key_len, HAS_KEY_MASK)

            scores2 = base2_scores(tl.dot(q, k, input_precision="ieee"), scale, softcap, HAS_SOFTCAP)
            seen = visible(row_position[:, None], key[None, :], key_ok[None, :], window, HAS_WINDOW)
            scores2 = tl.where(seen, scores2, float("-inf"))
            new_top = tl.maximum(top, tl.max(scores2, 1))
            # A row that has seen nothing keeps top = -inf; -inf - -inf would be NaN.
            shift = tl.where(new_top == float("-inf"), 0.0, new_top)
            p = tl.exp2(scores2 - shift[:, None])
            row_sum = tl.sum(p, 1)
            seen_mass = shift + tl.log2(tl.where(row_sum > 0.0, row_sum, 1.0))
            tl.store(scratch + step * TILE_ROWS + rows, tl.where(row_sum > 0.0, seen_mass, float("-inf")))

            rescale = tl.exp2(top - shift)
            total = total * rescale + row_sum
            if HAS_GATE:
                p *= tl.load(gate_ptr + slot_base + step // KEY_PARTS)
            acc = tl.dot(p.to(v.dtype), v, acc * rescale[:, None], input_precision="ieee")
            top = new_top

        empty = total == 0.0
        total = tl.where(empty, 1.0, total)
        logsumexp2 = tl.where(empty, 0.0, top) + tl.log2(total)
        row_base = batch_head.to(tl.int64) * query_len + first_row
        store_rows(out_ptr + row_base * D, acc / total[:, None], rows, row_ok, D, D, D_PAD)
        logsumexp = tl.where(empty, float("-inf"), logsumexp2 / LOG2_E)
        tl.store(logsumexp_ptr + row_base + rows, logsumexp, mask=row_ok)

        tl.debug_barrier()  # the strip is read by other threads than wrote it
        mass_base = mass_ptr + tile.to(tl.int64) * steps
        for first_step in range(0, steps, MASS_STEPS):
            mass_step = first_step + tl.arange(0, MASS_STEPS)
            noted = (mass_step < used_steps)[:, None] & row_ok[None, :]
            strip = tl.load(scratch + mass_step[:, None] * TILE_ROWS + rows[None, :], mask=noted, other=float("-inf"))
            mass = tl.sum(tl.exp2(strip - logsumexp2[None, :]), 1)
            tl.store(mass_base + mass_step, mass, mask=mass_step < steps)
        tl.debug_barrier()  # and is written again for the next tile


def block_attention_forward(
    q: Float[Tensor, "batch head query d_head"],
    k: Float[Tensor, "batch kv_head key d_head"],
    v: Float[Tensor, "batch kv_head key d_head"],
    indices: Int[Tensor, "batch head q_blocks k"],
    rule: ScoreRule,
    *,
    q_block: int,
    k_block: int,
    gate: Float[Tensor, "batch head q_blocks k"] | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Attention over the kept blocks; meaning and undefined values as in `block_attention_reference`.

    Returns ``out`` [batch, head, query, d_head] in q's dtype, ``logsumexp`` [batch, head, query] float32
    (natural, sink included, -inf for a row that sees nothing) and ``block_mass`` [batch, head, q_blocks, k]
    float32. Raises ValueError (shapes), TypeError (dtypes) or RuntimeError (Triton cannot run here).
    """
    call = prepare(q, k, v, indices, rule, q_block=q_block, k_block=k_block, gate=gate)
    batch, heads, query_len, d_head = call.q.shape
    constants = compile_constants(
        "forward",
        call.architecture,
        call.q.dtype,
        d_head=d_head,
        q_block=q_block,
        k_block=k_block,
        query_len=query_len,
    )
    row_parts = -(-q_block // constants["TILE_ROWS"])
    steps = call.slots * -(-k_block // constants["TILE_KEYS"])
    tiles = batch * heads * call.q_blocks * row_parts
    strip_bytes = 4 * steps * constants["TILE_ROWS"]
    programs = min(tiles, max(MIN_PROGRAMS, SCRATCH_BYTES // max(strip_bytes, 1)))

    out = torch.empty(call.q.shape, dtype=call.q.dtype, device=q.device)
    logsumexp = torch.empty((batch, heads, query_len), dtype=torch.float32, device=q.device)
    mass = torch.empty((batch, heads, call.q_blocks, row_parts, steps), dtype=torch.float32, device=q.device)
    if tiles > 0:
        arguments = call.kernel_arguments() | constants
        arguments |= {
            "indices_ptr": call.indices,
            "used_slots_ptr": used_slots(call.indices),
            "sinks_ptr": call.sinks,
            "HAS_SINKS": call.sinks is not None,
            "out_ptr": out,
            "logsumexp_ptr": logsumexp,
            "mass_ptr": mass,
            "scratch_ptr": torch.empty(programs * strip_bytes // 4, dtype=torch.float32, device=q.device),
            "tiles": tiles,
        }
        launch(_block_attention_fwd_kernel, (programs,), q.device, arguments)
    return out.to(call.dtype), logsumexp, sum_parts(mass, call.slots)
