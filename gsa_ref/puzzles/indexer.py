"""Puzzles on the gated lightning indexer."""

import itertools
from dataclasses import replace

import numpy as np
from hypothesis import strategies as st

from gsa_ref import cases, equations
from gsa_ref.puzzles._checker import Example, puzzle

_LOGITS = st.floats(-2000, 2000) | st.sampled_from([0.0, -0.0, 40.0, -40.0, 800.0, -800.0])


@puzzle(st.lists(_LOGITS, min_size=1, max_size=6), oracle="gsa_ref.equations.sigmoid")
def stable_sigmoid(values: list[float]) -> Example:
    """Relative errors count: σ(−40) is 4·10⁻¹⁸, not 0."""
    x = np.array(values)
    return Example({"x": x}, equations.sigmoid(x), rtol=1e-12, atol=1e-300)


@puzzle(cases.indexer_cases("float64", cases.Limits(B=1)), oracle="the −∞ in gsa_ref.equations.indexer_scores")
def visible_keys(case: cases.IndexerCase) -> Example:
    """Counts what the oracle leaves visible."""
    start = case.start if isinstance(case.start, int) else case.start[0]
    length = case.S if case.lengths is None else case.lengths[0]
    zeros = np.zeros((case.L, 1, 1)), np.zeros((case.S, 1)), np.zeros((case.L, 1)), np.zeros(1)
    scores = equations.indexer_scores(*zeros, scale=1.0, start=start, length=length)
    arguments = {"L": case.L, "S": case.S, "start": start, "length": length}
    return Example(arguments, (scores > -np.inf).sum(1))


@puzzle(
    cases.indexer_cases("float64", cases.Limits(B=1, L=1, S=6)),
    oracle="the largest value of each head at the corners of the box",
)
def block_bound(case: cases.IndexerCase) -> Example:
    """At most 4 channels, so that all corners can be tried."""
    case = replace(case, L=1, d_I=min(case.d_I, 4), start=0, lengths=None)
    a = case.arguments()
    q, k, head_logits, bias = (a[n].double().numpy() for n in ("q_idx", "k_idx", "head_logits", "bias"))
    low, high = k[0].min(0), k[0].max(0)
    corners = np.array(list(itertools.product(*zip(low, high, strict=True))))
    last = len(corners) - 1  # the query's position: it sees all corners
    heads = [
        equations.indexer_scores(q[0, :, [j]], corners, head_logits[0, :, [j]], bias[[j]], scale=case.scale, start=last)
        for j in range(case.H_I)
    ]
    bound = np.float64(sum(scores.max() for scores in heads))
    arguments = {"q": q[0, 0], "low": low, "high": high, "head_logits": head_logits[0, 0], "bias": bias}
    return Example({**arguments, "scale": case.scale}, bound)
