"""Puzzles that turn the tables: the learner writes the check, and implementations with and without faults try it."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from hypothesis import strategies as st

from gsa_ref.puzzles._checker import RAISED, UNSOLVED, Example, Outcome, Puzzle


@dataclass(frozen=True)
class Hunt(Puzzle):
    """The learner's function takes an implementation and returns whether it may be trusted.

    An exception counts as a no, so that a property may assert; of a right implementation it is told.

    Attributes:
        right: implementations that must be trusted. They may differ in whatever the contract leaves open.
        faulty: implementations with one fault each. Which one survives is not told.
    """

    right: Sequence[Callable[..., Any]]
    faulty: Sequence[Callable[..., Any]]

    def run(self, function: Callable[..., Any]) -> Outcome:
        """Try a property on all implementations."""
        for implementation in self.right:
            got, problem = self._call(function, Example({"implementation": implementation}, True, judge=lambda got: ""))
            if problem == UNSOLVED:
                return Outcome(False, UNSOLVED)
            if problem:
                return Outcome(False, f"wrong: of a right implementation, {problem}")
            if not got:
                return Outcome(False, "wrong: it does not trust a right implementation")
        survivors = 0
        for implementation in self.faulty:
            got, _ = self._call(function, Example({"implementation": implementation}, False, judge=lambda got: ""))
            survivors += got is not RAISED and bool(got)
        if survivors:
            return Outcome(False, f"wrong: {survivors} of {len(self.faulty)} faults survive")
        n = len(self.right) + len(self.faulty)
        return Outcome(True, f"solved: {n} examples, compared with {self.oracle}")


def hunt(name: str, right: Sequence[Callable[..., Any]], faulty: Sequence[Callable[..., Any]]) -> Hunt:
    """A hunt, under the name of the function that the learner writes."""
    return Hunt(
        name,
        f"{len(right)} right implementations and {len(faulty)} with a fault",
        st.nothing(),
        lambda drawn: drawn,
        0,
        "ignore",
        right,
        faulty,
    )
