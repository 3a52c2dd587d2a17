"""`decode_attention`: selection and attention of a few queries against a cache, in one step.

The selection must be the stable sort of the scores that the first kernel stored, with no tolerance; everything is
within the bounds of the equations.
"""

import dataclasses
import math
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from typing import Any
from unittest import mock

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import gsa_fast
import gsa_ref
from gsa_fast import decode
from gsa_fast.verification.interpreter import poisoned_memory, small_tiles
from gsa_ref import GSACache, GSAConfig
from gsa_ref.cases import LAYOUTS, DecodeCase, Limits, decode_cases
from tests.fast.helpers import DTYPES, alone, assert_in_budget, contiguous, examples, int32, same, widely_strided
from tests.fast.test_layer import CONFIG, build, hidden, run
from tests.fast.test_streamed import PATTERNS, configuration, inputs
from tests.strategies import RULES

LIMITS = Limits(B=2, L=3, S=40, heads=2, group=3, width=24)
CASES = decode_cases("float32", LIMITS)
NEEDS_CUDA = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


def arguments_of(case: DecodeCase, device: str) -> dict[str, Any]:
    return {**case.arguments(device), **case.attention_arguments(device)}


def run_case(case: DecodeCase, arguments: dict[str, Any], **keywords: Any) -> Any:
    with poisoned_memory():
        return gsa_fast.decode_attention(
            **arguments,
            mean_variance=case.mean_variance,
            config=case.config,
            impl="triton",
            **{"return_selection": True, **keywords},
        )


def attended(indexer: dict[str, Any], device: str, *, H: int = 2, H_kv: int = 1, d_h: int = 8) -> dict[str, Any]:
    """The arguments of the indexer with queries, keys and values beside them."""
    g = torch.Generator().manual_seed(1)
    (B, n), n_keys = indexer["q_idx"].shape[:2], indexer["k_idx"].shape[1]
    shapes = {"q": (B, n, H, d_h), "k": (B, n_keys, H_kv, d_h), "v": (B, n_keys, H_kv, d_h)}
    return {**indexer, **{name: torch.randn(shape, generator=g).to(device) for name, shape in shapes.items()}}


@contextmanager
def stored_keys() -> Iterator[list[dict[str, Any]]]:
    """The arguments of every launch of `decode_select_kernel`, which hold the scores."""
    seen: list[dict[str, Any]] = []
    kernel = decode.decode_select_kernel

    class Spy:
        def __getitem__(self, grid: Any) -> Any:
            def launch(*arguments: Any, **options: Any) -> None:
                kernel[grid](*arguments, **options)
                seen.append({**dict(zip(kernel.arg_names, arguments, strict=False)), **options})

            return launch

    with mock.patch.object(decode, "decode_select_kernel", Spy()):
        yield seen


def stored_scores(launch: dict[str, Any], n_visible: torch.Tensor) -> torch.Tensor:
    """float32 [B, L, S] in the order of the positions, −inf where masked."""
    keys = launch["keys_ptr"].unflatten(-1, (-1, launch["MEMBERS"])).transpose(-1, -2).flatten(-2)[..., : launch["S"]]
    scores = torch.where(keys == -1, torch.nan, keys.view(torch.float32))
    return scores.masked_fill(torch.arange(launch["S"], device=keys.device) >= n_visible[..., None], -math.inf)


def assert_exact(arguments: dict[str, Any], config: GSAConfig, mean_variance: float = 0.0) -> Any:
    """The selection is the stable sort of the stored scores, for the budget that the variance gives."""
    with stored_keys() as launches, poisoned_memory():
        result = gsa_fast.decode_attention(
            **arguments, mean_variance=mean_variance, config=config, impl="triton", return_selection=True
        )
    (B, n), n_keys = arguments["q_idx"].shape[:2], arguments["k_idx"].shape[1]
    start, lengths = arguments["start"], arguments["lengths"]
    position = torch.as_tensor(start).reshape(-1, 1).expand(B, 1).cpu() + torch.arange(n)
    length = torch.full((B, 1), n_keys) if lengths is None else lengths.cpu()[:, None]
    n_visible = torch.where(position < length, (position + 1).clamp(max=n_keys), 0).to(result.variance.device)
    scores = stored_scores(launches[0], n_visible)
    sizes = {"k_base": config.k_base, "k_min": config.k_min, "k_max": config.k_max, "rule": config.rule}
    budget = gsa_ref.token_budget(result.variance, mean_variance, n_visible.to(torch.int32), **sizes)
    expected = gsa_ref.select_tokens(scores, budget, width=max(1, min(config.k_max, n_keys)))
    assert same(result.selection, expected)
    return launches[0], result


# --- against the equations ----------------------------------------------------------------------------------------


@pytest.mark.property(19)
@pytest.mark.property(37)
@pytest.mark.usefixtures("bf16")
@pytest.mark.parametrize("dtype", DTYPES)
@examples(12)
@given(data=st.data())
def test_decoding_stays_in_its_error_budget(dtype, data, device):
    assert_in_budget(data.draw(decode_cases(dtype, LIMITS)), device)


@pytest.mark.usefixtures("bf16")
@pytest.mark.parametrize("dtype", DTYPES)
@examples(8)
@given(data=st.data())
def test_decoding_stays_in_its_error_budget_over_several_tiles(dtype, data, device):
    with small_tiles():
        assert_in_budget(data.draw(decode_cases(dtype, Limits(B=2, L=2, S=70, heads=1, group=3))), device)


SHAPES = [  # L, H_I, d_I, H_kv, group, d_h
    (1, 1, 16, 1, 1, 64),
    (2, 3, 20, 2, 3, 96),
    (3, 5, 48, 1, 5, 128),
    (4, 4, 64, 1, 6, 192),
    (5, 6, 96, 1, 7, 24),
    (6, 7, 100, 3, 2, 16),
    (7, 8, 128, 1, 8, 256),
    (8, 2, 33, 2, 4, 40),
]


@pytest.mark.pitfall("group-sizes")
@pytest.mark.usefixtures("bf16")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_any_number_of_queries_heads_and_channels(dtype, shape, device):
    """Every L from 1 to 8, every H_I from 1 to 8, widths that are no powers of two, groups of 1 to 8 heads."""
    L, H_I, d_I, H_kv, group, d_h = shape
    case = DecodeCase(
        B=1, L=L, S=40, H_I=H_I, d_I=d_I, start=40 - L, lengths=None, dtype=dtype, values="normal", layout="margins",
        seed=L, mean_variance=0.01, k_base=12, k_min=4, k_max=24, rule="proportional",
        H_kv=H_kv, group=group, d_h=d_h, output_gate=L % 2 == 0, attended_values="normal",
    )  # fmt: skip
    assert_in_budget(case, device)


# --- given the stored scores, the stable sort ---------------------------------------------------------------------


@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("tiles", ["small", "shipped"])
@examples(2)
@given(seed=st.integers(0, 2**16), rule=RULES, mean_variance=st.sampled_from((0.0, 0.01, 0.1)))
def test_selection_is_the_stable_sort_of_the_stored_scores(pattern, tiles, seed, rule, mean_variance, device):
    arguments = attended(inputs(pattern, device, n=2, n_keys=90, seed=seed), device)
    with small_tiles() if tiles == "small" else nullcontext():
        assert_exact(arguments, configuration(arguments, rule=rule), mean_variance)


def test_these_inputs_have_groups_of_several_tiles_and_more_candidates_than_fit(device):
    arguments = attended(inputs("two values", device, n=2, n_keys=300), device)
    config = configuration(arguments, k_base=40, k_max=40)
    with small_tiles():
        launch, result = assert_exact(arguments, config)
    assert launch["groups"] < launch["SHARDS"] * launch["SEGMENT"] < int(result.selection.counts.max())
    assert launch["MEMBERS"] > decode.MAX_MEMBERS


def test_a_cluster_of_good_keys_hardly_adds_candidates(device):
    """Neighbours are in different groups: 24 of them bring no more candidates than 24 keys anywhere."""
    arguments = attended(inputs("window", device, n=1, n_keys=400), device)
    config = configuration(arguments, k_base=24, rule="fixed")
    with mock.patch.multiple(decode, MAX_GROUPS=128, LARGEST_GROUPS=128, BLOCK_SELECT=64):
        launch, _ = assert_exact(arguments, config)
    sizes = launch["sizes_ptr"][0, 0]
    assert len(sizes) == 8
    assert 24 <= int(sizes.sum()) <= 32
    assert int(sizes.max()) <= 6  # and the shards share them


@pytest.mark.property(29)
@pytest.mark.parametrize("tiles", ["small", "shipped"])
def test_nan_scores_rank_last_and_are_selected_by_position_when_nothing_else_is_left(tiles, device):
    arguments = attended(inputs("random", device, B=2, n=2, n_keys=50), device)
    nan = torch.rand(2, 50, generator=torch.Generator().manual_seed(0)) < 0.6
    arguments["k_idx"][nan.to(device)] = math.nan
    config = configuration(arguments, k_base=30, k_min=30, k_max=40)
    with small_tiles() if tiles == "small" else nullcontext():
        _, result = assert_exact(arguments, config)
    assert (result.selection.counts == 30).all()
    assert result.variance.isfinite().all()


@pytest.mark.parametrize(("head_logits", "score"), [(math.nan, math.nan), (-math.inf, 0.0)])
def test_rows_of_nan_or_of_zeros_select_the_first_keys(head_logits, score, device):
    arguments = attended(inputs("random", device, n=2, n_keys=40), device)
    arguments["head_logits"].fill_(head_logits)
    config = configuration(arguments, rule="fixed", k_base=20)
    with small_tiles():
        _, result = assert_exact(arguments, config)
    assert result.selection.indices[0, 0, :20].tolist() == list(range(20))
    assert not result.variance.any()


@pytest.mark.parametrize("value", [math.inf, -math.inf, 1e30])
@pytest.mark.parametrize("name", ["bias", "k_idx", "head_logits"])
def test_infinite_logits_saturate_the_scores(value, name, device):
    """σ(±∞) is 0 or 1: scores, and with them selections, stay defined. ∞ of both signs in one product is NaN."""
    arguments = attended(inputs("random", device, H_I=3, d_I=4, n=2, n_keys=40), device)
    arguments[name][..., 0] = value
    _, result = assert_exact(arguments, configuration(arguments), 0.01)
    scores = gsa_ref.indexer_scores(
        **{n: arguments[n] for n in ("q_idx", "k_idx", "head_logits", "bias", "start")}, scale=0.5
    )
    visible = gsa_ref.score_variance(scores)
    assert torch.allclose(result.variance, visible, rtol=1e-4, atol=1e-9)


def test_budgets_of_nothing_one_and_everything(device):
    arguments = attended(inputs("random", device, B=3, n=1, n_keys=40), device)
    arguments |= {"start": int32([39, 0, 5], device), "lengths": int32([40, 1, 0], device)}
    for config in (
        configuration(arguments, k_base=1, k_min=1, k_max=1),
        configuration(arguments, k_base=40, k_min=40, k_max=64),
    ):
        _, result = assert_exact(arguments, config)
        assert result.selection.counts.flatten().tolist() == [min(config.k_min, 40), 1, 0]
        assert result.selection.indices.shape[-1] == min(config.k_max, 40)


# --- sequences of a batch -----------------------------------------------------------------------------------------


@pytest.mark.pitfall("padding-in-the-cache")
@pytest.mark.property(40)
@pytest.mark.parametrize("tiles", ["small", "shipped"])
def test_every_sequence_has_its_own_length_from_empty_to_full(tiles, device):
    arguments = attended(inputs("random", device, B=5, n=2, n_keys=70), device)
    # Full; some; a query that is padding; nothing visible; a start behind all keys.
    arguments |= {"start": int32([68, 31, 10, 0, 70], device), "lengths": int32([70, 33, 11, 0, 70], device)}
    with small_tiles() if tiles == "small" else nullcontext():
        _, result = assert_exact(arguments, configuration(arguments))
    counts = result.selection.counts
    padding = torch.tensor([[0, 0], [0, 0], [0, 1], [1, 1], [1, 1]], dtype=torch.bool, device=device)
    assert same(counts == 0, padding)
    assert not result.out[padding].any()
    assert (result.lse[padding] == -math.inf).all()
    assert not result.variance[padding].any()


@pytest.mark.property(6)
@examples(6)
@given(CASES)
def test_a_sequence_alone_gives_the_same_bits(device, case):
    """Here the batch has more rows than find their bounds in `decode_select_kernel`."""
    arguments = arguments_of(case, device)
    with mock.patch.object(decode, "BOUND_ROWS", case.L):
        together = run_case(case, arguments)
        each = [run_case(case, alone(arguments, b)) for b in range(case.B)]
    for b, one in enumerate(each):
        assert same(one[:3], [x[b : b + 1] for x in together[:3]])
        assert same(one.selection, [x[b : b + 1] for x in together.selection])


@pytest.mark.property(5)
@examples(4)
@given(CASES, st.integers(1, 2), st.sampled_from((1.0, math.nan)))
def test_future_perturbation_leaves_earlier_rows_bitwise_equal(device, case, t, noise):
    """Of three queries in one step, each sees the keys up to its own."""
    case = dataclasses.replace(case, L=3, S=case.S + 2)
    start = case.S - case.L
    arguments = {**contiguous(arguments_of(case, device)), "start": start, "lengths": None}
    changed = {name: arguments[name].clone() for name in ("q", "k", "v", "q_idx", "k_idx", "head_logits")}
    for name, x in changed.items():
        x[:, start + t if name in ("k", "v", "k_idx") else t :] += noise
    with small_tiles():
        before, after = run_case(case, arguments), run_case(case, {**arguments, **changed})
    assert same([x[:, :t] for x in before[:3]], [x[:, :t] for x in after[:3]])
    assert same([x[:, :t] for x in before.selection], [x[:, :t] for x in after.selection])


@pytest.mark.property(57)
@examples(6)
@given(CASES)
def test_reruns_are_bitwise_equal(device, case):
    arguments = arguments_of(case, device)
    with small_tiles():
        first, again = run_case(case, arguments), run_case(case, arguments)
    assert same(first[:3], again[:3])
    assert same(first.selection, again.selection)


@pytest.mark.property(9)
@pytest.mark.parametrize("layout", LAYOUTS[1:])
@examples(4)
@given(CASES)
def test_strided_inputs_give_the_bits_of_contiguous_ones(layout, device, case):
    """The margins are NaN."""
    arguments = arguments_of(dataclasses.replace(case, layout=layout), device)
    with small_tiles():
        strided, plain = run_case(case, arguments), run_case(case, contiguous(arguments))
    assert same(strided[:3], plain[:3])
    assert same(strided.selection, plain.selection)


@pytest.mark.pitfall("int32-strides")
@pytest.mark.parametrize("name", ["k", "v", "k_idx"])
def test_keys_may_lie_2_to_the_31_elements_apart(name, device):
    arguments = attended(inputs("random", device, n=1, n_keys=3), device, d_h=4)
    arguments = {n: x.half() if torch.is_tensor(x) else x for n, x in arguments.items()}
    config = configuration(arguments, k_base=2, k_min=2, k_max=2)
    expected = gsa_fast.decode_attention(**arguments, mean_variance=0.0, config=config, impl="triton")
    far = widely_strided(tuple(arguments[name].shape), 1, device)
    far.copy_(arguments[name])
    apart = gsa_fast.decode_attention(**{**arguments, name: far}, mean_variance=0.0, config=config, impl="triton")
    assert same(apart[:3], expected[:3])


@pytest.mark.pitfall("padding-in-the-cache")
@examples(4)
@given(CASES, st.integers(1, 40))
def test_a_larger_buffer_selects_the_same_keys(device, case, more):
    """What lies past the lengths is never read as a key; it is NaN here."""
    case = dataclasses.replace(case, lengths=case.lengths or (case.S,) * case.B)
    arguments = arguments_of(case, device)

    def grown(x: torch.Tensor) -> torch.Tensor:
        return torch.cat([x, torch.full_like(x[:, :1], torch.nan).repeat_interleave(more, 1)], 1)

    larger = {**arguments, **{name: grown(arguments[name]) for name in ("k", "v", "k_idx")}}
    small, large = run_case(case, arguments), run_case(case, larger)
    K = small.selection.indices.shape[-1]
    budget_differs = small.selection.counts != large.selection.counts  # by the last bit of the variance
    assert same(small.selection.indices[~budget_differs], large.selection.indices[..., :K][~budget_differs])
    assert budget_differs.float().mean() < 0.5
    assert torch.allclose(small.variance, large.variance, rtol=1e-4, atol=1e-9)
    assert large.out.isfinite().all() == small.out.isfinite().all()


# --- values -------------------------------------------------------------------------------------------------------


@pytest.mark.property(37)
@examples(6)
@given(CASES)
def test_a_nan_reaches_exactly_the_queries_that_selected_it(device, case):
    """The half that the check does not cover: it poisons what nobody selected."""
    arguments = arguments_of(case, device)
    clean = run_case(case, arguments)
    b, s = case.seed % case.B, case.seed % case.S
    for name in ("k", "v"):
        poisoned = {**arguments, name: arguments[name].clone()}
        poisoned[name][b, s] = math.nan
        result = run_case(case, poisoned)
        hit = torch.zeros(case.B, case.L, dtype=torch.bool, device=device)
        hit[b] = (clean.selection.indices[b] == s).any(-1)
        assert same(result.out.isnan().all(-1).all(-1), hit)
        assert same(result.out[~hit], clean.out[~hit])


def test_heads_whose_logits_are_all_minus_infinity_are_nan_as_in_the_reference(device):
    arguments = attended(inputs("random", device, n=1, n_keys=20), device)
    arguments["q"][..., 0, :] = math.inf
    arguments["k"].fill_(-1.0)
    config = configuration(arguments)
    results = [
        gsa_fast.decode_attention(**arguments, mean_variance=0.0, config=config, impl=impl)
        for impl in ("triton", "reference")
    ]
    for result in results:
        assert result.out[..., 0, :].isnan().all()
        assert result.out[..., 1, :].isfinite().all()


def test_the_scale_and_the_gate_are_those_of_sparse_attention(device):
    arguments = attended(inputs("random", device, n=2, n_keys=30), device)
    config, gate = configuration(arguments), torch.randn_like(arguments["q"])
    keywords = {"mean_variance": 0.0, "config": config, "scale": 0.7, "output_gate_logits": gate}
    result, expected = (
        gsa_fast.decode_attention(**arguments, **keywords, impl=impl, return_selection=True)
        for impl in ("triton", "reference")
    )
    assert same(result.selection, expected.selection)
    assert torch.allclose(result.out, expected.out, rtol=1e-5, atol=1e-6)
    assert torch.allclose(result.lse, expected.lse, rtol=1e-5, atol=1e-6)


# --- the reference, and what is refused ---------------------------------------------------------------------------


def test_impl_reference_composes_the_reference_functions(device):
    arguments = attended(inputs("random", device, n=9, n_keys=30), device)
    config = configuration(arguments)
    result = gsa_fast.decode_attention(
        **arguments, mean_variance=0.0, config=config, impl="reference", return_selection=True
    )
    indexer = {name: arguments[name] for name in ("q_idx", "k_idx", "head_logits", "bias", "start", "lengths")}
    selection, variance = gsa_ref.indexed_selection(**indexer, mean_variance=0.0, config=config)
    expected = gsa_ref.sparse_attention(*(arguments[n] for n in ("q", "k", "v")), selection, start=arguments["start"])
    assert same(result[:3], (*expected, variance))
    assert same(result.selection, selection)
    without = gsa_fast.decode_attention(**arguments, mean_variance=0.0, config=config, impl="reference")
    assert without.selection is None


def test_more_queries_than_the_kernels_take_are_refused_with_what_to_use(device):
    arguments = attended(inputs("random", device, n=9, n_keys=30), device)
    with pytest.raises(
        NotImplementedError, match=r"^q: expected at most 8 queries per sequence, got 9; use indexed_sel"
    ):
        gsa_fast.decode_attention(**arguments, mean_variance=0.0, config=configuration(arguments), impl="triton")


BAD = {
    "q": (lambda x: x[:, :1], ValueError),
    "k": (lambda x: x[:, :-1], ValueError),
    "v": (lambda x: x.half(), TypeError),
    "k_idx": (lambda x: x[..., :-1], ValueError),
    "head_logits": (lambda x: x.long(), TypeError),
    "bias": (lambda x: x[:-1], ValueError),
    "start": (lambda x: -1, ValueError),
    "lengths": (lambda x: torch.zeros(1, dtype=torch.int64), TypeError),
    "output_gate_logits": (lambda x: torch.zeros(1, 2, 2, 7), ValueError),
    "mean_variance": (lambda x: "0", TypeError),
    "config": (lambda x: {}, TypeError),
    "scale": (lambda x: math.nan, ValueError),
    "sigmoid_mode": (lambda x: "fast", ValueError),
    "impl": (lambda x: "cuda", ValueError),
    "return_selection": (lambda x: 1, TypeError),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_arguments_are_named(name, device):
    arguments = attended(inputs("random", device, n=2, n_keys=12), device)
    arguments |= {
        "mean_variance": 0.0, "config": configuration(arguments), "impl": "triton", "scale": None,
        "output_gate_logits": None, "sigmoid_mode": "exact", "return_selection": False,
    }  # fmt: skip
    change, error = BAD[name]
    arguments[name] = change(arguments[name])
    if torch.is_tensor(arguments[name]):
        arguments[name] = arguments[name].to(device)
    with pytest.raises(error, match=f"^{name}: expected"):
        gsa_fast.decode_attention(**arguments)


def test_float64_is_refused_by_the_kernels(device):
    arguments = attended(inputs("random", device, n=1, n_keys=12), device)
    arguments |= {name: arguments[name].double() for name in ("q", "k", "v")}
    with pytest.raises(NotImplementedError, match=r"^q: the kernels take float32"):
        gsa_fast.decode_attention(**arguments, mean_variance=0.0, config=configuration(arguments), impl="triton")


def test_a_backward_pass_is_refused(device):
    arguments = attended(inputs("random", device, n=1, n_keys=12), device)
    arguments["q"].requires_grad_()
    result = gsa_fast.decode_attention(**arguments, mean_variance=0.0, config=configuration(arguments), impl="triton")
    with pytest.raises(NotImplementedError, match=r"^gsa_fast.decode_attention has no backward kernel"):
        result.out.sum().backward()


@pytest.mark.pitfall("length-zero")
@pytest.mark.parametrize(("B", "n", "n_keys"), [(0, 1, 5), (2, 0, 5), (2, 1, 0)])
def test_empty_axes(B, n, n_keys, device):
    config = GSAConfig(H_I=2, d_I=4, k_base=2, k_min=1, k_max=3)
    shapes = ((B, n, 2, 8), (B, n_keys, 1, 8), (B, n_keys, 1, 8), (B, n, 2, 4), (B, n_keys, 4), (B, n, 2), (2,))
    result = gsa_fast.decode_attention(
        *(torch.ones(shape, device=device) for shape in shapes),
        mean_variance=0.0, config=config, start=0, impl="triton", return_selection=True,
    )  # fmt: skip
    assert result.out.shape == (B, n, 2, 8)
    assert not result.out.any()
    assert (result.lse == -math.inf).all()
    assert not result.selection.counts.any()


# --- the layer ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("L", "cached", "expected"), [(1, True, 1), (8, True, 1), (9, True, 0), (4, False, 0)])
def test_the_layer_decodes_in_one_step_up_to_eight_tokens_with_a_cache(L, cached, expected, device):
    layer, calls = build(CONFIG, device), []
    decoding = layer._decode_attention
    layer._decode_attention = lambda *x, **y: (calls.append(y), decoding(*x, **y))[1]
    cache = GSACache.allocate(CONFIG, 2, 16, device=device) if cached else None
    run(layer, hidden(2, L, device), cache=cache)
    assert len(calls) == expected
    if expected:
        assert calls[0]["k"].shape[1] == 16  # whole buffers: the same shapes at every step


@pytest.mark.parametrize("variant", ["dense", "gated"])
def test_variants_without_an_indexer_do_not_decode_sparsely(variant, device):
    layer = build(CONFIG.variant(variant), device)
    with mock.patch.object(layer, "_decode_attention", side_effect=AssertionError):
        run(layer, hidden(1, 1, device), cache=GSACache.allocate(layer.config, 1, 4, device=device))


def test_impl_reference_decodes_as_the_reference_layer(device):
    layer = build(CONFIG, device, impl="reference")
    reference = gsa_ref.GatedSparseAttention(CONFIG).to(device).eval()
    reference.load_state_dict(layer.state_dict())
    caches = [GSACache.allocate(CONFIG, 2, 16, device=device) for _ in range(2)]
    for L in (5, 1, 2):
        h = hidden(2, L, device, seed=L)
        assert same(*(run(x, h, cache=c) for x, c in zip((layer, reference), caches, strict=True)))


@pytest.mark.property(53, 54)
@pytest.mark.parametrize("chunks", [(1, 2, 3, 8), (8, 1, 7), (9, 6, 4), (5, 5, 5)])
def test_speculative_chunks_stay_near_one_prefill(chunks, device):
    """For hidden states whose scores do not tie; `test_system` has exact scores."""
    layer, L = build(CONFIG, device), sum(chunks)
    h = hidden(2, L, device)
    whole = run(layer, h)
    cache, done, outputs = GSACache.allocate(CONFIG, 2, L, device=device), 0, []
    for n in chunks:
        outputs.append(run(layer, h[:, done : done + n], cache=cache))
        done += n
    assert torch.allclose(torch.cat(outputs, 1), whole, rtol=1e-4, atol=1e-5)


@pytest.mark.property(55)
def test_a_compiled_decode_step_equals_the_eager_one_bitwise(device):
    layer = build(CONFIG, device)
    torch._dynamo.reset()
    results = []
    for step in (layer, torch.compile(layer, backend="aot_eager")):
        cache = GSACache.allocate(CONFIG, 2, 12, device=device)
        outputs = [run(layer, hidden(2, 5, device), cache=cache)]
        outputs += [run(step, hidden(2, 1, device, seed=t), cache=cache) for t in range(3)]
        results.append((*outputs, cache.k, cache.k_idx))
    assert same(*results)


@pytest.mark.gpu
@NEEDS_CUDA
def test_a_cuda_graph_replays_with_other_lengths():
    arguments = attended(inputs("random", "cuda", B=2, n=2, n_keys=3000), "cuda", d_h=64)
    config = configuration(arguments, k_base=200, k_max=400)
    arguments |= {"start": int32([100, 2998], "cuda"), "lengths": int32([102, 3000], "cuda")}

    def step() -> Any:
        return gsa_fast.decode_attention(**arguments, mean_variance=0.0, config=config, impl="triton")[:3]

    step()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    for lengths in ([3000, 3000], [5, 1000], [2, 0]):
        arguments["lengths"].copy_(int32(lengths, "cuda"))
        arguments["start"].copy_(arguments["lengths"] - 2)
        graph.replay()
        assert same(captured, step())


@pytest.mark.parametrize(("bound_rows", "launches"), [(2, 3), (1, 4)])
def test_splits_depend_on_nothing_but_shapes(bound_rows, launches, device):
    """The grids of all kernels for two contents of `start` and `lengths`."""
    arguments = attended(inputs("random", device, B=2, n=1, n_keys=40), device)
    config, grids = configuration(arguments), []
    for lengths in ([40, 40], [3, 0]):
        seen: list[Any] = []
        arguments |= {"start": int32(lengths, device) - 1, "lengths": int32(lengths, device)}
        arguments["start"].clamp_(min=0)
        with ExitStack() as stack:
            stack.enter_context(mock.patch.object(decode, "BOUND_ROWS", bound_rows))
            for name in (
                "decode_scores_kernel", "decode_threshold_kernel", "decode_select_kernel", "decode_attend_kernel"
            ):  # fmt: skip
                kernel = getattr(decode, name)
                spy = mock.MagicMock()
                spy.__getitem__.side_effect = lambda grid, kernel=kernel, seen=seen: (seen.append(grid), kernel[grid])[
                    1
                ]
                stack.enter_context(mock.patch.object(decode, name, spy))
            gsa_fast.decode_attention(**arguments, mean_variance=0.0, config=config, impl="triton")
        grids.append(seen)
    assert grids[0] == grids[1]
    assert len(grids[0]) == launches


@pytest.mark.parametrize("n_keys", [70, pytest.param(20000, marks=(pytest.mark.gpu, NEEDS_CUDA))])
def test_bounds_in_a_kernel_of_their_own_change_no_bit(n_keys, device):
    """Many rows take another way than few; a row alone must not differ from the same row among many."""
    arguments = attended(inputs("random", device, B=2, n=2, n_keys=n_keys), device)
    results = []
    for rows in (0, 4):
        with mock.patch.object(decode, "BOUND_ROWS", rows):
            results.append(assert_exact(arguments, configuration(arguments), 0.01)[1])
    assert same(results[0][:3], results[1][:3])
    assert same(results[0].selection, results[1].selection)
