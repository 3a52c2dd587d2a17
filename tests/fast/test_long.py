"""`python -m gsa_fast verify --length`: one long sequence at sampled rows. Here it is a short one."""

import json

import pytest
import torch

import gsa_fast
from gsa_fast.__main__ import main
from gsa_fast.bench import records
from gsa_fast.verification import long
from gsa_fast.verification.interpreter import small_tiles
from gsa_ref import GSAConfig, Selection

CONFIG = GSAConfig(d=16, H=4, H_kv=2, d_h=16, H_I=2, d_I=16, k_base=6, k_min=2, k_max=12)
L = 26


def verify(device: str, **keywords) -> long.Result:
    keywords = {"rows": 12, "reruns": 1, "seed": 0, "dtype": torch.float16} | keywords
    with small_tiles():
        return long.verify_length(L, CONFIG, device=device, **keywords)


def verdicts(result: long.Result) -> dict[str, str]:
    return {row.stem: row.verdict for row in result.rows}


@pytest.mark.parametrize(("length", "rows"), [(131072, 2048), (131072, 256), (1048576, 256), (5000, 100)])
def test_sampled_rows_include_both_ends_and_tile_edges(length, rows):
    sampled = long.sampled_rows(length, rows, 2048, seed=0)
    assert len(sampled) == len(set(sampled)) == rows
    assert sampled == sorted(sampled)
    assert {0, 1, length - 1, 2047, 2048} <= set(sampled)
    for step in (16, 64, 4096):
        for offset in (-1, 0, 1):
            assert any(t >= step - 1 and (t - offset) % step == 0 for t in sampled), (step, offset)
    assert sum(t > length // 2 for t in sampled) > rows // 6


def test_every_row_of_a_short_sequence_is_sampled():
    assert long.sampled_rows(5, 9, 2, seed=0) == [0, 1, 2, 3, 4]


def test_right_kernels_pass_in_a_pool_of_processes(device):
    result = verify(device, processes=2)
    assert not result.failed
    assert verdicts(result) == dict.fromkeys([*long.CHECKS, "reruns"], "pass")
    assert [row.cases for row in result.rows] == [12] * 5 + [1]
    record = long.to_record(result, L, CONFIG, "a command", 0)
    assert record["shape"]["L"] == L
    assert [row["stem"] for row in record["rows"]] == [*long.CHECKS, "reruns"]
    assert record["sampled_rows"] == 12
    json.dumps(record, allow_nan=False)
    assert records.key(record) != records.key(long.to_record(result, 2 * L, CONFIG, "a command", 0))


def test_without_reruns_nothing_is_said_about_them(device):
    assert verdicts(verify(device, reruns=0))["reruns"] == "not run"


def test_a_fault_in_one_part_fails_that_part_only(device, monkeypatch):
    select, attend = gsa_fast.indexed_selection, gsa_fast.sparse_attention

    def first_key_for_the_last(*arguments, **keywords):
        selection, variance = select(*arguments, **keywords)
        indices = selection.indices.clone()
        last = indices[0, -1, : int(selection.counts[0, -1])]
        left_out = next(s for s in range(L) if s not in last.tolist())
        best = gsa_fast.select_tokens(
            gsa_fast.indexer_scores(
                *arguments, **{n: keywords[n] for n in ("q_idx", "k_idx", "head_logits", "bias")},
                scale=CONFIG.effective_indexer_scale, impl="triton",
            ),
            torch.ones_like(selection.counts), width=1, impl="triton",
        ).indices[0, -1, 0]  # fmt: skip
        changed = torch.where(last == best, left_out, last).sort()[0]
        indices[0, -1, : len(last)] = changed
        return Selection(indices, selection.counts), variance

    monkeypatch.setattr(long.gsa_fast, "indexed_selection", first_key_for_the_last)
    result = verify(device)
    assert verdicts(result) == dict.fromkeys([*long.CHECKS, "reruns"], "pass") | {"selection": "FAIL"}
    assert f"row {L - 1}:" in result.rows[2].detail
    monkeypatch.setattr(long.gsa_fast, "indexed_selection", select)

    runs = 0

    def ever_more(*arguments, **keywords):
        nonlocal runs
        out, lse = attend(*arguments, **keywords)
        runs += 1
        return out, lse + (runs - 1) * 1e-3

    monkeypatch.setattr(long.gsa_fast, "sparse_attention", ever_more)
    result = verify(device, reruns=2)
    assert verdicts(result) == dict.fromkeys([*long.CHECKS, "reruns"], "pass") | {"reruns": "FAIL"}
    assert result.rows[-1].detail == "2 of 2 runs differ from the first"

    monkeypatch.setattr(long.gsa_fast, "sparse_attention", lambda *a, **k: ((r := attend(*a, **k))[0] * 1.05, r[1]))
    result = verify(device)
    assert verdicts(result) == dict.fromkeys([*long.CHECKS, "reruns"], "pass") | {"output": "FAIL"}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--length", "1"], "argument --length: expected a number ≥ 2, got 1"),
        (["--length", "64", "--rows", "0"], "argument --rows: expected a number ≥ 1, got 0"),
        (["--length", "64", "--reruns", "-1"], "argument --reruns: expected a number ≥ 0, got -1"),
        (["--length", "64", "--kv-heads", "3"], "argument --kv-heads: expected a divisor of 32, got 3"),
        (["--length", "64", "--quick"], "argument --quick: chooses among small cases, and --length runs none"),
        (["--rows", "64"], "argument --rows: belongs to --length"),
    ],
)
def test_bad_usage_exits_2_and_names_the_argument(arguments, message, capsys):
    with pytest.raises(SystemExit) as stopped:
        main(["verify", *arguments])
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_a_long_sequence_is_refused_in_one_sentence(capsys):
    with pytest.raises(SystemExit) as stopped:
        main(["verify", "--length", "131072"])
    assert stopped.value.code == 2
    assert "argument --length: needs a CUDA device" in capsys.readouterr().err
