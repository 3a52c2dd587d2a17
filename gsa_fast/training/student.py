"""The student: how far its distribution is from the teacher's, and ∂L/∂I.

In the warm-up a program has a tile of queries and visible keys, in the sparse phase the selection of one query.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from gsa_fast._primitives import stable_sigmoid
from gsa_fast.attention.gather import block_k
from gsa_fast.attention.rows import LN_2, LOG2_E, load_rows
from gsa_fast.training.teacher import count_slots, load_slots
from gsa_fast.training.tiles import (
    GRADIENT_SCALE,
    count_keys,
    divergence_terms,
    dot_in_two,
    load_index_keys,
    load_weight,
    score_tile,
    tile_rows,
    visible_pairs,
    warps,
)


@triton.jit
def divergence_kernel(
    q_idx_ptr, k_idx_ptr, weight_ptr, bias_ptr, q_ptr, k_ptr, start_ptr, lengths_ptr, lse_ptr,
    p_ptr, statistics_ptr,
    stride_qib, stride_qil, stride_qih, stride_qid, stride_kib, stride_kis, stride_kid,
    stride_wb, stride_wl, stride_wh, stride_bias,
    stride_qb, stride_ql, stride_qh, stride_qd,
    stride_kb, stride_ks, stride_kh, stride_kd,
    first_row, rows, S, H_kv, GROUP, H_I, indexer_scale, scale_log2, inverse_temperature,
    d_h: tl.constexpr, d_I: tl.constexpr,
    BLOCK_L: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_I: tl.constexpr,
    STORE: tl.constexpr,
):  # fmt: skip
    """One tile of queries and keys: p = mean over heads of the attention, and what KL(p ‖ softmax(x)) needs, x = I/τ.

    Of each row of the tile: ln Σ exp(x), Σ p (log p − x) and Σ p. With STORE, p goes to the chunk's buffer as well.
    """
    pid = tl.program_id(0)
    tiles_l = tl.cdiv(rows, BLOCK_L)
    tiles_s = tl.cdiv(S, BLOCK_S)
    first = pid % tiles_l * BLOCK_L  # neighbours share their keys
    tile_s = pid // tiles_l % tiles_s
    b = (pid // tiles_l // tiles_s).to(tl.int64)
    row = first + tl.arange(0, BLOCK_L)  # [BLOCK_L] row of the chunk
    inside = row < rows
    t = (first_row + row).to(tl.int64)
    s = tile_s * BLOCK_S + tl.arange(0, BLOCK_S)
    start, length = tl.load(start_ptr + b), tl.load(lengths_ptr + b)
    position = start + first_row + row
    begin = start + first_row + first
    n_keys = count_keys(begin, begin + tl.minimum(BLOCK_L, rows - first), length, S)

    tile_lse = tl.full([BLOCK_L], float("-inf"), tl.float32)
    divergence = tl.zeros([BLOCK_L], tl.float32)
    mass = tl.zeros([BLOCK_L], tl.float32)
    if tile_s * BLOCK_S < n_keys:  # else nobody sees a key of the tile
        visible = visible_pairs(position, length, s, S)
        c = tl.arange(0, BLOCK_D).to(tl.int64)
        p = tl.zeros([BLOCK_L, BLOCK_S], tl.float32)
        for head in range(H_kv):
            h_kv = tl.cast(head, tl.int64)
            k_mask = (s < n_keys)[:, None] & (c < d_h)[None, :]
            b_k = load_rows(k_ptr, b, s.to(tl.int64), h_kv, c, k_mask, stride_kb, stride_ks, stride_kh, stride_kd)
            for g in range(GROUP):
                h = h_kv * GROUP + g
                q_mask = inside[:, None] & (c < d_h)[None, :]
                b_q = load_rows(q_ptr, b, t, h, c, q_mask, stride_qb, stride_ql, stride_qh, stride_qd)
                logits = scale_log2 * tl.dot(b_q, tl.trans(b_k), input_precision="ieee")  # [BLOCK_L, BLOCK_S]
                lse = tl.load(lse_ptr + (b * rows + row) * (H_kv * GROUP) + h, mask=inside, other=0.0) / LN_2
                p += tl.exp2(logits - lse[:, None])
        p = tl.where(visible, p / (H_kv * GROUP), 0.0)

        c_idx = tl.arange(0, BLOCK_I).to(tl.int64)
        b_k_idx = load_index_keys(k_idx_ptr, b, s, s < n_keys, c_idx, stride_kib, stride_kis, stride_kid, d_I)
        scores = score_tile(
            q_idx_ptr, weight_ptr, bias_ptr, b, t, inside, b_k_idx,
            stride_qib, stride_qil, stride_qih, stride_qid, stride_wb, stride_wl, stride_wh, stride_bias,
            H_I, indexer_scale, d_I, BLOCK_L, BLOCK_S, BLOCK_I,
        )  # fmt: skip
        x = tl.where(visible, scores * inverse_temperature, float("-inf"))
        m = tl.max(x, axis=1)
        m_safe = tl.where(m == float("-inf"), 0.0, m)
        tile_lse = m + tl.log(tl.sum(tl.exp(x - m_safe[:, None]), axis=1))
        divergence = tl.sum(divergence_terms(p, x), axis=1)
        mass = tl.sum(p, axis=1)
        if STORE:
            tl.store(p_ptr + (b * rows + row)[:, None] * S + s[None, :], p, mask=visible & inside[:, None])
    p_tile = statistics_ptr + (b * rows + row) * (3 * tiles_s) + tile_s  # [B, rows, 3, tiles_s]
    tl.store(p_tile, tile_lse, mask=inside)
    tl.store(p_tile + tiles_s, divergence, mask=inside)
    tl.store(p_tile + 2 * tiles_s, mass, mask=inside)


@triton.jit
def score_gradients_kernel(
    q_idx_ptr, k_idx_ptr, weight_ptr, bias_ptr, start_ptr, lengths_ptr, lse_ptr, p_ptr,
    stride_qb, stride_ql, stride_qh, stride_qd, stride_kb, stride_ks, stride_kd,
    stride_wb, stride_wl, stride_wh, stride_bias,
    first_row, rows, S, H_I, scale, inverse_temperature,
    d_I: tl.constexpr, BLOCK_L: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_I: tl.constexpr,
):  # fmt: skip
    """Replace p by softmax(I/τ) − p in one tile of the chunk's buffer, lse that of the student."""
    pid = tl.program_id(0)
    tiles_l = tl.cdiv(rows, BLOCK_L)
    tiles_s = tl.cdiv(S, BLOCK_S)
    first = pid % tiles_l * BLOCK_L
    tile_s = pid // tiles_l % tiles_s
    b = (pid // tiles_l // tiles_s).to(tl.int64)
    row = first + tl.arange(0, BLOCK_L)
    inside = row < rows
    t = (first_row + row).to(tl.int64)
    s = tile_s * BLOCK_S + tl.arange(0, BLOCK_S)
    start, length = tl.load(start_ptr + b), tl.load(lengths_ptr + b)
    begin = start + first_row + first
    n_keys = count_keys(begin, begin + tl.minimum(BLOCK_L, rows - first), length, S)
    if tile_s * BLOCK_S < n_keys:
        c = tl.arange(0, BLOCK_I).to(tl.int64)
        b_k = load_index_keys(k_idx_ptr, b, s, s < n_keys, c, stride_kb, stride_ks, stride_kd, d_I)
        scores = score_tile(
            q_idx_ptr, weight_ptr, bias_ptr, b, t, inside, b_k,
            stride_qb, stride_ql, stride_qh, stride_qd, stride_wb, stride_wl, stride_wh, stride_bias,
            H_I, scale, d_I, BLOCK_L, BLOCK_S, BLOCK_I,
        )  # fmt: skip
        keep = visible_pairs(start + first_row + row, length, s, S) & inside[:, None]
        lse = tl.load(lse_ptr + b * rows + row, mask=inside, other=0.0)
        p_tile = p_ptr + (b * rows + row)[:, None] * S + s[None, :]
        p = tl.load(p_tile, mask=keep, other=0.0)
        tl.store(p_tile, tl.exp(scores * inverse_temperature - lse[:, None]) - p, mask=keep)


@triton.jit
def selected_divergence_kernel(
    q_ptr, k_ptr, weight_ptr, bias_ptr, indices_ptr, counts_ptr, start_ptr, lengths_ptr, p_ptr,
    kl_ptr, valid_ptr, score_gradient_ptr, q_gradient_ptr, weight_gradient_ptr, bias_gradient_ptr,
    stride_qb, stride_ql, stride_qh, stride_qd, stride_kb, stride_ks, stride_kd,
    stride_wb, stride_wl, stride_wh, stride_bias,
    stride_ib, stride_il, stride_ik, stride_cb, stride_cl,
    first_row, rows, L, S, K, H, scale, inverse_temperature,
    H_I: tl.constexpr, d_I: tl.constexpr,
    BLOCK_H: tl.constexpr, BLOCK_I: tl.constexpr, BLOCK_K: tl.constexpr, GRADIENTS: tl.constexpr,
):  # fmt: skip
    """KL(p ‖ softmax(x)), x = I/τ, over the slots of one query, and whether one is filled. p holds sums over H heads.

    With GRADIENTS, in a second pass, softmax(x) − p goes to the columns of S_t of the chunk's buffer, and the gradients
    of this query's own inputs are summed up, as in `chain`. They lack the factor 1 / (τ · number of valid rows).
    """
    pid = tl.program_id(0).to(tl.int64)
    row = pid % rows
    b = pid // rows
    t = first_row + row
    position = tl.load(start_ptr + b) + t
    count = count_slots(counts_ptr, b, t, position, tl.load(lengths_ptr + b), K, stride_cb, stride_cl)
    j = tl.arange(0, BLOCK_H).to(tl.int64)  # [BLOCK_H] indexer heads
    c = tl.arange(0, BLOCK_I).to(tl.int64)
    is_head = j < H_I
    q_mask = is_head[:, None] & (c < d_I)[None, :]
    b_q = load_rows(q_ptr, b, t, j, c, q_mask, stride_qb, stride_ql, stride_qh, stride_qd)
    # What is no head has weight ½ and must not count.
    weight = tl.where(is_head, load_weight(weight_ptr, b, t, j, is_head, stride_wb, stride_wl, stride_wh), 0.0)
    bias = tl.load(bias_ptr + j * stride_bias, mask=is_head, other=0.0).to(tl.float32)
    p_indices = indices_ptr + b * stride_ib + t * stride_il
    p_row = p_ptr + pid * K

    # One running maximum, sum and so on per column of the tiles, merged behind the loop.
    m = tl.full([BLOCK_K], float("-inf"), tl.float32)
    l = tl.zeros([BLOCK_K], tl.float32)
    divergence = tl.zeros([BLOCK_K], tl.float32)
    mass = tl.zeros([BLOCK_K], tl.float32)
    for first in range(0, count, BLOCK_K):
        slot = first + tl.arange(0, BLOCK_K)
        s, filled = load_slots(p_indices, slot, stride_ik, count, position, S)
        b_k = load_index_keys(k_ptr, b, s, filled, c, stride_kb, stride_ks, stride_kd, d_I)  # [BLOCK_K, BLOCK_I]
        z = scale * tl.dot(b_q, tl.trans(b_k), input_precision="ieee") + bias[:, None]  # [BLOCK_H, BLOCK_K]
        scores = tl.sum(weight[:, None] * stable_sigmoid(z), axis=0)
        x = tl.where(filled, scores * inverse_temperature, float("-inf"))
        p = tl.load(p_row + slot, mask=slot < count, other=0.0) / H
        m_new = tl.maximum(m, x)
        m_safe = tl.where(m_new == float("-inf"), 0.0, m_new)
        l = l * tl.exp(m - m_safe) + tl.exp(x - m_safe)
        m = m_new
        divergence += divergence_terms(p, x)
        mass += p
    largest = tl.max(m, axis=0)
    largest = tl.where(largest == float("-inf"), 0.0, largest)
    total = tl.sum(l * tl.exp(m - largest), axis=0)
    valid = total != 0  # NaN counts
    lse = largest + tl.log(tl.where(valid, total, 1.0))
    out = b * L + t
    tl.store(kl_ptr + out, tl.sum(divergence, axis=0) + tl.sum(mass, axis=0) * lse)
    tl.store(valid_ptr + out, valid.to(tl.int32))

    if GRADIENTS:
        q_gradient = tl.zeros([BLOCK_H, BLOCK_I], tl.float32)
        weight_gradient = tl.zeros([BLOCK_H, BLOCK_K], tl.float32)
        bias_gradient = tl.zeros([BLOCK_H, BLOCK_K], tl.float32)
        end = tl.where(valid, count, 0)  # a row without a filled slot has no gradient, even if it is NaN
        for first in range(0, end, BLOCK_K):
            slot = first + tl.arange(0, BLOCK_K)
            s, filled = load_slots(p_indices, slot, stride_ik, count, position, S)
            b_k = load_index_keys(k_ptr, b, s, filled, c, stride_kb, stride_ks, stride_kd, d_I)
            z = scale * tl.dot(b_q, tl.trans(b_k), input_precision="ieee") + bias[:, None]
            sigmoid = stable_sigmoid(z)
            x = tl.sum(weight[:, None] * sigmoid, axis=0) * inverse_temperature
            p = tl.load(p_row + slot, mask=slot < count, other=0.0) / H
            score_gradient = tl.where(filled, tl.exp(x - lse) - p, 0.0)  # [BLOCK_K]
            tl.store(score_gradient_ptr + pid * S + s, score_gradient, mask=filled)
            weighted = score_gradient[None, :] * sigmoid
            dz = weighted * (1.0 - sigmoid)  # without σ(w), which is a factor of the row
            weight_gradient += weighted
            bias_gradient += dz
            q_gradient = dot_in_two(dz * GRADIENT_SCALE, b_k, q_gradient)
        is_used = is_head & (tl.zeros([BLOCK_H], tl.int32) + end > 0)
        weight = load_weight(weight_ptr, b, t, j, is_used, stride_wb, stride_wl, stride_wh)
        q_gradient = q_gradient * (weight * (scale / GRADIENT_SCALE))[:, None]
        p_gradient = q_gradient_ptr + (out * H_I + j)[:, None] * d_I + c[None, :]
        tl.store(p_gradient, q_gradient, mask=q_mask)
        weight_sum = tl.sum(weight_gradient, axis=1)
        tl.store(weight_gradient_ptr + out * H_I + j, weight * (1.0 - weight) * weight_sum, mask=is_head)
        tl.store(bias_gradient_ptr + out * H_I + j, weight * tl.sum(bias_gradient, axis=1), mask=is_head)


def launch_divergence(
    q_idx: Tensor,
    k_idx: Tensor,
    head_logits: Tensor,
    bias: Tensor,
    q: Tensor,
    k: Tensor,
    start: Tensor,
    lengths: Tensor,
    teacher_lse: Tensor,
    indexer_scale: float,
    scale: float,
    temperature: float,
    first_row: int,
    score_gradient: Tensor | None,
) -> Tensor:
    """KL(p_t ‖ softmax(I_t/τ)) over all visible keys, float32 [B, rows], for the queries from `first_row` on.

    Rows that see nothing are NaN. If given, `score_gradient` [B, rows, S] (contiguous) gets softmax(I_t/τ) − p_t where
    a query may look.
    """
    (B, rows, H), (S, H_kv), d_h, (H_I, d_I) = teacher_lse.shape, k.shape[1:3], q.shape[-1], q_idx.shape[2:]
    block_d, block_i = (max(16, triton.next_power_of_2(d)) for d in (d_h, d_I))
    block = tile_rows(max(block_d, block_i), q.dtype)
    tiles_s = triton.cdiv(S, block)
    grid = (triton.cdiv(rows, block) * tiles_s * B,)
    statistics = torch.empty((B, rows, 3, tiles_s), dtype=torch.float32, device=q.device)
    sizes = {"d_I": d_I, "BLOCK_L": block, "BLOCK_S": block, "BLOCK_I": block_i, "num_warps": warps(q.dtype)}
    indexer = q_idx, k_idx, head_logits, bias
    indexer_strides = *q_idx.stride(), *k_idx.stride(), *head_logits.stride(), *bias.stride()
    divergence_kernel[grid](
        *indexer, q, k, start, lengths, teacher_lse,
        statistics if score_gradient is None else score_gradient, statistics,
        *indexer_strides, *q.stride(), *k.stride(),
        first_row, rows, S, H_kv, H // H_kv, H_I, indexer_scale, scale * LOG2_E, 1 / temperature,
        d_h=d_h, BLOCK_D=block_d, STORE=score_gradient is not None, **sizes,
    )  # fmt: skip
    tile_lse, divergence, mass = statistics.unbind(2)
    lse = torch.logsumexp(tile_lse, dim=-1)
    if score_gradient is not None:
        score_gradients_kernel[grid](
            *indexer, start, lengths, lse, score_gradient, *indexer_strides,
            first_row, rows, S, H_I, indexer_scale, 1 / temperature, **sizes,
        )  # fmt: skip
    return divergence.sum(-1) + mass.sum(-1) * lse


def launch_selected_divergence(
    q_idx: Tensor,
    k_idx: Tensor,
    head_logits: Tensor,
    bias: Tensor,
    indices: Tensor,
    counts: Tensor,
    start: Tensor,
    lengths: Tensor,
    p: Tensor,
    n_heads: int,
    scale: float,
    temperature: float,
    first_row: int,
    kl: Tensor,
    valid: Tensor,
    score_gradient: Tensor | None,
    gradients: tuple[Tensor, Tensor, Tensor] | None,
) -> None:
    """Fill the rows from `first_row` on of `kl` and `valid` [B, L] from `p`, the sums over n_heads heads [B, rows, K].

    If given, `score_gradient` [B, rows, S], which must hold zeros, gets softmax(I_t/τ) − p_t in the columns of S_t, and
    `gradients` those of q_idx, head_logits and, per row, bias. All of these are contiguous.
    """
    (B, rows, K), (L, H_I, d_I), S = p.shape, q_idx.shape[1:], k_idx.shape[1]
    block_i = max(16, triton.next_power_of_2(d_I))
    selected_divergence_kernel[(B * rows,)](
        q_idx, k_idx, head_logits, bias, indices, counts, start, lengths, p,
        kl, valid, p if score_gradient is None else score_gradient, *(gradients or (p, p, p)),
        *q_idx.stride(), *k_idx.stride(), *head_logits.stride(), *bias.stride(), *indices.stride(), *counts.stride(),
        first_row, rows, L, S, K, n_heads, scale, 1 / temperature,
        H_I=H_I, d_I=d_I, BLOCK_H=max(16, triton.next_power_of_2(H_I)), BLOCK_I=block_i,
        BLOCK_K=block_k(block_i, q_idx.dtype), GRADIENTS=gradients is not None,
        num_warps=warps(q_idx.dtype),
    )  # fmt: skip
