"""A readable reference of Gated Sparse Attention (Shen & Shen, arXiv 2601.15305) in PyTorch.

`gsa_ref.equations` holds the same mechanism in NumPy, one sequence at a time: read it beside the paper.
Tensors are laid out [batch, length, heads, width].
"""

from gsa_ref.attention import dense_attention, sparse_attention
from gsa_ref.budget import score_variance, token_budget
from gsa_ref.cache import GSACache
from gsa_ref.config import GSAConfig
from gsa_ref.gates import apply_gate
from gsa_ref.generation import generate
from gsa_ref.indexer import LightningIndexer, indexer_scores
from gsa_ref.layer import GatedSparseAttention, GSAOutput
from gsa_ref.model import LanguageModel, ModelConfig, ModelOutput
from gsa_ref.rope import apply_rope
from gsa_ref.selection import Selection, indexed_selection, select_tokens
from gsa_ref.training import captured_mass, indexer_kl_loss

__all__ = [
    "GSACache",
    "GSAConfig",
    "GSAOutput",
    "GatedSparseAttention",
    "LanguageModel",
    "LightningIndexer",
    "ModelConfig",
    "ModelOutput",
    "Selection",
    "apply_gate",
    "apply_rope",
    "captured_mass",
    "dense_attention",
    "generate",
    "indexed_selection",
    "indexer_kl_loss",
    "indexer_scores",
    "score_variance",
    "select_tokens",
    "sparse_attention",
    "token_budget",
]
