"""The language model: its formula, its caches, its gradients, and how it starts."""

import dataclasses
import io
import math
import os
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import gsa_ref
from gsa_ref import GatedSparseAttention, GSACache, LanguageModel, ModelConfig
from gsa_ref.model import INIT_STD, NORM_EPS
from tests.ref.models import SMALL, VARIANTS, close_layers

on_demand = pytest.mark.skipif(
    os.environ.get("HYPOTHESIS_PROFILE", "ci") == "ci", reason="takes a minute: set HYPOTHESIS_PROFILE=thorough"
)

CONFIG = ModelConfig(attention=SMALL, n_layers=2, d_ff=24)


def build_model(
    variant: str = "gsa", *, seed: int = 0, dtype: torch.dtype = torch.float64, **attention: Any
) -> LanguageModel:
    """A model in eval mode whose every parameter is random and large enough to matter; V̄ comes from other tokens."""
    config = dataclasses.replace(CONFIG, attention=dataclasses.replace(SMALL, **attention)).variant(variant)
    model, g = LanguageModel(config).double(), torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            width = parameter.shape[-1] if parameter.dim() == 2 else 1
            parameter.copy_(1.5 * width**-0.5 * torch.randn(parameter.shape, generator=g, dtype=torch.float64))
        model(torch.randint(256, (2, 30), generator=g))
        model.update_mean_variance()
    return model.eval().to(dtype)


def distinct_tokens(B: int, L: int, *, seed: int = 0) -> torch.Tensor:
    """Rows without a repetition: without positions, the indexer of the first block ties between equal tokens."""
    g = torch.Generator().manual_seed(seed)
    return torch.stack([torch.randperm(CONFIG.vocab, generator=g)[:L] for _ in range(B)])


def int32(*values: int) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int32)


# --- what it computes ---------------------------------------------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize("variant", VARIANTS)
def test_the_model_is_its_formula(variant):
    """Norms, SwiGLU and residuals written out; the attention is the layer, which has its own tests."""
    model, tokens = build_model(variant), distinct_tokens(2, 30)
    w = model.state_dict()

    def rms_norm(x: torch.Tensor, name: str) -> torch.Tensor:
        return x / (x.square().mean(-1, keepdim=True) + NORM_EPS).sqrt() * w[f"{name}.weight"]

    x = w["embedding.weight"][tokens]
    for i, block in enumerate(model.blocks):
        x = x + block.attention(rms_norm(x, f"blocks.{i}.norm_attention")).hidden
        y = rms_norm(x, f"blocks.{i}.norm_mlp")
        gate, up, down = (w[f"blocks.{i}.mlp.W_{name}.weight"] for name in ("gate", "up", "down"))
        a = y @ gate.mT
        x = x + (a / (1 + torch.exp(-a)) * (y @ up.mT)) @ down.mT
    expected = rms_norm(x, "norm") @ w["embedding.weight"].mT
    output = model(tokens)
    assert output.logits.shape == (2, 30, CONFIG.vocab)
    assert close_layers(output.logits, expected)
    assert output.caches is None
    assert output.indexer_loss is None


@pytest.mark.property(5)
@torch.no_grad()
@pytest.mark.parametrize("variant", VARIANTS)
def test_a_later_token_changes_no_earlier_logits(variant):
    model, tokens = build_model(variant), distinct_tokens(2, 30)
    changed = tokens.clone()
    changed[:, 20:] = (tokens[:, 20:] + 1) % 256
    output, other = model(tokens).logits, model(changed).logits
    assert torch.equal(output[:, :20], other[:, :20])
    assert not torch.equal(output[:, 20], other[:, 20])


@torch.no_grad()
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("poison", [-100, 2**40])
def test_padding_may_hold_anything_and_gives_zero(variant, poison):
    model, tokens, lengths = build_model(variant), distinct_tokens(3, 30), int32(30, 11, 0)
    padding = torch.arange(30) >= lengths[:, None]
    output = model(tokens.masked_fill(padding, poison), lengths=lengths).logits
    assert not output[padding].any()
    assert torch.equal(output, model(tokens, lengths=lengths).logits)
    assert close_layers(output[1:2, :11], model(tokens[1:2, :11]).logits)


@pytest.mark.property(53)
@torch.no_grad()
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("indexer_rope", [False, True])
def test_decoding_through_the_caches_gives_the_logits_of_one_pass(variant, indexer_rope):
    """A ragged prefill, then token by token, far beyond k_max."""
    model, tokens, prompts = build_model(variant, indexer_rope=indexer_rope), distinct_tokens(2, 60), [40, 23]
    caches = model.allocate_caches(2, 60)
    first = model(tokens[:, :40], caches=caches, lengths=int32(*prompts))
    assert first.caches is caches
    outputs = [[first.logits[b, :n]] for b, n in enumerate(prompts)]
    for t in range(20):
        step = torch.stack([tokens[b, n + t] for b, n in enumerate(prompts)])[:, None]
        for b, logits in enumerate(model(step, caches=caches).logits):
            outputs[b].append(logits)
    for b, n in enumerate(prompts):
        assert close_layers(torch.cat(outputs[b])[None], model(tokens[b : b + 1, : n + 20]).logits)
    assert [cache.lengths.tolist() for cache in caches] == [[60, 43]] * 2


@torch.no_grad()
@pytest.mark.parametrize("variant", ["sparse", "gsa"])
@pytest.mark.parametrize("n_tokens", [120, pytest.param(10_000, marks=on_demand)])
def test_after_many_decoded_tokens_the_caches_equal_those_of_a_prefill(variant, n_tokens):
    """In float64. The second block's cache also shows what the first one's decoding gave.

    The prefill comes in chunks, because a whole one would hold the scores of all pairs; chunks change nothing, see
    `test_a_prefill_in_chunks_equals_one`.
    """
    model = build_model(variant, indexer_rope=True)
    tokens = torch.randint(256, (1, n_tokens), generator=torch.Generator().manual_seed(0))
    decoded, prefilled = (model.allocate_caches(1, n_tokens + 8) for _ in range(2))
    for token in tokens.split(1, dim=1):
        model(token, caches=decoded)
    for chunk in tokens.split(max(50, n_tokens // 40), dim=1):
        model(chunk, caches=prefilled)
    for cache, expected in zip(decoded, prefilled, strict=True):
        assert cache.lengths.tolist() == expected.lengths.tolist() == [n_tokens]
        assert cache.longest == n_tokens
        for name in ("k", "v", "k_idx"):
            buffer = getattr(cache, name)
            assert close_layers(buffer, getattr(expected, name)), name
            assert buffer[:, :n_tokens].any(-1).all()
            assert not buffer[:, n_tokens:].any()


@pytest.mark.property(54)
@torch.no_grad()
@settings(max_examples=20)
@given(st.sampled_from(VARIANTS), st.lists(st.integers(0, 9), max_size=5), st.integers(0, 2**16))
def test_a_prefill_in_chunks_equals_one(variant, chunks, seed):
    model, tokens = build_model(variant, seed=seed), distinct_tokens(2, 30, seed=seed)
    caches, outputs, done = model.allocate_caches(2, 80), [], 0
    for n in [*chunks, 30]:
        outputs.append(model(tokens[:, done : done + n], caches=caches).logits)
        done = min(done + n, 30)
    assert close_layers(torch.cat(outputs, 1), model(tokens).logits)


@torch.no_grad()
@pytest.mark.parametrize("indexer_rope", [False, True])
def test_equal_tokens_tie_in_the_first_block_unless_the_indexer_has_rope(indexer_rope):
    """What `ModelConfig.attention` warns of; the second block has seen the context and ties no more."""
    model = build_model(indexer_rope=indexer_rope)
    tokens = torch.tensor([[5, 9, 9, 3, 9, 7]])
    spread = []
    for block in model.blocks:

        def record(q_idx: torch.Tensor, k_idx: torch.Tensor, *rest: Any, **options: Any) -> Any:
            products = (q_idx[0, -1] @ k_idx[0].mT)[:, [1, 2, 4]]  # of the last query with the three equal tokens
            spread.append(float((products.amax(-1) - products.amin(-1)).max()))
            return gsa_ref.indexed_selection(q_idx, k_idx, *rest, **options)

        block.attention._indexed_selection = record
    model(tokens)
    assert (spread[0] > 1e-3) == indexer_rope
    assert indexer_rope or spread[0] < 1e-12
    assert spread[1] > 1e-3


@pytest.mark.parametrize(("B", "L"), [(0, 3), (2, 0)])
def test_empty_batches_and_empty_sequences(B, L):
    model = build_model()
    output = model(torch.zeros(B, L, dtype=torch.int64), caches=model.allocate_caches(B, 4))
    assert output.logits.shape == (B, L, CONFIG.vocab)


# --- layers: switches, other classes, state -----------------------------------------------------------------------


def expected_parameters(config: ModelConfig) -> int:
    c = config.attention
    attention = 2 * c.d * c.H * c.d_h + 2 * c.d * c.H_kv * c.d_h
    gates = (c.d + 1) * (c.H_kv * c.d_h + c.H * c.d_h)
    indexer = c.d * (c.H_I * c.d_I + c.d_I + c.H_I) + c.H_I
    block = attention + (c.gates == "both") * gates + c.sparse * indexer + 3 * c.d * config.d_ff + 2 * c.d
    return config.vocab * c.d + config.n_layers * block + c.d


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_variants_differ_by_their_two_switches_alone(variant):
    config = CONFIG.variant(variant)
    assert (config.n_layers, config.d_ff, config.vocab) == (2, 24, 257)
    model = LanguageModel(config)
    assert sum(p.numel() for p in model.parameters()) == expected_parameters(config)  # the embedding counts once
    names = {name for name, _ in model.named_parameters()}
    assert any("indexer." in name for name in names) == (variant in ("sparse", "gsa"))
    assert (
        any("W_vg" in name for name in names) == any("W_og" in name for name in names) == (variant in ("gated", "gsa"))
    )


class Doubled(GatedSparseAttention):
    """Another implementation of the same parameters, whose outputs and losses show that it ran."""

    def forward(self, h: torch.Tensor, **options: Any) -> gsa_ref.GSAOutput:
        hidden, cache, _ = super().forward(h, **options)
        return gsa_ref.GSAOutput(2 * hidden, cache, hidden.square().mean())


def test_another_layer_class_runs_on_the_same_state_dict():
    model, tokens = build_model(), distinct_tokens(2, 20)
    other = LanguageModel(CONFIG, layer=Doubled).double().eval()
    other.load_state_dict(model.state_dict())
    again = LanguageModel(CONFIG).double()
    again.load_state_dict(other.state_dict())
    assert all(torch.equal(x, again.state_dict()[name]) for name, x in model.state_dict().items())
    assert [type(block.attention) for block in other.blocks] == [Doubled] * 2
    assert not close_layers(other(tokens).logits, model(tokens).logits)


def test_the_indexer_loss_is_the_sum_over_the_layers():
    model = LanguageModel(CONFIG, layer=Doubled)
    losses: list[torch.Tensor] = []
    for block in model.blocks:
        block.attention.register_forward_hook(lambda module, inputs, output: losses.append(output.indexer_loss))
    output = model(distinct_tokens(2, 20))
    assert len(losses) == 2
    assert losses[0] != losses[1]
    assert torch.equal(output.indexer_loss, losses[0] + losses[1])
    output.indexer_loss.backward()
    assert model.blocks[0].attention.W_o.weight.grad.any()


@pytest.mark.property(51)
@pytest.mark.parametrize("variant", VARIANTS)
def test_gradients_reach_every_parameter_but_the_indexer(variant):
    """Of a loss of the logits: nothing flows through the indices of a top-k."""
    model, tokens = build_model(variant).train(), distinct_tokens(2, 30)
    logits = model(tokens[:, :-1], lengths=int32(29, 20)).logits
    nn.functional.cross_entropy(logits[0], tokens[0, 1:]).backward()
    for name, parameter in model.named_parameters():
        if "indexer." in name:
            assert parameter.grad is None
        else:
            assert parameter.grad.isfinite().all()
            assert parameter.grad.any(), name


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("lengths", [None, int32(30, 11)])
def test_gradients_match_a_difference_of_losses(variant, lengths):
    """In one random direction of all parameters but the indexer's: the selection stays as it is."""
    model, tokens, g = build_model(variant), distinct_tokens(2, 30), torch.Generator().manual_seed(0)
    parameters = [p for name, p in model.named_parameters() if "indexer." not in name]
    direction = [torch.randn(p.shape, generator=g, dtype=p.dtype) for p in parameters]

    def loss() -> torch.Tensor:
        return model(tokens, lengths=lengths).logits.log_softmax(-1)[..., 7].mean()

    gradient = torch.autograd.grad(loss(), parameters)
    expected = sum(float((x * v).sum()) for x, v in zip(gradient, direction, strict=True))
    step, values = 1e-6, []
    with torch.no_grad():
        for sign in (1, -2):
            for p, v in zip(parameters, direction, strict=True):
                p += sign * step * v
            values.append(float(loss()))
    assert math.isclose((values[0] - values[1]) / (2 * step), expected, rel_tol=1e-6)


def test_a_model_learns_one_sentence():
    torch.manual_seed(0)
    model = LanguageModel(CONFIG).train()
    tokens = gsa_ref.generation.encode("a gate for each head")[None]
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    losses = []
    for _ in range(120):
        loss = nn.functional.cross_entropy(model(tokens[:, :-1]).logits[0], tokens[0, 1:])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        model.update_mean_variance()
        losses.append(loss.item())
    assert abs(losses[0] - math.log(257)) < 0.1  # a new model knows nothing
    assert losses[-1] < 0.2
    new = gsa_ref.generate(model.eval(), b"a", max_new_tokens=19)
    assert gsa_ref.generation.decode(new[0]) == " gate for each head"


def test_an_update_reaches_the_running_mean_of_every_layer():
    model = LanguageModel(CONFIG).train()
    model(distinct_tokens(2, 20))
    assert [int(block.attention.pending_variance_count) for block in model.blocks] == [40, 40]
    model.update_mean_variance()
    for block in model.blocks:
        assert block.attention.mean_variance > 0
        assert block.attention.pending_variance_count == 0


@pytest.mark.property(56)
@torch.no_grad()
@pytest.mark.parametrize("variant", VARIANTS)
def test_saving_and_loading_gives_bitwise_the_same_model(variant):
    model, file = build_model(variant, dtype=torch.float32), io.BytesIO()
    torch.save(model.state_dict(), file)
    file.seek(0)
    restored = LanguageModel(CONFIG.variant(variant)).eval()
    restored.load_state_dict(torch.load(file, weights_only=True))
    tokens = distinct_tokens(2, 40)
    assert torch.equal(restored(tokens).logits, model(tokens).logits)


# --- how it starts ------------------------------------------------------------------------------------------------


def test_a_seed_determines_a_new_model():
    states = []
    for seed in (3, 3, 4):
        torch.manual_seed(seed)
        states.append(LanguageModel(CONFIG).state_dict())
    assert all(torch.equal(x, states[1][name]) for name, x in states[0].items())
    assert not torch.equal(states[0]["embedding.weight"], states[2]["embedding.weight"])


def test_weights_start_small_and_smaller_where_they_write_to_the_residual_stream():
    attention = dataclasses.replace(SMALL, d=128, H=8, H_kv=8, d_h=16, H_I=8, d_I=16, gate_bias_init=0.5)
    config = ModelConfig(attention=attention, n_layers=8, d_ff=256)
    torch.manual_seed(0)
    for name, x in LanguageModel(config).named_parameters():
        if x.dim() == 2:
            std = INIT_STD / 4 if name.endswith(("W_o.weight", "W_down.weight")) else INIT_STD
            assert abs(float(x.detach().std()) / std - 1) < 5 / (2 * x.numel()) ** 0.5, name  # 5 standard errors
        else:
            start = 1.0 if "norm" in name else 0.0 if "indexer" in name else 0.5
            assert (x == start).all(), name


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_allocated_caches_follow_the_model(dtype):
    model = LanguageModel(CONFIG).to(dtype)
    caches = model.allocate_caches(3, 7)
    assert len(caches) == 2
    assert caches[0].k is not caches[1].k
    assert all((cache.k.dtype, cache.capacity, len(cache.k)) == (dtype, 7, 3) for cache in caches)


# --- bad input ----------------------------------------------------------------------------------------------------


def test_a_config_is_immutable_and_hashable():
    with pytest.raises(dataclasses.FrozenInstanceError):
        CONFIG.d_ff = 1
    assert {CONFIG: 1}[dataclasses.replace(CONFIG)] == 1


@pytest.mark.bad_input
@pytest.mark.parametrize(
    ("name", "value", "exception", "message"),
    [
        *[(n, 0, ValueError, f"{n}: expected an int ≥ 1, got 0") for n in ("n_layers", "d_ff", "vocab")],
        *[(n, 2.0, TypeError, f"{n}: expected an int, got float 2.0") for n in ("n_layers", "d_ff", "vocab")],
        ("attention", {"d": 8}, TypeError, "attention: expected a GSAConfig, got dict"),
    ],
)
def test_a_wrong_field_is_named_with_what_came_and_what_was_expected(name, value, exception, message):
    with pytest.raises(exception, match=f"^{message}$"):
        dataclasses.replace(CONFIG, **{name: value})


@pytest.mark.bad_input
def test_a_model_wants_a_model_config():
    with pytest.raises(TypeError, match=r"^config: expected a ModelConfig, got GSAConfig$"):
        LanguageModel(SMALL)


MODEL = build_model()
TOKENS = distinct_tokens(2, 5)
BAD_CALLS = [
    ({"tokens": [[1]]}, TypeError, "tokens: expected a torch.Tensor, got list"),
    ({"tokens": TOKENS.int()}, TypeError, "tokens: expected dtype int64, got torch.int32"),
    ({"tokens": TOKENS[0]}, ValueError, r"tokens: expected shape \[B, L\], got \[5\]"),
    ({"tokens": TOKENS.to("meta")}, ValueError, "tokens: expected device cpu as embedding, got meta"),
    ({"lengths": [5, 5]}, TypeError, "lengths: expected a torch.Tensor, got list"),
    ({"lengths": TOKENS[:, 0]}, TypeError, "lengths: expected dtype int32, got torch.int64"),
    ({"lengths": int32(5)}, ValueError, r"lengths: expected shape \[B=2\], got \[1\]"),
    ({"lengths": int32(5, 5).to("meta")}, ValueError, "lengths: expected device cpu as embedding, got meta"),
    ({"caches": MODEL.allocate_caches(2, 9)[0]}, TypeError, "caches: expected a sequence of GSACache, got GSACache"),
    ({"caches": [None, None]}, TypeError, "caches: expected a sequence of GSACache, got one of NoneType"),
    ({"caches": MODEL.allocate_caches(2, 9)[:1]}, ValueError, "caches: expected one for each of 2 layers, got 1"),
    ({"caches": MODEL.allocate_caches(3, 9)}, ValueError, "cache: expected batch size 2 as h, got 3"),
]


@pytest.mark.bad_input
@pytest.mark.parametrize(("changes", "exception", "message"), BAD_CALLS)
def test_a_bad_call_is_refused_by_type_and_named(changes, exception, message):
    with pytest.raises(exception, match=f"^{message}$"):
        MODEL(**{"tokens": TOKENS, **changes})


@pytest.mark.bad_input
@pytest.mark.parametrize("token", [-1, 257])
def test_a_token_that_is_not_in_the_vocabulary_is_refused_on_a_cpu_before_anything_is_cached(token):
    caches = MODEL.allocate_caches(1, 4)
    with pytest.raises(IndexError):
        MODEL(torch.tensor([[token]]), caches=caches)
    assert [int(cache.lengths) for cache in caches] == [0, 0]


OTHER = {
    "full": (lambda: GSACache.allocate(SMALL, 2, 4, dtype=torch.float64), ValueError, "room for 5 more tokens"),
    "dtype": (lambda: GSACache.allocate(SMALL, 2, 9), TypeError, "dtype torch.float64"),
    "variant": (
        lambda: GSACache.allocate(SMALL.variant("gated"), 2, 9, dtype=torch.float64),
        ValueError,
        "without k_idx",
    ),
    "device": (
        lambda: GSACache.allocate(SMALL, 2, 9, dtype=torch.float64, device="meta"),
        ValueError,
        "device cpu, got meta",
    ),
}


@pytest.mark.parametrize("name", OTHER)
@pytest.mark.parametrize("place", [0, 1])
def test_one_refused_cache_leaves_all_of_them_as_they_were(name, place):
    """The second layer would refuse its cache when the first has already written into its own."""
    make, exception, message = OTHER[name]
    caches = MODEL.allocate_caches(2, 9)
    caches[place] = make()
    good = caches[1 - place]
    with pytest.raises(exception, match=r"^cache: expected "):
        MODEL(TOKENS, caches=caches)
    assert not good.k.any()
    assert (good.lengths.tolist(), good.longest) == ([0, 0], 0)
    if place:
        with pytest.raises(exception, match=message):
            MODEL(TOKENS, caches=caches)


def test_one_cache_for_two_layers_is_refused():
    """Both would append to it, and each would read what the other wrote."""
    cache = MODEL.allocate_caches(2, 9)[0]
    with pytest.raises(ValueError, match=r"^caches: expected one for each layer, got one cache twice$"):
        MODEL(TOKENS, caches=[cache, cache])
    assert (cache.lengths.tolist(), cache.longest) == ([0, 0], 0)


def test_training_with_gradients_refuses_caches():
    model = LanguageModel(CONFIG).train()
    caches = model.allocate_caches(2, 9)
    with pytest.raises(ValueError, match="cache: expected None in training mode"):
        model(TOKENS, caches=caches)
    assert not caches[0].k.any()


@pytest.mark.parametrize("variant", VARIANTS)
def test_all_that_a_model_computes_is_on_the_device_of_its_weights(variant):
    """The meta device stands for a GPU: an operation on tensors of both devices is refused there too."""
    model = build_model(variant).to("meta")
    tokens = torch.zeros(2, 5, dtype=torch.int64, device="meta")
    assert model(tokens, lengths=torch.zeros(2, dtype=torch.int32, device="meta")).logits.is_meta
    assert all(cache.k.is_meta and cache.lengths.is_meta for cache in model.allocate_caches(2, 5))


@pytest.mark.bad_input
def test_what_is_no_cache_is_refused_with_its_type():
    model = build_model("gsa").eval()
    with pytest.raises(TypeError, match=r"^caches: expected a sequence of GSACache, got one of int$"):
        model(torch.zeros(2, 5, dtype=torch.int64), caches=[3] * len(model.blocks))


def test_padding_may_hold_anything_where_there_is_one_token():
    model = LanguageModel(dataclasses.replace(CONFIG, vocab=1)).eval()
    assert model(torch.tensor([[0, 0, 7]]), lengths=int32(2)).logits.shape == (1, 3, 1)
