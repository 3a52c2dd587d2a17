"""Notebooks as pages: they stay in notebooks/, outside docs/, and mkdocs-jupyter renders them.

This hook adds them to the site, rewrites their links (mkdocs checks links of Markdown pages only), and takes out what
the notebook template would load from other hosts. The puzzles and their solutions are files to download, not pages:
mkdocs.yml tells mkdocs-jupyter to ignore them.
"""

import html as html_text
import logging
import posixpath
import re
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

from mkdocs.plugins import event_priority
from mkdocs.structure.files import File
from mkdocs.utils import get_relative_url

log = logging.getLogger("mkdocs.hooks.notebook_pages")

FOLDER = "notebooks"
DOWNLOADS = ("notebooks/puzzles", "notebooks/solutions")
# The template's own scripts: MathJax 2, require.js and Mermaid from public hosts. Only the copy button is local.
SCRIPT = re.compile(r"<script\b.*?</script>", re.DOTALL)
STYLE = re.compile(r"<style\b[^>]*>(.*?)</style>", re.DOTALL)
LINK = re.compile(r"""(<(?:a|img)\b[^>]*?\s(?:href|src)=")([^"]*)(")""")
KEEP = "clipboard"
# What the converter writes if neither the output nor its cell has `alt` in its metadata.
NO_ALT = 'alt="No description has been provided for this image"'


def notebooks(root: Path, folder: str = FOLDER) -> list[str]:
    """Paths of the notebooks in a folder, relative to the root, in reading order."""
    return sorted(p.relative_to(root).as_posix() for p in (root / folder).glob("*.ipynb"))


def split_template(html: str) -> tuple[list[str], str]:
    """Separate the notebook template's style sheets, and drop its scripts except the copy button's.

    What the cells themselves put out lies between them and stays as it is.
    """
    head, wrapper, body = html.partition('<div class="jupyter-wrapper">')
    end = body.rfind("<style") if body.rstrip().endswith("</style>") else len(body)
    styles = STYLE.findall(head) + STYLE.findall(body[end:])
    scripts = [s for s in SCRIPT.findall(head) if KEEP in s and "src=" not in s.split(">")[0]]
    return styles, "".join(scripts) + wrapper + body[:end]


def describe_pictures(html: str) -> str:
    """Give a picture without alternative text the paragraph before it, which says what one sees."""
    before, *rest = html.split(NO_ALT)
    for part in rest:
        paragraphs = re.findall(r"<p>(.*?)</p>", before, re.DOTALL)
        text = " ".join(re.sub(r"<[^>]+>", "", paragraphs[-1]).split()) if paragraphs else ""
        before += f'alt="{html_text.escape(html_text.unescape(text))}"{part}'
    return before


def rewrite_links(html: str, notebook: str, urls: dict[str, str], url: str) -> tuple[str, list[str]]:
    """Turn links that are relative to the notebook's file into links between pages.

    Args:
        html: the rendered notebook.
        notebook: its path relative to the root.
        urls: URL of each page, by the path of its source relative to the root.
        url: URL of the notebook's page.

    Returns:
        The new HTML, and the links that lead nowhere.
    """
    broken = []

    def replace(match: re.Match[str]) -> str:
        parts = urlsplit(match[2])
        if parts.scheme or parts.netloc or not parts.path:
            return match[0]
        target = posixpath.normpath(posixpath.join(posixpath.dirname(notebook), unquote(parts.path)))
        if target not in urls:
            broken.append(match[2])
            return match[0]
        fragment = f"#{parts.fragment}" if parts.fragment else ""
        return match[1] + get_relative_url(urls[target], url) + fragment + match[3]

    return LINK.sub(replace, html), broken


# ---- called by mkdocs ------------------------------------------------------------------------------------------------

_styles: dict[str, None] = {}  # an ordered set
STYLESHEET = "assets/notebook.css"


def on_config(config: Any) -> Any:
    """Add the notebooks to the nav, behind Home and Learn."""
    found = notebooks(Path(config.config_file_path).parent)
    if found:
        config.nav.insert(2, {"Notebooks": found})
    _styles.clear()
    return config


@event_priority(100)  # before mkdocs-jupyter, which wraps the files it finds
def on_files(files: Any, config: Any) -> Any:
    """Add the notebooks to the files of the site."""
    root = Path(config.config_file_path).parent
    for path in (path for folder in (FOLDER, *DOWNLOADS) for path in notebooks(root, folder)):
        files.append(File(path, str(root), config.site_dir, config.use_directory_urls))
    return files


def on_page_content(html: str, page: Any, config: Any, files: Any) -> str:
    """Clean a rendered notebook; report its broken links, on which a strict build fails."""
    path = page.file.src_uri
    if not path.endswith(".ipynb"):
        return html
    urls = {f.src_uri if f.src_uri.startswith(f"{FOLDER}/") else f"docs/{f.src_uri}": f.url for f in files}
    styles, html = split_template(html)
    html, broken = rewrite_links(describe_pictures(html), path, urls, page.url)
    for link in broken:
        log.warning("%s: the link “%s” leads to no page of the site", path, link)
    # Half a megabyte of CSS in every notebook's page becomes one file.
    _styles.update(dict.fromkeys(styles))
    return f'<link rel="stylesheet" href="{get_relative_url(STYLESHEET, page.url)}">{html}'


def on_post_build(config: Any) -> None:
    """Write the style sheet of the notebooks."""
    if _styles:
        path = Path(config.site_dir) / STYLESHEET
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("\n".join(_styles), encoding="utf-8")
