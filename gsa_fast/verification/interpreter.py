"""Settings that make faults visible while kernels run."""

import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest import mock

import torch

from gsa_fast import attention, budget, decode, indexer, selection, training
from gsa_fast._backend import INTERPRETED
from gsa_fast.attention import backward, bits, gather, masked, union
from gsa_fast.selection import streamed
from gsa_fast.selection.streamed import launch_thresholds
from gsa_fast.training import chain, student, teacher


def enable_interpreter_checks() -> None:
    """Make the Triton interpreter raise on int32 overflow and a failed `device_assert`; by default it does neither."""
    if INTERPRETED:
        from triton.runtime import interpreter

        interpreter.interpreter_builder.options = interpreter.InterpreterOptions(debug=True)


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
    threshold = arguments[-2]
    luck = torch.tensor([1.0, 0.9, 1.03, 0.0, 1.1], device=threshold.device)
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
            (streamed, "SPAN", 2 * width),
            (streamed, "CAPACITY", width),
            (streamed, "LARGE_CAPACITY", 4 * width),
            (streamed, "LARGEST_CAPACITY", 4 * width),
            (streamed, "MIN_PROGRAMS", 3),
            (streamed, "CHUNK_BYTES", 128 * width),
            (streamed, "SAMPLE_BYTES", 16 * width),
            (streamed, "Z", 0.0),
            (streamed, "launch_thresholds", unlucky_thresholds),
            (gather, "block_k", lambda block_d, dtype: width),
            (bits, "CHUNK_BYTES", 20 * width),
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
            (masked, "keys_per_block", lambda block_d, dtype: 128 // dtype.itemsize),
            (union, "keys_per_block", lambda block_d, dtype: 32),
            (backward, "FLOAT32_TILE_ROWS", width // 2),
            (backward, "rows_per_chunk", lambda B, L, queries, n_bytes: queries * min(5, -(-L // queries))),
            (backward, "PART_COPIES", 0),
            (backward, "LEAST_PART_BYTES", 1024 * width),
            (backward, "SUM_PROGRAMS", 5),
            (backward, "TILES_AT_A_TIME", 2),
            (backward, "PARTS_AT_A_TIME", 2),
            (training, "CHUNK_BYTES", 160 * width),
            *((module, "block_k", lambda block_d, dtype: width) for module in (teacher, student)),
            *((module, "tile_rows", lambda width_, dtype: width) for module in (teacher, student, chain)),
        ):
            stack.enter_context(mock.patch.object(module, name, value))
        yield
