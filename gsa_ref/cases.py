"""Named, reproducible inputs for every stem, and the hypothesis strategies that draw them.

A case is a small frozen dataclass of sizes, a dtype, a family of values, a memory layout and a seed. It builds its
tensors on the CPU from the seed, so that a failing case printed on one machine is the same case on another. The tests,
`python -m gsa_fast verify` and the puzzle checker all draw from here.
"""

import dataclasses
import json
import math
from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any, ClassVar

import torch
from hypothesis import strategies as st
from torch import Tensor

from gsa_ref.attention import sparse_attention
from gsa_ref.config import GSAConfig
from gsa_ref.selection import Selection

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16, "float64": torch.float64}
VALUES = ("normal", "ties", "constant", "huge", "tiny", "smooth")
SELECTED_VALUES = (*VALUES, "nan", "closed")  # what a NaN does to a selection is defined
SCORES = ("normal", "ties", "constant", "special", "near", "nan")
PHASES = ("warm_up", "sparse", "sparse_lse")
PATTERNS = ("random", "window", "full", "holes", "empty")
LAYOUTS = ("contiguous", "permuted", "margins")


@dataclass(frozen=True)
class Limits:
    """Largest sizes that a strategy may draw. The defaults suit the Triton interpreter."""

    B: int = 2
    L: int = 12
    S: int = 40
    heads: int = 2
    group: int = 4
    width: int = 40
    channels: int = 128  # of a head
    lengths: tuple[int, ...] = ()  # if given, L is drawn from these instead


def draw_values(kind: str, shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    """float32 values of one of the families in `VALUES` or `SELECTED_VALUES`."""
    x = torch.randn(shape, generator=generator)
    if kind == "nan":  # one vector of ten
        x[..., 0].masked_fill_(torch.rand(shape[:-1], generator=generator) < 0.1, math.nan)
        return x
    if kind == "closed":  # in one vector of three; of head logits: a weight of exactly 0 in float32
        x[..., 0].masked_fill_(torch.rand(shape[:-1], generator=generator) < 1 / 3, -200.0)
        return x
    if kind == "ties":
        return x.clamp(-1, 1).round()
    if kind == "constant":
        return torch.ones(shape)
    if kind == "smooth":  # neighbours along the length axis resemble one another, as hidden states do
        return x.cumsum(1) / math.sqrt(max(shape[1], 1))
    return x * {"normal": 1.0, "huge": 30.0, "tiny": 1e-3}[kind]


def lay_out(x: Tensor, layout: str) -> Tensor:
    """The same values with other strides: "permuted" swaps two axes in memory, "margins" surrounds x by poison.

    The margin is NaN for floating-point tensors and 0, a legal position, for integers: a read outside x shows. Of a
    vector, "permuted" takes every second element of one twice as long, with poison between them.
    """
    if layout == "contiguous" or x.dim() == 0:
        return x.contiguous()
    if layout == "permuted" and x.dim() > 1:
        a, b = (0, 1) if x.dim() == 2 else (1, 2)
        return x.transpose(a, b).contiguous().transpose(a, b)
    poison = math.nan if x.is_floating_point() else 0
    if layout == "permuted":
        return torch.stack((x, torch.full_like(x, poison)), 1)[:, 0]
    big = torch.full([n + 2 for n in x.shape], poison, dtype=x.dtype, device=x.device)
    inner = big[tuple(slice(1, -1) for _ in x.shape)]
    inner.copy_(x)
    return inner


def random_selection(pattern: str, B: int, L: int, S: int, width: int, generator: torch.Generator) -> Selection:
    """A selection of the last L of S positions, with a count per row.

    "full" takes every visible position (as many as fit), "window" the nearest, "random" a random subset, "empty" leaves
    every second row empty, "holes" puts −1 and future positions into the prefix, where the contract calls them empty.
    """
    n_valid = (torch.arange(L) + S - L + 1).clamp(max=S).expand(B, L)
    most = n_valid.clamp(max=width)
    if pattern in ("full", "window"):
        counts = most
    else:
        counts = (torch.rand(B, L, generator=generator) * most).long() + 1
        if pattern == "empty":
            counts = counts * (torch.arange(L) % 2)
    slot = torch.arange(width)
    if pattern == "window":
        index = (n_valid - counts)[..., None] + slot
    else:  # slot + (ascending offsets in [0, n − count]) is a random ascending subset
        room = (n_valid - counts + 1)[..., None]
        offset = (torch.rand(B, L, width, generator=generator) * room).long()
        offset = offset.masked_fill(slot >= counts[..., None], S).sort(-1)[0]
        index = slot + offset
    if pattern == "holes":
        dice = torch.rand(B, L, width, generator=generator)
        index = torch.where(dice < 0.2, -1, index)
        index = torch.where((dice > 0.9) & (slot == counts[..., None] - 1), n_valid[..., None], index)
    index = index.masked_fill(slot >= counts[..., None], -1)
    return Selection(index.to(torch.int32), counts.to(torch.int32))


@dataclass(frozen=True)
class Case:
    """Base of all cases: JSON in, JSON out."""

    stem: ClassVar[str]

    def to_json(self) -> str:
        return json.dumps({"stem": self.stem, **dataclasses.asdict(self)})

    @staticmethod
    def from_json(text: str) -> "Case":
        """The case that `to_json` wrote.

        Raises:
            ValueError: not JSON, an unknown stem, or unknown or missing fields.
        """
        try:
            given = json.loads(text)
        except json.JSONDecodeError as error:
            raise ValueError(f"case: expected JSON, got {text!r} ({error})") from None
        stem = given.pop("stem", None) if isinstance(given, dict) else None
        if not isinstance(stem, str) or stem not in CASES:
            raise ValueError(f"case: expected a stem of {sorted(CASES)}, got {stem!r}")
        expected = {f.name for f in fields(CASES[stem])}
        if set(given) != expected:
            raise ValueError(f"case: expected the fields {sorted(expected)}, got {sorted(given)}")
        values = {name: tuple(v) if isinstance(v, list) else v for name, v in given.items()}
        return CASES[stem](**values)

    def generator(self) -> torch.Generator:
        return torch.Generator().manual_seed(self.seed)  # type: ignore[attr-defined]


@dataclass(frozen=True)
class IndexerCase(Case):
    """Inputs of `indexer_scores`."""

    stem: ClassVar[str] = "indexer"
    B: int
    L: int
    S: int
    H_I: int
    d_I: int
    start: int | tuple[int, ...]
    lengths: tuple[int, ...] | None
    dtype: str
    values: str
    layout: str
    seed: int

    def arguments(self, device: str = "cpu") -> dict[str, Any]:
        g, dtype = self.generator(), DTYPES[self.dtype]
        shapes = {
            "q_idx": (self.B, self.L, self.H_I, self.d_I),
            "k_idx": (self.B, self.S, self.d_I),
            "head_logits": (self.B, self.L, self.H_I),
        }
        tensors = {
            name: lay_out(draw_values(self.values, shape, g).to(dtype).to(device), self.layout)
            for name, shape in shapes.items()
        }
        return {
            **tensors,
            "bias": lay_out(torch.randn(self.H_I, generator=g).to(device), self.layout),
            "start": _int32(self.start, device) if isinstance(self.start, tuple) else self.start,
            "lengths": None if self.lengths is None else _int32(self.lengths, device),
        }

    @property
    def scale(self) -> float:
        return self.d_I**-0.5


@dataclass(frozen=True)
class IndexedSelectionCase(IndexerCase):
    """Inputs of `indexed_selection`: those of the indexer, the running mean and the budget's sizes."""

    stem: ClassVar[str] = "indexed_selection"
    mean_variance: float
    k_base: int
    k_min: int
    k_max: int
    rule: str

    @property
    def config(self) -> GSAConfig:
        return GSAConfig(
            H_I=self.H_I,
            d_I=self.d_I,
            k_base=self.k_base,
            k_min=self.k_min,
            k_max=self.k_max,
            rule=self.rule,  # type: ignore[arg-type]
        )


@dataclass(frozen=True)
class BudgetCase(Case):
    """Inputs of `score_variance` and `token_budget`: causal scores around `mean`, with spread `std`."""

    stem: ClassVar[str] = "budget"
    B: int
    L: int
    S: int
    mean: float
    std: float
    mean_variance: float
    k_base: int
    k_min: int
    k_max: int
    rule: str
    values: str
    layout: str
    seed: int

    def scores(self, device: str = "cpu") -> Tensor:
        x = draw_scores(self.values, (self.B, self.L, self.S), self.generator())
        return lay_out(causal(x * self.std + self.mean).to(device), self.layout)


@dataclass(frozen=True)
class SelectionCase(Case):
    """Inputs of `select_tokens`."""

    stem: ClassVar[str] = "selection"
    B: int
    L: int
    S: int
    width: int
    values: str
    layout: str
    seed: int

    def arguments(self, device: str = "cpu") -> tuple[Tensor, Tensor]:
        """Scores and a budget per row: from 0 to a little more than the row holds."""
        g = self.generator()
        scores = causal(draw_scores(self.values, (self.B, self.L, self.S), g))
        budget = torch.randint(0, self.S + 3, (self.B, self.L), generator=g, dtype=torch.int32)
        return lay_out(scores.to(device), self.layout), lay_out(budget.to(device), self.layout)


@dataclass(frozen=True)
class AttentionCase(Case):
    """Inputs of `sparse_attention`: L queries, the last of S positions."""

    stem: ClassVar[str] = "attention"
    B: int
    L: int
    S: int
    H_kv: int
    group: int
    d_h: int
    width: int
    pattern: str
    value_gate: bool
    output_gate: bool
    dtype: str
    values: str
    layout: str
    seed: int

    def arguments(self, device: str = "cpu") -> dict[str, Any]:
        g, dtype = self.generator(), DTYPES[self.dtype]
        H = self.H_kv * self.group
        query, key = (self.B, self.L, H, self.d_h), (self.B, self.S, self.H_kv, self.d_h)

        def tensor(shape: tuple[int, ...], wanted: bool = True) -> Tensor | None:
            x = draw_values(self.values, shape, g)
            return lay_out(x.to(dtype).to(device), self.layout) if wanted else None

        arguments: dict[str, Any] = {"q": tensor(query), "k": tensor(key), "v": tensor(key)}
        selection = random_selection(self.pattern, self.B, self.L, self.S, self.width, g)
        arguments["selection"] = Selection(*(lay_out(x.to(device), self.layout) for x in selection))
        arguments["value_gate_logits"] = tensor(key, self.value_gate)
        arguments["output_gate_logits"] = tensor(query, self.output_gate)
        return arguments


@dataclass(frozen=True)
class AttentionBackwardCase(AttentionCase):
    """Inputs of `sparse_attention`, and the gradients of its output and of lse."""

    stem: ClassVar[str] = "attention_backward"
    lse_gradient: bool

    def output_gradients(self, device: str = "cpu") -> tuple[Tensor, Tensor]:
        """dout [B, L, H, d_h] in the dtype of q, and dlse, float32 [B, L, H]: zeros without `lse_gradient`."""
        g, dtype = torch.Generator().manual_seed(self.seed + 1), DTYPES[self.dtype]
        shape = (self.B, self.L, self.H_kv * self.group, self.d_h)
        other = LAYOUTS[LAYOUTS.index(self.layout) - 1]
        dout = draw_values("normal", shape, g).to(dtype).to(device)
        dlse = draw_values("normal", shape[:-1], g).to(torch.float32).to(device) * self.lse_gradient
        return lay_out(dout, other), lay_out(dlse, self.layout)


@dataclass(frozen=True)
class GateCase(Case):
    """Inputs of `apply_gate`."""

    stem: ClassVar[str] = "gates"
    B: int
    L: int
    heads: int
    width: int
    dtype: str
    values: str
    layout: str
    seed: int

    def arguments(self, device: str = "cpu") -> tuple[Tensor, Tensor]:
        g, dtype = self.generator(), DTYPES[self.dtype]
        shape = (self.B, self.L, self.heads, self.width)
        x, gate = (draw_values(self.values, shape, g).to(dtype).to(device) for _ in range(2))
        other = LAYOUTS[LAYOUTS.index(self.layout) - 1]  # a kernel that mixes up the two strides must show
        return lay_out(x, self.layout), lay_out(gate, other)


@dataclass(frozen=True)
class LayerCase(Case):
    """A small `GatedSparseAttention` with random parameters and a batch of hidden states."""

    stem: ClassVar[str] = "layer"
    B: int
    L: int
    H_kv: int
    group: int
    d_h: int
    H_I: int
    d_I: int
    k_base: int
    rule: str
    gates: str
    padded: bool
    dtype: str
    seed: int

    @property
    def config(self) -> GSAConfig:
        return GSAConfig(
            d=max(16, self.H_kv * self.group * self.d_h // 2),
            H=self.H_kv * self.group,
            H_kv=self.H_kv,
            d_h=self.d_h,
            H_I=self.H_I,
            d_I=self.d_I,
            k_base=self.k_base,
            k_min=max(1, self.k_base // 2),
            k_max=2 * self.k_base,
            rule=self.rule,  # type: ignore[arg-type]
            gates=self.gates,  # type: ignore[arg-type]
        )

    def arguments(self, device: str = "cpu") -> dict[str, Any]:
        g = self.generator()
        h = torch.randn(self.B, self.L, self.config.d, generator=g).to(DTYPES[self.dtype]).to(device)
        lengths = torch.randint(0, self.L + 1, (self.B,), generator=g, dtype=torch.int32).to(device)
        return {"h": h, "lengths": lengths if self.padded else None}


@dataclass(frozen=True)
class DecodeCase(IndexedSelectionCase):
    """Inputs of `gsa_fast.decode_attention`: those of `indexed_selection`, and the attention's."""

    stem: ClassVar[str] = "decode"
    H_kv: int
    group: int
    d_h: int
    output_gate: bool
    attended_values: str

    def attention_arguments(self, device: str = "cpu") -> dict[str, Any]:
        """q, k, v and output_gate_logits."""
        g, dtype = torch.Generator().manual_seed(self.seed + 1), DTYPES[self.dtype]
        query, key = (self.B, self.L, self.H_kv * self.group, self.d_h), (self.B, self.S, self.H_kv, self.d_h)

        def tensor(shape: tuple[int, ...], layout: str = self.layout) -> Tensor:
            return lay_out(draw_values(self.attended_values, shape, g).to(dtype).to(device), layout)

        other = LAYOUTS[LAYOUTS.index(self.layout) - 1]  # a kernel that mixes up the strides of k and v must show
        arguments = {"q": tensor(query), "k": tensor(key), "v": tensor(key, other)}
        return {**arguments, "output_gate_logits": tensor(query) if self.output_gate else None}


@dataclass(frozen=True)
class TrainingCase(IndexerCase):
    """Inputs of `indexer_kl_loss`: those of the indexer, the teacher's queries and keys, and what the phase needs."""

    stem: ClassVar[str] = "training"
    H_kv: int
    group: int
    d_h: int
    phase: str
    width: int
    pattern: str
    temperature: float
    attended_values: str

    def training_arguments(self, device: str = "cpu") -> dict[str, Any]:
        """All keywords. In the phase "warm_up" there is no selection; in "sparse_lse", an lse as well."""
        g, dtype = torch.Generator().manual_seed(self.seed + 1), DTYPES[self.dtype]
        other = LAYOUTS[LAYOUTS.index(self.layout) - 1]  # a kernel that mixes up the strides of q and k must show
        query, key = (self.B, self.L, self.H_kv * self.group, self.d_h), (self.B, self.S, self.H_kv, self.d_h)
        q, k = (draw_values(self.attended_values, shape, g).to(dtype) for shape in (query, key))
        arguments = {
            **self.arguments(device),
            "q": lay_out(q.to(device), self.layout),
            "k": lay_out(k.to(device), other),
            "indexer_scale": self.scale,
            "temperature": self.temperature,
        }
        if self.phase == "warm_up":
            return arguments
        selection = random_selection(self.pattern, self.B, self.L, self.S, self.width, g)
        arguments["selection"] = Selection(*(lay_out(x.to(device), self.layout) for x in selection))
        if self.phase == "sparse_lse":
            start = _int32(self.start, "cpu") if isinstance(self.start, tuple) else self.start
            lse = sparse_attention(q.float(), k.float(), k.float(), selection, start=start)[1]
            arguments["lse"] = lay_out(lse.to(device), other)
        return arguments


CASES: dict[str, type[Case]] = {
    case.stem: case
    for case in (
        IndexerCase,
        BudgetCase,
        SelectionCase,
        IndexedSelectionCase,
        AttentionCase,
        AttentionBackwardCase,
        GateCase,
        LayerCase,
        DecodeCase,
        TrainingCase,
    )
}


def draw_scores(kind: str, shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    """float32 scores of one of the families in `SCORES`.

    "special" mixes ±0, denormals, ±inf and ordinary values; "near" puts thousands of values into one float16 step.
    """
    x = torch.randn(shape, generator=generator)
    if kind == "ties":
        return (x * 2).round() / 2
    if kind == "constant":
        return torch.full(shape, 0.5)
    if kind == "near":
        return 1 + (torch.rand(shape, generator=generator) * 2**11).floor() * 2.0**-23
    if kind == "special":
        special = torch.tensor([0.0, -0.0, 1e-45, -1e-45, 1e-38, -1e-38, math.inf, -math.inf, 3e38, -3e38, 1.0, -1.0])
        return special[torch.randint(0, len(special), shape, generator=generator)]
    if kind == "nan":
        return x.masked_fill(torch.rand(shape, generator=generator) < 0.3, math.nan)
    return x


def causal(scores: Tensor) -> Tensor:
    """−inf where the key lies in the future of its query; the queries are the last L of the S positions."""
    L, S = scores.shape[-2:]
    return scores.masked_fill(torch.ones(L, S, dtype=torch.bool).triu(S - L + 1), -math.inf)


def _int32(values: tuple[int, ...], device: str) -> Tensor:
    return torch.tensor(values, dtype=torch.int32, device=device)


# --- strategies ---------------------------------------------------------------------------------------------------

Draw = Callable[..., Any]  # run-time type checkers cannot handle st.DrawFn

_SEEDS = st.integers(0, 2**16)
_LAYOUTS = st.sampled_from(LAYOUTS)
_VALUES = st.sampled_from(VALUES)
_SELECTED_VALUES = st.sampled_from(SELECTED_VALUES)
_RULES = st.sampled_from(("proportional", "inverse", "fixed"))
_INDEXER_WIDTHS = st.sampled_from((1, 4, 8, 16, 20, 32, 64, 128))


def _head_width(limits: Limits) -> st.SearchStrategy[int]:
    return st.sampled_from([n for n in (2, 8, 16, 24, 32, 64, 96, 128, 192, 256) if n <= limits.channels])


def _length(limits: Limits) -> st.SearchStrategy[int]:
    return st.sampled_from(limits.lengths) if limits.lengths else st.integers(1, limits.L)


@st.composite
def _budget_sizes(draw: Draw, limits: Limits) -> dict[str, Any]:
    # Most budgets lie well below the length: a test with k ≥ S never selects anything.
    k_base = draw(st.integers(1, max(1, limits.S // 3)))
    return {
        "k_base": k_base,
        "k_min": draw(st.integers(1, k_base)),
        "k_max": draw(st.sampled_from((k_base + limits.S, 2 * k_base, k_base))),
        "rule": draw(_RULES),
        "mean_variance": draw(st.sampled_from((0.0, 0.05, 1e-4, 0.01, 1.0))),
    }


@st.composite
def indexer_cases(draw: Draw, dtype: str, limits: Limits) -> IndexerCase:
    B, L = draw(st.integers(1, limits.B)), draw(_length(limits))
    # Prefill (start = 0), a chunk behind a cache (start > 0) or behind whole tiles of keys, or one start per sequence.
    S = L if limits.lengths else L + draw(st.integers(0, max(0, limits.S - L)))
    whole = st.integers(1, (S - L) // 16).map(lambda n: 16 * n) if S - L >= 16 else st.just(S - L)
    start = draw(st.one_of(st.just(S - L), st.just(0), whole, st.tuples(*[st.integers(0, S)] * B)))
    lengths = draw(st.one_of(st.none(), st.tuples(*[st.integers(0, S)] * B)))
    return IndexerCase(
        B=B,
        L=L,
        S=S,
        H_I=draw(st.integers(1, 4)),
        d_I=draw(_INDEXER_WIDTHS),
        start=start,
        lengths=lengths,
        dtype=dtype,
        values=draw(_VALUES),
        layout=draw(_LAYOUTS),
        seed=draw(_SEEDS),
    )


@st.composite
def indexed_selection_cases(draw: Draw, dtype: str, limits: Limits) -> IndexedSelectionCase:
    indexer = {**dataclasses.asdict(draw(indexer_cases(dtype, limits))), "values": draw(_SELECTED_VALUES)}
    return IndexedSelectionCase(**indexer, **draw(_budget_sizes(limits)))


@st.composite
def budget_cases(draw: Draw, dtype: str, limits: Limits) -> BudgetCase:
    L = draw(_length(limits))
    return BudgetCase(
        B=draw(st.integers(1, limits.B)),
        L=L,
        S=L if limits.lengths else L + draw(st.integers(0, max(0, limits.S - L))),
        mean=draw(st.sampled_from((0.0, 1.0, 1000.0))),
        std=draw(st.sampled_from((1.0, 1e-3, 0.0))),
        values=draw(st.sampled_from(("normal", "ties", "constant", "nan"))),
        layout=draw(_LAYOUTS),
        seed=draw(_SEEDS),
        **draw(_budget_sizes(limits)),
    )


@st.composite
def selection_cases(draw: Draw, dtype: str, limits: Limits) -> SelectionCase:
    L = draw(_length(limits))
    S = L if limits.lengths else L + draw(st.integers(0, max(0, limits.S - L)))
    return SelectionCase(
        B=draw(st.integers(1, limits.B)),
        L=L,
        S=S,
        width=draw(st.integers(1, S + 2)),
        values=draw(st.sampled_from(SCORES)),
        layout=draw(_LAYOUTS),
        seed=draw(_SEEDS),
    )


@st.composite
def attention_cases(draw: Draw, dtype: str, limits: Limits) -> AttentionCase:
    L = draw(_length(limits))
    S = L if limits.lengths else L + draw(st.integers(0, max(0, limits.S - L)))
    return AttentionCase(
        B=draw(st.integers(1, limits.B)),
        L=L,
        S=S,
        H_kv=draw(st.integers(1, limits.heads)),
        group=draw(st.integers(1, limits.group)),
        d_h=draw(_head_width(limits)),
        width=draw(st.integers(1, min(S, limits.width))),
        pattern=draw(st.sampled_from(PATTERNS)),
        value_gate=draw(st.booleans()),
        output_gate=draw(st.booleans()),
        dtype=dtype,
        values=draw(st.sampled_from(("normal", "ties", "constant", "smooth", "tiny"))),
        layout=draw(_LAYOUTS),
        seed=draw(_SEEDS),
    )


@st.composite
def attention_backward_cases(draw: Draw, dtype: str, limits: Limits) -> AttentionBackwardCase:
    attention = dataclasses.asdict(draw(attention_cases(dtype, limits)))
    return AttentionBackwardCase(**attention, lse_gradient=draw(st.booleans()))


@st.composite
def gate_cases(draw: Draw, dtype: str, limits: Limits) -> GateCase:
    return GateCase(
        B=draw(st.integers(1, limits.B)),
        L=draw(_length(limits)),
        heads=draw(st.integers(1, 2 * limits.heads)),
        width=draw(_head_width(limits)),
        dtype=dtype,
        values=draw(_VALUES),
        layout=draw(_LAYOUTS),
        seed=draw(_SEEDS),
    )


@st.composite
def layer_cases(draw: Draw, dtype: str, limits: Limits) -> LayerCase:
    L = draw(_length(limits))
    return LayerCase(
        B=draw(st.integers(1, limits.B)),
        L=L,
        H_kv=draw(st.integers(1, limits.heads)),
        group=draw(st.integers(1, limits.group)),
        d_h=draw(st.sampled_from((8, 16, 64))),
        H_I=draw(st.integers(1, 4)),
        d_I=draw(st.sampled_from((8, 16, 64))),
        k_base=draw(st.integers(1, max(1, min(L // 3, limits.width)))),
        rule=draw(_RULES),
        gates=draw(st.sampled_from(("both", "value", "output", "none"))),
        padded=draw(st.booleans()),
        dtype=dtype,
        seed=draw(_SEEDS),
    )


@st.composite
def decode_cases(draw: Draw, dtype: str, limits: Limits) -> DecodeCase:
    """At most 8 queries, as many as `decode_attention` takes, behind a cache of one of the lengths of `limits`."""
    L = draw(st.integers(1, min(limits.L, 8)))
    keys = draw(_length(dataclasses.replace(limits, L=limits.S - L)))
    S = keys + L
    B = draw(st.integers(1, limits.B))
    few = dataclasses.replace(limits, B=B, L=L, S=2 * S, lengths=())  # so that budgets reach from 1 to 2 S / 3
    indexer = {**dataclasses.asdict(draw(indexed_selection_cases(dtype, few))), "B": B, "L": L, "S": S}
    start = draw(st.one_of(st.just(keys), st.tuples(*[st.integers(0, S)] * B)))
    lengths = draw(st.one_of(st.none(), st.tuples(*[st.integers(0, S)] * B)))
    return DecodeCase(
        **{**indexer, "start": start, "lengths": lengths},
        H_kv=draw(st.integers(1, limits.heads)),
        group=draw(st.integers(1, limits.group)),
        d_h=draw(_head_width(limits)),
        output_gate=draw(st.booleans()),
        attended_values=draw(st.sampled_from(("normal", "ties", "constant", "smooth", "tiny"))),
    )


@st.composite
def training_cases(draw: Draw, dtype: str, limits: Limits) -> TrainingCase:
    indexer = dataclasses.asdict(draw(indexer_cases(dtype, limits)))
    # Hypothesis likes the first: with one channel, little depends on where it is read.
    indexer["d_I"] = draw(st.sampled_from((16, 8, 20, 64, 128, 4, 1)))
    return TrainingCase(
        **indexer,
        H_kv=draw(st.integers(1, limits.heads)),
        group=draw(st.integers(1, limits.group)),
        d_h=draw(_head_width(limits)),
        phase=draw(st.sampled_from(PHASES)),
        width=draw(st.one_of(st.just(limits.width), st.integers(1, limits.width))),
        pattern=draw(st.sampled_from(PATTERNS)),
        temperature=draw(st.sampled_from((1.0, 0.1, 0.02, 10.0))),
        attended_values=draw(st.sampled_from(("normal", "huge", "smooth", "ties"))),  # few teachers that are uniform
    )


STRATEGIES = {
    "indexer": indexer_cases,
    "budget": budget_cases,
    "selection": selection_cases,
    "indexed_selection": indexed_selection_cases,
    "attention": attention_cases,
    "attention_backward": attention_backward_cases,
    "gates": gate_cases,
    "layer": layer_cases,
    "decode": decode_cases,
    "training": training_cases,
}
