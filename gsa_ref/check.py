"""What "verified" means: error bounds for scores and budgets, the top-k certificate, and the error budget of outputs.

Everything here compares something a kernel returned with GOLD, the equations in float64 on the same rounded inputs.
NumPy arrays of one sequence, as in `gsa_ref.equations`. The reasoning is on the site's Verify pages.
"""

import math
from dataclasses import dataclass

import numpy as np
import torch

from gsa_ref._arguments import FLOATING, check_choice, check_dtype
from gsa_ref.equations import indexer_scores, sigmoid, token_budget

SIGMOID_ERROR = {
    # σ = e/(1+e) or 1/(1+e) with e = exp(−|x|). exp has relative error (4 + |x|)u: 2^-22, and the rounding of x·log2 e.
    # σ' scales that to at most 1.3u; the sum adds u, the approximate division 4u. Two heads that share a division,
    # a/(1+e) + a'/(1+e') = (a(1+e') + a'(1+e)) / ((1+e)(1+e')), add three roundings, which γ_{2 H_I} has room for.
    "exact": 8 * 2.0**-24,
    # tanh.approx.f32 has relative error 2^-11, and σ(x) = ½ + ½·tanh(x/2)
    "approximate": 2.0**-12,
}


@dataclass(frozen=True)
class Verdict:
    """Outcome of one comparison. `error` and `budget` share a unit; `passed` is what counts."""

    passed: bool
    error: float
    budget: float
    detail: str = ""

    def __bool__(self) -> bool:
        return self.passed


def unit_roundoff(dtype: torch.dtype) -> float:
    """u: half the distance from 1 to the next larger number of `dtype`.

    Raises:
        TypeError: dtype is no floating-point dtype.
    """
    check_dtype("dtype", dtype, FLOATING)
    return torch.finfo(dtype).eps / 2


def gamma(n: int, u: float = 2.0**-24) -> float:
    """γ_n = n·u / (1 − n·u), the bound on the relative error of n roundings (Higham, Accuracy and Stability, §3.1)."""
    return n * u / (1 - n * u)


def score_tolerance(
    q_idx: np.ndarray,
    k_idx: np.ndarray,
    head_logits: np.ndarray,
    bias: np.ndarray,
    *,
    scale: float,
    sigmoid_mode: str = "exact",
    quantisation: float = 0.0,
) -> np.ndarray:
    """ε[t,s]: how far scores computed in float32 may lie from Eq. 7 in exact arithmetic.

    With z_j = scale·q_j·k + b_j and w_j = σ(head_logits_j):
    ε = Σ_j [ w_j (|Δz_j|/4 + δ_σ) + |Δw_j| ] + accumulation + quantisation, because σ is ¼-Lipschitz and below 1, and
    |Δz_j| ≤ |scale|·γ_{d_I+4} Σ|q||k| + 2u(|z_j| + |b_j|); two of the roundings are those of a logit in base 2.

    Args:
        q_idx: [L, H_I, d_I].
        k_idx: [S, d_I].
        head_logits: [L, H_I].
        bias: [H_I].
        sigmoid_mode: "exact" (float32 exp) or "approximate" (tanh.approx).
        quantisation: δ_quant, for scores stored in fewer bits.

    Returns:
        float64 [L, S].

    Raises:
        TypeError: sigmoid_mode is not a str.
        ValueError: an unknown sigmoid_mode.
    """
    check_choice("sigmoid_mode", sigmoid_mode, tuple(SIGMOID_ERROR))
    q_idx, k_idx, head_logits, bias = (np.asarray(x, np.float64) for x in (q_idx, k_idx, head_logits, bias))
    u = 2.0**-24
    delta_sigmoid = SIGMOID_ERROR[sigmoid_mode]
    _, H_I, d_I = q_idx.shape
    weight = sigmoid(head_logits)
    tolerance = np.full((len(q_idx), len(k_idx)), quantisation)
    for j in range(H_I):
        z = scale * (q_idx[:, j] @ k_idx.T) + bias[j]
        magnitude = np.abs(q_idx[:, j]) @ np.abs(k_idx).T
        delta_z = abs(scale) * gamma(d_I + 4) * magnitude + 2 * u * (np.abs(z) + abs(bias[j]))
        # σ never moves by more than 1, however large Δz is.
        tolerance += weight[:, j, None] * (np.minimum(delta_z / 4, 1) + delta_sigmoid) + delta_sigmoid
    return tolerance + gamma(2 * H_I) * weight.sum(-1)[:, None]


def score_verdict(scores: np.ndarray, gold: np.ndarray, tolerance: np.ndarray) -> Verdict:
    """Materialised scores against gold, entry by entry: |scores − gold| ≤ ε, and the same −inf and NaN."""
    scores = np.asarray(scores, np.float64)
    if scores.shape != gold.shape:
        return Verdict(False, math.inf, 0.0, f"shape is {list(scores.shape)}, gold {list(gold.shape)}")
    same = np.isfinite(gold) & np.isfinite(scores) | (scores == gold) | np.isnan(scores) & np.isnan(gold)
    if not same.all():
        t, s = np.argwhere(~same)[0]
        return Verdict(False, math.inf, 0.0, f"score [{t}, {s}] is {scores[t, s]}, gold {gold[t, s]}")
    finite = np.isfinite(gold)
    if not finite.any():
        return Verdict(True, 0.0, 0.0)
    error, budget = np.abs(scores[finite] - gold[finite]), tolerance[finite]
    # Where nothing is allowed, any error is infinitely too much, and none is none.
    used = np.divide(error, budget, out=np.where(error > 0, np.inf, 0.0), where=budget > 0)
    worst = int(np.argmax(used))
    return Verdict(bool((error <= budget).all()), float(error[worst]), float(budget[worst]))


def variance_interval(
    variance: np.ndarray, tolerance: np.ndarray, largest: np.ndarray, n: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """The interval in which a float32 variance of scores within `tolerance` of gold must lie.

    The standard deviation is 1-Lipschitz in the largest change of a score: |√V̂ − √V| ≤ max ε. Summing the squares in
    blocks of at least 16 adds a relative γ, an error of the mean adds its square to V.

    Args:
        variance: gold V, [L].
        tolerance: largest ε of each row, [L].
        largest: largest |score| of each row, [L].
        n: number of valid scores of each row, [L].
    """
    roundings = np.asarray(n) / 16 + 24
    relative = roundings * 2.0**-24
    slack = tolerance + 2 * relative * largest
    std = np.sqrt(variance)
    return np.maximum(std - slack, 0) ** 2 * (1 - 2 * relative), (std + slack) ** 2 * (1 + 2 * relative)


def budget_interval(
    variance: np.ndarray,
    tolerance: np.ndarray,
    largest: np.ndarray,
    mean_variance: float,
    n_valid: np.ndarray,
    *,
    k_base: int,
    k_min: int,
    k_max: int,
    rule: str,
) -> tuple[np.ndarray, np.ndarray]:
    """Smallest and largest budget k_t that Eq. 8 gives for a variance inside `variance_interval`, [L] each."""
    ends = []
    for end in variance_interval(variance, tolerance, largest, n_valid):
        for nudge in (1 - 2.0**-22, 1 + 2.0**-22):  # the division and the product of Eq. 8, in float32
            sizes = {"k_base": k_base, "k_min": k_min, "k_max": k_max}
            ends.append(token_budget(end * nudge, mean_variance, n_valid, rule=rule, **sizes))
    return np.minimum.reduce(ends), np.maximum.reduce(ends)


@dataclass(frozen=True)
class Certificate:
    """Outcome of `topk_certificate` for one row.

    Attributes:
        passed: whether some scores within the tolerance give exactly this selection.
        reason: the first violated condition, empty if none.
        near_threshold: how many positions lie so near the threshold that rounding may decide them.
    """

    passed: bool
    reason: str = ""
    near_threshold: int = 0

    def __bool__(self) -> bool:
        return self.passed


def topk_certificate(
    indices: np.ndarray, count: int, scores: np.ndarray, tolerance: np.ndarray | float, budget: int
) -> Certificate:
    """Decide whether a row of a selection is right, given that its scores were within `tolerance` of gold.

    Rounding near the threshold makes different sets legitimate. A set I of κ = min(k_t, |A|) valid positions A is
    accepted if and only if some scores Ŝ with |Ŝ − S| ≤ ε select it under the tie rule (lower position first):
    for every o ∈ A∖I and i ∈ I: S_o − ε_o < S_i + ε_i, or both are equal and i < o. NaN counts as −∞.

    Args:
        indices: one row of `Selection.indices`, [K].
        count: its entry of `Selection.counts`.
        scores: gold scores of the row, [S], −inf where masked.
        tolerance: ε, [S] or one number. 0 is the exact test.
        budget: k_t.
    """
    indices, scores = np.asarray(indices), np.asarray(scores, np.float64)
    available = scores != -np.inf
    kappa = min(max(int(budget), 0), int(available.sum()))
    if count != kappa:
        return Certificate(False, f"count is {count}, expected {kappa}")
    chosen, tail = indices[:kappa], indices[kappa:]
    if len(chosen) != kappa:
        return Certificate(False, f"{len(chosen)} slots cannot hold {kappa} positions")
    if (tail != -1).any():
        return Certificate(False, f"tail holds {tail[tail != -1][0]}, expected −1")
    if ((chosen < 0) | (chosen >= len(scores))).any():
        return Certificate(False, f"position outside [0, {len(scores)}) in {chosen.tolist()}")
    if not available[chosen].all():
        return Certificate(False, f"position {chosen[~available[chosen]][0]} is masked")
    if (np.diff(chosen) <= 0).any():
        return Certificate(False, f"positions are not strictly ascending: {chosen.tolist()}")
    inside = np.zeros(len(scores), bool)
    inside[chosen] = True
    outside = np.flatnonzero(available & ~inside)
    if kappa == 0 or len(outside) == 0:
        return Certificate(True)
    value = np.where(np.isnan(scores), -np.inf, scores)
    # A NaN score ranks last whatever its tolerance, which is NaN too.
    epsilon = np.where(np.isnan(scores), 0.0, np.asarray(tolerance, np.float64))
    upper, lower = value[chosen] + epsilon[chosen], value[outside] - epsilon[outside]
    weakest = upper.min()
    last_weakest = chosen[upper == weakest].max()
    wrong = (lower > weakest) | ((lower == weakest) & (outside < last_weakest))
    if wrong.any():
        o = outside[wrong][0]
        return Certificate(
            False, f"left out position {o} (score {scores[o]}), kept {last_weakest} (score {scores[last_weakest]})"
        )
    threshold = np.sort(value[available])[::-1][kappa - 1]
    with np.errstate(invalid="ignore"):
        near = np.abs(value[available] - threshold) <= 2 * epsilon[available]
    return Certificate(True, near_threshold=int(near.sum()))


def attention_tolerance(
    q: np.ndarray, k: np.ndarray, v: np.ndarray, selection: list[np.ndarray], dtype: torch.dtype
) -> tuple[np.ndarray, np.ndarray]:
    """How far sparse attention in `dtype` with float32 accumulation may lie from exact arithmetic: for o and for lse.

    With logits within Δ = γ_{d_h+2}·Σ|q||k|/√d_h of exact (d_h for the dot, one for the scale, which may include log₂ e
    for weights 2^x, and one for the product), every weight exp(x − m) has relative error at most
    ρ = e^{2Δ} − 1 + (tiles + 2)(6 + R)u₃₂ + γ_n, R the range of the logits (exp multiplies the rounding of its argument
    by its size, once per tile that rescales). Weights are rounded to `dtype` before they meet v:
    |Δo| ≤ (2ρ + u)·Σ p|v| + u|o| + n·(smallest subnormal)·max|v|, and |Δlse| ≤ Δ + ρ + 4u₃₂·max(|lse|, 1).

    Args:
        q: [L, H, d_h].
        k: [S, H_kv, d_h].
        v: the gated values as the kernel sees them, [S, H_kv, d_h].
        selection: S_t per query.

    Returns:
        float64 [L, H, d_h] and [L, H].
    """
    L, H, d_h = q.shape
    group = H // k.shape[1]
    u, u32 = unit_roundoff(dtype), unit_roundoff(torch.float32)
    tiny = float(torch.finfo(dtype).smallest_normal) * u
    out_tolerance, lse_tolerance = np.zeros((L, H, d_h)), np.zeros((L, H))
    for t in range(L):
        S_t = selection[t]
        n = len(S_t)
        if n == 0:
            continue
        for h in range(H):
            key, value = k[S_t, h // group], np.abs(v[S_t, h // group])
            logits = key @ q[t, h] / math.sqrt(d_h)
            delta = gamma(d_h + 2) * float((np.abs(key) @ np.abs(q[t, h])).max()) / math.sqrt(d_h)
            p = np.exp(logits - logits.max())
            lse = float(logits.max() + np.log(p.sum()))
            tiles = n // 16 + 1
            rho = math.expm1(2 * delta) + (tiles + 2) * (6 + float(np.ptp(logits))) * u32 + gamma(n + 1)
            weighted = (p / p.sum()) @ value
            out_tolerance[t, h] = (2 * rho + 2 * u) * weighted + n * tiny * value.max(0)
            lse_tolerance[t, h] = delta + rho + 4 * u32 * max(abs(lse), 1.0)
    return out_tolerance, lse_tolerance


def attention_gradient_tolerance(
    q: np.ndarray,
    k: np.ndarray,
    v: np.ndarray,
    selected: np.ndarray,
    do: np.ndarray,
    dlse: np.ndarray,
    dtype: torch.dtype,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """How far dq, dk and dv in `dtype` with float32 accumulation may lie from exact arithmetic.

    As in `attention_tolerance` every p has relative error at most ρ; the rounding of lse adds 8u₃₂·max(|lse|, 1).
    δ = do·o − dlse is computed from the rounded output, and do may have been rounded once, by the output gate:
    |Δδ| ≤ Σ|do|·(2ρ + 4u)·Σ p|v| + γ_{d_h}·Σ|do||o|, |Δdp| ≤ (γ_{d_h} + u)·Σ|do||v|. Then dS = p(dp − δ) is rounded:
    |ΔdS| ≤ ρ|dS| + p(|Δdp| + |Δδ|) + u|dS|. The sums over keys or queries add γ_n, the rounding of parts of sums and of
    the result 2u of the sum of the magnitudes, and n subnormals.

    Args:
        q, do: [L, H, d_h]; do is the gradient of the output before its gate.
        k, v: [S, H_kv, d_h], v as the kernel sees it.
        selected: bool [L, S].
        dlse: [L, H].

    Returns:
        float64, the shapes of q, k and v.
    """
    _, H, d_h = q.shape
    group = H // k.shape[1]
    u, u32, scale = unit_roundoff(dtype), unit_roundoff(torch.float32), d_h**-0.5
    tiny = float(torch.finfo(dtype).smallest_normal) * u
    tolerances = np.zeros(q.shape), np.zeros(k.shape), np.zeros(v.shape)
    n = selected.sum(1)
    rows = n > 0
    if not rows.any():
        return tolerances
    chosen = selected[rows]
    gamma_n = np.array([gamma(int(i) + 1) for i in n[rows]])[:, None]
    for h in range(H):
        key, value, query, grad = k[:, h // group], v[:, h // group], q[rows, h], do[rows, h]
        # A key that nobody selected may hold anything.
        used = chosen.any(0)
        key, value = np.where(used[:, None], key, 0), np.where(used[:, None], value, 0)
        logits = np.where(chosen, scale * (query @ key.T), -np.inf)
        delta = gamma(d_h + 2) * scale * np.where(chosen, np.abs(query) @ np.abs(key).T, 0).max(1, keepdims=True)
        largest = logits.max(1, keepdims=True)
        spread = largest - np.where(chosen, logits, np.inf).min(1, keepdims=True)
        lse = largest + np.log(np.exp(logits - largest).sum(1, keepdims=True))
        p = np.exp(logits - lse)  # [rows, S]
        rho = np.expm1(3 * delta) + (n[rows, None] / 16 + 3) * (6 + spread) * u32 + gamma_n
        rho = rho + 8 * u32 * np.maximum(np.abs(lse), 1)
        size, out = np.abs(grad), p @ value
        dp, dp_size = grad @ value.T, size @ np.abs(value).T
        delta_error = (size * ((2 * rho + 4 * u) * (p @ np.abs(value)) + gamma(d_h + 1) * np.abs(out))).sum(1)
        correction = (grad * out).sum(1) - dlse[rows, h]
        delta_error += 2 * u32 * np.abs(dlse[rows, h])
        ds = p * (dp - correction[:, None])
        ds_error = (rho + u) * np.abs(ds) + p * ((gamma(d_h) + u) * dp_size + delta_error[:, None]) + tiny * (p > 0)
        sums = gamma(len(p) * group + 1) + 2 * u
        tolerances[0][rows, h] = scale * (ds_error + (gamma_n + 2 * u) * np.abs(ds)) @ np.abs(key) + tiny
        of_key = scale * (ds_error + sums * np.abs(ds)).T @ np.abs(query)
        tolerances[1][:, h // group] += of_key + tiny * used[:, None] * len(p)
        of_value = ((rho + u + sums) * p + tiny * (p > 0)).T @ size
        tolerances[2][:, h // group] += of_value + tiny * used[:, None] * len(p)
    return tolerances


def kl_tolerance(
    q_idx: np.ndarray,
    k_idx: np.ndarray,
    head_logits: np.ndarray,
    bias: np.ndarray,
    q: np.ndarray,
    k: np.ndarray,
    over: np.ndarray,
    *,
    indexer_scale: float,
    scale: float,
    temperature: float,
) -> dict[str, np.ndarray]:
    """How far τ · Σ_t KL(p_t ‖ softmax(I_t/τ)) and its gradients, in float32, may lie from exact arithmetic.

    The weights p have relative error ρ, as in `attention_tolerance`, with 6u(|logit| + |lse|) for a stored lse. Scores
    are within ε (`score_tolerance`), so x = I/τ within Δx = ε/τ + 3u|x|, and ln Σ exp(x) within Λ = max Δx + ρ of its
    own softmax. Then a row's |ΔKL| ≤ Σ p[ρ(|ln p − x + lse| + 1) + Δx + Λ] + γ Σ p(|ln p| + |x| + |lse|), and
    ∂L/∂I is within δ = softmax(x)(e^{Δx+Λ} − 1) + pρ. Through z_j, with σ and σ' both ¼-Lipschitz, errors δ, |Δz|/4
    and γ per sum reach the inputs; a term ∂L/∂z is rounded to 16 bits, and its 2^16-fold to the smallest float16.

    Args:
        q_idx, k_idx, head_logits, bias, indexer_scale: as in `score_tolerance`.
        q: [L, H, d_h].
        k: [S, H_kv, d_h].
        over: bool [L, S], what the distributions of a row run over.
        scale: factor on q·k.
        temperature: τ.

    Returns:
        float64: "loss", and the gradients "q_idx", "k_idx", "head_logits" and "bias" in the shapes of these. Without
        the rounding to the dtype of a result.
    """
    u = 2.0**-24
    rows = over.any(-1)
    inputs = {"q_idx": q_idx, "k_idx": k_idx, "head_logits": head_logits, "bias": bias}
    tolerance = {"loss": np.zeros(()), **{name: np.zeros(x.shape) for name, x in inputs.items()}}
    if not rows.any():
        return tolerance
    over = over[rows]
    n = over.sum(-1)[:, None]  # [rows, 1]
    roundings = np.array([gamma(int(i) + 24) for i in n[:, 0]])[:, None]

    def softmax(x: np.ndarray, delta: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Weights, lse and ρ of masked logits within delta, a number per row."""
        x = np.where(over, x, -np.inf)
        largest, smallest = x.max(-1, keepdims=True), np.where(over, x, np.inf).min(-1, keepdims=True)
        lse = largest + np.log(np.exp(x - largest).sum(-1, keepdims=True))
        rho = np.expm1(2 * delta) + (n // 16 + 3) * (6 + largest - smallest) * u + roundings
        return np.exp(x - lse), lse, rho + 6 * u * (np.maximum(np.abs(largest), np.abs(smallest)) + np.abs(lse))

    def row_max(x: np.ndarray) -> np.ndarray:
        return np.where(over, x, 0).max(-1, keepdims=True)

    q, (L, H, d_h), group = q[rows], q.shape, q.shape[1] // k.shape[1]
    p, rho = np.zeros(over.shape), np.zeros((len(over), 1))
    for h in range(H):
        key = k[:, h // group]
        delta = row_max(abs(scale) * gamma(d_h + 2) * (np.abs(q[:, h]) @ np.abs(key).T))
        weights, _, rho_h = softmax(scale * (q[:, h] @ key.T), delta)
        p, rho = p + weights / H, np.maximum(rho, rho_h)

    q_idx, weight = q_idx[rows], sigmoid(head_logits[rows])
    indexer = q_idx, k_idx, head_logits[rows], bias
    everything = len(k_idx)  # is before the first query, so that nothing is masked
    scores = indexer_scores(*indexer, scale=indexer_scale, start=everything, length=everything + L)
    epsilon = score_tolerance(*indexer, scale=indexer_scale)
    x = scores / temperature
    delta_x = epsilon / temperature + 3 * u * np.abs(x)
    student, lse, rho_x = softmax(x, row_max(delta_x))
    lambda_ = row_max(delta_x) + rho_x
    log_p = np.log(np.where(p > 0, p, 1))
    per_key = rho * (np.abs(log_p - x + lse) + 1) + delta_x + lambda_ + 2.0**-21
    per_key += (roundings + 8 * u) * (np.abs(log_p) + np.abs(x) + np.abs(lse))
    tolerance["loss"] = np.asarray(temperature * (p * per_key).sum())

    gradient = np.where(over, student - p, 0)
    delta_gradient = np.where(over, student * np.expm1(delta_x + lambda_ + 4 * u * np.abs(x)) + p * rho, 0)
    delta_gradient += 2 * u * (student + p)
    gamma_keys, gamma_rows = gamma(over.shape[1] + 32), gamma(L + 32)
    for j in range(len(bias)):
        z = indexer_scale * (q_idx[:, j] @ k_idx.T) + bias[j]
        delta_z = abs(indexer_scale) * gamma(q_idx.shape[-1] + 4) * (np.abs(q_idx[:, j]) @ np.abs(k_idx).T)
        delta_s = np.minimum((delta_z + 2 * u * (np.abs(z) + abs(bias[j]))) / 4, 1) + 16 * u
        s, w = sigmoid(z), weight[:, j, None]
        dz = np.abs(gradient) * w * s * (1 - s)
        delta_dz = (
            delta_gradient * w * s * (1 - s) + np.abs(gradient) * w * delta_s + (2.0**-16 + 16 * u) * dz + 2.0**-41
        )
        delta_dz = np.where(over, delta_dz, 0)
        dw = delta_gradient * s + np.abs(gradient) * (delta_s + gamma_keys * s)
        tolerance["q_idx"][rows, j] = abs(indexer_scale) * ((delta_dz + gamma_keys * dz) @ np.abs(k_idx))
        tolerance["k_idx"] += abs(indexer_scale) * ((delta_dz + gamma_rows * dz).T @ np.abs(q_idx[:, j]))
        tolerance["head_logits"][rows, j] = (w * ((1 - w) * dw + 32 * u * np.abs(gradient) * s)).sum(-1)
        tolerance["bias"][j] = (delta_dz + (gamma_keys + gamma_rows) * dz).sum()
    return tolerance


def gate_tolerance(gold: np.ndarray, gate_logits: np.ndarray, dtype: torch.dtype) -> np.ndarray:
    """How far x ⊙ σ(g), computed in float32 and rounded to `dtype`, may lie from exact: ((|g| + 11)u₃₂ + u)·|gold|.

    A subnormal σ, below 2^-126, may be flushed to 0: that is an error of 2^-126·|x|, and |x| is |gold|/σ(g).
    """
    u, u32 = unit_roundoff(dtype), unit_roundoff(torch.float32)
    with np.errstate(invalid="ignore", divide="ignore"):  # where the logit is infinite, gold is 0 or x itself
        relative = (np.abs(gate_logits) + 11) * u32 + 2.0**-126 / sigmoid(gate_logits)
        relative = np.nan_to_num(relative, nan=0.0, posinf=0.0) + u
        return relative * np.abs(gold) + float(torch.finfo(dtype).smallest_normal) * u


def error_budget(
    output: np.ndarray,
    baseline: np.ndarray,
    gold: np.ndarray,
    dtype: torch.dtype,
    *,
    factor: float = 2.0,
    tolerance: np.ndarray | float = 0.0,
    cap: float = math.inf,
) -> Verdict:
    """A kernel's dense output against gold, measured by what plain PyTorch loses in the same precision.

    Every |output − gold| must stay below min(factor · max|baseline − gold| + 2u·max|gold|, cap), or below `tolerance`;
    the mean error likewise; NaN and infinities must stand in the same places. The tolerance, a bound proven for any
    order of summation, is there for cases with few elements, where PyTorch may be exact by luck.

    Args:
        output: what the kernel returned.
        baseline: what PyTorch returned for the same rounded inputs in the same dtype.
        gold: the equations in float64.
        dtype: of the output; gives the unit roundoff u.
        factor: 2 for outputs, 3 for gradients.
        tolerance: a proven bound, one number or one per element.
        cap: an absolute bound on the first term, because a bad baseline loosens the ratio.
    """
    output, baseline, gold = (np.asarray(x, np.float64) for x in (output, baseline, gold))
    if output.shape != gold.shape:
        return Verdict(False, math.inf, 0.0, f"shape is {list(output.shape)}, gold {list(gold.shape)}")
    for kind, test in (("NaN", np.isnan), ("+inf", np.isposinf), ("−inf", np.isneginf)):
        differs = test(output) != test(gold)
        if differs.any():
            where = tuple(int(i) for i in np.argwhere(differs)[0])
            return Verdict(False, math.inf, 0.0, f"{kind} differs at {where}: got {output[where]}, gold {gold[where]}")
    finite = np.isfinite(gold)
    if not finite.any():
        return Verdict(True, 0.0, 0.0)
    error = np.abs(output[finite] - gold[finite])
    comparable = finite & np.isfinite(baseline)
    loss = np.abs(baseline[comparable] - gold[comparable])
    worst_loss, mean_loss = (float(loss.max()), float(loss.mean())) if loss.size else (0.0, 0.0)
    floor = 2 * unit_roundoff(dtype) * float(np.abs(gold[finite]).max())
    proven = np.broadcast_to(np.asarray(tolerance, np.float64), gold.shape)[finite]
    budget = np.maximum(min(factor * worst_loss + floor, cap), proven)
    mean_budget = max(factor * mean_loss + floor, float(proven.mean()))
    worst = int(np.argmax(error - budget)) if (error > budget).any() else int(np.argmax(error / (budget + 1e-300)))
    passed = bool((error <= budget).all() and error.mean() <= mean_budget)
    detail = "" if passed else f"mean error {error.mean():.3g}, mean budget {mean_budget:.3g}"
    return Verdict(passed, float(error[worst]), float(budget[worst]), detail)
