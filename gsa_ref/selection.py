"""Top-k token selection with a budget per query."""

from typing import NamedTuple

import torch
from jaxtyping import Float, Int32
from torch import Tensor

from gsa_ref._arguments import (
    MOST_TOKENS,
    check_budget_sizes,
    check_int,
    check_mean_variance,
    check_same_device,
    check_selection_arguments,
    check_slots,
)
from gsa_ref.budget import score_variance, token_budget
from gsa_ref.config import GSAConfig, check_config
from gsa_ref.indexer import indexer_scores, visible


class Selection(NamedTuple):
    """The selected positions of each query, shared by all heads.

    Attributes:
        indices: int32 [B, L, K], ascending, −1 in the tail.
        counts: int32 [B, L], number of entries before the tail. Slots at or past it are ignored.
    """

    indices: Int32[Tensor, "B L K"]
    counts: Int32[Tensor, "B L"]

    def validate(self, n_keys: int | None = None) -> None:
        """Check the contract on the values. It waits for the device; the library itself never calls it.

        Args:
            n_keys: S; if given, indices must be below it.

        Raises:
            TypeError: wrong type or dtype.
            ValueError: wrong shape or device, or n_keys < 0; a count is out of range, an index is negative, repeated,
                not ascending or too large, or the tail is not −1. The message names the first offending row.
        """
        check_slots(self.indices, self.counts, {})
        check_same_device(indices=self.indices, counts=self.counts)
        if n_keys is not None:
            check_int("n_keys", n_keys, 0)
        indices, counts = self.indices.cpu(), self.counts.cpu()
        K = indices.shape[-1]
        slot = torch.arange(K)
        filled = slot < counts[..., None]
        problems = {
            f"counts: expected 0 ≤ count ≤ {K}": (counts < 0) | (counts > K),
            "indices: expected −1 in every slot at or past the count": (~filled & (indices != -1)).any(-1),
            "indices: expected no negative index before the tail": (filled & (indices < 0)).any(-1),
            "indices: expected strictly ascending (no duplicates)": (
                filled[..., 1:] & (indices[..., 1:] <= indices[..., :-1])
            ).any(-1),
        }
        if n_keys is not None:
            problems[f"indices: expected below n_keys = {n_keys}"] = (filled & (indices >= n_keys)).any(-1)
        for message, bad in problems.items():
            if bad.any():
                b, t = bad.nonzero()[0].tolist()
                raise ValueError(f"{message}, got count {counts[b, t]} and {indices[b, t].tolist()} in row [{b}, {t}]")


def select_tokens(
    scores: Float[Tensor, "B L S"], budget: Int32[Tensor, "B L"], *, width: int | None = None
) -> Selection:
    """S_t: the k_t highest-scoring positions of each row.

    Ties go to the LOWER position (−0 equals +0). A NaN score ranks last. Masked positions (−inf) are never selected.

    Args:
        scores: I, float32 or float64, −inf where masked.
        budget: k_t. A row gets min(k_t, width, number of valid positions) entries, none if k_t < 1.
        width: K, the number of slots. Default: the largest budget, at most 2^24, which waits for the device.

    Raises:
        TypeError: wrong type or dtype.
        ValueError: wrong shape or device, width < 1, or more than 2^24 slots.
    """
    check_selection_arguments(scores, budget, width)
    S = scores.shape[-1]
    width = largest_budget(budget) if width is None else width
    candidate = scores != -torch.inf
    counts = torch.minimum(candidate.sum(-1), budget.clamp(0, width)).to(torch.int32)
    # Two stable sorts, the major key last: by score (NaN as −inf), then candidates before masked positions.
    order = torch.sort(scores.masked_fill(scores.isnan(), -torch.inf), dim=-1, descending=True, stable=True)[1]
    is_candidate = candidate.gather(-1, order).to(torch.int8)
    order = order.gather(-1, torch.sort(is_candidate, dim=-1, descending=True, stable=True)[1])
    order = torch.nn.functional.pad(order[..., :width], (0, max(width - S, 0)), value=S)
    filled = torch.arange(width, device=scores.device) < counts[..., None]
    indices = order.masked_fill(~filled, S).sort(-1)[0]  # S sorts behind every position
    return Selection(indices.masked_fill(~filled, -1).to(torch.int32), counts)


def largest_budget(budget: Tensor) -> int:
    """The number of slots that budgets ask for, at least 1. It waits for the device."""
    largest = max(int(budget.max()), 1) if budget.numel() else 1
    if largest > MOST_TOKENS:
        raise ValueError(f"budget: expected at most {MOST_TOKENS} where width is None, got {largest}")
    return largest


def indexed_selection(
    q_idx: Float[Tensor, "B L H_I d_I"],
    k_idx: Float[Tensor, "B S d_I"],
    head_logits: Float[Tensor, "B L H_I"],
    bias: Float[Tensor, " H_I"],
    *,
    mean_variance: float | Float[Tensor, ""],
    config: GSAConfig,
    start: int | Int32[Tensor, " B"] = 0,
    lengths: Int32[Tensor, " B"] | None = None,
) -> tuple[Selection, Float[Tensor, "B L"]]:
    """Eq. 7, Eq. 8 and the selection in one step: scores → variance → k_t → S_t.

    Args:
        q_idx, k_idx, head_logits, bias, start, lengths: as in `indexer_scores`.
        mean_variance: V̄; 0 means unset.
        config: gives the indexer's scale, the budget's sizes and its rule.

    Returns:
        The selection with K = min(k_max, S) slots, and Var(I[t,:]) (0 for a row that sees nothing).

    Raises:
        TypeError: wrong type or dtype.
        ValueError: wrong shape, device or a negative start.
    """
    check_selection_config(config, mean_variance, q_idx)
    scores = indexer_scores(
        q_idx, k_idx, head_logits, bias, scale=config.effective_indexer_scale, start=start, lengths=lengths
    )
    B, L, S = scores.shape
    variance = score_variance(scores)
    n_valid = visible(L, S, start, lengths, scores.device).sum(-1, dtype=torch.int32).expand(B, L)
    budget = token_budget(
        variance,
        mean_variance,
        n_valid,
        k_base=config.k_base,
        k_min=config.k_min,
        k_max=config.k_max,
        rule=config.rule,
    )
    return select_tokens(scores, budget, width=max(min(config.k_max, S), 1)), variance


def check_selection_config(config: GSAConfig, mean_variance: float | Tensor, like: Tensor) -> None:
    """The checks of `indexed_selection` that `indexer_scores` does not make."""
    check_config("config", config)
    check_budget_sizes(config.k_base, config.k_min, config.k_max, config.rule)
    check_mean_variance(mean_variance, like)
