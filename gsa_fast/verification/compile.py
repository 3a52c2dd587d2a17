"""Ahead-of-time compilation of the kernels, without a GPU.

Every launch that the public functions make for given arguments is recorded instead of run, and compiled for each target
with the specialisations that a real launch would get. It catches what the interpreter cannot: types that do not
compile, shared memory beyond the target's limit, registers spilled to the stack, and reductions that Triton lowers
wrongly.
"""

import math
import multiprocessing
import re
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import triton
from tqdm import tqdm
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.experimental.gluon._runtime import GluonASTSource
from triton.runtime.jit import JITFunction

import gsa_fast
from gsa_fast import _backend
from gsa_fast.attention import METHODS, backward, union_hopper
from gsa_fast.verification.interpreter import attention_method
from gsa_ref import GSAConfig, Selection

# Shared memory that one block may use, in bytes (CUDA C++ Programming Guide, table of technical specifications).
SHARED_MEMORY_LIMIT = {80: 166_912, 86: 101_376, 89: 101_376, 90: 232_448, 100: 232_448}

# A register cap that lets one more program run on a multiprocessor may cost a few registers outside the inner loops,
# and the kernels of the backward pass, whose accumulators fill the registers, some more inside: 176 bytes on sm_90 with
# Triton 3.6, and 208 with one key/value head for all query heads (`bench train --kv-heads 1` has its time).
MAX_STACK = 208

_POINTER_TYPES = {
    torch.float32: "*fp32", torch.float16: "*fp16", torch.bfloat16: "*bf16", torch.int32: "*i32", torch.int64: "*i64",
}  # fmt: skip


@dataclass(frozen=True)
class Launch:
    """One recorded kernel launch: what `triton.compile` needs."""

    kernel: JITFunction[Any]
    signature: tuple[tuple[str, str], ...]
    constants: tuple[tuple[str, Any], ...]
    divisible_by_16: tuple[int, ...]
    options: tuple[tuple[str, int], ...]


@dataclass(frozen=True)
class CompiledKernel:
    """What one kernel variant uses on one target."""

    kernel: str
    target: str
    signature: str
    shared_memory: int
    shared_memory_limit: int
    registers: int
    stack: int
    torn_reductions: int

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @property
    def fits(self) -> bool:
        """Whether it can be launched on the target, with at most MAX_STACK bytes of registers spilled per thread.

        And whether it reduces what it says (`torn_reductions`). A repair kernel may spill more: it has something to do
        only where a result is not finite.
        """
        allowed = math.inf if self.kernel.endswith("_repair_kernel") else MAX_STACK
        return self.shared_memory <= self.shared_memory_limit and self.stack <= allowed and not self.torn_reductions


@contextmanager
def recorded_launches(little_shared_memory: bool = False) -> Iterator[list[Launch]]:
    """Record launches on CPU tensors instead of running them. Outputs of the functions called inside are undefined.

    Args:
        little_shared_memory: what the launchers are told of the device (`_backend.little_shared_memory`).

    Raises:
        RuntimeError: the process interprets kernels (TRITON_INTERPRET=1), so there is nothing to compile.
    """
    if _backend.INTERPRETED:
        raise RuntimeError("TRITON_INTERPRET: expected unset for ahead-of-time compilation, got 1")
    launches: list[Launch] = []

    def record(self: JITFunction[Any], *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
        options = {name: kwargs.pop(name) for name in ("num_warps", "num_stages", "maxnreg") if name in kwargs}
        bound = self.signature.bind(*args, **kwargs).arguments
        signature, constants, divisible = {}, {}, []
        for i, parameter in enumerate(self.params):
            value = bound[parameter.name]
            if parameter.is_constexpr or (isinstance(value, int) and value == 1):
                signature[parameter.name] = "constexpr"
                constants[parameter.name] = value
                continue
            signature[parameter.name] = _type_of(value)
            if isinstance(value, torch.Tensor) or (isinstance(value, int) and value % 16 == 0):
                divisible.append(i)
        launch = Launch(
            self, tuple(signature.items()), tuple(constants.items()), tuple(divisible), tuple(options.items())
        )
        if launch not in launches:
            launches.append(launch)

    with (
        mock.patch.object(JITFunction, "run", record),
        mock.patch.object(_backend, "INTERPRETED", True),
        mock.patch.object(_backend, "little_shared_memory", return_value=little_shared_memory),
    ):
        yield launches


def compile_launch(launch: Launch, capability: int) -> CompiledKernel:
    """Compile one recorded launch for sm_<capability> and read what the binary uses."""
    compiled = compile_code(launch, capability)
    registers, stack = _resource_usage(compiled.asm["cubin"])
    return CompiledKernel(
        kernel=launch.kernel.__name__,
        target=f"sm_{capability}",
        signature=", ".join(f"{k}={v}" for k, v in launch.constants),
        shared_memory=compiled.metadata.shared,
        shared_memory_limit=SHARED_MEMORY_LIMIT[capability],
        registers=registers,
        stack=stack,
        torn_reductions=torn_reductions(compiled.asm["ttgir"]),
    )


def compile_code(launch: Launch, capability: int) -> Any:
    """What Triton makes of one recorded launch for sm_<capability>: `asm` holds its code in every stage."""
    attributes = {(i,): [["tt.divisibility", 16]] for i in launch.divisible_by_16}
    names = list(dict(launch.signature))
    constants = {(names.index(name),): value for name, value in launch.constants}
    source_type = GluonASTSource if launch.kernel.is_gluon() else ASTSource
    source = source_type(launch.kernel, dict(launch.signature), constants, attributes)
    return triton.compile(source, target=GPUTarget("cuda", capability, 32), options=dict(launch.options))


def torn_reductions(ttgir: str) -> int:
    """How many reductions are over threads of a warp that are not neighbours, which Triton (3.6, 3.7) lowers wrongly.

    It takes as many lane bits as the axis has, from its lowest one on, whatever lies between them: some of what belongs
    together is left out, and what belongs to another axis is taken in. Only a permuted tile has such a layout.

    Args:
        ttgir: a kernel in Triton's GPU dialect, where every tile names how it is spread over threads.
    """
    layouts = dict(re.findall(r"^(#\w+) = (#ttg\..*)$", ttgir, re.MULTILINE))
    torn = 0
    for axis, operands in re.findall(
        r'"tt\.reduce"\(.*?<\{axis = (\d+) : i32.*?\n(?:.*\n)*? *\}\) : \((.*?)\) ->', ttgir
    ):
        for layout in re.findall(r"tensor<[^,]*?, (#.*?)>(?=, tensor|$)", operands):
            on_axis = [bit for bit, basis in enumerate(_lanes(layout, layouts)) if basis[int(axis)]]
            torn += bool(on_axis) and on_axis[-1] - on_axis[0] >= len(on_axis)
    return torn


def _lanes(layout: str, layouts: dict[str, str]) -> list[list[int]]:
    """Where each bit of a thread's number in its warp moves in a tile, for a permuted layout; [] for any other.

    Those keep the threads along an axis together.
    """
    layout = layouts.get(layout, layout)
    if match := re.match(r"#ttg\.slice<\{dim = (\d+), parent = (.*)\}>$", layout):
        dim = int(match[1])
        return [basis[:dim] + basis[dim + 1 :] for basis in _lanes(match[2], layouts)]
    match = re.match(r"#ttg\.linear<\{.*?lane = (\[\[.*?\]\])", layout)
    return [[int(x) for x in basis.split(",")] for basis in re.findall(r"\[([\d, ]+)\]", match[1])] if match else []


def shipped_calls(
    dtypes: tuple[torch.dtype, ...], head_widths: tuple[int, ...], heads: tuple[tuple[int, int], ...]
) -> Iterator[Callable[[], Any]]:
    """Calls of the public functions that together launch every kernel, for the given dtypes, head widths, (H, H_kv)."""
    S, B, L = 4096, 1, 16
    config = GSAConfig(k_base=256, k_min=64, k_max=1024)
    counts = torch.zeros(B, L, dtype=torch.int32)
    scores = torch.zeros(B, L, S)
    sizes: dict[str, Any] = {"k_base": config.k_base, "k_min": config.k_min, "k_max": config.k_max}
    yield lambda: gsa_fast.score_variance(scores, impl="triton")
    yield lambda: gsa_fast.select_tokens(scores, counts, width=1024, impl="triton")
    for rule in ("proportional", "inverse", "fixed"):
        yield partial(
            gsa_fast.token_budget, scores[..., 0].contiguous(), 0.1, counts, **sizes, rule=rule, impl="triton"
        )
    for dtype in dtypes:
        for d_I in (32, 64, 128):
            q_idx, k_idx = torch.zeros(B, L, config.H_I, d_I, dtype=dtype), torch.zeros(B, S, d_I, dtype=dtype)
            inputs = q_idx, k_idx, torch.zeros(B, L, config.H_I, dtype=dtype), torch.zeros(config.H_I)
            yield partial(gsa_fast.indexer_scores, *inputs, scale=0.125, impl="triton")
            if dtype in (dtypes[0], torch.float32) or d_I == 64:
                selecting = partial(gsa_fast.indexed_selection, mean_variance=0.1, config=config, impl="triton")
                yield partial(selecting, *inputs)
                many_heads = [x.repeat_interleave(4, dim=-2 if x.ndim == 4 else -1) for x in (inputs[0], *inputs[2:])]
                yield partial(
                    selecting, many_heads[0], inputs[1], *many_heads[1:], config=replace(config, H_I=4 * config.H_I)
                )
                for sigmoid_mode in gsa_fast.selection.SIGMOID_MODES:
                    many_keys = torch.zeros(B, 32 * S, d_I, dtype=dtype)
                    yield partial(selecting, inputs[0], many_keys, *inputs[2:], sigmoid_mode=sigmoid_mode)
        for d_h in head_widths:
            for H, H_kv in heads:
                q, k = torch.zeros(B, L, H, d_h, dtype=dtype), torch.zeros(B, S, H_kv, d_h, dtype=dtype)
                selection = Selection(torch.zeros(B, L, 1024, dtype=torch.int32), counts)
                # Tiles are never chosen for float32.
                for method in METHODS if dtype != torch.float32 else ("gather",):
                    for gate in (None, q):
                        yield partial(_attend_by, method, q, k, k, selection, output_gate_logits=gate, impl="triton")
                        if method == "union" and d_h in union_hopper.HEAD_WIDTHS:
                            yield partial(_attend_on_hopper, q, k, k, selection, output_gate_logits=gate, impl="triton")
                if dtype == torch.float32 and backward.too_wide(d_h, q.device):
                    continue
                for on_hopper in (False, True) if d_h in union_hopper.HEAD_WIDTHS else (False,):
                    for deterministic in (True, False):
                        yield partial(_backward, on_hopper, deterministic, q, k, selection)
        yield partial(_backward_of_gate, q)
        yield from decode_calls(dtype, head_widths, heads)
        yield from training_calls(dtype, head_widths, heads)


def training_calls(
    dtype: torch.dtype, head_widths: tuple[int, ...], heads: tuple[tuple[int, int], ...]
) -> Iterator[Callable[[], Any]]:
    """Calls of `indexer_kl_loss` in both phases, with gradients."""
    L, S, K, H_I = 16, 4096, 1024, 4
    selection = Selection(torch.zeros(1, L, K, dtype=torch.int32), torch.zeros(1, L, dtype=torch.int32))
    sizes = [(d_h, H, H_kv, 64) for d_h in head_widths for H, H_kv in heads]
    sizes += [(head_widths[0], *heads[0], d_I) for d_I in (128,)]
    for d_h, H, H_kv, d_I in sizes:
        q_idx, k_idx = torch.zeros(1, L, H_I, d_I, dtype=dtype), torch.zeros(1, S, d_I, dtype=dtype)
        inputs = q_idx, k_idx, torch.zeros(1, L, H_I, dtype=dtype), torch.zeros(H_I, requires_grad=True)
        attended = torch.zeros(1, L, H, d_h, dtype=dtype), torch.zeros(1, S, H_kv, d_h, dtype=dtype)
        loss = partial(gsa_fast.indexer_kl_loss, *inputs, *attended, indexer_scale=0.125, impl="triton")
        yield from (loss, partial(loss, selection=selection))


def decode_calls(
    dtype: torch.dtype, head_widths: tuple[int, ...], heads: tuple[tuple[int, int], ...]
) -> Iterator[Callable[[], Any]]:
    """Calls of `decode_attention` for one and for many queries, keys, heads and channels."""
    for S, k_max, L, H_I, d_I in (
        (4096, 1024, 1, 4, 64),
        (131072, 4096, 1, 4, 64),
        (131072, 4096, 8, 4, 64),
        (131072, 16384, 1, 1, 32),
        (131072, 4096, 8, 8, 128),
    ):
        for d_h in head_widths if S == 4096 else head_widths[:1]:
            for H, H_kv in heads if S == 4096 else heads[:1]:
                B = 1 if L == 1 else 2  # so few rows that each finds its own bound, and more
                q, k = torch.zeros(B, L, H, d_h, dtype=dtype), torch.empty(B, S, H_kv, d_h, dtype=dtype)
                q_idx, k_idx = torch.zeros(B, L, H_I, d_I, dtype=dtype), torch.empty(B, S, d_I, dtype=dtype)
                yield partial(
                    gsa_fast.decode_attention,
                    *(q, k, k, q_idx, k_idx, torch.zeros(B, L, H_I, dtype=dtype), torch.zeros(H_I)),
                    mean_variance=0.1,
                    config=GSAConfig(k_base=256, k_min=64, k_max=k_max, H_I=H_I, d_I=d_I),
                    start=S - L,
                    output_gate_logits=q if d_h == head_widths[0] else None,
                    sigmoid_mode=gsa_fast.selection.SIGMOID_MODES[H_I == 1],
                    impl="triton",
                )


def _attend_by(method: str, *args: Any, **kwargs: Any) -> Any:
    with attention_method(method):
        return gsa_fast.sparse_attention(*args, **kwargs)


def _attend_on_hopper(*args: Any, **kwargs: Any) -> Any:
    with mock.patch.object(union_hopper, "on_hopper", return_value=True):
        return _attend_by("union", *args, **kwargs)


def _backward(on_hopper: bool, deterministic: bool, q: torch.Tensor, k: torch.Tensor, selection: Selection) -> None:
    with mock.patch.object(union_hopper, "on_hopper", return_value=on_hopper):
        q = q.detach().requires_grad_()
        options: dict[str, Any] = {"output_gate_logits": q, "deterministic": deterministic, "impl": "triton"}
        out, lse = gsa_fast.sparse_attention(q, k, k, selection, **options)
        torch.autograd.grad((out, lse), q, (torch.zeros_like(out), torch.zeros_like(lse)))


def _backward_of_gate(x: torch.Tensor) -> None:
    x = x.detach().requires_grad_()
    out = gsa_fast.apply_gate(x, x, impl="triton")
    torch.autograd.grad(out, x, torch.zeros_like(out))


def compile_shipped(
    capabilities: tuple[int, ...],
    dtypes: tuple[torch.dtype, ...] = (torch.bfloat16, torch.float16, torch.float32),
    head_widths: tuple[int, ...] = (64, 96, 128, 192, 256),
    heads: tuple[tuple[int, int], ...] = ((8, 8), (32, 8), (32, 1)),
    jobs: int = 1,
    only: tuple[str, ...] = (),
) -> list[CompiledKernel]:
    """Compile every kernel variant that the package ships for these dtypes and head widths, with a progress bar.

    With names in `only`, those of these kernels. `jobs` processes share the variants; the result is the same.

    Raises:
        ValueError: no kernel has a name of `only`.
    """
    work: list[tuple[Launch, int]] = []
    names: set[str] = set()
    for capability in capabilities:
        with recorded_launches(SHARED_MEMORY_LIMIT[capability] < _backend.LARGE_SHARED_MEMORY) as launches:
            for call in shipped_calls(dtypes, head_widths, heads):
                call()
        names |= {launch.kernel.__name__ for launch in launches}
        wanted = [launch for launch in launches if not only or launch.kernel.__name__ in only]
        work += [(launch, capability) for launch in wanted if capability == 90 or not launch.kernel.is_gluon()]
    if unknown := sorted(set(only) - names):
        raise ValueError(f"only: expected some of {sorted(names)}, got {unknown}")
    bar = partial(tqdm, total=len(work), unit="kernel", leave=False, disable=None)
    if jobs == 1:
        return [compile_launch(*item) for item in bar(work)]
    # A launch holds a function, which no pipe carries: forked processes have it already.
    with multiprocessing.get_context("fork").Pool(jobs, _inherit, (work,)) as pool:
        return list(bar(pool.imap(_compile_inherited, range(len(work)))))


_inherited: list[tuple[Launch, int]] = []


def _inherit(work: list[tuple[Launch, int]]) -> None:
    _inherited[:] = work


def _compile_inherited(i: int) -> CompiledKernel:
    return compile_launch(*_inherited[i])


def summary(kernels: list[CompiledKernel]) -> list[dict[str, Any]]:
    """What the variants of each kernel use at most, by target and kernel; those that do not fit one by one."""
    groups: dict[tuple[str, str], list[CompiledKernel]] = {}
    for k in kernels:
        groups.setdefault((k.target, k.kernel), []).append(k)
    return [
        {
            "target": target,
            "kernel": kernel,
            "variants": len(group),
            "shared_memory": max(k.shared_memory for k in group),
            "shared_memory_limit": group[0].shared_memory_limit,
            "registers": max(k.registers for k in group),
            "stack": max(k.stack for k in group),
            "misfits": [k.to_dict() for k in group if not k.fits],
        }
        for (target, kernel), group in sorted(groups.items())
    ]


def _type_of(value: Any) -> str:
    if isinstance(value, torch.Tensor):
        return _POINTER_TYPES[value.dtype]
    if isinstance(value, float):
        return "fp32"
    return "i32" if -(2**31) <= value < 2**31 else "i64"


def _resource_usage(cubin: bytes) -> tuple[int, int]:
    """Registers and stack bytes per thread, as `cuobjdump` from Triton's package reports them."""
    cuobjdump = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        report = subprocess.run([cuobjdump, "-res-usage", file.name], check=True, capture_output=True, text=True).stdout
    found = re.search(r"REG:(\d+) STACK:(\d+)", report)
    if found is None:
        raise RuntimeError(f"cuobjdump: expected REG and STACK in its report, got {report!r}")
    return int(found[1]), int(found[2])
