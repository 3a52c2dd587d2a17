"""Puzzles on the selection."""

import numpy as np
from hypothesis import strategies as st

from gsa_ref import cases, check, equations
from gsa_ref.puzzles._checker import Example, puzzle

_ROWS = cases.selection_cases("float64", cases.Limits(B=1, L=1, S=12))


@puzzle(st.tuples(_ROWS, st.integers(1, 14), st.integers(0, 3)), oracle="gsa_ref.equations.select_tokens", examples=200)
def threshold_and_ties(drawn: tuple[cases.SelectionCase, int, int]) -> Example:
    """The smallest selected score, and how many of the selected have it; some keys lie in the future."""
    case, k, future = drawn
    scores = np.append(np.nan_to_num(case.arguments()[0][0, 0].double().numpy(), neginf=0.0), [-np.inf] * future)
    selected = scores[equations.select_tokens(scores[None], np.array([k]))[0]]
    expected = float(selected.min()), int((selected == selected.min()).sum())
    return Example({"scores": scores, "k": k}, expected, rtol=0, atol=0)


@puzzle(
    st.tuples(st.integers(0, 2**16), st.integers(2, 7), st.sampled_from((0.0, 0.25, 0.5)), st.integers(0, 3)),
    oracle="gsa_ref.check.topk_certificate",
    examples=300,
)
def could_be_right(drawn: tuple[int, int, float, int]) -> Example:
    """Scores are multiples of ¼, so that every comparison is exact; a true selection may have been disturbed."""
    seed, S, epsilon, moves = drawn
    rng = np.random.default_rng(seed)
    scores = rng.integers(0, 7, S) / 4
    k = int(rng.integers(1, S + 1))
    measured = scores + epsilon * rng.integers(-1, 2, S)
    selected = equations.select_tokens(measured[None], np.array([k]))[0]
    for _ in range(moves if k < S else 0):
        outside = np.setdiff1d(np.arange(S), selected)
        selected = np.sort(np.append(rng.permutation(selected)[1:], rng.choice(outside)))
    expected = bool(check.topk_certificate(selected, k, scores, epsilon, k))
    return Example({"selected": selected, "scores": scores, "epsilon": epsilon}, expected)
