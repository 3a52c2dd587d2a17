"""Device functions of `_primitives`, against Python's own arithmetic."""

import math
from contextlib import nullcontext

import numpy as np
import pytest
import torch
import triton
import triton.language as tl

from gsa_fast._backend import INTERPRETED
from gsa_fast._primitives import append_entry, count_if, fast_divide, popcount, stable_sigmoid, tanh_approximate

EDGES = [0, 1, -1, 2, -2, 31, 32, 2**31 - 1, -(2**31), -(2**31) + 1, 0x55555555, -0x55555556, 0x0F0F0F0F, 1 << 16]


@triton.jit
def bits_kernel(x_ptr, count_ptr, N: tl.constexpr):
    i = tl.arange(0, N)
    tl.store(count_ptr + i, popcount(tl.load(x_ptr + i)))


@triton.jit
def copy_kernel(x_ptr, out_ptr, read, written, N: tl.constexpr):
    i = tl.arange(0, N)
    tl.store(out_ptr + i, tl.load(x_ptr + i, mask=i < read, other=0.0), mask=i < written)


@triton.jit
def float_kernel(a_ptr, b_ptr, quotient_ptr, tanh_ptr, sigmoid_ptr, N: tl.constexpr):
    i = tl.arange(0, N)
    a = tl.load(a_ptr + i)
    tl.store(quotient_ptr + i, fast_divide(a, tl.load(b_ptr + i)))
    tl.store(tanh_ptr + i, tanh_approximate(a))
    tl.store(sigmoid_ptr + i, stable_sigmoid(a))


@triton.jit
def entries_kernel(out_ptr, counts_ptr, score_ptr, reach_ptr, step, ROWS: tl.constexpr, N: tl.constexpr):
    """Row r's entries from out + 2 N r (or from the end of that) on, in the order of their columns; their number."""
    r = tl.arange(0, ROWS)
    reach = tl.load(reach_ptr + r)
    pointer = out_ptr + r * 2 * N + tl.where(step > 0, 0, 2 * N - 1)
    count = tl.zeros([ROWS], tl.int32)
    for i in range(N):
        score = tl.load(score_ptr + r * N + i)
        count = count_if(count, score, reach)
        pointer = append_entry(pointer, step, score, reach, tl.full([ROWS], 1000, tl.int32) + i)
    tl.store(counts_ptr + r, count)


def words(device: str) -> torch.Tensor:
    x = torch.randint(-(2**31), 2**31, (1024,), generator=torch.Generator().manual_seed(0))
    x[: len(EDGES) * 32] = torch.tensor(EDGES).repeat_interleave(32)
    return x.to(torch.int32).to(device)


def test_population_counts_are_those_of_the_bits(device):
    x = words(device)
    count = torch.empty_like(x)
    bits_kernel[(1,)](x, count, N=1024)
    assert count.tolist() == [(v & 0xFFFFFFFF).bit_count() for v in x.tolist()]


def run_floats(a: torch.Tensor, b: torch.Tensor) -> list[np.ndarray]:
    results = [torch.empty_like(a) for _ in range(3)]
    float_kernel[(1,)](a, b, *results, N=len(a))
    return [x.double().cpu().numpy() for x in results]


def test_fast_division_is_within_two_ulp(device):
    g = torch.Generator().manual_seed(0)
    a, b = (torch.randn(1024, generator=g) * 2.0 ** torch.randint(-60, 60, (1024,), generator=g) for _ in range(2))
    b[:4] = torch.tensor([2.0**-126, 2.0**126, -(2.0**-126), (1 + 2.0**30) ** 4])
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
    """A score equal to its row's threshold is an entry; −2 reaches nothing, −1 admits every score, NaN is none."""
    scores = torch.rand(8, 16, generator=torch.Generator().manual_seed(0))
    scores[5:7, :4] = torch.tensor([math.nan, -2.0, 0.0, 1.0])
    reach = torch.tensor([0.5, 0.5, 0.0, math.inf, -1.0, -1.0, 0.5, 0.25])
    reach[0] = scores[0, 7]
    out = torch.full((8, 32), -7, dtype=torch.int64, device=device)
    counts = torch.empty(8, dtype=torch.int32, device=device)
    entries_kernel[(1,)](out, counts, scores.to(device), reach.to(device), step, ROWS=8, N=16)
    mask = scores >= reach[:, None]
    assert counts.tolist() == mask.sum(1).tolist()
    for row, row_scores, row_mask in zip(out.cpu(), scores, mask, strict=True):
        row = row.flip(0) if step < 0 else row
        n = int(row_mask.sum())
        assert (row[:n] & 0xFFFFFFFF).tolist() == (1000 + row_mask.nonzero()[:, 0]).tolist()
        assert (row[:n] >> 32).int().view(torch.float32).tolist() == row_scores[row_mask].tolist()
        assert (row[n:] == -7).all()


@pytest.mark.skipif(not INTERPRETED, reason="a device checks no addresses")
@pytest.mark.parametrize(
    ("read", "written", "message"), [(8, 7, None), (9, 7, "1 of 9 elements read"), (8, 8, "1 of 8 elements written")]
)
def test_an_address_outside_the_tensors_of_a_launch_raises_in_the_interpreter(read, written, message):
    everything = torch.zeros(64)
    x, out = everything[:8].clone(), everything[:7].clone()
    with pytest.raises(Exception, match=f"{message} lie outside") if message else nullcontext():
        copy_kernel[(1,)](x, out, read, written, N=16)
