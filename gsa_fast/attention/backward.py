"""Gradients of sparse attention: the launches, for one chunk of tiles after the other.

A tile gives a part of dk and dv to every key of its union, and a key has parts from many tiles. Either tiles add them
atomically, in the order in which they happen to run; or every tile stores its parts in a buffer, in the dtype of q, and
a second kernel adds up those of each key in the order of the tiles (`partial_sums`). What the buffer holds at a time is
a round.
"""

import torch
import triton
from torch import Tensor

from gsa_fast import _backend
from gsa_fast.attention import union, union_hopper
from gsa_fast.attention.bits import rows_per_chunk, words_of, write_selection_bits
from gsa_fast.attention.partial_sums import list_parts_kernel, sum_parts_kernel
from gsa_fast.attention.rows import LOG2_E
from gsa_fast.attention.union_backward import output_gradient_kernel, union_backward_kernel
from gsa_fast.attention.union_backward_hopper import channels_in_order, union_backward_hopper_kernel

# float32 has no matrix units that keep its precision, and its tiles would not fit the registers.
FLOAT32_TILE_ROWS = 16
FLOAT32_WIDTH = 128  # channels whose float32 tiles fit 99 KiB of shared memory
# The parts that tiles give to dk and dv are kept for one round of tiles at a time, in as many bytes as this many
# float32 copies of dk and dv have, or LEAST_PART_BYTES.
PART_COPIES = 8
LEAST_PART_BYTES = 2**30
# A chunk of tiles has its parts in as many rounds as the data asks for, at most this many.
ROUNDS = 16
SUM_PROGRAMS = 4096
# At a time: tiles whose parts a program of `list_parts_kernel` lists; entries of a list that one of `sum_parts_kernel`
# looks at, parts that it adds, channels of one part, and channels of all.
TILES_AT_A_TIME = 32
ENTRIES_AT_A_TIME, PARTS_AT_A_TIME, CHANNELS_AT_A_TIME, SUMMANDS_AT_A_TIME = 128, 64, 2048, 16384


def too_wide(width: int, device: torch.device) -> bool:
    """Whether tiles of `width` channels in float32, which take 112 KiB and more, do not fit the shared memory."""
    return width > FLOAT32_WIDTH and _backend.little_shared_memory(device)


def attend_backward(
    dout: Tensor,
    dlse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    indices: Tensor,
    counts: Tensor,
    start: Tensor,
    output_gate_logits: Tensor | None,
    out: Tensor,
    lse: Tensor,
    scale: float,
    deterministic: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """dq, dk, dv and the gradient of the output gate's logits, in the dtypes of what they belong to.

    `out` and `lse` are what the forward pass returned.

    Raises:
        ValueError: a tile of this width in float32 does not fit the device's shared memory.
    """
    out, lse = out.contiguous(), lse.contiguous()  # no copy of what the forward pass made
    (B, L, H, d_h), (S, H_kv), K = q.shape, k.shape[1:3], indices.shape[-1]
    device, group = q.device, H // H_kv
    gate = output_gate_logits
    block_d = max(16, triton.next_power_of_2(d_h))

    delta = torch.empty(lse.shape, dtype=torch.float32, device=device)
    do = dout if gate is None else torch.empty(q.shape, dtype=q.dtype, device=device)
    dgate = None if gate is None else torch.empty(q.shape, dtype=gate.dtype, device=device)
    block_r = 16
    output_gradient_kernel[(triton.cdiv(B * L * H, block_r),)](
        dout, out, out if gate is None else gate, lse if dlse is None else dlse, do, delta,
        out if dgate is None else dgate,
        *dout.stride(), *(out if gate is None else gate).stride(), *(lse if dlse is None else dlse).stride(),
        B * L * H, L, H,
        d_h=d_h, BLOCK_R=block_r, BLOCK_D=block_d, OUTPUT_GATE=gate is not None, LSE_GRADIENT=dlse is not None,
    )  # fmt: skip

    # A tile without a union belongs to no round, so nobody writes its dq.
    dq = torch.zeros(q.shape, dtype=q.dtype, device=device)
    dkv = torch.zeros((B, S, 2, H_kv, d_h), dtype=torch.float32, device=device)
    is_float32 = q.dtype == torch.float32
    if is_float32 and too_wide(block_d, device):
        raise ValueError(
            f"q: expected float16, bfloat16 or at most {FLOAT32_WIDTH} channels for gradients on a device with less "
            f"than {_backend.LARGE_SHARED_MEMORY // 1024} KiB of shared memory, got float32 with {d_h}"
        )
    queries = max(1, FLOAT32_TILE_ROWS // group) if is_float32 else union.queries_per_tile(group)
    if not is_float32 and block_d > 128 and _backend.little_shared_memory(device):
        queries = max(1, queries // 2)  # half the rows: with all of them even one stage takes 1 KiB too much
    block_m = max(16, triton.next_power_of_2(queries * group))
    block_n = 32 if is_float32 else union.keys_per_block(block_d, q.dtype)
    capacity = union.largest_union(queries, K, S, block_n)
    words, width = words_of(S), 2 * H_kv * d_h
    chunk_rows = rows_per_chunk(B, L, queries, 4 * (queries * (words + 1 + capacity // 32) + capacity + 2 * words))
    part_slots = max(PART_COPIES * dkv.numel() * 4, LEAST_PART_BYTES) // (width * q.element_size())
    part_slots = min(part_slots, B * triton.cdiv(L, queries) * capacity)  # as many as all unions have at most
    if deterministic:
        chunk_rows = min(chunk_rows, max(1, ROUNDS * part_slots // (B * capacity)) * queries)
    chunk_tiles = triton.cdiv(chunk_rows, queries)
    # The tiles of a round begin in part_slots slots: the last one may reach beyond.
    parts = torch.empty((part_slots + capacity) * width, dtype=q.dtype, device=device) if deterministic else dkv

    bits = torch.empty(B * chunk_rows * words, dtype=torch.int32, device=device)
    occupied = torch.empty(B * chunk_rows, dtype=torch.int32, device=device)
    positions = torch.empty(B * chunk_tiles * capacity, dtype=torch.int32, device=device)
    masks = torch.empty(B * chunk_tiles * capacity // 32 * queries, dtype=torch.int32, device=device)
    lists = torch.empty(B * S * chunk_tiles if deterministic else 0, dtype=torch.int32, device=device)
    list_counts, list_places = torch.empty((2, B * S), dtype=torch.int32, device=device)
    block_c = min(CHANNELS_AT_A_TIME, max(16, triton.next_power_of_2(width)))
    block_t = min(PARTS_AT_A_TIME, SUMMANDS_AT_A_TIME // block_c)
    # The sign of the scale does not matter here.
    on_hopper = union_hopper.serves(q, k, v, do, 1.0, block_m)
    of_tile = {"QUERIES": queries, "GROUP": group, "d_h": d_h, "BLOCK_M": block_m, "BLOCK_N": block_n}
    of_tile |= {"DETERMINISTIC": deterministic}
    for first_row in range(0, L, chunk_rows):
        rows = min(chunk_rows, L - first_row)
        tiles = triton.cdiv(rows, queries)
        n_tiles = B * tiles
        sizes = torch.empty(n_tiles, dtype=torch.int32, device=device)
        write_selection_bits(indices, counts, start, bits, occupied, first_row, rows, S, queries)
        # Words beyond what a tile sees are not written.
        bits_and_ranks = torch.zeros((2, n_tiles * words), dtype=torch.int32, device=device) if deterministic else None
        union.write_unions(
            bits, start, positions, masks, sizes, first_row, rows, capacity, S, queries, block_n, bits_and_ranks
        )
        offsets, bounds, rounds = sizes, sizes, 1
        if bits_and_ranks is not None:
            ends = sizes.cumsum(0)
            offsets = ends - sizes
            rounds = triton.cdiv(n_tiles * capacity, part_slots)  # at most: the device alone knows how many are needed
            # The first tile that begins at or after a multiple of part_slots begins a round.
            first_tiles = torch.searchsorted(offsets, torch.arange(rounds + 1, device=device) * part_slots)
            bounds = torch.cat((offsets, ends[-1:]))[first_tiles]
            list_parts_kernel[(B * words,)](
                *bits_and_ranks, offsets, lists, list_counts, words, tiles, chunk_tiles, S, BLOCK_T=TILES_AT_A_TIME
            )
            list_places.zero_()
        tensors = q, k, v, do, lse, delta, positions, masks, sizes, offsets, bounds, dq, parts
        for this_round in range(rounds):
            scalars = first_row, rows, L, S, H_kv, tiles, n_tiles, capacity, scale, scale * LOG2_E, this_round
            if on_hopper:
                union_backward_hopper_kernel[(n_tiles * H_kv,)](
                    *tensors, *(stride for x in (q, k, v, do) for stride in x.stride()[:3]), *scalars,
                    **of_tile, NARROW=union_hopper.is_narrow(k, v), num_warps=union_hopper.NUM_WARPS,
                )  # fmt: skip
            else:
                union_backward_kernel[(n_tiles * H_kv,)](
                    *tensors, *(stride for x in (q, k, v, do) for stride in x.stride()), *scalars,
                    **of_tile, BLOCK_D=block_d, num_warps=4 if is_float32 and block_d <= 64 else 8,
                    num_stages=1 if is_float32 or block_d <= 64 else 2,
                )  # fmt: skip
            if deterministic:
                sum_parts_kernel[(min(SUM_PROGRAMS, B * S),)](
                    parts, lists, list_counts, list_places, bounds, dkv, B * S, chunk_tiles, width, this_round,
                    PROGRAMS=min(SUM_PROGRAMS, B * S), BLOCK_L=ENTRIES_AT_A_TIME, BLOCK_T=block_t, BLOCK_C=block_c,
                )  # fmt: skip
    if on_hopper:
        dkv = channels_in_order(dkv, 16 // parts.element_size())
    dk, dv = (x.to(q.dtype, copy=True, memory_format=torch.contiguous_format) for x in dkv.unbind(2))
    return dq, dk, dv, dgate
