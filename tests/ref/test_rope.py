"""Rotary position embedding."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from gsa_ref import apply_rope, equations
from gsa_ref.check import gamma
from tests.ref import oracle
from tests.strategies import SEEDS

SIZES = st.tuples(st.integers(1, 3), st.integers(1, 12), st.integers(1, 3), st.sampled_from((2, 4, 8, 24, 64)))
STARTS = st.integers(0, 1000)
U64 = 2.0**-53


def draw(size: tuple[int, ...], seed: int, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return torch.randn(size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def angle_error(position: int, u: float) -> float:
    """Largest error of cos and sin: the angle is at most `position`, off by a few roundings."""
    return gamma(8, u) * (position + 1)


@given(SIZES, SEEDS, STARTS, st.sampled_from((100.0, 10000.0)))
def test_float64_equals_the_equations(size, seed, start, theta):
    x = draw(size, seed)
    out = apply_rope(x, start=start, theta=theta)
    gold = np.stack([equations.apply_rope(oracle.array(row), start=start, theta=theta) for row in x])
    budget = 2 * angle_error(start + size[1], U64) * 2 * float(x.abs().max())
    assert np.abs(out.numpy() - gold).max() <= budget


@given(SIZES, SEEDS, STARTS)
def test_float32_angles_are_as_good_as_float32_allows(size, seed, start):
    x = draw(size, seed, torch.float32)
    out = apply_rope(x, start=start)
    gold = apply_rope(x.double(), start=start)
    budget = 2 * angle_error(start + size[1], 2.0**-24) * 2 * float(x.abs().max())
    assert out.dtype == torch.float32
    assert float((out - gold).abs().max()) <= budget


@given(SIZES, SEEDS, st.sampled_from((torch.float16, torch.bfloat16)))
def test_sixteen_bit_inputs_are_rotated_in_float32_and_rounded_once(size, seed, dtype):
    x = draw(size, seed, dtype)
    assert torch.equal(apply_rope(x, start=5), apply_rope(x.float(), start=5).to(dtype))


@given(SIZES, SEEDS, STARTS)
def test_rotation_keeps_the_length_of_every_pair(size, seed, start):
    x = draw(size, seed)
    half = size[-1] // 2
    before, after = (torch.hypot(y[..., :half], y[..., half:]) for y in (x, apply_rope(x, start=start)))
    assert ((after - before).abs() <= gamma(16, U64) * (before + 1e-300)).all()


@given(SIZES, SEEDS)
def test_position_zero_is_not_rotated(size, seed):
    x = draw(size, seed)
    assert torch.equal(apply_rope(x)[:, 0], x[:, 0])


@given(SEEDS, st.integers(0, 500), st.integers(0, 500), st.integers(1, 500))
def test_inner_products_depend_on_the_distance_only(seed, p, s, shift):
    q, k = draw((1, 1, 1, 16), seed), draw((1, 1, 1, 16), seed + 1)

    def inner(q_position: int, k_position: int) -> float:
        return float((apply_rope(q, start=q_position) * apply_rope(k, start=k_position)).sum())

    budget = 8 * angle_error(1000, U64) * 16 * float(q.abs().max() * k.abs().max())
    assert abs(inner(p, s) - inner(p + shift, s + shift)) <= budget


@given(SIZES, SEEDS, STARTS, st.data())
def test_a_chunk_equals_its_part_of_the_whole(size, seed, start, data):
    x = draw(size, seed)
    cut = data.draw(st.integers(0, size[1]))
    chunks = apply_rope(x[:, :cut], start=start), apply_rope(x[:, cut:], start=start + cut)
    budget = 2 * angle_error(start + size[1], U64) * 2 * float(x.abs().max())
    assert float((torch.cat(chunks, 1) - apply_rope(x, start=start)).abs().max()) <= budget


@given(SIZES, SEEDS, st.lists(STARTS, min_size=3, max_size=3))
def test_every_sequence_has_its_own_start(size, seed, starts):
    x = draw(size, seed)
    starts = starts[: size[0]]
    out = apply_rope(x, start=torch.tensor(starts, dtype=torch.int32))
    for b, start in enumerate(starts):
        budget = 2 * angle_error(start + size[1], U64) * 2 * float(x.abs().max())
        assert float((out[b] - apply_rope(x[b : b + 1], start=start)[0]).abs().max()) <= budget


@pytest.mark.parametrize("size", [(0, 3, 1, 4), (2, 0, 1, 4), (2, 3, 0, 4)])
def test_empty_axes_give_empty_outputs(size):
    assert apply_rope(torch.ones(size), start=torch.zeros(size[0], dtype=torch.int32)).shape == size
