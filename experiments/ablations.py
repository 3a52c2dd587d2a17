"""What each choice of GSA is worth: one change at a time, at the learning rate and the tokens of the main table.

    python -m experiments.ablations --jobs 8     on a GPU, or several, after experiments.variants
    python -m experiments.ablations --smoke      a toy on the CPU

Runs without a change are not trained again: they are those of `experiments.variants`.
"""

import sys
from pathlib import Path
from typing import Any

from experiments import runner, variants
from experiments.settings import Settings

RESULTS = runner.RESULTS / "ablations.json"
COMMAND = "python -m experiments.ablations"
SEEDS = 2
# By name: the variant that is changed, what is changed, and how many seeds there are.
CHANGES: dict[str, tuple[str, dict[str, Any], int]] = {
    "rule_inverse": ("gsa", {"rule": "inverse"}, SEEDS),
    "rule_fixed": ("gsa", {"rule": "fixed"}, SEEDS),
    # At one k_base the rules have different mean budgets. With these, all have about the proportional rule's.
    "rule_inverse_same_k": ("gsa", {"rule": "inverse", "k_base": 99, "k_min": 25, "k_max": 198}, SEEDS),
    "rule_fixed_same_k": ("gsa", {"rule": "fixed", "k_base": 118}, SEEDS),
    "gates_value": ("gsa", {"gates": "value"}, SEEDS),
    "gates_output": ("gsa", {"gates": "output"}, SEEDS),
    "k_32": ("gsa", {"k_base": 32, "k_min": 8, "k_max": 64}, 1),
    "k_64": ("gsa", {"k_base": 64, "k_min": 16, "k_max": 128}, 1),
    "k_256": ("gsa", {"k_base": 256, "k_min": 64, "k_max": 512}, 1),
    "no_indexer_rope": ("gsa", {"indexer_rope": False}, 1),
    "indexer_scale_1": ("gsa", {"indexer_scale": 1.0}, 1),
    "indexer_width_16": ("gsa", {"d_I": 16}, 1),
    "gate_bias_0.5": ("gsa", {"gate_bias_init": 0.5}, 1),
}
SMOKE_K = {"k_base": 8, "k_min": 4, "k_max": 12}


def study(smoke: bool, rates: dict[str, float]) -> dict[str, Settings]:
    """The runs, one seed of every change before the next one."""
    found = {}
    for seed in range(1 if smoke else SEEDS):
        for name, (variant, changed, seeds) in CHANGES.items():
            if seed < seeds:
                shared = variants.base(smoke, variant=variant, seed=seed, lr=rates[variant])
                shared |= {} if smoke else {"steps": variants.STEPS, "impl": "fast"}
                # A toy's context is too short for other budgets.
                found[f"{name}_{seed}"] = runner.settings_of(shared, **changed | (SMOKE_K if smoke else {}))
    return found


def main(argv: list[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    parser = runner.parser(__doc__, RESULTS)
    parser.add_argument("--variants", type=Path, default=variants.RESULTS, help="records of experiments.variants")
    options = parser.parse_args(argv)
    try:
        if options.smoke:
            rates = {"gsa": 1e-3}
        else:
            records = {r["name"]: r for r in runner.read(options.variants)}
            rates = {"gsa": variants.best_rate("gsa", records)}
        runs = study(options.smoke, rates)
        found = runner.run_all(runs, options, COMMAND)
    except ValueError as error:
        parser.error(str(error))
    for name, record in found.items():
        loss = "diverged" if record["diverged"] else f"{record['validation_loss']:.4f}"
        print(f"{name:20s} {loss}")
    return 1 if len(found) < len(runner.chosen(runs, options)) else 0


if __name__ == "__main__":
    sys.exit(main())
