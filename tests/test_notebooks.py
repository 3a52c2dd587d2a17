"""The stored notebooks: executed, complete, without network, and with puzzles that can be solved.

That the stored outputs are what the code gives is nbval's part (`make notebook-tests`); nbval passes a cell without
stored output whatever it does, so that none is missing is checked here.
"""

import ast
import re
import sys
import tomllib
from itertools import pairwise
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

ROOT = Path(__file__).parents[1]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("[0-9][0-9]_*.ipynb"))
SECTIONS = (
    *("Objectives", "Predict first", "Equation", "Reference call", "Assert"),
    *("Picture", "Kernel preview", "Puzzle", "Recap and links"),
)

PUZZLES = sorted((ROOT / "notebooks").glob("*/[0-9][0-9]_*.ipynb"))  # and solutions: see test_puzzles.py

each_notebook = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
each_file = pytest.mark.parametrize(
    "path", NOTEBOOKS + PUZZLES, ids=lambda path: path.relative_to(ROOT / "notebooks").with_suffix("").as_posix()
)


def cells(path: Path, kind: str) -> list[nbformat.NotebookNode]:
    return [cell for cell in nbformat.read(path, as_version=4).cells if cell.cell_type == kind]


def tagged(path: Path, tag: str) -> list[nbformat.NotebookNode]:
    return [cell for cell in cells(path, "code") if tag in cell.metadata.get("tags", [])]


def allowed_imports() -> set[str]:
    """The standard library, this project and what pyproject.toml lists for running and testing it."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    requirements = project["dependencies"] + project["optional-dependencies"]["dev"]
    names = {re.match(r"[\w-]+", requirement)[0].replace("-", "_").lower() for requirement in requirements}
    return names | sys.stdlib_module_names | {"gsa_ref", "gsa_fast"}


def test_there_are_notebooks():
    expected = [
        "00_tour",
        "01_indexer",
        "02_budget",
        "03_selection",
        "04_attention",
        "05_gates",
        "06_layer",
        "07_complexity",
        "08_convergence",
        "09_from_equation_to_kernel",
        "10_verify_a_kernel",
        "11_long_context",
    ]
    assert [path.stem for path in NOTEBOOKS] == expected


@each_file
def test_every_code_cell_was_executed_in_order(path):
    counts = [cell.execution_count for cell in cells(path, "code")]
    assert counts == list(range(1, len(counts) + 1))


@each_file
def test_outputs_hold_no_errors_no_warnings_and_nothing_that_changes_between_runs(path):
    for cell in cells(path, "code"):
        assert "execution" not in cell.metadata, "time stamps: use notebooks/execute.py"
        kinds = [(output.output_type, output.get("name")) for output in cell.outputs]
        assert all(kind != "error" and name != "stderr" for kind, name in kinds)
        assert all(a != b or a[0] != "stream" for a, b in pairwise(kinds)), "a split stream: use notebooks/execute.py"
        text = str(cell.outputs)
        assert not re.search(r" at 0x[0-9a-f]{6,}|/(home|root|Users|tmp|work)/|[A-Z]:\\\\Users", text)


@each_notebook
def test_has_the_sections_of_the_skeleton_in_order(path):
    text = "\n".join(cell.source for cell in cells(path, "markdown"))
    assert re.match(rf"# {path.stem[:2]} · \S", text)
    headings = re.findall(r"^## (.+)$", text, re.MULTILINE)
    assert len(headings) == len(SECTIONS)
    assert all(heading.startswith(section) for heading, section in zip(headings, SECTIONS, strict=True))
    assert re.search(r"\*\*\d+ minutes\.\*\*", text)


@each_notebook
def test_a_prediction_is_asked_for_and_the_next_cell_asserts_the_answer(path):
    sources = [cell.source for cell in cells(path, "code")]
    (asked,) = (i for i, source in enumerate(sources) if re.search(r"^guess_\w+ = None", source, re.MULTILINE))
    guesses = re.findall(r"^(guess_\w+) = None", sources[asked], re.MULTILINE)
    answers = [source for source in sources[asked + 1 :] if "reveal(" in source]
    assert answers[0] == sources[asked + 1]
    assert all("assert " in source for source in answers)
    assert re.findall(r"^reveal\((guess_\w+), ", "\n".join(answers), re.MULTILINE) == guesses


@each_file
def test_asks_no_other_host_for_anything(path):
    notebook = nbformat.read(path, as_version=4)
    text = "\n".join(cell.source for cell in notebook.cells) + str(notebook)
    assert not re.search(r"""!\[[^\]]*\]\(\s*(https?:)?//|\b(src|href)\s*=\s*\\?["']?(https?:)?//""", text)


@each_file
def test_links_lead_to_files_of_the_project(path):
    for cell in cells(path, "markdown"):
        for target in re.findall(r"\]\(([^)#\s]+)[^)]*\)", cell.source):
            assert (path.parent / target).exists(), target


@each_file
def test_imports_only_what_pyproject_lists(path):
    imported = set()
    for cell in cells(path, "code"):
        for node in ast.walk(ast.parse(cell.source)):
            if isinstance(node, ast.Import):
                imported |= {alias.name.split(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                imported.add(node.module.split(".")[0])
    assert imported <= allowed_imports()


@each_notebook
def test_the_puzzle_is_unsolved_as_shipped(path):
    (stub,) = tagged(path, "puzzle")
    (checker,) = tagged(path, "puzzle-check")
    assert "return NotImplemented" in stub.source
    assert [output.text for output in checker.outputs] == ["not solved yet\n"]


def puzzle_cells(path: Path) -> list[nbformat.NotebookNode]:
    """The set-up of a notebook, its solution and the checker, a wrong one and the checker: no lesson in between."""
    (solution,) = (
        match[1]
        for cell in cells(path, "markdown")
        if (match := re.search(r"<details>.*```python\n(.*)```.*</details>", cell.source, re.DOTALL))
    )
    (stub,), (checker,) = tagged(path, "puzzle"), tagged(path, "puzzle-check")
    (name,) = re.findall(r"^def (\w+)\(", solution, re.MULTILINE)
    wrong = f"""
right = {name}

def {name}(*arguments):  # wrong in two ways
    if np.abs(arguments[0]).max() > 5:
        warnings.warn("large")
    return right(*arguments) + 1e-6
"""
    assert stub.source.startswith(f"def {name}(")
    sources = cells(path, "code")[0].source, solution, checker.source, wrong, checker.source
    return [nbformat.v4.new_code_cell(source) for source in sources]


def test_the_checkers_accept_the_printed_solutions_and_refuse_wrong_ones():
    """In one kernel, which takes seconds to start; nothing that a notebook defines is left to the next."""
    groups = {path.stem: puzzle_cells(path) for path in NOTEBOOKS}
    notebook = nbformat.read(NOTEBOOKS[0], as_version=4)
    notebook.cells = [cell for group in groups.values() for cell in (nbformat.v4.new_code_cell("%reset -f"), *group)]
    folder = {"metadata": {"path": str(NOTEBOOKS[0].parent)}}
    NotebookClient(notebook, resources=folder, timeout=120, coalesce_streams=True).execute()
    for name, (_, _, accepted, _, refused) in groups.items():
        assert [output.text for output in accepted.outputs] == ["solved\n"], name
        assert refused.outputs[0].text.startswith("wrong"), name
