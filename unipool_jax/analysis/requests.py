"""Settings of the commands that look inside runs: `analyse` and `compare`."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated

from unipool_jax.config.ranges import Range
from unipool_jax.config.words import Accepts, Overrides, Positional
from unipool_jax.data.splits import SplitName
from unipool_jax.evaluation.requests import SEED, STEP, TaskRequest


@dataclass(frozen=True)
class AnalysisRequest:
    """Every routing analysis of one checkpoint, as JSON, figures and a page to read.

    Loss and routing are measured on one split; with tasks, the randomisation probe measures them too.

        unipool analyse                                the newest checkpoint of the run saved to last
        unipool analyse runs/demo expert_parallel=4    load of four devices that share the experts
        unipool analyse runs/demo step=160 split=test out=pages/demo draws=3
        unipool analyse runs/demo tasks_path=tasks/olmo tasks=[olmo_piqa] limit=200    the probe on tasks too
    """

    run: Annotated[str, Positional()] = "latest"
    """Folder of a run, or `latest`, the run below runs/ that was saved to last."""
    step: Annotated[int | None, STEP] = None
    """Which checkpoint of the run; null is the newest."""
    out: str | None = None
    """Folder for the results; by default analysis/STEP in the run folder."""
    split: SplitName = "valid"
    """The text: as much of this split as evaluation during training reads (train.eval_batches)."""
    expert_parallel: Annotated[int | None, Range(1, 1_048_576)] = None
    """Devices that share the experts, for device load; null is 8, or the largest divisor of the experts of a pool
    below it."""
    draws: Annotated[int, Range(0, 1000)] = 1
    """Random draws of the randomization probe; 0 leaves it out."""
    seed: Annotated[int, SEED] = 0
    """Of the probe."""
    tasks: TaskRequest | None = None
    overrides: Annotated[Overrides, Accepts("data.", "kernels.", "train.eval_batches", "train.eval_batch_size")] = ()
    """Settings that replace those of the checkpoint."""

    def problems(self) -> Iterator[str]:
        """What does not go together."""
        if self.tasks is not None:
            yield from self.tasks.problems()
            if self.tasks.num_fewshot:
                yield f"num_fewshot={self.tasks.num_fewshot}: the probe asks without examples; leave it out"
            if self.draws == 0:
                yield "draws=0: leaves the probe out, the only analysis that uses tasks; leave tasks out too"


@dataclass(frozen=True)
class CompareRequest:
    """Compare finished runs side by side, differences paired by seed, as a table, figures and a page.

    Runs that differ in nothing but the seed form a group, named after its method and the settings in which it differs
    from most groups of that method; baseline takes such a name.

        unipool compare runs/vanilla-1 runs/vanilla-2 runs/unipool-1 runs/unipool-2
        unipool compare runs/sweep/* baseline=vanilla out=results/sweep
    """

    runs: Annotated[tuple[str, ...], Positional()] = ()
    """Folders of finished runs, two or more."""
    baseline: str | None = None
    """Group to subtract; by default the first of method vanilla, or the first of all."""
    out: str | None = None
    """Folder for the results; by default compare/ beside the first run."""

    def problems(self) -> Iterator[str]:
        """What is missing."""
        if len(self.runs) < 2:
            yield f"{len(self.runs)} run folder(s) given: a comparison needs two or more"
