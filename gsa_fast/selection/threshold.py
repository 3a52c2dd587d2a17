"""Thresholds from a sample of the keys: down to which score a row is shortlisted."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from gsa_fast._primitives import count_visible
from gsa_fast.budget import budget_from_variance
from gsa_fast.selection.scores import LOG2_E, load_queries, score_tile


@triton.jit
def sample_scores_kernel(
    q_ptr, k_ptr, weight_ptr, bias_ptr, samples_ptr,
    stride_qb, stride_ql, stride_qh, stride_qd, stride_kb, stride_ks, stride_kd,
    stride_wb, stride_wl, stride_wh, stride_bias,
    rows, n_samples, scale,
    H_I: tl.constexpr, d_I: tl.constexpr, BLOCK_L: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_D: tl.constexpr,
    TILES: tl.constexpr, APPROXIMATE: tl.constexpr,
):  # fmt: skip
    """Scores of BLOCK_L queries for TILES tiles of the sampled keys, visible or not."""
    row_tiles = tl.cdiv(rows, BLOCK_L)
    pid = tl.program_id(0)
    tile_l = pid % row_tiles
    split = (pid // row_tiles) % tl.cdiv(n_samples, TILES * BLOCK_S)
    b = (pid // row_tiles // tl.cdiv(n_samples, TILES * BLOCK_S)).to(tl.int64)
    row = tile_l * BLOCK_L + tl.arange(0, BLOCK_L)
    inside = row < rows
    c = tl.arange(0, BLOCK_D).to(tl.int64)
    b_q, weight, bias = load_queries(
        q_ptr + b * stride_qb, weight_ptr + b * stride_wb, bias_ptr, stride_ql, stride_qh, stride_qd,
        stride_wl, stride_wh, stride_bias, row, inside, H_I, d_I, BLOCK_D,
    )  # fmt: skip
    p_samples = samples_ptr + (b * rows + row.to(tl.int64))[:, None] * n_samples
    for tile in range(split * TILES, tl.minimum((split + 1) * TILES, tl.cdiv(n_samples, BLOCK_S))):
        i = tile * BLOCK_S + tl.arange(0, BLOCK_S)
        b_k = tl.load(
            k_ptr + b * stride_kb + i.to(tl.int64)[:, None] * stride_ks + c[None, :] * stride_kd,
            mask=(i < n_samples)[:, None] & (c < d_I)[None, :],
            other=0.0,
        )  # [BLOCK_S, BLOCK_D]
        scores = score_tile(b_q, weight, bias, b_k, -scale * LOG2_E, H_I, APPROXIMATE)
        tl.store(p_samples + i[None, :], scores, mask=inside[:, None] & (i < n_samples)[None, :])


@triton.jit
def threshold_kernel(
    samples_ptr, positions_ptr, mean_variance_ptr, start_ptr, lengths_ptr, threshold_ptr, tie_ptr,
    rows, first_row, first_sampled, chunk_rows, S, n_samples, k_base, k_min, k_max, K, stride, z,
    RULE: tl.constexpr, CAPACITY: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The score, and the position among equal scores, that the shortlist of a row reaches down to.

    The best r samples stand for about r · stride keys: r is the number of samples expected above the κ-th key plus z
    standard deviations. κ is estimated from the samples too.
    """
    pid = tl.program_id(0).to(tl.int64)  # sampled row
    b, t = pid // rows, first_row + pid % rows
    n_visible = count_visible(tl.load(start_ptr + b) + t.to(tl.int32), tl.load(lengths_ptr + b), S)
    threshold = 0.0 - 1.0  # a row that fits is shortlisted whole
    tie = S
    if n_visible > CAPACITY:
        i = tl.arange(0, BLOCK)
        position = tl.load(positions_ptr + i, mask=i < n_samples, other=S)
        x = tl.load(samples_ptr + pid * n_samples + i, mask=position < n_visible, other=-1.0)  # [BLOCK]
        counted = x >= 0.0  # and not NaN
        n = tl.sum(counted.to(tl.int32), axis=0)
        n_float = tl.maximum(n.to(tl.float32), 1.0)
        mean = tl.sum(tl.where(counted, x, 0.0), axis=0) / n_float
        variance = tl.sum(tl.where(counted, (x - mean) * (x - mean), 0.0), axis=0) / n_float
        k = budget_from_variance(variance, tl.load(mean_variance_ptr), n_visible, k_base, k_min, k_max, RULE)
        expected = tl.minimum(k, K).to(tl.float32) / stride
        # Variance of how many samples lie above the κ-th key: Poisson, and that of κ, whose relative variance is that
        # of a sampled variance, (kurtosis − 1)/n; 4 is generous.
        spread = expected + 4.0 * expected * expected / n_float
        r = tl.ceil(expected + 0.5 * z * z + z * tl.sqrt(spread + 0.25 * z * z)).to(tl.int32)
        if r < n:
            key = tl.where(counted, x, -1.0).to(tl.int32, bitcast=True)  # in the order of the scores, which are ≥ 0
            enough = r + r // 32
            # The interval that bisection starts from may miss the r-th sample: then the shortlist is longer.
            low = mean.to(tl.int32, bitcast=True)
            low = tl.where(tl.sum((key >= low).to(tl.int32), axis=0) >= r, low, 0)
            high = tl.maximum((mean + 6.0 * tl.sqrt(variance)).to(tl.int32, bitcast=True), low)
            exact = False
            while low < high:
                middle = low + (high - low + 1) // 2
                count = tl.sum((key >= middle).to(tl.int32), axis=0)
                exact = (count >= r) & (count <= enough)
                low = tl.where(count >= r, middle, low)
                high = tl.where(exact, middle, tl.where(count >= r, high, middle - 1))
            threshold = low.to(tl.float32, bitcast=True)
            if not exact:  # equal samples: take the r − count(greater) first of them
                equal = (key == low).to(tl.int32)
                wanted = r - tl.sum((key > low).to(tl.int32), axis=0)
                rank = tl.cumsum(equal, axis=0)
                last = (equal == 1) & (rank >= wanted)
                tie = tl.min(tl.where(last, tl.load(positions_ptr + i, mask=last, other=S), S), axis=0)
    chunk_row = b * chunk_rows + first_sampled + pid % rows
    tl.store(threshold_ptr + chunk_row, threshold)
    tl.store(tie_ptr + chunk_row, tie)


def sample_positions(S: int, stride: int, device: torch.device) -> Tensor:
    """One position of every `stride` keys, int32 ascending: not every stride-th, which a periodic input could meet."""
    block = torch.arange(triton.cdiv(S, stride), dtype=torch.int64, device=device)
    # Knuth's multiplicative hash, of the square: that of the block itself is nearly periodic.
    jitter = (block * block * 2654435761 >> 16) % stride
    return (block * stride + jitter).clamp_(max=S - 1).to(torch.int32)
