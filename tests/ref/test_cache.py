"""Decoding cache: a cached pass gives what one pass over everything gives."""

import dataclasses
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import gsa_ref.layer
from gsa_ref import GatedSparseAttention, GSACache, GSAConfig
from tests.ref.models import SMALL, VARIANTS, build, close_layers, hidden, models


def new_cache(config: GSAConfig, batch_size: int, capacity: int, **options: Any) -> GSACache:
    return GSACache.allocate(config, batch_size, capacity, **{"dtype": torch.float64, **options})


def contents(cache: GSACache) -> list[torch.Tensor]:
    return [x.clone() for x in (cache.k, cache.v, cache.k_idx, cache.lengths) if x is not None]


def unchanged(cache: GSACache, before: list[torch.Tensor]) -> bool:
    return all(torch.equal(x, y) for x, y in zip(contents(cache), before, strict=True))


@pytest.mark.property(53)
@settings(max_examples=20)
@given(models(), st.integers(0, 12))
def test_decoding_token_by_token_equals_prefill(model, prompt):
    """Row by row."""
    layer, h = model.build(), model.inputs()["h"]
    expected = layer(h).hidden
    prompt = min(prompt, h.shape[1])
    cache = new_cache(model.config, len(h), h.shape[1])
    outputs = [layer(h[:, :prompt], cache=cache).hidden]
    outputs += [layer(h[:, t : t + 1], cache=cache).hidden for t in range(prompt, h.shape[1])]
    assert close_layers(torch.cat(outputs, 1), expected)
    assert cache.lengths.tolist() == [h.shape[1]] * len(h)


@pytest.mark.property(54)
@given(models(), st.lists(st.integers(0, 8), min_size=1, max_size=5))
def test_prefill_in_chunks_equals_one_prefill(model, chunks):
    """A chunk may be empty."""
    layer, h = model.build(), model.inputs()["h"]
    cache, outputs, done = new_cache(model.config, len(h), h.shape[1] + 3), [], 0
    for n in [*chunks, h.shape[1]]:
        output = layer(h[:, done : done + n], cache=cache)
        assert output.cache is cache
        outputs.append(output.hidden)
        done = min(done + n, h.shape[1])
    assert close_layers(torch.cat(outputs, 1), layer(h).hidden)


@pytest.mark.pitfall("padding-in-the-cache")
@pytest.mark.property(54)
@given(models(), st.data())
def test_right_padded_chunks_give_every_sequence_its_own_prefill(model, data):
    """Each call brings another number of tokens per sequence, the rest is poison; V̄, RoPE and masks follow."""
    layer, h = model.build(), model.inputs()["h"]
    B, L, d = h.shape
    cache, done = new_cache(model.config, B, L + 6), [0] * B
    outputs: list[list[torch.Tensor]] = [[] for _ in range(B)]
    for _ in range(3):
        lengths = [data.draw(st.integers(0, min(5, L - n))) for n in done]
        width = data.draw(st.integers(max(lengths), 6))
        chunk = torch.full((B, width, d), torch.nan, dtype=h.dtype)
        for b, n in enumerate(lengths):
            chunk[b, :n] = h[b, done[b] : done[b] + n]
        output = layer(chunk, cache=cache, lengths=torch.tensor(lengths, dtype=torch.int32)).hidden
        for b, n in enumerate(lengths):
            outputs[b].append(output[b, :n])
            assert not output[b, n:].any()
            done[b] += n
    assert cache.lengths.tolist() == done
    for b in range(B):
        expected = layer(h[b : b + 1, : done[b]]).hidden[0]
        assert close_layers(torch.cat(outputs[b]), expected)
        for buffer in (cache.k, cache.v, cache.k_idx):
            assert buffer is None or not buffer[b, done[b] :].any()


@pytest.mark.pitfall("decode-sees-new-token-only")
@pytest.mark.parametrize("variant", VARIANTS)
def test_a_decoded_token_attends_to_the_prompt(variant):
    """A cache without indexer keys would score the new token only; a peer's returns exactly 0 here."""
    layer, h = build(SMALL.variant(variant)), hidden(1, 60, SMALL.d)
    expected = layer(h).hidden[:, -1:]
    cache = new_cache(layer.config, 1, 60)
    layer(h[:, :-1], cache=cache)
    output = layer(h[:, -1:], cache=cache).hidden
    alone = layer(h[:, -1:], cache=new_cache(layer.config, 1, 60)).hidden
    assert output.any()
    assert close_layers(output, expected)
    assert not close_layers(output, alone)


@pytest.mark.parametrize("variant", VARIANTS)
def test_decoding_continues_into_a_second_chunk_of_other_values(variant):
    """What the cache holds is what counts: other prompts give other continuations."""
    layer, h = build(SMALL.variant(variant)), hidden(2, 41, SMALL.d)
    outputs = []
    for prompt in h[:, :40]:
        cache = new_cache(layer.config, 1, 41)
        layer(prompt[None], cache=cache)
        outputs.append(layer(h[:1, 40:], cache=cache).hidden)
    assert not close_layers(outputs[0], outputs[1])


def test_a_new_cache_is_empty_and_preallocated():
    cache = GSACache.allocate(SMALL, 3, 7, dtype=torch.bfloat16)
    assert (cache.k.shape, cache.v.shape, cache.k_idx.shape) == ((3, 7, 2, 8), (3, 7, 2, 8), (3, 7, 8))
    assert (cache.capacity, cache.longest, cache.lengths.tolist()) == (7, 0, [0, 0, 0])
    assert cache.k.dtype == cache.v.dtype == cache.k_idx.dtype == torch.bfloat16
    assert cache.lengths.dtype == torch.int32
    assert GSACache.allocate(SMALL.variant("dense"), 3, 7).k_idx is None


def test_the_cache_is_written_in_place_and_holds_no_graph():
    layer, cache = build(SMALL), new_cache(SMALL, 1, 8)
    addresses = [x.data_ptr() for x in (cache.k, cache.v, cache.k_idx)]
    layer(hidden(1, 5, SMALL.d), cache=cache)
    assert [x.data_ptr() for x in (cache.k, cache.v, cache.k_idx)] == addresses
    assert not any(x.requires_grad for x in (cache.k, cache.v, cache.k_idx))
    assert cache.k[:, :5].any(-1).all()
    assert not cache.k[:, 5:].any()


def test_append_writes_behind_each_end_and_keeps_padding_out():
    """Whatever a padding row holds: the slot stays 0 until its token comes."""
    cache = new_cache(SMALL, 2, 6)
    rows = 1 + torch.rand(2, 3, 2, 8, dtype=torch.float64), 1 + torch.rand(2, 3, 8, dtype=torch.float64)
    k, k_idx = (x.index_fill(1, torch.tensor([2]), torch.nan) for x in rows)
    for n_new in ([2, 1], [0, 2]):
        k[0, 1:] = k[0, 1:] if n_new[0] == 2 else torch.nan
        cache.append(k, 2 * k, k_idx, torch.tensor(n_new, dtype=torch.int32))
    assert cache.lengths.tolist() == [2, 3]
    expected = torch.zeros_like(cache.k)
    expected[0, :2], expected[1, :3] = rows[0][0, :2], rows[0][1, [0, 0, 1]]
    assert torch.equal(cache.k, expected)
    assert torch.equal(cache.v, 2 * expected)
    assert torch.equal(cache.k_idx[1, :3], rows[1][1, [0, 0, 1]])
    assert not cache.k_idx[1, 3:].any()


@pytest.mark.parametrize("variant", ["gated", "gsa"])
def test_writing_and_forgetting_never_ask_the_device(variant):
    """On the meta device, which has no values: room is known from the bound alone until that is used up."""
    config = SMALL.variant(variant)
    cache = GSACache.allocate(config, 2, 6, device="meta")
    new = {"device": "meta"}
    k_idx = torch.zeros(2, 3, config.d_I, **new) if config.sparse else None
    for _ in range(2):  # the second fills the cache to its last slot
        k = torch.zeros(2, 3, config.H_kv, config.d_h, **new)
        cache.check(config, 2, 3, k)
        cache.append(k, k, k_idx, torch.ones(2, dtype=torch.int32, **new))
    assert cache.longest == 6
    cache.truncate(4)
    assert cache.longest == 4


def test_an_empty_batch_can_be_truncated():
    cache = new_cache(SMALL, 0, 6)
    cache.truncate(torch.zeros(0, dtype=torch.int32))
    assert cache.longest == 0


def test_growing_to_the_present_capacity_copies_nothing_and_past_int32_is_refused():
    cache = new_cache(SMALL, 0, 6)
    buffer = cache.k
    cache.grow(6)
    assert cache.k is buffer
    with pytest.raises(ValueError, match="capacity: expected an int ≤ 2147483647, got 2147483648"):
        cache.grow(2**31)


def test_a_cache_of_another_indexer_width_is_refused_with_both_widths():
    with pytest.raises(ValueError, match=f"width d_I = {SMALL.d_I}, got {SMALL.d_I + 1}$"):
        new_cache(dataclasses.replace(SMALL, d_I=SMALL.d_I + 1), 2, 6).check(SMALL, 2, 1, hidden(2, 1, 4))


@pytest.mark.pitfall("length-zero")
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize(("B", "L"), [(0, 3), (2, 0)])
def test_empty_batches_and_empty_chunks_go_through_a_cache(variant, B, L):
    layer = build(SMALL.variant(variant))
    cache = new_cache(layer.config, B, 4)
    assert layer(hidden(B, L, SMALL.d), cache=cache).hidden.shape == (B, L, SMALL.d)
    assert cache.lengths.tolist() == [0] * B


def test_padding_takes_no_room():
    """The host's bound counts padded rows; before refusing, the cache asks for the real lengths."""
    layer, cache = build(SMALL), new_cache(SMALL, 2, 8)
    one = torch.tensor([1, 0], dtype=torch.int32)
    for t in range(5):
        layer(hidden(2, 3, SMALL.d, seed=t), cache=cache, lengths=one)
    assert cache.lengths.tolist() == [5, 0]


@pytest.mark.parametrize("variant", VARIANTS)
def test_autocast_wants_a_cache_of_its_own_dtype(variant):
    layer, h = build(SMALL.variant(variant)).float(), hidden(2, 20, SMALL.d).float()
    cache = new_cache(layer.config, 2, 20, dtype=torch.bfloat16)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        outputs = [layer(part, cache=cache).hidden for part in (h[:, :12], h[:, 12:19], h[:, 19:])]
    assert all(output.dtype == torch.bfloat16 and output.isfinite().all() for output in outputs)
    assert cache.lengths.tolist() == [20, 20]
    wide = new_cache(layer.config, 2, 20, dtype=torch.float32)
    before = contents(wide)
    with torch.autocast("cpu", dtype=torch.bfloat16), pytest.raises(TypeError, match="cache: expected dtype"):
        layer(h, cache=wide)
    assert unchanged(wide, before)


# --- rollback, beams, growth --------------------------------------------------------------------------------------

TINY = GSAConfig(d=4, H=1, H_kv=1, d_h=2, H_I=1, d_I=2, k_base=2, k_min=1, k_max=4)


def rows(tokens: list[list[float]], width: int, config: GSAConfig) -> list[torch.Tensor | None]:
    """k, v and k_idx of distinct values per token, NaN in the padding."""
    t = torch.tensor([[*row, *[torch.nan] * (width - len(row))] for row in tokens], dtype=torch.float64)
    t = t.reshape(len(tokens), width)
    k = t[..., None, None].expand(-1, -1, config.H_kv, config.d_h)
    k_idx = -t[..., None].expand(-1, -1, config.d_I) if config.sparse else None
    return [k, k + 0.5, k_idx]


def holds(cache: GSACache, expected: list[list[float]], config: GSAConfig) -> bool:
    """Whether the cache is exactly these tokens, with 0 in every free slot."""
    padded = [row + [0.0] * (cache.capacity - len(row)) for row in expected]
    k, v, k_idx = rows(padded, cache.capacity, config)
    free = torch.arange(cache.capacity) >= cache.lengths[:, None]
    v = v.masked_fill(free[..., None, None], 0)
    return (
        cache.lengths.tolist() == [len(row) for row in expected]
        and cache.longest >= max(map(len, expected), default=0)
        and torch.equal(cache.k, k)
        and torch.equal(cache.v, v)
        and (torch.equal(cache.k_idx, k_idx) if config.sparse else cache.k_idx is None)
    )


def draw_append(
    data: st.DataObject, cache: GSACache, model: list[list[float]], config: GSAConfig, first: int, *, replayed: bool
) -> None:
    """Append a ragged batch, or see it refused where its width does not fit behind the longest sequence.

    A replayed one comes after `advance`, and appends without moving the bound.
    """
    width = data.draw(st.integers(0, 4))
    n_new = [data.draw(st.integers(0, width)) for _ in model]
    tokens = [[float(first + 10 * b + i) for i in range(n)] for b, n in enumerate(n_new)]
    before, like = contents(cache), torch.zeros(0, dtype=torch.float64)
    if max(map(len, model), default=0) + width > cache.capacity:
        with pytest.raises(ValueError, match="cache: expected room"):
            cache.advance(width) if replayed else cache.check(config, len(model), width, like)
        assert unchanged(cache, before)
        return
    if replayed:
        cache.advance(width)
    elif model:
        cache.check(config, len(model), width, like)
    bound = cache.longest
    cache.append(*rows(tokens, width, config), torch.tensor(n_new, dtype=torch.int32))
    if replayed:
        cache.longest = bound
    for row, added in zip(model, tokens, strict=True):
        row += added


@given(st.integers(1, 3), st.integers(4, 12), st.booleans(), st.data())
def test_any_series_of_operations_does_what_it_does_to_lists(B, capacity, sparse, data):
    """The model of the cache is a Python list of tokens per sequence."""
    config = TINY.variant("sparse" if sparse else "dense")
    cache, model = new_cache(config, B, capacity), [[] for _ in range(B)]
    for step in range(data.draw(st.integers(4, 12))):
        address = cache.lengths.data_ptr()
        operation = data.draw(st.sampled_from(("append", "replay", "cut", "cut each", "reorder", "expand", "grow")))
        if operation in ("append", "replay"):
            draw_append(data, cache, model, config, 1 + 100 * step, replayed=operation == "replay")
        elif operation == "cut":
            n = data.draw(st.integers(0, cache.longest))
            cache.truncate(n)
            model = [row[:n] for row in model]
            assert cache.longest == n
        elif operation == "cut each":
            kept = [data.draw(st.integers(0, len(row))) for row in model]
            cache.truncate(torch.tensor(kept, dtype=torch.int32))
            model = [row[:n] for row, n in zip(model, kept, strict=True)]
            assert cache.longest == max(kept, default=0)
        elif operation == "grow":
            more = cache.capacity + data.draw(st.integers(0, 3))
            cache.grow(more)
            assert cache.capacity == more
        else:
            size = len(model) if operation == "reorder" else data.draw(st.integers(0, 4))
            index = [data.draw(st.integers(0, len(model) - 1)) for _ in range(size if model else 0)]
            dtype = data.draw(st.sampled_from((torch.int32, torch.int64)))
            cache.reorder(torch.tensor(index, dtype=dtype))
            model = [list(model[b]) for b in index]
        assert holds(cache, model, config)
        assert (cache.lengths.data_ptr() == address) or operation == "expand"
        assert cache.lengths.dtype == torch.int32


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("each", [False, True])
def test_decoding_after_a_rollback_equals_decoding_without_the_tokens_rolled_back(variant, each):
    """The tokens rolled back are NaN: whatever a draft wrote, nothing of it is left."""
    layer, h = build(SMALL.variant(variant)), hidden(2, 40, SMALL.d)
    prompts = torch.tensor([30, 30], dtype=torch.int32) if not each else torch.tensor([30, 21], dtype=torch.int32)
    caches = [new_cache(layer.config, 2, 48) for _ in range(2)]
    for cache in caches:
        layer(h[:, :30], cache=cache, lengths=prompts)
    layer(torch.full_like(h[:, :6], torch.nan), cache=caches[0])
    assert caches[0].v.isnan().any()
    caches[0].truncate(prompts if each else 30)
    assert unchanged(caches[0], contents(caches[1]))
    for t in range(30, 40):
        output, expected = (layer(h[:, t : t + 1], cache=cache).hidden for cache in caches)
        assert expected.isfinite().all()
        assert close_layers(output, expected)


@pytest.mark.parametrize("variant", VARIANTS)
def test_reordering_the_cache_equals_permuting_the_batch(variant):
    layer, h = build(SMALL.variant(variant)), hidden(3, 40, SMALL.d)
    lengths, index = torch.tensor([30, 12, 25], dtype=torch.int32), torch.tensor([2, 0, 0])
    cache, permuted = new_cache(layer.config, 3, 40), new_cache(layer.config, 3, 40)
    layer(h[:, :30], cache=cache, lengths=lengths)
    layer(h[index, :30], cache=permuted, lengths=lengths[index])
    addresses = [x.data_ptr() for x in (cache.k, cache.v, cache.lengths)]
    cache.reorder(index)
    assert [x.data_ptr() for x in (cache.k, cache.v, cache.lengths)] == addresses
    output = layer(h[:, 30:], cache=cache).hidden
    assert close_layers(output, layer(h[:, 30:], cache=permuted).hidden)
    assert not close_layers(output[2:], output[1:2])  # two beams of one prompt go apart


@pytest.mark.parametrize("variant", VARIANTS)
def test_one_prompt_becomes_several_beams(variant):
    layer, h = build(SMALL.variant(variant)), hidden(3, 20, SMALL.d)
    cache = new_cache(layer.config, 1, 20)
    layer(h[:1, :15], cache=cache)
    cache.reorder(torch.zeros(3, dtype=torch.int32))
    whole = torch.cat((h[:1, :15].expand(3, -1, -1), h[:, 15:]), 1)
    assert close_layers(layer(h[:, 15:], cache=cache).hidden, layer(whole).hidden[:, 15:])


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_full_cache_goes_on_after_growing(variant):
    layer, h = build(SMALL.variant(variant)), hidden(2, 30, SMALL.d)
    cache = new_cache(layer.config, 2, 20)
    layer(h[:, :20], cache=cache)
    with pytest.raises(ValueError, match="cache: expected room for 10 more tokens, got 20 of 20 slots in use"):
        layer(h[:, 20:], cache=cache)
    cache.grow(30)
    assert close_layers(layer(h[:, 20:], cache=cache).hidden, layer(h).hidden[:, 20:])


@pytest.mark.pitfall("padding-in-the-cache")
@pytest.mark.parametrize("variant", ["sparse", "gsa"])
def test_selection_never_looks_past_a_length(variant):
    """Even a NaN that somebody else wrote into the free slots; dense attention relies on their being 0."""
    layer, h = build(SMALL.variant(variant)), hidden(2, 40, SMALL.d)
    lengths = torch.tensor([30, 12], dtype=torch.int32)
    caches = [new_cache(layer.config, 2, 40) for _ in range(2)]
    for cache in caches:
        layer(h[:, :30], cache=cache, lengths=lengths)
    free = torch.arange(40) >= lengths[:, None]
    for buffer in (caches[0].k, caches[0].v, caches[0].k_idx):
        buffer[free] = torch.nan
    n_new = torch.tensor([3, 1], dtype=torch.int32)
    output, expected = (layer(h[:, 30:34], cache=cache, lengths=n_new).hidden for cache in caches)
    assert torch.equal(output, expected)
    assert not caches[0].k[0, 33].any()  # the padding row of the batch, written as 0


def test_lengths_are_updated_in_place_and_the_position_of_a_step_is_its_own():
    """A captured CUDA graph replays on the same tensor; the layer must not see it move while it works."""
    layer, cache, h = build(SMALL), new_cache(SMALL, 2, 20), hidden(2, 20, SMALL.d)
    lengths = cache.lengths
    layer(h[:, :15], cache=cache)
    output = layer(h[:, 15:], cache=cache).hidden
    assert cache.lengths is lengths
    assert lengths.tolist() == [20, 20]
    assert close_layers(output, layer(h).hidden[:, 15:])


@torch.no_grad()
def replay(layer: GatedSparseAttention, cache: GSACache, h: torch.Tensor) -> None:
    """What a replayed CUDA graph does to a cache: the tokens arrive, and the host's bound stays where it was."""
    bound = cache.longest
    layer(h, cache=cache)
    cache.longest = bound


AFTER_REPLAYS: dict[str, Callable[[GSACache], Any]] = {
    "truncate": lambda cache: cache.truncate(13),
    "truncate each": lambda cache: cache.truncate(torch.tensor([14, 9], dtype=torch.int32)),
    "reorder": lambda cache: cache.reorder(torch.tensor([1, 0])),
    "a chunk": lambda cache: LAYER(hidden(2, 3, SMALL.d, seed=1), cache=cache).hidden,
}


@pytest.mark.parametrize("operation", AFTER_REPLAYS)
@pytest.mark.parametrize("at_once", [False, True])
def test_after_replays_that_were_counted_every_operation_sees_their_tokens(operation, at_once):
    h, caches, results = hidden(2, 16, SMALL.d), [new_cache(SMALL, 2, 20) for _ in range(2)], []
    for cache in caches:
        LAYER(h[:, :12], cache=cache, lengths=torch.tensor([12, 7], dtype=torch.int32))
    if at_once:
        caches[1].advance(4)
    for t in range(12, 16):
        LAYER(h[:, t : t + 1], cache=caches[0])
        if not at_once:
            caches[1].advance(1)
        replay(LAYER, caches[1], h[:, t : t + 1])
    for cache in caches:
        results.append(AFTER_REPLAYS[operation](cache))
    assert unchanged(caches[1], contents(caches[0]))
    assert caches[1].longest == caches[0].longest
    assert results[0] is None or torch.equal(*results)


def test_replays_beyond_the_capacity_are_refused_before_they_run():
    """A bound that is too high is no reason to refuse: the device knows better."""
    cache = filled()
    cache.advance(3)  # counted, but never replayed
    cache.advance(3)
    assert cache.longest == 8
    for _ in range(3):
        replay(LAYER, cache, hidden(2, 1, SMALL.d))
    with pytest.raises(ValueError, match="cache: expected room for 1 more tokens, got 8 of 8 slots in use"):
        cache.advance(1)


def test_a_refused_advance_leaves_the_bound_of_replays_under_way():
    """The device does not know of them yet: a lower bound would let `truncate` and `reorder` miss their tokens."""
    cache = filled()
    cache.advance(3)
    with pytest.raises(ValueError, match="cache: expected room for 4 more tokens, got 5 of 8 slots in use"):
        cache.advance(4)
    assert cache.longest == 8


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_graph_that_would_keep_the_number_of_cached_tokens_is_not_captured(variant, monkeypatch):
    layer = build(SMALL.variant(variant))
    cache = new_cache(layer.config, 2, 20)
    layer(hidden(2, 5, SMALL.d), cache=cache)
    monkeypatch.setattr(gsa_ref.layer, "_is_capturing", lambda x: True)
    with pytest.raises(RuntimeError, match="cache: a captured CUDA graph would read as many tokens at every replay"):
        layer(hidden(2, 1, SMALL.d), cache=cache)
    assert layer(hidden(2, 5, SMALL.d)).hidden.isfinite().all()  # without a cache nothing is in the way


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_bytes_per_token_are_those_of_the_buffers(variant, dtype):
    config = SMALL.variant(variant)
    cache = new_cache(config, 3, 5, dtype=dtype)
    held = sum(x.nbytes for x in (cache.k, cache.v, cache.k_idx) if x is not None)
    assert held == 3 * 5 * GSACache.bytes_per_token(config, dtype=dtype)


# --- refused caches -----------------------------------------------------------------------------------------------

LAYER = build(SMALL)
CHANGED = {name: dataclasses.replace(SMALL, **{name: value}) for name, value in {"d_h": 4, "d_I": 4, "H_kv": 1}.items()}
REFUSED = {
    "batch": (lambda: new_cache(SMALL, 3, 40), ValueError, "cache: expected batch size 2 as h, got 3"),
    "H_kv": (lambda: new_cache(CHANGED["H_kv"], 2, 40), ValueError, r"cache: expected keys .*got \[2, 40, 1, 8\]"),
    "d_h": (lambda: new_cache(CHANGED["d_h"], 2, 40), ValueError, r"cache: expected keys .*got \[2, 40, 2, 4\]"),
    "d_I": (
        lambda: new_cache(CHANGED["d_I"], 2, 40),
        ValueError,
        "cache: expected indexer keys of width d_I = 8, got 4",
    ),
    "dense": (lambda: new_cache(SMALL.variant("dense"), 2, 40), ValueError, "cache: expected .* got .* without k_idx"),
    "dtype": (
        lambda: new_cache(SMALL, 2, 40, dtype=torch.float32),
        TypeError,
        "cache: expected dtype torch.float64, got torch.float32",
    ),
    "device": (lambda: new_cache(SMALL, 2, 40, device="meta"), ValueError, "cache: expected device cpu, got meta"),
    "full": (
        lambda: new_cache(SMALL, 2, 19),
        ValueError,
        "cache: expected room for 20 more tokens, got 0 of 19 slots in use",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_refused_cache_is_left_as_it_was(name):
    make, exception, message = REFUSED[name]
    cache = make()
    before = contents(cache)
    with pytest.raises(exception, match=message):
        LAYER(hidden(2, 20, SMALL.d), cache=cache)
    if cache.k.device.type == "cpu":
        assert unchanged(cache, before)


def test_a_full_cache_is_left_as_it_was_and_still_takes_what_fits():
    h, cache = hidden(2, 20, SMALL.d), new_cache(SMALL, 2, 20)
    expected = LAYER(h).hidden
    LAYER(h[:, :15], cache=cache)
    before = contents(cache)
    with pytest.raises(ValueError, match="cache: expected room for 6 more tokens, got 15 of 20 slots in use"):
        LAYER(hidden(2, 6, SMALL.d), cache=cache)
    assert unchanged(cache, before)
    assert close_layers(LAYER(h[:, 15:], cache=cache).hidden, expected[:, 15:])


def test_training_with_gradients_refuses_a_cache():
    layer, cache = build(SMALL).train(), new_cache(SMALL, 2, 20)
    before = contents(cache)
    with pytest.raises(ValueError, match="cache: expected None in training mode"):
        layer(hidden(2, 20, SMALL.d), cache=cache)
    assert unchanged(cache, before)


@pytest.mark.bad_input
def test_wrong_hidden_states_leave_the_cache_as_it_was():
    cache = new_cache(SMALL, 2, 20)
    LAYER(hidden(2, 5, SMALL.d), cache=cache)
    before = contents(cache)
    with pytest.raises(ValueError, match="lengths: expected shape"):
        LAYER(hidden(2, 5, SMALL.d), cache=cache, lengths=torch.ones(3, dtype=torch.int32))
    with pytest.raises(TypeError, match="h: expected dtype"):
        LAYER(hidden(2, 5, SMALL.d).float(), cache=cache)
    assert unchanged(cache, before)


def filled() -> GSACache:
    """Sequences of 5 and 3 tokens, with a bound of 5."""
    cache = new_cache(SMALL, 2, 8)
    LAYER(hidden(2, 5, SMALL.d), cache=cache, lengths=torch.tensor([5, 3], dtype=torch.int32))
    return cache


def ints(*values: int, dtype: torch.dtype = torch.int32, device: str = "cpu") -> torch.Tensor:
    return torch.tensor(values, dtype=dtype, device=device)


BAD_OPERATIONS = [
    ("truncate", -1, ValueError, "lengths: expected an int ≥ 0, got -1"),
    ("truncate", 6, ValueError, "lengths: expected at most 5 tokens, got 6"),
    ("truncate", 2.0, TypeError, "lengths: expected an int, got float 2.0"),
    ("truncate", True, TypeError, "lengths: expected an int, got bool True"),
    ("truncate", [3, 3], TypeError, r"lengths: expected an int, got list \[3, 3\]"),
    ("truncate", ints(3, 4), ValueError, "lengths: expected 0 to 3 tokens, as sequence 1 holds, got 4"),
    ("truncate", ints(-1, 3), ValueError, "lengths: expected 0 to 5 tokens, as sequence 0 holds, got -1"),
    ("truncate", ints(3, 3, dtype=torch.int64), TypeError, "lengths: expected dtype int32, got torch.int64"),
    ("truncate", ints(3), ValueError, r"lengths: expected shape \[B=2\], got \[1\]"),
    ("truncate", ints(3, 3, device="meta"), ValueError, "lengths: expected device cpu as cache, got meta"),
    ("reorder", [1, 0], TypeError, "index: expected a torch.Tensor, got list"),
    ("reorder", ints(0, 2), ValueError, r"index: expected values in \[0, 2\), got 2 at position 1"),
    ("reorder", ints(-1, 0), ValueError, r"index: expected values in \[0, 2\), got -1 at position 0"),
    ("reorder", ints(0, 1, 5), ValueError, r"index: expected values in \[0, 2\), got 5 at position 2"),
    ("reorder", torch.zeros(2), TypeError, "index: expected dtype int32 or int64, got torch.float32"),
    ("reorder", torch.zeros(2, 1).int(), ValueError, r"index: expected shape \[B'\], got \[2, 1\]"),
    ("reorder", ints(0, 1, device="meta"), ValueError, "index: expected device cpu as cache, got meta"),
    ("advance", 4, ValueError, "cache: expected room for 4 more tokens, got 5 of 8 slots in use"),
    ("advance", -1, ValueError, "n_new: expected an int ≥ 0, got -1"),
    ("advance", 1.0, TypeError, "n_new: expected an int, got float 1.0"),
    ("advance", ints(1, 1), TypeError, r"n_new: expected an int, got Tensor tensor\(\[1, 1\], dtype=torch.int32\)"),
    ("grow", 7, ValueError, "capacity: expected an int ≥ 8, got 7"),
    ("grow", 9.0, TypeError, "capacity: expected an int, got float 9.0"),
]


@pytest.mark.bad_input
@pytest.mark.parametrize(("method", "argument", "exception", "message"), BAD_OPERATIONS)
def test_a_refused_operation_leaves_the_cache_as_it_was(method, argument, exception, message):
    cache = filled()
    before, bound = contents(cache), cache.longest
    with pytest.raises(exception, match=f"^{message}$"):
        getattr(cache, method)(argument)
    assert unchanged(cache, before)
    assert (cache.longest, cache.capacity) == (bound, 8)


# --- what a cache is made of --------------------------------------------------------------------------------------

PARTS = {"k": (2, 5, 3, 4), "v": (2, 5, 3, 4), "k_idx": (2, 5, 6), "lengths": (2,)}


def parts(**changes: torch.Tensor) -> dict[str, torch.Tensor]:
    tensors = {name: torch.zeros(shape) for name, shape in PARTS.items()}
    return {**tensors, "lengths": torch.zeros(2, dtype=torch.int32), **changes}


@pytest.mark.bad_input
@pytest.mark.parametrize(
    ("name", "shape"),
    [
        ("v", (7, 5, 3, 4)),
        ("v", (2, 7, 3, 4)),
        ("v", (2, 5, 7, 4)),
        ("v", (2, 5, 3, 7)),
        ("k_idx", (7, 5, 6)),
        ("k_idx", (2, 7, 6)),
        ("lengths", (7,)),
    ],
)
def test_the_parts_of_a_cache_have_the_sizes_of_its_keys(name, shape):
    assert GSACache(**parts()).capacity == 5
    dtype = torch.int32 if name == "lengths" else torch.float32
    with pytest.raises(ValueError, match=f"^{name}: .*{re.escape(str(list(shape)))}"):
        GSACache(**parts(**{name: torch.zeros(shape, dtype=dtype)}))


@pytest.mark.bad_input
@pytest.mark.parametrize("name", PARTS)
def test_the_parts_of_a_cache_lie_on_one_device(name):
    with pytest.raises(ValueError, match="device"):
        GSACache(**parts(**{name: parts()[name].to("meta")}))


@pytest.mark.bad_input
def test_a_cache_of_another_layer_says_what_it_holds():
    config = GSAConfig(d=8, H=3, H_kv=3, d_h=4, H_I=2, d_I=6)
    like = torch.zeros(())
    with_keys, without = GSACache(**parts()), GSACache(**parts(k_idx=None))
    with_keys.check(config, 2, 1, like)
    expected = "cache: expected keys [2, 5, 3, 4], sparse={}, got [2, 5, 3, 4] {} k_idx"
    for cache, wanted, held in ((with_keys, config.variant("dense"), "with"), (without, config, "without")):
        with pytest.raises(ValueError, match="k_idx") as caught:
            cache.check(wanted, 2, 1, like)
        assert str(caught.value) == expected.format(wanted.sparse, held)


@pytest.mark.bad_input
def test_a_device_of_another_type_is_refused_with_its_type():
    with pytest.raises(TypeError, match=r"^device: expected a torch\.device or a str, got int 3$"):
        GSACache.allocate(GSAConfig(), 1, 1, device=3)
