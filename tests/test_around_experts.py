"""What a layer has around the experts that it routes to: its size, its start, its gradient and its place on a mesh.

The mathematics are compared with NumPy in `test_transformer.py` and with PyTorch in `test_pytorch_parity.py`.
"""

from __future__ import annotations

import math

import numpy as np
import pytest

from test_mesh import assert_equal, configure, trained
from tiny import tiny_config, tiny_state
from unipool_jax.config.compose import compose_config
from unipool_jax.model.report import count_parameters
from unipool_jax.training.flops import flops_per_token

SHARED = ("moe.shared_experts=2", "moe.shared_expert_gate=true")


def test_always_on_experts_are_counted_with_what_every_token_uses() -> None:
    base, more = (compose_config(["scale=182m", "method=unipool", *words]) for words in ((), SHARED))
    added = 12 * (3 * 768 * 2 * 3072 + 768)
    before, after = count_parameters(base), count_parameters(more)
    assert after["shared_experts"] == added
    assert after["experts"] == before["experts"]
    for name in ("total", "active"):
        assert after[name] - before[name] == added
    assert flops_per_token(more) - flops_per_token(base) == 6 * added


def test_always_on_experts_start_as_experts_do() -> None:
    config = tiny_config("unipool", "model.hidden_size=64", "model.ffn_size=128", *SHARED)
    shared = tiny_state(config).params["pools"]["layers"]["shared"]
    assert shared["block"]["gate"].shape == (1, 4, 64, 256)
    for name, std in (("gate", 0.2), ("up", 0.2), ("down", 0.2 / math.sqrt(8))):
        assert float(np.std(shared["block"][name])) == pytest.approx(std, rel=0.02), name
    assert float(np.std(shared["sigmoid_gate"])) == pytest.approx(0.2, rel=0.2)


def test_a_mesh_trains_them_as_one_device_does() -> None:
    """Over fsdp, expert and tensor at once, with the experts of windows spread over devices; these stay in place."""
    config = configure("shared_layer_aux", "pool.starts=ring", *SHARED)
    assert_equal(trained(config, (1, 2, 2, 2)), trained(config, None))
