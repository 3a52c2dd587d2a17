"""The work of every case, and the time below which the machine's measured ceilings do not let it go.

Work is counted for the operation as `gsa_fast` defines it, whatever a kernel does beyond it. P = L(L + 1)/2 is the
number of causal pairs, and a multiply-add is two operations. The time of a stage is that of its scarcest resource, as
if everything else overlapped perfectly; stages that follow one another add up.
"""

import math
from dataclasses import dataclass

from gsa_ref import GSAConfig

BF16, FP32, INT32 = 2, 4, 4  # bytes
TILE_ROWS = 64  # rows of a matrix instruction: 64/G queries × G heads


@dataclass(frozen=True)
class Ceilings:
    """Measured limits of the machine, per second; infinite, so that it never binds, where one was not measured.

    Attributes:
        matmul: bf16 matrix operations.
        copy: bytes read from and written to device memory.
        gather: bytes that random rows bring from the L2 cache to the cores.
        special: exponentials; a sigmoid is at least one such operation (a tanh).
    """

    matmul: float = math.inf
    copy: float = math.inf
    gather: float = math.inf
    special: float = math.inf


@dataclass(frozen=True)
class Work:
    """What a stage needs: matrix operations, special functions, bytes from device memory and from L2."""

    flop: float = 0.0
    special: float = 0.0
    memory_bytes: float = 0.0
    l2_bytes: float = 0.0

    def seconds(self, ceilings: Ceilings) -> float:
        """Time of the scarcest resource."""
        return max(
            self.flop / ceilings.matmul,
            self.special / ceilings.special,
            self.memory_bytes / ceilings.copy,
            self.l2_bytes / ceilings.gather,
        )


def pairs(L: int) -> float:
    """P: causal pairs of L queries and L keys."""
    return L * (L + 1) / 2


def tile_rows(config: GSAConfig) -> int:
    """Queries per union tile: 64/G, at least one, so that queries × heads of a group fill a matrix instruction."""
    return max(1, TILE_ROWS // (config.H // config.H_kv))


def indexer_work(L: int, config: GSAConfig) -> Work:
    """2·P·H_I·d_I matrix operations and P·H_I sigmoids; 4·L² bytes of scores are written, and inputs read."""
    c = config
    return Work(
        flop=2 * pairs(L) * c.H_I * c.d_I,
        special=pairs(L) * c.H_I,
        memory_bytes=FP32 * L * L + _indexer_inputs(L, c),
    )


def indexed_selection_work(L: int, config: GSAConfig) -> Work:
    """The indexer's operations and sigmoids; instead of scores, 4·L·min(k_max, L) bytes of indices are written."""
    c = config
    return Work(
        flop=2 * pairs(L) * c.H_I * c.d_I,
        special=pairs(L) * c.H_I,
        memory_bytes=INT32 * L * min(c.k_max, L) + _indexer_inputs(L, c),
    )


def _indexer_inputs(L: int, c: GSAConfig) -> float:
    return BF16 * L * (c.H_I * c.d_I + c.d_I + c.H_I)


def attention_work(L: int, config: GSAConfig, *, mean_k: float, union: float, output_gate: bool = False) -> Work:
    """Union tiles: B = 64/G queries share one pass over the U keys that any of them selected.

    A tile multiplies its B·G rows with U keys and U values for each of H_kv heads, 4·d_h·B·H·U operations, and gathers
    U rows of K and V once per head, 4·d_h·H_kv·U bytes from L2. There are L/B tiles. Without overlap (U = B·k) the
    bytes are those of a gather per query. From memory: q, the result, the indices, k, v and the gate's logits once.

    Args:
        mean_k: mean budget.
        union: mean U over tiles of `tile_rows(config)` queries.
        output_gate: whether G1 is applied.
    """
    c = config
    tiles = L / tile_rows(c)
    queries, keys = BF16 * L * c.H * c.d_h, BF16 * L * c.H_kv * c.d_h
    return Work(
        flop=tiles * 4 * c.d_h * tile_rows(c) * c.H * union,
        special=L * c.H * mean_k,
        memory_bytes=(3 if output_gate else 2) * queries + 2 * keys + INT32 * L * mean_k + FP32 * L * c.H,
        l2_bytes=tiles * 2 * BF16 * c.d_h * c.H_kv * union,
    )


def attention_backward_work(L: int, config: GSAConfig, *, mean_k: float, union: float, deterministic: bool) -> Work:
    """The tiles of `attention_work`, with five products instead of two, 10·d_h·B·H·U operations, and K and V again.

    What a tile gives to dk and dv, 2·d_h·H_kv·U numbers, is added in float32 in L2; or, in a fixed order, stored in 16
    bits and read once to be summed. From memory once: q, do, the output gate's logits, dout and the output; their
    gradients; k, v, and 2·d_h·H_kv float32 sums a key, written, read, and written in 16 bits.
    """
    c = config
    tiles = L / tile_rows(c)
    queries, keys = BF16 * L * c.H * c.d_h, BF16 * L * c.H_kv * c.d_h
    parts = tiles * 2 * c.d_h * c.H_kv * union
    return Work(
        flop=tiles * 10 * c.d_h * tile_rows(c) * c.H * union,
        special=L * c.H * (mean_k + c.d_h),
        memory_bytes=8 * queries + 2 * keys + 2 * (2 * FP32 + BF16) / BF16 * keys + deterministic * 2 * BF16 * parts,
        l2_bytes=BF16 * parts + (not deterministic) * FP32 * parts,
    )


def dense_backward_work(L: int, config: GSAConfig) -> Work:
    """Five products instead of two: 10·d_h·H·P operations; q, k, v, the result, its gradient and theirs once."""
    c = config
    return Work(
        flop=10 * c.d_h * c.H * pairs(L),
        special=c.H * pairs(L),
        memory_bytes=BF16 * L * c.d_h * (4 * c.H + 4 * c.H_kv),
    )


def gates_work(L: int, config: GSAConfig) -> Work:
    """G2 as one pass: v and its logits are read, v' is written. G1 is part of the attention."""
    return Work(special=L * config.H_kv * config.d_h, memory_bytes=3 * BF16 * L * config.H_kv * config.d_h)


def dense_work(L: int, config: GSAConfig) -> Work:
    """Causal dense attention: 4·d_h·H·P operations and H·P exponentials; q, k, v and the result once."""
    c = config
    return Work(
        flop=4 * c.d_h * c.H * pairs(L),
        special=c.H * pairs(L),
        memory_bytes=BF16 * L * c.d_h * 2 * (c.H + c.H_kv),
    )


def kl_loss_work(L: int, config: GSAConfig, *, mean_k: float | None = None, union: float = 0.0) -> Work:
    """The KL loss over n pairs: all P in the warm-up, without `mean_k`; else the L·k selected ones.

    A pair takes one attention logit per head, 2·d_h·H operations and H exponentials: once if the log-sum-exp is given,
    as in the sparse phase; twice in the warm-up, where it has to be known first, because to keep P·H logits would cost
    more than to compute them again. Then the score, 2·d_I·H_I operations and H_I sigmoids, and an exponential and a
    logarithm. From memory, all inputs once. In the sparse phase B = 64/G queries share one pass over the U keys that
    any of them selected, 2·(d_h·H_kv + d_I)·U bytes from L2.

    Args:
        mean_k: mean budget.
        union: mean U over tiles of `tile_rows(config)` queries.
    """
    c, sparse = config, mean_k is not None
    n = _kl_pairs(L, mean_k)
    logits = 1 if sparse else 2
    given = INT32 * n + FP32 * L * c.H if sparse else 0
    return Work(
        flop=n * 2 * (logits * c.d_h * c.H + c.d_I * c.H_I),
        special=n * (logits * c.H + c.H_I + 2),
        memory_bytes=BF16 * L * c.d_h * (c.H + c.H_kv) + _indexer_inputs(L, c) + given,
        l2_bytes=L / tile_rows(c) * BF16 * (c.d_h * c.H_kv + c.d_I) * union,
    )


def kl_gradients_work(L: int, config: GSAConfig, *, mean_k: float | None = None, union: float = 0.0) -> Work:
    """The gradients of the KL loss, with `kl_loss_work`: ∂L/∂I needs the scores again, once the student is normalised.

    Of each pair the scores, H_I sigmoids and an exponential, and two more products, for the gradients of queries and
    keys: 6·d_I·H_I operations. The teacher counts as kept at no cost. Gradients have the size of their inputs.
    """
    c, n = config, _kl_pairs(L, mean_k)
    return Work(
        flop=n * 6 * c.d_I * c.H_I,
        special=n * (c.H_I + 1),
        memory_bytes=2 * _indexer_inputs(L, c) + (0 if mean_k is None else INT32 * n),
        l2_bytes=L / tile_rows(c) * BF16 * c.d_I * union,
    )


def _kl_pairs(L: int, mean_k: float | None) -> float:
    return pairs(L) if mean_k is None else L * mean_k


def decode_work(B: int, N: int, S: int, config: GSAConfig, *, mean_k: float, union: float) -> Work:
    """One step of B sequences: N queries each, at the end of S keys. Its bytes are those that no kernel can spare.

    The indexer's keys once, 2·S·d_I bytes a sequence, and the rows of K and V that any of its queries selected once,
    4·d_h·H_kv·U bytes; queries, both kinds of logits, the result, log-sum-exp and variance. No index list: a fused
    kernel needs none. 2·N·S·H_I·d_I + 4·d_h·H·N·k operations.

    Args:
        mean_k: mean budget.
        union: mean size of the union of a sequence's selections; mean_k for one query.
    """
    c, rows = config, B * N
    queries = BF16 * rows * (3 * c.H * c.d_h + c.H_I * c.d_I + c.H_I) + FP32 * rows * (c.H + 1)
    return Work(
        flop=2 * rows * S * c.H_I * c.d_I + 4 * c.d_h * c.H * rows * mean_k,
        special=rows * (S * c.H_I + c.H * mean_k + c.H * c.d_h),
        memory_bytes=BF16 * B * (S * c.d_I + 2 * union * c.H_kv * c.d_h) + queries,
    )


def dense_decode_work(B: int, N: int, S: int, config: GSAConfig) -> Work:
    """Dense attention of N queries a sequence over all S keys: K and V once, 4·S·d_h·H_kv bytes a sequence."""
    c = config
    return Work(
        flop=4 * c.d_h * c.H * B * N * S,
        special=c.H * B * N * S,
        memory_bytes=2 * BF16 * B * c.d_h * (S * c.H_kv + N * c.H),
    )


def whole_seconds(stages: list[Work], ceilings: Ceilings) -> float:
    """Stages one after another."""
    return sum(stage.seconds(ceilings) for stage in stages)
