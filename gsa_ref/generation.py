"""Text from a `LanguageModel`: bytes as tokens, sampling, and generation over the layers' caches."""

from collections.abc import Iterable

import torch
from jaxtyping import Float, Int32, Int64
from torch import Tensor

from gsa_ref._arguments import (
    FLOATING,
    check_bool,
    check_int,
    check_lengths,
    check_number,
    check_same_device,
    check_tensor,
)
from gsa_ref.model import LanguageModel

BOS = 256  # begins every text; the bytes are 0 to 255


def encode(text: str | bytes) -> Int64[Tensor, " T"]:
    """`BOS` and the bytes of text (UTF-8), as tokens.

    Raises:
        TypeError: neither a str nor bytes.
    """
    if not isinstance(text, str | bytes):
        raise TypeError(f"text: expected a str or bytes, got {type(text).__name__}")
    return torch.tensor([BOS, *(text.encode() if isinstance(text, str) else text)])


def decode(tokens: Int64[Tensor, " T"]) -> str:
    """The text of tokens. What is no byte is left out; bytes that are no UTF-8 become U+FFFD.

    Raises:
        TypeError: not an int64 tensor.
        ValueError: not of shape [T].
    """
    check_tensor("tokens", tokens, "T", {}, dtypes=(torch.int64,))
    return bytes(t for t in tokens.tolist() if 0 <= t < BOS).decode(errors="replace")


def sample(
    logits: Float[Tensor, "B V"],
    *,
    temperature: float = 0.0,
    top_p: float = 1.0,
    generator: torch.Generator | None = None,
) -> Int64[Tensor, " B"]:
    """One token per row: the argmax at temperature 0, else a draw from softmax(logits / temperature) on its nucleus.

    The nucleus is the smallest set of most probable tokens whose probability reaches top_p, the lower token first
    among equals (Holtzman et al., arXiv 1904.09751).

    Raises:
        TypeError: wrong type or dtype.
        ValueError: wrong shape, temperature < 0, or top_p outside (0, 1].
    """
    check_tensor("logits", logits, "B V", {}, dtypes=FLOATING)
    _check_sampling(temperature, top_p, generator)
    if temperature == 0:
        return logits.argmax(-1)
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    # A temperature that float32 rounds to 0 would give 0/0; with the maximum at 0, the smallest float is its limit.
    excess = (logits - logits.amax(-1, keepdim=True)) / max(temperature, torch.finfo(logits.dtype).tiny)
    p, order = torch.softmax(excess, -1).sort(dim=-1, descending=True, stable=True)  # [B, V]
    if top_p < 1:
        p = p.masked_fill(p.cumsum(-1) - p >= top_p, 0)  # those before it reach top_p already
    return order.gather(-1, torch.multinomial(p, 1, generator=generator))[:, 0]


def _check_sampling(temperature: float, top_p: float, generator: torch.Generator | None) -> None:
    check_number("temperature", temperature)
    if temperature < 0:
        raise ValueError(f"temperature: expected at least 0, got {temperature}")
    check_number("top_p", top_p)
    if not 0 < top_p <= 1:
        raise ValueError(f"top_p: expected 0 < top_p ≤ 1, got {top_p}")
    if generator is not None and not isinstance(generator, torch.Generator):
        raise TypeError(f"generator: expected a torch.Generator, got {type(generator).__name__}")


@torch.no_grad()
def generate(
    model: LanguageModel,
    prompt: str | bytes | Int64[Tensor, "B T"],
    *,
    max_new_tokens: int,
    lengths: Int32[Tensor, " B"] | None = None,
    temperature: float = 0.0,
    top_p: float = 1.0,
    generator: torch.Generator | None = None,
    stop_token: int | None = None,
    use_cache: bool = True,
    progress: bool = False,
) -> Int64[Tensor, "B N"]:
    """Continue the prompts, one token at a time.

    Args:
        model: in eval mode.
        prompt: one text (`encode` turns it into tokens), or the tokens of B prompts, right-padded.
        max_new_tokens: N, the most tokens to add to each prompt.
        lengths: number of tokens of each prompt, default T.
        temperature, top_p, generator: as in `sample`. One seed of the generator gives one result.
        stop_token: ends a sequence; its later tokens are stop_token too. With it, every step waits for the device, and
            N is smaller if all sequences end early. `BOS` is one: a model that was trained on texts in a row ends one
            text by beginning the next.
        use_cache: False runs the model on everything again for each token: the definition that the cache is tested by.
        progress: show a progress bar in a terminal.

    Returns:
        The new tokens, without the prompts.

    Raises:
        TypeError: wrong type or dtype.
        ValueError: wrong shape, device or value, an empty prompt, or a model in training mode.
    """
    if not isinstance(getattr(model, "_orig_mod", model), LanguageModel):  # torch.compile wraps one
        raise TypeError(f"model: expected a LanguageModel, got {type(model).__name__}")
    if model.training:  # V̄ would count what is generated
        raise ValueError("model: expected eval mode, got training mode")
    device = model.embedding.weight.device
    tokens = encode(prompt)[None].to(device) if isinstance(prompt, str | bytes) else prompt
    sizes: dict[str, int] = {}
    check_tensor("prompt", tokens, "B T", sizes, dtypes=(torch.int64,))
    check_lengths(lengths, sizes)
    check_same_device(model=model.embedding.weight, prompt=tokens, lengths=lengths)
    check_int("max_new_tokens", max_new_tokens, 1)
    _check_sampling(temperature, top_p, generator)
    V = model.embedding.num_embeddings
    if stop_token is not None:
        check_int("stop_token", stop_token, 0)
        if stop_token >= V:
            raise ValueError(f"stop_token: expected below V = {V}, got {stop_token}")
    check_bool("use_cache", use_cache)
    check_bool("progress", progress)
    B, T = tokens.shape
    if T == 0:
        raise ValueError(f"prompt: expected at least one token, got shape {[B, T]}")
    end = tokens.new_full((B,), T) if lengths is None else lengths.long()  # [B], where the next token goes
    if B and not 1 <= int(end.min()) <= int(end.max()) <= T:
        raise ValueError(f"lengths: expected 1 ≤ lengths ≤ T = {T} tokens in every prompt, got {end.tolist()}")

    is_prompt = torch.arange(T, device=device) < end[:, None]  # padding may hold anything
    outside = is_prompt & ((tokens < 0) | (tokens >= V))  # [B, T]
    if outside.any():
        raise ValueError(f"prompt: expected tokens in [0, V = {V}), got {tokens[outside][0]}")

    row = torch.arange(B, device=device)
    tokens = torch.cat((tokens, tokens.new_zeros(B, max_new_tokens)), 1)  # [B, T + N]
    caches = model.allocate_caches(B, T + max_new_tokens - 1) if use_cache else None
    ended = torch.zeros(B, dtype=torch.bool, device=device)
    new: list[Tensor] = []
    steps: Iterable[int] = range(max_new_tokens)
    if progress:
        from tqdm import tqdm  # the rest of gsa_ref runs without it

        steps = tqdm(steps, unit="token", leave=False, disable=None)
    for n in steps:
        if caches is None or n == 0:
            logits = model(tokens[:, : T + n], caches=caches, lengths=end.int()).logits[row, end - 1]  # [B, V]
        else:
            logits = model(new[-1][:, None], caches=caches).logits[:, 0]
        token = sample(logits, temperature=temperature, top_p=top_p, generator=generator)  # [B]
        if stop_token is not None:
            token = token.masked_fill(ended, stop_token)
            ended = token == stop_token
        tokens[row, end] = token
        end += 1
        new.append(token)
        if stop_token is not None and ended.all():
            break
    return torch.stack(new, 1)
