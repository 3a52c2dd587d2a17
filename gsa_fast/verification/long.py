"""One long sequence, checked at sampled rows: `python -m gsa_fast verify --length N`.

The kernels run over the whole sequence; then every sampled row is compared with gold, the equations in float64, as in
`checks`. The equations are written to be read, so the rows go to a pool of processes.
"""

import itertools
import multiprocessing
import os
import random
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
from tqdm import tqdm

import gsa_fast
import gsa_ref
from gsa_fast.bench import patterns, records
from gsa_fast.verification.checks import numpy, selection_verdicts, variance_and_budget_verdicts
from gsa_fast.verification.interpreter import poisoned_memory
from gsa_fast.verification.run import Row
from gsa_ref import GSAConfig, Selection, equations
from gsa_ref.check import (
    Verdict,
    attention_tolerance,
    error_budget,
    gate_tolerance,
    score_tolerance,
    unit_roundoff,
)

CHECKS = ("variance", "budget", "selection", "output", "lse")
EDGES = (16, 64, 4096)  # tile widths at whose multiples rows are looked at
BLOCK = 8  # rows per task: they share the conversion of the keys
ONE_THREAD = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1")


def sampled_rows(L: int, rows: int, k_base: int, seed: int) -> list[int]:
    """`rows` distinct positions, ascending: both ends, around k_base, around multiples of `EDGES`, the rest random."""
    if rows >= L:
        return list(range(L))
    dice = random.Random(seed)
    wanted = [0, L - 1, 1, 2, 3, L - 2, k_base - 1, k_base, k_base + 1]
    for step in EDGES:
        multiples = range(step, L, step)
        for m in dice.sample(multiples, min(len(multiples), max(1, rows // (6 * len(EDGES))))):
            wanted += [m - 1, m, m + 1]
    wanted += dice.sample(range(L), rows)
    distinct = dict.fromkeys(t for t in wanted if 0 <= t < L)
    return sorted(itertools.islice(distinct, rows))


@dataclass(frozen=True)
class Setting:
    """What a row's check needs beside the arrays."""

    config: GSAConfig
    dtype: torch.dtype
    mean_variance: float
    largest_value: float  # max |v'|
    sigmoid_mode: str = "exact"


# Row, its verdicts, how many keys lie within 2ε of its threshold, and the share of gold's best keys that it selected.
Found = tuple[int, dict[str, Verdict], int, float]


def check_rows(arrays: dict[str, np.ndarray], setting: Setting, block: slice) -> list[Found]:
    """The verdicts on the sampled rows `block`.

    Arrays: k_idx [L, d_I]; k, v and value_gate [L, H_kv, d_h]; bias [H_I]; and by sampled row: position, count,
    indices, variance, q_idx, head_logits, q, output_gate, out, lse, baseline, baseline_lse.
    """
    c = setting.config
    scale = c.effective_indexer_scale
    sizes: dict[str, Any] = {"k_base": c.k_base, "k_min": c.k_min, "k_max": c.k_max, "rule": c.rule}
    positions = arrays["position"][block]
    keys = np.asarray(arrays["k_idx"][: positions.max() + 1], np.float64)
    q_idx, head_logits, bias = arrays["q_idx"][block], arrays["head_logits"][block], arrays["bias"]
    tolerances = score_tolerance(q_idx, keys, head_logits, bias, scale=scale, sigmoid_mode=setting.sigmoid_mode)
    found: list[Found] = []
    for i, t in enumerate(positions.tolist()):
        row, tolerance = slice(block.start + i, block.start + i + 1), tolerances[i : i + 1, : t + 1]
        # Keys behind the query are left out: it does not see them.
        gold = equations.indexer_scores(
            q_idx[i : i + 1], keys[: t + 1], head_logits[i : i + 1], bias, scale=scale, start=t
        )
        count, indices = arrays["count"][row], arrays["indices"][row]
        of_budget = variance_and_budget_verdicts(
            arrays["variance"][row], count, gold, tolerance, np.array([t + 1]), setting.mean_variance, sizes
        )
        selection = Selection(torch.from_numpy(indices[None].copy()), torch.from_numpy(count[None].copy()))
        (of_selection,) = selection_verdicts(selection, 0, slice(0, 1), gold, tolerance, count)
        chosen = indices[0, : count[0]]
        chosen = chosen[(chosen >= 0) & (chosen <= t)]
        of_attention = attention_verdicts(arrays, setting, row, chosen)
        verdicts = dict(zip(CHECKS, (*of_budget, of_selection, *of_attention), strict=True))
        near, recall = 0, 1.0
        if len(chosen):
            near = int((np.abs(gold[0] - gold[0, chosen].min()) <= 2 * tolerance[0]).sum())
            best = np.argsort(-gold[0], kind="stable")[: len(chosen)]
            recall = len(np.intersect1d(best, chosen)) / len(chosen)
        found.append((t, verdicts, near, recall))
    return found


def attention_verdicts(
    arrays: dict[str, np.ndarray], setting: Setting, row: slice, chosen: np.ndarray
) -> Iterator[Verdict]:
    """Output and lse of one row given its selection, by the rule of `checks.check_attention`."""
    dtype = setting.dtype
    q, gate = np.asarray(arrays["q"][row], np.float64), np.asarray(arrays["output_gate"][row], np.float64)
    key = np.asarray(arrays["k"][chosen], np.float64)
    value = equations.apply_gate(arrays["v"][chosen], arrays["value_gate"][chosen].astype(np.float64))
    S_t = [np.arange(len(chosen))]
    gold, gold_lse = equations.sparse_attention(q, key, value, S_t)
    tolerance, lse_tolerance = attention_tolerance(q, key, value, S_t, dtype)
    tolerance = tolerance + 2 * unit_roundoff(dtype) * setting.largest_value  # v' is rounded once more
    gold = equations.apply_gate(gold, gate)
    tolerance = tolerance + gate_tolerance(gold, gate, dtype)
    cap = 8 * unit_roundoff(dtype) * setting.largest_value
    yield error_budget(arrays["out"][row], arrays["baseline"][row], gold, dtype, tolerance=tolerance, cap=cap)
    yield error_budget(
        arrays["lse"][row], arrays["baseline_lse"][row], gold_lse, torch.float32, tolerance=lse_tolerance
    )


# ---- the pool: arrays travel through files, which the processes map --------------------------------------------------

_shared: tuple[dict[str, np.ndarray], Setting]


def _open_arrays(folder: str, setting: Setting) -> None:
    global _shared
    torch.set_num_threads(1)
    arrays = {path.stem: np.load(path, mmap_mode="r") for path in Path(folder).glob("*.npy")}
    _shared = arrays, setting


def _check_shared(block: slice) -> list[Found]:
    return check_rows(*_shared, block)


def check_in_processes(arrays: dict[str, np.ndarray], setting: Setting, processes: int) -> Iterator[list[Found]]:
    """`check_rows` over all blocks, the longest rows first; in this process if `processes` is 0."""
    rows = len(arrays["position"])
    blocks = [slice(first, min(first + BLOCK, rows)) for first in range(0, rows, BLOCK)][::-1]
    if processes == 0:
        yield from (check_rows(arrays, setting, block) for block in blocks)
        return
    with tempfile.TemporaryDirectory() as folder, mock.patch.dict(os.environ, ONE_THREAD):
        for name, array in arrays.items():
            np.save(Path(folder) / f"{name}.npy", array)
        # Not forked: this process has used the device.
        context = multiprocessing.get_context("spawn")
        with context.Pool(min(processes, len(blocks)), _open_arrays, (folder, setting)) as pool:
            yield from pool.imap_unordered(_check_shared, blocks)


# ---- the run ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Result:
    """What was found: one `Row` per check, whose cases are rows of the sequence, and one for the reruns."""

    rows: list[Row]
    sampled: int
    mean_k: float
    near_median: float
    near_most: int
    recall_mean: float
    recall_least: float
    sigmoid_mode: str
    seconds: float

    @property
    def failed(self) -> bool:
        return any(row.failed for row in self.rows)


def verify_length(
    L: int,
    config: GSAConfig,
    *,
    rows: int,
    reruns: int,
    seed: int,
    device: str = "cuda",
    dtype: torch.dtype = torch.bfloat16,
    processes: int = 0,
    sigmoid_mode: str = "exact",
) -> Result:
    """Run `indexed_selection` and `sparse_attention` with both gates on random inputs, check rows, then run again.

    Args:
        L: length of the one sequence.
        config: sizes and budgets of the layer; V̄ is the inputs' mean variance.
        rows: how many rows are compared with gold.
        reruns: how often everything runs again; selection, variance, output and lse must be bitwise equal.
        processes: of the pool that computes gold; 0 computes it here.
        sigmoid_mode: of the indexer.
    """
    started = time.monotonic()
    drawn: dict[str, Any] = {"seed": seed, "device": device, "dtype": dtype}
    indexer = patterns.with_mean_variance(patterns.random_indexer_inputs(L, config, **drawn), config)
    given = patterns.random_attention_inputs(L, config, **drawn)

    def run() -> tuple[torch.Tensor, ...]:
        selection, variance = gsa_fast.indexed_selection(
            **indexer.arguments(), config=config, sigmoid_mode=sigmoid_mode, impl="triton"
        )
        out, lse = gsa_fast.sparse_attention(given.q, given.k, given.v, selection, **given.gates(), impl="triton")
        return (*selection, variance, out, lse)

    with poisoned_memory():
        indices, counts, variance, out, lse = first = run()
    different = 0
    for _ in range(reruns):
        different += not all(torch.equal(a, b) for a, b in zip(first, run(), strict=True))

    positions = sampled_rows(L, rows, config.k_base, seed)
    at = torch.tensor(positions, device=device)
    gated = gsa_ref.apply_gate(given.v, given.value_gate_logits)
    baselines = []
    for t in positions:
        one = slice(t, t + 1)
        chosen = Selection(indices[:, one], counts[:, one])
        gate = given.output_gate_logits[:, one]
        found = gsa_ref.sparse_attention(given.q[:, one], given.k, gated, chosen, start=t, output_gate_logits=gate)
        baselines.append([x[0, 0] for x in found])
    baseline, baseline_lse = (torch.stack(x) for x in zip(*baselines, strict=True))
    arrays = {
        "position": np.array(positions),
        "bias": numpy(indexer.bias),
        "indices": numpy(indices[0, at]),
        "count": numpy(counts[0, at]),
        "variance": numpy(variance[0, at]),
        "q_idx": numpy(indexer.q_idx[0, at]),
        "head_logits": numpy(indexer.head_logits[0, at]),
        "q": numpy(given.q[0, at]),
        "output_gate": numpy(given.output_gate_logits[0, at]),
        "out": numpy(out[0, at]),
        "lse": numpy(lse[0, at]),
        "baseline": numpy(baseline),
        "baseline_lse": numpy(baseline_lse),
        # float32 holds the inputs' 16 bits; what is as long as the sequence is widened row by row.
        "k_idx": indexer.k_idx[0].float().cpu().numpy(),
        "k": given.k[0].float().cpu().numpy(),
        "v": given.v[0].float().cpu().numpy(),
        "value_gate": given.value_gate_logits[0].float().cpu().numpy(),
    }
    setting = Setting(config, dtype, float(indexer.mean_variance), float(gated.abs().max()), sigmoid_mode)
    mean_k = float(counts.double().mean())

    name = str(dtype).removeprefix("torch.")
    table = {check: Row(check, name, longest=L) for check in CHECKS}
    near, recalls = [], []
    with tqdm(total=len(positions), unit="row", leave=False, disable=None) as bar:
        for block in check_in_processes(arrays, setting, processes):
            for t, verdicts, near_threshold, recall in block:
                near.append(near_threshold)
                recalls.append(recall)
                for check, verdict in verdicts.items():
                    fold(table[check], verdict, t)
            bar.update(len(block))
    again = Row("reruns", name, cases=reruns, worst_error=float(different), ratio=float(different), longest=L)
    again.verdict = "FAIL" if different else "pass" if reruns else "not run"
    again.detail = f"{different} of {reruns} runs differ from the first" if different else ""
    for row in table.values():
        row.verdict = "FAIL" if row.detail else "pass"
    return Result(
        [*table.values(), again],
        sampled=len(positions),
        mean_k=mean_k,
        near_median=float(np.median(near)),
        near_most=max(near),
        recall_mean=float(np.mean(recalls)),
        recall_least=min(recalls),
        sigmoid_mode=sigmoid_mode,
        seconds=time.monotonic() - started,
    )


def fold(row: Row, verdict: Verdict, t: int) -> None:
    """Count one verdict, keep the one nearest its budget, and the first failure's detail."""
    row.cases += 1
    ratio = verdict.error / verdict.budget if verdict.budget > 0 else (0.0 if verdict.error == 0 else float("inf"))
    if ratio >= row.ratio:
        row.ratio, row.worst_error, row.budget = ratio, verdict.error, verdict.budget
    if not verdict and not row.detail:
        row.detail = f"row {t}: error {verdict.error:.3g}, budget {verdict.budget:.3g}. {verdict.detail}"


def to_record(result: Result, L: int, config: GSAConfig, command: str, seed: int) -> records.Record:
    """What `--json` merges into its file: one record per length and sizes."""
    c = config
    shape = {"B": 1, "L": L, "S": L, "H": c.H, "H_kv": c.H_kv, "d_h": c.d_h, "H_I": c.H_I, "d_I": c.d_I, "k": c.k_base}
    return {
        "suite": "verification",
        "case": "whole",
        "impl": "gsa_fast",
        "selection": "real",
        "sigmoid_mode": result.sigmoid_mode,
        "shape": shape,
        "dtype": result.rows[0].dtype,
        "sampled_rows": result.sampled,
        "mean_k": result.mean_k,
        "near_threshold": {"median": result.near_median, "most": result.near_most},
        "recall": {"mean": result.recall_mean, "least": result.recall_least},
        "seconds": result.seconds,
        **records.environment(command, seed),
        "rows": [{**asdict(row), "ratio": row.ratio if np.isfinite(row.ratio) else None} for row in result.rows],
    }
