"""Metrics and a figure of which layer owns which expert (method M6.11)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from unipool_jax.config.lock_schedule import make_schedule
from unipool_jax.config.schema import Config
from unipool_jax.moe.assignment import coverage, expert_ids
from unipool_jax.moe.lock_lifecycle import LockRecord, Partition, off_mask_routes


def ownership_metrics(
    config: Config,
    before: LockRecord,
    after: LockRecord,
    step: int,
    loss: float,
    counts_LM: np.ndarray,
    unfaded_LM: np.ndarray,
) -> dict[str, Any]:
    """Metrics of the lock at the evaluation after `step` steps.

    `lock/stage` (0 shared, 1 fading, 2 locked), `lock/final_locked`, `lock/sum_k` (experts visible to a layer, summed
    over layers), `lock/union_size` (their union), `lock/layer_k` `[L]`, `lock/ownership_violations` (experts of a
    partition without exactly one owner), `lock/dead_in_mask` (visible to a layer and not used by it),
    `lock/off_mask_routes`, `lock/routed_effective_k_{min,mean,max}` (exp of the entropy of a layer's counts),
    `lock/layer_coverage` `[L]` (fraction of the counts on own experts; null without a partition),
    `lock/natural_candidate_coverage_min` (its minimum without fading), `lock/effective_candidate_coverage_min`
    (with fading), `lock/assignment` (its status), `lock/fade` and `lock/entropy_coefficient` of the last update,
    `lock/next_*` of the next one, `lock/entropy_target`, `lock/installed_*` (stage, sum_k and union_size after this
    evaluation), `lock/reference_loss`, `lock/loss_excess`, `lock/excess_in_a_row`.

    Args:
      config: of the run.
      before: record at the time of the evaluation.
      after: the record that `observe` returned.
      step: completed steps.
      loss: validation loss, nats.
      counts_LM: routing counts per layer and expert of the pool.
      unfaded_LM: the same without fading.
    """
    layers = config.mixture_layers
    reach_LM = _reach(before)
    partition = after.lock or after.candidate
    violations = 0
    if partition is not None:
        owners = np.array(partition.owner)
        violations = int(((owners < 0) | (owners >= layers)).sum())
    share_LM = counts_LM / np.maximum(counts_LM.sum(axis=1, keepdims=True), 1)
    effective_L = np.exp(-(share_LM * np.log(np.maximum(share_LM, 1e-12))).sum(axis=1))
    natural = None if partition is None else coverage(unfaded_LM, np.array(partition.owner))
    effective = None if partition is None else coverage(counts_LM, np.array(partition.owner))
    excess = None if before.reference_loss is None else loss - before.reference_loss
    schedule, from_start = make_schedule(config), config.lock.ownership == "random_from_start"

    def controls(at: int, record: LockRecord) -> dict[str, float]:
        fades = record.lock is None and not from_start
        risen = config.lock.entropy_coefficient * min(max(at, 0) / schedule.warmup, 1.0)
        return {"fade": schedule.fade(at) if fades else 0.0, "entropy_coefficient": risen}

    return {
        "lock/stage": before.stage,
        "lock/final_locked": before.lock is not None,
        "lock/sum_k": int(reach_LM.sum()),
        "lock/union_size": int(reach_LM.any(axis=0).sum()),
        "lock/layer_k": reach_LM.sum(axis=1).tolist(),
        "lock/ownership_violations": violations,
        "lock/dead_in_mask": int((reach_LM & (counts_LM == 0)).sum()),
        "lock/off_mask_routes": off_mask_routes(before, counts_LM),
        "lock/routed_effective_k_min": float(effective_L.min()),
        "lock/routed_effective_k_mean": float(effective_L.mean()),
        "lock/routed_effective_k_max": float(effective_L.max()),
        "lock/layer_coverage": None if effective is None else effective.tolist(),
        "lock/natural_candidate_coverage_min": None if natural is None else float(natural.min()),
        "lock/effective_candidate_coverage_min": None if effective is None else float(effective.min()),
        "lock/assignment": None if partition is None else partition.status,
        **{f"lock/{name}": value for name, value in controls(step - 1, before).items()},
        **{f"lock/next_{name}": value for name, value in controls(step, after).items()},
        "lock/entropy_target": config.lock.entropy_target,
        "lock/installed_stage": after.stage,
        "lock/installed_sum_k": int(_reach(after).sum()),
        "lock/installed_union_size": int(_reach(after).any(axis=0).sum()),
        "lock/reference_loss": after.reference_loss,
        "lock/loss_excess": excess,
        "lock/excess_in_a_row": after.excess,
    }


def _reach(record: LockRecord) -> np.ndarray:
    """Which experts each layer can route to, bool `[L, M]`: all of them before the lock."""
    if record.lock is None:
        return np.ones((record.layers, record.experts), bool)
    return np.array(record.lock.owner) == np.arange(record.layers)[:, None]


def draw_ownership_map(path: Path, title: str, counts_LM: np.ndarray, partition: Partition, first: int = 0) -> None:
    """Draw the ownership map: one row per layer, experts sorted by owner, colour is the fraction of routed tokens.

    Args:
      path: of the PNG file; its folder is created.
      title: of the figure.
      counts_LM: routing counts per layer and expert of the pool, without fading.
      partition: outlined in the figure.
      first: number of the first layer that has experts.
    """
    # Imported here because only runs with a lock draw, and the import takes half a second.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.patches import Rectangle

    layers, experts = counts_LM.shape
    ids_LK = expert_ids(np.array(partition.owner), layers)
    per_layer = ids_LK.shape[1]
    share_LM = counts_LM / np.maximum(counts_LM.sum(axis=1, keepdims=True), 1)
    covered_L = coverage(counts_LM, np.array(partition.owner))

    figure = Figure(figsize=(min(4.5 + experts / 10, 24), min(3 + layers / 4, 14)), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    image = axes.imshow(share_LM[:, ids_LK.ravel()], aspect="auto", cmap="magma_r", vmin=0.0, interpolation="nearest")
    for layer in range(layers):
        corner = (layer * per_layer - 0.5, layer - 0.5)
        axes.add_patch(Rectangle(corner, per_layer, 1, fill=False, edgecolor="tab:blue", linewidth=1.2))
    names = [str(first + layer) for layer in range(layers)]
    shown = [f"{name} ({share:.0%})" for name, share in zip(names, covered_L, strict=True)]
    axes.set_yticks(range(layers), shown, fontsize=7)
    if experts <= 64:
        axes.set_xticks(range(experts), [str(expert) for expert in ids_LK.ravel()], fontsize=6, rotation=90)
    else:
        axes.set_xticks(np.arange(layers) * per_layer + (per_layer - 1) / 2, names)
    axes.set_xlabel("expert, by owner" if experts <= 64 else "owner of the experts")
    axes.set_ylabel("layer (tokens on own experts)")
    axes.set_title(title, fontsize=10)
    figure.colorbar(image, ax=axes, label="share of tokens")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)
