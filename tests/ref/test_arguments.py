"""Bad inputs: the exception's type, and a message with the argument, what was expected and what came.

The table is the contract of every package with these functions: `gsa_fast` joins by a line in `PACKAGES`.
"""

import importlib
import math
import re
import sys
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch

from gsa_ref import GSACache, GSAConfig, LanguageModel, LightningIndexer, ModelConfig, Selection, check
from gsa_ref import _arguments as arguments

pytestmark = pytest.mark.bad_input

# Package → keyword arguments that all of its functions take besides those of the table.
PACKAGES: dict[str, dict[str, Any]] = {"gsa_ref": {}}

CONFIG = GSAConfig(d=8, H=4, H_kv=2, d_h=4, H_I=2, d_I=4, k_base=4, k_min=2, k_max=8)
SIZES = {"k_base": 4, "k_min": 2, "k_max": 8, "rule": "fixed"}


def zeros(*shape: int, dtype: torch.dtype = torch.float32, device: str = "cpu") -> torch.Tensor:
    return torch.zeros(shape, dtype=dtype, device=device)


def ints(*shape: int, dtype: torch.dtype = torch.int32, device: str = "cpu") -> torch.Tensor:
    return torch.ones(shape, dtype=dtype, device=device)


def selection(B: int = 2, L: int = 3, K: int = 2, **options: Any) -> Selection:
    return Selection(ints(B, L, K, **options), ints(B, L, **options))


# B = 2, L = 3, S = 5, H = 4, H_kv = 2, d_h = 4, H_I = 2, d_I = 4
INDEXER = {"q_idx": zeros(2, 3, 2, 4), "k_idx": zeros(2, 5, 4), "head_logits": zeros(2, 3, 2), "bias": zeros(2)}
VALID: dict[str, dict[str, Any]] = {
    "indexer_scores": {**INDEXER, "scale": 0.5, "start": 2, "lengths": None},
    "score_variance": {"scores": zeros(2, 3, 5)},
    "token_budget": {"variance": zeros(2, 3), "mean_variance": 0.5, "n_valid": ints(2, 3), **SIZES},
    "select_tokens": {"scores": zeros(2, 3, 5), "budget": ints(2, 3), "width": None},
    "indexed_selection": {**INDEXER, "mean_variance": zeros(), "config": CONFIG, "start": 2, "lengths": None},
    "sparse_attention": {
        "q": zeros(2, 3, 4, 4),
        "k": zeros(2, 5, 2, 4),
        "v": zeros(2, 5, 2, 4),
        "selection": selection(),
        "scale": None,
        "start": None,
        "value_gate_logits": None,
        "output_gate_logits": None,
    },
    "apply_gate": {"x": zeros(2, 3), "gate_logits": zeros(2, 3)},
    "indexer_kl_loss": {
        **INDEXER,
        "q": zeros(2, 3, 4, 4),
        "k": zeros(2, 5, 2, 4),
        "indexer_scale": 0.5,
        "selection": selection(),
        "lse": zeros(2, 3, 4),
        "scale": None,
        "temperature": 0.5,
        "start": 2,
        "lengths": None,
    },
    "GatedSparseAttention.forward": {"h": zeros(2, 3, 8), "cache": None, "lengths": None},
}
ONLY_REFERENCE: dict[str, dict[str, Any]] = {
    "apply_rope": {"x": zeros(2, 3, 4, 4), "start": 0, "theta": 100.0},
    "dense_attention": {
        "q": zeros(2, 3, 4, 4),
        "k": zeros(2, 5, 2, 4),
        "v": zeros(2, 5, 2, 4),
        "start": 2,
        "lengths": None,
    },
    "captured_mass": {
        "q": zeros(2, 3, 4, 4),
        "k": zeros(2, 5, 2, 4),
        "selection": selection(),
        "scale": None,
        "start": 2,
        "lengths": None,
    },
    "generate": {
        "model": LanguageModel(ModelConfig(attention=CONFIG, n_layers=1, d_ff=8)).eval(),
        "prompt": ints(2, 3, dtype=torch.int64),
        "max_new_tokens": 2,
        "lengths": None,
        "temperature": 1.0,
        "top_p": 0.5,
        "generator": None,
        "stop_token": 0,
        "use_cache": True,
        "progress": False,
    },
}


@dataclass(frozen=True)
class Bad:
    """One wrong call: `changes` replace arguments of the valid call of `function`."""

    function: str
    changes: dict[str, Any]
    exception: type[Exception]
    argument: str
    expected: str
    got: str

    def __str__(self) -> str:
        got = re.sub(r"\d{20,}", "huge", self.got.lower())
        return f"{self.function}-{self.argument}-{re.sub('[^a-z0-9]+', '_', got).strip('_')}"


def wrong(function: str, name: str, value: Any, exception: type[Exception], expected: str, got: str) -> Bad:
    return Bad(function, {name: value}, exception, name, expected, got)


def not_a_tensor(function: str, name: str, value: Any) -> Bad:
    return wrong(function, name, value, TypeError, "a torch.Tensor", type(value).__name__)


def without_strides(function: str, name: str, value: torch.Tensor) -> Bad:
    return wrong(function, name, value.to_sparse(), TypeError, "a tensor with strides", "layout torch.sparse_coo")


HUGE = 10**400  # more than a float holds
FLOATS = "dtype float32 or float16 or bfloat16 or float64"
WIDE = "dtype float32 or float64"


def indexer_table(function: str) -> list[Bad]:
    return [
        *[not_a_tensor(function, name, np.zeros(3)) for name in INDEXER],
        *[not_a_tensor(function, name, None) for name in INDEXER],
        *[wrong(function, name, ints(*x.shape), TypeError, FLOATS, "torch.int32") for name, x in INDEXER.items()],
        *[without_strides(function, name, x) for name, x in INDEXER.items()],
        wrong(function, "k_idx", zeros(2, 5, 4).double(), TypeError, "dtype torch.float32 as q_idx", "torch.float64"),
        wrong(function, "q_idx", zeros(2, 3, 8), ValueError, "shape [B, L, H_I, d_I]", "[2, 3, 8]"),
        wrong(function, "k_idx", zeros(1, 5, 4), ValueError, "shape [B=2, S, d_I=4]", "[1, 5, 4]"),
        wrong(function, "k_idx", zeros(2, 5, 3), ValueError, "shape [B=2, S, d_I=4]", "[2, 5, 3]"),
        wrong(function, "k_idx", zeros(2, 5, 2, 4), ValueError, "shape [B=2, S, d_I=4]", "[2, 5, 2, 4]"),
        wrong(function, "head_logits", zeros(2, 5, 2), ValueError, "shape [B=2, L=3, H_I=2]", "[2, 5, 2]"),
        wrong(function, "bias", zeros(3), ValueError, "shape [H_I=2]", "[3]"),
        wrong(function, "bias", zeros(), ValueError, "shape [H_I=2]", "[]"),
        wrong(function, "k_idx", zeros(2, 5, 4, device="meta"), ValueError, "device cpu as q_idx", "meta"),
        wrong(function, "bias", zeros(2, device="meta"), ValueError, "device cpu as q_idx", "meta"),
        Bad(
            function,
            {"q_idx": zeros(2, 3, 0, 4), "head_logits": zeros(2, 3, 0), "bias": zeros(0)},
            ValueError,
            "q_idx",
            "at least one head and one channel",
            "[2, 3, 0, 4]",
        ),
        wrong(function, "start", -1, ValueError, "an int ≥ 0", "-1"),
        wrong(function, "start", 2**31 - 3, ValueError, "start + L ≤ 2147483647", "2147483645"),
        wrong(function, "start", 2**63, ValueError, "start + L ≤ 2147483647", "9223372036854775808"),
        wrong(function, "start", 1.0, TypeError, "an int", "float 1.0"),
        wrong(function, "start", True, TypeError, "an int", "bool True"),
        wrong(function, "start", None, TypeError, "an int", "NoneType None"),
        wrong(function, "start", ints(2).long(), TypeError, "dtype int32", "torch.int64"),
        wrong(function, "start", ints(3), ValueError, "shape [B=2]", "[3]"),
        wrong(function, "start", ints(2, device="meta"), ValueError, "device cpu as q_idx", "meta"),
        not_a_tensor(function, "lengths", [5, 5]),
        wrong(function, "lengths", ints(2).long(), TypeError, "dtype int32", "torch.int64"),
        wrong(function, "lengths", ints(2, 1), ValueError, "shape [B=2]", "[2, 1]"),
        wrong(function, "lengths", ints(2, device="meta"), ValueError, "device cpu as q_idx", "meta"),
    ]


def scores_table(function: str) -> list[Bad]:
    return [
        not_a_tensor(function, "scores", [[0.0]]),
        wrong(function, "scores", zeros(2, 3, 5).half(), TypeError, WIDE, "torch.float16"),
        wrong(function, "scores", ints(2, 3, 5), TypeError, WIDE, "torch.int32"),
        wrong(function, "scores", zeros(3, 5), ValueError, "shape [B, L, S]", "[3, 5]"),
        without_strides(function, "scores", zeros(2, 3, 5)),
    ]


def mean_variance_table(function: str) -> list[Bad]:
    name = "mean_variance"
    return [
        wrong(function, name, "0.5", TypeError, "a float or a scalar tensor", "str"),
        wrong(function, name, None, TypeError, "a float or a scalar tensor", "NoneType"),
        wrong(function, name, True, TypeError, "a float or a scalar tensor", "bool"),
        wrong(function, name, zeros(1), ValueError, "a scalar (shape [])", "shape [1]"),
        wrong(function, name, zeros().bfloat16(), TypeError, WIDE, "torch.bfloat16"),
        wrong(function, name, zeros(device="meta"), ValueError, "device cpu", "meta"),
        wrong(function, name, HUGE, ValueError, "a finite number", str(HUGE)),
        without_strides(function, name, zeros()),
    ]


def selection_table(function: str, first: str, expected: str) -> list[Bad]:
    """`first` is the argument whose device the others must share, `expected` what a selection may be."""
    return [
        wrong(function, "selection", tuple(selection()), TypeError, expected, "tuple"),
        *[
            Bad(function, {"selection": Selection(*slots)}, TypeError, name, "a torch.Tensor", "NoneType")
            for name, slots in {
                "selection.indices": (None, ints(2, 3)),
                "selection.counts": (ints(2, 3, 2), None),
            }.items()
        ],
        Bad(
            function,
            {"selection": selection(dtype=torch.int64)},
            TypeError,
            "selection.indices",
            "dtype int32",
            "torch.int64",
        ),
        Bad(
            function,
            {"selection": selection(L=4)},
            ValueError,
            "selection.indices",
            "shape [B=2, L=3, K]",
            "[2, 4, 2]",
        ),
        Bad(
            function,
            {"selection": Selection(ints(2, 3, 2), ints(2, 3, 1))},
            ValueError,
            "selection.counts",
            "shape [B=2, L=3]",
            "[2, 3, 1]",
        ),
        Bad(function, {"selection": selection(device="meta")}, ValueError, "indices", f"device cpu as {first}", "meta"),
    ]


def heads_table(function: str, first: str) -> list[Bad]:
    """Queries and keys; `first` is the argument whose device the others must share."""
    meta = zeros(2, 5, 2, 4, device="meta")
    return [
        *[not_a_tensor(function, name, None) for name in ("q", "k")],
        *[wrong(function, name, ints(2, 3, 4, 4), TypeError, FLOATS, "torch.int32") for name in ("q", "k")],
        wrong(function, "k", zeros(2, 5, 2, 4).half(), TypeError, "dtype torch.float32 as q", "torch.float16"),
        wrong(function, "q", zeros(2, 3, 16), ValueError, "shape [B", "[2, 3, 16]"),
        wrong(function, "q", zeros(2, 3, 3, 4), ValueError, "H a multiple of H_kv = 2", "H = 3"),
        wrong(function, "q", zeros(2, 3, 0, 4), ValueError, "at least one head and one channel", "[2, 3, 0, 4]"),
        wrong(function, "k", zeros(2, 5, 2, 8), ValueError, "H_kv, d_h=4]", "[2, 5, 2, 8]"),
        wrong(function, "k", meta, ValueError, f"device cpu as {first}", "meta"),
        without_strides(function, "q", zeros(2, 3, 4, 4)),
        wrong(function, "start", -1, ValueError, "an int ≥ 0", "-1"),
        wrong(function, "start", None, TypeError, "an int", "NoneType None"),
    ]


def scale_table(function: str) -> list[Bad]:
    return [
        wrong(function, "scale", "1", TypeError, "a number", "str '1'"),
        wrong(function, "scale", math.inf, ValueError, "a finite number", "inf"),
        wrong(function, "scale", HUGE, ValueError, "a finite number", str(HUGE)),
    ]


GATES = {"value_gate_logits": ("S=5", "H_kv=2"), "output_gate_logits": ("L=3", "H=4")}
TABLE = [
    *indexer_table("indexer_scores"),
    *indexer_table("indexed_selection"),
    wrong("indexer_scores", "scale", "0.5", TypeError, "a number", "str '0.5'"),
    wrong("indexer_scores", "scale", None, TypeError, "a number", "NoneType None"),
    wrong("indexer_scores", "scale", math.nan, ValueError, "a finite number", "nan"),
    wrong("indexer_scores", "scale", -HUGE, ValueError, "a finite number", str(-HUGE)),
    wrong("indexed_selection", "config", {"k_base": 1}, TypeError, "a GSAConfig", "dict"),
    *mean_variance_table("indexed_selection"),
    *mean_variance_table("token_budget"),
    *scores_table("score_variance"),
    *scores_table("select_tokens"),
    not_a_tensor("token_budget", "variance", 0.5),
    wrong("token_budget", "variance", zeros(2, 3).half(), TypeError, WIDE, "torch.float16"),
    wrong("token_budget", "variance", zeros(3), ValueError, "shape [B, L]", "[3]"),
    not_a_tensor("token_budget", "n_valid", 5),
    wrong("token_budget", "n_valid", ints(2, 3).long(), TypeError, "dtype int32", "torch.int64"),
    wrong("token_budget", "n_valid", ints(2, 4), ValueError, "shape [B=2, L=3]", "[2, 4]"),
    wrong("token_budget", "n_valid", ints(2, 3, device="meta"), ValueError, "device cpu as variance", "meta"),
    *[wrong("token_budget", n, 0, ValueError, "an int ≥ 1", "0") for n in ("k_base", "k_min", "k_max")],
    *[wrong("token_budget", n, 2.0, TypeError, "an int", "float 2.0") for n in ("k_base", "k_min", "k_max")],
    *[wrong("token_budget", n, 2**31, ValueError, "an int ≤ 16777216", "2147483648") for n in ("k_base", "k_max")],
    wrong("token_budget", "k_min", 9, ValueError, "at most k_max = 8", "9"),
    wrong("token_budget", "rule", "random", ValueError, "proportional or inverse or fixed", "'random'"),
    wrong("token_budget", "rule", 1, TypeError, "a str", "int 1"),
    not_a_tensor("select_tokens", "budget", 2),
    wrong("select_tokens", "budget", ints(2, 3).long(), TypeError, "dtype int32", "torch.int64"),
    wrong("select_tokens", "budget", ints(2, 5), ValueError, "shape [B=2, L=3]", "[2, 5]"),
    wrong("select_tokens", "budget", ints(2, 3, device="meta"), ValueError, "device cpu as scores", "meta"),
    wrong("select_tokens", "width", 0, ValueError, "an int ≥ 1", "0"),
    wrong("select_tokens", "width", 2.0, TypeError, "an int", "float 2.0"),
    wrong("select_tokens", "budget", (2**24 + 1) * ints(2, 3), ValueError, "at most 16777216", "16777217"),
    wrong("select_tokens", "width", 2**40, ValueError, "an int ≤ 16777216", "1099511627776"),
    *[not_a_tensor("sparse_attention", name, None) for name in ("q", "k", "v")],
    *[
        wrong("sparse_attention", name, ints(2, 3, 4, 4), TypeError, FLOATS, "torch.int32")
        for name in ("q", "k", "v", *GATES)
    ],
    *[
        wrong(
            "sparse_attention", name, zeros(2, 5, 2, 4).half(), TypeError, "dtype torch.float32 as q", "torch.float16"
        )
        for name in ("k", "v")
    ],
    wrong("sparse_attention", "q", zeros(2, 3, 16), ValueError, "shape [B, L, H, d_h]", "[2, 3, 16]"),
    wrong("sparse_attention", "q", zeros(2, 3, 3, 4), ValueError, "H a multiple of H_kv = 2", "H = 3"),
    wrong("sparse_attention", "q", zeros(2, 3, 0, 4), ValueError, "at least one head and one channel", "[2, 3, 0, 4]"),
    wrong("sparse_attention", "k", zeros(2, 5, 2, 8), ValueError, "shape [B=2, S, H_kv, d_h=4]", "[2, 5, 2, 8]"),
    wrong("sparse_attention", "v", zeros(2, 4, 2, 4), ValueError, "shape [B=2, S=5, H_kv=2, d_h=4]", "[2, 4, 2, 4]"),
    wrong("sparse_attention", "v", zeros(2, 5, 4, 4), ValueError, "shape [B=2, S=5, H_kv=2, d_h=4]", "[2, 5, 4, 4]"),
    wrong("sparse_attention", "v", zeros(2, 5, 2, 4, device="meta"), ValueError, "device cpu as q", "meta"),
    wrong("sparse_attention", "selection", None, TypeError, "a Selection", "NoneType"),
    *selection_table("sparse_attention", "q", "a Selection"),
    *scale_table("sparse_attention"),
    *[without_strides("sparse_attention", name, zeros(2, 5, 2, 4)) for name in ("k", "v")],
    wrong("sparse_attention", "start", 2**31, ValueError, "start + L ≤ 2147483647", "2147483648"),
    wrong("sparse_attention", "start", -1, ValueError, "an int ≥ 0", "-1"),
    wrong("sparse_attention", "start", 0.0, TypeError, "an int", "float 0.0"),
    wrong("sparse_attention", "start", ints(3), ValueError, "shape [B=2]", "[3]"),
    Bad(
        "sparse_attention",
        {"k": zeros(2, 2, 2, 4), "v": zeros(2, 2, 2, 4)},
        ValueError,
        "start",
        "a value when S = 2 is below L = 3",
        "None",
    ),
    *[not_a_tensor("sparse_attention", name, 1.0) for name in GATES],
    *[
        wrong("sparse_attention", name, zeros(2, 1, 2, 4), ValueError, f"shape [B=2, {n}, {h}, d_h=4]", "[2, 1, 2, 4]")
        for name, (n, h) in GATES.items()
    ],
    *indexer_table("indexer_kl_loss"),
    *heads_table("indexer_kl_loss", "q_idx"),
    *scale_table("indexer_kl_loss"),
    *selection_table("indexer_kl_loss", "q_idx", "a Selection or None"),
    wrong("indexer_kl_loss", "q", zeros(2, 4, 4, 4), ValueError, "shape [B=2, L=3, H, d_h]", "[2, 4, 4, 4]"),
    wrong("indexer_kl_loss", "k", zeros(2, 6, 2, 4), ValueError, "shape [B=2, S=5, H_kv, d_h=4]", "[2, 6, 2, 4]"),
    wrong("indexer_kl_loss", "indexer_scale", None, TypeError, "a number", "NoneType None"),
    wrong("indexer_kl_loss", "indexer_scale", math.nan, ValueError, "a finite number", "nan"),
    wrong("indexer_kl_loss", "temperature", 0.0, ValueError, "a finite positive number", "0.0"),
    wrong("indexer_kl_loss", "temperature", "1", TypeError, "a number", "str '1'"),
    not_a_tensor("indexer_kl_loss", "lse", 1.0),
    wrong("indexer_kl_loss", "lse", zeros(2, 3, 4).half(), TypeError, WIDE, "torch.float16"),
    wrong("indexer_kl_loss", "lse", zeros(2, 3, 2), ValueError, "shape [B=2, L=3, H=4]", "[2, 3, 2]"),
    wrong("indexer_kl_loss", "lse", zeros(2, 3, 4, device="meta"), ValueError, "device cpu as q_idx", "meta"),
    Bad("indexer_kl_loss", {"selection": None}, ValueError, "lse", "None without a selection", "a value"),
    *[not_a_tensor("apply_gate", name, 1.0) for name in ("x", "gate_logits")],
    *[wrong("apply_gate", name, ints(2, 3), TypeError, FLOATS, "torch.int32") for name in ("x", "gate_logits")],
    *[without_strides("apply_gate", name, zeros(2, 3)) for name in ("x", "gate_logits")],
    wrong("apply_gate", "gate_logits", zeros(3), ValueError, "shape [2, 3] as x", "[3]"),
    wrong("apply_gate", "gate_logits", zeros(2, 3, device="meta"), ValueError, "device cpu as x", "meta"),
    not_a_tensor("GatedSparseAttention.forward", "h", None),
    wrong("GatedSparseAttention.forward", "h", ints(2, 3, 8), TypeError, FLOATS, "torch.int32"),
    wrong("GatedSparseAttention.forward", "h", zeros(3, 8), ValueError, "shape [B, L, d=8]", "[3, 8]"),
    wrong("GatedSparseAttention.forward", "h", zeros(2, 3, 16), ValueError, "shape [B, L, d=8]", "[2, 3, 16]"),
    wrong(
        "GatedSparseAttention.forward",
        "h",
        zeros(2, 3, 8).half(),
        TypeError,
        "dtype torch.float32 as the parameters",
        "torch.float16",
    ),
    wrong(
        "GatedSparseAttention.forward",
        "h",
        zeros(2, 3, 8, device="meta"),
        ValueError,
        "device cpu as the parameters",
        "meta",
    ),
    not_a_tensor("GatedSparseAttention.forward", "lengths", [3, 3]),
    wrong("GatedSparseAttention.forward", "lengths", ints(2).long(), TypeError, "dtype int32", "torch.int64"),
    wrong("GatedSparseAttention.forward", "lengths", ints(3), ValueError, "shape [B=2]", "[3]"),
    wrong("GatedSparseAttention.forward", "lengths", ints(2, device="meta"), ValueError, "device cpu as h", "meta"),
    without_strides("GatedSparseAttention.forward", "h", zeros(2, 3, 8)),
    wrong("GatedSparseAttention.forward", "cache", zeros(2), TypeError, "a GSACache", "Tensor"),
    wrong(
        "GatedSparseAttention.forward",
        "cache",
        GSACache.allocate(CONFIG, 1, 8),
        ValueError,
        "batch size 2 as h",
        "1",
    ),
    wrong(
        "GatedSparseAttention.forward",
        "cache",
        GSACache.allocate(CONFIG, 2, 2),
        ValueError,
        "room for 3 more tokens",
        "0 of 2 slots in use",
    ),
]
REFERENCE_TABLE = [
    *heads_table("dense_attention", "q"),
    wrong("dense_attention", "v", zeros(2, 4, 2, 4), ValueError, "shape [B=2, S=5, H_kv=2, d_h=4]", "[2, 4, 2, 4]"),
    wrong("dense_attention", "v", zeros(2, 5, 2, 4).half(), TypeError, "dtype torch.float32 as q", "torch.float16"),
    not_a_tensor("dense_attention", "lengths", [5, 5]),
    wrong("dense_attention", "lengths", ints(3), ValueError, "shape [B=2]", "[3]"),
    wrong("dense_attention", "lengths", ints(2, device="meta"), ValueError, "device cpu as q", "meta"),
    *heads_table("captured_mass", "q"),
    *scale_table("captured_mass"),
    *selection_table("captured_mass", "q", "a Selection"),
    wrong("captured_mass", "selection", None, TypeError, "a Selection", "NoneType"),
    not_a_tensor("captured_mass", "lengths", [5, 5]),
    wrong("captured_mass", "lengths", ints(3), ValueError, "shape [B=2]", "[3]"),
    wrong("captured_mass", "lengths", ints(2, device="meta"), ValueError, "device cpu as q", "meta"),
    not_a_tensor("apply_rope", "x", None),
    wrong("apply_rope", "x", ints(2, 3, 4, 4), TypeError, FLOATS, "torch.int32"),
    wrong("apply_rope", "x", zeros(2, 3, 4), ValueError, "shape [B, L, heads, d]", "[2, 3, 4]"),
    wrong("apply_rope", "x", zeros(2, 3, 4, 5), ValueError, "an even last axis", "[2, 3, 4, 5]"),
    wrong("apply_rope", "start", -1, ValueError, "an int ≥ 0", "-1"),
    wrong("apply_rope", "start", ints(2).long(), TypeError, "dtype int32", "torch.int64"),
    wrong("apply_rope", "start", ints(3), ValueError, "shape [B=2]", "[3]"),
    wrong("apply_rope", "start", ints(2, device="meta"), ValueError, "device cpu as x", "meta"),
    wrong("apply_rope", "start", 2**31, ValueError, "start + L ≤ 2147483647", "2147483648"),
    wrong("apply_rope", "theta", 0.0, ValueError, "a finite positive number", "0.0"),
    wrong("apply_rope", "theta", "1e4", TypeError, "a number", "str '1e4'"),
    wrong("generate", "model", {"d": 8}, TypeError, "a LanguageModel", "dict"),
    wrong("generate", "model", torch.nn.Linear(2, 2).eval(), TypeError, "a LanguageModel", "Linear"),
    wrong("generate", "prompt", -ints(2, 3, dtype=torch.int64), ValueError, "tokens in [0, V = 257)", "-1"),
    wrong("generate", "prompt", 257 * ints(2, 3, dtype=torch.int64), ValueError, "tokens in [0, V = 257)", "257"),
    wrong("generate", "use_cache", 1, TypeError, "a bool", "int"),
    wrong("generate", "progress", None, TypeError, "a bool", "NoneType"),
    not_a_tensor("generate", "prompt", [1, 2]),
    wrong("generate", "prompt", ints(2, 3), TypeError, "dtype int64", "torch.int32"),
    wrong("generate", "prompt", ints(3, dtype=torch.int64), ValueError, "shape [B, T]", "[3]"),
    wrong("generate", "prompt", ints(2, 0, dtype=torch.int64), ValueError, "at least one token", "shape [2, 0]"),
    wrong("generate", "prompt", ints(2, 3, dtype=torch.int64, device="meta"), ValueError, "device cpu", "meta"),
    wrong("generate", "max_new_tokens", 0, ValueError, "an int ≥ 1", "0"),
    wrong("generate", "max_new_tokens", 2.0, TypeError, "an int", "float 2.0"),
    not_a_tensor("generate", "lengths", [3, 3]),
    wrong("generate", "lengths", ints(2).long(), TypeError, "dtype int32", "torch.int64"),
    wrong("generate", "lengths", ints(3), ValueError, "shape [B=2]", "[3]"),
    wrong("generate", "lengths", ints(2, device="meta"), ValueError, "device cpu as model", "meta"),
    wrong("generate", "lengths", 0 * ints(2), ValueError, "1 ≤ lengths ≤ T = 3 tokens in every prompt", "[0, 0]"),
    wrong("generate", "lengths", 4 * ints(2), ValueError, "1 ≤ lengths ≤ T = 3 tokens in every prompt", "[4, 4]"),
    wrong("generate", "temperature", -0.5, ValueError, "at least 0", "-0.5"),
    wrong("generate", "temperature", math.nan, ValueError, "a finite number", "nan"),
    wrong("generate", "temperature", "1", TypeError, "a number", "str '1'"),
    wrong("generate", "top_p", 0.0, ValueError, "0 < top_p ≤ 1", "0.0"),
    wrong("generate", "top_p", 1.5, ValueError, "0 < top_p ≤ 1", "1.5"),
    wrong("generate", "top_p", None, TypeError, "a number", "NoneType None"),
    wrong("generate", "generator", 0, TypeError, "a torch.Generator", "int"),
    wrong("generate", "stop_token", -1, ValueError, "an int ≥ 0", "-1"),
    wrong("generate", "stop_token", 257, ValueError, "below V = 257", "257"),
    wrong("generate", "stop_token", "a", TypeError, "an int", "str 'a'"),
]


@pytest.fixture(params=PACKAGES)
def package(request: pytest.FixtureRequest) -> ModuleType:
    return importlib.import_module(request.param)


def call(package: ModuleType, function: str, values: dict[str, Any]) -> Any:
    options = PACKAGES[package.__name__]
    if function == "GatedSparseAttention.forward":
        return package.GatedSparseAttention(CONFIG, **options).eval()(**values)
    return getattr(package, function)(**values, **options)


def check_refusal(package: ModuleType, bad: Bad, valid: dict[str, Any]) -> None:
    with pytest.raises(bad.exception) as error:
        call(package, bad.function, {**valid, **bad.changes})
    assert type(error.value) is bad.exception
    message = str(error.value)
    assert message.startswith(f"{bad.argument}: expected "), message
    assert bad.expected in message
    assert bad.got in message.partition("got ")[2], message


@pytest.mark.parametrize("function", VALID)
def test_the_valid_calls_of_the_table_are_valid(package, function):
    call(package, function, VALID[function])


@pytest.mark.parametrize("bad", TABLE, ids=str)
def test_bad_input_is_refused_by_type_and_named(package, bad):
    check_refusal(package, bad, VALID[bad.function])


@pytest.mark.parametrize("bad", REFERENCE_TABLE, ids=str)
def test_bad_input_of_the_reference_alone_is_refused_by_type_and_named(bad):
    check_refusal(importlib.import_module("gsa_ref"), bad, ONLY_REFERENCE[bad.function])


def test_a_layer_wants_a_config(package):
    with pytest.raises(TypeError, match=r"^config: expected a GSAConfig, got dict$"):
        package.GatedSparseAttention({"d": 8}, **PACKAGES[package.__name__])


def test_an_indexer_checks_its_config_and_its_input():
    with pytest.raises(TypeError, match=r"^config: expected a GSAConfig, got dict$"):
        LightningIndexer({"d": 8})
    indexer = LightningIndexer(CONFIG)
    for h, start, exception, message in (
        (zeros(2, 3, 7), 0, ValueError, r"^h: expected shape \[B, L, d=8\], got \[2, 3, 7\]$"),
        (
            zeros(2, 3, 8).half(),
            0,
            TypeError,
            r"^h: expected dtype torch.float32 as the parameters, got torch.float16$",
        ),
        (zeros(2, 3, 8, device="meta"), 0, ValueError, r"^h: expected device cpu as the parameters, got meta$"),
        (zeros(2, 3, 8), -1, ValueError, r"^start: expected an int ≥ 0, got -1$"),
        (zeros(2, 3, 8), ints(3), ValueError, r"^start: expected shape \[B=2\], got \[3\]$"),
        (zeros(2, 3, 8), ints(2, device="meta"), ValueError, r"^start: expected device cpu as h, got meta$"),
    ):
        with pytest.raises(exception, match=message):
            indexer(h, start)


@pytest.mark.parametrize(
    ("name", "value", "exception", "expected"),
    [
        ("batch_size", -1, ValueError, "an int"),
        ("capacity", 2.5, TypeError, "an int"),
        ("capacity", 2**31, ValueError, "an int"),
        ("config", "gsa", TypeError, "a GSAConfig"),
        ("dtype", "float32", TypeError, "a torch.dtype"),
        ("dtype", torch.int32, TypeError, "dtype float32 or"),
        ("device", "nowhere", ValueError, "a device that PyTorch knows"),
        ("device", 1.5, TypeError, "a torch.device or a str"),
    ],
)
def test_a_cache_is_allocated_from_what_it_can_hold(name, value, exception, expected):
    with pytest.raises(exception, match=f"^{name}: expected {expected}.*, got .*"):
        GSACache.allocate(**{"config": CONFIG, "batch_size": 2, "capacity": 3, name: value})


def test_bytes_of_a_token_want_a_config_and_a_dtype():
    with pytest.raises(TypeError, match=r"^config: expected a GSAConfig, got NoneType$"):
        GSACache.bytes_per_token(None)
    with pytest.raises(TypeError, match=r"^dtype: expected a torch.dtype, got int 4$"):
        GSACache.bytes_per_token(CONFIG, dtype=4)


@pytest.mark.parametrize(
    ("name", "value", "exception"),
    [
        ("k", None, TypeError),
        ("k", zeros(2, 6, 2), ValueError),
        ("v", zeros(2, 6, 1, 4), ValueError),
        ("v", zeros(2, 6, 2, 4).half(), TypeError),
        ("k_idx", zeros(2, 5, 4), ValueError),
        ("lengths", ints(2).long(), TypeError),
        ("lengths", ints(2, device="meta"), ValueError),
        ("longest", 7, ValueError),
        ("longest", 1.0, TypeError),
    ],
)
def test_a_cache_is_made_of_tensors_that_fit_one_another(name, value, exception):
    parts = {"k": zeros(2, 6, 2, 4), "v": zeros(2, 6, 2, 4), "k_idx": zeros(2, 6, 4), "lengths": ints(2), "longest": 1}
    GSACache(**parts)
    with pytest.raises(exception, match=f"^{name}: expected "):
        GSACache(**parts | {name: value})


@pytest.mark.parametrize(
    ("name", "value", "exception"),
    [
        ("config", None, TypeError),
        ("batch_size", 2.0, TypeError),
        ("n_new", -1, ValueError),
        ("like", [0.0], TypeError),
    ],
)
def test_the_check_of_a_cache_checks_its_own_arguments(name, value, exception):
    arguments = {"config": CONFIG, "batch_size": 2, "n_new": 1, "like": zeros(1)}
    GSACache.allocate(CONFIG, 2, 3).check(**arguments)
    with pytest.raises(exception, match=f"^{name}: expected "):
        GSACache.allocate(CONFIG, 2, 3).check(**arguments | {name: value})


@pytest.mark.parametrize(
    ("slots", "n_keys", "exception", "name"),
    [
        (([[[0]]], ints(1, 1)), None, TypeError, "selection.indices"),
        ((ints(1, 1, 1).long(), ints(1, 1)), None, TypeError, "selection.indices"),
        ((ints(1, 1, 1), ints(1, 2)), None, ValueError, "selection.counts"),
        ((ints(1, 1, 1), ints(1, 1, device="meta")), None, ValueError, "counts"),
        ((ints(1, 1, 1), ints(1, 1)), 5.0, TypeError, "n_keys"),
        ((ints(1, 1, 1), ints(1, 1)), -1, ValueError, "n_keys"),
    ],
)
def test_validation_of_a_selection_checks_types_and_shapes_first(slots, n_keys, exception, name):
    with pytest.raises(exception, match=f"^{name}: expected "):
        Selection(*slots).validate(n_keys)


def test_a_model_wants_something_that_makes_its_layers():
    with pytest.raises(TypeError, match=r"^layer: expected a class or function that makes a layer, got str$"):
        LanguageModel(ModelConfig(attention=CONFIG, n_layers=1, d_ff=8), layer="gsa")


def test_bounds_want_a_mode_and_a_dtype_that_they_know():
    inputs = np.ones((2, 1, 3)), np.ones((4, 3)), np.ones((2, 1)), np.ones(1)
    with pytest.raises(ValueError, match=r"^sigmoid_mode: expected exact or approximate, got 'fast'$"):
        check.score_tolerance(*inputs, scale=1.0, sigmoid_mode="fast")
    for dtype, got in ((torch.int32, "torch.int32"), ("float32", "str 'float32'")):
        with pytest.raises(TypeError, match=f"^dtype: expected .*got {got}$"):
            check.unit_roundoff(dtype)


def test_every_public_function_is_in_the_table():
    import gsa_ref

    functions = {n for n in gsa_ref.__all__ if callable(getattr(gsa_ref, n)) and n[0].islower()}
    assert functions == {f for f in {*VALID, *ONLY_REFERENCE} if f[0].islower()}
    assert {bad.function for bad in [*TABLE, *REFERENCE_TABLE]} == {*VALID, *ONLY_REFERENCE}


CHECKS = {
    "indexer_scores": arguments.check_indexer_arguments,
    "score_variance": arguments.check_scores,
    "token_budget": arguments.check_budget_arguments,
    "select_tokens": arguments.check_selection_arguments,
    "apply_gate": arguments.check_gate_arguments,
    "sparse_attention": arguments.check_attention_arguments,
    "indexer_kl_loss": arguments.check_kl_arguments,
    "dense_attention": arguments.check_dense_attention_arguments,
    "decode_attention": arguments.check_decode_arguments,
}
DECODE = {
    **INDEXER,
    **{name: VALID["sparse_attention"][name] for name in ("q", "k", "v", "scale", "output_gate_logits")},
    "start": 2,
    "lengths": None,
}
# Whatever may be a tensor, as one.
TENSORS = {
    "start": ints(2),
    "lengths": ints(2),
    "mean_variance": zeros(),
    "value_gate_logits": zeros(2, 5, 2, 4),
    "output_gate_logits": zeros(2, 3, 4, 4),
}


def checked(function: str) -> dict[str, Any]:
    """A valid call of the function's check, with as many tensors as it takes."""
    values = {**VALID, **ONLY_REFERENCE, "decode_attention": DECODE}[function]
    values = {**values, **{name: x for name, x in TENSORS.items() if name in values}}
    if "selection" in values:
        values["indices"], values["counts"] = values.pop("selection")
    return values


@pytest.mark.parametrize("function", CHECKS)
def test_checks_read_metadata_only(function):
    """Tensors without data pass the checks: nothing there can wait for a device."""
    CHECKS[function](**{n: x.to("meta") if isinstance(x, torch.Tensor) else x for n, x in checked(function).items()})


@pytest.mark.parametrize("function", CHECKS)
def test_a_tensor_on_another_device_than_the_others_is_refused(function):
    values = checked(function)
    moved = [name for name, x in values.items() if isinstance(x, torch.Tensor)]
    CHECKS[function](**values)
    for name in moved if len(moved) > 1 else ():
        with pytest.raises(ValueError, match=r"^\w+: expected device (cpu|meta) as \w+, got (meta|cpu)$"):
            CHECKS[function](**{**values, name: values[name].to("meta")})


ONE = {"q_idx": zeros(1, 1, 1, 1), "k_idx": zeros(1, 1, 1), "head_logits": zeros(1, 1, 1), "bias": zeros(1)}
ONE_HEAD = {name: zeros(1, 1, 1, 1) for name in ("q", "k", "v")}
ONE_SLOT = {"indices": ints(1, 1, 1), "counts": ints(1, 1)}
MOST = 2**24


@pytest.mark.parametrize(
    ("function", "values"),
    [
        ("indexer_scores", {**ONE, "scale": sys.float_info.max, "start": 2**31 - 2, "lengths": ints(1)}),
        ("token_budget", {"variance": zeros(1, 1), "mean_variance": 0.0, "n_valid": ints(1, 1)}),
        ("select_tokens", {"scores": zeros(1, 1, 1), "budget": ints(1, 1), "width": MOST}),
        (
            "sparse_attention",
            {**ONE_HEAD, **ONE_SLOT, "scale": -sys.float_info.max, "start": None, **dict.fromkeys(GATES)},
        ),
        ("dense_attention", {**ONE_HEAD, "start": 2**31 - 2, "lengths": None}),
    ],
)
def test_sizes_and_numbers_at_their_limits_are_legal(function, values):
    sizes = {"k_base": MOST, "k_min": MOST, "k_max": MOST, "rule": "fixed"} if function == "token_budget" else {}
    CHECKS[function](**values, **sizes)


@pytest.mark.parametrize(
    ("changes", "exception", "named"),
    [
        ({"q_idx": zeros(2, 4, 2, 4)}, ValueError, "head_logits"),
        ({"start": -1}, ValueError, "start"),
        ({"lengths": ints(3)}, ValueError, "lengths"),
        ({"q": zeros(2, 4, 4, 4)}, ValueError, "q"),
        ({"q": zeros(3, 3, 4, 4), "k": zeros(3, 5, 2, 4), "v": zeros(3, 5, 2, 4)}, ValueError, "q"),
        ({"k": zeros(2, 6, 2, 4), "v": zeros(2, 6, 2, 4)}, ValueError, "k"),
        ({"v": zeros(2, 5, 2, 4, dtype=torch.float16)}, TypeError, "v"),
        ({"scale": math.nan}, ValueError, "scale"),
        ({"output_gate_logits": zeros(2, 3, 4, 5)}, ValueError, "output_gate_logits"),
        ({"output_gate_logits": zeros(2, 4, 4, 4)}, ValueError, "output_gate_logits"),
        ({"output_gate_logits": zeros(2, 3, 4, 4, device="meta")}, ValueError, "output_gate_logits"),
        ({name: x.to("meta") for name, x in INDEXER.items()}, ValueError, "q"),
    ],
)
def test_the_check_of_a_decode_step_holds_its_two_halves_against_one_another(changes, exception, named):
    arguments.check_decode_arguments(**DECODE)
    with pytest.raises(exception, match=f"^{named}: expected"):
        arguments.check_decode_arguments(**{**DECODE, **changes})
