"""Kernel of the gated lightning indexer (Eq. 7)."""

import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import gsa_fast
from gsa_fast.verification.checks import gold_scores, numpy
from gsa_fast.verification.interpreter import small_tiles
from gsa_ref.cases import IndexerCase, indexer_cases
from gsa_ref.check import SIGMOID_ERROR, gamma, score_verdict, unit_roundoff
from tests.fast.helpers import (
    DTYPES,
    SEVERAL_TILES,
    SMALL,
    alone,
    assert_in_budget,
    contiguous,
    examples,
    int32,
    same,
    widely_strided,
)

CASES = st.sampled_from(("float32", "float16")).flatmap(lambda dtype: indexer_cases(dtype, SMALL))


def scores_of(arguments: dict[str, Any], scale: float) -> torch.Tensor:
    return gsa_fast.indexer_scores(**arguments, scale=scale, impl="triton")


def gold(arguments: dict[str, Any], scale: float) -> tuple[np.ndarray, np.ndarray]:
    """Eq. 7 and its ε, [B, L, S] each."""
    _, _, scores, tolerance = zip(*gold_scores(arguments, scale, 0), strict=True)
    return np.stack(scores), np.stack(tolerance)


def all_visible(case: IndexerCase, device: str) -> dict[str, Any]:
    """Queries behind all keys, none of them padding."""
    return {**case.arguments(device), "start": case.S, "lengths": int32([case.S + case.L] * case.B, device)}


# --- against the equations ----------------------------------------------------------------------------------------


@pytest.mark.usefixtures("bf16")
@pytest.mark.parametrize("dtype", DTYPES)
@examples(12)
@given(data=st.data())
def test_indexer_kernel_stays_in_its_error_budget(dtype, data, device):
    assert_in_budget(data.draw(indexer_cases(dtype, SMALL)), device)


@pytest.mark.usefixtures("bf16")
@pytest.mark.parametrize("dtype", DTYPES)
@examples(8)
@given(data=st.data())
def test_indexer_kernel_stays_in_its_error_budget_over_several_tiles(dtype, data, device):
    with small_tiles():
        assert_in_budget(data.draw(indexer_cases(dtype, SEVERAL_TILES)), device)


@examples(10)
@given(CASES)
def test_minus_infinity_exactly_where_a_query_may_not_look(device, case):
    """s ≤ start + t, and both positions below the length: written with loops."""
    expected = np.zeros((case.B, case.L, case.S), bool)
    for b, t, s in np.ndindex(expected.shape):
        start = case.start[b] if isinstance(case.start, tuple) else case.start
        length = case.S if case.lengths is None else case.lengths[b]
        expected[b, t, s] = s <= start + t and s < length and start + t < length
    scores = numpy(scores_of(case.arguments(device), case.scale))
    np.testing.assert_array_equal(scores != -np.inf, expected)


# --- properties ---------------------------------------------------------------------------------------------------


@pytest.mark.property(1)
@examples(10)
@given(CASES)
def test_scores_lie_between_zero_and_the_number_of_heads(device, case):
    """Exactly, because no σ exceeds 1 and sums of ones are exact."""
    scores = scores_of(all_visible(case, device), case.scale)
    assert ((scores >= 0) & (scores <= case.H_I)).all()


@pytest.mark.property(2)
@examples(10)
@given(CASES, st.integers(0, 3), st.sampled_from(("head_logits", "bias")))
def test_scores_rise_with_a_head_weight_and_with_a_bias(device, case, head, name):
    """Never down by more than rounding, and up wherever the exact rise exceeds it."""
    arguments = all_visible(case, device)
    raised = {**arguments, name: arguments[name].clone()}
    raised[name][..., head % case.H_I] += 1
    rise = numpy(scores_of(raised, case.scale)) - numpy(scores_of(arguments, case.scale))
    (before, tolerance), (after, tolerance_after) = gold(arguments, case.scale), gold(raised, case.scale)
    slack = tolerance + tolerance_after
    assert (rise >= -slack).all()
    assert (rise > 0)[after - before > slack].all()


@pytest.mark.property(3)
@examples(10)
@given(CASES, st.randoms(use_true_random=False))
def test_a_permutation_of_the_keys_permutes_the_columns(device, case, random):
    arguments = all_visible(case, device)
    order = random.sample(range(case.S), case.S)
    permuted = {**arguments, "k_idx": arguments["k_idx"][:, order]}
    difference = scores_of(permuted, case.scale) - scores_of(arguments, case.scale)[:, :, order]
    assert (np.abs(numpy(difference)) <= 2 * gold(permuted, case.scale)[1]).all()


@pytest.mark.property(4)
@examples(10)
@given(CASES, st.randoms(use_true_random=False))
def test_a_permutation_of_the_heads_changes_nothing(device, case, random):
    arguments = all_visible(case, device)
    order = random.sample(range(case.H_I), case.H_I)
    permuted = {
        **arguments,
        "q_idx": arguments["q_idx"][:, :, order],
        "head_logits": arguments["head_logits"][:, :, order],
        "bias": arguments["bias"][order],
    }
    difference = scores_of(permuted, case.scale) - scores_of(arguments, case.scale)
    assert (np.abs(numpy(difference)) <= 2 * gold(arguments, case.scale)[1]).all()


@pytest.mark.property(5)
@examples(12)
@given(CASES, st.integers(0, 24), st.sampled_from((1.0, math.inf, math.nan)))
def test_future_perturbation_leaves_earlier_rows_bitwise_equal(device, case, position, noise):
    arguments = contiguous(case.arguments(device))
    start = torch.as_tensor(arguments["start"], device=device).reshape(-1, 1)
    late = (start + torch.arange(case.L, device=device)).expand(case.B, case.L) >= position
    changed = {name: arguments[name].clone() for name in ("q_idx", "k_idx", "head_logits")}
    changed["q_idx"][late] += noise
    changed["head_logits"][late] -= noise
    changed["k_idx"][:, position:] += noise
    before, after = (scores_of(a, case.scale) for a in (arguments, {**arguments, **changed}))
    assert same(after[~late], before[~late])


@pytest.mark.property(6)
@examples(10)
@given(CASES)
def test_a_batch_slice_equals_the_sequence_alone_bitwise(device, case):
    arguments = case.arguments(device)
    scores = scores_of(arguments, case.scale)
    for b in range(case.B):
        assert same(scores_of(alone(arguments, b), case.scale)[0], scores[b])


@pytest.mark.property(7)
@examples(8)
@given(indexer_cases("float32", SEVERAL_TILES))
def test_scores_do_not_depend_on_the_tiles_they_are_computed_in(device, case):
    arguments = case.arguments(device)
    whole, tolerance = scores_of(arguments, case.scale), gold(arguments, case.scale)[1]
    with small_tiles():
        tiled = scores_of(arguments, case.scale)
    for b in range(case.B):
        verdict = score_verdict(numpy(tiled[b]), numpy(whole[b]), 2 * tolerance[b])
        assert verdict, verdict


@pytest.mark.property(8)
@examples(10)
@given(CASES, st.sampled_from((1e5, math.inf)))
def test_bias_limits_close_and_open_every_head(device, case, bias):
    """b → −∞ gives 0, b → +∞ gives Σ_j σ(head_logits_j)."""
    arguments = all_visible(case, device)
    arguments["bias"] = torch.full((case.H_I,), -bias, device=device)
    assert not scores_of(arguments, case.scale).any()
    arguments["bias"] = -arguments["bias"]
    expected = torch.sigmoid(arguments["head_logits"].double()).sum(-1, keepdim=True)
    budget = case.H_I * (SIGMOID_ERROR["exact"] + gamma(2 * case.H_I))
    assert ((scores_of(arguments, case.scale) - expected).abs() <= budget).all()


@pytest.mark.property(9)
@examples(12)
@given(CASES.filter(lambda case: case.layout != "contiguous"))
def test_strided_inputs_equal_contiguous_ones_bitwise(device, case):
    arguments = case.arguments(device)
    assert same(scores_of(arguments, case.scale), scores_of(contiguous(arguments), case.scale))


@pytest.mark.property(57)
@examples(6)
@given(CASES)
def test_reruns_are_bitwise_equal(device, case):
    arguments = case.arguments(device)
    assert same(scores_of(arguments, case.scale), scores_of(arguments, case.scale))


@examples(6)
@given(CASES, st.integers(0, 5))
def test_one_start_for_all_equals_the_same_start_for_each(device, case, start):
    arguments = case.arguments(device)
    each = scores_of({**arguments, "start": int32([start] * case.B, device)}, case.scale)
    assert same(scores_of({**arguments, "start": start}, case.scale), each)


@examples(8)
@given(CASES, st.data())
def test_a_nan_key_spoils_its_own_column_only(device, case, data):
    arguments = all_visible(case, device)
    before = scores_of(arguments, case.scale)
    b, s = data.draw(st.integers(0, case.B - 1)), data.draw(st.integers(0, case.S - 1))
    arguments["k_idx"] = arguments["k_idx"].clone()
    arguments["k_idx"][b, s, 0] = math.nan
    before[b, :, s] = math.nan
    assert same(scores_of(arguments, case.scale), before)


@examples(6)
@given(indexer_cases("float32", SMALL), st.sampled_from((torch.float16, torch.float32)))
def test_head_logits_and_bias_may_have_dtypes_of_their_own(device, case, dtype):
    arguments = case.arguments(device)
    mixed = {**arguments, "head_logits": arguments["head_logits"].to(dtype), "bias": arguments["bias"].half()}
    wide = {**mixed, "head_logits": mixed["head_logits"].float(), "bias": mixed["bias"].float()}
    assert same(scores_of(mixed, case.scale), scores_of(wide, case.scale))


# --- bugs that escaped elsewhere ----------------------------------------------------------------------------------


@pytest.mark.pitfall("mask-past-46341")
def test_the_causal_mask_is_right_past_46341_tokens(device, monkeypatch):
    """46,341² is the first square that a 32-bit index cannot hold."""
    monkeypatch.setattr("gsa_fast.indexer.BLOCK_L", 16)  # few, wide tiles, for the interpreter
    monkeypatch.setattr("gsa_fast.indexer.BLOCK_S", 512)
    L, S = 2, 46_343
    ones = torch.ones(1, S, 1, device=device)
    zeros = torch.zeros(1, L, 1, device=device)
    arguments = {"q_idx": ones[:, :L, None], "k_idx": ones, "head_logits": zeros, "bias": zeros[0, 0], "start": S - L}
    scores = scores_of(arguments, 1.0)
    assert (scores > -math.inf).sum(-1).tolist() == [[S - 1, S]]
    assert len(scores[scores > -math.inf].unique()) == 1


WIDE = {"q_idx": (3, 3, 3, 3), "k_idx": (3, 3, 3), "head_logits": (3, 3, 3)}


@pytest.mark.pitfall("int32-strides")
@pytest.mark.parametrize(("name", "axis"), [(name, axis) for name, shape in WIDE.items() for axis in range(len(shape))])
def test_strides_past_two_to_the_31_do_not_wrap(name, axis, device):
    """Offsets are 64-bit along every axis: index · stride reaches 2^31, though both fit into 32 bits."""
    g = torch.Generator().manual_seed(axis)
    arguments: dict[str, Any] = {n: torch.randn(s, generator=g).to(device, torch.float16) for n, s in WIDE.items()}
    arguments["bias"] = torch.zeros(3, device=device)
    wide = widely_strided(WIDE[name], axis, device).copy_(arguments[name])
    assert same(scores_of({**arguments, name: wide}, 0.5), scores_of(arguments, 0.5))


@pytest.mark.pitfall("transposed-input")
@pytest.mark.property(9)
def test_a_transposed_key_cache_gives_the_same_scores(device):
    """Keys stored [B, d_I, S]."""
    g = torch.Generator().manual_seed(0)
    q_idx, k_idx = torch.randn(2, 3, 2, 8, generator=g).to(device), torch.randn(2, 8, 7, generator=g).to(device)
    shared = {"q_idx": q_idx, "head_logits": q_idx[..., 0], "bias": q_idx[0, 0, :, 1], "start": 4, "lengths": None}
    plain = scores_of({**shared, "k_idx": k_idx.mT.contiguous()}, 0.5)
    assert same(scores_of({**shared, "k_idx": k_idx.mT}, 0.5), plain)


@pytest.mark.pitfall("length-zero")
@pytest.mark.parametrize(("B", "L", "S"), [(0, 3, 4), (2, 0, 4), (2, 3, 0), (0, 0, 0)])
@pytest.mark.parametrize("per_sequence", [False, True])
def test_empty_axes_give_empty_scores(B, L, S, per_sequence, device):
    sizes = {"q_idx": (B, L, 2, 4), "k_idx": (B, S, 4), "head_logits": (B, L, 2), "bias": (2,)}
    arguments: dict[str, Any] = {name: torch.ones(shape, device=device) for name, shape in sizes.items()}
    arguments["start"] = int32([0] * B, device) if per_sequence else 0
    scores = scores_of(arguments, 1.0)
    assert (scores.shape, scores.dtype) == ((B, L, S), torch.float32)


@pytest.mark.pitfall("length-zero")
def test_a_sequence_of_length_zero_sees_nothing_and_disturbs_nobody(device):
    g = torch.Generator().manual_seed(1)
    sizes = {"q_idx": (2, 4, 2, 4), "k_idx": (2, 4, 4), "head_logits": (2, 4, 2), "bias": (2,)}
    arguments: dict[str, Any] = {name: torch.randn(shape, generator=g).to(device) for name, shape in sizes.items()}
    whole = scores_of(arguments, 0.5)
    scores = scores_of({**arguments, "lengths": int32([0, 4], device)}, 0.5)
    assert (scores[0] == -math.inf).all()
    assert same(scores[1], whole[1])


def test_sixteen_bit_products_are_summed_in_float32(device):
    """Σ q·k with terms 2048 and 1: float16 sums could not hold it."""
    q_idx = torch.ones(1, 1, 1, 8, device=device, dtype=torch.float16)
    k_idx = torch.tensor([2048.0, 1, 1, 1, -2048, 0, 0, 0], device=device, dtype=torch.float16)[None, None]
    zero = torch.zeros(1, 1, 1, device=device)
    arguments = {"q_idx": q_idx, "k_idx": k_idx, "head_logits": zero, "bias": zero[0, 0]}
    expected = 0.5 / (1 + math.exp(-3))
    assert abs(float(scores_of(arguments, 1.0)) - expected) <= gold({**arguments, "start": 0, "lengths": None}, 1.0)[
        1
    ].max() + unit_roundoff(torch.float32)
