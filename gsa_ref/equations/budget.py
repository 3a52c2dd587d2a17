"""Adaptive sparsity controller (Eq. 8)."""

import numpy as np


def score_variance(scores: np.ndarray) -> np.ndarray:
    """Population variance of each row of I over the positions that the query may see.

    Masked positions (−inf) do not count; NaN scores are left out. A row with no valid score gives 0.

    Args:
        scores: [L, S].

    Returns:
        float64 [L].
    """
    variance = np.zeros(scores.shape[0])
    for t, row in enumerate(np.asarray(scores, np.float64)):
        valid = row[~np.isnan(row) & (row != -np.inf)]
        if valid.size:
            mean = sum(valid) / valid.size
            variance[t] = sum((valid - mean) ** 2) / valid.size
    return variance


def token_budget(
    variance: np.ndarray,
    mean_variance: float,
    n_valid: np.ndarray,
    *,
    k_base: int,
    k_min: int,
    k_max: int,
    rule: str,
) -> np.ndarray:
    """Eq. 8: k_t = min(⌊clamp(k_base · ratio, k_min, k_max)⌋, n_t).

    The ratio is Var/V̄ for `rule="proportional"` (as printed), V̄/Var for `"inverse"` (as the prose says) and 1 for
    `"fixed"`. It is 1 as well while V̄ is unset (not above 0), and where it is undefined (NaN).

    Args:
        variance: Var(I[t,:]), [L].
        mean_variance: V̄, the running mean of the variance.
        n_valid: n_t, the number of keys that query t may see, [L].

    Returns:
        int32 [L].
    """
    budget = np.zeros(len(variance), np.int32)
    for t in range(len(variance)):
        ratio = _ratio(float(variance[t]), float(mean_variance), rule)
        k = np.floor(np.clip(k_base * ratio, k_min, k_max))
        budget[t] = min(int(k), int(n_valid[t]))
    return budget


def _ratio(variance: float, mean_variance: float, rule: str) -> float:
    if rule == "fixed" or not mean_variance > 0:
        return 1.0
    numerator, denominator = (variance, mean_variance) if rule == "proportional" else (mean_variance, variance)
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
        ratio = float(np.float64(numerator) / np.float64(denominator))
    return 1.0 if np.isnan(ratio) else ratio
