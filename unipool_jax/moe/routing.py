"""Routers: hidden states in, chosen experts, gates and routing statistics out.

NormRouter follows arXiv 2605.06665, equations 9-12; softmax and sigmoid are the baselines of the same paper.
Statistics are values, not side effects, so a loss over all layers and the whole batch can be exact.
"""

from __future__ import annotations

import functools
import warnings
from typing import Literal, NamedTuple, assert_never

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike, DTypeLike

from unipool_jax.config.schema import Router

_DRAWS = 100_000
_DRAW_SEED = 42
_DRAW_CHUNK = 10_000
_SIGMOID_EPSILON = 1e-20


class RoutingStats(NamedTuple):
    """What the balance losses need to know of one layer; the layer scan stacks them to `[G, L/G, ...]`.

    The A groups are equal runs of consecutive tokens: the Switch loss is computed within each.
    """

    counts_AE: jax.Array
    """Choices (token, slot) that went to each expert, int32 `[A, E]`."""
    score_sum_AE: jax.Array
    """Scores summed over the tokens of the group, float32 `[A, E]`; carries gradient."""
    z_square_sum_A: jax.Array
    """Squared logsumexp of the logits summed over the tokens of the group, float32 `[A]`; carries gradient."""
    zero_gates_A: jax.Array
    """Tokens whose gates are all zero, so that no expert adds anything to them, int32 `[A]`."""
    received_X: jax.Array
    """Rows received by each device for its experts, int32, one number for each of X parts of the batch; zeros until
    `mixture.moe_ffn` has dispatched the rows."""
    unfaded_counts_AE: jax.Array | None = None
    """`counts_AE` as they would be without score factors; None where there are none."""

    def grouped(self, num_groups: int) -> RoutingStats:
        """Statistics of fewer groups, each of equally many neighboring ones; any leading axes."""

        def add(values: jax.Array, axis: int) -> jax.Array:
            axis = values.ndim + axis
            shape = (*values.shape[:axis], num_groups, -1, *values.shape[axis + 1 :])
            return jnp.sum(values.reshape(shape), axis=axis + 1)

        unfaded = None if self.unfaded_counts_AE is None else add(self.unfaded_counts_AE, -2)
        sums = add(self.counts_AE, -2), add(self.score_sum_AE, -2), add(self.z_square_sum_A, -1)
        return RoutingStats(*sums, add(self.zero_gates_A, -1), self.received_X, unfaded)


class Routing(NamedTuple):
    """Where each token goes in one layer."""

    experts_NK: jax.Array
    """Chosen experts in descending order of the selection key, int32 `[N, k]`; ties go to the lowest index."""
    gates_NK: jax.Array
    """Factor on each chosen expert's output, float32 `[N, k]`."""
    stats: RoutingStats


def norm_scores(
    logits_NE: jax.Array, scale: jax.Array, constant: ArrayLike, epsilon: float = 1e-8, own: int | None = None
) -> jax.Array:
    """NormRouter scores `scale * c * relu(z / (|z| + epsilon))`, `[N, E]` in the dtype of the logits.

    The norm runs over all E logits of a token. Scores do not depend on the size of the logits, about half of them are
    zero at initialization, and they are not probabilities: they are deliberately not normalized. A token whose logits
    are all zero gets zero scores and zero gradients.

    Args:
      logits_NE: router logits.
      scale: learnable scalar of the layer.
      constant: c of equation 12, see `norm_constant`.
      epsilon: added to the norm.
      own: after a lock, how many experts, the first ones, have scores at all; the others' logits count in the norm.
    """
    square_N1 = jnp.sum(jnp.square(logits_NE.astype(jnp.float32)), axis=-1, keepdims=True)
    nonzero_N1 = square_N1 > 0
    # The root has an infinite slope at 0; the inner `where` keeps it out of the gradient.
    norm_N1 = jnp.where(nonzero_N1, jnp.sqrt(jnp.where(nonzero_N1, square_N1, 1.0)), 0.0).astype(logits_NE.dtype)
    direction_NE = logits_NE[:, :own] / (norm_N1 + jnp.asarray(epsilon, logits_NE.dtype))
    factor = scale.astype(logits_NE.dtype) * jnp.asarray(constant, logits_NE.dtype)
    return factor * jax.nn.relu(direction_NE)


def centered_logits(logits_NE: jax.Array, visible_E: ArrayLike | None = None) -> jax.Array:
    """Logits of each token minus their mean over the experts that the layer sees.

    Unless all of them are equal, one is then positive, so NormRouter leaves no token without a score. Not published.
    """
    wide_NE = logits_NE.astype(jnp.float32)
    return (wide_NE - jnp.mean(wide_NE, axis=-1, keepdims=True, where=visible_E)).astype(logits_NE.dtype)


@functools.cache
def norm_constant(num_experts: int, top_k: int) -> float:
    """NormRouter's constant c: the mean over 1e5 Gaussian draws of `1 / |top-k of relu(x / |x|)|` (equation 12).

    The draws are those of the published code (NumPy `RandomState(42)`, float64), so the value is the published one to
    rounding. Where a draw has no positive entry, as happens with few experts, the mean is infinite; the root mean
    square form `1 / sqrt(E |top-k|^2)` takes its place, with a warning.

    Args:
      num_experts: E, experts the router chooses from.
      top_k: experts chosen per token.
    """
    random = np.random.RandomState(_DRAW_SEED)
    energy = np.empty(_DRAWS)
    for start in range(0, _DRAWS, _DRAW_CHUNK):
        draws = random.randn(_DRAW_CHUNK, num_experts)
        positive = np.maximum(draws / np.linalg.norm(draws, axis=1, keepdims=True), 0.0)
        top = np.partition(positive, num_experts - top_k, axis=1)[:, num_experts - top_k :]
        energy[start : start + _DRAW_CHUNK] = np.square(top).sum(axis=1)
    if energy.min() > 0:
        return float(np.mean(1.0 / np.sqrt(energy)))
    constant = float(1.0 / np.sqrt(energy.mean()))
    warnings.warn(
        f"NormRouter over {num_experts} experts, top-{top_k}: the published constant is infinite; "
        f"using the root-mean-square value {constant:.5f}",
        stacklevel=2,
    )
    return constant


def route(
    scores_NE: jax.Array,
    logits_NE: jax.Array,
    *,
    router: Router,
    top_k: int,
    num_stat_groups: int = 1,
    expert_bias_E: jax.Array | None = None,
    score_factor_E: jax.Array | None = None,
    visible_E: ArrayLike | None = None,
    counted_N: jax.Array | None = None,
    normalized: bool = False,
) -> Routing:
    """Choose the `top_k` experts of each token.

    Gates are the chosen scores, not renormalized over the chosen experts, except for sigmoid with k > 1 (method M3.5).
    With `expert_bias_E` the bias takes part in the choice but not in the gate. Experts with a zero score may be chosen
    when fewer than k scores are positive; they get gate 0 and are counted.

    Args:
      scores_NE: scores, float32 or bfloat16.
      logits_NE: router logits, for the z statistic.
      router: which router made the scores.
      top_k: experts per token.
      num_stat_groups: A, equal runs of tokens for which statistics are kept apart; divides N.
      expert_bias_E: selection bias, float32, or None.
      score_factor_E: factor on the scores before anything else is done with them, float32, or None. An expert with
        factor 0 is not chosen, whatever its score (method M6.4).
      visible_E: the experts that the layer sees, bool: no other is chosen, nor are its logits part of the z statistic.
        None: all.
      counted_N: which tokens the statistics are about, bool; None is all of them. The others are routed all the same.
      normalized: whether the scores of a token are divided by their sum before they are summed over tokens.

    Returns:
      `Routing` with statistics of shape `[A, E]`.
    """
    own_NE = scores_NE
    if score_factor_E is not None:
        scores_NE = scores_NE * score_factor_E.astype(scores_NE.dtype)
    key_NE = jax.lax.stop_gradient(scores_NE)
    if expert_bias_E is not None:
        key_NE = key_NE.astype(jnp.float32) + expert_bias_E
    if score_factor_E is not None:
        key_NE = jnp.where(score_factor_E > 0, key_NE, -jnp.inf)
    if visible_E is not None:
        key_NE = jnp.where(visible_E, key_NE, -jnp.inf)
        logits_NE = jnp.where(visible_E, logits_NE, -jnp.inf)
    experts_NK = _largest(key_NE, top_k)
    chosen_NKE = _one_hot(experts_NK, scores_NE.shape[1])
    # A sum over the one-hot choice instead of a gather: its transpose is dense, where a gather's is a scatter.
    gates_NK = jnp.sum(jnp.where(chosen_NKE, scores_NE[:, None, :].astype(jnp.float32), 0.0), axis=-1)
    if router == "sigmoid" and top_k > 1:
        gates_NK = gates_NK / (jnp.sum(gates_NK, axis=-1, keepdims=True) + _SIGMOID_EPSILON)

    def summed(values: jax.Array, axis: int | tuple[int, ...], dtype: DTypeLike | None = None) -> jax.Array:
        if counted_N is not None:
            values = jnp.where(counted_N.reshape(-1, *(1,) * (values.ndim - 1)), values, 0)
        return jnp.sum(_in_groups(values, num_stat_groups), axis=axis, dtype=dtype)

    z_N = jnp.square(jax.nn.logsumexp(logits_NE.astype(jnp.float32), axis=-1))
    stats = RoutingStats(
        counts_AE=summed(chosen_NKE, (1, 2), jnp.int32),
        score_sum_AE=summed(_shares(scores_NE) if normalized else scores_NE.astype(jnp.float32), 1),
        z_square_sum_A=summed(z_N, 1),
        zero_gates_A=summed(jnp.all(gates_NK == 0, axis=-1), 1, jnp.int32),
        received_X=jnp.zeros((1,), jnp.int32),
    )
    if score_factor_E is not None:
        unfaded_NK = _largest(jax.lax.stop_gradient(own_NE), top_k)
        unfaded_AE = summed(_one_hot(unfaded_NK, own_NE.shape[1]), (1, 2), jnp.int32)
        stats = stats._replace(unfaded_counts_AE=unfaded_AE)
    return Routing(experts_NK, gates_NK, stats)


def _shares(scores_NE: jax.Array) -> jax.Array:
    """Scores over their sum, float32; zeros where all scores of a token are."""
    wide_NE = scores_NE.astype(jnp.float32)
    total_N1 = jnp.sum(wide_NE, axis=-1, keepdims=True)
    # The inner `where` keeps the division by zero out of the gradient.
    return jnp.where(total_N1 != 0, wide_NE / jnp.where(total_N1 != 0, total_N1, 1.0), 0.0)


def _largest(key_NE: jax.Array, top_k: int) -> jax.Array:
    """The experts with the largest keys, descending, int32 `[N, k]`; ties go to the lowest index."""
    if top_k == 1:
        return jnp.argmax(key_NE, axis=-1, keepdims=True).astype(jnp.int32)
    return jax.lax.top_k(key_NE, top_k)[1].astype(jnp.int32)


def _one_hot(experts_NK: jax.Array, num_experts: int) -> jax.Array:
    """Bool `[N, k, E]`."""
    return experts_NK[:, :, None] == jnp.arange(num_experts, dtype=jnp.int32)


def _in_groups(values_NX: jax.Array, num_groups: int) -> jax.Array:
    """`[A, N / A, ...]`: equal runs of consecutive tokens."""
    return values_NX.reshape(num_groups, -1, *values_NX.shape[1:])


class Forced(NamedTuple):
    """Choices that replace a layer's own."""

    experts_NK: jax.Array
    """Experts of the layer's pool, int32 `[N, k]`; -1 keeps the choice of that token and slot."""
    own_gates: jax.Array
    """Bool scalar: the gates of forced experts are their own scores (True), or the gates of the experts that they
    replace, slot by slot (False). See method M10.18."""


def replaced(routing: Routing, scores_NE: jax.Array, forced: Forced, router: Router) -> Routing:
    """`routing` with forced choices in place of the layer's own; the statistics stay those of its own choices.

    Own gates follow the router (method M3.5): the score, over the sum of the chosen scores for sigmoid, k > 1.
    While a lock fades experts out, own gates are the scores before the fade.
    """
    chosen_NK = jnp.where(forced.experts_NK >= 0, forced.experts_NK, routing.experts_NK)
    # The router itself, given the scores of the chosen experts only, in their order.
    own_NK = jnp.take_along_axis(scores_NE, chosen_NK, axis=1)
    own = route(own_NK, own_NK, router=router, top_k=chosen_NK.shape[1])
    rank_NK = jnp.argsort(own.experts_NK, axis=1)
    gates_NK = jnp.take_along_axis(own.gates_NK, rank_NK, axis=1)
    use_own_NK = (forced.experts_NK >= 0) & forced.own_gates
    return routing._replace(experts_NK=chosen_NK, gates_NK=jnp.where(use_own_NK, gates_NK, routing.gates_NK))


def score_constant(router: Router, kind: Literal["monte_carlo", "one"], num_experts: int, top_k: int) -> float:
    """The fixed factor c of a router's scores: NormRouter's `norm_constant`, unless `kind` is `one`; 1 for others."""
    return norm_constant(num_experts, top_k) if router == "norm" and kind == "monte_carlo" else 1.0


def scores(
    logits_NE: jax.Array,
    router: Router,
    scale: jax.Array | None,
    constant: ArrayLike,
    epsilon: float,
    own: int | None = None,
    visible_E: ArrayLike | None = None,
    centered: bool = False,
) -> jax.Array:
    """Scores of any router, `[N, E]`. Softmax and sigmoid are computed in float32, then take the logits' dtype.

    Experts that the layer does not see have score 0 and take no part in the norm or the sum of the others.

    Args:
      logits_NE: router logits.
      router: which router.
      scale: of NormRouter; None for others.
      constant: see `score_constant`.
      epsilon: of NormRouter.
      own: of NormRouter: see `norm_scores`.
      visible_E: the experts that the layer sees, bool; None: all.
      centered: of NormRouter: see `centered_logits`.
    """
    if centered:
        logits_NE = centered_logits(logits_NE, visible_E)
    if visible_E is not None:
        logits_NE = jnp.where(visible_E, logits_NE, 0 if router == "norm" else -jnp.inf)
    match router:
        case "norm":
            assert scale is not None
            return norm_scores(logits_NE, scale, constant, epsilon, own)
        case "softmax":
            return jax.nn.softmax(logits_NE.astype(jnp.float32)).astype(logits_NE.dtype)
        case "sigmoid":
            return jax.nn.sigmoid(logits_NE.astype(jnp.float32)).astype(logits_NE.dtype)
        case _:
            assert_never(router)
