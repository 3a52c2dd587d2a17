"""Exact top k_t of a row of scores, of which one program reads only the groups that can hold a selected key.

The order of the list is that of the groups, not of the positions: the attention does not care.
"""

import triton
import triton.language as tl

from gsa_fast._primitives import count_visible, store_entry_where, store_where
from gsa_fast.budget import budget_from_variance, row_variance_from_tiles
from gsa_fast.decode.scores import MASKED_KEY, NAN_KEY
from gsa_fast.selection.pick import fill_empty, threshold_key


@triton.jit
def load_row_keys(p_keys, first, end, groups, n_visible, MEMBERS: tl.constexpr, BLOCK: tl.constexpr):
    """BLOCK keys of a row in the order in which they are stored, and their positions."""
    i = first + tl.arange(0, BLOCK)
    position = i % MEMBERS * groups + i // MEMBERS
    inside = (i < end) & (position < n_visible)
    return tl.load(p_keys + i, mask=inside, other=MASKED_KEY), position


@triton.jit
def count_row(
    p_keys, end, groups, n_visible, threshold, last_tie, MEMBERS: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """How many keys of a row lie above the threshold, or equal it at a position up to last_tie."""
    total = tl.zeros([BLOCK], tl.int32)
    for first in range(0, end, BLOCK):
        key, position = load_row_keys(p_keys, first, end, groups, n_visible, MEMBERS, BLOCK)
        total += ((key > threshold) | ((key == threshold) & (position <= last_tie))).to(tl.int32)
    return tl.sum(total, axis=0)


@triton.jit
def select_from_row(
    p_keys, p_indices, groups, n_visible, kappa, low, MEMBERS: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """The κ ≥ 1 best of all keys of a row, by bisection with a pass over the row per step; at least κ reach `low`."""
    end = tl.minimum(groups, n_visible) * MEMBERS
    high = 0x7F800000  # +∞
    while low < high:
        middle = low + (high - low + 1) // 2
        reached = count_row(p_keys, end, groups, n_visible, middle, n_visible, MEMBERS, BLOCK) >= kappa
        low = tl.where(reached, middle, low)
        high = tl.where(reached, high, middle - 1)
    # Of the keys equal to the threshold, those up to the last position that is needed.
    first_tie = 0
    last_tie = n_visible - 1
    while first_tie < last_tie:
        middle = (first_tie + last_tie) // 2
        reached = count_row(p_keys, end, groups, n_visible, low, middle, MEMBERS, BLOCK) >= kappa
        last_tie = tl.where(reached, middle, last_tie)
        first_tie = tl.where(reached, first_tie, middle + 1)
    written = 0
    for first in range(0, end, BLOCK):
        key, position = load_row_keys(p_keys, first, end, groups, n_visible, MEMBERS, BLOCK)
        take = ((key > low) | ((key == low) & (position <= last_tie))).to(tl.int32)
        store_where(p_indices, written + tl.cumsum(take, axis=0) - take, position, take == 1)
        written += tl.sum(take, axis=0)


@triton.jit
def gather_candidates(
    p_keys, p_chosen, p_candidates, n_chosen, groups, n_visible, low,
    MEMBERS: tl.constexpr, CAPACITY: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Write (key, position) of the first CAPACITY keys ≥ low of the chosen groups; how many there are."""
    written = 0
    end = n_chosen * MEMBERS
    for first in range(0, end, BLOCK):
        i = first + tl.arange(0, BLOCK)
        group = tl.load(p_chosen + i // MEMBERS, mask=i < end, other=0)
        position = i % MEMBERS * groups + group
        inside = (i < end) & (position < n_visible)
        key = tl.load(p_keys + group.to(tl.int64) * MEMBERS + i % MEMBERS, mask=inside, other=MASKED_KEY)
        keep = (key >= low).to(tl.int32)
        slot = written + tl.cumsum(keep, axis=0) - keep
        store_entry_where(p_candidates, 1, slot, key, position, (keep == 1) & (slot < CAPACITY))
        written += tl.sum(keep, axis=0)
    return written


@triton.jit
def select_from_candidates(p_candidates, p_indices, size, kappa, low, CAPACITY: tl.constexpr):
    """The κ ≥ 1 best of `size` ≥ κ candidates, all of them ≥ low."""
    slot = tl.arange(0, CAPACITY)
    entry = tl.load(p_candidates + slot, mask=slot < size, other=MASKED_KEY << 32)  # [CAPACITY]
    key = (entry >> 32).to(tl.int32)
    position = entry.to(tl.int32)
    low = threshold_key(key, low, tl.max(key, axis=0), kappa)
    greater = key > low
    equal = key == low
    ties_wanted = kappa - tl.sum(greater.to(tl.int32), axis=0)
    last_tie = 0x7FFFFFFF
    if tl.sum(equal.to(tl.int32), axis=0) > ties_wanted:  # the lowest positions come first
        mirrored = tl.where(equal, last_tie - position, -1)
        nearest = tl.max(tl.where(equal, position, 0), axis=0)
        last_tie -= threshold_key(mirrored, last_tie - nearest, tl.max(mirrored, axis=0), ties_wanted)
    take = (greater | (equal & (position <= last_tie))).to(tl.int32)
    store_where(p_indices, tl.cumsum(take, axis=0) - take, position, take == 1)


@triton.jit
def decode_select_kernel(
    keys_ptr, best_ptr, statistics_ptr, mean_variance_ptr, start_ptr, lengths_ptr, chosen_ptr, candidates_ptr,
    indices_ptr, counts_ptr, variance_ptr, arrived_ptr,
    L, S, K, H_kv, groups, tiles, k_base, k_min, k_max,
    RULE: tl.constexpr, MEMBERS: tl.constexpr, GROUPS: tl.constexpr, BLOCK_G: tl.constexpr, CAPACITY: tl.constexpr,
    BLOCK: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_H: tl.constexpr,
):  # fmt: skip
    """One program per row: variance, k_t (Eq. 8) and the k_t best keys, in an order that depends on nothing else."""
    row = tl.program_id(0).to(tl.int64)
    b, t = row // L, (row % L).to(tl.int32)
    group = tl.arange(0, GROUPS)
    n_visible = count_visible(tl.load(start_ptr + b) + t, tl.load(lengths_ptr + b), S)
    n_groups = tl.minimum(n_visible, groups)
    best = tl.load(best_ptr + row * groups + group, mask=group < n_groups, other=MASKED_KEY)  # [GROUPS]
    p_statistics = statistics_ptr + row * 3 * tiles
    variance = row_variance_from_tiles(p_statistics, tiles, tl.cdiv(n_groups, BLOCK_G), BLOCK_T)
    k = budget_from_variance(variance, tl.load(mean_variance_ptr), n_visible, k_base, k_min, k_max, RULE)
    kappa = tl.minimum(tl.maximum(k, 0), K)
    tl.store(counts_ptr + row, kappa)
    tl.store(variance_ptr + row, variance)
    head = tl.arange(0, BLOCK_H)
    tl.store(arrived_ptr + row * H_kv + head, tl.zeros([BLOCK_H], tl.int32), mask=head < H_kv)

    p_indices = indices_ptr + row * K
    if kappa > 0:
        p_keys = keys_ptr + row * groups * MEMBERS
        p_chosen = chosen_ptr + row * groups
        p_candidates = candidates_ptr + row * CAPACITY
        low = NAN_KEY + 0  # with fewer groups than κ, every key is a candidate
        if n_groups > kappa:
            smallest = tl.min(tl.where(group < n_groups, best, 0x7F800000), axis=0)
            low = threshold_key(best, smallest, tl.max(best, axis=0), kappa)
        choose = (best >= low).to(tl.int32)
        store_where(p_chosen, tl.cumsum(choose, axis=0) - choose, group, choose == 1)
        tl.debug_barrier()  # other threads read the list
        size = gather_candidates(
            p_keys, p_chosen, p_candidates, tl.sum(choose, axis=0), groups, n_visible, low, MEMBERS, CAPACITY, BLOCK
        )
        tl.debug_barrier()
        if size <= CAPACITY:
            select_from_candidates(p_candidates, p_indices, size, kappa, low, CAPACITY)
        else:  # many equal scores
            select_from_row(p_keys, p_indices, groups, n_visible, kappa, low, MEMBERS, BLOCK)
    fill_empty(p_indices, kappa, K, BLOCK)
