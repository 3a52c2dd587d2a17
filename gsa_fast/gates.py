"""Gates (Eq. 9 and Eq. 10): kernel, launcher, custom op. `sparse_attention` fuses the output gate."""

import torch
import triton
import triton.language as tl
from torch import Tensor

import gsa_ref
from gsa_fast._backend import no_backward, use_triton
from gsa_fast._primitives import stable_sigmoid
from gsa_ref._arguments import check_gate_arguments


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
    i3 = i % n3
    i2 = (i // n3) % n2
    i1 = (i // n3 // n2) % n1
    i0 = i // n3 // n2 // n1
    p_x = x_ptr + i0 * stride_x0 + i1 * stride_x1 + i2 * stride_x2 + i3 * stride_x3
    p_gate = gate_ptr + i0 * stride_g0 + i1 * stride_g1 + i2 * stride_g2 + i3 * stride_g3
    x = tl.load(p_x, mask=inside, other=0.0).to(tl.float32)
    gate = tl.load(p_gate, mask=inside, other=0.0).to(tl.float32)
    tl.store(out_ptr + i, (x * stable_sigmoid(gate)).to(out_ptr.dtype.element_ty), mask=inside)


@torch.library.custom_op("gsa_fast::apply_gate", mutates_args=())
def _apply_gate(x: Tensor, gate_logits: Tensor) -> Tensor:
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    if x.numel() == 0:
        return out
    if x.dim() > 4:  # the kernel knows four axes; merging the first ones may copy
        x, gate_logits = x.flatten(0, x.dim() - 4), gate_logits.flatten(0, x.dim() - 4)
    missing = (None,) * (4 - x.dim())
    x4, gate4 = x[(*missing, ...)], gate_logits[(*missing, ...)]
    block = 1024
    apply_gate_kernel[(triton.cdiv(x.numel(), block),)](
        x4, gate4, out, *x4.stride(), *gate4.stride(), *x4.shape[1:], x.numel(), BLOCK=block
    )
    return out


@_apply_gate.register_fake
def _(x: Tensor, gate_logits: Tensor) -> Tensor:
    return torch.empty(x.shape, dtype=x.dtype, device=x.device)


no_backward("apply_gate")


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
