"""Selections as bit masks, which tiles of neighbouring queries read: bit s % 32 of word s // 32 stands for position s.

A tile attends to keys that only some of its queries selected, with weight 0 for the others. 0 · NaN is NaN, so values
that are not finite are known beforehand, and the tiles that meet one are computed again without it (`*_repair_kernel`);
rows that selected one get it from the gather kernel's code. A query never notices what only its neighbour selected.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from gsa_fast.attention.gather import attend_query

# Bit masks, and what is made of them, exist for one chunk of query rows at a time.
CHUNK_BYTES = 256 * 2**20
# Positions per program of `nonfinite_values_kernel`; a bit mask has whole words for all of them.
POSITIONS = 64

# States of a row, as bits.
SELECTED = tl.constexpr(1)  # it selected something
NONFINITE = tl.constexpr(2)  # it selected a value that is not finite


@triton.jit
def nonfinite_values_kernel(
    v_ptr, nonfinite_ptr, stride_vb, stride_vs, stride_vh, stride_vd, S, H_kv, words,
    d_h: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """One program per BLOCK_S positions: the bit mask of those where a value of any head is NaN or infinite."""
    tiles = tl.cdiv(S, BLOCK_S)
    b = (tl.program_id(0) // tiles).to(tl.int64)
    first = (tl.program_id(0) % tiles) * BLOCK_S
    s = first + tl.arange(0, BLOCK_S)  # [BLOCK_S]
    c = tl.arange(0, BLOCK_D).to(tl.int64)
    mask = (s < S)[:, None] & (c < d_h)[None, :]
    p_v = v_ptr + b * stride_vb + s.to(tl.int64)[:, None] * stride_vs + c[None, :] * stride_vd
    bad = tl.zeros([BLOCK_S], tl.int32)
    for _ in range(H_kv):
        b_v = tl.load(p_v, mask=mask, other=0.0).to(tl.float32)  # [BLOCK_S, BLOCK_D]
        bad = bad | tl.max((~(tl.abs(b_v) < float("inf"))).to(tl.int32), axis=1)
        p_v += stride_vh
    bad = tl.reshape(bad, [BLOCK_S // 32, 32]) << tl.arange(0, 32)[None, :]
    w = first // 32 + tl.arange(0, BLOCK_S // 32)
    tl.store(nonfinite_ptr + b * words + w, tl.reduce_or(bad, axis=1))


@triton.jit
def visible_words(start_ptr, b, first_row, row, rows, S, QUERIES: tl.constexpr):
    """How many words (an even number) the queries of a tile may read: up to the position of its last query.

    `row` is any row of the tile, counted from the start of the chunk.
    """
    last_row = tl.minimum((row // QUERIES + 1) * QUERIES, rows) - 1
    n_keys = tl.minimum(tl.load(start_ptr + b) + first_row + last_row + 1, S)
    return (tl.cdiv(tl.maximum(n_keys, 0), 64) * 2).to(tl.int32)


@triton.jit
def selection_bits_kernel(
    indices_ptr, counts_ptr, start_ptr, nonfinite_ptr, bits_ptr, states_ptr,
    stride_ib, stride_il, stride_ik, stride_cb, stride_cl,
    first_row, rows, words, K, S,
    QUERIES: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """One program per row of a chunk: its selection as a bit mask, as far as its tile can see, and its state."""
    pid = tl.program_id(0).to(tl.int64)
    b = pid // rows
    row = pid % rows
    t = first_row + row
    p_bits = bits_ptr + pid * words
    k = tl.arange(0, BLOCK_K)
    n_words = visible_words(start_ptr, b, first_row, row, rows, S, QUERIES)
    for first in range(0, n_words, BLOCK_K):
        tl.store(p_bits + first + k, tl.zeros([BLOCK_K], tl.int32), mask=first + k < n_words)
    tl.debug_barrier()  # other threads set bits in the words that this one has cleared

    count = tl.minimum(tl.load(counts_ptr + b * stride_cb + t * stride_cl), K)
    position = tl.load(start_ptr + b) + t
    p_indices = indices_ptr + b * stride_ib + t * stride_il
    state = tl.zeros([BLOCK_K], tl.int32)
    for first in range(0, count, BLOCK_K):
        slot = first + k
        s = tl.load(p_indices + slot.to(tl.int64) * stride_ik, mask=slot < count, other=-1)  # [BLOCK_K]
        filled = (s >= 0) & (s < S) & (s <= position)
        tl.atomic_or(p_bits + (s >> 5), tl.full([BLOCK_K], 1, tl.int32) << (s & 31), mask=filled, sem="relaxed")
        nonfinite = tl.load(nonfinite_ptr + b * words + (s >> 5), mask=filled, other=0) >> (s & 31)
        state = state | tl.where(filled, SELECTED, 0) | ((nonfinite & 1) * NONFINITE)
    tl.store(states_ptr + pid, tl.reduce_or(state, axis=0))


@triton.jit
def attend_nonfinite_rows(
    b, h_kv, first_row, row, rows, states_ptr,
    q_ptr, k_ptr, v_ptr, indices_ptr, counts_ptr, start_ptr, gate_ptr, out_ptr, lse_ptr,
    stride_qb, stride_ql, stride_qh, stride_qd,
    stride_kb, stride_ks, stride_kh, stride_kd,
    stride_vb, stride_vs, stride_vh, stride_vd,
    stride_ib, stride_il, stride_ik, stride_cb, stride_cl,
    stride_gb, stride_gl, stride_gh, stride_gd,
    L, S, K, H_kv, scale_log2,
    QUERIES: tl.constexpr, GROUP: tl.constexpr, d_h: tl.constexpr,
    BLOCK_G: tl.constexpr, BLOCK_D: tl.constexpr, OUTPUT_GATE: tl.constexpr,
):  # fmt: skip
    """The rows of a tile, from `row` on, that selected a value that is not finite: one by one, by gathering."""
    for i in range(row, tl.minimum(row + QUERIES, rows)):
        if (tl.load(states_ptr + b * rows + i) & NONFINITE) != 0:
            attend_query(
                b, first_row + i, h_kv,
                q_ptr, k_ptr, v_ptr, indices_ptr, counts_ptr, start_ptr, gate_ptr, out_ptr, lse_ptr,
                stride_qb, stride_ql, stride_qh, stride_qd,
                stride_kb, stride_ks, stride_kh, stride_kd,
                stride_vb, stride_vs, stride_vh, stride_vd,
                stride_ib, stride_il, stride_ik, stride_cb, stride_cl,
                stride_gb, stride_gl, stride_gh, stride_gd,
                L, S, K, H_kv, scale_log2,
                GROUP, d_h, BLOCK_G, BLOCK_D, 16, OUTPUT_GATE,
            )  # fmt: skip


def words_of(S: int) -> int:
    """Words of a bit mask over S positions."""
    return triton.cdiv(S, POSITIONS) * (POSITIONS // 32)


def nonfinite_values(v: Tensor) -> Tensor:
    """int32 [B, words]: the positions where a value of any head is not finite."""
    B, S, H_kv, d_h = v.shape
    words = words_of(S)
    nonfinite = torch.empty((B, words), dtype=torch.int32, device=v.device)
    if S:
        nonfinite_values_kernel[(B * triton.cdiv(S, POSITIONS),)](
            v, nonfinite, *v.stride(), S, H_kv, words,
            d_h=d_h, BLOCK_S=POSITIONS, BLOCK_D=max(16, triton.next_power_of_2(d_h)),
        )  # fmt: skip
    return nonfinite


def write_selection_bits(
    indices: Tensor,
    counts: Tensor,
    start: Tensor,
    nonfinite: Tensor,
    bits: Tensor,
    states: Tensor,
    first_row: int,
    rows: int,
    S: int,
    queries: int,
) -> None:
    """Fill `bits` [B, rows, words] and `states` [B, rows] for a chunk of rows."""
    K = indices.shape[-1]
    selection_bits_kernel[(len(indices) * rows,)](
        indices, counts, start, nonfinite, bits, states, *indices.stride(), *counts.stride(),
        first_row, rows, nonfinite.shape[1], K, S,
        QUERIES=queries, BLOCK_K=min(1024, max(16, triton.next_power_of_2(K))),
    )  # fmt: skip


def rows_per_chunk(B: int, L: int, queries: int, bytes_per_tile: int) -> int:
    """How many query rows of each sequence fit CHUNK_BYTES; a multiple of a tile's queries."""
    return min(max(1, CHUNK_BYTES // (B * bytes_per_tile)), triton.cdiv(L, queries)) * queries
