"""Settings that make faults visible while kernels run: that they are on, and that each fault then shows."""

from typing import Any

import pytest
import torch
import triton
import triton.language as tl
from hypothesis import given
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from gsa_fast.__main__ import main
from gsa_fast._backend import INTERPRETED
from gsa_fast.verification.checks import CHECKS
from gsa_fast.verification.interpreter import poisoned_memory
from gsa_ref.cases import STRATEGIES, GateCase, Limits
from tests.fast.helpers import examples

interpreted = pytest.mark.skipif(not INTERPRETED, reason="of the interpreter: a GPU wraps in silence")


@triton.jit
def multiply_kernel(x_ptr, factor):
    tl.store(x_ptr, tl.load(x_ptr) * factor)


@triton.jit
def add_kernel(x_ptr, addend):
    tl.store(x_ptr, tl.load(x_ptr) + addend)


@triton.jit
def assert_kernel(x_ptr, largest):
    tl.device_assert(tl.load(x_ptr) <= largest, "too large")


@interpreted
@pytest.mark.parametrize(("kernel", "operand"), [(multiply_kernel, 2**16), (add_kernel, 2**31 - 1)])
def test_an_int32_overflow_in_a_kernel_raises(kernel, operand):
    x = torch.tensor([2**15], dtype=torch.int32)
    kernel[(1,)](x, 3)
    with pytest.raises(Exception, match="int32 overflow detected"):
        kernel[(1,)](x, operand)


@interpreted
def test_a_failed_assertion_in_a_kernel_raises():
    x = torch.tensor([5.0])
    assert_kernel[(1,)](x, 5.0)
    with pytest.raises(Exception, match="too large"):
        assert_kernel[(1,)](x, 4.0)


@interpreted
def test_verify_turns_the_checks_of_the_interpreter_on(monkeypatch, capsys):
    from triton.runtime import interpreter

    monkeypatch.setattr(interpreter.interpreter_builder, "options", interpreter.InterpreterOptions())
    case = GateCase(B=1, L=1, heads=1, width=2, dtype="float32", values="normal", layout="contiguous", seed=0)
    assert main(["verify", "--case", case.to_json()]) == 0
    assert interpreter.interpreter_builder.options.debug


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.int32, torch.int64, torch.bool])
def test_poisoned_memory_fills_what_empty_returns(dtype, device):
    with poisoned_memory():
        fresh = [torch.empty(3, 5, dtype=dtype, device=device), torch.empty(4, dtype=dtype, device=device).new_empty(7)]
        fresh.append(torch.empty_like(fresh[0]))
    for x in fresh:
        if dtype.is_floating_point:
            assert x.isnan().all()
        else:
            assert (x == (1 if dtype == torch.bool else torch.iinfo(dtype).max)).all()


def test_poisoned_memory_ends_with_its_block_even_after_an_exception():
    with pytest.raises(RuntimeError, match="inside"), poisoned_memory():
        raise RuntimeError("inside")
    assert not torch.are_deterministic_algorithms_enabled()


class Operators(TorchDispatchMode):
    """Of every call of an operator of gsa_fast: its name, and whether memory was poisoned."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple[str, bool]] = []

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function.namespace == "gsa_fast":
            self.seen.append((str(function), torch.are_deterministic_algorithms_enabled()))
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("stem", CHECKS)
@examples(1)
@given(data=st.data())
def test_every_operator_of_a_check_runs_on_poisoned_memory(stem, data, device):
    case = data.draw(STRATEGIES[stem]("float32", Limits(B=1, L=3, S=6, heads=1, group=2, width=4)))
    with Operators() as operators:
        assert all(CHECKS[stem](case, device))
    assert operators.seen
    assert {poisoned for _, poisoned in operators.seen} == {True}
