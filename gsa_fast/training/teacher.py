"""The teacher: what the attention distributions are normalised by, and their mean over heads on selected keys.

On all visible keys (warm-up) the distributions are never stored on their own: `student` computes a tile of them.
"""

import triton
import triton.language as tl
from torch import Tensor

from gsa_fast.attention.gather import block_k
from gsa_fast.attention.rows import LN_2, LOG2_E, load_rows
from gsa_fast.training.tiles import count_keys, tile_rows, visible_pairs, warps


@triton.jit
def fold_logits(m, l, logits):
    """Fold a tile of logits in base 2 into the running maximum m and sum l of its rows; 0 stands in for m = −∞."""
    m_new = tl.maximum(m, tl.max(logits, axis=1))
    m_safe = tl.where(m_new == float("-inf"), 0.0, m_new)
    return m_new, l * tl.exp2(m - m_safe) + tl.sum(tl.exp2(logits - m_safe[:, None]), axis=1)


@triton.jit
def teacher_lse_kernel(
    q_ptr, k_ptr, start_ptr, lengths_ptr, lse_ptr,
    stride_qb, stride_ql, stride_qh, stride_qd,
    stride_kb, stride_ks, stride_kh, stride_kd,
    first_row, rows, S, H, scale_log2,
    GROUP: tl.constexpr, d_h: tl.constexpr,
    BLOCK_L: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """lse[t,h] = ln Σ_s exp(scale · q[t,h]·k[s]) over all visible s, for BLOCK_L queries and one head."""
    pid = tl.program_id(0)
    tiles = tl.cdiv(rows, BLOCK_L)
    head = (pid % H).to(tl.int64)
    first = pid // H % tiles * BLOCK_L
    b = (pid // H // tiles).to(tl.int64)
    row = first + tl.arange(0, BLOCK_L)  # [BLOCK_L] row of the chunk
    inside = row < rows
    t = (first_row + row).to(tl.int64)
    c = tl.arange(0, BLOCK_D).to(tl.int64)
    q_mask = inside[:, None] & (c < d_h)[None, :]
    b_q = load_rows(q_ptr, b, t, head, c, q_mask, stride_qb, stride_ql, stride_qh, stride_qd)  # [BLOCK_L, BLOCK_D]
    start, length = tl.load(start_ptr + b), tl.load(lengths_ptr + b)
    position = start + first_row + row
    begin = start + first_row + first
    n_keys = count_keys(begin, begin + tl.minimum(BLOCK_L, rows - first), length, S)

    m = tl.full([BLOCK_L], float("-inf"), tl.float32)
    l = tl.zeros([BLOCK_L], tl.float32)
    for first_key in range(0, n_keys, BLOCK_S):
        s = first_key + tl.arange(0, BLOCK_S)
        k_mask = (s < n_keys)[:, None] & (c < d_h)[None, :]
        b_k = load_rows(
            k_ptr, b, s.to(tl.int64), head // GROUP, c, k_mask, stride_kb, stride_ks, stride_kh, stride_kd
        )  # [BLOCK_S, BLOCK_D]
        logits = scale_log2 * tl.dot(b_q, tl.trans(b_k), input_precision="ieee")  # [BLOCK_L, BLOCK_S]
        logits = tl.where(visible_pairs(position, length, s, S), logits, float("-inf"))
        m, l = fold_logits(m, l, logits)
    tl.store(lse_ptr + (b * rows + row) * H + head, (m + tl.log2(l)) * LN_2, mask=inside)


@triton.jit
def load_slots(p_indices, slot, stride_k, count, position, S):
    """The positions in the slots of a row, and which of them are filled. Future positions count as empty."""
    s = tl.load(p_indices + slot.to(tl.int64) * stride_k, mask=slot < count, other=-1)
    return s, (s >= 0) & (s < S) & (s <= position)


@triton.jit
def count_slots(counts_ptr, b, t, position, length, K, stride_b, stride_l):
    """How many slots of a row to look at: none if it is padding."""
    count = tl.minimum(tl.load(counts_ptr + b * stride_b + t * stride_l), K)
    return tl.where(position < length, count, 0)


@triton.jit
def selected_lse_kernel(
    q_ptr, k_ptr, indices_ptr, counts_ptr, start_ptr, lengths_ptr, lse_ptr,
    stride_qb, stride_ql, stride_qh, stride_qd,
    stride_kb, stride_ks, stride_kh, stride_kd,
    stride_ib, stride_il, stride_ik, stride_cb, stride_cl,
    first_row, rows, S, K, H_kv, scale_log2,
    GROUP: tl.constexpr, d_h: tl.constexpr,
    BLOCK_G: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """lse[t,h] = ln Σ_s exp(scale · q[t,h]·k[s]) over s ∈ S_t, for one query and the heads of one key head."""
    pid = tl.program_id(0).to(tl.int64)
    h_kv = pid % H_kv
    row = pid // H_kv % rows
    b = pid // H_kv // rows
    t = first_row + row
    position = tl.load(start_ptr + b) + t
    count = count_slots(counts_ptr, b, t, position, tl.load(lengths_ptr + b), K, stride_cb, stride_cl)
    g = tl.arange(0, BLOCK_G)  # [BLOCK_G] heads of the group
    c = tl.arange(0, BLOCK_D).to(tl.int64)
    q_mask = (g < GROUP)[:, None] & (c < d_h)[None, :]
    b_q = load_rows(q_ptr, b, t, h_kv * GROUP + g, c, q_mask, stride_qb, stride_ql, stride_qh, stride_qd)
    p_indices = indices_ptr + b * stride_ib + t * stride_il

    m = tl.full([BLOCK_G], float("-inf"), tl.float32)
    l = tl.zeros([BLOCK_G], tl.float32)
    for first in range(0, count, BLOCK_K):
        s, filled = load_slots(p_indices, first + tl.arange(0, BLOCK_K), stride_ik, count, position, S)
        k_mask = filled[:, None] & (c < d_h)[None, :]
        b_k = load_rows(k_ptr, b, s.to(tl.int64), h_kv, c, k_mask, stride_kb, stride_ks, stride_kh, stride_kd)
        logits = scale_log2 * tl.dot(b_q, tl.trans(b_k), input_precision="ieee")  # [BLOCK_G, BLOCK_K]
        m, l = fold_logits(m, l, tl.where(filled[None, :], logits, float("-inf")))
    p_lse = lse_ptr + ((b * rows + row) * H_kv + h_kv) * GROUP + g
    tl.store(p_lse, (m + tl.log2(l)) * LN_2, mask=g < GROUP)


@triton.jit
def selected_teacher_kernel(
    q_ptr, k_ptr, indices_ptr, counts_ptr, start_ptr, lengths_ptr, lse_ptr, p_ptr,
    stride_qb, stride_ql, stride_qh, stride_qd,
    stride_kb, stride_ks, stride_kh, stride_kd,
    stride_ib, stride_il, stride_ik, stride_cb, stride_cl, stride_lb, stride_ll, stride_lh,
    first_row, rows, S, K, H_kv, scale_log2,
    GROUP: tl.constexpr, d_h: tl.constexpr,
    BLOCK_G: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Add Σ_h exp(scale · q[t,h]·k[s] − lse[t,h]) to p[t, slot] for the slots of one query, 0 for the empty ones.

    Row 0 of lse is the first of the chunk. One program adds up the heads of a slot, in order.
    """
    pid = tl.program_id(0).to(tl.int64)
    row = pid % rows
    b = pid // rows
    t = first_row + row
    position = tl.load(start_ptr + b) + t
    count = count_slots(counts_ptr, b, t, position, tl.load(lengths_ptr + b), K, stride_cb, stride_cl)
    g = tl.arange(0, BLOCK_G)
    c = tl.arange(0, BLOCK_D).to(tl.int64)
    q_mask = (g < GROUP)[:, None] & (c < d_h)[None, :]
    p_indices = indices_ptr + b * stride_ib + t * stride_il
    p_row = p_ptr + (b * rows + row) * K
    for head in range(H_kv):
        h_kv = tl.cast(head, tl.int64)
        h = h_kv * GROUP + g
        b_q = load_rows(q_ptr, b, t, h, c, q_mask, stride_qb, stride_ql, stride_qh, stride_qd)  # [BLOCK_G, BLOCK_D]
        p_lse = lse_ptr + b * stride_lb + row * stride_ll + h * stride_lh
        lse = tl.load(p_lse, mask=g < GROUP, other=float("inf")) / LN_2  # exp2(−∞) = 0 for heads that do not exist
        for first in range(0, count, BLOCK_K):
            slot = first + tl.arange(0, BLOCK_K)
            s, filled = load_slots(p_indices, slot, stride_ik, count, position, S)
            k_mask = filled[:, None] & (c < d_h)[None, :]
            b_k = load_rows(k_ptr, b, s.to(tl.int64), h_kv, c, k_mask, stride_kb, stride_ks, stride_kh, stride_kd)
            logits = scale_log2 * tl.dot(b_q, tl.trans(b_k), input_precision="ieee")  # [BLOCK_G, BLOCK_K]
            p = tl.where(filled, tl.sum(tl.exp2(logits - lse[:, None]), axis=0), 0.0)
            tl.store(p_row + slot, tl.load(p_row + slot, mask=slot < count, other=0.0) + p, mask=slot < count)
        tl.debug_barrier()  # the next head's sums may be read by other threads than wrote these


def launch_teacher_lse(
    q: Tensor, k: Tensor, start: Tensor, lengths: Tensor, scale: float, first_row: int, lse: Tensor
) -> None:
    """Fill `lse` [B, rows, H] (contiguous) for the queries from `first_row` on, over all visible keys."""
    (B, rows, H), (S, H_kv), d_h = lse.shape, k.shape[1:3], q.shape[-1]
    block_d = max(16, triton.next_power_of_2(d_h))
    block = tile_rows(block_d, q.dtype)
    teacher_lse_kernel[(triton.cdiv(rows, block) * H * B,)](
        q, k, start, lengths, lse, *q.stride(), *k.stride(), first_row, rows, S, H, scale * LOG2_E,
        GROUP=H // H_kv, d_h=d_h, BLOCK_L=block, BLOCK_S=block, BLOCK_D=block_d,
        num_warps=warps(q.dtype),
    )  # fmt: skip


def launch_selected_teacher(
    q: Tensor,
    k: Tensor,
    indices: Tensor,
    counts: Tensor,
    start: Tensor,
    lengths: Tensor,
    scale: float,
    first_row: int,
    lse: Tensor | None,
    p: Tensor,
) -> None:
    """Fill `p` [B, rows, K] (contiguous) with Σ_h of the attention distributions over the slots; past the count, 0.

    Row 0 of p is query `first_row`. `lse` is that of all queries, [B, L, H].
    """
    (B, rows, K), (H, d_h), (S, H_kv) = p.shape, q.shape[2:], k.shape[1:3]
    group = H // H_kv
    block_d = max(16, triton.next_power_of_2(d_h))
    sizes = {
        "GROUP": group, "d_h": d_h, "BLOCK_G": max(16, triton.next_power_of_2(group)), "BLOCK_D": block_d,
        "BLOCK_K": block_k(block_d, q.dtype), "num_warps": warps(q.dtype),
    }  # fmt: skip
    strides = *q.stride(), *k.stride(), *indices.stride(), *counts.stride()
    numbers = first_row, rows, S, K, H_kv, scale * LOG2_E
    if lse is None:
        chunk = q.new_empty(B, rows, H, dtype=p.dtype)
        selected_lse_kernel[(B * rows * H_kv,)](
            q, k, indices, counts, start, lengths, chunk, *strides, *numbers, **sizes
        )
    else:
        chunk = lse[:, first_row : first_row + rows]
    p.zero_()
    selected_teacher_kernel[(B * rows,)](
        q, k, indices, counts, start, lengths, chunk, p, *strides, *chunk.stride(), *numbers, **sizes
    )
