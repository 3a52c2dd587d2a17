"""What determines a training run: the fields of `Settings`, each of which is an option of train.py."""

import argparse
import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from gsa_ref import GatedSparseAttention, GSAConfig, LanguageModel, ModelConfig
from gsa_ref._arguments import RULES, check_choice, check_int, check_number
from gsa_ref.config import GATES, VARIANTS
from gsa_ref.layer import PHASES

IMPLS = ("reference", "fast")
DTYPES = ("float32", "bfloat16")


def option(default: Any, help: str, choices: Sequence[str] | None = None) -> Any:
    """A field with what argparse needs to know about it."""
    return dataclasses.field(default=default, metadata={"help": help, "choices": choices})


@dataclass(frozen=True, kw_only=True)
class Settings:
    """A run. Two runs with equal settings on one machine give equal results on a CPU, bit by bit.

    Raises:
        TypeError: a field has the wrong type.
        ValueError: a field is out of range, or two fields contradict one another.
    """

    variant: str = option("gsa", "model of the paper", tuple(VARIANTS))
    phase: str = option(
        "sparse", "sparse: everything learns; warm_up: only the indexers, beside dense attention", PHASES
    )
    gates: str | None = option(None, "gates that the model has instead of those of its variant", GATES)
    init: str | None = option(None, "folder of a run whose weights this one begins with; new parts are initialised")
    text: str | None = option(None, "file to learn from (default: Python's standard library)")

    d: int = option(128, "model width")
    n_layers: int = option(2, "blocks")
    d_ff: int = option(344, "inner width of SwiGLU")
    H: int = option(4, "query heads")
    H_kv: int = option(2, "key/value heads")
    d_h: int = option(32, "head width")
    H_I: int = option(4, "indexer heads")
    d_I: int = option(32, "indexer head width")
    k_base: int = option(32, "budget at the mean variance, in tokens")
    k_min: int = option(8, "smallest budget, in tokens")
    k_max: int = option(64, "largest budget, in tokens")
    rule: str = option("proportional", "direction of Eq. 8", RULES)
    indexer_scale: float | None = option(None, "factor on q^I·k^I (default: 1/√d_I)")
    indexer_rope: bool = option(False, "RoPE on the indexer's queries and keys too")
    gate_bias_init: float = option(0.0, "initial bias of the gates")
    kl_temperature: float = option(0.1, "τ of the indexer's loss")

    context: int = option(256, "tokens in a sequence")
    batch: int = option(8, "sequences in a micro-batch")
    accumulate: int = option(1, "micro-batches in a step")
    steps: int = option(300, "optimiser steps")
    lr: float = option(1e-3, "highest learning rate")
    lr_warm_up: int = option(20, "steps over which the learning rate rises; then it falls as a cosine to a tenth")
    weight_decay: float = option(0.1, "AdamW's, on matrices")
    clip: float = option(1.0, "largest norm of the gradient, of the indexers and of all else separately")
    seed: int = option(0, "of the initial weights and of the order of the text")

    device: str = option("cpu", "cpu or cuda")
    impl: str = option("reference", "gsa_ref or the kernels of gsa_fast", IMPLS)
    dtype: str = option("float32", "bfloat16 runs matrix products under autocast; weights stay float32", DTYPES)
    eval_every: int = option(50, "steps between validations")
    eval_windows: int = option(32, "sequences of the validation text that the validation loss is a mean over")
    measure_windows: int = option(4, "the first of them, on which attention and selection are measured")
    checkpoint_every: int = option(100, "steps between checkpoints")

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if field.metadata["choices"] and not (value is None and field.default is None):
                check_choice(field.name, getattr(self, field.name), field.metadata["choices"])
        for name in ("context", "batch", "accumulate", "steps", "eval_every", "eval_windows", "checkpoint_every"):
            check_int(name, getattr(self, name), 1)
        check_int("lr_warm_up", self.lr_warm_up, 0)
        check_int("seed", self.seed, 0)
        check_int("measure_windows", self.measure_windows, 1)
        if self.measure_windows > self.eval_windows:
            raise ValueError(
                f"measure_windows: expected ≤ eval_windows = {self.eval_windows}, got {self.measure_windows}"
            )
        for name in ("lr", "clip"):
            check_number(name, getattr(self, name), positive=True)
        check_number("weight_decay", self.weight_decay)
        if self.phase == "warm_up" and not VARIANTS[self.variant]["sparse"]:
            raise ValueError(
                f"phase: expected sparse for the variant {self.variant}, which has no indexer, got warm_up"
            )
        if self.device not in ("cpu", "cuda"):
            raise ValueError(f"device: expected cpu or cuda, got {self.device!r}")
        self.model_config()

    def model_config(self) -> ModelConfig:
        """The sizes of the model."""
        names = {field.name for field in dataclasses.fields(GSAConfig)} - {"gates"}
        attention = GSAConfig(**{name: value for name, value in vars(self).items() if name in names})
        attention = attention.variant(self.variant)
        if self.gates is not None:
            attention = dataclasses.replace(attention, gates=self.gates)  # type: ignore[arg-type]
        return ModelConfig(attention=attention, n_layers=self.n_layers, d_ff=self.d_ff)

    def build_model(self) -> LanguageModel:
        """A new model in its phase, on its device; the seed determines its weights.

        Raises:
            ValueError: there is no such device.
        """
        if self.device == "cuda" and not torch.cuda.is_available():
            raise ValueError("device: expected cpu on a machine without a CUDA device, got cuda")
        layer: Callable[[GSAConfig], GatedSparseAttention] = GatedSparseAttention
        if self.impl == "fast":
            import gsa_fast  # needs Triton, which the reference does not

            # On a GPU nothing may fall back to the reference.
            layer = partial(gsa_fast.GatedSparseAttention, impl="triton" if self.device == "cuda" else "auto")
        torch.manual_seed(self.seed)
        model = LanguageModel(self.model_config(), layer=layer).to(self.device)
        model.set_phase(self.phase)  # type: ignore[arg-type]
        return model


def add_options(parser: argparse.ArgumentParser) -> None:
    """An option for each field of `Settings`, of the same name and default."""
    types: dict[str, type] = {"int": int, "float": float, "str": str}
    for field in dataclasses.fields(Settings):
        names, default = [f"--{field.name.replace('_', '-')}"], field.default
        shown = field.metadata["help"] + ("" if default is None or default is False else f" (default {default})")
        if field.type is bool:
            parser.add_argument(*names, action="store_true", help=shown)
        else:
            name = str(getattr(field.type, "__name__", field.type)).split(" ")[0]
            parser.add_argument(
                *names, type=types[name], default=default, choices=field.metadata["choices"], help=shown, metavar=None
            )
