"""What a model does, measured on fixed windows of text in eval mode: the attention it computes and what it selects."""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from gsa_ref import (
    GatedSparseAttention,
    LanguageModel,
    Selection,
    apply_rope,
    captured_mass,
    indexed_selection,
    select_tokens,
)


@torch.no_grad()
def validation_loss(model: LanguageModel, windows: Int64[Tensor, "B L+1"], batch: int) -> float:
    """Mean cross-entropy of the next byte, in nats; in eval mode, so with sparse attention in variants that have it."""
    model.eval()
    total = 0.0
    for tokens in windows.split(batch):
        logits = model(tokens[:, :-1]).logits.float()
        total += float(cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten(), reduction="sum"))
    model.train()
    return total / windows[:, 1:].numel()


@torch.no_grad()
def measure(model: LanguageModel, windows: Int64[Tensor, "B L+1"]) -> dict[str, float]:
    """Means over layers, heads, windows and rows (queries), each recomputed in float32 from the layers' inputs.

    - first_token_share: attention on position 0, over the queries after it.
    - value_gate, output_gate: σ of the gates' logits, where the variant has them.

    - mean_k, k_low, k_high: k_t, and the values that a tenth of it lies below and above, with an indexer.

    With an indexer also, over the rows whose budget is smaller than what they see, if there are any in every layer:

    - captured: share of the dense attention (mean over heads) that lies on the selected tokens. The dense attention is
      that of the same queries and keys.
    - captured_oracle: the same for the k_t tokens with most attention: no selection of that size captures more.
    - captured_recent: the same for the k_t most recent tokens, which need no indexer.
    - captured_random: the same for k_t tokens drawn at random, in expectation.
    - captured_ratio: captured over captured_oracle.
    - captured_ratio_min: the ratio in the layer where it is lowest.
    - recall: share of the selected tokens that the oracle selects as well.
    """
    rows = measure_layers(model, windows)
    found = {name: sum(row[name] for row in rows) / len(rows) for name in rows[0] if all(name in row for row in rows)}
    if "captured" in found:
        found["captured_ratio"] = found["captured"] / found["captured_oracle"]
        found["captured_ratio_min"] = min(row["captured"] / row["captured_oracle"] for row in rows)
    return found


@torch.no_grad()
def measure_layers(model: LanguageModel, windows: Int64[Tensor, "B L+1"]) -> list[dict[str, float]]:
    """What `measure` takes the means of, by layer."""
    inputs = attention_inputs(model, windows)
    return [measure_layer(block.attention, h) for block, h in zip(model.blocks, inputs, strict=True)]  # type: ignore[arg-type]


@torch.no_grad()
def largest_activations(model: LanguageModel, windows: Int64[Tensor, "B L+1"]) -> list[float]:
    """The largest |x| in the residual stream: before each block, and behind the last one. In eval mode."""
    return seen(model, windows, [*model.blocks, model.norm], lambda x: float(x.abs().max()))


@torch.no_grad()
def attention_inputs(model: LanguageModel, windows: Int64[Tensor, "B L+1"]) -> list[Float[Tensor, "B L d"]]:
    """The hidden states that the attention of each layer sees, in eval mode."""
    return seen(model, windows, [block.attention for block in model.blocks], lambda x: x)  # type: ignore[misc]


def seen(
    model: LanguageModel, windows: Int64[Tensor, "B L+1"], modules: Iterable[nn.Module], see: Callable[[Tensor], Any]
) -> list[Any]:
    """What `see` makes of the input of each module, in eval mode."""
    found: list[Any] = []
    hooks = [m.register_forward_pre_hook(lambda _, args: found.append(see(args[0]))) for m in modules]
    model.eval()
    model(windows[:, :-1])
    model.train()
    for hook in hooks:
        hook.remove()
    return found


def measure_layer(layer: GatedSparseAttention, h: Float[Tensor, "B L d"]) -> dict[str, float]:
    """The measures of one layer on its input h."""
    c = layer.config
    h = h.to(layer.W_q.weight.dtype)
    q = apply_rope(layer.W_q(h).unflatten(-1, (c.H, c.d_h)), theta=c.rope_theta)
    k = apply_rope(layer.W_k(h).unflatten(-1, (c.H_kv, c.d_h)), theta=c.rope_theta)
    L = h.shape[1]
    past = torch.ones(L, L, dtype=torch.bool, device=h.device).tril().expand(len(h), L, L)
    p = attention(q, k, past)
    found: dict[str, Tensor] = {}
    if c.value_gate:
        found["value_gate"] = torch.sigmoid(layer.W_vg(h)).mean()
    if c.output_gate:
        found["output_gate"] = torch.sigmoid(layer.W_og(h)).mean()
    if c.sparse:
        q_idx, k_idx, head_logits = layer.indexer(h)
        selection, _ = indexed_selection(
            q_idx, k_idx, head_logits, layer.indexer.bias, mean_variance=layer.mean_variance, config=c
        )
        counts = selection.counts
        limited = counts < past.sum(-1)  # rows that leave something out
        chosen = members(selection, L)
        found["mean_k"] = counts.double().mean()
        found["k_low"], found["k_high"] = counts.double().quantile(torch.tensor([0.1, 0.9]).to(counts.device).double())
        if limited.any():
            recency = torch.arange(L, dtype=p.dtype, device=h.device).expand_as(past)
            recent, best = (select_tokens(x.masked_fill(~past, -torch.inf), counts) for x in (recency, p.mean(2)))
            captured, oracle = captured_mass(q, k, selection)
            found |= {
                "captured": captured[limited].mean(),
                "captured_oracle": oracle[limited].mean(),
                "captured_recent": captured_mass(q, k, recent)[0][limited].mean(),
                "captured_random": (counts / past.sum(-1))[limited].mean(),
                "recall": ((chosen & members(best, L)).sum(-1) / counts)[limited].mean(),
            }
        p = attention(q, k, chosen)
    found["first_token_share"] = p[:, 1:, :, 0].mean()
    return {name: float(value) for name, value in found.items()}


def attention(
    q: Float[Tensor, "B L H d_h"], k: Float[Tensor, "B L H_kv d_h"], over: Bool[Tensor, "B L S"]
) -> Float[Tensor, "B L H S"]:
    """The attention probabilities of every head over the given positions."""
    k = k.repeat_interleave(q.shape[2] // k.shape[2], dim=2)
    logits = torch.einsum("blhd,bshd->blhs", q, k) * q.shape[-1] ** -0.5
    return logits.masked_fill(~over[:, :, None], -torch.inf).softmax(-1)


def members(selection: Selection, S: int) -> Bool[Tensor, "B L S"]:
    """Which positions a selection holds."""
    index = selection.indices.long()
    index = index.masked_fill(index < 0, S)  # empty slots write to column S
    return torch.zeros(*index.shape[:2], S + 1, dtype=torch.bool, device=index.device).scatter(-1, index, True)[..., :S]
