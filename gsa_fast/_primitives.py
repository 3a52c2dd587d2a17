"""Device functions that more than one kernel uses."""

import triton
import triton.language as tl
from triton import knobs


@triton.jit
def stable_sigmoid(x):
    """σ(x) in float32 without overflow: e is never raised to a positive power."""
    e = tl.exp(-tl.abs(x))
    return tl.where(x >= 0, 1.0, e) / (1.0 + e)


@triton.jit
def count_visible(position, length, S):
    """n_t: how many keys the query at `position` may see. 0 for a query that is padding itself."""
    return tl.where(position < length, tl.minimum(tl.minimum(position + 1, length), S), 0)


# Inline PTX does not run in the interpreter.
INTERPRETED = tl.constexpr(knobs.runtime.interpret)


@triton.jit
def fast_divide(a, b):
    """a / b within 2 ulp, for 2^−126 ≤ |b| ≤ 2^126."""
    if INTERPRETED:
        return a / b
    else:
        return tl.inline_asm_elementwise(
            "div.approx.ftz.f32 $0, $1, $2;", "=r,r,r", [a, b], dtype=tl.float32, is_pure=True, pack=1
        )


@triton.jit
def tanh_approximate(x):
    """tanh(x) with a relative error of 2^−11 (PTX ISA, tanh.approx.f32); the interpreter's is exact."""
    if INTERPRETED:
        return 2.0 / (1.0 + tl.exp(-2.0 * x)) - 1.0
    else:
        return tl.inline_asm_elementwise("tanh.approx.f32 $0, $1;", "=r,r", [x], dtype=tl.float32, is_pure=True, pack=1)


@triton.jit
def popcount(x):
    """How many bits of the int32 x are set."""
    if INTERPRETED:
        bits = x.to(tl.int64) & 0xFFFFFFFF
        pairs = bits - ((bits >> 1) & 0x55555555)
        fours = (pairs & 0x33333333) + ((pairs >> 2) & 0x33333333)
        eights = (fours + (fours >> 4)) & 0x0F0F0F0F
        return ((eights * 0x01010101 >> 24) & 0x3F).to(tl.int32)
    else:
        return tl.inline_asm_elementwise("popc.b32 $0, $1;", "=r,r", [x], dtype=tl.int32, is_pure=True, pack=1)


@triton.jit
def popcount_below(word, bit):
    """How many of the bits 0 … bit − 1 of the int32 word are set."""
    if INTERPRETED:
        return popcount(word & ~(tl.full(bit.shape, -1, tl.int32) << bit))
    else:
        return tl.inline_asm_elementwise(
            "{ .reg .b32 m; bmsk.clamp.b32 m, 0, $2; and.b32 m, m, $1; popc.b32 $0, m; }",
            "=r,r,r", [word, bit], dtype=tl.int32, is_pure=True, pack=1,
        )  # fmt: skip


@triton.jit
def store_entry_where(pointer, step, rank, score, position, mask):
    """Store (score, position) as the int64 at pointer + step · rank, the score's bits in the upper half.

    In PTX, because `tl.store` would first move the whole tile through shared memory into a layout for neighbouring
    addresses, and these are scattered.
    """
    if INTERPRETED:
        bits = score.to(tl.int32, bitcast=True).to(tl.int64)
        tl.store(pointer + step * rank, (bits << 32) | position.to(tl.int64), mask=mask)
    else:
        # `inline_asm_elementwise` broadcasts its arguments.
        tl.inline_asm_elementwise(
            """
            {
            .reg .pred p;
            .reg .b64 a;
            setp.ne.b32 p, $6, 0;
            mad.wide.s32 a, $3, $2, $1;
            @p st.global.v2.b32 [a], {$5, $4};
            mov.b32 $0, 0;
            }
            """,
            "=r,l,r,r,r,r,r",
            [pointer.to(tl.int64), tl.cast(step * 8, tl.int32), rank, score, position, mask.to(tl.int32)],
            dtype=tl.int32,
            is_pure=False,
            pack=1,
        )


@triton.jit
def store_where(pointer, slot, value, mask):
    """Store the int32 value at pointer + slot, in PTX for the reason given in `store_entry_where`."""
    if INTERPRETED:
        tl.store(pointer + slot, value, mask=mask)
    else:
        tl.inline_asm_elementwise(
            """
            {
            .reg .pred p;
            .reg .b64 a;
            setp.ne.b32 p, $4, 0;
            mad.wide.s32 a, $2, 4, $1;
            @p st.global.b32 [a], $3;
            mov.b32 $0, 0;
            }
            """,
            "=r,l,r,r,r",
            [pointer.to(tl.int64), slot, value, mask.to(tl.int32)],
            dtype=tl.int32,
            is_pure=False,
            pack=1,
        )
