"""Gradients of sparse attention by union tiles: the tiles and unions of `union.py`, walked once more.

With P = softmax of a row's logits, δ = do·o − dlse and dS = P ⊙ (do vᵀ − δ), a tile gives dq = scale · dS k to its own
rows, and to every key of its union a part of dk = scale · dSᵀ q and dv = Pᵀ do, to which other tiles add theirs.
"""

import triton
import triton.language as tl

from gsa_fast._primitives import stable_sigmoid
from gsa_fast.attention.bits import selected_keys
from gsa_fast.attention.rows import LN_2, load_keys, load_rows


@triton.jit
def output_gradient_kernel(
    dout_ptr, out_ptr, gate_ptr, dlse_ptr, do_ptr, delta_ptr, dgate_ptr,
    stride_ob, stride_ol, stride_oh, stride_od,
    stride_gb, stride_gl, stride_gh, stride_gd,
    stride_lb, stride_ll, stride_lh,
    n_rows, L, H,
    d_h: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_D: tl.constexpr,
    OUTPUT_GATE: tl.constexpr, LSE_GRADIENT: tl.constexpr,
):  # fmt: skip
    """One program per BLOCK_R rows (b, t, h): what the output's gradient gives before any key is read.

    Through the gate (Eq. 10) do = dout ⊙ σ(g) and dg = dout ⊙ o ⊙ σ(1 − σ) = dout ⊙ out ⊙ (1 − σ), because out = o ⊙ σ;
    and δ = do·o − dlse = dout·out − dlse. out, do, δ and dg are contiguous.
    """
    row = tl.program_id(0).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
    c = tl.arange(0, BLOCK_D).to(tl.int64)
    b, t, head = row // H // L, row // H % L, row % H
    inside = row < n_rows
    mask = inside[:, None] & (c < d_h)[None, :]
    flat = row[:, None] * d_h + c[None, :]
    p_dout = dout_ptr + (b * stride_ob + t * stride_ol + head * stride_oh)[:, None] + c[None, :] * stride_od
    dout = tl.load(p_dout, mask=mask, other=0.0).to(tl.float32)
    out = tl.load(out_ptr + flat, mask=mask, other=0.0).to(tl.float32)
    delta = tl.sum(dout * out, axis=1)
    if LSE_GRADIENT:
        delta -= tl.load(dlse_ptr + b * stride_lb + t * stride_ll + head * stride_lh, mask=inside, other=0.0)
    tl.store(delta_ptr + row, delta, mask=inside)
    if OUTPUT_GATE:
        p_gate = gate_ptr + (b * stride_gb + t * stride_gl + head * stride_gh)[:, None] + c[None, :] * stride_gd
        gate = tl.load(p_gate, mask=mask, other=0.0).to(tl.float32)
        tl.store(do_ptr + flat, (dout * stable_sigmoid(gate)).to(do_ptr.dtype.element_ty), mask=mask)
        tl.store(dgate_ptr + flat, (dout * out * stable_sigmoid(-gate)).to(dgate_ptr.dtype.element_ty), mask=mask)


@triton.jit
def add_part(p, part, mask, DETERMINISTIC: tl.constexpr):
    """Store a part of dk or dv, or add it to its keys' sums."""
    if DETERMINISTIC:
        tl.store(p, part.to(p.dtype.element_ty), mask=mask)
    else:
        tl.atomic_add(p, part, mask=mask, sem="relaxed")


@triton.jit
def union_backward_kernel(
    q_ptr, k_ptr, v_ptr, do_ptr, lse_ptr, delta_ptr, positions_ptr, masks_ptr, sizes_ptr,
    offsets_ptr, bounds_ptr, dq_ptr, dkv_ptr,
    stride_qb, stride_ql, stride_qh, stride_qd,
    stride_kb, stride_ks, stride_kh, stride_kd,
    stride_vb, stride_vs, stride_vh, stride_vd,
    stride_ob, stride_ol, stride_oh, stride_od,
    first_row, rows, L, S, H_kv, tiles, n_tiles, capacity, scale, scale_log2, this_round,
    QUERIES: tl.constexpr, GROUP: tl.constexpr, d_h: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, DETERMINISTIC: tl.constexpr,
):  # fmt: skip
    """One program per tile and key/value head.

    dkv is [rows, 2, H_kv, d_h], dk and dv beside each other. Its rows are the keys, [B, S] in float32, to which a tile
    adds its parts atomically. DETERMINISTIC: they are the slots of the unions, which lie one after the other, those of
    a tile from offsets[tile], and a tile stores its parts there; this round is for the slots from bounds[this_round] to
    bounds[this_round + 1].
    """
    pid = tl.program_id(0).to(tl.int64)
    tile = n_tiles - 1 - pid % n_tiles
    h_kv = pid // n_tiles
    b = tile // tiles
    r = tl.arange(0, BLOCK_M)  # [BLOCK_M] row of the tile: query r // GROUP, head r % GROUP
    query = r // GROUP
    row = (tile % tiles) * QUERIES + query  # row of the chunk
    keep = (query < QUERIES) & (row < rows)
    t = first_row + row
    head = h_kv * GROUP + r % GROUP
    c = tl.arange(0, BLOCK_D).to(tl.int64)  # [BLOCK_D]
    n = tl.arange(0, BLOCK_N)  # [BLOCK_N] key of a block
    size = tl.load(sizes_ptr + tile)
    p_dkv = dkv_ptr + h_kv * d_h + c[None, :]
    width, to_dv = 2 * H_kv * d_h, H_kv * d_h
    if DETERMINISTIC:
        offset = tl.load(offsets_ptr + tile)
        start, end = tl.load(bounds_ptr + this_round), tl.load(bounds_ptr + this_round + 1)
        size = tl.where((offset >= start) & (offset < end), size, 0)
        # A block of equal conditions: the interpreter has no type for a scalar one beside a block.
        keep = keep & (tl.zeros([BLOCK_M], tl.int32) + size > 0)
        p_dkv += (offset - start + n)[:, None] * width  # [BLOCK_N, BLOCK_D]
    q_mask = keep[:, None] & (c < d_h)[None, :]
    b_q = load_rows(q_ptr, b, t, head, c, q_mask, stride_qb, stride_ql, stride_qh, stride_qd)  # [BLOCK_M, BLOCK_D]
    b_do = load_rows(do_ptr, b, t, head, c, q_mask, stride_ob, stride_ol, stride_oh, stride_od)
    flat = (b * L + t) * H_kv * GROUP + head  # lse, delta and dq are contiguous
    lse = tl.load(lse_ptr + flat, mask=keep, other=0.0) / LN_2  # [BLOCK_M], in base 2
    delta = tl.load(delta_ptr + flat, mask=keep, other=0.0)
    p_k = k_ptr + b * stride_kb + h_kv * stride_kh
    p_v = v_ptr + b * stride_vb + h_kv * stride_vh
    p_positions = positions_ptr + tile * capacity
    p_masks = masks_ptr + tile * (capacity // 32) * QUERIES + tl.minimum(query, QUERIES - 1)  # [BLOCK_M]

    dq = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    for first in range(0, size, BLOCK_N):
        s = tl.load(p_positions + first + n).to(tl.int64)  # [BLOCK_N]
        b_k = load_keys(p_k + s * stride_ks, c, stride_kd, d_h, BLOCK_D)  # [BLOCK_N, BLOCK_D]
        b_v = load_keys(p_v + s * stride_vs, c, stride_vd, d_h, BLOCK_D)
        selected = selected_keys(p_masks + first // 32 * QUERIES, QUERIES, n, BLOCK_N)  # [BLOCK_M, BLOCK_N]
        logits = scale_log2 * tl.dot(b_q, tl.trans(b_k), input_precision="ieee")  # [BLOCK_M, BLOCK_N]
        p = tl.where(selected, tl.exp2(logits - lse[:, None]), 0.0)
        part_mask = (first + n < size)[:, None] & (c < d_h)[None, :]
        p_part = p_dkv
        if not DETERMINISTIC:
            p_part += (b * S + s)[:, None] * width
        # Written at once, because dk and dv together would not fit the registers.
        dv = tl.dot(tl.trans(p.to(b_do.dtype)), b_do, input_precision="ieee")  # [BLOCK_N, BLOCK_D]
        add_part(p_part + to_dv, dv, part_mask, DETERMINISTIC)
        dp = tl.dot(b_do, tl.trans(b_v), input_precision="ieee")  # [BLOCK_M, BLOCK_N]
        ds = tl.where(selected, p * (dp - delta[:, None]), 0.0).to(b_q.dtype)
        dk = scale * tl.dot(tl.trans(ds), b_q, input_precision="ieee")  # [BLOCK_N, BLOCK_D]
        add_part(p_part, dk, part_mask, DETERMINISTIC)
        if DETERMINISTIC:
            p_dkv += BLOCK_N * width
        dq = tl.dot(ds, b_k, dq, input_precision="ieee")
    tl.store(dq_ptr + flat[:, None] * d_h + c[None, :], (scale * dq).to(dq_ptr.dtype.element_ty), mask=q_mask)
