"""Decoding: everything between the projections, for a few queries against a long cache, in three kernels.

1. `scores`: Eq. 7 for every key, and the best score of each group of keys.
2. `select`: k_t (Eq. 8) and a bound below the k_t-th best score; many programs per row list the keys that reach it, and
   the last of them picks the k_t best. With more than BOUND_ROWS rows, the bounds have a kernel of their own.
3. `attend`: sparse attention, the selection split over programs; the last one combines and gates (Eq. 10).

Nothing waits for the device, and launches depend on shapes alone: a CUDA graph may replay them while `start` and
`lengths` change. Splits depend on S and on the row, not on the batch: neighbours never change a bit of a result.
"""

import math
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

import gsa_ref
from gsa_fast._backend import no_backward, per_sequence, use_triton
from gsa_fast.attention.rows import LOG2_E
from gsa_fast.budget import RULE_CODES, as_scalar
from gsa_fast.decode.attend import decode_attend_kernel
from gsa_fast.decode.scores import decode_scores_kernel
from gsa_fast.decode.select import decode_select_kernel, decode_threshold_kernel
from gsa_fast.selection import SIGMOID_MODES
from gsa_ref import GSAConfig, Selection
from gsa_ref._arguments import check_bool, check_choice, check_decode_arguments
from gsa_ref.selection import check_selection_config

MAX_QUERIES = 8

# Groups of keys per row: a program that finds a bound holds the best score of each in registers.
MAX_GROUPS, LARGEST_GROUPS = 8192, 16384
BLOCK_SCORES = 128  # keys per tile of `decode_scores_kernel`
MAX_MEMBERS = 4  # of a group, in one such tile
TILE_BYTES = 16384  # of K, and of V, per tile of `decode_attend_kernel`
BLOCK_SELECT = 8192  # keys that a program of `decode_select_kernel` reads at a time
MAX_SHARDS = 16  # of a row's keys
BOUND_ROWS = 8  # up to so many, the programs of all shards run at once, and each finds the bound of its row
MAX_CANDIDATES = 16384  # that the last program of a row holds in registers
MAX_SPLITS = 16  # of a row's selection
COMBINED = 8192  # numbers of several splits that are combined at a time
# Measured on an H200, at 131,072 keys with 8 key/value heads in bf16.
SCORES_OPTIONS = {"num_stages": 3}
SELECT_OPTIONS = {"num_warps": 16}
ATTEND_OPTIONS = {"num_warps": 2, "num_stages": 3}
# Not measured: with these no configuration spills registers.
WIDE_TILE = 2048  # numbers of a tile of outputs, above which more threads hold them
WIDE_ATTEND_OPTIONS = {"num_warps": 4, "num_stages": 3}
FLOAT32_ATTEND_OPTIONS = {"num_warps": 8, "num_stages": 3}


class DecodeOutput(NamedTuple):
    """Result of `decode_attention`.

    Attributes:
        out: o, or o' with an output gate, [B, L, H, d_h] in the dtype of q.
        lse: float32 [B, L, H], −inf for a row that selects nothing.
        variance: Var(I[t,:]), float32 [B, L].
        selection: S_t if it was asked for.
    """

    out: Tensor
    lse: Tensor
    variance: Tensor
    selection: Selection | None


def group_members(S: int, K: int) -> int:
    """How many keys form a group: the least power of two that leaves few groups, but two per slot of a selection.

    The κ-th best of so many groups' best scores is close to the κ-th best score.
    """
    most = min(max(MAX_GROUPS, triton.next_power_of_2(2 * K)), LARGEST_GROUPS)
    return triton.next_power_of_2(triton.cdiv(S, most))


def shards_of(n_keys: int) -> int:
    """How many programs share the keys of a row: a power of two."""
    return min(MAX_SHARDS, triton.next_power_of_2(triton.cdiv(n_keys, BLOCK_SELECT)))


def segment_of(K: int, shards: int) -> int:
    """Candidates that a shard has room for. About 1.5 K of a row are expected, and six deviations of luck are left.

    At most MAX_CANDIDATES for all shards: with more than 8,192 slots, rows with large budgets are read several times.
    """
    expected = 1.5 * K / shards
    wanted = triton.next_power_of_2(math.ceil(expected + 6 * math.sqrt(expected)))
    return max(2, min(wanted, MAX_CANDIDATES // shards))


def block_k(block_d: int, dtype: torch.dtype) -> int:
    """Slots per tile of `decode_attend_kernel`."""
    return max(16, min(64, TILE_BYTES // (block_d * dtype.itemsize)))


def launch_decode(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    q_idx: Tensor,
    k_idx: Tensor,
    head_logits: Tensor,
    bias: Tensor,
    mean_variance: Tensor,
    start: Tensor,
    lengths: Tensor,
    output_gate_logits: Tensor | None,
    scale: float,
    indexer_scale: float,
    k_base: int,
    k_min: int,
    k_max: int,
    rule: str,
    approximate: bool,
    *,
    out: Tensor,
    lse: Tensor,
    variance: Tensor,
    indices: Tensor,
    counts: Tensor,
) -> None:
    """Fill the outputs (contiguous). Shapes as in `decode_attention`; indices [B, L, K] in no special order."""
    (B, L, H, d_h), (S, H_kv) = q.shape, k.shape[1:3]
    H_I, d_I = q_idx.shape[2:]
    K, group, device = indices.shape[-1], H // H_kv, q.device

    def scratch(*shape: int, dtype: torch.dtype = torch.int32) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=device)

    exact_float32 = q.dtype == torch.float32  # its dots need more registers
    block_l = triton.next_power_of_2(L)
    block_h = max(triton.next_power_of_2(H_I), 8 // block_l)  # 8 columns: the narrowest product of the matrix units
    columns = block_l * block_h
    members = group_members(S, K)
    block_m = min(members, MAX_MEMBERS)
    block_g = BLOCK_SCORES // block_m // (2 if q_idx.dtype == torch.float32 else 1) // (2 if columns > 32 else 1)
    groups = triton.cdiv(triton.cdiv(S, members), block_g) * block_g
    tiles = groups // block_g
    keys, best = scratch(B, L, groups * members), scratch(B, L, groups)
    statistics = scratch(B, L, 3, tiles, dtype=torch.float32)
    arrived = scratch(B, L, H_kv + 1)
    decode_scores_kernel[(B * tiles,)](
        q_idx, k_idx, head_logits, bias, start, lengths, keys, best, statistics, arrived,
        *q_idx.stride(), *k_idx.stride(), *head_logits.stride(), *bias.stride(),
        L, S, groups, tiles, L * (H_kv + 1), indexer_scale,
        H_I=H_I, d_I=d_I, MEMBERS=members,
        BLOCK_L=block_l, BLOCK_H=block_h, BLOCK_D=max(16, triton.next_power_of_2(d_I)),
        BLOCK_G=block_g, BLOCK_M=block_m, BLOCK_C=triton.next_power_of_2(L * (H_kv + 1)), APPROXIMATE=approximate,
        num_warps=4 if columns <= 16 else 8, **SCORES_OPTIONS,
    )  # fmt: skip

    shards = shards_of(groups * members)
    segment = segment_of(K, shards)
    low, entries, sizes = scratch(B, L), scratch(B, L, shards, segment, 2), scratch(B, L, shards)
    # The variance of a row must not depend on which kernel merges it: both have the same tiles and warps.
    bound: dict[str, Any] = {
        "RULE": RULE_CODES[rule], "GROUPS": triton.next_power_of_2(groups), "BLOCK_G": block_g,
        "BLOCK_T": max(2, triton.next_power_of_2(tiles)), **SELECT_OPTIONS,
    }  # fmt: skip
    in_select = B * L <= BOUND_ROWS
    if not in_select:
        decode_threshold_kernel[(B * L,)](
            best, statistics, mean_variance, start, lengths, low, counts, variance,
            L, S, K, groups, tiles, k_base, k_min, k_max, **bound,
        )  # fmt: skip
    decode_select_kernel[(B * L * shards,)](
        keys, best, statistics, mean_variance, start, lengths,
        low, counts, variance, entries, sizes, indices, arrived,
        L, S, K, H_kv, groups, tiles, k_base, k_min, k_max,
        BOUNDS=in_select, MEMBERS=members, SHARDS=shards, SEGMENT=segment, BLOCK=max(BLOCK_SELECT, members), **bound,
    )  # fmt: skip

    block_d, combined_g = max(16, triton.next_power_of_2(d_h)), triton.next_power_of_2(group)
    tile_k = block_k(block_d, q.dtype)
    splits = min(MAX_SPLITS, triton.next_power_of_2(triton.cdiv(K, tile_k)))
    gate = q if output_gate_logits is None else output_gate_logits
    wide = max(16, combined_g) * block_d > WIDE_TILE
    options = FLOAT32_ATTEND_OPTIONS if exact_float32 else WIDE_ATTEND_OPTIONS if wide else ATTEND_OPTIONS
    m = scratch(B, L, H_kv, splits, 2, group, dtype=torch.float32)
    acc = scratch(B, L, H_kv, splits, group, d_h, dtype=torch.float32)
    decode_attend_kernel[(B * L * splits * H_kv,)](
        q, k, v, indices, counts, gate, out, lse, m, acc, arrived,
        *q.stride(), *k.stride(), *v.stride(), *gate.stride(),
        L, K, H_kv, scale * LOG2_E,
        GROUP=group, d_h=d_h, BLOCK_G=max(16, triton.next_power_of_2(group)), BLOCK_D=block_d,
        BLOCK_K=tile_k, SPLITS=splits, COMBINED_G=combined_g,
        BLOCK_SPLITS=max(1, min(splits, COMBINED // (combined_g * block_d))),
        OUTPUT_GATE=output_gate_logits is not None, **options,
    )  # fmt: skip


@torch.library.custom_op("gsa_fast::decode_attention", mutates_args=())
def _decode_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    q_idx: Tensor,
    k_idx: Tensor,
    head_logits: Tensor,
    bias: Tensor,
    mean_variance: Tensor,
    start: Tensor,
    lengths: Tensor,
    output_gate_logits: Tensor | None,
    scale: float,
    indexer_scale: float,
    k_base: int,
    k_min: int,
    k_max: int,
    rule: str,
    approximate: bool,
    width: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    outputs = _empty_outputs(q, width)
    out, lse, variance, indices, counts = outputs
    if out.numel() == 0:
        return outputs
    if k.shape[1] == 0:
        return out.zero_(), lse.fill_(-torch.inf), variance.zero_(), indices.fill_(-1), counts.zero_()
    launch_decode(
        q, k, v, q_idx, k_idx, head_logits, bias, mean_variance, start, lengths, output_gate_logits,
        scale, indexer_scale, k_base, k_min, k_max, rule, approximate,
        out=out, lse=lse, variance=variance, indices=indices, counts=counts,
    )  # fmt: skip
    return outputs


def _empty_outputs(q: Tensor, width: int) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    rows, device = q.shape[:2], q.device
    return (
        torch.empty(q.shape, dtype=q.dtype, device=device),
        torch.empty(q.shape[:3], dtype=torch.float32, device=device),
        torch.empty(rows, dtype=torch.float32, device=device),
        torch.empty((*rows, width), dtype=torch.int32, device=device),
        torch.empty(rows, dtype=torch.int32, device=device),
    )


@_decode_attention.register_fake
def _(q: Tensor, *arguments: Any) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    return _empty_outputs(q, arguments[-1])


no_backward("decode_attention")


def decode_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    q_idx: Tensor,
    k_idx: Tensor,
    head_logits: Tensor,
    bias: Tensor,
    *,
    mean_variance: float | Tensor,
    config: GSAConfig,
    start: int | Tensor,
    lengths: Tensor | None = None,
    scale: float | None = None,
    output_gate_logits: Tensor | None = None,
    sigmoid_mode: str = "exact",
    impl: str = "auto",
    return_selection: bool = False,
) -> DecodeOutput:
    """`indexed_selection` and `sparse_attention` in one step, for at most MAX_QUERIES queries against a long cache.

    The keys may be whole buffers of a cache, of which `lengths` says how much counts: the launches depend on S, not on
    what `start` and `lengths` hold, so a CUDA graph of a call may be replayed while these change in place.

    Args:
        q: [B, L, H, d_h].
        k, v: [B, S, H_kv, d_h], the dtype of q; v gated (Eq. 9).
        q_idx, k_idx, head_logits, bias: as in `indexer_scores`.
        mean_variance: V̄; 0 means unset.
        config: gives the indexer's scale, the budget's sizes and its rule.
        start: position of query 0, an int or int32 [B].
        lengths: number of valid keys, int32 [B]; default S. Queries at or past it are padding.
        scale: of the attention's logits, default 1/√d_h.
        output_gate_logits: [B, L, H, d_h].
        sigmoid_mode: as in `indexed_selection`.
        impl: "auto", "triton" or "reference", as in `indexer_scores`.
        return_selection: return S_t too, ascending, with K = min(k_max, S) slots; the kernels keep another order.

    Returns:
        A `DecodeOutput`. A row that sees no key, or is padding, is 0 with lse −inf and selects nothing.

    Raises:
        TypeError, ValueError: as `indexed_selection` and `sparse_attention`.
        NotImplementedError: more than MAX_QUERIES queries, float64 with the kernels, or a backward pass through them.
    """
    check_decode_arguments(
        q, k, v, q_idx, k_idx, head_logits, bias,
        start=start, lengths=lengths, scale=scale, output_gate_logits=output_gate_logits,
    )  # fmt: skip
    check_selection_config(config, mean_variance, q_idx)
    check_choice("sigmoid_mode", sigmoid_mode, SIGMOID_MODES)
    check_bool("return_selection", return_selection)
    (B, L, _, d_h), S = q.shape, k.shape[1]
    floats = {"q": q, "k": k, "v": v, "q_idx": q_idx, "k_idx": k_idx, "head_logits": head_logits, "bias": bias}
    if not use_triton(impl, **floats, output_gate_logits=output_gate_logits):
        selection, variance = gsa_ref.indexed_selection(
            q_idx, k_idx, head_logits, bias,
            mean_variance=mean_variance, config=config, start=start, lengths=lengths,
        )  # fmt: skip
        out, lse = gsa_ref.sparse_attention(
            q, k, v, selection, scale=scale, start=start, output_gate_logits=output_gate_logits
        )
        return DecodeOutput(out, lse, variance, selection if return_selection else None)
    if L > MAX_QUERIES:
        raise NotImplementedError(
            f"q: expected at most {MAX_QUERIES} queries per sequence, got {L}; use indexed_selection and "
            f"sparse_attention for more"
        )
    out, lse, variance, indices, counts = _decode_attention(
        q, k, v, q_idx, k_idx, head_logits, bias,
        as_scalar(mean_variance, q.device),
        per_sequence(start, 0, B, q.device),
        per_sequence(lengths, S, B, q.device),
        output_gate_logits,
        d_h**-0.5 if scale is None else float(scale),
        config.effective_indexer_scale,
        config.k_base, config.k_min, config.k_max, config.rule,
        sigmoid_mode == "approximate",
        max(min(config.k_max, S), 1),
    )  # fmt: skip
    if not return_selection:
        return DecodeOutput(out, lse, variance, None)
    ascending = indices.masked_fill(indices < 0, S).sort(-1)[0]
    return DecodeOutput(out, lse, variance, Selection(ascending.masked_fill(ascending == S, -1), counts))
