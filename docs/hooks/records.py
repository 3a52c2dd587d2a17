"""Tables from the record files in benchmarks/results: no figure on a page is typed by hand."""

import json
import math
from collections import Counter
from pathlib import Path
from typing import Any

from speed import origin, table

VERIFICATION = (
    "benchmarks/results/h200/verification.json",  # all stems
    "benchmarks/results/h200/verification_decode.json",  # one dtype, many cases
)
FUZZING = "benchmarks/results/cpu/fuzzing.json"
GENERATED, BY_HAND = "tests/mutants/generated.json", "tests/mutants/hand.json"
SURVIVORS = "tests/mutants/survivors.json"
COMPILED = "benchmarks/results/compile"
REFERENCE_MUTANTS = "benchmarks/results/cpu/reference_mutants.json"
FIELDS, ORIGIN = ("device", "torch", "triton", "seed"), ("command", "commit", "sources")  # of a record, of its rows
COLUMNS = ("stem", "dtype", "cases", "worst_error", "budget", "ratio", "verdict", "longest")


def _record(root: Path, path: str) -> dict[str, Any] | None:
    return json.loads((root / path).read_text(encoding="utf-8")) if (root / path).is_file() else None


def _no_record(path: str) -> str:
    return f"No record is stored: there is no `{path}`."


def verification_table(root: Path) -> str:
    """`{{ verification_table }}`: the stored results of `python -m gsa_fast verify`, or that there is none.

    Raises:
        KeyError: a record lacks a key.
        ValueError: a record is not JSON.
    """
    return "\n\n".join(_verification(root, name) for name in VERIFICATION)


def _verification(root: Path, name: str) -> str:
    record = _record(root, name)
    if record is None:
        return _no_record(name)
    lines = [f"From `{name}`:", ""]
    lines += origin([record], *FIELDS) + origin(record["rows"], *ORIGIN)
    lines += ["", "| " + " | ".join(c.replace("_", " ") for c in COLUMNS) + " |", "|---|---|" + "--:|" * 4 + "---|--:|"]
    lines += ["| " + " | ".join(_cell(row[column]) for column in COLUMNS) + " |" for row in record["rows"]]
    lines += ["", "Error and budget are those of the case that came nearest its budget; *longest* is in tokens."]
    return "\n".join(lines)


def fuzzing_table(root: Path) -> str:
    """`{{ fuzzing_table }}`: the stored result of `make fuzz` by function and outcome, or that there is none.

    Raises:
        KeyError: the record lacks a key.
        ValueError: the record is not JSON.
    """
    record = _record(root, FUZZING)
    if record is None:
        return _no_record(FUZZING)
    calls: Counter[tuple[str, str]] = Counter()
    for row in record["rows"]:
        calls[row["function"], row["outcome"]] += row["calls"]
    functions = sorted({function for function, _ in calls})
    outcomes = [*sorted({outcome for _, outcome in calls} - {"violation"}), "violation"]
    lines = [f"From `{FUZZING}`, {record['calls']:,} calls, {record['violations']:,} of them violations:", ""]
    lines += [f"- {field}: `{record[field]}`" for field in ("device", "torch", "triton", "command", "seed")]
    lines += ["", "| | " + " | ".join(outcomes) + " |", "|---|" + "--:|" * len(outcomes)]
    for function in functions:
        lines.append(f"| `{function}` | " + " | ".join(str(calls[function, o] or "–") for o in outcomes) + " |")
    totals = (sum(k for (_, o), k in calls.items() if o == outcome) for outcome in outcomes)
    lines.append("| all | " + " | ".join(f"{k:,}" for k in totals) + " |")
    kinds = sorted({row["fault"] for row in record["rows"]} - {"none"})
    lines += ["", "What was wrong, or odd but legal: " + ", ".join(kinds) + "."]
    return "\n".join(lines)


def _cell(value: Any) -> str:
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return "–"
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def _code(text: str) -> str:
    """Code for a cell of a table: on one line, and no bar ends the cell."""
    return f"<code>{' '.join(text.split()).replace('&', '&amp;').replace('<', '&lt;').replace('|', '&#124;')}</code>"


def _list(root: Path, path: str) -> list[dict[str, Any]]:
    return json.loads((root / path).read_text(encoding="utf-8"))


def _killed(fault: dict[str, Any]) -> bool:
    return fault["verdict"] != "pass"


def mutants_by(root: Path, column: str) -> str:
    """`{{ mutants_by operator }}`: how many generated faults there are and how many a check kills, by a field.

    Raises:
        KeyError: the record lacks the field.
    """
    faults = _list(root, GENERATED)
    drawn, killed = Counter(f[column] for f in faults), Counter(f[column] for f in faults if _killed(f))
    rows: list[tuple[Any, ...]] = [(f"`{x}`" if column != "operator" else x, drawn[x], killed[x]) for x in drawn]
    rows = sorted(rows, key=lambda row: (-row[1], row[0])) if column == "operator" else rows
    return table((column, "faults", "killed"), [*rows, ("all", len(faults), sum(killed.values()))])


def mutants_stems(root: Path) -> str:
    """`{{ mutants_stems }}`: which stem's check killed how many faults, and by which verdict."""
    faults = [("by hand", f) for f in _list(root, BY_HAND)] + [("generated", f) for f in _list(root, GENERATED)]
    found = Counter((f["stem"] or "import", kind, f["verdict"]) for kind, f in faults if _killed(f))
    kinds = [("by hand", "FAIL"), ("by hand", "CRASH"), ("by hand", "TIMEOUT")]
    kinds += [("generated", verdict) for _, verdict in kinds]
    stems = sorted({stem for stem, _, _ in found})
    header = ("stem", *(f"{kind}: {verdict}" for kind, verdict in kinds))
    return table(header, [(stem, *(found[stem, *kind] for kind in kinds)) for stem in stems])


def mutants_survivors(root: Path) -> str:
    """`{{ mutants_survivors }}`: every fault that survives, and why no check can or need see it."""
    explained = _list(root, SURVIVORS)
    rows = []
    for e in explained:
        if "name" in e:
            rows.append(("by hand", e["name"], "", e["why"]))
        else:
            rows.append((f"`{e['kernel']}`", _code(e["before"]), _code(e["after"]), e["why"]))
    return table(("where", "line", "fault", "why it survives"), rows, left=4)


def mutants_count(root: Path, which: str, what: str) -> str:
    """`{{ mutants_count generated killed }}`: how many faults, "generated" or "hand", were "run" or are "killed"."""
    faults = _list(root, {"generated": GENERATED, "hand": BY_HAND}[which])
    return str({"run": len(faults), "killed": sum(map(_killed, faults))}[what])


def compile_table(root: Path) -> str:
    """`{{ compile_table }}`: by target and version of Triton, what the kernels that take most take."""
    rows = []
    for path in sorted((root / COMPILED).glob("*.json")):
        record = json.loads(path.read_text(encoding="utf-8"))
        for target in dict.fromkeys(row["target"] for row in record["rows"]):
            found = [row for row in record["rows"] if row["target"] == target]
            largest = max(found, key=lambda row: row["shared_memory"])
            rows.append(
                (
                    target,
                    record["triton"],
                    sum(row["variants"] for row in found),
                    sum(len(row["misfits"]) for row in found),
                    f"{largest['shared_memory']:,} of {largest['shared_memory_limit']:,} (`{largest['kernel']}`)",
                    max(row["registers"] for row in found),
                    max(row["stack"] for row in found if not row["kernel"].endswith("_repair_kernel")),
                )
            )
    if not rows:
        return f"No record is stored: there is none in `{COMPILED}`."
    rows.sort(key=lambda row: (int(row[0].removeprefix("sm_")), row[1]))
    header = ("target", "Triton", "variants", "do not fit", "most shared memory", "registers", "stack")
    return table(header, rows, left=2)


def reference_mutants_table(root: Path) -> str:
    """`{{ reference_mutants_table }}`: mutants of each module of gsa_ref, and why some survive.

    Raises:
        KeyError: the record lacks a key.
        ValueError: the record is not JSON.
    """
    record = _record(root, REFERENCE_MUTANTS)
    if record is None:
        return _no_record(REFERENCE_MUTANTS)
    lines = [f"From `{REFERENCE_MUTANTS}`:", ""]
    lines += [f"- {field}: `{record[field]}`" for field in ("tool", "python", "torch", "command")]
    header = ("module", "mutants", "killed", "share", "survived", "of these explained")
    total = [0, 0, 0, 0]
    rows = []
    for row in record["modules"]:
        killed = row["killed"] + row["timeout"]
        counts = [row["mutants"], killed, row["survived"], sum(s["why"] is not None for s in row["survivors"])]
        total = [a + b for a, b in zip(total, counts, strict=True)]
        rows.append(_mutants_row(f"`gsa_ref.{row['module']}`", *counts))
    lines += ["", table(header, [*rows, _mutants_row("**all of these**", *total)])]
    if record["not_run"]:
        lines += ["", "Without a result: " + ", ".join(f"`gsa_ref.{module}`" for module in record["not_run"]) + "."]
    return "\n".join(lines)


def _mutants_row(name: str, mutants: int, killed: int, survived: int, explained: int) -> tuple[Any, ...]:
    return name, mutants, killed, f"{100 * killed / mutants:.1f}%", survived, explained


def reference_survivors_table(root: Path) -> str:
    """`{{ reference_survivors_table }}`: the reasons for which mutants of gsa_ref survive, with how many each has.

    Raises:
        KeyError: the record lacks a key.
        ValueError: the record is not JSON.
    """
    record = _record(root, REFERENCE_MUTANTS)
    if record is None:
        return _no_record(REFERENCE_MUTANTS)
    survivors = [survivor for row in record["modules"] for survivor in row["survivors"]]
    reasons = Counter((s["kind"] or "open", s["why"] or "a gap in the tests of the module") for s in survivors)
    lines = ["| kind | mutants | reason |", "|---|--:|---|"]
    lines += [f"| {kind} | {n} | {why} |" for (kind, why), n in sorted(reasons.items())]
    return "\n".join(lines)


DIRECTIVES = {
    f.__name__: f
    for f in (
        verification_table, fuzzing_table, mutants_by, mutants_stems, mutants_survivors, mutants_count, compile_table,
        reference_mutants_table, reference_survivors_table,
    )
}  # fmt: skip
