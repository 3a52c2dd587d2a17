"""Pictures and quoted figures of docs/learn/indexer.md."""

import math

import numpy as np
import torch
from matplotlib.figure import Figure
from style import BLUE, GREEN, ORANGE, main, word_vectors, zen

from gsa_ref import GSAConfig, indexer_scores, select_tokens

SEED = 7
WORDS = zen()
SHOWN = WORDS[:20]
D_I = 64
K = 16
HEADS = (1, 2, 4, 8)
FACTORS = np.geomspace(0.1, 100, 13)


def scores(q: np.ndarray, k: np.ndarray, logits: np.ndarray, bias: np.ndarray, scale: float) -> torch.Tensor:
    """`gsa_ref.indexer_scores` of one sequence in float64."""
    tensors = [torch.as_tensor(x, dtype=torch.float64) for x in (q[None], k[None], logits[None], bias)]
    return indexer_scores(*tensors, scale=scale)[0]


def hand_set() -> tuple[np.ndarray, np.ndarray]:
    """Two heads on ONE key k = [e(word), e(previous word)]: head 0 asks for the first half, head 1 for the second."""
    e = word_vectors(SHOWN, 64, SEED)
    previous = np.vstack([np.zeros_like(e[:1]), e[:-1]])
    nothing = np.zeros_like(e)
    q = np.stack([np.hstack([e, nothing]), np.hstack([nothing, e])], axis=1)  # [L, 2, 128]
    return q, np.hstack([e, previous])


def heads() -> Figure:
    """Score maps of the two hand-set heads and of their sum, over the first words of the text."""
    q, k = hand_set()
    n = len(SHOWN)
    # z is about 6 for a match and about −6 otherwise; the head weights σ(8) are nearly 1.
    maps = [scores(q[:, [j]], k, np.full((n, 1), 8.0), np.array([-6.0]), 12.0) for j in (0, 1)]
    maps.append(scores(q, k, np.full((n, 2), 8.0), np.full(2, -6.0), 12.0))
    figure = Figure(figsize=(7.2, 9))
    grid = figure.add_gridspec(2, 2, height_ratios=(1, 2.15), hspace=0.12, wspace=0.1)
    places = [grid[0, 0], grid[0, 1], grid[1, :]]
    titles = ["head 0: the same word", "head 1: what followed this word", "I[t,s]: their sum"]
    for place, title, values in zip(places, titles, maps, strict=True):
        axes = figure.add_subplot(place)
        shown = np.ma.masked_invalid(values.numpy())
        seamless = {"edgecolors": "face", "linewidth": 0.4}
        mesh = axes.pcolormesh(shown, cmap="viridis", vmin=0, vmax=2, **seamless)
        axes.set_title(title, fontsize=9)
        axes.set_aspect("equal")
        axes.invert_yaxis()
        axes.set_xticks([])
        axes.set_yticks([])
        if place is places[2]:
            axes.set_xticks(np.arange(n) + 0.5, SHOWN, rotation=90)
            axes.set_yticks(np.arange(n) + 0.5, SHOWN)
            axes.set_xlabel("key s")
            axes.set_ylabel("query t")
            figure.colorbar(mesh, ax=axes, shrink=0.6, label="score")
    return figure


def random_indexer(n_heads: int) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Projections drawn at random applied to the words: q, k with unit variance, head logits, no bias."""
    rng = np.random.default_rng(SEED)
    h = word_vectors(WORDS, 256, SEED)
    k = h @ rng.standard_normal((256, D_I))
    q = np.stack([h @ rng.standard_normal((256, D_I)) for _ in range(n_heads)], axis=1)
    return q, k, h @ rng.standard_normal((256, n_heads)), np.zeros(n_heads)


def changed_by_scale(n_heads: int) -> float:
    """Percentage of the queries with a real choice whose K tokens differ between scale 1 and 1/√d_I."""
    arguments = random_indexer(n_heads)
    chosen = []
    for scale in (1.0, D_I**-0.5):
        values = scores(*arguments, scale)[None]
        budget = torch.full(values.shape[:2], K, dtype=torch.int32)
        chosen.append(select_tokens(values, budget, width=K).indices[0, K:])
    return 100 * float((chosen[0] != chosen[1]).any(-1).double().mean())


def scale() -> Figure:
    """How often the scale inside the indexer changes what is selected, by number of heads."""
    figure = Figure(figsize=(6, 2.6))
    axes = figure.add_subplot()
    bars = axes.bar([str(n) for n in HEADS], [changed_by_scale(n) for n in HEADS], width=0.55, color=BLUE)
    axes.bar_label(bars, fmt="%.0f%%", padding=2)
    axes.set_xlabel("indexer heads $H_I$")
    axes.set_ylabel("queries with another selection")
    axes.set_ylim(0, 115)
    axes.set_yticks([0, 50, 100], ["0%", "50%", "100%"])
    return figure


def largest(activation: str) -> list[float]:
    """The largest score over the text, for hidden states multiplied by each of FACTORS."""
    q, k, logits, bias = random_indexer(4)
    found = []
    for factor in FACTORS:
        values = scores(factor * q, factor * k, logits, bias, D_I**-0.5)
        if activation == "relu":  # the same sum with ReLU in place of the inner σ
            z = torch.as_tensor(np.einsum("tjd,sd->tsj", factor * q, factor * k) * D_I**-0.5).relu()
            weighted = (z * torch.sigmoid(torch.as_tensor(logits))[:, None]).sum(-1)
            values = torch.where(values == -torch.inf, values, weighted)
        found.append(float(values.max()))
    return found


def bounded() -> Figure:
    """The largest score against the size of the hidden states: σ stays below H_I, ReLU grows with the square."""
    figure = Figure(figsize=(6, 2.8))
    axes = figure.add_subplot()
    axes.loglog(FACTORS, largest("relu"), color=ORANGE, marker="o", markersize=3.5, label="ReLU")
    axes.loglog(FACTORS, largest("sigmoid"), color=BLUE, marker="o", markersize=3.5, label="σ (Eq. 7)")
    axes.axhline(4, color=GREEN, linestyle="--", linewidth=1, label="$H_I$ = 4")
    axes.set_xlabel("factor on $q^I$ and $k^I$")
    axes.set_ylabel("largest score")
    axes.legend()
    return figure


def power(x: float) -> str:
    """x with two digits as a × 10ⁿ."""
    mantissa, exponent = f"{x:.1e}".split("e")
    return f"{mantissa} × 10" + str(int(exponent)).translate(str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹"))


def costs() -> dict[str, object]:
    """The page's formulas at the default sizes of GSAConfig."""
    c, L = GSAConfig(), 2**17
    pairs = L * (L + 1) // 2
    return {
        "L": f"{L:,}",
        "flops": power(pairs * c.H_I * (2 * c.d_I + 5)),
        "sigmoids": power(pairs * c.H_I),
        "score_gib": f"{4 * L * L / 2**30:.0f} GiB",
        "key_mib": f"{2 * L * c.d_I / 2**20:.0f} MiB",
        "of_dense": f"{100 * 2 * c.H_I * c.d_I / (4 * c.H * c.d_h):.1f}%",
        "of_cache": f"{100 * c.d_I / (2 * c.H_kv * c.d_h):.1f}%",
        "int32_rows": f"{math.isqrt(2**31 - 1) + 1:,}",
    }


if __name__ == "__main__":
    main(
        "indexer",
        {"heads": heads, "scale": scale, "bounded": bounded},
        {
            "words": len(WORDS),
            "shown": len(SHOWN),
            "seed": SEED,
            "k": K,
            "d_I": D_I,
            "changed_1": f"{changed_by_scale(1):.0f}%",
            "changed_4": f"{changed_by_scale(4):.0f}%",
            **costs(),
        },
    )
