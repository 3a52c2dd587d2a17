"""Gate kernel (Eq. 9 and Eq. 10), alone and fused into the attention kernel."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import gsa_fast
from gsa_fast.verification.checks import numpy
from gsa_ref import equations
from gsa_ref.cases import DTYPES as TORCH_DTYPES
from gsa_ref.cases import attention_cases, gate_cases
from gsa_ref.check import gate_tolerance
from tests.fast.helpers import DTYPES, SMALL, assert_in_budget, contiguous, examples, same, widely_strided
from tests.strategies import NUMBERS

CASES = st.sampled_from(("float32", "float16")).flatmap(lambda dtype: gate_cases(dtype, SMALL))


def gate(x: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
    return gsa_fast.apply_gate(x, logits, impl="triton")


def inside_tolerance(out: torch.Tensor, x: torch.Tensor, logits: torch.Tensor, times: int = 1) -> bool:
    gold = equations.apply_gate(numpy(x), numpy(logits))
    return bool((np.abs(numpy(out) - gold) <= times * gate_tolerance(gold, numpy(logits), out.dtype)).all())


@pytest.mark.usefixtures("bf16")
@pytest.mark.parametrize("dtype", DTYPES)
@examples(30)
@given(data=st.data())
def test_gates_kernel_stays_in_its_error_budget(dtype, data, device):
    assert_in_budget(data.draw(gate_cases(dtype, SMALL)), device)


@pytest.mark.property(42)
@examples(30)
@given(CASES)
def test_gate_at_plus_infinity_is_the_identity(device, case):
    """Bitwise."""
    x, logits = case.arguments(device)
    assert same(gate(x, torch.full_like(logits, math.inf)), x)


@pytest.mark.property(43)
@examples(30)
@given(CASES)
def test_gate_at_minus_infinity_gives_exactly_zero(device, case):
    x, logits = case.arguments(device)
    assert not gate(x, torch.full_like(logits, -math.inf)).any()


@pytest.mark.property(44)
@examples(30)
@given(CASES)
def test_a_gate_never_enlarges_and_keeps_the_sign(device, case):
    x, logits = case.arguments(device)
    out = gate(x, logits)
    assert (out.abs() <= x.abs()).all()
    assert (out * x >= 0).all()


@pytest.mark.property(44)
@examples(30)
@given(st.lists(st.tuples(NUMBERS, NUMBERS), min_size=1))
def test_a_gate_enlarges_no_number_and_turns_no_sign(device, pairs):
    """Of any size, denormals and infinities included. Only ∞ · σ(−∞), with σ = 0 after rounding, is not a number."""
    x, gate_logits = (torch.tensor(column, device=device) for column in zip(*pairs, strict=True))
    out = gate(x, gate_logits)
    undefined = out.isnan()
    assert (x.isinf() & (gate_logits < -80))[undefined].all()
    assert (out.abs() <= x.abs())[~undefined].all()
    assert (out * x >= 0)[~undefined].all()


@examples(30)
@given(gate_cases("float32", SMALL))
def test_a_gate_and_its_mirror_share_the_value(device, case):
    """x·σ(g) + x·σ(−g) = x."""
    x, logits = case.arguments(device)
    total = gate(x, logits).double() + gate(x, -logits).double()
    tolerance = sum(
        gate_tolerance(equations.apply_gate(numpy(x), g), g, x.dtype) for g in (numpy(logits), -numpy(logits))
    )
    assert (np.abs(numpy(total) - numpy(x)) <= tolerance).all()


@pytest.mark.property(45)
@examples(20)
@given(attention_cases("float32", SMALL))
def test_fused_output_gate_equals_the_gate_applied_afterwards(device, case):
    """Bitwise in float32, where nothing is rounded in between."""
    arguments = case.arguments(device)
    logits = torch.randn(arguments["q"].shape, generator=case.generator()).to(device)
    arguments["output_gate_logits"] = logits
    fused, fused_lse = gsa_fast.sparse_attention(**arguments, impl="triton")
    out, lse = gsa_fast.sparse_attention(**{**arguments, "output_gate_logits": None}, impl="triton")
    assert same((fused, fused_lse), (gate(out, logits), lse))


@pytest.mark.property(45)
@pytest.mark.usefixtures("bf16")
@pytest.mark.parametrize("dtype", DTYPES[1:])
@examples(10)
@given(data=st.data())
def test_fused_output_gate_equals_the_gate_applied_afterwards_up_to_one_rounding(dtype, data, device):
    """In 16 bits; unfused, o is rounded once more."""
    case = data.draw(attention_cases(dtype, SMALL))
    arguments = case.arguments(device)
    logits = torch.randn(arguments["q"].shape, generator=case.generator()).to(device)
    fused, fused_lse = gsa_fast.sparse_attention(**{**arguments, "output_gate_logits": logits}, impl="triton")
    out, lse = gsa_fast.sparse_attention(**{**arguments, "output_gate_logits": None}, impl="triton")
    assert same(fused_lse, lse)
    assert inside_tolerance(fused, out, logits, times=3)  # u for o, u for the result, and their second order


@pytest.mark.property(45)
@examples(20)
@given(st.sampled_from(("float32", "float16")).flatmap(lambda dtype: attention_cases(dtype, SMALL)))
def test_value_gate_equals_values_gated_before(device, case):
    """Bitwise, the gate of the source token."""
    arguments = case.arguments(device)
    logits = torch.randn(arguments["v"].shape, generator=case.generator()).to(device)
    gated = {**arguments, "v": gate(arguments["v"], logits), "value_gate_logits": None}
    fused = gsa_fast.sparse_attention(**{**arguments, "value_gate_logits": logits}, impl="triton")
    assert same(fused, gsa_fast.sparse_attention(**gated, impl="triton"))


@pytest.mark.property(9)
@examples(30)
@given(CASES)
def test_strided_inputs_equal_contiguous_ones_bitwise(device, case):
    x, logits = case.arguments(device)
    plain = contiguous({"x": x, "logits": logits})
    assert same(gate(x, logits), gate(**plain))
    assert same(gate(plain["x"].mT.contiguous().mT, plain["logits"]), gate(**plain))


@pytest.mark.property(57)
@examples(10)
@given(CASES)
def test_reruns_are_bitwise_equal(device, case):
    x, logits = case.arguments(device)
    assert same(gate(x, logits), gate(x, logits))


@pytest.mark.pitfall("transposed-input")
@pytest.mark.parametrize("shape", [(), (5,), (3, 5), (2, 3, 5), (2, 3, 4, 5), (2, 2, 3, 4, 5), (2, 1, 2, 3, 2, 5)])
@pytest.mark.parametrize("reverse", [False, True])
def test_any_number_of_axes_and_any_strides_work(shape, reverse, device):
    g = torch.Generator().manual_seed(len(shape))
    x, logits = (torch.randn(shape, generator=g).to(device) for _ in range(2))
    if reverse:
        axes = tuple(reversed(range(len(shape))))
        x = x.permute(axes).contiguous().permute(axes)
    out = gate(x, logits)
    assert out.shape == x.shape
    assert inside_tolerance(out, x, logits)


def test_an_expanded_gate_is_read_through_its_zero_strides(device):
    x = torch.randn(2, 3, 4, generator=torch.Generator().manual_seed(0)).to(device)
    logits = x[:, :1, :1].expand_as(x)
    assert same(gate(x, logits), gate(x, logits.contiguous()))


def test_more_elements_than_one_block_are_all_written(device):
    x = torch.arange(1.0, 5002, device=device)
    assert same(gate(x, torch.full_like(x, math.inf)), x)


@pytest.mark.parametrize("x_dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("gate_dtype", [torch.float32, torch.float16])
def test_the_dtype_of_the_gate_may_differ(x_dtype, gate_dtype, device):
    g = torch.Generator().manual_seed(0)
    x, logits = (torch.randn(3, 7, generator=g).to(device, dtype) for dtype in (x_dtype, gate_dtype))
    out = gate(x, logits)
    assert out.dtype == x_dtype
    assert inside_tolerance(out, x, logits)


@pytest.mark.usefixtures("bf16")
@pytest.mark.parametrize("dtype", DTYPES)
def test_every_16_bit_logit_gives_its_sigmoid(dtype, device):
    """All finite logits of float16, so that no range of σ goes untested."""
    logits = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(torch.float16)
    logits = logits[logits.isfinite()].to(device)
    x = torch.ones_like(logits, dtype=TORCH_DTYPES[dtype])
    assert inside_tolerance(gate(x, logits), x, logits)


@pytest.mark.parametrize("logit", [math.nan, math.inf, -math.inf, 0.0, 1e30, -1e30])
def test_nan_and_infinity_propagate_as_in_the_equations(logit, device):
    x = torch.tensor([math.nan, math.inf, -math.inf, 1.0, 0.0], device=device)
    logits = torch.full_like(x, logit)
    with np.errstate(invalid="ignore"):
        gold = equations.apply_gate(numpy(x), numpy(logits))
    np.testing.assert_array_equal(numpy(gate(x, logits)), gold)


@pytest.mark.pitfall("length-zero")
@pytest.mark.parametrize("shape", [(0,), (0, 3, 4), (2, 0, 4), (2, 3, 0), (2, 0, 3, 1, 2)])
def test_empty_axes_give_empty_outputs(shape, device):
    x = torch.ones(shape, device=device)
    assert same(gate(x, x), x)


@pytest.mark.pitfall("large-batch")
def test_ten_thousand_sequences_in_a_batch(device):
    x = torch.arange(20_000.0, device=device).reshape(10_000, 1, 1, 2)
    assert same(gate(x, torch.zeros_like(x)), x / 2)


@pytest.mark.pitfall("int32-strides")
@pytest.mark.parametrize("operand", [0, 1])
@pytest.mark.parametrize("axis", [0, 1, 2, 3])
def test_strides_past_two_to_the_31_do_not_wrap(operand, axis, device):
    """Offsets are 64-bit along every axis."""
    g = torch.Generator().manual_seed(axis)
    operands = [torch.randn(3, 3, 3, 3, generator=g).to(device, torch.float16) for _ in range(2)]
    expected = gate(*operands)
    operands[operand] = widely_strided((3, 3, 3, 3), axis, device).copy_(operands[operand])
    assert same(gate(*operands), expected)
