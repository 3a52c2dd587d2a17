"""Exact top k_t from the shortlists; rows whose shortlist cannot be trusted, from all of their scores."""

import triton
import triton.language as tl

from gsa_fast._primitives import count_visible, stable_sigmoid
from gsa_fast.budget import budget_from_variance, merge_moments, row_variance_from_tiles
from gsa_fast.selection.rows import select_row


@triton.jit
def threshold_key(key, low, count_low, high, wanted, slack=0):
    """Some x with wanted ≤ count(key ≥ x) ≤ wanted + slack, or, where ties leave none, the wanted-th largest key.

    low is at or below and high at or above it; count_low keys are ≥ low. Steps interpolate between the counts at both
    ends, and every third one halves the interval, so that no distribution takes more than 93.
    """
    count_high = 0  # count(key > high) bounds it from below
    high = tl.where(count_low <= wanted + slack, low, high)
    steps = 0
    while low < high:
        share = (count_low - wanted - slack // 2).to(tl.float32) / (count_low - count_high).to(tl.float32)
        middle = low + tl.where(
            steps % 3 == 2, (high - low + 1) // 2, (share * (high - low).to(tl.float32)).to(tl.int32)
        )
        middle = tl.minimum(tl.maximum(middle, low + 1), high)
        steps += 1
        count = tl.sum((key >= middle).to(tl.int32), axis=0)
        reached = count >= wanted
        low = tl.where(reached, middle, low)
        count_low = tl.where(reached, count, count_low)
        high = tl.where(reached & (count <= wanted + slack), middle, tl.where(reached, high, middle - 1))
        count_high = tl.where(reached, count_high, count)
    return low


@triton.jit
def entry_places(p_sizes, splits, segment, CAPACITY: tl.constexpr):
    """Where the entries of a row lie, in the order of their positions, and how many they are.

    The sizes are read anew each time (volatile), because keeping the places takes more registers than finding them.
    """
    slot = tl.arange(0, CAPACITY)
    before = 0
    place = slot
    for split in range(0, splits, 2):  # the second of two splits lies backwards
        size = tl.load(p_sizes + split, volatile=True)
        place = tl.where(slot >= before, split // 2 * segment + slot - before, place)
        before += size
        size = tl.load(p_sizes + split + 1, mask=split + 1 < splits, other=0, volatile=True)
        place = tl.where(slot >= before, split // 2 * segment + segment - 1 - (slot - before), place)
        before += size
    return place, before


@triton.jit
def select_from_shortlist(
    p_entries, p_sizes, p_indices, splits, segment, kappa, K,
    CAPACITY: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Write the κ ≥ 1 best entries of a row's shortlist, ascending by position, then −1; it has at least κ."""
    slot = tl.arange(0, CAPACITY)
    p_words = p_entries.to(tl.pointer_type(tl.int32))  # an entry is a position and, above it, the bits of a score
    place, size = entry_places(p_sizes, splits, segment, CAPACITY)
    key = tl.load(p_words + 2 * place + 1, mask=slot < size, other=-1)
    low = tl.min(tl.where(key >= 0, key, 0x7F800000), axis=0)
    low = threshold_key(key, low, tl.sum((key >= low).to(tl.int32), axis=0), tl.max(key, axis=0), kappa)
    greater = (key > low).to(tl.int32)
    equal = (key == low).to(tl.int32)
    ties_wanted = kappa - tl.sum(greater, axis=0)
    # One scan for both counts: entries with the threshold's score in the upper half, better ones in the lower.
    counts = (equal << 16) + greater
    counts = tl.cumsum(counts, axis=0) - counts
    ties_before = counts >> 16
    take = (greater == 1) | ((equal == 1) & (ties_before < ties_wanted))
    place, size = entry_places(p_sizes, splits, segment, CAPACITY)
    position = tl.load(p_words + 2 * place, mask=take, other=0)
    tl.store(p_indices + (counts & 0xFFFF) + tl.minimum(ties_before, ties_wanted), position, mask=take)
    fill_empty(p_indices, kappa, K, BLOCK_K)


@triton.jit
def fill_empty(p_indices, kappa, K, BLOCK_K: tl.constexpr):
    """−1 into the slots from κ on."""
    for first in range(kappa // BLOCK_K * BLOCK_K, K, BLOCK_K):
        slot = first + tl.arange(0, BLOCK_K)
        tl.store(p_indices + slot, -1 + tl.zeros([BLOCK_K], tl.int32), mask=(slot >= kappa) & (slot < K))


@triton.jit
def select_kernel(
    entries_ptr, sizes_ptr, statistics_ptr, mean_variance_ptr, start_ptr, lengths_ptr,
    indices_ptr, counts_ptr, variance_ptr, large_ptr, n_large_ptr, failed_ptr, n_failed_ptr,
    rows, first_row, L, S, K, splits, segment, spans, k_base, k_min, k_max,
    RULE: tl.constexpr, SPAN: tl.constexpr, CAPACITY: tl.constexpr,
    LARGE_CAPACITY: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """One program per row: merge the statistics, k_t from Eq. 8, its k_t best. What does not fit is put on a list."""
    pid = tl.program_id(0).to(tl.int64)  # row of the chunk
    b, t = pid // rows, first_row + pid % rows
    out_row = b * L + t
    n_visible = count_visible(tl.load(start_ptr + b) + t.to(tl.int32), tl.load(lengths_ptr + b), S)
    variance = row_variance_from_tiles(statistics_ptr + pid * 3 * spans, spans, tl.cdiv(n_visible, SPAN), BLOCK_T)
    k = budget_from_variance(variance, tl.load(mean_variance_ptr), n_visible, k_base, k_min, k_max, RULE)
    kappa = tl.minimum(tl.maximum(k, 0), K)
    size = tl.cast(0, tl.int64)
    fits = True
    for split in range(0, splits, 2):
        pair = tl.load(sizes_ptr + pid * splits + split).to(tl.int64)
        pair += tl.load(sizes_ptr + pid * splits + split + 1, mask=split + 1 < splits, other=0)
        fits = fits & (pair <= segment)
        size += pair
    segments = (splits + 1) // 2
    p_indices = indices_ptr + out_row * K
    tl.store(counts_ptr + out_row, kappa)
    tl.store(variance_ptr + out_row, variance)
    if (size < kappa) | (size > LARGE_CAPACITY) | (fits == 0) | (variance != variance):
        tl.store(failed_ptr + tl.atomic_add(n_failed_ptr, 1), out_row.to(tl.int32))
    elif kappa == 0:
        fill_empty(p_indices, kappa, K, BLOCK_K)
    elif size > CAPACITY:
        tl.store(large_ptr + tl.atomic_add(n_large_ptr, 1), pid.to(tl.int32))
    else:
        select_from_shortlist(
            entries_ptr + pid * segments * segment, sizes_ptr + pid * splits, p_indices, splits, segment, kappa, K,
            CAPACITY, BLOCK_K,
        )  # fmt: skip


@triton.jit
def select_large_kernel(
    entries_ptr, sizes_ptr, indices_ptr, counts_ptr, large_ptr, n_large_ptr,
    rows, first_row, L, K, splits, segment, CAPACITY: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """The rows of a chunk whose shortlist did not fit `select_kernel`; their number only the device knows."""
    for i in range(tl.program_id(0), tl.load(n_large_ptr), tl.num_programs(0)):
        row = tl.load(large_ptr + i).to(tl.int64)
        out_row = row // rows * L + first_row + row % rows
        select_from_shortlist(
            entries_ptr + row * ((splits + 1) // 2) * segment, sizes_ptr + row * splits, indices_ptr + out_row * K,
            splits, segment, tl.load(counts_ptr + out_row), K, CAPACITY, BLOCK_K,
        )  # fmt: skip


@triton.jit
def redo_kernel(
    q_ptr, k_ptr, weight_ptr, bias_ptr, mean_variance_ptr, start_ptr, lengths_ptr,
    scratch_ptr, indices_ptr, counts_ptr, variance_ptr, failed_ptr, n_failed_ptr,
    stride_qb, stride_ql, stride_qh, stride_qd, stride_kb, stride_ks, stride_kd,
    stride_wb, stride_wl, stride_wh, stride_bias,
    L, S, K, scale, k_base, k_min, k_max,
    RULE: tl.constexpr, H_I: tl.constexpr, d_I: tl.constexpr,
    BLOCK_H: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_ROW: tl.constexpr,
):  # fmt: skip
    """Rows whose shortlist failed: all scores of a row into a scratch row, then Eq. 8 and the exact selection."""
    h = tl.arange(0, BLOCK_H)  # [BLOCK_H] indexer heads
    c = tl.arange(0, BLOCK_D).to(tl.int64)
    p_scratch = scratch_ptr + tl.program_id(0).to(tl.int64) * S
    bias = tl.load(bias_ptr + h.to(tl.int64) * stride_bias, mask=h < H_I, other=0.0).to(tl.float32)
    for i in range(tl.program_id(0), tl.load(n_failed_ptr), tl.num_programs(0)):
        out_row = tl.load(failed_ptr + i).to(tl.int64)
        b, t = out_row // L, out_row % L
        n_visible = count_visible(tl.load(start_ptr + b) + t.to(tl.int32), tl.load(lengths_ptr + b), S)
        b_q = tl.load(
            q_ptr + b * stride_qb + t * stride_ql + h.to(tl.int64)[:, None] * stride_qh + c[None, :] * stride_qd,
            mask=(h < H_I)[:, None] & (c < d_I)[None, :],
            other=0.0,
        )  # [BLOCK_H, BLOCK_D]
        w = tl.load(weight_ptr + b * stride_wb + t * stride_wl + h.to(tl.int64) * stride_wh, mask=h < H_I, other=0.0)
        weight = tl.where(h < H_I, stable_sigmoid(w.to(tl.float32)), 0.0)
        n = 0.0
        mean = 0.0
        m2 = 0.0
        for first in range(0, n_visible, BLOCK_S):
            s = first + tl.arange(0, BLOCK_S)
            b_k = tl.load(
                k_ptr + b * stride_kb + s.to(tl.int64)[:, None] * stride_ks + c[None, :] * stride_kd,
                mask=(s < n_visible)[:, None] & (c < d_I)[None, :],
                other=0.0,
            )  # [BLOCK_S, BLOCK_D]
            z = scale * tl.dot(b_q, tl.trans(b_k), input_precision="ieee") + bias[:, None]  # [BLOCK_H, BLOCK_S]
            term = tl.where((h < H_I)[:, None], weight[:, None] * stable_sigmoid(z), 0.0)
            x = tl.sum(term, axis=0)  # [BLOCK_S]
            tl.store(p_scratch + s, x, mask=s < n_visible)
            counted = (s < n_visible) & (x == x)
            tile_n = tl.sum(counted.to(tl.float32), axis=0)
            tile_mean = tl.sum(tl.where(counted, x, 0.0), axis=0) / tl.maximum(tile_n, 1.0)
            deviation = tl.where(counted, x - tile_mean, 0.0)
            n, mean, m2 = merge_moments(n, mean, m2, tile_n, tile_mean, tl.sum(deviation * deviation, axis=0))
        tl.debug_barrier()  # the scores were written by other threads of this program
        variance = m2 / tl.maximum(n, 1.0)
        k = budget_from_variance(variance, tl.load(mean_variance_ptr), n_visible, k_base, k_min, k_max, RULE)
        count = select_row(p_scratch, 1, n_visible, k, indices_ptr + out_row * K, K, BLOCK_ROW)
        tl.store(counts_ptr + out_row, count)
        tl.store(variance_ptr + out_row, variance)
        tl.debug_barrier()  # the next row overwrites the scores
