"""The equations of Gated Sparse Attention in NumPy: one sequence, float64, a loop where the paper has a sum.

This package is the oracle. Nothing in it is optimised, and it imports only NumPy.

| symbol | meaning | shape |
|---|---|---|
| L, S | number of queries, number of keys | |
| start | position of the first query: query t sits at position start + t | |
| H, H_kv, d_h | query heads, key/value heads, head width | |
| H_I, d_I | indexer heads, indexer head width | |
| I[t, s] | indexer score of key s for query t | [L, S] |
| k_t | budget of query t | [L] |
| p_t | teacher of the indexer: mean over heads of the attention probabilities | one per position |
| τ | temperature of the student softmax(I / τ) | |
| S_t | selected positions of query t, shared by all heads | ascending, |S_t| = min(k_t, number of valid keys) |
"""

from gsa_ref.equations.attention import dense_attention, sparse_attention
from gsa_ref.equations.budget import score_variance, token_budget
from gsa_ref.equations.gates import apply_gate, sigmoid
from gsa_ref.equations.indexer import indexer_scores
from gsa_ref.equations.layer import gated_sparse_attention
from gsa_ref.equations.rope import apply_rope
from gsa_ref.equations.selection import select_tokens
from gsa_ref.equations.training import indexer_kl_gradient, indexer_kl_loss

__all__ = [
    "apply_gate",
    "apply_rope",
    "dense_attention",
    "gated_sparse_attention",
    "indexer_kl_gradient",
    "indexer_kl_loss",
    "indexer_scores",
    "score_variance",
    "select_tokens",
    "sigmoid",
    "sparse_attention",
    "token_budget",
]
