"""Sparse scaled dot-product attention over the selected tokens: the custom ops and the public function.

The kernels live in `gather`, `union` and `masked`; `choice` says which one serves a call. Those of the gradients live
in `union_backward` and `partial_sums`, and `backward` launches them.
"""

from typing import Any

import torch
from torch import Tensor

import gsa_ref
from gsa_fast._backend import per_sequence, use_triton
from gsa_fast.attention.backward import attend_backward
from gsa_fast.attention.choice import Choice, choose_method, explain_choice
from gsa_fast.attention.gather import attend_selections
from gsa_fast.attention.masked import attend_masked_tiles
from gsa_fast.attention.union import attend_unions
from gsa_fast.gates import apply_gate
from gsa_ref import Selection
from gsa_ref._arguments import check_attention_arguments, check_bool

__all__ = ["Choice", "explain_choice", "sparse_attention"]

METHODS = {"gather": attend_selections, "union": attend_unions, "masked": attend_masked_tiles}


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
    deterministic: bool,
) -> tuple[Tensor, Tensor]:
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    lse = torch.empty(q.shape[:3], dtype=torch.float32, device=q.device)
    if out.numel():
        # Chosen in here, where shapes are numbers: a compiled graph serves every length.
        (_, L, H, d_h), (S, H_kv), K = q.shape, k.shape[1:3], indices.shape[-1]
        method = choose_method(L=L, S=S, K=K, H=H, H_kv=H_kv, d_h=d_h, dtype=q.dtype)
        METHODS[method](q, k, v, indices, counts, start, output_gate_logits, scale, out, lse)
    return out, lse


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
    deterministic: bool,
) -> tuple[Tensor, Tensor]:
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    return out, torch.empty(q.shape[:3], dtype=torch.float32, device=q.device)


@torch.library.custom_op("gsa_fast::sparse_attention_backward", mutates_args=())
def _sparse_attention_backward(
    dout: Tensor,
    dlse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    indices: Tensor,
    counts: Tensor,
    start: Tensor,
    output_gate_logits: Tensor | None,
    out: Tensor,
    lse: Tensor,
    scale: float,
    deterministic: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    if out.numel() == 0 or k.numel() == 0:
        dq, dk, dv = (torch.zeros(x.shape, dtype=x.dtype, device=x.device) for x in (q, k, v))
        dgate = None if output_gate_logits is None else torch.zeros_like(output_gate_logits).contiguous()
    else:
        dq, dk, dv, dgate = attend_backward(
            dout, dlse, q, k, v, indices, counts, start, output_gate_logits, out, lse, scale, deterministic
        )
    return dq, dk, dv, q.new_empty(0) if dgate is None else dgate  # an op returns tensors


@_sparse_attention_backward.register_fake
def _(
    dout: Tensor,
    dlse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    indices: Tensor,
    counts: Tensor,
    start: Tensor,
    output_gate_logits: Tensor | None,
    out: Tensor,
    lse: Tensor,
    scale: float,
    deterministic: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    dq, dk, dv = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q, k, v))
    if output_gate_logits is None:
        return dq, dk, dv, q.new_empty(0)
    return dq, dk, dv, torch.empty(q.shape, dtype=output_gate_logits.dtype, device=q.device)


def _save_for_backward(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    *tensors, ctx.scale, ctx.deterministic = inputs
    ctx.save_for_backward(*tensors, *output)
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, dout: Tensor | None, dlse: Tensor | None) -> tuple[Tensor | None, ...]:
    q, k, v, indices, counts, start, gate, out, lse = ctx.saved_tensors
    if dout is None:
        dout = torch.zeros_like(out)
    dq, dk, dv, dgate = _sparse_attention_backward(
        dout, dlse, q, k, v, indices, counts, start, gate, out, lse, ctx.scale, ctx.deterministic
    )
    return dq, dk, dv, None, None, None, None if gate is None else dgate, None, None


torch.library.register_autograd("gsa_fast::sparse_attention", _backward, setup_context=_save_for_backward)


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
    deterministic: bool = True,
    impl: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Sparse SDPA on the GPU: `gsa_ref.sparse_attention` with the same arguments, plus `deterministic` and `impl`.

    The output gate is applied before the result is written. The value gate is one pass over v first: a value is read by
    many queries, so gating it where it is gathered would read the logits as often. `explain_choice` says which kernel
    serves a shape.

    Gradients reach q, k, v and both gates' logits, also through lse; second derivatives do not exist. They are summed
    in float32, for dk and dv from parts per tile of queries, which `deterministic` rounds to the dtype of q. Keys that
    nobody selected get exactly 0. A NaN or infinity that one query selected, or that comes with its output's gradient,
    may reach the gradients of its neighbours too, whose tile multiplies it by 0.

    Args:
        q: [B, L, H, d_h].
        k, v: [B, S, H_kv, d_h], the dtype of q.
        selection: S_t.
        scale: default 1/√d_h.
        start: position of query 0, default S − L.
        value_gate_logits: [B, S, H_kv, d_h].
        output_gate_logits: [B, L, H, d_h].
        deterministic: sum dk and dv in a fixed order, so that the backward pass gives the same bits at every run, as
            the forward pass always does; else by atomic additions, which takes less memory and, but for the
            longest sequences that were measured, less time.
        impl: "auto", "triton" or "reference", as in `indexer_scores`.

    Returns:
        o [B, L, H, d_h] in the dtype of q, accumulated in float32, and lse, float32 [B, L, H].

    Raises:
        TypeError, ValueError: as the reference.
        NotImplementedError: float64 with the kernels.
    """
    if not isinstance(selection, Selection):
        raise TypeError(f"selection: expected a Selection, got {type(selection).__name__}")
    indices, counts = selection
    check_bool("deterministic", deterministic)
    gates = {"value_gate_logits": value_gate_logits, "output_gate_logits": output_gate_logits}
    check_attention_arguments(q, k, v, indices, counts, scale=scale, start=start, **gates)
    if not use_triton(impl, q=q, k=k, v=v, **gates):
        return gsa_ref.sparse_attention(q, k, v, selection, scale=scale, start=start, **gates)
    (B, L, _, d_h), S = q.shape, k.shape[1]
    if value_gate_logits is not None:
        v = apply_gate(v, value_gate_logits, impl="triton")  # Eq. 9
    first = per_sequence(start, S - L, B, q.device)
    return _sparse_attention(
        q,
        k,
        v,
        indices,
        counts,
        first,
        output_gate_logits,
        d_h**-0.5 if scale is None else float(scale),
        deterministic,
    )
