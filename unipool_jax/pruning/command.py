"""`unipool prune`: reads a run and its text, prunes, measures, and writes the new run with a report."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from unipool_jax.config.compose import Choices
from unipool_jax.config.rules import validate
from unipool_jax.config.schema import Config, ConfigError, MeshConfig
from unipool_jax.convert.calibration import HeldOut, calibration_windows, inherited, passes
from unipool_jax.convert.inheritance import origin_of
from unipool_jax.convert.runs import check_new, read_locked, read_run, write_run
from unipool_jax.data.corpus import open_corpus
from unipool_jax.kernels.implementations import platform_problem
from unipool_jax.parallel.accelerators import check_platforms
from unipool_jax.pruning.locked import locked_config, pruned_record
from unipool_jax.pruning.prune import prune
from unipool_jax.pruning.report import REPORT, Measured, print_report, report_of, write_report_page
from unipool_jax.pruning.requests import PruneRequest
from unipool_jax.pruning.target import pruned_config
from unipool_jax.training.metrics import plain_json


def prune_command(request: PruneRequest) -> int:
    """Make a smaller run of a run.

    Raises:
      ConfigError, RunError, CheckpointError, ConversionError, DataError: with what to do about it.
    """
    folder = Path(request.out)
    check_new(folder)
    choices, locked = request.config or Choices(()), read_locked(request.run, request.step)
    if locked is None:
        (config, weights), lock = read_run(request.run, request.step), None
        target = pruned_config(config, choices)
    else:
        config, weights, lock = locked
        target = locked_config(config, choices)
    origin = origin_of(request.run, request.step)
    validate(dataclasses.replace(target, mode="describe"))
    check_platforms()
    if problem := platform_problem(target.kernels.implementation):
        raise ConfigError([problem])
    corpus = open_corpus(target.data, target.model.vocab_size)
    kept = inherited(origin, config, target, corpus, "prune")

    source, alone = (_alone(c if lock is None else c.after_lock(), target) for c in (config, target))
    windows = calibration_windows(source, corpus, request.tokens, request.seed)
    found = prune(source, weights, alone, list(passes(windows)), request, lock)
    target, alone = (with_full_layers(config, c, found.choice.layers) for c in (target, alone))
    validate(dataclasses.replace(target, mode="describe"))
    before, after = HeldOut(source, corpus), HeldOut(alone, corpus)
    losses = None
    if before.split is not None:
        losses = Measured(before.split, before.result(weights), after.result(found.weights))
    report = plain_json(report_of(source, alone, request, found, losses, len(windows) * windows.sequence_length))
    print_report(report)
    record = None if lock is None else pruned_record(lock, target, found.choice.layers)
    count = write_run(folder, target, found.weights, kept, {REPORT: report}, record)
    page = write_report_page(folder, request, report)
    print(f"{folder}: {count} experts, at step 0; {REPORT} has every choice, {page} shows them")
    return 0


def _alone(config: Config, target: Config) -> Config:
    """`config` on one device, with the text of `target`."""
    return dataclasses.replace(config, data=target.data, mesh=MeshConfig(data=1))


def with_full_layers(source: Config, target: Config, layers: tuple[int, ...]) -> Config:
    """`target` with each layer's kind of attention that of the layer of the source that it is."""
    if source.attention.kind != "alternating" or len(layers) == source.model.num_layers:
        return target
    full = tuple(place for place, layer in enumerate(layers) if source.sees_all[layer])
    return dataclasses.replace(target, attention=dataclasses.replace(target.attention, full_layers=full))
