"""What attention costs: operations, bytes and parameters, counted from the sizes of a `GSAConfig`.

Products are counted in multiply-adds; a multiply-add is two floating-point operations (FLOP). There are two counts. The
*printed* one takes the paper's order of growth L²·d_I·H_I + L·k·d (second-hand) with all constants 1. The *full* one
has every product: attention makes two, q·k and p·v, the indexer one; a query sees the keys s ≤ t only.

All counts are exact integers or fractions, for one sequence that starts at position 0. Query t reads min(k, t + 1)
tokens.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from fractions import Fraction

from gsa_ref._arguments import check_int, check_number
from gsa_ref.config import GSAConfig

INDEX_BYTES = 4  # int32 indices of the selection


# ---- the printed count -----------------------------------------------------------------------------------------------


def printed_speedup(L: int, config: GSAConfig, *, k: int | None = None) -> Fraction:
    r"""The order of growth read as a count: dense attention over GSA.

    $$ \frac{L^2 d}{L^2 H_I d_I + L k d} = \frac{L d}{L H_I d_I + k d} $$

    Source: the paper's complexity O(L²·d_I·H_I + L·k·d), second-hand; its reading as a ratio is ours. It gives the
    published "12–16×" at 128K exactly, so that range is a count and not a measured time.

    Args:
        L: length in tokens.
        k: tokens per query; default k_base.

    Raises:
        TypeError: L or k is not an int.
        ValueError: L or k is below 1.
    """
    check_int("L", L, 1)
    return Fraction(L * config.d, L * config.H_I * config.d_I + _budget(k, config) * config.d)


def printed_speedup_limit(config: GSAConfig) -> Fraction:
    r"""What `printed_speedup` tends to for L → ∞, whatever k: \( d / (H_I d_I) \). Derived here."""
    return Fraction(config.d, config.H_I * config.d_I)


def printed_crossover(config: GSAConfig, *, k: int | None = None) -> Fraction | None:
    r"""The length at which the printed count of GSA equals that of dense attention; below it GSA costs more.

    $$ L^2 d = L^2 H_I d_I + L k d \;\Longleftrightarrow\; L = \frac{k d}{d - H_I d_I} $$

    Derived here. None if H_I·d_I ≥ d: then the indexer alone costs as much as dense attention.
    """
    c = config
    return Fraction(_budget(k, c) * c.d, c.d - c.H_I * c.d_I) if c.d > c.H_I * c.d_I else None


def printed_indexer_share(L: int, config: GSAConfig, *, k: int | None = None) -> Fraction:
    r"""The indexer's share of the printed count of GSA. It is ½ at \( L = k d / (H_I d_I) \). Derived here.

    $$ \frac{L H_I d_I}{L H_I d_I + k d} $$

    Raises:
        TypeError, ValueError: as in `printed_speedup`.
    """
    check_int("L", L, 1)
    indexer = L * config.H_I * config.d_I
    return Fraction(indexer, indexer + _budget(k, config) * config.d)


def cost_line(speedups: Mapping[int, Fraction | float]) -> tuple[float, float]:
    r"""Least-squares line through the costs relative to dense attention, \( 1/\text{speed-up}(k) \approx a + b\,k \).

    The printed count is such a line: \( a = H_I d_I / d \), the indexer, and \( b = 1/L \). Fitted to a table of
    speed-ups, 1/a is the speed that the table implies for k → 0. Derived here.

    Args:
        speedups: speed-up over dense attention for each k; at least two.

    Returns:
        (a, b).

    Raises:
        ValueError: fewer than two budgets.
    """
    if len(speedups) < 2:
        raise ValueError(f"speedups: expected at least two budgets, got {len(speedups)}")
    costs = {k: 1 / float(s) for k, s in speedups.items()}
    mean_k, mean_cost = sum(costs) / len(costs), sum(costs.values()) / len(costs)
    slope = sum((k - mean_k) * (c - mean_cost) for k, c in costs.items()) / sum((k - mean_k) ** 2 for k in costs)
    return mean_cost - slope * mean_k, slope


# ---- the full count --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Work:
    """What a stage needs at least.

    Attributes:
        multiply_adds: multiply-adds of its matrix products.
        special: sigmoids and exponentials, which run on another unit.
        bytes: every input read once and every result written once.
    """

    multiply_adds: int = 0
    special: int = 0
    bytes: int = 0

    @property
    def flops(self) -> int:
        """Floating-point operations: two for each multiply-add."""
        return 2 * self.multiply_adds

    @property
    def intensity(self) -> float:
        """FLOP per byte."""
        return self.flops / self.bytes

    def __add__(self, other: "Work") -> "Work":
        return Work(self.multiply_adds + other.multiply_adds, self.special + other.special, self.bytes + other.bytes)

    def seconds(self, *, flops_per_second: float, bytes_per_second: float) -> float:
        r"""Roofline time: that of the scarcer resource, as if the other were free.

        $$ \max\!\Big(\frac{\text{FLOP}}{\text{FLOP/s}},\; \frac{\text{bytes}}{\text{bytes/s}}\Big) $$

        Source: Williams, Waterman, Patterson, "Roofline", CACM 52(4), 2009. Special functions are left out.

        Args:
            flops_per_second, bytes_per_second: peak rates of the device.

        Raises:
            TypeError, ValueError: a rate is not a number, or not positive.
        """
        check_number("flops_per_second", flops_per_second, positive=True)
        check_number("bytes_per_second", bytes_per_second, positive=True)
        return max(self.flops / flops_per_second, self.bytes / bytes_per_second)


def causal_pairs(L: int) -> int:
    r"""Pairs of a query and a key that it sees: \( P = \sum_{t=0}^{L-1} (t + 1) = L (L + 1) / 2 \)."""
    return L * (L + 1) // 2


def selected_pairs(L: int, k: int) -> int:
    r"""Pairs of a query and a key that it selects: \( \sum_{t=0}^{L-1} \min(k, t + 1) \)."""
    return causal_pairs(min(k, L)) + max(L - k, 0) * k


def dense_attention_work(L: int, config: GSAConfig, *, element_bytes: int = 2) -> Work:
    r"""Causal attention over everything: \( 2 P H d_h \) multiply-adds, two products of width d_h per pair and head."""
    c = config
    inout = 2 * L * c.d_h * (c.H + c.H_kv) * element_bytes
    return Work(2 * causal_pairs(L) * c.H * c.d_h, causal_pairs(L) * c.H, inout)


def sparse_attention_work(L: int, config: GSAConfig, *, k: int | None = None, element_bytes: int = 2) -> Work:
    r"""Attention over the selected tokens: \( 2 H d_h \sum_t \min(k, t + 1) \) multiply-adds.

    The bytes suppose that a key or value, once read, serves all queries that select it; `gathered_bytes` supposes the
    opposite.
    """
    c, pairs = config, selected_pairs(L, _budget(k, config))
    inout = 2 * L * c.d_h * (c.H + c.H_kv) * element_bytes
    return Work(2 * pairs * c.H * c.d_h, pairs * c.H, inout + INDEX_BYTES * pairs)


def gathered_bytes(L: int, config: GSAConfig, *, k: int | None = None, element_bytes: int = 2) -> int:
    r"""Bytes of keys and values if every query reads its own: \( 2 H_{kv} d_h \sum_t \min(k, t + 1) \) numbers."""
    return 2 * config.H_kv * config.d_h * selected_pairs(L, _budget(k, config)) * element_bytes


def indexer_work(L: int, config: GSAConfig, *, element_bytes: int = 2) -> Work:
    r"""Eq. 7 for every pair: \( P H_I d_I \) multiply-adds and \( P H_I \) sigmoids. Scores are not written."""
    c, pairs = config, causal_pairs(L)
    return Work(pairs * c.H_I * c.d_I, pairs * c.H_I, L * (c.H_I * c.d_I + c.d_I + c.H_I) * element_bytes)


def projections_work(L: int, config: GSAConfig, *, element_bytes: int = 2) -> Work:
    """One multiply-add for each weight and token; the parameters, h and o, and what is computed of them, once."""
    c, parameters = config, sum(parameter_counts(config).values())
    queries, keys = c.H * c.d_h, c.H_kv * c.d_h
    biases = c.value_gate * keys + c.output_gate * queries + c.sparse * c.H_I
    outputs = queries + 2 * keys + c.d + c.value_gate * keys + c.output_gate * queries
    outputs += c.sparse * (c.H_I * c.d_I + c.d_I + c.H_I)
    return Work(L * (parameters - biases), 0, (parameters + L * (c.d + queries + outputs)) * element_bytes)


def core_work(L: int, config: GSAConfig, *, k: int | None = None, element_bytes: int = 2) -> Work:
    """What lies between the projections: indexer and sparse attention, or dense attention. Gates are elementwise."""
    if not config.sparse:
        return dense_attention_work(L, config, element_bytes=element_bytes)
    sparse = sparse_attention_work(L, config, k=k, element_bytes=element_bytes)
    return indexer_work(L, config, element_bytes=element_bytes) + sparse


def core_crossover(config: GSAConfig, *, k: int | None = None) -> int | None:
    r"""The smallest length at which GSA needs fewer multiply-adds than dense attention, by the full count.

    $$ 2 H d_h \Big(P - \sum_t \min(k, t + 1)\Big) > P\, H_I d_I $$

    Up to L = k nothing is left out, so there is always a stretch where the indexer is a pure loss. Derived here.
    None if the indexer never pays: H_I·d_I ≥ 2·H·d_h.
    """
    c, k = config, _budget(k, config)

    def saves(L: int) -> bool:
        left_out = causal_pairs(L) - selected_pairs(L, k)
        return 2 * c.H * c.d_h * left_out > causal_pairs(L) * c.H_I * c.d_I

    if c.H_I * c.d_I >= 2 * c.H * c.d_h:
        return None
    low, high = k, 2 * k
    while not saves(high):  # the saving, over P, grows with L
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if saves(middle) else (middle, high)
    return high


def decode_work(S: int, config: GSAConfig, *, k: int | None = None, element_bytes: int = 2) -> Work:
    r"""One new token behind S − 1 others, between the projections: every cached number that is needed, once.

    Dense: \( 2 S H_{kv} d_h \) numbers. GSA: \( S d_I \) for the scores, \( 2 k H_{kv} d_h \) for attention.
    """
    c = config
    read = min(_budget(k, c), S) if c.sparse else S
    work = Work(2 * read * c.H * c.d_h, read * c.H, 2 * (read * c.H_kv * c.d_h + c.H * c.d_h) * element_bytes)
    if not c.sparse:
        return work
    return work + Work(S * c.H_I * c.d_I, S * c.H_I, (S * c.d_I + c.H_I * c.d_I + c.H_I) * element_bytes)


# ---- parameters ------------------------------------------------------------------------------------------------------


def parameter_counts(config: GSAConfig) -> dict[str, int]:
    """Parameters of `GatedSparseAttention(config)` by part: attention, value_gate, output_gate, indexer."""
    c = config
    return {
        "attention": 2 * c.d * c.H * c.d_h + 2 * c.d * c.H_kv * c.d_h,
        "value_gate": c.value_gate * (c.d + 1) * c.H_kv * c.d_h,
        "output_gate": c.output_gate * (c.d + 1) * c.H * c.d_h,
        "indexer": c.sparse * (c.d * (c.H_I * c.d_I + c.d_I + c.H_I) + c.H_I),
    }


def parameter_overhead(config: GSAConfig, *, others: int = 0) -> Fraction:
    """Parameters of gates and indexer over those of the dense layer and `others` (a feed-forward block, say).

    The published figure is 4.4% (second-hand), without a word on what it is a share of.

    Raises:
        TypeError, ValueError: `others` is not an int, or negative.
    """
    check_int("others", others, 0)
    counts = parameter_counts(config)
    dense = counts.pop("attention")
    return Fraction(sum(counts.values()), dense + others)


def _budget(k: int | None, config: GSAConfig) -> int:
    if k is None:
        return config.k_base
    check_int("k", k, 1)
    return k
