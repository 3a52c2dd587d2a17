"""One pass over all keys: the statistics of Eq. 8, and the scores at or above a row's threshold, its shortlist."""

import triton
import triton.language as tl

from gsa_fast._primitives import append_entry, count_if, count_visible
from gsa_fast.selection.scores import LOG2_E, load_queries, score_tile

MASKED = tl.constexpr(-2.0)  # below every score, and below the threshold −1 of a row that is shortlisted whole


# A row of a product of the matrix units is spread over four threads; thread q holds columns 2q, 2q + 1, 8 + 2q,
# 8 + 2q + 1, … Keys are loaded in an order that makes these columns neighbouring keys: what a thread keeps apart (sums,
# counts) then is about a run of keys, and costs no exchange. Float32 products come from no matrix unit: neighbouring
# threads hold neighbouring columns, and keys stay in their order. In any other, threads that share a run would lie
# apart, and Triton, 3.7 included, would reduce over the wrong ones (`torn_reductions` in verification.compile).
RUNS = tl.constexpr(4)


@triton.jit
def key_of_column(BLOCK_S: tl.constexpr, IN_ORDER: tl.constexpr):
    """The key, counted from the tile's first, whose scores are column c of a tile: [BLOCK_S]."""
    c = tl.arange(0, BLOCK_S)
    if IN_ORDER:
        return c
    else:
        return (c % 8 // 2) * (BLOCK_S // RUNS) + c // 8 * 2 + c % 2


@triton.jit
def runs_of_keys(x, IN_ORDER: tl.constexpr):
    """A tile [BLOCK_L, BLOCK_S] with columns as in `key_of_column`, by runs of neighbouring keys: [BLOCK_L, 4, run]."""
    if IN_ORDER:
        return tl.reshape(x, [x.shape[0], RUNS, x.shape[1] // RUNS])
    else:
        x = tl.reshape(x, [x.shape[0], x.shape[1] // 8, RUNS, 2])
        return tl.reshape(tl.permute(x, [0, 2, 1, 3]), [x.shape[0], RUNS, x.shape[1] * 2])


@triton.jit
def sums_of_runs(x, IN_ORDER: tl.constexpr):
    """What a thread adds up by itself: each run of a tile, [BLOCK_L, 4], or with keys in their order nothing yet.

    A sum of squares over threads, taken at once, would differ between them: each squares its own part unrounded (FMA).
    """
    if IN_ORDER:
        return x
    else:
        return tl.sum(x, axis=2)


@triton.jit
def keys_of_runs(x):
    """The keys of every run, in their order: a tuple of [BLOCK_L, 4]."""
    parts = (x,)
    for _ in tl.static_range(2 if x.shape[2] == 4 else 3 if x.shape[2] == 8 else 4):  # log₂
        halves = ()
        for i in tl.static_range(len(parts)):
            part = tl.reshape(parts[i], [x.shape[0], RUNS, 2, parts[i].shape[2] // 2])
            low, high = tl.split(tl.permute(part, [0, 1, 3, 2]))  # [BLOCK_L, 4, half a run]
            if low.shape[2] == 1:
                low, high = tl.reshape(low, [x.shape[0], RUNS]), tl.reshape(high, [x.shape[0], RUNS])
            halves += (low, high)  # type: ignore[assignment]
        parts = halves  # type: ignore[assignment]
    return parts


@triton.jit
def append_candidates(p_entry, step, scores, reach, first):
    """Store (score, position) of each row's scores ≥ reach at p_entry, p_entry + step, … ; how many they are.

    In the order of their positions. Scores by runs of keys, [BLOCK_L, 4, run]; `first` is the first key's position.
    """
    run = tl.arange(0, RUNS)
    part = keys_of_runs(scores)
    count = tl.zeros([scores.shape[0], RUNS], tl.int32)
    for i in tl.static_range(scores.shape[2]):
        count = count_if(count, part[i], reach[:, None])
    # Up to 16 each, so four counts fit a word, and so do those of this run and the runs before it.
    counts = tl.sum(count << (8 * run)[None, :], axis=1)
    up_to = counts + (counts << 8)
    up_to += up_to << 16
    rank = ((up_to[:, None] >> (8 * run)[None, :]) & 255) - count
    pointer = p_entry[:, None] + step * rank
    position = first + run * scores.shape[2]
    for i in tl.static_range(scores.shape[2]):
        pointer = append_entry(pointer, step, part[i], reach[:, None], (position + i)[None, :])
    return up_to >> 24


@triton.jit
def shortlist_kernel(
    q_ptr, k_ptr, weight_ptr, bias_ptr, start_ptr, lengths_ptr, threshold_ptr, tie_ptr,
    entries_ptr, sizes_ptr, statistics_ptr,
    stride_qb, stride_ql, stride_qh, stride_qd, stride_kb, stride_ks, stride_kd,
    stride_wb, stride_wl, stride_wh, stride_bias,
    rows, first_row, S, splits, segment, spans, scale,
    H_I: tl.constexpr, d_I: tl.constexpr, BLOCK_L: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_D: tl.constexpr,
    SPAN: tl.constexpr, IN_ORDER: tl.constexpr, APPROXIMATE: tl.constexpr,
):  # fmt: skip
    """Shortlist of BLOCK_L queries over one split of the keys, and their statistics over each SPAN of keys.

    Two splits of a row share a segment, a number of entries, which one fills from its start and the other from its end:
    their sizes tell afterwards whether they met. A split takes no more once another tile might not fit.
    """
    row_tiles = tl.cdiv(rows, BLOCK_L)
    pid = tl.program_id(0)
    tile_l = row_tiles - 1 - pid % row_tiles  # late queries see the most keys: first come, longest work
    split = (pid // row_tiles) % splits
    b = (pid // row_tiles // splits).to(tl.int64)
    row = tile_l * BLOCK_L + tl.arange(0, BLOCK_L)  # [BLOCK_L] rows of the chunk
    inside = row < rows
    chunk_row = (b * rows + row).to(tl.int64)
    n_visible = count_visible(tl.load(start_ptr + b) + first_row + row, tl.load(lengths_ptr + b), S)
    n_visible = tl.where(inside, n_visible, 0)
    last_key = tl.max(n_visible, axis=0)
    full = tl.min(tl.where(inside, n_visible, S), axis=0)  # keys below this every query of the tile sees

    b_q, weight, bias = load_queries(
        q_ptr + b * stride_qb, weight_ptr + b * stride_wb, bias_ptr, stride_ql, stride_qh, stride_qd,
        stride_wl, stride_wh, stride_bias, row, inside, H_I, d_I, BLOCK_D,
    )  # fmt: skip
    threshold = tl.load(threshold_ptr + chunk_row, mask=inside, other=float("inf"))
    tie = tl.load(tie_ptr + chunk_row, mask=inside, other=0)
    c = tl.arange(0, BLOCK_D).to(tl.int64)
    p_k = k_ptr + b * stride_kb + c[None, :] * stride_kd
    column = key_of_column(BLOCK_S, IN_ORDER)
    step = 1 - 2 * (split % 2)
    p_entry = entries_ptr + (chunk_row * ((splits + 1) // 2) + split // 2) * segment + (split % 2) * (segment - 1)
    written = tl.zeros([BLOCK_L], tl.int32)
    cut = inside & False
    used_spans = tl.cdiv(last_key, SPAN)
    first_span = used_spans * split // splits
    for span in range(first_span, used_spans * (split + 1) // splits):
        first_key = span * SPAN
        n_span = tl.minimum(tl.maximum(n_visible - first_key, 0), SPAN).to(tl.float32)
        shift = tl.zeros([BLOCK_L], tl.float32)
        total = sums_of_runs(tl.zeros([BLOCK_L, RUNS, BLOCK_S // RUNS], tl.float32), IN_ORDER)
        squares = sums_of_runs(tl.zeros([BLOCK_L, RUNS, BLOCK_S // RUNS], tl.float32), IN_ORDER)
        p_tile = p_k + (first_key + column).to(tl.int64)[:, None] * stride_ks
        for first in range(first_key, tl.minimum(last_key, first_key + SPAN), BLOCK_S):
            s = first + column  # [BLOCK_S]
            b_k = tl.load(p_tile, mask=(s < S)[:, None] & (c < d_I)[None, :], other=0.0)  # [BLOCK_S, BLOCK_D]
            scores = score_tile(b_q, weight, bias, b_k, -scale * LOG2_E, H_I, APPROXIMATE)  # [BLOCK_L, BLOCK_S]
            if first + BLOCK_S > full:
                scores = tl.where(s[None, :] < n_visible[:, None], scores, MASKED)
            by_run = runs_of_keys(scores, IN_ORDER)  # [BLOCK_L, 4, BLOCK_S / 4]
            if first == first_key:
                # Σ and Σ² of deviations do not cancel if they are from a score that is no outlier; and equal scores
                # deviate from one of their own by exactly 0.
                highest = tl.max(by_run, axis=2)
                lowest = tl.min(tl.where(highest < 0.0, float("inf"), highest), axis=1)
                shift = tl.where(lowest < float("inf"), lowest, 0.0)
            deviation = by_run - shift[:, None, None]
            if first + BLOCK_S > full:
                deviation = tl.where(by_run == MASKED, 0.0, deviation)
            total += sums_of_runs(deviation, IN_ORDER)
            squares += sums_of_runs(deviation * deviation, IN_ORDER)
            # Past `tie`, an equal score is no candidate: the next larger number is the threshold.
            next_larger = (threshold.to(tl.int32, bitcast=True) + 1).to(tl.float32, bitcast=True)
            reach = tl.where(first <= tie, threshold, next_larger)
            cut = cut | (written > segment - BLOCK_S)
            reach = tl.where(cut, float("inf"), reach)
            n_new = append_candidates(p_entry, step, by_run, reach, first)
            p_entry += step * n_new
            written += n_new
            p_tile += tl.cast(stride_ks, tl.int64) * BLOCK_S
        p_statistics = statistics_ptr + chunk_row * 3 * spans  # [BLOCK_L]
        if IN_ORDER:
            total, squares = tl.sum(total, axis=2), tl.sum(squares, axis=2)
        row_total = tl.sum(total, axis=1)
        mean_deviation = row_total / tl.maximum(n_span, 1.0)
        m2 = tl.maximum(tl.sum(squares, axis=1) - row_total * mean_deviation, 0.0, propagate_nan=tl.PropagateNan.ALL)
        tl.store(p_statistics + span, n_span, mask=inside)
        tl.store(p_statistics + spans + span, shift + mean_deviation, mask=inside)
        tl.store(p_statistics + 2 * spans + span, m2, mask=inside)
    # A segment that was cut may lack candidates: a size above any capacity says so.
    tl.store(sizes_ptr + chunk_row * splits + split, tl.where(cut, 1 << 30, written), mask=inside)
