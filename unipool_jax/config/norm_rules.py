"""Which norms a layer can have."""

from __future__ import annotations

from collections.abc import Iterator

from unipool_jax.config.schema import Config, ModelConfig


def problems(config: Config) -> Iterator[str]:
    """One message for each reason why layers cannot have the norms that the settings of `model` name."""
    model, moe, usual = config.model, config.moe, ModelConfig()
    unused = {
        "pre": ("post_norm_attention", "post_norm_ffn", "post_norm_epsilon", "post_norm_experts"),
        "sandwich": ("post_norm_attention", "post_norm_ffn"),
        "depth_scaled_sandwich": (),
    }[model.norm]
    for name in unused:
        if (value := getattr(model, name)) != getattr(usual, name):
            others = "sandwich or depth_scaled_sandwich" if "experts" in name else "depth_scaled_sandwich"
            yield f"model.{name}={value}: unused with model.norm={model.norm}; set model.norm={others}, or remove it"
    if model.norm == "pre" or model.post_norm_experts == usual.post_norm_experts:
        return
    if moe.router == "none":
        yield (
            f"model.post_norm_experts={model.post_norm_experts}: unused with moe.router=none, which has no mixtures; "
            "remove it or choose a router"
        )
    elif model.post_norm_experts == "post" and moe.top_k == 1 and not moe.shared_experts:
        yield (
            "model.post_norm_experts=post: with moe.top_k=1 and moe.shared_experts=0 a norm behind the gate takes the "
            "gate away, and the loss cannot teach the router; set model.post_norm_experts=norm_then_gate, or "
            "moe.top_k=2"
        )
