"""The training state: what a run needs to go on, besides its configuration."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from unipool_jax.config.schema import Config
from unipool_jax.kernels.grouped_ffn import Bank
from unipool_jax.model.transformer import LayerInputs, initial_parameters
from unipool_jax.moe.lock import Candidate, init_candidate, score_factors
from unipool_jax.moe.mixture import Selection
from unipool_jax.moe.opening import open_experts
from unipool_jax.moe.scope import pool_scope
from unipool_jax.training.optimizer import run_optimizer
from unipool_jax.training.sharding import state_shardings


class BalanceState(NamedTuple):
    """State of expert balancing that no gradient touches; saved in checkpoints."""

    expert_bias_GNE: jax.Array
    """Selection bias per layer and expert, float32; stays zero unless loss.balance is `expert_bias`."""
    previous_load_GE: jax.Array
    """Share of choices per expert in the last micro-batch, float32, `[S, M]` with `moe.scope`; zeros before the first
    one, and unless loss.pool_statistics is `previous`."""
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


def init_balance(config: Config) -> BalanceState:
    """Balance state of a new run."""
    groups, experts = config.pool.groups, config.experts_per_pool
    scope = pool_scope(config)
    return BalanceState(
        expert_bias_GNE=jnp.zeros((groups, config.layers_per_pool, experts), jnp.float32),
        previous_load_GE=jnp.zeros((groups, experts) if scope is None else scope.weight_SM.shape, jnp.float32),
        lock=init_candidate(config),
    )


def init_state(config: Config, key: jax.Array) -> TrainState:
    """State before the first step; traceable, so `jax.eval_shape` gives its structure without memory."""
    balance = init_balance(config)
    # As many rows as divide over a mesh.
    tokens_BS = jnp.zeros((config.train.microbatch_size, 2), jnp.int32)
    params = initial_parameters(config, key, tokens_BS, layer_inputs(config, balance))
    return new_state(config, params, balance.expert_bias_GNE)


def new_state(config: Config, params: Any, expert_bias_GNE: jax.Array) -> TrainState:
    """State before the first step of a run that starts with these parameters; traceable."""
    opt_state = run_optimizer(config).init(params)
    balance = init_balance(config)._replace(expert_bias_GNE=expert_bias_GNE)
    return TrainState(jnp.zeros((), jnp.int32), params, opt_state, balance)


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


def layer_inputs(config: Config, balance: BalanceState, step: jax.Array | None = None) -> LayerInputs:
    """What every layer of the model is given: its part of the balance state, and in training, after `step` completed
    steps, which experts of its window are open."""
    factor_GNE = score_factors(config, balance.lock)
    if factor_GNE is None and step is not None:
        factor_GNE = open_experts(config, step)
    return LayerInputs(Selection(balance.expert_bias_GNE, factor_GNE))


def split_bank(params: Any) -> tuple[Any, Bank]:
    """Parameters of a model with one pool, without its bank; and the bank, `[E, ...]`."""
    rest, pools = dict(params), dict(params["pools"])
    bank = pools.pop("bank")
    return rest | {"pools": pools}, Bank(bank["gate"][0], bank["up"][0], bank["down"][0])


def join_bank(params: Any, bank: Bank) -> Any:
    """The inverse of `split_bank`, for parameters or gradients."""
    weights = {"gate": bank.gate_EDF[None], "up": bank.up_EDF[None], "down": bank.down_EFD[None]}
    return params | {"pools": params["pools"] | {"bank": weights}}
