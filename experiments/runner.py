"""Train many models, several at a time, and keep a record of each.

A study is a table of runs by name. Each is trained by `train.train`, measured, and written to the record file as soon
as it ends; a run whose record has the same settings is not trained again. So a study that was interrupted, or was cut
off with the machine that it ran on, goes on where it stopped. Processes are spread over the GPUs.
"""

import argparse
import json
import multiprocessing
import os
import shutil
import statistics
import sys
import time
import traceback
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path
from typing import Any

import torch

from experiments import checkpoint, measure, text, train
from experiments.settings import Settings

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "experiments/results"
RUNS = ROOT / "experiments/runs"

# A model of 10 million parameters; at 1024 tokens the budget is an eighth of the context.
GPU: dict[str, Any] = {
    "device": "cuda", "impl": "fast", "dtype": "bfloat16", "d": 384, "n_layers": 6, "d_ff": 1024, "H": 6, "H_kv": 2,
    "d_h": 64, "H_I": 4, "d_I": 64, "k_base": 128, "k_min": 32, "k_max": 256, "indexer_rope": True, "context": 1024,
    "batch": 16, "lr_warm_up": 50, "eval_every": 100, "measure_windows": 4, "eval_windows": 32,
}  # fmt: skip
# The same studies with a toy, to show that they run: its figures mean nothing.
SMOKE: dict[str, Any] = {
    "d": 16, "d_ff": 32, "n_layers": 2, "H": 2, "H_kv": 1, "d_h": 8, "H_I": 2, "d_I": 4, "k_base": 8, "k_min": 4,
    "k_max": 12, "indexer_rope": True, "context": 48, "batch": 2, "steps": 4, "lr_warm_up": 1, "eval_every": 2,
    "eval_windows": 2, "measure_windows": 1, "text": __file__,
}  # fmt: skip
# Of what a record says a run was, not where it ran: these do not make another run of it.
PLACE = ("device", "impl", "init", "text", "checkpoint_every")

BEFORE = 50  # steps that a spike is compared with
SPIKE = 6.0  # robust standard deviations


def parser(doc: str | None, results: Path) -> argparse.ArgumentParser:
    """The options that all studies share."""
    found = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    found.add_argument("--smoke", action="store_true", help="a toy on the CPU in seconds; its figures mean nothing")
    found.add_argument("--jobs", type=int, default=1, help="processes (default 1)")
    found.add_argument("--runs", type=Path, default=RUNS, help="folder of the runs")
    found.add_argument("--json", type=Path, default=results, help="file of the records")
    found.add_argument("--only", action="append", metavar="NAME", help="runs whose name contains NAME")
    return found


def settings_of(base: dict[str, Any], **changed: Any) -> Settings:
    """Settings with changes; a run saves its state once, at the end."""
    values = base | changed
    return Settings(**values | {"checkpoint_every": values["steps"]})


def read(path: Path) -> list[dict[str, Any]]:
    """The records in a file; none if there is no file."""
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else []


def write(path: Path, records: list[dict[str, Any]]) -> None:
    """Replace the records in a file in one move, so that a crash leaves the old ones."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    partial.write_text(json.dumps(records, indent=1, ensure_ascii=False, allow_nan=False) + "\n", encoding="utf-8")
    os.replace(partial, path)


def kept(settings: Settings) -> dict[str, Any]:
    """The settings that a record holds."""
    return {name: value for name, value in vars(settings).items() if name not in PLACE}


def chosen(names: Iterable[str], options: argparse.Namespace) -> list[str]:
    """The names of runs that `--only` fits, or all."""
    return [name for name in names if not options.only or any(part in name for part in options.only)]


def run_all(
    study: dict[str, Settings],
    options: argparse.Namespace,
    command: str,
    *,
    finish: Callable[[Any, Settings], dict[str, Any]] | None = None,
) -> dict[str, dict[str, Any]]:
    """Train what the record file lacks, and return the records of the study by name.

    Args:
        study: settings by name.
        options: as `parser` makes them.
        command: what a record says it comes from.
        finish: what else to measure on a trained model, for the record.

    A run that fails, other than by a loss that is not finite, is reported and has no record; the others go on.

    Raises:
        ValueError: `--only` fits no run.
    """
    wanted = {name: study[name] for name in chosen(study, options)}
    if not wanted:
        raise ValueError(f"only: expected a part of one of {', '.join(study)}, got {options.only}")
    records = {record["name"]: record for record in read(options.json)}
    left = {n: s for n, s in wanted.items() if n not in records or records[n]["settings"] != kept(s)}
    print(f"{command}: {len(wanted)} runs, {len(wanted) - len(left)} of them on record", file=sys.stderr, flush=True)
    started = time.monotonic()
    for done, (name, found) in enumerate(results(left, options, finish), 1):
        if isinstance(found, str):
            print(f"{done}/{len(left)} {name}: FAILED\n{found}", file=sys.stderr, flush=True)
            continue
        records[name] = {"suite": "experiments", "name": name, "command": command, **found}
        write(options.json, list(records.values()))
        loss = "diverged" if found["diverged"] else f"validation loss {found['validation_loss']:.4f}"
        seconds = time.monotonic() - started
        print(f"{done}/{len(left)} {name}: {loss}, {seconds:.0f} s", file=sys.stderr, flush=True)
    return {name: records[name] for name in wanted if name in records}


def results(
    study: dict[str, Settings], options: argparse.Namespace, finish: Callable[[Any, Settings], dict[str, Any]] | None
) -> Iterator[tuple[str, dict[str, Any] | str]]:
    """Names and records, or how the run failed, as the runs end: in this process, or in several."""
    if options.jobs == 1:
        for name, settings in study.items():
            yield name, attempt(settings, options.runs / name, finish)
        return
    context = multiprocessing.get_context("spawn")
    gpus = context.Queue()
    n_gpus = torch.cuda.device_count()
    for i in range(options.jobs):
        gpus.put(i % n_gpus if n_gpus else None)
    with ProcessPoolExecutor(options.jobs, context, initializer=settle, initargs=(gpus,)) as pool:
        tasks = {pool.submit(attempt, settings, options.runs / name, finish): name for name, settings in study.items()}
        for task in as_completed(tasks):
            yield tasks[task], task.result()


def settle(gpus: Any) -> None:
    """Choose the GPU of a process, before it makes its first tensor there."""
    gpu = gpus.get()
    if gpu is not None:
        torch.cuda.set_device(gpu)
    torch.set_num_threads(1)


def attempt(
    settings: Settings, folder: Path, finish: Callable[[Any, Settings], dict[str, Any]] | None
) -> dict[str, Any] | str:
    """A run's record, or the traceback of what it raised."""
    try:
        return run_one(settings, folder, finish)
    except Exception:  # noqa: BLE001  one run of many: reported, and the study ends with status 1
        return traceback.format_exc()


def run_one(
    settings: Settings, folder: Path, finish: Callable[[Any, Settings], dict[str, Any]] | None
) -> dict[str, Any]:
    """Train a model and measure it: its record."""
    if folder.exists():
        shutil.rmtree(folder)
    begun = time.monotonic()
    try:
        model = train.train(settings, folder)
    except FloatingPointError as error:
        model, reason = None, str(error)
    seconds = time.monotonic() - begun
    _, facts = checkpoint.read_run(folder)
    lines = checkpoint.read_log(folder)
    losses = [line["loss"] for line in lines if "loss" in line]
    record: dict[str, Any] = {
        "settings": kept(settings), **facts,
        "seconds": round(seconds, 1),
        "diverged": model is None,
        "steps": len(losses),
        "spikes": len(spikes(losses)),
        "losses": [round(statistics.fmean(losses[i : i + 10]), 4) for i in range(0, len(losses), 10)],
        "log": [line for line in lines if "validation_loss" in line],
    }  # fmt: skip
    if model is None:
        return record | {"reason": reason}
    held_out = text.windows(text.read(settings.text).validation, settings.eval_windows, settings.context)
    windows = held_out[: settings.measure_windows].to(settings.device)
    record |= {
        "validation_loss": lines[-1]["validation_loss"],
        "layers": measure.measure_layers(model, windows),
        "largest_activations": measure.largest_activations(model, windows),
    }
    if finish is not None:
        record |= finish(model, settings)
    return record


def spikes(losses: Sequence[float]) -> list[int]:
    """Steps at which the loss leaps: above the median of the 50 steps before by more than 6 of their robust deviations.

    The robust deviation is 1.4826 times the median distance from the median. Steps in a row are one spike. The first 50
    steps, when the loss falls fast, have none.
    """
    found: list[int] = []
    high_before = False
    for i in range(BEFORE, len(losses)):
        before = losses[i - BEFORE : i]
        middle = statistics.median(before)
        spread = 1.4826 * statistics.median(abs(x - middle) for x in before)
        high = losses[i] > middle + SPIKE * spread
        if high and not high_before:
            found.append(i)
        high_before = high
    return found
