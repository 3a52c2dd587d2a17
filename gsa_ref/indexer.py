"""Gated lightning indexer (Eq. 7)."""

from contextlib import AbstractContextManager, nullcontext

import torch
from jaxtyping import Float, Int32
from torch import Tensor, nn

from gsa_ref._arguments import check_hidden, check_indexer_arguments, check_same_device, check_start
from gsa_ref.config import GSAConfig, check_config
from gsa_ref.rope import apply_rope


def indexer_scores(
    q_idx: Float[Tensor, "B L H_I d_I"],
    k_idx: Float[Tensor, "B S d_I"],
    head_logits: Float[Tensor, "B L H_I"],
    bias: Float[Tensor, " H_I"],
    *,
    scale: float,
    start: int | Int32[Tensor, " B"] = 0,
    lengths: Int32[Tensor, " B"] | None = None,
) -> Float[Tensor, "B L S"]:
    """Eq. 7: I[t,s] = Σ_j σ(head_logits[t,j]) · σ(scale · q^I[t,j]·k^I[s] + b_j).

    Args:
        q_idx: q^I, one query per indexer head.
        k_idx: k^I, ONE key shared by all indexer heads; the dtype of q_idx.
        head_logits: h_t · W_j^{Iw}.
        bias: b.
        scale: factor on the inner product (Eq. 7 prints none).
        start: position of query 0 (one int, or int32 per sequence). Query t sees the keys s ≤ start + t.
        lengths: number of valid keys per sequence, default S. Keys at positions ≥ lengths are padding; so are queries.

    Returns:
        Scores in (0, H_I), −inf where query t may not look. float64 for float64 input, else float32.

    Raises:
        TypeError: wrong type or dtype.
        ValueError: wrong shape, device or a negative start.
    """
    check_indexer_arguments(q_idx, k_idx, head_logits, bias, scale=scale, start=start, lengths=lengths)
    dtype = torch.float64 if q_idx.dtype == torch.float64 else torch.float32
    q_idx, k_idx, weight = q_idx.to(dtype), k_idx.to(dtype), torch.sigmoid(head_logits.to(dtype))
    (B, L, H_I, _), S = q_idx.shape, k_idx.shape[1]
    scores = torch.zeros(B, L, S, dtype=dtype, device=q_idx.device)
    for j in range(H_I):
        with no_autocast(q_idx.device):
            dot = q_idx[:, :, j] @ k_idx.mT  # [B, L, S]
        z = scale * dot + bias[j].to(dtype)
        scores = scores + weight[:, :, j, None] * torch.sigmoid(z)
    return scores.masked_fill(~visible(L, S, start, lengths, q_idx.device), -torch.inf)


def no_autocast(device: torch.device) -> AbstractContextManager[None]:
    # Autocast would round the products to 16 bits, and hundreds of keys would tie.
    if not torch.amp.is_autocast_available(device.type):
        return nullcontext()
    return torch.autocast(device.type, enabled=False)


def visible(L: int, S: int, start: int | Tensor, lengths: Tensor | None, device: torch.device) -> "Tensor":
    """Which keys a query may see: s ≤ start + t, both positions below lengths (S). Bool, broadcastable to [B, L, S]."""
    t = torch.as_tensor(start, device=device).reshape(-1, 1) + torch.arange(L, device=device)  # [B or 1, L]
    s = torch.arange(S, device=device)
    end = torch.full_like(t[:, :1], S) if lengths is None else lengths[:, None]  # [B or 1, 1]
    return (s <= t[..., None]) & (t < end)[..., None]


class LightningIndexer(nn.Module):
    """The learned part of Eq. 7: q^I = h W^{Iq}, k^I = h W^{Ik}, head logits h W^{Iw}, bias b."""

    def __init__(self, config: GSAConfig) -> None:
        super().__init__()
        check_config("config", config)
        self.config = config
        self.W_iq = nn.Linear(config.d, config.H_I * config.d_I, bias=False)
        self.W_ik = nn.Linear(config.d, config.d_I, bias=False)
        self.W_iw = nn.Linear(config.d, config.H_I, bias=False)
        self.bias = nn.Parameter(torch.zeros(config.H_I))

    def forward(
        self, h: Float[Tensor, "B L d"], start: int | Int32[Tensor, " B"] = 0
    ) -> tuple[Float[Tensor, "B L H_I d_I"], Float[Tensor, "B L d_I"], Float[Tensor, "B L H_I"]]:
        """Project h to (q^I, k^I, head logits); `start` is the position of row 0, used by RoPE only.

        Raises:
            TypeError: wrong type or dtype.
            ValueError: wrong shape or device, or a negative start.
        """
        c = self.config
        sizes = {"d": c.d}
        check_hidden(h, self.W_iq.weight, sizes)
        check_start(start, sizes)
        check_same_device(h=h, start=start)
        q_idx = self.W_iq(h).unflatten(-1, (c.H_I, c.d_I))
        k_idx = self.W_ik(h)
        if c.indexer_rope:
            q_idx = apply_rope(q_idx, start=start, theta=c.rope_theta)
            k_idx = apply_rope(k_idx[:, :, None], start=start, theta=c.rope_theta)[:, :, 0]
        return q_idx, k_idx, self.W_iw(h)
