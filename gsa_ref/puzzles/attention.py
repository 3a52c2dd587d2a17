"""Puzzles on attention over selected tokens."""

from dataclasses import replace
from typing import Any

import numpy as np
from hypothesis import strategies as st

from gsa_ref import cases, equations
from gsa_ref.puzzles._checker import Example, puzzle

_CASES = cases.attention_cases("float64", cases.Limits(B=1, L=3, S=10, group=3))


def _arrays(case: cases.AttentionCase, d_h: int = 2) -> tuple[Any, ...]:
    """q, k, v and the slots of the last query; few channels are easier to read."""
    case = replace(case, d_h=d_h, value_gate=False, output_gate=False)
    a = case.arguments()
    q, k, v = (a[name][0].double().numpy() for name in ("q", "k", "v"))
    return q[-1], k, v, a["selection"].indices[0, -1].numpy()


@puzzle(_CASES, oracle="gsa_ref.equations.sparse_attention")
def grouped_heads(case: cases.AttentionCase) -> Example:
    """At least one position is selected."""
    q, k, v, slots = _arrays(case)
    selected = slots[(slots >= 0) & (slots < len(k))]
    selected = selected if len(selected) else np.array([0])
    expected = equations.sparse_attention(q[None], k, v, [selected])[0][0]
    return Example({"q": q, "k": k, "v": v, "selected": selected}, expected)


@puzzle(
    st.tuples(_CASES, st.integers(0, 2)),
    oracle="gsa_ref.equations.sparse_attention over the slots that hold a position",
)
def attend_slots(drawn: tuple[cases.AttentionCase, int]) -> Example:
    """One head; the query may sit before the last key, so that slots point to its future."""
    case, before = drawn
    q, k, v, slots = _arrays(replace(case, H_kv=1, group=1))
    t = max(len(k) - 1 - before, 0)
    held = slots[(slots >= 0) & (slots <= t)]
    expected = equations.sparse_attention(q[None], k, v, [held])[0][0, 0]
    return Example({"q": q[0], "k": k[:, 0], "v": v[:, 0], "slots": slots, "t": t}, expected)


@puzzle(
    st.tuples(
        st.lists(st.sampled_from((-np.inf, -1000.0, -1.0, 0.0, 2.0, 1000.0)), min_size=1, max_size=6),
        st.integers(0, 6),
        st.integers(0, 2**16),
    ),
    oracle="gsa_ref.equations.sparse_attention over all logits so far",
    examples=200,
)
def one_more_tile(drawn: tuple[list[float], int, int]) -> Example:
    """The state after the first logits, and the rest of them as the next tile."""
    values, cut, seed = drawn
    logits = np.array(values)
    cut = min(cut, len(logits) - 1)
    v = np.random.default_rng(seed).integers(-3, 4, (len(logits), 2)).astype(float)

    def state(logits: np.ndarray, v: np.ndarray) -> tuple[Any, Any, Any]:
        seen = [np.flatnonzero(logits != -np.inf)]
        k = np.stack([logits, np.zeros(len(logits))], axis=1)[:, None]
        out, lse = equations.sparse_attention(np.array([[[1.0, 0.0]]]), k, v[:, None], seen, scale=1.0)
        m = logits.max(initial=-np.inf)
        total = np.exp(lse[0, 0] - m) if len(seen[0]) else np.float64(0)
        return m, total, total * out[0, 0]

    m, total, o = state(logits[:cut], v[:cut])
    arguments = {"m": m, "l": total, "o": o, "logits": logits[cut:], "v": v[cut:]}
    return Example(arguments, state(logits, v))
