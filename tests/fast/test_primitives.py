"""Device functions of `_primitives`, against Python's own arithmetic."""

import math

import numpy as np
import pytest
import torch
import triton
import triton.language as tl

from gsa_fast._primitives import (
    fast_divide,
    popcount,
    popcount_below,
    stable_sigmoid,
    store_entry_where,
    tanh_approximate,
)

EDGES = [0, 1, -1, 2, -2, 31, 32, 2**31 - 1, -(2**31), -(2**31) + 1, 0x55555555, -0x55555556, 0x0F0F0F0F, 1 << 16]


@triton.jit
def bits_kernel(x_ptr, bit_ptr, count_ptr, below_ptr, N: tl.constexpr):
    i = tl.arange(0, N)
    x = tl.load(x_ptr + i)
    tl.store(count_ptr + i, popcount(x))
    tl.store(below_ptr + i, popcount_below(x, tl.load(bit_ptr + i)))


@triton.jit
def float_kernel(a_ptr, b_ptr, quotient_ptr, tanh_ptr, sigmoid_ptr, N: tl.constexpr):
    i = tl.arange(0, N)
    a = tl.load(a_ptr + i)
    tl.store(quotient_ptr + i, fast_divide(a, tl.load(b_ptr + i)))
    tl.store(tanh_ptr + i, tanh_approximate(a))
    tl.store(sigmoid_ptr + i, stable_sigmoid(a))


@triton.jit
def entries_kernel(out_ptr, score_ptr, mask_ptr, step, ROWS: tl.constexpr, N: tl.constexpr):
    """Row r's entries from out + 2 N r (or from the end of that) on, in the order of their columns."""
    r, i = tl.arange(0, ROWS), tl.arange(0, N)
    score = tl.load(score_ptr + r[:, None] * N + i[None, :])
    mask = tl.load(mask_ptr + r[:, None] * N + i[None, :]) != 0
    rank = tl.cumsum(mask.to(tl.int32), axis=1) - 1
    first = out_ptr + r * 2 * N + tl.where(step > 0, 0, 2 * N - 1)
    store_entry_where(first[:, None], step, rank, score, (1000 + i)[None, :], mask)


def words(device: str) -> torch.Tensor:
    x = torch.randint(-(2**31), 2**31, (1024,), generator=torch.Generator().manual_seed(0))
    x[: len(EDGES) * 32] = torch.tensor(EDGES).repeat_interleave(32)
    return x.to(torch.int32).to(device)


def test_population_counts_are_those_of_the_bits(device):
    """Also below every bit from 0, where nothing lies, to 31."""
    x = words(device)
    bit = torch.arange(1024, dtype=torch.int32, device=device) % 32
    count, below = torch.empty_like(x), torch.empty_like(x)
    bits_kernel[(1,)](x, bit, count, below, N=1024)
    unsigned = [v & 0xFFFFFFFF for v in x.tolist()]
    assert count.tolist() == [v.bit_count() for v in unsigned]
    assert below.tolist() == [(v & (1 << b) - 1).bit_count() for v, b in zip(unsigned, bit.tolist(), strict=True)]


def run_floats(a: torch.Tensor, b: torch.Tensor) -> list[np.ndarray]:
    results = [torch.empty_like(a) for _ in range(3)]
    float_kernel[(1,)](a, b, *results, N=len(a))
    return [x.double().cpu().numpy() for x in results]


def test_fast_division_is_within_two_ulp(device):
    g = torch.Generator().manual_seed(0)
    a, b = (torch.randn(1024, generator=g) * 2.0 ** torch.randint(-60, 60, (1024,), generator=g) for _ in range(2))
    b[:4] = torch.tensor([2.0**-126, 2.0**126, -(2.0**-126), (1 + 2.0**60) ** 2])
    a[:4] = torch.tensor([2.0**-10, 1.0, 1.0, 1 + 2.0**60])
    quotient, _, _ = run_floats(a.to(device), b.to(device))
    gold = a.double().numpy() / b.double().numpy()
    assert (np.abs(quotient - gold) <= 2 * 2.0**-23 * np.abs(gold) + 2.0**-126).all()


def test_tanh_and_sigmoid_stay_in_the_errors_that_the_tolerance_assumes(device):
    """2^−11 relative for tanh, so 2^−12 for σ; no overflow, and the limits at infinity are exact."""
    x = torch.linspace(-100, 100, 1024)
    x[:6] = torch.tensor([math.inf, -math.inf, 1e38, -1e38, 0.0, 1e-30])
    _, tanh, sigmoid = run_floats(x.to(device), torch.ones(1024, device=device))
    gold = np.tanh(x.double().numpy())
    assert (np.abs(tanh - gold) <= 2.0**-11 * np.abs(gold) + 2.0**-24).all()
    assert tanh[:5].tolist() == [1, -1, 1, -1, 0]
    exact = 0.5 + 0.5 * np.tanh(x.double().numpy() / 2)
    assert (np.abs(sigmoid - exact) <= 8 * 2.0**-24).all()
    assert sigmoid[:5].tolist() == [1, 0, 1, 0, 0.5]


def test_nan_passes_through(device):
    x = torch.full((16,), math.nan, device=device)
    assert all(np.isnan(result).all() for result in run_floats(x, torch.ones(16, device=device)))


@pytest.mark.parametrize("step", [1, -1])
def test_entries_hold_a_score_above_its_position_and_nothing_else_is_written(step, device):
    g = torch.Generator().manual_seed(0)
    scores = torch.rand(4, 16, generator=g)
    mask = torch.rand(4, 16, generator=g) < 0.5
    mask[0], mask[1] = False, True
    out = torch.full((4, 32), -7, dtype=torch.int64, device=device)
    entries_kernel[(1,)](out, scores.to(device), mask.int().to(device), step, ROWS=4, N=16)
    for row, row_scores, row_mask in zip(out.cpu(), scores, mask, strict=True):
        row = row.flip(0) if step < 0 else row
        n = int(row_mask.sum())
        assert (row[:n] & 0xFFFFFFFF).tolist() == (1000 + row_mask.nonzero()[:, 0]).tolist()
        assert (row[:n] >> 32).int().view(torch.float32).tolist() == row_scores[row_mask].tolist()
        assert (row[n:] == -7).all()
