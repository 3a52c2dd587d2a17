"""The whole layer (Eq. 6): projections, value gate, indexer, selection, sparse SDPA, output gate, output projection."""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int32
from torch import Tensor, nn

from gsa_ref._arguments import FLOATING, check_lengths, check_tensor
from gsa_ref.attention import dense_attention, sparse_attention
from gsa_ref.cache import GSACache
from gsa_ref.config import GSAConfig
from gsa_ref.gates import apply_gate
from gsa_ref.indexer import LightningIndexer
from gsa_ref.rope import apply_rope
from gsa_ref.selection import indexed_selection


class GSAOutput(NamedTuple):
    """Result of the layer.

    Attributes:
        hidden: u, [B, L, d].
        cache: the cache that was passed in, now holding the new tokens too; else None.
        indexer_loss: None. The indexer's KL losses are not part of this version: until they are, an indexer that is
            trained through this layer gets no gradient, because nothing flows through the indices of a top-k.
    """

    hidden: Tensor
    cache: GSACache | None
    indexer_loss: Tensor | None


def _is_capturing(x: Tensor) -> bool:
    """Whether a CUDA graph records what is done with x, instead of running it."""
    return x.is_cuda and not torch.compiler.is_compiling() and torch.cuda.is_current_stream_capturing()


class GatedSparseAttention(nn.Module):
    """Gated Sparse Attention (Eq. 6), causal, with grouped key/value heads.

    The four variants of the paper come from two switches of the config: `sparse` (indexer and selection, or dense
    attention) and `gates`. The state V̄ of Eq. 8 is the buffer `mean_variance`: in training mode `forward` only adds
    the rows it sees to a pending sum, and `update_mean_variance` folds that in once per optimiser step, so a row's
    budget depends neither on its batch neighbours nor on its future.
    """

    mean_variance: Tensor
    pending_variance_sum: Tensor
    pending_variance_count: Tensor

    def __init__(self, config: GSAConfig) -> None:
        super().__init__()
        if not isinstance(config, GSAConfig):
            raise TypeError(f"config: expected a GSAConfig, got {type(config).__name__}")
        self.config = c = config
        # What a subclass replaces to run other kernels on the same parameters.
        self._indexed_selection: Callable[..., Any] = indexed_selection
        self._sparse_attention: Callable[..., Any] = sparse_attention
        self._apply_gate: Callable[..., Any] = apply_gate
        self.W_q = nn.Linear(c.d, c.H * c.d_h, bias=False)
        self.W_k = nn.Linear(c.d, c.H_kv * c.d_h, bias=False)
        self.W_v = nn.Linear(c.d, c.H_kv * c.d_h, bias=False)
        self.W_o = nn.Linear(c.H * c.d_h, c.d, bias=False)
        if c.value_gate:
            self.W_vg = nn.Linear(c.d, c.H_kv * c.d_h)
            nn.init.constant_(self.W_vg.bias, c.gate_bias_init)
        if c.output_gate:
            self.W_og = nn.Linear(c.d, c.H * c.d_h)
            nn.init.constant_(self.W_og.bias, c.gate_bias_init)
        if c.sparse:
            self.indexer = LightningIndexer(c)
            self.register_buffer("mean_variance", torch.zeros((), dtype=torch.float32))
            self.register_buffer("pending_variance_sum", torch.zeros((), dtype=torch.float32))
            self.register_buffer("pending_variance_count", torch.zeros((), dtype=torch.int64))

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> "GatedSparseAttention":
        # .half() and .to(bfloat16) cast buffers too: V̄ would lose its small steps, so it stays float32.
        kept = {name: buffer for name, buffer in self.named_buffers(recurse=False) if buffer.is_floating_point()}
        super()._apply(fn, recurse)
        for name, buffer in kept.items():
            moved = self._buffers[name]
            if moved is not None and moved.dtype != buffer.dtype:
                self._buffers[name] = buffer.to(moved.device)
        return self

    def forward(
        self,
        h: Float[Tensor, "B L d"],
        *,
        cache: GSACache | None = None,
        lengths: Int32[Tensor, " B"] | None = None,
    ) -> GSAOutput:
        """Apply the layer to h.

        Args:
            h: hidden states, the dtype of the parameters.
            cache: earlier tokens of the same sequences (`GSACache.allocate`). The new tokens are appended in place;
                what the cache holds carries no gradient.
            lengths: number of valid rows of h per sequence, for right-padded batches. Rows past it give 0 and are
                seen by nobody, whatever they hold.

        Raises:
            TypeError: wrong type or dtype.
            ValueError: wrong shape or device; a cache of another batch, config, dtype or device, a full one, or any
                cache in training mode. The cache is then unchanged.
            RuntimeError: a CUDA graph is being captured, and the step would read a part of the cache that depends on
                its length. Nothing has run on the device then.
        """
        c = self.config
        sizes = {"d": c.d}
        check_tensor("h", h, "B L d", sizes, dtypes=FLOATING)
        if h.device != self.W_q.weight.device:
            raise ValueError(f"h: expected device {self.W_q.weight.device} as the parameters, got {h.device}")
        if h.dtype != self.W_q.weight.dtype and not torch.is_autocast_enabled(h.device.type):
            raise TypeError(f"h: expected dtype {self.W_q.weight.dtype} as the parameters, got {h.dtype}")
        check_lengths(lengths, sizes)
        if lengths is not None and lengths.device != h.device:
            raise ValueError(f"lengths: expected device {h.device} as h, got {lengths.device}")
        B, L, _ = h.shape
        n_new = torch.full((B,), L, dtype=torch.int32, device=h.device) if lengths is None else lengths.clamp(0, L)
        if lengths is not None:
            padding = torch.arange(L, device=h.device) >= n_new[:, None]
            h = h.masked_fill(padding[..., None], 0)

        q = self.W_q(h).unflatten(-1, (c.H, c.d_h))
        k = self.W_k(h).unflatten(-1, (c.H_kv, c.d_h))
        v = self.W_v(h).unflatten(-1, (c.H_kv, c.d_h))
        start: int | Tensor = 0
        if cache is not None:
            if not isinstance(cache, GSACache):
                raise TypeError(f"cache: expected a GSACache, got {type(cache).__name__}")
            if self.training and torch.is_grad_enabled():
                raise ValueError("cache: expected None in training mode (a cache carries no gradient), got a GSACache")
            cache.check(c, B, L, k)  # under autocast k has another dtype than h
            start = cache.lengths.clone()  # append changes lengths in place

        q = apply_rope(q, start=start, theta=c.rope_theta)
        k = apply_rope(k, start=start, theta=c.rope_theta)
        if c.value_gate:
            v = self._apply_gate(v, self.W_vg(h).unflatten(-1, (c.H_kv, c.d_h)))  # Eq. 9
        q_idx, k_idx, head_logits = self.indexer(h, start) if c.sparse else (None, None, None)

        key_lengths = lengths
        if cache is not None:
            cache.append(k, v, k_idx, n_new)
            k, v, k_idx, key_lengths = cache.k, cache.v, cache.k_idx, cache.lengths

        gate_logits = self.W_og(h).unflatten(-1, (c.H, c.d_h)) if c.output_gate else None
        o = self._attend(
            q=q,
            k=k,
            v=v,
            q_idx=q_idx,
            k_idx=k_idx,
            head_logits=head_logits,
            output_gate_logits=gate_logits,
            start=start,
            lengths=key_lengths,
            n_new=n_new,
            cache=cache,
        )
        return GSAOutput(self.W_o(o.flatten(2)), cache, None)

    def _attend(
        self,
        *,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        q_idx: Tensor | None,
        k_idx: Tensor | None,
        head_logits: Tensor | None,
        output_gate_logits: Tensor | None,
        start: int | Tensor,
        lengths: Tensor | None,
        n_new: Tensor,
        cache: GSACache | None,
    ) -> Tensor:
        """What lies between the projections: selection, sparse (or dense) SDPA and the output gate. o', [B, L, H, d_h].

        With a cache, k, v and k_idx are its whole buffers, of which `cache.longest` tokens at most are in use.
        """
        if cache is not None:
            if _is_capturing(q):
                raise RuntimeError(
                    "cache: a captured CUDA graph would read as many tokens at every replay as the cache holds now; "
                    "capture steps of gsa_fast.decode_attention only, which reads whole buffers"
                )
            k, v = k[:, : cache.longest], v[:, : cache.longest]
            k_idx = None if k_idx is None else k_idx[:, : cache.longest]
        if not self.config.sparse:
            o = dense_attention(q, k, v, start=start, lengths=lengths)
            return o if output_gate_logits is None else self._apply_gate(o, output_gate_logits)  # Eq. 10
        with torch.no_grad():  # indices carry no gradient, and V̄ is a statistic
            selection, variance = self._indexed_selection(
                q_idx,
                k_idx,
                head_logits,
                self.indexer.bias,
                mean_variance=self.mean_variance,
                config=self.config,
                start=start,
                lengths=lengths,
            )
            self._add_variance(variance, n_new)
        o, _ = self._sparse_attention(q, k, v, selection, start=start, output_gate_logits=output_gate_logits)
        return o

    def _add_variance(self, variance: Tensor, n_new: Tensor) -> None:
        """Add the rows of this forward pass to the pending mean of Eq. 8; never when a checkpoint recomputes it."""
        # A forward pass that runs inside a backward pass is a recomputation: its rows were counted the first time.
        if not self.training or (not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1):
            return
        valid = torch.arange(variance.shape[1], device=variance.device) < n_new[:, None]
        self.pending_variance_sum += variance.masked_fill(~valid, 0).sum()
        self.pending_variance_count += valid.sum()

    @torch.no_grad()
    def update_mean_variance(self) -> None:
        """Fold the pending rows into V̄ (Eq. 8): call it once per optimiser step, after the step.

        V̄ ← decay · V̄ + (1 − decay) · (mean row variance since the last call); the first call sets V̄ to that mean.
        Sums run over all ranks if torch.distributed is initialised. Without pending rows, or without an indexer,
        nothing changes.
        """
        if not self.config.sparse:
            return
        total = torch.stack((self.pending_variance_sum.double(), self.pending_variance_count.double()))
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            torch.distributed.all_reduce(total)
        mean = (total[0] / total[1]).float()
        decay = self.config.mean_variance_decay
        updated = torch.where(self.mean_variance > 0, decay * self.mean_variance + (1 - decay) * mean, mean)
        self.mean_variance.copy_(torch.where(total[1] > 0, updated, self.mean_variance))
        self.pending_variance_sum.zero_()
        self.pending_variance_count.zero_()
