"""Picture, tables and quoted figures of docs/theory/complexity.md: counts at the default sizes, beside the records."""

import sys
from fractions import Fraction
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, NullLocator
from style import BLUE, GREEN, ORANGE, main

from gsa_ref import GSACache, GSAConfig
from gsa_ref.theory import complexity

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "docs/hooks"))
from speed import Decode, Prefill, figure, length, percent, span  # noqa: E402

C, DENSE = GSAConfig(), GSAConfig().variant("dense")
L_PUBLISHED = 2**17
LENGTHS = [2**n for n in range(11, 21)]
PUBLISHED_ABLATION = {512: 22, 1024: 16, 2048: 12, 4096: 8}  # tokens per query: speed-up over dense, at 128K
D_FF = 11008  # a SwiGLU block as in LLaMA-7B, which has this d
PREFILL, DECODE = Prefill(ROOT), Decode(ROOT)
GREY = "#808690"


def full_speedup(L: int) -> float:
    """Multiply-adds of dense attention over those of indexer and sparse attention, as causal attention needs them."""
    return complexity.core_work(L, DENSE).multiply_adds / complexity.core_work(L, C).multiply_adds


def full_limit() -> Fraction:
    """What `full_speedup` tends to."""
    return Fraction(2 * C.H * C.d_h, C.H_I * C.d_I)


def ratio() -> Figure:
    """Both counts over length, their crossovers and marks, and the measured range of the whole path."""
    figure_ = Figure(figsize=(7.2, 3.8))
    axes = figure_.add_subplot()
    L = 2 ** np.linspace(9, 21, 97)
    axes.plot(L, [float(complexity.printed_speedup(int(n), C)) for n in L], color=BLUE, label="printed count")
    axes.plot(L, [full_speedup(int(n)) for n in L], color=GREEN, linestyle="--", label="full count")
    axes.axhline(1, color=GREY, linewidth=0.8)
    axes.axhline(float(complexity.printed_speedup_limit(C)), color=BLUE, linestyle=":", linewidth=1)
    axes.annotate(f"{complexity.printed_speedup_limit(C)} for L → ∞", (600, 17), color=BLUE)
    at = float(complexity.printed_speedup(L_PUBLISHED, C))
    axes.plot([L_PUBLISHED], [at], "o", color=BLUE, markersize=6)
    axes.annotate(f"{at:g}", (L_PUBLISHED, at), (1.15 * L_PUBLISHED, 0.8 * at), color=BLUE)
    crossover = float(complexity.printed_crossover(C))
    axes.plot([crossover], [1], "D", color=BLUE, markersize=5)
    axes.annotate(f"{crossover:,.0f}", (crossover, 1), (1.1 * crossover, 0.68), color=BLUE)
    lengths = [n for n in LENGTHS if PREFILL.spread(8, n)]
    if lengths:
        low, high = zip(*((s[0], s[-1]) for n in lengths if (s := PREFILL.spread(8, n))), strict=True)
        axes.fill_between(lengths, low, high, color=ORANGE, alpha=0.35, linewidth=0)
        axes.plot(lengths, high, "o-", color=ORANGE, markersize=3, linewidth=1, label="measured, 8 kv heads")
        axes.plot(lengths, low, "o-", color=ORANGE, markersize=3, linewidth=1)
    axes.set_xscale("log", base=2)
    axes.set_yscale("log", base=2)
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: length(int(value))))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}×"))
    axes.yaxis.set_minor_locator(NullLocator())
    axes.set_ylim(0.2, 40)
    axes.set_xlabel("tokens")
    axes.set_ylabel("dense over GSA")
    axes.legend(loc="lower right")
    return figure_


def lengths_table() -> dict[str, object]:
    rows = []
    for L in LENGTHS:
        counts = [float(complexity.printed_speedup(L, C)), full_speedup(L)]
        share = percent(float(complexity.printed_indexer_share(L, C)))
        rows.append([length(L), *map(figure, counts), share, *(span(PREFILL.spread(heads, L)) for heads in (8, 1))])
    header = ["tokens", "printed count", "full count", "indexer's share, printed"]
    header += [f"measured, {heads} kv head{'s' * (heads > 1)}" for heads in (8, 1)]
    return {"header": header, "rows": rows}


def decode_table() -> dict[str, object]:
    rows = []
    for S in (2**13, 2**15, 2**17, 2**20):
        dense, gsa = (complexity.decode_work(S, c) for c in (DENSE, C))
        timed = [figure(DECODE.speedup((8, 1, S), B)) for B in DECODE.batches]
        rows.append([length(S), figure(dense.bytes / gsa.bytes), figure(dense.flops / gsa.flops), *timed])
    return {"header": ["keys", "bytes", "operations", *(f"measured, B = {B}" for B in DECODE.batches)], "rows": rows}


def ceilings() -> dict[str, float]:
    """Measured ceilings of the prefill records, per second; empty without records."""
    units = {"matmul": ("tflops", 1e12), "copy": ("tbps", 1e12), "special": ("tops", 1e12)}
    found = {r["impl"]: r for r in PREFILL.all if r["case"] == "ceiling"}
    return {name: found[name][unit] * factor for name, (unit, factor) in units.items() if name in found}


def roofline_table() -> dict[str, object]:
    """Milliseconds at the measured ceilings, by the resource, for the published length."""
    at, L = ceilings(), L_PUBLISHED
    if len(at) < 3:
        return {"header": ["No ceilings are stored."], "rows": []}
    gathered = complexity.gathered_bytes(L, C)
    rows = []
    for name, work in (
        ("dense attention", complexity.core_work(L, DENSE)),
        ("indexer", complexity.indexer_work(L, C)),
        ("sparse attention, every row read once", complexity.sparse_attention_work(L, C)),
        ("sparse attention, every query reads its own", complexity.sparse_attention_work(L, C)),
    ):
        moved = work.bytes + (gathered if "its own" in name else 0)
        times = [work.flops / at["matmul"], work.special / at["special"], moved / at["copy"]]
        rows.append([name, *(figure(1e3 * t) for t in times), figure(work.flops / moved)])
    header = ["stage", "matrix products, ms", "special functions, ms", "bytes, ms", "FLOP per byte"]
    return {"header": header, "rows": rows}


def ablation_table() -> dict[str, object]:
    rows = []
    for k, published in PUBLISHED_ABLATION.items():
        counted = float(complexity.printed_speedup(L_PUBLISHED, C, k=k))
        dense, gsa = (complexity.core_work(L_PUBLISHED, c, k=k).multiply_adds for c in (DENSE, C))
        counts = [f"{figure(x)}×" for x in (counted, dense / gsa)]
        rows.append(
            [
                f"{k:,}",
                f"{published}×",
                *counts,
                f"{published * gsa / dense:.2f}",
                span(PREFILL.spread(8, L_PUBLISHED, k)),
            ]
        )
    full = float(complexity.printed_speedup(L_PUBLISHED, C, k=L_PUBLISHED))
    dense, gsa = (complexity.core_work(L_PUBLISHED, c, k=L_PUBLISHED).multiply_adds for c in (DENSE, C))
    rows.append(["full", "1×", f"{figure(full)}×", f"{figure(dense / gsa)}×", f"{gsa / dense:.2f}", "–"])
    header = ["k", "published", "printed count", "full count", "published / full", "measured, 8 kv heads"]
    return {"header": header, "rows": rows}


def parameters_table() -> dict[str, object]:
    counts = complexity.parameter_counts(C)
    dense, block = counts["attention"], 3 * C.d * D_FF
    rows = []
    for name, parts in {
        "indexer": ("indexer",),
        "value gate": ("value_gate",),
        "output gate": ("output_gate",),
        "all three": ("indexer", "value_gate", "output_gate"),
    }.items():
        n = sum(counts[p] for p in parts)
        rows.append([name, f"{n:,}", f"{100 * n / dense:.1f}%", f"{100 * n / (dense + block):.1f}%"])
    return {"header": ["added", "parameters", "of dense attention", "of attention and feed-forward"], "rows": rows}


def facts() -> dict[str, object]:
    c, L = C, L_PUBLISHED
    intercept, slope = complexity.cost_line(PUBLISHED_ABLATION)
    whole = [complexity.core_work(L, v).flops + complexity.projections_work(L, v).flops for v in (DENSE, C)]
    cache = GSACache.bytes_per_token
    return {
        "L": f"{L:,}",
        "at": f"{float(complexity.printed_speedup(L, c)):g}",
        "limit": str(complexity.printed_speedup_limit(c)),
        "crossover": f"{float(complexity.printed_crossover(c)):,.0f}",
        "full_at": figure(full_speedup(L)),
        "full_limit": str(full_limit()),
        "full_crossover": f"{complexity.core_crossover(c):,}",
        "half": f"{c.k_base * c.d // (c.H_I * c.d_I):,}",
        "full_half": f"{2 * c.k_base * c.H * c.d_h // (c.H_I * c.d_I) * 2:,}",
        "share_published": percent(float(complexity.printed_indexer_share(L, c))),
        "share_million": percent(float(complexity.printed_indexer_share(2**20, c))),
        "whole_layer": figure(whole[0] / whole[1], 2),
        "whole_layer_cost": f"{whole[1] / whole[0]:.2f}",
        "decode_bytes_cost": f"{complexity.decode_work(L, c).bytes / complexity.decode_work(L, DENSE).bytes:.3f}",
        "cache": f"{cache(c) / cache(DENSE):.2f}",
        "gathered": f"{complexity.gathered_bytes(L, c) / 1e12:.1f} TB",
        "implied_limit": figure(1 / intercept),
        "implied_length": f"{1 / slope:,.0f}",
        "d_ff": f"{D_FF:,}",
        "block_overhead": f"{100 * float(complexity.parameter_overhead(c, others=3 * c.d * D_FF)):.1f}%",
        "overhead": f"{100 * float(complexity.parameter_overhead(c)):.1f}%",
        "lengths": lengths_table(),
        "decode": decode_table(),
        "roofline": roofline_table(),
        "ablation": ablation_table(),
        "parameters": parameters_table(),
    }


if __name__ == "__main__":
    main("complexity", {"ratio": ratio}, facts())
