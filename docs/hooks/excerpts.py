"""Sections and blocks of the site's pages: what slides and syllabi point to."""

import posixpath
import re
from dataclasses import dataclass
from pathlib import Path

from markdown.extensions.toc import slugify

# How a block of each kind begins; a paragraph is none of them. A record is a directive: what a file of records holds.
KINDS = {
    "formula": r"\$\$",
    "table": r"\|",
    "picture": r"!\[",
    "list": r"- |\d+\. ",
    "question": r"\?\?\? question",
    "exercise": r"\?\?\? example",
    "code": "```",
    "record": r"\{\{ [\w./ -]+ \}\}$",
}
PARAGRAPH = "paragraph"
HEADING = re.compile(r"(#+) (.+)")
LINK = re.compile(r"(\]\()([^)\s]+)(\))")


@dataclass(frozen=True)
class Section:
    """What stands under a heading of a page, up to the next heading."""

    page: str  # relative to docs/
    of: str  # title of the page
    title: str
    slug: str
    text: str


def blocks(text: str) -> list[str]:
    """The blocks between blank lines. Fences and formulas stay whole, and so does what is indented below a line."""
    found: list[list[str]] = []
    fence = formula = blank = False
    for line in text.splitlines():
        inside = fence or formula
        if line.startswith("```"):
            fence = not fence
        elif not fence and line.count("$$") % 2:
            formula = not formula
        if not line.strip() and not inside:
            blank = True
            continue
        if found and (inside or not blank or line.startswith("    ")):
            found[-1] += [""] * (blank and not inside) + [line]
        else:
            found.append([line])
        blank = False
    return ["\n".join(lines) for lines in found]


def kind_of(block: str) -> str:
    """The kind of a block."""
    return next((kind for kind, begins in KINDS.items() if re.match(begins, block, re.MULTILINE)), PARAGRAPH)


def sections(root: Path, page: str) -> list[Section]:
    """The sections of a page, with the anchors that the site gives their headings."""
    found: list[tuple[str, list[str]]] = []
    fence = False
    for line in (root / "docs" / page).read_text(encoding="utf-8").splitlines():
        fence ^= line.startswith("```")
        heading = None if fence else HEADING.fullmatch(line)
        if heading:
            found.append((heading[2], []))
        elif found:
            found[-1][1].append(line)
    title = found[0][0].split(":")[0]
    return [Section(page, title, name, slugify(name, "-"), "\n".join(lines)) for name, lines in found]


def section(root: Path, page: str, slug: str) -> Section:
    """One section of a page.

    Raises:
        LookupError: the page has no such section.
    """
    for candidate in sections(root, page):
        if candidate.slug == slug:
            return candidate
    raise LookupError(f"{page} has no section #{slug}")


def rebase(text: str, page: str, deck: str) -> str:
    """Turn links that are relative to a page into links that are relative to a deck."""

    def replace(match: re.Match[str]) -> str:
        path, mark, fragment = match[2].partition("#")
        if ":" in path:
            return match[0]
        target = posixpath.normpath(posixpath.join(posixpath.dirname(page), path)) if path else page
        return match[1] + posixpath.relpath(target, posixpath.dirname(deck)) + mark + fragment + match[3]

    return LINK.sub(replace, text)
