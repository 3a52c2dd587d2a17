"""Implementations with one fault each, and without: what the hunts of `verify_a_kernel` set a learner's property on.

A fault is a name given to the function that makes an implementation; the implementations do not tell theirs.
"""

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from gsa_ref import Selection, equations

Select = Callable[[np.ndarray, np.ndarray], tuple[np.ndarray, np.ndarray]]


def selector(fault: str = "", spare: bool = False) -> Select:
    """A selection with one fault. `spare` gives it S slots in place of as many as the largest budget fills."""

    def select(scores: np.ndarray, budget: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        scores, budget = np.asarray(scores, np.float64), np.asarray(budget)
        (L, S), counts, rows = scores.shape, [], []
        for t in range(L):
            value, k = scores[t], int(budget[0 if fault == "the budget of row 0" else t])
            visible = value != -np.inf
            if fault == "masked positions are candidates":
                visible = np.ones(S, bool)
            if fault == "the last, partial tile is dropped":
                visible = visible & (np.arange(S) < max(S // 4 * 4, 4))
            if fault == "scores in float16":
                with np.errstate(over="ignore"):
                    value = value.astype(np.float16).astype(np.float64)
            if fault == "magnitudes":
                value = np.abs(value)
            value = np.where(np.isnan(value), np.inf if fault == "NaN first" else -np.inf, value)
            k += {"one too many": 1, "one too few": -1}.get(fault, 0)
            if fault == "at most 8":
                k = min(k, 8)
            minor = np.arange(S)
            if fault == "ties to the higher position":
                minor = -minor
            if fault == "−0 below 0":
                minor = minor + S * np.signbit(value)
            order = np.lexsort((minor, -value))
            chosen = order[visible[order]][: max(k, 0)]
            rows.append(chosen if fault == "not ascending" else np.sort(chosen))
            counts.append(min(max(k, 0), S) if fault == "the budget as count" else len(chosen))
        K = S if spare else max(1, *(len(row) for row in rows))
        indices = np.full((L, K), 0 if fault == "0 in the tail" else -1)
        for t, row in enumerate(rows):
            indices[t, : len(row)] = row
        return indices, np.array(counts)

    return select


def faulty_budgets(variance: float, mean_variance: float, n_valid: int) -> dict[str, int]:
    """k_t of one row with each fault."""
    ratio = variance / mean_variance if mean_variance > 0 else 1.0
    k = min(max(16 * ratio, 4), 64)
    inverse = mean_variance / variance if mean_variance > 0 and variance > 0 else 1.0
    unset = mean_variance <= 0
    budgets = {
        "rounded up": np.ceil(k),
        "rounded to the nearest": np.round(k),
        "the ratio rounded": np.clip(16 * np.floor(ratio), 4, 64),
        "inverse": np.clip(16 * inverse, 4, 64),
        "by the deviation": np.clip(16 * np.sqrt(ratio), 4, 64),
        "no k_min": min(16 * ratio, 64),
        "no k_max": max(16 * ratio, 4),
        "k_min while there is no mean": 4 if unset else k,
        "k_max while there is no mean": 64 if unset else k,
        "the variance while there is no mean": np.clip(16 * variance, 4, 64) if unset else k,
    }
    budgets = {fault: min(int(value), n_valid) for fault, value in budgets.items()}
    return budgets | {
        "more than there are keys": int(k),
        "k_min after the number of keys": max(int(min(k, n_valid)), 4),
        "one key fewer": min(int(k), n_valid - 1),
    }


Attention = Callable[[Tensor, Tensor, Tensor, Selection, Tensor], tuple[Tensor, Tensor]]


def attention(fault: str = "", dtype: torch.dtype = torch.float64) -> Attention:
    """Sparse attention with one fault, in float32 or float64 inside."""

    def attend(q: Tensor, k: Tensor, v: Tensor, selection: Selection, start: Tensor) -> tuple[Tensor, Tensor]:
        (B, L, H, d_h), (S, H_kv) = q.shape, k.shape[1:3]
        out, lse = torch.zeros(B, L, H, d_h), torch.full((B, L, H), -torch.inf)
        scale = d_h**-0.5 if fault != "scaled by the width of all heads" else (H * d_h) ** -0.5
        for b, t, h in np.ndindex(B, L, H):
            count = selection.indices.shape[-1] if fault == "slots past the count" else int(selection.counts[b, t])
            s = selection.indices[b, t, :count].long()
            position = int(start[0 if fault == "the start of sequence 0" else b]) + t
            if fault == "start ignored":
                position = S - L + t
            filled = (s >= 0) & (s < S) & (s <= position)
            if fault == "the future":
                filled = (s >= 0) & (s < S)
            if fault == "−1 is the last key":
                filled = (s < S) & (s <= position)
            if fault == "−1 is key 0":
                s = s.clamp(min=0)
                filled = (s < S) & (s <= position)
            s = s[filled]
            if len(s) == 0:
                if fault == "an empty row is a mean":
                    out[b, t, h] = v[b, :, h * H_kv // H].nan_to_num().mean(0)
                if fault == "an empty row is NaN":
                    out[b, t, h] = torch.nan
                continue
            head = h % H_kv if fault == "heads interleaved" else h * H_kv // H
            keys = k[0 if fault == "the keys of sequence 0" else b, :, head].to(dtype)
            values = v[b, :, head].to(dtype)
            logits = scale * (keys[s] * q[b, t, h].to(dtype)).sum(-1)
            m = logits.max() if fault != "no maximum subtracted" else torch.zeros((), dtype=dtype)
            p = torch.exp((logits - m).float() if fault == "no maximum subtracted" else logits - m)
            if fault == "weights in float16":
                p = p.half().to(dtype)
            if fault == "0 times NaN":
                everything = torch.zeros(S, dtype=dtype).index_copy(0, s, p)
                out[b, t, h] = (everything[:, None] * values).sum(0) / p.sum()
            else:
                out[b, t, h] = (p[:, None] * values[s]).sum(0) / p.sum()
            lse[b, t, h] = torch.log2(p.sum()) + m if fault == "lse in base 2" else torch.log(p.sum()) + m
        return out, lse

    return attend


Budgets = Callable[[np.ndarray], np.ndarray]


def budgets(fault: str = "", rule: str = "proportional", seed: int = 0) -> Budgets:
    """h → k_t by Eq. 7 and Eq. 8, with weights and a rule of its own, and one leak."""
    H_I, d_I, d = 2, 4, 3
    generator = np.random.default_rng(seed)
    w_q, w_k = generator.normal(size=(d, H_I, d_I)), generator.normal(size=(d, d_I))
    w_w, bias = generator.normal(size=(d, H_I)), generator.normal(size=H_I)

    def budgets_of(h: np.ndarray) -> np.ndarray:
        h = np.asarray(h, np.float64)
        B, L, _ = h.shape
        if fault == "centred over the sequence":
            h = h - h.mean(1, keepdims=True)
        if fault == "clipped by the sequence":
            h = np.minimum(h, 2 * h.std(1, keepdims=True))
        q, k = np.einsum("bld,dji->blji", h, w_q), np.einsum("bld,di->bli", h, w_k)
        head_logits = np.einsum("bld,dj->blj", h, w_w)
        scores = np.full((B, L, L), -np.inf)
        for b, t in np.ndindex(B, L):
            ahead = {"one key ahead": 1, "to the end of a tile of 8": 7 - t % 8}.get(fault, 0)
            one = slice(t, t + 1)
            scores[b, t] = equations.indexer_scores(
                q[b, one], k[b], head_logits[b, one], bias, scale=d_I**-0.5, start=t + ahead
            )[0]
        seen = np.isfinite(scores)
        if fault == "scaled by the largest of the map":
            scores = scores / scores[seen].max()
        variance = np.array([equations.score_variance(rows) for rows in scores])  # [B, L]
        mean_variance = np.full((B, L), 0.01)
        if fault == "the mean variance of the batch":
            mean_variance[:] = variance.mean()
        if fault == "the mean variance of each sequence":
            mean_variance[:] = variance.mean(1, keepdims=True)
        if fault == "the mean variance of the neighbours so far":
            mean_variance[:] = variance.mean(0)
        k_base = max(8 * L // 24, 1) if fault == "sized by the length" else 8
        result = np.zeros((B, L), np.int32)
        for b, t in np.ndindex(B, L):
            row, mean, n = variance[b, t : t + 1], float(mean_variance[b, t]), np.array([t + 1])
            result[b, t] = equations.token_budget(row, mean, n, k_base=k_base, k_min=1, k_max=64, rule=rule)[0]
        if fault == "the last query takes everything":
            result[:, -1] = L
        if fault == "the batch's smallest of each position":
            result[:] = result.min(0)
        return result

    return budgets_of
