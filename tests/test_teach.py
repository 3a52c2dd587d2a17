"""The pages for lecturers and the glossary: figures that a computation gives, and references that lead somewhere."""

import importlib
import json
import logging
import re
import shutil
import sys
from itertools import pairwise
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
sys.path.insert(0, str(DOCS / "hooks"))
import excerpts  # noqa: E402
import register  # noqa: E402
import slides  # noqa: E402
import teaching  # noqa: E402
import thread  # noqa: E402

DECKS = sorted(path.name for path in (DOCS / slides.FOLDER).glob("*.md"))
COURSES = teaching.syllabi(ROOT)["courses"]
QUESTIONS = teaching.questions(ROOT)


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    """A copy of what the pages for lecturers are made from."""
    for name in ("docs", "notebooks"):
        ignored = shutil.ignore_patterns("__pycache__", "mathjax", "*.svg")
        shutil.copytree(ROOT / name, tmp_path / name, ignore=ignored)
    shutil.copy(ROOT / "CITATION.cff", tmp_path)
    (tmp_path / "gsa_ref/puzzles").mkdir(parents=True)
    shutil.copy(ROOT / "gsa_ref/puzzles/_files.py", tmp_path / "gsa_ref/puzzles")
    return tmp_path


def edit(path: Path, old: str, new: str) -> None:
    text = path.read_text(encoding="utf-8")
    assert old in text
    path.write_text(text.replace(old, new), encoding="utf-8")


# ---- exam questions --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", range(1, len(QUESTIONS) + 1))
def test_the_figures_of_an_answer_are_what_its_check_computes(number: int):
    question = QUESTIONS[number - 1]
    assert bool(question.values) == bool(question.check)
    computed: dict[str, object] = {}
    exec(compile(question.check, f"question {number}", "exec"), computed)
    assert {name: str(computed[name]) for name in question.values} == question.values


def test_questions_go_from_easy_to_hard_and_some_ask_for_a_property():
    levels = [teaching.LEVELS.index(q.level) for q in QUESTIONS]
    assert levels == sorted(levels)
    assert len(QUESTIONS) >= 20
    assert all(levels.count(level) >= 5 for level in range(3))
    assert sum(bool(q.check) for q in QUESTIONS) >= 15
    about_properties = [q for q in QUESTIONS if q.topic == "which property?"]
    assert len(about_properties) >= 4
    assert all(q.properties for q in about_properties)
    assert {q.topic for q in QUESTIONS} >= set(thread.STEMS)


def test_exam_page_shows_every_question_with_its_answer_folded_in():
    page = teaching.exam_questions(ROOT)
    assert [int(n) for n in re.findall(r"(?m)^\*\*(\d+)\.\*\*", page)] == list(range(1, len(QUESTIONS) + 1))
    assert [int(n) for n in re.findall(r'(?m)^\?\?\? success "Answer to (\d+)"', page)] == list(
        range(1, len(QUESTIONS) + 1)
    )
    assert re.findall(r"(?m)^## (.*)", page) == ["Easy", "Medium", "Hard"]
    assert "«" not in page
    answers = re.sub(r"(?m)^ {4}", "", page)
    for q in QUESTIONS:
        assert q.question.strip() in page
        assert q.check.strip() in answers
        assert all(f"**{value}**" in page for value in q.values.values())
    claims = {entry.key: entry.claim for entry in register.PROPERTIES}
    for key in {key for q in QUESTIONS for key in q.properties}:
        assert f"[Property {key}](../verify/properties.md): {claims[key].split('](')[0]}" in page
    assert teaching.exam_count(ROOT) == str(len(QUESTIONS))
    assert teaching.exam_count(ROOT, "minutes") == str(sum(q.minutes for q in QUESTIONS))


@pytest.mark.parametrize(
    ("old", "new", "error"),
    [
        ('values = { bound = "4" }', 'values = { limit = "4" }', (LookupError, ValueError)),
        ("«bound». A score", "Four. A score", ValueError),
        ("properties = [1]", "properties = [99]", LookupError),
        ('level = "easy"', 'level = "trivial"', ValueError),
        ('topic = "indexer"', 'topics = "indexer"', TypeError),
    ],
)
def test_a_wrong_question_is_refused(old: str, new: str, error: type[Exception], copy: Path):
    edit(copy / teaching.QUESTIONS, old, new)
    with pytest.raises(error):
        teaching.exam_questions(copy)


# ---- syllabi ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("course", COURSES)
def test_a_syllabus_names_every_block_with_its_time(course: str):
    page = teaching.syllabus(ROOT, course)
    blocks = teaching.syllabi(ROOT)["blocks"]
    times = [(int(a), int(b)) for a, b in re.findall(r"(?m)^\*\*(\d+)–(\d+) · ", page)]
    sessions = COURSES[course]
    assert times[0][0] == 0
    assert all(after[0] in (0, before[1]) for before, after in pairwise(times))
    assert sum(end == teaching.SESSION for _, end in times) == len(sessions)
    for name in {name for session in sessions for name, _ in session["blocks"]}:
        assert blocks[name]["title"] in page
        assert blocks[name]["objective"] in page
        assert blocks[name]["board"] in page


def test_courses_have_the_promised_form():
    assert [len(COURSES[name]) for name in ("one", "three", "week")] == [1, 3, 5]
    assert all("lab" in session for session in COURSES["week"])
    for course in ("three", "week"):
        pages = " ".join(
            page
            for session in COURSES[course]
            for name, _ in session["blocks"]
            for page in teaching.syllabi(ROOT)["blocks"][name]["pages"]
        )
        assert [stem for stem in thread.STEMS if f"learn/{stem}.md" not in pages] == []


def test_every_block_is_taught_and_three_lectures_show_every_slide():
    blocks = teaching.syllabi(ROOT)["blocks"]
    taught = {course: {name for s in sessions for name, _ in s["blocks"]} for course, sessions in COURSES.items()}
    assert set().union(*taught.values()) == set(blocks)
    shown = {where for name in taught["three"] for where in blocks[name]["slides"]}
    there = {
        f"{deck.removesuffix('.md')}#{s.slug}"
        for deck in DECKS
        for s in excerpts.sections(ROOT, f"{slides.FOLDER}/{deck}")[1:]
    }
    assert shown == there


def test_every_notebook_is_in_a_lab_of_the_week():
    labs = [number for session in COURSES["week"] for number in session["lab"]]
    assert len(labs) == len(set(labs))
    there = {path.name[:2] for path in (ROOT / "notebooks").glob("[0-9][0-9]_*.ipynb")}
    assert there <= set(labs)


def set_minutes(path: Path, minutes: int) -> None:
    notebook = json.loads(path.read_text(encoding="utf-8"))
    for cell in notebook["cells"]:
        cell["source"] = re.sub(r"\*\*\d+ minutes\.\*\*", f"**{minutes} minutes.**", "".join(cell["source"]))
    path.write_text(json.dumps(notebook), encoding="utf-8")


def test_minutes_are_those_that_the_notebooks_state(copy: Path):
    before = teaching.syllabus(copy, "week")
    tour, indexer = (teaching.notebook_file(copy, number) for number in ("00", "01"))
    stated = int(teaching.minutes(copy, "00"))
    set_minutes(indexer, 1001)
    assert teaching.minutes(copy, "01") == "1001"
    after = teaching.syllabus(copy, "week")
    assert f"**Lab** ({stated + 1001} minutes" in after
    assert "1001 minutes" not in before
    assert f"]({teaching.UP}notebooks/{indexer.name}), 1001 minutes" in after
    assert "| 1001 |" in teaching.notebook_table(copy)
    edit(tour, f"**{stated} minutes.**", "**Half an hour.**")
    with pytest.raises(LookupError, match="states no minutes"):
        teaching.minutes(copy, "00")
    with pytest.raises(LookupError, match="no notebook"):
        teaching.minutes(copy, "99")


def test_a_notebook_that_comes_later_gets_its_row(copy: Path):
    for old in (copy / "notebooks").glob("08_*.ipynb"):
        old.unlink()
    assert "08 · " not in teaching.syllabus(copy, "three")
    cell = {"cell_type": "markdown", "source": "# 08 · Convergence\n\n**35 minutes.** You need\n\n"}
    cell["source"] += "**Bound it.** *Hard, 12 minutes.* Do"
    (copy / "notebooks/08_convergence.ipynb").write_text(json.dumps({"cells": [cell]}))
    link = "[08 · Convergence](../notebooks/08_convergence.ipynb)"
    for course in ("three", "week"):
        assert f"{link}, 35 minutes" in teaching.syllabus(copy, course)
    assert f"| {link} | Bound it (Hard, 12 minutes) | 35 |" in teaching.notebook_table(copy)


def test_puzzles_are_counted_where_they_exist(copy: Path):
    shutil.rmtree(copy / "notebooks/puzzles", ignore_errors=True)
    assert teaching.puzzle_list(copy) == "- *not yet*"
    (copy / "notebooks/puzzles").mkdir()
    text = "# Puzzles 01 · The indexer", "## One\n\n*Easy, 10 minutes.* Why", "## Two\n\n*Hard, 25 minutes.* How"
    check = {"cell_type": "code", "source": 'check("one", one)'}
    cells = [cell for source in text for cell in ({"cell_type": "markdown", "source": source}, check)]
    (copy / "notebooks/puzzles/01_indexer.ipynb").write_text(json.dumps({"cells": cells}))
    link = "[Puzzles 01 · The indexer](../notebooks/puzzles/01_indexer.ipynb), 2 puzzles, 35 minutes"
    assert teaching.puzzle_list(copy) == f"- {link}"
    assert f"- To go on: {link}" in teaching.syllabus(copy, "week")


@pytest.mark.parametrize(
    ("old", "new", "error"),
    [
        ('[["why", 8]', '[["why", 9]', ValueError),
        ("1-which-tokens#by-hand", "1-which-tokens#by-foot", LookupError),
        ("theory/complexity.md#two-counts", "theory/complexity.md#three-counts", LookupError),
        ('["pipeline", 7]', '["pipe", 7]', LookupError),
    ],
)
def test_a_wrong_syllabus_is_refused(old: str, new: str, error: type[Exception], copy: Path):
    edit(copy / teaching.SYLLABI, old, new)
    with pytest.raises(error):
        teaching.syllabus(copy, "one")


# ---- slides ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("deck", DECKS)
def test_a_slide_is_a_title_a_sentence_and_what_other_pages_say(deck: str):
    text = (DOCS / slides.FOLDER / deck).read_text(encoding="utf-8")
    opening, *parts = re.split(r"(?m)^(?=## )", text)
    assert re.match(r"# Lecture \d: .+\n", opening)
    assert len(parts) >= 10
    for part in parts:
        title, _, body = part.partition("\n")
        own = slides.REFERENCE.sub("", body).strip()
        assert slides.REFERENCE.search(body), f"{title} shows nothing of the site"
        assert "{{" not in own, title
        assert len(own.split()) <= 30, f"{title}: more than a sentence or two of its own"
        assert not re.search(r"\d", own), f"{title}: a figure is typed"


def test_decks_are_as_many_as_the_lectures_of_the_course():
    assert len(DECKS) == len(COURSES["three"])
    for deck, session in zip(DECKS, COURSES["three"], strict=True):
        assert (DOCS / slides.FOLDER / deck).read_text(encoding="utf-8").startswith(f"# {session['title']}\n")


PAGE = """# A page: of some kind

## First part

Some words, [a link](other.md#there) and [one](#second).

$$
x = 1

\\tag{1}
$$

- one

    continued

- two

??? question "Why?"
    Because.

    $$ y $$

??? example "Do it"
    ```python
    assert True
    ```

## Second

```python
# no heading

1
```

| a |
|---|

{{ default d }}
"""


def made_up(root: Path) -> Path:
    (root / "docs/learn").mkdir(parents=True)
    (root / "docs/learn/page.md").write_text(PAGE)
    (root / "gsa_ref").mkdir()
    (root / "gsa_ref/config.py").write_text("class GSAConfig:\n    d: int = 7\n")
    return root


def test_blocks_stay_whole(tmp_path: Path):
    first, second = excerpts.sections(made_up(tmp_path), "learn/page.md")[1:]
    kinds = [excerpts.kind_of(block) for block in excerpts.blocks(first.text)]
    assert kinds == ["paragraph", "formula", "list", "list", "question", "exercise"]
    assert excerpts.blocks(first.text)[1] == "$$\nx = 1\n\n\\tag{1}\n$$"
    assert excerpts.blocks(first.text)[4] == '??? question "Why?"\n    Because.\n\n    $$ y $$'
    assert [excerpts.kind_of(block) for block in excerpts.blocks(second.text)] == ["code", "table", "record"]
    assert (first.of, first.title, first.slug) == ("A page", "First part", "first-part")


def test_an_excerpt_is_the_block_of_the_page_with_links_from_the_deck(tmp_path: Path):
    root, deck = made_up(tmp_path), "teach/slides/1-x.md"
    text, link = slides.excerpt(root, deck, "learn/page.md", "first-part", "paragraph")
    assert text == ("Some words, [a link](../../learn/other.md#there) and [one](../../learn/page.md#second).")
    assert link == "[A page: First part](../../learn/page.md#first-part)"
    assert slides.excerpt(root, deck, "learn/page.md", "first-part", "list", 2)[0].startswith("- two")
    assert slides.excerpt(root, deck, "learn/page.md", "second", "record")[0] == "7"
    filled = slides.fill(root, deck, "# D\n\n## S\n\n{{ from learn/page.md#first-part formula }}\n\n## T\n")
    assert "## S\n\n$$\nx = 1\n\n\\tag{1}\n$$\n\n[A page: First part]" in filled
    assert "{: .source }\n\n## T" in filled


def test_a_frame_is_a_picture_that_stands_still():
    deck, section = "teach/slides/2-x.md", ("learn/attention.md", "the-online-softmax")
    text, link = slides.excerpt(ROOT, deck, *section, "frame", 3)
    assert re.fullmatch(
        r"!\[Frame 3 of 4: .+?\]\(\.\./\.\./figures/attention_online_3\.light\.svg#only-light\)!.+", text
    )
    assert "the-online-softmax" in link
    with pytest.raises(LookupError, match="has 4 of frame, not 5"):
        slides.excerpt(ROOT, deck, *section, "frame", 5)


@pytest.mark.parametrize(
    "reference",
    [
        "learn/page.md#third formula",
        "learn/nowhere.md#second formula",
        "learn/page.md#second formula",
        "learn/page.md#first-part formula 2",
        "learn/page.md#first-part formula 0",
        "learn/page.md#first-part drawing",
    ],
)
def test_a_reference_that_leads_nowhere_is_reported(reference: str, tmp_path: Path, caplog: pytest.LogCaptureFixture):
    line = f"{{{{ from {reference} }}}}"
    with caplog.at_level(logging.WARNING, logger="mkdocs"):
        filled = slides.fill(made_up(tmp_path), "teach/slides/1-x.md", f"# D\n\n## S\n\n{line}\n")
    assert line in filled
    assert [record.message.split(": ")[:2] for record in caplog.records] == [["teach/slides/1-x.md", line]]


def deck_page(site: Path, deck: str) -> str:
    return (site / slides.FOLDER / deck.removesuffix(".md") / "index.html").read_text(encoding="utf-8")


@pytest.mark.parametrize("deck", DECKS)
def test_a_deck_is_a_page_of_linked_sections(deck: str, site: Path):
    html = deck_page(site, deck)
    names = [s.slug for s in excerpts.sections(ROOT, f"{slides.FOLDER}/{deck}")]
    parts = re.findall(r"<section .*?</section>", html, re.DOTALL)
    assert re.findall(r'<section id="([^"]+)"', html) == names
    for n, (part, name) in enumerate(zip(parts, names, strict=True)):
        assert f'aria-labelledby="{name}-title"' in part
        assert re.search(rf'<h[12] id="{name}-title">', part)
        assert len(re.findall(r"<h[1-6]\b", part)) == 1
        assert f"<span>{n + 1} of {len(names)}</span>" in part
        assert re.findall(r'href="#([^"]+)" rel="prev"', part) == names[n - 1 : n]
        assert re.findall(r'href="#([^"]+)" rel="next"', part) == names[n + 1 : n + 2]
        assert n == 0 or '<p class="source">' in part
        assert part.count("<table>") == part.count('<div class="wide" tabindex="0" role="region"')
    assert "{{" not in html
    assert re.findall(r'<a href="#([^"]+)">', parts[0]) == names[1:]


@pytest.mark.parametrize("deck", DECKS)
def test_a_deck_needs_no_script_but_for_its_formulas(deck: str, site: Path):
    html = deck_page(site, deck)
    assert re.match(r'<!doctype html>\s*<html lang="en">', html)
    assert 'name="viewport"' in html
    scripts = re.findall(r"<script\b[^>]*>", html)
    assert len(scripts) == html.count("</script>") == 2
    assert all("assets/mathjax" in script for script in scripts)
    assert not re.search(r"\son\w+=", html)
    assert "<details open" not in html
    style = (site / "assets/slides.css").read_text(encoding="utf-8")
    for needed in (
        "scroll-snap-type",
        "@media print",
        "prefers-color-scheme: dark",
        "break-after: page",
        ":focus-visible",
    ):
        assert needed in style


def test_the_template_and_the_sources_are_not_published(site: Path):
    assert not (site / slides.FOLDER / slides.TEMPLATE).exists()
    assert list((site / "teach").rglob("*.toml")) == []
    index = json.loads((site / "search/search_index.json").read_text(encoding="utf-8"))
    assert [entry["location"] for entry in index["docs"] if slides.FOLDER in entry["location"]] == []


# ---- glossary --------------------------------------------------------------------------------------------------------

ENTRY = re.compile(r"^\*\*(.+?)\*\*(?:, (.+?))? \{ #([\w-]+) \}\n:   (.+?)(?=\n\n|\n?\Z)", re.MULTILINE | re.DOTALL)


def glossary() -> list[tuple[str, str, str, str]]:
    """(term, symbols, anchor, text) of every entry."""
    return ENTRY.findall((DOCS / "glossary.md").read_text(encoding="utf-8"))


def plain(symbol: str) -> str:
    r"""A symbol without markup: `$H_{kv}$` and H_kv are the same, and so are `$\bar V$` and V̄."""
    symbol = re.sub(r"\\(?:text|mathrm)\{(\w+)\}", r"\1", symbol.strip("`$ ").replace("V̄", r"\bar V"))
    return re.sub(r"[{} \\]", "", symbol)


def symbols_of(text: str) -> set[str]:
    """The symbols in the first column of the tables that have one; a definition counts up to its equals sign."""
    found = set()
    for table in re.findall(r"(?m)^\| symbol \|.*\n\|[-|]+\|\n((?:\|.*\n?)+)", text):
        for row in table.splitlines():
            cell = row.split(" | ")[0].removeprefix("| ")
            parts = re.findall(r"\$[^$]+\$", cell) or ([cell] if "[" in cell else cell.split(", "))
            found |= {plain(part.split("=")[0]) for part in parts}
    return found


def test_glossary_is_alphabetical_with_unique_anchors():
    entries = glossary()
    text = (DOCS / "glossary.md").read_text(encoding="utf-8")
    assert len(entries) == len(re.findall(r"(?m)^:   ", text)) >= 50
    terms = [term.casefold() for term, *_ in entries]
    assert terms == sorted(terms)
    anchors = [anchor for *_, anchor, _ in entries]
    assert len(set(anchors)) == len(anchors)
    assert re.findall(r"(?m)^## (.)$", text) == sorted({term[0].upper() for term in terms})


def test_a_glossary_entry_is_a_sentence_or_two_and_a_link():
    for term, _, _, text in glossary():
        said, link = re.fullmatch(r"(.+?)\s\[[^\]]+\]\(([^)]+)\)", text, re.DOTALL).groups()
        assert said.rstrip().endswith("."), term
        assert len(re.findall(r"[.:](?= [A-Z]|$)", " ".join(said.split()))) <= 3, term
        assert len(said.split()) <= 45, term
        assert (ROOT / link.split("#")[0] if link.startswith("notebooks") else DOCS / link.split("#")[0]).is_file(), (
            term
        )


def test_glossary_has_the_terms_of_the_field():
    terms = {term for term, *_ in glossary()}
    assert terms >= {
        *("attention sink", "budget", "captured mass", "certificate", "gather", "grouped-query attention", "indexer"),
        *("KV cache", "linearity", "online softmax", "output gate", "rank", "recall", "roofline", "selection"),
        *("temperature", "tie contract", "union tile", "value gate"),
    }


def test_glossary_has_every_symbol_of_the_equations():
    entered = {plain(s) for _, symbols, *_ in glossary() for s in re.findall(r"\$[^$]+\$|`[^`]+`|[^\s,$`]+", symbols)}
    oracle = symbols_of(importlib.import_module("gsa_ref.equations").__doc__ or "")
    assert len(oracle) >= 12
    learn = {s for stem in thread.STEMS for s in symbols_of((DOCS / f"learn/{stem}.md").read_text(encoding="utf-8"))}
    assert len(learn) >= 20
    assert (oracle | learn) - entered == set()


def test_symbols_are_found_in_tables():
    text = "| symbol | meaning |\n|---|---|\n| H, d_h | x |\n| $q^I = hW$ | y |\n| $I[t,s]$, $\\bar V$ | z |\n"
    assert symbols_of(text) == {"H", "d_h", "q^I", "I[t,s]", "barV"}
    assert plain("$k_{\\text{base}}$") == "k_base"


# ---- the first page --------------------------------------------------------------------------------------------------


def test_the_citation_is_that_of_the_file(copy: Path):
    cff = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    shown = teaching.citation(ROOT)
    paper = cff["references"][0]
    arxiv = paper["identifiers"][0]["value"].removeprefix("arXiv:")
    for value in (cff["title"], cff["version"], cff["license"], paper["title"], str(paper["year"]), arxiv):
        assert f"{{{value}}}" in shown or f"Licence: {value}" in shown
    assert "{Shen and Shen}" in shown
    edit(copy / "CITATION.cff", "version: 0.1.0", "version: 7.8.9")
    assert "{7.8.9}" in teaching.citation(copy)


def test_first_page_leads_to_everything(site: Path):
    text = (DOCS / "teach/index.md").read_text(encoding="utf-8")
    for name in ("syllabi.md", "notes.md", "exam.md", "grading.md", "../glossary.md", *(f"slides/{d}" for d in DECKS)):
        assert f"]({name})" in text
    assert "Apache" in (site / "teach/index.html").read_text(encoding="utf-8")


def test_instructor_notes_have_a_question_and_an_experiment_for_each_misconception():
    parts = re.split(r"(?m)^(?=## )", (DOCS / "teach/notes.md").read_text(encoding="utf-8"))[1:]
    titles = [part.split("\n")[0].removeprefix("## ").lower() for part in parts]
    assert titles[: len(thread.STEMS)] == list(thread.STEMS)
    for part in parts:
        assert part.startswith("## Verification") or "*Where time goes:*" in part
        misconceptions = re.split(r"(?m)^(?=### )", part)[1:]
        assert misconceptions
        for one in misconceptions:
            assert re.match(r"### “.+”\n", one)
            assert one.count("**Ask:**") == 1
            assert one.count('??? example "Settle it"') == one.count("```python") == 1
