"""Pictures and quoted figures of docs/learn/budget.md."""

import numpy as np
import torch
from matplotlib.figure import Figure
from style import BLUE, GREEN, ORANGE, main, zen

from gsa_ref import GSAConfig, score_variance, token_budget, tour

WORDS = zen()
L = len(WORDS)
CONFIG = tour.build_config(k_base=12)
HIDDEN = tour.embed(WORDS, CONFIG.d)
LAYER = tour.build_layer(CONFIG, HIDDEN)
TRACE = tour.trace(LAYER, HIDDEN)
SCORES = TRACE.scores[0]
VARIANCE = TRACE.variance[0].numpy()
N = np.arange(1, L + 1)
RULES = {"proportional": BLUE, "inverse": ORANGE}
MARKED = {"proportional": np.argmax, "inverse": np.argmin}  # the rows that gain most have this variance
MEANS = 10.0 ** np.arange(0, 5)  # over a spread of 1


def budgets(rule: str, mean_variance: float = TRACE.mean_variance, scores: torch.Tensor = SCORES) -> np.ndarray:
    """k_t of every row of a score map."""
    sizes = {"k_base": CONFIG.k_base, "k_min": CONFIG.k_min, "k_max": CONFIG.k_max}
    n_valid = (scores != -torch.inf).sum(-1, dtype=torch.int32)[None]
    return token_budget(score_variance(scores[None]), mean_variance, n_valid, **sizes, rule=rule)[0].numpy()


def text() -> Figure:
    """The budget of each word of the text, in both directions."""
    figure = Figure(figsize=(7.2, 4), layout="constrained")
    for axes, (rule, colour) in zip(figure.subplots(2, 1, sharex=True), RULES.items(), strict=True):
        k = budgets(rule)
        axes.stairs(k, np.arange(L + 1) - 0.5, fill=True, color=colour)
        axes.plot(N.clip(max=CONFIG.k_max), color=GREEN, linewidth=1, label="$\\min(n_t, k_{\\max})$")
        axes.axhline(CONFIG.k_base, color=GREEN, linewidth=1, linestyle=":", label="$k_{\\mathrm{base}}$")
        for first in (CONFIG.k_max, L // 2):  # in both halves of the text, past the rows that see too little
            t = first + int(MARKED[rule](VARIANCE[first : first + L // 2 - CONFIG.k_max]))
            axes.annotate(WORDS[t], (t, k[t]), xytext=(0, 2), textcoords="offset points", ha="center")
        axes.set_ylabel(f"$k_t$, {rule}")
        axes.set_ylim(0, CONFIG.k_max + 5)
        axes.set_xlim(-1, L)
    axes.legend(loc="lower right", ncols=2, bbox_to_anchor=(1, 0.98))
    axes.set_xlabel("word")
    return figure


def zeros_counted() -> np.ndarray:
    """The variance of whole rows, masked keys counted as zeros."""
    return SCORES.masked_fill(SCORES.isneginf(), 0).var(-1, correction=0).numpy()


def masked() -> Figure:
    """Variance over valid keys, and with masked keys as zeros, each over its mean; and what knows the position only."""
    figure = Figure(figsize=(7.2, 2.6), layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True)
    left.plot(VARIANCE / VARIANCE.mean(), color=BLUE, linewidth=1)
    left.set_title("over valid keys", fontsize=9)
    zeros, position = zeros_counted(), N / L * (1 - N / L)
    right.plot(zeros / zeros.mean(), color=ORANGE, linewidth=1)
    right.plot(position / position.mean(), color=GREEN, linestyle="--", linewidth=1, label="(n/L)(1 − n/L)")
    right.set_title("masked keys counted as zeros", fontsize=9)
    right.legend()
    left.set_ylabel("variance / its mean")
    left.set_ylim(0, 4)
    for axes in (left, right):
        axes.set_xlabel("query t")
    return figure


def one_pass(x: np.ndarray) -> float:
    """mean(x²) − mean(x)² in float32, added up one after the other."""
    total = squares = np.float32(0)
    for value in x:
        total, squares = total + value, squares + value * value
    n = np.float32(len(x))
    return float(squares / n - (total / n) ** 2)


def merged(x: np.ndarray, tile: int = 64) -> float:
    """(n, mean, M2) of tiles, merged, in float32: what the kernel does."""
    f = np.float32
    n, mean, m2 = f(0), f(0), f(0)
    for part in x.reshape(-1, tile):
        n_b, mean_b = f(tile), sum(part, f(0)) / f(tile)
        m2_b, delta = sum((part - mean_b) ** 2, f(0)), mean_b - mean
        n, share = n + n_b, n_b / (n + n_b)
        mean, m2 = mean + delta * share, m2 + m2_b + delta * delta * (n - n_b) * share
    return float(m2 / n)


def errors() -> dict[str, list[float]]:
    """Relative errors of both, against float64 on the same float32 numbers, for each of MEANS."""
    spread, found = np.random.default_rng(0).standard_normal(4096), {"one_pass": [], "merged": []}
    for mean in MEANS:
        x = (mean + spread).astype(np.float32)
        truth = float(x.astype(np.float64).var())
        for name, method in (("one_pass", one_pass), ("merged", merged)):
            found[name].append(abs(method(x) - truth) / truth)
    return found


ERRORS = errors()


def rounding() -> Figure:
    """What float32 leaves of a variance, against mean/std."""
    figure = Figure(figsize=(6, 2.8))
    axes = figure.add_subplot()
    axes.loglog(MEANS, ERRORS["one_pass"], color=ORANGE, marker="o", markersize=3.5, label="mean(x²) − mean(x)²")
    axes.loglog(MEANS, ERRORS["merged"], color=BLUE, marker="o", markersize=3.5, label="merged tiles")
    axes.set_xlabel("mean / standard deviation")
    axes.set_ylabel("relative error")
    axes.legend()
    return figure


def leaked() -> tuple[int, int]:
    """How many budgets of the first 60 words another ending changes: V̄ of the text itself, and V̄ as a state."""
    other = [*WORDS[:60], *["better"] * (L - 60)]
    scores = tour.trace(LAYER, tour.embed(other, CONFIG.d)).scores[0]
    own = [budgets("proportional", float(score_variance(s[None]).mean()), s)[:60] for s in (SCORES, scores)]
    state = [budgets("proportional", TRACE.mean_variance, s)[:60] for s in (SCORES, scores)]
    return int((own[0] != own[1]).sum()), int((state[0] != state[1]).sum())


def correlation(a: np.ndarray, b: np.ndarray) -> str:
    """With two digits, and a minus sign that is one."""
    return f"{np.corrcoef(a, b)[0, 1]:.2f}".replace("-", "−")


if __name__ == "__main__":
    c, ratio = GSAConfig(), VARIANCE[1:] / VARIANCE[1:].mean()
    main(
        "budget",
        {"text": text, "masked": masked, "rounding": rounding},
        {
            "words": L,
            "k_base": CONFIG.k_base,
            "k_min": CONFIG.k_min,
            "k_max": CONFIG.k_max,
            "mean_proportional": f"{budgets('proportional').mean():.1f}",
            "mean_inverse": f"{budgets('inverse').mean():.1f}",
            "mean_fixed": f"{budgets('fixed').mean():.1f}",
            "mean_reciprocal": f"{(1 / ratio).mean():.2f}",
            "zeros_with_variance": correlation(zeros_counted(), VARIANCE),
            "zeros_with_position": correlation(zeros_counted(), N / L * (1 - N / L)),
            "leaked": leaked()[0],
            "leaked_state": leaked()[1],
            "of_indexer": f"{100 * 4 / (c.H_I * (2 * c.d_I + 5)):.1f}%",
            "one_pass_1000": f"{100 * ERRORS['one_pass'][3]:.0f}%",
        },
    )
