"""`unipool convert merge`: reads a run and its text, merges, measures, and writes the new run with a report."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from unipool_jax.config.compose import Choices
from unipool_jax.config.rules import validate
from unipool_jax.config.schema import Config, ConfigError, MeshConfig
from unipool_jax.convert.calibration import HeldOut, calibration_windows, inherited, passes
from unipool_jax.convert.inheritance import origin_of
from unipool_jax.convert.joining import Banks, banks_of, joins, merged_config
from unipool_jax.convert.merge import Merged, merge
from unipool_jax.convert.requests import MergeRequest
from unipool_jax.convert.runs import check_new, read_run, write_run
from unipool_jax.convert.weights import Weights
from unipool_jax.data.corpus import Corpus, open_corpus
from unipool_jax.kernels.implementations import platform_problem
from unipool_jax.parallel.accelerators import check_platforms
from unipool_jax.training.metrics import plain_json

REPORT = "merge.json"
"""In the folder of a merged run."""


def merge_command(request: MergeRequest) -> int:
    """Make a run with fewer experts of a run.

    Raises:
      ConfigError, RunError, CheckpointError, ConversionError, DataError: with what to do about it.
    """
    folder = Path(request.out)
    check_new(folder)
    config, weights = read_run(request.run, request.step)
    origin = origin_of(request.run, request.step)
    banks = banks_of(config, "the source")
    target = merged_config(config, request.config or Choices(()))
    validate(dataclasses.replace(target, mode="describe"))
    joins(config, target)
    check_platforms()
    if problem := platform_problem(target.kernels.implementation):
        raise ConfigError([problem])
    corpus = open_corpus(target.data, target.model.vocab_size)
    kept = inherited(origin, config, target, corpus, "merge")

    source, alone = (dataclasses.replace(c, data=target.data, mesh=MeshConfig(data=1)) for c in (config, target))
    windows = calibration_windows(source, corpus, request.tokens, request.seed)
    merged = merge(source, weights, alone, passes(windows), request)
    losses = _losses(source, alone, weights, merged, corpus)
    facts = {
        "matching": request.matching,
        "prefit_steps": request.prefit,
        "prefit_rate": request.prefit_rate,
        "tokens": len(windows) * windows.sequence_length,
        "rows": request.rows,
        "seed": request.seed,
        "experts": {"source": config.total_experts, "merged": target.total_experts},
        "loss": losses,
        "banks": _by_bank(banks, merged, config.moe.dense_layers),
    }
    report = plain_json(facts)
    _print(report)
    count = write_run(folder, target, merged.fitted or merged.matched, kept, {REPORT: report})
    print(f"{folder}: {count} experts instead of {config.total_experts}, at step 0; {REPORT} has the errors of each")
    return 0


def _losses(
    config: Config, target: Config, weights: Weights, merged: Merged, corpus: Corpus
) -> dict[str, str | int | float | None] | None:
    """Held-out losses of the source and the merged model, as long as an evaluation in training; None without text."""
    before, after = HeldOut(config, corpus), HeldOut(target, corpus)
    if before.split is None:
        return None
    source = before.result(weights)
    return {
        "split": before.split,
        "tokens": source.tokens,
        "source": source.loss,
        "merged": after.result(merged.matched).loss,
        "prefit": None if merged.fitted is None else after.result(merged.fitted).loss,
    }


def _by_bank(banks: Banks, merged: Merged, first: int) -> list[dict[str, Any]]:
    """The errors of a report; `first` is the number of the first layer that has experts."""
    return [
        {
            "layers": [first + layer for layer in banks.layers(bank)],
            "experts_of_layers": [first + layer for layer in banks.layers(kept)],
            "error": {name: errors.of_layers(values) for name, values in errors.kinds().items()},
            "experts": [
                {"expert": expert, "becomes": errors.place_E[expert], "inputs": errors.inputs_E[expert]}
                | {name: values[expert] for name, values in errors.kinds().items()}
                for expert in range(len(errors.place_E))
            ],
        }
        for (bank, kept), errors in merged.errors.items()
    ]


def _print(report: Mapping[str, Any]) -> None:
    """Print errors by bank, and losses."""
    kinds = [kind for kind in ("identity", "merged", "prefit") if kind != "prefit" or report["prefit_steps"]]
    table = Table()
    for name in ("layers", "experts of layers", *kinds):
        table.add_column(name, justify="right")
    for bank in report["banks"]:
        # Experts that are kept as they are have no errors.
        if bank["layers"] != bank["experts_of_layers"] or report["prefit_steps"]:
            errors = ("-" if (value := bank["error"][kind]) is None else f"{value:.4f}" for kind in kinds)
            table.add_row(*(" ".join(map(str, bank[name])) for name in ("layers", "experts_of_layers")), *errors)
    console = Console(width=None if Console().is_terminal else 100)
    console.print(f"matching={report['matching']}; squared error of experts' outputs over their square, held out:")
    console.print(table)
    if (loss := report["loss"]) is not None:
        shown = [f"{name} {loss[name]:.4f}" for name in ("source", "merged", "prefit") if loss[name] is not None]
        console.print(f"loss on {loss['split']} (nats per token): {', '.join(shown)}", highlight=False)
