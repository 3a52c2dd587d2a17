"""The site in a browser: every page at two widths and in both colour schemes. `make browser` runs this.

It needs the `browser` extra and `CHROMIUM`, the path of a Chromium; without the variable it is skipped.
"""

import functools
import http.server
import os
import threading
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import pytest

CHROMIUM = os.environ.get("CHROMIUM")
if not CHROMIUM:
    pytest.skip("needs a Chromium: `make browser` looks for one, and installs what drives it", allow_module_level=True)
from axe_playwright_python.sync_playwright import Axe  # noqa: E402
from playwright.sync_api import Browser, Page, sync_playwright  # noqa: E402

pytestmark = pytest.mark.timeout(1800)  # one fixture opens all pages
ROOT = Path(__file__).parent.parent
PHONE, DESKTOP = 390, 1280
SCHEMES = {"light": "default", "dark": "slate"}  # what the reader's system asks for, and what the theme calls it
LANDING_BYTES = 500_000
# Chromium itself makes what scrolls reachable by keyboard, which this rule does not know.
AXE = {"resultTypes": ["violations"], "rules": {"scrollable-region-focusable": {"enabled": False}}}
STILL = "*, *::before, *::after { transition: none !important; }"  # colours and places are read right after a change
AS_FILES = ("index.html", "learn/indexer/index.html", "learn/attention/index.html", "notebooks/00_tour/index.html")

# Formulas that the page's own HTML holds, its scripts not run; code may show TeX.
COUNT_FORMULAS = r"""async () => {
  const html = await (await fetch(location.pathname)).text();
  const page = new DOMParser().parseFromString(html, "text/html");
  const formula = /\\\([^]+?\\\)|\\\[[^]+?\\\]|\$\$[^]+?\$\$|\$[^$]+?\$/g;
  let n = 0;
  for (const block of page.querySelectorAll(".arithmatex, .jp-RenderedMarkdown, .jp-RenderedLatex")) {
    block.querySelectorAll("code, pre").forEach(e => e.remove());
    n += (block.textContent.match(formula) || []).length;
  }
  return n;
}"""

READ_PAGE = r"""() => {
  const raw = [];
  const walk = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  while (walk.nextNode()) {
    const node = walk.currentNode;
    if (/\\[([]|\$\$|\$[^$\s][^$]*\$|\\[a-zA-Z]{2,}/.test(node.data)
        && !node.parentElement.closest("code, pre, script, style, .clipboard-copy-txt, mjx-container"))
      raw.push(node.data.trim().slice(0, 60));
  }
  return {
    drawn: document.querySelectorAll("mjx-container").length,
    // An unknown macro is no error to MathJax: it is written out, in red.
    math_errors: [...document.querySelectorAll("mjx-merror, [data-mjx-error], mjx-container [style*='color: red']")]
      .map(e => e.textContent),
    raw,
    no_alt: [...document.images].filter(e => !e.alt.trim()).map(e => e.src.slice(0, 80)),
    not_shown: [...document.images].filter(e => e.complete && !e.naturalWidth).map(e => e.src.slice(0, 80)),
    headings: [...document.querySelectorAll("h1, h2, h3, h4, h5, h6")].map(e => +e.tagName[1]),
  };
}"""

# Once the page has seen the last change: its scheme, how many pixels of it lie right of the window, what sticks out.
READ_LAYOUT = """async () => {
  await new Promise(done => requestAnimationFrame(() => requestAnimationFrame(done)));
  const wide = document.scrollingElement.scrollWidth - document.documentElement.clientWidth;
  const out = wide <= 0 ? [] : [...document.body.querySelectorAll("*")]
    .filter(e => e.getBoundingClientRect().right > document.documentElement.clientWidth + 1)
    .filter(e => !e.closest(".md-typeset__scrollwrap, pre"))
    .slice(0, 5).map(e => e.tagName + "." + e.className);
  // Slides have no such attribute, but a background.
  const colour = getComputedStyle(document.documentElement).backgroundColor.match(/\\d+/g).map(Number);
  const seen = colour[0] + colour[1] + colour[2] < 384 ? "slate" : "default";
  return { scheme: document.body.dataset.mdColorScheme ?? seen, wide, out };
}"""


class Server(http.server.ThreadingHTTPServer):
    """The site on a free port of this machine; `sent` lists path, status and bytes of every answer."""

    def __init__(self, folder: Path) -> None:
        self.sent: list[tuple[str, int, int]] = []
        super().__init__(("127.0.0.1", 0), functools.partial(Handler, directory=str(folder)))
        self.url = f"http://127.0.0.1:{self.server_port}/"


class Handler(http.server.SimpleHTTPRequestHandler):
    """Files of the site; it notes what it sends."""

    server: Server

    def log_request(self, code: int | str = "-", size: int | str = "-") -> None:
        path = self.translate_path(self.path)
        path = os.path.join(path, "index.html") if os.path.isdir(path) else path
        self.server.sent.append((self.path, int(code), os.path.getsize(path) if os.path.isfile(path) else 0))

    def log_message(self, *_: object) -> None:
        """Say nothing."""


class Visit(NamedTuple):
    """What one page showed."""

    console: list[str]  # errors
    failed: list[str]  # requests without an answer, or with an error
    elsewhere: list[str]  # requests to other hosts
    formulas: int
    page: dict[str, Any]
    layouts: dict[tuple[int, str], dict[str, Any]]
    violations: list[str]  # of axe-core's rules of serious or critical impact


@pytest.fixture(scope="module")
def server(site: Path) -> Iterator[Server]:
    with Server(site) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield server
        server.shutdown()
        thread.join()


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with sync_playwright() as driver:
        # Containers run as root, where Chromium's sandbox refuses to work; it opens nothing but our own pages.
        browser = driver.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


def watch(page: Page, home: str) -> tuple[list[str], list[str], list[str]]:
    """Lists that fill while the page is used: errors of the console, failed requests, requests to other hosts."""
    console, failed, elsewhere = [], [], []
    page.on("console", lambda message: console.append(message.text) if message.type == "error" else None)
    page.on("pageerror", lambda error: console.append(str(error)))
    page.on("requestfailed", lambda request: failed.append(f"{request.url}: {request.failure}"))
    page.on("response", lambda r: failed.append(f"{r.url}: {r.status}") if r.status >= 400 else None)

    def note(url: str) -> None:
        if not url.startswith((home, "data:", "blob:")):
            elsewhere.append(url)

    page.on("request", lambda request: note(request.url))
    return console, failed, elsewhere


def settle(page: Page) -> None:
    """Wait until MathJax, where the page loads it, has drawn every formula, in its own fonts."""
    page.evaluate("async () => { if (window.MathJax) await MathJax.startup.promise; await document.fonts.ready; }")


def serious(page: Page, scheme: str) -> list[str]:
    """What axe-core finds of serious or critical impact: rule, number of places, the first of them."""
    return [
        f"{scheme}: {rule['id']}, {len(rule['nodes'])}: {rule['nodes'][0]['html'][:120]}"
        for rule in Axe().run(page, options=AXE).response["violations"]
        if rule["impact"] in ("serious", "critical")
    ]


def visit(browser: Browser, url: str, home: str, axe: bool) -> Visit:
    """Open one page, and look at it at both widths and in both schemes; run axe-core, which is slow, if asked."""
    with browser.new_context(viewport={"width": PHONE, "height": 844}, color_scheme="light") as context:
        page = context.new_page()
        console, failed, elsewhere = watch(page, home)
        page.goto(url)
        settle(page)
        page.add_style_tag(content=STILL)
        formulas = page.evaluate(COUNT_FORMULAS)
        layouts, violations = {}, []
        for width in (PHONE, DESKTOP):
            page.set_viewport_size({"width": width, "height": 844})
            for scheme in SCHEMES:
                page.emulate_media(color_scheme=scheme)
                layouts[width, scheme] = page.evaluate(READ_LAYOUT)
                if axe and width == DESKTOP:
                    violations += serious(page, scheme)
        return Visit(console, failed, elsewhere, formulas, page.evaluate(READ_PAGE), layouts, violations)


@pytest.fixture(scope="module")
def visits(site: Path, server: Server, browser: Browser) -> dict[str, Visit]:
    paths = sorted(p.relative_to(site).as_posix() for p in site.rglob("*.html"))
    assert len(paths) > 20
    # Pages of one folder share their templates and styles: the first stands for all before axe-core.
    kinds = {path.split("/")[0]: path for path in reversed(paths)}
    return {
        path: visit(browser, server.url + path.removesuffix("index.html"), server.url, path in kinds.values())
        for path in paths
    }


def found(visits: dict[str, Visit], what: Callable[[Visit], Any]) -> dict[str, Any]:
    """Pages on which `what(visit)` is not empty."""
    return {path: value for path, v in visits.items() if (value := what(v))}


def test_no_page_reports_an_error(visits: dict[str, Visit]):
    assert found(visits, lambda v: v.console) == {}


def test_every_request_is_answered(visits: dict[str, Visit]):
    assert found(visits, lambda v: v.failed) == {}


def test_no_page_calls_another_host(visits: dict[str, Visit]):
    assert found(visits, lambda v: v.elsewhere) == {}


def test_every_formula_is_drawn(visits: dict[str, Visit]):
    assert sum(v.formulas for v in visits.values()) > 100
    assert found(visits, lambda v: v.formulas != v.page["drawn"] and (v.formulas, v.page["drawn"])) == {}
    assert found(visits, lambda v: v.page["math_errors"]) == {}
    assert found(visits, lambda v: v.page["raw"]) == {}


def test_no_page_scrolls_sideways(visits: dict[str, Visit]):
    assert found(visits, lambda v: {at: seen["out"] for at, seen in v.layouts.items() if seen["wide"] > 0}) == {}


def test_pages_follow_the_scheme_that_the_system_asks_for(visits: dict[str, Visit]):
    for path, v in visits.items():
        assert {at: seen["scheme"] for at, seen in v.layouts.items()} == {at: SCHEMES[at[1]] for at in v.layouts}, path


def test_every_picture_is_shown_and_described(visits: dict[str, Visit]):
    assert found(visits, lambda v: v.page["no_alt"] + v.page["not_shown"]) == {}


def test_headings_are_an_outline(visits: dict[str, Visit]):
    assert found(visits, lambda v: v.page["headings"].count(1) != 1 and v.page["headings"]) == {}
    assert found(visits, lambda v: [at for at in pairwise(v.page["headings"]) if at[1] > at[0] + 1]) == {}


def test_axe_finds_nothing_serious(visits: dict[str, Visit]):
    assert found(visits, lambda v: v.violations) == {}


def test_the_landing_page_is_light_and_its_search_works(server: Server, browser: Browser):
    with browser.new_context() as context:
        page = context.new_page()
        server.sent.clear()
        page.goto(server.url, wait_until="networkidle")
        assert sum(size for *_, size in server.sent) < LANDING_BYTES, server.sent
        page.locator("input[name=query]").click()
        page.locator("input[name=query]").fill("online softmax")
        page.locator(".md-search-result__link[href*='learn/attention/']").first.wait_for()


def computed(page: Page, name: str) -> str:
    """A property of the style of the first animation."""
    return page.evaluate("n => getComputedStyle(document.querySelector('.strip')).getPropertyValue(n)", name)


def shown_frame(page: Page) -> int:
    """The frame of the first animation that stands in its window, from 0."""
    return page.evaluate("""() => {
      const [frames] = document.getElementsByClassName("frames");
      const { left } = frames.querySelector(".strip").getBoundingClientRect();
      const window = frames.querySelector(".window").getBoundingClientRect();
      return Math.round((window.left - left) / window.width);
    }""")


def test_frames_play_and_stop_without_a_script(server: Server, browser: Browser):
    url = f"{server.url}learn/attention/"
    with browser.new_context(java_script_enabled=False) as context:
        page = context.new_page()
        page.goto(url)
        frames = page.locator(".frames").first
        assert frames.locator("input").first.is_checked()
        assert "infinite" in computed(page, "animation")
        frames.locator("label", has_text="3").click()
        assert computed(page, "animation-name") == "none"
        assert shown_frame(page) == 2
        frames.locator("input").nth(3).press("ArrowRight")
        assert shown_frame(page) == 3
    with browser.new_context(reduced_motion="reduce") as context:
        page = context.new_page()
        page.goto(url)
        assert computed(page, "animation-name") == "none"
        assert shown_frame(page) == 0


@pytest.mark.parametrize("path", AS_FILES)
def test_a_page_works_as_a_file(site: Path, browser: Browser, path: str):
    with browser.new_context() as context:
        page = context.new_page()
        console, failed, elsewhere = watch(page, site.as_uri())
        page.goto((site / path).as_uri())
        settle(page)
        assert console + failed + elsewhere == []
        shown = page.evaluate(READ_PAGE)
        assert shown["raw"] + shown["math_errors"] + shown["not_shown"] == []
        assert shown["drawn"] or path == "index.html"
