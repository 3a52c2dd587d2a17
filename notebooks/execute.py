"""Execute notebooks in place and store their outputs: `python notebooks/execute.py [NOTEBOOK …]`, all by default.

The stored file depends on the notebook only: no time stamps, no split output streams, no Python version.
The notebooks of `puzzles/` are written from those of `solutions/`: edit the solution, and execute that.
"""

import copy
import re
import sys
from pathlib import Path

import nbformat
from nbclient import NotebookClient

# nbgrader's markers, so that a course can take the solutions as they are.
SOLUTION = re.compile(r"^([ \t]*)### BEGIN SOLUTION\n.*?^[ \t]*### END SOLUTION$", re.MULTILINE | re.DOTALL)
STUB = r"\1raise NotImplementedError  # your code here"


def puzzle_of(solution: nbformat.NotebookNode) -> nbformat.NotebookNode:
    """The notebook that poses what `solution` solves: what lies between the markers raises, and nothing was executed."""
    puzzle = copy.deepcopy(solution)
    for cell in puzzle.cells:
        if cell.cell_type == "code":
            cell.source = SOLUTION.sub(STUB, cell.source)
            cell.outputs, cell.execution_count = [], None
    return puzzle


def execute(path: Path) -> None:
    """Run one notebook in its own folder; an error in a cell raises, and the file stays as it was."""
    notebook = nbformat.read(path, as_version=4)
    resources = {"metadata": {"path": str(path.parent)}}
    NotebookClient(notebook, resources=resources, timeout=300, record_timing=False, coalesce_streams=True).execute()
    notebook.metadata["language_info"] = {"name": "python"}
    nbformat.write(notebook, path)


def execute_with_its_puzzle(path: Path) -> None:
    """Run one notebook; of a solution, write the puzzle and run it as well."""
    execute(path)
    if path.parent.name == "solutions":
        puzzle = path.parent.parent / "puzzles" / path.name
        nbformat.write(puzzle_of(nbformat.read(path, as_version=4)), puzzle)
        execute(puzzle)


if __name__ == "__main__":
    here = Path(__file__).parent
    everything = sorted(p for p in here.rglob("*.ipynb") if not {".ipynb_checkpoints", "puzzles"} & set(p.parts))
    for name in sys.argv[1:] or everything:
        print("executing", name)
        execute_with_its_puzzle(Path(name).resolve())
