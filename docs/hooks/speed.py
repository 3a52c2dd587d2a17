"""Tables of the performance page, from the record files: every figure on it comes from here."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

RESULTS = "benchmarks/results/h200"
PREFILL = f"{RESULTS}/prefill.json"
DECODE = f"{RESULTS}/decode.json"
TRAIN = f"{RESULTS}/train.json"
LONG = f"{RESULTS}/long_verification.json"
TRIED = f"{RESULTS}/tried.json"
PREFILL_PICTURE = "figures/performance_speedup"
ROOFLINE_PICTURE = "figures/performance_roofline"
DECODE_PICTURE = "figures/performance_decode"
K_BASE = 2048  # the budget of every table but the one over budgets
FUSED, GENERAL = "gsa_fast", "gsa_fast_general"
IN_ORDER, ATOMIC = "gsa_fast", "gsa_fast atomic"
KL_COMMAND = f"python -m gsa_fast bench train --case kl_loss --json {RESULTS}/train.json"
STAGES = ("indexer", "indexed_selection", "gates", "attention", "whole")

Record = dict[str, Any]


def missing(path: str) -> str:
    return f"No record is stored: there is no `{path}`. Not measured yet."


def load(root: Path, path: str) -> list[Record]:
    """The records of a file, none if there is no such file.

    Raises:
        ValueError: the file is no list of records.
    """
    if not (root / path).is_file():
        return []
    found = json.loads((root / path).read_text(encoding="utf-8"))
    if not isinstance(found, list):
        raise ValueError(f"{path}: expected a list of records, got {type(found).__name__}")
    return found


def length(L: int) -> str:
    """2048 as 2K, 1048576 as 1M."""
    for unit, name in ((2**20, "M"), (2**10, "K")):
        if L % unit == 0:
            return f"{L // unit}{name}"
    return str(L)


def table(header: Sequence[str], rows: Sequence[Sequence[object]], left: int = 1) -> str:
    """A Markdown table; the first `left` columns are text, the others figures."""
    rule = "|" + "---|" * left + "--:|" * (len(header) - left)
    return "\n".join(["| " + " | ".join(header) + " |", rule, *("| " + " | ".join(map(str, r)) + " |" for r in rows)])


def figure(value: float | None, digits: int = 3) -> str:
    """A number with about three significant digits, a dash for none."""
    if value is None:
        return "–"
    return f"{value:.0f}" if abs(value) >= 10 ** (digits - 1) else f"{value:.{digits}g}"


def percent(value: float | None) -> str:
    return "–" if value is None else f"{100 * value:.0f}%"


def median(record: Record | None) -> float | None:
    return record["ms"]["median"] if record and record["ms"] else None


def selection(record: Record) -> str:
    """The record's selection, with ≈ for the indexer's approximate sigmoid."""
    name = (record["selection"] or "–").replace(" ", "\u00a0")
    return f"{name}\u00a0≈" if record.get("sigmoid_mode") == "approximate" else name


class Prefill:
    """The prefill records, by what they measure."""

    def __init__(self, root: Path) -> None:
        self.all = load(root, PREFILL)
        self.cases = [r for r in self.all if r["case"] != "ceiling"]
        self.dense = {
            (r["impl"], r["shape"]["H_kv"], r["shape"]["L"]): r for r in self.cases if r["impl"] in ("cudnn", "flash")
        }
        self.wholes = {
            (r["shape"]["H_kv"], selection(r), r["shape"]["L"], r["shape"]["k"]): r
            for r in self.cases
            if r["case"] == "whole"
        }
        self.lengths = sorted({L for _, _, L, k in self.wholes if k == K_BASE})
        self.heads = sorted({h for h, _, _, _ in self.wholes}, reverse=True)
        self.selections = list(dict.fromkeys(s for _, s, _, k in self.wholes if k == K_BASE))

    def whole(self, H_kv: int, selection: str, L: int, k: int = K_BASE) -> Record | None:
        return self.wholes.get((H_kv, selection, L, k))

    def speedup(self, H_kv: int, selection: str, L: int, k: int = K_BASE) -> float | None:
        """cuDNN's time over that of the whole path, None where one of them was not measured."""
        dense, sparse = median(self.dense.get(("cudnn", H_kv, L))), median(self.whole(H_kv, selection, L, k))
        return dense / sparse if dense and sparse else None

    def spread(self, H_kv: int, L: int, k: int = K_BASE) -> list[float]:
        """`speedup` of every timed selection with the exact sigmoid, the slowest first."""
        exact = [name for name in dict.fromkeys(s for _, s, _, _ in self.wholes) if "≈" not in name]
        return sorted(x for name in exact if (x := self.speedup(H_kv, name, L, k)) is not None)


def span(values: list[float]) -> str:
    """The smallest and the largest of some figures, a dash for none."""
    ends = dict.fromkeys(figure(value, 2) for value in (values[0], values[-1])) if values else ("",)
    return "–".join(ends) or "–"


def origin(found: list[Record], *names: str) -> list[str]:
    """Where records come from, one line a field; the sources' hash only where a record has one, which old ones lack."""
    values = {name: dict.fromkeys(str(r[name]) for r in found) for name in names}
    values["sources"] = dict.fromkeys(r["sources"] for r in found if "sources" in r)
    return [f"- {name}: " + ", ".join(f"`{v}`" for v in given) for name, given in values.items() if given]


def setup(path: str, found: list[Record]) -> str:
    """Device, versions, ceilings and the commands that wrote the records of a file."""
    if not found:
        return missing(path)
    lines = [f"From `{path}`, {len(found)} records:", ""]
    lines += origin(found, "device", "torch", "triton", "seed", "commit")
    lines.append("- commands: " + ", ".join(f"`{c}`" for c in dict.fromkeys(r["command"] for r in found)))
    units = {"tflops": "TFLOP/s", "tbps": "TB/s", "tops": "T/s"}
    ceilings = [r for r in found if r["case"] == "ceiling"]
    rates = [f"{r['impl']} {figure(r[u])} {name}" for r in ceilings for u, name in units.items() if u in r]
    lines.append("- ceilings: " + ", ".join(rates))
    return "\n".join(lines)


def picture(root: Path, path: str, alt: str) -> str:
    """A plot in both schemes, if it was drawn."""
    if not all((root / "docs" / f"{path}.{scheme}.svg").is_file() for scheme in ("light", "dark")):
        return f"No picture: there is no `docs/{path}.light.svg`."
    return "\n".join(f"![{alt}](../{path}.{scheme}.svg#only-{scheme})" for scheme in ("light", "dark"))


def prefill_setup(root: Path) -> str:
    """`{{ prefill_setup }}`: device, versions, ceilings and the commands that wrote the records."""
    return setup(PREFILL, Prefill(root).all)


def prefill_picture(root: Path) -> str:
    """`{{ prefill_picture }}`: the plot of the whole path's speed, if it was drawn."""
    alt = "Speed of the whole path over cuDNN against length, one line per selection, one panel per number of heads"
    return picture(root, PREFILL_PICTURE, alt)


def roofline_picture(root: Path) -> str:
    """`{{ roofline_picture }}`: the plot of the stages below the measured ceilings, if it was drawn."""
    alt = "Measured speed of each stage against its operations per byte, below a roof of memory and of matrix products"
    return picture(root, ROOFLINE_PICTURE, alt)


def prefill_speedup(root: Path) -> str:
    """`{{ prefill_speedup }}`: how many times faster than cuDNN the whole path is; below 1 it is slower."""
    p = Prefill(root)
    if not p.wholes:
        return missing(PREFILL)
    header = ["H_kv", "selection", *map(length, p.lengths)]
    rows = [
        [str(h), s, *(figure(p.speedup(h, s, L)) for L in p.lengths)]
        for h in p.heads
        for s in p.selections
        if any(p.whole(h, s, L) for L in p.lengths)
    ]
    return table(header, rows, left=2)


def prefill_range(root: Path, heads: str = "8", at: str = "131072", what: str = "speed") -> str:
    """`{{ prefill_range 8 131072 cost }}`: from the slowest to the fastest selection, over cuDNN or as a cost of it."""
    p = Prefill(root)
    if not p.wholes:
        return missing(PREFILL)
    found = p.spread(int(heads), int(at))
    return span([1 / x for x in reversed(found)] if what == "cost" else found)


def prefill_lengths(root: Path) -> str:
    """`{{ prefill_lengths }}`: milliseconds of dense attention and of the whole path."""
    p = Prefill(root)
    if not p.wholes:
        return missing(PREFILL)
    rows = []
    for h in p.heads:
        for impl, name in (("cudnn", "dense, cuDNN"), ("flash", "dense, FlashAttention")):
            rows.append([str(h), name, *(figure(median(p.dense.get((impl, h, L)))) for L in p.lengths)])
        for s in p.selections:
            times = [median(p.whole(h, s, L)) for L in p.lengths]
            if any(t is not None for t in times):
                rows.append([str(h), s, *map(figure, times)])
    return table(["H_kv", "selection", *map(length, p.lengths)], rows, left=2)


def prefill_roofline(root: Path, at: str = "131072") -> str:
    """`{{ prefill_roofline 131072 }}`: every stage at one length, with its share of the roofline."""
    p = Prefill(root)
    if not p.cases:
        return missing(PREFILL)
    found = [r for r in p.cases if r["shape"]["L"] == int(at) and r["ms"] and r["shape"]["k"] in (None, K_BASE)]
    if not found:
        return f"`{PREFILL}` has no record at length {at}."
    order = {name: i for i, name in enumerate(STAGES)}
    found.sort(key=lambda r: (order[r["case"]], r["shape"]["H_kv"] or 0))
    header = ["stage", "by", "H_kv", "selection", "U/k", "p_eff", "ms", "p20–p80", "TFLOP/s", "TB/s", "of the roofline"]
    rows = []
    for r in found:
        ms, size = r["ms"], r["shape"]
        spread = f"{figure(ms['p20'])}–{figure(ms['p80'])}"
        rows.append(
            [
                *(r["case"], r["impl"], str(size["H_kv"] or "–"), selection(r)),
                *(figure(r["union_over_k"]), figure(r["p_eff"], 2), figure(ms["median"]), spread),
                *(figure(r["tflops"]), figure(r["tbps"], 2), percent(r["share_of_roofline"])),
            ]
        )
    return table(header, rows, left=4)


def prefill_crossover(root: Path) -> str:
    """`{{ prefill_crossover }}`: where the whole path loses to cuDNN, and from which length on it wins."""
    p = Prefill(root)
    if not p.wholes:
        return missing(PREFILL)
    rows = []
    for h in p.heads:
        for s in p.selections:
            measured = [(L, x) for L in p.lengths if (x := p.speedup(h, s, L)) is not None]
            if not measured:
                continue
            lost = [L for L, x in measured if x < 1]
            won = [L for L, _ in measured if max(lost, default=0) < L]
            worst = min(measured, key=lambda m: m[1])
            rows.append(
                [
                    *(str(h), s, ", ".join(map(length, lost)) or "nowhere"),
                    *(length(won[0]) if won else "at no length", f"{figure(worst[1])} at {length(worst[0])}"),
                ]
            )
    return table(["H_kv", "selection", "slower than cuDNN at", "faster from", "slowest, over cuDNN"], rows, left=4)


def prefill_methods(root: Path) -> str:
    """`{{ prefill_methods }}`: which attention kernel was chosen at each length."""
    p = Prefill(root)
    if not p.wholes:
        return missing(PREFILL)
    chosen: dict[int, list[str]] = {}
    for (_, _, L, k), r in p.wholes.items():
        if k == K_BASE and "method" in r:
            chosen.setdefault(L, []).append(r["method"])
    lengths = sorted(chosen)
    return table(
        [f"L ({K_BASE} positions)", *map(length, lengths)],
        [["kernel", *(", ".join(dict.fromkeys(chosen[L])) for L in lengths)]],
    )


def prefill_budgets(root: Path) -> str:
    """`{{ prefill_budgets }}`: the whole path over the budget k, where several were measured."""
    p = Prefill(root)
    if not p.all:
        return missing(PREFILL)
    several: dict[tuple[int, str, int], set[int]] = {}
    for h, s, L, k in p.wholes:
        several.setdefault((h, s, L), set()).add(k)
    rows = []
    for (h, s, L), budgets in several.items():
        for k in sorted(budgets) if len(budgets) > 1 else []:
            ms, over = median(p.whole(h, s, L, k)), p.speedup(h, s, L, k)
            rows.append([length(L), str(h), s, str(k), figure(ms), figure(over)])
    if not rows:
        return f"`{PREFILL}` has one budget per length."
    return table(["L", "H_kv", "selection", "k", "ms", "over cuDNN"], rows, left=3)


def prefill_memory(root: Path) -> str:
    """`{{ prefill_memory }}`: peak memory of the whole path beyond inputs, result and selection, in MiB."""
    p = Prefill(root)
    if not p.wholes:
        return missing(PREFILL)
    rows = []
    for h in p.heads:
        cells = []
        for L in p.lengths:
            found = [r["peak_bytes"] for s in p.selections if (r := p.whole(h, s, L)) and r["peak_bytes"] is not None]
            cells.append(f"{max(found) / 2**20:,.0f}" if found else "–")
        rows.append([str(h), *cells])
    return table(["H_kv", *map(length, p.lengths)], rows)


def prefill_missing(root: Path) -> str:
    """`{{ prefill_missing }}`: the cases that were not measured, or not as the others, and why."""
    p = Prefill(root)
    if not p.all:
        return missing(PREFILL)
    rows = []
    for r in p.cases:
        if said := r.get("reason") or r.get("note"):
            size = r["shape"]
            rows.append([r["case"], r["impl"], selection(r), length(size["L"]), str(size["H_kv"] or "–"), said])
    if not rows:
        return "Every case was measured."
    return table(["stage", "by", "selection", "L", "H_kv", "why"], rows, left=6)


class Decode:
    """The decode records, by what they measure.

    A *size* is (H_kv, queries, keys), a *line* (impl, sigmoid mode).
    """

    def __init__(self, root: Path) -> None:
        self.all = load(root, DECODE)
        self.cases = [r for r in self.all if r["case"] != "ceiling"]
        self.by = {(*self.size(r), r["shape"]["B"], r["impl"], r["sigmoid_mode"]): r for r in self.cases}
        self.sizes = sorted({self.size(r) for r in self.cases}, key=lambda size: (-size[0], *size[1:]))
        self.batches = sorted({r["shape"]["B"] for r in self.cases})
        ours = {(r["impl"], r["sigmoid_mode"]) for r in self.cases if r["impl"] in (FUSED, GENERAL)}
        self.modes = sorted({mode for _, mode in ours}, key=lambda mode: mode != "exact")

    @staticmethod
    def size(record: Record) -> tuple[int, int, int]:
        shape = record["shape"]
        return shape["H_kv"], shape["L"], shape["S"]

    def record(self, size: tuple[int, int, int], B: int, impl: str, mode: str | None = None) -> Record | None:
        return self.by.get((*size, B, impl, mode))

    def ratio(
        self, size: tuple[int, int, int], B: int, slow: tuple[str, str | None], fast: tuple[str, str | None]
    ) -> float | None:
        """Time of the line `slow` over that of `fast`, None where one of them was not measured."""
        times = [median(self.record(size, B, *line)) for line in (slow, fast)]
        return times[0] / times[1] if times[0] and times[1] else None

    def speedup(self, size: tuple[int, int, int], B: int, impl: str = FUSED, mode: str = "exact") -> float | None:
        """cuDNN's time over ours."""
        return self.ratio(size, B, ("cudnn", None), (impl, mode))

    def table(self, cells: dict[str, Callable[[tuple[int, int, int], int], str]]) -> str:
        """A row for each size and named function of (size, B), a column for each batch size; none of dashes alone."""
        rows = []
        for size in self.sizes:
            for name, cell in cells.items():
                shown = [cell(size, B) for B in self.batches]
                if set(shown) != {"–"}:
                    rows.append([str(size[0]), str(size[1]), length(size[2]), name, *shown])
        header = ["H_kv", "queries", "keys", "by", *(f"B = {B}" for B in self.batches)]
        return table(header, rows, left=4) if rows else "No case was measured."

    def ours(self) -> dict[str, tuple[str, str]]:
        """The lines of our kernels by the names that tables give them."""
        kinds = {FUSED: "decode kernels", GENERAL: "general kernels"}
        return {
            name + ("\u00a0≈" if mode == "approximate" else ""): (impl, mode)
            for impl, name in kinds.items()
            for mode in self.modes
        }


def decode_setup(root: Path) -> str:
    """`{{ decode_setup }}`: device, versions, ceilings and the commands that wrote the records."""
    return setup(DECODE, Decode(root).all)


def decode_picture(root: Path) -> str:
    """`{{ decode_picture }}`: the plot, if it was drawn."""
    return picture(root, DECODE_PICTURE, "Speed of a decode step over cuDNN against batch size, one line per length")


def decode_speedup(root: Path) -> str:
    """`{{ decode_speedup }}`: how many times faster than cuDNN a step is (below 1: slower), and its milliseconds."""
    d = Decode(root)
    if not d.cases:
        return missing(DECODE)

    def cell(impl: str, mode: str) -> Callable[[tuple[int, int, int], int], str]:
        def show(size: tuple[int, int, int], B: int) -> str:
            ms = median(d.record(size, B, impl, mode))
            return "–" if ms is None else f"{figure(d.speedup(size, B, impl, mode))} ({figure(ms)}\u00a0ms)"

        return show

    return d.table({name: cell(*line) for name, line in d.ours().items() if line[0] == FUSED})


def decode_range(root: Path, heads: str = "8", at: str = "131072", what: str = "speed") -> str:
    """`{{ decode_range 8 131072 cost }}`: a step of one query, from the slowest batch size to the fastest."""
    d = Decode(root)
    if not d.cases:
        return missing(DECODE)
    found = sorted(x for B in d.batches if (x := d.speedup((int(heads), 1, int(at)), B)) is not None)
    return span([1 / x for x in reversed(found)] if what == "cost" else found)


def decode_dense(root: Path) -> str:
    """`{{ decode_dense }}`: milliseconds of a step of dense attention."""
    d = Decode(root)
    if not d.cases:
        return missing(DECODE)

    def cell(impl: str) -> Callable[[tuple[int, int, int], int], str]:
        return lambda size, B: figure(median(d.record(size, B, impl)))

    return d.table({"dense, cuDNN": cell("cudnn"), "dense, FlashAttention": cell("flash")})


def decode_roofline(root: Path) -> str:
    """`{{ decode_roofline }}`: share of the time that the bytes no kernel can spare take at the copy ceiling."""
    d = Decode(root)
    if not d.cases:
        return missing(DECODE)

    def cell(impl: str, mode: str | None) -> Callable[[tuple[int, int, int], int], str]:
        def show(size: tuple[int, int, int], B: int) -> str:
            r = d.record(size, B, impl, mode)
            return percent(r["share_of_roofline"] if r else None)

        return show

    lines: dict[str, tuple[str, str | None]] = {**d.ours(), "dense, cuDNN": ("cudnn", None)}
    return d.table({name: cell(*line) for name, line in lines.items()})


def decode_kernels(root: Path) -> str:
    """`{{ decode_kernels }}`: time of the general kernels over that of the decode kernels."""
    d = Decode(root)
    if not d.cases:
        return missing(DECODE)

    def cell(mode: str) -> Callable[[tuple[int, int, int], int], str]:
        return lambda size, B: figure(d.ratio(size, B, (GENERAL, mode), (FUSED, mode)))

    names = {name: mode for name, (impl, mode) in d.ours().items() if impl == FUSED}
    return d.table({name: cell(mode) for name, mode in names.items()})


def decode_losses(root: Path) -> str:
    """`{{ decode_losses }}`: where a step is slower than cuDNN, or than the general kernels."""
    d = Decode(root)
    if not d.cases:
        return missing(DECODE)
    rows = []
    for size in d.sizes:
        for B in d.batches:
            for mode in d.modes:
                rivals = {"dense, cuDNN": ("cudnn", None), "general kernels": (GENERAL, mode)}
                for name, rival in rivals.items():
                    ratio = d.ratio(size, B, rival, (FUSED, mode))
                    if ratio is not None and ratio < 1:
                        rows.append([*(str(size[0]), str(size[1]), length(size[2]), str(B)), mode, name, figure(ratio)])
    if not rows:
        return "Nowhere among the measured cases."
    return table(["H_kv", "queries", "keys", "B", "σ", "slower than", "speed over it"], rows, left=6)


def decode_missing(root: Path) -> str:
    """`{{ decode_missing }}`: the cases that were not measured, or not as the others, and why."""
    d = Decode(root)
    if not d.cases:
        return missing(DECODE)
    reasons: dict[tuple[str, ...], list[str]] = {}
    for r in d.cases:
        if said := r.get("reason") or r.get("note"):
            H_kv, N, S = d.size(r)
            reasons.setdefault((str(H_kv), str(N), length(S), str(r["shape"]["B"]), said), []).append(r["impl"])
    if not reasons:
        return "Every case was measured."
    rows = [[*key[:4], ", ".join(dict.fromkeys(impls)), key[4]] for key, impls in reasons.items()]
    return table(["H_kv", "queries", "keys", "B", "by", "why"], rows, left=6)


class Train:
    """The records of forward and backward passes, by what they measure."""

    def __init__(self, root: Path) -> None:
        self.all = load(root, TRAIN)
        cases = [r for r in self.all if r["case"] == "forward_backward"]
        self.records = {(r["shape"]["L"], r["shape"]["H_kv"], r["selection"], r["impl"]): r for r in cases}
        self.sizes = sorted({(L, H_kv) for L, H_kv, _, _ in self.records})
        self.selections = list(dict.fromkeys(name for _, _, name, _ in self.records if name))

    def median(self, size: tuple[int, int], selection: str | None, impl: str) -> float | None:
        return median(self.records.get((*size, selection, impl)))


def train_setup(root: Path) -> str:
    """`{{ train_setup }}`: device, versions, ceilings and the commands that wrote the records."""
    return setup(TRAIN, Train(root).all)


def train_times(root: Path) -> str:
    """`{{ train_times }}`: milliseconds of a forward and a backward pass, and their ratio to those of cuDNN."""
    train = Train(root)
    if not train.all:
        return missing(TRAIN)

    def cell(size: tuple[int, int], name: str | None, impl: str) -> str:
        ours, dense = train.median(size, name, impl), train.median(size, None, "cudnn")
        if ours is None:
            return "–"
        return f"{figure(ours)}\u00a0ms" + (f" ({figure(ours / dense, 2)})" if dense else "")

    ways = {IN_ORDER: "in order", ATOMIC: "atomic"}
    lines = [(None, impl, impl, "–") for impl in ("cudnn", "flash")]
    lines += [(name, impl, "gsa_fast", way) for name in train.selections for impl, way in ways.items()]
    rows = [
        [(name or "dense").replace(" ", "\u00a0"), by, way, *(cell(size, name, impl) for size in train.sizes)]
        for name, impl, by, way in lines
    ]
    header = ["selection", "by", "dk, dv", *(f"{length(L)}, H_kv {H_kv}" for L, H_kv in train.sizes)]
    return table(header, rows, left=3)


def train_memory(root: Path) -> str:
    """`{{ train_memory }}`: peak memory beyond inputs and gradients, in MiB, and the share of the roofline."""
    train = Train(root)
    if not train.all:
        return missing(TRAIN)
    rows = []
    for name in train.selections:
        for impl, way in ((IN_ORDER, "in order"), (ATOMIC, "atomic")):
            found = [train.records.get((*size, name, impl)) for size in train.sizes]
            cells = [
                f"{r['peak_bytes'] / 2**20:.0f} ({percent(r['share_of_roofline'])})" if r and r["ms"] else "–"
                for r in found
            ]
            rows.append([name.replace(" ", "\u00a0"), way, *cells])
    header = ["selection", "dk, dv", *(f"{length(L)}, H_kv {H_kv}" for L, H_kv in train.sizes)]
    return table(header, rows, left=2)


def train_kl(root: Path) -> str:
    """`{{ train_kl }}`: time and memory of the indexer's KL loss beside the reference; nothing without such records."""
    found = load(root, TRAIN)
    if not found:
        return missing(TRAIN)
    records: dict[tuple[str, str, str, int], dict[int, Record]] = {}
    for r in found:
        if r["case"].startswith("kl_"):
            line = (r["case"], (r["selection"] or "–").replace(" ", "\u00a0"), r["impl"], r["shape"]["H_kv"])
            records.setdefault(line, {})[r["shape"]["L"]] = r
    if not records:
        return ""
    lengths = sorted({L for of_length in records.values() for L in of_length})
    times, bytes_ = [], []
    for (case, name, impl, H_kv), of_length in records.items():
        phase, passes = ("warm-up" if "warm_up" in case else "sparse"), case.split("_", 2 + ("warm_up" in case))[-1]
        lead = [phase, name, passes.replace("_", " + "), impl, str(H_kv)]
        reference = records.get((case, name, "gsa_ref", H_kv), {})

        def time(L: int, ours: dict[int, Record] = of_length, theirs: dict[int, Record] = reference) -> str:
            ms, over = median(ours.get(L)), median(theirs.get(L))
            if ms is None:
                return "–"
            return f"{figure(ms)}\u00a0ms" + (f" ({figure(ms / over, 2)})" if over and ours is not theirs else "")

        def memory(r: Record | None) -> str:
            return f"{r['peak_bytes'] / 2**20:,.0f} ({percent(r['share_of_roofline'])})" if r and r["ms"] else "–"

        times.append([*lead, *map(time, lengths)])
        bytes_.append([*lead, *(memory(of_length.get(L)) for L in lengths)])
    header = ["phase", "selection", "passes", "by", "H_kv", *map(length, lengths)]
    reasons: dict[str, list[str]] = {}
    for (_, _, impl, _), of_length in records.items():
        for L, r in sorted(of_length.items()):
            if said := r.get("reason"):
                reasons.setdefault(f"`{impl}`: {said}", []).append(length(L))
    not_timed = [f"- {said}, at {', '.join(dict.fromkeys(at))}" for said, at in reasons.items()]
    parts = [
        "### The indexer's KL loss",
        "The loss of Eq. 15, and with its gradients for the indexer's inputs: over all visible positions in the "
        "warm-up, over the selected ones in the sparse phase, where the log-sum-exp of the attention is given, as in "
        "the layer. The reference, `gsa_ref.indexer_kl_loss` in PyTorch, gets the same inputs; it holds every logit.",
        f"```\n{KL_COMMAND}\n```",
        "Before a case is timed, what it computes from a short input is compared with the reference.",
        "Milliseconds, and in brackets how many times the reference's: below 1 is faster.",
        table(header, times, left=4),
        "Peak memory beyond the inputs, the loss and the gradients, in MiB, and in brackets the share of the roofline:",
        table(header, bytes_, left=4),
    ]
    return "\n\n".join([*parts, *(["Not timed:\n\n" + "\n".join(not_timed)] if not_timed else [])])


def long_verification(root: Path) -> str:
    """`{{ long_verification }}`: the stored results of `python -m gsa_fast verify --length`."""
    found = load(root, LONG)
    if not found:
        return missing(LONG)
    lines = [f"From `{LONG}`:", ""]
    lines += origin(found, "device", "torch", "triton", "commit", "command")
    rows = [
        [
            *(length(r["shape"]["L"]), str(r["shape"]["H_kv"]), mode(r), row["stem"], row["verdict"]),
            *(str(row["cases"]), figure(row["worst_error"]), figure(row["budget"]), percent(row["ratio"])),
        ]
        for r in found
        for row in r["rows"]
    ]
    header = ["L", "H_kv", "σ", "check", "verdict", "rows or runs", "worst error", "budget", "used"]
    recalls = [
        [
            *(length(r["shape"]["L"]), str(r["shape"]["H_kv"]), mode(r), f"{r['mean_k']:.0f}"),
            *(f"{100 * r['recall']['mean']:.3f}%", f"{100 * r['recall']['least']:.2f}%"),
            *(figure(r["near_threshold"]["median"]), str(r["near_threshold"]["most"])),
        ]
        for r in found
        if "recall" in r
    ]
    recall_header = ["L", "H_kv", "σ", "mean k", "recall", "worst row", "keys within 2ε, median", "most"]
    lines += ["", table(header, rows, left=5), ""]
    lines.append("Recall is the share of the reference's best keys that is selected: a metric, not a test.")
    return "\n".join([*lines, "", table(recall_header, recalls, left=3)])


def mode(record: Record) -> str:
    """The record's sigmoid of the indexer."""
    return record.get("sigmoid_mode") or "exact"


def tried(root: Path) -> str:
    """`{{ tried }}`: what was tried, what it was predicted to give, what it gave, and whether it stayed."""
    found = load(root, TRIED)
    if not found:
        return missing(TRIED)
    rows = [
        [
            r["what"],
            r["predicted"],
            "; ".join(f"{name}: {value}" for name, value in r["measured"].items()),
            r["verdict"],
        ]
        for r in found
    ]
    return table(["what", "predicted", "measured", "verdict"], rows, left=4)


DIRECTIVES = {
    f.__name__: f
    for f in (
        prefill_setup, prefill_picture, prefill_speedup, prefill_range, prefill_lengths, prefill_roofline,
        roofline_picture, prefill_crossover, prefill_methods, prefill_budgets, prefill_memory, prefill_missing,
        decode_setup, decode_picture, decode_speedup, decode_range, decode_dense, decode_roofline, decode_kernels,
        decode_losses, decode_missing, train_setup, train_times, train_memory, train_kl, long_verification, tried,
    )
}  # fmt: skip
