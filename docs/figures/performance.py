"""Pictures of docs/verify/performance.md from the stored records: speed over cuDNN of the whole path against length;
where all ceilings are stored, the stages below their rooflines; where records of decoding are stored, the speed of a
decode step against batch size."""

import sys
from functools import partial
from itertools import cycle
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, NullLocator
from style import BLUE, GREEN, ORANGE, main

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "docs/hooks"))
from speed import K_BASE, PREFILL, Decode, Prefill, length  # noqa: E402

PURPLE, GREY = "#b565a7", "#808690"
LINES = {
    "clustered p=0.98": (BLUE, "-", "o"),
    "clustered p=0.95": (BLUE, "--", "s"),
    "clustered p=0.87": (BLUE, "-.", "^"),
    "clustered p=0.44": (BLUE, ":", "v"),
    "random": (ORANGE, "-", "o"),
    "window": (GREEN, "-", "s"),
    "ties": (GREEN, "--", "^"),
    "smooth": (PURPLE, "-", "D"),
}

ROOFLINE_LENGTH = 131072
STAGES = {  # of the roofline picture: case and implementation, colour and marker
    ("attention", "cudnn"): (GREY, "D", "dense attention, cuDNN"),
    ("attention", "flash"): (GREY, "v", "dense attention, FlashAttention"),
    ("attention", "gsa_fast"): (BLUE, "o", "sparse attention"),
    ("indexed_selection", "gsa_fast"): (ORANGE, "s", "indexer and selection"),
    ("whole", "gsa_fast"): (GREEN, "^", "whole path"),
}

if not (ROOT / PREFILL).is_file():
    sys.exit(
        f"There is nothing to draw: no record is stored in {PREFILL}. Run `python -m gsa_fast bench prefill` first."
    )
RECORDS, STEPS = Prefill(ROOT), Decode(ROOT)


def speed_axes(axes: Axes) -> None:
    """Powers of two both ways, and a dashed line at 1: below it dense attention wins."""
    axes.axhline(1, color=GREY, linestyle=(0, (4, 3)), linewidth=1)
    axes.set_xscale("log", base=2)
    axes.set_yscale("log", base=2)
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}×"))
    axes.yaxis.set_minor_locator(NullLocator())


def speedup() -> Figure:
    """One panel per number of key/value heads, one line per selection; below the dashed line dense attention wins."""
    figure = Figure(figsize=(7.2, 3.4))
    panels = figure.subplots(1, len(RECORDS.heads), sharey=True, squeeze=False)[0]
    for axes, heads in zip(panels, RECORDS.heads, strict=True):
        for name, (colour, dashes, marker) in LINES.items():
            points = [
                (L, x)
                for L in RECORDS.lengths
                if (x := RECORDS.speedup(heads, name.replace(" ", "\u00a0"), L)) is not None
            ]
            if points:
                L, x = zip(*points, strict=True)
                axes.plot(L, x, dashes, color=colour, marker=marker, markersize=3, linewidth=1.2, label=name)
        speed_axes(axes)
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: length(int(value))))
        axes.set_title(f"{heads} key/value head{'s' if heads > 1 else ''}", fontsize=9)
        axes.set_xlabel("tokens")
    panels[0].set_ylabel("speed over cuDNN")
    shown = {label: line for axes in panels for line, label in zip(*axes.get_legend_handles_labels(), strict=True)}
    figure.legend(
        [shown[name] for name in LINES if name in shown],
        [name for name in LINES if name in shown],
        loc="lower center",
        ncols=4,
        bbox_to_anchor=(0.5, -0.14),
    )
    return figure


def ceilings() -> tuple[float, float, float] | None:
    """TFLOP/s of matrix products, TB/s of copies and of gathers from the L2 cache; None if one is not stored."""
    found = {r["impl"]: r for r in RECORDS.all if r["case"] == "ceiling"}
    if not {"matmul", "copy", "gather"} <= found.keys():
        return None
    return found["matmul"]["tflops"], found["copy"]["tbps"], found["gather"]["tbps"]


def roofline(matmul: float, copy: float, gather: float) -> Figure:
    """Measured TFLOP/s of the stages against FLOP per byte, below what matrix units and memories can give."""
    figure = Figure(figsize=(7.2, 3.4))
    axes = figure.add_subplot()
    intensity = 2.0 ** np.linspace(4, 17, 200)
    for rate, dashes, name in ((gather, "-", "L2 cache"), (copy, "--", "device memory")):
        axes.plot(intensity, np.minimum(matmul, rate * intensity), dashes, color=GREY, linewidth=1, label=name)
    for (case, impl), (colour, marker, name) in STAGES.items():
        points = [
            (r["tflops"] / r["tbps"], r["tflops"])
            for r in RECORDS.cases
            if (r["case"], r["impl"]) == (case, impl)
            and r["ms"]
            and r["shape"]["L"] == ROOFLINE_LENGTH
            and r["shape"]["H_kv"] in (None, max(RECORDS.heads))
            and r["shape"]["k"] in (None, K_BASE)
            and r.get("sigmoid_mode") in (None, "exact")
        ]
        if points:
            axes.plot(*zip(*points, strict=True), marker, color=colour, markersize=4, label=name)
    axes.set_xscale("log", base=2)
    axes.set_yscale("log", base=2)
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
        axis.set_minor_locator(NullLocator())
    axes.set_xlabel("FLOP per byte")
    axes.set_ylabel("TFLOP/s")
    axes.set_ylim(48, 1024)
    figure.legend(loc="lower center", ncols=3, bbox_to_anchor=(0.5, -0.24))
    return figure


def decode() -> Figure:
    """One line per number of keys: one query, the most key/value heads; below the dashed line dense attention wins."""
    figure = Figure(figsize=(5.2, 3.2))
    axes = figure.subplots()
    heads = STEPS.sizes[0][0]
    shown = [size for size in STEPS.sizes if size[:2] == (heads, 1)]
    for size, colour, marker in zip(shown, cycle((BLUE, ORANGE, GREEN, PURPLE, GREY)), cycle("os^Dv")):
        points = [(B, x) for B in STEPS.batches if (x := STEPS.speedup(size, B)) is not None]
        if points:
            axes.plot(
                *zip(*points, strict=True),
                color=colour,
                marker=marker,
                markersize=3,
                linewidth=1.2,
                label=f"{length(size[2])} keys",
            )
    speed_axes(axes)
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.set_title(f"{heads} key/value head{'s' if heads > 1 else ''}, one query", fontsize=9)
    axes.set_xlabel("sequences")
    axes.set_ylabel("speed over cuDNN")
    axes.legend(loc="center left", bbox_to_anchor=(1, 0.5))
    return figure


if __name__ == "__main__":
    facts = {"devices": sorted({record["device"] for record in RECORDS.all + STEPS.all}), "records": len(RECORDS.all)}
    pictures = {"speedup": speedup}
    if at := ceilings():
        pictures["roofline"] = partial(roofline, *at)
    if STEPS.cases:
        pictures["decode"], facts["decode_records"] = decode, len(STEPS.all)
    main("performance", pictures, facts)
