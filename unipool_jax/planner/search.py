"""Searches micro-batch size, rematerialization, mesh shape and exchange for the highest modelled throughput that fits.

The model of `roofline` ranks all candidates within seconds; only the best are compiled, which decides whether they fit.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import shlex
import typing
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from jax.sharding import Mesh

from unipool_jax.config.chips import Topology, parse_topology
from unipool_jax.config.compose import CONFIG_DIR, compose_config, overrides_from
from unipool_jax.config.mesh_rules import AXES, nodes_of_experts
from unipool_jax.config.rules import problems
from unipool_jax.config.schema import Config, ConfigError, PlanConfig, Remat
from unipool_jax.planner.compilation import (
    MemoryExceededError,
    compile_evaluation,
    compile_step,
    devices_of,
    missing_compiler,
    prepare,
    topology_mesh,
)
from unipool_jax.planner.report import Plan, from_programs, summary
from unipool_jax.planner.roofline import Estimate, estimate

MARGIN = 1.3
"""Candidates whose estimated temporaries exceed memory by up to this factor are kept, because estimates are rough."""
SHOWN = 12
_REMAT: tuple[Remat, ...] = typing.get_args(Remat)


class Candidate(NamedTuple):
    """One configuration of the search and its modelled step."""

    config: Config
    mesh: Mesh | None
    estimate: Estimate

    @property
    def gigabytes(self) -> float:
        """Estimated memory of a device, GB."""
        counts = self.estimate.counts
        return (counts.state_bytes + max(counts.temporary_bytes, counts.evaluation_bytes)) / 1e9


def mesh_shapes(devices: int) -> Iterator[tuple[int, int, int, int]]:
    """All sizes of the four axes that multiply to this many devices."""
    divisors = [n for n in range(1, devices + 1) if devices % n == 0]
    for data, fsdp, expert in itertools.product(divisors, repeat=3):
        if devices % (data * fsdp * expert) == 0:
            yield data, fsdp, expert, devices // (data * fsdp * expert)


def candidates(config: Config) -> tuple[list[Candidate], Counter[str]]:
    """All candidates that are valid, fit the torus and, by estimate, may fit in memory.

    Returns:
      The candidates, fastest first, and the number of mesh shapes excluded for each reason.
    """
    assert config.mesh.topology is not None
    topology, compiled = parse_topology(config.mesh.topology), missing_compiler(config) is None
    found: list[Candidate] = []
    left_out: Counter[str] = Counter()
    for shape in mesh_shapes(topology.num_devices):
        modelled, reason = _of_shape(config, shape, topology, compiled)
        found.extend(modelled)
        if not modelled:
            left_out[reason] += 1
    return sorted(found, key=lambda candidate: candidate.estimate.seconds), left_out


def _of_shape(
    config: Config, shape: tuple[int, ...], topology: Topology, compiled: bool
) -> tuple[list[Candidate], str]:
    """The candidates with this mesh, of devices if they can be compiled, and the last reason that excluded one."""
    sizes: dict[str, Any] = dict(zip(AXES, shape, strict=True))
    ways = shape[0] * shape[1] * shape[2]
    if config.train.batch_size % ways:
        return [], f"train.batch_size={config.train.batch_size} is no multiple of data x fsdp x expert"
    # Results do not depend on the evaluation batch size, so it is adapted to the mesh.
    evaluated = max(config.train.eval_batch_size // ways, 1) * ways
    per_way = config.train.batch_size // ways
    found, reason, mesh = [], "", None
    whole = [n for n in range(1, per_way + 1) if per_way % n == 0]
    for sequences, remat, nodes in itertools.product(whole, _REMAT, _exchanges(config, sizes, topology)):
        candidate = dataclasses.replace(
            config,
            train=dataclasses.replace(config.train, microbatch_size=sequences * ways, eval_batch_size=evaluated),
            model=dataclasses.replace(config.model, remat=remat),
            mesh=dataclasses.replace(config.mesh, expert_nodes=nodes, **sizes),
        )
        if refused := problems(candidate):
            reason = f"{refused[0].partition('=')[0]} is refused"
            continue
        if mesh is None and compiled:
            try:
                mesh = topology_mesh(candidate)
            except ConfigError:
                return [], "the links cannot be laid out like this"
        modelled = Candidate(candidate, mesh, estimate(candidate, sizes, topology, mesh))
        if _perhaps_fits(modelled, topology):
            found.append(modelled)
        else:
            reason = "memory does not suffice, by estimate"
    return found, reason


def _exchanges(config: Config, sizes: dict[str, int], topology: Topology) -> tuple[int, ...]:
    """Values of `mesh.expert_nodes`: flat and, where devices that share experts are in several nodes, two stages."""
    if topology.is_tpu or config.moe.router == "none":
        return (1,)
    nodes = nodes_of_experts(sizes["expert"], sizes["tensor"], topology.chip.node)
    return (1,) if nodes == 1 else (1, nodes)


def _perhaps_fits(candidate: Candidate, topology: Topology) -> bool:
    counts = candidate.estimate.counts
    temporary = max(counts.temporary_bytes, counts.evaluation_bytes)
    return counts.state_bytes + temporary / MARGIN <= topology.chip.hbm_bytes


def frontier(found: list[Candidate]) -> list[Candidate]:
    """The Pareto frontier of time and estimated memory, fastest first."""
    best: list[Candidate] = []
    for candidate in found:
        if not best or candidate.gigabytes < best[-1].gigabytes:
            best.append(candidate)
    return best


def command(config: Config) -> str:
    """The command that trains `config`: its scale and method, and every setting that differs from them."""
    chosen = {"scale": config.scale_name, "method": config.method_name}
    groups = [f"{group}={name}" for group, name in chosen.items() if (CONFIG_DIR / group / f"{name}.yaml").is_file()]
    trained = dataclasses.replace(config, mode="train", plan=PlanConfig())
    return shlex.join(["unipool", "train", *groups, *overrides_from(compose_config(groups), trained)])


def search(config: Config) -> str:
    """Search, compile the best candidates and draw `plan.figure`; returns a report whose last line is JSON.

    Raises:
      ConfigError: no candidate fits, or the devices cannot be compiled for.
    """
    prepare()
    assert config.mesh.topology is not None
    missing = missing_compiler(config)
    if missing is None:
        devices_of(config.mesh.topology)  # where it cannot, no mesh can be made, which would not say why
    found, left_out = candidates(config)
    topology = parse_topology(config.mesh.topology)
    winner: Plan | None = None
    winning: Candidate | None = None
    notes, compiled = [], 0
    for candidate in found:
        if compiled == config.plan.compiled or candidate.mesh is None:
            break
        compiled += 1
        try:
            program = compile_step(candidate.config, candidate.mesh)
            evaluation = compile_evaluation(candidate.config, candidate.mesh)
        except MemoryExceededError:
            notes.append(f"  {_name(candidate)}: does not fit")
            continue
        plan = from_programs(candidate.config, topology, candidate.mesh, program, evaluation)
        notes.append(
            f"  {_name(candidate)}: {plan.total_bytes / 1e9:.1f} GB ({plan.evaluation_total_bytes / 1e9:.1f} in "
            f"evaluation), {1e3 * plan.estimate.compiled_seconds:.1f} ms as compiled, "
            f"{plan.estimate.utilisation_as_compiled:.1%}{'' if plan.fits else ', does not fit'}"
        )
        if plan.fits and (winner is None or plan.estimate.compiled_seconds < winner.estimate.compiled_seconds):
            winner, winning = plan, candidate
    if missing:
        winning = next((c for c in found if c.gigabytes * 1e9 <= topology.chip.hbm_bytes), None)
    if winning is None:
        raise ConfigError(
            [
                f"mesh.topology={config.mesh.topology}: none of {len(found)} candidates is known to fit "
                f"({compiled} compiled); raise plan.compiled={config.plan.compiled}, lower train.eval_batch_size="
                f"{config.train.eval_batch_size}, or use more devices"
            ]
        )
    line = command(winning.config)
    draw(found, winning, topology, config.plan.figure)
    numbers: dict[str, Any] = summary(winner) if winner else {"step_seconds": winning.estimate.seconds}
    lines = [
        f"{len(found)} candidates on {config.mesh.topology}; the frontier of modelled time and estimated memory:",
        f"  {'':46}{'GB':>8}{'ms':>9}{'MFU':>8}  longest part",
        *(_row(candidate) for candidate in frontier(found)[:SHOWN]),
        *(f"excluded: {number} mesh shapes, {reason}" for reason, number in left_out.most_common()),
        "",
        f"compiled ({compiled} of the fastest):",
        *([f"  {missing}"] if missing else notes),
        "",
        f"figure: {config.plan.figure}",
        f"best: {line}",
        json.dumps(numbers | {"command": line, "candidates": len(found), "left_out": left_out}),
    ]
    return "\n".join(lines)


def _name(candidate: Candidate) -> str:
    config = candidate.config
    axes = " ".join(f"{axis[0]}{getattr(config.mesh, axis)}" for axis in AXES)
    stages = "" if config.mesh.expert_nodes == 1 else "  two stages"
    return f"{axes}  micro-batch {config.train.microbatch_size:5}  remat {config.model.remat}{stages}"


def _row(candidate: Candidate) -> str:
    found = candidate.estimate
    longest = max(found.parts, key=lambda part: part.seconds)
    return (
        f"  {_name(candidate):46}{candidate.gigabytes:8.1f}{1e3 * found.seconds:9.1f}{found.utilisation:8.1%}"
        f"  {longest.name} ({longest.bound})"
    )


def draw(found: list[Candidate], winner: Candidate, topology: Topology, path: str) -> None:
    """Draw throughput over memory of all candidates as a PNG, with the frontier as a line and the winner marked."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 4.5), layout="constrained")
    for remat, marker in zip(_REMAT, "oxPDs^", strict=True):
        group = [candidate for candidate in found if candidate.config.model.remat == remat]
        axes.scatter(
            [c.gigabytes for c in group],
            [c.estimate.tokens_per_second / 1e6 for c in group],
            s=12,
            marker=marker,
            alpha=0.5,
            label=f"remat {remat}",
        )
    best = frontier(found)
    axes.plot([c.gigabytes for c in best], [c.estimate.tokens_per_second / 1e6 for c in best], "k-", linewidth=0.8)
    axes.plot(winner.gigabytes, winner.estimate.tokens_per_second / 1e6, "r*", markersize=14, label="best that fits")
    axes.axvline(topology.chip.hbm_bytes / 1e9, color="gray", linestyle="--", label="memory of a device")
    axes.set(
        xlabel="estimated memory of a device, GB",
        ylabel="modelled throughput, million tokens/s",
        xscale="log",
        title=f"{winner.config.scale_name} {winner.config.method_name} on {winner.config.mesh.topology}",
    )
    axes.legend(fontsize=8)
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)
    pyplot.close(figure)
