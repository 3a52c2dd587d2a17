"""Pictures and quoted figures of docs/theory/convergence.md: the score, and what of it reaches each parameter."""

from collections.abc import Callable
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from style import BLUE, GREEN, ORANGE, main

from gsa_ref import GSAConfig
from gsa_ref.equations import indexer_kl_gradient, indexer_kl_loss
from gsa_ref.theory import convergence

LINES = {"sigmoid": (BLUE, "-", "σ (Eq. 7)"), "relu": (ORANGE, "--", "ReLU"), "linear": (GREEN, ":", "identity")}
GREY = "#808690"
C = GSAConfig()
SEED, ROWS, HEADS, WIDTH, STEPS = 3, 5, 2, 4, 100


def one_head(z: float, activation: str) -> convergence.ScoreParts:
    """One head with w = σ(0) = ½ whose argument is z: q and k are orthogonal unit vectors, z comes from the bias."""
    q, k = np.array([[1.0, 0.0]]), np.array([0.0, 1.0])
    return convergence.score_gradient(q, k, np.zeros(1), np.array([z]), scale=1.0, activation=activation)


def bounds() -> Figure:
    """Three panels over z: the score, its derivative by the head logit, and by the bias."""
    figure = Figure(figsize=(7.2, 2.9))
    panels = figure.subplots(1, 3, gridspec_kw={"wspace": 0.42})
    z = np.linspace(-8, 8, 161)
    for activation, (colour, dashes, label) in LINES.items():
        parts = [one_head(x, activation) for x in z]
        curves = [p.value for p in parts], [p.head_logits[0] for p in parts], [p.bias[0] for p in parts]
        for axes, curve in zip(panels, curves, strict=True):
            axes.plot(z, curve, dashes, color=colour, label=label)
    titles = "score I", "∂I/∂ℓ, the head's logit", "∂I/∂b, the bias"
    for axes, title, bound in zip(panels, titles, (1.0, convergence.SLOPE, convergence.SLOPE), strict=True):
        axes.axhline(bound, color=GREY, linewidth=1, linestyle=(0, (4, 3)))
        axes.set_title(title, fontsize=9)
        axes.set_xlabel("z")
    panels[0].set_ylim(-1, 3)
    panels[1].set_ylim(-0.5, 1.5)
    panels[2].set_ylim(-0.05, 0.6)
    figure.legend(*panels[0].get_legend_handles_labels(), loc="lower center", ncols=3, bbox_to_anchor=(0.5, -0.14))
    return figure


class Loss:
    """The indexer's loss over ROWS queries in θ = (ℓ, b), with the same head logits ℓ for all of them."""

    def __init__(self, temperature: float) -> None:
        self.rng, self.temperature = np.random.default_rng(SEED), temperature
        draw = self.rng.standard_normal
        self.q_idx, self.k_idx = draw((ROWS, HEADS, WIDTH)), draw((ROWS, WIDTH))
        self.q, self.k, self.theta = 3 * draw((ROWS, 1, WIDTH)), 3 * draw((ROWS, 1, WIDTH)), draw(2 * HEADS)

    def call(self, function: Callable[..., Any], theta: np.ndarray, rows: slice = slice(None)) -> Any:
        logits = np.tile(theta[:HEADS], (len(self.q[rows]), 1))
        arguments = self.q_idx[rows], self.k_idx, logits, theta[HEADS:], self.q[rows], self.k
        return function(*arguments, indexer_scale=0.5, temperature=self.temperature, start=rows.start or 0)

    def gradient(self, theta: np.ndarray, rows: slice = slice(None)) -> np.ndarray:
        found = self.call(indexer_kl_gradient, theta, rows)
        return np.concatenate([found[2].sum(0), found[3]])

    def gradient_of_one_row(self, theta: np.ndarray) -> np.ndarray:
        t = int(self.rng.integers(ROWS))
        return self.gradient(theta, slice(t, t + 1))


def descent() -> dict[str, object]:
    """Descent on the indexer's loss: mean squared gradient against its bound."""
    rows = []
    for temperature in (1.0, 0.3, 0.1):
        smoothness = convergence.loss_smoothness(HEADS, temperature)
        for source in ("all rows", "one row"):
            loss = Loss(temperature)
            gap = loss.call(indexer_kl_loss, loss.theta)
            one = source == "one row"
            variance = 2 * HEADS * convergence.loss_gradient_bound(temperature) ** 2 if one else 0.0
            step = convergence.sgd_step_size(gap, smoothness, variance, STEPS)
            gradient = loss.gradient_of_one_row if one else loss.gradient
            iterates = convergence.sgd(gradient, loss.theta, step_size=step, steps=STEPS)
            mean = float(np.mean([(loss.gradient(theta) ** 2).sum() for theta in iterates]))
            bound = convergence.sgd_bound(gap, smoothness, variance, STEPS, step)
            rows.append([f"{temperature:g}", source, *(f"{x:.2g}" for x in (smoothness, step, mean, bound))])
    header = ["τ", "gradient from", "smoothness M", "step size", "mean squared gradient", "its bound"]
    return {"header": header, "left": 2, "rows": rows}


def facts() -> dict[str, object]:
    at_zero = one_head(0.0, "sigmoid").bias[0]
    return {
        "rows": ROWS,
        "heads": HEADS,
        "steps": STEPS,
        "seed": SEED,
        "tau": f"{C.kl_temperature:g}",
        "loss_bound": f"{convergence.loss_gradient_bound(C.kl_temperature):g}",
        "smoothness": f"{convergence.loss_smoothness(C.H_I, C.kl_temperature):.1f}",
        "curvature": f"{convergence.CURVATURE:.4f}",
        "saturated": f"{at_zero / one_head(8.0, 'sigmoid').bias[0]:,.0f}",
        "descent": descent(),
    }


if __name__ == "__main__":
    main("convergence", {"bounds": bounds}, facts())
