"""Gates (Eq. 9 and Eq. 10)."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from gsa_ref import apply_gate, equations, sparse_attention
from gsa_ref.cases import DTYPES, Limits, attention_cases, gate_cases
from gsa_ref.check import unit_roundoff
from tests.ref import oracle
from tests.strategies import NUMBERS

ANY = st.sampled_from(tuple(DTYPES)).flatmap(lambda dtype: gate_cases(dtype, Limits()))


@given(ANY)
def test_gated_values_equal_the_equations_up_to_a_few_roundings(case):
    x, gate = case.arguments()
    out = apply_gate(x, gate)
    gold = equations.apply_gate(oracle.array(x), oracle.array(gate))
    assert out.dtype == x.dtype
    # σ and the product are rounded once each; exp and the division inside σ cost a few units more in wide formats.
    # Subnormal σ(gate) lose relative accuracy: `smallest` covers them.
    u, smallest = unit_roundoff(x.dtype), torch.finfo(x.dtype).tiny
    assert (np.abs(oracle.array(out) - gold) <= 8 * u * np.abs(gold) + smallest * (1 + np.abs(oracle.array(x)))).all()


@pytest.mark.property(42)
@given(ANY)
def test_gate_at_plus_infinity_is_the_identity(case):
    x, gate = case.arguments()
    assert torch.equal(apply_gate(x, torch.full_like(gate, math.inf)), x)


@pytest.mark.property(43)
@given(ANY)
def test_gate_at_minus_infinity_gives_exactly_zero(case):
    x, gate = case.arguments()
    assert not apply_gate(x, torch.full_like(gate, -math.inf)).any()


@pytest.mark.property(44)
@given(ANY)
def test_a_gate_never_enlarges(case):
    x, gate = case.arguments()
    assert (apply_gate(x, gate).abs() <= x.abs()).all()


@pytest.mark.property(44)
@given(st.lists(st.tuples(NUMBERS, NUMBERS), min_size=1))
def test_a_gate_enlarges_no_number_and_turns_no_sign(pairs):
    """Of any size, denormals and infinities included. Only ∞ · σ(−∞), with σ = 0 after rounding, is not a number."""
    x, gate_logits = (torch.tensor(column) for column in zip(*pairs, strict=True))
    out = apply_gate(x, gate_logits)
    undefined = out.isnan()
    assert (x.isinf() & (gate_logits < -80))[undefined].all()
    assert (out.abs() <= x.abs())[~undefined].all()
    assert (out * x >= 0)[~undefined].all()


@given(gate_cases("float64", Limits()))
def test_a_gate_keeps_the_sign_and_grows_with_its_logit(case):
    x, gate = case.arguments()
    out, more = apply_gate(x, gate), apply_gate(x, gate + 1)
    assert (out * x >= 0).all()
    assert (more.abs() >= out.abs()).all()
    moving = (x != 0) & (gate.abs() < 30)
    assert (more.abs() > out.abs())[moving].all()


@pytest.mark.property(45)
@given(st.sampled_from(("float32", "float64")).flatmap(lambda dtype: attention_cases(dtype, Limits())))
def test_fused_gates_equal_gates_applied_before_and_after(case):
    """Within rounding: the value gate is applied to gathered values, where the vectorised σ may differ by an ulp."""
    arguments = case.arguments()
    value, output = arguments.pop("value_gate_logits"), arguments.pop("output_gate_logits")
    fused, fused_lse = sparse_attention(**arguments, value_gate_logits=value, output_gate_logits=output)
    if value is not None:
        arguments["v"] = apply_gate(arguments["v"], value)
    out, lse = sparse_attention(**arguments)
    if output is not None:
        out = apply_gate(out, output)
    size = float(arguments["v"].abs().max())
    tolerance = 2 * oracle.attention_tolerance(arguments)[0] + 8 * unit_roundoff(out.dtype) * size
    assert oracle.close(fused, out, tolerance if value is not None else 0.0)
    assert torch.equal(fused_lse, lse)


@given(attention_cases("float64", Limits()))
def test_the_value_gate_belongs_to_the_source_token_and_the_output_gate_to_the_query(case):
    """A closed value gate removes that token from every query; a closed output gate silences that query only."""
    arguments = case.arguments()
    arguments["value_gate_logits"] = torch.full_like(arguments["v"], math.inf)
    arguments["output_gate_logits"] = torch.full_like(arguments["q"], math.inf)
    before, _ = sparse_attention(**arguments)
    arguments["value_gate_logits"][:, -1] = -math.inf
    zeroed = arguments["v"].clone()
    zeroed[:, -1] = 0
    without_source, _ = sparse_attention(**{**arguments, "v": zeroed, "value_gate_logits": None})
    assert torch.equal(sparse_attention(**arguments)[0], without_source)
    arguments["value_gate_logits"] = None
    arguments["output_gate_logits"][:, -1] = -math.inf
    out, _ = sparse_attention(**arguments)
    assert torch.equal(out[:, :-1], before[:, :-1])
    assert not out[:, -1].any()


@pytest.mark.property(9)
@given(ANY)
def test_strided_inputs_equal_contiguous_ones(case):
    """Elementwise, so only the vectorised σ may differ, by an ulp."""
    x, gate = case.arguments()
    strided, plain = apply_gate(x, gate), apply_gate(x.contiguous(), gate.contiguous())
    difference = (strided.double() - plain.double()).abs()
    assert (difference <= 4 * unit_roundoff(x.dtype) * plain.double().abs()).all()


@pytest.mark.property(57)
@given(ANY)
def test_reruns_are_bitwise_equal(case):
    x, gate = case.arguments()
    assert torch.equal(apply_gate(x, gate), apply_gate(x, gate))


@pytest.mark.parametrize("shape", [(), (0,), (3,), (0, 4), (2, 1, 2, 3, 2)])
def test_any_shape_works(shape):
    assert torch.equal(apply_gate(torch.ones(shape), torch.zeros(shape)), torch.full(shape, 0.5))


def test_gate_logits_may_have_another_dtype():
    out = apply_gate(torch.full((3,), 2.0, dtype=torch.bfloat16), torch.zeros(3))
    assert out.dtype == torch.bfloat16
    assert out.tolist() == [1.0, 1.0, 1.0]


@pytest.mark.property(46)
@given(st.integers(0, 2**16))
def test_gradients_match_finite_differences(seed):
    g = torch.Generator().manual_seed(seed)
    x, gate = (torch.randn(2, 3, 4, generator=g, dtype=torch.float64, requires_grad=True) for _ in range(2))
    assert torch.autograd.gradcheck(apply_gate, (x, gate))
