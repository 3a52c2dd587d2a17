"""Near misses of the puzzles on the indexer."""

import numpy as np

from gsa_ref.equations import sigmoid


def overflows(x):
    return 1 / (1 + np.exp(-x))


def cancels(x):
    return 0.5 + 0.5 * np.tanh(x / 2)


def computes_both(x):
    return np.where(x >= 0, 1 / (1 + np.exp(-x)), np.exp(x) / (1 + np.exp(x)))


def forgets_padded_queries(L, S, start, length):
    return np.minimum(np.minimum(start + np.arange(L) + 1, length), S)


def does_not_see_itself(L, S, start, length):
    position = start + np.arange(L)
    return np.where(position < length, np.minimum(np.minimum(position, length), S), 0)


def forgets_start(L, S, start, length):
    position = np.arange(L)
    return np.where(position < length, np.minimum(np.minimum(position + 1, length), S), 0)


def takes_the_high_end(q, low, high, head_logits, bias, scale):
    return sigmoid(head_logits) @ sigmoid(scale * (q @ high) + bias)


def one_end_for_all_channels(q, low, high, head_logits, bias, scale):
    return sigmoid(head_logits) @ sigmoid(scale * np.maximum(q @ low, q @ high) + bias)


def one_corner_for_all_heads(q, low, high, head_logits, bias, scale):
    corner = np.where(q.sum(0) > 0, high, low)
    return sigmoid(head_logits) @ sigmoid(scale * (q @ corner) + bias)


WRONG = {
    "stable_sigmoid": [overflows, cancels, computes_both],
    "visible_keys": [forgets_padded_queries, does_not_see_itself, forgets_start],
    "block_bound": [takes_the_high_end, one_end_for_all_channels, one_corner_for_all_heads],
}
