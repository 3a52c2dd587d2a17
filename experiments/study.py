"""Train the runs of docs/verify/training.md and store their records: python experiments/study.py.

A run whose folder holds it already is not trained again. Delete the folder to do so.
"""

import argparse
import json
import os
import shlex
import sys
from pathlib import Path
from typing import Any

import checkpoint
import train

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "experiments/results/cpu.json"
RUNS = ROOT / "experiments/runs"

# A budget of exactly an eighth of the context, so that what a selection captures is comparable between runs.
FIXED = "--variant sparse --rule fixed --k-base 32 --k-min 32 --k-max 32"
WARM_UP = f"{FIXED} --init {{runs}}/dense --phase warm_up --batch 4 --steps 300 --eval-every 50 --seed 1"
ON = "--batch 4 --steps 300 --eval-every 50 --seed 2 --lr 0.0005"


def warm_up(tau: float, more: str = "") -> str:
    return f"{WARM_UP} --kl-temperature {tau} {more}".strip()


# In this order: later runs begin with the weights of earlier ones.
STUDY = {
    "dense": "--variant dense --steps 1000 --lr 0.002 --eval-every 250",
    **{f"warm_tau{tau}": warm_up(tau) for tau in (1.0, 0.3, 0.1, 0.03, 0.01)},
    **{f"warm_tau{tau}_rope": warm_up(tau, "--indexer-rope") for tau in (1.0, 0.3, 0.1, 0.03, 0.01)},
}


def main(argv: list[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=Path, default=RUNS, help="folder of the runs")
    parser.add_argument("--json", type=Path, default=RESULTS, help="file of the records")
    options = parser.parse_args(argv)
    for name, command in STUDY.items():
        if not finished(options.runs / name):
            print(f"{name}: {command}", file=sys.stderr)
            arguments = shlex.split(command.format(runs=options.runs))
            resume = ["--resume"] if (options.runs / name / checkpoint.TENSORS).exists() else []
            train.main(["--out", str(options.runs / name), *arguments, *resume])
        write(options.json, [record(options.runs / n, n, c) for n, c in STUDY.items() if finished(options.runs / n)])
    return 0


def finished(folder: Path) -> bool:
    """Whether a run is there and took its last step."""
    if not (folder / checkpoint.TENSORS).exists():
        return False
    settings, _ = checkpoint.read_run(folder)
    return any(line["step"] == settings.steps for line in log(folder))


def log(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / checkpoint.LOG).read_text(encoding="utf-8").splitlines()]


def record(folder: Path, name: str, command: str) -> dict[str, Any]:
    """What a run was, and the lines of its log that have a validation loss."""
    settings, facts = checkpoint.read_run(folder)
    kept = {key: value for key, value in vars(settings).items() if key not in ("init", "text")}
    shown = f"python experiments/train.py --out experiments/runs/{name} {command.format(runs='experiments/runs')}"
    lines = [line for line in log(folder) if "validation_loss" in line]
    return {"suite": "training", "name": name, "command": shown, "settings": kept, **facts, "log": lines}


def write(path: Path, records: list[dict[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    partial.write_text(json.dumps(records, indent=1, ensure_ascii=False, allow_nan=False) + "\n", encoding="utf-8")
    os.replace(partial, path)


if __name__ == "__main__":
    sys.exit(main())
