"""Settings that make faults visible while kernels run."""

import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest import mock

import numpy as np
import torch

from gsa_fast import attention, budget, decode, indexer, selection, training
from gsa_fast._backend import INTERPRETED
from gsa_fast.attention import backward, bits, gather, masked, union
from gsa_fast.selection import streamed
from gsa_fast.selection.streamed import launch_thresholds
from gsa_fast.training import chain, student, teacher


def enable_interpreter_checks() -> None:
    """Make the Triton interpreter raise on int32 overflow, a failed `device_assert` and an address outside all tensors.

    By default it does none of these. Addresses are checked against the storages of the launch's arguments.
    """
    if INTERPRETED:
        from triton.runtime import interpreter

        interpreter.interpreter_builder.options = interpreter.InterpreterOptions(debug=True)
        if interpreter.GridExecutor._init_args_hst.__module__ != __name__:
            _check_addresses(interpreter)


def _check_addresses(interpreter: Any) -> None:
    executor, builder = interpreter.GridExecutor, interpreter.InterpreterBuilder
    init_args, load, store = executor._init_args_hst, builder.create_masked_load, builder.create_masked_store
    starts = ends = np.zeros(0, np.uint64)

    def init_and_remember(self: Any, args: Any, kwargs: Any) -> Any:
        nonlocal starts, ends
        hosts, named_hosts = init_args(self, args, kwargs)
        tensors = [x for x in (*hosts, *named_hosts.values()) if isinstance(x, torch.Tensor)]
        storages = {x.untyped_storage().data_ptr(): x.untyped_storage().nbytes() for x in tensors}
        starts = np.array(sorted(storages), np.uint64)
        ends = np.array([start + storages[start] for start in sorted(storages)], np.uint64)
        return hosts, named_hosts

    def check(pointers: Any, mask: Any, what: str) -> None:
        first = pointers.data[np.broadcast_to(mask.data, pointers.data.shape)]
        size = np.uint64(max(1, pointers.get_element_ty().primitive_bitwidth // 8))
        i = np.searchsorted(starts, first, side="right")
        outside = (i == 0) | (first + size > ends[i - 1])
        if outside.any():
            raise IndexError(f"{outside.sum()} of {outside.size} elements {what} lie outside the tensors of the launch")

    def checked_load(self: Any, pointers: Any, mask: Any, *rest: Any) -> Any:
        check(pointers, mask, "read")
        return load(self, pointers, mask, *rest)

    def checked_store(self: Any, pointers: Any, value: Any, mask: Any, *rest: Any) -> Any:
        check(pointers, mask, "written")
        return store(self, pointers, value, mask, *rest)

    executor._init_args_hst = init_and_remember
    builder.create_masked_load, builder.create_masked_store = checked_load, checked_store


@contextmanager
def poisoned_memory() -> Iterator[None]:
    """Fill what `torch.empty` returns with NaN (the largest integer for integer types): an unwritten element shows."""
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PyTorch's matmuls warn in this mode; NumPy inside the interpreter on NaN
        torch.use_deterministic_algorithms(True, warn_only=True)
        try:
            yield
        finally:
            torch.use_deterministic_algorithms(before[0], warn_only=before[1])


def unlucky_thresholds(*arguments: Any) -> None:
    """Sampled thresholds, but some higher and some lower: shortlists too short and too long must change nothing."""
    launch_thresholds(*arguments)
    first_row, threshold = arguments[-7], arguments[-2]
    luck = torch.tensor([1.0, 0.9, 1.03, 0.0, 1.1], device=threshold.device)
    luck = luck.roll(-first_row)  # a chunk may have one row only
    threshold.mul_(luck.repeat(len(threshold) // len(luck) + 1)[: len(threshold)])


@contextmanager
def attention_method(method: str) -> Iterator[None]:
    """Serve every shape of `sparse_attention` with one of its kernels."""
    with mock.patch.object(attention, "choose_method", return_value=method):
        yield


@contextmanager
def small_tiles(width: int = 16) -> Iterator[None]:
    """Launch with tiles of `width` and small chunks: the tiny shapes that an interpreter affords then span several."""
    with ExitStack() as stack:
        for module, name, value in (
            (indexer, "BLOCK_L", width),
            (indexer, "BLOCK_S", width),
            (budget, "MAX_TILE", width),
            (selection, "row_block", lambda S: width),
            (selection, "MAX_STATISTICS", 2),
            (selection, "CHUNK_BYTES", 80 * width),
            (streamed, "BLOCK_L", width),
            (streamed, "BLOCK_S", width),
            (streamed, "REDO_BLOCK_S", width),
            (streamed, "SPAN", 2 * width),
            (streamed, "CAPACITY", width),
            (streamed, "LARGE_CAPACITY", 4 * width),
            (streamed, "LARGEST_CAPACITY", 16 * width),
            (streamed, "MAX_STRIDE", width // 2),
            (streamed, "MIN_PROGRAMS", 3),
            (streamed, "CHUNK_BYTES", 256 * width),
            (streamed, "SAMPLE_BYTES", 16 * width),
            (streamed, "Z", 0.0),
            (streamed, "launch_thresholds", unlucky_thresholds),
            # The other way round than on a device: so tests of either dtype meet both orders. A device takes one only.
            *([(streamed, "keys_in_order", lambda dtype: dtype != torch.float32)] if INTERPRETED else []),
            (gather, "block_k", lambda block_d, dtype: width),
            (bits, "CHUNK_BYTES", 100 * width),  # of unions: one tile or several in a chunk, one chunk or several
            # The masked tiles' chunks take less memory: all rows would fit one.
            (masked, "rows_per_chunk", lambda B, L, queries, n_bytes: queries * min(2, -(-L // queries))),
            (decode, "MAX_GROUPS", width),
            (decode, "LARGEST_GROUPS", width),
            (decode, "segment_of", lambda K, shards: 8),
            (decode, "MAX_SHARDS", 4),
            (decode, "BOUND_ROWS", 2),
            (decode, "BLOCK_SCORES", width),
            (decode, "MAX_MEMBERS", 2),
            (decode, "BLOCK_SELECT", width),
            (decode, "TILE_BYTES", 0),
            (decode, "MAX_SPLITS", 2),
            (decode, "COMBINED", 0),
            *((module, "BLOCK_BROKEN", 2) for module in (bits, masked, union)),
            (union, "TILE_ROWS", width // 2),
            (union, "BLOCK_WORDS", 1),
            (union, "BLOCK_MEMBERS", 32),  # one word
            (masked, "TILE_ROWS", width // 2),
            (masked, "BLOCKS_AT_A_TIME", 1),
            (masked, "keys_per_block", lambda block_d, dtype: 16 * dtype.itemsize),  # two words for float32
            (union, "keys_per_block", lambda block_d, dtype: 32),
            (backward, "FLOAT32_TILE_ROWS", width // 2),
            (backward, "rows_per_chunk", lambda B, L, queries, n_bytes: queries * min(5, -(-L // queries))),
            (backward, "PART_COPIES", 0),
            (backward, "LEAST_PART_BYTES", 1024 * width),
            (backward, "SUM_PROGRAMS", 5),
            (backward, "TILES_AT_A_TIME", 2),
            (backward, "ENTRIES_AT_A_TIME", 2),
            (backward, "PARTS_AT_A_TIME", 2),
            (training, "CHUNK_BYTES", 160 * width),
            *((module, "block_k", lambda block_d, dtype: width) for module in (teacher, student)),
            *((module, "tile_rows", lambda width_, dtype: width) for module in (teacher, student, chain)),
        ):
            stack.enter_context(mock.patch.object(module, name, value))
        yield
