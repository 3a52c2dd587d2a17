"""Kernels run on the GPU if there is one, else in the Triton interpreter with its checks on."""

import os
from collections.abc import Iterator

import pytest
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # before gsa_fast is imported

from gsa_fast.verification.interpreter import enable_interpreter_checks
from tests.interpreter_bf16 import exact_bfloat16

enable_interpreter_checks()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        # NumPy, inside the interpreter, warns where a GPU computes inf and NaN in silence.
        item.add_marker(pytest.mark.filterwarnings("ignore::RuntimeWarning:triton.runtime.interpreter"))
        # PyTorch 2.11 warns about itself while it compiles and profiles.
        item.add_marker(pytest.mark.filterwarnings("ignore:.*torch.jit.script_method.*:DeprecationWarning"))
        item.add_marker(pytest.mark.filterwarnings("ignore:.*Profiler clears events.*:UserWarning"))


@pytest.fixture(scope="session")
def device() -> str:
    """Where the kernels run."""
    return "cuda" if torch.cuda.is_available() else "cpu"


@pytest.fixture
def bf16(device: str) -> Iterator[None]:
    """Exact bfloat16 in the interpreter; a GPU needs no help."""
    if device == "cuda":
        yield
        return
    with exact_bfloat16():
        yield
