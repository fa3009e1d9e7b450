"""The language model: embedding, a scan over pools, inside it a scan over the layers that share one, output head.

With moe.dense_layers a scan over layers without a pool comes first.

G = 1 pool is UniPool, G = L pools is the ordinary per-layer mixture, and a pool of one expert per layer without a
router is the dense model: one structure for all of them.

The modules below create parameters and scan; the mathematics are plain functions of arrays: `layer` here, `attention`,
and `mixture` in `moe.mixture`.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jax.typing import ArrayLike

from unipool_jax.config.schema import Config, KernelsConfig
from unipool_jax.kernels.grouped_ffn import Bank, Carried, Products
from unipool_jax.kernels.norms import post_norm, rms_norm
from unipool_jax.model.attention import Attention, AttentionWeights, KeyValueCache, attention
from unipool_jax.model.remat import rematerialized, without_gathered_weights
from unipool_jax.model.switch import Switched
from unipool_jax.moe.bank import ExpertPool, Experts, gathered_by_layer, pool_experts
from unipool_jax.moe.beside_attention import before_attention, behind_attention
from unipool_jax.moe.mixture import RouterParameters, RouterWeights, Selection, Visits, mixture
from unipool_jax.moe.routing import RoutingStats
from unipool_jax.moe.shared_experts import SharedExperts, SharedWeights
from unipool_jax.moe.swiglu import SwiGLU
from unipool_jax.moe.visibility import layer_windows
from unipool_jax.parallel.head import Head
from unipool_jax.parallel.linear import lookup
from unipool_jax.parallel.mesh import constrain


class LayerWeights(NamedTuple):
    """Parameters of one layer, without the experts of its pool."""

    attention_norm_D: jax.Array
    attention: AttentionWeights
    ffn_norm_D: jax.Array
    router: RouterWeights | None
    """None in the dense model."""
    shared: SharedWeights | None
    """None without moe.shared_experts."""
    depth_D: jax.Array | None
    """What is added to the input of router and experts; None without moe.depth_vectors."""
    attention_post_norm_D: jax.Array | None
    """Gain of the norm of what attention adds; None with model.norm=pre."""
    ffn_post_norm_D: jax.Array | None
    """Gain of the norm of what the other block adds; None with model.norm=pre, or without such a norm."""


class LayerInputs(NamedTuple):
    """What a layer is given besides hidden states; arrays of all layers are stacked to `[G, L/G, ...]`."""

    selection: Selection
    place: ArrayLike | None = None
    """Where the layer is in the cache, or in `Experts.products`, int32; None without either."""
    sees_all: ArrayLike | None = None
    """With attention.kind=alternating, whether the layer attends to all positions before, bool."""


class Positions(NamedTuple):
    """What all layers are told of the positions of a batch."""

    start_B: jax.Array | None = None
    """With a cache, the position of each row's first token, int32."""
    counted_BS: jax.Array | None = None
    """Which positions routing statistics are about, bool; None is all of them. Padding is routed like text."""
    segments: ArrayLike | None = None
    """Ids of documents that do not see each other, int32 `[B, S]`, with a cache of its slots, `[B, T]`; None: a row is
    one text. Routing does not depend on it."""


EVERY_POSITION = Positions()
"""Rows begin at position 0, and all of them is text."""


class LayerOutputs(NamedTuple):
    """What a layer returns besides hidden states; arrays of all layers are stacked to `[G, L/G, ...]`."""

    stats: RoutingStats
    visits: Visits | None
    """Who visited which experts, where that is to be kept."""
    switched: Switched | None = None
    """With attention.kind=switch, which tokens attended to what."""


def layer(
    config: Config,
    hidden_BSD: jax.Array,
    weights: LayerWeights,
    inputs: LayerInputs,
    positions: Positions,
    experts: Experts,
    cache: KeyValueCache | None = None,
    *,
    in_scratch: bool = False,
) -> tuple[jax.Array, KeyValueCache | None, Experts, LayerOutputs]:
    """One transformer layer.

    Args:
      config: of the model.
      hidden_BSD: in the compute dtype.
      weights: parameters of this layer.
      inputs: of this layer.
      positions: of the batch.
      experts: of the layer's pool.
      cache: of all layers; None: the tokens are all there is.
      in_scratch: as for `mixture`.

    Returns:
      Hidden states, the cache with these tokens in it, the experts for the next layer of the pool, and what else the
      layer has to tell.
    """
    model = config.model
    normed_BSD = rms_norm(hidden_BSD, weights.attention_norm_D, model.norm_epsilon)
    gathers = weights.router is not None and experts.accumulator is None and gathered_by_layer(config)
    bank = experts.weights
    if gathers:
        normed_BSD, bank = before_attention(normed_BSD, bank)
    attend = rematerialized(config, "attention", functools.partial(attention, config))
    attended_BSD, cache, gate = attend(
        normed_BSD,
        weights.attention,
        cache,
        positions.start_B,
        positions.segments,
        inputs.sees_all,
        inputs.place,
    )
    if gathers:
        attended_BSD, gathered = behind_attention(attended_BSD, bank, model.compute_dtype)
        experts = gathered._replace(products=experts.products, place=experts.place)
    hidden_BSD = hidden_BSD + post_norm(attended_BSD, weights.attention_post_norm_D, model.post_norm_epsilon)
    normed_BSD = rms_norm(hidden_BSD, weights.ffn_norm_D, model.norm_epsilon)
    if weights.depth_D is not None:
        # In float32, as the norm is: so is the gradient of the vector, a sum over all tokens.
        normed_BSD = (normed_BSD.astype(jnp.float32) + weights.depth_D).astype(normed_BSD.dtype)
    given = functools.partial(mixture, config, in_scratch=in_scratch)
    block = rematerialized(config, "moe", given, functools.partial(mixture, config, in_scratch=True))
    mixed = block(
        normed_BSD,
        weights.router,
        weights.shared,
        inputs.selection,
        experts,
        positions.counted_BS,
        weights.ffn_post_norm_D,
    )
    hidden_BSD = constrain(hidden_BSD + mixed.hidden_BSD, "batch", None, None)
    return hidden_BSD, cache, mixed.experts, LayerOutputs(mixed.stats, mixed.visits, gate)


def _without_experts(module: Layer | DenseLayer) -> LayerWeights:
    """Creates what every layer has: attention and norms."""
    model, ones, width = module.config.model, nn.initializers.ones, (module.config.model.hidden_size,)

    def gain(name: str, constant: float) -> jax.Array | None:
        first = nn.initializers.constant(model.post_norm_gain(constant))
        return None if model.norm == "pre" else module.param(name, first, width, jnp.float32)

    mixes = isinstance(module, Layer) and module.config.moe.router != "none"
    without = mixes and model.post_norm_experts == "none"
    return LayerWeights(
        attention_norm_D=module.param("attention_norm", ones, width, jnp.float32),
        attention=Attention(
            model, module.config.head_size, module.config.attention.kind == "switch", name="attention"
        )(),
        ffn_norm_D=module.param("ffn_norm", ones, width, jnp.float32),
        router=None,
        shared=None,
        depth_D=None,
        attention_post_norm_D=gain("attention_post_norm", model.post_norm_attention),
        ffn_post_norm_D=None if without else gain("ffn_post_norm", model.post_norm_ffn),
    )


_Stream = tuple[jax.Array, KeyValueCache | None]
"""What goes from layer to layer: hidden states `[B, S, D]`, and the cache of all layers."""


class Layer(nn.Module):
    """Creates `LayerWeights` and applies `layer`: the body of the scan over the layers of a pool."""

    config: Config
    keep_routing: bool

    @nn.compact
    def __call__(
        self,
        carry: tuple[_Stream, Carried],
        bank: Bank,
        positions: Positions,
        inputs: LayerInputs,
    ) -> tuple[tuple[_Stream, Carried], LayerOutputs]:
        config, zeros, width = self.config, nn.initializers.zeros, (self.config.model.hidden_size,)
        weights = _without_experts(self)
        if config.moe.router != "none":
            weights = weights._replace(router=RouterParameters(config, name="mixture")())
        if config.moe.shared_experts:
            weights = weights._replace(shared=SharedExperts(config, name="shared")())
        if config.moe.depth_vectors:
            weights = weights._replace(depth_D=self.param("depth", zeros, width, jnp.float32))
        (hidden_BSD, cache), (accumulator, products) = carry
        place = None if products is None else jnp.asarray(inputs.place)
        function = rematerialized(
            config, "full", functools.partial(layer, config), functools.partial(layer, config, in_scratch=True)
        )
        hidden_BSD, cache, experts, outputs = function(
            hidden_BSD, weights, inputs, positions, Experts(bank, accumulator, products, place), cache
        )
        if not self.keep_routing:
            outputs = outputs._replace(visits=None)
        # The only layer of a pool may have made the accumulator itself.
        carried = Carried(None if accumulator is None else experts.accumulator, experts.products)
        return ((hidden_BSD, cache), carried), outputs


class DenseLayer(nn.Module):
    """A layer with one block in place of experts: the body of the scan over the first layers.

    To `layer` the block is the bank of a dense model, of one expert.
    """

    config: Config

    @nn.compact
    def __call__(self, stream: _Stream, positions: Positions, inputs: LayerInputs) -> tuple[_Stream, Switched | None]:
        config, (hidden_BSD, cache) = self.config, stream
        weights, block = _without_experts(self), SwiGLU(config.model, config.dense_width, name="block")()
        experts = Experts(Bank(*(weight[None] for weight in block)), None)
        function = rematerialized(config, "full", functools.partial(layer, config), in_pool=False)
        hidden_BSD, cache, _, outputs = function(hidden_BSD, weights, inputs, positions, experts, cache)
        return (hidden_BSD, cache), outputs.switched


class PoolStage(nn.Module):
    """The L/G layers that share one pool; the body of the scan over pools."""

    config: Config
    keep_routing: bool

    @nn.compact
    def __call__(
        self,
        carry: tuple[_Stream, Products | None],
        positions: Positions,
        inputs: LayerInputs,
        experts: Experts | None,
    ) -> tuple[tuple[_Stream, Products | None], tuple[LayerOutputs, Experts | None]]:
        config, (stream, products) = self.config, carry
        given = experts is not None
        if experts is None:
            bank = ExpertPool(config.model, config.experts_per_pool, name="bank")()
            experts = pool_experts(config, bank)
        layers = nn.scan(
            Layer,
            variable_axes={"params": 0},
            split_rngs={"params": True},
            in_axes=(nn.broadcast, nn.broadcast, 0),
            length=config.layers_per_pool,
            # The check traces the body once more. It draws random numbers: initial weights depend on it, steps do not.
            check_constancy_invariants=self.is_initializing(),
        )
        if (windows := layer_windows(config)) is not None:
            inputs = inputs._replace(selection=inputs.selection._replace(window=windows))
        # The parts of `experts` enter the scan apart: weights in its carry would be kept once for each layer.
        (stream, (accumulator, products)), outputs = layers(config, self.keep_routing, name="layers")(
            (stream, Carried(experts.accumulator, products)), experts.weights, positions, inputs
        )
        passed_on = experts._replace(accumulator=accumulator)
        return (stream, products), (outputs, passed_on if given else None)


class ModelOutput(NamedTuple):
    """What the model returns."""

    head: Head
    """What logits and losses are made of."""
    layers: LayerOutputs
    """Of the layers with experts, stacked to `[G, L/G, ...]`."""
    switched: Switched | None
    """Of all layers, dense ones too, stacked over any leading axes."""
    cache: KeyValueCache | None
    """The cache that the caller gave, with these tokens in it."""
    experts: Experts | None
    """The experts that the caller gave, for the next micro-batch."""
    products: Products | None
    """What the caller gave for layers to keep, full."""


def _sees_all(config: Config, *, dense: bool = False) -> np.ndarray | None:
    """`LayerInputs.sees_all` of the layers with experts, or of the dense ones before them."""
    if config.attention.kind != "alternating":
        return None
    first, by_layer = config.moe.dense_layers, np.array(config.sees_all)
    return by_layer[:first] if dense else by_layer[first:].reshape(config.pool.groups, config.layers_per_pool)


def _places(config: Config) -> np.ndarray:
    """The layers with experts, counted through."""
    groups, each = config.pool.groups, config.layers_per_pool
    return np.arange(groups * each, dtype=np.int32).reshape(groups, each)


class Transformer(nn.Module):
    """Decoder-only language model over one or more expert pools.

    Parameters are float32; per-layer ones are stacked as `[G, L/G, ...]`, the bank as `[G, E, ...]`, so each pool
    exists once in parameters, gradients and optimizer state. Those of the first moe.dense_layers are stacked by
    themselves, and are no part of L here.
    """

    config: Config
    keep_routing: bool = False
    """Whether `LayerOutputs.visits` is returned."""

    @nn.compact
    def __call__(
        self,
        tokens_BS: jax.Array,
        inputs: LayerInputs,
        positions: Positions = EVERY_POSITION,
        experts: Experts | None = None,
        cache: KeyValueCache | None = None,
        products: Products | None = None,
    ) -> ModelOutput:
        """Apply the model.

        Args:
          tokens_BS: token ids, int32.
          inputs: of every layer with experts, stacked.
          positions: of the tokens.
          experts: for G = 1, the pool's experts, `[1, ...]`, in place of those that the parameters hold.
          cache: keys and values of the positions before; None: the tokens are all there is.
          products: where layers write what they keep for the backward pass: see `moe.products`; not with a cache.
        """
        config, model = self.config, self.config.model
        table_shape = (model.vocab_size, model.hidden_size)
        embedding_VD = self.param("embedding", nn.initializers.normal(model.table_std), table_shape, jnp.float32)
        hidden_BSD = lookup(embedding_VD, tokens_BS, ("vocab", "embed"), model.compute_dtype)
        hidden_BSD = constrain(hidden_BSD, "batch", None, None)

        stream, inputs = (hidden_BSD, cache), inputs._replace(sees_all=_sees_all(config))
        if cache is not None:
            inputs = inputs._replace(place=_places(config) + config.moe.dense_layers)
        elif products is not None:
            inputs = inputs._replace(place=_places(config))
        if dense := config.moe.dense_layers:
            first = nn.scan(
                DenseLayer,
                variable_axes={"params": 0},
                split_rngs={"params": True},
                in_axes=(nn.broadcast, 0),
                length=dense,
                check_constancy_invariants=self.is_initializing(),
            )
            unused = Selection(jnp.zeros((dense, 1), jnp.float32))
            place = None if cache is None else np.arange(dense, dtype=np.int32)
            own = LayerInputs(unused, place, _sees_all(config, dense=True))
            stream, first_switched = first(config, name="dense")(stream, positions, own)

        pools = nn.scan(
            without_gathered_weights(config, PoolStage),
            variable_axes={"params": 0},
            split_rngs={"params": True},
            in_axes=(nn.broadcast, 0, 0),
            length=config.pool.groups,
            check_constancy_invariants=self.is_initializing(),
        )
        ((hidden_BSD, cache), products), (outputs, experts) = pools(config, self.keep_routing, name="pools")(
            (stream, products), positions, inputs, experts
        )

        switched = outputs.switched
        if dense and switched is not None:
            switched = jax.tree.map(
                lambda own, others: jnp.concatenate([own, others.reshape(-1, *own.shape[1:])]),
                first_switched,
                switched,
            )
        final_gain_D = self.param("final_norm", nn.initializers.ones, (model.hidden_size,), jnp.float32)
        hidden_BSD = rms_norm(hidden_BSD, final_gain_D, model.norm_epsilon)
        output_VD = self.param("output", nn.initializers.normal(model.matrix_std), table_shape, jnp.float32)
        # Groups of the balance loss: a training micro-batch is whole ones (validated), elsewhere they are not used.
        batch, sequences = tokens_BS.shape[0], config.balance_sequences
        stats = outputs.stats.grouped(batch // sequences if batch % sequences == 0 else 1)
        outputs = outputs._replace(stats=stats)
        return ModelOutput(Head(hidden_BSD, output_VD), outputs, switched, cache, experts, products)


def apply(
    config: Config,
    params: Any,
    tokens_BS: ArrayLike,
    inputs: LayerInputs,
    positions: Positions = EVERY_POSITION,
    experts: Experts | None = None,
    keep_routing: bool = False,
    cache: KeyValueCache | None = None,
    products: Products | None = None,
) -> ModelOutput:
    """`Transformer` as a function of its parameters; arguments as there. With `experts` the parameters need no bank."""
    model: Any = Transformer(config, keep_routing)
    output: ModelOutput = model.apply({"params": params}, tokens_BS, inputs, positions, experts, cache, products)
    return output


def initial_parameters(config: Config, key: jax.Array, tokens_BS: jax.Array, inputs: LayerInputs) -> Any:
    """First weights; traceable. Nothing is computed of the tokens and inputs, which only say their shapes.

    So any kernels do. Those for another device would be interpreted, and Flax refuses a scan that makes parameters
    around what the interpreter does.
    """
    plain = dataclasses.replace(config, kernels=KernelsConfig(implementation="xla", attention="blocks"))
    return Transformer(plain).init(key, tokens_BS, inputs)["params"]


def forward(
    config: Config,
    params: Any,
    tokens_BS: ArrayLike,
    expert_bias_GNE: jax.Array,
    score_factor_GNE: jax.Array | None = None,
    segments_BS: ArrayLike | None = None,
) -> tuple[jax.Array, RoutingStats]:
    """Logits `[B, S, V]` float32 and `RoutingStats` stacked to `[G, L/G, ...]`.

    See `Selection` for the bias and the factors, `Positions` for segments.
    """
    inputs = LayerInputs(Selection(expert_bias_GNE, score_factor_GNE))
    output = apply(config, params, tokens_BS, inputs, Positions(segments=segments_BS))
    return output.head.logits(), output.layers.stats


def empty_cache(config: Config, batch_size: int, length: int) -> KeyValueCache:
    """A cache for `length` positions of `batch_size` rows, in the compute dtype; moe.dense_layers come first."""
    model = config.model
    shape = (model.num_layers, batch_size, length, model.num_kv_heads, config.head_size)
    return KeyValueCache(jnp.zeros(shape, model.compute_dtype), jnp.zeros(shape, model.compute_dtype))


def forward_cached(
    config: Config,
    params: Any,
    tokens_BS: ArrayLike,
    expert_bias_GNE: jax.Array,
    cache: KeyValueCache,
    start_B: jax.Array,
    score_factor_GNE: jax.Array | None = None,
    segments_BT: ArrayLike | None = None,
) -> tuple[jax.Array, KeyValueCache]:
    """`forward` for tokens that follow those in `cache`: the same logits, float32 `[B, S, V]`, and the new cache.

    Row b holds positions `start_B[b] .. start_B[b] + S - 1`, which must lie within the cache; the cache must hold all
    positions before them. Tokens of padding behind a row are harmless if later calls overwrite them in order.
    `segments_BT` are the documents of all slots; those behind a row's last token do not matter.
    """
    inputs = LayerInputs(Selection(expert_bias_GNE, score_factor_GNE))
    positions = Positions(start_B, segments=segments_BT)
    output = apply(config, params, tokens_BS, inputs, positions, cache=cache)
    assert output.cache is not None
    return output.head.logits(), output.cache
