"""What several files of tests/fast need: example counts, bitwise comparison, the check of one case, huge strides."""

from typing import Any

import torch
from hypothesis import HealthCheck, Phase, settings
from torch import Tensor

from gsa_fast.verification.checks import CHECKS
from gsa_ref import Selection
from gsa_ref.cases import Case, Limits

DTYPES = ("float32", "float16", "bfloat16")
SMALL = Limits(B=2, L=6, S=24, heads=2, group=3, width=24)
# Longer than a tile of `small_tiles` along every axis.
SEVERAL_TILES = Limits(B=2, L=20, S=40, heads=2, group=3, width=40)
_BITS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def examples(n: int) -> settings:
    """n examples in the default profile, and as many times more as the profile asks for."""
    factor = settings().max_examples / settings.get_profile("ci").max_examples
    # The fixtures of a function (`bf16`) hold for all of its examples, which is what is wanted.
    checks = [HealthCheck.too_slow, HealthCheck.function_scoped_fixture, HealthCheck.filter_too_much]
    # Without the phase that explains a failure: it runs many more examples, and a case already says what it is.
    phases = [phase for phase in Phase if phase is not Phase.explain]
    return settings(max_examples=max(1, round(n * factor)), suppress_health_check=checks, phases=phases)


def same(x: Any, y: Any) -> bool:
    """Bitwise equality of tensors or tuples of tensors: −0 differs from +0; a NaN equals any NaN."""
    if not isinstance(x, Tensor):
        return len(x) == len(y) and all(same(a, b) for a, b in zip(x, y, strict=True))
    return x.dtype == y.dtype and x.shape == y.shape and torch.equal(_bits(x), _bits(y))


def _bits(x: Tensor) -> Tensor:
    if x.is_floating_point():
        x = x.masked_fill(x.isnan(), torch.nan)
    return x.contiguous().view(_BITS[x.element_size()])


def assert_in_budget(case: Case, device: str) -> None:
    """Every verdict of the check behind `python -m gsa_fast verify`."""
    for verdict in CHECKS[case.stem](case, device):
        assert verdict, f"{case.to_json()} {verdict}"


def contiguous(arguments: dict[str, Any]) -> dict[str, Any]:
    """The same arguments with plain strides."""

    def plain(value: Any) -> Any:
        if isinstance(value, Selection):
            return Selection(*(x.contiguous() for x in value))
        return value.contiguous() if isinstance(value, Tensor) else value

    return {name: plain(value) for name, value in arguments.items()}


def alone(arguments: dict[str, Any], b: int) -> dict[str, Any]:
    """The arguments of a batched function cut down to sequence b; `bias` is shared by all."""

    def cut(name: str, value: Any) -> Any:
        if isinstance(value, Selection):
            return Selection(*(x[b : b + 1] for x in value))
        return value[b : b + 1] if isinstance(value, Tensor) and name != "bias" else value

    return {name: cut(name, value) for name, value in arguments.items()}


def int32(values: Any, device: str) -> Tensor:
    return torch.tensor(values, dtype=torch.int32, device=device)


def widely_strided(shape: tuple[int, ...], axis: int, device: str, dtype: torch.dtype = torch.float16) -> Tensor:
    """A tensor whose last element along `axis` lies 2^31 elements behind the first.

    Of its 4 GiB (8 for float32) only the pages that are touched exist on a CPU: the system hands them out on first use.
    """
    stride, strides = 1, [0] * len(shape)
    for i in reversed(range(len(shape))):
        if i != axis:
            strides[i], stride = stride, stride * shape[i]
    strides[axis] = -(-(2**31) // (shape[axis] - 1))
    assert strides[axis] < 2**31
    buffer = torch.empty(strides[axis] * (shape[axis] - 1) + stride, dtype=dtype, device=device)
    return buffer.as_strided(shape, strides)
