"""Ahead-of-time compilation of the kernels, without a GPU.

Every launch that the public functions make for given arguments is recorded instead of run, and compiled for each target
with the specialisations that a real launch would get. It catches what the interpreter cannot: types that do not
compile, shared memory beyond the target's limit, registers spilled to the stack.
"""

import re
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction

from gsa_fast import _backend

# Shared memory that one block may use, in bytes (CUDA C++ Programming Guide, table of technical specifications).
SHARED_MEMORY_LIMIT = {80: 166_912, 86: 101_376, 89: 101_376, 90: 232_448, 100: 232_448}

_POINTER_TYPES = {torch.float32: "*fp32", torch.float16: "*fp16", torch.bfloat16: "*bf16", torch.int32: "*i32"}


@dataclass(frozen=True)
class Launch:
    """One recorded kernel launch: what `triton.compile` needs."""

    kernel: JITFunction[Any]
    signature: tuple[tuple[str, str], ...]
    constants: tuple[tuple[str, Any], ...]
    divisible_by_16: tuple[int, ...]


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

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @property
    def fits(self) -> bool:
        """Whether it can be launched on the target, without a stack frame."""
        return self.shared_memory <= self.shared_memory_limit and self.stack == 0


@contextmanager
def recorded_launches() -> Iterator[list[Launch]]:
    """Record launches on CPU tensors instead of running them. Outputs of the functions called inside are undefined.

    Raises:
        RuntimeError: the process interprets kernels (TRITON_INTERPRET=1), so there is nothing to compile.
    """
    if _backend.INTERPRETED:
        raise RuntimeError("TRITON_INTERPRET: expected unset for ahead-of-time compilation, got 1")
    launches: list[Launch] = []

    def record(self: JITFunction[Any], *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
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
        launch = Launch(self, tuple(signature.items()), tuple(constants.items()), tuple(divisible))
        if launch not in launches:
            launches.append(launch)

    with mock.patch.object(JITFunction, "run", record), mock.patch.object(_backend, "INTERPRETED", True):
        yield launches


def compile_launch(launch: Launch, capability: int) -> CompiledKernel:
    """Compile one recorded launch for sm_<capability> and read what the binary uses."""
    attributes = {(i,): [["tt.divisibility", 16]] for i in launch.divisible_by_16}
    names = list(dict(launch.signature))
    constants = {(names.index(name),): value for name, value in launch.constants}
    source = ASTSource(launch.kernel, dict(launch.signature), constants, attributes)
    compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32))
    registers, stack = _resource_usage(compiled.asm["cubin"])
    return CompiledKernel(
        kernel=launch.kernel.__name__,
        target=f"sm_{capability}",
        signature=", ".join(f"{k}={v}" for k, v in launch.constants),
        shared_memory=compiled.metadata.shared,
        shared_memory_limit=SHARED_MEMORY_LIMIT[capability],
        registers=registers,
        stack=stack,
    )


def compile_call(call: Callable[[], Any], capabilities: tuple[int, ...]) -> list[CompiledKernel]:
    """Compile every kernel that `call` launches, for every target."""
    with recorded_launches() as launches:
        call()
    return [compile_launch(launch, capability) for launch in launches for capability in capabilities]


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
