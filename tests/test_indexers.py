"""The comparison of the forms of an indexer: each form is what it says, all learn alike, the record is complete."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from experiments import indexers, study, text, train
from gsa_ref import GSAConfig, indexer_kl_loss
from gsa_ref.training import captured_mass

TEXT = torch.randint(0, 256, (6000,), generator=torch.Generator().manual_seed(0)).to(torch.int16)
SOURCE = text.Text("random", "0" * 64, TEXT[:4000], TEXT[4000:])
CONFIG = GSAConfig(d=16, H_I=2, d_I=8, indexer_rope=True)
PLAN = indexers.Plan(context=32, batch=2, steps=3, seeds=(0, 1), rates=(1e-3,), windows=4, H_I=2, d_I=8)


@pytest.fixture
def h() -> Tensor:
    return torch.randn(2, 12, 16, generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "dense"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(text, "read", lambda path: SOURCE)
        train.train(study.parse(indexers.SMOKE + " --steps 2 --context 32", folder), folder)
    return folder


@pytest.mark.parametrize("form", indexers.TAU)
def test_each_form_is_its_formula(form: str, h: Tensor):
    indexer = indexers.new_indexer(CONFIG, 0, "cpu")
    with torch.no_grad():
        indexer.bias.copy_(torch.tensor([0.3, -0.2]))
        q, k, w = indexer(h)
        found = indexers.scores(form, indexer, h)
    bias = indexer.bias.tolist()
    for b in range(2):
        for t in range(12):
            for s in range(12):
                z = [float(q[b, t, j] @ k[b, s]) / 8**0.5 for j in range(2)]
                weights = [float(x) for x in w[b, t]]
                opened = [1 / (1 + math.exp(-z[j] - bias[j])) for j in range(2)]
                terms = {
                    "relu": [weights[j] * max(z[j], 0) for j in range(2)],
                    "sigmoid": opened,
                    "gated_sigmoid": [opened[j] / (1 + math.exp(-weights[j])) for j in range(2)],
                }[form]
                expected = sum(terms) if s <= t else -torch.inf
                assert float(found[b, t, s]) == pytest.approx(expected, rel=1e-5, abs=1e-6)


def test_another_form_is_refused(h: Tensor):
    with pytest.raises(ValueError, match="form: expected one of relu"):
        indexers.scores("softmax", indexers.new_indexer(CONFIG, 0, "cpu"), h)


def test_the_loss_is_the_reference_s(h: Tensor):
    indexer = indexers.new_indexer(CONFIG, 0, "cpu")
    generator = torch.Generator().manual_seed(2)
    q, k = (torch.randn(2, 12, n, 4, generator=generator) for n in (4, 2))
    p = indexers.attention(q, k, torch.ones(2, 12, 12, dtype=torch.bool).tril()).mean(2)
    entropy = torch.xlogy(p, p).sum(-1).mean()
    found = indexers.kl(indexers.scores("gated_sigmoid", indexer, h), p, 0.3, entropy)
    expected = indexer_kl_loss(*indexer(h), indexer.bias, q, k, indexer_scale=8**-0.5, temperature=0.3)
    torch.testing.assert_close(found, expected)
    # And what is captured is what the reference says of the same selection.
    budget = torch.full((2, 12), 4, dtype=torch.int32)
    scores = torch.randn(2, 12, 12, generator=generator)
    scores = scores.masked_fill(~torch.ones(12, 12, dtype=torch.bool).tril(), -torch.inf)
    selected, oracle = captured_mass(q, k, indexers.select_tokens(scores, budget))
    assert indexers.find(scores, p, 4)[1] == pytest.approx(float(selected[:, 4:].sum() / oracle[:, 4:].sum()))


def test_scores_in_the_order_of_the_attention_find_all_and_in_the_opposite_order_little():
    p = torch.rand(2, 40, 40, generator=torch.Generator().manual_seed(0)).tril()
    p /= p.sum(-1, keepdim=True)
    assert indexers.find(p.log(), p, 5) == pytest.approx((1, 1))
    recall, captured = indexers.find(-p, p, 5)
    assert recall < 0.2
    assert captured < 0.5


def test_the_teacher_is_what_the_layer_attends_to(dense: Path):
    """o = p v, for a model with one head: the output of the layer follows from h and p."""
    model = study.parse("--variant dense --d 16 --d-ff 16 --H 1 --H-kv 1 --d-h 16 --d-I 8", dense).build_model().eval()
    outputs: list[Tensor] = []
    for block in model.blocks:
        block.attention.register_forward_hook(lambda _, __, output: outputs.append(output.hidden))
    tokens = TEXT[None, :20].long()
    for (h, p), block, u in zip(indexers.teach(model, tokens), model.blocks, outputs, strict=True):
        layer: Any = block.attention
        torch.testing.assert_close(layer.W_o(p @ layer.W_v(h)), u)


def test_all_forms_begin_alike_and_see_the_same_text(dense: Path, monkeypatch: pytest.MonkeyPatch):
    model = study.parse(indexers.SMOKE, dense).build_model().eval()
    model.requires_grad_(False)
    before = [p.clone() for p in model.parameters()]
    drawn = []
    draw = text.draw

    def spy(*arguments: Any) -> Tensor:
        drawn.append(draw(*arguments))
        return drawn[-1]

    monkeypatch.setattr(text, "draw", spy)
    students = indexers.learn(model, SOURCE, PLAN, 1)
    assert len(drawn) == PLAN.steps
    assert len(students) == 2 * len(indexers.TAU) * 3  # layers, forms, τ
    assert all(p.equal(q) for p, q in zip(before, model.parameters(), strict=True))
    beginning = indexers.new_indexer(students[0].indexer.config, 1, "cpu").state_dict()
    unused = {"relu": {"bias"}, "sigmoid": {"W_iw.weight"}, "gated_sigmoid": set()}
    for student in students:
        same = {name for name, value in student.indexer.state_dict().items() if value.equal(beginning[name])}
        assert same == unused[student.form]
        fresh = indexers.new_indexer(student.indexer.config, 1, "cpu")
        assert all(value.equal(beginning[name]) for name, value in fresh.state_dict().items())
    # Alone, a student of the last form becomes what it becomes among the others.
    monkeypatch.setattr(indexers, "TAU", {"gated_sigmoid": (0.3,)})
    (alone, *_), among = indexers.learn(model, SOURCE, PLAN, 1), [s for s in students if s.form == "gated_sigmoid"]
    other = next(s for s in among if s.tau == 0.3 and s.layer == 0)
    assert all(v.equal(other.indexer.state_dict()[name]) for name, v in alone.indexer.state_dict().items())


def test_what_is_best_where_it_was_tuned_is_reported_where_not():
    def value(ratio: float) -> dict[str, float]:
        return {"kl": 1.0, "recall": 0.5, "captured_ratio": ratio}

    students = [
        indexers.Student("relu", tau, 1e-3, seed, layer, indexers.new_indexer(CONFIG, 0, "cpu"))
        for tau in indexers.TAU["relu"]
        for seed in (0, 1)
        for layer in (0, 1)
    ]
    tuned = [value(0.9 if s.tau == 1.0 else 0.4) for s in students]
    reported = [value(0.5 + 0.1 * s.seed + 0.2 * s.layer if s.tau == 1.0 else 1.0) for s in students]
    found = indexers.summary("relu", students, tuned, reported, PLAN)
    assert (found["tau"], found["lr"]) == (1.0, 1e-3)
    assert found["captured_ratio"] == pytest.approx(0.65)
    assert found["captured_ratio_by_layer"] == pytest.approx([0.55, 0.75])
    assert found["captured_ratio_by_seed"] == pytest.approx([0.6, 0.7])
    assert [line["captured_ratio"] for line in found["search"]] == pytest.approx([0.4, 0.9, 0.4])


def test_the_record_is_complete(dense: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(text, "read", lambda path: SOURCE)
    path = tmp_path / "indexers.json"
    assert indexers.main([str(dense), "--smoke", "--json", str(path)]) == 0
    records = json.loads(path.read_text())
    assert [record["form"] for record in records] == list(indexers.TAU)
    for record in records:
        assert {"suite", "command", "plan", "teacher", "text", "device", "commit", "tau", "lr"} <= set(record)
        assert record["tau"] in indexers.TAU[record["form"]]
        assert len(record["search"]) == 3
        assert set(record["milliseconds"]) == {"step", "scores"}
        for name in ("recall", "captured_ratio"):
            assert 0 <= record[name] <= 1
            assert len(record[f"{name}_by_layer"]) == len(record[f"{name}_by_seed"]) == 2


def test_a_run_with_an_indexer_and_no_run_at_all_are_refused(
    dense: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.setattr(text, "read", lambda path: SOURCE)
    folder = tmp_path / "sparse"
    train.train(study.parse(f"{indexers.SMOKE} --variant sparse --steps 1 --context 32", folder), folder)
    for arguments, message in (([str(folder), "--smoke"], "dense attention, got sparse"), ([], "expected a folder")):
        with pytest.raises(SystemExit):
            indexers.main([*arguments, "--json", str(tmp_path / "x.json")])
        assert message in capsys.readouterr().err
