"""What a run says of itself at its start and at its end."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax
from jax.sharding import Mesh

from unipool_jax.config.schema import Config
from unipool_jax.kernels import mosaic_gpu
from unipool_jax.kernels.implementations import resolve, resolve_attention
from unipool_jax.moe.dispatch import transport_for
from unipool_jax.training.console import Progress
from unipool_jax.training.evaluate import print_results
from unipool_jax.training.growing import Growing
from unipool_jax.training.optimizer import extension_notice
from unipool_jax.training.receive_buffers import ReceiveBuffers
from unipool_jax.training.run_folder import RunError
from unipool_jax.training.sharding import misplaced_banks, report
from unipool_jax.training.state import TrainState
from unipool_jax.training.step import counts_before_gradient


def num_devices(mesh: Mesh | None) -> int:
    """Devices of the mesh."""
    return 1 if mesh is None else mesh.size


def announce(
    config: Config,
    folder: Path,
    state: TrainState,
    mesh: Mesh | None,
    start: int,
    progress: Progress,
    buffers: ReceiveBuffers,
    growth: Growing | None,
) -> None:
    """Print the run, the mesh and the sharding of large arrays.

    Raises:
      RunError: expert weights are not sharded as the mesh says.
    """
    device = jax.local_devices()[0]
    progress.message(
        f"{folder}: {config.scale_name} {config.method_name} on {num_devices(mesh)} x "
        f"{device.device_kind}, {config.total_experts} experts in {config.pool.groups} pool(s), "
        f"{config.tokens_per_step:,} tokens per step, {resolve(config.kernels.implementation)} kernels, "
        f"{resolve_attention(config.kernels.attention, config.model.compute_dtype, config.head_size)} attention"
    )
    if config.kernels.implementation == "mosaic_gpu":
        model = config.model
        if said := mosaic_gpu.notice(model.compute_dtype, model.hidden_size, model.ffn_size):
            progress.message(said)
    if counts_before_gradient(config):
        progress.message(
            f"the exact pool loss over {config.num_microbatches} micro-batches needs a second forward pass per "
            f"step; train.microbatch_size={config.train.batch_size}, loss.balance_groups={config.num_microbatches} or "
            "loss.pool_statistics=previous avoids it"
        )
    if num_devices(mesh) < jax.device_count():
        progress.message(f"{jax.device_count()} devices are available; mesh.data=-1 would use all of them")
    if mesh is not None:
        sizes = " x ".join(f"{axis} {size}" for axis, size in mesh.shape.items())
        transport = transport_for(config.mesh, mesh.shape["expert"])
        nodes = config.mesh.expert_nodes
        stages = "" if nodes == 1 else f" in two stages, over {nodes} nodes"
        capacity = "" if transport == "local" else f" with capacity factor {buffers.factor:g}"
        progress.message(
            f"mesh {sizes}, {jax.process_count()} process(es), {transport} transport{stages}{capacity}\n{report(state)}"
        )
        if misplaced := misplaced_banks(config, mesh, state):
            raise RunError(
                f"mesh {sizes}: expert weights are not sharded accordingly: {', '.join(misplaced)} per device"
            )
    if start:
        progress.message(f"resuming after step {start}")
    if growth is not None:
        progress.message(growth.notice())
    if config.train.earlier_steps:
        progress.message(extension_notice(config.optimizer, config.train.lengths))


def print_summary(config: Config, summary: dict[str, Any]) -> None:
    """Print the losses of a finished run and what else its summary says."""
    # Summaries of earlier versions lack what is asked for with `get`, and their speed is that of the last interval.
    rate, median = summary["tokens_per_second"], summary.get("tokens_per_second_median")
    speed = "not measured" if rate is None else f"{rate:,.0f}"
    if median is not None:
        speed += f" over the run, {median:,.0f} in the median interval"
    facts = {
        "tokens per second": speed,
        "experts in use": f"{summary['experts_used']} of {summary['experts_total']}",
        "busiest expert over mean load": f"{summary['busiest_over_mean']:.2f}",
    }
    if (mfu := summary.get("mfu")) is not None:
        facts["model FLOPs utilization"] = f"{mfu:.1%}"
    if skipped := summary.get("skipped_steps"):
        facts["steps skipped (train.nonfinite=skip)"] = f"{skipped:,}"
    if dropped := summary.get("overflow"):
        facts["rows dropped (mesh.overflow=drop)"] = f"{dropped:,}"
    title = f"{config.scale_name} {config.method_name} after {summary['step']} steps, {summary['tokens']:,} tokens"
    print_results(summary["results"], summary["unigram"], facts, title)
