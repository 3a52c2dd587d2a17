"""Make the Triton interpreter compute bfloat16.

Triton 3.6 to 3.9 store a bfloat16 tile as its raw uint16 bits and then do arithmetic on the bits, and truncate where a
GPU rounds to nearest even. Here every operation on bfloat16 is computed in float32 and rounded once, as the hardware
does; a dot takes the exact products in float32.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import numpy as np
import triton.language as tl


def bf16_to_float32(bits: np.ndarray) -> np.ndarray:
    """Exact: bfloat16 is the upper half of a float32."""
    return (bits.astype(np.uint32) << 16).view(np.float32)


def float32_to_bf16(x: np.ndarray) -> np.ndarray:
    """Round to nearest, ties to even; NaN stays NaN."""
    bits = np.ascontiguousarray(x, np.float32).view(np.uint32)
    rounded = (bits.astype(np.uint64) + 0x7FFF + ((bits >> 16) & 1)) >> 16
    return np.where(np.isnan(x), 0x7FC0, rounded).astype(np.uint16)


def is_bf16(handle: Any) -> bool:
    # A comparison keeps the dtype of its operands on the handle; its data is bool by then.
    return handle.dtype.scalar == tl.bfloat16 and handle.data.dtype == np.uint16


@contextmanager
def exact_bfloat16() -> Iterator[None]:
    """Patch the interpreter for the duration of the block."""
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

    def upcast(handle: Any) -> Any:
        return TensorHandle(bf16_to_float32(handle.data), tl.float32) if is_bf16(handle) else handle

    def elementwise(original: Callable[..., Any]) -> Callable[..., Any]:
        def run(self: Any, *arguments: Any) -> Any:
            *handles, op = arguments
            if not any(is_bf16(h) for h in handles):
                return original(self, *arguments)
            result = original(self, *(upcast(h) for h in handles), op)
            if result.data.dtype == np.float32:
                return TensorHandle(float32_to_bf16(result.data), tl.bfloat16)
            return result

        return run

    def cast(original: Callable[..., Any]) -> Callable[..., Any]:
        def run(self: Any, source: Any, target: Any, *rounding: Any) -> Any:
            if is_bf16(source):
                if target.scalar == tl.bfloat16:
                    return source
                source = upcast(source)
                return source if target.scalar == tl.float32 else original(self, source, target, *rounding)
            if target.scalar == tl.bfloat16:
                return TensorHandle(float32_to_bf16(source.data.astype(np.float32)), tl.bfloat16)
            return original(self, source, target, *rounding)

        return run

    def dot(self: Any, a: Any, b: Any, *rest: Any) -> Any:
        return original_dot(self, upcast(a), upcast(b), *rest)

    original_dot = InterpreterBuilder.create_dot
    patches = {
        "binary_op": elementwise(InterpreterBuilder.binary_op),
        "unary_op": elementwise(InterpreterBuilder.unary_op),
        "cast_impl": cast(InterpreterBuilder.cast_impl),
        "create_fp_to_fp": cast(InterpreterBuilder.create_fp_to_fp),
        "create_dot": dot,
    }
    with mock.patch.multiple(InterpreterBuilder, **patches):
        yield
