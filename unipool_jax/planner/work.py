"""FLOPs and memory traffic of a training step on one device, counted from the configuration, with all else counted.

Counts follow what the TPU compiler makes of this program; `docs/planner.md` explains each of them.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

import numpy as np

from unipool_jax.config.chips import Topology
from unipool_jax.config.schema import Config
from unipool_jax.kernels import tpu_tiles, xla_loops
from unipool_jax.kernels.group_plan import block_shape
from unipool_jax.planner import memory
from unipool_jax.planner.attention import WIDE, fused, padding, recomputes_product
from unipool_jax.planner.group_rows import GroupCosts, blocks, expected_tile_rows, loops
from unipool_jax.planner.kernel_work import (
    BANK_GRADIENTS,
    ExpertShapes,
    KernelWork,
    attention_kernels,
    expert_backward,
    expert_forward,
)
from unipool_jax.planner.messages import Message, messages
from unipool_jax.planner.sizes import Sizes, forward_passes
from unipool_jax.planner.windows import LayerLoad, layer_loads


class Work(NamedTuple):
    """All operations of one kind in a step."""

    name: str
    flops: float
    """Executed, including recomputation and padding."""
    unpadded_flops: float
    bytes: float
    """Traffic to and from high-bandwidth memory."""


class Counts(NamedTuple):
    """The work, messages and memory of a step."""

    work: tuple[Work, ...]
    messages: tuple[Message, ...]
    state_bytes: float
    """Parameters and both moments."""
    temporary_bytes: float
    """An estimate, to choose what to compile."""
    evaluation_bytes: float
    """Temporaries of an evaluation step, an estimate."""
    bank_traffic_bytes: float
    """Memory traffic that reads experts and accumulates their gradient."""
    busiest: float = 1.0
    """Rows of a layer's busiest device over the mean of devices, under even routing, averaged over layers."""


def count(config: Config, sizes: dict[str, int], topology: Topology) -> Counts:
    """Count a step of `config` on a mesh of these axis sizes."""
    at = Sizes(config, sizes, topology)
    parameters = sum(memory.parameters(at))
    return Counts(
        (*_layers(at), *_ends(at), Work("optimiser", 0.0, 0.0, parameters * 8 * WIDE)),
        tuple(message for message in messages(at) if message.sent_bytes),
        parameters * 3 * WIDE,
        memory.temporaries(at),
        memory.evaluation(at),
        _bank_traffic(at),
        float(np.mean([load.busiest for load in layer_loads(config, sizes)])),
    )


def _layers(at: Sizes) -> tuple[Work, ...]:
    config, tensor, n = at.config, at.sizes["tensor"], at.tokens
    model, width, micro = config.model, config.model.hidden_size, config.num_microbatches
    forward, mixture = forward_passes(at)
    attending = forward + (model.remat == "attention")
    work, mixtures = [], []

    weights = at.attention_weights / tensor
    heads = 2 * (model.num_heads + model.num_kv_heads) * config.head_size
    moved = at.narrow * (weights + n * (2 * width + heads) / tensor)
    flops = 2 * n * weights
    work.append(Work("projections", flops * (attending + 2), flops * (attending + 2), moved * (attending + 2)))

    scores = at.attention(attending)
    padded = scores.flops * padding(config, at.topology)
    work.append(Work("attention scores", padded, scores.flops, scores.bytes))

    # Two norms, two residual sums and rotary positions, in float32 between bfloat16 arrays.
    work.append(Work("norms and sums", 0.0, 0.0, 10 * n * width * at.narrow * (forward + 2)))
    if model.norm != "pre":
        behind = Work("norms behind blocks", 0.0, 0.0, 2 * at.normed_rows * width * at.narrow)
        work.append(behind._replace(bytes=behind.bytes * (mixture + 2)))
    if config.kernels.implementation == "xla" and not at.topology.is_tpu:
        # The scan over layers copies what is kept into stacked arrays, and out of them again: read and written twice.
        work.append(Work("stacks of layers", 0.0, 0.0, 4 * memory.kept(at)))
    if at.block_width:
        hidden, weights = at.block_width / tensor, at.block_weights / tensor
        flops = 2 * n * weights * (mixture + 2)
        # Gate, up and their product are written, and the product is read again.
        moved = at.narrow * (weights + n * (2 * width + 4 * hidden)) * (mixture + 2)
        work.append(Work("blocks of every token", flops, flops, moved))
    if config.moe.router != "none":
        experts = config.experts_per_pool
        flops = 2 * n * width * experts
        moved = n * (width * at.narrow + 4 * experts * WIDE)
        routed = mixture + 2 + (model.remat == "router")
        mixtures.append(Work("router", flops * routed, flops * routed, moved * routed))
        # Rows are sorted, sent, received and combined. Receive buffers are cleared first, but of a pass that receives
        # in place, neither that nor the buffer of its gradients.
        buffer = at.received if at.sizes["expert"] > 1 else 0
        cleared = mixture + 1 - 2 * at.receives_in_place
        moved = at.narrow * width * (8 * at.sent * (mixture + 1) + buffer * (mixture + 1 + cleared))
        mixtures.append(Work("dispatch", 0.0, 0.0, moved))
    mixtures.extend(_expert_work(at, mixture))
    return (*_times(work, model.num_layers * micro), *_times(mixtures, config.mixture_layers * micro))


def _times(work: Iterable[Work], times: int) -> tuple[Work, ...]:
    return tuple(item._replace(**{f: getattr(item, f) * times for f in Work._fields[1:]}) for item in work)


def _expert_work(at: Sizes, passes: int) -> tuple[Work, Work]:
    """Forward kernels of one layer, and backward kernels including the gradient of the bank; the mean of all layers.

    A layer waits for its busiest device.
    """
    layers = [_expert_work_of(at, passes, load) for load in layer_loads(at.config, at.sizes)]
    return _mean([forward for forward, _ in layers]), _mean([backward for _, backward in layers])


def _mean(layers: list[Work]) -> Work:
    if len(set(layers)) == 1:
        return layers[0]
    flops, unpadded, moved = (
        sum(numbers) / len(layers) for numbers in zip(*(work[1:] for work in layers), strict=True)
    )
    return Work(layers[0].name, flops, unpadded, moved)


def _expert_work_of(at: Sizes, passes: int, load: LayerLoad) -> tuple[Work, Work]:
    costs = _group_costs(at, load)
    shapes, padded = _expert_shapes(at, load, costs), costs.padding
    forward = [*expert_forward(shapes).values()]
    *others, bank_gradient = expert_backward(shapes).values()
    backward = [*others, *(bank_gradient,) * BANK_GRADIENTS]
    if at.config.model.remat == "experts":
        backward.append(forward[0])
    first, second = (sum(kernel.flops for kernel in kernels) for kernels in (forward, backward))
    moved, again = sum(kernel.bytes for kernel in forward), forward[0].flops * costs.repeated
    return (
        Work("experts forward", first * padded * passes, first * passes, moved * passes),
        Work("experts backward", second * padded + again, second, sum(kernel.bytes for kernel in backward)),
    )


def _expert_shapes(at: Sizes, load: LayerLoad, costs: GroupCosts) -> ExpertShapes:
    model, tensor = at.config.model, at.sizes["tensor"]
    rows, matrix = at.rows * load.busiest, at.bank / 3
    inner = rows if at.topology.is_tpu and at.config.kernels.implementation != "xla" else at.received
    hidden, moved, sums = model.ffn_size / tensor, matrix * costs.reads, matrix * costs.sums
    return ExpertShapes(rows, at.received, inner, model.hidden_size, hidden, moved, sums, at.narrow)


def kernel_work(config: Config, sizes: dict[str, int], topology: Topology) -> dict[str, KernelWork]:
    """One call of each hand-written kernel, by the beginning of its name, with padding; the mean of layers."""
    at = Sizes(config, sizes, topology)
    found: dict[str, KernelWork] = {}
    if config.moe.router != "none":
        loads = layer_loads(config, sizes)
        for load in loads:
            costs = _group_costs(at, load)
            shapes, padded = _expert_shapes(at, load, costs), costs.padding
            for name, work in (expert_forward(shapes) | expert_backward(shapes)).items():
                total = found.get(name, KernelWork(0.0, 0.0))
                found[name] = KernelWork(
                    total.flops + work.flops * padded / len(loads), total.bytes + work.bytes / len(loads)
                )
    if fused(config, topology):
        kernels = attention_kernels(at.attention(1), at.attention(2), int(recomputes_product(config)))
        more = padding(config, topology)
        found |= {name: work._replace(flops=work.flops * more) for name, work in kernels.items()}
    return found


def _group_costs(at: Sizes, load: LayerLoad) -> GroupCosts:
    """What the products of a layer's experts make of their rows."""
    config, model, chip = at.config, at.config.model, at.topology.chip
    # The kernels do not read experts without rows.
    read = load.share * load.busiest
    if config.moe.router == "none":
        return GroupCosts(1.0, read, read)
    groups = config.experts_per_pool / at.sizes["expert"]
    if config.kernels.implementation == "xla":
        block, _ = block_shape(int(at.rows), round(groups))
        weights = model.hidden_size * model.ffn_size // at.sizes["tensor"]
        looped = xla_loops.pay(block, weights, model.compute_dtype, chip.device_kind)
        return (loops if looped else blocks)(at.rows, groups, load.share)
    if chip.torus_axes == 0:
        return GroupCosts(1.0, read, read)
    group = at.rows / groups
    tile = tpu_tiles.tile_rows(chip.device_kind, group)
    return GroupCosts(expected_tile_rows(group / load.share, tile) / (group / load.share), read, read)


def _ends(at: Sizes) -> tuple[Work, ...]:
    """Embedding and output head with the loss."""
    config, n, micro = at.config, at.tokens, at.config.num_microbatches
    model, vocabulary = config.model, config.model.vocab_size / at.sizes["tensor"]
    logits, table = n * vocabulary, model.vocab_size * model.hidden_size
    flops = 6 * n * model.hidden_size * vocabulary * micro
    # Logits are written and read twice in float32; backward, their gradient is computed and used twice in bfloat16.
    moved = logits * (3 * WIDE + WIDE + 3 * at.narrow) + 3 * at.narrow * vocabulary * model.hidden_size
    return (
        Work("output head and loss", flops, flops, moved * micro),
        Work("embedding", 0.0, 0.0, micro * (2 * at.narrow * table + 4 * at.narrow * n * model.hidden_size)),
    )


def _bank_traffic(at: Sizes) -> float:
    _, mixture = forward_passes(at)
    again = 2 / 3 if at.config.model.remat == "experts" else 0
    passes = at.narrow * (mixture + 1 + again)
    costs = [_group_costs(at, load) for load in layer_loads(at.config, at.sizes)]
    moved = sum(cost.reads * passes + cost.sums * 2 * WIDE for cost in costs)
    return at.config.num_microbatches * at.bank * moved
