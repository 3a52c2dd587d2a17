"""Layers with random parameters for the tests of the layer and the cache."""

import dataclasses
from typing import Any

import torch
from hypothesis import strategies as st

from gsa_ref import GatedSparseAttention, GSAConfig
from gsa_ref.cases import LayerCase, Limits, layer_cases
from gsa_ref.check import gamma

SMALL = GSAConfig(d=16, H=4, H_kv=2, d_h=8, H_I=2, d_I=8, k_base=6, k_min=2, k_max=12)
VARIANTS = ("dense", "sparse", "gated", "gsa")
# Relative to the largest output; a row of these layers goes through some hundred roundings.
LAYER_TOLERANCE = gamma(2048, 2.0**-53)


@dataclasses.dataclass(frozen=True)
class Model:
    """A case of `gsa_ref.cases` with the switches that it does not draw."""

    case: LayerCase
    sparse: bool
    indexer_rope: bool
    trained: bool

    @property
    def config(self) -> GSAConfig:
        return dataclasses.replace(self.case.config, sparse=self.sparse, indexer_rope=self.indexer_rope)

    def build(self) -> GatedSparseAttention:
        """In eval mode, in the case's dtype; V̄ is unset, or the mean row variance of other data."""
        return build(self.config, self.case.seed, trained=self.trained).to(self.inputs()["h"].dtype)

    def inputs(self) -> dict[str, Any]:
        return self.case.arguments()


def build(config: GSAConfig, seed: int = 0, *, trained: bool = True) -> GatedSparseAttention:
    """A layer whose every parameter is random, biases included."""
    layer = GatedSparseAttention(config).double()
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in layer.parameters():
            width = parameter.shape[-1] if parameter.dim() == 2 else 1
            parameter.copy_(1.5 * width**-0.5 * torch.randn(parameter.shape, generator=g, dtype=torch.float64))
        if trained:
            layer(torch.randn(2, 16, config.d, generator=g, dtype=torch.float64))
            layer.update_mean_variance()
    return layer.eval()


def hidden(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def models(dtype: str = "float64", *, length: int = 20) -> st.SearchStrategy[Model]:
    limits = Limits(B=3, L=length)
    return st.builds(Model, layer_cases(dtype, limits), st.booleans(), st.booleans(), st.booleans())


def close_layers(output: torch.Tensor, expected: torch.Tensor) -> bool:
    """Equal up to the rounding of two float64 layers."""
    budget = LAYER_TOLERANCE * float(expected.detach().abs().max()) if expected.numel() else 0.0
    return output.shape == expected.shape and bool(((output - expected).abs() <= budget).all())
