"""Sparse scaled dot-product attention over the selected tokens: kernel, launcher, custom op."""

import torch
import triton
import triton.language as tl
from torch import Tensor

import gsa_ref
from gsa_fast._backend import no_backward, per_sequence, use_triton
from gsa_fast._primitives import stable_sigmoid
from gsa_fast.gates import apply_gate
from gsa_ref import Selection
from gsa_ref._arguments import check_attention_arguments


@triton.jit
def online_softmax_update(m, l, acc, logits, v):
    """Fold one tile of logits and values into the running maximum m, the sum l and the weighted sum acc.

    While a row has seen no key, m is −inf: 0 stands in for it, so that exp(−inf − m) is 0 and not NaN.
    """
    m_new = tl.maximum(m, tl.max(logits, axis=1))
    m_safe = tl.where(m_new == float("-inf"), 0.0, m_new)
    rescale = tl.exp(m - m_safe)
    p = tl.exp(logits - m_safe[:, None])
    l_new = l * rescale + tl.sum(p, axis=1)
    acc_new = acc * rescale[:, None] + tl.dot(p.to(v.dtype), v, input_precision="ieee")
    return m_new, l_new, acc_new


@triton.jit
def sparse_attention_kernel(
    q_ptr, k_ptr, v_ptr, indices_ptr, counts_ptr, start_ptr, gate_ptr, out_ptr, lse_ptr,
    stride_qb, stride_ql, stride_qh, stride_qd,
    stride_kb, stride_ks, stride_kh, stride_kd,
    stride_vb, stride_vs, stride_vh, stride_vd,
    stride_ib, stride_il, stride_ik, stride_cb, stride_cl,
    stride_gb, stride_gl, stride_gh, stride_gd,
    L, S, K, H_kv, scale,
    GROUP: tl.constexpr, d_h: tl.constexpr,
    BLOCK_G: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_K: tl.constexpr,
    OUTPUT_GATE: tl.constexpr,
):  # fmt: skip
    """One program: the GROUP query heads of one query that share a key/value head, over that query's selection."""
    pid = tl.program_id(0).to(tl.int64)
    h_kv = pid % H_kv
    t = (pid // H_kv) % L
    b = pid // H_kv // L

    g = tl.arange(0, BLOCK_G)  # [BLOCK_G] heads of the group
    c = tl.arange(0, BLOCK_D).to(tl.int64)  # [BLOCK_D] channels; 64 bits, because a stride may be anything
    head = h_kv * GROUP + g
    q_mask = (g < GROUP)[:, None] & (c < d_h)[None, :]
    b_q = tl.load(
        q_ptr + b * stride_qb + t * stride_ql + head[:, None] * stride_qh + c[None, :] * stride_qd,
        mask=q_mask,
        other=0.0,
    )  # [BLOCK_G, BLOCK_D]
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
        logits = scale * tl.dot(b_q, tl.trans(b_k), input_precision="ieee")  # [BLOCK_G, BLOCK_K]
        logits = tl.where(filled[None, :], logits, float("-inf"))
        m, l, acc = online_softmax_update(m, l, acc, logits, b_v)
        n_filled += tl.sum(filled.to(tl.int32), axis=0)

    # A row without a single filled slot is 0 with lse −inf; any other row divides by its own sum, even if that is NaN.
    l_safe = tl.where(n_filled == 0, 1.0, l)
    out = acc / l_safe[:, None]
    lse = tl.where(n_filled == 0, float("-inf"), m + tl.log(l_safe))
    if OUTPUT_GATE:
        gate = tl.load(
            gate_ptr + b * stride_gb + t * stride_gl + head[:, None] * stride_gh + c[None, :] * stride_gd,
            mask=q_mask,
            other=0.0,
        )
        out = out * stable_sigmoid(gate.to(tl.float32))
    out_row = (b * L + t) * H_kv * GROUP + head  # out and lse are contiguous
    tl.store(out_ptr + out_row[:, None] * d_h + c[None, :], out.to(out_ptr.dtype.element_ty), mask=q_mask)
    tl.store(lse_ptr + out_row, lse, mask=g < GROUP)


@torch.library.custom_op("gsa_fast::sparse_attention", mutates_args=())
def _sparse_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    indices: Tensor,
    counts: Tensor,
    start: Tensor,
    output_gate_logits: Tensor | None,
    scale: float,
) -> tuple[Tensor, Tensor]:
    (B, L, H, d_h), (S, H_kv), K = q.shape, k.shape[1:3], indices.shape[-1]
    out = torch.empty((B, L, H, d_h), dtype=q.dtype, device=q.device)
    lse = torch.empty((B, L, H), dtype=torch.float32, device=q.device)
    if out.numel() == 0:
        return out, lse
    group = H // H_kv
    gate = q if output_gate_logits is None else output_gate_logits
    block_d = max(16, triton.next_power_of_2(d_h))
    sparse_attention_kernel[(B * L * H_kv,)](
        q, k, v, indices, counts, start, gate, out, lse,
        *q.stride(), *k.stride(), *v.stride(), *indices.stride(), *counts.stride(), *gate.stride(),
        L, S, K, H_kv, scale,
        GROUP=group, d_h=d_h, BLOCK_G=max(16, triton.next_power_of_2(group)), BLOCK_D=block_d,
        BLOCK_K=block_k(block_d, q.dtype), OUTPUT_GATE=output_gate_logits is not None,
        num_warps=8 if q.dtype == torch.float32 else 4,  # an exact float32 dot spills registers with 4
    )  # fmt: skip
    return out, lse


def block_k(block_d: int, dtype: torch.dtype) -> int:
    """Slots per tile: K and V tiles of 16 KiB each, so that three pipeline stages fit shared memory on every target."""
    return max(16, min(64, 16384 // (block_d * dtype.itemsize)))


@_sparse_attention.register_fake
def _(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    indices: Tensor,
    counts: Tensor,
    start: Tensor,
    output_gate_logits: Tensor | None,
    scale: float,
) -> tuple[Tensor, Tensor]:
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    return out, torch.empty(q.shape[:3], dtype=torch.float32, device=q.device)


no_backward("sparse_attention")


def sparse_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    selection: Selection,
    *,
    scale: float | None = None,
    start: int | Tensor | None = None,
    value_gate_logits: Tensor | None = None,
    output_gate_logits: Tensor | None = None,
    impl: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Sparse SDPA on the GPU: `gsa_ref.sparse_attention` with the same arguments, plus `impl`.

    The output gate is applied before the result is written. The value gate is one pass over v first: a value is read by
    many queries, so gating it where it is gathered would read the logits as often.

    Args:
        q: [B, L, H, d_h].
        k, v: [B, S, H_kv, d_h], the dtype of q.
        selection: S_t.
        scale: default 1/√d_h.
        start: position of query 0, default S − L.
        value_gate_logits: [B, S, H_kv, d_h].
        output_gate_logits: [B, L, H, d_h].
        impl: "auto", "triton" or "reference", as in `indexer_scores`.

    Returns:
        o [B, L, H, d_h] in the dtype of q, accumulated in float32, and lse, float32 [B, L, H].

    Raises:
        TypeError, ValueError: as the reference.
        NotImplementedError: float64 with the kernels, or a backward pass through them.
    """
    if not isinstance(selection, Selection):
        raise TypeError(f"selection: expected a Selection, got {type(selection).__name__}")
    indices, counts = selection
    gates = {"value_gate_logits": value_gate_logits, "output_gate_logits": output_gate_logits}
    check_attention_arguments(q, k, v, indices, counts, scale=scale, start=start, **gates)
    if not use_triton(impl, q=q, k=k, v=v, **gates):
        return gsa_ref.sparse_attention(q, k, v, selection, scale=scale, start=start, **gates)
    (B, L, _, d_h), S = q.shape, k.shape[1]
    if value_gate_logits is not None:
        v = apply_gate(v, value_gate_logits, impl="triton")  # Eq. 9
    first = per_sequence(start, S - L, B, q.device)
    return _sparse_attention(
        q, k, v, indices, counts, first, output_gate_logits, d_h**-0.5 if scale is None else float(scale)
    )
