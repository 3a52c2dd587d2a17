"""Slides: a deck in docs/teach/slides/ names what to show, and shows what other pages already say.

A deck is a Markdown page. Each `##` heading begins a slide: a title, a sentence, and lines of the form

    {{ from learn/indexer.md#the-equation formula }}

each of which stands for one block of that section. A number behind the kind takes another one than the first. Where the
block came from is written below the slide. The page needs no script: sections that snap while scrolling, and links.
"""

import logging
import posixpath
import re
from pathlib import Path
from typing import Any

from excerpts import KINDS, PARAGRAPH, blocks, kind_of, rebase, section
from jinja2 import ChoiceLoader, FileSystemLoader
from thread import expand

log = logging.getLogger("mkdocs.hooks.slides")

FOLDER = "teach/slides"
TEMPLATE = "deck.html"  # in that folder
HINT = "Space, Page Down and the links below turn the page. Printed, each slide is a page, with the answers left out."
FRAME = re.compile(r"^    \d+\. (!.+)$", re.MULTILINE)  # as the directive `frames` lists them
REFERENCE = re.compile(r"^\{\{ from (\S+?)#(\S+) (\w+)(?: (\d+))? \}\}$", re.MULTILINE)


def excerpt(root: Path, deck: str, page: str, slug: str, kind: str, number: int = 1) -> tuple[str, str]:
    """A block of a section, and the link to that section.

    Raises:
        LookupError: no such kind, section or block.
        OSError: no such page.
    """
    if kind not in (*KINDS, PARAGRAPH, "frame"):
        raise LookupError(f"expected one of {', '.join(KINDS)}, {PARAGRAPH}, frame, got {kind}")
    at = section(root, page, slug)
    found = [block for block in blocks(at.text) if kind_of(block) == kind]
    if kind == "frame":  # a slide stands still
        played = [expand(root, block, page) for block in blocks(at.text) if block.startswith("{{ frames ")]
        found = [picture for made in played for picture in FRAME.findall(made)]
    if not 1 <= number <= len(found):
        raise LookupError(f"{page}#{slug} has {len(found)} of {kind}, not {number}")
    title = at.of if at.title.startswith(at.of) else f"{at.of}: {at.title}"
    link = f"[{title}]({page}#{slug})"
    text = rebase(expand(root, found[number - 1], page), page, deck)
    # Two lists in a row would become one.
    return text + "\n\n<!-- -->" * (kind == "list"), rebase(link, "index.md", deck)


def fill(root: Path, deck: str, markdown: str) -> str:
    """Replace the references of a deck; under each slide, link the sections they came from."""
    slides = re.split(r"(?m)^(?=## )", markdown)
    for i, slide in enumerate(slides):
        sources: dict[str, None] = {}

        def replace(match: re.Match[str], sources: dict[str, None] = sources) -> str:
            try:
                block, link = excerpt(root, deck, match[1], match[2], match[3], int(match[4] or 1))
            except (LookupError, OSError) as error:
                log.warning("%s: %s: %s", deck, match[0], error)
                return match[0]
            sources[link] = None
            return block

        slides[i] = REFERENCE.sub(replace, slide)
        if sources:
            slides[i] = f"{slides[i].rstrip()}\n\n{' · '.join(sources)}\n{{: .source }}\n\n"
    return "".join(slides)


def cut(html: str) -> str:
    """The page of a deck as sections, each with its place among the others and links to its neighbours."""
    html = re.sub(r'<a class="headerlink".*?</a>', "", html)
    parts = [part for part in re.split(r"(?=<h[12] )", html) if part.strip()]
    heads = [re.match(r'<h[12] id="([^"]+)">(.*?)</h[12]>', part, re.DOTALL) for part in parts]
    names, titles = [head[1] for head in heads if head], [head[2] for head in heads if head]
    listed = "".join(f'<li><a href="#{i}">{t}</a></li>' for i, t in zip(names[1:], titles[1:], strict=True))
    contents = f"<details><summary>The slides of this deck</summary><ol>{listed}</ol></details>"
    parts[0] += f'<div class="hint"><p>{HINT}</p>{contents}</div>'
    found = []
    for n, (part, name) in enumerate(zip(parts, names, strict=True)):
        part = part.replace(f'id="{name}"', f'id="{name}-title"', 1)
        # A table that is wider than the screen scrolls by itself, from the keyboard as well.
        part = re.sub(
            r"<table>.*?</table>",
            lambda m: f'<div class="wide" tabindex="0" role="region" aria-label="table">{m[0]}</div>',
            part,
            flags=re.DOTALL,
        )
        part, _, source = part.partition('<p class="source">')
        before = f'<a href="#{names[n - 1]}" rel="prev" aria-label="previous slide">←</a>' if n else ""
        after = f'<a href="#{names[n + 1]}" rel="next" aria-label="next slide">→</a>' if n + 1 < len(names) else ""
        place = f'<p class="place">{before} <span>{n + 1} of {len(names)}</span> {after}</p>'
        source = f'<p class="source">{source}' if source else "<p></p>"
        found.append(
            f'<section id="{name}" aria-labelledby="{name}-title">\n{part}<footer>{source}{place}</footer>\n</section>'
        )
    return "\n".join(found)


def is_deck(page: str) -> bool:
    """Whether a page, relative to docs/, is a deck."""
    return posixpath.dirname(page) == FOLDER


# ---- called by mkdocs ------------------------------------------------------------------------------------------------


def on_env(env: Any, config: Any, files: Any) -> Any:
    """Let the template of the decks lie beside them."""
    env.loader = ChoiceLoader([env.loader, FileSystemLoader(str(Path(config.docs_dir) / FOLDER))])
    return env


def on_page_markdown(markdown: str, page: Any, config: Any, files: Any) -> str:
    """Fill a deck, and choose its template."""
    if not is_deck(page.file.src_uri):
        return markdown
    page.meta["template"] = TEMPLATE
    page.meta["search"] = {"exclude": True}  # what it says is found where it comes from
    return fill(Path(config.config_file_path).parent, page.file.src_uri, markdown)


def on_page_content(html: str, page: Any, config: Any, files: Any) -> str:
    """Cut a rendered deck into slides."""
    return cut(html) if is_deck(page.file.src_uri) else html
