"""What the pages for lecturers take from other files: minutes of notebooks, syllabi, exam questions, the citation.

- Minutes stand in the notebooks. A notebook that does not exist yet is left out of every list, and appears in them with
  its file.
- docs/teach/syllabi.toml has the blocks of the lectures and how courses are made of them.
- docs/teach/questions.toml has the exam questions. tests/test_teach.py runs their checks.
"""

import json
import re
import tomllib
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from excerpts import section, sections
from puzzles import FOLDER, posed
from register import PROPERTIES
from speed import table

SYLLABI = "docs/teach/syllabi.toml"
QUESTIONS = "docs/teach/questions.toml"
UP = "../"  # from docs/teach/ to docs/
NOTEBOOKS = "notebooks"
MINUTES = re.compile(r"\*\*(\d+) minutes\.\*\*")
PUZZLE = re.compile(r"^\*\*(.+?)\.\*\* \*(\w+), (\d+) minutes\.\*", re.MULTILINE)
LEVELS = ("easy", "medium", "hard")
SESSION = 90  # minutes of a lecture


# ---- notebooks -------------------------------------------------------------------------------------------------------


def notebook_file(root: Path, number: str) -> Path | None:
    """The notebook `NN_….ipynb`, if it exists."""
    found = sorted((root / NOTEBOOKS).glob(f"{number}_*.ipynb"))
    return found[0] if found else None


def notebook_text(path: Path) -> str:
    """The text cells of a notebook."""
    cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
    return "\n\n".join("".join(c["source"]) for c in cells if c["cell_type"] == "markdown")


def minutes_of(path: Path) -> int:
    """How long a notebook says that it takes.

    Raises:
        LookupError: it does not say.
    """
    stated = MINUTES.search(notebook_text(path))
    if stated is None:
        raise LookupError(f"{path.name} states no minutes")
    return int(stated[1])


def minutes(root: Path, number: str) -> str:
    """`{{ minutes 01 }}`: the minutes that a notebook states.

    Raises:
        LookupError: there is no such notebook, or it does not say.
    """
    path = notebook_file(root, number)
    if path is None:
        raise LookupError(f"no notebook {number}")
    return str(minutes_of(path))


def notebook_link(root: Path, path: Path) -> str:
    """A link with the notebook's title and its minutes."""
    title = notebook_text(path).splitlines()[0].removeprefix("# ")
    return f"[{title}]({UP}{path.relative_to(root).as_posix()}), {minutes_of(path)} minutes"


def notebook_table(root: Path) -> str:
    """`{{ notebook_table }}`: every notebook with its minutes and its puzzle."""
    rows = []
    for path in sorted((root / NOTEBOOKS).glob("[0-9][0-9]_*.ipynb")):
        text = notebook_text(path)
        title = text.splitlines()[0].removeprefix("# ")
        puzzle = PUZZLE.search(text)
        described = f"{puzzle[1]} ({puzzle[2]}, {puzzle[3]} minutes)" if puzzle else "–"
        link = f"[{title}]({UP}{path.relative_to(root).as_posix()})"
        rows.append([link, described, str(minutes_of(path))])
    return table(["notebook", "its puzzle", "minutes"], rows, left=2)


def puzzle_link(root: Path, path: Path) -> str:
    """A link to a notebook of puzzles, with their number and minutes."""
    title = notebook_text(path).splitlines()[0].removeprefix("# ")
    spent = [puzzle.minutes for puzzle in posed(root)[path]]
    return f"[{title}]({UP}{path.relative_to(root).as_posix()}), {len(spent)} puzzles, {sum(spent)} minutes"


def puzzle_list(root: Path) -> str:
    """`{{ puzzle_list }}`: the notebooks of puzzles, or that there is none yet."""
    found = sorted((root / FOLDER).glob("*.ipynb"))
    return "\n".join(f"- {puzzle_link(root, path)}" for path in found) or "- *not yet*"


# ---- syllabi ---------------------------------------------------------------------------------------------------------


def syllabi(root: Path) -> dict[str, Any]:
    """The blocks and courses of docs/teach/syllabi.toml."""
    return tomllib.loads((root / SYLLABI).read_text(encoding="utf-8"))


def syllabus(root: Path, course: str) -> str:
    """`{{ syllabus three }}`: the sessions of a course, block by block.

    Raises:
        LookupError: no such course, block, slide or section.
        ValueError: the blocks of a session do not add up to its minutes.
    """
    data = syllabi(root)
    lines = []
    for session in data["courses"][course]:
        total = sum(spent for _, spent in session["blocks"])
        if total != SESSION:
            raise ValueError(f"{SYLLABI}: “{session['title']}” has {total} minutes, expected {SESSION}")
        lines += [f"### {session['title']}", ""]
        start = 0
        for name, spent in session["blocks"]:
            lines += [_block(root, data["blocks"][name], start, spent), ""]
            start += spent
        if "lab" in session:
            lines += [_lab(root, session), ""]
    return "\n".join(lines)


def _block(root: Path, block: dict[str, Any], start: int, spent: int) -> str:
    slides = [_slide(root, where) for where in block["slides"]]
    pages = [_page(root, page) for page in block["pages"]]
    notebooks = [notebook_link(root, p) for n in block.get("notebooks", []) if (p := notebook_file(root, n))]
    return "\n".join(
        [
            f"**{start}–{start + spent} · {block['title']}** ({spent} minutes). Students can {block['objective']}",
            "",
            f"- *Board:* {block['board']}",
            f"- *Show:* {', '.join(slides)}" if slides else "- *Show:* nothing; talk",
            f"- *Read:* {', '.join(pages)}",
            *(f"- *Notebook:* {link}" for link in notebooks),
        ]
    )


def _slide(root: Path, where: str) -> str:
    deck, _, slug = where.partition("#")
    return f"[{section(root, f'teach/slides/{deck}.md', slug).title}](slides/{deck}.md#{slug})"


def _page(root: Path, where: str) -> str:
    page, _, slug = where.partition("#")
    at = section(root, page, slug) if slug else sections(root, page)[0]
    title = f"{at.of}: {at.title}" if slug else at.of
    return f"[{title}]({UP}{where})"


def _lab(root: Path, session: dict[str, Any]) -> str:
    found = [path for number in session["lab"] if (path := notebook_file(root, number))]
    further = [path for number in session["lab"] for path in sorted((root / FOLDER).glob(f"{number}_*.ipynb"))]
    total = sum(minutes_of(path) for path in found)
    return "\n".join(
        [
            f"**Lab** ({total} minutes, as the notebooks state them). {session['task']}",
            "",
            *(f"- {notebook_link(root, path)}" for path in found),
            *(f"- To go on: {puzzle_link(root, path)}" for path in further),
        ]
    )


# ---- exam questions --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Question:
    """One question. In its answer «name» stands for one of its values, which its check computes."""

    level: str  # of LEVELS
    topic: str
    minutes: int
    question: str
    answer: str
    values: dict[str, str] = field(default_factory=dict)
    check: str = ""
    properties: list[int] = field(default_factory=list)  # of the register


def questions(root: Path) -> list[Question]:
    """The questions of docs/teach/questions.toml.

    Raises:
        TypeError: one lacks a field, or has another.
    """
    return [Question(**q) for q in tomllib.loads((root / QUESTIONS).read_text(encoding="utf-8"))["questions"]]


def with_values(text: str, values: dict[str, str]) -> str:
    """An answer with its figures in bold: «name» stands for the value of that name.

    Raises:
        LookupError: no such value.
    """
    return re.sub(r"«(\w+)»", lambda m: f"**{values[m[1]]}**", text)


def exam_questions(root: Path) -> str:
    """`{{ exam_questions }}`: the questions by level, each with its answer folded in.

    Raises:
        LookupError: an answer names a value or a property that does not exist.
        ValueError: a level is unknown, or a value is used nowhere.
    """
    claims = {entry.key: entry.claim for entry in PROPERTIES}
    by_level: dict[str, list[str]] = {level: [] for level in LEVELS}
    for number, q in enumerate(questions(root), 1):
        if q.level not in LEVELS:
            raise ValueError(f"{QUESTIONS}: expected a level of {LEVELS}, got {q.level!r}")
        if unused := [name for name in q.values if f"«{name}»" not in q.answer]:
            raise ValueError(f"{QUESTIONS}: question {number} does not use {unused}")
        inside = [with_values(q.answer, q.values)]
        for key in q.properties:
            claim = claims[key].replace("](index.md", "](../verify/index.md")
            inside.append(f"[Property {key}](../verify/properties.md): {claim}")
        if q.check:
            inside.append(f"```python\n{q.check.strip()}\n```")
        folded = "\n\n".join(inside).replace("\n", "\n    ")
        head = f"**{number}.** *{q.topic}, {q.minutes} minutes.* {q.question}"
        by_level[q.level].append(f'{head}\n\n??? success "Answer to {number}"\n    {folded}\n')
    return "\n".join(
        f"## {level.capitalize()}\n\n" + re.sub(r"(?m)^ +$", "", "\n".join(items)) for level, items in by_level.items()
    )


def exam_count(root: Path, what: str = "questions") -> str:
    """`{{ exam_count minutes }}`: how many questions there are, or how many minutes they take.

    Raises:
        LookupError: something else is asked for.
    """
    asked = questions(root)
    return str({"questions": len(asked), "minutes": sum(q.minutes for q in asked)}[what])


# ---- citation --------------------------------------------------------------------------------------------------------


def citation(root: Path) -> str:
    """`{{ citation }}`: CITATION.cff as BibTeX, the software and the paper."""
    cff = yaml.safe_load((root / "CITATION.cff").read_text(encoding="utf-8"))
    paper = cff["references"][0]
    arxiv = next(i["value"].removeprefix("arXiv:") for i in paper["identifiers"] if i["value"].startswith("arXiv:"))
    software = {
        "title": cff["title"],
        "author": "{" + " and ".join(a["name"] for a in cff["authors"]) + "}",
        "version": cff["version"],
        "note": f"Licence: {cff['license']}",
    }
    article = {
        "title": paper["title"],
        "author": " and ".join(a["family-names"] for a in paper["authors"]),
        "year": str(paper["year"]),
        "eprint": arxiv,
        "archivePrefix": "arXiv",
    }
    entries = [("software", "gsa_software", software), ("article", "gsa_paper", article)]
    shown = [
        f"@{kind}{{{key},\n" + "".join(f"  {name} = {{{value}}},\n" for name, value in fields.items()) + "}"
        for kind, key, fields in entries
    ]
    return "```bibtex\n" + "\n\n".join(shown) + "\n```"


DIRECTIVES: dict[str, Callable[..., str]] = {
    f.__name__: f for f in (minutes, notebook_table, puzzle_list, syllabus, exam_questions, exam_count, citation)
}
