"""How the indexer learns: its KL loss, the phases of the layer, and V̄ under everything that wraps a training step."""

import copy
import dataclasses
import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import gsa_ref
from gsa_ref import (
    GatedSparseAttention,
    GSACache,
    LanguageModel,
    ModelConfig,
    Selection,
    captured_mass,
    equations,
    indexer_kl_loss,
    sparse_attention,
)
from gsa_ref.cases import DTYPES, PATTERNS, VALUES, IndexerCase, Limits, draw_values, indexer_cases, random_selection
from gsa_ref.check import gamma
from tests.ref import oracle, ranks
from tests.ref.models import SMALL, build, hidden
from tests.ref.oracle import close
from tests.strategies import SEEDS

LEARNING = ("q_idx", "k_idx", "head_logits", "bias")
PHASES = ("warm_up", "sparse", "sparse_lse")
CONFIG = ModelConfig(attention=SMALL, n_layers=2, d_ff=24)


def int32(*values: int) -> Tensor:
    return torch.tensor(values, dtype=torch.int32)


@dataclass(frozen=True)
class KLCase(IndexerCase):
    """Inputs of `indexer_kl_loss`: those of the indexer, the attention's queries and keys, and what the phase needs."""

    H_kv: int
    group: int
    d_h: int
    phase: str
    width: int
    pattern: str
    temperature: float
    attended_values: str

    def arguments(self, device: str = "cpu") -> dict[str, Any]:
        g, dtype = torch.Generator().manual_seed(self.seed + 1), DTYPES[self.dtype]
        query, key = (self.B, self.L, self.H_kv * self.group, self.d_h), (self.B, self.S, self.H_kv, self.d_h)
        q, k = (draw_values(self.attended_values, shape, g).to(dtype) for shape in (query, key))
        selection, lse = None, None
        if self.phase != "warm_up":
            selection = random_selection(self.pattern, self.B, self.L, self.S, self.width, g)
        arguments = {**super().arguments(device), "q": q, "k": k, "selection": selection}
        arguments["bias"] = arguments["bias"].to(torch.promote_types(dtype, torch.float32))
        if self.phase == "sparse_lse":
            lse = sparse_attention(q, k, k, selection, start=arguments["start"])[1]
        return {**arguments, "lse": lse, "indexer_scale": self.scale, "temperature": self.temperature}


def kl_cases(
    dtype: str, limits: Limits | None = None, *, phases: tuple[str, ...] = PHASES
) -> st.SearchStrategy[KLCase]:
    limits = limits or Limits(B=3, L=8, S=24, width=12)
    attention = st.fixed_dictionaries(
        {
            "H_kv": st.integers(1, limits.heads),
            "group": st.integers(1, limits.group),
            "d_h": st.sampled_from((2, 8, 24)),
            "phase": st.sampled_from(phases),
            "width": st.integers(1, limits.width),
            "pattern": st.sampled_from(PATTERNS),
            "temperature": st.sampled_from((1.0, 0.1, 0.02, 10.0)),
            "attended_values": st.sampled_from(VALUES),
        }
    )
    indexer = indexer_cases(dtype, limits).map(lambda case: dataclasses.asdict(case))
    return st.builds(lambda indexer, attention: KLCase(**indexer, **attention), indexer, attention)


CASES = kl_cases("float64")
# With padding, rows without a slot, and one start per sequence.
SMALL_CASE = KLCase(
    B=2, L=4, S=6, H_I=2, d_I=3, start=(2, 1), lengths=(6, 4), dtype="float64", values="normal", layout="contiguous",
    seed=0, H_kv=1, group=2, d_h=4, phase="sparse", width=3, pattern="empty", temperature=1.0, attended_values="normal",
)  # fmt: skip


def loss_and_gradients(arguments: dict[str, Any]) -> tuple[Tensor, dict[str, Tensor]]:
    """The loss, and the gradient of every floating-point argument that has one."""
    leaves = {
        name: x.detach().clone().requires_grad_()
        for name, x in arguments.items()
        if isinstance(x, Tensor) and x.is_floating_point()
    }
    loss = indexer_kl_loss(**{**arguments, **leaves})
    loss.backward()
    return loss.detach(), {name: x.grad for name, x in leaves.items() if x.grad is not None}


def over(arguments: dict[str, Any]) -> Tensor:
    """Bool [B, L, S]: what the distributions run over, written with loops."""
    (B, L), S = arguments["q"].shape[:2], arguments["k"].shape[1]
    mask = torch.zeros(B, L, S, dtype=torch.bool)
    for b in range(B):
        start, length = (oracle.of_sequence(arguments[name], b) for name in ("start", "lengths"))
        slots = None if arguments["selection"] is None else oracle.selected(arguments["selection"], b, S, start)
        rows = equations.training.valid_positions(L, S, slots, start=start, length=length)
        for t, row in enumerate(rows):
            mask[b, t, row] = True
    return mask


def attention_probabilities(arguments: dict[str, Any], selection: Selection) -> Tensor:
    """p_t [B, L, S] from `sparse_attention`: with one-hot values the output is the probabilities themselves."""
    q, k = arguments["q"], arguments["k"]
    S, d_h = k.shape[1], k.shape[3]
    columns = []
    for s in range(0, S, d_h):
        v = torch.zeros_like(k)
        for i in range(min(d_h, S - s)):
            v[:, s + i, :, i] = 1
        columns.append(sparse_attention(q, k, v, selection, start=arguments["start"])[0].mean(2))
    return torch.cat(columns, -1)[..., :S]


# --- the loss against the equations -------------------------------------------------------------------------------


@given(CASES)
def test_loss_and_gradients_equal_the_equations(case):
    """With gradients derived by hand, in both phases, with and without a given lse."""
    arguments = case.arguments()
    loss, gradients = loss_and_gradients(arguments)
    gold, gold_gradients = oracle.indexer_kl(arguments)
    loss_tolerance, gradient_tolerance = oracle.kl_tolerance(arguments)
    assert loss.dtype == torch.float64
    assert close(loss, np.float64(gold), loss_tolerance)
    for name, expected in zip(LEARNING, gold_gradients, strict=True):
        assert close(gradients[name], expected, gradient_tolerance), name


@pytest.mark.property(51, 52)
@given(CASES)
def test_only_the_indexer_gets_a_gradient(case):
    """None for the teacher, its lse or, through it, the attention."""
    _, gradients = loss_and_gradients(case.arguments())
    assert set(gradients) == set(LEARNING)


@given(kl_cases("float64", phases=("sparse",)))
def test_the_teacher_is_the_mean_of_the_attention_s_own_probabilities(case):
    """The loss is recomputed from what `sparse_attention` weighs one-hot values with."""
    arguments = case.arguments()
    mask = over(arguments)
    p = attention_probabilities(arguments, arguments["selection"])[mask.any(-1)]
    scores = gsa_ref.indexer_scores(
        *(arguments[name] for name in LEARNING),
        scale=case.scale,
        start=arguments["start"],
        lengths=arguments["lengths"],
    )
    logits = (scores / case.temperature).masked_fill(~mask, -math.inf)[mask.any(-1)]
    log_student = logits.log_softmax(-1).masked_fill(~mask[mask.any(-1)], 0)
    expected = (torch.special.xlogy(p, p) - p * log_student).sum(-1).mean() if len(p) else torch.zeros(())
    assert close(indexer_kl_loss(**arguments), expected, 2 * oracle.kl_tolerance(arguments)[0])


# --- properties of the loss ---------------------------------------------------------------------------------------


@given(CASES)
def test_the_loss_is_not_negative(case):
    arguments = case.arguments()
    assert indexer_kl_loss(**arguments) >= -oracle.kl_tolerance(arguments)[0]


@given(SEEDS, st.sampled_from((1.0, 0.1, 3.0)), st.sampled_from(("warm_up", "random", "window")))
def test_the_loss_is_zero_exactly_when_the_student_equals_the_teacher(seed, temperature, pattern):
    """Attention logits are made I/τ: one head, keys of one channel. Then a single score of each row is moved."""
    g = torch.Generator().manual_seed(seed)
    k_idx, ones = torch.randn(2, 9, 1, generator=g, dtype=torch.float64), torch.ones(2, 5, 1, 1, dtype=torch.float64)
    inputs = (ones[:, :1], k_idx, ones[:, :1, :, 0], ones[0, 0, 0])
    scores = gsa_ref.indexer_scores(*inputs, scale=0.7, start=8)  # [2, 1, 9], the same in every row
    arguments = {"q_idx": ones, "k_idx": k_idx, "head_logits": ones[..., 0], "bias": ones[0, 0, 0], "q": ones}
    arguments |= {"k": scores.mT[:, :, None] / temperature, "indexer_scale": 0.7, "scale": 1.0, "start": 4}
    arguments |= {"temperature": temperature, "lse": None}
    arguments["selection"] = None if pattern == "warm_up" else random_selection(pattern, 2, 5, 9, 4, g)
    loss, gradients = loss_and_gradients(arguments)
    budget = oracle.kl_tolerance(arguments)
    assert close(loss, 0.0, budget[0])
    assert all(close(gradient, torch.zeros_like(gradient), budget[1]) for gradient in gradients.values())
    if pattern == "warm_up":
        moved = {**arguments, "k_idx": k_idx.clone()}
        moved["k_idx"][:, 0] += 1
        assert indexer_kl_loss(**moved) > 1e-6


@given(CASES.filter(lambda case: case.values != "huge"), st.sampled_from((1e-6, 1e-3, 1.0, 1e6)))
def test_temperature_turns_the_student_from_the_best_score_to_uniform(case, temperature):
    """τ·KL lies within τ·ln n of Σ_s p (max I − I), which τ → 0 leaves; τ → ∞ leaves ln n less the entropy of p."""
    arguments = {**case.arguments(), "lse": None, "temperature": temperature}
    mask = over(arguments)
    rows = mask.any(-1)
    scores = gsa_ref.indexer_scores(
        *(arguments[name] for name in LEARNING),
        scale=case.scale,
        start=arguments["start"],
        lengths=arguments["lengths"],
    )
    everything = random_selection("full", case.B, case.L, case.S, case.S, torch.Generator())
    slots = arguments["selection"]
    if slots is None:
        index = torch.arange(case.S, dtype=torch.int32).expand(case.B, case.L, case.S)
        slots = Selection(index, torch.full_like(everything.counts, case.S))
    p = attention_probabilities(arguments, slots)[rows]
    scores, n = scores[rows].masked_fill(~mask[rows], -math.inf), mask[rows].sum(-1)
    loss = float(indexer_kl_loss(**arguments))
    slack = oracle.kl_tolerance(arguments)[0]
    if not len(p):
        assert loss == 0
        return
    gap = (p * (scores.amax(-1, keepdim=True) - scores).masked_fill(~mask[rows], 0)).sum(-1)
    assert abs(temperature * loss - gap.mean()) <= temperature * (n.double().log().mean() + slack) + 1e-12
    uniform = (n.double().log() + torch.special.xlogy(p, p).sum(-1)).mean()
    assert abs(loss - uniform) <= case.H_I / temperature + slack  # no two scores differ by more than H_I


@pytest.mark.parametrize("H_I", [1, 4])
def test_a_peaked_teacher_is_out_of_reach_without_a_temperature(H_I):
    """The best possible indexer: I = H_I at one key and 0 elsewhere. With 4 heads that key gets 1.3% of 4096."""
    n = 4096
    k_idx = torch.full((1, n, 1), -100.0, dtype=torch.float64)
    k_idx[0, 7] = 100
    arguments = {"q_idx": torch.ones(1, 1, H_I, 1, dtype=torch.float64), "k_idx": k_idx, "start": n - 1}
    arguments |= {"head_logits": torch.full((1, 1, H_I), 100.0).double(), "bias": torch.zeros(H_I).double()}
    arguments |= {"q": torch.ones(1, 1, 1, 1).double(), "k": 1000 * k_idx[:, :, None], "indexer_scale": 1.0}
    best = math.log(1 + (n - 1) * math.exp(-H_I))
    assert math.isclose(indexer_kl_loss(**arguments), best, rel_tol=1e-9)
    assert H_I != 4 or round(100 * math.exp(-best), 1) == 1.3
    assert indexer_kl_loss(**arguments, temperature=0.02) < 1e-9


@pytest.mark.property(41)
@given(CASES, st.floats(-3, 3))
def test_a_common_shift_of_the_keys_changes_nothing(case, shift):
    arguments = {**case.arguments(), "lse": None}
    shifted = {**arguments, "k": arguments["k"] + shift}
    tolerance = oracle.kl_tolerance(arguments)[0] + oracle.kl_tolerance(shifted)[0]
    assert close(indexer_kl_loss(**shifted), indexer_kl_loss(**arguments), tolerance)


@given(CASES, st.sampled_from((-2.0, 0.5, 4.0)))
def test_scale_is_a_factor_on_the_attention_s_logits(case, factor):
    """Bitwise, because the factor is a power of two; the default is 1/√d_h."""
    arguments = {**case.arguments(), "lse": None}
    scaled = {**arguments, "scale": factor * case.d_h**-0.5}
    assert torch.equal(indexer_kl_loss(**{**arguments, "q": factor * arguments["q"]}), indexer_kl_loss(**scaled))


@given(kl_cases("float64", phases=("sparse_lse",)))
def test_a_given_lse_is_the_one_that_counts(case):
    """lse + ln 2 halves the teacher: the loss becomes (KL − ln 2) / 2."""
    arguments = case.arguments()
    loss, halved = indexer_kl_loss(**arguments), indexer_kl_loss(**{**arguments, "lse": arguments["lse"] + math.log(2)})
    expected = (loss - math.log(2)) / 2 if over(arguments).any() else loss
    assert close(halved, expected, 2 * oracle.kl_tolerance(arguments)[0])


@pytest.mark.property(38)
@given(CASES)
def test_grouped_heads_equal_repeated_key_heads(case):
    arguments = case.arguments()
    repeated = {**arguments, "k": arguments["k"].repeat_interleave(case.group, 2)}
    assert close(indexer_kl_loss(**repeated), indexer_kl_loss(**arguments), 2 * oracle.kl_tolerance(arguments)[0])


@given(kl_cases("float64", phases=("sparse", "sparse_lse")), SEEDS)
def test_the_order_of_the_slots_changes_nothing(case, seed):
    arguments = case.arguments()
    indices, counts = arguments["selection"]
    g = torch.Generator().manual_seed(seed)
    order = (
        torch.rand(indices.shape, generator=g).masked_fill(torch.arange(case.width) >= counts[..., None], 2).argsort(-1)
    )
    mixed = {**arguments, "selection": Selection(indices.gather(-1, order), counts)}
    assert torch.equal(indexer_kl_loss(**mixed), indexer_kl_loss(**arguments))


@given(kl_cases("float64", phases=("warm_up",)))
def test_a_selection_of_everything_is_the_warm_up(case):
    arguments = case.arguments()
    index = torch.arange(case.S, dtype=torch.int32).expand(case.B, case.L, case.S)
    everything = Selection(index, torch.full((case.B, case.L), case.S, dtype=torch.int32))
    expected, gradients = loss_and_gradients(arguments)
    loss, others = loss_and_gradients({**arguments, "selection": everything})
    assert torch.equal(loss, expected)
    assert all(torch.equal(others[name], gradients[name]) for name in LEARNING)


@pytest.mark.property(49)
@given(CASES)
def test_keys_outside_every_distribution_change_nothing_and_get_no_gradient(case):
    """Unselected, future and padded positions."""
    arguments = oracle.contiguous(case.arguments())
    outside = ~over(arguments).any(1)  # [B, S]
    changed = {name: arguments[name].clone() for name in ("k", "k_idx")}
    for x in changed.values():
        x[outside] = 5 - 3 * x[outside]
    (loss, gradients), (other, others) = loss_and_gradients(arguments), loss_and_gradients({**arguments, **changed})
    assert torch.equal(loss, other)
    assert all(torch.equal(gradients[name], others[name]) for name in LEARNING)
    assert not gradients["k_idx"][outside].any()


@given(CASES, st.sampled_from((math.nan, math.inf, 1e30)))
def test_rows_that_are_not_valid_change_nothing_and_get_no_gradient(case, poison):
    arguments = oracle.contiguous(case.arguments())
    invalid = ~over(arguments).any(-1)  # [B, L]
    with torch.autograd.set_detect_anomaly(True):  # no NaN on the way either
        loss, gradients = loss_and_gradients(arguments)
    assert not any(gradients[name][invalid].any() for name in ("q_idx", "head_logits"))
    changed = {name: arguments[name].clone() for name in ("q", "q_idx", "head_logits")}
    for x in changed.values():
        x[invalid] = poison
    assert torch.equal(indexer_kl_loss(**{**arguments, **changed}), loss)


@pytest.mark.property(6)
@given(CASES)
def test_a_batch_is_the_mean_over_the_rows_of_its_sequences(case):
    """No sequence sees another; each weighs as many rows as it has."""
    arguments = case.arguments()
    loss, gradients = loss_and_gradients(arguments)
    rows = over(arguments).any(-1).sum(-1)  # [B]
    total, k_gradient = 0.0, []
    for b in range(case.B):
        part, parts = loss_and_gradients(oracle.alone(arguments, b, shared=("bias",)))
        total += float(rows[b] * part) / max(int(rows.sum()), 1)
        k_gradient.append(parts["k_idx"] * rows[b] / max(int(rows.sum()), 1))
    loss_tolerance, gradient_tolerance = oracle.kl_tolerance(arguments)
    assert close(loss, np.float64(total), 2 * loss_tolerance)
    assert close(gradients["k_idx"], torch.cat(k_gradient), 2 * gradient_tolerance)


@pytest.mark.parametrize("phase", PHASES)
@pytest.mark.parametrize(
    ("B", "L", "S", "options"),
    [(0, 3, 4, {}), (2, 0, 4, {}), (2, 3, 0, {}), (2, 3, 4, {"lengths": int32(0, -2)}), (2, 3, 4, {"counts": 0})],
)
def test_without_a_valid_row_the_loss_and_its_gradients_are_zero(phase, B, L, S, options):
    if phase == "warm_up" and "counts" in options:
        options = {"lengths": int32(0, 0)}
    g = torch.Generator().manual_seed(0)
    shapes = {"q_idx": (B, L, 2, 4), "k_idx": (B, S, 4), "head_logits": (B, L, 2), "bias": (2,)}
    shapes |= {"q": (B, L, 4, 2), "k": (B, S, 2, 2)}
    arguments: dict[str, Any] = {name: torch.randn(shape, generator=g) for name, shape in shapes.items()}
    arguments |= {"indexer_scale": 0.5, "selection": None, "lse": None, "lengths": options.get("lengths")}
    if phase != "warm_up":
        counts = torch.full((B, L), options.get("counts", min(2, S)), dtype=torch.int32)
        arguments["selection"] = Selection(torch.arange(2, dtype=torch.int32).expand(B, L, 2), counts)
    if phase == "sparse_lse":
        arguments["lse"] = torch.full((B, L, 4), -math.inf)
    loss, gradients = loss_and_gradients(arguments)
    assert loss == 0
    assert all(not gradients[name].any() for name in LEARNING)


@given(kl_cases("float64").filter(lambda case: case.lengths is None), st.data())
def test_a_nan_score_makes_the_loss_nan_if_its_row_counts_it(case, data):
    arguments = oracle.contiguous(case.arguments())
    mask = over(arguments)
    b, s = data.draw(st.integers(0, case.B - 1)), data.draw(st.integers(0, case.S - 1))
    arguments["k_idx"] = arguments["k_idx"].clone()
    arguments["k_idx"][b, s, 0] = math.nan
    assert bool(indexer_kl_loss(**arguments).isnan()) == bool(mask[b, :, s].any())


@given(st.sampled_from(("float16", "bfloat16")).flatmap(kl_cases))
def test_sixteen_bit_inputs_are_widened_before_anything_is_computed(case):
    """lse, too, is that of the wide logits here; `sparse_attention` in 16 bits rounds them first."""
    arguments = {**case.arguments(), "lse": None}
    wide = {name: x.float() if torch.is_tensor(x) and x.is_floating_point() else x for name, x in arguments.items()}
    if case.phase == "sparse_lse":
        lse = sparse_attention(wide["q"], wide["k"], wide["k"], wide["selection"], start=wide["start"])[1]
        arguments["lse"], wide["lse"] = lse, lse
    loss = indexer_kl_loss(**arguments)
    assert loss.dtype == torch.float32
    assert torch.equal(loss, indexer_kl_loss(**wide))


@given(kl_cases("float32"))
def test_autocast_rounds_nothing(case):
    arguments = case.arguments()
    expected, gradients = loss_and_gradients(arguments)
    leaves = {name: arguments[name].clone().requires_grad_() for name in LEARNING}
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = indexer_kl_loss(**{**arguments, **leaves})
    loss.backward()
    assert torch.equal(loss, expected)
    assert all(torch.equal(leaves[name].grad, gradients[name]) for name in LEARNING)


@pytest.mark.property(57)
@given(kl_cases("float32"))
def test_reruns_are_bitwise_equal(case):
    """Gradients included."""
    (loss, gradients), (again, others) = (loss_and_gradients(case.arguments()) for _ in range(2))
    assert torch.equal(loss, again)
    assert all(torch.equal(gradients[name], others[name]) for name in LEARNING)


@pytest.mark.property(46)
@settings(max_examples=8)
@given(SEEDS, st.sampled_from(PHASES), st.sampled_from((1.0, 0.1)))
def test_gradients_match_finite_differences(seed, phase, temperature):
    """Rows of padding and rows without a slot included."""
    arguments = dataclasses.replace(SMALL_CASE, seed=seed, phase=phase, temperature=temperature).arguments()
    inputs = [arguments[name].requires_grad_() for name in LEARNING]

    def loss(*tensors: Tensor) -> Tensor:
        return indexer_kl_loss(**{**arguments, **dict(zip(LEARNING, tensors, strict=True))})

    assert torch.autograd.gradcheck(loss, inputs, fast_mode=True)


@pytest.mark.property(48)
def test_the_backward_pass_is_linear_in_its_input():
    """A zero gradient gives exactly zero."""
    arguments = SMALL_CASE.arguments()
    inputs = [arguments[name].requires_grad_() for name in LEARNING]
    loss = indexer_kl_loss(**{**arguments, **dict(zip(LEARNING, inputs, strict=True))})
    one, four, zero = (
        torch.autograd.grad(loss, inputs, torch.tensor(x, dtype=torch.float64), retain_graph=True)
        for x in (1.0, -4.0, 0.0)
    )
    assert all(torch.equal(-4 * x, y) for x, y in zip(one, four, strict=True))
    assert not any(x.any() for x in zero)


@pytest.mark.property(55)
@pytest.mark.parametrize("phase", PHASES)
def test_compiled_equals_eager_in_one_graph(phase):
    """Forward and backward."""
    torch.compiler.reset()
    arguments = dataclasses.replace(SMALL_CASE, phase=phase).arguments()
    compiled = torch.compile(indexer_kl_loss, fullgraph=True, backend="aot_eager")
    expected, gradients = loss_and_gradients(arguments)
    leaves = {name: arguments[name].clone().requires_grad_() for name in LEARNING}
    loss = compiled(**{**arguments, **leaves})
    loss.backward()
    tolerances = oracle.kl_tolerance(arguments)
    assert close(loss, expected, tolerances[0])
    assert all(close(leaves[name].grad, gradients[name], tolerances[1]) for name in LEARNING)


# --- captured mass ------------------------------------------------------------------------------------------------


@given(kl_cases("float64", phases=("sparse",)))
def test_captured_mass_is_the_attention_on_the_selection_and_on_the_best_one(case):
    """Against the probabilities of dense attention, with a sort for the best."""
    arguments = case.arguments()
    options = {name: arguments[name] for name in ("start", "lengths")}
    selected, best = captured_mass(arguments["q"], arguments["k"], arguments["selection"], **options)
    index = torch.arange(case.S, dtype=torch.int32).expand(case.B, case.L, case.S)
    everything = Selection(index, torch.full((case.B, case.L), case.S, dtype=torch.int32))
    p = attention_probabilities(arguments, everything)
    mask = over(arguments)
    budget = oracle.attention_tolerance({**arguments, "v": arguments["k"], "selection": everything})[0]
    budget = case.S * (budget / max(float(arguments["k"].abs().max()), 1e-9) + gamma(64, 2.0**-53))
    for b in range(case.B):
        for t in range(case.L):
            chosen = p[b, t][mask[b, t]]
            assert close(selected[b, t], chosen.sum(), budget)
            top = p[b, t].sort(descending=True)[0][: len(chosen)].sum()
            assert close(best[b, t], top, budget)
    assert (selected <= best + budget).all()
    assert (best <= 1 + budget).all()


@given(kl_cases("float32", phases=("sparse",)))
def test_a_selection_of_everything_captures_everything(case):
    arguments = case.arguments()
    index = torch.arange(case.S, dtype=torch.int32).expand(case.B, case.L, case.S)
    everything = Selection(index, torch.full((case.B, case.L), case.S, dtype=torch.int32))
    options = {name: arguments[name] for name in ("start", "lengths")}
    selected, best = captured_mass(arguments["q"].requires_grad_(), arguments["k"], everything, **options)
    valid = over({**arguments, "selection": None}).any(-1)
    budget = 1e-3 if case.attended_values == "huge" else 64 * 2.0**-24 * case.S
    assert not selected.requires_grad
    assert ((selected - valid.float()).abs() <= budget).all()
    assert ((best - valid.float()).abs() <= budget).all()


# --- the layer ----------------------------------------------------------------------------------------------------


def trained(phase: str, **changes: Any) -> GatedSparseAttention:
    layer = build(dataclasses.replace(SMALL, **changes)).train()
    layer.set_phase(phase)
    return layer


def gold_loss(layer: GatedSparseAttention, h: Tensor, lengths: list[int], *, dense: bool) -> float:
    """Eq. 15 for a batch from the equations alone."""
    w, c = {name: oracle.array(x) for name, x in layer.state_dict().items()}, layer.config
    total, scale = 0.0, c.d_I**-0.5
    for x, n in zip(oracle.array(h), lengths, strict=True):
        x = x[:n]
        q, k = (
            equations.apply_rope((x @ w[f"W_{i}.weight"].T).reshape(n, H, c.d_h))
            for i, H in (("q", c.H), ("k", c.H_kv))
        )
        indexer = [(x @ w["indexer.W_iq.weight"].T).reshape(n, c.H_I, c.d_I)]
        indexer += [x @ w[f"indexer.{i}.weight"].T for i in ("W_ik", "W_iw")] + [w["indexer.bias"]]
        scores = equations.indexer_scores(*indexer, scale=scale)
        sizes = {"k_base": c.k_base, "k_min": c.k_min, "k_max": c.k_max, "rule": c.rule}
        mean = float(layer.mean_variance)
        budget = equations.token_budget(equations.score_variance(scores), mean, np.arange(n) + 1, **sizes)
        selection = None if dense else equations.select_tokens(scores, budget)
        total += n * equations.indexer_kl_loss(
            *indexer, q, k, indexer_scale=scale, selection=selection, temperature=c.kl_temperature
        )
    return total / max(sum(lengths), 1)


@pytest.mark.parametrize("phase", ["warm_up", "sparse"])
@pytest.mark.parametrize("lengths", [[20, 20, 20], [20, 7, 0], [0, 0, 0]])
@pytest.mark.parametrize("temperature", [1.0, 0.2])
def test_the_layer_s_loss_is_that_of_the_equations(phase, lengths, temperature):
    layer, h = trained(phase, kl_temperature=temperature), hidden(3, 20, SMALL.d)
    loss = layer(h, lengths=int32(*lengths)).indexer_loss.detach()
    assert loss.dtype == torch.float64
    assert math.isclose(loss, gold_loss(layer, h, lengths, dense=phase == "warm_up"), rel_tol=1e-9, abs_tol=0)


@pytest.mark.parametrize("variant", ["dense", "gated"])
def test_a_layer_without_an_indexer_has_no_loss_and_no_warm_up(variant):
    layer = build(SMALL.variant(variant)).train()
    layer.set_phase("sparse")
    assert layer(hidden(1, 20, SMALL.d)).indexer_loss is None
    with pytest.raises(ValueError, match=r'^phase: expected "sparse" for a layer without an indexer, got "warm_up"$'):
        layer.set_phase("warm_up")
    assert all(parameter.requires_grad for parameter in layer.parameters())


def test_evaluation_has_no_loss_and_is_the_same_in_both_phases():
    layer, h = build(SMALL), hidden(2, 40, SMALL.d)
    expected = layer(h)
    layer.set_phase("warm_up")
    output = layer(h)
    assert output.indexer_loss is expected.indexer_loss is None
    assert torch.equal(output.hidden, expected.hidden)


@torch.no_grad()
def test_a_step_with_a_cache_has_no_loss():
    """A cache carries no gradient; training mode takes one where nothing does."""
    layer, cache = build(SMALL).train(), GSACache.allocate(SMALL, 2, 20, dtype=torch.float64)
    assert layer(hidden(2, 12, SMALL.d), cache=cache).indexer_loss is None
    assert layer(hidden(2, 12, SMALL.d)).indexer_loss is not None


@pytest.mark.property(52)
@pytest.mark.pitfall("indexer-never-learns")
@pytest.mark.parametrize("phase", ["warm_up", "sparse"])
@pytest.mark.parametrize("gates", ["none", "both"])
def test_the_indexer_learns_from_its_loss_alone_and_nothing_else_does(phase, gates):
    """The indexer gets nothing from another loss; h and the other parameters get nothing from its loss."""
    layer, h = trained(phase, gates=gates), hidden(2, 40, SMALL.d).requires_grad_()
    names = [name for name, parameter in layer.named_parameters() if parameter.requires_grad]
    indexer = [name for name in names if name.startswith("indexer.")]
    assert len(indexer) == 4
    assert (names == indexer) == (phase == "warm_up")
    output = layer(h)
    output.indexer_loss.backward(retain_graph=True)
    assert h.grad is None
    for name, parameter in layer.named_parameters():
        if name in indexer:
            assert parameter.grad.isfinite().all()
            assert parameter.grad.any(), name
        else:
            assert parameter.grad is None, name
    own = {name: layer.get_parameter(name).grad.clone() for name in indexer}
    output.hidden.square().sum().backward()
    assert h.grad.any()
    for name, parameter in layer.named_parameters():
        if name in indexer:
            assert torch.equal(parameter.grad, own[name])
        else:
            assert (parameter.grad is not None) == (phase == "sparse"), name


@pytest.mark.parametrize("variant", ["sparse", "gsa"])
def test_the_warm_up_attends_as_the_dense_variant_and_counts_the_rows_of_the_sparse_one(variant):
    config = SMALL.variant(variant)
    layer, other = build(config).train(), build(config).train()
    dense = build(dataclasses.replace(config, sparse=False))
    dense.load_state_dict({name: x for name, x in layer.state_dict().items() if name in dense.state_dict()})
    h, lengths = hidden(2, 40, SMALL.d), int32(40, 13)
    layer.set_phase("warm_up")
    assert torch.equal(layer(h, lengths=lengths).hidden, dense(h, lengths=lengths).hidden)
    other(h, lengths=lengths)
    assert layer.pending_variance_count == other.pending_variance_count == 53
    assert torch.equal(layer.pending_variance_sum, other.pending_variance_sum)


def test_a_phase_decides_what_requires_a_gradient():
    model = LanguageModel(CONFIG)
    for phase in ("warm_up", "sparse", "warm_up"):
        model.set_phase(phase)
        learning = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
        indexers = {name for name, _ in model.named_parameters() if ".indexer." in name}
        assert len(indexers) == 8
        assert learning == (indexers if phase == "warm_up" else {name for name, _ in model.named_parameters()})
        assert [block.attention.phase for block in model.blocks] == [phase] * 2


@pytest.mark.bad_input
@pytest.mark.parametrize(("phase", "exception"), [("dense", ValueError), (None, TypeError)])
def test_an_unknown_phase_is_refused(phase, exception):
    for module in (build(SMALL), LanguageModel(CONFIG)):
        with pytest.raises(exception, match=rf"^phase: expected .*, got .*{phase}"):
            module.set_phase(phase)


def test_a_model_without_indexers_refuses_the_warm_up_and_stays_as_it_was():
    model = LanguageModel(CONFIG.variant("gated"))
    with pytest.raises(ValueError, match=r"^phase: expected "):
        model.set_phase("warm_up")
    assert all(parameter.requires_grad for parameter in model.parameters())


@pytest.mark.parametrize("phase", ["warm_up", "sparse"])
def test_one_loss_trains_the_model_and_its_indexers(phase):
    """lm_loss + indexer_loss gives every parameter that requires a gradient the one of its own loss."""
    torch.manual_seed(0)
    model = LanguageModel(CONFIG).train()
    model.set_phase(phase)
    tokens = torch.randint(256, (2, 31))
    output = model(tokens[:, :-1])
    lm_loss = nn.functional.cross_entropy(output.logits.flatten(0, 1), tokens[:, 1:].flatten())
    (lm_loss + output.indexer_loss).backward()
    for name, parameter in model.named_parameters():
        assert (parameter.grad is not None) == (phase == "sparse" or ".indexer." in name), name
        assert parameter.grad is None or parameter.grad.any(), name


@pytest.mark.pitfall("indexer-never-learns")
@pytest.mark.parametrize("phase", ["warm_up", "sparse"])
def test_training_on_the_loss_makes_the_indexer_find_what_attention_looks_at(phase):
    """On fixed data whose attention is peaked; the rest of the layer stands still."""
    layer = trained(phase, kl_temperature=0.1, H_I=4, rule="fixed", k_base=6)
    with torch.no_grad():
        layer.W_q.weight *= 2
    h = hidden(2, 40, SMALL.d)
    optimizer = torch.optim.Adam(layer.indexer.parameters(), lr=0.03)
    losses, shares = [], []
    record: dict[str, Any] = {}
    function = layer._indexer_kl_loss

    def see(*arguments: Tensor, **options: Any) -> Tensor:
        record.update(q=arguments[4], k=arguments[5])
        return function(*arguments, **options)

    layer._indexer_kl_loss = see
    for _ in range(150):
        loss = layer(h).indexer_loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
        if len(losses) in (1, 150):
            q_idx, k_idx, head_logits = layer.indexer(h)
            selection, _ = gsa_ref.indexed_selection(
                q_idx, k_idx, head_logits, layer.indexer.bias, mean_variance=layer.mean_variance, config=layer.config
            )
            selected, best = captured_mass(record["q"], record["k"], selection)
            shares.append(float((selected / best)[:, 10:].mean()))
    assert losses[-1] < 0.5 * losses[0]
    if phase == "warm_up":  # in the sparse phase the loss says nothing of what was not selected
        assert shares[1] > 0.5 * (1 + shares[0])


def test_autocast_trains_with_a_loss_near_that_of_float32():
    layer, h = build(SMALL).float().train(), hidden(2, 40, SMALL.d).float()
    with torch.no_grad():
        expected = layer(h).indexer_loss
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output = layer(h)
    (output.indexer_loss + output.hidden.float().square().mean()).backward()
    assert output.indexer_loss.dtype == torch.float32
    assert abs(output.indexer_loss.detach() - expected) < 0.1 * expected
    assert all(parameter.grad.isfinite().all() for parameter in layer.parameters())
    assert all(parameter.grad.any() for parameter in layer.indexer.parameters())


# --- V̄ and the selection under checkpointing, compilation and conversion -------------------------------------------


def loss_of(output: gsa_ref.GSAOutput) -> Tensor:
    return output.hidden.square().sum() + output.indexer_loss


@pytest.mark.parametrize("phase", ["warm_up", "sparse"])
@pytest.mark.parametrize("use_reentrant", [False, True])
def test_a_checkpoint_recomputes_the_same_selection_and_loss(phase, use_reentrant):
    """The recomputed forward pass counts no row, and runs before V̄ moves."""
    layer, plain, h = trained(phase), trained(phase), hidden(2, 40, SMALL.d)
    selections = []

    def record(*arguments: Tensor, **options: Any) -> Any:
        selection, variance = gsa_ref.indexed_selection(*arguments, **options)
        selections.append(selection)
        return selection, variance

    layer._indexed_selection = record
    x, y = h.clone().requires_grad_(), h.clone().requires_grad_()

    def run(x: Tensor) -> tuple[Tensor, Tensor]:
        output = layer(x)
        return output.hidden, output.indexer_loss

    for step in range(2):  # two micro-batches
        part, loss = checkpoint(run, x, use_reentrant=use_reentrant)
        (part.square().sum() + loss).backward()
        loss_of(plain(y)).backward()
        assert len(selections) == 2 * step + 2
        assert torch.equal(selections[-1].indices, selections[-2].indices)
    assert layer.pending_variance_count == plain.pending_variance_count == 160
    assert torch.equal(layer.pending_variance_sum, plain.pending_variance_sum)
    for (name, one), other in zip(layer.named_parameters(), plain.parameters(), strict=True):
        assert (one.grad is None) == (other.grad is None), name
        assert one.grad is None or torch.equal(one.grad, other.grad), name
    for one in (layer, plain):
        one.update_mean_variance()
    assert torch.equal(layer.mean_variance, plain.mean_variance)


@pytest.mark.parametrize("order", ["checkpoint of a compiled layer", "compiled checkpoint of a layer"])
def test_compiled_checkpoints_count_their_rows_once(order):
    """A compiled graph runs again when it is recomputed: it must ask each time why it runs."""
    torch.compiler.reset()
    layer, plain = build(SMALL).train(), build(SMALL).train()
    x = hidden(2, 20, SMALL.d).requires_grad_()
    if order.startswith("checkpoint"):
        compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")

        def run(x: Tensor) -> Tensor:
            return loss_of(checkpoint(compiled, x, use_reentrant=False))
    else:
        run = torch.compile(
            lambda x: loss_of(checkpoint(layer, x, use_reentrant=False)), fullgraph=True, backend="aot_eager"
        )
    for _ in range(2):
        run(x).backward()
        loss_of(plain(x)).backward()
    assert layer.pending_variance_count == plain.pending_variance_count == 80
    assert math.isclose(layer.pending_variance_sum, plain.pending_variance_sum, rel_tol=2.0**-22)


def test_pending_rows_follow_the_layer_and_are_not_part_of_its_state():
    layer = build(SMALL).train()
    layer(hidden(2, 20, SMALL.d))
    assert "mean_variance" in layer.state_dict()
    assert not any("pending" in name for name in (*layer.state_dict(), *dict(layer.named_buffers())))
    twin = copy.deepcopy(layer)
    assert twin.pending_variance_sum is not layer.pending_variance_sum
    assert twin.pending_variance_count == 40
    half = twin.to(torch.bfloat16)
    assert torch.equal(half.pending_variance_sum, layer.pending_variance_sum)
    assert half.pending_variance_sum.dtype == torch.float32
    assert twin.to("meta").pending_variance_sum.is_meta


@pytest.mark.parametrize("assign", [False, True])
def test_a_layer_made_without_memory_starts_to_count_at_zero(assign):
    """On the meta device, as large models are made; what `to_empty` leaves in memory must not count."""
    with torch.device("meta"):
        layer = GatedSparseAttention(SMALL).double()
    if not assign:
        layer.to_empty(device="cpu")
    layer.load_state_dict(build(SMALL).state_dict(), assign=assign)
    layer.train()(hidden(2, 20, SMALL.d))
    assert layer.pending_variance_count == 40
    expected = build(SMALL).train()
    expected(hidden(2, 20, SMALL.d))
    assert torch.equal(layer.pending_variance_sum, expected.pending_variance_sum)


# --- several processes --------------------------------------------------------------------------------------------


def test_two_processes_train_as_one(tmp_path):
    """Warm-up and sparse phase, two micro-batches a step; with `restart`, a new model takes over the state half way."""
    torch.multiprocessing.spawn(ranks.worker, (2, str(tmp_path)), nprocs=2)
    alone = ranks.train("plain")
    assert alone["losses"][-1, 1] < alone["losses"][2, 1]  # the indexer learns here
    for rank in range(2):
        for run, result in torch.load(tmp_path / f"{rank}.pt", weights_only=True).items():
            assert torch.equal(result["pending"], alone["pending"]), run  # no row is lost, none counts twice
            assert torch.allclose(result["mean_variance"], alone["mean_variance"], rtol=2.0**-21, atol=0), run
            assert torch.allclose(result["losses"], alone["losses"], rtol=1e-12, atol=0), run
            assert result["state"].keys() == alone["state"].keys()
            for name, x in result["state"].items():
                tolerance = 2.0**-21 if x.dtype == torch.float32 else 1e-12
                assert torch.allclose(x, alone["state"][name], rtol=tolerance, atol=1e-12), (run, name)


def test_a_new_model_that_takes_over_the_state_goes_on_as_if_nothing_had_happened():
    whole, again = ranks.train("plain"), ranks.train("plain", restart=3)
    assert torch.equal(again["losses"], whole["losses"])
    assert all(torch.equal(x, whole["state"][name]) for name, x in again["state"].items())


def test_captured_mass_counts_what_lies_below_the_lengths_at_the_given_scale():
    """Logits scale·(0, 1, 2, 3) of the keys; the last query sees all, but only three are valid, of which it selects two
    and one beyond.
    """
    q, k = torch.ones(1, 4, 1, 2), torch.zeros(1, 4, 1, 2)
    k[0, :, 0, 0] = torch.arange(4.0)
    slots = torch.full((1, 4, 3), -1, dtype=torch.int32)
    slots[0, 2] = torch.tensor([0, 1, 3])  # 3 is in no row's past
    selection = Selection(slots, torch.tensor([[0, 0, 3, 0]], dtype=torch.int32))
    for scale in (0.25, 2.0):
        weights = [math.exp(scale * s) for s in range(3)]
        selected, best = captured_mass(
            q, k, selection, scale=scale, start=0, lengths=torch.tensor([3], dtype=torch.int32)
        )
        assert float(selected[0, 2]) == pytest.approx((weights[0] + weights[1]) / sum(weights), rel=1e-5)
        assert float(best[0, 2]) == pytest.approx((weights[2] + weights[1]) / sum(weights), rel=1e-5)
        assert not selected[0, 3]  # padding
    behind = captured_mass(q, k, selection, scale=2.0, start=1, lengths=torch.tensor([3], dtype=torch.int32))
    assert float(behind[0][0, 2]) == 0  # row 2 is position 3: padding now


def test_captured_mass_by_hand():
    """Two heads that weigh two keys 1 : 1 and 1 : 3. Query 0 sees one of them; query 2, behind both, is padding."""
    q, k = torch.tensor([[[[0.0], [1.0]]] * 3]), torch.tensor([[[[0.0]], [[math.log(3)]]]])
    first = Selection(torch.zeros(1, 3, 1, dtype=torch.int32), torch.ones(1, 3, dtype=torch.int32))
    selected, best = captured_mass(q, k, first, scale=1.0)
    assert torch.allclose(selected, torch.tensor([[1, (1 / 2 + 1 / 4) / 2, 0]]))
    assert torch.allclose(best, torch.tensor([[1, (1 / 2 + 3 / 4) / 2, 0]]))


def test_the_last_position_that_int32_holds_is_a_start_of_captured_mass():
    """However many heads there are. Lengths may lie behind the last key; a selection of all keys holds everything."""
    selection = Selection(torch.arange(3, dtype=torch.int32).expand(1, 2, 3), torch.full((1, 2), 3, dtype=torch.int32))
    q, k = torch.ones(1, 2, 4, 2), torch.ones(1, 3, 2, 2)
    for x in captured_mass(q, k, selection, start=2**31 - 3, lengths=torch.tensor([2**31 - 1], dtype=torch.int32)):
        assert torch.allclose(x, torch.ones(1, 2))


def test_a_row_of_padding_captures_nothing_whatever_it_holds():
    q = torch.ones(1, 3, 1, 2)
    q[0, 2] = math.nan
    selection = Selection(torch.zeros(1, 3, 1, dtype=torch.int32), torch.ones(1, 3, dtype=torch.int32))
    for x in captured_mass(q, torch.ones(1, 3, 1, 2), selection, lengths=torch.tensor([2], dtype=torch.int32)):
        assert x[0, 2] == 0


def test_queries_behind_the_last_key_learn_from_all_keys():
    """`lengths` counts positions, of which the last may lie behind the keys that are given."""
    g = torch.Generator().manual_seed(0)
    shapes = {"q_idx": (2, 2, 4), "k_idx": (3, 4), "head_logits": (2, 2), "bias": (2,), "q": (2, 2, 4), "k": (3, 1, 4)}
    x = {name: torch.randn(shape, generator=g, dtype=torch.float64) for name, shape in shapes.items()}
    arrays = {name: value.numpy() for name, value in x.items()}
    options = {"indexer_scale": 0.5, "temperature": 0.3, "start": 5}
    expected = gsa_ref.equations.indexer_kl_loss(**arrays, **options, length=7)
    everything = gsa_ref.equations.indexer_kl_loss(
        **arrays, **options | {"start": 2}, length=4
    )  # both rows see all keys
    assert expected == pytest.approx(everything, rel=1e-12)
    gradient = gsa_ref.equations.indexer_kl_gradient(**arrays, **options, length=7)
    for a, b in zip(
        gradient, gsa_ref.equations.indexer_kl_gradient(**arrays, **options | {"start": 2}, length=4), strict=True
    ):
        np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-15)
    batch = {name: value if name == "bias" else value[None] for name, value in x.items()}
    loss = indexer_kl_loss(**batch, **options, lengths=torch.tensor([7], dtype=torch.int32))
    assert float(loss) == pytest.approx(expected, rel=1e-12)
