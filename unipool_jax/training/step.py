"""One optimizer step, and one evaluation step, as pure functions of the training state and a batch.

    train_step = accumulate gradients over micro-batches, then update

Each is a function below; `make_train_step` compiles them.
"""

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
from unipool_jax.kernels.grouped_ffn import Bank, Carried
from unipool_jax.model.transformer import LayerInputs, Positions, apply
from unipool_jax.moe.balance import entropy_loss, load_fractions, pool_loss, switch_loss, updated_expert_bias, z_loss
from unipool_jax.moe.bank import Experts, gathered_bank, gradient_accumulator
from unipool_jax.moe.capacity import overflow
from unipool_jax.moe.lock import entropy_coefficient, faded
from unipool_jax.moe.products import kept_products, settled
from unipool_jax.moe.routing import RoutingStats
from unipool_jax.moe.scope import pool_scope, scoped_load, scoped_pool_loss
from unipool_jax.parallel.mesh import compiler_options, constrain, on_mesh
from unipool_jax.training.distillation import Teacher, taught_loss
from unipool_jax.training.optimizer import next_learning_rate, run_optimizer
from unipool_jax.training.sharding import replicated, state_shardings
from unipool_jax.training.state import BalanceState, TrainState, join_bank, layer_inputs, split_bank, state_shapes
from unipool_jax.training.switching import switch_penalty, zero_gate_metrics

Metrics = dict[str, jax.Array]
TrainStep = Callable[..., tuple[TrainState, Metrics]]
"""Of a state, a batch and, with distill.teacher, a teacher."""


class EvalSums(NamedTuple):
    """Sums over the tokens of each sequence, so that totals do not depend on the batch size."""

    loss_B: jax.Array
    """Language-model loss in nats, float32."""
    tokens_B: jax.Array
    """Predicted tokens (weight 1), float32."""
    bytes_B: jax.Array
    """UTF-8 bytes of the predicted tokens, int32."""
    counts_LE: jax.Array
    """Choices per layer and expert, int32 `[L, E]`, of the positions whose targets are predicted."""
    unfaded_counts_LE: jax.Array | None
    """The same without the fade of a lock that is under way; None in runs without one."""
    zero_gates_L: jax.Array
    """Predicted tokens whose gates are all zero, per layer, int32."""


class MicroBatch(NamedTuple):
    """What the gradient of one micro-batch depends on besides the parameters."""

    batch: Batch
    balance: BalanceState
    step: jax.Array
    """Completed steps, int32."""
    load_GE: jax.Array | None
    """Share of choices per expert in the pool loss; None: that of the micro-batch itself."""
    total_weight: jax.Array
    """Sum of the weights of the whole batch."""
    teacher: Teacher | None = None
    """Whose distributions the model learns, with distill.teacher."""


class Gradients(NamedTuple):
    """What a step accumulates over its micro-batches."""

    params: Any
    """Gradient of the parameters, without the bank where all layers share one."""
    accumulator: Bank | None
    """Cotangent of the accumulator of that bank, `[1, ...]`: see `moe.bank.Experts`."""
    metrics: Metrics
    counts_GNE: jax.Array
    """Choices per layer and expert, int32."""
    load_GE: jax.Array
    """Share of choices per expert in the last micro-batch."""


Accumulate = Callable[[Config, Mesh | None, TrainState, Batch, Any, Experts | None], Gradients]
"""`accumulated_gradients`, or what does the same for layers that are unrolled (`growth_step`)."""


def shares_one_bank(config: Config) -> bool:
    """Whether all layers share one bank, which is then gathered, and its gradient scattered, once a step."""
    return config.pool.groups == 1 and config.moe.router != "none"


def counts_before_gradient(config: Config) -> bool:
    """Whether a step makes a forward pass over its micro-batches before their gradients, to count expert use.

    The exact pool loss multiplies two averages over the whole batch, or over a group of micro-batches, and the first
    must be known before the gradient of the second is taken.
    """
    return _pool_loss(config, "current") and config.num_microbatches > config.loss.balance_groups


def _pool_loss(config: Config, statistics: str) -> bool:
    return config.loss.balance == "pool" and config.loss.pool_statistics == statistics


def balance_loss(config: Config, stats: RoutingStats, micro: MicroBatch) -> jax.Array:
    """The balance loss of one micro-batch, float32."""
    loss, load_GE = config.loss, micro.load_GE
    tokens = config.train.microbatch_size * config.data.sequence_length
    if loss.balance == "switch":
        group_tokens = loss.switch_group_sequences * config.data.sequence_length
        return switch_loss(stats, group_tokens, config.moe.top_k, loss.switch_coefficient, config.widths)
    if loss.balance == "pool":
        # In a locked layer each of f and P is L times what it is as a mean over the layers of the pool (method M6.7).
        coefficient: float | jax.Array = loss.pool_coefficient / (config.mixture_layers if config.locked else 1)
        if loss.pool_warmup_fraction:
            risen = micro.step.astype(jnp.float32) / (loss.pool_warmup_fraction * config.train.lengths[0])
            coefficient = coefficient * jnp.minimum(risen, 1.0)
        scope, parts = pool_scope(config), config.balance_parts

        def of_part(counts_GNAE: jax.Array, score_sum_GNAE: jax.Array) -> jax.Array:
            part = stats._replace(counts_AE=counts_GNAE, score_sum_AE=score_sum_GNAE)
            load = load_shares(config, counts_GNAE) if load_GE is None else load_GE
            if scope is not None:
                return scoped_pool_loss(scope, part, load, tokens // parts, coefficient)
            return pool_loss(part, load, tokens // parts, coefficient)

        if parts == 1:
            return of_part(stats.counts_AE, stats.score_sum_AE)
        by_part = [values[:, :, :, None] for values in (stats.counts_AE, stats.score_sum_AE)]
        return jnp.mean(jax.vmap(of_part, in_axes=2)(*by_part))
    return jnp.zeros((), jnp.float32)


def load_shares(config: Config, counts_GNAE: jax.Array) -> jax.Array:
    """Share of choices per expert in the pool loss, float32: `[G, E]`, or as `loss.scope` says `[S, M]`."""
    scope = pool_scope(config)
    return load_fractions(counts_GNAE) if scope is None else scoped_load(scope, counts_GNAE)


def micro_batch_loss(
    params: Any, carried: Carried, config: Config, mesh: Mesh | None, weights: Bank | None, micro: MicroBatch
) -> tuple[tuple[jax.Array, Carried], tuple[Metrics, RoutingStats]]:
    """The loss of one micro-batch, scaled so that its mean over micro-batches is the loss of the whole batch.

    Args:
      params: of the model, without the bank where `weights` are given.
      carried: what layers keep for the backward pass, and with `weights` their accumulator.
      config: of the run.
      mesh: of the run.
      weights: of a bank that all layers share, `[1, ...]`.
      micro: the micro-batch.

    Returns:
      Loss and what is carried, which are differentiated; metrics and routing statistics, which are not.
    """
    experts = None if weights is None else Experts(weights, carried.accumulator)
    inputs = layer_inputs(config, micro.balance, micro.step)
    positions = Positions(segments=micro.batch.segments)
    output = apply(config, params, micro.batch.inputs, inputs, positions, experts, products=carried.products)
    stats = output.layers.stats
    tokens = config.train.microbatch_size * config.data.sequence_length
    # Averaged over micro-batches this is the mean over all tokens of the batch, even with uneven weights.
    parts: Metrics = {}
    if micro.teacher is None:
        learned = output.head.weighted_loss(micro.batch.targets, micro.batch.weights)
    else:
        learned, parts = taught_loss(config.distill, output.head, micro.teacher, micro.batch)
    losses = {
        "loss/lm": learned * config.num_microbatches / micro.total_weight,
        "loss/balance": balance_loss(config, stats, micro),
        "loss/z": z_loss(stats, tokens, config.loss.z_coefficient),
    }
    if config.lock.ownership != "none":
        distance = entropy_loss(stats, tokens, config.lock.entropy_target)
        losses["loss/entropy"] = entropy_coefficient(config, micro.step) * distance
    gates: Metrics = {}
    if (switched := output.switched) is not None:
        tokens_penalty, gates = switch_penalty(config, switched, output.head, micro.batch)
        losses["loss/switch"] = tokens_penalty * config.num_microbatches / micro.total_weight
    total = functools.reduce(jnp.add, losses.values())
    metrics = losses | {
        **{name: part * config.num_microbatches / micro.total_weight for name, part in parts.items()},
        "loss/total": total,
        "overflow": overflow(config, mesh, stats.received_X),
        "received_L": jnp.max(stats.received_X, axis=-1).reshape(-1),
        "zero_gates_L": jnp.sum(stats.zero_gates_A, axis=-1).reshape(-1),
        **gates,
    }
    passed_on = Carried(None if output.experts is None else output.experts.accumulator, output.products)
    return (total, passed_on), (metrics, jax.lax.stop_gradient(stats))


def micro_batch_gradients(
    config: Config, mesh: Mesh | None, params: Any, experts: Experts | None, gradient: Bank | None, micro: MicroBatch
) -> Gradients:
    """Gradients of one micro-batch over the number of micro-batches; those of a shared bank are added to `gradient`."""
    weights, accumulator = (None, None) if experts is None else (experts.weights, experts.accumulator)
    carried = Carried(accumulator, kept_products(config))
    loss = functools.partial(micro_batch_loss, config=config, mesh=mesh, weights=weights, micro=micro)
    (_, passed_on), pullback, (metrics, stats) = jax.vjp(loss, params, carried, has_aux=True)
    # The backward pass finds the products that the forward pass kept where it finds gradients.
    found = passed_on._replace(accumulator=gradient)
    grads, found = pullback((jnp.full((), 1 / config.num_microbatches, jnp.float32), found))
    gradient = None if found.accumulator is None else settled(found.accumulator, found.products)
    return Gradients(grads, gradient, metrics, jnp.sum(stats.counts_AE, axis=2), load_shares(config, stats.counts_AE))


def batch_loads(config: Config, params: Any, experts: Experts | None, inputs: LayerInputs, micros: Batch) -> jax.Array:
    """Share of choices per expert, for each micro-batch `[m, ...]` that of its balance group, by a forward pass."""

    def count(carry: None, micro: Batch) -> tuple[None, jax.Array]:
        output = apply(config, params, micro.inputs, inputs, Positions(segments=micro.segments), experts)
        return carry, output.layers.stats.counts_AE

    counts_mGNAE = jax.lax.scan(count, None, micros)[1]
    groups = config.loss.balance_groups
    by_group = jnp.sum(counts_mGNAE.reshape(groups, -1, *counts_mGNAE.shape[1:]), axis=1)
    loads = jax.vmap(functools.partial(load_shares, config))(by_group)
    return jnp.repeat(loads, config.num_microbatches // groups, axis=0)


def load_before(config: Config, last: jax.Array) -> jax.Array | None:
    """The load fractions in the loss of a micro-batch, where those of the batch are not counted first.

    Either `last`, those of the micro-batch before it, or None, its own.
    """
    return last if _pool_loss(config, "previous") else None


def batch_gradients(
    config: Config,
    mesh: Mesh | None,
    state: TrainState,
    batch: Batch,
    teacher: Teacher | None = None,
    accumulated: Accumulate | None = None,
) -> Gradients:
    """Gradients and losses averaged over the micro-batches of a batch; those of a shared bank are among `params`.

    `accumulated` takes the place of `accumulated_gradients`.
    """
    accumulated = accumulated or functools.partial(accumulated_gradients, teacher=teacher)
    if not shares_one_bank(config):
        return accumulated(config, mesh, state, batch, state.params, None)
    params, bank = split_bank(state.params)
    accumulator, to_bank = jax.vjp(gradient_accumulator, bank)
    experts = Experts(gathered_bank(bank, config.model.compute_dtype), accumulator)
    # The model scans over pools, of which this is the one.
    found = accumulated(config, mesh, state, batch, params, jax.tree.map(lambda x: x[None], experts))
    (bank_gradient,) = to_bank(jax.tree.map(lambda x: x[0], found.accumulator))
    return found._replace(params=join_bank(found.params, bank_gradient), accumulator=None)


def accumulated_gradients(
    config: Config,
    mesh: Mesh | None,
    state: TrainState,
    batch: Batch,
    params: Any,
    experts: Experts | None,
    teacher: Teacher | None = None,
) -> Gradients:
    """`batch_gradients` for `params` without the bank of `experts`, whose gradient stays in `accumulator`."""
    balance, load_GE = state.balance, state.balance.previous_load_GE
    gradient = None if experts is None else jax.tree.map(jnp.zeros_like, experts.accumulator)
    micro_batch = functools.partial(
        MicroBatch, balance=balance, step=state.step, total_weight=jnp.sum(batch.weights), teacher=teacher
    )
    gradients_of = functools.partial(micro_batch_gradients, config, mesh, params, experts)
    if config.num_microbatches == 1:
        return gradients_of(gradient, micro_batch(batch, load_GE=load_before(config, load_GE)))

    micros, load_mGE = micro_batches(config, batch), None
    if counts_before_gradient(config):
        load_mGE = batch_loads(config, params, experts, layer_inputs(config, balance, state.step), micros)

    def accumulate(total: Gradients, part: tuple[Batch, jax.Array | None]) -> tuple[Gradients, None]:
        micro, load = part
        load = load_before(config, total.load_GE) if load is None else load
        found = gradients_of(total.accumulator, micro_batch(micro, load_GE=load))
        return added(config, total, found), None

    start = no_gradients(config, params, balance, load_GE)._replace(accumulator=gradient)
    total, _ = jax.lax.scan(accumulate, start, (micros, load_mGE))
    return averaged(config, total)


def micro_batches(config: Config, batch: Batch) -> Batch:
    """Rows of a batch as `[m, rows / m, ...]`, each micro-batch over all devices."""

    def split(rows: jax.Array) -> jax.Array:
        micros = rows.reshape(config.num_microbatches, -1, *rows.shape[1:])
        return constrain(micros, None, "batch", *(None,) * (rows.ndim - 1))

    divided: Batch = jax.tree.map(split, batch)
    return divided


def no_gradients(config: Config, params: Any, balance: BalanceState, load_GE: jax.Array) -> Gradients:
    """What a step has accumulated before its first micro-batch."""
    return Gradients(
        params=jax.tree.map(jnp.zeros_like, params),
        accumulator=None,
        metrics=_zero_metrics(config),
        counts_GNE=jnp.zeros(balance.expert_bias_GNE.shape, jnp.int32),
        load_GE=load_GE,
    )


def added(config: Config, total: Gradients, found: Gradients) -> Gradients:
    """`total` with what a micro-batch found; its load is that of the whole batch, or of the last micro-batch."""
    return Gradients(
        params=jax.tree.map(jnp.add, total.params, found.params),
        accumulator=found.accumulator,
        metrics={name: _combined(name, total.metrics[name], value) for name, value in found.metrics.items()},
        counts_GNE=total.counts_GNE + found.counts_GNE,
        load_GE=total.load_GE if counts_before_gradient(config) else found.load_GE,
    )


def averaged(config: Config, total: Gradients) -> Gradients:
    """`total` of all micro-batches, with losses as means over them."""
    scaled = {n: v / config.num_microbatches if n.startswith("loss/") else v for n, v in total.metrics.items()}
    return total._replace(metrics=scaled)


def _combined(name: str, total: jax.Array, value: jax.Array) -> jax.Array:
    """A metric of several micro-batches: the maximum of rows received, the sum of everything else."""
    return jnp.maximum(total, value) if name == "received_L" else total + value


def _zero_metrics(config: Config) -> Metrics:
    """The metrics of `micro_batch_loss` before the first micro-batch."""
    losses = ["loss/lm", "loss/balance", "loss/z", "loss/total"]
    if config.lock.ownership != "none":
        losses.append("loss/entropy")
    if config.attention.kind == "switch":
        losses.append("loss/switch")
    if config.distill.teacher is not None:
        losses.append("loss/distill")
    return dict.fromkeys(losses, jnp.zeros((), jnp.float32)) | {
        "overflow": jnp.zeros((), jnp.int32),
        "received_L": jnp.zeros(config.mixture_layers, jnp.int32),
        "zero_gates_L": jnp.zeros(config.mixture_layers, jnp.int32),
        **zero_gate_metrics(config),
    }


def updated_balance(config: Config, balance: BalanceState, found: Gradients) -> BalanceState:
    """The balance state after a step that found these counts."""
    if _pool_loss(config, "previous"):
        balance = balance._replace(previous_load_GE=found.load_GE)
    if config.loss.balance == "expert_bias":
        rate, widths = config.loss.expert_bias_rate, config.widths
        bias_GNE = updated_expert_bias(balance.expert_bias_GNE, found.counts_GNE, rate, widths)
        balance = balance._replace(expert_bias_GNE=bias_GNE)
    return balance


def updated_state(
    config: Config, state: TrainState, balance: BalanceState, found: Gradients
) -> tuple[TrainState, Metrics]:
    """The state after a step with these gradients, and the metrics that come with it.

    Args:
      config: of the run.
      state: before the step.
      balance: that of the step, whose lock may have faded since `state`.
      found: by `batch_gradients`.
    """
    grad_norm = optax.tree.norm(found.params)
    finite = jnp.isfinite(found.metrics["loss/total"]) & jnp.isfinite(grad_norm)
    applied = finite if config.mesh.overflow == "drop" else finite & (found.metrics["overflow"] == 0)

    optimizer = run_optimizer(config)
    updates, opt_state = optimizer.update(found.params, state.opt_state, state.params)
    changed = (optax.apply_updates(state.params, updates), opt_state, updated_balance(config, balance, found))
    kept = (state.params, state.opt_state, state.balance)
    params, opt_state, balance = jax.tree.map(lambda new, old: jnp.where(applied, new, old), changed, kept)

    metrics = found.metrics | {
        "grad_norm": grad_norm,
        "learning_rate": next_learning_rate(config.optimizer, config.train.lengths, state.opt_state),
        "finite": finite,
        "counts_LE": found.counts_GNE.reshape(config.mixture_layers, -1),
    }
    router = params["pools"]["layers"].get("mixture", {})
    if "scale" in router:
        metrics["router_scale_L"] = router["scale"].reshape(-1)
    return TrainState(state.step + 1, params, opt_state, balance), metrics


def train_step(
    config: Config, mesh: Mesh | None, state: TrainState, batch: Batch, teacher: Teacher | None = None
) -> tuple[TrainState, Metrics]:
    """One optimizer step: see `make_train_step`."""
    balance = state.balance._replace(lock=faded(config, state.balance.lock, state.step))
    found = batch_gradients(config, mesh, state._replace(balance=balance), batch, teacher)
    return updated_state(config, state, balance, found)


def make_train_step(config: Config, mesh: Mesh | None = None) -> TrainStep:
    """The jitted training step of a state, a batch and, with distill.teacher, a teacher.

    It donates the state it is given. With a mesh, call it under `jax.set_mesh(mesh)`.

    The batch is split into `train.batch_size / train.microbatch_size` micro-batches. Losses, gradients and balance
    statistics are those of the whole batch, whatever their number, but for two losses that are published as those of a
    micro-batch (`Config.microbatch_loss`) and are averaged over micro-batches here: the pool loss with
    `loss.pool_statistics=previous`, and the entropy loss of a lock, which measures the mean scores of a micro-batch.

    When the loss or a gradient is not finite, or rows overflow a receive buffer and `mesh.overflow=stop`, parameters,
    optimizer and balance state stay as they were and only the step count moves on.

    Metrics: `loss/lm`, `loss/balance`, `loss/z`, `loss/total` (float32, nats), with UniPool-lock `loss/entropy`,
    with a teacher `loss/distill`, with attention.kind=switch `loss/switch` and `switching.gate_metrics`,
    `grad_norm`, `learning_rate`, `finite` (bool), `overflow` (rows, int32), `received_L` (int32, rows received by the
    busiest device of any micro-batch), `counts_LE` (int32), `zero_gates_L` (int32, tokens whose gates are all zero),
    and, of routers with a scale, `router_scale_L`.
    """
    config = on_mesh(config, mesh)
    step = functools.partial(train_step, config, mesh)
    if mesh is None:
        return jax.jit(step, donate_argnums=0)
    places = (state_shardings(config, mesh, state_shapes(config)), replicated(mesh))
    options = compiler_options(config.mesh) or None
    return jax.jit(step, donate_argnums=0, out_shardings=places, compiler_options=options)


def make_eval_step(
    config: Config, mesh: Mesh | None = None
) -> Callable[[Any, BalanceState, Batch, jax.Array], EvalSums]:
    """The jitted evaluation step: `(params, balance, batch, token_bytes_V) -> EvalSums`; changes no state.

    `token_bytes_V` is the UTF-8 length of each token, int32, of the tokenizer's or the padded vocabulary. Over a mesh
    receive buffers take whatever comes: rows of padding are alike and may all go to one expert.
    """
    config = dataclasses.replace(config, mesh=dataclasses.replace(config.mesh, capacity_factor=math.inf))

    def eval_step(params: Any, balance: BalanceState, batch: Batch, token_bytes_V: jax.Array) -> EvalSums:
        counted_BS = jnp.asarray(batch.weights) > 0
        positions = Positions(counted_BS=counted_BS, segments=batch.segments)
        output = apply(config, params, batch.inputs, layer_inputs(config, balance), positions)
        stats = output.layers.stats
        losses_BS = output.head.token_losses(batch.targets)

        def by_layer(counts_GNAE: jax.Array) -> jax.Array:
            return jnp.sum(counts_GNAE, axis=2).reshape(config.mixture_layers, -1)

        return EvalSums(
            loss_B=jnp.sum(losses_BS * batch.weights, axis=1),
            tokens_B=jnp.sum(batch.weights, axis=1),
            bytes_B=jnp.sum(jnp.where(counted_BS, token_bytes_V[batch.targets], 0), axis=1),
            counts_LE=by_layer(stats.counts_AE),
            unfaded_counts_LE=None if stats.unfaded_counts_AE is None else by_layer(stats.unfaded_counts_AE),
            zero_gates_L=jnp.sum(stats.zero_gates_A, axis=-1).reshape(-1),
        )

    return jax.jit(eval_step) if mesh is None else jax.jit(eval_step, out_shardings=replicated(mesh))
