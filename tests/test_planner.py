"""The planner: counts and times against brute force and compiled steps, presets, errors."""

from __future__ import annotations

import functools
import importlib.util
import json
import math
import re
from collections import defaultdict
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from planned import needs_compiler, small
from unipool_jax.cli.main import main
from unipool_jax.config.chips import CHIPS, parse_topology
from unipool_jax.config.compose import CONFIG_DIR, compose_config
from unipool_jax.config.mesh_rules import AXES
from unipool_jax.config.rules import problems
from unipool_jax.config.schema import ConfigError
from unipool_jax.kernels.group_plan import make_group_plan
from unipool_jax.model.report import count_parameters
from unipool_jax.parallel.mesh import make_mesh
from unipool_jax.planner import compilation, group_rows, links, report, work
from unipool_jax.planner.collectives import Collective, _first_group, collectives, kernels, parse

SCALES = ("182m", "469m", "650m", "830m", "978m")
PRESETS = sorted(path.stem for path in (CONFIG_DIR / "mesh").glob("*_*.yaml"))


@functools.cache
def small_plan(method: str, *more: str) -> tuple[report.Plan, str]:
    config = small(method, *more)
    mesh = compilation.topology_mesh(config)
    program = compilation.compile_step(config, mesh)
    assert config.mesh.topology is not None
    evaluation = compilation.Evaluation(temporary_bytes=10**6, seconds=0.0)
    return report.from_programs(config, parse_topology(config.mesh.topology), mesh, program, evaluation), program.text


def test_a_collective_behind_several_fusions_is_counted_once() -> None:
    """The compiler hides a gather behind others' work: its start, middle and end carry one chain number."""
    gather = "all-gather(%p), channel_id=3, replica_groups={{0,1,2,3}}, dimensions={0}, frontend_attributes="
    fusions = "\n\n".join(
        f"%part.{part} (p: bf16[2,8]) -> bf16[8,8] {{\n"
        "  %p = bf16[2,8]{1,0} parameter(0)\n"
        f'  ROOT %g.{part} = bf16[8,8]{{1,0}} {gather}{{chain_id="{chain}"}}\n}}'
        for part, chain in enumerate((5, 5, 5, 6))
    )
    calls = "\n".join(f"  %f.{part} = bf16[8,8]{{1,0}} fusion(%a), calls=%part.{part}" for part in range(4))
    text = (
        f"{fusions}\n\nENTRY %main (a: bf16[2,8]) -> bf16[8,8] {{\n  %a = bf16[2,8]{{1,0}} parameter(0)\n{calls}\n}}\n"
    )
    found = collectives(parse(text), ("expert",), (4,))
    assert [(one.kind, one.times, one.sent_bytes) for one in found] == 2 * [("all-gather", 1, 2 * 8 * 8 * 3 / 4)]


def test_gathers_that_the_compiler_combined_are_counted_together() -> None:
    """Two operands of one start, then their results and what the compiler keeps."""
    start = "(s32[8,2]{1,0}, bf16[8,4]{1,0}, s32[16,2]{1,0}, bf16[16,4]{1,0}, u32[], u32[]) all-gather-start(%a, %b)"
    text = f"ENTRY %main (a: s32[8,2], b: bf16[8,4]) -> bf16[16,4] {{\n  %g = {start}, replica_groups={{{{0,1}}}}\n}}\n"
    (found,) = collectives(parse(text), ("expert",), (2,))
    assert (found.kind, found.sent_bytes) == ("all-gather", 8 * 2 * 4 + 8 * 4 * 2)


def test_tokens_travel_as_the_compiler_can_carry_them() -> None:
    """Slices of more than 16 v5e chips have no ragged all-to-all."""
    counted = {
        preset: {
            message.kind
            for message in report.count_step(compose_config([f"mesh={preset}", "scale=182m", "mode=plan"])).messages
            if message.axes == ("expert",)
        }
        for preset in ("v5e_8", "v5e_256", "v6e_256")
    }
    assert counted == {
        "v5e_8": {"ragged-all-to-all"},
        "v5e_256": {"all-gather", "reduce-scatter"},
        "v6e_256": {"ragged-all-to-all"},
    }


@pytest.mark.parametrize("preset", PRESETS)
def test_presets_validate_and_fit_their_torus(preset: str) -> None:
    for scale in SCALES:
        assert problems(compose_config([f"mesh={preset}", f"scale={scale}", "mode=plan"])) == []
    config = compose_config([f"mesh={preset}", "scale=182m", "mode=plan"])
    assert config.mesh.topology is not None
    topology = parse_topology(config.mesh.topology)
    assert math.prod(topology.shape) == int(preset.rpartition("_")[2])
    if topology.chip.torus_axes and importlib.util.find_spec("libtpu"):
        devices = compilation.devices_of(config.mesh.topology)
        assert len(devices) == topology.num_devices
        assert devices[0].device_kind == topology.chip.device_kind
        mesh = make_mesh(config.mesh, devices)
        assert {axis: mesh.shape[axis] for axis in AXES} == {axis: getattr(config.mesh, axis) for axis in AXES}


def test_all_named_presets_are_there() -> None:
    assert set(PRESETS) == {
        "v5e_8",
        "v5e_256",
        "v5p_64",
        "v5p_1024",
        "v6e_256",
        "tpu7x_256",
        "gpu_8",
        "h100_64",
        "b200_64",
    }


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("mesh.topology=v9:2x2", "unknown kind of device 'v9'; choose one of v5e, v5p, v6e, tpu7x, h100, b200"),
        ("mesh.topology=v5p:4x4", "v5p devices have 3 dimensions, not 2; write v5p:4x4x4"),
        ("mesh.topology=v5e:4xfour", "sizes must be whole numbers joined by 'x'; for example v5e:4x4"),
        ("mesh.topology=v5e:16x16", "mesh.expert=16 mesh.tensor=1 must multiply to its 256 devices; change a size"),
        ("mesh.topology=null", "mode=plan needs devices to plan for"),
    ],
)
def test_wrong_topologies_are_named(setting: str, message: str) -> None:
    found = problems(compose_config(["mesh=v5p_64", "scale=182m", "mode=plan", setting]))
    assert len(found) == 1
    assert found[0].startswith("mesh.topology=")
    assert message in found[0]


@pytest.mark.parametrize("preset", PRESETS)
def test_evaluation_with_a_preset_needs_no_more_than_training(preset: str) -> None:
    """By count: a device has the same state in both."""
    for scale in SCALES:
        config = compose_config([f"mesh={preset}", f"scale={scale}", "mode=plan"])
        assert config.mesh.topology is not None
        sizes = {axis: getattr(config.mesh, axis) for axis in AXES}
        counts = work.count(config, sizes, parse_topology(config.mesh.topology))
        assert counts.evaluation_bytes <= counts.temporary_bytes


def test_training_does_not_look_at_the_topology_s_devices() -> None:
    config = compose_config(["mesh.topology=v5p:4x4x4", "mesh.data=-1"])
    assert problems(config) == []


@needs_compiler
def test_topologies_that_cannot_be_had() -> None:
    with pytest.raises(ConfigError, match=r"mesh.topology=v5e:3x5: the TPU compiler does not know it"):
        compilation.devices_of("v5e:3x5")
    with pytest.raises(ConfigError, match=r"does not fit the topology of these TPU v5 devices"):
        compilation.topology_mesh(compose_config(["mesh.topology=v5p:4x4x4", "mesh.fsdp=8", "mesh.expert=8"]))


def test_a_missing_compiler_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"mesh.topology=v5p:2x2x2: .*`pip install libtpu`"):
        compilation.devices_of.__wrapped__("v5p:2x2x2")


# Counting


TWO_STAGES = ("mesh.fsdp=1", "mesh.expert=4", "mesh.expert_nodes=2", "moe.top_k=4")
AROUND = ("moe.shared_experts=1", "moe.shared_expert_gate=true", "moe.dense_layers=2")


@pytest.mark.parametrize(
    "words", [("unipool",), ("vanilla",), ("dense",), ("ring",), ("tied_inner",), ("unipool", *AROUND)], ids=" ".join
)
def test_state_bytes_are_those_of_the_parameter_tree(words: tuple[str, ...]) -> None:
    config = compose_config(["scale=182m", f"method={words[0]}", *words[1:]])
    counts = work.count(config, dict.fromkeys(AXES, 1), parse_topology("v5p:1x1x1"))
    parameters = count_parameters(config)
    matrices = parameters["total"] - parameters["norms"] - parameters["scales"]
    assert counts.state_bytes == 12 * matrices


@needs_compiler
@pytest.mark.slow
def test_flops_are_those_of_a_compiled_layer() -> None:
    """A dense model of one layer has no loop and no kernel of ours, so the compiler's own count is complete."""
    config = small(
        "dense",
        "model.num_layers=1",
        "model.remat=none",
        "mesh.topology=v5p:2x2x1",
        "mesh.fsdp=1",
        "mesh.expert=1",
        "mesh.data=4",
        "train.microbatch_size=16",
        "data.sequence_length=1024",
    )
    mesh = compilation.topology_mesh(config)
    with jax.set_mesh(mesh):
        step: Any = compilation.make_train_step(config, mesh)
        rows = compilation.batch_sharding(mesh)
        kinds = (jnp.int32, jnp.int32, jnp.float32)
        arrays: Any = (jax.ShapeDtypeStruct((16, 1024), dtype, sharding=rows) for dtype in kinds)
        batch = compilation.Batch(*arrays)
        compiled = step.lower(compilation.state_shapes(config, mesh), batch).compile()
    counted = work.count(config, dict(mesh.shape), parse_topology("v5p:2x2x1"))
    expected = sum(item.unpadded_flops for item in counted.work)
    assert compiled.cost_analysis()["flops"] == pytest.approx(expected, rel=0.08)


@pytest.mark.parametrize(("mean", "tile"), [(683, 384), (171, 224), (40, 64), (2731, 352)])
def test_rows_of_tiles_are_those_of_a_plan(mean: int, tile: int) -> None:
    rng, experts = np.random.default_rng(0), 64
    rows = []
    for _ in range(20):
        sizes = np.bincount(rng.integers(0, experts, mean * experts), minlength=experts)
        first = np.cumsum(sizes) - sizes
        rows.append(np.sum(-(-(sizes + first % 16) // tile)) * tile / experts)
    assert group_rows.expected_tile_rows(mean, tile) == pytest.approx(np.mean(rows), rel=0.03)


def test_tiles_are_chosen_for_the_rows_that_arrive() -> None:
    sizes = jnp.full((12,), 60, jnp.int32)
    room = make_group_plan(sizes, 12 * 180, implementation="pallas_tpu")
    chosen = make_group_plan(sizes, 12 * 180, implementation="pallas_tpu", expected_rows=12 * 60)
    exact = make_group_plan(sizes, 12 * 60, implementation="pallas_tpu")
    assert chosen.tiling == exact.tiling != room.tiling


# Links


def ring_load(length: int, *, ring: bool) -> float:
    """Largest load of a directed link when every chip sends 1 / length to each, by walking every message."""
    load: defaultdict[tuple[int, int], float] = defaultdict(float)
    for start in range(length):
        for end in range(length):
            hops = end - start
            if ring and abs(hops) > length / 2:
                hops -= int(math.copysign(length, hops))
            ways = [1, -1] if ring and abs(hops) * 2 == length else [int(math.copysign(1, hops))]
            for way in ways:
                for hop in range(abs(hops)):
                    here = (start + way * hop) % length
                    load[here, way] += 1 / length / len(ways)
    return max(load.values())


@pytest.mark.parametrize("length", [4, 8, 16])
@pytest.mark.parametrize("ring", [True, False])
def test_all_to_all_loads_links_as_walked(length: int, ring: bool) -> None:
    chip = CHIPS["v5p"]._replace(link_bandwidth=1 / links.EFFICIENCY)
    place = links.Span(length, ((length, ring),))
    sent = (length - 1) / length * 1e6
    modelled = links.seconds("ragged-all-to-all", sent, place, chip)
    assert modelled == pytest.approx(1e6 * ring_load(length, ring=ring), rel=1e-3)


def test_gathers_use_the_links_of_every_dimension() -> None:
    chip = CHIPS["v5p"]
    one = links.seconds("all-gather", 1e9, links.Span(4, ((4, True),)), chip)
    two = links.seconds("all-gather", 1e9, links.Span(16, ((4, True), (4, True))), chip)
    line = links.seconds("all-gather", 1e9, links.Span(4, ((4, False),)), chip)
    assert one == pytest.approx(1e9 / (2 * chip.link_bandwidth * links.EFFICIENCY), rel=1e-3)
    assert (two, line) == (pytest.approx(one / 2, rel=2e-3), pytest.approx(one * 2, rel=2e-3))


@needs_compiler
def test_where_mesh_axes_lie_on_the_torus() -> None:
    config = compose_config(["mesh=v5p_64", "scale=182m"])
    mesh, topology = compilation.topology_mesh(config), parse_topology("v5p:4x4x4")
    sizes = dict(mesh.shape)
    assert links.span(mesh, topology, ("expert",), sizes).extents == ((4, True), (4, True))
    assert links.span(mesh, topology, ("fsdp",), sizes) == links.Span(4, ((4, True),))
    assert links.span(mesh, topology, ("fsdp", "expert"), sizes).extents == ((4, True),) * 3


# Compiled modules

MODULE = """
%cond (p: (s32[], f32[8])) -> pred[] {
  %p = (s32[], f32[8]{0}) parameter(0)
  %n = s32[]{:T(128)} constant(24), metadata={}
  ROOT %lt = pred[] compare(%i, %n), direction=LT
}

%async (a: bf16[64,8], b: bf16[96,8]) -> bf16[96,8] {
  %a = bf16[64,8]{1,0} parameter(0)
  %b = bf16[96,8]{1,0} parameter(1)
  ROOT %r = bf16[96,8]{1,0} ragged-all-to-all(%a, %b, %b), replica_groups={{0,1,2,3},{4,5,6,7}}, metadata={op_name="x"}
}

%thread (a: bf16[64,8], b: bf16[96,8]) -> bf16[96,8] {
  ROOT %sc = bf16[96,8]{1,0} custom-call(%a, %b), custom_call_target="core", called_computations={%async}
}

%body (p: (s32[], f32[8])) -> (s32[], f32[8]) {
  %g = bf16[1,16]{1,0} all-gather(%w), replica_groups=[4,2]<=[2,4]T(1,0), dimensions={1}
  %k.3 = f32[8]{0} custom-call(%g), custom_call_target="tpu_custom_call"
  %k.4.refs_7_ = f32[8]{0} custom-call(%g), custom_call_target="tpu_custom_call"
  ROOT %s = (bf16[96,8]{1,0}) async-start(%a, %b), calls=%thread
}

ENTRY %main (p: f32[8]) -> f32[8] {
  %w = (s32[], f32[8]{0}) while(%t), condition=%cond, body=%body
  %all = (f32[8]{0}, bf16[4]{0}) all-reduce(%x, %y), replica_groups=mesh['a'=2,'b'=4] {'a','b'}, to_apply=%add
  ROOT %rs = f32[4]{0} reduce-scatter(%x), replica_groups={{0,4},{1,5},{2,6},{3,7}}, dimensions={0}
}
"""


def test_a_module_is_read_with_loops_and_groups() -> None:
    module = parse(MODULE)
    found = {c.kind: c for c in collectives(module, AXES, (1, 2, 4, 1))}
    assert found["all-gather"][1:6] == (("bf16[1,16]",), ("fsdp",), 2, 24, 32 * 0.5)
    assert found["ragged-all-to-all"][2:] == (("expert",), 4, 24, 64 * 8 * 2 * 0.75, "x")
    assert found["all-reduce"][2:6] == (("fsdp", "expert"), 8, 1, 2 * (32 + 8) * 7 / 8)
    assert found["reduce-scatter"][2:6] == (("fsdp",), 2, 1, 16)
    assert kernels(module) == {"k": 2 * 24}


@pytest.mark.parametrize(
    ("notation", "devices"),
    [
        ("replica_groups={{1,3},{0,2}}", [1, 3]),
        ("replica_groups=[2,4]<=[8]", [0, 1, 2, 3]),
        ("replica_groups=[4,2]<=[2,4]T(1,0)", [0, 4]),
        ("replica_groups=mesh['a'=2,'b'=4] {'b'}", [0, 1, 2, 3]),
        ("source_target_pairs={{0,0},{1,3},{3,1}}", [1, 3]),
        ("source_target_pairs={{0,0}}", [0]),
        ("channel_id=1", list(range(8))),
    ],
)
def test_the_first_group_of_devices_in_every_notation(notation: str, devices: list[int]) -> None:
    assert _first_group(notation, 8).tolist() == devices


def bank_collectives(plan: report.Plan, kind: str) -> list[Collective]:
    """Those of the bank's arrays: widths of 256 and 640 are their last two, one of them full or halved."""
    assert plan.collectives is not None
    widths = re.compile(r"\b(640|320,256)\b")
    return [c for c in plan.collectives if c.kind == kind and any(widths.search(shape) for shape in c.shapes)]


@needs_compiler
@pytest.mark.slow
def test_a_pool_is_gathered_and_its_gradient_scattered_once_a_step() -> None:
    """Two micro-batches, four layers: three arrays once, where per-layer experts travel for each of both."""
    pool, layers = small_plan("unipool")[0], small_plan("vanilla", "loss.switch_group_sequences=8")[0]
    for kind in ("all-gather", "reduce-scatter"):
        once = bank_collectives(pool, kind)
        assert [c.times for c in once] == [1, 1, 1]
        assert {c.axes for c in once} == {("fsdp",)}
        assert sum(c.times for c in bank_collectives(layers, kind)) >= 3 * 4 * 2
    assert {shape.partition("[")[0] for c in bank_collectives(pool, "all-gather") for shape in c.shapes} == {"bf16"}
    assert {shape.partition("[")[0] for c in bank_collectives(pool, "reduce-scatter") for shape in c.shapes} == {"f32"}


@pytest.mark.slow
@needs_compiler
def test_no_device_holds_a_whole_bank() -> None:
    """No value has all 32 experts, and none is a float32 copy of the own ones for the forward pass."""
    plan, text = small_plan("unipool")
    assert "[32,256,640]" not in text
    assert "[1,32,256,640]" not in text
    whole = 16 * 256 * 640
    # Three arrays in bfloat16 and three running gradients in float32, and not one of them twice.
    assert plan.temporary_bytes < 3 * whole * (2 + 4) + 3 * whole * 4 + plan.estimate.counts.temporary_bytes


@needs_compiler
@pytest.mark.slow
def test_collectives_of_chips_with_cores_for_them_are_read() -> None:
    """A 7x chip is two devices; how gradients are summed there is the compiler's choice, what moves forward is not."""
    plan = small_plan("unipool", "mesh.topology=tpu7x:2x2x1", "mesh.expert=4")[0]
    assert plan.collectives is not None
    for kind in ("all-gather", "ragged-all-to-all"):
        counted = sum(message.total_bytes for message in plan.estimate.counts.messages if message.kind == kind)
        compiled = sum(item.total_bytes for item in plan.collectives if item.kind == kind)
        assert counted == pytest.approx(compiled, rel=0.05)


@needs_compiler
@pytest.mark.parametrize(
    ("method", "more"),
    [
        ("unipool", ()),
        pytest.param("vanilla", ("loss.switch_group_sequences=8",), marks=pytest.mark.slow),
        pytest.param("vanilla", ("loss.switch_group_sequences=8", "model.remat=none"), marks=pytest.mark.slow),
        pytest.param("vanilla", ("loss.switch_group_sequences=8", "model.remat=attention"), marks=pytest.mark.slow),
        pytest.param("vanilla", ("loss.switch_group_sequences=8", "model.remat=moe"), marks=pytest.mark.slow),
        pytest.param("unipool", ("pool.groups=2", "model.remat=moe"), marks=pytest.mark.slow),
        pytest.param("sliding", ("train.batch_size=8", "model.remat=none"), marks=pytest.mark.slow),
        pytest.param("unipool", ("model.remat=experts",), marks=pytest.mark.slow),
        pytest.param("unipool", TWO_STAGES, marks=pytest.mark.slow),
        pytest.param("unipool", ("model.remat=router",), marks=pytest.mark.slow),
        pytest.param("unipool", ("model.remat=attention",), marks=pytest.mark.slow),
        pytest.param("unipool", (*AROUND, "model.remat=moe"), marks=pytest.mark.slow),
    ],
)
def test_counted_collectives_are_those_compiled(method: str, more: tuple[str, ...]) -> None:
    plan = small_plan(method, *more)[0]
    assert plan.collectives is not None
    counted = sum(message.total_bytes for message in plan.estimate.counts.messages)
    compiled = sum(item.total_bytes for item in plan.collectives)
    assert counted == pytest.approx(compiled, rel=0.02)


@needs_compiler
def test_the_report_names_what_it_found() -> None:
    plan = small_plan("unipool")[0]
    text = report.text(plan)
    numbers = json.loads(text.splitlines()[-1])
    assert numbers["compiled"] is True
    assert numbers["memory"]["total"] == plan.total_bytes
    assert numbers["memory"]["evaluation_total"] == numbers["memory"]["total"] - plan.temporary_bytes + 10**6
    assert numbers["memory"]["parameters"] * 2 == pytest.approx(numbers["memory"]["optimiser"], rel=0.01)
    # Four layers, two micro-batches; forward, recomputed, and counted beforehand for the exact pool loss.
    assert numbers["kernels"]["expert_ffn_in"] == 4 * 2 * 3
    assert numbers["kernels"]["grouped_bank_gradient"] == 4 * 2 * 3
    assert 0 < numbers["utilisation"] < numbers["utilisation_with_hidden_links"] < 1
    assert "ragged-all-to-all" in text


# Complete plans


def fits(scale: str, preset: str, method: str = "unipool") -> None:
    config = compose_config([f"scale={scale}", f"mesh={preset}", f"method={method}", "mode=plan"])
    plan = report.make_plan(config)
    assert plan.fits
    assert plan.collectives is not None
    counted = sum(message.total_bytes for message in plan.estimate.counts.messages)
    assert counted == pytest.approx(sum(item.total_bytes for item in plan.collectives), rel=0.1)


@needs_compiler
@pytest.mark.slow
@pytest.mark.parametrize("preset", ["v5p_64", "v5e_256"])
@pytest.mark.parametrize("scale", SCALES)
def test_every_scale_fits(scale: str, preset: str) -> None:
    fits(scale, preset)


@needs_compiler
@pytest.mark.slow
@pytest.mark.parametrize("method", ["ring", "sliding", "tied_inner"])
def test_windows_fit(method: str) -> None:
    fits("182m", "v5p_64", method)


@pytest.mark.usefixtures("gpus_are_counted")
def test_a_plan_whose_evaluation_does_not_fit_says_so() -> None:
    """Half a million tokens on a device, all of which may go to one expert."""
    plan = report.make_plan(compose_config(["scale=978m", "mesh=gpu_8", "mode=plan", "train.eval_batch_size=4096"]))
    assert plan.total_bytes <= plan.topology.chip.hbm_bytes < plan.evaluation_total_bytes
    assert not plan.fits
    line = next(line for line in report.text(plan).splitlines() if "evaluation" in line)
    assert line.endswith("DOES NOT FIT; train.eval_batch_size=4096")
    assert json.loads(report.text(plan).splitlines()[-1])["memory"]["fits"] is False


@needs_compiler
def test_evaluation_that_the_compiler_refuses_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise compilation.MemoryExceededError("ran out")

    monkeypatch.setattr(report, "compile_step", lambda *_: None)
    monkeypatch.setattr(report, "compile_evaluation", refuse)
    with pytest.raises(ConfigError, match=r"train.eval_batch_size=8: evaluation does not fit \(ran out\); lower it"):
        report.make_plan(small("unipool"))


@pytest.mark.usefixtures("gpus_are_counted")
def test_every_rematerialization_is_counted_on_a_mesh_with_several_pools() -> None:
    """Eight sequences a device of per-layer experts over fsdp 2."""
    seconds = {}
    for remat in ("none", "moe", "full"):
        config = compose_config(
            ["scale=182m", "method=vanilla", "mesh=gpu_8", "mode=plan", "mesh.fsdp=2", "mesh.expert=4",
             f"model.remat={remat}"]
        )  # fmt: skip
        seconds[remat] = report.make_plan(config).estimate.seconds
    assert seconds["none"] < seconds["moe"] < seconds["full"]


@pytest.mark.usefixtures("gpus_are_counted")
def test_mode_plan_prints_a_plan_and_trains_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", "scale=182m", "mesh=gpu_8", "mode=plan"]) == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["topology"] == "h100:8"
