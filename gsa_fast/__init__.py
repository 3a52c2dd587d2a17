"""Triton kernels for Gated Sparse Attention, verified against `gsa_ref`.

The functions have the names and arguments of `gsa_ref`, plus `impl="auto" | "triton" | "reference"`.
"""

try:
    import triton as _triton  # noqa: F401
except ImportError as error:
    raise ImportError("gsa_fast needs Triton, which exists for Linux: use gsa_ref, the reference, here") from error

from gsa_fast.attention import explain_choice, sparse_attention
from gsa_fast.budget import score_variance, token_budget
from gsa_fast.decode import DecodeOutput, decode_attention
from gsa_fast.gates import apply_gate
from gsa_fast.indexer import indexer_scores
from gsa_fast.layer import GatedSparseAttention
from gsa_fast.selection import indexed_selection, select_tokens
from gsa_fast.training import indexer_kl_loss
from gsa_ref import GSACache, GSAConfig, GSAOutput, Selection

__all__ = [
    "DecodeOutput",
    "GSACache",
    "GSAConfig",
    "GSAOutput",
    "GatedSparseAttention",
    "Selection",
    "apply_gate",
    "decode_attention",
    "explain_choice",
    "indexed_selection",
    "indexer_kl_loss",
    "indexer_scores",
    "score_variance",
    "select_tokens",
    "sparse_attention",
    "token_budget",
]
