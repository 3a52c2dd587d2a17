"""Pictures and quoted figures of docs/learn/attention.md."""

import math

import numpy as np
import torch
from matplotlib.figure import Figure
from style import BLUE, GREEN, ORANGE, main, zen

from gsa_ref import GSAConfig, Selection, apply_rope, select_tokens, sparse_attention, tour

WORDS = zen()
L, K = len(WORDS), 8
CONFIG = tour.build_config(k_base=K)
HIDDEN = tour.embed(WORDS, CONFIG.d)
LAYER = tour.build_layer(CONFIG, HIDDEN)
SELECTION = select_tokens(tour.trace(LAYER, HIDDEN).scores, torch.full((1, L), K, dtype=torch.int32))
ROWS = [row[row >= 0].numpy() for row in SELECTION.indices[0]]
TILE = 2  # keys of a frame
SCALE = 2.0  # the logits of an untrained layer are small
SIZES = (1, 2, 4, 8, 16, 32)
UNION = 16


def projected() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """q, k and v of the text, as in the layer."""
    c = CONFIG
    with torch.no_grad():
        q = apply_rope(LAYER.W_q(HIDDEN).unflatten(-1, (c.H, c.d_h)), theta=c.rope_theta)
        k = apply_rope(LAYER.W_k(HIDDEN).unflatten(-1, (c.H_kv, c.d_h)), theta=c.rope_theta)
        return q, k, LAYER.W_v(HIDDEN).unflatten(-1, (c.H_kv, c.d_h))


Q, KEYS, V = projected()


def logits_of(t: int, head: int = 0) -> torch.Tensor:
    """Logits of one query over its selection."""
    return SCALE * (KEYS[0, ROWS[t], 0] @ Q[0, t, head])


def largest_so_far(t: int) -> list[float]:
    """The largest logit after each tile: m of the online softmax."""
    return [float(logits_of(t)[:n].max()) for n in range(TILE, K + 1, TILE)]


def weights_so_far(t: int, n: int, head: int = 0) -> np.ndarray:
    """Softmax weights of query t over the first n keys of its selection, as `sparse_attention` computes them."""
    q, k = math.sqrt(CONFIG.d_h) * SCALE * Q[:, t : t + 1], KEYS[:, : t + 1]
    seen = Selection(SELECTION.indices[:, t : t + 1, :n].contiguous(), torch.full((1, 1), n, dtype=torch.int32))
    return tour.attention_weights(q, k, seen)[0, 0, head, ROWS[t]].numpy()


def steadiest() -> int:
    """Of the queries that select K different words: the one whose largest logit rises most evenly, tile by tile."""
    candidates = [t for t in range(K, L) if len({WORDS[s] for s in ROWS[t]}) == K]
    return max(candidates, key=lambda t: min(np.diff(largest_so_far(t))))


QUERY = steadiest()


def online() -> Figure:
    """The online softmax of one query, frame by frame."""
    largest = largest_so_far(QUERY)
    figure = Figure(figsize=(7.2, 2.7), layout="constrained")
    panels = figure.subplots(1, len(largest), sharey=True)
    for i, (axes, m) in enumerate(zip(panels, largest, strict=True)):
        seen = (i + 1) * TILE
        weights = weights_so_far(QUERY, seen)
        axes.bar(range(seen - TILE), weights[: seen - TILE], color=BLUE)
        axes.bar(range(seen - TILE, seen), weights[seen - TILE : seen], color=ORANGE)
        axes.set_xticks(range(K), [WORDS[s] for s in ROWS[QUERY]], rotation=90)
        axes.set_xlim(-0.6, K - 0.4)
        axes.set_title(f"tile {i + 1}: m = {m:.2f}".replace("-", "−"), fontsize=9)
    panels[0].set_ylabel("weight so far")
    return figure


def loaded(rows: list[np.ndarray], size: int) -> float:
    """Keys loaded with tiles of `size` queries, for each key that a query reads."""
    tiles = [np.concatenate(rows[first : first + size]) for first in range(0, len(rows), size)]
    return sum(len(np.unique(tile)) for tile in tiles) / sum(len(row) for row in rows)


def kinds() -> dict[str, list[np.ndarray]]:
    """Selections of the same sizes: the indexer's, random ones, and the most recent words."""
    rng = np.random.default_rng(0)
    return {
        "the text": ROWS,
        "random": [rng.choice(t + 1, len(row), replace=False) for t, row in enumerate(ROWS)],
        f"the last {K}": [np.arange(t + 1 - len(row), t + 1) for t, row in enumerate(ROWS)],
    }


KINDS = kinds()


def union() -> Figure:
    """Keys loaded for each key read, against the size of a tile."""
    figure = Figure(figsize=(6, 2.8))
    axes = figure.add_subplot()
    for (name, rows), colour in zip(KINDS.items(), (BLUE, ORANGE, GREEN), strict=True):
        shares = [100 * loaded(rows, size) for size in SIZES]
        axes.plot(SIZES, shares, color=colour, marker="o", markersize=3.5, label=name)
    axes.set_xscale("log", base=2)
    axes.set_xticks(SIZES, [str(size) for size in SIZES])
    axes.set_yticks([0, 50, 100], ["0%", "50%", "100%"])
    axes.set_ylim(0, 105)
    axes.set_xlabel("queries in a tile")
    axes.set_ylabel("keys loaded / keys read")
    axes.legend()
    return figure


def traffic() -> dict[str, str]:
    """Bytes of keys and values at the default sizes, 16 bits, for one sequence without any cache."""
    c, length, tile = GSAConfig(), 2**17, 128
    token = c.H_kv * c.d_h * 2 * 2
    gathered = length * c.k_base * token
    dense = sum(first + tile for first in range(0, length, tile)) * token
    return {
        "L": f"{length:,}",
        "tile": str(tile),
        "query_mib": f"{c.k_base * token / 2**20:.0f} MiB",
        "gathered": f"{gathered / 2**40:.0f} TiB",
        "dense": f"{dense / 2**30:.0f} GiB",
        "ratio": f"{gathered / dense:.1f}",
        "of_operations": f"{100 * c.k_base / (length / 2):.1f}%",
    }


if __name__ == "__main__":
    whole = sparse_attention(Q, KEYS, V, SELECTION)[0][:, K:]
    cut = (SELECTION.indices[..., :3], SELECTION.indices[..., 3:])
    parts = [Selection(x.contiguous(), (x >= 0).sum(-1, dtype=torch.int32)) for x in cut]
    average = sum(sparse_attention(Q, KEYS, V, part)[0][:, K:] for part in parts) / 2
    main(
        "attention",
        {"online": online, "union": union},
        {
            "words": L,
            "k": K,
            "position": QUERY,
            "word": WORDS[QUERY],
            "union_size": UNION,
            **{f"union_{kind.split()[-1]}": f"{100 * loaded(rows, UNION):.0f}%" for kind, rows in KINDS.items()},
            "average_off": f"{100 * (average - whole).norm() / whole.norm():.0f}%",
            **traffic(),
        },
    )
