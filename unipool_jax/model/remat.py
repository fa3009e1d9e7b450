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
from typing import Any, Literal, TypeVar

import jax
from flax import linen as nn

from unipool_jax.config.schema import Config
from unipool_jax.parallel.mesh import GATHERED

Result = TypeVar("Result")


def recompute(function: Callable[..., Result]) -> Callable[..., Result]:
    """`function` of positional arguments, of which the backward pass keeps nothing but those arguments.

    For the body of a scan: elsewhere the compiler may merge the recomputation with the forward pass.
    """

    # `jax.checkpoint` alone would not do: the policy of a surrounding `jax.checkpoint` overrides those inside it. It
    # does not reach into a custom derivative.
    @jax.custom_vjp
    def opaque(*arguments: Any) -> Result:
        return function(*arguments)

    def forward(*arguments: Any) -> tuple[Result, Any]:
        return jax.vjp(jax.checkpoint(function, prevent_cse=False), *arguments)

    def backward(pullback: Any, cotangent: Any) -> Any:
        return pullback(cotangent)

    opaque.defvjp(forward, backward)
    return opaque


def rematerialized(
    config: Config, policy: Literal["moe", "full"], function: Callable[..., Result]
) -> Callable[..., Result]:
    """`function`, recomputed in the backward pass if model.remat is this policy."""
    return recompute(function) if config.model.remat == policy else function


def without_gathered_weights(config: Config, stage: type[nn.Module]) -> type[nn.Module]:
    """The module of one pool, which gathers its weights again in the backward pass where that saves memory."""
    if config.pool.groups == 1 or config.mesh.fsdp == 1:
        return stage
    policy = jax.checkpoint_policies.save_anything_except_these_names(GATHERED)
    return nn.remat(stage, prevent_cse=False, policy=policy)
