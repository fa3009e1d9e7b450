"""Which scaling of rotary positions can be used."""

from __future__ import annotations

from collections.abc import Iterator

from unipool_jax.config.parsing import as_written
from unipool_jax.config.schema import Config, ModelConfig

_OF_YARN = ("rope_beta_fast", "rope_beta_slow", "rope_attention_factor")


def problems(config: Config) -> Iterator[str]:
    """One message for each reason why positions cannot be scaled as the settings say."""
    model, usual = config.model, ModelConfig()
    unused = {
        "none": ("rope_factor", "rope_original_length", *_OF_YARN),
        "linear": _OF_YARN,
        "yarn": (),
    }[model.rope_scaling]
    for name in unused:
        if getattr(model, name) != getattr(usual, name):
            yield (
                f"model.{name}={as_written(getattr(model, name))}: unused with "
                f"model.rope_scaling={model.rope_scaling}; remove it, or choose a scaling that reads it"
            )
    if model.rope_scaling == "none":
        return
    if model.rope_original_length is None:
        yield (
            f"model.rope_scaling={model.rope_scaling}: needs model.rope_original_length, the sequence length that the "
            "unscaled model was trained on"
        )
    elif config.data.sequence_length > config.positions:
        longest = int(model.rope_factor * model.rope_original_length)
        yield (
            f"data.sequence_length={config.data.sequence_length}: longer than model.rope_factor x "
            f"model.rope_original_length = {longest} positions; raise model.rope_factor or lower it"
        )
    if model.rope_scaling == "yarn" and model.rope_beta_slow >= model.rope_beta_fast:
        yield (
            f"model.rope_beta_slow={model.rope_beta_slow:g}: must be less than "
            f"model.rope_beta_fast={model.rope_beta_fast:g}"
        )
