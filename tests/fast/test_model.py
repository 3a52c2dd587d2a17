"""The language model on the kernels: the logits and the text of the reference model.

`indexer_rope` is on, because equal bytes tie in the first block without it, and rounding then decides between them
(`ModelConfig.attention`).
"""

import io
from functools import partial
from typing import Any

import pytest
import torch

import gsa_fast
import gsa_ref
from gsa_fast.verification.checks import numpy
from gsa_ref import GSAConfig, LanguageModel, ModelConfig, Selection, generate
from gsa_ref.check import error_budget
from tests.fast.helpers import int32, same

ATTENTION = GSAConfig(d=16, H=4, H_kv=2, d_h=8, H_I=2, d_I=16, k_base=5, k_min=2, k_max=8, indexer_rope=True)
CONFIG = ModelConfig(attention=ATTENTION, n_layers=2, d_ff=24)
VARIANTS = ("dense", "sparse", "gated", "gsa")
LENGTHS = [18, 11]
KERNELS = partial(gsa_fast.GatedSparseAttention, impl="triton")


def reference_model(variant: str, device: str) -> LanguageModel:
    """In eval mode; every parameter is random and large enough to matter, V̄ comes from other tokens."""
    model, g = LanguageModel(CONFIG.variant(variant)), torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            width = parameter.shape[-1] if parameter.dim() == 2 else 1
            parameter.copy_(1.5 * width**-0.5 * torch.randn(parameter.shape, generator=g))
        model(torch.randint(256, (2, 30), generator=g))
        model.update_mean_variance()
    return model.eval().to(device)


def kernel_model(source: LanguageModel) -> LanguageModel:
    """The same parameters on the kernels."""
    model = LanguageModel(source.config, layer=KERNELS).eval().to(source.embedding.weight.device)
    model.load_state_dict(source.state_dict())
    return model


def prompts(device: str) -> torch.Tensor:
    """Right-padded with −1."""
    tokens = torch.randint(256, (2, max(LENGTHS)), generator=torch.Generator().manual_seed(1))
    return tokens.masked_fill(torch.arange(max(LENGTHS)) >= torch.tensor(LENGTHS)[:, None], -1).to(device)


def record_selections(model: LanguageModel) -> list[Selection]:
    """A list that fills with what the general functions of the layers select."""
    selections: list[Selection] = []
    for block in model.blocks:

        def record(*arguments: Any, select: Any = block.attention._indexed_selection, **keywords: Any) -> Any:
            selection, variance = select(*arguments, **keywords)
            selections.append(selection)
            return selection, variance

        block.attention._indexed_selection = record
    return selections


@torch.no_grad()
@pytest.mark.pitfall("budget-of-everything")
@pytest.mark.parametrize("variant", VARIANTS)
def test_logits_on_the_kernels_are_those_of_the_reference_model(variant, device):
    """Against float64, by what the reference loses in float32; all three must have selected the same tokens."""
    reference, tokens, lengths = reference_model(variant, device), prompts(device), int32(LENGTHS, device)
    kernels = kernel_model(reference)
    runs, selections = [], []
    for model in (kernels, reference, reference_double(reference)):
        selections.append(record_selections(model))
        runs.append(model(tokens, lengths=lengths).logits)
    assert len(selections[0]) == (2 if "gsa" in variant or "sparse" in variant else 0)
    assert same(selections[0], selections[2])
    assert same(selections[1], selections[2])
    if selections[0]:
        assert int(selections[0][0].counts.max()) < max(LENGTHS) / 2  # the budget leaves most tokens out
    verdict = error_budget(*map(numpy, runs), torch.float32)
    assert verdict, verdict


def reference_double(model: LanguageModel) -> LanguageModel:
    gold = LanguageModel(model.config).double().eval().to(model.embedding.weight.device)
    gold.load_state_dict(model.state_dict())
    return gold


@pytest.mark.parametrize("variant", ["sparse", "gsa"])
def test_greedy_text_on_the_kernels_is_that_of_the_reference_model(variant, device):
    """With the cache: the prompts on the general kernels, then token by token on the decode kernels.

    A token may differ only where rounding decides between the two best logits; here they are further apart.
    """
    reference = reference_model(variant, device)
    kernels, calls = kernel_model(reference), []
    for block in kernels.blocks:

        def decode(*arguments: Any, run: Any = block.attention._decode_attention, **keywords: Any) -> Any:
            calls.append(arguments[0].shape[1])
            return run(*arguments, **keywords)

        block.attention._decode_attention = decode
    margins: list[float] = []

    def margin(module: Any, inputs: Any, output: gsa_ref.model.ModelOutput) -> None:
        best = output.logits[:, -1].topk(2).values  # of a step; a ragged prompt ends elsewhere
        margins.append(float((best[:, 0] - best[:, 1]).min() / best.abs().max()))

    handle = reference.register_forward_hook(margin)
    arguments = {"max_new_tokens": 10, "lengths": int32(LENGTHS, device)}
    expected = generate(reference, prompts(device), **arguments)
    handle.remove()
    assert min(margins[1:]) > 1e-4
    new = generate(kernels, prompts(device), **arguments)
    assert torch.equal(new, expected)
    assert torch.equal(generate(reference, prompts(device), use_cache=False, **arguments), expected)
    assert len(set(new.flatten().tolist())) > 5
    assert calls == [1] * 2 * 9


@pytest.mark.property(56)
@torch.no_grad()
@pytest.mark.parametrize("variant", VARIANTS)
def test_models_of_the_two_packages_load_one_another_through_a_file(variant, device):
    """Bitwise, both ways, loaded with weights_only."""
    source = reference_model(variant, device)
    kernels = LanguageModel(source.config, layer=KERNELS).eval().to(device)
    back = LanguageModel(source.config).eval().to(device)
    for giver, taker in ((source, kernels), (kernels, back)):
        file = io.BytesIO()
        torch.save(giver.state_dict(), file)
        file.seek(0)
        taker.load_state_dict(torch.load(file, weights_only=True))
    assert list(kernels.state_dict()) == list(source.state_dict())
    assert same(list(back.state_dict().values()), list(source.state_dict().values()))
    assert all(type(block.attention) is gsa_fast.GatedSparseAttention for block in kernels.blocks)
    tokens = prompts(device)[:, :11]
    assert same(back(tokens).logits, source(tokens).logits)
