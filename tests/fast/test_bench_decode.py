"""`python -m gsa_fast bench decode`: rounds outgrow the L2 cache and fit in memory, work is counted right."""

import json

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

from gsa_fast.__main__ import main
from gsa_fast.bench import decode, patterns, records, rooflines, suite, timing
from gsa_fast.bench.decode import Case, Limits
from gsa_fast.bench.rooflines import Ceilings
from gsa_fast.bench.timing import Timing
from gsa_ref import GSACache, GSAConfig

GIB = 2**30
ROOMY = Limits(memory=100 * GIB, l2=50 * 2**20)


# ---- plan and sets ---------------------------------------------------------------------------------------------------


def test_the_plan_has_both_kernels_in_both_sigmoid_modes_and_both_baselines_at_every_size():
    cases = decode.plan([1, 64], [8192, 32768], [8, 1], 1)
    sizes = [(c.H_kv, c.S, c.B) for c in cases[::6]]
    assert sizes == [(h, S, B) for h in (8, 1) for S in (8192, 32768) for B in (1, 64)]
    for first in range(0, len(cases), 6):
        size = cases[first : first + 6]
        assert len({(c.H_kv, c.S, c.B, c.N) for c in size}) == 1
        assert [(c.impl, c.sigmoid_mode) for c in size] == [
            ("gsa_fast", "exact"),
            ("gsa_fast", "approximate"),
            ("gsa_fast_general", "exact"),
            ("gsa_fast_general", "approximate"),
            ("cudnn", None),
            ("flash", None),
        ]


def test_a_case_has_the_budgets_of_the_issue_and_a_baseline_has_none():
    ours, dense = Case("gsa_fast", 4, 8192, 8, 2, "exact"), Case("cudnn", 4, 8192, 8, 2)
    assert (ours.config.k_min, ours.config.k_base, ours.config.k_max) == (256, 2048, 4096)
    shape = {"B": 4, "L": 2, "S": 8192, "H": 32, "H_kv": 8, "d_h": 128}
    assert ours.shape == shape | {"H_I": 4, "d_I": 64, "k": 2048}
    assert dense.shape == shape | {"H_I": None, "d_I": None, "k": None}
    assert (ours.selection, dense.selection) == ("random", None)


def test_needed_bytes_by_hand():
    # A token: 2 · 8 · 128 + 64 numbers of 2 bytes. A query: q and gate of 32 · 128, 4 · 64 + 4 of the indexer.
    case = Case("", 3, 1000, 8, 2)
    token, query = 2 * (2 * 8 * 128 + 64), 2 * (2 * 32 * 128 + 4 * 64 + 4)
    transposed = 3 * 1000 * 8 * 128 * 2
    assert decode.needed_bytes(case, 5) == 5 * (3 * 1000 * token + 3 * 2 * query) + transposed
    assert token == GSACache.bytes_per_token(case.config, dtype=torch.bfloat16)


def test_a_round_reads_several_times_the_cache_and_has_two_sets_at_least():
    for B, S in ((1, 8192), (1, 131072), (64, 8192)):
        case = Case("", B, S, 8)
        sets = decode.count_sets(case, ROOMY)
        read = rooflines.decode_work(B, 1, S, case.config, mean_k=2048, union=2048).memory_bytes
        assert sets >= 2
        assert sets * read >= 4 * ROOMY.l2
        assert sets == 2 or (sets - 1) * read < 4 * ROOMY.l2
    assert decode.count_sets(Case("", 1, 8192, 8), ROOMY) > 20
    assert decode.count_sets(Case("", 64, 8192, 8), ROOMY) == 2


def test_one_set_serves_where_two_do_not_fit_but_only_if_it_outgrows_the_cache():
    large = Case("", 32, 131072, 8)
    one = decode.needed_bytes(large, 1)
    assert decode.count_sets(large, Limits(one, ROOMY.l2)) == 1
    with pytest.raises(suite.Skipped, match=r"1 set of inputs would take 24\.5 GiB of the 24\.0 that are free$"):
        decode.count_sets(large, Limits(24 * GIB, ROOMY.l2))
    small = Case("", 1, 8192, 8)
    with pytest.raises(suite.Skipped, match=r"23 sets of inputs would take 0\.8 GiB of the 0\.7 that are free$"):
        decode.count_sets(small, Limits(decode.needed_bytes(small, 20), ROOMY.l2))


# ---- rooflines and timing --------------------------------------------------------------------------------------------

C = GSAConfig(d=16, H=8, H_kv=2, d_h=4, H_I=3, d_I=8, k_base=2, k_min=1, k_max=4)


def test_work_of_a_decode_step_by_hand():
    # 5 sequences of 100 keys, 2 queries each, 6 keys a query, 10 together.
    work = rooflines.decode_work(5, 2, 100, C, mean_k=6, union=10)
    keys = 100 * 8 * 2  # the indexer's, bytes of a sequence
    rows = 10 * 2 * 2 * 4 * 2  # K and V
    queries = 2 * (3 * 8 * 4 + 3 * 8 + 3) * 2 + 2 * (8 + 1) * 4
    assert work.memory_bytes == 5 * (keys + rows + queries)
    assert work.flop == 5 * 2 * (2 * 100 * 3 * 8 + 4 * 4 * 8 * 6)
    assert work.special == 5 * 2 * (100 * 3 + 8 * 6 + 8 * 4)


def test_work_of_a_dense_step_by_hand():
    work = rooflines.dense_decode_work(5, 2, 100, C)
    assert work.memory_bytes == 5 * (2 * 100 * 2 * 4 * 2 + 2 * 2 * 8 * 4 * 2)
    assert work.flop == 5 * 2 * 100 * 8 * 4 * 4
    assert work.special == 5 * 2 * 100 * 8


def test_a_step_over_128k_keys_reads_25_megabytes_where_dense_attention_reads_537():
    sparse = rooflines.decode_work(1, 1, 131072, GSAConfig(), mean_k=2048, union=2048)
    dense = rooflines.dense_decode_work(1, 1, 131072, GSAConfig())
    assert sparse.memory_bytes == pytest.approx(25.2e6, rel=0.01)
    assert dense.memory_bytes == pytest.approx(537e6, rel=0.01)


def test_a_ceiling_that_was_not_measured_never_binds():
    work = rooflines.decode_work(1, 1, 4096, GSAConfig(), mean_k=2048, union=2048)
    assert work.seconds(Ceilings(copy=1e12)) == work.memory_bytes / 1e12


def test_turns_call_all_in_order_and_return_the_last_result():
    made = []
    turn = timing.take_turns([lambda i=i: made.append(i) or i for i in range(3)])
    assert turn() == 2
    assert made == [0, 1, 2]


class FakeCuda:
    """What `measure` asks of `torch.cuda`; every event pair lasts 6 ms."""

    class Event:
        def __init__(self, enable_timing):
            assert enable_timing

        def record(self):
            pass

        def elapsed_time(self, end):
            return 6.0

    def __getattr__(self, name):
        return lambda: 0


def test_a_round_of_three_calls_gives_the_time_of_one(monkeypatch):
    monkeypatch.setattr(timing.torch, "cuda", FakeCuda())
    calls = []
    measured = timing.measure(lambda: calls.append(1), graph=False, seconds=0.06, turns=3)
    assert (measured.median, measured.p20, measured.p80) == (2, 2, 2)
    assert measured.repetitions == 10  # rounds of 6 ms that fill 60 ms
    assert len(calls) == 1 + 1 + 10
    assert timing.measure(lambda: None, graph=False, seconds=0.06).median == 6


def test_union_sizes_count_a_position_once_and_empty_slots_never():
    positions = torch.tensor([[3, 1, 3, -1], [-1, -1, -1, -1], [0, 1, 2, 3]])
    assert patterns.union_sizes(positions).tolist() == [2, 0, 4]


# ---- the suite -------------------------------------------------------------------------------------------------------


@pytest.fixture
def tiny(monkeypatch):
    """The suite at sizes that the interpreter affords, with a clock that says one millisecond; the calls' turns."""
    for name, value in {"H": 4, "D_H": 16, "H_I": 2, "D_I": 16, "K_BASE": 8}.items():
        monkeypatch.setattr(decode, name, value)
    made = []

    def measure(call, *, graph, seconds, turns):
        assert graph
        made.append(turns)
        call()
        return Timing(1.0, 0.9, 1.2, 5, 1000, graph)

    copied = Timing(1.0, 0.9, 1.2, 5, 0, False)
    monkeypatch.setattr(decode, "measure", measure)
    monkeypatch.setattr(decode, "measure_ceilings", lambda names: (Ceilings(copy=1e13), dict.fromkeys(names, copied)))
    monkeypatch.setattr(decode, "device_works", lambda: True)
    return made


LIMITS = Limits(memory=GIB, l2=3000)


def inputs(seed, device, limits=LIMITS):
    return decode.Inputs(seed, device, torch.float32, limits=limits)


def run(cases, given):
    where = records.environment("a command", 7)
    found = list(decode.run(cases, given, seconds=0, where=where))
    assert [(r["case"], r["impl"]) for r in found[:1]] == [("ceiling", "copy")]
    return found[1:]


@pytest.mark.parametrize("N", [1, 3])
def test_the_suite_gives_a_record_per_case(tiny, device, N):
    cases = decode.plan([1, 2], [64], [2], N)
    found = run(cases, inputs(7, device))
    assert len({records.key(r) for r in found}) == len(cases)
    for case, record in zip(cases, found, strict=True):
        assert record["suite"] == "decode"
        assert (record["case"], record["impl"], record["shape"]) == ("decode", case.impl, case.shape)
        if case.is_baseline:
            if record["ms"] is None:  # no such backend on this machine
                assert record["reason"].startswith("failed: ")
            continue
        assert "reason" not in record, record
        assert record["ms"] == {"median": 1.0, "p20": 0.9, "p80": 1.2}
        assert record["graph"]
        assert record["mean_k"] == pytest.approx(8, rel=0.2)
        assert 1 <= record["union_over_k"] <= N * (1 + 1e-9)
        c, mean_k = case.config, record["mean_k"]
        union = record["union_over_k"] * mean_k
        work = rooflines.decode_work(case.B, N, 64, c, mean_k=mean_k, union=union)
        assert record["tbps"] == pytest.approx(1e-12 * work.memory_bytes / 1e-3)
        assert record["share_of_roofline"] == pytest.approx(work.memory_bytes / 1e13 / 1e-3)
        assert record["sets"] == decode.count_sets(case, LIMITS, torch.float32)
    assert set(tiny) == {r["sets"] for r in found if r["ms"]}  # a round's time is divided by its sets
    json.dumps(found, allow_nan=False)
    assert len(decode.format_table(found, found).splitlines()) == len(cases) + 2


def test_fused_and_general_kernels_compute_the_same_on_every_set(tiny, device):
    given = inputs(0, device)
    case = Case("gsa_fast", 2, 64, 2, 3, "exact")
    sets = given.sets(case)
    assert len(sets) >= 2
    for s in sets:
        fused = s.fused(case.config, "exact", return_selection=True)
        out, lse = s.general(case.config, "exact")
        assert torch.equal(fused.selection.indices, s.selected(case.config, "exact").indices)
        torch.testing.assert_close(fused.out, out)
        torch.testing.assert_close(fused.lse, lse)
    assert not torch.equal(sets[0].k, sets[1].k)
    assert not torch.equal(sets[0].indexer.k_idx, sets[1].indexer.k_idx)
    assert [s.start.tolist() + s.lengths.tolist() for s in sets] == [[61, 61, 64, 64]] * len(sets)


def test_the_baselines_get_the_same_values_in_their_layout(tiny, device):
    given = inputs(0, device)
    ours = given.sets(Case("gsa_fast", 2, 64, 2, 1, "exact"))
    dense = given.sets(Case("cudnn", 2, 64, 2))
    assert len(ours) == len(dense)
    for s, tensors in zip(ours, dense, strict=True):
        for a, b in zip((s.q, s.k, s.v), tensors, strict=True):
            assert b.is_contiguous()
            assert torch.equal(a.transpose(1, 2), b)


def test_inputs_are_those_of_the_seed(tiny, device):
    case = Case("gsa_fast", 1, 64, 2, 1, "exact")
    a, again, other = (inputs(seed, device).sets(case)[0] for seed in (3, 3, 4))
    for name in ("q", "k", "v", "output_gate_logits"):
        assert torch.equal(getattr(a, name), getattr(again, name)), name
        assert not torch.equal(getattr(a, name), getattr(other, name)), name


def test_a_size_that_does_not_fit_is_left_out_and_the_others_run(tiny, device):
    cases = [c for c in decode.plan([1, 64], [64], [2], 1) if not c.is_baseline]
    fits = decode.needed_bytes(cases[0], 8, torch.float32)
    found = run(cases, inputs(0, device, Limits(fits, LIMITS.l2)))
    assert [r["ms"] is None for r in found] == [r["shape"]["B"] == 64 for r in found]
    assert all(r["reason"].startswith("left out: 1 set of inputs would take") for r in found[4:])
    table = decode.format_table(found, found)
    assert "left out: 1 set of inputs" in table


def dense_everywhere(monkeypatch, takes):
    """Baselines that this machine has, and that take grouped heads or not."""
    called = []

    def dense_call(impl, q, k, v, *, causal):
        called.append((impl, tuple(q.shape), tuple(k.shape), causal))
        out = scaled_dot_product_attention(q, k, v, enable_gqa=True)
        return lambda: out, "" if takes else "keys and values repeated"

    monkeypatch.setattr(decode, "takes_heads", lambda *_, **__: takes)
    monkeypatch.setattr(decode, "dense_call", dense_call)
    return called


def test_a_baseline_attends_to_all_keys_without_a_mask_and_says_so_for_several_queries(tiny, device, monkeypatch):
    called = dense_everywhere(monkeypatch, takes=True)
    single, several = run([Case("cudnn", 2, 64, 2), Case("cudnn", 2, 64, 2, 3)], inputs(0, device))
    assert set(called) == {("cudnn", (2, 4, n, 16), (2, 2, 64, 16), False) for n in (1, 3)}
    assert "note" not in single
    assert several["note"] == "without a mask among the new tokens"
    floor = 2 * (64 * 2 * 16 * 2 * 2 + 2 * 4 * 16 * 2)  # K and V, the query and the result; 2 bytes a number
    assert single["tbps"] == pytest.approx(1e-12 * floor / 1e-3)


def test_a_baseline_that_reads_the_wrong_rows_fails(tiny, device, monkeypatch):
    dense_everywhere(monkeypatch, takes=True)
    given = decode.dense_call
    monkeypatch.setattr(
        decode, "dense_call", lambda impl, q, k, v, **options: given(impl, q, k, v.roll(1, 2), **options)
    )
    (found,) = run([Case("cudnn", 2, 64, 2)], inputs(0, device))
    assert found["reason"] == "failed: RuntimeError: the result of the dense attention is wrong"


def test_a_baseline_whose_repeated_heads_do_not_fit_is_left_out(tiny, device, monkeypatch):
    dense_everywhere(monkeypatch, takes=False)
    case = Case("cudnn", 2, 64, 2)
    (found,) = run([case], inputs(0, device))
    assert found["note"] == "keys and values repeated"
    sets = decode.count_sets(case, LIMITS, torch.float32)
    tight = Limits(decode.needed_bytes(case, sets, torch.float32), LIMITS.l2)
    (left_out,) = run([case], inputs(0, device, tight))
    assert left_out["reason"].startswith("left out: the backend takes no grouped heads")


def test_a_case_that_fails_says_why_and_a_device_that_refuses_work_ends_the_run(tiny, device, monkeypatch):
    cases = [c for c in decode.plan([1], [64], [2], 1) if c.impl == "gsa_fast"]
    monkeypatch.setattr(decode, "measure", lambda *_, **__: (_ for _ in ()).throw(RuntimeError("illegal access")))
    assert [r["reason"] for r in run(cases, inputs(0, device))] == ["failed: RuntimeError: illegal access"] * 2
    monkeypatch.setattr(decode, "device_works", lambda: False)
    assert len(run(cases, inputs(0, device))) == 1


@pytest.fixture
def with_a_gpu(tiny, device, monkeypatch):
    made = decode.Inputs
    monkeypatch.setattr(decode, "INTERPRETED", False)
    monkeypatch.setattr(decode.torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(decode.torch.cuda, "get_device_name", lambda: "a device")
    monkeypatch.setattr(decode, "device_limits", lambda: LIMITS)
    monkeypatch.setattr(decode, "Inputs", lambda seed: made(seed, device, torch.float32))
    dense_everywhere(monkeypatch, takes=True)


def test_the_command_writes_the_records_and_prints_a_table(with_a_gpu, tmp_path, capsys):
    path = tmp_path / "decode.json"
    arguments = ["--batch", "1", "--length", "64", "--kv-heads", "2", "--queries", "2", "--json", str(path)]
    for _ in range(2):
        assert main(["bench", "decode", *arguments]) == 0
    found = records.read(path)
    assert [r["impl"] for r in found] == [
        "copy", "gsa_fast", "gsa_fast", "gsa_fast_general", "gsa_fast_general", "cudnn", "flash",
    ]  # fmt: skip
    assert {r["command"] for r in found} == {
        "python -m gsa_fast bench decode --batch 1 --length 64 --kv-heads 2 --queries 2"
    }
    printed = capsys.readouterr().out
    assert "6 cases on a device, seed 0." in printed
    assert "Ceilings: copy 10 TB/s" in printed
    assert printed.count("1.00×") == 12


def test_speedups_are_over_the_stored_cudnn_record_of_the_same_size(with_a_gpu, tmp_path):
    path = tmp_path / "decode.json"
    assert main(["bench", "decode", "--batch", "1", "--length", "64", "--kv-heads", "2", "--json", str(path)]) == 0
    found = records.read(path)
    for r in found:
        if r["impl"] == "cudnn":
            r["ms"]["median"] = 5.0
    rows = [r for r in found if r["impl"] == "gsa_fast"]
    assert decode.format_table(rows, found).count("5.00×") == 2
    other = [r | {"shape": r["shape"] | {"L": 2}} if r["impl"] == "cudnn" else r for r in found]
    assert "×" not in decode.format_table(rows, other)


def test_the_default_sizes_are_those_of_the_page(with_a_gpu, monkeypatch, capsys):
    planned = []
    monkeypatch.setattr(decode, "run", lambda cases, *_, **__: planned.append(cases) or iter(()))
    monkeypatch.setattr(decode, "format_table", lambda *_: "")
    main(["bench", "decode"])
    main(["bench", "decode", "--quick"])
    full, quick = ({(c.H_kv, c.S, c.B, c.N) for c in cases} for cases in planned)
    lengths = (8192, 32768, 131072, 524288, 1048576)
    assert full == {(8, S, B, 1) for S in lengths for B in (1, 2, 4, 8, 16, 32, 64)}
    assert quick < full


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_the_bench_runs_on_the_device(tmp_path, capsys):
    path = tmp_path / "decode.json"
    assert main(["bench", "decode", "--quick", "--batch", "2", "--length", "8192", "--json", str(path)]) == 0
    ours = [r for r in records.read(path) if r["impl"].startswith("gsa_fast")]
    assert len(ours) == 4
    assert all(r["ms"] and r["graph"] for r in ours), [r.get("reason") for r in ours]
    assert all(r["mean_k"] == pytest.approx(2048, rel=0.05) for r in ours)
    assert "over cuDNN" in capsys.readouterr().out
