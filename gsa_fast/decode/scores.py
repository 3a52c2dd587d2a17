"""Indexer scores of a few queries for all keys of the cache, with what the selection needs to look at few of them.

Keys form groups of MEMBERS, as far apart as possible: group i holds the positions i, i + groups, i + 2·groups, …. Of
the groups' best scores the κ-th is at or below the κ-th best of all scores; and rarely far below, because neighbouring
keys, which resemble one another, are never in one group.
"""

import triton
import triton.language as tl

from gsa_fast._primitives import count_visible, fast_divide, stable_sigmoid, tanh_approximate
from gsa_fast.selection.scores import HALF_LN_2, LOG2_E, exp2_of_minus_z

NAN_KEY = tl.constexpr(-1)  # NaN ranks last: below every score, whose bits are an int32 ≥ 0
MASKED_KEY = tl.constexpr(-2)  # no candidate


@triton.jit
def score_key(x):
    """int32 in the order of the scores, which are ≥ 0: their bits; NaN below them all."""
    return tl.where(x == x, x.to(tl.int32, bitcast=True), NAN_KEY)


@triton.jit
def decode_scores_kernel(
    q_ptr, k_ptr, weight_ptr, bias_ptr, start_ptr, lengths_ptr, keys_ptr, best_ptr, statistics_ptr, arrived_ptr,
    stride_qb, stride_ql, stride_qh, stride_qd, stride_kb, stride_ks, stride_kd,
    stride_wb, stride_wl, stride_wh, stride_bias,
    L, S, groups, tiles, counters, scale,
    H_I: tl.constexpr, d_I: tl.constexpr, MEMBERS: tl.constexpr,
    BLOCK_L: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_G: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr, APPROXIMATE: tl.constexpr,
):  # fmt: skip
    """Eq. 7 of all L queries for BLOCK_G groups of keys; the best score of each group; (n, mean, M2) of the program.

    The tile has keys as rows and pairs of a query and an indexer head as columns: few columns are padding then.
    The first program of a sequence sets to 0 what programs of the other kernels count: those that have arrived.
    """
    pid = tl.program_id(0)
    tile = pid % tiles
    b = (pid // tiles).to(tl.int64)
    if tile == 0:
        counter = tl.arange(0, BLOCK_C)
        tl.store(arrived_ptr + b * counters + counter, tl.zeros([BLOCK_C], tl.int32), mask=counter < counters)
    t = tl.arange(0, BLOCK_L)  # [BLOCK_L] queries
    n_visible = count_visible(tl.load(start_ptr + b) + t, tl.load(lengths_ptr + b), S)
    n_visible = tl.where(t < L, n_visible, 0)
    last_key = tl.max(n_visible, axis=0)
    first_group = tile * BLOCK_G
    if first_group < last_key:  # else no query sees any of these keys
        col = tl.arange(0, BLOCK_L * BLOCK_H)
        col_t = (col // BLOCK_H).to(tl.int64)
        col_j = (col % BLOCK_H).to(tl.int64)
        real = (col_t < L) & (col_j < H_I)
        c = tl.arange(0, BLOCK_D).to(tl.int64)
        b_q = tl.load(
            q_ptr + b * stride_qb + (col_t * stride_ql + col_j * stride_qh)[None, :] + c[:, None] * stride_qd,
            mask=real[None, :] & (c < d_I)[:, None],
            other=0.0,
        )  # [BLOCK_D, BLOCK_L · BLOCK_H]
        weight = tl.load(
            weight_ptr + b * stride_wb + col_t * stride_wl + col_j * stride_wh, mask=real, other=0.0
        )  # [BLOCK_L · BLOCK_H]
        weight = stable_sigmoid(weight.to(tl.float32))
        bias = tl.load(bias_ptr + col_j * stride_bias, mask=real, other=0.0).to(tl.float32) * -LOG2_E

        r = tl.arange(0, BLOCK_G * BLOCK_M)
        group = first_group + r // BLOCK_M  # [BLOCK_G · BLOCK_M]
        p_k = k_ptr + b * stride_kb + c[None, :] * stride_kd
        row = b * L + t.to(tl.int64)  # [BLOCK_L]
        p_keys = keys_ptr + row * (groups.to(tl.int64) * MEMBERS)
        n = tl.zeros([BLOCK_G * BLOCK_M, BLOCK_L], tl.float32)
        mean = tl.zeros([BLOCK_G * BLOCK_M, BLOCK_L], tl.float32)
        m2 = tl.zeros([BLOCK_G * BLOCK_M, BLOCK_L], tl.float32)
        best = tl.full([BLOCK_G, BLOCK_L], MASKED_KEY, tl.int32)
        for first_member in range(0, tl.cdiv(last_key - first_group, groups), BLOCK_M):
            member = first_member + r % BLOCK_M
            s = member * groups + group  # [BLOCK_G · BLOCK_M]
            b_k = tl.load(
                p_k + s.to(tl.int64)[:, None] * stride_ks,
                mask=(s < last_key)[:, None] & (c < d_I)[None, :],
                other=0.0,
            )  # [BLOCK_G · BLOCK_M, BLOCK_D]
            if APPROXIMATE:
                half_z = (-scale * LOG2_E * HALF_LN_2) * tl.dot(b_k, b_q, input_precision="ieee")
                half_z += (bias * HALF_LN_2)[None, :]
                term = (0.5 * weight)[None, :] + (0.5 * weight)[None, :] * tanh_approximate(half_z)
                term = tl.maximum(term, 0.0, propagate_nan=tl.PropagateNan.ALL)  # rounding may go below
            else:
                denominator = 1.0 + exp2_of_minus_z(b_k, b_q, -scale * LOG2_E, bias[None, :])
                term = fast_divide(tl.broadcast_to(weight[None, :], denominator.shape), denominator)
            # A padded column is 0 · k, which is NaN where k is not finite.
            term = tl.where(real[None, :], term, 0.0)
            x = tl.sum(tl.reshape(term, [BLOCK_G * BLOCK_M, BLOCK_L, BLOCK_H]), axis=2)  # [BLOCK_G · BLOCK_M, BLOCK_L]

            visible = s[:, None] < n_visible[None, :]
            key = tl.where(visible, score_key(x), MASKED_KEY)
            tl.store(
                p_keys[None, :] + (group.to(tl.int64) * MEMBERS + member)[:, None],
                key,
                mask=(s < last_key)[:, None] & (t < L)[None, :],
            )
            best = tl.maximum(best, tl.max(tl.reshape(key, [BLOCK_G, BLOCK_M, BLOCK_L]), axis=1))
            # Welford 1962, a sum per entry of the tile: they are merged once, below. NaN scores are left out.
            counted = (key >= 0).to(tl.float32)
            n += counted
            deviation = tl.where(key >= 0, x - mean, 0.0)
            shift = tl.where(n == 1.0, deviation, deviation / tl.maximum(n, 1.0))  # the first mean is that score
            mean += shift
            m2 += deviation * (deviation - shift)

        p_best = best_ptr + row[None, :] * groups + (first_group + tl.arange(0, BLOCK_G))[:, None]
        tl.store(p_best, best, mask=(t < L)[None, :])
        n_all = tl.sum(n, axis=0)  # [BLOCK_L]
        # Entries with one mean have exactly that mean together.
        pivot = tl.max(tl.where(n > 0, mean, 0.0), axis=0)
        mean_all = pivot + tl.sum(n * (mean - pivot[None, :]), axis=0) / tl.maximum(n_all, 1.0)
        distance = mean - mean_all[None, :]
        m2_all = tl.sum(m2 + n * distance * distance, axis=0)
        p_statistics = statistics_ptr + row * 3 * tiles + tile
        tl.store(p_statistics, n_all, mask=t < L)
        tl.store(p_statistics + tiles, mean_all, mask=t < L)
        tl.store(p_statistics + 2 * tiles, m2_all, mask=t < L)
