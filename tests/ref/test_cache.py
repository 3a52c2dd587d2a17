"""Decoding cache: a cached pass gives what one pass over everything gives."""

import dataclasses
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gsa_ref import GSACache, GSAConfig
from tests.ref.models import SMALL, VARIANTS, build, close_layers, hidden, models


def new_cache(config: GSAConfig, batch_size: int, capacity: int, **options: Any) -> GSACache:
    return GSACache.allocate(config, batch_size, capacity, **{"dtype": torch.float64, **options})


def contents(cache: GSACache) -> list[torch.Tensor]:
    return [x.clone() for x in (cache.k, cache.v, cache.k_idx, cache.lengths) if x is not None]


def unchanged(cache: GSACache, before: list[torch.Tensor]) -> bool:
    return all(torch.equal(x, y) for x, y in zip(contents(cache), before, strict=True))


@settings(max_examples=20)
@given(models(), st.integers(0, 12))
def test_decoding_token_by_token_equals_prefill(model, prompt):
    """Property 53, row by row."""
    layer, h = model.build(), model.inputs()["h"]
    expected = layer(h).hidden
    prompt = min(prompt, h.shape[1])
    cache = new_cache(model.config, len(h), h.shape[1])
    outputs = [layer(h[:, :prompt], cache=cache).hidden]
    outputs += [layer(h[:, t : t + 1], cache=cache).hidden for t in range(prompt, h.shape[1])]
    assert close_layers(torch.cat(outputs, 1), expected)
    assert cache.lengths.tolist() == [h.shape[1]] * len(h)


@given(models(), st.lists(st.integers(0, 8), min_size=1, max_size=5))
def test_prefill_in_chunks_equals_one_prefill(model, chunks):
    """Property 54; a chunk may be empty."""
    layer, h = model.build(), model.inputs()["h"]
    cache, outputs, done = new_cache(model.config, len(h), h.shape[1] + 3), [], 0
    for n in [*chunks, h.shape[1]]:
        output = layer(h[:, done : done + n], cache=cache)
        assert output.cache is cache
        outputs.append(output.hidden)
        done = min(done + n, h.shape[1])
    assert close_layers(torch.cat(outputs, 1), layer(h).hidden)


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
