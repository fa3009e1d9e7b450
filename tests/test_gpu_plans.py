"""Plans for GPUs: figures, links between nodes, what is said without a compiler, and what it makes where it is."""

from __future__ import annotations

import functools
import json
import math
from collections import defaultdict

import numpy as np
import pytest

from planned import needs_gpu_compiler, small
from unipool_jax.config.chips import CHIPS, parse_topology
from unipool_jax.config.compose import compose_config
from unipool_jax.config.rules import problems
from unipool_jax.config.schema import Config
from unipool_jax.planner import compilation, gpu_compiler, links, report, search
from unipool_jax.planner.collectives import collectives, kernels, parse
from unipool_jax.planner.instructions import Traffic, operands
from unipool_jax.training.flops import peak_flops

FREE = links.NETWORK_SECONDS
H100 = CHIPS["h100"]


# Figures


def test_figures_are_shares_of_published_ones() -> None:
    """A server of eight; tensor cores reach half of the peak with sparsity; NVLink counts both directions."""
    h100, b200 = CHIPS["h100"], CHIPS["b200"]
    assert (h100.flops, b200.flops) == (pytest.approx(1979e12 / 2, rel=1e-3), 4.5e15 / 2)
    assert (8 * h100.hbm_bytes, 8 * b200.hbm_bytes) == (640e9, 1440e9)
    assert (h100.hbm_bandwidth, 8 * b200.hbm_bandwidth) == (3.35e12, 64e12)
    assert (2 * h100.link_bandwidth, 8 * 2 * b200.link_bandwidth) == (900e9, 14.4e12)
    assert {chip.network_bandwidth for chip in (h100, b200)} == {400e9 / 8}
    assert (peak_flops("NVIDIA H100 80GB HBM3"), peak_flops("NVIDIA B200")) == (h100.flops, b200.flops)


def test_more_than_a_node_are_whole_nodes() -> None:
    assert parse_topology("h100:6").num_devices == 6
    assert parse_topology("b200:64").num_devices == 64
    assert parse_topology("gpu:8") == parse_topology("h100:8")
    found = problems(compose_config(["scale=182m", "mesh=h100_64", "mode=plan", "mesh.topology=h100:60"]))
    assert found == ["mesh.topology=h100:60: h100 devices are in nodes of 8; write h100:64"]


# Links


def test_where_mesh_axes_lie_on_nodes() -> None:
    """The last axis is fastest, so the first one crosses nodes."""
    topology, sizes = parse_topology("h100:64"), {"data": 2, "fsdp": 4, "expert": 4, "tensor": 2}
    wanted = {("tensor",): 1, ("expert",): 1, ("expert", "tensor"): 1, ("fsdp",): 4, ("data",): 2}
    wanted |= {("data", "fsdp"): 8, ("data", "expert"): 2, ("data", "fsdp", "expert", "tensor"): 8}
    for axes, nodes in wanted.items():
        devices = math.prod(sizes[axis] for axis in axes)
        assert links.span(None, topology, axes, sizes) == links.Span(devices, (), nodes)
    wide = {"data": 1, "fsdp": 2, "expert": 32, "tensor": 1}
    assert links.span(None, topology, ("expert",), wide) == links.Span(32, (), 4)


def walked(devices: int, nodes: int, messages: list[tuple[int, int, float]]) -> float:
    """Seconds at full bandwidth until the busiest switch port or network card of these messages has sent its bytes."""
    inside = devices // nodes
    switch, network = (defaultdict[int, float](float) for _ in range(2))
    for sender, receiver, size in messages:
        (switch if sender // inside == receiver // inside else network)[sender] += size
    ports = max(switch.values(), default=0.0) / H100.link_bandwidth
    return max(ports, max(network.values(), default=0.0) / H100.network_bandwidth)


@pytest.mark.parametrize(("devices", "nodes"), [(16, 2), (64, 8), (8, 8), (4, 2)])
def test_an_all_to_all_sends_by_switch_and_by_network(devices: int, nodes: int) -> None:
    everyone = range(devices)
    messages = [(sender, to, 1e6) for sender in everyone for to in everyone if sender != to]
    taken = links.seconds("ragged-all-to-all", 1e6 * (devices - 1), links.Span(devices, (), nodes), H100)
    assert (taken - FREE) * links.EFFICIENCY == pytest.approx(walked(devices, nodes, messages))


@pytest.mark.parametrize(("devices", "nodes"), [(16, 2), (64, 8), (8, 8), (4, 2)])
def test_rings_share_the_cards_of_a_node(devices: int, nodes: int) -> None:
    """Every ring visits node after node, and each enters and leaves a node at a device of its own."""
    inside, messages = devices // nodes, []
    for ring in range(inside):
        # Within a node from the ring's device on, round to the one before it; to the same place of the next node.
        order = [
            node * inside + (ring + node * (inside - 1) + step) % inside
            for node in range(nodes)
            for step in range(inside)
        ]
        assert sorted(order) == list(range(devices))
        messages += [(order[i], order[(i + 1) % devices], 1e9 / inside) for i in range(devices)]
    taken = links.seconds("all-gather", 1e9, links.Span(devices, (), nodes), H100)
    assert (taken - FREE * (nodes - 1)) * links.EFFICIENCY == pytest.approx(walked(devices, nodes, messages))


def test_a_node_is_faster_than_the_network_by_their_bandwidths() -> None:
    """400 Gb/s is 50 GB/s, a ninth of NVLink's 450."""
    inside = links.seconds("all-reduce", 9e9, links.Span(8, (), 1), H100)
    across = links.seconds("all-reduce", 9e9, links.Span(8, (), 8), H100)
    permuted = links.seconds("collective-permute", 9e9, links.Span(16, (), 2), H100)
    assert inside == pytest.approx(9 / 450 / links.EFFICIENCY, rel=1e-3)
    assert across == pytest.approx(9 * inside, rel=1e-2)
    assert permuted == pytest.approx(across, rel=1e-3)


# Without the compiler


@pytest.mark.usefixtures("gpus_are_counted")
def test_a_plan_without_the_compiler_is_counted_and_says_what_to_install() -> None:
    plan = report.make_plan(compose_config(["scale=182m", "mesh=h100_64", "mode=plan"]))
    assert plan.collectives is None
    assert plan.fits
    lines = report.text(plan).splitlines()
    assert lines[0].endswith(
        "64 devices (NVIDIA H100 80GB HBM3), data 1 x fsdp 2 x expert 32 x tensor 1; counted, not compiled"
    )
    assert lines[2] == (
        "  compiling for GPUs needs JAX's CUDA plugin and cuDNN: "
        'pip install "unipool_jax[gpu-plan]" (Linux; needs no GPU)'
    )
    assert json.loads(lines[-1])["compiled"] is False
    # By hand: both the tokens of 32 devices in four nodes and the bank's gradient of two in two go over the network.
    times = {part.name: part.seconds for part in plan.estimate.parts}
    sent = sum(m.total_bytes for m in plan.estimate.counts.messages if m.kind == "ragged-all-to-all")
    assert times["ragged-all-to-all over expert"] == pytest.approx(sent * 24 / 31 / (50e9 * links.EFFICIENCY), rel=0.05)
    sent = sum(m.total_bytes for m in plan.estimate.counts.messages if m.kind == "reduce-scatter")
    assert times["reduce-scatter over fsdp"] == pytest.approx(sent / (50e9 * links.EFFICIENCY), rel=0.05)


def test_only_what_is_missing_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_compiler, "_there", lambda module: module == "jax_plugins.xla_cuda12")
    monkeypatch.setattr(gpu_compiler, "_finds_cudnn", lambda: False)
    config = compose_config(["scale=182m", "mesh=gpu_8"])
    assert "needs cuDNN:" in str(gpu_compiler.missing(config))
    assert gpu_compiler.missing(compose_config(["scale=182m", "mesh=gpu_8", "kernels.attention=blocks"])) is None
    assert compilation.missing_compiler(compose_config(["scale=182m", "mesh=v5p_64"])) is None


def test_a_module_that_is_nowhere_is_missing() -> None:
    assert not gpu_compiler._there("no_such_package.inside")
    assert gpu_compiler._there("jax.numpy")


def test_kernels_are_those_of_the_platform_that_is_planned_for() -> None:
    config = compose_config(["scale=182m"])
    for platform, implementation, attention in (("gpu", "pallas_gpu", "cudnn"), ("tpu", "pallas_tpu", "splash")):
        found = compilation.for_devices(config, platform).kernels
        assert (found.implementation, found.attention) == (implementation, attention)
    narrow = compose_config(["scale=182m", "model.compute_dtype=float32"])
    assert compilation.for_devices(narrow, "gpu").kernels.attention == "blocks"


# Compiled modules

MODULE = """
%cond (p: (s32[], f32[8])) -> pred[] {
  ROOT %lt = pred[] fusion(%i), kind=kLoop, calls=%compare
}

%body (p: (s32[], f32[8])) -> (s32[], f32[8]) {
  %ffn = bf16[8]{0} custom-call(%a), custom_call_target="__gpu$xla.gpu.triton", backend_config={name = "expert_ffn_in"}
  %mpmd_map.4 = bf16[8]{0} custom-call(%a), custom_call_target="mosaic_gpu_v2", metadata={op_name="x/grouped_matmul/m"}
  %scores = (bf16[8]{0}, u8[0]{0}) custom-call(%a), custom_call_target="__cudnn$fmhaSoftmax", backend_config={}
  %gemm = bf16[8]{0} custom-call(%a), custom_call_target="__cublas$gemm", backend_config={}
  ROOT %g = bf16[1,16]{1,0} all-gather(%w), replica_groups=mesh['axis_0'=2,'axis_1'=4] {'axis_0'}, dimensions={1}
}

ENTRY %main (p: f32[8]) -> f32[8] {
  ROOT %w = (s32[], f32[8]{0}) while(%t), condition=%cond, body=%body, backend_config={"known_trip_count":{"n":"24"}}
}
"""


def test_a_module_for_gpus_is_read_with_loops_and_kernels() -> None:
    module = parse(MODULE)
    assert kernels(module) == {"expert_ffn_in": 24, "grouped_matmul": 24, "fmhaSoftmax": 24}
    (gather,) = collectives(module, ("data", "fsdp", "expert", "tensor"), (1, 2, 4, 1))
    assert (gather.kind, gather.axes, gather.devices, gather.times) == ("all-gather", ("fsdp",), 2, 24)


def test_elements_of_tuples_have_their_own_size() -> None:
    """The GPU compiler names them by number. A copy of one of them reads that one, not the state of the whole loop."""
    text = """
ENTRY %main (p: (s32[], (bf16[2,3], s32[]), f32[64,8])) -> f32[64,8] {
  %p = (s32[], (bf16[2,3]{1,0:T(8,128)}, s32[]), /*index=2*/f32[64,8]{1,0}) parameter(0)
  %n = s32[] copy(%p#0), metadata={op_name="x#y"}
  ROOT %c = f32[64,8]{1,0} copy(%p#2)
}
"""
    module, name = parse(text), "main"
    traffic = Traffic(module)
    bytes_of = {line.name: traffic.bytes(name, line) for line in module.computations[name]}
    assert bytes_of == {"p": 0, "p.element_0": 0, "n": 8, "p.element_2": 0, "c": 2 * 4 * 64 * 8}
    assert operands(module.computations[name][-1]) == ["p.element_2"]


# Compiled here, where the plugin and cuDNN are: `pip install "unipool_jax[gpu-plan]"`


def of_gpus(topology: str, *more: str) -> Config:
    devices = parse_topology(topology).num_devices
    sizes = (f"mesh.expert={devices // 2}", f"train.batch_size={4 * devices}", f"train.microbatch_size={2 * devices}")
    rest = (f"train.eval_batch_size={devices}", "kernels.attention=auto")
    return small("unipool", f"mesh.topology={topology}", *sizes, *rest, *more)


OTHERS = ("h100:8", "b200:8", "b200:16")


@functools.cache
def compiled_plan(topology: str) -> report.Plan:
    return report.make_plan(of_gpus(topology))


@needs_gpu_compiler
@pytest.mark.parametrize("topology", ["h100:16", *(pytest.param(name, marks=pytest.mark.slow) for name in OTHERS)])
def test_a_step_compiles_for_absent_gpus(topology: str) -> None:
    plan = compiled_plan(topology)
    assert plan.collectives is not None
    # Four layers, two micro-batches; forward, recomputed, and counted beforehand for the exact pool loss.
    calls = 4 * 2
    assert plan.kernels == {
        "expert_ffn_in": 3 * calls,
        "grouped_matmul": 3 * calls,
        "expert_ffn_gate_gradient": calls,
        "expert_ffn_rows_gradient": calls,
        "grouped_bank_gradient": 3 * calls,
        "fmhaSoftmax": 3 * calls,
        "fmhaSoftmaxBackward": calls,
    }
    counted = sum(message.total_bytes for message in plan.estimate.counts.messages)
    assert counted == pytest.approx(sum(item.total_bytes for item in plan.collectives), rel=0.05)
    assert "ragged-all-to-all" in {item.kind for item in plan.collectives}
    assert plan.parameter_bytes * 2 == pytest.approx(plan.optimizer_bytes, rel=0.01)
    assert 0 < plan.evaluation_bytes < plan.temporary_bytes
    assert plan.temporary_bytes == pytest.approx(plan.estimate.counts.temporary_bytes, rel=0.5)
    assert report.text(plan).splitlines()[0].endswith("; compiled")
    times = {part.name: part.seconds for part in plan.estimate.parts}
    assert 0 < times["copies and changes of layout"] < 0.1 * plan.estimate.seconds
    assert 0 < plan.estimate.hidden_seconds < plan.estimate.seconds_by_bound()["links"]


@needs_gpu_compiler
def test_compiled_collectives_over_two_nodes_take_the_network() -> None:
    """The same bytes as in one node of as many devices would be sent, at a ninth of the bandwidth and less."""
    plan = compiled_plan("h100:16")
    assert plan.collectives is not None
    sizes, topology = plan.sizes, plan.topology
    places = {item.axes: links.span(None, topology, item.axes, sizes) for item in plan.collectives}
    assert places["expert",].nodes == 1
    assert places["fsdp",] == links.Span(2, (), 2)
    assert all(np.prod([sizes[axis] for axis in axes]) == place.devices for axes, place in places.items())


@needs_gpu_compiler
@pytest.mark.slow
def test_a_search_compiles_for_gpus(tmp_path_factory: pytest.TempPathFactory) -> None:
    figure = tmp_path_factory.mktemp("search") / "plan.png"
    config = of_gpus("h100:8", "plan.search=true", "plan.compiled=1", f"plan.figure={figure}", "model.num_layers=2")
    text = search.search(config)
    assert "compiled (1 of the fastest):" in text
    assert json.loads(text.splitlines()[-1])["compiled"] is True
