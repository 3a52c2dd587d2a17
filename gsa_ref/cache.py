"""Decoding cache of the layer: keys, gated values and indexer keys."""

from dataclasses import dataclass

import torch
from torch import Tensor

from gsa_ref._arguments import check_int
from gsa_ref.config import GSAConfig


@dataclass
class GSACache:
    """Preallocated cache of one layer, with a length per sequence.

    It holds what later queries need: k after RoPE, v' after the value gate (Eq. 9 gates by the source token, so it
    never changes again), and k^I, without which the indexer could score nothing but the new token.

    Attributes:
        k: [B, capacity, H_kv, d_h].
        v: gated values, [B, capacity, H_kv, d_h].
        k_idx: [B, capacity, d_I], or None for a variant without an indexer.
        lengths: int32 [B], number of tokens held per sequence.
        longest: an upper bound on `lengths` that the host knows without asking the device.
    """

    k: Tensor
    v: Tensor
    k_idx: Tensor | None
    lengths: Tensor
    longest: int = 0

    @classmethod
    def allocate(
        cls,
        config: GSAConfig,
        batch_size: int,
        capacity: int,
        *,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> "GSACache":
        """An empty cache for `batch_size` sequences of up to `capacity` tokens."""
        check_int("batch_size", batch_size, 0)
        check_int("capacity", capacity, 1)
        kv_shape = (batch_size, capacity, config.H_kv, config.d_h)
        return cls(
            k=torch.zeros(kv_shape, dtype=dtype, device=device),
            v=torch.zeros(kv_shape, dtype=dtype, device=device),
            k_idx=torch.zeros(batch_size, capacity, config.d_I, dtype=dtype, device=device) if config.sparse else None,
            lengths=torch.zeros(batch_size, dtype=torch.int32, device=device),
        )

    @property
    def capacity(self) -> int:
        """Number of tokens that one sequence can hold."""
        return self.k.shape[1]

    def check(self, config: GSAConfig, batch_size: int, n_new: int, like: Tensor) -> None:
        """Check that `n_new` tokens per sequence of this batch and config fit, before anything is written.

        Raises:
            TypeError: the cache has another dtype than `like`.
            ValueError: another batch size, config or device, or the cache is full.
        """
        expected = [batch_size, self.capacity, config.H_kv, config.d_h]
        if self.k.shape[0] != batch_size:
            raise ValueError(f"cache: expected batch size {batch_size} as h, got {self.k.shape[0]}")
        if list(self.k.shape) != expected or (self.k_idx is not None) != config.sparse:
            held = "with" if self.k_idx is not None else "without"
            raise ValueError(
                f"cache: expected keys {expected}, sparse={config.sparse}, got {list(self.k.shape)} {held} k_idx"
            )
        if self.k_idx is not None and self.k_idx.shape[-1] != config.d_I:
            raise ValueError(f"cache: expected indexer keys of width d_I = {config.d_I}, got {self.k_idx.shape[-1]}")
        if self.k.dtype != like.dtype:
            raise TypeError(f"cache: expected dtype {like.dtype}, got {self.k.dtype}")
        if self.k.device != like.device:
            raise ValueError(f"cache: expected device {like.device}, got {self.k.device}")
        if self.longest + n_new > self.capacity and batch_size:
            # The bound may be too high after right-padded batches: ask the device before refusing.
            self.longest = int(self.lengths.max())
        if self.longest + n_new > self.capacity:
            raise ValueError(
                f"cache: expected room for {n_new} more tokens, got {self.longest} of {self.capacity} slots in use"
            )

    def append(self, k: Tensor, v: Tensor, k_idx: Tensor | None, n_new: Tensor) -> None:
        """Write the new rows behind each sequence's own end, in place. The caller has called `check`.

        Args:
            k, v: [B, L, H_kv, d_h].
            k_idx: [B, L, d_I] or None.
            n_new: int32 [B], how many of the L rows are valid; the rest is padding.
        """
        L = k.shape[1]
        slot = self.lengths.long()[:, None] + torch.arange(L, device=k.device)
        row = torch.arange(k.shape[0], device=k.device)[:, None].expand_as(slot)
        valid = torch.arange(L, device=k.device) < n_new[:, None]
        # A padding row is written as 0 over what the slot holds (0): it may lie anywhere in the free part.
        for buffer, new in ((self.k, k), (self.v, v), (self.k_idx, k_idx)):
            if buffer is not None and new is not None:
                keep = valid.reshape(*valid.shape, *[1] * (new.dim() - 2))
                buffer[row, slot] = new.detach().masked_fill(~keep, 0)
        self.lengths = self.lengths + n_new
        self.longest += L
