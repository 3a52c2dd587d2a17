"""Adaptive sparsity controller (Eq. 8): the variance of a row of scores and the budget that follows from it."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from gsa_ref import equations, score_variance, token_budget
from gsa_ref.cases import BudgetCase, Limits, budget_cases
from gsa_ref.check import budget_interval, gamma, variance_interval
from tests.ref import oracle
from tests.strategies import RULES, SEEDS

CASES = budget_cases("float32", Limits(B=3))


def sizes(case: BudgetCase) -> dict[str, object]:
    return {"k_base": case.k_base, "k_min": case.k_min, "k_max": case.k_max, "rule": case.rule}


def n_valid(case: BudgetCase) -> torch.Tensor:
    """Keys that each query may see: the queries are the last L of S positions."""
    return (torch.arange(case.L, dtype=torch.int32) + case.S - case.L + 1).expand(case.B, case.L)


def gold_variance(scores: torch.Tensor) -> np.ndarray:
    return np.stack([equations.score_variance(oracle.array(sequence)) for sequence in scores])


def largest(scores: torch.Tensor) -> np.ndarray:
    return oracle.array(scores.abs().nan_to_num(0, posinf=0).amax(-1))


def count(scores: torch.Tensor) -> np.ndarray:
    return (~scores.isnan() & (scores != -math.inf)).sum(-1).numpy()


def inside_interval(variance: torch.Tensor, gold: np.ndarray, scores: torch.Tensor) -> bool:
    """Whether a float32 variance is one that rounding explains, the scores being exact."""
    low, high = variance_interval(gold, np.zeros(gold.shape), largest(scores), count(scores))
    return bool(((low <= oracle.array(variance)) & (oracle.array(variance) <= high)).all())


@pytest.mark.parametrize(("rule", "expected"), [("proportional", 12), ("inverse", 3), ("fixed", 6)])
def test_twice_the_mean_variance_by_numbers(rule, expected):
    variance, n = torch.tensor([[0.5]]), torch.tensor([[50]], dtype=torch.int32)
    assert token_budget(variance, 0.25, n, k_base=6, k_min=1, k_max=40, rule=rule).item() == expected


def test_a_float_as_the_mean_keeps_the_precision_of_the_variance():
    """0.1 rounded to float32 is larger: the ratio would lie below 1, and the budget below k_base."""
    variance, n = torch.tensor([[0.1]], dtype=torch.float64), torch.tensor([[50]], dtype=torch.int32)
    assert token_budget(variance, 0.1, n, k_base=6, k_min=1, k_max=40, rule="proportional").item() == 6


@given(CASES)
def test_float64_variance_equals_the_equations(case):
    scores = case.scores().double()
    variance, gold = score_variance(scores).numpy(), gold_variance(scores)
    std, rounding = np.sqrt(gold), gamma(2 * case.S + 16, 2.0**-53)
    slack = rounding * largest(scores)
    assert variance.dtype == np.float64
    assert (variance <= (std + slack) ** 2 * (1 + rounding)).all()
    assert (variance >= np.maximum(std - slack, 0) ** 2 * (1 - rounding)).all()


@given(CASES)
def test_float32_variance_lies_in_the_interval_of_the_equations(case):
    scores = case.scores()
    variance = score_variance(scores)
    assert variance.dtype == torch.float32
    assert inside_interval(variance, gold_variance(scores), scores)


@given(CASES)
def test_float64_budget_equals_the_equations_exactly(case):
    variance = score_variance(case.scores().double())
    budget = token_budget(variance, case.mean_variance, n_valid(case), **sizes(case))
    assert budget.dtype == torch.int32
    for b in range(case.B):
        gold = equations.token_budget(variance[b].numpy(), case.mean_variance, n_valid(case)[b].numpy(), **sizes(case))
        np.testing.assert_array_equal(budget[b], gold)


@given(CASES)
def test_float32_budget_lies_in_the_interval_of_the_equations(case):
    scores = case.scores()
    mean = float(np.float32(case.mean_variance))
    budget = token_budget(score_variance(scores), case.mean_variance, n_valid(case), **sizes(case)).numpy()
    gold = gold_variance(scores)
    for b in range(case.B):
        n = n_valid(case)[b].numpy()
        low, high = budget_interval(gold[b], np.zeros(case.L), largest(scores)[b], mean, n, **sizes(case))
        assert ((low <= budget[b]) & (budget[b] <= high)).all()


@pytest.mark.property(10)
@given(CASES)
def test_budget_lies_between_the_bounds_cut_to_the_row(case):
    """min(k_min, n) ≤ k ≤ min(k_max, n)."""
    n = n_valid(case)
    budget = token_budget(score_variance(case.scores()), case.mean_variance, n, **sizes(case))
    assert (budget >= n.clamp(max=case.k_min)).all()
    assert (budget <= n.clamp(max=case.k_max)).all()


@pytest.mark.property(11)
@given(budget_cases("float32", Limits(L=40, S=60)))
def test_a_row_shorter_than_the_smallest_budget_takes_everything(case):
    n = n_valid(case)
    budget = token_budget(score_variance(case.scores()), case.mean_variance, n, **sizes(case))
    short = n < case.k_min
    assert torch.equal(budget[short], n[short])


@pytest.mark.property(12)
@given(st.floats(-4, 4, width=32), st.integers(1, 300), RULES, st.sampled_from((0.0, 1e-4, 1.0)))
def test_a_constant_row_has_no_variance_and_a_defined_budget(value, length, rule, mean_variance):
    """k_min for the proportional rule, k_max for the inverse one, k_base if V̄ is unset."""
    scores = torch.full((1, 1, length), value)
    variance = score_variance(scores)
    assert 0 <= float(variance) <= (2 * gamma(length) * abs(value)) ** 2
    n = torch.tensor([[length]], dtype=torch.int32)
    budget = token_budget(variance, mean_variance, n, k_base=20, k_min=3, k_max=200, rule=rule)
    expected = 20 if mean_variance == 0 else {"proportional": 3, "inverse": 200, "fixed": 20}[rule]
    assert int(budget) == min(expected, length)


@pytest.mark.property(13)
@given(CASES, st.sampled_from((-1000.0, -1.0, 0.25, 3.0, 4096.0)))
def test_adding_a_constant_leaves_the_variance(case, c):
    """The scores are rounded to multiples of 2^−8 first, so that the sum itself is exact."""
    scores = (case.scores() * 256).round() / 256
    scores = scores.where(scores.abs() < 4096, scores.masked_fill(scores > -math.inf, 0.0))
    assert inside_interval(score_variance(scores + c), gold_variance(scores), scores + c)


@pytest.mark.property(14)
@given(CASES, st.sampled_from((-4.0, -1.0, 0.5, 2.0, 64.0)))
def test_scaling_the_scores_scales_the_variance_by_the_square(case, a):
    """Bitwise, because a is a power of two."""
    scores = case.scores().contiguous()
    scaled = torch.where(scores == -math.inf, scores, a * scores)
    assert torch.equal(score_variance(scaled), a * a * score_variance(scores))


@pytest.mark.property(15)
@given(
    SEEDS,
    st.sampled_from((0.0, 1.0, 1000.0)),
    st.sampled_from((1.0, 1e-3)),
    st.integers(1, 700),
    st.sampled_from((16, 64)),
)
def test_streaming_variance_equals_two_passes_even_for_a_large_mean(seed, mean, std, length, tile):
    """Tiles merged by Chan's formula, in float32, agree within rounding; Σx² − (Σx)² would not."""
    x = mean + std * torch.randn(length, generator=torch.Generator().manual_seed(seed))
    n, running_mean, m2 = 0, torch.zeros(()), torch.zeros(())
    for part in x.split(tile):
        delta, total = part.mean() - running_mean, n + len(part)
        m2 = m2 + (part - part.mean()).square().sum() + delta * delta * (n * len(part) / total)
        running_mean, n = running_mean + delta * (len(part) / total), total
    scores = x.reshape(1, 1, -1)
    gold = gold_variance(scores)
    assert inside_interval(score_variance(scores), gold, scores)
    assert inside_interval((m2 / n).reshape(1, 1), gold, scores)


@pytest.mark.property(16)
@given(CASES)
def test_budget_is_monotone_in_the_variance_in_the_direction_of_the_rule(case):
    variance = score_variance(case.scores()).flatten().sort()[0][None]
    mean = case.mean_variance or 0.01
    steps = token_budget(variance, mean, torch.full_like(variance, 1000, dtype=torch.int32), **sizes(case)).diff()
    if case.rule == "fixed":
        assert not steps.any()
    else:
        assert ((steps if case.rule == "proportional" else -steps) >= 0).all()


@pytest.mark.property(16)
@pytest.mark.pitfall("rule-turned-round")
@pytest.mark.parametrize(("rule", "expected"), [("proportional", [5, 10, 20]), ("inverse", [20, 10, 5])])
def test_the_rules_turn_in_opposite_directions(rule, expected):
    """By numbers: half, once and twice the mean variance."""
    n = torch.full((1, 3), 100, dtype=torch.int32)
    budget = token_budget(torch.tensor([[0.5, 1.0, 2.0]]), 1.0, n, k_base=10, k_min=1, k_max=100, rule=rule)
    assert budget.tolist() == [expected]


@pytest.mark.property(17)
@given(CASES, st.data())
def test_a_row_depends_on_no_other_row(case, data):
    """Neither on its batch neighbours nor on other queries."""
    scores = case.scores().contiguous()
    b, t = data.draw(st.integers(0, case.B - 1)), data.draw(st.integers(0, case.L - 1))
    noisy = scores * 3 + 1
    noisy[b, t] = scores[b, t]
    variances = score_variance(scores), score_variance(noisy)
    budgets = [token_budget(v, case.mean_variance, n_valid(case), **sizes(case))[b, t] for v in variances]
    assert torch.equal(variances[0][b, t], variances[1][b, t])
    assert budgets[0] == budgets[1]


@pytest.mark.property(18)
@pytest.mark.pitfall("variance-of-one")
@given(st.floats(-1e6, 1e6, width=32), RULES)
def test_the_variance_of_one_element_is_zero_and_its_budget_one(value, rule):
    """The unbiased estimate would divide 0 by 0."""
    scores = torch.tensor([[[value, -math.inf, -math.inf]]])
    variance = score_variance(scores)
    assert variance.tolist() == [[0.0]]
    one = torch.ones(1, 1, dtype=torch.int32)
    assert token_budget(variance, 0.01, one, k_base=8, k_min=2, k_max=16, rule=rule).tolist() == [[1]]


@pytest.mark.pitfall("masked-counted-as-zeros")
@given(st.lists(st.integers(-8, 8), min_size=1, max_size=20), st.integers(0, 30))
def test_masked_positions_do_not_count_as_zeros(values, masked):
    """Counted as zeros, they would make the variance a function of the position."""
    row = torch.tensor([*map(float, values), *[-math.inf] * masked])[None, None]
    assert inside_interval(score_variance(row), np.array([[np.var(values)]]), row)


@pytest.mark.pitfall("masked-counted-as-zeros")
def test_masked_positions_do_not_count_as_zeros_by_numbers():
    row = torch.tensor([1.0, 3.0, -math.inf, -math.inf])
    assert score_variance(row[None, None]).tolist() == [[1.0]]


@given(CASES, SEEDS)
def test_nan_scores_are_left_out(case, seed):
    scores = case.scores().contiguous()
    dropped = torch.rand(scores.shape, generator=torch.Generator().manual_seed(seed)) < 0.3
    as_nan, as_masked = scores.masked_fill(dropped, math.nan), scores.masked_fill(dropped, -math.inf)
    assert torch.equal(score_variance(as_nan), score_variance(as_masked))


@pytest.mark.parametrize("value", [math.nan, -math.inf])
def test_a_row_without_valid_scores_has_variance_zero(value):
    assert score_variance(torch.full((1, 2, 5), value)).tolist() == [[0.0, 0.0]]


@given(CASES, st.sampled_from((0.0, -1.0, math.nan)))
def test_an_unset_mean_gives_the_base_budget(case, mean_variance):
    variance, n = score_variance(case.scores()), n_valid(case)
    for mean in (mean_variance, torch.tensor(mean_variance)):
        assert torch.equal(token_budget(variance, mean, n, **sizes(case)), n.clamp(max=case.k_base))


@given(CASES)
def test_the_mean_may_be_a_float_or_a_scalar_tensor(case):
    variance = score_variance(case.scores())
    budgets = [
        token_budget(variance, mean, n_valid(case), **sizes(case))
        for mean in (case.mean_variance, torch.tensor(case.mean_variance), torch.tensor(case.mean_variance).double())
    ]
    assert torch.equal(budgets[0], budgets[1])
    assert torch.equal(budgets[0], budgets[2])


@given(RULES, st.sampled_from((0.0, 1e-38, 1.0, 3e38, math.inf, math.nan)), st.sampled_from((0.0, 1e-38, 1.0, 3e38)))
def test_extreme_variances_give_budgets_inside_the_bounds(rule, variance, mean):
    n = torch.full((1, 1), 2**30, dtype=torch.int32)
    budget = token_budget(torch.tensor([[variance]]), mean, n, k_base=2**20, k_min=1, k_max=2**24, rule=rule)
    mean32, variance32 = float(np.float32(mean)), np.array([np.float32(variance)], np.float64)
    gold = equations.token_budget(variance32, mean32, n[0].numpy(), k_base=2**20, k_min=1, k_max=2**24, rule=rule)
    assert budget[0].tolist() == gold.tolist()


@pytest.mark.property(9)
@given(budget_cases("float32", Limits()).filter(lambda case: case.layout != "contiguous"))
def test_strided_scores_equal_contiguous_ones(case):
    """Both within rounding of the equations."""
    scores = case.scores()
    gold = gold_variance(scores)
    assert inside_interval(score_variance(scores), gold, scores)
    assert inside_interval(score_variance(scores.contiguous()), gold, scores)


@pytest.mark.property(57)
@given(CASES)
def test_reruns_are_bitwise_equal(case):
    scores = case.scores()
    assert torch.equal(score_variance(scores), score_variance(scores))


@pytest.mark.pitfall("large-batch")
@pytest.mark.pitfall("length-zero")
@pytest.mark.parametrize(("B", "L", "S"), [(0, 3, 4), (2, 0, 4), (2, 3, 0), (10_000, 1, 2)])
def test_empty_axes_and_large_batches_work(B, L, S):
    variance = score_variance(torch.ones(B, L, S))
    assert variance.shape == (B, L)
    assert not variance.any()
    n = torch.full((B, L), S, dtype=torch.int32)
    budget = token_budget(variance, 0.5, n, k_base=2, k_min=1, k_max=3, rule="fixed")
    assert torch.equal(budget, n.clamp(max=2))
