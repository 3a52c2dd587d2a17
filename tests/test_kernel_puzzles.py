"""Puzzles whose solutions are kernels, and hunts for planted faults: what their checkers do that the others do not."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import strategies as st

from gsa_ref.puzzles import Example, find
from gsa_ref.puzzles._hunt import hunt
from gsa_ref.puzzles._interpreter import kernel_puzzle, programs_reversed, watched
from tests.wrong_solutions import planted  # which sets TRITON_INTERPRET

triton = pytest.importorskip("triton", reason="needs Triton", exc_type=ImportError)
tl = triton.language

ROOT = Path(__file__).parents[1]
interpreted = pytest.mark.skipif(torch.cuda.is_available(), reason="needs a process whose kernels are interpreted")


def test_the_checkers_need_no_triton_until_a_kernel_is_tried():
    program = (
        "import sys; sys.modules['triton'] = None\n"
        "from gsa_ref.puzzles import find, puzzles_of, stems\n"
        "assert all(puzzles_of(stem) for stem in stems())\n"
        "print(find('trust_selection').run(lambda select: True).text)"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=False)
    assert done.stdout == "wrong: 14 of 14 faults survive\n", done.stderr


# ---- kernels ---------------------------------------------------------------------------------------------------------


@triton.jit
def halves_kernel(x_ptr, out_ptr, n, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(x_ptr + i, mask=i < n, other=0.0)
    tl.store(out_ptr + i, x / 2.0, mask=i < n)


@triton.jit
def last_writer_kernel(out_ptr):
    tl.store(out_ptr, tl.program_id(0))


@triton.jit
def stub_kernel(out_ptr):
    raise NotImplementedError


@interpreted
def test_loads_and_divisions_are_counted_for_each_program():
    x, out = torch.arange(10.0), torch.empty(10)
    with watched() as work:
        halves_kernel[(3,)](x, out, 10, BLOCK=4)
        halves_kernel[(1,)](x, out, 2, BLOCK=4)
    assert torch.equal(out[:2], x[:2] / 2)
    assert dict(work.bytes_loaded) == {(1, 0, 0, 0): 16, (1, 1, 0, 0): 16, (1, 2, 0, 0): 8, (2, 0, 0, 0): 8}
    assert dict(work.divisions) == {(1, 0, 0, 0): 1, (1, 1, 0, 0): 1, (1, 2, 0, 0): 1, (2, 0, 0, 0): 1}
    halves_kernel[(3,)](x, out, 10, BLOCK=4)
    assert work.bytes_loaded.total() == 48  # nothing is counted afterwards


@interpreted
def test_programs_run_backwards_and_forwards_again():
    out = torch.empty(1)
    with programs_reversed():
        last_writer_kernel[(2, 3)](out)
    assert out == 0
    last_writer_kernel[(2, 3)](out)
    assert out == 1


@kernel_puzzle(st.integers(1, 3), oracle="x itself")
def copy_of(n: int) -> Example:
    x = torch.arange(float(n))
    return Example({"x": x}, x.numpy())


@interpreted
def test_a_stub_in_a_kernel_is_unsolved():
    def launches(x):
        stub_kernel[(1,)](x)

    assert copy_of.run(launches) == (False, "not solved yet")


@interpreted
def test_memory_is_poisoned_for_the_solution_only():
    assert copy_of.run(lambda x: x.clone()).solved
    assert "got nan" in copy_of.run(lambda x: torch.empty(len(x))).text  # an element not written
    assert not torch.are_deterministic_algorithms_enabled()


# ---- hunts -----------------------------------------------------------------------------------------------------------

double = hunt(
    "double", [lambda x: 2 * x, lambda x: x + x], [lambda x: x * x, lambda x: 2 * abs(x), lambda x: 2 * x + 1]
)


@pytest.mark.parametrize(
    ("function", "text"),
    [
        (
            lambda f: f(3) == 6 and f(-3) == -6,
            "solved: 5 examples, compared with 2 right implementations and 3 with a fault",
        ),
        (lambda f: f(2) == 4, "wrong: 2 of 3 faults survive"),
        (lambda f: True, "wrong: 3 of 3 faults survive"),
        (lambda f: False, "wrong: it does not trust a right implementation"),
        (lambda f: 1 / (f(2) - 4), "wrong: of a right implementation, it raised ZeroDivisionError: division by zero"),
        (lambda f: None, "wrong: of a right implementation, it returned None: is a `return` missing?"),
        (lambda f: NotImplemented, "not solved yet"),
    ],
)
def test_a_property_is_tried_on_right_and_faulty_implementations(function, text):
    outcome = double.run(function)
    assert outcome.text.split(" (line")[0] == text
    assert outcome.solved == text.startswith("solved")


def test_a_property_may_assert():
    def asserts(f):
        assert [f(x) for x in (-3, 0, 3)] == [-6, 0, 6]
        return True

    assert double.run(asserts).solved


@pytest.mark.parametrize("name", ["trust_selection", "trust_causality", "trust_attention"])
def test_no_implementation_tells_its_fault(name):
    """In what a learner can print."""
    found = find(name)
    assert len({(f.__name__, f.__qualname__, f.__doc__) for f in [*found.right, *found.faulty]}) == 1


def test_every_planted_fault_of_the_budget_shows_somewhere():
    problem = find("budget_rows").example(None).problem
    assert problem([(1.0, 1.0, 100)] * 4) != ""
    assert problem([(1.48, 1.0, 100), (0.001, 1.0, 2), (100.0, 1.0, 100), (0.4, 0.0, 100)]) == ""
    assert problem([(np.nan, 1.0, 100)]) == problem([(-1.0, 1.0, 100)]) == "a number is negative or not finite"
    assert "cannot be compared" in problem([1.0])


def test_a_replacement_that_does_not_fit_is_an_error():
    with pytest.raises(AssertionError):
        planted.planted("verify_a_kernel", "keep_mask", "no fault", ("no such text", ""))
