"""The whole layer (Eq. 6) on the kernels. It has no kernel of its own."""

from collections.abc import Callable
from functools import partial
from typing import Any

from torch import Tensor

import gsa_ref
from gsa_fast._backend import IMPLS, use_triton
from gsa_fast.attention import sparse_attention
from gsa_fast.decode import MAX_QUERIES, decode_attention
from gsa_fast.gates import apply_gate
from gsa_fast.selection import SIGMOID_MODES, indexed_selection
from gsa_fast.training import indexer_kl_loss
from gsa_ref import GSACache, GSAConfig
from gsa_ref._arguments import check_bool, check_choice


class GatedSparseAttention(gsa_ref.GatedSparseAttention):
    """`gsa_ref.GatedSparseAttention` with the same parameters and the kernels of this package.

    Either class loads the other's `state_dict`. Projections, RoPE and the dense variants run on PyTorch. With a cache
    and at most `decode.MAX_QUERIES` new tokens, `decode_attention` does all that lies between the projections.

    Args:
        config: as in the reference.
        impl: "auto", "triton" or "reference", as in `indexer_scores`.
        sigmoid_mode: "exact" or "approximate", as in `indexed_selection`.
        deterministic: of the backward pass, as in `sparse_attention`.
    """

    def __init__(
        self, config: GSAConfig, *, impl: str = "auto", sigmoid_mode: str = "exact", deterministic: bool = True
    ) -> None:
        super().__init__(config)
        check_choice("impl", impl, IMPLS)
        check_choice("sigmoid_mode", sigmoid_mode, SIGMOID_MODES)
        check_bool("deterministic", deterministic)
        self.impl = impl
        self._indexed_selection = partial(indexed_selection, impl=impl, sigmoid_mode=sigmoid_mode)
        self._sparse_attention = partial(sparse_attention, deterministic=deterministic, impl=impl)
        self._apply_gate = partial(apply_gate, impl=impl)
        self._indexer_kl_loss = partial(indexer_kl_loss, impl=impl)
        self._decode_attention: Callable[..., Any] = partial(decode_attention, impl=impl, sigmoid_mode=sigmoid_mode)

    def _attend(
        self, *, q: Tensor, cache: GSACache | None, n_new: Tensor, **inputs: Any
    ) -> tuple[Tensor, Tensor | None]:
        decodes = cache is not None and self.config.sparse and q.shape[1] <= MAX_QUERIES
        if not decodes or not use_triton(self.impl, q=q):
            return super()._attend(q=q, cache=cache, n_new=n_new, **inputs)
        # On the whole buffers of the cache: their shapes stay the same from token to token.
        o, _, variance, _ = self._decode_attention(
            q, bias=self.indexer.bias, mean_variance=self.mean_variance, config=self.config, **inputs
        )
        self._add_variance(variance, n_new)
        return o, None
