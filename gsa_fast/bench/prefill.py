"""`python -m gsa_fast bench prefill`: the forward pass and its stages beside dense attention."""

import argparse
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

import gsa_fast
from gsa_fast._backend import INTERPRETED
from gsa_fast.bench import patterns, records, rooflines, suite
from gsa_fast.bench.dense import BASELINES, dense_call
from gsa_fast.bench.suite import D_H, D_I, DTYPE, H_I, K_BASE, H, Kept, Prepared, Skipped, cell, device_works
from gsa_fast.bench.timing import SECONDS, measure, measure_ceilings
from gsa_fast.selection import SIGMOID_MODES
from gsa_ref import GSAConfig, Selection

SUITE = "prefill"
LENGTHS = (2048, 4096, 8192, 16384, 32768, 65536, 131072)
KV_HEADS = (8, 1)
QUICK_LENGTHS, QUICK_SELECTIONS, QUICK_SECONDS = (2048, 8192, 131072), ("random", "clustered p=0.95"), 0.2
MILLION = 1048576  # from here on one key/value head by default, and the baselines come last
GRAPH_LENGTH = 8192  # up to here both sides are replayed from CUDA graphs
SCORES_BYTES = 8 * 2**30  # the indexer alone stores all scores: longer inputs are left out
BASELINE_SECONDS = 60.0  # a baseline that two calls of would take longer is left out
EXPECTED_TFLOPS = {"cudnn": 500.0, "flash": 300.0}  # to predict how long a baseline takes, nothing else


@dataclass(frozen=True)
class Case:
    """One line of the result. `H_kv` is None where no key/value head enters."""

    case: str
    impl: str
    L: int
    k_base: int
    H_kv: int | None = None
    selection: str | None = None
    sigmoid_mode: str | None = None  # of the indexer, where it is a choice

    @property
    def is_baseline(self) -> bool:
        return self.impl in BASELINES

    @property
    def config(self) -> GSAConfig:
        """The layer's sizes; V̄ gives a mean budget of k_base."""
        k = self.k_base
        kv = 1 if self.H_kv is None else self.H_kv
        return GSAConfig(
            H=H, H_kv=kv, d_h=D_H, H_I=H_I, d_I=D_I, k_base=k, k_min=max(1, k // 8), k_max=2 * k
        )  # fmt: skip

    @property
    def shape(self) -> dict[str, int | None]:
        """The record's shape; None where a size does not enter."""
        attends = self.H_kv is not None
        indexes = self.case in ("indexer", "indexed_selection", "whole")
        selects = self.case not in ("gates", "indexer") and not self.is_baseline
        return {
            "B": 1,
            "L": self.L,
            "S": self.L,
            "H": H if attends else None,
            "H_kv": self.H_kv,
            "d_h": D_H if attends else None,
            "H_I": H_I if indexes else None,
            "d_I": D_I if indexes else None,
            "k": self.k_base if selects else None,
        }


def plan(lengths: list[int], kv_heads: list[int] | None, k_bases: list[int], selections: list[str]) -> list[Case]:
    """The cases in the order in which they run: inputs of one length, then of one budget, then of one pattern."""
    cases = []
    for L in lengths:
        heads = kv_heads or ([1] if L >= MILLION else list(KV_HEADS))
        dense = [Case("attention", impl, L, k_bases[0], h) for h in heads for impl in BASELINES]
        cases += [] if L >= MILLION else dense
        cases += [Case("indexer", "gsa_fast", L, k_bases[0], selection="random")]
        cases += [Case("gates", "gsa_fast", L, k_bases[0], h) for h in heads]
        for k in k_bases:
            kinds = dict.fromkeys(s if s in ("ties", "smooth") else "random" for s in selections)
            cases += [
                Case("indexed_selection", "gsa_fast", L, k, None, kind, mode)
                for kind in kinds
                for mode in SIGMOID_MODES
            ]
            for selection in selections:
                for h in heads:
                    cases += [Case("attention", "gsa_fast", L, k, h, selection)]
                    cases += [Case("whole", "gsa_fast", L, k, h, selection, mode) for mode in SIGMOID_MODES]
        cases += dense if L >= MILLION else []
    return cases


class Inputs:
    """Inputs, selections and overlaps of the cases, drawn when they are needed."""

    def __init__(self, seed: int, device: str = "cuda", dtype: torch.dtype = DTYPE) -> None:
        self.seed, self.device, self.dtype = seed, device, dtype
        self.indexer = Kept(self._indexer, 2)
        self.attention = Kept(self._attention, 2)
        self.selection = Kept(self._selection, 1)
        self.overlap = Kept(self._overlap, 8)

    def of(self, case: Case) -> tuple[patterns.IndexerInputs, patterns.AttentionInputs | None]:
        kind = case.selection if case.selection in ("ties", "smooth") else "random"
        attention = None if case.H_kv is None else self.attention(case.L, case.H_kv, kind == "smooth")
        return self.indexer(case.L, case.k_base, kind), attention

    def _drawn(self) -> dict[str, Any]:
        return {"seed": self.seed, "device": self.device, "dtype": self.dtype}

    def _indexer(self, L: int, k_base: int, kind: str) -> patterns.IndexerInputs:
        config = Case("", "", L, k_base).config
        if kind == "smooth":
            inputs = patterns.smooth_indexer_inputs(L, config, **self._drawn())
        else:
            inputs = patterns.random_indexer_inputs(L, config, constant=kind == "ties", **self._drawn())
        if kind == "ties":  # no variance: V̄ stays unset, and every budget is k_base
            return inputs
        return patterns.with_mean_variance(inputs, config)

    def _attention(self, L: int, H_kv: int, smooth: bool) -> patterns.AttentionInputs:
        config = Case("", "", L, K_BASE, H_kv).config
        draw = patterns.smooth_attention_inputs if smooth else patterns.random_attention_inputs
        return draw(L, config, **self._drawn())

    def _selection(self, L: int, k_base: int, name: str) -> Selection:
        config = Case("", "", L, k_base).config
        if name == "smooth":
            arguments = self.indexer(L, k_base, "smooth").arguments()
            selection, _ = gsa_fast.indexed_selection(**arguments, config=config, impl="triton")
            return selection
        return patterns.draw_selection(
            name, L, k_base=k_base, width=min(config.k_max, L), seed=self.seed, device=self.device
        )

    def _overlap(self, L: int, k_base: int, name: str, rows: int) -> patterns.Overlap:
        return patterns.measure_overlap(self.selection(L, k_base, name), rows, seed=self.seed)


def prepare(case: Case, inputs: Inputs) -> Prepared:
    """Inputs and the call of one case.

    Raises:
        Skipped: the case is left out on purpose.
    """
    c, L = case.config, case.L
    if case.is_baseline:
        work = rooflines.dense_work(L, c)
        expected = 2 * work.flop / (1e12 * EXPECTED_TFLOPS[case.impl])
        if expected > BASELINE_SECONDS:
            raise Skipped(f"left out: two calls would take about {expected:.0f} s")
        given = inputs.attention(L, case.H_kv, False)
        tensors = (x.transpose(1, 2).contiguous() for x in (given.q, given.k, given.v))
        call, note = dense_call(case.impl, *tensors, causal=True)
        return Prepared(call, [work], {"note": note} if note else {})
    if case.case == "indexer":
        if 4 * L * L > SCORES_BYTES:
            raise Skipped(f"left out: its scores would take {4 * L * L / 2**30:.0f} GiB")
        arguments = inputs.of(case)[0].scores_arguments()
        scale = c.effective_indexer_scale
        return Prepared(
            lambda: gsa_fast.indexer_scores(**arguments, scale=scale, impl="triton"), [rooflines.indexer_work(L, c)]
        )
    if case.case == "gates":
        given = inputs.attention(L, case.H_kv, False)
        return Prepared(
            lambda: gsa_fast.apply_gate(given.v, given.value_gate_logits, impl="triton"), [rooflines.gates_work(L, c)]
        )
    selecting = rooflines.indexed_selection_work(L, c)
    indexer, attention = inputs.of(case)

    def select() -> tuple[Selection, Tensor]:
        mode = case.sigmoid_mode or "exact"
        return gsa_fast.indexed_selection(**indexer.arguments(), config=c, sigmoid_mode=mode, impl="triton")

    if case.case == "indexed_selection":
        selection, _ = select()
        return Prepared(select, [selecting], {"mean_k": float(selection.counts.double().mean())})

    assert attention is not None
    pattern = inputs.selection(L, case.k_base, case.selection)
    rows = rooflines.tile_rows(c)
    of_16, of_tile = (inputs.overlap(L, case.k_base, case.selection, n) for n in (16, rows))
    fields = {
        **patterns.overlap_fields(of_16),
        "tile_rows": rows,
        "tile_union_over_k": of_tile.union_over_k,
        "method": gsa_fast.explain_choice(
            L=L, S=L, K=pattern.indices.shape[-1], H=c.H, H_kv=c.H_kv, d_h=c.d_h, dtype=inputs.dtype
        ).method,
    }
    sizes = of_tile.sizes
    q, k, v = attention.q, attention.k, attention.v
    if case.case == "attention":
        return Prepared(
            lambda: gsa_fast.sparse_attention(q, k, v, pattern, impl="triton"),
            [rooflines.attention_work(L, c, **sizes)],
            fields,
        )

    def whole() -> Any:
        selection, variance = select()
        chosen = selection if case.selection == "smooth" else pattern
        return selection, variance, gsa_fast.sparse_attention(q, k, v, chosen, **attention.gates(), impl="triton")

    stages = [selecting, rooflines.gates_work(L, c), rooflines.attention_work(L, c, **sizes, output_gate=True)]
    return Prepared(whole, stages, fields)


def run(cases: list[Case], inputs: Inputs, *, seconds: float, where: dict[str, Any]) -> Iterator[records.Record]:
    """Measure the ceilings, then every case, as `suite.run_cases` says."""
    ceilings, timings = measure_ceilings()
    yield from suite.ceiling_records(SUITE, ceilings, timings, where)
    yield from suite.run_cases(
        SUITE,
        cases,
        ceilings,
        where,
        title=lambda case: f"L={case.L} {case.selection or case.impl} {case.case}",
        prepare=lambda case: prepare(case, inputs),
        measure=lambda case, prepared: measure(prepared.call, graph=case.L <= GRAPH_LENGTH, seconds=seconds),
        works=device_works,
    )


def format_table(rows: list[records.Record], known: list[records.Record]) -> str:
    """The table that people read. Speed-ups are over the cuDNN records among `known`."""
    dense = {
        (r["shape"]["L"], r["shape"]["H_kv"]): r["ms"]["median"] for r in known if r["impl"] == "cudnn" and r["ms"]
    }
    header = ("case", "impl", "L", "H_kv", "k", "selection", "σ", "ms [p20–p80]", "over cuDNN", "of roofline", "GiB")
    lines: list[tuple[str, ...]] = []
    for r in rows:
        if r["case"] == "ceiling":
            continue
        size = r["shape"]
        lead = [
            r["case"],
            r["impl"],
            *(cell(size[n]) for n in ("L", "H_kv", "k")),
            cell(r["selection"]),
            cell(r["sigmoid_mode"]),
        ]
        if r["ms"] is None:
            lines.append((*lead, r["reason"], "", "", ""))
            continue
        ms = r["ms"]
        over = dense.get((size["L"], size["H_kv"]))
        speedup = f"{over / ms['median']:.2f}×" if over and r["case"] in ("attention", "whole") else "–"
        eager = "" if r["graph"] or size["L"] > GRAPH_LENGTH else " eager"
        lines.append(
            (
                *lead,
                f"{ms['median']:.3f} [{ms['p20']:.3f}–{ms['p80']:.3f}]{eager}",
                speedup,
                f"{100 * r['share_of_roofline']:.0f}%",
                f"{r['peak_bytes'] / 2**30:.2f}",
            )
        )
    return suite.format_lines(header, lines, right={2, 3, 4, 7, 8, 9, 10})


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of the suite."""
    suite.add_shared_arguments(parser, length="this length", quick="fewer lengths, patterns and repetitions")
    parser.add_argument(
        "--selection", action="append", choices=patterns.SELECTIONS, help="only this pattern (may be repeated)"
    )
    parser.add_argument(
        "--k-base", action="append", type=int, metavar="K", help=f"mean budget, default {K_BASE} (may be repeated)"
    )


def check_options(options: argparse.Namespace) -> str:
    """What is wrong with the options, or nothing."""
    for k in options.k_base or []:
        if k < 1:
            return f"argument --k-base: expected a number ≥ 1, got {k}"
    return suite.check_shared_options(options, H)


def main(options: argparse.Namespace, argv: list[str]) -> int:
    """Run the suite: 0 if every case ran or was left out on purpose, 1 if one failed, 2 without a GPU."""
    if suite.refuses(INTERPRETED):
        return 2
    lengths = options.length or list(QUICK_LENGTHS if options.quick else LENGTHS)
    selections = options.selection or list(QUICK_SELECTIONS if options.quick else patterns.SELECTIONS)
    cases = plan(lengths, options.kv_heads, options.k_base or [K_BASE], selections)
    seconds = QUICK_SECONDS if options.quick else SECONDS
    measured = lambda where: run(cases, Inputs(options.seed), seconds=seconds, where=where)  # noqa: E731
    return suite.report(measured, len(cases), options, argv, format_table)
