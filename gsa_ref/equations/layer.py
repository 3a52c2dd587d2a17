"""The whole layer (Eq. 6) for one sequence."""

import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from gsa_ref.equations.attention import dense_attention, sparse_attention
from gsa_ref.equations.budget import score_variance, token_budget
from gsa_ref.equations.gates import apply_gate
from gsa_ref.equations.indexer import indexer_scores
from gsa_ref.equations.rope import apply_rope
from gsa_ref.equations.selection import select_tokens


def gated_sparse_attention(h: np.ndarray, weights: Mapping[str, np.ndarray], config: Any) -> np.ndarray:
    """Eq. 6: h → Q, K, V → value gate G2 → indexer → top-k_t → sparse SDPA → output gate G1 → W_O → u.

    Args:
        h: [L, d], one sequence starting at position 0.
        weights: the layer's `state_dict` as NumPy arrays (`W_q.weight` is [H·d_h, d], and so on);
            `mean_variance` is V̄.
        config: a `gsa_ref.GSAConfig`.

    Returns:
        u, float64 [L, d].
    """
    c = config
    w = {name: np.asarray(value, np.float64) for name, value in weights.items()}
    h = np.asarray(h, np.float64)
    L = len(h)

    q = apply_rope((h @ w["W_q.weight"].T).reshape(L, c.H, c.d_h), theta=c.rope_theta)
    k = apply_rope((h @ w["W_k.weight"].T).reshape(L, c.H_kv, c.d_h), theta=c.rope_theta)
    v = (h @ w["W_v.weight"].T).reshape(L, c.H_kv, c.d_h)
    if c.value_gate:  # Eq. 9
        v = apply_gate(v, (h @ w["W_vg.weight"].T + w["W_vg.bias"]).reshape(v.shape))

    if c.sparse:
        q_idx = (h @ w["indexer.W_iq.weight"].T).reshape(L, c.H_I, c.d_I)
        k_idx = h @ w["indexer.W_ik.weight"].T
        if c.indexer_rope:
            q_idx = apply_rope(q_idx, theta=c.rope_theta)
            k_idx = apply_rope(k_idx[:, None], theta=c.rope_theta)[:, 0]
        head_logits = h @ w["indexer.W_iw.weight"].T
        scale = 1 / math.sqrt(c.d_I) if c.indexer_scale is None else c.indexer_scale
        scores = indexer_scores(q_idx, k_idx, head_logits, w["indexer.bias"], scale=scale)  # Eq. 7
        budget = token_budget(  # Eq. 8
            score_variance(scores),
            float(w["mean_variance"]),
            np.arange(L) + 1,
            k_base=c.k_base,
            k_min=c.k_min,
            k_max=c.k_max,
            rule=c.rule,
        )
        o, _ = sparse_attention(q, k, v, select_tokens(scores, budget))
    else:
        o = dense_attention(q, k, v)

    if c.output_gate:  # Eq. 10
        o = apply_gate(o, (h @ w["W_og.weight"].T + w["W_og.bias"]).reshape(o.shape))
    return o.reshape(L, c.H * c.d_h) @ w["W_o.weight"].T
