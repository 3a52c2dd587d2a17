"""Sparse scaled dot-product attention, and the dense attention it is compared with."""

import dataclasses
import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn.functional import scaled_dot_product_attention

from gsa_ref import Selection, dense_attention, equations, select_tokens, sparse_attention
from gsa_ref.cases import AttentionCase, Limits, attention_cases, random_selection
from gsa_ref.check import gamma, unit_roundoff
from tests.ref import oracle
from tests.ref.oracle import close
from tests.strategies import SEEDS

FACTORS = st.sampled_from((-3.7, -1.0, 0.0, 0.3, 2.5))
CASES = attention_cases("float32", Limits(B=3))
CASES64 = attention_cases("float64", Limits(B=3))
BOTH = st.one_of(CASES, CASES64)
PLAIN64 = CASES64.map(lambda case: dataclasses.replace(case, value_gate=False, output_gate=False))


def int32(values: Any) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int32)


def filled(case: AttentionCase, selection: Selection) -> torch.Tensor:
    """Bool [B, L, S]: the selected positions, written with loops."""
    mask = torch.zeros(case.B, case.L, case.S, dtype=torch.bool)
    for b in range(case.B):
        for t, row in enumerate(oracle.selected(selection, b, case.S, case.S - case.L)):
            mask[b, t, row] = True
    return mask


def full(B: int, L: int, S: int) -> Selection:
    return random_selection("full", B, L, S, S, torch.Generator())


@given(BOTH)
def test_output_and_lse_equal_the_equations(case):
    arguments = case.arguments()
    (out, lse), (gold_out, gold_lse) = sparse_attention(**arguments), oracle.sparse_attention(arguments)
    out_tolerance, lse_tolerance = oracle.attention_tolerance(arguments)
    assert out.dtype == lse.dtype == arguments["q"].dtype
    assert close(out, gold_out, out_tolerance)
    assert close(lse, gold_lse, lse_tolerance)


@given(st.sampled_from(("float16", "bfloat16")).flatmap(lambda dtype: attention_cases(dtype, Limits(width=16))))
def test_sixteen_bit_inputs_give_sixteen_bit_outputs_and_a_float32_lse(case):
    arguments = case.arguments()
    (out, lse), (gold_out, gold_lse) = sparse_attention(**arguments), oracle.sparse_attention(arguments)
    u = unit_roundoff(arguments["q"].dtype)
    # Products add up in float32 and are rounded once; the scale, p, the result and the gates round once or twice more.
    q, k = arguments["q"].double(), arguments["k"].double().repeat_interleave(case.group, 2)
    logit = float(torch.einsum("blhd,bshd->blhs", q, k).abs().max()) * case.d_h**-0.5
    assert (out.dtype, lse.dtype) == (arguments["q"].dtype, torch.float32)
    assert close(out, gold_out, (4 * logit * u + 8 * u) * float(arguments["v"].abs().max()))
    assert close(lse, gold_lse, (logit + 1) * 2 * u)


@given(CASES64, st.floats(0.01, 2))
def test_scale_is_a_factor_on_the_logits(case, scale):
    arguments = case.arguments()
    (out, lse), (gold_out, gold_lse) = (
        sparse_attention(**arguments, scale=scale),
        oracle.sparse_attention(arguments, scale=scale),
    )
    out_tolerance, lse_tolerance = oracle.attention_tolerance(arguments, scale)
    assert close(out, gold_out, out_tolerance)
    assert close(lse, gold_lse, lse_tolerance)


@pytest.mark.property(30)
@given(PLAIN64)
def test_a_budget_of_everything_equals_dense_causal_attention(case):
    """Against PyTorch's own SDPA."""
    arguments = case.arguments()
    arguments["selection"] = full(case.B, case.L, case.S)
    q, k, v = (arguments[name].transpose(1, 2) for name in ("q", "k", "v"))
    causal = torch.ones(case.L, case.S, dtype=torch.bool).tril(case.S - case.L)
    expected = scaled_dot_product_attention(q, k, v, attn_mask=causal, enable_gqa=True).transpose(1, 2)
    tolerance = 2 * oracle.attention_tolerance(arguments)[0]
    assert close(sparse_attention(**arguments)[0], expected, tolerance)
    dense = dense_attention(arguments["q"], arguments["k"], arguments["v"], start=case.S - case.L)
    assert close(dense, expected, tolerance)


@given(PLAIN64)
def test_any_selection_equals_masked_dense_attention(case):
    """The selection as a bool mask for PyTorch's SDPA; rows without a key are compared elsewhere."""
    arguments = case.arguments()
    mask = filled(case, arguments["selection"])
    rows = mask.any(-1)
    q, k, v = (arguments[name].transpose(1, 2) for name in ("q", "k", "v"))
    expected = scaled_dot_product_attention(q, k, v, attn_mask=mask[:, None], enable_gqa=True).transpose(1, 2)
    out, _ = sparse_attention(**arguments)
    assert close(out[rows], expected[rows], 2 * oracle.attention_tolerance(arguments)[0])


@pytest.mark.property(31)
@given(PLAIN64)
def test_output_stays_inside_the_range_of_the_selected_values(case):
    """Per channel."""
    arguments = case.arguments()
    out, _ = sparse_attention(**arguments)
    v = arguments["v"].repeat_interleave(case.group, 2)[:, None]  # [B, 1, S, H, d_h]
    mask = filled(case, arguments["selection"])[..., None, None]
    low, high = v.masked_fill(~mask, math.inf).amin(2), v.masked_fill(~mask, -math.inf).amax(2)
    rows, slack = mask.any(2)[..., 0, 0], oracle.attention_tolerance(arguments)[0]
    assert ((low - slack <= out) & (out <= high + slack))[rows].all()


@pytest.mark.property(32)
@given(PLAIN64, FACTORS)
def test_equal_values_come_out_unchanged(case, value):
    """The probabilities of a row add up to 1."""
    arguments = case.arguments()
    arguments["v"] = torch.full_like(arguments["v"], value)
    rows = filled(case, arguments["selection"]).any(-1)
    out, _ = sparse_attention(**arguments)
    assert ((out - value).abs()[rows] <= gamma(2 * case.width + 8, 2.0**-53) * abs(value)).all()


@pytest.mark.property(33)
@given(CASES64, SEEDS)
def test_the_order_of_the_slots_changes_nothing(case, seed):
    """The contract wants ascending slots; the reference does not need it."""
    arguments = case.arguments()
    selection = arguments["selection"]
    key = torch.rand(selection.indices.shape, generator=torch.Generator().manual_seed(seed))
    key[torch.arange(case.width) >= selection.counts[..., None]] = 2  # the tail stays behind
    shuffled = {**arguments, "selection": Selection(selection.indices.gather(-1, key.argsort(-1)), selection.counts)}
    out_tolerance, lse_tolerance = oracle.attention_tolerance(arguments)
    (out, lse), (expected_out, expected_lse) = sparse_attention(**shuffled), sparse_attention(**arguments)
    assert close(out, expected_out, 2 * out_tolerance)
    assert close(lse, expected_lse, 2 * lse_tolerance)


@pytest.mark.property(34)
@given(BOTH, st.sampled_from((-2.0, 0.5, 4.0)))
def test_a_factor_on_q_cancels_its_inverse_on_the_scale(case, a):
    """Bitwise, because a is a power of two."""
    arguments = case.arguments()
    plain = sparse_attention(**arguments, scale=0.25)
    scaled = sparse_attention(**{**arguments, "q": arguments["q"] * a}, scale=0.25 / a)
    assert torch.equal(plain[0], scaled[0])
    assert torch.equal(plain[1], scaled[1])


@pytest.mark.property(35)
@given(PLAIN64, st.data())
def test_two_parts_of_a_selection_merge_by_their_lse(case, data):
    """out = Σ_i e^(lse_i − lse) out_i, the rule that split decoding relies on."""
    arguments = case.arguments()
    (whole, whole_lse), (indices, counts) = sparse_attention(**arguments), arguments["selection"]
    cut = data.draw(st.integers(0, case.width))
    first = Selection(indices, counts.clamp(max=cut))
    second = Selection(indices[..., cut:], (counts - cut).clamp(min=0))
    parts = [sparse_attention(**{**arguments, "selection": part}) for part in (first, second)]
    lse = torch.logaddexp(parts[0][1], parts[1][1])
    merged = sum(out * (part_lse - lse).exp().nan_to_num(0)[..., None] for out, part_lse in parts)
    out_tolerance, lse_tolerance = oracle.attention_tolerance(arguments)
    assert close(lse, whole_lse, 3 * lse_tolerance)
    assert close(merged, whole, 3 * out_tolerance + 2 * lse_tolerance * float(arguments["v"].abs().max()))


@pytest.mark.property(36)
@given(PLAIN64, FACTORS, FACTORS)
def test_output_is_linear_in_the_values(case, a, b):
    arguments = case.arguments()
    v = arguments["v"], arguments["v"].flip(1) + 1
    outs = [sparse_attention(**{**arguments, "v": x})[0] for x in v]
    mixed = {**arguments, "v": a * v[0] + b * v[1]}
    magnitude = {**arguments, "v": abs(a) * v[0].abs() + abs(b) * v[1].abs()}
    tolerance = 3 * oracle.attention_tolerance(magnitude)[0]
    assert close(sparse_attention(**mixed)[0], a * outs[0] + b * outs[1], tolerance)


@pytest.mark.property(37)
@given(BOTH, st.sampled_from((math.nan, math.inf, -math.inf)))
def test_nan_in_unselected_keys_and_values_changes_nothing(case, poison):
    """Bitwise."""
    arguments = oracle.contiguous(case.arguments())
    out, lse = sparse_attention(**arguments)
    for b in range(case.B):
        poisoned = {
            name: arguments[name].clone() for name in ("k", "v", "value_gate_logits") if arguments[name] is not None
        }
        unselected = ~filled(case, arguments["selection"])[b].any(0)
        for tensor in poisoned.values():
            tensor[b, unselected] = poison
        after = sparse_attention(**{**arguments, **poisoned})
        assert torch.equal(out, after[0])
        assert torch.equal(lse, after[1])


@pytest.mark.property(37)
@given(BOTH, st.data())
def test_nan_in_a_selected_value_reaches_exactly_the_queries_that_selected_it(case, data):
    """The other half of the property: what is selected does count."""
    arguments = case.arguments()
    b, s = data.draw(st.integers(0, case.B - 1)), data.draw(st.integers(0, case.S - 1))
    arguments["v"] = arguments["v"].clone()
    arguments["v"][b, s] = math.nan
    out, lse = sparse_attention(**arguments)
    expected = torch.zeros(case.B, case.L, dtype=torch.bool)
    expected[b] = filled(case, arguments["selection"])[b, :, s]
    assert torch.equal(out.isnan().all(-1).all(-1), expected)
    assert torch.equal(out.isnan().any(-1).any(-1), expected)
    assert not lse.isnan().any()


@pytest.mark.property(38)
@pytest.mark.pitfall("group-sizes")
@given(PLAIN64)
def test_grouped_heads_equal_repeated_key_value_heads(case):
    """Query head h reads key/value head ⌊h / group⌋."""
    arguments = case.arguments()
    repeated = {name: arguments[name].repeat_interleave(case.group, 2) for name in ("k", "v")}
    out_tolerance, lse_tolerance = oracle.attention_tolerance(arguments)
    (out, lse), (expected_out, expected_lse) = (
        sparse_attention(**arguments),
        sparse_attention(**{**arguments, **repeated}),
    )
    assert close(out, expected_out, 2 * out_tolerance)
    assert close(lse, expected_lse, 2 * lse_tolerance)


@pytest.mark.property(39)
@given(BOTH, SEEDS)
def test_one_slot_gives_that_value_and_its_logit(case, seed):
    """The value exactly, because softmax of one number is 1."""
    arguments = case.arguments()
    arguments.update(value_gate_logits=None, output_gate_logits=None)
    position = torch.arange(case.L) + case.S - case.L
    index = (torch.rand(case.B, case.L, generator=torch.Generator().manual_seed(seed)) * (position + 1)).long()
    arguments["selection"] = Selection(index[..., None].int(), torch.ones_like(index).int())
    out, lse = sparse_attention(**arguments)
    row = torch.arange(case.B)[:, None]
    k, v = (arguments[name].repeat_interleave(case.group, 2)[row, index] for name in ("k", "v"))
    logits = (arguments["q"].double() * k.double()).sum(-1) * case.d_h**-0.5
    assert torch.equal(out, v)
    assert close(lse, logits, oracle.attention_tolerance(arguments)[1])


@pytest.mark.property(40)
@pytest.mark.pitfall("rows-without-a-key")
@given(BOTH)
def test_an_empty_row_gives_zero_and_minus_infinity(case):
    """Exactly, and nothing else gives it."""
    arguments = case.arguments()
    empty = ~filled(case, arguments["selection"]).any(-1)
    out, lse = sparse_attention(**arguments)
    assert not out[empty].any()
    assert torch.equal(lse == -math.inf, empty[..., None].expand_as(lse))


@pytest.mark.property(41)
@given(PLAIN64)
def test_a_shift_of_all_keys_leaves_the_output_and_shifts_lse(case):
    """lse moves by scale·q·c."""
    arguments = case.arguments()
    c = torch.linspace(-1, 1, case.d_h, dtype=torch.float64)
    shifted = {**arguments, "k": arguments["k"] + c}
    out_tolerance, lse_tolerance = oracle.attention_tolerance({**arguments, "k": arguments["k"].abs() + 1})
    (out, lse), (after, after_lse) = sparse_attention(**arguments), sparse_attention(**shifted)
    assert close(after, out, 2 * out_tolerance)
    assert close(after_lse, lse + case.d_h**-0.5 * (arguments["q"] @ c), 3 * lse_tolerance)


@pytest.mark.pitfall("minus-one-in-prefix")
@given(attention_cases("float64", Limits(B=3)).map(lambda case: dataclasses.replace(case, pattern="holes")))
def test_minus_one_and_future_positions_inside_the_prefix_are_empty_slots(case):
    """The selection without them gives the same; a kernel that stops at the first −1 loses the slots behind it."""
    arguments = case.arguments()
    kept = [oracle.selected(arguments["selection"], b, case.S, case.S - case.L) for b in range(case.B)]
    indices = torch.full((case.B, case.L, case.width), -1, dtype=torch.int32)
    counts = torch.zeros(case.B, case.L, dtype=torch.int32)
    for b, rows in enumerate(kept):
        for t, row in enumerate(rows):
            indices[b, t, : len(row)], counts[b, t] = torch.from_numpy(row), len(row)
    compact = {**arguments, "selection": Selection(indices, counts)}
    out_tolerance, lse_tolerance = oracle.attention_tolerance(arguments)
    (out, lse), (expected_out, expected_lse) = sparse_attention(**arguments), sparse_attention(**compact)
    assert close(out, expected_out, 2 * out_tolerance)
    assert close(lse, expected_lse, 2 * lse_tolerance)


@pytest.mark.pitfall("empty-first-tile")
@pytest.mark.parametrize("slots", [[-1, 0, 2], [-1, -1, 1], [2**31 - 1, 1, -(2**31)], [3, 3, 0]])
def test_slots_before_the_first_legal_one_may_be_empty(slots):
    """A fully masked first tile: the running maximum is still −∞ when the first logit comes."""
    q, k, v = torch.ones(1, 3, 1, 2), torch.ones(1, 3, 1, 2), torch.arange(6.0).reshape(1, 3, 1, 2)
    selection = Selection(int32([[[-1] * 3, [-1] * 3, slots]]), int32([[0, 0, 3]]))
    legal = [s for s in slots if 0 <= s <= 2]
    out, lse = sparse_attention(q, k, v, selection, scale=1.0)
    assert torch.allclose(out[0, 2, 0], v[0, legal, 0].mean(0), rtol=4 * 2.0**-24, atol=0)
    assert math.isclose(float(lse[0, 2]), 2 + math.log(len(legal)), rel_tol=4 * 2.0**-24)


@given(BOTH, st.integers(-5, 60))
def test_slots_at_or_past_the_count_are_ignored_whatever_they_hold(case, junk):
    arguments = case.arguments()
    indices, counts = arguments["selection"]
    junked = indices.masked_fill(torch.arange(case.width) >= counts[..., None], junk)
    before, after = (
        sparse_attention(**arguments),
        sparse_attention(**{**arguments, "selection": Selection(junked, counts)}),
    )
    assert torch.equal(before[0], after[0])
    assert torch.equal(before[1], after[1])


@given(BOTH)
def test_queries_are_the_last_positions_unless_start_says_otherwise(case):
    arguments = case.arguments()
    default = sparse_attention(**arguments)
    starts = case.S - case.L, torch.full((case.B,), case.S - case.L, dtype=torch.int32)
    for start in starts:
        explicit = sparse_attention(**arguments, start=start)
        assert torch.equal(default[0], explicit[0])
        assert torch.equal(default[1], explicit[1])


@given(CASES64)
def test_every_sequence_has_its_own_start(case):
    arguments = case.arguments()
    arguments["start"] = torch.arange(case.B, dtype=torch.int32)
    (out, lse), (gold_out, gold_lse) = sparse_attention(**arguments), oracle.sparse_attention(arguments)
    out_tolerance, lse_tolerance = oracle.attention_tolerance(arguments)
    assert close(out, gold_out, out_tolerance)
    assert close(lse, gold_lse, lse_tolerance)


@pytest.mark.property(5)
@given(BOTH, st.data(), st.sampled_from((1.0, math.nan)))
def test_future_perturbation_leaves_earlier_rows_bitwise_equal(case, data, noise):
    """Also where a selection names future positions: they are empty slots."""
    arguments = oracle.contiguous(case.arguments())
    t = data.draw(st.integers(0, case.L))
    indices, counts = arguments["selection"]
    own = torch.arange(case.L)[:, None] + case.S - case.L
    ahead = data.draw(st.integers(0, case.L))
    arguments["selection"] = Selection((indices + (indices == own) * ahead).int(), counts)
    changed = {name: arguments[name].clone() for name in ("q", "k", "v")}
    for name, x in changed.items():
        x[:, t if name == "q" else case.S - case.L + t :] += noise
    before, after = sparse_attention(**arguments), sparse_attention(**{**arguments, **changed})
    for x, y in zip(before, after, strict=True):
        assert torch.equal(x[:, :t], y[:, :t])


@pytest.mark.property(6)
@given(BOTH)
def test_a_batch_slice_does_not_see_its_neighbours(case):
    """Bitwise when only the neighbours' values change, within rounding when they are gone."""
    arguments = oracle.contiguous(case.arguments())
    out, _ = sparse_attention(**arguments)
    tolerance = 2 * oracle.attention_tolerance(arguments)[0]
    for b in range(case.B):
        others = {name: arguments[name].clone() for name in ("q", "k", "v")}
        for tensor in others.values():
            kept = tensor[b].clone()
            tensor.fill_(math.nan)
            tensor[b] = kept
        assert torch.equal(sparse_attention(**{**arguments, **others})[0][b], out[b])
        assert close(sparse_attention(**oracle.alone(arguments, b))[0][0], out[b], tolerance)


@pytest.mark.property(9)
@given(BOTH)
def test_strided_inputs_equal_contiguous_ones(case):
    """Values within rounding, because a transposed product may add in another order."""
    arguments = case.arguments()
    (out, lse), (plain_out, plain_lse) = sparse_attention(**arguments), sparse_attention(**oracle.contiguous(arguments))
    out_tolerance, lse_tolerance = oracle.attention_tolerance(arguments)
    assert close(out, plain_out, 2 * out_tolerance)
    assert close(lse, plain_lse, 2 * lse_tolerance)


@pytest.mark.pitfall("transposed-input")
@pytest.mark.property(9)
@given(BOTH)
def test_transposed_inputs_are_read_by_their_strides(case):
    """Tensors stored [batch, heads, length, width], as most libraries have them."""
    arguments = oracle.contiguous(case.arguments())
    transposed = {n: arguments[n].transpose(1, 2).contiguous().transpose(1, 2) for n in ("q", "k", "v")}
    tolerance = 2 * oracle.attention_tolerance(arguments)[0]
    assert close(sparse_attention(**{**arguments, **transposed})[0], sparse_attention(**arguments)[0], tolerance)


@pytest.mark.property(57)
@given(BOTH)
def test_reruns_are_bitwise_equal(case):
    arguments = case.arguments()
    (out, lse), (again, lse_again) = sparse_attention(**arguments), sparse_attention(**arguments)
    assert torch.equal(out, again)
    assert torch.equal(lse, lse_again)


@pytest.mark.pitfall("length-zero")
@pytest.mark.parametrize(("B", "L", "S", "K"), [(0, 3, 4, 2), (2, 0, 4, 2), (2, 3, 0, 2), (2, 3, 4, 0), (0, 0, 0, 0)])
def test_empty_axes_give_empty_rows(B, L, S, K):
    q, k = torch.ones(B, L, 4, 2), torch.ones(B, S, 2, 2)
    selection = Selection(torch.zeros(B, L, K, dtype=torch.int32), torch.full((B, L), K, dtype=torch.int32))
    out, lse = sparse_attention(q, k, k, selection, start=0)
    assert (out.shape, lse.shape) == ((B, L, 4, 2), (B, L, 4))
    if S == 0 or K == 0:
        assert not out.any()
        assert (lse == -math.inf).all()
    assert dense_attention(q, k, k).shape == (B, L, 4, 2)


@pytest.mark.pitfall("large-batch")
def test_ten_thousand_sequences_in_a_batch():
    v = torch.arange(20_000.0).reshape(10_000, 2, 1, 1)
    selection = Selection(torch.ones(10_000, 1, 1, dtype=torch.int32), torch.ones(10_000, 1, dtype=torch.int32))
    out, _ = sparse_attention(torch.ones(10_000, 1, 1, 1), torch.ones_like(v), v, selection)
    assert torch.equal(out, v[:, 1:])


# --- dense_attention ----------------------------------------------------------------------------------------------


def test_a_row_that_sees_nothing_is_zero_whatever_the_values_hold():
    """Beside a sequence whose rows do see something."""
    q, k, v = torch.ones(2, 3, 2, 4), torch.ones(2, 3, 2, 4), torch.ones(2, 3, 2, 4)
    v[0] = math.nan
    out = dense_attention(q, k, v, lengths=int32([0, 3]))
    assert torch.equal(out, torch.tensor([0.0, 1.0])[:, None, None, None].expand_as(out))


@given(PLAIN64, st.data())
def test_dense_attention_equals_the_equations(case, data):
    """With a start and a length per sequence; a row past its length gives 0."""
    arguments = case.arguments()
    q, k, v = (arguments[name] for name in ("q", "k", "v"))
    lengths = [data.draw(st.integers(0, case.S)) for _ in range(case.B)]
    starts = [data.draw(st.integers(0, case.S - case.L)) for _ in range(case.B)]
    out = dense_attention(q, k, v, start=int32(starts), lengths=int32(lengths))
    arguments["selection"] = full(case.B, case.L, case.S)
    for b, (start, length) in enumerate(zip(starts, lengths, strict=True)):
        gold = equations.dense_attention(*(oracle.array(x[b]) for x in (q, k[:, :length], v[:, :length])), start=start)
        gold[max(length - start, 0) :] = 0
        assert close(out[b], gold, 2 * oracle.attention_tolerance(arguments)[0])


# --- gradients ----------------------------------------------------------------------------------------------------


def small_problem(seed: int, gates: bool) -> tuple[Selection, list[torch.Tensor]]:
    """B = 2, L = 4, S = 5, H = 2, H_kv = 1, d_h = 3; query 0 of every sequence is empty, and slots have holes."""
    g = torch.Generator().manual_seed(seed)
    shapes = [(2, 4, 2, 3), (2, 5, 1, 3), (2, 5, 1, 3)] + ([(2, 5, 1, 3), (2, 4, 2, 3)] if gates else [])
    inputs = [torch.randn(shape, generator=g, dtype=torch.float64, requires_grad=True) for shape in shapes]
    rows = [[-1, -1, -1], [0, 2, -1], [-1, 1, 3], [2, 3, 4]]
    return Selection(int32([rows, rows]), int32([[0, 2, 3, 3]] * 2)), inputs


def attend(selection: Selection, inputs: Any) -> tuple[torch.Tensor, torch.Tensor]:
    q, k, v, *gates = inputs
    names = ("value_gate_logits", "output_gate_logits")
    return sparse_attention(q, k, v, selection, **dict(zip(names, gates, strict=False)))


@pytest.mark.property(46)
@given(SEEDS, st.booleans())
def test_gradients_match_finite_differences(seed, gates):
    """Of the output and of lse, for every input; rows without a key included."""
    selection, inputs = small_problem(seed, gates)

    def function(*inputs: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        out, lse = attend(selection, inputs)
        return out, lse[:, 1:]  # lse of an empty row is the constant −∞

    assert torch.autograd.gradcheck(function, inputs, fast_mode=True)


@pytest.mark.pitfall("nan-in-the-backward-pass")
@given(CASES64)
def test_gradients_are_finite_and_empty_rows_get_none(case):
    arguments = case.arguments()
    leaves = {n: x.clone().requires_grad_() for n, x in arguments.items() if isinstance(x, torch.Tensor)}
    with torch.autograd.set_detect_anomaly(True):  # no NaN on the way either
        out, lse = sparse_attention(**{**arguments, **leaves})
        (out.sum() + lse[lse > -math.inf].sum()).backward()
    assert all(leaf.grad.isfinite().all() for leaf in leaves.values())
    empty = ~filled(case, arguments["selection"]).any(-1)
    assert not leaves["q"].grad[empty].any()


@pytest.mark.property(37)
@pytest.mark.pitfall("nan-in-the-backward-pass")
@given(CASES64)
def test_nan_in_unselected_keys_and_values_reaches_no_gradient(case):
    """Gates included."""
    arguments = oracle.contiguous(case.arguments())
    unselected = ~filled(case, arguments["selection"]).any(1)
    gradients = []
    for poison in (0.0, math.nan):
        inputs = {name: x.clone() for name, x in arguments.items() if isinstance(x, torch.Tensor)}
        for name in ("k", "v", "value_gate_logits") if case.value_gate else ("k", "v"):
            inputs[name][unselected] = poison
        leaves = [x.requires_grad_() for x in inputs.values()]
        out, lse = sparse_attention(**{**arguments, **inputs})
        gradients.append(torch.autograd.grad(out.sum() + lse[lse > -math.inf].sum(), leaves))
    assert all(torch.equal(clean, poisoned) for clean, poisoned in zip(*gradients, strict=True))


@pytest.mark.property(48)
@given(SEEDS, FACTORS, FACTORS)
def test_the_backward_pass_is_linear_in_its_input(seed, a, b):
    """A zero gradient of the output gives exactly zero."""
    selection, inputs = small_problem(seed, gates=True)
    out, _ = attend(selection, inputs)
    g = torch.Generator().manual_seed(seed + 1)
    first, second = (torch.randn(out.shape, generator=g, dtype=torch.float64) for _ in range(2))

    def backward(do: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return torch.autograd.grad(out, inputs, do, retain_graph=True)

    parts = zip(backward(a * first + b * second), backward(first), backward(second), strict=True)
    for mixed, x, y in parts:
        budget = gamma(256, 2.0**-53) * 8 * (x.abs().max() + y.abs().max())
        assert ((mixed - (a * x + b * y)).abs() <= budget).all()
    assert not any(gradient.any() for gradient in backward(torch.zeros_like(out)))


@pytest.mark.property(49)
@given(CASES64)
def test_never_selected_keys_and_values_get_exactly_no_gradient(case):
    """Selected values do get one."""
    arguments = case.arguments()
    k, v = (arguments[name].clone().requires_grad_() for name in ("k", "v"))
    out, lse = sparse_attention(**{**arguments, "k": k, "v": v})
    (out.sum() + lse[lse > -math.inf].sum()).backward()
    selected = filled(case, arguments["selection"]).any(1)
    assert not k.grad[~selected].any()
    assert not v.grad[~selected].any()
    assert v.grad[selected].flatten(1).any(1).all()


@pytest.mark.property(50)
@given(SEEDS)
def test_the_gradient_of_the_logits_of_a_row_adds_up_to_that_of_lse(seed):
    """A common shift of a row's logits moves lse by as much, and the output not at all.

    All keys are one-hot in a channel of their own here, so that ∂/∂q[t, s] is ∂/∂S[t, s].
    """
    g = torch.Generator().manual_seed(seed)
    q = torch.randn(1, 4, 1, 4, generator=g, dtype=torch.float64, requires_grad=True)
    k = torch.eye(4, dtype=torch.float64)[None, :, None]
    v, do = (torch.randn(1, 4, 1, 4, generator=g, dtype=torch.float64) for _ in range(2))
    out, lse = sparse_attention(q, k, v, full(1, 4, 4), scale=1.0)
    dlse = torch.randn(lse.shape, generator=g, dtype=torch.float64)
    budget = gamma(64, 2.0**-53) * 8 * float(do.abs().max() * v.abs().max() * 4 + 1)
    for used, expected in ((dlse, dlse), (torch.zeros_like(dlse), torch.zeros_like(dlse))):
        (gradient,) = torch.autograd.grad((out, lse), q, (do, used), retain_graph=True)
        assert close(gradient.sum(-1), expected, budget)


@pytest.mark.property(51)
def test_no_gradient_flows_through_the_selection():
    """Scores that decided the selection get none."""
    scores = torch.randn(1, 4, 4, requires_grad=True)
    q = torch.randn(1, 4, 1, 2, requires_grad=True)
    selection = select_tokens(scores, torch.full((1, 4), 2, dtype=torch.int32))
    out, lse = sparse_attention(q, torch.randn(1, 4, 1, 2), torch.randn(1, 4, 1, 2), selection)
    (out.sum() + lse.sum()).backward()
    assert q.grad.any()
    assert scores.grad is None
