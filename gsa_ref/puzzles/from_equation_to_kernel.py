"""Puzzles about writing kernels: addresses and masks, sums that stay in a program, and what a program loads.

They get torch tensors on the CPU and run in Triton's interpreter; gold is NumPy in float64 on the same numbers.
"""

from typing import Any

import numpy as np
import torch
from hypothesis import strategies as st
from torch import Tensor

from gsa_ref import cases, equations
from gsa_ref.check import SIGMOID_ERROR, attention_tolerance, gamma, gate_tolerance, score_tolerance
from gsa_ref.puzzles._checker import Example
from gsa_ref.puzzles._interpreter import NO_KERNEL, KernelPuzzle, kernel_puzzle, watched

LAYOUTS = st.sampled_from(("contiguous", "permuted"))
SEEDS = st.integers(0, 99)
SCORES = (*(0.0, -0.0) * 4, 1.0, -1.0, 0.3, -0.3, 2.5, -2.5, 3e38, -3e38, 1e-45, -1e-45, float("inf"), -float("inf"))


def normal(seed: int, *shape: int) -> Tensor:
    """float32, rounded so that an example can be read."""
    return (8 * torch.randn(shape, generator=torch.Generator().manual_seed(seed))).round() / 8


def float64(*tensors: Tensor) -> list[np.ndarray]:
    return [x.double().numpy() for x in tensors]


@kernel_puzzle(
    st.tuples(st.integers(1, 6), st.integers(1, 7), LAYOUTS, LAYOUTS, SEEDS),
    oracle="equations.apply_gate, within the rounding of float32",
    examples=50,
)
def gate_rows(drawn: tuple[int, int, str, str, int]) -> Example:
    L, d, layout, gate_layout, seed = drawn
    x, gate_logits = 4 * normal(seed, L, d), 4 * normal(seed + 100, L, d)
    gold = equations.apply_gate(*float64(x, gate_logits))
    tolerance = gate_tolerance(gold, gate_logits.double().numpy(), torch.float32)
    arguments = {"x": cases.lay_out(x, layout), "gate_logits": cases.lay_out(gate_logits, gate_layout)}
    return Example(arguments, gold, rtol=0, atol=tolerance)


@kernel_puzzle(
    st.tuples(st.lists(st.integers(0, 40), min_size=1, max_size=3), st.integers(0, 3), LAYOUTS, SEEDS),
    oracle="NumPy in float64, within γ for any order of the sum",
    examples=50,
)
def row_statistics(drawn: tuple[list[int], int, str, int]) -> Example:
    lengths, more, layout, seed = drawn
    x = normal(seed, len(lengths), max(*lengths, 1) + more) - 2.0  # mostly below 0, so that a 0 is a good maximum
    padding = torch.arange(x.shape[1]) >= torch.tensor(lengths)[:, None]
    x = x.masked_fill(padding, torch.nan)
    rows = [row[:n] for row, n in zip(x.double().numpy(), lengths, strict=True)]
    gold = np.array([row.sum() for row in rows]), np.array([row.max(initial=-np.inf) for row in rows])
    size = np.array([np.abs(row).sum() for row in rows])
    arguments = {"x": cases.lay_out(x, layout), "lengths": torch.tensor(lengths, dtype=torch.int32)}
    return Example(arguments, gold, rtol=0, atol=gamma(x.shape[1]) * size)


class EachKeyOnce(KernelPuzzle):
    """The comparison, and a limit on the bytes loaded."""

    def _call(self, function: Any, example: Example) -> tuple[Any, str]:
        with watched() as work:
            got, problem = super()._call(function, example)
        q, k = example.arguments["q"], example.arguments["k"]
        loaded, allowed = work.bytes_loaded.total(), k.nbytes + -(-len(k) // 16) * q.nbytes
        if not problem and loaded < k.nbytes:
            problem = NO_KERNEL
        if not problem and loaded > allowed:
            problem = f"right, but it loads {loaded} bytes; the keys once and the queries for every 16 keys: {allowed}"
        return got, problem


@kernel_puzzle(
    st.tuples(st.integers(1, 4), st.integers(1, 35), st.sampled_from((1, 4, 12)), LAYOUTS, SEEDS),
    oracle="NumPy in float64, within γ for any order of the sum, and the bytes that the interpreter loads",
    examples=40,
    kind=EachKeyOnce,
)
def group_logits(drawn: tuple[int, int, int, str, int]) -> Example:
    G, S, d_h, layout, seed = drawn
    q, k = normal(seed, G, d_h), normal(seed + 100, S, d_h)
    q64, k64 = float64(q, k)
    gold = q64 @ k64.T / np.sqrt(d_h)
    tolerance = gamma(d_h + 3) * np.abs(q64) @ np.abs(k64).T / np.sqrt(d_h)
    return Example({"q": cases.lay_out(q, layout), "k": cases.lay_out(k, layout)}, gold, rtol=0, atol=tolerance)


class OneDivision(KernelPuzzle):
    """The comparison, and no program may divide twice."""

    def _call(self, function: Any, example: Example) -> tuple[Any, str]:
        with watched() as work:
            got, problem = super()._call(function, example)
        most = max(work.divisions.values(), default=0)
        if not problem and most != 1:
            problem = f"right, but a program divides {most} times" if most else NO_KERNEL
        return got, problem


@kernel_puzzle(
    st.lists(st.tuples(*[st.integers(-3, 3)] * 2, *[st.integers(-120, 120)] * 2), min_size=1, max_size=20),
    oracle="equations.sigmoid, within the rounding of float32, and one division in a program",
    examples=60,
    kind=OneDivision,
)
def two_sigmoids(drawn: list[tuple[int, ...]]) -> Example:
    a, b, y, z = (torch.tensor(numbers, dtype=torch.float32) for numbers in zip(*drawn, strict=True))
    a64, b64, y64, z64 = float64(a, b, y, z)
    gold = a64 * equations.sigmoid(y64) + b64 * equations.sigmoid(z64)
    size = np.abs(a64) + np.abs(b64)
    return Example({"a": a, "b": b, "y": y, "z": z}, gold, rtol=0, atol=(SIGMOID_ERROR["exact"] + gamma(8)) * size)


@st.composite
def ragged_batches(draw: st.DrawFn) -> tuple[int, int, list[int], list[int], int, int, str, int]:
    """L, S, start and lengths of each sequence, H_I, d_I, layout, seed."""
    L, S = draw(st.integers(1, 3)), draw(st.integers(1, 20))
    B = draw(st.integers(1, 2))
    start = [draw(st.integers(0, S)) for _ in range(B)]
    lengths = [draw(st.integers(0, S)) for _ in range(B)]
    return L, S, start, lengths, draw(st.integers(1, 2)), draw(st.sampled_from((1, 3, 8))), draw(LAYOUTS), draw(SEEDS)


@kernel_puzzle(
    ragged_batches(),
    oracle="equations.indexer_scores, within ε of check.score_tolerance",
    examples=50,
)
def batch_scores(drawn: tuple[int, int, list[int], list[int], int, int, str, int]) -> Example:
    L, S, start, lengths, H_I, d_I, layout, seed = drawn
    B, scale = len(start), d_I**-0.5
    q, k = normal(seed, B, L, H_I, d_I), normal(seed + 100, B, S, d_I)
    head_logits, bias = normal(seed + 200, B, L, H_I), normal(seed + 300, H_I)
    gold, tolerance = np.zeros((B, L, S)), np.zeros((B, L, S))
    for b in range(B):
        arrays = float64(q[b], k[b], head_logits[b], bias)
        gold[b] = equations.indexer_scores(*arrays, scale=scale, start=start[b], length=lengths[b])
        tolerance[b] = score_tolerance(*arrays, scale=scale)
    arguments = {name: cases.lay_out(x, layout) for name, x in (("q", q), ("k", k), ("head_logits", head_logits))}
    arguments |= {"bias": bias, "scale": scale, "start": torch.tensor(start, dtype=torch.int32)}
    arguments["lengths"] = torch.tensor(lengths, dtype=torch.int32)
    return Example(arguments, gold, rtol=0, atol=tolerance)


@kernel_puzzle(
    st.tuples(st.lists(st.sampled_from(SCORES), min_size=1, max_size=12), st.integers(1, 12)),
    oracle="a sort in NumPy, exactly",
    examples=60,
)
def threshold_by_counting(drawn: tuple[list[float], int]) -> Example:
    """Few different numbers, so that ties are frequent."""
    row, rank = drawn
    scores, k = torch.tensor([row], dtype=torch.float32), min(rank, len(row))
    values = scores[0].numpy()
    threshold = np.sort(values)[-k]
    ties = k - int((values > threshold).sum())
    arguments = {"scores": scores, "k": torch.tensor([k], dtype=torch.int32)}
    return Example(arguments, (np.array([threshold]), np.array([ties])), rtol=0, atol=0)


@kernel_puzzle(
    st.tuples(
        st.integers(1, 2),
        st.lists(st.integers(-1, 11), min_size=1, max_size=20),
        st.sampled_from((1, 4, 6)),
        LAYOUTS,
        st.sampled_from((1, 30)),
        SEEDS,
    ),
    oracle="equations.sparse_attention, within check.attention_tolerance",
    examples=60,
)
def attend_selected(drawn: tuple[int, list[int], int, str, int, int]) -> Example:
    H, slots, d_h, layout, size, seed = drawn
    # Holes stay where they are; of a position that comes twice, the second is one.
    slots = [-1 if s in slots[:i] else s for i, s in enumerate(slots)]
    chosen = np.array([s for s in slots if s >= 0], np.int64)
    q, k, v = size * normal(seed, H, d_h), normal(seed + 100, 12, d_h), normal(seed + 200, 12, d_h)
    unselected = torch.ones(12, 1, dtype=torch.bool)
    unselected[chosen] = False
    q64, k64, v64 = float64(q[None], k[:, None], v[:, None])  # one query, one key/value head
    out, lse = equations.sparse_attention(q64, k64, v64, [chosen])
    # That bound counts a tile for every 16 slots; here every slot may be one, with roundings of its own.
    tolerance = max(float(x.max()) for x in attention_tolerance(q64, k64, v64, [chosen], torch.float32))
    tolerance += gamma(8 * len(slots)) * max(1.0, float(v.abs().max()))
    k, v = k.masked_fill(unselected, torch.nan), v.masked_fill(unselected, torch.nan)
    arguments = {"q": q, "k": cases.lay_out(k, layout), "v": cases.lay_out(v, layout)}
    arguments["indices"] = torch.tensor(slots, dtype=torch.int32)
    return Example(arguments, (out[0], lse[0]), rtol=0, atol=tolerance)
