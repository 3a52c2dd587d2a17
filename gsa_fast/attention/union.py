"""Sparse attention by union tiles: neighbouring queries share the keys that they load.

A tile is some consecutive queries times the heads of one group, up to TILE_ROWS rows. Their selections overlap, so the
kernel visits the union of them once, with a bit mask per query that says who selected what: K and V are gathered once
per tile, and the matrix units see full tiles. Launches per chunk of queries: selections to bit masks, bit masks to
unions, attention over the unions, repair of the tiles that met a value that is not finite.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from gsa_fast import _backend
from gsa_fast._primitives import popcount
from gsa_fast.attention import union_hopper
from gsa_fast.attention.bits import (
    BLOCK_BROKEN,
    attend_nonfinite_rows,
    end_of_broken,
    rows_per_chunk,
    selected_keys,
    visible_words,
    words_of,
    write_selection_bits,
)
from gsa_fast.attention.rows import (
    LOG2_E,
    is_nonfinite,
    load_finite,
    load_keys,
    load_rows,
    online_softmax_update,
    store_rows,
)

TILE_ROWS = 64  # more rows: fewer gathers, but a larger union for each
BLOCK_WORDS = 256  # words of the bit masks that a program of `union_kernel` expands at a time
BLOCK_MEMBERS = 256  # positions of a union for which it looks up at a time who selected them


@triton.jit
def union_kernel(
    bits_ptr, start_ptr, positions_ptr, masks_ptr, sizes_ptr, union_bits_ptr, ranks_ptr,
    first_row, rows, words, tiles, capacity, S,
    QUERIES: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_W: tl.constexpr, BLOCK_U: tl.constexpr,
    BLOCK_N: tl.constexpr, RANKS: tl.constexpr,
):  # fmt: skip
    """One program per tile: the ascending union of its queries' selections, and for each query a bit mask over it.

    Bit n % 32 of masks[tile, n // 32, query] stands for the union's n-th position. The union is padded to a multiple of
    BLOCK_N with its own last position, which nobody selects there: attention then needs no masks. With RANKS the
    union is also written as a bit mask, [tile, word], as far as the tile sees, with the number of positions that lie
    before each word, its rank.
    """
    pid = tl.program_id(0).to(tl.int64)
    b = pid // tiles
    row = (pid % tiles) * QUERIES
    n_words = visible_words(start_ptr, b, first_row, row, rows, S, QUERIES, 1)
    p_bits = bits_ptr + (b * rows + row) * words
    p_positions = positions_ptr + pid * capacity
    p_masks = masks_ptr + pid * (capacity // 32) * QUERIES
    query = tl.arange(0, BLOCK_Q)
    lane = tl.arange(0, 32)  # bit of a word
    size = 0
    for first in range(0, n_words, BLOCK_W):
        w = first + tl.arange(0, BLOCK_W)
        union = tl.zeros([BLOCK_W], tl.int32)
        for i in tl.static_range(QUERIES):
            # A block of equal conditions: the interpreter has no type for a scalar one beside a block.
            is_row = row + i + tl.zeros([BLOCK_W], tl.int32) < rows
            union = union | tl.load(p_bits + i * words + w, mask=(w < n_words) & is_row, other=0)
        in_word = popcount(union)  # [BLOCK_W]
        before = size + tl.cumsum(in_word, axis=0) - in_word
        if RANKS:
            tl.store(union_bits_ptr + pid * words + w, union, mask=w < n_words)
            tl.store(ranks_ptr + pid * words + w, before, mask=w < n_words)
        rest = union.to(tl.int64) & 0xFFFFFFFF
        for rank in range(tl.max(in_word, axis=0)):  # the lowest bit left of every word: most words have few
            below = (rest - 1) & ~rest
            tl.store(p_positions + before + rank, w * 32 + popcount(below.to(tl.int32)), mask=rank < in_word)
            rest = rest & (rest - 1)
        size += tl.sum(in_word, axis=0)
    tl.debug_barrier()  # other threads read the positions that this one has written

    for first in range(0, size, BLOCK_U):
        slot = first + tl.arange(0, BLOCK_U)
        s = tl.load(p_positions + slot, mask=slot < size, other=0)  # [BLOCK_U]
        bits = tl.load(
            p_bits + query[:, None] * words + (s >> 5)[None, :],
            mask=(slot < size)[None, :] & ((query < QUERIES) & (row + query < rows))[:, None],
            other=0,
        )  # [BLOCK_Q, BLOCK_U]
        chosen = tl.reshape((bits >> (s & 31)[None, :]) & 1, [BLOCK_Q, BLOCK_U // 32, 32])
        mask = tl.sum(chosen << lane[None, None, :], axis=2)  # [BLOCK_Q, BLOCK_U / 32]
        of_32 = first // 32 + tl.arange(0, BLOCK_U // 32)
        tl.store(
            p_masks + of_32[None, :] * QUERIES + query[:, None],
            mask,
            mask=(of_32 * 32 < capacity)[None, :] & (query < QUERIES)[:, None],
        )
    slot = size + tl.arange(0, BLOCK_N)
    last = size - 1 + tl.zeros([BLOCK_N], tl.int32)  # −1 if the union is empty
    largest = tl.load(p_positions + last, mask=last >= 0, other=0)
    tl.store(p_positions + slot, largest, mask=slot < tl.cdiv(size, BLOCK_N) * BLOCK_N)
    tl.store(sizes_ptr + pid, size)


@triton.jit
def attend_union(
    tile, h_kv,
    q_ptr, k_ptr, v_ptr, positions_ptr, masks_ptr, sizes_ptr, occupied_ptr,
    gate_ptr, out_ptr, lse_ptr, broken_ptr, nonfinite_ptr,
    stride_qb, stride_ql, stride_qh, stride_qd,
    stride_kb, stride_ks, stride_kh, stride_kd,
    stride_vb, stride_vs, stride_vh, stride_vd,
    stride_gb, stride_gl, stride_gh, stride_gd,
    first_row, rows, L, H_kv, tiles, capacity, scale_log2,
    QUERIES: tl.constexpr, GROUP: tl.constexpr, d_h: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
    OUTPUT_GATE: tl.constexpr, REPAIR: tl.constexpr,
):  # fmt: skip
    """The QUERIES × GROUP rows of one tile for one key/value head, over the tile's union.

    With REPAIR, values of a position where one is not finite count as 0, and the rows that selected it are noted.
    Without, whether the result is finite is noted.
    """
    b = tile // tiles
    r = tl.arange(0, BLOCK_M)  # [BLOCK_M] row of the tile: query r // GROUP, head r % GROUP
    query = r // GROUP
    row = (tile % tiles) * QUERIES + query  # row of the chunk
    keep = (query < QUERIES) & (row < rows)
    t = first_row + row
    head = h_kv * GROUP + r % GROUP
    c = tl.arange(0, BLOCK_D).to(tl.int64)  # [BLOCK_D]
    q_mask = keep[:, None] & (c < d_h)[None, :]
    b_q = load_rows(q_ptr, b, t, head, c, q_mask, stride_qb, stride_ql, stride_qh, stride_qd)  # [BLOCK_M, BLOCK_D]
    p_k = k_ptr + b * stride_kb + h_kv * stride_kh
    p_v = v_ptr + b * stride_vb + h_kv * stride_vh
    p_positions = positions_ptr + tile * capacity
    n = tl.arange(0, BLOCK_N)  # [BLOCK_N] key of a block
    p_masks = masks_ptr + tile * (capacity // 32) * QUERIES + tl.minimum(query, QUERIES - 1)  # [BLOCK_M]

    m = tl.full([BLOCK_M], float("-inf"), tl.float32)
    l = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    nonfinite = tl.zeros([BLOCK_M], tl.int32)
    for first in range(0, tl.load(sizes_ptr + tile), BLOCK_N):
        s = tl.load(p_positions + first + n).to(tl.int64)  # [BLOCK_N]
        b_k = load_keys(p_k + s * stride_ks, c, stride_kd, d_h, BLOCK_D)  # [BLOCK_N, BLOCK_D]
        logits = scale_log2 * tl.dot(b_q, tl.trans(b_k), input_precision="ieee")  # [BLOCK_M, BLOCK_N]
        selected = selected_keys(p_masks + first // 32 * QUERIES, QUERIES, n, BLOCK_N)  # [BLOCK_M, BLOCK_N]
        if REPAIR:
            b_v, bad = load_finite(p_v + s * stride_vs, c, stride_vd, d_h)
            nonfinite = nonfinite | tl.max(tl.where(selected, bad[None, :], 0), axis=1)
        else:
            b_v = load_keys(p_v + s * stride_vs, c, stride_vd, d_h, BLOCK_D)
        logits = tl.where(selected, logits, float("-inf"))
        m, l, acc = online_softmax_update(m, l, acc, logits, b_v)

    if REPAIR:
        tl.store(nonfinite_ptr + (b * rows + row) * H_kv + h_kv, nonfinite, mask=keep)
        keep = keep & (nonfinite == 0)
    else:
        tl.store(broken_ptr + tile * H_kv + h_kv, tl.max(is_nonfinite(acc)))
    occupied = tl.load(occupied_ptr + b * rows + row, mask=keep, other=0)
    store_rows(
        m, l, acc, occupied == 0, b, t, head, c, keep,
        gate_ptr, out_ptr, lse_ptr, stride_gb, stride_gl, stride_gh, stride_gd,
        L, H_kv * GROUP, d_h, OUTPUT_GATE,
    )  # fmt: skip


@triton.jit
def union_attention_kernel(
    q_ptr, k_ptr, v_ptr, positions_ptr, masks_ptr, sizes_ptr, occupied_ptr,
    gate_ptr, out_ptr, lse_ptr, broken_ptr, nonfinite_ptr,
    stride_qb, stride_ql, stride_qh, stride_qd,
    stride_kb, stride_ks, stride_kh, stride_kd,
    stride_vb, stride_vs, stride_vh, stride_vd,
    stride_gb, stride_gl, stride_gh, stride_gd,
    first_row, rows, L, H_kv, tiles, n_tiles, capacity, scale_log2,
    QUERIES: tl.constexpr, GROUP: tl.constexpr, d_h: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
    OUTPUT_GATE: tl.constexpr,
):  # fmt: skip
    """One program per tile and key/value head."""
    pid = tl.program_id(0).to(tl.int64)
    # One head after the other, so that its K and V stay in L2; the last tiles first, because they have most to do.
    attend_union(
        n_tiles - 1 - pid % n_tiles, pid // n_tiles,
        q_ptr, k_ptr, v_ptr, positions_ptr, masks_ptr, sizes_ptr, occupied_ptr,
        gate_ptr, out_ptr, lse_ptr, broken_ptr, nonfinite_ptr,
        stride_qb, stride_ql, stride_qh, stride_qd,
        stride_kb, stride_ks, stride_kh, stride_kd,
        stride_vb, stride_vs, stride_vh, stride_vd,
        stride_gb, stride_gl, stride_gh, stride_gd,
        first_row, rows, L, H_kv, tiles, capacity, scale_log2,
        QUERIES, GROUP, d_h, BLOCK_M, BLOCK_N, BLOCK_D, OUTPUT_GATE, False,
    )  # fmt: skip


@triton.jit
def union_repair_kernel(
    q_ptr, k_ptr, v_ptr, positions_ptr, masks_ptr, sizes_ptr, occupied_ptr,
    gate_ptr, out_ptr, lse_ptr, broken_ptr, nonfinite_ptr,
    stride_qb, stride_ql, stride_qh, stride_qd,
    stride_kb, stride_ks, stride_kh, stride_kd,
    stride_vb, stride_vs, stride_vh, stride_vd,
    stride_gb, stride_gl, stride_gh, stride_gd,
    first_row, rows, L, H_kv, tiles, n_tiles, capacity, scale_log2,
    QUERIES: tl.constexpr, GROUP: tl.constexpr, d_h: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_I: tl.constexpr,
    OUTPUT_GATE: tl.constexpr,
):  # fmt: skip
    """One program per BLOCK_I pairs of a tile and a head: those whose result is not finite, once more, without what
    made it so.
    """
    first = tl.program_id(0).to(tl.int64) * BLOCK_I
    for i in range(first, end_of_broken(broken_ptr, first, n_tiles * H_kv, BLOCK_I)):
        if tl.load(broken_ptr + i) != 0:
            attend_union(
                i // H_kv, i % H_kv,
                q_ptr, k_ptr, v_ptr, positions_ptr, masks_ptr, sizes_ptr, occupied_ptr,
                gate_ptr, out_ptr, lse_ptr, broken_ptr, nonfinite_ptr,
                stride_qb, stride_ql, stride_qh, stride_qd,
                stride_kb, stride_ks, stride_kh, stride_kd,
                stride_vb, stride_vs, stride_vh, stride_vd,
                stride_gb, stride_gl, stride_gh, stride_gd,
                first_row, rows, L, H_kv, tiles, capacity, scale_log2,
                QUERIES, GROUP, d_h, BLOCK_M, BLOCK_N, BLOCK_D, OUTPUT_GATE, True,
            )  # fmt: skip


def attend_unions(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    indices: Tensor,
    counts: Tensor,
    start: Tensor,
    output_gate_logits: Tensor | None,
    scale: float,
    out: Tensor,
    lse: Tensor,
) -> None:
    """Fill `out` and `lse` (contiguous) by union tiles. Shapes as in `sparse_attention`."""
    (B, L, H, d_h), (S, H_kv), K = q.shape, k.shape[1:3], indices.shape[-1]
    device, group = q.device, H // H_kv
    gate = q if output_gate_logits is None else output_gate_logits
    queries = queries_per_tile(group)
    block_m, block_d = max(16, triton.next_power_of_2(queries * group)), max(16, triton.next_power_of_2(d_h))
    block_n, words = keys_per_block(block_d, q.dtype), words_of(S)
    capacity = largest_union(queries, K, S, block_n)
    chunk_rows = rows_per_chunk(
        B, L, queries, 4 * (queries * (words + H_kv + 1 + capacity // 32) + capacity + H_kv + 1)
    )
    chunk_tiles = chunk_rows // queries

    bits = torch.empty(B * chunk_rows * words, dtype=torch.int32, device=device)
    occupied = torch.empty(B * chunk_rows, dtype=torch.int32, device=device)
    positions = torch.empty(B * chunk_tiles * capacity, dtype=torch.int32, device=device)
    masks = torch.empty(B * chunk_tiles * capacity // 32 * queries, dtype=torch.int32, device=device)
    sizes = torch.empty(B * chunk_tiles, dtype=torch.int32, device=device)
    broken = torch.empty(B * chunk_tiles * H_kv, dtype=torch.int32, device=device)
    nonfinite = torch.empty(B * chunk_rows * H_kv, dtype=torch.int32, device=device)
    tensors = q, k, v, positions, masks, sizes, occupied, gate, out, lse, broken, nonfinite
    strides = *q.stride(), *k.stride(), *v.stride(), *gate.stride()
    of_tile = {"QUERIES": queries, "GROUP": group, "d_h": d_h, "BLOCK_M": block_m, "BLOCK_N": block_n}
    of_tile |= {"OUTPUT_GATE": output_gate_logits is not None}
    constants = of_tile | {"BLOCK_D": block_d}
    num_warps = 8 if block_m * block_d > 64 * 128 or q.dtype == torch.float32 else 4
    on_hopper, narrow = union_hopper.serves(q, k, v, gate, scale, block_m), union_hopper.is_narrow(k, v)
    for first_row in range(0, L, chunk_rows):
        rows = min(chunk_rows, L - first_row)
        tiles = triton.cdiv(rows, queries)
        write_selection_bits(indices, counts, start, bits, occupied, first_row, rows, S, queries)
        write_unions(bits, start, positions, masks, sizes, first_row, rows, capacity, S, queries, block_n)
        sizes_of_chunk = first_row, rows, L, H_kv, tiles, B * tiles, capacity, scale * LOG2_E
        repairs = (triton.cdiv(B * tiles * H_kv, BLOCK_BROKEN),)
        if on_hopper:
            contiguous_strides = (stride for x in (q, k, v, gate) for stride in x.stride()[:3])
            arguments = *tensors, *contiguous_strides, *sizes_of_chunk
            options = of_tile | {"NARROW": narrow, "num_warps": union_hopper.NUM_WARPS}
            union_hopper.union_attention_hopper_kernel[(B * tiles * H_kv,)](*arguments, **options)
            union_hopper.union_hopper_repair_kernel[repairs](*arguments, **options, BLOCK_I=BLOCK_BROKEN)
        else:
            arguments = *tensors, *strides, *sizes_of_chunk
            stages = pipeline_stages(block_n, block_d, q.dtype, device)
            union_attention_kernel[(B * tiles * H_kv,)](*arguments, **constants, num_warps=num_warps, num_stages=stages)
            union_repair_kernel[repairs](
                *arguments, **constants, BLOCK_I=BLOCK_BROKEN, num_warps=num_warps, num_stages=1
            )
        attend_nonfinite_rows(
            q, k, v, indices, counts, start, gate, scale, out, lse, broken, nonfinite,
            first_row, rows, queries, output_gate_logits is not None,
        )  # fmt: skip


def write_unions(
    bits: Tensor,
    start: Tensor,
    positions: Tensor,
    masks: Tensor,
    sizes: Tensor,
    first_row: int,
    rows: int,
    capacity: int,
    S: int,
    queries: int,
    block_n: int,
    bits_and_ranks: Tensor | None = None,
) -> None:
    """Fill positions [B · tiles, capacity], masks [B · tiles, capacity / 32, queries] and sizes [B · tiles] for a chunk
    of rows from its `bits`; and the unions' own bit masks and ranks, [2, B · tiles · words], if these are given.
    """
    tiles = triton.cdiv(rows, queries)
    union_bits, ranks = (sizes, sizes) if bits_and_ranks is None else bits_and_ranks
    union_kernel[(len(start) * tiles,)](
        bits, start, positions, masks, sizes, union_bits, ranks,
        first_row, rows, words_of(S), tiles, capacity, S,
        QUERIES=queries, BLOCK_Q=triton.next_power_of_2(queries), BLOCK_W=BLOCK_WORDS, BLOCK_U=BLOCK_MEMBERS,
        BLOCK_N=block_n, RANKS=bits_and_ranks is not None,
    )  # fmt: skip


def largest_union(queries: int, K: int, S: int, block_n: int) -> int:
    """How many positions the union of a tile may have, in whole blocks."""
    return triton.cdiv(min(queries * K, S), block_n) * block_n


def queries_per_tile(group: int) -> int:
    """As many queries as fill TILE_ROWS rows; at most 32."""
    return max(1, min(32, TILE_ROWS // group))


def keys_per_block(block_d: int, dtype: torch.dtype) -> int:
    """Keys that a tile attends to at a time: K and V of at most 16 KiB each, or 32 keys."""
    return max(32, min(64, 16384 // (block_d * dtype.itemsize)))


def pipeline_stages(block_n: int, block_d: int, dtype: torch.dtype, device: torch.device) -> int:
    """Stages of the loop over keys. K and V of (stages + 1) // 2 blocks are in shared memory at once."""
    wide = block_d * dtype.itemsize >= 512
    if wide and _backend.little_shared_memory(device):
        return 3
    return 5 if 2 * block_n * block_d * dtype.itemsize <= 32768 else 3
