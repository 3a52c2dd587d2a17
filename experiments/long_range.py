r"""Train short, test long: the four variants on the tasks of tasks.py, up to 8 times the length that they learnt on.

    python -m experiments.long_range --task needle --device cuda --impl fast --dtype bfloat16
    python -m experiments.long_range --task recall --variants dense,gsa --seeds 0,1 --json recall.json
    python -m experiments.long_range --merge needle.json recall.json

A run that the record holds already is not trained again, so a command that was cut off goes on where it was.
"""

import argparse
import math
import platform
import sys
import time
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Bool
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from tqdm import tqdm

from experiments import runner, text, train
from experiments.measure import members
from experiments.settings import DTYPES, IMPLS, Settings
from experiments.tasks import TASKS, Sequences, Task, generate
from gsa_ref import LanguageModel, indexed_selection
from gsa_ref.config import VARIANTS

RESULTS = runner.RESULTS / "long_range.json"
DENSE = 0.7  # share of the steps in which variants with an indexer attend densely
FACTORS = (1, 2, 4, 8)  # test lengths, over the training length
QUINTILES = 5
Z95 = 1.959964  # of the normal distribution, for 95 %

# Of both tasks the budget is an eighth of the training length at every test length: at 8 times it, one token in 64.
SIZES: dict[str, Any] = {
    "d": 256, "n_layers": 4, "d_ff": 688, "H": 4, "H_kv": 2, "d_h": 64, "H_I": 4, "d_I": 64, "indexer_rope": True,
    "rule": "fixed", "k_base": 64, "k_min": 64, "k_max": 64, "kl_temperature": 0.1,
    "context": 512, "batch": 64, "steps": 1500, "lr": 2e-3, "lr_warm_up": 50,
}  # fmt: skip
# Which value belongs to which key is found late, after thousands of steps in which the loss hardly moves. So recall has
# many steps, and that they cost little, a small model and few tokens at a step.
RECALL: dict[str, Any] = {
    "d": 64, "n_layers": 2, "d_ff": 128, "H": 2, "H_kv": 2, "d_h": 32, "d_I": 32,
    "k_base": 8, "k_min": 8, "k_max": 8, "context": 64, "batch": 32, "steps": 12000,
}  # fmt: skip
TASK_SIZES = {"needle": SIZES, "recall": SIZES | RECALL}
# Until which share of the steps the context is divided by what: on short sequences the task is found sooner.
SHORT = {"needle": ((0.3, 8), (0.45, 4), (0.6, 2)), "recall": ((0.6, 2),)}
SMOKE: dict[str, Any] = {
    "d": 32, "n_layers": 2, "d_ff": 64, "H": 2, "H_kv": 1, "d_h": 16, "H_I": 2, "d_I": 16,
    "k_base": 16, "k_min": 16, "k_max": 16, "context": 128, "batch": 2, "steps": 6, "lr_warm_up": 2,
}  # fmt: skip
SEQUENCES = 500  # that a test counts over
TOKENS = 32768  # of a batch in a test


def main(argv: list[str] | None = None) -> int:
    """Run the command line; returns the exit status. Bad usage ends with status 2."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--task", choices=tuple(TASKS), help="default: each in turn")
    parser.add_argument("--variants", default=",".join(VARIANTS), help="of the paper, with commas (default: all four)")
    parser.add_argument("--seeds", default="0,1", help="of weights and sequences, with commas (default 0,1)")
    parser.add_argument(
        "--steps", type=int, help=f"optimiser steps (default {SIZES['steps']}, of recall {RECALL['steps']})"
    )
    parser.add_argument("--lr", type=float, help=f"highest learning rate (default {SIZES['lr']})")
    parser.add_argument("--sequences", type=int, default=SEQUENCES, help=f"of a test (default {SEQUENCES})")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--impl", choices=IMPLS, default="reference", help="gsa_ref or the kernels of gsa_fast")
    parser.add_argument("--dtype", choices=DTYPES, default="float32")
    parser.add_argument("--json", type=Path, default=RESULTS, help="file of the records; one for each process")
    parser.add_argument("--merge", type=Path, nargs="+", metavar="FILE", help="only add the records of files to --json")
    parser.add_argument("--smoke", action="store_true", help="a model and tests of a few seconds, to see that it runs")
    o = parser.parse_args(argv)
    if o.merge:
        runner.write(o.json, merge([o.json, *o.merge]))
        return 0
    chosen: dict[str, Any] = {"device": o.device, "impl": o.impl, "dtype": o.dtype}
    chosen |= {name: value for name in ("steps", "lr") if (value := getattr(o, name)) is not None}
    count = 4 if o.smoke else o.sequences
    try:
        source = text.read(None)
        for task in [TASKS[o.task]] if o.task else TASKS.values():
            sizes = TASK_SIZES[task.name] | (SMOKE if o.smoke else {}) | chosen
            for variant in o.variants.split(","):
                for seed in map(int, o.seeds.split(",")):
                    settings = Settings(variant=variant, seed=seed, **sizes)
                    records = merge([o.json])
                    if not finished(records, task, settings):
                        found = run(task, settings, source, count)
                        runner.write(o.json, [*records, found])
    except (TypeError, ValueError, OSError) as error:
        parser.error(str(error))
    except FloatingPointError as error:
        print(error, file=sys.stderr)
        return 1
    return 0


def key(record: dict[str, Any]) -> tuple[str, str, int]:
    """What there is one record of."""
    return record["task"], record["settings"]["variant"], record["settings"]["seed"]


def merge(paths: list[Path]) -> list[dict[str, Any]]:
    """The records of all files that exist, ordered; of two for one task, variant and seed, the last one read."""
    found = [record for path in paths for record in runner.read(path)]
    unique = {key(record): record for record in found}
    return [unique[name] for name in sorted(unique)]


def finished(records: list[dict[str, Any]], task: Task, settings: Settings) -> bool:
    """Whether there is a record of this run.

    Raises:
        ValueError: there is one of a run with other settings.
    """
    for record in records:
        if key(record) == (task.name, settings.variant, settings.seed):
            if record["settings"] != vars(settings):
                raise ValueError(f"record of {key(record)}: expected these settings, got other ones; delete it")
            return True
    return False


def run(task: Task, settings: Settings, source: text.Text, count: int) -> dict[str, Any]:
    """Train a model, test it at every length, and return the record.

    Raises:
        FloatingPointError: the loss is not finite.
    """
    began = time.perf_counter()
    with train.deterministic(settings.device == "cpu"):
        model, log = learn(task, settings, source)
    trained = time.perf_counter()
    tests = [evaluate(task, model, settings, source, settings.context * f, count) for f in FACTORS]
    return {
        "suite": "long_range",
        "task": task.name,
        "command": f"python -m experiments.long_range --task {task.name} --variants {settings.variant} --seeds "
        f"{settings.seed} --steps {settings.steps} --lr {settings.lr} --device {settings.device} --impl "
        f"{settings.impl} --dtype {settings.dtype} --sequences {count}",
        "settings": vars(settings),
        "dense_steps": dense_steps(settings),
        "text": {"name": source.name, "sha256": source.sha256},
        "python": platform.python_version(),
        "torch": torch.__version__,
        "device": train.device_name(settings),
        "commit": train.commit(),
        "seconds": {"training": round(trained - began, 1), "tests": round(time.perf_counter() - trained, 1)},
        "log": log,
        "tests": tests,
    }


def dense_steps(s: Settings) -> int:
    """Steps at the beginning in which attention is dense in variants with an indexer too, which learns beside it."""
    return round(DENSE * s.steps) if VARIANTS[s.variant]["sparse"] else s.steps


def length(task: Task, step: int, s: Settings) -> int:
    """Tokens of a sequence at a step: short ones first (`SHORT`), then `context`."""
    return next((s.context // divisor for until, divisor in SHORT[task.name] if step < until * s.steps), s.context)


def learn(task: Task, s: Settings, source: text.Text) -> tuple[LanguageModel, list[dict[str, float]]]:
    """A model trained as the settings say; and its log, a line for each tenth of the steps, with means over them.

    The loss is the cross-entropy of the answers alone. All steps have as many tokens; `length` says how long their
    sequences are. A model with an indexer attends densely at first while its indexer learns from all of that attention,
    then sparsely: an indexer that knows nothing would hide the answers.
    """
    model = s.build_model().train()
    optimizer, indexers, others = train.build_optimizer(model, s)
    generator = torch.Generator().manual_seed(s.seed)
    log: list[dict[str, float]] = []
    sums, since = torch.zeros(3, device=s.device), 0
    for step in tqdm(range(s.steps), desc=f"{task.name} {s.variant} {s.seed}", unit="step", disable=None):
        if VARIANTS[s.variant]["sparse"] and step in (0, dense_steps(s)):
            model.set_phase("sparse" if step else "warm_up")
            model.requires_grad_(True)  # unlike the warm-up of a trained model, here all learns in both phases
        for group in optimizer.param_groups:
            group["lr"] = train.learning_rate(step, s)
        L = length(task, step, s)
        batch = generate(task, source.train, s.batch * s.context // L, L, generator)
        tokens, mask = batch.tokens.to(s.device), batch.mask.to(s.device)
        with train.autocast(s):
            output = model(tokens[:, :-1])
            targets = tokens[:, 1:].masked_fill(~mask, -100)  # cross_entropy's ignore_index
            logits = output.logits.float()
            loss = cross_entropy(logits.flatten(0, 1), targets.flatten())
        kl = loss.new_zeros(()) if output.indexer_loss is None else output.indexer_loss
        (loss + kl).backward()
        for parameters in (others, indexers):
            nn.utils.clip_grad_norm_(parameters, s.clip)
        optimizer.step()
        optimizer.zero_grad()
        model.update_mean_variance()
        right = ((logits.argmax(-1) == targets) & mask).sum() / mask.sum()
        sums, since = sums + torch.stack((loss.detach(), kl.detach(), right)), since + 1
        if step + 1 == s.steps or (step + 1) % max(s.steps // 10, 1) == 0:  # the only wait for the device
            line = dict(zip(("loss", "indexer_kl", "accuracy"), (sums / since).tolist(), strict=True))
            if not all(map(math.isfinite, line.values())):
                raise FloatingPointError(f"step {step + 1}: the loss is not finite: {line}")
            line["indexer_kl"] /= s.n_layers
            if not indexers:
                del line["indexer_kl"]
            log.append({"step": step + 1, **{name: round(value, 4) for name, value in line.items()}})
            tqdm.write(f"{task.name} {s.variant} {s.seed}: {log[-1]}", file=sys.stderr)
            sums, since = torch.zeros_like(sums), 0
    return model, log


@torch.no_grad()
def evaluate(task: Task, model: LanguageModel, s: Settings, source: text.Text, L: int, count: int) -> dict[str, Any]:
    """The test at one length, on sequences that every variant gets, with text that none was trained on.

    A question counts as answered if all tokens of its value are the likeliest ones after their predecessors.

    Returns:
        length, sequences, questions; accuracy with low and high, the Wilson interval of 95 %; depths, the same by fifth
        of the body that the value lies in, from its beginning; and for variants with an indexer `selected`, by layer:
        the share of the answers' tokens for which the position in the body that holds it is among those selected by
        the query that has to find it; `selected_anywhere`, in one layer at least.

        The intervals take the questions of one sequence for one trial, as they are not independent of one another.
    """
    generator = torch.Generator().manual_seed(2**20 + L)
    right, depth, hits = [], [], []
    model.eval()
    per_batch = max(TOKENS // L, 1)
    for first in range(0, count, per_batch):
        batch = generate(task, source.validation, min(per_batch, count - first), L, generator)
        found, selected = answer(model, batch, s)
        right.append(found)
        depth.append((batch.sources[..., 0] - 1) * QUINTILES // (batch.body - 1))
        hits.append(selected)
    correct, fifth = torch.cat(right), torch.cat(depth)
    depths = []
    for i in range(QUINTILES):
        inside = fifth == i
        depths.append(share(correct[inside], int(inside.any(-1).sum())))
    result: dict[str, Any] = {"length": L, "sequences": count, "questions": correct.numel()}
    result |= {**share(correct, count), "depths": depths}
    if model.config.attention.sparse:
        over_layers = torch.cat(hits, 1)  # [layers, count, n, m]
        result["selected"] = [round(x, 4) for x in over_layers.double().mean((1, 2, 3)).tolist()]
        result["selected_anywhere"] = round(float(over_layers.any(0).double().mean()), 4)
    return result


def answer(
    model: LanguageModel, batch: Sequences, s: Settings
) -> tuple[Bool[Tensor, "B n"], Bool[Tensor, "layers B n m"]]:
    """Which questions a model in eval mode answers, and which sources its layers select. On the CPU."""
    inputs: list[Tensor] = []
    hooks = [
        block.attention.register_forward_pre_hook(lambda _, args: inputs.append(args[0]))  # type: ignore[union-attr]
        for block in model.blocks
    ]
    tokens = batch.tokens.to(s.device)
    hits = []
    try:
        with train.autocast(s):
            likeliest = model(tokens[:, :-1]).logits.argmax(-1).cpu()
            for block, h in zip(model.blocks, inputs, strict=True):
                if model.config.attention.sparse:
                    hits.append(selects(block.attention, h, batch))
    finally:
        for hook in hooks:
            hook.remove()
    flat = batch.answers.flatten(1)
    correct = likeliest.gather(1, flat) == batch.tokens[:, 1:].gather(1, flat)
    nothing = torch.zeros(0, *batch.answers.shape, dtype=torch.bool)
    return correct.unflatten(1, batch.answers.shape[1:]).all(-1), torch.stack(hits) if hits else nothing


def selects(layer: Any, h: Tensor, batch: Sequences) -> Bool[Tensor, "B n m"]:
    """Whether the queries that predict the answers select the positions that hold them."""
    q_idx, k_idx, head_logits = layer.indexer(h)
    rows = slice(batch.body, None)  # the questions stand last: no other row is needed
    selection, _ = indexed_selection(
        q_idx[:, rows], k_idx, head_logits[:, rows], layer.indexer.bias,
        mean_variance=layer.mean_variance, config=layer.config, start=batch.body,
    )  # fmt: skip
    chosen = members(selection, k_idx.shape[1]).cpu()  # [B, rows, S]
    sequence = torch.arange(len(h))[:, None, None]
    return chosen[sequence, batch.answers - batch.body, batch.sources]


def share(correct: Bool[Tensor, "..."], trials: int) -> dict[str, float]:
    """The share of True and its interval; nothing of nothing."""
    if not correct.numel():
        return {}
    accuracy = float(correct.double().mean())
    low, high = wilson(accuracy, trials)
    return {"accuracy": round(accuracy, 4), "low": round(low, 4), "high": round(high, 4)}


def wilson(p: float, n: int) -> tuple[float, float]:
    """The Wilson score interval of 95 % of a share p of n independent trials."""
    middle = (p + Z95**2 / (2 * n)) / (1 + Z95**2 / n)
    half = Z95 / (1 + Z95**2 / n) * math.sqrt(p * (1 - p) / n + Z95**2 / (4 * n**2))
    return max(middle - half, 0.0), min(middle + half, 1.0)


if __name__ == "__main__":
    sys.exit(main())
