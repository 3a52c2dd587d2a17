"""Puzzles on the gates."""

import numpy as np
import torch
from hypothesis import strategies as st

from gsa_ref import apply_gate, cases, equations
from gsa_ref.puzzles._checker import Example, puzzle


@puzzle(
    cases.gate_cases("float64", cases.Limits(B=1, L=5, heads=1)),
    oracle="gsa_ref.equations.apply_gate and sparse_attention",
)
def gated_head(case: cases.GateCase) -> Example:
    """One head of at most 3 channels, one query that reads all keys."""
    rng = np.random.default_rng(case.seed)
    L, d_h = case.L, min(case.width, 3)
    q, k, v, g2, g1 = (rng.standard_normal((n, 1, d_h)) for n in (1, L, L, L, 1))
    out = equations.sparse_attention(q, k, equations.apply_gate(v, g2), [np.arange(L)])[0]
    arguments = {"q": q[0, 0], "k": k[:, 0], "v": v[:, 0], "value_logits": g2[:, 0], "output_logits": g1[0, 0]}
    return Example(arguments, equations.apply_gate(out, g1)[0, 0])


@puzzle(
    st.tuples(
        st.integers(1, 4), st.integers(1, 3), st.integers(1, 3), st.sampled_from((1.0, 20.0)), st.integers(0, 99)
    ),
    oracle="the autograd of gsa_ref.apply_gate",
)
def gate_gradients(drawn: tuple[int, int, int, float, int]) -> Example:
    """Logits up to about ±60 in some examples: gates that are almost closed or open."""
    L, d, n, size, seed = drawn
    g = torch.Generator().manual_seed(seed)
    shapes = (L, d), (L, n), (d, n), (n,), (L, n)
    h, v, W, b, dout = (torch.randn(shape, generator=g, dtype=torch.float64) for shape in shapes)
    W, b = size * W, size * b
    for x in (h, W, b):
        x.requires_grad_()
    gated = apply_gate(v, h @ W + b)
    expected = [x.numpy() for x in torch.autograd.grad(gated, (h, W, b), dout)]
    arguments = {"h": h, "v": v, "W": W, "b": b, "dout": dout}
    return Example({name: x.detach().numpy() for name, x in arguments.items()}, expected)
