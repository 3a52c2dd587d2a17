"""The list of puzzles, from what their notebooks say above each statement."""

import runpy
from collections import Counter
from pathlib import Path
from typing import Any

from speed import table

FOLDER = "notebooks/puzzles"


def reader(root: Path) -> dict[str, Any]:
    """What `gsa_ref.puzzles._files` defines; to import the package would load PyTorch into the build of the site."""
    return runpy.run_path(str(root / "gsa_ref/puzzles/_files.py"))


def posed(root: Path) -> dict[Path, list[Any]]:
    """The puzzles of each notebook (`gsa_ref.puzzles._files.Posed`), in order."""
    read = reader(root)["posed"]
    return {path: read(path) for path in sorted((root / FOLDER).glob("*.ipynb"))}


def puzzles_count(root: Path) -> str:
    """`{{ puzzles_count }}`: how many puzzles there are, of which difficulty, and how long they take."""
    found = [p for group in posed(root).values() for p in group]
    difficulties = Counter(p.difficulty for p in found)
    parts = ", ".join(f"{difficulties[name]} {name}" for name in ("easy", "medium", "hard"))
    return f"{len(found)} puzzles ({parts}), {sum(p.minutes for p in found) / 60:.1f} hours in all"


def puzzles_list(root: Path) -> str:
    """`{{ puzzles_list }}`: a section for each notebook, with its files and its puzzles."""
    lines, title = [], reader(root)["title"]
    for path, group in posed(root).items():
        lesson = next((root / "notebooks").glob(f"{path.stem}.ipynb"), None)
        links = [f"[{path.name}](../{FOLDER}/{path.name}){{ download }}"]
        if lesson:
            links.append(f"[lesson](../notebooks/{lesson.name})")
        links.append(f"[solutions](../notebooks/solutions/{path.name}){{ download='{path.stem}_solutions.ipynb' }}")
        rows = [[p.title, p.teaches, p.difficulty, p.minutes] for p in group]
        lines += [f"### {title(path)} {{ #{path.stem[3:]} }}", "", " · ".join(links), ""]
        lines += [table(["puzzle", "what it teaches", "difficulty", "minutes"], rows, left=3), ""]
    return "\n".join(lines)


DIRECTIVES = {f.__name__: f for f in (puzzles_count, puzzles_list)}
