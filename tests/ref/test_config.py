"""Configuration: the paper's sizes, one field per open choice, checked on construction."""

import dataclasses
import math

import pytest

from gsa_ref import GSAConfig
from gsa_ref.config import GATES, RULES


def test_defaults_are_the_sizes_of_the_paper_and_the_documented_choices():
    assert dataclasses.asdict(GSAConfig()) == {
        "d": 4096,
        "H": 32,
        "H_kv": 8,
        "d_h": 128,
        "H_I": 4,
        "d_I": 64,
        "k_base": 2048,
        "k_min": 256,
        "k_max": 4096,
        "rule": "proportional",
        "indexer_scale": None,
        "indexer_rope": False,
        "rope_theta": 10000.0,
        "sparse": True,
        "gates": "both",
        "gate_bias_init": 0.0,
        "mean_variance_decay": 0.99,
        "kl_temperature": 0.1,
    }


def test_a_config_is_immutable_and_hashable():
    config = GSAConfig()
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.d = 1
    assert {config: 1}[GSAConfig()] == 1


@pytest.mark.parametrize(
    ("variant", "sparse", "value_gate", "output_gate"),
    [
        ("dense", False, False, False),
        ("sparse", True, False, False),
        ("gated", False, True, True),
        ("gsa", True, True, True),
    ],
)
def test_the_four_variants_differ_in_two_switches(variant, sparse, value_gate, output_gate):
    config = GSAConfig(d=64, k_base=300, rule="inverse").variant(variant)
    assert (config.sparse, config.value_gate, config.output_gate) == (sparse, value_gate, output_gate)
    assert (config.d, config.k_base, config.rule) == (64, 300, "inverse")


@pytest.mark.parametrize(
    ("gates", "value_gate", "output_gate"),
    [("both", True, True), ("value", True, False), ("output", False, True), ("none", False, False)],
)
def test_each_gate_can_be_on_alone(gates, value_gate, output_gate):
    config = GSAConfig(gates=gates)
    assert (config.value_gate, config.output_gate) == (value_gate, output_gate)


@pytest.mark.parametrize(
    ("d_I", "scale", "effective"), [(64, None, 0.125), (16, None, 0.25), (64, 1.0, 1.0), (64, 0.3, 0.3)]
)
def test_the_indexer_scale_defaults_to_one_over_the_root_of_the_width(d_I, scale, effective):
    assert GSAConfig(d_I=d_I, indexer_scale=scale).effective_indexer_scale == effective


def test_limits_are_accepted():
    GSAConfig(k_base=1, k_min=1, k_max=1)
    GSAConfig(k_base=2**24, k_max=2**24)
    GSAConfig(mean_variance_decay=0.0)
    GSAConfig(d_I=3)
    for rule in RULES:
        GSAConfig(rule=rule)
    for gates in GATES:
        GSAConfig(gates=gates)


SIZES = ("d", "H", "H_kv", "d_h", "H_I", "d_I", "k_base", "k_min", "k_max")
BAD = [
    *[(name, 0, ValueError, f"{name}: expected an int ≥ 1, got 0") for name in SIZES],
    *[(name, 2.0, TypeError, f"{name}: expected an int, got float 2.0") for name in SIZES],
    *[(name, True, TypeError, f"{name}: expected an int, got bool True") for name in SIZES],
    ("k_max", 2**24 + 1, ValueError, "k_max: expected an int ≤ 16777216, got 16777217"),
    ("H", 12, ValueError, "H: expected a multiple of H_kv = 8, got 12"),
    ("d_h", 7, ValueError, "d_h: expected an even number .*, got 7"),
    ("k_min", 5000, ValueError, "k_min: expected at most k_max = 4096, got 5000"),
    ("k_base", 100, ValueError, r"k_base: expected k_min ≤ k_base ≤ k_max = \[256, 4096\], got 100"),
    ("k_base", 5000, ValueError, r"k_base: expected k_min ≤ k_base ≤ k_max = \[256, 4096\], got 5000"),
    ("rule", "adaptive", ValueError, "rule: expected proportional or inverse or fixed, got 'adaptive'"),
    ("rule", None, TypeError, "rule: expected a str, got NoneType None"),
    ("gates", "all", ValueError, "gates: expected both or value or output or none, got 'all'"),
    ("gates", True, TypeError, "gates: expected a str, got bool True"),
    ("sparse", 1, TypeError, "sparse: expected a bool, got int"),
    ("indexer_rope", "yes", TypeError, "indexer_rope: expected a bool, got str"),
    ("indexer_scale", "1", TypeError, "indexer_scale: expected a number, got str '1'"),
    ("indexer_scale", math.nan, ValueError, "indexer_scale: expected a finite number, got nan"),
    ("rope_theta", 0.0, ValueError, "rope_theta: expected a finite positive number, got 0.0"),
    ("rope_theta", math.inf, ValueError, "rope_theta: expected a finite positive number, got inf"),
    ("gate_bias_init", math.inf, ValueError, "gate_bias_init: expected a finite number, got inf"),
    ("gate_bias_init", None, TypeError, "gate_bias_init: expected a number, got NoneType None"),
    ("mean_variance_decay", 1.0, ValueError, "mean_variance_decay: expected 0 ≤ decay < 1, got 1.0"),
    ("mean_variance_decay", -0.1, ValueError, "mean_variance_decay: expected 0 ≤ decay < 1, got -0.1"),
    ("mean_variance_decay", "0.9", TypeError, "mean_variance_decay: expected a number, got str '0.9'"),
    ("kl_temperature", 0.0, ValueError, "kl_temperature: expected a finite positive number, got 0.0"),
    ("kl_temperature", math.inf, ValueError, "kl_temperature: expected a finite positive number, got inf"),
    ("kl_temperature", None, TypeError, "kl_temperature: expected a number, got NoneType None"),
]


@pytest.mark.bad_input
@pytest.mark.parametrize(("name", "value", "exception", "message"), BAD)
def test_a_wrong_field_is_named_with_what_came_and_what_was_expected(name, value, exception, message):
    with pytest.raises(exception, match=f"^{message}$"):
        GSAConfig(**{name: value})


@pytest.mark.bad_input
def test_an_odd_indexer_width_is_refused_with_rope_only():
    with pytest.raises(ValueError, match=r"^d_I: expected an even number with indexer_rope=True, got 3$"):
        GSAConfig(d_I=3, indexer_rope=True)
    assert GSAConfig(d_I=6, indexer_rope=True).indexer_rope


@pytest.mark.bad_input
@pytest.mark.parametrize(("name", "exception"), [("full", ValueError), (None, TypeError)])
def test_an_unknown_variant_is_refused(name, exception):
    with pytest.raises(exception, match=f"^name: expected .*{name!r}$"):
        GSAConfig().variant(name)
