"""Attention over the unions of tiles for sm_90, in Gluon: `union.union_attention_kernel` with busier matrix units.

Triton waits for the product of queries and keys, and for that of weights and values, before it goes on. Here the second
is under way during the next block's softmax, and the copies of later blocks are issued during the first. Gluon is not
interpreted: what the interpreter shows of `union.py`, only a device shows of this kernel, by comparison with it.
"""

import torch
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, warpgroup_mma, warpgroup_mma_wait

from gsa_fast._primitives import stable_sigmoid
from gsa_fast.attention.rows import LN_2, is_nonfinite

barrier = getattr(gl, "barrier", None) or gl.thread_barrier  # its name since and before Triton 3.7
BUFFERS = gl.constexpr(3)  # blocks of keys, and of values, that are in shared memory at once
NUM_WARPS = 4
BLOCK_ROWS = 64
HEAD_WIDTHS = (64, 128)


@gluon.jit
def copy_rows(buffer, p_channels, position, stride, valid, NARROW: gl.constexpr):
    """Start to copy rows of x into shared memory, [BLOCK_N, d_h]; nothing if not valid.

    p_channels [d_h] are those of position 0. With NARROW, 32 bits hold every offset.
    """
    offset = position * stride if NARROW else position.to(gl.int64) * stride
    rows = p_channels[None, :] + offset[:, None]
    async_copy.async_copy_global_to_shared(buffer, rows, mask=gl.full([1, 1], 1, gl.int1, gl.AutoLayout()) & valid)


@gluon.jit
def load_words(p_masks, r, block, blocks, QUERIES: gl.constexpr):
    """Two words for each row of a tile: which keys of a block it selected, none behind the last block."""
    mask = (r >= 0) & (block < blocks)
    low = gl.load(p_masks + 2 * block * QUERIES, mask=mask, other=0)
    return low, gl.load(p_masks + (2 * block + 1) * QUERIES, mask=mask, other=0)


@gluon.jit
def is_selected(low, high, column):
    """Whether a row selected a key of a block, from the row's two words: [BLOCK_M, BLOCK_N]."""
    word = gl.where((column < 32)[None, :], low[:, None], high[:, None])
    return ((word >> (column % 32)[None, :]) & 1) != 0


@gluon.jit
def softmax_update(m, l, logits, low, high, column, scale_log2):
    """Fold one block of logits into m, the running maximum, and l, the running sum.

    Also the factor for what was summed before, and the block's weights p. While a row has seen no key, m is −inf: 0
    stands in for it, so that 2^(−inf − m) is 0 and not NaN. Left to itself the compiler fuses other products with other
    sums in the repair than in the first pass, which moves the last bit: so it has no choice here.
    """
    logits = gl.where(is_selected(low, high, column), logits, float("-inf"))
    m_new = gl.maximum(m, gl.max(logits, axis=1))
    m_safe = gl.where(m_new == float("-inf"), 0.0, m_new * scale_log2)
    rescale = gl.exp2(gl.fma(m, scale_log2, -m_safe))
    p = gl.exp2(gl.fma(logits, scale_log2, -m_safe[:, None]))
    return m_new, gl.fma(l, rescale, gl.sum(p, axis=1)), rescale, p


@gluon.jit
def attend_union(
    tile, h_kv,
    q_ptr, k_ptr, v_ptr, positions_ptr, masks_ptr, sizes_ptr, occupied_ptr,
    gate_ptr, out_ptr, lse_ptr, broken_ptr, nonfinite_ptr,
    stride_qb, stride_ql, stride_qh,
    stride_kb, stride_ks, stride_kh,
    stride_vb, stride_vs, stride_vh,
    stride_gb, stride_gl, stride_gh,
    first_row, rows, L, H_kv, tiles, capacity, scale_log2,
    QUERIES: gl.constexpr, GROUP: gl.constexpr, d_h: gl.constexpr,
    BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr, OUTPUT_GATE: gl.constexpr, NARROW: gl.constexpr,
    REPAIR: gl.constexpr,
):  # fmt: skip
    """One tile for one key/value head, as `union.attend_union`.

    scale_log2 is positive and channels are contiguous. In iteration i the matrix units multiply the queries with K of
    block i + 1, and the weights of block i with its V, while the copies for later blocks are issued and, as soon as the
    logits are there, the softmax of block i + 1 is computed.
    """
    dtype: gl.constexpr = q_ptr.dtype.element_ty
    across: gl.constexpr = d_h // 8  # threads that copy one row, 16 bytes each
    load: gl.constexpr = gl.BlockedLayout([8 * d_h // 128, 8], [32 // across, across], [4, 1], [1, 0])
    of_logits: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_N, 16])
    of_out: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, d_h, 16])
    of_p: gl.constexpr = gl.DotOperandLayout(0, of_out, 2)
    swizzled: gl.constexpr = gl.NVMMASharedLayout.get_default_for([BLOCK_N, d_h], dtype)

    b = tile // tiles
    channel = gl.arange(0, d_h, gl.SliceLayout(0, load))
    slot = gl.arange(0, BLOCK_N, gl.SliceLayout(1, load))  # key of a block, as the copies see it
    r = gl.arange(0, BLOCK_M, gl.SliceLayout(1, of_logits))  # row of the tile: query r // GROUP, head r % GROUP
    column = gl.arange(0, BLOCK_N, gl.SliceLayout(0, of_logits))

    r_load = gl.arange(0, BLOCK_M, gl.SliceLayout(1, load))
    row_load = tile % tiles * QUERIES + r_load // GROUP
    keep_load = (r_load // GROUP < QUERIES) & (row_load < rows)
    t_load = first_row + row_load
    head_load = h_kv * GROUP + r_load % GROUP
    q_rows = b * stride_qb + t_load * stride_ql + head_load * stride_qh
    q_mask = keep_load[:, None] & (channel >= 0)[None, :]
    b_q = gl.load(q_ptr + q_rows[:, None] + channel[None, :], mask=q_mask, other=0.0)  # [BLOCK_M, d_h]
    s_q = gl.allocate_shared_memory(dtype, [BLOCK_M, d_h], swizzled, b_q)
    s_k = gl.allocate_shared_memory(dtype, [BUFFERS, BLOCK_N, d_h], swizzled)
    s_v = gl.allocate_shared_memory(dtype, [BUFFERS, BLOCK_N, d_h], swizzled)

    p_k = k_ptr + b * stride_kb + h_kv * stride_kh + channel
    p_v = v_ptr + b * stride_vb + h_kv * stride_vh + channel
    p_positions = positions_ptr + tile * capacity
    # The first word of each row's bit mask over the union: [BLOCK_M].
    p_masks = masks_ptr + tile * (capacity // 32) * QUERIES + gl.minimum(r // GROUP, QUERIES - 1)
    blocks = (gl.load(sizes_ptr + tile) + BLOCK_N - 1) // BLOCK_N

    # Copies are committed two groups ahead of their use: K of block i + 3 with V of block i + 2.
    s_0 = gl.load(p_positions + slot, mask=slot < blocks * BLOCK_N, other=0)
    s_1 = gl.load(p_positions + BLOCK_N + slot, mask=slot < (blocks - 1) * BLOCK_N, other=0)
    of_v = gl.load(p_positions + 2 * BLOCK_N + slot, mask=slot < (blocks - 2) * BLOCK_N, other=0)
    of_k = gl.load(p_positions + 3 * BLOCK_N + slot, mask=slot < (blocks - 3) * BLOCK_N, other=0)
    copy_rows(s_k.index(0), p_k, s_0, stride_ks, blocks > 0, NARROW)
    async_copy.commit_group()
    copy_rows(s_k.index(1), p_k, s_1, stride_ks, blocks > 1, NARROW)
    copy_rows(s_v.index(0), p_v, s_0, stride_vs, blocks > 0, NARROW)
    async_copy.commit_group()
    copy_rows(s_k.index(2), p_k, of_v, stride_ks, blocks > 2, NARROW)
    copy_rows(s_v.index(1), p_v, s_1, stride_vs, blocks > 1, NARROW)
    async_copy.commit_group()

    zeros = gl.zeros([BLOCK_M, BLOCK_N], gl.float32, of_logits)
    async_copy.wait_group(2)
    fence_async_shared()
    barrier()
    logits = warpgroup_mma(s_q, s_k.index(0).permute((1, 0)), zeros, use_acc=False)  # [BLOCK_M, BLOCK_N]
    m = gl.full([BLOCK_M], float("-inf"), gl.float32, gl.SliceLayout(1, of_logits))
    l = gl.zeros([BLOCK_M], gl.float32, gl.SliceLayout(1, of_logits))
    acc = gl.zeros([BLOCK_M, d_h], gl.float32, of_out)
    low, high = load_words(p_masks, r, 0, blocks, QUERIES)
    m, l, rescale, p = softmax_update(m, l, logits, low, high, column, scale_log2)
    low, high = load_words(p_masks, r, 1, blocks, QUERIES)
    bad_rows = gl.zeros([BLOCK_M], gl.int32, gl.SliceLayout(1, of_logits))
    this = 0  # i % BUFFERS
    for i in range(blocks):
        following = gl.where(this == BUFFERS - 1, 0, this + 1)
        acc = acc * gl.convert_layout(rescale, gl.SliceLayout(1, of_out))[:, None]
        async_copy.wait_group(1)  # K of block i + 1, V of block i
        barrier()  # they are there for everybody, and everybody is done with K of block i and V of block i − 1
        if REPAIR:
            b_v = s_v.index(this).load(load)  # [BLOCK_N, d_h]
            bad = gl.max(is_nonfinite(b_v), axis=1)
            s_v.index(this).store(gl.where((bad == 0)[:, None], b_v, 0.0).to(dtype))
            of_row = gl.convert_layout(bad, gl.SliceLayout(0, of_logits))[None, :]
            words = load_words(p_masks, r, i, blocks, QUERIES)
            bad_rows = bad_rows | gl.max(gl.where(is_selected(words[0], words[1], column), of_row, 0), axis=1)
            fence_async_shared()
            barrier()
        next_logits = warpgroup_mma(s_q, s_k.index(following).permute((1, 0)), zeros, use_acc=False, is_async=True)
        under_way = warpgroup_mma(gl.convert_layout(p.to(dtype), of_p), s_v.index(this), acc, is_async=True)
        copy_rows(s_k.index(this), p_k, of_k, stride_ks, i + 3 < blocks, NARROW)
        before = gl.where(this == 0, BUFFERS - 1, this - 1)
        copy_rows(s_v.index(before), p_v, of_v, stride_vs, i + 2 < blocks, NARROW)
        async_copy.commit_group()
        of_v = of_k
        of_k = gl.load(p_positions + (i + 4) * BLOCK_N + slot, mask=slot < (blocks - i - 4) * BLOCK_N, other=0)
        logits = warpgroup_mma_wait(1, deps=[next_logits])
        m, l, rescale, p = softmax_update(m, l, logits, low, high, column, scale_log2)
        low, high = load_words(p_masks, r, i + 2, blocks, QUERIES)
        acc = warpgroup_mma_wait(0, deps=[under_way])
        this = following
    async_copy.wait_group(0)

    # Normalise, gate (Eq. 10) and write, as `rows.store_rows`.
    row = tile % tiles * QUERIES + r // GROUP
    keep = (r // GROUP < QUERIES) & (row < rows)
    if REPAIR:
        gl.store(nonfinite_ptr + (b * rows + row) * H_kv + h_kv, bad_rows, mask=keep)
        keep = keep & (bad_rows == 0)
        q_mask = q_mask & (gl.convert_layout(bad_rows, gl.SliceLayout(1, load)) == 0)[:, None]
    else:
        gl.store(broken_ptr + tile * H_kv + h_kv, gl.max(gl.max(is_nonfinite(acc), axis=1), axis=0))
    empty = gl.load(occupied_ptr + b * rows + row, mask=keep, other=0) == 0
    l_safe = gl.where(empty, 1.0, l)
    lse = gl.where(empty, float("-inf"), gl.fma(m, scale_log2, gl.log2(l_safe)) * LN_2)
    out_row = (b * L + first_row + row) * H_kv * GROUP + h_kv * GROUP + r % GROUP
    gl.store(lse_ptr + out_row, lse, mask=keep)
    out = acc / gl.convert_layout(l_safe, gl.SliceLayout(1, of_out))[:, None]
    out = gl.convert_layout(out, load)
    if OUTPUT_GATE:
        g_rows = b * stride_gb + t_load * stride_gl + head_load * stride_gh
        gate = gl.load(gate_ptr + g_rows[:, None] + channel[None, :], mask=q_mask, other=0.0)
        out = out * stable_sigmoid(gate.to(gl.float32))
    out_row = (b * L + t_load) * H_kv * GROUP + head_load
    gl.store(out_ptr + out_row[:, None] * d_h + channel[None, :], out.to(dtype), mask=q_mask)


@gluon.jit
def union_attention_hopper_kernel(
    q_ptr, k_ptr, v_ptr, positions_ptr, masks_ptr, sizes_ptr, occupied_ptr,
    gate_ptr, out_ptr, lse_ptr, broken_ptr, nonfinite_ptr,
    stride_qb, stride_ql, stride_qh,
    stride_kb, stride_ks, stride_kh,
    stride_vb, stride_vs, stride_vh,
    stride_gb, stride_gl, stride_gh,
    first_row, rows, L, H_kv, tiles, n_tiles, capacity, scale_log2,
    QUERIES: gl.constexpr, GROUP: gl.constexpr, d_h: gl.constexpr,
    BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr, OUTPUT_GATE: gl.constexpr, NARROW: gl.constexpr,
):  # fmt: skip
    """One program per tile and key/value head, as `union.union_attention_kernel`."""
    pid = gl.program_id(0).to(gl.int64)
    attend_union(
        n_tiles - 1 - pid % n_tiles, pid // n_tiles,
        q_ptr, k_ptr, v_ptr, positions_ptr, masks_ptr, sizes_ptr, occupied_ptr,
        gate_ptr, out_ptr, lse_ptr, broken_ptr, nonfinite_ptr,
        stride_qb, stride_ql, stride_qh,
        stride_kb, stride_ks, stride_kh,
        stride_vb, stride_vs, stride_vh,
        stride_gb, stride_gl, stride_gh,
        first_row, rows, L, H_kv, tiles, capacity, scale_log2,
        QUERIES, GROUP, d_h, BLOCK_M, BLOCK_N, OUTPUT_GATE, NARROW, False,
    )  # fmt: skip


@gluon.jit
def union_hopper_repair_kernel(
    q_ptr, k_ptr, v_ptr, positions_ptr, masks_ptr, sizes_ptr, occupied_ptr,
    gate_ptr, out_ptr, lse_ptr, broken_ptr, nonfinite_ptr,
    stride_qb, stride_ql, stride_qh,
    stride_kb, stride_ks, stride_kh,
    stride_vb, stride_vs, stride_vh,
    stride_gb, stride_gl, stride_gh,
    first_row, rows, L, H_kv, tiles, n_tiles, capacity, scale_log2,
    QUERIES: gl.constexpr, GROUP: gl.constexpr, d_h: gl.constexpr,
    BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr, OUTPUT_GATE: gl.constexpr, NARROW: gl.constexpr,
    BLOCK_I: gl.constexpr,
):  # fmt: skip
    """As `union.union_repair_kernel`. The arithmetic is that of the first pass: a row of the tile that selected nothing
    but finite values gets the same bits again.
    """
    first = gl.program_id(0).to(gl.int64) * BLOCK_I
    end = gl.minimum(first + BLOCK_I, n_tiles * H_kv)
    item = first + gl.arange(0, BLOCK_I, gl.BlockedLayout([1], [32], [4], [0]))
    if gl.max(gl.load(broken_ptr + item, mask=item < end, other=0), axis=0) != 0:
        for i in range(first, end):
            if gl.load(broken_ptr + i) != 0:
                barrier()  # everybody is done with the shared memory of the tile before
                attend_union(
                    i // H_kv, i % H_kv,
                    q_ptr, k_ptr, v_ptr, positions_ptr, masks_ptr, sizes_ptr, occupied_ptr,
                    gate_ptr, out_ptr, lse_ptr, broken_ptr, nonfinite_ptr,
                    stride_qb, stride_ql, stride_qh,
                    stride_kb, stride_ks, stride_kh,
                    stride_vb, stride_vs, stride_vh,
                    stride_gb, stride_gl, stride_gh,
                    first_row, rows, L, H_kv, tiles, capacity, scale_log2,
                    QUERIES, GROUP, d_h, BLOCK_M, BLOCK_N, OUTPUT_GATE, NARROW, True,
                )  # fmt: skip


def on_hopper(device: torch.device) -> bool:
    """Whether a device is of compute capability 9.0."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device) == (9, 0)


def serves(q: Tensor, k: Tensor, v: Tensor, gate: Tensor, scale: float, block_m: int) -> bool:
    """Whether `union_attention_hopper_kernel` takes these arguments: copies of 16 bytes, and a largest logit that stays
    the largest when it is scaled."""
    return (
        on_hopper(q.device)
        and block_m == BLOCK_ROWS
        and q.shape[-1] in HEAD_WIDTHS
        and q.dtype in (torch.float16, torch.bfloat16)
        and scale > 0
        and all(x.stride(-1) == 1 for x in (q, k, v, gate))
        and all(x.data_ptr() % 16 == 0 and all(stride % 16 == 0 for stride in x.stride()[:3]) for x in (k, v))
    )


def is_narrow(*tensors: Tensor) -> bool:
    """Whether an int32 holds the offset of every position."""
    return all(x.shape[1] * x.stride(1) < 2**31 for x in tensors)
