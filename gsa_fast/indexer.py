"""Gated lightning indexer (Eq. 7): kernel, launcher, custom op."""

import torch
import triton
import triton.language as tl
from torch import Tensor

import gsa_ref
from gsa_fast._backend import no_backward, per_sequence, use_triton
from gsa_fast._primitives import stable_sigmoid
from gsa_ref._arguments import check_indexer_arguments


@triton.jit
def indexer_scores_kernel(
    q_ptr, k_ptr, weight_ptr, bias_ptr, start_ptr, lengths_ptr, scores_ptr, statistics_ptr,
    stride_qb, stride_ql, stride_qh, stride_qd,
    stride_kb, stride_ks, stride_kd,
    stride_wb, stride_wl, stride_wh,
    stride_bias,
    L, S, first_row, scale,
    H_I: tl.constexpr, d_I: tl.constexpr,
    BLOCK_L: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_D: tl.constexpr,
    STATISTICS: tl.constexpr,
):  # fmt: skip
    """I[t,s] = Σ_j σ(w[t,j]) · σ(scale · q[t,j]·k[s] + b_j) for one tile of BLOCK_L queries × BLOCK_S keys.

    With STATISTICS, also the count, mean and centred sum of squares of each row of the tile: what Eq. 8 needs, taken
    while the scores are in registers. Merging tiles of (n, mean, M2) does not cancel as Σ and Σ² would.
    """
    tiles_s = tl.cdiv(S, BLOCK_S)
    tiles_l = tl.cdiv(L, BLOCK_L)
    pid = tl.program_id(0)
    tile_s = pid % tiles_s
    tile_l = (pid // tiles_s) % tiles_l
    b = (pid // tiles_s // tiles_l).to(tl.int64)

    row = tile_l * BLOCK_L + tl.arange(0, BLOCK_L)  # [BLOCK_L] rows of this launch
    s = tile_s * BLOCK_S + tl.arange(0, BLOCK_S)  # [BLOCK_S] key positions
    c = tl.arange(0, BLOCK_D).to(tl.int64)  # [BLOCK_D] channels; 64 bits, because a stride may be anything
    position = tl.load(start_ptr + b) + first_row + row
    length = tl.load(lengths_ptr + b)
    # A query that is no padding sees no padding: s ≤ position < length.
    visible = (s[None, :] <= position[:, None]) & (position < length)[:, None]

    scores = tl.full([BLOCK_L, BLOCK_S], float("-inf"), tl.float32)
    last_position = tl.load(start_ptr + b) + first_row + tile_l * BLOCK_L + BLOCK_L - 1
    if tile_s * BLOCK_S <= last_position:  # else the whole tile lies in the future
        b_k = tl.load(
            k_ptr + b * stride_kb + s.to(tl.int64)[:, None] * stride_ks + c[None, :] * stride_kd,
            mask=(s < S)[:, None] & (c < d_I)[None, :],
            other=0.0,
        )  # [BLOCK_S, BLOCK_D]
        total = tl.zeros([BLOCK_L, BLOCK_S], tl.float32)
        for head in range(H_I):
            j = tl.cast(head, tl.int64)
            b_q = tl.load(
                q_ptr + b * stride_qb + row.to(tl.int64)[:, None] * stride_ql + j * stride_qh + c[None, :] * stride_qd,
                mask=(row < L)[:, None] & (c < d_I)[None, :],
                other=0.0,
            )  # [BLOCK_L, BLOCK_D]
            w = tl.load(
                weight_ptr + b * stride_wb + row.to(tl.int64) * stride_wl + j * stride_wh, mask=row < L, other=0.0
            )  # [BLOCK_L]
            bias = tl.load(bias_ptr + j * stride_bias).to(tl.float32)
            z = scale * tl.dot(b_q, tl.trans(b_k), input_precision="ieee") + bias  # [BLOCK_L, BLOCK_S]
            total += stable_sigmoid(w.to(tl.float32))[:, None] * stable_sigmoid(z)
        scores = tl.where(visible, total, scores)

    out_row = b * L + row  # scores and statistics are contiguous
    tl.store(
        scores_ptr + out_row.to(tl.int64)[:, None] * S + s[None, :], scores, mask=(row < L)[:, None] & (s < S)[None, :]
    )
    if STATISTICS:
        counted = visible & (s < S)[None, :] & (scores == scores)  # NaN scores are left out of the variance
        n = tl.sum(counted.to(tl.float32), axis=1)  # [BLOCK_L]
        mean = tl.sum(tl.where(counted, scores, 0.0), axis=1) / tl.maximum(n, 1.0)
        deviation = tl.where(counted, scores - mean[:, None], 0.0)
        m2 = tl.sum(deviation * deviation, axis=1)
        p_tile = statistics_ptr + out_row.to(tl.int64) * 3 * tiles_s + tile_s  # [B, L, 3, tiles]
        tl.store(p_tile, n, mask=row < L)
        tl.store(p_tile + tiles_s, mean, mask=row < L)
        tl.store(p_tile + 2 * tiles_s, m2, mask=row < L)


BLOCK_L, BLOCK_S = 64, 64


def statistics_tiles(S: int) -> int:
    """Number of key tiles per row, each with its own (n, mean, M2)."""
    return triton.cdiv(S, BLOCK_S)


def launch_indexer_scores(
    q_idx: Tensor,
    k_idx: Tensor,
    head_logits: Tensor,
    bias: Tensor,
    start: Tensor,
    lengths: Tensor,
    scale: float,
    *,
    scores: Tensor,
    statistics: Tensor | None = None,
    first_row: int = 0,
) -> None:
    """Fill `scores` [B, L, S] (contiguous) and, if given, `statistics` [B, L, 3, tiles]; row 0 is query `first_row`."""
    (B, L, H_I, d_I), S = q_idx.shape, k_idx.shape[1]
    if B * L * S == 0:
        return
    exact_float32 = q_idx.dtype == torch.float32  # its dot needs more registers: smaller tiles
    block_l = min(BLOCK_L, 32) if exact_float32 else BLOCK_L
    grid = (statistics_tiles(S) * triton.cdiv(L, block_l) * B,)
    indexer_scores_kernel[grid](
        q_idx, k_idx, head_logits, bias, start, lengths, scores, scores if statistics is None else statistics,
        *q_idx.stride(), *k_idx.stride(), *head_logits.stride(), *bias.stride(),
        L, S, first_row, scale,
        H_I=H_I, d_I=d_I, BLOCK_L=block_l, BLOCK_S=BLOCK_S, BLOCK_D=max(16, triton.next_power_of_2(d_I)),
        STATISTICS=statistics is not None,
    )  # fmt: skip


@torch.library.custom_op("gsa_fast::indexer_scores", mutates_args=())
def _indexer_scores(
    q_idx: Tensor, k_idx: Tensor, head_logits: Tensor, bias: Tensor, start: Tensor, lengths: Tensor, scale: float
) -> Tensor:
    scores = q_idx.new_empty(*q_idx.shape[:2], k_idx.shape[1], dtype=torch.float32)
    launch_indexer_scores(q_idx, k_idx, head_logits, bias, start, lengths, scale, scores=scores)
    return scores


@_indexer_scores.register_fake
def _(
    q_idx: Tensor, k_idx: Tensor, head_logits: Tensor, bias: Tensor, start: Tensor, lengths: Tensor, scale: float
) -> Tensor:
    return q_idx.new_empty(*q_idx.shape[:2], k_idx.shape[1], dtype=torch.float32)


no_backward("indexer_scores")


def indexer_scores(
    q_idx: Tensor,
    k_idx: Tensor,
    head_logits: Tensor,
    bias: Tensor,
    *,
    scale: float,
    start: int | Tensor = 0,
    lengths: Tensor | None = None,
    impl: str = "auto",
) -> Tensor:
    """Eq. 7 on the GPU: `gsa_ref.indexer_scores` with the same arguments, plus `impl`.

    Args:
        q_idx: q^I, [B, L, H_I, d_I].
        k_idx: k^I, [B, S, d_I], the dtype of q_idx.
        head_logits: [B, L, H_I].
        bias: [H_I].
        scale: factor on the inner product.
        start: position of query 0, an int or int32 [B].
        lengths: number of valid keys, int32 [B].
        impl: "auto" (kernels on a GPU, else the reference, announced once), "triton" or "reference".

    Returns:
        float32 [B, L, S], −inf where query t may not look.

    Raises:
        TypeError, ValueError: as the reference.
        NotImplementedError: float64 with the kernels, or a backward pass through them.
    """
    check_indexer_arguments(q_idx, k_idx, head_logits, bias, scale=scale, start=start, lengths=lengths)
    if not use_triton(impl, q_idx=q_idx, k_idx=k_idx, head_logits=head_logits, bias=bias):
        return gsa_ref.indexer_scores(q_idx, k_idx, head_logits, bias, scale=scale, start=start, lengths=lengths)
    B, S = k_idx.shape[:2]
    first = per_sequence(start, 0, B, q_idx.device)
    return _indexer_scores(
        q_idx, k_idx, head_logits, bias, first, per_sequence(lengths, S, B, q_idx.device), float(scale)
    )
