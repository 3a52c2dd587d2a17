"""`python -m gsa_fast bench decode`: a step of a few queries against a long cache beside dense attention over all keys.

A step that is repeated on the same tensors would find them in the L2 cache, where no layer of a model finds its own:
between two steps all the others ran. So a case draws several independent sets of inputs, and one CUDA graph holds a
call on each of them in turn. A replay is a round, which reads several times what the cache holds, and its time over the
number of sets is the time of a call. The dense side goes through as many sets of the same queries, keys and values.
Where not even two sets fit in memory, one serves if a single call reads several times the cache.
"""

import argparse
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from triton import cdiv

import gsa_fast
from gsa_fast._backend import INTERPRETED
from gsa_fast.bench import patterns, records, rooflines, suite
from gsa_fast.bench.dense import BASELINES, check_last_head, dense_call, takes_heads
from gsa_fast.bench.suite import D_H, D_I, DTYPE, H_I, K_BASE, H, Kept, Prepared, Skipped, cell, device_works
from gsa_fast.bench.timing import measure, measure_ceilings, take_turns
from gsa_fast.decode import MAX_QUERIES
from gsa_fast.selection import SIGMOID_MODES
from gsa_ref import GSACache, GSAConfig, Selection

SUITE = "decode"
BATCHES = (1, 2, 4, 8, 16, 32, 64)
LENGTHS = (8192, 32768, 131072, 524288, 1048576)
KV_HEADS = (8,)
QUICK_BATCHES, QUICK_LENGTHS = (1, 32), (8192, 131072)
SECONDS, QUICK_SECONDS = 0.25, 0.1
FUSED, GENERAL = "gsa_fast", "gsa_fast_general"
ROUND = 4  # a round of calls reads at least this many times the L2 cache
MEMORY_SHARE = 0.9  # of the free device memory that inputs may take; graphs and the kernels' own need the rest


@dataclass(frozen=True)
class Case:
    """One line of the result: B sequences of S keys, and N queries at the end of each."""

    impl: str
    B: int
    S: int
    H_kv: int
    N: int = 1
    sigmoid_mode: str | None = None  # None for the baselines, which have no indexer

    case = "decode"

    @property
    def is_baseline(self) -> bool:
        return self.impl in BASELINES

    @property
    def selection(self) -> str | None:
        return None if self.is_baseline else "random"

    @property
    def config(self) -> GSAConfig:
        """The layer's sizes; V̄ gives a mean budget of K_BASE."""
        k = K_BASE
        return GSAConfig(
            H=H, H_kv=self.H_kv, d_h=D_H, H_I=H_I, d_I=D_I, k_base=k, k_min=max(1, k // 8), k_max=2 * k
        )  # fmt: skip

    @property
    def shape(self) -> dict[str, int | None]:
        """The record's shape: L queries, S keys."""
        indexer = dict(zip(("H_I", "d_I", "k"), (None,) * 3 if self.is_baseline else (H_I, D_I, K_BASE), strict=True))
        return {"B": self.B, "L": self.N, "S": self.S, "H": H, "H_kv": self.H_kv, "d_h": D_H, **indexer}


def plan(batches: list[int], lengths: list[int], kv_heads: list[int], N: int) -> list[Case]:
    """The cases in the order in which they run: ours, then the baselines, on the inputs of one size."""
    return [
        Case(impl, B, S, heads, N, mode)
        for heads in kv_heads
        for S in lengths
        for B in batches
        for impl, mode in [(ours, mode) for ours in (FUSED, GENERAL) for mode in SIGMOID_MODES]
        + [(dense, None) for dense in BASELINES]
    ]


@dataclass(frozen=True)
class Limits:
    """Of the device, in bytes: memory that inputs may take, and the L2 cache."""

    memory: float
    l2: float


def device_limits() -> Limits:  # pragma: no cover  needs a GPU
    """The limits of the current CUDA device. What is allocated already counts as taken."""
    free, _ = torch.cuda.mem_get_info()
    return Limits(MEMORY_SHARE * free, torch.cuda.get_device_properties().L2_cache_size)


def needed_bytes(case: Case, sets: int, dtype: torch.dtype = DTYPE) -> int:
    """Device memory that so many sets of inputs take at most, on our side or on the dense one.

    A set is a cache of S tokens a sequence, and small tensors per query. Besides, a tensor of keys exists twice while
    it is brought into the dense layout, and a score is stored for each query and key, in at most 16 bytes in all.
    """
    c, rows = case.config, case.B * case.N
    queries = rows * (2 * c.H * c.d_h + c.H_I * c.d_I + c.H_I) * dtype.itemsize
    cache = case.B * case.S * GSACache.bytes_per_token(c, dtype=dtype)
    transposed = case.B * case.S * c.H_kv * c.d_h * dtype.itemsize
    return sets * (cache + queries) + max(transposed, 16 * rows * case.S)


def count_sets(case: Case, limits: Limits, dtype: torch.dtype = DTYPE) -> int:
    """How many sets of inputs a round goes through: enough to read ROUND times the L2 cache, and at least two.

    Counted is what a fused call must read of a set. Every implementation gets the same number.

    Raises:
        Skipped: they do not fit in memory.
    """
    union = min(K_BASE * case.N, case.S)
    read = rooflines.decode_work(case.B, case.N, case.S, case.config, mean_k=K_BASE, union=union).memory_bytes
    enough = max(1, cdiv(int(ROUND * limits.l2), int(read)))
    for sets in (max(2, enough), enough):
        needed = needed_bytes(case, sets, dtype)
        if needed <= limits.memory:
            return sets
    raise Skipped(
        f"left out: {sets} set{'s' if sets > 1 else ''} of inputs would take {needed / 2**30:.1f} GiB of the "
        f"{limits.memory / 2**30:.1f} that are free"
    )


@dataclass(frozen=True)
class DecodeInputs:
    """Arguments of one call: what a cache holds, with values gated already, and the new queries."""

    q: Tensor
    k: Tensor
    v: Tensor
    output_gate_logits: Tensor
    indexer: patterns.IndexerInputs
    start: Tensor
    lengths: Tensor

    def fused(self, config: GSAConfig, mode: str, *, return_selection: bool = False) -> Any:
        """The decode kernels."""
        return gsa_fast.decode_attention(
            self.q,
            self.k,
            self.v,
            **self.indexer.arguments(),
            config=config,
            start=self.start,
            lengths=self.lengths,
            output_gate_logits=self.output_gate_logits,
            sigmoid_mode=mode,
            return_selection=return_selection,
            impl="triton",
        )

    def selected(self, config: GSAConfig, mode: str) -> Selection:
        """The selection by the kernels of long sequences."""
        selection, _ = gsa_fast.indexed_selection(
            **self.indexer.arguments(),
            config=config,
            start=self.start,
            lengths=self.lengths,
            sigmoid_mode=mode,
            impl="triton",
        )
        return selection

    def general(self, config: GSAConfig, mode: str) -> Any:
        """The kernels of long sequences, one after another."""
        return gsa_fast.sparse_attention(
            self.q,
            self.k,
            self.v,
            self.selected(config, mode),
            start=self.start,
            output_gate_logits=self.output_gate_logits,
            impl="triton",
        )


Dense = tuple[Tensor, Tensor, Tensor]  # q [B, H, N, d_h]; k, v [B, H_kv, S, d_h]


class Inputs:
    """The sets of inputs of a size, drawn when they are needed: never more than those of one size, for one side."""

    def __init__(
        self, seed: int, device: str = "cuda", dtype: torch.dtype = DTYPE, *, limits: Limits | None = None
    ) -> None:
        self.seed, self.device, self.dtype = seed, device, dtype
        self.limits = device_limits() if limits is None else limits
        self.drawn = Kept(self._draw, 1)

    def sets(self, case: Case) -> list[Any]:
        """`DecodeInputs` for our kernels, `Dense` for the baselines, as many as `count_sets` says."""
        return self.drawn(replace(case, impl="", sigmoid_mode=None), case.is_baseline)

    def _draw(self, size: Case, dense: bool) -> list[Any]:
        torch.cuda.empty_cache()  # blocks of the last size are of no use to this one
        count = count_sets(size, self.limits, self.dtype)
        if dense:
            return [tuple(self._attention(size, i, layout=(0, 2, 1, 3))) for i in range(count)]
        return self._with_mean_variance([self._ours(size, i) for i in range(count)], size.config)

    def _attention(self, size: Case, i: int, layout: tuple[int, ...] = (0, 1, 2, 3)) -> Iterator[Tensor]:
        """q, k and v of set i, normal: the same values in any layout, of which each is brought into it at once."""
        g = torch.Generator(self.device).manual_seed(self.seed + 2 * i)
        for rows, heads in ((size.N, H), (size.S, size.H_kv), (size.S, size.H_kv)):
            drawn = torch.randn(size.B, rows, heads, D_H, dtype=self.dtype, device=self.device, generator=g)
            yield drawn.permute(layout).contiguous()

    def _ours(self, size: Case, i: int) -> DecodeInputs:
        q, k, v = self._attention(size, i)
        drawn: dict[str, Any] = {"seed": self.seed + 2 * i + 1, "device": self.device, "dtype": self.dtype}
        indexer = patterns.random_indexer_inputs(size.N, size.config, B=size.B, S=size.S, **drawn)
        start, lengths = (
            torch.full((size.B,), n, dtype=torch.int32, device=self.device) for n in (size.S - size.N, size.S)
        )
        g = torch.Generator(self.device).manual_seed(self.seed + 2 * i + 1)
        gate = torch.randn(q.shape, dtype=self.dtype, device=self.device, generator=g)
        return DecodeInputs(q, k, v, gate, indexer, start, lengths)

    def _with_mean_variance(self, sets: list[DecodeInputs], config: GSAConfig) -> list[DecodeInputs]:
        """The sets with V̄ set to the mean variance of all their rows, so that the mean budget is near K_BASE."""
        V = torch.stack([s.fused(config, "exact").variance for s in sets]).mean()
        return [replace(s, indexer=replace(s.indexer, mean_variance=V)) for s in sets]


def prepare(case: Case, inputs: Inputs) -> Prepared:
    """The sets of inputs and the calls of one case.

    Raises:
        Skipped: the case is left out on purpose.
    """
    return _prepare_dense(case, inputs) if case.is_baseline else _prepare_ours(case, inputs)


def _prepare_ours(case: Case, inputs: Inputs) -> Prepared:
    c, mode, sets = case.config, case.sigmoid_mode or "exact", inputs.sets(case)
    if case.impl == FUSED:
        calls = [_bound(s.fused, c, mode) for s in sets]
        chosen = [s.fused(c, mode, return_selection=True).selection for s in sets]
    else:
        calls = [_bound(s.general, c, mode) for s in sets]
        chosen = [s.selected(c, mode) for s in sets]
    mean_k = float(torch.stack([s.counts for s in chosen]).double().mean())
    union = float(torch.stack([patterns.union_sizes(s.indices.flatten(1)) for s in chosen]).double().mean())
    work = rooflines.decode_work(case.B, case.N, case.S, c, mean_k=mean_k, union=union)
    return Prepared(
        take_turns(calls), [work], {"sets": len(sets), "mean_k": mean_k, "union_over_k": union / mean_k}
    )  # fmt: skip


def _bound(call: Callable[..., Any], *arguments: Any) -> Callable[[], Any]:
    return lambda: call(*arguments)


def _prepare_dense(case: Case, inputs: Inputs) -> Prepared:
    sets = inputs.sets(case)
    if not takes_heads(case.impl, *sets[0], causal=False):
        repeated = replace(case, H_kv=H)  # beside the tensors that they are repeated from
        needed = needed_bytes(case, len(sets), inputs.dtype) + needed_bytes(repeated, len(sets), inputs.dtype)
        if needed > inputs.limits.memory:
            raise Skipped(
                f"left out: the backend takes no grouped heads, and repeated keys and values would take "
                f"{needed / 2**30:.1f} GiB of the {inputs.limits.memory / 2**30:.1f} that are free"
            )
    # Several queries see all keys, the newest too, which costs at most N − 1 keys of S: PyTorch's causal mask is
    # for as many queries as keys, and others lead away from these backends.
    calls, notes = zip(*(dense_call(case.impl, *s, causal=False) for s in sets), strict=True)
    check_last_head(calls[0](), *sets[0])
    said = [notes[0]] if notes[0] else []
    if case.N > 1:
        said.append("without a mask among the new tokens")
    work = rooflines.dense_decode_work(case.B, case.N, case.S, case.config)
    fields = {"sets": len(sets)} | ({"note": "; ".join(said)} if said else {})
    return Prepared(take_turns(list(calls)), [work], fields)


def run(cases: list[Case], inputs: Inputs, *, seconds: float, where: dict[str, Any]) -> Iterator[records.Record]:
    """Measure the copy ceiling, which alone bounds a step, then every case, as `suite.run_cases` says."""
    ceilings, timings = measure_ceilings(["copy"])
    yield from suite.ceiling_records(SUITE, ceilings, timings, where)
    yield from suite.run_cases(
        SUITE,
        cases,
        ceilings,
        where,
        title=lambda case: f"S={case.S} B={case.B} {case.impl}",
        prepare=lambda case: prepare(case, inputs),
        measure=lambda case, prepared: measure(
            prepared.call, graph=True, seconds=seconds, turns=prepared.fields["sets"]
        ),
        works=device_works,
    )


def format_table(rows: list[records.Record], known: list[records.Record]) -> str:
    """The table that people read. Speed-ups are over the cuDNN records among `known`."""
    size = lambda r: tuple(r["shape"][n] for n in ("H_kv", "S", "B", "L"))  # noqa: E731
    dense = {size(r): r["ms"]["median"] for r in known if r["impl"] == "cudnn" and r["ms"]}
    header = (
        "H_kv", "keys", "B", "queries", "impl", "σ", "ms [p20–p80]", "over cuDNN", "of roofline", "TB/s", "mean k",
        "sets",
    )  # fmt: skip
    lines: list[tuple[str, ...]] = []
    for r in rows:
        if r["case"] == "ceiling":
            continue
        lead = (*map(str, size(r)), r["impl"], cell(r["sigmoid_mode"]))
        if r["ms"] is None:
            lines.append((*lead, r["reason"], "", "", "", "", ""))
            continue
        ms, over = r["ms"], dense.get(size(r))
        eager = "" if r["graph"] else " eager"
        lines.append(
            (
                *lead,
                f"{ms['median']:.4f} [{ms['p20']:.4f}–{ms['p80']:.4f}]{eager}",
                f"{over / ms['median']:.2f}×" if over else "–",
                f"{100 * r['share_of_roofline']:.0f}%",
                f"{r['tbps']:.2f}",
                "–" if r["mean_k"] is None else f"{r['mean_k']:.0f}",
                str(r["sets"]),
            )
        )
    return suite.format_lines(header, lines, right={0, 1, 2, 3, 6, 7, 8, 9, 10, 11})


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of the suite."""
    suite.add_shared_arguments(
        parser, length="this many keys", quick="fewer batch sizes, numbers of keys and repetitions"
    )
    parser.add_argument(
        "--batch", action="append", type=int, metavar="B", help="only this batch size (may be repeated)"
    )
    parser.add_argument(
        "--queries", type=int, default=1, metavar="N", help=f"queries per sequence, 1 to {MAX_QUERIES} (default 1)"
    )


def check_options(options: argparse.Namespace) -> str:
    """What is wrong with the options, or nothing."""
    for B in options.batch or []:
        if B < 1:
            return f"argument --batch: expected a number ≥ 1, got {B}"
    if not 1 <= options.queries <= MAX_QUERIES:
        return f"argument --queries: expected 1 to {MAX_QUERIES}, got {options.queries}"
    return suite.check_shared_options(options, H)


def main(options: argparse.Namespace, argv: list[str]) -> int:
    """Run the suite: 0 if every case ran or was left out on purpose, 1 if one failed, 2 without a GPU."""
    if suite.refuses(INTERPRETED):
        return 2
    batches = options.batch or list(QUICK_BATCHES if options.quick else BATCHES)
    lengths = options.length or list(QUICK_LENGTHS if options.quick else LENGTHS)
    cases = plan(batches, lengths, options.kv_heads or list(KV_HEADS), options.queries)
    seconds = QUICK_SECONDS if options.quick else SECONDS
    measured = lambda where: run(cases, Inputs(options.seed), seconds=seconds, where=where)  # noqa: E731
    return suite.report(measured, len(cases), options, argv, format_table)
