"""Which configurations can be run.

`validate` knows every constraint and reports all that are broken at once, before any array exists. Each message names
the setting with its value, says what is allowed and what to do.

Values of the wrong type are reported alone, then every number outside its range together with every broken relation
between settings whose own values are sound.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from unipool_jax.config import lock_schedule, mesh_rules
from unipool_jax.config.chips import parse_topology
from unipool_jax.config.parsing import from_mapping
from unipool_jax.config.ranges import MAX_EXPERTS, RANGES
from unipool_jax.config.schema import Config, ConfigError, settings, to_mapping

TOKENIZER_SIZES = {"bytes": 257, "demo": 8192, "gpt2": 50257}
"""Vocabulary of the tokenizers known by name; that of a tokenizer.json is compared when it is loaded."""

MAX_ROWS = 2**31 - 1
"""Rows of one expert batch: they are indexed with int32."""

MAX_NAME = 200
"""Characters in the name of a folder; file systems allow 255 bytes."""


class _Rule(NamedTuple):
    reads: frozenset[str]
    find: Callable[[Config], Iterator[str]]
    about_data: bool


_RULES: list[_Rule] = []


def _rule(*reads: str, about_data: bool = False) -> Callable[[Callable[[Config], Iterator[str]]], Any]:
    """Register a relation between the settings `reads`; it is asked only when each of them is sound by itself."""

    def register(find: Callable[[Config], Iterator[str]]) -> Callable[[Config], Iterator[str]]:
        _RULES.append(_Rule(frozenset(reads), find, about_data))
        return find

    return register


def validate(config: Config) -> None:
    """Refuse a configuration that cannot be run.

    Raises:
      ConfigError: with every problem that `problems` finds.
    """
    found = problems(config)
    if found:
        raise ConfigError(found)


def problems(config: Config) -> list[str]:
    """What keeps `config` from being run, one message for each problem; empty when nothing does.

    With `mode=describe` and `mode=plan` no data is read, so its files and splits are not looked at.
    """
    try:
        config = from_mapping(to_mapping(config))
    except ConfigError as error:
        return error.problems
    values = settings(config)
    unsound = {name for name, allowed in RANGES.items() if values[name] is not None and values[name] not in allowed}
    found = [f"{name}={values[name]}: must be {allowed}" for name, allowed in RANGES.items() if name in unsound]
    for rule in _RULES:
        if rule.reads.isdisjoint(unsound) and not (rule.about_data and config.mode != "train"):
            found.extend(rule.find(config))
    return found


_TOTAL_EXPERTS = ("pool.experts", "pool.fraction", "moe.experts_per_layer", "model.num_layers")


@_rule("model.hidden_size", "model.num_heads")
def _head_size(config: Config) -> Iterator[str]:
    model = config.model
    if model.hidden_size % model.num_heads:
        yield (
            f"model.hidden_size={model.hidden_size}: must be a multiple of model.num_heads={model.num_heads}; "
            f"the next one is {_next_multiple(model.hidden_size, model.num_heads)}"
        )
    elif config.head_size % 2:
        yield (
            f"model.num_heads={model.num_heads}: gives heads of {config.head_size} channels, but rotary positions "
            f"turn pairs of channels; choose a number for which model.hidden_size={model.hidden_size} / "
            "model.num_heads is even"
        )


@_rule("model.num_heads", "model.num_kv_heads")
def _kv_heads(config: Config) -> Iterator[str]:
    model = config.model
    if model.num_heads % model.num_kv_heads:
        yield (
            f"model.num_kv_heads={model.num_kv_heads}: must divide model.num_heads={model.num_heads}; "
            f"choose one of {_divisors(model.num_heads)}"
        )


@_rule("pool.groups", "model.num_layers")
def _groups(config: Config) -> Iterator[str]:
    groups, layers = config.pool.groups, config.model.num_layers
    if config.moe.router != "none" and layers % groups:
        yield f"pool.groups={groups}: must divide model.num_layers={layers}; choose one of {_divisors(layers)}"


@_rule("pool.groups", "moe.top_k", *_TOTAL_EXPERTS)
def _experts(config: Config) -> Iterator[str]:
    if config.moe.router == "none":
        return
    total, groups, top_k = config.total_experts, config.pool.groups, config.moe.top_k
    source = _experts_source(config)
    if total > MAX_EXPERTS:
        yield f"{source}: gives {total} experts in all, at most {MAX_EXPERTS} are supported; choose fewer"
    elif total < groups or total % groups:
        lower = total // groups * groups
        nearest = " or ".join(str(n) for n in (lower, lower + groups) if n)
        yield (
            f"{source}: gives {total} experts in all, which do not fill pool.groups={groups} pools equally; "
            f"set pool.experts to a multiple of {groups}, for example {nearest}"
        )
    elif top_k > total // groups:
        yield (
            f"moe.top_k={top_k}: a layer chooses from a pool of {total // groups} experts ({source}, "
            f"pool.groups={groups}); choose at most {total // groups}, or give the pools more experts"
        )


@_rule("pool.groups", "moe.top_k", "loss.z_coefficient", *_TOTAL_EXPERTS)
def _dense(config: Config) -> Iterator[str]:
    if config.moe.router != "none":
        return
    layers, why = config.model.num_layers, "moe.router=none is the dense model"
    if config.pool.groups != layers:
        yield f"pool.groups={config.pool.groups}: {why}, without sharing; set pool.groups={layers} or choose a router"
    if config.total_experts != layers or config.moe.experts_per_layer != 1:
        yield (
            f"{_experts_source(config)}: {why}, with one block per layer; set moe.experts_per_layer=1 and leave "
            "pool.fraction and pool.experts alone, or choose a router"
        )
    if config.moe.top_k != 1:
        yield f"moe.top_k={config.moe.top_k}: {why}, with nothing to choose; set moe.top_k=1 or choose a router"
    if config.loss.balance != "none":
        yield f"loss.balance={config.loss.balance}: {why}, with nothing to balance; set loss.balance=none"
    if config.loss.z_coefficient:
        yield f"loss.z_coefficient={config.loss.z_coefficient}: {why}, without router logits; set it to 0"


@_rule("loss.expert_bias_rate")
def _expert_bias(config: Config) -> Iterator[str]:
    loss, router = config.loss, config.moe.router
    if loss.balance != "expert_bias":
        return
    if router not in ("sigmoid", "none"):
        yield (
            f"loss.balance=expert_bias: works with moe.router=sigmoid only, not {router}; "
            "set moe.router=sigmoid, or loss.balance=switch or pool"
        )
    if not loss.expert_bias_rate:
        yield "loss.expert_bias_rate=0.0: balances nothing; give a positive rate or set loss.balance=none"


@_rule("loss.switch_coefficient", "loss.switch_group_sequences", "train.microbatch_size")
def _switch(config: Config) -> Iterator[str]:
    loss, microbatch = config.loss, config.train.microbatch_size
    if loss.balance != "switch":
        return
    if not loss.switch_coefficient:
        yield "loss.switch_coefficient=0.0: balances nothing; give a positive weight or set loss.balance=none"
    if microbatch % loss.switch_group_sequences:
        yield (
            f"loss.switch_group_sequences={loss.switch_group_sequences}: must divide "
            f"train.microbatch_size={microbatch}; choose one of {_divisors(microbatch)}"
        )


@_rule("loss.pool_coefficient")
def _pool_loss(config: Config) -> Iterator[str]:
    loss = config.loss
    if loss.balance == "pool" and not loss.pool_coefficient:
        yield "loss.pool_coefficient=0.0: balances nothing; give a positive weight or set loss.balance=none"
    if loss.balance != "pool" and loss.pool_statistics == "previous":
        yield (
            f"loss.pool_statistics=previous: belongs to loss.balance=pool, not {loss.balance}; "
            "leave loss.pool_statistics=current"
        )


_rule(
    *("pool.groups", "moe.top_k", "loss.pool_coefficient", "lock.entropy_target", "train.steps", "train.eval_every"),
    *("lock.lock_fraction", "lock.anneal_fraction", "lock.entropy_warmup_fraction", "lock.lock_step"),
    *("lock.anneal_steps", "lock.entropy_warmup_steps", "mesh.expert", *_TOTAL_EXPERTS),
)(lock_schedule.problems)


@_rule("optimizer.learning_rate", "optimizer.min_learning_rate")
def _learning_rates(config: Config) -> Iterator[str]:
    low, peak = config.optimizer.min_learning_rate, config.optimizer.learning_rate
    if low > peak:
        yield f"optimizer.min_learning_rate={low}: must not exceed optimizer.learning_rate={peak}; lower it"


@_rule("train.batch_size", "train.microbatch_size")
def _microbatches(config: Config) -> Iterator[str]:
    batch, microbatch = config.train.batch_size, config.train.microbatch_size
    if batch % microbatch:
        yield (
            f"train.microbatch_size={microbatch}: must divide train.batch_size={batch}; "
            f"the largest that fits is {max(n for n in range(1, microbatch + 1) if batch % n == 0)}"
        )


@_rule("train.microbatch_size", "train.eval_batch_size", "data.sequence_length", "moe.top_k")
def _rows(config: Config) -> Iterator[str]:
    length, top_k = config.data.sequence_length, config.moe.top_k
    for name in ("microbatch_size", "eval_batch_size"):
        sequences = getattr(config.train, name)
        if sequences * length * top_k > MAX_ROWS:
            yield (
                f"train.{name}={sequences}: with data.sequence_length={length} and moe.top_k={top_k} this is more "
                f"than {MAX_ROWS} rows for the experts at once; choose at most {MAX_ROWS // (length * top_k)}"
            )


@_rule("model.vocab_size", about_data=True)
def _vocabulary(config: Config) -> Iterator[str]:
    tokenizer, rows = config.data.tokenizer, config.model.vocab_size
    size = TOKENIZER_SIZES.get(tokenizer)
    if size is not None and rows < size:
        yield (
            f"model.vocab_size={rows}: data.tokenizer={tokenizer} has {size} tokens; "
            f"set model.vocab_size={_next_multiple(size, 1024)} or choose another tokenizer"
        )


@_rule(about_data=True)
def _tokenizer(config: Config) -> Iterator[str]:
    tokenizer = config.data.tokenizer
    if tokenizer not in TOKENIZER_SIZES and not _is_file(tokenizer):
        yield (
            f"data.tokenizer={tokenizer!r}: neither one of {', '.join(TOKENIZER_SIZES)} nor the path of an existing "
            "tokenizer.json; choose one of these"
        )


@_rule(about_data=True)
def _split(config: Config) -> Iterator[str]:
    split = config.data.split
    if len(split) != 3 or any(not 0 <= weight <= 1_000_000 for weight in split) or not split[0]:
        yield (
            f"data.split={list(split)}: must be three weights from 0 to 1000000 for train, valid and test, "
            "the first above 0; for example data.split=[969,30,1]"
        )


@_rule(about_data=True)
def _sources(config: Config) -> Iterator[str]:
    data = config.data
    for name, source, choice in (("files", "files", "text"), ("stores", "stores", "pile")):
        paths: tuple[str, ...] = getattr(data, name)
        if paths and data.source != source:
            yield (
                f"data.{name}={list(paths)}: not read with data.source={data.source}; "
                f"choose data={choice} (data.source={source}) or remove them"
            )
        if not paths and data.source == source:
            yield f"data.{name}=[]: data.source={source} needs at least one; give data.{name}=[PATH,...]"
    if data.source == "files":
        for path in data.files:
            if not _is_file(path):
                yield f"data.files: {path!r} is not an existing file; correct the path or remove it"
    if data.source == "stores":
        for path in data.stores:
            if not (_is_dir(path) or (_is_file(f"{path}.bin") and _is_file(f"{path}.idx"))):
                yield (
                    f"data.stores: {path!r} is neither a folder nor a prefix with {path}.bin and {path}.idx beside "
                    "each other; correct the path, or make a store with `python -m unipool_jax.data`"
                )


@_rule(about_data=True)
def _cache(config: Config) -> Iterator[str]:
    cache = config.data.cache_dir
    if not _is_path(cache):
        yield f"data.cache_dir={cache!r}: must be the path of a folder; for example data.cache_dir=.cache/tokens"
    elif _is_file(cache):
        yield f"data.cache_dir={cache!r}: is a file; give the path of a folder"


_rule(
    *(f"mesh.{axis}" for axis in mesh_rules.AXES),
    *("train.microbatch_size", "train.eval_batch_size", "pool.groups", *_TOTAL_EXPERTS),
    *("model.hidden_size", "model.num_kv_heads", "model.ffn_size", "model.vocab_size"),
)(mesh_rules.problems)


@_rule(*(f"mesh.{axis}" for axis in mesh_rules.AXES))
def _topology(config: Config) -> Iterator[str]:
    name = config.mesh.topology
    if name is None:
        if config.mode == "plan":
            yield "mesh.topology=null: mode=plan needs devices to plan for; choose mesh=v5p_64 or set mesh.topology"
        return
    try:
        devices = parse_topology(name).num_devices
    except ValueError as error:
        yield f"mesh.topology={name}: {error}"
        return
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
        yield "distributed.coordinator=null: set it to HOST:PORT of process 0, or leave the other two alone"
    elif found.coordinator is not None and missing:
        yield f"distributed.coordinator={found.coordinator}: needs {' and '.join(missing)} too"
    elif found.num_processes is not None and found.process_id is not None and found.process_id >= found.num_processes:
        yield (
            f"distributed.process_id={found.process_id}: must be below distributed.num_processes={found.num_processes}"
        )


@_rule()
def _run_folder(config: Config) -> Iterator[str]:
    if not _is_path(config.run.dir):
        yield f"run.dir={config.run.dir!r}: must be the path of a folder; for example run.dir=runs"
    elif _is_file(config.run.dir):
        yield f"run.dir={config.run.dir!r}: is a file; give the path of a folder"
    if config.run.name == "latest":
        yield "run.name='latest': eval.py run=latest means the newest run; choose another name"
    for name, value in (
        ("run.name", config.run.name),
        ("scale_name", config.scale_name),
        ("method_name", config.method_name),
    ):
        if value is not None and not _is_name(value):
            yield (
                f"{name}={value!r}: is part of a folder's name; use at most {MAX_NAME} letters, digits, '.', '_', "
                "'-', '+', '=' or ',', not beginning with '.'"
            )


def _experts_source(config: Config) -> str:
    """The settings that fix the number of experts, as they stand."""
    if config.pool.experts is not None:
        return f"pool.experts={config.pool.experts}"
    parts = f"moe.experts_per_layer={config.moe.experts_per_layer} x model.num_layers={config.model.num_layers}"
    return parts if config.pool.fraction == 1 else f"pool.fraction={config.pool.fraction} of {parts}"


def _divisors(number: int) -> str:
    """Divisors as text; only the small and the large ones of a number with many."""
    found = [n for n in range(1, number + 1) if number % n == 0]
    shown = [str(n) for n in found]
    return ", ".join(shown if len(shown) <= 12 else [*shown[:6], "...", *shown[-5:]])


def _next_multiple(number: int, step: int) -> int:
    return -(-number // step) * step


def _is_name(text: str) -> bool:
    return len(text) <= MAX_NAME and re.fullmatch(r"[A-Za-z0-9_+=,-][A-Za-z0-9._+=,-]*", text) is not None


def _is_path(text: str) -> bool:
    """Whether the operating system could take `text` as a path; it refuses NUL with a ValueError."""
    return bool(text.strip()) and "\0" not in text


def _is_file(path: str) -> bool:
    return _is_path(path) and _safe(Path(path).is_file)


def _is_dir(path: str) -> bool:
    return _is_path(path) and _safe(Path(path).is_dir)


def _safe(ask: Callable[[], bool]) -> bool:
    """False for a path too long or without permission, which is as good as absent."""
    try:
        return ask()
    except (OSError, ValueError):
        return False
