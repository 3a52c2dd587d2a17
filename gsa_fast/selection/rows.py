"""Exact top-k of rows of stored scores, without sorting them.

The κ-th largest score of a row is found by bisection between its smallest and largest score, on an order-preserving
integer key, one counting pass over the row per step; a last pass writes the positions, ascending.
"""

import triton
import triton.language as tl

from gsa_fast._primitives import count_visible
from gsa_fast.budget import budget_from_variance, row_variance_from_tiles

LOWEST_KEY = tl.constexpr(-(2**31))  # of NaN
LARGEST_KEY = tl.constexpr(0x7F800000)  # of +∞


@triton.jit
def ordered_key(x):
    """int32 keys in the order of the float32 scores: −0 equals +0, NaN below everything.

    Integer comparison of the bits orders positive floats; negative ones need their magnitude bits flipped.
    """
    bits = x.to(tl.int32, bitcast=True)
    bits = tl.where(x == 0.0, 0, bits)
    key = tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits)
    return tl.where(x == x, key, LOWEST_KEY)


@triton.jit
def load_keys(p_row, stride_s, first, n_keys, BLOCK_S: tl.constexpr):
    """Keys of one tile of a row, and which of them are candidates (inside the row and not −inf)."""
    s = first + tl.arange(0, BLOCK_S)
    x = tl.load(p_row + s.to(tl.int64) * stride_s, mask=s < n_keys, other=float("-inf"))
    return ordered_key(x), x != float("-inf")


@triton.jit
def count_at_least(p_row, stride_s, n_keys, threshold, BLOCK_S: tl.constexpr):
    """How many candidates have a key ≥ threshold."""
    total = 0
    for first in range(0, n_keys, BLOCK_S):
        key, candidate = load_keys(p_row, stride_s, first, n_keys, BLOCK_S)
        total += tl.sum((candidate & (key >= threshold)).to(tl.int32), axis=0)
    return total


@triton.jit
def count_and_range(p_row, stride_s, n_keys, BLOCK_S: tl.constexpr):
    """How many candidates a row has, and their smallest and largest key."""
    total = 0
    smallest = LARGEST_KEY + 0
    largest = LOWEST_KEY + 0
    for first in range(0, n_keys, BLOCK_S):
        key, candidate = load_keys(p_row, stride_s, first, n_keys, BLOCK_S)
        total += tl.sum(candidate.to(tl.int32), axis=0)
        smallest = tl.minimum(smallest, tl.min(tl.where(candidate, key, LARGEST_KEY), axis=0))
        largest = tl.maximum(largest, tl.max(tl.where(candidate, key, LOWEST_KEY), axis=0))
    return total, smallest, largest


@triton.jit
def select_row(p_row, stride_s, n_keys, k, p_indices, K, BLOCK_S: tl.constexpr):
    """Write the min(k, K, candidates) best positions of a row, ascending, then −1; return how many.

    Bisection keeps count(key ≥ low) ≥ κ > count(key > high), so both meet at the κ-th largest key, or stop where
    exactly κ keys lie at or above the middle. Ties at the threshold go to the lower positions.
    """
    n_candidates, smallest, largest = count_and_range(p_row, stride_s, n_keys, BLOCK_S)
    kappa = tl.minimum(tl.minimum(tl.maximum(k, 0), K), n_candidates)
    low = smallest.to(tl.int64)  # 64 bits, because high − low may pass 2^31
    high = tl.where(kappa < n_candidates, largest, smallest).to(tl.int64)
    while low < high:
        middle = low + (high - low + 1) // 2
        count = count_at_least(p_row, stride_s, n_keys, middle.to(tl.int32), BLOCK_S)
        exact = count == kappa
        low = tl.where(count >= kappa, middle, low)
        high = tl.where(exact, middle, tl.where(count > kappa, high, middle - 1))
    threshold = low.to(tl.int32)
    ties_wanted = kappa - count_at_least(p_row, stride_s, n_keys, threshold + 1, BLOCK_S)

    ties_seen = 0
    written = 0
    last = tl.where(kappa > 0, n_keys, 0)
    for first in range(0, last, BLOCK_S):
        key, candidate = load_keys(p_row, stride_s, first, n_keys, BLOCK_S)
        tie = (candidate & (key == threshold)).to(tl.int32)
        tie_rank = ties_seen + tl.cumsum(tie, axis=0) - tie  # ties before this one
        take = (candidate & (key > threshold)) | ((tie == 1) & (tie_rank < ties_wanted))
        take_int = take.to(tl.int32)
        slot = written + tl.cumsum(take_int, axis=0) - take_int
        tl.store(p_indices + slot, first + tl.arange(0, BLOCK_S), mask=take)
        ties_seen += tl.sum(tie, axis=0)
        written += tl.sum(take_int, axis=0)
    for first in range(0, K, BLOCK_S):
        slot = first + tl.arange(0, BLOCK_S)
        tl.store(p_indices + slot, -1 + tl.zeros([BLOCK_S], tl.int32), mask=(slot >= kappa) & (slot < K))
    return kappa


@triton.jit
def select_tokens_kernel(
    scores_ptr, budget_ptr, indices_ptr, counts_ptr,
    stride_b, stride_l, stride_s, stride_budget_b, stride_budget_l,
    L, S, K, BLOCK_S: tl.constexpr,
):  # fmt: skip
    """One program per row: select with the given budget."""
    pid = tl.program_id(0).to(tl.int64)
    b, t = pid // L, pid % L
    k = tl.load(budget_ptr + b * stride_budget_b + t * stride_budget_l)
    p_row = scores_ptr + b * stride_b + t * stride_l
    count = select_row(p_row, stride_s, S, k, indices_ptr + pid * K, K, BLOCK_S)
    tl.store(counts_ptr + pid, count)


@triton.jit
def budget_and_select_kernel(
    scores_ptr, statistics_ptr, mean_variance_ptr, start_ptr, lengths_ptr,
    indices_ptr, counts_ptr, variance_ptr,
    rows, first_row, L, S, K, n_tiles, k_base, k_min, k_max,
    RULE: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_T: tl.constexpr,
):  # fmt: skip
    """One program per row of a chunk: merge the tiles' statistics, take k_t from Eq. 8, select."""
    pid = tl.program_id(0).to(tl.int64)  # row of the chunk, [B, rows] flattened
    b, t = pid // rows, first_row + pid % rows
    out_row = b * L + t
    n_valid = count_visible(tl.load(start_ptr + b) + t.to(tl.int32), tl.load(lengths_ptr + b), S)
    variance = row_variance_from_tiles(statistics_ptr + pid * 3 * n_tiles, n_tiles, n_tiles, BLOCK_T)
    k = budget_from_variance(variance, tl.load(mean_variance_ptr), n_valid, k_base, k_min, k_max, RULE)
    tl.store(variance_ptr + out_row, variance)
    # Keys at or past n_valid are masked: the row ends there.
    count = select_row(scores_ptr + pid * S, 1, n_valid, k, indices_ptr + out_row * K, K, BLOCK_S)
    tl.store(counts_ptr + out_row, count)


def row_block(S: int) -> int:
    """Tile width of the passes over a row."""
    return min(max(triton.next_power_of_2(S), 16), 4096)
