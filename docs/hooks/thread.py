"""The thread of each stem: equation → oracle → PyTorch → kernel → tests → notebook → page, found in the files.

An object of gsa_ref belongs to an equation if its docstring carries the equation's tag ("Eq. 7") and it lives in the
stem's file. In gsa_fast the names are the same as in gsa_ref, so the name decides; the kernels of the
stem's file belong too.
The functions above the line are plain functions of the repository's root, so that the tests can call them; mkdocs calls
the `on_*` functions below it.
"""

import ast
import json
import logging
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import register  # mkdocs loads a hook with its folder on the path
from claims import claims_list, claims_verdicts
from learning import DIRECTIVES as LEARNING
from puzzles import DIRECTIVES as PUZZLES
from records import DIRECTIVES as RECORDS
from speed import DIRECTIVES as SPEED
from speed import table
from studies import DIRECTIVES as STUDIES
from teaching import DIRECTIVES as TEACHING

log = logging.getLogger("mkdocs.hooks.thread")

STEMS = ("indexer", "budget", "selection", "attention", "gates", "layer")
NOT_YET = "*not yet*"
MOST_KERNELS = 4  # that a strip names


@dataclass(frozen=True)
class Entry:
    """One row of the equation index. `tag` is what docstrings and pages write."""

    tag: str
    stem: str
    title: str
    optional: bool = False  # the row appears once gsa_ref has the stem
    notebook: str = ""  # the stem of its notebook, where that is another one

    @property
    def pattern(self) -> re.Pattern[str]:
        return re.compile(re.escape(self.tag) + r"(?!\d)")


ENTRIES = (
    Entry("Eq. 6", "layer", "the pipeline"),
    Entry("Eq. 7", "indexer", "gated lightning indexer"),
    Entry("Eq. 8", "budget", "adaptive sparsity controller"),
    Entry("S_t:", "selection", "top-k selection"),
    Entry("Sparse SDPA", "attention", "attention over the selected tokens"),
    Entry("Eq. 9", "gates", "value gate G2"),
    Entry("Eq. 10", "gates", "output gate G1"),
    Entry("Eq. 15", "training", "loss of the indexer in the sparse phase", optional=True, notebook="convergence"),
)
NUMBERED = re.compile(r"\bEq\. (\d+)")
# What a page calls an entry whose tag is not a number.
LABELS = {"S_t:": "Selection"}


@dataclass(frozen=True)
class Tagged:
    """A documented object: where it is, and its docstring."""

    path: str  # relative to the root, with slashes
    name: str  # qualified name inside the file, "" for the module itself
    first: int
    last: int
    docstring: str
    is_kernel: bool = False  # compiled by Triton

    @property
    def is_launched(self) -> bool:
        """A kernel that the host launches, not one of its helpers; the name says which."""
        return self.is_kernel and self.name.endswith("_kernel")

    @property
    def module(self) -> str:
        return self.path.removesuffix(".py").removesuffix("/__init__").replace("/", ".")

    @property
    def dotted(self) -> str:
        return f"{self.module}.{self.name}" if self.name else self.module

    @property
    def is_public(self) -> bool:
        return not any(part.startswith("_") for part in self.dotted.split("."))


def objects(root: Path, path: Path) -> Iterator[Tagged]:
    """The module, its classes, functions and methods, with the lines they occupy (decorators included)."""
    relative = path.relative_to(root).as_posix()
    tree = ast.parse(path.read_text(encoding="utf-8"))
    yield Tagged(relative, "", 1, 0, ast.get_docstring(tree) or "")

    def walk(node: ast.AST, prefix: str) -> Iterator[Tagged]:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
                first = min([child.lineno, *(d.lineno for d in child.decorator_list)])
                decorators = " ".join(ast.unparse(d) for d in child.decorator_list)
                is_kernel = "triton.jit" in decorators or "gluon.jit" in decorators
                doc = ast.get_docstring(child) or ""
                yield Tagged(relative, prefix + child.name, first, child.end_lineno or first, doc, is_kernel)
                if isinstance(child, ast.ClassDef):
                    yield from walk(child, prefix + child.name + ".")

    yield from walk(tree, "")


@cache
def all_objects(root: Path) -> list[Tagged]:
    """Every documented object of the two packages and the tests."""
    files = [p for folder in ("gsa_ref", "gsa_fast", "tests") for p in sorted((root / folder).rglob("*.py"))]
    return [o for path in files for o in objects(root, path)]


def stem_files(root: Path, package: str, stem: str) -> list[str]:
    """The files of a stem in a package: `<stem>.py`, or all of the folder `<stem>/` that it grew into."""
    single, folder = root / package / f"{stem}.py", root / package / stem
    found = [single] if single.is_file() else sorted(folder.rglob("*.py"))
    return [p.relative_to(root).as_posix() for p in found]


def tests_of(root: Path, stem: str) -> list[str]:
    """The test files of a stem, reference first."""
    return [f for folder in ("tests/ref", "tests/fast") for f in stem_files(root, folder, f"test_{stem}")]


def notebook_of(root: Path, stem: str) -> str | None:
    """The notebook of a stem, `notebooks/NN_<stem>.ipynb`."""
    found = sorted((root / "notebooks").glob(f"[0-9][0-9]_{stem}.ipynb"))
    return found[0].relative_to(root).as_posix() if found else None


def puzzles_of(root: Path, stem: str) -> str | None:
    """The notebook of a stem's puzzles, `notebooks/puzzles/NN_<stem>.ipynb`."""
    found = sorted((root / "notebooks/puzzles").glob(f"[0-9][0-9]_{stem}.ipynb"))
    return found[0].relative_to(root).as_posix() if found else None


def page_of(root: Path, stem: str) -> str | None:
    """The Learn page of a stem, relative to docs/."""
    return f"learn/{stem}.md" if (root / "docs/learn" / f"{stem}.md").is_file() else None


def prose(root: Path) -> Iterator[tuple[str, str]]:
    """(path, text) of every page and of the text cells of every notebook."""
    for path in sorted((root / "docs").rglob("*.md")):
        yield path.relative_to(root).as_posix(), path.read_text(encoding="utf-8")
    for path in sorted((root / "notebooks").rglob("*.ipynb")):
        if ".ipynb_checkpoints" in path.parts:
            continue
        cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
        text = "\n\n".join("".join(c["source"]) for c in cells if c["cell_type"] == "markdown")
        yield path.relative_to(root).as_posix(), text


def entries(root: Path) -> list[Entry]:
    """The rows of the index."""
    return [e for e in ENTRIES if not e.optional or stem_files(root, "gsa_ref", e.stem)]


def problems(root: Path) -> list[str]:
    """What keeps a thread from resolving: an unknown equation number, or a file of a stem to which nothing belongs."""
    known = {e.tag for e in ENTRIES}
    found = []
    everything = all_objects(root)
    texts = [(f"{o.path}:{o.first}", o.docstring) for o in everything] + list(prose(root))
    for where, text in texts:
        found += [f"{where}: {tag} is not in the equation index" for tag in sorted(_tags(text) - known)]
    for entry in entries(root):
        t = thread(root, entry)
        for package, members in (("gsa_ref/equations", t.oracle), ("gsa_ref", t.pytorch)):
            for path in stem_files(root, package, entry.stem)[:1] if not members else []:
                found.append(f"{path}: no docstring carries the tag “{entry.tag}”")
        missing = {o.name for o in t.pytorch if "." not in o.name} - {o.name for o in t.kernel}
        if t.kernel and len(missing) == len(t.pytorch):
            found.append(f"{t.kernel[0].path}: none of {sorted(missing)} is here, as it is in gsa_ref")
    return found


def _tags(text: str) -> set[str]:
    return {f"Eq. {n}" for n in NUMBERED.findall(text)}


@dataclass(frozen=True)
class Thread:
    """What belongs to one entry."""

    entry: Entry
    oracle: list[Tagged]
    pytorch: list[Tagged]
    kernel: list[Tagged]
    tests: list[str]
    notebook: str | None
    page: str | None
    also: list[Tagged]  # tagged and public, but at home in another stem


def thread(root: Path, entry: Entry) -> Thread:
    """Collect what belongs to one entry."""
    everything = all_objects(root)
    tagged = [o for o in everything if o.name and entry.pattern.search(o.docstring)]
    oracle_files, pytorch_files, fast_files = (
        stem_files(root, p, entry.stem) for p in ("gsa_ref/equations", "gsa_ref", "gsa_fast")
    )
    oracle = [o for o in tagged if o.path in oracle_files]
    pytorch = [o for o in tagged if o.path in pytorch_files]
    names = {o.name for o in pytorch}
    kernel = [o for o in everything if o.path in fast_files and (o.is_launched or o.name in names)]
    listed = [*oracle, *pytorch, *kernel]
    return Thread(
        entry,
        oracle,
        pytorch,
        kernel,
        tests=tests_of(root, entry.stem),
        notebook=notebook_of(root, entry.notebook or entry.stem),
        page=page_of(root, entry.stem),
        also=[o for o in tagged if o not in listed and o.is_public],
    )


API = re.compile(r"^(?:\{\{ api |::: )([\w.]+)", re.MULTILINE)


@cache
def modules_of_reference(root: Path) -> set[str]:
    """The modules that have an entry in the reference."""
    return {m for p in sorted((root / "docs").rglob("*.md")) for m in API.findall(p.read_text(encoding="utf-8"))}


class Links:
    """Markdown links from one page (a path relative to docs/) to the members of a thread."""

    def __init__(self, root: Path, page: str) -> None:
        self.up = "../" * page.count("/")
        self.modules = modules_of_reference(root)

    def code(self, objects: list[Tagged]) -> str:
        """Links to the entries in the reference; an object that has none is named with its file."""
        return ", ".join(self._object(o) for o in objects) or NOT_YET

    def kernel(self, objects: list[Tagged]) -> str:
        """Like `code`; a stem whose functions only call other stems' kernels says so."""
        own = any(o.is_launched for o in objects) or not objects
        return self.code(objects) + ("" if own else " (no kernel of its own)")

    def kernel_in_brief(self, objects: list[Tagged]) -> str:
        """Like `kernel`, but many kernels are counted; the equation index names them."""
        launched = [o for o in objects if o.is_launched]
        if len(launched) <= MOST_KERNELS:
            return self.kernel(objects)
        public = [o for o in objects if not o.is_launched]
        return f"{self.code(public)} and [{len(launched)} kernels]({self.up}equations.md)"

    def _object(self, o: Tagged) -> str:
        if o.is_public and o.module in self.modules:
            return f"[`{o.name}`][{o.dotted}]"
        return f"`{o.path}::{o.name}`"

    def tests(self, files: list[str]) -> str:
        return ", ".join(f"`{f}`" for f in files) or NOT_YET

    def file(self, path: str | None, label: str) -> str:
        return f"[{label}]({self.up}{path})" if path else NOT_YET


def strip(root: Path, page: str, stem: str) -> str:
    """The line that opens a Learn page: Eq. n · oracle · PyTorch · kernel · tests · notebook · puzzles · API."""
    links = Links(root, page)
    threads = [thread(root, e) for e in entries(root) if e.stem == stem]
    label = ", ".join(LABELS.get(t.entry.tag, t.entry.tag) for t in threads)

    def merged(part: Callable[[Thread], list[Tagged]]) -> list[Tagged]:
        return list(dict.fromkeys(o for t in threads for o in part(t)))

    parts = [
        f"[{label}]({links.up}equations.md)",
        f"oracle {links.code(merged(lambda t: t.oracle))}",
        f"PyTorch {links.code(merged(lambda t: t.pytorch))}",
        f"kernel {links.kernel_in_brief(merged(lambda t: t.kernel))}",
        f"tests {links.tests(threads[0].tests)}",
        links.file(threads[0].notebook, "notebook") if threads[0].notebook else f"notebook {NOT_YET}",
        *([links.file(f"learn/puzzles.md#{stem}", "puzzles")] if puzzles_of(root, stem) else []),
        links.file(f"reference/{stem}.md", "API"),
    ]
    return '<div class="thread" markdown>\n' + " · ".join(parts) + "\n</div>"


def equation_index(root: Path, page: str = "equations.md") -> str:
    """One section per entry, with a line per member of its thread."""
    links = Links(root, page)
    lines = []
    for entry in entries(root):
        t = thread(root, entry)
        label = LABELS.get(entry.tag, entry.tag)
        lines += [
            f"## {label}: {entry.title}" if entry.tag != "Sparse SDPA" else f"## {label}",
            "",
            "| part | where |",
            "|---|---|",
            f"| oracle | {links.code(t.oracle)} |",
            f"| PyTorch | {links.code(t.pytorch)} |",
            f"| kernel | {links.kernel(t.kernel)} |",
            f"| tests | {links.tests(t.tests)} |",
            f"| notebook | {links.file(t.notebook, (t.notebook or '').removeprefix('notebooks/'))} |",
            f"| page | {links.file(t.page, f'Learn: {entry.stem}')} |",
        ]
        if t.also:
            lines.append(f"| also | {', '.join(links._object(o) for o in t.also)} |")
        lines.append("")
    return "\n".join(lines)


# ---- inclusion of code: the files are the only place where code is written -------------------------------------------


def listing(root: Path, o: Tagged) -> str:
    """A fenced block that includes an object's lines from its file."""
    return f'```python title="{o.path}"\n--8<-- "{o.path}:{o.first}:{o.last}"\n```'


def source(root: Path, dotted: str) -> str:
    """`{{ source gsa_ref.indexer.indexer_scores }}`: the listing of one object."""
    for o in all_objects(root):
        if o.name and o.dotted == dotted:
            return listing(root, o)
    raise LookupError(f"no object {dotted}")


def kernels(root: Path, stem: str) -> str:
    """`{{ kernels indexer }}`: the listings of the stem's Triton kernels, helpers included."""
    files = stem_files(root, "gsa_fast", stem)
    found = [o for o in all_objects(root) if o.path in files and o.is_kernel]
    return "\n\n".join(listing(root, o) for o in found) or f"Not yet: `gsa_fast` has no kernel for `{stem}`."


def api(root: Path, module: str) -> str:
    """`{{ api gsa_fast.indexer }}`: the reference of a module, if it exists."""
    path = root / module.replace(".", "/")
    if path.with_suffix(".py").is_file() or (path / "__init__.py").is_file():
        return f"::: {module}"
    return f"Not yet: there is no `{module}`."


@cache
def _defaults(path: Path) -> dict[str, Any]:
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ClassDef) and node.name == "GSAConfig":
            fields = [n for n in node.body if isinstance(n, ast.AnnAssign) and n.value is not None]
            return {ast.unparse(n.target): ast.literal_eval(n.value) for n in fields if n.value is not None}
    raise LookupError("no GSAConfig")


def default(root: Path, field: str) -> str:
    """`{{ default k_base }}`: the default of a field of GSAConfig."""
    return str(_defaults(root / "gsa_ref/config.py")[field])


def _fact(root: Path, stem: str, name: str) -> Any:
    return json.loads((root / "docs/figures" / f"{stem}.json").read_text(encoding="utf-8"))[name]


def fact(root: Path, stem: str, name: str) -> str:
    """`{{ fact indexer overlap }}`: a figure that docs/figures/<stem>.py computed and stored beside its pictures."""
    return str(_fact(root, stem, name))


def fact_table(root: Path, stem: str, name: str) -> str:
    """`{{ fact_table complexity ablation }}`: a table that such a script stored: header, rows, text columns (left)."""
    found = _fact(root, stem, name)
    return table(found["header"], found["rows"], left=found.get("left", 1))


def frames(root: Path, stem: str, name: str) -> str:
    """`{{ frames attention online }}`: pictures <stem>_<name>_1, 2, … that such a script stored, and told in its facts.

    They follow one another by themselves, or stand still at the one that a reader chooses, without a script; below,
    folded, all of them.
    """
    found, group = _fact(root, stem, name), f"{stem}-{name}"
    pictures = [
        "".join(f"![{told}](../figures/{stem}_{name}_{n}.{s}.svg#only-{s})" for s in ("light", "dark"))
        for n, told in enumerate(found["frames"], 1)
    ]
    choices = "".join(
        f'<input type="radio" name="{group}" id="{group}-{n}"{"" if n else " checked"}>'
        f'<label for="{group}-{n}">{n or "Play"}</label>'
        for n in range(len(pictures) + 1)
    )
    strip = f'<span class="window"><span class="strip">{"".join(pictures)}</span></span>'
    style = f"--frames: {len(pictures)}"
    return "\n".join(
        [
            f'<div class="frames" role="group" aria-label="{found["title"]}" style="{style}" markdown="span">',
            f"{choices}{strip}",
            "</div>\n",
            f'??? note "{found["title"]}: all frames"',
            *(f"    {n}. {picture}" for n, picture in enumerate(pictures, 1)),
        ]
    )


DIRECTIVES: dict[str, Callable[..., str]] = {
    "source": source,
    "kernels": kernels,
    "api": api,
    "default": default,
    "fact": fact,
    "fact_table": fact_table,
    "frames": frames,
    "equation_index": equation_index,
    "claims_verdicts": claims_verdicts,
    "claims_list": lambda root: expand(root, claims_list(root), "claims.md"),
    **RECORDS,
    **SPEED,
    **STUDIES,
    **LEARNING,
    **PUZZLES,
    **TEACHING,
    **register.DIRECTIVES,
}
DIRECTIVE = re.compile(r"\{\{ (\w+)((?: [\w./-]+)*) \}\}")


def expand(root: Path, text: str, page: str) -> str:
    """Replace the directives `{{ name argument … }}` of a page; a wrong one is reported, and stays."""

    def replace(match: re.Match[str]) -> str:
        try:
            return DIRECTIVES[match[1]](root, *match[2].split())
        except (LookupError, OSError, TypeError, ValueError) as error:
            log.warning("%s: %s: %s: %s", page, match[0], type(error).__name__, error)
            return match[0]

    return DIRECTIVE.sub(replace, text)


# ---- called by mkdocs ------------------------------------------------------------------------------------------------


def on_config(config: Any) -> Any:
    """Put the Learn pages that exist behind the first entry of the nav, in the order of the stems; then the puzzles."""
    root = Path(config.config_file_path).parent
    pages = [{s.capitalize(): p} for s in STEMS if (p := page_of(root, s))]
    config.nav.insert(1, {"Learn": [*pages, {"Puzzles": "learn/puzzles.md"}]})
    return config


def on_pre_build(config: Any) -> None:
    """Report what does not resolve; a strict build fails on it."""
    all_objects.cache_clear()  # `mkdocs serve` builds many times
    modules_of_reference.cache_clear()
    _defaults.cache_clear()
    register.read.cache_clear()
    root = Path(config.config_file_path).parent
    for problem in [*problems(root), *register.problems(root)]:
        log.warning(problem)


def on_page_markdown(markdown: str, page: Any, config: Any, files: Any) -> str:
    """Open Learn pages with their strip, and expand the directives of every page."""
    root = Path(config.config_file_path).parent
    path = page.file.src_uri
    folder, _, name = path.rpartition("/")
    if folder == "learn" and name.removesuffix(".md") in STEMS:
        heading, _, rest = markdown.partition("\n")
        markdown = f"{heading}\n\n{strip(root, path, name.removesuffix('.md'))}\n{rest}"
    return expand(root, markdown, path)
