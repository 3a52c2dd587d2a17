"""What every puzzle shares: draw an example, call the learner's function, compare, and tell the smallest failure."""

import textwrap
import traceback
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from hypothesis.errors import Flaky

UNSOLVED = "not solved yet"
RAISED = object()  # in place of what a function returned


class Outcome(NamedTuple):
    """What a check found; `text` is for the learner."""

    solved: bool
    text: str


@dataclass(frozen=True)
class Example:
    """One call of a learner's function, and how to judge what it returns.

    Attributes:
        arguments: by name, in the order of the function's parameters. The function gets copies.
        expected: what the oracle says: a number, an array, or a tuple or list of them. Integers and bools are compared
            exactly, everything else within atol + rtol · |expected|, NaN and infinities by position.
        judge: takes what the function returned and gives what is wrong with it, "" for nothing; in place of comparing.
    """

    arguments: Mapping[str, Any]
    expected: Any
    rtol: Any = 1e-9
    atol: Any = 1e-12
    judge: Callable[[Any], str] | None = None

    def problem(self, got: Any) -> str:
        """What is wrong with a returned value, "" if nothing."""
        if got is None:
            return "it returned None: is a `return` missing?"
        try:
            return self.judge(got) if self.judge else difference(got, self.expected, self.rtol, self.atol)
        except (TypeError, ValueError) as error:  # what came is nothing that could be compared
            return f"what it returned cannot be compared: {error}"


@dataclass(frozen=True)
class Puzzle:
    """A puzzle's checker; made by `puzzle`.

    Attributes:
        name: of the function that the learner writes.
        oracle: what decides, as an import path or in words.
        draw: the strategy whose values `example` takes.
        examples: how many are drawn.
        warnings: "error" if a warning of the learner's code counts as a failure.
    """

    name: str
    oracle: str
    draw: st.SearchStrategy[Any]
    example: Callable[[Any], Example]
    examples: int
    warnings: Literal["error", "ignore"]

    def run(self, function: Callable[..., Any]) -> Outcome:
        """Try a function on the drawn examples. The same function has the same outcome in every run."""
        tried = 0
        found: tuple[Example, Any, str] | None = None

        # Without the database and the random seed a check depends on the function alone; phase "explain" would trace
        # every line. One kind of exception, raised in one place, makes the smallest failure the smallest of all kinds.
        @settings(
            max_examples=self.examples,
            derandomize=True,
            database=None,
            deadline=None,
            report_multiple_bugs=False,
            phases=(Phase.generate, Phase.shrink),
            suppress_health_check=list(HealthCheck),
        )
        @given(self.draw)
        def compare(drawn: Any) -> None:
            nonlocal tried, found
            example = self.example(drawn)
            got, problem = self._call(function, example)
            tried += 1
            if problem:
                found = example, got, problem
                raise _Wrong

        try:
            compare()
        except _Wrong:
            pass
        except Flaky:
            return Outcome(False, "wrong: it gives different answers for the same input")
        if found is None:
            return Outcome(True, f"solved: {tried} examples, compared with {self.oracle}")
        example, got, problem = found
        if problem == UNSOLVED:
            return Outcome(False, UNSOLVED)
        lines = [f"wrong: {problem}"] + ["the smallest example found:"] * bool(example.arguments)
        lines += [_assignment(name, value) for name, value in example.arguments.items()]
        if example.judge is None:
            lines.append(_assignment("expected", example.expected))
        if got is not RAISED:
            lines.append(_assignment("got", got))
        return Outcome(False, "\n".join(lines))

    def _call(self, function: Callable[..., Any], example: Example) -> tuple[Any, str]:
        """What the function returned, and what is wrong with that."""
        arguments = [_copy(value) for value in example.arguments.values()]
        try:
            with warnings.catch_warnings():
                warnings.simplefilter(self.warnings)
                got = function(*arguments)
        except NotImplementedError:
            return RAISED, UNSOLVED
        except Exception as error:  # noqa: BLE001  # whatever the learner's code raises is told, with its input
            if isinstance(error.__cause__, NotImplementedError):  # a kernel, in Triton's interpreter
                return RAISED, UNSOLVED
            return RAISED, _raised(error, function)
        return (got, UNSOLVED) if got is NotImplemented else (got, example.problem(got))


class _Wrong(Exception):
    """An example failed."""


def puzzle(
    draw: st.SearchStrategy[Any],
    *,
    oracle: str,
    examples: int = 100,
    warnings: Literal["error", "ignore"] = "error",
    kind: type[Puzzle] = Puzzle,
) -> Callable[[Callable[[Any], Example]], Puzzle]:
    """Make a puzzle of a function that turns what `draw` drew into an example. The function's name is the puzzle's.

    `kind` is a subclass of Puzzle for a check that looks at more than what a call returns.
    """

    def make(example: Callable[[Any], Example]) -> Puzzle:
        return kind(example.__name__, oracle, draw, example, examples, warnings)

    return make


def difference(got: Any, expected: Any, rtol: Any = 1e-9, atol: Any = 1e-12) -> str:
    """Where two values differ, "" if nowhere: see `Example.expected`."""
    if isinstance(expected, tuple | list):
        if not isinstance(got, tuple | list) or len(got) != len(expected):
            return f"it should return {len(expected)} values"
        pairs = enumerate(zip(got, expected, strict=True))
        return next((f"value {i}: {d}" for i, (g, e) in pairs if (d := difference(g, e, rtol, atol))), "")
    got, expected = _array(got), _array(expected)
    if got.shape != expected.shape:
        return f"the shape is {list(got.shape)}, expected {list(expected.shape)}"
    if got.dtype.kind not in "biuf":
        return f"the values are no real numbers (dtype {got.dtype})"
    if expected.dtype.kind in "biu":
        wrong = got != expected
    else:
        with np.errstate(invalid="ignore"):  # inf − inf
            near = np.abs(got - expected) <= atol + rtol * np.abs(expected)
        # An infinite value allows no error: rtol times infinity would allow any.
        same = (got == expected) | (np.isnan(got) & np.isnan(expected)) | (near & np.isfinite(expected))
        wrong = ~same
    if not wrong.any():
        return ""
    if not wrong.shape:
        return f"got {got}, expected {expected}"
    where = tuple(np.argwhere(wrong)[0].tolist())
    return f"at {list(where)} got {got[where]}, expected {expected[where]}"


def _array(value: Any) -> np.ndarray:
    if isinstance(value, torch.Tensor):
        value = value.detach().cpu()
        value = value.double().numpy() if value.dtype == torch.bfloat16 else value.numpy()
    return np.asarray(value)


def _copy(value: Any) -> Any:
    """A copy with the same strides: the learner's function may write into its arguments."""
    if isinstance(value, torch.Tensor):
        return torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device=value.device).copy_(value)
    if isinstance(value, np.ndarray):
        return value.copy(order="K")
    return [_copy(v) for v in value] if isinstance(value, list) else value


def _raised(error: Exception, function: Callable[..., Any]) -> str:
    """What the function raised, and the last of its lines that did."""
    text = f"it raised {type(error).__name__}" + (f": {error}" if str(error) else "")
    code = getattr(function, "__code__", None)
    frames = [f for f in traceback.extract_tb(error.__traceback__) if code and f.filename == code.co_filename]
    if code and frames:
        text += f" (line {(frames[-1].lineno or 0) - code.co_firstlineno + 1} of {code.co_name})"
    return text + "; a warning counts as an error" * isinstance(error, Warning)


def _assignment(name: str, value: Any) -> str:
    text = _show(value)
    return textwrap.indent(f"{name} = {text}" if "\n" not in text else f"{name} =\n{textwrap.indent(text, '  ')}", "  ")


def _show(value: Any) -> str:
    if isinstance(value, torch.Tensor | np.ndarray):
        array = _array(value)
        text = np.array2string(array, precision=6, threshold=60, edgeitems=3, max_line_width=100)
        return f"{text}" + f"  shape {list(array.shape)}" * (array.size != 1)
    if isinstance(value, tuple | list) and any(isinstance(v, torch.Tensor | np.ndarray) for v in value):
        return "\n".join(f"[{i}] {_show(v)}" for i, v in enumerate(value))
    return getattr(value, "__name__", None) or str(value)
