"""Eq. 7 for a tile of queries and keys in registers, with few special-function instructions."""

import triton
import triton.language as tl

from gsa_fast._primitives import fast_divide, stable_sigmoid, tanh_approximate

LOG2_E = tl.constexpr(1.4426950408889634)
HALF_LN_2 = tl.constexpr(-0.34657359027997264)  # from −z log2 e to z/2
# (1 + 2^30)⁴ is a float32; σ(−30 ln 2) < 10^−9.
LARGEST_EXPONENT = tl.constexpr(30.0)
# A little more than ½, so that a sum of σ(z) = ½ + ½ tanh(z/2) never rounds below 0: scores are ordered by their bits.
HALF_UP = tl.constexpr(0.5 * (1 + 2**-19))


@triton.jit
def load_queries(
    q_ptr, weight_ptr, bias_ptr, stride_ql, stride_qh, stride_qd, stride_wl, stride_wh, stride_bias, row, inside,
    H_I: tl.constexpr, d_I: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Per indexer head: the query tile [BLOCK_L, BLOCK_D], σ(w) [BLOCK_L], and −bias in base 2."""
    c = tl.arange(0, BLOCK_D).to(tl.int64)
    b_q, weight, bias = (), (), ()  # Triton's tuples grow by +
    for j in tl.static_range(H_I):
        p_q = q_ptr + row.to(tl.int64)[:, None] * stride_ql + tl.cast(j, tl.int64) * stride_qh + c[None, :] * stride_qd
        head_q = tl.load(p_q, mask=inside[:, None] & (c < d_I)[None, :], other=0.0)
        p_weight = weight_ptr + row.to(tl.int64) * stride_wl + tl.cast(j, tl.int64) * stride_wh
        head_weight = stable_sigmoid(tl.load(p_weight, mask=inside, other=0.0).to(tl.float32))
        head_bias = tl.load(bias_ptr + tl.cast(j, tl.int64) * stride_bias).to(tl.float32) * -LOG2_E
        b_q += (head_q,)  # type: ignore[assignment]
        weight += (head_weight,)  # type: ignore[assignment]
        bias += (head_bias,)  # type: ignore[assignment]
    return b_q, weight, bias


@triton.jit
def exp2_of_minus_z(b_q, b_kt, factor, bias):
    """e = exp(−z), [BLOCK_L, BLOCK_S]."""
    x = factor * tl.dot(b_q, b_kt, input_precision="ieee") + bias
    return tl.exp2(tl.minimum(x, LARGEST_EXPONENT, propagate_nan=tl.PropagateNan.ALL))


@triton.jit
def two_heads(b_q, weight, bias, b_kt, factor, j: tl.constexpr, H_I: tl.constexpr):
    """a σ(z) + a' σ(z') of heads j and j + 1 as a fraction: (a + a' + a e' + a' e) / ((1 + e)(1 + e'))."""
    e = exp2_of_minus_z(b_q[j], b_kt, factor, bias[j])
    if j + 1 < H_I:
        other = exp2_of_minus_z(b_q[j + 1], b_kt, factor, bias[j + 1])
        numerator = weight[j][:, None] * other + (weight[j] + weight[j + 1])[:, None]
        numerator = weight[j + 1][:, None] * e + numerator
        denominator = 1.0 + e
        return numerator, denominator * other + denominator
    else:
        return tl.broadcast_to(weight[j][:, None], e.shape), 1.0 + e


@triton.jit
def four_heads(b_q, weight, bias, b_kt, factor, j: tl.constexpr, H_I: tl.constexpr):
    """Σ a σ(z) of up to four heads from j on, with one division."""
    numerator, denominator = two_heads(b_q, weight, bias, b_kt, factor, j, H_I)
    if j + 2 < H_I:
        other_numerator, other_denominator = two_heads(b_q, weight, bias, b_kt, factor, j + 2, H_I)
        numerator = numerator * other_denominator + other_numerator * denominator
        denominator = denominator * other_denominator
    return fast_divide(numerator, denominator)


@triton.jit
def score_tile(b_q, weight, bias, b_k, factor, H_I: tl.constexpr, APPROXIMATE: tl.constexpr):
    """Eq. 7 for a tile: Σ_j a_j σ(z_j), [BLOCK_L, BLOCK_S]; factor is −scale · log2 e.

    Exact: σ(z) = 1 / (1 + e) with e = 2^(−z log2 e); four heads share a division, because special functions are the
    scarcest instructions here. Approximate: σ(z) = ½ + ½ tanh(z/2), one instruction with a relative error of 2^−11.
    """
    b_kt = tl.trans(b_k)
    if APPROXIMATE:
        total = HALF_UP * weight[0]
        for j in tl.static_range(1, H_I):
            total += HALF_UP * weight[j]
        scores = total[:, None]
        for j in tl.static_range(H_I):
            half_z = (factor * HALF_LN_2) * tl.dot(b_q[j], b_kt, input_precision="ieee") + bias[j] * HALF_LN_2
            scores = scores + (0.5 * weight[j])[:, None] * tanh_approximate(half_z)
        return scores
    else:
        for j in tl.static_range(0, H_I, 4):
            part = four_heads(b_q, weight, bias, b_kt, factor, j, H_I)
            if j == 0:
                scores = part
            else:
                scores += part
        return scores
