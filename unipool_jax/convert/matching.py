"""Which expert of one bank does most nearly what an expert of another does, on what that one is given.

The cost of expert e' of bank a in the place of expert e of bank b, over inputs x of e with squared gates w, is

    C[e, e'] = sum w |E_b,e(x) - E_a,e'(x)|^2 / sum w |E_b,e(x)|^2

and the Hungarian algorithm finds the bijection with the smallest sum of costs (marin, issue 8032).
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from scipy.optimize import linear_sum_assignment

from unipool_jax.convert.reservoirs import Sample
from unipool_jax.kernels.grouped_ffn import Bank


def expert_output(expert: Bank, inputs_RD: jax.Array) -> jax.Array:
    """`(silu(x gate) * (x up)) down` of one expert, its arrays without the axis of experts, float32 `[R, D]`."""
    gate_DF, up_DF, down_FD = expert
    return (jax.nn.silu(inputs_RD @ gate_DF) * (inputs_RD @ up_DF)) @ down_FD


@jax.jit
def _costs(own: Bank, other: Bank, inputs_ERD: jax.Array, weights_ER: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Numerators of C `[E, E']` and its denominators `[E]`."""

    # One pair at a time: all at once would take E^2 times the memory of a reservoir.
    def of_expert(arguments: tuple[Bank, jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        expert, inputs_RD, weights_R = arguments
        wanted_RD = expert_output(expert, inputs_RD)

        def distance(candidate: Bank) -> jax.Array:
            return weights_R @ jnp.sum(jnp.square(wanted_RD - expert_output(candidate, inputs_RD)), axis=-1)

        return jax.lax.map(distance, other), weights_R @ jnp.sum(jnp.square(wanted_RD), axis=-1)

    return jax.lax.map(of_expert, (own, inputs_ERD, weights_ER))


def costs(own: Bank, other: Bank, sample: Sample) -> tuple[np.ndarray, np.ndarray]:
    """C of the experts of `own`, by expert of `other`, `[E, E']`, and what the outputs of each amount to, `[E]`.

    The latter is the sum of w |E(x)|^2 over all inputs that `sample` stands for: the sum over experts of it times C is
    the squared error of a layer's output. Both are float64. C is NaN for an expert without inputs.
    """
    found = _costs(own, other, jnp.asarray(sample.inputs_ERD), jnp.asarray(sample.weights_ER))
    distance_EE, energy_E = (np.asarray(array, np.float64) for array in found)
    rows_E = np.minimum(sample.shown_E, sample.weights_ER.shape[1])
    with np.errstate(invalid="ignore", divide="ignore"):
        return distance_EE / energy_E[:, None], np.where(rows_E > 0, energy_E / rows_E * sample.shown_E, 0.0)


def match(own: Bank, other: Bank, sample: Sample) -> np.ndarray:
    """The expert of `other` that takes the place of each expert of `own`, a bijection, int64 `[E]`.

    An expert without inputs is compared on those of the others.
    """
    unused_E = np.all(sample.weights_ER == 0, axis=1)
    if unused_E.all():
        return np.arange(len(unused_E))
    if unused_E.any():
        sample = _with_common(sample, unused_E)
    found: np.ndarray = linear_sum_assignment(costs(own, other, sample)[0])[1]
    return found


def _with_common(sample: Sample, unused_E: np.ndarray) -> Sample:
    """`sample` with inputs of all used experts in turn, of equal weight, for each of the others."""
    rows, used = sample.weights_ER.shape[1], np.flatnonzero(~unused_E)
    expert_R, row_R = used[np.arange(rows) % len(used)], np.arange(rows) // len(used)
    inputs_ERD, weights_ER = sample.inputs_ERD.copy(), sample.weights_ER.copy()
    inputs_ERD[unused_E] = sample.inputs_ERD[expert_R, row_R]
    weights_ER[unused_E] = sample.weights_ER[expert_R, row_R] > 0
    return Sample(inputs_ERD, weights_ER, sample.shown_E)
