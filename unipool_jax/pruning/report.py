"""The report of a pruning: every choice as JSON, as a table of the terminal, and as a page."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from unipool_jax.analysis.page import Part, Table, write_page
from unipool_jax.config.schema import Config, settings
from unipool_jax.config.words import to_words
from unipool_jax.model.report import count_parameters
from unipool_jax.moe.routing import score_constant
from unipool_jax.pruning.prune import Pruned
from unipool_jax.pruning.requests import PruneRequest
from unipool_jax.training.evaluate import EvalResult

REPORT = "prune.json"
"""In the folder of a pruned run."""

_SIZES = (
    *("model.num_layers", "model.hidden_size", "model.num_heads", "model.num_kv_heads", "model.ffn_size"),
    *("pool.groups", "pool.experts"),
)


class Measured(NamedTuple):
    """Evaluations on held-out text."""

    split: str
    source: EvalResult
    pruned: EvalResult


def report_of(
    source: Config, target: Config, request: PruneRequest, found: Pruned, losses: Measured | None, tokens: int
) -> dict[str, Any]:
    """Every choice, with what it was based on; see docs/depth.md for the fields."""
    choice, scores = found.choice, found.scores
    return {
        "importance": request.importance,
        "layers_by": request.layers if request.importance == "text" else request.importance,
        "merge_attention": request.merge_attention,
        "gains": request.gains,
        "adopt": request.adopt,
        "tokens": tokens,
        "seed": request.seed,
        "sizes": {name: {"source": before, "pruned": after} for name, before, after in _sizes(source, target)},
        "parameters": {"source": count_parameters(source), "pruned": count_parameters(target)},
        "router_constant": {"source": _constant(source), "pruned": _constant(target)},
        "loss": None if losses is None else _losses(losses),
        "layers": {
            "kept": choice.layers,
            "scores": scores.layers_L,
            "removals": [
                {
                    "removed": step.layers,
                    "harm": [{"layers": layers, "harm": harm} for layers, harm in step.harms.items()],
                }
                for step in found.removals
            ],
        },
        "channels": {"kept": choice.channels_D, "score_kept": _share(scores.channels_D, choice.channels_D)},
        "attention": [
            {
                "layer": layer,
                "groups": [{"layer": group.layer, "group": group.place} for group in groups],
                "scores": [scores.groups_LG[group] for group in groups],
            }
            for layer, groups in zip(choice.layers, choice.groups, strict=True)
        ],
        "blocks": [
            None if block is None else {"layer": layer, "neurons": block}
            for layer, block in zip(choice.layers, choice.blocks, strict=True)
        ],
        "pools": _pools(source, found),
        "orphans": _orphans(source, found, losses),
    }


def _sizes(source: Config, target: Config) -> list[tuple[str, Any, Any]]:
    before, after = (settings(config) | {"pool.experts": config.total_experts} for config in (source, target))
    return [(name, before[name], after[name]) for name in _SIZES]


def _constant(config: Config) -> float | None:
    """NormRouter's constant, which depends on the number of experts; None for other routers and for windows."""
    moe = config.moe
    if moe.router != "norm" or config.windows is not None:
        return None
    return score_constant(moe.router, moe.score_constant, config.router_width, moe.top_k)


def _losses(measured: Measured) -> dict[str, Any]:
    return {
        "split": measured.split,
        "tokens": measured.source.tokens,
        "source": measured.source.loss,
        "pruned": measured.pruned.loss,
    }


def _share(scores: np.ndarray, kept: np.ndarray) -> float | None:
    total = float(scores.sum())
    return float(scores[kept].sum()) / total if total else None


def _pools(source: Config, found: Pruned) -> list[dict[str, Any]]:
    size, rows = source.layers_per_pool, []
    for pool, experts_E, neurons_EF in zip(found.choice.pools, found.choice.experts, found.choice.neurons, strict=True):
        score_E = np.sum(found.scores.experts[pool * size :][:size], axis=0)
        tokens_E = np.sum(found.scores.traffic[pool * size :][:size], axis=0)
        dropped_E = np.setdiff1d(np.arange(len(score_E)), experts_E)
        rows.append(
            {
                "pool": pool,
                "kept": experts_E,
                "dropped": dropped_E,
                "scores": score_E,
                "tokens": tokens_E,
                "tokens_of_dropped": float(tokens_E[dropped_E].sum() / max(tokens_E.sum(), 1)),
                "neurons": neurons_EF,
            }
        )
    return rows


def _orphans(source: Config, found: Pruned, losses: Measured | None) -> list[dict[str, Any]]:
    """Orphans, with the share of held-out choices that they have in the pruned model."""
    choice, rows = found.choice, []
    for orphan in found.orphans:
        row: dict[str, Any] = orphan._asdict() | {"share_of_choices_after": None}
        if losses is not None:
            place = choice.pools.index(orphan.pool)
            counts_LE = losses.pruned.counts_LE.reshape(len(choice.pools), -1, losses.pruned.counts_LE.shape[-1])[place]
            column = int(np.searchsorted(choice.experts[place], orphan.expert))
            row["share_of_choices_after"] = float(counts_LE[:, column].sum() / counts_LE.sum())
        rows.append(row)
    return rows


def print_report(report: Mapping[str, Any]) -> None:
    """Print sizes, layers, orphans and losses."""
    for name, size in report["sizes"].items():
        if size["source"] != size["pruned"]:
            print(f"{name}: {size['source']} -> {size['pruned']}")
    before, after = (report["parameters"][name]["total"] for name in ("source", "pruned"))
    print(f"parameters: {before:,} -> {after:,} ({after / before:.1%})")
    for step in report["layers"]["removals"]:
        print(f"removed layer {' '.join(map(str, step['removed']))}")
    if report["orphans"]:
        names = ", ".join(f"{row['expert']} (layer {row['giver']} to {row['taker']})" for row in report["orphans"])
        verb = "handed over" if report["adopt"] else "left alone"
        print(f"experts used almost only by removed layers, {verb}: {names}")
    if (loss := report["loss"]) is not None:
        print(f"loss on {loss['split']} (nats per token): source {loss['source']:.4f}, pruned {loss['pruned']:.4f}")


def write_report_page(folder: Path, request: PruneRequest, report: Mapping[str, Any]) -> Path:
    """Write the page of a report to `prune/report.html` of the new run."""
    before, after = (report["parameters"][name]["total"] for name in ("source", "pruned"))
    facts = {"parameters of the source": f"{before:,}", "parameters now": f"{after:,}"}
    if (loss := report["loss"]) is not None:
        facts |= {f"loss of the source, {loss['split']}": f"{loss['source']:.4f}", "loss now": f"{loss['pruned']:.4f}"}
    subtitle = f"{request.run}, importance={report['importance']}, {report['tokens']:,} tokens of text"
    parts = [_size_part(report), _layer_part(report), _attention_part(report)]
    parts += [_pool_part(report), _orphan_part(report)]
    words = request.config.words if request.config is not None else ()
    return write_page(
        folder / "prune",
        f"What was pruned: {folder.name}",
        subtitle,
        facts,
        [part for part in parts if part is not None],
        f"unipool prune {' '.join([*to_words(dataclasses.replace(request, config=None)), *words])}",
    )


def _size_part(report: Mapping[str, Any]) -> Part:
    rows = [(name, f"{size['source']}", f"{size['pruned']}") for name, size in report["sizes"].items()]
    words = [f"Gains of norms: {report['gains']}."]
    if report["channels"]["score_kept"] is not None:
        words.append(f"The channels that stay had {report['channels']['score_kept']:.1%} of the score of all.")
    constant = report["router_constant"]
    if constant["source"] is not None and constant["source"] != constant["pruned"]:
        words.append(f"NormRouter's constant: {constant['source']:.4f} before, {constant['pruned']:.4f} now.")
    return Part("Sizes", words, table=Table(("setting", "source", "pruned"), rows))


def _layer_part(report: Mapping[str, Any]) -> Part | None:
    removals = report["layers"]["removals"]
    if not removals:
        return None
    rows = [
        (
            " ".join(map(str, step["removed"])),
            *(f"{value['harm']:.4f}" for value in sorted(step["harm"], key=lambda value: value["harm"])[:3]),
        )
        for step in removals
    ]
    rows = [(*row, *[""] * (4 - len(row))) for row in rows]
    words = [
        f"One after the other, by {report['layers_by']}: the candidate with the smallest harm goes.",
        f"Layers that stay: {', '.join(map(str, report['layers']['kept']))}.",
    ]
    return Part("Layers", words, table=Table(("removed", "its harm", "next", "next"), rows))


def _attention_part(report: Mapping[str, Any]) -> Part:
    rows = [
        (str(entry["layer"]), ", ".join(f"{group['layer']}.{group['group']}" for group in entry["groups"]))
        for entry in report["attention"]
    ]
    words = ["Key-value groups in each layer that stays, as layer.group of the source."]
    if report["merge_attention"]:
        words.append("Groups of removed layers competed with those of the layer below (CLAP, reconstructed).")
    return Part("Attention", words, table=Table(("layer", "groups"), rows))


def _pool_part(report: Mapping[str, Any]) -> Part | None:
    rows = [
        (str(pool["pool"]), str(len(pool["kept"])), ", ".join(map(str, pool["dropped"])) or "none",
         f"{pool['tokens_of_dropped']:.2%}")
        for pool in report["pools"]
    ]  # fmt: skip
    if all(not pool["dropped"] for pool in report["pools"]):
        return None
    words = ["Experts by what they add to their layers: gate times the norm of their output, over all layers."]
    return Part("Experts", words, table=Table(("pool", "kept", "dropped", "tokens of the dropped"), rows))


def _orphan_part(report: Mapping[str, Any]) -> Part | None:
    if not report["orphans"]:
        return None

    def after(row: Mapping[str, Any]) -> str:
        return "-" if (value := row["share_of_choices_after"]) is None else f"{value:.3%}"

    rows = [
        (f"{row['pool']}.{row['expert']}", f"{row['share']:.1%}", str(row["giver"]), str(row["taker"]), after(row))
        for row in report["orphans"]
    ]
    words = ["Experts of which removed layers had 90% of the tokens or more."]
    if report["adopt"]:
        words.append("The layer in the fourth column got the router row of the layer in the third.")
    return Part("Orphans", words, table=Table(("expert", "from removed", "used by", "handed to", "choices now"), rows))
