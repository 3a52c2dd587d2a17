"""Sums of the tiles' parts of dk and dv in a fixed order, for gradients that are the same in every bit at every run.

`union_backward_kernel` stores the part that a tile gives to a key in the row of the key's slot in the tile's union. One
kernel lists, for every key, the rows that are its own, in the order of the tiles; another adds them up in that order.
"""

import triton
import triton.language as tl

from gsa_fast._primitives import popcount


@triton.jit
def list_parts_kernel(
    bits_ptr, ranks_ptr, offsets_ptr, lists_ptr, counts_ptr,
    words, tiles, capacity, S,
    BLOCK_T: tl.constexpr,
):  # fmt: skip
    """One program per word of 32 keys: which rows of the buffer hold parts of each key, ascending by tile.

    bits [B · tiles, words] are the unions as bit masks, ranks [B · tiles, words] how many positions of a union lie
    before a word; lists is [B, S, capacity].
    """
    pid = tl.program_id(0).to(tl.int64)
    b, w = pid // words, pid % words
    lane = tl.arange(0, 32)
    below = ~(tl.full([32], -1, tl.int32) << lane)  # the lower lanes' bits
    s = w * 32 + lane
    before = tl.zeros([32], tl.int32)
    for first in range(0, tiles, BLOCK_T):
        i = first + tl.arange(0, BLOCK_T)
        tile = b * tiles + i
        word = tl.load(bits_ptr + tile * words + w, mask=i < tiles, other=0)  # [BLOCK_T]
        rank = tl.load(ranks_ptr + tile * words + w, mask=i < tiles, other=0)
        offset = tl.load(offsets_ptr + tile, mask=i < tiles, other=0)
        member = (word[:, None] >> lane[None, :]) & 1  # [BLOCK_T, 32]
        slot = rank[:, None] + popcount(word[:, None] & below[None, :])
        place = before[None, :] + tl.cumsum(member, axis=0) - member
        p_list = lists_ptr + (b * S + s)[None, :] * capacity + place
        tl.store(p_list, (offset[:, None] + slot).to(tl.int32), mask=(member != 0) & (s < S)[None, :])
        before += tl.sum(member, axis=0)
    tl.store(counts_ptr + b * S + s, before, mask=s < S)


@triton.jit
def sum_parts_kernel(
    parts_ptr, lists_ptr, counts_ptr, places_ptr, bounds_ptr, dkv_ptr,
    n_keys, capacity, width, this_round,
    PROGRAMS: tl.constexpr, BLOCK_L: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """PROGRAMS programs, each with its share of the keys: add the parts of this round to dkv, float32 [B · S, width].

    places [B · S] says how much of each key's list the rounds before have read; this one moves it on. An empty round
    costs next to nothing, because there are few programs.
    """
    start, end = tl.load(bounds_ptr + this_round), tl.load(bounds_ptr + this_round + 1)
    last = tl.where(end > start, n_keys, 0)
    for key in range(tl.program_id(0).to(tl.int64), last, PROGRAMS):
        count = tl.load(counts_ptr + key)
        begin = tl.load(places_ptr + key)
        p_list = lists_ptr + key * capacity
        stop, found = begin, BLOCK_L
        while found == BLOCK_L:
            i = stop + tl.arange(0, BLOCK_L)
            row = tl.load(p_list + i, mask=i < count, other=end)
            found = tl.sum((row < end).to(tl.int32), axis=0)
            stop += found
        tl.debug_barrier()  # all threads have read the place before one of them moves it
        tl.store(places_ptr + key, stop)
        for first_c in range(0, tl.where(stop > begin, width, 0), BLOCK_C):
            c = first_c + tl.arange(0, BLOCK_C)
            total = tl.load(dkv_ptr + key * width + c, mask=c < width, other=0.0)
            for first in range(begin, stop, BLOCK_T):
                i = first + tl.arange(0, BLOCK_T)
                row = tl.load(p_list + i, mask=i < stop, other=start)  # [BLOCK_T]
                p_part = parts_ptr + (row - start)[:, None] * width + c[None, :]
                mask = (i < stop)[:, None] & (c < width)[None, :]
                part = tl.load(p_part, mask=mask, other=0.0)  # [BLOCK_T, BLOCK_C]
                total += tl.sum(part.to(tl.float32), axis=0)
            tl.store(dkv_ptr + key * width + c, total, mask=c < width)
