"""Kernels of the top-k token selection, alone and in one step with the indexer and the budget."""

import dataclasses
import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import gsa_fast
from gsa_fast.verification.checks import gold_scores, indexed_selection_verdicts, numpy
from gsa_fast.verification.interpreter import small_tiles
from gsa_ref import GSAConfig, Selection
from gsa_ref.cases import (
    IndexedSelectionCase,
    Limits,
    SelectionCase,
    draw_scores,
    indexed_selection_cases,
    selection_cases,
)
from gsa_ref.check import topk_certificate, variance_interval
from tests.fast.helpers import (
    DTYPES,
    alone,
    assert_in_budget,
    contiguous,
    examples,
    int32,
    same,
    widely_strided,
)
from tests.strategies import ROWS_WITH_BUDGETS, SEEDS

# A row costs the interpreter about 12 ms.
LIMITS = Limits(B=2, L=4, S=24)
CASES = selection_cases("float32", LIMITS)
INDEXED = st.sampled_from(("float32", "float16")).flatmap(lambda dtype: indexed_selection_cases(dtype, LIMITS))
MANY = 2**20


def select(scores: torch.Tensor, budget: torch.Tensor, width: int | None = None) -> Selection:
    return gsa_fast.select_tokens(scores, budget, width=width, impl="triton")


def run(case: SelectionCase, device: str) -> Selection:
    return select(*case.arguments(device), width=case.width)


def choose(scores: Any, k: int, device: str) -> list[int]:
    """The selection of one row."""
    row = torch.as_tensor(scores, dtype=torch.float32, device=device).reshape(1, 1, -1)
    selection = select(row, int32([[k]], device))
    return selection.indices[0, 0, : int(selection.counts)].tolist()


def as_sets(selection: Selection) -> list[list[set[int]]]:
    """The entries before the count, per sequence and row."""
    return [
        [set(row[:n]) for row, n in zip(rows, counts, strict=True)]
        for rows, counts in zip(selection.indices.tolist(), selection.counts.tolist(), strict=True)
    ]


# --- select_tokens ------------------------------------------------------------------------------------------------


@examples(25)
@given(CASES)
def test_selection_kernel_stays_in_its_error_budget(device, case):
    """The budget is 0: given scores, the reference's selection, index for index."""
    assert_in_budget(case, device)


@examples(12)
@given(selection_cases("float32", Limits(B=1, L=3, S=44)))
def test_selection_kernel_stays_in_its_error_budget_over_several_tiles(device, case):
    with small_tiles():
        assert_in_budget(case, device)


@pytest.mark.property(19)
@examples(10)
@given(CASES)
def test_selection_passes_the_exact_certificate(device, case):
    """With ε = 0."""
    scores, budget = case.arguments(device)
    selection = run(case, device)
    for b, t in np.ndindex(case.B, case.L):
        certificate = topk_certificate(
            numpy(selection.indices[b, t]),
            int(selection.counts[b, t]),
            numpy(scores[b, t]),
            0.0,
            min(int(budget[b, t]), case.width),
        )
        assert certificate, certificate.reason


@pytest.mark.property(20)
@examples(10)
@given(CASES)
def test_count_is_the_budget_cut_to_the_row_and_the_width(device, case):
    scores, budget = case.arguments(device)
    candidates = (scores != -math.inf).sum(-1)
    assert same(run(case, device).counts, torch.minimum(budget, candidates).clamp(0, case.width).int())


@pytest.mark.property(21)
@examples(10)
@given(CASES)
def test_no_position_is_selected_twice(device, case):
    selection = run(case, device)
    assert [[len(s) for s in rows] for rows in as_sets(selection)] == selection.counts.tolist()


@pytest.mark.property(22)
@examples(10)
@given(CASES)
def test_no_future_position_is_selected(device, case):
    """With budgets for everything."""
    scores, budget = case.arguments(device)
    for rows in as_sets(select(scores, torch.full_like(budget, MANY), case.S + 1)):
        for t, chosen in enumerate(rows):
            assert max(chosen, default=-1) <= case.S - case.L + t


@pytest.mark.property(23)
@examples(10)
@given(CASES)
def test_minus_one_only_in_the_tail_and_ascending_before_it(device, case):
    selection = run(case, device)
    selection.validate(n_keys=case.S)
    for rows, counts in zip(selection.indices.tolist(), selection.counts.tolist(), strict=True):
        for row, n in zip(rows, counts, strict=True):
            assert row[:n] == sorted(row[:n])
            assert -1 not in row[:n]
            assert row[n:] == [-1] * (len(row) - n)


@pytest.mark.property(24)
@examples(12)
@given(st.floats(-1, 1, width=32), st.integers(1, 50), st.integers(0, 60), st.booleans())
def test_a_row_of_equal_scores_gives_the_lowest_positions(device, value, length, k, small):
    if small:
        with small_tiles():
            chosen = choose([value] * length, k, device)
    else:
        chosen = choose([value] * length, k, device)
    assert chosen == list(range(min(k, length)))


@pytest.mark.property(25)
@examples(10)
@given(CASES)
def test_a_strictly_monotone_map_of_the_scores_keeps_the_selection(device, case):
    """Scores replaced by their rank among the distinct values."""
    scores, budget = case.arguments(device)
    kept = ~scores.isnan() & (scores != -math.inf)
    ranks = scores.clone()
    ranks[kept] = torch.unique(scores[kept], return_inverse=True)[1].float() - 7
    assert same(select(scores, budget, case.width), select(ranks, budget, case.width))


@pytest.mark.property(26)
@examples(10)
@given(CASES, st.sampled_from(("ties", "constant", "nan")), st.integers(1, 3))
def test_a_larger_budget_selects_a_superset(device, case, values, more):
    """Where it could fail: the budget ends among ties."""
    case = dataclasses.replace(case, values=values)
    scores, budget = case.arguments(device)
    small, large = (as_sets(select(scores, b)) for b in (budget, budget + more))
    assert all(a <= b for rows in zip(small, large, strict=True) for a, b in zip(*rows, strict=True))


@pytest.mark.property(27)
@examples(10)
@given(CASES, st.integers(1, 4))
def test_rows_in_chunks_equal_all_rows_at_once(device, case, rows):
    scores, budget = case.arguments(device)
    chunks = [select(scores[:, t : t + rows], budget[:, t : t + rows], case.width) for t in range(0, case.L, rows)]
    assert same(tuple(torch.cat(parts, 1) for parts in zip(*chunks, strict=True)), run(case, device))


@pytest.mark.property(28)
@examples(4)
@given(SEEDS, st.integers(1, 4999))
def test_more_than_4096_scores_inside_one_float16_step(device, seed, k):
    """A selection by the float16 value, or by a histogram of it, cannot tell these apart."""
    scores = draw_scores("near", (5000,), torch.Generator().manual_seed(seed))
    assert len(scores.half().unique()) <= 2
    expected = sorted(np.argsort(-scores.numpy(), kind="stable")[:k].tolist())
    assert choose(scores, k, device) == expected


@pytest.mark.property(29)
@examples(12)
@given(ROWS_WITH_BUDGETS)
def test_special_scores_rank_as_the_numbers_that_they_are(device, row_and_budget):
    """By the certificate, which compares every selected score with every one that was left out."""
    row, k = row_and_budget
    chosen = choose(row, k, device)
    certificate = topk_certificate(np.array(chosen, np.int64), len(chosen), np.array(row), 0.0, k)
    assert certificate, certificate.reason


@pytest.mark.property(29)
def test_minus_zero_equals_plus_zero(device):
    assert choose([-0.0, 0.0, -0.0, 0.0], 2, device) == [0, 1]
    assert choose([0.0, -0.0, 0.0, -0.0], 3, device) == [0, 1, 2]


@pytest.mark.property(29)
def test_denormals_are_not_flushed_to_zero(device):
    assert choose([0.0, 1e-45, -1e-45, 3e-45], 2, device) == [1, 3]
    assert choose([-1e-45, 0.0, -3e-45], 2, device) == [0, 1]


@pytest.mark.property(29)
def test_infinities_are_ordinary_scores_except_minus_infinity(device):
    assert choose([1.0, math.inf, -3e38, -math.inf], 1, device) == [1]
    assert choose([1.0, math.inf, -3e38, -math.inf], 4, device) == [0, 1, 2]
    assert choose([math.inf] * 3, 2, device) == [0, 1]


@pytest.mark.property(29)
def test_nan_ranks_last_but_before_nothing(device):
    """A NaN is chosen only when every other candidate is, lowest position first; its sign is ignored."""
    scores = torch.tensor([math.nan, -3e38, -math.inf, math.nan, 5.0])
    scores[0] = torch.tensor(-1, dtype=torch.int32).view(torch.float32)  # every bit set: a negative NaN
    expected = [[], [4], [1, 4], [0, 1, 4], [0, 1, 3, 4], [0, 1, 3, 4]]
    assert [choose(scores, k, device) for k in range(6)] == expected


# --- bugs that escaped elsewhere ----------------------------------------------------------------------------------


@pytest.mark.pitfall("minus-infinity-lanes")
@examples(10)
@given(CASES, st.integers(0, 2**16))
def test_lanes_at_minus_infinity_are_never_candidates(device, case, seed):
    """Even with a budget far above the number of candidates, wherever they lie."""
    scores, budget = case.arguments(device)
    masked = torch.rand(scores.shape, generator=torch.Generator().manual_seed(seed)) < 0.5
    scores = scores.masked_fill(masked.to(device), -math.inf)
    chosen = as_sets(select(scores, torch.full_like(budget, MANY), case.S + 3))
    for b, t in np.ndindex(case.B, case.L):
        assert chosen[b][t] == set((scores[b, t] != -math.inf).nonzero()[:, 0].tolist())


@pytest.mark.pitfall("ties-at-threshold")
@examples(15)
@given(st.integers(2, 300), st.integers(0, 299), st.integers(0, 2**16))
def test_many_ties_at_the_threshold_are_settled_by_position(device, length, k, seed):
    """A few winners, and everything else tied exactly at the threshold, over several tiles."""
    winner = torch.rand(length, generator=torch.Generator().manual_seed(seed)) < 0.1
    winners = winner.nonzero()[:, 0].tolist()[:k]
    tied = (~winner).nonzero()[:, 0].tolist()
    expected = sorted(winners + tied[: max(k - int(winner.sum()), 0)])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("gsa_fast.selection.row_block", lambda S: 64)
        assert choose(winner.float(), k, device) == expected


@pytest.mark.pitfall("diagonal")
@examples(8)
@given(CASES)
def test_the_diagonal_can_be_selected(device, case):
    """A query may select its own position: the last key that it sees."""
    scores, budget = case.arguments(device)
    own = torch.arange(case.L, device=device) + case.S - case.L
    scores = scores.nan_to_num(0, posinf=1, neginf=-math.inf).clamp(max=1e30)
    scores[:, torch.arange(case.L, device=device), own] = 2e30
    selection = select(scores, torch.ones_like(budget))
    assert same(selection.indices[..., 0], own.int().expand(case.B, -1))


@pytest.mark.pitfall("int32-strides")
@pytest.mark.parametrize("axis", [0, 1, 2])
def test_strides_past_two_to_the_31_do_not_wrap(axis, device):
    """Offsets are 64-bit along every axis."""
    scores = torch.randn(3, 3, 3, generator=torch.Generator().manual_seed(axis)).to(device)
    budget = int32([[1, 2, 3]] * 3, device)
    expected = select(scores, budget)
    if axis < 2:
        budget = widely_strided((3, 3), axis, device, torch.int32).copy_(budget)
    assert same(select(widely_strided((3, 3, 3), axis, device, torch.float32).copy_(scores), budget), expected)


# --- contracts of select_tokens -----------------------------------------------------------------------------------


@examples(8)
@given(CASES)
def test_default_width_is_the_largest_budget(device, case):
    scores, budget = case.arguments(device)
    selection = select(scores, budget)
    assert selection.indices.shape[-1] == max(int(budget.max()), 1)
    wide = select(scores, budget, case.S + 3)
    assert same(selection.counts, wide.counts)
    assert as_sets(selection) == as_sets(wide)


@pytest.mark.property(9)
@pytest.mark.pitfall("transposed-input")
@examples(8)
@given(CASES)
def test_transposed_inputs_give_the_same_selection(device, case):
    """Bitwise."""
    scores, budget = case.arguments(device)
    plain = select(scores.contiguous(), budget.contiguous(), case.width)
    assert same(select(scores, budget, case.width), plain)
    assert same(select(scores.mT.contiguous().mT, budget.mT.contiguous().mT, case.width), plain)


@pytest.mark.property(57)
@pytest.mark.pitfall("reruns-differ")
@examples(6)
@given(CASES)
def test_reruns_are_bitwise_equal(device, case):
    assert same(run(case, device), run(case, device))


def test_budgets_below_one_select_nothing(device):
    selection = select(torch.ones(1, 3, 4, device=device), int32([[0, -1, -(2**31)]], device))
    assert selection.counts.tolist() == [[0, 0, 0]]
    assert (selection.indices == -1).all()


def test_a_budget_above_the_width_is_cut_to_the_width(device):
    selection = select(torch.arange(6.0, device=device)[None, None], int32([[2**31 - 1]], device), 2)
    assert (selection.indices.tolist(), selection.counts.tolist()) == ([[[4, 5]]], [[2]])


@pytest.mark.pitfall("length-zero")
@pytest.mark.parametrize(("B", "L", "S"), [(0, 3, 4), (2, 0, 4), (2, 3, 0), (0, 0, 0)])
@pytest.mark.parametrize("width", [None, 5])
def test_empty_axes_give_empty_selections(B, L, S, width, device):
    budget = torch.full((B, L), 2, dtype=torch.int32, device=device)
    selection = select(torch.ones(B, L, S, device=device), budget, width)
    assert selection.indices.shape[:2] == selection.counts.shape == (B, L)
    assert not selection.counts.any()
    assert (selection.indices == -1).all()


# --- indexed_selection --------------------------------------------------------------------------------------------


def indexed(case: IndexedSelectionCase, arguments: dict[str, Any]) -> tuple[torch.Tensor, ...]:
    """(indices, counts, variance)."""
    selection, variance = gsa_fast.indexed_selection(
        **arguments, mean_variance=case.mean_variance, config=case.config, impl="triton"
    )
    return *selection, variance


@pytest.mark.property(19)
@pytest.mark.usefixtures("bf16")
@pytest.mark.parametrize("dtype", DTYPES)
@examples(12)
@given(data=st.data())
def test_indexed_selection_kernels_stay_in_their_error_budget(dtype, data, device):
    assert_in_budget(data.draw(indexed_selection_cases(dtype, LIMITS)), device)


@pytest.mark.property(19)
@pytest.mark.usefixtures("bf16")
@pytest.mark.parametrize("dtype", DTYPES)
@examples(6)
@given(data=st.data())
def test_indexed_selection_kernels_stay_in_their_error_budget_over_several_tiles_and_chunks(dtype, data, device):
    with small_tiles():
        assert_in_budget(data.draw(indexed_selection_cases(dtype, Limits(B=2, L=9, S=44))), device)


@examples(10)
@given(INDEXED)
def test_one_step_equals_scores_variance_budget_and_selection(device, case):
    """Bitwise for the selection that the budget leads to: the same scores, the same rule."""
    arguments, c = case.arguments(device), case.config
    scores = gsa_fast.indexer_scores(**arguments, scale=case.scale, impl="triton")
    indices, counts, variance = indexed(case, arguments)
    n_valid = (scores != -math.inf).sum(-1, dtype=torch.int32)
    sizes: dict[str, Any] = {"k_base": c.k_base, "k_min": c.k_min, "k_max": c.k_max, "rule": c.rule}
    budget = gsa_fast.token_budget(variance, case.mean_variance, n_valid, **sizes, impl="triton")
    assert same(Selection(indices, counts), select(scores, budget, min(c.k_max, case.S)))


@pytest.mark.property(27)
@examples(10)
@given(INDEXED.map(lambda case: dataclasses.replace(case, start=(1,) * case.B, lengths=(case.S,) * case.B)), st.data())
def test_chunks_equal_one_shot(device, case, data):
    """One row per chunk, with a start and a length of its own for every sequence."""
    B, S = case.B, case.S
    starts, lengths = (tuple(data.draw(st.integers(0, S)) for _ in range(B)) for _ in range(2))
    arguments = dataclasses.replace(case, start=starts, lengths=lengths).arguments(device)
    whole = indexed(case, arguments)
    for chunk_bytes in (1, 4 * B * S * 2):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("gsa_fast.selection.CHUNK_BYTES", chunk_bytes)
            assert same(indexed(case, arguments), whole)


@pytest.mark.property(7)
@examples(8)
@given(indexed_selection_cases("float32", Limits(B=2, L=4, S=44)))
def test_indexed_selection_does_not_depend_on_its_tiles(device, case):
    """Both runs pass the certificate for their own budgets, which lie in one interval."""
    arguments = case.arguments(device)
    for tiles in (small_tiles(), small_tiles(32)):
        with tiles:
            indices, counts, variance = indexed(case, arguments)
        for verdict in indexed_selection_verdicts(
            arguments, case.config, case.mean_variance, Selection(indices, counts), variance, case.seed
        ):
            assert verdict, verdict


@pytest.mark.property(6, 17)
@examples(8)
@given(INDEXED)
def test_a_batch_slice_equals_the_sequence_alone_bitwise(device, case):
    arguments = case.arguments(device)
    whole = indexed(case, arguments)
    for b in range(case.B):
        assert same(indexed(case, alone(arguments, b)), tuple(x[b : b + 1] for x in whole))


@pytest.mark.property(5, 17)
@examples(10)
@given(INDEXED, st.data())
def test_future_perturbation_leaves_earlier_rows_bitwise_equal(device, case, data):
    """Neither the selection nor the budget of a row sees the future."""
    arguments = {**contiguous(case.arguments(device)), "start": case.S - case.L}
    t = data.draw(st.integers(0, case.L))
    changed = {}
    for name, first in (("q_idx", t), ("head_logits", t), ("k_idx", case.S - case.L + t)):
        changed[name] = arguments[name].clone()
        changed[name][:, first:] = math.nan
    before, after = indexed(case, arguments), indexed(case, {**arguments, **changed})
    assert same([x[:, :t] for x in before], [x[:, :t] for x in after])


@pytest.mark.property(9)
@examples(10)
@given(INDEXED.filter(lambda case: case.layout != "contiguous"))
def test_strided_inputs_of_indexed_selection_equal_contiguous_ones_bitwise(device, case):
    arguments = case.arguments(device)
    assert same(indexed(case, arguments), indexed(case, contiguous(arguments)))


@pytest.mark.property(57)
@pytest.mark.pitfall("reruns-differ")
@examples(6)
@given(INDEXED)
def test_reruns_of_indexed_selection_are_bitwise_equal(device, case):
    arguments = case.arguments(device)
    assert same(indexed(case, arguments), indexed(case, arguments))


@examples(8)
@given(INDEXED)
def test_padded_sequences_select_below_their_length_only(device, case):
    arguments = {**case.arguments(device), "start": 0}
    lengths = int32([(case.seed + 3 * b) % (case.S + 1) for b in range(case.B)], device)
    indices, counts, variance = indexed(case, {**arguments, "lengths": lengths})
    assert (indices.amax(-1) < lengths[:, None]).all()
    padding = torch.arange(case.L, device=device) >= lengths[:, None]
    assert not counts[padding].any()
    assert not variance[padding].any()
    assert (counts[~padding] > 0).all()


@pytest.mark.property(15)
def test_nearly_constant_scores_do_not_cancel_in_the_fused_variance(device):
    """In the indexer's epilogue: mean ≈ 2, std ≈ 5e-4. Σx² − (Σx)²/n would leave nothing of it."""
    g = torch.Generator().manual_seed(0)
    sizes = {"q_idx": (1, 2, 4, 16), "k_idx": (1, 200, 16), "head_logits": (1, 2, 4)}
    arguments: dict[str, Any] = {name: torch.randn(shape, generator=g).to(device) for name, shape in sizes.items()}
    arguments.update(bias=torch.zeros(4, device=device), start=198, lengths=None)
    arguments["q_idx"] *= 1e-3
    arguments["head_logits"] += 20
    config = GSAConfig(H_I=4, d_I=16, k_base=8, k_min=2, k_max=16)
    _, variance = gsa_fast.indexed_selection(**arguments, mean_variance=0.0, config=config, impl="triton")
    ((_, _, gold, tolerance),) = gold_scores(arguments, 0.25, 0)
    visible = gold != -np.inf
    n, std = visible.sum(-1), np.array([row[mask].std() for row, mask in zip(gold, visible, strict=True)])
    low, high = variance_interval(std**2, np.where(visible, tolerance, 0).max(-1), np.full(2, 4.0), n)
    assert ((low <= numpy(variance[0])) & (numpy(variance[0]) <= high)).all()
    assert (high < 1.2 * std**2).all()  # the interval is narrow enough to tell


def test_statistics_of_more_tiles_than_one_program_merges_at_a_time(device, monkeypatch):
    """A row of 33 tiles, merged two by two."""
    monkeypatch.setattr("gsa_fast.indexer.BLOCK_S", 16)
    monkeypatch.setattr("gsa_fast.selection.MAX_STATISTICS", 2)
    g = torch.Generator().manual_seed(0)
    sizes = {"q_idx": (1, 1, 1, 4), "k_idx": (1, 33 * 16 - 3, 4), "head_logits": (1, 1, 1), "bias": (1,)}
    arguments: dict[str, Any] = {name: torch.randn(shape, generator=g).to(device) for name, shape in sizes.items()}
    arguments.update(start=33 * 16 - 4, lengths=None)
    arguments["k_idx"] *= torch.linspace(0.1, 3, 33 * 16 - 3, device=device)[:, None]  # tiles differ in their variance
    config = GSAConfig(H_I=1, d_I=4, k_base=30, k_min=2, k_max=100)
    selection, variance = gsa_fast.indexed_selection(**arguments, mean_variance=0.02, config=config, impl="triton")
    for verdict in indexed_selection_verdicts(arguments, config, 0.02, selection, variance, 0):
        assert verdict, verdict


@pytest.mark.pitfall("length-zero")
@pytest.mark.parametrize(("B", "L", "S"), [(0, 3, 4), (2, 0, 4), (2, 3, 0), (0, 0, 0)])
@pytest.mark.parametrize("per_sequence", [False, True])
def test_empty_axes_give_empty_indexed_selections(B, L, S, per_sequence, device):
    sizes = {"q_idx": (B, L, 2, 4), "k_idx": (B, S, 4), "head_logits": (B, L, 2), "bias": (2,)}
    arguments: dict[str, Any] = {name: torch.ones(shape, device=device) for name, shape in sizes.items()}
    arguments["start"] = int32([0] * B, device) if per_sequence else 0
    config = GSAConfig(H_I=2, d_I=4, k_base=3, k_min=1, k_max=3)
    selection, variance = gsa_fast.indexed_selection(**arguments, mean_variance=0.1, config=config, impl="triton")
    assert selection.indices.shape == (B, L, max(min(3, S), 1))
    assert (selection.indices == -1).all()
    assert not selection.counts.any()
    assert same(variance, torch.zeros(B, L, device=device))


@pytest.mark.pitfall("all-pairs-in-memory")
def test_indexed_selection_never_allocates_as_much_as_all_scores(device, monkeypatch):
    """Its contract: chunks of CHUNK_BYTES, never an L×S array. Every allocation is seen by the profiler."""
    monkeypatch.setattr("gsa_fast.selection.shortlist_plan", lambda *_: None)
    B, L, S, chunk_bytes = 2, 24, 96, 3000
    monkeypatch.setattr("gsa_fast.selection.CHUNK_BYTES", chunk_bytes)
    sizes = {"q_idx": (B, L, 1, 4), "k_idx": (B, S, 4), "head_logits": (B, L, 1), "bias": (1,)}
    arguments: dict[str, Any] = {name: torch.ones(shape, device=device) for name, shape in sizes.items()}
    config = GSAConfig(H_I=1, d_I=4, k_base=2, k_min=1, k_max=3)
    gsa_fast.indexed_selection(**arguments, mean_variance=0.1, config=config, impl="triton")  # compiles on a GPU
    with torch.profiler.profile(profile_memory=True) as profile:
        gsa_fast.indexed_selection(**arguments, mean_variance=0.1, config=config, impl="triton")
    allocated = [event.nbytes() for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
    rows = max(1, chunk_bytes // (4 * B * S))
    assert max(allocated) >= 4 * B * rows * S  # the profiler saw the chunk
    assert max(allocated) < 4 * L * S
    assert max(allocated) <= 4 * B * rows * S + 512  # an allocator on a GPU rounds up
