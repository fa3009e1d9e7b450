"""Computing a function again in the backward pass instead of keeping what is inside."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import jax

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
