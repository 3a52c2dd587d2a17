"""Gradients over one long sequence, at sampled queries and keys: `python -m gsa_fast verify --length N --gradients`.

A query's gradients depend on its own row alone; a key's on every row that selected it. Gold computes just these rows,
in float64 in PyTorch, by the chain rule written out.
"""

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

import gsa_fast
from gsa_fast.bench import patterns, records
from gsa_fast.verification.checks import numpy
from gsa_fast.verification.interpreter import poisoned_memory
from gsa_fast.verification.long import fold, sampled_rows
from gsa_fast.verification.run import Row
from gsa_ref import GSAConfig, Selection
from gsa_ref.check import error_budget, gamma, unit_roundoff

CHECKS = ("dq", "d output gate", "dk", "dv", "d value gate")
NAMES = ("q", "k", "v", "value_gate_logits", "output_gate_logits")
PATTERN = "clustered p=0.95"
BLOCK = 16  # rows of gold at a time


@dataclass(frozen=True)
class Rows:
    """Some rows of a sequence in float64, with proven bounds: n rows, K slots, G heads a group."""

    keys: Tensor  # [n, K] positions, −1 in empty slots
    q: Tensor  # [n, H_kv, G, d_h]
    do: Tensor  # the gradient of the output before its gate
    p: Tensor  # [n, H_kv, G, K]
    ds: Tensor
    ds_error: Tensor  # how far ds may lie from exact in the kernel
    rho: float  # the relative error of p
    dq: Tensor  # [n, H, d_h]
    dq_error: Tensor
    dgate: Tensor  # of the output gate's logits, [n, H, d_h]
    dgate_error: Tensor


def rows_of(tensors: dict[str, Tensor], selection: Selection, dout: Tensor, at: Tensor) -> Rows:
    """Gold for the rows `at`, of tensors of one sequence with value gates applied: v is v' as the kernel reads it."""
    dtype = tensors["q"].dtype
    u, u32 = unit_roundoff(dtype), unit_roundoff(torch.float32)
    keys = selection.indices[0, at].long()
    empty = (keys < 0)[:, None, None]
    q, gate, grad = (x[0, at].double() for x in (tensors["q"], tensors["output_gate_logits"], dout))
    (_, H, d_h), H_kv = q.shape, tensors["k"].shape[2]
    k, v = (tensors[name][0, keys.clamp(min=0)].double() for name in ("k", "v"))  # [n, K, H_kv, d_h]
    q, gate, grad = (x.unflatten(1, (H_kv, H // H_kv)) for x in (q, gate, grad))
    scale = d_h**-0.5
    logits = (scale * torch.einsum("nhgd,nkhd->nhgk", q, k)).masked_fill(empty, -torch.inf)
    p = torch.softmax(logits, -1)
    out = torch.einsum("nhgk,nkhd->nhgd", p, v)
    weight = torch.sigmoid(gate)
    do = grad * weight
    dp = torch.einsum("nhgd,nkhd->nhgk", do, v)
    ds = p * (dp - (do * out).sum(-1, keepdim=True))
    dq = scale * torch.einsum("nhgk,nkhd->nhgd", ds, k)

    size = scale * torch.einsum("nhgd,nkhd->nhgk", q.abs(), k.abs()).masked_fill(empty, 0)
    spread = float((logits.amax(-1) - logits.masked_fill(empty, torch.inf).amin(-1)).max())
    rho = 3 * gamma(d_h + 2) * float(size.max()) + (keys.shape[1] / 16 + 3) * (6 + spread) * u32 + gamma(keys.shape[1])
    out_error = (2 * rho + 4 * u) * torch.einsum("nhgk,nkhd->nhgd", p, v.abs())
    delta_error = (do.abs() * (out_error + gamma(d_h + 1) * out.abs())).sum(-1, keepdim=True)
    dp_error = (gamma(d_h) + 2 * u) * torch.einsum("nhgd,nkhd->nhgk", do.abs(), v.abs())
    ds_error = (rho + u) * ds.abs() + p * (dp_error + delta_error)
    dq_error = scale * torch.einsum("nhgk,nkhd->nhgd", ds_error + (gamma(keys.shape[1]) + u) * ds.abs(), k.abs())
    dgate_error = grad.abs() * weight * (1 - weight) * (out_error + 6 * u * out.abs())
    return Rows(
        keys, q, do, p, ds, ds_error, rho,
        dq.flatten(1, 2), (dq_error + u * dq.abs()).flatten(1, 2),
        (grad * out * weight * (1 - weight)).flatten(1, 2), dgate_error.flatten(1, 2),
    )  # fmt: skip


def key_gradients(
    tensors: dict[str, Tensor], selection: Selection, dout: Tensor, s: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gold dk and dv' of key s, [H_kv, d_h], each with its bound."""
    u = unit_roundoff(tensors["q"].dtype)
    selected = torch.cat([(part == s).any(-1) for part in selection.indices[0].split(4096)])
    k = tensors["k"]
    dk, dk_error, dv, dv_error = torch.zeros((4, *k.shape[2:]), dtype=torch.float64, device=k.device)
    scale = k.shape[-1] ** -0.5
    at = selected.nonzero()[:, 0]
    sums = gamma(len(at) * (tensors["q"].shape[2] // k.shape[2]) + 1) + 2 * u
    for part in at.split(BLOCK) if len(at) else ():
        rows = rows_of(tensors, selection, dout, part)
        slot = (rows.keys == s).int().argmax(-1)[:, None, None, None].expand(*rows.p.shape[:3], 1)
        p, ds, ds_error = (x.gather(-1, slot) for x in (rows.p, rows.ds, rows.ds_error))
        dk += scale * (ds * rows.q).sum((0, 2))
        dk_error += scale * ((ds_error + sums * ds.abs()) * rows.q.abs()).sum((0, 2))
        dv += (p * rows.do).sum((0, 2))
        dv_error += ((rows.rho + 2 * u + sums) * p * rows.do.abs()).sum((0, 2))
    return dk, dk_error, dv, dv_error


def verify_gradients(
    L: int,
    config: GSAConfig,
    *,
    rows: int,
    reruns: int,
    seed: int,
    device: str = "cuda",
    dtype: torch.dtype = torch.bfloat16,
) -> list[Row]:
    """Gradients of `sparse_attention` with both gates over clustered selections, summed in order and atomically.

    Args:
        L: length of the one sequence.
        config: sizes and budgets.
        rows: how many queries are compared with gold. Of keys it is the first, the last and two between, because each
            takes the rows of some thousand queries.
        reruns: how often the backward pass in a fixed order runs again; every gradient must be bitwise equal.

    Returns:
        One `Row` per check, whose cases are queries or keys, each with both ways to sum; and one for the reruns.
    """
    drawn: dict[str, Any] = {"seed": seed, "device": device, "dtype": dtype}
    given = patterns.random_attention_inputs(L, config, **drawn)
    width = min(config.k_max, L)
    selection = patterns.draw_selection(PATTERN, L, k_base=config.k_base, width=width, seed=seed, device=device)
    dout = torch.randn(given.q.shape, dtype=dtype, device=device, generator=torch.Generator(device).manual_seed(seed))
    leaves = {name: getattr(given, name).detach().requires_grad_() for name in NAMES}

    def gradients(deterministic: bool) -> dict[str, Tensor]:
        out, _ = gsa_fast.sparse_attention(**leaves, selection=selection, deterministic=deterministic, impl="triton")
        return dict(zip(NAMES, torch.autograd.grad(out, list(leaves.values()), dout), strict=True))

    with poisoned_memory():
        in_order, atomic = gradients(True), gradients(False)
    different = 0
    for _ in range(reruns):
        again = gradients(True)
        different += not all(torch.equal(in_order[name], again[name]) for name in NAMES)
        del again

    name = str(dtype).removeprefix("torch.")
    table = {check: Row(check, name, longest=L) for check in CHECKS}
    tensors = {n: x.detach() for n, x in leaves.items()}
    v, value_gate = tensors["v"], tensors["value_gate_logits"]
    tensors["v"] = gsa_fast.apply_gate(v, value_gate, impl="triton")  # v' as the kernels read it
    u = unit_roundoff(dtype)

    def compare(check: str, where: int, results: Iterator[Tensor], gold: Tensor, bound: Tensor) -> None:
        for result in results:
            # No baseline: PyTorch would need the whole sequence. The bound alone decides.
            verdict = error_budget(
                numpy(result), numpy(torch.full_like(gold, torch.nan)), numpy(gold), dtype, tolerance=numpy(bound)
            )
            fold(table[check], verdict, where)

    both = in_order, atomic
    for part in torch.tensor(sampled_rows(L, rows, config.k_base, seed), device=device).split(BLOCK):
        found = rows_of(tensors, selection, dout, part)
        for i, t in enumerate(part.tolist()):
            compare("dq", t, (g["q"][0, t] for g in both), found.dq[i], found.dq_error[i])
            gates = (g["output_gate_logits"][0, t] for g in both)
            compare("d output gate", t, gates, found.dgate[i], found.dgate_error[i])
    for s in sorted({0, L // 2, L - L // 8, L - 1}):
        dk, dk_error, dv, dv_error = key_gradients(tensors, selection, dout, s)
        compare("dk", s, (g["k"][0, s] for g in both), dk, dk_error)
        weight = torch.sigmoid(value_gate[0, s].double())
        bound = dv_error + 2 * u * dv.abs()
        compare("dv", s, (g["v"][0, s] for g in both), dv * weight, weight * (bound + u * dv.abs()))
        slope = v[0, s].double() * weight * (1 - weight)
        gates = (g["value_gate_logits"][0, s] for g in both)
        compare("d value gate", s, gates, dv * slope, slope.abs() * (bound + 4 * u * dv.abs()))
    for row in table.values():
        row.verdict = "FAIL" if row.detail else "pass"
    again_row = Row("reruns", name, cases=reruns, worst_error=float(different), ratio=float(different), longest=L)
    again_row.verdict = "FAIL" if different else "pass" if reruns else "not run"
    again_row.detail = f"{different} of {reruns} runs differ from the first" if different else ""
    return [*table.values(), again_row]


def to_record(rows: list[Row], L: int, config: GSAConfig, command: str, seed: int) -> records.Record:
    """What `--json` merges into its file."""
    c = config
    return {
        "suite": "verification",
        "case": "attention_backward",
        "impl": "gsa_fast",
        "selection": PATTERN,
        "shape": {"B": 1, "L": L, "S": L, "H": c.H, "H_kv": c.H_kv, "d_h": c.d_h, "k": c.k_base},
        "dtype": rows[0].dtype,
        **records.environment(command, seed),
        "rows": [{**asdict(row), "ratio": row.ratio if np.isfinite(row.ratio) else None} for row in rows],
    }
