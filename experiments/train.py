r"""Train a small language model over bytes in one of the paper's four variants.

    python -m experiments.train --out experiments/runs/dense --variant dense --steps 1000
    python -m experiments.train --out experiments/runs/warm --variant sparse --init experiments/runs/dense \
        --phase warm_up
    python -m experiments.train --out experiments/runs/sparse --variant sparse --init experiments/runs/warm

The same command with --resume goes on from the last checkpoint. README.md, beside this file, describes the log.
"""

import argparse
import json
import math
import platform
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from tqdm import tqdm

from experiments import checkpoint, text
from experiments.measure import measure, validation_loss
from experiments.settings import Settings, add_options
from gsa_ref import LanguageModel


def main(argv: list[str] | None = None) -> int:
    """Run the command line; returns the exit status: 1 for a loss that is not finite. Bad usage ends with status 2."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder of the run")
    parser.add_argument("--resume", action="store_true", help="go on with the run in --out, which has these settings")
    add_options(parser)
    options = vars(parser.parse_args(argv))
    out, resume = options.pop("out"), options.pop("resume")
    try:
        train(Settings(**options), out, resume=resume)
    except (TypeError, ValueError, OSError, SafetensorError) as error:
        parser.error(str(error))
    except FloatingPointError as error:
        print(error, file=sys.stderr)
        return 1
    return 0


def train(settings: Settings, out: Path, *, resume: bool = False) -> LanguageModel:
    """Train as the settings say; the folder `out` gets the run. Returns the trained model.

    Raises:
        OSError: the text, the run of `init` or the run to resume cannot be read.
        ValueError: `out` holds a checkpoint already, or to resume one of another run; the text is too short; or `init`
            does not fit.
        FloatingPointError: the loss is not finite.
    """
    s = settings
    source = text.read(s.text)
    print(f"text: {source.name}, SHA-256 {source.sha256}; Python {platform.python_version()}", file=sys.stderr)
    facts = {
        "text": {"name": source.name, "sha256": source.sha256, "train_tokens": len(source.train)},
        "python": platform.python_version(),
        "torch": torch.__version__,
        "device": device_name(s),
        "commit": commit(),
    }
    if len(source.train) <= s.context:
        raise ValueError(f"text: expected more than context = {s.context} tokens to train on, got {len(source.train)}")
    held_out = text.windows(source.validation, s.eval_windows, s.context).to(s.device)
    model = s.build_model().train()
    optimizer, indexers, others = build_optimizer(model, s)
    generator = torch.Generator().manual_seed(s.seed)
    if resume:
        first = resume_run(out, s, facts, model, optimizer, generator)
    else:
        if (out / checkpoint.TENSORS).exists():
            raise ValueError(f"out: expected a folder without a checkpoint (or --resume), got {out}")
        if s.init is not None and (new := checkpoint.load_weights(Path(s.init), model)):
            print(f"not in {s.init}, so as initialised: {', '.join(new)}", file=sys.stderr)
        out.mkdir(parents=True, exist_ok=True)
        checkpoint.write_run(out, s, facts)
        (out / checkpoint.LOG).write_text("")
        first = 0

    def evaluate() -> dict[str, float]:
        with autocast(s):
            loss = validation_loss(model, held_out, s.batch)
        return {"validation_loss": loss, **measure(model, held_out[: s.measure_windows])}

    with deterministic(s.device == "cpu"), (out / checkpoint.LOG).open("a", encoding="utf-8") as log:

        def write(line: dict[str, float]) -> None:
            log.write(json.dumps(line, allow_nan=False) + "\n")
            log.flush()

        if first == 0:
            write({"step": 0, "tokens": 0, **evaluate()})
        bar = tqdm(range(first, s.steps), initial=first, total=s.steps, unit="step", disable=None)
        for step in bar:
            rate = learning_rate(step, s)
            for group in optimizer.param_groups:
                group["lr"] = rate
            losses = torch.zeros(2)  # of the bytes, of the indexers
            for _ in range(s.accumulate):
                tokens = text.draw(source.train, s.batch, s.context, generator).to(s.device)
                losses += backward(model, tokens, s) / s.accumulate
            norms = [float(nn.utils.clip_grad_norm_(group, s.clip)) for group in (others, indexers)]
            if not all(map(math.isfinite, (*losses.tolist(), *norms))):
                raise FloatingPointError(f"step {step + 1}: the loss or its gradient is not finite: {losses.tolist()}")
            optimizer.step()
            optimizer.zero_grad()
            model.update_mean_variance()
            done = step + 1
            line = {"step": done, "tokens": done * s.accumulate * s.batch * s.context, "lr": rate}
            line |= {"loss": float(losses[0]), "grad_norm": norms[0]}
            if indexers:
                line |= {"indexer_kl": float(losses[1]) / s.n_layers, "indexer_grad_norm": norms[1]}
            if done % s.eval_every == 0 or done == s.steps:
                line |= evaluate()
            write(line)
            bar.set_postfix(loss=f"{line['loss']:.3f}")
            if done % s.checkpoint_every == 0 or done == s.steps:
                checkpoint.save(out, model, optimizer, generator, done)
    return model


def backward(model: LanguageModel, tokens: Tensor, s: Settings) -> Tensor:
    """Add the gradients of one micro-batch, over `accumulate`. Returns its loss and its indexers' loss."""
    with autocast(s):
        output = model(tokens[:, :-1])
        loss = cross_entropy(output.logits.float().flatten(0, 1), tokens[:, 1:].flatten())
    kl = loss.new_zeros(()) if output.indexer_loss is None else output.indexer_loss
    ((loss + kl) / s.accumulate).backward()
    return torch.stack((loss.detach(), kl.detach())).cpu()


def build_optimizer(
    model: LanguageModel, s: Settings
) -> tuple[torch.optim.Optimizer, list[nn.Parameter], list[nn.Parameter]]:
    """AdamW, weight decay on matrices only; and the parameters of the indexers and all others, which share no loss."""
    named = dict(model.named_parameters())
    indexers = [p for name, p in named.items() if ".indexer." in name]
    others = [p for name, p in named.items() if ".indexer." not in name]
    matrices = [p for p in named.values() if p.dim() == 2]
    vectors = [p for p in named.values() if p.dim() != 2]
    groups: list[dict[str, Any]] = [
        {"params": matrices, "weight_decay": s.weight_decay},
        {"params": vectors, "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=s.lr, betas=(0.9, 0.95)), indexers, others


def learning_rate(step: int, s: Settings) -> float:
    """Rises linearly over lr_warm_up steps, then falls as a cosine to a tenth at the last step."""
    if step < s.lr_warm_up:
        return s.lr * (step + 1) / s.lr_warm_up
    progress = (step - s.lr_warm_up) / max(s.steps - s.lr_warm_up, 1)
    return s.lr * (0.1 + 0.9 * (1 + math.cos(math.pi * progress)) / 2)


def resume_run(
    out: Path,
    s: Settings,
    facts: dict[str, Any],
    model: LanguageModel,
    optimizer: torch.optim.Optimizer,
    generator: torch.Generator,
) -> int:
    """Restore the last checkpoint, forget what the log says after it, and return its step."""
    stored, stored_facts = checkpoint.read_run(out)
    for name, value in vars(s).items():
        if value != getattr(stored, name):
            raise ValueError(f"{name}: expected {getattr(stored, name)} as in the run to resume, got {value}")
    if stored_facts["text"] != facts["text"]:
        raise ValueError(
            f"text: expected SHA-256 {stored_facts['text']['sha256']} as in the run to resume, "
            f"got {facts['text']['sha256']}"
        )
    step = checkpoint.resume(out, model, optimizer, generator)
    log = out / checkpoint.LOG
    kept = [line for line in log.read_text(encoding="utf-8").splitlines(keepends=True) if line.endswith("\n")]
    log.write_text("".join(line for line in kept if json.loads(line)["step"] <= step), encoding="utf-8")
    return step


def device_name(s: Settings) -> str:
    """The GPU, or the kind of CPU and its number of threads."""
    if s.device == "cuda":
        return torch.cuda.get_device_name()
    return f"CPU ({platform.machine()}, {torch.backends.cpu.get_cpu_capability()}), threads: {torch.get_num_threads()}"


def commit() -> str | None:
    """The commit of the checkout that this file lies in, or None if Python files were changed, or without Git."""

    def git(*arguments: str) -> str:
        return subprocess.run(
            ["git", *arguments], cwd=Path(__file__).parent, capture_output=True, text=True, check=True
        ).stdout.strip()

    try:
        return None if git("status", "--porcelain", "--", ":/*.py") else git("rev-parse", "HEAD")
    except (OSError, subprocess.CalledProcessError):
        return None


def autocast(s: Settings) -> torch.autocast:
    return torch.autocast(s.device, torch.bfloat16, enabled=s.dtype == "bfloat16")


@contextmanager
def deterministic(enabled: bool) -> Iterator[None]:
    """PyTorch's deterministic algorithms: without them, threads of a CPU add gradients up in any order."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(enabled or before)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before)


if __name__ == "__main__":
    sys.exit(main())
