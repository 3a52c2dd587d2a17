"""Sparse scaled dot-product attention over the selected tokens, and the dense attention it is compared with."""

import torch
from jaxtyping import Float, Int32
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from gsa_ref._arguments import check_attention_arguments, check_dense_attention_arguments
from gsa_ref.gates import apply_gate
from gsa_ref.indexer import visible
from gsa_ref.selection import Selection


def sparse_attention(
    q: Float[Tensor, "B L H d_h"],
    k: Float[Tensor, "B S H_kv d_h"],
    v: Float[Tensor, "B S H_kv d_h"],
    selection: Selection,
    *,
    scale: float | None = None,
    start: int | Int32[Tensor, " B"] | None = None,
    value_gate_logits: Float[Tensor, "B S H_kv d_h"] | None = None,
    output_gate_logits: Float[Tensor, "B L H d_h"] | None = None,
) -> tuple[Float[Tensor, "B L H d_h"], Float[Tensor, "B L H"]]:
    """Sparse SDPA: o[t,h] = Σ_{s∈S_t} softmax_s(scale · q[t,h]·k[s]) v'[s], the same S_t for every head.

    Query head h reads key/value head ⌊h / (H/H_kv)⌋ (GQA). v' = v ⊙ σ(value_gate_logits) (Eq. 9) and the result is
    o ⊙ σ(output_gate_logits) (Eq. 10) where these are given.

    A slot is empty if it lies at or past the row's count, or if its index is outside [0, S) or in the future
    (above start + t). An unselected key, value or gate changes nothing, whatever it holds; a NaN in a selected
    one propagates. A row whose slots are all empty gives o = 0 and lse = −inf.

    Args:
        q, k, v: one dtype; the computation runs in it, the softmax in float32 (float64 for float64).
        selection: S_t. Duplicates are invalid (`Selection.validate` finds them).
        scale: default 1/√d_h.
        start: position of query 0, default S − L: the queries are the last L of the S positions.

    Returns:
        o in the dtype of q, and lse[t,h] = ln Σ_{s∈S_t} exp(scale · q[t,h]·k[s]) in float32 (float64 for float64).

    Raises:
        TypeError: wrong type or dtype.
        ValueError: wrong shape or device, H not a multiple of H_kv, or L > S without start.
    """
    if not isinstance(selection, Selection):
        raise TypeError(f"selection: expected a Selection, got {type(selection).__name__}")
    check_attention_arguments(
        q,
        k,
        v,
        selection.indices,
        selection.counts,
        scale=scale,
        start=start,
        value_gate_logits=value_gate_logits,
        output_gate_logits=output_gate_logits,
    )
    (B, L, H, d_h), (S, H_kv) = q.shape, k.shape[1:3]
    scale = d_h**-0.5 if scale is None else scale

    first = torch.as_tensor(S - L if start is None else start, device=q.device).reshape(-1, 1, 1)
    position = first + torch.arange(L, device=q.device)[:, None]  # [B or 1, L, 1]
    index = selection.indices.long()  # [B, L, K]
    in_prefix = torch.arange(index.shape[-1], device=q.device) < selection.counts[..., None]
    filled = in_prefix & (index >= 0) & (index < S) & (index <= position)
    index = index.masked_fill(~filled, 0)
    row = torch.arange(B, device=q.device)[:, None, None]
    empty_slot = ~filled[..., None, None]

    def gather(x: Tensor) -> Tensor:
        if S == 0:  # nothing to gather from: every slot is empty
            x = x.new_zeros(B, 1, H_kv, d_h)
        return x[row, index].masked_fill(empty_slot, 0)  # [B, L, K, H_kv, d_h]

    k_sel, v_sel = gather(k), gather(v)
    if value_gate_logits is not None:
        v_sel = apply_gate(v_sel, gather(value_gate_logits))  # Eq. 9, once gathered: a NaN elsewhere stays there

    q = q.unflatten(2, (H_kv, H // H_kv))  # [B, L, H_kv, G, d_h]
    logits = scale * torch.einsum("blhgd,blshd->blhgs", q, k_sel)
    logits = logits.to(torch.promote_types(q.dtype, torch.float32))
    logits = logits.masked_fill(~filled[:, :, None, None], -torch.inf)
    empty_row = ~filled.any(-1)[:, :, None, None, None]
    logits = logits.masked_fill(empty_row, 0)  # softmax of nothing is NaN, and so is its gradient
    lse = torch.logsumexp(logits, dim=-1).masked_fill(empty_row[..., 0], -torch.inf)  # [B, L, H_kv, G]
    p = torch.softmax(logits, dim=-1).masked_fill(empty_row, 0)
    out = torch.einsum("blhgs,blshd->blhgd", p.to(v.dtype), v_sel).flatten(2, 3)
    if output_gate_logits is not None:
        out = apply_gate(out, output_gate_logits)  # Eq. 10
    return out, lse.flatten(2, 3)


def dense_attention(
    q: Float[Tensor, "B L H d_h"],
    k: Float[Tensor, "B S H_kv d_h"],
    v: Float[Tensor, "B S H_kv d_h"],
    *,
    start: int | Int32[Tensor, " B"] = 0,
    lengths: Int32[Tensor, " B"] | None = None,
) -> Float[Tensor, "B L H d_h"]:
    """Causal attention over every position s ≤ start + t below lengths, through PyTorch's SDPA.

    It serves the variants without an indexer, and the tests as the limit k_t ≥ S. A row that sees nothing gives 0.

    Args:
        q, k, v: one dtype.
        start, lengths: as in `indexer_scores`.

    Raises:
        TypeError: wrong type or dtype.
        ValueError: wrong shape or device, H not a multiple of H_kv, or a negative start.
    """
    check_dense_attention_arguments(q, k, v, start=start, lengths=lengths)
    L, S = q.shape[1], k.shape[1]
    mask = visible(L, S, start, lengths, q.device)[:, None]  # [B or 1, 1, L, S]
    empty_row = ~mask.any(-1, keepdim=True)  # attends to everything first, then is set to 0: softmax of nothing is NaN
    out = scaled_dot_product_attention(
        q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), attn_mask=mask | empty_row, enable_gqa=True
    )
    return out.masked_fill(empty_row, 0).transpose(1, 2)
