"""Operation counts, bytes and parameters of `gsa_ref.theory.complexity`, against loops and against real modules."""

import dataclasses
from fractions import Fraction

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from gsa_ref import GatedSparseAttention, GSACache, GSAConfig
from gsa_ref.config import VARIANTS
from gsa_ref.theory import complexity
from gsa_ref.theory.complexity import Work

PAPER = GSAConfig()
L_128K = 2**17


@st.composite
def configs(draw: st.DrawFn) -> GSAConfig:
    H_kv, group, k = draw(st.integers(1, 3)), draw(st.integers(1, 3)), draw(st.integers(1, 9))
    sizes = {"d": draw(st.integers(1, 12)), "d_h": 2 * draw(st.integers(1, 4)), "H_I": draw(st.integers(1, 4))}
    config = GSAConfig(**sizes, H=H_kv * group, H_kv=H_kv, d_I=draw(st.integers(1, 6)), k_base=k, k_min=1, k_max=9)
    return dataclasses.replace(
        config, sparse=draw(st.booleans()), gates=draw(st.sampled_from(("both", "value", "output", "none")))
    )


def test_the_published_range_is_the_printed_count_exactly():
    assert complexity.printed_speedup(L_128K, PAPER) == Fraction(64, 5) == Fraction("12.8")
    assert complexity.printed_speedup_limit(PAPER) == 16


@given(st.integers(1, 2**20), configs())
def test_the_printed_count_rises_to_its_limit_and_never_reaches_it(L, config):
    speedup, limit = complexity.printed_speedup(L, config), complexity.printed_speedup_limit(config)
    assert speedup < complexity.printed_speedup(L + 1, config) < limit
    assert complexity.printed_speedup(L, config, k=config.k_base + 1) < speedup
    assert limit - complexity.printed_speedup(10**12, config) < Fraction(1, 10**6)


@given(st.integers(1, 2**20), configs())
def test_below_the_printed_crossover_and_nowhere_else_gsa_costs_more(L, config):
    crossover = complexity.printed_crossover(config)
    assert (complexity.printed_speedup(L, config) > 1) == (crossover is not None and crossover < L)
    assert (crossover is None) == (complexity.printed_speedup_limit(config) <= 1)


def test_the_default_sizes_cross_over_between_two_and_four_thousand_tokens():
    assert complexity.printed_crossover(PAPER) == Fraction(32768, 15)  # 2184.5…
    assert complexity.core_crossover(PAPER) == 2488


@given(configs())
def test_the_indexer_takes_half_of_the_printed_count_where_it_says(config):
    c = config
    half = Fraction(c.k_base * c.d, c.H_I * c.d_I)
    for L in range(max(1, int(half) - 2), int(half) + 3):
        share = complexity.printed_indexer_share(L, c)
        assert (share >= Fraction(1, 2)) == (half <= L)
        assert share == complexity.printed_speedup(L, c) / complexity.printed_speedup_limit(c)


def test_the_cost_line_of_the_printed_count_is_indexer_and_length():
    table = {k: complexity.printed_speedup(L_128K, PAPER, k=k) for k in (512, 1024, 2048, 4096)}
    a, b = complexity.cost_line(table)
    assert a == pytest.approx(1 / 16, rel=1e-12)
    assert b == pytest.approx(1 / L_128K, rel=1e-12)
    with pytest.raises(ValueError, match="speedups: expected at least two budgets, got 1"):
        complexity.cost_line({512: 22.0})


@given(st.integers(1, 40), st.integers(1, 45))
def test_pairs_are_those_of_the_loops(L, k):
    assert complexity.causal_pairs(L) == sum(1 for t in range(L) for s in range(L) if s <= t)
    assert complexity.selected_pairs(L, k) == sum(min(k, t + 1) for t in range(L))


@given(st.integers(1, 30), configs())
def test_multiply_adds_are_those_of_the_loops(L, config):
    """Counted one by one as the equations do them: q·k, p·v, and q^I·k^I."""
    c = config
    dense = sparse = indexer = 0
    for t in range(L):
        indexer += c.H_I * (t + 1) * c.d_I
        for _ in range(c.H):
            dense += (t + 1) * c.d_h + (t + 1) * c.d_h
            sparse += min(c.k_base, t + 1) * c.d_h + min(c.k_base, t + 1) * c.d_h
    assert complexity.dense_attention_work(L, c).multiply_adds == dense
    assert complexity.sparse_attention_work(L, c).multiply_adds == sparse
    assert complexity.indexer_work(L, c).multiply_adds == indexer
    assert complexity.core_work(L, c).multiply_adds == (indexer + sparse if c.sparse else dense)
    assert complexity.indexer_work(L, c).special == L * (L + 1) // 2 * c.H_I


@given(st.integers(1, 30), configs(), st.sampled_from((torch.float32, torch.bfloat16)))
def test_bytes_are_those_of_the_tensors(L, config, dtype):
    c, width = config, dtype.itemsize
    q, kv = (torch.zeros(L, heads, c.d_h, dtype=dtype) for heads in (c.H, c.H_kv))
    attention = 2 * q.nbytes + 2 * kv.nbytes
    indices = sum(torch.zeros(min(c.k_base, t + 1), dtype=torch.int32).nbytes for t in range(L))
    assert complexity.dense_attention_work(L, c, element_bytes=width).bytes == attention
    assert complexity.sparse_attention_work(L, c, element_bytes=width).bytes == attention + indices
    inputs = [torch.zeros(L, n, dtype=dtype).nbytes for n in (c.H_I * c.d_I, c.d_I, c.H_I)]
    assert complexity.indexer_work(L, c, element_bytes=width).bytes == sum(inputs)
    rows = sum(2 * kv[: min(c.k_base, t + 1)].nbytes for t in range(L))
    assert complexity.gathered_bytes(L, c, element_bytes=width) == rows


@given(st.integers(1, 40), configs())
def test_a_decode_step_reads_the_cache_that_exists(S, config):
    """Dense: all of `GSACache`. GSA: its indexer keys, and the rows of k and v that one query selects."""
    read = GSACache.bytes_per_token(config, dtype=torch.bfloat16)
    rows = S * read
    if config.sparse:
        keys = 2 * config.d_I
        rows = S * keys + min(config.k_base, S) * (read - keys)
    inout = 2 * 2 * config.H * config.d_h + config.sparse * 2 * (config.H_I * config.d_I + config.H_I)
    assert complexity.decode_work(S, config).bytes == rows + inout
    last = complexity.core_work(S, config).multiply_adds - (
        complexity.core_work(S - 1, config).multiply_adds if S > 1 else 0
    )
    assert complexity.decode_work(S, config).multiply_adds == last  # a step does what the last row of a prefill does


@given(configs())
def test_the_full_crossover_is_the_first_length_that_saves_and_all_beyond_it_do(config):
    gsa, dense = config.variant("gsa"), config.variant("dense")

    def saves(L: int) -> bool:
        counts = [complexity.core_work(L, c).multiply_adds for c in (gsa, dense)]
        return counts[0] < counts[1]

    crossover = complexity.core_crossover(config)
    if crossover is None:
        assert not any(saves(L) for L in (1, 10, 1000, 10**6, 10**9))
    else:
        assert crossover > config.k_base
        assert not any(saves(L) for L in range(max(1, crossover - 20), crossover))
        assert all(saves(crossover + n) for n in (0, 1, 7, 10**4))


def test_an_indexer_as_wide_as_attention_never_pays():
    config = dataclasses.replace(PAPER, H_I=64, d_I=128)  # 8192 = 2·H·d_h
    assert complexity.core_crossover(config) is None
    assert complexity.core_crossover(dataclasses.replace(PAPER, H_I=63, d_I=128)) is not None
    assert complexity.printed_crossover(dataclasses.replace(PAPER, d_I=1024)) is None


@given(configs())
def test_parameters_are_those_of_the_module(config):
    counted = complexity.parameter_counts(config)
    layer = GatedSparseAttention(config)
    real = dict.fromkeys(counted, 0)
    parts = {"W_vg": "value_gate", "W_og": "output_gate", "indexer": "indexer"}
    for name, parameter in layer.named_parameters():
        real[parts.get(name.split(".")[0], "attention")] += parameter.numel()
    assert counted == real


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_overhead_at_the_default_sizes_is_that_of_the_module(variant):
    config = PAPER.variant(variant)
    with torch.device("meta"):  # shapes without memory
        sizes = [
            sum(p.numel() for p in GatedSparseAttention(c).parameters()) for c in (config, config.variant("dense"))
        ]
    assert complexity.parameter_overhead(config) == Fraction(sizes[0] - sizes[1], sizes[1])
    assert complexity.parameter_overhead(config, others=sizes[1]) == complexity.parameter_overhead(config) / 2


@given(st.integers(1, 30), configs())
def test_a_projection_multiplies_every_weight_with_every_token(L, config):
    layer = GatedSparseAttention(config)
    linear = [m for m in layer.modules() if isinstance(m, torch.nn.Linear)]
    weights = sum(m.weight.numel() for m in linear)
    numbers = sum(p.numel() for p in layer.parameters()) + L * sum(m.out_features for m in linear)
    numbers += L * (config.d + config.H * config.d_h)  # h, and o as the input of W_O
    work = complexity.projections_work(L, config)
    assert work.multiply_adds == L * weights
    assert work.bytes == 2 * numbers


def test_the_roofline_is_the_time_of_the_scarcer_resource():
    work = Work(multiply_adds=500, bytes=100)
    assert work.flops == 1000
    assert work.intensity == 10
    assert work.seconds(flops_per_second=100.0, bytes_per_second=100.0) == 10
    assert work.seconds(flops_per_second=1e9, bytes_per_second=10.0) == 10
    ridge = Work(multiply_adds=100, bytes=20)  # where both bind, the intensity is the ratio of the rates
    assert ridge.seconds(flops_per_second=20.0, bytes_per_second=2.0) == ridge.flops / 20 == ridge.bytes / 2
    assert work + ridge == Work(600, 0, 120)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: complexity.printed_speedup(0, PAPER), "L: expected an int ≥ 1, got 0"),
        (lambda: complexity.printed_indexer_share(4, PAPER, k=0), "k: expected an int ≥ 1, got 0"),
        (lambda: complexity.core_work(4, PAPER, k=-1), "k: expected an int ≥ 1, got -1"),
        (lambda: complexity.parameter_overhead(PAPER, others=-1), "others: expected an int ≥ 0, got -1"),
        (
            lambda: Work(1, 1, 1).seconds(flops_per_second=0.0, bytes_per_second=1.0),
            "flops_per_second: expected a finite positive number, got 0.0",
        ),
    ],
)
def test_sizes_that_count_nothing_are_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()


# ---- by hand, at sizes that are all different ------------------------------------------------------------------------

SMALL = GSAConfig(d=48, H=6, H_kv=2, d_h=4, H_I=3, d_I=5, k_base=2, k_min=1, k_max=4)  # at L = 4: 10 pairs, 7 selected


def test_the_work_of_each_stage_by_hand():
    dense = SMALL.variant("dense")
    inout = 2 * 4 * 4 * (6 + 2)  # numbers: q, o of 6 heads, k, v of 2, all 4 wide, of 4 tokens
    scores = Work(10 * 15, 10 * 3, 2 * 4 * (15 + 5 + 3))
    sparse = Work(2 * 7 * 24, 7 * 6, 2 * inout + 4 * 7)
    assert complexity.dense_attention_work(4, SMALL) == Work(2 * 10 * 24, 10 * 6, 2 * inout)
    assert complexity.sparse_attention_work(4, SMALL) == sparse
    assert complexity.indexer_work(4, SMALL) == scores
    assert complexity.core_work(4, SMALL) == Work(336 + 150, 42 + 30, sparse.bytes + scores.bytes)
    assert complexity.core_work(4, dense) == complexity.dense_attention_work(4, dense)
    assert complexity.gathered_bytes(4, SMALL) == 2 * 2 * 4 * 7 * 2
    assert complexity.gathered_bytes(4, SMALL, k=3) == 2 * 2 * 4 * 9 * 2  # 1 + 2 + 3 + 3 pairs
    assert complexity.projections_work(4, SMALL).special == 0
    assert all(isinstance(x, int) for x in vars(complexity.dense_attention_work(4, SMALL)).values())


def test_the_work_of_each_stage_grows_with_the_bytes_of_an_element():
    """Four bytes for two: all but the indices, of four bytes each."""
    dense = SMALL.variant("dense")
    for stage, config, fixed in (
        (complexity.dense_attention_work, dense, 0),
        (complexity.sparse_attention_work, SMALL, 4 * 7),
        (complexity.indexer_work, SMALL, 0),
        (complexity.projections_work, SMALL, 0),
        (complexity.core_work, SMALL, 4 * 7),
        (complexity.core_work, dense, 0),
    ):
        narrow, wide = stage(4, config).bytes, stage(4, config, element_bytes=4).bytes
        assert wide - fixed == 2 * (narrow - fixed)
    assert complexity.gathered_bytes(4, SMALL, element_bytes=4) == 2 * complexity.gathered_bytes(4, SMALL)


def test_a_decode_step_by_hand():
    attention = Work(2 * 2 * 24, 2 * 6, 2 * 2 * (2 * 8 + 24))
    scores = Work(9 * 15, 9 * 3, 2 * (9 * 5 + 15 + 3))
    assert complexity.decode_work(9, SMALL) == Work(96 + 135, 12 + 27, attention.bytes + scores.bytes)
    three = complexity.decode_work(9, SMALL, k=3)
    assert three == Work(2 * 3 * 24 + 135, 18 + 27, 2 * 2 * (3 * 8 + 24) + scores.bytes)
    assert complexity.decode_work(9, SMALL.variant("dense")) == Work(2 * 9 * 24, 9 * 6, 2 * 2 * (9 * 8 + 24))


def test_the_crossovers_take_another_k():
    """3·48 / (48 − 15) in the printed count; in the full count the smallest L at which 48·(P − selected) > 15·P."""
    assert complexity.printed_crossover(SMALL) == Fraction(2 * 48, 33)
    assert complexity.printed_crossover(SMALL, k=3) == Fraction(3 * 48, 33)
    for k in (2, 3, 7):
        L = next(
            L for L in range(1, 99) if 48 * sum(t + 1 - min(k, t + 1) for t in range(L)) > 15 * sum(range(1, L + 1))
        )
        assert complexity.core_crossover(SMALL, k=k) == L
    # 2·H·d_h = 48 and H_I·d_I = 16, k = 1: at L = 2 both sides are 48. Equal is not fewer.
    even = dataclasses.replace(SMALL, H_I=4, d_I=4, k_base=1)
    assert complexity.core_crossover(even) == 3


def test_a_line_takes_two_budgets_and_two_points_determine_it():
    a, b = complexity.cost_line({2: 2.0, 6: Fraction(4, 5)})  # costs 1/2 and 5/4
    assert (a, b) == pytest.approx((1 / 8, 3 / 16), rel=1e-12)
    a, b = complexity.cost_line({1: 1.0, 2: 0.5, 6: 0.25})  # costs 1, 2, 4: slope 8/14 by the normal equations
    assert (a, b) == pytest.approx((7 / 3 - 3 * 8 / 14, 8 / 14), rel=1e-12)
    with pytest.raises(ValueError, match=r"^speedups: expected at least two budgets, got 1$"):
        complexity.cost_line({2: 2.0})


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: complexity.printed_indexer_share(0, PAPER), "L: "),
        (lambda: complexity.printed_speedup(0, PAPER), "L: "),
        (lambda: Work(1, 1, 1).seconds(flops_per_second=1.0, bytes_per_second=0.0), "bytes_per_second: "),
        (lambda: Work(1, 1, 1).seconds(flops_per_second=-1.0, bytes_per_second=1.0), "flops_per_second: "),
    ],
)
def test_what_is_no_length_or_rate_is_refused_by_name(call, message):
    with pytest.raises(ValueError, match=f"^{message}"):
        call()


def test_work_adds_up_by_kind():
    assert Work(1, 2, 3) + Work(10, 20, 30) == Work(11, 22, 33)
