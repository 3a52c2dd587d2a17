"""Pictures and quoted figures of docs/learn/attention.md."""

import math
from functools import partial

import matplotlib as mpl
import numpy as np
import torch
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
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


def first_keys(t: int, n: int) -> tuple[torch.Tensor, torch.Tensor, Selection]:
    """Query t, the keys that it sees, and the first n keys of its selection."""
    q, k = math.sqrt(CONFIG.d_h) * SCALE * Q[:, t : t + 1], KEYS[:, : t + 1]
    return q, k, Selection(SELECTION.indices[:, t : t + 1, :n].contiguous(), torch.full((1, 1), n, dtype=torch.int32))


def weights_so_far(t: int, n: int, head: int = 0) -> np.ndarray:
    """Softmax weights of query t over the first n keys of its selection, as `sparse_attention` computes them."""
    return tour.attention_weights(*first_keys(t, n))[0, 0, head, ROWS[t]].numpy()


def output_so_far(t: int, n: int, head: int = 0) -> tuple[np.ndarray, float]:
    """Output and lse of query t over the first n keys of its selection."""
    q, k, seen = first_keys(t, n)
    out, lse = sparse_attention(q, k, V[:, : t + 1], seen)
    return out[0, 0, head].numpy(), float(lse[0, 0, head])


def steadiest() -> int:
    """Of the queries that select K different words: the one whose largest logit rises most evenly, tile by tile."""
    candidates = [t for t in range(K, L) if len({WORDS[s] for s in ROWS[t]}) == K]
    return max(candidates, key=lambda t: min(np.diff(largest_so_far(t))))


QUERY = steadiest()


def signed(x: float) -> str:
    return f"{x:.2f}".replace("-", "−")


def online(frame: int) -> Figure:
    """The online softmax of one query after some tiles: the weights so far, and acc / l beside what it ends at."""
    seen = frame * TILE
    weights, (out, lse) = weights_so_far(QUERY, seen), output_so_far(QUERY, seen)
    m = largest_so_far(QUERY)[frame - 1]
    figure = Figure(figsize=(6.4, 2.8), layout="constrained")
    left, right = figure.subplots(1, 2)
    left.bar(range(seen - TILE), weights[: seen - TILE], color=BLUE)
    left.bar(range(seen - TILE, seen), weights[seen - TILE : seen], color=ORANGE)
    left.set_xticks(range(K), [WORDS[s] for s in ROWS[QUERY]], rotation=90)
    left.set_xlim(-0.6, K - 0.4)
    left.set_ylim(0, 1)
    left.set_ylabel("weight so far")
    left.set_title(f"tile {frame}: m = {signed(m)}, l = {math.exp(lse - m):.2f}", fontsize=9)
    whole, channels = output_so_far(QUERY, K)[0], range(CONFIG.d_h)
    right.bar(channels, out, color=BLUE, label="acc / l")
    right.plot(channels, whole, color=GREEN, marker="_", markersize=8, linestyle="", label="after the last tile")
    reach = 1.1 * max(np.abs(output_so_far(QUERY, n)[0]).max() for n in range(TILE, K + 1, TILE))
    right.set_ylim(-reach, 1.5 * reach)
    right.set_xlabel("channel")
    right.set_ylabel("output so far")
    right.legend(loc="upper left", ncols=2)
    return figure


def online_told(frame: int) -> str:
    """The frame in words."""
    seen, largest = frame * TILE, largest_so_far(QUERY)
    new = " and ".join(f"“{WORDS[s]}”" for s in ROWS[QUERY][seen - TILE : seen])
    m, lse = largest[frame - 1], output_so_far(QUERY, seen)[1]
    told = f"Frame {frame} of {len(largest)}: {new} come in; m = {signed(m)} and l = {math.exp(lse - m):.2f}."
    if frame > 1:
        told += f" What came before is multiplied by {math.exp(largest[frame - 2] - m):.2f}."
    if frame == len(largest):
        return told + " The output is whole."
    whole, so_far = (output_so_far(QUERY, n)[0] for n in (K, seen))
    return told + f" The output so far is off by {100 * np.linalg.norm(so_far - whole) / np.linalg.norm(whole):.0f}%."


# A union tile: some consecutive queries, and the union of their selections in tiles of keys.
QUERIES = range(QUERY - QUERY % 4, QUERY - QUERY % 4 + 4)
UNITED = np.unique(np.concatenate([ROWS[t] for t in QUERIES]))
KEY_TILE = 8
KEY_TILES = -(-len(UNITED) // KEY_TILE)


def counts(frame: int) -> tuple[int, int, int]:
    """After some tiles of keys: keys loaded, keys that the queries read of them, and logits computed."""
    keys = UNITED[: frame * KEY_TILE]
    return len(keys), sum(int(np.isin(ROWS[t], keys).sum()) for t in QUERIES), len(keys) * len(QUERIES)


def stream(frame: int) -> Figure:
    """A union tile after some tiles of keys: what was loaded, what each query reads of it, and its weights so far."""
    figure = Figure(figsize=(6.4, 2.3), layout="constrained")
    axes = figure.add_subplot()
    n_loaded, n_read, _ = counts(frame)
    ink = mpl.rcParams["text.color"]
    masked = []
    for row, t in enumerate(QUERIES):
        reads = ROWS[t][np.isin(ROWS[t], UNITED[:n_loaded])]
        weights = dict(zip(reads, weights_so_far(t, len(reads)), strict=False)) if len(reads) else {}
        for column, s in enumerate(UNITED):
            is_new = (frame - 1) * KEY_TILE <= column
            if s in weights:
                axes.add_patch(Rectangle((column, row), 0.9, 0.9, facecolor=ORANGE if is_new else BLUE, alpha=0.15))
                height = 0.9 * weights[s]
                axes.add_patch(Rectangle((column, row + 0.9 - height), 0.9, height, color=ORANGE if is_new else BLUE))
            elif column < n_loaded:
                masked.append((column + 0.45, row + 0.45))
            else:
                axes.add_patch(Rectangle((column, row), 0.9, 0.9, fill=False, edgecolor=ink, alpha=0.2))
    axes.plot(*zip(*masked, strict=True), marker="x", markersize=3, linestyle="", color=ink, alpha=0.6)
    axes.set_xlim(-0.2, len(UNITED) + 0.1)
    axes.set_ylim(len(QUERIES), -0.1)
    axes.set_xticks(np.arange(len(UNITED)) + 0.45, [WORDS[s] for s in UNITED], rotation=90)
    axes.set_yticks(np.arange(len(QUERIES)) + 0.45, [WORDS[t] for t in QUERIES])
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    axes.set_title(f"tile {frame} of {KEY_TILES}: {n_loaded} keys loaded, {n_read} read", fontsize=9)
    return figure


def stream_told(frame: int) -> str:
    """The frame in words."""
    n_loaded, n_read, n_logits = counts(frame)
    before = counts(frame - 1)
    new = f"{n_loaded - before[0]} keys are loaded, of which the {len(QUERIES)} queries read {n_read - before[1]}."
    so_far = f"So far {n_loaded} keys are loaded for {n_read} that are read, and {n_logits} logits are computed"
    return f"Frame {frame} of {KEY_TILES}: {new} {so_far}, of which {n_logits - n_read} are masked."


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
        {
            **{f"online_{n}": partial(online, n) for n in range(1, K // TILE + 1)},
            **{f"stream_{n}": partial(stream, n) for n in range(1, KEY_TILES + 1)},
            "union": union,
        },
        {
            "words": L,
            "k": K,
            "position": QUERY,
            "word": WORDS[QUERY],
            "online": {
                "title": "The online softmax of one query, tile by tile",
                "frames": [online_told(n) for n in range(1, K // TILE + 1)],
            },
            "stream": {
                "title": "A union tile, its keys streamed in tiles",
                "frames": [stream_told(n) for n in range(1, KEY_TILES + 1)],
            },
            "tile_queries": len(QUERIES),
            "tile_loaded": counts(KEY_TILES)[0],
            "tile_read": counts(KEY_TILES)[1],
            "union_size": UNION,
            **{f"union_{kind.split()[-1]}": f"{100 * loaded(rows, UNION):.0f}%" for kind, rows in KINDS.items()},
            "average_off": f"{100 * (average - whole).norm() / whole.norm():.0f}%",
            **traffic(),
        },
    )
