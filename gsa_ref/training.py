"""How the indexer learns: the KL divergence of its scores from the attention distribution (Eq. 15).

Top-k returns indices, and no gradient flows through an index. So the indexer learns from a loss of its own, in two
phases. In the warm-up the attention stays dense, and both distributions run over every visible position. In the sparse
phase both run over the selected tokens S_t. Here the attention logits of all L × S pairs are computed in either phase;
`gsa_fast` holds none of these arrays.
"""

import torch
from jaxtyping import Bool, Float, Int32
from torch import Tensor

from gsa_ref._arguments import (
    check_attention_arguments,
    check_kl_arguments,
    check_lengths,
    check_same_device,
    check_start,
)
from gsa_ref.indexer import indexer_scores, no_autocast, visible
from gsa_ref.selection import Selection


def indexer_kl_loss(
    q_idx: Float[Tensor, "B L H_I d_I"],
    k_idx: Float[Tensor, "B S d_I"],
    head_logits: Float[Tensor, "B L H_I"],
    bias: Float[Tensor, " H_I"],
    q: Float[Tensor, "B L H d_h"],
    k: Float[Tensor, "B S H_kv d_h"],
    *,
    indexer_scale: float,
    selection: Selection | None = None,
    lse: Float[Tensor, "B L H"] | None = None,
    scale: float | None = None,
    temperature: float = 1.0,
    start: int | Int32[Tensor, " B"] = 0,
    lengths: Int32[Tensor, " B"] | None = None,
) -> Float[Tensor, ""]:
    """Eq. 15 (second-hand): the mean over the valid rows t of KL(p_t ‖ softmax(I_t / τ)).

    The teacher p_t[s] = (1/H) Σ_h softmax_s(scale · q[t,h]·k[s]) is the mean over the attention heads; the student is
    the softmax of the scores I of Eq. 7. Without a selection (dense warm-up) every softmax runs over all positions that
    query t may see, with one (sparse phase) over the filled slots of S_t, as in `sparse_attention`. Rows at or past
    `lengths`, and rows without a position, are not valid. Without a valid row the loss is 0.

    Gradients reach q_idx, k_idx, head_logits and bias: ∂L_t/∂I = (softmax(I_t / τ) − p_t) / τ. The teacher has none:
    nothing reaches q, k or lse. A NaN among the scores or attention logits of a valid row makes the loss NaN.

    Args:
        q_idx, k_idx, head_logits, bias: as in `indexer_scores`.
        q, k: queries and keys of the attention; query head h reads key head ⌊h / (H/H_kv)⌋.
        indexer_scale: factor on q^I·k^I in Eq. 7.
        selection: S_t. Duplicates are invalid.
        lse: ln Σ_{s∈S_t} exp(scale · q[t,h]·k[s]), as `sparse_attention` returns it for the same selection; without it
            the sum is computed here. As accurate as the logits it was summed from, which in 16 bits are rounded.
        scale: factor on q·k, default 1/√d_h.
        temperature: τ. Scores lie in (0, H_I), so at τ = 1 no two probabilities differ by more than e^{H_I}.
        start: position of query 0, as in `indexer_scores`; unlike in `sparse_attention`, 0 by default.
        lengths: number of valid positions per sequence, default S.

    Returns:
        The loss in nats. float64 if q_idx or q is float64, else float32.

    Raises:
        TypeError: wrong type or dtype.
        ValueError: wrong shape or device, H not a multiple of H_kv, a negative start, a temperature that is not
            positive, or lse without a selection.
    """
    indices, counts = _slots(selection)
    check_kl_arguments(
        q_idx,
        k_idx,
        head_logits,
        bias,
        q,
        k,
        indexer_scale=indexer_scale,
        indices=indices,
        counts=counts,
        lse=lse,
        scale=scale,
        temperature=temperature,
        start=start,
        lengths=lengths,
    )
    over = _positions(q, k, selection, start, lengths)  # [B, L, S]
    valid = over.any(-1, keepdim=True)  # [B, L, 1]
    p = _teacher(q, k, over, scale, lse)  # [B, L, S]
    scores = indexer_scores(q_idx, k_idx, head_logits, bias, scale=indexer_scale, start=start, lengths=lengths)  # Eq. 7
    logits = (scores / temperature).masked_fill(~over, -torch.inf)
    logits = logits.masked_fill(~valid, 0)  # softmax of nothing is NaN, and so is its gradient
    log_student = torch.log_softmax(logits, dim=-1).masked_fill(~over, 0)  # 0 · −∞ is NaN
    kl = (torch.xlogy(p, p) - p * log_student).sum(-1)  # [B, L], 0 where the row is not valid
    return kl.sum() / valid.sum().clamp(min=1)


def captured_mass(
    q: Float[Tensor, "B L H d_h"],
    k: Float[Tensor, "B S H_kv d_h"],
    selection: Selection,
    *,
    scale: float | None = None,
    start: int | Int32[Tensor, " B"] = 0,
    lengths: Int32[Tensor, " B"] | None = None,
) -> tuple[Float[Tensor, "B L"], Float[Tensor, "B L"]]:
    """How much of the dense attention a selection holds, and how much the best one of its size would.

    With p_t the teacher of the warm-up, the mean over heads of dense attention: Σ_{s∈S_t} p_t[s], and the sum of the
    |S_t| largest p_t[s]. Their ratio, the share of the attention that can be captured and was, judges an indexer.
    Neither carries a gradient.

    Args:
        q, k, selection, scale, start, lengths: as in `indexer_kl_loss`.

    Returns:
        (selected, oracle) in [0, 1], up to rounding; 0 in rows that are not valid. float64 for float64, else float32.

    Raises:
        TypeError: wrong type or dtype.
        ValueError: wrong shape or device, H not a multiple of H_kv, or a negative start.
    """
    if not isinstance(selection, Selection):
        raise TypeError(f"selection: expected a Selection, got {type(selection).__name__}")
    gates = {"value_gate_logits": None, "output_gate_logits": None}
    check_attention_arguments(q, k, k, *selection, scale=scale, start=start, **gates)
    check_start(start, {"B": q.shape[0], "L": q.shape[1]})  # None, a default of attention, is none here
    check_lengths(lengths, {"B": q.shape[0]})
    check_same_device(q=q, lengths=lengths)
    p = _teacher(q, k, _positions(q, k, None, start, lengths), scale, None)  # [B, L, S]
    chosen = _positions(q, k, selection, start, lengths)
    most = torch.nn.functional.pad(p.sort(-1, descending=True)[0].cumsum(-1), (1, 0))  # [B, L, S + 1], of the n largest
    return (p * chosen).sum(-1), most.gather(-1, chosen.sum(-1, keepdim=True)).squeeze(-1)


def _slots(selection: Selection | None) -> tuple[Tensor | None, Tensor | None]:
    if selection is not None and not isinstance(selection, Selection):
        raise TypeError(f"selection: expected a Selection or None, got {type(selection).__name__}")
    return (None, None) if selection is None else (selection.indices, selection.counts)


def _positions(
    q: Tensor, k: Tensor, selection: Selection | None, start: int | Tensor, lengths: Tensor | None
) -> Bool[Tensor, "B L S"]:
    """The positions that the distributions of a row run over: what it sees, or the filled slots of S_t among that."""
    (B, L), S = q.shape[:2], k.shape[1]
    over = visible(L, S, start, lengths, q.device).expand(B, L, S)
    if selection is None:
        return over
    index = selection.indices.long()  # [B, L, K]
    in_prefix = torch.arange(index.shape[-1], device=q.device) < selection.counts[..., None]
    filled = in_prefix & (index >= 0) & (index < S)
    chosen = torch.zeros(B, L, S + 1, dtype=torch.bool, device=q.device)  # empty slots write to column S
    return over & chosen.scatter(-1, index.masked_fill(~filled, S), True)[..., :S]


def _teacher(
    q: Tensor, k: Tensor, over: Bool[Tensor, "B L S"], scale: float | None, lse: Tensor | None
) -> Float[Tensor, "B L S"]:
    """p_t: softmax of the attention logits over the positions `over`, mean over heads. 0 elsewhere, no gradient."""
    dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
    (H, d_h), H_kv = q.shape[2:], k.shape[2]
    q = q.detach().to(dtype).unflatten(2, (H_kv, H // H_kv))  # [B, L, H_kv, G, d_h]
    with no_autocast(q.device):
        logits = (d_h**-0.5 if scale is None else scale) * torch.einsum("blhgd,bshd->blhgs", q, k.detach().to(dtype))
    nowhere = ~over[:, :, None]
    logits = logits.flatten(2, 3).masked_fill(nowhere, -torch.inf)  # [B, L, H, S]
    lse = torch.logsumexp(logits, dim=-1) if lse is None else lse.detach()
    return torch.exp(logits - lse[..., None]).masked_fill(nowhere, 0).mean(2)
