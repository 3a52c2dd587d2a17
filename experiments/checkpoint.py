"""Checkpoints: tensors in safetensors, settings in JSON. Nothing is pickled, so nothing that is read can run code.

A run is a folder: `run.json` (settings, text and versions, written once), `checkpoint.safetensors` (everything that
changes) and `log.jsonl`.
"""

import json
import os
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from experiments.settings import Settings
from gsa_ref import LanguageModel

RUN, TENSORS, LOG = "run.json", "checkpoint.safetensors", "log.jsonl"
# What one variant has and another lacks: a run may begin with weights that lack it.
OPTIONAL = (".indexer.", ".mean_variance", ".W_vg.", ".W_og.")


def save(
    folder: Path, model: LanguageModel, optimizer: torch.optim.Optimizer, generator: torch.Generator, step: int
) -> None:
    """Write the state after `step` steps. It replaces the former file in one move, so that a crash leaves one of them.

    To be called after `update_mean_variance`, when no layer has pending rows.
    """
    tensors = {f"model.{name}": tensor for name, tensor in model.state_dict().items()}
    for name, parameter in model.named_parameters():
        for key, value in optimizer.state.get(parameter, {}).items():
            tensors[f"optimizer.{key}.{name}"] = value
    tensors |= {"generator": generator.get_state(), "step": torch.tensor(step)}
    partial = folder / f"{TENSORS}.partial"
    save_file({name: tensor.detach().contiguous() for name, tensor in tensors.items()}, partial)
    os.replace(partial, folder / TENSORS)


def resume(folder: Path, model: LanguageModel, optimizer: torch.optim.Optimizer, generator: torch.Generator) -> int:
    """Restore what `save` wrote, and return its step.

    Raises:
        OSError: there is no such file.
    """
    tensors = load_file(folder / TENSORS)
    model.load_state_dict(_part(tensors, "model."))
    for name, parameter in model.named_parameters():
        # AdamW counts its steps on the CPU, wherever the parameter is.
        state = {
            key: tensors[f"optimizer.{key}.{name}"]
            for key in ("step", "exp_avg", "exp_avg_sq")
            if f"optimizer.{key}.{name}" in tensors
        }
        if state:
            optimizer.state[parameter] = {k: v if k == "step" else v.to(parameter.device) for k, v in state.items()}
    generator.set_state(tensors["generator"])
    return int(tensors["step"])


def load_weights(folder: Path, model: LanguageModel) -> list[str]:
    """Begin with the weights of a run, perhaps of a variant with fewer parts. Returns the names of what it lacks.

    Raises:
        OSError: there is no such run.
        ValueError: it has other sizes, or parts that the model lacks.
    """
    with safe_open(folder / TENSORS, "pt") as file:
        weights = {n.removeprefix("model."): file.get_tensor(n) for n in file.keys() if n.startswith("model.")}  # noqa: SIM118
    own = model.state_dict()
    lacking = [name for name in own if name not in weights]
    if surplus := [name for name in weights if name not in own]:
        raise ValueError(f"init: expected a run without parts that this model lacks, got one with {surplus[0]}")
    if wrong := [name for name in lacking if not any(part in name for part in OPTIONAL)]:
        raise ValueError(f"init: expected a run with {wrong[0]}, got one without it")
    for name, tensor in weights.items():
        if tensor.shape != own[name].shape:
            raise ValueError(f"init: expected {name} of shape {list(own[name].shape)}, got {list(tensor.shape)}")
    model.load_state_dict(weights, strict=False)
    return lacking


def _part(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): t for name, t in tensors.items() if name.startswith(prefix)}


def write_run(folder: Path, settings: Settings, facts: dict[str, Any]) -> None:
    """Write `run.json`: the settings, and facts such as the hash of the text."""
    content = {"settings": vars(settings), **facts}
    (folder / RUN).write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def read_log(folder: Path) -> list[dict[str, Any]]:
    """The lines of the log of a run.

    Raises:
        OSError: there is no such run.
    """
    return [json.loads(line) for line in (folder / LOG).read_text(encoding="utf-8").splitlines()]


def read_run(folder: Path) -> tuple[Settings, dict[str, Any]]:
    """The settings of a run, and the other facts of `run.json`.

    Raises:
        OSError: there is no such run.
        TypeError, ValueError: the file does not hold settings.
    """
    content = json.loads((folder / RUN).read_text(encoding="utf-8"))
    return Settings(**content.pop("settings")), content
