"""One optimiser step, and one evaluation step, as pure functions of the training state and a batch."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from unipool_jax.config.schema import Config
from unipool_jax.data.pipeline import Batch
from unipool_jax.kernels.grouped_ffn import Bank
from unipool_jax.model.transformer import Transformer, forward, forward_sharing
from unipool_jax.moe import dispatch
from unipool_jax.moe.balance import entropy_loss, load_fractions, pool_loss, switch_loss, updated_expert_bias, z_loss
from unipool_jax.moe.lock import Candidate, entropy_coefficient, faded, init_candidate, score_factors
from unipool_jax.moe.pool import gathered_bank, gradient_master
from unipool_jax.moe.routing import RoutingStats
from unipool_jax.parallel.mesh import constrain
from unipool_jax.training.optimizer import make_optimizer, make_schedule
from unipool_jax.training.sharding import replicated, state_shardings

Metrics = dict[str, jax.Array]


class BalanceState(NamedTuple):
    """State of expert balancing that no gradient touches; saved in checkpoints."""

    expert_bias_GNE: jax.Array
    """Selection bias per layer and expert, float32; stays zero unless loss.balance is `expert_bias`."""
    previous_load_GE: jax.Array
    """Share of choices per expert in the last micro-batch, float32; zeros before the first one, and unless
    loss.pool_statistics is `previous`."""
    lock: Candidate | None = None
    """The partition under way in a run with UniPool-lock; None before it is one, and after the lock, when the bank
    itself is divided."""


class TrainState(NamedTuple):
    """Everything a run needs to go on, besides the configuration."""

    step: jax.Array
    """Completed steps, int32; also the position in the data."""
    params: Any
    opt_state: optax.OptState
    balance: BalanceState


class EvalSums(NamedTuple):
    """Sums over the tokens of each sequence, so that totals do not depend on the batch size."""

    loss_B: jax.Array
    """Language-model loss in nats, float32."""
    tokens_B: jax.Array
    """Predicted tokens (weight 1), float32."""
    bytes_B: jax.Array
    """UTF-8 bytes of the predicted tokens, int32."""
    counts_LE: jax.Array
    """Choices per layer and expert, int32 `[L, E]`, over all positions of the batch."""
    unfaded_counts_LE: jax.Array | None
    """The same without the fade of a lock that is under way; None in runs without one."""


def init_balance(config: Config) -> BalanceState:
    """Balance state of a new run."""
    groups, experts = config.pool.groups, config.experts_per_pool
    return BalanceState(
        expert_bias_GNE=jnp.zeros((groups, config.layers_per_pool, experts), jnp.float32),
        previous_load_GE=jnp.zeros((groups, experts), jnp.float32),
        lock=init_candidate(config),
    )


def init_state(config: Config, key: jax.Array) -> TrainState:
    """State before the first step; traceable, so `jax.eval_shape` gives its structure without memory."""
    balance = init_balance(config)
    tokens_BS = jnp.zeros((1, config.data.sequence_length), jnp.int32)
    params = Transformer(config).init(key, tokens_BS, balance.expert_bias_GNE)["params"]
    opt_state = make_optimizer(config.optimizer, config.train.steps).init(params)
    return TrainState(jnp.zeros((), jnp.int32), params, opt_state, balance)


def counts_before_gradient(config: Config) -> bool:
    """Whether a step makes a forward pass over its micro-batches before their gradients, to count expert use.

    The exact pool loss multiplies two averages over the whole batch, and the first must be known before the gradient
    of the second is taken.
    """
    exact = config.loss.balance == "pool" and config.loss.pool_statistics == "current"
    return exact and config.num_microbatches > 1


def without_bank(params: Any) -> tuple[Any, Bank]:
    """Parameters of a model with one pool, without its bank; and the bank, `[E, ...]`."""
    rest, pools = dict(params), dict(params["pools"])
    bank = pools.pop("bank")
    return rest | {"pools": pools}, Bank(bank["gate"][0], bank["up"][0], bank["down"][0])


def with_bank(params: Any, bank: Bank) -> Any:
    """The inverse of `without_bank`, for parameters or gradients."""
    weights = {"gate": bank.gate_EDF[None], "up": bank.up_EDF[None], "down": bank.down_EFD[None]}
    return params | {"pools": params["pools"] | {"bank": weights}}


def state_shapes(config: Config, mesh: Mesh | None = None) -> TrainState:
    """Shapes and dtypes of the training state, with the shardings of `mesh`; no memory is used."""
    # The key is made inside: a device that is only compiled for cannot make one.
    shapes = jax.eval_shape(lambda: init_state(config, jax.random.key(0)))
    if mesh is None:
        return shapes
    placed: TrainState = jax.tree.map(
        lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
        shapes,
        state_shardings(config, mesh, shapes),
    )
    return placed


def make_train_step(
    config: Config, mesh: Mesh | None = None
) -> Callable[[TrainState, Batch], tuple[TrainState, Metrics]]:
    """The jitted training step; it donates the state it is given. With a mesh, call it under `jax.set_mesh(mesh)`.

    The batch is worked through in `train.batch_size / train.microbatch_size` micro-batches. Losses, gradients and
    balance statistics are those of the whole batch, whatever their number, but for two losses that are published as
    those of a micro-batch (`Config.microbatch_loss`) and are averaged over micro-batches here: the pool loss with
    `loss.pool_statistics=previous`, and the entropy loss of a lock, which measures the mean scores of a micro-batch.

    When the loss or a gradient is not finite, or rows overflow a receive buffer and `mesh.overflow=stop`, parameters,
    optimiser and balance state stay as they were and only the step count moves on.

    Metrics: `loss/lm`, `loss/balance`, `loss/z`, `loss/total` (float32, nats), `grad_norm`, `learning_rate`, `finite`
    (bool), `overflow` (rows, int32), `arrived_L` (int32, rows at the busiest device of any micro-batch), `counts_LE`
    (int32), with NormRouter `router_scale_L`, and with UniPool-lock
    `loss/entropy`.
    """
    optimizer = make_optimizer(config.optimizer, config.train.steps)
    schedule = make_schedule(config.optimizer, config.train.steps)
    num_micro, loss_config = config.num_microbatches, config.loss
    micro_tokens = config.train.microbatch_size * config.data.sequence_length
    delayed_pool_loss = loss_config.balance == "pool" and loss_config.pool_statistics == "previous"

    with_lock = config.lock.ownership != "none"
    loss_names = ["loss/lm", "loss/balance", "loss/z", "loss/total", *(["loss/entropy"] if with_lock else [])]
    # In a locked layer each of f and P is L times what it is as a mean over the layers of the pool (spec F.6).
    pool_coefficient = loss_config.pool_coefficient / (config.model.num_layers if config.locked else 1)

    # The bank that all layers share is gathered, and its gradient scattered, once a step: see `pool`.
    one_pool = config.pool.groups == 1 and config.moe.router != "none"

    def micro_loss(
        params: Any,
        master: Bank | None,
        fixed: Bank | None,
        micro: Batch,
        state: TrainState,
        load_GE: jax.Array | None,
        total_weight: jax.Array,
    ) -> tuple[tuple[jax.Array, Bank | None], tuple[Metrics, RoutingStats]]:
        params = params if fixed is None else with_bank(params, fixed)
        head, stats, master = forward_sharing(
            config,
            params,
            micro.inputs,
            state.balance.expert_bias_GNE,
            master,
            score_factors(config, state.balance.lock),
        )
        # Averaged over micro-batches this is the mean over all tokens of the batch, even with uneven weights.
        lm = head.weighted_loss(micro.targets, micro.weights) * num_micro / total_weight
        balance = jnp.zeros((), jnp.float32)
        if loss_config.balance == "switch":
            group_tokens = loss_config.switch_group_sequences * config.data.sequence_length
            balance = switch_loss(stats, group_tokens, config.moe.top_k, loss_config.switch_coefficient)
        elif loss_config.balance == "pool":
            load = load_fractions(stats.counts_AE) if load_GE is None else load_GE
            balance = pool_loss(stats, load, micro_tokens, pool_coefficient)
        z = z_loss(stats, micro_tokens, loss_config.z_coefficient)
        losses = [lm, balance, z]
        if with_lock:
            distance = entropy_loss(stats, micro_tokens, config.lock.entropy_target)
            losses.append(entropy_coefficient(config, state.step) * distance)
        total = functools.reduce(jnp.add, losses)
        metrics = dict(zip(loss_names, [*losses[:3], total, *losses[3:]], strict=True))
        metrics["overflow"] = dispatch.overflow(config, mesh, stats.arrived_X)
        metrics["arrived_L"] = jnp.max(stats.arrived_X, axis=-1).reshape(-1)
        return (total, master), (metrics, jax.lax.stop_gradient(stats))

    def whole_batch_load(params: Any, balance: BalanceState, micros: Batch) -> jax.Array:
        """Share of choices per expert over all micro-batches."""

        def count(carry: None, micro: Batch) -> tuple[Any, jax.Array]:
            factors = score_factors(config, balance.lock)
            _, stats = forward(config, params, micro.inputs, balance.expert_bias_GNE, factors)
            return carry, stats.counts_AE

        counts_mGNAE = jax.lax.scan(count, None, micros)[1]
        return load_fractions(jnp.sum(counts_mGNAE, axis=0))

    def accumulated(state: TrainState, batch: Batch) -> tuple[Any, Metrics, jax.Array, jax.Array]:
        """Gradients and losses averaged over micro-batches, counts `[G, N, E]`, and the last micro-batch's load."""
        total_weight = jnp.sum(batch.weights)
        bias, previous_GE = state.balance.expert_bias_GNE, state.balance.previous_load_GE
        params, fixed, master = state.params, None, None
        if one_pool:
            params, bank = without_bank(state.params)
            fixed = gathered_bank(bank, config.model.compute_dtype)
            master, to_bank = jax.vjp(gradient_master, bank)
            master = jax.tree.map(lambda leaf: leaf[None], master)

        def gradients(running: Bank | None, micro: Batch, load_GE: jax.Array | None) -> Any:
            """Gradients of one micro-batch, those of a shared bank added to `running`; metrics, statistics."""
            function = functools.partial(
                micro_loss, fixed=fixed, micro=micro, state=state, load_GE=load_GE, total_weight=total_weight
            )
            _, pullback, (metrics, stats) = jax.vjp(function, params, master, has_aux=True)
            grads, running = pullback((jnp.full((), 1 / num_micro, jnp.float32), running))
            return grads, running, metrics, stats

        running = jax.tree.map(jnp.zeros_like, master)
        if num_micro == 1:
            load = previous_GE if delayed_pool_loss else None
            grads, running, metrics, stats = gradients(running, batch, load)
            counts_GNE, load_GE = jnp.sum(stats.counts_AE, axis=2), load_fractions(stats.counts_AE)
        else:
            micros = jax.tree.map(
                lambda x: constrain(x.reshape(num_micro, -1, *x.shape[1:]), None, "batch", *(None,) * (x.ndim - 1)),
                batch,
            )
            counted_before = counts_before_gradient(config)
            if counted_before:
                whole = state.params if fixed is None else with_bank(params, fixed)
                previous_GE = whole_batch_load(whole, state.balance, micros)

            def combined(name: str) -> Callable[[jax.Array, jax.Array], jax.Array]:
                return jnp.maximum if name == "arrived_L" else jnp.add

            def accumulate(carry: Any, micro: Batch) -> tuple[Any, None]:
                grads, running, metrics, counts_GNE, load_GE = carry
                micro_grads, running, micro_metrics, stats = gradients(running, micro, load_GE)
                return (
                    jax.tree.map(jnp.add, grads, micro_grads),
                    running,
                    {name: combined(name)(metrics[name], value) for name, value in micro_metrics.items()},
                    counts_GNE + jnp.sum(stats.counts_AE, axis=2),
                    load_GE if counted_before else load_fractions(stats.counts_AE),
                ), None

            losses = dict.fromkeys(loss_names, jnp.zeros((), jnp.float32))
            rows = {"overflow": jnp.zeros((), jnp.int32), "arrived_L": jnp.zeros(config.model.num_layers, jnp.int32)}
            start = (
                jax.tree.map(jnp.zeros_like, params),
                running,
                losses | rows,
                jnp.zeros(bias.shape, jnp.int32),
                previous_GE,
            )
            (grads, running, metrics, counts_GNE, load_GE), _ = jax.lax.scan(accumulate, start, micros)
            metrics = {name: value / num_micro if "loss/" in name else value for name, value in metrics.items()}
        if one_pool:
            (bank_grads,) = to_bank(jax.tree.map(lambda leaf: leaf[0], running))
            grads = with_bank(grads, bank_grads)
        return grads, metrics, counts_GNE, load_GE

    def train_step(state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
        fading = state._replace(balance=state.balance._replace(lock=faded(config, state.balance.lock, state.step)))
        grads, metrics, counts_GNE, load_GE = accumulated(fading, batch)
        grad_norm = optax.tree.norm(grads)
        finite = jnp.isfinite(metrics["loss/total"]) & jnp.isfinite(grad_norm)
        applied = finite if config.mesh.overflow == "drop" else finite & (metrics["overflow"] == 0)

        updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
        balance = fading.balance
        if delayed_pool_loss:
            balance = balance._replace(previous_load_GE=load_GE)
        if loss_config.balance == "expert_bias":
            bias = updated_expert_bias(balance.expert_bias_GNE, counts_GNE, loss_config.expert_bias_rate)
            balance = balance._replace(expert_bias_GNE=bias)
        changed = (optax.apply_updates(state.params, updates), opt_state, balance)
        kept = (state.params, state.opt_state, state.balance)
        params, opt_state, balance = jax.tree.map(lambda new, old: jnp.where(applied, new, old), changed, kept)

        metrics |= {
            "grad_norm": grad_norm,
            "learning_rate": jnp.asarray(schedule(state.step), jnp.float32),
            "finite": finite,
            "counts_LE": counts_GNE.reshape(config.model.num_layers, -1),
        }
        if config.moe.router == "norm":
            metrics["router_scale_L"] = params["pools"]["layers"]["mixture"]["scale"].reshape(-1)
        return TrainState(state.step + 1, params, opt_state, balance), metrics

    if mesh is None:
        return jax.jit(train_step, donate_argnums=0)
    places = (state_shardings(config, mesh, state_shapes(config)), replicated(mesh))
    return jax.jit(train_step, donate_argnums=0, out_shardings=places)


def make_eval_step(
    config: Config, mesh: Mesh | None = None
) -> Callable[[Any, BalanceState, Batch, jax.Array], EvalSums]:
    """The jitted evaluation step: `(params, balance, batch, token_bytes_V) -> EvalSums`; changes no state.

    `token_bytes_V` is the UTF-8 length of each token, int32, of the tokenizer's or the padded vocabulary. Over a mesh
    receive buffers take whatever comes: rows of padding are alike and may all go to one expert.
    """
    config = dataclasses.replace(config, mesh=dataclasses.replace(config.mesh, receive_factor=math.inf))

    def eval_step(params: Any, balance: BalanceState, batch: Batch, token_bytes_V: jax.Array) -> EvalSums:
        factors = score_factors(config, balance.lock)
        head, stats, _ = forward_sharing(config, params, batch.inputs, balance.expert_bias_GNE, None, factors)
        losses_BS = head.token_losses(batch.targets)
        counted_BS = batch.weights > 0

        def by_layer(counts_GNAE: jax.Array) -> jax.Array:
            return jnp.sum(counts_GNAE, axis=2).reshape(config.model.num_layers, -1)

        return EvalSums(
            loss_B=jnp.sum(losses_BS * batch.weights, axis=1),
            tokens_B=jnp.sum(batch.weights, axis=1),
            bytes_B=jnp.sum(jnp.where(counted_BS, token_bytes_V[batch.targets], 0), axis=1),
            counts_LE=by_layer(stats.counts_AE),
            unfaded_counts_LE=None if stats.unfaded_counts_AE is None else by_layer(stats.unfaded_counts_AE),
        )

    return jax.jit(eval_step) if mesh is None else jax.jit(eval_step, out_shardings=replicated(mesh))
