"""Kernel of sparse attention over the selected tokens."""

import dataclasses
import math
from contextlib import nullcontext
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn.functional import scaled_dot_product_attention

import gsa_fast
from gsa_fast.verification.checks import filled, numpy
from gsa_fast.verification.interpreter import attention_method, small_tiles
from gsa_ref import Selection, equations
from gsa_ref.cases import AttentionCase, Limits, attention_cases, random_selection
from gsa_ref.check import attention_tolerance, error_budget, gamma, unit_roundoff
from tests.fast.helpers import (
    DTYPES,
    SMALL,
    alone,
    assert_in_budget,
    contiguous,
    examples,
    int32,
    same,
    widely_strided,
)

LIMITS = Limits(B=2, L=4, S=24, heads=2, group=3, width=24)
# Rows of up to three tiles of 16 slots.
LONG_ROWS = Limits(B=2, L=3, S=44, heads=2, group=3, width=44)


def ungated(case: AttentionCase) -> AttentionCase:
    return dataclasses.replace(case, value_gate=False, output_gate=False)


def wide(case: AttentionCase) -> AttentionCase:
    """As many slots as there are keys, so that rows span several small tiles."""
    return dataclasses.replace(case, width=case.S)


ANY = st.sampled_from(("float32", "float16")).flatmap(lambda dtype: attention_cases(dtype, LIMITS))
PLAIN = ANY.map(ungated)
PLAIN32 = attention_cases("float32", LIMITS).map(ungated)
LONG32 = attention_cases("float32", LONG_ROWS).map(ungated).map(wide)


def attend(arguments: dict[str, Any], **changes: Any) -> tuple[torch.Tensor, torch.Tensor]:
    return gsa_fast.sparse_attention(**{**arguments, **changes}, impl="triton")


def gold(arguments: dict[str, Any], scale: float | None = None) -> tuple[np.ndarray, ...]:
    """o and lse of the equations and their tolerances, for calls without gates: [B, L, H, d_h] and [B, L, H]."""
    q, k, v, selection = (arguments[name] for name in ("q", "k", "v", "selection"))
    (B, L, _, d_h), S = q.shape, k.shape[1]
    factor = 1.0 if scale is None else scale * math.sqrt(d_h)  # the bound is stated for the default scale
    rows = []
    for b in range(B):
        S_t = filled(Selection(*(x[b : b + 1] for x in selection)), S - L, S)
        query, key, value = factor * numpy(q[b]), numpy(k[b]), numpy(v[b])
        tolerance = attention_tolerance(query, key, value, S_t, q.dtype)
        rows.append((*equations.sparse_attention(query, key, value, S_t), *tolerance))
    return tuple(np.stack(x) for x in zip(*rows, strict=True))


def close(x: Any, y: Any, tolerance: Any) -> bool:
    """|x − y| ≤ tolerance, with infinities in the same places."""
    x, y = (numpy(z) if isinstance(z, torch.Tensor) else z for z in (x, y))
    finite = np.isfinite(y)
    tolerance = np.broadcast_to(tolerance, y.shape)
    return np.array_equal(x[~finite], y[~finite]) and bool((np.abs(x[finite] - y[finite]) <= tolerance[finite]).all())


def selected(case: AttentionCase, selection: Selection) -> torch.Tensor:
    """Bool [B, L, S], on the CPU: the positions that are attended to."""
    mask = torch.zeros(case.B, case.L, case.S, dtype=torch.bool)
    for b in range(case.B):
        for t, row in enumerate(filled(Selection(*(x[b : b + 1] for x in selection)), case.S - case.L, case.S)):
            mask[b, t, row] = True
    return mask


def full(B: int, L: int, S: int, device: str) -> Selection:
    return Selection(*(x.to(device) for x in random_selection("full", B, L, S, S, torch.Generator())))


METHODS = tuple(gsa_fast.attention.METHODS)
# The check behind `verify` goes through all kernels by itself.
all_methods = pytest.mark.parametrize("method", ["all"], indirect=True)


@pytest.fixture(autouse=True, params=METHODS)
def method(request):
    """Every test of this file holds for every kernel."""
    with attention_method(request.param) if request.param != "all" else nullcontext():
        yield request.param


# --- against the equations ----------------------------------------------------------------------------------------


@pytest.mark.property(37)
@all_methods
@pytest.mark.usefixtures("bf16")
@pytest.mark.parametrize("dtype", DTYPES)
@examples(4)
@given(data=st.data())
def test_attention_kernel_stays_in_its_error_budget(dtype, data, device):
    assert_in_budget(data.draw(attention_cases(dtype, SMALL)), device)


@all_methods
@pytest.mark.usefixtures("bf16")
@pytest.mark.parametrize("dtype", DTYPES)
@examples(3)
@given(data=st.data())
def test_attention_kernel_stays_in_its_error_budget_over_several_tiles(dtype, data, device):
    with small_tiles():
        assert_in_budget(wide(data.draw(attention_cases(dtype, LONG_ROWS))), device)


@examples(3)
@given(PLAIN32, st.floats(0.01, 2))
def test_scale_is_a_factor_on_the_logits(device, case, scale):
    arguments = case.arguments(device)
    out, lse = attend(arguments, scale=scale)
    gold_out, gold_lse, out_tolerance, lse_tolerance = gold(arguments, scale)
    assert close(out, gold_out, out_tolerance)
    assert close(lse, gold_lse, lse_tolerance)


@examples(3)
@given(PLAIN32, st.data())
def test_every_sequence_has_its_own_start(device, case, data):
    starts = data.draw(st.lists(st.integers(0, case.S), min_size=case.B, max_size=case.B))
    arguments = case.arguments(device)
    out, lse = attend(arguments, start=int32(starts, device))
    for b, start in enumerate(starts):
        one = alone(arguments, b)
        assert same((out[b : b + 1], lse[b : b + 1]), attend(one, start=start))
        S_t = filled(one["selection"], start, case.S)
        inputs = [numpy(one[name][0]) for name in ("q", "k", "v")]
        tolerance = attention_tolerance(*inputs, S_t, torch.float32)
        for got, expected, bound in zip((out, lse), equations.sparse_attention(*inputs, S_t), tolerance, strict=True):
            assert close(got[b], expected, bound)


# --- properties ---------------------------------------------------------------------------------------------------


@pytest.mark.property(30)
@examples(3)
@given(LONG32)
def test_a_budget_of_everything_equals_dense_causal_attention(device, case):
    """Against PyTorch's own SDPA."""
    arguments = {**case.arguments(device), "selection": full(case.B, case.L, case.S, device)}

    def dense(dtype: torch.dtype) -> np.ndarray:
        q, k, v = (arguments[name].to(dtype).transpose(1, 2) for name in ("q", "k", "v"))
        causal = torch.ones(case.L, case.S, dtype=torch.bool, device=device).tril(case.S - case.L)
        return numpy(scaled_dot_product_attention(q, k, v, attn_mask=causal, enable_gqa=True).transpose(1, 2))

    with small_tiles():
        out, _ = attend(arguments)
    verdict = error_budget(
        numpy(out), dense(torch.float32), dense(torch.float64), torch.float32, tolerance=gold(arguments)[2]
    )
    assert verdict, verdict


@pytest.mark.property(31)
@examples(3)
@given(PLAIN)
def test_output_stays_inside_the_range_of_the_selected_values(device, case):
    """Per channel."""
    arguments = case.arguments(device)
    out, tolerance = numpy(attend(arguments)[0]), gold(arguments)[2]
    v = numpy(arguments["v"].repeat_interleave(case.group, 2))[:, None]  # [B, 1, S, H, d_h]
    mask = selected(case, arguments["selection"]).numpy()[..., None, None]
    low, high = np.where(mask, v, np.inf).min(2), np.where(mask, v, -np.inf).max(2)
    rows = mask.any(2)[..., 0, 0]
    assert ((low - tolerance <= out) & (out <= high + tolerance))[rows].all()


@pytest.mark.property(32)
@examples(3)
@given(LONG32, st.sampled_from((-3.0, 0.7, 1.0)))
def test_equal_values_come_out_unchanged(device, case, value):
    """The probabilities of a row add up to 1."""
    arguments = case.arguments(device)
    arguments["v"] = torch.full_like(arguments["v"], value)
    with small_tiles():
        out, _ = attend(arguments)
    rows = selected(case, arguments["selection"]).any(-1).to(device)
    value = float(torch.tensor(value))
    assert ((out.double() - value).abs()[rows] <= gamma(2 * case.width + 16) * abs(value)).all()


@pytest.mark.property(34)
@examples(3)
@given(PLAIN, st.sampled_from((-2.0, 4.0)))
def test_a_factor_on_q_cancels_its_inverse_on_the_scale(device, case, a):
    """Bitwise, because a is a power of two."""
    arguments = case.arguments(device)
    assert same(attend(arguments, scale=0.25), attend(arguments, q=arguments["q"] * a, scale=0.25 / a))


@pytest.mark.property(35)
@examples(3)
@given(LONG32, st.data())
def test_two_parts_of_a_selection_merge_by_their_lse(device, case, data):
    """o = Σ_i e^(lse_i − lse) o_i, the rule that split decoding relies on."""
    arguments = case.arguments(device)
    indices, counts = arguments["selection"]
    cut = data.draw(st.integers(0, case.width))
    parts = []
    for part in (
        Selection(indices, counts.clamp(max=cut)),
        Selection(indices[..., cut:], (counts - cut).clamp(min=0)),
    ):
        changed = {**arguments, "selection": part}
        parts.append(([numpy(x) for x in attend(changed)], gold(changed)[2:]))
    lses = [lse for (_, lse), _ in parts]
    lse = np.logaddexp(*lses)
    with np.errstate(invalid="ignore"):  # −inf − (−inf) in empty rows
        weights = [np.nan_to_num(np.exp(part - lse))[..., None] for part in lses]
    merged = sum(weight * out for weight, ((out, _), _) in zip(weights, parts, strict=True))

    # A weight is off by a factor e^(±2τ) if both lse are within τ; o_i is a mean of values.
    lse_tolerance = np.maximum(*(bounds[1] for _, bounds in parts))
    largest = np.abs(numpy(arguments["v"])).max()
    tolerance = sum(bounds[0] for _, bounds in parts) + np.expm1(2 * lse_tolerance)[..., None] * largest
    out, whole_lse = attend(arguments)
    _, _, out_tolerance, whole_tolerance = gold(arguments)
    assert close(out, merged, tolerance + out_tolerance)
    assert close(whole_lse, lse, lse_tolerance + whole_tolerance)


@pytest.mark.property(36)
@examples(3)
@given(PLAIN32, st.sampled_from((-2.0, 0.5, 1.0)), st.sampled_from((-1.0, 0.25, 4.0)))
def test_output_is_linear_in_the_values(device, case, a, b):
    """Values are multiples of 2^−10, so that the mixture itself is exact."""
    arguments = case.arguments(device)
    v = (arguments["v"] * 1024).round() / 1024
    values = v, v.flip(1) + 1, a * v + b * (v.flip(1) + 1)
    outs = [numpy(attend(arguments, v=x)[0]) for x in values]
    bounds = [gold({**arguments, "v": x})[2] for x in values]
    assert close(outs[2], a * outs[0] + b * outs[1], bounds[2] + abs(a) * bounds[0] + abs(b) * bounds[1])


@pytest.mark.property(37)
@examples(3)
@given(ANY, st.sampled_from((math.nan, math.inf, -math.inf)))
def test_nan_in_unselected_keys_and_values_changes_nothing(device, case, poison):
    """Bitwise."""
    arguments = contiguous(case.arguments(device))
    unselected = ~selected(case, arguments["selection"]).any(1).to(device)  # [B, S]
    poisoned = {name: arguments[name] for name in ("k", "v", "value_gate_logits") if arguments[name] is not None}
    poisoned = {name: x.masked_fill(unselected[..., None, None], poison) for name, x in poisoned.items()}
    assert same(attend(arguments), attend(arguments, **poisoned))


@pytest.mark.property(37)
@examples(3)
@given(ANY, st.data(), st.sampled_from(("k", "v")))
def test_nan_in_a_selected_key_or_value_reaches_exactly_the_queries_that_selected_it(device, case, data, name):
    """The other half of the property: what is selected does count."""
    arguments = case.arguments(device)
    b, s = data.draw(st.integers(0, case.B - 1)), data.draw(st.integers(0, case.S - 1))
    before = attend(arguments)
    poisoned = arguments[name].clone()
    poisoned[b, s] = math.nan
    out, lse = attend(arguments, **{name: poisoned})
    hit = torch.zeros(case.B, case.L, dtype=torch.bool)
    hit[b] = selected(case, arguments["selection"])[b, :, s]
    hit = hit.to(device)
    assert out[hit].isnan().all()
    assert same(out[~hit], before[0][~hit])
    assert same(lse[~hit], before[1][~hit])
    if name == "k":
        assert lse[hit].isnan().all()
    else:  # a row that selected a NaN may be computed in another order
        tolerance = gold(dataclasses.replace(case, value_gate=False).arguments(device))[3]
        assert close(lse, numpy(before[1]), 2 * tolerance)


@pytest.mark.property(38)
@pytest.mark.pitfall("group-sizes")
@examples(3)
@given(PLAIN)
def test_grouped_heads_equal_repeated_key_value_heads(device, case):
    """Query head h reads key/value head ⌊h / group⌋."""
    arguments = case.arguments(device)
    repeated = {name: arguments[name].repeat_interleave(case.group, 2) for name in ("k", "v")}
    (out, lse), (expected_out, expected_lse) = attend(arguments), attend(arguments, **repeated)
    _, _, out_tolerance, lse_tolerance = gold(arguments)
    assert close(out, numpy(expected_out), 2 * out_tolerance)
    assert close(lse, numpy(expected_lse), 2 * lse_tolerance)


@pytest.mark.property(39)
@pytest.mark.pitfall("diagonal")
@examples(3)
@given(PLAIN, st.integers(0, 2**16))
def test_one_slot_gives_that_value_and_its_logit(device, case, seed):
    """The value exactly, because softmax of one number is 1. The slot may be the query's own position."""
    arguments = case.arguments(device)
    position = torch.arange(case.L) + case.S - case.L
    index = (torch.rand(case.B, case.L, generator=torch.Generator().manual_seed(seed)) * (position + 1)).long()
    index[:, -1] = case.S - 1
    arguments["selection"] = Selection(index[..., None].int().to(device), torch.ones_like(index).int().to(device))
    out, lse = attend(arguments)
    row, index = torch.arange(case.B, device=device)[:, None], index.to(device)
    assert torch.equal(out, arguments["v"].repeat_interleave(case.group, 2)[row, index])  # −0 becomes 0 + −0 = 0
    assert close(lse, *gold(arguments)[1::2])


@pytest.mark.property(40)
@pytest.mark.pitfall("rows-without-a-key")
@examples(3)
@given(ANY.map(lambda case: dataclasses.replace(case, pattern="empty")))
def test_an_empty_row_gives_zero_and_minus_infinity(device, case):
    """Exactly, and nothing else gives it."""
    arguments = case.arguments(device)
    empty = ~selected(case, arguments["selection"]).any(-1).to(device)
    out, lse = attend(arguments)
    assert not out[empty].any()
    assert torch.equal(lse == -math.inf, empty[..., None].expand_as(lse))


@pytest.mark.property(41)
@examples(3)
@given(PLAIN32)
def test_a_shift_of_all_keys_leaves_the_output_and_shifts_lse(device, case):
    """lse moves by scale·q·c. Keys and c are multiples of 2^−6, so that the sum is exact."""
    arguments = case.arguments(device)
    arguments["k"] = (arguments["k"] * 64).round() / 64
    c = (torch.linspace(-1, 1, case.d_h) * 64).round().to(device) / 64
    shifted = {**arguments, "k": arguments["k"] + c}
    (out, lse), (after, after_lse) = attend(arguments), attend(shifted)
    bounds, shifted_bounds = gold(arguments)[2:], gold(shifted)[2:]
    assert close(after, numpy(out), bounds[0] + shifted_bounds[0])
    move = case.d_h**-0.5 * (numpy(arguments["q"]) @ numpy(c))
    assert close(after_lse, numpy(lse) + move, bounds[1] + shifted_bounds[1])


@pytest.mark.property(7)
@examples(3)
@given(attention_cases("float32", LONG_ROWS).map(ungated).map(wide))
def test_output_does_not_depend_on_the_tiles_it_is_computed_in(device, case):
    arguments = case.arguments(device)
    out, lse = attend(arguments)
    with small_tiles():
        tiled_out, tiled_lse = attend(arguments)
    _, _, out_tolerance, lse_tolerance = gold(arguments)
    assert close(tiled_out, numpy(out), 2 * out_tolerance)
    assert close(tiled_lse, numpy(lse), 2 * lse_tolerance)


@pytest.mark.property(9)
@examples(3)
@given(ANY.filter(lambda case: case.layout != "contiguous"))
def test_strided_inputs_equal_contiguous_ones_bitwise(device, case):
    arguments = case.arguments(device)
    assert same(attend(arguments), attend(contiguous(arguments)))


@pytest.mark.property(6)
@examples(3)
@given(ANY)
def test_a_batch_slice_equals_the_sequence_alone_bitwise(device, case):
    arguments = case.arguments(device)
    out, lse = attend(arguments)
    for b in range(case.B):
        assert same(attend(alone(arguments, b)), (out[b : b + 1], lse[b : b + 1]))


@pytest.mark.property(5)
@examples(3)
@given(ANY, st.data())
def test_future_perturbation_leaves_earlier_rows_bitwise_equal(device, case, data):
    arguments = contiguous(case.arguments(device))
    t = data.draw(st.integers(0, case.L))
    position = case.S - case.L + t
    changed = {}
    for name, first in (("q", t), ("k", position), ("v", position), ("output_gate_logits", t)):
        if arguments[name] is not None:
            changed[name] = arguments[name].clone()
            changed[name][:, first:] = math.nan
    before, after = attend(arguments), attend(arguments, **changed)
    assert same([x[:, :t] for x in before], [x[:, :t] for x in after])


@pytest.mark.property(57)
@examples(2)
@given(ANY)
def test_reruns_are_bitwise_equal(device, case):
    arguments = case.arguments(device)
    assert same(attend(arguments), attend(arguments))


# --- empty slots --------------------------------------------------------------------------------------------------


@pytest.mark.pitfall("minus-one-in-prefix")
@examples(3)
@given(PLAIN.map(lambda case: dataclasses.replace(case, pattern="holes")))
def test_minus_one_and_future_positions_inside_the_prefix_are_empty_slots(device, case):
    """The selection without them gives the same; a kernel that stops at the first −1 loses the slots behind it."""
    arguments = case.arguments(device)
    mask = selected(case, arguments["selection"])
    counts = mask.sum(-1, dtype=torch.int32)
    position = torch.where(mask, torch.arange(case.S), case.S).sort(-1)[0][..., : case.width]
    indices = torch.where(torch.arange(position.shape[-1]) < counts[..., None], position, -1).int()
    (out, lse) = attend(arguments)
    (expected_out, expected_lse) = attend(arguments, selection=Selection(indices.to(device), counts.to(device)))
    _, _, out_tolerance, lse_tolerance = gold(arguments)
    assert close(out, numpy(expected_out), 2 * out_tolerance)
    assert close(lse, numpy(expected_lse), 2 * lse_tolerance)


@pytest.mark.pitfall("empty-first-tile")
@pytest.mark.parametrize(
    "slots",
    [
        [-1] * 16 + [0, 2],
        [-1] * 40 + [1],
        [2**31 - 1, 1, -(2**31)],
        [3, 3, 0],
        [-1] * 20 + [2] + [-1] * 20,
        [0] + [-1] * 40 + [2],
        [3] * 33 + [0, 1, 2],
    ],
)
def test_whole_tiles_may_be_empty_before_and_after_a_legal_slot(slots, device):
    """A fully masked first tile: the running maximum is still −∞ when the first logit comes."""
    q, k = torch.ones(1, 3, 2, 2, device=device), torch.ones(1, 3, 1, 2, device=device)
    v = torch.arange(6.0, device=device).reshape(1, 3, 1, 2)
    none = [-1] * len(slots)
    selection = Selection(int32([[none, none, slots]], device), int32([[0, 0, len(slots)]], device))
    arguments = {"q": q, "k": k, "v": v, "selection": selection}
    with small_tiles():
        out, lse = attend(arguments)
    legal = [s for s in slots if 0 <= s <= 2]
    assert math.isclose(float(lse[0, 2, 0]), math.sqrt(2) + math.log(len(legal)), rel_tol=8 * 2.0**-24)
    assert (out[0, 2] - v[0, legal].mean(0)).abs().max() <= gamma(16) * 5
    assert not out[0, :2].any()


@examples(3)
@given(ANY, st.integers(-5, 60))
def test_slots_at_or_past_the_count_are_ignored_whatever_they_hold(device, case, junk):
    arguments = case.arguments(device)
    indices, counts = arguments["selection"]
    past = torch.arange(case.width, device=device) >= counts[..., None]
    assert same(attend(arguments), attend(arguments, selection=Selection(indices.masked_fill(past, junk), counts)))


@pytest.mark.parametrize("count", [-1, -(2**31), 4, 2**31 - 1])
def test_a_count_out_of_range_reads_no_slot_that_does_not_exist(count, device):
    """Past K it counts as K, below 0 as 0; the neighbouring row in memory holds legal positions."""
    q = torch.ones(1, 4, 1, 2, device=device)
    v = torch.arange(8.0, device=device).reshape(1, 4, 1, 2)
    slots = int32([[[0, 1, 2, 3]] * 4], device)[..., :2]
    counts = int32([[2, 2, count, 2]], device)
    out, lse = attend({"q": q, "k": q, "v": v, "selection": Selection(slots, counts)})
    clamped = Selection(slots, counts.clamp(0, 2))
    assert same((out, lse), attend({"q": q, "k": q, "v": v, "selection": clamped}))


def test_duplicates_are_found_by_validate(device):
    """The kernels do not look for them; `Selection.validate` does."""
    selection = Selection(int32([[[0, 1, 1]]], device), int32([[3]], device))
    with pytest.raises(ValueError, match="no duplicates"):
        selection.validate()


# --- tiles of several queries -----------------------------------------------------------------------------------------


@pytest.mark.pitfall("group-sizes")
@all_methods
@pytest.mark.parametrize(
    ("group", "small"),
    [(3, False), (3, True), (5, False), (5, True), (6, False), (7, False), (33, True), (70, False), (130, False)],
)
def test_groups_that_do_not_divide_a_tile(group, small, device):
    """Tiles with rows to spare, and groups of more heads than a tile has rows."""
    case = AttentionCase(
        B=1, L=5, S=11, H_kv=2, group=group, d_h=8, width=4, pattern="random", value_gate=False, output_gate=True,
        dtype="float32", values="normal", layout="contiguous", seed=group,
    )  # fmt: skip
    with small_tiles() if small else nullcontext():
        assert_in_budget(case, device)


@pytest.mark.parametrize("poison", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("name", ["k", "v"])
def test_a_query_never_notices_what_only_its_neighbour_selected(name, poison, device):
    """Bitwise, for queries that surely share a tile; with an empty row between them."""
    g = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, 4, 2, 8, generator=g).to(device) for _ in range(3))
    selection = Selection(int32([[[0, -1], [-1, -1], [0, 1], [0, 2]]], device), int32([[1, 0, 2, 2]], device))
    arguments = {"q": q, "k": k, "v": v, "selection": selection, "start": 0}
    out, lse = attend(arguments)
    poisoned = arguments[name].clone()
    poisoned[:, 1, 0] = poison  # of one head: the other one is not touched
    changed, changed_lse = attend(arguments, **{name: poisoned})
    assert same(changed[:, [0, 1, 3]], out[:, [0, 1, 3]])
    assert same(changed_lse[:, [0, 1, 3]], lse[:, [0, 1, 3]])
    assert same(changed[:, 2, 1], out[:, 2, 1])
    if name == "v":
        assert same(changed[0, 2, 0], torch.full_like(v[0, 0, 0], poison))
        assert (changed_lse - lse)[0, 2].abs().max() <= 8 * unit_roundoff(torch.float32)


def test_when_no_value_is_finite_only_empty_rows_are(device):
    q = torch.ones(1, 3, 1, 2, device=device)
    selection = Selection(int32([[[0], [-1], [2]]], device), int32([[1, 1, 1]], device))
    out, lse = attend({"q": q, "k": q, "v": torch.full_like(q, math.nan), "selection": selection})
    assert out[:, [0, 2]].isnan().all()
    assert not out[:, 1].any()
    assert lse.isneginf().flatten().tolist() == [False, True, False]


def test_more_keys_than_one_block_of_words_holds(device):
    """Positions at both ends of words, of blocks of words and of the row; the tile is cut off in the middle."""
    S = 2100 if device == "cpu" else 70_000
    slots = [0, 31, 32, 63, 64, 1023, 1024, S - 3, S - 2, S - 1]
    selection = Selection(int32([[slots[t:] + [-1] * t for t in range(3)]], device), int32([[10, 9, 8]], device))
    g = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, n, 1, 16, generator=g).to(device) for n in (3, S, S))
    arguments = {"q": q, "k": k, "v": v, "selection": selection}
    gold_out, gold_lse, out_tolerance, lse_tolerance = gold(arguments)
    out, lse = attend(arguments)
    assert close(out, gold_out, out_tolerance)
    assert close(lse, gold_lse, lse_tolerance)


def test_positions_that_a_neighbour_may_see_and_the_query_may_not(device):
    """Slots in the future of one query are legal for the next one, in the same tile."""
    g = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, 4, 1, 8, generator=g).to(device) for _ in range(3))
    selection = Selection(int32([[[0, 1, 2, 3]] * 4], device), int32([[4] * 4], device))
    arguments = {"q": q, "k": k, "v": v, "selection": selection}
    assert same(attend(arguments), attend(arguments, selection=full(1, 4, 4, device)))


# --- the choice -------------------------------------------------------------------------------------------------------

SHAPE = {"L": 8192, "S": 131072, "K": 2048, "H": 32, "H_kv": 8, "d_h": 128}


@all_methods
@pytest.mark.parametrize(
    ("changes", "method_chosen", "numbers"),
    [
        ({}, "union", ("131072", "2048")),
        ({"L": 128}, "union", ("131072", "2048")),
        ({"L": 127}, "gather", ("127", "128")),
        ({"S": 2048}, "masked", ("2048", "2048")),
        ({"S": 2049}, "union", ("2049", "2048")),
        ({"K": 0, "S": 0}, "masked", ("0",)),
        ({"dtype": torch.float32}, "gather", ("float32",)),
        ({"dtype": torch.float16}, "union", ("131072",)),
    ],
)
def test_the_choice_follows_from_the_shape_and_names_the_numbers_compared(changes, method_chosen, numbers):
    choice = gsa_fast.explain_choice(**{**SHAPE, **changes})
    assert choice.method == method_chosen
    assert all(number in choice.reason for number in numbers)
    assert tuple(choice) == (choice.method, choice.reason)


@all_methods
@pytest.mark.parametrize(("L", "K"), [(128, 128), (128, 8), (5, 8)])
def test_the_kernel_that_runs_is_the_one_that_explain_choice_names(L, K, device, monkeypatch):
    ran, dtype = [], torch.float16
    for name in METHODS:
        monkeypatch.setitem(gsa_fast.attention.METHODS, name, lambda *_, name=name: ran.append(name))
    q, k = torch.zeros(1, L, 4, 8, device=device, dtype=dtype), torch.zeros(1, 128, 2, 8, device=device, dtype=dtype)
    slots = torch.zeros(1, L, K, dtype=torch.int32, device=device)
    attend({"q": q, "k": k, "v": k, "selection": Selection(slots, slots[..., 0].contiguous())})
    assert ran == [gsa_fast.explain_choice(L=L, S=128, K=K, H=4, H_kv=2, d_h=8, dtype=dtype).method]


@all_methods
@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"L": -1}, ValueError, "L: expected an int ≥ 0, got -1"),
        ({"K": 2.0}, TypeError, "K: expected an int, got float 2.0"),
        ({"S": True}, TypeError, "S: expected an int, got bool True"),
        ({"d_h": 0}, ValueError, "d_h: expected an int ≥ 1, got 0"),
        ({"H": 30}, ValueError, "H: expected a multiple of H_kv = 8, got 30"),
        ({"dtype": torch.float64}, TypeError, "dtype: expected float32, float16 or bfloat16, got torch.float64"),
        ({"dtype": "bf16"}, TypeError, "dtype: expected float32, float16 or bfloat16, got bf16"),
    ],
)
def test_a_bad_shape_is_refused_by_name(changes, error, message):
    with pytest.raises(error, match=message):
        gsa_fast.explain_choice(**{**SHAPE, **changes})


# --- numbers ------------------------------------------------------------------------------------------------------


def test_huge_logits_do_not_overflow(device):
    """Logits of 10,000: exp overflows unless the maximum is subtracted first."""
    q = torch.full((1, 2, 1, 4), 100.0, device=device)
    k, v = q.clone(), torch.arange(1.0, 9, device=device).reshape(1, 2, 1, 4)
    k[0, 1] -= 1
    arguments = {"q": q, "k": k, "v": v, "selection": full(1, 2, 2, device), "scale": 0.25}
    out, lse = attend(arguments)
    assert same(out[0, 1], v[0, 0])  # the other weight, e^−100, vanishes beside 1
    assert lse.flatten().tolist() == [10_000.0, 10_000.0]


def test_weights_below_the_running_maximum_are_rescaled_when_a_larger_one_comes(device):
    """Growing logits, a tile at a time: every tile shrinks what came before."""
    S = 40
    q, v = torch.ones(1, 1, 1, 1, device=device), torch.arange(float(S), device=device).reshape(1, S, 1, 1)
    k = v / 8
    arguments = {"q": q, "k": k, "v": v, "selection": full(1, 1, S, device)}
    for name in ("growing", "falling"):
        with small_tiles():
            out, lse = attend(arguments)
        gold_out, gold_lse, out_tolerance, lse_tolerance = gold(arguments)
        assert close(out, gold_out, out_tolerance), name
        assert close(lse, gold_lse, lse_tolerance), name
        arguments["k"] = -k


@pytest.mark.parametrize("S", [1, 16, 17, 64, 65, 130])
def test_every_slot_of_a_long_row_counts_once(S, device):
    """Equal logits: o is the mean of the values and lse = ln S, whatever the number of tiles."""
    zeros = torch.zeros(1, S, 1, 16, device=device)
    v = torch.arange(float(S), device=device)[None, :, None, None].expand_as(zeros)
    out, lse = attend({"q": zeros[:, :1], "k": zeros, "v": v, "selection": full(1, 1, S, device)})
    assert (out - (S - 1) / 2).abs().max() <= gamma(2 * S + 16) * S
    assert abs(float(lse) - math.log(S)) <= 8 * unit_roundoff(torch.float32) * max(math.log(S), 1)


# --- shapes and strides -------------------------------------------------------------------------------------------


@pytest.mark.pitfall("length-zero")
@pytest.mark.parametrize(("B", "L", "S"), [(0, 2, 3), (2, 0, 3), (0, 0, 0)])
def test_empty_axes_give_empty_outputs(B, L, S, device):
    q, k = torch.ones(B, L, 2, 4, device=device), torch.ones(B, S, 1, 4, device=device)
    selection = Selection(int32([[[0]] * L] * B, device).reshape(B, L, 1), int32([[1] * L] * B, device).reshape(B, L))
    out, lse = attend({"q": q, "k": k, "v": k, "selection": selection, "start": 0})
    assert same(out, q)
    assert same(lse, q[..., 0])


@pytest.mark.pitfall("length-zero")
@pytest.mark.property(40)
def test_without_keys_every_row_is_empty(device):
    q, k = torch.ones(2, 3, 2, 4, device=device), torch.ones(2, 0, 1, 4, device=device)
    selection = Selection(int32([[[0, 5]] * 3] * 2, device), int32([[2] * 3] * 2, device))
    out, lse = attend({"q": q, "k": k, "v": k, "selection": selection, "start": 0})
    assert same(out, torch.zeros_like(q))
    assert same(lse, torch.full_like(q[..., 0], -math.inf))


def test_without_slots_every_row_is_empty(device):
    q = torch.ones(2, 3, 2, 4, device=device)
    selection = Selection(torch.empty(2, 3, 0, dtype=torch.int32, device=device), int32([[0] * 3] * 2, device))
    out, lse = attend({"q": q, "k": q, "v": q, "selection": selection})
    assert same(out, torch.zeros_like(q))
    assert same(lse, torch.full_like(q[..., 0], -math.inf))


@pytest.mark.pitfall("transposed-input")
@pytest.mark.property(9)
def test_keys_and_values_may_be_views_of_one_projection(device):
    """The strides of a fused projection: [B, S, 2, H_kv, d_h]."""
    g = torch.Generator().manual_seed(0)
    kv, q = torch.randn(2, 5, 2, 2, 8, generator=g).to(device), torch.randn(2, 5, 4, 8, generator=g).to(device)
    arguments = {"q": q, "k": kv[:, :, 0], "v": kv[:, :, 1], "selection": full(2, 5, 5, device)}
    assert same(attend(arguments), attend(contiguous(arguments)))


WIDE = {"q": (3, 6, 3), "k": (3, 3, 3), "v": (3, 3, 3), "output_gate_logits": (3, 6, 3)}  # without the batch


@pytest.mark.pitfall("int32-strides")
@pytest.mark.parametrize(("name", "axis"), [(name, axis) for name in WIDE for axis in range(4)])
def test_strides_past_two_to_the_31_do_not_wrap(name, axis, device):
    """Offsets are 64-bit along every axis."""
    g = torch.Generator().manual_seed(axis)
    B = 3 if axis == 0 else 1
    shapes = {n: (B, *shape) for n, shape in WIDE.items()}
    arguments: dict[str, Any] = {n: torch.randn(s, generator=g).to(device, torch.float16) for n, s in shapes.items()}
    arguments["selection"] = full(B, 3, 3, device)
    tensor = widely_strided(shapes[name], axis, device).copy_(arguments[name])
    assert same(attend(arguments, **{name: tensor}), attend(arguments))


@pytest.mark.pitfall("int32-strides")
@pytest.mark.parametrize("axis", [0, 1, 2])
def test_strides_of_a_selection_past_two_to_the_31_do_not_wrap(axis, device):
    g = torch.Generator().manual_seed(axis)
    q, k, v = (torch.randn(3, 3, 1, 2, generator=g).to(device) for _ in range(3))
    indices, counts = full(3, 3, 3, device)
    arguments = {"q": q, "k": k, "v": v}
    expected = attend(arguments, selection=Selection(indices, counts))
    indices = widely_strided((3, 3, 3), axis, device, torch.int32).copy_(indices)
    if axis < 2:
        counts = widely_strided((3, 3), axis, device, torch.int32).copy_(counts)
    assert same(attend(arguments, selection=Selection(indices, counts)), expected)
