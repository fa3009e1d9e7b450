"""The language model: embedding, a scan over pools, inside it a scan over the layers that share one, logits.

G = 1 pool is UniPool, G = L pools is the ordinary per-layer mixture, and a pool of one expert per layer without a
router is the dense model: one structure for all of them.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax.typing import ArrayLike

from unipool_jax.config.schema import Config
from unipool_jax.kernels.grouped_ffn import Bank
from unipool_jax.model.attention import Attention, KeyValueCache
from unipool_jax.model.head import Head
from unipool_jax.moe.dispatch import dense_ffn, moe_ffn
from unipool_jax.moe.pool import ExpertPool, gathered_bank, gradient_master
from unipool_jax.moe.routing import Routing, RoutingStats, norm_constant, route, scores
from unipool_jax.parallel.linear import linear, lookup
from unipool_jax.parallel.mesh import GATHERED, active_mesh, constrain

LAYER_AXES: Any = {"params": 0, "forced_routing": 0, "observed_routing": 0}
"""Collections that are stacked over layers. The last two are empty but in analyses, which pass choices in and out."""


def rms_norm(hidden: jax.Array, gain_D: jax.Array, epsilon: float) -> jax.Array:
    """`x / sqrt(mean(x^2) + epsilon) * gain` over the last axis, in float32, returned in the dtype of x."""
    wide = hidden.astype(jnp.float32)
    normed = wide * jax.lax.rsqrt(jnp.mean(jnp.square(wide), axis=-1, keepdims=True) + epsilon)
    return (normed * gain_D).astype(hidden.dtype)


class MixtureBlock(nn.Module):
    """Router of one layer over the bank of its pool: `[B, S, D] -> [B, S, D]`, and the layer's `RoutingStats`.

    `master`, handed on unchanged, holds the parameters behind a bank that layers share: see `moe_ffn`.
    """

    config: Config

    @nn.compact
    def __call__(
        self,
        hidden_BSD: jax.Array,
        bank: Bank,
        master: Bank | None,
        expert_bias_E: jax.Array,
        score_factor_E: jax.Array | None,
    ) -> tuple[jax.Array, Bank | None, RoutingStats]:
        config, moe = self.config, self.config.moe
        batch, length, width = hidden_BSD.shape
        hidden_ND = constrain(hidden_BSD.reshape(-1, width), "batch", None)
        if moe.router == "none":
            output_ND = dense_ffn(hidden_ND, bank)
            return output_ND.reshape(hidden_BSD.shape), master, _no_routing(batch, length)

        num_experts = config.router_width
        init = nn.initializers.normal(config.model.init_std)
        router_ED = self.param("router", init, (num_experts, width), jnp.float32)
        logits_NE = linear(hidden_ND, router_ED, (None, "embed"), transposed=True, wide=True)
        logits_NE = logits_NE.astype(moe.router_dtype)

        scale, constant = None, 1.0
        if moe.router == "norm":
            scale = self.param("scale", nn.initializers.ones, (), jnp.float32)
            if moe.score_constant == "monte_carlo":
                constant = norm_constant(num_experts, moe.top_k)
        scores_NE = scores(logits_NE, moe.router, scale, constant, moe.score_epsilon, config.experts_per_pool)
        routing = route(
            scores_NE,
            logits_NE,
            router=moe.router,
            top_k=moe.top_k,
            num_stat_groups=batch,
            expert_bias_E=expert_bias_E if config.loss.balance == "expert_bias" else None,
            score_factor_E=score_factor_E,
        )
        routing = self.routed(routing, scores_NE)
        output_ND, master, arrived_X = moe_ffn(
            hidden_ND, routing, bank, master, config.kernels.implementation, config.mesh
        )
        return output_ND.reshape(hidden_BSD.shape), master, routing.stats._replace(arrived_X=arrived_X)

    def routed(self, routing: Routing, scores_NE: jax.Array) -> Routing:
        """Where tokens go. A place for analyses to look at or replace choices: see `analysis.observe`."""
        del scores_NE
        return routing


def _no_routing(batch: int, length: int) -> RoutingStats:
    """Statistics of a layer whose one expert takes every token."""
    return RoutingStats(
        counts_AE=jnp.full((batch, 1), length, jnp.int32),
        score_sum_AE=jnp.zeros((batch, 1), jnp.float32),
        z_square_sum_A=jnp.zeros((batch,), jnp.float32),
        arrived_X=jnp.zeros((1,), jnp.int32),
    )


class Layer(nn.Module):
    """One pre-norm transformer layer; the body of the scan over the layers of a pool."""

    config: Config

    @nn.compact
    def __call__(
        self,
        carry: tuple[jax.Array, Bank | None],
        bank: Bank,
        start_B: jax.Array | None,
        expert_bias_E: jax.Array,
        cache: KeyValueCache | None,
        score_factor_E: jax.Array | None,
    ) -> tuple[tuple[jax.Array, Bank | None], tuple[RoutingStats, KeyValueCache | None]]:
        hidden_BSD, master = carry
        model = self.config.model
        ones, width = nn.initializers.ones, (model.hidden_size,)
        attention_gain_D = self.param("attention_norm", ones, width, jnp.float32)
        normed_BSD = rms_norm(hidden_BSD, attention_gain_D, model.norm_epsilon)
        attended_BSD, cache = Attention(model, name="attention")(normed_BSD, cache, start_B)
        hidden_BSD = hidden_BSD + attended_BSD
        ffn_gain_D = self.param("ffn_norm", ones, width, jnp.float32)
        normed_BSD = rms_norm(hidden_BSD, ffn_gain_D, model.norm_epsilon)
        mixture = nn.remat(MixtureBlock, prevent_cse=False) if model.remat == "moe" else MixtureBlock
        output_BSD, master, stats = mixture(self.config, name="mixture")(
            normed_BSD, bank, master, expert_bias_E, score_factor_E
        )
        return (constrain(hidden_BSD + output_BSD, "batch", None, None), master), (stats, cache)


def _gathers_again(config: Config) -> bool:
    """Whether the backward pass gathers the weights of each pool again, instead of keeping them whole."""
    mesh = active_mesh()
    return mesh is not None and mesh.shape["fsdp"] > 1 and config.pool.groups > 1


class PoolStage(nn.Module):
    """The N = L/G layers that share one pool; the body of the scan over pools."""

    config: Config

    @nn.compact
    def __call__(
        self,
        hidden_BSD: jax.Array,
        start_B: jax.Array | None,
        expert_bias_NE: jax.Array,
        cache: KeyValueCache | None,
        master: Bank | None,
        score_factor_NE: jax.Array | None,
    ) -> tuple[jax.Array, tuple[RoutingStats, KeyValueCache | None, Bank | None]]:
        config, model = self.config, self.config.model
        bank = ExpertPool(
            num_experts=config.experts_per_pool,
            hidden_size=model.hidden_size,
            ffn_size=model.ffn_size,
            init_std=model.init_std,
            num_layers=model.num_layers,
            name="bank",
        )()
        routed, given = config.moe.router != "none", master is not None
        if given:
            bank = gathered_bank(bank, model.compute_dtype)
        elif routed and (config.layers_per_pool > 1 or active_mesh() is not None):
            # Gradients reach a shared bank through `master`, which the scan carries, so that backward one float32
            # buffer collects them; closing over the bank would create and add a gradient of full size for every layer.
            # On one device a bank of one layer is closed over: adding its gradient to zeros costs more than writing it.
            master, bank = gradient_master(bank), gathered_bank(bank, model.compute_dtype)
        recomputed = model.remat == "full" and not (_gathers_again(config) and config.layers_per_pool == 1)
        layers = nn.scan(
            nn.remat(Layer, prevent_cse=False) if recomputed else Layer,
            variable_axes=LAYER_AXES,
            split_rngs={"params": True},
            in_axes=(nn.broadcast, nn.broadcast, 0, 0, 0),
            length=config.layers_per_pool,
        )
        carry, by_layer = layers(config, name="layers")(
            (hidden_BSD, master), bank, start_B, expert_bias_NE, cache, score_factor_NE
        )
        return carry[0], (*by_layer, carry[1] if given else None)


class Transformer(nn.Module):
    """Decoder-only language model over one or more expert pools.

    Parameters are float32; per-layer ones are stacked as `[G, L/G, ...]`, the bank as `[G, E, ...]`, so each pool
    exists once in parameters, gradients and optimiser state.
    """

    config: Config

    @nn.compact
    def __call__(
        self,
        tokens_BS: jax.Array,
        expert_bias_GNE: jax.Array,
        cache: KeyValueCache | None = None,
        start_B: jax.Array | None = None,
        master: Bank | None = None,
        score_factor_GNE: jax.Array | None = None,
    ) -> tuple[Head, RoutingStats, KeyValueCache | None, Bank | None]:
        """The output head, routing statistics, and the cache with these tokens in it.

        Args:
          tokens_BS: token ids, int32.
          expert_bias_GNE: selection bias, float32; used when loss.balance is `expert_bias`.
          cache: of the positions before, `[G, L/G, B, T, H, C]`; None: the tokens are all there is.
          start_B: with a cache, the position of each row's first token, int32.
          master: for G = 1, `[1, ...]`, what carries gradients to the bank (which then has none); see `pool`.
          score_factor_GNE: factor on every score, float32, or None: see `route` and `moe.lock`.

        Returns:
          What logits and losses are made of, `RoutingStats` stacked to `[G, L/G, ...]`, the cache, and the masters of
          the pools.
        """
        config, model = self.config, self.config.model
        init = nn.initializers.normal(model.init_std)
        table_shape = (model.vocab_size, model.hidden_size)
        embedding_VD = self.param("embedding", init, table_shape, jnp.float32)
        hidden_BSD = lookup(embedding_VD, tokens_BS, ("vocab", "embed"), model.compute_dtype)
        hidden_BSD = constrain(hidden_BSD, "batch", None, None)

        stage = PoolStage
        if _gathers_again(config):
            # The policy also decides for what is recomputed inside, so a layer that is recomputed whole is so here.
            whole = model.remat == "full" and config.layers_per_pool == 1
            kept = None if whole else jax.checkpoint_policies.save_anything_except_these_names(GATHERED)
            stage = nn.remat(PoolStage, prevent_cse=False, policy=kept)
        pools = nn.scan(
            stage,
            variable_axes=LAYER_AXES,
            split_rngs={"params": True},
            in_axes=(nn.broadcast, 0, 0, 0, 0),
            length=config.pool.groups,
        )
        hidden_BSD, (stats, cache, master) = pools(config, name="pools")(
            hidden_BSD, start_B, expert_bias_GNE, cache, master, score_factor_GNE
        )

        final_gain_D = self.param("final_norm", nn.initializers.ones, (model.hidden_size,), jnp.float32)
        hidden_BSD = rms_norm(hidden_BSD, final_gain_D, model.norm_epsilon)
        output_VD = self.param("output", init, table_shape, jnp.float32)
        # Groups of the Switch loss: a training micro-batch is whole ones (validated), elsewhere they are not used.
        batch, sequences = tokens_BS.shape[0], config.loss.switch_group_sequences
        stats = stats.grouped(batch // sequences if batch % sequences == 0 else 1)
        return Head(hidden_BSD, output_VD), stats, cache, master


def forward(
    config: Config,
    params: Any,
    tokens_BS: ArrayLike,
    expert_bias_GNE: jax.Array,
    score_factor_GNE: jax.Array | None = None,
) -> tuple[jax.Array, RoutingStats]:
    """`Transformer` as a function of its parameters: logits `[B, S, V]` float32 and stacked `RoutingStats`."""
    head, stats, _ = forward_sharing(config, params, tokens_BS, expert_bias_GNE, None, score_factor_GNE)
    return head.logits(), stats


def forward_sharing(
    config: Config,
    params: Any,
    tokens_BS: ArrayLike,
    expert_bias_GNE: jax.Array,
    master: Bank | None,
    score_factor_GNE: jax.Array | None = None,
) -> tuple[Head, RoutingStats, Bank | None]:
    """`forward` up to its logits; a bank that is a constant gets its gradient through `master` `[1, ...]` (one pool).

    Returns:
      The output head, stacked `RoutingStats`, and `master`, for the next micro-batch; None is handed on as None.
    """
    output: Any = Transformer(config).apply(
        {"params": params}, tokens_BS, expert_bias_GNE, master=master, score_factor_GNE=score_factor_GNE
    )
    head, stats, _, master = output
    return head, stats, master


def empty_cache(config: Config, batch_size: int, length: int) -> KeyValueCache:
    """A cache for `length` positions of `batch_size` rows, in the compute dtype."""
    model = config.model
    rows = (config.pool.groups, config.layers_per_pool, batch_size, length)
    zeros = jnp.zeros((*rows, model.num_kv_heads, config.head_size), model.compute_dtype)
    return KeyValueCache(zeros, zeros)


def forward_cached(
    config: Config,
    params: Any,
    tokens_BS: ArrayLike,
    expert_bias_GNE: jax.Array,
    cache: KeyValueCache,
    start_B: jax.Array,
    score_factor_GNE: jax.Array | None = None,
) -> tuple[jax.Array, KeyValueCache]:
    """`forward` for tokens that follow on those in `cache`: the same logits, float32 `[B, S, V]`, and the new cache.

    Row b holds positions `start_B[b] .. start_B[b] + S - 1`, which must lie within the cache; the cache must hold all
    positions before them. Tokens of padding behind a row are harmless if later calls overwrite them in order.
    """
    output: Any = Transformer(config).apply(
        {"params": params}, tokens_BS, expert_bias_GNE, cache, start_B, score_factor_GNE=score_factor_GNE
    )
    head, _, cache, _ = output
    return head.logits(), cache
