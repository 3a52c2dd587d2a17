"""python -m gsa_fast verify | compile | bench: check and measure the kernels of this package on this machine."""

import argparse
import os
import sys
from pathlib import Path

import torch
import triton

from gsa_fast._backend import INTERPRETED
from gsa_fast.bench import decode, prefill, records, train
from gsa_fast.selection import SIGMOID_MODES
from gsa_fast.verification import long, long_gradients, run
from gsa_fast.verification import records as verification_records
from gsa_fast.verification.compile import SHARED_MEMORY_LIMIT, compile_shipped, summary
from gsa_ref import GSAConfig
from gsa_ref.cases import Case


def main(argv: list[str] | None = None) -> int:
    """Run the command line; returns the exit status: 0 if everything passed, 1 if a check failed, 2 for bad usage."""
    argv = sys.argv[1:] if argv is None else argv
    parser = argparse.ArgumentParser(prog="python -m gsa_fast", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    verify = commands.add_parser(
        "verify",
        help="check the kernels against the reference",
        description="Check the Triton kernels against the equations in float64, on the GPU if there is one, else in "
        "the Triton interpreter. Exit status 1 if a check fails.",
    )
    verify.add_argument("--quick", action="store_true", help="fewer cases")
    verify.add_argument("--stem", action="append", choices=run.STEMS, help="only this stem (may be repeated)")
    verify.add_argument("--dtype", action="append", choices=run.DTYPES, help="only this dtype (may be repeated)")
    verify.add_argument("--examples", type=int, metavar="N", help="cases per stem and dtype")
    verify.add_argument("--seed", type=int, default=0, metavar="N", help="seed of the cases (default 0)")
    verify.add_argument("--jobs", type=int, metavar="N", help="processes that share the cases (default 1)")
    verify.add_argument(
        "--json", type=Path, metavar="FILE", help="also write the results as a record, which keeps its other rows"
    )
    verify.add_argument("--case", metavar="JSON", help="run this one case, as a failure prints it")
    long_ = verify.add_argument_group("one long sequence, on a GPU")
    long_.add_argument(
        "--length", type=int, metavar="L", help="instead of small cases, check one sequence of this length in bfloat16"
    )
    long_.add_argument("--rows", type=int, metavar="N", help="rows compared with the reference (default 2048)")
    long_.add_argument("--reruns", type=int, metavar="N", help="reruns compared bit by bit (default 20)")
    long_.add_argument("--kv-heads", type=int, metavar="N", help="key/value heads for the 32 query heads (default 8)")
    long_.add_argument("--gradients", action="store_true", help="check the backward pass of the attention instead")
    long_.add_argument("--sigmoid-mode", choices=SIGMOID_MODES, help="of the indexer (default exact)")
    compile_ = commands.add_parser(
        "compile",
        help="compile every kernel ahead of time, without a GPU",
        description="Compile every kernel variant for the targets and show what it uses. Exit status 1 if one does not "
        "fit its target.",
    )
    compile_.add_argument(
        "--target", action="append", choices=[f"sm_{c}" for c in SHARED_MEMORY_LIMIT], help="may be repeated"
    )
    compile_.add_argument(
        "--kernel",
        action="append",
        metavar="NAME",
        help="only this kernel (may be repeated); the record keeps the others",
    )
    compile_.add_argument("--jobs", type=int, default=1, metavar="N", help="processes that share it (default 1)")
    compile_.add_argument("--json", type=Path, metavar="FILE", help="also write the results as a record")
    bench = commands.add_parser(
        "bench",
        help="measure the speed, on a GPU",
        description="Measure the speed of the kernels beside PyTorch's dense attention. Exit status 1 if a case fails.",
    )
    suites = bench.add_subparsers(dest="suite", required=True)
    prefill.add_arguments(
        suites.add_parser(
            "prefill",
            help="the forward pass over length and selection pattern",
            description="Measure the forward pass and its stages over lengths, key/value heads and selection patterns, "
            "beside cuDNN's and FlashAttention's dense attention in PyTorch.",
        )
    )
    decode.add_arguments(
        suites.add_parser(
            "decode",
            help="a step of decoding over batch size and keys in the cache",
            description="Measure a step of a few queries against a long cache, with the decode kernels and with the "
            "general ones, over batch sizes and numbers of keys, beside cuDNN's and FlashAttention's dense attention "
            "in PyTorch.",
        )
    )
    train.add_arguments(
        suites.add_parser(
            "train",
            help="attention and gates, and the indexer's KL loss, forward and backward",
            description="Measure attention and gates forward and backward over lengths and selection patterns, beside "
            "cuDNN's and FlashAttention's dense attention in PyTorch, and the indexer's KL loss beside the reference.",
        )
    )
    options = parser.parse_args(argv)
    if options.json is not None and not options.json.resolve().parent.is_dir():
        parser.error(f"argument --json: expected a file in an existing folder, got {options.json}")
    if options.json is not None and options.command != "bench" and getattr(options, "length", None) is None:
        try:
            verification_records.read(options.json)
        except ValueError as error:
            parser.error(f"argument --json: {error}")
    command = records.recorded_command(argv)
    if options.command == "compile":
        if options.jobs < 1:
            parser.error(f"argument --jobs: expected a number ≥ 1, got {options.jobs}")
        return run_compile(parser, options, command)
    if options.command == "bench":
        suite = {suite.SUITE: suite for suite in (prefill, decode, train)}[options.suite]
        if problem := suite.check_options(options):
            parser.error(problem)
        return suite.main(options, argv)
    if options.length is not None:
        return run_verify_length(parser, options, command)
    return run_verify(parser, options, command)


def run_verify(parser: argparse.ArgumentParser, options: argparse.Namespace, command: str) -> int:
    """The `verify` command."""
    if options.examples is not None and options.examples < 1:
        parser.error(f"argument --examples: expected a number ≥ 1, got {options.examples}")
    if options.jobs is not None and options.jobs < 1:
        parser.error(f"argument --jobs: expected a number ≥ 1, got {options.jobs}")

    for name in ("rows", "reruns", "kv_heads", "sigmoid_mode", "gradients"):
        if getattr(options, name) not in (None, False):
            parser.error(f"argument --{name.replace('_', '-')}: belongs to --length")

    device = "cpu" if INTERPRETED else "cuda"
    if device == "cpu":
        if options.dtype and "bfloat16" in options.dtype:
            parser.error("argument --dtype: bfloat16 needs a GPU (the Triton interpreter computes it on raw bits)")
        torch.set_num_threads(1)  # the tensors are small: threads only cost
        where = "the CPU, in the Triton interpreter"
    else:
        where = torch.cuda.get_device_name()

    if options.case is not None:
        try:
            case = Case.from_json(options.case)
        except (ValueError, TypeError) as error:
            parser.error(f"argument --case: {error}")
        row = run.Row(case.stem, getattr(case, "dtype", "float32"), cases=1)
        try:
            with run.prepared(device):
                run.check_case(case, device, row)
        except AssertionError as error:
            print(f"FAIL on {where}: {error}")
            return 1
        print(f"pass on {where}: worst error {row.worst_error:.3g}, budget {row.budget:.3g}")
        return 0

    stems = tuple(options.stem or run.STEMS)
    dtypes = tuple(options.dtype or (run.DTYPES if device == "cuda" else run.DTYPES[:2]))
    if device == "cuda":
        examples = dict.fromkeys(stems, run.GPU_QUICK_EXAMPLES if options.quick else run.GPU_EXAMPLES)
    else:
        examples = run.INTERPRETER_QUICK_EXAMPLES if options.quick else run.INTERPRETER_EXAMPLES
    if options.examples is not None:
        examples = dict.fromkeys(stems, options.examples)

    print(f"Checking the kernels of gsa_fast against gsa_ref on {where}, seed {options.seed}.", flush=True)
    with run.prepared(device):
        rows = run.verify(stems, dtypes, device, examples, options.seed, 1 if options.jobs is None else options.jobs)
    if not rows:
        parser.error(f"nothing to check: {' and '.join(stems)} read float32 scores, got --dtype {' '.join(dtypes)}")
    print(run.format_table(rows))
    if device == "cpu":
        print("bfloat16 was not run: the interpreter cannot compute it. Run this on a machine with a GPU.")
    failures = [row for row in rows if row.failed]
    for row in failures:
        print(f"\n{row.stem} {row.dtype}: {row.detail}\nSmallest failing case; run it again with\n")
        print(f"  python -m gsa_fast verify --case '{row.smallest_failure}'")
    if options.json is not None:
        verification_records.write(options.json, run.record(rows, device, command, options.seed), ("stem", "dtype"))
    print(f"\n{len(failures)} of {len(rows)} rows failed." if failures else f"\nAll {len(rows)} rows passed.")
    return 1 if failures else 0


def run_verify_length(parser: argparse.ArgumentParser, options: argparse.Namespace, command: str) -> int:
    """The `verify --length` command."""
    for name in ("quick", "stem", "dtype", "examples", "case", "jobs"):
        if getattr(options, name):
            parser.error(f"argument --{name}: chooses among small cases, and --length runs none")
    rows = 2048 if options.rows is None else options.rows
    reruns = 20 if options.reruns is None else options.reruns
    H_kv = GSAConfig().H_kv if options.kv_heads is None else options.kv_heads
    for name, value, least in (("length", options.length, 2), ("rows", rows, 1), ("reruns", reruns, 0)):
        if value < least:
            parser.error(f"argument --{name}: expected a number ≥ {least}, got {value}")
    if H_kv < 1 or GSAConfig().H % H_kv:
        parser.error(f"argument --kv-heads: expected a divisor of {GSAConfig().H}, got {H_kv}")
    if options.json is not None:
        try:
            records.read(options.json)
        except ValueError as error:
            parser.error(f"argument --json: {error}")
    if INTERPRETED or not torch.cuda.is_available():
        parser.error("argument --length: needs a CUDA device, the interpreter would take days")

    config = GSAConfig(H_kv=H_kv)
    if options.gradients:
        return run_verify_gradients(options, config, rows, reruns, command)
    print(
        f"Checking {min(rows, options.length)} rows of a sequence of {options.length} tokens on "
        f"{torch.cuda.get_device_name()}, seed {options.seed}.",
        flush=True,
    )
    result = long.verify_length(
        options.length,
        config,
        rows=rows,
        reruns=reruns,
        seed=options.seed,
        processes=len(os.sched_getaffinity(0)),
        sigmoid_mode=options.sigmoid_mode or "exact",
    )
    print(run.format_table(result.rows))
    print(
        f"Mean budget {result.mean_k:.0f}; within 2ε of a row's threshold lie {result.near_median:.0f} keys in the "
        f"median, {result.near_most} at most. Of the best keys by gold scores {100 * result.recall_mean:.3f}% "
        f"are selected in the mean, {100 * result.recall_least:.2f}% in the worst row. {result.seconds:.0f} s."
    )
    for row in result.rows:
        if row.failed:
            print(f"\n{row.stem}: {row.detail}")
    if options.json is not None:
        records.write(options.json, [long.to_record(result, options.length, config, command, options.seed)])
    return 1 if result.failed else 0


def run_verify_gradients(options: argparse.Namespace, config: GSAConfig, rows: int, reruns: int, command: str) -> int:
    """The `verify --length --gradients` command."""
    print(
        f"Checking the gradients of {min(rows, options.length)} queries and 4 keys of a sequence of {options.length} "
        f"tokens on {torch.cuda.get_device_name()}, seed {options.seed}.",
        flush=True,
    )
    found = long_gradients.verify_gradients(options.length, config, rows=rows, reruns=reruns, seed=options.seed)
    print(run.format_table(found))
    failed = [row for row in found if row.failed]
    for row in failed:
        print(f"\n{row.stem}: {row.detail}")
    if options.json is not None:
        records.write(options.json, [long_gradients.to_record(found, options.length, config, command, options.seed)])
    return 1 if failed else 0


def run_compile(parser: argparse.ArgumentParser, options: argparse.Namespace, command: str) -> int:
    """The `compile` command."""
    targets = options.target or ["sm_80", "sm_90"]
    capabilities = tuple(int(target.removeprefix("sm_")) for target in targets)
    try:
        kernels = compile_shipped(capabilities, jobs=options.jobs, only=tuple(options.kernel or ()))
    except ValueError as error:
        parser.error(f"argument --kernel: {str(error).removeprefix('only: ')}")
    for k in kernels:
        memory = f"{k.shared_memory:7d} of {k.shared_memory_limit} bytes shared"
        fits = "fits" if k.fits else "DOES NOT FIT"
        print(f"{k.target}  {k.kernel:26s}  {memory}  {k.registers:3d} registers  {k.stack:4d} stack  {fits}")
    if options.json is not None:
        origin = {"command": command, **verification_records.code_version()}
        record = {"suite": "compile", "triton": triton.__version__, "rows": [r | origin for r in summary(kernels)]}
        verification_records.write(options.json, record, ("target", "kernel"))
    misfits = [k for k in kernels if not k.fits]
    print(f"{len(misfits)} of {len(kernels)} kernel variants do not fit." if misfits else f"All {len(kernels)} fit.")
    return 1 if misfits else 0


if __name__ == "__main__":
    if sys.argv[1:2] == ["verify"] and not torch.cuda.is_available() and not INTERPRETED:
        # Triton reads the variable when kernels are defined, which importing this package has done: start again.
        os.environ["TRITON_INTERPRET"] = "1"
        os.execv(sys.executable, [sys.executable, "-m", "gsa_fast", *sys.argv[1:]])
    sys.exit(main())
