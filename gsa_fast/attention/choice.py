"""Which kernel serves a call of `sparse_attention`: decided from its shape alone, so nothing waits for the device."""

from typing import NamedTuple

import torch

from gsa_fast._backend import KERNEL_DTYPES
from gsa_ref._arguments import check_int

# Below this many queries a tile has too few neighbours to share its keys with.
TILES_FROM_LENGTH = 128


class Choice(NamedTuple):
    """The method, "gather", "union" or "masked", and the reason in a sentence."""

    method: str
    reason: str


def explain_choice(
    *, L: int, S: int, K: int, H: int, H_kv: int, d_h: int, dtype: torch.dtype = torch.bfloat16
) -> Choice:
    """Which kernel `sparse_attention` runs for a shape, and why.

    "gather" loads the keys of every query on its own. "union" lets neighbouring queries load the union of their
    selections together. "masked" reads all keys in order, skips blocks that no query of a tile selected, and masks.

    Args:
        L: queries per sequence.
        S: keys per sequence.
        K: slots per selection.
        H, H_kv: query heads and key/value heads.
        d_h: width of a head.
        dtype: of q, k and v.

    Returns:
        The choice, which unpacks to (method, reason). It depends on nothing but the arguments.

    Raises:
        TypeError: an argument is not an int, or dtype is none that the kernels take.
        ValueError: a negative size, no head or channel, or H is not a multiple of H_kv.
    """
    for name, value in (("L", L), ("S", S), ("K", K)):
        check_int(name, value, 0)
    for name, value in (("H", H), ("H_kv", H_kv), ("d_h", d_h)):
        check_int(name, value, 1)
    if H % H_kv:
        raise ValueError(f"H: expected a multiple of H_kv = {H_kv}, got {H}")
    if dtype not in KERNEL_DTYPES:
        raise TypeError(f"dtype: expected float32, float16 or bfloat16, got {dtype}")
    return _choose(L, S, K, dtype)


def choose_method(*, L: int, S: int, K: int, H: int, H_kv: int, d_h: int, dtype: torch.dtype) -> str:
    """The method of `explain_choice`, for arguments that have been checked."""
    return _choose(L, S, K, dtype).method


def _choose(L: int, S: int, K: int, dtype: torch.dtype) -> Choice:
    if dtype == torch.float32:
        return Choice("gather", "float32 tiles of several queries do not fit the registers")
    if L < TILES_FROM_LENGTH:
        return Choice("gather", f"L = {L} is below {TILES_FROM_LENGTH}: too few neighbours to share keys with")
    if S <= K:
        return Choice("masked", f"S = {S} is at most K = {K}: selections may skip nothing")
    return Choice("union", f"S = {S} is above K = {K}: every selection skips keys")
