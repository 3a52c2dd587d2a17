"""Gates (Eq. 9 and Eq. 10): kernels, custom ops with their gradients. `sparse_attention` fuses the output gate."""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

import gsa_ref
from gsa_fast._backend import use_triton
from gsa_fast._primitives import stable_sigmoid
from gsa_ref._arguments import check_gate_arguments


@triton.jit
def unravel(i, n1, n2, n3):
    """The four indices of element i of a contiguous tensor whose last three axes are n1, n2 and n3 long."""
    i3 = i % n3
    i2 = (i // n3) % n2
    i1 = (i // n3 // n2) % n1
    i0 = i // n3 // n2 // n1
    return i0, i1, i2, i3


@triton.jit
def apply_gate_kernel(
    x_ptr, gate_ptr, out_ptr,
    stride_x0, stride_x1, stride_x2, stride_x3,
    stride_g0, stride_g1, stride_g2, stride_g3,
    n1, n2, n3, n_elements,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """out = x ⊙ σ(gate), computed in float32 and rounded once; out is contiguous, x and gate have any strides."""
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)  # [BLOCK] flat index of the output
    inside = i < n_elements
    i0, i1, i2, i3 = unravel(i, n1, n2, n3)
    p_x = x_ptr + i0 * stride_x0 + i1 * stride_x1 + i2 * stride_x2 + i3 * stride_x3
    p_gate = gate_ptr + i0 * stride_g0 + i1 * stride_g1 + i2 * stride_g2 + i3 * stride_g3
    x = tl.load(p_x, mask=inside, other=0.0).to(tl.float32)
    gate = tl.load(p_gate, mask=inside, other=0.0).to(tl.float32)
    tl.store(out_ptr + i, (x * stable_sigmoid(gate)).to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit
def apply_gate_backward_kernel(
    dout_ptr, x_ptr, gate_ptr, dx_ptr, dgate_ptr,
    stride_o0, stride_o1, stride_o2, stride_o3,
    stride_x0, stride_x1, stride_x2, stride_x3,
    stride_g0, stride_g1, stride_g2, stride_g3,
    n1, n2, n3, n_elements,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """dx = dout ⊙ σ(g) and dg = dout ⊙ x ⊙ σ(g) σ(−g), because σ' = σ(1 − σ); both are contiguous."""
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)  # [BLOCK] flat index of the output
    inside = i < n_elements
    i0, i1, i2, i3 = unravel(i, n1, n2, n3)
    p_dout = dout_ptr + i0 * stride_o0 + i1 * stride_o1 + i2 * stride_o2 + i3 * stride_o3
    p_x = x_ptr + i0 * stride_x0 + i1 * stride_x1 + i2 * stride_x2 + i3 * stride_x3
    p_gate = gate_ptr + i0 * stride_g0 + i1 * stride_g1 + i2 * stride_g2 + i3 * stride_g3
    dout = tl.load(p_dout, mask=inside, other=0.0).to(tl.float32)
    x = tl.load(p_x, mask=inside, other=0.0).to(tl.float32)
    gate = tl.load(p_gate, mask=inside, other=0.0).to(tl.float32)
    dx = dout * stable_sigmoid(gate)
    tl.store(dx_ptr + i, dx.to(dx_ptr.dtype.element_ty), mask=inside)
    tl.store(dgate_ptr + i, (dx * x * stable_sigmoid(-gate)).to(dgate_ptr.dtype.element_ty), mask=inside)


BLOCK_ELEMENTS = 1024


def _with_four_axes(*tensors: Tensor) -> list[Tensor]:
    """The kernels know four axes: new ones in front, or the first ones merged, which may copy."""
    tensors = tuple(x.flatten(0, x.dim() - 4) if x.dim() > 4 else x for x in tensors)
    return [x[(None,) * (4 - x.dim())] for x in tensors]


@torch.library.custom_op("gsa_fast::apply_gate", mutates_args=())
def _apply_gate(x: Tensor, gate_logits: Tensor) -> Tensor:
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    if x.numel() == 0:
        return out
    x4, gate4 = _with_four_axes(x, gate_logits)
    apply_gate_kernel[(triton.cdiv(x.numel(), BLOCK_ELEMENTS),)](
        x4, gate4, out, *x4.stride(), *gate4.stride(), *x4.shape[1:], x.numel(), BLOCK=BLOCK_ELEMENTS
    )
    return out


@torch.library.custom_op("gsa_fast::apply_gate_backward", mutates_args=())
def _apply_gate_backward(dout: Tensor, x: Tensor, gate_logits: Tensor) -> tuple[Tensor, Tensor]:
    dx = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    dgate = torch.empty(x.shape, dtype=gate_logits.dtype, device=x.device)
    if x.numel():
        dout4, x4, gate4 = _with_four_axes(dout, x, gate_logits)
        apply_gate_backward_kernel[(triton.cdiv(x.numel(), BLOCK_ELEMENTS),)](
            dout4, x4, gate4, dx, dgate, *dout4.stride(), *x4.stride(), *gate4.stride(), *x4.shape[1:], x.numel(),
            BLOCK=BLOCK_ELEMENTS,
        )  # fmt: skip
    return dx, dgate


@_apply_gate_backward.register_fake
def _(dout: Tensor, x: Tensor, gate_logits: Tensor) -> tuple[Tensor, Tensor]:
    dx = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    return dx, torch.empty(x.shape, dtype=gate_logits.dtype, device=x.device)


@_apply_gate.register_fake
def _(x: Tensor, gate_logits: Tensor) -> Tensor:
    return torch.empty(x.shape, dtype=x.dtype, device=x.device)


def _save_for_backward(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _backward(ctx: Any, dout: Tensor) -> tuple[Tensor, Tensor]:
    return _apply_gate_backward(dout, *ctx.saved_tensors)


torch.library.register_autograd("gsa_fast::apply_gate", _backward, setup_context=_save_for_backward)


def apply_gate(x: Tensor, gate_logits: Tensor, *, impl: str = "auto") -> Tensor:
    """Eq. 9 and Eq. 10 on the GPU: `gsa_ref.apply_gate` with the same arguments, plus `impl`.

    Args:
        x: any shape and strides.
        gate_logits: the shape of x; strides and dtype may differ.
        impl: "auto", "triton" or "reference", as in `indexer_scores`.

    Returns:
        x ⊙ σ(gate_logits) in the dtype of x, contiguous, computed in float32 and rounded once.
    """
    check_gate_arguments(x, gate_logits)
    if not use_triton(impl, x=x, gate_logits=gate_logits):
        return gsa_ref.apply_gate(x, gate_logits)
    return _apply_gate(x, gate_logits)
