"""The whole layer (Eq. 6) on the kernels."""

import dataclasses
import io
import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import gsa_fast
import gsa_ref
import gsa_ref.layer
from gsa_fast import _backend
from gsa_fast.verification.interpreter import small_tiles
from gsa_ref import GSAConfig
from gsa_ref.cases import LayerCase, Limits, layer_cases
from tests.fast.helpers import DTYPES, assert_in_budget, examples, int32, same

LIMITS = Limits(B=2, L=6, heads=2, group=2, width=6)
CONFIG = GSAConfig(d=16, H=4, H_kv=2, d_h=8, H_I=2, d_I=8, k_base=4, k_min=2, k_max=6)
CASES = layer_cases("float32", LIMITS)


def build(config: GSAConfig, device: str, *, seed: int = 0, impl: str = "triton") -> gsa_fast.GatedSparseAttention:
    """Random parameters, V̄ set, in eval mode."""
    torch.manual_seed(seed)
    layer = gsa_fast.GatedSparseAttention(config, impl=impl).to(device).eval()
    if config.sparse:
        layer.mean_variance.fill_(0.01)
        torch.nn.init.normal_(layer.indexer.bias)
    return layer


def hidden(B: int, L: int, device: str, *, seed: int = 0, d: int = CONFIG.d) -> torch.Tensor:
    return torch.randn(B, L, d, generator=torch.Generator().manual_seed(seed)).to(device)


@torch.no_grad()
def run(layer: gsa_ref.GatedSparseAttention, h: torch.Tensor, **keywords: Any) -> torch.Tensor:
    return layer(h, **keywords).hidden


# --- against the equations ----------------------------------------------------------------------------------------


@pytest.mark.usefixtures("bf16")
@pytest.mark.parametrize("dtype", DTYPES)
@examples(10)
@given(data=st.data())
def test_layer_kernels_stay_in_their_error_budget(dtype, data, device):
    assert_in_budget(data.draw(layer_cases(dtype, LIMITS)), device)


@pytest.mark.usefixtures("bf16")
@pytest.mark.parametrize("dtype", DTYPES)
@examples(2)
@given(data=st.data())
def test_layer_kernels_stay_in_their_error_budget_over_several_tiles(dtype, data, device):
    with small_tiles():
        assert_in_budget(data.draw(layer_cases(dtype, Limits(B=1, L=36, heads=1, group=2, width=36))), device)


# --- which code runs ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("variant", ["dense", "sparse", "gated", "gsa"])
def test_impl_triton_never_calls_the_reference_kernels(variant, device, monkeypatch):
    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("the reference was called")

    for name in (
        "indexer_scores",
        "score_variance",
        "select_tokens",
        "indexed_selection",
        "sparse_attention",
        "apply_gate",
        "indexer_kl_loss",
    ):
        monkeypatch.setattr(gsa_ref, name, refuse)
        monkeypatch.setattr(gsa_ref.layer, name, refuse, raising=False)
    layer = build(CONFIG.variant(variant), device)  # now, because it looks its functions up when it is made
    assert run(layer, hidden(2, 5, device)).isfinite().all()


@pytest.mark.parametrize("variant", ["dense", "sparse", "gated", "gsa"])
def test_impl_reference_is_the_reference_layer(variant, device):
    layer, h = build(CONFIG.variant(variant), device, impl="reference"), hidden(2, 6, device)
    reference = gsa_ref.GatedSparseAttention(layer.config).to(device).eval()
    reference.load_state_dict(layer.state_dict())
    assert same(run(layer, h), run(reference, h))


def test_impl_auto_on_a_cpu_says_once_that_it_is_the_reference(monkeypatch):
    monkeypatch.setattr(_backend, "_fallback_announced", False)
    layer, h = build(CONFIG, "cpu", impl="auto"), hidden(2, 6, "cpu")
    with pytest.warns(UserWarning, match="impl='auto' runs the reference") as caught:
        output = run(layer, h)
    assert len(caught) == 1
    layer.impl = "reference"
    assert same(output, run(build(CONFIG, "cpu", impl="reference"), h))


@pytest.mark.property(52)
@pytest.mark.pitfall("indexer-never-learns")
def test_the_warm_up_on_kernels_trains_the_indexer_as_the_reference_does(device):
    """The indexer's parameters get gradients from its loss, and nothing else does."""
    layer, h, lengths = build(CONFIG, device).train(), hidden(2, 6, device), int32([6, 4], device)
    reference = gsa_ref.GatedSparseAttention(CONFIG).to(device)
    reference.load_state_dict(layer.state_dict())
    losses = []
    for module in (layer, reference.train()):
        module.set_phase("warm_up")
        losses.append(module(h, lengths=lengths).indexer_loss)
        losses[-1].backward()
    torch.testing.assert_close(*losses)
    for (name, parameter), expected in zip(layer.named_parameters(), reference.parameters(), strict=True):
        assert (parameter.grad is not None) == name.startswith("indexer.")
        if parameter.grad is not None:
            torch.testing.assert_close(parameter.grad, expected.grad)


@pytest.mark.parametrize(("impl", "error"), [("cuda", ValueError), (None, TypeError)])
def test_a_wrong_impl_is_refused_when_the_layer_is_made(impl, error):
    with pytest.raises(error, match=r"^impl: expected"):
        gsa_fast.GatedSparseAttention(CONFIG, impl=impl)


def test_float64_layers_are_refused_by_the_kernels(device):
    layer = build(CONFIG, device).double()
    with pytest.raises(NotImplementedError, match="the kernels take float32"):
        run(layer, hidden(1, 3, device).double())


@pytest.mark.property(51, 52)
@examples(3)
@given(CASES)
def test_the_indexer_learns_from_its_own_loss_alone_and_nothing_else_does(device, case):
    layer, arguments = build(case.config, device, seed=case.seed).train(), case.arguments(device)
    h = arguments["h"].requires_grad_()
    output = layer(**arguments)
    output.hidden.square().sum().backward(retain_graph=True)
    assert h.grad is not None
    for name, parameter in layer.named_parameters():
        assert (parameter.grad is None) == name.startswith("indexer."), name
    layer.zero_grad()
    h.grad = None
    output.indexer_loss.backward()
    assert h.grad is None
    for name, parameter in layer.named_parameters():
        assert (parameter.grad is not None) == name.startswith("indexer."), name


@pytest.mark.property(47)
@pytest.mark.parametrize("variant", ["dense", "sparse", "gated", "gsa"])
def test_parameters_get_the_gradients_of_the_reference(variant, device):
    """Of the layer's output, in every parameter but the indexer's."""
    layer = build(CONFIG.variant(variant), device)
    plain = gsa_ref.GatedSparseAttention(layer.config).to(device)
    plain.load_state_dict(layer.state_dict())
    h = hidden(2, 9, device)
    weight = torch.linspace(-1, 1, h.numel(), device=device).view_as(h)
    for model in (layer, plain):
        (model(h).hidden * weight).sum().backward()
    for (name, ours), theirs in zip(layer.named_parameters(), plain.parameters(), strict=True):
        if "indexer" not in name:
            assert ours.grad.any(), name
            torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-4, atol=1e-5, msg=name)


# --- state_dict ---------------------------------------------------------------------------------------------------


@pytest.mark.property(56)
@pytest.mark.parametrize("variant", ["dense", "sparse", "gated", "gsa"])
@examples(2)
@given(CASES)
def test_parameters_travel_between_the_packages_through_a_file(variant, device, case):
    """Bitwise, both ways, loaded with weights_only."""
    config = case.config.variant(variant)
    layer, h = build(config, device), case.arguments(device)["h"]
    expected = run(layer, h)
    reference = gsa_ref.GatedSparseAttention(config).to(device).eval()
    loaded = build(config, device, seed=1)
    assert not same(run(loaded, h), expected)
    source: gsa_ref.GatedSparseAttention = layer
    for target in (reference, loaded):
        file = io.BytesIO()
        torch.save(source.state_dict(), file)
        file.seek(0)
        target.load_state_dict(torch.load(file, weights_only=True))
        source = target
    assert list(layer.state_dict()) == list(reference.state_dict()) == list(loaded.state_dict())
    assert same(list(loaded.state_dict().values()), list(layer.state_dict().values()))
    assert same(run(loaded, h), expected)


# --- properties ---------------------------------------------------------------------------------------------------


def layer_of(case: LayerCase, device: str) -> gsa_fast.GatedSparseAttention:
    return build(case.config, device, seed=case.seed)


@pytest.mark.property(57)
@examples(4)
@given(CASES)
def test_reruns_are_bitwise_equal(device, case):
    layer, arguments = layer_of(case, device), case.arguments(device)
    assert same(run(layer, **arguments), run(layer, **arguments))


@pytest.mark.property(5)
@examples(5)
@given(CASES, st.data())
def test_future_perturbation_leaves_earlier_rows_bitwise_equal(device, case, data):
    layer, h = layer_of(case, device), case.arguments(device)["h"]
    t = data.draw(st.integers(0, case.L))
    changed = h.clone()
    changed[:, t:] = math.nan
    assert same(run(layer, h)[:, :t], run(layer, changed)[:, :t])


@pytest.mark.property(6)
@pytest.mark.pitfall("mean-of-the-batch")
@examples(5)
@given(CASES)
def test_a_sequence_does_not_see_its_batch_neighbours(device, case):
    """Neither in the attention nor through V̄."""
    layer, h = layer_of(case, device), case.arguments(device)["h"]
    output = run(layer, h)
    for b in range(case.B):
        noisy = torch.full_like(h, math.nan)
        noisy[b] = h[b]
        assert same(run(layer, noisy)[b], output[b])


@examples(5)
@given(CASES, st.data())
def test_padding_gives_zero_and_is_seen_by_nobody(device, case, data):
    layer, h = layer_of(case, device), case.arguments(device)["h"]
    lengths = [data.draw(st.integers(0, case.L)) for _ in range(case.B)]
    poisoned = h.clone()
    for b, n in enumerate(lengths):
        poisoned[b, n:] = math.nan
    outputs = [run(layer, x, lengths=int32(lengths, device)) for x in (h, poisoned)]
    assert same(*outputs)
    whole = run(layer, h)
    for b, n in enumerate(lengths):
        assert not outputs[0][b, n:].any()
        assert same(outputs[0][b, :n], whole[b, :n])


def test_training_statistics_count_every_valid_row_once(device):
    """V̄ of Eq. 8: forward adds (Σ Var, rows), update folds them in once."""
    layer = build(CONFIG, device).train()
    layer.mean_variance.zero_()
    variances = []
    run_kernel = layer._indexed_selection

    def record(*tensors: torch.Tensor, **keywords: Any) -> Any:
        selection, variance = run_kernel(*tensors, **keywords)
        variances.append(variance)
        return selection, variance

    layer._indexed_selection = record
    with torch.no_grad():
        layer(hidden(2, 6, device), lengths=int32([6, 2], device))
        layer(hidden(1, 4, device, seed=1))
    assert int(layer.pending_variance_count) == 12
    layer.update_mean_variance()
    rows = torch.cat([variances[0][0], variances[0][1, :2], variances[1][0]]).double()
    assert abs(float(layer.mean_variance) - float(rows.mean())) <= 16 * 2.0**-24 * float(rows.mean())
    assert int(layer.pending_variance_count) == 0


@pytest.mark.property(30)
def test_the_dense_variant_is_the_sparse_one_with_a_budget_of_everything(device):
    """In units of what plain PyTorch loses."""
    config = dataclasses.replace(CONFIG, k_base=40, k_min=40, k_max=40)
    sparse, h = build(config, device), hidden(2, 12, device)
    dense = gsa_ref.GatedSparseAttention(dataclasses.replace(config, sparse=False)).to(device).eval()
    dense.load_state_dict({name: x for name, x in sparse.state_dict().items() if name in dense.state_dict()})
    output, baseline = run(sparse, h), run(dense, h)
    gold = run(dense.double(), h.double())
    verdict = gsa_ref.check.error_budget(*(x.double().cpu().numpy() for x in (output, baseline, gold)), torch.float32)
    assert verdict, verdict


@pytest.mark.pitfall("length-zero")
@pytest.mark.parametrize("variant", ["dense", "sparse", "gated", "gsa"])
@pytest.mark.parametrize(("B", "L"), [(0, 3), (2, 0), (0, 0)])
def test_empty_axes_give_empty_outputs(variant, B, L, device):
    h = hidden(B, L, device)
    assert same(run(build(CONFIG.variant(variant), device), h), h)


def test_deterministic_reaches_the_backward_pass_and_has_to_be_a_bool(device, monkeypatch):
    with pytest.raises(TypeError, match=r"^deterministic: expected a bool, got str"):
        gsa_fast.GatedSparseAttention(CONFIG, deterministic="yes")
    seen = []
    attend_backward = gsa_fast.attention.attend_backward

    def record(*arguments):
        seen.append(arguments[-1])
        return attend_backward(*arguments)

    monkeypatch.setattr(gsa_fast.attention, "attend_backward", record)
    for deterministic in (True, False):
        layer = gsa_fast.GatedSparseAttention(CONFIG, impl="triton", deterministic=deterministic).to(device)
        layer(hidden(1, 5, device)).hidden.sum().backward()
    assert seen == [True, False]
