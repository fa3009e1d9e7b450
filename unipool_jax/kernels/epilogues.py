"""Epilogues of grouped products: elementwise functions, in float32, of products that are still in registers.

Each takes the products, then any further inputs, and returns a tuple of outputs. All map zeros to zeros.
"""

import jax

One = tuple[jax.Array]
Three = tuple[jax.Array, jax.Array, jax.Array]


def unchanged(product: jax.Array) -> One:
    """The product itself."""
    return (product,)


def summed(first: jax.Array, second: jax.Array) -> One:
    """The sum of two products."""
    return (first + second,)


def gated(gate: jax.Array, up: jax.Array) -> One:
    """The hidden activations of SwiGLU, `silu(gate) * up` (Shazeer 2020, arXiv:2002.05202)."""
    return (jax.nn.silu(gate) * up,)


def gated_and_products(gate: jax.Array, up: jax.Array) -> Three:
    """`gated`, and the two products, which its derivative needs."""
    return *gated(gate, up), gate, up


def gated_backward(hidden_grad: jax.Array, gate: jax.Array, up: jax.Array) -> Three:
    """`gated`, and its derivatives by gate and by up times `hidden_grad`."""
    sigmoid = jax.nn.sigmoid(gate)
    silu = gate * sigmoid
    return silu * up, hidden_grad * up * (sigmoid + silu * (1 - sigmoid)), hidden_grad * silu
