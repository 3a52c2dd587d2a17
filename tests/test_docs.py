"""The site: it builds strictly, loads nothing from elsewhere, its links resolve, and its pictures are reproducible."""

import importlib
import json
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import pytest

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
sys.path.insert(0, str(DOCS / "hooks"))
import claims  # noqa: E402
import learning  # noqa: E402
import notebook_pages  # noqa: E402
import puzzles  # noqa: E402
import records  # noqa: E402
import register  # noqa: E402
import speed  # noqa: E402
import thread  # noqa: E402

from tests.conftest import build_site  # noqa: E402

FIGURE_SCRIPTS = sorted(p.name for p in (DOCS / "figures").glob("*.py") if p.name != "style.py")
SOURCES = ("docs", "gsa_ref", "gsa_fast", "tests", "notebooks", "benchmarks/results", "experiments/results")


class Page(HTMLParser):
    """What a browser would read: the tags with their attributes, the ids, and the text of scripts and styles."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str]]] = []
        self.inline: list[str] = []
        self._in: str | None = None
        self.feed(path.read_text(encoding="utf-8"))
        self.ids = {a[key] for _, a in self.tags for key in ("id", "name") if key in a}

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, {k: v or "" for k, v in attrs}))
        self._in = tag if tag in ("script", "style") else None

    def handle_endtag(self, tag: str) -> None:
        self._in = None

    def handle_data(self, data: str) -> None:
        if self._in:
            self.inline.append(data)


@pytest.fixture(scope="module")
def pages(site: Path) -> dict[Path, Page]:
    found = {path: Page(path) for path in sorted(site.rglob("*.html"))}
    assert len(found) > len(thread.STEMS)
    return found


def is_external(url: str) -> bool:
    return bool(urlsplit(url).netloc)


# What a browser fetches by itself. A link that a reader may click is not among them.
FETCHED = {
    "script": ["src"], "img": ["src", "srcset"], "iframe": ["src"], "source": ["src", "srcset"], "video": ["src"],
    "audio": ["src"], "embed": ["src"], "object": ["data"], "link": ["href"], "image": ["href", "xlink:href"],
    "use": ["href", "xlink:href"], "input": ["src"],
}  # fmt: skip
REMOTE_CSS = re.compile(r"""url\(\s*['"]?(?:https?:)?//|@import\s+(?:url\()?['"]?(?:https?:)?//""")
NAMESPACE = re.compile(r"https?://www\.w3\.org/")


def requests_elsewhere(page: Page) -> Iterator[str]:
    for tag, attributes in page.tags:
        for name in FETCHED.get(tag, []):
            for candidate in attributes.get(name, "").split(","):
                if not candidate.startswith("data:") and is_external(candidate.strip()):
                    yield f"<{tag} {name}={candidate}>"
        if REMOTE_CSS.search(attributes.get("style", "")):
            yield f"<{tag} style={attributes['style']}>"
        if "mermaid" in attributes.get("class", "").split():
            yield "a Mermaid drawing: the theme fetches its renderer"
    for text in page.inline:
        for url in re.findall(r"(?:https?:)?//[\w.-]+\.\w{2,}/\S*", NAMESPACE.sub("", text)):
            yield f"inline {url[:80]}"


def test_site_requests_nothing_from_another_host(site: Path, pages: dict[Path, Page]):
    found = {str(path.relative_to(site)): list(requests_elsewhere(page)) for path, page in pages.items()}
    assert {path: urls for path, urls in found.items() if urls} == {}
    sheets = sorted(site.rglob("*.css"))
    assert sheets
    assert [s.name for s in sheets if REMOTE_CSS.search(s.read_text(encoding="utf-8"))] == []


def test_request_scan_sees_what_it_looks_for(tmp_path: Path):
    remote = [
        '<script src="https://a.example/x.js"></script>', '<link rel="stylesheet" href="//a.example/x.css">',
        '<img src="https://a.example/x.png">', "<style>@import 'https://a.example/x.css'</style>",
        "<script>import x from 'https://a.example/x.mjs'</script>", '<p style="background:url(//a.example/x)">',
        '<img srcset="x.png 1x, https://a.example/x.png 2x">', '<pre class="mermaid">graph</pre>',
    ]  # fmt: skip
    for html in remote:
        (tmp_path / "x.html").write_text(html)
        assert list(requests_elsewhere(Page(tmp_path / "x.html"))), html
    (tmp_path / "x.html").write_text('<a href="https://a.example">x</a><script src="/y.js">// note</script>')
    assert list(requests_elsewhere(Page(tmp_path / "x.html"))) == []


def test_formulas_are_drawn_by_the_stored_mathjax(site: Path, pages: dict[Path, Page]):
    stored = site / "assets/mathjax"
    fonts = set(re.findall(r"MathJax_[\w-]+\.woff", (stored / "tex-chtml.js").read_text(encoding="utf-8")))
    assert len(fonts) > 10
    assert fonts <= {p.name for p in (stored / "output/chtml/fonts/woff-v2").glob("*.woff")}
    page = pages[site / "learn/indexer/index.html"]
    sources = [a.get("src", "") for tag, a in page.tags if tag == "script"]
    assert [s.rsplit("/", 1)[-1] for s in sources if "mathjax" in s] == ["mathjax-config.js", "tex-chtml.js"]
    assert any("arithmatex" in a.get("class", "") for _, a in page.tags)


def test_images_have_alternative_text(site: Path, pages: dict[Path, Page]):
    images = [(path, a) for path, page in pages.items() for tag, a in page.tags if tag == "img"]
    assert images
    # The second text is what the notebook converter writes where there is none.
    lacking = [
        (str(path.relative_to(site)), a.get("src", "")[:60])
        for path, a in images
        if not a.get("alt", "").strip() or a["alt"].startswith("No description has been provided")
    ]
    assert lacking == []


def test_pictures_come_in_both_schemes(pages: dict[Path, Page]):
    for page in pages.values():
        sources = [a["src"] for tag, a in page.tags if tag == "img" and "figures/" in a.get("src", "")]
        light = [s.split(".light")[0] for s in sources if s.endswith(".light.svg#only-light")]
        dark = [s.split(".dark")[0] for s in sources if s.endswith(".dark.svg#only-dark")]
        assert light == dark
        assert len(light) + len(dark) == len(sources)


def broken_links(site: Path, pages: dict[Path, Page]) -> list[str]:
    broken = []
    for path, page in pages.items():
        if path.name == "404.html":  # its links are relative to whatever was not found
            continue
        for tag, attributes in page.tags:
            url = attributes.get("href" if tag in ("a", "link") else "src", "")
            parts = urlsplit(url)
            if not url or parts.scheme or parts.netloc:
                continue
            target = (path.parent / unquote(parts.path)).resolve() if parts.path else path
            target = target / "index.html" if target.is_dir() else target
            if not target.is_file():
                broken.append(f"{path.relative_to(site)}: {url}")
            elif parts.fragment and target in pages and parts.fragment not in pages[target].ids | {"__top"}:
                broken.append(f"{path.relative_to(site)}: {url} has no such anchor")
    return broken


def test_every_internal_link_and_anchor_resolves(site: Path, pages: dict[Path, Page]):
    assert broken_links(site, pages) == []


def weight(site: Path, page: str, pages: dict[Path, Page]) -> int:
    """Bytes of a page and of what its HTML makes a browser fetch, pictures of both colour schemes included."""
    path = site / page
    links = {url for tag, a in pages[path].tags for name in FETCHED.get(tag, []) if (url := a.get(name))}
    files = {(path.parent / unquote(urlsplit(url).path)).resolve() for url in links if not urlsplit(url).scheme}
    return sum(f.stat().st_size for f in files | {path.resolve()} if f.is_file())


def test_the_site_and_its_first_page_are_light(site: Path, pages: dict[Path, Page]):
    # What scripts fetch is not in the HTML: `make browser` measures all of it.
    assert weight(site, "index.html", pages) < 500_000
    assert weight(site, "learn/indexer/index.html", pages) > 1_000_000  # MathJax, which the first page does without
    assert sum(p.stat().st_size for p in site.rglob("*") if p.is_file()) < 40_000_000


def test_sources_of_the_site_are_not_published(site: Path):
    assert [p.name for p in site.rglob("*") if p.suffix in (".py", ".pyc")] == []
    downloads = {p.relative_to(site).parent.as_posix() for p in site.rglob("*.ipynb")}
    assert downloads == {"notebooks/puzzles", "notebooks/solutions"}


# ---- the equation index ----------------------------------------------------------------------------------------------


def test_equation_index_resolves():
    assert thread.problems(ROOT) == []


@pytest.mark.parametrize("stem", thread.STEMS)
def test_stem_has_its_files(stem: str):
    for package in ("gsa_ref/equations", "gsa_ref", "gsa_fast"):
        assert thread.stem_files(ROOT, package, stem), f"{package} has no {stem}"
    assert (DOCS / "reference" / f"{stem}.md").is_file()


@pytest.mark.parametrize("entry", thread.ENTRIES, ids=lambda e: e.tag)
def test_tagged_objects_exist(entry: thread.Entry):
    found = thread.thread(ROOT, entry)
    if entry not in thread.entries(ROOT):
        pytest.skip("gsa_ref does not have this stem yet")
    assert found.pytorch
    assert found.oracle or entry.optional
    for o in (*found.oracle, *found.pytorch, *(o for o in found.also if o.path.startswith("gsa_ref"))):
        value = importlib.import_module(o.module)
        for part in o.name.split("."):
            value = getattr(value, part)


def test_every_entry_has_a_notebook():
    found = {e.tag: thread.thread(ROOT, e).notebook for e in thread.entries(ROOT)}
    assert None not in found.values()
    assert found["Eq. 15"] == "notebooks/08_convergence.ipynb"  # the stem `training` has none of its own
    assert found["Eq. 8"] == "notebooks/02_budget.ipynb"


def test_index_page_has_a_section_for_every_entry(site: Path, pages: dict[Path, Page]):
    text = (site / "equations/index.html").read_text(encoding="utf-8")
    for entry in thread.entries(ROOT):
        assert f"{thread.LABELS.get(entry.tag, entry.tag)}" in text
    links = [a["href"] for tag, a in pages[site / "equations/index.html"].tags if tag == "a" and "href" in a]
    for dotted in ("gsa_ref.equations.indexer.indexer_scores", "gsa_ref.indexer.indexer_scores"):
        assert f"../reference/indexer/#{dotted}" in links


def test_learn_pages_open_with_their_strip(site: Path):
    learned = [s for s in thread.STEMS if thread.page_of(ROOT, s)]
    assert "indexer" in learned
    for stem in learned:
        text = (site / "learn" / stem / "index.html").read_text(encoding="utf-8")
        opening = re.sub(r"<[^>]+>", "", text.split('<div class="thread">')[1].split("</div>")[0])
        assert re.search(r"oracle .+ · PyTorch .+ · kernel .+ · tests .+ · notebook.* · API", opening), opening


def test_the_puzzles_page_lists_every_puzzle_and_the_strips_lead_to_it(site: Path, pages: dict[Path, Page]):
    text = (site / "learn/puzzles/index.html").read_text(encoding="utf-8")
    found = puzzles.posed(ROOT)
    for path, group in found.items():
        assert path.stem[3:] in pages[site / "learn/puzzles/index.html"].ids
        assert f'href="../../notebooks/puzzles/{path.name}"' in text
        for p in group:
            cells = f"<td>{p.title}</td>\n<td>{p.teaches}</td>\n<td>{p.difficulty}</td>"
            assert cells in re.sub("</?code>", "`", text), p.title
    total = sum(map(len, found.values()))
    assert re.search(rf"{total} puzzles \(\d+ easy, \d+ medium, \d+ hard\), \d+\.\d hours", text)
    assert "[puzzles](../learn/puzzles.md#gates)" in thread.strip(ROOT, "learn/gates.md", "gates")


def test_a_stem_without_puzzles_has_none_in_its_strip(copy: Path):
    assert "puzzles" in thread.strip(copy, "learn/gates.md", "gates")
    (copy / "notebooks/puzzles/05_gates.ipynb").unlink()
    assert "puzzles" not in thread.strip(copy, "learn/gates.md", "gates")


def test_frames_are_played_and_listed_with_their_texts(tmp_path: Path):
    (tmp_path / "docs/figures").mkdir(parents=True)
    told = {"some": {"title": "A title", "frames": ["Frame 1: a.", "Frame 2: b."]}}
    (tmp_path / "docs/figures/stem.json").write_text(json.dumps(told))
    made = thread.frames(tmp_path, "stem", "some")
    played, listed = made.split("??? note")
    assert 'aria-label="A title" style="--frames: 2"' in played
    assert re.findall(r">(\w+)</label>", played) == ["Play", "1", "2"]
    for n, text in enumerate(told["some"]["frames"], 1):
        for scheme in ("light", "dark"):
            image = f"![{text}](../figures/stem_some_{n}.{scheme}.svg#only-{scheme})"
            assert played.count(image) == listed.count(image) == 1
    with pytest.raises(KeyError):
        thread.frames(tmp_path, "stem", "other")


def test_a_style_rule_shows_each_frame(site: Path, pages: dict[Path, Page]):
    styles = (DOCS / "assets/site.css").read_text(encoding="utf-8")
    shown = [
        (int(a), int(b)) for a, b in re.findall(r"nth-of-type\((\d+)\):checked ~ .window \{ --shown: (\d+)", styles)
    ]
    assert shown == [(n + 2, n) for n in range(1, len(shown) + 1)]
    counts = [
        int(a["style"].split(": ")[1]) for page in pages.values() for _, a in page.tags if a.get("class") == "frames"
    ]
    assert counts
    assert max(counts) <= len(shown) + 1


def test_a_strip_counts_kernels_where_it_would_name_many():
    entry = next(e for e in thread.ENTRIES if e.stem == "attention")
    launched = [o.name for o in thread.thread(ROOT, entry).kernel if o.is_launched]
    assert len(launched) > thread.MOST_KERNELS
    opening = thread.strip(ROOT, "learn/attention.md", "attention")
    assert f"[{len(launched)} kernels](../equations.md)" in opening
    assert [name for name in launched if name in opening] == []
    assert "[gsa_fast.attention.sparse_attention]" in opening
    assert "apply_gate_kernel" in thread.strip(ROOT, "learn/gates.md", "gates")


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    """A copy of all that the site is built from."""
    for name in SOURCES:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__", "mathjax"))
    (tmp_path / "docs/assets/mathjax").mkdir()
    (tmp_path / "docs/assets/mathjax/tex-chtml.js").touch()  # the build never reads it, and it is large
    shutil.copy(ROOT / "mkdocs.yml", tmp_path)
    shutil.copy(ROOT / "CITATION.cff", tmp_path)
    thread.all_objects.cache_clear()
    return tmp_path


def edit(path: Path, old: str, new: str) -> None:
    text = path.read_text(encoding="utf-8")
    assert old in text
    path.write_text(text.replace(old, new), encoding="utf-8")


def test_unknown_equation_number_is_a_problem(copy: Path):
    edit(copy / "gsa_ref/equations/indexer.py", "Eq. 7", "Eq. 77")
    found = thread.problems(copy)
    assert any("Eq. 77 is not in the equation index" in p for p in found)
    assert any(p.startswith("gsa_ref/equations/indexer.py: no docstring carries") for p in found)


def test_renamed_kernel_function_is_a_problem(copy: Path):
    for name in thread.stem_files(copy, "gsa_fast", "gates"):
        edit(copy / name, "def apply_gate(", "def gate(")
    assert any("none of ['apply_gate'] is here" in p for p in thread.problems(copy))


def test_what_does_not_exist_yet_is_said(copy: Path):
    shutil.rmtree(copy / "gsa_fast")
    for path in (copy / "tests").rglob("test_indexer.py"):
        path.unlink()
    opening = thread.strip(copy, "learn/indexer.md", "indexer")
    assert "kernel *not yet*" in opening
    assert "tests *not yet*" in opening
    assert "Not yet" in thread.api(copy, "gsa_fast.indexer")
    assert "Not yet" in thread.kernels(copy, "indexer")


def test_broken_sources_fail_the_build(copy: Path, tmp_path_factory: pytest.TempPathFactory):
    # One build for all faults: each must be named in its output.
    page = copy / "docs/learn/indexer.md"
    edit(page, "../reference/training.md", "../reference/trainings.md")
    edit(page, "../open-choices.md#ties", "../open-choices.md#tie")
    edit(page, "[gsa_ref.check.score_verdict]", "[gsa_ref.check.score_verdicts]")
    edit(page, "{{ default d }}", "{{ default dd }}")
    edit(copy / "docs/verify/index.md", "# What", "Eq. 99\n\n# What")
    edit(copy / "tests/ref/test_attention.py", "@pytest.mark.property(33)\n", "")
    (copy / "docs/stray.md").write_text("# Stray\n")
    cell = {"cell_type": "markdown", "metadata": {}, "source": "# N\n\n[lost](../docs/nowhere.md)"}
    notebook = {"cells": [cell], "metadata": {}, "nbformat": 4, "nbformat_minor": 4}
    (copy / "notebooks").mkdir(exist_ok=True)
    (copy / "notebooks/99_lost.ipynb").write_text(json.dumps(notebook))
    done = build_site(copy, tmp_path_factory.mktemp("broken"))
    assert done.returncode != 0
    reported = "\n".join(re.findall(r"^WARNING -.*$", done.stderr, re.MULTILINE))
    for name in ("trainings.md", "#tie'", "score_verdicts", "default dd", "Eq. 99", "nowhere.md", "property 33"):
        assert name in reported, f"{name} was not reported in\n{done.stderr}"
    assert "stray.md" in done.stderr  # listed below the warning that some pages are not in the nav


# ---- the register of properties and pitfalls -------------------------------------------------------------------------


def test_every_property_and_pitfall_is_claimed_on_both_sides_or_excused():
    assert register.problems(ROOT) == []
    assert [entry.key for entry in register.PROPERTIES] == list(range(1, 58))
    assert len({entry.key for entry in register.PITFALLS}) == len(register.PITFALLS)


def test_properties_page_names_every_entry_and_every_claim(site: Path):
    text = (site / "verify/properties/index.html").read_text(encoding="utf-8")
    claims, _ = register.read(ROOT)
    assert {claim.side for claim in claims} == set(register.SIDES)
    assert all(f"<code>{claim.path}</code>" in text and f"<code>{claim.test}</code>" in text for claim in claims)
    assert all(f"<strong>{entry.key}.</strong>" in text for entry in register.PROPERTIES)
    assert text.count("<dt>") == len(register.PROPERTIES) + len(register.PITFALLS)
    reasons = [why for e in register.PROPERTIES + register.PITFALLS for why in (e.named | e.absent).values()]
    assert all(why in text for why in reasons)


DRAWN = "@pytest.mark.property(1)\n@given(CASES)\ndef test_a(case): pass\n"
NAMED = "@pytest.mark.property(1)\ndef test_a(): pass\n"
HELD = {"ref": DRAWN, "fast": DRAWN}
FORM = "only 0 are literals on a test function"


@pytest.mark.parametrize(
    ("tests", "excuses", "expected"),
    [
        (HELD, {}, []),
        ({"ref": DRAWN}, {}, ["property 1 in tests/fast: no test claims it"]),
        ({"ref": DRAWN}, {"absent": {"fast": "why"}}, []),
        (HELD, {"absent": {"fast": "why"}}, ["property 1 in tests/fast: is tested, but excused"]),
        ({**HELD, "fast": NAMED}, {}, ["property 1 in tests/fast: no drawn test"]),
        ({**HELD, "fast": NAMED}, {"named": {"fast": "why"}}, []),
        (HELD, {"named": {"ref": "why"}}, ["property 1 in tests/ref: is drawn, but excused"]),
        ({**HELD, "ref": DRAWN.replace("(1)", "(1, 2)")}, {}, ["test_a: property 2 is not in the register"]),
        ({**HELD, "other": NAMED}, {}, ["test_a: only tests in tests/ref and tests/fast claim a property"]),
        ({**HELD, "other": "pytestmark = pytest.mark.property(1)\n"}, {}, [FORM]),
        ({**HELD, "other": NAMED.replace("(1)", "(N)")}, {}, [FORM]),
        ({**HELD, "other": NAMED.replace("test_a", "helper")}, {}, [FORM]),
        ({**HELD, "other": '@pytest.mark.pitfall("x")\ndef test_a(): pass\n'}, {}, ["'x' is not", "only tests in"]),
        ({**HELD, "other": 'def test_a():\n    "Properties 1 and 2."\n'}, {}, ["names a property in its docstring"]),
    ],
)
def test_what_the_register_and_the_tests_disagree_on_is_a_problem(
    tests: dict[str, str], excuses: dict[str, dict[str, str]], expected: list[str], tmp_path: Path, monkeypatch
):
    entry = register.Entry(1, "indexer", "a claim", **excuses)
    monkeypatch.setattr(register, "REGISTERS", {"property": (entry,), "pitfall": ()})
    for side, text in tests.items():
        (tmp_path / "tests" / side).mkdir(parents=True)
        (tmp_path / "tests" / side / "test_x.py").write_text(text)
    found = register.problems(tmp_path)
    assert len(found) == len(expected), found
    assert all(part in problem for part, problem in zip(expected, found, strict=True)), found


# ---- tables, notebooks, code on pages, pictures ----------------------------------------------------------------------


def test_missing_verification_record_is_said(tmp_path: Path):
    assert records.verification_table(tmp_path).startswith("No record is stored")


def test_tables_of_mutants_show_the_records(tmp_path: Path):
    (tmp_path / "tests/mutants").mkdir(parents=True)
    fault = {"kernel": "a_kernel", "operator": "axis", "before": "x | y", "after": "x < y", "stem": "gates"}
    generated = [fault | {"verdict": verdict} for verdict in ("FAIL", "TIMEOUT", "pass")]
    survivor = {"name": "a fault by hand", "why": "because"}
    for path, content in (
        (records.GENERATED, generated),
        (records.BY_HAND, [{"stem": "", "verdict": "CRASH"}]),
        (records.SURVIVORS, [fault | {"why": "it is dead code"}, survivor]),
    ):
        (tmp_path / path).write_text(json.dumps(content))
    assert "| axis | 3 | 2 |\n| all | 3 | 2 |" in records.mutants_by(tmp_path, "operator")
    assert "| `a_kernel` | 3 | 2 |" in records.mutants_by(tmp_path, "kernel")
    assert records.mutants_stems(tmp_path).endswith(
        "| gates | 0 | 0 | 0 | 1 | 0 | 1 |\n| import | 0 | 1 | 0 | 0 | 0 | 0 |"
    )
    code = "| <code>x &#124; y</code> | <code>x &lt; y</code> | it is dead code |"
    assert f"| `a_kernel` {code}\n| by hand | a fault by hand |  | because |" in records.mutants_survivors(tmp_path)
    assert records.mutants_count(tmp_path, "generated", "killed") == "2"
    assert records.mutants_count(tmp_path, "hand", "run") == "1"


def test_the_table_of_compiled_kernels_shows_the_worst_of_each_target(tmp_path: Path):
    assert records.compile_table(tmp_path).startswith("No record is stored")
    row = {"target": "sm_86", "variants": 3, "shared_memory_limit": 101376, "registers": 9, "misfits": []}
    rows = [
        row | {"kernel": "a_kernel", "shared_memory": 1000, "stack": 8, "misfits": [{}]},
        row | {"kernel": "b_repair_kernel", "shared_memory": 2000, "stack": 99, "registers": 255},
    ]
    path = tmp_path / records.COMPILED / "some.json"
    path.parent.mkdir(parents=True)
    path.write_text(json.dumps({"triton": "3.6.0", "rows": rows}))
    expected = "| sm_86 | 3.6.0 | 6 | 1 | 2,000 of 101,376 (`b_repair_kernel`) | 255 | 8 |"
    assert records.compile_table(tmp_path).endswith(expected)


def test_verification_table_shows_the_record(tmp_path: Path):
    path = tmp_path / records.VERIFICATION[0]
    path.parent.mkdir(parents=True)
    row = dict.fromkeys(records.COLUMNS + records.ORIGIN, "x")
    row |= {"stem": "indexer", "cases": 17, "ratio": 0.123456, "budget": None}
    record = dict.fromkeys(records.FIELDS, "y") | {"device": "some device"}
    record["rows"] = [row | {"command": command} for command in ("first", "second", "first")]
    path.write_text(json.dumps(record))
    table = records.verification_table(tmp_path)
    assert "- device: `some device`\n- torch: `y`" in table
    assert "- command: `first`, `second`\n- commit: `x`\n- sources: `x`" in table
    assert "| indexer | x | 17 | x | – | 0.123 | x | x |" in table
    del record["rows"][0]["ratio"]
    path.write_text(json.dumps(record))
    with pytest.raises(KeyError, match="ratio"):
        records.verification_table(tmp_path)


def test_stored_verification_records_have_the_expected_form():
    table = records.verification_table(ROOT)
    assert all(f"From `{name}`" in table for name in records.VERIFICATION)
    assert table.count("\n| ") > len(records.VERIFICATION)


def test_fuzzing_table_sums_the_record_and_says_if_there_is_none(tmp_path: Path):
    assert records.fuzzing_table(tmp_path).startswith("No record is stored")
    path = tmp_path / records.FUZZING
    path.parent.mkdir(parents=True)
    row = {"function": "f", "impl": "a", "fault": "dtype", "outcome": "TypeError", "calls": 1200}
    record = dict.fromkeys(("device", "torch", "triton", "command", "seed"), "x") | {"calls": 1205, "violations": 0}
    record["rows"] = [row, row | {"impl": "b", "calls": 3}, row | {"fault": "none", "outcome": "result", "calls": 2}]
    path.write_text(json.dumps(record))
    table = records.fuzzing_table(tmp_path)
    assert "| | TypeError | result | violation |" in table
    assert "| `f` | 1203 | 2 | – |\n| all | 1,203 | 2 | 0 |" in table
    assert table.endswith(": dtype.")


def test_the_tables_of_the_reference_s_mutants_show_the_record(tmp_path: Path):
    for table in (records.reference_mutants_table, records.reference_survivors_table):
        assert table(tmp_path).startswith("No record is stored")
    survivors = [{"kind": "equivalent", "why": "e is 1"}] * 2 + [{"kind": None, "why": None}]
    rows = [
        {"module": "gates", "mutants": 40, "killed": 36, "timeout": 1, "survived": 3, "survivors": survivors},
        {"module": "rope", "mutants": 10, "killed": 10, "timeout": 0, "survived": 0, "survivors": []},
    ]
    record = dict.fromkeys(("tool", "python", "torch", "command"), "x") | {"modules": rows, "not_run": ["layer"]}
    path = tmp_path / records.REFERENCE_MUTANTS
    path.parent.mkdir(parents=True)
    path.write_text(json.dumps(record))
    table = records.reference_mutants_table(tmp_path)
    assert "| `gsa_ref.gates` | 40 | 37 | 92.5% | 3 | 2 |" in table
    assert "| **all of these** | 50 | 47 | 94.0% | 3 | 2 |" in table
    assert "Without a result: `gsa_ref.layer`." in table
    reasons = records.reference_survivors_table(tmp_path)
    assert "| equivalent | 2 | e is 1 |" in reasons
    assert "| open | 1 | a gap in the tests of the module |" in reasons
    del rows[0]["timeout"]
    path.write_text(json.dumps(record))
    with pytest.raises(KeyError, match="timeout"):
        records.reference_mutants_table(tmp_path)


ENVIRONMENT = {
    "device": "some device", "torch": "2", "triton": "3", "seed": 0, "commit": None, "command": "bench"
}  # fmt: skip


def timed(case: str, ms: float | None, L: int, **fields: object) -> dict[str, object]:
    """A record of the prefill suite as `gsa_fast.bench` writes it."""
    size = {"B": 1, "L": L, "S": L, "H": 32, "H_kv": 8, "d_h": 128, "H_I": 4, "d_I": 64, "k": 2048}
    size |= {name: fields.pop(name) for name in ("H_kv", "k") if name in fields}
    record = {"suite": "prefill", "case": case, "impl": "gsa_fast", "selection": "random", "shape": size, **ENVIRONMENT}
    record |= {"ms": ms and {"median": ms, "p20": 0.9 * ms, "p80": 1.1 * ms}, "peak_bytes": 2**20, "tbps": 1.5}
    record |= {"tflops": 12.0, "share_of_roofline": 0.25, "union_over_k": 11.5, "p_eff": 0.3, "mean_k": 2048.0}
    return record | fields


def step(impl: str, ms: float | None, B: int, mode: str | None = None, **fields: object) -> dict[str, object]:
    """A record of the decode suite, at 128K keys where nothing else is said."""
    size = {"B": B, "L": fields.pop("L", 1), "S": fields.pop("S", 131072)}
    record = timed("decode", ms, 1, impl=impl, sigmoid_mode=mode, **fields)
    return record | {"suite": "decode", "shape": record["shape"] | size}


@pytest.fixture
def with_records(tmp_path: Path) -> Path:
    """A root with made-up records: the whole path is slower at 2K, faster at 4K and 128K."""
    prefill = [
        {"suite": "prefill", "case": "ceiling", "impl": "copy", "shape": None, "tbps": 4.25, **ENVIRONMENT},
        *(timed("attention", ms, L, impl="cudnn", selection=None, k=None) for L, ms in ((2048, 1.0), (4096, 8.0))),
        timed("attention", 250.0, 131072, impl="cudnn", selection=None, k=None),
        timed("attention", None, 131072, impl="flash", selection=None, k=None, reason="failed: out of memory"),
        *(timed("whole", ms, L, method="union") for L, ms in ((2048, 2.0), (4096, 4.0), (131072, 50.0))),
        timed("whole", 100.0, 131072, selection="ties", peak_bytes=3 * 2**30),
        timed("whole", 25.0, 131072, k=512),
        timed("attention", 30.0, 131072),
        timed("indexer", 10.0, 131072, H_kv=None, k=None, union_over_k=None, p_eff=None),
    ]
    row = {"stem": "output", "cases": 2048, "worst_error": 0.001, "budget": 0.01, "ratio": 0.1, "verdict": "pass"}
    verified = {"shape": {"L": 131072, "H_kv": 8}, **ENVIRONMENT, "rows": [row], "sigmoid_mode": "approximate"}
    verified |= {
        "mean_k": 2000.0,
        "recall": {"mean": 0.9999, "least": 0.998},
        "near_threshold": {"median": 3, "most": 9},
    }
    idea = {"what": "a sort", "predicted": "20 ms", "measured": {"ms": 31.5, "recall": 1}, "verdict": "dropped"}
    decode = [
        {"suite": "decode", "case": "ceiling", "impl": "copy", "shape": None, "tbps": 4.5, **ENVIRONMENT},
        *(step(impl, ms, B) for B in (1, 32) for impl, ms in (("cudnn", 0.5 * B), ("flash", 1.0 * B))),
        *(step("gsa_fast", ms, B, "exact", share_of_roofline=0.5) for B, ms in ((1, 0.05), (32, 4.0))),
        step("gsa_fast", 0.04, 1, "approximate"),
        step("gsa_fast_general", 0.1, 1, "exact"),
        step("gsa_fast_general", 2.0, 32, "exact"),
        step("gsa_fast", 1.0, 1, "exact", S=8192),
        step("cudnn", 0.25, 1, S=8192),
        *(step(impl, None, 32, mode, S=2**20, reason="left out: 300 GiB") for impl, mode in
          (("gsa_fast", "exact"), ("cudnn", None))),
        step("cudnn", 0.6, 1, L=2, note="without a mask"),
    ]  # fmt: skip
    train = [
        timed("forward_backward", ms, 32768, **{"impl": impl, "selection": selection}) | {"suite": "train"}
        for impl, selection, ms in (
            ("cudnn", None, 50.0), ("gsa_fast", "random", 100.0), ("gsa_fast atomic", "random", 20.0)
        )
    ]  # fmt: skip
    train += [
        timed(f"kl_{phase}_{passes}", ms, L, **{"impl": impl, "selection": selection, "k": selection and 2048, **more})
        | {"suite": "train"}
        for phase, selection in (("warm_up", None), ("sparse", "clustered p=0.95"))
        for passes in ("forward", "forward_backward")
        for impl, L, ms, more in (
            ("gsa_fast", 32768, 40.0, {}), ("gsa_ref", 32768, None, {"reason": "left out: 256 GiB"}),
            ("gsa_fast", 4096, 2.0, {"peak_bytes": 3 * 2**30}), ("gsa_ref", 4096, 8.0, {}),
        )
    ]  # fmt: skip
    for path, content in (
        (speed.PREFILL, prefill),
        (speed.TRAIN, train),
        (speed.DECODE, decode),
        (speed.LONG, [verified]),
        (speed.TRIED, [idea]),
    ):
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).write_text(json.dumps(content))
    return tmp_path


@pytest.mark.parametrize("name", sorted(speed.DIRECTIVES))
def test_missing_speed_record_is_said(name: str, tmp_path: Path):
    said = speed.DIRECTIVES[name](tmp_path)
    assert said.startswith("No picture" if name.endswith("_picture") else "No record is stored: there is no `bench")


def test_speed_tables_show_the_records(with_records: Path):
    show = {name: make(with_records) for name, make in speed.DIRECTIVES.items()}
    assert "- device: `some device`" in show["prefill_setup"]
    assert "- ceilings: copy 4.25 TB/s" in show["prefill_setup"]
    assert "| H_kv | selection | 2K | 4K | 128K |" in show["prefill_speedup"]
    assert "| 8 | random | 0.5 | 2 | 5 |" in show["prefill_speedup"]
    assert "| 8 | ties | – | – | 2.5 |" in show["prefill_speedup"]
    assert "| 8 | dense, cuDNN | 1 | 8 | 250 |" in show["prefill_lengths"]
    assert "| 8 | dense, FlashAttention | – | – | – |" in show["prefill_lengths"]
    assert "| 8 | random | 2 | 4 | 50 |" in show["prefill_lengths"]
    roofline = show["prefill_roofline"].splitlines()
    assert [line.split(" | ")[0] for line in roofline[2:]] == ["| indexer", *["| attention"] * 2, *["| whole"] * 2]
    assert "| attention | gsa_fast | 8 | random | 11.5 | 0.3 | 30 | 27–33 | 12 | 1.5 | 25% |" in roofline
    assert "no record at length 64" in speed.prefill_roofline(with_records, "64")
    assert show["prefill_range"] == "2.5–5"
    assert speed.prefill_range(with_records, "8", "131072", "cost") == "0.2–0.4"
    assert speed.prefill_range(with_records, "8", "2048") == "0.5"
    assert speed.prefill_range(with_records, "1") == "–"
    assert show["decode_range"] == "4–10"
    assert speed.decode_range(with_records, "8", "131072", "cost") == "0.1–0.25"
    assert "| 8 | random | 2K | 4K | 0.5 at 2K |" in show["prefill_crossover"]
    assert "| 8 | ties | nowhere | 128K | 2.5 at 128K |" in show["prefill_crossover"]
    assert "| kernel | union | union | union |" in show["prefill_methods"]
    assert "| 128K | 8 | random | 512 | 25 | 10 |" in show["prefill_budgets"]
    assert "| 8 | 1 | 1 | 3,072 |" in show["prefill_memory"]
    assert "| attention | flash | – | 128K | 8 | failed: out of memory |" in show["prefill_missing"]
    assert "- ceilings: copy 4.5 TB/s" in show["decode_setup"]
    assert "| selection | by | dk, dv | 32K, H_kv 8 |" in show["train_times"]
    assert "| random | gsa_fast | in order | 100\u00a0ms (2) |" in show["train_times"]
    assert "| random | gsa_fast | atomic | 20\u00a0ms (0.4) |" in show["train_times"]
    assert "| dense | flash | – | – |" in show["train_times"]
    assert "| random | atomic | 1 (25%) |" in show["train_memory"]
    kl = show["train_kl"]
    assert "| phase | selection | passes | by | H_kv | 4K | 32K |" in kl
    assert "| warm-up | – | forward | gsa_fast | 8 | 2\u00a0ms (0.25) | 40\u00a0ms |" in kl
    assert "| sparse | clustered\u00a0p=0.95 | forward + backward | gsa_ref | 8 | 8\u00a0ms | – |" in kl
    assert "| warm-up | – | forward + backward | gsa_fast | 8 | 3,072 (25%) | 1 (25%) |" in kl
    assert "- `gsa_ref`: left out: 256 GiB, at 32K" in kl
    assert "| H_kv | queries | keys | by | B = 1 | B = 32 |" in show["decode_speedup"]
    assert "| 8 | 1 | 8K | decode kernels | 0.25 (1\u00a0ms) | – |" in show["decode_speedup"]
    assert "| 8 | 1 | 128K | decode kernels | 10 (0.05\u00a0ms) | 4 (4\u00a0ms) |" in show["decode_speedup"]
    assert "| 8 | 1 | 128K | decode kernels\u00a0≈ | 12.5 (0.04\u00a0ms) | – |" in show["decode_speedup"]
    assert "1M" not in show["decode_speedup"]
    assert "| 8 | 1 | 128K | dense, cuDNN | 0.5 | 16 |" in show["decode_dense"]
    assert "| 8 | 1 | 128K | dense, FlashAttention | 1 | 32 |" in show["decode_dense"]
    assert "| 8 | 2 | 128K | dense, cuDNN | 0.6 | – |" in show["decode_dense"]
    assert "| 8 | 1 | 128K | decode kernels | 50% | 50% |" in show["decode_roofline"]
    assert "| 8 | 1 | 128K | general kernels | 25% | 25% |" in show["decode_roofline"]
    assert "| 8 | 1 | 128K | dense, cuDNN | 25% | 25% |" in show["decode_roofline"]
    assert show["decode_kernels"].splitlines()[2:] == ["| 8 | 1 | 128K | decode kernels | 2 | 0.5 |"]
    assert show["decode_losses"].splitlines()[2:] == [
        "| 8 | 1 | 8K | 1 | exact | dense, cuDNN | 0.25 |",
        "| 8 | 1 | 128K | 32 | exact | general kernels | 0.5 |",
    ]
    assert show["decode_missing"].splitlines()[2:] == [
        "| 8 | 1 | 1M | 32 | gsa_fast, cudnn | left out: 300 GiB |",
        "| 8 | 2 | 128K | 1 | cudnn | without a mask |",
    ]
    assert "| 128K | 8 | approximate | output | pass | 2048 | 0.001 | 0.01 | 10% |" in show["long_verification"]
    assert "| 128K | 8 | approximate | 2000 | 99.990% | 99.80% | 3 | 9 |" in show["long_verification"]
    assert "| a sort | 20 ms | ms: 31.5; recall: 1 | dropped |" in show["tried"]


def test_the_kl_loss_is_on_the_page_only_if_it_was_measured(with_records: Path):
    path = with_records / speed.TRAIN
    with_kl = {name: speed.DIRECTIVES[name](with_records) for name in ("train_times", "train_memory")}
    found = json.loads(path.read_text())
    path.write_text(json.dumps([r for r in found if not r["case"].startswith("kl_")]))
    assert speed.train_kl(with_records) == ""
    assert with_kl == {name: speed.DIRECTIVES[name](with_records) for name in with_kl}


def test_a_speed_record_that_lacks_a_field_or_is_no_list_is_an_error(with_records: Path):
    path = with_records / speed.PREFILL
    found = json.loads(path.read_text())
    del found[1]["ms"]
    path.write_text(json.dumps(found))
    with pytest.raises(KeyError, match="ms"):
        speed.prefill_speedup(with_records)
    path.write_text("{}")
    with pytest.raises(ValueError, match="expected a list of records, got dict"):
        speed.prefill_speedup(with_records)


@pytest.mark.parametrize("name", ["PREFILL", "DECODE", "TRAIN", "LONG", "TRIED"])
def test_stored_speed_records_have_the_expected_form(name: str):
    path = getattr(speed, name)
    if not (ROOT / path).is_file():
        pytest.skip("no record is stored")
    wanted = {
        "PREFILL": "prefill_",
        "DECODE": "decode_",
        "TRAIN": "train_",
        "LONG": "long_verification",
        "TRIED": "tried",
    }[name]
    for directive, make in speed.DIRECTIVES.items():
        if directive.startswith(wanted):
            assert make(ROOT), directive
    text = (ROOT / path).read_text(encoding="utf-8")
    assert not re.search(r"/(home|root|tmp|work|usr)/", text)  # no path of a machine


@pytest.fixture
def with_runs(tmp_path: Path) -> Path:
    """A root with made-up training runs: a warm-up, and sparse training 2% behind dense training."""
    sizes = {"d": 8, "n_layers": 1, "d_ff": 16, "H": 2, "H_kv": 1, "d_h": 4, "H_I": 2, "d_I": 4, "context": 16}
    settings = sizes | {"indexer_rope": True, "indexer_scale": None, "lr": 0.001, "kl_temperature": 0.3}
    measured = {"captured": 0.81, "captured_oracle": 0.9, "captured_recent": 0.7, "captured_random": 0.25}
    measured |= {"captured_ratio": 0.9, "captured_ratio_min": 0.85, "recall": 0.75, "mean_k": 30.25}

    def run(name: str, variant: str, loss: float, **more: float) -> dict[str, object]:
        lines = [{"step": n, "tokens": n, "validation_loss": x, **more} for n, x in ((0, 3.0), (5, loss))]
        record = {"suite": "training", "name": name, "command": f"python x --out {name}", "log": lines}
        facts = {"device": "some device", "torch": "2", "python": "3", "commit": None}
        text = {"name": "a text", "sha256": "abc", "train_tokens": 12345}
        return record | facts | {"text": text, "settings": settings | {"variant": variant}}

    found = [
        run("warm_a", "sparse", 2.5, **measured),
        run("dense_on", "dense", 2.0, first_token_share=0.5),
        run("sparse_on", "sparse", 2.04, **measured),
        run("gated_on", "gated", 1.9, first_token_share=0.125, value_gate=0.4, output_gate=0.3),
    ]
    (tmp_path / learning.TRAINING).parent.mkdir(parents=True)
    (tmp_path / learning.TRAINING).write_text(json.dumps(found))
    kernels = []
    for impl, dtype, loss in (("reference", "float32", 1.0), ("reference", "bfloat16", 1.25), ("fast", "float32", 0.5)):
        kernels.append(run(f"{impl}_{dtype}", "gsa", 2.0, indexer_kl=2 * loss))
        kernels[-1]["settings"] = settings | {"impl": impl, "dtype": dtype, "batch": 2, "k_base": 4}
        kernels[-1]["log"] = [line | {"loss": loss} for line in kernels[-1]["log"]]
    kernels[1]["log"] = kernels[1]["log"][:1]  # it did not get as far
    (tmp_path / learning.KERNELS).write_text(json.dumps(kernels))
    return tmp_path


@pytest.mark.parametrize("name", sorted(learning.DIRECTIVES))
def test_missing_training_record_is_said(name: str, tmp_path: Path):
    assert learning.DIRECTIVES[name](tmp_path).startswith("No record is stored: there is no `experiments/")


def test_training_tables_show_the_records(with_runs: Path):
    show = {name: make(with_runs) for name, make in learning.DIRECTIVES.items()}
    assert "4 runs:" in show["training_setup"]
    assert "- device: `some device`" in show["training_setup"]
    assert "- text: a text, SHA-256 `abc`, 12,345 tokens to train on" in show["training_setup"]
    assert show["training_model"].endswith("| 8 | 1 | 16 | 2 | 1 | 4 | 2 | 4 | 16 |")
    captured = "| yes | 1/√d_I | 0.001 | 0.3 | 81.0% | 90.0% | 70.0% | 25.0% | 0.900 | 0.850 | 0.750 | 2.500 |"
    assert show["training_warm_up"].splitlines()[2:] == [captured]
    assert show["training_steps"].splitlines()[0].endswith("| step 0 | step 5 |")
    assert show["training_steps"].splitlines()[2:] == ["| yes | 1/√d_I | 0.001 | 0.3 | 0.900 | 0.900 |"]
    assert show["training_on"].splitlines()[2:] == [
        "| sparse | fixed budget | dense | 3.000 | 2.040 | 2.000 | +2.0% | 30.2 | 0.900 |"
    ]
    assert "| dense | 2.000 | 50.0% | – | – |" in show["training_variants"]
    assert "| gated | 1.900 | 12.5% | 0.400 | 0.300 |" in show["training_variants"]
    assert "\npython x --out warm_a\n" in show["training_commands"]
    assert show["training_last"] == "2.000"
    assert learning.training_last(with_runs, "gated_on", "first_token_share") == "12.5%"
    for wrong in (("lost", "validation_loss"), ("dense_on", "lost")):
        with pytest.raises(KeyError, match="lost"):
            learning.training_last(with_runs, *wrong)
    assert show["training_kernels"].splitlines()[-3:] == [
        "| reference | float32 | 5 | – | – |",
        "| reference | bfloat16 | 0 | 0.2500 | 0.5000 |",
        "| `gsa_fast` | float32 | 5 | 0.5000 | 1.0000 |",
    ]


def test_stored_training_records_have_the_expected_form():
    if not (ROOT / learning.TRAINING).is_file():
        pytest.skip("no record is stored")
    assert all(make(ROOT) for make in learning.DIRECTIVES.values())
    for path in (learning.TRAINING, learning.KERNELS):
        text = (ROOT / path).read_text(encoding="utf-8")
        assert not re.search(r"/(home|root|tmp|work|usr)/", text)  # no path of a machine


def test_a_stored_table_becomes_a_table(tmp_path: Path):
    (tmp_path / "docs/figures").mkdir(parents=True)
    stored = {"t": {"header": ["a", "b"], "rows": [["x", "1"]]}, "u": {"header": ["a"], "left": 1, "rows": []}}
    (tmp_path / "docs/figures/some.json").write_text(json.dumps(stored))
    assert thread.expand(tmp_path, "{{ fact_table some t }}", "p.md") == "| a | b |\n|---|--:|\n| x | 1 |"
    assert thread.fact_table(tmp_path, "some", "u") == "| a |\n|---|"


# ---- the claims ------------------------------------------------------------------------------------------------------

CLAIMS = claims.ledger(ROOT)


def test_the_ledger_has_every_kind_of_published_figure():
    """The rows of the published tables and the named limits, each with at least one claim."""
    text = " ".join(entry["claim"] for entry in CLAIMS)
    for kind in (
        "speed-up at 128K", "cost of prefill", "cost of decoding", "memory", "4K tokens", "1M tokens", "speed-up at k",
        "perplexity of dense", "perplexity by gates", "perplexity and RULER-128K at those k", "RULER at 128K",
        "ReLU, sigmoid, gated sigmoid", "sensitive to k_base", "first token", "mean gate score", "loss spikes",
        "learning rate", "largest activation", "parameters added",
    ):  # fmt: skip
        assert kind in text, kind


# What may be written with a digit among our words: formulas, links, and the length or budget that is spoken of.
SPOKEN = re.compile(r"\$[^$]*\$|\]\([^)]*\)|\bat \d+K\b|\bat 1M\b")


@pytest.mark.parametrize("entry", CLAIMS, ids=lambda e: e["claim"])
def test_a_claim_resolves(entry: dict[str, Any]):
    """What was measured has records, a command that exists, and no typed figure; what was not has none of them."""
    here = thread.expand(ROOT, entry["here"], "claims.json")
    assert "{{" not in here
    assert "No record is stored" not in here
    typed = SPOKEN.sub("", thread.DIRECTIVE.sub("", entry["here"]))
    assert not re.search(r"\d", typed), typed
    measured = entry["verdict"] in claims.MEASURED
    assert bool(entry["records"]) == bool(entry["command"]) == bool(thread.DIRECTIVE.search(entry["here"])) == measured
    assert all((ROOT / path).is_file() for path in entry["records"])
    if measured:
        program, *rest = entry["command"].split()
        assert program == "python"
        stem = rest[1].replace(".", "/") if rest[0] == "-m" else ""
        assert any((ROOT / path).is_file() for path in ([f"{stem}.py", f"{stem}/__main__.py"] if stem else rest[:1]))


def test_the_claims_page_shows_every_claim_and_counts_the_verdicts(site: Path):
    text = (site / "claims/index.html").read_text(encoding="utf-8")
    assert [entry["published"] for entry in CLAIMS if entry["published"] not in text] == []
    counts = re.findall(r"\| (\d+) \|$", claims.claims_verdicts(ROOT), re.MULTILINE)
    assert sum(map(int, counts)) == len(CLAIMS)


@pytest.mark.parametrize(("field", "value"), [("verdict", "proved"), ("claim", None)])
def test_a_malformed_ledger_is_refused(tmp_path: Path, field: str, value: str | None):
    (tmp_path / "docs").mkdir()
    entry = CLAIMS[0] | {field: value}
    if value is None:
        del entry[field]
    (tmp_path / claims.LEDGER).write_text(json.dumps([entry]))
    with pytest.raises(ValueError, match=r"docs/claims\.json: expected"):
        claims.ledger(tmp_path)


def draw_performance(root: Path, out: Path) -> subprocess.CompletedProcess[str]:
    script = root / "docs/figures/performance.py"
    command = [sys.executable, str(script), "--out", str(out)]
    return subprocess.run(command, cwd=root, capture_output=True, text=True, check=False)


def test_the_performance_pictures_are_drawn_from_the_records_and_refused_without(with_records: Path):
    for name in ("figures/performance.py", "figures/style.py", "hooks/speed.py"):
        (with_records / "docs" / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(DOCS / name, with_records / "docs" / name)
    figures = with_records / "docs/figures"
    done = draw_performance(with_records, figures)
    assert done.returncode == 0, done.stderr
    for scheme in ("light", "dark"):
        assert "random" in (figures / f"performance_speedup.{scheme}.svg").read_text(encoding="utf-8")
        assert "128K keys" in (figures / f"performance_decode.{scheme}.svg").read_text(encoding="utf-8")
    assert json.loads((figures / "performance.json").read_text())["devices"] == ["some device"]
    assert "performance_decode.dark.svg#only-dark" in speed.decode_picture(with_records)
    assert "performance_speedup.dark.svg#only-dark" in speed.prefill_picture(with_records)
    assert speed.roofline_picture(with_records).startswith("No picture")  # ceilings are missing
    prefill = json.loads((with_records / speed.PREFILL).read_text())
    ceiling = {"suite": "prefill", "case": "ceiling", "shape": None, "ms": None, **ENVIRONMENT}
    rates = [ceiling | {"impl": "matmul", "tflops": 680.0}, ceiling | {"impl": "gather", "tbps": 7.8}]
    (with_records / speed.PREFILL).write_text(json.dumps(prefill + rates))
    assert draw_performance(with_records, figures).returncode == 0
    drawing = (figures / "performance_roofline.light.svg").read_text(encoding="utf-8")
    assert "whole path" in drawing
    assert "FlashAttention" not in drawing  # it was not timed
    assert "performance_roofline.dark.svg#only-dark" in speed.roofline_picture(with_records)
    (with_records / speed.PREFILL).write_text(json.dumps(prefill))
    (with_records / speed.DECODE).unlink()
    alone = with_records / "alone"
    alone.mkdir()
    assert draw_performance(with_records, alone).returncode == 0
    drawn = {"performance.json", "performance_speedup.light.svg", "performance_speedup.dark.svg"}
    assert {path.name for path in alone.iterdir()} == drawn
    (with_records / speed.PREFILL).unlink()
    done = draw_performance(with_records, figures)
    assert done.returncode == 1
    assert done.stderr.startswith("There is nothing to draw: no record is stored in")


def test_notebook_links_become_page_links():
    urls = {"docs/learn/indexer.md": "learn/indexer/", "notebooks/01_b.ipynb": "notebooks/01_b/"}
    html = '<a href="../docs/learn/indexer.md#x">a</a><a href="01_b.ipynb">b</a><a href="https://c.example">c</a>'
    html, broken = notebook_pages.rewrite_links(
        html + '<a href="gone.md">d</a>', "notebooks/00_a.ipynb", urls, "notebooks/00_a/"
    )
    assert 'href="../../learn/indexer/#x"' in html
    assert 'href="../01_b/"' in html
    assert 'href="https://c.example"' in html
    assert broken == ["gone.md"]


def test_notebook_template_loses_its_remote_scripts_and_cells_keep_theirs():
    cell = "<style>.cell {}</style><script>1</script>"
    head = '<style>a</style><script src="https://x.example"></script><script>clipboard()</script>'
    styles, html = notebook_pages.split_template(f'{head}<div class="jupyter-wrapper">{cell}</div><style>b</style>\n')
    assert styles == ["a", "b"]
    assert html == f'<script>clipboard()</script><div class="jupyter-wrapper">{cell}</div>'


def test_notebook_picture_is_described_by_the_paragraph_before_it():
    picture = f"<img {notebook_pages.NO_ALT}>"
    html = notebook_pages.describe_pictures(f'<p>a</p><p>Dots &lt; <b>2</b>:\n"x".</p>{picture}<p>c</p>{picture}')
    assert re.findall(r"<img (.*?)>", html) == ['alt="Dots &lt; 2: &quot;x&quot;."', 'alt="c"']
    assert notebook_pages.describe_pictures('<img alt="own">') == '<img alt="own">'


def code_blocks() -> list[tuple[str, str]]:
    """Python blocks that are written on pages: exercises. Listings are included from files and have a title."""
    found = []
    for path in sorted(DOCS.rglob("*.md")):
        blocks = re.findall(r"^( *)```python\n(.*?)^\1```", path.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)
        for number, (indent, block) in enumerate(blocks, 1):
            code = "".join(line.removeprefix(indent) for line in block.splitlines(keepends=True))
            found.append((f"{path.relative_to(DOCS).as_posix()}-{number}", code))
    return found


@pytest.mark.parametrize(("name", "code"), [pytest.param(*block, id=block[0]) for block in code_blocks()])
def test_code_written_on_pages_runs(name: str, code: str):
    assert "assert" in code, f"{name} checks nothing"
    exec(compile(code, name, "exec"), {})


TOKEN = re.compile(r"#[0-9a-fA-F]{6}\b|[-+]?\d+\.?\d*(?:e[-+]?\d+)?")
# matplotlib derives ids from the contents: they change with the last digit of a coordinate.
IDENTIFIER = re.compile(r"(?<=[\"#])[a-z]{1,2}[0-9a-f]{10}(?=[\")])")


def svg_difference(stored: str, fresh: str) -> str:
    """Empty if the two are the same picture: the same markup, coordinates within 0.02 points, colours within 2/255."""
    stored, fresh = IDENTIFIER.sub("id", stored), IDENTIFIER.sub("id", fresh)
    if TOKEN.sub("0", stored) != TOKEN.sub("0", fresh):
        return "markup differs"
    for a, b in zip(TOKEN.findall(stored), TOKEN.findall(fresh), strict=True):
        if a.startswith("#"):
            if max(abs(x - y) for x, y in zip(bytes.fromhex(a[1:]), bytes.fromhex(b[1:]), strict=True)) > 2:
                return f"colour {a} became {b}"
        elif abs(float(a) - float(b)) > 0.02:
            return f"{a} became {b}"
    return ""


@pytest.mark.parametrize("script", FIGURE_SCRIPTS)
def test_pictures_regenerate(script: str, tmp_path: Path):
    if script == "performance.py" and not (ROOT / speed.PREFILL).is_file():
        pytest.skip("no record is stored")
    subprocess.run([sys.executable, str(DOCS / "figures" / script), "--out", str(tmp_path)], cwd=ROOT, check=True)
    stem = script.removesuffix(".py")
    stored = {p.name for p in (DOCS / "figures").glob(f"{stem}_*.svg")} | {f"{stem}.json"}
    assert {p.name for p in tmp_path.iterdir()} == stored
    for path in sorted(tmp_path.iterdir()):
        before, after = ((folder / path.name).read_text(encoding="utf-8") for folder in (DOCS / "figures", tmp_path))
        if path.suffix == ".json":
            assert json.loads(before) == json.loads(after)
        else:
            assert svg_difference(before, after) == "", path.name


def test_picture_comparison_sees_a_difference():
    picture = '<path id="m0123456789" d="M 1.00 2.00" style="fill: #102030"/>'
    assert svg_difference(picture, picture.replace("1.00", "1.01").replace("#102030", "#112030")) == ""
    assert svg_difference(picture, picture.replace("m0123456789", "m9876543210")) == ""
    for old, new in (("2.00", "2.50"), ("#102030", "#802030"), ("path", "line")):
        assert svg_difference(picture, picture.replace(old, new))
