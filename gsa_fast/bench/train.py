"""`python -m gsa_fast bench train`: attention and gates, and the indexer's KL loss, forward and backward."""

import argparse
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

import gsa_fast
from gsa_fast._backend import INTERPRETED
from gsa_fast.bench import kl, patterns, prefill, records, rooflines, suite
from gsa_fast.bench.dense import BASELINES, dense_call
from gsa_fast.bench.suite import D_H, K_BASE, H, Prepared, Skipped, cell, device_works
from gsa_fast.bench.timing import SECONDS, Timing, measure, measure_ceilings
from gsa_ref import GSAConfig

SUITE = "train"
LENGTHS = (16384, 32768, 65536, 131072)
KV_HEADS = (8,)
SELECTIONS = ("clustered p=0.95", "random")
QUICK_LENGTHS, QUICK_SELECTIONS, QUICK_SECONDS = (32768, 131072), ("clustered p=0.95",), 0.2
IN_ORDER, ATOMIC = "gsa_fast", "gsa_fast atomic"  # how dk and dv are summed
PARTS = ("attention", "kl_loss")


@dataclass(frozen=True)
class Case:
    """One line of the result. `selection` is None for dense attention."""

    impl: str
    L: int
    H_kv: int
    selection: str | None = None
    sigmoid_mode: None = None
    case: str = "forward_backward"

    @property
    def is_baseline(self) -> bool:
        return self.impl in BASELINES

    @property
    def config(self) -> GSAConfig:
        return prefill.Case("", "", self.L, K_BASE, self.H_kv).config

    @property
    def shape(self) -> dict[str, int | None]:
        sizes = {"B": 1, "L": self.L, "S": self.L, "H": H, "H_kv": self.H_kv, "d_h": D_H}
        return {**sizes, "H_I": None, "d_I": None, "k": None if self.is_baseline else K_BASE}


def plan(lengths: list[int], kv_heads: list[int], selections: list[str]) -> list[Case]:
    """The cases in the order in which they run."""
    cases = []
    for L in lengths:
        for H_kv in kv_heads:
            cases += [Case(impl, L, H_kv) for impl in BASELINES]
            cases += [Case(impl, L, H_kv, selection) for selection in selections for impl in (IN_ORDER, ATOMIC)]
    return cases


def prepare(case: Case, inputs: prefill.Inputs) -> Prepared:
    """Inputs and the call of one case: the result, then the gradients of all inputs from a given gradient of it."""
    c, L = case.config, case.L
    given = inputs.attention(L, case.H_kv, False)
    dout = torch.randn(given.q.shape, dtype=inputs.dtype, device=inputs.device)
    if case.is_baseline:
        leaves = [x.transpose(1, 2).contiguous().requires_grad_() for x in (given.q, given.k, given.v)]
        call, note = dense_call(case.impl, *leaves, causal=True)
        weight = dout.transpose(1, 2).contiguous()
        forward = rooflines.dense_work(L, c)
        return Prepared(
            lambda: torch.autograd.grad(call(), leaves, weight),
            [forward, rooflines.dense_backward_work(L, c)],
            {"note": note} if note else {},
        )
    assert case.selection is not None
    pattern = inputs.selection(L, K_BASE, case.selection)
    rows = rooflines.tile_rows(c)
    of_16, of_tile = (inputs.overlap(L, K_BASE, case.selection, n) for n in (16, rows))
    names = ("q", "k", "v", "value_gate_logits", "output_gate_logits")
    tensors = {name: getattr(given, name).detach().requires_grad_() for name in names}
    deterministic = case.impl == IN_ORDER

    def call_ours() -> tuple[Tensor, ...]:
        out, _ = gsa_fast.sparse_attention(**tensors, selection=pattern, deterministic=deterministic, impl="triton")
        return torch.autograd.grad(out, list(tensors.values()), dout)

    sizes = of_tile.sizes
    stages = [
        rooflines.gates_work(L, c),
        rooflines.attention_work(L, c, **sizes, output_gate=True),
        rooflines.attention_backward_work(L, c, **sizes, deterministic=deterministic),
    ]
    return Prepared(call_ours, stages, patterns.overlap_fields(of_16))


def run(
    cases: list[Case | kl.Case], inputs: prefill.Inputs, *, seconds: float, where: dict[str, Any]
) -> Iterator[records.Record]:
    """Measure the ceilings, then every case, as `suite.run_cases` says."""
    ceilings, timings = measure_ceilings()
    yield from suite.ceiling_records(SUITE, ceilings, timings, where)
    checked: set[kl.Case] = set()

    def prepare_case(case: Case | kl.Case) -> Prepared:
        return prepare(case, inputs) if isinstance(case, Case) else kl.prepare(case, inputs, checked)

    def measure_case(case: Case | kl.Case, prepared: Prepared) -> Timing:
        try:
            return measure(prepared.call, graph=False, seconds=seconds)
        except torch.OutOfMemoryError:
            if isinstance(case, kl.Case) and case.is_baseline:
                raise Skipped("left out: the reference does not fit in memory") from None
            raise

    yield from suite.run_cases(
        SUITE,
        cases,
        ceilings,
        where,
        title=lambda case: f"L={case.L} {case.case} {case.selection or ''} {case.impl}",
        prepare=prepare_case,
        measure=measure_case,
        works=device_works,
    )


def format_table(rows: list[records.Record], known: list[records.Record]) -> str:
    """The table that people read: times over the baseline's among `known`, below 1 is faster.

    The baseline is cuDNN's attention for attention, the reference for the KL loss.
    """

    def of_baseline(r: records.Record) -> tuple[Any, ...]:
        selection = r["selection"] if r["case"].startswith("kl_") else None
        return r["case"], selection, r["shape"]["L"], r["shape"]["H_kv"]

    baselines = {of_baseline(r): r["ms"]["median"] for r in known if r["impl"] in ("cudnn", kl.REFERENCE) and r["ms"]}
    header = ("case", "impl", "L", "H_kv", "selection", "ms [p20–p80]", "of baseline", "of roofline", "GiB")
    lines: list[tuple[str, ...]] = []
    for r in rows:
        if r["case"] == "ceiling":
            continue
        lead = [r["case"], r["impl"], *(cell(r["shape"][n]) for n in ("L", "H_kv")), cell(r["selection"])]
        if r["ms"] is None:
            lines.append((*lead, r["reason"], "", "", ""))
            continue
        ms, over = r["ms"], baselines.get(of_baseline(r))
        lines.append(
            (
                *lead,
                f"{ms['median']:.2f} [{ms['p20']:.2f}–{ms['p80']:.2f}]",
                f"{ms['median'] / over:.2f}×" if over else "–",
                f"{100 * r['share_of_roofline']:.0f}%",
                f"{r['peak_bytes'] / 2**30:.2f}",
            )
        )
    return suite.format_lines(header, lines, right={2, 3, 5, 6, 7, 8})


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of the suite."""
    suite.add_shared_arguments(parser, length="this length", quick="fewer lengths, patterns and repetitions")
    parser.add_argument(
        "--selection", action="append", choices=patterns.SELECTIONS[:-1], help="only this pattern (may be repeated)"
    )
    parser.add_argument("--case", action="append", choices=PARTS, help="only these cases (may be repeated)")


def check_options(options: argparse.Namespace) -> str:
    """What is wrong with the options, or nothing."""
    return suite.check_shared_options(options, H)


def main(options: argparse.Namespace, argv: list[str]) -> int:
    """Run the suite: 0 if every case ran, 1 if one failed, 2 without a GPU."""
    if suite.refuses(INTERPRETED):
        return 2
    parts, heads = options.case or PARTS, options.kv_heads or list(KV_HEADS)
    selections = options.selection or list(QUICK_SELECTIONS if options.quick else SELECTIONS)
    cases: list[Case | kl.Case] = []
    if "attention" in parts:
        cases += plan(options.length or list(QUICK_LENGTHS if options.quick else LENGTHS), heads, selections)
    if "kl_loss" in parts:
        cases += kl.plan(options.length or list(kl.QUICK_LENGTHS if options.quick else kl.LENGTHS), heads, selections)
    seconds = QUICK_SECONDS if options.quick else SECONDS
    inputs = prefill.Inputs(options.seed)
    measured = lambda where: run(cases, inputs, seconds=seconds, where=where)  # noqa: E731
    return suite.report(measured, len(cases), options, argv, format_table)
