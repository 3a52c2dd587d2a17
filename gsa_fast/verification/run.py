"""Draw cases, run the checks, report: the work of `python -m gsa_fast verify`."""

import platform
import sys
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from multiprocessing import get_context
from typing import Any

import hypothesis
import torch
import triton
from hypothesis import HealthCheck, Phase, Verbosity
from tqdm import tqdm

from gsa_fast.verification.checks import CHECKS
from gsa_fast.verification.interpreter import enable_interpreter_checks, small_tiles
from gsa_fast.verification.records import code_version
from gsa_ref.cases import STRATEGIES, Case, DecodeCase, Limits

# Stems that read float32 scores, whatever the dtype of the model.
SCORE_STEMS = ("budget", "selection")
DTYPES = ("float32", "float16", "bfloat16")
STEMS = tuple(CHECKS)

INTERPRETER_LIMITS = Limits()
INTERPRETER_LIMITS_OF = {
    "attention": Limits(S=150),  # several blocks of 64 keys
    "attention_backward": Limits(S=100),  # several blocks of 32 keys
    "indexed_selection": Limits(S=240),  # with `small_tiles`, most rows are then sampled
    "decode": Limits(L=3, S=60, group=3),
    "training": Limits(L=20, S=60, group=3, width=60),
}
GPU_LIMITS = Limits(
    B=2, L=8192, S=1536, heads=4, group=8, width=512, channels=256,
    lengths=(1, 5, 64, 65, 130, 257, 512, 1000, 2048, 4096, 8192),
)  # fmt: skip
# The gold of the layer, and of gradients, holds the gathered keys in float64: 2048 queries of it fit any GPU.
GPU_LAYER_LIMITS = Limits(
    B=2, L=2048, S=384, heads=2, group=4, width=128, channels=256, lengths=(1, 5, 64, 65, 257, 512, 1000, 2048)
)
# Gold holds the logits of all heads and pairs in float64.
GPU_TRAINING_LIMITS = Limits(
    B=2, L=1024, S=1536, heads=2, group=4, width=256, channels=256, lengths=(1, 5, 64, 65, 130, 257, 1000)
)

# Cases per stem. The interpreter runs a program in milliseconds, so selections and whole layers get fewer there.
GPU_EXAMPLES, GPU_QUICK_EXAMPLES = 40, 6
INTERPRETER_EXAMPLES = {
    "indexer": 200, "budget": 100, "gates": 200, "attention": 60, "selection": 40, "indexed_selection": 100,
    "layer": 30, "decode": 60, "attention_backward": 20, "training": 100,
}  # fmt: skip
INTERPRETER_QUICK_EXAMPLES = {
    "indexer": 30, "budget": 15, "selection": 8, "indexed_selection": 6, "attention": 8, "gates": 30, "layer": 5,
    "decode": 6, "attention_backward": 3, "training": 6,
}  # fmt: skip

SHRINK_SECONDS = 20.0
# After ten cases Hypothesis mostly copies one part of a case to another, so that cases resemble one another and shrink.
SHARD_CASES = 10
SHARDS_PER_SEED = 1000


@dataclass
class Row:
    """One line of the table: a stem in a dtype. Error and budget are those of the case that came nearest its budget."""

    stem: str
    dtype: str
    cases: int = 0
    worst_error: float = 0.0
    budget: float = 0.0
    ratio: float = 0.0
    longest: int = 0
    seconds: float = 0.0
    verdict: str = "not run"
    detail: str = ""
    smallest_failure: str = ""

    @property
    def failed(self) -> bool:
        return self.verdict == "FAIL"


def limits_for(stem: str, device: str) -> Limits:
    if device == "cpu":
        return INTERPRETER_LIMITS_OF.get(stem, INTERPRETER_LIMITS)
    limits = {
        "layer": GPU_LAYER_LIMITS, "attention_backward": GPU_LAYER_LIMITS, "training": GPU_TRAINING_LIMITS
    }  # fmt: skip
    return limits.get(stem, GPU_LIMITS)


def check_case(case: Case, device: str, row: Row) -> None:
    """Run one case and fold its verdicts into the row.

    Raises:
        AssertionError: a verdict is negative. Whatever a kernel raises passes through.
    """
    for verdict in CHECKS[case.stem](case, device):
        ratio = verdict.error / verdict.budget if verdict.budget > 0 else (0.0 if verdict.error == 0 else float("inf"))
        if ratio >= row.ratio:
            row.ratio, row.worst_error, row.budget = ratio, verdict.error, verdict.budget
        if not verdict:
            raise AssertionError(f"error {verdict.error:.3g}, budget {verdict.budget:.3g}. {verdict.detail}")


# Python 3.11 maps and unmaps a block of memory at every call from a frame at the end of one, which can double the time
# of the interpreter. A frame that asks for much gets a block in which those of all deeper calls fit.
check_case.__code__ = check_case.__code__.replace(co_stacksize=2**15)


def verify_row(
    stem: str, dtype: str, device: str, examples: int, seed: int, on_case: Callable[[], None] = lambda: None
) -> Row:
    """Check `examples` random cases of one stem in one dtype; on a failure, look for a smaller one for a while."""
    row = Row(stem, dtype)
    smallest: Case | None = None
    first_failure = 0.0
    started = time.monotonic()

    @hypothesis.seed(seed)
    @hypothesis.settings(
        max_examples=examples,
        database=None,
        deadline=None,
        verbosity=Verbosity.quiet,
        suppress_health_check=list(HealthCheck),
        phases=[Phase.generate, Phase.shrink],
        report_multiple_bugs=False,
        print_blob=False,
    )
    @hypothesis.given(case=STRATEGIES[stem](dtype, limits_for(stem, device)))
    def every_case_stays_in_its_budget(case: Case) -> None:
        nonlocal smallest, first_failure
        if smallest is not None and time.monotonic() - first_failure > SHRINK_SECONDS:
            return  # enough shrinking
        if smallest is None:
            row.cases += 1
            length = case.S if isinstance(case, DecodeCase) else case.L  # type: ignore[attr-defined]
            row.longest = max(row.longest, length)
            on_case()
        try:
            check_case(case, device, row)
        except Exception as error:
            # Any exception is a failure of the kernel under test, and the report shows it.
            first_failure = first_failure or time.monotonic()
            smallest = case
            row.detail = f"{type(error).__name__}: {error}"
            raise

    try:
        every_case_stays_in_its_budget()
    except BaseException:
        if smallest is None:
            raise
    row.verdict = "pass" if smallest is None else "FAIL"
    row.smallest_failure = "" if smallest is None else smallest.to_json()
    row.seconds = time.monotonic() - started
    return row


@dataclass(frozen=True)
class Shard:
    """Some of the cases of one row: shards are what processes share."""

    stem: str
    dtype: str
    device: str
    examples: int
    seed: int


def shards_of(
    stems: tuple[str, ...], dtypes: tuple[str, ...], device: str, examples: dict[str, int], seed: int
) -> list[Shard]:
    """The cases of every row, at most SHARD_CASES at a time, each shard with its own seed."""
    shards = []
    for stem in stems:
        kept = [dtype for dtype in dtypes if dtype == "float32" or stem not in SCORE_STEMS]
        for dtype in kept:
            for i, first in enumerate(range(0, examples[stem], SHARD_CASES)):
                n = min(SHARD_CASES, examples[stem] - first)
                shards.append(Shard(stem, dtype, device, n, SHARDS_PER_SEED * seed + i))
    return shards


def share_devices(started: Any) -> None:
    """Give a new process its turn of the GPUs. `started` counts the processes."""
    if torch.cuda.device_count() > 1:
        with started.get_lock():
            torch.cuda.set_device(started.value % torch.cuda.device_count())
            started.value += 1


def verify_shard(shard: Shard) -> Row:
    """One shard in a process of its own."""
    torch.set_num_threads(1)
    with prepared(shard.device):
        return verify_row(shard.stem, shard.dtype, shard.device, shard.examples, shard.seed)


@contextmanager
def prepared(device: str) -> Iterator[None]:
    """The interpreter with its checks on and tiles that suit it, if that is where the kernels run."""
    if device != "cpu":
        yield
        return
    enable_interpreter_checks()
    warnings.filterwarnings("ignore", category=RuntimeWarning, module="triton.runtime.interpreter")
    with small_tiles():
        yield


def merge(rows: list[Row]) -> Row:
    """The shards of one row as one: its worst case is theirs, and so is its first failure."""
    worst = max(rows, key=lambda row: row.ratio)
    failed = next((row for row in rows if row.failed), None)
    return replace(
        worst,
        cases=sum(row.cases for row in rows),
        longest=max(row.longest for row in rows),
        seconds=sum(row.seconds for row in rows),
        verdict="FAIL" if failed else "pass",
        detail=failed.detail if failed else "",
        smallest_failure=failed.smallest_failure if failed else "",
    )


def verify(
    stems: tuple[str, ...], dtypes: tuple[str, ...], device: str, examples: dict[str, int], seed: int, jobs: int = 1
) -> list[Row]:
    """All rows of the table. With several jobs, shards run in as many processes, which share the GPUs.

    The cases do not depend on `jobs`. Progress goes to stderr: a bar in a terminal, elsewhere a line for every row.
    """
    shards = shards_of(stems, dtypes, device, examples, seed)
    found: dict[tuple[str, str], list[Row]] = {(shard.stem, shard.dtype): [] for shard in shards}
    left = Counter((shard.stem, shard.dtype) for shard in shards)
    started = time.monotonic()

    def finish(shard: Shard, row: Row) -> None:
        name = shard.stem, shard.dtype
        found[name].append(row)
        left[name] -= 1
        if not left[name] and not sys.stderr.isatty():
            whole = merge(found[name])
            seconds = time.monotonic() - started
            print(f"{seconds:5.0f} s  {whole.stem} {whole.dtype}: {whole.verdict}", file=sys.stderr, flush=True)

    with tqdm(total=sum(shard.examples for shard in shards), unit="case", leave=False, disable=None) as bar:
        if jobs == 1:
            for shard in shards:
                bar.set_description(f"{shard.stem} {shard.dtype}")
                row = verify_row(shard.stem, shard.dtype, device, shard.examples, shard.seed, bar.update)
                bar.update(max(0, shard.examples - row.cases))  # hypothesis stops early when it has seen every case
                finish(shard, row)
        else:
            context = get_context("spawn")
            with ProcessPoolExecutor(jobs, context, share_devices, (context.Value("i", 0),)) as pool:
                running = {pool.submit(verify_shard, shard): shard for shard in shards}
                for done in as_completed(running):
                    finish(running[done], done.result())
                    bar.update(running[done].examples)
    return [merge(rows) for rows in found.values()]


def format_table(rows: list[Row]) -> str:
    """The table that people read."""
    header = ("stem", "dtype", "cases", "longest", "worst error", "budget", "used", "verdict")
    lines = [header]
    for r in rows:
        used = "-" if r.cases == 0 else "exact" if r.budget == 0 and r.ratio == 0 else f"{100 * r.ratio:.0f}%"
        lines.append(
            (r.stem, r.dtype, str(r.cases), str(r.longest), f"{r.worst_error:.2e}", f"{r.budget:.2e}", used, r.verdict)
        )
    widths = [max(len(line[i]) for line in lines) for i in range(len(header))]
    right = {2, 3, 4, 5, 6}

    def render(line: tuple[str, ...]) -> str:
        cells = (c.rjust(w) if i in right else c.ljust(w) for i, (c, w) in enumerate(zip(line, widths, strict=True)))
        return "  ".join(cells).rstrip()

    return "\n".join([render(header), "  ".join("-" * w for w in widths), *(render(line) for line in lines[1:])])


def record(rows: list[Row], device: str, command: str, seed: int) -> dict[str, Any]:
    """What `--json` writes: enough to run it again. Every row says which command it is of."""
    origin = {"command": command, **code_version()}
    return {
        "suite": "verification",
        "device": torch.cuda.get_device_name() if device == "cuda" else "Triton interpreter on a CPU",
        "torch": torch.__version__,
        "triton": triton.__version__,
        "python": platform.python_version(),
        "seed": seed,
        "rows": [asdict(row) | origin for row in rows],
    }
