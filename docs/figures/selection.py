"""Pictures and quoted figures of docs/learn/selection.md."""

import torch
from matplotlib.figure import Figure
from style import BLUE, GREEN, ORANGE, main, zen

from gsa_ref import GSAConfig, indexer_scores, select_tokens, tour

WORDS = zen()
SHOWN = 48
K = 8
CONFIG = tour.build_config(k_base=K)
HIDDEN = tour.embed(WORDS, CONFIG.d)
SCORES = tour.trace(tour.build_layer(CONFIG, HIDDEN), HIDDEN).scores
FORMATS = {"bfloat16": (torch.bfloat16, ORANGE), "float16": (torch.float16, GREEN), "float32": (torch.float32, BLUE)}
LENGTHS = [2**e for e in range(10, 18)]
SHARE = 64  # one key of 64 is selected, as 2048 of 131,072
QUERIES = 4


def chosen(scores: torch.Tensor) -> torch.Tensor:
    """K positions for each row of a score map."""
    return select_tokens(scores, torch.full(scores.shape[:2], K, dtype=torch.int32), width=K).indices[0]


def text() -> Figure:
    """Which of the first words each query reads."""
    indices = chosen(SCORES)
    pairs = [(s, t) for t in range(SHOWN) for s in indices[t].tolist() if s >= 0]
    figure = Figure(figsize=(7.2, 6.6))
    axes = figure.add_subplot()
    own = [(s, t) for s, t in pairs if WORDS[s] == WORDS[t] and s != t]
    for points, colour, label in ((pairs, BLUE, "read"), (own, ORANGE, "an earlier occurrence of the same word")):
        axes.plot(*zip(*points, strict=True), linestyle="", marker="s", markersize=4, color=colour, label=label)
    axes.set_aspect("equal")
    axes.invert_yaxis()
    ticks = range(0, SHOWN, 2)
    axes.set_xticks(ticks, [WORDS[s] for s in ticks], rotation=90, fontsize=7)
    axes.set_yticks(ticks, [WORDS[s] for s in ticks], fontsize=7)
    axes.set_xlabel("key s")
    axes.set_ylabel("query t")
    axes.legend(loc="upper right")
    return figure


def at_threshold() -> dict[str, list[float]]:
    """How many keys have exactly the score of the last selected one, mean over some random queries, by format."""
    generator = torch.Generator().manual_seed(0)
    q = torch.randn(1, QUERIES, 4, 64, generator=generator).double()
    keys = torch.randn(1, LENGTHS[-1], 64, generator=generator).double()
    scores = indexer_scores(
        q, keys, torch.zeros(1, QUERIES, 4), torch.zeros(4), scale=0.125, start=LENGTHS[-1] - QUERIES
    )[0]
    found: dict[str, list[float]] = {}
    for name, (dtype, _) in FORMATS.items():
        rounded = scores.to(dtype).double()
        found[name] = []
        for S in LENGTHS:
            threshold = rounded[:, :S].sort(descending=True)[0][:, S // SHARE - 1, None]
            found[name].append(float((rounded[:, :S] == threshold).sum() / QUERIES))
    return found


TIES = at_threshold()


def ties() -> Figure:
    """Keys at the threshold against the number of keys."""
    figure = Figure(figsize=(6, 2.8))
    axes = figure.add_subplot()
    for name, (_, colour) in FORMATS.items():
        axes.loglog(LENGTHS, TIES[name], color=colour, marker="o", markersize=3.5, label=name, base=2)
    axes.set_xticks(LENGTHS, [f"{S // 1024}K" for S in LENGTHS])
    axes.set_yticks([1, 4, 16, 64, 256], ["1", "4", "16", "64", "256"])
    axes.set_xlabel("keys")
    axes.set_ylabel("keys with the threshold's score")
    axes.legend()
    return figure


def changed_by_rounding() -> tuple[int, int]:
    """Of the queries of the text with a choice, how many select other words from bfloat16 scores."""
    differ = (chosen(SCORES) != chosen(SCORES.to(torch.bfloat16).double()))[K:].any(-1)
    return int(differ.sum()), len(differ)


if __name__ == "__main__":
    c, L = GSAConfig(), 2**17
    changed, queries = changed_by_rounding()
    main(
        "selection",
        {"text": text, "ties": ties},
        {
            "shown": SHOWN,
            "words": len(WORDS),
            "k": K,
            "changed": changed,
            "queries": queries,
            "S": f"{LENGTHS[-1]:,}",
            "k_ties": f"{LENGTHS[-1] // SHARE:,}",
            "ties_bfloat16": f"{TIES['bfloat16'][-1]:.0f}",
            "ties_float32": f"{TIES['float32'][-1]:.0f}",
            "L": f"{L:,}",
            "indices_gib": f"{4 * L * c.k_max / 2**30:.0f} GiB",
        },
    )
