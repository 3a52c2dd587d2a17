"""Gradients of sparse attention and the contracts of the backward pass."""

import dataclasses

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import gsa_fast
import gsa_ref
from gsa_fast.attention import backward
from gsa_fast.attention.union_backward_hopper import channels_in_order
from gsa_fast.verification.interpreter import small_tiles
from gsa_ref import Selection
from gsa_ref.cases import Limits, attention_backward_cases
from tests.fast.helpers import (
    DTYPES,
    SEVERAL_TILES,
    alone,
    assert_in_budget,
    contiguous,
    examples,
    int32,
    same,
    widely_strided,
)

NAMES = ("q", "k", "v", "value_gate_logits", "output_gate_logits")
FEW = Limits(B=2, L=8, S=24, heads=2, group=3, width=16)


def gradients(function, arguments, dout, dlse=None, **options):
    """The gradient of every argument that has one, by name."""
    leaves = {name: arguments[name].detach().requires_grad_() for name in NAMES if arguments.get(name) is not None}
    out, lse = function(**{**arguments, **leaves}, **options)
    outputs, weights = ([out], [dout]) if dlse is None else ([out, lse], [dout, dlse])
    return dict(zip(leaves, torch.autograd.grad(outputs, list(leaves.values()), weights), strict=True))


def draw(seed, device, B=1, L=7, S=11, H_kv=2, group=2, d_h=8, K=5, dtype=torch.float32):
    """Random arguments with both gates, every row with a selection, and the gradient of the output."""
    g = torch.Generator().manual_seed(seed)

    def tensor(*shape):
        return torch.randn(shape, generator=g).to(dtype).to(device)

    indices = torch.full((B, L, K), -1, dtype=torch.int32)
    for b in range(B):
        for t in range(L):
            chosen = torch.randperm(S - L + t + 1, generator=g)[:K].sort().values
            indices[b, t, : len(chosen)] = chosen.to(torch.int32)
    selection = Selection(indices.to(device), (indices >= 0).sum(-1, dtype=torch.int32).to(device))
    query, key = (B, L, H_kv * group, d_h), (B, S, H_kv, d_h)
    arguments = {"q": tensor(*query), "k": tensor(*key), "v": tensor(*key), "selection": selection}
    arguments |= {"value_gate_logits": tensor(*key), "output_gate_logits": tensor(*query)}
    return arguments, tensor(*query)


@pytest.mark.property(47, 49, 57)
@pytest.mark.pitfall("reruns-differ")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.usefixtures("bf16")
@examples(4)
@given(data=st.data())
def test_gradients_are_within_the_error_budget(data, dtype, device):
    """With proven bounds for small cases: in a fixed order, atomically, and rerun."""
    assert_in_budget(data.draw(attention_backward_cases(dtype, FEW)), device)


@pytest.mark.property(47)
@pytest.mark.parametrize("dtype", ["float32", "float16"])
@examples(2)
@given(data=st.data())
def test_gradients_over_several_tiles_chunks_and_rounds_are_within_the_error_budget(data, dtype, device):
    case = data.draw(attention_backward_cases(dtype, SEVERAL_TILES))
    with small_tiles():
        assert_in_budget(case, device)


@pytest.mark.property(48)
@examples(3)
@given(seed=st.integers(0, 2**16), power=st.integers(-6, 6))
def test_the_backward_pass_is_linear_in_its_input(seed, power, device):
    """A power of two times dout gives that times every gradient, bit for bit, and 0 gives 0."""
    arguments, dout = draw(seed, device)
    plain = gradients(gsa_fast.sparse_attention, arguments, dout, impl="triton")
    scaled = gradients(gsa_fast.sparse_attention, arguments, dout * 2.0**power, impl="triton")
    for name, gradient in plain.items():
        assert torch.equal(scaled[name], gradient * 2.0**power), name
    zero = gradients(gsa_fast.sparse_attention, arguments, torch.zeros_like(dout), impl="triton")
    assert not any(gradient.any() for gradient in zero.values())


@pytest.mark.property(50)
@examples(3)
@given(seed=st.integers(0, 2**16))
def test_adding_a_constant_to_every_key_moves_lse_alone(seed, device):
    """Σ_s dS = dlse per row, so the key direction q·Σ_s dk carries dlse and nothing of dout."""
    arguments, dout = draw(seed, device, group=1)
    unused = gradients(gsa_fast.sparse_attention, arguments, dout, impl="triton")["k"]
    # Σ_s dk = scale Σ_t (Σ_s dS) q[t] = 0 when lse has no gradient.
    assert unused.sum(1).abs().max() < 1e-5 * (1 + unused.abs().sum(1).max())
    dlse = torch.randn(dout.shape[:3], generator=torch.Generator().manual_seed(seed)).to(device)
    dk = gradients(gsa_fast.sparse_attention, arguments, torch.zeros_like(dout), dlse, impl="triton")["k"]
    expected = arguments["k"].shape[-1] ** -0.5 * torch.einsum("blh,blhd->bhd", dlse, arguments["q"])
    torch.testing.assert_close(dk.sum(1), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.property(49)
@pytest.mark.pitfall("nan-in-the-backward-pass")
def test_a_key_that_nobody_selected_gets_exactly_0_whatever_it_holds(device):
    """With NaN in the unselected rows."""
    arguments, dout = draw(0, device)
    indices = torch.tensor([[[0, 2, 4, -1, -1]] * 7], dtype=torch.int32, device=device)
    arguments["selection"] = Selection(indices, int32([[3] * 7], device))
    for name in ("k", "v", "value_gate_logits"):
        arguments[name][:, 3] = torch.nan
    for deterministic in (True, False):
        found = gradients(gsa_fast.sparse_attention, arguments, dout, deterministic=deterministic, impl="triton")
        assert not found["k"][:, 3].any()
        assert not found["k"][:, 5:].any()
        assert all(found[name].isfinite().all() for name in ("q", "k", "output_gate_logits"))
        assert found["v"][:, 4].any()


@pytest.mark.pitfall("nan-in-the-backward-pass")
def test_rows_without_a_selection_get_0_and_give_nothing(device):
    arguments, dout = draw(1, device)
    counts = arguments["selection"].counts.clone()
    counts[:, 2:5] = 0
    arguments["selection"] = Selection(arguments["selection"].indices, counts)
    for deterministic in (True, False):
        found = gradients(gsa_fast.sparse_attention, arguments, dout, deterministic=deterministic, impl="triton")
        assert not found["q"][:, 2:5].any()
        assert found["q"][:, 5].any()
        other = gradients(
            gsa_fast.sparse_attention,
            arguments,
            dout.index_fill(1, torch.arange(2, 5, device=device), 1e4),
            deterministic=deterministic,
            impl="triton",
        )
        assert torch.allclose(found["v"], other["v"])


@pytest.mark.pitfall("length-zero")
@pytest.mark.parametrize("deterministic", [True, False])
def test_tensors_without_elements_get_empty_gradients(deterministic, device):
    for sizes in ({"B": 0}, {"L": 0, "S": 4}):
        arguments, dout = draw(0, device, **sizes)
        found = gradients(gsa_fast.sparse_attention, arguments, dout, deterministic=deterministic, impl="triton")
        for name, gradient in found.items():
            assert gradient.shape == arguments[name].shape
            assert not gradient.any()


@pytest.mark.pitfall("transposed-input")
@pytest.mark.property(9)
@pytest.mark.parametrize("layout", ["expanded", "transposed"])
def test_any_strides_of_the_output_gradient_give_the_same_bits(layout, device):
    arguments, dout = draw(2, device)
    if layout == "expanded":  # what a sum over the output gives
        dout = dout[:1, :1, :1, :1].expand(dout.shape)
    else:
        dout = dout.transpose(1, 3).contiguous().transpose(1, 3)
    given_strides = gradients(gsa_fast.sparse_attention, arguments, dout, impl="triton")
    plain = gradients(gsa_fast.sparse_attention, arguments, dout.contiguous(), impl="triton")
    assert all(same(given_strides[name], plain[name]) for name in plain)


@pytest.mark.property(9)
@examples(3)
@given(attention_backward_cases("float32", FEW).filter(lambda case: case.layout != "contiguous"))
def test_strided_inputs_give_the_bits_of_contiguous_ones(device, case):
    arguments, (dout, dlse) = case.arguments(device), case.output_gradients(device)
    strided = gradients(gsa_fast.sparse_attention, arguments, dout, dlse, impl="triton")
    plain = contiguous({**arguments, "dout": dout, "dlse": dlse})
    dout, dlse = plain.pop("dout"), plain.pop("dlse")
    expected = gradients(gsa_fast.sparse_attention, plain, dout, dlse, impl="triton")
    assert all(same(strided[name], expected[name]) for name in expected)


@pytest.mark.property(6)
@examples(3)
@given(attention_backward_cases("float32", FEW).map(lambda case: dataclasses.replace(case, B=2)))
def test_a_batch_slice_equals_the_sequence_alone_bitwise(device, case):
    arguments, (dout, dlse) = case.arguments(device), case.output_gradients(device)
    together = gradients(gsa_fast.sparse_attention, arguments, dout, dlse, impl="triton")
    for b in range(case.B):
        one = slice(b, b + 1)
        each = gradients(gsa_fast.sparse_attention, alone(arguments, b), dout[one], dlse[one], impl="triton")
        assert all(same(each[name], together[name][one]) for name in each)


DIMENSIONS = {
    "q": "B L H_kv d_h", "k": "B S H_kv d_h", "v": "B S H_kv d_h", "dout": "B L H_kv d_h", "indices": "B L K",
    "counts": "B L",
}  # fmt: skip
WIDE = [(name, axis) for name, dimensions in DIMENSIONS.items() for axis in range(len(dimensions.split()))]


@pytest.mark.pitfall("int32-strides")
@pytest.mark.parametrize(("name", "axis"), WIDE)
def test_strides_past_two_to_the_31_do_not_wrap(name, axis, device):
    """Offsets are 64-bit along every axis: index · stride reaches 2^31, though both fit into 32 bits."""
    sizes = {"B": 1, "L": 1, "S": 3, "H_kv": 1, "d_h": 2, "K": 2, DIMENSIONS[name].split()[axis]: 3}
    arguments, dout = draw(axis, device, group=1, **sizes)
    del arguments["value_gate_logits"], arguments["output_gate_logits"]  # the gate kernels read them
    wide = {**arguments, "dout": dout, **arguments["selection"]._asdict()}
    wide[name] = widely_strided(tuple(wide[name].shape), axis, device, wide[name].dtype).copy_(wide[name])
    wide["selection"] = Selection(wide.pop("indices"), wide.pop("counts"))
    expected = gradients(gsa_fast.sparse_attention, arguments, dout, impl="triton")
    found = gradients(gsa_fast.sparse_attention, wide, wide.pop("dout"), impl="triton")
    assert all(same(found[name], expected[name]) for name in expected)


def test_rounds_change_only_roundings(device, monkeypatch):
    """The rounds of the buffer split the sum of a key's parts in other places, and nothing else."""
    arguments, dout = draw(3, device, L=24, S=40, K=9)
    whole = gradients(gsa_fast.sparse_attention, arguments, dout, impl="triton")
    monkeypatch.setattr(backward, "PART_COPIES", 0)
    for n_bytes in (1, 600, 5000):
        monkeypatch.setattr(backward, "LEAST_PART_BYTES", max(n_bytes, 2 * 2 * 8 * 4))
        split = gradients(gsa_fast.sparse_attention, arguments, dout, impl="triton")
        for name in whole:
            torch.testing.assert_close(split[name], whole[name], rtol=1e-5, atol=1e-6, msg=name)


def test_float32_tiles_beyond_the_shared_memory_of_a_device_are_refused(device, monkeypatch):
    """On devices with 99 KiB a launch would fail; those that fit have gradients as ever."""
    monkeypatch.setattr(backward._backend, "little_shared_memory", lambda device: True)
    arguments, dout = draw(4, device, L=3, S=5, K=2, d_h=backward.FLOAT32_WIDTH + 2)
    with pytest.raises(ValueError, match=r"^q: .*at most 128 channels .*less than 128 KiB .*got float32 with 130"):
        gradients(gsa_fast.sparse_attention, arguments, dout, impl="triton")
    gradients(gsa_fast.sparse_attention, *draw(4, device, L=3, S=5, K=2, d_h=backward.FLOAT32_WIDTH), impl="triton")


@pytest.mark.parametrize(("d_h", "run"), [(64, 8), (128, 8), (64, 4), (128, 4)])
def test_places_of_a_thread_are_a_permutation_that_is_undone(d_h, run):
    """Channel 8i + 2j + e of thread j lies at e + 2 (i mod run/2) + run j + 4 run ⌊i / (run/2)⌋."""
    places = torch.empty(d_h, dtype=torch.int64)
    for channel in range(d_h):
        i, j, e = channel // 8, channel % 8 // 2, channel % 2
        places[e + 2 * (i % (run // 2)) + run * j + 4 * run * (i // (run // 2))] = channel
    assert torch.equal(channels_in_order(places, run), torch.arange(d_h))


def test_deterministic_has_to_be_a_bool(device):
    arguments, _ = draw(0, device)
    with pytest.raises(TypeError, match=r"^deterministic: expected a bool, got int"):
        gsa_fast.sparse_attention(**arguments, deterministic=1, impl="triton")


def test_ops_keep_the_contract_of_custom_ops(device):
    arguments, dout = draw(4, device)
    q, k, v = (arguments[name].requires_grad_() for name in "qkv")
    indices, counts = arguments["selection"]
    gate = arguments["output_gate_logits"].requires_grad_()
    inputs = (q, k, v, indices, counts, int32([4], device), gate, 0.3, True)
    # Tolerances of the gradients under compilation: those of the dtype.
    torch.library.opcheck(torch.ops.gsa_fast.sparse_attention.default, inputs)
    out, lse = torch.ops.gsa_fast.sparse_attention(*inputs)
    tensors = [x.detach() for x in (q, k, v, indices, counts, inputs[5], gate, out, lse)]
    for given_gate in (tensors[6], None):
        tensors[6] = given_gate
        torch.library.opcheck(torch.ops.gsa_fast.sparse_attention_backward.default, (dout, None, *tensors, 0.3, True))
    torch.library.opcheck(torch.ops.gsa_fast.apply_gate.default, (q, gate))
    torch.library.opcheck(torch.ops.gsa_fast.apply_gate_backward.default, (dout, q.detach(), gate.detach()))


@pytest.mark.property(55)
def test_compiled_gradients_are_the_eager_ones(device):
    arguments, dout = draw(5, device)
    compiled = torch.compile(gsa_fast.sparse_attention, fullgraph=True, backend="aot_eager")
    eager = gradients(gsa_fast.sparse_attention, arguments, dout, impl="triton")
    found = gradients(compiled, arguments, dout, impl="triton")
    assert all(same(found[name], eager[name]) for name in eager)


@pytest.mark.property(47)
@pytest.mark.usefixtures("bf16")
@pytest.mark.parametrize("dtype", ["float32", "float16"])
@examples(8)
@given(seed=st.integers(0, 2**16), gate_dtype=st.sampled_from(DTYPES))
def test_gate_gradients_are_those_of_the_reference(seed, gate_dtype, dtype, device):
    g = torch.Generator().manual_seed(seed)
    x, logits, dout = (torch.randn(2, 3, 5, 7, generator=g).to(device) for _ in range(3))
    x, dout, logits = x.to(getattr(torch, dtype)), dout.to(getattr(torch, dtype)), 4 * logits
    logits = logits.to(getattr(torch, gate_dtype))
    found, expected = [], []
    for function, results, wide in ((gsa_fast.apply_gate, found, False), (gsa_ref.apply_gate, expected, True)):
        leaves = [t.detach().double() if wide else t.detach() for t in (x, logits)]
        leaves = [leaf.requires_grad_() for leaf in leaves]
        options = {} if wide else {"impl": "triton"}
        results += torch.autograd.grad(function(*leaves, **options), leaves, dout.double() if wide else dout)
    for ours, gold in zip(found, expected, strict=True):
        u = torch.finfo(ours.dtype).eps / 2
        bound = (u + 40 * 2.0**-24) * gold.abs() + torch.finfo(ours.dtype).smallest_normal * 2 * u
        assert ((ours.double() - gold).abs() <= bound).all()
