"""Puzzles whose solutions are kernels, and what kernels do while Triton's interpreter runs them.

Triton is imported when a puzzle is tried, not before: whoever tries one wrote a kernel, and the rest of `gsa_ref` works
without Triton. The faults that the interpreter can raise for (`gsa_fast.verification.interpreter`) are switched on by
the notebooks, because nothing here imports `gsa_fast`.
"""

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any
from unittest import mock

import torch

from gsa_ref.puzzles._checker import Example, Puzzle, puzzle

NO_KERNEL = "right, but no kernel computes it"


class KernelPuzzle(Puzzle):
    """The comparison, in memory full of NaN: an element that a kernel forgets to write shows."""

    def _call(self, function: Callable[..., Any], example: Example) -> tuple[Any, str]:
        with _poisoned_memory():
            return super()._call(function, example)


# NumPy, which the interpreter computes with, warns where a GPU would give inf or NaN in silence.
kernel_puzzle = partial(puzzle, warnings="ignore", kind=KernelPuzzle)


@contextmanager
def _poisoned_memory() -> Iterator[None]:
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])


@dataclass
class Work:
    """What kernels did, by the number of a launch and of its program."""

    bytes_loaded: Counter[tuple[int, ...]] = field(default_factory=Counter)
    divisions: Counter[tuple[int, ...]] = field(default_factory=Counter)  # of a tile each, whatever its size


@contextmanager
def watched() -> Iterator[Work]:
    """Count what kernels load and divide meanwhile. A request counts, whether a cache would serve it or not."""
    from triton.runtime.interpreter import InterpreterBuilder

    work, launches = Work(), 0
    set_grid_dim, load = InterpreterBuilder.set_grid_dim, InterpreterBuilder.create_masked_load

    def launch(self: Any, *sizes: int) -> None:
        nonlocal launches
        launches += 1
        set_grid_dim(self, *sizes)

    def counted_load(self: Any, pointers: Any, mask: Any, *rest: Any) -> Any:
        width = max(1, pointers.get_element_ty().primitive_bitwidth // 8)
        work.bytes_loaded[launches, *self.grid_idx] += int(mask.data.sum()) * width
        return load(self, pointers, mask, *rest)

    def counted_divide(divide: Any) -> Any:
        def count(self: Any, *operands: Any) -> Any:
            work.divisions[launches, *self.grid_idx] += 1
            return divide(self, *operands)

        return count

    divides = {
        name: counted_divide(getattr(InterpreterBuilder, name)) for name in ("create_fdiv", "create_precise_divf")
    }
    with mock.patch.multiple(InterpreterBuilder, set_grid_dim=launch, create_masked_load=counted_load, **divides):
        yield work


@contextmanager
def programs_reversed() -> Iterator[None]:
    """Run the programs of every launch from the last to the first."""
    from triton.runtime.interpreter import InterpreterBuilder

    set_grid_idx = InterpreterBuilder.set_grid_idx

    def mirrored(self: Any, *program: int) -> None:
        set_grid_idx(self, *(n - 1 - i for i, n in zip(program, self.grid_dim, strict=True)))

    with mock.patch.object(InterpreterBuilder, "set_grid_idx", mirrored):
        yield
