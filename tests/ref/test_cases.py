"""The inputs that tests, verification and puzzles draw: reproducible, legal and as wild as they say."""

import dataclasses
import json
import math

import hypothesis
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gsa_ref import (
    GatedSparseAttention,
    Selection,
    indexed_selection,
    indexer_kl_loss,
    indexer_scores,
    select_tokens,
    sparse_attention,
)
from gsa_ref.cases import (
    CASES,
    LAYOUTS,
    PATTERNS,
    SCORES,
    STRATEGIES,
    VALUES,
    AttentionCase,
    Case,
    Limits,
    attention_cases,
    causal,
    draw_scores,
    draw_values,
    lay_out,
    random_selection,
)
from tests.strategies import SEEDS

ANY = st.sampled_from(sorted(STRATEGIES)).flatmap(lambda stem: STRATEGIES[stem]("float32", Limits()))


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def tensors(case: Case) -> list[torch.Tensor]:
    """Everything that a case builds, flattened."""
    builders = {"budget": "scores", "training": "training_arguments"}
    built = getattr(case, builders.get(case.stem, "arguments"))()
    values = list(built.values()) if isinstance(built, dict) else [built] if torch.is_tensor(built) else list(built)
    flat = [x for value in values for x in (value if isinstance(value, Selection) else [value])]
    if case.stem == "decode":
        flat += case.attention_arguments().values()
    if case.stem == "attention_backward":
        flat += case.output_gradients()
    return [x for x in flat if isinstance(x, torch.Tensor)]


def test_every_stem_has_a_case_and_a_strategy():
    assert set(CASES) == set(STRATEGIES)
    assert all(CASES[stem].stem == stem for stem in CASES)


@given(ANY)
def test_json_gives_the_same_case_back(case):
    assert Case.from_json(case.to_json()) == case
    assert type(Case.from_json(case.to_json())) is type(case)


@given(ANY)
def test_a_case_builds_the_same_tensors_every_time(case):
    again = Case.from_json(case.to_json())
    assert tensors(case)
    for x, y in zip(tensors(case), tensors(again), strict=True):
        assert torch.equal(x.nan_to_num(7e7), y.nan_to_num(7e7))
        assert x.stride() == y.stride()


@given(ANY.filter(lambda case: case.stem != "layer"), SEEDS)
def test_another_layout_has_the_same_values(case, seed):
    for layout in LAYOUTS:
        other = dataclasses.replace(case, layout=layout)
        for x, y in zip(tensors(case), tensors(other), strict=True):
            assert torch.equal(x.nan_to_num(7e7), y.nan_to_num(7e7))


@given(ANY.filter(lambda case: case.stem != "layer"))
def test_every_floating_input_has_margins_of_nan_in_one_of_its_layouts(case):
    """The layer is left out: PyTorch's own matrix products make all that its kernels read."""
    layouts = [tensors(dataclasses.replace(case, layout=layout)) for layout in LAYOUTS]
    for versions in zip(*layouts, strict=True):
        if not versions[0].is_floating_point():
            continue
        inner = max(versions, key=lambda x: x.storage_offset())
        memory = torch.tensor([], dtype=inner.dtype).set_(inner.untyped_storage())
        last = inner.storage_offset() + sum((n - 1) * step for n, step in zip(inner.shape, inner.stride(), strict=True))
        assert memory[: inner.storage_offset()].isnan().all()
        assert memory[last + 1 :].isnan().all()
        assert 0 < inner.storage_offset() < len(memory) - 1


@given(ANY)
def test_drawn_sizes_stay_inside_the_limits(case):
    limits = Limits()
    assert 1 <= case.B <= limits.B
    assert 1 <= case.L <= limits.L
    assert getattr(case, "S", case.L) >= case.L
    assert getattr(case, "S", 0) <= limits.S
    assert getattr(case, "d_h", case.width if case.stem == "gates" else 0) <= limits.channels


@pytest.mark.parametrize("stem", ["attention", "attention_backward", "gates", "decode", "training"])
def test_wide_heads_are_drawn_where_the_limits_allow_them(stem):
    """The widths up to 128 are those of the interpreter; a device takes 192 and 256 as well."""
    strategy, name = STRATEGIES[stem]("float32", Limits(channels=256)), "width" if stem == "gates" else "d_h"
    for wide in (192, 256):
        assert getattr(hypothesis.find(strategy, lambda case, wide=wide: getattr(case, name) == wide), name) == wide


@pytest.mark.parametrize("stem", STRATEGIES)
@given(data=st.data())
def test_every_case_is_legal_input(stem, data):
    case = data.draw(STRATEGIES[stem]("float32", Limits()))
    if stem == "indexer":
        indexer_scores(**case.arguments(), scale=case.scale)
    elif stem == "indexed_selection":
        selection, _ = indexed_selection(**case.arguments(), mean_variance=case.mean_variance, config=case.config)
        selection.validate(n_keys=case.S)
    elif stem == "selection":
        select_tokens(*case.arguments(), width=case.width)
    elif stem == "attention":
        out, _ = sparse_attention(**case.arguments())
        assert out.isfinite().all()
    elif stem == "decode":
        arguments = case.arguments()
        selection, _ = indexed_selection(**arguments, mean_variance=case.mean_variance, config=case.config)
        attended = case.attention_arguments()
        out, _ = sparse_attention(
            attended.pop("q"), attended.pop("k"), attended.pop("v"), selection, start=arguments["start"], **attended
        )
        assert out.isfinite().all()
    elif stem == "training":
        assert indexer_kl_loss(**case.training_arguments()).isfinite()
    elif stem == "layer":
        GatedSparseAttention(case.config)(**case.arguments())
    else:
        assert all(x.shape[0] == case.B for x in tensors(case))


def left_out(case: Case) -> torch.Tensor:
    """Per row with a choice, two keys or more: whether the reference leaves out any."""
    selected = visible = None
    if case.stem == "selection":
        scores, budget = case.arguments()
        selected, visible = select_tokens(scores, budget, width=case.width).counts, (scores != -math.inf).sum(-1)
    elif case.stem in ("indexed_selection", "decode"):
        arguments = case.arguments()
        selection, _ = indexed_selection(**arguments, mean_variance=case.mean_variance, config=case.config)
        selected, visible = selection.counts, (indexer_scores(**arguments, scale=1.0) != -math.inf).sum(-1)
    elif case.stem == "layer":
        layer, seen = GatedSparseAttention(case.config), []
        select = layer._indexed_selection
        layer._indexed_selection = lambda *x, **y: seen.append(select(*x, **y)) or seen[-1]
        layer(**case.arguments())
        selected, visible = seen[0][0].counts, (torch.arange(case.L) + 1).expand(case.B, -1)
    else:
        arguments = case.training_arguments() if case.stem == "training" else case.arguments()
        if "selection" not in arguments:  # warm-up
            return torch.zeros(0, dtype=torch.bool)
        selected, visible = arguments["selection"].counts, torch.arange(case.L) + case.S - case.L + 1
    return (selected < visible)[(visible > 1).expand_as(selected)]


@pytest.mark.pitfall("budget-of-everything")
@pytest.mark.parametrize("stem", sorted(set(STRATEGIES) - {"indexer", "budget", "gates"}))
def test_most_drawn_rows_leave_keys_out(stem):
    rows = []

    def collect(case: Case) -> None:
        rows.append(left_out(case))

    # Ten at a time: after that Hypothesis mostly varies what it has drawn.
    independent = settings(max_examples=10, derandomize=False, database=None)
    for number in range(6):
        hypothesis.seed(number)(independent(given(STRATEGIES[stem]("float32", Limits()))(collect)))()
    assert torch.cat(rows).float().mean() > 0.5


@given(st.sampled_from(sorted(STRATEGIES)).flatmap(lambda stem: STRATEGIES[stem]("float32", Limits(lengths=(7, 16)))))
def test_given_lengths_are_the_only_ones_drawn(case):
    assert (case.S - case.L if case.stem == "decode" else case.L) in (7, 16)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "case: expected JSON, got '{'"),
        ("[]", "case: expected a stem of .*, got None"),
        ('{"stem": "layers"}', "case: expected a stem of .*, got 'layers'"),
        ('{"stem": ["layer"]}', r"case: expected a stem of .*, got \['layer'\]"),
        ('{"stem": "gates", "B": 1}', r"case: expected the fields .*, got \['B'\]"),
    ],
)
def test_wrong_json_is_refused_with_what_was_expected(text, message):
    with pytest.raises(ValueError, match=message):
        Case.from_json(text)


@given(ANY)
def test_unknown_and_missing_fields_are_refused(case):
    given_fields = json.loads(case.to_json())
    for changed in ({**given_fields, "extra": 1}, {k: v for k, v in given_fields.items() if k != "seed"}):
        with pytest.raises(ValueError, match="case: expected the fields"):
            Case.from_json(json.dumps(changed))


# --- families of values -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", VALUES)
def test_every_family_of_values_is_finite_and_of_its_shape(kind):
    x = draw_values(kind, (2, 30, 4), generator())
    assert (x.shape, x.dtype) == ((2, 30, 4), torch.float32)
    assert x.isfinite().all()


def test_families_of_values_do_what_they_say():
    x = {kind: draw_values(kind, (2, 200, 4), generator()) for kind in VALUES}
    assert set(x["ties"].unique().tolist()) == {-1.0, 0.0, 1.0}
    assert len(x["constant"].unique()) == 1
    assert x["tiny"].abs().max() < 0.01 < 1 < x["normal"].abs().max() < 20 < x["huge"].abs().max()
    assert x["smooth"].diff(dim=1).std() < 0.2 * x["normal"].diff(dim=1).std()


def test_closed_heads_have_a_weight_of_exactly_zero():
    x = draw_values("closed", (2, 200, 4), generator())
    closed = torch.sigmoid(x) == 0
    assert 0.2 < closed[..., 0].float().mean() < 0.5
    assert not closed[..., 1:].any()
    assert x.isfinite().all()


def test_families_of_scores_do_what_they_say():
    x = {kind: draw_scores(kind, (1, 50, 200), generator()) for kind in SCORES}
    assert len(x["ties"].unique()) < 40 < 9000 < len(x["normal"].unique())
    assert len(x["constant"].unique()) == 1
    assert len(x["near"].half().unique()) <= 2 < 1000 < len(x["near"].unique())
    assert 0.2 < x["nan"].isnan().float().mean() < 0.4
    special = x["special"]
    assert {math.inf, -math.inf} <= set(special.unique().tolist())
    assert ((special == 0) & special.signbit()).any()
    assert ((special == 0) & ~special.signbit()).any()
    assert ((special != 0) & (special.abs() < torch.finfo(torch.float32).tiny)).any()


@given(st.integers(1, 8), st.integers(0, 8))
def test_causal_scores_hide_exactly_the_future(L, past):
    hidden = causal(torch.zeros(1, L, L + past)) == -math.inf
    expected = [[s > past + t for s in range(L + past)] for t in range(L)]
    assert hidden[0].tolist() == expected


@given(st.sampled_from(((5,), (3, 4), (2, 3, 4), (2, 3, 4, 5))), st.sampled_from((torch.float32, torch.int32)))
def test_layouts_change_the_strides_and_margins_are_poisoned(shape, dtype):
    x = (torch.arange(math.prod(shape)) + 1).reshape(shape).to(dtype)
    permuted, inner = lay_out(x, "permuted"), lay_out(x, "margins")
    assert torch.equal(permuted, x)
    assert torch.equal(inner, x)
    assert not permuted.is_contiguous()
    before = inner.as_strided((1,), (1,), inner.storage_offset() - 1)
    assert before.isnan().all() if dtype == torch.float32 else not before.any()


# --- selections ---------------------------------------------------------------------------------------------------

SIZES = st.tuples(st.integers(1, 2), st.integers(1, 12), st.integers(0, 20), st.integers(1, 30))


@given(st.sampled_from(PATTERNS), SIZES, SEEDS)
def test_selections_keep_the_contract_except_for_holes(pattern, size, seed):
    B, L, past, width = size
    S = L + past
    selection = random_selection(pattern, B, L, S, width, generator(seed))
    assert (selection.indices.shape, selection.counts.shape) == ((B, L, width), (B, L))
    n_valid = torch.arange(L)[:, None] + past + 1
    if pattern != "holes":
        selection.validate(n_keys=S)
        assert (selection.indices < n_valid).all()
    if pattern == "full":
        assert torch.equal(selection.counts, n_valid[:, 0].clamp(max=width).int().expand(B, L))
    if pattern == "window":
        newest = selection.indices.amax(-1)
        assert torch.equal(newest, (n_valid[:, 0] - 1).int().expand(B, L))
    if pattern == "empty":
        assert not selection.counts[:, ::2].any()
        assert (selection.counts[:, 1::2] > 0).all()
    if pattern in ("random", "window", "full"):
        assert (selection.counts > 0).all()


def test_holes_hold_minus_one_and_future_positions_inside_the_prefix():
    selection = random_selection("holes", 2, 12, 20, 10, generator())
    inside = torch.arange(10) < selection.counts[..., None]
    future = selection.indices > (torch.arange(12) + 8)[:, None]
    assert (inside & (selection.indices == -1)).any()
    assert (inside & future).any()


def test_random_selections_reach_every_position():
    """Unlike a permutation of the earlier keys, which never selects the query's own."""
    seen = torch.zeros(8, 8, dtype=torch.bool)
    for seed in range(60):
        indices = random_selection("random", 2, 8, 8, 4, generator(seed)).indices
        for t in range(8):
            seen[t, indices[:, t][indices[:, t] >= 0].long()] = True
    assert torch.equal(seen, torch.ones(8, 8, dtype=torch.bool).tril())


@given(attention_cases("float32", Limits()))
def test_gates_do_not_change_what_else_a_case_draws(case: AttentionCase):
    bare = dataclasses.replace(case, value_gate=False, output_gate=False)
    for name in ("q", "k", "v"):
        assert torch.equal(case.arguments()[name], bare.arguments()[name])


@given(STRATEGIES["attention_backward"]("float32", Limits()))
def test_the_output_gradients_of_a_case_have_the_shapes_of_the_outputs(case):
    """dlse, which a caller that drops lse does not give, is 0 unless the case asks for it."""
    arguments = case.arguments()
    dout, dlse = case.output_gradients()
    assert dout.shape == arguments["q"].shape
    assert dout.dtype == arguments["q"].dtype
    assert dlse.shape == dout.shape[:-1]
    assert dlse.dtype == torch.float32
    assert bool(dlse.any()) == (case.lse_gradient and dlse.numel() > 0)
