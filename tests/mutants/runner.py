"""Apply faults to copies of `gsa_fast` and look for a case that fails there and passes on the unchanged package."""

import importlib
import json
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from multiprocessing import connection
from pathlib import Path
from typing import Any, Protocol

os.environ["TRITON_INTERPRET"] = "1"  # before Triton is imported: the faults are looked for in the interpreter

import torch
import triton  # noqa: F401  imported once here, inherited by every child

import gsa_ref.cases

ROOT = Path(__file__).parents[2]
# A fault may make a loop endless. The processor's time, so that a busy machine kills nothing.
CASE_SECONDS = 40
LEAST_CASES = 12


class Fault(Protocol):
    """What the runner asks of a fault."""

    file: str

    @property
    def test(self) -> str: ...
    @property
    def name(self) -> str: ...
    @property
    def key(self) -> tuple[Any, ...]: ...
    @property
    def stems(self) -> tuple[str, ...]: ...
    def apply(self, package: Path) -> None: ...


@dataclass(frozen=True)
class Outcome:
    """`verdict` is "FAIL", "CRASH", "TIMEOUT" or "pass"; `case` or `test` is what did not pass."""

    verdict: str
    detail: str = ""
    case: str = ""
    test: str = ""

    @property
    def killed(self) -> bool:
        return self.verdict != "pass"

    @property
    def stem(self) -> str:
        return json.loads(self.case)["stem"] if self.case else ""


@dataclass(frozen=True)
class Task:
    """Run `cases` and `tests` on a copy with the fault, then draw cases of each of `stems`, until one does not pass."""

    fault: Fault | None
    cases: tuple[str, ...] = ()
    tests: tuple[str, ...] = ()
    stems: tuple[str, ...] = ()
    share: int = 1  # the examples of `verify` are divided by it, down to LEAST_CASES


def check_copy(task: Task, folder: Path) -> Outcome:
    """The outcome on a copy of the package, in a fresh child process, which imports it under the name gsa_fast."""
    package = folder / "gsa_fast"
    shutil.copytree(ROOT / "gsa_fast", package)  # with the bytecode of the files that no fault changes
    if task.fault is not None:
        task.fault.apply(package)
    sys.path.insert(0, str(folder))
    sys.dont_write_bytecode = True
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    running = folder / "case.json"
    try:
        run = importlib.import_module("gsa_fast.verification.run")
    except Exception as error:  # noqa: BLE001  whatever a fault raises is what is looked for
        return Outcome("CRASH", f"import: {type(error).__name__}: {error}")
    if Path(run.__file__).parents[1] != package:
        raise RuntimeError(f"expected gsa_fast from {package}, got {run.__file__}")
    run.SHRINK_SECONDS = 0.0  # any failure will do
    check_case = run.check_case

    def check_case_in_time(case: Any, device: str, row: Any) -> None:
        running.write_text(case.to_json())
        signal.setitimer(signal.ITIMER_VIRTUAL, CASE_SECONDS)  # ends the process
        check_case(case, device, row)
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)

    run.check_case = check_case_in_time
    with run.prepared("cpu"):
        for text in task.cases:
            case = gsa_ref.cases.Case.from_json(text)
            try:
                check_case_in_time(case, "cpu", run.Row(case.stem, "float32"))
            except Exception as error:  # noqa: BLE001
                return Outcome("FAIL", f"{type(error).__name__}: {error}".splitlines()[0], text)
        for test in task.tests:
            if not passes(test, folder):
                return Outcome("FAIL", f"FAILED {test}", test=test)
        for stem in task.stems:
            examples = max(LEAST_CASES, run.INTERPRETER_EXAMPLES[stem] // task.share)
            for shard in run.shards_of((stem,), ("float32",), "cpu", {stem: examples}, seed=0):
                row = run.verify_row(stem, "float32", "cpu", shard.examples, shard.seed)
                if row.failed:
                    return Outcome(row.verdict, row.detail.splitlines()[0], row.smallest_failure)
    return Outcome("pass")


def passes(test: str, folder: Path) -> bool:
    """Whether a test passes with the package in `folder`."""
    # The folder it starts in comes first on Python's path, and the tests' own last: so gsa_fast is the copy.
    options = ["-q", "-x", "-p", "no:cacheprovider", "--import-mode=append", "-c", str(ROOT / "pyproject.toml")]
    command = [sys.executable, "-m", "pytest", *options, f"--rootdir={ROOT}", str(ROOT / test)]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    if done.returncode not in (0, 1):
        raise RuntimeError(f"{test}: expected a test that passes or fails, got {done.stdout}{done.stderr}")
    return done.returncode == 0


def run_in_children(tasks: list[Task], jobs: int) -> Iterator[tuple[int, Outcome, float]]:
    """(i, outcome, seconds) of every task as it ends, in forked processes: a fault may write out of bounds."""
    context = multiprocessing.get_context("fork")
    running: dict[Any, tuple[int, Any, Any, Path, float]] = {}

    def child(pipe: Any, task: Task, folder: Path) -> None:
        pipe.send(check_copy(task, folder))

    waiting = list(enumerate(tasks))[::-1]
    with tempfile.TemporaryDirectory() as temporary:
        while waiting or running:
            while waiting and len(running) < jobs:
                i, task = waiting.pop()
                folder = Path(temporary) / str(i)
                folder.mkdir()
                receiver, sender = context.Pipe(duplex=False)
                process = context.Process(target=child, args=(sender, task, folder))
                process.start()
                sender.close()
                running[process.sentinel] = i, process, receiver, folder, time.monotonic()
            for sentinel in connection.wait(list(running)):
                i, process, receiver, folder, started = running.pop(sentinel)
                process.join()
                try:
                    outcome = receiver.recv()
                except EOFError:  # it died before it could answer
                    verdict = "TIMEOUT" if process.exitcode == -signal.SIGVTALRM else "CRASH"
                    case = folder / "case.json"
                    detail = f"the process ended with status {process.exitcode}"
                    outcome = Outcome(verdict, detail, case.read_text() if case.exists() else "")
                shutil.rmtree(folder)
                yield i, outcome, time.monotonic() - started


def run_faults(
    faults: list[Fault],
    known: dict[tuple[Any, ...], str],
    share: int,
    jobs: int,
    report: Callable[[Fault, Outcome], None],
) -> tuple[dict[tuple[Any, ...], Outcome], Outcome]:
    """The outcome of every fault by its key, and that of the unchanged copy on all that showed a fault.

    Args:
        faults: those to apply, one at a time.
        known: a case that showed the fault in an earlier run, by the fault's key; it is tried first.
        share: divides the number of cases that `verify` draws, down to LEAST_CASES.
        jobs: processes.
        report: called with every fault and its outcome as soon as there is one.
    """
    tasks = [
        Task(f, (known[f.key],) if f.key in known else (), (f.test,) if f.test else (), f.stems, share) for f in faults
    ]
    outcomes = {}
    for i, outcome, _ in run_in_children(tasks, jobs):
        outcomes[faults[i].key] = outcome
        report(faults[i], outcome)
    cases = tuple(dict.fromkeys(outcome.case for outcome in outcomes.values() if outcome.case))
    tests = tuple(dict.fromkeys(outcome.test for outcome in outcomes.values() if outcome.test))
    _, control, _ = next(run_in_children([Task(None, cases, tests)], 1))
    return outcomes, control
