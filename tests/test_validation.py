"""Every impossible configuration is refused with the setting named, and what is accepted can be built."""

from __future__ import annotations

import dataclasses
import math
import re
import typing
from pathlib import Path
from typing import Any, get_args

import jax
import pytest
from hypothesis import assume, given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from tiny import METHODS
from unipool_jax.config.compose import compose_config
from unipool_jax.config.parsing import from_mapping
from unipool_jax.config.ranges import RANGES, Range
from unipool_jax.config.rules import problems, validate
from unipool_jax.config.schema import Config, ConfigError, Router, settings, to_mapping
from unipool_jax.training.state import init_state

DEMO = compose_config([])
COMPOSED = {method: compose_config([f"method={method}"]) for method in METHODS}


def changed(config: Config, values: dict[str, Any]) -> Config:
    """`config` with settings by dotted name replaced, past every check."""
    for name, value in values.items():
        section, _, key = name.rpartition(".")
        if section:
            config = dataclasses.replace(
                config, **{section: dataclasses.replace(getattr(config, section), **{key: value})}
            )
        else:
            config = dataclasses.replace(config, **{key: value})
    return config


def kinds(name: str) -> tuple[Any, ...]:
    """The types that the schema allows for a setting, by its dotted name."""
    section, _, key = name.rpartition(".")
    owner = type(getattr(Config(), section)) if section else Config
    hint = typing.get_type_hints(owner)[key]
    literal_or_tuple = typing.get_origin(hint) in (typing.Literal, tuple)
    return (hint,) if literal_or_tuple else typing.get_args(hint) or (hint,)


NUMBERS = [name for name in settings(Config()) if {int, float} & set(kinds(name))]


def test_every_number_has_a_range() -> None:
    assert set(NUMBERS) <= set(RANGES) <= set(settings(Config()))


def test_the_defaults_lie_in_their_ranges() -> None:
    values = settings(Config())
    for name, allowed in RANGES.items():
        value = values[name]
        numbers = value if isinstance(value, tuple) else () if value is None else (value,)
        assert all(number in allowed for number in numbers), name


@pytest.mark.parametrize("method", METHODS)
def test_the_methods_are_valid(method: str) -> None:
    assert problems(COMPOSED[method]) == []


# Each line is one problem: overrides that make it, how the message must begin, and what it must advise.
RELATIONS = [
    ("model.hidden_size=130", "model.hidden_size=130", "132"),
    ("model.hidden_size=132", "model.num_heads=4", "33"),
    ("model.head_size=33", "model.head_size=33", "even"),
    ("model.num_kv_heads=3", "model.num_kv_heads=3", "1, 2, 4"),
    ("attention.kind=window attention.window=256", "attention.window=256", "data.sequence_length=256"),
    ("attention.gate=full", "attention.gate=full", "attention.kind=switch"),
    ("attention.kind=window attention.switch_alpha=1", "attention.switch_alpha=1.0", "attention.kind=switch"),
    ("method=unipool_lock attention.kind=switch", "attention.kind=switch", "lock.ownership=none"),
    ("attention.window=64", "attention.window=64", "unused with attention.kind=full"),
    ("distill.weight=1", "distill.weight=1.0", "distill.teacher"),
    ("distill.teacher=a mode=plan mesh.topology=v5p:2x2x1", "distill.teacher=a", "remove it"),
    (
        "mode=plan mesh.topology=v5e:2x2 mesh.sparse_core_collectives=true",
        "mesh.sparse_core_collectives=true",
        "v5p, v6e or tpu7x",
    ),
    ("model.post_norm_ffn=1", "model.post_norm_ffn=1.0", "model.norm=depth_scaled_sandwich"),
    ("model.norm=sandwich model.post_norm_attention=1", "model.post_norm_attention=1.0", "model.norm=sandwich"),
    ("model.post_norm_experts=none", "model.post_norm_experts=none", "model.norm=sandwich"),
    ("method=dense model.norm=sandwich model.post_norm_experts=none", "model.post_norm_experts=none", "a router"),
    ("model.norm=sandwich model.post_norm_experts=post", "model.post_norm_experts=post", "norm_then_gate"),
    ("attention.kind=window attention.full_layers=3", "attention.full_layers=3", "attention.kind=alternating"),
    ("attention.kind=alternating attention.full_layers=1", "attention.full_layers=1", "attention.kind=full"),
    ("attention.kind=alternating attention.full_layers=0", "attention.full_layers=0", "at most 6"),
    ("attention.kind=alternating attention.full_layers=7", "attention.full_layers=7", "at most 6"),
    ("attention.kind=alternating attention.full_layers=[]", "attention.full_layers=[]", "attention.kind=window"),
    ("attention.kind=alternating attention.full_layers=[1,6]", "attention.full_layers=[1, 6]", "0 to 5"),
    ("attention.kind=alternating attention.full_layers=[1,1]", "attention.full_layers=[1, 1]", "different layers"),
    ("pool.groups=4", "pool.groups=4", "1, 2, 3, 6"),
    ("pool.groups=6 pool.experts=32", "pool.experts=32", "30 or 36"),
    ("pool.groups=6 pool.experts=4", "pool.experts=4", "6"),
    ("pool.groups=6 pool.fraction=0.5 moe.experts_per_layer=5", "pool.fraction=0.5", "multiple of 6"),
    ("pool.fraction=0.001", "pool.fraction=0.001", "0 experts"),
    ("moe.experts_per_layer=16384", "moe.experts_per_layer=16384", "at most 16384"),
    ("moe.top_k=49", "moe.top_k=49", "at most 48"),
    ("moe.top_k=9 pool.groups=6", "moe.top_k=9", "at most 8"),
    ("method=dense pool.groups=1", "pool.groups=1", "pool.groups=6"),
    ("method=dense moe.experts_per_layer=8", "moe.experts_per_layer=8", "moe.experts_per_layer=1"),
    ("method=dense pool.experts=3", "pool.experts=3", "defaults"),
    ("method=dense moe.top_k=2", "moe.top_k=2", "moe.top_k=1"),
    ("method=dense loss.balance=switch", "loss.balance=switch", "loss.balance=none"),
    ("method=dense loss.balance=pool", "loss.balance=pool", "loss.balance=none"),
    ("method=dense loss.balance=expert_bias", "loss.balance=expert_bias", "loss.balance=none"),
    ("method=dense loss.z_coefficient=0.1", "loss.z_coefficient=0.1", "0"),
    ("method=dense moe.shared_experts=1", "moe.shared_experts=1", "moe.shared_experts=0"),
    ("method=dense moe.depth_vectors=true", "moe.depth_vectors=true", "choose a router"),
    ("method=dense moe.dense_layers=1", "moe.dense_layers=1", "moe.dense_layers=0"),
    ("moe.dense_layers=6", "moe.dense_layers=6", "at most 5"),
    ("moe.dense_ffn_size=64", "moe.dense_ffn_size=64", "remove it"),
    ("moe.dense_layers=1 moe.dense_ffn_size=65 mesh.tensor=2", "mesh.tensor=2", "moe.dense_ffn_size=65"),
    ("moe.dense_layers=1 pool.groups=2", "pool.groups=2", "the 5 layers with experts (model.num_layers=6, moe.dense"),
    ("moe.dense_layers=2 pool.starts=[0,0,0,0,0,0] pool.window=32", "pool.starts=[0, 0, 0, 0, 0, 0]", "the 4 layers"),
    ("moe.shared_expert_gate=true", "moe.shared_expert_gate=true", "moe.shared_experts=1"),
    ("moe.router=softmax loss.balance=expert_bias", "loss.balance=expert_bias", "moe.router=sigmoid"),
    ("loss.balance=expert_bias", "loss.balance=expert_bias", "moe.router=sigmoid"),
    ("method=vanilla_aux_free loss.expert_bias_rate=0", "loss.expert_bias_rate=0", "positive"),
    ("method=vanilla loss.switch_coefficient=0", "loss.switch_coefficient=0", "positive"),
    ("method=vanilla train.microbatch_size=4", "loss.switch_group_sequences=8", "1, 2, 4"),
    ("method=vanilla train.microbatch_size=4", "loss.switch_group_sequences=8", "set train.microbatch_size=8, or"),
    ("method=vanilla train.batch_size=4", "train.microbatch_size=8", "4, with loss.switch_group_sequences=4"),
    ("method=vanilla train.batch_size=24 train.microbatch_size=16", "train.microbatch_size=16", "that fits is 8"),
    ("loss.pool_coefficient=0", "loss.pool_coefficient=0", "positive"),
    ("method=vanilla loss.pool_statistics=previous", "loss.pool_statistics=previous", "current"),
    ("method=vanilla loss.balance_groups=2", "loss.balance_groups=2", "loss.balance=pool"),
    ("method=unipool_lock loss.balance_groups=2", "loss.balance_groups=2", "lock.ownership=learned"),
    ("loss.balance_groups=3", "loss.balance_groups=3", "its 1 micro-batches; set 2"),
    ("train.batch_size=24 train.microbatch_size=4 loss.balance_groups=4", "loss.balance_groups=4", "set 3"),
    ("loss.balance_groups=2 loss.pool_statistics=previous", "loss.balance_groups=2", "pool_statistics=current"),
    (
        "train.batch_size=16 train.microbatch_size=4 loss.balance_groups=2 growth.layers=[3,6] growth.ends=[.5,1]",
        "loss.balance_groups=2",
        "set loss.balance_groups=4 or 1",
    ),
    ("optimizer.min_learning_rate=0.1", "optimizer.min_learning_rate=0.1", "0.003"),
    ("train.microbatch_size=6", "train.microbatch_size=6", "4"),
    ("train.eval_batch_size=1048576 data.sequence_length=65536", "train.eval_batch_size=1048576", "at most 32767"),
    ("model.vocab_size=8000", "model.vocab_size=8000", "8192"),
    ("data.tokenizer=gpt2", "model.vocab_size=8192", "50257"),
    ("data.tokenizer=gpt3", "data.tokenizer='gpt3'", "bytes, demo, gpt2"),
    ("data.split=[1,1]", "data.split=[1, 1]", "three"),
    ("data.split=[0,1,1]", "data.split=[0, 1, 1]", "first positive"),
    ("data.split=[1,-1,1]", "data.split=[1, -1, 1]", "from 0"),
    ("data.files=[nowhere.txt]", "data.files=['nowhere.txt']", "data=text"),
    ("data.stores=[nowhere]", "data.stores=['nowhere']", "data=pile"),
    ("data=text", "data.files=[]", "data.files=[PATH,...]"),
    ("data=text data.files=[nowhere.txt]", "data.files: 'nowhere.txt'", "correct the path"),
    ("data=pile data.tokenizer=demo", "data.stores=[]", "data.stores=[PATH,...]"),
    ("data=pile data.tokenizer=demo data.stores=[nowhere]", "data.stores: 'nowhere'", "nowhere.bin"),
    ("data.cache_dir=''", "data.cache_dir=''", "path of a folder"),
    ("mesh.data=32", "train.microbatch_size=8", "multiple of mesh.data=32; the next one is 32"),
    ("mesh.expert=8 pool.experts=44", "mesh.expert=8", "another pool.experts"),
    ("mesh.data=-1 mesh.expert=-1", "mesh.data=-1 and mesh.expert=-1", "only one"),
    ("mesh.fsdp=0", "mesh.fsdp=0", "-1"),
    ("mesh.tensor=4", "mesh.tensor=4", "model.num_kv_heads=2"),
    ("distributed.process_id=1", "distributed.coordinator=null", "HOST:PORT"),
    ("distributed.coordinator=a:1", "distributed.coordinator=a:1", "distributed.num_processes and"),
    (
        "distributed.coordinator=a:1 distributed.num_processes=2 distributed.process_id=2",
        "distributed.process_id=2",
        "below distributed.num_processes=2",
    ),
    ("run.dir=''", "run.dir=''", "path of a folder"),
    ("run.name=a/b", "run.name='a/b'", "letters"),
    ("run.name=..", "run.name='..'", "letters"),
    ("run.name=''", "run.name=''", "letters"),
    ("run.name=latest", "run.name='latest'", "another name"),
    ("scale_name=a/b", "scale_name='a/b'", "letters"),
]  # fmt: skip


@pytest.mark.parametrize(("line", "names", "advises"), RELATIONS, ids=[line for line, _, _ in RELATIONS])
def test_each_relation_is_one_problem(line: str, names: str, advises: str) -> None:
    found = problems(compose_config(line.split()))
    assert len(found) == 1, found
    assert found[0].startswith(names)
    assert advises in found[0].removeprefix(names)


@pytest.mark.parametrize(
    "line",
    [
        "moe.top_k=48",
        "moe.top_k=8 pool.groups=6",
        "pool.groups=6 pool.fraction=0.5",
        "pool.experts=7",  # a pool shared by all layers needs no multiple of the layers
        "train.microbatch_size=4",
        "method=vanilla train.microbatch_size=8 loss.switch_group_sequences=4",
        "loss.pool_statistics=previous",
        "loss.balance=none loss.pool_coefficient=0",
        "method=vanilla_aux_free moe.top_k=2",
        "method=vanilla_aux_free loss.balance=switch",
        "data.tokenizer=bytes",
        "data.split=[1,0,0]",
        "model.num_kv_heads=4",
        "attention.kind=alternating attention.full_layers=[0,5] attention.window=255",
        "attention.kind=window attention.window=1",
        "optimizer.min_learning_rate=2e-3",
        "train.eval_every=0 train.checkpoint_every=0",
        "run.name='a-1_b.c=3'",
    ],
)
def test_bounds_that_are_allowed(line: str) -> None:
    assert problems(compose_config(line.split())) == []


def test_all_problems_are_reported_at_once() -> None:
    lines = ["model.num_kv_heads=3", "pool.groups=4", "train.steps=0", "mesh.tensor=2", "run.name=../x"]
    with pytest.raises(ConfigError) as caught:
        validate(compose_config(lines))
    assert {re.split("[=:]", problem)[0] for problem in caught.value.problems} == {
        line.partition("=")[0] for line in lines
    }
    assert str(caught.value).startswith("5 problems in the configuration:\n  - ")


def test_a_relation_is_not_asked_of_an_unsound_setting() -> None:
    assert problems(compose_config(["model.num_heads=0"])) == ["model.num_heads=0: must be at least 1 and at most 1024"]


def test_values_of_the_wrong_type_are_found_in_a_config_made_in_python() -> None:
    config = changed(DEMO, {"model.num_layers": 2.5, "moe.router": "topk", "train.log_every": None, "mesh": None})
    assert len(problems(config)) == 4


def test_describing_needs_no_data() -> None:
    for line in ("scale=182m", "data=text", "data.tokenizer=gpt3", "data.split=[0]", "data.files=[nowhere]"):
        assert problems(compose_config([line, "mode=describe"])) == []
        assert problems(compose_config([line])) != []
    assert problems(compose_config(["mode=describe", "data.sequence_length=0"])) != []


def test_existing_data_is_accepted(tmp_path: Path) -> None:
    for name in ("a.txt", "m.bin", "m.idx", "tokenizer.json"):
        (tmp_path / name).write_text("x")
    (tmp_path / "store").mkdir()
    tokenizer = f"data.tokenizer={tmp_path}/tokenizer.json"
    assert problems(compose_config(["data=text", f"data.files=[{tmp_path}/a.txt]", tokenizer])) == []
    stores = f"data.stores=[{tmp_path}/store,{tmp_path}/m]"
    assert problems(compose_config(["data=pile", stores, tokenizer])) == []
    (tmp_path / "m.idx").unlink()
    assert [f"{tmp_path}/m.idx" in p for p in problems(compose_config(["data=pile", stores, tokenizer]))] == [True]
    assert len(problems(compose_config([f"run.dir={tmp_path}/a.txt", f"data.cache_dir={tmp_path}/a.txt"]))) == 2


def outside(name: str) -> st.SearchStrategy[Any]:
    """Values of the right type that no configuration may have."""
    allowed = RANGES[name]
    if int in kinds(name):
        low, high = int(allowed.low), int(allowed.high)
        return st.one_of(st.integers(max_value=low - 1), st.integers(min_value=high + 1))
    bounds = [allowed.low] * allowed.open_low + [allowed.high] * allowed.open_high
    return st.one_of(
        st.floats(max_value=allowed.low, exclude_max=True),
        st.floats(min_value=allowed.high, exclude_min=True),
        st.sampled_from([math.nan, math.inf, -math.inf, *bounds]),
    )


def of_wrong_type(name: str) -> st.SearchStrategy[Any]:
    """Values that the schema does not allow for a setting, whatever their size."""
    anything = st.one_of(
        st.none(),
        st.booleans(),
        st.integers(),
        st.floats(),
        st.text(max_size=5),
        st.binary(max_size=3),
        st.lists(st.none(), min_size=1, max_size=2),
        st.dictionaries(st.text(max_size=2), st.integers(), max_size=1),
    )
    types = kinds(name)

    def wrong(value: Any) -> bool:
        if value is None:
            return type(None) not in types
        if isinstance(value, bool):
            return bool not in types
        if isinstance(value, int) and float in types:
            return False
        if isinstance(value, str) and tuple[str, ...] in types:  # a list of one
            return False
        if typing.get_origin(types[0]) is typing.Literal:
            return value not in typing.get_args(types[0]) if isinstance(value, str) else True
        return not isinstance(value, tuple(kind for kind in types if isinstance(kind, type)))

    return anything.filter(wrong)


def corruption(name: str) -> st.SearchStrategy[tuple[str, Any]]:
    return st.tuples(st.just(name), outside(name) if name in RANGES else of_wrong_type(name))


CORRUPTED_VALUE = st.sampled_from(NUMBERS).flatmap(corruption)
CORRUPTED_TYPE = st.sampled_from(sorted(settings(Config()))).flatmap(
    lambda name: st.tuples(st.just(name), of_wrong_type(name))
)


@hypothesis_settings(max_examples=200, deadline=None)
@given(st.sampled_from(METHODS), CORRUPTED_VALUE)
def test_a_number_out_of_range_is_refused_by_name(method: str, change: tuple[str, Any]) -> None:
    found = problems(changed(COMPOSED[method], dict([change])))
    assert [problem.split("=")[0] for problem in found] == [change[0]]


@hypothesis_settings(max_examples=200, deadline=None)
@given(st.sampled_from(METHODS), CORRUPTED_TYPE)
def test_a_value_of_the_wrong_type_is_refused_by_name(method: str, change: tuple[str, Any]) -> None:
    found = problems(changed(COMPOSED[method], dict([change])))
    assert found
    assert all(re.split(r"[=\[]", problem)[0] == change[0] for problem in found)


@hypothesis_settings(max_examples=200, deadline=None)
@given(st.sampled_from(METHODS), st.lists(CORRUPTED_VALUE, min_size=2, max_size=6, unique_by=lambda change: change[0]))
def test_several_numbers_out_of_range_are_all_named(method: str, changes: list[tuple[str, Any]]) -> None:
    found = problems(changed(COMPOSED[method], dict(changes)))
    assert {problem.split("=")[0] for problem in found} == {name for name, _ in changes}


@hypothesis_settings(max_examples=100, deadline=None)
@given(st.lists(CORRUPTED_TYPE, min_size=2, max_size=6, unique_by=lambda change: change[0]))
def test_several_values_of_the_wrong_type_are_all_named(changes: list[tuple[str, Any]]) -> None:
    found = problems(changed(DEMO, dict(changes)))
    assert {re.split(r"[=\[]", problem)[0] for problem in found} == {name for name, _ in changes}


@hypothesis_settings(max_examples=200, deadline=None)
@given(
    st.text(max_size=40),
    st.sampled_from(
        ["run.name", "run.dir", "data.cache_dir", "data.tokenizer", "scale_name", "data.files", "data.stores"]
    ),
)
def test_any_text_is_accepted_or_refused_by_name(text: str, name: str) -> None:
    extra: dict[str, Any] = {name: text}
    if name in ("data.files", "data.stores"):
        extra = {name: (text,), "data.source": name.removeprefix("data.")}
    for problem in problems(changed(DEMO, extra)):
        assert problem.startswith((name, "model.vocab_size"))
    if name == "run.name" and not problems(changed(DEMO, extra)):
        assert Path(text).name == text
        assert text not in ("", ".", "..")


@hypothesis_settings(max_examples=100, deadline=None)
@given(st.recursive(st.none() | st.integers() | st.text(max_size=4), lambda inner: st.dictionaries(
    st.sampled_from(["model", "moe", "num_layers", "router", "colour"]), inner, max_size=3), max_leaves=8))  # fmt: skip
def test_any_mapping_is_a_config_or_a_config_error(mapping: Any) -> None:
    try:
        config = from_mapping(mapping if isinstance(mapping, dict) else {"model": mapping})
    except ConfigError:
        return
    assert from_mapping(to_mapping(config)) == config


SMALL: dict[str, st.SearchStrategy[Any]] = {
    "model.num_layers": st.integers(1, 4),
    "model.hidden_size": st.integers(2, 12),
    "model.num_heads": st.integers(1, 3),
    "model.num_kv_heads": st.integers(1, 2),
    "model.ffn_size": st.integers(1, 9),
    "model.vocab_size": st.integers(257, 300),
    "model.compute_dtype": st.sampled_from(["float32", "bfloat16"]),
    "model.remat": st.sampled_from(["none", "moe", "full"]),
    "moe.router": st.sampled_from(["none", *get_args(Router)]),
    "moe.experts_per_layer": st.integers(1, 3),
    "moe.top_k": st.integers(1, 3),
    "moe.router_dtype": st.sampled_from(["float32", "bfloat16"]),
    "moe.score_constant": st.sampled_from(["monte_carlo", "one"]),
    "pool.groups": st.integers(1, 4),
    "pool.fraction": st.sampled_from([0.5, 1.0]),
    "pool.experts": st.none() | st.integers(1, 8),
    "loss.balance": st.sampled_from(["none", "switch", "pool", "expert_bias"]),
    "loss.switch_group_sequences": st.integers(1, 2),
    "loss.pool_statistics": st.sampled_from(["current", "previous"]),
    "loss.z_coefficient": st.sampled_from([0.0, 0.1]),
    "optimizer.warmup_fraction": st.sampled_from([0.0, 0.01, 0.999]),
    "train.steps": st.integers(1, 3),
    "train.batch_size": st.integers(1, 4),
    "train.microbatch_size": st.integers(1, 4),
    "train.seed": st.integers(0, 2**32 - 1),
    "data.sequence_length": st.integers(2, 4),
    "data.tokenizer": st.just("bytes"),
}
"""Small models; most draws are impossible, `repaired` makes most of them possible."""


def repaired(values: dict[str, Any]) -> dict[str, Any]:
    """Make the relations likely to hold, so that many examples reach JAX; the validator still has the last word."""
    heads = values["model.num_heads"]
    values["model.hidden_size"] = max(2, values["model.hidden_size"] // (2 * heads)) * 2 * heads
    values["model.num_kv_heads"] = heads if heads % values["model.num_kv_heads"] else values["model.num_kv_heads"]
    if values["model.num_layers"] % values["pool.groups"]:
        values["pool.groups"] = values["model.num_layers"]
    if values["loss.balance"] == "expert_bias":
        values["moe.router"] = "sigmoid"
    if values["moe.router"] == "none":
        values |= {"moe.experts_per_layer": 1, "moe.top_k": 1, "pool.experts": None, "pool.fraction": 1.0}
        values |= {"pool.groups": values["model.num_layers"], "loss.balance": "none", "loss.z_coefficient": 0.0}
    if values["loss.balance"] != "pool":
        values["loss.pool_statistics"] = "current"
    values["train.batch_size"] = values["train.microbatch_size"] * 2
    return values


@hypothesis_settings(max_examples=15, deadline=None, derandomize=True)
@given(st.fixed_dictionaries(SMALL).map(repaired))
def test_what_is_accepted_can_be_built(values: dict[str, Any]) -> None:
    """Nothing that the validator accepts fails inside JAX; Hypothesis complains should it accept hardly anything."""
    config = changed(DEMO, values)
    assume(not problems(config))
    state = jax.eval_shape(lambda key: init_state(config, key), jax.random.key(config.train.seed))
    assert jax.tree.leaves(state)


@pytest.mark.parametrize(
    ("allowed", "inside", "beyond"),
    [
        (Range(0, 1), (0, 0.5, 1), (-1e-9, 1.1, math.nan, math.inf)),
        (Range(0, 1, open_low=True), (1e-9, 1), (0, math.nan)),
        (Range(0, 1, open_high=True), (0, 0.999), (1, math.nan)),
    ],
)
def test_range(allowed: Range, inside: tuple[float, ...], beyond: tuple[float, ...]) -> None:
    assert all(value in allowed for value in inside)
    assert not any(value in allowed for value in beyond)
