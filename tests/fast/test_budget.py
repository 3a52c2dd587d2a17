"""Kernels of the adaptive sparsity controller (Eq. 8): the variance of a row of scores and the budget from it."""

import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import gsa_fast
import gsa_ref
from gsa_fast.verification.checks import numpy
from gsa_fast.verification.interpreter import small_tiles
from gsa_ref import equations
from gsa_ref.cases import BudgetCase, Limits, budget_cases
from gsa_ref.check import variance_interval
from tests.fast.helpers import SEVERAL_TILES, SMALL, assert_in_budget, examples, int32, same, widely_strided
from tests.strategies import RULES

CASES = budget_cases("float32", SMALL)


def variance_of(scores: torch.Tensor) -> torch.Tensor:
    return gsa_fast.score_variance(scores, impl="triton")


def sizes(case: BudgetCase) -> dict[str, Any]:
    return {"k_base": case.k_base, "k_min": case.k_min, "k_max": case.k_max, "rule": case.rule}


def budget_of(variance: torch.Tensor, mean_variance: float | torch.Tensor, n: torch.Tensor, **k: Any) -> torch.Tensor:
    return gsa_fast.token_budget(variance, mean_variance, n, **k, impl="triton")


def n_valid(case: BudgetCase, device: str) -> torch.Tensor:
    """Keys that each query may see: the queries are the last L of S positions."""
    return int32([[case.S - case.L + t + 1 for t in range(case.L)]] * case.B, device)


def assert_inside_interval(variance: torch.Tensor, scores: torch.Tensor, unshifted: torch.Tensor | None = None) -> None:
    """The variance is one that rounding explains, the scores being exact; gold is that of `unshifted`, if given."""
    for b in range(len(scores)):
        row_scores = numpy(scores[b])
        counted = np.isfinite(row_scores)
        largest = np.where(counted, np.abs(row_scores), 0).max(-1, initial=0)
        gold = equations.score_variance(row_scores if unshifted is None else numpy(unshifted[b]))
        low, high = variance_interval(gold, np.zeros(len(gold)), largest, counted.sum(-1))
        got = numpy(variance[b])
        assert ((low <= got) & (got <= high)).all(), (low, got, high)


# --- against the equations ----------------------------------------------------------------------------------------


@examples(20)
@given(CASES)
def test_budget_kernel_stays_in_its_error_budget(device, case):
    assert_in_budget(case, device)


@examples(20)
@given(budget_cases("float32", SEVERAL_TILES))
def test_budget_kernel_stays_in_its_error_budget_over_several_tiles(device, case):
    with small_tiles():
        assert_in_budget(case, device)


@examples(10)
@given(budget_cases("float32", Limits(B=1, L=2, S=2500)))
def test_budget_kernel_stays_in_its_error_budget_over_several_shipped_tiles(device, case):
    assert_in_budget(case, device)


# --- properties ---------------------------------------------------------------------------------------------------


@pytest.mark.property(10)
@examples(20)
@given(CASES)
def test_budget_lies_between_the_bounds_cut_to_the_row(device, case):
    """min(k_min, n) ≤ k ≤ min(k_max, n)."""
    n = n_valid(case, device)
    budget = budget_of(variance_of(case.scores(device)), case.mean_variance, n, **sizes(case))
    assert (budget >= n.clamp(max=case.k_min)).all()
    assert (budget <= n.clamp(max=case.k_max)).all()


@pytest.mark.property(11)
@examples(20)
@given(CASES, st.data())
def test_a_row_shorter_than_the_smallest_budget_takes_everything(device, case, data):
    """t + 1 < k_min gives t + 1."""
    n = n_valid(case, device)
    k_min = data.draw(st.integers(int(n.min()), case.S + 1))
    budget = budget_of(
        variance_of(case.scores(device)),
        case.mean_variance,
        n,
        k_base=k_min + 1,
        k_min=k_min,
        k_max=k_min + 2,
        rule=case.rule,
    )
    assert torch.equal(budget[n <= k_min], n[n <= k_min])
    assert (budget[n > k_min] >= k_min).all()


@pytest.mark.property(12)
@examples(20)
@given(st.floats(-4, 4, width=32), st.integers(1, 300), RULES, st.sampled_from((0.0, 1e-4, 1.0)))
def test_a_constant_row_has_no_variance_and_a_defined_budget(device, value, length, rule, mean_variance):
    """k_min for the proportional rule, k_max for the inverse one, k_base if V̄ is unset."""
    scores = torch.full((1, 1, length), value, device=device)
    variance = variance_of(scores)
    assert_inside_interval(variance, scores)
    budget = budget_of(variance, mean_variance, int32([[length]], device), k_base=20, k_min=3, k_max=200, rule=rule)
    expected = 20 if mean_variance == 0 else {"proportional": 3, "inverse": 200, "fixed": 20}[rule]
    assert int(budget) == min(expected, length)


@pytest.mark.property(13)
@examples(20)
@given(CASES, st.sampled_from((-1000.0, -1.0, 0.25, 3.0, 4096.0)))
def test_adding_a_constant_leaves_the_variance(device, case, c):
    """The scores are rounded to multiples of 2^−8 first, so that the sum itself is exact."""
    scores = (case.scores(device) * 256).round() / 256
    assert_inside_interval(variance_of(scores + c), scores + c, unshifted=scores)


@pytest.mark.property(14)
@examples(20)
@given(CASES, st.sampled_from((-4.0, -1.0, 0.5, 2.0, 64.0)))
def test_scaling_the_scores_scales_the_variance_by_the_square(device, case, a):
    """Bitwise, because a is a power of two."""
    scores = case.scores(device)
    scaled = torch.where(scores == -math.inf, scores, a * scores)
    assert same(variance_of(scaled), a * a * variance_of(scores))


@pytest.mark.property(15)
@examples(20)
@given(
    st.integers(0, 2**16),
    st.sampled_from((0.0, 1.0, 1000.0)),
    st.sampled_from((1.0, 1e-3)),
    st.integers(1, 2500),
    st.booleans(),
)
def test_streaming_variance_equals_two_passes_even_for_a_large_mean(device, seed, mean, std, length, small):
    """Tiles merge by Chan's formula; Σx² − (Σx)²/n would cancel."""
    x = mean + std * torch.randn(1, 1, length, generator=torch.Generator().manual_seed(seed)).to(device)
    if small:
        with small_tiles():
            variance = variance_of(x[..., :200])
        assert_inside_interval(variance, x[..., :200])
    else:
        assert_inside_interval(variance_of(x), x)


@pytest.mark.property(16)
@examples(20)
@given(CASES)
def test_budget_is_monotone_in_the_variance_in_the_direction_of_the_rule(device, case):
    variance = variance_of(case.scores(device)).flatten().sort()[0][None]
    many = torch.full_like(variance, 1000, dtype=torch.int32)
    steps = budget_of(variance, case.mean_variance or 0.01, many, **sizes(case)).diff()
    if case.rule == "fixed":
        assert not steps.any()
    else:
        assert ((steps if case.rule == "proportional" else -steps) >= 0).all()


@pytest.mark.property(16)
@pytest.mark.pitfall("rule-turned-round")
@pytest.mark.parametrize(
    ("rule", "expected"), [("proportional", [5, 10, 20]), ("inverse", [20, 10, 5]), ("fixed", [10, 10, 10])]
)
def test_the_rules_turn_in_opposite_directions(rule, expected, device):
    """By numbers: half, once and twice the mean variance."""
    variance, n = torch.tensor([[0.5, 1.0, 2.0]], device=device), int32([[100] * 3], device)
    assert budget_of(variance, 1.0, n, k_base=10, k_min=1, k_max=100, rule=rule).tolist() == [expected]


@pytest.mark.property(17)
@examples(20)
@given(CASES, st.data())
def test_a_row_depends_on_no_other_row(device, case, data):
    """Neither on its batch neighbours nor on other queries."""
    scores = case.scores(device).contiguous()
    b, t = data.draw(st.integers(0, case.B - 1)), data.draw(st.integers(0, case.L - 1))
    noisy = scores * 3 + 1
    noisy[b, t] = scores[b, t]
    variances = variance_of(scores), variance_of(noisy)
    n = n_valid(case, device)
    budgets = [budget_of(v, case.mean_variance, n, **sizes(case))[b, t] for v in variances]
    assert same(variances[0][b, t], variances[1][b, t])
    assert budgets[0] == budgets[1]


@pytest.mark.property(18)
@pytest.mark.pitfall("variance-of-one")
@examples(20)
@given(st.floats(-1e6, 1e6, width=32), RULES)
def test_the_variance_of_one_element_is_zero_and_its_budget_one(device, value, rule):
    """The unbiased estimate would divide 0 by 0."""
    variance = variance_of(torch.tensor([[[value, -math.inf, -math.inf]]], device=device))
    assert variance.tolist() == [[0.0]]
    n = int32([[1]], device)
    assert budget_of(variance, 0.01, n, k_base=8, k_min=2, k_max=16, rule=rule).tolist() == [[1]]


@pytest.mark.property(9)
@pytest.mark.pitfall("transposed-input")
@examples(20)
@given(CASES)
def test_strided_scores_equal_contiguous_ones_bitwise(device, case):
    scores = case.scores(device)
    plain = variance_of(scores.contiguous())
    assert same(variance_of(scores), plain)
    assert same(variance_of(scores.mT.contiguous().mT), plain)
    variance, n = plain.mT.contiguous().mT, n_valid(case, device)
    budgets = [budget_of(v, case.mean_variance, m, **sizes(case)) for v, m in ((plain, n), (variance, n.mT.clone().mT))]
    assert same(*budgets)


@pytest.mark.property(57)
@examples(10)
@given(CASES)
def test_reruns_are_bitwise_equal(device, case):
    scores = case.scores(device)
    assert same(variance_of(scores), variance_of(scores))


# --- contracts ----------------------------------------------------------------------------------------------------


@pytest.mark.pitfall("masked-counted-as-zeros")
def test_masked_positions_do_not_count_as_zeros(device):
    """Counted as zeros, they would make the variance a function of the position."""
    row = torch.tensor([1.0, 3.0, -math.inf, -math.inf], device=device)
    assert variance_of(row[None, None]).tolist() == [[1.0]]


@examples(20)
@given(CASES, st.integers(0, 2**16))
def test_nan_scores_are_left_out(device, case, seed):
    scores = case.scores(device)
    dropped = (torch.rand(scores.shape, generator=torch.Generator().manual_seed(seed)) < 0.3).to(device)
    as_nan, as_masked = scores.masked_fill(dropped, math.nan), scores.masked_fill(dropped, -math.inf)
    assert same(variance_of(as_nan), variance_of(as_masked))


@pytest.mark.parametrize("value", [math.nan, -math.inf])
def test_a_row_without_valid_scores_has_variance_zero(value, device):
    assert variance_of(torch.full((1, 2, 5), value, device=device)).tolist() == [[0.0, 0.0]]


@pytest.mark.parametrize("rule", ["proportional", "inverse", "fixed"])
@pytest.mark.parametrize("mean_variance", [1e300, -1e300, 2**200, -(2**200), math.inf, math.nan])
def test_a_mean_beyond_float32_is_infinite_as_in_the_reference(device, mean_variance, rule):
    variance, n = torch.tensor([[0.0, 0.5, 1e30]], device=device), int32([[9, 9, 9]], device)
    keywords = {"k_base": 4, "k_min": 2, "k_max": 8, "rule": rule}
    assert same(
        budget_of(variance, mean_variance, n, **keywords), gsa_ref.token_budget(variance, mean_variance, n, **keywords)
    )


@pytest.mark.pitfall("ema-starts-at-one")
@examples(20)
@given(CASES, st.sampled_from((0.0, -1.0, math.nan)))
def test_an_unset_mean_gives_the_base_budget(device, case, mean_variance):
    variance, n = variance_of(case.scores(device)), n_valid(case, device)
    for mean in (mean_variance, torch.tensor(mean_variance, device=device)):
        assert same(budget_of(variance, mean, n, **sizes(case)), n.clamp(max=case.k_base))


@examples(20)
@given(CASES)
def test_the_mean_may_be_a_float_or_a_scalar_tensor(device, case):
    variance, n, mean = variance_of(case.scores(device)), n_valid(case, device), case.mean_variance
    as_float = budget_of(variance, mean, n, **sizes(case))
    for dtype in (torch.float32, torch.float64):
        assert same(budget_of(variance, torch.tensor(mean, dtype=dtype, device=device), n, **sizes(case)), as_float)


@examples(40)
@given(
    RULES,
    st.sampled_from((0.0, 1e-45, 1e-38, 1.0, 3e38, math.inf, math.nan)),
    st.sampled_from((0.0, 1e-45, 1e-38, 1.0, 3e38)),
)
def test_extreme_variances_give_the_budgets_of_the_reference(device, rule, variance, mean):
    """Overflow, underflow, 0/0 and NaN: bit for bit."""
    k = {"k_base": 2**20, "k_min": 1, "k_max": 2**24, "rule": rule}
    rows, n = torch.tensor([[variance]], device=device), int32([[2**30]], device)
    assert same(budget_of(rows, mean, n, **k), gsa_ref.token_budget(rows, mean, n, **k))


@pytest.mark.pitfall("length-zero")
@pytest.mark.parametrize(("B", "L", "S"), [(0, 3, 4), (2, 0, 4), (2, 3, 0), (0, 0, 0)])
def test_empty_axes_give_empty_or_zero_variances(B, L, S, device):
    variance = variance_of(torch.ones(B, L, S, device=device))
    assert same(variance, torch.zeros(B, L, device=device))
    n = torch.full((B, L), S, dtype=torch.int32, device=device)
    assert same(budget_of(variance, 0.5, n, k_base=2, k_min=1, k_max=3, rule="fixed"), n.clamp(max=2))


@pytest.mark.pitfall("large-batch")
def test_ten_thousand_sequences_in_a_batch(device):
    n = torch.arange(10_000, dtype=torch.int32, device=device)[:, None]
    budget = budget_of(torch.ones(10_000, 1, device=device), 0.5, n, k_base=300, k_min=1, k_max=5000, rule="inverse")
    assert same(budget, n.clamp(max=150))


@pytest.mark.pitfall("int32-strides")
@pytest.mark.parametrize("axis", [0, 1, 2])
def test_strides_past_two_to_the_31_do_not_wrap(axis, device):
    """Offsets are 64-bit along every axis."""
    scores = torch.randn(3, 3, 3, generator=torch.Generator().manual_seed(axis)).to(device)
    wide = widely_strided((3, 3, 3), axis, device, torch.float32).copy_(scores)
    assert same(variance_of(wide), variance_of(scores))


@pytest.mark.pitfall("int32-strides")
@pytest.mark.parametrize("axis", [0, 1])
def test_strides_of_variances_past_two_to_the_31_do_not_wrap(axis, device):
    variance, n = torch.arange(9.0, device=device).reshape(3, 3), int32([[5, 6, 7]] * 3, device)
    wide = widely_strided((3, 3), axis, device, torch.float32).copy_(variance)
    wide_n = widely_strided((3, 3), axis, device, torch.int32).copy_(n)
    k = {"k_base": 2, "k_min": 1, "k_max": 9, "rule": "proportional"}
    assert same(budget_of(wide, 1.0, wide_n, **k), budget_of(variance, 1.0, n, **k))
