r"""Two tasks that only a look far back solves: a needle in a text, and associative recall.

Both are sequences BOS, body, questions. The body is real text in which keys stand, each before its value; a question is
a key from the body, after which the value has to follow:

    BOS  import os … K v v v v … return x  K v v v v      needle: one key, a value of four tokens
    BOS  imp K v ort os … K v re K v turn  K v  K v  K v   recall: many keys, asked for in another order

Keys and values are bytes of 128 and more, which the text has not, so that a small model can tell them from it: what is
tested is the distance, not the reading.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Int64
from torch import Tensor

from gsa_ref.generation import BOS

KEYS = range(128, 160)
VALUES = range(160, 192)
SPACE = 32  # stands for what the text has of BOS and of bytes of 128 and more


@dataclass(frozen=True)
class Task:
    """What a sequence of L tokens holds.

    Attributes:
        name: "needle" or "recall".
        value_length: m, tokens of a value; the i-th is one of the i-th m-th of VALUES, as a digit that shows its place.
        pairs: n, the pairs of a sequence and its questions: each is asked once.
    """

    name: str
    value_length: int
    pairs: int


TASKS = {"needle": Task("needle", 4, 1), "recall": Task("recall", 1, 4)}


@dataclass(frozen=True)
class Sequences:
    """Sequences of one task.

    Attributes:
        tokens: [B, L + 1]; the model reads the first L, and predicts the last L.
        answers: [B, n, m], positions of the predictions (in 0 … L − 1) that are the value of a question.
        sources: [B, n, m], the position of the same token in the body, which is where the answer is known from.
        body: [B, L + 1] tokens before the questions, as a number.
    """

    tokens: Int64[Tensor, "B L+1"]
    answers: Int64[Tensor, "B n m"]
    sources: Int64[Tensor, "B n m"]
    body: int

    @property
    def mask(self) -> Bool[Tensor, "B L"]:
        """Which predictions the loss is of: the answers."""
        mask = torch.zeros_like(self.tokens[:, 1:], dtype=torch.bool)
        return mask.scatter(1, self.answers.flatten(1), True)


def generate(task: Task, text: Tensor, batch: int, L: int, generator: torch.Generator) -> Sequences:
    """Sequences of L + 1 tokens, on the CPU, that the generator determines. Every placement of the pairs is as likely.

    Args:
        text: tokens to draw the filler from, [N].

    Raises:
        ValueError: the pairs and questions do not fit into L, or the text is too short.
    """
    n, m = task.pairs, task.value_length
    width = 1 + m  # of a pair, and of a question
    body = L + 1 - n * width
    free = body - 1 - n * m  # BOS stands first; places to draw from, where a pair counts as one token
    if free < n:
        raise ValueError(f"L: expected room for {n} pairs and questions of {width} tokens, got {L}")
    if len(text) <= L:
        raise ValueError(f"text: expected more than L = {L} tokens, got {len(text)}")

    def choose(count: int, out_of: int) -> Tensor:  # without replacement, in random order
        return torch.rand(batch, out_of, generator=generator).argsort(-1)[:, :count]

    start = torch.randint(len(text) - L, (batch, 1), generator=generator)
    tokens = text[start + torch.arange(L + 1)].long()
    tokens = tokens.masked_fill(tokens >= KEYS.start, SPACE)
    tokens[:, 0] = BOS
    keys = KEYS.start + choose(n, len(KEYS))  # [B, n]
    of_each = len(VALUES) // m  # tokens that stand first in a value, second, …
    values = torch.randint(of_each, (batch, n, m), generator=generator) + torch.arange(
        VALUES.start, VALUES.stop, of_each
    )
    pairs = torch.cat((keys[..., None], values), -1)  # [B, n, 1 + m]
    places = 1 + choose(n, free).sort(-1)[0] + m * torch.arange(n)  # [B, n], of the keys
    places = places[..., None] + torch.arange(width)  # [B, n, 1 + m]
    tokens.scatter_(1, places.flatten(1), pairs.flatten(1))
    order = choose(n, n)[..., None].expand(-1, -1, width)
    tokens[:, body:] = pairs.gather(1, order).flatten(1)
    question = body + width * torch.arange(n)[:, None] + torch.arange(m)  # [n, m], positions before the answers
    return Sequences(tokens, question.expand(batch, n, m), places.gather(1, order)[..., 1:], body)
