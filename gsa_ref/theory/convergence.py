r"""Bounds that follow from 0 < σ < 1 and 0 < σ' ≤ ¼, and what they give gradient descent. NumPy, float64.

For one query and one key, with \( z_j = \text{scale}\cdot q_j \cdot k + b_j \) and \( w_j = \sigma(\ell_j) \), the
score of Eq. 7 is \( I = \sum_j w_j\,\sigma(z_j) \). For contrast, φ = ReLU or the identity may stand in for its
inner σ.

The paper's convergence theorem (its Theorem 6, second-hand) is not known word for word. The bounds are derived on the
site's page; the rate of stochastic gradient descent is that of Ghadimi and Lan (2013).
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from gsa_ref._arguments import check_choice
from gsa_ref.equations import sigmoid

SLOPE = 0.25  # max σ' = max σ(1 − σ), at 0
CURVATURE = 1 / (6 * math.sqrt(3))  # max |σ''| = max |σ(1 − σ)(1 − 2σ)|, where σ = ½ ± 1/√12
ACTIVATIONS: dict[str, tuple[Callable[..., np.ndarray], Callable[..., np.ndarray]]] = {  # φ and φ'
    "sigmoid": (sigmoid, lambda z: sigmoid(z) * sigmoid(-z)),
    "relu": (lambda z: np.maximum(z, 0.0), lambda z: (z > 0).astype(float)),
    "linear": (lambda z: z, np.ones_like),
}


class ScoreParts(NamedTuple):
    """One number or vector for each argument of the score; `value` belongs to the score itself.

    From `score_gradient` it holds the score and its gradients; from `score_bounds` bounds on |I| and on the norms.
    """

    value: float
    q: np.ndarray
    k: np.ndarray
    head_logits: np.ndarray
    bias: np.ndarray


def score_gradient(
    q: np.ndarray,
    k: np.ndarray,
    head_logits: np.ndarray,
    bias: np.ndarray,
    *,
    scale: float,
    activation: str = "sigmoid",
) -> ScoreParts:
    r"""The score of one pair, and its gradient by every argument.

    $$ \frac{\partial I}{\partial q_j} = \text{scale}\; w_j\,\varphi'(z_j)\,k, \quad
       \frac{\partial I}{\partial k} = \text{scale} \sum_j w_j\,\varphi'(z_j)\,q_j, \quad
       \frac{\partial I}{\partial \ell_j} = \sigma'(\ell_j)\,\varphi(z_j), \quad
       \frac{\partial I}{\partial b_j} = w_j\,\varphi'(z_j) $$

    Source: Eq. 7 differentiated.

    Args:
        q: [H_I, d_I].
        k: [d_I].
        head_logits, bias: ℓ and b, [H_I].
        activation: φ, "sigmoid" (Eq. 7), "relu" or "linear".

    Returns:
        value I, q [H_I, d_I], k [d_I], head_logits [H_I], bias [H_I].

    Raises:
        TypeError, ValueError: another activation.
    """
    check_choice("activation", activation, tuple(ACTIVATIONS))
    phi, slope = ACTIVATIONS[activation]
    w, z = sigmoid(head_logits), scale * (q @ k) + bias
    dz = w * slope(z)
    return ScoreParts(
        value=float(w @ phi(z)),
        q=scale * dz[:, None] * k,
        k=scale * dz @ q,
        head_logits=w * sigmoid(-np.asarray(head_logits)) * phi(z),
        bias=dz,
    )


def score_bounds(q: np.ndarray, k: np.ndarray, *, scale: float) -> ScoreParts:
    r"""Bounds on the sigmoid score and on the norm of each gradient, for any head logits and biases.

    $$ 0 < I < H_I, \quad
       \Big\|\frac{\partial I}{\partial q_j}\Big\| \le \frac{|\text{scale}|}{4}\|k\|, \quad
       \Big\|\frac{\partial I}{\partial k}\Big\| \le \frac{|\text{scale}|}{4}\sum_j \|q_j\|, \quad
       0 < \frac{\partial I}{\partial \ell_j},\, \frac{\partial I}{\partial b_j} < \frac14 $$

    With ReLU or the identity for the inner σ, neither I nor ∂I/∂ℓ has a bound. Derived here.

    Args:
        q: [H_I, d_I].
        k: [d_I].

    Returns:
        value H_I; the others one bound for each head, [H_I], but k, a single one, [].
    """
    H_I, c = len(q), abs(scale) * SLOPE
    each = np.full(H_I, SLOPE)
    norms = np.linalg.norm(q, axis=-1)
    return ScoreParts(float(H_I), np.full(H_I, c * np.linalg.norm(k)), np.asarray(c * norms.sum()), each, each)


def score_lipschitz(radius_q: float, radius_k: float, H_I: int, *, scale: float) -> float:
    r"""A Lipschitz constant of I in all its arguments together, where ‖q_j‖ ≤ radius_q and ‖k‖ ≤ radius_k.

    $$ \frac14 \sqrt{H_I\,(\text{scale}^2 R_k^2 + 2) + \text{scale}^2 H_I^2 R_q^2} $$

    The norm of the bounds above, one beside the other. Without the radii there is no such constant: ∂I/∂q_j grows with
    k. Derived here.
    """
    return SLOPE * math.sqrt(H_I * (scale**2 * radius_k**2 + 2) + (scale * H_I * radius_q) ** 2)


def gate_gradient(x: np.ndarray, gate_logits: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    r"""The gradient of the gate \( y = x\,\sigma(g) \) of Eq. 9 and Eq. 10, elementwise.

    $$ 0 < \frac{\partial y}{\partial x} = \sigma(g) < 1, \qquad
       \Big|\frac{\partial y}{\partial g}\Big| = |x|\,\sigma'(g) \le \tfrac14 |x| $$

    Source: the equations differentiated; the bounds are derived here.

    Returns:
        ∂y/∂x and ∂y/∂g.
    """
    return sigmoid(gate_logits), x * sigmoid(gate_logits) * sigmoid(-np.asarray(gate_logits))


def gated_value_lipschitz(W_V: np.ndarray, W_g: np.ndarray, radius: float) -> float:
    r"""A Lipschitz constant of \( h \mapsto hW_V \odot \sigma(hW^g) \) where ‖h‖ ≤ radius.

    $$ \|W_V\|_2\,\big(1 + \tfrac14\,R\,\|W^g\|_2\big) $$

    It needs the radius: \( h_1\,\sigma(h_2) \) has slope h_1/4 at h_2 = 0, so no constant serves all h. Layer
    normalisation before the layer is what supplies a radius. Derived here.

    Args:
        W_V, W_g: [d, d_h].
    """
    return float(np.linalg.norm(W_V, 2) * (1 + SLOPE * radius * np.linalg.norm(W_g, 2)))


# ---- the indexer's loss, and gradient descent on it ------------------------------------------------------------------


def loss_gradient_bound(temperature: float) -> float:
    r"""Bound on the gradient of the indexer's loss of one row by each head logit and bias.

    $$ \Big|\frac{\partial L_t}{\partial b_j}\Big|,\; \Big|\frac{\partial L_t}{\partial \ell_j}\Big|
       \;\le\; \frac{1}{4\tau} $$

    ∂L_t/∂I_s = (softmax(I/τ)_s − p_s)/τ sums to 0 over s, and its positive part to at most 1/τ; the derivatives of the
    scores lie between 0 and ¼. Derived here, for the loss of Eq. 15 (second-hand).
    """
    return SLOPE / temperature


def loss_smoothness(H_I: int, temperature: float) -> float:
    r"""A Lipschitz constant of the gradient of the indexer's loss in θ = (ℓ, b), q and k held fixed.

    $$ \frac{H_I}{32\,\tau^2} + \frac{2}{\tau}\Big(\frac{1}{6\sqrt3} + \frac1{16}\Big) $$

    The first term bounds the variance of ∂I/∂θ under the student, the second the curvature of the scores. Derived here.
    """
    return H_I / (32 * temperature**2) + 2 * (CURVATURE + SLOPE**2) / temperature


def sgd_bound(gap: float, smoothness: float, variance: float, steps: int, step_size: float) -> float:
    r"""Stochastic gradient descent: bound on the mean of \( \mathbb{E}\|\nabla f(\theta_n)\|^2 \) over its steps.

    $$ \frac1N \sum_{n=1}^N \mathbb{E}\|\nabla f(\theta_n)\|^2 \;\le\;
       \frac{2\,(f(\theta_1) - f^*)}{\gamma N} + \gamma\,M\,\sigma^2, \qquad \gamma \le \frac1M $$

    Source: S. Ghadimi and G. Lan, "Stochastic first- and zeroth-order methods for nonconvex stochastic programming",
    SIAM J. Optim. 23(4), 2013, in the form for a constant step. It supposes a gradient that is M-Lipschitz along the
    way, unbiased stochastic gradients of variance at most σ², and f bounded below. It promises small gradients, not
    small losses.

    Args:
        gap: f(θ_1) − f*, or a bound on it.
        smoothness: M.
        variance: σ².
        steps: N.
        step_size: γ.

    Raises:
        ValueError: step_size is not in (0, 1/M].
    """
    if not 0 < step_size * smoothness <= 1:
        raise ValueError(f"step_size: expected a number in (0, 1/smoothness = {1 / smoothness:g}], got {step_size}")
    return 2 * gap / (step_size * steps) + step_size * smoothness * variance


def sgd_step_size(gap: float, smoothness: float, variance: float, steps: int) -> float:
    r"""The step size that makes `sgd_bound` smallest, \( \min(1/M,\; \sqrt{2\,\text{gap}/(M \sigma^2 N)}) \)."""
    if variance == 0:
        return 1 / smoothness
    return min(1 / smoothness, math.sqrt(2 * gap / (smoothness * variance * steps)))


def sgd(
    gradient: Callable[[np.ndarray], np.ndarray], theta: np.ndarray, *, step_size: float, steps: int
) -> list[np.ndarray]:
    r"""The iterates θ_1 … θ_N of \( \theta_{n+1} = \theta_n - \gamma\,g(\theta_n) \)."""
    iterates = [theta]
    for _ in range(steps - 1):
        iterates.append(iterates[-1] - step_size * gradient(iterates[-1]))
    return iterates
