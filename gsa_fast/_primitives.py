"""Device functions that more than one kernel uses."""

import triton
import triton.language as tl


@triton.jit
def stable_sigmoid(x):
    """σ(x) in float32 without overflow: e is never raised to a positive power."""
    e = tl.exp(-tl.abs(x))
    return tl.where(x >= 0, 1.0, e) / (1.0 + e)


@triton.jit
def count_visible(position, length, S):
    """n_t: how many keys the query at `position` may see. 0 for a query that is padding itself."""
    return tl.where(position < length, tl.minimum(tl.minimum(position + 1, length), S), 0)


@triton.jit
def popcount(x):
    """How many bits of an int32 are set: in pairs, then in fours, then in bytes."""
    x = x.to(tl.uint32, bitcast=True)
    x = x - ((x >> 1) & 0x55555555)
    x = (x & 0x33333333) + ((x >> 2) & 0x33333333)
    x = (x + (x >> 4)) & 0x0F0F0F0F
    x = x + (x >> 8)
    return ((x + (x >> 16)) & 63).to(tl.int32)
