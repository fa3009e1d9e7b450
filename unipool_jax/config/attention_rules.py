"""Which attention can be trained."""

from __future__ import annotations

from collections.abc import Iterator

from unipool_jax.config.parsing import as_written
from unipool_jax.config.schema import AttentionConfig, Config


def problems(config: Config) -> Iterator[str]:
    """One message for each reason why layers cannot attend as the settings of `attention` say."""
    attention, length, usual = config.attention, config.data.sequence_length, AttentionConfig()
    if attention.kind == "full" and attention.window != usual.window:
        yield (
            f"attention.window={attention.window}: unused with attention.kind=full; set attention.kind=window or "
            "alternating, or remove it"
        )
    if attention.kind != "full" and attention.window >= length:
        yield (
            f"attention.window={attention.window}: must be less than data.sequence_length={length}, else every layer "
            "sees all positions; lower it, or set attention.kind=full"
        )
    if attention.kind == "switch":
        if config.lock.ownership != "none":
            yield (
                f"attention.kind=switch: not with lock.ownership={config.lock.ownership}, whose lock arranges layers "
                "anew; set lock.ownership=none or another kind"
            )
    else:
        for name in ("gate", "switch_weight", "switch_epsilon", "switch_alpha", "switch_weighting", "disagreement"):
            if (value := getattr(attention, name)) != getattr(usual, name):
                yield (
                    f"attention.{name}={value}: unused with attention.kind={attention.kind}; set attention.kind=switch "
                    "or remove it"
                )
    if attention.kind == "alternating":
        yield from _full_layer_problems(config)
    elif attention.full_layers != usual.full_layers:
        yield (
            f"attention.full_layers={as_written(attention.full_layers)}: unused with attention.kind={attention.kind}; "
            "set attention.kind=alternating or remove it"
        )


def _full_layer_problems(config: Config) -> Iterator[str]:
    full, layers = config.attention.full_layers, config.model.num_layers
    shown = f"attention.full_layers={as_written(full)}"
    if isinstance(full, tuple) and (any(layer >= layers for layer in full) or len(set(full)) < len(full)):
        yield f"{shown}: must name different layers of 0 to {layers - 1} (model.num_layers={layers})"
    elif full == 0 or not any(config.sees_all):
        yield (
            f"{shown}: no layer of model.num_layers={layers} sees all positions; set at most {layers}, a list, or "
            "attention.kind=window"
        )
    elif all(config.sees_all):
        yield f"{shown}: every layer sees all positions; leave some out, or set attention.kind=full"
