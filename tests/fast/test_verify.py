"""`python -m gsa_fast verify`: what it prints, what it writes, when it fails."""

import json
import os
import re
import subprocess
import sys
from dataclasses import replace
from multiprocessing import get_context
from pathlib import Path

import pytest

import gsa_fast
from gsa_fast.__main__ import main
from gsa_fast.verification import checks, records, run
from gsa_ref.cases import CASES, SELECTED_VALUES, GateCase

ROOT = Path(__file__).parents[2]
CASE = GateCase(B=1, L=3, heads=2, width=4, dtype="float32", values="normal", layout="margins", seed=5)


@pytest.fixture
def broken_gate(monkeypatch):
    """A gate that is wrong in its last element, for widths above 2."""

    def apply_gate(x, gate_logits, *, impl="auto"):
        out = gsa_fast.gates._apply_gate(x, gate_logits).clone()
        if x.shape[-1] > 2:
            out[..., -1] += 1
        return out

    monkeypatch.setattr(checks.gsa_fast, "apply_gate", apply_gate)


def test_a_green_run_prints_one_row_per_stem_and_dtype_and_exits_0(capsys, tmp_path):
    file = tmp_path / "record.json"
    arguments = ["--stem", "gates", "--stem", "indexer", "--dtype", "float32", "--examples", "3", "--json", str(file)]
    assert main(["verify", *arguments]) == 0
    printed = capsys.readouterr().out
    assert [line.split()[:3] for line in printed.splitlines() if "pass" in line.split()] == [
        ["gates", "float32", "3"],
        ["indexer", "float32", "3"],
    ]
    assert "All 2 rows passed." in printed
    record = json.loads(file.read_text())
    assert record["seed"] == 0
    assert all(row["command"].startswith("python -m gsa_fast verify --stem gates") for row in record["rows"])
    assert {row["sources"] for row in record["rows"]} == {records.sources()}
    assert [row["verdict"] for row in record["rows"]] == ["pass", "pass"]
    assert all(row["worst_error"] <= row["budget"] for row in record["rows"])


def test_a_suite_can_be_run_in_parts_and_progress_is_told_row_by_row(capsys, tmp_path):
    file = tmp_path / "record.json"
    for stem, dtype, n in (("gates", "float32", 3), ("indexer", "float16", 2), ("gates", "float32", 4)):
        arguments = ["--stem", stem, "--dtype", dtype, "--examples", str(n), "--json", str(file)]
        assert main(["verify", *arguments]) == 0
        assert re.fullmatch(rf" *\d+ s  {stem} {dtype}: pass\n", capsys.readouterr().err)
    rows = json.loads(file.read_text())["rows"]
    assert [(row["stem"], row["dtype"], row["cases"]) for row in rows] == [
        ("gates", "float32", 4), ("indexer", "float16", 2)
    ]  # fmt: skip
    assert [re.findall(r"--examples (\d)", row["command"]) for row in rows] == [["4"], ["2"]]


def test_rows_of_another_version_are_not_kept():
    old, new = ({"triton": "3.6", "rows": [{"stem": stem, "n": n}]} for stem, n in (("gates", 1), ("budget", 2)))
    assert records.with_rows_of(None, new, ("stem",)) == new
    assert records.with_rows_of(old, new, ("stem",)) == {"triton": "3.6", "rows": [*old["rows"], *new["rows"]]}
    assert records.with_rows_of(old | {"triton": "3.7"}, new, ("stem",)) == new


@pytest.mark.parametrize("command", ["verify", "compile"])
@pytest.mark.parametrize(("text", "what"), [("{", "got no JSON"), ("[1]", "got list")])
def test_a_file_that_holds_no_record_is_refused_before_anything_runs(command, text, what, tmp_path, capsys):
    file = tmp_path / "record.json"
    file.write_text(text)
    with pytest.raises(SystemExit, match="2"):
        main([command, "--json", str(file)])
    assert f"argument --json: {file}: expected a record, {what}" in capsys.readouterr().err
    assert file.read_text() == text


def test_the_hash_of_the_sources_changes_with_names_and_contents_of_python_files_alone(tmp_path):
    for package in ("gsa_fast", "gsa_ref"):
        (tmp_path / package).mkdir()
        (tmp_path / package / "a.py").write_text("x = 1\n")
    seen = [records.sources(tmp_path)]
    (tmp_path / "gsa_ref" / "notes.md").write_text("not code")
    (tmp_path / "tests.py").write_text("no part of a package")
    assert records.sources(tmp_path) == seen[0]
    for change in (
        lambda: (tmp_path / "gsa_ref" / "a.py").write_text("x = 2\n"),
        lambda: (tmp_path / "gsa_ref" / "a.py").rename(tmp_path / "gsa_ref" / "b.py"),
        lambda: (tmp_path / "gsa_fast" / "empty.py").touch(),
    ):
        change()
        seen.append(records.sources(tmp_path))
    assert len(set(seen)) == 4
    assert all(re.fullmatch("[0-9a-f]{12}", digest) for digest in seen)


def test_processes_take_the_gpus_in_turn(monkeypatch):
    taken = []
    monkeypatch.setattr(run.torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(run.torch.cuda, "set_device", taken.append)
    started = get_context("spawn").Value("i", 0)
    for _ in range(3):
        run.share_devices(started)
    assert taken == [0, 1, 0]
    monkeypatch.setattr(run.torch.cuda, "device_count", lambda: 1)
    run.share_devices(started)
    assert taken == [0, 1, 0]


def test_cases_do_not_depend_on_how_many_processes_share_them(monkeypatch, device):
    monkeypatch.setattr(run, "SHARD_CASES", 4)
    examples = {"gates": 10, "budget": 3}
    alone, shared = (
        run.verify(("gates", "budget"), ("float32", "float16"), device, examples, seed=1, jobs=jobs) for jobs in (1, 2)
    )
    assert [(row.stem, row.dtype, row.cases) for row in alone] == [
        ("gates", "float32", 10), ("gates", "float16", 10), ("budget", "float32", 3),
    ]  # fmt: skip
    assert [replace(row, seconds=0) for row in alone] == [replace(row, seconds=0) for row in shared]


def test_a_row_fails_if_one_of_its_shards_does():
    good = run.Row("gates", "float32", cases=5, worst_error=2.0, budget=4.0, ratio=0.5, longest=9, verdict="pass")
    bad = run.Row("gates", "float32", cases=1, ratio=0.1, longest=3, verdict="FAIL", detail="x", smallest_failure="{}")
    merged = run.merge([good, bad])
    assert (merged.verdict, merged.detail, merged.smallest_failure) == ("FAIL", "x", "{}")
    assert (merged.cases, merged.longest, merged.worst_error, merged.ratio) == (6, 9, 2.0, 0.5)
    assert run.merge([good, good]).verdict == "pass"


def test_a_fault_exits_1_and_prints_the_smallest_case_so_that_it_can_be_pasted_back(capsys, broken_gate):
    assert main(["verify", "--stem", "gates", "--dtype", "float32", "--examples", "20"]) == 1
    printed = capsys.readouterr().out
    assert "1 of 1 rows failed." in printed
    case = next(line for line in printed.splitlines() if "--case" in line).split("--case ")[1].strip("'")
    smallest = json.loads(case)
    assert (smallest["B"], smallest["L"], smallest["heads"], smallest["width"]) == (1, 1, 1, 8)
    assert main(["verify", "--case", case]) == 1
    assert "FAIL" in capsys.readouterr().out


def test_a_case_that_passes_is_reported_as_such(capsys):
    assert main(["verify", "--case", CASE.to_json()]) == 0
    assert capsys.readouterr().out.startswith("pass on ")


def test_a_kernel_that_raises_is_a_failure_and_not_a_crash(capsys, monkeypatch):
    def apply_gate(x, gate_logits, *, impl="auto"):
        raise RuntimeError("no such kernel")

    monkeypatch.setattr(checks.gsa_fast, "apply_gate", apply_gate)
    assert main(["verify", "--stem", "gates", "--dtype", "float32", "--examples", "2"]) == 1
    assert "RuntimeError: no such kernel" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--examples", "0"], "argument --examples: expected a number ≥ 1, got 0"),
        (["--stem", "softmax"], "argument --stem: invalid choice: 'softmax'"),
        (["--case", "{"], "argument --case: case: expected JSON, got '{'"),
        (["--case", '{"stem": "gates"}'], "argument --case: case: expected the fields"),
        (["--json", "/no/such/folder/x.json"], "argument --json: expected a file in an existing folder, got"),
        (["--stem", "selection", "--dtype", "float16"], "nothing to check: selection read float32 scores"),
    ],
)
def test_bad_usage_exits_2_and_names_the_argument(arguments, message, capsys):
    with pytest.raises(SystemExit) as stopped:
        main(["verify", *arguments])
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err


def test_the_same_seed_draws_the_same_cases(device):
    first, again, other = (run.verify_row("gates", "float32", device, 10, seed) for seed in (1, 1, 2))
    assert (first.worst_error, first.budget) == (again.worst_error, again.budget)
    assert (first.worst_error, first.budget) != (other.worst_error, other.budget)


def test_the_cases_of_a_row_resemble_one_another_little(monkeypatch):
    """A repeated seed is a case that Hypothesis made from an earlier one."""
    seen = []
    monkeypatch.setattr(run, "check_case", lambda case, device, row: seen.append(case))
    run.verify(("indexed_selection",), ("float32",), "cpu", {"indexed_selection": 100}, seed=0)
    assert len(seen) == 100
    assert len({case.seed for case in seen}) >= 60
    assert {case.values for case in seen} == set(SELECTED_VALUES)


def test_every_stem_has_a_check_a_case_and_a_number_of_examples():
    assert set(run.STEMS) == set(CASES) == set(run.INTERPRETER_EXAMPLES) == set(run.INTERPRETER_QUICK_EXAMPLES)


def test_without_a_gpu_the_command_switches_to_the_interpreter_by_itself():
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | {"CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, "-m", "gsa_fast", "verify", "--stem", "gates", "--examples", "1"]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "on the CPU, in the Triton interpreter" in done.stdout
    assert "bfloat16 was not run" in done.stdout
