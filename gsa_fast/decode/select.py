"""Exact top k_t of a row of scores, by many programs.

1. k_t (Eq. 8) and a bound that at least κ scores reach: about the κ-th best of the groups' best. Every program of a
   row finds them itself, or, where rows are many, a program per row does.
2. Shards of a row write what reaches the bound, their candidates; the shard that comes last picks the κ best of them.

The order of the list is that of the shards, not of the positions: the attention does not care.
"""

import triton
import triton.language as tl

from gsa_fast._primitives import count_visible, store_where
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
def count_before(keep):
    """In a tile [R, C] of 0 and 1, row by row: how many 1 come before each place, and how many there are.

    Rows are scanned apart, because a scan of R · C numbers in one takes many exchanges between warps.
    """
    of_row = tl.sum(keep, axis=1)  # [R]
    before = tl.cumsum(of_row, axis=0) - of_row
    return before[:, None] + tl.cumsum(keep, axis=1) - keep, tl.sum(of_row, axis=0)


@triton.jit
def write_candidates(
    p_keys, p_words, shard, kappa, groups, n_visible, low,
    MEMBERS: tl.constexpr, SHARDS: tl.constexpr, SEGMENT: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Write (position, key) of the first SEGMENT keys ≥ low of every SHARDS-th group; how many there are.

    Neighbouring positions belong to neighbouring groups, so that a run of selected ones spreads over all shards.
    """
    n_groups = tl.cdiv(tl.maximum(tl.minimum(groups, n_visible) - shard, 0), SHARDS)
    end = tl.where(kappa > 0, n_groups, 0)
    written = 0
    ROWS: tl.constexpr = BLOCK // MEMBERS
    member = tl.arange(0, MEMBERS)[None, :]
    for first in range(0, end, ROWS):
        i = first + tl.arange(0, ROWS)[:, None]
        group = shard + SHARDS * i
        position = member * groups + group  # [ROWS, MEMBERS]
        inside = (i < end) & (position < n_visible)
        key = tl.load(p_keys + group.to(tl.int64) * MEMBERS + member, mask=inside, other=MASKED_KEY)
        keep = (key >= low).to(tl.int32)
        before, size = count_before(keep)
        slot = written + before
        fits = (keep == 1) & (slot < SEGMENT)
        store_where(p_words, 2 * slot, position, fits)
        store_where(p_words, 2 * slot + 1, key, fits)
        written += size
    unused = tl.arange(0, SEGMENT)
    tl.store(p_words + 2 * unused + 1, tl.full([SEGMENT], MASKED_KEY, tl.int32), mask=unused >= written)
    return written


@triton.jit
def select_from_candidates(
    p_words, p_indices, total, kappa, low, SHARDS: tl.constexpr, SEGMENT: tl.constexpr, USED: tl.constexpr
):  # fmt: skip
    """The κ ≥ 1 best of the `total` ≥ κ candidates of a row, all ≥ low, in the first USED places of each segment.

    Other programs wrote them, so that the first-level cache, which belongs to a multiprocessor, is passed by (.cg).
    """
    COLUMNS: tl.constexpr = 8 if USED >= 8 else USED
    slot = tl.arange(0, SHARDS * USED)
    place = 2 * (slot // USED * SEGMENT + slot % USED)
    key = tl.load(p_words + place + 1, cache_modifier=".cg")  # [SHARDS · USED]
    position = tl.load(p_words + place, cache_modifier=".cg")
    low = threshold_key(key, low, total, tl.max(key, axis=0), kappa)
    greater = key > low
    equal = key == low
    both = tl.sum((equal.to(tl.int32) << 16) + greater.to(tl.int32), axis=0)  # two counts in one sum
    ties = both >> 16
    ties_wanted = kappa - (both & 0xFFFF)
    last_tie = 0x7FFFFFFF
    if ties > ties_wanted:  # the lowest positions come first
        tie = tl.where(equal, position, 0)  # what lies in an unused place may be any number
        mirrored = tl.where(equal, last_tie - tie, -1)
        last_tie -= threshold_key(mirrored, last_tie - tl.max(tie, axis=0), ties, tl.max(mirrored, axis=0), ties_wanted)
    take = (greater | (equal & (position <= last_tie))).to(tl.int32)
    before, _ = count_before(tl.reshape(take, [SHARDS * USED // COLUMNS, COLUMNS]))
    store_where(p_indices, tl.reshape(before, [SHARDS * USED]), position, take == 1)


@triton.jit
def bound_of_row(
    p_best, p_statistics, mean_variance, n_visible, K, groups, tiles, k_base, k_min, k_max,
    RULE: tl.constexpr, GROUPS: tl.constexpr, BLOCK_G: tl.constexpr, BLOCK_T: tl.constexpr,
):  # fmt: skip
    """(variance of a row, κ = k_t (Eq. 8), a key that at least κ of its keys reach)."""
    group = tl.arange(0, GROUPS)
    n_groups = tl.minimum(n_visible, groups)
    best = tl.load(p_best + group, mask=group < n_groups, other=MASKED_KEY)  # [GROUPS]
    variance = row_variance_from_tiles(p_statistics, tiles, tl.cdiv(n_groups, BLOCK_G), BLOCK_T)
    k = budget_from_variance(variance, mean_variance, n_visible, k_base, k_min, k_max, RULE)
    kappa = tl.minimum(tl.maximum(k, 0), K)
    low = NAN_KEY + 0  # with fewer groups than κ, every key is a candidate
    if (kappa > 0) & (n_groups > kappa):
        # Smallest and largest in one exchange between warps.
        ends = tl.max(tl.join(best, tl.where(group < n_groups, -best, -0x7F800000)), axis=0)
        largest, smallest = tl.split(ends)
        low = threshold_key(best, -smallest, n_groups, largest, kappa, kappa // 16)  # a few more do no harm
    return variance, kappa, low


@triton.jit
def decode_threshold_kernel(
    best_ptr, statistics_ptr, mean_variance_ptr, start_ptr, lengths_ptr, low_ptr, counts_ptr, variance_ptr,
    L, S, K, groups, tiles, k_base, k_min, k_max,
    RULE: tl.constexpr, GROUPS: tl.constexpr, BLOCK_G: tl.constexpr, BLOCK_T: tl.constexpr,
):  # fmt: skip
    """One program per row: `bound_of_row`."""
    row = tl.program_id(0).to(tl.int64)
    b, t = row // L, (row % L).to(tl.int32)
    n_visible = count_visible(tl.load(start_ptr + b) + t, tl.load(lengths_ptr + b), S)
    variance, kappa, low = bound_of_row(
        best_ptr + row * groups, statistics_ptr + row * 3 * tiles, tl.load(mean_variance_ptr), n_visible,
        K, groups, tiles, k_base, k_min, k_max, RULE, GROUPS, BLOCK_G, BLOCK_T,
    )  # fmt: skip
    tl.store(counts_ptr + row, kappa)
    tl.store(variance_ptr + row, variance)
    tl.store(low_ptr + row, low)


@triton.jit
def decode_select_kernel(
    keys_ptr, best_ptr, statistics_ptr, mean_variance_ptr, start_ptr, lengths_ptr,
    low_ptr, counts_ptr, variance_ptr, entries_ptr, sizes_ptr, indices_ptr, arrived_ptr,
    L, S, K, H_kv, groups, tiles, k_base, k_min, k_max,
    RULE: tl.constexpr, GROUPS: tl.constexpr, BLOCK_G: tl.constexpr, BLOCK_T: tl.constexpr, BOUNDS: tl.constexpr,
    MEMBERS: tl.constexpr, SHARDS: tl.constexpr, SEGMENT: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One program per row and shard: its candidates; the last one of a row picks the κ best of all shards'.

    In an order that depends on nothing else, whoever is last. With BOUNDS every program finds the row's bound, which
    is sooner than to wait for one that does.
    """
    shard = (tl.program_id(0) % SHARDS).to(tl.int32)
    row = tl.program_id(0).to(tl.int64) // SHARDS
    b, t = row // L, (row % L).to(tl.int32)
    n_visible = count_visible(tl.load(start_ptr + b) + t, tl.load(lengths_ptr + b), S)
    if BOUNDS:
        variance, kappa, low = bound_of_row(
            best_ptr + row * groups, statistics_ptr + row * 3 * tiles, tl.load(mean_variance_ptr), n_visible,
            K, groups, tiles, k_base, k_min, k_max, RULE, GROUPS, BLOCK_G, BLOCK_T,
        )  # fmt: skip
        if shard == 0:
            tl.store(counts_ptr + row, kappa)
            tl.store(variance_ptr + row, variance)
    else:
        kappa = tl.load(counts_ptr + row)
        low = tl.load(low_ptr + row)
    p_keys = keys_ptr + row * groups * MEMBERS
    p_indices = indices_ptr + row * K
    p_words = entries_ptr + row * (2 * SHARDS * SEGMENT)  # of a candidate: its position, its key
    p_sizes = sizes_ptr + row * SHARDS
    size = write_candidates(
        p_keys, p_words + shard * (2 * SEGMENT), shard, kappa, groups, n_visible, low, MEMBERS, SHARDS, SEGMENT, BLOCK
    )
    tl.store(p_sizes + shard, size)
    if shard == 0:
        fill_empty(p_indices, kappa, K, BLOCK)
    tl.debug_barrier()  # the stores of all threads come before the arrival, which one thread announces
    arrived = tl.atomic_add(arrived_ptr + row * (H_kv + 1) + H_kv, 1, sem="acq_rel", scope="gpu")
    if (arrived == SHARDS - 1) & (kappa > 0):
        sizes = tl.load(p_sizes + tl.arange(0, SHARDS), cache_modifier=".cg")
        most, total = tl.max(sizes, axis=0), tl.sum(sizes, axis=0)
        if most <= SEGMENT // 2:
            select_from_candidates(p_words, p_indices, total, kappa, low, SHARDS, SEGMENT, SEGMENT // 2)
        elif most <= SEGMENT:
            select_from_candidates(p_words, p_indices, total, kappa, low, SHARDS, SEGMENT, SEGMENT)
        else:  # many equal scores
            select_from_row(p_keys, p_indices, groups, n_visible, kappa, low, MEMBERS, BLOCK)
