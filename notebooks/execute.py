"""Execute notebooks in place and store their outputs: `python notebooks/execute.py [NOTEBOOK …]`, all by default.

The stored file depends on the notebook only: no time stamps, no split output streams, no Python version.
"""

import sys
from pathlib import Path

import nbformat
from nbclient import NotebookClient


def execute(path: Path) -> None:
    """Run one notebook in its own folder; an error in a cell raises, and the file stays as it was."""
    notebook = nbformat.read(path, as_version=4)
    resources = {"metadata": {"path": str(path.parent)}}
    NotebookClient(notebook, resources=resources, timeout=300, record_timing=False, coalesce_streams=True).execute()
    notebook.metadata["language_info"] = {"name": "python"}
    nbformat.write(notebook, path)


if __name__ == "__main__":
    here = Path(__file__).parent
    for name in sys.argv[1:] or sorted(p for p in here.rglob("*.ipynb") if ".ipynb_checkpoints" not in p.parts):
        print("executing", name)
        execute(Path(name))
