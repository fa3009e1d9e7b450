"""What a layer can have around its routed experts."""

from __future__ import annotations

from collections.abc import Iterator

from unipool_jax.config.schema import Config


def problems(config: Config) -> Iterator[str]:
    """One message for each reason why a layer cannot be built as configured around its experts."""
    moe = config.moe
    if moe.router == "none" and moe.shared_experts:
        yield (
            f"moe.shared_experts={moe.shared_experts}: the dense model (moe.router=none) routes nothing; set "
            "moe.shared_experts=0 and a larger model.ffn_size, or choose a router"
        )
    if moe.shared_expert_gate and not moe.shared_experts:
        yield (
            "moe.shared_expert_gate=true: there is nothing to gate with moe.shared_experts=0; set "
            "moe.shared_expert_gate=false or moe.shared_experts=1"
        )
