"""The puzzles: solvable, unsolved as shipped, in step with their solutions; and checkers that refuse near misses."""

import contextlib
import importlib.util
import io
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import nbformat
import numpy as np
import pytest
import torch
from hypothesis import strategies as st

from gsa_ref.puzzles import Example, __main__, _files, _grading, check, find, puzzle, puzzles_of, stems
from tests.wrong_solutions import wrong_solutions

ROOT = Path(__file__).parents[1]
SOLUTIONS = sorted((ROOT / "notebooks/solutions").glob("*.ipynb"))
PUZZLES = sorted((ROOT / "notebooks/puzzles").glob("*.ipynb"))

# Their tensors are on the CPU, and where there is a GPU the kernels of this process are compiled for it.
INTERPRETED = ("from_equation_to_kernel", "verify_a_kernel")


def where_it_runs(stem: str) -> pytest.MarkDecorator:
    skipped = stem in INTERPRETED and torch.cuda.is_available()
    return pytest.mark.skipif(skipped, reason="needs a process whose kernels are interpreted")


WRONG = [
    pytest.param(name, wrong, id=f"{name}-{wrong.__name__}", marks=where_it_runs(stem))
    for stem in stems()
    for name, group in wrong_solutions(stem).items()
    for wrong in group
]
each_solution, each_puzzle = (
    pytest.mark.parametrize("path", [pytest.param(p, id=p.stem, marks=where_it_runs(p.stem[3:])) for p in paths])
    for paths in (SOLUTIONS, PUZZLES)
)


def run(path: Path) -> tuple[dict[str, Any], list[str]]:
    """The namespace after the notebook's cells ran in this process, and what each cell printed."""
    namespace: dict[str, Any] = {}
    printed, done = [], _files.execute(path)
    while True:
        with contextlib.redirect_stdout(io.StringIO()) as out, contextlib.redirect_stderr(io.StringIO()) as err:
            after = next(done, None)
        assert not err.getvalue()
        if after is None:
            return namespace, printed
        namespace = after
        printed.append(out.getvalue())


def stored(path: Path) -> list[str]:
    """What each code cell printed when the notebook was stored."""
    codes = [cell for cell in nbformat.read(path, as_version=4).cells if cell.cell_type == "code"]
    return ["".join(output.text for output in cell.outputs) for cell in codes]


def execute_module() -> Any:
    """`notebooks/execute.py`, which is a script."""
    spec = importlib.util.spec_from_file_location("execute", ROOT / "notebooks/execute.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


# ---- the notebooks ---------------------------------------------------------------------------------------------------


def test_every_puzzle_has_a_solution_and_every_stem_a_notebook():
    assert [path.name for path in PUZZLES] == [path.name for path in SOLUTIONS]
    assert sorted(path.stem[3:] for path in PUZZLES) == stems()


@each_puzzle
def test_a_notebook_poses_all_puzzles_of_its_stem_in_order(path):
    names = [p.name for p in _files.posed(path)]
    assert names == [p.name for p in puzzles_of(path.stem[3:])]
    assert names == _files.names(path)


@each_puzzle
def test_a_statement_has_a_hint_and_a_common_mistake_and_a_stub_says_what_it_returns(path):
    notebook = nbformat.read(path, as_version=4)
    statements = [c.source for c in notebook.cells if _files.STATEMENT.match(c.source)]
    assert len(statements) == len(_files.posed(path))
    for text in statements:
        assert re.findall("<summary>(.+)</summary>", text) == ["Hint", "Common mistake"]
    for stub in (c.source for c in notebook.cells if "NotImplementedError" in c.source):
        assert re.match(r'(?:@\S+\n)?def \w+\(.*\):\n    """.*Returns ', stub, re.DOTALL), stub


@each_solution
def test_a_solution_solves_each_of_its_puzzles(path):
    _, printed = run(path)
    checks = [text for text, source in zip(printed, _files.cells(path), strict=True) if _files.CHECK.search(source)]
    assert len(checks) == len(_files.names(path))
    assert all(re.fullmatch(r"solved: \d+ examples, compared with .+\n", text) for text in checks)
    assert printed == stored(path)


@each_puzzle
def test_a_puzzle_is_unsolved_as_shipped(path):
    _, printed = run(path)
    checks = [text for text, source in zip(printed, _files.cells(path), strict=True) if _files.CHECK.search(source)]
    assert checks == ["not solved yet\n"] * len(_files.names(path))
    assert printed == stored(path)


@each_solution
def test_the_stored_puzzle_is_what_the_solution_gives(path):
    """Otherwise: python notebooks/execute.py notebooks/solutions/NN_<stem>.ipynb"""
    expected = execute_module().puzzle_of(nbformat.read(path, as_version=4))
    found = nbformat.read(path.parents[1] / "puzzles" / path.name, as_version=4)
    assert [(c.cell_type, c.source, c.id) for c in found.cells] == [
        (c.cell_type, c.source, c.id) for c in expected.cells
    ]
    assert "SOLUTION" not in str(found)
    assert sum("raise NotImplementedError" in c.source for c in found.cells) == len(_files.names(path))


# ---- the checkers ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "wrong"), WRONG)
def test_a_near_miss_is_refused(name, wrong):
    outcome = find(name).run(wrong)
    assert not outcome.solved
    assert outcome.text.startswith("wrong")


@pytest.mark.parametrize("stem", stems())
def test_every_checker_has_two_near_misses(stem):
    wrong = wrong_solutions(stem)
    assert list(wrong) == [p.name for p in puzzles_of(stem)]
    assert all(len(group) >= 2 for group in wrong.values())


@puzzle(st.integers(0, 1000), oracle="n + 1")
def successor(n: int) -> Example:
    return Example({"n": n}, n + 1)


@puzzle(st.integers(0, 5), oracle="sorting")
def sort_a_row(n: int) -> Example:
    x = np.arange(n, 0, -1.0)
    return Example({"x": x, "more": [torch.ones(2, 3).T]}, np.sort(x))


def test_the_smallest_failing_example_is_shown():
    outcome = successor.run(lambda n: n + 1 if n < 17 else n)
    assert outcome.text == (
        "wrong: got 17, expected 18\nthe smallest example found:\n  n = 17\n  expected = 18\n  got = 17"
    )
    assert not outcome.solved


def test_what_a_solution_raises_is_told_with_its_line_and_its_input():
    def divides(n):
        return n + 1 if n < 3 else n // (n - n)

    text = successor.run(divides).text
    assert "raised ZeroDivisionError" in text
    assert "(line 2 of divides)" in text
    assert "n = 3" in text
    assert "got" not in text


def test_a_function_with_other_parameters_is_told_what_came():
    text = successor.run(lambda: 0).text
    assert "raised TypeError: " in text
    assert "takes 0 positional arguments but 1 was given\n" in text


def test_a_warning_counts_as_an_error_unless_the_puzzle_says_otherwise():
    def warns(n):
        return n + 1 + 0 * int(np.isnan(np.float64(0) / np.float64(0)))

    assert "a warning counts as an error" in successor.run(warns).text
    forgiving = puzzle(st.integers(0, 9), oracle="n + 1", warnings="ignore")(lambda n: Example({"n": n}, n + 1))
    assert forgiving.run(warns).solved


def test_a_stub_is_unsolved_whether_it_raises_or_returns():
    def raises(n):
        raise NotImplementedError

    assert successor.run(raises) == successor.run(lambda n: NotImplemented) == (False, "not solved yet")


def test_a_forgotten_return_is_told():
    assert "is a `return` missing?" in successor.run(lambda n: None).text


def test_what_cannot_be_compared_is_wrong():
    assert "no real numbers" in successor.run(lambda n: "text").text
    assert "cannot be compared" in sort_a_row.run(lambda x, more: [[1, 2], [3]]).text


def test_different_answers_for_one_input_are_told():
    calls = []

    def forgets(n):
        calls.append(n)
        return n + 1 if len(calls) != 5 else 0

    assert successor.run(forgets) == (False, "wrong: it gives different answers for the same input")


def test_a_solution_gets_copies_with_the_strides_of_the_arguments():
    strides = []

    def in_place(x, more):
        strides.append(more[0].stride())
        x.sort()
        more[0].zero_()
        return x

    assert sort_a_row.run(in_place).solved
    assert set(strides) == {(1, 3)}

    def destroys(x, more):
        x[:] = 0
        return x

    text = sort_a_row.run(destroys).text
    assert "x = [1.]\n" in text
    text = sort_a_row.run(lambda x, more: x).text
    assert "x = [2. 1.]  shape [2]" in text
    assert "[0] [[1. 1.]" in text


def test_a_judge_decides_in_place_of_a_comparison():
    even = puzzle(st.integers(0, 9), oracle="parity")(
        lambda n: Example({"n": n}, None, judge=lambda got: "" if got % 2 == 0 else f"{got} is odd")
    )
    assert even.run(lambda n: 2 * n).solved
    assert even.run(lambda n: n).text == "wrong: 1 is odd\nthe smallest example found:\n  n = 1\n  got = 1"


@pytest.mark.parametrize(
    ("got", "expected", "text"),
    [
        (np.ones(3), np.ones(2), "the shape is [3], expected [2]"),
        (np.ones((1, 2)), np.ones(2), "the shape is [1, 2], expected [2]"),
        (3.0, -np.inf, "got 3.0, expected -inf"),
        (np.inf, np.nan, "got inf, expected nan"),
        (np.array([1, np.inf]), np.array([1.0, np.inf]), ""),
        (np.array([np.nan]), np.array([np.nan]), ""),
        (1.0 + 1e-8, 1.0, "got 1.00000001, expected 1.0"),
        (1.0 + 1e-10, 1.0, ""),
        (2.5, 2, "got 2.5, expected 2"),
        (2.0, 2, ""),
        (True, False, "got True, expected False"),
        (torch.ones(2, dtype=torch.bfloat16), np.ones(2), ""),
        ((1, 2), (1, 3), "value 1: got 2, expected 3"),
        ([1, 2], (1, 2), ""),
        (1, (1, 2), "it should return 2 values"),
    ],
)
def test_comparison(got, expected, text):
    assert Example({}, expected).problem(got) == text


def test_a_name_belongs_to_one_puzzle():
    names = [p.name for stem in stems() for p in puzzles_of(stem)]
    assert len(names) == len(set(names)) >= 20


def test_an_unknown_name_is_refused():
    with pytest.raises(ValueError, match=r"name: expected one of .*stable_sigmoid"):
        check("unstable_sigmoid", abs)
    with pytest.raises(ValueError, match="stem: expected one of"):
        puzzles_of("sums")


# ---- grading ---------------------------------------------------------------------------------------------------------


def notebook_of(tmp_path: Path, *sources: str) -> Path:
    path = tmp_path / "of a student.ipynb"
    nbformat.write(nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(s) for s in sources]), path)
    return path


CHECKS = 'from gsa_ref.puzzles import check\nassert check("visible_keys", visible_keys)'
RIGHT = """
def visible_keys(L, S, start, length):
    return [max(min(p + 1, length, S), 0) * (p < length) for p in range(start, start + L)]
"""


def test_a_student_s_notebook_is_graded_although_a_cell_of_it_fails(tmp_path, capsys):
    path = notebook_of(tmp_path, "%matplotlib inline\n!ls", RIGHT, CHECKS, "import gsa_ref\nstable_sigmoid = abs")
    (tmp_path / "random.py").write_text("raise RuntimeError")  # the student's file is no module of Python
    assert __main__.main(["grade", str(path)]) == 1
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split(maxsplit=1) == ["stable_sigmoid", "wrong: at [0] got 0.0, expected 0.5"]
    assert lines[1].split()[:2] == ["visible_keys", "solved:"]
    assert lines[2].split(maxsplit=1) == ["block_bound", "there is no function block_bound"]
    assert "1 of 3 solved" in lines


def test_what_only_jupyter_understands_is_passed_over_and_python_is_not(tmp_path):
    path = notebook_of(tmp_path, "%matplotlib inline\nif True:\n    !ls\nx = 3", "y = (17\n% 10)")
    (_, namespace) = _files.execute(path)
    assert (namespace["x"], namespace["y"]) == (3, 7)


def test_a_loop_without_end_and_an_exit_cost_their_own_puzzle_only(tmp_path):
    path = notebook_of(tmp_path, RIGHT, CHECKS, "def stable_sigmoid(x):\n    while True: pass")
    assert _grading.grade(path, "stable_sigmoid", seconds=5) == (False, "no answer within 5 s")
    path = notebook_of(tmp_path, "import sys\nprint('why', file=sys.stderr)\nsys.exit(3)", CHECKS)
    assert _grading.grade(path, "visible_keys", seconds=60) == (False, "its process ended with status 3\nwhy")


def test_the_cells_and_a_check_run_in_the_graded_process(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("gsa_ref.puzzles.check", check)
    assert _grading.try_one(notebook_of(tmp_path, RIGHT, CHECKS), "visible_keys").solved
    assert "AssertionError" in capsys.readouterr().err  # the checks of the notebook itself are put off


@pytest.mark.parametrize("text", ["no JSON", "{}", '{"cells": [1]}', '{"cells": []}'])
def test_what_is_no_notebook_of_puzzles_is_refused(tmp_path, capsys, text):
    path = tmp_path / "file.ipynb"
    path.write_text(text)
    with pytest.raises(SystemExit) as refused:
        __main__.main(["grade", str(path)])
    assert refused.value.code == 2
    assert "file.ipynb" in capsys.readouterr().err


def test_the_list_names_every_puzzle(capsys, tmp_path):
    command = [sys.executable, "-m", "gsa_ref.puzzles", "list"]
    out = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert "01 · The indexer  (01_indexer.ipynb)" in out
    assert all(
        re.search(rf"^  {p.name} +(easy|medium|hard) +\d+ min  \S", out, re.MULTILINE)
        for s in stems()
        for p in puzzles_of(s)
    )
    with pytest.raises(SystemExit):
        __main__.main(["list", "--folder", str(tmp_path)])
    assert "in a checkout" in capsys.readouterr().err
