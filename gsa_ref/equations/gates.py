"""Gates (Eq. 9 and Eq. 10)."""

import numpy as np


def sigmoid(x: np.ndarray) -> np.ndarray:
    """σ(x) = 1 / (1 + e^−x), written so that e is never raised to a positive power."""
    x = np.asarray(x, np.float64)
    e = np.exp(-np.abs(x))
    return np.where(x >= 0, 1.0, e) / (1.0 + e)


def apply_gate(x: np.ndarray, gate_logits: np.ndarray) -> np.ndarray:
    """Eq. 9 and Eq. 10: x ⊙ σ(gate_logits), elementwise.

    The value gate G2 (Eq. 9) is computed from the SOURCE token: v'[s] = v[s] ⊙ σ(h_s W_V^g).
    The output gate G1 (Eq. 10) from the QUERY token: o'[t] = o[t] ⊙ σ(h_t W_O^g).

    Args:
        x: any shape.
        gate_logits: the shape of x.
    """
    return np.asarray(x, np.float64) * sigmoid(gate_logits)
