"""What holds for every public function: its results lie where its inputs lie, and its defaults are as documented."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

import gsa_ref
from gsa_ref import GSAConfig, Selection

B, L, S, H, H_kv, d_h, H_I, d_I, K = 2, 3, 5, 4, 2, 8, 3, 4, 2
CONFIG = GSAConfig(d=8, H=H, H_kv=H_kv, d_h=d_h, H_I=H_I, d_I=d_I, k_base=2, k_min=1, k_max=4)


def draw(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(len(shape) + shape[0]), dtype=torch.float64)


INDEXER = {"q_idx": draw(B, L, H_I, d_I), "k_idx": draw(B, S, d_I), "head_logits": draw(B, L, H_I), "bias": draw(H_I)}
ATTENTION = {"q": draw(B, L, H, d_h), "k": draw(B, S, H_kv, d_h)}
V = {"v": draw(B, S, H_kv, d_h) + 1}
SELECTION = {"selection": Selection(torch.arange(K, dtype=torch.int32).expand(B, L, K), torch.full((B, L), K).int())}
POSITIONS = {"start": torch.tensor([1, 2], dtype=torch.int32), "lengths": torch.tensor([4, 5], dtype=torch.int32)}
ALL_KEYS = torch.full((B,), S, dtype=torch.int32)
FOUR = torch.full((B, L), 4, dtype=torch.int32)
SIZES = {"k_base": 2, "k_min": 1, "k_max": 4, "rule": "proportional"}
GATES = {"value_gate_logits": draw(B, S, H_kv, d_h), "output_gate_logits": draw(B, L, H, d_h)}

# Function → its required arguments, and its optional ones.
CALLS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "apply_rope": ({"x": draw(B, L, H, d_h)}, {"start": POSITIONS["start"], "theta": 50.0}),
    "apply_gate": ({"x": draw(B, L), "gate_logits": draw(B, L)}, {}),
    "indexer_scores": ({**INDEXER, "scale": 0.5}, POSITIONS),
    "score_variance": ({"scores": draw(B, L, S)}, {}),
    "token_budget": ({"variance": draw(B, L).abs(), "mean_variance": 0.5, "n_valid": FOUR, **SIZES}, {}),
    "select_tokens": ({"scores": draw(B, L, S), "budget": torch.full((B, L), 2).int()}, {"width": 2}),
    "indexed_selection": ({**INDEXER, "mean_variance": 0.01, "config": CONFIG}, POSITIONS),
    "sparse_attention": ({**ATTENTION, **V, **SELECTION}, {"scale": 0.3, "start": POSITIONS["start"], **GATES}),
    "dense_attention": ({**ATTENTION, **V}, POSITIONS),
    "indexer_kl_loss": (
        {**INDEXER, **ATTENTION, "indexer_scale": 0.5},
        {**POSITIONS, **SELECTION, "scale": 0.3, "temperature": 0.5},
    ),
    "captured_mass": ({**ATTENTION, **SELECTION}, {**POSITIONS, "scale": 0.3}),
}
WAITS = {"select_tokens"}  # without a width it asks for the largest budget, and the meta device has no values

# The optional arguments written out, as the docstrings give them.
DEFAULTS: dict[str, dict[str, Any]] = {
    "apply_rope": {"start": 0, "theta": 10000.0},
    "indexer_scores": {"start": 0, "lengths": ALL_KEYS},
    "select_tokens": {"width": 2},
    "indexed_selection": {"start": 0, "lengths": ALL_KEYS},
    "sparse_attention": {"scale": d_h**-0.5, "start": S - L, "value_gate_logits": None, "output_gate_logits": None},
    "dense_attention": {"start": 0, "lengths": ALL_KEYS},
    "indexer_kl_loss": {
        "selection": None,
        "lse": None,
        "scale": d_h**-0.5,
        "temperature": 1.0,
        "start": 0,
        "lengths": ALL_KEYS,
    },
    "captured_mass": {"scale": d_h**-0.5, "start": 0, "lengths": ALL_KEYS},
}


def tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, tuple):
        for part in value:
            yield from tensors(part)


def on_meta(value: Any) -> Any:
    if isinstance(value, Selection):
        return Selection(*(x.to("meta") for x in value))
    return value.to("meta") if isinstance(value, Tensor) else value


@pytest.mark.parametrize("optional", [False, True], ids=["required", "all"])
@pytest.mark.parametrize("function", CALLS)
def test_results_have_the_device_dtype_and_shape_of_the_inputs_device(function, optional):
    """On the meta device, which no other may be mixed with: a tensor made without `device` is an error there."""
    if function in WAITS and not optional:
        pytest.skip("asks the device for a size")
    required, options = CALLS[function]
    arguments = {**required, **(options if optional else {})}
    expected = list(tensors(getattr(gsa_ref, function)(**arguments)))
    found = list(tensors(getattr(gsa_ref, function)(**{name: on_meta(x) for name, x in arguments.items()})))
    for x, like in zip(found, expected, strict=True):
        assert x.is_meta
        assert (x.shape, x.dtype) == (like.shape, like.dtype)


@pytest.mark.parametrize("function", DEFAULTS)
def test_defaults_are_those_of_the_docstring(function):
    required, _ = CALLS[function]
    short = tensors(getattr(gsa_ref, function)(**required))
    written_out = tensors(getattr(gsa_ref, function)(**required, **DEFAULTS[function]))
    for x, y in zip(short, written_out, strict=True):
        assert torch.equal(x, y)
