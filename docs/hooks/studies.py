"""Tables of the experiments page, from the records of the studies in experiments/: every figure comes from here."""

import itertools
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from intervals import poisson_interval, t_interval
from learning import decimals, percent_1
from speed import Record, figure, length, load, missing, picture, span, table

RESULTS = "experiments/results"
VARIANTS = f"{RESULTS}/variants.json"
ABLATIONS = f"{RESULTS}/ablations.json"
SELECTIONS = f"{RESULTS}/selections.json"
LONG_RANGE = f"{RESULTS}/long_range.json"
INDEXERS = f"{RESULTS}/indexers.json"
NAMES = ("dense", "sparse", "gated", "gsa")
RULES = ("proportional", "inverse", "fixed")
BUDGET = {"rule", "k_base", "k_min", "k_max"}
SIZES = ("d", "n_layers", "d_ff", "H", "H_kv", "d_h", "H_I", "d_I", "context", "batch", "k_base", "k_min", "k_max")
QUIET = 50  # first steps of a run, in which no spike is looked for: BEFORE of experiments/runner.py
STABLE = (1.05, 1.1, 1.2, 1.5)  # how many times its best loss a variant's loss may be at a stable learning rate
NEAR = 1.1  # mean budgets within this factor are compared
LEARNT = 0.9  # a task is learnt from the step on at which more of the answers of the training batches are right
# Ages of selected tokens: bin 0 is age 0, bin b ≥ 1 is 2^(b−1) to 2^b − 1.
AGES = ((0, 4), (5, 7), (8, 9), (10, 10), (11, 11), (12, 99))

Measure = Callable[[Record], float]


def signed(value: float, digits: int = 4) -> str:
    """A difference, with its sign."""
    return f"{value:+.{digits}f}".replace("-", "−")


def loss(record: Record) -> float:
    return record["validation_loss"]


def over_layers(name: str) -> Measure:
    """The mean of a measure over the layers."""
    return lambda record: fmean(layer[name] for layer in record["layers"])


def activation(record: Record) -> float:
    """The largest |x| of the residual stream."""
    return max(record["largest_activations"])


def thousands(value: float) -> str:
    """A figure from 10 on without digits behind the point."""
    return f"{value:,.0f}" if value >= 10 else f"{value:.1f}"


MEASURES: dict[str, tuple[Measure, Callable[[float], str]]] = {
    "validation_loss": (loss, decimals),
    "first_token_share": (over_layers("first_token_share"), lambda x: f"{100 * x:.2f}%"),
    "value_gate": (over_layers("value_gate"), decimals),
    "output_gate": (over_layers("output_gate"), decimals),
    "activation": (activation, figure),
}


class Main:
    """The records of experiments/variants.py: the main table by variant and seed, the sweep by variant and rate."""

    def __init__(self, root: Path) -> None:
        self.all = load(root, VARIANTS)
        self.table: dict[str, dict[int, Record]] = {}
        self.sweep: dict[str, dict[float, Record]] = {}
        for record in self.all:
            s = record["settings"]
            if record["name"].startswith("sweep_"):
                self.sweep.setdefault(s["variant"], {})[s["lr"]] = record
            else:
                self.table.setdefault(s["variant"], {})[s["seed"]] = record
        self.rates = sorted({rate for runs in self.sweep.values() for rate in runs})

    def seeds(self, variant: str) -> dict[int, Record]:
        """The runs of the main table that ended, by seed."""
        return {seed: r for seed, r in sorted(self.table.get(variant, {}).items()) if not r["diverged"]}

    def values(self, variant: str, measure: Measure) -> list[float]:
        return [measure(r) for r in self.seeds(variant).values()]

    def differences(self, variant: str, other: str, measure: Measure = loss) -> list[float]:
        """`variant` minus `other`, seed by seed."""
        a, b = self.seeds(variant), self.seeds(other)
        return [measure(a[seed]) - measure(b[seed]) for seed in a if seed in b]

    def at_rates(self, variant: str, other: str, measure: Measure) -> dict[float, tuple[float, float]]:
        """Both variants' measure in the sweep, at each rate at which both ended."""
        a, b = self.sweep.get(variant, {}), self.sweep.get(other, {})
        ended = [rate for rate in self.rates if rate in a and rate in b and not a[rate]["diverged"]]
        return {rate: (measure(a[rate]), measure(b[rate])) for rate in ended if not b[rate]["diverged"]}

    def stable(self, variant: str, times: float) -> float | None:
        """The largest rate, from the best one upwards, up to which the loss of the sweep stays within so many times the
        variant's best.
        """
        runs = self.sweep.get(variant, {})
        losses = {rate: loss(r) for rate, r in runs.items() if not r["diverged"]}
        found = min(losses, key=losses.__getitem__, default=None)
        if found is None:
            return None
        best = losses[found]
        for rate in sorted(rate for rate in runs if rate >= found):
            if losses.get(rate, math.inf) > times * best:
                break
            found = rate
        return found


class Changes:
    """The records of experiments/ablations.py by what sets them apart from the main table: a text, and the seeds."""

    def __init__(self, root: Path) -> None:
        self.all = load(root, ABLATIONS)
        self.main = Main(root)
        self.groups: dict[str, dict[int, Record]] = {}
        for record in sorted(self.all, key=lambda r: (r["name"].rpartition("_")[0], r["settings"]["seed"])):
            self.groups.setdefault(record["name"].rpartition("_")[0], {})[record["settings"]["seed"]] = record

    def base(self, record: Record) -> Record | None:
        """The run of the main table with the same variant and seed."""
        s = record["settings"]
        return self.main.seeds(s["variant"]).get(s["seed"])

    def changed(self, record: Record) -> dict[str, Any]:
        """The settings that differ from those of `base`."""
        base = self.base(record)
        return {n: x for n, x in record["settings"].items() if base and base["settings"].get(n) != x}

    def ended(self, name: str) -> dict[int, Record]:
        """A change's runs that ended.

        Raises:
            KeyError: there is no such change.
        """
        return {seed: r for seed, r in self.groups[name].items() if not r["diverged"]}

    def differences(self, name: str) -> list[float]:
        """Loss minus that of the main table, seed by seed."""
        return [loss(r) - loss(base) for r in self.ended(name).values() if (base := self.base(r))]

    def budgets(self) -> list[list[Record]]:
        """Runs of GSA that differ in rule and budget alone, by mean k; those of the main table with their seeds."""
        groups = [list(self.ended(n).values()) for n in self.groups]
        found = [g for g in groups if g and set(self.changed(g[0])) <= BUDGET and self.base(g[0])]
        seeds = sorted({r["settings"]["seed"] for g in found for r in g})
        unchanged = [r for seed, r in self.main.seeds("gsa").items() if seed in seeds]
        return sorted([unchanged, *found] if unchanged else found, key=lambda g: mean_k(g))


def mean_k(runs: Sequence[Record]) -> float:
    return fmean(over_layers("mean_k")(r) for r in runs)


def last(record: Record, name: str) -> float:
    """The last measurement of that name."""
    return record["log"][-1][name]


def by_rule(root: Path) -> dict[str, Record]:
    """The records of experiments/selections.py that ended, by the rule of Eq. 8."""
    found = {r["settings"]["rule"]: r for r in load(root, SELECTIONS) if not r["diverged"]}
    return {rule: found[rule] for rule in RULES if rule in found}


def needs(path: str) -> Callable[[Callable[..., str]], Callable[..., str]]:
    """A directive that says so where there is no record in a file, or none of a study on trial."""

    def wrap(make: Callable[..., str]) -> Callable[..., str]:
        def directive(root: Path, *arguments: str) -> str:
            return make(root, *arguments) if load(root, path) else missing(path)

        directive.__name__, directive.__doc__ = make.__name__, make.__doc__
        return directive

    return wrap


def interval(values: Sequence[float], digits: int = 3) -> str:
    """Mean ± half the 95% interval; of one value itself."""
    if len(values) < 2:
        return decimals(values[0] if values else None, digits)
    mean, low, _ = t_interval(values)
    return f"{mean:.{digits}f}\u00a0±\u00a0{mean - low:.{digits}f}"


def difference(values: Sequence[float]) -> str:
    """Mean and 95% interval of three or more paired differences, of fewer each."""
    if len(values) < 3:
        return ", ".join(map(signed, values)) or "–"
    mean, low, high = t_interval(values)
    return f"{signed(mean)} [{signed(low)}, {signed(high)}]"


# ---- what was run ----------------------------------------------------------------------------------------------------


def studies_setup(root: Path) -> str:
    """`{{ studies_setup }}`: for each file its runs, devices, versions and text."""
    rows = []
    for path in (VARIANTS, ABLATIONS, SELECTIONS, LONG_RANGE, INDEXERS):
        found = load(root, path)
        cells = [
            ", ".join(dict.fromkeys(str(r[name] or "–") for r in found))
            for name in ("device", "torch", "python", "commit")
        ]
        texts = ", ".join(dict.fromkeys(f"`{r['text']['sha256'][:12]}`" for r in found))
        name = f"`{path.rpartition('/')[2]}`"
        rows.append([name, str(len(found)), *cells, texts] if found else [name, "none yet", *["–"] * 5])
    return table(["file", "records", "device", "torch", "Python", "commit", "text, SHA-256"], rows, left=7)


@needs(VARIANTS)
def studies_model(root: Path) -> str:
    """`{{ studies_model }}`: the sizes that all runs of the main table share."""
    found = [r["settings"] for r in load(root, VARIANTS)]
    return table(list(SIZES), [[", ".join(dict.fromkeys(str(s[n]) for s in found)) for n in SIZES]], left=0)


@needs(VARIANTS)
def studies_count(root: Path, what: str = "tokens") -> str:
    """`{{ studies_count tokens }}`: of the main table tokens and steps of a run, or seeds; sweep_steps of a run.

    Raises:
        KeyError: `what` is none of tokens, steps, seeds, sweep_steps.
    """
    main = Main(root)
    runs = [r for by_seed in main.table.values() for r in by_seed.values() if not r["diverged"]]
    sweep = [r for by_rate in main.sweep.values() for r in by_rate.values() if not r["diverged"]]
    counts = {
        "tokens": {last(r, "tokens") for r in runs},
        "steps": {r["steps"] for r in runs},
        "seeds": {max(len(by_seed) for by_seed in main.table.values())} if runs else set(),
        "sweep_steps": {r["steps"] for r in sweep},
    }
    return ", ".join(f"{x:,}" for x in sorted(counts[what])) or "–"


# ---- the four variants -----------------------------------------------------------------------------------------------


@needs(VARIANTS)
def studies_losses(root: Path) -> str:
    """`{{ studies_losses }}`: each variant at its best rate: loss, and what it is above dense, paired by seed."""
    main = Main(root)
    rows = []
    for variant in NAMES:
        runs = list(main.seeds(variant).values())
        if runs:
            rates = ", ".join(f"{rate:g}" for rate in sorted({r["settings"]["lr"] for r in runs}))
            tokens = ", ".join(f"{n:,}" for n in sorted({last(r, "tokens") for r in runs}))
            over = "–" if variant == "dense" else difference(main.differences(variant, "dense"))
            seconds = f"{fmean(r['seconds'] for r in runs):.0f}"
            rows.append([variant, rates, str(len(runs)), interval(list(map(loss, runs))), over, tokens, seconds])
    return table(["variant", "learning rate", "seeds", "validation loss", "minus dense", "tokens", "seconds"], rows)


@needs(VARIANTS)
def studies_measures(root: Path) -> str:
    """`{{ studies_measures }}`: what the models of the main table do: first token, gates, activations, spikes."""
    main = Main(root)
    rows = []
    for variant in NAMES:
        runs = list(main.seeds(variant).values())
        if runs:
            gates = [
                interval([over_layers(gate)(r) for r in runs]) if gate in runs[0]["layers"][0] else "–"
                for gate in ("value_gate", "output_gate")
            ]
            share, where, largest = first_token(runs)
            activations = [activation(r) for r in runs]
            rows.append(
                [
                    *(variant, f"{100 * share:.2f}%", f"{100 * largest:.2f}%\u00a0({where + 1})", *gates),
                    f"{figure(fmean(activations))} ({span(sorted(activations))})",
                    *spike_cells(runs),
                ]
            )
    header = [
        "variant",
        "attention on position 0",
        "in its largest block (which)",
        "mean G2",
        "mean G1",
        "largest activation",
    ]
    return table([*header, "spikes", "in steps", "per 100K steps"], rows)


def first_token(runs: Sequence[Record]) -> tuple[float, int, float]:
    """Mean attention on position 0; the layer where it is largest, in the mean over the runs, and how large there."""
    layers = [fmean(r["layers"][i]["first_token_share"] for r in runs) for i in range(len(runs[0]["layers"]))]
    return fmean(layers), max(range(len(layers)), key=layers.__getitem__), max(layers)


def spikes(runs: Sequence[Record]) -> tuple[int, int]:
    """Spikes, and the steps in which they were looked for."""
    return sum(r["spikes"] for r in runs), sum(max(r["steps"] - QUIET, 0) for r in runs)


def spike_cells(runs: Sequence[Record]) -> tuple[str, str, str]:
    """Spikes, steps, and the interval of their rate per 100,000 steps."""
    count, steps = spikes(runs)
    low, high = (1e5 * x / steps for x in poisson_interval(count)) if steps else (0.0, 0.0)
    return str(count), f"{steps:,}", f"{low:.0f}–{high:.0f}" if steps else "–"


@needs(VARIANTS)
def studies_sinks(root: Path) -> str:
    """`{{ studies_sinks }}`: attention on position 0 by block, mean over the seeds, and where attention is uniform."""
    main = Main(root)
    rows = []
    for variant in NAMES:
        runs = list(main.seeds(variant).values())
        if runs:
            shares = [fmean(r["layers"][i]["first_token_share"] for r in runs) for i in range(len(runs[0]["layers"]))]
            rows.append([variant, *(f"{100 * x:.2f}%" for x in shares)])
    n = len(rows[0]) - 1 if rows else 0
    rows.append(["uniform", *[studies_uniform(root)] * n])
    return table(["variant", *(f"block {i + 1}" for i in range(n))], rows)


@needs(VARIANTS)
def studies_uniform(root: Path) -> str:
    """`{{ studies_uniform }}`: the share of position 0 if every query read all that it sees alike."""
    contexts = {r["settings"]["context"] for r in load(root, VARIANTS)}
    shares = [fmean(1 / (t + 1) for t in range(1, L)) for L in sorted(contexts)]
    return ", ".join(f"{100 * share:.2f}%" for share in shares)


@needs(VARIANTS)
def studies_mean(root: Path, variant: str = "gsa", what: str = "validation_loss") -> str:
    """`{{ studies_mean gsa value_gate }}`: a measure's mean over the seeds.

    Raises:
        KeyError: no such measure, or this variant lacks it.
        ValueError: no run of the variant ended.
    """
    measure, show = MEASURES[what]
    return show(fmean(Main(root).values(variant, measure)))


@needs(VARIANTS)
def studies_minus(root: Path, variant: str = "gsa", other: str = "dense") -> str:
    """`{{ studies_minus gsa dense }}`: the difference of their losses, paired by seed, with its interval."""
    return difference(Main(root).differences(variant, other))


@needs(VARIANTS)
def studies_spread(root: Path, variant: str = "gsa") -> str:
    """`{{ studies_spread gsa }}`: by how much the losses of two seeds differ at most."""
    found = Main(root).values(variant, loss)
    return decimals(max(found) - min(found))


@needs(VARIANTS)
def studies_spikes(root: Path, variant: str = "dense", what: str = "rate") -> str:
    """`{{ studies_spikes dense rate }}`: of the main table the count, the steps, or the interval per 100,000 steps.

    Raises:
        ValueError: `what` is none of count, steps, rate.
    """
    return spike_cells(list(Main(root).seeds(variant).values()))[("count", "steps", "rate").index(what)]


# ---- the sweep -------------------------------------------------------------------------------------------------------


def sweep_table(root: Path, show: Callable[[Record], str]) -> str:
    main = Main(root)
    rows = [
        [v, *(show(main.sweep[v][rate]) if rate in main.sweep[v] else "–" for rate in main.rates)]
        for v in NAMES
        if v in main.sweep
    ]
    return table(["variant", *(f"{rate:g}" for rate in main.rates)], rows)


@needs(VARIANTS)
def studies_sweep(root: Path) -> str:
    """`{{ studies_sweep }}`: validation loss by variant and learning rate."""
    return sweep_table(root, lambda r: "diverged" if r["diverged"] else decimals(loss(r)))


@needs(VARIANTS)
def studies_activations(root: Path) -> str:
    """`{{ studies_activations }}`: the largest activation by variant and learning rate."""
    return sweep_table(root, lambda r: "diverged" if r["diverged"] else thousands(activation(r)))


@needs(VARIANTS)
def studies_stability(root: Path) -> str:
    """`{{ studies_stability }}`: the largest stable rate of each variant, by what counts as stable."""
    main = Main(root)
    rows = [
        [v, *("–" if (rate := main.stable(v, times)) is None else f"{rate:g}" for times in STABLE)]
        for v in NAMES
        if v in main.sweep
    ]
    return table(["variant", *(f"{times:g} × best" for times in STABLE)], rows)


@needs(VARIANTS)
def studies_stable(root: Path, variant: str = "gsa", times: str = "1.1") -> str:
    """`{{ studies_stable gsa 1.1 }}`: the largest rate at which the loss is at most so many times the best."""
    rate = Main(root).stable(variant, float(times))
    return "–" if rate is None else f"{rate:g}"


@needs(VARIANTS)
def studies_lower(root: Path, variant: str = "gated", other: str = "dense", what: str = "activation") -> str:
    """`{{ studies_lower gated dense activation }}`: at how many rates of the sweep a variant has the lower figure.

    Raises:
        KeyError: `what` is no measure.
    """
    pairs = Main(root).at_rates(variant, other, MEASURES[what][0]).values()
    return f"{sum(a < b for a, b in pairs)} of {len(pairs)}"


@needs(VARIANTS)
def studies_times(root: Path, variant: str = "dense", other: str = "gated") -> str:
    """`{{ studies_times dense gated }}`: how many times the other's activation a variant has, from rate to rate."""
    pairs = Main(root).at_rates(variant, other, activation).values()
    return span(sorted(a / b for a, b in pairs))


# ---- one change at a time --------------------------------------------------------------------------------------------


def selects(runs: Sequence[Record]) -> list[str]:
    """Cells: mean k, and how the selection compares with the best one."""
    measures = ("captured_ratio", "captured_ratio_min", "recall")
    return [f"{mean_k(runs):.0f}", *(decimals(fmean(last(r, m) for r in runs)) for m in measures)]


@needs(ABLATIONS)
def studies_ablations(root: Path) -> str:
    """`{{ studies_ablations }}`: each change: loss, minus the same seeds of the main table, and what is selected."""
    changes = Changes(root)
    unchanged = list(changes.main.seeds("gsa").values())
    rows = [["none", str(len(unchanged)), decimals(fmean(map(loss, unchanged))), "–", *selects(unchanged)]]
    for name in changes.groups:
        runs = list(changes.ended(name).values())
        if not runs:
            rows.append([f"`{name}`", str(len(changes.groups[name])), "diverged", *["–"] * 5])
            continue
        changed = ", ".join(
            f"`{n}` = {x:g}" if isinstance(x, float) else f"`{n}` = {x}" for n, x in changes.changed(runs[0]).items()
        )
        rows.append(
            [
                *(changed or f"`{name}`", str(len(runs)), decimals(fmean(map(loss, runs)))),
                *(", ".join(map(signed, changes.differences(name))) or "–", *selects(runs)),
            ]
        )
    header = ["change", "seeds", "loss", "minus unchanged, by seed", "mean k", "ratio", "worst block", "recall"]
    return table(header, rows)


@needs(ABLATIONS)
def studies_change(root: Path, name: str = "k_32", what: str = "minus") -> str:
    """`{{ studies_change k_32 minus }}`: a change's mean loss, or its losses minus those of the same seeds unchanged.

    Raises:
        KeyError: there is no such change.
        ValueError: `what` is neither loss nor minus.
    """
    if what not in ("loss", "minus"):
        raise ValueError(f"what: expected loss or minus, got {what!r}")
    changes = Changes(root)
    runs = changes.ended(name).values()
    return decimals(fmean(map(loss, runs))) if what == "loss" else difference(changes.differences(name))


def gate_runs(root: Path) -> dict[str, list[Record]]:
    """Sparse attention with no gate, each gate alone, and both: the runs of the seeds that all four have."""
    changes = Changes(root)
    groups = {"none": changes.main.seeds("sparse"), "value": {}, "output": {}, "both": changes.main.seeds("gsa")}
    groups |= {
        gate: changes.ended(f"gates_{gate}") for gate in ("value", "output") if f"gates_{gate}" in changes.groups
    }
    shared = sorted(set.intersection(*(set(runs) for runs in groups.values())))
    return {gate: [runs[seed] for seed in shared] for gate, runs in groups.items()}


@needs(ABLATIONS)
def studies_gates(root: Path) -> str:
    """`{{ studies_gates }}`: the losses of the runs with no gate, each, and both."""
    names = {"none": "none", "value": "G2, value", "output": "G1, output", "both": "both"}
    rows, seeds = [], []
    for gate, runs in gate_runs(root).items():
        seeds = [r["settings"]["seed"] for r in runs]
        rates = ", ".join(f"{rate:g}" for rate in sorted({r["settings"]["lr"] for r in runs}))
        rows.append([names[gate], rates, *(decimals(loss(r)) for r in runs), decimals(fmean(map(loss, runs)))])
    return table(["gates", "learning rate", *(f"seed {seed}" for seed in seeds), "mean loss"], rows)


@needs(ABLATIONS)
def studies_gate(root: Path, gate: str = "both") -> str:
    """`{{ studies_gate value }}`: the mean loss of such runs: none, value, output, both.

    Raises:
        KeyError: there is no such gate.
    """
    return decimals(fmean(map(loss, gate_runs(root)[gate])))


@needs(ABLATIONS)
def studies_rules(root: Path) -> str:
    """`{{ studies_rules }}`: GSA with other directions of Eq. 8 and other budgets, by mean k."""
    rows = []
    for runs in Changes(root).budgets():
        s = runs[0]["settings"]
        rows.append(
            [
                *(s["rule"], str(s["k_base"]), f"{s['k_min']}–{s['k_max']}", str(len(runs)), f"{mean_k(runs):.0f}"),
                f"{fmean(last(r, 'k_low') for r in runs):.0f}–{fmean(last(r, 'k_high') for r in runs):.0f}",
                *(", ".join(decimals(loss(r)) for r in runs), decimals(fmean(last(r, "captured_ratio") for r in runs))),
            ]
        )
    header = ["rule", "k_base", "k_min–k_max", "seeds", "mean k", "middle 80% of k", "loss by seed", "ratio"]
    return table(header, rows)


@needs(ABLATIONS)
def studies_equal_k(root: Path) -> str:
    """`{{ studies_equal_k }}`: pairs of rules with nearly equal mean budgets, and the difference of their losses."""
    groups = Changes(root).budgets()
    rows = []
    for i, a in enumerate(groups):
        for b in groups[i + 1 :]:
            rules = [runs[0]["settings"]["rule"] for runs in (a, b)]
            if rules[0] != rules[1] and mean_k(b) <= NEAR * mean_k(a):
                by_seed = {r["settings"]["seed"]: loss(r) for r in a}
                found = [loss(r) - by_seed[s] for r in b if (s := r["settings"]["seed"]) in by_seed]
                rows.append([rules[1], rules[0], f"{mean_k(b):.0f}", f"{mean_k(a):.0f}", difference(found)])
    if not rows:
        return f"`{ABLATIONS}` has no two rules with mean budgets within {100 * (NEAR - 1):.0f}% of each other."
    return table(["rule", "beside", "mean k", "mean k beside it", "loss minus that beside it, by seed"], rows, left=2)


@needs(ABLATIONS)
def studies_steps(root: Path) -> str:
    """`{{ studies_steps }}`: mean k over the steps with each rule at the same k_base, with the middle 80% of k."""
    changes = Changes(root)
    unchanged = changes.main.seeds("gsa")
    runs = [min(unchanged.items())[1]] if unchanged else []
    seed = runs[0]["settings"]["seed"] if runs else 0
    groups = (changes.ended(name) for name in changes.groups)
    runs += [g[seed] for g in groups if seed in g and set(changes.changed(g[seed])) == {"rule"}]
    return steps_table(runs)


@needs(SELECTIONS)
def studies_longer_steps(root: Path) -> str:
    """`{{ studies_longer_steps }}`: the same at the longer context."""
    return steps_table(list(by_rule(root).values()))


def steps_table(runs: Sequence[Record]) -> str:
    steps = sorted({line["step"] for r in runs for line in r["log"]})
    rows = []
    for r in runs:
        cells = {x["step"]: f"{x['mean_k']:.0f} ({x['k_low']:.0f}–{x['k_high']:.0f})" for x in r["log"]}
        rows.append([r["settings"]["rule"], *(cells.get(step, "–") for step in steps)])
    return table(["rule", *(f"step {step}" for step in steps)], rows)


# ---- what a trained indexer selects ----------------------------------------------------------------------------------


def selected(root: Path, rule: str) -> list[Record]:
    """What was measured of each layer's selections.

    Raises:
        KeyError: there is no run with this rule.
    """
    return by_rule(root)[rule]["selections"]


@needs(SELECTIONS)
def studies_longer(root: Path, name: str = "context") -> str:
    """`{{ studies_longer context }}`: a setting of the runs at the longer context, or first_row.

    Raises:
        KeyError: there is no such setting.
    """
    runs = by_rule(root).values()
    values = {r["selections"][0]["first_row"] if name == "first_row" else r["settings"][name] for r in runs}
    return ", ".join(f"{x:,}" if isinstance(x, int) else str(x) for x in sorted(values))


@needs(SELECTIONS)
def studies_captured(root: Path) -> str:
    """`{{ studies_captured }}`: the share of dense attention that each rule's selection holds, beside simpler ones."""
    names = ("captured", "captured_oracle", "captured_recent", "captured_random")
    rows = [[rule, *(percent_1(last(r, n)) for n in names), decimals(loss(r))] for rule, r in by_rule(root).items()]
    return table(["rule", "selected", "oracle", "most recent", "random", "validation loss"], rows)


@needs(SELECTIONS)
def studies_shared(root: Path, rule: str = "proportional") -> str:
    """`{{ studies_shared proportional }}`: share of S_t that is in S_{t+δ} too, by layer; in brackets by chance."""
    layers = selected(root, rule)
    distances = list(layers[0]["shared"])
    rows = [
        [str(i + 1), *(f"{percent_1(x['shared'][d])} ({percent_1(x['shared_if_random'][d])})" for d in distances)]
        for i, x in enumerate(layers)
    ]
    return table(["block", *(f"δ = {d}" for d in distances)], rows)


@needs(SELECTIONS)
def studies_overlap(root: Path, rule: str = "fixed", distance: str = "1", what: str = "shared") -> str:
    """`{{ studies_overlap fixed 1 shared }}`: from the least to the most sharing layer, or shared_if_random.

    Raises:
        KeyError: there is no such rule, distance or measure.
    """
    found = sorted(layer[what][distance] for layer in selected(root, rule))
    return "–".join(dict.fromkeys(f"{100 * x:.0f}%" for x in (found[0], found[-1])))


@needs(SELECTIONS)
def studies_union(root: Path, rule: str = "fixed", size: str = "16") -> str:
    """`{{ studies_union fixed 16 }}`: the union of so many queries' selections over k, from layer to layer.

    Raises:
        KeyError: there is no such rule or size.
    """
    return span(sorted(layer["union"][size] for layer in selected(root, rule)))


@needs(SELECTIONS)
def studies_unions(root: Path) -> str:
    """`{{ studies_unions }}`: the union of neighbouring queries' selections over their mean size, by rule and layer."""
    runs = by_rule(root)
    sizes = list(next(iter(runs.values()))["selections"][0]["union"])
    rows = [
        [rule, str(i + 1), *(decimals(layer["union"][size], 2) for size in sizes)]
        for rule, r in runs.items()
        for i, layer in enumerate(r["selections"])
    ]
    return table(["rule", "block", *(f"{size} queries" for size in sizes)], rows, left=2)


@needs(SELECTIONS)
def studies_budgets(root: Path) -> str:
    """`{{ studies_budgets }}`: quantiles of k_t by rule and layer, where k_t varies."""
    rows = [
        [rule, str(i + 1), *(f"{x:.0f}" for x in layer["k"])]
        for rule, r in by_rule(root).items()
        for i, layer in enumerate(r["selections"])
        if layer["k"][0] < layer["k"][-1]
    ]
    return table(["rule", "block", "smallest", "10%", "median", "90%", "largest"], rows, left=2)


def random_ages(record: Record) -> list[float]:
    """The shares of the bins of age if all that a row sees were selected alike, over the rows that were measured."""
    context, first = record["settings"]["context"], record["selections"][0]["first_row"]
    bins = [0.0] * (context.bit_length() + 1)
    for t in range(first, context):
        for i in range(t.bit_length() + 1):
            lowest = 2 ** (i - 1) if i else 0
            bins[i] += (min(2 * lowest - 1 if i else 0, t) - lowest + 1) / (t + 1) / (context - first)
    return bins


@needs(SELECTIONS)
def studies_ages(root: Path, rule: str = "proportional") -> str:
    """`{{ studies_ages proportional }}`: which share of the selected tokens has which age, by layer, and by chance."""
    rows = [
        [str(i + 1), *(percent_1(sum(layer["age"][first : end + 1])) for first, end in AGES)]
        for i, layer in enumerate(selected(root, rule))
    ]
    rows.append(
        ["by chance", *(percent_1(sum(random_ages(by_rule(root)[rule])[first : end + 1])) for first, end in AGES)]
    )
    starts = [0 if first == 0 else 2 ** (first - 1) for first, _ in AGES]
    names = [f"{a}–{b - 1}" for a, b in itertools.pairwise(starts)]
    return table(["block", *names, f"{starts[-1]} and more"], rows)


# ---- long range, indexers --------------------------------------------------------------------------------------------


@needs(LONG_RANGE)
def studies_long_range(root: Path) -> str:
    """`{{ studies_long_range }}`: accuracy by task, variant and length; and how often its token is selected."""
    parts = [studies_picture(root, "lengths")]
    for task in dict.fromkeys(task for task, _ in long_range(root)):
        selected = f"{task.capitalize()}, how often a position of the answer is selected, in one block at least:"
        parts += [f"{task.capitalize()}, answered:", long_range_table(root, task, "accuracy")]
        parts += [selected, long_range_table(root, task, "selected_anywhere")]
    return "\n\n".join(parts)


def long_range(root: Path) -> dict[tuple[str, str], list[Record]]:
    """The records by task and variant, variants in the order of NAMES."""
    found: dict[tuple[str, str], list[Record]] = {}
    for r in sorted(load(root, LONG_RANGE), key=lambda r: (r["task"], NAMES.index(r["settings"]["variant"]))):
        found.setdefault((r["task"], r["settings"]["variant"]), []).append(r)
    return found


def long_range_table(root: Path, task: str, measure: str) -> str:
    groups = {variant: runs for (name, variant), runs in long_range(root).items() if name == task}
    lengths = sorted({test["length"] for runs in groups.values() for r in runs for test in r["tests"]})
    rows = []
    for variant, runs in groups.items():
        cells = []
        for L in lengths:
            found = sorted(
                test[measure] for r in runs for test in r["tests"] if test["length"] == L and measure in test
            )
            ends = f" ({percent_1(found[0])}–{percent_1(found[-1])})" if len(found) > 1 else ""
            cells.append(percent_1(fmean(found)) + ends if found else "–")
        if set(cells) != {"–"}:
            rows.append([variant, str(len(runs)), *cells])
    return table(["variant", "seeds", *(length(L) for L in lengths)], rows)


@needs(LONG_RANGE)
def studies_learnt(root: Path, task: str = "recall") -> str:
    """`{{ studies_learnt recall }}`: by which step each run of a task answers most of its training questions.

    Raises:
        LookupError: there is no record of the task.
    """
    groups = {variant: runs for (name, variant), runs in long_range(root).items() if name == task}
    if not groups:
        raise LookupError(f"task: expected one of {LONG_RANGE}, got {task!r}")
    rows = []
    for variant, runs in groups.items():
        cells = []
        for r in runs:
            steps = [line["step"] for line in r["log"] if line["accuracy"] > LEARNT]
            cells.append(f"{steps[0]:,}" if steps else f"not in {r['settings']['steps']:,}")
        rows.append([variant, *cells])
    seeds = [r["settings"]["seed"] for r in next(iter(groups.values()))]
    return table(["variant", *(f"seed {seed}, by step" for seed in seeds)], rows)


@needs(INDEXERS)
def studies_indexers(root: Path) -> str:
    """`{{ studies_indexers }}`: each form of the indexer with its best τ and rate: what it finds, and its time."""
    rows = [
        [
            *(r["form"].replace("_", " "), f"{r['tau']:g}", f"{r['lr']:g}", decimals(r["kl"])),
            *(
                f"{percent_1(r[name])} ({', '.join(map(percent_1, r[f'{name}_by_seed']))})"
                for name in ("recall", "captured_ratio")
            ),
            *(f"{r['milliseconds'][part]:.2f}" for part in ("scores", "step")),
        ]
        for r in load(root, INDEXERS)
    ]
    header = ["form", "τ", "learning rate", "loss", "recall (by seed)", "ratio (by seed)", "ms, scores", "ms, step"]
    return table(header, rows)


@needs(INDEXERS)
def studies_recall(root: Path, form: str = "gated_sigmoid") -> str:
    """`{{ studies_recall relu }}`: the recall of one form, and that of each seed.

    Raises:
        LookupError: the record has no such form.
    """
    found = {r["form"]: r for r in load(root, INDEXERS)}[form]
    return f"{percent_1(found['recall'])} ({', '.join(map(percent_1, found['recall_by_seed']))})"


# ---- pictures --------------------------------------------------------------------------------------------------------

PICTURES = {
    "rates": "Validation loss against learning rate, one line per variant",
    "unions": "Union of neighbouring queries' selections over k against group size: blocks, and the benches' patterns",
    "ages": "Share of the selected tokens by age, one line per block",
    "sinks": "Attention on position 0 by block, one line per variant, below that of uniform attention",
    "lengths": "Accuracy against test length, one line per variant, one panel per task",
}


def studies_picture(root: Path, name: str = "rates") -> str:
    """`{{ studies_picture rates }}`: a plot, if it was drawn.

    Raises:
        KeyError: there is no such plot.
    """
    path = LONG_RANGE if name == "lengths" else SELECTIONS if name in ("unions", "ages") else VARIANTS
    return picture(root, f"figures/experiments_{name}", PICTURES[name]) if load(root, path) else missing(path)


DIRECTIVES = {
    f.__name__: f
    for f in (
        studies_setup, studies_model, studies_count, studies_losses, studies_measures, studies_sinks, studies_uniform,
        studies_mean, studies_minus, studies_spread, studies_spikes, studies_sweep, studies_activations,
        studies_stability, studies_stable, studies_lower, studies_times, studies_ablations, studies_change,
        studies_gates, studies_gate, studies_rules, studies_equal_k, studies_steps, studies_longer,
        studies_longer_steps, studies_captured, studies_shared, studies_overlap, studies_union, studies_unions,
        studies_budgets, studies_ages,
        studies_long_range, studies_learnt, studies_indexers, studies_recall, studies_picture,
    )
}  # fmt: skip
