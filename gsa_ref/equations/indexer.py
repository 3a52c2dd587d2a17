"""Gated lightning indexer (Eq. 7)."""

import numpy as np

from gsa_ref.equations.gates import sigmoid


def indexer_scores(
    q_idx: np.ndarray,
    k_idx: np.ndarray,
    head_logits: np.ndarray,
    bias: np.ndarray,
    *,
    scale: float,
    start: int = 0,
    length: int | None = None,
) -> np.ndarray:
    """Eq. 7: I[t,s] = Σ_j σ(head_logits[t,j]) · σ(scale · q^I[t,j]·k^I[s] + b_j).

    Args:
        q_idx: q^I, [L, H_I, d_I], one query per indexer head.
        k_idx: k^I, [S, d_I], ONE key shared by all indexer heads.
        head_logits: h_t · W_j^{Iw}, [L, H_I].
        bias: b, [H_I].
        scale: factor on the inner product (Eq. 7 prints none; the project's default is 1/√d_I).
        start: position of query 0. Query t sees the keys s ≤ start + t.
        length: number of valid keys, default S. Keys at or past it are padding, and so are queries.

    Returns:
        float64 [L, S], in (0, H_I) where query t may look, −inf where it may not.
    """
    q_idx, k_idx = np.asarray(q_idx, np.float64), np.asarray(k_idx, np.float64)
    L, H_I, _ = q_idx.shape
    S = k_idx.shape[0]
    length = S if length is None else length
    weight = sigmoid(head_logits)
    scores = np.full((L, S), -np.inf)
    for t in range(L):
        n_valid = min(start + t + 1, length, S) if start + t < length else 0
        visible = k_idx[:n_valid]
        total = np.zeros(n_valid)
        for j in range(H_I):
            total += weight[t, j] * sigmoid(scale * (visible @ q_idx[t, j]) + float(bias[j]))
        scores[t, :n_valid] = total
    return scores
