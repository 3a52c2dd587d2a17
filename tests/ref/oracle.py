"""The equations on batched arguments, and how far rounding may take PyTorch from them."""

from typing import Any

import numpy as np
import torch
from torch import Tensor

from gsa_ref import Selection, equations
from gsa_ref.check import gamma, score_tolerance, unit_roundoff

DOUBLE_TO_SINGLE = 2.0**-29  # unit roundoff of float64 in units of float32's


def array(x: Tensor) -> np.ndarray:
    """Any tensor in float64."""
    return x.detach().double().numpy()


def close(x: Tensor, y: Any, tolerance: float) -> bool:
    """|x − y| ≤ tolerance, with NaN and infinities in the same places."""
    x, y = array(x), array(torch.as_tensor(y))
    if x.shape != y.shape:
        return False
    finite = np.isfinite(y)
    same = np.array_equal(x[~finite], y[~finite], equal_nan=True)
    return same and bool((np.abs(x[finite] - y[finite]) <= tolerance).all())


def of_sequence(value: Any, b: int) -> Any:
    """`start` or `lengths` of sequence b, as the equations take it."""
    return int(value[b]) if isinstance(value, Tensor) else value


def alone(arguments: dict[str, Any], b: int, shared: tuple[str, ...] = ()) -> dict[str, Any]:
    """The arguments of a batched function cut down to sequence b."""

    def cut(name: str, value: Any) -> Any:
        if isinstance(value, Selection):
            return Selection(value.indices[b : b + 1], value.counts[b : b + 1])
        return value[b : b + 1] if isinstance(value, Tensor) and name not in shared else value

    return {name: cut(name, value) for name, value in arguments.items()}


def contiguous(arguments: dict[str, Any]) -> dict[str, Any]:
    """The same arguments with plain strides."""

    def plain(value: Any) -> Any:
        if isinstance(value, Selection):
            return Selection(*(x.contiguous() for x in value))
        return value.contiguous() if isinstance(value, Tensor) else value

    return {name: plain(value) for name, value in arguments.items()}


def indexer_scores(arguments: dict[str, Any], scale: float) -> np.ndarray:
    """Eq. 7, [B, L, S]."""
    a = arguments
    return np.stack(
        [
            equations.indexer_scores(
                *(array(a[name][b]) for name in ("q_idx", "k_idx", "head_logits")),
                array(a["bias"]),
                scale=scale,
                start=of_sequence(a["start"], b),
                length=of_sequence(a["lengths"], b),
            )
            for b in range(len(a["q_idx"]))
        ]
    )


def indexer_tolerance(arguments: dict[str, Any], scale: float) -> np.ndarray:
    """ε of the scores, [B, L, S], for the precision that the indexer computes in."""
    a = arguments
    unit = DOUBLE_TO_SINGLE if a["q_idx"].dtype == torch.float64 else 1.0
    names = ("q_idx", "k_idx", "head_logits")
    return unit * np.stack(
        [
            score_tolerance(*(array(a[name][b]) for name in names), array(a["bias"]), scale=scale)
            for b in range(len(a["q_idx"]))
        ]
    )


def selected(selection: Selection, b: int, n_keys: int, start: int) -> list[np.ndarray]:
    """S_t of every query of sequence b: the slots that are not empty."""
    rows = []
    for t, (row, count) in enumerate(zip(selection.indices[b].numpy(), selection.counts[b].tolist(), strict=True)):
        row = row[:count]
        rows.append(row[(row >= 0) & (row < n_keys) & (row <= start + t)].astype(np.int64))
    return rows


def sparse_attention(arguments: dict[str, Any], scale: float | None = None) -> tuple[np.ndarray, np.ndarray]:
    """Sparse SDPA with both gates, o [B, L, H, d_h] and lse [B, L, H]."""
    a = arguments
    outs, lses = [], []
    for b in range(len(a["q"])):
        q, k, v = (array(a[name][b]) for name in ("q", "k", "v"))
        start = of_sequence(a.get("start"), b)
        start = len(k) - len(q) if start is None else start
        if a["value_gate_logits"] is not None:
            v = equations.apply_gate(v, array(a["value_gate_logits"][b]))
        out, lse = equations.sparse_attention(q, k, v, selected(a["selection"], b, len(k), start), scale=scale)
        if a["output_gate_logits"] is not None:
            out = equations.apply_gate(out, array(a["output_gate_logits"][b]))
        outs.append(out)
        lses.append(lse)
    return np.stack(outs), np.stack(lses)


def attention_tolerance(arguments: dict[str, Any], scale: float | None = None) -> tuple[float, float]:
    """Largest rounding error of o and of lse for the precision of the arguments, up to second order.

    A logit is off by at most δ = γ·scale·Σ|q||k|, a probability by a factor 1 ± (4δ + γ), and o by that times max|v|.
    """
    a = arguments
    u = unit_roundoff(a["q"].dtype)
    d_h, slots = a["q"].shape[-1], a["selection"].indices.shape[-1]
    scale = d_h**-0.5 if scale is None else abs(scale)
    largest = {name: float(a[name].abs().nan_to_num(0).max()) if a[name].numel() else 0.0 for name in ("q", "k", "v")}
    logit = scale * d_h * largest["q"] * largest["k"]
    delta = gamma(d_h + 8, u) * logit
    out = (4 * delta + gamma(2 * slots + 32, u)) * largest["v"]
    return out, delta + gamma(slots + 16, u) * (logit + np.log(max(slots, 1)) + 1)


def layer_output(layer: torch.nn.Module, h: Tensor, lengths: Tensor | None = None) -> np.ndarray:
    """Eq. 6 for every sequence of a right-padded batch; 0 past its length."""
    weights = {name: array(value) for name, value in layer.state_dict().items()}
    out = np.zeros(h.shape)
    for b in range(len(h)):
        n = h.shape[1] if lengths is None else min(max(int(lengths[b]), 0), h.shape[1])
        out[b, :n] = equations.gated_sparse_attention(array(h[b, :n]), weights, layer.config)
    return out


def indexer_kl(arguments: dict[str, Any]) -> tuple[float, list[np.ndarray]]:
    """The indexer's loss over the valid rows of all sequences, and its gradients in the order of the arguments.

    The equations give the mean over the rows of one sequence; here each weighs as many rows as it has.
    """
    a, names = arguments, ("q_idx", "k_idx", "head_logits")
    total, count = 0.0, 0
    gradients = [np.zeros(a[name].shape) for name in (*names, "bias")]
    for b in range(len(a["q"])):
        q, k = array(a["q"][b]), array(a["k"][b])
        start, length = of_sequence(a["start"], b), of_sequence(a["lengths"], b)
        slots = None if a["selection"] is None else selected(a["selection"], b, len(k), start)
        inputs = [*(array(a[name][b]) for name in names), array(a["bias"]), q, k]
        options = {"selection": slots, "start": start, "length": length}
        rows = sum(len(over) > 0 for over in equations.training.valid_positions(len(q), len(k), **options))
        options |= {"indexer_scale": a["indexer_scale"], "temperature": a["temperature"]}
        total, count = total + rows * equations.indexer_kl_loss(*inputs, **options), count + rows
        for gradient, part in zip(gradients, equations.indexer_kl_gradient(*inputs, **options), strict=True):
            gradient[b if gradient.ndim > 1 else ...] += rows * part
    return total / max(count, 1), [gradient / max(count, 1) for gradient in gradients]


def kl_tolerance(arguments: dict[str, Any], unit: float = 1.0) -> tuple[float, float]:
    """Largest rounding error of the indexer's loss and of its gradients, for unit roundoff `unit` · 2^-53.

    A logit of either softmax is off by at most δ, so its probabilities by a factor 1 ± (4δ + γ). The loss is a mean of
    log p − log softmax(I/τ), which is at most Λ, the range of all logits and ln S. A gradient adds up (softmax − p)/τ
    times at most the largest of 1, |scale·q^I| and |scale·k^I|.
    """
    a, u = arguments, unit * 2.0**-53
    (H, d_h), S = a["q"].shape[2:], a["k"].shape[1]
    largest = {n: float(a[n].abs().max()) if a[n].numel() else 0.0 for n in ("q", "k", "q_idx", "k_idx", "bias")}
    logit = d_h**0.5 * largest["q"] * largest["k"]
    H_I, d_I = a["q_idx"].shape[2:]
    z = a["indexer_scale"] * d_I * largest["q_idx"] * largest["k_idx"] + largest["bias"]
    teacher = 4 * gamma(d_h + 8, u) * logit + gamma(S + H + 16, u)
    student = 4 * H_I * (gamma(d_I + 8, u) * z + gamma(16, u)) / a["temperature"] + gamma(S + 16, u)
    spread = 2 * logit + H_I / a["temperature"] + np.log(max(S, 1)) + 1
    factor = max(1.0, a["indexer_scale"] * max(largest["q_idx"], largest["k_idx"]))
    return (teacher + student) * spread, 2 * (teacher + 2 * student + gamma(S + 32, u)) * factor / a["temperature"]
