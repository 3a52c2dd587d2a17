"""Notebooks of puzzles as files: what they pose, and their code run without Jupyter."""

import json
import linecache
import re
import sys
import traceback
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import CodeType
from typing import Any

FOLDER = Path(__file__).parents[2] / "notebooks" / "puzzles"  # of a checkout; an installed package has none
STATEMENT = re.compile(
    r"^## (?P<title>.+)\n\n\*(?P<difficulty>Easy|Medium|Hard), (?P<minutes>\d+) minutes\.\* (?P<teaches>.+)"
)
CHECK = re.compile(r"""\bcheck\(\s*["'](\w+)["']""")
MAGIC = re.compile(r"^(\s*)[%!]", re.MULTILINE)  # what only Jupyter understands


@dataclass(frozen=True)
class Posed:
    """A puzzle as its notebook poses it: what the two lines above its statement say."""

    name: str
    title: str
    difficulty: str
    minutes: int
    teaches: str


def cells(path: Path, kind: str = "code") -> list[str]:
    """The sources of the cells of one kind.

    Raises:
        ValueError: the file is no notebook.
    """
    return [source for found, source in _all_cells(path) if found == kind]


def _all_cells(path: Path) -> list[tuple[str, str]]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))["cells"]
        return [(cell["cell_type"], "".join(cell["source"])) for cell in found]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path.name} is no notebook: {type(error).__name__}: {error}") from None


def posed(path: Path) -> list[Posed]:
    """The puzzles of a notebook: a statement, and behind it a cell that calls `check`."""
    found, statement = [], None
    for kind, source in _all_cells(path):
        if kind == "markdown":
            statement = STATEMENT.match(source) or statement
        elif statement and (call := CHECK.search(source)):
            fields: dict[str, Any] = statement.groupdict()
            fields["difficulty"] = fields["difficulty"].lower()
            found.append(Posed(**{**fields, "name": call[1], "minutes": int(fields["minutes"])}))
            statement = None
    return found


def title(path: Path) -> str:
    """What the heading of a notebook says, such as "01 · The indexer"."""
    return cells(path, "markdown")[0].partition("\n")[0].removeprefix("# Puzzles ")


def names(path: Path) -> list[str]:
    """The puzzles that a notebook checks."""
    return [name for source in cells(path) for name in CHECK.findall(source)]


def execute(path: Path) -> Iterator[dict[str, Any]]:
    """Run the code cells one after the other in this process; gives the namespace after each.

    A cell that raises is told on stderr and does not stop the others.
    """
    namespace: dict[str, Any] = {"__name__": "__main__"}
    for number, source in enumerate(cells(path), 1):
        file = f"<cell {number} of {path.name}>"
        # Triton reads the source of a kernel, which has no file.
        linecache.cache[file] = len(source), None, source.splitlines(keepends=True), file
        try:
            exec(_compiled(source, file), namespace)
        except Exception:  # noqa: BLE001  # the other puzzles are graded all the same
            traceback.print_exc(file=sys.stderr)
        yield namespace


def _compiled(source: str, file: str) -> CodeType:
    try:
        return compile(source, file, "exec")
    except SyntaxError:
        return compile(MAGIC.sub(r"\1pass  # ", source), file, "exec")
