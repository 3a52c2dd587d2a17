"""Near misses of the puzzles on operations and bytes."""

import math

import numpy as np


def one_operation_per_product(B, L, S, H_I, d_I):
    return B * L * S * H_I * d_I


def halves_for_causality(B, L, S, H_I, d_I):
    return 2 * B * H_I * d_I * sum(S - L + t + 1 for t in range(L))


def as_many_keys_as_queries(B, L, S, H_I, d_I):
    return 2 * B * L * L * H_I * d_I


def one_query_for_all_heads(B, L, S, H_I, d_I):
    return 2 * B * L * S * d_I


def forgets_the_values(d, H_I, d_I, k):
    return 2 * k * d // (4 * d - H_I * d_I) + 1


def rounds_up(d, H_I, d_I, k):
    return math.ceil(2 * k * d / (2 * d - H_I * d_I))


def forgets_the_indexer(d, H_I, d_I, k):
    return k + 1


def forgets_the_indexers_heads(d, H_I, d_I, k):
    return 2 * k * d // (2 * d - d_I) + 1


def loads_more_than_there_is(n, k, H_kv, d_h, d_I, element_bytes):
    return element_bytes * (n * d_I + 2 * k * H_kv * d_h)


def loads_no_values(n, k, H_kv, d_h, d_I, element_bytes):
    return element_bytes * (n * d_I + min(n, k) * H_kv * d_h)


def scores_the_selected_only(n, k, H_kv, d_h, d_I, element_bytes):
    return element_bytes * (min(n, k) * d_I + 2 * min(n, k) * H_kv * d_h)


def an_indexer_key_per_head(n, k, H_kv, d_h, d_I, element_bytes):
    return element_bytes * (n * d_I * H_kv + 2 * min(n, k) * H_kv * d_h)


def a_map_for_each_head(L, start, H_I):
    return 12 * H_I * sum(start + t + 1 for t in range(L))


def the_whole_rectangle(L, start, H_I):
    return 12 * L * (start + L)


def reads_once(L, start, H_I):
    return 8 * sum(start + t + 1 for t in range(L))


def forgets_start(L, start, H_I):
    return 12 * sum(t + 1 for t in range(L))


def does_not_see_itself(L, start, H_I):
    return 12 * sum(start + t for t in range(L))


def _unions(slots, tile):
    return [np.unique(slots[first : first + tile]) for first in range(0, len(slots), tile)]


def counts_empty_slots(slots, tile, row_bytes):
    return slots.size * row_bytes, sum(len(u[u >= 0]) for u in _unions(slots, tile)) * row_bytes


def empty_is_a_position(slots, tile, row_bytes):
    return np.count_nonzero(slots >= 0) * row_bytes, sum(len(u) for u in _unions(slots, tile)) * row_bytes


def one_union_for_all(slots, tile, row_bytes):
    return np.count_nonzero(slots >= 0) * row_bytes, len(np.unique(slots[slots >= 0])) * row_bytes


def drops_the_short_tile(slots, tile, row_bytes):
    whole = slots[: len(slots) // tile * tile]
    return np.count_nonzero(slots >= 0) * row_bytes, sum(len(u[u >= 0]) for u in _unions(whole, tile)) * row_bytes


def sectors_per_row(rows, row_bytes, sector):
    return len(rows) * math.ceil(row_bytes / sector) * sector


def bytes_asked_for(rows, row_bytes, sector):
    return len(rows) * row_bytes


def one_sector_too_many(rows, row_bytes, sector):
    touched = {s for i in rows for s in range(i * row_bytes // sector, (i + 1) * row_bytes // sector + 1)}
    return len(touched) * sector


def fetches_shared_sectors_twice(rows, row_bytes, sector):
    return sector * sum(((i + 1) * row_bytes - 1) // sector - i * row_bytes // sector + 1 for i in rows)


WRONG = {
    "indexer_flops": [
        one_operation_per_product,
        halves_for_causality,
        as_many_keys_as_queries,
        one_query_for_all_heads,
    ],
    "crossover": [forgets_the_values, rounds_up, forgets_the_indexer, forgets_the_indexers_heads],
    "decode_bytes": [
        loads_more_than_there_is,
        loads_no_values,
        scores_the_selected_only,
        an_indexer_key_per_head,
    ],
    "score_map_bytes": [a_map_for_each_head, the_whole_rectangle, reads_once, forgets_start, does_not_see_itself],
    "tile_bytes": [counts_empty_slots, empty_is_a_position, one_union_for_all, drops_the_short_tile],
    "sector_bytes": [
        sectors_per_row,
        bytes_asked_for,
        one_sector_too_many,
        fetches_shared_sectors_twice,
    ],
}
