"""The report of `mode=plan`: what a step costs each device of a mesh that need not be present."""

from __future__ import annotations

import dataclasses
import json
from collections import Counter
from collections.abc import Sequence
from typing import Any, NamedTuple

from jax.sharding import Mesh

from unipool_jax.config.chips import Topology, parse_topology
from unipool_jax.config.growth_schedule import grows
from unipool_jax.config.mesh_rules import AXES, nodes_of_experts, resolve_sizes
from unipool_jax.config.schema import Config, ConfigError
from unipool_jax.moe.capacity import UNMEASURED_FACTOR
from unipool_jax.planner import collectives as collectives_of
from unipool_jax.planner.collectives import Collective
from unipool_jax.planner.compilation import (
    Evaluation,
    MemoryExceededError,
    Program,
    compile_evaluation,
    compile_step,
    missing_compiler,
    prepare,
    topology_mesh,
)
from unipool_jax.planner.messages import balanced
from unipool_jax.planner.nodes import split
from unipool_jax.planner.roofline import Estimate, estimate
from unipool_jax.planner.windows import layer_loads
from unipool_jax.planner.work import Counts, count
from unipool_jax.training.growth_costs import cost_lines, stage_costs
from unipool_jax.training.sharding import placement
from unipool_jax.training.state import state_shapes

_GIB = 2**30
_PEAK = "peak, with gathered weights and gradients, which share buffers"


class Plan(NamedTuple):
    """The cost of a configuration on its devices; bytes are those of one device."""

    config: Config
    topology: Topology
    sizes: dict[str, int]
    parameter_bytes: int
    optimizer_bytes: int
    temporary_bytes: int
    """Of the training step: as compiled, or counted where the compiler is not installed."""
    evaluation_bytes: int
    """Temporaries of the evaluation step; parameters and optimizer state stay on the device."""
    collectives: tuple[Collective, ...] | None
    """Of the compiled step; None if nothing was compiled."""
    kernels: Counter[str]
    estimate: Estimate
    compile_seconds: tuple[float, float] | None
    """Of the training and the evaluation step."""
    counted_because: str | None = None
    """Why nothing was compiled."""

    @property
    def total_bytes(self) -> int:
        """Memory that a training step needs on a device."""
        return self.parameter_bytes + self.optimizer_bytes + self.temporary_bytes

    @property
    def evaluation_total_bytes(self) -> int:
        """Memory that an evaluation during training needs on a device."""
        return self.parameter_bytes + self.optimizer_bytes + self.evaluation_bytes

    @property
    def fits(self) -> bool:
        """Whether both are within the device's memory."""
        return max(self.total_bytes, self.evaluation_total_bytes) <= self.topology.chip.hbm_bytes


def make_plan(config: Config) -> Plan:
    """Compile the steps of `config` for the devices of `mesh.topology` and model the time of training.

    For GPUs whose compiler is not installed, memory and collectives are counted instead, and the plan says so.

    Raises:
      ConfigError: the topology or mesh is impossible, or a step does not fit in memory.
    """
    assert config.mesh.topology is not None
    prepare()
    topology = parse_topology(config.mesh.topology)
    sizes = _axis_sizes(config, topology)
    if missing := missing_compiler(config):
        return _counted(config, topology, sizes)._replace(counted_because=missing)
    mesh = topology_mesh(config)
    try:
        program = compile_step(config, mesh)
    except MemoryExceededError as error:
        raise ConfigError(
            [
                f"mesh.topology={config.mesh.topology}: the step does not fit ({error}); lower train.microbatch_size, "
                "set model.remat=full, or shard the state over more devices with mesh.fsdp or mesh.expert"
            ]
        ) from error
    try:
        evaluation = compile_evaluation(config, mesh)
    except MemoryExceededError as error:
        raise ConfigError(
            [f"train.eval_batch_size={config.train.eval_batch_size}: evaluation does not fit ({error}); lower it"]
        ) from error
    return from_programs(config, topology, mesh, program, evaluation)


def count_step(config: Config) -> Counts:
    """The work, messages and memory of a step on each device of `mesh.topology`, counted without compiling.

    Raises:
      ConfigError: the mesh does not fit the number of devices.
    """
    assert config.mesh.topology is not None
    topology = parse_topology(config.mesh.topology)
    return count(config, _axis_sizes(config, topology), topology)


def _axis_sizes(config: Config, topology: Topology) -> dict[str, int]:
    return dict(zip(AXES, resolve_sizes(config.mesh, topology.num_devices), strict=True))


def from_programs(config: Config, topology: Topology, mesh: Mesh, program: Program, evaluation: Evaluation) -> Plan:
    """The plan of compiled steps."""
    sizes = {name: int(size) for name, size in mesh.shape.items()}
    module = collectives_of.parse(program.text)
    axes = split(sizes, config.mesh)
    modelled = estimate(config, sizes, topology, mesh, module)
    found = collectives_of.collectives(module, tuple(axes), tuple(axes.values()))
    parameters, optimizer = state_bytes(config, mesh)
    return Plan(
        config,
        topology,
        sizes,
        parameters,
        optimizer,
        program.temporary_bytes,
        evaluation.temporary_bytes,
        tuple(balanced(one, modelled.counts.messages) for one in found),
        collectives_of.kernels(module),
        modelled,
        (program.seconds, evaluation.seconds),
    )


def state_bytes(config: Config, mesh: Mesh) -> tuple[int, int]:
    """Bytes of parameters and of all other state on one device."""
    lines = placement(state_shapes(config, mesh))
    parameters = sum(line.bytes_per_device for line in lines if line.name.startswith("params."))
    return parameters, sum(line.bytes_per_device for line in lines) - parameters


def _counted(config: Config, topology: Topology, sizes: dict[str, int]) -> Plan:
    """A plan from counts alone, for devices that cannot be compiled for ahead of time."""
    found = estimate(config, sizes, topology, None)
    counts = found.counts
    state, temporary = counts.state_bytes, counts.temporary_bytes
    memory = (int(state / 3), int(state * 2 / 3), int(temporary), int(counts.evaluation_bytes))
    return Plan(config, topology, sizes, *memory, None, Counter(), found, None)


def text(plan: Plan) -> str:
    """The report; its last line is JSON with the same numbers."""
    config, chip, found = plan.config, plan.topology.chip, plan.estimate
    axes = " x ".join(f"{axis} {size}" for axis, size in plan.sizes.items())
    compiled = plan.collectives is not None
    how = "compiled" if compiled else "counted, not compiled"
    lines = [
        f"{config.scale_name} {config.method_name} on {config.mesh.topology}: {plan.topology.num_devices} devices "
        f"({chip.device_kind}), {axes}; {how}",
        f"  {config.train.batch_size} x {config.data.sequence_length} tokens per step in {config.num_microbatches} "
        f"micro-batch(es), remat {config.model.remat}",
        *([f"  {plan.counted_because}"] if plan.counted_because else []),
        "",
        "memory per device",
        f"  parameters                   {plan.parameter_bytes / _GIB:8.2f} GiB",
        f"  optimizer state              {plan.optimizer_bytes / _GIB:8.2f} GiB",
        f"  activations and temporaries  {plan.temporary_bytes / _GIB:8.2f} GiB   {_PEAK}",
        f"  training, total              {plan.total_bytes / _GIB:8.2f} GiB {_room(plan, plan.total_bytes)}",
        f"  evaluation, with the state   {plan.evaluation_total_bytes / _GIB:8.2f} GiB "
        f"{_room(plan, plan.evaluation_total_bytes)}; train.eval_batch_size={config.train.eval_batch_size}",
        *_compile_seconds(plan),
        *_exchange(plan),
        *_windows(plan),
        *_growth(plan),
        "",
        "kernels: " + (", ".join(f"{name} x {n}" for name, n in sorted(plan.kernels.items())) or "counted only"),
        "",
        "collectives per device and step",
        *(f"  {line}" for line in _collective_lines(plan)),
        "",
        f"modelled step: {1e3 * found.seconds:.1f} ms",
        *(f"  {part.name:42}{1e3 * part.seconds:9.2f} ms   {part.bound}" for part in _longest(found)),
        "",
        f"FLOPs per device: {found.model_flops / 1e12:.2f} T of the model, "
        f"{sum(work.flops for work in found.counts.work) / 1e12:.2f} T executed with recomputation and padding",
        f"model FLOPs utilization: {found.utilisation:.1%} "
        f"({found.utilisation_with_hidden_links:.1%} if all collectives overlapped with compute)",
        *_hidden(plan),
        "bound by: " + ", ".join(f"{name} {1e3 * time:.0f} ms" for name, time in found.seconds_by_bound().items()),
        json.dumps(summary(plan)),
    ]
    return "\n".join(lines)


def _room(plan: Plan, needed: int) -> str:
    room = plan.topology.chip.hbm_bytes
    return f"of {room / _GIB:.2f}{'' if needed <= room else ', DOES NOT FIT'}"


def _exchange(plan: Plan) -> list[str]:
    """How tokens reach the experts of other nodes, with the modelled time of either way."""
    config, sizes, topology = plan.config, plan.sizes, plan.topology
    nodes = nodes_of_experts(sizes["expert"], sizes["tensor"], topology.chip.node)
    if topology.is_tpu or config.moe.router == "none" or nodes == 1:
        return []
    ways = (dataclasses.replace(config, mesh=dataclasses.replace(config.mesh, expert_nodes=n)) for n in (1, nodes))
    flat, staged = (f"{1e3 * estimate(way, sizes, topology, None).seconds:.1f} ms" for way in ways)
    if config.mesh.expert_nodes == 1:
        way = f"flat, counted {flat}; in two stages, with mesh.expert_nodes={nodes}, {staged}"
    else:
        way = f"in two stages, counted {staged}; flat, with mesh.expert_nodes=1, {flat}"
    return ["", f"exchange of tokens over {nodes} nodes: {way}"]


def _windows(plan: Plan) -> list[str]:
    """How evenly windows over one bank load the devices that share it, and whether buffers hold it."""
    if plan.config.windows is None or plan.sizes["expert"] == 1:
        return []
    mesh, windows = plan.config.mesh, plan.config.windows
    busiest = max(load.busiest for load in layer_loads(plan.config, plan.sizes))
    narrow, wide = min(windows.widths), max(windows.widths)
    widths = narrow if narrow == wide else f"{narrow} to {wide}"
    room = UNMEASURED_FACTOR if mesh.capacity_factor is None else mesh.capacity_factor
    found = (
        f"windows: layers see {widths} of {windows.experts} experts; with even "
        f"routing the busiest device receives {busiest:.2f} times the mean "
        f"(mesh.expert_placement={mesh.expert_placement})"
    )
    too_much = f", more than the {room:g} that its buffer holds: set mesh.expert_placement=auto"
    return ["", found + (too_much if busiest > room else "")]


def _growth(plan: Plan) -> list[str]:
    """What the stages of a run that grows cost. All else of the plan is of its last one, which needs most memory."""
    config = plan.config
    return ["", *cost_lines(config), "  the plan is that of the last stage"] if grows(config) else []


def _compile_seconds(plan: Plan) -> list[str]:
    if plan.compile_seconds is None:
        return []
    training, evaluation = plan.compile_seconds
    return [f"  compiled in {training:.0f} s, evaluation in {evaluation:.0f} s"]


def _hidden(plan: Plan) -> list[str]:
    """What the schedule of a compiled step hides."""
    if plan.collectives is None:
        return []
    found = plan.estimate
    links = found.seconds_by_bound()["links"]
    return [
        f"hidden as compiled: {1e3 * found.hidden_seconds:.1f} of {1e3 * links:.1f} ms of collectives, which leaves "
        f"{1e3 * found.compiled_seconds:.1f} ms and {found.utilisation_as_compiled:.1%}"
    ]


def _longest(found: Estimate) -> list[Any]:
    return sorted(found.parts, key=lambda part: -part.seconds)


def _collective_lines(plan: Plan) -> list[str]:
    """One line per collective, largest first; those below 0.5% of the bytes in one line."""
    if plan.collectives is None:
        rows = [(m.name, m.kind, m.axes, m.times, m.total_bytes) for m in plan.estimate.counts.messages]
    else:
        rows = [(_shown(c), c.kind, c.axes, c.times, c.total_bytes) for c in plan.collectives]
    rows.sort(key=lambda row: -row[4])
    total = sum(row[4] for row in rows)
    large = [row for row in rows if row[4] >= 0.005 * total]
    lines = [
        f"{kind:20}over {' x '.join(axes):24}{times:5} times{moved / 1e6:12.1f} MB   {name}"
        for name, kind, axes, times, moved in large
    ]
    rest = sum(row[4] for row in rows) - sum(row[4] for row in large)
    if len(rows) > len(large):
        lines.append(f"{len(rows) - len(large)} smaller ones{rest / 1e6:46.1f} MB")
    return [*lines, f"{'total':60}{total / 1e6:12.1f} MB"]


def _shown(collective: Collective) -> str:
    shapes = ", ".join(collective.shapes[:2]) + (", ..." if len(collective.shapes) > 2 else "")
    return shapes


def collective_bytes(items: Sequence[Collective] | None, plan: Plan) -> float:
    """Bytes that a device sends per step."""
    return sum(item.total_bytes for item in (plan.estimate.counts.messages if items is None else items))


def summary(plan: Plan) -> dict[str, Any]:
    """The numbers of the plan, for JSON."""
    found = plan.estimate
    items = plan.estimate.counts.messages if plan.collectives is None else plan.collectives
    by_axis: dict[str, float] = {}
    for item in items:
        name = f"{item.kind} {'+'.join(item.axes)}"
        by_axis[name] = by_axis.get(name, 0.0) + item.total_bytes
    return {
        "topology": plan.config.mesh.topology,
        "mesh": plan.sizes,
        "compiled": plan.collectives is not None,
        "memory": {
            "parameters": plan.parameter_bytes,
            "optimiser": plan.optimizer_bytes,
            "temporaries": plan.temporary_bytes,
            "total": plan.total_bytes,
            "evaluation_temporaries": plan.evaluation_bytes,
            "evaluation_total": plan.evaluation_total_bytes,
            "hbm": int(plan.topology.chip.hbm_bytes),
            "fits": plan.fits,
        },
        "remat": plan.config.model.remat,
        "compile_seconds": plan.compile_seconds,
        "collective_bytes": {name: round(moved) for name, moved in by_axis.items()},
        "kernels": dict(plan.kernels),
        "flops": {"model": found.model_flops, "executed": sum(work.flops for work in found.counts.work)},
        "step_seconds": found.seconds,
        "seconds_by_bound": found.seconds_by_bound(),
        "utilisation": found.utilisation,
        "utilisation_with_hidden_links": found.utilisation_with_hidden_links,
        "hidden_seconds": found.hidden_seconds if plan.collectives is not None else None,
        "utilisation_as_compiled": found.utilisation_as_compiled if plan.collectives is not None else None,
        "tokens_per_second": found.tokens_per_second,
        **({"growth": [cost._asdict() for cost in stage_costs(plan.config)]} if grows(plan.config) else {}),
    }
