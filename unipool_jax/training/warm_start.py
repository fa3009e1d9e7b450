"""A new run that starts with the parameters of another one (`run.init_from`)."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any, NamedTuple

import jax
from jax.sharding import Mesh

from unipool_jax.config.parsing import from_mapping
from unipool_jax.config.schema import Config, settings
from unipool_jax.moe.lock_lifecycle import structure
from unipool_jax.training.checkpoint import Checkpoints, Model, flatten, layout_differences, restore_model, unflatten
from unipool_jax.training.lineage import parent_of
from unipool_jax.training.run_folder import RunError, find_checkpoint
from unipool_jax.training.state import TrainState, init_state, new_state

_PARAMS = "params."

_FREE = {
    *("model.init", "model.init_std", "model.embedding_std", "model.post_norm_attention", "model.post_norm_ffn"),
    "model.compute_dtype",
    "model.remat",
    "moe.router_dtype",
    "moe.experts_per_layer",
    "pool.fraction",
    "pool.experts",
}
"""Settings of the sections `model`, `moe` and `pool` that decide neither what is computed nor, for the last three, more
than the number of experts, which is compared itself."""


def warm_state(
    config: Config, shapes: TrainState, tokenizer_sha256: str, mesh: Mesh | None = None
) -> tuple[TrainState, dict[str, Any]]:
    """The parameters and selection biases of `run.init_from` at step 0, with a new optimizer state.

    Args:
      config: of the new run.
      shapes: of its state.
      tokenizer_sha256: of its tokenizer.
      mesh: of the new run.

    Returns:
      The state, and what `lineage.json` records of the parent and of what is new.

    Raises:
      RunError: there is no such run, or it has another architecture or tokenizer, or experts that a lock divided; names
        every setting or array that differs and is not among `run.allow_new`. Or nothing is new that it allows.
      CheckpointError: the checkpoint cannot be read.
    """
    wanted = config.run.init_from
    assert wanted is not None
    folder, step = find_checkpoint(wanted, "run.init_from")
    with Checkpoints(folder, read_only=True) as checkpoints:
        step = checkpoints.find(step)
        place = checkpoints.path(step)
        meta = checkpoints.meta(step)
        parent = dataclasses.replace(from_mapping(meta["config"]), mesh=config.mesh)
        refused, new = _compared(config, shapes, meta, structure(parent, meta))
        if meta["tokenizer_sha256"] != tokenizer_sha256:
            refused.append(
                f"data.tokenizer: {parent.data.tokenizer} (sha256 {str(meta['tokenizer_sha256'])[:12]}) there, "
                f"{config.data.tokenizer} ({tokenizer_sha256[:12]}) here"
            )
        if refused:
            raise RunError(
                f"run.init_from={wanted}: the model of {place} is another one:\n"
                + "\n".join(f"  - {line}" for line in refused)
                + "\nUse its settings, allow what is new by run.allow_new, or make another model of it: "
                "unipool convert upcycle --help"
            )
        model = restore_model(checkpoints, parent, step, mesh)
    if is_partitioned(model):
        raise RunError(
            f"run.init_from={wanted}: the experts of {place} are divided among layers (UniPool-lock); start from a "
            "checkpoint before the freeze"
        )
    shardings = None if mesh is None else jax.tree.map(lambda leaf: leaf.sharding, shapes)

    def begin(params: Any, bias: jax.Array) -> TrainState:
        if new.parameters:
            # Of the fresh parameters only the new ones are computed.
            fresh = flatten(init_state(config, jax.random.key(config.train.seed)).params)
            params = unflatten(shapes.params, fresh | flatten(params))
        return new_state(config, params, bias)

    start = jax.jit(begin, out_shardings=shardings, donate_argnums=(0, 1))
    state = start(model.params, model.balance.expert_bias_GNE)
    known = {"new_parameters": new.parameters, "changed_settings": new.settings}
    return state, parent_of(folder.parent, step, meta) | {name: names for name, names in known.items() if names}


class _New(NamedTuple):
    """What `run.allow_new` allowed."""

    parameters: list[str]
    settings: list[str]


def _compared(config: Config, shapes: TrainState, meta: Mapping[str, Any], parent: Config) -> tuple[list[str], _New]:
    """Lines that say what differs from the parent and is not allowed, and what is allowed to be new."""
    patterns = config.run.allow_new
    allowed, refused = _split(patterns, architecture_differences(parent, config))
    if refused:
        return refused, _New([], allowed)
    stored = {name: kind for name, kind in meta["layout"].items() if name.startswith(_PARAMS)}
    matching, refused = _split(patterns, layout_differences(stored, {"params": shapes.params}))
    new = _New([name for name in matching if _PARAMS + name not in stored], allowed)
    refused += [f"{name}: in the checkpoint, but not as expected here" for name in matching if _PARAMS + name in stored]
    unused = [pattern for pattern in patterns if not any(fnmatchcase(name, pattern) for name in (*allowed, *matching))]
    refused += [f"run.allow_new={pattern}: nothing of this name is new; leave it out" for pattern in unused]
    return refused, new


def _split(patterns: Sequence[str], lines: Sequence[str]) -> tuple[list[str], list[str]]:
    """The names, without `params.`, that match one of the patterns, and the lines of the others; a line begins with its
    name."""
    names = [line.partition(": ")[0].removeprefix(_PARAMS) for line in lines]
    matches = [any(fnmatchcase(name, pattern) for pattern in patterns) for name in names]
    rest = [line for line, known in zip(lines, matches, strict=True) if not known]
    return [name for name, known in zip(names, matches, strict=True) if known], rest


def architecture_differences(trained: Config, config: Config) -> list[str]:
    """What differs between the models of two configurations, one line for each setting."""
    before, now = _architecture(trained), _architecture(config)
    return [f"{name}: {before[name]!r} there, {now[name]!r} here" for name in before if before[name] != now[name]]


def is_partitioned(model: Model) -> bool:
    """Whether a lock has divided the experts among layers, or is about to."""
    lock = model.balance.lock
    return model.config.locked or (lock is not None and bool((lock.owner_M >= 0).any()))


def _architecture(config: Config) -> dict[str, Any]:
    found = {
        name: value
        for name, value in settings(config).items()
        if name.startswith(("model.", "moe.", "pool.")) and name not in _FREE
    }
    # A selection bias is part of what a model computes.
    biased = config.loss.balance == "expert_bias"
    return found | {"experts in all pools": config.total_experts, "loss.balance=expert_bias": biased}
