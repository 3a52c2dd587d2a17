"""Records of `verify` and `compile`, one JSON object a file with the rows of a table; and of which code they are."""

import hashlib
import json
import os
import subprocess
from pathlib import Path
from typing import Any


def code_version() -> dict[str, str | None]:
    """Which code a record is of: the commit, and the sources, which a machine without the repository knows as well."""
    return {"commit": commit(), "sources": sources()}


def sources(root: Path = Path(__file__).parents[2]) -> str:
    """SHA-256 of the Python files of both packages, each with its name: 12 hexadecimal digits."""
    digest = hashlib.sha256()
    for path in sorted(path for package in ("gsa_fast", "gsa_ref") for path in (root / package).rglob("*.py")):
        text = path.read_bytes()
        digest.update(f"{path.relative_to(root).as_posix()} {len(text)}\n".encode() + text)
    return digest.hexdigest()[:12]


def commit() -> str | None:
    """The commit of the checkout that this file lies in; None for an installed package, or if files were changed."""

    def git(*arguments: str) -> str:
        return subprocess.run(
            ["git", *arguments], cwd=Path(__file__).parent, capture_output=True, text=True, check=True
        ).stdout.strip()

    try:
        return None if git("status", "--porcelain", "--", ":/*.py") else git("rev-parse", "HEAD")
    except (OSError, subprocess.CalledProcessError):
        return None


def with_rows_of(old: dict[str, Any] | None, new: dict[str, Any], key: tuple[str, ...]) -> dict[str, Any]:
    """The new record with the old one's rows where it has none, so that a long suite can be run in parts.

    Rows are the same if they agree in the fields of `key`. All else must be equal: rows of another device or another
    version of Triton are not kept.
    """
    if old is None or any(old.get(name) != new[name] for name in new if name != "rows"):
        return new
    rows = {tuple(row[name] for name in key): row for record in (old, new) for row in record["rows"]}
    return new | {"rows": list(rows.values())}


def write(path: Path, new: dict[str, Any], key: tuple[str, ...]) -> None:
    """Write a record into a file, which keeps its other rows as `with_rows_of` says.

    Raises:
        ValueError: the file exists and holds no JSON object.
    """
    replace_text(path, json.dumps(with_rows_of(read(path), new, key), indent=1, ensure_ascii=False) + "\n")


def read(path: Path) -> dict[str, Any] | None:
    """The record of a file, or None if there is no such file.

    Raises:
        ValueError: the file holds no JSON object.
    """
    if not path.is_file():
        return None
    found = read_json(path, "a record")
    if not isinstance(found, dict):
        raise ValueError(f"{path}: expected a record, got {type(found).__name__}")
    return found


def read_json(path: Path, expected: str) -> Any:
    """What a file holds.

    Raises:
        ValueError: no JSON; the message says that `expected` was.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}: expected {expected}, got no JSON ({error})") from None


def replace_text(path: Path, text: str) -> None:
    """Replace a file in one step, so that an interrupted run leaves the old one whole."""
    partial = path.with_name(path.name + ".partial")
    partial.write_text(text, encoding="utf-8")
    os.replace(partial, path)
