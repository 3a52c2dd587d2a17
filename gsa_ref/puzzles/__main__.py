"""`python -m gsa_ref.puzzles list` and `python -m gsa_ref.puzzles grade FILE.ipynb`."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from gsa_ref.puzzles import _files
from gsa_ref.puzzles._grading import expected, grade


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command and return its exit status: 1 for an unsolved puzzle; 2, through SystemExit, for an error."""
    parser = argparse.ArgumentParser(
        prog="python -m gsa_ref.puzzles", description="The puzzles: list them, grade them."
    )
    commands = parser.add_subparsers(dest="command", required=True)
    listing = commands.add_parser("list", help="all puzzles, with difficulty and minutes")
    listing.add_argument(
        "--folder", type=Path, default=_files.FOLDER, help="where the notebooks are (default: %(default)s)"
    )
    grading = commands.add_parser(
        "grade",
        help="grade a notebook",
        description="Run a notebook of puzzles and try its solutions, each in a process of its own. This RUNS THE CODE "
        "in the notebook, with your rights: grade other people's work in a container or as another user.",
    )
    grading.add_argument("file", type=Path, metavar="FILE.ipynb")
    grading.add_argument("--seconds", type=float, default=120, help="limit per puzzle (default: %(default)s)")
    arguments = parser.parse_args(argv)
    try:
        return _list(arguments.folder) if arguments.command == "list" else _grade(arguments.file, arguments.seconds)
    except (OSError, ValueError) as error:
        parser.error(str(error))


def _list(folder: Path) -> int:
    files = sorted(folder.glob("*.ipynb"))
    if not files:
        raise ValueError(
            f"no notebooks in {folder}: they are in a checkout of the project, not in the installed package"
        )
    for path in files:
        print(f"{_files.title(path)}  ({path.name})")
        for p in _files.posed(path):
            print(f"  {p.name:24} {p.difficulty:7} {p.minutes:3} min  {p.title}")
    return 0


def _grade(path: Path, seconds: float) -> int:
    outcomes = {name: grade(path, name, seconds) for name in expected(path)}
    for name, outcome in outcomes.items():
        print(f"{name:24} {outcome.text.splitlines()[0]}")
    solved = sum(outcome.solved for outcome in outcomes.values())
    print(f"{solved} of {len(outcomes)} solved")
    for name, outcome in outcomes.items():
        if len(outcome.text.splitlines()) > 1:
            print(f"\n{name}: {outcome.text}")
    return 0 if solved == len(outcomes) else 1


if __name__ == "__main__":
    sys.exit(main())
