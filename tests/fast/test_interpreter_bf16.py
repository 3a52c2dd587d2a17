"""The patched interpreter computes bfloat16 as PyTorch does, over all 65,536 values."""

import numpy as np
import pytest
import torch
import triton
import triton.language as tl

from tests.interpreter_bf16 import bf16_to_float32, float32_to_bf16

pytestmark = [
    pytest.mark.usefixtures("bf16"),
    pytest.mark.skipif(torch.cuda.is_available(), reason="kernels run on the GPU here, not in the interpreter"),
]

ALL_BITS = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(torch.bfloat16)


def assert_same(x: torch.Tensor, y: torch.Tensor) -> None:
    assert torch.equal(x.isnan(), y.isnan())
    assert torch.equal(x.nan_to_num(0).view(torch.int16), y.nan_to_num(0).view(torch.int16))


@triton.jit
def upcast_kernel(x_ptr, out_ptr, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(out_ptr + i, tl.load(x_ptr + i).to(tl.float32))


@triton.jit
def downcast_kernel(x_ptr, out_ptr, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(out_ptr + i, tl.load(x_ptr + i).to(tl.bfloat16))


@triton.jit
def arithmetic_kernel(x_ptr, y_ptr, sum_ptr, product_ptr, less_ptr, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(x_ptr + i)
    y = tl.load(y_ptr + i)
    tl.store(sum_ptr + i, x + y)
    tl.store(product_ptr + i, x * y)
    tl.store(less_ptr + i, (x < y).to(tl.int32))


@triton.jit
def dot_kernel(a_ptr, b_ptr, out_ptr, N: tl.constexpr):
    i = tl.arange(0, N)
    a = tl.load(a_ptr + i[:, None] * N + i[None, :])
    b = tl.load(b_ptr + i[:, None] * N + i[None, :])
    tl.store(out_ptr + i[:, None] * N + i[None, :], tl.dot(a, b))


def test_every_bfloat16_value_is_read_exactly():
    out = torch.empty(2**16)
    upcast_kernel[(8,)](ALL_BITS, out, BLOCK=2**13)
    expected = ALL_BITS.float()
    assert torch.equal(out.isnan(), expected.isnan())
    assert torch.equal(out.nan_to_num(0).view(torch.int32), expected.nan_to_num(0).view(torch.int32))


def test_float32_is_rounded_to_nearest_even():
    exact = ALL_BITS.float()
    generator = torch.Generator().manual_seed(0)
    noise = torch.randint(0, 2**16, (2**16,), generator=generator, dtype=torch.int32)
    halfway = torch.full((2**16,), 2**15, dtype=torch.int32)
    for low_bits in (noise, halfway):
        x = (exact.view(torch.int32) | low_bits).view(torch.float32)
        out = torch.empty(2**16, dtype=torch.bfloat16)
        downcast_kernel[(8,)](x, out, BLOCK=2**13)
        assert_same(out, x.to(torch.bfloat16))


def test_arithmetic_and_comparison_equal_pytorch():
    y = ALL_BITS[torch.randperm(2**16, generator=torch.Generator().manual_seed(1))]
    total, product = (torch.empty(2**16, dtype=torch.bfloat16) for _ in range(2))
    less = torch.empty(2**16, dtype=torch.int32)
    with np.errstate(all="ignore"):
        arithmetic_kernel[(8,)](ALL_BITS, y, total, product, less, BLOCK=2**13)
    assert_same(total, ALL_BITS + y)
    assert_same(product, ALL_BITS * y)
    assert torch.equal(less.bool(), y > ALL_BITS)


def test_a_dot_sums_exact_products_in_float32():
    generator = torch.Generator().manual_seed(2)
    a, b = (torch.randint(-8, 9, (32, 32), generator=generator).to(torch.bfloat16) for _ in range(2))
    out = torch.empty(32, 32)
    dot_kernel[(1,)](a, b, out, N=32)
    assert torch.equal(out, a.float() @ b.float())  # small integers: exact in any order


def test_the_helpers_are_inverse_on_every_value():
    bits = np.arange(2**16, dtype=np.uint16)
    x = bf16_to_float32(bits)
    back = float32_to_bf16(x)
    assert np.array_equal(back[~np.isnan(x)], bits[~np.isnan(x)])
    assert np.isnan(bf16_to_float32(back[np.isnan(x)])).all()
