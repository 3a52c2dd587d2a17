"""Top-k token selection with a budget per query: kernels, launchers, custom ops.

A row is never sorted. Its κ-th largest score is found by bisection between its smallest and largest score, on an
order-preserving integer key, one counting pass over the row per step; a last pass writes the positions, ascending.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

import gsa_ref
from gsa_fast._backend import no_backward, per_sequence, use_triton
from gsa_fast._primitives import count_visible
from gsa_fast.budget import RULE_CODES, as_scalar, budget_from_variance, row_variance_from_tiles
from gsa_fast.indexer import launch_indexer_scores, statistics_tiles
from gsa_ref import GSAConfig, Selection
from gsa_ref._arguments import check_indexer_arguments, check_selection_arguments
from gsa_ref.selection import check_selection_config

# Scores of one chunk of query rows, the only array of width S that `indexed_selection` ever holds.
CHUNK_BYTES = 256 * 2**20

MAX_STATISTICS = 1024  # statistics of tiles that a program merges at a time

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
    variance = row_variance_from_tiles(statistics_ptr + pid * 3 * n_tiles, n_tiles, BLOCK_T)
    k = budget_from_variance(variance, tl.load(mean_variance_ptr), n_valid, k_base, k_min, k_max, RULE)
    tl.store(variance_ptr + out_row, variance)
    # Keys at or past n_valid are masked: the row ends there.
    count = select_row(scores_ptr + pid * S, 1, n_valid, k, indices_ptr + out_row * K, K, BLOCK_S)
    tl.store(counts_ptr + out_row, count)


def row_block(S: int) -> int:
    """Tile width of the passes over a row."""
    return min(max(triton.next_power_of_2(S), 16), 4096)


@torch.library.custom_op("gsa_fast::select_tokens", mutates_args=())
def _select_tokens(scores: Tensor, budget: Tensor, width: int) -> tuple[Tensor, Tensor]:
    B, L, S = scores.shape
    indices = torch.empty((B, L, width), dtype=torch.int32, device=scores.device)
    counts = torch.empty((B, L), dtype=torch.int32, device=scores.device)
    if counts.numel():
        select_tokens_kernel[(B * L,)](
            scores, budget, indices, counts, *scores.stride(), *budget.stride(), L, S, width, BLOCK_S=row_block(S)
        )
    return indices, counts


@_select_tokens.register_fake
def _(scores: Tensor, budget: Tensor, width: int) -> tuple[Tensor, Tensor]:
    indices = torch.empty((*scores.shape[:2], width), dtype=torch.int32, device=scores.device)
    return indices, torch.empty(scores.shape[:2], dtype=torch.int32, device=scores.device)


def select_tokens(scores: Tensor, budget: Tensor, *, width: int | None = None, impl: str = "auto") -> Selection:
    """S_t on the GPU: `gsa_ref.select_tokens` with the same arguments, plus `impl`.

    Args:
        scores: float32 [B, L, S], −inf where masked.
        budget: int32 [B, L].
        width: K, the number of slots. Default: the largest budget, which waits for the device.
        impl: "auto", "triton" or "reference", as in `indexer_scores`.

    Returns:
        The same selection as the reference, index for index: higher score first, then the lower position; NaN last.
    """
    check_selection_arguments(scores, budget, width)
    if not use_triton(impl, scores=scores):
        return gsa_ref.select_tokens(scores, budget, width=width)
    if width is None:
        width = max(int(budget.max()), 1) if budget.numel() else 1
    return Selection(*_select_tokens(scores, budget, width))


@torch.library.custom_op("gsa_fast::indexed_selection", mutates_args=())
def _indexed_selection(
    q_idx: Tensor,
    k_idx: Tensor,
    head_logits: Tensor,
    bias: Tensor,
    mean_variance: Tensor,
    start: Tensor,
    lengths: Tensor,
    scale: float,
    k_base: int,
    k_min: int,
    k_max: int,
    rule: str,
    width: int,
) -> tuple[Tensor, Tensor, Tensor]:
    (B, L), S = q_idx.shape[:2], k_idx.shape[1]
    device = q_idx.device
    indices = torch.full((B, L, width), -1, dtype=torch.int32, device=device)
    counts = torch.zeros((B, L), dtype=torch.int32, device=device)
    variance = torch.zeros((B, L), dtype=torch.float32, device=device)
    if B * L * S == 0:
        return indices, counts, variance
    rows = max(1, min(L, CHUNK_BYTES // (4 * B * S)))
    n_tiles = statistics_tiles(S)
    scores_buffer = torch.empty(B * rows * S, dtype=torch.float32, device=device)
    statistics_buffer = torch.empty(B * rows * 3 * n_tiles, dtype=torch.float32, device=device)
    for first_row in range(0, L, rows):
        chunk = slice(first_row, min(first_row + rows, L))
        n_rows = chunk.stop - first_row
        scores = scores_buffer[: B * n_rows * S].view(B, n_rows, S)
        statistics = statistics_buffer[: B * n_rows * 3 * n_tiles].view(B, n_rows, 3, n_tiles)
        launch_indexer_scores(
            q_idx[:, chunk], k_idx, head_logits[:, chunk], bias, start, lengths, scale,
            scores=scores, statistics=statistics, first_row=first_row,
        )  # fmt: skip
        budget_and_select_kernel[(B * n_rows,)](
            scores, statistics, mean_variance, start, lengths, indices, counts, variance,
            n_rows, first_row, L, S, width, n_tiles, k_base, k_min, k_max,
            RULE=RULE_CODES[rule], BLOCK_S=row_block(S), BLOCK_T=min(triton.next_power_of_2(n_tiles), MAX_STATISTICS),
        )  # fmt: skip
    return indices, counts, variance


@_indexed_selection.register_fake
def _(
    q_idx: Tensor,
    k_idx: Tensor,
    head_logits: Tensor,
    bias: Tensor,
    mean_variance: Tensor,
    start: Tensor,
    lengths: Tensor,
    scale: float,
    k_base: int,
    k_min: int,
    k_max: int,
    rule: str,
    width: int,
) -> tuple[Tensor, Tensor, Tensor]:
    rows, device = q_idx.shape[:2], q_idx.device
    return (
        torch.empty((*rows, width), dtype=torch.int32, device=device),
        torch.empty(rows, dtype=torch.int32, device=device),
        torch.empty(rows, dtype=torch.float32, device=device),
    )


no_backward("indexed_selection")


def indexed_selection(
    q_idx: Tensor,
    k_idx: Tensor,
    head_logits: Tensor,
    bias: Tensor,
    *,
    mean_variance: float | Tensor,
    config: GSAConfig,
    start: int | Tensor = 0,
    lengths: Tensor | None = None,
    impl: str = "auto",
) -> tuple[Selection, Tensor]:
    """Eq. 7, Eq. 8 and the selection on the GPU: `gsa_ref.indexed_selection` with the same arguments, plus `impl`.

    Scores exist for one chunk of query rows at a time (at most `CHUNK_BYTES`, and one row per sequence at least): no
    L×S array is ever held.

    Args:
        q_idx, k_idx, head_logits, bias, start, lengths: as in `indexer_scores`.
        mean_variance: V̄; 0 means unset.
        config: gives the indexer's scale, the budget's sizes and its rule.
        impl: "auto", "triton" or "reference", as in `indexer_scores`.

    Returns:
        The selection with K = min(k_max, S) slots, and Var(I[t,:]), float32 [B, L].
    """
    scale = config.effective_indexer_scale if isinstance(config, GSAConfig) else 1.0
    check_indexer_arguments(q_idx, k_idx, head_logits, bias, scale=scale, start=start, lengths=lengths)
    check_selection_config(config, mean_variance, q_idx)
    if not use_triton(impl, q_idx=q_idx, k_idx=k_idx, head_logits=head_logits, bias=bias):
        return gsa_ref.indexed_selection(
            q_idx, k_idx, head_logits, bias,
            mean_variance=mean_variance, config=config, start=start, lengths=lengths,
        )  # fmt: skip
    B, S = k_idx.shape[:2]
    device = q_idx.device
    indices, counts, variance = _indexed_selection(
        q_idx,
        k_idx,
        head_logits,
        bias,
        as_scalar(mean_variance, device),
        per_sequence(start, 0, B, device),
        per_sequence(lengths, S, B, device),
        scale,
        config.k_base,
        config.k_min,
        config.k_max,
        config.rule,
        max(min(config.k_max, S), 1),
    )
    return Selection(indices, counts), variance
