"""What the attention kernels share: loading rows, the online softmax, writing a result. Logits are in base 2.

A tile has one row per pair of a query and a head. b is a scalar; t and head are a scalar or one entry per row.
"""

import math

import triton
import triton.language as tl

from gsa_fast._primitives import stable_sigmoid

# The hardware has 2^x: launchers multiply the scale by log₂ e, in float64, and the kernels work in base 2.
LOG2_E = math.log2(math.e)
LN_2 = tl.constexpr(math.log(2))


@triton.jit
def load_rows(ptr, b, t, head, c, mask, stride_b, stride_l, stride_h, stride_d):
    """x[b, t, head, :] for every row of a tile, 0 where masked: [BLOCK_M, BLOCK_D]."""
    row = b * stride_b + t * stride_l + head * stride_h
    return tl.load(ptr + row[:, None] + c[None, :] * stride_d, mask=mask, other=0.0)


@triton.jit
def load_keys(p_rows, c, stride_d, d_h: tl.constexpr, BLOCK_D: tl.constexpr):
    """The channels of keys (or values) whose addresses are p_rows, all of them legal: [BLOCK_N, BLOCK_D]."""
    p = p_rows[:, None] + c[None, :] * stride_d
    if d_h == BLOCK_D:  # a mask would cost on every load
        return tl.load(p)
    else:
        return tl.load(p, mask=(c < d_h)[None, :], other=0.0)


@triton.jit
def is_nonfinite(x):
    """1 where x is NaN or infinite."""
    return (~(tl.abs(x.to(tl.float32)) < float("inf"))).to(tl.int32)


@triton.jit
def load_finite(p_rows, c, stride_d, d_h: tl.constexpr):
    """Like `load_keys`, with 0 for all channels of a row where one is not finite; and which rows those are."""
    p = p_rows[:, None] + c[None, :] * stride_d
    mask = (c < d_h)[None, :]
    bad = tl.max(is_nonfinite(tl.load(p, mask=mask, other=0.0)), axis=1)  # [BLOCK_N]
    return tl.load(p, mask=mask & (bad == 0)[:, None], other=0.0), bad


@triton.jit
def online_softmax_update(m, l, acc, logits, v):
    """Fold one tile of logits and values into the running maximum m, the sum l and the weighted sum acc.

    While a row has seen no key, m is −inf: 0 stands in for it, so that 2^(−inf − m) is 0 and not NaN.
    """
    m_new = tl.maximum(m, tl.max(logits, axis=1))
    m_safe = tl.where(m_new == float("-inf"), 0.0, m_new)
    rescale = tl.exp2(m - m_safe)
    p = tl.exp2(logits - m_safe[:, None])
    l_new = l * rescale + tl.sum(p, axis=1)
    acc_new = acc * rescale[:, None] + tl.dot(p.to(v.dtype), v, input_precision="ieee")
    return m_new, l_new, acc_new


@triton.jit
def store_rows(
    m, l, acc, empty, b, t, head, c, keep,
    gate_ptr, out_ptr, lse_ptr, stride_gb, stride_gl, stride_gh, stride_gd,
    L, H, d_h: tl.constexpr, OUTPUT_GATE: tl.constexpr,
):  # fmt: skip
    """Normalise, gate (Eq. 10) and write the rows to keep. An empty row is 0 with lse −inf.

    Any other row divides by its own sum, even if that is NaN.
    """
    mask = keep[:, None] & (c < d_h)[None, :]
    l_safe = tl.where(empty, 1.0, l)
    out = acc / l_safe[:, None]  # [BLOCK_M, BLOCK_D]
    lse = tl.where(empty, float("-inf"), (m + tl.log2(l_safe)) * LN_2)
    if OUTPUT_GATE:
        gate = load_rows(gate_ptr, b, t, head, c, mask, stride_gb, stride_gl, stride_gh, stride_gd)
        out = out * stable_sigmoid(gate.to(tl.float32))
    row = (b * L + t) * H + head  # out and lse are contiguous
    tl.store(out_ptr + row[:, None] * d_h + c[None, :], out.to(out_ptr.dtype.element_ty), mask=mask)
    tl.store(lse_ptr + row, lse, mask=keep)
