"""Picture and quoted figures of docs/verify/index.md: the scores of one query around its threshold."""

import numpy as np
from matplotlib.figure import Figure
from style import BLUE, GREEN, ORANGE, main

from gsa_ref.check import score_tolerance, topk_certificate
from gsa_ref.equations import indexer_scores, select_tokens

SEED = 11
S, H_I, D_I, K = 4096, 4, 64, 512
AROUND = 14  # ranks shown on each side of the threshold


def one_query() -> tuple[np.ndarray, np.ndarray]:
    """Gold scores of one query against S random keys, and their tolerance with the approximate sigmoid."""
    rng = np.random.default_rng(SEED)
    q, k = rng.standard_normal((1, H_I, D_I)), rng.standard_normal((S, D_I))
    logits, bias, scale = rng.standard_normal((1, H_I)), rng.standard_normal(H_I), D_I**-0.5
    scores = indexer_scores(q, k, logits, bias, scale=scale, start=S - 1)[0]
    return scores, score_tolerance(q, k, logits, bias, scale=scale, sigmoid_mode="approximate")[0]


SCORES, TOLERANCE = one_query()
ORDER = np.argsort(-SCORES, kind="stable")
CHOSEN = select_tokens(SCORES[None], np.array([K]))[0]


def threshold() -> Figure:
    """Scores by rank with the band ±ε; the keys whose band reaches the threshold's may go either way."""
    ranks = np.arange(K - AROUND, K + AROUND)
    s, e = SCORES[ORDER[ranks]], TOLERANCE[ORDER[ranks]]
    figure = Figure(figsize=(6.4, 3))
    axes = figure.add_subplot()
    for side, colour, label in ((ranks < K, BLUE, "selected"), (ranks >= K, ORANGE, "left out")):
        axes.errorbar(
            ranks[side] + 1, s[side], e[side], fmt="o", markersize=3.5, color=colour, elinewidth=1, label=label
        )
    axes.axvline(K + 0.5, color=GREEN, linestyle="--", linewidth=1, label="$k_t$")
    axes.set_xlabel("rank of the key by gold score")
    axes.set_ylabel("score ± ε")
    axes.legend()
    return figure


def swapped(distance: int) -> np.ndarray:
    """The selection with the key `distance` ranks above the threshold replaced by the one as far below it."""
    kept = set(CHOSEN.tolist()) - {int(ORDER[K - distance])} | {int(ORDER[K - 1 + distance])}
    return np.array(sorted(kept))


def largest_accepted_swap() -> int:
    """The largest such distance that the certificate still accepts."""
    distance = 0
    while topk_certificate(swapped(distance + 1), K, SCORES, TOLERANCE, K):
        distance += 1
    return distance


if __name__ == "__main__":
    main(
        "verify",
        {"threshold": threshold},
        {
            "keys": S,
            "k": K,
            "H_I": H_I,
            "d_I": D_I,
            "seed": SEED,
            "near": topk_certificate(CHOSEN, K, SCORES, TOLERANCE, K).near_threshold,
            "swap": largest_accepted_swap(),
            "rejected": largest_accepted_swap() + 1,
        },
    )
