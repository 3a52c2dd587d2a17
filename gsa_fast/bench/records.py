"""Records: a list of measurements in one JSON file, in which a newer one replaces an older one of the same thing."""

import json
from pathlib import Path
from typing import Any

import torch
import triton

from gsa_fast.verification.records import code_version, read_json, replace_text

Record = dict[str, Any]

# What a measurement is of; the rest of a record is what came out.
KEY = ("suite", "case", "impl", "selection", "sigmoid_mode", "shape", "dtype", "device")


def environment(command: str, seed: int) -> Record:
    """The fields that say where a record comes from."""
    return {
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "Triton interpreter on a CPU",
        "torch": torch.__version__,
        "triton": triton.__version__,
        "seed": seed,
        "command": command,
        **code_version(),
    }


def recorded_command(argv: list[str]) -> str:
    """The command line without `--json FILE`: a file's name says nothing about the measurement."""
    kept = []
    arguments = iter(argv)
    for argument in arguments:
        if argument == "--json":
            next(arguments, None)
        elif not argument.startswith("--json="):
            kept.append(f"'{argument}'" if " " in argument else argument)
    return " ".join(["python -m gsa_fast", *kept])


def key(record: Record) -> str:
    return json.dumps([record.get(name) for name in KEY], sort_keys=True)


def merged(old: list[Record], new: list[Record]) -> list[Record]:
    """The old records with those replaced that are measured anew, in their places, and the others behind them."""
    by_key = {key(record): record for record in old}
    by_key.update({key(record): record for record in new})
    return list(by_key.values())


def read(path: Path) -> list[Record]:
    """The records of a file, none if there is no such file.

    Raises:
        ValueError: the file holds something else than a list of records.
    """
    if not path.is_file():
        return []
    found = read_json(path, "a list of records")
    if not isinstance(found, list) or not all(isinstance(record, dict) for record in found):
        raise ValueError(f"{path}: expected a list of records, got {type(found).__name__}")
    return found


def write(path: Path, new: list[Record]) -> None:
    """Merge records into a file, which is replaced in one step."""
    text = json.dumps(merged(read(path), new), indent=1, ensure_ascii=False, allow_nan=False)
    replace_text(path, text + "\n")
