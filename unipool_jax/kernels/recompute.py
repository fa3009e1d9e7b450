"""Computing a function again in the backward pass instead of keeping what is inside."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import jax

Result = TypeVar("Result")


def recompute(
    function: Callable[..., Result], differentiated: Callable[..., Result] | None = None
) -> Callable[..., Result]:
    """`function` of positional arguments, of which the backward pass keeps nothing but those arguments.

    For the body of a scan: elsewhere the compiler may merge the recomputation with the forward pass. `differentiated`
    is what the backward pass computes and differentiates in its place, to the same values.
    """

    # `jax.checkpoint` alone would not do: the policy of a surrounding `jax.checkpoint` overrides those inside it. It
    # does not reach into a custom derivative.
    @jax.custom_vjp
    def opaque(*arguments: Any) -> Result:
        return function(*arguments)

    def forward(*arguments: Any) -> tuple[Result, Any]:
        # Not the result of `differentiated`, of which nothing is left here: arrays that it makes to write into are the
        # same in every turn of a scan, so JAX would take them out of the loop, and the compiler copy them each time.
        result, pullback = jax.vjp(jax.checkpoint(differentiated or function, prevent_cse=False), *arguments)
        return (result if differentiated is None else function(*arguments)), pullback

    def backward(pullback: Any, cotangent: Any) -> Any:
        return pullback(cotangent)

    opaque.defvjp(forward, backward)
    return opaque


@jax.custom_vjp
def handed_back(result: Result, written: Any) -> Result:
    """`result`; in the backward pass the cotangent of `written` is `written`, the arrays themselves.

    For a function that finds what its forward pass wrote where it finds gradients: see `grouped_ffn.stacking_ffn`.
    """
    return result


def _handed_back_forward(result: Result, written: Any) -> tuple[Result, Any]:
    return result, written


def _handed_back_backward(written: Any, cotangent: Any) -> tuple[Any, Any]:
    return cotangent, written


handed_back.defvjp(_handed_back_forward, _handed_back_backward)
