"""Near misses of the puzzles, most of them the mistakes that their notebooks warn of: a checker must refuse every one.

A module for each stem, with its functions by the name of the puzzle.
"""

import os
from collections.abc import Callable
from importlib import import_module
from typing import Any

import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # before Triton is imported, as in tests/fast/conftest.py

Wrong = dict[str, list[Callable[..., Any]]]


def wrong_solutions(stem: str) -> Wrong:
    """The wrong solutions of a stem's puzzles."""
    return import_module(f"tests.wrong_solutions.{stem}").WRONG
