"""The checks turn red under faults: a sample here, all with `make mutants` and, for the reference, `make mutation`."""

import ast
import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests import reference_mutants

ROOT = Path(__file__).parents[1]
RECORDS = ROOT / "tests/mutants"
SAMPLE = [
    "one key of the future",
    "indexer forgets a head",
    "skips the last tile",
    "count one key too many",
    "sample variance",
    "inverse rule",
    "one tie too few from the shortlist",
    "runs on one another",
    "union chunks start",
    "future slots attended",
    "accumulator not rescaled",
    "query heads interleaved",
    "value gate forgotten",
    "masks of the neighbouring query",
    "union repair forgets",
    "bits of the neighbouring row",
    "gate read with the strides",
    "decode chooses too few groups",
    "decode shards share one segment",
    "decode splits not rescaled",
    "teacher sum not rescaled",
    "selected teacher on empty slots",
    "key gradient keeps the last chunk's slots",
]
GENERATED_SAMPLE = ["apply_gate_kernel", "key_gradients_kernel", "load_row_keys"]

LIST = """
import pathlib, shutil, sys
from tests.mutants import generated, hand
package = pathlib.Path(sys.argv[1])
for fault in [*hand.MUTANTS, *generated.draw(package)]:
    original = (package / fault.file).read_bytes()
    fault.apply(package)
    changed = (package / fault.file).read_bytes()
    assert changed != original, fault.name
    compile(changed, fault.file, "exec")
    (package / fault.file).write_bytes(original)
    print(repr(fault.key))
"""
# A fault that changes nothing, one that shows, one that never ends, and a case that fails on the unchanged copy.
RUNNER = """
from tests.mutants import hand, runner
STORE = "    tl.store(out_ptr + i, (x *"
comment = hand.Mutant("a comment", "gates", "gates.py", STORE, "    # a comment\\n" + STORE)
shown = hand.Mutant("no gate", "gates", "gates.py", "x * stable_sigmoid(gate)", "x")
endless = hand.Mutant("endless", "gates", "gates.py", STORE, "    while True:\\n        pass\\n" + STORE)
runner.CASE_SECONDS = 2
outcomes, control = runner.run_faults([comment, shown, endless], {}, 100, 1, lambda *_: None)
print(*(outcomes[fault.key].verdict for fault in (comment, shown, endless)), control.verdict)
_, outcome, _ = next(runner.run_in_children([runner.Task(shown, (outcomes[shown.key].case,))], 1))
print(outcome.verdict)
TEST = "tests/fast/test_gates.py::test_gate_at_{}"
tests = [TEST.format(name) for name in ("plus_infinity_is_the_identity", "minus_infinity_gives_exactly_zero")]
for i, outcome, _ in runner.run_in_children([runner.Task(shown, tests=(test,)) for test in tests], 1):
    print(outcome.verdict, outcome.test == tests[1])
"""


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    # A process of its own: the faults are loaded in the interpreter, under the name of the package.
    return subprocess.run([sys.executable, *arguments], cwd=ROOT, capture_output=True, text=True, check=False)


def read(name: str) -> list[dict]:
    return json.loads((RECORDS / name).read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def keys(tmp_path_factory) -> list[tuple]:
    """The keys of all faults, each of which changed its file and left Python."""
    package = tmp_path_factory.mktemp("faults") / "gsa_fast"
    shutil.copytree(ROOT / "gsa_fast", package)
    done = run("-c", LIST, str(package))
    assert done.returncode == 0, done.stderr
    return [ast.literal_eval(line) for line in done.stdout.splitlines()]


def test_every_fault_changes_its_file_and_has_a_key_of_its_own(keys):
    assert len(keys) == len(set(keys)) >= 40 + 100


def test_the_records_hold_faults_of_the_code_as_it_stands(keys):
    """If not, a line that was broken has changed since: `make mutants`."""
    fields = ("file", "kernel", "operator", "before", "after", "occurrence")
    recorded = [tuple(fault["key"]) for fault in read("hand.json")]
    recorded += [tuple(fault[field] for field in fields) for fault in read("generated.json")]
    assert len(recorded) == len(set(recorded))
    assert set(recorded) <= set(keys)
    assert {key for key in recorded if len(key) != len(fields)} == {key for key in keys if len(key) != len(fields)}


def test_a_fault_survives_if_and_only_if_its_survival_is_explained():
    fields = ("file", "kernel", "operator", "before", "after", "occurrence")
    survivors = {(fault["key"][0],) for fault in read("hand.json") if fault["verdict"] == "pass"}
    survivors |= {tuple(f[field] for field in fields) for f in read("generated.json") if f["verdict"] == "pass"}
    explained = [(e["name"],) if "name" in e else tuple(e[field] for field in fields) for e in read("survivors.json")]
    assert len(explained) == len(set(explained))
    assert set(explained) == survivors
    assert all(len(e["why"]) > 20 for e in read("survivors.json"))


@pytest.mark.parametrize(("sample", "options"), [(SAMPLE, ()), (GENERATED_SAMPLE, ("--generated",))])
def test_a_sample_of_the_faults_turns_verify_red(sample, options):
    chosen = (word for name in sample for word in ("--only", name))
    done = run("-m", "tests.mutants", "--jobs", "1", *options, *chosen)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("killed") >= len(sample)
    assert "the unchanged copy: pass." in done.stdout


def test_the_runner_tells_a_harmless_fault_from_one_that_shows_and_one_that_never_ends():
    done = run("-c", RUNNER)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == ["pass FAIL TIMEOUT pass", "FAIL", "pass False", "FAIL True"]


def test_an_unknown_fault_is_refused():
    done = run("-m", "tests.mutants", "--only", "no such fault")
    assert done.returncode == 2
    assert "argument --only" in done.stderr


# ---- mutants of the reference ----------------------------------------------------------------------------------------


def test_every_module_of_the_reference_has_tests_of_its_own():
    modules = reference_mutants.modules()
    assert {"budget", "equations.budget", "_arguments", "theory.complexity"} <= set(modules)
    general = {f"tests/ref/{name}.py" for names in reference_mutants.GENERAL.values() for name in names}
    for module in modules:
        own = set(reference_mutants.tests_of(module)) - general
        assert own or module == "_arguments", module


@pytest.mark.parametrize(
    ("mutant", "change", "kind"),
    [
        ("gsa_ref.equations.gates.x_sigmoid__mutmut_17", "+ return np.where(x > 0, 1.0, e) / (1.0 + e)", "equivalent"),
        ("gsa_ref.equations.gates.x_sigmoid__mutmut_16", "+ return np.where(x >= 1, 1.0, e) / (1.0 + e)", None),
        ("gsa_ref.gates.x_sigmoid__mutmut_17", "+ return np.where(x > 0, 1.0, e) / (1.0 + e)", None),
    ],
)
def test_an_explanation_fits_one_function_and_one_change(mutant, change, kind):
    found = reference_mutants.explain(mutant, ["- return something", change])
    assert (found and found.kind) == kind


def test_an_unknown_module_is_refused(capsys):
    with pytest.raises(SystemExit, match="2"):
        reference_mutants.main(["budgets"])
    assert "argument MODULE: expected one of _arguments, attention, budget" in capsys.readouterr().err
