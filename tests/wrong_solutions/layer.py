"""Near misses of the puzzles on the layer."""

import numpy as np


def always_from_the_start(q, k, v, chunk, attend):
    return np.concatenate(
        [attend(q[f : f + chunk], k[: f + chunk], v[: f + chunk], 0) for f in range(0, len(q), chunk)]
    )


def each_chunk_for_itself(q, k, v, chunk, attend):
    parts = (slice(f, f + chunk) for f in range(0, len(q), chunk))
    return np.concatenate([attend(q[p], k[p], v[p], 0) for p in parts])


def drops_the_short_chunk(q, k, v, chunk, attend):
    starts = range(0, len(q) - chunk + 1, chunk)
    return np.concatenate([q[:0], *(attend(q[f : f + chunk], k[: f + chunk], v[: f + chunk], f) for f in starts)])


def shows_the_future(q, k, v, chunk, attend):
    return np.concatenate([attend(q[f : f + chunk], k, v, f) for f in range(0, len(q), chunk)])


def _rotate(a, b, angle):
    return a * np.cos(angle) - b * np.sin(angle), b * np.cos(angle) + a * np.sin(angle)


def pairs_neighbours(x, position, theta):
    d = x.shape[1]
    out = np.empty_like(x)
    out[:, ::2], out[:, 1::2] = _rotate(x[:, ::2], x[:, 1::2], position * theta ** (-2 * np.arange(d // 2) / d))
    return out


def turns_the_other_way(x, position, theta):
    d = x.shape[1]
    angle = -position * theta ** (-2 * np.arange(d // 2) / d)
    return np.concatenate(_rotate(x[:, : d // 2], x[:, d // 2 :], angle), axis=1)


def half_the_exponent(x, position, theta):
    d = x.shape[1]
    angle = position * theta ** (-np.arange(d // 2) / d)
    return np.concatenate(_rotate(x[:, : d // 2], x[:, d // 2 :], angle), axis=1)


def counts_from_one(x, position, theta):
    d = x.shape[1]
    angle = (position + 1) * theta ** (-2 * np.arange(d // 2) / d)
    return np.concatenate(_rotate(x[:, : d // 2], x[:, d // 2 :], angle), axis=1)


def writes_the_padding(cache, lengths, new, n_new):
    for b, length in enumerate(lengths):
        room = cache.shape[1] - length
        cache[b, length : length + new.shape[1]] = new[b, :room]
    return cache, lengths + n_new


def one_offset_for_all(cache, lengths, new, n_new):
    for b, n in enumerate(n_new):
        room = cache.shape[1] - lengths.max()
        cache[b, lengths.max() : lengths.max() + n] = new[b, : min(n, room)]
    return cache, lengths + n_new


def counts_the_padding(cache, lengths, new, n_new):
    for b, (length, n) in enumerate(zip(lengths, n_new, strict=True)):
        cache[b, length : length + n] = new[b, :n]
    return cache, lengths + new.shape[1]


def takes_the_last_rows(cache, lengths, new, n_new):
    for b, (length, n) in enumerate(zip(lengths, n_new, strict=True)):
        cache[b, length : length + n] = new[b, new.shape[1] - n :]
    return cache, lengths + n_new


WRONG = {
    "prefill_in_chunks": [always_from_the_start, each_chunk_for_itself, drops_the_short_chunk, shows_the_future],
    "rope_at": [pairs_neighbours, turns_the_other_way, half_the_exponent, counts_from_one],
    "append_to_cache": [writes_the_padding, one_offset_for_all, counts_the_padding, takes_the_last_rows],
}
