"""What the backward pass recomputes. Decided here and nowhere else.

| model.remat | kept for the backward pass |
|---|---|
| `none` | every activation |
| `moe` | all but the activations inside the mixture block of each layer |
| `full` | the input of each layer |

Apart from `model.remat`, with several pools over mesh.fsdp the gathered weights are not kept: gathering the weights of
one pool again costs less memory than keeping those of all.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, ParamSpec, TypeVar

import jax
from flax import linen as nn

from unipool_jax.config.schema import Config
from unipool_jax.parallel.mesh import GATHERED

Arguments = ParamSpec("Arguments")
Result = TypeVar("Result")


def recompute(function: Callable[Arguments, Result]) -> Callable[Arguments, Result]:
    """`function`, with its arguments as all that the backward pass keeps of it.

    `jax.checkpoint` alone would not do: the policy of a surrounding `jax.checkpoint` also decides for those inside it.
    As a custom derivative the inner one is out of its reach. For a body of a scan only, like `prevent_cse=False`.
    """

    @jax.custom_vjp
    def opaque(*arguments: Any) -> Any:
        return function(*arguments)  # type: ignore[call-arg]

    def forward(*arguments: Any) -> Any:
        return jax.vjp(jax.checkpoint(function, prevent_cse=False), *arguments)

    def backward(pullback: Any, cotangent: Any) -> Any:
        return pullback(cotangent)

    opaque.defvjp(forward, backward)
    return opaque  # type: ignore[return-value]


def rematerialised(
    config: Config, policy: Literal["moe", "full"], function: Callable[Arguments, Result]
) -> Callable[Arguments, Result]:
    """`function`, recomputed in the backward pass if model.remat is this policy."""
    return recompute(function) if config.model.remat == policy else function


def without_gathered_weights(config: Config, stage: type[nn.Module]) -> type[nn.Module]:
    """The module of one pool, which gathers its weights again in the backward pass where that saves memory."""
    if config.pool.groups == 1 or config.mesh.fsdp == 1:
        return stage
    policy = jax.checkpoint_policies.save_anything_except_these_names(GATHERED)
    return nn.remat(stage, prevent_cse=False, policy=policy)
