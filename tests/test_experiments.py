"""The training script: runs of a few seconds on a small text, on a CPU."""

import dataclasses
import hashlib
import json
import math
import os
import pickle
import shlex
from argparse import ArgumentParser
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file

from experiments import checkpoint, generate, measure, study, text, train
from experiments.settings import Settings, add_options
from gsa_ref import LanguageModel, dense_attention
from gsa_ref.config import VARIANTS
from gsa_ref.generation import BOS

ROOT = Path(__file__).parents[1]

SIZES = {
    "d": 16, "d_ff": 32, "H": 2, "H_kv": 1, "d_h": 8, "H_I": 2, "d_I": 4, "k_base": 6, "k_min": 3, "k_max": 9,
    "context": 24, "batch": 4, "steps": 6, "lr": 0.01, "lr_warm_up": 2, "eval_windows": 4, "measure_windows": 2,
    "eval_every": 3, "checkpoint_every": 2,
}  # fmt: skip
EVERY_STEP = {"step", "tokens", "lr", "loss", "grad_norm"}
LEARNING_INDEXER = {"indexer_kl", "indexer_grad_norm"}
VALIDATION = {"validation_loss", "first_token_share"}
INDEXER = {
    "mean_k", "k_low", "k_high", "captured", "captured_oracle", "captured_recent", "captured_random", "captured_ratio",
    "captured_ratio_min", "recall",
}  # fmt: skip
GATES = {"value_gate", "output_gate"}


@pytest.fixture(scope="module")
def small_text(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("text") / "small.txt"
    path.write_text("".join(f"{n} times {n % 7} is {n * (n % 7)}\n" for n in range(200)))
    return str(path)


def options(out: Path, small_text: str, **changed: Any) -> list[str]:
    """The command line of a small run."""
    found = ["--out", str(out)]
    for name, value in ({"text": small_text} | SIZES | changed).items():
        found += [f"--{name.replace('_', '-')}"] + ([] if value is True else [str(value)])
    return found


def lines(out: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("more", [{}, {"accumulate": 2, "dtype": "bfloat16", "rule": "inverse", "indexer_rope": True}])
@pytest.mark.parametrize("variant", VARIANTS)
def test_every_variant_learns_and_its_log_is_complete_and_finite(
    variant: str, more: dict[str, Any], tmp_path: Path, small_text: str
):
    assert train.main(options(tmp_path / "run", small_text, variant=variant, **more)) == 0
    log = lines(tmp_path / "run")
    assert [line["step"] for line in log] == list(range(7))
    assert all(math.isfinite(value) for line in log for value in line.values())
    switches = VARIANTS[variant]
    indexer, gates = INDEXER if switches["sparse"] else set(), GATES if switches["gates"] == "both" else set()
    steps = EVERY_STEP | (LEARNING_INDEXER if switches["sparse"] else set())
    for line in log:
        expected = steps if line["step"] else {"step", "tokens"}
        assert set(line) == expected | (VALIDATION | indexer | gates if line["step"] in (0, 3, 6) else set())
    assert log[-1]["validation_loss"] < log[0]["validation_loss"] - 0.1
    assert log[-1]["tokens"] == 6 * 4 * 24 * more.get("accumulate", 1)
    if switches["sparse"]:
        assert 0 < log[-1]["captured"] <= log[-1]["captured_oracle"] <= 1 + 1e-6
        assert log[-1]["captured_ratio_min"] <= log[-1]["captured_ratio"] + 1e-6
        tensors = load_file(tmp_path / "run" / "checkpoint.safetensors")
        assert tensors["model.blocks.1.attention.mean_variance"] > 0  # V̄ was updated


def test_warm_up_begins_with_a_dense_run_and_trains_the_indexers_alone(tmp_path: Path, small_text: str):
    train.main(options(tmp_path / "dense", small_text, variant="dense"))
    warm = {"init": tmp_path / "dense", "phase": "warm_up", "kl_temperature": 0.1}
    train.main(options(tmp_path / "warm", small_text, variant="sparse", **warm))
    before, after = (load_file(tmp_path / name / "checkpoint.safetensors") for name in ("dense", "warm"))
    for name, tensor in before.items():
        if name.startswith("model."):
            assert torch.equal(tensor, after[name]), name
    log = lines(tmp_path / "warm")
    assert log[-1]["indexer_kl"] < log[1]["indexer_kl"]
    assert log[-1]["grad_norm"] == 0


class Interrupted(Exception):
    pass


@pytest.mark.parametrize("phase", ["sparse", "warm_up"])
def test_resumed_run_equals_the_uninterrupted_one_bit_by_bit(
    phase: str, tmp_path: Path, small_text: str, monkeypatch: pytest.MonkeyPatch
):
    changed = {"variant": "gsa", "phase": phase, "accumulate": 2}
    train.main(options(tmp_path / "whole", small_text, **changed))
    command = options(tmp_path / "parts", small_text, **changed)
    save = checkpoint.save

    def save_once(*arguments: Any) -> None:
        if arguments[-1] > 2:
            raise Interrupted  # at step 4, after which the log is ahead of the checkpoint of step 2
        save(*arguments)

    monkeypatch.setattr(checkpoint, "save", save_once)
    with pytest.raises(Interrupted):
        train.main(command)
    assert len(lines(tmp_path / "parts")) == 5
    monkeypatch.undo()
    torch.rand(3)  # the global generator has no part in it
    train.main([*command, "--resume"])
    assert (tmp_path / "parts/log.jsonl").read_text() == (tmp_path / "whole/log.jsonl").read_text()
    whole, parts = (load_file(tmp_path / name / "checkpoint.safetensors") for name in ("whole", "parts"))
    assert whole.keys() == parts.keys()
    assert [name for name in whole if not torch.equal(whole[name], parts[name])] == []
    assert {name.split(".")[0] for name in whole} == {"model", "optimizer", "generator", "step"}
    assert sorted(p.name for p in (tmp_path / "parts").iterdir()) == ["checkpoint.safetensors", "log.jsonl", "run.json"]


def test_loss_that_is_not_finite_ends_the_run_before_it_reaches_the_weights(
    tmp_path: Path, small_text: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    losses = iter([1.0, 1.0, 1.0, math.nan])
    monkeypatch.setattr(train, "backward", lambda *_: torch.tensor([next(losses), 0.0]))
    assert train.main(options(tmp_path / "run", small_text, variant="dense")) == 1
    assert "step 4: the loss or its gradient is not finite" in capsys.readouterr().err
    assert lines(tmp_path / "run")[-1]["step"] == 3
    assert load_file(tmp_path / "run/checkpoint.safetensors")["step"] == 2


def test_resuming_an_interrupted_line_of_the_log_forgets_it(tmp_path: Path, small_text: str):
    command = options(tmp_path / "run", small_text, variant="dense", steps=2)
    train.main(command)
    log = tmp_path / "run/log.jsonl"
    whole = log.read_text()
    log.write_text(whole + '{"step": 3, "tok')
    train.main([*command, "--resume"])
    assert log.read_text() == whole


BAD = {
    "variant": ({"variant": "linear"}, "--variant: invalid choice: 'linear'"),
    "steps": ({"steps": 0}, "steps: expected an int ≥ 1, got 0"),
    "rate": ({"lr": -1.0}, "lr: expected a finite positive number, got -1.0"),
    "heads": ({"H": 3, "H_kv": 2}, "H: expected a multiple of H_kv = 2, got 3"),
    "temperature": ({"kl_temperature": 0.0}, "kl_temperature: expected a finite positive number, got 0.0"),
    "phase": ({"variant": "gated", "phase": "warm_up"}, "phase: expected sparse for the variant gated"),
    "windows": ({"measure_windows": 5}, "measure_windows: expected ≤ eval_windows = 4, got 5"),
    "validation text": ({"eval_windows": 10_000}, "text: expected at least 250000 tokens to validate on"),
    "training text": ({"context": 10_000}, "text: expected more than context = 10000 tokens to train on"),
    "missing text": ({"text": "nowhere.txt"}, "nowhere.txt"),
    "device": ({"device": "tpu"}, "device: expected cpu or cuda, got 'tpu'"),
    "missing init": ({"init": "nowhere"}, "nowhere"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_options_are_refused_with_a_message_that_names_them(
    name: str, tmp_path: Path, small_text: str, capsys: pytest.CaptureFixture[str]
):
    changed, message = BAD[name]
    with pytest.raises(SystemExit, match="2"):
        train.main(options(tmp_path / "run", small_text, **changed))
    assert message in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_runs_that_do_not_fit_are_refused(tmp_path: Path, small_text: str, capsys: pytest.CaptureFixture[str]):
    train.main(options(tmp_path / "gsa", small_text, steps=1))
    other = tmp_path / "other.txt"
    other.write_text(Path(small_text).read_text().replace("times", "times·"))
    cases = [
        (options(tmp_path / "gsa", small_text, steps=1), "out: expected a folder without a checkpoint (or --resume)"),
        ([*options(tmp_path / "gsa", small_text, steps=2), "--resume"], "steps: expected 1 as in the run to resume"),
        ([*options(tmp_path / "new", small_text), "--resume"], "run.json"),
        (options(tmp_path / "new", small_text, variant="dense", init=tmp_path / "gsa"), "init: expected a run without"),
        (
            options(tmp_path / "new", small_text, d_I=8, init=tmp_path / "gsa"),
            "of shape [8, 16], got [4, 16]",
        ),
        (
            options(tmp_path / "new", small_text, n_layers=3, init=tmp_path / "gsa"),
            "init: expected a run with blocks.2",
        ),
    ]
    for command, message in cases:
        with pytest.raises(SystemExit, match="2"):
            train.main(command)
        assert message in capsys.readouterr().err
        assert not (tmp_path / "new").exists()
    run = json.loads((tmp_path / "gsa/run.json").read_text())
    run["settings"]["text"] = str(other)
    (tmp_path / "gsa/run.json").write_text(json.dumps(run))
    with pytest.raises(SystemExit, match="2"):
        train.main([*options(tmp_path / "gsa", str(other), steps=1), "--resume"])
    assert "text: expected SHA-256" in capsys.readouterr().err


class Runs:
    """Leaves a file behind when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.path),)


def test_pickle_in_the_place_of_a_checkpoint_is_refused_and_not_executed(tmp_path: Path, small_text: str):
    command = options(tmp_path / "run", small_text, variant="dense", steps=1)
    train.main(command)
    (tmp_path / "run/checkpoint.safetensors").write_bytes(pickle.dumps(Runs(tmp_path / "executed")))
    for refuse in (lambda: train.main([*command, "--resume"]), lambda: generate.main([str(tmp_path / "run")])):
        with pytest.raises(SystemExit, match="2"):
            refuse()
    assert not (tmp_path / "executed").exists()


@pytest.mark.parametrize("variant", ["dense", "gsa"])
def test_generated_text_continues_the_prompt_and_is_determined_by_the_seed(
    variant: str, tmp_path: Path, small_text: str, capsys: pytest.CaptureFixture[str]
):
    train.main(options(tmp_path / "run", small_text, variant=variant))
    written = []
    for seed in (0, 0, 1):
        assert generate.main([str(tmp_path / "run"), "--prompt", "3 times", "--tokens", "40", "--seed", str(seed)]) == 0
        written.append(capsys.readouterr().out)
    assert all(w.startswith("3 times") and len(w) > 8 for w in written)
    assert written[0] == written[1] != written[2]


# ---- the text --------------------------------------------------------------------------------------------------------


def test_file_is_read_as_bytes_with_a_stable_hash(tmp_path: Path):
    content = bytes(range(256)) * 4
    (tmp_path / "bytes").write_bytes(content)
    source = text.read(str(tmp_path / "bytes"))
    assert source.sha256 == hashlib.sha256(content).hexdigest()
    assert torch.cat((source.train, source.validation)).tolist() == [BOS, *content]
    assert len(source.train) == 922


def test_standard_library_is_its_sources_in_order_without_tests_and_installed_packages(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    kept = {"abc.py": "a", "json/__init__.py": "b", "json/tool.py": "c", "zlib.py": "d"}
    left_out = ("site-packages/x.py", "test/x.py", "json/tests/x.py", "_sysconfigdata_x.py", "x.txt")
    for name, content in kept.items() | dict.fromkeys(left_out, "x").items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(content)
    monkeypatch.setattr(text.sysconfig, "get_path", {"stdlib": str(tmp_path)}.__getitem__)
    source = text.read(None)
    assert source.sha256 == hashlib.sha256(b"abcd").hexdigest()
    tokens = torch.cat((source.train, source.validation)).tolist()
    assert tokens == [token for byte in b"abcd" for token in (BOS, byte)]


@given(n=st.integers(50, 500), count=st.integers(1, 5), context=st.integers(1, 9), seed=st.integers(0, 99))
def test_windows_are_pieces_of_the_text(n: int, count: int, context: int, seed: int):
    tokens = torch.arange(n, dtype=torch.int16)
    fixed = text.windows(tokens, count, context)
    assert (fixed[1:, 0] > fixed[:-1, -1]).all()  # they do not overlap
    for found in (fixed, text.draw(tokens, count, context, torch.Generator().manual_seed(seed))):
        assert found.shape == (count, context + 1)
        assert (found.diff() == 1).all()
        assert found.min() >= 0
        assert found.max() < n


def test_last_window_may_be_drawn():
    tokens = torch.arange(5, dtype=torch.int16)
    drawn = text.draw(tokens, 64, 3, torch.Generator().manual_seed(0))
    assert set(drawn[:, 0].tolist()) == {0, 1}


# ---- measures --------------------------------------------------------------------------------------------------------


def small_model(**changed: Any) -> LanguageModel:
    names = {field.name for field in dataclasses.fields(Settings)}
    return Settings(**{k: v for k, v in (SIZES | changed).items() if k in names}).build_model()


@pytest.mark.parametrize("variant", ["dense", "sparse"])
def test_measures_of_uniform_attention_are_those_computed_by_hand(variant: str):
    L, k = 24, 6
    model = small_model(variant=variant, rule="fixed", k_base=k).train()
    for block in model.blocks:
        torch.nn.init.zeros_(block.attention.W_q.weight)  # uniform attention
        if variant == "sparse":
            torch.nn.init.zeros_(block.attention.indexer.W_iq.weight)  # equal scores: the lowest positions win
    found = measure.measure(model, torch.randint(256, (3, L + 1)))
    seen = torch.arange(1.0, L + 1)
    if variant == "dense":
        assert found == pytest.approx({"first_token_share": float((1 / seen[1:]).mean())})
        return
    share = float((k / seen[k:]).mean())
    assert found == pytest.approx(
        {
            "first_token_share": float((1 / seen[1:].clamp(max=k)).mean()),
            "mean_k": float(seen.clamp(max=k).mean()),
            "k_low": float(seen.clamp(max=k).repeat(3).quantile(0.1)),
            "k_high": k,
            **dict.fromkeys(("captured", "captured_oracle", "captured_recent", "captured_random"), share),
            **dict.fromkeys(("captured_ratio", "captured_ratio_min"), 1.0),
            "recall": found["recall"],  # the oracle's choice among equal shares follows their rounding
        },
        rel=1e-5,
    )


def test_recall_is_one_for_an_indexer_that_ranks_as_attention_does_and_low_for_its_opposite():
    # One head each, the same weights and RoPE: the indexer's scores are a monotone map of the attention logits.
    sizes = {"n_layers": 1, "H": 1, "d_h": 4, "d_I": 4, "H_I": 1, "indexer_rope": True, "k_base": 6}
    layer = small_model(variant="sparse", rule="fixed", **sizes).blocks[0].attention
    h = torch.randn(2, 24, 16)
    with torch.no_grad():
        layer.W_q.weight.mul_(20)
        layer.W_k.weight.mul_(20)
        layer.indexer.W_ik.weight.copy_(layer.W_k.weight)
        layer.indexer.W_iq.weight.copy_(layer.W_q.weight)
        same = measure.measure_layer(layer, h)
        layer.indexer.W_iq.weight.neg_()
        opposite = measure.measure_layer(layer, h)
    assert same["recall"] == 1
    assert same["captured"] == pytest.approx(same["captured_oracle"])
    assert same["captured"] > same["captured_random"] > opposite["captured"]
    assert opposite["recall"] < 0.3


def test_measured_attention_is_that_of_the_reference():
    q, k, v = torch.randn(2, 9, 6, 4), torch.randn(2, 9, 3, 4), torch.randn(2, 9, 3, 4)
    p = measure.attention(q, k, torch.ones(9, 9, dtype=torch.bool).tril().expand(2, 9, 9))
    found = torch.einsum("blhs,bshd->blhd", p, v.repeat_interleave(2, dim=2))
    torch.testing.assert_close(found, dense_attention(q, k, v))


def test_measures_leave_the_model_as_it_was():
    model = small_model(variant="gsa").train()
    windows = torch.randint(256, (4, 25))
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    measure.measure(model, windows)
    measure.validation_loss(model, windows, 3)
    assert model.training
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    assert all(block.attention.pending_variance_count == 0 for block in model.blocks)
    assert not any(block.attention._forward_pre_hooks for block in model.blocks)


def test_validation_loss_does_not_depend_on_the_batch_size():
    model = small_model(variant="gsa")
    windows = torch.randint(256, (5, 25))
    assert measure.validation_loss(model, windows, 2) == pytest.approx(measure.validation_loss(model, windows, 5))


def test_budget_of_everything_has_no_captured_share():
    model = small_model(variant="sparse", k_base=24, k_min=24, k_max=24)
    assert set(measure.measure(model, torch.randint(256, (2, 25)))) == {
        "mean_k", "k_low", "k_high", "first_token_share"
    }  # fmt: skip


# ---- settings, schedule, study ---------------------------------------------------------------------------------------


def test_learning_rate_rises_then_falls_to_a_tenth():
    s = Settings(steps=100, lr_warm_up=10, lr=1.0)
    rates = [train.learning_rate(step, s) for step in range(101)]
    assert rates[:10] == pytest.approx([(n + 1) / 10 for n in range(10)])
    assert rates[10] == pytest.approx(1)
    assert all(a > b for a, b in pairwise(rates[10:]))
    assert rates[100] == pytest.approx(0.1)


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a CUDA device")
def test_settings_of_a_run_on_a_gpu_can_be_read_elsewhere_but_not_trained():
    with pytest.raises(ValueError, match="expected cpu on a machine without a CUDA device"):
        Settings(device="cuda").build_model()


def test_options_have_the_names_and_defaults_of_the_settings():
    parser = ArgumentParser()
    add_options(parser)
    assert Settings(**vars(parser.parse_args([]))) == Settings()
    given_options = parser.parse_args(["--indexer-scale", "1", "--H-kv", "1", "--indexer-rope", "--text", "x"])
    assert Settings(**vars(given_options)) == Settings(indexer_scale=1.0, H_kv=1, indexer_rope=True, text="x")


def test_fast_implementation_runs_on_the_kernels_of_gsa_fast():
    gsa_fast = pytest.importorskip("gsa_fast", reason="needs Triton", exc_type=ImportError)
    model = small_model(impl="fast")
    assert all(isinstance(block.attention, gsa_fast.GatedSparseAttention) for block in model.blocks)


@pytest.mark.parametrize("name", study.STUDY)
def test_commands_of_the_study_are_valid_and_begin_with_earlier_runs(name: str):
    settings = study.parse(study.STUDY[name], Path("runs"))
    names = list(study.STUDY)
    if settings.init:
        assert settings.init.removeprefix("runs/") in names[: names.index(name)]


def test_study_trains_what_is_missing_and_records_it(tmp_path: Path, small_text: str, monkeypatch: pytest.MonkeyPatch):
    shared = shlex.join(options(Path("x"), small_text)[2:])
    runs = {"a": f"--variant dense {shared}", "b": f"--variant gsa {shared} --init {{runs}}/a"}
    monkeypatch.setattr(study, "STUDY", runs)
    command = ["--runs", str(tmp_path / "runs"), "--json", str(tmp_path / "records.json")]
    assert study.main(command) == 0
    stored = (tmp_path / "records.json").read_text()
    written = (tmp_path / "runs/a/log.jsonl").stat().st_mtime_ns
    assert study.main(command) == 0
    assert (tmp_path / "runs/a/log.jsonl").stat().st_mtime_ns == written
    assert (tmp_path / "records.json").read_text() == stored
    a, b = json.loads(stored)
    assert (a["name"], b["name"]) == ("a", "b")
    assert [line["step"] for line in a["log"]] == [0, 3, 6]
    assert str(tmp_path) not in b["command"].replace(small_text, "")
    assert a["settings"]["variant"] == "dense"
    assert {"device", "torch", "python", "text", "commit"} <= set(a)
    runs["a"] += " --seed 1"
    with pytest.raises(ValueError, match="expected a run with the settings of the study"):
        study.main(command)
