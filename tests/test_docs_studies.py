"""The experiments page: what its tables compute, from made-up records, and that its words fit the stored ones."""

import json
import math
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from experiments import runner, variants

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
sys.path.insert(0, str(DOCS / "hooks"))
import intervals  # noqa: E402
import studies  # noqa: E402

# ---- intervals -------------------------------------------------------------------------------------------------------


# Table of Student's distribution, 97.5%: the printed digits.
@pytest.mark.parametrize(("freedom", "quantile"), [(1, 12.706), (2, 4.303), (3, 3.182), (4, 2.776), (30, 2.042)])
def test_t_quantile_is_that_of_the_tables(freedom: int, quantile: float):
    assert intervals.t_quantile(0.975, freedom) == pytest.approx(quantile, abs=5e-4)


@pytest.mark.parametrize("freedom", [1, 2, 3, 4, 5, 8, 11])
def test_t_within_is_the_integral_of_the_density(freedom: int):
    x = np.linspace(-1.7, 1.7, 20001)
    norm = math.gamma((freedom + 1) / 2) / (math.sqrt(freedom * math.pi) * math.gamma(freedom / 2))
    area = np.trapezoid(norm * (1 + x**2 / freedom) ** (-(freedom + 1) / 2), x)
    assert intervals.t_within(1.7, freedom) == pytest.approx(area, abs=1e-7)


def test_t_interval_is_around_the_mean_and_needs_two_values():
    # s = 1, n = 3: half is 4.3027 / √3
    assert intervals.t_interval([4.0, 5.0, 6.0]) == pytest.approx((5.0, 5 - 2.4841, 5 + 2.4841), abs=1e-4)
    with pytest.raises(ValueError, match="at least two, got 1"):
        intervals.t_interval([1.0])


def test_t_interval_covers_the_mean_as_often_as_it_says():
    draws = np.random.default_rng(0).standard_normal((2000, 5))
    found = [intervals.t_interval(list(row)) for row in draws]
    assert sum(low <= 0 <= high for _, low, high in found) / len(found) == pytest.approx(0.95, abs=0.015)


@pytest.mark.parametrize(("count", "low", "high"), [(0, 0, 3.689), (1, 0.0253, 5.572), (10, 4.795, 18.39)])
def test_poisson_interval_is_that_of_the_tables(count: int, low: float, high: float):
    # Garwood (1936); the printed digits
    assert intervals.poisson_interval(count) == pytest.approx((low, high), rel=1e-3, abs=1e-9)


# ---- tables from made-up records -------------------------------------------------------------------------------------

FACTS = {"device": "some device", "torch": "2", "python": "3", "commit": None, "seconds": 9.6}
TEXT = {"name": "a text", "sha256": "0123456789abcdef", "train_tokens": 5}
SETTINGS: dict[str, Any] = {
    "d": 8, "n_layers": 2, "d_ff": 16, "H": 2, "H_kv": 1, "d_h": 4, "H_I": 2, "d_I": 4, "context": 4, "batch": 2,
    "k_base": 8, "k_min": 4, "k_max": 16, "rule": "proportional", "gates": None, "indexer_rope": True,
}  # fmt: skip


def run(name: str, variant: str, loss: float | None, seed: int = 0, **fields: Any) -> dict[str, Any]:
    """A record as experiments/runner.py writes them; fields of settings, of the record, and k, shares, largest."""
    settings = SETTINGS | {"variant": variant, "seed": seed, "lr": 0.001}
    settings |= {n: fields.pop(n) for n in list(fields) if n in settings}
    record = {"suite": "experiments", "name": name, "settings": settings, "text": TEXT, **FACTS}
    record |= {"diverged": loss is None, "steps": 600, "spikes": fields.pop("spikes", 0), "log": []}
    if loss is None:
        return record | fields
    k = fields.pop("k", 10.0)
    layers = [{"first_token_share": share, "mean_k": k} for share in fields.pop("shares", (0.25, 0.5))]
    if variant in ("gated", "gsa"):
        layers = [layer | {"value_gate": 0.5, "output_gate": 0.25} for layer in layers]
    line = {"step": 600, "tokens": 4800, "mean_k": k, "k_low": k - 2, "k_high": k + 2}
    line |= {"captured_ratio": 0.9, "captured_ratio_min": 0.8, "recall": 0.7}
    record |= {"log": [line | {"step": 0, "mean_k": 5.0}, line], "validation_loss": loss, "layers": layers}
    return record | {"largest_activations": [1.0, fields.pop("largest", 2.0), 1.5]} | fields


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A root with made-up records. Seeds stand in another order than losses, and the first of dense has no partner."""
    found = [
        *(run(f"dense_{s}", "dense", x, s, largest=10.0 * (s + 1))
          for s, x in ((2, 3.0), (0, 1.0), (1, 2.0), (3, 9.0))),
        *(run(f"gated_{s}", "gated", x, s, shares=(0.1, 0.2 * s)) for s, x in ((1, 2.5), (2, 3.8), (3, 9.5))),
        run("gated_0", "gated", None, 0),
        *(run(f"gsa_{s}", "gsa", 2.0 + s / 8, s, lr=0.002, spikes=s) for s in (0, 1, 2)),
        run("sparse_0", "sparse", 1.75, 0),
        *(run(f"sweep_dense_{r}", "dense", x, lr=r, largest=m, steps=250)
          for r, x, m in ((1e-3, 1.0, 2.0), (2e-3, 1.04, 4.0), (4e-3, 1.3, 16.0), (8e-3, None, 0))),
        *(run(f"sweep_gated_{r}", "gated", x, lr=r, largest=m, steps=250)
          for r, x, m in ((1e-3, 1.1, 2.0), (2e-3, 1.0, 2.0), (4e-3, 1.09, 4.0), (8e-3, 2.0, 9.0))),
    ]  # fmt: skip
    changed = [
        run("rule_inverse_1", "gsa", 2.0, 1, lr=0.002, rule="inverse", k=20.0),
        run("rule_inverse_0", "gsa", 2.5, 0, lr=0.002, rule="inverse", k=20.0),
        run("inverse_half_0", "gsa", 2.25, 0, lr=0.002, rule="inverse", k=10.25, k_base=4),
        run("k_near_0", "gsa", 2.5, 0, lr=0.002, k=10.1, k_base=9),
        run("blind_1", "gsa", 3.125, 1, lr=0.002, indexer_rope=False),
        run("gates_value_0", "gsa", 1.5, 0, lr=0.002, gates="value"),
        run("gates_output_0", "gsa", 1.25, 0, lr=0.002, gates="output"),
        run("wide_0", "gsa", None, 0, lr=0.002, d_I=64),
    ]
    layer = {"first_row": 4, "shared": {"1": 0.5, "64": 0.25}, "shared_if_random": {"1": 0.125, "64": 0.1}}
    layer |= {"union": {"2": 1.5, "16": 3.0}, "age": [0.25, 0.25, 0.25, 0.125, 0.125], "k": [4, 5, 6, 7, 8]}
    other = layer | {"union": {"2": 1.25, "16": 4.0}, "shared": {"1": 0.75, "64": 0.5}}
    longer = run("longer_fixed", "gsa", 1.0, rule="fixed", context=16, selections=[layer, other])
    longer["log"][-1] |= {"captured": 0.8, "captured_oracle": 0.9, "captured_recent": 0.7, "captured_random": 0.1}
    tests = [{"length": L, "accuracy": a} for L, a in ((512, 0.5), (4096, 0.25))]
    far = [
        {"task": "needle", "settings": {"variant": v, "seed": s}, "text": TEXT, **FACTS,
         "tests": [t | {"accuracy": t["accuracy"] + s / 4} | more for t in tests]}
        for v, s, more in (("gsa", 0, {"selected_anywhere": 0.75}), ("dense", 0, {}), ("dense", 1, {}))
    ]  # fmt: skip
    form = {"form": "gated_sigmoid", "tau": 0.3, "lr": 0.001, "kl": 0.5, "recall": 0.75, "captured_ratio": 0.9}
    form |= {"recall_by_seed": [0.5, 1.0], "captured_ratio_by_seed": [0.85, 0.95], "text": TEXT, **FACTS}
    form |= {"milliseconds": {"scores": 1.234, "step": 5.678}}
    for path, content in (
        (studies.VARIANTS, found), (studies.ABLATIONS, changed), (studies.SELECTIONS, [longer]),
        (studies.LONG_RANGE, far), (studies.INDEXERS, [form]),
    ):  # fmt: skip
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).write_text(json.dumps(content))
    return tmp_path


def rows(table: str) -> list[str]:
    return table.splitlines()[2:]


def test_differences_are_paired_by_seed(root: Path):
    # 0.5, 0.8 and 0.5: mean 0.6, s = √0.03, half 4.3027 · √(0.03/3); seed 0 of gated diverged
    assert studies.studies_minus(root, "gated", "dense") == "+0.6000 [+0.1697, +1.0303]"
    assert studies.studies_minus(root, "sparse", "dense") == "+0.7500"  # one seed: no interval
    assert studies.studies_minus(root, "dense", "sparse") == "−0.7500"


def test_the_main_table_shows_each_variant_with_its_interval(root: Path):
    found = rows(studies.studies_losses(root))
    assert [row.split(" | ")[0] for row in found] == ["| dense", "| sparse", "| gated", "| gsa"]
    # 2.0, 2.125, 2.25: half 4.3027 · 0.125/√3
    assert "| gsa | 0.002 | 3 | 2.125\u00a0±\u00a00.311 | " in found[3]
    assert found[1].endswith("| 0.001 | 1 | 1.750 | +0.7500 | 4,800 | 10 |")
    assert studies.studies_mean(root, "gated") == "5.267"
    assert studies.studies_mean(root, "dense", "activation") == "25"
    assert studies.studies_spread(root, "gsa") == "0.250"
    assert [studies.studies_count(root, what) for what in ("steps", "seeds", "sweep_steps")] == ["600", "4", "250"]
    for wrong in (("gsa", "lost"), ("dense", "value_gate")):
        with pytest.raises(KeyError, match=wrong[1]):
            studies.studies_mean(root, *wrong)


def test_spikes_are_a_rate_over_the_steps_in_which_they_are_looked_for(root: Path):
    assert studies.QUIET == runner.BEFORE
    # gsa: 0 + 1 + 2 spikes in 3 · 550 steps; the interval of 3 is 0.6187 to 8.7673
    assert [studies.studies_spikes(root, "gsa", what) for what in ("count", "steps", "rate")] == [
        "3",
        "1,650",
        "37–531",
    ]
    # dense: none in 4 · 550; 3.6889 / 2200
    assert studies.studies_spikes(root, "dense", "rate") == "0–168"


def test_first_token_is_a_mean_over_blocks_with_the_largest_one(root: Path):
    # gated: block 1 has 0.1, block 2 the mean of 0.2, 0.4 and 0.6
    assert "| gated | 25.00% | 40.00%\u00a0(2) |" in studies.studies_measures(root)
    assert "| gated | 10.00% | 40.00% |" in studies.studies_sinks(root)
    # queries 1, 2, 3 see 2, 3, 4 positions: (1/2 + 1/3 + 1/4)/3
    assert studies.studies_uniform(root) == "36.11%"


def test_the_sweep_compares_at_equal_rates(root: Path):
    found = rows(studies.studies_sweep(root))
    assert found[0] == "| dense | 1.000 | 1.040 | 1.300 | diverged |"
    assert rows(studies.studies_activations(root))[1] == "| gated | 2.0 | 2.0 | 4.0 | 9.0 |"
    assert studies.studies_lower(root, "gated", "dense", "validation_loss") == "2 of 3"  # not where one diverged
    assert studies.studies_lower(root, "gated", "dense", "activation") == "2 of 3"
    assert studies.studies_times(root, "dense", "gated") == "1–4"
    assert rows(studies.studies_stability(root)) == [
        "| dense | 0.002 | 0.002 | 0.002 | 0.004 |",
        "| gated | 0.002 | 0.004 | 0.004 | 0.004 |",  # the lowest rate is too slow: 1.1 times its best
    ]


@pytest.mark.parametrize("variant", ["dense", "gated"])
def test_the_largest_stable_rate_is_that_of_the_study(root: Path, variant: str):
    for folder in (root, ROOT):
        records = {r["name"]: r for r in runner.read(folder / studies.VARIANTS)}
        assert variants.STABLE in studies.STABLE
        expected = f"{variants.largest_stable_rate(variant, records):g}"
        assert studies.studies_stable(folder, variant, f"{variants.STABLE}") == expected


def test_a_change_is_named_by_its_settings_and_compared_with_its_own_seed(root: Path):
    found = {row.split(" | ")[0][2:]: row for row in rows(studies.studies_ablations(root))}
    assert found["none"] == "| none | 3 | 2.125 | – | 10 | 0.900 | 0.800 | 0.700 |"
    assert found["`indexer_rope` = False"] == (
        "| `indexer_rope` = False | 1 | 3.125 | +1.0000 | 10 | 0.900 | 0.800 | 0.700 |"  # seed 1 has 2.125
    )
    assert found["`rule` = inverse"].startswith("| `rule` = inverse | 2 | 2.250 | +0.5000, −0.1250 | 20 |")
    assert "| `wide` | 1 | diverged |" in found["`wide`"]
    assert studies.studies_change(root, "rule_inverse") == "+0.5000, −0.1250"
    assert studies.studies_change(root, "rule_inverse", "loss") == "2.250"
    with pytest.raises(KeyError, match="lost"):
        studies.studies_change(root, "lost")


def test_gates_are_compared_on_the_seeds_that_all_have(root: Path):
    assert rows(studies.studies_gates(root)) == [
        "| none | 0.001 | 1.750 | 1.750 |",
        "| G2, value | 0.002 | 1.500 | 1.500 |",
        "| G1, output | 0.002 | 1.250 | 1.250 |",
        "| both | 0.002 | 2.000 | 2.000 |",
    ]
    assert studies.studies_gate(root, "both") == "2.000"


def test_rules_are_compared_at_equal_mean_budgets(root: Path):
    found = rows(studies.studies_rules(root))
    assert [row.split(" | ")[4] for row in found] == ["10", "10", "10", "20"]
    assert "| inverse | 4 | 4–16 | 1 | 10 | 8–12 | 2.250 | 0.900 |" in found
    # 10.25 lies within 10% of 10 and of 10.1, 20 does not; the seed that both have is 0: 2.25 − 2.0, and 2.25 − 2.5
    pair = "| inverse | proportional | 10 | 10 |"
    assert rows(studies.studies_equal_k(root)) == [f"{pair} +0.2500 |", f"{pair} −0.2500 |"]
    steps = rows(studies.studies_steps(root))
    assert steps == ["| proportional | 5 (8–12) | 10 (8–12) |", "| inverse | 5 (18–22) | 20 (18–22) |"]


def test_without_equal_budgets_that_is_said(root: Path):
    path = root / studies.ABLATIONS
    path.write_text(json.dumps([r for r in json.loads(path.read_text()) if r["name"] != "inverse_half_0"]))
    assert "has no two rules with mean budgets within 10%" in studies.studies_equal_k(root)


def test_selections_are_shown_by_block(root: Path):
    assert rows(studies.studies_shared(root, "fixed"))[0] == "| 1 | 50.0% (12.5%) | 25.0% (10.0%) |"
    assert studies.studies_overlap(root, "fixed", "1") == "50%–75%"
    assert studies.studies_union(root, "fixed", "16") == "3–4"
    assert rows(studies.studies_unions(root))[1] == "| fixed | 2 | 1.25 | 4.00 |"
    assert rows(studies.studies_budgets(root))[0] == "| fixed | 1 | 4 | 5 | 6 | 7 | 8 |"
    assert rows(studies.studies_captured(root)) == ["| fixed | 80.0% | 90.0% | 70.0% | 10.0% | 1.000 |"]
    assert rows(studies.studies_ages(root, "fixed"))[0].startswith("| 1 | 100.0% | 0.0% |")
    assert [studies.studies_longer(root, name) for name in ("context", "first_row")] == ["16", "4"]


def test_ages_by_chance_are_those_of_every_visible_token():
    record = {"settings": {"context": 300}, "selections": [{"first_row": 100}]}
    expected = np.zeros(10)
    for t in range(100, 300):
        for age in range(t + 1):
            expected[age.bit_length()] += 1 / (t + 1) / 200
    assert studies.random_ages(record) == pytest.approx(expected, abs=1e-12)


def test_long_range_and_indexers_are_shown_once_there_are_records(root: Path):
    accuracy, selected = re.findall(r"(?<=--:\|\n).+?(?=\n\n|$)", studies.studies_long_range(root), re.DOTALL)
    assert accuracy.splitlines() == [
        "| dense | 2 | 62.5% (50.0%–75.0%) | 37.5% (25.0%–50.0%) |",
        "| gsa | 1 | 50.0% | 25.0% |",
    ]
    assert selected.splitlines() == ["| gsa | 1 | 75.0% | 75.0% |"]
    titles = re.findall(r"^(\w+), (?:answered|how often)", studies.studies_long_range(root), re.MULTILINE)
    assert titles == ["Needle", "Needle"]
    assert rows(studies.studies_indexers(root)) == [
        "| gated sigmoid | 0.3 | 0.001 | 0.500 | 75.0% (50.0%, 100.0%) | 90.0% (85.0%, 95.0%) | 1.23 | 5.68 |"
    ]
    assert studies.studies_recall(root, "gated_sigmoid") == "75.0% (50.0%, 100.0%)"
    with pytest.raises(LookupError):
        studies.studies_recall(root, "relu")


def test_the_setup_names_every_file_that_is_there_and_that_is_not(root: Path):
    (root / studies.INDEXERS).unlink()
    found = rows(studies.studies_setup(root))
    assert found[2] == "| `selections.json` | 1 | some device | 2 | 3 | – | `0123456789ab` |"
    assert found[4].startswith("| `indexers.json` | none yet |")


@pytest.mark.parametrize("name", sorted(set(studies.DIRECTIVES) - {"studies_setup"}))
def test_missing_study_record_is_said(name: str, tmp_path: Path):
    assert studies.DIRECTIVES[name](tmp_path).startswith("No record is stored: there is no `experiments/")


# ---- the stored records ----------------------------------------------------------------------------------------------


def test_stored_study_records_have_the_expected_form():
    for name, make in studies.DIRECTIVES.items():
        assert make(ROOT), name
    for path in (studies.VARIANTS, studies.ABLATIONS, studies.SELECTIONS, studies.LONG_RANGE, studies.INDEXERS):
        if (ROOT / path).is_file():
            text = (ROOT / path).read_text(encoding="utf-8")
            assert not re.search(r"/(home|root|tmp|work|usr)/", text), path  # no path of a machine


def test_all_variants_have_the_same_seeds_and_rates():
    main = studies.Main(ROOT)
    assert set(main.table) == set(main.sweep) == set(studies.NAMES)
    assert all(set(runs) == set(range(variants.SEEDS)) for runs in main.table.values())
    assert all(sorted(runs) == main.rates for runs in main.sweep.values())


def test_the_words_of_the_experiments_page_and_of_the_claims_fit_the_records():
    """Conclusions that are written out there. Where new records break one, rewrite the page or the claim."""
    main, changes = studies.Main(ROOT), studies.Changes(ROOT)

    def bounds(variant: str, other: str) -> tuple[float, float]:
        return intervals.t_interval(main.differences(variant, other))[1:]

    low, high = bounds("sparse", "dense")
    assert low < 0 < high  # sparse attention costs no loss that these seeds show
    for variant, other in (("gated", "dense"), ("gsa", "dense"), ("gsa", "sparse")):
        assert np.mean(main.differences(variant, other)) > 0  # gates do not lower the loss
    forms = {r["form"]: r for r in studies.load(ROOT, studies.INDEXERS)}
    for form in ("sigmoid", "gated_sigmoid"):  # more than ReLU in both seeds, in the mean by less than one point
        assert min(forms[form]["recall_by_seed"]) > max(forms["relu"]["recall_by_seed"])
        assert forms[form]["recall"] - forms["relu"]["recall"] < 0.01
    assert forms["sigmoid"]["recall"] > forms["gated_sigmoid"]["recall"] > forms["sigmoid"]["recall"] - 0.002
    for rule in ("rule_inverse_same_k", "rule_fixed_same_k"):  # at equal mean budgets
        assert rule in changes.groups
    long = studies.long_range(ROOT)

    def mean(task: str, variant: str, test: int, measure: str = "accuracy") -> float:
        return float(np.mean([r["tests"][test][measure] for r in long[task, variant]]))

    for variant in studies.NAMES:
        assert all(r["tests"][0]["accuracy"] == 1 for r in long["needle", variant])
        answered = [mean("needle", variant, i) for i in range(4)]
        assert answered == sorted(answered, reverse=True)
        assert answered[3] < 0.15  # nearly nothing at eight times the length
    for variant in ("sparse", "gsa"):
        assert all(mean("needle", variant, i) >= mean("needle", "dense", i) for i in range(4))
        assert mean("needle", variant, 2, "selected_anywhere") > 0.8  # most are selected, about half answered
        assert 0.4 < mean("needle", variant, 2) < 0.6
    for i in (2, 3):  # recall: sparse falls faster from four times the length on, where the selection misses some
        assert mean("recall", "sparse", i) < mean("recall", "dense", i) - 0.05
        assert mean("recall", "sparse", i, "selected_anywhere") < 0.99
    assert abs(mean("recall", "sparse", 1) - mean("recall", "dense", 1)) < 0.01
    learnt = {
        v: [max(line["accuracy"] for line in r["log"]) > studies.LEARNT for r in long["recall", v]]
        for v in studies.NAMES
    }
    assert all(learnt["dense"] + learnt["sparse"])
    assert not all(learnt["gated"])
    assert not all(learnt["gsa"])
    best = {v: min(studies.loss(r) for r in runs.values() if not r["diverged"]) for v, runs in main.sweep.items()}
    assert best["gated"] < best["dense"]  # but in the sweep
    for variant, other in (("gated", "dense"), ("gsa", "sparse")):
        pairs = main.at_rates(variant, other, studies.loss)
        lower = [pairs[rate][0] < pairs[rate][1] for rate in sorted(pairs)]
        assert lower == sorted(lower)  # lower with gates at the higher rates, and only there
        assert sum(lower) >= len(lower) - 2
        pairs = main.at_rates(variant, other, studies.activation)
        assert all(a < b for a, b in pairs.values())  # the activation at every rate
        assert main.stable(variant, variants.STABLE) > main.stable(other, variants.STABLE)
        rates = [next(iter(main.seeds(v).values()))["settings"]["lr"] for v in (variant, other)]
        assert rates[0] > rates[1]  # in the main table their rate is higher, and so is the activation
        assert np.mean(main.values(variant, studies.activation)) > np.mean(main.values(other, studies.activation))
    uniform = float(studies.studies_uniform(ROOT).rstrip("%")) / 100
    for variant in studies.NAMES:
        runs = list(main.seeds(variant).values())
        assert studies.first_token(runs)[2] < uniform  # no sink in any block
        count, steps = studies.spikes(runs)
        assert count == 0
        assert 1e5 * intervals.poisson_interval(count)[1] / steps > 12.3  # the published rates are not excluded
        if variant in ("gated", "gsa"):
            for gate in ("value_gate", "output_gate"):
                assert 0.2 < np.mean(main.values(variant, studies.over_layers(gate))) < 0.5
    spread = np.ptp(main.values("gsa", studies.loss))
    largest = {n: max(map(abs, changes.differences(n))) for n in changes.groups}
    assert max(largest, key=largest.__getitem__) == "no_indexer_rope"
    assert largest["no_indexer_rope"] > spread
    assert all(x < spread for n, x in largest.items() if n != "no_indexer_rope")  # no other change is told from seeds

    def found(name: str, measure: str) -> float:
        runs = main.seeds("gsa") if name == "none" else changes.ended(name)
        return float(np.mean([studies.last(r, measure) for r in runs.values()]))

    for measure in ("captured_ratio", "recall"):
        values = {name: found(name, measure) for name in changes.groups}
        assert min(values, key=values.__getitem__) == "no_indexer_rope"
    assert max(found(n, "recall") for n in ("indexer_width_16", "k_32", "k_64")) < found("none", "recall")
    gates = {gate: np.mean([studies.loss(r) for r in runs]) for gate, runs in studies.gate_runs(ROOT).items()}
    assert list(gates.values()) != sorted(gates.values(), reverse=True)  # not the published order
    # Unions of 16 neighbours lie between those of two of the benches' patterns.
    facts = json.loads((DOCS / "figures/experiments.json").read_text(encoding="utf-8"))
    unions = [layer["union"]["16"] for layer in studies.selected(ROOT, "fixed")]
    assert float(facts["union_0.87"]) < min(unions) <= max(unions) < float(facts["union_0.44"])
    for rule in studies.by_rule(ROOT).values():
        last = rule["log"][-1]
        assert last["captured_recent"] > 0.9 * last["captured"]  # the most recent tokens hold much
        chance = studies.random_ages(rule)
        assert all(sum(layer["age"][:8]) > sum(chance[:8]) for layer in rule["selections"])


def test_the_pictures_of_the_studies_are_drawn_with_long_range_and_refused_without_records(root: Path, tmp_path: Path):
    for name in (
        "figures/experiments.py",
        "figures/style.py",
        *(f"hooks/{p.name}" for p in (DOCS / "hooks").glob("*.py")),
    ):
        (root / "docs" / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(DOCS / name, root / "docs" / name)
    for path in (studies.VARIANTS, studies.SELECTIONS):
        shutil.copy(ROOT / path, root / path)
    out = tmp_path / "out"
    out.mkdir()

    def draw() -> subprocess.CompletedProcess[str]:
        command = [sys.executable, str(root / "docs/figures/experiments.py"), "--out", str(out)]
        path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
        environment = os.environ | {"PYTHONPATH": path}
        return subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True, check=False)

    done = draw()
    assert done.returncode == 0, done.stderr
    drawn = (out / "experiments_lengths.light.svg").read_text(encoding="utf-8")
    assert all(word in drawn for word in ("needle", "gsa", "512", "4K"))
    (root / studies.SELECTIONS).unlink()
    assert draw().stderr.startswith("There is nothing to draw: no record is stored in")
