"""The indexer's loss in training (Eq. 15) and its gradient, derived by hand."""

import numpy as np

from gsa_ref.equations.gates import sigmoid
from gsa_ref.equations.indexer import indexer_scores


def teacher(
    q: np.ndarray, k: np.ndarray, positions: list[np.ndarray], *, scale: float | None = None
) -> list[np.ndarray]:
    """p_t[s] = (1/H) Σ_h softmax_s(scale · q[t,h]·k[s]), the mean of the attention heads over the given positions.

    Args:
        q: [L, H, d_h].
        k: [S, H_kv, d_h]; query head h reads key head ⌊h / (H/H_kv)⌋.
        positions: what the softmax of row t runs over, one integer array per query.
        scale: default 1/√d_h.

    Returns:
        One float64 array per query, as long as its positions.
    """
    q, k = np.asarray(q, np.float64), np.asarray(k, np.float64)
    L, H, d_h = q.shape
    group = H // k.shape[1]
    scale = 1 / np.sqrt(d_h) if scale is None else scale
    return [sum(_softmax(scale * (k[positions[t], h // group] @ q[t, h])) for h in range(H)) / H for t in range(L)]


def valid_positions(
    L: int, S: int, selection: list[np.ndarray] | None, *, start: int = 0, length: int | None = None
) -> list[np.ndarray]:
    """What the distributions of each row run over: every visible position, or S_t. Nothing for padding.

    Args:
        selection: S_t, one integer array per query, or None for the dense warm-up.
        start: position of query 0. Query t sees the positions s ≤ start + t.
        length: number of valid positions, default S. A row at or past it is padding.
    """
    length = S if length is None else length
    positions = []
    for t in range(L):
        seen = np.arange(min(start + t + 1, S)) if selection is None else selection[t]
        positions.append(seen if start + t < length else seen[:0])
    return positions


def indexer_kl_loss(
    q_idx: np.ndarray,
    k_idx: np.ndarray,
    head_logits: np.ndarray,
    bias: np.ndarray,
    q: np.ndarray,
    k: np.ndarray,
    *,
    indexer_scale: float,
    selection: list[np.ndarray] | None = None,
    scale: float | None = None,
    temperature: float = 1.0,
    start: int = 0,
    length: int | None = None,
) -> float:
    """Eq. 15 (second-hand): the mean over the valid rows t of KL(p_t ‖ softmax(I_t / τ)), I of Eq. 7.

    A row is valid if it has a position, see `valid_positions`. Without a valid row the loss is 0.

    Args:
        q_idx, k_idx, head_logits, bias: as in `indexer_scores`.
        q, k, scale: as in `teacher`.
        indexer_scale: factor on q^I·k^I in Eq. 7.
        temperature: τ.
        selection, start, length: as in `valid_positions`.
    """
    scores = indexer_scores(q_idx, k_idx, head_logits, bias, scale=indexer_scale, start=start, length=length)
    positions = valid_positions(len(q), len(k), selection, start=start, length=length)
    p = teacher(q, k, positions, scale=scale)
    rows = []
    for t, over in enumerate(positions):
        if len(over) == 0:
            continue
        student = _softmax(scores[t, over] / temperature)
        rows.append(sum(p_s * np.log(p_s / student_s) for p_s, student_s in zip(p[t], student, strict=True) if p_s > 0))
    return float(sum(rows) / len(rows)) if rows else 0.0


def indexer_kl_gradient(
    q_idx: np.ndarray,
    k_idx: np.ndarray,
    head_logits: np.ndarray,
    bias: np.ndarray,
    q: np.ndarray,
    k: np.ndarray,
    *,
    indexer_scale: float,
    selection: list[np.ndarray] | None = None,
    scale: float | None = None,
    temperature: float = 1.0,
    start: int = 0,
    length: int | None = None,
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """The gradient of `indexer_kl_loss`, with the same arguments.

    Of one row, ∂L_t/∂I[t,s] = (softmax(I_t / τ)[s] − p_t[s]) / τ. With w_j = head_logits[t,j] and
    z_j = scale·q^I[t,j]·k^I[s] + b_j, Eq. 7 is I = Σ_j σ(w_j) σ(z_j), and σ' = σ (1 − σ).

    Returns:
        Those of q_idx [L, H_I, d_I], k_idx [S, d_I], head_logits [L, H_I] and bias [H_I]. The teacher has none.
    """
    scores = indexer_scores(q_idx, k_idx, head_logits, bias, scale=indexer_scale, start=start, length=length)
    q_idx, k_idx, head_logits, bias = (np.asarray(x, np.float64) for x in (q_idx, k_idx, head_logits, bias))
    positions = valid_positions(len(q), len(k), selection, start=start, length=length)
    p = teacher(q, k, positions, scale=scale)
    n_rows = sum(len(over) > 0 for over in positions)
    weight = sigmoid(head_logits)
    dq, dk, dw, db = (np.zeros(x.shape) for x in (q_idx, k_idx, head_logits, bias))
    for t, over in enumerate(positions):
        if len(over) == 0:
            continue
        dI = (_softmax(scores[t, over] / temperature) - p[t]) / temperature / n_rows
        for j in range(len(bias)):
            w, gate = weight[t, j], sigmoid(indexer_scale * (k_idx[over] @ q_idx[t, j]) + bias[j])
            dw[t, j] = w * (1 - w) * sum(dI * gate)
            dz = dI * w * gate * (1 - gate)
            dq[t, j] = indexer_scale * (dz @ k_idx[over])
            dk[over] += indexer_scale * np.outer(dz, q_idx[t, j])
            db[j] += sum(dz)
    return dq, dk, dw, db


def _softmax(x: np.ndarray) -> np.ndarray:
    e = np.exp(x - x.max(initial=-np.inf))
    return e / e.sum()
