"""The scaling of rotary positions that a GGUF file describes, as llama.cpp reads it."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any

_PREFIX = "llama.rope.scaling."
_NEUTRAL = {"yarn_ext_factor": 1.0, "yarn_attn_factor": 1.0, "yarn_log_multiplier": 0.0}
"""Fields of YaRN that we do not have, and the values with which they do nothing."""

READ = {
    _PREFIX + name
    for name in (
        *("type", "factor", "attn_factor", "original_context_length", "yarn_beta_fast", "yarn_beta_slow", "finetuned"),
        *_NEUTRAL,
    )
}
"""Fields that are looked at here."""


def kind(fields: Mapping[str, Any]) -> Any:
    """The kind of scaling; a factor without one is linear, and a factor of 1 is none."""
    if fields.get(f"{_PREFIX}factor", 1.0) == 1.0 and fields.get(f"{_PREFIX}type") in (None, "linear"):
        return "none"
    return fields.get(f"{_PREFIX}type", "linear")


def problems(fields: Mapping[str, Any]) -> Iterator[str]:
    """One message for each reason why the scaling is none of ours."""
    found = kind(fields)
    if found not in ("none", "linear", "yarn"):
        yield f"{_PREFIX}type={found}: not supported; use none, linear or yarn"
    for name, neutral in _NEUTRAL.items():
        if (value := fields.get(_PREFIX + name, neutral)) != neutral:
            yield f"{_PREFIX}{name}={value}: not supported; the model is the same only with {neutral}"
    factor = fields.get(f"{_PREFIX}attn_factor", 1.0)
    if found != "yarn" and factor != 1.0:
        yield f"{_PREFIX}attn_factor={factor}: not supported without YaRN; the model is the same only with 1.0"


def scaling(fields: Mapping[str, Any], number: Callable[..., float]) -> dict[str, Any]:
    """Settings of `ModelConfig`; `number(name, default)` reads a positive number of the file."""
    found = kind(fields)
    if found == "none":
        return {}
    factor = float(number(f"{_PREFIX}factor"))
    trained = number("llama.context_length")
    original = number(f"{_PREFIX}original_context_length", trained if found == "yarn" else math.ceil(trained / factor))
    settings = {"rope_scaling": found, "rope_factor": factor, "rope_original_length": int(original)}
    if found == "linear":
        return settings
    settings |= {
        "rope_beta_fast": float(number(f"{_PREFIX}yarn_beta_fast", 32.0)),
        "rope_beta_slow": float(number(f"{_PREFIX}yarn_beta_slow", 1.0)),
    }
    own = float(number(f"{_PREFIX}attn_factor", 1.0))
    # In llama.cpp it multiplies the factor of the paper.
    return settings if own == 1 else settings | {"rope_attention_factor": own * (0.1 * math.log(factor) + 1)}
