"""Every bound of `gsa_ref.theory.convergence` holds on random and on adversarial inputs; how near they come to it."""

import math

import numpy as np
import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st

from gsa_ref import equations
from gsa_ref.theory import convergence as theory

NEARLY = 0.99  # a bound is called tight if an input comes this near
ABOVE = 1 + 1e-12  # rounding


@st.composite
def pairs(draw: st.DrawFn) -> dict:
    """A query and a key: normal inputs of any size, and inputs that saturate or cancel."""
    H_I, d_I = draw(st.integers(1, 5)), draw(st.integers(1, 8))
    rng = np.random.default_rng(draw(st.integers(0, 2**16)))
    size, logit = draw(st.sampled_from((1e-3, 1.0, 1e3))), draw(st.sampled_from((0.0, 1.0, 30.0, -30.0, 1000.0)))
    q, k = size * rng.standard_normal((H_I, d_I)), size * rng.standard_normal(d_I)
    scale = draw(st.sampled_from((1.0, d_I**-0.5, -2.0)))
    bias = rng.standard_normal(H_I)
    if draw(st.booleans()):
        bias = -scale * (q @ k)  # every z is 0, where σ is steepest, up to rounding
    head_logits = logit + rng.standard_normal(H_I)
    return {"q": q, "k": k, "head_logits": head_logits, "bias": bias, "scale": scale}


def steepest(d_I: int = 8, H_I: int = 4) -> dict:
    """w → 1 and z = 0 for every head, queries along one direction that the key is orthogonal to."""
    q, k = np.zeros((H_I, d_I)), np.zeros(d_I)
    q[:, 0], k[1] = np.arange(1, H_I + 1), 3.0
    return {"q": q, "k": k, "head_logits": np.full(H_I, 9.0), "bias": np.zeros(H_I), "scale": d_I**-0.5}


def bounds_of(pair: dict) -> theory.ScoreParts:
    return theory.score_bounds(pair["q"], pair["k"], scale=pair["scale"])


@given(pairs())
def test_the_score_of_a_pair_is_that_of_the_equations(pair):
    q, k = pair["q"][None], pair["k"][None]
    gold = equations.indexer_scores(q, k, pair["head_logits"][None], pair["bias"], scale=pair["scale"])[0, 0]
    assert theory.score_gradient(**pair).value == pytest.approx(gold, rel=1e-12)


@pytest.mark.parametrize("activation", theory.ACTIVATIONS)
@given(pairs())
def test_the_gradients_are_those_of_automatic_differentiation(activation, pair):
    names = ("q", "k", "head_logits", "bias")
    q, k, head_logits, bias = (torch.tensor(pair[name], requires_grad=True) for name in names)
    phi = {"sigmoid": torch.sigmoid, "relu": torch.relu, "linear": lambda z: z}[activation]
    score = (torch.sigmoid(head_logits) * phi(pair["scale"] * (q @ k) + bias)).sum()
    found = theory.score_gradient(**pair, activation=activation)
    z = pair["scale"] * (pair["q"] @ pair["k"]) + pair["bias"]
    cancelled = abs(pair["scale"]) * (np.abs(pair["q"]) @ np.abs(pair["k"])).sum() + 1  # what rounding of z goes with
    assume(activation != "relu" or (abs(z) > 1e-12 * cancelled).all())  # at its kink rounding decides
    assert found.value == pytest.approx(score.item(), rel=1e-9, abs=1e-13 * cancelled)
    for name, gold in zip(names, torch.autograd.grad(score, (q, k, head_logits, bias)), strict=True):
        np.testing.assert_allclose(getattr(found, name), gold.numpy(), rtol=1e-6, atol=1e-12 * cancelled, err_msg=name)


@given(pairs())
def test_scores_and_gradients_stay_within_their_bounds(pair):
    found, bound = theory.score_gradient(**pair), bounds_of(pair)
    assert 0 <= found.value <= bound.value == len(pair["q"])
    assert (np.linalg.norm(found.q, axis=-1) <= bound.q * ABOVE).all()
    assert np.linalg.norm(found.k) <= bound.k * ABOVE
    for name in ("head_logits", "bias"):
        assert (getattr(found, name) >= 0).all()
        assert (getattr(found, name) <= 0.25).all()


def test_every_gradient_bound_is_reached_within_one_percent():
    pair = steepest()
    found, bound = theory.score_gradient(**pair), bounds_of(pair)
    assert (np.linalg.norm(found.q, axis=-1) > NEARLY * bound.q).all()
    assert np.linalg.norm(found.k) > NEARLY * bound.k
    assert (found.bias > NEARLY * bound.bias).all()
    matched = {**pair, "head_logits": np.zeros(4), "bias": np.full(4, 9.0)}
    assert (theory.score_gradient(**matched).head_logits > NEARLY * bound.head_logits).all()
    open_ = {**pair, "bias": np.full(4, 9.0)}
    assert theory.score_gradient(**open_).value > NEARLY * bound.value


@pytest.mark.parametrize("activation", ["relu", "linear"])
def test_without_the_inner_sigmoid_scores_and_head_weights_have_no_bound(activation):
    """A hundredfold z gives a hundredfold score and gradient; with σ both stay below their bounds."""
    pair = {**steepest(), "bias": np.full(4, 9.0), "head_logits": np.zeros(4)}
    large = {**pair, "bias": np.full(4, 900.0)}
    before, after = (theory.score_gradient(**p, activation=activation) for p in (pair, large))
    assert after.value == pytest.approx(100 * before.value)
    assert after.head_logits == pytest.approx(100 * before.head_logits)
    assert after.value > 100 * bounds_of(large).value
    assert theory.score_gradient(**large).value <= bounds_of(large).value


def test_a_saturated_sigmoid_passes_almost_nothing_on():
    """The other side of the bound: σ'(z) < e^−|z|, so a score far from the threshold hardly learns."""
    saturated = theory.score_gradient(**{**steepest(), "bias": np.full(4, 30.0)})
    assert (saturated.bias < math.exp(-30)).all()
    assert theory.score_gradient(**{**steepest(), "bias": np.full(4, 30.0)}, activation="relu").bias.min() > NEARLY


@given(st.floats(0, 5), st.floats(0, 5), st.integers(1, 4), st.integers(0, 2**16))
def test_scores_are_lipschitz_where_queries_and_keys_are_bounded(radius_q, radius_k, H_I, seed):
    """Differences of the score, between near and far points of the ball."""
    rng = np.random.default_rng(seed)
    scale, points = 0.7, []
    for spread in (1.0, 1.0, 1e-3):
        q, k = rng.standard_normal((H_I, 3)), rng.standard_normal(3)
        q *= radius_q / np.linalg.norm(q, axis=-1, keepdims=True)
        k *= radius_k / np.linalg.norm(k)
        points.append([x * spread for x in (q, k, rng.standard_normal(H_I), rng.standard_normal(H_I))])
    points.append([0.999 * x for x in points[0]])
    constant = theory.score_lipschitz(radius_q, radius_k, H_I, scale=scale)
    for other in points[1:]:
        values = [theory.score_gradient(*p, scale=scale).value for p in (points[0], other)]
        distance = math.sqrt(sum(((a - b) ** 2).sum() for a, b in zip(points[0], other, strict=True)))
        assert abs(values[0] - values[1]) <= constant * distance * ABOVE + 1e-15


def test_the_lipschitz_constant_is_reached_within_one_percent_where_the_radii_are_large():
    """Its terms for ℓ and b cannot be met at the same point as those for q and k; large radii make them small."""
    H_I, radius = 4, 30.0
    q, k = np.zeros((H_I, 2)), np.array([0.0, radius])
    q[:, 0] = radius
    g = theory.score_gradient(q, k, np.full(H_I, 9.0), np.zeros(H_I), scale=1.0)
    norm = math.sqrt(sum(float((part**2).sum()) for part in g[1:]))
    assert NEARLY < norm / theory.score_lipschitz(radius, radius, H_I, scale=1.0) <= 1


@given(st.floats(-1e6, 1e6), st.one_of(st.just(0.0), st.floats(-1e3, 1e3)))
def test_a_gate_passes_on_at_most_its_input_and_a_quarter_of_it_to_its_logit(x, logit):
    x, logit = np.array([x]), np.array([logit])
    dx, dlogit = theory.gate_gradient(x, logit)
    leaf = [torch.tensor(a, requires_grad=True) for a in (x, logit)]
    gold = torch.autograd.grad((leaf[0] * torch.sigmoid(leaf[1])).sum(), leaf)
    np.testing.assert_allclose([dx, dlogit], [g.numpy() for g in gold], rtol=1e-6, atol=1e-9)
    assert 0 <= dx <= 1
    assert abs(dlogit) <= abs(x) / 4
    if logit == 0:
        assert abs(dlogit) == abs(x) / 4  # reached exactly


@given(st.integers(0, 2**16), st.floats(0.0, 100.0), st.integers(1, 4))
def test_a_gated_value_is_lipschitz_on_a_ball(seed, radius, d_h):
    rng = np.random.default_rng(seed)
    W_V, W_g = rng.standard_normal((2, 5, d_h))
    points = rng.standard_normal((4, 5))
    points *= radius * rng.uniform(0, 1, (4, 1)) / np.linalg.norm(points, axis=-1, keepdims=True)
    values = equations.apply_gate(points @ W_V, points @ W_g)
    constant = theory.gated_value_lipschitz(W_V, W_g, radius)
    for i in range(4):
        changes, distances = (np.linalg.norm(x - x[i], axis=-1) for x in (values, points))
        assert (changes <= constant * distances * ABOVE + 1e-14).all()


def test_the_gated_values_constant_needs_its_radius_and_is_nearly_reached_at_a_large_one():
    W_V, W_g = np.array([[1.0], [0.0]]), np.array([[0.0], [1.0]])  # h₁ σ(h₂)
    for radius in (10.0, 1000.0):
        value, logit = np.array([radius]), np.zeros(1)
        slope = math.hypot(*(float(g[0]) for g in theory.gate_gradient(value, logit)))
        assert slope <= theory.gated_value_lipschitz(W_V, W_g, radius)
        assert slope >= radius / 4
    assert slope > NEARLY * theory.gated_value_lipschitz(W_V, W_g, radius)


def test_the_slope_and_curvature_of_sigma_are_its_largest():
    z = np.linspace(-20, 20, 400_001)
    slope = equations.sigmoid(z) * equations.sigmoid(-z)
    curvature = np.abs(slope * (1 - 2 * equations.sigmoid(z)))
    assert slope.max() == theory.SLOPE
    assert curvature.max() == pytest.approx(theory.CURVATURE, rel=1e-8)
    assert curvature.max() <= theory.CURVATURE * ABOVE


# ---- the indexer's loss ----------------------------------------------------------------------------------------------


class Loss:
    """The indexer's loss over L queries in θ = (ℓ, b), the head logits being the same for all of them."""

    def __init__(self, seed: int, *, L: int = 6, H_I: int = 2, temperature: float = 1.0, size: float = 1.0) -> None:
        rng = np.random.default_rng(seed)
        self.L, self.H_I, self.temperature = L, H_I, temperature
        self.q_idx, self.k_idx = size * rng.standard_normal((L, H_I, 4)), size * rng.standard_normal((L, 4))
        self.q, self.k = 3 * rng.standard_normal((L, 1, 4)), 3 * rng.standard_normal((L, 1, 4))
        self.theta = rng.standard_normal(2 * H_I)

    def arguments(self, theta: np.ndarray, rows: slice) -> tuple:
        n = len(range(*rows.indices(self.L)))
        logits = np.tile(theta[: self.H_I], (n, 1))
        return self.q_idx[rows], self.k_idx, logits, theta[self.H_I :], self.q[rows], self.k

    def options(self, rows: slice) -> dict:
        return {"indexer_scale": 0.5, "temperature": self.temperature, "start": rows.indices(self.L)[0]}

    def value(self, theta: np.ndarray, rows: slice = slice(None)) -> float:
        return equations.indexer_kl_loss(*self.arguments(theta, rows), **self.options(rows))

    def gradient(self, theta: np.ndarray, rows: slice = slice(None)) -> np.ndarray:
        _, _, dlogits, dbias = equations.indexer_kl_gradient(*self.arguments(theta, rows), **self.options(rows))
        return np.concatenate([dlogits.sum(0), dbias])

    def row(self, t: int) -> slice:
        return slice(t, t + 1)


losses = st.builds(
    Loss, st.integers(0, 2**16), temperature=st.sampled_from((0.1, 1.0)), size=st.sampled_from((0.1, 1.0, 30.0))
)


def test_the_gradient_by_theta_is_that_of_finite_differences():
    loss, step = Loss(1), 1e-5
    numeric = [(loss.value(loss.theta + e) - loss.value(loss.theta - e)) / (2 * step) for e in step * np.eye(4)]
    np.testing.assert_allclose(loss.gradient(loss.theta), numeric, rtol=1e-6, atol=1e-10)


@given(losses)
def test_the_gradient_of_a_row_stays_within_its_bound(loss):
    bound = theory.loss_gradient_bound(loss.temperature)
    for t in range(loss.L):
        assert np.abs(loss.gradient(loss.theta, loss.row(t))).max() <= bound * ABOVE


def test_the_gradient_bound_of_a_row_is_reached_within_one_percent():
    """The student is sure of a key whose σ is flat, the teacher of one whose σ is steepest."""
    k_idx, q_idx = np.array([[0.0], [40.0]]), np.ones((1, 1, 1))  # z = 0 and 40
    q, k = np.ones((1, 1, 1)), np.array([[[0.0]], [[-200.0]]])
    for temperature in (0.05, 0.02):
        *_, dbias = equations.indexer_kl_gradient(
            *(q_idx, k_idx, np.full((1, 1), 12.0), np.zeros(1), q, k),
            indexer_scale=1.0,
            temperature=temperature,
            start=1,
        )
        assert NEARLY < abs(dbias[0]) / theory.loss_gradient_bound(temperature) <= 1


@given(losses, st.integers(0, 2**16), st.sampled_from((1e-3, 1.0)))
def test_the_gradient_of_the_loss_is_lipschitz_in_head_logits_and_biases(loss, seed, distance):
    step = distance * np.random.default_rng(seed).standard_normal(loss.theta.shape)
    change = np.linalg.norm(loss.gradient(loss.theta + step) - loss.gradient(loss.theta))
    assert change <= theory.loss_smoothness(loss.H_I, loss.temperature) * np.linalg.norm(step) * ABOVE


def test_the_smoothness_constant_is_at_most_three_times_what_occurs():
    """Two heads, two keys whose scores tie: each key is at the steepest point of one head and far below the other's."""
    tau, step = 0.02, 1e-4
    q_idx, k_idx = np.eye(2)[None], np.array([[0.0, -40.0], [-40.0, 0.0]])
    arguments = q_idx, k_idx, np.full((1, 2), 9.0)
    even = np.ones((1, 1, 1)), np.zeros((2, 1, 1))  # a teacher that attends to both alike
    e = step * np.array([1.0, -1.0]) / math.sqrt(2)
    ends = [
        equations.indexer_kl_gradient(*arguments, b, *even, indexer_scale=1.0, temperature=tau, start=1)[3]
        for b in (e, -e)
    ]
    curvature = np.linalg.norm(ends[0] - ends[1]) / (2 * step)
    assert 1 / 3 < curvature / theory.loss_smoothness(2, tau) <= 1


# ---- gradient descent ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("temperature", [1.0, 0.3])
@pytest.mark.parametrize("stochastic", [False, True])
def test_descent_on_the_indexers_loss_obeys_the_bound(temperature, stochastic):
    loss, rng, steps = Loss(3, L=5, temperature=temperature), np.random.default_rng(0), 60
    smoothness = theory.loss_smoothness(loss.H_I, temperature)
    gap = loss.value(loss.theta)  # the loss is a KL divergence, so f* ≥ 0
    # One row, drawn at random, has a gradient within the bound in each of the 2·H_I entries: so has its variance.
    variance = 2 * loss.H_I * theory.loss_gradient_bound(temperature) ** 2 if stochastic else 0.0
    step_size = theory.sgd_step_size(gap, smoothness, variance, steps)

    def gradient(theta: np.ndarray) -> np.ndarray:
        return loss.gradient(theta, loss.row(int(rng.integers(loss.L))) if stochastic else slice(None))

    iterates = theory.sgd(gradient, loss.theta, step_size=step_size, steps=steps)
    assert len(iterates) == steps
    squares = [float(loss.gradient(theta) @ loss.gradient(theta)) for theta in iterates]
    assert np.mean(squares) <= theory.sgd_bound(gap, smoothness, variance, steps, step_size)
    assert loss.value(iterates[-1]) < gap


def test_the_bound_of_descent_is_reached():
    """A parabola of the largest allowed curvature is at its minimum after one step: its squares sum to 2·M·gap."""
    M, theta, steps = 4.0, np.array([3.0]), 10
    gap = float(M / 2 * theta[0] ** 2)
    iterates = theory.sgd(lambda x: M * x, theta, step_size=1 / M, steps=steps)
    mean = np.mean([float((M * x[0]) ** 2) for x in iterates])
    bound = theory.sgd_bound(gap, M, 0.0, steps, 1 / M)
    assert mean == pytest.approx(bound)


@given(st.floats(0.1, 10), st.floats(0.1, 10), st.floats(0, 10), st.integers(1, 10**6))
def test_the_recommended_step_size_is_allowed_and_no_other_gives_a_smaller_bound(gap, smoothness, variance, steps):
    best = theory.sgd_step_size(gap, smoothness, variance, steps)
    value = theory.sgd_bound(gap, smoothness, variance, steps, best * (1 - 1e-12))
    for factor in (0.5, 0.9, 1.1, 2.0):
        if factor * best * smoothness <= 1:
            assert theory.sgd_bound(gap, smoothness, variance, steps, factor * best) >= value * (1 - 1e-9)


@pytest.mark.parametrize("step_size", [0.0, -0.1, 0.51])
def test_a_step_size_outside_the_theorem_is_refused(step_size):
    with pytest.raises(ValueError, match=r"step_size: expected a number in \(0, 1/smoothness = 0.5\], got"):
        theory.sgd_bound(1.0, 2.0, 0.0, 10, step_size)


def test_another_activation_is_refused():
    with pytest.raises(ValueError, match="activation: expected"):
        theory.score_gradient(**steepest(), activation="tanh")


# ---- the constants by hand -------------------------------------------------------------------------------------------


def test_the_constants_are_their_formulas_in_plain_numbers():
    """A smaller constant may hold on every sample, a larger one always does."""
    assert theory.score_lipschitz(2.0, 3.0, 5, scale=0.5) == pytest.approx(
        math.sqrt(5 * (0.25 * 9 + 2) + 0.25 * 25 * 4) / 4, rel=1e-12
    )
    assert theory.loss_smoothness(3, 0.5) == pytest.approx(
        3 / (32 * 0.25) + 2 / 0.5 * (1 / (6 * math.sqrt(3)) + 1 / 16), rel=1e-12
    )
    W_V, W_g = np.diag([3.0, 4.0]), np.diag([2.0, 1.0])  # spectral norms 4 and 2, Frobenius 5 and √5
    assert theory.gated_value_lipschitz(W_V, W_g, 6.0) == pytest.approx(4 * (1 + 6 * 2 / 4), rel=1e-12)
    q, k = np.array([[3.0, 4.0, 0.0], [0.0, 5.0, 12.0]]), np.array([2.0, 0.0, 0.0])
    bounds = theory.score_bounds(q, k, scale=-0.5)
    assert float(bounds.k) == pytest.approx(0.5 / 4 * (5 + 13), rel=1e-12)
    np.testing.assert_allclose(bounds.q, [0.25, 0.25], rtol=1e-12)


def test_the_best_step_is_the_smaller_of_two():
    assert theory.sgd_step_size(1.0, 4.0, 0.0, 10) == 0.25
    assert theory.sgd_step_size(1.0, 4.0, 1e-9, 1) == 0.25  # little noise: 1/M
    assert theory.sgd_step_size(1.0, 4.0, 8.0, 100) == pytest.approx(math.sqrt(2 / (4 * 8 * 100)), rel=1e-12)
    between = math.sqrt(2 / (4 * 5 * 1))  # in (1/M, 2/M)
    assert 0.25 < between < 0.5
    assert theory.sgd_step_size(1.0, 4.0, 5.0, 1) == 0.25
