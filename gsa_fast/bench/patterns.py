"""Selections with a stated overlap between neighbouring queries, and inputs: drawn on the device, from a seed.

Nothing here holds an L×L array: rows are drawn in chunks, so that a million tokens need little beyond the result.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

import gsa_fast
from gsa_ref import GSAConfig, Selection
from gsa_ref.rope import apply_rope

GROUP = 64  # consecutive queries that share a part of their budget in a clustered pattern
SINKS = 4  # positions at the start that a window keeps
BUDGET_SPREAD = 0.25  # budgets of the groups lie within k_base·(1 ± this)
FRACTIONS = (0.98, 0.95, 0.87, 0.44)
SELECTIONS = ("random", *(f"clustered p={p}" for p in FRACTIONS), "window", "ties", "smooth")

CHUNK_GROUPS = 64
NOTHING = 2**31 - 1  # sorts behind every position

HIDDEN_WIDTH = 1024  # of the smooth hidden states
DECAY = 0.99
SMOOTH_BLOCK = 256
SMOOTH_CHUNK = 8192
# Standard deviation of what a layer with default-initialised projections makes of unit hidden states: their weights
# are uniform in ±1/√d, variance 1/(3d).
PROJECTED = 3**-0.5


def random_subset(n: Tensor, count: Tensor, width: int, generator: torch.Generator) -> Tensor:
    """For each row a random subset of {0, …, n−1} of `count` positions, ascending, then `NOTHING`.

    Slot j holds j + the j-th smallest of `count` uniform draws from {0, …, n − count}: distinct without rejection.
    Every position is drawn equally often but for a relative count/2n at the two ends.

    Args:
        n: int64 [R].
        count: int64 [R], at most n.
        width: slots, at least the largest count.

    Returns:
        int64 [R, width].
    """
    slot = torch.arange(width, device=n.device)
    empty = slot >= count[:, None]
    draw = torch.rand(len(n), width, device=n.device, generator=generator).masked_fill_(empty, 2.0).sort(-1)[0]
    room = (n - count)[:, None]
    offset = torch.minimum((draw * (room + 1)).long(), room)
    return (offset + slot).masked_fill_(empty, NOTHING)


def group_budgets(groups: int, k_base: int, device: torch.device, generator: torch.Generator) -> Tensor:
    """Budgets spread evenly over k_base·(1 ± BUDGET_SPREAD), in random order: their mean is k_base. int64 [groups]."""
    rank = torch.randperm(groups, device=device, generator=generator)
    return (k_base * (1 - BUDGET_SPREAD + 2 * BUDGET_SPREAD * (rank + 0.5) / groups)).round().long().clamp(min=1)


def clustered_selection(
    L: int, p: float, *, k_base: int, width: int, seed: int, device: str, offset: int | None = None
) -> Selection:
    """In each group of 64 consecutive queries a fraction p of every budget is common, the rest private and random.

    The common positions lie in the past of the group's first query, the private ones anywhere else in a query's own
    past. The queries of a group have one budget, min(k, t + 1) for query t, and the budgets' mean is k_base. The
    groups' boundaries lie at an offset that is random by default. p = 0 is the pattern "random".
    """
    where = torch.device(device)
    g = torch.Generator(where).manual_seed(seed)
    if offset is None:
        offset = int(torch.randint(GROUP, (), device=where, generator=g))
    groups = -(-(L + offset) // GROUP)
    budgets = group_budgets(groups, k_base, where, g)
    indices = torch.empty(1, L, width, dtype=torch.int32, device=where)
    counts = torch.empty(1, L, dtype=torch.int32, device=where)
    for first in range(0, groups, CHUNK_GROUPS):
        group = torch.arange(first, min(first + CHUNK_GROUPS, groups), device=where)
        t = group[:, None] * GROUP - offset + torch.arange(GROUP, device=where)  # [n, 64], outside [0, L) at the ends
        n_valid = (t + 1).clamp(min=0, max=L)
        budget = budgets[group].clamp(max=width)
        k = torch.minimum(budget[:, None], n_valid)
        n_common = (group * GROUP - offset).clamp(min=0) + 1  # keys that the whole group sees
        shared = torch.minimum((p * budget).round().long(), n_common)
        own = (k - shared[:, None]).clamp(min=0)  # 0 in the rows before the sequence
        common = random_subset(n_common, shared, int(shared.max()), g)  # [n, C]
        rank = random_subset((n_valid - shared[:, None]).clamp(min=0).flatten(), own.flatten(), int(own.max()), g)
        rank = rank.view(len(group), GROUP * rank.shape[1])  # among the positions that are not common
        private = rank
        if common.shape[1]:
            skipped = common - torch.arange(common.shape[1], device=where)  # positions before each that are not common
            private = torch.where(rank == NOTHING, NOTHING, rank + torch.searchsorted(skipped, rank, right=True))
        private = private.unflatten(1, (GROUP, private.shape[1] // GROUP))
        merged = private
        if common.shape[1]:
            merged = torch.cat((common[:, None].expand(-1, GROUP, -1), private), -1).to(torch.int32).sort(-1)[0]
        merged = merged[..., :width].masked_fill(merged[..., :width] == NOTHING, -1)
        inside = (t >= 0) & (t < L)
        rows = t[inside]
        chunk = indices[0, int(rows[0]) : int(rows[-1]) + 1]
        chunk[:, merged.shape[-1] :] = -1
        chunk[:, : merged.shape[-1]] = merged[inside]
        counts[0, rows] = k[inside].to(torch.int32)
    return Selection(indices, counts)


def placed_selection(
    L: int, *, k_base: int, width: int, sinks: int, recent: bool, device: str, rows: int = 8192
) -> Selection:
    """min(k_base, t + 1) positions: `sinks` at the start and the nearest ones, or without `recent` the lowest."""
    where = torch.device(device)
    slot = torch.arange(width, device=where)
    indices = torch.empty(1, L, width, dtype=torch.int32, device=where)
    k = torch.arange(1, L + 1, device=where).clamp(max=min(k_base, width))
    for first in range(0, L, rows):
        t = torch.arange(first, min(first + rows, L), device=where)[:, None]
        count = k[t]
        position = torch.where(slot < sinks, slot, t - count + 1 + slot) if recent else slot.expand(len(t), -1)
        indices[0, first : first + rows] = torch.where(slot < count, position, -1).to(torch.int32)
    return Selection(indices, k[None].to(torch.int32))


def draw_selection(name: str, L: int, *, k_base: int, width: int, seed: int, device: str) -> Selection:
    """A pattern of `SELECTIONS` other than "smooth", which comes from inputs, for L queries over L keys."""
    sizes: dict[str, Any] = {"k_base": k_base, "width": width, "device": device}
    if name == "window":
        return placed_selection(L, sinks=SINKS, recent=True, **sizes)
    if name == "ties":
        return placed_selection(L, sinks=0, recent=False, **sizes)
    if name == "random":
        return clustered_selection(L, 0.0, seed=seed, **sizes)
    if name.startswith("clustered p="):
        return clustered_selection(L, float(name.removeprefix("clustered p=")), seed=seed, **sizes)
    raise ValueError(f"name: expected one of {SELECTIONS[:-1]}, got {name!r}")


@dataclass(frozen=True)
class Overlap:
    """How much the selections of neighbouring queries share: means over sampled tiles of consecutive queries.

    Attributes:
        mean_k: mean count over all rows.
        union: mean size of the union of a tile's selections.
        union_over_k: mean of that size over the tile's mean count, U/k.
    """

    mean_k: float
    union: float
    union_over_k: float

    @property
    def sizes(self) -> dict[str, float]:
        """What `rooflines` takes of it."""
        return {"mean_k": self.mean_k, "union": self.union}


def union_sizes(positions: Tensor) -> Tensor:
    """How many different positions each row holds, negative ones aside: [R, n] to int64 [R]."""
    taken = positions.sort(-1)[0]
    new = taken >= 0
    new[:, 1:] &= taken[:, 1:] != taken[:, :-1]
    return new.sum(-1)


def measure_overlap(selection: Selection, rows: int, *, samples: int = 256, seed: int = 0) -> Overlap:
    """`Overlap` over up to `samples` random tiles of `rows` consecutive queries of sequence 0."""
    indices, counts = selection.indices[0], selection.counts[0]
    L, K = indices.shape
    rows = min(rows, L)
    tiles = L // rows
    chosen = torch.randperm(tiles, generator=torch.Generator().manual_seed(seed))[:samples].sort()[0].to(indices.device)
    sizes, ratios = [], []
    for tile in chosen.split(32):
        row = tile[:, None] * rows + torch.arange(rows, device=indices.device)
        size = union_sizes(indices[row].reshape(len(tile), rows * K)).double()
        sizes.append(size)
        ratios.append(size / counts[row].double().mean(-1))
    return Overlap(float(counts.double().mean()), float(torch.cat(sizes).mean()), float(torch.cat(ratios).mean()))


def effective_fraction(union_over_k: float, rows: int = 16) -> float:
    """p_eff = (B − U/k)/(B − 1): the common fraction at which B selections with no other overlap have this union."""
    return (rows - union_over_k) / (rows - 1)


def overlap_fields(of_16: Overlap) -> dict[str, float]:
    """What a record says of a selection, by the overlap over tiles of 16 queries."""
    return {
        "mean_k": of_16.mean_k,
        "union_over_k": of_16.union_over_k,
        "p_eff": effective_fraction(of_16.union_over_k),
    }


@dataclass(frozen=True)
class IndexerInputs:
    """Arguments of `indexed_selection`; V̄ is a tensor on the device, so that a call can be captured in a graph."""

    q_idx: Tensor
    k_idx: Tensor
    head_logits: Tensor
    bias: Tensor
    mean_variance: Tensor

    def scores_arguments(self) -> dict[str, Any]:
        return {"q_idx": self.q_idx, "k_idx": self.k_idx, "head_logits": self.head_logits, "bias": self.bias}

    def arguments(self) -> dict[str, Any]:
        return {**self.scores_arguments(), "mean_variance": self.mean_variance}


@dataclass(frozen=True)
class AttentionInputs:
    """Tensors of `sparse_attention` with both gates."""

    q: Tensor
    k: Tensor
    v: Tensor
    value_gate_logits: Tensor
    output_gate_logits: Tensor

    def gates(self) -> dict[str, Any]:
        return {"value_gate_logits": self.value_gate_logits, "output_gate_logits": self.output_gate_logits}


def random_indexer_inputs(
    L: int,
    config: GSAConfig,
    *,
    B: int = 1,
    S: int | None = None,
    constant: bool = False,
    seed: int,
    device: str,
    dtype: torch.dtype,
) -> IndexerInputs:
    """Normal inputs of the scale that a freshly initialised layer gives, or constant ones, whose scores are all equal.

    B sequences of L queries and S keys, by default one with as many keys as queries. V̄ is 0, unset;
    `with_mean_variance` sets it.
    """
    g = torch.Generator(device).manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        if constant:
            return torch.full(shape, PROJECTED, dtype=dtype, device=device)
        return torch.randn(shape, dtype=dtype, device=device, generator=g) * PROJECTED

    c = config
    bias = torch.zeros(c.H_I, device=device)
    if not constant:
        bias = 0.1 * torch.randn(c.H_I, device=device, generator=g)
    tensors = draw(B, L, c.H_I, c.d_I), draw(B, L if S is None else S, c.d_I), draw(B, L, c.H_I)
    return IndexerInputs(*tensors, bias, torch.zeros((), device=device))


def random_attention_inputs(
    L: int, config: GSAConfig, *, seed: int, device: str, dtype: torch.dtype
) -> AttentionInputs:
    """Normal queries, keys, values and gate logits."""
    g = torch.Generator(device).manual_seed(seed)
    c = config
    q, k, v, value_gate, output_gate = (
        torch.randn(1, L, heads, c.d_h, dtype=dtype, device=device, generator=g)
        for heads in (c.H, c.H_kv, c.H_kv, c.H_kv, c.H)
    )
    return AttentionInputs(q, k, v, value_gate, output_gate)


def smooth_hidden_states(L: int, width: int, *, seed: int, device: str) -> Iterator[tuple[int, Tensor]]:
    """h_t = .99 h_{t−1} + √(1 − .99²) ξ_t in chunks of rows: (first row, float32 [rows, width])."""
    g = torch.Generator(device).manual_seed(seed)
    state = torch.randn(1, width, device=device, generator=g)
    step = torch.arange(SMOOTH_BLOCK, device=device)
    lag = (step[:, None] - step).clamp(min=0)
    mix = (1 - DECAY**2) ** 0.5 * (DECAY**lag).tril()  # a block is mix ξ + decay · (the last row before it)
    decay = (DECAY ** (step + 1.0))[:, None]
    for first in range(0, L, SMOOTH_CHUNK):
        blocks = []
        for _ in range(-(-min(SMOOTH_CHUNK, L - first) // SMOOTH_BLOCK)):
            noise = torch.randn(SMOOTH_BLOCK, width, device=device, generator=g)
            blocks.append(mix @ noise + decay * state)
            state = blocks[-1][-1:]
        yield first, torch.cat(blocks)[: L - first]


def smooth_projections(
    L: int, heads: dict[str, tuple[int, int]], *, seed: int, device: str, dtype: torch.dtype, rope_theta: float
) -> dict[str, Tensor]:
    """Random projections of the smooth hidden states: [1, L, heads, width] for each name; q and k are turned by RoPE.

    The weights have the variance of `gsa_ref.GatedSparseAttention`'s. A projection's seed depends on its name only.
    """
    out, weights = {}, {}
    for name, (n, width) in heads.items():
        own = torch.Generator(device).manual_seed(seed + 1 + sum(name.encode()))
        weight = torch.randn(n * width, HIDDEN_WIDTH, device=device, generator=own)
        weights[name] = (weight * (PROJECTED * HIDDEN_WIDTH**-0.5)).to(dtype).T
        out[name] = torch.empty(1, L, n, width, dtype=dtype, device=device)
    for first, h in smooth_hidden_states(L, HIDDEN_WIDTH, seed=seed, device=device):
        for name, weight in weights.items():
            rows = (h.to(dtype) @ weight).unflatten(-1, heads[name])[None]
            if name in ("q", "k"):
                rows = apply_rope(rows, start=first, theta=rope_theta)
            out[name][:, first : first + len(h)] = rows
    return out


def smooth_indexer_inputs(L: int, config: GSAConfig, *, seed: int, device: str, dtype: torch.dtype) -> IndexerInputs:
    """What a freshly initialised indexer makes of smooth hidden states. V̄ is 0, unset."""
    c = config
    heads = {"q_idx": (c.H_I, c.d_I), "k_idx": (1, c.d_I), "head_logits": (1, c.H_I)}
    found = smooth_projections(L, heads, seed=seed, device=device, dtype=dtype, rope_theta=c.rope_theta)
    bias, mean_variance = torch.zeros(c.H_I, device=device), torch.zeros((), device=device)
    return IndexerInputs(found["q_idx"], found["k_idx"][:, :, 0], found["head_logits"][:, :, 0], bias, mean_variance)


def smooth_attention_inputs(
    L: int, config: GSAConfig, *, seed: int, device: str, dtype: torch.dtype
) -> AttentionInputs:
    """What a freshly initialised layer's other projections make of the same hidden states."""
    c = config
    heads = dict.fromkeys(("q", "output_gate_logits"), (c.H, c.d_h))
    heads |= dict.fromkeys(("k", "v", "value_gate_logits"), (c.H_kv, c.d_h))
    return AttentionInputs(
        **smooth_projections(L, heads, seed=seed, device=device, dtype=dtype, rope_theta=c.rope_theta)
    )


def with_mean_variance(inputs: IndexerInputs, config: GSAConfig, impl: str = "triton") -> IndexerInputs:
    """The same inputs with V̄ set to their mean variance, so that the mean budget is near k_base."""
    _, variance = gsa_fast.indexed_selection(**inputs.arguments(), config=config, impl=impl)
    return replace(inputs, mean_variance=variance.mean())
