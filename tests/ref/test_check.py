"""The judges themselves: bounds that are bounds, a certificate that is exact, budgets that refuse."""

import itertools
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gsa_ref import check, equations
from gsa_ref.cases import DTYPES, IndexerCase, Limits, gate_cases, indexer_cases
from tests.strategies import SEEDS

F32 = np.float32


# --- roundoff -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES.values())
def test_unit_roundoff_is_where_one_plus_u_stops_being_one(dtype):
    u, one = check.unit_roundoff(dtype), torch.ones((), dtype=torch.float64)
    assert (one + u).to(dtype) == 1
    assert (one + 1.01 * u).to(dtype) > 1


def test_gamma_bounds_n_roundings():
    assert check.gamma(0) == 0
    assert check.gamma(1000) > (1 + 2.0**-24) ** 1000 - 1 > 0.999 * check.gamma(1000)


# --- scores -------------------------------------------------------------------------------------------------------


def running_sum(values: np.ndarray) -> F32:
    """In float32, one after another."""
    return np.cumsum(values.astype(F32), dtype=F32)[-1] if len(values) else F32(0)


def blocked_sum(values: np.ndarray) -> F32:
    return running_sum(np.array([running_sum(block) for block in np.array_split(values, -(-len(values) // 8))]))


ORDERS: dict[str, Callable[[np.ndarray, np.random.Generator], F32]] = {
    "forward": lambda x, _: running_sum(x),
    "backward": lambda x, _: running_sum(x[::-1]),
    "shuffled": lambda x, rng: running_sum(rng.permutation(x)),
    "blocks": lambda x, _: blocked_sum(x),
}


def sigmoid32(x: F32, mode: str, rng: np.random.Generator) -> F32:
    """With the largest errors that its parts may have: exp (4 + |x|)u and the division 4u, or tanh.approx 2^-11."""
    u, sign = 2.0**-24, rng.choice((-1, 1), 2)
    if mode == "approximate":
        return F32(0.5) + F32(0.5) * F32(np.tanh(np.float64(x) / 2) * (1 - 2.0**-11))
    e = F32(np.exp(-abs(np.float64(x))) * (1 + sign[0] * (4 + abs(np.float64(x))) * u))
    return F32((1.0 if x >= 0 else e) / np.float64(F32(1) + e) * (1 + sign[1] * 4 * u))


@settings(max_examples=60)
@given(
    SEEDS,
    st.sampled_from((1, 4, 20, 64, 128)),
    st.integers(1, 4),
    st.sampled_from((1e-3, 1.0, 5.0, 30.0)),
    st.sampled_from(sorted(ORDERS)),
    st.sampled_from(("exact", "approximate")),
    st.booleans(),
    st.booleans(),
)
def test_float32_scores_in_any_order_lie_within_the_tolerance(seed, d_I, H_I, size, order, mode, cancel, scale_first):
    """The bound holds for every way to add, also when the bias cancels the inner product."""
    rng = np.random.default_rng(seed)
    q, k = (size * rng.standard_normal(shape).astype(F32) for shape in ((1, H_I, d_I), (1, d_I)))
    head_logits, bias = (4 * rng.standard_normal(shape).astype(F32) for shape in ((1, H_I), (H_I,)))
    scale = d_I**-0.5
    if cancel:
        bias = (-scale * (q[0] @ k[0])).astype(F32)
    total = F32(0)
    for j in rng.permutation(H_I):
        left = q[0, j] * F32(scale) if scale_first else q[0, j]
        z = ORDERS[order](left * k[0], rng) * F32(1 if scale_first else scale) + bias[j]
        total = total + sigmoid32(head_logits[0, j], mode, rng) * sigmoid32(z, mode, rng)
    gold = equations.indexer_scores(q, k, head_logits, bias, scale=scale)
    tolerance = check.score_tolerance(q, k, head_logits, bias, scale=scale, sigmoid_mode=mode)
    assert check.score_verdict(np.array([[total]]), gold, tolerance)


@given(indexer_cases("float32", Limits()))
def test_the_tolerance_is_small_where_the_scores_are_well_conditioned(case: IndexerCase):
    """Below a thousandth of the range unless inner products are huge; a bound that admits anything bounds nothing."""
    arguments = case.arguments()
    q, k, w = (arguments[name][0].double().numpy() for name in ("q_idx", "k_idx", "head_logits"))
    tolerance = check.score_tolerance(q, k, w, arguments["bias"].numpy(), scale=case.scale)
    assert tolerance.shape == (case.L, case.S)
    assert (tolerance > 0).all()
    if case.values != "huge":
        assert (tolerance <= 1e-3 * case.H_I).all()


def test_quantisation_adds_to_the_tolerance():
    x = np.ones((1, 1, 4)), np.ones((3, 4)), np.ones((1, 1)), np.ones(1)
    plain = check.score_tolerance(*x, scale=0.5)
    np.testing.assert_allclose(check.score_tolerance(*x, scale=0.5, quantisation=0.25), plain + 0.25, rtol=1e-15)
    assert (check.score_tolerance(*x, scale=0.5, sigmoid_mode="approximate") > plain).all()


GOLD = np.array([[0.5, -np.inf, np.nan]])


@pytest.mark.parametrize(
    ("scores", "passed"),
    [
        ([[0.5, -np.inf, np.nan]], True),
        ([[0.6, -np.inf, np.nan]], True),
        ([[0.61, -np.inf, np.nan]], False),
        ([[0.5, 0.0, np.nan]], False),
        ([[0.5, np.inf, np.nan]], False),
        ([[0.5, np.nan, np.nan]], False),
        ([[0.5, -np.inf, 0.0]], False),
        ([[np.nan, -np.inf, np.nan]], False),
        ([[-np.inf, -np.inf, np.nan]], False),
        ([[0.5]], False),
    ],
)
def test_score_verdict_compares_values_infinities_nan_and_shape(scores, passed):
    assert check.score_verdict(np.array(scores), GOLD, np.full((1, 3), 0.1 + 1e-12)).passed == passed


def test_score_verdict_of_nothing_passes():
    assert check.score_verdict(np.full((1, 2), -np.inf), np.full((1, 2), -np.inf), np.ones((1, 2)))


# --- variance and budget ------------------------------------------------------------------------------------------


def lanes_sum(x: np.ndarray) -> F32:
    """Sixteen running sums, added up at the end: the coarsest blocking that the bound allows."""
    padded = np.concatenate([x, np.zeros(-len(x) % 16, F32)]).reshape(-1, 16)
    return running_sum(np.cumsum(padded, axis=0, dtype=F32)[-1])


def two_passes(x: np.ndarray) -> float:
    n = F32(len(x))
    deviation = x - lanes_sum(x) / n
    return float(lanes_sum(deviation * deviation) / n)


def merged_tiles(x: np.ndarray) -> float:
    """Chan's formula over tiles of 32."""
    n, mean, m2 = 0, F32(0), F32(0)
    for i in range(0, len(x), 32):
        tile = x[i : i + 32]
        tile_mean = lanes_sum(tile) / F32(len(tile))
        deviation = tile - tile_mean
        delta, total = tile_mean - mean, n + len(tile)
        mean = mean + delta * F32(len(tile) / total)
        m2 = m2 + lanes_sum(deviation * deviation) + delta * delta * F32(n * len(tile) / total)
        n = total
    return float(m2 / F32(n))


@given(
    SEEDS,
    st.integers(1, 3000),
    st.sampled_from((0.0, 0.5, 4.0, 1000.0)),
    st.sampled_from((0.0, 1e-6, 1e-3, 1.0)),
    st.sampled_from((0.0, 1e-6, 1e-2)),
    st.sampled_from((two_passes, merged_tiles)),
)
def test_float32_variance_of_perturbed_scores_lies_in_the_interval(seed, n, mean, std, epsilon, method):
    rng = np.random.default_rng(seed)
    scores = (mean + std * rng.standard_normal(n)).astype(F32)
    gold_scores = scores.astype(np.float64) + epsilon * rng.uniform(-1, 1, n)
    tolerance = np.abs(scores - gold_scores).max(keepdims=True)
    low, high = check.variance_interval(
        equations.score_variance(gold_scores[None]), tolerance, np.abs(gold_scores).max(keepdims=True), np.array([n])
    )
    assert low[0] <= method(scores) <= high[0]


@given(st.floats(1e-6, 1), st.floats(0, 1e-3), st.floats(0, 4), st.integers(1, 10**6))
def test_the_variance_interval_holds_the_extremes_that_the_tolerance_allows(std, tolerance, largest, n):
    """Two scores at mean ± std, each moved by ±ε: the standard deviation moves by exactly ε."""
    low, high = check.variance_interval(np.array([std**2]), np.array([tolerance]), np.array([largest]), np.array([n]))
    assert low[0] <= max(std - tolerance, 0) ** 2
    assert high[0] >= (std + tolerance) ** 2
    assert high[0] - low[0] <= 5 * (std + 1) * (tolerance + (n / 16 + 24) * 2.0**-22 * (largest + std))


@given(
    st.floats(2.0**-30, 1, width=32),
    st.sampled_from((0.0, 1e-4, 0.01, 1.0)),
    st.floats(0, 1e-2),
    st.floats(0, 1),
    st.sampled_from(("proportional", "inverse", "fixed")),
)
def test_the_budget_interval_holds_the_budget_of_every_variance_inside(variance, mean, tolerance, where, rule):
    """In float32, as PyTorch and the kernels compute it."""
    sizes = {"k_base": 100, "k_min": 3, "k_max": 900, "rule": rule}
    row = np.array([variance]), np.array([tolerance]), np.array([1.0])
    n = np.array([800])
    low, high = check.budget_interval(*row, mean, n, **sizes)
    v_low, v_high = check.variance_interval(*row, n)
    v = F32(min(max(v_low[0] + where * (v_high[0] - v_low[0]), v_low[0]), v_high[0]))
    with np.errstate(divide="ignore"):
        ratio = {"proportional": v / F32(mean), "inverse": F32(mean) / v, "fixed": F32(1)}[rule] if mean else F32(1)
    k = int(min(max(F32(100) * ratio, 3), 900))
    assert low[0] <= min(k, 800) <= high[0]


@given(st.integers(4, 800), st.floats(2.0**-20, 1, width=32), st.sampled_from((0, 1)))
def test_the_budget_interval_is_wide_enough_for_float32_at_its_very_ends(k, mean, end):
    """A variance at one end of its interval, and where k_base·V/V̄ is an integer up to rounding."""
    v = F32(k * mean / 100)
    exact = np.array([0.0])
    variance = v / check.variance_interval(np.array([1.0]), exact, exact, np.array([800]))[end]
    low, high = check.budget_interval(
        variance, exact, exact, mean, np.array([800]), k_base=100, k_min=3, k_max=900, rule="proportional"
    )
    assert low[0] <= int(F32(100) * (v / F32(mean))) <= high[0]


def test_the_budget_interval_closes_when_nothing_is_uncertain():
    for variance, expected in ((0.5, 50), (1.004, 100), (2.0, 200)):
        row = np.array([variance + 1e-4]), np.array([0.0]), np.array([0.0])
        low, high = check.budget_interval(
            *row, 1.0, np.array([1000]), k_base=100, k_min=1, k_max=900, rule="proportional"
        )
        assert low.tolist() == high.tolist() == [expected]


# --- top-k certificate --------------------------------------------------------------------------------------------

GRID = st.sampled_from((-0.5, -0.25, 0.0, 0.25, 0.5, -math.inf, math.nan))
EPSILON = st.sampled_from((0.0, 0.125, 0.25))


def selected(scores: np.ndarray, k: int) -> tuple[int, ...]:
    """The selection rule in one line: higher score, then lower position; NaN last, −inf never."""
    rank = [(np.isnan(s), 0.0 if np.isnan(s) else -s, i) for i, s in enumerate(scores) if s != -np.inf]
    return tuple(sorted(i for _, _, i in sorted(rank)[:k]))


@settings(max_examples=150)
@given(st.lists(st.tuples(GRID, EPSILON), min_size=1, max_size=4), st.integers(0, 5))
def test_the_certificate_accepts_exactly_what_some_admissible_scores_select(row, budget):
    """Necessary and sufficient, by brute force: every set of κ positions, every score moved by −ε, −ε/2, 0, ε/2, ε."""
    scores, epsilon = (np.array(x) for x in zip(*row, strict=True))
    possible = {
        selected(scores + epsilon * np.array(signs), budget)
        for signs in itertools.product((-1, -0.5, 0, 0.5, 1), repeat=len(row))
    }
    kappa = min(budget, int((scores != -np.inf).sum()))
    for chosen in itertools.combinations(range(len(row)), kappa):
        indices = np.array([*chosen, *[-1] * (len(row) - kappa)])
        certificate = check.topk_certificate(indices, kappa, scores, epsilon, budget)
        assert bool(certificate) == (chosen in possible), (chosen, certificate.reason)


@pytest.mark.parametrize(
    ("indices", "count", "reason"),
    [
        ([0, 2, -1], 2, ""),
        ([0, 2, -1], 1, "count is 1, expected 2"),
        ([0, 2, 3], 3, "count is 3, expected 2"),
        ([0], 2, "1 slots cannot hold 2 positions"),
        ([0, 2, 0], 2, "tail holds 0, expected −1"),
        ([-1, 2, -1], 2, "position outside [0, 5) in [-1, 2]"),
        ([0, 5, -1], 2, "position outside [0, 5) in [0, 5]"),
        ([0, 4, -1], 2, "position 4 is masked"),
        ([2, 0, -1], 2, "positions are not strictly ascending: [2, 0]"),
        ([2, 2, -1], 2, "positions are not strictly ascending: [2, 2]"),
        ([0, 1, -1], 2, "left out position 2 (score 3.0), kept 1 (score 1.0)"),
        ([2, 3, -1], 2, "left out position 0 (score 2.0), kept 3 (score 2.0)"),
    ],
)
def test_the_certificate_names_the_violated_condition(indices, count, reason):
    scores = np.array([2.0, 1.0, 3.0, 2.0, -np.inf])
    certificate = check.topk_certificate(np.array(indices), count, scores, 0.0, 2)
    assert certificate.reason == reason
    assert bool(certificate) == (reason == "")


def test_a_nan_tolerance_at_a_nan_score_excuses_nothing():
    """Bounds computed from a NaN key are NaN: the other keys are still judged by their own."""
    scores, epsilon = np.array([1.0, 2.0, 3.0, np.nan]), np.array([0.1, 0.1, 0.1, np.nan])
    accepted = [
        chosen
        for chosen in itertools.combinations(range(4), 2)
        if check.topk_certificate(np.array(chosen), 2, scores, epsilon, 2)
    ]
    assert accepted == [(1, 2)]
    assert check.topk_certificate(np.arange(4), 4, scores, epsilon, 9)


def test_the_certificate_counts_what_rounding_may_decide():
    scores = np.array([1.0, 0.5, 0.5 + 2**-10, 0.5 - 2**-10, 0.2, -np.inf])
    certificate = check.topk_certificate(np.array([0, 2]), 2, scores, 2**-10, 2)
    assert certificate
    assert certificate.near_threshold == 3
    assert check.topk_certificate(np.array([0, 2]), 2, scores, 0.0, 2).near_threshold == 1


# --- tolerances of attention and gates ----------------------------------------------------------------------------


def online_softmax(
    q: np.ndarray, k: np.ndarray, v: np.ndarray, tile: int, dtype: torch.dtype
) -> tuple[np.ndarray, F32]:
    """One query over tiles of keys: float32 throughout, but weights rounded to `dtype` before they meet v."""
    running_max, total, acc = F32(-np.inf), F32(0), np.zeros(v.shape[1], F32)
    for i in range(0, len(k), tile):
        logits = np.array([running_sum(key * q) for key in k[i : i + tile]]) * F32(len(q) ** -0.5)
        new_max = max(running_max, logits.max())
        rescale, p = np.exp(running_max - new_max), np.exp(logits - new_max)
        total = total * rescale + running_sum(p)
        rounded = torch.from_numpy(p).to(dtype).float().numpy()
        acc = acc * rescale + np.array([running_sum(rounded * channel) for channel in v[i : i + tile].T])
        running_max = new_max
    return acc / total, running_max + np.log(total)


@given(
    SEEDS,
    st.integers(1, 80),
    st.sampled_from((2, 8, 64)),
    st.sampled_from((16, 64)),
    st.sampled_from((0.1, 1.0, 4.0)),
    st.sampled_from((torch.float32, torch.bfloat16, torch.float16)),
)
def test_online_softmax_in_float32_lies_within_the_attention_tolerance(seed, n, d_h, tile, size, dtype):
    rng = np.random.default_rng(seed)
    rounded = [torch.from_numpy(size * rng.standard_normal((m, d_h))).to(dtype).float().numpy() for m in (1, n, n)]
    q, k, v = rounded[0], rounded[1], rounded[2] / F32(size)
    v = torch.from_numpy(v).to(dtype).float().numpy()
    out, lse = online_softmax(q[0], k, v, tile, dtype)
    out = torch.from_numpy(out).to(dtype).double().numpy()
    wide = [x.astype(np.float64)[:, None] for x in (q, k, v)]
    gold_out, gold_lse = equations.sparse_attention(*wide, [np.arange(n)])
    out_tolerance, lse_tolerance = check.attention_tolerance(*wide, [np.arange(n)], dtype)
    assert (np.abs(out - gold_out[0, 0]) <= out_tolerance[0, 0]).all()
    assert abs(float(lse) - gold_lse[0, 0]) <= lse_tolerance[0, 0]


def test_the_attention_tolerance_of_an_empty_row_is_zero():
    x = np.ones((1, 1, 2))
    assert not any(bound.any() for bound in check.attention_tolerance(x, x, x, [np.array([], int)], torch.float32))


@given(gate_cases("float32", Limits()), st.sampled_from((torch.float32, torch.float16, torch.bfloat16)))
def test_gates_in_float32_lie_within_the_gate_tolerance(case, dtype):
    x, gate = (t.to(dtype).float() for t in case.arguments())
    out = (x * torch.sigmoid(gate)).to(dtype).double().numpy()
    gold = equations.apply_gate(x.numpy(), gate.numpy())
    assert (np.abs(out - gold) <= check.gate_tolerance(gold, gate.double().numpy(), dtype)).all()


# --- error budget of outputs --------------------------------------------------------------------------------------


def verdict(output: object, baseline: object, gold: object, **options: Any) -> check.Verdict:
    return check.error_budget(*(np.array(x, np.float64) for x in (output, baseline, gold)), torch.float32, **options)


def test_an_output_twice_as_wrong_as_pytorch_passes_and_a_worse_one_does_not():
    gold, u = np.array([1.0, -2.0, 4.0, 0.0]), 2.0**-24
    baseline = gold + 100 * u * np.array([1, -1, 1, 1])
    assert verdict(gold + 2 * (baseline - gold), baseline, gold)
    assert verdict(gold + 2.05 * (baseline - gold), baseline, gold)  # the floor of 2u·max|gold| = 8u
    assert not verdict(gold + 2.1 * (baseline - gold), baseline, gold)
    assert verdict(gold + 3 * (baseline - gold), baseline, gold, factor=3.0)


def test_the_mean_error_has_a_budget_of_its_own():
    """The largest error alone would let every element be as wrong as the worst one of PyTorch."""
    gold, u = np.ones(100), 2.0**-24
    baseline = gold.copy()
    baseline[0] += 100 * u
    assert verdict(baseline, baseline, gold)
    assert not verdict(gold + 90 * u, baseline, gold)


def test_the_cap_holds_whatever_the_baseline_loses():
    assert verdict([1.3], [1.2], [1.0])
    assert not verdict([1.3], [1.2], [1.0], cap=0.1)


def test_a_proven_tolerance_helps_where_pytorch_is_exact_by_luck():
    gold, far = [1.0, 1.0], [1.0, 1.0 + 2.0**-20]
    assert not verdict(far, gold, gold)
    assert verdict(far, gold, gold, tolerance=2.0**-20)
    assert verdict(far, gold, gold, tolerance=np.array([0.0, 2.0**-20]))
    assert not verdict(far, gold, gold, tolerance=np.array([2.0**-20, 0.0]))
    assert not verdict(far, gold, gold, tolerance=2.0**-21)


@pytest.mark.parametrize("special", [math.nan, math.inf, -math.inf])
def test_nan_and_infinities_must_lie_in_the_same_places(special):
    assert verdict([1.0, special], [1.0, special], [1.0, special])
    assert verdict([special], [special], [special])
    assert not verdict([1.0, special], [1.0, special], [1.0, 2.0])
    assert not verdict([1.0, 2.0], [1.0, special], [1.0, special])
    assert not verdict([1.0, -special], [1.0, special], [1.0, special]) or math.isnan(special)


def test_a_baseline_that_overflows_does_not_loosen_the_budget():
    assert not verdict([1.1, 1.0], [1.0, math.inf], [1.0, 1.0])


def test_another_shape_is_refused_even_where_it_would_broadcast():
    assert not verdict([[1.0]], [[1.0], [1.0]], [[1.0], [1.0]])


def test_a_verdict_says_by_how_much():
    failed = verdict([1.5, 1.0], [1.0, 1.0], [1.0, 1.0])
    assert failed.error == 0.5
    assert failed.budget == 2.0**-23
    assert "mean error 0.25" in failed.detail
