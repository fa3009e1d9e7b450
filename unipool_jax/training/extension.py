"""A finished run that is trained for more steps.

The past of the run stays what it was: learning rates, phases of a lock and the order of text are planned for its first
length (`train.earlier_steps`) and only go on from there, so an extended run resumes as bit-exactly as any other.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path

from unipool_jax.config.schema import Config
from unipool_jax.training.run_folder import RunError, is_finished


def with_more_steps(folder: Path, stored: Config, wanted: Config, more: int | None) -> Config:
    """`wanted`, with the past of the run in it if its `train.steps` extend the finished run `stored`.

    Args:
      folder: of the run.
      stored: its configuration.
      wanted: the same with the settings of a command.
      more: steps to add; None takes `train.steps` as it is.

    Raises:
      RunError: the run is not finished, so its length is still that of its schedule.
    """
    train = stored.train
    steps = wanted.train.steps if more is None else train.steps + more
    if train.earlier_steps and more == train.steps - train.earlier_steps[-1] and not is_finished(folder, stored):
        steps = train.steps  # the same command once more, after an interruption
    if steps <= train.steps:
        return dataclasses.replace(wanted, train=dataclasses.replace(wanted.train, steps=steps))
    if not is_finished(folder, stored):
        raise RunError(
            f"train.steps={steps}: {folder} has not finished its {train.steps} steps, and the schedule of a run is "
            f"extended only at its end; finish it first: unipool train {folder}"
        )
    lengths = dataclasses.replace(wanted.train, steps=steps, earlier_steps=train.lengths)
    return dataclasses.replace(wanted, train=lengths)
