"""Adaptive sparsity controller (Eq. 8): kernels, launchers, custom ops."""

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

import gsa_ref
from gsa_fast._backend import no_backward, use_triton
from gsa_ref._arguments import check_budget_arguments, check_scores

RULE_CODES = {"proportional": 0, "inverse": 1, "fixed": 2}
MAX_TILE = 1024  # scores that a program holds at a time


@triton.jit
def merge_moments(n_a, mean_a, m2_a, n_b, mean_b, m2_b):
    """(n, mean, M2) of the union of two sets (Chan, Golub and LeVeque 1983). Either may be empty."""
    n = n_a + n_b
    delta = mean_b - mean_a
    share_b = n_b / tl.maximum(n, 1.0)
    return n, mean_a + delta * share_b, m2_a + m2_b + delta * delta * n_a * share_b


@triton.jit
def budget_from_variance(variance, mean_variance, n_valid, k_base, k_min, k_max, RULE: tl.constexpr):
    """k_t = min(⌊clamp(k_base · ratio, k_min, k_max)⌋, n_t); the ratio is 1 while V̄ is unset and where undefined."""
    ratio = variance * 0.0 + 1.0
    if RULE == 0:
        ratio = tl.div_rn(variance, mean_variance)
    if RULE == 1:
        ratio = tl.div_rn(mean_variance, variance)
    # Two steps: the interpreter cannot broadcast a scalar condition against a block.
    ratio = tl.where(ratio == ratio, ratio, 1.0)
    ratio = tl.where(mean_variance > 0, ratio, 1.0)
    k = tl.minimum(tl.maximum(k_base * ratio, k_min * 1.0), k_max * 1.0)
    return tl.minimum(tl.floor(k).to(tl.int32), n_valid)


@triton.jit
def row_variance_from_tiles(p_row, n_tiles, used, BLOCK_T: tl.constexpr):
    """Population variance of a row from (n, mean, M2) of its first `used` tiles, stored as [3, n_tiles] at p_row."""
    n = 0.0
    mean = 0.0
    m2 = 0.0
    for first in range(0, used, BLOCK_T):
        tile = first + tl.arange(0, BLOCK_T)
        n_i = tl.load(p_row + tile, mask=tile < used, other=0.0)
        mean_i = tl.load(p_row + n_tiles + tile, mask=tile < used, other=0.0)
        m2_i = tl.load(p_row + 2 * n_tiles + tile, mask=tile < used, other=0.0)
        pivot = tl.load(p_row + n_tiles + first)  # tiles with one mean have exactly that mean together
        # The `where` keeps the compiler from fusing the product and the sum: threads would round differently, and could
        # then disagree on k_t. Both sums in one exchange between warps.
        distance_i = tl.where(tile < used, n_i * (mean_i - pivot), 0.0)
        block_n, distance = tl.split(tl.sum(tl.join(n_i, distance_i), axis=0))
        block_mean = pivot + distance / tl.maximum(block_n, 1.0)
        delta_i = mean_i - block_mean
        block_m2 = tl.sum(m2_i + n_i * delta_i * delta_i, axis=0)
        n, mean, m2 = merge_moments(n, mean, m2, block_n, block_mean, block_m2)
    return m2 / tl.maximum(n, 1.0)


@triton.jit
def score_variance_kernel(
    scores_ptr, variance_ptr, stride_b, stride_l, stride_s, L, S, BLOCK_S: tl.constexpr
):  # fmt: skip
    """Population variance of one row of I over its valid scores, one pass, tile by tile."""
    pid = tl.program_id(0).to(tl.int64)
    p_row = scores_ptr + (pid // L) * stride_b + (pid % L) * stride_l
    n = 0.0
    mean = 0.0
    m2 = 0.0
    for first in range(0, S, BLOCK_S):
        s = (first + tl.arange(0, BLOCK_S)).to(tl.int64)
        x = tl.load(p_row + s * stride_s, mask=s < S, other=float("-inf"))
        counted = (x == x) & (x != float("-inf"))
        tile_n = tl.sum(counted.to(tl.float32), axis=0)
        tile_mean = tl.sum(tl.where(counted, x, 0.0), axis=0) / tl.maximum(tile_n, 1.0)
        deviation = tl.where(counted, x - tile_mean, 0.0)
        n, mean, m2 = merge_moments(n, mean, m2, tile_n, tile_mean, tl.sum(deviation * deviation, axis=0))
    tl.store(variance_ptr + pid, m2 / tl.maximum(n, 1.0))


@triton.jit
def token_budget_kernel(
    variance_ptr, mean_variance_ptr, n_valid_ptr, budget_ptr,
    stride_vb, stride_vl, stride_nb, stride_nl,
    L, n_rows, k_base, k_min, k_max,
    RULE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Eq. 8 for BLOCK rows."""
    i = (tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)).to(tl.int64)
    inside = i < n_rows
    b, t = i // L, i % L
    variance = tl.load(variance_ptr + b * stride_vb + t * stride_vl, mask=inside, other=0.0)
    n_valid = tl.load(n_valid_ptr + b * stride_nb + t * stride_nl, mask=inside, other=0)
    mean_variance = tl.load(mean_variance_ptr)
    k = budget_from_variance(variance, mean_variance, n_valid, k_base, k_min, k_max, RULE)
    tl.store(budget_ptr + i, k, mask=inside)


@torch.library.custom_op("gsa_fast::score_variance", mutates_args=())
def _score_variance(scores: Tensor) -> Tensor:
    B, L, S = scores.shape
    variance = scores.new_zeros(B, L)
    if variance.numel():
        block = min(triton.next_power_of_2(max(S, 1)), MAX_TILE)
        score_variance_kernel[(B * L,)](scores, variance, *scores.stride(), L, S, BLOCK_S=block)
    return variance


@_score_variance.register_fake
def _(scores: Tensor) -> Tensor:
    return scores.new_empty(scores.shape[:2])


no_backward("score_variance")


@torch.library.custom_op("gsa_fast::token_budget", mutates_args=())
def _token_budget(
    variance: Tensor, mean_variance: Tensor, n_valid: Tensor, k_base: int, k_min: int, k_max: int, rule: str
) -> Tensor:
    B, L = variance.shape
    budget = torch.empty((B, L), dtype=torch.int32, device=variance.device)
    if budget.numel():
        token_budget_kernel[(triton.cdiv(B * L, 256),)](
            variance, mean_variance, n_valid, budget, *variance.stride(), *n_valid.stride(),
            L, B * L, k_base, k_min, k_max, RULE=RULE_CODES[rule], BLOCK=256,
        )  # fmt: skip
    return budget


@_token_budget.register_fake
def _(
    variance: Tensor, mean_variance: Tensor, n_valid: Tensor, k_base: int, k_min: int, k_max: int, rule: str
) -> Tensor:
    return torch.empty(variance.shape, dtype=torch.int32, device=variance.device)


def score_variance(scores: Tensor, *, impl: str = "auto") -> Tensor:
    """Variance of each row of I on the GPU: `gsa_ref.score_variance` with the same arguments, plus `impl`.

    Args:
        scores: float32 [B, L, S], −inf where masked; NaN scores are left out.
        impl: "auto", "triton" or "reference", as in `indexer_scores`.

    Returns:
        float32 [B, L], population variance (divided by n), 0 for a row with no valid score.
    """
    check_scores(scores)
    if not use_triton(impl, scores=scores):
        return gsa_ref.score_variance(scores)
    return _score_variance(scores)


def token_budget(
    variance: Tensor,
    mean_variance: float | Tensor,
    n_valid: Tensor,
    *,
    k_base: int,
    k_min: int,
    k_max: int,
    rule: str,
    impl: str = "auto",
) -> Tensor:
    """Eq. 8 on the GPU: `gsa_ref.token_budget` with the same arguments, plus `impl`.

    Args:
        variance: float32 [B, L].
        mean_variance: V̄, a float or a scalar tensor; 0 means unset.
        n_valid: int32 [B, L].
        k_base, k_min, k_max: in tokens.
        rule: "proportional", "inverse" or "fixed".
        impl: "auto", "triton" or "reference", as in `indexer_scores`.

    Returns:
        int32 [B, L], in tokens; equal to the reference in float32, bit for bit.
    """
    sizes = {"k_base": k_base, "k_min": k_min, "k_max": k_max}
    check_budget_arguments(variance, mean_variance, n_valid, **sizes, rule=rule)
    if not use_triton(impl, variance=variance):
        return gsa_ref.token_budget(variance, mean_variance, n_valid, **sizes, rule=rule)
    mean = as_scalar(mean_variance, variance.device)
    return _token_budget(variance, mean, n_valid, **sizes, rule=rule)


def as_scalar(mean_variance: float | Tensor, device: torch.device) -> Tensor:
    """V̄ as the float32 scalar tensor that the kernels read, without waiting for the device."""
    if isinstance(mean_variance, Tensor):
        return mean_variance.detach().to(torch.float32)
    if abs(mean_variance) > torch.finfo(torch.float32).max:  # torch.full refuses to round it
        mean_variance = math.inf if mean_variance > 0 else -math.inf
    return torch.full((), mean_variance, dtype=torch.float32, device=device)
