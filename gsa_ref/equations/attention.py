"""Sparse scaled dot-product attention over the selected tokens."""

import numpy as np


def sparse_attention(
    q: np.ndarray,
    k: np.ndarray,
    v: np.ndarray,
    selection: list[np.ndarray],
    *,
    scale: float | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """Sparse SDPA: o[t,h] = Σ_{s∈S_t} softmax_s(scale · q[t,h]·k[s]) v[s], the same S_t for every head.

    Query head h reads key/value head ⌊h / (H/H_kv)⌋ (GQA).

    Args:
        q: [L, H, d_h].
        k, v: [S, H_kv, d_h]; pass the gated v' (Eq. 9) for GSA.
        selection: S_t, one integer array per query.
        scale: default 1/√d_h.

    Returns:
        o, float64 [L, H, d_h], and lse[t,h] = ln Σ_{s∈S_t} exp(scale · q[t,h]·k[s]), float64 [L, H].
        A row with an empty S_t gives o = 0 and lse = −inf.
    """
    q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
    L, H, d_h = q.shape
    group = H // k.shape[1]
    scale = 1 / np.sqrt(d_h) if scale is None else scale
    out, lse = np.zeros((L, H, d_h)), np.full((L, H), -np.inf)
    for t in range(L):
        S_t = selection[t]
        if len(S_t) == 0:
            continue
        for h in range(H):
            logits = scale * (k[S_t, h // group] @ q[t, h])
            m = logits.max()
            with np.errstate(invalid="ignore"):  # inf − inf is NaN, and NaN is the answer
                p = np.exp(logits - m)
                out[t, h] = (p @ v[S_t, h // group]) / p.sum()
                lse[t, h] = m + np.log(p.sum())
    return out, lse


def dense_attention(q: np.ndarray, k: np.ndarray, v: np.ndarray, *, start: int = 0) -> np.ndarray:
    """Causal attention over all positions s ≤ start + t: S_t is everything that query t may see."""
    everything = [np.arange(min(start + t + 1, len(k))) for t in range(len(q))]
    return sparse_attention(q, k, v, everything)[0]
