"""What each `model.remat` frees and costs, counted: bytes per FLOP and per millisecond. Needs no TPU, compiles nothing.

    python -m benchmarks.recomputation scale=978m mesh=v5p_64 mesh.fsdp=1 mesh.expert=64

Beside them `dispatch`, which is no setting: the rows that experts received would not be kept but sent again.
"""

import dataclasses
import sys
import typing

from unipool_jax.config.chips import parse_topology
from unipool_jax.config.compose import compose_config
from unipool_jax.config.mesh_rules import AXES
from unipool_jax.config.schema import Config, Remat
from unipool_jax.moe.capacity import capacity, rows_per_device
from unipool_jax.planner.compilation import prepare, topology_mesh
from unipool_jax.planner.roofline import Estimate, estimate


def table(config: Config) -> list[str]:
    """The rows of a Markdown table for a mesh of TPUs, with a mixture in every layer."""
    assert config.mesh.topology is not None
    mesh, topology = topology_mesh(config), parse_topology(config.mesh.topology)
    sizes = {axis: int(mesh.shape[axis]) for axis in AXES}

    def modelled(remat: Remat) -> Estimate:
        model = dataclasses.replace(config.model, remat=remat)
        return estimate(dataclasses.replace(config, model=model), sizes, topology, mesh)

    none = modelled("none")
    found = {}
    for remat in typing.get_args(Remat)[1:]:
        other = modelled(remat)
        freed = none.counts.temporary_bytes - other.counts.temporary_bytes
        found[remat] = freed, _flops(other) - _flops(none), other.seconds - none.seconds
    # Two exchanges forward and two backward; half of the rows' way is sorting and sending.
    links = sum(part.seconds for part in none.parts if part.name.startswith("ragged-all-to-all"))
    sorting = next(part.seconds for part in none.parts if part.name == "dispatch")
    rows = capacity(rows_per_device(config, mesh), sizes["expert"], config.mesh.capacity_factor)
    bytes_kept = 2 * rows * config.model.hidden_size * config.mixture_layers
    found["dispatch"] = float(bytes_kept), 0.0, (links + sorting) / 4
    return [
        "| recomputed | GB freed | TFLOP more | bytes per kFLOP | ms more | GB per ms |",
        "|---|---|---|---|---|---|",
        *(
            f"| {name} | {freed / 1e9:.2f} | {flops / 1e12:.2f} | {f'{1e3 * freed / flops:.2f}' if flops else '-'} "
            f"| {1e3 * seconds:.1f} | {freed / 1e12 / seconds:.2f} |"
            for name, (freed, flops, seconds) in found.items()
        ),
    ]


def _flops(found: Estimate) -> float:
    return sum(work.flops for work in found.counts.work)


if __name__ == "__main__":
    prepare()
    print("\n".join(table(compose_config(["mode=plan", *sys.argv[1:]]))))
