"""Argument checks shared by `gsa_ref` and `gsa_fast`.

Every check reads metadata only (shape, dtype, device), so none of them waits for a GPU. A message names the argument,
says what was expected and what came: `TypeError` for a type or dtype, `ValueError` for a shape, device or value.
"""

import sys
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

FLOATING = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
RULES = ("proportional", "inverse", "fixed")
MOST_TOKENS = 2**24  # float32, in which Eq. 8 is computed, counts exactly up to here
INT32_MAX = 2**31 - 1  # positions and lengths are int32


def check_tensor(name: str, value: Any, dims: str, sizes: dict[str, int], *, dtypes: Iterable[torch.dtype]) -> None:
    """Check that `value` is a tensor of one of `dtypes` with the axes named in `dims`.

    `sizes` maps an axis name to its length: known names must match, new ones are added.
    """
    check_dense(name, value)
    check_dtype(name, value.dtype, dtypes)
    axes = dims.split()
    known = dict(sizes)
    fits = value.dim() == len(axes)
    if fits:
        for axis, size in zip(axes, value.shape, strict=True):
            fits = fits and sizes.setdefault(axis, size) == size
    if not fits:
        # Written on failure only: to format a size would make a compiled graph valid for that size alone.
        expected = ", ".join(f"{a}={known[a]}" if a in known else a for a in axes)
        raise ValueError(f"{name}: expected shape [{expected}], got {list(value.shape)}")


def check_dense(name: str, value: Any) -> None:
    if not isinstance(value, Tensor):
        raise TypeError(f"{name}: expected a torch.Tensor, got {type(value).__name__}")
    if value.layout != torch.strided:
        raise TypeError(f"{name}: expected a tensor with strides, got layout {value.layout}")


def check_dtype(name: str, dtype: Any, allowed: Iterable[torch.dtype]) -> None:
    if not isinstance(dtype, torch.dtype):
        raise TypeError(f"{name}: expected a torch.dtype, got {type(dtype).__name__} {dtype!r}")
    if dtype not in (allowed := tuple(allowed)):
        raise TypeError(f"{name}: expected dtype {_or(allowed)}, got {dtype}")


def check_same_dtype(name: str, value: Tensor, like_name: str, like: Tensor) -> None:
    if value.dtype != like.dtype:
        raise TypeError(f"{name}: expected dtype {like.dtype} as {like_name}, got {value.dtype}")


def check_same_device(**tensors: Any) -> None:
    """Check that all tensors among the values share a device. Other values are ignored."""
    given = {name: t for name, t in tensors.items() if isinstance(t, Tensor)}
    (first_name, first), *others = given.items()
    for name, tensor in others:
        if tensor.device != first.device:
            raise ValueError(f"{name}: expected device {first.device} as {first_name}, got {tensor.device}")


def check_int(name: str, value: Any, minimum: int, maximum: int | None = None) -> None:
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name}: expected an int, got {type(value).__name__} {value!r}")
    if value < minimum:
        raise ValueError(f"{name}: expected an int ≥ {minimum}, got {value}")
    if maximum is not None and value > maximum:
        raise ValueError(f"{name}: expected an int ≤ {maximum}, got {value}")


def check_bool(name: str, value: Any) -> None:
    if not isinstance(value, bool):
        raise TypeError(f"{name}: expected a bool, got {type(value).__name__}")


def check_number(name: str, value: Any, *, positive: bool = False) -> None:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise TypeError(f"{name}: expected a number, got {type(value).__name__} {value!r}")
    # An int may be too large for any float.
    if not abs(value) <= sys.float_info.max or (positive and value <= 0):
        raise ValueError(f"{name}: expected a finite {'positive ' if positive else ''}number, got {value}")


def check_choice(name: str, value: Any, choices: tuple[str, ...]) -> None:
    if not isinstance(value, str):
        raise TypeError(f"{name}: expected a str, got {type(value).__name__} {value!r}")
    if value not in choices:
        raise ValueError(f"{name}: expected {_or(choices)}, got {value!r}")


def check_start(start: Any, sizes: dict[str, int]) -> None:
    if isinstance(start, Tensor):
        check_tensor("start", start, "B", sizes, dtypes=(torch.int32,))
    else:
        check_int("start", start, 0)
        if start > INT32_MAX - sizes["L"]:
            raise ValueError(f"start: expected start + L ≤ {INT32_MAX}, got {start}")


def check_lengths(lengths: Any, sizes: dict[str, int]) -> None:
    if lengths is not None:
        check_tensor("lengths", lengths, "B", sizes, dtypes=(torch.int32,))


def check_indexer_arguments(
    q_idx: Any, k_idx: Any, head_logits: Any, bias: Any, *, scale: Any, start: Any, lengths: Any
) -> None:
    sizes: dict[str, int] = {}
    check_tensor("q_idx", q_idx, "B L H_I d_I", sizes, dtypes=FLOATING)
    check_tensor("k_idx", k_idx, "B S d_I", sizes, dtypes=FLOATING)
    check_same_dtype("k_idx", k_idx, "q_idx", q_idx)
    check_tensor("head_logits", head_logits, "B L H_I", sizes, dtypes=FLOATING)
    check_tensor("bias", bias, "H_I", sizes, dtypes=FLOATING)
    if sizes["H_I"] < 1 or sizes["d_I"] < 1:
        raise ValueError(f"q_idx: expected at least one head and one channel, got {list(q_idx.shape)}")
    check_number("scale", scale)
    check_start(start, sizes)
    check_lengths(lengths, sizes)
    check_same_device(
        q_idx=q_idx,
        k_idx=k_idx,
        head_logits=head_logits,
        bias=bias,
        start=start,
        lengths=lengths,
    )


def check_hidden(h: Any, weight: Tensor, sizes: dict[str, int]) -> None:
    """Check hidden states against a parameter; under autocast their dtypes may differ."""
    check_tensor("h", h, "B L d", sizes, dtypes=FLOATING)
    if h.device != weight.device:
        raise ValueError(f"h: expected device {weight.device} as the parameters, got {h.device}")
    if h.dtype != weight.dtype and not torch.is_autocast_enabled(h.device.type):
        raise TypeError(f"h: expected dtype {weight.dtype} as the parameters, got {h.dtype}")


def check_scores(scores: Any) -> None:
    check_tensor("scores", scores, "B L S", {}, dtypes=(torch.float32, torch.float64))


def check_budget_sizes(k_base: Any, k_min: Any, k_max: Any, rule: Any) -> None:
    for name, value in (("k_base", k_base), ("k_min", k_min), ("k_max", k_max)):
        check_int(name, value, 1, MOST_TOKENS)
    if k_min > k_max:
        raise ValueError(f"k_min: expected at most k_max = {k_max}, got {k_min}")
    check_choice("rule", rule, RULES)


def check_mean_variance(mean_variance: Any, like: Tensor) -> None:
    if isinstance(mean_variance, Tensor):
        check_dense("mean_variance", mean_variance)
        if mean_variance.dim() != 0:
            raise ValueError(f"mean_variance: expected a scalar (shape []), got shape {list(mean_variance.shape)}")
        if mean_variance.dtype not in (torch.float32, torch.float64):
            raise TypeError(f"mean_variance: expected dtype float32 or float64, got {mean_variance.dtype}")
        check_same_device(variance=like, mean_variance=mean_variance)
    else:
        if isinstance(mean_variance, bool) or not isinstance(mean_variance, int | float):
            raise TypeError(f"mean_variance: expected a float or a scalar tensor, got {type(mean_variance).__name__}")
        if isinstance(mean_variance, int):
            check_number("mean_variance", mean_variance)


def check_budget_arguments(
    variance: Any, mean_variance: Any, n_valid: Any, *, k_base: Any, k_min: Any, k_max: Any, rule: Any
) -> None:
    sizes: dict[str, int] = {}
    check_tensor("variance", variance, "B L", sizes, dtypes=(torch.float32, torch.float64))
    check_tensor("n_valid", n_valid, "B L", sizes, dtypes=(torch.int32,))
    check_budget_sizes(k_base, k_min, k_max, rule)
    check_mean_variance(mean_variance, variance)
    check_same_device(variance=variance, n_valid=n_valid)


def check_selection_arguments(scores: Any, budget: Any, width: Any) -> None:
    check_scores(scores)
    check_tensor("budget", budget, "B L", {"B": scores.shape[0], "L": scores.shape[1]}, dtypes=(torch.int32,))
    if width is not None:
        check_int("width", width, 1, MOST_TOKENS)
    check_same_device(scores=scores, budget=budget)


def check_slots(indices: Any, counts: Any, sizes: dict[str, int]) -> None:
    check_tensor("selection.indices", indices, "B L K", sizes, dtypes=(torch.int32,))
    check_tensor("selection.counts", counts, "B L", sizes, dtypes=(torch.int32,))


def check_heads(q: Any, k: Any, v: Any, sizes: dict[str, int]) -> None:
    """Check the queries, keys and values of an attention against one another and against the known sizes."""
    check_tensor("q", q, "B L H d_h", sizes, dtypes=FLOATING)
    check_tensor("k", k, "B S H_kv d_h", sizes, dtypes=FLOATING)
    check_tensor("v", v, "B S H_kv d_h", sizes, dtypes=FLOATING)
    check_same_dtype("k", k, "q", q)
    check_same_dtype("v", v, "q", q)
    if sizes["H_kv"] < 1 or sizes["H"] < 1 or sizes["d_h"] < 1:
        raise ValueError(f"q: expected at least one head and one channel, got {list(q.shape)} with k {list(k.shape)}")
    if sizes["H"] % sizes["H_kv"]:
        raise ValueError(f"q: expected H a multiple of H_kv = {sizes['H_kv']}, got H = {sizes['H']}")


def check_dense_attention_arguments(q: Any, k: Any, v: Any, *, start: Any, lengths: Any) -> None:
    sizes: dict[str, int] = {}
    check_heads(q, k, v, sizes)
    check_start(start, sizes)
    check_lengths(lengths, sizes)
    check_same_device(q=q, k=k, v=v, start=start, lengths=lengths)


def check_attention_arguments(
    q: Any,
    k: Any,
    v: Any,
    indices: Any,
    counts: Any,
    *,
    scale: Any,
    start: Any,
    value_gate_logits: Any,
    output_gate_logits: Any,
) -> None:
    sizes: dict[str, int] = {}
    check_heads(q, k, v, sizes)
    check_slots(indices, counts, sizes)
    if scale is not None:
        check_number("scale", scale)
    if start is not None:
        check_start(start, sizes)
    elif sizes["S"] < sizes["L"]:
        raise ValueError(f"start: expected a value when S = {sizes['S']} is below L = {sizes['L']}, got None")
    if value_gate_logits is not None:
        check_tensor("value_gate_logits", value_gate_logits, "B S H_kv d_h", sizes, dtypes=FLOATING)
    if output_gate_logits is not None:
        check_tensor("output_gate_logits", output_gate_logits, "B L H d_h", sizes, dtypes=FLOATING)
    check_same_device(
        q=q,
        k=k,
        v=v,
        indices=indices,
        counts=counts,
        start=start,
        value_gate_logits=value_gate_logits,
        output_gate_logits=output_gate_logits,
    )


def check_kl_arguments(
    q_idx: Any,
    k_idx: Any,
    head_logits: Any,
    bias: Any,
    q: Any,
    k: Any,
    *,
    indexer_scale: Any,
    indices: Any,
    counts: Any,
    lse: Any,
    scale: Any,
    temperature: Any,
    start: Any,
    lengths: Any,
) -> None:
    """The checks of `indexer_kl_loss`; indices and counts are None in the dense warm-up."""
    check_number("indexer_scale", indexer_scale)
    check_indexer_arguments(q_idx, k_idx, head_logits, bias, scale=indexer_scale, start=start, lengths=lengths)
    sizes = {"B": q_idx.shape[0], "L": q_idx.shape[1], "S": k_idx.shape[1]}
    check_heads(q, k, k, sizes)
    if indices is not None or counts is not None:
        check_slots(indices, counts, sizes)
    if lse is not None:
        if indices is None:
            raise ValueError("lse: expected None without a selection, got a value")
        check_tensor("lse", lse, "B L H", sizes, dtypes=(torch.float32, torch.float64))
    if scale is not None:
        check_number("scale", scale)
    check_number("temperature", temperature, positive=True)
    check_same_device(q_idx=q_idx, q=q, k=k, indices=indices, counts=counts, lse=lse)


def check_decode_arguments(
    q: Any,
    k: Any,
    v: Any,
    q_idx: Any,
    k_idx: Any,
    head_logits: Any,
    bias: Any,
    *,
    start: Any,
    lengths: Any,
    scale: Any,
    output_gate_logits: Any,
) -> None:
    check_indexer_arguments(q_idx, k_idx, head_logits, bias, scale=1.0, start=start, lengths=lengths)
    sizes = {"B": q_idx.shape[0], "L": q_idx.shape[1], "S": k_idx.shape[1]}
    check_heads(q, k, v, sizes)
    if scale is not None:
        check_number("scale", scale)
    if output_gate_logits is not None:
        check_tensor("output_gate_logits", output_gate_logits, "B L H d_h", sizes, dtypes=FLOATING)
    check_same_device(q_idx=q_idx, q=q, k=k, v=v, output_gate_logits=output_gate_logits)


def check_rope_arguments(x: Any, start: Any, theta: Any) -> None:
    sizes: dict[str, int] = {}
    check_tensor("x", x, "B L heads d", sizes, dtypes=FLOATING)
    if sizes["d"] % 2:
        raise ValueError(f"x: expected an even last axis (RoPE rotates pairs of channels), got {list(x.shape)}")
    check_start(start, sizes)
    check_number("theta", theta, positive=True)
    check_same_device(x=x, start=start)


def check_gate_arguments(x: Any, gate_logits: Any) -> None:
    for name, value in (("x", x), ("gate_logits", gate_logits)):
        check_dense(name, value)
        check_dtype(name, value.dtype, FLOATING)
    if x.shape != gate_logits.shape:
        raise ValueError(f"gate_logits: expected shape {list(x.shape)} as x, got {list(gate_logits.shape)}")
    check_same_device(x=x, gate_logits=gate_logits)


def _or(values: Iterable[Any]) -> str:
    return " or ".join(str(v).removeprefix("torch.") for v in values)
