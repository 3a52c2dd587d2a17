"""`python -m gsa_fast bench`: patterns have the stated overlap, work is counted right, records are merged."""

import json
from dataclasses import replace
from itertools import pairwise

import pytest
import torch

import gsa_fast
from gsa_fast.__main__ import main
from gsa_fast.bench import patterns, prefill, records, rooflines, suite, timing
from gsa_fast.bench.prefill import Case
from gsa_fast.bench.rooflines import Ceilings, Work
from gsa_fast.bench.timing import Timing
from gsa_ref import GSAConfig, indexed_selection
from gsa_ref.theory import complexity

SIZES = {"k_base": 64, "width": 128}
SMALL = GSAConfig(d=16, H=8, H_kv=2, d_h=4, H_I=2, d_I=8, k_base=8, k_min=1, k_max=16)
DRAWN = {"seed": 0, "device": "cpu", "dtype": torch.float32}


# ---- patterns --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", patterns.SELECTIONS[:-1])
@pytest.mark.parametrize("L", [1, 16, 65, 700])
def test_a_pattern_is_ascending_causal_and_counts_what_it_holds(name, L):
    selection = patterns.draw_selection(name, L, k_base=64, width=min(128, L), seed=3, device="cpu")
    selection.validate(L)
    assert selection.indices.dtype == selection.counts.dtype == torch.int32
    assert selection.indices.shape == (1, L, min(128, L))
    assert (selection.indices[0] <= torch.arange(L)[:, None]).all()
    assert (selection.counts >= 1).all()


@pytest.mark.parametrize("name", patterns.SELECTIONS[:-1])
def test_the_mean_budget_is_k_base(name):
    counts = patterns.draw_selection(name, 4096, device="cpu", seed=1, **SIZES).counts
    assert float(counts[0, 128:].double().mean()) == pytest.approx(64, rel=0.01)
    assert float(counts.double().mean()) == pytest.approx(64, rel=0.02)


def test_a_pattern_is_the_same_for_the_same_seed():
    draw = lambda seed: patterns.draw_selection("clustered p=0.87", 300, device="cpu", seed=seed, **SIZES)  # noqa: E731
    assert torch.equal(draw(1).indices, draw(1).indices)
    assert not torch.equal(draw(1).indices, draw(2).indices)


@pytest.mark.parametrize("p", [0.98, 0.95, 0.87, 0.44])
@pytest.mark.parametrize("offset", [0, 23])
def test_a_fraction_p_of_every_budget_is_common_to_a_group_of_64(p, offset):
    selection = patterns.clustered_selection(4096, p, seed=0, device="cpu", offset=offset, **SIZES)
    group = slice(3072 - offset, 3136 - offset)
    rows = [set(row[row >= 0].tolist()) for row in selection.indices[0, group]]
    common, k = set.intersection(*rows), len(rows[0])
    assert {len(row) for row in rows} == {k}
    assert len(common) == pytest.approx(p * k, abs=1)
    assert max(common) <= group.start
    # The rest is private: two queries share no more of it than chance gives, k(1 − p) keys among 3,000.
    private = [row - common for row in rows]
    assert sum(len(a & b) for a, b in pairwise(private)) <= 63 * (3 + (k * (1 - p)) ** 2 / 1000)
    # The next query belongs to the next group.
    following = set(selection.indices[0, group.stop].tolist())
    assert len(common & following) < 0.2 * k


def test_random_positions_are_uniform_over_the_past():
    n, count = torch.full((4000,), 40), torch.full((4000,), 10)
    drawn = patterns.random_subset(n, count, 12, torch.Generator().manual_seed(0))
    assert (drawn[:, 10:] == patterns.NOTHING).all()
    frequency = torch.bincount(drawn[:, :10].flatten(), minlength=40) / 4000
    assert frequency.sum() == pytest.approx(10)
    assert (frequency - 0.25).abs().max() < 0.25 * (0.25 / 2) + 5 * (0.25 * 0.75 / 4000) ** 0.5
    everything = patterns.random_subset(torch.tensor([5]), torch.tensor([5]), 6, torch.Generator())
    assert everything[0, :5].tolist() == [0, 1, 2, 3, 4]


def test_window_holds_the_sinks_and_the_nearest_and_ties_the_lowest_positions():
    window = patterns.draw_selection("window", 100, k_base=8, width=16, seed=0, device="cpu")
    assert window.indices[0, 50, :9].tolist() == [0, 1, 2, 3, 47, 48, 49, 50, -1]
    assert window.indices[0, 5, :7].tolist() == [0, 1, 2, 3, 4, 5, -1]
    inputs = patterns.random_indexer_inputs(100, SMALL, constant=True, **DRAWN)
    tied, variance = indexed_selection(**inputs.arguments(), config=SMALL)
    ties = patterns.draw_selection("ties", 100, k_base=8, width=16, seed=0, device="cpu")
    assert float(variance.max()) < 1e-12
    assert torch.equal(tied.indices, ties.indices)
    assert torch.equal(tied.counts, ties.counts)


def test_overlap_counts_the_union_of_a_tile():
    same = patterns.draw_selection("ties", 256, k_base=8, width=8, seed=0, device="cpu")
    last = patterns.measure_overlap(type(same)(same.indices[:, 64:], same.counts[:, 64:]), 16)
    assert (last.mean_k, last.union, last.union_over_k) == (8, 8, 1)
    alone = patterns.measure_overlap(same, 1)
    assert alone.union_over_k == 1
    row = torch.arange(64).reshape(1, 16, 4)
    apart = patterns.measure_overlap(type(same)(row, torch.full((1, 16), 4)), 16)
    assert (apart.union, apart.union_over_k) == (64, 16)
    assert patterns.effective_fraction(16) == 0
    assert patterns.effective_fraction(1) == 1
    clustered = patterns.clustered_selection(65536, 0.95, k_base=64, width=128, seed=0, device="cpu", offset=0)
    assert patterns.effective_fraction(patterns.measure_overlap(clustered, 16).union_over_k) == pytest.approx(
        0.95, abs=0.02
    )


def test_smooth_hidden_states_have_unit_variance_and_agree_with_their_neighbours():
    h = torch.cat([rows for _, rows in patterns.smooth_hidden_states(9000, 64, seed=0, device="cpu")])
    assert h.shape == (9000, 64)
    assert float(h.var()) == pytest.approx(1, abs=0.1)
    lag = [float((h[n:] * h[: len(h) - n]).mean() / h.square().mean()) for n in (1, 50)]
    assert lag == pytest.approx([0.99, 0.99**50], abs=0.02)


def test_smooth_inputs_have_the_scale_of_the_layer_and_share_the_indexer_between_kv_heads():
    config = replace(SMALL, d_h=16, d_I=16)
    inputs = patterns.smooth_attention_inputs(300, config, **DRAWN)
    assert [x.shape[2] for x in (inputs.q, inputs.k, inputs.v, *inputs.gates().values())] == [8, 2, 2, 2, 8]
    assert float(inputs.q.var()) == pytest.approx(1 / 3, rel=0.3)
    a, b = (patterns.smooth_indexer_inputs(300, replace(config, H_kv=n), **DRAWN) for n in (1, 2))
    assert torch.equal(a.q_idx, b.q_idx)
    assert (a.q_idx.shape, a.k_idx.shape, a.head_logits.shape) == ((1, 300, 2, 16), (1, 300, 16), (1, 300, 2))
    q = a.q_idx[0, :, 0]
    assert float((q[1:] * q[:-1]).mean() / q.square().mean()) > 0.9


def test_mean_variance_of_the_inputs_gives_a_mean_budget_of_k_base():
    config = replace(SMALL, k_base=64, k_min=8, k_max=128)
    inputs = patterns.with_mean_variance(
        patterns.random_indexer_inputs(1000, config, **DRAWN), config, impl="reference"
    )
    selection, _ = indexed_selection(**inputs.arguments(), config=config)
    assert float(selection.counts[0, 128:].double().mean()) == pytest.approx(64, rel=0.1)


# ---- rooflines -------------------------------------------------------------------------------------------------------

C = GSAConfig(d=16, H=8, H_kv=2, d_h=4, H_I=3, d_I=8, k_base=2, k_min=1, k_max=4)


def test_work_of_the_indexer_by_hand():
    # L = 4: ten causal pairs; three heads of width 8; scores 4 × 4 × 4 bytes; inputs 4 rows of 24 + 8 + 3 numbers.
    work = rooflines.indexer_work(4, C)
    assert work == Work(flop=2 * 10 * 3 * 8, special=30, memory_bytes=64 + 2 * 4 * 35)
    # Indices: 4 rows × min(k_max, L) = 4 slots × 4 bytes.
    assert rooflines.indexed_selection_work(4, C) == Work(flop=480, special=30, memory_bytes=64 + 280)


def test_work_of_attention_by_hand():
    # G = 4, so tiles of 16 queries; L = 32 gives 2. A union of 5 keys: 2 tiles × 16 queries × 8 heads × 5 keys × 4·4
    # operations; 2 tiles × 2 heads × 5 keys × (4 + 4) numbers × 2 bytes.
    work = rooflines.attention_work(32, C, mean_k=3, union=5)
    assert rooflines.tile_rows(C) == 16
    assert work.flop == 2 * 16 * 8 * 5 * 16
    assert work.l2_bytes == 2 * 2 * 5 * 8 * 2
    assert work.special == 32 * 8 * 3
    queries, keys = 32 * 8 * 4 * 2, 32 * 2 * 4 * 2
    assert work.memory_bytes == 2 * queries + 2 * keys + 32 * 3 * 4 + 32 * 8 * 4
    gated = rooflines.attention_work(32, C, mean_k=3, union=5, output_gate=True)
    assert gated.memory_bytes - work.memory_bytes == queries
    assert rooflines.gates_work(32, C).memory_bytes == 3 * keys


def test_work_agrees_with_the_figures_for_128k_and_eight_kv_heads():
    c = GSAConfig()
    L, k = 131072, 2048
    assert rooflines.dense_work(L, c).flop == pytest.approx(1.4e14, rel=0.01)
    assert rooflines.indexed_selection_work(L, c).flop == pytest.approx(4.4e12, rel=0.01)
    assert rooflines.indexed_selection_work(L, c).special == pytest.approx(3.4e10, rel=0.02)
    apart = rooflines.attention_work(L, c, mean_k=k, union=16 * k)  # without overlap: the bytes of a gather per query
    assert apart.l2_bytes == pytest.approx(1.09e12, rel=0.01)
    same = rooflines.attention_work(L, c, mean_k=k, union=k)
    assert same.flop == pytest.approx(4.4e12, rel=0.01)
    assert same.l2_bytes == apart.l2_bytes / 16


def test_a_stage_takes_as_long_as_its_scarcest_resource_and_stages_add_up():
    ceilings = Ceilings(matmul=10, copy=2, gather=4, special=5)
    work = Work(flop=20, special=5, memory_bytes=6, l2_bytes=4)
    assert work.seconds(ceilings) == 3
    assert rooflines.whole_seconds([work, Work(flop=10)], ceilings) == 4


@pytest.mark.parametrize("L", [1, 77, 4096])
def test_work_agrees_with_the_counts_of_the_theory(L):
    """Two packages count the same thing: `gsa_ref.theory` for readers, `rooflines` for measured times."""
    c, dense = C, C.variant("dense")
    assert rooflines.dense_work(L, c).flop == complexity.core_work(L, dense).flops
    assert rooflines.dense_work(L, c).memory_bytes == complexity.core_work(L, dense).bytes
    assert rooflines.indexer_work(L, c).flop == complexity.indexer_work(L, c).flops
    assert rooflines.indexer_work(L, c).special == complexity.indexer_work(L, c).special
    k = complexity.selected_pairs(L, c.k_base) / L
    apart = rooflines.attention_work(L, c, mean_k=k, union=rooflines.tile_rows(c) * k)  # no query shares a key
    assert apart.l2_bytes == pytest.approx(complexity.gathered_bytes(L, c))
    step = rooflines.decode_work(1, 1, L, c, mean_k=min(c.k_base, L), union=min(c.k_base, L))
    assert step.flop == complexity.decode_work(L, c).flops


@pytest.mark.parametrize(("H_kv", "rows"), [(32, 64), (8, 16), (4, 8), (1, 2)])
def test_a_tile_holds_64_rows(H_kv, rows):
    assert rooflines.tile_rows(GSAConfig(H_kv=H_kv)) == rows


# ---- timing ----------------------------------------------------------------------------------------------------------


def test_percentiles_and_repetitions():
    assert timing.percentiles([5.0, 1.0, 2.0, 4.0, 3.0]) == pytest.approx((3.0, 1.8, 4.2))
    assert [timing.repetitions(s, 0.6) for s in (1e-6, 0.01, 0.5, 2.0)] == [200, 60, 5, 3]


def test_result_bytes_look_into_tuples():
    x = torch.zeros(3, 2)
    assert timing.result_bytes((x, (x.to(torch.int8), None), [x])) == 24 + 6 + 24


def test_an_error_is_told_in_one_line():
    assert timing.first_line(ValueError("a\n/some/where.py")) == "ValueError: a"
    assert timing.first_line(RuntimeError()) == "RuntimeError: no message"


def test_ceiling_kernels_do_what_they_count(device):
    table = torch.randn(50, 16, device=device)
    index = torch.randint(50, (3, 128), dtype=torch.int32, device=device)
    torch.testing.assert_close(timing.gather_rows(table, index), table[index.long()].sum(1), atol=1e-4, rtol=1e-4)
    x = torch.rand(1024, device=device)
    expected = torch.exp2(-torch.exp2(-x))
    timing.repeated_exponentials(x, 2)
    torch.testing.assert_close(x, expected)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_timing_on_the_device():
    x = torch.randn(2**20, device="cuda")
    copied = timing.measure(lambda: x.clone(), graph=True, seconds=0.01)
    assert copied.graph
    assert copied.peak_bytes == 0
    assert 0 < copied.p20 <= copied.median <= copied.p80
    through_a_copy = timing.measure(lambda: (x + 1).sum(), graph=False, seconds=0.01)
    assert 2**22 <= through_a_copy.peak_bytes < 2**23
    waits = timing.measure(lambda: x.sum().item(), graph=True, seconds=0.01)
    assert not waits.graph
    assert waits.reason.startswith("not captured as a graph: ")
    assert timing.measure(lambda: x.clone(), graph=True, seconds=0.01).graph


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_the_bench_runs_on_the_device(tmp_path, capsys):
    path = tmp_path / "prefill.json"
    assert main(["bench", "prefill", "--quick", "--length", "512", "--k-base", "64", "--json", str(path)]) == 0
    found = records.read(path)
    ours = [r for r in found if r["impl"] == "gsa_fast"]
    assert all(r["ms"] and r["graph"] for r in ours), [r.get("reason") for r in ours]
    assert "over cuDNN" in capsys.readouterr().out


# ---- the suite -------------------------------------------------------------------------------------------------------


@pytest.fixture
def tiny(monkeypatch):
    """The suite at sizes that the interpreter affords, with a clock that says one millisecond."""
    for name, value in {"H": 4, "D_H": 16, "H_I": 2, "D_I": 16, "K_BASE": 4}.items():
        monkeypatch.setattr(prefill, name, value)
    calls = []

    def measure(call, *, graph, seconds):
        calls.append(call())
        return Timing(1.0, 0.9, 1.2, 5, 1000, graph)

    ceilings = Ceilings(matmul=1e15, copy=1e13, gather=1e13, special=1e13)
    monkeypatch.setattr(prefill, "measure", measure)
    monkeypatch.setattr(
        prefill,
        "measure_ceilings",
        lambda: (ceilings, dict.fromkeys(vars(ceilings), measure(lambda: 0, graph=False, seconds=0))),
    )
    monkeypatch.setattr(prefill, "device_works", lambda: True)
    calls.clear()
    return calls


FIELDS = {
    "suite", "case", "impl", "selection", "shape", "dtype", "ms", "peak_bytes", "tbps", "tflops", "share_of_roofline",
    "mean_k", "union_over_k", "p_eff", "graph", "device", "torch", "triton", "seed", "command", "commit", "sources",
}  # fmt: skip


def test_the_suite_gives_a_record_per_case_with_every_field(tiny, device):
    cases = prefill.plan([16], [2], [4], list(patterns.SELECTIONS))
    where = records.environment("a command", 7)
    found = list(prefill.run(cases, prefill.Inputs(7, device, torch.float32), seconds=0, where=where))
    assert [r["case"] for r in found[:4]] == ["ceiling"] * 4
    found = found[4:]
    assert len(found) == len(cases)
    for case, record in zip(cases, found, strict=True):
        assert set(record) >= FIELDS
        assert (record["case"], record["impl"], record["selection"]) == (case.case, case.impl, case.selection)
        assert set(record["shape"]) == {"B", "L", "S", "H", "H_kv", "d_h", "H_I", "d_I", "k"}
        if case.impl == "gsa_fast":
            assert "reason" not in record, record
            assert record["ms"] == {"median": 1.0, "p20": 0.9, "p80": 1.2}
            assert record["share_of_roofline"] > 0
        elif record["ms"] is None:  # no such backend on this machine
            assert record["reason"].startswith("failed: ")
    assert len({records.key(r) for r in found}) == len(found)
    for record in found:
        if record["impl"] == "gsa_fast" and record["case"] in ("attention", "whole"):
            assert 1 <= record["union_over_k"] <= 16
            assert record["method"]
    json.dumps(found, allow_nan=False)
    table = prefill.format_table(found, found)
    assert len(table.splitlines()) == len(cases) + 2


def test_the_command_writes_the_records_and_prints_a_table(tiny, device, monkeypatch, tmp_path, capsys):
    path = tmp_path / "prefill.json"
    made = prefill.Inputs
    monkeypatch.setattr(prefill, "INTERPRETED", False)
    monkeypatch.setattr(prefill.torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(prefill.torch.cuda, "get_device_name", lambda: "a device")
    monkeypatch.setattr(prefill, "Inputs", lambda seed: made(seed, device, torch.float32))
    monkeypatch.setattr(prefill, "BASELINES", {})
    arguments = ["--length", "16", "--kv-heads", "2", "--selection", "window", "--k-base", "4", "--json", str(path)]
    assert main(["bench", "prefill", *arguments]) == 0
    assert main(["bench", "prefill", *arguments]) == 0
    found = records.read(path)
    assert [r["case"] for r in found[4:]] == [
        "indexer", "gates", "indexed_selection", "indexed_selection", "attention", "whole", "whole",
    ]  # fmt: skip
    assert [r["sigmoid_mode"] for r in found[-2:]] == ["exact", "approximate"]
    assert {r["command"] for r in found} == {
        "python -m gsa_fast bench prefill --length 16 --kv-heads 2 --selection window --k-base 4"
    }
    printed = capsys.readouterr().out
    assert "7 cases on a device, seed 0." in printed
    assert "Ceilings: matmul 1e+03 TFLOP/s, copy 10 TB/s" in printed
    assert sum(line.startswith("whole ") for line in printed.splitlines()) == 4


def test_whole_is_the_selection_of_its_inputs_and_attention_over_the_given_pattern(tiny, device):
    inputs = prefill.Inputs(0, device, torch.float32)
    for name in ("window", "smooth"):
        case = Case("whole", "gsa_fast", 32, 4, 2, name)
        selection, _, (out, _) = prefill.prepare(case, inputs).call()
        pattern = inputs.selection(32, 4, name)
        assert torch.equal(selection.indices, pattern.indices) == (name == "smooth")
        given = inputs.attention(32, 2, name == "smooth")
        expected = gsa_fast.sparse_attention(given.q, given.k, given.v, pattern, **given.gates(), impl="triton")
        assert torch.equal(out, expected[0])


def test_a_case_that_fails_or_is_left_out_says_why_and_the_others_run(tiny, device, monkeypatch):
    def refuse(*_, **__):
        raise torch.OutOfMemoryError("out of memory\nsecond line")

    monkeypatch.setattr(prefill.gsa_fast, "apply_gate", refuse)
    monkeypatch.setattr(prefill, "SCORES_BYTES", 10)
    cases = [case for case in prefill.plan([16], [2], [4], ["window"]) if case.impl == "gsa_fast"]
    found = list(prefill.run(cases, prefill.Inputs(0, device, torch.float32), seconds=0, where={"device": "d"}))
    by_case = {r["case"]: r for r in found[4:]}
    assert by_case["gates"]["ms"] is None
    assert by_case["gates"]["reason"] == "failed: OutOfMemoryError: out of memory"
    assert by_case["indexer"]["reason"] == "left out: its scores would take 0 GiB"
    assert by_case["whole"]["ms"] is not None
    table = prefill.format_table(found, found)
    assert "failed: OutOfMemoryError" in table


def test_a_device_that_refuses_work_ends_the_run(tiny, device, monkeypatch):
    monkeypatch.setattr(prefill, "device_works", lambda: False)
    monkeypatch.setattr(prefill, "measure", lambda *_, **__: (_ for _ in ()).throw(RuntimeError("illegal access")))
    cases = [case for case in prefill.plan([16], [2], [4], ["window"]) if case.impl == "gsa_fast"]
    found = list(prefill.run(cases, prefill.Inputs(0, device, torch.float32), seconds=0, where={"device": "d"}))
    assert [r.get("reason") for r in found[4:]] == ["failed: RuntimeError: illegal access"]


def test_a_baseline_that_would_take_minutes_is_left_out():
    with pytest.raises(prefill.Skipped, match="two calls would take about"):
        prefill.prepare(Case("attention", "flash", 2**20, 2048, 1), prefill.Inputs(0, "cpu"))


def test_the_plan_covers_lengths_heads_and_patterns_and_a_million_tokens_have_one_kv_head():
    cases = prefill.plan(list(prefill.LENGTHS), None, [2048], list(patterns.SELECTIONS))
    whole = {(c.L, c.H_kv, c.selection) for c in cases if c.case == "whole"}
    assert len(whole) == 7 * 2 * 8
    assert sum(c.is_baseline for c in cases) == 7 * 2 * 2
    selecting = [(c.selection, c.sigmoid_mode) for c in cases if c.case == "indexed_selection" and c.L == 2048]
    assert selecting == [(s, mode) for s in ("random", "ties", "smooth") for mode in ("exact", "approximate")]
    longest = prefill.plan([prefill.MILLION], None, [2048], ["random"])
    assert {c.H_kv for c in longest} == {None, 1}
    assert [c.is_baseline for c in longest][-2:] == [True, True]
    assert longest[0].config.k_max == 4096


# ---- records and the command line ------------------------------------------------------------------------------------


def test_a_newer_record_replaces_the_older_one_of_the_same_thing(tmp_path):
    path = tmp_path / "prefill.json"
    first = {"suite": "prefill", "case": "whole", "impl": "gsa_fast", "selection": "random", "shape": {"L": 1}, "ms": 1}
    other = first | {"shape": {"L": 2}}
    assert records.read(path) == []
    records.write(path, [first, other])
    records.write(path, [first | {"ms": 2}, first | {"selection": "ties"}])
    assert [(r["selection"], r["shape"]["L"], r["ms"]) for r in records.read(path)] == [
        ("random", 1, 2),
        ("random", 2, 1),
        ("ties", 1, 1),
    ]
    assert [p.name for p in tmp_path.iterdir()] == ["prefill.json"]
    path.write_text("{}")
    with pytest.raises(ValueError, match="expected a list of records, got dict"):
        records.read(path)


def test_the_recorded_command_names_no_file():
    arguments = ["bench", "prefill", "--json", "/some/where.json", "--selection", "clustered p=0.95", "--json=x"]
    assert records.recorded_command(arguments) == "python -m gsa_fast bench prefill --selection 'clustered p=0.95'"


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
@pytest.mark.parametrize("suite", ["prefill", "decode"])
def test_without_a_gpu_the_bench_refuses_in_one_sentence(suite, capsys):
    assert main(["bench", suite]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("python -m gsa_fast bench needs a CUDA device")
    assert captured.err.count("\n") == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["prefill", "--length", "4"], "argument --length: expected at least 16, got 4"),
        (["prefill", "--kv-heads", "5"], "argument --kv-heads: expected a divisor of 32, got 5"),
        (["prefill", "--k-base", "0"], "argument --k-base: expected a number ≥ 1, got 0"),
        (["prefill", "--selection", "dense"], "argument --selection: invalid choice: 'dense'"),
        (
            ["prefill", "--json", "/no/such/folder/x.json"],
            "argument --json: expected a file in an existing folder, got",
        ),
        (["decode", "--length", "4"], "argument --length: expected at least 16, got 4"),
        (["decode", "--kv-heads", "5"], "argument --kv-heads: expected a divisor of 32, got 5"),
        (["decode", "--batch", "0"], "argument --batch: expected a number ≥ 1, got 0"),
        (["decode", "--queries", "0"], "argument --queries: expected 1 to 8, got 0"),
        (["decode", "--queries", "9"], "argument --queries: expected 1 to 8, got 9"),
        (["decode", "--json", "/no/folder/x.json"], "argument --json: expected a file in an existing folder, got"),
    ],
)
def test_bad_usage_exits_2_and_names_the_argument(arguments, message, capsys):
    with pytest.raises(SystemExit) as stopped:
        main(["bench", *arguments])
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err


def test_a_device_that_refuses_to_synchronise_works_no_more(monkeypatch):
    def refuse() -> None:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    assert suite.device_works()
    monkeypatch.setattr(torch.cuda, "synchronize", refuse)
    assert not suite.device_works()


@pytest.mark.parametrize("text", ["{", "{}"])
@pytest.mark.parametrize("name", ["prefill", "decode", "train"])
def test_a_file_that_holds_no_records_is_refused(name, text, tmp_path, capsys):
    file = tmp_path / "records.json"
    file.write_text(text)
    with pytest.raises(SystemExit, match="2"):
        main(["bench", name, "--json", str(file)])
    assert f"argument --json: {file}: expected a list of records, got " in capsys.readouterr().err


def test_a_ceiling_is_the_work_done_over_the_median_time(monkeypatch):
    """With a clock that says two milliseconds; on the meta device, where no work is done."""
    monkeypatch.setattr(timing, "measure", lambda call, **_: Timing(2.0, 1.9, 2.2, 5, 0, False))
    ceilings, timings = timing.measure_ceilings(device="meta")
    assert set(timings) == {"matmul", "copy", "gather", "special"}
    assert ceilings.matmul == pytest.approx(2 * 8192**3 / 2e-3)
    assert ceilings.copy == pytest.approx(2 * 2**31 / 2e-3)
    assert ceilings.gather == pytest.approx(8192 * 2048 * 256 / 2e-3)
    assert ceilings.special == pytest.approx(2**22 * 4096 / 2e-3)
    few, _ = timing.measure_ceilings(["copy"], device="meta")
    assert (few.copy, few.matmul) == (ceilings.copy, float("inf"))
