"""Growth in depth: which layers there are at which step, and how deep a network is unrolled from them (Apollo).

A run with `growth.layers` trains N layers in each of its stages, and L = model.num_layers in the last. Each micro-batch
uses the N layers as a network of depth D, N <= D <= L, drawn anew; layer i of it is layer `layer_map(...)[i]` of the N.
Source: arXiv 2401.09192 and its code, with integers in place of floating-point maps. Everything is a function of the
configuration and the step: nothing of it is kept between steps.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

from unipool_jax.config.schema import Config, GrowthConfig, GrowthMap, LockConfig

if TYPE_CHECKING:
    import numpy as np

_Depth = TypeVar("_Depth", int, "np.ndarray")

_LOWEST = 1e-6
"""Smallest x of the published sampler, which draws it from U(1e-6, 1)."""
_SPREAD, _FLOOR = 0.4, 0.6
"""The published density lies on [0.6, L/N + 0.4]: rounding down then gives every depth its share of mass."""
_STEEPNESS = 20.0
_STREAM = 1
"""Upper half of the generator's key, so that depths share no random numbers with anything else made of the seed."""


class Stage(NamedTuple):
    """One stage of a run that grows."""

    layers: int
    """N, layers that have parameters."""
    first: int
    """Completed steps at its beginning."""
    end: int
    """Completed steps at its end."""


def grows(config: Config) -> bool:
    """Whether the run has fewer layers at first than at its end."""
    return bool(config.growth.layers)


def stages(config: Config) -> tuple[Stage, ...]:
    """The stages of a run; an extension of the run belongs to the last. Fractions are rounded half to even."""
    ends = [round(end * config.train.lengths[0]) for end in config.growth.ends[:-1]] + [config.train.steps]
    return tuple(map(Stage, config.growth.layers, [0, *ends], ends))


def layers_at(config: Config, completed: int) -> int:
    """N in the update after `completed` steps."""
    return next((s.layers for s in stages(config) if completed < s.end), config.model.num_layers)


def saved_layers(config: Config, step: int) -> int:
    """N of the state after `step` steps: a run grows when the next step begins."""
    return layers_at(config, max(step - 1, 0))


def layer_map(kind: GrowthMap, layers: int, depth: int) -> tuple[int, ...]:
    """Which of `layers` layers each layer of a network of `depth` layers is, by integers alone.

    `extend`: layer i is `floor(i * layers / depth)`. `stack`: all layers in order, again and again; a last, partial
    block is the top ones.

    Example:
      >>> layer_map("extend", 3, 6), layer_map("stack", 3, 8)
      ((0, 0, 1, 1, 2, 2), (0, 1, 2, 0, 1, 2, 1, 2))
    """
    if kind == "extend":
        return tuple(i * layers // depth for i in range(depth))
    whole = depth // layers * layers
    return (*(i % layers for i in range(whole)), *(layers - depth + i for i in range(whole, depth)))


def at_depth(config: Config, depth: int) -> Config:
    """The model of `depth` layers that a run has, or unrolls, before its last growth.

    Experts are those of the whole run: a shared pool has its full size at every depth, and a layer with a pool of its
    own keeps it. Such a model has neither growth nor a lock.
    """
    own = config.pool.groups == config.mixture_layers
    groups = depth if own else config.pool.groups
    experts = config.experts_per_pool * groups
    return dataclasses.replace(
        config,
        model=dataclasses.replace(config.model, num_layers=depth),
        pool=dataclasses.replace(config.pool, groups=groups, experts=experts),
        growth=GrowthConfig(),
        lock=LockConfig(),
    )


def with_layers(config: Config, layers: int) -> Config:
    """The model that a run trains while it has so many layers; after the last growth, all that is configured."""
    if layers == config.model.num_layers:
        return dataclasses.replace(config, growth=GrowthConfig())
    return at_depth(config, layers)


def saved_model(config: Config, document: Mapping[str, Any]) -> Config:
    """The model in a checkpoint of a run of `config`, whose meta document has its number of layers under `growth`."""
    return with_layers(config, document["growth"]["layers"]) if grows(config) else config


def depth_shares(config: Config, layers: int) -> dict[int, float]:
    """Probability of each depth that occurs with N = `layers`, by depth, ascending: exactly what `depths` draws.

    The published law is `P(y > t) = (m / t - n - 1e-6) / (1 - 1e-6)` with `b = L/N + 0.4`, `e = 0.6`,
    `n = (1e-6 b - e) / (e - b)`, `m = e (n + 1)`, and `D = floor(N y)`, y clipped to [1, L/N].
    """
    last = config.model.num_layers
    shares: dict[int, float] = {}
    above = [1.0, *(_share_from(config, layers, depth) for depth in range(layers + 1, last + 1)), 0.0]
    for depth, (share, beyond) in enumerate(itertools.pairwise(above), layers):
        found = max(_rounded(config, depth), layers)
        shares[found] = shares.get(found, 0.0) + share - beyond
    return {depth: share for depth, share in shares.items() if share > 0}


def _share_from(config: Config, layers: int, depth: int) -> float:
    """P(D >= depth) before rounding to growth.depth_step, for N < depth <= L."""
    last, t = config.model.num_layers, depth / layers
    high = last / layers + _SPREAD
    match config.growth.depth_law:
        case "stage":
            return 0.0
        case "final":
            return 1.0
        case "uniform":
            return (last - depth + 1) / (last - layers + 1)
        case "sigmoid":
            odds = (high - _FLOOR) / (t - _FLOOR) - 1
            below = 0.5 + math.log(odds) / _STEEPNESS
        case "lvps":
            n = (high * _LOWEST - _FLOOR) / (_FLOOR - high)
            below = _FLOOR * (n + 1) / t - n
    return min(max((below - _LOWEST) / (1 - _LOWEST), 0.0), 1.0)


def depths(config: Config, first: int, count: int = 1) -> np.ndarray:
    """The depth D of each micro-batch in the updates after `first`, `first + 1`, ... steps, int64 `[count, m]`.

    Drawn on the host from train.seed and the number of the micro-batch by a counter-based generator, so that every
    process and every resumed run draws the same.
    """
    import numpy as np

    micros = config.num_microbatches
    drawn = _uniform(config.train.seed, first * micros, count * micros).reshape(count, micros)
    found = np.empty(drawn.shape, np.int64)
    for stage in stages(config):
        rows = slice(max(stage.first - first, 0), max(stage.end - first, 0))
        found[rows] = _drawn(config, stage.layers, drawn[rows])
    return found


def _drawn(config: Config, layers: int, uniform: np.ndarray) -> np.ndarray:
    """Depths from numbers of [0, 1)."""
    import numpy as np

    last, law = config.model.num_layers, config.growth.depth_law
    if layers == last or law == "stage":
        return np.full(uniform.shape, layers)
    x = _LOWEST + (1 - _LOWEST) * uniform
    high = last / layers + _SPREAD
    match law:
        case "final":
            depth = np.full(uniform.shape, last)
        case "uniform":
            depth = layers + np.floor(uniform * (last - layers + 1)).astype(np.int64)
        case "sigmoid":
            y = (high - _FLOOR) / (1 + np.exp(_STEEPNESS * (x - 0.5))) + _FLOOR
            depth = np.floor(layers * y).astype(np.int64)
        case "lvps":
            n = (high * _LOWEST - _FLOOR) / (_FLOOR - high)
            depth = np.floor(layers * _FLOOR * (n + 1) / (x + n)).astype(np.int64)
    # Clipping y to [1, L/N] before it is rounded would make D = L - 1 of L in floating point.
    return np.maximum(_rounded(config, np.clip(depth, layers, last)), layers)


def _rounded(config: Config, depth: _Depth) -> _Depth:
    """`depth` down to L minus a multiple of growth.depth_step."""
    last, step = config.model.num_layers, config.growth.depth_step
    return last - -(-(last - depth) // step) * step


def _uniform(seed: int, first: int, count: int) -> np.ndarray:
    """Numbers `first` to `first + count - 1` of the stream of `seed`, in [0, 1), float64.

    The words of Philox, whose stream NumPy guarantees, made numbers here: `Generator.random` may change.
    """
    import numpy as np

    words = np.random.Philox(key=seed + (_STREAM << 64), counter=first // 4).random_raw(first % 4 + count)
    return (words[first % 4 :] >> np.uint64(11)) * 2.0**-53
