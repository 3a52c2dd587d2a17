"""Sparse attention by masked tiles, for lengths where a selection skips little: dense attention with the bits as mask.

A tile is some consecutive queries times the heads of one group. K and V are read in blocks of neighbouring keys, which
needs no gather; blocks that no query of the tile selected from are skipped, and every logit asks its query's bit.
Launches per chunk of queries: selections to bit masks, bit masks to lists of blocks, attention, repair of the tiles
that met a value that is not finite.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from gsa_fast import _backend
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

TILE_ROWS = 64
BLOCKS_AT_A_TIME = 16  # blocks of keys that a program of `key_blocks_kernel` decides on at a time


@triton.jit
def key_blocks_kernel(
    bits_ptr, start_ptr, blocks_ptr, sizes_ptr,
    first_row, rows, words, tiles, capacity, S,
    QUERIES: tl.constexpr, BLOCK_W: tl.constexpr, WORDS: tl.constexpr,
):  # fmt: skip
    """One program per tile: the ascending list of the blocks of 32·WORDS keys that one of its queries selected from."""
    pid = tl.program_id(0).to(tl.int64)
    b = pid // tiles
    row = (pid % tiles) * QUERIES
    n_words = visible_words(start_ptr, b, first_row, row, rows, S, QUERIES, WORDS)
    p_bits = bits_ptr + (b * rows + row) * words
    size = 0
    for first in range(0, n_words, BLOCK_W):
        w = first + tl.arange(0, BLOCK_W)
        union = tl.zeros([BLOCK_W], tl.int32)
        for i in range(tl.minimum(QUERIES, rows - row)):
            union = union | tl.load(p_bits + i * words + w, mask=w < n_words, other=0)
        taken = tl.max(tl.reshape((union != 0).to(tl.int32), [BLOCK_W // WORDS, WORDS]), axis=1)
        slot = size + tl.cumsum(taken, axis=0) - taken
        block = first // WORDS + tl.arange(0, BLOCK_W // WORDS)
        tl.store(blocks_ptr + pid * capacity + slot, block, mask=taken == 1)
        size += tl.sum(taken, axis=0)
    tl.store(sizes_ptr + pid, size)


@triton.jit
def attend_masked(
    tile, h_kv,
    q_ptr, k_ptr, v_ptr, bits_ptr, blocks_ptr, sizes_ptr, occupied_ptr,
    gate_ptr, out_ptr, lse_ptr, broken_ptr, nonfinite_ptr,
    stride_qb, stride_ql, stride_qh, stride_qd,
    stride_kb, stride_ks, stride_kh, stride_kd,
    stride_vb, stride_vs, stride_vh, stride_vd,
    stride_gb, stride_gl, stride_gh, stride_gd,
    first_row, rows, L, S, H_kv, tiles, words, capacity, scale_log2,
    QUERIES: tl.constexpr, GROUP: tl.constexpr, d_h: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
    OUTPUT_GATE: tl.constexpr, REPAIR: tl.constexpr,
):  # fmt: skip
    """The QUERIES × GROUP rows of one tile for one key/value head, over the listed blocks of keys.

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
    n = tl.arange(0, BLOCK_N)  # [BLOCK_N] key of a block
    q_mask = keep[:, None] & (c < d_h)[None, :]
    b_q = load_rows(q_ptr, b, t, head, c, q_mask, stride_qb, stride_ql, stride_qh, stride_qd)  # [BLOCK_M, BLOCK_D]
    p_k = k_ptr + b * stride_kb + h_kv * stride_kh
    p_v = v_ptr + b * stride_vb + h_kv * stride_vh
    p_bits = bits_ptr + b * rows * words
    row_bits = tl.minimum(row, rows - 1).to(tl.int32) * words  # [BLOCK_M]; a chunk has fewer than 2^31 words
    p_blocks = blocks_ptr + tile * capacity

    m = tl.full([BLOCK_M], float("-inf"), tl.float32)
    l = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    nonfinite = tl.zeros([BLOCK_M], tl.int32)
    block = tl.load(p_blocks)
    for i in range(tl.load(sizes_ptr + tile)):
        next_block = tl.load(p_blocks + i + 1)  # known an iteration ahead, so that its keys can be on their way
        # Positions past the end have no bit in any selection: any legal position may stand in for them.
        s = tl.minimum(block * BLOCK_N + n, S - 1).to(tl.int64)  # [BLOCK_N]
        selected = selected_keys(p_bits + row_bits + block * (BLOCK_N // 32), 1, n, BLOCK_N)  # [BLOCK_M, BLOCK_N]
        b_k = load_keys(p_k + s * stride_ks, c, stride_kd, d_h, BLOCK_D)  # [BLOCK_N, BLOCK_D]
        if REPAIR:
            b_v, bad = load_finite(p_v + s * stride_vs, c, stride_vd, d_h)
            nonfinite = nonfinite | tl.max(tl.where(selected, bad[None, :], 0), axis=1)
        else:
            b_v = load_keys(p_v + s * stride_vs, c, stride_vd, d_h, BLOCK_D)
        logits = scale_log2 * tl.dot(b_q, tl.trans(b_k), input_precision="ieee")  # [BLOCK_M, BLOCK_N]
        logits = tl.where(selected, logits, float("-inf"))
        m, l, acc = online_softmax_update(m, l, acc, logits, b_v)
        block = next_block

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
def masked_attention_kernel(
    q_ptr, k_ptr, v_ptr, bits_ptr, blocks_ptr, sizes_ptr, occupied_ptr,
    gate_ptr, out_ptr, lse_ptr, broken_ptr, nonfinite_ptr,
    stride_qb, stride_ql, stride_qh, stride_qd,
    stride_kb, stride_ks, stride_kh, stride_kd,
    stride_vb, stride_vs, stride_vh, stride_vd,
    stride_gb, stride_gl, stride_gh, stride_gd,
    first_row, rows, L, S, H_kv, tiles, n_tiles, words, capacity, scale_log2,
    QUERIES: tl.constexpr, GROUP: tl.constexpr, d_h: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
    OUTPUT_GATE: tl.constexpr,
):  # fmt: skip
    """One program per tile and key/value head."""
    pid = tl.program_id(0).to(tl.int64)
    # The heads of a tile beside one another: the last tiles have most to do, and come first for every head.
    attend_masked(
        n_tiles - 1 - pid // H_kv, pid % H_kv,
        q_ptr, k_ptr, v_ptr, bits_ptr, blocks_ptr, sizes_ptr, occupied_ptr,
        gate_ptr, out_ptr, lse_ptr, broken_ptr, nonfinite_ptr,
        stride_qb, stride_ql, stride_qh, stride_qd,
        stride_kb, stride_ks, stride_kh, stride_kd,
        stride_vb, stride_vs, stride_vh, stride_vd,
        stride_gb, stride_gl, stride_gh, stride_gd,
        first_row, rows, L, S, H_kv, tiles, words, capacity, scale_log2,
        QUERIES, GROUP, d_h, BLOCK_M, BLOCK_N, BLOCK_D, OUTPUT_GATE, False,
    )  # fmt: skip


@triton.jit
def masked_repair_kernel(
    q_ptr, k_ptr, v_ptr, bits_ptr, blocks_ptr, sizes_ptr, occupied_ptr,
    gate_ptr, out_ptr, lse_ptr, broken_ptr, nonfinite_ptr,
    stride_qb, stride_ql, stride_qh, stride_qd,
    stride_kb, stride_ks, stride_kh, stride_kd,
    stride_vb, stride_vs, stride_vh, stride_vd,
    stride_gb, stride_gl, stride_gh, stride_gd,
    first_row, rows, L, S, H_kv, tiles, n_tiles, words, capacity, scale_log2,
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
            attend_masked(
                i // H_kv, i % H_kv,
                q_ptr, k_ptr, v_ptr, bits_ptr, blocks_ptr, sizes_ptr, occupied_ptr,
                gate_ptr, out_ptr, lse_ptr, broken_ptr, nonfinite_ptr,
                stride_qb, stride_ql, stride_qh, stride_qd,
                stride_kb, stride_ks, stride_kh, stride_kd,
                stride_vb, stride_vs, stride_vh, stride_vd,
                stride_gb, stride_gl, stride_gh, stride_gd,
                first_row, rows, L, S, H_kv, tiles, words, capacity, scale_log2,
                QUERIES, GROUP, d_h, BLOCK_M, BLOCK_N, BLOCK_D, OUTPUT_GATE, True,
            )  # fmt: skip


def attend_masked_tiles(
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
    """Fill `out` and `lse` (contiguous) by masked tiles. Shapes as in `sparse_attention`."""
    (B, L, H, d_h), (S, H_kv) = q.shape, k.shape[1:3]
    device, group = q.device, H // H_kv
    gate = q if output_gate_logits is None else output_gate_logits
    block_d = max(16, triton.next_power_of_2(d_h))
    queries, block_n, words = max(1, TILE_ROWS // group), keys_per_block(block_d, q.dtype), words_of(S)
    block_m = max(16, triton.next_power_of_2(queries * group))
    capacity = triton.cdiv(S, block_n) + 1  # one more, because the loop looks an entry ahead
    chunk_rows = rows_per_chunk(B, L, queries, 4 * (queries * (words + H_kv + 1) + capacity + H_kv + 1))
    chunk_tiles = chunk_rows // queries

    bits = torch.empty(B * chunk_rows * words, dtype=torch.int32, device=device)
    occupied = torch.empty(B * chunk_rows, dtype=torch.int32, device=device)
    blocks = torch.empty(B * chunk_tiles * capacity, dtype=torch.int32, device=device)
    sizes = torch.empty(B * chunk_tiles, dtype=torch.int32, device=device)
    broken = torch.empty(B * chunk_tiles * H_kv, dtype=torch.int32, device=device)
    nonfinite = torch.empty(B * chunk_rows * H_kv, dtype=torch.int32, device=device)
    tensors = q, k, v, bits, blocks, sizes, occupied, gate, out, lse, broken, nonfinite
    strides = *q.stride(), *k.stride(), *v.stride(), *gate.stride()
    constants = {"QUERIES": queries, "GROUP": group, "d_h": d_h, "BLOCK_M": block_m, "BLOCK_N": block_n}
    constants |= {"BLOCK_D": block_d, "OUTPUT_GATE": output_gate_logits is not None}
    num_warps = 8 if block_m * block_d > 64 * 128 or q.dtype == torch.float32 else 4
    wide = block_d * q.element_size() >= 512
    num_stages = 2 if wide and _backend.little_shared_memory(device) else 3
    for first_row in range(0, L, chunk_rows):
        rows = min(chunk_rows, L - first_row)
        tiles = triton.cdiv(rows, queries)
        write_selection_bits(indices, counts, start, bits, occupied, first_row, rows, S, queries, block_n // 32)
        key_blocks_kernel[(B * tiles,)](
            bits, start, blocks, sizes, first_row, rows, words, tiles, capacity, S,
            QUERIES=queries, BLOCK_W=BLOCKS_AT_A_TIME * (block_n // 32), WORDS=block_n // 32,
        )  # fmt: skip
        masked_attention_kernel[(B * tiles * H_kv,)](
            *tensors, *strides, first_row, rows, L, S, H_kv, tiles, B * tiles, words, capacity, scale * LOG2_E,
            **constants, num_warps=num_warps, num_stages=num_stages,
        )  # fmt: skip
        masked_repair_kernel[(triton.cdiv(B * tiles * H_kv, BLOCK_BROKEN),)](
            *tensors, *strides, first_row, rows, L, S, H_kv, tiles, B * tiles, words, capacity, scale * LOG2_E,
            **constants, BLOCK_I=BLOCK_BROKEN, num_warps=num_warps, num_stages=1,
        )  # fmt: skip
        attend_nonfinite_rows(
            q, k, v, indices, counts, start, gate, scale, out, lse, broken, nonfinite,
            first_row, rows, queries, output_gate_logits is not None,
        )  # fmt: skip


def keys_per_block(block_d: int, dtype: torch.dtype) -> int:
    """Keys that a tile attends to at a time: whole words of the bit masks, K and V of 16 KiB each if possible."""
    return 64 if block_d * dtype.itemsize <= 256 else 32
