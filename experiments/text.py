"""The text that the models learn from, as tokens."""

import hashlib
import sysconfig
from dataclasses import dataclass
from pathlib import Path

import torch
from jaxtyping import Int64
from torch import Tensor

from gsa_ref.generation import encode

VALIDATION = 0.1  # share of the tokens, from the end
# Tests, what pip installed, and a module that lists the settings of one build of Python.
LEFT_OUT = ("site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__")


@dataclass(frozen=True)
class Text:
    """Tokens of a text: each file begins with BOS, its bytes follow.

    Attributes:
        name: what was read.
        sha256: of the bytes of all files, one after another, in hexadecimal.
        train, validation: int16, [N]; validation is the last tenth.
    """

    name: str
    sha256: str
    train: Tensor
    validation: Tensor


def read(path: str | None) -> Text:
    """The file at path, or, for None, the Python sources of the standard library of the running Python.

    Raises:
        OSError: the file cannot be read.
    """
    if path is None:
        root = Path(sysconfig.get_path("stdlib"))
        found = [p for p in root.rglob("*.py") if not set(p.relative_to(root).parts) & set(LEFT_OUT)]
        files = sorted(found, key=lambda p: p.relative_to(root).as_posix())
        files = [p for p in files if not p.name.startswith("_sysconfigdata")]
        name = "Python's standard library"
    else:
        files, name = [Path(path)], Path(path).name
    contents = [p.read_bytes() for p in files]
    tokens = torch.cat([encode(content).to(torch.int16) for content in contents])
    n = round(len(tokens) * (1 - VALIDATION))
    return Text(name, hashlib.sha256(b"".join(contents)).hexdigest(), tokens[:n], tokens[n:])


def draw(tokens: Tensor, batch: int, context: int, generator: torch.Generator) -> Int64[Tensor, "B L+1"]:
    """Windows of context + 1 tokens that begin anywhere."""
    start = torch.randint(len(tokens) - context, (batch, 1), generator=generator)
    return tokens[start + torch.arange(context + 1)].long()


def windows(tokens: Tensor, count: int, context: int) -> Int64[Tensor, "B L+1"]:
    """`count` windows of context + 1 tokens at even distances, the same at every call.

    Raises:
        ValueError: the text is too short for them not to overlap.
    """
    if len(tokens) < count * (context + 1):
        raise ValueError(
            f"text: expected at least {count * (context + 1)} tokens to validate on (eval_windows · (context + 1)), "
            f"got {len(tokens)}"
        )
    start = torch.arange(count)[:, None] * (len(tokens) // count)
    return tokens[start + torch.arange(context + 1)].long()
