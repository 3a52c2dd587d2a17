r"""Three forms of an indexer's scores, learning alike from one dense model: how well each finds what attention reads.

    python -m experiments.indexers experiments/runs/dense --device cuda

In every layer of the model, which stays as it is, an indexer of each form learns from the attention of that layer
(Eq. 15, τ in the student's softmax, over all visible positions), all from the same text in the same order:

    relu            I = Σ_j w_j ReLU(scale q_j·k)              DeepSeek's lightning indexer; w linear in h
    sigmoid         I = Σ_j σ(scale q_j·k + b_j)
    gated_sigmoid   I = Σ_j σ(w_j) σ(scale q_j·k + b_j)        Eq. 7

Every form gets a search of the same size over τ and the learning rate; what is best on one half of the validation
windows is reported on the other half.
"""

import argparse
import itertools
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int64
from safetensors import SafetensorError
from torch import Tensor, nn
from tqdm import tqdm

from experiments import checkpoint, runner, study, text, train
from experiments.measure import attention, members
from experiments.settings import Settings
from gsa_ref import GSAConfig, LanguageModel, apply_rope, indexer_scores, select_tokens
from gsa_ref.indexer import LightningIndexer
from gsa_ref.model import INIT_STD

RESULTS = runner.RESULTS / "indexers.json"
# Scores of sigmoids lie in (0, H_I): they need a small τ to be able to say much. Those of ReLU have no bound.
TAU = {"relu": (0.1, 1.0, 3.0), "sigmoid": (0.1, 0.3, 1.0), "gated_sigmoid": (0.1, 0.3, 1.0)}
RATES = (1e-3, 3e-3)
SHARE = 8  # the budget is an eighth of the context
# The model of --smoke, if there is no other.
SMOKE = "--variant dense --d 32 --d-ff 64 --H 2 --H-kv 1 --d-h 16 --context 64 --steps 20 --eval-windows 4"


@dataclass(frozen=True)
class Plan:
    """What every form gets."""

    context: int = 512
    batch: int = 8
    steps: int = 300
    seeds: tuple[int, ...] = (0, 1)
    rates: tuple[float, ...] = RATES
    windows: int = 32  # half to choose by, half to report
    H_I: int = 4
    d_I: int = 64
    device: str = "cpu"


@dataclass
class Student:
    """An indexer that learns, with its optimiser."""

    form: str
    tau: float
    lr: float
    seed: int
    layer: int
    indexer: LightningIndexer
    optimizer: torch.optim.Optimizer = field(init=False)

    def __post_init__(self) -> None:
        self.optimizer = torch.optim.AdamW(self.indexer.parameters(), lr=self.lr, betas=(0.9, 0.95), weight_decay=0.0)


def main(argv: list[str] | None = None) -> int:
    """Run the command line; returns the exit status. Bad usage ends with status 2."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, nargs="?", help="folder of a run with dense attention")
    for name in ("context", "batch", "steps", "windows"):
        default = getattr(Plan, name)
        parser.add_argument(f"--{name}", type=int, default=default, help=f"default {default}")
    parser.add_argument("--seeds", default="0,1", help="of weights and text, with commas (default 0,1)")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--json", type=Path, default=RESULTS, help="file of the record")
    parser.add_argument("--smoke", action="store_true", help="a few seconds on a CPU, with a model trained on the spot")
    o = parser.parse_args(argv)
    plan = Plan(o.context, o.batch, o.steps, tuple(map(int, o.seeds.split(","))), windows=o.windows, device=o.device)
    try:
        with tempfile.TemporaryDirectory() as scratch:
            if o.smoke:
                plan = replace(plan, context=64, batch=2, steps=4, windows=4, rates=RATES[:1], H_I=2, d_I=16)
                if o.run is None:
                    o.run = Path(scratch)
                    train.train(study.parse(f"{SMOKE} --device {o.device}", o.run), o.run)
            if o.run is None:
                parser.error("run: expected a folder (or --smoke), got none")
            runner.write(o.json, compare(o.run, plan))
    except (TypeError, ValueError, OSError, SafetensorError) as error:
        parser.error(str(error))
    return 0


def scores(form: str, indexer: LightningIndexer, h: Float[Tensor, "B L d"]) -> Float[Tensor, "B L L"]:
    """I of one form, −∞ where a query may not look. All forms share q, k (with RoPE), and the scale 1/√d_I.

    Raises:
        ValueError: there is no such form.
    """
    q, k, w = indexer(h)  # [B, L, H_I, d_I], [B, L, d_I], [B, L, H_I]
    scale = indexer.config.effective_indexer_scale
    if form == "gated_sigmoid":
        return indexer_scores(q, k, w, indexer.bias, scale=scale)
    past = torch.ones(h.shape[1], h.shape[1], dtype=torch.bool, device=h.device).tril()
    found = torch.zeros(*h.shape[:2], h.shape[1], dtype=h.dtype, device=h.device)
    for j in range(indexer.config.H_I):
        z = scale * (q[:, :, j] @ k.mT)  # [B, L, L]
        if form == "relu":
            found = found + w[:, :, j, None] * torch.relu(z)
        elif form == "sigmoid":
            found = found + torch.sigmoid(z + indexer.bias[j])
        else:
            raise ValueError(f"form: expected one of {', '.join(TAU)}, got {form!r}")
    return found.masked_fill(~past, -torch.inf)


def kl(
    scores: Float[Tensor, "B L L"], p: Float[Tensor, "B L L"], tau: float, entropy: Float[Tensor, ""]
) -> Float[Tensor, ""]:
    """Mean over the rows of KL(p ‖ softmax(I / τ)), given the mean of Σ p ln p, as `gsa_ref.indexer_kl_loss` has it."""
    log_student = (scores / tau).log_softmax(-1)
    return entropy - (p * log_student.masked_fill(p == 0, 0)).sum(-1).mean()  # 0 · −∞ is NaN


@torch.no_grad()
def teach(model: LanguageModel, tokens: Int64[Tensor, "B L"]) -> list[tuple[Tensor, Tensor]]:
    """For each layer its input h, [B, L, d], and the attention over it, mean over the heads, [B, L, L]."""
    inputs: list[Tensor] = []
    hooks = [
        block.attention.register_forward_pre_hook(lambda _, args: inputs.append(args[0]))  # type: ignore[union-attr]
        for block in model.blocks
    ]
    model(tokens)
    for hook in hooks:
        hook.remove()
    found = []
    for block, h in zip(model.blocks, inputs, strict=True):
        layer: Any = block.attention
        c = layer.config
        q = apply_rope(layer.W_q(h).unflatten(-1, (c.H, c.d_h)), theta=c.rope_theta)
        k = apply_rope(layer.W_k(h).unflatten(-1, (c.H_kv, c.d_h)), theta=c.rope_theta)
        past = torch.ones(h.shape[1], h.shape[1], dtype=torch.bool, device=h.device).tril()
        found.append((h, attention(q, k, past.expand(len(h), -1, -1)).mean(2)))
    return found


def find(scores: Float[Tensor, "B L L"], p: Float[Tensor, "B L L"], k: int) -> tuple[float, float]:
    """Recall of the k positions with most attention, and the attention on the selected k over that on the best k.

    Means over the rows that see more than k positions; the second is a ratio of two means.
    """
    budget = torch.full(p.shape[:2], k, dtype=torch.int32, device=p.device)
    past = torch.ones_like(p, dtype=torch.bool).tril()
    chosen, best = (members(select_tokens(x.masked_fill(~past, -torch.inf), budget), p.shape[-1]) for x in (scores, p))
    chosen, best, p = chosen[:, k:], best[:, k:], p[:, k:]
    return float((chosen & best).sum(-1).double().mean() / k), float((p * chosen).sum() / (p * best).sum())


def compare(folder: Path, plan: Plan) -> list[dict[str, Any]]:
    """Train an indexer of each form, τ, rate and seed for each layer of a run, and return the records, one a form.

    Raises:
        OSError: there is no such run.
        ValueError: it has an indexer of its own, or the text of this machine is too short.
    """
    settings, facts = checkpoint.read_run(folder)
    settings = replace(settings, device=plan.device, impl="reference", dtype="float32", init=None)
    if settings.model_config().attention.sparse:
        raise ValueError(f"run: expected one of a variant with dense attention, got {settings.variant}")
    source = text.read(settings.text)
    model = settings.build_model().eval()
    checkpoint.load_weights(folder, model)
    model.requires_grad_(False)
    students: list[Student] = []
    with train.deterministic(plan.device == "cpu"):
        for seed in plan.seeds:
            students += learn(model, source, plan, seed)
    half = plan.windows // 2
    held_out = text.windows(source.validation, plan.windows, plan.context)[:, :-1].to(plan.device)
    tuned, reported = (measure(model, students, w, plan) for w in (held_out[:half], held_out[half:]))
    milliseconds = {form: cost(form, teach(model, held_out[: plan.batch])[0], plan) for form in TAU}
    common = {
        "suite": "indexers",
        "command": f"python -m experiments.indexers experiments/runs/{folder.name} --context {plan.context} --batch "
        f"{plan.batch} --steps {plan.steps} --windows {plan.windows} --seeds {','.join(map(str, plan.seeds))} "
        f"--device {plan.device}",
        "plan": {**vars(plan), "k": plan.context // SHARE},
        "teacher": {"settings": {n: v for n, v in vars(settings).items() if n not in ("init", "text")}, **facts},
        "text": {"name": source.name, "sha256": source.sha256},
        "python": platform.python_version(),
        "torch": torch.__version__,
        "device": train.device_name(settings),
        "commit": train.commit(),
    }
    return [
        {**common, "form": form, **summary(form, students, tuned, reported, plan), "milliseconds": milliseconds[form]}
        for form in TAU
    ]


def learn(model: LanguageModel, source: text.Text, plan: Plan, seed: int) -> list[Student]:
    """Indexers of every form, τ and rate for every layer, trained at once on the same windows; all begin alike."""
    c = model.config.attention
    config = GSAConfig(d=c.d, H_I=plan.H_I, d_I=plan.d_I, indexer_rope=True, rope_theta=c.rope_theta)
    students = [
        Student(form, tau, lr, seed, layer, new_indexer(config, seed, plan.device))
        for layer in range(model.config.n_layers)
        for form in TAU
        for tau, lr in itertools.product(TAU[form], plan.rates)
    ]
    schedule = Settings(steps=plan.steps, lr_warm_up=min(20, plan.steps // 2))
    generator = torch.Generator().manual_seed(seed)
    for step in tqdm(range(plan.steps), desc=f"{len(students)} indexers, seed {seed}", unit="step", disable=None):
        tokens = text.draw(source.train, plan.batch, plan.context, generator)[:, :-1].to(plan.device)
        lessons = teach(model, tokens)
        entropies = [torch.xlogy(p, p).sum(-1).mean() for _, p in lessons]
        rate = train.learning_rate(step, schedule) / schedule.lr
        for student in students:
            for group in student.optimizer.param_groups:
                group["lr"] = student.lr * rate
            h, p = lessons[student.layer]
            kl(scores(student.form, student.indexer, h), p, student.tau, entropies[student.layer]).backward()
            student.optimizer.step()
            student.optimizer.zero_grad()
    return students


def new_indexer(config: GSAConfig, seed: int, device: str) -> LightningIndexer:
    """An indexer with the initial weights of `LanguageModel`, that the seed determines."""
    torch.manual_seed(seed)
    indexer = LightningIndexer(config)
    for parameter in indexer.parameters():
        if parameter.dim() == 2:
            nn.init.normal_(parameter, std=INIT_STD)
    return indexer.to(device)


@torch.no_grad()
def measure(
    model: LanguageModel, students: list[Student], windows: Int64[Tensor, "N L"], plan: Plan
) -> list[dict[str, float]]:
    """For each student, on windows of text: the loss, and recall and captured_ratio of `find`. Means over batches."""
    found: list[list[tuple[float, float, float]]] = [[] for _ in students]
    for tokens in windows.split(plan.batch):
        lessons = teach(model, tokens)
        for results, student in zip(found, students, strict=True):
            h, p = lessons[student.layer]
            I = scores(student.form, student.indexer, h)  # noqa: E741
            loss = float(kl(I, p, student.tau, torch.xlogy(p, p).sum(-1).mean()))
            results.append((loss, *find(I, p, plan.context // SHARE)))
    names = ("kl", "recall", "captured_ratio")
    return [dict(zip(names, map(statistics.fmean, zip(*results, strict=True)), strict=True)) for results in found]


def summary(
    form: str, students: list[Student], tuned: list[dict[str, float]], reported: list[dict[str, float]], plan: Plan
) -> dict[str, Any]:
    """The search of one form, and what its best τ and rate (by captured_ratio where it was tuned) gives where not."""

    def mean(values: list[dict[str, float]], name: str, **wanted: Any) -> float:
        chosen = [
            value[name]
            for value, student in zip(values, students, strict=True)
            if all(getattr(student, key) == value for key, value in wanted.items())
        ]
        return round(statistics.fmean(chosen), 4)

    search = [
        {"tau": tau, "lr": lr, "captured_ratio": mean(tuned, "captured_ratio", form=form, tau=tau, lr=lr)}
        for tau, lr in itertools.product(TAU[form], plan.rates)
    ]
    best = max(search, key=lambda line: line["captured_ratio"])
    its = {"form": form, "tau": best["tau"], "lr": best["lr"]}
    layers = sorted({student.layer for student in students})
    found: dict[str, Any] = {"search": search, "tau": best["tau"], "lr": best["lr"]}
    for name in ("kl", "recall", "captured_ratio"):
        found[name] = mean(reported, name, **its)
        found[f"{name}_by_layer"] = [mean(reported, name, **its, layer=layer) for layer in layers]
        found[f"{name}_by_seed"] = [mean(reported, name, **its, seed=seed) for seed in plan.seeds]
    return found


def cost(form: str, lesson: tuple[Tensor, Tensor], plan: Plan) -> dict[str, float]:
    """Milliseconds of a training step of one indexer, and of its scores alone, both in plain PyTorch: median of 20."""
    h, p = lesson
    config = GSAConfig(d=h.shape[-1], H_I=plan.H_I, d_I=plan.d_I, indexer_rope=True)
    student = Student(form, 1.0, 1e-3, 0, 0, new_indexer(config, 0, plan.device))
    entropy = torch.xlogy(p, p).sum(-1).mean()

    def step() -> None:
        kl(scores(form, student.indexer, h), p, student.tau, entropy).backward()
        student.optimizer.step()
        student.optimizer.zero_grad()

    def forward() -> None:
        with torch.no_grad():
            scores(form, student.indexer, h)

    return {"step": median(step, plan.device), "scores": median(forward, plan.device)}


def median(function: Callable[[], None], device: str) -> float:
    def wait() -> None:
        if device == "cuda":
            torch.cuda.synchronize()

    times = []
    for _ in range(23):
        wait()
        began = time.perf_counter()
        function()
        wait()
        times.append(1000 * (time.perf_counter() - began))
    return round(statistics.median(times[3:]), 3)  # the first ones load kernels


if __name__ == "__main__":
    sys.exit(main())
