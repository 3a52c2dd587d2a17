"""Near misses of puzzles whose solutions are kernels: the stored solution with some of its text replaced.

Triton reads the source of a kernel, so a fault is planted in the text and not in the function.
"""

import linecache
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

from gsa_ref.puzzles import _files

SOLUTIONS = Path(__file__).parents[2] / "notebooks/solutions"


@cache
def sources(stem: str) -> list[str]:
    """The code cells of a solution that define something."""
    (path,) = SOLUTIONS.glob(f"[0-9][0-9]_{stem}.ipynb")
    return [source for source in _files.cells(path) if "check(" not in source and "find(" not in source]


def planted(stem: str, puzzle: str, fault: str, *replacements: tuple[str, str]) -> Callable[..., Any]:
    """The solution of `puzzle`, which the notebook of `stem` has, with pieces of its text replaced."""
    namespace: dict[str, Any] = {"__name__": "__main__"}
    for number, source in enumerate(sources(stem), 1):
        if f"def {puzzle}(" in source:
            for old, new in replacements:
                assert source.count(old) == 1, (puzzle, old)
                source = source.replace(old, new)
        file = f"<{fault} in {puzzle}, cell {number}>"
        linecache.cache[file] = len(source), None, source.splitlines(keepends=True), file
        exec(compile(source, file, "exec"), namespace)
    namespace[puzzle].__name__ = fault
    return namespace[puzzle]


def plant(stem: str, faults: dict[str, dict[str, list[tuple[str, str]]]]) -> dict[str, list[Callable[..., Any]]]:
    """By the name of a puzzle, its faults by name, and what each replaces."""
    return {
        puzzle: [planted(stem, puzzle, fault, *replacements) for fault, replacements in group.items()]
        for puzzle, group in faults.items()
    }
