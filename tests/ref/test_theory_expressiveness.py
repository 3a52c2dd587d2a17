"""A head without gates is one fixed matrix; a gate breaks that, and never leaves the row space of W_O."""

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gsa_ref.equations import sigmoid
from gsa_ref.theory import expressiveness as theory

GATES = [(), ("W_Vg",), ("W_Og",), ("W_Vg", "W_Og")]


class Head:
    """A random head of width d_h in a model of width d, and causal attention weights over L tokens."""

    def __init__(self, seed: int, d: int, d_h: int, L: int) -> None:
        rng = np.random.default_rng(seed)
        self.d_h = d_h
        self.weights = {name: rng.standard_normal((d, d_h)) / np.sqrt(d) for name in ("W_V", "W_Vg", "W_Og")}
        self.W_O = rng.standard_normal((d_h, d)) / np.sqrt(d_h)
        e = np.tril(np.exp(rng.standard_normal((L, L))))
        self.attention = e / e.sum(-1, keepdims=True)
        self.rng = rng

    def matrices(self, gates: tuple[str, ...]) -> dict[str, Any]:
        return {"W_V": self.weights["W_V"], "W_O": self.W_O, **{name: 2 * self.weights[name] for name in gates}}

    def tokens(self, *shape: int) -> np.ndarray:
        return self.rng.standard_normal((*shape, len(self.weights["W_V"])))

    def __call__(self, x: np.ndarray, gates: tuple[str, ...]) -> np.ndarray:
        return theory.head_output(x, self.attention, **self.matrices(gates))


@st.composite
def heads(draw: st.DrawFn) -> Head:
    d_h = draw(st.integers(1, 4))
    return Head(draw(st.integers(0, 2**16)), d_h + draw(st.integers(1, 6)), d_h, draw(st.integers(1, 5)))


@given(heads())
def test_an_ungated_head_is_its_fixed_matrix(head):
    x = head.tokens(3, len(head.attention))
    M = theory.fixed_matrix(head.weights["W_V"], head.W_O)
    np.testing.assert_allclose(head(x, ()), head.attention @ x @ M, rtol=0, atol=1e-13)
    assert np.linalg.matrix_rank(M) == head.d_h < len(M)


@pytest.mark.parametrize("gates", GATES)
@given(heads())
def test_outputs_stay_in_the_row_space_of_the_output_projection(gates, head):
    u = head(head.tokens(20, len(head.attention)), gates)
    assert theory.share_outside_row_space(u, head.W_O) < 1e-13
    # The retelling "gates raise the rank" would make this larger than d_h.
    assert np.linalg.matrix_rank(u.reshape(-1, u.shape[-1])) == head.d_h


def test_the_share_outside_the_row_space_sees_what_lies_outside():
    W_O = np.array([[1.0, 0.0, 0.0], [0.0, 2.0, 0.0]])
    assert theory.share_outside_row_space(np.array([[3.0, 0.0, 4.0]]), W_O) == pytest.approx(4 / 5)


@pytest.mark.parametrize("gates", GATES)
@given(heads())
def test_the_head_adds_up_if_and_only_if_it_has_no_gate(gates, head):
    x, y = head.tokens(2, len(head.attention))
    error = np.abs(head(x + y, gates) - head(x, gates) - head(y, gates)).max()
    assert (error < 1e-12) == (gates == ())


@pytest.mark.parametrize("gates", GATES)
@given(heads())
def test_no_fixed_matrix_beats_the_bound_at_x_and_minus_x(gates, head):
    L = len(head.attention)
    x = head.tokens(L)
    u_plus, u_minus = head(x, gates), head(-x, gates)
    bound = theory.smallest_linear_error(u_plus, u_minus)
    assert (bound > 1e-6) == (gates != ())
    # The best matrix for these two inputs alone, over whole sequences.
    pair, outputs = np.stack([x, -x]).reshape(2, -1), np.stack([u_plus, u_minus]).reshape(2, -1)
    best = pair @ np.linalg.pinv(pair) @ outputs
    worst = np.linalg.norm(outputs - best, axis=-1).max()
    assert worst == pytest.approx(bound, abs=1e-12)  # so the bound is tight
    other = pair @ head.rng.standard_normal((pair.shape[1], outputs.shape[1]))
    assert np.linalg.norm(outputs - other, axis=-1).max() >= bound


@given(st.floats(-30, 30))
def test_the_best_number_for_one_channel_is_a_half_with_the_stated_error(c):
    x = np.array([1.0, -1.0])
    target, error = theory.one_channel(x, c), theory.one_channel_error(c)
    np.testing.assert_allclose(target, [1, -1] * sigmoid(np.array([c, -c])), rtol=1e-15)
    m = np.linalg.lstsq(x[:, None], target, rcond=None)[0][0]
    assert m == pytest.approx(0.5, abs=1e-15)
    np.testing.assert_allclose(np.abs(target - m * x), error, atol=1e-15)
    assert min(np.abs(target - n * x).max() for n in np.linspace(-1, 2, 301)) == pytest.approx(error, abs=1e-15)


def test_one_channel_is_a_head():
    x, one = np.linspace(-3, 3, 7)[:, None], np.ones((1, 1))
    u = theory.head_output(x, np.eye(7), one, one, W_Vg=4 * one)
    np.testing.assert_array_equal(u, theory.one_channel(x, 4.0))


@pytest.mark.parametrize("gates", GATES)
@given(heads())
def test_the_jacobian_is_that_of_finite_differences(gates, head):
    matrices = head.matrices(gates)
    x, step, one = head.tokens(1)[0], 1e-6, np.ones((1, 1))
    near = x + step * np.eye(len(x)), x - step * np.eye(len(x))
    outputs = [np.stack([theory.head_output(row[None], one, **matrices)[0] for row in side]) for side in near]
    numeric = (outputs[0] - outputs[1]) / (2 * step)
    np.testing.assert_allclose(theory.jacobian(x, **matrices), numeric, atol=1e-8)


@pytest.mark.parametrize(("gates", "directions"), [((), 1), (("W_Vg",), 2), (("W_Og",), 2), (("W_Vg", "W_Og"), 3)])
@given(st.integers(0, 2**16), st.integers(1, 3))
def test_gates_add_input_directions_and_no_output_direction(gates, directions, seed, d_h):
    head = Head(seed, 3 * d_h + 2, d_h, 1)
    slopes = [theory.jacobian(x, **head.matrices(gates)) for x in head.tokens(12)]
    assert all(np.linalg.matrix_rank(J, tol=1e-9) <= d_h for J in slopes)
    assert np.linalg.matrix_rank(np.hstack(slopes), tol=1e-9) == directions * d_h  # of inputs that matter
    assert np.linalg.matrix_rank(np.vstack(slopes), tol=1e-9) == d_h  # of outputs that occur


@pytest.mark.parametrize("gates", GATES)
def test_least_squares_recovers_an_ungated_head_and_leaves_a_gap_on_a_gated_one(gates):
    head = Head(5, 8, 4, 2)
    x = head.tokens(400, 2)
    gap = theory.linear_gap(x, head(x, gates))
    if gates:
        assert 0.1 < gap < 0.9
    else:
        assert gap < 1e-13


def test_a_gate_that_does_not_see_the_input_stays_linear():
    """It is the dependence on the input that breaks linearity, not the sigmoid."""
    head = Head(5, 8, 4, 3)
    x = head.tokens(100, 3)
    constant = theory.head_output(x, head.attention, head.weights["W_V"], head.W_O, W_Vg=np.zeros((8, 4)))
    np.testing.assert_allclose(constant, head(x, ()) / 2, rtol=1e-14)
    assert theory.linear_gap(x, constant) < 1e-13


def test_the_gap_is_refused_where_any_outputs_could_be_matched():
    x = np.random.default_rng(0).standard_normal((24, 3, 8))
    with pytest.raises(ValueError, match="x: expected more than L·d = 24 sequences, got 24"):
        theory.linear_gap(x, x)
