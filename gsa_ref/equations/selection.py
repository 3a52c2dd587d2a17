"""Top-k token selection."""

import numpy as np


def select_tokens(scores: np.ndarray, budget: np.ndarray) -> list[np.ndarray]:
    """S_t: the k_t highest-scoring positions of each row.

    Ties go to the LOWER position. A NaN score ranks last. Masked positions (−inf) are never selected.

    Args:
        scores: I, [L, S].
        budget: k_t, integers [L].

    Returns:
        One ascending int array per row, with min(k_t, number of valid positions) entries.
    """
    selection = []
    for row, k in zip(np.asarray(scores), budget, strict=True):
        candidates = [s for s in range(len(row)) if row[s] != -np.inf]
        candidates.sort(key=lambda s: (np.isnan(row[s]), -row[s] if not np.isnan(row[s]) else 0.0, s))
        selection.append(np.array(sorted(candidates[: max(int(k), 0)]), np.int64))
    return selection
