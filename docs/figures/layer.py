"""Pictures, table and quoted figures of docs/learn/layer.md: decoding with and without the indexer's keys."""

import torch
from matplotlib.figure import Figure
from style import BLUE, GREEN, ORANGE, main, zen

from gsa_ref import GSACache, GSAConfig, tour
from gsa_ref.config import VARIANTS
from gsa_ref.theory import complexity

WORDS = zen()
L, PROMPT = len(WORDS), 100
FIRST, LAST = 90, 115  # queries of the picture
CONFIG = tour.build_config(k_base=8)
HIDDEN = tour.embed(WORDS, CONFIG.d)
LAYER = tour.build_layer(CONFIG, HIDDEN).requires_grad_(False)
ONE_PASS = LAYER(HIDDEN).hidden
SELECTION = tour.trace(LAYER, HIDDEN).selection


def steps(keys: str) -> torch.Tensor:
    """Outputs of the words behind the prompt, one at a time, with the indexer keys of a cache kept, lost or zeroed."""
    if keys == "lost":  # a step that knows its own word only
        return torch.cat([LAYER(HIDDEN[:, t : t + 1]).hidden for t in range(PROMPT, L)], dim=1)
    cache, rows = GSACache.allocate(CONFIG, 1, L, dtype=torch.float64), []
    LAYER(HIDDEN[:, :PROMPT], cache=cache)
    for t in range(PROMPT, L):
        if keys == "zeros" and cache.k_idx is not None:
            cache.k_idx.zero_()
        rows.append(LAYER(HIDDEN[:, t : t + 1], cache=cache).hidden)
    return torch.cat(rows, dim=1)


def off(rows: torch.Tensor) -> torch.Tensor:
    """Difference from one pass, relative to the output's size, for each step."""
    expected = ONE_PASS[:, PROMPT:]
    return ((rows - expected).norm(dim=-1) / expected.norm(dim=-1))[0]


OFF = {name: off(steps(name)) for name in ("lost", "zeros", "kept")}


def selection() -> Figure:
    """Which keys the queries around the end of the prompt read; a step without indexer keys reads its own word only."""
    figure = Figure(figsize=(7.2, 2.9))
    panels = figure.subplots(1, 2, sharey=True)
    for axes, title in zip(panels, ("indexer keys kept", "indexer keys lost"), strict=True):
        pairs = []
        for t in range(FIRST, LAST):
            row = SELECTION.indices[0, t, : SELECTION.counts[0, t]].tolist()
            pairs += [(s, t) for s in (row if t < PROMPT or title.endswith("kept") else [t])]
        axes.plot(*zip(*pairs, strict=True), linestyle="", marker="s", markersize=2.5, color=BLUE)
        axes.axhline(PROMPT - 0.5, color=ORANGE, linewidth=1)
        axes.set_title(title, fontsize=9)
        axes.set_xlabel("key")
    panels[0].invert_yaxis()
    panels[0].set_ylabel("query")
    return figure


def error() -> Figure:
    """How far the steps of three caches are from one pass."""
    figure = Figure(figsize=(6, 2.8))
    axes = figure.add_subplot()
    lines = {"lost": (ORANGE, "o"), "zeros": (GREEN, "s"), "kept": (BLUE, "^")}
    for name, (colour, marker) in lines.items():
        # Rounding differs between machines: what is below the tolerance of the tests is drawn at it.
        shown = OFF[name].clamp(min=1e-12)
        axes.semilogy(range(PROMPT, L), shown, color=colour, linestyle="", marker=marker, markersize=3, label=name)
    axes.set_ylim(1e-13, 30)
    axes.set_xlabel("query")
    axes.set_ylabel("difference from one pass")
    axes.legend(title="indexer keys", loc="center right")
    return figure


def variants() -> dict[str, object]:
    """The four variants at the default sizes."""
    rows = []
    for name in VARIANTS:
        config = GSAConfig().variant(name)
        parameters = sum(complexity.parameter_counts(config).values())
        held = GSACache.bytes_per_token(config, dtype=torch.bfloat16)
        rows.append([name, str(config.sparse), config.gates, f"{parameters:,}", f"{held:,}"])
    header = ["variant", "`sparse`", "`gates`", "parameters of a layer", "bytes per cached token, 16 bits"]
    return {"header": header, "rows": rows, "left": 3}


if __name__ == "__main__":
    main(
        "layer",
        {"selection": selection, "error": error},
        {
            "words": L,
            "prompt": PROMPT,
            "steps": L - PROMPT,
            **{f"median_{name}": f"{100 * float(OFF[name].median()):.0f}%" for name in ("lost", "zeros")},
            "variants": variants(),
        },
    )
