"""Tables from the record files in benchmarks/results: no figure on a page is typed by hand."""

import json
import math
from pathlib import Path
from typing import Any

VERIFICATION = (
    "benchmarks/results/h200/verification.json",  # all stems
    "benchmarks/results/h200/verification_decode.json",  # one dtype, many cases
)
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


def _cell(value: Any) -> str:
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return "–"
    return f"{value:.3g}" if isinstance(value, float) else str(value)
