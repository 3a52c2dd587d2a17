"""Near misses of the puzzles on attention."""

import numpy as np


def _softmax(x):
    e = np.exp(x - x.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def _heads(q, k, v):
    return np.einsum("hs,shd->hd", _softmax(np.einsum("hd,shd->hs", q, k) / np.sqrt(q.shape[1])), v)


def tiles_the_heads(q, k, v, selected):
    k, v = (np.tile(x[selected], (1, q.shape[0] // x.shape[1], 1)) for x in (k, v))
    return _heads(q, k, v)


def reads_everything(q, k, v, selected):
    k, v = (np.repeat(x, q.shape[0] // x.shape[1], axis=1) for x in (k, v))
    return _heads(q, k, v)


def forgets_the_scale(q, k, v, selected):
    k, v = (np.repeat(x[selected], q.shape[0] // x.shape[1], axis=1) for x in (k, v))
    return _heads(q * np.sqrt(q.shape[1]), k, v)


def one_softmax_for_all_heads(q, k, v, selected):
    k, v = (np.repeat(x[selected], q.shape[0] // x.shape[1], axis=1) for x in (k, v))
    logits = np.einsum("hd,shd->hs", q, k) / np.sqrt(q.shape[1])
    return np.einsum("hs,shd->hd", _softmax(logits.ravel()).reshape(logits.shape), v)


def _attend(q, k, v, selected):
    if len(selected) == 0:
        return np.zeros(len(q))
    return _softmax(k[selected] @ q / np.sqrt(len(q))) @ v[selected]


def reads_the_last_row(q, k, v, slots, t):
    return _attend(q, k, v, slots[slots <= t])


def reads_the_future(q, k, v, slots, t):
    return _attend(q, k, v, slots[(slots >= 0) & (slots < len(k))])


def does_not_read_itself(q, k, v, slots, t):
    return _attend(q, k, v, slots[(slots >= 0) & (slots < t)])


def empty_slots_are_zeros(q, k, v, slots, t):
    held = (slots >= 0) & (slots <= t)
    k, v = (np.where(held[:, None], x[np.where(held, slots, 0)], 0) for x in (k, v))
    return _softmax(k @ q / np.sqrt(len(q))) @ v


def fails_on_nothing(q, k, v, slots, t):
    selected = slots[(slots >= 0) & (slots <= t)]
    return _softmax(k[selected] @ q / np.sqrt(len(q))) @ v[selected]


def corrects_the_sum_only(m, l, o, logits, v):  # noqa: E741
    new = max(m, logits.max())
    if new == -np.inf:
        return m, l, o
    p = np.exp(logits - new)
    return new, l * np.exp(m - new) + p.sum(), o + p @ v


def minus_infinity_from_itself(m, l, o, logits, v):  # noqa: E741
    new = max(m, logits.max())
    p, correction = np.exp(logits - new), np.exp(m - new)
    return new, l * correction + p.sum(), o * correction + p @ v


def keeps_the_old_maximum(m, l, o, logits, v):  # noqa: E741
    new = m if m > -np.inf else logits.max()
    if new == -np.inf:
        return m, l, o
    p = np.exp(logits - new)
    return new, l + p.sum(), o + p @ v


def no_maximum_at_all(m, l, o, logits, v):  # noqa: E741
    new = max(m, logits.max())
    if new == -np.inf:
        return m, l, o
    p = np.exp(logits)
    total = l * np.exp(m) + p.sum()
    return new, total * np.exp(-new), (o * np.exp(m) + p @ v) * np.exp(-new)


WRONG = {
    "grouped_heads": [tiles_the_heads, reads_everything, forgets_the_scale, one_softmax_for_all_heads],
    "attend_slots": [
        reads_the_last_row,
        reads_the_future,
        does_not_read_itself,
        empty_slots_are_zeros,
        fails_on_nothing,
    ],
    "one_more_tile": [corrects_the_sum_only, minus_infinity_from_itself, keeps_the_old_maximum, no_maximum_at_all],
}
