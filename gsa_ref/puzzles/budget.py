"""Puzzles on the adaptive sparsity controller."""

from typing import Any

import numpy as np
from hypothesis import strategies as st

from gsa_ref import cases, equations
from gsa_ref.puzzles._checker import Example, puzzle

# No product with a small whole number lies near a whole number, where the order of multiplication and division decides.
_RATIOS = st.sampled_from((0.0, 0.1234, 0.4567, 0.8901, 1.2345, 1.6789, 12.345))
_SIZES = st.tuples(st.integers(1, 6), st.integers(0, 6), st.sampled_from((0, 6, 30)))  # k_min, and what is added to it
_MEANS = st.sampled_from((0.01, 0.05, 0.0))
_N_VALID = st.sampled_from((1000, 8, 2))  # few rows are short: n_t hides the other limits


@puzzle(
    st.tuples(_RATIOS, _MEANS, _N_VALID, _SIZES, st.sampled_from(("proportional", "inverse", "fixed"))),
    oracle="gsa_ref.equations.token_budget",
    examples=200,
)
def budget_of_a_row(drawn: tuple[float, float, int, tuple[int, int, int], str]) -> Example:
    """Every limit decides in some examples."""
    ratio, mean_variance, n_valid, (k_min, more, still_more), rule = drawn
    variance = ratio * (mean_variance or 0.01)
    k_base = k_min + more
    sizes: dict[str, Any] = {"k_base": k_base, "k_min": k_min, "k_max": k_base + still_more, "rule": rule}
    expected = equations.token_budget(np.array([variance]), mean_variance, np.array([n_valid]), **sizes)
    arguments = {"variance": variance, "mean_variance": mean_variance, "n_valid": n_valid, **sizes}
    return Example(arguments, int(expected[0]))


def _summary(scores: np.ndarray) -> tuple[int, float, float]:
    valid = scores[np.isfinite(scores)]
    n = len(valid)
    return n, float(valid.mean()) if n else 0.0, n * float(equations.score_variance(scores[None])[0])


@puzzle(
    st.tuples(
        cases.budget_cases("float32", cases.Limits(B=1, L=1, S=12)),
        st.sampled_from((None, -np.inf, np.nan)),
        st.booleans(),
    ),
    oracle="gsa_ref.equations.score_variance over all scores so far",
)
def one_more_score(drawn: tuple[cases.BudgetCase, float | None, bool]) -> Example:
    """The last score of a row, or one that does not count, joins the ones before it."""
    case, other, far = drawn
    row = case.scores()[0, -1].double().numpy()
    if far:  # a mean of about 1000 with a spread of about 0.001: M2 as a difference of squares has no digit left
        row = 1000 + (row - case.mean) / 1000
    row = row if other is None else np.append(row, other)
    n, mean, m2 = _summary(row[:-1])
    arguments = {"n": n, "mean": mean, "m2": m2, "x": float(row[-1])}
    return Example(arguments, _summary(row), rtol=1e-7, atol=1e-12)
