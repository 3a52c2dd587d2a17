"""What the kernels of the KL loss share: which pairs count, Eq. 7 for a tile, a dot that keeps a float32 factor."""

import torch
import triton
import triton.language as tl

from gsa_fast._primitives import stable_sigmoid
from gsa_fast.attention.rows import load_rows

# Below it log p would be −∞ where subnormal numbers are flushed to 0, and 0 · ∞ is NaN.
SMALLEST_NORMAL = tl.constexpr(2.0**-126)
# |∂L/∂z| ≤ ¼ before it is divided by τ and the number of rows: 2^14 fits float16, and 10^−9 is still a normal number.
GRADIENT_SCALE = tl.constexpr(2.0**16)


@triton.jit
def visible_pairs(position, length, s, S):
    """Which keys s a query at `position` may see, [BLOCK_L, BLOCK_S]. A query that is no padding sees no padding."""
    return (s[None, :] <= position[:, None]) & (position < length)[:, None] & (s < S)[None, :]


@triton.jit
def count_keys(begin, end, length, S):
    """How many keys the queries at positions begin to end − 1 see together. No other, which may be NaN, is read."""
    return tl.where(begin < length, tl.minimum(tl.minimum(end, length), S), 0)


@triton.jit
def load_index_keys(k_ptr, b, s, keep, c, stride_b, stride_s, stride_d, d_I: tl.constexpr):
    """k^I[b, s, :], 0 where not to keep: [BLOCK_S, BLOCK_I]."""
    return tl.load(
        k_ptr + b * stride_b + s.to(tl.int64)[:, None] * stride_s + c[None, :] * stride_d,
        mask=keep[:, None] & (c < d_I)[None, :],
        other=0.0,
    )


@triton.jit
def load_weight(weight_ptr, b, t, j, inside, stride_b, stride_l, stride_h):
    """σ(w[b, t, j]), ½ where not inside: one entry per row of t (or of j)."""
    w = tl.load(weight_ptr + b * stride_b + t * stride_l + j * stride_h, mask=inside, other=0.0)
    return stable_sigmoid(w.to(tl.float32))


@triton.jit
def score_tile(
    q_ptr, weight_ptr, bias_ptr, b, t, inside, b_k,
    stride_qb, stride_ql, stride_qh, stride_qd, stride_wb, stride_wl, stride_wh, stride_bias,
    H_I, scale, d_I: tl.constexpr, BLOCK_L: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_I: tl.constexpr,
):  # fmt: skip
    """Eq. 7: I[t,s] = Σ_j σ(w[t,j]) · σ(scale · q[t,j]·k[s] + b_j), [BLOCK_L, BLOCK_S]."""
    c = tl.arange(0, BLOCK_I).to(tl.int64)
    scores = tl.zeros([BLOCK_L, BLOCK_S], tl.float32)
    for head in range(H_I):
        j = tl.cast(head, tl.int64)
        q_mask = inside[:, None] & (c < d_I)[None, :]
        b_q = load_rows(q_ptr, b, t, j, c, q_mask, stride_qb, stride_ql, stride_qh, stride_qd)  # [BLOCK_L, BLOCK_I]
        weight = load_weight(weight_ptr, b, t, j, inside, stride_wb, stride_wl, stride_wh)
        bias = tl.load(bias_ptr + j * stride_bias).to(tl.float32)
        z = scale * tl.dot(b_q, tl.trans(b_k), input_precision="ieee") + bias
        scores += weight[:, None] * stable_sigmoid(z)
    return scores


@triton.jit
def divergence_terms(p, x):
    """p (log p − x), 0 where p is 0; a NaN stays one."""
    return tl.where(p < SMALLEST_NORMAL, 0.0, p * (tl.log(p) - x))


@triton.jit
def dot_in_two(x, y, acc):
    """acc + x y for a float32 tile x: in 16 bits as the dots of its upper and its lower half, so that x keeps 16 bits.

    A gradient is a sum in which much cancels: rounding its terms to 16 bits would show.
    """
    if y.dtype == tl.float32:
        return tl.dot(x, y, acc, input_precision="ieee")
    else:
        high = x.to(y.dtype)
        low = (x - high.to(tl.float32)).to(y.dtype)
        return tl.dot(low, y, tl.dot(high, y, acc))


def tile_rows(width: int, dtype: torch.dtype) -> int:
    """Queries or keys of a tile: 16 KiB of them, or 8 of float32, whose exact dots need more registers."""
    return max(16, min(64, (2048 if dtype == torch.float32 else 8192) // width))


def warps(dtype: torch.dtype) -> int:
    """Warps of a program: an exact float32 dot spills registers with 4."""
    return 8 if dtype == torch.float32 else 4
