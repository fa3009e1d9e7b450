"""Modelled weak scaling over TPU pods, and the shared pool beside the matched per-layer mixture. Needs no TPU.

    python -m benchmarks.scaling                  # all three tables, 978M
    python -m benchmarks.scaling --tables weak    # 64 to 1024 v5p chips, eight sequences a device
    python -m benchmarks.scaling --compiled       # the same from compiled steps, minutes each

Without `--compiled` collectives and memory are counted (`unipool_jax.planner.work`), with it they are the compiled
module's. Times are modelled: see docs/planner.md.
"""

import argparse
import json
from collections.abc import Iterator, Sequence
from typing import Any

from unipool_jax.config.chips import parse_topology
from unipool_jax.config.compose import compose_config
from unipool_jax.config.schema import Config
from unipool_jax.planner.collectives import collectives, parse
from unipool_jax.planner.compilation import compile_step, prepare, topology_mesh
from unipool_jax.planner.report import state_bytes
from unipool_jax.planner.roofline import estimate

WEAK = {
    # Topology, data, fsdp, expert.
    "expert groups of 16": (
        ("v5p:4x4x4", 1, 4, 16),
        ("v5p:4x4x8", 1, 8, 16),
        ("v5p:4x4x16", 1, 16, 16),
        ("v5p:4x8x16", 1, 32, 16),
        ("v5p:8x8x16", 1, 64, 16),
    ),
    "expert groups that grow with the pod": (
        ("v5p:4x4x4", 1, 4, 16),
        ("v5p:4x4x8", 1, 4, 32),
        ("v5p:4x8x8", 1, 8, 32),
        ("v5p:8x8x8", 1, 8, 64),
        ("v5p:8x8x16", 1, 16, 64),
    ),
}
SEQUENCES = 8
"""Of 1024 tokens, per device and step: the published batch of 512 on 64 chips."""
BOTH, POOL = ("unipool", "vanilla"), ("unipool",)
COMPARED = (
    # A layer of the mixture has eight experts, so more than eight devices cannot share them; a pool has them all.
    ("v5p:2x2x2", (1, 1, 8), BOTH),
    ("v5p:4x4x4", (1, 16, 4), BOTH),
    ("v5p:4x4x4", (1, 4, 16), POOL),
    ("v5p:4x4x4", (1, 1, 64), POOL),
)
AIM = 0.45


def configured(scale: str, method: str, topology: str, axes: Sequence[int], *more: str) -> Config:
    """`scale` and `method` on a mesh; the batch is that of `SEQUENCES`."""
    data, fsdp, expert = axes
    devices = parse_topology(topology).num_devices
    batch = devices * SEQUENCES
    return compose_config(
        [
            f"scale={scale}",
            f"method={method}",
            "mode=plan",
            f"mesh.topology={topology}",
            f"mesh.data={data}",
            f"mesh.fsdp={fsdp}",
            f"mesh.expert={expert}",
            f"train.batch_size={batch}",
            f"train.microbatch_size={batch}",
            f"train.eval_batch_size={batch}",
            *more,
        ]
    )


def measure(config: Config, *, compiled: bool) -> dict[str, Any]:
    """Numbers of one plan, per device."""
    assert config.mesh.topology is not None
    topology, mesh = parse_topology(config.mesh.topology), topology_mesh(config)
    sizes = {name: int(size) for name, size in mesh.shape.items()}
    tokens = config.tokens_per_step / topology.num_devices
    if compiled:
        program = compile_step(config, mesh)
        module = parse(program.text)
        items = list(collectives(module, tuple(mesh.axis_names), mesh.devices.shape))
        found = estimate(config, sizes, topology, mesh, module)
        state, temporary = float(sum(state_bytes(config, mesh))), float(program.temporary_bytes)
        moved = sum(item.total_bytes for item in items)
    else:
        found = estimate(config, sizes, topology, mesh)
        state, temporary = found.counts.state_bytes, found.counts.temporary_bytes
        moved = sum(message.total_bytes for message in found.counts.messages)
    return {
        "devices": topology.num_devices,
        "mesh": sizes,
        "state_gb": state / 1e9,
        "temporary_gb": temporary / 1e9,
        "collective_gb": moved / 1e9,
        "collective_bytes_per_token": moved / tokens,
        "weight_traffic_gb": found.counts.bank_traffic_bytes / 1e9,
        "step_ms": 1e3 * found.seconds,
        "utilisation": found.utilisation,
        "utilisation_with_hidden_links": found.utilisation_with_hidden_links,
        "bound_ms": {name: 1e3 * seconds for name, seconds in found.seconds_by_bound().items()},
    }


def weak(scale: str, *, compiled: bool) -> Iterator[dict[str, Any]]:
    """From 64 to 1024 chips with the same work for each."""
    for family, meshes in WEAK.items():
        print(f"\nweak scaling, {scale} unipool, {SEQUENCES} x 1024 tokens a device and step, remat none, {family}")
        print(f"{'devices':>8}  {'data x fsdp x expert':<22}{'collective bytes a token':>26}{'step ms':>9}{'MFU':>8}")
        first = None
        for topology, *axes in meshes:
            row = measure(configured(scale, "unipool", topology, axes, "model.remat=none"), compiled=compiled)
            first = first or row["collective_bytes_per_token"]
            shape = " x ".join(map(str, axes))
            change = row["collective_bytes_per_token"] / first - 1
            print(
                f"{row['devices']:8}  {shape:<22}{row['collective_bytes_per_token']:16,.0f} ({change:+6.1%})"
                f"{row['step_ms']:9.1f}{row['utilisation']:8.1%}",
                flush=True,
            )
            yield {"table": "weak", "family": family, "topology": topology, **row}


def utilisation(scale: str, *, compiled: bool) -> Iterator[dict[str, Any]]:
    """The published batch on 64 v5p chips, for each way of rematerialization and two meshes."""
    print(f"\n{scale} unipool at the published batch on v5p:4x4x4; the aim is {AIM:.0%} of peak on active FLOPs")
    print(f"{'data x fsdp x expert':<22}{'remat':<7}{'GB':>6}{'step ms':>9}{'MFU':>8}{'links hidden':>14}  bound by")
    for axes in ((1, 4, 16), (1, 1, 64)):
        for remat in ("full", "moe", "none"):
            config = configured(scale, "unipool", "v5p:4x4x4", axes, f"model.remat={remat}")
            row = measure(config, compiled=compiled)
            bounds = ", ".join(f"{name} {time:.0f} ms" for name, time in row["bound_ms"].items())
            print(
                f"{' x '.join(map(str, axes)):<22}{remat:<7}{row['state_gb'] + row['temporary_gb']:6.1f}"
                f"{row['step_ms']:9.1f}{row['utilisation']:8.1%}{row['utilisation_with_hidden_links']:14.1%}  {bounds}",
                flush=True,
            )
            yield {"table": "utilisation", "remat": remat, **row}


def beside(scale: str, *, compiled: bool) -> Iterator[dict[str, Any]]:
    """The shared pool and the per-layer mixture of the same experts, on the same meshes."""
    print(f"\n{scale}, the shared pool beside the per-layer mixture, {SEQUENCES} x 1024 tokens a device and step")
    print(
        f"{'topology':<12}{'data x fsdp x expert':<22}{'remat':<6}{'method':<9}{'state GB':>9}{'temp GB':>9}"
        f"{'weights GB':>12}{'collectives GB':>16}{'step ms':>9}{'MFU':>8}"
    )
    for topology, axes, methods in COMPARED:
        for method in methods:
            row = measure(configured(scale, method, topology, axes, "model.remat=full"), compiled=compiled)
            print(
                f"{topology:<12}{' x '.join(map(str, axes)):<22}{'full':<6}{method:<9}{row['state_gb']:9.2f}"
                f"{row['temporary_gb']:9.2f}{row['weight_traffic_gb']:12.1f}{row['collective_gb']:16.2f}"
                f"{row['step_ms']:9.1f}{row['utilisation']:8.1%}",
                flush=True,
            )
            yield {"table": "beside", "method": method, "topology": topology, **row}


def main(arguments: Sequence[str] | None = None) -> None:
    """Read the command line, print the tables, and all numbers as one line of JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scale", default="978m")
    parser.add_argument("--tables", nargs="+", choices=["weak", "utilisation", "beside"], default=None)
    parser.add_argument("--compiled", action="store_true", help="compile every step: minutes each")
    chosen = parser.parse_args(arguments)
    tables = chosen.tables or ["weak", "utilisation", "beside"]
    prepare()
    rows: list[dict[str, Any]] = []
    if "weak" in tables:
        rows.extend(weak(chosen.scale, compiled=chosen.compiled))
    if "utilisation" in tables:
        rows.extend(utilisation(chosen.scale, compiled=chosen.compiled))
    if "beside" in tables:
        rows.extend(beside(chosen.scale, compiled=chosen.compiled))
    print(json.dumps(rows))


if __name__ == "__main__":
    main()
