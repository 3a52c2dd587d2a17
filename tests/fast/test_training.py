"""Kernels of the indexer's KL loss and its gradients."""

import dataclasses
import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

import gsa_fast
import gsa_ref
from gsa_fast import training
from gsa_fast.verification.checks import filled, kl_positions, numpy
from gsa_fast.verification.interpreter import poisoned_memory, small_tiles
from gsa_ref import Selection, equations
from gsa_ref.cases import PHASES, Limits, TrainingCase, training_cases
from gsa_ref.check import error_budget, kl_tolerance
from tests.fast.helpers import DTYPES, alone, assert_in_budget, contiguous, examples, int32, same, widely_strided

LIMITS = Limits(B=2, L=6, S=24, heads=2, group=2, width=24)
# Longer than a tile of `small_tiles` along every axis, and than its chunks.
SEVERAL_TILES = Limits(B=2, L=18, S=36, heads=2, group=2, width=40)
LEARNED = ("q_idx", "k_idx", "head_logits", "bias")

phases = pytest.mark.parametrize("phase", PHASES)


def cases(phase: str, limits: Limits = LIMITS, dtype: str = "float32") -> st.SearchStrategy[TrainingCase]:
    return training_cases(dtype, limits).map(lambda case: dataclasses.replace(case, phase=phase))


def draw(data: st.DataObject, phase: str, limits: Limits = LIMITS, dtype: str = "float32") -> TrainingCase:
    return data.draw(cases(phase, limits, dtype))


def loss_of(arguments: dict[str, Any], **changes: Any) -> torch.Tensor:
    with poisoned_memory():
        return gsa_fast.indexer_kl_loss(**{**arguments, **changes}, impl="triton")


def loss_and_gradients(arguments: dict[str, Any], *, upstream: float = 1.0, **changes: Any) -> tuple[torch.Tensor, ...]:
    given_ = {**arguments, **changes}
    given_.update({name: given_[name].detach().requires_grad_() for name in LEARNED})
    loss = loss_of(given_)
    gradients = torch.autograd.grad(loss, [given_[name] for name in LEARNED], torch.full_like(loss, upstream))
    return loss.detach(), *gradients


def small(phase: str, device: str, *, seed: int = 0, **changes: Any) -> dict[str, Any]:
    """A case whose sizes are all different: two sequences, one of them padded, with queries behind a cache."""
    sizes: dict[str, Any] = {
        "B": 2, "L": 5, "S": 12, "H_I": 3, "d_I": 8, "start": 7, "lengths": (12, 10), "dtype": "float32",
        "values": "normal", "layout": "margins", "seed": seed, "H_kv": 2, "group": 2, "d_h": 16, "phase": phase,
        "width": 6, "pattern": "random", "temperature": 0.5, "attended_values": "normal",
    }  # fmt: skip
    return TrainingCase(**{**sizes, **changes}).training_arguments(device)


# --- against the equations ----------------------------------------------------------------------------------------


@pytest.mark.property(47)
@pytest.mark.usefixtures("bf16")
@pytest.mark.parametrize("dtype", DTYPES)
@phases
@examples(5)
@given(data=st.data())
def test_loss_and_gradients_stay_in_their_error_budgets(phase, dtype, data, device):
    assert_in_budget(draw(data, phase, LIMITS, dtype), device)


@pytest.mark.property(47)
@pytest.mark.usefixtures("bf16")
@pytest.mark.parametrize("dtype", DTYPES)
@phases
@examples(2)
@given(data=st.data())
def test_loss_and_gradients_stay_in_their_error_budgets_over_several_tiles_and_chunks(phase, dtype, data, device):
    with small_tiles():
        assert_in_budget(draw(data, phase, SEVERAL_TILES, dtype), device)


@pytest.mark.parametrize("phase", ["warm_up", "sparse"])
@examples(4)
@given(data=st.data())
def test_loss_and_gradients_are_those_derived_by_hand(phase, data, device):
    """Against the NumPy equations, which have the gradient in closed form. One sequence: they know no batch."""
    case = draw(data, phase, dataclasses.replace(LIMITS, B=1))
    arguments = case.training_arguments(device)
    results = loss_and_gradients(arguments)
    start = int(torch.as_tensor(arguments["start"]).reshape(-1)[0])
    length = case.S if case.lengths is None else case.lengths[0]
    S_t = filled(arguments["selection"], start, case.S) if phase == "sparse" else None
    inputs = [numpy(arguments[name] if name == "bias" else arguments[name][0]) for name in (*LEARNED, "q", "k")]
    factors = {"indexer_scale": case.scale, "temperature": case.temperature}
    keywords: dict[str, Any] = {**factors, "selection": S_t, "start": start, "length": length}
    gold = [equations.indexer_kl_loss(*inputs, **keywords), *equations.indexer_kl_gradient(*inputs, **keywords)]
    over = numpy(kl_positions(arguments))[0]
    bounds = kl_tolerance(*inputs, over, scale=case.d_h**-0.5, **factors)
    for (name, bound), got, exact in zip(bounds.items(), results, gold, strict=True):
        got_ = numpy(got) if name in ("loss", "bias") else numpy(got[0])
        tolerance = bound / max(1, over.any(-1).sum()) / case.temperature + 2.0**-22 * np.abs(exact)
        assert (np.abs(got_ - exact) <= tolerance).all(), name


@examples(4)
@given(data=st.data())
def test_a_loss_scale_keeps_what_float16_gradients_would_lose(data, device):
    """Gradients of 10^−9 are nothing in float16, but multiplied by the gradient of a scaled loss they are."""
    case = dataclasses.replace(
        draw(data, "warm_up", dtype="float16"),
        values="tiny",
        attended_values="normal",
        temperature=10.0,
        layout="margins",
    )
    arguments = case.training_arguments(device)
    scaled = loss_and_gradients(arguments, upstream=2.0**16)[1:]
    wide = {name: arguments[name].double().requires_grad_() for name in LEARNED}
    loss = gsa_ref.indexer_kl_loss(**{**arguments, **wide, "q": arguments["q"].double(), "k": arguments["k"].double()})
    gold = torch.autograd.grad(loss * 2.0**16, list(wide.values()))
    over = kl_positions(arguments)
    for name, got, exact in zip(LEARNED, scaled, gold, strict=True):
        # A number of float32 accuracy, rounded once; what cancels is bounded by the spread of two distributions, whose
        # weights are as accurate only if the logits are not large.
        spread = 2.0**-20 * 2.0**16 * int(over.sum()) / max(1, int(over.any(-1).sum())) / case.temperature
        bound = numpy(exact.abs()) * 2.0**-10 + 2.0**-24 + spread * (1e-3 if name in ("q_idx", "k_idx") else 1.0)
        assert (np.abs(numpy(got) - numpy(exact)) <= bound).all(), name


# --- properties ---------------------------------------------------------------------------------------------------


@phases
@examples(5)
@given(data=st.data())
def test_the_loss_is_not_negative(phase, data, device):
    """Up to rounding: a divergence of 0 is a difference of numbers as large as ln S and I/τ."""
    case = draw(data, phase)
    size = math.log(case.S) + case.H_I / case.temperature
    assert loss_of(case.training_arguments(device)) >= -1e-6 * size - (1e-4 if phase == "sparse_lse" else 0)


@phases
def test_a_student_that_agrees_with_its_teacher_has_no_loss_and_no_gradient(phase, device):
    """All keys alike: both distributions are uniform."""
    arguments = small(phase, device, values="constant", attended_values="constant")
    for x in loss_and_gradients(arguments):
        assert x.abs().max() < 1e-6


@pytest.mark.property(48)
@phases
def test_the_gradient_is_linear_in_the_gradient_of_the_loss(phase, device):
    """Exactly, for a power of two and for 0."""
    arguments = small(phase, device)
    _, *once = loss_and_gradients(arguments)
    _, *four_times = loss_and_gradients(arguments, upstream=4.0)
    _, *never = loss_and_gradients(arguments, upstream=0.0)
    assert same([4 * x for x in once], four_times)
    assert not any(x.any() for x in never)


@pytest.mark.property(49)
@pytest.mark.pitfall("nan-in-the-backward-pass")
@phases
@examples(4)
@given(data=st.data())
def test_nobody_learns_from_what_is_not_attended(phase, data, device):
    """NaN in keys that no row reads and rows that do not count changes nothing; their gradients are 0."""
    case = draw(data, phase)
    arguments = case.training_arguments(device)
    over = kl_positions(arguments)
    dead_keys, dead_rows = ~over.any(1), ~over.any(2)  # [B, S], [B, L]
    poisoned = {name: arguments[name].clone() for name in ("q_idx", "k_idx", "head_logits", "q", "k")}
    for name, x in poisoned.items():
        x[dead_keys if name in ("k_idx", "k") else dead_rows] = math.nan
    results = loss_and_gradients(arguments, **poisoned)
    assert same(results, loss_and_gradients(arguments))
    _, q_gradient, k_gradient, weight_gradient, _ = results
    assert not k_gradient[dead_keys].any()
    assert not q_gradient[dead_rows].any()
    assert not weight_gradient[dead_rows].any()


@pytest.mark.parametrize("name", ["q_idx", "k_idx", "head_logits", "q", "k"])
@phases
def test_a_nan_that_is_attended_spoils_the_loss(phase, name, device):
    arguments = small(phase, device, pattern="full", width=12)
    arguments[name] = arguments[name].clone()
    arguments[name][0, 1] = math.nan
    assert loss_of(arguments).isnan()


@pytest.mark.property(6)
@phases
def test_a_sequence_contributes_the_same_alone_and_in_a_batch(phase, device):
    """The sums over rows add up; what belongs to one sequence differs by the number of rows only."""
    arguments = small(phase, device)
    loss, *gradients = loss_and_gradients(arguments)
    n_rows = kl_positions(arguments).any(-1).sum(-1).tolist()
    assert n_rows == [5, 3]
    total = 0.0
    for b in range(2):
        loss_alone, *of_one = loss_and_gradients(alone(arguments, b))
        total += float(loss_alone) * n_rows[b] / sum(n_rows)
        for whole, part in zip(gradients[:3], of_one[:3], strict=True):
            torch.testing.assert_close(whole[b] * sum(n_rows), part[0] * n_rows[b], rtol=1e-6, atol=1e-12)
    assert math.isclose(float(loss), total, rel_tol=1e-6)


@pytest.mark.property(9)
@phases
@examples(2)
@given(data=st.data())
def test_strided_inputs_equal_contiguous_ones_bitwise(phase, data, device):
    case = draw(data, phase)
    arguments = dataclasses.replace(case, layout="permuted").training_arguments(device)
    assert same(loss_and_gradients(arguments), loss_and_gradients(contiguous(arguments)))


@pytest.mark.property(57)
@phases
def test_reruns_are_bitwise_equal(phase, device):
    """Over several tiles and chunks."""
    arguments = small(phase, device, L=18, S=20, start=2, lengths=(20, 19))
    with small_tiles():
        assert same(loss_and_gradients(arguments), loss_and_gradients(arguments))


@pytest.mark.parametrize("start", [0, 4])
@phases
def test_one_start_for_all_equals_the_same_start_for_each(phase, start, device):
    arguments = {**small(phase, device), "start": start, "lengths": None}
    each = {"start": int32([start] * 2, device), "lengths": int32([12] * 2, device)}
    assert same(loss_and_gradients(arguments), loss_and_gradients(arguments, **each))


@pytest.mark.property(27)
@pytest.mark.parametrize("rows", [1, 2, 3])
@phases
def test_chunks_of_rows_change_nothing_but_the_order_of_a_sum(phase, rows, device, monkeypatch):
    """Only the sum over queries, in the gradient of the keys, is cut into chunks."""
    arguments = small(phase, device)
    whole = loss_and_gradients(arguments)
    K = 0 if phase == "warm_up" else 6
    monkeypatch.setattr(training, "CHUNK_BYTES", 4 * 2 * (12 + K) * rows)
    chunked = loss_and_gradients(arguments)
    assert same([x for i, x in enumerate(whole) if i != 2], [x for i, x in enumerate(chunked) if i != 2])
    verdict = error_budget(
        numpy(chunked[2]), numpy(whole[2]), numpy(whole[2]), torch.float32, tolerance=1e-6 * float(whole[2].abs().max())
    )
    assert verdict, verdict


@pytest.mark.pitfall("all-pairs-in-memory")
@phases
def test_no_array_of_all_pairs_is_ever_held(phase, device, monkeypatch):
    """Every tensor that the operator makes is smaller than L·S elements, unless it has the shape of an input."""
    sizes = {"B": 1, "L": 48, "S": 48, "H_I": 1, "d_I": 4, "H_kv": 1, "group": 1, "d_h": 4, "start": 0, "width": 3}
    arguments = contiguous(small(phase, device, **sizes, lengths=None))
    operator = training._indexer_kl_loss
    seen: list[int] = []

    class Sizes(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            result = function(*args, **(kwargs or {}))
            # The interpreter copies its arguments, as bytes.
            seen.extend(x.numel() for x in [result] if torch.is_tensor(x) and x.is_floating_point())
            return result

    def with_gradients(*args: Any) -> Any:
        with Sizes():  # entered in here, because what an operator does inside is hidden from a mode around it
            return operator._init_fn(*args[:-1], True)

    rows, K = 24, 0 if phase == "warm_up" else 3
    with small_tiles():
        monkeypatch.setattr(training, "CHUNK_BYTES", 4 * (48 + K) * rows)
        expected = loss_and_gradients(arguments)[0]
        monkeypatch.setattr(training, "_indexer_kl_loss", with_gradients)
        assert same(loss_of(arguments), expected)
    assert max(seen) == rows * 48


# --- autograd -----------------------------------------------------------------------------------------------------


@pytest.mark.property(52)
@phases
@examples(2)
@given(data=st.data())
def test_the_teacher_gets_no_gradient(phase, data, device):
    """On the side of the attention."""
    arguments = draw(data, phase).training_arguments(device)
    leaves = {
        name: x.detach().requires_grad_()
        for name, x in arguments.items()
        if torch.is_tensor(x) and x.is_floating_point()
    }
    loss = loss_of({**arguments, **leaves})
    loss.backward()
    assert {name for name, x in leaves.items() if x.grad is not None} == set(LEARNED)


@pytest.mark.parametrize("wanted", LEARNED)
def test_one_input_alone_may_want_a_gradient(wanted, device):
    arguments = small("sparse", device)
    expected = dict(zip(LEARNED, loss_and_gradients(arguments)[1:], strict=True))
    leaf = arguments[wanted].detach().requires_grad_()
    loss_of({**arguments, wanted: leaf}).backward()
    assert same(leaf.grad, expected[wanted])


@phases
def test_gradients_are_computed_only_where_one_is_wanted_and_change_no_loss(phase, device, monkeypatch):
    calls: list[bool] = []
    launch = training.launch_key_gradients
    monkeypatch.setattr(training, "launch_key_gradients", lambda *args: (calls.append(True), launch(*args)))
    arguments = small(phase, device)
    expected, *_ = loss_and_gradients(arguments)
    assert len(calls) == 1
    assert same(loss_of(arguments), expected)
    with torch.no_grad():
        assert same(loss_of({**arguments, "bias": arguments["bias"].requires_grad_()}), expected)
    assert len(calls) == 1


@phases
def test_gradients_have_the_dtypes_of_their_inputs(phase, device):
    """Head logits and bias may have dtypes of their own."""
    arguments = small(phase, device)
    mixed = {"head_logits": arguments["head_logits"].half(), "bias": arguments["bias"].half()}
    results = loss_and_gradients(arguments, **mixed)
    assert [x.dtype for x in results[1:]] == [torch.float32, torch.float32, torch.float16, torch.float16]
    wide = loss_and_gradients(arguments, **{name: x.float() for name, x in mixed.items()})
    assert same(results[:3], wide[:3])
    assert same([x.half() for x in wide[3:]], list(results[3:]))


def test_a_second_derivative_is_refused_in_words(device):
    arguments = small("warm_up", device)
    leaf = arguments["bias"].detach().requires_grad_()
    loss = loss_of({**arguments, "bias": leaf})
    with pytest.raises(NotImplementedError, match=r"^gsa_fast\.indexer_kl_loss has no second derivative"):
        torch.autograd.grad(loss, leaf, create_graph=True)


@pytest.mark.property(55)
@phases
def test_the_compiled_loss_equals_the_eager_one_bitwise(phase, device):
    """Gradients included."""
    arguments = small(phase, device)
    eager = loss_and_gradients(arguments)
    leaves = {name: arguments[name].detach().requires_grad_() for name in LEARNED}
    torch._dynamo.reset()
    compiled = torch.compile(
        lambda **changes: gsa_fast.indexer_kl_loss(**{**arguments, **changes}, impl="triton"),
        fullgraph=True,
        backend="aot_eager",
    )
    loss = compiled(**leaves)
    loss.backward()
    assert same((loss.detach(), *(x.grad for x in leaves.values())), eager)


# --- limits and bugs that escaped elsewhere -----------------------------------------------------------------------


@pytest.mark.pitfall("length-zero")
@pytest.mark.parametrize(("B", "L", "S"), [(0, 3, 4), (2, 0, 4), (2, 3, 0), (0, 0, 0)])
@phases
def test_empty_axes_give_no_loss_and_no_gradient(phase, B, L, S, device):
    sizes = {"q_idx": (B, L, 2, 4), "k_idx": (B, S, 4), "head_logits": (B, L, 2), "bias": (2,)}
    sizes.update(q=(B, L, 2, 8), k=(B, S, 1, 8))
    arguments: dict[str, Any] = {name: torch.ones(shape, device=device) for name, shape in sizes.items()}
    if phase != "warm_up":
        arguments["selection"] = Selection(
            *(torch.zeros(x, dtype=torch.int32, device=device) for x in ((B, L, 2), (B, L)))
        )
    if phase == "sparse_lse":
        arguments["lse"] = torch.ones(B, L, 2, device=device)
    loss, *gradients = loss_and_gradients({**arguments, "indexer_scale": 1.0})
    assert loss == 0
    assert [x.shape for x in gradients] == [sizes[name] for name in LEARNED]
    assert not any(x.any() for x in gradients)


@pytest.mark.pitfall("rows-without-a-key")
@pytest.mark.parametrize("nothing", ["lengths", "counts", "indices", "slots"])
def test_without_a_valid_row_loss_and_gradients_are_zero(nothing, device):
    arguments = small("sparse", device)
    indices, counts = arguments["selection"]
    changes: dict[str, Any] = {
        "lengths": {"lengths": int32([0, 0], device)},
        "counts": {"selection": Selection(indices, torch.zeros_like(counts))},
        "indices": {"selection": Selection(torch.full_like(indices, 12), counts)},
        "slots": {"selection": Selection(indices[..., :0], counts)},
    }[nothing]
    for x in loss_and_gradients({**arguments, **changes}):
        assert not x.any()
    if nothing == "lengths":
        for x in loss_and_gradients({**small("warm_up", device), **changes}):
            assert not x.any()


def test_more_slots_than_keys_and_counts_past_the_slots_are_taken(device):
    arguments = small("sparse", device, width=20, pattern="full")
    selection = arguments["selection"]
    beyond = Selection(selection.indices, selection.counts + 100)
    cut = Selection(*(x.contiguous() for x in (selection.indices[..., :12], selection.counts)))
    expected = loss_and_gradients({**arguments, "selection": cut})
    assert same(loss_and_gradients(arguments), expected)
    assert same(loss_and_gradients({**arguments, "selection": beyond}), expected)


def test_a_full_selection_equals_the_warm_up(device):
    """Both phases have the same value where S_t is everything that is visible."""
    arguments = small("sparse", device, width=12, pattern="full", lengths=None)
    sparse = loss_and_gradients(arguments)
    dense = loss_and_gradients({name: x for name, x in arguments.items() if name != "selection"})
    for x, y in zip(sparse, dense, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-5, atol=1e-7)


DIMENSIONS = {
    "q_idx": "B L H_I d_I", "k_idx": "B S d_I", "head_logits": "B L H_I", "q": "B L H d_h", "k": "B S H_kv d_h",
    "indices": "B L K", "counts": "B L", "lse": "B L H",
}  # fmt: skip
WIDE = [(name, axis) for name, dimensions in DIMENSIONS.items() for axis in range(len(dimensions.split()))]


@pytest.mark.pitfall("int32-strides")
@pytest.mark.parametrize(("name", "axis"), WIDE)
def test_strides_past_two_to_the_31_do_not_wrap(name, axis, device):
    """Offsets are 64-bit along every axis: index · stride reaches 2^31, though both fit into 32 bits."""
    sizes = {"B": 1, "L": 1, "S": 3, "H_I": 1, "d_I": 2, "H": 1, "H_kv": 1, "d_h": 2, "K": 2}
    dimension = DIMENSIONS[name].split()[axis]
    sizes |= {dimension: 3, "H": 3} if dimension == "H_kv" else {dimension: 3}
    shapes = {n: tuple(sizes[d] for d in dimensions.split()) for n, dimensions in DIMENSIONS.items()}
    g = torch.Generator().manual_seed(axis)
    plain: dict[str, Any] = {n: torch.randn(shape, generator=g).half().to(device) for n, shape in shapes.items()}
    plain["lse"] = plain["lse"].float()
    plain["indices"] = torch.arange(sizes["K"], dtype=torch.int32, device=device).expand(shapes["indices"]).contiguous()
    plain["counts"] = torch.full(shapes["counts"], sizes["K"], dtype=torch.int32, device=device)
    wide = {**plain, name: widely_strided(shapes[name], axis, device, plain[name].dtype).copy_(plain[name])}

    def results(tensors: dict[str, Any], sparse: bool) -> tuple[torch.Tensor, ...]:
        arguments = {n: tensors[n] for n in ("q_idx", "k_idx", "head_logits", "q", "k")}
        if sparse:
            arguments |= {"selection": Selection(tensors["indices"], tensors["counts"]), "lse": tensors["lse"]}
        bias = torch.zeros(sizes["H_I"], device=device)
        return loss_and_gradients(
            {**arguments, "indexer_scale": 0.5, "bias": bias, "start": 2, "lengths": int32([9] * sizes["B"], device)}
        )

    for sparse in (True,) if name in ("indices", "counts", "lse") else (True, False):
        assert same(results(wide, sparse), results(plain, sparse))
