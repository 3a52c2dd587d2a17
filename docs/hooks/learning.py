"""Tables of the training page, from the record file of experiments/study.py: every figure on it comes from here."""

from pathlib import Path

from speed import Record, load, missing, table

TRAINING = "experiments/results/cpu.json"
KERNELS = "experiments/results/h200.json"
DENSE = "dense"
# What goes on from a trained model: what it is compared with, the run, and what sets it apart.
ON = (
    ("dense_on", "sparse_on", "fixed budget"),
    ("dense_on", "sparse_on_proportional", "Eq. 8, proportional"),
    ("dense_on", "sparse_on_inverse", "Eq. 8, inverse"),
    ("dense_on", "sparse_on_blind", "fixed budget, indexer without RoPE"),
    ("gated_on", "gsa_on", "fixed budget, gates"),
)
WARM_UPS = "warm_"
VARIANTS = ("dense_on", "sparse_on", "gated_on", "gsa_on")


def decimals(value: float | None, digits: int = 3) -> str:
    """A number with a fixed number of digits behind the point, a dash for none."""
    return "–" if value is None else f"{value:.{digits}f}"


def runs(root: Path) -> dict[str, Record]:
    """The records, by the names of their runs."""
    return {record["name"]: record for record in load(root, TRAINING)}


def last(record: Record, name: str) -> float | None:
    """A run's last measurement of that name, if it has one."""
    return record["log"][-1].get(name)


def warm_ups(root: Path) -> list[Record]:
    """The warm-ups of the sparse variant."""
    return [record for name, record in runs(root).items() if name.startswith(WARM_UPS)]


def described(settings: Record) -> list[str]:
    """What sets warm-ups apart: RoPE, the scale, the learning rate and τ."""
    scale = settings["indexer_scale"]
    return [
        "yes" if settings["indexer_rope"] else "no",
        "1/√d_I" if scale is None else f"{scale:g}",
        f"{settings['lr']:g}",
        f"{settings['kl_temperature']:g}",
    ]


def training_setup(root: Path) -> str:
    """`{{ training_setup }}`: device, versions and text of the records."""
    found = load(root, TRAINING)
    if not found:
        return missing(TRAINING)
    lines = [f"From `{TRAINING}`, {len(found)} runs:", ""]
    for name in ("device", "torch", "python", "commit"):
        lines.append(f"- {name}: " + ", ".join(f"`{v}`" for v in dict.fromkeys(str(r[name]) for r in found)))
    for field in dict.fromkeys((r["text"]["name"], r["text"]["sha256"], r["text"]["train_tokens"]) for r in found):
        lines.append(f"- text: {field[0]}, SHA-256 `{field[1]}`, {field[2]:,} tokens to train on")
    return "\n".join(lines)


def training_kernels(root: Path) -> str:
    """`{{ training_kernels }}`: how far the losses of the runs on a GPU lie from those of the reference in float32."""
    found = {(r["settings"]["impl"], r["settings"]["dtype"]): r for r in load(root, KERNELS)}
    base = found.get(("reference", "float32"))
    if base is None:
        return missing(KERNELS)
    rows = []
    for (impl, dtype), run in found.items():
        row = ["`gsa_fast`" if impl == "fast" else "reference", dtype, str(run["log"][-1]["step"])]
        for name in ("loss", "indexer_kl"):
            pairs = zip(run["log"], base["log"], strict=False)  # as far as both runs went
            differences = [a[name] - b[name] for a, b in pairs if name in a and name in b]
            rms = (sum(d * d for d in differences) / len(differences)) ** 0.5
            row += ["–"] if run is base else [f"{rms:.4f}"]
        rows.append(row)
    header = ["by", "dtype", "steps", "loss, rms difference", "indexer's loss, rms difference"]
    sizes = ", ".join(f"{n} = {base['settings'][n]}" for n in ("d", "n_layers", "context", "batch", "k_base"))
    where = f"From `{KERNELS}`: {base['device']}, torch {base['torch']}, {sizes}."
    return "\n".join([where, "", table(header, rows, left=2)])


def training_model(root: Path) -> str:
    """`{{ training_model }}`: the sizes that all runs share."""
    found = load(root, TRAINING)
    if not found:
        return missing(TRAINING)
    names = ("d", "n_layers", "d_ff", "H", "H_kv", "d_h", "H_I", "d_I", "context")
    return table(list(names), [[", ".join(dict.fromkeys(str(r["settings"][n]) for r in found)) for n in names]], left=0)


def training_context(root: Path) -> str:
    """`{{ training_context }}`: the longest context of a run."""
    found = load(root, TRAINING)
    return str(max(r["settings"]["context"] for r in found)) if found else missing(TRAINING)


def training_warm_up(root: Path) -> str:
    """`{{ training_warm_up }}`: what the selection captures after each warm-up, beside simpler selections."""
    found = warm_ups(root)
    if not found:
        return missing(TRAINING)
    shares = ("captured", "captured_oracle", "captured_recent", "captured_random")
    rows = [
        [
            *described(r["settings"]),
            *(percent_1(last(r, name)) for name in shares),
            *(
                decimals(last(r, name))
                for name in ("captured_ratio", "captured_ratio_min", "recall", "validation_loss")
            ),
        ]
        for r in found
    ]
    header = [
        "RoPE",
        "scale",
        "lr",
        "τ",
        "selected",
        "oracle",
        "most recent",
        "random",
        "ratio",
        "worst layer",
        "recall",
    ]
    return table([*header, "validation loss"], rows, left=4)


def percent_1(value: float | None) -> str:
    """A share with one digit behind the point."""
    return "–" if value is None else f"{100 * value:.1f}%"


def training_steps(root: Path) -> str:
    """`{{ training_steps }}`: the ratio of captured to capturable attention over the steps of each warm-up."""
    found = warm_ups(root)
    if not found:
        return missing(TRAINING)
    steps = sorted({line["step"] for r in found for line in r["log"]})
    rows = []
    for r in found:
        by_step = {line["step"]: line.get("captured_ratio") for line in r["log"]}
        rows.append([*described(r["settings"]), *(decimals(by_step.get(step)) for step in steps)])
    return table(["RoPE", "scale", "lr", "τ", *(f"step {step}" for step in steps)], rows, left=4)


def training_on(root: Path) -> str:
    """`{{ training_on }}`: the validation loss of sparse training beside that of going on without an indexer."""
    found = runs(root)
    rows = []
    for other, name, what in ON:
        if other in found and name in found:
            losses = [last(found[n], "validation_loss") for n in (other, name)]
            more = losses[1] / losses[0] - 1 if losses[0] and losses[1] else None
            first = found[name]["log"][0]["validation_loss"]
            measures = [decimals(last(found[name], m), d) for m, d in (("mean_k", 1), ("captured_ratio", 3))]
            rows.append(
                [
                    *(found[name]["settings"]["variant"], what, found[other]["settings"]["variant"]),
                    *(decimals(first), decimals(losses[1]), decimals(losses[0])),
                    *("–" if more is None else f"{100 * more:+.1f}%", *measures),
                ]
            )
    if not rows:
        return missing(TRAINING)
    header = ["variant", "with", "beside", "first loss", "last loss", "loss beside it", "difference", "mean k", "ratio"]
    return table(header, rows, left=3)


def training_variants(root: Path) -> str:
    """`{{ training_variants }}`: the four variants after the same number of tokens."""
    found = runs(root)
    rows = [
        [
            found[name]["settings"]["variant"],
            decimals(last(found[name], "validation_loss")),
            percent_1(last(found[name], "first_token_share")),
            *(decimals(last(found[name], gate)) for gate in ("value_gate", "output_gate")),
        ]
        for name in VARIANTS
        if name in found
    ]
    if not rows:
        return missing(TRAINING)
    return table(["variant", "validation loss", "attention on position 0", "mean gate G2", "mean gate G1"], rows)


def training_last(root: Path, name: str = "dense_on", measure: str = "validation_loss") -> str:
    """`{{ training_last sparse_on validation_loss }}`: a run's last measurement of that name.

    Raises:
        KeyError: there is no such run, or it has no such measurement.
    """
    if not load(root, TRAINING):
        return missing(TRAINING)
    value = runs(root)[name]["log"][-1][measure]
    return percent_1(value) if measure.endswith("_share") else decimals(value)


def training_commands(root: Path) -> str:
    """`{{ training_commands }}`: the commands of all runs."""
    found = load(root, TRAINING)
    if not found:
        return missing(TRAINING)
    return "\n".join(["```", *(r["command"] for r in found), "```"])


DIRECTIVES = {
    f.__name__: f
    for f in (
        training_setup, training_model, training_context, training_warm_up, training_steps, training_on,
        training_kernels, training_variants, training_last, training_commands,
    )
}  # fmt: skip
