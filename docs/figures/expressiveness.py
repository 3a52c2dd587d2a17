"""Pictures and quoted figures of docs/theory/expressiveness.md: what a gated head does that no fixed matrix can."""

from functools import cache

import numpy as np
from matplotlib.figure import Figure
from style import BLUE, GREEN, ORANGE, main

from gsa_ref.theory import expressiveness

SEED, D, D_H, L, N = 5, 14, 4, 2, 400
STRENGTHS = (0.0, 0.5, 1.0, 2.0, 4.0, 8.0)
GATES = {"none": (), "value gate": ("W_Vg",), "output gate": ("W_Og",), "both": ("W_Vg", "W_Og")}
GREY = "#808690"


def head() -> tuple[dict[str, np.ndarray], np.ndarray, np.ndarray]:
    """Random matrices of a head, its fixed attention weights, and normal inputs."""
    rng = np.random.default_rng(SEED)
    matrices = {name: rng.standard_normal((D, D_H)) / np.sqrt(D) for name in ("W_V", "W_Vg", "W_Og")}
    matrices["W_O"] = rng.standard_normal((D_H, D)) / np.sqrt(D_H)
    e = np.tril(np.exp(rng.standard_normal((L, L))))
    return matrices, e / e.sum(-1, keepdims=True), rng.standard_normal((N, L, D))


MATRICES, ATTENTION, X = head()


def outputs(gates: tuple[str, ...], strength: float) -> np.ndarray:
    """Outputs of the head with these gates, whose matrices are multiplied by `strength`."""
    chosen = {name: strength * MATRICES[name] for name in gates}
    return expressiveness.head_output(X, ATTENTION, MATRICES["W_V"], MATRICES["W_O"], **chosen)


@cache  # the picture is drawn twice
def gap(gates: tuple[str, ...], strength: float) -> float:
    """Relative residual of the best fixed matrix."""
    return expressiveness.linear_gap(X, outputs(gates, strength))


def gate() -> Figure:
    """Left: one channel, x σ(c x), with the best fixed number. Right: the gap of a whole head over gate strength."""
    figure = Figure(figsize=(7.2, 3.1))
    left, right = figure.subplots(1, 2, gridspec_kw={"wspace": 0.3})
    x = np.linspace(-3, 3, 241)
    left.plot(x, x / 2, color=GREY, linestyle="--", label="x/2, the best line")
    for c, colour in ((1.0, GREEN), (4.0, BLUE)):
        left.plot(x, expressiveness.one_channel(x, c), color=colour, label=f"x σ({c:g} x)")
    left.plot(x, np.maximum(x, 0), color=ORANGE, linestyle=":", label="c → ∞: ReLU")
    left.set_xlabel("x")
    left.set_ylabel("output")
    left.legend(loc="upper left")
    for (name, gates), colour, marker in zip(GATES.items(), (GREY, BLUE, ORANGE, GREEN), "sovD", strict=True):
        gaps = [gap(gates, strength) for strength in STRENGTHS] if gates else [gap(gates, 1.0)] * len(STRENGTHS)
        shown = [0.0 if g < 1e-12 else g for g in gaps]  # rounding is another on every machine
        right.plot(range(len(STRENGTHS)), shown, marker=marker, markersize=3.5, color=colour, label=name)
    right.set_xticks(range(len(STRENGTHS)), [f"{s:g}" for s in STRENGTHS])
    right.set_xlabel("factor on the gates' matrices")
    right.set_ylabel("error of the best fixed matrix")
    right.legend()
    return figure


def facts() -> dict[str, object]:
    both = outputs(GATES["both"], 2.0)
    slopes = {}
    for name, gates in GATES.items():
        chosen = {g: 2 * MATRICES[g] for g in gates}
        tokens = X[:20, 0]
        each = [expressiveness.jacobian(x, MATRICES["W_V"], MATRICES["W_O"], **chosen) for x in tokens]
        slopes[name] = [np.linalg.matrix_rank(side(each), tol=1e-9) for side in (np.hstack, np.vstack)]
    rows = [
        [name, "0" if (g := gap(gates, 2.0)) < 1e-12 else f"{g:.2f}", *(str(int(n)) for n in slopes[name])]
        for name, gates in GATES.items()
    ]
    matrix = expressiveness.fixed_matrix(MATRICES["W_V"], MATRICES["W_O"])
    return {
        "d": D,
        "d_h": D_H,
        "L": L,
        "n": N,
        "seed": SEED,
        "rank": int(np.linalg.matrix_rank(matrix)),
        "output_rank": int(np.linalg.matrix_rank(both.reshape(-1, D))),
        "outside": "below 10⁻¹⁵" if expressiveness.share_outside_row_space(both, MATRICES["W_O"]) < 1e-15 else "above",
        "error_1": f"{expressiveness.one_channel_error(1.0):.3f}",
        "error_4": f"{expressiveness.one_channel_error(4.0):.3f}",
        "gaps": {"header": ["gates", "gap", "input directions", "output directions"], "rows": rows},
    }


if __name__ == "__main__":
    main("expressiveness", {"gate": gate}, facts())
