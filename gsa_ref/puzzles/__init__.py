"""Checkers of the puzzles in `notebooks/puzzles/`: a learner's function against an oracle, on drawn examples.

A module holds the puzzles of one stem, and `notebooks/puzzles/NN_<stem>.ipynb` poses them. `python -m gsa_ref.puzzles
list` lists them, `python -m gsa_ref.puzzles grade FILE.ipynb` grades a notebook.
"""

from collections.abc import Callable
from importlib import import_module
from pkgutil import iter_modules
from types import ModuleType
from typing import Any

from gsa_ref.puzzles._checker import Example, Outcome, Puzzle, puzzle

__all__ = ["Example", "Outcome", "Puzzle", "check", "find", "puzzle", "puzzles_of", "stems"]


def stems() -> list[str]:
    """The stems that have puzzles, which are the names of the modules here."""
    return sorted(found.name for found in iter_modules(__path__) if not found.name.startswith("_"))


def puzzles_of(stem: str) -> list[Puzzle]:
    """The puzzles of one stem, in the order of its module.

    Raises:
        ValueError: there is no such stem.
    """
    if stem not in stems():
        raise ValueError(f"stem: expected one of {stems()}, got {stem!r}")
    module: ModuleType = import_module(f"gsa_ref.puzzles.{stem}")
    return [value for value in vars(module).values() if isinstance(value, Puzzle)]


def find(name: str) -> Puzzle:
    """The puzzle whose function has that name.

    Raises:
        ValueError: there is none.
    """
    everything = {found.name: found for stem in stems() for found in puzzles_of(stem)}
    if name not in everything:
        raise ValueError(f"name: expected one of {sorted(everything)}, got {name!r}")
    return everything[name]


def check(name: str, function: Callable[..., Any]) -> bool:
    """Try a solution of the puzzle `name`, print the outcome, and return whether it is solved.

    What is printed is "solved" with the number of examples, the smallest example that fails, or "not solved yet" for a
    function that raises NotImplementedError or returns NotImplemented.

    Raises:
        ValueError: there is no such puzzle.
    """
    outcome = find(name).run(function)
    print(outcome.text)
    return outcome.solved
