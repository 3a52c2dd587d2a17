"""Gates (Eq. 9 and Eq. 10)."""

import torch
from jaxtyping import Float
from torch import Tensor

from gsa_ref._arguments import check_gate_arguments


def apply_gate(x: Float[Tensor, "*shape"], gate_logits: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
    """Eq. 9 and Eq. 10: x ⊙ σ(gate_logits), elementwise.

    The value gate G2 (Eq. 9) takes its logits from the SOURCE token, h_s W_V^g, and gates v[s]; the output gate G1
    (Eq. 10) takes them from the QUERY token, h_t W_O^g, and gates o[t].

    Args:
        x: any shape.
        gate_logits: the shape of x; its dtype may differ.

    Returns:
        The shape and dtype of x.

    Raises:
        TypeError: an argument is not a floating-point tensor.
        ValueError: shapes or devices differ.
    """
    check_gate_arguments(x, gate_logits)
    return (x * torch.sigmoid(gate_logits)).to(x.dtype)
