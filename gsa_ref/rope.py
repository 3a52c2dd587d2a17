"""Rotary position embedding (RoFormer, arXiv 2104.09864), the half-split layout of LLaMA."""

import torch
from jaxtyping import Float, Int32
from torch import Tensor

from gsa_ref._arguments import check_rope_arguments


def apply_rope(
    x: Float[Tensor, "B L heads d"], *, start: int | Int32[Tensor, " B"] = 0, theta: float = 10000.0
) -> Float[Tensor, "B L heads d"]:
    """Rotate the pair (x[i], x[i + d/2]) of the token at position p by the angle p · θ^(−2i/d).

    Args:
        x: [B, L, heads, d] with even d; row t of sequence b sits at position start[b] + t.
        start: position of row 0, an int or one per sequence.
        theta: base of the frequencies.

    Returns:
        The shape and dtype of x. Angles are computed in float64 for float64 input, else in float32.

    Raises:
        TypeError: wrong type or dtype.
        ValueError: wrong shape or device, an odd d, a negative start, or theta not above 0.
    """
    check_rope_arguments(x, start, theta)
    _, L, _, d = x.shape
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    first = torch.as_tensor(start, device=x.device).reshape(-1, 1)  # [B or 1, 1]
    position = (first + torch.arange(L, device=x.device)).to(dtype)  # [B or 1, L]
    frequency = theta ** (-2 * torch.arange(d // 2, device=x.device, dtype=dtype) / d)  # [d/2]
    angle = (position[..., None] * frequency)[:, :, None, :]  # [B or 1, L, 1, d/2]
    cos, sin = angle.cos(), angle.sin()
    a, b = x.to(dtype).chunk(2, dim=-1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1).to(x.dtype)
