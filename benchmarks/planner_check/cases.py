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
    "dense model.num_layers=8",
    "dense model.ffn_size=512",
    "dense model.hidden_size=192 train.microbatch_size=4",
    "dense data.sequence_length=256",
    "vanilla model.hidden_size=64",
    "vanilla model.hidden_size=192 model.ffn_size=256",
    "vanilla moe.experts_per_layer=4",
    "vanilla moe.top_k=2",
    "vanilla model.remat=moe",
    "vanilla model.remat=full model.num_layers=6",
    "vanilla train.microbatch_size=4",
    "vanilla_aux_free model.hidden_size=96 model.ffn_size=192",
    "vanilla_normrouter train.microbatch_size=2",
    "shared_pool_aux moe.experts_per_layer=4",
    "shared_layer_aux model.ffn_size=256",
    "unipool model.num_layers=2",
    "unipool model.num_layers=6 moe.experts_per_layer=4",
    "unipool model.hidden_size=192",
    "unipool model.hidden_size=256 model.ffn_size=256",
    "unipool moe.experts_per_layer=2",
    "unipool moe.top_k=2",
    "unipool model.remat=moe train.microbatch_size=4",
    "unipool model.remat=full",
    "unipool data.sequence_length=256 train.batch_size=4 train.microbatch_size=4",
    "unipool data.sequence_length=64",
    "unipool model.vocab_size=8192",
    "ring",
    "sliding model.ffn_size=256",
    "cyclic model.num_layers=6",
    "rexmoe pool.span=2 model.hidden_size=192",
)
"""The fitted constants are frozen before these are predicted."""


def config_of(case: str) -> Config:
    """The configuration of a case: a method and the settings in which it differs from the base."""
    method, *overrides = case.split()
    experts = [] if method == "dense" or "moe.experts_per_layer" in case else ["moe.experts_per_layer=8"]
    return compose_config([f"method={method}", *_BASE, *experts, *overrides])
