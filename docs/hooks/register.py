"""The register of verified properties and of bugs seen elsewhere, and which tests claim them.

A test claims an entry with `@pytest.mark.property(30)` or `@pytest.mark.pitfall("empty-first-tile")`, in literal form.
The claims are read from the syntax trees of the tests, so that a page and a check need not import any. Each entry must
be claimed in `tests/ref` and in `tests/fast`, a property by a test that draws its cases; where that makes no sense, the
entry says why, and an excuse that is not needed is a problem too.
"""

import ast
import re
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

SIDES = {"ref": "reference", "fast": "kernels"}
PARTS = {
    "indexer": "Indexer",
    "budget": "Budget",
    "selection": "Selection",
    "attention": "Attention",
    "gates": "Gates",
    "gradients": "Gradients",
    "system": "System",
}


@dataclass(frozen=True)
class Entry:
    """One line of the register. `named` and `absent` say why a side has no drawn test, or no test at all."""

    key: int | str  # what the marker names
    part: str  # of PARTS; for a pitfall, where it was seen
    claim: str
    named: dict[str, str] = field(default_factory=dict)
    absent: dict[str, str] = field(default_factory=dict)


COMPILES = "each example would compile a graph"

PROPERTIES = (
    Entry(1, "indexer", r"A score lies between 0 and the number of heads: $0 \le I[t,s] \le H_I$."),
    Entry(
        2,
        "indexer",
        r"A score rises with a head weight and a bias: $\partial I/\partial w_j,\ \partial I/\partial b_j \ge 0$.",
    ),
    Entry(3, "indexer", r"Permuted keys give permuted columns: $I(q, k_\pi)[t,s] = I(q, k)[t,\pi(s)]$."),
    Entry(
        4,
        "indexer",
        r"The order of the heads does not matter: $\sum_j$ over any permutation of $(q_j, w_j, b_j)$ is the same.",
    ),
    Entry(5, "indexer", r"What comes after position $t$ changes no bit of the rows up to $t$."),
    Entry(6, "indexer", r"A sequence gives the same bits in a batch as alone."),
    Entry(7, "indexer", r"The size of the blocks changes a result within its tolerance ε only."),
    Entry(8, "indexer", r"Biases in the limit: $b \to -\infty$ gives 0, $b \to +\infty$ gives $\sum_j \sigma(w_j)$."),
    Entry(9, "indexer", r"Any strides give what contiguous tensors give."),
    Entry(
        10,
        "budget",
        r"The budget keeps its bounds: $\min(k_{\min}, n) \le k_t \le \min(k_{\max}, n)$ with $n$ visible keys.",
    ),
    Entry(11, "budget", r"A short row takes everything: $t + 1 < k_{\min}$ gives $k_t = t + 1$."),
    Entry(12, "budget", r"A constant row has variance 0 and a finite budget."),
    Entry(13, "budget", r"A constant added to the scores leaves their variance: $V(S + c) = V(S)$."),
    Entry(14, "budget", r"A factor on the scores enters as its square: $V(aS) = a^2\,V(S)$."),
    Entry(
        15,
        "budget",
        r"The variance of tiles, merged, is that of two passes, also where the mean is far above the deviation.",
    ),
    Entry(16, "budget", r"$k_t$ is monotone in $V$, rising or falling as the rule says."),
    Entry(17, "budget", r"The budget of a row depends on that row alone: on no later token and no other sequence."),
    Entry(18, "budget", r"A row of one key is defined: $V = 0$ and $k_t = 1$."),
    Entry(
        19,
        "selection",
        r"The selection passes [the certificate](index.md#the-top-k-certificate): scores within ε of gold select it.",
    ),
    Entry(20, "selection", r"The count is exact: $|S_t| = \min(k_t, n_t)$, cut to the width."),
    Entry(21, "selection", r"No position is selected twice."),
    Entry(22, "selection", r"No position of the future is selected: $s \le t$ for $s \in S_t$."),
    Entry(23, "selection", r"Positions ascend, and −1 stands in the tail only."),
    Entry(24, "selection", r"Equal scores give the lowest positions: $S_t = \{0, \dots, k_t - 1\}$."),
    Entry(25, "selection", r"Only the order counts: $S_t(f(I)) = S_t(I)$ for every strictly increasing $f$."),
    Entry(26, "selection", r"Budgets nest: $k \le k'$ gives $S_t(k) \subseteq S_t(k')$."),
    Entry(27, "selection", r"Rows in chunks give what all rows at once give."),
    Entry(28, "selection", r"More than 4,096 scores within one step of float16 are told apart."),
    Entry(
        29,
        "selection",
        r"Special values have their place: $-0 = +0$, denormals are not 0, $-\infty$ is no candidate, NaN comes last.",
    ),
    Entry(30, "attention", r"With $k_t \ge t + 1$ it is dense causal attention."),
    Entry(
        31,
        "attention",
        r"The output stays inside the range of the selected values: $\min_s v_{sc} \le o_{tc} \le \max_s v_{sc}$.",
    ),
    Entry(32, "attention", r"Equal values come out unchanged: $v_s = c$ gives $o = c$."),
    Entry(
        33,
        "attention",
        r"The order of the slots does not matter.",
        absent={"fast": "the contract of the kernels wants ascending positions"},
    ),
    Entry(
        34,
        "attention",
        r"A factor on the queries cancels its inverse on the scale: $(aq,\ \text{scale}/a)$ gives the same.",
    ),
    Entry(
        35, "attention", r"Parts of a selection merge by their lse: $o = \sum_i e^{\text{lse}_i - \text{lse}}\, o_i$."
    ),
    Entry(36, "attention", r"The output is linear in the values: $o(av + bv') = a\,o(v) + b\,o(v')$."),
    Entry(37, "attention", r"NaN in keys and values that a query did not select changes no bit of its output."),
    Entry(
        38,
        "attention",
        r"Grouped heads equal repeated ones: query head $h$ reads key head $\lfloor h / \text{group} \rfloor$.",
    ),
    Entry(
        39,
        "attention",
        r"One slot gives its value: $S_t = \{s\}$ gives $o = v_s$ and $\text{lse} = \text{scale} \cdot q \cdot k_s$.",
    ),
    Entry(40, "attention", r"A row without a key gives $o = 0$ and $\text{lse} = -\infty$, and no other row does."),
    Entry(
        41, "attention", r"A shift of all keys, $k_s + c$, leaves $o$ and moves lse by $\text{scale} \cdot q \cdot c$."
    ),
    Entry(42, "gates", r"A gate at $+\infty$ is the identity."),
    Entry(43, "gates", r"A gate at $-\infty$ gives exactly 0."),
    Entry(44, "gates", r"A gate never enlarges: $|x\,\sigma(g)| \le |x|$."),
    Entry(45, "gates", r"A gate inside the attention equals one applied before (G2) or after it (G1)."),
    Entry(
        46,
        "gradients",
        r"Gradients are those of finite differences, in float64.",
        absent={"fast": "the kernels take no float64; property 47 compares them with the reference"},
    ),
    Entry(
        47,
        "gradients",
        r"The gradients of the kernels are those of autograd, within bounds that follow from the arithmetic.",
        absent={"ref": "its gradients are autograd's own; property 46 compares them with finite differences"},
    ),
    Entry(
        48, "gradients", r"The backward pass is linear: $a\,do$ gives $a$ times every gradient, and $do = 0$ gives 0."
    ),
    Entry(49, "gradients", r"$dK$ and $dV$ of a key that nobody selected are exactly 0."),
    Entry(
        50, "gradients", r"The gradients of a row's logits add up to that of its lse: $\sum_s dS_{ts} = d\text{lse}_t$."
    ),
    Entry(51, "gradients", r"Nothing flows through the indices of a selection."),
    Entry(
        52, "gradients", r"The indexer learns from its own loss, and from nothing else; its loss reaches nothing else."
    ),
    Entry(53, "system", r"Decoding token by token gives the rows of one prefill."),
    Entry(54, "system", r"A prefill in chunks gives the rows of one."),
    Entry(55, "system", r"Compiled code gives what eager code gives.", named={"ref": COMPILES, "fast": COMPILES}),
    Entry(56, "system", r"Saved and loaded, a layer gives the same bits."),
    Entry(57, "system", r"A second run gives the same bits."),
)

ELSEWHERE, PEERS = "Bugs that escaped elsewhere", "Where other implementations fail"
NO_KERNEL_ARITHMETIC = "PyTorch computes the offsets of the reference"
REFERENCE_MAY = "the reference is written to be read, and may hold all pairs"

PITFALLS = (
    Entry(
        "int32-strides",
        ELSEWHERE,
        "An offset, index times stride, does not fit into 32 bits, although both factors do.",
        absent={"ref": NO_KERNEL_ARITHMETIC},
    ),
    Entry("mask-past-46341", ELSEWHERE, "The index math of a mask overflows past 46,341 tokens, the root of $2^{31}$."),
    Entry("large-batch", ELSEWHERE, "A batch of 10,000 exceeds what a launch grid or a 16-bit counter holds."),
    Entry("length-zero", ELSEWHERE, "A batch, a sequence or a cache without elements."),
    Entry("transposed-input", ELSEWHERE, "A transposed or sliced input is read as if it were contiguous."),
    Entry(
        "empty-first-tile",
        ELSEWHERE,
        r"The first tile of a row is masked as a whole: $m = -\infty$, and $e^{m - m}$ is NaN.",
    ),
    Entry("minus-one-in-prefix", ELSEWHERE, "A −1 before the count of a row is read as the last key."),
    Entry("ties-at-threshold", ELSEWHERE, "Many scores equal the threshold, and more or fewer than $k_t$ are taken."),
    Entry("minus-infinity-lanes", ELSEWHERE, r"Masked scores, $-\infty$, fill the selection where candidates run out."),
    Entry("diagonal", ELSEWHERE, "Random selections of the tests never hold the query's own position."),
    Entry(
        "decode-sees-new-token-only",
        ELSEWHERE,
        "A cached decode step scores the new token only; one returns exactly 0.",
    ),
    Entry("variance-of-one", ELSEWHERE, "The variance of one score divides 0 by 0."),
    Entry(
        "ema-starts-at-one", ELSEWHERE, r"$\bar V$ starts at 1, far above every variance, and pins $k_t$ at $k_{\min}$."
    ),
    Entry("rule-turned-round", PEERS, "The budget falls with the variance where the equation says that it rises."),
    Entry(
        "mean-of-the-batch",
        PEERS,
        r"$\bar V$ is the mean of the batch at hand, so the future and the neighbours leak into $k_t$.",
    ),
    Entry(
        "masked-counted-as-zeros",
        PEERS,
        "Masked positions enter the variance as zeros, which makes it a function of the position.",
    ),
    Entry(
        "indexer-never-learns",
        PEERS,
        "The indexer gets no gradient: nothing flows through indices, and there is no loss of its own.",
    ),
    Entry("budget-of-everything", PEERS, "The tests are no longer than the budget, so nothing is ever left out."),
    Entry(
        "all-pairs-in-memory",
        PEERS,
        "The indexer holds an array of all pairs, 64 GiB at 131,072 tokens.",
        absent={"ref": REFERENCE_MAY},
    ),
    Entry("nan-in-the-backward-pass", PEERS, "NaN in the sparse backward pass, from rows or keys that do not count."),
    Entry("group-sizes", PEERS, "Only some numbers of query heads per key head work."),
    Entry("reruns-differ", PEERS, "Two runs select different keys, or sum gradients in another order."),
    Entry("padding-in-the-cache", PEERS, "Padding enters the cache, or a cached position is off by it."),
    Entry("rows-without-a-key", PEERS, "What a row without a key gives is not defined."),
)

REGISTERS = {"property": PROPERTIES, "pitfall": PITFALLS}


@dataclass(frozen=True)
class Claim:
    """A test that claims entries of one register."""

    marker: str
    keys: tuple[int | str, ...]
    path: str  # relative to the root, with slashes
    test: str
    is_drawn: bool  # by Hypothesis

    @property
    def side(self) -> str:
        return self.path.split("/")[1]


@cache
def read(root: Path) -> tuple[tuple[Claim, ...], tuple[str, ...]]:
    """All claims of the tests, and what is wrong with the form of others."""
    claims, wrong = [], []
    for path in sorted((root / "tests").rglob("*.py")):
        where = path.relative_to(root).as_posix()
        tree = ast.parse(path.read_text(encoding="utf-8"))
        uses = [n for n in ast.walk(tree) if isinstance(n, ast.Attribute) and _marker(n)]
        understood = 0
        for node in tree.body:
            if not isinstance(node, ast.FunctionDef) or not node.name.startswith("test_"):
                continue
            calls = [d for d in node.decorator_list if isinstance(d, ast.Call)]
            is_drawn = any(isinstance(c.func, ast.Name) and c.func.id == "given" for c in calls)
            for call in calls:
                marker = _marker(call.func)
                if marker and call.args and not call.keywords and all(isinstance(a, ast.Constant) for a in call.args):
                    keys = tuple(a.value for a in call.args if isinstance(a, ast.Constant))
                    claims.append(Claim(marker, keys, where, node.name, is_drawn))
                    understood += 1
            if re.search(r"\bpropert(y|ies) \d", ast.get_docstring(node) or "", re.IGNORECASE):
                wrong.append(f"{where}::{node.name}: names a property in its docstring; it takes a marker")
        if understood != len(uses):
            lines = sorted(n.lineno for n in uses)
            wrong.append(f"{where}: of its markers in lines {lines}, only {understood} are literals on a test function")
    return tuple(claims), tuple(wrong)


def _marker(node: ast.AST) -> str | None:
    """The register that `pytest.mark.<register>` names."""
    text = ast.unparse(node) if isinstance(node, ast.Attribute) else ""
    return text.removeprefix("pytest.mark.") if text in {f"pytest.mark.{name}" for name in REGISTERS} else None


def claims_of(root: Path, marker: str, key: int | str, side: str) -> list[Claim]:
    return [c for c in read(root)[0] if c.marker == marker and key in c.keys and c.side == side]


def problems(root: Path) -> list[str]:
    """What keeps register and tests from agreeing."""
    claims, wrong = read(root)
    found = list(wrong)
    for claim in claims:
        known = [entry.key for entry in REGISTERS[claim.marker]]
        where = f"{claim.path}::{claim.test}"
        found += [f"{where}: {claim.marker} {key!r} is not in the register" for key in claim.keys if key not in known]
        if claim.side not in SIDES:
            found.append(f"{where}: only tests in {' and '.join(f'tests/{s}' for s in SIDES)} claim a {claim.marker}")
    for marker, entries in REGISTERS.items():
        for entry in entries:
            for side in SIDES:
                tests = claims_of(root, marker, entry.key, side)
                where = f"{marker} {entry.key!r} in tests/{side}"
                if bool(tests) == (side in entry.absent):
                    found.append(f"{where}: " + ("is tested, but excused" if tests else "no test claims it"))
                if marker == "property" and tests and any(t.is_drawn for t in tests) == (side in entry.named):
                    found.append(f"{where}: " + ("is drawn, but excused" if side in entry.named else "no drawn test"))
    return found


# ---- the page --------------------------------------------------------------------------------------------------------


def _lines(root: Path, marker: str, entries: list[Entry]) -> list[str]:
    """A definition list: each claim with the tests of both sides, file by file."""
    lines = []
    for entry in entries:
        label = f"**{entry.key}.**" if isinstance(entry.key, int) else f"`{entry.key}`"
        lines += [f"{label} {entry.claim}", ""]
        for side, name in SIDES.items():
            by_file: dict[str, list[str]] = {}
            for claim in claims_of(root, marker, entry.key, side):
                fixed = "" if claim.is_drawn or marker == "pitfall" else " †"
                by_file.setdefault(claim.path, []).append(f"`{claim.test}`{fixed}")
            tests = "; ".join(f"`{path}`: {', '.join(names)}" for path, names in by_file.items())
            why = entry.absent.get(side) or entry.named.get(side)
            text = tests + (f" ({why})" if why and tests else "") or f"none: {why}"
            lines.append(f":   *{name}* {text}")
        lines.append("")
    return lines


def properties(root: Path) -> str:
    """`{{ properties }}`: every property with its tests."""
    lines = []
    for part, title in PARTS.items():
        lines += [f"## {title}", "", *_lines(root, "property", [e for e in PROPERTIES if e.part == part])]
    return "\n".join(lines)


def pitfalls(root: Path) -> str:
    """`{{ pitfalls }}`: every bug seen elsewhere with its tests."""
    lines = []
    for title in (ELSEWHERE, PEERS):
        lines += [f"## {title}", "", *_lines(root, "pitfall", [e for e in PITFALLS if e.part == title])]
    return "\n".join(lines)


def n_claims(root: Path, marker: str) -> str:
    """`{{ n_claims property }}`: how many tests claim an entry of a register."""
    return str(sum(claim.marker == marker for claim in read(root)[0]))


def n_entries(root: Path, marker: str) -> str:
    """`{{ n_entries property }}`: how many entries a register has."""
    return str(len(REGISTERS[marker]))


DIRECTIVES = {f.__name__: f for f in (properties, pitfalls, n_claims, n_entries)}
