"""Streamed selection: the scores of a row are computed once, and only a shortlist of them is ever stored.

1. `threshold`: a sample of the keys gives each row a threshold that its κ best scores almost surely reach.
2. `shortlist`: one pass over all keys takes the statistics of Eq. 8 and writes the scores at or above the threshold.
3. `pick`: a program per row takes k_t from the statistics, and the exact top k_t of the shortlist.
4. A row whose shortlist was too short, too long or met a NaN is computed again from all of its scores.

Whether 3 succeeded is known exactly, so the result never depends on luck; only the time does.
"""

import math
from dataclasses import dataclass
from typing import Any

import torch
import triton
from torch import Tensor

from gsa_fast.budget import RULE_CODES
from gsa_fast.selection.pick import redo_kernel, select_kernel, select_large_kernel
from gsa_fast.selection.rows import row_block
from gsa_fast.selection.shortlist import shortlist_kernel
from gsa_fast.selection.threshold import sample_positions, sample_scores_kernel, threshold_kernel

# Memory of the shortlists of one chunk of rows, and of the samples of as many of them as fit.
CHUNK_BYTES = 1536 * 2**20
SAMPLE_BYTES = 256 * 2**20
# Candidates that a program of `select_kernel` holds in registers, and of `select_large_kernel`: the second pays if few
# rows need it, the third is for many keys, when the samples are far between.
CAPACITY, LARGE_CAPACITY, LARGEST_CAPACITY = 4096, 8192, 16384
MAX_STRIDE, MAX_SAMPLES = 64, 16384
SPAN = 4096  # keys that share statistics
BLOCK_L, BLOCK_S = 64, 32
# Keys that `redo_kernel` scores at a time: at most so many, and so many bytes of them; shared memory holds two tiles.
REDO_BLOCK_S, REDO_TILE_BYTES = 128, 2**15
# A program of `shortlist_kernel` holds the query tiles of all indexer heads.
MAX_HEADS, MAX_CHANNELS = 8, 512
MIN_PROGRAMS = 512  # splits of the rows of a short input, until there are as many
Z = 4.5  # standard deviations that a shortlist leaves for the luck of its sample: fails in 3 of a million rows

# Three programs of 128 threads with 168 registers fit a multiprocessor, if their query tiles do. Measured on an H200.
SHORTLIST_OPTIONS = {"num_warps": 4, "num_stages": 3, "maxnreg": 168}
CHANNELS_OF_THREE = 256
WIDE_SHORTLIST_OPTIONS = {"num_warps": 4, "num_stages": 3}
SAMPLE_OPTIONS = {"num_warps": 4, "num_stages": 3}
SELECT_OPTIONS = {"num_warps": 4, "maxnreg": 168}
LARGE_OPTIONS = {"num_warps": 8, "maxnreg": 168}
FLOAT32_OPTIONS = {"num_warps": 8, "num_stages": 1}
SAMPLE_TILES = 16  # per program


@dataclass(frozen=True)
class Plan:
    """How shortlists are made, from the shape alone.

    Attributes:
        stride: one key of so many is sampled; 1 if every row is shortlisted whole.
        capacity: how many candidates a row may have.
    """

    stride: int
    capacity: int


def shortlist_plan(S: int, K: int, k_base: int, H_I: int, d_I: int) -> Plan | None:
    """The coarsest sampling whose shortlists almost surely fit, or None if there is none."""
    if H_I > MAX_HEADS or H_I * d_I > MAX_CHANNELS:
        return None
    if S <= CAPACITY:
        return Plan(1, CAPACITY)
    for common, capacity in (
        (CAPACITY, LARGE_CAPACITY), (LARGE_CAPACITY, LARGE_CAPACITY), (LARGEST_CAPACITY, LARGEST_CAPACITY)
    ):  # fmt: skip
        stride = MAX_STRIDE
        while stride > 1 and triton.cdiv(S, stride) <= MAX_SAMPLES:
            if shortlist_size(k_base, stride) <= common and shortlist_size(K, stride) <= capacity - BLOCK_S:
                return Plan(stride, capacity)
            stride //= 2
    return None


def shortlist_size(k: int, stride: int) -> float:
    """The size that the shortlist of a row with budget k almost surely stays below."""
    expected = k / stride
    r = 33 / 32 * (expected + Z * Z / 2 + Z * math.sqrt(1.1 * expected + Z * Z / 4))
    return stride * (r + Z / 2 * math.sqrt(r))


def keys_in_order(dtype: torch.dtype) -> bool:
    """Whether the columns of a tile of scores are the keys in their order: see `shortlist.RUNS`."""
    return dtype == torch.float32


def rows_per_chunk(L: int, affordable: int, block_l: int) -> int:
    """At most `affordable` rows, but one; whole tiles if there is more than one chunk and room for a tile."""
    rows = max(1, min(L, affordable))
    return rows if rows == L or rows < block_l else rows // block_l * block_l


def launch_streamed_selection(
    q_idx: Tensor,
    k_idx: Tensor,
    head_logits: Tensor,
    bias: Tensor,
    mean_variance: Tensor,
    start: Tensor,
    lengths: Tensor,
    scale: float,
    k_base: int,
    k_min: int,
    k_max: int,
    rule: str,
    end: int,
    approximate: bool,
    plan: Plan,
    *,
    indices: Tensor,
    counts: Tensor,
    variance: Tensor,
) -> Tensor:
    """Fill `indices` [B, L, K], `counts` and `variance` [B, L] (contiguous). Arguments as in `indexed_selection`.

    Args:
        end: the last query's position lies below it.
        approximate: whether σ may have the error of `tanh.approx`.

    Returns:
        int32 [1], how many rows had to be computed again.
    """
    (B, L, H_I, d_I), S, K = q_idx.shape, k_idx.shape[1], indices.shape[-1]
    device, exact_float32 = q_idx.device, q_idx.dtype == torch.float32
    # An exact float32 dot needs more registers.
    block_l = min(BLOCK_L, 32 if d_I <= 64 else 16) if exact_float32 else BLOCK_L
    narrow = H_I * d_I <= CHANNELS_OF_THREE
    options = FLOAT32_OPTIONS if exact_float32 else SHORTLIST_OPTIONS if narrow else WIDE_SHORTLIST_OPTIONS
    widths = {"H_I": H_I, "d_I": d_I, "BLOCK_D": max(16, triton.next_power_of_2(d_I)), "BLOCK_S": BLOCK_S}
    budget = k_base, k_min, k_max

    # Two splits of a row share a segment. The statistics do not depend on the splits, only on the spans.
    spans = triton.cdiv(S, SPAN)
    splits = min(spans, max(2, triton.cdiv(MIN_PROGRAMS, B * triton.cdiv(L, block_l))))
    segments = triton.cdiv(splits, 2)
    segment = min(plan.capacity, triton.cdiv(min(S, 2 * triton.cdiv(spans, splits) * SPAN), BLOCK_S) * BLOCK_S)
    rows = rows_per_chunk(L, CHUNK_BYTES // (8 * B * segments * segment), block_l)
    chunks = triton.cdiv(L, rows)
    entries = torch.empty(B * rows * segments * segment, dtype=torch.int64, device=device)
    sizes = torch.empty(B * rows * splits, dtype=torch.int32, device=device)
    statistics = torch.empty(B * rows * 3 * spans, dtype=torch.float32, device=device)
    threshold = torch.full((B * rows,), -1.0, dtype=torch.float32, device=device)
    tie = torch.full((B * rows,), S, dtype=torch.int32, device=device)
    # Lists of rows, and how long they are: large shortlists for each chunk, failed rows for all.
    large = torch.empty(B * rows, dtype=torch.int32, device=device)
    failed = torch.empty(B * L, dtype=torch.int32, device=device)
    list_sizes = torch.zeros(chunks + 1, dtype=torch.int32, device=device)
    n_failed = list_sizes[chunks:]
    if plan.stride > 1:
        positions = sample_positions(S, plan.stride, device)
        k_sample = k_idx.index_select(1, positions)

    for i, first_row in enumerate(range(0, L, rows)):
        chunk = slice(first_row, min(first_row + rows, L))
        n_rows = chunk.stop - first_row
        q, w = q_idx[:, chunk], head_logits[:, chunk]
        if plan.stride > 1:
            launch_thresholds(
                q, k_sample, positions, w, bias, mean_variance, start, lengths, scale, budget, rule, S,
                end - L + first_row, first_row, approximate, plan.stride, widths | {"BLOCK_L": block_l}, K,
                threshold, tie,
            )  # fmt: skip
        shortlist_kernel[(triton.cdiv(n_rows, block_l) * splits * B,)](
            q, k_idx, w, bias, start, lengths, threshold, tie, entries, sizes, statistics,
            *q.stride(), *k_idx.stride(), *w.stride(), *bias.stride(),
            n_rows, first_row, S, splits, segment, spans, scale,
            **widths, BLOCK_L=block_l, SPAN=SPAN, IN_ORDER=keys_in_order(q_idx.dtype), APPROXIMATE=approximate,
            **options,
        )  # fmt: skip
        select_kernel[(B * n_rows,)](
            entries, sizes, statistics, mean_variance, start, lengths,
            indices, counts, variance, large, list_sizes[i:], failed, n_failed,
            n_rows, first_row, L, S, K, splits, segment, spans, *budget,
            RULE=RULE_CODES[rule], SPAN=SPAN, CAPACITY=CAPACITY, LARGE_CAPACITY=plan.capacity,
            BLOCK_T=max(2, triton.next_power_of_2(spans)), BLOCK_K=1024, **SELECT_OPTIONS,
        )  # fmt: skip
        if plan.capacity > CAPACITY:
            select_large_kernel[(min(B * n_rows, 528),)](
                entries, sizes, indices, counts, large, list_sizes[i:],
                n_rows, first_row, L, K, splits, segment, CAPACITY=plan.capacity, BLOCK_K=1024, **LARGE_OPTIONS,
            )  # fmt: skip

    # As many rows at once as the shortlists' memory has room for, now that it is free.
    redo_block_s = min(REDO_BLOCK_S, REDO_TILE_BYTES // (widths["BLOCK_D"] * k_idx.element_size()))
    scratch = entries.view(torch.float32) if 2 * len(entries) >= S else torch.empty(S, device=device)
    redo_kernel[(min(264, B * L, len(scratch) // S),)](
        q_idx, k_idx, head_logits, bias, mean_variance, start, lengths,
        scratch, indices, counts, variance, failed, n_failed,
        *q_idx.stride(), *k_idx.stride(), *head_logits.stride(), *bias.stride(),
        L, S, K, scale, *budget,
        RULE=RULE_CODES[rule], **widths | {"BLOCK_S": redo_block_s}, BLOCK_H=max(16, triton.next_power_of_2(H_I)),
        BLOCK_ROW=row_block(S), num_warps=8,
    )  # fmt: skip
    return n_failed


def launch_thresholds(
    q: Tensor,
    k_sample: Tensor,
    positions: Tensor,
    head_logits: Tensor,
    bias: Tensor,
    mean_variance: Tensor,
    start: Tensor,
    lengths: Tensor,
    scale: float,
    budget: tuple[int, int, int],
    rule: str,
    S: int,
    end: int,
    first_row: int,
    approximate: bool,
    stride: int,
    widths: dict[str, Any],
    K: int,
    threshold: Tensor,
    tie: Tensor,
) -> None:
    """Fill `threshold` and `tie` [B, n_rows] for the rows q of a chunk; row i lies below position end + i + 1.

    k_sample [B, samples, d_I] holds the keys at `positions` [samples], one of every `stride` of the S keys.
    """
    B, n_rows = q.shape[:2]
    rows = rows_per_chunk(n_rows, SAMPLE_BYTES // (4 * B * len(positions)), widths["BLOCK_L"])
    samples = torch.empty(B * rows * len(positions), dtype=torch.float32, device=q.device)
    for first in range(0, n_rows, rows):
        part = slice(first, min(first + rows, n_rows))
        q_part, w_part = q[:, part], head_logits[:, part]
        rows_now = part.stop - first
        n_samples = triton.cdiv(min(S, end + part.stop), stride)  # no query of this part sees more of them
        programs = triton.cdiv(rows_now, widths["BLOCK_L"]) * triton.cdiv(n_samples, SAMPLE_TILES * BLOCK_S) * B
        sample_scores_kernel[(programs,)](
            q_part, k_sample, w_part, bias, samples,
            *q_part.stride(), *k_sample.stride(), *w_part.stride(), *bias.stride(),
            rows_now, n_samples, scale,
            **widths, TILES=SAMPLE_TILES, APPROXIMATE=approximate,
            **FLOAT32_OPTIONS if q.dtype == torch.float32 else SAMPLE_OPTIONS,
        )  # fmt: skip
        block = max(16, triton.next_power_of_2(n_samples))
        threshold_kernel[(B * rows_now,)](
            samples, positions, mean_variance, start, lengths, threshold, tie,
            rows_now, first_row + first, first, n_rows, S, n_samples, *budget, K, stride, Z,
            RULE=RULE_CODES[rule], CAPACITY=CAPACITY, BLOCK=block, num_warps=max(1, min(4, block // 512)),
        )  # fmt: skip
