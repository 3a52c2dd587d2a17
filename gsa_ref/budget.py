"""Adaptive sparsity controller (Eq. 8)."""

import torch
from jaxtyping import Float, Int32
from torch import Tensor

from gsa_ref._arguments import check_budget_arguments, check_scores


def score_variance(scores: Float[Tensor, "B L S"]) -> Float[Tensor, "B L"]:
    """Population variance of each row of I over the positions that the query may see.

    Masked positions (−inf) do not count; NaN scores are left out. A row with no valid score gives 0.

    Args:
        scores: I, float32 or float64, −inf where masked.

    Returns:
        Var(I[t,:]), the dtype of scores.

    Raises:
        TypeError: scores is not a float32 or float64 tensor.
        ValueError: scores is not [B, L, S].
    """
    check_scores(scores)
    valid = ~scores.isnan() & (scores != -torch.inf)
    n = valid.sum(-1).clamp(min=1)
    mean = scores.masked_fill(~valid, 0).sum(-1) / n
    deviation = (scores - mean[..., None]).masked_fill(~valid, 0)
    return (deviation * deviation).sum(-1) / n


def token_budget(
    variance: Float[Tensor, "B L"],
    mean_variance: float | Float[Tensor, ""],
    n_valid: Int32[Tensor, "B L"],
    *,
    k_base: int,
    k_min: int,
    k_max: int,
    rule: str,
) -> Int32[Tensor, "B L"]:
    """Eq. 8: k_t = min(⌊clamp(k_base · ratio, k_min, k_max)⌋, n_t).

    The ratio is Var/V̄ for `rule="proportional"` (as printed), V̄/Var for `"inverse"` (as the prose says) and 1 for
    `"fixed"`. It is 1 as well while V̄ is unset (not above 0), and where it is undefined (NaN).

    Args:
        variance: Var(I[t,:]), float32 or float64.
        mean_variance: V̄, the running mean of the variance; 0 means unset.
        n_valid: n_t, the number of keys that query t may see.
        k_base: budget at the mean variance, in tokens.
        k_min: smallest budget, in tokens.
        k_max: largest budget, in tokens.

    Returns:
        k_t, in tokens.

    Raises:
        TypeError: wrong type or dtype.
        ValueError: wrong shape or device, a size below 1, k_min above k_max, or an unknown rule.
    """
    check_budget_arguments(variance, mean_variance, n_valid, k_base=k_base, k_min=k_min, k_max=k_max, rule=rule)
    mean = torch.as_tensor(mean_variance, dtype=variance.dtype, device=variance.device)
    if rule == "proportional":
        ratio = variance / mean
    elif rule == "inverse":
        ratio = mean / variance
    else:
        ratio = torch.ones_like(variance)
    ratio = torch.where((mean > 0) & ~ratio.isnan(), ratio, 1.0)
    k = (k_base * ratio).clamp(k_min, k_max).floor().to(torch.int32)
    return torch.minimum(k, n_valid)
