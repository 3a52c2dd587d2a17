"""What a trained indexer selects: how alike neighbouring queries' selections are, how old the tokens, how large k_t.

    python -m experiments.selections             on a GPU, after experiments.variants: goes on from its first GSA model
    python -m experiments.selections --smoke     a toy on the CPU

The model is trained on at four times its context, with the budget still an eighth of it, once with each direction of
Eq. 8. Kernels that share work between queries live from what this measures. `results/selections.npz` is a sample.
"""

import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from experiments import measure, runner, text, variants
from experiments.settings import Settings
from gsa_ref import LanguageModel, Selection, indexed_selection

RESULTS = runner.RESULTS / "selections.json"
SAMPLE = RESULTS.with_suffix(".npz")
COMMAND = "python -m experiments.selections"
DISTANCES = (1, 4, 16, 32, 64)
GROUPS = (2, 4, 8, 16, 32, 64)  # neighbouring queries whose union is taken
LONGER: dict[str, Any] = {
    "context": 4096, "batch": 4, "steps": 150, "k_base": 512, "k_min": 128, "k_max": 1024, "eval_every": 50,
    "measure_windows": 2, "eval_windows": 16, "lr": 5e-4, "lr_warm_up": 10, "seed": 100,
}  # fmt: skip
RULES = ("proportional", "inverse", "fixed")


def study(smoke: bool, init: Path) -> dict[str, Settings]:
    """A run for each rule."""
    shared = variants.base(smoke, variant="gsa")
    shared |= {} if smoke else LONGER | {"init": str(init)}
    return {f"longer_{rule}": runner.settings_of(shared, rule=rule) for rule in RULES}


def describe(model: LanguageModel, settings: Settings) -> dict[str, Any]:
    """Overlap, unions, ages and budgets by layer, on validation text; and the sample, in the folder of the run."""
    source = text.windows(text.read(settings.text).validation, settings.eval_windows, settings.context)
    windows = source[: settings.measure_windows].to(settings.device)
    chosen = [
        select(block.attention, h)
        for block, h in zip(model.blocks, measure.attention_inputs(model, windows), strict=True)
    ]
    return {"selections": [describe_layer(members, settings.k_max) for members in chosen]}


@torch.no_grad()
def select(layer: Any, h: Tensor) -> Tensor:
    """Which positions a layer selects, bool [B, L, S]."""
    h = h.to(layer.W_q.weight.dtype)
    q_idx, k_idx, head_logits = layer.indexer(h)
    selection, _ = indexed_selection(
        q_idx, k_idx, head_logits, layer.indexer.bias, mean_variance=layer.mean_variance, config=layer.config
    )
    return measure.members(Selection(*selection), h.shape[1])


def describe_layer(members: Tensor, k_max: int) -> dict[str, Any]:
    """The figures of one layer.

    Rows count that see at least twice the largest budget, so that the selection leaves most of what they see out.

    Args:
        members: bool [B, L, S] with L = S.

    Returns:
        - shared: by distance δ, |S_t ∩ S_{t+δ}| / |S_t|, and what a random selection of those sizes would share.
        - union: by group size, the union of the group's selections over their mean size.
        - age: share of the selected tokens whose age t − s is 0, 1, 2–3, 4–7, …
        - k: quantiles of k_t at 0, 0.1, 0.5, 0.9 and 1.
    """
    L = members.shape[1]
    first = min(2 * k_max, L // 2)
    rows = members[:, first:]
    counts = rows.sum(-1).double()
    visible = torch.arange(first + 1, L + 1, device=members.device).double()
    shared, random = {}, {}
    for distance in DISTANCES:
        if distance < rows.shape[1]:
            both = (rows[:, :-distance] & rows[:, distance:]).sum(-1)
            shared[str(distance)] = float((both / counts[:, :-distance]).mean())
            random[str(distance)] = float((counts[:, distance:] / visible[distance:]).mean())
    union = {}
    for size in GROUPS:
        n = rows.shape[1] // size
        if n:
            grouped = rows[:, : n * size].unflatten(1, (n, size))
            union[str(size)] = float((grouped.any(2).sum(-1) / grouped.sum(-1).double().mean(2)).mean())
    _, t, s = rows.nonzero(as_tuple=True)
    age = (t + first - s).double()
    bins = torch.where(age > 0, torch.log2(age.clamp(min=1)).floor() + 1, age).long()
    ages = torch.bincount(bins) / len(bins)
    quantiles = counts.flatten().quantile(torch.tensor([0.0, 0.1, 0.5, 0.9, 1.0], device=counts.device).double())
    return {
        "first_row": first, "shared": shared, "shared_if_random": random, "union": union,
        "age": [round(float(x), 5) for x in ages], "k": [float(x) for x in quantiles],
    }  # fmt: skip


def write_sample(model: LanguageModel, settings: Settings, path: Path) -> None:
    """The selections of the first window in the first, middle and last layer, as bits: uint8 [3, L, S/8]."""
    source = text.windows(text.read(settings.text).validation, settings.eval_windows, settings.context)
    inputs = measure.attention_inputs(model, source[:1].to(settings.device))
    layers = sorted({0, len(model.blocks) // 2, len(model.blocks) - 1})
    chosen = [select(model.blocks[i].attention, inputs[i])[0] for i in layers]
    bits = np.stack([np.packbits(x.cpu().numpy(), axis=-1) for x in chosen])
    np.savez_compressed(path, layers=np.array(layers), bits=bits)


def finish(model: LanguageModel, settings: Settings) -> dict[str, Any]:
    """For the record; the run with the rule as printed leaves the sample."""
    if settings.rule == "proportional" and settings.device == "cuda":
        write_sample(model, settings, SAMPLE)
    return describe(model, settings)


def main(argv: list[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    parser = runner.parser(__doc__, RESULTS)
    options = parser.parse_args(argv)
    try:
        runs = study(options.smoke, options.runs / "gsa_0")
        found = runner.run_all(runs, options, COMMAND, finish=finish)
    except (OSError, ValueError) as error:
        parser.error(str(error))
    for name, record in found.items():
        for i, layer in enumerate(record.get("selections", [])):
            near = "  ".join(f"{distance}: {share:.2f}" for distance, share in layer["shared"].items())
            print(f"{name} layer {i}: shared with the query at distance {near}")
    return 1 if len(found) < len(runner.chosen(runs, options)) else 0


if __name__ == "__main__":
    sys.exit(main())
