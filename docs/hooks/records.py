"""Tables from the record files in benchmarks/results: no figure on a page is typed by hand."""

import json
import math
from collections import Counter
from pathlib import Path
from typing import Any

VERIFICATION = (
    "benchmarks/results/h200/verification.json",  # all stems
    "benchmarks/results/h200/verification_decode.json",  # one dtype, many cases
)
FUZZING = "benchmarks/results/cpu/fuzzing.json"
FIELDS = ("device", "torch", "triton", "command", "seed", "commit")
COLUMNS = ("stem", "dtype", "cases", "worst_error", "budget", "ratio", "verdict", "longest")


def verification_table(root: Path) -> str:
    """`{{ verification_table }}`: the stored results of `python -m gsa_fast verify`, or that there is none.

    Raises:
        KeyError: a record lacks a key.
        ValueError: a record is not JSON.
    """
    return "\n\n".join(_verification(root, name) for name in VERIFICATION)


def _verification(root: Path, name: str) -> str:
    path = root / name
    if not path.is_file():
        return f"No record is stored: there is no `{name}`."
    record = json.loads(path.read_text(encoding="utf-8"))
    lines = [f"From `{name}`:", ""]
    lines += [f"- {field}: `{record[field]}`" for field in FIELDS]
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
    path = root / FUZZING
    if not path.is_file():
        return f"No record is stored: there is no `{FUZZING}`."
    record = json.loads(path.read_text(encoding="utf-8"))
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
