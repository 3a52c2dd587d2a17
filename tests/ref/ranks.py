"""One short training run, by one process or by several that share the batch. For `test_training`."""

from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict, set_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.nn.parallel import DistributedDataParallel

from gsa_ref import LanguageModel, ModelConfig
from tests.ref.models import SMALL

CONFIG = ModelConfig(attention=SMALL, n_layers=2, d_ff=24)
SEQUENCES, LENGTH, MICRO_BATCHES = 4, 24, 2
PHASES = ("warm_up", "warm_up", "sparse", "sparse", "sparse")
FULL = StateDictOptions(full_state_dict=True)


def new_model(seed: int = 0) -> LanguageModel:
    torch.manual_seed(seed)
    model = LanguageModel(CONFIG).double().train()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 2:
                parameter *= 15  # a new model's attention is too flat for its loss to show anything
    return model


def wrapped(model: LanguageModel, kind: str) -> nn.Module:
    """The model as one process, DDP or FSDP2 runs it."""
    if kind == "ddp":
        return DistributedDataParallel(model)
    if kind == "fsdp" and not isinstance(model, FSDPModule):
        mesh = init_device_mesh("cpu", (dist.get_world_size(),))
        for block in model.blocks:
            fully_shard(block, mesh=mesh)
        return fully_shard(model, mesh=mesh)
    return model


def train(kind: str, rank: int = 0, ranks: int = 1, *, restart: int | None = None) -> dict[str, Any]:
    """Losses, V̄ and number of pending rows of every step, over all ranks, and the whole state at the end.

    Before step `restart`, which is also where a phase begins or goes on, a new model takes over the state.
    """
    model = new_model()
    result: dict[str, Any] = {"losses": [], "mean_variance": [], "pending": []}
    tokens = torch.randint(256, (len(PHASES), MICRO_BATCHES, SEQUENCES, LENGTH + 1))
    share = slice(rank * SEQUENCES // ranks, (rank + 1) * SEQUENCES // ranks)
    for step, batch in enumerate(tokens):
        if step == restart:
            state = whole_state(model)
            model = new_model(seed=1)
            set_model_state_dict(model, state)
        if step == restart or step == 0 or PHASES[step] != PHASES[step - 1]:
            model.set_phase(PHASES[step])
            runner = wrapped(model, kind)
        losses = torch.zeros(2, dtype=torch.float64)
        for micro_batch in batch[:, share]:
            output = runner(micro_batch[:, :-1])
            lm_loss = nn.functional.cross_entropy(output.logits.flatten(0, 1), micro_batch[:, 1:].flatten())
            ((lm_loss + output.indexer_loss) / MICRO_BATCHES).backward()
            losses += torch.stack((lm_loss, output.indexer_loss)).detach() / MICRO_BATCHES / ranks
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.grad is not None:
                    parameter -= 0.1 * parameter.grad
                    parameter.grad = None
        attention = [block.attention for block in model.blocks]
        pending = torch.stack([layer.pending_variance_count for layer in attention])
        if ranks > 1:
            dist.all_reduce(losses)
            dist.all_reduce(pending)
        model.update_mean_variance()
        result["losses"].append(losses)
        result["pending"].append(pending)
        result["mean_variance"].append(torch.stack([layer.mean_variance for layer in attention]))
    return {**{name: torch.stack(values) for name, values in result.items()}, "state": whole_state(model)}


def whole_state(model: LanguageModel) -> dict[str, Tensor]:
    """Gathered on every rank."""
    return {name: x.clone() for name, x in get_model_state_dict(model, options=FULL).items()}


def worker(rank: int, ranks: int, folder: str) -> None:
    """One of the processes; each writes what it saw to `folder`."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=ranks)
    results = {
        (kind, restart): train(kind, rank, ranks, restart=restart) for kind in ("ddp", "fsdp") for restart in (None, 3)
    }
    torch.save(results, Path(folder) / f"{rank}.pt")
    dist.destroy_process_group()
