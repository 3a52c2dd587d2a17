r"""What a gate lets a head compute. NumPy, one head, attention weights held fixed.

Row vectors, as in the paper: a token is a row x ∈ R^d, and with A the head's attention weights [L, L]

$$ U = \big( A\,(X W_V \odot \sigma(X W_V^g)) \odot \sigma(X W_O^g) \big)\, W_O . $$

Without gates this is A·X·(W_V W_O): one fixed matrix for every token. With them no fixed matrix will do, and yet the
output stays in the row space of W_O. The theorem of the paper (its Theorem 3, second-hand) is not known word for word;
the statements here are derived on the site's page. In a layer with grouped heads, W_V and W_V^g are those of the head's
group.
"""

import numpy as np

from gsa_ref.equations import apply_gate, sigmoid


def head_output(
    x: np.ndarray,
    attention: np.ndarray,
    W_V: np.ndarray,
    W_O: np.ndarray,
    *,
    W_Vg: np.ndarray | None = None,
    W_Og: np.ndarray | None = None,
) -> np.ndarray:
    """U of one head, with G2 (Eq. 9) if W_Vg is given and G1 (Eq. 10) if W_Og is. No gate has a bias here.

    Args:
        x: tokens X, [..., L, d].
        attention: weights A, [L, L]; row t says what query t reads.
        W_V, W_Vg, W_Og: [d, d_h].
        W_O: the head's rows of the output projection, [d_h, d].

    Returns:
        float64 [..., L, d].
    """
    v = x @ W_V
    if W_Vg is not None:
        v = apply_gate(v, x @ W_Vg)
    o = attention @ v
    if W_Og is not None:
        o = apply_gate(o, x @ W_Og)
    return o @ W_O


def fixed_matrix(W_V: np.ndarray, W_O: np.ndarray) -> np.ndarray:
    r"""The map of an ungated head from mixed tokens to outputs: \( W_V W_O \), [d, d], of rank at most d_h."""
    return W_V @ W_O


def share_outside_row_space(u: np.ndarray, W_O: np.ndarray) -> float:
    r"""How much of u lies outside the row space of W_O: \( \|U - U W_O^+ W_O\|_F \,/\, \|U\|_F \). Derived here: 0.

    Args:
        u: outputs, [..., d].
        W_O: [d_h, d].
    """
    outside = u - u @ np.linalg.pinv(W_O) @ W_O
    return float(np.linalg.norm(outside) / np.linalg.norm(u))


def jacobian(
    x: np.ndarray,
    W_V: np.ndarray,
    W_O: np.ndarray,
    *,
    W_Vg: np.ndarray | None = None,
    W_Og: np.ndarray | None = None,
) -> np.ndarray:
    r"""∂u/∂x of a head that reads one token, itself: [d, d], row i the derivative by x_i.

    $$ \big( W_V\,\mathrm{diag}(a b) + W_V^g\,\mathrm{diag}(v\,a(1-a)\,b)
       + W_O^g\,\mathrm{diag}(v\,a\,b(1-b)) \big) W_O $$

    with v = xW_V, a = σ(xW_V^g), b = σ(xW_O^g). Everything passes through W_O, so the rank is at most d_h with gates
    too; but the three matrices on the left may add up to 3·d_h input directions over several x. Derived here.

    Args:
        x: one token, [d].
        W_V, W_Vg, W_Og, W_O: as in `head_output`.
    """
    v = x @ W_V
    a = np.ones_like(v) if W_Vg is None else sigmoid(x @ W_Vg)
    b = np.ones_like(v) if W_Og is None else sigmoid(x @ W_Og)
    into = W_V * (a * b)
    if W_Vg is not None:
        into = into + W_Vg * (v * a * (1 - a) * b)
    if W_Og is not None:
        into = into + W_Og * (v * a * b * (1 - b))
    return into @ W_O


def smallest_linear_error(u_plus: np.ndarray, u_minus: np.ndarray) -> float:
    r"""What every fixed matrix gets wrong at x or at −x, given a map's outputs there.

    $$ \max\big(\|f(x) - xM\|,\; \|f(-x) + xM\|\big) \;\ge\; \tfrac12 \|f(x) + f(-x)\| \quad\text{for every } M $$

    by the triangle inequality, since xM and −xM cancel. Derived here.
    """
    return float(np.linalg.norm(u_plus + u_minus) / 2)


def one_channel(x: np.ndarray, c: float) -> np.ndarray:
    r"""The smallest gated head, d = d_h = 1, W_V = W_O = 1 and gate weight c: \( f(x) = x\,\sigma(c x) \).

    For c = 0 it is the line x/2, for c → ∞ it is ReLU. Derived here.
    """
    return apply_gate(x, c * x)


def one_channel_error(c: float) -> float:
    r"""The error of the best fixed number m for `one_channel` on the inputs 1 and −1: \( \tfrac12 \tanh(|c|/2) \).

    The targets are σ(c) and −σ(−c) = −(1 − σ(c)); m and −m approximate them best at m = ½, where both are off by
    |σ(c) − ½|. Equal errors on both, so this is the largest error as well as the root mean square. Derived here.
    """
    return float(np.tanh(abs(c) / 2) / 2)


def linear_gap(x: np.ndarray, u: np.ndarray) -> float:
    r"""Relative residual of the best fixed matrix from whole sequences to outputs, by least squares.

    $$ \min_M \|U - X M\|_F \,/\, \|U\|_F , \qquad X: [n, L \cdot d],\; U: [n, L \cdot d] $$

    M may mix positions, so it is at least as able as any choice of fixed attention weights and head matrices.

    Args:
        x, u: n sequences and their outputs, [n, L, d].

    Raises:
        ValueError: not more sequences than unknowns, n ≤ L·d: then any outputs could be matched.
    """
    n = len(x)
    inputs, outputs = x.reshape(n, -1), u.reshape(n, -1)
    if n <= inputs.shape[1]:
        raise ValueError(f"x: expected more than L·d = {inputs.shape[1]} sequences, got {n}")
    M = np.linalg.lstsq(inputs, outputs, rcond=None)[0]
    return float(np.linalg.norm(outputs - inputs @ M) / np.linalg.norm(outputs))
