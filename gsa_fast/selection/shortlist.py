"""One pass over all keys: the statistics of Eq. 8, and the scores at or above a row's threshold, its shortlist."""

import triton
import triton.language as tl

from gsa_fast._primitives import count_visible, fast_divide, popcount, popcount_below, store_entry_where
from gsa_fast.selection.scores import LOG2_E, load_queries, score_tile

MASKED = tl.constexpr(-2.0)  # below every score, and below the threshold −1 of a row that is shortlisted whole


@triton.jit
def append_candidates(p_entry, step, scores, candidate, first, BLOCK_S: tl.constexpr):
    """Store (score, position) of each row's candidates at p_entry, p_entry + step, … ; how many they are.

    In the order of their positions: a bit mask of the row's tile, and the population count of the bits before each.
    """
    col = tl.arange(0, BLOCK_S)
    shape = tl.zeros_like(candidate.to(tl.int32))
    bit = tl.full([BLOCK_S], 1, tl.int32) << (col & 31)
    word = tl.sum(tl.where(candidate & (col < 32)[None, :], bit[None, :], 0), axis=1)
    n = popcount(word)
    if BLOCK_S <= 32:
        rank = popcount_below(word[:, None] + shape, col[None, :] + shape)
    else:
        high_word = tl.sum(tl.where(candidate & (col >= 32)[None, :], bit[None, :], 0), axis=1)
        rank = popcount_below(
            tl.where((col < 32)[None, :], word[:, None], high_word[:, None]), (col & 31)[None, :] + shape
        )
        rank = tl.where((col < 32)[None, :], rank, rank + n[:, None])
        n += popcount(high_word)
    store_entry_where(p_entry[:, None], step, rank, scores, (first + col)[None, :], candidate)
    return n


@triton.jit
def shortlist_kernel(
    q_ptr, k_ptr, weight_ptr, bias_ptr, start_ptr, lengths_ptr, threshold_ptr, tie_ptr,
    entries_ptr, sizes_ptr, statistics_ptr,
    stride_qb, stride_ql, stride_qh, stride_qd, stride_kb, stride_ks, stride_kd,
    stride_wb, stride_wl, stride_wh, stride_bias,
    rows, first_row, S, splits, segment, spans, scale,
    H_I: tl.constexpr, d_I: tl.constexpr, BLOCK_L: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_D: tl.constexpr,
    SPAN: tl.constexpr, APPROXIMATE: tl.constexpr,
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
    step = 1 - 2 * (split % 2)
    p_entry = entries_ptr + (chunk_row * ((splits + 1) // 2) + split // 2) * segment + (split % 2) * (segment - 1)
    written = tl.zeros([BLOCK_L], tl.int32)
    cut = inside & False
    used_spans = tl.cdiv(last_key, SPAN)
    first_span = used_spans * split // splits
    for span in range(first_span, used_spans * (split + 1) // splits):
        first_key = span * SPAN
        n_span = tl.minimum(tl.maximum(n_visible - first_key, 0), SPAN).to(tl.float32)
        mean = tl.zeros([BLOCK_L], tl.float32)
        m2 = tl.zeros([BLOCK_L], tl.float32)
        s = first_key + tl.arange(0, BLOCK_S)  # [BLOCK_S]
        p_tile = p_k + s.to(tl.int64)[:, None] * stride_ks
        for first in range(first_key, tl.minimum(last_key, first_key + SPAN), BLOCK_S):
            b_k = tl.load(p_tile, mask=(s < S)[:, None] & (c < d_I)[None, :], other=0.0)  # [BLOCK_S, BLOCK_D]
            scores = score_tile(b_q, weight, bias, b_k, -scale * LOG2_E, H_I, APPROXIMATE)  # [BLOCK_L, BLOCK_S]
            if first + BLOCK_S > full:
                scores = tl.where(s[None, :] < n_visible[:, None], scores, MASKED)
            if first == first_key:
                # Any score of the row will do; the largest makes equal scores deviate by exactly 0.
                mean = tl.maximum(tl.max(scores, axis=1), 0.0)
            # Deviations from the running mean do not cancel, unlike Σx and Σx²; one pass, unlike those from the tile's.
            deviation = scores - mean[:, None]
            if first + BLOCK_S > full:
                deviation = tl.where(scores == MASKED, 0.0, deviation)
            total = tl.sum(deviation, axis=1)
            n = tl.minimum(n_span, first - first_key + BLOCK_S)
            shift = fast_divide(total, tl.maximum(n, 1.0))
            mean += shift
            m2 += tl.sum(deviation * deviation, axis=1) - total * shift
            # Past `tie`, an equal score is no candidate: the next larger number is the threshold.
            next_larger = (threshold.to(tl.int32, bitcast=True) + 1).to(tl.float32, bitcast=True)
            reach = tl.where(first <= tie, threshold, next_larger)
            cut = cut | (written > segment - BLOCK_S)
            reach = tl.where(cut, float("inf"), reach)
            n_new = append_candidates(p_entry, step, scores, scores >= reach[:, None], first, BLOCK_S)
            p_entry += step * n_new
            written += n_new
            p_tile += tl.cast(stride_ks, tl.int64) * BLOCK_S
            s += BLOCK_S
        p_statistics = statistics_ptr + chunk_row * 3 * spans  # [BLOCK_L]
        tl.store(p_statistics + span, n_span, mask=inside)
        tl.store(p_statistics + spans + span, mean, mask=inside)
        tl.store(p_statistics + 2 * spans + span, m2, mask=inside)
    # A segment that was cut may lack candidates: a size above any capacity says so.
    tl.store(sizes_ptr + chunk_row * splits + split, tl.where(cut, 1 << 30, written), mask=inside)
