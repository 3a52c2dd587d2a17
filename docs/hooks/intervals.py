"""Confidence intervals of the tables: of a mean over seeds, of a rate of rare events."""

import math
from collections.abc import Callable, Sequence
from statistics import fmean, stdev


def t_interval(values: Sequence[float], level: float = 0.95) -> tuple[float, float, float]:
    """Mean and Student's interval of independent values: (mean, low, high).

    Raises:
        ValueError: there are fewer than two values.
    """
    if len(values) < 2:
        raise ValueError(f"values: expected at least two, got {len(values)}")
    half = t_quantile((1 + level) / 2, len(values) - 1) * stdev(values) / math.sqrt(len(values))
    mean = fmean(values)
    return mean, mean - half, mean + half


def t_quantile(p: float, freedom: int) -> float:
    """The quantile of Student's distribution at p > 1/2."""
    return _solve(lambda x: t_within(x, freedom) < 2 * p - 1, 1e4)


def t_within(x: float, freedom: int) -> float:
    """P(|T| ≤ x) of Student's distribution, by its finite series in θ = arctan(x/√ν) for an integer ν."""
    theta = math.atan(x / math.sqrt(freedom))
    term = math.cos(theta) if freedom % 2 else 1.0
    total = 0.0
    for i in range(freedom % 2 + 2, freedom + 1, 2):
        total += term
        term *= math.cos(theta) ** 2 * (i - 1) / i
    series = math.sin(theta) * total
    return 2 / math.pi * (theta + series) if freedom % 2 else series


def poisson_interval(count: int, level: float = 0.95) -> tuple[float, float]:
    """The exact (Garwood) interval of a Poisson mean of which `count` was seen."""
    tail = (1 - level) / 2

    def below(mean: float, n: int) -> float:  # P(N ≤ n)
        return math.exp(-mean) * sum(mean**k / math.factorial(k) for k in range(n + 1))

    most = count + 20 + 10 * math.sqrt(count + 1)
    lower = _solve(lambda mean: 1 - below(mean, count - 1) < tail, most) if count else 0.0
    return lower, _solve(lambda mean: below(mean, count) > tail, most)


def _solve(is_below: Callable[[float], bool], most: float) -> float:
    """Where a condition that holds from 0 on ends, up to `most`."""
    low, high = 0.0, most
    for _ in range(100):
        middle = (low + high) / 2
        low, high = (middle, high) if is_below(middle) else (low, middle)
    return (low + high) / 2
