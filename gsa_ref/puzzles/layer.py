"""Puzzles on the layer: positions, the cache, and decoding."""

from collections.abc import Callable

import numpy as np
from hypothesis import strategies as st

from gsa_ref import equations
from gsa_ref.puzzles._checker import Example, puzzle

_SEEDS = st.integers(0, 2**16)


def _attend_with_a_cache(q: np.ndarray, k: np.ndarray, v: np.ndarray, start: int) -> np.ndarray:
    """Causal attention whose keys end with the last query: a cache holds nothing of the future."""
    if not len(k) == len(v) == start + len(q):
        raise ValueError(f"{len(q)} queries from position {start} on end a text of {start + len(q)} keys, got {len(k)}")
    return equations.dense_attention(q, k, v, start=start)


_attend_with_a_cache.__name__ = "attend"  # as the learner knows it
Attend = Callable[[np.ndarray, np.ndarray, np.ndarray, int], np.ndarray]


@puzzle(
    st.tuples(st.integers(1, 9), st.integers(1, 5), _SEEDS),
    oracle="gsa_ref.equations.dense_attention of the whole text",
)
def prefill_in_chunks(drawn: tuple[int, int, int]) -> Example:
    """The last chunk may be short."""
    L, chunk, seed = drawn
    q, k, v = np.random.default_rng(seed).standard_normal((3, L, 1, 2))
    arguments = {"q": q, "k": k, "v": v, "chunk": chunk, "attend": _attend_with_a_cache}
    return Example(arguments, equations.dense_attention(q, k, v))


@puzzle(
    st.tuples(st.integers(1, 3), st.integers(1, 4), st.integers(0, 2000), st.sampled_from((100.0, 1e4, 5e5)), _SEEDS),
    oracle="gsa_ref.equations.apply_rope",
)
def rope_at(drawn: tuple[int, int, int, float, int]) -> Example:
    """An even number of channels."""
    heads, half, position, theta, seed = drawn
    x = np.random.default_rng(seed).standard_normal((heads, 2 * half))
    expected = equations.apply_rope(x[None], start=position, theta=theta)[0]
    return Example({"x": x, "position": position, "theta": theta}, expected)


@puzzle(
    st.tuples(st.lists(st.tuples(st.integers(0, 4), st.integers(0, 3)), min_size=1, max_size=3), st.integers(0, 2)),
    oracle="a Python list for each sequence",
)
def append_to_cache(drawn: tuple[list[tuple[int, int]], int]) -> Example:
    """Every row of the cache and of what is new has another value; what is past a length must stay as it was."""
    rows, spare = drawn
    lengths, n_new = (np.array(x) for x in zip(*rows, strict=True))
    B, L, capacity = len(rows), max(1, n_new.max()), (lengths + n_new).max() + spare
    cache = np.arange(B * capacity, dtype=float).reshape(B, capacity, 1)
    new = -1 - np.arange(B * L, dtype=float).reshape(B, L, 1)
    expected = []
    for b in range(B):
        kept, added = list(cache[b, : lengths[b]]), list(new[b, : n_new[b]])
        expected.append(kept + added + list(cache[b, lengths[b] + n_new[b] :]))
    arguments = {"cache": cache, "lengths": lengths, "new": new, "n_new": n_new}
    return Example(arguments, (np.array(expected).reshape(cache.shape), lengths + n_new))
