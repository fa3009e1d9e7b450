"""What a layer can have around its routed experts, and which layers have experts."""

from __future__ import annotations

from collections.abc import Iterator

from unipool_jax.config.schema import Config


def layers_with_experts(config: Config) -> str:
    """The settings that say how many layers have experts, with their values."""
    layers, dense = config.model.num_layers, config.moe.dense_layers
    if not dense:
        return f"model.num_layers={layers}"
    return f"the {layers - dense} layers with experts (model.num_layers={layers}, moe.dense_layers={dense})"


def problems(config: Config) -> Iterator[str]:
    """One message for each reason why a layer cannot be built as configured around its experts."""
    moe = config.moe
    if moe.shared_expert_gate and not moe.shared_experts:
        yield (
            "moe.shared_expert_gate=true: there is nothing to gate with moe.shared_experts=0; set "
            "moe.shared_expert_gate=false or moe.shared_experts=1"
        )
    if moe.dense_ffn_size is not None and not moe.dense_layers:
        yield f"moe.dense_ffn_size={moe.dense_ffn_size}: unused with moe.dense_layers=0; remove it"
    if moe.router != "none":
        return
    why = "the dense model (moe.router=none) routes nothing"
    if moe.shared_experts:
        yield (
            f"moe.shared_experts={moe.shared_experts}: {why}; set moe.shared_experts=0 and a larger model.ffn_size, or "
            "choose a router"
        )
    if moe.depth_vectors:
        yield f"moe.depth_vectors=true: {why}; set moe.depth_vectors=false or choose a router"
    if moe.dense_layers:
        yield f"moe.dense_layers={moe.dense_layers}: {why}, all its layers are dense; set moe.dense_layers=0"


def too_many_dense_layers(config: Config) -> str | None:
    """A message if no layer is left for experts. What is counted per layer with experts makes no sense then."""
    layers, dense = config.model.num_layers, config.moe.dense_layers
    if not dense or dense < layers:
        return None
    return (
        f"moe.dense_layers={dense}: leaves none of model.num_layers={layers} layers for experts; set at most "
        f"{layers - 1}, or method=dense"
    )
