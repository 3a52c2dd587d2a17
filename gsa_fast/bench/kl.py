"""The indexer's KL loss (Eq. 15), forward and with its gradients, beside the reference: cases of `bench train`.

In the warm-up the loss runs over all visible positions, in the sparse phase over the selected ones, with the
log-sum-exp that `sparse_attention` returns, as in the layer. The reference is what runs without the kernels; it holds
every logit of the attention, so long inputs are left out. Before a phase is timed, loss and gradients of a short input
are compared with the reference's.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

import gsa_fast
import gsa_ref
from gsa_fast.bench import patterns, prefill, rooflines
from gsa_fast.bench.suite import K_BASE, Prepared, Skipped
from gsa_ref import GSAConfig

LENGTHS = (4096, 8192, 16384, 32768)
QUICK_LENGTHS = (4096, 32768)
OURS, REFERENCE = "gsa_fast", "gsa_ref"
FORWARD, FORWARD_BACKWARD = "forward", "forward_backward"
LEARNED = ("q_idx", "k_idx", "head_logits", "bias")
CHECKED_LENGTH = 4096  # longer inputs than this are not compared with the reference
TOLERANCE = 0.02  # of the reference's norm: both sides' rounding to bfloat16 takes at most 0.004 of it


@dataclass(frozen=True)
class Case:
    """One line of the result. `selection` is None in the warm-up."""

    impl: str
    L: int
    H_kv: int
    passes: str
    selection: str | None = None
    sigmoid_mode: None = None

    @property
    def phase(self) -> str:
        return "warm_up" if self.selection is None else "sparse"

    @property
    def case(self) -> str:
        return f"kl_{self.phase}_{self.passes}"

    @property
    def is_baseline(self) -> bool:
        return self.impl == REFERENCE

    @property
    def config(self) -> GSAConfig:
        return prefill.Case("", "", self.L, K_BASE, self.H_kv).config

    @property
    def shape(self) -> dict[str, int | None]:
        c = self.config
        sizes = {"B": 1, "L": self.L, "S": self.L, "H": c.H, "H_kv": c.H_kv, "d_h": c.d_h, "H_I": c.H_I, "d_I": c.d_I}
        return {**sizes, "k": None if self.selection is None else K_BASE}


def plan(lengths: list[int], kv_heads: list[int], selections: list[str]) -> list[Case]:
    """The cases in the order in which they run."""
    return [
        Case(impl, L, H_kv, passes, selection)
        for L in lengths
        for H_kv in kv_heads
        for selection in (None, *selections)
        for passes in (FORWARD, FORWARD_BACKWARD)
        for impl in (OURS, REFERENCE)
    ]


def device_bytes() -> int:  # pragma: no cover  needs a GPU
    """Memory of the current CUDA device."""
    return torch.cuda.get_device_properties().total_memory


def reference_bytes(case: Case) -> int:
    """Memory below which the reference cannot run: its float32 logits, before and after they are scaled."""
    return 2 * 4 * case.config.H * case.L**2


def draw_arguments(case: Case, inputs: prefill.Inputs) -> dict[str, Any]:
    """Arguments of `indexer_kl_loss`."""
    c, L = case.config, case.L
    indexer = patterns.random_indexer_inputs(L, c, seed=inputs.seed, device=inputs.device, dtype=inputs.dtype)
    given = inputs.attention(L, case.H_kv, False)
    arguments = {**indexer.scores_arguments(), "q": given.q, "k": given.k}
    arguments |= {"indexer_scale": c.effective_indexer_scale, "temperature": c.kl_temperature}
    if case.selection is not None:
        pattern = inputs.selection(L, K_BASE, case.selection)
        _, lse = gsa_fast.sparse_attention(given.q, given.k, given.v, pattern, impl="triton")
        arguments |= {"selection": pattern, "lse": lse}
    return arguments


def make_call(case: Case, arguments: dict[str, Any]) -> Callable[[], tuple[Tensor, ...]]:
    """The call of one case: the loss, with FORWARD_BACKWARD also its gradients."""

    def loss(given: dict[str, Any]) -> Tensor:
        if case.is_baseline:
            return gsa_ref.indexer_kl_loss(**given)
        return gsa_fast.indexer_kl_loss(**given, impl="triton")

    leaves = {name: arguments[name].detach().requires_grad_() for name in LEARNED}

    def forward() -> tuple[Tensor, ...]:
        with torch.no_grad():
            return (loss(arguments),)

    def forward_backward() -> tuple[Tensor, ...]:
        value = loss(arguments | leaves)
        return value.detach(), *torch.autograd.grad(value, list(leaves.values()))

    return forward if case.passes == FORWARD else forward_backward


def check(case: Case, inputs: prefill.Inputs) -> None:
    """Compare what `case` computes with the reference: a time of wrong values would mean nothing.

    Raises:
        RuntimeError: they differ by more than `TOLERANCE`.
    """
    arguments = draw_arguments(case, inputs)
    found, expected = (make_call(replace(case, impl=impl), arguments)() for impl in (OURS, REFERENCE))
    # The forward case has the loss alone.
    for name, ours, theirs in zip(("loss", *LEARNED)[: len(found)], found, expected, strict=True):
        error, norm = (ours.double() - theirs.double()).norm(), theirs.double().norm()
        if not error <= TOLERANCE * norm:
            what = "the loss" if name == "loss" else f"the gradient of {name}"
            raise RuntimeError(f"{what} is wrong: off by {float(error):.3g}, where the reference has {float(norm):.3g}")


def prepare(case: Case, inputs: prefill.Inputs, checked: set[Case]) -> Prepared:
    """Inputs and the call of one case, after the comparison of a short one, unless that is among those `checked`.

    Raises:
        Skipped: the reference does not fit in memory.
        RuntimeError: the comparison failed.
    """
    c, L = case.config, case.L
    if case.is_baseline and (least := reference_bytes(case)) > device_bytes():
        raise Skipped(f"left out: the reference would take more than {least / 2**30:.3g} GiB")
    short = replace(case, L=min(L, CHECKED_LENGTH))
    if not case.is_baseline and short not in checked:
        check(short, inputs)
        checked.add(short)
    call = make_call(case, draw_arguments(case, inputs))
    sizes, fields = {}, {}
    if case.selection is not None:
        of_16, of_tile = (inputs.overlap(L, K_BASE, case.selection, n) for n in (16, rooflines.tile_rows(c)))
        sizes, fields = of_tile.sizes, patterns.overlap_fields(of_16)
    stages = [rooflines.kl_loss_work(L, c, **sizes)]
    if case.passes == FORWARD_BACKWARD:
        stages.append(rooflines.kl_gradients_work(L, c, **sizes))
    return Prepared(call, stages, fields)
