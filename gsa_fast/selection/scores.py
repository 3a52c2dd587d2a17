"""Eq. 7 for a tile of queries and keys in registers, with few special-function instructions."""

import triton
import triton.language as tl

from gsa_fast._primitives import fast_divide, stable_sigmoid, tanh_approximate

LOG2_E = tl.constexpr(1.4426950408889634)
HALF_LN_2 = tl.constexpr(-0.34657359027997264)  # from −z log2 e to z/2
# (1 + 2^60)² is a float32; σ(−60 ln 2) < 10^−18.
LARGEST_EXPONENT = tl.constexpr(60.0)


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
def one_plus_exp2(b_q, b_kt, factor, bias):
    """1 + e with e = exp(−z), [BLOCK_L, BLOCK_S]."""
    x = factor * tl.dot(b_q, b_kt, input_precision="ieee") + bias
    return 1.0 + tl.exp2(tl.minimum(x, LARGEST_EXPONENT, propagate_nan=tl.PropagateNan.ALL))


@triton.jit
def two_heads(b_q, weight, bias, b_kt, factor, j: tl.constexpr, H_I: tl.constexpr):
    """a σ(z) + a' σ(z') of heads j and j + 1, with one division: (a(1+e') + a'(1+e)) / ((1+e)(1+e'))."""
    denominator = one_plus_exp2(b_q[j], b_kt, factor, bias[j])
    if j + 1 < H_I:
        other = one_plus_exp2(b_q[j + 1], b_kt, factor, bias[j + 1])
        numerator = weight[j][:, None] * other + weight[j + 1][:, None] * denominator
        return fast_divide(numerator, denominator * other)
    else:
        return fast_divide(tl.broadcast_to(weight[j][:, None], denominator.shape), denominator)


@triton.jit
def score_tile(b_q, weight, bias, b_k, factor, H_I: tl.constexpr, APPROXIMATE: tl.constexpr):
    """Eq. 7 for a tile: Σ_j a_j σ(z_j), [BLOCK_L, BLOCK_S]; factor is −scale · log2 e.

    Exact: σ(z) = 1 / (1 + e) with e = 2^(−z log2 e); two heads share a division, because special functions are the
    scarcest instructions here. Approximate: σ(z) = ½ + ½ tanh(z/2), one instruction with a relative error of 2^−11.
    """
    b_kt = tl.trans(b_k)
    if APPROXIMATE:
        total = 0.5 * weight[0]
        for j in tl.static_range(1, H_I):
            total += 0.5 * weight[j]
        scores = total[:, None]
        for j in tl.static_range(H_I):
            half_z = (factor * HALF_LN_2) * tl.dot(b_q[j], b_kt, input_precision="ieee") + bias[j] * HALF_LN_2
            scores = scores + (0.5 * weight[j])[:, None] * tanh_approximate(half_z)
        return tl.maximum(scores, 0.0, propagate_nan=tl.PropagateNan.ALL)  # rounding may go below
    else:
        for j in tl.static_range(0, H_I, 2):
            pair = two_heads(b_q, weight, bias, b_kt, factor, j, H_I)
            if j == 0:
                scores = pair
            else:
                scores += pair
        return scores
