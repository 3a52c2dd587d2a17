"""Grade a notebook of puzzles: its cells, then one check, in a process of its own for every puzzle.

A process per puzzle, because a loop without end in one must not cost the others. This is no sandbox: it runs what the
notebook says.
"""

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import gsa_ref
import gsa_ref.puzzles
from gsa_ref.puzzles import Outcome, _files, find, puzzles_of, stems


def expected(path: Path) -> list[str]:
    """The puzzles that a notebook should hold: those of every stem of which it checks one.

    A deleted cell is then an unsolved puzzle.

    Raises:
        ValueError: the file is no notebook, or checks none of the puzzles.
    """
    checked = set(_files.names(path))
    everything = [[puzzle.name for puzzle in puzzles_of(stem)] for stem in stems()]
    found = [name for group in everything if checked & set(group) for name in group]
    if not found:
        raise ValueError(f"{path.name} checks no puzzle of the project")
    return found


def grade(path: Path, name: str, seconds: float) -> Outcome:
    """Run a notebook in a fresh process, and try its solution of one puzzle there."""
    root = Path(gsa_ref.__file__).parents[1]
    paths = os.pathsep.join(filter(None, (str(root), os.environ.get("PYTHONPATH"))))
    with tempfile.TemporaryDirectory() as folder:
        result = Path(folder) / "result.json"
        # -P: a file of the notebook's folder must not stand in for a module.
        command = [sys.executable, "-P", "-m", "gsa_ref.puzzles._grading", str(path.resolve()), name, str(result)]
        try:
            done = subprocess.run(
                command,
                cwd=path.resolve().parent,
                env={**os.environ, "PYTHONPATH": paths, "MPLBACKEND": "Agg"},
                stdin=subprocess.DEVNULL,
                capture_output=True,
                text=True,
                timeout=seconds,
            )
        except subprocess.TimeoutExpired:
            return Outcome(False, f"no answer within {seconds:g} s")
        if not result.exists():
            return Outcome(False, f"its process ended with status {done.returncode}\n{done.stderr[-2000:]}".rstrip())
        return Outcome(**json.loads(result.read_text(encoding="utf-8")))


def try_one(path: Path, name: str) -> Outcome:
    """Run a notebook in this process, and try its solution of one puzzle."""

    def later(name: str, function: Any) -> bool:
        """In place of `check` while the cells run."""
        return False

    gsa_ref.puzzles.check = later
    namespace: dict[str, Any] = {}
    for namespace in _files.execute(path):  # noqa: B007
        pass
    if not callable(namespace.get(name)):
        return Outcome(False, f"there is no function {name}")
    return find(name).run(namespace[name])


if __name__ == "__main__":
    notebook, wanted, where = sys.argv[1:]
    Path(where).write_text(json.dumps(try_one(Path(notebook), wanted)._asdict()), encoding="utf-8")
