"""The whole layer (Eq. 6)."""

import copy
import dataclasses
import io
import itertools
import math
import os
import pickle
import re
import shutil
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.functional import scaled_dot_product_attention
from torch.utils.checkpoint import checkpoint

import gsa_ref.layer
from gsa_ref import GatedSparseAttention, GSACache, GSAConfig, equations
from tests.ref import oracle
from tests.ref.models import SMALL, VARIANTS, build, close_layers, hidden, models
from tests.ref.test_training import gold_loss

BACKENDS = ["aot_eager"] + ["inductor"] * bool(shutil.which("g++") or shutil.which("clang++"))


def int32(values: list[int]) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int32)


def row_variances(layer: GatedSparseAttention, h: torch.Tensor) -> np.ndarray:
    """Var(I[t,:]) of one sequence by the equations."""
    w, c, h = {n: oracle.array(x) for n, x in layer.state_dict().items()}, layer.config, oracle.array(h)
    scores = equations.indexer_scores(
        (h @ w["indexer.W_iq.weight"].T).reshape(len(h), c.H_I, c.d_I),
        h @ w["indexer.W_ik.weight"].T,
        h @ w["indexer.W_iw.weight"].T,
        w["indexer.bias"],
        scale=c.d_I**-0.5,
    )
    return equations.score_variance(scores)


# --- against the equations and against plain PyTorch --------------------------------------------------------------


@given(models())
def test_layer_equals_the_equations(model):
    layer, inputs = model.build(), model.inputs()
    output = layer(**inputs)
    assert output.cache is None
    assert output.indexer_loss is None
    gold = oracle.layer_output(layer, **inputs)
    assert close_layers(output.hidden, torch.from_numpy(gold))


def plain_topk_attention(h: torch.Tensor, weights: dict[str, torch.Tensor], H: int, H_kv: int, k: int) -> torch.Tensor:
    """Causal attention of each query to its k best keys, from torch.topk and SDPA, without RoPE or gates."""
    B, T, _ = h.shape

    def heads(name: str, n: int) -> torch.Tensor:
        return (h @ weights[name].mT).view(B, T, n, -1).transpose(1, 2)

    causal = torch.ones(T, T, dtype=torch.bool).tril()
    scores = (h @ weights["indexer.W_iq.weight"].mT) @ (h @ weights["indexer.W_ik.weight"].mT).mT
    best = scores.masked_fill(~causal, -math.inf).topk(k, dim=-1).indices
    mask = torch.zeros(B, T, T, dtype=torch.bool).scatter_(-1, best, True) & causal
    key, value = (heads(name, H_kv).repeat_interleave(H // H_kv, 1) for name in ("W_k.weight", "W_v.weight"))
    out = scaled_dot_product_attention(heads("W_q.weight", H), key, value, attn_mask=mask[:, None])
    return out.transpose(1, 2).reshape(B, T, -1) @ weights["W_o.weight"].mT


@settings(max_examples=20)
@given(st.integers(0, 2**16), st.sampled_from((2, 5, 8)))
def test_a_fixed_budget_without_gates_and_rope_is_plain_topk_attention(seed, k):
    """The independent case: one indexer head without bias is monotone in q·k, so Eq. 7 and Eq. 8 drop out."""
    config = dataclasses.replace(SMALL, H_I=1, k_base=k, k_min=1, k_max=16, rule="fixed", gates="none")
    layer = build(config, seed)
    torch.nn.init.zeros_(layer.indexer.bias)
    h = hidden(2, 64, config.d, seed=seed)
    expected = plain_topk_attention(h, layer.state_dict(), config.H, config.H_kv, k)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gsa_ref.layer, "apply_rope", lambda x, **_: x)
        output = layer(h).hidden
    assert close_layers(output, expected)
    assert not close_layers(layer(h).hidden, expected)  # RoPE is back: the patch mattered


@pytest.mark.property(30)
@pytest.mark.parametrize("gates", ["none", "both"])
def test_the_dense_variant_is_the_sparse_one_with_a_budget_of_everything(gates):
    config = dataclasses.replace(SMALL, k_base=40, k_min=40, k_max=40, gates=gates)
    sparse, dense = build(config), build(dataclasses.replace(config, sparse=False))
    dense.load_state_dict({n: x for n, x in sparse.state_dict().items() if n in dense.state_dict()})
    h = hidden(2, 40, config.d)
    assert close_layers(sparse(h).hidden, dense(h).hidden)


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_variants_have_the_parameters_they_use(variant):
    names = set(build(SMALL.variant(variant)).state_dict())
    expected = {"W_q.weight", "W_k.weight", "W_v.weight", "W_o.weight"}
    if variant in ("gated", "gsa"):
        expected |= {"W_vg.weight", "W_vg.bias", "W_og.weight", "W_og.bias"}
    if variant in ("sparse", "gsa"):
        expected |= {f"indexer.{name}" for name in ("W_iq.weight", "W_ik.weight", "W_iw.weight", "bias")}
        expected.add("mean_variance")
    assert names == expected


@pytest.mark.parametrize("bias", [0.0, 0.5])
def test_gate_biases_start_at_the_configured_value(bias):
    layer = GatedSparseAttention(dataclasses.replace(SMALL, gate_bias_init=bias))
    assert (layer.W_vg.bias == bias).all()
    assert (layer.W_og.bias == bias).all()
    assert not layer.indexer.bias.any()


@torch.no_grad()
@pytest.mark.parametrize("rope", [False, True])
def test_indexer_rope_makes_the_indexer_see_positions(rope):
    """Thirty times the same token: inner products are all equal without RoPE, and differ with it."""
    layer = build(dataclasses.replace(SMALL, indexer_rope=rope))
    q_idx, k_idx, _ = layer.indexer(hidden(1, 1, SMALL.d).expand(1, 30, -1))
    products = q_idx[0, -1] @ k_idx[0].mT  # [H_I, S]
    assert (products.std(-1) > 0.01 * products.abs().amax(-1)).all() == rope
    assert rope or close_layers(products, products[:, :1].expand_as(products))


# --- who sees whom ------------------------------------------------------------------------------------------------


@pytest.mark.property(5)
@pytest.mark.pitfall("mean-of-the-batch")
@given(models(), st.integers(0, 20), st.booleans())
def test_future_perturbation_leaves_earlier_rows_bitwise_equal(model, position, training):
    """In eval and in training mode: V̄ never comes from the current batch."""
    layer, h = model.build().train(training), model.inputs()["h"]
    noisy = h.clone()
    noisy[:, position:] = 1 - 2 * noisy[:, position:]
    assert torch.equal(layer(h).hidden[:, :position], layer(noisy).hidden[:, :position])


@pytest.mark.property(6)
@pytest.mark.pitfall("mean-of-the-batch")
@given(models(), st.booleans())
def test_a_sequence_does_not_see_its_batch_neighbours(model, training):
    """Bitwise when the neighbours change, within rounding when they are gone.

    Implementations that divide by the mean variance of the current batch leak here.
    """
    layer, inputs = model.build().train(training), model.inputs()
    output = layer(**inputs).hidden
    noisy = inputs["h"].clone()
    noisy[1:] = 5 - 3 * noisy[1:]
    assert torch.equal(layer(**{**inputs, "h": noisy}).hidden[0], output[0])
    for b in range(len(output)):
        assert close_layers(layer(**oracle.alone(inputs, b)).hidden, output[b : b + 1])


@given(models(), st.sampled_from((math.nan, math.inf, 1e30)))
def test_padding_is_zero_and_seen_by_nobody_whatever_it_holds(model, poison):
    layer, h = model.build(), model.inputs()["h"]
    B, L, _ = h.shape
    lengths = torch.arange(B, dtype=torch.int32) * 4
    padding = torch.arange(L) >= lengths[:, None]
    output = layer(h, lengths=lengths).hidden
    assert not output[padding].any()
    assert torch.equal(layer(h.masked_fill(padding[..., None], poison), lengths=lengths).hidden, output)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("lengths", [[-3, 0, 50], [0, 0, 0]])
def test_lengths_below_zero_and_above_the_batch_are_cut(variant, lengths):
    layer, h = build(SMALL.variant(variant)), hidden(3, 20, SMALL.d)
    cut = [min(max(n, 0), 20) for n in lengths]
    expected = layer(h, lengths=int32(cut)).hidden
    assert torch.equal(layer(h, lengths=int32(lengths)).hidden, expected)
    cache = GSACache.allocate(layer.config, 3, 20, dtype=torch.float64)
    assert torch.equal(layer(h, lengths=int32(lengths), cache=cache).hidden, expected)
    assert cache.lengths.tolist() == cut


@pytest.mark.pitfall("length-zero")
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize(("B", "L"), [(0, 5), (2, 0), (0, 0)])
@pytest.mark.parametrize("training", [False, True])
def test_empty_batches_and_sequences_of_length_zero(variant, B, L, training):
    layer, h = build(SMALL.variant(variant)).train(training), hidden(B, L, SMALL.d).requires_grad_()
    output = layer(h, lengths=torch.zeros(B, dtype=torch.int32)).hidden
    assert output.shape == h.shape
    output.sum().backward()
    assert h.grad.shape == h.shape


@pytest.mark.pitfall("large-batch")
@pytest.mark.parametrize("variant", VARIANTS)
def test_ten_thousand_sequences_in_a_batch(variant):
    config = GSAConfig(d=2, H=1, H_kv=1, d_h=2, H_I=1, d_I=1, k_base=1, k_min=1, k_max=1).variant(variant)
    layer, h = build(config), hidden(10_000, 2, 2)
    assert close_layers(layer(h).hidden[-2:], layer(h[-2:]).hidden)


@pytest.mark.pitfall("transposed-input")
@pytest.mark.property(9)
def test_transposed_hidden_states_are_read_by_their_strides():
    """Sequence-first memory, as some libraries keep it."""
    layer, h = build(SMALL), hidden(2, 30, SMALL.d)
    assert close_layers(layer(h.transpose(0, 1).contiguous().transpose(0, 1)).hidden, layer(h).hidden)


@torch.no_grad()
@pytest.mark.parametrize("variant", VARIANTS)
def test_a_ragged_batch_goes_on_behind_what_its_cache_holds(variant):
    """Against the equations on whole sequences; RoPE, also of the indexer, of another base than the default."""
    layer, h = build(dataclasses.replace(SMALL, indexer_rope=True, rope_theta=50.0).variant(variant)), hidden(2, 30, 16)
    cache, prompts = GSACache.allocate(layer.config, 2, 32, dtype=torch.float64), [20, 11]
    layer(h[:, :20], cache=cache, lengths=int32(prompts))
    output = layer(torch.stack([h[b, n : n + 4] for b, n in enumerate(prompts)]), cache=cache)
    assert output.cache is cache
    assert output.indexer_loss is None
    for b, n in enumerate(prompts):
        expected = torch.from_numpy(oracle.layer_output(layer, h[b : b + 1, : n + 4]))[:, n:]
        assert close_layers(output.hidden[b : b + 1], expected)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("lengths", [None, [20, 7]])
def test_all_that_the_layer_computes_is_on_the_device_of_its_input(variant, training, lengths):
    """The meta device stands for a GPU: an operation on tensors of both devices is refused there too."""
    layer, h = build(SMALL.variant(variant)).to("meta").train(training), hidden(2, 20, SMALL.d).to("meta")
    output = layer(h, lengths=None if lengths is None else int32(lengths).to("meta"))
    assert output.hidden.is_meta
    assert output.hidden.shape == h.shape


# --- phases and the indexer's loss, beside those in test_training -------------------------------------------------


def learning(module: torch.nn.Module) -> set[str]:
    return {name for name, parameter in module.named_parameters() if parameter.requires_grad}


@pytest.mark.parametrize("variant", ["sparse", "gsa"])
def test_a_phase_chooses_the_parameters_that_learn(variant):
    layer = GatedSparseAttention(SMALL.variant(variant))
    everything = {name for name, _ in layer.named_parameters()}
    assert (layer.phase, learning(layer)) == ("sparse", everything)
    for phase in ("warm_up", "sparse"):
        layer.set_phase(phase)
        assert layer.phase == phase
        assert learning(layer) == {n for n in everything if phase == "sparse" or n.startswith("indexer.")}


@pytest.mark.bad_input
@pytest.mark.parametrize(
    ("variant", "phase", "exception", "message"),
    [
        ("gsa", "dense", ValueError, "phase: expected warm_up or sparse, got 'dense'"),
        ("gsa", None, TypeError, "phase: expected a str, got NoneType None"),
        ("gated", "warm_up", ValueError, 'phase: expected "sparse" for a layer without an indexer, got "warm_up"'),
    ],
)
def test_a_phase_that_the_layer_lacks_is_refused_and_changes_nothing(variant, phase, exception, message):
    layer = GatedSparseAttention(SMALL.variant(variant))
    everything = learning(layer)
    layer.set_phase("sparse")  # which every layer has
    with pytest.raises(exception, match=f"^{message}$"):
        layer.set_phase(phase)
    assert (layer.phase, learning(layer)) == ("sparse", everything)


@pytest.mark.parametrize("phase", ["warm_up", "sparse"])
def test_the_loss_of_a_ragged_batch_is_that_of_the_equations(phase):
    layer, h, lengths = build(dataclasses.replace(SMALL, kl_temperature=0.3)).train(), hidden(3, 20, 16), [20, 7, 0]
    layer.set_phase(phase)
    loss = layer(h, lengths=int32(lengths)).indexer_loss.detach()
    assert math.isclose(loss, gold_loss(layer, h, lengths, dense=phase == "warm_up"), rel_tol=1e-9, abs_tol=0)


def test_evaluation_attends_sparsely_in_the_warm_up_too():
    layer, h = build(SMALL), hidden(1, 40, SMALL.d)
    layer.set_phase("warm_up")
    output = layer(h)
    assert output.indexer_loss is None
    assert close_layers(output.hidden, torch.from_numpy(oracle.layer_output(layer, h)))


@pytest.mark.bad_input
def test_training_refuses_a_cache_and_says_why():
    layer, cache = build(SMALL).train(), GSACache.allocate(SMALL, 2, 20, dtype=torch.float64)
    message = "cache: expected None in training mode (a cache carries no gradient), got a GSACache"
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        layer(hidden(2, 20, SMALL.d), cache=cache)


# --- CUDA graphs, with stand-ins for what needs a GPU -------------------------------------------------------------


@pytest.mark.bad_input
@pytest.mark.parametrize(("on_gpu", "compiling", "recording"), [*itertools.product((False, True), repeat=3)])
def test_a_graph_is_captured_where_a_gpu_records_and_nobody_compiles(monkeypatch, on_gpu, compiling, recording):
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: compiling)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: recording)
    captured = gsa_ref.layer._is_capturing(SimpleNamespace(is_cuda=on_gpu))
    assert captured == ((on_gpu, compiling, recording) == (True, False, True))


@pytest.mark.bad_input
def test_a_captured_step_that_reads_a_part_of_the_cache_is_refused_and_says_what_to_capture(monkeypatch):
    layer, cache = build(SMALL), GSACache.allocate(SMALL, 2, 20, dtype=torch.float64)
    monkeypatch.setattr(gsa_ref.layer, "_is_capturing", lambda x: x.shape[0] == 2)
    message = (
        "cache: a captured CUDA graph would read as many tokens at every replay as the cache holds now; "
        "capture steps of gsa_fast.decode_attention only, which reads whole buffers"
    )
    with pytest.raises(RuntimeError, match=f"^{re.escape(message)}$"):
        layer(hidden(2, 1, SMALL.d), cache=cache)


# --- V̄ ------------------------------------------------------------------------------------------------------------


def test_the_op_that_adds_rows_passes_opcheck():
    total, count, values = torch.zeros(()), torch.zeros((), dtype=torch.int64), torch.randn(2, 3)
    torch.library.opcheck(torch.ops.gsa_ref.add_rows.default, (total, count, values, values > 0))


@given(models().filter(lambda model: model.sparse and not model.indexer_rope))
def test_training_adds_up_the_row_variances_of_valid_rows(model):
    layer, inputs = model.build().train(), model.inputs()
    before = layer.mean_variance.clone()
    layer(**inputs)
    B, L, _ = inputs["h"].shape
    lengths = [L] * B if inputs["lengths"] is None else inputs["lengths"].tolist()
    total = sum(row_variances(layer, inputs["h"][b, :n]).sum() for b, n in enumerate(lengths))
    assert layer.pending_variance_count == sum(lengths)
    assert math.isclose(float(layer.pending_variance_sum), total, rel_tol=2.0**-22)
    assert torch.equal(layer.mean_variance, before)


@pytest.mark.pitfall("ema-starts-at-one")
def test_the_running_mean_is_set_by_the_first_update_and_decays_after_it():
    layer = GatedSparseAttention(SMALL).train()
    expected = None
    for step in range(3):
        h = hidden(2, 20, SMALL.d, seed=step).float() * (step + 1)
        layer(h)
        layer.update_mean_variance()
        mean = np.mean([row_variances(layer, sequence) for sequence in h])
        expected = mean if expected is None else 0.99 * expected + 0.01 * mean
        assert math.isclose(float(layer.mean_variance), expected, rel_tol=1e-5)
        assert layer.pending_variance_count == 0
        assert layer.pending_variance_sum == 0


def test_micro_batches_before_an_update_weigh_as_one_batch():
    """Gradient accumulation: pieces of different length count by their rows."""
    h, lengths = hidden(3, 20, SMALL.d), int32([20, 3, 11])
    whole, pieces = build(SMALL).train(), build(SMALL).train()
    whole(h, lengths=lengths)
    for b in range(3):
        pieces(h[b : b + 1, : int(lengths[b])])
    for layer in (whole, pieces):
        layer.update_mean_variance()
    assert math.isclose(float(pieces.mean_variance), float(whole.mean_variance), rel_tol=2.0**-22)


def test_ranks_are_added_up(monkeypatch):
    """all_reduce is replaced by one that adds what a second rank would send: other rows, other count."""
    layer, other, both = (build(SMALL, trained=False).train() for _ in range(3))
    h = hidden(3, 20, SMALL.d)
    layer(h[:1])
    other(h[1:])
    both(h)
    both.update_mean_variance()
    received = torch.stack((other.pending_variance_sum.double(), other.pending_variance_count.double()))
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "all_reduce", lambda total: total.add_(received))
    layer.update_mean_variance()
    assert math.isclose(float(layer.mean_variance), float(both.mean_variance), rel_tol=2.0**-22)


@pytest.mark.parametrize("variant", VARIANTS)
def test_an_update_without_rows_changes_nothing(variant):
    layer = build(SMALL.variant(variant))
    before = copy.deepcopy(layer.state_dict())
    layer.update_mean_variance()
    assert all(torch.equal(x, before[name]) for name, x in layer.state_dict().items())


def test_evaluation_freezes_the_running_mean():
    layer = build(SMALL).eval()
    layer(hidden(2, 20, SMALL.d))
    assert layer.pending_variance_count == 0


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_a_recomputed_forward_pass_counts_its_rows_once(use_reentrant):
    layer, plain = build(SMALL).train(), build(SMALL).train()
    h = hidden(2, 20, SMALL.d)
    x, y = h.clone().requires_grad_(), h.clone().requires_grad_()
    for _ in range(2):  # two micro-batches, so that a count which is merely overwritten shows
        checkpoint(lambda x: layer(x).hidden, x, use_reentrant=use_reentrant).sum().backward()
        plain(y).hidden.sum().backward()
    assert layer.pending_variance_count == plain.pending_variance_count == 80
    assert torch.equal(layer.pending_variance_sum, plain.pending_variance_sum)
    assert torch.equal(x.grad, y.grad)


@pytest.mark.pitfall("ema-starts-at-one")
def test_a_new_layer_starts_at_the_base_budget_and_is_not_pinned_to_the_smallest():
    """With V̄ initialised to 1, as elsewhere, every proportional budget would be k_min for hundreds of steps."""
    layer = GatedSparseAttention(dataclasses.replace(SMALL, k_base=8, k_min=1, k_max=40)).double().train()
    h = hidden(2, 40, SMALL.d)
    counts = []

    def record(*arguments: object, **keywords: object) -> object:
        selection, variance = gsa_ref.indexed_selection(*arguments, **keywords)
        counts.append(selection.counts)
        return selection, variance

    layer._indexed_selection = record
    layer(h)
    layer.update_mean_variance()
    layer(h)
    n_valid = (torch.arange(40) + 1).expand(2, 40)
    assert torch.equal(counts[0], n_valid.clamp(max=8).int())
    late = counts[1][:, 20:].float()
    assert 4 <= late.mean() <= 16
    assert late.min() < 8 < late.max()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_the_running_mean_stays_in_float32_when_the_layer_is_converted(dtype):
    """A mean of decay 0.99 stands still in 16 bits: a step of 1% is less than half a unit in the last place."""
    layer = build(SMALL, trained=False).float().train()
    layer.mean_variance.fill_(1.0)
    layer.to(dtype)
    assert layer.W_q.weight.dtype == dtype
    output = layer(hidden(2, 20, SMALL.d).to(dtype)).hidden
    assert output.dtype == dtype
    assert output.isfinite().all()
    layer.update_mean_variance()
    assert layer.mean_variance.dtype == torch.float32
    assert 0.99 <= layer.mean_variance < 0.9999


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_the_state_of_the_mean_has_its_own_dtypes_whatever_the_default(dtype):
    """float32, and a count of rows that adds up exactly."""
    default = torch.get_default_dtype()
    try:
        torch.set_default_dtype(dtype)
        layer = GatedSparseAttention(SMALL)
    finally:
        torch.set_default_dtype(default)
    assert layer.W_q.weight.dtype == dtype
    assert layer.mean_variance.dtype == layer.pending_variance_sum.dtype == torch.float32
    assert layer.pending_variance_count.dtype == torch.int64


def test_the_mean_and_the_pending_rows_move_with_the_layer():
    """A change of dtype keeps the rows, the way through the meta device, which holds no values, forgets them."""
    layer = build(SMALL).train()
    layer(hidden(2, 20, SMALL.d))
    mean, total = layer.mean_variance.clone(), layer.pending_variance_sum.clone()
    layer.to(torch.bfloat16)
    assert torch.equal(layer.mean_variance, mean)
    assert torch.equal(layer.pending_variance_sum, total)
    assert layer.pending_variance_count == 40

    def state() -> list[torch.Tensor]:
        return [layer.mean_variance, layer.pending_variance_sum, layer.pending_variance_count]

    layer.to("meta", torch.float16)
    assert all(x.is_meta for x in state())
    layer.to_empty(device="cpu")
    assert [x.device.type for x in state()] == ["cpu"] * 3
    assert [x.dtype for x in state()] == [torch.float32, torch.float32, torch.int64]
    assert (layer.pending_variance_sum, layer.pending_variance_count) == (0, 0)


def test_pending_rows_start_at_zero_where_loading_brings_the_mean():
    with torch.device("meta"):
        layer = GatedSparseAttention(SMALL)
    layer.load_state_dict(GatedSparseAttention(SMALL).state_dict(), assign=True)
    assert (layer.pending_variance_sum, layer.pending_variance_count) == (0, 0)
    assert not layer.pending_variance_sum.is_meta


def test_moving_the_layer_alone_leaves_its_parts_where_they_are():
    layer = GatedSparseAttention(SMALL).to_empty(device="meta", recurse=False)
    assert layer.mean_variance.is_meta
    assert not any(parameter.is_meta for parameter in layer.parameters())


# --- gradients ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("variant", VARIANTS)
def test_gradients_are_finite_for_padding_and_empty_sequences(variant):
    layer, h = build(SMALL.variant(variant)).train(), hidden(3, 20, SMALL.d)
    lengths = int32([20, 7, 0])
    h[1, 7:], h[2] = math.nan, math.nan
    h.requires_grad_()
    layer(h, lengths=lengths).hidden.square().sum().backward()
    assert h.grad.isfinite().all()
    assert not h.grad[1, 7:].any()
    assert not h.grad[2].any()
    assert h.grad[0].any(-1).all()
    for name, parameter in layer.named_parameters():
        if name.startswith("indexer."):  # nothing flows through the indices of a top-k
            assert parameter.grad is None
        else:
            assert parameter.grad.isfinite().all()
            assert parameter.grad.any()


@pytest.mark.property(46)
def test_gradients_of_the_layer_match_finite_differences():
    """The selection is locally constant."""
    layer = build(SMALL)
    assert torch.autograd.gradcheck(lambda h: layer(h).hidden, hidden(1, 10, SMALL.d).requires_grad_())


# --- precision, compilation, storage ------------------------------------------------------------------------------


@pytest.mark.parametrize("variant", VARIANTS)
def test_autocast_runs_and_keeps_the_selection_in_float32(variant):
    layer, h = build(SMALL.variant(variant)).float(), hidden(2, 30, SMALL.d).float()
    variances = []
    if layer.config.sparse:

        def record(q_idx, *arguments: object, **keywords: object) -> object:
            selection, variance = gsa_ref.indexed_selection(q_idx, *arguments, **keywords)
            with torch.autocast("cpu", enabled=False):
                expected, expected_variance = gsa_ref.indexed_selection(q_idx, *arguments, **keywords)
            assert q_idx.dtype == torch.bfloat16
            assert torch.equal(selection.indices, expected.indices)
            assert torch.equal(variance, expected_variance)
            variances.append(variance)
            return selection, variance

        layer._indexed_selection = record
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output = layer(h).hidden
    assert output.dtype == torch.bfloat16
    assert output.isfinite().all()
    assert all(variance.dtype == torch.float32 for variance in variances)


@pytest.mark.property(55)
@pytest.mark.filterwarnings(
    "ignore:.torch.jit.script_method. is deprecated:DeprecationWarning"
)  # inductor's own import
@pytest.mark.parametrize("backend", BACKENDS)
def test_compiled_equals_eager_in_one_graph(backend):
    """Forward and backward, in training mode with padding."""
    torch.compiler.reset()
    eager, lengths = build(SMALL).train(), int32([20, 13])
    compiled_layer = copy.deepcopy(eager)
    compiled = torch.compile(compiled_layer, fullgraph=True, backend=backend)
    x, y = hidden(2, 20, SMALL.d).requires_grad_(), hidden(2, 20, SMALL.d).requires_grad_()
    expected, output = eager(x, lengths=lengths).hidden, compiled(y, lengths=lengths).hidden
    expected.square().sum().backward()
    output.square().sum().backward()
    assert close_layers(output, expected)
    assert close_layers(y.grad, x.grad)
    assert compiled_layer.pending_variance_count == eager.pending_variance_count == 33
    assert math.isclose(compiled_layer.pending_variance_sum, eager.pending_variance_sum, rel_tol=2.0**-22)


@pytest.mark.property(55)
def test_compiled_decode_equals_eager_in_one_graph():
    """Prefill, then two steps."""
    torch.compiler.reset()
    layer, h = build(SMALL), hidden(2, 20, SMALL.d)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    caches = [GSACache.allocate(SMALL, 2, 32, dtype=torch.float64) for _ in range(2)]
    with torch.no_grad():
        for part in (h[:, :18], h[:, 18:19], h[:, 19:]):
            expected, output = layer(part, cache=caches[0]).hidden, compiled(part, cache=caches[1]).hidden
            assert close_layers(output, expected)
    assert torch.equal(caches[0].lengths, caches[1].lengths)


@pytest.mark.property(56)
@given(models("float32"))
def test_saving_and_loading_gives_bitwise_the_same_layer(model):
    """Through a file that `torch.load(weights_only=True)` accepts; V̄ included."""
    layer, inputs = model.build(), model.inputs()
    file = io.BytesIO()
    torch.save(layer.state_dict(), file)
    file.seek(0)
    restored = GatedSparseAttention(model.config)
    restored.load_state_dict(torch.load(file, weights_only=True))
    assert torch.equal(restored.eval()(**inputs).hidden, layer(**inputs).hidden)
    assert all(torch.equal(x, restored.state_dict()[name]) for name, x in layer.state_dict().items())


class Malicious:
    """Runs a command when it is unpickled."""

    def __init__(self, command: str) -> None:
        self.command = command

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.system, (self.command,)


@pytest.mark.parametrize("writer", [torch.save, partial(pickle.dump, protocol=2)], ids=["torch.save", "pickle.dump"])
def test_a_malicious_checkpoint_is_refused(tmp_path, writer):
    trace, path = tmp_path / "trace", tmp_path / "checkpoint.pt"
    with path.open("wb") as file:
        writer({"mean_variance": Malicious(f"touch {trace}")}, file)
    with pytest.raises(pickle.UnpicklingError):
        torch.load(path, weights_only=True)
    assert not trace.exists()


@pytest.mark.property(57)
@given(models("float32"))
def test_reruns_are_bitwise_equal(model):
    layer, inputs = model.build(), model.inputs()
    assert torch.equal(layer(**inputs).hidden, layer(**inputs).hidden)
