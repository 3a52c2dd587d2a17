"""`python -m gsa_fast verify --length --gradients`: one long sequence at sampled queries and keys. Here a short one."""

import json

import pytest
import torch

import gsa_fast
import gsa_ref
from gsa_fast.__main__ import main
from gsa_fast.verification import long_gradients
from gsa_fast.verification.interpreter import small_tiles
from gsa_ref import GSAConfig

CONFIG = GSAConfig(d=16, H=2, H_kv=1, d_h=8, H_I=2, d_I=16, k_base=6, k_min=2, k_max=12)
L = 20


def verify(device: str, **keywords) -> dict[str, str]:
    keywords = {"rows": 9, "reruns": 0, "seed": 0, "dtype": torch.float16} | keywords
    with small_tiles():
        found = long_gradients.verify_gradients(L, CONFIG, device=device, **keywords)
    return {row.stem: row.verdict for row in found}


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_right_kernels_pass(dtype, device):
    with small_tiles():
        found = long_gradients.verify_gradients(L, CONFIG, rows=9, reruns=1, seed=0, dtype=dtype, device=device)
    assert {row.stem: row.verdict for row in found} == dict.fromkeys([*long_gradients.CHECKS, "reruns"], "pass")
    assert [row.cases for row in found] == [18, 18, 8, 8, 8, 1]
    assert all(0 < row.ratio < 1 for row in found[:-1])
    record = long_gradients.to_record(found, L, CONFIG, "a command", 0)
    assert record["case"] == "attention_backward"
    json.dumps(record, allow_nan=False)


@pytest.mark.parametrize(("name", "check"), [("q", "dq"), ("value_gate_logits", "d value gate")])
def test_a_wrong_gradient_fails_its_check_alone(name, check, device, monkeypatch):
    class Wrong(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, gradient):
            return gradient * 1.1

    right = gsa_fast.sparse_attention

    def wrong(**arguments):
        return right(**arguments | {name: Wrong.apply(arguments[name])})

    monkeypatch.setattr(gsa_fast, "sparse_attention", wrong)
    verdicts = verify(device)
    assert verdicts.pop(check) == "FAIL"
    assert verdicts.pop("reruns") == "not run"
    assert set(verdicts.values()) == {"pass"}


def test_gold_is_the_reference_in_float64(device):
    """The chain rule written out gives what autograd gives."""
    g = torch.Generator().manual_seed(0)
    q, dout, gate = (torch.randn(1, 8, 4, 6, generator=g, dtype=torch.float64).to(device) for _ in range(3))
    k, v = (torch.randn(1, 8, 2, 6, generator=g, dtype=torch.float64).to(device) for _ in range(2))
    scores = torch.randn(1, 8, 8, generator=g).masked_fill(torch.ones(8, 8).triu(1) > 0, -torch.inf).to(device)
    selection = gsa_ref.select_tokens(
        scores,
        torch.full((1, 8), 3, dtype=torch.int32, device=device).clamp(
            max=torch.arange(1, 9, device=device, dtype=torch.int32)
        ),
    )
    leaves = {"q": q, "k": k, "v": v, "output_gate_logits": gate}
    leaves = {name: x.requires_grad_() for name, x in leaves.items()}
    out, _ = gsa_ref.sparse_attention(**leaves, selection=selection)
    expected = dict(zip(leaves, torch.autograd.grad(out, list(leaves.values()), dout), strict=True))
    tensors = {name: x.detach() for name, x in leaves.items()}
    rows = long_gradients.rows_of(tensors, selection, dout, torch.arange(8, device=device))
    torch.testing.assert_close(rows.dq, expected["q"][0])
    torch.testing.assert_close(rows.dgate, expected["output_gate_logits"][0])
    for s in range(8):
        dk, _, dv, _ = long_gradients.key_gradients(tensors, selection, dout, s)
        torch.testing.assert_close(dk, expected["k"][0, s])
        torch.testing.assert_close(dv, expected["v"][0, s])


def test_without_a_gpu_the_command_says_what_it_needs(capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit):
        main(["verify", "--length", "64", "--gradients"])
    assert "argument --length: needs a CUDA device" in capsys.readouterr().err
