"""Rotary position embedding (RoFormer, arXiv 2104.09864), the half-split layout of LLaMA."""

import numpy as np


def apply_rope(x: np.ndarray, *, start: int = 0, theta: float = 10000.0) -> np.ndarray:
    """Rotate the pair (x[i], x[i + d/2]) of the token at position p by the angle p · θ^(−2i/d).

    Args:
        x: [L, heads, d] with even d; row t sits at position start + t.
    """
    x = np.asarray(x, np.float64)
    L, _, d = x.shape
    half = d // 2
    out = np.empty_like(x)
    for t in range(L):
        for i in range(half):
            angle = (start + t) * theta ** (-2 * i / d)
            a, b = x[t, :, i], x[t, :, i + half]
            out[t, :, i] = a * np.cos(angle) - b * np.sin(angle)
            out[t, :, i + half] = b * np.cos(angle) + a * np.sin(angle)
    return out
