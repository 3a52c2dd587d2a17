"""Train the runs of docs/verify/training.md and store their records.

    python -m experiments.study             whether the indexer learns, and what sparse training costs: on a CPU
    python -m experiments.study --kernels   the kernels beside the reference, in two precisions: on a GPU

A run whose folder holds it already is not trained again. Delete the folder to do so.
"""

import argparse
import shlex
import sys
from pathlib import Path
from typing import Any

from experiments import checkpoint, runner, train
from experiments.settings import Settings, add_options

RESULTS, KERNEL_RESULTS = runner.RESULTS / "cpu.json", runner.RESULTS / "h200.json"

# A budget of exactly an eighth of the context, so that what a selection captures is comparable between runs.
FIXED = "--rule fixed --k-base 32 --k-min 32 --k-max 32"
DENSE = "--steps 1000 --lr 0.002 --eval-every 250"
WARM_UP = f"{FIXED} --phase warm_up --batch 4 --steps 300 --eval-every 50 --seed 1"
SPARSE_WARM_UP = f"--variant sparse --init {{runs}}/dense {WARM_UP}"
ON = "--batch 4 --steps 200 --eval-every 50 --seed 2 --lr 0.0005"  # all on the same text in the same order
TAU = (1.0, 0.3, 0.1, 0.03, 0.01)
BEST = "--indexer-rope --kl-temperature 0.1"

# In this order: later runs begin with the weights of earlier ones. {runs} is the folder of the runs.
STUDY = {
    "dense": f"--variant dense {DENSE}",
    **{f"warm_tau{tau}": f"{SPARSE_WARM_UP} --kl-temperature {tau}" for tau in TAU},
    **{f"warm_tau{tau}_rope": f"{SPARSE_WARM_UP} --kl-temperature {tau} --indexer-rope" for tau in TAU},
    "warm_best_scale1": f"{SPARSE_WARM_UP} {BEST} --indexer-scale 1",
    "warm_blind_lr": f"{SPARSE_WARM_UP} --kl-temperature 0.1 --lr 0.01",
    "dense_on": f"--variant dense --init {{runs}}/dense {ON}",
    "sparse_on": f"--variant sparse --init {{runs}}/warm_tau0.1_rope {ON} {BEST} {FIXED}",
    "sparse_on_proportional": f"--variant sparse --init {{runs}}/warm_tau0.1_rope {ON} {BEST} --rule proportional",
    "sparse_on_inverse": f"--variant sparse --init {{runs}}/warm_tau0.1_rope {ON} {BEST} --rule inverse",
    "sparse_on_blind": f"--variant sparse --init {{runs}}/warm_tau0.1 {ON} --kl-temperature 0.1 {FIXED}",
    "gated": f"--variant gated {DENSE}",
    "gsa_warm": f"--variant gsa --init {{runs}}/gated {WARM_UP} {BEST}",
    "gated_on": f"--variant gated --init {{runs}}/gated {ON}",
    "gsa_on": f"--variant gsa --init {{runs}}/gsa_warm {ON} {BEST} {FIXED}",
}

# One model, four ways: what two precisions of the reference differ by is the noise that the kernels are held against.
KERNELS = {
    f"{impl}_{dtype}": (
        f"--variant gsa --steps 200 --device cuda --context 512 --batch 8 --d 256 --n-layers 4 --d-ff 688 --d-h 64 "
        f"--d-I 64 --k-base 64 --k-min 16 --k-max 128 --checkpoint-every 200 --impl {impl} --dtype {dtype}"
    )
    for impl in ("reference", "fast")
    for dtype in ("float32", "bfloat16")
}


def main(argv: list[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=Path, default=runner.RUNS, help="folder of the runs")
    parser.add_argument("--kernels", action="store_true", help="the runs on a GPU instead")
    parser.add_argument("--json", type=Path, help="file of the records")
    options = parser.parse_args(argv)
    study = KERNELS if options.kernels else STUDY
    for name, command in study.items():
        folder, settings = options.runs / name, parse(command, options.runs)
        if not finished(folder, settings):
            print(f"{name}: {command}", file=sys.stderr)
            train.train(settings, folder, resume=(folder / checkpoint.TENSORS).exists())
    found = [record(options.runs / name, name, command, every=options.kernels) for name, command in study.items()]
    runner.write(options.json or (KERNEL_RESULTS if options.kernels else RESULTS), found)
    return 0


def parse(command: str, runs: Path) -> Settings:
    """The settings that a command of the study stands for."""
    parser = argparse.ArgumentParser()
    add_options(parser)
    return Settings(**vars(parser.parse_args(shlex.split(command.format(runs=runs)))))


def finished(folder: Path, settings: Settings) -> bool:
    """Whether a run is there and took its last step.

    Raises:
        ValueError: the folder holds a run with other settings.
    """
    if not (folder / checkpoint.TENSORS).exists():
        return False
    if checkpoint.read_run(folder)[0] != settings:
        raise ValueError(f"{folder}: expected a run with the settings of the study, got other settings; delete it")
    return any(line["step"] == settings.steps for line in checkpoint.read_log(folder))


def record(folder: Path, name: str, command: str, *, every: bool) -> dict[str, Any]:
    """What a run was, and its log: the lines that have a validation loss, or every line with its losses alone."""
    settings, facts = checkpoint.read_run(folder)
    kept = {key: value for key, value in vars(settings).items() if key not in ("init", "text")}
    shown = f"python -m experiments.train --out experiments/runs/{name} {command.format(runs='experiments/runs')}"
    lines = [line for line in checkpoint.read_log(folder) if every or "validation_loss" in line]
    if every:
        losses = ("step", "loss", "indexer_kl", "validation_loss")
        lines = [{key: line[key] for key in losses if key in line} for line in lines]
    return {"suite": "training", "name": name, "command": shown, "settings": kept, **facts, "log": lines}


if __name__ == "__main__":
    sys.exit(main())
