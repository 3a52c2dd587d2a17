"""The whole layer (Eq. 6): projections, value gate, indexer, selection, sparse SDPA, output gate, output projection."""

from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import torch
from jaxtyping import Float, Int32
from torch import Tensor, nn

from gsa_ref._arguments import check_choice, check_hidden, check_lengths
from gsa_ref.attention import dense_attention, sparse_attention
from gsa_ref.cache import GSACache
from gsa_ref.config import GSAConfig, check_config
from gsa_ref.gates import apply_gate
from gsa_ref.indexer import LightningIndexer
from gsa_ref.rope import apply_rope
from gsa_ref.selection import indexed_selection
from gsa_ref.training import indexer_kl_loss

PHASES = ("warm_up", "sparse")


class GSAOutput(NamedTuple):
    """Result of the layer.

    Attributes:
        hidden: u, [B, L, d].
        cache: the cache that was passed in, now holding the new tokens too; else None.
        indexer_loss: the KL loss of the indexer (Eq. 15) in training mode, a scalar to be added to the loss of the
            model; None in eval mode, without an indexer, or with a cache.
    """

    hidden: Tensor
    cache: GSACache | None
    indexer_loss: Tensor | None


@torch.library.custom_op("gsa_ref::add_rows", mutates_args=("total", "count"))
def _add_rows(total: Tensor, count: Tensor, values: Tensor, valid: Tensor) -> None:
    """total += Σ values where valid, count += Σ valid, unless a backward pass runs: then it recomputes a forward pass.

    An op of its own, so that a compiled graph asks that question each time it runs.
    """
    if torch._C._current_graph_task_id() == -1:
        total += values.masked_fill(~valid, 0).sum()
        count += valid.sum()


@_add_rows.register_fake
def _(total: Tensor, count: Tensor, values: Tensor, valid: Tensor) -> None:
    return None


def _is_capturing(x: Tensor) -> bool:
    """Whether a CUDA graph records what is done with x, instead of running it."""
    return x.is_cuda and not torch.compiler.is_compiling() and torch.cuda.is_current_stream_capturing()


class GatedSparseAttention(nn.Module):
    """Gated Sparse Attention (Eq. 6), causal, with grouped key/value heads.

    The four variants of the paper come from two switches of the config: `sparse` (indexer and selection, or dense
    attention) and `gates`.

    In training mode the indexer learns from `GSAOutput.indexer_loss` and from nothing else, and nothing else learns
    from that loss: the indexer sees h detached, and the attention it is compared with is detached too. `set_phase`
    chooses between the warm-up and the sparse phase.

    The state V̄ of Eq. 8 is the buffer `mean_variance`: in training mode `forward` only adds the rows it sees to a
    pending sum, and `update_mean_variance` folds that in once per optimiser step, so a row's budget depends neither on
    its batch neighbours nor on its future. The pending sum belongs to one process and one step, as gradients do: it is
    not part of the state, and `DistributedDataParallel`, which sends the buffers of rank 0 to all, leaves it alone.

    Attributes:
        mean_variance: V̄, a float32 buffer.
        pending_variance_sum, pending_variance_count: Σ Var(I[t,:]) and number of the rows since the last update.
        phase: "warm_up" or "sparse", see `set_phase`. Not part of the state.
    """

    mean_variance: Tensor
    pending_variance_sum: Tensor
    pending_variance_count: Tensor

    def __init__(self, config: GSAConfig) -> None:
        super().__init__()
        check_config("config", config)
        self.config = c = config
        # What a subclass replaces to run other kernels on the same parameters.
        self._indexed_selection: Callable[..., Any] = indexed_selection
        self._sparse_attention: Callable[..., Any] = sparse_attention
        self._apply_gate: Callable[..., Any] = apply_gate
        self._indexer_kl_loss: Callable[..., Any] = indexer_kl_loss
        self.phase = "sparse"
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
            # Not buffers: DistributedDataParallel would replace those of every rank by rank 0's at each forward pass.
            self.pending_variance_sum = torch.zeros((), dtype=torch.float32)
            self.pending_variance_count = torch.zeros((), dtype=torch.int64)

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> "GatedSparseAttention":
        # .half() and .to(bfloat16) cast buffers too: V̄ would lose its small steps, so it stays float32.
        kept = {name: buffer for name, buffer in self.named_buffers(recurse=False) if buffer.is_floating_point()}
        super()._apply(fn, recurse)
        for name, buffer in kept.items():
            moved = self._buffers[name]
            if moved is not None and moved.dtype != buffer.dtype:
                self._buffers[name] = buffer.to(moved.device)
        self._move_pending_rows()
        return self

    def _load_from_state_dict(self, *args: Any) -> None:
        super()._load_from_state_dict(*args)
        self._move_pending_rows()  # load_state_dict(assign=True) may have brought V̄ to another device

    def _move_pending_rows(self) -> None:
        """Keep the pending sums where V̄ is. Sums that come from the meta device, which holds no values, start at 0."""
        for name in ("pending_variance_sum", "pending_variance_count") if self.config.sparse else ():
            pending, device = getattr(self, name), self.mean_variance.device
            setattr(self, name, torch.zeros_like(pending, device=device) if pending.is_meta else pending.to(device))

    def set_phase(self, phase: Literal["warm_up", "sparse"]) -> None:
        """Choose how the layer trains. A new layer is in the sparse phase; evaluation is the same in both.

        "warm_up": in training mode attention is dense, `indexer_loss` compares the indexer with all of it, and only the
        indexer's parameters require gradients. "sparse": in training mode attention is sparse, `indexer_loss` compares
        the indexer with it on the selected tokens, and all parameters require gradients.

        `DistributedDataParallel` notes at its construction which parameters require gradients: call this before, and
        wrap anew for another phase. `fully_shard` needs nothing of the kind. An optimiser may hold all parameters from
        the beginning: one without a gradient is not touched.

        Raises:
            TypeError: phase is not a str.
            ValueError: another phase, or a warm-up of a layer without an indexer.
        """
        check_choice("phase", phase, PHASES)
        if phase == "warm_up" and not self.config.sparse:
            raise ValueError('phase: expected "sparse" for a layer without an indexer, got "warm_up"')
        self.phase = phase
        self.requires_grad_(phase == "sparse")
        if self.config.sparse:
            self.indexer.requires_grad_(True)

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
        check_hidden(h, self.W_q.weight, sizes)
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
        # Detached: what h is made of learns from the loss of the model alone.
        q_idx, k_idx, head_logits = self.indexer(h.detach(), start) if c.sparse else (None, None, None)

        key_lengths = lengths
        if cache is not None:
            cache.append(k, v, k_idx, n_new)
            k, v, k_idx, key_lengths = cache.k, cache.v, cache.k_idx, cache.lengths

        gate_logits = self.W_og(h).unflatten(-1, (c.H, c.d_h)) if c.output_gate else None
        o, indexer_loss = self._attend(
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
        return GSAOutput(self.W_o(o.flatten(2)), cache, indexer_loss)

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
    ) -> tuple[Tensor, Tensor | None]:
        """What lies between the projections: selection, sparse (or dense) SDPA, the output gate, the indexer's loss.

        Returns o', [B, L, H, d_h], and indexer_loss. With a cache, k, v and k_idx are its whole buffers, of which
        `cache.longest` tokens at most are in use.
        """
        c = self.config
        if cache is not None:
            if _is_capturing(q):
                raise RuntimeError(
                    "cache: a captured CUDA graph would read as many tokens at every replay as the cache holds now; "
                    "capture steps of gsa_fast.decode_attention only, which reads whole buffers"
                )
            k, v = k[:, : cache.longest], v[:, : cache.longest]
            k_idx = None if k_idx is None else k_idx[:, : cache.longest]
        selection, lse = None, None
        if c.sparse:
            # In the warm-up too, for the sake of V̄: one pass of the indexer beside H heads of dense attention.
            with torch.no_grad():  # indices carry no gradient, and V̄ is a statistic
                selection, variance = self._indexed_selection(
                    q_idx,
                    k_idx,
                    head_logits,
                    self.indexer.bias,
                    mean_variance=self.mean_variance,
                    config=c,
                    start=start,
                    lengths=lengths,
                )
                self._add_variance(variance, n_new)
        learns = self.training and c.sparse and cache is None
        if not c.sparse or (learns and self.phase == "warm_up"):
            selection = None
            o = dense_attention(q, k, v, start=start, lengths=lengths)
            o = o if output_gate_logits is None else self._apply_gate(o, output_gate_logits)  # Eq. 10
        else:
            o, lse = self._sparse_attention(q, k, v, selection, start=start, output_gate_logits=output_gate_logits)
        if not learns:
            return o, None
        loss = self._indexer_kl_loss(  # Eq. 15
            q_idx,
            k_idx,
            head_logits,
            self.indexer.bias,
            q,
            k,
            indexer_scale=c.effective_indexer_scale,
            selection=selection,
            lse=lse,
            temperature=c.kl_temperature,
            start=start,
            lengths=lengths,
        )
        return o, loss

    def _add_variance(self, variance: Tensor, n_new: Tensor) -> None:
        """Add the rows of this forward pass to the pending mean of Eq. 8; never when a checkpoint recomputes it."""
        if self.training:
            valid = torch.arange(variance.shape[1], device=variance.device) < n_new[:, None]
            _add_rows(self.pending_variance_sum, self.pending_variance_count, variance, valid)

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
