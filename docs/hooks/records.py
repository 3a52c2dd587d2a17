"""Tables from the record files in benchmarks/results: no figure on a page is typed by hand."""

import json
import math
from collections import Counter
from pathlib import Path
from typing import Any

VERIFICATION = "benchmarks/results/h200/verification.json"
REFERENCE_MUTANTS = "benchmarks/results/cpu/reference_mutants.json"
FIELDS = ("device", "torch", "triton", "command", "seed", "commit")
COLUMNS = ("stem", "dtype", "cases", "worst_error", "budget", "ratio", "verdict", "longest")


def verification_table(root: Path) -> str:
    """`{{ verification_table }}`: the stored result of `python -m gsa_fast verify`, or that there is none.

    Raises:
        KeyError: the record lacks a key.
        ValueError: the record is not JSON.
    """
    path = root / VERIFICATION
    if not path.is_file():
        return f"No record is stored: there is no `{VERIFICATION}`."
    record = json.loads(path.read_text(encoding="utf-8"))
    lines = [f"From `{VERIFICATION}`:", ""]
    lines += [f"- {field}: `{record[field]}`" for field in FIELDS]
    lines += ["", "| " + " | ".join(c.replace("_", " ") for c in COLUMNS) + " |", "|---|---|" + "--:|" * 4 + "---|--:|"]
    lines += ["| " + " | ".join(_cell(row[column]) for column in COLUMNS) + " |" for row in record["rows"]]
    lines += ["", "Error and budget are those of the case that came nearest its budget; *longest* is in tokens."]
    return "\n".join(lines)


def reference_mutants_table(root: Path) -> str:
    """`{{ reference_mutants_table }}`: mutants of each module of gsa_ref, and why some survive.

    Raises:
        KeyError: the record lacks a key.
        ValueError: the record is not JSON.
    """
    path = root / REFERENCE_MUTANTS
    if not path.is_file():
        return f"No record is stored: there is no `{REFERENCE_MUTANTS}`."
    record = json.loads(path.read_text(encoding="utf-8"))
    lines = [f"From `{REFERENCE_MUTANTS}`:", ""]
    lines += [f"- {field}: `{record[field]}`" for field in ("tool", "python", "torch", "command")]
    lines += ["", "| module | mutants | killed | share | survived | of these explained |", "|---|" + "--:|" * 5]
    total = [0, 0, 0, 0]
    for row in record["modules"]:
        killed = row["killed"] + row["timeout"]
        counts = [row["mutants"], killed, row["survived"], sum(s["why"] is not None for s in row["survivors"])]
        total = [a + b for a, b in zip(total, counts, strict=True)]
        lines.append(_mutants_row(f"`gsa_ref.{row['module']}`", *counts))
    lines.append(_mutants_row("**all of these**", *total))
    if record["not_run"]:
        lines += ["", "Without a result: " + ", ".join(f"`gsa_ref.{module}`" for module in record["not_run"]) + "."]
    return "\n".join(lines)


def _mutants_row(name: str, mutants: int, killed: int, survived: int, explained: int) -> str:
    return f"| {name} | {mutants} | {killed} | {100 * killed / mutants:.1f}% | {survived} | {explained} |"


def reference_survivors_table(root: Path) -> str:
    """`{{ reference_survivors_table }}`: the reasons for which mutants of gsa_ref survive, with how many each has.

    Raises:
        KeyError: the record lacks a key.
        ValueError: the record is not JSON.
    """
    path = root / REFERENCE_MUTANTS
    if not path.is_file():
        return f"No record is stored: there is no `{REFERENCE_MUTANTS}`."
    record = json.loads(path.read_text(encoding="utf-8"))
    survivors = [survivor for row in record["modules"] for survivor in row["survivors"]]
    reasons = Counter((s["kind"] or "open", s["why"] or "a gap in the tests of the module") for s in survivors)
    lines = ["| kind | mutants | reason |", "|---|--:|---|"]
    lines += [f"| {kind} | {n} | {why} |" for (kind, why), n in sorted(reasons.items())]
    return "\n".join(lines)


def _cell(value: Any) -> str:
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return "–"
    return f"{value:.3g}" if isinstance(value, float) else str(value)
