"""Runs a model layer by layer: with any of its layers left out, or looking at what goes on inside.

A layer is compiled once for all layers of its kind, so trying what the model is without one compiles nothing.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from unipool_jax.config.schema import Config
from unipool_jax.convert.layered import Layered, Tree, pool_of
from unipool_jax.data.pipeline import Batch
from unipool_jax.kernels.grouped_ffn import Bank, Carried
from unipool_jax.kernels.norms import post_norm, rms_norm
from unipool_jax.model.attention import AttentionWeights, attention_heads
from unipool_jax.model.transformer import DenseLayer, Layer, LayerInputs, Positions
from unipool_jax.moe.mixture import Selection, Visits
from unipool_jax.moe.visibility import layer_windows
from unipool_jax.parallel.head import Head
from unipool_jax.parallel.linear import linear, lookup


class Probe(NamedTuple):
    """What was seen inside one layer, summed over the tokens that count, float32."""

    channels_D: jax.Array
    """Absolute outputs of its two pre-norms."""
    heads_H: jax.Array
    """Norms of the outputs of its attention heads, before the output projection."""
    cosine: jax.Array
    """Between hidden states before and after the layer."""
    block_F: jax.Array | None
    """Absolute activations of the block that every token visits: of a layer of moe.dense_layers, or of the always-on
    experts; None without."""
    neurons_EF: jax.Array | None
    """Absolute activations of each expert on what it was given; None in a layer of moe.dense_layers."""
    outputs_E: jax.Array | None
    """Gate times the norm of the expert's output."""
    counts_E: jax.Array | None
    """Choices of each expert."""


class Inverses(NamedTuple):
    """Inverse root mean squares of what blocks add, before the norms behind them, summed over tokens, float32."""

    tokens: jax.Array
    """That count."""
    attention: jax.Array
    block: jax.Array | None
    """Of the block that every token visits."""
    experts_E: jax.Array | None
    """Of each expert over its choices; of the gated sum for all of them, with model.post_norm_experts=post."""
    counts_E: jax.Array | None
    """How many summands those have."""


class _Given(NamedTuple):
    """One layer with all that it needs."""

    params: Tree
    bank: Bank | None
    inputs: LayerInputs


class Walk:
    """A model that is run layer by layer, on one device.

    Args:
      config: of the model.
      model: its weights.
    """

    def __init__(self, config: Config, model: Layered):
        self.config = config
        self._ends = jax.device_put(model.ends)
        banks = [jax.device_put(Bank(*(bank[name] for name in ("gate", "up", "down")))) for bank in model.banks]
        windows, dense = layer_windows(config), config.moe.dense_layers
        kinds = config.sees_all if config.attention.kind == "alternating" else (None,) * config.model.num_layers
        self._layers = []
        for layer, params in enumerate(model.layers):
            pool, row, sees_all = pool_of(config, layer), layer - dense, kinds[layer]
            selection = Selection(jnp.zeros(1))
            if pool is not None:
                window = None if windows is None else jax.tree.map(lambda leaf, row=row: leaf[row], windows)
                selection = Selection(jnp.asarray(model.biases[row]), window=window)
            bank = None if pool is None else banks[pool]
            self._layers.append(_Given(jax.device_put(params), bank, LayerInputs(selection, sees_all=sees_all)))

    def loss(self, batches: Sequence[Batch], layers: Sequence[int]) -> float:
        """Mean loss in nats per token with only these layers."""
        total, tokens = 0.0, 0.0
        for batch in batches:
            hidden = self.embed(batch)
            for layer in layers:
                hidden = self._step(layer, hidden, batch)
            total += float(_loss(self.config, self._ends, hidden, batch.targets, batch.weights))
            tokens += float(batch.weights.sum())
        return total / tokens

    def embed(self, batch: Batch) -> jax.Array:
        """Hidden states before the first layer, `[B, S, D]`."""
        return _embed(self.config, self._ends, batch.inputs)

    def after(self, layers: int, batch: Batch) -> jax.Array:
        """Hidden states after the first `layers` layers, `[B, S, D]`, in the compute dtype."""
        hidden = self.embed(batch)
        for layer in range(layers):
            hidden = self._step(layer, hidden, batch)
        return hidden

    def _step(self, layer: int, hidden_BSD: jax.Array, batch: Batch) -> jax.Array:
        return _step(self.config, self._layers[layer], hidden_BSD, batch.segments)

    def probe(self, layer: int, hidden_BSD: jax.Array, batch: Batch) -> tuple[jax.Array, Probe]:
        """Hidden states after a layer, and what was seen inside."""
        return _probed(self.config, self._layers[layer], hidden_BSD, batch.segments, batch.weights > 0)

    def inverses(self, layer: int, hidden_BSD: jax.Array, batch: Batch) -> tuple[jax.Array, Inverses]:
        """Hidden states after a layer, and what its norms behind blocks divide by."""
        return _inverses(self.config, self._layers[layer], hidden_BSD, batch.segments, batch.weights > 0)

    def final_channels(self, hidden_BSD: jax.Array, batch: Batch) -> jax.Array:
        """Absolute outputs of the final norm, summed over the tokens that count, `[D]`."""
        return _channels(self.config, hidden_BSD, self._ends["final_norm"], batch.weights > 0)


@functools.partial(jax.jit, static_argnums=0)
def _embed(config: Config, ends: Tree, tokens_BS: jax.Array) -> jax.Array:
    return lookup(ends["embedding"], tokens_BS, ("vocab", "embed"), config.model.compute_dtype)


@functools.partial(jax.jit, static_argnums=0)
def _loss(config: Config, ends: Tree, hidden_BSD: jax.Array, targets_BS: jax.Array, weights_BS: jax.Array) -> jax.Array:
    normed_BSD = rms_norm(hidden_BSD, ends["final_norm"], config.model.norm_epsilon)
    return jnp.sum(Head(normed_BSD, ends["output"]).token_losses(targets_BS) * weights_BS)


def _apply(
    config: Config, given: _Given, hidden_BSD: jax.Array, segments_BS: jax.Array | None
) -> tuple[jax.Array, Visits | None]:
    positions = Positions(segments=segments_BS)
    module: Any
    if given.bank is None:
        module = DenseLayer(config)
        (hidden_BSD, _), _ = module.apply({"params": given.params}, (hidden_BSD, None), positions, given.inputs)
        return hidden_BSD, None
    module = Layer(config, keep_routing=True)
    ((hidden_BSD, _), _), outputs = module.apply(
        {"params": given.params}, ((hidden_BSD, None), Carried(None, None)), given.bank, positions, given.inputs
    )
    return hidden_BSD, outputs.visits


@functools.partial(jax.jit, static_argnums=0)
def _step(config: Config, given: _Given, hidden_BSD: jax.Array, segments_BS: jax.Array | None) -> jax.Array:
    return _apply(config, given, hidden_BSD, segments_BS)[0]


@functools.partial(jax.jit, static_argnums=0)
def _channels(config: Config, hidden_BSD: jax.Array, gain_D: jax.Array, counted_BS: jax.Array) -> jax.Array:
    normed_BSD = rms_norm(hidden_BSD.astype(jnp.float32), gain_D, config.model.norm_epsilon)
    return jnp.sum(jnp.abs(normed_BSD) * counted_BS[..., None], axis=(0, 1))


class _Inside(NamedTuple):
    """What goes on in a layer, for those who look."""

    heads_BSHC: jax.Array
    attended_BSD: jax.Array
    """What attention adds, before a norm behind it."""
    between_BSD: jax.Array
    """Hidden states between attention and the other block."""
    given_ND: jax.Array
    """What router, experts and other blocks are given, float32."""
    after_BSD: jax.Array
    visits: Visits | None
    """None in a layer of moe.dense_layers. The one expert of a dense model is visited by every token."""


def _inside(config: Config, given: _Given, hidden_BSD: jax.Array, segments_BS: jax.Array | None) -> _Inside:
    model, params, own = config.model, given.params, given.params["attention"]
    normed_BSD = rms_norm(hidden_BSD, params["attention_norm"], model.norm_epsilon)
    weights = AttentionWeights(own["query"], own["key"], own["value"], own["output"], own.get("switch"))
    heads_BSHC, _, _ = attention_heads(
        config, normed_BSD, weights, segments=segments_BS, sees_all=given.inputs.sees_all
    )
    attended_BSD = linear(heads_BSHC.reshape(*hidden_BSD.shape[:2], -1), weights.output, ("heads", "embed"))
    between_BSD = hidden_BSD + post_norm(attended_BSD, params.get("attention_post_norm"), model.post_norm_epsilon)
    after_BSD, visits = _apply(config, given, hidden_BSD, segments_BS)
    if visits is None:
        given_ND = rms_norm(between_BSD, params["ffn_norm"], model.norm_epsilon).reshape(-1, model.hidden_size)
        if given.bank is not None:
            visits = Visits(jnp.zeros((len(given_ND), 1), jnp.int32), jnp.ones((len(given_ND), 1)), given_ND)
    else:
        given_ND = visits.hidden_ND
    return _Inside(heads_BSHC, attended_BSD, between_BSD, given_ND.astype(jnp.float32), after_BSD, visits)


@functools.partial(jax.jit, static_argnums=0)
def _probed(
    config: Config, given: _Given, hidden_BSD: jax.Array, segments_BS: jax.Array | None, counted_BS: jax.Array
) -> tuple[jax.Array, Probe]:
    params, inside = given.params, _inside(config, given, hidden_BSD, segments_BS)
    channels_D = _channels(config, hidden_BSD, params["attention_norm"], counted_BS)
    channels_D += _channels(config, inside.between_BSD, params["ffn_norm"], counted_BS)
    norms_BSH = jnp.linalg.norm(inside.heads_BSHC.astype(jnp.float32), axis=-1)
    before, after = (array.astype(jnp.float32) for array in (hidden_BSD, inside.after_BSD))
    sizes_BS = jnp.linalg.norm(before, axis=-1) * jnp.linalg.norm(after, axis=-1)
    cosine_BS = jnp.sum(before * after, axis=-1) / jnp.maximum(sizes_BS, 1e-30)
    counted_N, block = counted_BS.reshape(-1), _block(params)
    routed: tuple[jax.Array | None, ...] = (None, None, None)
    if given.bank is not None:
        assert inside.visits is not None
        rows = _rows(given.bank, inside.given_ND, inside.visits, counted_N)
        output_RD = rows.output_RD
        if config.model.post_norm_experts != "post":
            output_RD = post_norm(output_RD, params.get("ffn_post_norm"), config.model.post_norm_epsilon)
        size_R = jnp.linalg.norm(output_RD, axis=-1)
        neurons_EF = rows.by_expert(jnp.abs(rows.active_RF) * rows.counted_R[:, None])
        outputs_E = rows.by_expert(rows.gates_R * size_R * rows.counted_R)
        routed = neurons_EF, outputs_E, rows.by_expert(rows.counted_R)
    return inside.after_BSD, Probe(
        channels_D,
        jnp.sum(norms_BSH * counted_BS[..., None], axis=(0, 1)),
        jnp.sum(cosine_BS * counted_BS),
        None if block is None else jnp.sum(jnp.abs(_active(inside.given_ND, block)) * counted_N[:, None], axis=0),
        *routed,
    )


@functools.partial(jax.jit, static_argnums=0)
def _inverses(
    config: Config, given: _Given, hidden_BSD: jax.Array, segments_BS: jax.Array | None, counted_BS: jax.Array
) -> tuple[jax.Array, Inverses]:
    inside, block = _inside(config, given, hidden_BSD, segments_BS), _block(given.params)
    counted_N, of_sum = counted_BS.reshape(-1).astype(jnp.float32), config.model.post_norm_experts == "post"

    def inverse(output: jax.Array) -> jax.Array:
        wide = output.astype(jnp.float32).reshape(-1, config.model.hidden_size)
        return jax.lax.rsqrt(jnp.mean(jnp.square(wide), axis=-1) + config.model.post_norm_epsilon)

    block_ND = None if block is None else _active(inside.given_ND, block) @ block["down"]
    experts_E = counts_E = None
    of_block = None if block_ND is None else jnp.sum(inverse(block_ND) * counted_N)
    if given.bank is not None:
        assert inside.visits is not None
        rows = _rows(given.bank, inside.given_ND, inside.visits, counted_BS.reshape(-1))
        experts_E, counts_E = rows.by_expert(inverse(rows.output_RD) * rows.counted_R), rows.by_expert(rows.counted_R)
        if of_sum and config.moe.router != "none":
            gated_RD = rows.output_RD * rows.gates_R[:, None]
            sum_ND = jax.ops.segment_sum(gated_RD, rows.row_R, len(inside.given_ND))
            if block_ND is not None:
                row_1D = given.params["shared"].get("sigmoid_gate")
                share = 1.0 if row_1D is None else jax.nn.sigmoid(inside.given_ND @ row_1D.T)
                sum_ND = sum_ND + share * block_ND
            # One norm for all: each expert, and the block, gets its mean.
            total = jnp.sum(inverse(sum_ND) * counted_N)
            tokens = jnp.sum(counted_N)
            experts_E, counts_E = jnp.full_like(experts_E, total), jnp.full_like(counts_E, tokens)
            of_block = None if of_block is None else total
    attention = jnp.sum(inverse(inside.attended_BSD) * counted_N)
    return inside.after_BSD, Inverses(jnp.sum(counted_N), attention, of_block, experts_E, counts_E)


def _block(params: Tree) -> Tree | None:
    """The block that every token visits: of a layer of moe.dense_layers, or of the always-on experts."""
    return params.get("block") or params.get("shared", {}).get("block")


def _active(hidden_ND: jax.Array, block: Tree) -> jax.Array:
    return jax.nn.silu(hidden_ND @ block["gate"]) * (hidden_ND @ block["up"])


class _Rows(NamedTuple):
    """Choices of a layer in the order of their experts."""

    expert_R: jax.Array
    row_R: jax.Array
    """The token."""
    gates_R: jax.Array
    counted_R: jax.Array
    """1 for tokens that count, 0 for others."""
    active_RF: jax.Array
    output_RD: jax.Array
    """Of the expert, before its gate and before a norm behind it."""
    experts: int

    def by_expert(self, values_R: jax.Array) -> jax.Array:
        """Sums over the choices of each expert."""
        return jax.ops.segment_sum(values_R, self.expert_R, self.experts)


def _rows(bank: Bank, hidden_ND: jax.Array, visits: Visits, counted_N: jax.Array) -> _Rows:
    experts, slots = bank.gate_EDF.shape[0], visits.experts_NK.shape[1]
    expert_R = visits.experts_NK.reshape(-1)
    order_R = jnp.argsort(expert_R, stable=True)
    expert_R, row_R = expert_R[order_R], order_R // slots
    sizes_E = jnp.bincount(expert_R, length=experts).astype(jnp.int32)
    hidden_RD = hidden_ND[row_R]
    gate_RF, up_RF = (jax.lax.ragged_dot(hidden_RD, weights, sizes_E) for weights in bank[:2])
    active_RF = jax.nn.silu(gate_RF) * up_RF
    output_RD = jax.lax.ragged_dot(active_RF, bank.down_EFD, sizes_E)
    gates_R, counted_R = visits.gates_NK.reshape(-1)[order_R], counted_N[row_R].astype(jnp.float32)
    return _Rows(expert_R, row_R, gates_R, counted_R, active_RF, output_RD, experts)


def counted(batches: Sequence[Batch]) -> int:
    """Tokens of `batches` that count."""
    return int(sum(np.count_nonzero(batch.weights) for batch in batches))
