"""What is measured: a few configurations to calibrate on, and others to predict.

Each differs from the base in the settings that its name lists. All are small enough for seconds on one core.
"""

from __future__ import annotations

from unipool_jax.config.compose import compose_config
from unipool_jax.config.schema import Config

_BASE = (
    "scale=demo",
    "model.num_layers=4",
    "model.ffn_size=128",
    "model.vocab_size=2048",
    "data.sequence_length=128",
    "loss.switch_group_sequences=2",
)

CALIBRATION = (
    "dense",
    "dense model.hidden_size=64",
    "dense model.hidden_size=256 model.ffn_size=512",
    "vanilla",
    "unipool",
    "unipool model.hidden_size=64 model.ffn_size=64",
    "unipool train.microbatch_size=2",
    "unipool moe.experts_per_layer=16 model.ffn_size=256",
)
"""Constants of the machine are fitted to these."""

HELD_OUT = (
    "dense model.hidden_size=192 model.ffn_size=384",
    "dense model.num_layers=6 model.hidden_size=96",
    "dense model.vocab_size=4096",
    "dense model.remat=full",
    "dense train.microbatch_size=2",
    "vanilla model.num_layers=8",
    "vanilla model.ffn_size=384",
    "vanilla moe.experts_per_layer=16",
    "vanilla data.sequence_length=64",
    "vanilla model.remat=full",
    "vanilla model.hidden_size=256",
    "vanilla moe.top_k=2 train.microbatch_size=8",
    "vanilla_normrouter model.hidden_size=96",
    "vanilla_aux_free model.num_layers=6",
    "shared_pool_aux model.ffn_size=256",
    "shared_layer_aux model.hidden_size=192",
    "unipool model.num_layers=8 moe.experts_per_layer=4",
    "unipool model.ffn_size=256 moe.top_k=2",
    "unipool moe.experts_per_layer=12",
    "unipool model.remat=moe",
    "unipool model.remat=full model.hidden_size=192",
    "unipool train.microbatch_size=4",
    "unipool data.sequence_length=256 model.num_layers=2",
    "unipool model.vocab_size=4096 model.num_layers=2",
    "unipool_centered pool.fraction=0.5",
    "unipool pool.groups=2",
    "ring model.hidden_size=96",
    "sliding moe.top_k=2",
    "cyclic model.ffn_size=64",
    "cs_moe model.hidden_size=96",
    # Experts of a million weights a matrix, which a CPU multiplies in loops.
    "vanilla model.num_layers=2 model.hidden_size=1024 model.ffn_size=1024 moe.experts_per_layer=4",
    "unipool model.num_layers=2 model.hidden_size=512 model.ffn_size=2048 moe.experts_per_layer=4",
)
"""The fitted constants are frozen before these are predicted."""


def config_of(case: str) -> Config:
    """The configuration of a case: a method and the settings in which it differs from the base."""
    method, *overrides = case.split()
    experts = [] if method == "dense" or "moe.experts_per_layer" in case else ["moe.experts_per_layer=8"]
    return compose_config([f"method={method}", *_BASE, *experts, *overrides])
