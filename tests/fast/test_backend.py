"""Which implementation a call runs on, what it refuses, and what it says then."""

import os
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import gsa_fast
import gsa_ref
from gsa_fast import _backend
from gsa_ref import GSAConfig, Selection
from tests.fast.helpers import int32, same

ROOT = Path(__file__).parents[2]
SIZES: dict[str, Any] = {"k_base": 3, "k_min": 2, "k_max": 4, "rule": "proportional"}
CONFIG = GSAConfig(H_I=2, d_I=4, **SIZES)


def arguments_of(name: str, device: str) -> dict[str, Any]:
    """A legal call of each public function, as keywords."""
    g = torch.Generator().manual_seed(0)

    def tensor(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=g).to(device)

    indexer = {"q_idx": tensor(2, 5, 2, 4), "k_idx": tensor(2, 5, 4), "head_logits": tensor(2, 5, 2), "bias": tensor(2)}
    scores, counts = tensor(2, 5, 5).tril() - torch.full((5, 5), torch.inf, device=device).triu(1), [2] * 5
    return {
        "indexer_scores": {**indexer, "scale": 0.5},
        "score_variance": {"scores": scores},
        "token_budget": {
            "variance": scores[..., 0].abs(),
            "mean_variance": 0.5,
            "n_valid": int32([[1, 2, 3, 4, 5]] * 2, device),
            **SIZES,
        },
        "select_tokens": {"scores": scores, "budget": int32([counts] * 2, device), "width": 3},
        "indexed_selection": {**indexer, "mean_variance": 0.01, "config": CONFIG},
        "sparse_attention": {
            "q": tensor(2, 5, 4, 8),
            "k": tensor(2, 5, 2, 8),
            "v": tensor(2, 5, 2, 8),
            "selection": Selection(int32([[[0, 4]] * 5] * 2, device), int32([counts] * 2, device)),
            "value_gate_logits": tensor(2, 5, 2, 8),
            "output_gate_logits": tensor(2, 5, 4, 8),
        },
        "apply_gate": {"x": tensor(2, 3), "gate_logits": tensor(2, 3)},
        "indexer_kl_loss": {
            **indexer,
            "q": tensor(2, 5, 4, 8),
            "k": tensor(2, 5, 2, 8),
            "indexer_scale": 0.5,
            "selection": Selection(int32([[[0, 4]] * 5] * 2, device), int32([counts] * 2, device)),
            "lse": tensor(2, 5, 4),
        },
    }[name]


FUNCTIONS = (
    "indexer_scores",
    "score_variance",
    "token_budget",
    "select_tokens",
    "indexed_selection",
    "sparse_attention",
    "apply_gate",
    "indexer_kl_loss",
)
ops = pytest.mark.parametrize("name", FUNCTIONS)


def fast(name: str, arguments: dict[str, Any], impl: Any) -> Any:
    return getattr(gsa_fast, name)(**arguments, impl=impl)


def reference(name: str, arguments: dict[str, Any]) -> Any:
    return getattr(gsa_ref, name)(**arguments)


def flat(result: Any) -> list[torch.Tensor]:
    return [result] if isinstance(result, torch.Tensor) else [x for part in result for x in flat(part)]


# --- impl ---------------------------------------------------------------------------------------------------------


@ops
def test_impl_reference_is_the_reference(name, device):
    arguments = arguments_of(name, device)
    assert same(flat(fast(name, arguments, "reference")), flat(reference(name, arguments)))


@ops
def test_impl_triton_runs_a_kernel_and_not_the_reference(name, device, monkeypatch):
    arguments = arguments_of(name, device)
    expected = flat(reference(name, arguments))

    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("the reference was called")

    for function in FUNCTIONS:
        monkeypatch.setattr(gsa_ref, function, refuse)
    results = flat(fast(name, arguments, "triton"))
    assert [(x.shape, x.dtype) for x in results] == [(x.shape, x.dtype) for x in expected]


@ops
def test_impl_auto_on_a_cpu_is_the_reference_and_says_so_once(name, monkeypatch):
    arguments = arguments_of(name, "cpu")
    monkeypatch.setattr(_backend, "_fallback_announced", False)
    with pytest.warns(UserWarning, match="tensors are on cpu, so impl='auto' runs the reference") as caught:
        results = [fast(name, arguments, "auto") for _ in range(2)]
    assert len(caught) == 1
    assert caught[0].filename == __file__  # the line that called, not one inside gsa_fast
    expected = flat(reference(name, arguments))
    assert all(same(flat(result), expected) for result in results)


@ops
def test_impl_auto_is_the_default(name, monkeypatch):
    monkeypatch.setattr(_backend, "_fallback_announced", False)
    with pytest.warns(UserWarning, match="impl='auto'"):
        getattr(gsa_fast, name)(**arguments_of(name, "cpu"))


@ops
def test_impl_triton_without_a_gpu_or_the_interpreter_is_refused(name, monkeypatch):
    monkeypatch.setattr(_backend, "INTERPRETED", False)
    with pytest.raises(ValueError, match=r"^impl: 'triton' needs CUDA tensors, .*TRITON_INTERPRET=1.* is on cpu$"):
        fast(name, arguments_of(name, "cpu"), "triton")


def test_a_process_without_the_interpreter_refuses_triton_and_announces_auto_once():
    program = """
import warnings
import torch, gsa_fast, gsa_ref
x = torch.arange(6.0)
try:
    gsa_fast.apply_gate(x, x, impl="triton")
except ValueError as error:
    print(error)
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    results = [gsa_fast.apply_gate(x, x), gsa_fast.apply_gate(x, -x), gsa_fast.score_variance(x[None, None])]
print(len(caught), torch.equal(results[0], gsa_ref.apply_gate(x, x)))
"""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-c", program], env=environment, cwd=ROOT, capture_output=True, text=True, check=True
    )
    message, counted = done.stdout.splitlines()
    assert message.startswith("impl: 'triton' needs CUDA tensors")
    assert counted == "1 True"


@ops
@pytest.mark.parametrize("impl", ["cuda", "Triton", ""])
def test_an_unknown_impl_is_a_value_error(name, impl, device):
    with pytest.raises(ValueError, match=f"^impl: expected auto or triton or reference, got '{impl}'$"):
        fast(name, arguments_of(name, device), impl)


@ops
@pytest.mark.parametrize("impl", [None, True, 1, torch.float32])
def test_an_impl_that_is_no_string_is_a_type_error(name, impl, device):
    with pytest.raises(TypeError, match=r"^impl: expected a str, got"):
        fast(name, arguments_of(name, device), impl)


# --- dtypes and gradients -----------------------------------------------------------------------------------------

FLOATING = [
    ("indexer_scores", ("q_idx", "k_idx")),
    ("indexer_scores", ("head_logits",)),
    ("indexer_scores", ("bias",)),
    ("score_variance", ("scores",)),
    ("token_budget", ("variance",)),
    ("select_tokens", ("scores",)),
    ("indexed_selection", ("q_idx", "k_idx")),
    ("indexed_selection", ("head_logits",)),
    ("indexed_selection", ("bias",)),
    ("sparse_attention", ("q", "k", "v")),
    ("sparse_attention", ("value_gate_logits",)),
    ("sparse_attention", ("output_gate_logits",)),
    ("apply_gate", ("x",)),
    ("apply_gate", ("gate_logits",)),
    ("indexer_kl_loss", ("q_idx", "k_idx")),
    ("indexer_kl_loss", ("head_logits",)),
    ("indexer_kl_loss", ("bias",)),
    ("indexer_kl_loss", ("q", "k")),
    ("indexer_kl_loss", ("lse",)),
]
WITH_BACKWARD = ("sparse_attention", "apply_gate", "indexer_kl_loss")
INDICES = ("token_budget", "select_tokens")


@pytest.mark.parametrize(("name", "wide"), FLOATING)
def test_float64_is_refused_by_the_kernels_and_served_by_the_reference(name, wide, device):
    arguments = arguments_of(name, device)
    arguments.update({key: arguments[key].double() for key in wide})
    with pytest.raises(NotImplementedError, match=f"^{wide[0]}: the kernels take float32, .*got torch.float64"):
        fast(name, arguments, "triton")
    assert same(flat(fast(name, arguments, "reference")), flat(reference(name, arguments)))


@pytest.mark.parametrize(
    ("name", "differentiable"), [pair for pair in FLOATING if pair[0] not in (*WITH_BACKWARD, *INDICES)]
)
def test_a_backward_pass_through_a_kernel_names_the_function(name, differentiable, device):
    arguments = arguments_of(name, device)
    for key in differentiable:
        arguments[key] = arguments[key].clone().requires_grad_()
    outputs = [x for x in flat(fast(name, arguments, "triton")) if x.requires_grad]
    total = sum(x.nan_to_num(0, neginf=0).sum() for x in outputs)
    with pytest.raises(NotImplementedError, match=rf"^gsa_fast\.{name} has no backward kernel yet: pass impl='refer"):
        total.backward()


@ops
def test_results_under_no_grad_carry_no_graph(name, device):
    arguments = {
        key: value.clone().requires_grad_() if torch.is_tensor(value) and value.is_floating_point() else value
        for key, value in arguments_of(name, device).items()
    }
    with torch.no_grad():
        assert not any(x.requires_grad for x in flat(fast(name, arguments, "triton")))


# --- arguments are checked as in the reference, before anything runs ----------------------------------------------

BAD: dict[str, tuple[str, Callable[[dict[str, Any]], dict[str, Any]]]] = {
    "scores of another dtype": ("select_tokens", lambda a: {"scores": a["scores"].half()}),
    "a budget in int64": ("select_tokens", lambda a: {"budget": a["budget"].long()}),
    "a budget of another length": ("select_tokens", lambda a: {"budget": a["budget"][:, :-1]}),
    "a budget elsewhere": ("select_tokens", lambda a: {"budget": a["budget"].to("meta")}),
    "width 0": ("select_tokens", lambda a: {"width": 0}),
    "a budget beyond any, without a width": (
        "select_tokens",
        lambda a: {"budget": a["budget"] + 2**24, "width": None},
    ),
    "scores without strides": ("select_tokens", lambda a: {"scores": a["scores"].to_sparse()}),
    "a list of scores": ("score_variance", lambda a: {"scores": a["scores"].tolist()}),
    "scores of one sequence": ("score_variance", lambda a: {"scores": a["scores"][0]}),
    "k_base 0": ("token_budget", lambda a: {"k_base": 0}),
    "k_min above k_max": ("token_budget", lambda a: {"k_min": 5}),
    "an unknown rule": ("token_budget", lambda a: {"rule": "none"}),
    "counts in int64": ("token_budget", lambda a: {"n_valid": a["n_valid"].long()}),
    "a mean per row": ("token_budget", lambda a: {"mean_variance": a["variance"]}),
    "keys of another width": ("indexer_scores", lambda a: {"k_idx": a["k_idx"][..., :-1]}),
    "keys of another dtype": ("indexer_scores", lambda a: {"k_idx": a["k_idx"].half()}),
    "keys elsewhere": ("indexer_scores", lambda a: {"k_idx": a["k_idx"].to("meta")}),
    "integer queries": ("indexer_scores", lambda a: {"q_idx": a["q_idx"].int()}),
    "a bias too many": ("indexer_scores", lambda a: {"bias": a["bias"].repeat(2)}),
    "a negative start": ("indexer_scores", lambda a: {"start": -1}),
    "a start per query": ("indexer_scores", lambda a: {"start": int32([0] * 5, a["bias"].device)}),
    "lengths in int64": ("indexer_scores", lambda a: {"lengths": int32([5, 5], a["bias"].device).long()}),
    "a start beyond int32": ("indexer_scores", lambda a: {"start": 2**31}),
    "a scale beyond any float": ("indexer_scores", lambda a: {"scale": 10**400}),
    "an infinite scale": ("indexer_scores", lambda a: {"scale": float("inf")}),
    "no config": ("indexed_selection", lambda a: {"config": None}),
    "an integer mean tensor": ("indexed_selection", lambda a: {"mean_variance": torch.tensor(1)}),
    "a tuple for a selection": ("sparse_attention", lambda a: {"selection": tuple(a["selection"])}),
    "indices in int64": (
        "sparse_attention",
        lambda a: {"selection": Selection(a["selection"].indices.long(), a["selection"].counts)},
    ),
    "heads that do not divide": ("sparse_attention", lambda a: {"q": a["q"][:, :, :3], "output_gate_logits": None}),
    "values of another length": ("sparse_attention", lambda a: {"v": a["v"][:, 1:]}),
    "a gate for other heads": ("sparse_attention", lambda a: {"value_gate_logits": a["output_gate_logits"]}),
    "more queries than keys": (
        "sparse_attention",
        lambda a: {"k": a["k"][:, 1:], "v": a["v"][:, 1:], "value_gate_logits": None},
    ),
    "a scale that is no number": ("sparse_attention", lambda a: {"scale": "1"}),
    "lse without a selection": ("indexer_kl_loss", lambda a: {"selection": None}),
    "an lse of other heads": ("indexer_kl_loss", lambda a: {"lse": a["lse"][..., :-1]}),
    "a temperature of 0": ("indexer_kl_loss", lambda a: {"temperature": 0.0}),
    "a temperature that is no number": ("indexer_kl_loss", lambda a: {"temperature": "1"}),
    "an infinite indexer_scale": ("indexer_kl_loss", lambda a: {"indexer_scale": float("inf")}),
    "attended keys of another length": ("indexer_kl_loss", lambda a: {"k": a["k"][:, 1:]}),
    "a selection without indices": ("indexer_kl_loss", lambda a: {"selection": Selection(None, a["selection"].counts)}),
    "slots in a list": ("indexer_kl_loss", lambda a: {"selection": list(a["selection"])}),
    "a gate of another shape": ("apply_gate", lambda a: {"gate_logits": a["gate_logits"][0]}),
    "an integer gate": ("apply_gate", lambda a: {"gate_logits": a["gate_logits"].int()}),
}


@pytest.mark.parametrize("impl", ["triton", "reference"])
@pytest.mark.parametrize("bad", BAD)
def test_bad_arguments_raise_what_the_reference_raises(bad, impl, device):
    name, change = BAD[bad]
    arguments = arguments_of(name, device)
    changes = change(arguments)
    arguments.update(changes)
    with pytest.raises((TypeError, ValueError)) as expected:
        reference(name, arguments)
    with pytest.raises(expected.type) as error:
        fast(name, arguments, impl)
    assert str(error.value) == str(expected.value)
    # The message begins with the name of an argument.
    assert str(error.value).split(":")[0].split(".")[0] in arguments | {"start": None}


@ops
def test_inputs_are_left_as_they_were(name, device):
    arguments = arguments_of(name, device)
    before = {key: value.clone() for key, value in arguments.items() if torch.is_tensor(value)}
    fast(name, arguments, "triton")
    assert all(same(arguments[key], value) for key, value in before.items())


@pytest.mark.parametrize("name", ["indexer_scores", "indexed_selection", "sparse_attention", "indexer_kl_loss"])
def test_starts_and_lengths_may_be_strided(name, device):
    arguments = arguments_of(name, device)
    every_second = int32([3, 99, 1, 99], device)[::2]
    strided = (
        {"start": every_second} if name == "sparse_attention" else {"start": every_second, "lengths": every_second}
    )
    plain = {key: value.contiguous() for key, value in strided.items()}
    results = [flat(fast(name, {**arguments, **extra}, "triton")) for extra in (strided, plain)]
    assert same(*results)
    assert not same(results[0], flat(fast(name, {**arguments, "start": 0}, "triton")))


def test_without_warnings_when_kernels_run(device, monkeypatch):
    """Nothing falls back silently, and nothing warns for no reason."""
    monkeypatch.setattr(_backend, "_fallback_announced", False)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fast("apply_gate", arguments_of("apply_gate", device), "triton")
        fast("apply_gate", arguments_of("apply_gate", device), "reference")
    assert not _backend._fallback_announced


# --- large batches, on a GPU only: the interpreter would run 10,000 programs for each -----------------------------


@pytest.mark.parametrize(("bytes_of_a_block", "little"), [(101_376, True), (166_912, False), (232_448, False)])
def test_devices_with_99_kib_of_shared_memory_have_little(bytes_of_a_block, little, monkeypatch):
    """Of capability 8.6 and 8.9, of 8.0, and of 9.0; the device is a stub."""
    properties = SimpleNamespace(shared_memory_per_block_optin=bytes_of_a_block)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    assert _backend.little_shared_memory(torch.device("cuda")) == little
    assert not _backend.little_shared_memory(torch.device("cpu"))


@pytest.mark.pitfall("large-batch")
@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device: the interpreter takes too long")
def test_ten_thousand_sequences_in_a_batch():
    def repeated(value: Any) -> Any:
        if isinstance(value, Selection):
            return Selection(*(repeated(x) for x in value))
        if not torch.is_tensor(value) or value.dim() < 2:
            return value
        return value.repeat(5000, *[1] * (value.dim() - 1))

    for name in FUNCTIONS:
        arguments = arguments_of(name, "cuda")
        many = flat(fast(name, {key: repeated(value) for key, value in arguments.items()}, "triton"))
        assert same(many, [repeated(x) for x in flat(fast(name, arguments, "triton"))]), name
