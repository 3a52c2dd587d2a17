"""Selections as bit masks, which tiles of neighbouring queries read: bit s % 32 of word s // 32 stands for position s.

A tile attends to keys that only some of its queries selected, with weight 0 for the others, and 0 · NaN is NaN. So a
tile whose result is not finite is computed again with 0 in place of the values that are not (`*_repair_kernel`), and
the rows that did select one get it by gathering (`nonfinite_rows_kernel`). A query never notices, not in a single bit,
what only its neighbour selected.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from gsa_fast.attention.gather import attend_query
from gsa_fast.attention.rows import LOG2_E

# Bit masks, and what is made of them, exist for one chunk of query rows at a time.
CHUNK_BYTES = 2**30
# Tiles (of one head) that a program of a repair kernel looks after: almost always it finds nothing to do.
BLOCK_BROKEN = 32


@triton.jit
def visible_words(start_ptr, b, first_row, row, rows, S, QUERIES: tl.constexpr, WORDS: tl.constexpr):
    """How many words, a multiple of WORDS, the queries of a tile may read: up to the position of its last query.

    `row` is any row of the tile, counted from the start of the chunk.
    """
    last_row = tl.minimum((row // QUERIES + 1) * QUERIES, rows) - 1
    n_keys = tl.minimum(tl.load(start_ptr + b) + first_row + last_row + 1, S)
    return (tl.cdiv(tl.maximum(n_keys, 0), 32 * WORDS) * WORDS).to(tl.int32)


@triton.jit
def selected_keys(p_word, step, n, BLOCK_N: tl.constexpr):
    """Which of the keys n = 0 … BLOCK_N − 1 of a block each row of a tile selected: [BLOCK_M, BLOCK_N].

    p_word [BLOCK_M] points to the first word of the block in the bit mask of each row, `step` is from word to word.
    """
    word = tl.load(p_word)[:, None]
    if BLOCK_N == 64:
        word = tl.where((n < 32)[None, :], word, tl.load(p_word + step)[:, None])
    return (word & (tl.full([BLOCK_N], 1, tl.int32) << (n % 32))[None, :]) != 0


@triton.jit
def selection_bits_kernel(
    indices_ptr, counts_ptr, start_ptr, bits_ptr, occupied_ptr,
    stride_ib, stride_il, stride_ik, stride_cb, stride_cl,
    first_row, rows, words, K, S,
    QUERIES: tl.constexpr, WORDS: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """One program per row of a chunk: its selection as a bit mask, as far as its tile can see.

    Also whether it selected anything at all.
    """
    pid = tl.program_id(0).to(tl.int64)
    b = pid // rows
    row = pid % rows
    t = first_row + row
    p_bits = bits_ptr + pid * words
    k = tl.arange(0, BLOCK_K)
    n_words = visible_words(start_ptr, b, first_row, row, rows, S, QUERIES, WORDS)
    for first in range(0, n_words, BLOCK_K):
        tl.store(p_bits + first + k, tl.zeros([BLOCK_K], tl.int32), mask=first + k < n_words)
    tl.debug_barrier()  # other threads set bits in the words that this one has cleared

    count = tl.minimum(tl.load(counts_ptr + b * stride_cb + t * stride_cl), K)
    position = tl.load(start_ptr + b) + t
    p_indices = indices_ptr + b * stride_ib + t * stride_il
    occupied = tl.zeros([BLOCK_K], tl.int32)
    for first in range(0, count, BLOCK_K):
        slot = first + k
        s = tl.load(p_indices + slot.to(tl.int64) * stride_ik, mask=slot < count, other=-1)  # [BLOCK_K]
        filled = (s >= 0) & (s < S) & (s <= position)
        tl.atomic_or(p_bits + (s >> 5), tl.full([BLOCK_K], 1, tl.int32) << (s & 31), mask=filled, sem="relaxed")
        occupied = occupied | filled.to(tl.int32)
    tl.store(occupied_ptr + pid, tl.max(occupied, axis=0))


@triton.jit
def end_of_broken(broken_ptr, first, n, BLOCK_I: tl.constexpr):
    """Where a loop from `first` over BLOCK_I of n flags has to end: at once if none of them is set."""
    i = first + tl.arange(0, BLOCK_I)
    any_set = tl.max(tl.load(broken_ptr + i, mask=i < n, other=0), axis=0) != 0
    return tl.where(any_set, tl.minimum(first + BLOCK_I, n), first)


@triton.jit
def nonfinite_rows_kernel(
    q_ptr, k_ptr, v_ptr, indices_ptr, counts_ptr, start_ptr, gate_ptr, out_ptr, lse_ptr, broken_ptr, nonfinite_ptr,
    stride_qb, stride_ql, stride_qh, stride_qd,
    stride_kb, stride_ks, stride_kh, stride_kd,
    stride_vb, stride_vs, stride_vh, stride_vd,
    stride_ib, stride_il, stride_ik, stride_cb, stride_cl,
    stride_gb, stride_gl, stride_gh, stride_gd,
    first_row, rows, tiles, n_tiles, L, S, K, H_kv, scale_log2,
    QUERIES: tl.constexpr, GROUP: tl.constexpr, d_h: tl.constexpr,
    BLOCK_G: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_I: tl.constexpr,
    OUTPUT_GATE: tl.constexpr,
):  # fmt: skip
    """One program per BLOCK_I pairs of a tile and a head: the rows that selected a value that is not finite.

    One by one, by gathering.
    """
    first = tl.program_id(0).to(tl.int64) * BLOCK_I
    last = end_of_broken(broken_ptr, first, n_tiles * H_kv, BLOCK_I)
    for i in range(first * QUERIES, last * QUERIES):
        tile, h_kv = i // QUERIES // H_kv, i // QUERIES % H_kv
        b, row = tile // tiles, tile % tiles * QUERIES + i % QUERIES
        broken = tl.load(broken_ptr + tile * H_kv + h_kv) & (row < rows)
        if broken & tl.load(nonfinite_ptr + (b * rows + row) * H_kv + h_kv, mask=broken != 0, other=0) != 0:
            attend_query(
                b, first_row + row, h_kv,
                q_ptr, k_ptr, v_ptr, indices_ptr, counts_ptr, start_ptr, gate_ptr, out_ptr, lse_ptr,
                stride_qb, stride_ql, stride_qh, stride_qd,
                stride_kb, stride_ks, stride_kh, stride_kd,
                stride_vb, stride_vs, stride_vh, stride_vd,
                stride_ib, stride_il, stride_ik, stride_cb, stride_cl,
                stride_gb, stride_gl, stride_gh, stride_gd,
                L, S, K, H_kv, scale_log2,
                GROUP, d_h, BLOCK_G, BLOCK_D, BLOCK_K, OUTPUT_GATE,
            )  # fmt: skip


def words_of(S: int) -> int:
    """Words of a bit mask over S positions; an even number, so that blocks of 64 keys have two."""
    return 2 * triton.cdiv(S, 64)


def write_selection_bits(
    indices: Tensor,
    counts: Tensor,
    start: Tensor,
    bits: Tensor,
    occupied: Tensor,
    first_row: int,
    rows: int,
    S: int,
    queries: int,
    words_per_block: int = 1,
) -> None:
    """Fill `bits` [B, rows, words] and `occupied` [B, rows] for a chunk of rows.

    A row has bits as far as its tile of `queries` can see, rounded up to whole blocks; the rest is not written.
    """
    K = indices.shape[-1]
    selection_bits_kernel[(len(indices) * rows,)](
        indices, counts, start, bits, occupied, *indices.stride(), *counts.stride(),
        first_row, rows, words_of(S), K, S,
        QUERIES=queries, WORDS=words_per_block, BLOCK_K=min(1024, max(16, triton.next_power_of_2(K))),
    )  # fmt: skip


def attend_nonfinite_rows(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    indices: Tensor,
    counts: Tensor,
    start: Tensor,
    gate: Tensor,
    scale: float,
    out: Tensor,
    lse: Tensor,
    broken: Tensor,
    nonfinite: Tensor,
    first_row: int,
    rows: int,
    queries: int,
    output_gate: bool,
) -> None:
    """Write the rows of a chunk that selected a value that is not finite: `nonfinite` [B, rows, H_kv].

    It is read only where `broken` [B, tiles, H_kv] is set.
    """
    (B, L, H, d_h), (S, H_kv), K = q.shape, k.shape[1:3], indices.shape[-1]
    tiles = triton.cdiv(rows, queries)
    nonfinite_rows_kernel[(triton.cdiv(B * tiles * H_kv, BLOCK_BROKEN),)](
        q, k, v, indices, counts, start, gate, out, lse, broken, nonfinite,
        *q.stride(), *k.stride(), *v.stride(), *indices.stride(), *counts.stride(), *gate.stride(),
        first_row, rows, tiles, B * tiles, L, S, K, H_kv, scale * LOG2_E,
        QUERIES=queries, GROUP=H // H_kv, d_h=d_h, BLOCK_G=max(16, triton.next_power_of_2(H // H_kv)),
        BLOCK_D=max(16, triton.next_power_of_2(d_h)), BLOCK_K=16, BLOCK_I=BLOCK_BROKEN, OUTPUT_GATE=output_gate,
        num_warps=8 if q.dtype == torch.float32 else 4, num_stages=1,
    )  # fmt: skip


def rows_per_chunk(B: int, L: int, queries: int, bytes_per_tile: int) -> int:
    """How many query rows of each sequence fit CHUNK_BYTES; a multiple of a tile's queries."""
    return min(max(1, CHUNK_BYTES // (B * bytes_per_tile)), triton.cdiv(L, queries)) * queries
