"""Gradients by union tiles for sm_90, in Gluon: `union_backward.union_backward_kernel` with busier matrix units.

Five products per block of keys, of which two are under way at once, and two programs per multiprocessor. Gluon is not
interpreted: what the interpreter shows of `union_backward.py`, only a device shows of this kernel, by comparison.
"""

from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, warpgroup_mma, warpgroup_mma_wait

from gsa_fast.attention.rows import LN_2
from gsa_fast.attention.union_hopper import barrier, copy_rows, load_words


def channels_in_order(x: Tensor, run: int) -> Tensor:
    """x [..., d_h] with the places of `add_part` as its channels: the same with the channels in their order.

    `run` is how many channels of 16 bytes were beside each other in one thread: 8 of 16 bits, 4 of float32.
    """
    return x.unflatten(-1, (x.shape[-1] // (4 * run), 4, run // 2, 2)).transpose(-3, -2).flatten(-4)


@gluon.constexpr_function
def layout_of_part(d_h, run):
    """A part [64, d_h] as the registers hold it, its channels at the places of `add_part`."""
    width, low, high = d_h.bit_length() - 1, run.bit_length() - 1, run.bit_length() + 1
    registers = [*([0, 1 << i] for i in (*range(low), *range(high, width))), [8, 0]]
    lanes = [[0, 1 << low], [0, 2 << low], [1, 0], [2, 0], [4, 0]]
    return gl.DistributedLinearLayout(registers, lanes, [[16, 0], [32, 0]], [], [64, d_h])


@gluon.jit
def add_part(
    p_part, part, width, positions_ptr, valid,
    d_h: gl.constexpr, dtype: gl.constexpr, DETERMINISTIC: gl.constexpr,
):  # fmt: skip
    """Store the first `valid` rows of a part of dk or dv, [64, d_h], beside each other; or add them to their keys.

    A thread of a product holds channels 8i + 2j and 8i + 2j + 1 of a row for all i and one j. Moving them into their
    order would take the shared memory; instead those of some i lie beside each other, so that a thread writes 16 bytes
    at a time and four threads 64. `channels_in_order` undoes it.
    """
    run: gl.constexpr = 8 if DETERMINISTIC else 4
    layout: gl.constexpr = layout_of_part(d_h, run)
    if DETERMINISTIC:
        part = part.to(dtype)
    part = part.reshape([64, d_h // (4 * run), run // 2, 4, 2]).permute((0, 1, 3, 2, 4)).reshape([64, d_h])
    part = gl.convert_layout(part, layout, assert_trivial=True)
    place = gl.arange(0, d_h, gl.SliceLayout(0, layout))
    row = gl.arange(0, 64, gl.SliceLayout(1, layout))
    mask = (row < valid)[:, None] & (place >= 0)[None, :]
    if DETERMINISTIC:
        gl.store(p_part + (row * width)[:, None] + place[None, :], part, mask=mask)
    else:
        key = gl.load(positions_ptr + row, mask=row < valid, other=0).to(gl.int64)
        gl.atomic_add(p_part + (key * width)[:, None] + place[None, :], part, mask=mask, sem="relaxed")


@gluon.jit
def union_backward_hopper_kernel(
    q_ptr, k_ptr, v_ptr, do_ptr, lse_ptr, delta_ptr, positions_ptr, masks_ptr, sizes_ptr,
    offsets_ptr, bounds_ptr, dq_ptr, dkv_ptr,
    stride_qb, stride_ql, stride_qh,
    stride_kb, stride_ks, stride_kh,
    stride_vb, stride_vs, stride_vh,
    stride_ob, stride_ol, stride_oh,
    first_row, rows, L, S, H_kv, tiles, n_tiles, capacity, scale, scale_log2, this_round,
    QUERIES: gl.constexpr, GROUP: gl.constexpr, d_h: gl.constexpr,
    BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr, NARROW: gl.constexpr, DETERMINISTIC: gl.constexpr,
):  # fmt: skip
    """One program per tile and key/value head, as `union_backward.union_backward_kernel`; channels are contiguous."""
    dtype: gl.constexpr = q_ptr.dtype.element_ty
    across: gl.constexpr = d_h // 8  # threads that copy one row, 16 bytes each
    load: gl.constexpr = gl.BlockedLayout([8 * d_h // 128, 8], [32 // across, across], [4, 1], [1, 0])
    of_logits: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_N, 16])
    of_out: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, d_h, 16])
    swizzled: gl.constexpr = gl.NVMMASharedLayout.get_default_for([BLOCK_N, d_h], dtype)
    of_left: gl.constexpr = gl.DotOperandLayout(0, of_out, 2)
    of_weights: gl.constexpr = gl.NVMMASharedLayout.get_default_for([BLOCK_M, BLOCK_N], dtype)

    pid = gl.program_id(0).to(gl.int64)
    tile = n_tiles - 1 - pid % n_tiles
    h_kv = pid // n_tiles
    b = tile // tiles
    size = gl.load(sizes_ptr + tile)
    first_part = b * S
    if DETERMINISTIC:
        offset = gl.load(offsets_ptr + tile)
        start, end = gl.load(bounds_ptr + this_round), gl.load(bounds_ptr + this_round + 1)
        size = gl.where((offset >= start) & (offset < end), size, 0)
        first_part = offset - start
    blocks = (size + BLOCK_N - 1) // BLOCK_N
    if blocks > 0:
        channel = gl.arange(0, d_h, gl.SliceLayout(0, load))
        slot = gl.arange(0, BLOCK_N, gl.SliceLayout(1, load))  # key of a block, as the copies see it
        r_load = gl.arange(0, BLOCK_M, gl.SliceLayout(1, load))
        row_load = tile % tiles * QUERIES + r_load // GROUP
        keep_load = (r_load // GROUP < QUERIES) & (row_load < rows)
        t_load = first_row + row_load
        head_load = h_kv * GROUP + r_load % GROUP
        mask_load = keep_load[:, None] & (channel >= 0)[None, :]
        q_rows = b * stride_qb + t_load * stride_ql + head_load * stride_qh
        b_q = gl.load(q_ptr + q_rows[:, None] + channel[None, :], mask=mask_load, other=0.0)  # [BLOCK_M, d_h]
        s_q = gl.allocate_shared_memory(dtype, [BLOCK_M, d_h], swizzled, b_q)
        o_rows = b * stride_ob + t_load * stride_ol + head_load * stride_oh
        b_do = gl.load(do_ptr + o_rows[:, None] + channel[None, :], mask=mask_load, other=0.0)
        s_do = gl.allocate_shared_memory(dtype, [BLOCK_M, d_h], swizzled, b_do)
        s_k = gl.allocate_shared_memory(dtype, [2, BLOCK_N, d_h], swizzled)
        s_v = gl.allocate_shared_memory(dtype, [2, BLOCK_N, d_h], swizzled)
        s_p = gl.allocate_shared_memory(dtype, [BLOCK_M, BLOCK_N], of_weights)
        s_ds = gl.allocate_shared_memory(dtype, [BLOCK_M, BLOCK_N], of_weights)

        r = gl.arange(0, BLOCK_M, gl.SliceLayout(1, of_logits))  # row of the tile: query r // GROUP, head r % GROUP
        column = gl.arange(0, BLOCK_N, gl.SliceLayout(0, of_logits))
        row = tile % tiles * QUERIES + r // GROUP
        keep = (r // GROUP < QUERIES) & (row < rows)
        flat = (b * L + first_row + row) * H_kv * GROUP + h_kv * GROUP + r % GROUP
        lse = gl.load(lse_ptr + flat, mask=keep, other=0.0) / LN_2  # in base 2
        delta = gl.load(delta_ptr + flat, mask=keep, other=0.0)

        p_k = k_ptr + b * stride_kb + h_kv * stride_kh + channel
        p_v = v_ptr + b * stride_vb + h_kv * stride_vh + channel
        p_positions = positions_ptr + tile * capacity
        p_masks = masks_ptr + tile * (capacity // 32) * QUERIES + gl.minimum(r // GROUP, QUERIES - 1)
        width = 2 * H_kv * d_h
        p_dk = dkv_ptr + first_part * width + h_kv * d_h

        s_0 = gl.load(p_positions + slot)
        s_1 = gl.load(p_positions + BLOCK_N + slot, mask=slot < (blocks - 1) * BLOCK_N, other=0)
        copy_rows(s_k.index(0), p_k, s_0, stride_ks, blocks > 0, NARROW)
        copy_rows(s_v.index(0), p_v, s_0, stride_vs, blocks > 0, NARROW)
        async_copy.commit_group()
        copy_rows(s_k.index(1), p_k, s_1, stride_ks, blocks > 1, NARROW)
        copy_rows(s_v.index(1), p_v, s_1, stride_vs, blocks > 1, NARROW)
        async_copy.commit_group()

        of_nothing = gl.zeros([BLOCK_M, BLOCK_N], gl.float32, of_logits)
        no_part = gl.zeros([BLOCK_N, d_h], gl.float32, of_out)
        dq = gl.zeros([BLOCK_M, d_h], gl.float32, of_out)
        low, high = load_words(p_masks, r, 0, blocks, QUERIES)
        fence_async_shared()  # the matrix units read q and do as this thread has stored them
        for i in range(blocks):
            this = i % 2
            async_copy.wait_group(1)  # K and V of block i
            barrier()
            logits = warpgroup_mma(s_q, s_k.index(this).permute((1, 0)), of_nothing, use_acc=False, is_async=True)
            dp = warpgroup_mma(s_do, s_v.index(this).permute((1, 0)), of_nothing, use_acc=False, is_async=True)
            word = gl.where((column < 32)[None, :], low[:, None], high[:, None])
            selected = ((word >> (column % 32)[None, :]) & 1) != 0
            logits = warpgroup_mma_wait(1, deps=[logits])
            p = gl.where(selected, gl.exp2(logits * scale_log2 - lse[:, None]), 0.0)
            s_p.store(p.to(dtype))
            low, high = load_words(p_masks, r, i + 1, blocks, QUERIES)
            dp = warpgroup_mma_wait(0, deps=[dp])
            ds = gl.where(selected, p * (dp - delta[:, None]), 0.0)
            s_ds.store(ds.to(dtype))
            barrier()
            # Transposed on their way to registers. The matrix units could read them where they lie, behind a fence that
            # would wait for all that this thread has under way: copies of the next block, parts of the one before.
            p_t = s_p.permute((1, 0)).load(of_left)
            dv = warpgroup_mma(p_t, s_do, no_part, use_acc=False, is_async=True)
            under_way = warpgroup_mma(s_ds.load(of_left), s_k.index(this), dq, is_async=True)
            p_block = p_positions + i * BLOCK_N
            position = gl.load(p_block + 2 * BLOCK_N + slot, mask=slot < (blocks - i - 2) * BLOCK_N, other=0)
            dv = warpgroup_mma_wait(1, deps=[dv])
            add_part(p_dk + H_kv * d_h, dv, width, p_block, size - i * BLOCK_N, d_h, dtype, DETERMINISTIC)
            ds_t = s_ds.permute((1, 0)).load(of_left)
            dk = warpgroup_mma(ds_t, s_q, no_part, use_acc=False, is_async=True)
            dq = warpgroup_mma_wait(1, deps=[under_way])
            barrier()  # everybody is done with K and V of block i
            copy_rows(s_k.index(this), p_k, position, stride_ks, i + 2 < blocks, NARROW)
            copy_rows(s_v.index(this), p_v, position, stride_vs, i + 2 < blocks, NARROW)
            async_copy.commit_group()
            dk = warpgroup_mma_wait(0, deps=[dk])
            add_part(p_dk, scale * dk, width, p_block, size - i * BLOCK_N, d_h, dtype, DETERMINISTIC)
            if DETERMINISTIC:
                p_dk += BLOCK_N * width
        async_copy.wait_group(0)

        # From the registers as they are: rows in the layout of the copies would stay in registers during the loop.
        r_out = gl.arange(0, BLOCK_M, gl.SliceLayout(1, of_out))
        c_out = gl.arange(0, d_h, gl.SliceLayout(0, of_out))
        row_out = tile % tiles * QUERIES + r_out // GROUP
        keep_out = (r_out // GROUP < QUERIES) & (row_out < rows)
        p_dq = dq_ptr + ((b * L + first_row + row_out) * H_kv * GROUP + h_kv * GROUP + r_out % GROUP)[:, None] * d_h
        gl.store(p_dq + c_out[None, :], (scale * dq).to(dtype), mask=keep_out[:, None] & (c_out >= 0)[None, :])
