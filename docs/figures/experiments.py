"""Pictures of docs/verify/experiments.md from the stored records, and the unions of the benches' made-up selections
at the length and budget of the trained ones, to compare them with."""

import sys
from functools import cache
from itertools import cycle
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator
from style import BLUE, GREEN, ORANGE, main

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "docs/hooks"))
from intervals import t_interval  # noqa: E402
from speed import length, load  # noqa: E402
from studies import LONG_RANGE, NAMES, SELECTIONS, VARIANTS, Main, by_rule, long_range, loss, random_ages  # noqa: E402

from gsa_fast.bench.patterns import draw_selection, effective_fraction, measure_overlap  # noqa: E402
from gsa_ref import GSAConfig, LanguageModel, ModelConfig, Selection  # noqa: E402

PURPLE, RED, BROWN, GREY = "#b565a7", "#c44e52", "#8c6d31", "#808690"
COLOURS = (BLUE, ORANGE, GREEN, PURPLE, RED, BROWN)
LINES = dict(zip(NAMES, ((GREY, "-", "o"), (BLUE, "--", "s"), (ORANGE, "-.", "^"), (GREEN, "-", "D")), strict=True))
PATTERNS = ("clustered p=0.98", "clustered p=0.95", "clustered p=0.87", "clustered p=0.44", "random")
RULE = "fixed"  # every row selects k_base tokens, as the patterns do in the mean
MOST = 4096  # tiles that a union is measured over: all

for path in (VARIANTS, SELECTIONS):
    if not (ROOT / path).is_file():
        sys.exit(f"There is nothing to draw: no record is stored in {path}.")
MAIN, BY_RULE, LONG = Main(ROOT), by_rule(ROOT), load(ROOT, LONG_RANGE)


@cache
def pattern_unions() -> dict[str, dict[int, float]]:
    """U/k of the patterns by group size, over the rows that the records of the trained selections count."""
    run = BY_RULE[RULE]
    s, first = run["settings"], run["selections"][0]["first_row"]
    found = {}
    for name in PATTERNS:
        drawn = draw_selection(name, s["context"], k_base=s["k_base"], width=s["k_max"], seed=0, device="cpu")
        rows = Selection(drawn.indices[:, first:], drawn.counts[:, first:])
        sizes = map(int, run["selections"][0]["union"])
        found[name] = {size: measure_overlap(rows, size, samples=MOST).union_over_k for size in sizes}
    return found


def logarithmic(axes: Axes, values: list[float], show: str = "{:g}") -> None:
    """Powers of two on the horizontal axis, a tick at each value."""
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_locator(FixedLocator(values))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: show.format(value)))


def rates() -> Figure:
    """Loss of the sweep against learning rate; runs that diverged are left out."""
    figure = Figure(figsize=(5.2, 3.2))
    axes = figure.subplots()
    for variant, (colour, dashes, marker) in LINES.items():
        points = [(rate, loss(r)) for rate, r in sorted(MAIN.sweep.get(variant, {}).items()) if not r["diverged"]]
        axes.plot(*zip(*points, strict=True), dashes, color=colour, marker=marker, markersize=3, label=variant)
    logarithmic(axes, MAIN.rates)
    axes.set_xlabel("learning rate")
    axes.set_ylabel("validation loss")
    axes.legend()
    return figure


def sinks() -> Figure:
    """Attention on position 0 by block with its interval over the seeds, and that of uniform attention, dashed."""
    figure = Figure(figsize=(5.2, 3.2))
    axes = figure.subplots()
    context = 0
    for i, (variant, (colour, dashes, marker)) in enumerate(LINES.items()):
        runs = list(MAIN.seeds(variant).values())
        blocks = range(len(runs[0]["layers"]))
        context = runs[0]["settings"]["context"]
        found = [t_interval([100 * r["layers"][b]["first_token_share"] for r in runs]) for b in blocks]
        x = [b + 1 + (i - 1.5) * 0.08 for b in blocks]
        means, lows, highs = zip(*found, strict=True)
        around = [
            [m - low for m, low in zip(means, lows, strict=True)],
            [h - m for h, m in zip(highs, means, strict=True)],
        ]
        axes.errorbar(
            x, means, around, fmt=dashes, color=colour, marker=marker, markersize=3, linewidth=1, label=variant
        )
    axes.axhline(100 * sum(1 / (t + 1) for t in range(1, context)) / (context - 1), color=GREY, linestyle=(0, (4, 3)))
    axes.set_ylim(bottom=0)
    axes.set_xlabel("block")
    axes.set_ylabel("attention on position 0, %")
    axes.legend(loc="center left", bbox_to_anchor=(1, 0.5))
    return figure


def unions() -> Figure:
    """The union of a group of neighbouring queries' selections over k: blocks coloured, the benches' patterns grey."""
    figure = Figure(figsize=(6.2, 3.6))
    axes = figure.subplots()
    for (name, found), dashes in zip(pattern_unions().items(), ("-", "--", "-.", ":", (0, (1, 3))), strict=True):
        axes.plot(*zip(*found.items(), strict=True), color=GREY, linestyle=dashes, label=name)
    for i, (layer, colour) in enumerate(zip(BY_RULE[RULE]["selections"], cycle(COLOURS))):
        sizes = list(map(int, layer["union"]))
        axes.plot(
            sizes, layer["union"].values(), color=colour, marker="os^Dv<"[i % 6], markersize=3, label=f"block {i + 1}"
        )
    logarithmic(axes, sizes)
    axes.set_xlabel("neighbouring queries")
    axes.set_ylabel("union / k")
    axes.legend(loc="center left", bbox_to_anchor=(1, 0.5))
    return figure


def ages() -> Figure:
    """Which share of the selected tokens has which age, a line per block; dashed where all ages are selected alike."""
    figure = Figure(figsize=(6.2, 3.4))
    axes = figure.subplots()
    run = BY_RULE["proportional"]
    starts = [0, *(2**i for i in range(len(run["selections"][0]["age"]) - 1))]
    bins = range(len(starts))
    for i, (layer, colour) in enumerate(zip(run["selections"], cycle(COLOURS))):
        shares = [100 * share for share in layer["age"]]
        axes.plot(
            bins, shares, color=colour, marker="os^Dv<"[i % 6], markersize=3, linewidth=1.2, label=f"block {i + 1}"
        )
    axes.plot(
        bins, [100 * x for x in random_ages(run)[: len(starts)]], color=GREY, linestyle=(0, (4, 3)), label="by chance"
    )
    axes.set_xticks(list(bins), [str(start) for start in starts], rotation=45)
    axes.set_xlabel("age in tokens, from")
    axes.set_ylabel("share of the selected tokens, %")
    axes.legend(loc="center left", bbox_to_anchor=(1, 0.5))
    return figure


def lengths() -> Figure:
    """Accuracy against test length, mean over the seeds, with a dot for each."""
    groups = long_range(ROOT)
    tasks = list(dict.fromkeys(task for task, _ in groups))
    figure = Figure(figsize=(3.6 * len(tasks), 3.2))
    panels = figure.subplots(1, len(tasks), sharey=True, squeeze=False)[0]
    for axes, task in zip(panels, tasks, strict=True):
        for variant, (colour, dashes, marker) in LINES.items():
            by_length: dict[int, list[float]] = {}
            for record in groups.get((task, variant), []):
                for test in record["tests"]:
                    by_length.setdefault(test["length"], []).append(100 * test["accuracy"])
            if by_length:
                means = [sum(x) / len(x) for x in by_length.values()]
                axes.plot(list(by_length), means, dashes, color=colour, label=variant, linewidth=1.2)
                dots = [(L, x) for L, found in by_length.items() for x in found]
                axes.plot(*zip(*dots, strict=True), marker, color=colour, markersize=3)
        logarithmic(axes, sorted({test["length"] for r in LONG for test in r["tests"]}))
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: length(int(value))))
        axes.set_title(task, fontsize=9)
        axes.set_xlabel("tokens")
    panels[0].set_ylabel("accuracy, %")
    panels[-1].legend(loc="center left", bbox_to_anchor=(1, 0.5))
    return figure


def parameters() -> dict[str, object]:
    """The size of each variant of the main table."""
    s = next(iter(MAIN.seeds("gsa").values()))["settings"]
    names = ("d", "H", "H_kv", "d_h", "H_I", "d_I", "k_base", "k_min", "k_max")
    rows = []
    for variant in NAMES:
        attention = GSAConfig(**{name: s[name] for name in names}).variant(variant)
        model = LanguageModel(ModelConfig(attention=attention, n_layers=s["n_layers"], d_ff=s["d_ff"]))
        rows.append([variant, f"{sum(p.numel() for p in model.parameters()):,}"])
    return {"header": ["variant", "parameters"], "rows": rows}


def union_table() -> dict[str, object]:
    """U/k of the blocks with the fixed budget and of the patterns, by group size."""
    blocks = BY_RULE[RULE]["selections"]
    rows = [[f"block {i + 1}", *(f"{x:.2f}" for x in layer["union"].values())] for i, layer in enumerate(blocks)]
    rows += [[name, *(f"{x:.2f}" for x in found.values())] for name, found in pattern_unions().items()]
    return {"header": ["selection", *(f"{size} queries" for size in blocks[0]["union"])], "rows": rows}


def fractions() -> tuple[float, float]:
    """p_eff of 16 queries, of the block that shares least and of the one that shares most."""
    found = sorted(effective_fraction(layer["union"]["16"]) for layer in BY_RULE[RULE]["selections"])
    return found[0], found[-1]


if __name__ == "__main__":
    pictures = {"rates": rates, "sinks": sinks, "unions": unions, "ages": ages}
    if LONG:
        pictures["lengths"] = lengths
    facts: dict[str, object] = {
        "parameters": parameters(),
        "unions": union_table(),
        "p_eff": "–".join(f"{x:.2f}" for x in fractions()),
        **{f"union_{name.split('=')[-1]}": f"{found[16]:.1f}" for name, found in pattern_unions().items()},
    }
    main("experiments", pictures, facts)
