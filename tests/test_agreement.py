"""What processes of a run compare, and what they may have of their own."""

from __future__ import annotations

import dataclasses

import pytest

from unipool_jax.config.schema import Config
from unipool_jax.parallel.agreement import difference, facts


def said(mine: dict[str, str], theirs: dict[str, str]) -> str:
    return difference([mine, theirs])


@pytest.mark.parametrize(
    ("name", "value", "differs"),
    [
        ("JAX_ENABLE_X64", "1", True),
        ("JAX_DEFAULT_PRNG_IMPL", "rbg", True),
        ("LIBTPU_INIT_ARGS", "--xla_tpu_enable_async_collective_fusion=true", True),
        ("XLA_FLAGS", "--xla_cpu_enable_fast_math=true", True),
        ("XLA_FLAGS", "--xla_dump_to=/tmp/here", False),
        ("JAX_COMPILATION_CACHE_DIR", "/tmp/here", False),
        ("JAX_COORDINATOR_ADDRESS", "here:1", False),
        ("JAX_CUDA_VISIBLE_DEVICES", "3", False),
        ("HOME", "/elsewhere", False),
    ],
)
def test_variables(monkeypatch: pytest.MonkeyPatch, name: str, value: str, differs: bool) -> None:
    monkeypatch.delenv(name, raising=False)
    before = facts(Config())
    monkeypatch.setenv(name, value)
    found = said(before, facts(Config()))
    assert (f"environment {name}: unset in process 0, {value} in process 1" in found) == differs
    assert bool(found) == differs


def test_settings_are_compared_but_for_a_process_own_place() -> None:
    config = Config()
    place = dataclasses.replace(config.distributed, coordinator="b:1", process_id=1)
    data = dataclasses.replace(config.data, cache_dir="elsewhere", num_threads=9)
    assert said(facts(config), facts(dataclasses.replace(config, distributed=place, data=data))) == ""
    limits = dataclasses.replace(config.distributed, num_processes=3)
    found = said(facts(config), facts(dataclasses.replace(config, distributed=limits)))
    assert "distributed.num_processes: None in process 0, 3 in process 1" in found


def test_an_edited_source_is_other_code(monkeypatch: pytest.MonkeyPatch) -> None:
    before = facts(Config())
    monkeypatch.setattr("unipool_jax.parallel.agreement.VERSION", "9.9")
    assert "code of unipool_jax: " in said(before, facts(Config()))


def test_the_processes_that_differ_are_named() -> None:
    same = {"a": "1"}
    found = difference([same, same, {"a": "2"}, {"a": "1", "b": "3"}])
    assert "  - a: 1 in process 0, 2 in process 2\n  - b: unset in process 0, 3 in process 3\n" in found
    assert difference([same, None, same]) == ""
    many = difference([{str(i): "0" for i in range(30)}, {}])
    assert "  - and 10 more\n" in many
