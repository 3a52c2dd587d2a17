"""Top-k token selection with a budget per query: launchers, custom ops, public functions.

Kernels: `rows` selects from stored scores. `streamed` never stores all scores of a row, only the few that may be
selected: `scores`, `threshold`, `shortlist` and `pick` are its steps.
"""

import torch
import triton
from torch import Tensor

import gsa_ref
from gsa_fast._backend import no_backward, per_sequence, use_triton
from gsa_fast.budget import RULE_CODES, as_scalar
from gsa_fast.indexer import launch_indexer_scores, statistics_tiles
from gsa_fast.selection.rows import budget_and_select_kernel, row_block, select_tokens_kernel
from gsa_fast.selection.streamed import launch_streamed_selection, shortlist_plan
from gsa_ref import GSAConfig, Selection
from gsa_ref._arguments import check_choice, check_indexer_arguments, check_selection_arguments
from gsa_ref.selection import check_selection_config, largest_budget

# Scores of one chunk of query rows, the only array of width S that `indexed_selection` ever holds.
CHUNK_BYTES = 256 * 2**20

SIGMOID_MODES = ("exact", "approximate")

MAX_STATISTICS = 1024  # statistics of tiles that a program merges at a time


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
        width: K, the number of slots. Default: the largest budget, at most 2^24, which waits for the device.
        impl: "auto", "triton" or "reference", as in `indexer_scores`.

    Returns:
        The same selection as the reference, index for index: higher score first, then the lower position; NaN last.
    """
    check_selection_arguments(scores, budget, width)
    if not use_triton(impl, scores=scores):
        return gsa_ref.select_tokens(scores, budget, width=width)
    return Selection(*_select_tokens(scores, budget, largest_budget(budget) if width is None else width))


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
    end: int,
    approximate: bool,
    width: int,
) -> tuple[Tensor, Tensor, Tensor]:
    (B, L), S = q_idx.shape[:2], k_idx.shape[1]
    device = q_idx.device
    indices = torch.empty((B, L, width), dtype=torch.int32, device=device)
    counts = torch.empty((B, L), dtype=torch.int32, device=device)
    variance = torch.empty((B, L), dtype=torch.float32, device=device)
    if B * L * S == 0:
        return indices.fill_(-1), counts.zero_(), variance.zero_()
    plan = shortlist_plan(S, width, k_base, *q_idx.shape[2:])
    if plan is not None:
        launch_streamed_selection(
            q_idx, k_idx, head_logits, bias, mean_variance, start, lengths, scale, k_base, k_min, k_max, rule,
            end, approximate, plan, indices=indices, counts=counts, variance=variance,
        )  # fmt: skip
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
    end: int,
    approximate: bool,
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
    sigmoid_mode: str = "exact",
    impl: str = "auto",
) -> tuple[Selection, Tensor]:
    """Eq. 7, Eq. 8 and the selection on the GPU: `gsa_ref.indexed_selection` with the same arguments, plus `impl`.

    No L×S array is ever held: most scores are never stored (`streamed`). With more indexer heads or channels than
    `streamed.MAX_HEADS` and `MAX_CHANNELS`, or budgets or a number of keys too large for a shortlist, those of one
    chunk of rows are, in at most `CHUNK_BYTES`, or one row per sequence.

    Args:
        q_idx, k_idx, head_logits, bias, start, lengths: as in `indexer_scores`.
        mean_variance: V̄; 0 means unset.
        config: gives the indexer's scale, the budget's sizes and its rule.
        sigmoid_mode: "exact" (float32) or "approximate" (one instruction, at most 2^−12 away: faster, within the ε of
            `gsa_ref.check.score_tolerance` for that mode). The reference, and stored scores, are always exact.
        impl: "auto", "triton" or "reference", as in `indexer_scores`.

    Returns:
        The selection with K = min(k_max, S) slots, and Var(I[t,:]), float32 [B, L].
    """
    scale = config.effective_indexer_scale if isinstance(config, GSAConfig) else 1.0
    check_indexer_arguments(q_idx, k_idx, head_logits, bias, scale=scale, start=start, lengths=lengths)
    check_selection_config(config, mean_variance, q_idx)
    check_choice("sigmoid_mode", sigmoid_mode, SIGMOID_MODES)
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
        (S if isinstance(start, Tensor) else start) + q_idx.shape[1],
        sigmoid_mode == "approximate",
        max(min(config.k_max, S), 1),
    )
    return Selection(indices, counts), variance
