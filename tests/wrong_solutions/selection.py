"""Near misses of the puzzles on the selection."""

import numpy as np


def takes_all_ties(scores, k):
    visible = np.sort(scores[scores != -np.inf])[::-1]
    threshold = visible[min(k, len(visible)) - 1]
    return threshold, np.count_nonzero(visible == threshold)


def counts_masked_scores(scores, k):
    threshold = np.sort(scores)[::-1][min(k, len(scores)) - 1]
    return threshold, min(k, len(scores)) - np.count_nonzero(scores > threshold)


def counts_equal_scores_once(scores, k):
    visible = np.unique(scores[scores != -np.inf])[::-1]
    threshold = visible[min(k, len(visible)) - 1]
    return threshold, 1


def the_first_that_is_left_out(scores, k):
    visible = np.sort(scores[scores != -np.inf])[::-1]
    threshold = visible[min(k, len(visible) - 1)]
    return threshold, min(k, len(visible)) - np.count_nonzero(visible > threshold)


def _pairs(selected, scores):
    outside = np.setdiff1d(np.arange(len(scores)), selected)
    return selected[:, None], outside[None, :], scores[selected][:, None], scores[outside][None, :]


def only_the_exact_selection(selected, scores, epsilon):
    i, o, inside, outside = _pairs(selected, scores)
    return bool(((inside > outside) | ((inside == outside) & (i < o))).all())


def allows_one_epsilon(selected, scores, epsilon):
    i, o, inside, outside = _pairs(selected, scores)
    return bool(((inside + epsilon > outside) | ((inside + epsilon == outside) & (i < o))).all())


def accepts_every_tie(selected, scores, epsilon):
    _, _, inside, outside = _pairs(selected, scores)
    return bool((inside + epsilon >= outside - epsilon).all())


def refuses_every_tie(selected, scores, epsilon):
    _, _, inside, outside = _pairs(selected, scores)
    return bool((inside + epsilon > outside - epsilon).all())


def looks_at_the_extremes(selected, scores, epsilon):
    i, o, inside, outside = _pairs(selected, scores)
    if o.size == 0:
        return True
    low, high = inside.min() + epsilon, outside.max() - epsilon
    return bool(low > high or (low == high and i[inside.argmin(), 0] < o[0, outside.argmax()]))


WRONG = {
    "threshold_and_ties": [
        takes_all_ties,
        counts_masked_scores,
        counts_equal_scores_once,
        the_first_that_is_left_out,
    ],
    "could_be_right": [
        only_the_exact_selection,
        allows_one_epsilon,
        accepts_every_tie,
        refuses_every_tie,
        looks_at_the_extremes,
    ],
}
