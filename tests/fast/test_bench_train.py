"""`python -m gsa_fast bench train`: the cases, their gradients and the records."""

import json

import pytest
import torch

import gsa_ref
from gsa_fast.__main__ import main
from gsa_fast.bench import prefill, records, rooflines, train
from gsa_fast.bench.rooflines import Ceilings
from gsa_fast.bench.timing import Timing
from gsa_ref import GSAConfig


@pytest.fixture
def tiny(monkeypatch):
    """The suite at sizes that the interpreter affords, with a clock that says two milliseconds; the calls' results."""
    for module in (prefill, train):
        for name, value in {"H": 4, "D_H": 16, "K_BASE": 4}.items():
            monkeypatch.setattr(module, name, value)
    calls = []

    def measure(call, *, graph, seconds):
        calls.append(call())
        return Timing(2.0, 1.9, 2.2, 5, 1000, graph)

    ceilings = Ceilings(matmul=1e15, copy=1e13, gather=1e13, special=1e13)
    timings = dict.fromkeys(vars(ceilings), Timing(1.0, 1.0, 1.0, 5, 0, False))
    monkeypatch.setattr(train, "measure", measure)
    monkeypatch.setattr(train, "measure_ceilings", lambda: (ceilings, timings))
    monkeypatch.setattr(train, "device_works", lambda: True)
    return calls


def test_the_suite_measures_gradients_summed_in_order_and_atomically(tiny, device):
    cases = train.plan([24], [2], ["random"])
    assert [c.impl for c in cases] == ["cudnn", "flash", train.IN_ORDER, train.ATOMIC]
    ours = [c for c in cases if not c.is_baseline]
    inputs = prefill.Inputs(3, device, torch.float32)
    found = list(train.run(ours, inputs, seconds=0, where=records.environment("a command", 3)))[4:]
    assert [r["impl"] for r in found] == [train.IN_ORDER, train.ATOMIC]
    assert len({records.key(r) for r in found}) == 2
    for record in found:
        assert "reason" not in record, record
        assert (record["case"], record["selection"]) == ("forward_backward", "random")
        assert record["shape"] == {
            "B": 1, "L": 24, "S": 24, "H": 4, "H_kv": 2, "d_h": 16, "H_I": None, "d_I": None, "k": 4
        }  # fmt: skip
        assert record["share_of_roofline"] > 0
        assert record["union_over_k"] >= 1
    json.dumps(found, allow_nan=False)
    assert len(train.format_table(found, found).splitlines()) == 4
    given = inputs.attention(24, 2, False)
    for gradients in tiny:
        assert [g.shape for g in gradients] == [
            given.q.shape, given.k.shape, given.v.shape, given.v.shape, given.q.shape
        ]  # fmt: skip
        assert all(g.any() for g in gradients)
    selection = inputs.selection(24, 4, "random")
    out, _ = gsa_ref.sparse_attention(given.q, given.k, given.v, selection, **given.gates())
    assert out.shape == given.q.shape
    # The output's gradient is drawn anew for each case: only zeros are the same.
    assert torch.equal(tiny[0][1] == 0, tiny[1][1] == 0)


def test_the_table_gives_the_ratio_to_cudnn(tiny, device):
    where = records.environment("a command", 0)
    case = train.Case(train.IN_ORDER, 24, 2, "random")
    found = list(train.run([case], prefill.Inputs(0, device, torch.float32), seconds=0, where=where))
    dense = dict(found[-1], impl="cudnn", selection=None, ms={"median": 8.0, "p20": 8.0, "p80": 8.0})
    assert "0.25×" in train.format_table(found, [*found, dense])


def test_work_of_the_backward_pass_by_hand():
    """Two tiles of 16 queries and 4 heads a group, whose unions hold 10 keys: five products of 64 × 10 × 8 each."""
    config = GSAConfig(d=16, H=8, H_kv=2, d_h=8, k_base=4, k_min=1, k_max=8)
    in_order, atomic = (
        rooflines.attention_backward_work(32, config, mean_k=4, union=10, deterministic=d) for d in (True, False)
    )
    assert in_order.flop == atomic.flop == 2 * 2 * 5 * 2 * 64 * 10 * 8
    parts = 2 * 2 * 10 * 2 * 8  # tiles × groups × keys × (dk and dv) × channels
    assert in_order.memory_bytes - atomic.memory_bytes == 2 * 2 * parts
    assert atomic.l2_bytes - in_order.l2_bytes == 4 * parts
    assert rooflines.dense_backward_work(32, config).flop == 2.5 * rooflines.dense_work(32, config).flop


def test_bad_usage_names_the_argument(capsys):
    with pytest.raises(SystemExit):
        main(["bench", "train", "--length", "3"])
    assert "argument --length: expected at least 16, got 3" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "lengths"), [(["--length", "128", "--length", "64"], [128, 64]), (["--quick"], None)]
)
def test_the_command_measures_the_cases_of_its_options(options, lengths, monkeypatch):
    """As on a GPU; what would measure there is a stub."""
    seen = {}
    monkeypatch.setattr(train.suite, "refuses", lambda interpreted: False)
    monkeypatch.setattr(train.prefill, "Inputs", lambda seed: seed)
    monkeypatch.setattr(train, "run", lambda cases, inputs, **given: seen.update(cases=cases, seed=inputs, **given))
    monkeypatch.setattr(train.suite, "report", lambda run, n, *rest: run({"where": 1}) or seen.update(n=n) or 0)
    assert main(["bench", "train", "--seed", "7", "--kv-heads", "2", *options]) == 0
    expected = train.plan(lengths or list(train.QUICK_LENGTHS), [2], list(
        train.QUICK_SELECTIONS if "--quick" in options else train.SELECTIONS
    ))  # fmt: skip
    assert (seen["cases"], seen["n"], seen["seed"]) == (expected, len(expected), 7)
    assert seen["seconds"] == (train.QUICK_SECONDS if "--quick" in options else train.SECONDS)
