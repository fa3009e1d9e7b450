"""Comparison of runs: groups of runs that differ only in their seed, and differences paired by seed.

A pair is two runs of different groups with the same seed, and therefore the same batches and evaluation text.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from unipool_jax.analysis.figures import Series
from unipool_jax.analysis.history import read_history, series_of
from unipool_jax.analysis.paired import Paired, paired
from unipool_jax.analysis.probe import Difference
from unipool_jax.config.compose import load_config
from unipool_jax.config.schema import Config, settings
from unipool_jax.config.settings_table import TABLE, frozen_differences, measured_settings
from unipool_jax.data.identity import text_differences
from unipool_jax.training.run_folder import CONFIG, SUMMARY, RunError, find_run, read_summary

LATE = 0.6
"""Late training begins after this fraction of the steps (method M10.13: the final gap is less steady)."""

_NAMES = {"scale_name", "method_name"}
"""Change no number, but a run of another name is another experiment."""


@dataclass(frozen=True)
class Run:
    """A finished run, from its files."""

    folder: Path
    config: Config
    summary: dict[str, Any]
    history: list[dict[str, Any]]

    @property
    def seed(self) -> int:
        """Seed of weights and batches."""
        return self.config.train.seed

    @property
    def loss(self) -> float:
        """Validation loss at the end, nats per token."""
        return float(self.summary["results"]["valid"]["loss"])

    @property
    def zero_gates(self) -> float | None:
        """Share of tokens without an expert at the last evaluation, mean over layers; None in an older run."""
        lines = [line for line in self.history if line.get("kind") == "valid" and line.get("routing/zero_gates")]
        return float(np.mean(lines[-1]["routing/zero_gates"])) if lines else None


@dataclass(frozen=True)
class Group:
    """Runs that differ only in their seed."""

    name: str
    runs: dict[int, Run]
    """By seed."""

    @property
    def config(self) -> Config:
        """The settings, with the seed of the first run."""
        return next(iter(self.runs.values())).config

    def series(self, kind: str, name: str, seeds: Sequence[int] | None = None) -> Series | None:
        """A metric over the steps at which all runs (of these seeds) have it; None if there are none."""
        wanted = list(self.runs) if seeds is None else seeds
        found = [series_of(self.runs[seed].history, kind, name) for seed in wanted]
        lines = [dict(zip(s.x.tolist(), s.y[0].tolist(), strict=True)) for s in found if s is not None]
        if not lines or len(lines) < len(wanted):
            return None
        steps = sorted(set.intersection(*(set(line) for line in lines)))
        return Series(np.array(steps), np.array([[line[step] for step in steps] for line in lines])) if steps else None


@dataclass(frozen=True)
class Row:
    """One line of the table."""

    group: Group
    loss: Difference
    """Mean final validation loss over seeds, with its standard error."""
    baseline: Group | None
    """The group it is compared with (see `counterpart`); None for a baseline."""
    difference: Paired | None
    """Of the final validation loss to the baseline, paired by seed; None for a baseline and without common seeds."""
    late: Paired | None
    """The same for the mean loss of the evaluations of late training; None with fewer than two of them."""


def load_run(folder: str) -> Run:
    """Read a run folder; its checkpoints are not needed.

    Raises:
      RunError: no such run, or it has not finished.
    """
    path = find_run(folder)
    if not (path / SUMMARY).exists():
        raise RunError(f"{path}: no {SUMMARY}, so the run has not finished; finish it, or omit it")
    return Run(path, load_config(path / CONFIG), read_summary(path), read_history(path))


def check_slices(runs: Sequence[Run]) -> None:
    """Reject runs that did not read the same text, or were not evaluated on the same part of it.

    Text is compared by fingerprint. Where a run of an earlier version has none, paths and counts of tokens must be
    equal, which cannot tell files that were edited in place.

    Raises:
      RunError: lists what differs.
    """
    first, problems = runs[0], []
    for run in runs[1:]:
        known = "text" in first.summary and "text" in run.summary
        before, now = _slice(first.config, places=not known), _slice(run.config, places=not known)
        found = [
            f"{name}: {before.get(name)!r} in {first.folder}, {now.get(name)!r} in {run.folder}"
            for name in before | now
            if before.get(name) != now.get(name)
        ]
        if known:
            texts = text_differences(first.summary["text"], run.summary["text"])
            found += [f"{line} ({first.folder}, {run.folder})" for line in texts]
        ours, theirs = (each.summary["results"]["valid"] for each in (first, run))
        fixed = first.config.train.eval_slice == "fixed"
        if not found and fixed and ours["tokens"] != theirs["tokens"]:
            found.append(
                f"{ours['tokens']} valid tokens in {first.folder}, {theirs['tokens']} in {run.folder}: the files differ"
            )
        if not found and fixed and known and ours.get("text") != theirs.get("text"):
            found.append(f"valid text: {ours.get('text')} in {first.folder}, {theirs.get('text')} in {run.folder}")
        problems += [f"  - {line}" for line in found]
    if problems:
        lines = "\n".join(problems)
        raise RunError(f"runs evaluated on different text cannot be compared:\n{lines}\nCompare them separately.")


def _slice(config: Config, *, places: bool) -> dict[str, Any]:
    """The settings that determine the validation text, with or without where it lies."""
    values, train = settings(config), config.train
    names = [name for name, effect in TABLE.items() if effect.place and places] + measured_settings(config)
    found = {name: values[name] for name in names if name != "train.eval_batches"}
    found["train.eval_batches x train.batch_size"] = (
        None if train.eval_batches is None else train.eval_batches * train.batch_size
    )
    if train.eval_slice == "moving":
        found["train.steps"] = train.steps
    return found


def grouped(runs: Sequence[Run]) -> list[Group]:
    """Runs grouped by their settings, in the given order.

    Raises:
      RunError: two runs have the same settings and seed.
    """
    found: list[dict[int, Run]] = []
    for run in runs:
        for members in found:
            if not _apart(next(iter(members.values())).config, run.config):
                if run.seed in members:
                    raise RunError(
                        f"{members[run.seed].folder} and {run.folder}: same settings and train.seed={run.seed}; "
                        "omit one of them"
                    )
                members[run.seed] = run
                break
        else:
            found.append({run.seed: run})
    configs = [next(iter(members.values())).config for members in found]
    names = [_name(config, configs) for config in configs]
    return [Group(name, members) for name, members in zip(names, found, strict=True)]


def _apart(a: Config, b: Config) -> set[str]:
    """Settings that make two runs of the same text different experiments; the seed does not."""
    ours, theirs = settings(a), settings(b)
    names = {name for name in _NAMES if ours[name] != theirs[name]}
    return {*frozen_differences(a, b, places=False), *names} - {"train.seed"}


def _name(config: Config, configs: Sequence[Config]) -> str:
    """The method, with the settings that are unusual among its groups, and with the scale if there are several.

    The usual value of a setting is that of most groups; without a single most common value, each group shows its own.
    """
    name = config.method_name
    if len({other.scale_name for other in configs}) > 1:
        name = f"{config.scale_name} {name}"
    kin = [o for o in configs if (o.scale_name, o.method_name) == (config.scale_name, config.method_name)]
    varying = {setting for other in kin for setting in _apart(config, other)}
    for setting in (setting for setting in settings(config) if setting in varying):
        first, *rest = Counter(settings(other)[setting] for other in kin).most_common()
        value = settings(config)[setting]
        if value != first[0] or (rest and rest[0][1] == first[1]):
            name += f" {setting.split('.')[-1]}={_short(value)}"
    return name


def _short(value: Any) -> str:
    if value is None:
        return "null"
    return f"{value:g}" if isinstance(value, float) else str(value)


def common_name(groups: Sequence[Group]) -> str:
    """The words that the names of all groups share."""
    first, *rest = (group.name.split() for group in groups)
    return " ".join(word for word in first if all(word in words for words in rest))


def mean_and_error(values: Sequence[float]) -> Difference:
    """Mean and standard error `s / sqrt(n)`, with the sample standard deviation s; no error for a single value."""
    count = len(values)
    mean = float(np.mean(values))
    return Difference(mean, float(np.std(values, ddof=1)) / math.sqrt(count) if count > 1 else None)


def paired_series(group: Group, baseline: Group, kind: str = "valid", name: str = "loss") -> Series | None:
    """A metric of `group` minus that of `baseline`, per seed, at the steps at which both have it; None without any."""
    seeds = [seed for seed in group.runs if seed in baseline.runs]
    ours, theirs = group.series(kind, name, seeds), baseline.series(kind, name, seeds)
    if not seeds or ours is None or theirs is None:
        return None
    steps, mine, other = np.intersect1d(ours.x, theirs.x, return_indices=True)
    return Series(steps, ours.y[:, mine] - theirs.y[:, other]) if len(steps) else None


def counterpart(group: Group, groups: Sequence[Group], baseline: Group) -> Group:
    """The group of the baseline's method with the scale and granularity of `group`, or at least its scale.

    A comparison can thus hold several scales, and fine and coarse experts, each with its own baseline.
    """
    kin = [other for other in groups if other.config.method_name == baseline.config.method_name]
    wanted = group.config
    same_scale = [other for other in kin if other.config.scale_name == wanted.scale_name]
    same_grain = [
        other
        for other in same_scale
        if (other.config.moe.experts_per_layer, other.config.moe.top_k)
        == (wanted.moe.experts_per_layer, wanted.moe.top_k)
    ]
    for candidates in (same_grain, same_scale):
        if candidates:
            return baseline if baseline in candidates else candidates[0]
    return baseline


def compare(groups: Sequence[Group], baseline: Group) -> list[Row]:
    """One row per group, paired with its `counterpart` if they share seeds."""
    rows = []
    for group in groups:
        loss = mean_and_error([run.loss for run in group.runs.values()])
        other = counterpart(group, groups, baseline)
        seeds = [seed for seed in group.runs if seed in other.runs]
        if group is baseline or group is other or not seeds:
            rows.append(Row(group, loss, None if group in (baseline, other) else other, None, None))
            continue
        difference = paired([group.runs[seed].loss - other.runs[seed].loss for seed in seeds])
        series, late = paired_series(group, other), None
        if series is not None:
            last = min(group.config.train.steps, other.config.train.steps)
            rest = series.y[:, series.x > LATE * last]
            late = paired(rest.mean(axis=1).tolist()) if rest.shape[1] > 1 else None
        rows.append(Row(group, loss, other, difference, late))
    return rows


def families(groups: Sequence[Group], free: set[str]) -> list[list[Group]]:
    """Sets of groups that differ only in the settings `free`."""
    found: list[list[Group]] = []
    for group in groups:
        for members in found:
            if not _apart(members[0].config, group.config) - free:
                members.append(group)
                break
        else:
            found.append([group])
    return found
