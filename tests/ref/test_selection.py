"""Top-k token selection, and the indexer, budget and selection in one step."""

import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import gsa_ref
from gsa_ref import Selection, equations, indexed_selection, select_tokens
from gsa_ref.cases import IndexedSelectionCase, Limits, SelectionCase, draw_scores, indexed_selection_cases
from gsa_ref.cases import selection_cases as cases
from gsa_ref.check import budget_interval, topk_certificate
from gsa_ref.selection import largest_budget
from tests.ref import oracle
from tests.strategies import ROWS_WITH_BUDGETS, SEEDS

CASES = cases("float32", Limits(B=3))
MANY = 2**20


def int32(values: Any) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int32)


def choose(scores: list[float], k: int) -> list[int]:
    """The selection of one row."""
    selection = select_tokens(torch.tensor([[scores]]), int32([[k]]))
    return selection.indices[0, 0, : int(selection.counts)].tolist()


def run(case: SelectionCase) -> Selection:
    return select_tokens(*case.arguments(), width=case.width)


def as_sets(selection: Selection) -> list[list[set[int]]]:
    """Written with loops: the entries before the count, per sequence and row."""
    return [
        [set(row[:n]) for row, n in zip(rows, counts, strict=True)]
        for rows, counts in zip(selection.indices.tolist(), selection.counts.tolist(), strict=True)
    ]


# --- select_tokens ------------------------------------------------------------------------------------------------


@given(CASES)
def test_selection_equals_the_stable_sort_of_the_equations(case):
    """Zero tolerance: the scores are given. The sort is by (−score, position)."""
    scores, budget = case.arguments()
    selection = select_tokens(scores, budget, width=case.width)
    assert selection.indices.shape == (case.B, case.L, case.width)
    assert (selection.indices.dtype, selection.counts.dtype) == (torch.int32, torch.int32)
    for b in range(case.B):
        gold = equations.select_tokens(scores[b].numpy(), budget[b].clamp(max=case.width).numpy())
        for t, expected in enumerate(gold):
            assert selection.counts[b, t] == len(expected)
            assert selection.indices[b, t].tolist() == [*expected, *[-1] * (case.width - len(expected))]


@pytest.mark.property(19)
@given(CASES)
def test_selection_passes_the_exact_certificate(case):
    """With ε = 0."""
    scores, budget = case.arguments()
    selection = run(case)
    for b in range(case.B):
        for t in range(case.L):
            row, n = selection.indices[b, t].numpy(), int(selection.counts[b, t])
            certificate = topk_certificate(row, n, scores[b, t].numpy(), 0.0, min(int(budget[b, t]), case.width))
            assert certificate, certificate.reason


@pytest.mark.property(20)
@given(CASES)
def test_count_is_the_budget_cut_to_the_row_and_the_width(case):
    scores, budget = case.arguments()
    candidates = (scores != -math.inf).sum(-1)
    expected = torch.minimum(budget, candidates).clamp(0, case.width)
    assert torch.equal(run(case).counts, expected.to(torch.int32))


@pytest.mark.property(21)
@given(CASES)
def test_no_position_is_selected_twice(case):
    selection = run(case)
    assert [[len(s) for s in rows] for rows in as_sets(selection)] == selection.counts.tolist()


@pytest.mark.property(22)
@given(CASES)
def test_no_future_position_is_selected(case):
    for rows in as_sets(run(case)):
        for t, chosen in enumerate(rows):
            assert max(chosen, default=-1) <= case.S - case.L + t


@pytest.mark.property(23)
@given(CASES)
def test_minus_one_only_in_the_tail_and_ascending_before_it(case):
    selection = run(case)
    selection.validate(n_keys=case.S)
    for rows, counts in zip(selection.indices.tolist(), selection.counts.tolist(), strict=True):
        for row, n in zip(rows, counts, strict=True):
            assert row[:n] == sorted(row[:n])
            assert -1 not in row[:n]
            assert row[n:] == [-1] * (len(row) - n)


@pytest.mark.property(24)
@given(st.floats(-1, 1, width=32), st.integers(1, 50), st.integers(0, 60))
def test_a_row_of_equal_scores_gives_the_lowest_positions(value, length, k):
    assert choose([value] * length, k) == list(range(min(k, length)))


@pytest.mark.property(25)
@given(CASES)
def test_a_strictly_monotone_map_of_the_scores_keeps_the_selection(case):
    """Scores replaced by their rank among the distinct values."""
    scores, budget = case.arguments()
    kept = ~scores.isnan() & (scores != -math.inf)
    ranks = scores.clone()
    ranks[kept] = torch.unique(scores[kept], return_inverse=True)[1].float() - 7
    before, after = (select_tokens(x, budget, width=case.width) for x in (scores, ranks))
    assert torch.equal(before.indices, after.indices)
    assert torch.equal(before.counts, after.counts)


@pytest.mark.property(26)
@given(CASES, st.integers(0, 5))
def test_a_larger_budget_selects_a_superset(case, more):
    scores, budget = case.arguments()
    small, large = (as_sets(select_tokens(scores, b)) for b in (budget, budget + more))
    assert all(a <= b for rows in zip(small, large, strict=True) for a, b in zip(*rows, strict=True))


@pytest.mark.property(27)
@given(CASES, st.integers(1, 20))
def test_rows_in_chunks_equal_all_rows_at_once(case, rows):
    scores, budget = case.arguments()
    chunks = [
        select_tokens(scores[:, t : t + rows], budget[:, t : t + rows], width=case.width)
        for t in range(0, case.L, rows)
    ]
    whole = run(case)
    assert torch.equal(torch.cat([c.indices for c in chunks], 1), whole.indices)
    assert torch.equal(torch.cat([c.counts for c in chunks], 1), whole.counts)


@pytest.mark.property(28)
@settings(max_examples=10)
@given(SEEDS, st.integers(1, 5999))
def test_more_than_4096_scores_inside_one_float16_step(seed, k):
    """A selection by the float16 value, or by a histogram of it, cannot tell these apart."""
    scores = draw_scores("near", (1, 1, 6000), torch.Generator().manual_seed(seed))
    assert len(scores.half().unique()) <= 2
    expected = sorted(np.argsort(-scores[0, 0].numpy(), kind="stable")[:k].tolist())
    assert choose(scores[0, 0].tolist(), k) == expected


@pytest.mark.property(29)
@given(ROWS_WITH_BUDGETS)
def test_special_scores_rank_as_the_numbers_that_they_are(row_and_budget):
    """By the certificate, which compares every selected score with every one that was left out."""
    row, k = row_and_budget
    chosen = choose(row, k)
    certificate = topk_certificate(np.array(chosen, np.int64), len(chosen), np.array(row), 0.0, k)
    assert certificate, certificate.reason


@pytest.mark.property(29)
def test_minus_zero_equals_plus_zero():
    assert choose([-0.0, 0.0, -0.0, 0.0], 2) == [0, 1]
    assert choose([0.0, -0.0, 0.0, -0.0], 3) == [0, 1, 2]


@pytest.mark.property(29)
def test_denormals_are_not_flushed_to_zero():
    assert choose([0.0, 1e-45, -1e-45, 3e-45], 2) == [1, 3]
    assert choose([-1e-45, 0.0, -3e-45], 2) == [0, 1]


@pytest.mark.property(29)
def test_infinities_are_ordinary_scores_except_minus_infinity():
    assert choose([1.0, math.inf, -3e38, -math.inf], 1) == [1]
    assert choose([1.0, math.inf, -3e38, -math.inf], 4) == [0, 1, 2]


@pytest.mark.property(29)
def test_nan_ranks_last_but_before_nothing():
    """A NaN is chosen only when every other candidate is, lowest position first."""
    scores = [math.nan, -3e38, -math.inf, math.nan, 5.0]
    assert [choose(scores, k) for k in range(6)] == [[], [4], [1, 4], [0, 1, 4], [0, 1, 3, 4], [0, 1, 3, 4]]


@pytest.mark.pitfall("minus-infinity-lanes")
@given(CASES, SEEDS)
def test_lanes_at_minus_infinity_are_never_candidates(case, seed):
    """Even with a budget far above the number of candidates, wherever they lie."""
    scores, _ = case.arguments()
    masked = torch.rand(scores.shape, generator=torch.Generator().manual_seed(seed)) < 0.5
    scores = scores.masked_fill(masked, -math.inf)
    budget = torch.full((case.B, case.L), MANY, dtype=torch.int32)
    chosen = as_sets(select_tokens(scores, budget, width=case.S + 3))
    for b in range(case.B):
        for t in range(case.L):
            assert chosen[b][t] == set((scores[b, t] != -math.inf).nonzero()[:, 0].tolist())


@pytest.mark.pitfall("ties-at-threshold")
@given(st.integers(2, 300), st.integers(0, 299), SEEDS)
def test_many_ties_at_the_threshold_are_settled_by_position(length, k, seed):
    """A few winners, and everything else tied exactly at the threshold."""
    g = torch.Generator().manual_seed(seed)
    winner = torch.rand(length, generator=g) < 0.1
    winners = winner.nonzero()[:, 0].tolist()[:k]
    tied = (~winner).nonzero()[:, 0].tolist()
    expected = sorted(winners + tied[: max(k - int(winner.sum()), 0)])
    assert choose(winner.float().tolist(), k) == expected


@pytest.mark.pitfall("diagonal")
@given(CASES)
def test_the_diagonal_can_be_selected(case):
    """A query may select its own position: the last key that it sees."""
    scores, _ = case.arguments()
    own = torch.arange(case.L) + case.S - case.L
    scores = scores.nan_to_num(0, posinf=1, neginf=-math.inf).clamp(max=1e30)
    scores[:, torch.arange(case.L), own] = 2e30
    selection = select_tokens(scores, torch.ones(case.B, case.L, dtype=torch.int32))
    assert torch.equal(selection.indices[..., 0], own.int().expand(case.B, -1))


@given(SEEDS, st.integers(1, 60))
def test_distinct_scores_give_the_set_of_torch_topk(seed, k):
    scores = torch.randperm(60, generator=torch.Generator().manual_seed(seed)).float()
    assert choose(scores.tolist(), k) == sorted(scores.topk(k)[1].tolist())


@given(CASES)
def test_default_width_is_the_largest_budget(case):
    scores, budget = case.arguments()
    selection = select_tokens(scores, budget)
    assert selection.indices.shape[-1] == max(int(budget.max()), 1)
    wide = select_tokens(scores, budget, width=case.S + 3)
    assert torch.equal(selection.counts, wide.counts)
    assert as_sets(selection) == as_sets(wide)


@pytest.mark.property(9)
@pytest.mark.pitfall("transposed-input")
@given(CASES)
def test_transposed_inputs_give_the_same_selection(case):
    """Bitwise: selection does no arithmetic."""
    scores, budget = case.arguments()
    strided = select_tokens(scores.mT.contiguous().mT, budget.mT.contiguous().mT, width=case.width)
    plain = select_tokens(scores.contiguous(), budget.contiguous(), width=case.width)
    assert torch.equal(strided.indices, plain.indices)
    assert torch.equal(strided.counts, plain.counts)


@pytest.mark.property(57)
@pytest.mark.pitfall("reruns-differ")
@given(CASES)
def test_reruns_are_bitwise_equal(case):
    first, second = run(case), run(case)
    assert torch.equal(first.indices, second.indices)
    assert torch.equal(first.counts, second.counts)


@given(CASES)
def test_inputs_are_left_as_they_were(case):
    scores, budget = case.arguments()
    copies = scores.clone(), budget.clone()
    select_tokens(scores, budget, width=case.width)
    assert torch.equal(scores.nan_to_num(9e9), copies[0].nan_to_num(9e9))
    assert torch.equal(budget, copies[1])


def test_the_default_width_is_between_one_and_the_most_tokens():
    scores = torch.zeros(1, 2, 3)
    assert select_tokens(scores, int32([[0, 1]])).indices.shape == (1, 2, 1)
    assert select_tokens(scores[:, :0], torch.zeros(1, 0, dtype=torch.int32)).indices.shape == (1, 0, 1)
    assert largest_budget(int32([[1, 2**24]])) == 2**24


def test_budgets_below_one_select_nothing():
    selection = select_tokens(torch.ones(1, 3, 4), int32([[0, -1, -(2**31)]]))
    assert selection.counts.tolist() == [[0, 0, 0]]
    assert (selection.indices == -1).all()


@pytest.mark.pitfall("length-zero")
@pytest.mark.parametrize(("B", "L", "S"), [(0, 3, 4), (2, 0, 4), (2, 3, 0), (0, 0, 0)])
@pytest.mark.parametrize("width", [None, 5])
def test_empty_axes_give_empty_selections(B, L, S, width):
    selection = select_tokens(torch.ones(B, L, S), torch.full((B, L), 2, dtype=torch.int32), width=width)
    assert selection.indices.shape[:2] == selection.counts.shape == (B, L)
    assert not selection.counts.any() or S > 0
    selection.validate(n_keys=S)


@pytest.mark.pitfall("large-batch")
def test_ten_thousand_sequences_in_a_batch():
    scores = torch.rand(10_000, 1, 3, generator=torch.Generator().manual_seed(0))
    selection = select_tokens(scores, torch.ones(10_000, 1, dtype=torch.int32))
    assert torch.equal(selection.indices[:, 0, 0], scores[:, 0].argmax(-1).int())


# --- Selection.validate -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("row", "count", "message"),
    [
        ([0, 2, -1], -1, "counts: expected 0 ≤ count ≤ 3"),
        ([0, 2, 3], 4, "counts: expected 0 ≤ count ≤ 3"),
        ([0, 2, 3], 2, "indices: expected −1 in every slot at or past the count"),
        ([0, -1, 3], 3, "indices: expected no negative index before the tail"),
        ([0, 2, 2], 3, "indices: expected strictly ascending"),
        ([2, 0, -1], 2, "indices: expected strictly ascending"),
        ([0, 2, 5], 3, "indices: expected below n_keys = 5"),
    ],
)
def test_validate_names_the_violated_rule_and_the_row(row, count, message):
    good = [0, 1, 4]
    indices, counts = int32([[good, good, good], [good, good, row]]), int32([[3, 3, 3], [3, 3, count]])
    with pytest.raises(ValueError, match=f"^{message}") as error:
        Selection(indices, counts).validate(n_keys=5)
    assert f"got count {count} and {row} in row [1, 2]" in str(error.value)


def test_validate_accepts_what_keeps_the_rules():
    Selection(int32([[[0, 1, 4], [-1, -1, -1]]]), int32([[3, 0]])).validate(n_keys=5)
    Selection(int32([[[0, 1, 4]]]), int32([[3]])).validate()


# --- indexed_selection --------------------------------------------------------------------------------------------


def indexed(case: IndexedSelectionCase, **changes: Any) -> tuple[Selection, torch.Tensor]:
    arguments = {**case.arguments(), **changes}
    return indexed_selection(**arguments, mean_variance=case.mean_variance, config=case.config)


@given(indexed_selection_cases("float32", Limits(B=3)))
def test_one_step_equals_scores_variance_budget_and_selection(case):
    arguments, c = case.arguments(), case.config
    scores = gsa_ref.indexer_scores(**arguments, scale=case.scale)
    variance = gsa_ref.score_variance(scores)
    n_valid = (scores != -math.inf).sum(-1, dtype=torch.int32)
    sizes = {"k_base": c.k_base, "k_min": c.k_min, "k_max": c.k_max, "rule": c.rule}
    budget = gsa_ref.token_budget(variance, case.mean_variance, n_valid, **sizes)
    expected = select_tokens(scores, budget, width=min(c.k_max, case.S))
    selection, returned = indexed(case)
    assert torch.equal(selection.indices, expected.indices)
    assert torch.equal(selection.counts, expected.counts)
    assert torch.equal(returned, variance)


@pytest.mark.property(19)
@given(st.sampled_from(("float32", "float64", "bfloat16")).flatmap(lambda d: indexed_selection_cases(d, Limits(B=3))))
def test_selection_passes_the_certificate_against_the_equations(case):
    """With a budget that rounding of the variance explains."""
    arguments, c = case.arguments(), case.config
    selection, _ = indexed(case)
    gold, tolerance = oracle.indexer_scores(arguments, case.scale), oracle.indexer_tolerance(arguments, case.scale)
    sizes = {"k_base": c.k_base, "k_min": c.k_min, "k_max": c.k_max, "rule": c.rule}
    mean = case.mean_variance if case.dtype == "float64" else float(np.float32(case.mean_variance))
    for b in range(case.B):
        valid, counted = gold[b] != -np.inf, np.isfinite(gold[b])  # a NaN is visible, and left out of the variance
        largest = np.where(counted, gold[b], 0).max(-1)
        worst = np.where(counted, tolerance[b], 0).max(-1)
        variance, n = equations.score_variance(gold[b]), valid.sum(-1)
        low, high = budget_interval(variance, worst, largest, mean, n, **sizes)
        for t in range(case.L):
            count = int(selection.counts[b, t])
            assert low[t] <= count <= high[t]
            certificate = topk_certificate(selection.indices[b, t].numpy(), count, gold[b, t], tolerance[b, t], count)
            assert certificate, certificate.reason


@pytest.mark.property(5, 17)
@given(indexed_selection_cases("float32", Limits(B=3)), st.integers(0, 40))
def test_a_row_depends_on_no_neighbour_and_no_later_token(case, position):
    """Bitwise, for the whole chain from scores to selection."""
    arguments = oracle.contiguous(case.arguments())
    before, variance_before = indexed(case, **arguments)
    start = torch.as_tensor(arguments["start"]).reshape(-1, 1)
    changed = (start + torch.arange(case.L)).expand(case.B, case.L) >= position
    changed[1:] = True  # all of the neighbours
    noisy = {name: arguments[name].clone() for name in ("q_idx", "k_idx", "head_logits")}
    noisy["q_idx"][changed] += 1
    noisy["head_logits"][changed] -= 1
    noisy["k_idx"][0, position:] += 1
    noisy["k_idx"][1:] *= -1
    after, variance_after = indexed(case, **{**arguments, **noisy})
    assert torch.equal(before.indices[~changed], after.indices[~changed])
    assert torch.equal(before.counts[~changed], after.counts[~changed])
    assert torch.equal(variance_before[~changed], variance_after[~changed])


@given(indexed_selection_cases("float32", Limits()))
def test_padded_rows_select_nothing_and_padded_keys_are_never_selected(case):
    lengths = torch.arange(case.B, dtype=torch.int32) * 3
    selection, variance = indexed(case, start=0, lengths=lengths)
    for b, rows in enumerate(as_sets(selection)):
        for t, chosen in enumerate(rows):
            assert max(chosen, default=-1) < min(3 * b, t + 1)
            assert t < 3 * b or not chosen
    assert not variance[torch.arange(case.L) >= lengths[:, None]].any()


@given(indexed_selection_cases("float32", Limits()))
def test_width_depends_on_sizes_only(case):
    selection, _ = indexed(case)
    assert selection.indices.shape == (case.B, case.L, min(case.k_max, case.S))


@pytest.mark.property(51)
def test_no_gradient_flows_through_indices():
    """Positions are integers, so the indexer can learn from a loss on its scores only."""
    q_idx = torch.randn(1, 6, 2, 4, requires_grad=True)
    selection = select_tokens(
        gsa_ref.indexer_scores(q_idx, torch.randn(1, 6, 4), torch.randn(1, 6, 2), torch.zeros(2), scale=0.5),
        torch.full((1, 6), 3, dtype=torch.int32),
    )
    assert not selection.indices.requires_grad
    assert not selection.counts.requires_grad
