"""The oracle itself: what no comparison with PyTorch shows, because both sides get the same float64 arguments."""

import dataclasses
import inspect
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from gsa_ref import GatedSparseAttention, GSAConfig, equations
from gsa_ref.equations.training import teacher, valid_positions
from tests.ref import oracle
from tests.ref.models import close_layers, hidden

CONFIG = GSAConfig(d=6, H=4, H_kv=2, d_h=4, H_I=3, d_I=4, k_base=2, k_min=1, k_max=4, rope_theta=100.0)


def draw(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng([seed, *shape]).standard_normal(shape)


# Five queries at positions 1 to 5, six keys, the last of which is padding. Query 2 selects nothing, query 0 one key.
INDEXER = {"q_idx": draw(5, 3, 4), "k_idx": draw(6, 4), "head_logits": draw(5, 3), "bias": draw(3)}
ATTENTION = {"q": draw(5, 4, 4), "k": draw(6, 2, 4)}
SELECTION = [np.array(row, np.int64) for row in ([0], [0, 1], [], [1, 3], [0, 2, 4])]
OPTIONS: dict[str, Any] = {"start": 1, "length": 5, "scale": 0.3, "temperature": 0.7}
WEIGHTS = {name: draw(*x.shape, seed=1) for name, x in GatedSparseAttention(CONFIG).state_dict().items() if x.dim()} | {
    "mean_variance": np.array(0.01)
}

# Name → the function of its floating-point arrays, which are given beside it.
CALLS: dict[str, tuple[Callable[..., Any], dict[str, np.ndarray]]] = {
    "sigmoid": (equations.sigmoid, {"x": draw(7)}),
    "apply_gate": (equations.apply_gate, {"x": draw(3, 2), "gate_logits": draw(3, 2, seed=1)}),
    "apply_rope": (lambda x: equations.apply_rope(x, start=3, theta=50.0), {"x": draw(4, 2, 6)}),
    "indexer_scores": (lambda **a: equations.indexer_scores(**a, scale=0.5), INDEXER),
    "score_variance": (equations.score_variance, {"scores": draw(3, 40)}),
    "sparse_attention": (
        lambda **a: equations.sparse_attention(**a, selection=SELECTION),
        {**ATTENTION, "v": draw(6, 2, 4, seed=1)},
    ),
    "teacher": (lambda **a: teacher(**a, positions=SELECTION), ATTENTION),
    "indexer_kl_loss": (lambda **a: equations.indexer_kl_loss(**a, indexer_scale=0.5), {**INDEXER, **ATTENTION}),
    "indexer_kl_gradient": (
        lambda **a: equations.indexer_kl_gradient(**a, indexer_scale=0.5),
        {**INDEXER, **ATTENTION},
    ),
    "gated_sparse_attention": (
        lambda h, **w: equations.gated_sparse_attention(h, w, CONFIG),
        {"h": draw(5, 6), **WEIGHTS},
    ),
}


def same(a: Any, b: Any) -> bool:
    if isinstance(a, tuple | list):
        return len(a) == len(b) and all(same(x, y) for x, y in zip(a, b, strict=True))
    return np.asarray(a).dtype == np.float64 and np.array_equal(a, b)


@pytest.mark.parametrize("name", CALLS)
def test_narrow_inputs_are_computed_in_float64(name):
    """Gold is the equations in float64 on the rounded inputs: rounded inputs must not mean rounded arithmetic."""
    function, arrays = CALLS[name]
    narrow = {n: x.astype(np.float16) for n, x in arrays.items()}
    assert same(function(**narrow), function(**{n: x.astype(np.float64) for n, x in narrow.items()}))


def with_options(function: Callable[..., Any], options: dict[str, Any]) -> Any:
    given = {n: x for n, x in options.items() if n in inspect.signature(function).parameters}
    indexer = {"indexer_scale": 0.5} | (INDEXER if "q_idx" in inspect.signature(function).parameters else {})
    known = {**indexer, **ATTENTION, "positions": SELECTION}
    return function(**{n: x for n, x in known.items() if n in inspect.signature(function).parameters}, **given)


@pytest.mark.parametrize("function", [equations.indexer_kl_loss, equations.indexer_kl_gradient, teacher])
def test_the_defaults_of_the_loss_are_those_of_its_docstring(function):
    documented = {"selection": None, "scale": 0.5, "temperature": 1.0, "start": 0, "length": 6}  # 1/√d_h and S
    assert same(with_options(function, {}), with_options(function, documented))


def test_the_defaults_of_the_other_equations_are_those_of_their_docstrings():
    x, v = draw(4, 2, 6), draw(6, 2, 4, seed=1)
    assert same(equations.apply_rope(x), equations.apply_rope(x, start=0, theta=10000.0))
    plain = equations.indexer_scores(**INDEXER, scale=0.5)
    assert same(plain, equations.indexer_scores(**INDEXER, scale=0.5, start=0, length=6))
    attention = equations.sparse_attention(**ATTENTION, v=v, selection=SELECTION)
    assert same(attention, equations.sparse_attention(**ATTENTION, v=v, selection=SELECTION, scale=0.5))
    assert same(equations.dense_attention(**ATTENTION, v=v), equations.dense_attention(**ATTENTION, v=v, start=0))
    assert [len(row) for row in valid_positions(5, 6, None)] == [1, 2, 3, 4, 5]
    assert [len(row) for row in valid_positions(7, 6, None)] == [1, 2, 3, 4, 5, 6, 0]


@pytest.mark.parametrize("selection", [None, SELECTION], ids=["warm_up", "sparse"])
@pytest.mark.parametrize("options", [OPTIONS, {"start": 3, "length": 6}, {}], ids=["all", "padded", "none"])
def test_the_gradient_by_hand_is_that_of_the_loss(selection, options):
    """Central differences, with rows that are padding and rows that select nothing."""
    arguments = {**ATTENTION, "indexer_scale": 0.4, "selection": selection, **options}
    gradient = equations.indexer_kl_gradient(**INDEXER, **arguments)
    step = 1e-5
    for (name, x), expected in zip(INDEXER.items(), gradient, strict=True):
        for i in np.ndindex(x.shape):
            moved = [x.copy(), x.copy()]
            moved[0][i] -= step
            moved[1][i] += step
            low, high = (equations.indexer_kl_loss(**{**INDEXER, name: y}, **arguments) for y in moved)
            assert (high - low) / (2 * step) == pytest.approx(expected[i], abs=1e-9)


def test_a_selection_is_int64_also_where_it_is_empty_and_wants_a_budget_for_every_row():
    rows = equations.select_tokens(np.array([[1.0, 2.0], [1.0, 2.0]]), np.array([0, 1]))
    assert [row.tolist() for row in rows] == [[], [1]]
    assert all(row.dtype == np.int64 for row in rows)
    with pytest.raises(ValueError, match="shorter"):
        equations.select_tokens(np.array([[1.0, 2.0], [1.0, 2.0]]), np.array([1]))


def test_queries_behind_the_last_key_see_all_keys():
    """As the bounds of `gsa_ref.check` ask for: nothing is masked."""
    scores = equations.indexer_scores(**INDEXER, scale=0.5, start=6, length=11)
    assert np.isfinite(scores).all()
    assert same(scores[:, 0], equations.indexer_scores(**INDEXER, scale=0.5)[:, 0])


def test_infinite_logits_give_nan_and_no_warning():
    """inf − inf is the definition's own answer, not an accident: the tests turn a warning into an error."""
    k = ATTENTION["k"].copy()
    k[0] = np.inf
    out, lse = equations.sparse_attention(np.abs(ATTENTION["q"]), k, draw(6, 2, 4, seed=1), SELECTION)
    selected = np.array([0 in row for row in SELECTION])
    assert np.isnan(out[selected]).all()
    assert np.isnan(lse[selected]).all()
    assert np.isfinite(out[~selected]).all()


@pytest.mark.parametrize(
    ("variance", "mean", "rule", "expected"),
    [
        (np.inf, np.inf, "proportional", 4),  # undefined: the ratio is 1
        (np.inf, np.inf, "inverse", 4),
        (1e300, 1e-300, "proportional", 6),  # overflows to inf, and is clamped
        (0.0, 1.0, "inverse", 6),
        (0.0, 1.0, "proportional", 2),
    ],
)
def test_extreme_variances_give_an_int32_budget_and_no_warning(variance, mean, rule, expected):
    sizes = {"k_base": 4, "k_min": 2, "k_max": 6, "rule": rule}
    budget = equations.token_budget(np.array([variance]), mean, np.array([9]), **sizes)
    assert budget.dtype == np.int32
    assert budget.tolist() == [expected]


def test_without_a_valid_row_loss_and_gradient_are_zero():
    nothing = {**ATTENTION, "indexer_scale": 0.4, "selection": [np.array([], np.int64)] * 5}
    assert equations.indexer_kl_loss(**INDEXER, **nothing) == 0.0
    assert not any(g.any() for g in equations.indexer_kl_gradient(**INDEXER, **nothing))


@pytest.mark.parametrize(
    "changes",
    [{}, {"indexer_rope": True}, {"indexer_scale": 1.7}, {"sparse": False}, {"gates": "value"}, {"gates": "output"}],
    ids=str,
)
def test_every_option_of_the_layer_means_the_same_in_both_forms(changes):
    """With a base of RoPE, a V̄ and sizes that differ from the defaults: an option that is ignored shows."""
    config = dataclasses.replace(CONFIG, **changes)
    torch.manual_seed(0)
    layer = GatedSparseAttention(config).double().eval()
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter)
    if config.sparse:
        layer.mean_variance.fill_(0.3)
    h = hidden(2, 24, config.d).double()
    assert close_layers(layer(h).hidden, torch.from_numpy(oracle.layer_output(layer, h)))


def test_the_teacher_takes_another_scale():
    """Two keys with logits 0 and scale·2: the weights are those of a sigmoid."""
    q, k = np.array([[[2.0, 0.0, 0.0, 0.0]]]), np.array([[[0.0] * 4], [[1.0, 0.0, 0.0, 0.0]]])
    for scale in (None, 0.25, -1.0):
        z = 2 * (0.5 if scale is None else scale)
        (p,) = teacher(q, k, [np.arange(2)], scale=scale)
        np.testing.assert_allclose(p, [1 / (1 + np.exp(z)), 1 / (1 + np.exp(-z))], rtol=1e-12)
