"""Pruning of a model whose experts UniPool-lock has divided among layers: whole layers, with the experts they own.

What is left is the model of a smaller pool that was locked before its first step (lock.ownership=random_from_start).
"""

from __future__ import annotations

import dataclasses

import numpy as np

from unipool_jax.config.compose import Choices, differences
from unipool_jax.config.schema import Config
from unipool_jax.convert.errors import ConversionError
from unipool_jax.moe.lock import router_order
from unipool_jax.moe.lock_lifecycle import LockRecord, Partition, new_record


def locked_config(source: Config, choices: Choices) -> Config:
    """The configuration of a model with fewer layers of one of `source`, before its lock.

    Raises:
      ConversionError: something else is smaller, or nothing.
    """
    named = {word.partition("=")[0].lstrip("+~") for word in choices.words}
    target, private = choices.onto(source), source.after_lock().experts_per_pool
    experts = private * target.mixture_layers
    if "pool.experts" in named and target.pool.experts != experts:
        raise ConversionError(
            f"pool.experts={target.pool.experts}: the experts of the source belong to layers (UniPool-lock) and go "
            f"with them; leave it out"
        )
    target = dataclasses.replace(
        target,
        pool=dataclasses.replace(target.pool, experts=experts, fraction=1.0),
        lock=dataclasses.replace(source.lock, ownership="random_from_start"),
    )
    architecture = ("model.", "moe.", "pool.", "attention.")
    free = {"model.num_layers", "model.remat", "pool.experts", "pool.fraction"}
    other = [name for name in differences(source, target) if name.startswith(architecture) and name not in free]
    if other:
        raise ConversionError(
            f"the experts of the source belong to layers (UniPool-lock): only model.num_layers can be smaller; leave "
            f"{', '.join(other)} out, or prune a checkpoint from before the freeze"
        )
    if not 1 <= target.mixture_layers < source.mixture_layers:
        raise ConversionError(
            f"model.num_layers={target.model.num_layers}: the source has {source.model.num_layers}, and its experts "
            "belong to layers (UniPool-lock), so nothing but layers can go; set a smaller number"
        )
    return target


def router_rows(record: LockRecord, layers: tuple[int, ...], dense: int) -> list[np.ndarray]:
    """Places of the router rows that stay, by layer with experts: those of experts whose layer stays."""
    ids_LK = record.expert_ids
    assert ids_LK is not None
    kept = [layer - dense for layer in layers if layer >= dense]
    orders_LM = router_order(ids_LK)
    return [np.flatnonzero(np.isin(orders_LM[layer], ids_LK[kept])) for layer in kept]


def pruned_record(record: LockRecord, target: Config, layers: tuple[int, ...]) -> LockRecord:
    """The record of the pruned model: experts and layers are numbered anew, in the order that they had."""
    assert record.lock is not None
    dense = target.moe.dense_layers
    kept = [layer - dense for layer in layers if layer >= dense]
    owner = tuple(kept.index(layer) for layer in record.lock.owner if layer in kept)
    coverage = tuple(record.lock.coverage[layer] for layer in kept)
    lock = Partition(owner, coverage, record.lock.status, record.lock.method, frozen=0, locked=0)
    return dataclasses.replace(new_record(target), lock=lock)
