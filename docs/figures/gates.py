"""Pictures and quoted figures of docs/learn/gates.md."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from matplotlib.figure import Figure
from style import BLUE, GREEN, ORANGE, main, zen

from gsa_ref import Selection, apply_rope, equations, sparse_attention, tour

WORDS = zen()
L = len(WORDS)
CONFIG = tour.build_config()
D_H = CONFIG.d_h
HIDDEN = tour.embed(WORDS, CONFIG.d)
LAYER = tour.build_layer(CONFIG, HIDDEN)
SINK = 3.0  # length of what every query has in common with the key of word 0
SEED = 0
SAMPLES = 1000
BIASES = (0.0, 0.5)  # ours, and that of the official code
BINS = np.linspace(0, 1, 41)
TRAINING = Path(__file__).parents[2] / "experiments/results/cpu.json"


def with_sink() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """q, k and v of the text, with a common direction in all queries and in the key of word 0."""
    c = CONFIG
    with torch.no_grad():
        q = apply_rope(LAYER.W_q(HIDDEN).unflatten(-1, (c.H, D_H)), theta=c.rope_theta)
        k = apply_rope(LAYER.W_k(HIDDEN).unflatten(-1, (c.H_kv, D_H)), theta=c.rope_theta)
        v = LAYER.W_v(HIDDEN).unflatten(-1, (c.H_kv, D_H))
    direction = torch.zeros(D_H, dtype=torch.float64)
    direction[-1] = SINK
    k[:, 0] += 2 * direction
    return q + direction, k, v


def everything() -> Selection:
    """Every query selects all that it sees."""
    positions = torch.arange(L, dtype=torch.int32).expand(L, L)
    counts = torch.arange(1, L + 1, dtype=torch.int32)
    return Selection(positions.where(positions < counts[:, None], -1)[None], counts[None])


Q, KEYS, V = with_sink()
IS_SINK = torch.zeros_like(V)
IS_SINK[:, 0] = 1  # with this as values an output is the weight of word 0
ON_SINK = sparse_attention(Q, KEYS, IS_SINK, everything())[0][0, 1:, 0, 0]


def sizes(gate_of_word_0: float) -> torch.Tensor:
    """Size of the output of head 0 for each query from 1 on, all gates open but that of word 0."""
    logits = torch.full_like(V, torch.inf)
    logits[:, 0] = gate_of_word_0
    return sparse_attention(Q, KEYS, V, everything(), value_gate_logits=logits)[0][0, 1:, 0].norm(dim=-1)


def sink() -> Figure:
    """What a head gives out, against the weight of the sink, with the sink's value gate open and closed."""
    figure = Figure(figsize=(6, 2.9))
    axes = figure.add_subplot()
    points = {"linestyle": "", "marker": "o", "markersize": 2.5}
    axes.plot(ON_SINK, sizes(torch.inf), color=ORANGE, label="value gate of the sink open", **points)
    axes.plot(ON_SINK, sizes(-torch.inf), color=BLUE, label="closed", **points)
    axes.set_xlabel("weight of the sink")
    axes.set_ylabel("size of the output")
    axes.set_ylim(0, None)
    axes.legend(loc="upper left")
    return figure


def heads() -> dict[str, np.ndarray]:
    """Inputs, and outputs of a head that reads its own token only, without and with its output gate: [SAMPLES, d]."""
    x = np.random.default_rng(SEED).standard_normal((SAMPLES, CONFIG.d))
    w_v, w_o = (w.detach().numpy().T for w in (LAYER.W_v.weight[:D_H], LAYER.W_o.weight[:, :D_H]))
    value, logits = x @ w_v, LAYER.W_og(torch.from_numpy(x)).detach().numpy()[:, :D_H]
    return {"input": x, "plain": value @ w_o, "gated": equations.apply_gate(value, logits) @ w_o}


HEADS = heads()


def singular_values(name: str) -> np.ndarray:
    """Of the outputs, relative to the largest; what is rounding counts as 0."""
    values = np.linalg.svd(HEADS[name], compute_uv=False)
    return np.where(values < 1e-9 * values[0], 0, values / values[0])


SINGULAR = {name: singular_values(name) for name in ("plain", "gated")}


def missed(name: str) -> str:
    """What the best matrix from inputs to outputs leaves, relative to the outputs."""
    x, y = HEADS["input"], HEADS[name]
    best = np.linalg.lstsq(x, y, rcond=None)[0]
    return f"{100 * np.linalg.norm(y - x @ best) / np.linalg.norm(y):.0f}%"


def rank() -> Figure:
    """Singular values of the outputs: as many above zero with a gate as without."""
    figure = Figure(figsize=(6, 2.6))
    axes = figure.add_subplot()
    shown = np.arange(1, D_H + 9)
    for name, colour, marker in (("plain", ORANGE, "o"), ("gated", BLUE, "s")):
        values = SINGULAR[name][: len(shown)]
        axes.plot(shown, values, color=colour, marker=marker, markersize=3.5, label=name)
    axes.axvline(D_H + 0.5, color=GREEN, linestyle="--", linewidth=1, label="$d_h$")
    axes.set_xlabel("singular value of the outputs")
    axes.set_ylabel("relative to the first")
    axes.legend()
    return figure


def gates(bias: float) -> dict[str, np.ndarray]:
    """Every value gate and every output gate of the text, in an untrained layer whose gates' bias starts at `bias`."""
    layer = tour.build_layer(replace(CONFIG, gate_bias_init=bias), HIDDEN)
    with torch.no_grad():
        return {
            "value gates": layer.W_vg(HIDDEN).sigmoid().numpy(),
            "output gates": layer.W_og(HIDDEN).sigmoid().numpy(),
        }


GATES = {bias: gates(bias) for bias in BIASES}


def histogram() -> Figure:
    """How far the gates are open before training, for two initial biases."""
    figure = Figure(figsize=(7.2, 2.4), layout="constrained")
    for axes, name in zip(figure.subplots(1, 2, sharey=True), GATES[BIASES[0]], strict=True):
        for bias, colour in zip(BIASES, (BLUE, ORANGE), strict=True):
            share, edges = np.histogram(GATES[bias][name], bins=BINS)
            axes.stairs(100 * share / share.sum(), edges, fill=True, color=colour, alpha=0.6, label=f"bias {bias:g}")
        axes.set_xlim(0, 1)
        axes.set_xlabel(name)
    figure.axes[0].set_ylabel("% of the gates")
    figure.axes[1].legend(loc="upper left")
    return figure


def trained() -> dict[str, str]:
    """Mean gates of the small gated model, before and after its training, from the record of the runs."""
    runs = {run["name"]: run for run in json.loads(TRAINING.read_text(encoding="utf-8"))}
    first, last = (runs["gated"]["log"][i] for i in (0, -1))
    return {
        "steps": f"{last['step']:,}",
        "value_before": f"{first['value_gate']:.2f}",
        "value_after": f"{last['value_gate']:.2f}",
        "output_before": f"{first['output_gate']:.2f}",
        "output_after": f"{last['output_gate']:.2f}",
    }


if __name__ == "__main__":
    main(
        "gates",
        {"sink": sink, "rank": rank, "histogram": histogram},
        {
            "words": L,
            "on_sink": f"{100 * float(ON_SINK.mean()):.0f}%",
            "d_h": D_H,
            "samples": f"{SAMPLES:,}",
            "rank_plain": int((SINGULAR["plain"] > 0).sum()),
            "rank_gated": int((SINGULAR["gated"] > 0).sum()),
            "missed_plain": missed("plain"),
            "missed_gated": missed("gated"),
            **{f"open_{bias:g}".replace(".", "_"): f"{GATES[bias]['output gates'].mean():.2f}" for bias in BIASES},
            "least_open": f"{min(GATES[0.0][name].min() for name in GATES[0.0]):.2f}",
            "most_open": f"{max(GATES[0.0][name].max() for name in GATES[0.0]):.2f}",
            **trained(),
        },
    )
