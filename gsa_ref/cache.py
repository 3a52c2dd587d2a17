"""Decoding cache of the layer: keys, gated values and indexer keys."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from gsa_ref._arguments import FLOATING, INT32_MAX, check_dense, check_dtype, check_int, check_same_device, check_tensor
from gsa_ref.config import GSAConfig, check_config


@dataclass
class GSACache:
    """Preallocated cache of one layer, with a length per sequence.

    It holds what later queries need: k after RoPE, v' after the value gate (Eq. 9 gates by the source token, so it
    never changes again), and k^I, without which the indexer could score nothing but the new token.

    A slot at or past its sequence's length holds 0, after every method: masked attention multiplies such a slot by a
    weight of 0, which a NaN would survive. Nothing grows by itself: a full cache refuses new tokens, see `grow`.
    A method that raises leaves the cache as it was.

    Attributes:
        k: [B, capacity, H_kv, d_h].
        v: gated values, [B, capacity, H_kv, d_h].
        k_idx: [B, capacity, d_I], or None for a variant without an indexer.
        lengths: int32 [B], number of tokens held per sequence. Changed in place, so that a captured CUDA graph, which
            knows a tensor by its address, finds the new values.
        longest: an upper bound on `lengths` that the host knows without asking the device. Replays of a CUDA graph
            append without Python: `advance` counts them.

    Raises:
        TypeError: wrong type or dtype.
        ValueError: wrong shape or device, or `longest` outside [0, capacity].
    """

    k: Tensor
    v: Tensor
    k_idx: Tensor | None
    lengths: Tensor
    longest: int = 0

    def __post_init__(self) -> None:
        sizes: dict[str, int] = {}
        check_tensor("k", self.k, "B capacity H_kv d_h", sizes, dtypes=FLOATING)
        check_tensor("v", self.v, "B capacity H_kv d_h", sizes, dtypes=(self.k.dtype,))
        if self.k_idx is not None:
            check_tensor("k_idx", self.k_idx, "B capacity d_I", sizes, dtypes=(self.k.dtype,))
        check_tensor("lengths", self.lengths, "B", sizes, dtypes=(torch.int32,))
        check_same_device(k=self.k, v=self.v, k_idx=self.k_idx, lengths=self.lengths)
        check_int("longest", self.longest, 0, self.capacity)

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
        """An empty cache for `batch_size` sequences of up to `capacity` tokens.

        Raises:
            TypeError: config is no GSAConfig, a size is not an int, dtype is no floating-point dtype, or device is
                none.
            ValueError: batch_size < 0, capacity < 1 or above what an int32 holds, or an unknown device.
        """
        check_config("config", config)
        check_int("batch_size", batch_size, 0)
        check_int("capacity", capacity, 1, INT32_MAX)
        check_dtype("dtype", dtype, FLOATING)
        device = _device(device)
        kv_shape = (batch_size, capacity, config.H_kv, config.d_h)
        return cls(
            k=torch.zeros(kv_shape, dtype=dtype, device=device),
            v=torch.zeros(kv_shape, dtype=dtype, device=device),
            k_idx=torch.zeros(batch_size, capacity, config.d_I, dtype=dtype, device=device) if config.sparse else None,
            lengths=torch.zeros(batch_size, dtype=torch.int32, device=device),
        )

    @staticmethod
    def bytes_per_token(config: GSAConfig, *, dtype: torch.dtype = torch.float32) -> int:
        """Bytes that one token of one sequence takes in one layer: (2 · H_kv · d_h + d_I) · bytes of a number.

        d_I counts for variants with an indexer only. A cache takes batch_size · capacity times as much, used or not.

        Raises:
            TypeError: config is no GSAConfig, or dtype no floating-point dtype.
        """
        check_config("config", config)
        check_dtype("dtype", dtype, FLOATING)
        return (2 * config.H_kv * config.d_h + config.sparse * config.d_I) * dtype.itemsize

    @property
    def capacity(self) -> int:
        """Number of tokens that one sequence can hold."""
        return self.k.shape[1]

    def check(self, config: GSAConfig, batch_size: int, n_new: int, like: Tensor) -> None:
        """Check that `n_new` tokens per sequence of this batch and config fit, before anything is written.

        Raises:
            TypeError: wrong type, or the cache has another dtype than `like`.
            ValueError: a negative size; another batch size, config or device, or the cache is full.
        """
        check_config("config", config)
        check_int("batch_size", batch_size, 0)
        check_int("n_new", n_new, 0)
        check_dense("like", like)
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
        self._check_room(n_new)

    def _check_room(self, n_new: int) -> None:
        longest = self.longest
        if longest + n_new > self.capacity and len(self.lengths):
            # The bound may be too high after right-padded batches: ask the device before refusing.
            longest = int(self.lengths.max())
        if longest + n_new > self.capacity:
            raise ValueError(
                f"cache: expected room for {n_new} more tokens, got {longest} of {self.capacity} slots in use"
            )
        self.longest = longest  # a refused call leaves the bound too: replays that it counts may be under way

    def append(self, k: Tensor, v: Tensor, k_idx: Tensor | None, n_new: Tensor) -> None:
        """Write the new rows behind each sequence's own end, in place. The caller has called `check`. Never waits.

        Args:
            k, v: [B, L, H_kv, d_h].
            k_idx: [B, L, d_I] or None.
            n_new: int32 [B], how many of the L rows are valid; the rest is padding.
        """
        L = k.shape[1]
        slot = self.lengths.long()[:, None] + torch.arange(L, device=k.device)
        row = torch.arange(k.shape[0], device=k.device)[:, None].expand_as(slot)
        valid = torch.arange(L, device=k.device) < n_new[:, None]
        # A padding row lands on a free slot, which holds 0 and keeps it: so the shapes do not depend on n_new.
        for buffer, new in ((self.k, k), (self.v, v), (self.k_idx, k_idx)):
            if buffer is not None and new is not None:
                keep = valid.reshape(*valid.shape, *[1] * (new.dim() - 2))
                buffer[row, slot] = new.detach().masked_fill(~keep, 0)
        self.lengths += n_new
        self.longest += L

    def advance(self, n_new: int) -> None:
        """Raise the bound by `n_new` tokens, for replays of a captured CUDA graph that append them on the device.

        To be called before the replays, and other methods after the last of them: with a bound that is too low,
        `truncate` and `reorder` would miss tokens, and a replay on a full cache would write past its end. A bound that
        is too high costs nothing but a look at the device when the cache seems full.

        Raises:
            TypeError: n_new is not an int.
            ValueError: n_new < 0, or the cache has no room for that many.
        """
        check_int("n_new", n_new, 0)
        self._check_room(n_new)
        self.longest += n_new

    def truncate(self, lengths: int | Tensor) -> None:
        """Keep the first tokens of each sequence and forget the rest, in place: rollback in speculative decoding.

        `truncate(0)` empties the cache.

        Args:
            lengths: an int, at most `longest`: a sequence that holds fewer tokens keeps what it has, and nothing waits
                for the device. Or int32 [B], with 0 ≤ lengths[b] ≤ the tokens that sequence b holds: to check that,
                the call waits for the device.

        Raises:
            TypeError: neither an int nor an int32 tensor.
            ValueError: wrong shape or device, a negative length, or more tokens than are held.
        """
        held = self.longest
        if isinstance(lengths, Tensor):
            check_tensor("lengths", lengths, "B", {"B": self.k.shape[0]}, dtypes=(torch.int32,))
            check_same_device(cache=self.k, lengths=lengths)
            kept = lengths.tolist()
            for b, (n, most) in enumerate(zip(kept, self.lengths.tolist(), strict=True)):
                if not 0 <= n <= most:
                    raise ValueError(f"lengths: expected 0 to {most} tokens, as sequence {b} holds, got {n}")
            first, self.longest = min(kept, default=0), max(kept, default=0)
            self.lengths.copy_(lengths)
        else:
            check_int("lengths", lengths, 0)
            if lengths > held:
                raise ValueError(f"lengths: expected at most {held} tokens, got {lengths}")
            first = self.longest = lengths
            self.lengths.clamp_(max=lengths)
        free = torch.arange(first, held, device=self.k.device) >= self.lengths[:, None]
        for buffer in (self.k, self.v, self.k_idx):
            if buffer is not None:
                buffer[:, first:held].masked_fill_(free.reshape(*free.shape, *[1] * (buffer.dim() - 2)), 0)

    def reorder(self, index: Tensor) -> None:
        """Let sequence i become the former sequence index[i], as beam search does with the beams that live on.

        An index of B entries is applied in place. One of another length, which turns prompts into beams or drops
        sequences that have ended, replaces all tensors by new ones of that batch size.

        Args:
            index: int32 or int64 [B']; an entry may repeat. To check its values, the call waits for the device.

        Raises:
            TypeError: not an int32 or int64 tensor.
            ValueError: wrong shape or device, or an entry outside [0, B).
        """
        B = self.k.shape[0]
        check_tensor("index", index, "B'", {}, dtypes=(torch.int32, torch.int64))
        check_same_device(cache=self.k, index=index)
        for i, b in enumerate(index.tolist()):
            if not 0 <= b < B:
                raise ValueError(f"index: expected values in [0, {B}), got {b} at position {i}")
        if len(index) != B:
            self._replace(lambda buffer: buffer.index_select(0, index))
            self.lengths = self.lengths.index_select(0, index)
            return
        for tensor in (self.k, self.v, self.k_idx):
            if tensor is not None:
                used = tensor[:, : self.longest]
                used.copy_(used.index_select(0, index))
        self.lengths.copy_(self.lengths.index_select(0, index))

    def grow(self, capacity: int) -> None:
        """Make room for `capacity` tokens per sequence by copying into larger buffers; old and new exist meanwhile.

        What knows the buffers by their addresses, such as a captured CUDA graph, must be made again.

        Raises:
            TypeError: capacity is not an int.
            ValueError: capacity is below the present one, or above what an int32 holds.
        """
        check_int("capacity", capacity, self.capacity, INT32_MAX)
        if capacity > self.capacity:
            more = capacity - self.capacity
            self._replace(lambda buffer: torch.cat((buffer, buffer.new_zeros(len(buffer), more, *buffer.shape[2:])), 1))

    def _replace(self, make: Callable[[Tensor], Tensor]) -> None:
        # All new tensors first: running out of memory half way must not leave a cache of two sizes.
        k, v, k_idx = make(self.k), make(self.v), None if self.k_idx is None else make(self.k_idx)
        self.k, self.v, self.k_idx = k, v, k_idx


def _device(device: Any) -> torch.device:
    if not isinstance(device, torch.device | str):
        raise TypeError(f"device: expected a torch.device or a str, got {type(device).__name__} {device!r}")
    try:
        return torch.device(device)
    except RuntimeError as error:
        raise ValueError(f"device: expected a device that PyTorch knows, got {device!r}") from error
