"""Prunes a model: scores its parts, chooses, and cuts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from unipool_jax.config.schema import Config
from unipool_jax.convert.layered import layered, stacked
from unipool_jax.convert.walk import Walk
from unipool_jax.convert.weights import Weights
from unipool_jax.data.pipeline import Batch
from unipool_jax.moe.lock_lifecycle import LockRecord
from unipool_jax.pruning.choice import Choice, Harm, Removal, choose, remaining_layers
from unipool_jax.pruning.cut import cut
from unipool_jax.pruning.locked import router_rows
from unipool_jax.pruning.orphans import Orphan, find_orphans, hand_over
from unipool_jax.pruning.requests import PruneRequest
from unipool_jax.pruning.scores import Scores, at_random, by_magnitude, measured


class Pruned(NamedTuple):
    """The result, and how it came about."""

    weights: Weights
    scores: Scores
    """That experts, heads, channels and neurons were chosen by."""
    removals: list[Removal]
    choice: Choice
    orphans: list[Orphan]


def prune(
    config: Config,
    weights: Weights,
    target: Config,
    batches: Sequence[Batch],
    request: PruneRequest,
    lock: LockRecord | None = None,
) -> Pruned:
    """Prune a model of `config` to one of `target`.

    Args:
      config: of the source, on one device.
      weights: of the source.
      target: of the new model, see `pruned_config`.
      batches: text, of one shape.
      request: how.
      lock: of a source that is locked.

    Raises:
      ConversionError: no layer may go, though one should.
    """
    model = layered(config, weights)
    walk = Walk(config, model)
    scores = measured(walk, batches)
    if request.importance == "magnitude":
        scores = by_magnitude(config, model, scores.traffic)
    elif request.importance == "random":
        scores = at_random(scores, request.seed)
    layers, removals = remaining_layers(config, target, _harm(walk, batches, scores, request))
    choice = choose(config, target, scores, layers, request.merge_attention)
    if lock is not None:
        choice = choice._replace(rows=router_rows(lock, layers, config.moe.dense_layers))
    orphans = find_orphans(config, scores.traffic, choice) if config.moe.router != "none" else []
    given = hand_over(config, model, orphans) if request.adopt else model
    pruned = cut(given, config, choice, request.gains)
    return Pruned(stacked(target, pruned), scores, removals, choice, orphans)


def _harm(walk: Walk, batches: Sequence[Batch], scores: Scores, request: PruneRequest) -> Harm:
    if request.importance == "text" and request.layers == "loss":
        return lambda layers: walk.loss(batches, layers)
    every = range(walk.config.model.num_layers)
    return lambda layers: float(sum(scores.layers_L[layer] for layer in every if layer not in layers))
