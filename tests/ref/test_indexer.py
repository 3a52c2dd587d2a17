"""Gated lightning indexer (Eq. 7)."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import gsa_ref
from gsa_ref import GSAConfig, LightningIndexer, apply_rope, check
from gsa_ref.cases import IndexerCase, Limits, indexer_cases
from tests.ref import oracle

CASES = indexer_cases("float32", Limits(B=3))
CASES64 = indexer_cases("float64", Limits(B=3))
# Not saturated: no sigmoid of these is so near to 0 or 1 that float64 cannot see it move.
MILD64 = CASES64.filter(lambda case: case.values != "huge")


def scores_of(case: IndexerCase, **changes: object) -> torch.Tensor:
    return gsa_ref.indexer_scores(**{**case.arguments(), **changes}, scale=case.scale)


def visible(case: IndexerCase) -> np.ndarray:
    """[B, L, S]: s ≤ start + t, and both positions below lengths; written with loops."""
    mask = np.zeros((case.B, case.L, case.S), bool)
    for b in range(case.B):
        start = case.start[b] if isinstance(case.start, tuple) else case.start
        length = case.S if case.lengths is None else case.lengths[b]
        for t in range(case.L):
            for s in range(case.S):
                mask[b, t, s] = s <= start + t and s < length and start + t < length
    return mask


def all_visible(case: IndexerCase) -> dict[str, object]:
    """Queries behind all keys, none of them padding."""
    return {**case.arguments(), "start": case.S, "lengths": torch.full((case.B,), case.S + case.L, dtype=torch.int32)}


@given(CASES64)
def test_float64_scores_equal_the_equations(case):
    arguments = case.arguments()
    scores, gold = scores_of(case), oracle.indexer_scores(arguments, case.scale)
    tolerance = oracle.indexer_tolerance(arguments, case.scale)
    assert scores.dtype == torch.float64
    for b in range(case.B):
        assert check.score_verdict(scores[b].numpy(), gold[b], tolerance[b])


@given(st.sampled_from(("float32", "float16", "bfloat16")).flatmap(lambda d: indexer_cases(d, Limits(B=3))))
def test_scores_lie_within_the_tolerance_of_the_equations_on_the_same_rounded_inputs(case):
    arguments = case.arguments()
    scores, gold = scores_of(case), oracle.indexer_scores(arguments, case.scale)
    tolerance = oracle.indexer_tolerance(arguments, case.scale)
    assert scores.dtype == torch.float32
    for b in range(case.B):
        assert check.score_verdict(scores[b].numpy(), gold[b], tolerance[b])


@given(CASES)
def test_minus_infinity_exactly_where_a_query_may_not_look(case):
    scores = scores_of(case).numpy()
    np.testing.assert_array_equal(scores != -np.inf, visible(case))


@pytest.mark.property(1)
@given(CASES)
def test_scores_lie_between_zero_and_the_number_of_heads(case):
    scores = scores_of(case)
    scores = scores[scores != -torch.inf]
    assert ((scores >= 0) & (scores <= case.H_I)).all()


@pytest.mark.property(2)
@given(MILD64, st.integers(0, 3), st.sampled_from(("head_logits", "bias")))
def test_scores_rise_with_a_head_weight_and_with_a_bias(case, head, name):
    arguments = all_visible(case)
    raised = arguments[name].clone()
    raised[..., head % case.H_I] += 1
    before = gsa_ref.indexer_scores(**arguments, scale=case.scale)
    after = gsa_ref.indexer_scores(**{**arguments, name: raised}, scale=case.scale)
    assert (after > before).all()


@pytest.mark.property(3)
@given(CASES, st.randoms(use_true_random=False))
def test_a_permutation_of_the_keys_permutes_the_columns(case, random):
    arguments = all_visible(case)
    order = random.sample(range(case.S), case.S)
    permuted = {**arguments, "k_idx": arguments["k_idx"][:, order]}
    difference = gsa_ref.indexer_scores(**permuted, scale=case.scale)
    difference = difference - gsa_ref.indexer_scores(**arguments, scale=case.scale)[:, :, order]
    assert (difference.abs().numpy() <= 2 * oracle.indexer_tolerance(permuted, case.scale)).all()


@pytest.mark.property(4)
@given(CASES, st.randoms(use_true_random=False))
def test_a_permutation_of_the_heads_changes_nothing(case, random):
    arguments = all_visible(case)
    order = random.sample(range(case.H_I), case.H_I)
    permuted = {
        **arguments,
        "q_idx": arguments["q_idx"][:, :, order],
        "head_logits": arguments["head_logits"][:, :, order],
        "bias": arguments["bias"][order],
    }
    difference = gsa_ref.indexer_scores(**permuted, scale=case.scale)
    difference = difference - gsa_ref.indexer_scores(**arguments, scale=case.scale)
    assert (difference.abs().numpy() <= 2 * oracle.indexer_tolerance(arguments, case.scale)).all()


@pytest.mark.property(5)
@given(CASES, st.integers(0, 40), st.sampled_from((1.0, math.inf, math.nan)))
def test_future_perturbation_leaves_earlier_rows_bitwise_equal(case, position, noise):
    arguments = oracle.contiguous(case.arguments())
    before = gsa_ref.indexer_scores(**arguments, scale=case.scale)
    start = torch.as_tensor(arguments["start"]).reshape(-1, 1)
    late = (start + torch.arange(case.L)).expand(case.B, case.L) >= position
    changed = {name: arguments[name].clone() for name in ("q_idx", "k_idx", "head_logits")}
    changed["q_idx"][late] += noise
    changed["head_logits"][late] -= noise
    changed["k_idx"][:, position:] += noise
    after = gsa_ref.indexer_scores(**{**arguments, **changed}, scale=case.scale)
    assert torch.equal(after[~late], before[~late])


@pytest.mark.property(6)
@given(CASES)
def test_a_batch_slice_does_not_see_its_neighbours(case):
    """Bitwise when only the neighbours' values change, within 2ε when they are gone.

    Matrix products of another batch size may add in another order.
    """
    arguments = oracle.contiguous(case.arguments())
    scores = gsa_ref.indexer_scores(**arguments, scale=case.scale)
    tolerance = oracle.indexer_tolerance(arguments, case.scale)
    for b in range(case.B):
        others = {name: arguments[name].clone() for name in ("q_idx", "k_idx", "head_logits")}
        for tensor in others.values():
            kept = tensor[b].clone()
            tensor.fill_(math.nan)
            tensor[b] = kept
        with_others = gsa_ref.indexer_scores(**{**arguments, **others}, scale=case.scale)
        assert torch.equal(with_others[b], scores[b])
        sequence = oracle.alone(arguments, b, shared=("bias",))
        by_itself = gsa_ref.indexer_scores(**sequence, scale=case.scale)[0].numpy()
        assert check.score_verdict(by_itself, scores[b].double().numpy(), 2 * tolerance[b])


@pytest.mark.property(7)
@given(CASES, st.integers(1, 20), st.integers(1, 40))
def test_scores_do_not_depend_on_the_blocks_they_are_computed_in(case, rows, columns):
    arguments = {**case.arguments(), "lengths": None}
    whole = gsa_ref.indexer_scores(**arguments, scale=case.scale).double().numpy()
    blocks = np.full_like(whole, math.nan)
    start = torch.as_tensor(arguments["start"], dtype=torch.int32).expand(case.B)
    for t in range(0, case.L, rows):
        for s in range(0, case.S, columns):
            block = {
                "q_idx": arguments["q_idx"][:, t : t + rows],
                "k_idx": arguments["k_idx"][:, s : s + columns],
                "head_logits": arguments["head_logits"][:, t : t + rows],
                "bias": arguments["bias"],
                "start": start + (t - s),
                "lengths": torch.full((case.B,), case.S - s, dtype=torch.int32),
            }
            blocks[:, t : t + rows, s : s + columns] = gsa_ref.indexer_scores(**block, scale=case.scale)
    tolerance = oracle.indexer_tolerance(arguments, case.scale)
    for b in range(case.B):
        assert check.score_verdict(blocks[b], whole[b], 2 * tolerance[b])


@pytest.mark.property(8)
@given(CASES, st.sampled_from((1e5, math.inf)))
def test_bias_limits_close_and_open_every_head(case, bias):
    """b → −∞ gives 0, b → +∞ gives Σ_j σ(head_logits_j)."""
    arguments = all_visible(case)
    for sign, expected in ((-1, 0.0), (1, torch.sigmoid(arguments["head_logits"].double()).sum(-1, keepdim=True))):
        arguments["bias"] = torch.full((case.H_I,), sign * bias)
        scores = gsa_ref.indexer_scores(**arguments, scale=case.scale).double()
        budget = 0.0 if sign < 0 else case.H_I * (check.SIGMOID_ERROR["exact"] + check.gamma(2 * case.H_I))
        assert ((scores - expected).abs() <= budget).all()


@pytest.mark.property(9)
@given(indexer_cases("float32", Limits()).filter(lambda case: case.layout != "contiguous"))
def test_strided_inputs_equal_contiguous_ones(case):
    """Within 2ε, because a transposed matrix product may add in another order."""
    arguments = case.arguments()
    strided = gsa_ref.indexer_scores(**arguments, scale=case.scale)
    plain = gsa_ref.indexer_scores(**oracle.contiguous(arguments), scale=case.scale).double().numpy()
    tolerance = oracle.indexer_tolerance(arguments, case.scale)
    for b in range(case.B):
        assert check.score_verdict(strided[b].numpy(), plain[b], 2 * tolerance[b])


@pytest.mark.property(57)
@given(CASES)
def test_reruns_are_bitwise_equal(case):
    assert torch.equal(scores_of(case), scores_of(case))


@given(CASES, st.integers(0, 5))
def test_one_start_for_all_equals_the_same_start_for_each(case, start):
    each = torch.full((case.B,), start, dtype=torch.int32)
    assert torch.equal(scores_of(case, start=start), scores_of(case, start=each))


@given(indexer_cases("bfloat16", Limits()))
def test_sixteen_bit_inputs_are_widened_before_anything_is_computed(case):
    arguments = case.arguments()
    wide = {name: x.float() if torch.is_tensor(x) and x.is_floating_point() else x for name, x in arguments.items()}
    assert torch.equal(scores_of(case), gsa_ref.indexer_scores(**wide, scale=case.scale))


@given(CASES)
def test_autocast_does_not_round_the_scores(case):
    scores = scores_of(case)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(scores_of(case), scores)


@given(CASES, st.data())
def test_a_nan_key_spoils_its_own_column_only(case, data):
    arguments = all_visible(case)
    before = gsa_ref.indexer_scores(**arguments, scale=case.scale)
    b, s = data.draw(st.integers(0, case.B - 1)), data.draw(st.integers(0, case.S - 1))
    arguments["k_idx"] = arguments["k_idx"].clone()
    arguments["k_idx"][b, s, 0] = math.nan
    after = gsa_ref.indexer_scores(**arguments, scale=case.scale)
    expected = torch.zeros(after.shape, dtype=torch.bool)
    expected[b, :, s] = True
    assert torch.equal(after.isnan(), expected)
    assert torch.equal(after[~expected], before[~expected])


@pytest.mark.pitfall("mask-past-46341")
@pytest.mark.parametrize(("L", "S"), [(1, 50_000), (3, 46_343)])
def test_the_causal_mask_is_right_past_46341_tokens(L, S):
    """46,341² is the first square that a 32-bit index cannot hold."""
    q_idx, k_idx = torch.ones(1, L, 1, 1), torch.ones(1, S, 1)
    scores = gsa_ref.indexer_scores(q_idx, k_idx, torch.zeros(1, L, 1), torch.zeros(1), scale=1.0, start=S - L)
    counts = (scores > -torch.inf).sum(-1)[0]
    assert counts.tolist() == [S - L + t + 1 for t in range(L)]


@pytest.mark.pitfall("length-zero")
@pytest.mark.parametrize(("B", "L", "S"), [(0, 3, 4), (2, 0, 4), (2, 3, 0), (0, 0, 0)])
@pytest.mark.parametrize("per_sequence", [False, True])
def test_empty_axes_give_empty_scores(B, L, S, per_sequence):
    start = torch.zeros(B, dtype=torch.int32) if per_sequence else 0
    scores = gsa_ref.indexer_scores(
        torch.ones(B, L, 2, 4), torch.ones(B, S, 4), torch.ones(B, L, 2), torch.ones(2), scale=1.0, start=start
    )
    assert scores.shape == (B, L, S)


@pytest.mark.pitfall("large-batch")
def test_ten_thousand_sequences_in_a_batch():
    q_idx = torch.arange(10_000.0).reshape(-1, 1, 1, 1) / 10_000
    scores = gsa_ref.indexer_scores(
        q_idx, torch.ones(10_000, 2, 1), torch.zeros(10_000, 1, 1), torch.zeros(1), scale=1.0, start=1
    )
    expected = 0.5 * torch.sigmoid(q_idx.double()).expand(-1, 1, 2, 1)[..., 0]
    assert ((scores - expected).abs() <= 2 * check.SIGMOID_ERROR["exact"]).all()


@pytest.mark.property(46)
@given(st.integers(0, 2**16))
def test_gradients_of_the_scores_match_finite_differences(seed):
    g = torch.Generator().manual_seed(seed)
    shapes = ((2, 3, 2, 4), (2, 5, 4), (2, 3, 2), (2,))
    inputs = [torch.randn(shape, generator=g, dtype=torch.float64, requires_grad=True) for shape in shapes]

    def visible_scores(*tensors: torch.Tensor) -> torch.Tensor:
        scores = gsa_ref.indexer_scores(*tensors, scale=0.5, start=1, lengths=torch.tensor([4, 3], dtype=torch.int32))
        return scores[scores > -torch.inf]

    assert torch.autograd.gradcheck(visible_scores, inputs, fast_mode=True)


@pytest.mark.parametrize("rope", [False, True])
def test_the_module_projects_to_one_query_per_head_and_one_key_for_all(rope):
    config = GSAConfig(d=8, H=2, H_kv=1, d_h=4, H_I=3, d_I=4, indexer_rope=rope)
    module = LightningIndexer(config)
    h = torch.randn(2, 5, 8, generator=torch.Generator().manual_seed(0))
    q_idx, k_idx, head_logits = module(h, 7)
    expected_q, expected_k = (h @ module.W_iq.weight.mT).reshape(2, 5, 3, 4), h @ module.W_ik.weight.mT
    if rope:
        expected_q = apply_rope(expected_q, start=7)
        expected_k = apply_rope(expected_k[:, :, None], start=7)[:, :, 0]
    torch.testing.assert_close(q_idx, expected_q)
    torch.testing.assert_close(k_idx, expected_k)
    torch.testing.assert_close(head_logits, h @ module.W_iw.weight.mT)
    assert {name for name, _ in module.named_parameters()} == {"W_iq.weight", "W_ik.weight", "W_iw.weight", "bias"}
    assert not module.bias.any()


def test_a_device_without_autocast_needs_none():
    """The meta device has shapes and no values: a model of any size can be traced there."""
    tensors = [torch.empty(shape, device="meta") for shape in ((2, 3, 2, 4), (2, 5, 4), (2, 3, 2), (2,))]
    assert gsa_ref.indexer_scores(*tensors, scale=0.5).shape == (2, 3, 5)


def test_an_indexer_starts_without_bias_and_rotates_by_the_config_s_base_from_position_0():
    config = GSAConfig(d=8, H=2, H_kv=2, d_h=4, H_I=3, d_I=4, indexer_rope=True, rope_theta=50.0)
    indexer, h = LightningIndexer(config), torch.randn(2, 5, 8)
    assert torch.equal(indexer.bias, torch.zeros(3))
    q_idx, k_idx, _ = indexer(h)
    q, k = indexer.W_iq(h).unflatten(-1, (3, 4)), indexer.W_ik(h)[:, :, None]
    assert torch.equal(q_idx, apply_rope(q, start=0, theta=50.0))
    assert torch.equal(k_idx, apply_rope(k, start=0, theta=50.0)[:, :, 0])
