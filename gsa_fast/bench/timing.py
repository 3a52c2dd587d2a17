"""How long a call takes on the device, how much memory it needs, and what the machine's ceilings are."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from gsa_fast.bench.rooflines import Ceilings

SECONDS = 0.6  # of measurement per case
LEAST, MOST = 5, 200  # repetitions
LONG_SECONDS = 5.0  # a call that takes longer is measured once, after one warm-up


@dataclass(frozen=True)
class Timing:
    """Milliseconds of one call (median, 20th and 80th percentile), and the memory it took beyond its result.

    `graph` says whether a captured graph was replayed; `reason` why not, where it was asked for.
    """

    median: float
    p20: float
    p80: float
    repetitions: int
    peak_bytes: int
    graph: bool
    reason: str = ""


def result_bytes(result: Any) -> int:
    """Bytes of the tensors in a result, nested tuples included."""
    if isinstance(result, Tensor):
        return result.numel() * result.element_size()
    return sum(result_bytes(part) for part in result) if isinstance(result, tuple | list) else 0


def repetitions(seconds: float, budget: float) -> int:
    """How often to repeat a call that takes `seconds`: fill the budget, but at least 5 (3 if it takes a second)."""
    least = LEAST if seconds < 1 else 3
    return max(least, min(MOST, int(budget / max(seconds, 1e-9))))


def percentiles(milliseconds: list[float]) -> tuple[float, float, float]:
    """Median, 20th and 80th percentile."""
    times = torch.tensor(milliseconds, dtype=torch.float64)
    median, low, high = times.quantile(torch.tensor([0.5, 0.2, 0.8], dtype=torch.float64)).tolist()
    return median, low, high


def take_turns(calls: list[Callable[[], Any]]) -> Callable[[], Any]:
    """One call that makes them all in order, for `measure(..., turns=len(calls))`; its result is the last one's."""

    def turn() -> Any:
        for call in calls[:-1]:
            call()
        return calls[-1]()

    return turn


def measure(  # pragma: no cover  needs a GPU
    call: Callable[[], Any], *, graph: bool, seconds: float = SECONDS, turns: int = 1
) -> Timing:
    """Time `call` with CUDA events: two warm-ups, then repetitions that are queued without waiting in between.

    The first warm-up gives the peak memory: what was allocated at most during the call, less what was allocated before
    and less the result. With `graph`, a captured graph is replayed instead of the call; if it cannot be captured, the
    call is timed and `reason` says so. A call that consists of `turns` calls gives the time of one of them.
    """
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    result = call()
    torch.cuda.synchronize()
    peak = torch.cuda.max_memory_allocated() - before - result_bytes(result)
    del result

    run, reason = call, ""
    if graph:
        captured = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(captured):
                call()
            run = captured.replay
        except RuntimeError as error:
            reason = f"not captured as a graph: {first_line(error)}"
            torch.cuda.synchronize()
    estimate = _event_times(run, 1)[0]
    if estimate > 1000 * LONG_SECONDS:
        times = [estimate]
    else:
        times = _event_times(run, repetitions(estimate / 1000, seconds))
    return Timing(*percentiles([time / turns for time in times]), len(times), peak, graph and not reason, reason)


def _event_times(run: Callable[[], Any], n: int) -> list[float]:  # pragma: no cover  needs a GPU
    events = [(torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in range(n)]
    for start, end in events:
        start.record()
        run()
        end.record()
    torch.cuda.synchronize()
    return [start.elapsed_time(end) for start, end in events]


def first_line(error: BaseException) -> str:
    """The message of an error without its stack: records hold no paths of a machine."""
    return f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else 'no message'}"


@triton.jit
def gather_rows_kernel(table_ptr, index_ptr, out_ptr, n, D: tl.constexpr, BLOCK: tl.constexpr):
    """Sum n rows of a table at random places: each program reads n·D elements and writes D."""
    pid = tl.program_id(0).to(tl.int64)
    c = tl.arange(0, D)
    total = tl.zeros([BLOCK, D], tl.float32)
    for first in range(0, n, BLOCK):
        row = tl.load(index_ptr + pid * n + first + tl.arange(0, BLOCK)).to(tl.int64)
        total += tl.load(table_ptr + row[:, None] * D + c[None, :]).to(tl.float32)
    tl.store(out_ptr + pid * D + c, tl.sum(total, axis=0))


@triton.jit
def exponentials_kernel(x_ptr, n, BLOCK: tl.constexpr):
    """x ← 2^−x, n times: one special-function operation per element and step."""
    p_x = x_ptr + tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(p_x)
    for _ in range(n):
        x = tl.exp2(-x)
    tl.store(p_x, x)


def gather_rows(table: Tensor, index: Tensor) -> Tensor:
    """Sums of the rows of `table` [S, D] that each row of `index` [programs, n] names: float32 [programs, D]."""
    programs, n = index.shape
    out = torch.empty(programs, table.shape[1], dtype=torch.float32, device=table.device)
    gather_rows_kernel[(programs,)](table, index, out, n, D=table.shape[1], BLOCK=64, num_stages=4)
    return out


def repeated_exponentials(x: Tensor, n: int) -> None:
    """x ← 2^−x, n times, in place; x has a multiple of 1024 elements."""
    exponentials_kernel[(x.numel() // 1024,)](x, n, BLOCK=1024)


def measure_ceilings(
    names: Iterable[str] = ("matmul", "copy", "gather", "special"), *, device: str = "cuda", seconds: float = 0.3
) -> tuple[Ceilings, dict[str, Timing]]:
    """The ceilings of `Ceilings`, or those named, and their timings; the others stay infinite.

    copy: 2 GiB to another 2 GiB, both directions counted. gather: 8,192 programs read 2,048 random rows of 256 bytes
    each from a table of 32 MiB, which fits the L2 cache. matmul: 8192³ in bf16. special: 2^−x in a loop.
    """
    n, steps = 8192, 4096

    def copy() -> tuple[Callable[[], Any], float]:
        source = torch.empty(2**30, dtype=torch.bfloat16, device=device).normal_()
        target = torch.empty_like(source)
        return lambda: target.copy_(source), 2 * result_bytes(source)

    def gather() -> tuple[Callable[[], Any], float]:
        table = torch.randn(131072, 128, dtype=torch.bfloat16, device=device)
        index = torch.randint(131072, (8192, 2048), dtype=torch.int32, device=device)
        return lambda: gather_rows(table, index), index.numel() * 128 * table.element_size()

    def matmul() -> tuple[Callable[[], Any], float]:
        a, b = (torch.randn(n, n, dtype=torch.bfloat16, device=device) for _ in range(2))
        return lambda: a @ b, 2 * n**3

    def special() -> tuple[Callable[[], Any], float]:
        x = torch.rand(2**22, device=device)
        return lambda: repeated_exponentials(x, steps), x.numel() * steps

    makers = {"matmul": matmul, "copy": copy, "gather": gather, "special": special}
    timings, rates = {}, {}
    for name in names:
        call, done = makers[name]()
        timings[name] = measure(call, graph=False, seconds=seconds)
        rates[name] = done / (1e-3 * timings[name].median)
        del call
    return Ceilings(**rates), timings
