"""Which configurations can be run.

`validate` checks every constraint and reports all violations at once, before any array is allocated. Each message names
the setting and its value, what is allowed, and what to do.

Wrong types are reported alone. Otherwise the report lists every number outside its range, and every violated rule whose
own settings are in range.
"""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

from unipool_jax.config import (
    attention_rules,
    block_rules,
    data_rules,
    growth_rules,
    lock_schedule,
    loss_rules,
    mesh_rules,
    norm_rules,
    rope_rules,
    sharing_rules,
)
from unipool_jax.config.addresses import split_address
from unipool_jax.config.chips import parse_topology
from unipool_jax.config.divisors import next_multiple, shown_divisors
from unipool_jax.config.parsing import as_written, from_mapping
from unipool_jax.config.paths import is_file, is_path
from unipool_jax.config.ranges import MAX_EXPERTS, RANGES, Range
from unipool_jax.config.schema import Config, ConfigError, DistillConfig, settings, to_mapping

MAX_ROWS = 2**31 - 1
"""Rows of one batch of expert inputs, because they are indexed with int32."""

MAX_NAME = 200
"""Characters in a folder's name; file systems allow 255 bytes."""


class _Rule(NamedTuple):
    reads: frozenset[str]
    find: Callable[[Config], Iterator[str]]
    about_data: bool


_RULES: list[_Rule] = []


def _rule(*reads: str, about_data: bool = False) -> Callable[[Callable[[Config], Iterator[str]]], Any]:
    """Register a rule on the settings `reads`; it runs only when each of them is in range."""

    def register(find: Callable[[Config], Iterator[str]]) -> Callable[[Config], Iterator[str]]:
        _RULES.append(_Rule(frozenset(reads), find, about_data))
        return find

    return register


def validate(config: Config) -> None:
    """Reject a configuration that cannot be run.

    Raises:
      ConfigError: lists every problem that `problems` finds.
    """
    found = problems(config)
    if found:
        raise ConfigError(found)


def problems(config: Config) -> list[str]:
    """One message for each reason why `config` cannot be run; empty if it can.

    `mode=describe` and `mode=plan` read no data, so files and splits are not checked there.
    """
    try:
        config = from_mapping(to_mapping(config))
    except ConfigError as error:
        return error.problems
    values = settings(config)
    outside = {name for name, allowed in RANGES.items() if not _within(values[name], allowed)}
    found = [
        f"{name}={as_written(values[name])}: must be {allowed}" for name, allowed in RANGES.items() if name in outside
    ]
    if outside.isdisjoint(("model.num_layers", "moe.dense_layers")) and (
        problem := block_rules.too_many_dense_layers(config)
    ):
        found.append(problem)
        outside.add("moe.dense_layers")
    for rule in _RULES:
        if rule.reads.isdisjoint(outside) and not (rule.about_data and config.mode != "train"):
            found.extend(rule.find(config))
    return found


def _within(value: Any, allowed: Range) -> bool:
    """Whether every number of a setting is in range; null and names of rules are."""
    numbers = value if isinstance(value, tuple) else (value,)
    return all(number in allowed for number in numbers if not isinstance(number, str | None))


_TOTAL_EXPERTS = (
    *("pool.experts", "pool.fraction", "pool.starts", "pool.span", "pool.ends"),
    *("moe.experts_per_layer", "model.num_layers", "moe.dense_layers"),
)


@_rule("model.hidden_size", "model.num_heads", "model.head_size")
def _head_size(config: Config) -> Iterator[str]:
    model = config.model
    if model.head_size is not None:
        if model.head_size % 2:
            yield f"model.head_size={model.head_size}: rotary positions rotate pairs of channels; choose an even number"
    elif model.hidden_size % model.num_heads:
        yield (
            f"model.hidden_size={model.hidden_size}: must be a multiple of model.num_heads={model.num_heads}; "
            f"the next one is {next_multiple(model.hidden_size, model.num_heads)}; or set model.head_size"
        )
    elif config.head_size % 2:
        yield (
            f"model.num_heads={model.num_heads}: gives heads of {config.head_size} channels, but rotary embeddings "
            f"rotate pairs of channels; make model.hidden_size={model.hidden_size} / model.num_heads even"
        )


@_rule("model.num_heads", "model.num_kv_heads")
def _kv_heads(config: Config) -> Iterator[str]:
    model = config.model
    if model.num_heads % model.num_kv_heads:
        yield (
            f"model.num_kv_heads={model.num_kv_heads}: must divide model.num_heads={model.num_heads}; "
            f"choose one of {shown_divisors(model.num_heads)}"
        )


@_rule("pool.groups", "model.num_layers", "moe.dense_layers")
def _groups(config: Config) -> Iterator[str]:
    groups, layers = config.pool.groups, config.mixture_layers
    if config.moe.router != "none" and layers % groups:
        shown = block_rules.layers_with_experts(config)
        yield f"pool.groups={groups}: must divide {shown}; choose one of {shown_divisors(layers)}"


@_rule("pool.groups", "moe.top_k", *_TOTAL_EXPERTS)
def _experts(config: Config) -> Iterator[str]:
    if config.moe.router == "none":
        return
    total, groups, top_k = config.total_experts, config.pool.groups, config.moe.top_k
    source = _experts_source(config)
    if total > MAX_EXPERTS:
        yield f"{source}: gives {total} experts in all; at most {MAX_EXPERTS} are supported"
    elif total < groups or total % groups:
        lower = total // groups * groups
        nearest = " or ".join(str(n) for n in (lower, lower + groups) if n)
        yield (
            f"{source}: gives {total} experts in all, which do not divide equally among pool.groups={groups} pools; "
            f"set pool.experts to a multiple of {groups}, for example {nearest}"
        )
    elif top_k > total // groups:
        yield (
            f"moe.top_k={top_k}: a layer chooses from a pool of {total // groups} experts ({source}, "
            f"pool.groups={groups}); set at most {total // groups}, or add experts"
        )


_rule(
    *("attention.window", "attention.full_layers", "attention.switch_weight", "attention.switch_epsilon"),
    *("attention.switch_alpha", "data.sequence_length", "model.num_layers"),
)(attention_rules.problems)
_rule("data.sequence_length", *(name for name in RANGES if name.startswith("model.rope_")))(rope_rules.problems)
_rule("pool.groups", "pool.window", "moe.top_k", *_TOTAL_EXPERTS)(sharing_rules.problems)
_rule("pool.groups", "pool.window", "moe.top_k", *_TOTAL_EXPERTS)(sharing_rules.reuse_problems)


_rule("moe.shared_experts", "moe.dense_layers", "moe.dense_ffn_size")(block_rules.problems)
_rule(
    *("model.post_norm_attention", "model.post_norm_ffn", "model.post_norm_epsilon"),
    *("moe.top_k", "moe.shared_experts"),
)(norm_rules.problems)


@_rule("pool.groups", "moe.top_k", "loss.z_coefficient", *_TOTAL_EXPERTS)
def _dense(config: Config) -> Iterator[str]:
    if config.moe.router != "none" or config.moe.dense_layers:
        return
    layers, why = config.model.num_layers, "moe.router=none is the dense model"
    if config.pool.groups != layers:
        yield f"pool.groups={config.pool.groups}: {why}, which shares none; set pool.groups={layers} or choose a router"
    if config.total_experts != layers or config.moe.experts_per_layer != 1:
        yield (
            f"{_experts_source(config)}: {why}, with one block per layer; set moe.experts_per_layer=1 and leave "
            "pool.fraction and pool.experts at their defaults, or choose a router"
        )
    if config.moe.top_k != 1:
        yield f"moe.top_k={config.moe.top_k}: {why}, with nothing to choose; set moe.top_k=1 or choose a router"
    if config.loss.balance != "none":
        yield f"loss.balance={config.loss.balance}: {why}, with nothing to balance; set loss.balance=none"
    if config.loss.z_coefficient:
        yield f"loss.z_coefficient={config.loss.z_coefficient}: {why}, without router logits; set it to 0"


_rule("loss.expert_bias_rate")(loss_rules.expert_bias)
_rule("loss.switch_coefficient", "loss.switch_group_sequences", "train.microbatch_size")(loss_rules.switch)
_rule("loss.pool_coefficient", "loss.pool_warmup_fraction", "loss.balance_groups")(loss_rules.pool)
_rule("loss.balance_groups", "train.batch_size", "train.microbatch_size")(loss_rules.balance_groups)


@_rule()
def _centering(config: Config) -> Iterator[str]:
    if config.moe.score_centering and config.moe.router != "norm":
        yield (
            f"moe.score_centering=true: is for NormRouter, not moe.router={config.moe.router}; "
            "set moe.score_centering=false or moe.router=norm"
        )


_rule(
    *("pool.groups", "moe.top_k", "loss.pool_coefficient", "lock.entropy_target", "train.steps", "train.eval_every"),
    *("lock.lock_fraction", "lock.anneal_fraction", "lock.entropy_warmup_fraction", "lock.lock_step"),
    *("lock.anneal_steps", "lock.entropy_warmup_steps", "mesh.expert", *_TOTAL_EXPERTS),
)(lock_schedule.problems)


_rule(
    *("growth.layers", "growth.ends", "growth.depth_step", "train.steps", "train.eval_every", "lock.count_lookback"),
    *("lock.lock_fraction", "lock.anneal_fraction", "lock.lock_step", "lock.anneal_steps", "pool.groups"),
    *_TOTAL_EXPERTS,
)(growth_rules.problems)


@_rule("distill.weight", "distill.temperature")
def _distillation(config: Config) -> Iterator[str]:
    distill, usual = config.distill, DistillConfig()
    if distill.teacher is None:
        for name in ("weight", "temperature"):
            if (value := getattr(distill, name)) != getattr(usual, name):
                yield f"distill.{name}={value}: unused without distill.teacher, the run to learn from; remove it"
        return
    if config.growth.layers:
        yield (
            f"distill.teacher={distill.teacher}: a run that grows learns from no teacher; set growth.layers=[], or "
            "distill in a run that starts from this one"
        )
    if config.mode == "plan":
        yield f"distill.teacher={distill.teacher}: mode=plan counts no teacher; remove it to plan the run without one"


@_rule("optimizer.learning_rate", "optimizer.min_learning_rate")
def _learning_rates(config: Config) -> Iterator[str]:
    low, peak = config.optimizer.min_learning_rate, config.optimizer.learning_rate
    if low > peak:
        yield f"optimizer.min_learning_rate={low}: must not exceed optimizer.learning_rate={peak}; lower it"


@_rule("train.steps", "optimizer.min_learning_rate")
def _extension(config: Config) -> Iterator[str]:
    train, optimizer = config.train, config.optimizer
    if any(steps < 1 for steps in train.lengths) or any(a >= b for a, b in itertools.pairwise(train.lengths)):
        yield (
            f"train.earlier_steps={list(train.earlier_steps)}: must ascend to train.steps={train.steps}; leave it to "
            "unipool train RUN train.steps=+N"
        )
    elif train.earlier_steps and optimizer.extension == "constant" and not optimizer.min_learning_rate:
        yield (
            "optimizer.extension=constant: the steps that extend the run would have optimizer.min_learning_rate=0 and "
            "change nothing; set optimizer.extension=rewarm"
        )


_rule("train.batch_size", "train.microbatch_size", "loss.switch_group_sequences")(loss_rules.microbatches)


@_rule("train.microbatch_size", "train.eval_batch_size", "data.sequence_length", "moe.top_k")
def _rows(config: Config) -> Iterator[str]:
    length, top_k = config.data.sequence_length, config.moe.top_k
    for name in ("microbatch_size", "eval_batch_size"):
        sequences = getattr(config.train, name)
        if sequences * length * top_k > MAX_ROWS:
            yield (
                f"train.{name}={sequences}: with data.sequence_length={length} and moe.top_k={top_k} the experts get "
                f"more than {MAX_ROWS} rows at once; set at most {MAX_ROWS // (length * top_k)}"
            )


_rule("model.vocab_size", about_data=True)(data_rules.vocabulary)
_rule(about_data=True)(data_rules.tokenizer)
_rule(about_data=True)(data_rules.split)
_rule(about_data=True)(data_rules.sources)
_rule(about_data=True)(data_rules.cache)
_rule(
    *(f"mesh.{axis}" for axis in mesh_rules.AXES),
    *("train.microbatch_size", "train.eval_batch_size", "pool.groups", *_TOTAL_EXPERTS),
    *("model.hidden_size", "model.num_kv_heads", "model.ffn_size", "moe.dense_ffn_size", "model.vocab_size"),
)(mesh_rules.problems)


@_rule(*(f"mesh.{axis}" for axis in mesh_rules.AXES))
def _topology(config: Config) -> Iterator[str]:
    name = config.mesh.topology
    if name is None:
        if config.mode == "plan":
            yield "mesh.topology=null: mode=plan needs devices to plan for; set mesh.topology, or choose mesh=v5p_64"
        return
    try:
        topology = parse_topology(name)
    except ValueError as error:
        yield f"mesh.topology={name}: {error}"
        return
    if config.mode == "plan" and config.mesh.sparse_core_collectives and not topology.chip.sparse_cores:
        yield (
            f"mesh.sparse_core_collectives=true: the devices of mesh.topology={name} have no SparseCores; set it to "
            "false, or plan for v5p, v6e or tpu7x"
        )
    devices = topology.num_devices
    sizes = [getattr(config.mesh, axis) for axis in mesh_rules.AXES]
    known = math.prod(size for size in sizes if size != -1)
    if config.mode == "plan" and (devices % max(known, 1) if -1 in sizes else devices != known):
        shown = " ".join(f"mesh.{axis}={size}" for axis, size in zip(mesh_rules.AXES, sizes, strict=True))
        yield f"mesh.topology={name}: {shown} must multiply to its {devices} devices; change a size, or set one to -1"


@_rule("distributed.num_processes", "distributed.process_id")
def _processes(config: Config) -> Iterator[str]:
    found = config.distributed
    parts = {"num_processes": found.num_processes, "process_id": found.process_id}
    missing = [f"distributed.{name}" for name, value in parts.items() if value is None]
    if found.coordinator is None and len(missing) < 2:
        yield "distributed.coordinator=null: set it to HOST:PORT of process 0, or remove num_processes and process_id"
    elif found.coordinator is not None and missing:
        yield f"distributed.coordinator={found.coordinator}: also set {' and '.join(missing)}"
    elif found.num_processes is not None and found.process_id is not None and found.process_id >= found.num_processes:
        yield (
            f"distributed.process_id={found.process_id}: must be below distributed.num_processes={found.num_processes}"
        )
    if found.coordinator is not None:
        try:
            split_address(found.coordinator)
        except ValueError as error:
            yield f"distributed.coordinator={found.coordinator}: {error}"


@_rule()
def _run_folder(config: Config) -> Iterator[str]:
    if not is_path(config.run.dir):
        yield f"run.dir={config.run.dir!r}: must be the path of a folder; for example run.dir=runs"
    elif is_file(config.run.dir):
        yield f"run.dir={config.run.dir!r}: is a file; give the path of a folder"
    if config.run.allow_new and config.run.init_from is None:
        yield (
            f"run.allow_new=[{','.join(config.run.allow_new)}]: unused without run.init_from, the run to start from; "
            "remove it or set run.init_from"
        )
    if config.run.name == "latest":
        yield "run.name='latest': reserved, as run=latest means the newest run; choose another name"
    for name, value in (
        ("run.name", config.run.name),
        ("scale_name", config.scale_name),
        ("method_name", config.method_name),
    ):
        if value is not None and not _is_name(value):
            yield (
                f"{name}={value!r}: names a folder; use at most {MAX_NAME} letters, digits, '.', '_', "
                "'-', '+', '=' or ',', not beginning with '.'"
            )


def _experts_source(config: Config) -> str:
    """The settings that determine the number of experts, with their values."""
    if config.pool.experts is not None:
        return f"pool.experts={config.pool.experts}"
    parts = f"moe.experts_per_layer={config.moe.experts_per_layer} x {block_rules.layers_with_experts(config)}"
    return parts if config.pool.fraction == 1 else f"pool.fraction={config.pool.fraction} of {parts}"


def _is_name(text: str) -> bool:
    return len(text) <= MAX_NAME and re.fullmatch(r"[A-Za-z0-9_+=,-][A-Za-z0-9._+=,-]*", text) is not None
