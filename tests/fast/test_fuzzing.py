"""Bad and odd input to the whole public API: a sample here, 10,000 calls with `make fuzz`."""

import pytest
import torch
from hypothesis import given

import gsa_fast
import gsa_ref
from tests import fuzzing
from tests.fast.helpers import examples
from tests.fuzzing import FUNCTIONS, KERNELS, REFERENCE, Violation, calls, run


@examples(300)
@given(calls())
def test_a_call_ends_as_its_contract_says(call):
    run(call)


def test_every_public_name_is_called():
    called = {name.partition(",")[0] for name in FUNCTIONS} | {name.partition(".")[0] for name in FUNCTIONS}
    results = {"GSAOutput", "ModelOutput", "DecodeOutput"}  # what calls return: nobody makes one
    assert (
        set(gsa_ref.__all__) | set(gsa_fast.__all__)
        == {n for n in called if n != "check"} - {n for n in called if "." in n} | results
    )


@pytest.mark.parametrize("name", FUNCTIONS)
def test_legal_calls_of_the_fuzzer_are_legal(name):
    """Else a call could be refused for a reason that the fault has nothing to do with."""
    for impl in FUNCTIONS[name].impls:
        function = FUNCTIONS[name].of(impl)
        sizes = fuzzing.SIZES | {"B": 2, "L": 3, "S": 5}
        for given_ in (True, False):
            arguments = fuzzing.legal(function, sizes, torch.Generator().manual_seed(0), lambda given_=given_: given_)
            assert run(fuzzing.Call(name, impl, sizes, arguments, (), (), False)) == "result"


# ---- the fuzzer sees what it looks for -------------------------------------------------------------------------------


def gate_call(impl: str, *, bad: bool) -> fuzzing.Call:
    function, sizes = FUNCTIONS["apply_gate"].of(impl), fuzzing.SIZES | {"B": 2, "L": 3, "S": 5}
    arguments = fuzzing.legal(function, sizes, torch.Generator().manual_seed(0), lambda: True)
    faults = ()
    if bad:
        faults = (fuzzing.fault("type", "gate_logits", None, TypeError),)
        arguments["gate_logits"] = None
    return fuzzing.Call("apply_gate", impl, sizes, arguments, faults, (), False)


def raises(error: Exception):
    def broken(*arguments, **keywords):
        raise error

    return broken


@pytest.mark.parametrize(
    ("broken", "complaint"),
    [
        (lambda x, gate_logits: x, "was accepted"),
        (raises(ValueError("gate_logits: expected a torch.Tensor, got NoneType")), "raised ValueError"),
        (raises(TypeError("x: expected a torch.Tensor, got NoneType")), "raised TypeError"),
        (raises(TypeError("unsupported operand")), "raised TypeError"),
        (raises(AttributeError("'NoneType' object has no attribute 'shape'")), "raised AttributeError"),
        (raises(AssertionError()), "raised AssertionError"),
    ],
)
def test_a_refusal_of_another_kind_is_a_violation(monkeypatch, broken, complaint):
    assert run(gate_call(REFERENCE, bad=True)) == "TypeError"
    monkeypatch.setattr(gsa_ref, "apply_gate", broken)
    with pytest.raises(Violation, match=complaint):
        run(gate_call(REFERENCE, bad=True))


@pytest.mark.parametrize(
    ("package", "impl", "broken", "complaint"),
    [
        (gsa_fast, KERNELS, lambda x, gate_logits, impl: x, "returned something else"),
        (gsa_ref, REFERENCE, lambda x, gate_logits: x + (not x.is_contiguous()), "returned something else"),
        (gsa_ref, REFERENCE, lambda x, gate_logits: x.mul_(2), "changed an argument"),
        (gsa_ref, REFERENCE, raises(ValueError("x: expected contiguous, got strides")), "raised ValueError"),
    ],
)
def test_a_wrong_result_of_a_legal_call_is_a_violation(monkeypatch, package, impl, broken, complaint):
    call = gate_call(impl, bad=False)
    call.arguments["x"] = call.arguments["x"].transpose(0, 1).contiguous().transpose(0, 1)
    assert run(call) == "result"
    monkeypatch.setattr(package, "apply_gate", broken)
    with pytest.raises(Violation, match=complaint):
        run(call)


def test_a_cache_that_a_refused_call_changed_is_a_violation(monkeypatch):
    sizes = fuzzing.SIZES | {"B": 2, "L": 3, "S": 5}
    arguments = {"cache": fuzzing.cache_of(sizes), "n_new": -1}
    faults = (fuzzing.fault("value", "n_new", -1, ValueError),)
    call = fuzzing.Call("GSACache.advance", REFERENCE, sizes, arguments, faults, (), False)
    assert run(call) == "ValueError"

    def broken(cache, n_new):
        cache.longest += n_new
        raise ValueError("n_new: expected an int ≥ 0, got -1")

    monkeypatch.setattr(gsa_ref.GSACache, "advance", broken)
    with pytest.raises(Violation, match="changed an argument"):
        run(call)


def test_the_command_writes_a_record_and_fails_on_a_violation(tmp_path, monkeypatch, capsys):
    path = tmp_path / "record.json"
    assert fuzzing.main(["--calls", "40", "--json", str(path)]) == 0
    assert '"violations": 0' in path.read_text()
    monkeypatch.setattr(fuzzing, "run", raises(Violation("a call")))
    assert fuzzing.main(["--calls", "3"]) == 1
    assert "a call" in capsys.readouterr().out
