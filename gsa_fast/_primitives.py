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
def count_if(count, score, reach):
    """count + 1 where score ≥ reach, else count. In PTX, because `.to(tl.int32)` takes three instructions."""
    if INTERPRETED:
        return count + (score >= reach).to(tl.int32)
    else:
        return tl.inline_asm_elementwise(
            "{ .reg .pred p; setp.ge.f32 p, $2, $3; mov.b32 $0, $1; @p add.s32 $0, $0, 1; }",
            "=r,r,r,r", [count, score, reach], dtype=tl.int32, is_pure=True, pack=1,
        )  # fmt: skip


@triton.jit
def append_entry(pointer, step, score, reach, position):
    """Where score ≥ reach, store (score, position) as the int64 at pointer; return the pointer, there moved by step.

    The score's bits are the upper half. In PTX, because `tl.store` would first move the whole tile through shared
    memory into a layout for neighbouring addresses, and these are scattered.
    """
    if INTERPRETED:
        bits = score.to(tl.int32, bitcast=True).to(tl.int64)
        tl.store(pointer, (bits << 32) | position.to(tl.int64), mask=score >= reach)
        return pointer + step * (score >= reach).to(tl.int32)
    else:
        # `inline_asm_elementwise` broadcasts its arguments.
        moved = tl.inline_asm_elementwise(
            """
            {
            .reg .pred p;
            setp.ge.f32 p, $3, $4;
            @p st.global.v2.b32 [$1], {$5, $3};
            mov.b64 $0, $1;
            @p add.s64 $0, $0, $2;
            }
            """,
            "=l,l,l,r,r,r",
            [pointer.to(tl.int64), tl.cast(step, tl.int64) * 8, score, reach, position],
            dtype=tl.int64,
            is_pure=False,
            pack=1,
        )
        return moved.to(tl.pointer_type(tl.int64))


@triton.jit
def store_where(pointer, slot, value, mask):
    """Store the int32 value at pointer + slot, in PTX for the reason given in `append_entry`."""
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
