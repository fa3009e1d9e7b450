"""Forward passes that let the choices of every token out, and other choices in.

The model calls `MixtureBlock.routed` between choosing experts and visiting them. Here that method is intercepted: what
it is given is recorded in the collection `observed_routing`, and replaced where the collection `forced_routing` says.
Both are stacked over layers like parameters, so a pass is a pure function of its inputs.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from unipool_jax.config.schema import Config
from unipool_jax.data.pipeline import Batch
from unipool_jax.model.transformer import MixtureBlock, Transformer
from unipool_jax.moe.lock import score_factors
from unipool_jax.moe.routing import Routing, route
from unipool_jax.training.step import BalanceState

FORCED, OBSERVED = "forced_routing", "observed_routing"


class Forced(NamedTuple):
    """Choices that take the place of a model's own."""

    experts_LNK: jax.Array
    """Experts of the layer's pool, int32; -1 leaves the choice of that layer, token and slot as it is."""
    own_gates: jax.Array
    """Bool scalar: gates of forced experts are their own scores (True), or the gates of the experts that they replace,
    slot by slot (False). See spec J20."""


class Observed(NamedTuple):
    """What a pass saw."""

    loss_BS: jax.Array
    """Cross-entropy of each position in nats, float32; zero for padding."""
    experts_LNK: jax.Array
    """Experts that tokens visited, indices within the layer's pool, int32."""


ObservedStep = Callable[[Any, BalanceState, Batch, Forced | None], Observed]


@functools.lru_cache(maxsize=4)
def make_observed_step(config: Config) -> ObservedStep:
    """The jitted pass `(params, balance, batch, forced) -> Observed` of a model with routers; changes no state.

    Asked again for the same configuration, it gives the same function, which has compiled its programs already.
    """
    layers = (config.pool.groups, config.layers_per_pool)

    def by_layer(**values: jax.Array) -> dict[str, Any]:
        stacked = {name: value.reshape(*layers, *value.shape[1:]) for name, value in values.items()}
        return {"pools": {"layers": {"mixture": stacked}}}

    def intercept(following: Callable[..., Any], args: Any, kwargs: Any, context: nn.module.InterceptorContext) -> Any:
        block = context.module
        if not isinstance(block, MixtureBlock) or context.method_name != "routed":
            return following(*args, **kwargs)
        routing, scores_NE = args
        if block.has_variable(FORCED, "experts"):
            experts_NK: jax.Array = block.get_variable(FORCED, "experts")
            own: jax.Array = block.get_variable(FORCED, "own_gates")
            routing = replaced(routing, scores_NE, experts_NK, own, config)
        block.sow(OBSERVED, "experts", routing.experts_NK)
        return routing

    @jax.jit
    def step(params: Any, balance: BalanceState, batch: Batch, forced: Forced | None) -> Observed:
        variables = {"params": params}
        if forced is not None:
            own_L = jnp.broadcast_to(forced.own_gates, forced.experts_LNK.shape[:1])
            variables[FORCED] = by_layer(experts=forced.experts_LNK, own_gates=own_L)
        with nn.intercept_methods(intercept):
            output: Any = Transformer(config).apply(
                variables,
                batch.inputs,
                balance.expert_bias_GNE,
                score_factor_GNE=score_factors(config, balance.lock),
                mutable=[OBSERVED],
            )
        (head, *_), observed = output
        (experts,) = observed[OBSERVED]["pools"]["layers"]["mixture"]["experts"]
        losses_BS = head.token_losses(batch.targets) * batch.weights
        return Observed(losses_BS, experts.reshape(config.model.num_layers, *experts.shape[2:]))

    return step


def replaced(
    routing: Routing, scores_NE: jax.Array, experts_NK: jax.Array, own_gates: jax.Array, config: Config
) -> Routing:
    """`routing` with the experts of `experts_NK` where those are not -1, and gates as `Forced` describes.

    Own gates follow the rule of the router (spec J9): the score, over the sum of the chosen scores for sigmoid, k > 1.
    While a lock fades experts out, own gates are the scores before the fade.
    """
    chosen_NK = jnp.where(experts_NK >= 0, experts_NK, routing.experts_NK)
    router = config.moe.router
    assert router != "none"
    # The router itself, asked about the scores of the forced experts only, in their order.
    own_NK = jnp.take_along_axis(scores_NE, chosen_NK, axis=1)
    own = route(own_NK, own_NK, router=router, top_k=config.moe.top_k)
    rank_NK = jnp.argsort(own.experts_NK, axis=1)
    gates_NK = jnp.take_along_axis(own.gates_NK, rank_NK, axis=1)
    use_own_NK = (experts_NK >= 0) & own_gates
    return routing._replace(experts_NK=chosen_NK, gates_NK=jnp.where(use_own_NK, gates_NK, routing.gates_NK))


def text_positions(batch: Batch) -> np.ndarray:
    """Which of the `B S` positions hold text, bool `[N]`: padding is routed too, and counts nowhere."""
    return np.asarray(batch.weights).reshape(-1) > 0
