"""What runs beside the collectives of a step, variant by variant, in the schedule that the TPU compiler makes.

    python -m benchmarks.overlap --out results/overlap
    python -m benchmarks.overlap --out results/overlap --variants pool_16_tied pool_16_sparse

Compiles the training step of 978M for 64 v5p chips ahead of time, on a machine without TPUs, and walks through its
schedule as `unipool plan` does. Nothing is run. It writes a file per variant, and the table of all that are there. To
compile one takes minutes; a variant whose file is there is left as it is.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

from unipool_jax.cli.guard import guarded
from unipool_jax.config.chips import parse_topology
from unipool_jax.config.compose import compose_config
from unipool_jax.config.files import write_text
from unipool_jax.config.schema import Config
from unipool_jax.moe import dispatch, mixture
from unipool_jax.planner.collectives import Module, parse
from unipool_jax.planner.compilation import compile_step, prepare, topology_mesh
from unipool_jax.planner.roofline import estimate, schedule

_COMMON = ("mode=plan", "scale=978m", "mesh=v5p_64")
_WIDE, _NONE, _FULL = ("mesh.fsdp=1", "mesh.expert=64"), ("model.remat=none",), ("model.remat=full",)
_MIXTURE = ("method=vanilla", "mesh.fsdp=16", "mesh.expert=4")
_SPARSE, _FITTED = ("mesh.sparse_core_collectives=true",), ("mesh.capacity_factor=1.5",)


class Variant(NamedTuple):
    """One row of the table."""

    title: str
    overrides: tuple[str, ...]
    tied: bool = True
    """With the tie of `moe.overlap`."""


VARIANTS = {
    "pool_16_apart": Variant("1 x 4 x 16, without the tie", _NONE, tied=False),
    "pool_16_tied": Variant("1 x 4 x 16", _NONE),
    "pool_16_sparse": Variant("1 x 4 x 16, `mesh.sparse_core_collectives=true`", (*_NONE, *_SPARSE)),
    "pool_16_fitted": Variant("1 x 4 x 16, `mesh.capacity_factor=1.5`", (*_NONE, *_FITTED)),
    "pool_16_full_apart": Variant("1 x 4 x 16, `model.remat=full`, without the tie", _FULL, tied=False),
    "pool_16_full_tied": Variant("1 x 4 x 16, `model.remat=full`", _FULL),
    "pool_16_moe": Variant("1 x 4 x 16, `model.remat=moe`", ("model.remat=moe",)),
    "pool_64_apart": Variant("1 x 1 x 64, without the tie", (*_NONE, *_WIDE), tied=False),
    "pool_64_tied": Variant("1 x 1 x 64", (*_NONE, *_WIDE)),
    "pool_64_experts": Variant("1 x 1 x 64, `model.remat=experts`", ("model.remat=experts", *_WIDE)),
    "pool_64_sparse": Variant("1 x 1 x 64, `mesh.sparse_core_collectives=true`", (*_NONE, *_WIDE, *_SPARSE)),
    "pool_64_fitted": Variant("1 x 1 x 64, `mesh.capacity_factor=1.5`", (*_NONE, *_WIDE, *_FITTED)),
    "mixture_4_tied": Variant("per-layer mixture, 1 x 16 x 4", (*_MIXTURE, *_NONE)),
    "mixture_4_sparse": Variant(
        "per-layer mixture, 1 x 16 x 4, `mesh.sparse_core_collectives=true`", (*_MIXTURE, *_NONE, *_SPARSE)
    ),
    "mixture_4_attention": Variant(
        "per-layer mixture, 1 x 16 x 4, `model.remat=attention`", (*_MIXTURE, "model.remat=attention")
    ),
    "mixture_4_moe": Variant("per-layer mixture, 1 x 16 x 4, `model.remat=moe`", (*_MIXTURE, "model.remat=moe")),
    "pool_64_both": Variant(
        "1 x 1 x 64, `mesh.capacity_factor=1.5 mesh.sparse_core_collectives=true`",
        (*_NONE, *_WIDE, *_FITTED, *_SPARSE),
    ),
}


def measured(config: Config, module: Module) -> dict[str, Any]:
    """Numbers of a compiled step; times in milliseconds."""
    assert config.mesh.topology is not None
    topology, mesh = parse_topology(config.mesh.topology), topology_mesh(config)
    sizes = {name: int(size) for name, size in mesh.shape.items()}
    found = estimate(config, sizes, topology, mesh, module)
    walked = schedule(config, sizes, topology, mesh, module)
    exchanges = [window for window in walked.windows if window.collective.kind == "ragged-all-to-all"]
    layers = max(window.collective.times for window in exchanges)
    return {
        "exchanges": len(exchanges),
        "exchanges_beside_work": sum(window.between > 1e-5 for window in exchanges),
        "exchange_ms": sum(1e3 * window.seconds * window.collective.times for window in exchanges),
        "exchange_hidden_ms": 1e3 * layers * sum(min(window.seconds, window.between) for window in exchanges),
        "collective_ms": 1e3 * walked.seconds,
        "hidden_ms": 1e3 * walked.hidden_seconds,
        "copies_ms": 1e3 * walked.copy_seconds,
        "instructions_ms": 1e3 * walked.instruction_seconds,
        "step_ms": 1e3 * found.seconds,
        "step_as_compiled_ms": 1e3 * found.compiled_seconds,
        "utilisation": found.utilisation,
        "utilisation_as_compiled": found.utilisation_as_compiled,
        "windows": [
            {
                "kind": window.collective.kind,
                "axes": window.collective.axes,
                "shape": window.collective.shapes[0],
                "times": window.collective.times,
                "us": round(1e6 * window.seconds),
                "asynchronous": window.done != window.start,
                "between_us": round(1e6 * window.between),
            }
            for window in walked.windows
            if window.seconds * window.collective.times > 2e-4
        ],
    }


def compiled(variant: Variant) -> dict[str, Any]:
    """Compile a variant and read its schedule."""
    config = compose_config([*_COMMON, *variant.overrides])
    tied = mixture.tied if variant.tied else lambda *gradients: gradients
    with mock.patch.object(mixture, "tied", tied), mock.patch.object(dispatch, "tied", tied):
        program = compile_step(config, topology_mesh(config))
    memory = {"temporary_gb": program.temporary_bytes / 1e9, "compile_seconds": program.seconds}
    return memory | measured(config, parse(program.text))


def table(folder: Path) -> str:
    """The table of the variants whose files are there."""
    lines = [
        "| step | exchanges beside work | exchange ms, hidden | all collectives ms, hidden | exposed ms | copies ms "
        "| instructions ms | step ms, collectives in full | as compiled | MFU as compiled | temporaries GB |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for name, variant in VARIANTS.items():
        path = folder / f"{name}.json"
        if not path.is_file():
            continue
        n = json.loads(path.read_text())
        # Earlier files do not have it.
        instructions = f"{n['instructions_ms']:.1f}" if "instructions_ms" in n else ""
        lines.append(
            f"| {variant.title} | {n['exchanges_beside_work']} of {n['exchanges']} "
            f"| {n['exchange_ms']:.1f}, {n['exchange_hidden_ms']:.1f} | {n['collective_ms']:.1f}, {n['hidden_ms']:.1f} "
            f"| {n['collective_ms'] - n['hidden_ms']:.1f} | {n['copies_ms']:.1f} "
            f"| {instructions} | {n['step_ms']:.1f} "
            f"| {n['step_as_compiled_ms']:.1f} | {n['utilisation_as_compiled']:.1%} | {n['temporary_gb']:.2f} |"
        )
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> int:
    """Compile the variants that are missing, one after another."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder of results")
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=list(VARIANTS))
    given = parser.parse_args(arguments)
    prepare()
    for name in given.variants:
        path = given.out / f"{name}.json"
        if not path.is_file():
            write_text(path, json.dumps(compiled(VARIANTS[name]), indent=1) + "\n")
    print(table(given.out))
    return 0


if __name__ == "__main__":
    sys.exit(guarded(main))
