"""One mixture layer: route tokens, dispatch them to their experts, compute, combine."""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax.typing import ArrayLike

from unipool_jax.config.schema import Config, MeshConfig
from unipool_jax.kernels.group_plan import make_group_plan
from unipool_jax.kernels.grouped_ffn import Bank, Products, accumulating_ffn, grouped_ffn, stacking_ffn
from unipool_jax.kernels.implementations import Implementation
from unipool_jax.kernels.norms import post_norm
from unipool_jax.kernels.recompute import handed_back, recompute
from unipool_jax.moe.bank import BANK_AXES, Experts
from unipool_jax.moe.capacity import capacity
from unipool_jax.moe.dispatch import COMBINE, DISPATCH, dispatch_ragged_into, transport_for
from unipool_jax.moe.overlap import tied
from unipool_jax.moe.products import PRODUCT_AXES, scratch_products
from unipool_jax.moe.routing import Forced, Routing, RoutingStats, replaced, route, score_constant, scores
from unipool_jax.moe.shared_experts import SharedWeights, always_on
from unipool_jax.moe.swiglu import SwiGLUWeights, swiglu
from unipool_jax.moe.visibility import Window, spread
from unipool_jax.parallel.linear import linear
from unipool_jax.parallel.mesh import active_mesh, constrain, gathered_axes, spec


class RouterWeights(NamedTuple):
    """Parameters of the router of one layer."""

    router_ED: jax.Array
    """One row per expert that the layer sees, float32; with windows as many as the widest has."""
    scale: jax.Array | None
    """NormRouter's learnable scale, float32 scalar; None for other routers."""


class RouterParameters(nn.Module):
    """Creates `RouterWeights`."""

    config: Config

    @nn.compact
    def __call__(self) -> RouterWeights:
        init = nn.initializers.normal(self.config.model.init_std)
        shape = (self.config.router_width, self.config.model.hidden_size)
        router_ED = self.param("router", init, shape, jnp.float32)
        if self.config.moe.router != "norm":
            return RouterWeights(router_ED, None)
        return RouterWeights(router_ED, self.param("scale", nn.initializers.ones, (), jnp.float32))


class Selection(NamedTuple):
    """What takes part in a layer's choice of experts besides its scores."""

    expert_bias_E: jax.Array
    """Selection bias, float32; used when loss.balance is `expert_bias`."""
    score_factor_E: jax.Array | None = None
    """Factor on every score, float32: see `routing.route` and `moe.lock`."""
    forced: Forced | None = None
    """Choices that replace the layer's own, for analyses."""
    window: Window | None = None
    """The experts that the layer sees, which the model fills in; None: all."""


class Visits(NamedTuple):
    """Which experts the tokens of a layer visited, and with what."""

    experts_NK: jax.Array
    """Experts of the layer's pool, int32."""
    gates_NK: jax.Array
    """Factors on their outputs, float32."""
    hidden_ND: jax.Array
    """What they were given, in the compute dtype."""


class MixtureOutput(NamedTuple):
    """What a mixture layer returns."""

    hidden_BSD: jax.Array
    experts: Experts
    """For the next layer of the pool."""
    stats: RoutingStats
    visits: Visits | None
    """None in the dense model."""


def mixture(
    config: Config,
    hidden_BSD: jax.Array,
    weights: RouterWeights | None,
    shared: SharedWeights | None,
    selection: Selection,
    experts: Experts,
    counted_BS: jax.Array | None = None,
    post_norm_D: jax.Array | None = None,
    *,
    in_scratch: bool = False,
) -> MixtureOutput:
    """Route every token of a layer and add up its experts' outputs; statistics are per sequence, A = B.

    Args:
      config: of the model.
      hidden_BSD: normed hidden states in the compute dtype.
      weights: the layer's router; None in the dense model.
      shared: the layer's always-on experts; None where it has none.
      selection: bias, factors and forced choices of the layer.
      experts: of the layer's pool.
      counted_BS: which positions the statistics are about, bool; None is all of them.
      post_norm_D: gain of the layer's norm behind this block, of what model.post_norm_experts says; None without one.
      in_scratch: whether products and received rows are written to arrays of this layer alone, where that saves copies:
        for a mixture of which the backward pass keeps nothing.
    """
    epsilon = config.model.post_norm_epsilon
    batch, length, width = hidden_BSD.shape
    hidden_ND = constrain(hidden_BSD.reshape(-1, width), "batch", None)
    if weights is None:
        output_ND = post_norm(dense_ffn(hidden_ND, experts.weights), post_norm_D, epsilon)
        stats = _dense_stats(batch, length, counted_BS)
        return MixtureOutput(output_ND.reshape(hidden_BSD.shape), experts, stats, None)
    routed = functools.partial(_routed, config, batch)
    taken = recompute(routed) if config.model.remat == "router" else routed
    routing = taken(hidden_ND, weights, selection, counted_BS)
    # Behind the gates the norm would take their magnitude away: of a token with one expert, all that the loss could
    # teach the router.
    each_D, sum_D = (None, post_norm_D) if config.model.post_norm_experts == "post" else (post_norm_D, None)
    scratch = scratch_products(config) if in_scratch and experts.accumulator is not None else None
    output_ND, passed_on, received_X = moe_ffn(
        hidden_ND,
        routing,
        experts if scratch is None else experts._replace(products=scratch, place=jnp.zeros((), jnp.int32)),
        config.kernels.implementation,
        config.mesh,
        each_D,
        epsilon,
        keep_products=config.model.remat != "experts",
    )
    if scratch is not None:
        output_ND = handed_back(output_ND, passed_on.products)
        passed_on = passed_on._replace(products=None, place=None)
    if shared is not None:
        output_ND = output_ND + always_on(hidden_ND, shared, each_D, epsilon)
    output_ND = post_norm(output_ND, sum_D, epsilon)
    stats = routing.stats._replace(received_X=received_X)
    visits = Visits(routing.experts_NK, routing.gates_NK, hidden_ND)
    return MixtureOutput(output_ND.reshape(hidden_BSD.shape), passed_on, stats, visits)


def _routed(
    config: Config,
    batch: int,
    hidden_ND: jax.Array,
    weights: RouterWeights,
    selection: Selection,
    counted_BS: jax.Array | None,
) -> Routing:
    """Experts and gates of every token of `batch` sequences. Other arguments: `mixture`."""
    moe, window = config.moe, selection.window
    assert moe.router != "none"
    if window is None:
        router_ED, visible_E = weights.router_ED, None
        constant: ArrayLike = score_constant(moe.router, moe.score_constant, config.router_width, moe.top_k)
    else:
        router_ED, visible_E, constant = spread(weights.router_ED, window), window.visible_E, window.constant
    logits_NE = linear(hidden_ND, router_ED, (None, "embed"), transposed=True, wide=True).astype(moe.router_dtype)
    own, centered = config.experts_per_pool, moe.score_centering
    scores_NE = scores(logits_NE, moe.router, weights.scale, constant, moe.score_epsilon, own, visible_E, centered)
    routing = route(
        scores_NE,
        logits_NE,
        router=moe.router,
        top_k=moe.top_k,
        num_stat_groups=batch,
        expert_bias_E=selection.expert_bias_E if config.loss.balance == "expert_bias" else None,
        score_factor_E=selection.score_factor_E,
        visible_E=visible_E,
        counted_N=None if counted_BS is None else constrain(counted_BS.reshape(-1), "batch"),
        normalized=config.loss.pool_scores == "normalized",
    )
    return routing if selection.forced is None else replaced(routing, scores_NE, selection.forced, moe.router)


def moe_ffn(
    hidden_ND: jax.Array,
    routing: Routing,
    experts: Experts,
    implementation: Implementation = "auto",
    mesh_config: MeshConfig | None = None,
    post_norm_D: jax.Array | None = None,
    post_norm_epsilon: float = 1e-8,
    keep_products: bool = True,
) -> tuple[jax.Array, Experts, jax.Array]:
    """Sum over each token's k experts of gate times expert output.

    Over a mesh, tokens are split over the batch axes and experts over the expert axis; tokens travel (see `dispatch`),
    and expert width is split over the tensor axis. An expert with no token, or with all of them, is legal.

    Args:
      hidden_ND: router input.
      routing: experts and gates of each token.
      experts: weights in the dtype of `hidden_ND` and an accumulator (over a mesh always), or float32 parameters.
      implementation: see `kernels.implementations`.
      mesh_config: transport and capacity factor; None is the default.
      post_norm_D: gain of an RMSNorm of each expert's output, before its gate; None: there is none.
      post_norm_epsilon: of that norm.
      keep_products: whether the backward pass finds the gate and up products of the experts: see `grouped_ffn`.

    Returns:
      `[N, D]` in the dtype of `hidden_ND`; the experts for the next layer; and the rows received by each device for its
      experts, int32, one number for each part of the batch. Rows beyond the `capacity` got no output.

    Raises:
      ValueError: for experts without an accumulator over a mesh.
    """
    mesh = active_mesh()
    on_device = functools.partial(
        _on_device,
        implementation=implementation,
        config=mesh_config or MeshConfig(),
        epsilon=post_norm_epsilon,
        keep_products=keep_products,
    )
    accumulator, products = experts.accumulator, experts.products
    if mesh is not None:
        if accumulator is None:
            raise ValueError("over a mesh the experts need an accumulator: see bank.pool_experts")
        if mesh.shape["expert"] > 1 and (products is None or products.rows_LR2H is None):
            hidden_ND, accumulator = tied(hidden_ND, accumulator)
        tokens = spec("batch")
        weights = Bank._make(spec(*gathered_axes(axes)) for axes in BANK_AXES.values())
        replicas = Bank._make(spec("replica", *gathered_axes(axes)) for axes in BANK_AXES.values())
        stacks: Any = spec() if products is None else Products._make(spec(*axes) for axes in PRODUCT_AXES)
        on_device = jax.shard_map(
            on_device,
            mesh=mesh,
            in_specs=(tokens, tokens, tokens, weights, replicas, stacks, spec(), spec(None)),
            out_specs=(tokens, replicas, stacks, tokens),
        )
    operands = (hidden_ND, routing.experts_NK, routing.gates_NK, experts.weights)
    output_ND, accumulator, products, received_X = on_device(
        *operands, accumulator, products, experts.place, post_norm_D
    )
    return output_ND, experts._replace(accumulator=accumulator, products=products), received_X


def _on_device(
    hidden_ND: jax.Array,
    experts_NK: jax.Array,
    gates_NK: jax.Array,
    weights: Bank,
    accumulator: Bank | None,
    products: Products | None,
    place: jax.Array | None,
    post_norm_D: jax.Array | None,
    *,
    implementation: Implementation,
    config: MeshConfig,
    epsilon: float,
    keep_products: bool,
) -> tuple[jax.Array, Bank | None, Products | None, jax.Array]:
    """`moe_ffn` on one device: its tokens, its experts, its replica of the accumulator, and its products."""
    mesh = active_mesh()
    devices = 1 if mesh is None else mesh.shape["expert"]
    transport = transport_for(config, devices)
    nodes, rows = config.expert_nodes, capacity(experts_NK.size, devices, config.capacity_factor)
    replica = accumulator
    if accumulator is not None and mesh is not None:
        replica = Bank(*(array[0] for array in accumulator))
    own = None if products is None else jax.tree.map(lambda array: array[0], products)
    num_experts = weights.gate_EDF.shape[0] * devices
    if own is None or own.rows_LR2H is None:
        dispatched = DISPATCH[transport](hidden_ND, experts_NK, num_experts, rows, nodes)
    else:
        assert place is not None
        assert replica is not None
        dispatched, stack_LR2H, replica = dispatch_ragged_into(
            hidden_ND, experts_NK, num_experts, own.rows_LR2H, place, replica
        )
        own = own._replace(rows_LR2H=stack_LR2H)
    # A receive buffer is larger than what is received on average, which is what this device sends.
    plan = make_group_plan(
        dispatched.sizes_E, dispatched.rows_RD.shape[0], implementation=implementation, expected_rows=experts_NK.size
    )
    if replica is None:
        expert_RD = grouped_ffn(dispatched.rows_RD, weights, plan, keep_products)
    elif own is None:
        expert_RD, replica = accumulating_ffn(dispatched.rows_RD, weights, replica, plan, keep_products)
    else:
        assert place is not None
        expert_RD, replica, own = stacking_ffn(dispatched.rows_RD, weights, replica, own, place, plan)
        products = jax.tree.map(lambda array: array[None], own)
    accumulator = replica
    if replica is not None and mesh is not None:
        accumulator = Bank(*(array[None] for array in replica))
    if mesh is not None and post_norm_D is not None:
        # A norm needs outputs, not the parts of them that the devices of a tensor group have.
        expert_RD = jax.lax.psum(expert_RD, "tensor")
    expert_RD = post_norm(expert_RD, post_norm_D, epsilon)
    output_ND = COMBINE[transport](expert_RD, dispatched, gates_NK, hidden_ND.dtype, nodes)
    if mesh is not None and post_norm_D is None:
        output_ND = jax.lax.psum(output_ND, "tensor")
    return output_ND, accumulator, products, dispatched.received[None]


def _dense_stats(batch: int, length: int, counted_BS: jax.Array | None) -> RoutingStats:
    """Statistics of a layer whose one expert takes every token."""
    counts_B1 = jnp.full((batch, 1), length, jnp.int32)
    if counted_BS is not None:
        counts_B1 = jnp.sum(counted_BS, axis=1, keepdims=True, dtype=jnp.int32)
    return RoutingStats(
        counts_AE=counts_B1,
        score_sum_AE=jnp.zeros((batch, 1), jnp.float32),
        z_square_sum_A=jnp.zeros((batch,), jnp.float32),
        zero_gates_A=jnp.zeros((batch,), jnp.int32),
        received_X=jnp.zeros((1,), jnp.int32),
    )


def dense_ffn(hidden_ND: jax.Array, bank: Bank) -> jax.Array:
    """The feed-forward block of the dense model: a bank of one expert that every token visits, `[N, D]`."""
    return swiglu(hidden_ND, SwiGLUWeights(*(weights[0] for weights in bank)))
