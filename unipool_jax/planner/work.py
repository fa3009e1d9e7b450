"""FLOPs, memory traffic and collectives of a training step on one device, counted from the configuration.

Counts follow what the TPU compiler makes of this program; `docs/planner.md` explains each of them.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable
from typing import NamedTuple

import numpy as np

from unipool_jax.config.chips import Topology
from unipool_jax.config.schema import Config
from unipool_jax.kernels import tpu_tiles
from unipool_jax.kernels.group_plan import block_shape
from unipool_jax.kernels.implementations import Implementation
from unipool_jax.kernels.tpu_layouts import halved_on
from unipool_jax.moe.bank import exchanges_into_stacks, keeps_products
from unipool_jax.moe.capacity import capacity
from unipool_jax.moe.dispatch import Transport, chosen_transport
from unipool_jax.parallel.head import CHUNK
from unipool_jax.planner.attention import (
    WIDE,
    AttentionCost,
    attention_cost,
    fused,
    narrow,
    padding,
    recomputes_product,
)
from unipool_jax.planner.kernel_work import (
    BANK_GRADIENTS,
    ExpertShapes,
    KernelWork,
    attention_kernels,
    expert_backward,
    expert_forward,
)
from unipool_jax.planner.messages import Message, Tokens, exchanged
from unipool_jax.planner.windows import LayerLoad, layer_loads
from unipool_jax.training.step import counts_before_gradient, shares_one_bank


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


@dataclasses.dataclass(frozen=True)
class _Sizes:
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
    def transport(self) -> Transport:
        """How tokens reach their experts."""
        chip, devices = self.topology.chip, self.topology.num_devices
        platform = "tpu" if chip.torus_axes else "gpu"
        return chosen_transport(self.config.mesh, self.sizes["expert"], platform, chip.device_kind, devices)

    @property
    def exchanges_into_stacks(self) -> bool:
        """Whether layers receive rows into an array of them all: see `moe.bank.kept_products`."""
        config, model, chip = self.config, self.config.model, self.topology.chip
        kernels: Implementation = (
            "pallas_tpu" if self.topology.is_tpu and config.kernels.implementation in ("auto", "pallas_tpu") else "xla"
        )
        return (
            keeps_products(config, kernels, math.prod(self.sizes.values()) > 1)
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


def _passes(at: _Sizes) -> tuple[int, int]:
    """Forward passes per micro-batch of a layer without its attention and mixture blocks, and of its mixture block.

    One for the forward pass, one for counting tokens before the gradient, one for rematerialization.
    """
    counting = int(counts_before_gradient(at.config))
    remat = at.config.model.remat
    layer = 1 + counting + (remat == "full")
    return layer, layer + (remat == "moe")


def count(config: Config, sizes: dict[str, int], topology: Topology) -> Counts:
    """Count a step of `config` on a mesh of these axis sizes."""
    at = _Sizes(config, sizes, topology)
    parameters, bank_parameters = _parameters(at)
    return Counts(
        (*_layers(at), *_ends(at), Work("optimiser", 0.0, 0.0, (parameters + bank_parameters) * 8 * WIDE)),
        tuple(message for message in _messages(at) if message.sent_bytes),
        (parameters + bank_parameters) * 3 * WIDE,
        _temporaries(at, parameters),
        _evaluation(at),
        _bank_traffic(at),
        float(np.mean([load.busiest for load in layer_loads(config, sizes)])),
    )


def _parameters(at: _Sizes) -> tuple[float, float]:
    """Parameters per device outside and inside the pools, without vectors."""
    config, sizes, model = at.config, at.sizes, at.config.model
    experts = 1 if config.moe.router == "none" else sizes["expert"]
    matrices: float = 2 * model.vocab_size * model.hidden_size
    matrices += model.num_layers * (at.attention_weights + at.block_weights)
    rows = 0 if config.moe.router == "none" else config.router_width + config.moe.shared_expert_gate
    routers = config.mixture_layers * rows * model.hidden_size
    bank = 3 * model.hidden_size * model.ffn_size * config.total_experts
    split = sizes["fsdp"] * sizes["tensor"]
    return matrices / split + routers / sizes["fsdp"], bank / (split * experts)


def _layers(at: _Sizes) -> tuple[Work, ...]:
    config, tensor, n = at.config, at.sizes["tensor"], at.tokens
    model, width, micro = config.model, config.model.hidden_size, config.num_microbatches
    forward, mixture = _passes(at)
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
        work.append(Work("stacks of layers", 0.0, 0.0, 4 * _kept(at)))
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
        # Rows are sorted, sent, received and combined. Receive buffers are cleared first, but where layers receive into
        # an array of them all, neither that nor the buffer of its gradients.
        buffer = at.received if at.sizes["expert"] > 1 else 0
        cleared = mixture + 1 - 2 * at.exchanges_into_stacks
        moved = at.narrow * width * (8 * at.sent * (mixture + 1) + buffer * (mixture + 1 + cleared))
        mixtures.append(Work("dispatch", 0.0, 0.0, moved))
    mixtures.extend(_expert_work(at, mixture))
    return (*_times(work, model.num_layers * micro), *_times(mixtures, config.mixture_layers * micro))


def _times(work: Iterable[Work], times: int) -> tuple[Work, ...]:
    return tuple(item._replace(**{f: getattr(item, f) * times for f in Work._fields[1:]}) for item in work)


def _expert_work(at: _Sizes, passes: int) -> tuple[Work, Work]:
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


def _expert_work_of(at: _Sizes, passes: int, load: LayerLoad) -> tuple[Work, Work]:
    shapes, padded = _expert_shapes(at, load), _tile_padding(at, load)
    forward = [*expert_forward(shapes).values()]
    *others, bank_gradient = expert_backward(shapes).values()
    backward = [*others, *(bank_gradient,) * BANK_GRADIENTS]
    if at.config.model.remat == "experts":
        backward.append(forward[0])
    first, second = (sum(kernel.flops for kernel in kernels) for kernels in (forward, backward))
    moved = sum(kernel.bytes for kernel in forward)
    return (
        Work("experts forward", first * padded * passes, first * passes, moved * passes),
        Work("experts backward", second * padded, second, sum(kernel.bytes for kernel in backward)),
    )


def _expert_shapes(at: _Sizes, load: LayerLoad) -> ExpertShapes:
    model, tensor = at.config.model, at.sizes["tensor"]
    # Experts without rows are not read.
    matrix = at.bank / 3 * load.share * load.busiest
    rows = at.rows * load.busiest
    inner = rows if at.topology.is_tpu and at.config.kernels.implementation != "xla" else at.received
    return ExpertShapes(rows, at.received, inner, model.hidden_size, model.ffn_size / tensor, matrix, at.narrow)


def kernel_work(config: Config, sizes: dict[str, int], topology: Topology) -> dict[str, KernelWork]:
    """One call of each hand-written kernel, by the beginning of its name, with padding; the mean of layers."""
    at = _Sizes(config, sizes, topology)
    found: dict[str, KernelWork] = {}
    if config.moe.router != "none":
        loads = layer_loads(config, sizes)
        for load in loads:
            shapes, padded = _expert_shapes(at, load), _tile_padding(at, load)
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


def _tile_padding(at: _Sizes, load: LayerLoad) -> float:
    """Computed rows over real rows: groups are divided into tiles, of which the last is not full."""
    config = at.config
    if config.moe.router == "none":
        return 1.0
    group = at.rows * at.sizes["expert"] / config.experts_per_pool
    if config.kernels.implementation == "xla":
        return expected_block_rows(at.rows, at.rows / group, group / load.share) / group
    if at.topology.chip.torus_axes == 0:
        return 1.0
    tile = tpu_tiles.tile_rows(at.topology.chip.device_kind, group)
    return expected_tile_rows(group / load.share, tile) / (group / load.share)


def expected_tile_rows(group: float, tile: int) -> float:
    """Mean number of tile rows for a group with a mean of `group` rows, under uniform random routing.

    The first tile starts at the block of 16 rows in which its group starts, on average 7.5 rows earlier.
    """
    spread = math.sqrt(group)
    sizes = group + spread * np.linspace(-4, 4, 401)
    weights = np.exp(-0.5 * np.linspace(-4, 4, 401) ** 2)
    tiles = np.ceil((np.maximum(sizes, 1) + (tpu_tiles.ROW_ALIGNMENT - 1) / 2) / tile)
    return float(np.sum(tiles * weights) / np.sum(weights) * tile)


def expected_block_rows(rows: float, groups: float, group: float) -> float:
    """Mean rows that plain XLA computes for one of `groups` groups, of which those with rows have `group` on average.

    Every group has a block of the same rows, and what does not fit goes through tiles; uniform random routing.
    """
    block, tile = block_shape(int(rows), round(groups))
    deviations = np.linspace(-4, 4, 401)
    weights = np.exp(-0.5 * deviations**2)
    tiles = np.ceil(np.maximum(group + math.sqrt(group) * deviations - block, 0) / tile)
    return block + float(np.sum(tiles * weights) / np.sum(weights) * tile) * min(1.0, rows / (groups * group))


def _ends(at: _Sizes) -> tuple[Work, ...]:
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


def _bank_traffic(at: _Sizes) -> float:
    _, mixture = _passes(at)
    read = sum(load.share * load.busiest for load in layer_loads(at.config, at.sizes))
    again = 2 / 3 if at.config.model.remat == "experts" else 0
    return at.config.num_microbatches * read * at.bank * (at.narrow * (mixture + 1 + again) + 2 * WIDE)


def _messages(at: _Sizes) -> list[Message]:
    config, sizes, model = at.config, at.sizes, at.config.model
    micro, layers, mixtures = config.num_microbatches, config.model.num_layers, config.mixture_layers
    counting = int(counts_before_gradient(config))
    forward, mixture = _passes(at)
    shared = shares_one_bank(config)
    fsdp = _other(sizes, "fsdp")
    replicas = ("data", "fsdp", "expert") if config.moe.router == "none" else ("data",)
    # Several pools are gathered in the forward pass of every micro-batch, and again in the backward pass unless kept.
    gathers = 1 if shared else config.pool.groups * micro * (1 + counting + (model.remat != "none"))
    sums = 1 if shared else config.pool.groups * micro
    dense = at.attention_weights / sizes["tensor"] * at.narrow
    rows = 0 if config.moe.router == "none" else config.experts_per_pool
    routers = rows * model.hidden_size * at.narrow * mixtures / layers
    blocks = at.block_weights / sizes["tensor"] * at.narrow
    head = model.vocab_size * model.hidden_size * at.narrow
    tables = head + head / sizes["tensor"]
    again = 2 if model.remat == "full" or (model.remat != "none" and config.pool.groups > 1) else 1
    found = [
        Message("experts, gathered", "all-gather", ("fsdp",), gathers, at.narrow * at.bank * fsdp),
        Message("experts, gradient scattered", "reduce-scatter", ("fsdp",), sums, WIDE * at.bank * fsdp),
        Message(
            "experts, gradient summed",
            "all-reduce",
            replicas,
            sums,
            2 * WIDE * at.bank / sizes["fsdp"] * _other(sizes, *replicas),
        ),
        Message(
            "layers, gathered", "all-gather", ("fsdp",), layers * micro * (again + counting), (dense + routers) * fsdp
        ),
        *_reduced("layers", layers * micro, layers * micro, (dense + routers) / at.narrow, sizes),
        # A part of the mixture block, which remat=moe computes again.
        Message(
            "blocks of every token, gathered",
            "all-gather",
            ("fsdp",),
            layers * micro * (max(again, 1 + (model.remat == "moe")) + counting),
            blocks * fsdp,
        ),
        *_reduced("blocks of every token", layers * micro, layers * micro, blocks / at.narrow, sizes),
        Message("tables, gathered", "all-gather", ("fsdp",), micro, tables * fsdp),
        # The compiler hoists reductions of gradients that accumulate over micro-batches out of their loop, unless
        # another loop lies in between.
        *_reduced("tables", micro, 1, tables / at.narrow, sizes),
    ]
    if model.remat == "router" and again == 1:
        found.append(Message("routers, gathered again", "all-gather", ("fsdp",), layers * micro, routers * fsdp))
    if model.remat == "attention" and again == 1:
        found.append(Message("attention, gathered again", "all-gather", ("fsdp",), layers * micro, dense * fsdp))
    if config.moe.router != "none":
        outputs = at.narrow if config.moe.top_k == 1 else WIDE
        found += exchanged(
            Tokens(
                at.transport,
                sizes["expert"],
                config.mesh.expert_nodes,
                at.tokens,
                config.moe.top_k,
                model.hidden_size * at.narrow,
                model.hidden_size * outputs,
                mixtures * micro,
                mixture,
                counting,
            )
        )
    if sizes["tensor"] > 1:
        found += _tensor_sums(at, forward, mixture)
    return found


def _tensor_sums(at: _Sizes, forward: int, mixture: int) -> list[Message]:
    """Sums of outputs over a tensor group, and of gradients of inputs, with so many passes over layers and mixtures."""
    config, layers, mixtures = at.config, at.config.model.num_layers, at.config.mixture_layers
    micro, values = config.num_microbatches, 2 * config.model.hidden_size * at.narrow * _other(at.sizes, "tensor")
    always_on = mixtures if config.moe.shared_experts else 0
    times, found = (2 * layers + always_on) * (forward + 1), []
    if config.norms_experts:
        # A norm needs the sums: of each expert of a token, and again where a mixture is recomputed.
        times += always_on * (mixture - forward) - mixtures * (forward + 1)
        again = mixtures * (mixture + 1) * micro
        found.append(Message("outputs of experts, summed", "all-reduce", ("tensor",), again, values * at.received))
    return [*found, Message("tensor sums", "all-reduce", ("tensor",), times * micro, values * at.tokens)]


def _reduced(name: str, scattered: int, summed: int, weights: float, sizes: dict[str, int]) -> list[Message]:
    """Messages of a float32 matrix gradient: reduce-scattered over fsdp, the shards all-reduced over other devices."""
    part, others = WIDE * weights / sizes["fsdp"], ("data", "expert")
    return [
        Message(
            f"{name}, gradient scattered",
            "reduce-scatter",
            ("fsdp",),
            scattered,
            WIDE * weights * _other(sizes, "fsdp"),
        ),
        Message(f"{name}, gradient summed", "all-reduce", others, summed, 2 * part * _other(sizes, *others)),
    ]


def _other(sizes: dict[str, int], *axes: str) -> float:
    """(n - 1) / n for the n devices of a group: the fraction that are other devices."""
    devices = math.prod(sizes[axis] for axis in axes)
    return (devices - 1) / devices


def _kept(at: _Sizes) -> float:
    """Bytes of a layer that the backward pass finds as the forward pass left them."""
    model, tensor, hidden = at.config.model, at.sizes["tensor"], at.tokens * at.config.model.hidden_size * at.narrow
    if model.remat == "full":
        return hidden
    # Of attention the backward pass needs its input, queries, keys, values and result.
    heads = (2 * model.num_heads + 2 * model.num_kv_heads) * at.config.head_size / tensor
    scores = at.attention().kept_bytes
    if model.remat == "moe":
        return 8 * hidden + scores
    # Rows as they came and as they went, and two products of each; with several nodes the rows of all of them.
    rows, products = (
        (2 * at.received + at.sent - at.rows) * model.hidden_size,
        2 * at.received * model.ffn_size / tensor,
    )
    kept = rows + (0 if model.remat == "experts" else products) + 2 * at.tokens * at.block_width / tensor
    attention = 0 if model.remat == "attention" else scores
    less = at.tokens * heads * at.narrow if model.remat == "attention" else 0
    if model.remat == "router" and at.config.moe.router != "none":
        # Five arrays of logits and scores, and masks: of what is positive, visible and chosen in each slot.
        less = at.tokens * at.config.experts_per_pool * (5 * WIDE + 2 + at.config.moe.top_k)
    return 10 * hidden + attention - less + kept * at.narrow


def _temporaries(at: _Sizes, parameters: float) -> float:
    config, sizes, model, n = at.config, at.sizes, at.config.model, at.tokens
    shared = shares_one_bank(config)
    pools = 1 if shared else config.pool.groups
    _, bank_parameters = _parameters(at)
    # The gathered bank and its float32 gradient, not sharded over fsdp; of per-layer pools one at a time, plus the
    # sharded gradient of all.
    gathered = (at.narrow + WIDE) * at.bank * (pools if sizes["fsdp"] == 1 or model.remat == "none" else 1)
    gradient = WIDE * (bank_parameters if not shared and sizes["fsdp"] > 1 else 0)
    dense = WIDE * parameters * (1 if config.num_microbatches == 1 else 2)
    tables = 2 * at.narrow * model.vocab_size * model.hidden_size
    hidden = n * model.hidden_size * at.narrow
    scores = at.attention()
    mixture = at.received * (model.ffn_size / sizes["tensor"] * 8 + model.hidden_size * 4) * at.narrow
    mixture += 2 * (at.sent - at.rows) * model.hidden_size * at.narrow
    mixture += 8 * n * at.block_width / sizes["tensor"] * at.narrow
    working = 10 * hidden + scores.working_bytes + mixture
    # One device makes them in chunks.
    rows = n if math.prod(sizes.values()) > 1 else min(n, CHUNK)
    logits = rows * model.vocab_size / sizes["tensor"] * (WIDE + at.narrow)
    return gathered + gradient + dense + tables + model.num_layers * _kept(at) + max(working, logits)


def _evaluation(at: _Sizes) -> float:
    """Gathered bfloat16 weights and the temporaries of one layer; receive buffers hold every row."""
    config, sizes, model = at.config, at.sizes, at.config.model
    batches = dataclasses.replace(config.train, microbatch_size=config.train.eval_batch_size)
    mesh = dataclasses.replace(config.mesh, capacity_factor=math.inf)
    at = dataclasses.replace(at, config=dataclasses.replace(config, train=batches, mesh=mesh))
    hidden = at.tokens * model.hidden_size * at.narrow
    rows = at.received * (model.ffn_size / sizes["tensor"] + 2 * model.hidden_size) * at.narrow
    rows += (2 * (at.sent - at.rows) * model.hidden_size + at.tokens * at.block_width / sizes["tensor"]) * at.narrow
    tables = 2 * at.narrow * model.vocab_size * model.hidden_size
    gathered = at.narrow * at.bank * (config.pool.groups if sizes["fsdp"] == 1 else 1)
    return gathered + tables + 6 * hidden + max(rows, at.attention().evaluation_bytes)
