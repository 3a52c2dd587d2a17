"""The indexer's KL loss (Eq. 15) and its gradients: the custom op and the public function.

Kernels: `teacher` gives the attention distributions, `student` the divergence from them and ∂L/∂I, `chain` the
gradients of the indexer's inputs from ∂L/∂I. All three work on one chunk of query rows at a time.
"""

from typing import Any

import torch
from torch import Tensor

import gsa_ref
from gsa_fast._backend import per_sequence, use_triton
from gsa_fast.training.chain import launch_key_gradients, launch_query_gradients
from gsa_fast.training.student import launch_divergence, launch_selected_divergence
from gsa_fast.training.teacher import launch_selected_teacher, launch_teacher_lse
from gsa_ref import Selection
from gsa_ref._arguments import check_kl_arguments

__all__ = ["indexer_kl_loss"]

# ∂L/∂I of one chunk of query rows, and in the sparse phase the teacher on their slots.
CHUNK_BYTES = 256 * 2**20


@torch.library.custom_op("gsa_fast::indexer_kl_loss", mutates_args=())
def _indexer_kl_loss(
    q_idx: Tensor,
    k_idx: Tensor,
    head_logits: Tensor,
    bias: Tensor,
    q: Tensor,
    k: Tensor,
    indices: Tensor | None,
    counts: Tensor | None,
    lse: Tensor | None,
    start: Tensor,
    lengths: Tensor,
    indexer_scale: float,
    scale: float,
    temperature: float,
    needs_grad: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    (B, L, H_I, _), S, H = q_idx.shape, k_idx.shape[1], q.shape[2]
    gradients = _empty_gradients(q_idx, k_idx, head_logits, bias, needs_grad)
    if B * L * S == 0:
        for gradient in gradients:
            gradient.zero_()
        return q_idx.new_zeros((), dtype=torch.float32), *gradients
    indexer = q_idx, k_idx, head_logits, bias
    sparse = indices is not None

    def empty(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=q_idx.device)

    kl = empty(B, L)
    q_gradient, k_gradient, weight_gradient, _ = gradients
    row_gradients = (q_gradient, weight_gradient, empty(B, L, H_I)) if needs_grad else None
    k_gradient.zero_()
    if sparse:
        valid = empty(B, L, dtype=torch.int32)
    else:
        position = start[:, None] + torch.arange(L, device=q_idx.device)
        valid = (position < lengths[:, None]).to(torch.int32)

    K = 0 if indices is None else indices.shape[-1]
    rows = max(1, min(L, CHUNK_BYTES // (4 * B * (S + K))))
    if rows > 64:
        rows -= rows % 64  # whole tiles, and few specialisations
    score_buffer = empty(B * rows * S) if needs_grad else None
    if score_buffer is not None and sparse:
        score_buffer.zero_()  # once: a chunk clears what it wrote
    slot_buffer = empty(B * rows * K)
    for first_row in range(0, L, rows):
        n = min(rows, L - first_row)
        score_gradient = None if score_buffer is None else score_buffer[: B * n * S].view(B, n, S)
        if indices is not None and counts is not None:
            p = slot_buffer[: B * n * K].view(B, n, K)
            launch_selected_teacher(q, k, indices, counts, start, lengths, scale, first_row, lse, p)
            launch_selected_divergence(
                *indexer, indices, counts, start, lengths, p, H, indexer_scale, temperature, first_row,
                kl, valid, score_gradient, row_gradients,
            )  # fmt: skip
        else:
            teacher_lse = empty(B, n, H)
            launch_teacher_lse(q, k, start, lengths, scale, first_row, teacher_lse)
            kl[:, first_row : first_row + n] = launch_divergence(
                *indexer, q, k, start, lengths, teacher_lse, indexer_scale, scale, temperature, first_row,
                score_gradient,
            )  # fmt: skip
            if score_gradient is not None and row_gradients is not None:
                launch_query_gradients(
                    *indexer, start, lengths, indexer_scale, first_row, score_gradient, row_gradients
                )
        if score_gradient is not None:
            launch_key_gradients(
                *indexer, start, lengths, indexer_scale, first_row, valid, score_gradient, sparse, k_gradient
            )

    n_rows = valid.sum().clamp(min=1)
    loss = (kl.where(valid != 0, 0).sum(dtype=torch.float64) / n_rows).float()
    if row_gradients is not None:
        torch.sum(row_gradients[2], dim=(0, 1), out=gradients[3])
        for gradient in gradients:
            gradient.div_(temperature * n_rows)
    return loss, *gradients


def _empty_gradients(
    q_idx: Tensor, k_idx: Tensor, head_logits: Tensor, bias: Tensor, needs_grad: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """float32, of the shapes of the inputs or, if not needed, without elements."""

    def like(x: Tensor) -> Tensor:
        return x.new_empty(x.shape if needs_grad else 0, dtype=torch.float32)

    return like(q_idx), like(k_idx), like(head_logits), like(bias)


@_indexer_kl_loss.register_fake
def _(
    q_idx: Tensor,
    k_idx: Tensor,
    head_logits: Tensor,
    bias: Tensor,
    q: Tensor,
    k: Tensor,
    indices: Tensor | None,
    counts: Tensor | None,
    lse: Tensor | None,
    start: Tensor,
    lengths: Tensor,
    indexer_scale: float,
    scale: float,
    temperature: float,
    needs_grad: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    loss = q_idx.new_empty((), dtype=torch.float32)
    return loss, *_empty_gradients(q_idx, k_idx, head_logits, bias, needs_grad)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.save_for_backward(*output[1:])
    ctx.dtypes = [x.dtype for x in inputs[:4]]


def _backward(ctx: Any, gradient: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
    if torch.is_grad_enabled():
        raise NotImplementedError(
            "gsa_fast.indexer_kl_loss has no second derivative (create_graph=True): pass impl='reference' for one"
        )
    saved = zip(ctx.saved_tensors, ctx.dtypes, strict=True)
    return *((gradient * x).to(dtype) for x, dtype in saved), *[None] * 11


torch.library.register_autograd("gsa_fast::indexer_kl_loss", _backward, setup_context=_setup_context)


def indexer_kl_loss(
    q_idx: Tensor,
    k_idx: Tensor,
    head_logits: Tensor,
    bias: Tensor,
    q: Tensor,
    k: Tensor,
    *,
    indexer_scale: float,
    selection: Selection | None = None,
    lse: Tensor | None = None,
    scale: float | None = None,
    temperature: float = 1.0,
    start: int | Tensor = 0,
    lengths: Tensor | None = None,
    impl: str = "auto",
) -> Tensor:
    """Eq. 15 on the GPU: `gsa_ref.indexer_kl_loss` with the same arguments, plus `impl`.

    No L×S array is ever held: ∂L/∂I is, for one chunk of query rows at a time, in at most `CHUNK_BYTES` or one row per
    sequence. The gradients are computed together with the loss if one of the indexer's inputs wants one, and kept in
    float32 until the backward pass. Loss and gradients are bitwise reproducible.

    Args:
        q_idx: q^I, [B, L, H_I, d_I].
        k_idx: k^I, [B, S, d_I], the dtype of q_idx.
        head_logits: [B, L, H_I].
        bias: [H_I].
        q: [B, L, H, d_h].
        k: [B, S, H_kv, d_h], the dtype of q.
        indexer_scale: factor on q^I·k^I in Eq. 7.
        selection: S_t, or None for the dense warm-up.
        lse: float32 [B, L, H], as `sparse_attention` returns it for the same selection; it saves one of two passes over
            the selected keys.
        scale: factor on q·k, default 1/√d_h.
        temperature: τ.
        start: position of query 0, an int or int32 [B].
        lengths: number of valid positions, int32 [B], default S.
        impl: "auto", "triton" or "reference", as in `indexer_scores`.

    Returns:
        The loss in nats, float32, with gradients for q_idx, k_idx, head_logits and bias.

    Raises:
        TypeError, ValueError: as the reference.
        NotImplementedError: float64 with the kernels, or a second derivative of them.
    """
    if selection is not None and not isinstance(selection, Selection):
        raise TypeError(f"selection: expected a Selection or None, got {type(selection).__name__}")
    indices, counts = (None, None) if selection is None else selection
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
    if not use_triton(impl, q_idx=q_idx, k_idx=k_idx, head_logits=head_logits, bias=bias, q=q, k=k, lse=lse):
        return gsa_ref.indexer_kl_loss(
            q_idx, k_idx, head_logits, bias, q, k, indexer_scale=indexer_scale, selection=selection, lse=lse,
            scale=scale, temperature=temperature, start=start, lengths=lengths,
        )  # fmt: skip
    (B, S), d_h = k_idx.shape[:2], q.shape[-1]
    learned = (q_idx, k_idx, head_logits, bias)
    return _indexer_kl_loss(
        *learned,
        q.detach(),  # the teacher gets no gradient
        k.detach(),
        indices,
        counts,
        None if lse is None else lse.detach(),
        per_sequence(start, 0, B, q_idx.device),
        per_sequence(lengths, S, B, q_idx.device),
        float(indexer_scale),
        d_h**-0.5 if scale is None else float(scale),
        float(temperature),
        torch.is_grad_enabled() and any(x.requires_grad for x in learned),
    )[0]
