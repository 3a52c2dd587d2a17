"""`python -m gsa_fast bench train`: the cases, their gradients and the records."""

import json
from dataclasses import replace

import pytest
import torch

import gsa_fast
import gsa_ref
from gsa_fast.__main__ import main
from gsa_fast.bench import kl, patterns, prefill, records, rooflines, train
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
    ("options", "lengths"), [(["--length", "128", "--length", "64"], [128, 64]), (["--quick"], None), ([], None)]
)
@pytest.mark.parametrize("parts", [[], ["attention"], ["kl_loss"]])
def test_the_command_measures_the_cases_of_its_options(options, lengths, parts, monkeypatch):
    """As on a GPU; what would measure there is a stub."""
    seen = {}
    monkeypatch.setattr(train.suite, "refuses", lambda interpreted: False)
    monkeypatch.setattr(train.prefill, "Inputs", lambda seed: seed)
    monkeypatch.setattr(train, "run", lambda cases, inputs, **given: seen.update(cases=cases, seed=inputs, **given))
    monkeypatch.setattr(train.suite, "report", lambda run, n, *rest: run({"where": 1}) or seen.update(n=n) or 0)
    only = [argument for part in parts for argument in ("--case", part)]
    assert main(["bench", "train", "--seed", "7", "--kv-heads", "2", *options, *only]) == 0
    quick = "--quick" in options
    selections = list(train.QUICK_SELECTIONS if quick else train.SELECTIONS)
    expected = []
    for part, module in (("attention", train), ("kl_loss", kl)):
        if part in (parts or [part]):
            usual = module.QUICK_LENGTHS if quick else module.LENGTHS
            expected += module.plan(lengths or list(usual), [2], selections)
    assert (seen["cases"], seen["n"], seen["seed"]) == (expected, len(expected), 7)
    assert seen["seconds"] == (train.QUICK_SECONDS if quick else train.SECONDS)


# ---- the KL loss -----------------------------------------------------------------------------------------------------


@pytest.fixture
def tiny_kl(tiny, monkeypatch):
    """`tiny` with an indexer and a device of 1 GB."""
    for module, name, value in (
        (prefill, "H_I", 2), (prefill, "D_I", 16), (kl, "K_BASE", 4), (kl, "device_bytes", lambda: 10**9)
    ):  # fmt: skip
        monkeypatch.setattr(module, name, value)
    return tiny


def run_kl(cases, device, dtype=torch.float32):
    return list(train.run(cases, prefill.Inputs(3, device, dtype), seconds=0, where=records.environment("a", 3)))[4:]


def test_the_kl_loss_is_measured_in_both_phases_beside_the_reference(tiny_kl, device):
    cases = kl.plan([24], [2], ["random"])
    found = run_kl(cases, device)
    assert [(r["case"], r["impl"], r["selection"], r["shape"]["k"]) for r in found] == [
        (f"kl_{phase}_{passes}", impl, selection, k)
        for phase, selection, k in (("warm_up", None, None), ("sparse", "random", 4))
        for passes in ("forward", "forward_backward")
        for impl in ("gsa_fast", "gsa_ref")
    ]
    assert len({records.key(r) for r in found}) == len(found)
    for record in found:
        assert "reason" not in record, record
        sizes = {"B": 1, "L": 24, "S": 24, "H": 4, "H_kv": 2, "d_h": 16, "H_I": 2, "d_I": 16}
        assert {name: record["shape"][name] for name in sizes} == sizes
        assert record["ms"]["median"] == 2
        assert record["share_of_roofline"] > 0
        assert (record["mean_k"] is None) == (record["selection"] is None)
    json.dumps(found, allow_nan=False)
    for ours, theirs, case in zip(tiny_kl[::2], tiny_kl[1::2], cases[::2], strict=True):
        assert len(ours) == (1 if case.passes == "forward" else 5)
        for x, y in zip(ours, theirs, strict=True):
            assert x.shape == y.shape
            assert x.any()
            torch.testing.assert_close(x, y, atol=1e-6, rtol=1e-3)
    assert not torch.equal(tiny_kl[0][0], tiny_kl[4][0])  # the phases
    assert torch.equal(tiny_kl[0][0], tiny_kl[2][0])  # the passes


@pytest.mark.parametrize("selection", [None, "random"])
@pytest.mark.parametrize("passes", [kl.FORWARD, kl.FORWARD_BACKWARD])
def test_the_kernels_are_timed_under_their_name_and_the_reference_under_its(
    passes, selection, tiny_kl, device, monkeypatch
):
    for package in (gsa_ref, gsa_fast):
        loss = package.indexer_kl_loss

        def tell(*arguments, package=package, loss=loss, **given):
            called.append((package.__name__, given.get("impl"), torch.is_grad_enabled(), given["q_idx"].requires_grad))
            return loss(*arguments, **given)

        monkeypatch.setattr(package, "indexer_kl_loss", tell)
    called = []
    for impl, how in (("gsa_fast", "triton"), ("gsa_ref", None)):
        call = kl.prepare(kl.Case(impl, 24, 2, passes, selection), prefill.Inputs(3, device, torch.float32), set()).call
        called.clear()
        call()
        wants_gradients = passes == kl.FORWARD_BACKWARD
        assert called == [(impl, how, wants_gradients, wants_gradients)]


def test_the_sparse_loss_is_that_of_the_drawn_selection(tiny_kl, device):
    inputs = prefill.Inputs(3, device, torch.float32)
    case = kl.Case(kl.OURS, 24, 2, kl.FORWARD, "random")
    (loss,) = kl.prepare(case, inputs, set()).call()
    given, selection = inputs.attention(24, 2, False), inputs.selection(24, 4, "random")
    indexer = patterns.random_indexer_inputs(24, case.config, seed=3, device=device, dtype=torch.float32)
    expected = gsa_ref.indexer_kl_loss(
        **indexer.scores_arguments(), q=given.q, k=given.k, selection=selection,
        indexer_scale=16**-0.5, temperature=case.config.kl_temperature,
    )  # fmt: skip
    torch.testing.assert_close(loss, expected, atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize("selection", [None, "random"])
@pytest.mark.parametrize(
    ("output", "name"), list(enumerate(["the loss", *(f"the gradient of {n}" for n in kl.LEARNED)]))
)
def test_a_wrong_kl_loss_or_gradient_is_not_timed(selection, output, name, tiny_kl, device, monkeypatch):
    made = kl.make_call

    def wrong(case, arguments):
        call = made(case, arguments)
        if case.is_baseline:
            return call
        return lambda: tuple(1.05 * x if n == output else x for n, x in enumerate(call()))

    monkeypatch.setattr(kl, "make_call", wrong)
    (found,) = run_kl([kl.Case(kl.OURS, 24, 2, kl.FORWARD_BACKWARD, selection)], device)
    assert found["ms"] is None
    assert found["reason"].startswith(f"failed: RuntimeError: {name} is wrong: off by ")
    assert tiny_kl == []


def test_a_long_kl_loss_is_compared_with_the_reference_at_a_short_length_and_once(tiny_kl, device, monkeypatch):
    seen = []
    monkeypatch.setattr(kl, "CHECKED_LENGTH", 20)
    monkeypatch.setattr(kl, "check", lambda case, inputs: seen.append((case.L, case.case)))
    run_kl(kl.plan([16, 24, 32], [2], []), device)
    assert seen == [(L, f"kl_warm_up_{passes}") for L in (16, 20) for passes in ("forward", "forward_backward")]


def test_a_reference_that_does_not_fit_is_left_out(tiny_kl, device, monkeypatch):
    """Four heads of 24 × 24 float32 logits, twice: 18,432 bytes."""
    case = kl.Case(kl.REFERENCE, 24, 2, kl.FORWARD)
    assert kl.reference_bytes(case) == 18432
    monkeypatch.setattr(kl, "device_bytes", lambda: 18431)
    ours, reference = run_kl([replace(case, impl=kl.OURS), case], device)
    assert ours["ms"] is not None
    assert (reference["ms"], reference["reason"][:36]) == (None, "left out: the reference would take m")


def test_memory_that_runs_out_leaves_the_reference_out_and_is_a_failure_of_the_kernels(tiny_kl, device, monkeypatch):
    def refuse(*_, **__):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(train, "measure", refuse)
    found = run_kl([kl.Case(impl, 24, 2, kl.FORWARD) for impl in (kl.OURS, kl.REFERENCE)], device)
    assert [r["reason"] for r in found] == [
        "failed: OutOfMemoryError: CUDA out of memory",
        "left out: the reference does not fit in memory",
    ]


def test_the_table_gives_the_ratio_of_the_kl_loss_to_the_reference_of_the_same_case(tiny_kl, device):
    found = run_kl([kl.Case(kl.OURS, 24, 2, kl.FORWARD)], device)
    reference = dict(found[0], impl=kl.REFERENCE, ms={"median": 8.0, "p20": 8.0, "p80": 8.0})
    assert "0.25×" in train.format_table(found, [*found, reference])
    for other in ({"case": "kl_warm_up_forward_backward"}, {"selection": "random"}, {"impl": "cudnn", "case": "x"}):
        assert "×" not in train.format_table(found, [*found, reference | other])


def test_work_of_the_kl_loss_by_hand():
    """L = 4: ten pairs; 8 heads of width 4 over 2, an indexer of 3 heads of width 8; tiles of 16 queries."""
    c = GSAConfig(d=16, H=8, H_kv=2, d_h=4, H_I=3, d_I=8, k_base=2, k_min=1, k_max=4)
    indexer = 4 * (24 + 8 + 3) * 2
    attention = 4 * (32 + 8) * 2
    loss, gradients = rooflines.kl_loss_work(4, c), rooflines.kl_gradients_work(4, c)
    assert loss.flop == 10 * (2 * 2 * 32 + 2 * 24)  # all logits twice, the scores once
    assert loss.special == 10 * (2 * 8 + 3 + 2)
    assert (loss.memory_bytes, loss.l2_bytes) == (attention + indexer, 0)
    assert (gradients.flop, gradients.special) == (10 * 3 * 2 * 24, 10 * (3 + 1))
    assert (gradients.memory_bytes, gradients.l2_bytes) == (2 * indexer, 0)
    # Sparse, 32 queries of 2 keys, so 64 pairs; two tiles whose unions hold 5 keys of 2 · 4 and of 8 numbers.
    loss, gradients = (f(32, c, mean_k=2, union=5) for f in (rooflines.kl_loss_work, rooflines.kl_gradients_work))
    assert loss.flop == 64 * (2 * 32 + 2 * 24)
    assert loss.special == 64 * (8 + 3 + 2)
    assert loss.memory_bytes == 8 * (attention + indexer) + 64 * 4 + 32 * 8 * 4
    assert loss.l2_bytes == 2 * 5 * (8 + 8) * 2
    assert gradients.flop == 64 * 3 * 2 * 24
    assert gradients.memory_bytes == 2 * 8 * indexer + 64 * 4
    assert gradients.l2_bytes == 2 * 5 * 8 * 2
