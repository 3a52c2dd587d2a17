"""The layer at work: decoding, chunked prefill, compilation; and what PyTorch asks of a custom op."""

import dataclasses
import warnings
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend

import gsa_fast  # registers the custom ops
import gsa_ref
import gsa_ref.layer
from gsa_fast.verification.checks import numpy
from gsa_ref import GSACache, GSAConfig, Selection
from gsa_ref.check import error_budget
from tests.fast.helpers import examples, int32, same
from tests.fast.test_layer import build, hidden

NEEDS_CUDA = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
CONFIG = GSAConfig(d=16, H=4, H_kv=2, d_h=8, H_I=2, d_I=16, k_base=3, k_min=2, k_max=5)
CONFIGS = st.builds(
    GSAConfig,
    d=st.just(16),
    H=st.just(4),
    H_kv=st.sampled_from((1, 2)),
    d_h=st.just(8),
    H_I=st.integers(1, 3),
    d_I=st.just(16),
    k_base=st.just(3),
    k_min=st.integers(1, 3),
    k_max=st.integers(3, 6),
    rule=st.sampled_from(("proportional", "inverse", "fixed")),
    gates=st.sampled_from(("both", "value", "output", "none")),
)


class Recorded:
    """A layer whose indexer is exact: parameters and inputs are small multiples of powers of two.

    Every product and sum in q^I·k^I is then exact in any order and dtype, so that scores, and with them selections,
    must agree bit for bit between prefill and decoding, ties included. All other parameters are random.
    """

    def __init__(self, config: GSAConfig, seed: int, device: str, dtype: torch.dtype = torch.float32) -> None:
        g = torch.Generator().manual_seed(seed)
        torch.manual_seed(seed)
        self.layer = gsa_fast.GatedSparseAttention(config, impl="triton").eval()
        with torch.no_grad():
            for projection in (self.layer.indexer.W_iq, self.layer.indexer.W_ik, self.layer.indexer.W_iw):
                projection.weight.copy_(torch.randint(-2, 3, projection.weight.shape, generator=g) / 4)
            self.layer.indexer.bias.copy_(torch.randint(-2, 3, (config.H_I,), generator=g) / 2)
            self.layer.mean_variance.fill_(0.05)
        self.layer.to(device=device, dtype=dtype)
        self.selections: list[Selection] = []
        run_kernel = self.layer._indexed_selection

        def record(*tensors: torch.Tensor, **keywords: Any) -> Any:
            result = run_kernel(*tensors, **keywords)
            self.selections.append(result[0])
            return result

        self.layer._indexed_selection = record
        run_decode = self.layer._decode_attention

        def record_decode(*tensors: torch.Tensor, **keywords: Any) -> Any:
            result = run_decode(*tensors, return_selection=True, **keywords)
            self.selections.append(result.selection)
            return result

        self.layer._decode_attention = record_decode

    def hidden(self, B: int, L: int, seed: int) -> torch.Tensor:
        weight = self.layer.W_q.weight
        h = torch.randint(-2, 3, (B, L, weight.shape[1]), generator=torch.Generator().manual_seed(seed)) / 2
        return h.to(weight)

    @torch.no_grad()
    def __call__(self, h: torch.Tensor, **keywords: Any) -> torch.Tensor:
        return self.layer(h, **keywords).hidden

    def selection(self, width: int) -> Selection:
        """What was selected since the last call of this method, all rows together, in `width` slots."""
        indices = [
            torch.nn.functional.pad(s.indices, (0, width - s.indices.shape[-1]), value=-1) for s in self.selections
        ]
        counts = torch.cat([s.counts for s in self.selections], 1)
        self.selections.clear()
        return Selection(torch.cat(indices, 1), counts)

    def in_budget(self, output: torch.Tensor, h: torch.Tensor, selection: Selection) -> bool:
        """The output is within the error budget of one prefill with this selection, by the reference."""
        reference = gsa_ref.GatedSparseAttention(self.layer.config).eval().to(h)
        reference.load_state_dict(self.layer.state_dict())
        reference._indexed_selection = lambda *_, **__: (selection, h.new_zeros(h.shape[:2]))
        with torch.no_grad():
            baseline = reference(h).hidden
            gold = reference.double()(h.double()).hidden
        return bool(error_budget(numpy(output), numpy(baseline), numpy(gold), h.dtype))


# --- decoding -----------------------------------------------------------------------------------------------------


@pytest.mark.property(53)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@examples(5)
@given(data=st.data())
def test_decoding_token_by_token_equals_prefill(dtype, data, device):
    """The same selections, bitwise, and outputs within the error budget of one prefill."""
    model = Recorded(data.draw(CONFIGS), data.draw(st.integers(0, 2**16)), device, dtype)
    B, L, prompt = data.draw(st.integers(1, 2)), 10, data.draw(st.integers(0, 8))
    h = model.hidden(B, L, data.draw(st.integers(0, 2**16)))
    prefill = model(h)
    width = min(model.layer.config.k_max, L)
    expected = model.selection(width)
    cache = GSACache.allocate(model.layer.config, B, L, dtype=dtype, device=device)
    outputs = [model(h[:, :prompt], cache=cache)]
    outputs += [model(h[:, t : t + 1], cache=cache) for t in range(prompt, L)]
    assert same(model.selection(width), expected)
    assert model.in_budget(prefill, h, expected)
    assert model.in_budget(torch.cat(outputs, 1), h, expected)


@pytest.mark.property(54)
@examples(4)
@given(CONFIGS, st.integers(0, 2**16), st.lists(st.integers(0, 5), min_size=1, max_size=4))
def test_prefill_in_chunks_equals_one_prefill(device, config, seed, chunks):
    """A chunk may be empty."""
    model = Recorded(config, seed, device)
    B, L = 2, 9
    h = model.hidden(B, L, seed)
    model(h)
    width = min(config.k_max, L)
    expected = model.selection(width)
    cache, outputs, done = GSACache.allocate(config, B, L + 3, device=device), [], 0
    for n in [*chunks, L]:
        outputs.append(model(h[:, done : done + n], cache=cache))
        done = min(done + n, L)
    assert same(model.selection(width), expected)
    assert model.in_budget(torch.cat(outputs, 1), h, expected)


@pytest.mark.pitfall("padding-in-the-cache")
@pytest.mark.property(54)
@examples(4)
@given(CONFIGS, st.integers(0, 2**16), st.data())
def test_right_padded_chunks_give_every_sequence_its_own_prefill(device, config, seed, data):
    """Each call brings another number of tokens per sequence; the rest is poison."""
    model = Recorded(config, seed, device)
    B, L = 2, 9
    h, done = model.hidden(B, L, seed), [0] * B
    cache = GSACache.allocate(config, B, L + 6, device=device)
    outputs: list[list[torch.Tensor]] = [[] for _ in range(B)]
    selections: list[list[Selection]] = [[] for _ in range(B)]
    for _ in range(3):
        lengths = [data.draw(st.integers(0, min(4, L - n))) for n in done]
        chunk = torch.full((B, 4, h.shape[-1]), torch.nan, device=device)
        for b, n in enumerate(lengths):
            chunk[b, :n] = h[b, done[b] : done[b] + n]
        output = model(chunk, cache=cache, lengths=int32(lengths, device))
        selection = model.selection(config.k_max)
        for b, n in enumerate(lengths):
            outputs[b].append(output[b, :n])
            selections[b].append(Selection(*(x[b : b + 1, :n] for x in selection)))
            assert not output[b, n:].any()
            done[b] += n
    for b in range(B):
        one = h[b : b + 1, : done[b]]
        model(one)
        expected = model.selection(config.k_max)
        assert same(tuple(torch.cat(parts, 1) for parts in zip(*selections[b], strict=True)), expected)
        assert model.in_budget(torch.cat(outputs[b])[None], one, expected)


@pytest.mark.pitfall("decode-sees-new-token-only")
def test_a_decoded_token_attends_to_the_prompt(device):
    """A cache without indexer keys would score the new token only; a peer's returns exactly 0 here."""
    model = Recorded(CONFIG, 0, device)
    h = model.hidden(1, 24, 0)
    outputs = []
    for prompt in (h[:, :-1], h[:, :0]):
        cache = GSACache.allocate(CONFIG, 1, 24, device=device)
        model(prompt, cache=cache)
        outputs.append(model(h[:, -1:], cache=cache))
        assert outputs[-1].any()
    last = model.selections[1]
    assert last.indices.min() < 23
    assert int(last.counts) >= 2
    assert not same(*outputs)


@pytest.mark.pitfall("length-zero")
@pytest.mark.parametrize(("B", "L"), [(0, 3), (2, 0)])
def test_empty_batches_and_empty_chunks_go_through_a_cache(B, L, device):
    model = Recorded(CONFIG, 0, device)
    cache = GSACache.allocate(CONFIG, B, 4, device=device)
    assert model(model.hidden(B, L, 0), cache=cache).shape == (B, L, CONFIG.d)


def filled(config: GSAConfig, B: int, capacity: int, device: str, **options: Any) -> GSACache:
    """A cache of 5 random tokens per sequence."""
    cache, g = GSACache.allocate(config, B, capacity, device=device, **options), torch.Generator().manual_seed(0)
    rows = [
        None if x is None else torch.randn(x[:, :5].shape, generator=g).to(x) for x in (cache.k, cache.v, cache.k_idx)
    ]
    cache.append(*rows, int32([5] * B, device))
    return cache


def contents(cache: GSACache) -> tuple[torch.Tensor, ...]:
    return tuple(x.clone() for x in (cache.k, cache.v, cache.k_idx, cache.lengths) if x is not None)


REFUSED: dict[str, tuple[Callable[[str], GSACache], type[Exception], str]] = {
    "full": (lambda device: filled(CONFIG, 2, 5, device), ValueError, "expected room for .*, got 5 of 5 slots in use"),
    "batch size": (lambda device: filled(CONFIG, 3, 40, device), ValueError, "expected batch size 2 as h, got 3"),
    "heads": (
        lambda device: filled(dataclasses.replace(CONFIG, H_kv=1), 2, 40, device),
        ValueError,
        r"expected keys \[2, 40, 2, 8\].*, got \[2, 40, 1, 8\] with k_idx",
    ),
    "indexer width": (
        lambda device: filled(dataclasses.replace(CONFIG, d_I=8), 2, 40, device),
        ValueError,
        "expected indexer keys of width d_I = 16, got 8",
    ),
    "no indexer": (
        lambda device: filled(CONFIG.variant("dense"), 2, 40, device),
        ValueError,
        "expected .* sparse=True, got .* without k_idx",
    ),
    "dtype": (
        lambda device: filled(CONFIG, 2, 40, device, dtype=torch.float16),
        TypeError,
        "expected dtype torch.float32, got torch.float16",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
@pytest.mark.parametrize("n_new", [1, 9])  # the decode kernels' step, and the general kernels'
def test_a_refused_cache_is_named_and_left_as_it_was_bitwise(name, n_new, device):
    make, error, message = REFUSED[name]
    model, cache = Recorded(CONFIG, 0, device), make(device)
    before = contents(cache)
    with pytest.raises(error, match=f"^cache: {message}$"):
        model(model.hidden(2, n_new, 0), cache=cache)
    assert same(contents(cache), before)
    assert cache.longest == 5


@pytest.mark.parametrize("n_new", [1, 8, 9])  # the decode kernels take 8, the general ones more
def test_one_batch_holds_sequences_from_empty_to_full(n_new, device):
    model, held = Recorded(CONFIG, 0, device), [0, 1, 5, 12]
    h = model.hidden(4, 12 + n_new, 0)
    cache = GSACache.allocate(CONFIG, 4, 12 + n_new, device=device)
    outputs, selections = [model(h[:, :12], cache=cache, lengths=int32(held, device))], [model.selection(CONFIG.k_max)]
    outputs.append(model(torch.stack([h[b, n : n + n_new] for b, n in enumerate(held)]), cache=cache))
    selections.append(model.selection(CONFIG.k_max))
    assert cache.lengths.tolist() == [n + n_new for n in held]
    for b, n in enumerate(held):
        one = h[b : b + 1, : n + n_new]
        model(one)
        expected = model.selection(CONFIG.k_max)
        assert same(
            [torch.cat([x[b : b + 1, :n], y[b : b + 1]], 1) for x, y in zip(*selections, strict=True)], expected
        )
        assert model.in_budget(torch.cat([outputs[0][b : b + 1, :n], outputs[1][b : b + 1]], 1), one, expected)
        assert not cache.k[b, n + n_new :].any()
    before = contents(cache)
    with pytest.raises(ValueError, match=f"got {12 + n_new} of {12 + n_new} slots in use"):
        model(h[:, :1], cache=cache)
    assert same(contents(cache), before)


@pytest.mark.parametrize("n_tokens", [12, pytest.param(10_000, marks=(pytest.mark.gpu, NEEDS_CUDA))])
def test_after_many_decoded_tokens_the_cache_equals_that_of_a_prefill(n_tokens, device):
    """All projections into the cache are exact here: what is left is the rounding of cos, sin and the sigmoid."""
    model, g = Recorded(CONFIG, 0, device), torch.Generator().manual_seed(1)
    for projection in (model.layer.W_k, model.layer.W_v, model.layer.W_vg):
        projection.weight.data.copy_(torch.randint(-2, 3, projection.weight.shape, generator=g) / 4)
    h = model.hidden(2, n_tokens + 1, 0)
    decoded, prefilled = (GSACache.allocate(CONFIG, 2, n_tokens + 5, device=device) for _ in range(2))
    for t in range(n_tokens):
        model(h[:, t : t + 1], cache=decoded)
    model(h[:, :-1], cache=prefilled)
    assert decoded.lengths.tolist() == prefilled.lengths.tolist() == [n_tokens] * 2
    assert decoded.longest == n_tokens
    assert same(decoded.k_idx, prefilled.k_idx)
    for cached, expected in ((decoded.k, prefilled.k), (decoded.v, prefilled.v)):
        assert float((cached - expected).abs().max()) <= 16 * 2.0**-24 * float(expected.abs().max())
        assert cached[:, :n_tokens].any(-1).all()
        assert not cached[:, n_tokens:].any()
    model.selections.clear()
    for cache in (decoded, prefilled):
        model(h[:, -1:], cache=cache)
    assert same(*model.selections)


# --- CUDA graphs --------------------------------------------------------------------------------------------------


@torch.no_grad()
def replay_steps(layer: nn.Module, cache: GSACache, steps: torch.Tensor) -> list[torch.Tensor]:
    """The outputs [B, 1, d] of one-token steps [T, B, 1, d], by a CUDA graph that is captured once."""
    h, lengths = steps[0].clone(), cache.lengths.clone()  # the graph reads h where it lies now
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        layer(h, cache=cache)  # compiles the kernels, which a capture cannot
    torch.cuda.current_stream().wait_stream(stream)
    cache.truncate(lengths)  # forget the token of that step; one that is only captured never arrives
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        u = layer(h, cache=cache).hidden
    outputs = []
    for step in steps:
        h.copy_(step)
        cache.advance(1)
        graph.replay()
        outputs.append(u.clone())
    return outputs


@pytest.mark.gpu
@NEEDS_CUDA
@torch.no_grad()
@pytest.mark.parametrize("variant", ["sparse", "gsa"])
def test_a_captured_decode_step_replays_as_eager_steps_bitwise(variant):
    """Up to a full cache; afterwards the cache serves every other operation as if nothing had been captured."""
    config, lengths = CONFIG.variant(variant), int32([100, 63], "cuda")
    layer, h = build(config, "cuda"), hidden(2, 130, "cuda")
    steps = h[:, 100:120, None].transpose(0, 1).contiguous()  # [T, B, 1, d]
    caches = [GSACache.allocate(config, 2, 120, device="cuda") for _ in range(2)]
    for cache in caches:
        layer(h[:, :100], cache=cache, lengths=lengths)
    outputs = replay_steps(layer, caches[0], steps)
    assert same(outputs, [layer(step, cache=caches[1]).hidden for step in steps])
    assert len({float(u.sum()) for u in outputs}) > 10
    assert same(contents(caches[0]), contents(caches[1]))
    with pytest.raises(ValueError, match="cache: expected room for 1 more tokens, got 120 of 120 slots in use"):
        caches[0].advance(1)
    for cache in caches:
        cache.truncate(105)
    assert same(contents(caches[0]), contents(caches[1]))
    assert same(*(layer(h[:, 120:130], cache=cache).hidden for cache in caches))


@pytest.mark.gpu
@NEEDS_CUDA
@torch.no_grad()
def test_a_step_that_reads_a_part_of_the_cache_is_not_captured():
    layer, h = build(CONFIG.variant("dense"), "cuda"), hidden(2, 1, "cuda")
    cache = GSACache.allocate(layer.config, 2, 20, device="cuda")
    layer(h, cache=cache)
    with pytest.raises(RuntimeError, match=r"^cache: a captured CUDA graph"), torch.cuda.graph(torch.cuda.CUDAGraph()):
        layer(h, cache=cache)
    assert cache.lengths.tolist() == [1, 1]


@pytest.mark.parametrize(
    ("variant", "impl", "n_new", "captured"),
    [
        ("gsa", "triton", 1, True),
        ("sparse", "triton", 8, True),
        ("gsa", "triton", 9, False),
        ("gsa", "reference", 1, False),
        ("dense", "triton", 1, False),
        ("gated", "triton", 1, False),
    ],
)
def test_only_steps_of_the_decode_kernels_are_captured(variant, impl, n_new, captured, device, monkeypatch):
    layer = build(CONFIG.variant(variant), device, impl=impl)
    cache = GSACache.allocate(layer.config, 1, 9, device=device)
    monkeypatch.setattr(gsa_ref.layer, "_is_capturing", lambda x: True)
    with torch.no_grad(), nullcontext() if captured else pytest.raises(RuntimeError, match=r"^cache: a captured CUDA"):
        layer(hidden(1, n_new, device), cache=cache)


def test_a_decode_step_does_not_read_the_bound_of_the_host(device):
    """What a replay relies on: it runs with the bound of the time of its capture."""
    model = Recorded(CONFIG, 0, device)
    h, results = model.hidden(2, 20, 0), []
    for stale in (False, True):
        cache = GSACache.allocate(CONFIG, 2, 24, device=device)
        model(h[:, :18], cache=cache)
        cache.longest = 3 if stale else cache.longest
        outputs = [model(h[:, t : t + 1], cache=cache) for t in (18, 19)]
        results.append((*outputs, *contents(cache)))
    assert same(*results)


# --- torch.compile ------------------------------------------------------------------------------------------------


@pytest.mark.property(55)
@pytest.mark.parametrize("variant", ["dense", "sparse", "gated", "gsa"])
@pytest.mark.parametrize("padded", [False, True])
def test_the_compiled_layer_equals_the_eager_one_bitwise(variant, padded, device):
    """One graph, without a break."""
    torch.manual_seed(0)
    layer = gsa_fast.GatedSparseAttention(CONFIG.variant(variant), impl="triton").to(device).eval()
    h = torch.randn(2, 8, CONFIG.d, generator=torch.Generator().manual_seed(0)).to(device)
    lengths = int32([8, 3], device) if padded else None
    torch._dynamo.reset()
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        assert same(compiled(h, lengths=lengths).hidden, layer(h, lengths=lengths).hidden)


@pytest.mark.parametrize("dynamic", [None, True])
def test_a_compiled_layer_takes_any_length_without_another_graph(dynamic, device):
    """Shapes never depend on data: once the length has changed, and the graph is dynamic, it serves every length."""
    torch.manual_seed(0)
    layer = gsa_fast.GatedSparseAttention(CONFIG, impl="triton").to(device).eval()
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(layer, fullgraph=True, backend=counter, dynamic=dynamic)
    graphs = []
    with torch.no_grad():
        for L in (6, 7, 9):
            h = torch.randn(3, L, CONFIG.d, generator=torch.Generator().manual_seed(L)).to(device)
            assert same(compiled(h).hidden, layer(h).hidden)
            graphs.append(counter.frame_count)
    assert len(set(graphs[1:])) == 1


# --- torch.library.opcheck ----------------------------------------------------------------------------------------


def op_arguments(name: str, device: str, B: int, L: int, gate: bool) -> tuple[Any, ...]:
    g = torch.Generator().manual_seed(0)
    S = L + 2

    def tensor(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=g).to(device)

    start, lengths = int32([2] * B, device), int32([S] * B, device)
    indexer = tensor(B, L, 2, 4), tensor(B, S, 4), tensor(B, L, 2), tensor(2)
    counts = torch.full((B, L), 2, dtype=torch.int32, device=device)
    indices = torch.tensor([0, 2], dtype=torch.int32, device=device).expand(B, L, 2).contiguous()
    return {
        "indexer_scores": (*indexer, start, lengths, 0.5),
        "score_variance": (tensor(B, L, S),),
        "token_budget": (tensor(B, L).abs(), torch.tensor(0.5, device=device), counts, 3, 1, 4, "inverse"),
        "select_tokens": (tensor(B, L, S), counts, 3),
        "indexed_selection": (
            *indexer, torch.tensor(0.01, device=device), start, lengths, 0.5, 3, 1, 4, "proportional", S + L, False, 4
        ),
        "sparse_attention": (
            tensor(B, L, 4, 8),
            tensor(B, S, 2, 8),
            tensor(B, S, 2, 8),
            indices,
            counts,
            start,
            tensor(B, L, 4, 8) if gate else None,
            0.35,
            True,
        ),
        "sparse_attention_backward": (
            tensor(B, L, 4, 8),
            tensor(B, L, 4) if gate else None,
            tensor(B, L, 4, 8),
            tensor(B, S, 2, 8),
            tensor(B, S, 2, 8),
            indices,
            counts,
            start,
            tensor(B, L, 4, 8) if gate else None,
            tensor(B, L, 4, 8),
            tensor(B, L, 4),
            0.35,
            gate,
        ),
        "apply_gate": (tensor(B, L, 3), tensor(B, L, 3)),
        "apply_gate_backward": (tensor(B, L, 3), tensor(B, L, 3), tensor(B, L, 3)),
        "decode_attention": (
            tensor(B, L, 4, 8), tensor(B, S, 2, 8), tensor(B, S, 2, 8), *indexer, torch.tensor(0.01, device=device),
            start, lengths, tensor(B, L, 4, 8) if gate else None, 0.35, 0.5, 3, 1, 4, "proportional", False, 4
        ),
        "indexer_kl_loss": (
            *(x.clone().requires_grad_() for x in indexer), tensor(B, L, 4, 8), tensor(B, S, 2, 8),
            *((indices, counts, tensor(B, L, 4)) if gate else (None, None, None)),
            start, lengths, 0.5, 0.35, 0.1, True
        ),
    }[name]  # fmt: skip


OPS = (
    "indexer_scores",
    "score_variance",
    "token_budget",
    "select_tokens",
    "indexed_selection",
    "sparse_attention",
    "sparse_attention_backward",
    "apply_gate",
    "apply_gate_backward",
    "decode_attention",
    "indexer_kl_loss",
)
OP_CALLS = [(name, False) for name in OPS] + [
    (name, True) for name in ("sparse_attention", "sparse_attention_backward", "decode_attention", "indexer_kl_loss")
]


@pytest.mark.parametrize(("name", "gate"), OP_CALLS)
@pytest.mark.parametrize(("B", "L"), [(2, 3), (0, 3), (2, 0)])
def test_custom_ops_pass_opcheck(name, gate, B, L, device):
    """Schema, fake kernel, autograd registration, and tracing with dynamic shapes."""
    op = getattr(torch.ops.gsa_fast, name).default
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        torch.library.opcheck(op, op_arguments(name, device, B, L, gate))


@pytest.mark.parametrize(("name", "gate"), OP_CALLS)
def test_fake_kernels_give_the_shapes_dtypes_and_strides_of_the_real_ones(name, gate, device):
    """For inputs with strides of their own, too."""
    arguments = tuple(
        x.detach().transpose(0, 1).contiguous().transpose(0, 1) if torch.is_tensor(x) and x.dim() > 1 else x
        for x in op_arguments(name, device, 2, 3, gate)
    )
    op = getattr(torch.ops.gsa_fast, name).default
    real = op(*arguments)
    with torch._subclasses.FakeTensorMode() as mode:
        fake = op(*(mode.from_tensor(x) if torch.is_tensor(x) else x for x in arguments))
    real, fake = ((x,) if torch.is_tensor(x) else tuple(x) for x in (real, fake))
    described = [[(x.shape, x.dtype, x.stride(), x.device.type) for x in result] for result in (real, fake)]
    assert described[0] == described[1]


def test_every_custom_op_is_checked():
    registered = {
        name.split("::")[1] for name in torch._C._dispatch_get_all_op_names() if name.startswith("gsa_fast::")
    }
    assert registered == set(OPS)
