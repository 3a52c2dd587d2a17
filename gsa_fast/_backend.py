"""Which implementation a call runs on: the Triton kernels or the reference."""

import warnings

import torch
from torch import Tensor
from triton import knobs

from gsa_ref._arguments import check_choice

IMPLS = ("auto", "triton", "reference")
KERNEL_DTYPES = (torch.float32, torch.float16, torch.bfloat16)

# Triton reads the variable when a kernel is defined, that is when this package is imported.
INTERPRETED: bool = knobs.runtime.interpret

# What the largest tiles with all stages of their pipelines need, in bytes, rounded up to a power of two.
LARGE_SHARED_MEMORY = 131_072

_fallback_announced = False


def use_triton(impl: str, **tensors: Tensor | None) -> bool:
    """Decide from metadata whether the Triton kernels serve this call. `tensors` are the floating-point arguments.

    Raises:
        TypeError: impl is not a str.
        ValueError: impl is unknown, or "triton" was asked for tensors that the kernels cannot reach.
        NotImplementedError: a dtype that the reference takes and the kernels do not.
    """
    check_choice("impl", impl, IMPLS)
    if impl == "reference":
        return False
    given = {name: t for name, t in tensors.items() if t is not None}
    name, first = next(iter(given.items()))
    on_gpu = first.device.type == "cuda"
    if impl == "auto" and not on_gpu:
        _announce_fallback(first.device)
        return False
    if not on_gpu and not (INTERPRETED and first.device.type == "cpu"):
        raise ValueError(
            f"impl: 'triton' needs CUDA tensors, or CPU tensors with TRITON_INTERPRET=1 set before gsa_fast is "
            f"imported; {name} is on {first.device}"
        )
    for name, tensor in given.items():
        if tensor.dtype not in KERNEL_DTYPES:
            raise NotImplementedError(
                f"{name}: the kernels take float32, float16 or bfloat16, got {tensor.dtype}; use impl='reference'"
            )
    return True


def little_shared_memory(device: torch.device) -> bool:
    """Whether a thread block gets too little shared memory for the largest tiles with all stages of their pipelines.

    So it is on devices of compute capability 8.6, 8.9 and 12.0 (99 KiB), but not on 8.0, 9.0 and 10.0.
    """
    if device.type != "cuda":
        return False
    properties = torch.cuda.get_device_properties(device)
    return properties.shared_memory_per_block_optin < LARGE_SHARED_MEMORY  # type: ignore[attr-defined]  # not in the stub


def _announce_fallback(device: torch.device) -> None:
    global _fallback_announced
    if not _fallback_announced:
        _fallback_announced = True
        warnings.warn(
            f"gsa_fast: tensors are on {device}, so impl='auto' runs the reference (gsa_ref), not the Triton kernels",
            stacklevel=4,
        )


def per_sequence(value: int | Tensor | None, default: int, batch: int, device: torch.device) -> Tensor:
    """`start` or `lengths` as the int32 [B] tensor that the kernels read."""
    if isinstance(value, Tensor):
        return value.contiguous()
    return torch.full((batch,), default if value is None else value, dtype=torch.int32, device=device)


def no_backward(name: str) -> None:
    """Make a custom op say that it has no gradient, in words, when a backward pass reaches it."""

    def backward(ctx: object, *gradients: Tensor) -> None:
        raise NotImplementedError(
            f"gsa_fast.{name} has no backward kernel yet: pass impl='reference' (or use gsa_ref) to train"
        )

    torch.library.register_autograd(f"gsa_fast::{name}", backward)
