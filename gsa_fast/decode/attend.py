"""Sparse attention of a few queries: the selection of each is split over programs, and the last one combines."""

import triton
import triton.language as tl

from gsa_fast.attention.rows import load_rows, online_softmax_update, store_rows


@triton.jit
def combine_splits(p_m, p_acc, n_splits, GROUP: tl.constexpr, d_h: tl.constexpr, BLOCK_G: tl.constexpr,
                   BLOCK_D: tl.constexpr, SPLITS: tl.constexpr, BLOCK_SPLITS: tl.constexpr):  # fmt: skip
    """m, l and acc over all splits of a row, in the order of the splits, whoever was last.

    Other programs wrote them, so that the first-level cache, which belongs to a multiprocessor, is passed by (.cg).
    """
    g = tl.arange(0, BLOCK_G)
    c = tl.arange(0, BLOCK_D)
    every = tl.arange(0, SPLITS)
    written = (every < n_splits)[:, None] & (g < GROUP)[None, :]
    p_split = p_m + every[:, None] * (2 * GROUP) + g[None, :]
    m_all = tl.load(p_split, mask=written, other=float("-inf"), cache_modifier=".cg")  # [SPLITS, BLOCK_G]
    l_all = tl.load(p_split + GROUP, mask=written, other=0.0, cache_modifier=".cg")
    m = tl.max(m_all, axis=0)
    m_safe = tl.where(m == float("-inf"), 0.0, m)
    l = tl.sum(l_all * tl.exp2(m_all - m_safe[None, :]), axis=0)
    acc = tl.zeros([BLOCK_G, BLOCK_D], tl.float32)
    for first in range(0, n_splits, BLOCK_SPLITS):
        i = first + tl.arange(0, BLOCK_SPLITS)
        filled = (i < n_splits)[:, None] & (g < GROUP)[None, :]
        m_i = tl.load(
            p_m + i[:, None] * (2 * GROUP) + g[None, :], mask=filled, other=float("-inf"), cache_modifier=".cg"
        )
        acc_i = tl.load(
            p_acc + (i[:, None] * GROUP + g[None, :])[:, :, None] * d_h + c[None, None, :],
            mask=filled[:, :, None] & (c < d_h)[None, None, :],
            other=0.0,
            cache_modifier=".cg",
        )  # [BLOCK_SPLITS, BLOCK_G, BLOCK_D]
        acc += tl.sum(acc_i * tl.exp2(m_i - m_safe[None, :])[:, :, None], axis=0)
    return m, l, acc


@triton.jit
def decode_attend_kernel(
    q_ptr, k_ptr, v_ptr, indices_ptr, counts_ptr, gate_ptr, out_ptr, lse_ptr, m_ptr, acc_ptr, arrived_ptr,
    stride_qb, stride_ql, stride_qh, stride_qd,
    stride_kb, stride_ks, stride_kh, stride_kd,
    stride_vb, stride_vs, stride_vh, stride_vd,
    stride_gb, stride_gl, stride_gh, stride_gd,
    L, K, H_kv, scale_log2,
    GROUP: tl.constexpr, d_h: tl.constexpr, BLOCK_G: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_K: tl.constexpr,
    SPLITS: tl.constexpr, BLOCK_SPLITS: tl.constexpr, COMBINED_G: tl.constexpr, OUTPUT_GATE: tl.constexpr,
):  # fmt: skip
    """The GROUP query heads of query [b, t] that share key/value head h_kv, over one split of the selection.

    How a selection is split depends on its size alone, so that a result does not depend on the rest of the batch.
    """
    pid = tl.program_id(0).to(tl.int64)
    h_kv = pid % H_kv
    split = (pid // H_kv % SPLITS).to(tl.int32)
    row = pid // H_kv // SPLITS
    b, t = row // L, row % L
    count = tl.load(counts_ptr + row)
    size = tl.maximum(tl.cdiv(tl.cdiv(count, SPLITS), BLOCK_K), 1) * BLOCK_K  # slots of a split
    n_splits = tl.maximum(tl.cdiv(count, size), 1)
    if split < n_splits:
        g = tl.arange(0, BLOCK_G)  # [BLOCK_G] heads of the group
        c = tl.arange(0, BLOCK_D).to(tl.int64)  # [BLOCK_D]
        q_mask = (g < GROUP)[:, None] & (c < d_h)[None, :]
        b_q = load_rows(
            q_ptr, b, t, h_kv * GROUP + g, c, q_mask, stride_qb, stride_ql, stride_qh, stride_qd
        )  # [BLOCK_G, BLOCK_D]
        p_indices = indices_ptr + row * K
        p_k = k_ptr + b * stride_kb + h_kv * stride_kh
        p_v = v_ptr + b * stride_vb + h_kv * stride_vh
        m = tl.full([BLOCK_G], float("-inf"), tl.float32)
        l = tl.zeros([BLOCK_G], tl.float32)
        acc = tl.zeros([BLOCK_G, BLOCK_D], tl.float32)
        for first in range(split * size, tl.minimum((split + 1) * size, count), BLOCK_K):
            slot = first + tl.arange(0, BLOCK_K)
            s = tl.load(p_indices + slot, mask=slot < count, other=0).to(tl.int64)[:, None]  # [BLOCK_K, 1]
            kv_mask = (slot < count)[:, None] & (c < d_h)[None, :]
            b_k = tl.load(p_k + s * stride_ks + c[None, :] * stride_kd, mask=kv_mask, other=0.0)  # [BLOCK_K, BLOCK_D]
            b_v = tl.load(p_v + s * stride_vs + c[None, :] * stride_vd, mask=kv_mask, other=0.0)
            logits = scale_log2 * tl.dot(b_q, tl.trans(b_k), input_precision="ieee")  # [BLOCK_G, BLOCK_K]
            logits = tl.where((slot < count)[None, :], logits, float("-inf"))
            m, l, acc = online_softmax_update(m, l, acc, logits, b_v)

        p_row = row * H_kv + h_kv
        p_m = m_ptr + p_row * (SPLITS * 2 * GROUP)  # [SPLITS, 2, GROUP]: m and l
        p_acc = acc_ptr + p_row * (SPLITS * GROUP * d_h)  # [SPLITS, GROUP, d_h]
        tl.store(p_m + split * (2 * GROUP) + g, m, mask=g < GROUP)
        tl.store(p_m + split * (2 * GROUP) + GROUP + g, l, mask=g < GROUP)
        tl.store(p_acc + (split * GROUP + g)[:, None] * d_h + c[None, :], acc, mask=q_mask)
        tl.debug_barrier()  # the stores of all threads come before the arrival, which one thread announces
        if tl.atomic_add(arrived_ptr + row * (H_kv + 1) + h_kv, 1, sem="acq_rel", scope="gpu") == n_splits - 1:
            all_m, all_l, all_acc = combine_splits(
                p_m, p_acc, n_splits, GROUP, d_h, COMBINED_G, BLOCK_D, SPLITS, BLOCK_SPLITS
            )
            head = tl.arange(0, COMBINED_G)
            store_rows(
                all_m, all_l, all_acc, (head >= 0) & (count == 0), b, t, h_kv * GROUP + head, c, head < GROUP,
                gate_ptr, out_ptr, lse_ptr, stride_gb, stride_gl, stride_gh, stride_gd,
                L, H_kv * GROUP, d_h, OUTPUT_GATE,
            )  # fmt: skip
