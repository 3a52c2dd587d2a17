"""The smallest language model around the layer: a pre-norm Transformer over bytes.

x ← E[tokens];  for each block: x ← x + GSA(RMSNorm(x)), x ← x + SwiGLU(RMSNorm(x));  logits = RMSNorm(x) Eᵀ.
V is the size of the vocabulary, d_ff the inner width of SwiGLU; the other symbols are those of the layer.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Literal, NamedTuple, cast

import torch
from jaxtyping import Float, Int32, Int64
from torch import Tensor, nn
from torch.nn.functional import silu

from gsa_ref._arguments import check_int, check_lengths, check_same_device, check_tensor
from gsa_ref.cache import GSACache
from gsa_ref.config import GSAConfig, check_config
from gsa_ref.layer import GatedSparseAttention

INIT_STD = 0.02  # as GPT-2
NORM_EPS = 1e-6


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """Sizes of a `LanguageModel`. Immutable, checked on construction.

    Attributes:
        attention: the layer's config, the same in every block. Without `indexer_rope` equal tokens have the same k^I in
            the first block, wherever they stand: their scores tie up to rounding, so that two ways to compute one thing
            (with and without a cache, say) may select different ones.
        n_layers: number of blocks.
        d_ff: inner width of SwiGLU; 8/3 · d gives as many parameters as the classic 4 · d without a gate.
        vocab: V; by default the 256 bytes and one token that begins a text (`gsa_ref.generation.BOS`).

    Raises:
        TypeError: a field has the wrong type.
        ValueError: a field is out of range.
    """

    attention: GSAConfig
    n_layers: int
    d_ff: int
    vocab: int = 257

    def __post_init__(self) -> None:
        check_config("attention", self.attention)
        for name in ("n_layers", "d_ff", "vocab"):
            check_int(name, getattr(self, name), 1)

    def variant(self, name: str) -> "ModelConfig":
        """The same sizes with the attention of one of the paper's four models, see `GSAConfig.variant`."""
        return replace(self, attention=self.attention.variant(name))


class ModelOutput(NamedTuple):
    """Result of the model.

    Attributes:
        logits: [B, L, V], for the token after each position; 0 in rows at or past `lengths`.
        caches: the caches that were passed in, now holding the new tokens too; else None.
        indexer_loss: the sum over the layers, to be added to the loss of the logits, or None if no layer gives one. The
            two have no parameter in common: the indexers learn from this one alone, all else from the other alone.
    """

    logits: Float[Tensor, "B L V"]
    caches: Sequence[GSACache] | None
    indexer_loss: Float[Tensor, ""] | None


class SwiGLU(nn.Module):
    """y = (SiLU(x W_gate) ⊙ x W_up) W_down (Shazeer, arXiv 2002.05202)."""

    def __init__(self, d: int, d_ff: int) -> None:
        super().__init__()
        self.W_gate = nn.Linear(d, d_ff, bias=False)
        self.W_up = nn.Linear(d, d_ff, bias=False)
        self.W_down = nn.Linear(d_ff, d, bias=False)

    def forward(self, x: Float[Tensor, "B L d"]) -> Float[Tensor, "B L d"]:
        return self.W_down(silu(self.W_gate(x)) * self.W_up(x))


class Block(nn.Module):
    """x + GSA(RMSNorm(x)), then x + SwiGLU(RMSNorm(x)). Without biases, a row of 0 stays 0."""

    def __init__(self, config: ModelConfig, layer: Callable[[GSAConfig], GatedSparseAttention]) -> None:
        super().__init__()
        d = config.attention.d
        self.norm_attention = nn.RMSNorm(d, eps=NORM_EPS)
        self.attention = layer(config.attention)
        self.norm_mlp = nn.RMSNorm(d, eps=NORM_EPS)
        self.mlp = SwiGLU(d, config.d_ff)

    def forward(
        self, x: Float[Tensor, "B L d"], cache: GSACache | None = None, lengths: Int32[Tensor, " B"] | None = None
    ) -> tuple[Float[Tensor, "B L d"], Float[Tensor, ""] | None]:
        """Apply the block to x; the second value is the layer's indexer_loss."""
        u = self.attention(self.norm_attention(x), cache=cache, lengths=lengths)
        x = x + u.hidden
        return x + self.mlp(self.norm_mlp(x)), u.indexer_loss


class LanguageModel(nn.Module):
    """A causal language model of `config.n_layers` blocks; embedding and output projection share their weights.

    Weights are drawn from a normal distribution of standard deviation 0.02, those that write to the residual stream
    (W_o, W_down) from one narrower by √(2 · n_layers), so that x starts at one size whatever the depth (GPT-2). Norms
    start at 1, gate biases as the config says. `torch.manual_seed` before the call determines them.

    Args:
        config: the sizes.
        layer: makes the attention of a block from its config: `gsa_ref.GatedSparseAttention`, or a subclass that runs
            other kernels on the same parameters, `gsa_fast.GatedSparseAttention`. Models of either load one
            another's `state_dict`.

    Raises:
        TypeError: config is not a ModelConfig, or layer cannot be called.
    """

    def __init__(
        self, config: ModelConfig, *, layer: Callable[[GSAConfig], GatedSparseAttention] = GatedSparseAttention
    ) -> None:
        super().__init__()
        if not isinstance(config, ModelConfig):
            raise TypeError(f"config: expected a ModelConfig, got {type(config).__name__}")
        if not callable(layer):
            raise TypeError(f"layer: expected a class or function that makes a layer, got {type(layer).__name__}")
        self.config = config
        self.embedding = nn.Embedding(config.vocab, config.attention.d)
        self.blocks = nn.ModuleList(Block(config, layer) for _ in range(config.n_layers))
        self.norm = nn.RMSNorm(config.attention.d, eps=NORM_EPS)
        for name, parameter in self.named_parameters():
            if parameter.dim() == 2:
                residual = name.endswith(("W_o.weight", "W_down.weight"))
                nn.init.normal_(parameter, std=INIT_STD / (2 * config.n_layers) ** 0.5 if residual else INIT_STD)

    def forward(
        self,
        tokens: Int64[Tensor, "B L"],
        *,
        caches: Sequence[GSACache] | None = None,
        lengths: Int32[Tensor, " B"] | None = None,
    ) -> ModelOutput:
        """Logits for the token after each of `tokens`.

        Args:
            tokens: values in [0, V); others raise IndexError on a CPU and stop the device on a GPU.
            caches: earlier tokens of the same sequences, one cache per layer (`allocate_caches`). The new tokens are
                appended in place.
            lengths: number of valid tokens per sequence, for right-padded batches. Padding may hold any value.

        Raises:
            TypeError: wrong type or dtype.
            ValueError: wrong shape or device, another number of caches than layers, one cache twice, or a cache that
                the layer refuses (see `GatedSparseAttention.forward`). All caches are then unchanged.
        """
        sizes: dict[str, int] = {}
        check_tensor("tokens", tokens, "B L", sizes, dtypes=(torch.int64,))
        check_lengths(lengths, sizes)
        check_same_device(embedding=self.embedding.weight, tokens=tokens, lengths=lengths)
        if caches is not None:
            self._check_caches(caches, *tokens.shape)
        if lengths is None:
            x = self.embedding(tokens)  # [B, L, d]
        else:  # a row of 0 stays 0 through every block, whatever token the padding holds
            padding = torch.arange(tokens.shape[1], device=tokens.device) >= lengths[:, None]  # [B, L]
            x = self.embedding(tokens.masked_fill(padding, 0)).masked_fill(padding[..., None], 0)
        losses = []
        for i, block in enumerate(self.blocks):
            x, loss = block(x, None if caches is None else caches[i], lengths)
            losses += [] if loss is None else [loss]
        logits = self.norm(x) @ self.embedding.weight.mT  # [B, L, V]
        return ModelOutput(logits, caches, torch.stack(losses).sum() if losses else None)

    def _check_caches(self, caches: Sequence[GSACache], B: int, L: int) -> None:
        """A layer appends before the next one checks: so every cache is checked before the first layer runs."""
        if not isinstance(caches, Sequence):
            raise TypeError(f"caches: expected a sequence of GSACache, got {type(caches).__name__}")
        if len(caches) != self.config.n_layers:
            raise ValueError(f"caches: expected one for each of {self.config.n_layers} layers, got {len(caches)}")
        for cache in caches:
            if not isinstance(cache, GSACache):
                raise TypeError(f"caches: expected a sequence of GSACache, got one of {type(cache).__name__}")
            if sum(cache is other for other in caches) > 1:
                raise ValueError("caches: expected one for each layer, got one cache twice")
            cache.check(self.config.attention, B, L, caches[0].k)  # the layer compares the first one's dtype with h

    def allocate_caches(self, batch_size: int, capacity: int) -> list[GSACache]:
        """Empty caches, one per layer, in the dtype and on the device of the parameters.

        Raises:
            TypeError: a size is not an int.
            ValueError: batch_size < 0 or capacity < 1.
        """
        c, like = self.config, self.embedding.weight
        return [
            GSACache.allocate(c.attention, batch_size, capacity, dtype=like.dtype, device=like.device)
            for _ in range(c.n_layers)
        ]

    def set_phase(self, phase: Literal["warm_up", "sparse"]) -> None:
        """Choose how every layer trains, see `GatedSparseAttention.set_phase`.

        In the warm-up nothing but the indexers requires a gradient; in the sparse phase everything does.

        Raises:
            TypeError: phase is not a str.
            ValueError: another phase, or a warm-up of a model without indexers. Nothing has changed then.
        """
        for block in cast(list[Block], self.blocks):
            block.attention.set_phase(phase)
        for name, parameter in self.named_parameters():
            if ".attention." not in name:
                parameter.requires_grad_(phase == "sparse")

    def update_mean_variance(self) -> None:
        """Fold the pending rows of every layer into its V̄: call it once per optimiser step, after the step."""
        for block in cast(list[Block], self.blocks):
            block.attention.update_mean_variance()
