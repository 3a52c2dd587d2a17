"""Text generation: the cache changes nothing, and only what the nucleus holds is drawn."""

import io
import sys
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from gsa_ref import LanguageModel, generate
from gsa_ref.generation import BOS, decode, encode, sample
from tests.ref.models import SMALL, VARIANTS
from tests.ref.test_model import CONFIG, build_model, int32

SAMPLED = {"temperature": 1.2, "top_p": 0.9}
LENGTHS = [40, 13, 27]


def prompts(lengths: list[int] = LENGTHS, *, alphabet: int = 256) -> torch.Tensor:
    """Random bytes, right-padded with −1."""
    tokens = torch.randint(alphabet, (len(lengths), max(lengths)), generator=seeded())
    return tokens.masked_fill(torch.arange(max(lengths)) >= torch.tensor(lengths)[:, None], -1)


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


# --- with and without the cache -----------------------------------------------------------------------------------


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("sampling", [{}, SAMPLED], ids=["greedy", "sampled"])
@pytest.mark.parametrize("alphabet", [256, 4])
def test_the_cache_changes_no_token(variant, sampling, alphabet):
    """float64, a ragged batch, up to 64 tokens against budgets of at most 12.

    `indexer_rope` is on: without it equal bytes tie in the first block up to rounding, and with prompts of four bytes
    three of four generations change (see `test_equal_tokens_tie_in_the_first_block_unless_the_indexer_has_rope`).
    """
    model, counts = build_model(variant, indexer_rope=True), []
    for block in model.blocks:

        def record(*arguments: Any, select: Any = block.attention._indexed_selection, **keywords: Any) -> Any:
            selection, variance = select(*arguments, **keywords)
            counts.append(selection.counts)
            return selection, variance

        block.attention._indexed_selection = record
    with_cache, without = (
        generate(
            model,
            prompts(alphabet=alphabet),
            lengths=int32(*LENGTHS),
            max_new_tokens=24,
            generator=seeded(),
            use_cache=use_cache,
            **sampling,
        )
        for use_cache in (True, False)
    )
    assert with_cache.shape == (3, 24)
    assert torch.equal(with_cache, without)
    assert len(set(with_cache.flatten().tolist())) > 5
    if model.config.attention.sparse:
        assert max(int(c.max()) for c in counts) <= SMALL.k_max < min(LENGTHS)
        assert min(int(c[:, -1].min()) for c in counts) < SMALL.k_max  # the budget varies


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_prompt_is_continued_as_if_it_were_alone(variant):
    model, batch = build_model(variant, indexer_rope=True), prompts()
    together = generate(model, batch, lengths=int32(*LENGTHS), max_new_tokens=12)
    for b, n in enumerate(LENGTHS):
        assert torch.equal(generate(model, batch[b : b + 1, :n], max_new_tokens=12)[0], together[b])


def test_each_token_is_the_argmax_of_the_logits_after_those_before_it():
    model, tokens = build_model(indexer_rope=True), prompts([30, 30])
    new = generate(model, tokens, max_new_tokens=10)
    logits = model(torch.cat((tokens, new), 1)).logits
    assert torch.equal(new, logits[:, 29:-1].argmax(-1))


# --- ends, seeds, side effects ------------------------------------------------------------------------------------


@pytest.mark.parametrize("use_cache", [True, False])
@pytest.mark.parametrize("sampling", [{}, {"temperature": 1.0}], ids=["greedy", "sampled"])
def test_a_stop_token_ends_its_sequence_and_no_other(use_cache, sampling):
    model = build_model(indexer_rope=True)
    arguments = {"lengths": int32(*LENGTHS), "max_new_tokens": 20, "use_cache": use_cache, **sampling}
    free = generate(model, prompts(), generator=seeded(), **arguments)
    stop = int(free[0, 6])
    ended = generate(model, prompts(), generator=seeded(), stop_token=stop, **arguments)
    for b in range(3):
        end = [*free[b].tolist(), stop].index(stop)
        assert ended[b, : end + 1].tolist() == [*free[b].tolist(), stop][: min(end + 1, 20)]
        assert (ended[b, end:] == stop).all()


def test_generation_stops_when_every_sequence_has_ended():
    model = build_model(indexer_rope=True)
    free = generate(model, prompts([30]), max_new_tokens=20)[0].tolist()
    stop = free[6]
    ended = generate(model, prompts([30]), max_new_tokens=20, stop_token=stop)[0].tolist()
    assert ended == free[: free.index(stop) + 1]
    assert len(ended) < 20


def test_a_seed_determines_what_is_drawn():
    model = build_model(indexer_rope=True)
    first, again, other = (
        generate(model, prompts([20]), max_new_tokens=12, temperature=1.0, generator=seeded(seed)) for seed in (1, 1, 2)
    )
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_generation_leaves_the_model_and_the_prompt_as_they_were():
    model, batch = build_model(indexer_rope=True), prompts()
    state, before = {name: x.clone() for name, x in model.state_dict().items()}, batch.clone()
    lengths, gradients = int32(*LENGTHS), []
    model.register_forward_hook(lambda *_: gradients.append(torch.is_grad_enabled()))
    generate(model, batch, lengths=lengths, max_new_tokens=3)
    assert gradients == [False] * 3  # no graph is kept
    assert all(torch.equal(x, state[name]) for name, x in model.state_dict().items())
    assert torch.equal(batch, before)
    assert lengths.tolist() == LENGTHS


def test_an_empty_batch_has_no_continuation():
    for sampling in ({}, {"temperature": 1.0}):
        assert generate(build_model(), prompts([3])[:0], max_new_tokens=4, **sampling).shape == (0, 4)


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize("progress", [False, True])
@pytest.mark.parametrize("stream", [io.StringIO, Terminal])
def test_progress_shows_a_bar_in_a_terminal_only(monkeypatch, progress, stream):
    shown = stream()
    monkeypatch.setattr(sys, "stderr", shown)
    generate(build_model(), "a", max_new_tokens=2, progress=progress)
    assert ("token" in shown.getvalue()) == (progress and stream is Terminal)


# --- text ---------------------------------------------------------------------------------------------------------


@given(st.text())
def test_decoding_undoes_encoding(text):
    tokens = encode(text)
    assert tokens.dtype == torch.int64
    assert tokens.tolist() == [BOS, *text.encode()]
    assert decode(tokens) == text


@given(st.binary())
def test_any_bytes_decode_to_some_text(data):
    assert decode(encode(data)) == data.decode(errors="replace")


def test_tokens_that_are_no_bytes_are_left_out():
    assert decode(torch.tensor([-1, 104, 256, 105, 300, 0xC3])) == "hi\ufffd"


@pytest.mark.parametrize("prompt", ["für", "für".encode(), ""])
def test_a_text_is_a_prompt(prompt):
    model = build_model(indexer_rope=True)
    expected = generate(model, encode(prompt)[None], max_new_tokens=5)
    assert torch.equal(generate(model, prompt, max_new_tokens=5), expected)


# --- sampling -----------------------------------------------------------------------------------------------------


def probabilities(logits: torch.Tensor, temperature: float) -> np.ndarray:
    z = logits.double().numpy() / temperature
    p = np.exp(z - z.max())
    return p / p.sum()


def nucleus(p: np.ndarray, top_p: float) -> set[int]:
    """The most probable tokens, one after another, until they hold top_p; ties go to the lower token."""
    chosen, total = set(), 0.0
    for token in sorted(range(len(p)), key=lambda i: (-p[i], i)):
        if total >= top_p:
            break
        chosen.add(token)
        total += p[token]
    return chosen


@given(
    st.lists(st.integers(-24, 24), min_size=1, max_size=12),
    st.floats(0.1, 3.0),
    st.floats(0.01, 1.0),
    st.integers(0, 2**16),
    st.sampled_from((torch.float32, torch.float64)),
)
def test_only_tokens_of_the_nucleus_are_drawn(values, temperature, top_p, seed, dtype):
    """And of those every one that 2000 draws can hardly miss. Logits in steps of ¼, so that ties are common."""
    logits = torch.tensor(values, dtype=dtype) / 4
    rows = logits.expand(2000, -1)
    drawn = sample(rows, temperature=temperature, top_p=top_p, generator=seeded(seed))
    assert drawn.shape == (2000,)
    p, rounding = probabilities(logits, temperature), 1e-5
    # A sum that rounding brings to either side of top_p may hold one token more or less.
    assert set(drawn.tolist()) <= nucleus(p, min(top_p + rounding, 1.0))
    inside = nucleus(p, top_p - rounding)
    assert {i for i in inside if p[i] / p[sorted(inside)].sum() > 0.02} <= set(drawn.tolist())


@pytest.mark.parametrize("top_p", [1.0, 0.8])
def test_tokens_are_drawn_as_often_as_softmax_says(top_p):
    logits, n = torch.tensor([0.3, -1.0, 2.0, 1.1, 0.0], dtype=torch.float64), 40_000
    drawn = sample(logits.expand(n, -1), temperature=0.7, top_p=top_p, generator=seeded())
    p = probabilities(logits, 0.7)
    p[[i for i in range(5) if i not in nucleus(p, top_p)]] = 0
    p /= p.sum()
    assert (p > 0).sum() == (5 if top_p == 1 else 2)
    counts = np.bincount(drawn.numpy(), minlength=5)
    assert (np.abs(counts - n * p) <= 5 * np.sqrt(n * p * (1 - p))).all()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("sampling", [{}, {"temperature": 1e-300}, {"temperature": 1.0, "top_p": 1e-9}])
def test_no_temperature_and_no_nucleus_give_the_argmax(dtype, sampling):
    logits = torch.stack([torch.randperm(100, generator=seeded(b)) for b in range(20)]).to(dtype)
    assert torch.equal(sample(logits, **sampling), logits.argmax(-1))


@pytest.mark.parametrize("V", [4, 256])
def test_among_equal_tokens_the_lower_one_enters_the_nucleus(V):
    """Up to 16 tokens the sort of PyTorch on a CPU is stable without being asked."""
    drawn = sample(torch.zeros(5000, V), temperature=1.0, top_p=0.5, generator=seeded())
    assert set(drawn.tolist()) == set(range(V // 2))


# --- bad input, beside the table in test_arguments ----------------------------------------------------------------


@pytest.mark.bad_input
@pytest.mark.parametrize(
    ("call", "exception", "message"),
    [
        (lambda: encode(3), TypeError, "text: expected a str or bytes, got int"),
        (lambda: decode([104]), TypeError, "tokens: expected a torch.Tensor, got list"),
        (lambda: decode(torch.zeros(1)), TypeError, "tokens: expected dtype int64, got torch.float32"),
        (lambda: decode(encode("a")[None]), ValueError, r"tokens: expected shape \[T\], got \[1, 2\]"),
        (lambda: sample([1.0]), TypeError, "logits: expected a torch.Tensor, got list"),
        (lambda: sample(encode("a")[None]), TypeError, "logits: expected dtype .*, got torch.int64"),
        (lambda: sample(torch.zeros(3)), ValueError, r"logits: expected shape \[B, V\], got \[3\]"),
        (lambda: sample(torch.zeros(1, 3), temperature=-1.0), ValueError, "temperature: expected at least 0, got -1.0"),
        (lambda: sample(torch.zeros(1, 3), top_p=0.0), ValueError, "top_p: expected 0 < top_p ≤ 1, got 0.0"),
        (lambda: sample(torch.zeros(1, 3), generator=0), TypeError, "generator: expected a torch.Generator, got int"),
    ],
)
def test_bad_input_is_refused_by_type_and_named(call, exception, message):
    with pytest.raises(exception, match=f"^{message}$"):
        call()


def test_generation_wants_eval_mode():
    """In training mode V̄ would count the rows of what is generated."""
    with pytest.raises(ValueError, match=r"^model: expected eval mode, got training mode$"):
        generate(LanguageModel(CONFIG), "a", max_new_tokens=1)
