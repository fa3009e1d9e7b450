"""Training over eight simulated devices, split in every way, gives the numbers of one device."""

from __future__ import annotations

import dataclasses
import functools
import re
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tiny import METHODS, WINDOWS, batch_shapes, slow_among, tiny_batch, tiny_config, tiny_state
from unipool_jax.config.mesh_rules import problems, resolve_sizes
from unipool_jax.config.schema import Config, ConfigError, MeshConfig
from unipool_jax.parallel.mesh import make_mesh, usable_mesh
from unipool_jax.training.placement import Placement, strided, with_placement
from unipool_jax.training.sharding import (
    memory_problem,
    misplaced_banks,
    placement,
    report,
    state_shardings,
    to_devices,
)
from unipool_jax.training.state import init_state, state_shapes
from unipool_jax.training.step import make_eval_step, make_train_step

STEPS = 20
MESHES = {
    "data 8": (8, 1, 1, 1),
    "expert 8": (1, 1, 8, 1),
    "data 2, expert 4": (2, 1, 4, 1),
    "data 2, fsdp 2, expert 2": (2, 2, 2, 1),
    "fsdp 8": (1, 8, 1, 1),
    "expert 4, tensor 2": (1, 1, 4, 2),
    "fsdp 2, expert 2, tensor 2": (1, 2, 2, 2),
}
ALL_WAYS = "data 2, fsdp 2, expert 2"


class Trained(NamedTuple):
    """Twenty steps: the state at the end and the metrics of each step."""

    params: Any
    moments: Any
    metrics: list[dict[str, Any]]


def configure(method: str, *more: str) -> Config:
    experts = [] if method == "dense" else ["moe.experts_per_layer=8"]
    # Room for all tokens at one expert: without a balance loss, early routing may be that skewed.
    return tiny_config(method, "model.compute_dtype=float32", "mesh.capacity_factor=8", *experts, *more)


def mesh_of(sizes: tuple[int, int, int, int]) -> jax.sharding.Mesh:
    return make_mesh(MeshConfig(*sizes), jax.devices()[:8])


def trained(config: Config, sizes: tuple[int, int, int, int] | None) -> Trained:
    """Train from the same first state on the same batches."""
    mesh = None if sizes is None else mesh_of(sizes)
    state, metrics, placed = tiny_state(config), list[dict[str, Any]](), None
    if mesh is not None:
        state = jax.device_put(state, state_shardings(config, mesh, state))
        if (config := with_placement(config, mesh)).mesh.expert_placement == "strided":
            placed = strided(config, mesh)
            state = placed.apply(state)
    step = make_train_step(config, mesh)
    for number in range(STEPS):
        batch = tiny_batch(config, number)
        if mesh is None:
            state, found = step(state, batch)
        else:
            with jax.set_mesh(mesh):
                state, found = step(state, to_devices(mesh, batch, config.train.batch_size))
        metrics.append(jax.device_get(found))
        if placed is not None:
            metrics[-1]["counts_LE"] = placed.counts(metrics[-1]["counts_LE"])
    if placed is not None:
        state = placed.undo(state)
    return Trained(jax.device_get(state.params), jax.device_get(state.opt_state), metrics)


@functools.cache
def alone(method: str, *more: str) -> Trained:
    return trained(configure(method, *more), None)


def assert_equal(ours: Trained, single: Trained) -> None:
    for step, (mine, theirs) in enumerate(zip(ours.metrics, single.metrics, strict=True)):
        assert mine.keys() == theirs.keys()
        assert mine["counts_LE"].tolist() == theirs["counts_LE"].tolist(), f"routing differs at step {step}"
        for name in mine.keys() - {"received_L"}:
            np.testing.assert_allclose(mine[name], theirs[name], rtol=2e-5, atol=2e-6, err_msg=f"{name} {step}")
    # Adam divides by the root of the second moment, which blows the last bits of tiny gradients up.
    for mine, theirs in zip(jax.tree.leaves(ours.params), jax.tree.leaves(single.params), strict=True):
        np.testing.assert_allclose(mine, theirs, rtol=1e-4, atol=5e-5)
    for mine, theirs in zip(jax.tree.leaves(ours.moments), jax.tree.leaves(single.moments), strict=True):
        np.testing.assert_allclose(mine, theirs, rtol=1e-3, atol=5e-6)


@pytest.mark.parametrize("method", slow_among(METHODS, ("shared_layer_aux", "shared_pool_aux", "vanilla_normrouter")))
def test_every_method_trains_as_on_one_device(method: str) -> None:
    assert_equal(trained(configure(method), MESHES[ALL_WAYS]), alone(method))


@pytest.mark.parametrize("mesh", ["expert 8", "fsdp 8", "expert 4, tensor 2"])
def test_the_pool_trains_as_on_one_device(mesh: str) -> None:
    ours = trained(configure("unipool"), MESHES[mesh])
    assert_equal(ours, alone("unipool"))
    for metrics in ours.metrics:
        received = metrics["counts_LE"].reshape(4, MESHES[mesh][2], -1).sum(axis=2).max(axis=1)
        # Devices of an fsdp group have the same experts and different rows.
        assert metrics["received_L"].tolist() == received.tolist() or "fsdp" in mesh


def test_tokens_that_cross_nodes_once_train_as_on_one_device() -> None:
    """Two nodes of two devices share the pool."""
    assert_equal(trained(configure("unipool", "mesh.expert_nodes=2"), MESHES["data 2, expert 4"]), alone("unipool"))


@pytest.mark.slow
@pytest.mark.parametrize(("mesh", "nodes"), [("expert 8", 4), ("expert 4, tensor 2", 2)])
def test_exchanges_in_two_stages_train_as_on_one_device(mesh: str, nodes: int) -> None:
    words = ("moe.top_k=3", "train.batch_size=16")
    ours = trained(configure("unipool", *words, f"mesh.expert_nodes={nodes}", "model.remat=moe"), MESHES[mesh])
    assert_equal(ours, alone("unipool", *words))


def test_devices_divide_the_rows_of_a_batch_and_need_not_divide_a_sequence() -> None:
    config = configure("unipool", "moe.experts_per_layer=3", "train.batch_size=6", "train.microbatch_size=6")
    mesh = make_mesh(MeshConfig(1, 1, 3, 1), jax.devices()[:3])
    assert config.data.sequence_length % 3
    with jax.set_mesh(mesh):
        state = jax.jit(init_state, static_argnums=0)(config, jax.random.key(0))
    assert state.params["pools"]["bank"]["gate"].shape[1] == 12


# Beside them: a placement, several micro-batches and choices, and updates that are divided, in which the order of the
# experts on their devices must be that of the numbers that the update knows.
BESIDE = {
    "ring": ("mesh.expert_placement=contiguous",),
    "sliding": (
        *("moe.top_k=2", "train.batch_size=16", "loss.pool_statistics=previous"),
        *("optimizer.reuse_divisor=sqrt", "optimizer.reuse_decay=compensated"),
    ),
}


@pytest.mark.parametrize("method", slow_among(("ring", "sliding"), ("ring",)))
def test_windows_train_as_on_one_device(method: str) -> None:
    """Under both placements."""
    more = (*WINDOWS[method], *BESIDE[method])
    assert_equal(trained(configure(method, *more), MESHES[ALL_WAYS]), alone(method, *more))


@pytest.mark.slow
@pytest.mark.parametrize("placement", ["contiguous", "strided"])
@pytest.mark.parametrize("mesh", ["data 2, expert 4", ALL_WAYS])
@pytest.mark.parametrize("method", WINDOWS)
def test_every_window_on_every_mesh(method: str, mesh: str, placement: str) -> None:
    more = (*WINDOWS[method], *BESIDE.get(method, ()), f"mesh.expert_placement={placement}")
    assert_equal(trained(configure(method, *more), MESHES[mesh]), alone(method, *more))


@pytest.mark.parametrize(
    "kinds",
    [
        pytest.param(
            ("attention.kind=alternating", "attention.window=3", "attention.full_layers=2"), marks=pytest.mark.slow
        ),
        ("attention.kind=switch", "attention.window=3", "attention.switch_weight=0.1"),
    ],
)
def test_kinds_of_attention_train_as_on_one_device(kinds: tuple[str, ...]) -> None:
    """Layers, or tokens, that see a window or everything: over all axes but tensor, and recomputed."""
    config = configure("unipool", *kinds, "model.remat=full")
    assert_equal(trained(config, MESHES[ALL_WAYS]), alone("unipool", *kinds))


@pytest.mark.slow
@pytest.mark.parametrize("mesh", ["expert 4, tensor 2", ALL_WAYS])
def test_norms_behind_experts_train_as_on_one_device(mesh: str) -> None:
    """Each expert's output is normalized; a device of a tensor group has a part of it."""
    words = ("model.norm=depth_scaled_sandwich", "moe.top_k=2", "moe.shared_experts=1", "moe.dense_layers=1")
    assert_equal(trained(configure("unipool", *words), MESHES[mesh]), alone("unipool", *words))


def test_the_size_of_buffers_changes_no_bit() -> None:
    large, small = (
        trained(configure("unipool", f"mesh.capacity_factor={size}", "train.steps=20"), MESHES["data 2, expert 4"])
        for size in (4, 2.5)
    )
    assert all(not metrics["overflow"] for metrics in small.metrics)
    for mine, theirs in zip(jax.tree.leaves(small), jax.tree.leaves(large), strict=True):
        np.testing.assert_array_equal(mine, theirs)


@pytest.mark.slow
@pytest.mark.parametrize("mesh", [name for name in MESHES if name != ALL_WAYS])
@pytest.mark.parametrize("method", METHODS)
def test_every_method_on_every_mesh(method: str, mesh: str) -> None:
    assert_equal(trained(configure(method), MESHES[mesh]), alone(method))


@pytest.mark.slow
@pytest.mark.parametrize("method", [method for method in (*METHODS, "unipool_centered") if method != "dense"])
def test_every_method_with_strided_experts(method: str) -> None:
    """Without windows, where `auto` leaves them in their order."""
    more = ("mesh.expert_placement=strided",)
    assert_equal(trained(configure(method, *more), MESHES[ALL_WAYS]), alone(method, *more))


@pytest.mark.parametrize(
    "more",
    [
        ("moe.top_k=2", "train.batch_size=16", "loss.pool_statistics=previous", "model.remat=moe"),
        pytest.param(("pool.groups=2", "train.batch_size=16", "model.remat=full"), marks=pytest.mark.slow),
        pytest.param(("train.batch_size=16", "loss.balance_groups=4"), marks=pytest.mark.slow),
    ],
)
def test_micro_batches_top_k_groups_and_recomputation(more: tuple[str, ...]) -> None:
    assert_equal(trained(configure("unipool", *more), MESHES[ALL_WAYS]), alone("unipool", *more))


def test_losses_do_not_depend_on_micro_batches_or_recomputation() -> None:
    """The exact pool loss of one batch, in one piece without recomputation and in two with."""
    whole = alone("unipool", "train.batch_size=16", "train.microbatch_size=16", "model.remat=none")
    parts = trained(configure("unipool", "train.batch_size=16", "model.remat=full"), MESHES[ALL_WAYS])
    assert_equal(parts, whole)


def test_a_step_that_overflows_is_not_applied_unless_rows_may_be_dropped() -> None:
    mesh = mesh_of(MESHES["data 2, expert 4"])
    for overflow, changes in (("stop", False), ("drop", True)):
        rows = ["train.batch_size=32", "train.microbatch_size=32"]
        config = configure("unipool", "mesh.capacity_factor=1", f"mesh.overflow={overflow}", "train.steps=2", *rows)
        state = tiny_state(config)
        before = jax.device_get(state)
        placed = jax.device_put(state, state_shardings(config, mesh, state))
        with jax.set_mesh(mesh):
            step = make_train_step(config, mesh)
            for number in range(2):  # the first learning rate is 0
                placed, metrics = step(placed, to_devices(mesh, tiny_batch(config, number), config.train.batch_size))
        assert int(metrics["overflow"]) > 0
        assert metrics["finite"]
        assert int(placed.step) == 2
        same = [
            np.array_equal(x, y) for x, y in zip(jax.tree.leaves(before[1:]), jax.tree.leaves(placed[1:]), strict=True)
        ]
        assert all(same) is not changes


def test_evaluation_gives_the_sums_of_one_device() -> None:
    config = configure("unipool")
    mesh, state, batch = mesh_of(MESHES[ALL_WAYS]), tiny_state(config), tiny_batch(config)
    lengths = jnp.arange(config.model.vocab_size, dtype=jnp.int32)
    single = make_eval_step(config)(state.params, state.balance, batch, lengths)
    placed = jax.device_put(state, state_shardings(config, mesh, state))
    with jax.set_mesh(mesh):
        ours = make_eval_step(config, mesh)(placed.params, placed.balance, to_devices(mesh, batch, 8), lengths)
    for mine, theirs in zip(jax.tree.leaves(ours), jax.tree.leaves(single), strict=True):
        np.testing.assert_allclose(mine, theirs, rtol=1e-5)


@functools.cache
def program(method: str, *more: str) -> str:
    """The training step compiled for fsdp 4 x expert 2, as text."""
    config, mesh = configure(method, "train.batch_size=16", *more), mesh_of((1, 4, 2, 1))
    step: Any = make_train_step(config, mesh)
    with jax.set_mesh(mesh):
        return str(step.lower(state_shapes(config, mesh), batch_shapes(config, mesh)).compile().as_text())


def bank_collectives(text: str) -> dict[str, tuple[int, int]]:
    """Collectives whose result is a part of a bank of 16 x 24 experts: (outside of loops, inside of loops)."""
    found = {"all-gather": [0, 0], "reduce-scatter": [0, 0], "all-reduce": [0, 0]}
    blocks = re.split(r"\n(?=(?:ENTRY |%?[\w.-]+ \())", text)
    for block in blocks:
        for shape, kind in re.findall(r"= f32\[([\d,]*)\]\S* (all-gather|reduce-scatter|all-reduce)\(", block):
            *_, rows, columns = [int(x) for x in f"1,1,{shape}".split(",") if x]
            if (rows, columns) in {(16, 24), (24, 16), (4, 24), (6, 16)}:
                found[kind][not block.lstrip().startswith("ENTRY")] += 1
    return {kind: (outside, inside) for kind, (outside, inside) in found.items() if outside + inside}


def test_a_pool_is_gathered_and_scattered_once_a_step() -> None:
    """Three arrays of the bank, outside of the loops over micro-batches and layers; per-layer experts within them."""
    assert bank_collectives(program("unipool")) == {"all-gather": (3, 0), "reduce-scatter": (3, 0)}
    per_layer = bank_collectives(program("vanilla"))
    assert per_layer["reduce-scatter"] == (0, 3)
    assert per_layer["all-gather"][0] == 0
    assert per_layer["all-gather"][1] >= 3


def test_experts_change_places_one_at_a_time() -> None:
    config, mesh = configure("unipool"), mesh_of((1, 4, 2, 1))
    order_GE = np.random.default_rng(0).permutation(config.total_experts)[None]
    state = tiny_state(config)
    whole = jax.device_get(state)
    before = whole.params["pools"]
    placed = jax.device_put(state, state_shardings(config, mesh, state))
    exchanged = Placement(config, mesh, order_GE)
    with jax.set_mesh(mesh):
        text = str(jax.jit(exchanged.apply).lower(placed).compile().as_text())
        placed = exchanged.apply(placed)
        there = jax.device_get(placed.params["pools"])
        placed = exchanged.undo(placed)
    assert bank_collectives(text) == {}
    assert "collective-permute" in text
    np.testing.assert_array_equal(there["bank"]["up"][0], before["bank"]["up"][0][order_GE[0]])
    router = ("layers", "mixture", "router")
    mine, theirs = (functools.reduce(lambda tree, name: tree[name], router, tree) for tree in (there, before))
    np.testing.assert_array_equal(mine, theirs[:, :, order_GE[0]])
    for mine, theirs in zip(jax.tree.leaves(placed), jax.tree.leaves(whole), strict=True):
        np.testing.assert_array_equal(mine, theirs)


def test_banks_and_moments_are_dealt_out() -> None:
    config, mesh = configure("unipool"), mesh_of(MESHES["data 2, fsdp 2, expert 2"])
    shapes = state_shapes(config, mesh)
    lines = {line.name: line for line in placement(shapes)}
    gate = lines["params.pools.bank.gate"]
    assert gate.shape == (1, 32, 16, 24)
    assert gate.bytes_per_device == 32 * 16 * 24 * 4 / 4
    assert lines["opt_state.1.0.mu.pools.bank.gate"].bytes_per_device == gate.bytes_per_device
    assert lines["params.pools.layers.attention.query"].bytes_per_device == 4 * 16 * 16 * 4 / 2
    assert lines["params.final_norm"].bytes_per_device == 16 * 4
    total = sum(line.bytes_per_device for line in lines.values())
    moments = sum(line.bytes_per_device for name, line in lines.items() if name.startswith("opt_state."))
    said = report(shapes)
    assert f"parameters and optimizer state: {total / 2**20:,.1f} MiB per device" in said
    assert f"optimizer moments, sharded like their parameters: {moments / 2**20:,.1f} MiB per device" in said


@pytest.mark.parametrize("method", ["unipool", "vanilla", "dense"])
def test_moments_lie_where_their_parameters_lie(method: str) -> None:
    shapes = state_shapes(configure(method), mesh_of(MESHES[ALL_WAYS]))
    places = {line.name: (line.shape, line.partition) for line in placement(shapes)}
    for name, place in places.items():
        if name.startswith("params."):
            for moment in ("mu", "nu"):
                assert places[f"opt_state.1.0.{moment}.{name.removeprefix('params.')}"] == place


@pytest.mark.parametrize("method", ["unipool", "vanilla", "dense"])
def test_banks_that_are_not_split_as_the_mesh_says_are_named(method: str) -> None:
    """Replicated, or sharded over one axis of the mesh only."""
    config, mesh = configure(method), mesh_of(MESHES[ALL_WAYS])
    shapes = state_shapes(config, mesh)
    assert misplaced_banks(config, mesh, shapes) == []

    def laid_out(*axes: str | None) -> Any:
        place = jax.sharding.NamedSharding(mesh, jax.P(*axes))
        return jax.tree_util.tree_map_with_path(
            lambda path, x: jax.ShapeDtypeStruct(
                x.shape, x.dtype, sharding=place if "'up'" in str(path[-1]) else x.sharding
            ),
            shapes,
        )

    groups, experts, *_ = shapes.params["pools"]["bank"]["up"].shape
    over_fsdp = laid_out(None, None, "fsdp", None)
    if method == "dense":
        assert misplaced_banks(config, mesh, over_fsdp) == []
    else:
        part, wanted = [groups, experts, 8, 24], [groups, experts // 2, 8, 24]
        assert f"params.pools.bank.up {part} instead of {wanted}" in misplaced_banks(config, mesh, over_fsdp)
    named = misplaced_banks(config, mesh, laid_out())
    assert [name.split()[0].rpartition(".")[0] for name in named] == [
        "params.pools.bank",
        "opt_state.1.0.mu.pools.bank",
        "opt_state.1.0.nu.pools.bank",
    ]


def test_a_transport_that_the_devices_do_not_have_is_refused() -> None:
    config = configure("unipool", "mesh.data=1", "mesh.expert=8", "mesh.transport=ragged")
    with pytest.raises(
        ConfigError, match=r"mesh.transport=ragged: CPU devices do not support .* choose auto or all_gather"
    ):
        usable_mesh(config)
    alone = dataclasses.replace(config, mesh=dataclasses.replace(config.mesh, data=8, expert=1))
    assert usable_mesh(alone) is not None


class _Device:
    """A device with so many bytes of memory."""

    device_kind = "toy"

    def __init__(self, limit: int | None):
        self._limit = limit

    def memory_stats(self) -> dict[str, int] | None:
        return None if self._limit is None else {"bytes_limit": self._limit}


def test_a_state_that_cannot_fit_is_refused() -> None:
    shapes = state_shapes(configure("unipool"), mesh_of(MESHES["data 2, fsdp 2, expert 2"]))
    total = sum(line.bytes_per_device for line in placement(shapes))
    for limit in (None, total):
        assert memory_problem(shapes, _Device(limit)) is None  # type: ignore[arg-type]
    assert "raise mesh.fsdp or mesh.expert" in str(memory_problem(shapes, _Device(total - 1)))  # type: ignore[arg-type]


def test_rest_of_the_devices_and_what_does_not_fit() -> None:
    assert resolve_sizes(MeshConfig(data=-1, expert=2), 8) == (4, 1, 2, 1)
    assert resolve_sizes(MeshConfig(data=1), 8) == (1, 1, 1, 1)
    for config in (MeshConfig(data=-1, expert=3), MeshConfig(data=3, fsdp=3)):
        with pytest.raises(ConfigError, match="does not fit 8 available devices"):
            make_mesh(config, jax.devices()[:8])


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["mesh.data=3"], r"train.microbatch_size=8: must be a multiple of mesh.data=3; the next one is 9"),
        (["mesh.data=1", "mesh.tensor=4"], r"mesh.tensor=4: must divide model.num_kv_heads=2"),
        (["mesh.data=1", "mesh.fsdp=32"], r"mesh.fsdp=32: must divide model.hidden_size=16"),
        (["mesh.data=1", "mesh.fsdp=16"], r"mesh.fsdp=16: must divide model.ffn_size=24"),
        (
            ["mesh.data=1", "mesh.fsdp=8", "mesh.tensor=2"],
            r"mesh.fsdp=8 x mesh.tensor=2: must divide model.ffn_size=24",
        ),
        (["mesh.data=1", "mesh.expert=16", "train.microbatch_size=16"], r"mesh.expert=16: must divide the 8 experts"),
        (["mesh.expert=-1"], r"mesh.data=-1 and mesh.expert=-1: only one axis"),
        (["mesh.fsdp=0"], r"mesh.fsdp=0: must be at least 1"),
    ],
)
def test_what_does_not_divide_is_refused(more: list[str], message: str) -> None:
    config = tiny_config("unipool", "train.batch_size=48", "train.eval_batch_size=48")
    sections: dict[str, dict[str, Any]] = {"mesh": {}, "train": {}}
    for setting in more:
        section, name, value = re.split(r"[.=]", setting)
        sections[section][name] = int(value)
    config = dataclasses.replace(
        config,
        mesh=dataclasses.replace(config.mesh, **sections["mesh"]),
        train=dataclasses.replace(config.train, **sections["train"]),
    )
    assert any(re.search(message, found) for found in problems(config)), list(problems(config))
