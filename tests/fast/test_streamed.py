"""Streamed `indexed_selection`: exact for the scores that it computed, whatever was sampled, shortlisted or redone.

`sample_scores_kernel`, given every key as its sample, shows the scores that the streamed kernels compute; on these the
selection must equal the stable sort, with no tolerance.
"""

import math
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
import triton
from hypothesis import given
from hypothesis import strategies as st

import gsa_fast
from gsa_fast import selection as package
from gsa_fast.selection import streamed
from gsa_fast.selection.streamed import Plan, rows_per_chunk, shortlist_plan, shortlist_size
from gsa_fast.selection.threshold import sample_positions
from gsa_fast.verification.checks import gold_scores, indexed_selection_verdicts, numpy
from gsa_fast.verification.interpreter import poisoned_memory, small_tiles
from gsa_ref import GSAConfig, Selection, equations
from gsa_ref.cases import Limits, indexed_selection_cases
from gsa_ref.check import variance_interval
from tests.fast.helpers import DTYPES, alone, examples, int32, same, widely_strided
from tests.strategies import RULES

# 300 keys are 10 tiles and 5 spans, sampled one by 16; a chunk holds 4 rows, or the samples of 3.
L, S = 6, 300
SAMPLED: dict[str, Any] = {
    "BLOCK_L": 16,
    "BLOCK_S": 32,
    "SPAN": 64,
    "CAPACITY": 64,
    "LARGE_CAPACITY": 128,
    "LARGEST_CAPACITY": 256,
    "MIN_PROGRAMS": 3,
    "CHUNK_BYTES": 8 * 2 * 128 * 4,
    "SAMPLE_BYTES": 4 * 19 * 3,
    "Z": 1.0,
}
PATTERNS = (
    "random", "rising", "falling", "periodic", "constant", "two values", "outlier", "window", "start", "clusters"
)  # fmt: skip
MODES = st.sampled_from((False, True))  # whether σ is approximate


@contextmanager
def constants(**changed: Any) -> Iterator[None]:
    """Module constants of `streamed` for the duration of the block: those of SAMPLED, with these changes."""
    with ExitStack() as stack:
        for name, value in {**SAMPLED, **changed}.items():
            stack.enter_context(mock.patch.object(streamed, name, value))
        yield


@dataclass
class Launches:
    """Stands in for a kernel of `streamed`, and remembers the arguments of its launches."""

    kernel: Any
    seen: list[dict[str, Any]] = field(default_factory=list)

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        def launch(*arguments: Any, **options: Any) -> None:
            self.kernel[grid](*arguments, **options)
            named = dict(zip(self.kernel.arg_names, arguments, strict=False))
            self.seen.append({**named, **options, "grid": grid})

        return launch


@dataclass
class Result:
    """What one call of `indexed_selection` returned, and how it got there."""

    selection: Selection
    variance: torch.Tensor
    plan: Plan
    launches: dict[str, list[dict[str, Any]]]

    @property
    def tensors(self) -> tuple[torch.Tensor, ...]:
        return *self.selection, self.variance

    @property
    def redone(self) -> list[int]:
        """Rows, [B, L] flattened, that were computed again."""
        (launch,) = self.launches["redo_kernel"]
        return sorted(launch["failed_ptr"][: int(launch["n_failed_ptr"])].tolist())


KERNELS = (
    "sample_scores_kernel",
    "threshold_kernel",
    "shortlist_kernel",
    "select_kernel",
    "select_large_kernel",
    "redo_kernel",
)


def run(
    arguments: dict[str, Any],
    config: GSAConfig,
    *,
    mean_variance: float = 0.0,
    approximate: bool = False,
    plan: Plan | None = None,
) -> Result:
    """`indexed_selection`, streamed, with its launches recorded; `plan` overrides the shape's."""
    plans = []

    def chosen(*shape: int) -> Plan:
        plans.append(plan or shortlist_plan(*shape))
        assert plans[-1] is not None, "these inputs would not be streamed"
        return plans[-1]

    with ExitStack() as stack:
        spies = {}
        for name in KERNELS:
            spies[name] = Launches(getattr(streamed, name))
            stack.enter_context(mock.patch.object(streamed, name, spies[name]))
        stack.enter_context(mock.patch.object(package, "shortlist_plan", chosen))
        stack.enter_context(poisoned_memory())
        selection, variance = gsa_fast.indexed_selection(
            **arguments,
            mean_variance=mean_variance,
            config=config,
            sigmoid_mode=package.SIGMOID_MODES[approximate],
            impl="triton",
        )
    return Result(selection, variance, plans[0], {name: spy.seen for name, spy in spies.items()})


def inputs(
    pattern: str, device: str, *, B: int = 1, H_I: int = 3, d_I: int = 5, n: int = L, n_keys: int = S, seed: int = 0
) -> dict[str, Any]:
    """Arguments of `indexed_selection` whose scores follow a pattern over the positions; every key of it is visible."""
    g = torch.Generator().manual_seed(seed)
    q_idx, k_idx = torch.randn(B, n, H_I, d_I, generator=g), torch.randn(B, n_keys, d_I, generator=g)
    head_logits, bias = torch.randn(B, n, H_I, generator=g), torch.randn(H_I, generator=g)
    if pattern != "random":
        # Only the first channel counts, and every head's score rises with it.
        q_idx[..., 0] = 1 + q_idx[..., 0].abs()
        k_idx = torch.zeros(B, n_keys, d_I)
        k_idx[..., 0] = levels(pattern, n_keys, g)
    arguments = {"q_idx": q_idx, "k_idx": k_idx, "head_logits": head_logits, "bias": bias}
    return {**{name: x.to(device) for name, x in arguments.items()}, "start": n_keys - n, "lengths": None}


def levels(pattern: str, n_keys: int, g: torch.Generator) -> torch.Tensor:
    s, noise = torch.arange(n_keys), torch.rand(n_keys, generator=g)
    marked = {
        "periodic": s % 16 == int(torch.randint(16, (), generator=g)),  # one key of each block that is sampled
        "two values": noise < 0.1,
        "outlier": s == int(torch.randint(n_keys, (), generator=g)),
        "window": s >= n_keys - 40,
        "start": s < 20,
        "clusters": (s // 8 % 7 == 0),
    }
    if pattern in marked:
        return marked[pattern] * 2.0 + (noise if pattern in ("periodic", "window", "start", "clusters") else 0.0)
    return {"rising": s / n_keys * 4 - 2, "falling": 2 - s / n_keys * 4, "constant": torch.full((n_keys,), 0.5)}[
        pattern
    ]


def configuration(arguments: dict[str, Any], **changed: Any) -> GSAConfig:
    H_I, d_I = arguments["q_idx"].shape[2:]
    return GSAConfig(**{"H_I": H_I, "d_I": d_I, "k_base": 8, "k_min": 2, "k_max": 24, **changed})


def computed_scores(arguments: dict[str, Any], config: GSAConfig, approximate: bool = False) -> torch.Tensor:
    """The scores that the streamed kernels compute, float32 [B, L, S], −inf where a query may not look."""
    q, k, w, bias = (arguments[name] for name in ("q_idx", "k_idx", "head_logits", "bias"))
    (B, n, H_I, d_I), n_keys = q.shape, k.shape[1]
    scores = torch.empty(B, n, n_keys, device=q.device)
    block_l, block_s = min(streamed.BLOCK_L, 32), streamed.BLOCK_S
    programs = triton.cdiv(n, block_l) * triton.cdiv(n_keys, streamed.SAMPLE_TILES * block_s) * B
    streamed.sample_scores_kernel[(programs,)](
        q, k, w, bias, scores, *q.stride(), *k.stride(), *w.stride(), *bias.stride(),
        n, n_keys, config.effective_indexer_scale, H_I=H_I, d_I=d_I, BLOCK_L=block_l, BLOCK_S=block_s,
        BLOCK_D=max(16, triton.next_power_of_2(d_I)), TILES=streamed.SAMPLE_TILES, APPROXIMATE=approximate,
    )  # fmt: skip
    start, length = (per_sequence(arguments[name], default) for name, default in (("start", 0), ("lengths", n_keys)))
    position = start + torch.arange(n)  # [B, L]
    s = torch.arange(n_keys)
    visible = (s <= position[..., None]) & (s < length[..., None]) & (position < length)[..., None]
    return scores.masked_fill(~visible.to(q.device), -math.inf)


def per_sequence(value: int | torch.Tensor | None, default: int) -> torch.Tensor:
    return torch.as_tensor(default if value is None else value).cpu().reshape(-1, 1)


def assert_right(
    result: Result,
    arguments: dict[str, Any],
    config: GSAConfig,
    mean_variance: float = 0.0,
    approximate: bool = False,
) -> None:
    """Exact on rows that kept their first scores, and within ε of the equations on all."""
    mode = package.SIGMOID_MODES[approximate]
    for verdict in indexed_selection_verdicts(
        arguments, config, mean_variance, result.selection, result.variance, 0, mode
    ):
        assert verdict, verdict
    scores = computed_scores(arguments, config, approximate)
    kept = torch.ones(scores.shape[:2], dtype=torch.bool, device=scores.device)
    kept.view(-1)[result.redone] = False
    n_valid = (scores != -math.inf).sum(-1, dtype=torch.int32)
    sizes = {"k_base": config.k_base, "k_min": config.k_min, "k_max": config.k_max, "rule": config.rule}
    budget = gsa_fast.token_budget(result.variance, mean_variance, n_valid, **sizes, impl="reference")
    expected = gsa_fast.select_tokens(scores, budget, width=result.selection.indices.shape[-1], impl="reference")
    assert same([x[kept] for x in result.selection], [x[kept] for x in expected])
    gold, row_scores = equations.score_variance(numpy(scores[kept])), numpy(scores[kept])
    if len(gold):
        largest = np.where(np.isfinite(row_scores), row_scores, 0).max(-1)
        low, high = variance_interval(gold, np.zeros(len(gold)), largest, numpy(n_valid[kept]))
        assert ((low <= numpy(result.variance[kept])) & (numpy(result.variance[kept]) <= high)).all()


# --- what these tests exercise ------------------------------------------------------------------------------------


@pytest.mark.parametrize("B", [1, 2])
def test_these_inputs_are_sampled_in_several_chunks_parts_splits_segments_spans_and_tiles(B, device):
    arguments = inputs("random", device, B=B)
    with constants():
        result = run(arguments, configuration(arguments))
    assert result.plan == Plan(16, 128)
    shortlists = result.launches["shortlist_kernel"]
    assert [launch["rows"] for launch in shortlists] == [4, 2]
    parts = [launch["rows"] for launch in result.launches["sample_scores_kernel"]]
    assert parts == ([3, 1, 2] if B == 1 else [1] * 6)
    assert shortlists[0]["spans"] == 5
    assert shortlists[0]["splits"] == (3 if B == 1 else 2)  # an odd and an even number
    assert shortlists[0]["segment"] == 128
    assert len(result.launches["select_large_kernel"]) == 2
    sizes = shortlists[0]["sizes_ptr"].view(-1, shortlists[0]["splits"])[: 4 * B].sum(-1)
    assert (sizes < 128).all()


def test_chunks_of_several_tiles_of_rows(device):
    arguments = inputs("random", device, n=34)
    config = configuration(arguments)
    with constants(CHUNK_BYTES=8 * 128 * 33, SAMPLE_BYTES=4 * 19 * 30):
        result = run(arguments, config)
        assert_right(result, arguments, config)
    assert [launch["rows"] for launch in result.launches["shortlist_kernel"]] == [32, 2]
    assert [launch["rows"] for launch in result.launches["sample_scores_kernel"]] == [16, 16, 2]


# --- given the computed scores, the stable sort -------------------------------------------------------------------


@pytest.mark.parametrize("pattern", PATTERNS)
@examples(2)
@given(
    seed=st.integers(0, 2**16), approximate=MODES, rule=RULES, mean_variance=st.sampled_from((0.0, 0.01, 0.1)),
    z=st.sampled_from((1.0, 4.5, 0.0)),
)  # fmt: skip
def test_selection_is_the_stable_sort_of_the_computed_scores(
    pattern, seed, approximate, rule, mean_variance, z, device
):
    arguments = inputs(pattern, device, seed=seed)
    config = configuration(arguments, rule=rule)
    with constants(Z=z):
        result = run(arguments, config, mean_variance=mean_variance, approximate=approximate, plan=Plan(16, 128))
        assert_right(result, arguments, config, mean_variance, approximate)


@pytest.mark.parametrize("H_I", range(1, 9))
def test_any_number_of_heads_up_to_the_largest(H_I, device):
    """Even and odd: two heads share a division."""
    arguments = inputs("random", device, H_I=H_I, d_I=(1, 3, 16, 20)[H_I % 4], n=2, seed=H_I)
    config = configuration(arguments)
    with constants():
        result = run(arguments, config)
        assert_right(result, arguments, config)


@pytest.mark.usefixtures("bf16")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("approximate", [False, True])
def test_every_dtype_is_sampled(dtype, approximate, device):
    arguments = inputs("random", device, B=2, H_I=2, d_I=20, n=3)
    for name in ("q_idx", "k_idx", "head_logits"):
        arguments[name] = arguments[name].to(getattr(torch, dtype))
    config = configuration(arguments)
    with constants():
        result = run(arguments, config, approximate=approximate)
        assert_right(result, arguments, config, approximate=approximate)


@pytest.mark.usefixtures("bf16")
@pytest.mark.parametrize("approximate", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("H_I", "d_I"), [(4, 65), (4, 128), (2, 256), (1, 512)])
def test_wide_indexers(H_I, d_I, dtype, approximate, device):
    """With the tiles of a device: those of float32 differ above 64 channels. Ten of the rows see a NaN: are redone."""
    arguments = inputs("random", device, H_I=H_I, d_I=d_I, n=34, n_keys=70)
    arguments["k_idx"][:, 60] = torch.nan
    for name in ("q_idx", "k_idx", "head_logits"):
        arguments[name] = arguments[name].to(getattr(torch, dtype))
    config = configuration(arguments)
    result = run(arguments, config, approximate=approximate)
    assert result.redone == list(range(24, 34))
    mode = package.SIGMOID_MODES[approximate]
    for verdict in indexed_selection_verdicts(arguments, config, 0.0, result.selection, result.variance, 0, mode):
        assert verdict, verdict


@pytest.mark.parametrize(("block_s", "span"), [(16, 64), (64, 128)])
def test_tiles_of_half_and_of_two_words_of_bits(block_s, span, device):
    """The ranks inside a tile come from the bits of one word, or of two."""
    arguments = inputs("random", device)
    config = configuration(arguments)
    with constants(BLOCK_S=block_s, SPAN=span, LARGE_CAPACITY=256):
        result = run(arguments, config, plan=Plan(16, 256))
        assert_right(result, arguments, config)


@pytest.mark.parametrize(("mean_variance", "k"), [(1e-9, 24), (1e9, 3), (0.0, 8)])
def test_budgets_are_clamped_and_cut_to_the_row(mean_variance, k, device):
    """k_max, k_min and k_base; a row with fewer keys takes what there is."""
    arguments = {**inputs("random", device), "start": 0}
    config = configuration(arguments, k_min=3)
    with constants():
        late = {**arguments, "start": S - L}
        result = run(late, config, mean_variance=mean_variance)
        assert_right(result, late, config, mean_variance)
        early = run(arguments, config, mean_variance=mean_variance)
        assert_right(early, arguments, config, mean_variance)
    assert result.selection.counts.tolist() == [[k] * L]
    assert (early.selection.counts[0] <= torch.arange(1, L + 1, device=device)).all()


@pytest.mark.parametrize("plan", [Plan(1, 512), Plan(4, 256), Plan(8, 128)])
def test_the_selection_does_not_depend_on_how_it_was_sampled(plan, device):
    """Bitwise, the variance too: rows shortlisted whole, densely and coarsely sampled ones."""
    arguments = inputs("random", device, B=2, n=4)
    config = configuration(arguments)
    with constants(LARGE_CAPACITY=512):
        expected, result = (run(arguments, config, mean_variance=0.02, plan=p) for p in (Plan(16, 128), plan))
        assert_right(result, arguments, config, 0.02)
    assert expected.redone == result.redone == []
    assert same(result.tensors, expected.tensors)


# --- what may change a result, and what may not -------------------------------------------------------------------

# SPAN is not among them: the moments of a span are merged in another order than those of its tiles.
NEUTRAL: tuple[dict[str, Any], ...] = (
    {"CHUNK_BYTES": 1, "SAMPLE_BYTES": 1},
    {"CHUNK_BYTES": 2**20, "SAMPLE_BYTES": 2**20},
    {"MIN_PROGRAMS": 1},
    {"MIN_PROGRAMS": 1000},
    {"Z": 0.5},
    {"Z": 2.0},
    {"SAMPLE_TILES": 1},
    {"CAPACITY": 32},
)


@pytest.mark.property(7)
@pytest.mark.parametrize("changed", NEUTRAL, ids=str)
def test_chunks_splits_capacities_and_luck_change_nothing_bitwise(changed, device):
    """Rows that are not computed again are bitwise the same."""
    arguments = inputs("random", device, B=2)
    config = configuration(arguments)
    plan = Plan(16, 128)
    with constants(Z=2.0):
        expected = run(arguments, config, mean_variance=0.02, plan=plan)
    with constants(**{"Z": 2.0, **changed}):
        result = run(arguments, config, mean_variance=0.02, plan=plan)
        assert_right(result, arguments, config, 0.02)
    kept = torch.ones(2 * L, dtype=torch.bool, device=device)
    kept[expected.redone + result.redone] = False
    assert kept.sum() > L
    assert same([x.flatten(0, 1)[kept] for x in result.tensors], [x.flatten(0, 1)[kept] for x in expected.tensors])


@pytest.mark.parametrize("span", [32, 128, 4096])
def test_spans_change_the_variance_within_its_interval_only(span, device):
    arguments = inputs("random", device)
    config = configuration(arguments)
    with constants(SPAN=span):
        result = run(arguments, config, mean_variance=0.02, plan=Plan(16, 128))
        assert_right(result, arguments, config, 0.02)


@pytest.mark.property(19)
@examples(4)
@given(seed=st.integers(0, 2**16), pattern=st.sampled_from(("random", "two values", "constant")), approximate=MODES)
def test_thresholds_never_decide_what_is_selected(device, seed, pattern, approximate):
    """With random thresholds and tie positions the result is exact; shortlists that miss something are redone."""
    g = torch.Generator().manual_seed(seed)

    def random_thresholds(*arguments: Any) -> None:
        threshold, tie = arguments[-2:]
        guess = torch.rand(threshold.shape, generator=g) * 3
        if pattern != "random":  # exactly at one of the scores, where the tie position matters
            guess = scores[0, torch.randint(L, guess.shape, generator=g), torch.randint(S, guess.shape, generator=g)]
            guess = torch.where(guess > 0, guess, 0.5)
        threshold.copy_(guess)
        tie.copy_(torch.randint(S + 1, tie.shape, generator=g))

    arguments = inputs(pattern, device, seed=seed)
    config = configuration(arguments)
    with constants(), mock.patch.object(streamed, "launch_thresholds", random_thresholds):
        scores = computed_scores(arguments, config, approximate).cpu()
        result = run(arguments, config, approximate=approximate, plan=Plan(16, 128))
        assert_right(result, arguments, config, approximate=approximate)


@pytest.mark.property(57)
@pytest.mark.pitfall("reruns-differ")
@examples(3)
@given(indexed_selection_cases("float32", Limits(B=2, L=6, S=60)))
def test_reruns_are_bitwise_equal(device, case):
    arguments = case.arguments(device)
    with small_tiles():
        results = [run(arguments, case.config, mean_variance=case.mean_variance, plan=Plan(4, 32)) for _ in range(2)]
    assert same(results[0].tensors, results[1].tensors)


@pytest.mark.property(6, 17)
@pytest.mark.parametrize("pattern", ["random", "clusters"])
def test_a_batch_slice_equals_the_sequence_alone_bitwise(pattern, device):
    """Although the batch decides how many rows a chunk has and into how many splits they fall."""
    arguments = inputs(pattern, device, B=3)
    arguments.update(start=int32([S - L, 150, 2], device), lengths=int32([S, 153, 300], device))
    config = configuration(arguments)
    with constants(Z=3.0):
        whole = run(arguments, config, mean_variance=0.02)
        assert_right(whole, arguments, config, 0.02)
        for b in range(3):
            one = run(alone(arguments, b), config, mean_variance=0.02)
            assert same(one.tensors, tuple(x[b : b + 1] for x in whole.tensors))


@pytest.mark.parametrize("approximate", [False, True])
def test_the_stored_path_selects_the_same_up_to_rounding(approximate, device):
    """Two ways to compute the scores: each passes the certificate, and far from the threshold they agree."""
    arguments = inputs("clusters", device)
    config = configuration(arguments, rule="fixed")
    with constants():
        result = run(arguments, config, approximate=approximate)
        assert_right(result, arguments, config, approximate=approximate)
    with mock.patch.object(package, "shortlist_plan", return_value=None):
        stored, _ = gsa_fast.indexed_selection(**arguments, mean_variance=0.0, config=config, impl="triton")
    assert same(stored.counts, result.selection.counts)
    mode = package.SIGMOID_MODES[approximate]
    for _, rows, gold, tolerance in gold_scores(arguments, config.effective_indexer_scale, 0, mode):
        for t in range(rows.start, rows.stop):
            a, b = (set(x.indices[0, t].tolist()) for x in (stored, result.selection))
            disputed = gold[t - rows.start, sorted(a ^ b)]
            assert len(disputed) == 0 or np.ptp(disputed) <= 4 * tolerance.max()


# --- what a row may look like -------------------------------------------------------------------------------------


@pytest.mark.property(12, 24)
@pytest.mark.parametrize("value", [-3.0, 0.5, 100.0])
@pytest.mark.parametrize("approximate", [False, True])
def test_equal_scores_have_variance_zero_and_give_the_lowest_positions(value, approximate, device):
    """Exactly, from a sample and with ties past the tile of the last one needed."""
    arguments = inputs("constant", device)
    arguments["k_idx"][..., 0] = value
    config = configuration(arguments)
    with constants(Z=3.0):
        result = run(arguments, config, approximate=approximate)
    assert result.redone == []
    assert not result.variance.any()
    assert result.selection.indices[..., :8].tolist() == [[list(range(8))] * L]
    assert result.selection.counts.tolist() == [[8] * L]


@pytest.mark.property(5)
@pytest.mark.parametrize("approximate", [False, True])
def test_rows_that_see_a_nan_key_are_redone_and_rows_before_it_stay_bitwise_the_same(approximate, device):
    """A NaN among the keys makes the variance NaN, so no such row trusts its shortlist."""
    n, first = 12, S - 12 + 7
    arguments = inputs("random", device, n=n)
    config = configuration(arguments)
    poisoned = {**arguments, "k_idx": arguments["k_idx"].clone()}
    poisoned["k_idx"][:, first:] = math.nan
    with constants(Z=3.0):
        before, after = (run(a, config, approximate=approximate) for a in (arguments, poisoned))
        assert_right(after, poisoned, config, approximate=approximate)
    assert before.redone == []
    assert after.redone == list(range(7, n))
    assert same([x[:, :7] for x in after.tensors], [x[:, :7] for x in before.tensors])
    assert not after.variance.isnan().any()
    assert after.selection.indices.max() < first


def test_nan_keys_in_the_middle_are_selected_last(device):
    """With a budget for more keys than have a number for a score, NaN fill up, lowest positions first."""
    arguments = {**inputs("random", device), "start": 14}
    arguments["k_idx"][:, 3:13] = math.nan
    config = configuration(arguments, k_base=10, k_max=24, rule="fixed")
    with constants(CAPACITY=8):
        result = run(arguments, config, plan=Plan(4, 128))
        assert_right(result, arguments, config)
    assert result.redone == list(range(L))
    assert result.selection.indices[0, 0, :10].tolist() == [0, 1, 2, 3, 4, 5, 6, 7, 13, 14]


@pytest.mark.parametrize("name", ["q_idx", "head_logits"])
def test_a_nan_query_spoils_its_own_row_only(name, device):
    arguments = inputs("random", device)
    config = configuration(arguments)
    with constants(Z=3.0):
        before = run(arguments, config)
        arguments[name][:, 2, 0] = math.nan
        after = run(arguments, config)
    assert (before.redone, after.redone) == ([], [2])
    others = [t for t in range(L) if t != 2]
    assert same([x[:, others] for x in after.tensors], [x[:, others] for x in before.tensors])
    assert after.selection.indices[0, 2, :9].tolist() == [*range(8), -1]


@pytest.mark.parametrize("biases", [(-1e4, 0.0, 0.3), (-1e4,) * 3, (1e4, 0.0, -1e4), (1e4,) * 3, (-1e38, 1e38, 0.0)])
@pytest.mark.parametrize("approximate", [False, True])
def test_heads_that_are_switched_off_or_saturated(biases, approximate, device):
    """e = exp(−z) of 10^4 overflows, and the product of two heads' 1 + e would sooner."""
    arguments = inputs("random", device)
    arguments["bias"] = torch.tensor(biases, device=device)
    config = configuration(arguments)
    with constants(Z=3.0):
        result = run(arguments, config, approximate=approximate)
        assert_right(result, arguments, config, approximate=approximate)
    assert result.redone == []
    if len(set(biases)) == 1:  # every score is the same
        assert result.selection.indices[..., :8].tolist() == [[list(range(8))] * L]


@pytest.mark.parametrize("approximate", [False, True])
def test_infinite_biases_count_as_zero_or_one(approximate, device):
    arguments = inputs("random", device, H_I=2)
    config = configuration(arguments)
    arguments["bias"] = torch.tensor([math.inf, -math.inf], device=device)
    with constants(Z=3.0):
        result = run(arguments, config, approximate=approximate)
        scores = computed_scores(arguments, config, approximate)[0, -1]
    assert torch.allclose(scores, arguments["head_logits"][0, -1, 0].sigmoid().expand(S))
    assert result.redone == []
    assert result.selection.indices[..., :8].tolist() == [[list(range(8))] * L]


@pytest.mark.parametrize("start", [0, 1, 60, 64, 65, 293, S, 5 * S])
def test_any_start_given_as_a_number(start, device):
    """Around `CAPACITY`, where sampling begins; a query past the last key is padding."""
    arguments = {**inputs("random", device), "start": start}
    config = configuration(arguments)
    with constants():
        result = run(arguments, config)
        assert_right(result, arguments, config)
    assert bool(result.selection.counts.any()) == (start < S)


def test_starts_and_lengths_of_each_sequence(device):
    """As tensors, where the host does not know which samples a query may see: those of the last key, too."""
    arguments = inputs("rising", device, B=4)
    arguments.update(start=int32([S - L, 0, 200, 250], device), lengths=int32([S, S, 203, 0], device))
    config = configuration(arguments)
    with constants(Z=2.0, SAMPLE_BYTES=2**20, CHUNK_BYTES=2**20):
        result = run(arguments, config)
        assert_right(result, arguments, config)
    assert result.selection.counts.tolist() == [[8] * L, [1, 2, 3, 4, 5, 6], [8, 8, 8, 0, 0, 0], [0] * L]
    assert result.selection.indices[0, -1, :8].tolist() == list(range(S - 8, S))


@pytest.mark.parametrize(("n", "n_keys"), [(1, S), (1, 1), (3, 1), (1, 65), (1, 64)])
def test_one_query_or_one_key(n, n_keys, device):
    arguments = inputs("random", device, n=n, n_keys=n_keys)
    arguments["start"] = max(0, n_keys - n)
    config = configuration(arguments)
    with constants():
        result = run(arguments, config)
        assert_right(result, arguments, config)
    assert (result.plan.stride > 1) == (n_keys > 64)


@pytest.mark.parametrize(("H_I", "d_I"), [(streamed.MAX_HEADS + 1, 4), (5, streamed.MAX_CHANNELS // 4)])
def test_more_heads_or_channels_than_fit_take_stored_scores(H_I, d_I, device, monkeypatch):
    arguments = inputs("random", device, H_I=H_I, d_I=d_I, n=1, n_keys=40)
    config = configuration(arguments)
    monkeypatch.setattr(package, "launch_streamed_selection", None)
    selection, variance = gsa_fast.indexed_selection(**arguments, mean_variance=0.0, config=config, impl="triton")
    for verdict in indexed_selection_verdicts(arguments, config, 0.0, selection, variance, 0):
        assert verdict, verdict


@pytest.mark.pitfall("int32-strides")
@pytest.mark.parametrize("axis", [0, 1, 2])
@pytest.mark.parametrize("name", ["q_idx", "k_idx", "head_logits"])
def test_strides_past_two_to_the_31_do_not_wrap(name, axis, device):
    """Offsets are 64-bit along every axis, and from tile to tile."""
    arguments = inputs("random", device, B=3, n=3, n_keys=65, H_I=3, d_I=4)
    for key in ("q_idx", "k_idx", "head_logits"):
        arguments[key] = arguments[key].half()
    config = configuration(arguments)
    with constants():
        expected = run(arguments, config)
        wide = widely_strided(tuple(arguments[name].shape), axis, device).copy_(arguments[name])
        assert same(run({**arguments, name: wide}, config).tensors, expected.tensors)


# --- shortlists that cannot be trusted ----------------------------------------------------------------------------


def thresholds(value: float) -> Any:
    """Instead of sampled ones."""
    return mock.patch.object(streamed, "launch_thresholds", lambda *arguments: arguments[-2].fill_(value))


@pytest.mark.parametrize(("failure", "value"), [("too short", 100.0), ("too long", 0.0)])
@pytest.mark.parametrize("rule", ["proportional", "inverse"])
def test_rows_whose_shortlist_failed_are_computed_again_from_all_their_scores(failure, value, rule, device):
    arguments = {**inputs("random", device, B=2, n_keys=220), "start": 214}
    config = configuration(arguments, rule=rule)
    with constants(), thresholds(value):
        result = run(arguments, config, mean_variance=0.02, plan=Plan(16, 128))
        assert_right(result, arguments, config, 0.02)
        assert result.redone == list(range(2 * L)), failure
        few = run({**arguments, "start": 40}, config, mean_variance=0.02, plan=Plan(16, 128))
    assert (len(few.redone) == 0) == (failure == "too long")


def test_a_sample_without_a_margin_fails_rows_and_the_result_is_exact(device):
    """Z below 0 asks for too few samples: thresholds come out too high."""
    arguments = inputs("random", device, n=16)
    config = configuration(arguments)
    with constants(Z=-1.0):
        result = run(arguments, config, plan=Plan(16, 128))
        assert_right(result, arguments, config)
    assert len(result.redone) > 0


def test_rows_are_redone_one_after_another_where_memory_holds_one(device):
    """The scratch memory is that of the shortlists, or a row of its own if they have less."""
    arguments = inputs("random", device, B=2)
    config = configuration(arguments)
    with constants(CHUNK_BYTES=1, LARGE_CAPACITY=64), thresholds(0.0):
        result = run(arguments, config, plan=Plan(16, 64))
        assert_right(result, arguments, config)
    assert result.launches["redo_kernel"][0]["grid"] == (1,)
    assert result.redone == list(range(2 * L))


def segments_of(result: Result) -> tuple[torch.Tensor, int]:
    """Sizes of the first chunk, [rows, splits], and how long a segment is."""
    launch = result.launches["shortlist_kernel"][0]
    return launch["sizes_ptr"].view(-1, launch["splits"])[: launch["rows"]], launch["segment"]


def marked_keys(positions: list[int], device: str) -> dict[str, Any]:
    """Scores above 0.9 at these positions, below 0.1 elsewhere."""
    arguments = inputs("random", device, H_I=1, d_I=1, n=2)
    arguments["q_idx"].fill_(10.0)
    arguments["k_idx"].fill_(-1.0)[:, positions] = 1.0
    arguments["head_logits"].fill_(20.0)
    arguments["bias"].zero_()
    return arguments


@pytest.mark.parametrize("more", [0, 1, 20])
def test_two_splits_that_meet_in_their_segment_are_noticed(more, device):
    """One more candidate than the segment holds overwrites another, and the sizes say so; none more is no failure."""
    with constants(BLOCK_S=16, MIN_PROGRAMS=1, LARGE_CAPACITY=64), thresholds(0.5):
        first = list(range(10, 42))
        arguments = marked_keys(first + list(range(S - 60, S - 60 + 32 + more)), device)
        config = configuration(arguments, k_base=24, rule="fixed")
        result = run(arguments, config, plan=Plan(16, 64))
        assert_right(result, arguments, config)
    sizes, segment = segments_of(result)
    assert segment == 64
    assert result.redone == ([0, 1] if more else [])
    if more < 20:  # neither split was cut: only their sum tells
        assert sizes.tolist() == [[32, 32 + more]] * 2
    assert result.selection.indices[0, 0].tolist() == first[:24]


def test_a_split_that_is_full_stops_before_it_leaves_its_segment(device):
    """100 candidates in one split; what lies behind the segments of the last row must stay as it was."""
    with constants(MIN_PROGRAMS=1, LARGE_CAPACITY=64), thresholds(0.5):
        arguments = marked_keys(list(range(20, 120)), device)
        config = configuration(arguments, k_base=24, rule="fixed")
        result = run(arguments, config, plan=Plan(16, 64))
        assert_right(result, arguments, config)
    sizes, _ = segments_of(result)
    assert (sizes[:, 0] >= 1 << 30).all()
    assert result.redone == [0, 1]


@pytest.mark.parametrize("size", [64, 65, 128])
def test_shortlists_above_the_first_capacity_take_the_large_kernel(size, device):
    arguments = marked_keys(list(range(100, 100 + size)), device)
    config = configuration(arguments, k_base=24, rule="fixed")
    with constants(MIN_PROGRAMS=1, LARGE_CAPACITY=256), thresholds(0.5):
        result = run(arguments, config, plan=Plan(16, 256))
        assert_right(result, arguments, config)
    (launch,) = result.launches["select_large_kernel"]
    assert int(launch["n_large_ptr"][0]) == (2 if size > 64 else 0)
    assert result.redone == []
    assert result.selection.indices[0, 0].tolist() == list(range(100, 124))


def test_launch_returns_how_many_rows_were_computed_again(device):
    arguments = inputs("random", device, B=2)
    config = configuration(arguments)
    returned = []
    launch = package.launch_streamed_selection

    def remember(*positional: Any, **named: Any) -> None:
        returned.append(launch(*positional, **named))

    with constants(), mock.patch.object(package, "launch_streamed_selection", remember):
        for value, expected in ((100.0, 2 * L), (-1.0, 0)):
            with thresholds(value):
                run(arguments, config, plan=Plan(16, 512))
            assert returned.pop().tolist() == [expected]


# --- statistics ---------------------------------------------------------------------------------------------------


@pytest.mark.property(15)
@pytest.mark.parametrize("pattern", ["random", "rising", "outlier", "window"])
def test_running_moments_do_not_cancel_where_the_mean_is_far_above_the_spread(pattern, device):
    """Mean ≈ 1, deviations ≈ 1e-5, also where the scores drift from tile to tile."""
    arguments = inputs(pattern, device, n=2)
    arguments["q_idx"] *= 2e-5
    arguments["head_logits"] += 20
    config = configuration(arguments)
    with constants(Z=3.0):
        result = run(arguments, config)
        scores = numpy(computed_scores(arguments, config))
    assert result.redone == []
    for t in range(2):
        row = scores[0, t][np.isfinite(scores[0, t])]
        assert row.mean() > 1e4 * row.std() > 0
        assert float(result.variance[0, t]) == pytest.approx(row.var(), rel=1e-3)


# --- the sigmoid's modes ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("impl", ["triton", "reference"])
@pytest.mark.parametrize(
    ("mode", "error", "message"),
    [
        ("fast", ValueError, r"sigmoid_mode.*exact.*approximate.*'fast'"),
        ("", ValueError, r"sigmoid_mode.*exact.*approximate"),
        (None, TypeError, "sigmoid_mode: expected a str, got NoneType"),
        (True, TypeError, "sigmoid_mode: expected a str, got bool"),
    ],
)
def test_other_sigmoid_modes_are_refused(mode, error, message, impl, device):
    arguments = inputs("random", device, n=1, n_keys=3)
    with pytest.raises(error, match=message):
        gsa_fast.indexed_selection(
            **arguments, mean_variance=0.0, config=configuration(arguments), sigmoid_mode=mode, impl=impl
        )


def test_the_reference_takes_both_sigmoid_modes_and_is_exact(device):
    arguments = inputs("random", device, n=2, n_keys=20)
    config = configuration(arguments)
    exact, approximate = (
        gsa_fast.indexed_selection(**arguments, mean_variance=0.0, config=config, sigmoid_mode=mode, impl="reference")
        for mode in ("exact", "approximate")
    )
    assert same(exact, approximate)


# --- memory -------------------------------------------------------------------------------------------------------


@pytest.mark.pitfall("all-pairs-in-memory")
@pytest.mark.parametrize("B", [1, 2])
def test_streamed_selection_never_allocates_more_than_a_chunk(B, device):
    """Shortlists in CHUNK_BYTES, samples in SAMPLE_BYTES, the rest small. Every allocation is seen by the profiler."""
    arguments = inputs("random", device, B=B, n=24, d_I=1, H_I=1)
    config = configuration(arguments)
    chunk_bytes, sample_bytes = 8 * 2 * 128 * 5, 4 * 19 * 10
    with constants(CHUNK_BYTES=chunk_bytes, SAMPLE_BYTES=sample_bytes):
        call = {"mean_variance": 0.0, "config": config, "impl": "triton"}
        gsa_fast.indexed_selection(**arguments, **call)  # compiles on a GPU
        with torch.profiler.profile(profile_memory=True) as profile:
            gsa_fast.indexed_selection(**arguments, **call)
    allocated = [event.nbytes() for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
    assert max(allocated) > chunk_bytes // 2  # the profiler saw the shortlists
    assert max(allocated) <= chunk_bytes + 512  # an allocator on a GPU rounds up
    assert max(allocated) < 4 * B * 24 * S


@given(L=st.integers(1, 10**6), affordable=st.integers(0, 10**6), block_l=st.sampled_from((16, 32, 64)))
def test_chunks_are_affordable_and_whole_tiles_where_there_is_room_for_one(L, affordable, block_l):
    rows = rows_per_chunk(L, affordable, block_l)
    assert 1 <= rows <= max(1, min(L, affordable))
    assert rows == min(L, affordable) or rows % block_l == 0 or rows == 1
    assert 2 * rows > min(L, affordable)


# --- the plan -----------------------------------------------------------------------------------------------------

SIZES = st.integers(1, 2**21)
BUDGETS = st.integers(1, 2**15)


@examples(300)
@given(n_keys=SIZES, K=BUDGETS, k_base=BUDGETS, H_I=st.integers(1, 10))
def test_a_plan_fits_the_samples_and_the_shortlists_that_it_expects(n_keys, K, k_base, H_I):
    plan = shortlist_plan(n_keys, K, k_base, H_I, 64)
    if H_I > streamed.MAX_HEADS:
        assert plan is None
    elif n_keys <= streamed.CAPACITY:
        assert plan == Plan(1, streamed.CAPACITY)
    elif plan is not None:
        assert plan.stride in (2, 4, 8, 16, 32, 64)
        assert plan.capacity in (streamed.LARGE_CAPACITY, streamed.LARGEST_CAPACITY)
        assert math.ceil(n_keys / plan.stride) <= streamed.MAX_SAMPLES
        for k in (K, k_base):
            assert k < shortlist_size(k, plan.stride) <= plan.capacity
        assert min(K, n_keys) <= plan.capacity


@examples(300)
@given(n_keys=SIZES, K=BUDGETS, k_base=BUDGETS, less=st.integers(0, 2**14))
def test_where_there_is_a_plan_there_is_one_for_a_smaller_budget_and_no_finer(n_keys, K, k_base, less):
    plan = shortlist_plan(n_keys, K, k_base, 4, 64)
    easier = shortlist_plan(n_keys, max(1, K - less), max(1, k_base - less), 4, 64)
    if plan is not None:
        assert easier is not None
        assert (easier.capacity, -easier.stride) <= (plan.capacity, -plan.stride) or easier.capacity < plan.capacity


@pytest.mark.parametrize(
    ("n_keys", "K", "k_base", "plan"),
    [
        (4096, 4096, 4096, Plan(1, 4096)),
        (8192, 2048, 2048, "sampled"),
        (131072, 4096, 2048, "sampled"),
        (2**20, 4096, 2048, "sampled"),
        (131072, 16384, 16384, None),
        (64 * 16384 + 1, 64, 64, None),
    ],
)
def test_plans_of_some_shapes(n_keys, K, k_base, plan):
    found = shortlist_plan(n_keys, K, k_base, 4, 64)
    assert (found is not None and found.stride > 1) if plan == "sampled" else found == plan


@examples(100)
@given(n_keys=st.integers(1, 5000), stride=st.sampled_from((2, 4, 8, 16, 32, 64)))
def test_one_position_of_every_block_is_sampled(n_keys, stride):
    positions = sample_positions(n_keys, stride, torch.device("cpu"))
    assert positions.dtype == torch.int32
    assert (positions // stride).tolist() == list(range(math.ceil(n_keys / stride)))
    assert positions.max() < n_keys


@pytest.mark.parametrize("stride", [2, 4, 8, 16, 32, 64])
def test_samples_meet_every_phase_of_a_periodic_input_about_equally(stride):
    """Every period up to four strides: each phase gets between half and 1.6 times its share of 16,384 samples."""
    positions = sample_positions(16384 * stride, stride, torch.device("cpu"))
    for period in range(2, 4 * stride + 1):
        share = torch.bincount(positions % period, minlength=period) * (period / 16384)
        assert share.min() > 0.5, period
        assert share.max() < 1.6, period
