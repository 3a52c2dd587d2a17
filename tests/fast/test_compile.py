"""Every kernel compiles ahead of time and fits sm_80 or sm_90, the largest tiles also sm_86."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from gsa_fast.verification.compile import torn_reductions

ROOT = Path(__file__).parents[2]
SAMPLE = """
import sys, torch
from gsa_fast.verification.compile import compile_shipped
dtype = getattr(torch, sys.argv[1])
for k in compile_shipped((int(sys.argv[2]),), (dtype,), (96, 128), ((32, 8),), jobs=2):
    print(k.target, k.kernel, k.shared_memory, k.shared_memory_limit, k.registers, k.stack, k.fits)
"""
STREAMED = """
import sys, torch
from gsa_fast.verification.compile import compile_launch, recorded_launches, shipped_calls
with recorded_launches() as launches:
    for call in shipped_calls((getattr(torch, sys.argv[1]),), (64,), ((32, 8),)):
        call()
for launch in launches:
    if launch.kernel.__name__ == "shortlist_kernel" and dict(launch.constants)["d_I"] == 64:
        used = [compile_launch(launch, capability) for capability in (80, 90)]
        print(dict(launch.constants)["APPROXIMATE"], dict(launch.options)["maxnreg"], *(k.registers for k in used))
"""
# The kernels with the largest tiles, for the widest heads, as they are launched where shared memory is little.
WIDE = """
import sys, torch
from gsa_fast.verification.compile import compile_launch, recorded_launches, shipped_calls
with recorded_launches(little_shared_memory=True) as launches:
    for call in shipped_calls((getattr(torch, sys.argv[1]),), (256,), ((32, 8),)):
        call()
for launch in launches:
    name, constants = launch.kernel.__name__, dict(launch.constants)
    if name in ("masked_attention_kernel", "union_attention_kernel", "union_backward_kernel"):
        if constants.get("OUTPUT_GATE", constants.get("DETERMINISTIC")):
            k = compile_launch(launch, 86)
            print(k.kernel, k.shared_memory, k.fits)
"""
ONLY = """
import sys, torch
from gsa_fast.verification.compile import compile_shipped
sample = (80,), (getattr(torch, sys.argv[1]),), (64,), ((8, 8),)
print(sorted({k.kernel for k in compile_shipped(*sample, only=("sum_parts_kernel", "list_parts_kernel"))}))
try:
    compile_shipped(*sample, only=("sum_parts_kernel", "sum_kernel"))
except ValueError as error:
    print(error)
"""
# As many channels as an indexer may have, in the widest type.
WIDEST_INDEXER = """
import sys, torch, gsa_fast
from gsa_fast.verification.compile import compile_launch, recorded_launches
from gsa_ref import GSAConfig
dtype = getattr(torch, sys.argv[1])
x = torch.zeros(1, 64, 512, dtype=dtype)
config = GSAConfig(k_base=8, k_min=2, k_max=16, H_I=1, d_I=512)
with recorded_launches() as launches:
    inputs = x[:, :, None], x, x[..., :1].contiguous(), torch.zeros(1)
    gsa_fast.indexed_selection(*inputs, mean_variance=0.1, config=config, impl="triton")
for launch in launches:
    if launch.kernel.__name__ in ("shortlist_kernel", "redo_kernel"):
        k = compile_launch(launch, 86)
        print(k.kernel, k.shared_memory, k.fits)
"""
# Every multiplication that is fused with the addition of another thread's number, in kernels that choose keys by a sum.
FUSED = """
import re, sys, torch
from gsa_fast.verification.compile import compile_code, recorded_launches, shipped_calls
KERNELS = sys.argv[2].split(",")
with recorded_launches() as launches:
    for call in shipped_calls((getattr(torch, sys.argv[1]),), (64,), ((32, 8),)):
        call()
for launch in launches:
    if launch.kernel.__name__ in KERNELS:
        ptx = compile_code(launch, 90).asm["ptx"]
        received = set(re.findall(r"shfl\\.sync\\.\\w+\\.b32\\s+(%\\w+)", ptx))
        addends = re.findall(r"fma\\.rn\\.f32\\s+%\\w+, \\S+, \\S+, (%\\w+);", ptx)
        print(launch.kernel.__name__, len(received), len(addends), len(received.intersection(addends)))
"""
KERNELS = {
    "apply_gate_backward_kernel",
    "apply_gate_kernel",
    "budget_and_select_kernel",
    "decode_attend_kernel",
    "decode_scores_kernel",
    "decode_select_kernel",
    "decode_threshold_kernel",
    "divergence_kernel",
    "indexer_scores_kernel",
    "key_blocks_kernel",
    "key_gradients_kernel",
    "list_parts_kernel",
    "masked_attention_kernel",
    "masked_repair_kernel",
    "nonfinite_rows_kernel",
    "output_gradient_kernel",
    "query_gradients_kernel",
    "redo_kernel",
    "sample_scores_kernel",
    "score_gradients_kernel",
    "score_variance_kernel",
    "select_kernel",
    "select_large_kernel",
    "select_tokens_kernel",
    "selected_divergence_kernel",
    "selected_lse_kernel",
    "selected_teacher_kernel",
    "selection_bits_kernel",
    "shortlist_kernel",
    "sparse_attention_kernel",
    "sum_parts_kernel",
    "teacher_lse_kernel",
    "threshold_kernel",
    "token_budget_kernel",
    "union_attention_hopper_kernel",
    "union_attention_kernel",
    "union_backward_hopper_kernel",
    "union_backward_kernel",
    "union_hopper_repair_kernel",
    "union_kernel",
    "union_repair_kernel",
}
# Those that `sparse_attention` never launches for float32.
TILES = {
    "key_blocks_kernel",
    "masked_attention_kernel",
    "masked_repair_kernel",
    "nonfinite_rows_kernel",
    "union_attention_hopper_kernel",
    "union_attention_kernel",
    "union_backward_hopper_kernel",
    "union_hopper_repair_kernel",
    "union_repair_kernel",
}
# Those that use the matrix units of one architecture only.
HOPPER = {"union_attention_hopper_kernel", "union_backward_hopper_kernel", "union_hopper_repair_kernel"}


def compile_sample(dtype: str, code: str, *more: str, root: Path = ROOT) -> subprocess.CompletedProcess[str]:
    """In a process of its own, because kernels of this one may be interpreted."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | {"PYTHONPATH": str(root)}
    command = [sys.executable, "-c", code, dtype, *more]
    return subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True, check=False)


# Every target with 16 bits and the newer one with float32; `python -m gsa_fast compile` has all combinations.
@pytest.mark.parametrize(("dtype", "target"), [("bfloat16", 90), ("float16", 80), ("float32", 90)])
def test_every_kernel_compiles_and_fits(dtype, target):
    run = compile_sample(dtype, SAMPLE, str(target))
    assert run.returncode == 0, run.stderr
    lines = [line.split() for line in run.stdout.splitlines()]
    expected = KERNELS - (TILES if dtype == "float32" else set()) - (HOPPER if target != 90 else set())
    assert {(found, kernel) for found, kernel, *_ in lines} == {(f"sm_{target}", k) for k in expected}
    assert [line for line in lines if line[-1] != "True"] == []


def test_the_largest_tiles_fit_sm_86():
    run = compile_sample("float16", WIDE)
    assert run.returncode == 0, run.stderr
    lines = [line.split() for line in run.stdout.splitlines()]
    expected = {"masked_attention_kernel", "union_attention_kernel", "union_backward_kernel"}
    assert {kernel for kernel, *_ in lines} == expected
    assert [line for line in lines if line[-1] != "True"] == []


def test_the_widest_indexer_fits_sm_86():
    run = compile_sample("float32", WIDEST_INDEXER)
    assert run.returncode == 0, run.stderr
    lines = [line.split() for line in run.stdout.splitlines()]
    assert {kernel for kernel, *_ in lines} == {"shortlist_kernel", "redo_kernel"}
    assert [line for line in lines if line[-1] != "True"] == []


def test_all_threads_round_the_sums_alike_that_decide_what_is_selected():
    """Else they may disagree on k_t, and on how often a loop runs."""
    kernels = {name for name in KERNELS if "select_kernel" in name or "threshold_kernel" in name}
    kernels |= {"shortlist_kernel", "redo_kernel"}
    run = compile_sample("float32", FUSED, ",".join(kernels))
    assert run.returncode == 0, run.stderr
    lines = [line.split() for line in run.stdout.splitlines()]
    assert {kernel for kernel, *_ in lines} == kernels
    assert sum(int(received) for _, received, *_ in lines) > 100
    assert sum(int(addends) for _, _, addends, _ in lines) > 100
    assert [line for line in lines if line[-1] != "0"] == []


REDUCTION = """
#blocked = #ttg.blocked<{sizePerThread = [1, 1], threadsPerWarp = [1, 32], warpsPerCTA = [8, 1], order = [1, 0]}>
#linear = #ttg.linear<{register = [[8, 0, 0]], lane = LANES, warp = [[1, 0, 0], [2, 0, 0], [4, 0, 0]], block = []}>
    %1 = "tt.reduce"(%0) <{axis = AXIS : i32}> ({
    ^bb0(%a: f32 loc("a"), %b: f32 loc("b")):
      %2 = arith.addf %a, %b : f32 loc(#loc1)
      tt.reduce.return %2 : f32 loc(#loc2)
    }) : (tensor<16x4xf32, #blocked>, tensor<16x4x8xf32, LAYOUT>) -> (tensor<16xf32, #blocked>) loc(#loc2)
"""
NEIGHBOURS = "[[0, 1, 0], [0, 2, 0], [0, 0, 1], [0, 0, 2], [0, 0, 4]]"
APART = "[[0, 0, 1], [0, 1, 0], [0, 2, 0], [0, 0, 2], [0, 0, 4]]"


@pytest.mark.parametrize(
    ("lanes", "axis", "layout", "torn"),
    [
        (NEIGHBOURS, 2, "#linear", 0),
        (NEIGHBOURS, 1, "#linear", 0),
        (APART, 2, "#linear", 1),
        (APART, 1, "#linear", 0),
        (APART, 0, "#linear", 0),  # over warps and registers
        (APART, 1, "#ttg.slice<{dim = 1, parent = #linear}>", 1),
        (APART, 1, "#ttg.slice<{dim = 2, parent = #linear}>", 0),
        (APART, 1, "#blocked", 0),
    ],
)
def test_reductions_over_threads_that_lie_apart_are_found(lanes, axis, layout, torn):
    code = REDUCTION.replace("LANES", lanes).replace("AXIS", str(axis)).replace("LAYOUT", layout)
    assert torn_reductions(code) == torn
    assert torn_reductions(code + code) == 2 * torn


def test_the_sample_names_every_kernel_of_the_package():
    sources = "\n".join(path.read_text() for path in (ROOT / "gsa_fast").rglob("*.py") if "bench" not in path.parts)
    defined = {line.split("(")[0].removeprefix("def ") for line in sources.splitlines() if "_kernel(" in line}
    assert {name for name in defined if name.endswith("_kernel") and not name.startswith(" ")} == KERNELS


def test_the_register_cap_of_streamed_kernels_is_compiled_in_both_sigmoid_modes():
    run = compile_sample("bfloat16", STREAMED)
    assert run.returncode == 0, run.stderr
    lines = [line.split() for line in run.stdout.splitlines()]
    assert {approximate for approximate, *_ in lines} == {"False", "True"}
    for _, cap, *registers in lines:
        assert max(map(int, registers)) <= int(cap) == 168


def test_recording_launches_is_refused_where_kernels_are_interpreted():
    run = compile_sample("float32", "import os; os.environ['TRITON_INTERPRET'] = '1'" + SAMPLE, "90")
    assert run.returncode == 1
    assert "RuntimeError: TRITON_INTERPRET: expected unset for ahead-of-time compilation, got 1" in run.stderr


def test_one_kernel_alone_can_be_compiled_and_an_unknown_one_is_refused():
    run = compile_sample("float32", ONLY)
    assert run.returncode == 0, run.stderr
    kernels, refusal = run.stdout.splitlines()
    assert kernels == "['list_parts_kernel', 'sum_parts_kernel']"
    assert re.fullmatch(r"only: expected some of \[.*'sum_parts_kernel'.*\], got \['sum_kernel'\]", refusal)
