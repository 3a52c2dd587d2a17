"""From ∂L/∂I to the inputs of Eq. 7, by the chain rule, with z_j = scale · q_j·k + b_j and I = Σ_j σ(w_j) σ(z_j).

∂L/∂w_j = σ'(w_j) Σ_s ∂L/∂I · σ(z_j) and ∂L/∂z_j = ∂L/∂I · σ(w_j) σ'(z_j). From the latter come
∂L/∂q_j = scale · Σ_s ∂L/∂z_j k_s, ∂L/∂k_s = scale · Σ_t Σ_j ∂L/∂z_j q_j and ∂L/∂b_j = Σ_t Σ_s ∂L/∂z_j. The factor
1 / (τ · number of valid rows) of ∂L/∂I comes last, on the host: in 16 bits the terms would be too small with it.
"""

import triton
import triton.language as tl
from torch import Tensor

from gsa_fast._primitives import stable_sigmoid
from gsa_fast.attention.rows import load_rows
from gsa_fast.training.tiles import (
    GRADIENT_SCALE,
    count_keys,
    dot_in_two,
    load_index_keys,
    load_weight,
    tile_rows,
    visible_pairs,
    warps,
)


@triton.jit
def query_gradients_kernel(
    q_ptr, k_ptr, weight_ptr, bias_ptr, start_ptr, lengths_ptr, score_gradient_ptr,
    q_gradient_ptr, weight_gradient_ptr, bias_gradient_ptr,
    stride_qb, stride_ql, stride_qh, stride_qd, stride_kb, stride_ks, stride_kd,
    stride_wb, stride_wl, stride_wh, stride_bias,
    first_row, rows, L, S, H_I, scale,
    d_I: tl.constexpr, BLOCK_L: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_I: tl.constexpr,
):  # fmt: skip
    """The gradients of q_j, w_j, and each row's share of that of b_j, for BLOCK_L queries and one indexer head."""
    pid = tl.program_id(0)
    tiles = tl.cdiv(rows, BLOCK_L)
    j = (pid % H_I).to(tl.int64)
    first = pid // H_I % tiles * BLOCK_L
    b = (pid // H_I // tiles).to(tl.int64)
    row = first + tl.arange(0, BLOCK_L)
    inside = row < rows
    t = (first_row + row).to(tl.int64)
    c = tl.arange(0, BLOCK_I).to(tl.int64)
    start, length = tl.load(start_ptr + b), tl.load(lengths_ptr + b)
    position = start + first_row + row
    valid = inside & (position < length)  # padding, which may be NaN, is not looked at
    q_mask = valid[:, None] & (c < d_I)[None, :]
    b_q = load_rows(q_ptr, b, t, j, c, q_mask, stride_qb, stride_ql, stride_qh, stride_qd)  # [BLOCK_L, BLOCK_I]
    weight = load_weight(weight_ptr, b, t, j, valid, stride_wb, stride_wl, stride_wh)
    bias = tl.load(bias_ptr + j * stride_bias).to(tl.float32)
    begin = start + first_row + first
    n_keys = count_keys(begin, begin + tl.minimum(BLOCK_L, rows - first), length, S)
    p_row = score_gradient_ptr + (b * rows + row) * S

    q_gradient = tl.zeros([BLOCK_L, BLOCK_I], tl.float32)
    weight_gradient = tl.zeros([BLOCK_L], tl.float32)
    bias_gradient = tl.zeros([BLOCK_L], tl.float32)
    for first_key in range(0, n_keys, BLOCK_S):
        s = first_key + tl.arange(0, BLOCK_S)
        keep = visible_pairs(position, length, s, S) & inside[:, None]
        score_gradient = tl.load(p_row[:, None] + s[None, :], mask=keep, other=0.0)  # [BLOCK_L, BLOCK_S]
        b_k = load_index_keys(k_ptr, b, s, s < n_keys, c, stride_kb, stride_ks, stride_kd, d_I)
        sigmoid = stable_sigmoid(scale * tl.dot(b_q, tl.trans(b_k), input_precision="ieee") + bias)
        weighted = score_gradient * sigmoid
        dz = weighted * (1.0 - sigmoid)  # without σ(w), which is a factor of the row
        weight_gradient += tl.sum(weighted, axis=1)
        bias_gradient += tl.sum(dz, axis=1)
        q_gradient = dot_in_two(dz * GRADIENT_SCALE, b_k, q_gradient)
    out = (b * L + t) * H_I + j
    q_gradient = q_gradient * (weight * (scale / GRADIENT_SCALE))[:, None]
    tl.store(q_gradient_ptr + out[:, None] * d_I + c[None, :], q_gradient, mask=inside[:, None] & (c < d_I)[None, :])
    tl.store(weight_gradient_ptr + out, weight * (1.0 - weight) * weight_gradient, mask=inside)
    tl.store(bias_gradient_ptr + out, weight * bias_gradient, mask=inside)


@triton.jit
def key_gradients_kernel(
    q_ptr, k_ptr, weight_ptr, bias_ptr, start_ptr, lengths_ptr, valid_ptr, score_gradient_ptr, k_gradient_ptr,
    stride_qb, stride_ql, stride_qh, stride_qd, stride_kb, stride_ks, stride_kd,
    stride_wb, stride_wl, stride_wh, stride_bias,
    first_row, rows, L, S, H_I, scale,
    d_I: tl.constexpr, BLOCK_L: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_I: tl.constexpr, CLEAR: tl.constexpr,
):  # fmt: skip
    """Add to the gradient of BLOCK_S keys what the valid queries of a chunk give. Chunks come one after another.

    ∂L/∂I is 0 where a query did not select a visible key: such a pair counts as nothing, even if z is NaN. With CLEAR,
    ∂L/∂I is 0 everywhere afterwards; this is the only program that reads its columns.
    """
    pid = tl.program_id(0)
    tiles = tl.cdiv(S, BLOCK_S)
    first_key = pid % tiles * BLOCK_S
    b = (pid // tiles).to(tl.int64)
    s = first_key + tl.arange(0, BLOCK_S)
    c = tl.arange(0, BLOCK_I).to(tl.int64)
    b_k = load_index_keys(k_ptr, b, s, s < S, c, stride_kb, stride_ks, stride_kd, d_I)  # [BLOCK_S, BLOCK_I]
    start, length = tl.load(start_ptr + b), tl.load(lengths_ptr + b)

    k_gradient = tl.zeros([BLOCK_S, BLOCK_I], tl.float32)
    begin = tl.maximum(first_key - start - first_row, 0) // BLOCK_L * BLOCK_L  # earlier rows see none of the keys
    end = tl.minimum(rows, tl.maximum(length - start - first_row, 0))  # later rows are padding
    for first in range(begin, end, BLOCK_L):
        row = first + tl.arange(0, BLOCK_L)
        inside = row < end
        t = (first_row + row).to(tl.int64)
        position = start + first_row + row
        keep = (s[:, None] <= position[None, :]) & (s < S)[:, None] & inside[None, :]
        p_tile = score_gradient_ptr + (b * rows + row)[None, :] * S + s[:, None]
        score_gradient = tl.load(p_tile, mask=keep, other=0.0)  # [BLOCK_S, BLOCK_L]
        valid = tl.load(valid_ptr + b * L + t, mask=inside, other=0) != 0
        for head in range(H_I):
            j = tl.cast(head, tl.int64)
            q_mask = valid[:, None] & (c < d_I)[None, :]
            b_q = load_rows(q_ptr, b, t, j, c, q_mask, stride_qb, stride_ql, stride_qh, stride_qd)
            weight = load_weight(weight_ptr, b, t, j, valid, stride_wb, stride_wl, stride_wh)
            bias = tl.load(bias_ptr + j * stride_bias).to(tl.float32)
            sigmoid = stable_sigmoid(scale * tl.dot(b_k, tl.trans(b_q), input_precision="ieee") + bias)
            dz = weight[None, :] * score_gradient * sigmoid * (1.0 - sigmoid)  # [BLOCK_S, BLOCK_L]
            dz = tl.where(score_gradient == 0.0, 0.0, dz)
            k_gradient = dot_in_two(dz * GRADIENT_SCALE, b_q, k_gradient)
        if CLEAR:
            tl.debug_barrier()  # every thread has loaded its part of the tile
            tl.store(p_tile, tl.zeros([BLOCK_S, BLOCK_L], tl.float32), mask=keep)
    p_gradient = k_gradient_ptr + (b * S + s)[:, None] * d_I + c[None, :]
    mask = (s < S)[:, None] & (c < d_I)[None, :]
    before = tl.load(p_gradient, mask=mask, other=0.0)
    tl.store(p_gradient, before + k_gradient * (scale / GRADIENT_SCALE), mask=mask)


def launch_query_gradients(
    q_idx: Tensor,
    k_idx: Tensor,
    head_logits: Tensor,
    bias: Tensor,
    start: Tensor,
    lengths: Tensor,
    scale: float,
    first_row: int,
    score_gradient: Tensor,
    gradients: tuple[Tensor, Tensor, Tensor],
) -> None:
    """Fill the rows from `first_row` on of the gradients of q_idx, head_logits and, per row, bias.

    `score_gradient` is that of the chunk, [B, rows, S] (contiguous).
    """
    (B, rows, S), (L, H_I, d_I) = score_gradient.shape, q_idx.shape[1:]
    block_i = max(16, triton.next_power_of_2(d_I))
    block = tile_rows(2 * block_i, q_idx.dtype)
    query_gradients_kernel[(triton.cdiv(rows, block) * H_I * B,)](
        q_idx, k_idx, head_logits, bias, start, lengths, score_gradient, *gradients,
        *q_idx.stride(), *k_idx.stride(), *head_logits.stride(), *bias.stride(),
        first_row, rows, L, S, H_I, scale,
        d_I=d_I, BLOCK_L=block, BLOCK_S=block, BLOCK_I=block_i, num_warps=warps(q_idx.dtype),
    )  # fmt: skip


def launch_key_gradients(
    q_idx: Tensor,
    k_idx: Tensor,
    head_logits: Tensor,
    bias: Tensor,
    start: Tensor,
    lengths: Tensor,
    scale: float,
    first_row: int,
    valid: Tensor,
    score_gradient: Tensor,
    clear: bool,
    k_gradient: Tensor,
) -> None:
    """Add to `k_gradient` [B, S, d_I] (contiguous) what the queries from `first_row` on give, as many as the chunk has.

    `valid` [B, L] says which rows count. `score_gradient` is that of the chunk, [B, rows, S] (contiguous). With
    `clear`, what was used of it is 0 afterwards.
    """
    (B, rows, S), (L, H_I, d_I) = score_gradient.shape, q_idx.shape[1:]
    block_i = max(16, triton.next_power_of_2(d_I))
    block = tile_rows(2 * block_i, q_idx.dtype)
    key_gradients_kernel[(triton.cdiv(S, block) * B,)](
        q_idx, k_idx, head_logits, bias, start, lengths, valid, score_gradient, k_gradient,
        *q_idx.stride(), *k_idx.stride(), *head_logits.stride(), *bias.stride(),
        first_row, rows, L, S, H_I, scale,
        # Half as many queries as keys: a pair has more numbers to hold than in the other kernels.
        d_I=d_I, BLOCK_L=max(16, block // 2), BLOCK_S=block, BLOCK_I=block_i, CLEAR=clear,
        num_warps=warps(q_idx.dtype),
    )  # fmt: skip
