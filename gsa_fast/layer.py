"""The whole layer (Eq. 6) on the kernels. It has no kernel of its own."""

from functools import partial

import gsa_ref
from gsa_fast._backend import IMPLS
from gsa_fast.attention import sparse_attention
from gsa_fast.gates import apply_gate
from gsa_fast.selection import SIGMOID_MODES, indexed_selection
from gsa_ref import GSAConfig
from gsa_ref._arguments import check_choice


class GatedSparseAttention(gsa_ref.GatedSparseAttention):
    """`gsa_ref.GatedSparseAttention` with the same parameters and the kernels of this package.

    Either class loads the other's `state_dict`. Projections, RoPE and the dense variants run on PyTorch.

    Args:
        config: as in the reference.
        impl: "auto", "triton" or "reference", as in `indexer_scores`.
        sigmoid_mode: "exact" or "approximate", as in `indexed_selection`.
    """

    def __init__(self, config: GSAConfig, *, impl: str = "auto", sigmoid_mode: str = "exact") -> None:
        super().__init__(config)
        check_choice("impl", impl, IMPLS)
        check_choice("sigmoid_mode", sigmoid_mode, SIGMOID_MODES)
        self.impl = impl
        self._indexed_selection = partial(indexed_selection, impl=impl, sigmoid_mode=sigmoid_mode)
        self._sparse_attention = partial(sparse_attention, impl=impl)
        self._apply_gate = partial(apply_gate, impl=impl)
