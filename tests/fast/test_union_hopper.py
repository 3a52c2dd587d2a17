"""The union tiles of sm_90: which calls they serve, that their products overlap, and, on a device, what they compute.

The interpreter has no Gluon. What it shows of `union.py` is shown for this kernel by comparison with it, on a device.
"""

import subprocess
from unittest import mock

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import gsa_fast
import gsa_ref
from gsa_fast.attention import union, union_hopper
from gsa_fast.verification.checks import numpy
from gsa_fast.verification.interpreter import attention_method
from gsa_ref import Selection, equations
from gsa_ref.check import attention_tolerance, error_budget, gate_tolerance
from tests.fast.helpers import examples, same
from tests.fast.test_compile import compile_sample

ON_DEVICE = torch.cuda.is_available() and torch.cuda.get_device_capability() == (9, 0)
needs_hopper = pytest.mark.skipif(not ON_DEVICE, reason="needs a device of compute capability 9.0")
PRODUCTS = """
import sys, torch
from unittest import mock
from triton.tools.disasm import get_sass
from gsa_fast.verification import compile as aot
with aot.recorded_launches() as launches:
    for call in aot.shipped_calls((getattr(torch, sys.argv[1]),), (64, 128), ((32, 8),)):
        call()
for launch in launches:
    if launch.kernel.__name__ == "union_attention_hopper_kernel":
        with mock.patch.object(aot, "_resource_usage", side_effect=lambda cubin: print(
            sum("HGMMA" in line for line in get_sass(cubin).splitlines()),
            sum("HGMMA" in line and "gsb0" in line for line in get_sass(cubin).splitlines())) or (0, 0)):
            aot.compile_launch(launch, 90)
"""


def serves(q, k, v, gate=None, scale=1.0, block_m=64) -> bool:
    with mock.patch.object(union_hopper, "on_hopper", return_value=True):
        return union_hopper.serves(q, k, v, q if gate is None else gate, scale, block_m)


def test_it_serves_only_what_it_can_copy_and_multiply():
    q, k = torch.zeros(1, 4, 8, 64, dtype=torch.bfloat16), torch.zeros(1, 8, 2, 64, dtype=torch.bfloat16)
    assert serves(q, k, k)
    assert serves(q.half(), k.half(), k.half())
    assert not serves(q.float(), k.float(), k.float())
    assert not serves(q, k, k, scale=0.0)  # the largest logit would not stay the largest
    assert not serves(q, k, k, scale=-1.0)
    assert not serves(q, k, k, block_m=32)
    narrow = torch.zeros(1, 8, 2, 96, dtype=torch.bfloat16)
    assert not serves(torch.zeros(1, 4, 8, 96, dtype=torch.bfloat16), narrow, narrow)
    padded = torch.zeros(1, 8, 2, 72, dtype=torch.bfloat16)[..., :64]  # rows at multiples of 144 bytes
    assert not serves(q, padded, k)
    assert not serves(q, k, padded)
    shifted = torch.zeros(8 * 128 + 1, dtype=torch.bfloat16)[1:].view(1, 8, 2, 64)
    assert not serves(q, shifted, k)
    transposed = torch.zeros(1, 8, 64, 2, dtype=torch.bfloat16).transpose(2, 3)
    assert not serves(q, k, transposed)
    assert not serves(q, k, k, gate=torch.zeros(1, 4, 64, 8, dtype=torch.bfloat16).transpose(2, 3))
    assert not union_hopper.on_hopper(torch.device("cpu"))


def test_offsets_are_32_bits_only_where_these_hold_the_last_position():
    x = torch.empty(1, 2, 1, 64, device="meta")
    assert union_hopper.is_narrow(x, x)
    wide = torch.empty_strided((1, 2**21, 1, 64), (2**31, 2**10, 64, 1), device="meta")
    assert not union_hopper.is_narrow(x, wide)
    assert union_hopper.is_narrow(torch.empty_strided((1, 2**21 - 1, 1, 64), (2**31, 2**10, 64, 1), device="meta"))


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_matrix_products_are_not_serialised(dtype):
    """Three products of several instructions each: the first, the next logits, the values. The compiler marks the end
    of each; it marks every instruction if it cannot keep two products under way."""
    run: subprocess.CompletedProcess[str] = compile_sample(dtype, PRODUCTS)
    assert run.returncode == 0, run.stderr
    lines = [tuple(map(int, line.split())) for line in run.stdout.splitlines()]
    assert len(lines) == 4  # head widths 64 and 128, with and without the output gate
    for instructions, ends in lines:
        assert ends == 3 < instructions


def attend(on_hopper, q, k, v, selection, **options):
    with mock.patch.object(union_hopper, "on_hopper", return_value=on_hopper), attention_method("union"):
        return gsa_fast.sparse_attention(q, k, v, selection, impl="triton", **options)


@st.composite
def calls(draw):
    """Arguments of `sparse_attention` that the kernel serves; lengths around multiples of its tiles."""
    g = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    dtype = draw(st.sampled_from((torch.bfloat16, torch.float16)))
    B, d_h = draw(st.integers(1, 2)), draw(st.sampled_from(union_hopper.HEAD_WIDTHS))
    group = draw(st.sampled_from((2, 3, 4, 5, 7, 8, 16, 21, 32, 64)))
    H_kv = draw(st.integers(1, 3))
    L = draw(st.sampled_from((1, 2, 31, 63, 64, 65, 130, 257, 400)))
    S = L + draw(st.sampled_from((0, 1, 63, 200)))
    K = draw(st.sampled_from((1, 5, 64, 100)))
    q = torch.randn(B, L, H_kv * group, d_h, generator=g).to(dtype).cuda()
    k, v = (torch.randn(B, S, H_kv, d_h, generator=g).to(dtype).cuda() for _ in range(2))
    scores = torch.rand(B, L, S, generator=g)
    scores.masked_fill_(torch.ones(L, S, dtype=torch.bool).triu(S - L + 1), float("-inf"))
    budget = torch.randint(0, K + 1, (B, L), generator=g, dtype=torch.int32)  # some rows select nothing
    selection = gsa_ref.select_tokens(scores, budget, width=K)
    gate = torch.randn(q.shape, generator=g).to(dtype).cuda() if draw(st.booleans()) else None
    return q, k, v, Selection(*(x.cuda() for x in selection)), {"output_gate_logits": gate}


@needs_hopper
@given(call=calls())
@examples(80)
def test_outputs_are_in_the_error_budget_and_reruns_are_bitwise_equal(call):
    """Some rows of each sequence, both ends among them, against the equations."""
    q, k, v, selection, options = call
    group = q.shape[2] // k.shape[2]
    assert union.queries_per_tile(group) * group > 32  # so it is served
    first = attend(True, q, k, v, selection, **options)
    assert same(first, attend(True, q, k, v, selection, **options))
    baseline = gsa_ref.sparse_attention(q, k, v, selection, **options)
    rows = sorted({0, len(q[0]) - 1, *range(0, len(q[0]), 29)})
    for b in range(len(q)):
        queries, keys, values = (numpy(x).astype(np.float64) for x in (q[b, rows], k[b], v[b]))
        S_t = [row[row >= 0] for row in numpy(selection.indices[b, rows])]
        gold, gold_lse = equations.sparse_attention(queries, keys, values, S_t)
        tolerance, lse_tolerance = attention_tolerance(queries, keys, values, S_t, q.dtype)
        if (gate := options["output_gate_logits"]) is not None:
            logits = numpy(gate[b, rows]).astype(np.float64)
            gold = equations.apply_gate(gold, logits)
            tolerance = tolerance + gate_tolerance(gold, logits, q.dtype)
        out, plain = numpy(first[0][b, rows]), numpy(baseline[0][b, rows])
        assert error_budget(out, plain, gold, q.dtype, tolerance=tolerance)
        lse, plain = numpy(first[1][b, rows]), numpy(baseline[1][b, rows])
        assert error_budget(lse, plain, gold_lse, torch.float32, tolerance=lse_tolerance)


@needs_hopper
@given(call=calls(), where=st.integers(0, 10**6), value=st.sampled_from((float("nan"), float("inf"))))
@examples(100)
def test_a_value_that_is_not_finite_reaches_exactly_the_rows_that_selected_it(call, where, value):
    q, k, v, selection, options = call
    position = where % k.shape[1]
    clean = attend(True, q, k, v, selection, **options)
    v = v.clone()
    v[0, position, 0, 3] = value
    found = attend(True, q, k, v, selection, **options)
    group = q.shape[2] // k.shape[2]
    touched = torch.zeros(q.shape[:3], dtype=torch.bool, device=q.device)
    touched[0, :, :group] = (selection.indices[0] == position).any(-1)[:, None]
    assert (~found[0][touched].isfinite()).any(-1).all()
    assert same(found[0][~touched], clean[0][~touched])
    assert same(found[1][~touched], clean[1][~touched])
