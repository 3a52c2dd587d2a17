"""Configuration of the layer: the paper's sizes, and one field for each choice that the paper leaves open."""

from dataclasses import dataclass, replace
from typing import Any, Literal

from gsa_ref._arguments import RULES, check_bool, check_budget_sizes, check_choice, check_int, check_number

GATES = ("both", "value", "output", "none")
VARIANTS = {
    "dense": {"sparse": False, "gates": "none"},
    "sparse": {"sparse": True, "gates": "none"},
    "gated": {"sparse": False, "gates": "both"},
    "gsa": {"sparse": True, "gates": "both"},
}


@dataclass(frozen=True, kw_only=True)
class GSAConfig:
    """Sizes and choices of a `GatedSparseAttention` layer. Immutable, checked on construction.

    Attributes:
        d: model width.
        H: query heads.
        H_kv: key/value heads; divides H.
        d_h: head width; even (RoPE rotates pairs).
        H_I: indexer heads.
        d_I: indexer head width.
        k_base: budget at the mean variance (Eq. 8), in tokens.
        k_min: smallest budget, in tokens.
        k_max: largest budget, in tokens.
        rule: direction of Eq. 8: "proportional" (k ∝ Var, as printed), "inverse" (as the prose says) or "fixed".
        indexer_scale: factor on q^I·k^I in Eq. 7; None means 1/√d_I, 1.0 is the printed form.
        indexer_rope: apply RoPE to q^I and k^I too.
        rope_theta: base of the RoPE frequencies.
        sparse: first switch: select tokens with the indexer (else dense causal attention).
        gates: second switch: "both", "value" (G2 only), "output" (G1 only) or "none".
        gate_bias_init: initial bias of the gates' projections; 0 starts every gate at σ(0) = 0.5.
        mean_variance_decay: decay of the running mean V̄ per optimiser step.
        kl_temperature: τ of the indexer's loss, whose student is softmax(I/τ).

    Raises:
        TypeError: a field has the wrong type.
        ValueError: a field is out of range, or two fields contradict one another.
    """

    d: int = 4096
    H: int = 32
    H_kv: int = 8
    d_h: int = 128
    H_I: int = 4
    d_I: int = 64
    k_base: int = 2048
    k_min: int = 256
    k_max: int = 4096
    rule: Literal["proportional", "inverse", "fixed"] = "proportional"
    indexer_scale: float | None = None
    indexer_rope: bool = False
    rope_theta: float = 10000.0
    sparse: bool = True
    gates: Literal["both", "value", "output", "none"] = "both"
    gate_bias_init: float = 0.0
    mean_variance_decay: float = 0.99
    kl_temperature: float = 0.1

    def __post_init__(self) -> None:
        for name in ("d", "H", "H_kv", "d_h", "H_I", "d_I"):
            check_int(name, getattr(self, name), 1)
        if self.H % self.H_kv:
            raise ValueError(f"H: expected a multiple of H_kv = {self.H_kv}, got {self.H}")
        check_budget_sizes(self.k_base, self.k_min, self.k_max, self.rule)
        if not self.k_min <= self.k_base <= self.k_max:
            # Eq. 8 would clamp it away, and the mean budget would not be the one asked for.
            raise ValueError(
                f"k_base: expected k_min ≤ k_base ≤ k_max = [{self.k_min}, {self.k_max}], got {self.k_base}"
            )
        if self.indexer_scale is not None:
            check_number("indexer_scale", self.indexer_scale)
        for name in ("indexer_rope", "sparse"):
            check_bool(name, getattr(self, name))
        check_choice("gates", self.gates, GATES)
        check_number("rope_theta", self.rope_theta, positive=True)
        check_number("gate_bias_init", self.gate_bias_init)
        check_number("mean_variance_decay", self.mean_variance_decay)
        if not 0 <= self.mean_variance_decay < 1:
            raise ValueError(f"mean_variance_decay: expected 0 ≤ decay < 1, got {self.mean_variance_decay}")
        check_number("kl_temperature", self.kl_temperature, positive=True)
        if self.d_h % 2:
            raise ValueError(f"d_h: expected an even number (RoPE rotates pairs of channels), got {self.d_h}")
        if self.indexer_rope and self.d_I % 2:
            raise ValueError(f"d_I: expected an even number with indexer_rope=True, got {self.d_I}")

    def variant(self, name: str) -> "GSAConfig":
        """The same sizes as one of the paper's four models: "dense", "sparse", "gated" or "gsa"."""
        check_choice("name", name, tuple(VARIANTS))
        return replace(self, **VARIANTS[name])  # type: ignore[arg-type]

    @property
    def value_gate(self) -> bool:
        """Whether G2 (Eq. 9) is on."""
        return self.gates in ("both", "value")

    @property
    def output_gate(self) -> bool:
        """Whether G1 (Eq. 10) is on."""
        return self.gates in ("both", "output")

    @property
    def effective_indexer_scale(self) -> float:
        """The factor on q^I·k^I: `indexer_scale`, or 1/√d_I if that is None."""
        return self.d_I**-0.5 if self.indexer_scale is None else float(self.indexer_scale)


def check_config(name: str, value: Any) -> None:
    if not isinstance(value, GSAConfig):
        raise TypeError(f"{name}: expected a GSAConfig, got {type(value).__name__}")


__all__ = ["GATES", "RULES", "VARIANTS", "GSAConfig", "check_config"]
