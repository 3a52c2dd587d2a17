"""The baselines: PyTorch's dense attention."""

from collections.abc import Callable

from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

BASELINES = {"cudnn": SDPBackend.CUDNN_ATTENTION, "flash": SDPBackend.FLASH_ATTENTION}


def takes_heads(impl: str, q: Tensor, k: Tensor, v: Tensor, *, causal: bool) -> bool:
    """Whether the backend takes as many key/value heads as there are: a few rows show it.

    Raises:
        RuntimeError: the backend takes none, although there are as many as query heads.
    """
    grouped = k.shape[1] != q.shape[1]
    few_q, few_k, few_v = (x[:, :, :64].contiguous() for x in (q, k, v))
    try:
        with sdpa_kernel(BASELINES[impl]):
            scaled_dot_product_attention(few_q, few_k, few_v, is_causal=causal, enable_gqa=grouped)
    except RuntimeError:
        if not grouped:
            raise
        return False
    return True


def dense_call(impl: str, q: Tensor, k: Tensor, v: Tensor, *, causal: bool) -> tuple[Callable[[], Tensor], str]:
    """A call of PyTorch's dense attention on tensors in its layout [B, H, L, d_h], and a note.

    If the backend refuses grouped heads, keys and values are repeated beforehand, and the note says so. `causal` lets
    query t see keys 0 to t, so it is for as many queries as keys.
    """
    note = ""
    if not takes_heads(impl, q, k, v, causal=causal):
        repeat = q.shape[1] // k.shape[1]
        k, v = k.repeat_interleave(repeat, 1), v.repeat_interleave(repeat, 1)
        note = "keys and values repeated per query head: the backend takes no grouped heads"
    grouped = k.shape[1] != q.shape[1]

    def call() -> Tensor:
        with sdpa_kernel(BASELINES[impl]):
            return scaled_dot_product_attention(q, k, v, is_causal=causal, enable_gqa=grouped)

    return call, note


def check_last_head(out: Tensor, q: Tensor, k: Tensor, v: Tensor) -> None:
    """Compare the last head of the last sequence, attending to all keys, with plain float32: caches can have more
    elements than 32-bit offsets reach, and a time over the wrong rows would mean nothing.

    Wrong rows differ by more than the result's norm, rounding in 16 bit by a few hundredths of it.

    Raises:
        RuntimeError: they differ by more than half the norm.
    """
    logits = q[-1, -1].float() @ k[-1, -1].float().T * q.shape[-1] ** -0.5
    expected = logits.softmax(-1) @ v[-1, -1].float()
    if not (out[-1, -1].float() - expected).norm() <= 0.5 * expected.norm():
        raise RuntimeError("the result of the dense attention is wrong")
