"""Mutants of `gsa_ref`: mutmut makes them, a fork runs the tests of the module on each, and a record keeps the result.

    python -m tests.reference_mutants                every module that has no result yet
    python -m tests.reference_mutants budget rope    these modules, from the beginning
    python -m tests.reference_mutants --survivors    what survived, against tests that were added since
    python -m tests.reference_mutants --report       run nothing: the record of the results in `mutants/`

The record keeps the results of modules that were run elsewhere, until they are run here.

A mutant is one changed expression of one function. mutmut (`[tool.mutmut]` in pyproject.toml) writes all of them into
one copy of the package, `mutants/`, of which a process chooses one: PyTorch is loaded once, and a mutant costs a fork.
mutmut skips decorated functions, the module level, and what its configuration leaves out. Only the tests of the
mutant's module run (`TESTS`), the fastest first, with few examples (the profile `mutation`); so what survives here may
still be caught by `make test`, and what is killed is killed near its cause.

A survivor is a gap in the tests unless `EXPLAINED` says why it is none. Exit status 1 if one is not explained.
"""

import argparse
import gc
import importlib.metadata
import json
import os
import platform
import re
import resource
import sys
import traceback
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
RECORD = ROOT / "benchmarks/results/cpu/reference_mutants.json"
COMMAND = "python -m tests.reference_mutants"
# Generators of test cases, and presentation; the puzzles too: see do_not_mutate in pyproject.toml.
LEFT_OUT = ("cases", "tour", "__main__")
# Tests about every function of a package.
GENERAL = {"": ["test_functions", "test_arguments"], "equations": ["test_equations"]}
# Tests of what a module does together with others, in the file of another one.
TOGETHER = {"layer": ["test_training", "test_generation", "test_cache"], "model": ["test_training", "test_generation"]}
# Compiled code holds no mutant to choose; the other tests take many times as long as all the rest.
SLOW = ("compiled", "10000", "two_processes", "learns_one_sentence")
# Without the plugins that collect garbage at the end of every run, which costs more than the tests.
PYTEST = [
    *("-x", "-q", "--tb=no", "--rootdir=.", "-k", " and ".join(f"not {name}" for name in SLOW)),
    *("-p", "no:cacheprovider", "-p", "no:xdist", "-p", "no:unraisableexception", "-p", "no:threadexception"),
]
CPU_SECONDS = 60  # a mutant may loop for ever
KILLED, SURVIVED, TIMED_OUT = "killed", "survived", "timeout"
DEAD = (KILLED, TIMED_OUT)


@dataclass(frozen=True)
class Explanation:
    """Why the survivors whose function and changed line match are no gap. `kind` is what the table counts them as."""

    kind: str
    function: str  # a pattern for module.function
    change: str  # a pattern for the removed or the added line
    why: str


EQUIVALENT, MESSAGE, ACCURATE = "equivalent", "message", "more accurate"
EXPLAINED: tuple[Explanation, ...] = (
    Explanation(
        EQUIVALENT,
        r"equations\.gates\.sigmoid",
        r"x > 0, 1\.0, e",
        "at x = 0 both branches are 1, because e is 1",
    ),
    Explanation(
        EQUIVALENT,
        r"equations\.gates\.apply_gate",
        r"np\.asarray\(x, (None)?\)",
        "the product with the sigmoid, which is float64, is float64 anyway",
    ),
    Explanation(
        EQUIVALENT,
        r"equations\.rope\.apply_rope",
        r"i - half\]",
        "i − d/2 counts from the end, and names the channel i + d/2",
    ),
    Explanation(
        EQUIVALENT,
        r"equations\.indexer\.indexer_scores",
        r"np\.asarray\([qk]_idx, (None)?\)",
        "the product of a narrow array and a float64 one is computed in float64",
    ),
    Explanation(
        EQUIVALENT,
        r"equations\.indexer\.indexer_scores",
        r"\+ n_valid = min\(start \+ t \+ 1, S\)",
        "where start + t < length, start + t + 1 is at most length",
    ),
    Explanation(
        EQUIVALENT,
        r"equations\.selection\.select_tokens",
        r"or True else 0\.0, s|else 1\.0, s",
        "among NaN scores no value ranks before another, and the sort is stable",
    ),
    Explanation(
        EQUIVALENT,
        r"indexer\.indexer_scores",
        r"\+ (scores = torch\.zeros|z = .*\.to\(None\))",
        "the sum with the first head's term has its dtype and shape, and there is a head",
    ),
    Explanation(
        EQUIVALENT,
        r"(indexer\.LightningIndexer|layer\.GatedSparseAttention|model\.SwiGLU)\.__init__",
        r"bias=None",
        "None is as false as False",
    ),
    Explanation(
        EQUIVALENT,
        r"equations\.training\.indexer_kl_gradient",
        r"len\(over\) == 1",
        "with one position softmax and teacher are both 1: the gradient is 0 either way; with none the sums are empty",
    ),
    Explanation(
        EQUIVALENT,
        r"rope\.apply_rope",
        r"\+ .*\.to\(None\)",
        "the product with a tensor of the wider dtype promotes",
    ),
    Explanation(EQUIVALENT, r"rope\.apply_rope", r"arange\(d / 2", "d is even, so that d / 2 is the same number"),
    Explanation(
        EQUIVALENT,
        r"_arguments\.check_tensor|cache\.GSACache\.truncate",
        r"\+ for .*zip\(.*, (strict=(None|False))?\)",
        "the two have one length: it has just been compared",
    ),
    Explanation(
        EQUIVALENT,
        r"_arguments\.check_decode_arguments",
        r"scale=2\.0",
        "the indexer's check reads a scale for nothing but being a finite number",
    ),
    Explanation(
        EQUIVALENT,
        r"attention\.sparse_attention|cache\.GSACache\.append",
        r"\+ row = torch\.arange\(.*, (device=None)?\)",
        "an index may lie on the CPU: the same elements, after a copy to the device",
    ),
    Explanation(
        EQUIVALENT,
        r"attention\.sparse_attention",
        r"new_zeros\(B, 2,",
        "the index of an empty slot is 0, of one row of zeros or of two",
    ),
    Explanation(
        EQUIVALENT,
        r"attention\.sparse_attention",
        r"masked_fill\(empty_slot, 1\)",
        "the logit of an empty slot is −∞ and its weight 0, so that any finite key and value will do",
    ),
    Explanation(
        EQUIVALENT,
        r"attention\.sparse_attention",
        r"torch\.einsum\(\"[A-Z]",
        "the axes have other names",
    ),
    Explanation(
        EQUIVALENT,
        r"attention\.sparse_attention",
        r"logits\.masked_fill\(empty_row, 1\)",
        "equal logits of any value have one softmax, and the lse of an empty row is set to −∞",
    ),
    Explanation(
        EQUIVALENT,
        r"attention\.sparse_attention",
        r"softmax\(logits, dim=-1\)\.masked_fill\(empty_row, 1\)",
        "the gathered values of an empty row are 0, and take no gradient",
    ),
    Explanation(EQUIVALENT, r"attention\.sparse_attention", r"lse\.flatten\(2, \)", "the axes 2 and 3 are the last"),
    Explanation(
        EQUIVALENT,
        r"budget\.token_budget",
        r"as_tensor\(mean_variance, dtype=variance\.dtype, (device=None)?\)",
        "a number that lies on the CPU divides a tensor on any device, and a tensor stays where it is",
    ),
    Explanation(
        EQUIVALENT,
        r"cache\.GSACache\.append",
        r"buffer is not None or new is not None",
        "both are None or neither: `check` has refused the rest",
    ),
    Explanation(
        EQUIVALENT,
        r"layer\.GatedSparseAttention\._apply",
        r"recurse=(None|True)",
        "None is as false as False; and no part of the layer has a buffer of its own",
    ),
    Explanation(
        EQUIVALENT,
        r"layer\.GatedSparseAttention\.forward",
        r"\+ n_new = torch\.full\(\(B,\), L, (dtype=None, )?device",
        "integers that are compared, or added to int32 in place",
    ),
    Explanation(
        EQUIVALENT,
        r"layer\.GatedSparseAttention\.forward",
        r"padding\[\.\.\., None\], 1\)",
        "nobody sees padding, and its output is set to 0",
    ),
    Explanation(
        EQUIVALENT,
        r"layer\.GatedSparseAttention\._attend",
        r"selection, (start=None, )?output_gate_logits",
        "a selection holds visible tokens alone; start is for kernels, which choose their tiles by it",
    ),
    Explanation(
        EQUIVALENT,
        r"layer\.GatedSparseAttention\._attend",
        r"^[-+] lse=(lse|None),$",
        "without it the loss computes the same sum from q and k once more",
    ),
    Explanation(
        EQUIVALENT,
        r"layer\.GatedSparseAttention\._attend",
        r"^- start=start,$",
        "the loss is computed without a cache only, where start is 0",
    ),
    Explanation(
        EQUIVALENT,
        r"model\.LanguageModel\.(set_phase|update_mean_variance)",
        r"cast\(None",
        "`typing.cast` returns its second argument, whatever the first",
    ),
    Explanation(
        EQUIVALENT,
        r"theory\.complexity\.cost_line",
        r"k \+ mean_k|c \+ mean_cost",
        "deviations from a mean add up to 0: to one factor of a sum of products any number may be added",
    ),
    Explanation(
        EQUIVALENT,
        r"generation\.sample",
        r"\+ .*(\(|=)\+1[,)]|excess, \+1|\.sort\(descending",
        "of two axes 1 is the last, and the last is the default",
    ),
    Explanation(
        EQUIVALENT,
        r"generation\.sample",
        r"\+ if top_p (<= 1|< 2):",
        "what it leaves out lies behind a sum that rounds to 1, and is less probable than that rounding",
    ),
    Explanation(
        EQUIVALENT,
        r"equations\.(layer\.gated_sparse_attention|training\.teacher)",
        r"\+ .*np\.asarray\((value|h|q|k), (None)?\)",
        "the product of a narrow array and a float64 one is computed in float64",
    ),
    Explanation(
        EQUIVALENT,
        r"equations\.layer\.gated_sparse_attention",
        r"np\.arange\(L\) \+ 2",
        "a budget beyond the keys of a row is cut to them by `select_tokens`",
    ),
    Explanation(
        EQUIVALENT,
        r"equations\.training\.indexer_kl_loss",
        r"zip\(p\[t\], student, (strict=(None|False))?\)",
        "the two have one length: both run over the positions of the row",
    ),
    Explanation(
        EQUIVALENT,
        r"training\.indexer_kl_loss",
        r"masked_fill\(~valid, 1\)",
        "equal logits of any value have one softmax, and p is 0 there",
    ),
    Explanation(
        EQUIVALENT,
        r"training\.indexer_kl_loss",
        r"masked_fill\(~over, 1\)",
        "p is 0 there",
    ),
    Explanation(
        EQUIVALENT,
        r"training\.indexer_kl_loss",
        r"p \* log_student\)\.sum\((None|\+1|-2)\)",
        "all of it is added up next",
    ),
    Explanation(
        EQUIVALENT,
        r"training\.captured_mass",
        r"\+ check_start\(start, \{\"(XXBXX|b)\"",
        "check_attention_arguments has looked at its shape already",
    ),
    Explanation(
        EQUIVALENT,
        r"training\.captured_mass",
        r"p\.sort\(descending|\(1, 1\)\)",
        "the last axis is the default; and the column behind the last sum is never read",
    ),
    Explanation(
        EQUIVALENT,
        r"training\._positions",
        r"index <= S|S \+ 2",
        "column S takes what is not selected, and is cut off",
    ),
    Explanation(
        EQUIVALENT,
        r"training\._teacher",
        r"torch\.einsum\(\"[A-Z]",
        "the axes have other names",
    ),
    Explanation(
        EQUIVALENT,
        r"theory\.complexity\.core_crossover",
        r"low, high = (k|high), 3 \*",
        "the bisection ends at the same length, from wherever it starts",
    ),
    Explanation(
        EQUIVALENT,
        r"theory\.convergence\.score_bounds",
        r"axis=\+1",
        "of two axes 1 is the last",
    ),
    Explanation(
        EQUIVALENT,
        r"theory\.expressiveness\.linear_gap",
        r"reshape\(n, -2\)|lstsq\(inputs, outputs, \)",
        "NumPy takes any negative size for the one to be found; and None is the default of rcond",
    ),
    Explanation(
        EQUIVALENT,
        r"check\.(score|kl)_tolerance",
        r"\.(sum|any|max|min)\(\+1[,)]",
        "of two axes 1 is the last",
    ),
    Explanation(
        EQUIVALENT,
        r"check\.(score_verdict|topk_certificate|error_budget)",
        r"\+ .*np\.asarray\((scores|x), (None)?\)",
        "gold is float64, and makes each sum, difference and comparison that",
    ),
    Explanation(
        EQUIVALENT,
        r"check\.topk_certificate",
        r"np\.isnan\(scores\), 1\.0",
        "a NaN counts as −∞, from which a finite ε takes nothing",
    ),
    Explanation(
        EQUIVALENT,
        r"check\.topk_certificate",
        r"outside <= last_weakest",
        "no position is both outside and chosen",
    ),
    Explanation(
        EQUIVALENT,
        r"check\.attention_gradient_tolerance",
        r"used\[:, None\], (key|value), 1\)",
        "the weight of a key that nobody selected is 0, and so is all that it multiplies",
    ),
    Explanation(
        EQUIVALENT,
        r"check\.kl_tolerance",
        r"p > 0, p, 2\)",
        "the logarithm is weighted by p, which is 0 there",
    ),
    Explanation(
        EQUIVALENT,
        r"check\.gate_tolerance",
        r"errstate\((invalid=None, )?divide=\"ignore\"\)|nan_to_num\(relative, (nan=1\.0, )?posinf=0\.0\)",
        "nothing in it is invalid; and where a logit is NaN gold is NaN, and with it the tolerance",
    ),
    Explanation(
        EQUIVALENT,
        r"check\.error_budget",
        r"budget - 1e-300",
        "it matters where the budget is 0, and there the error is 0 too",
    ),
    Explanation(
        EQUIVALENT,
        r"selection\.select_tokens",
        r"torch\.sort\([^=]*, descending|torch\.sort\(scores\.masked_fill\(.*\), descending",
        "the last axis is the default",
    ),
    Explanation(
        EQUIVALENT,
        r"selection\.select_tokens",
        r"gather\(-1, order\)\.to\(None\)",
        "booleans sort as 0 and 1 do",
    ),
    Explanation(
        EQUIVALENT,
        r"selection\.select_tokens",
        r"functional\.pad\(.*, (value=None)?\)",
        "slots past the number of keys are never filled, and set to S next",
    ),
    Explanation(
        EQUIVALENT,
        r"selection\.(indexed_selection|check_selection_config)",
        r"check_(selection_config|mean_variance)\((config, )?mean_variance, None\)",
        "`token_budget` checks the device of V̄ again",
    ),
    Explanation(
        EQUIVALENT,
        r"selection\.indexed_selection",
        r"\+ n_valid = .*(sum\((None, )?dtype|start, None, scores)",
        "a budget beyond the keys of a row is cut to them by `select_tokens`",
    ),
    Explanation(
        ACCURATE,
        r"rope\.apply_rope",
        r"or True else torch\.float32",
        "float32 input is computed in float64: slower, and within every bound",
    ),
)


def modules() -> list[str]:
    """The modules with mutants, as dotted names below gsa_ref."""
    found = sorted((ROOT / "gsa_ref").rglob("*.py"))
    names = [".".join(path.relative_to(ROOT / "gsa_ref").with_suffix("").parts) for path in found]
    left_out = (*LEFT_OUT, *(name for name in names if name.startswith("puzzles.")))
    return [name for name in names if name not in left_out and not name.endswith("__init__")]


def tests_of(module: str) -> list[str]:
    """The test files whose subject the module is, those about all functions of its package, and those of `TOGETHER`."""
    *package, name = module.split(".")
    names = GENERAL.get("".join(package), []) + ([f"test_{name}"] if name != "_arguments" else [])
    names += ["_".join(("test", *package, name)), *TOGETHER.get(module, [])]
    found = [f"tests/ref/{n}.py" for n in dict.fromkeys(names)]
    return [path for path in found if (ROOT / path).is_file()]


def make_mutants() -> None:
    """Write `mutants/`: the copy of gsa_ref with all mutants, and the tests."""
    from mutmut.__main__ import create_mutants
    from mutmut.utils.file_utils import copy_also_copy_files, copy_src_dir

    (ROOT / "mutants").mkdir(exist_ok=True)
    copy_src_dir()
    copy_also_copy_files()
    create_mutants(1)


class Fastest:
    """A pytest plugin: the tests that were fastest without a mutant run first."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    def pytest_runtest_logreport(self, report: Any) -> None:
        self.seconds[report.nodeid] = self.seconds.get(report.nodeid, 0.0) + report.duration

    def pytest_collection_modifyitems(self, items: list[Any]) -> None:
        items.sort(key=lambda item: self.seconds.get(item.nodeid, 0.0))


class Forks:
    """A pytest plugin: with the tests collected, a forked process per mutant goes on to run them.

    Args:
        waiting: names of mutants.
        jobs: how many processes run at a time.
        ended: called with a mutant and the exit code of its tests.
    """

    def __init__(self, waiting: list[str], jobs: int, ended: Callable[[str, int], None]) -> None:
        self.waiting, self.jobs, self.ended = waiting, jobs, ended
        self.in_child = False

    def pytest_runtestloop(self) -> bool | None:
        from mutmut.mutation.trampoline import set_mutant_under_test

        gc.freeze()
        running: dict[int, str] = {}
        while self.waiting or running:
            while self.waiting and len(running) < self.jobs:
                name = self.waiting.pop()
                if (child := os.fork()) == 0:
                    self.in_child = True
                    set_mutant_under_test(name)
                    used = int(sum(resource.getrusage(resource.RUSAGE_SELF)[:2]))
                    resource.setrlimit(resource.RLIMIT_CPU, (used + CPU_SECONDS, used + CPU_SECONDS + 1))
                    return None  # pytest's own loop follows
                running[child] = name
            child, wait_status = os.wait()
            self.ended(running.pop(child), os.waitstatus_to_exitcode(wait_status))
        return True


def run_module(module: str, jobs: int, which: str) -> None:
    """Run the tests of a module on its mutants, and store the exit codes beside the mutants.

    `which` says whether mutants that have a result run again: "all", the "survivors", or none of them ("new").

    Runs in a process of its own: it imports the copy under the name gsa_ref.

    Raises:
        RuntimeError: the tests fail without a mutant.
    """
    from mutmut.mutation.data import SourceFileMutationData
    from mutmut.mutation.trampoline import set_mutant_under_test
    from mutmut.stats import status_by_exit_code

    data = SourceFileMutationData(path=source(module))
    data.load()
    again = {
        "all": lambda _: True,
        "survivors": lambda code: status_by_exit_code[code] not in DEAD,
        "new": lambda _: False,
    }
    waiting = [name for name, code in data.exit_code_by_key.items() if code is None or again[which](code)]
    os.chdir(ROOT / "mutants")
    sys.path[:] = [os.getcwd(), *(path for path in sys.path if path and Path(path) != ROOT)]
    sys.modules.pop("tests", None)  # of the root, from which this file was run
    set_mutant_under_test("")
    import pytest

    null = open(os.devnull, "w")  # noqa: SIM115  as long as the process lives
    os.dup2(null.fileno(), 1)
    plugin, arguments = Fastest(), [*PYTEST, *tests_of(module)]
    for _ in range(2):  # the first run pays for what is loaded on first use
        plugin.seconds.clear()
        if (code := pytest.main(arguments, plugins=[plugin])) != 0:
            raise RuntimeError(f"{module}: expected its tests to pass without a mutant, got exit status {int(code)}")

    def ended(name: str, code: int) -> None:
        data.exit_code_by_key[name] = code
        os.chdir(ROOT)  # where mutmut looks for its files
        data.save()
        os.chdir(ROOT / "mutants")

    forks, status = Forks(waiting, jobs, ended), 3
    try:
        status = int(pytest.main(arguments, plugins=[plugin, forks]))
    finally:
        if forks.in_child:
            os._exit(status)


def run_modules(chosen: Iterable[str], jobs: int, which: str) -> None:
    """`run_module` for each, in a process each.

    Raises:
        RuntimeError: a process failed.
    """
    import torch  # noqa: F401  inherited by every process

    for module in chosen:
        if (child := os.fork()) == 0:
            status = 1
            try:
                run_module(module, jobs, which)
                status = 0
            except Exception:  # noqa: BLE001  said here, and by the exit status
                traceback.print_exc()
            finally:
                os._exit(status)
        _, wait_status = os.waitpid(child, 0)
        if wait_status:
            raise RuntimeError(f"{module}: the process that ran its mutants failed")


def source(module: str) -> Path:
    return Path("gsa_ref", *module.split(".")).with_suffix(".py")


def explain(name: str, diff: list[str]) -> Explanation | None:
    """The first explanation that fits the mutant."""
    function = re.sub(r"__mutmut_\d+$", "", name.removeprefix("gsa_ref.")).replace(".x_", ".")
    function = re.sub(r"\.xǁ(\w+)ǁ", r".\1.", function)
    for e in EXPLAINED:
        if re.fullmatch(e.function, function) and any(re.search(e.change, line) for line in diff):
            return e
    return None


def results(module: str) -> dict[str, Any] | None:
    """A row of the record: the counts of one module and its survivors. None if it has not been run to its end."""
    from mutmut.mutation.data import SourceFileMutationData
    from mutmut.mutation.diff_apply import get_diff_for_mutant
    from mutmut.stats import status_by_exit_code

    data = SourceFileMutationData(path=source(module))
    data.load()
    statuses = {name: status_by_exit_code[code] for name, code in data.exit_code_by_key.items()}
    if not statuses or "not checked" in statuses.values():
        return None
    survivors = []
    for name, status in statuses.items():
        if status in DEAD:
            continue
        lines = get_diff_for_mutant(name, path=data.path).splitlines()
        diff = [" ".join(line.split()) for line in lines if re.match(r"[-+] ", line)]
        survivors.append({"mutant": name.removeprefix("gsa_ref."), "status": status, "diff": diff})
    counts = Counter(statuses.values())
    row = {"module": module, "mutants": len(statuses), KILLED: counts[KILLED], TIMED_OUT: counts[TIMED_OUT]}
    return {**row, SURVIVED: len(survivors), "survivors": survivors}


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.reference_mutants", description=__doc__.splitlines()[0])
    parser.add_argument(
        "modules", nargs="*", metavar="MODULE", help="modules of gsa_ref, such as budget (default: all)"
    )
    parser.add_argument("--survivors", action="store_true", help="of what has been run, run again what survived")
    parser.add_argument("--report", action="store_true", help="write the record of what has been run, and run nothing")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="processes (default: one per core)")
    options = parser.parse_args(argv)
    if unknown := set(options.modules) - set(modules()):
        parser.error(f"argument MODULE: expected one of {', '.join(modules())}, got {', '.join(sorted(unknown))}")
    os.chdir(ROOT)  # mutmut looks for its configuration where it runs
    if not options.report:
        os.environ["HYPOTHESIS_PROFILE"] = "mutation"
        make_mutants()
        which = "survivors" if options.survivors else "all" if options.modules else "new"
        run_modules(options.modules or modules(), options.jobs, which)
    known = json.loads(RECORD.read_text(encoding="utf-8"))["modules"] if RECORD.is_file() else []
    earlier = {row["module"]: row for row in known}
    rows = [row for module in modules() if (row := results(module) or earlier.get(module)) is not None]
    for survivor in (survivor for row in rows for survivor in row["survivors"]):
        found = explain(survivor["mutant"], survivor["diff"])
        survivor["kind"], survivor["why"] = (found.kind, found.why) if found else (None, None)
    record = {
        "command": COMMAND,
        "tool": f"mutmut {importlib.metadata.version('mutmut')}",
        "python": platform.python_version(),
        "torch": importlib.metadata.version("torch"),
        "left_out": list(LEFT_OUT),
        "not_run": [module for module in modules() if module not in {row["module"] for row in rows}],
        "modules": rows,
    }
    RECORD.parent.mkdir(parents=True, exist_ok=True)
    RECORD.write_text(json.dumps(record, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    open_gaps = 0
    for row in rows:
        print(f"{row['module']:24s} {row['mutants']:5d} mutants, {row[SURVIVED]:4d} survived")
        for survivor in row["survivors"]:
            if survivor["why"] is None:
                open_gaps += 1
                print("   ", survivor["mutant"], *survivor["diff"], sep="\n        ")
    return 1 if open_gaps else 0


if __name__ == "__main__":
    sys.exit(main())
