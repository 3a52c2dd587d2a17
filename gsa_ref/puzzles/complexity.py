"""Puzzles on costs. What is expected is measured by a counter while the work is done, not computed by a formula."""

from functools import cache
from typing import Any

import numpy as np
import torch
from hypothesis import strategies as st
from torch.utils.flop_counter import FlopCounterMode

from gsa_ref import Selection, cases, dense_attention, equations, indexer_scores, sparse_attention
from gsa_ref.puzzles._checker import Example, puzzle

_SMALL = st.integers(1, 6)


class Memory:
    """Rows that can be had by `load` and changed by `store` only, and both count bytes."""

    def __init__(self, rows: np.ndarray) -> None:
        self._rows, self.bytes = rows, 0

    def load(self, where: Any) -> np.ndarray:
        self.bytes += self._rows[where].nbytes
        return self._rows[where]

    def store(self, where: Any, values: np.ndarray) -> None:
        self.bytes += values.nbytes
        self._rows[where] = values


# ---- operations: PyTorch's counter, which sees products of matrices, 2 for a multiplication with its addition --------


@puzzle(st.tuples(_SMALL, _SMALL, _SMALL, _SMALL, _SMALL), oracle="PyTorch's FlopCounterMode on gsa_ref.indexer_scores")
def indexer_flops(drawn: tuple[int, int, int, int, int]) -> Example:
    """At least as many keys as queries."""
    B, L, more, H_I, d_I = drawn
    S = L + more - 1
    arguments = torch.ones(B, L, H_I, d_I), torch.ones(B, S, d_I), torch.ones(B, L, H_I), torch.ones(H_I)
    with FlopCounterMode(display=False) as counter:
        indexer_scores(*arguments, scale=1.0, start=S - L)
    return Example({"B": B, "L": L, "S": S, "H_I": H_I, "d_I": d_I}, counter.get_total_flops())


@cache
def _flops(L: int, H: int, d_h: int, H_I: int, d_I: int, k: int) -> tuple[int, int]:
    """Dense attention, and indexer with sparse attention, counted on tensors without storage."""
    with torch.device("meta"):
        q, k_rows, v = (torch.empty(1, L, H, d_h) for _ in range(3))
        indexer = torch.empty(1, L, H_I, d_I), torch.empty(1, L, d_I), torch.empty(1, L, H_I), torch.empty(H_I)
        slots = torch.empty(1, L, k, dtype=torch.int32), torch.empty(1, L, dtype=torch.int32)
    with FlopCounterMode(display=False) as dense:
        dense_attention(q, k_rows, v)
    with FlopCounterMode(display=False) as sparse:
        indexer_scores(*indexer, scale=1.0)
        sparse_attention(q, k_rows, v, Selection(*slots))
    return dense.get_total_flops(), sparse.get_total_flops()


# Two slots at least: products with a single column are no products of matrices to PyTorch, and are not counted.
@puzzle(
    st.tuples(
        st.integers(1, 3), st.sampled_from((8, 16, 64)), st.integers(1, 4), st.sampled_from((4, 8)), st.integers(2, 40)
    ),
    oracle="PyTorch's FlopCounterMode on the functions of gsa_ref",
    examples=25,
)
def crossover(drawn: tuple[int, int, int, int, int]) -> Example:
    """Bisection between k and a length at which the sparse layer is cheaper; there is one, as H_I · d_I < 2d."""
    H, d_h, H_I, d_I, k = drawn
    d_I = d_I if H_I * d_I < 2 * H * d_h else 1
    sizes = H, d_h, H_I, d_I, k

    def saves(L: int) -> bool:
        dense, sparse = _flops(L, *sizes)
        return sparse < dense

    low, high = k, 2 * k  # up to L = k there are as many slots as keys, or more
    while not saves(high):
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if saves(middle) else (middle, high)
    return Example({"d": H * d_h, "H_I": H_I, "d_I": d_I, "k": k}, high)


# ---- bytes: a memory that counts what the work loads and stores ------------------------------------------------------


@puzzle(
    st.tuples(
        st.integers(1, 12), st.integers(1, 14), st.integers(1, 2), st.integers(1, 3), _SMALL, st.sampled_from((2, 4))
    ),
    oracle="a memory that counts, in a step of decoding",
)
def decode_bytes(drawn: tuple[int, int, int, int, int, int]) -> Example:
    """One step: score all n keys, select k of them, attend."""
    n, k, H_kv, d_h, d_I, element_bytes = drawn
    rng, dtype = np.random.default_rng(0), {2: np.float16, 4: np.float32}[element_bytes]
    k_idx = Memory(rng.standard_normal((n, d_I)).astype(dtype))
    keys, values = (Memory(rng.standard_normal((n, H_kv, d_h)).astype(dtype)) for _ in range(2))
    everything = np.arange(n)
    one = np.ones((1, 1, d_I)), k_idx.load(everything), np.ones((1, 1)), np.zeros(1)
    (selected,) = equations.select_tokens(equations.indexer_scores(*one, scale=1.0, start=n - 1), np.array([k]))
    q = np.ones((1, H_kv, d_h))
    equations.sparse_attention(q, keys.load(selected), values.load(selected), [np.arange(len(selected))])
    arguments = {"n": n, "k": k, "H_kv": H_kv, "d_h": d_h, "d_I": d_I, "element_bytes": element_bytes}
    return Example(arguments, k_idx.bytes + keys.bytes + values.bytes)


@puzzle(
    st.tuples(st.integers(1, 9), st.integers(0, 5), st.integers(1, 3)),
    oracle="a memory that counts, around a score map",
)
def score_map_bytes(drawn: tuple[int, int, int]) -> Example:
    """The map is written once, read for the variance and read again for the selection."""
    L, start, H_I = drawn
    rng = np.random.default_rng(0)
    S = start + L
    inputs = rng.standard_normal((L, H_I, 2)), rng.standard_normal((S, 2)), np.ones((L, H_I)), np.zeros(H_I)
    scores = equations.indexer_scores(*inputs, scale=1.0, start=start).astype(np.float32)
    memory = Memory(np.full((L, S), -np.inf, np.float32))
    visible = [(t, slice(start + t + 1)) for t in range(L)]
    for where in visible:
        memory.store(where, scores[where])
    for where in visible:
        equations.score_variance(memory.load(where)[None])
    for where in visible:
        equations.select_tokens(memory.load(where)[None], np.ones(1, int))
    return Example({"L": L, "start": start, "H_I": H_I}, memory.bytes)


@puzzle(
    st.tuples(cases.attention_cases("float32", cases.Limits(B=1, L=9, S=12)), st.integers(1, 4), st.integers(1, 3)),
    oracle="a memory that counts, in two ways to attend",
)
def tile_bytes(drawn: tuple[cases.AttentionCase, int, int]) -> Example:
    """Every query loads for itself, or the queries of a tile load the union of their selections."""
    case, tile, width = drawn
    a = case.arguments()
    slots = a["selection"].indices[0].numpy()
    slots = np.where((slots < case.S) & (slots >= 0), slots, -1)
    rng = np.random.default_rng(0)
    rows = rng.standard_normal((case.S, 1, 2 * width)).astype(np.float32)
    q = rng.standard_normal((case.L, 1, width))

    def attend(tile: int) -> tuple[np.ndarray, int]:
        memory, out = Memory(rows), []
        for first in range(0, case.L, tile):
            chosen = [row[row >= 0] for row in slots[first : first + tile]]
            union = np.unique(np.concatenate(chosen))
            k, v = np.split(memory.load(union), 2, axis=-1)
            local = [np.searchsorted(union, row) for row in chosen]
            out.append(equations.sparse_attention(q[first : first + tile], k, v, local)[0])
        return np.concatenate(out), memory.bytes

    (alone, gathered), (together, union) = attend(1), attend(tile)
    np.testing.assert_allclose(alone, together, atol=1e-12, err_msg="the two ways to attend differ")
    return Example({"slots": slots, "tile": tile, "row_bytes": 8 * width}, (gathered, union))


@puzzle(
    st.tuples(
        st.lists(st.integers(0, 12), min_size=1, max_size=6, unique=True), st.integers(1, 80), st.sampled_from((32, 8))
    ),
    oracle="a memory that hands out whole sectors, and counts them",
)
def sector_bytes(drawn: tuple[list[int], int, int]) -> Example:
    """Every byte of every row is asked for; what was fetched already is not fetched again."""
    rows, row_bytes, sector = drawn
    sectors = Memory(np.zeros((13 * 80 // sector + 1, sector), np.uint8))
    fetched: set[int] = set()
    for row in rows:
        for byte in range(row * row_bytes, (row + 1) * row_bytes):
            if byte // sector not in fetched:
                sectors.load(np.array([byte // sector]))
                fetched.add(byte // sector)
    return Example({"rows": np.sort(np.array(rows)), "row_bytes": row_bytes, "sector": sector}, sectors.bytes)
