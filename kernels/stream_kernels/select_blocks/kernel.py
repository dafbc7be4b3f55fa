"""The hierarchical search of one layer (definition: `reference.py`, formulas: `README.md`): one Triton launch.

One program at a time owns one query block of one head, from the equal branches to the finished row of block indices.
Its branches, their logits and scores lie in a small strip of scratch that stays in the cache: Triton gives no indexed
access to registers or shared memory, and tiles of a fixed size keep any number of branches from spilling.
"""

from __future__ import annotations

import triton
import triton.language as tl

from stream_kernels.block_attention.tile import LOG2_E, base2_scores, load_key_ok, visible
from stream_kernels.select_blocks.votes import MAX, best, log2_add, log2_sum, store_shares

# What stands for a branch: `representative` of StreamConfig.
MEAN: tl.constexpr = tl.constexpr(0)
FIRST: tl.constexpr = tl.constexpr(1)
CENTRE: tl.constexpr = tl.constexpr(2)
LAST: tl.constexpr = tl.constexpr(3)
STRIDED: tl.constexpr = tl.constexpr(4)
MEAN_VAR: tl.constexpr = tl.constexpr(5)


@triton.jit
def load_child(branches, child, BRANCHES: tl.constexpr):
    """[start, stop) of a child: half of its branch; a branch of one block is its own first child."""
    start = tl.load(branches + child // 2)
    stop = tl.load(branches + BRANCHES + child // 2)
    middle = tl.where(stop - start <= 1, stop, (start + stop) // 2)
    first = child % 2 == 0
    return tl.where(first, start, middle), tl.where(first, middle, stop)


@triton.jit
def keys_between(counts, start, stop):
    """Real keys of the branches [start, stop); 0 of an empty one."""
    exists = stop > start
    return tl.load(counts + stop, mask=exists, other=0) - tl.load(counts + start, mask=exists, other=0)


@triton.jit
def key_scores2(
    q_rows,  # [rows] pointers
    row_ok,
    position,
    k_base,
    key,  # [lanes]
    key_ok,
    key_mask_ptr,
    batch,
    stride_kt,
    key_len,
    window,
    scale,
    softcap,
    d_head,
    KEY_CHUNK: tl.constexpr,
    ROWS: tl.constexpr,
    LANES: tl.constexpr,
    HAS_KEY_MASK: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    HAS_WINDOW: tl.constexpr,
):
    """[rows, lanes] exact base-2 scores; -inf where a row does not see the key."""
    column = tl.arange(0, KEY_CHUNK)
    key_ok = key_ok & (key < key_len)
    k_columns = k_base + key.to(tl.int64) * stride_kt
    products = tl.zeros([ROWS, LANES], tl.float32)
    for d in range(0, d_head, KEY_CHUNK):
        in_head = d + column < d_head
        q = tl.load(q_rows[:, None] + (d + column)[None, :], mask=row_ok[:, None] & in_head[None, :], other=0.0)
        k = tl.load(k_columns[None, :] + (d + column)[:, None], mask=key_ok[None, :] & in_head[:, None], other=0.0)
        products = tl.dot(q, k, products, input_precision="ieee")
    key_ok = load_key_ok(key_mask_ptr, batch, key, key_ok, key_len, HAS_KEY_MASK)
    scores2 = base2_scores(products, scale, softcap, HAS_SOFTCAP)
    seen = visible(position[:, None], key[None, :], key_ok[None, :], window, HAS_WINDOW)
    return tl.where(seen, scores2, float("-inf"))


@triton.jit
def mean_logits2(
    q_rows,
    row_ok,
    position,
    sums,  # float64 prefix sums of this key head's real keys, [k_blocks + 1, d_head]
    squares,  # the same of their squares
    start,  # [lanes]
    stop,
    keys_in_branch,
    window,
    scale,
    softcap,
    d_head,
    MEAN_CHUNK: tl.constexpr,
    K_BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
    LANES: tl.constexpr,
    REDUCE: tl.constexpr,
    VARIANCE: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    HAS_WINDOW: tl.constexpr,
):
    """[rows, lanes] score (or log-mass) of every child's mean key, with `VARIANCE` plus half its scores' variance."""
    column = tl.arange(0, MEAN_CHUNK)
    from_sums = start.to(tl.int64) * d_head
    to_sums = stop.to(tl.int64) * d_head
    count = tl.maximum(keys_in_branch, 1).to(tl.float32)
    share = 1.0 / count.to(tl.float64)
    products = tl.zeros([ROWS, LANES], tl.float32)
    variance = tl.zeros([ROWS, LANES], tl.float32)
    for d in range(0, d_head, MEAN_CHUNK):
        in_head = d + column < d_head
        here = in_head[:, None] & (stop > start)[None, :]
        above = to_sums[None, :] + (d + column)[:, None]
        below = from_sums[None, :] + (d + column)[:, None]
        total = tl.load(sums + above, mask=here, other=0.0) - tl.load(sums + below, mask=here, other=0.0)
        q = tl.load(q_rows[:, None] + (d + column)[None, :], mask=row_ok[:, None] & in_head[None, :], other=0.0)
        q = q.to(tl.float32)
        products = tl.dot(q, total.to(tl.float32), products, input_precision="ieee")
        if VARIANCE:
            # In float64: keys may lie far from zero.
            mean = total * share[None, :]
            square = tl.load(squares + above, mask=here, other=0.0) - tl.load(squares + below, mask=here, other=0.0)
            spread = tl.maximum(square * share[None, :] - mean * mean, 0.0)
            variance = tl.dot(q * q, spread.to(tl.float32), variance, input_precision="ieee")
    logits2 = base2_scores(
        tl.div_rn(products, tl.broadcast_to(count[None, :], [ROWS, LANES])), scale, softcap, HAS_SOFTCAP
    )
    if VARIANCE:
        logits2 += variance * (0.5 * LOG2_E * scale * scale)
    if REDUCE != MAX:
        logits2 += tl.log2(count)[None, :]
    seen = (keys_in_branch > 0)[None, :]
    if HAS_WINDOW:
        seen = seen & ((stop * K_BLOCK - 1)[None, :] > position[:, None] - window)
    return tl.where(seen, logits2, float("-inf"))


VARYING = ["jobs", "q_blocks", "k_blocks", "slots", "rounds", "query_len", "key_len", "offset", "window", "d_head"]


@triton.jit(do_not_specialize=VARYING)
def _select_blocks_kernel(
    q_ptr,
    k_ptr,
    sums_ptr,  # float64 [batch, kv_head, k_blocks + 1, d_head]: sums of real keys before each block
    squares_ptr,  # the same of their squares
    counts_ptr,  # int32 [batch, k_blocks + 1]: real keys before each block
    key_mask_ptr,  # [batch, key_len]
    ranges_ptr,  # int32 [batch, q_blocks, 4]: first, sink_stop, local_start, stop
    free_ptr,  # int32 [batch, head, q_blocks]
    out_ptr,  # written: int32 [batch, head, q_blocks, slots]
    branches_ptr,  # scratch: int32 [programs, 2, BRANCHES], starts and stops
    logits_ptr,  # scratch: float32 [programs, 2 * BRANCHES, ROWS]
    scores_ptr,  # scratch: float32 [programs, 2 * BRANCHES]
    stride_qb,
    stride_qh,
    stride_qt,
    stride_kb,
    stride_kh,
    stride_kt,
    jobs,
    heads,
    groups,
    q_blocks,
    k_blocks,
    slots,
    rounds,
    query_len,
    key_len,
    offset,
    window,
    scale,
    softcap,
    d_head,  # not a constant: unrolled loops over it spill
    KEY_CHUNK: tl.constexpr,
    MEAN_CHUNK: tl.constexpr,
    Q_BLOCK: tl.constexpr,
    K_BLOCK: tl.constexpr,
    K_PAD: tl.constexpr,
    QUERY_STRIDE: tl.constexpr,
    OVERSAMPLE: tl.constexpr,
    ROWS: tl.constexpr,
    BRANCHES: tl.constexpr,
    SLOTS_PAD: tl.constexpr,
    LANES: tl.constexpr,
    REPRESENTATIVE: tl.constexpr,
    REDUCE: tl.constexpr,
    RANK: tl.constexpr,
    HAS_KEY_MASK: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    HAS_WINDOW: tl.constexpr,
):
    CHILDREN: tl.constexpr = 2 * BRANCHES
    POOLED: tl.constexpr = (REPRESENTATIVE == MEAN) | (REPRESENTATIVE == MEAN_VAR)
    PER_TILE: tl.constexpr = LANES // K_PAD
    rows = tl.arange(0, ROWS)
    branch = tl.arange(0, BRANCHES)
    child = tl.arange(0, CHILDREN)
    lane_block = tl.arange(0, LANES) // K_PAD
    lane_key = tl.arange(0, LANES) % K_PAD
    tile_block = tl.arange(0, PER_TILE)
    program, programs = tl.program_id(0), tl.num_programs(0)
    branches = branches_ptr + program.to(tl.int64) * (2 * BRANCHES)
    strip = logits_ptr + program.to(tl.int64) * (CHILDREN * ROWS)
    scores = scores_ptr + program.to(tl.int64) * CHILDREN

    for turn in range((jobs - program + programs - 1) // programs):
        job = program + turn * programs
        q_index, batch_head = job % q_blocks, job // q_blocks
        batch, head = (batch_head // heads).to(tl.int64), (batch_head % heads).to(tl.int64)
        kv_head = head // groups
        row = rows * QUERY_STRIDE
        row_ok = (row < Q_BLOCK) & (q_index * Q_BLOCK + row < query_len)
        row = q_index * Q_BLOCK + row
        position = offset + row
        q_rows = q_ptr + batch * stride_qb + head * stride_qh + row.to(tl.int64) * stride_qt
        k_base = k_ptr + batch * stride_kb + kv_head * stride_kh
        counts = counts_ptr + batch * (k_blocks + 1)
        table = (batch * (heads // groups) + kv_head) * (k_blocks + 1) * d_head
        votes = load_key_ok(key_mask_ptr, batch, position, row_ok, key_len, HAS_KEY_MASK)

        ranges = ranges_ptr + (batch * q_blocks + q_index) * 4
        first, lower = tl.load(ranges), tl.load(ranges + 1)
        local_start, stop = tl.load(ranges + 2), tl.load(ranges + 3)
        free = tl.load(free_ptr + job)
        length = local_start - lower
        fits = length <= free
        wanted = tl.where(fits, length, tl.minimum(length, OVERSAMPLE * free))
        sinks, locals = lower - first, stop - local_start

        forced2 = tl.full([ROWS], float("-inf"), tl.float32)
        if REDUCE != MAX or (OVERSAMPLE > 1 and RANK != MAX):
            for tile in range(0, sinks + locals, PER_TILE):
                index = tile + lane_block
                block = tl.where(index < sinks, first + index, local_start + index - sinks)
                scores2 = key_scores2(
                    q_rows, row_ok, position, k_base, block * K_BLOCK + lane_key,
                    (index < sinks + locals) & (lane_key < K_BLOCK), key_mask_ptr, batch, stride_kt, key_len, window,
                    scale, softcap, d_head, KEY_CHUNK, ROWS, LANES, HAS_KEY_MASK, HAS_SOFTCAP, HAS_WINDOW,
                )  # fmt: skip
                forced2 = log2_add(forced2, log2_sum(scores2, 1))

        used = branch < wanted
        safe = tl.maximum(wanted, 1)
        tl.store(branches + branch, tl.where(used, lower + length * branch // safe, 0))
        tl.store(branches + BRANCHES + branch, tl.where(used, lower + length * (branch + 1) // safe, 0))
        tl.debug_barrier()
        alive = wanted

        for _ in range(rounds):
            total2 = tl.full([ROWS], float("-inf"), tl.float32)
            for tile in range(0, 2 * alive, LANES if POOLED else PER_TILE):
                if POOLED:
                    index = tile + tl.arange(0, LANES)
                    start, end = load_child(branches, index, BRANCHES)
                    logits2 = mean_logits2(
                        q_rows, row_ok, position, sums_ptr + table, squares_ptr + table, start, end,
                        keys_between(counts, start, end), window, scale, softcap, d_head,
                        MEAN_CHUNK, K_BLOCK, ROWS, LANES, REDUCE, REPRESENTATIVE == MEAN_VAR, HAS_SOFTCAP, HAS_WINDOW,
                    )  # fmt: skip
                else:
                    index = tile + tile_block
                    start, end = load_child(branches, tile + lane_block, BRANCHES)
                    block, spread = start, 1
                    if REPRESENTATIVE == CENTRE:
                        block = start + (end - start) // 2
                    if REPRESENTATIVE == LAST:
                        block = end - 1
                    if REPRESENTATIVE == STRIDED:
                        spread = tl.maximum(end - start, 1)
                    scores2 = key_scores2(
                        q_rows, row_ok, position, k_base, block * K_BLOCK + lane_key * spread,
                        (end > start) & (lane_key < K_BLOCK), key_mask_ptr, batch, stride_kt, key_len, window,
                        scale, softcap, d_head, KEY_CHUNK, ROWS, LANES, HAS_KEY_MASK, HAS_SOFTCAP, HAS_WINDOW,
                    )  # fmt: skip
                    by_block = tl.reshape(scores2, [ROWS, PER_TILE, K_PAD])
                    if REDUCE == MAX:
                        logits2 = tl.max(by_block, 2)
                    else:
                        start, end = load_child(branches, index, BRANCHES)
                        keys = keys_between(counts, start, end).to(tl.float32)
                        seen = tl.sum((by_block > float("-inf")).to(tl.float32), 2)
                        # -inf, as log2_sum gives it, where the representative shows no key: 1 stands for any number.
                        per_key = tl.where(seen > 0.0, keys[None, :] / tl.maximum(seen, 1.0), 1.0)
                        logits2 = log2_sum(by_block, 2) + tl.log2(per_key)
                if REDUCE == MAX:
                    tl.store(scores + index, tl.max(tl.where(votes[:, None], logits2, float("-inf")), 0))
                else:
                    total2 = log2_add(total2, log2_sum(logits2, 1))
                    tl.store(strip + index[None, :] * ROWS + rows[:, None], logits2)
            tl.debug_barrier()
            if REDUCE != MAX:
                store_shares(strip, scores, 2 * alive, rows, votes, log2_add(total2, forced2), REDUCE, ROWS, LANES)
                tl.debug_barrier()
            score = tl.load(scores + child, mask=child < 2 * alive, other=float("-inf"))
            child_start, child_stop = load_child(branches, child, BRANCHES)
            survives = best(tl.where(child_stop > child_start, score, float("-inf")), wanted)
            place = tl.cumsum(survives.to(tl.int32), 0) - 1
            alive = tl.sum(survives.to(tl.int32), 0)
            tl.debug_barrier()  # every thread has read the old branches
            tl.store(branches + place, child_start, mask=survives)
            tl.store(branches + BRANCHES + place, child_stop, mask=survives)
            tl.store(branches + branch, 0, mask=branch >= alive)
            tl.store(branches + BRANCHES + branch, 0, mask=branch >= alive)
            tl.debug_barrier()

        block = tl.load(branches + branch)
        picked = tl.load(branches + BRANCHES + branch) > block
        if OVERSAMPLE > 1:
            total2 = tl.full([ROWS], float("-inf"), tl.float32)
            for tile in range(0, alive, PER_TILE):
                index = tile + tile_block
                start = tl.load(branches + tile + lane_block)
                end = tl.load(branches + BRANCHES + tile + lane_block)
                scores2 = key_scores2(
                    q_rows, row_ok, position, k_base, start * K_BLOCK + lane_key,
                    (end > start) & (lane_key < K_BLOCK), key_mask_ptr, batch, stride_kt, key_len, window,
                    scale, softcap, d_head, KEY_CHUNK, ROWS, LANES, HAS_KEY_MASK, HAS_SOFTCAP, HAS_WINDOW,
                )  # fmt: skip
                by_block = tl.reshape(scores2, [ROWS, PER_TILE, K_PAD])
                if RANK == MAX:
                    logits2 = tl.max(by_block, 2)
                    tl.store(scores + index, tl.max(tl.where(votes[:, None], logits2, float("-inf")), 0))
                else:
                    logits2 = log2_sum(by_block, 2)
                    total2 = log2_add(total2, log2_sum(logits2, 1))
                    tl.store(strip + index[None, :] * ROWS + rows[:, None], logits2)
            tl.debug_barrier()
            if RANK != MAX:
                store_shares(strip, scores, alive, rows, votes, log2_add(total2, forced2), RANK, ROWS, LANES)
                tl.debug_barrier()
            score = tl.load(scores + branch, mask=picked, other=float("-inf"))
            picked = picked & (best(score, free) | fits)

        out = out_ptr + job.to(tl.int64) * slots
        place = sinks + tl.cumsum(picked.to(tl.int32), 0) - 1
        tl.store(out + place, block, mask=picked & (place < slots))
        slot = tl.arange(0, SLOTS_PAD)
        after = slot - sinks - tl.sum(picked.to(tl.int32), 0)
        tail = tl.where(after < locals, local_start + after, -1)
        forced = tl.where(slot < sinks, first + slot, tail)
        tl.store(out + slot, forced, mask=(slot < slots) & ((slot < sinks) | (after >= 0)))
        tl.debug_barrier()  # the next job writes the strip that this one has read
