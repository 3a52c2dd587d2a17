"""The checks turn red under faults: a sample here, all with `make mutants` and, for the reference, `make mutation`."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests import reference_mutants

ROOT = Path(__file__).parents[1]
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

LIST = """
import pathlib, sys
from tests.mutants import MUTANTS
for mutant in MUTANTS:
    original = (pathlib.Path(sys.argv[1]) / mutant.file).read_text()
    mutant.apply(pathlib.Path(sys.argv[1]))
    assert (pathlib.Path(sys.argv[1]) / mutant.file).read_text() != original, mutant.name
    (pathlib.Path(sys.argv[1]) / mutant.file).write_text(original)
    print(mutant.name)
"""


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    # A process of its own: the faults are loaded in the interpreter, under the name of the package.
    return subprocess.run([sys.executable, *arguments], cwd=ROOT, capture_output=True, text=True, check=False)


def test_every_fault_changes_the_one_line_that_it_names(tmp_path):
    shutil.copytree(ROOT / "gsa_fast", tmp_path / "gsa_fast")
    done = run("-c", LIST, str(tmp_path / "gsa_fast"))
    assert done.returncode == 0, done.stderr
    names = done.stdout.splitlines()
    assert len(names) == len(set(names)) >= 12


@pytest.mark.timeout(1800)  # the unchanged copy runs the checks of every stem, and a fault may end by its own timeout
def test_a_sample_of_the_faults_turns_verify_red():
    done = run("-m", "tests.mutants", "--jobs", "1", *(word for name in SAMPLE for word in ("--only", name)))
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("killed") >= len(SAMPLE)
    assert "the unchanged copy: pass." in done.stdout


def test_an_unknown_fault_is_refused():
    done = run("-m", "tests.mutants", "--only", "no such fault")
    assert done.returncode == 2
    assert "argument --only" in done.stderr


# ---- mutants of the reference ----------------------------------------------------------------------------------------


def test_every_module_of_the_reference_has_tests_of_its_own():
    modules = reference_mutants.modules()
    assert {"budget", "equations.budget", "_arguments"} <= set(modules)
    for module in modules:
        own = [path for path in reference_mutants.tests_of(module) if not path.endswith("test_functions.py")]
        assert own, module


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
