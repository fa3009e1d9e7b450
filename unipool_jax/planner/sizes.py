"""What a device has of a step: tokens, rows and weights of a micro-batch, and passes over its layers."""

from __future__ import annotations

import dataclasses
import math

from unipool_jax.config.chips import Topology
from unipool_jax.config.schema import Config
from unipool_jax.kernels.implementations import Implementation
from unipool_jax.kernels.tpu_layouts import halved_on
from unipool_jax.model.remat import recomputes_pool, regathers
from unipool_jax.moe.capacity import capacity
from unipool_jax.moe.dispatch import Transport, chosen_transport
from unipool_jax.moe.products import exchanges_into_stacks, keeps_products
from unipool_jax.planner.attention import AttentionCost, attention_cost, narrow
from unipool_jax.training.step import counts_before_gradient


@dataclasses.dataclass(frozen=True)
class Sizes:
    """Sizes per device and micro-batch."""

    config: Config
    sizes: dict[str, int]
    topology: Topology

    @property
    def narrow(self) -> int:
        """Bytes of an activation, and of a weight in a product."""
        return narrow(self.config)

    @property
    def tokens(self) -> float:
        ways = self.sizes["data"] * self.sizes["fsdp"] * self.sizes["expert"]
        return self.config.train.microbatch_size * self.config.data.sequence_length / ways

    @property
    def rows(self) -> float:
        return self.tokens * self.config.moe.top_k

    @property
    def received(self) -> float:
        """Rows of the buffer that the experts process."""
        if self.sizes["expert"] == 1 or self.config.moe.router == "none":
            return self.rows
        return capacity(int(self.rows), self.sizes["expert"], self.config.mesh.capacity_factor)

    @property
    def sent(self) -> float:
        """Rows of the buffer that a device sends to experts from: with several nodes it holds those of all of them."""
        return self.rows * (self.config.mesh.expert_nodes if self.transport == "ragged" else 1)

    @property
    def regathers(self) -> bool:
        """Whether the backward pass gathers the weights of each pool again: see `model.remat`."""
        return regathers(self.config, self.sizes["fsdp"])

    @property
    def transport(self) -> Transport:
        """How tokens reach their experts."""
        chip, devices = self.topology.chip, self.topology.num_devices
        platform = "tpu" if chip.torus_axes else "gpu"
        return chosen_transport(self.config.mesh, self.sizes["expert"], platform, chip.device_kind, devices)

    @property
    def receives_in_place(self) -> bool:
        """Whether layers that have a backward pass receive rows where kernels read them.

        That is an array of all layers (`moe.products.kept_products`), or one of a layer that is recomputed
        (`scratch_products`), unless its pool is recomputed with it (`model.remat`).
        """
        config, model, chip = self.config, self.config.model, self.topology.chip
        kernels: Implementation = (
            "pallas_tpu" if self.topology.is_tpu and config.kernels.implementation in ("auto", "pallas_tpu") else "xla"
        )
        alone = model.remat in ("moe", "full") and not recomputes_pool(config, self.sizes["fsdp"])
        kept = keeps_products(config, kernels, math.prod(self.sizes.values()) > 1)
        return (
            (kept or (kernels == "pallas_tpu" and alone))
            and exchanges_into_stacks(config, self.transport, self.sizes["tensor"])
            and halved_on(
                chip.device_kind,
                chip.cores,
                int(self.received),
                model.hidden_size,
                model.ffn_size,
                model.compute_dtype,
            )
        )

    @property
    def bank(self) -> float:
        """Weights of one pool on one device, gathered."""
        model, config = self.config.model, self.config
        experts = config.experts_per_pool
        own = experts / (1 if config.moe.router == "none" else self.sizes["expert"])
        return 3 * model.hidden_size * model.ffn_size * own / self.sizes["tensor"]

    def attention(self, forward: int = 1) -> AttentionCost:
        """What attention costs with so many forward passes over a layer."""
        rows = self.tokens / self.config.data.sequence_length * self.config.model.num_heads / self.sizes["tensor"]
        return attention_cost(self.config, self.topology, rows, forward)

    @property
    def normed_rows(self) -> float:
        """Rows of the norms behind the two blocks of a layer, mean over layers."""
        config, mixtures = self.config, self.config.mixture_layers / self.config.model.num_layers
        if config.norms_experts:
            return self.tokens * (2 - mixtures + mixtures * (config.moe.shared_experts > 0)) + self.received * mixtures
        without = config.moe.router != "none" and config.model.post_norm_experts == "none"
        return self.tokens * (2 - mixtures * without)

    @property
    def block_width(self) -> float:
        """Hidden width, mean over layers, of what every token visits: always-on experts and blocks of dense layers."""
        config = self.config
        widths = config.mixture_layers * config.shared_width + config.moe.dense_layers * config.dense_width
        return widths / config.model.num_layers

    @property
    def block_weights(self) -> float:
        """Weights of such a block, mean over layers."""
        return 3 * self.config.model.hidden_size * self.block_width

    @property
    def attention_weights(self) -> float:
        model = self.config.model
        return 2 * model.hidden_size * (model.num_heads + model.num_kv_heads) * self.config.head_size


def forward_passes(at: Sizes) -> tuple[int, int]:
    """Forward passes per micro-batch of a layer without its attention and mixture blocks, and of its mixture block.

    One for the forward pass, one for counting tokens before the gradient, one for rematerialization.
    """
    counting = int(counts_before_gradient(at.config))
    remat = at.config.model.remat
    layer = 1 + counting + (remat == "full")
    return layer, layer + (remat == "moe")
