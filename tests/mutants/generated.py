"""Faults drawn from the syntax trees of the `@triton.jit` functions.

The Gluon kernels (`*_hopper.py`) have no interpreter and are left out, as are the kernels of the benchmarks, and what
an interpreted kernel never runs: the branches for compiled code of `if INTERPRETED`.
"""

import ast
import hashlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import ClassVar

SEED = 0
PER_KERNEL, PER_HELPER = 2, 1

COMPARISONS = {ast.Lt: "<=", ast.LtE: "<", ast.Gt: ">=", ast.GtE: ">", ast.Eq: ">=", ast.NotEq: "=="}
ARITHMETIC = {
    ast.Add: ("+", "-"), ast.Sub: ("-", "+"), ast.Mult: ("*", "+"), ast.Div: ("/", "*"), ast.FloorDiv: ("//", "*"),
    ast.Mod: ("%", "//"), ast.LShift: ("<<", ">>"), ast.RShift: (">>", "<<"),
}  # fmt: skip
LOGIC = {ast.BitAnd: ("&", "|"), ast.BitOr: ("|", "&")}
EXTREMES = {"minimum": "maximum", "maximum": "minimum", "min": "max", "max": "min"}
SHAPED = {"arange", "zeros", "full", "reshape", "permute"}  # of whose constants any other is refused

# The stems whose checks run a file's kernels, those that cost least first. Helpers of other files: who uses them.
STEMS = {
    "indexer.py": ("indexer", "indexed_selection"),
    "budget.py": ("budget", "indexed_selection"),
    "gates.py": ("gates", "attention_backward"),
    "selection/rows.py": ("selection", "indexed_selection"),
    "selection/scores.py": ("indexed_selection",),
    "selection/shortlist.py": ("indexed_selection",),
    "selection/threshold.py": ("indexed_selection",),
    "selection/pick.py": ("indexed_selection",),
    "attention/gather.py": ("attention",),
    "attention/masked.py": ("attention",),
    "attention/bits.py": ("attention", "attention_backward"),
    "attention/union.py": ("attention", "attention_backward"),
    "attention/union_backward.py": ("attention_backward",),
    "attention/partial_sums.py": ("attention_backward",),
    "decode/scores.py": ("decode",),
    "decode/select.py": ("decode",),
    "decode/attend.py": ("decode",),
    "training/tiles.py": ("training",),
    "training/teacher.py": ("training",),
    "training/student.py": ("training",),
    "training/chain.py": ("training",),
}
COST = (
    "gates", "indexer", "budget", "selection", "training", "decode", "attention_backward", "attention",
    "indexed_selection",
)  # fmt: skip


@dataclass(frozen=True)
class Generated:
    """Bytes `begin` to `end` of gsa_fast/<file> become `text`. What identifies it is all but the numbers."""

    file: str
    kernel: str
    operator: str
    before: str
    after: str
    occurrence: int  # among faults of a function with the same lines before and after
    line: int = field(compare=False)
    begin: int = field(compare=False)
    end: int = field(compare=False)
    text: str = field(compare=False)
    stems: tuple[str, ...] = field(compare=False)
    test: ClassVar[str] = ""

    @property
    def key(self) -> tuple[str, str, str, str, str, int]:
        return self.file, self.kernel, self.operator, self.before, self.after, self.occurrence

    @property
    def name(self) -> str:
        return f"{self.kernel}: {self.after}"

    def apply(self, package: Path) -> None:
        path = package / self.file
        source = path.read_bytes()
        path.write_bytes(source[: self.begin] + self.text.encode() + source[self.end :])


class Source:
    """A file of gsa_fast and where the nodes of its tree lie in it."""

    def __init__(self, package: Path, file: str) -> None:
        self.file = file
        self.bytes = (package / file).read_bytes()
        self.tree = ast.parse(self.bytes)

    @cached_property
    def offsets(self) -> list[int]:
        found = [0]
        for line in self.bytes.splitlines(keepends=True):
            found.append(found[-1] + len(line))
        return found

    def span(self, node: ast.AST) -> tuple[int, int]:
        return (
            self.offsets[node.lineno - 1] + node.col_offset,  # type: ignore[attr-defined]
            self.offsets[node.end_lineno - 1] + node.end_col_offset,  # type: ignore[attr-defined]
        )

    def text(self, node: ast.AST) -> str:
        begin, end = self.span(node)
        return self.bytes[begin:end].decode()

    def functions(self) -> Iterator[ast.FunctionDef]:
        """The functions that `@triton.jit` decorates."""
        for node in self.tree.body:
            if isinstance(node, ast.FunctionDef) and any(self.text(d) == "triton.jit" for d in node.decorator_list):
                yield node


def interpreted(node: ast.AST) -> Iterator[ast.AST]:
    """The nodes below that an interpreted kernel reaches, in their order, without docstrings and type annotations."""
    for name, value in ast.iter_fields(node):
        if name in ("decorator_list", "annotation"):
            continue
        if isinstance(node, ast.If) and getattr(node.test, "id", "") == "INTERPRETED" and name != "body":
            continue
        for child in value if isinstance(value, list) else [value]:
            if isinstance(child, ast.Expr) and isinstance(child.value, ast.Constant):
                continue
            if isinstance(child, ast.AST):
                yield child
                yield from interpreted(child)


def called(node: ast.AST) -> str:
    """The name of what a call calls, without its module; "" for other nodes."""
    if not isinstance(node, ast.Call):
        return ""
    return node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")


def changes(source: Source, function: ast.FunctionDef) -> Iterator[tuple[str, int, int, str]]:
    """(operator, begin, end, text) of every fault that the operators make of a function."""
    nodes = list(interpreted(function))
    fixed = {
        id(x)
        for node in nodes
        if called(node) in SHAPED
        for argument in [*node.args, *(k.value for k in node.keywords)]  # type: ignore[attr-defined]
        for x in ast.walk(argument)
    }
    fixed |= {
        id(k.value) for node in nodes if isinstance(node, ast.Call) for k in node.keywords if k.arg in ("axis", "other")
    }
    fixed |= {id(x) for node in nodes if isinstance(node, ast.Subscript) for x in ast.walk(node.slice)}
    assigned = {a.arg for a in function.args.args}

    def between(left: ast.AST, right: ast.AST, old: str, new: str) -> tuple[int, int, str]:
        begin, end = source.span(left)[1], source.span(right)[0]
        gap = source.bytes[begin:end].decode()
        return begin, end, gap.replace(old, new, 1)

    for node in nodes:
        begin, end = source.span(node) if hasattr(node, "lineno") else (0, 0)
        if isinstance(node, ast.Compare) and len(node.ops) == 1 and type(node.ops[0]) in COMPARISONS:
            old = {"<=": "<", "<": "<=", ">=": ">", ">": ">=", "==": "!="}[COMPARISONS[type(node.ops[0])]]
            if isinstance(node.ops[0], ast.Eq):
                old = "=="
            yield "comparison", *between(node.left, node.comparators[0], old, COMPARISONS[type(node.ops[0])])
        elif isinstance(node, ast.BinOp) and type(node.op) in ARITHMETIC and id(node) not in fixed:
            yield "arithmetic", *between(node.left, node.right, *ARITHMETIC[type(node.op)])
        elif isinstance(node, ast.BinOp) and type(node.op) in LOGIC:
            yield "and, or", *between(node.left, node.right, *LOGIC[type(node.op)])
        elif isinstance(node, ast.Constant) and type(node.value) in (int, float) and id(node) not in fixed:
            for changed in (node.value + 1, node.value - 1):
                yield "constant ± 1", begin, end, f"{changed}" if changed >= 0 else f"({changed})"
        elif isinstance(node, ast.Call):
            if called(node) in EXTREMES and isinstance(node.func, ast.Attribute):
                name_end = source.span(node.func)[1]
                yield "min, max", name_end - len(node.func.attr), name_end, EXTREMES[node.func.attr]
            keywords = {k.arg: k for k in node.keywords}
            if called(node) in ("load", "store") and "mask" in keywords:
                dropped = [k for name, k in keywords.items() if name in ("mask", "other")]
                last_kept = max(source.span(a)[1] for a in node.args)
                kept = "".join(", " + source.text(k) for k in node.keywords if k not in dropped)
                yield "mask dropped", last_kept, end - 1, kept
            if called(node) == "load" and "other" in keywords:
                other = keywords["other"].value
                yield "other", *source.span(other), "1" if source.text(other) in ("0", "0.0") else "0"
            if called(node) in ("sum", "max", "min", "cumsum") and "axis" in keywords:
                axis = keywords["axis"].value
                yield "axis", *source.span(axis), str(1 - int(source.text(axis))) if source.text(axis) in "01" else "0"
        elif isinstance(node, ast.For) and called(node.iter) in ("range", "static_range"):
            bounds = node.iter.args  # type: ignore[attr-defined]
            stop = bounds[1] if len(bounds) > 1 else bounds[0]
            for change in ("+ 1", "- 1"):
                yield "loop bound", *source.span(stop), f"({source.text(stop)}) {change}"
            if len(bounds) > 1:
                yield "loop bound", *source.span(bounds[0]), f"({source.text(bounds[0])}) + 1"
        elif isinstance(node, ast.If) and source.text(node.test) != "INTERPRETED":
            yield "branch negated", *source.span(node.test), f"not ({source.text(node.test)})"
        if isinstance(node, ast.AugAssign) or (isinstance(node, ast.Expr) and called(node.value) == "store"):
            yield "statement deleted", begin, end, "pass"
        if isinstance(node, ast.Assign):
            names = {x.id for target in node.targets for x in ast.walk(target) if isinstance(x, ast.Name)}
            if names <= assigned:
                yield "statement deleted", begin, end, "pass"
            assigned |= names
    strides = [a for a in function.args.args if a.arg.startswith("stride_")]
    for first, second in pairwise(strides):
        if first.arg[:-1] == second.arg[:-1]:  # of one tensor
            begin, end = source.span(first)[0], source.span(second)[1]
            yield "strides swapped", begin, end, f"{second.arg}, {first.arg}"


def candidates(package: Path) -> list[Generated]:
    """Every fault that the operators can make, in the order of files and lines."""
    found = []
    sources = [Source(package, str(p.relative_to(package))) for p in sorted(package.rglob("*.py"))]
    for source in sources:
        if source.file.endswith("_hopper.py") or source.file.startswith("bench/"):
            continue
        for function in source.functions():
            stems = STEMS.get(source.file) or users(function.name, sources)
            seen: dict[tuple[str, ...], int] = {}
            for operator, begin, end, text in changes(source, function):
                first = source.bytes.rfind(b"\n", 0, begin) + 1
                last = source.bytes.find(b"\n", end)
                before = source.bytes[first:last].decode().strip()
                after = (source.bytes[first:begin] + text.encode() + source.bytes[end:last]).decode().strip()
                line = source.bytes.count(b"\n", 0, begin) + 1
                identity = operator, before, after
                seen[identity] = seen.get(identity, 0) + 1
                fault = source.file, function.name, *identity, seen[identity]
                found.append(Generated(*fault, line, begin, end, text, stems))
    return found


def users(name: str, sources: list[Source]) -> tuple[str, ...]:
    """The stems of the files that mention a function, or mention one of its file that does."""
    names, stems = {name}, set()
    while True:
        callers = {
            function.name
            for source in sources
            if source.file not in STEMS
            for function in source.functions()
            if any(isinstance(x, ast.Name) and x.id in names for x in ast.walk(function))
        }
        if callers <= names:
            break
        names |= callers
    for source in sources:
        if any(isinstance(x, ast.Name) and x.id in names for x in ast.walk(source.tree)):
            stems |= set(STEMS.get(source.file, ()))
    return tuple(stem for stem in COST if stem in stems)


def draw(package: Path, seed: int = SEED) -> list[Generated]:
    """`PER_KERNEL` faults of every kernel and `PER_HELPER` of other functions, by different operators if it can be.

    A hash of the fault and the seed ranks the candidates, so that a change of one function draws no others elsewhere.
    """

    def rank(fault: Generated) -> bytes:
        return hashlib.sha256(repr((seed, fault.key)).encode()).digest()

    functions: dict[tuple[str, str], list[Generated]] = {}
    for fault in candidates(package):
        functions.setdefault((fault.file, fault.kernel), []).append(fault)
    drawn = []
    for (_, kernel), faults in functions.items():
        wanted = PER_KERNEL if kernel.endswith("_kernel") else PER_HELPER
        ranked = sorted(faults, key=rank)
        first_of_operator = [f for i, f in enumerate(ranked) if f.operator not in {g.operator for g in ranked[:i]}]
        drawn += (first_of_operator + [f for f in ranked if f not in first_of_operator])[:wanted]
    return sorted(drawn, key=lambda fault: (fault.file, fault.line, fault.key))
