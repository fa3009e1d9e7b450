"""What the backward pass recomputes. Decided here and nowhere else.

| model.remat | kept for the backward pass |
|---|---|
| `none` | every activation |
| `router` | all but the scores of the router and what is computed of them: choices, gates and statistics |
| `experts` | all but the gate and up products of the experts: no exchange of rows is repeated |
| `attention` | all but the activations inside the attention block of each layer |
| `moe` | all but the activations inside the mixture block of each layer |
| `full` | the input of each layer |

`experts` is done where those products are made (`kernels.grouped_ffn`), `router` in `moe.mixture`. With several pools
over mesh.fsdp, `moe` and `full` do not keep gathered weights either: the backward pass gathers those of one pool at a
time. So the TPU compiler has it (`tests/test_planner.py`); with `moe`, the compiler for CPUs gathers what is kept.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, TypeVar

import jax.extend
from flax import linen as nn

from unipool_jax.config.schema import Config
from unipool_jax.kernels.recompute import recompute

Result = TypeVar("Result")


def rematerialized(
    config: Config,
    policy: Literal["attention", "moe", "full"],
    function: Callable[..., Result],
    differentiated: Callable[..., Result] | None = None,
    *,
    in_pool: bool = True,
) -> Callable[..., Result]:
    """`function`, recomputed in the backward pass if model.remat is this policy and nothing around it is recomputed.

    Args:
      config: of the model.
      policy: the value of model.remat that recomputes the function.
      function: of positional arguments.
      differentiated: see `kernels.recompute`; not used where a pool is recomputed with its only layer.
      in_pool: whether it is part of a pool's layers, which may be recomputed as a whole.
    """
    around = in_pool and recomputes_pool(config, config.mesh.fsdp)
    return recompute(function, differentiated) if config.model.remat == policy and not around else function


def regathers(config: Config, fsdp: int) -> bool:
    """Whether the backward pass gathers the weights of each pool again over so many devices; see above."""
    return config.pool.groups > 1 and fsdp != 1 and config.model.remat in ("moe", "full")


def without_gathered_weights(config: Config, stage: type[nn.Module]) -> type[nn.Module]:
    """The module of one pool, whose gathered weights are not kept if the backward pass `regathers`."""
    if not regathers(config, fsdp := config.mesh.fsdp):
        return stage
    return nn.remat(stage, prevent_cse=False, policy=None if recomputes_pool(config, fsdp) else _all_but_placements)


def recomputes_pool(config: Config, fsdp: int) -> bool:
    """Whether a pool is recomputed with its only layer."""
    return regathers(config, fsdp) and config.model.remat == "full" and config.layers_per_pool == 1


def _all_but_placements(primitive: jax.extend.core.Primitive, *_: Any, **__: Any) -> bool:
    """Keep every value but results of sharding constraints and barriers; their operands are kept instead.

    A gathered weight is the result of a constraint, and passes a barrier (`moe.beside_attention`). Naming gathered
    weights would not do: a name is an operation of its own, and its operand, gathered, would be kept.
    """
    return primitive.name not in ("sharding_constraint", "optimization_barrier")
