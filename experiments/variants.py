"""The paper's four models beside each other: same tokens, same tuning effort, five seeds.

    python -m experiments.variants --jobs 8      on a GPU, or several; about ten minutes on two H200s
    python -m experiments.variants --smoke       a toy on the CPU

First a sweep: each variant once at every learning rate. It shows which rate each variant trains best at, from which on
it fails, and how often its loss leaps. Then the main table: each variant at its best rate, with every seed.
"""

import sys
from typing import Any

from experiments import runner
from experiments.settings import Settings
from gsa_ref.config import VARIANTS

RESULTS = runner.RESULTS / "variants.json"
COMMAND = "python -m experiments.variants"
RATES = (5e-4, 1e-3, 2e-3, 4e-3, 8e-3, 1.6e-2, 3.2e-2)
SWEEP_STEPS, STEPS, SEEDS = 250, 600, 5
STABLE = 1.1  # a rate is stable if its loss is at most so many times that of the variant's best


def base(smoke: bool, **changed: Any) -> dict[str, Any]:
    """The settings that all runs share."""
    return (runner.SMOKE if smoke else runner.GPU) | changed


def implementation(variant: str, smoke: bool) -> str:
    """Dense attention is PyTorch's in both implementations; the kernels are there for the sparse variants."""
    return "fast" if VARIANTS[variant]["sparse"] and not smoke else "reference"


def sweep(smoke: bool) -> dict[str, Settings]:
    """Each variant at every learning rate, the sparse ones, which take longest, first."""
    rates = RATES[:2] if smoke else RATES
    shared = base(smoke) if smoke else base(smoke, steps=SWEEP_STEPS)
    order = sorted(VARIANTS, key=lambda variant: not VARIANTS[variant]["sparse"])
    return {
        f"sweep_{variant}_{rate:g}": runner.settings_of(
            shared, variant=variant, lr=rate, impl=implementation(variant, smoke)
        )
        for variant in order
        for rate in rates
    }


def best_rate(variant: str, records: dict[str, dict[str, Any]]) -> float:
    """The learning rate at which the variant's sweep ended with the lowest validation loss.

    Raises:
        ValueError: every run of the variant diverged.
    """
    runs = [r for r in of_sweep(variant, records) if not r["diverged"]]
    if not runs:
        raise ValueError(f"variant: expected a run of {variant} that did not diverge, got none")
    return min(runs, key=lambda r: r["validation_loss"])["settings"]["lr"]


def largest_stable_rate(variant: str, records: dict[str, dict[str, Any]]) -> float:
    """The largest learning rate of the sweep, from the best one upwards, up to which the loss stays within STABLE times
    the variant's best.
    """
    stable = best_rate(variant, records)
    runs = [r for r in of_sweep(variant, records) if r["settings"]["lr"] >= stable]
    runs.sort(key=lambda r: r["settings"]["lr"])
    for r in runs:
        if r["diverged"] or r["validation_loss"] > STABLE * runs[0]["validation_loss"]:
            break
        stable = r["settings"]["lr"]
    return stable


def of_sweep(variant: str, records: dict[str, dict[str, Any]]) -> list[dict[str, Any]]:
    return [r for n, r in records.items() if n.startswith("sweep_") and r["settings"]["variant"] == variant]


def runs_of_table(smoke: bool) -> dict[str, tuple[str, int]]:
    """Variant and seed of each run of the main table, by its name; a seed of all variants before the next one."""
    seeds = range(2 if smoke else SEEDS)
    return {f"{variant}_{seed}": (variant, seed) for seed in seeds for variant in ("gsa", "sparse", "gated", "dense")}


def main_table(smoke: bool, records: dict[str, dict[str, Any]]) -> dict[str, Settings]:
    """Each variant at its best learning rate, with every seed."""
    shared = base(smoke) if smoke else base(smoke, steps=STEPS)
    return {
        name: runner.settings_of(
            shared, variant=variant, seed=seed, lr=best_rate(variant, records), impl=implementation(variant, smoke)
        )
        for name, (variant, seed) in runs_of_table(smoke).items()
    }


def main(argv: list[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    parser = runner.parser(__doc__, RESULTS)
    parser.add_argument("--no-sweep", action="store_true", help="the main table alone, with the rates on record")
    options = parser.parse_args(argv)
    try:
        records = {r["name"]: r for r in runner.read(options.json)}
        trials = {} if options.no_sweep else sweep(options.smoke)
        if runner.chosen(trials, options):
            tried = runner.run_all(trials, options, COMMAND)
            records |= tried
            for name, r in tried.items():
                loss = "diverged" if r["diverged"] else f"validation loss {r['validation_loss']:.4f}"
                print(f"{name:20s} rate {r['settings']['lr']:g}  {loss}")
            if len(tried) < len(runner.chosen(trials, options)):
                return 1  # a run that failed; the best rates may be others
            if not runner.chosen(runs_of_table(options.smoke), options):  # a part of the sweep alone
                return 0
        table = main_table(options.smoke, records)
        found = runner.run_all(table, options, COMMAND)
    except ValueError as error:
        parser.error(str(error))
    for variant in VARIANTS:
        losses = [
            r["validation_loss"] for r in found.values() if r["settings"]["variant"] == variant and not r["diverged"]
        ]
        if losses:
            rate = best_rate(variant, records)
            print(
                f"{variant:7s} rate {rate:g}  validation loss {sum(losses) / len(losses):.4f} over {len(losses)} seeds"
            )
    return 1 if len(found) < len(runner.chosen(table, options)) else 0


if __name__ == "__main__":
    sys.exit(main())
