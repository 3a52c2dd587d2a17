"""What the suites share: sizes, cases of which one may fail without ending the others, records, tables, options."""

import argparse
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol, TypeVar

import torch
from tqdm import tqdm
from triton import TritonError

from gsa_fast.bench import records, rooflines
from gsa_fast.bench.rooflines import Ceilings, Work
from gsa_fast.bench.timing import Timing, first_line

H, D_H, H_I, D_I, K_BASE = 32, 128, 4, 64, 2048
DTYPE = torch.bfloat16
SHORTEST = 16
# What may go wrong in one case without ending the others: memory, an unsupported shape, a kernel that does not fit.
CASE_ERRORS = (RuntimeError, ValueError, TritonError)


class AnyCase(Protocol):
    """What a record needs to know of a case. `shape` has None where a size does not enter."""

    @property
    def case(self) -> str: ...
    @property
    def impl(self) -> str: ...
    @property
    def selection(self) -> str | None: ...
    @property
    def sigmoid_mode(self) -> str | None: ...
    @property
    def shape(self) -> dict[str, int | None]: ...


C = TypeVar("C", bound=AnyCase)


class Kept:
    """Remembers the newest values of a function: what the next case needs again, and no more memory than that."""

    def __init__(self, make: Callable[..., Any], newest: int) -> None:
        self.make, self.newest = make, newest
        self.values: dict[Any, Any] = {}

    def __call__(self, *key: Any) -> Any:
        if key not in self.values:
            while len(self.values) >= self.newest:
                del self.values[next(iter(self.values))]
            self.values[key] = self.make(*key)
        return self.values[key]


class Skipped(Exception):
    """A case that is left out on purpose; the message is the reason that its record gives."""


@dataclass
class Prepared:
    """What a case runs, the work behind its roofline, and fields of its record."""

    call: Callable[[], Any]
    stages: list[Work]
    fields: dict[str, Any] = field(default_factory=dict)


def to_record(
    suite: str,
    case: AnyCase,
    where: dict[str, Any],
    timing: Timing | None,
    stages: list[Work],
    ceilings: Ceilings,
    reason: str = "",
) -> records.Record:
    """A record of design "Records": without a timing, times are null and `reason` says why.

    `tflops` is the stages' matrix work, and `tbps` their bytes of the level (L2 or memory) that binds, over the median.
    """
    record: records.Record = {
        "suite": suite,
        "case": case.case,
        "impl": case.impl,
        "selection": case.selection,
        "sigmoid_mode": case.sigmoid_mode,
        "shape": case.shape,
        "dtype": str(DTYPE).removeprefix("torch."),
        "ms": None,
        "peak_bytes": None,
        "tbps": None,
        "tflops": None,
        "share_of_roofline": None,
        "mean_k": None,
        "union_over_k": None,
        "p_eff": None,
        "graph": False,
        **where,
    }
    if timing is not None:
        seconds = 1e-3 * timing.median
        record["ms"] = {"median": timing.median, "p20": timing.p20, "p80": timing.p80}
        record["repetitions"] = timing.repetitions
        record["peak_bytes"] = timing.peak_bytes
        record["graph"] = timing.graph
        record["tflops"] = 1e-12 * sum(work.flop for work in stages) / seconds
        moved = sum(
            work.l2_bytes if work.l2_bytes / ceilings.gather > work.memory_bytes / ceilings.copy else work.memory_bytes
            for work in stages
        )
        record["tbps"] = 1e-12 * moved / seconds
        record["roofline_ms"] = 1e3 * rooflines.whole_seconds(stages, ceilings)
        record["share_of_roofline"] = record["roofline_ms"] / timing.median
        reason = timing.reason
    if reason:
        record["reason"] = reason
    return record


def ceiling_records(
    suite: str, ceilings: Ceilings, timings: dict[str, Timing], where: dict[str, Any]
) -> Iterator[records.Record]:
    """One record per ceiling: the rate is in `tbps`, `tflops` or, for special functions, `tops` (1e12 per second)."""
    unit = {"matmul": "tflops", "copy": "tbps", "gather": "tbps", "special": "tops"}
    for name, timing in timings.items():
        yield {
            "suite": suite,
            "case": "ceiling",
            "impl": name,
            "selection": None,
            "shape": None,
            "dtype": "float32" if name == "special" else "bfloat16",
            "ms": {"median": timing.median, "p20": timing.p20, "p80": timing.p80},
            unit[name]: 1e-12 * getattr(ceilings, name),
            **where,
        }


def device_works() -> bool:
    """Whether the device still takes work: after a fault in a kernel it refuses everything."""
    try:
        torch.cuda.synchronize()
    except RuntimeError:
        return False
    return True


def run_cases(
    suite: str,
    cases: list[C],
    ceilings: Ceilings,
    where: dict[str, Any],
    *,
    title: Callable[[C], str],
    prepare: Callable[[C], Prepared],
    measure: Callable[[C, Prepared], Timing],
    works: Callable[[], bool],
) -> Iterator[records.Record]:
    """A record per case; one that fails gives a record that says so, and ends the run only if the device, asked by
    `works`, refuses further work."""
    broken = False
    with tqdm(cases, unit="case", leave=False, disable=None) as bar:
        for case in bar:
            bar.set_description(title(case))
            prepared, timing, reason = None, None, ""
            try:
                prepared = prepare(case)
                timing = measure(case, prepared)
            except Skipped as skipped:
                reason = str(skipped)
            except CASE_ERRORS as error:
                reason = f"failed: {first_line(error)}"
                broken = not works()
            stages = prepared.stages if prepared else []
            record = to_record(suite, case, where, timing, stages, ceilings, reason)
            yield record | (prepared.fields if prepared else {})
            if broken:  # every later case would fail too, and replace what an earlier run measured
                return
            del prepared  # its inputs must not outlive it while the next ones are drawn


def format_lines(header: tuple[str, ...], lines: list[tuple[str, ...]], right: set[int]) -> str:
    """A table for people; the columns in `right` hold figures. A line that ends in an empty cell gives a reason
    instead of figures, and may be longer than its columns."""
    widths = [max(len(line[i]) for line in (header, *lines) if line[-1]) for i in range(len(header))]

    def render(line: tuple[str, ...]) -> str:
        cells = (
            c.ljust(w) if i not in right or not line[-1] else c.rjust(w)
            for i, (c, w) in enumerate(zip(line, widths, strict=True))
        )
        return "  ".join(cells).rstrip()

    return "\n".join([render(header), "  ".join("-" * w for w in widths), *map(render, lines)])


def cell(value: Any) -> str:
    return "–" if value is None else str(value)


def format_ceilings(rows: list[records.Record]) -> str:
    """The measured ceilings in one line."""
    units = {"tflops": "TFLOP/s", "tbps": "TB/s", "tops": "T/s"}
    found = [r for r in rows if r["case"] == "ceiling"]
    return "Ceilings: " + ", ".join(
        f"{r['impl']} {r[u]:.3g} {name}" for r in found for u, name in units.items() if u in r
    )


def add_shared_arguments(parser: argparse.ArgumentParser, *, length: str, quick: str) -> None:
    """The options of every suite; `length` and `quick` say what these two mean."""
    parser.add_argument("--length", action="append", type=int, metavar="L", help=f"only {length} (may be repeated)")
    parser.add_argument("--kv-heads", action="append", type=int, metavar="N", help="only this H_kv (may be repeated)")
    parser.add_argument("--quick", action="store_true", help=quick)
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="seed of the inputs (default 0)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="merge the records into this file")


def check_shared_options(options: argparse.Namespace, heads: int) -> str:
    """What is wrong with the options of every suite, for this many query heads, or nothing."""
    for L in options.length or []:
        if L < SHORTEST:
            return f"argument --length: expected at least {SHORTEST}, got {L}"
    for H_kv in options.kv_heads or []:
        if H_kv < 1 or heads % H_kv:
            return f"argument --kv-heads: expected a divisor of {heads}, got {H_kv}"
    if options.json is not None:
        try:
            records.read(options.json)
        except ValueError as error:
            return f"argument --json: {error}"
    return ""


def refuses(interpreted: bool) -> bool:
    """Whether nothing can be measured here; if so, says why."""
    if not interpreted and torch.cuda.is_available():
        return False
    problem = "TRITON_INTERPRET is set, and the interpreter's times mean nothing" if interpreted else "there is none"
    print(f"python -m gsa_fast bench needs a CUDA device: {problem}.", file=sys.stderr)
    return True


def report(
    run: Callable[[dict[str, Any]], Iterator[records.Record]],
    n_cases: int,
    options: argparse.Namespace,
    argv: list[str],
    format_table: Callable[[list[records.Record], list[records.Record]], str],
) -> int:
    """Run the cases, merge each record into the file at once, and print the table; 1 if a case failed, else 0.

    Args:
        run: gives the records, from the fields that say where they come from.
    """
    where, path = records.environment(records.recorded_command(argv), options.seed), options.json
    print(f"{n_cases} cases on {where['device']}, seed {options.seed}.", flush=True)
    rows = []
    for record in run(where):
        rows.append(record)
        if path is not None:
            records.write(path, [record])
    known = records.merged(records.read(path) if path is not None else [], rows)
    print(format_ceilings(rows))
    print(format_table(rows, [r for r in known if r["device"] == where["device"]]))
    failed = [r for r in rows if r.get("reason", "").startswith("failed")]
    if failed:
        print(f"\n{len(failed)} of {n_cases} cases failed.")
    if (left := n_cases - sum(r["case"] != "ceiling" for r in rows)) > 0:
        print(f"The device failed: {left} cases were not run.")
    return 1 if failed else 0
