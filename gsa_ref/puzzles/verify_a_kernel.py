"""Puzzles about faults: kernels to repair, and faulty implementations that the learner's own property must refuse."""

from typing import Any

import numpy as np
import torch
from hypothesis import strategies as st

from gsa_ref import equations
from gsa_ref.check import gamma
from gsa_ref.puzzles._checker import Example, puzzle
from gsa_ref.puzzles._faults import attention, budgets, faulty_budgets, selector
from gsa_ref.puzzles._hunt import hunt
from gsa_ref.puzzles._interpreter import NO_KERNEL, KernelPuzzle, kernel_puzzle, programs_reversed, watched

SEEDS = st.integers(0, 99)
MOST_ROWS = 4


def judge_rows(rows: Any) -> str:
    """How many faults no row shows, in words; "" for none."""
    rows = [(float(variance), float(mean), int(n)) for variance, mean, n in rows]
    if len(rows) > MOST_ROWS:
        return f"{len(rows)} rows, and {MOST_ROWS} are enough"
    if not all(np.isfinite(row).all() and min(row) >= 0 for row in rows):
        return "a number is negative or not finite"
    survivors = set(faulty_budgets(1.0, 1.0, 1))
    for variance, mean, n in rows:
        (gold,) = equations.token_budget(
            np.array([variance]), mean, np.array([n]), k_base=16, k_min=4, k_max=64, rule="proportional"
        )
        survivors -= {fault for fault, k in faulty_budgets(variance, mean, n).items() if k != gold}
    return f"{len(survivors)} of {len(faulty_budgets(1.0, 1.0, 1))} faults survive" if survivors else ""


@puzzle(st.just(None), oracle="equations.token_budget, and with 13 faults", examples=1)
def budget_rows(drawn: None) -> Example:
    return Example({}, None, judge=judge_rows)


trust_selection = hunt(
    "trust_selection",
    [selector(), selector(spare=True)],
    [
        selector(fault)
        for fault in (
            "one too many",
            "one too few",
            "the budget of row 0",
            "masked positions are candidates",
            "the last, partial tile is dropped",
            "scores in float16",
            "magnitudes",
            "NaN first",
            "at most 8",
            "ties to the higher position",
            "−0 below 0",
            "not ascending",
            "the budget as count",
            "0 in the tail",
        )
    ],
)


trust_causality = hunt(
    "trust_causality",
    [budgets(), budgets(rule="inverse", seed=1), budgets(rule="fixed"), budgets(seed=2)],
    [
        budgets(fault)
        for fault in (
            "centred over the sequence",
            "clipped by the sequence",
            "one key ahead",
            "to the end of a tile of 8",
            "scaled by the largest of the map",
            "the mean variance of the batch",
            "the mean variance of each sequence",
            "the mean variance of the neighbours so far",
            "sized by the length",
            "the last query takes everything",
            "the batch's smallest of each position",
        )
    ],
)


trust_attention = hunt(
    "trust_attention",
    [attention(), attention(dtype=torch.float32)],
    [
        attention(fault)
        for fault in (
            "scaled by the width of all heads",
            "slots past the count",
            "the start of sequence 0",
            "start ignored",
            "the future",
            "−1 is the last key",
            "−1 is key 0",
            "an empty row is a mean",
            "an empty row is NaN",
            "heads interleaved",
            "the keys of sequence 0",
            "no maximum subtracted",
            "weights in float16",
            "0 times NaN",
            "lse in base 2",
        )
    ],
)


@kernel_puzzle(
    st.lists(
        st.tuples(
            st.lists(st.sampled_from((0.0, 0.5, 1.0, -1.0, float("nan"), -float("inf"))), min_size=5, max_size=5),
            st.sampled_from((0.5, -1.0, float("nan"), -float("inf"))),
        ),
        min_size=1,
        max_size=6,
    ),
    oracle="the definition, score by score",
    examples=60,
)
def keep_mask(drawn: list[tuple[list[float], float]]) -> Example:
    """A comparison with NaN is false, in Python too."""
    scores, threshold = (torch.tensor(x, dtype=torch.float32) for x in zip(*drawn, strict=True))
    gold = [[x >= limit and x != -float("inf") for x in row] for row, limit in drawn]
    return Example({"scores": scores, "threshold": threshold}, np.array(gold, np.int8))


@puzzle(
    st.tuples(
        st.lists(st.integers(0, 2), min_size=1, max_size=3), st.integers(1, 3), st.sampled_from((None, 0, 1)), SEEDS
    ),
    oracle="x[rows], exactly; the interpreter raises if a product of two int32 overflows",
    examples=40,
    warnings="ignore",
)
def rows_of_a_view(drawn: tuple[list[int], int, int | None, int]) -> Example:
    """Of the 2 GiB that x spans only the pages that are touched exist: the system hands them out on first use."""
    rows, d, far_apart, seed = drawn
    strides = [d, 1]
    if far_apart is not None:
        strides = [2**30, 1] if far_apart == 0 else [1, 2**30]
        d = min(d, 3)
    x = torch.empty_strided((3, d), strides, dtype=torch.int8)
    x.copy_(torch.randint(100, (3, d), generator=torch.Generator().manual_seed(seed)))
    arguments = {"x": x, "rows": torch.tensor(rows, dtype=torch.int32)}
    return Example(arguments, x.numpy()[rows])


@kernel_puzzle(
    st.tuples(
        st.lists(st.sampled_from((0.0, 1.0, -1.0, 30.0, 200.0, -float("inf"))), min_size=1, max_size=12),
        st.integers(1, 2),
        st.sampled_from((1, 3)),
        SEEDS,
    ),
    oracle="the softmax in NumPy, float64",
    examples=80,
)
def online_average(drawn: tuple[list[float], int, int, int]) -> Example:
    """A second row is the first one backwards."""
    row, L, d, seed = drawn
    rows, S = [row, row[::-1]][:L], len(row)
    logits = torch.tensor(rows, dtype=torch.float32)
    v = (8 * torch.randn(S, d, generator=torch.Generator().manual_seed(seed))).round() / 8
    gold, tolerance = np.zeros((len(rows), d)), np.zeros((len(rows), d))
    for t, row in enumerate(logits.double().numpy()):
        seen = row != -np.inf
        if seen.any():
            p = np.exp(row - row.max())
            gold[t] = p / p.sum() @ v.double().numpy()
            # Every weight is off by (4 + |x|)u for each of at most 4 exponentials, and the sums by γ.
            spread = np.ptp(row[seen])
            tolerance[t] = gamma(4 * (4 + int(spread)) + 2 * S) * 2 * np.abs(v.double().numpy()).max(0)
    return Example({"logits": logits, "v": v}, gold, rtol=0, atol=tolerance)


class InAnyOrder(KernelPuzzle):
    """The comparison, the same bits with the programs in reverse order, and work for more than one program."""

    def _call(self, function: Any, example: Example) -> tuple[Any, str]:
        with watched() as work:
            got, problem = super()._call(function, example)
        if problem:
            return got, problem
        with programs_reversed():
            again, problem = super()._call(function, example)
        if problem:
            return again, f"with the programs in reverse order: {problem}"
        if not np.array_equal(got, again):
            return again, f"the programs in reverse order give other bits; in order they give {got.tolist()}"
        x = example.arguments["x"]
        if work.bytes_loaded.total() < x.nbytes:
            return got, NO_KERNEL
        rows, allowed = max(work.bytes_loaded.values()) // x[0].nbytes, 8 + -(-len(x) // 8)
        return got, f"right, but one program loads {rows} rows, and {allowed} is the limit" if rows > allowed else ""


@kernel_puzzle(
    st.tuples(st.integers(1, 40), st.integers(1, 3), SEEDS),
    oracle="NumPy in float64, within γ for any order of the sum, and itself in another order",
    examples=50,
    kind=InAnyOrder,
)
def column_sums(drawn: tuple[int, int, int]) -> Example:
    n, d, seed = drawn
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(n, d, generator=generator) * 10.0 ** torch.randint(-3, 4, (n, 1), generator=generator)
    x64 = x.double().numpy()
    return Example({"x": x}, x64.sum(0), rtol=0, atol=gamma(n) * np.abs(x64).sum(0))
