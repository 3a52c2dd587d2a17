"""The studies behind the claims: what they count, that they resume, and that each runs as a toy on a CPU."""

import json
import math
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from experiments import ablations, runner, selections, variants
from experiments.settings import Settings
from gsa_ref.config import VARIANTS


def test_a_leap_of_the_loss_is_one_spike_and_a_falling_or_noisy_loss_has_none():
    noise = torch.randn(400, generator=torch.Generator().manual_seed(0)) * 0.02
    losses = (3 - torch.arange(400) / 400 + noise).tolist()
    assert runner.spikes(losses) == []
    losses[100] += 0.5
    losses[101] += 0.4  # the same spike
    losses[300] += 0.5
    assert runner.spikes(losses) == [100, 300]
    losses[20] += 5  # while the loss falls fast
    assert runner.spikes(losses) == [100, 300]


def record(variant: str, lr: float, loss: float, diverged: bool = False) -> dict[str, Any]:
    return {"settings": {"variant": variant, "lr": lr}, "validation_loss": loss, "diverged": diverged}


def test_the_best_rate_is_that_of_the_lowest_loss_and_stability_ends_at_the_first_failure():
    losses = {
        5e-4: 2.00,
        1e-3: 1.50,
        2e-3: 1.40,
        4e-3: 1.53,
        8e-3: 1.60,
        1.6e-2: 1.41,
    }  # the first is too slow, not unstable
    runs = {f"sweep_{rate}": record("gsa", rate, loss) for rate, loss in losses.items()}
    runs |= {"sweep_dense": record("dense", 1e-3, 9.0, diverged=True), "gsa_0": record("gsa", 1e-2, 0.1)}
    assert variants.best_rate("gsa", runs) == 2e-3
    assert variants.largest_stable_rate("gsa", runs) == 4e-3  # 1.60 > 1.1 · 1.40, and a later one does not count
    with pytest.raises(ValueError, match="dense"):
        variants.best_rate("dense", runs)


def test_all_variants_get_the_same_tokens_and_sizes_in_the_main_table():
    records = {f"sweep_{v}": record(v, 2e-3, 1.0) for v in VARIANTS}
    table = variants.main_table(False, records)
    assert len(table) == 4 * variants.SEEDS
    same = [{k: x for k, x in vars(s).items() if k not in ("variant", "seed", "impl")} for s in table.values()]
    assert all(settings == same[0] for settings in same)
    assert {(s.variant, s.seed) for s in table.values()} == {(v, i) for v in VARIANTS for i in range(variants.SEEDS)}


def test_an_ablation_differs_from_the_main_table_in_its_change_alone():
    records = {f"sweep_{v}": record(v, 2e-3, 1.0) for v in VARIANTS}
    main = variants.main_table(False, records)
    for name, settings in ablations.study(False, {"gsa": 2e-3}).items():
        change, seed = name.rsplit("_", 1)
        variant, changed, _ = ablations.CHANGES[change]
        base = vars(main[f"{variant}_{seed}"])
        assert {k: x for k, x in vars(settings).items() if x != base[k]} == changed, name
        settings.model_config()  # a valid model


def test_selections_of_a_window_share_age_and_unite_as_a_window_does():
    t, s = torch.arange(256)[:, None], torch.arange(256)[None]
    window = ((t - s >= 0) & (t - s < 16))[None]  # the 16 most recent tokens
    found = selections.describe_layer(window, 16)
    assert found["first_row"] == 32
    assert found["shared"] == pytest.approx({"1": 15 / 16, "4": 12 / 16, "16": 0, "32": 0, "64": 0})
    assert found["union"] == pytest.approx({str(n): (16 + n - 1) / 16 for n in selections.GROUPS})
    assert found["age"] == pytest.approx([1 / 16, 1 / 16, 2 / 16, 4 / 16, 8 / 16])
    assert found["k"] == [16] * 5


def test_random_selections_share_what_the_column_beside_says():
    generator = torch.Generator().manual_seed(0)
    scores = torch.rand(1, 400, 400, generator=generator).tril()
    members = torch.zeros(1, 400, 400, dtype=torch.bool).scatter(-1, scores.topk(20, -1).indices, True).tril()
    found = selections.describe_layer(members, 20)
    for distance, share in found["shared"].items():
        assert share == pytest.approx(found["shared_if_random"][distance], rel=0.15), distance


@pytest.fixture(scope="module")
def smoke(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("studies")
    for study in (variants, ablations, selections):
        path = folder / f"{study.__name__}.json"
        assert study.main(["--smoke", "--json", str(path), "--runs", str(folder / "runs")]) == 0
    return folder, folder / "runs"


def test_every_study_runs_as_a_toy_and_its_records_are_complete(smoke: tuple[Path, Path]):
    folder, _ = smoke
    for study in (variants, ablations, selections):
        records = json.loads((folder / f"{study.__name__}.json").read_text(encoding="utf-8"))
        assert records
        for entry in records:
            assert not entry["diverged"]
            assert math.isfinite(entry["validation_loss"])
            assert entry["command"] == f"python -m {study.__name__}"
            layers, activations = entry["layers"], entry["largest_activations"]
            assert len(layers) == entry["settings"]["n_layers"] == len(activations) - 1
            assert all(0 <= layer["first_token_share"] <= 1 for layer in layers)
            assert entry["log"][-1]["step"] == entry["settings"]["steps"] == entry["steps"]
            gated = entry["settings"]["variant"] in ("gated", "gsa") and entry["settings"]["gates"] in (None, "both")
            assert all(("value_gate" in layer and "output_gate" in layer) == gated for layer in layers)
    found = {entry["name"] for entry in records}
    assert found == {f"longer_{rule}" for rule in selections.RULES}
    assert all(len(entry["selections"]) == entry["settings"]["n_layers"] for entry in records)


def test_a_study_goes_on_where_it_stopped(smoke: tuple[Path, Path], capsys: pytest.CaptureFixture[str]):
    folder, runs = smoke
    path = folder / "experiments.selections.json"
    before = json.loads(path.read_text())
    path.write_text(json.dumps([entry for entry in before if entry["name"] != "longer_inverse"]))
    assert selections.main(["--smoke", "--json", str(path), "--runs", str(runs)]) == 0
    assert "3 runs, 2 of them on record" in capsys.readouterr().err
    after = {entry["name"]: entry for entry in json.loads(path.read_text())}
    for entry in before:
        again = after[entry["name"]]
        assert again["validation_loss"] == entry["validation_loss"]
        assert (again["seconds"] == entry["seconds"]) or entry["name"] == "longer_inverse"


def test_a_run_with_other_settings_is_trained_again(tmp_path: Path):
    options = runner.parser(None, tmp_path / "x.json").parse_args(["--runs", str(tmp_path)])
    settings: dict[str, Settings] = {"a": runner.settings_of(runner.SMOKE, variant="dense")}
    first = runner.run_all(settings, options, "a command")["a"]
    assert runner.run_all(settings, options, "a command")["a"] == first
    settings["a"] = runner.settings_of(runner.SMOKE, variant="dense", lr=0.02)
    assert runner.run_all(settings, options, "a command")["a"]["validation_loss"] != first["validation_loss"]


def test_a_run_that_fails_is_reported_and_the_others_go_on(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    options = runner.parser(None, tmp_path / "x.json").parse_args(["--runs", str(tmp_path)])
    good = runner.settings_of(runner.SMOKE, variant="dense")
    bad = runner.settings_of(runner.SMOKE, variant="dense", init=str(tmp_path / "nowhere"))
    assert set(runner.run_all({"bad": bad, "good": good}, options, "a command")) == {"good"}
    assert "bad: FAILED" in (said := capsys.readouterr().err)
    assert "nowhere" in said


def test_only_may_choose_a_part_of_the_sweep_or_of_the_main_table(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
):
    ran: list[str] = []

    def attempt(settings: Any, folder: Path, finish: Any) -> dict[str, Any]:
        ran.append(folder.name)
        return {"settings": runner.kept(settings), "validation_loss": 1.0, "diverged": False, "log": []}

    monkeypatch.setattr(runner, "attempt", attempt)
    options = ["--smoke", "--json", str(tmp_path / "x.json"), "--only"]
    assert variants.main([*options, "sweep_dense"]) == 0
    assert ran
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == ran
    assert all(re.search(r" rate \S+  validation loss 1\.0000$", line) for line in lines)
    assert all(name.startswith("sweep_dense") for name in ran)
    with pytest.raises(SystemExit):
        variants.main([*options, "nothing"])
    assert variants.main([*options[:-1]]) == 0  # the rest
    ran.clear()
    assert variants.main([*options, "dense_1"]) == 0
    assert not ran  # it is on record


@pytest.mark.parametrize(
    ("study", "only"),
    [(variants, "sweep_dense"), (variants, "dense_1"), (ablations, "rule_inverse_0"), (selections, "longer_inverse")],
)
def test_a_study_of_which_a_chosen_run_failed_exits_with_1(
    study, only, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
):
    def attempt(settings: Any, folder: Path, finish: Any) -> dict[str, Any] | str:
        if only in folder.name:
            return "a traceback"
        return {"settings": runner.kept(settings), "validation_loss": 1.0, "diverged": False, "log": []}

    monkeypatch.setattr(runner, "attempt", attempt)
    options = ["--smoke", "--json", str(tmp_path / "x.json"), "--runs", str(tmp_path)]
    assert study.main([*options, "--only", only, *(["--only", "sweep"] if study is variants else [])]) == 1


def test_only_fits_a_run_or_is_refused(capsys: pytest.CaptureFixture[str], tmp_path: Path):
    with pytest.raises(SystemExit, match="2"):
        ablations.main(["--smoke", "--only", "nothing", "--json", str(tmp_path / "x.json")])
    assert "only: expected a part of one of rule_inverse_0" in capsys.readouterr().err


def test_the_sample_of_selections_is_small_and_causal():
    path = selections.SAMPLE
    if not path.exists():
        pytest.skip("no sample is stored")
    assert path.stat().st_size <= 5 * 2**20
    with np.load(path, allow_pickle=False) as sample:
        members = np.unpackbits(sample["bits"], axis=-1).astype(bool)
        assert len(members) == len(sample["layers"]) == 3
    assert not np.triu(members[0], 1).any()
    assert members[:, -1].sum(-1).min() >= selections.LONGER["k_min"]
