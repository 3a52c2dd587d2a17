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

from gsa_ref import Selection, check, equations, indexer_kl_loss
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


@pytest.mark.parametrize(("scale", "size"), [(0.3, 1.0), (-0.5, 1.0), (0.3, 1e4)])
def test_the_score_tolerance_is_the_sum_of_its_terms(scale, size):
    """Entry by entry, in plain numbers: a bound with a lost term or a smaller constant may hold on every sample."""
    rng = np.random.default_rng(0)
    q, k, w, b = (rng.standard_normal(shape) for shape in ((2, 3, 5), (4, 5), (2, 3), (3,)))
    q, u = size * q, 2.0**-24
    for mode, delta in (("exact", 8 * u), ("approximate", 2.0**-12)):
        tolerance = check.score_tolerance(q, k, w, b, scale=scale, sigmoid_mode=mode, quantisation=1e-5)
        for t, s in itertools.product(range(2), range(4)):
            weight = [1 / (1 + math.exp(-w[t, j])) for j in range(3)]
            expected = 1e-5 + 6 * u / (1 - 6 * u) * sum(weight)  # γ_{2 H_I}
            for j in range(3):
                products = [float(q[t, j, c] * k[s, c]) for c in range(5)]
                delta_z = abs(scale) * 9 * u / (1 - 9 * u) * sum(abs(p) for p in products)  # γ_{d_I + 4}
                delta_z += 2 * u * (abs(scale * sum(products) + b[j]) + abs(b[j]))
                expected += weight[j] * (min(delta_z / 4, 1) + delta) + delta
            assert tolerance[t, s] == pytest.approx(expected, rel=1e-9)


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
    nothing = np.full((1, 2), -np.inf)
    assert check.score_verdict(nothing, nothing, np.ones((1, 2))) == check.Verdict(True, 0.0, 0.0)


@pytest.mark.parametrize(
    ("scores", "expected"),
    [
        ([[0.5]], (False, math.inf, 0.0, "shape is [1, 1], gold [1, 3]")),
        ([[0.5, 0.0, np.nan]], (False, math.inf, 0.0, "score [0, 1] is 0.0, gold -inf")),
        ([[0.5, -np.inf, 2.0]], (False, math.inf, 0.0, "score [0, 2] is 2.0, gold nan")),
        ([[0.75, -np.inf, np.nan]], (True, 0.25, 0.25, "")),  # the bound itself is allowed
        ([[1.0, -np.inf, np.nan]], (False, 0.5, 0.25, "")),
    ],
)
def test_a_score_verdict_says_what_and_by_how_much(scores, expected):
    assert check.score_verdict(np.array(scores), GOLD, np.full((1, 3), 0.25)) == check.Verdict(*expected)


def test_a_score_verdict_reports_the_score_that_is_nearest_its_own_bound():
    """Not the largest error: a bound may be wider there."""
    verdict = check.score_verdict(np.array([[1.5, 1.25]]), np.ones((1, 2)), np.array([[1.0, 0.25]]))
    assert verdict == check.Verdict(True, 0.25, 0.25)


def test_a_score_verdict_takes_no_error_where_none_is_allowed():
    """Without a warning of NumPy, which the tests make an error."""
    ones, none = np.ones((1, 3)), np.zeros((1, 3))
    half = ones + np.array([[0, 0.5, 0]])
    assert check.score_verdict(ones, ones, none) == check.Verdict(True, 0.0, 0.0)
    assert check.score_verdict(half, ones, none) == check.Verdict(False, 0.5, 0.0)
    # 1 where nothing is allowed is more than 4 where 1 is; and an exact entry is less than any other.
    verdict = check.score_verdict(ones + np.array([[0, 4, 1]]), ones, np.array([[0.0, 1.0, 0.0]]))
    assert verdict == check.Verdict(False, 1.0, 0.0)
    assert check.score_verdict(half, ones, np.array([[0.0, 1.0, 1.0]])) == check.Verdict(True, 0.5, 1.0)


def test_the_score_tolerance_is_of_the_given_numbers_in_float64():
    """Of float16 arrays too: their products would overflow or round."""
    rng = np.random.default_rng(0)
    arrays = [(100 * rng.standard_normal(shape)).astype(np.float16) for shape in ((2, 3, 5), (4, 5), (2, 3), (3,))]
    wide = [x.astype(np.float64) for x in arrays]
    np.testing.assert_array_equal(check.score_tolerance(*arrays, scale=0.3), check.score_tolerance(*wide, scale=0.3))
    flat = [x.astype(np.float64) * 1e8 for x in arrays[:2]]  # σ moves by 1 at most
    tolerance = check.score_tolerance(*flat, *wide[2:], scale=0.3)
    weights = (1 / (1 + np.exp(-wide[2]))).sum(-1)
    rest = 3 * 8 * 2.0**-24 * (1 + weights / 3) + 6 * 2.0**-24 / (1 - 6 * 2.0**-24) * weights
    np.testing.assert_allclose(tolerance.max(-1), weights + rest, rtol=1e-9)


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


def test_the_variance_interval_is_its_formula_in_plain_numbers():
    u = 2.0**-24
    for variance, tolerance, largest, n in ((0.25, 1e-3, 2.0, 320), (1e-8, 1e-3, 0.5, 1), (4.0, 0.0, 8.0, 10**6)):
        relative = (n / 16 + 24) * u
        slack = tolerance + 2 * relative * largest
        low, high = check.variance_interval(*(np.array([x]) for x in (variance, tolerance, largest, n)))
        assert low[0] == pytest.approx(max(variance**0.5 - slack, 0) ** 2 * (1 - 2 * relative), rel=1e-9)
        assert high[0] == pytest.approx((variance**0.5 + slack) ** 2 * (1 + 2 * relative), rel=1e-9)


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


def test_the_budget_interval_leaves_room_for_two_roundings_and_no_more():
    """Ends at 3/4 of 2^-22 from where the budget turns from 49 to 50."""
    nothing, n, sizes = np.array([0.0]), np.array([800]), {"k_base": 100, "k_min": 1, "k_max": 900}
    for end, distance in ((0, 0.75 * 2.0**-22), (1, -0.75 * 2.0**-22)):
        at_one = check.variance_interval(np.array([1.0]), nothing, nothing, n)[end]
        for factor, expected in ((1.0, (49, 50)[end]), (2.0, (50, 49)[end])):
            variance = 0.5 * (1 + factor * distance) / at_one
            found = check.budget_interval(variance, nothing, nothing, 1.0, n, **sizes, rule="proportional")[end]
            assert found[0] == expected


def test_the_ends_of_the_budget_interval_are_multiplied_by_their_roundings():
    """Sizes that make the interval of V exactly [½, 3/2]; at V̄ = an end with its rounding the ratio is exactly 1."""
    row, nothing, n = np.array([1.0]), np.array([0.0]), np.array([16 * (2**22 - 24)])
    sizes = {"k_base": 2**22, "k_min": 1, "k_max": 2**26, "rule": "inverse"}
    for end, mean in ((0, 1.5 * (1 + 2.0**-22)), (1, 0.5 * (1 - 2.0**-22))):
        assert check.budget_interval(row, nothing, nothing, mean, n, **sizes)[end] == 2**22


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


def test_the_certificate_counts_what_is_near_its_own_threshold():
    scores = np.array([3.0, 2.0, 1.0, 0.75, -math.inf])
    assert (
        check.topk_certificate(np.array([0, 1]), 2, scores, 0.25, 2).near_threshold == 1
    )  # 2 alone: the κ-th score from above
    assert check.topk_certificate(np.array([0, 1, 2]), 3, scores, 0.25, 3).near_threshold == 2  # 0.75 is within 2ε of 1
    far = np.array([3.0, 2.0, 1.0, 0.4, -math.inf])  # 0.6 off: within 3ε of 1, not within 2ε
    assert check.topk_certificate(np.array([0, 1, 2]), 3, far, 0.25, 3).near_threshold == 1
    tail = check.topk_certificate(np.array([0, 1, 7, -1]), 2, scores, 0.25, 2)
    assert tail.reason == "tail holds 7, expected −1"
    assert check.topk_certificate(np.array([0, 1, -1, 7]), 2, scores, 0.25, 2).reason == "tail holds 7, expected −1"


def test_the_certificate_counts_what_rounding_may_decide():
    scores = np.array([1.0, 0.5, 0.5 + 2**-10, 0.5 - 2**-10, 0.2, -np.inf])
    certificate = check.topk_certificate(np.array([0, 2]), 2, scores, 2**-10, 2)
    assert certificate
    assert certificate.near_threshold == 3
    assert check.topk_certificate(np.array([0, 2]), 2, scores, 0.0, 2).near_threshold == 1


def test_a_tolerance_of_few_bits_counts_as_the_numbers_that_it_holds():
    """Twice 40000 is no number of float16; 131008 lies further from the threshold than that."""
    scores, tolerance = np.array([65504.0, -65504.0]), np.full(2, 40000.0, np.float16)
    assert check.topk_certificate(np.array([0]), 1, scores, tolerance, 1).near_threshold == 1


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


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_the_attention_tolerance_is_its_formula_in_plain_numbers(dtype):
    """Four query heads on two key heads, and rows of 0, 1, 17 and 32 keys."""
    rng = np.random.default_rng(0)
    q, k, v = (rng.standard_normal(shape) for shape in ((4, 4, 6), (40, 2, 6), (40, 2, 6)))
    selection = [np.sort(rng.permutation(40)[:n]) for n in (0, 1, 17, 32)]
    u, u32 = torch.finfo(dtype).eps / 2, 2.0**-24
    tiny = torch.finfo(dtype).smallest_normal * u  # half of the smallest subnormal

    def gamma(n: int) -> float:
        return n * u32 / (1 - n * u32)

    out, lse = check.attention_tolerance(q, k, v, selection, dtype)
    assert not out[0].any()
    assert not lse[0].any()
    for t, h in itertools.product((1, 2, 3), range(4)):
        keys, values = k[selection[t], h // 2], v[selection[t], h // 2]
        n = len(keys)
        logits = [float(key @ q[t, h]) / 6**0.5 for key in keys]
        total = sum(math.exp(x) for x in logits)
        delta = gamma(8) * max(float(np.abs(key) @ np.abs(q[t, h])) for key in keys) / 6**0.5  # γ_{d_h + 2}
        spread = max(logits) - min(logits)
        rho = math.exp(2 * delta) - 1 + (n // 16 + 3) * (6 + spread) * u32 + gamma(n + 1)
        expected = delta + rho + 4 * u32 * max(abs(math.log(total)), 1)
        assert lse[t, h] == pytest.approx(expected, rel=1e-6)
        for c in range(6):
            mean = sum(math.exp(x) / total * abs(value[c]) for x, value in zip(logits, values, strict=True))
            expected = (2 * rho + 2 * u) * mean + n * tiny * float(np.abs(values[:, c]).max())
            assert out[t, h, c] == pytest.approx(expected, rel=1e-6)


@given(gate_cases("float32", Limits()), st.sampled_from((torch.float32, torch.float16, torch.bfloat16)))
def test_gates_in_float32_lie_within_the_gate_tolerance(case, dtype):
    x, gate = (t.to(dtype).float() for t in case.arguments())
    out = (x * torch.sigmoid(gate)).to(dtype).double().numpy()
    gold = equations.apply_gate(x.numpy(), gate.numpy())
    assert (np.abs(out - gold) <= check.gate_tolerance(gold, gate.double().numpy(), dtype)).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_gate_tolerance_is_its_formula_in_plain_numbers(dtype):
    u, u32, normal = torch.finfo(dtype).eps / 2, 2.0**-24, torch.finfo(dtype).smallest_normal
    logits = np.array([0.0, 3.0, -85.0, -math.inf, math.inf])
    gold = np.array([1.5, -2.0, 1e-30, 0.0, 4.0])
    expected = [
        ((abs(g) + 11) * u32 + u + 2.0**-126 * (1 + math.exp(-g))) * abs(x) + normal * u
        for g, x in zip(logits[:3], gold[:3], strict=True)
    ]
    expected += [normal * u, u * 4 + normal * u]  # an infinite logit: 0 or x itself, rounded
    assert check.gate_tolerance(gold, logits, dtype) == pytest.approx(expected, rel=1e-9, abs=0)


# --- tolerances of gradients --------------------------------------------------------------------------------------


def random_mask(rng: np.random.Generator, L: int, S: int) -> np.ndarray:
    """What the rows run over; the first row over nothing, and the last key in no row."""
    mask = rng.random((L, S)) < 0.6
    mask[0], mask[:, -1] = False, False
    return mask


def attention_gradients(
    arrays: dict[str, np.ndarray], selected: np.ndarray, dtype: torch.dtype
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """dq, dk and dv by autograd, through masked logits."""
    q, k, v, do, dlse = (torch.from_numpy(arrays[name]).to(dtype) for name in ("q", "k", "v", "do", "dlse"))
    inputs = [x.requires_grad_() for x in (q, k, v)]
    group = q.shape[1] // k.shape[1]
    logits = torch.einsum("lhd,shd->lhs", q, k.repeat_interleave(group, 1)) * q.shape[-1] ** -0.5
    rows = torch.from_numpy(selected.any(1))
    logits = logits[rows].masked_fill(~torch.from_numpy(selected[selected.any(1)])[:, None], -torch.inf)
    out = torch.einsum("lhs,shd->lhd", logits.softmax(-1), v.repeat_interleave(group, 1))
    total = (out * do[rows]).sum() + (logits.logsumexp(-1) * dlse[rows]).sum()
    dq, dk, dv = (x.double().numpy() for x in torch.autograd.grad(total, inputs))
    return dq, dk, dv


def gradient_arrays(rng: np.random.Generator, L: int, S: int, d_h: int, size: float) -> dict[str, np.ndarray]:
    shapes = {"q": (L, 4, d_h), "k": (S, 2, d_h), "v": (S, 2, d_h), "do": (L, 4, d_h), "dlse": (L, 4)}
    return {name: (size * rng.standard_normal(shape)).astype(F32) for name, shape in shapes.items()}


def gradient_tolerance(
    arrays: dict[str, np.ndarray], selected: np.ndarray, dtype: torch.dtype = torch.float32
) -> tuple[np.ndarray, ...]:
    wide = {name: x.astype(np.float64) for name, x in arrays.items()}
    return check.attention_gradient_tolerance(
        wide["q"], wide["k"], wide["v"], selected, wide["do"], wide["dlse"], dtype
    )


@given(SEEDS, st.integers(2, 6), st.integers(2, 40), st.sampled_from((2, 16)), st.sampled_from((0.1, 1.0, 3.0)))
def test_float32_gradients_lie_within_the_gradient_tolerance(seed, L, S, d_h, size):
    rng = np.random.default_rng(seed)
    arrays, selected = gradient_arrays(rng, L, S, d_h, size), random_mask(rng, L, S)
    gold = attention_gradients(arrays, selected, torch.float64)
    rounded = attention_gradients(arrays, selected, torch.float32)
    for exact, x, tolerance in zip(gold, rounded, gradient_tolerance(arrays, selected), strict=True):
        assert tolerance.shape == x.shape
        assert (np.abs(x - exact) <= tolerance).all()
        assert (tolerance <= 2000 * 2.0**-24 * (1 + size) ** 5 * S).all()  # what admits anything bounds nothing


def test_the_gradient_tolerance_of_what_nobody_selected_is_zero_whatever_it_holds():
    rng = np.random.default_rng(0)
    arrays, selected = gradient_arrays(rng, 4, 9, 6, 1.0), random_mask(rng, 4, 9)
    dq, dk, dv = gradient_tolerance(arrays, selected)
    assert not dq[0].any()
    assert not dk[-1].any()
    assert not dv[-1].any()
    assert (dq[1:] > 0).all()
    assert (dk[selected.any(0)] > 0).all()
    for name in ("k", "v"):
        arrays[name][-1] = np.nan
    for before, after in zip((dq, dk, dv), gradient_tolerance(arrays, selected), strict=True):
        assert np.array_equal(before, after)
    assert not any(x.any() for x in gradient_tolerance(arrays, np.zeros((4, 9), bool)))


def test_the_gradient_tolerance_grows_with_the_gradient_and_the_roundoff_of_the_dtype():
    """Proportional to (do, dlse), but for subnormals; a wider dtype rounds less."""
    rng = np.random.default_rng(0)
    arrays, selected = gradient_arrays(rng, 4, 9, 6, 1.0), random_mask(rng, 4, 9)
    double = {**arrays, "do": 2 * arrays["do"], "dlse": 2 * arrays["dlse"]}
    for one, two in zip(gradient_tolerance(arrays, selected), gradient_tolerance(double, selected), strict=True):
        np.testing.assert_allclose(two, 2 * one, rtol=1e-12, atol=1e-30)
    for wide, narrow in zip(
        gradient_tolerance(arrays, selected), gradient_tolerance(arrays, selected, torch.float16), strict=True
    ):
        assert (narrow[wide > 0] > 50 * wide[wide > 0]).all()


@pytest.mark.parametrize(("dtype", "magnitude"), [(torch.float32, 1.0), (torch.float16, 1.0), (torch.float32, 0.1)])
def test_the_gradient_tolerance_is_its_formula_in_plain_numbers(dtype, magnitude):
    """Term by term: the bounds of dq, dk and dv from those of p, δ and dS."""
    rng = np.random.default_rng(1)
    arrays, selected = gradient_arrays(rng, 4, 9, 6, magnitude), random_mask(rng, 4, 9)
    q, k, v, do, dlse = (arrays[name].astype(np.float64) for name in ("q", "k", "v", "do", "dlse"))
    u, u32, scale, d_h = torch.finfo(dtype).eps / 2, 2.0**-24, 6**-0.5, 6
    tiny = torch.finfo(dtype).smallest_normal * u

    def gamma(n: int) -> float:
        return n * u32 / (1 - n * u32)

    dq, dk, dv = np.zeros(q.shape), np.zeros(k.shape), np.zeros(v.shape)
    rows = [t for t in range(4) if selected[t].any()]
    sums = gamma(2 * len(rows) + 1) + 2 * u  # over the rows, for both heads of a group
    for t, h in itertools.product(rows, range(4)):
        S_t, c = np.flatnonzero(selected[t]), h // 2
        n = len(S_t)
        logits = {s: scale * float(q[t, h] @ k[s, c]) for s in S_t}
        lse = math.log(sum(map(math.exp, logits.values())))
        p = {s: math.exp(x - lse) for s, x in logits.items()}
        delta = gamma(d_h + 2) * scale * max(float(np.abs(q[t, h]) @ np.abs(k[s, c])) for s in S_t)
        spread = max(logits.values()) - min(logits.values())
        rho = math.expm1(3 * delta) + (n / 16 + 3) * (6 + spread) * u32 + gamma(n + 1) + 8 * u32 * max(abs(lse), 1)
        out = sum(p[s] * v[s, c] for s in S_t)
        size = sum(p[s] * np.abs(v[s, c]) for s in S_t)
        wrong_delta = float((np.abs(do[t, h]) * ((2 * rho + 4 * u) * size + gamma(d_h + 1) * np.abs(out))).sum())
        wrong_delta += 2 * u32 * abs(dlse[t, h])
        for s in S_t:
            ds = p[s] * (float(do[t, h] @ v[s, c]) - (float(do[t, h] @ out) - dlse[t, h]))
            wrong_dp = (gamma(d_h) + u) * float(np.abs(do[t, h]) @ np.abs(v[s, c]))
            wrong = (rho + u) * abs(ds) + p[s] * (wrong_dp + wrong_delta) + tiny
            dq[t, h] += scale * (wrong + (gamma(n + 1) + 2 * u) * abs(ds)) * np.abs(k[s, c])
            dk[s, c] += scale * (wrong + sums * abs(ds)) * np.abs(q[t, h])
            dv[s, c] += ((rho + u + sums) * p[s] + tiny) * np.abs(do[t, h])
        dq[t, h] += tiny
    used = selected.any(0)
    for x in (dk, dv):
        x[used] += 2 * len(rows) * tiny
    for got, expected in zip(gradient_tolerance(arrays, selected, dtype), (dq, dk, dv), strict=True):
        np.testing.assert_allclose(got, expected, rtol=1e-6, atol=0)


def kl_case(rng: np.random.Generator, L: int, S: int, size: float) -> dict[str, np.ndarray]:
    shapes = {"q_idx": (L, 3, 4), "k_idx": (S, 4), "head_logits": (L, 3), "bias": (3,), "q": (L, 4, 8), "k": (S, 2, 8)}
    return {name: (size * rng.standard_normal(shape)).astype(F32) for name, shape in shapes.items()}


def kl_and_gradients(arrays: dict[str, np.ndarray], over: np.ndarray, dtype: torch.dtype, temperature: float) -> list:
    """τ · Σ_t KL and its gradients by autograd."""
    rows, S = over.any(1), over.shape[1]
    slots = np.stack([np.pad(np.flatnonzero(row), (0, S - row.sum()), constant_values=-1) for row in over])
    selection = Selection(torch.from_numpy(slots[None]).int(), torch.from_numpy(over.sum(1)[None]).int())
    x = {
        n: torch.from_numpy(a).to(dtype)[None] if n != "bias" else torch.from_numpy(a).to(dtype)
        for n, a in arrays.items()
    }
    inputs = [x[name].requires_grad_() for name in ("q_idx", "k_idx", "head_logits", "bias")]
    loss = indexer_kl_loss(*x.values(), indexer_scale=0.4, selection=selection, temperature=temperature, start=S)
    loss = loss * temperature * int(rows.sum())
    return [y.double().numpy() for y in (loss.detach(), *torch.autograd.grad(loss, inputs))]


def kl_tolerance(arrays: dict[str, np.ndarray], over: np.ndarray, temperature: float) -> dict[str, np.ndarray]:
    wide = {name: x.astype(np.float64) for name, x in arrays.items()}
    return check.kl_tolerance(**wide, over=over, indexer_scale=0.4, scale=8**-0.5, temperature=temperature)


@given(SEEDS, st.integers(2, 5), st.integers(2, 40), st.sampled_from((0.1, 1.0, 3.0)), st.sampled_from((0.1, 1.0)))
def test_float32_loss_and_gradients_lie_within_the_kl_tolerance(seed, L, S, size, temperature):
    rng = np.random.default_rng(seed)
    arrays, over = kl_case(rng, L, S, size), random_mask(rng, L, S)
    tolerance = kl_tolerance(arrays, over, temperature)
    assert list(tolerance) == ["loss", "q_idx", "k_idx", "head_logits", "bias"]
    exact = kl_and_gradients(arrays, over, torch.float64, temperature)
    rounded = kl_and_gradients(arrays, over, torch.float32, temperature)
    for gold, x, bound in zip(exact, rounded, tolerance.values(), strict=True):
        x = x.reshape(bound.shape)
        assert (np.abs(x - gold.reshape(bound.shape)) <= bound + 2.0**-24 * np.abs(x)).all()
        assert (bound <= 1e-2 * L * S * (1 + size) ** 3).all()  # what admits anything bounds nothing


def test_the_kl_tolerance_of_rows_and_keys_without_a_part_is_zero():
    rng = np.random.default_rng(0)
    arrays, over = kl_case(rng, 4, 9, 1.0), random_mask(rng, 4, 9)
    tolerance = kl_tolerance(arrays, over, 0.5)
    assert tolerance["loss"] > 0
    assert not tolerance["q_idx"][0].any()
    assert not tolerance["head_logits"][0].any()
    assert not tolerance["k_idx"][-1].any()
    assert (tolerance["k_idx"][over.any(0)] > 0).all()
    assert (tolerance["bias"] > 0).all()
    assert not any(x.any() for x in kl_tolerance(arrays, np.zeros((4, 9), bool), 0.5).values())


@pytest.mark.parametrize(
    ("size", "huge", "temperature"), [(1.0, 1, 0.5), (2.0, 1, 0.1), (0.1, 1, 3.0), (1.0, 2.0**27, 1.0)]
)
def test_the_kl_tolerance_is_its_formula_in_plain_numbers(size, huge, temperature):
    """Row by row and key by key: the teacher's ρ, the student's Λ, the loss, and the chain rule of Eq. 7."""
    rng = np.random.default_rng(2)
    arrays, over = kl_case(rng, 5, 90, size), random_mask(rng, 5, 90)
    over[1] = np.arange(90) == 3  # a row with one key
    arrays["q_idx"] *= F32(huge)
    q_idx, k_idx, w, b, q, k = (x.astype(np.float64) for x in arrays.values())
    u, indexer_scale, scale = 2.0**-24, 0.4, 8**-0.5
    L, S, H_I, d_I, H, d_h = 5, 90, 3, 4, 4, 8

    def gamma(n: int) -> float:
        return n * u / (1 - n * u)

    def sigma(x: float) -> float:
        return 1 / (1 + math.exp(-x)) if x > -700 else 0.0

    def softmax(x: list[float], delta: float) -> tuple[list[float], float, float]:
        """Weights, lse and ρ."""
        n, lse = len(x), math.log(sum(math.exp(y - max(x)) for y in x)) + max(x)
        rho = math.expm1(2 * delta) + (n // 16 + 3) * (6 + max(x) - min(x)) * u + gamma(n + 24)
        return [math.exp(y - lse) for y in x], lse, rho + 6 * u * (max(abs(max(x)), abs(min(x))) + abs(lse))

    epsilon = check.score_tolerance(q_idx, k_idx, w, b, scale=indexer_scale)  # has a test of its own
    expected = {n: np.zeros(x.shape) for n, x in (("q_idx", q_idx), ("k_idx", k_idx), ("head_logits", w), ("bias", b))}
    loss, gamma_keys, gamma_rows = 0.0, gamma(S + 32), gamma(L + 32)
    for t in range(1, L):
        keys = np.flatnonzero(over[t])
        n = len(keys)
        teachers = []
        for h in range(H):
            delta = scale * gamma(d_h + 2) * max(float(np.abs(q[t, h]) @ np.abs(k[s, h // 2])) for s in keys)
            teachers.append(softmax([scale * float(q[t, h] @ k[s, h // 2]) for s in keys], delta))
        p = [sum(weights[i] for weights, _, _ in teachers) / H for i in range(n)]
        rho = max(rho for _, _, rho in teachers)
        z = {(s, j): indexer_scale * float(q_idx[t, j] @ k_idx[s]) + b[j] for s in keys for j in range(H_I)}
        x = [sum(sigma(w[t, j]) * sigma(z[s, j]) for j in range(H_I)) / temperature for s in keys]
        delta_x = [epsilon[t, s] / temperature + 3 * u * y for s, y in zip(keys, x, strict=True)]
        student, lse, rho_x = softmax(x, max(delta_x))
        lambda_ = max(delta_x) + rho_x
        for i, s in enumerate(keys):
            log_p = math.log(p[i])
            term = rho * (abs(log_p - x[i] + lse) + 1) + delta_x[i] + lambda_ + 2.0**-21
            term += (gamma(n + 24) + 8 * u) * (abs(log_p) + abs(x[i]) + abs(lse))
            loss += temperature * p[i] * term
            g = abs(student[i] - p[i])
            wrong_g = student[i] * math.expm1(delta_x[i] + lambda_ + 4 * u * abs(x[i])) + p[i] * rho
            wrong_g += 2 * u * (student[i] + p[i])
            for j in range(H_I):
                weight, sig = sigma(w[t, j]), sigma(z[s, j])
                wrong_z = indexer_scale * gamma(d_I + 4) * float(np.abs(q_idx[t, j]) @ np.abs(k_idx[s]))
                wrong_s = min((wrong_z + 2 * u * (abs(z[s, j]) + abs(b[j]))) / 4, 1) + 16 * u
                dz = g * weight * sig * (1 - sig)
                wrong_dz = (
                    wrong_g * weight * sig * (1 - sig) + g * weight * wrong_s + (2.0**-16 + 16 * u) * dz + 2.0**-41
                )
                dw = wrong_g * sig + g * (wrong_s + gamma_keys * sig)
                expected["q_idx"][t, j] += indexer_scale * (wrong_dz + gamma_keys * dz) * np.abs(k_idx[s])
                expected["k_idx"][s] += indexer_scale * (wrong_dz + gamma_rows * dz) * np.abs(q_idx[t, j])
                expected["head_logits"][t, j] += weight * ((1 - weight) * dw + 32 * u * g * sig)
                expected["bias"][j] += wrong_dz + (gamma_keys + gamma_rows) * dz
    found = kl_tolerance(arrays, over, temperature)
    assert float(found["loss"]) == pytest.approx(loss, rel=1e-6)
    for name, bound in expected.items():
        np.testing.assert_allclose(found[name], bound, rtol=1e-6, atol=1e-30, err_msg=name)


def test_the_kl_tolerance_is_even_in_its_scales():
    """A negative scale turns signs, and no bound."""
    rng = np.random.default_rng(3)
    arrays, over = kl_case(rng, 4, 9, 1.0), random_mask(rng, 4, 9)
    wide = {name: x.astype(np.float64) for name, x in arrays.items()}
    turned = {**wide, "q_idx": -wide["q_idx"], "q": -wide["q"]}
    factors = {"over": over, "temperature": 0.5}
    plain = check.kl_tolerance(**wide, **factors, indexer_scale=0.4, scale=0.3)
    for name, x in check.kl_tolerance(**turned, **factors, indexer_scale=-0.4, scale=-0.3).items():
        np.testing.assert_allclose(x, plain[name], rtol=1e-12)


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
    half = "mean error 0.25, mean budget 1.19e-07"
    assert verdict([1.5, 1.0], [1.0, 1.0], [1.0, 1.0]) == check.Verdict(False, 0.5, 2.0**-23, half)
    assert verdict([1.0], [1.0], [1.0]) == check.Verdict(True, 0.0, 2.0**-23)
    assert verdict([math.inf], [math.inf], [math.inf]) == check.Verdict(True, 0.0, 0.0)


@pytest.mark.parametrize(
    ("output", "gold", "detail"),
    [
        ([1.0], [1.0, 1.0], "shape is [1], gold [2]"),
        ([1.0, math.nan], [1.0, 2.0], "NaN differs at (1,): got nan, gold 2.0"),
        ([1.0, math.inf], [1.0, -math.inf], "+inf differs at (1,): got inf, gold -inf"),
        ([3.0, 1.0], [-math.inf, 1.0], "−inf differs at (0,): got 3.0, gold -inf"),
    ],
)
def test_a_verdict_says_what_cannot_be_compared(output, gold, detail):
    assert verdict(output, gold, gold) == check.Verdict(False, math.inf, 0.0, detail)


def test_a_verdict_reports_the_element_that_is_nearest_its_budget_or_furthest_beyond():
    gold, proven = [1.0, 1.0, 1.0], np.array([0.5, 0.25, 0.0])
    inside = verdict([1.25, 1.1875, 1.0], gold, gold, tolerance=proven)
    assert inside == check.Verdict(True, 0.1875, 0.25)  # three quarters of its budget, the first one half
    beyond = verdict([2.0, 1.75, 1.4375], gold, gold, tolerance=np.array([0.875, 0.5, 0.25]))
    assert (beyond.error, beyond.budget) == (0.75, 0.5)  # the first has the largest error, the last the largest ratio
    nothing = verdict([0.0, 0.1875], [0.0, 0.0], [0.0, 0.0], tolerance=np.array([0.0, 0.25]))
    assert nothing == check.Verdict(True, 0.1875, 0.25)  # not the element that has no budget and no error


def test_a_baseline_that_overflows_everywhere_leaves_the_floor_alone():
    assert verdict([1.0], [math.inf], [1.0]) == check.Verdict(True, 0.0, 2.0**-23)
    failed = verdict([1.5], [math.inf], [1.0])
    assert (failed.passed, failed.error, failed.budget) == (False, 0.5, 2.0**-23)
    far = np.array([1 + 2.0**-22, 1 + 2.0**-23])  # each within its own budget, their mean not within theirs
    assert not verdict(far, [math.inf, math.inf], [1.0, 1.0], tolerance=np.array([2.0**-22, 0.0]))


def test_budgets_are_computed_in_float64_whatever_comes():
    """A tolerance in float16 would round, and an output in float16 overflow."""
    output = torch.tensor([60000.0, -60000.0], dtype=torch.float16).numpy()
    gold = -output.astype(np.float64)
    found = check.error_budget(output, output, gold, torch.float16)
    assert found.error == 120000.0
    narrow = np.zeros(2, np.float16)
    found = check.error_budget(np.ones(2), np.array([1.05, 1.0]), np.ones(2), torch.float32, tolerance=narrow)
    assert found.budget == 2 * (1.05 - 1) + 2.0**-23
