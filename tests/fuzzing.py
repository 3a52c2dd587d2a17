"""Calls with bad and with odd input, each with its expectation: what `make fuzz` and tests/fast/test_fuzzing.py draw.

    python -m tests.fuzzing                       10,000 calls, with a summary
    python -m tests.fuzzing --calls 500 --seed 1  others, and fewer

A call starts as a legal one, described argument by argument in `FUNCTIONS`. Then it gets faults, or is made odd in ways
that are legal. The fault decides what has to happen, never the code under test:

- a fault: the exception that the contract names for it, with a message that begins with the name of an argument that
  the fault concerns and says what was expected. No tensor and no cache has changed.
- an oddity (strides, aliases, empty axes, NaN, slots that are empty): the result of the same values in plain tensors,
  for the kernels also the result of the reference, and no input has changed.
"""

import argparse
import json
import math
import os
import platform
import sys
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import Any

import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # before gsa_fast is imported

import numpy as np
import triton
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st
from torch import Tensor
from tqdm import tqdm

import gsa_fast
import gsa_ref
from gsa_fast.verification.interpreter import enable_interpreter_checks
from gsa_ref import GSACache, GSAConfig, LanguageModel, ModelConfig, Selection, check
from gsa_ref._arguments import FLOATING, MOST_TOKENS, RULES
from gsa_ref.cases import lay_out

enable_interpreter_checks()  # an int32 overflow in a kernel raises

RECORD = "benchmarks/results/cpu/fuzzing.json"
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
REFERENCE, FALLBACK, KERNELS = IMPLS = ("gsa_ref", "gsa_fast, impl='reference'", "gsa_fast, impl='triton'")
WIDE = (torch.float32, torch.float64)
HUGE = 10**400  # an int that no floating-point number can hold
# Sizes by the names of axes. B, L and S are drawn.
SIZES = {"H": 4, "H_kv": 2, "d_h": 8, "H_I": 3, "d_I": 4, "K": 2, "d": 8, "heads": 3, "C": 6}
CONFIG = GSAConfig(d=8, H=4, H_kv=2, d_h=8, H_I=3, d_I=4, k_base=2, k_min=1, k_max=3, rule="fixed")
MODEL = ModelConfig(attention=CONFIG, n_layers=2, d_ff=8, vocab=260)
CAPACITY, HELD = SIZES["C"], 2  # of every cache: tokens that a sequence may hold, and that it holds


# ---- what an argument may be -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Array:
    """A tensor. `like` is the argument whose dtype it must have."""

    dims: str
    dtypes: tuple[torch.dtype, ...] = FLOATING
    like: str | None = None
    optional: bool = False
    also: tuple[type, ...] = ()  # other types that the argument may have

    @property
    def axes(self) -> list[str]:
        return self.dims.split()


@dataclass(frozen=True)
class Whole:
    """An int in [low, high]."""

    value: int
    low: int
    high: int | None = None
    optional: bool = False
    also: tuple[type, ...] = ()


@dataclass(frozen=True)
class Real:
    """A finite number, above 0 if `positive`. `outside` are finite numbers that the argument may not be."""

    value: float
    positive: bool = False
    optional: bool = False
    outside: tuple[float, ...] = ()


@dataclass(frozen=True)
class Name:
    """One of some words."""

    choices: tuple[str, ...]
    optional: bool = False


@dataclass(frozen=True)
class Flag:
    """A bool."""

    value: bool
    optional: bool = False


@dataclass(frozen=True)
class Start:
    """An int ≥ 0, or int32 [B]."""

    optional: bool = False


@dataclass(frozen=True)
class Mean:
    """V̄: a number or a scalar tensor, float32 or float64."""

    optional: bool = False


@dataclass(frozen=True)
class Made:
    """An object, made for the sizes of a call. `wrong` are others of that type that the call must refuse."""

    make: Callable[[dict[str, int]], Any]
    optional: bool = False
    wrong: Callable[[dict[str, int]], list[tuple[str, Any, type[Exception]]]] = lambda sizes: []
    also: tuple[type, ...] = ()
    receiver: bool = False  # the object whose method is called: never exchanged


Spec = Array | Whole | Real | Name | Flag | Start | Mean | Made
INT32, INT64 = (torch.int32,), (torch.int64,)
LENGTHS = Array("B", INT32, optional=True)
SLOTS = {"selection.indices": Array("B L K", INT32), "selection.counts": Array("B L", INT32)}
INDEXER: dict[str, Spec] = {
    "q_idx": Array("B L H_I d_I"),
    "k_idx": Array("B S d_I", like="q_idx"),
    "head_logits": Array("B L H_I"),
    "bias": Array("H_I"),
}
QUERY, KEY = Array("B L H d_h"), Array("B S H_kv d_h", like="q")
GATES = {
    "value_gate_logits": Array("B S H_kv d_h", optional=True),
    "output_gate_logits": Array("B L H d_h", optional=True),
}
BUDGET = {
    "k_base": Whole(2, 1, MOST_TOKENS),
    "k_min": Whole(1, 1, 3),
    "k_max": Whole(3, 1, MOST_TOKENS),
    "rule": Name(RULES),
}
A_CONFIG = Made(lambda sizes: CONFIG)


@dataclass(frozen=True)
class Function:
    """A part of the public API: its arguments, where it exists, and how to call it.

    Attributes:
        call: takes a package, its keywords beside those of the reference, and the arguments.
        bound: axes whose length something else than an argument fixes.
        faults: faults that no single argument has, from the sizes and the arguments.
        compared: whether the kernels' result must be the reference's. Where scores that tie up to rounding decide, it
            must be that of the same kernels on plain tensors.
        odd: whether the arguments may be laid out in odd ways.
        fast: arguments that gsa_fast takes in addition.
        chooses: whether the call takes `impl`.
        smallest: least lengths of axes, where an empty one is not legal.
        mutates: whether a call changes the cache that it gets.
    """

    arguments: dict[str, Spec]
    call: Callable[..., Any]
    impls: tuple[str, ...] = (REFERENCE,)
    bound: tuple[str, ...] = ()
    faults: Callable[[dict[str, int], dict[str, Any], str], "list[Fault]"] = lambda sizes, arguments, impl: []
    compared: bool = True
    odd: bool = True
    fast: dict[str, Spec] = field(default_factory=dict)
    smallest: dict[str, int] = field(default_factory=dict)
    chooses: bool = False
    mutates: bool = False

    def of(self, impl: str) -> "Function":
        """With the arguments that it has there."""
        return self if impl == REFERENCE else replace(self, arguments=self.arguments | self.fast)


@dataclass(frozen=True)
class Fault:
    """What is wrong with a call, and how it has to end: `exception`, with a message that begins with one of `names`."""

    kind: str
    changes: dict[str, Any]
    exception: type[Exception]
    names: frozenset[str]
    group: str = ""  # two of one group might cancel out: a call gets at most one

    @property
    def argument(self) -> str:
        return next(iter(self.changes))


def fault(kind: str, name: str, value: Any, exception: type[Exception], names: Any = (), **options: Any) -> Fault:
    return Fault(kind, {name: value}, exception, frozenset(names or {name}), **options)


def faults_of(function: Function, sizes: dict[str, int], arguments: dict[str, Any], impl: str) -> list[Fault]:
    """Every single fault of a legal call."""
    found = function.faults(sizes, arguments, impl)
    if impl != REFERENCE and function.chooses:
        found += [fault("value", "impl", v, ValueError) for v in ("cuda", "", "Triton")]
        found += [fault("type", "impl", v, TypeError) for v in (None, 1, True, ["triton"])]
    tensors = {
        name: function.arguments[name]
        for name, value in arguments.items()
        if isinstance(value, Tensor) and isinstance(function.arguments[name], Array)
    }
    for name, spec in function.arguments.items():
        value = arguments[name]
        if (isinstance(spec, Made) and spec.receiver) or (value is None and name.startswith("selection.")):
            continue
        if name == "lse" and arguments["selection.indices"] is None:
            continue  # whatever it is, there may be none
        found += _wrong_types(name, spec, value)
        if isinstance(value, Tensor) and not isinstance(spec, Made):
            shared = {n for n, v in arguments.items() if isinstance(v, Tensor)}
            if len(shared) > 1 or function.bound:
                found.append(fault("device", name, value.to("meta"), ValueError, shared, group="device"))
            found.append(fault("layout", name, value.to_sparse(), TypeError))
        if isinstance(value, Tensor) and isinstance(spec, Array):
            found += _wrong_dtypes(name, spec, value, function)
            found += _wrong_shapes(name, value, spec.axes, tensors, function)
        elif isinstance(spec, Start) and isinstance(value, Tensor):
            found += _wrong_shapes(name, value, ["B"], tensors, function)
            found.append(fault("dtype", name, value.long(), TypeError))
        elif isinstance(spec, Start):
            found += [fault("value", name, v, ValueError) for v in (-1, -(2**40), 2**31, 2**63, HUGE)]
        elif isinstance(spec, Mean):
            found += _wrong_means(name)
        elif isinstance(spec, Whole):
            wrong = [spec.low - 1, -(2**70)] + ([] if spec.high is None else [spec.high + 1, 2**70])
            found += [fault("value", name, v, ValueError) for v in wrong]
        elif isinstance(spec, Real):
            wrong = [
                math.nan,
                math.inf,
                -math.inf,
                HUGE,
                -HUGE,
                *([0, 0.0, -1.5] if spec.positive else []),
                *spec.outside,
            ]
            found += [fault("value", name, v, ValueError) for v in wrong]
        elif isinstance(spec, Name):
            found += [
                fault("value", name, v, ValueError)
                for v in ("", "unknown", spec.choices[0].upper(), spec.choices[0] + " ")
            ]
        elif isinstance(spec, Made):
            found += [fault(kind, name, v, e) for kind, v, e in spec.wrong(sizes)]
    slots = [arguments[name] for name in SLOTS if arguments.get(name) is not None]
    if slots and "q" in arguments:
        found += [fault("type", "selection", v, TypeError) for v in (tuple(slots), slots, slots[0], "0", 0)]
    return found


def _wrong_types(name: str, spec: Spec, value: Any) -> list[Fault]:
    wrong: list[Any] = ["1", [1], {"a": 1}, np.zeros(3), b"1", torch.float32, object()]
    if not spec.optional or name.startswith("selection."):
        wrong.append(None)
    if not isinstance(spec, Array | Start | Mean):
        wrong += [torch.zeros(()), torch.ones(2, dtype=torch.int32)]
    if isinstance(spec, Array):
        wrong += [1, 0.5, True, torch.Tensor]
    elif isinstance(spec, Whole | Start):
        wrong += [True, 1.0, math.nan, 1j]
    elif isinstance(spec, Real | Mean):
        wrong += [True, 1j]
    elif isinstance(spec, Name):
        wrong = [v for v in wrong if not isinstance(v, str)] + [0, True]
    elif isinstance(spec, Flag):
        wrong += [0, 1, 1.0]
    elif isinstance(spec, Made):
        wrong = [v for v in (*wrong, 0, True) if not isinstance(v, type(value))]
    return [fault("type", name, v, TypeError) for v in wrong if not isinstance(v, getattr(spec, "also", ()))]


def _wrong_dtypes(name: str, spec: Array, value: Tensor, function: Function) -> list[Fault]:
    every = (*FLOATING, torch.int8, torch.int32, torch.int64, torch.bool, torch.complex64)
    found = [fault("dtype", name, value.to(d), TypeError) for d in every if d not in spec.dtypes]
    leader = spec.like or name
    group = {n for n, s in function.arguments.items() if isinstance(s, Array) and leader in (n, s.like)}
    if len(group) > 1 or "dtype" in function.bound:
        found += [
            fault("dtype", name, value.to(d), TypeError, group, group="dtype") for d in spec.dtypes if d != value.dtype
        ]
    return found


def _wrong_shapes(
    name: str, value: Tensor, axes: list[str], tensors: dict[str, Array], function: Function
) -> list[Fault]:
    def sharing(*changed: str) -> set[str]:
        return {name} | {n for n, spec in tensors.items() if set(changed) & set(spec.axes)}

    def bound(axis: str) -> bool:
        return axis in function.bound or any(axis in spec.axes for n, spec in tensors.items() if n != name)

    # `apply_gate` takes any shape: it compares the two, and names the second.
    names = sharing(*axes) if "any" in function.bound else {name}
    found = [
        fault("rank", name, x, ValueError, names, group="shape")
        for x in (value[None], value[..., None], *([value.sum(0).to(value.dtype)] if value.dim() else []))
    ]
    for i, axis in enumerate(axes):
        if not bound(axis):
            continue
        for size in {value.shape[i] + 1, value.shape[i] - 1, 0} - {value.shape[i], -1}:
            shape = [*value.shape[:i], size, *value.shape[i + 1 :]]
            names = sharing(axis) | ({"q"} if axis.startswith("H") else set())
            found.append(
                fault(
                    "size",
                    name,
                    torch.ones(shape, dtype=value.dtype, device=value.device),
                    ValueError,
                    names,
                    group="shape",
                )
            )
        for j in range(i):
            if value.shape[i] != value.shape[j]:
                names = sharing(axes[i], axes[j]) | ({"q", "q_idx"} if axes[j].startswith("H") else set())
                found.append(fault("swapped axes", name, value.transpose(i, j), ValueError, names, group="shape"))
    return found


def _wrong_means(name: str) -> list[Fault]:
    zero = torch.zeros((), device=DEVICE)
    return [
        fault("value", name, HUGE, ValueError),
        fault("rank", name, zero[None], ValueError),
        *[fault("dtype", name, zero.to(d), TypeError) for d in (torch.float16, torch.int32, torch.bool)],
    ]


# ---- legal values ----------------------------------------------------------------------------------------------------


def legal(
    function: Function, sizes: dict[str, int], rng: torch.Generator, optional: Callable[[], bool]
) -> dict[str, Any]:
    """A legal call of the function. `optional` decides, for each argument that may be None, whether it is given."""
    arguments: dict[str, Any] = {}
    for name, spec in function.arguments.items():
        if name == "selection.counts":
            arguments[name] = arguments["selection.indices"]  # both or neither; the values come below
        elif (name == "lse" and arguments["selection.indices"] is None) or (spec.optional and not optional()):
            arguments[name] = None
        elif isinstance(spec, Array):
            arguments[name] = _tensor(name, spec, sizes, rng).to(DEVICE)
        elif isinstance(spec, Start):
            first = int(torch.randint(0, max(sizes["S"] - sizes["L"], 0) + 1, (), generator=rng))
            arguments[name] = (
                torch.full((sizes["B"],), first, dtype=torch.int32, device=DEVICE) if optional() else first
            )
        elif isinstance(spec, Mean):
            arguments[name] = torch.tensor(0.02, device=DEVICE) if optional() else 0.02
        elif isinstance(spec, Made):
            arguments[name] = spec.make(sizes)
        elif isinstance(spec, Name):
            arguments[name] = spec.choices[0]
        else:
            arguments[name] = spec.value
    if "start" in arguments and arguments["start"] is None and sizes["S"] < sizes["L"]:
        arguments["start"] = 0
    if arguments.get("selection.indices") is not None:
        start = arguments.get("start")
        first = sizes["S"] - sizes["L"] if start is None else start
        slots = _slots(sizes, first, rng)
        arguments["selection.indices"], arguments["selection.counts"] = (x.to(DEVICE) for x in slots)
    return arguments


def _tensor(name: str, spec: Array, sizes: dict[str, int], rng: torch.Generator) -> Tensor:
    shape = [sizes[a] for a in spec.axes]
    if name == "lse":
        return torch.randn(shape, generator=rng).abs() + 1
    if name == "scores":
        return torch.randn(shape, generator=rng).masked_fill(torch.rand(shape, generator=rng) < 0.2, -torch.inf)
    if torch.float32 in spec.dtypes:
        return torch.randn(shape, generator=rng)
    if name == "index":
        return torch.randint(0, max(sizes["B"], 1), shape, generator=rng).to(spec.dtypes[0])
    # Lengths, budgets, numbers of keys and tokens alike.
    return torch.randint(1, 1 + HELD, shape, generator=rng).clamp(max=max(sizes["L"], 1)).to(spec.dtypes[0])


def _slots(sizes: dict[str, int], start: int | Tensor, rng: torch.Generator) -> tuple[Tensor, Tensor]:
    B, L, S, K = (sizes[a] for a in ("B", "L", "S", "K"))
    first = start.tolist() if isinstance(start, Tensor) else [start] * B
    indices = torch.full((B, L, K), -1, dtype=torch.int32)
    counts = torch.zeros(B, L, dtype=torch.int32)
    for b in range(B):
        for t in range(L):
            seen = max(0, min(S, first[b] + t + 1))
            chosen = torch.randperm(seen, generator=rng)[: min(K, seen)].sort()[0]
            indices[b, t, : len(chosen)], counts[b, t] = chosen, len(chosen)
    return indices, counts


# ---- odd but legal ---------------------------------------------------------------------------------------------------

LAYOUTS = ("permuted", "margins", "repeated", "negated view", "requires grad")


def make_odd(kind: str, name: str, arguments: dict[str, Any], sizes: dict[str, int], rng: torch.Generator) -> bool:
    """Change the argument in place of the dict; False if that oddity does not apply to it."""
    x = arguments[name]
    floating = isinstance(x, Tensor) and x.is_floating_point()
    if kind in ("permuted", "margins"):
        if not isinstance(x, Tensor) or x.dim() == 0:
            return False
        arguments[name] = lay_out(x, kind) if x.dim() > 1 else x.repeat_interleave(2)[::2]
    elif kind == "repeated":  # one row read many times, with stride 0; nothing else about the slots would stay legal
        if not floating or x.dim() == 0 or x.numel() == 0:
            return False
        axis = int(torch.randint(0, x.dim(), (), generator=rng))
        arguments[name] = x.narrow(axis, 0, 1).expand(x.shape)
    elif kind == "negated view":  # its memory holds −x, and a bit says so
        if not floating:
            return False
        arguments[name] = torch.complex(torch.zeros_like(x), -x).conj().imag
        assert arguments[name].is_neg()
    elif kind == "requires grad":
        if not floating:
            return False
        arguments[name] = x.clone().requires_grad_()
    elif kind == "aliased":  # two arguments are one tensor
        twins = [
            n
            for n, y in arguments.items()
            if isinstance(y, Tensor) and n != name and floating and y.shape == x.shape and y.dtype == x.dtype
        ]
        if not twins:
            return False
        arguments[name] = arguments[twins[0]]
    elif kind == "NaN":
        if not floating or x.numel() == 0:
            return False
        arguments[name] = x.masked_fill(torch.rand(x.shape, generator=rng).to(x.device) < 0.2, math.nan)
    elif kind == "empty slots":
        if name != "selection.indices" or x is None or "q" not in arguments:  # `validate` refuses them
            return False
        B, L, K = x.shape
        wild = torch.tensor([-(2**31), -7, -1, sizes["S"], sizes["S"] + 3, 2**31 - 1], dtype=torch.int32)
        chosen = wild[torch.randint(0, len(wild), (B, L, K), generator=rng)]
        mixed = torch.where(torch.rand((B, L, K), generator=rng) < 0.5, chosen, x.cpu())
        arguments[name] = mixed[..., torch.randperm(K, generator=rng)].to(x.device)
        counts = torch.tensor([-(2**31), -1, 0, 1, K, K + 1, 2**31 - 1], dtype=torch.int32)
        arguments["selection.counts"] = counts[torch.randint(0, len(counts), (B, L), generator=rng)].to(x.device)
    elif kind == "wild lengths":
        looked_at = "prompt" in arguments or set(arguments) == {"cache", "lengths"} or arguments.get("width", 0) is None
        if name not in ("lengths", "n_valid", "budget") or x is None or looked_at:
            return False
        wild = torch.tensor([-(2**31), -1, 0, 1, sizes["S"] + 7, 2**31 - 1], dtype=torch.int32)
        arguments[name] = wild[torch.randint(0, len(wild), x.shape, generator=rng)].to(x.device)
    else:  # wild numbers
        wild_numbers = {
            "scale": (0, 0.0, -0.5, 3),
            "mean_variance": (0, -1.0, math.nan, math.inf, -math.inf, 1e300, 5e-324),
            "start": (sizes["S"], 2**30),
        }
        if name not in wild_numbers or isinstance(x, Tensor):
            return False
        values = wild_numbers[name]
        arguments[name] = values[int(torch.randint(0, len(values), (), generator=rng))]
    return True


ODDITIES = (*LAYOUTS, "aliased", "NaN", "empty slots", "wild lengths", "wild numbers")


def plain(arguments: dict[str, Any], sizes: dict[str, int]) -> dict[str, Any]:
    """The same values in tensors of their own, contiguous and without a gradient; slots that are empty hold −1."""
    copies = {
        n: x.detach().clone(memory_format=torch.contiguous_format).resolve_neg() if isinstance(x, Tensor) else x
        for n, x in arguments.items()
    }
    if copies.get("selection.indices") is None:
        return copies
    indices, counts = copies["selection.indices"].cpu(), copies["selection.counts"].cpu()
    B, L, _ = indices.shape
    start = copies.get("start")
    start = sizes["S"] - L if start is None else start
    first = start.tolist() if isinstance(start, Tensor) else [start] * B
    clean_indices, clean_counts = torch.full_like(indices, -1), torch.zeros_like(counts)
    for b in range(B):
        for t in range(L):
            kept = sorted(
                i
                for i in indices[b, t, : max(int(counts[b, t]), 0)].tolist()
                if 0 <= i < min(sizes["S"], first[b] + t + 1)
            )
            clean_counts[b, t] = len(kept)
            clean_indices[b, t, : len(kept)] = torch.tensor(kept, dtype=torch.int32)
    return copies | {"selection.indices": clean_indices.to(DEVICE), "selection.counts": clean_counts.to(DEVICE)}


# ---- the public API --------------------------------------------------------------------------------------------------


def public(name: str) -> Callable[..., Any]:
    """A function of the two packages."""

    def call(impl: str, /, **arguments: Any) -> Any:
        return getattr(gsa_ref if impl == REFERENCE else gsa_fast, name)(**keywords(impl) | arguments)

    return call


def keywords(impl: str) -> dict[str, str]:
    return {} if impl == REFERENCE else {"impl": "triton" if impl == KERNELS else "reference"}


@cache
def layer(impl: str, training: bool = False) -> gsa_ref.GatedSparseAttention:
    torch.manual_seed(0)
    made = (gsa_ref if impl == REFERENCE else gsa_fast).GatedSparseAttention(CONFIG, **keywords(impl))
    return made.to(DEVICE).train(training)


@cache
def model(config: ModelConfig = MODEL, training: bool = False) -> LanguageModel:
    torch.manual_seed(0)
    return LanguageModel(config).to(DEVICE).train(training)


def cache_of(
    sizes: dict[str, int], config: GSAConfig = CONFIG, *, B: int | None = None, held: int = HELD, **options: Any
) -> GSACache:
    """A cache that holds `held` tokens per sequence."""
    made = GSACache.allocate(config, sizes["B"] if B is None else B, CAPACITY, **({"device": DEVICE} | options))
    for buffer in (made.k, made.v, made.k_idx):
        if buffer is not None:
            buffer[:, :held] = torch.linspace(-1, 1, buffer[:, :held].numel(), device=buffer.device).view_as(
                buffer[:, :held]
            )
    made.lengths.fill_(held)
    made.longest = held
    return made


def wrong_caches(sizes: dict[str, int]) -> list[tuple[str, Any, type[Exception]]]:
    """Caches that neither the layer nor a model's layer may take."""
    others = [replace(CONFIG, H_kv=1), replace(CONFIG, d_h=6), replace(CONFIG, d_I=2), CONFIG.variant("gated")]
    return [
        ("batch size", cache_of(sizes, B=sizes["B"] + 1), ValueError),
        *[("config", cache_of(sizes, c), ValueError) for c in others],
        ("dtype", cache_of(sizes, dtype=torch.float16), TypeError),
        ("device", cache_of(sizes, device="meta"), ValueError),
        *([("full cache", cache_of(sizes, held=CAPACITY), ValueError)] if sizes["L"] and sizes["B"] else []),
    ]


def wrong_caches_of_model(sizes: dict[str, int]) -> list[tuple[str, Any, type[Exception]]]:
    fine = cache_of(sizes)
    return [
        *[(kind, [cache_of(sizes), c], e) for kind, c, e in wrong_caches(sizes)],
        *[(kind, [c, cache_of(sizes)], e) for kind, c, e in wrong_caches(sizes)],
        ("number of caches", [cache_of(sizes)], ValueError),
        ("number of caches", [], ValueError),
        ("number of caches", [cache_of(sizes) for _ in range(3)], ValueError),
        ("one cache twice", [fine, fine], ValueError),
        ("type", [cache_of(sizes), None], TypeError),
        ("type", ["a", "b"], TypeError),
    ]


def cross_faults_of_attention(sizes: dict[str, int], arguments: dict[str, Any], impl: str) -> list[Fault]:
    found = []
    if sizes["L"] > 1 and "v" in arguments and "q_idx" not in arguments:
        fewer = {n: arguments[n][:, : sizes["L"] - 1] for n in ("k", "v")}
        changes = {"start": None, **fewer, "value_gate_logits": None}
        found.append(Fault("no start for S < L", changes, ValueError, frozenset({"start"}), group="shape"))
    return found


def wide(*names: str) -> Callable[[dict[str, int], dict[str, Any], str], list[Fault]]:
    """float64, which the kernels do not take."""

    def faults(sizes: dict[str, int], arguments: dict[str, Any], impl: str) -> list[Fault]:
        if impl != KERNELS:
            return []
        changes = {n: arguments[n].double() for n in names if arguments.get(n) is not None}
        return [Fault("float64 for kernels", changes, NotImplementedError, frozenset(changes))]

    return faults


def also(*makers: Callable[[dict[str, int], dict[str, Any], str], list[Fault]]) -> Callable[..., list[Fault]]:
    return lambda *call: [f for make in makers for f in make(*call)]


def select_faults(sizes: dict[str, int], arguments: dict[str, Any], impl: str) -> list[Fault]:
    budget = arguments["budget"]
    if arguments["width"] is not None or not budget.numel():
        return []
    return [fault("budget without width", "budget", budget + n, ValueError) for n in (MOST_TOKENS, 2**31 - 1 - HELD)]


def kl_faults(sizes: dict[str, int], arguments: dict[str, Any], impl: str) -> list[Fault]:
    if arguments["lse"] is None:
        return []
    return [Fault("lse without selection", {"selection": None}, ValueError, frozenset({"lse"}))]


def decode_faults(sizes: dict[str, int], arguments: dict[str, Any], impl: str) -> list[Fault]:
    if impl != KERNELS:
        return []
    L = 9
    changes = {
        n: torch.ones(sizes["B"], L, *arguments[n].shape[2:], device=DEVICE) for n in ("q", "q_idx", "head_logits")
    }
    changes["output_gate_logits"] = None
    return [Fault("too many queries", changes, NotImplementedError, frozenset({"q"}), group="shape")]


def validate_faults(sizes: dict[str, int], arguments: dict[str, Any], impl: str) -> list[Fault]:
    """Values that break the contract of a selection."""
    indices, counts = arguments["selection.indices"], arguments["selection.counts"]
    if indices.numel() == 0 or sizes["S"] < 2:
        return []
    bad = {
        "duplicate slots": ([1, 1], 2),
        "unsorted slots": ([1, 0], 2),
        "negative slot": ([-1, 1], 2),
        "filled tail": ([0, 1], 1),
        "index past S": ([0, sizes["S"]], 2),
        "count above K": ([0, 1], sizes["K"] + 1),
        "negative count": ([-1, -1], -1),
    }
    found = []
    for kind, (row, count) in bad.items():
        i, c = indices.clone(), counts.clone()
        i[-1, -1], c[-1, -1] = -1, count
        i[-1, -1, :2] = torch.tensor(row, dtype=torch.int32)
        changes = {"selection.indices": i, "selection.counts": c, "n_keys": sizes["S"]}
        found.append(Fault(kind, changes, ValueError, frozenset(SLOTS), group="shape"))
    return found


def config_faults(sizes: dict[str, int], arguments: dict[str, Any], impl: str) -> list[Fault]:
    return [
        fault("heads that do not divide", "H", 5, ValueError),
        fault("odd width", "d_h", 7, ValueError),
        Fault("odd width", {"d_I": 3, "indexer_rope": True}, ValueError, frozenset({"d_I"})),
    ]


def dtype_faults(*, device: bool) -> Callable[..., list[Fault]]:
    """Of the arguments dtype and device, which are PyTorch's."""
    wrong = ["float32", None, 32, torch.int32, torch.bool, torch.complex64]
    found = [fault("type", "dtype", v, TypeError) for v in wrong]
    if device:
        found += [fault("value", "device", v, ValueError) for v in ("nowhere", "", "cpu:x")]
        found += [fault("type", "device", v, TypeError) for v in (1.5, [], torch.float32)]
    return lambda *call: list(found)


def token_faults(name: str) -> Callable[..., list[Fault]]:
    def faults(sizes: dict[str, int], arguments: dict[str, Any], impl: str) -> list[Fault]:
        tokens = arguments[name]
        if tokens.numel() == 0:
            return []
        bad = [
            tokens.index_fill(1, torch.zeros(1, dtype=torch.int64, device=DEVICE), v) for v in (-1, MODEL.vocab, 2**40)
        ]
        return [fault("token outside V", name, t, ValueError) for t in bad]

    return faults


def generate_faults(sizes: dict[str, int], arguments: dict[str, Any], impl: str) -> list[Fault]:
    found = []
    if sizes["B"]:
        bad = [torch.full((sizes["B"],), n, dtype=torch.int32, device=DEVICE) for n in (0, -1, sizes["L"] + 1)]
        found = [fault("length outside [1, T]", "lengths", n, ValueError, ("lengths", "prompt")) for n in bad]
    empty = arguments["prompt"][:, :0]
    found.append(fault("empty prompt", "prompt", empty, ValueError, ("prompt", "lengths"), group="shape"))
    return found


def held_faults(sizes: dict[str, int], arguments: dict[str, Any], impl: str) -> list[Fault]:
    if not sizes["B"]:
        return []
    bad = [torch.full((sizes["B"],), n, dtype=torch.int32, device=DEVICE) for n in (-1, HELD + 1)]
    return [fault("length outside what is held", "lengths", n, ValueError) for n in bad]


def index_faults(sizes: dict[str, int], arguments: dict[str, Any], impl: str) -> list[Fault]:
    bad = [torch.tensor([n], device=DEVICE) for n in (-1, sizes["B"], 2**40)]
    return [fault("index outside the batch", "index", n, ValueError) for n in bad]


def full_faults(name: str) -> Callable[..., list[Fault]]:
    return lambda sizes, arguments, impl: [
        fault("full cache", name, n, ValueError, {"cache"}) for n in (CAPACITY, 2**40)
    ]


def gold_faults(sizes: dict[str, int], arguments: dict[str, Any], impl: str) -> list[Fault]:
    return [fault("type", "dtype", v, TypeError) for v in ("float32", None, 32, torch.int32, torch.bool, np.float32)]


A_CACHE = Made(cache_of, receiver=True)
IN_BOTH = IMPLS
IN_FAST = (FALLBACK, KERNELS)
SIGMOID = {"sigmoid_mode": Name(("exact", "approximate"))}
START_LENGTHS: dict[str, Spec] = {"start": Start(), "lengths": LENGTHS}
OPTIONAL_SLOTS = {name: replace(spec, optional=True) for name, spec in SLOTS.items()}
CONFIG_FIELDS: dict[str, Spec] = {
    **{n: Whole(SIZES[n], 1) for n in ("d", "H", "H_kv", "d_h", "H_I", "d_I")},
    "k_base": Whole(2, 1, 3),
    "k_min": Whole(1, 1, 3),
    "k_max": Whole(3, 1, MOST_TOKENS),
    "rule": Name(RULES),
    "indexer_scale": Real(0.5, optional=True),
    "indexer_rope": Flag(False),
    "rope_theta": Real(1e4, positive=True),
    "sparse": Flag(True),
    "gates": Name(("both", "value", "output", "none")),
    "gate_bias_init": Real(0.0),
    "mean_variance_decay": Real(0.99, outside=(1.0, -0.1, 1.5)),
    "kl_temperature": Real(0.1, positive=True),
}
FUNCTIONS: dict[str, Function] = {
    "indexer_scores": Function(
        {**INDEXER, "scale": Real(0.5), **START_LENGTHS},
        public("indexer_scores"),
        IN_BOTH,
        faults=wide("q_idx", "k_idx"),
    ),
    "score_variance": Function(
        {"scores": Array("B L S", WIDE)}, public("score_variance"), IN_BOTH, faults=wide("scores")
    ),
    "token_budget": Function(
        {"variance": Array("B L", WIDE), "mean_variance": Mean(), "n_valid": Array("B L", INT32), **BUDGET},
        public("token_budget"),
        IN_BOTH,
        faults=wide("variance"),
    ),
    "select_tokens": Function(
        {
            "scores": Array("B L S", WIDE),
            "budget": Array("B L", INT32),
            "width": Whole(3, 1, MOST_TOKENS, optional=True),
        },
        public("select_tokens"),
        IN_BOTH,
        faults=also(wide("scores"), select_faults),
    ),
    "indexed_selection": Function(
        {**INDEXER, "mean_variance": Mean(), "config": A_CONFIG, **START_LENGTHS},
        public("indexed_selection"),
        IN_BOTH,
        faults=wide("q_idx", "k_idx"),
        compared=False,
        fast=SIGMOID,
    ),
    "sparse_attention": Function(
        {
            "q": QUERY,
            "k": KEY,
            "v": KEY,
            **SLOTS,
            "scale": Real(0.3, optional=True),
            "start": Start(optional=True),
            **GATES,
        },
        public("sparse_attention"),
        IN_BOTH,
        faults=also(cross_faults_of_attention, wide("q", "k", "v")),
        fast={"deterministic": Flag(True)},
    ),
    "apply_gate": Function(
        {"x": Array("B L d_h"), "gate_logits": Array("B L d_h")},
        public("apply_gate"),
        IN_BOTH,
        bound=("any",),
        faults=wide("x", "gate_logits"),
    ),
    "indexer_kl_loss": Function(
        {
            **INDEXER,
            "q": QUERY,
            "k": KEY,
            "indexer_scale": Real(0.5),
            **OPTIONAL_SLOTS,
            "lse": Array("B L H", WIDE, optional=True),
            "scale": Real(0.3, optional=True),
            "temperature": Real(0.5, positive=True),
            **START_LENGTHS,
        },
        public("indexer_kl_loss"),
        IN_BOTH,
        faults=also(kl_faults, wide("q_idx", "k_idx"), wide("q", "k")),
    ),
    "decode_attention": Function(
        {
            "q": QUERY,
            "k": KEY,
            "v": KEY,
            **INDEXER,
            "mean_variance": Mean(),
            "config": A_CONFIG,
            **START_LENGTHS,
            "scale": Real(0.3, optional=True),
            "output_gate_logits": GATES["output_gate_logits"],
            **SIGMOID,
            "return_selection": Flag(True),
        },
        public("decode_attention"),
        IN_FAST,
        faults=also(decode_faults, wide("q", "k", "v")),
        compared=False,
    ),
    "explain_choice": Function(
        {
            **{n: Whole(v, 0) for n, v in (("L", 3), ("S", 5), ("K", 2))},
            **{n: Whole(SIZES[n], 1) for n in ("H", "H_kv", "d_h")},
        },
        lambda impl, /, **arguments: gsa_fast.explain_choice(**{"dtype": torch.float16} | arguments),
        faults=also(
            lambda *call: [fault("heads that do not divide", "H", 5, ValueError)],
            lambda *call: [
                fault("type", "dtype", v, TypeError) for v in ("float16", None, [], torch.int32, torch.float64)
            ],
        ),
    ),
    "GatedSparseAttention": Function(
        {"config": A_CONFIG},
        lambda impl, /, **arguments: (
            (gsa_ref if impl == REFERENCE else gsa_fast).GatedSparseAttention(**keywords(impl) | arguments).config
        ),
        IN_BOTH,
        fast={**SIGMOID, "deterministic": Flag(True)},
    ),
    "GatedSparseAttention.forward": Function(
        {"h": Array("B L d"), "cache": Made(cache_of, optional=True, wrong=wrong_caches), "lengths": LENGTHS},
        lambda impl, /, **arguments: layer(impl)(**arguments).hidden,
        IN_BOTH,
        bound=("d", "dtype"),
        compared=False,
        mutates=True,
    ),
    "GatedSparseAttention.forward, training": Function(
        {"h": Array("B L d"), "lengths": LENGTHS},
        lambda impl, /, **arguments: [x for x in layer(impl, True)(**arguments) if x is not None],
        IN_BOTH,
        bound=("d", "dtype"),
        faults=lambda sizes, *call: [fault("cache in training", "cache", cache_of(sizes), ValueError)],
        compared=False,
    ),
    "GatedSparseAttention.set_phase": Function(
        {"phase": Name(("sparse", "warm_up"))},
        lambda impl, /, **arguments: layer(impl, True).set_phase(**arguments),
        IN_BOTH,
    ),
    "LightningIndexer": Function({"config": A_CONFIG}, lambda impl, /, config: gsa_ref.LightningIndexer(config).config),
    "LightningIndexer.forward": Function(
        {"h": Array("B L d"), "start": Start()},
        lambda impl, /, **arguments: layer(REFERENCE).indexer(**arguments),
        bound=("d", "dtype"),
    ),
    "apply_rope": Function(
        {"x": Array("B L heads d_h"), "start": Start(), "theta": Real(100.0, positive=True)},
        lambda impl, /, **arguments: gsa_ref.apply_rope(**arguments),
        faults=lambda sizes, arguments, impl: [
            fault("odd width", "x", arguments["x"][..., 1:], ValueError, group="shape")
        ],
    ),
    "dense_attention": Function(
        {"q": QUERY, "k": KEY, "v": KEY, **START_LENGTHS},
        lambda impl, /, **arguments: gsa_ref.dense_attention(**arguments),
    ),
    "captured_mass": Function(
        {"q": QUERY, "k": KEY, **SLOTS, "scale": Real(0.3, optional=True), **START_LENGTHS},
        lambda impl, /, **arguments: gsa_ref.captured_mass(**arguments),
    ),
    "Selection.validate": Function(
        {**SLOTS, "n_keys": Whole(20, 0, optional=True)},
        lambda impl, /, selection, n_keys: selection.validate(n_keys),
        faults=validate_faults,
    ),
    "GSAConfig": Function(CONFIG_FIELDS, lambda impl, /, **arguments: GSAConfig(**arguments), faults=config_faults),
    "GSAConfig.variant": Function(
        {"name": Name(("gsa", "dense", "sparse", "gated"))}, lambda impl, /, name: CONFIG.variant(name)
    ),
    "ModelConfig": Function(
        {"attention": A_CONFIG, "n_layers": Whole(2, 1), "d_ff": Whole(8, 1), "vocab": Whole(260, 1)},
        lambda impl, /, **arguments: ModelConfig(**arguments),
    ),
    "LanguageModel": Function(
        {"config": Made(lambda sizes: MODEL), "layer": Made(lambda sizes: gsa_ref.GatedSparseAttention, also=(type,))},
        lambda impl, /, **arguments: LanguageModel(**arguments).config,
    ),
    "LanguageModel.forward": Function(
        {
            "tokens": Array("B L", INT64),
            "caches": Made(
                lambda sizes: [cache_of(sizes) for _ in range(MODEL.n_layers)],
                optional=True,
                wrong=wrong_caches_of_model,
                also=(list, str, bytes),
            ),
            "lengths": LENGTHS,
        },
        lambda impl, /, **arguments: model()(**arguments).logits,
        bound=("embedding",),
        mutates=True,
    ),
    "LanguageModel.allocate_caches": Function(
        {"batch_size": Whole(2, 0), "capacity": Whole(4, 1, 2**31 - 1)},
        lambda impl, /, **arguments: [c.k for c in model().allocate_caches(**arguments)],
    ),
    "LanguageModel.set_phase": Function(
        {"phase": Name(("sparse", "warm_up"))}, lambda impl, /, phase: model(MODEL, True).set_phase(phase)
    ),
    "generate": Function(
        {
            "model": Made(
                lambda sizes: model(),
                wrong=lambda sizes: [
                    ("training mode", model(MODEL, True), ValueError),
                    ("type", torch.nn.Linear(2, 2).eval(), TypeError),
                    ("type", layer(REFERENCE), TypeError),
                ],
            ),
            "prompt": Array("B L", INT64, also=(str, bytes)),
            "max_new_tokens": Whole(2, 1),
            "lengths": LENGTHS,
            "temperature": Real(0.0, outside=(-0.5, -1)),
            "top_p": Real(0.5, outside=(0, 0.0, -0.5, 1.5)),
            "generator": Made(lambda sizes: torch.Generator(DEVICE).manual_seed(0), optional=True),
            "stop_token": Whole(0, 0, MODEL.vocab - 1, optional=True),
            "use_cache": Flag(True),
            "progress": Flag(False),
        },
        lambda impl, /, **arguments: gsa_ref.generate(**arguments),
        bound=("embedding",),
        faults=also(generate_faults, token_faults("prompt")),
        smallest={"L": 1},
    ),
    "GSACache": Function(
        {
            "k": Array("B C H_kv d_h"),
            "v": Array("B C H_kv d_h", like="k"),
            "k_idx": Array("B C d_I", like="k", optional=True),
            "lengths": Array("B", INT32),
            "longest": Whole(2, 0, CAPACITY),
        },
        lambda impl, /, **arguments: GSACache(**arguments).k,
    ),
    "GSACache.allocate": Function(
        {"config": A_CONFIG, "batch_size": Whole(2, 0), "capacity": Whole(4, 1, 2**31 - 1)},
        lambda impl, /, **arguments: GSACache.allocate(**arguments).k,
        faults=dtype_faults(device=True),
    ),
    "GSACache.bytes_per_token": Function(
        {"config": A_CONFIG},
        lambda impl, /, **arguments: GSACache.bytes_per_token(**arguments),
        faults=dtype_faults(device=False),
    ),
    "GSACache.check": Function(
        {
            "cache": A_CACHE,
            "config": A_CONFIG,
            "batch_size": Made(lambda sizes: sizes["B"], also=(int,)),
            "n_new": Whole(2, 0),
            "like": Made(lambda sizes: torch.zeros(1, device=DEVICE)),
        },
        lambda impl, /, cache, **arguments: cache.check(**arguments),
        faults=also(
            full_faults("n_new"),
            lambda sizes, arguments, impl: [
                fault("batch size", "batch_size", sizes["B"] + 1, ValueError, {"cache"}),
                *[
                    fault("config", "config", c, ValueError, {"cache"})
                    for c in (replace(CONFIG, H_kv=1), replace(CONFIG, d_I=2), CONFIG.variant("dense"))
                ],
                fault("dtype", "like", arguments["like"].half(), TypeError, {"cache"}),
                fault("device", "like", arguments["like"].to("meta"), ValueError, {"cache"}),
            ],
        ),
        odd=False,
    ),
    "GSACache.advance": Function(
        {"cache": A_CACHE, "n_new": Whole(2, 0)},
        lambda impl, /, cache, **arguments: cache.advance(**arguments),
        faults=full_faults("n_new"),
        mutates=True,
    ),
    "GSACache.truncate, an int": Function(
        {"cache": A_CACHE, "lengths": Whole(1, 0, HELD, also=(Tensor,))},
        lambda impl, /, cache, lengths: [cache.truncate(lengths), cache.k, cache.lengths][1:],
        mutates=True,
    ),
    "GSACache.truncate, a tensor": Function(
        {"cache": A_CACHE, "lengths": Array("B", INT32, also=(int,))},
        lambda impl, /, cache, lengths: [cache.truncate(lengths), cache.k, cache.lengths][1:],
        bound=("B",),
        faults=held_faults,
        mutates=True,
    ),
    "GSACache.reorder": Function(
        {"cache": A_CACHE, "index": Array("B", (torch.int32, torch.int64))},
        lambda impl, /, cache, index: [cache.reorder(index), cache.k, cache.lengths][1:],
        bound=("device",),
        faults=index_faults,
        mutates=True,
    ),
    "GSACache.grow": Function(
        {"cache": A_CACHE, "capacity": Whole(CAPACITY + 1, CAPACITY, 2**31 - 1)},
        lambda impl, /, cache, capacity: [cache.grow(capacity), cache.k][1:],
        mutates=True,
    ),
    "check.unit_roundoff": Function(
        {}, lambda impl, /, dtype=torch.float32: check.unit_roundoff(dtype), faults=gold_faults
    ),
    "check.score_tolerance": Function(
        SIGMOID,
        lambda impl, /, **arguments: torch.tensor(
            check.score_tolerance(
                np.ones((2, 1, 3)), np.ones((4, 3)), np.ones((2, 1)), np.ones(1), scale=0.5, **arguments
            )
        ),
    ),
}
FUNCTIONS = {name: replace(f, chooses=name in gsa_fast.__all__ and KERNELS in f.impls) for name, f in FUNCTIONS.items()}


# ---- one call --------------------------------------------------------------------------------------------------------


class Violation(AssertionError):
    """A call that did not end as the contracts say."""


@dataclass(frozen=True, eq=False)
class Call:
    """A call and how it has to end: by one of the faults, or, without a fault, in the result of `plain` arguments."""

    function: str
    impl: str
    sizes: dict[str, int]
    arguments: dict[str, Any]
    faults: tuple[Fault, ...]
    oddities: tuple[str, ...]
    grad: bool

    @property
    def kind(self) -> str:
        """What is wrong or odd, for the summary; of several things the first."""
        return self.faults[0].kind if self.faults else self.oddities[0] if self.oddities else "none"

    def __repr__(self) -> str:
        """Short: the arguments that matter, tensors by dtype and shape."""
        concerned = [n for f in self.faults for n in f.changes] or list(self.arguments)
        values = ", ".join(f"{n}={_short(self.arguments[n])}" for n in concerned if n in self.arguments)
        sizes = {a: self.sizes[a] for a in ("B", "L", "S")}
        what = [f.kind for f in self.faults] or list(self.oddities)
        return f"{self.function} [{self.impl}] {what} {sizes} {values}"


def _short(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"{value.dtype}{list(value.shape)}@{value.device}"
    text = type(value).__name__ if isinstance(value, GSACache | torch.nn.Module) else repr(value)
    return text if len(text) < 60 else text[:57] + "..."


def assemble(arguments: dict[str, Any]) -> dict[str, Any]:
    """Keywords of the call: the two tensors of a selection become one."""
    keywords = {n: v for n, v in arguments.items() if n not in SLOTS}
    if "selection" not in arguments and "selection.indices" in arguments:
        slots = [arguments[n] for n in SLOTS]
        keywords["selection"] = None if all(x is None for x in slots) else Selection(*slots)
    return keywords


@st.composite
def calls(draw: st.DrawFn) -> Call:
    """Calls of the public API, most of them with one to three faults."""
    # A function that exists three times is drawn three times as often.
    name = draw(st.sampled_from([name for name, f in FUNCTIONS.items() for _ in f.impls]))
    impl = draw(st.sampled_from(FUNCTIONS[name].impls))
    function = FUNCTIONS[name].of(impl)
    # Mostly sizes that differ from one another, so that swapped axes show.
    n_faults = draw(st.sampled_from((0, 0, 1, 1, 1, 1, 2, 3) if impl != KERNELS else (0, 1, 1, 1, 1, 1, 2, 3)))
    # Legal calls alone run a kernel, in the interpreter a program after another: with as few rows as show a stride.
    shapes = [(2, 3, 5)] * 5 + [(1, 1, 5), (2, 3, 1)] if n_faults or impl != KERNELS else [(1, 2, 5), (2, 1, 3)] * 2
    shapes += [(0, 3, 5), (2, 0, 5), (2, 3, 0)]
    sizes = SIZES | dict(zip("BLS", draw(st.sampled_from(shapes)), strict=True))
    sizes["K"] = draw(st.sampled_from((2, 2, 2, 0, 7)))
    sizes |= {axis: max(sizes[axis], n) for axis, n in function.smallest.items()}
    rng = torch.Generator().manual_seed(draw(st.integers(0, 2**32 - 1)))
    arguments = legal(function, sizes, rng, lambda: draw(st.booleans()))
    chosen: list[Fault] = []
    oddities: list[str] = []
    for _ in range(n_faults):
        taken = {n for f in chosen for n in f.changes}
        groups = {f.group for f in chosen} - {""}
        left = [
            f
            for f in faults_of(function, sizes, arguments, impl)
            if not taken & set(f.changes) and f.group not in groups
        ]
        if not left:
            break
        kind = draw(st.sampled_from(sorted({f.kind for f in left})))
        chosen.append(draw(st.sampled_from([f for f in left if f.kind == kind])))
    if not chosen and function.odd:
        for kind in draw(st.lists(st.sampled_from(ODDITIES), max_size=3, unique=True)):
            fitting = [n for n in arguments if make_odd(kind, n, dict(arguments), sizes, rng)]
            if fitting:
                make_odd(kind, draw(st.sampled_from(fitting)), arguments, sizes, rng)
                oddities.append(kind)
    kinds = {f.kind for f in chosen}
    arguments = arguments | {n: v for f in chosen for n, v in f.changes.items()}
    grad = draw(st.booleans()) or "cache in training" in kinds
    return Call(name, impl, sizes, arguments, tuple(chosen), tuple(oddities), grad)


def _leaves(value: Any) -> Iterator[Any]:
    """Tensors, and the numbers that a cache holds."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, GSACache):
        yield from (value.k, value.v, value.k_idx, value.lengths, value.longest)
    elif isinstance(value, tuple | list):
        for part in value:
            yield from _leaves(part)
    elif value is not None:
        yield value


def _copy(x: Any) -> Any:
    if not isinstance(x, Tensor) or x.is_meta or x.layout != torch.strided:
        return x
    return x.detach().clone()


def _equal(x: Any, y: Any) -> bool:
    if not isinstance(x, Tensor) or not isinstance(y, Tensor) or x.is_meta or x.layout != torch.strided:
        return x is y or (not isinstance(x, Tensor) and bool(np.all(x == y)))
    return torch.equal(x.nan_to_num(0.5), y.nan_to_num(0.5)) and torch.equal(x.isnan(), y.isnan())


def _close(found: Any, expected: Any, tolerance: float) -> bool:
    pairs = list(zip(_leaves(found), _leaves(expected), strict=True))
    for x, y in pairs:
        if not isinstance(x, Tensor):
            if x != y:
                return False
            continue
        x, y = x.detach(), y.detach()
        if x.shape != y.shape or x.dtype != y.dtype:
            return False
        if x.is_floating_point():
            if not torch.allclose(x.double(), y.double(), rtol=tolerance, atol=tolerance, equal_nan=True):
                return False
        elif not torch.equal(x, y):
            return False
    return True


MESSAGE = ("expected ", "got "), ("the kernels take ", "got ")


def run(call: Call) -> str:
    """Make the call; the outcome in a word.

    Raises:
        Violation: it ended otherwise than it has to.
    """
    function = FUNCTIONS[call.function]
    arguments = assemble(call.arguments)
    before = [(x, _copy(x)) for x in _leaves(list(arguments.values()))]
    expected_arguments = assemble(plain(call.arguments, call.sizes)) if not call.faults else {}
    if function.mutates and "cache" in expected_arguments and expected_arguments["cache"] is not None:
        expected_arguments["cache"] = cache_of(call.sizes)
    elif function.mutates and expected_arguments.get("caches") is not None:
        expected_arguments["caches"] = [cache_of(call.sizes) for _ in range(MODEL.n_layers)]
    try:
        with torch.set_grad_enabled(call.grad and not function.mutates):
            found = function.call(call.impl, **arguments)
    except Exception as error:  # noqa: BLE001  every exception is judged
        _check_unchanged(call, arguments, before)
        return _judge(call, error)
    if call.faults:
        raise Violation(f"{call!r}\n    was accepted, expected {[f.exception.__name__ for f in call.faults]}")
    if not function.mutates:
        _check_unchanged(call, arguments, before)
    dtypes = {x.dtype for x in _leaves(list(arguments.values())) if isinstance(x, Tensor)}
    tolerance = 2e-2 if torch.float16 in dtypes else 1e-4
    with torch.no_grad():
        try:
            same = _close(found, function.call(call.impl, **expected_arguments), tolerance)
            if same and function.compared and call.impl == KERNELS:
                expected = {n: v for n, v in expected_arguments.items() if n not in function.fast}
                same = _close(found, function.call(REFERENCE, **expected), tolerance)
        except ValueError as error:  # zip: another number of results
            raise Violation(f"{call!r}\n    returned something else: {error}") from error
    if not same:
        raise Violation(f"{call!r}\n    returned something else than for the same values in plain tensors")
    return "result"


def _check_unchanged(call: Call, arguments: dict[str, Any], before: list[tuple[Any, Any]]) -> None:
    after = list(_leaves(list(arguments.values())))
    if len(after) != len(before) or not all(
        x is y and _equal(x, copy) if isinstance(y, Tensor) else _equal(x, copy)
        for x, (y, copy) in zip(after, before, strict=True)
    ):
        raise Violation(f"{call!r}\n    changed an argument")


def _judge(call: Call, error: Exception) -> str:
    message = str(error)
    name = message.partition(":")[0]
    for f in call.faults:
        names = (
            f.names | {n.removeprefix("selection.") for n in f.names} | ({"cache"} if "caches" in f.names else set())
        )
        if type(error) is f.exception and name in names and any(a in message and b in message for a, b in MESSAGE):
            return type(error).__name__
    wanted = [f"{f.exception.__name__} that names {' or '.join(sorted(f.names))}" for f in call.faults] or ["a result"]
    raise Violation(
        f"{call!r}\n    raised {type(error).__name__}: {message[:300]}\n    expected {', or '.join(wanted)}"
    ) from error


# ---- many calls ------------------------------------------------------------------------------------------------------


def campaign(
    n: int, first_seed: int, progress: bool = True
) -> tuple[Counter[tuple[str, str, str, str]], list[Violation]]:
    """n calls, counted by function, package, fault and outcome, and the violations among them."""
    counts: Counter[tuple[str, str, str, str]] = Counter()
    violations: list[Violation] = []
    bar = tqdm(total=n, unit="call", disable=not progress)

    @seed(first_seed)
    @settings(
        max_examples=n, database=None, derandomize=False, deadline=None, phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )  # fmt: skip
    @given(calls())
    def each(call: Call) -> None:
        try:
            outcome = run(call)
        except Violation as violation:
            violations.append(violation)
            outcome = "violation"
        counts[call.function, call.impl, call.kind, outcome] += 1
        bar.update()

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # NumPy in the interpreter, where a GPU computes NaN in silence
        each()
    bar.close()
    return counts, violations


def main(words: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.fuzzing", description="Calls with bad and with odd input.")
    parser.add_argument("--calls", type=int, default=10_000, help="number of calls (default 10,000)")
    parser.add_argument("--seed", type=int, default=0, help="of the calls (default 0)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the summary there")
    options = parser.parse_args(words)
    counts, violations = campaign(options.calls, options.seed)
    for violation in violations[:50]:
        print(violation)
    outcomes: Counter[str] = Counter()
    for (_, _, _, outcome), k in counts.items():
        outcomes[outcome] += k
    print(f"{counts.total()} calls of {len({f for f, *_ in counts})} functions: {dict(outcomes.most_common())}")
    if options.json:
        rows = [
            {"function": f, "impl": i, "fault": kind, "outcome": o, "calls": k}
            for (f, i, kind, o), k in sorted(counts.items())
        ]
        record = {
            "suite": "fuzzing",
            "device": platform.machine() + ", Triton's interpreter"
            if DEVICE == "cpu"
            else torch.cuda.get_device_name(),
            "torch": torch.__version__,
            "triton": triton.__version__,
            "python": platform.python_version(),
            "command": f"python -m tests.fuzzing --calls {options.calls} --seed {options.seed} --json {RECORD}",
            "seed": options.seed,
            "calls": counts.total(),
            "violations": len(violations),
            "rows": rows,
        }
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps(record, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    return 1 if violations else 0


if __name__ == "__main__":
    sys.exit(main())
