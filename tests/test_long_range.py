"""The tasks of experiments/tasks.py and the runs on them: what a sequence says, what is counted, what is stored."""

import json
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from experiments import long_range, tasks, text
from experiments.settings import Settings
from gsa_ref.generation import BOS

TEXT = torch.randint(0, 257, (5000,), generator=torch.Generator().manual_seed(0)).to(torch.int16)
SOURCE = text.Text("random", "0" * 64, TEXT, TEXT.flip(0))
SIZES = long_range.SMOKE | {"d": 16, "d_h": 8, "d_ff": 16, "d_I": 4, "steps": 4, "batch": 4}


@pytest.fixture(params=[("needle", 64), ("needle", 300), ("recall", 16), ("recall", 128), ("recall", 700)])
def drawn(request: pytest.FixtureRequest) -> tuple[tasks.Task, int, tasks.Sequences]:
    name, L = request.param
    task = tasks.TASKS[name]
    return task, L, tasks.generate(task, TEXT, 8, L, torch.Generator().manual_seed(3))


def read(row: list[int], m: int, body: int) -> dict[int, list[int]]:
    """The pairs of a body, as a reader finds them who knows nothing but the range of the keys."""
    return {token: row[i + 1 : i + 1 + m] for i, token in enumerate(row[:body]) if token in tasks.KEYS}


def test_the_body_says_the_answer_of_every_question(drawn: tuple[tasks.Task, int, tasks.Sequences]):
    task, L, found = drawn
    n, m = task.pairs, task.value_length
    assert found.tokens.shape == (8, L + 1)
    assert (found.tokens[:, 0] == BOS).all()
    for row in found.tokens.tolist():
        pairs = read(row, m, found.body)
        assert len(pairs) == n
        assert all(
            [(v - tasks.VALUES.start) * m // len(tasks.VALUES) for v in value] == list(range(m))
            for value in pairs.values()
        )
        assert sum(token in tasks.VALUES for token in row[: found.body]) == n * m  # the text has none
        questions = [row[i : i + 1 + m] for i in range(found.body, L + 1, 1 + m)]
        assert {key: value for key, *value in questions} == pairs
        assert len(questions) == n


def test_the_mask_covers_the_answers_and_sources_hold_them(drawn: tuple[tasks.Task, int, tasks.Sequences]):
    task, L, found = drawn
    inputs, targets = found.tokens[:, :-1], found.tokens[:, 1:]
    in_questions = torch.arange(L) >= found.body
    assert torch.equal(found.mask, in_questions & (targets >= tasks.VALUES.start) & (targets < tasks.VALUES.stop))
    assert int(found.mask.sum()) == found.answers.numel() == 8 * task.pairs * task.value_length
    answers, sources = found.answers.flatten(1), found.sources.flatten(1)
    assert torch.equal(targets.gather(1, answers), inputs.gather(1, sources))
    assert (sources < found.body).all()
    assert (inputs.gather(1, found.answers[..., 0]) >= tasks.KEYS.start).all()
    assert (inputs.gather(1, found.answers[..., 0]) < tasks.KEYS.stop).all()


def test_questions_tell_nothing_of_where_or_what_the_answer_is():
    generator = torch.Generator().manual_seed(0)
    task, L, batch = tasks.TASKS["needle"], 64, 4000
    found = tasks.generate(task, TEXT, batch, L, generator)
    place = found.sources[:, 0, 0] - 2  # of the key, from 0
    free = found.body - 1 - task.value_length
    assert set(place.tolist()) == set(range(free))
    assert torch.bincount(place).max() < 1.5 * batch / free  # 7 standard deviations
    value, key = found.tokens[:, -4], found.tokens[:, found.body]
    for other in (key, place):
        correlation = torch.corrcoef(torch.stack((value, other)).double())[0, 1]
        assert abs(correlation) < 4 / batch**0.5
    recall = tasks.generate(tasks.TASKS["recall"], TEXT, batch, L, generator)
    first = recall.sources[:, :, 0].argsort(-1)[:, 0]  # which question asks for the first pair
    assert torch.bincount(first, minlength=4).min() > 0.8 * batch / 4


def test_sequences_follow_from_the_seed_and_only_it():
    def drawn(seed: int) -> Tensor:
        return tasks.generate(tasks.TASKS["recall"], TEXT, 2, 64, torch.Generator().manual_seed(seed)).tokens

    assert torch.equal(drawn(1), drawn(1))
    assert not torch.equal(drawn(1), drawn(2))


@pytest.mark.parametrize(
    ("name", "L", "n", "message"), [("needle", 9, 5000, "L: expected room"), ("recall", 99, 99, "text: expected more")]
)
def test_what_does_not_fit_is_refused(name: str, L: int, n: int, message: str):
    with pytest.raises(ValueError, match=message):
        tasks.generate(tasks.TASKS[name], TEXT[:n], 2, L, torch.Generator())


class Oracle(nn.Module):
    """Knows the answers, but those of the first `wrong` sequences of every batch."""

    def __init__(self, wrong: int = 0) -> None:
        super().__init__()
        self.wrong, self.blocks = wrong, []
        self.config = SimpleNamespace(attention=SimpleNamespace(sparse=False))

    def forward(self, tokens: Tensor) -> Any:
        """Find in the body what followed each token; nothing of the questions is read but the token itself."""
        B, L = tokens.shape
        logits = torch.zeros(B, L, 257)
        for b in range(self.wrong, B):
            row = tokens[b].tolist()
            followed: dict[int, int] = {}
            for t in range(L):
                if row[t] >= tasks.KEYS.start and row[t] in followed:
                    logits[b, t, followed[row[t]]] = 1
                if t + 1 < L and row[t] >= tasks.KEYS.start and row[t] not in followed:
                    followed[row[t]] = row[t + 1]
        return SimpleNamespace(logits=logits)


@pytest.mark.parametrize("name", tasks.TASKS)
def test_an_oracle_answers_all_and_one_that_fails_on_a_quarter_answers_the_rest(name: str):
    s = Settings(variant="dense", **SIZES)
    task = tasks.TASKS[name]
    best = long_range.evaluate(task, Oracle(), s, SOURCE, 128, 40)  # type: ignore[arg-type]
    assert best["accuracy"] == best["high"] == 1
    assert best["low"] == pytest.approx(40 / (40 + long_range.Z95**2), abs=1e-4)  # Wilson's interval of 40 of 40
    assert all(line["accuracy"] == 1 for line in best["depths"] if line)
    assert len(best["depths"]) == 5
    assert best["questions"] == 40 * task.pairs
    some = long_range.evaluate(task, Oracle(10), s, SOURCE, 128, 40)  # type: ignore[arg-type]
    assert some["accuracy"] == 0.75
    assert some["low"] < 0.75 < some["high"] < 1


def test_depths_are_fifths_of_the_body():
    s = Settings(variant="dense", **SIZES)

    class Near(Oracle):
        """Forgets the first fifth of the body."""

        def forward(self, tokens: Tensor) -> Any:
            return super().forward(tokens.index_fill(1, torch.arange(25), 32))

    found = long_range.evaluate(tasks.TASKS["needle"], Near(), s, SOURCE, 128, 200)  # type: ignore[arg-type]
    assert [line["accuracy"] for line in found["depths"]] == [0, 1, 1, 1, 1]  # of 123 places for the first token


@pytest.mark.parametrize("budget", [1, 30, 45, 64])
def test_selected_counts_the_sources_that_a_layer_selects(budget: int):
    """An indexer that prefers late tokens selects the last `budget` that a query sees."""
    s = Settings(variant="sparse", **SIZES | {"k_base": budget, "k_min": 1, "k_max": 64, "n_layers": 1})
    model = s.build_model().eval()
    layer: Any = model.blocks[0].attention

    class Late(nn.Module):
        bias = torch.zeros(2)

        def forward(self, h: Tensor, start: int = 0) -> tuple[Tensor, Tensor, Tensor]:
            B, L, _ = h.shape
            k = torch.linspace(-1, 1, L)[None, :, None].expand(B, L, 4)
            return torch.ones(B, L, 2, 4), k, torch.zeros(B, L, 2)

    layer.indexer = Late()
    batch = tasks.generate(tasks.TASKS["needle"], TEXT, 30, 64, torch.Generator().manual_seed(0))
    _, selected = long_range.answer(model, batch, s)
    assert selected.shape == (1, 30, 1, 4)
    assert torch.equal(selected[0], batch.sources > batch.answers - budget)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("needle", [(32, 16)] * 3 + [(16, 32)] * 2 + [(8, 64)] + [(4, 128)] * 4),
        ("recall", [(8, 64)] * 6 + [(4, 128)] * 4),
    ],
)
def test_short_sequences_come_first_and_steps_have_equally_many_tokens(
    name: str, expected: list[tuple[int, int]], monkeypatch: pytest.MonkeyPatch
):
    s = Settings(variant="sparse", **SIZES | {"context": 128, "steps": 10})
    shapes, phases = [], []
    original = tasks.generate

    def spy(task: tasks.Task, source: Tensor, batch: int, L: int, generator: torch.Generator) -> tasks.Sequences:
        shapes.append((batch, L))
        return original(task, source, batch, L, generator)

    def note(model: Any, phase: str) -> None:
        phases.append((len(shapes), phase))
        set_phase(model, phase)

    set_phase = long_range.LanguageModel.set_phase
    monkeypatch.setattr(long_range, "generate", spy)
    monkeypatch.setattr(long_range.LanguageModel, "set_phase", note)
    _, log = long_range.learn(tasks.TASKS[name], s, SOURCE)
    assert shapes == expected
    assert phases[-2:] == [(0, "warm_up"), (7, "sparse")]
    assert [line["step"] for line in log] == list(range(1, 11))


def test_in_the_dense_steps_nothing_is_frozen(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(long_range, "DENSE", 1.0)
    s = Settings(variant="gsa", **SIZES)
    model, _ = long_range.learn(tasks.TASKS["recall"], s, SOURCE)
    before = s.build_model()
    assert not any(a.equal(b) for a, b in zip(model.parameters(), before.parameters(), strict=True))


def test_a_run_is_stored_once_and_told_again_only_with_the_same_settings(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.setattr(text, "read", lambda path: SOURCE)
    trained = []

    def learn(task: tasks.Task, s: Settings, source: text.Text) -> Any:
        trained.append((task.name, s.variant, s.seed))
        return original(task, s, source)

    original = long_range.learn
    monkeypatch.setattr(long_range, "learn", learn)
    files = [tmp_path / f"{name}.json" for name in "abc"]
    command = ["--smoke", "--steps", "2", "--task", "needle"]
    assert long_range.main([*command, "--variants", "gsa", "--seeds", "0", "--json", str(files[0])]) == 0
    assert long_range.main([*command, "--variants", "gsa,dense", "--seeds", "0", "--json", str(files[0])]) == 0
    assert long_range.main([*command, "--variants", "gsa", "--seeds", "1", "--json", str(files[1])]) == 0
    assert trained == [("needle", "gsa", 0), ("needle", "dense", 0), ("needle", "gsa", 1)]
    assert long_range.main(["--merge", str(files[0]), str(files[1]), "--json", str(files[2])]) == 0
    records = json.loads(files[2].read_text())
    assert [long_range.key(r) for r in records] == [("needle", "dense", 0), ("needle", "gsa", 0), ("needle", "gsa", 1)]
    for record in records:
        assert {"suite", "task", "command", "settings", "device", "torch", "commit", "log", "tests"} <= set(record)
        assert [test["length"] for test in record["tests"]] == [128, 256, 512, 1024]
        sparse = record["settings"]["variant"] == "gsa"
        for test in record["tests"]:
            assert 0 <= test["low"] <= test["accuracy"] <= test["high"] <= 1
            assert len(test.get("selected", [])) == (2 if sparse else 0)
            assert ("selected_anywhere" in test) == sparse
        assert all(("indexer_kl" in line) == sparse and math.isfinite(line["loss"]) for line in record["log"])
    with pytest.raises(SystemExit):
        long_range.main([*command, "--variants", "gsa", "--seeds", "0", "--lr", "1", "--json", str(files[0])])
    assert "expected these settings" in capsys.readouterr().err
