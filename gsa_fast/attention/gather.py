"""Sparse attention by gathering: one program per query and key/value head, over that query's own selection."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from gsa_fast.attention.rows import LOG2_E, load_rows, online_softmax_update, store_rows


@triton.jit
def attend_query(
    b, t, h_kv,
    q_ptr, k_ptr, v_ptr, indices_ptr, counts_ptr, start_ptr, gate_ptr, out_ptr, lse_ptr,
    stride_qb, stride_ql, stride_qh, stride_qd,
    stride_kb, stride_ks, stride_kh, stride_kd,
    stride_vb, stride_vs, stride_vh, stride_vd,
    stride_ib, stride_il, stride_ik, stride_cb, stride_cl,
    stride_gb, stride_gl, stride_gh, stride_gd,
    L, S, K, H_kv, scale_log2,
    GROUP: tl.constexpr, d_h: tl.constexpr,
    BLOCK_G: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_K: tl.constexpr,
    OUTPUT_GATE: tl.constexpr,
):  # fmt: skip
    """The GROUP query heads of query [b, t] that share key/value head h_kv, over that query's selection."""
    g = tl.arange(0, BLOCK_G)  # [BLOCK_G] heads of the group
    c = tl.arange(0, BLOCK_D).to(tl.int64)  # [BLOCK_D] channels; 64 bits, because a stride may be anything
    head = h_kv * GROUP + g
    q_mask = (g < GROUP)[:, None] & (c < d_h)[None, :]
    b_q = load_rows(q_ptr, b, t, head, c, q_mask, stride_qb, stride_ql, stride_qh, stride_qd)  # [BLOCK_G, BLOCK_D]
    count = tl.minimum(tl.load(counts_ptr + b * stride_cb + t * stride_cl), K)
    position = tl.load(start_ptr + b) + t
    p_indices = indices_ptr + b * stride_ib + t * stride_il
    p_k = k_ptr + b * stride_kb + h_kv * stride_kh
    p_v = v_ptr + b * stride_vb + h_kv * stride_vh

    m = tl.full([BLOCK_G], float("-inf"), tl.float32)
    l = tl.zeros([BLOCK_G], tl.float32)
    acc = tl.zeros([BLOCK_G, BLOCK_D], tl.float32)
    n_filled = 0
    for first in range(0, count, BLOCK_K):
        slot = first + tl.arange(0, BLOCK_K)
        s = tl.load(p_indices + slot.to(tl.int64) * stride_ik, mask=slot < count, other=-1)  # [BLOCK_K]
        filled = (s >= 0) & (s < S) & (s <= position)
        row = s.to(tl.int64)[:, None]
        kv_mask = filled[:, None] & (c < d_h)[None, :]
        # Empty slots load 0, so a NaN at a position that nobody selected never enters.
        b_k = tl.load(p_k + row * stride_ks + c[None, :] * stride_kd, mask=kv_mask, other=0.0)  # [BLOCK_K, BLOCK_D]
        b_v = tl.load(p_v + row * stride_vs + c[None, :] * stride_vd, mask=kv_mask, other=0.0)
        logits = scale_log2 * tl.dot(b_q, tl.trans(b_k), input_precision="ieee")  # [BLOCK_G, BLOCK_K]
        logits = tl.where(filled[None, :], logits, float("-inf"))
        m, l, acc = online_softmax_update(m, l, acc, logits, b_v)
        n_filled += tl.sum(filled.to(tl.int32), axis=0)

    store_rows(
        m, l, acc, n_filled == 0, b, t, head, c, g < GROUP,
        gate_ptr, out_ptr, lse_ptr, stride_gb, stride_gl, stride_gh, stride_gd,
        L, H_kv * GROUP, d_h, OUTPUT_GATE,
    )  # fmt: skip


@triton.jit
def sparse_attention_kernel(
    q_ptr, k_ptr, v_ptr, indices_ptr, counts_ptr, start_ptr, gate_ptr, out_ptr, lse_ptr,
    stride_qb, stride_ql, stride_qh, stride_qd,
    stride_kb, stride_ks, stride_kh, stride_kd,
    stride_vb, stride_vs, stride_vh, stride_vd,
    stride_ib, stride_il, stride_ik, stride_cb, stride_cl,
    stride_gb, stride_gl, stride_gh, stride_gd,
    L, S, K, H_kv, scale_log2,
    GROUP: tl.constexpr, d_h: tl.constexpr,
    BLOCK_G: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_K: tl.constexpr,
    OUTPUT_GATE: tl.constexpr,
):  # fmt: skip
    """One program per query and key/value head."""
    pid = tl.program_id(0).to(tl.int64)
    attend_query(
        pid // H_kv // L, (pid // H_kv) % L, pid % H_kv,
        q_ptr, k_ptr, v_ptr, indices_ptr, counts_ptr, start_ptr, gate_ptr, out_ptr, lse_ptr,
        stride_qb, stride_ql, stride_qh, stride_qd,
        stride_kb, stride_ks, stride_kh, stride_kd,
        stride_vb, stride_vs, stride_vh, stride_vd,
        stride_ib, stride_il, stride_ik, stride_cb, stride_cl,
        stride_gb, stride_gl, stride_gh, stride_gd,
        L, S, K, H_kv, scale_log2,
        GROUP, d_h, BLOCK_G, BLOCK_D, BLOCK_K, OUTPUT_GATE,
    )  # fmt: skip


def attend_selections(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    indices: Tensor,
    counts: Tensor,
    start: Tensor,
    output_gate_logits: Tensor | None,
    scale: float,
    out: Tensor,
    lse: Tensor,
) -> None:
    """Fill `out` and `lse` (contiguous) by gathering. Shapes as in `sparse_attention`."""
    (B, L, H, d_h), (S, H_kv), K = q.shape, k.shape[1:3], indices.shape[-1]
    group = H // H_kv
    gate = q if output_gate_logits is None else output_gate_logits
    block_d = max(16, triton.next_power_of_2(d_h))
    sparse_attention_kernel[(B * L * H_kv,)](
        q, k, v, indices, counts, start, gate, out, lse,
        *q.stride(), *k.stride(), *v.stride(), *indices.stride(), *counts.stride(), *gate.stride(),
        L, S, K, H_kv, scale * LOG2_E,
        GROUP=group, d_h=d_h, BLOCK_G=max(16, triton.next_power_of_2(group)), BLOCK_D=block_d,
        BLOCK_K=block_k(block_d, q.dtype), OUTPUT_GATE=output_gate_logits is not None,
        num_warps=8 if q.dtype == torch.float32 else 4,  # an exact float32 dot spills registers with 4
    )  # fmt: skip


def block_k(block_d: int, dtype: torch.dtype) -> int:
    """Slots per tile: K and V tiles of 16 KiB each, so that three pipeline stages fit shared memory on every target."""
    return max(16, min(64, 16384 // (block_d * dtype.itemsize)))
