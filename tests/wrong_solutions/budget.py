"""Near misses of the puzzles on the budget."""

import math


def _ratio(variance, mean_variance, rule):
    if rule == "fixed" or mean_variance == 0:
        return 1
    if rule == "proportional":
        return variance / mean_variance
    return mean_variance / variance if variance > 0 else math.inf


def clamps_last(variance, mean_variance, n_valid, k_base, k_min, k_max, rule):
    k = min(k_base * _ratio(variance, mean_variance, rule), n_valid)
    return math.floor(min(max(k, k_min), k_max))


def divides_by_an_unset_mean(variance, mean_variance, n_valid, k_base, k_min, k_max, rule):
    ratio = variance / mean_variance if rule == "proportional" else _ratio(variance, mean_variance, rule)
    return min(math.floor(min(max(k_base * ratio, k_min), k_max)), n_valid)


def rounds(variance, mean_variance, n_valid, k_base, k_min, k_max, rule):
    return min(round(min(max(k_base * _ratio(variance, mean_variance, rule), k_min), k_max)), n_valid)


def one_direction(variance, mean_variance, n_valid, k_base, k_min, k_max, rule):
    ratio = _ratio(variance, mean_variance, "fixed" if rule == "fixed" else "proportional")
    return min(math.floor(min(max(k_base * ratio, k_min), k_max)), n_valid)


def nothing_for_a_constant_row(variance, mean_variance, n_valid, k_base, k_min, k_max, rule):
    ratio = 0 if variance == 0 and rule == "inverse" else _ratio(variance, mean_variance, rule)
    return min(math.floor(min(max(k_base * ratio, k_min), k_max)), n_valid)


def _counts(x):
    return not math.isnan(x) and x != -math.inf


def through_the_sum_of_squares(n, mean, m2, x):
    if not _counts(x):
        return n, mean, m2
    new = (n * mean + x) / (n + 1)
    return n + 1, new, m2 + n * mean**2 + x * x - (n + 1) * new**2


def squares_the_old_distance(n, mean, m2, x):
    return (n + 1, mean + (x - mean) / (n + 1), m2 + (x - mean) ** 2) if _counts(x) else (n, mean, m2)


def counts_nan(n, mean, m2, x):
    if x == -math.inf:
        return n, mean, m2
    new = mean + (x - mean) / (n + 1)
    return n + 1, new, m2 + (x - mean) * (x - new)


def counts_masked_as_zero(n, mean, m2, x):
    if math.isnan(x):
        return n, mean, m2
    return counts_nan(n, mean, m2, 0.0 if x == -math.inf else x)


WRONG = {
    "budget_of_a_row": [
        clamps_last,
        divides_by_an_unset_mean,
        rounds,
        one_direction,
        nothing_for_a_constant_row,
    ],
    "one_more_score": [through_the_sum_of_squares, squares_the_old_distance, counts_nan, counts_masked_as_zero],
}
