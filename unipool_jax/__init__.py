"""Mixture-of-Experts language models that share one pool of experts across depth, in JAX and Flax.

For notebooks and scripts; the same as the command line `unipool`:

    import unipool_jax

    config = unipool_jax.compose("method=unipool", "train.steps=240", "run.name=tour")
    run = unipool_jax.train(config)
    print(unipool_jax.evaluate(run)["valid"].loss)
    print(unipool_jax.generate(run, "The state of the Union is")[0])
    print(unipool_jax.analyse(run, "draws=0").unique_mean)

Settings are words `NAME=VALUE` as on the command line, and `unipool COMMAND --help` lists them. Every function raises a
`UserError` (`ConfigError` for settings) that says what to do. Nothing heavy is imported before it is needed.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from unipool_jax.config.errors import UserError
from unipool_jax.config.schema import Config, ConfigError
from unipool_jax.config.version import VERSION

if TYPE_CHECKING:
    from unipool_jax.analysis.analyse import Analysis
    from unipool_jax.analysis.command import OpenedRun
    from unipool_jax.training.evaluate import EvalResult

__all__ = [
    "Config",
    "ConfigError",
    "UserError",
    "__version__",
    "analyse",
    "compose",
    "evaluate",
    "generate",
    "open_run",
    "train",
]

__version__ = VERSION

Folder = str | os.PathLike[str]


def compose(*settings: str, config_dir: Folder | None = None) -> Config:
    """The configuration of `unipool train SETTINGS`.

    `mode=describe` looks at a model without its data being there.

        config = compose("scale=182m", "method=unipool", "mode=describe")
        config.total_experts  # 96

    Args:
      settings: choices (`scale=182m`) and settings (`train.steps=100`).
      config_dir: folder of your own choices, laid over the shipped ones.

    Raises:
      ConfigError: with every reason why it cannot be run.
    """
    from unipool_jax.config.compose import compose_config
    from unipool_jax.config.rules import validate

    config = compose_config(settings, config_dir)
    validate(config)
    return config


def train(config: Config) -> Path:
    """Train as `config` says, or go on where its run folder left off. A finished run is shown, not trained again.

        run = train(compose("train.steps=100", "run.name=short"))  # runs/short

    An interruption (Ctrl-C, or of a notebook's kernel) saves a checkpoint first.

    Returns:
      The run folder.

    Raises:
      RunError: if training stopped before its last step; the output says why.
    """
    from unipool_jax.training.entry import run
    from unipool_jax.training.run_folder import RunError, run_folder

    folder = run_folder(config)
    if code := run(config):
        raise RunError(
            f"{folder}: training stopped (exit code {code}); the same call goes on from the newest checkpoint"
        )
    return folder


def open_run(run: Folder = "latest", *settings: str) -> OpenedRun:
    """A checkpoint with routers, its parameters on one device, and the text to look at it with.

        opened = open_run("runs/tour", "step=160", "split=test")
        opened.config.model.num_layers, opened.params, next(iter(opened.batches()))

    Args:
      run: its folder, or `latest`, the run below runs/ that was saved to last.
      settings: as of `unipool analyse`.
    """
    from unipool_jax.analysis.command import open_run
    from unipool_jax.analysis.requests import AnalysisRequest
    from unipool_jax.config.words import from_words

    return open_run(from_words(AnalysisRequest, [f"run={run}", *settings]))


def evaluate(run: Folder = "latest", *settings: str) -> dict[str, EvalResult]:
    """Loss, perplexity and bits per byte of a checkpoint, by split, or as `text` for files.

        evaluate("runs/tour")["valid"].loss
        evaluate("runs/tour", "data.files=[article.txt]")["text"].bits_per_byte

    Args:
      run: its folder, or `latest`, the run below runs/ that was saved to last.
      settings: as of `unipool eval`, but for tasks.
    """
    from unipool_jax.config.words import from_words
    from unipool_jax.evaluation.requests import EvalRequest
    from unipool_jax.evaluation.text import evaluate_text

    request = from_words(EvalRequest, [f"run={run}", *settings])
    if request.tasks is not None:
        raise ConfigError(["tasks=: not measured here; use `unipool eval`"])
    return evaluate_text(request).results


def generate(run: Folder, prompts: str | Sequence[str], *settings: str) -> list[str]:
    """What a model writes after each prompt.

        generate("runs/tour", ["My fellow", "Congress must"], "max_tokens=40", "seed=1")

    Args:
      run: its folder, or `latest`, the run below runs/ that was saved to last.
      prompts: one text or several, which go on side by side.
      settings: as of `unipool generate`.
    """
    from unipool_jax.config.words import from_words
    from unipool_jax.evaluation.generate import generate_texts
    from unipool_jax.evaluation.requests import GenerateRequest

    texts = [prompts] if isinstance(prompts, str) else prompts
    return generate_texts(from_words(GenerateRequest, [f"run={run}", *(f"prompt={text}" for text in texts), *settings]))


def analyse(run: Folder = "latest", *settings: str) -> Analysis:
    """Every routing analysis of a checkpoint, as numbers; `unipool analyse` writes them as a page.

        analyse("runs/tour", "draws=0").counts_LE  # tokens that each layer sends to each expert

    Args:
      run: its folder, or `latest`, the run below runs/ that was saved to last.
      settings: as of `unipool analyse`, but for tasks.
    """
    from unipool_jax.analysis.command import analyse_run, open_run
    from unipool_jax.analysis.requests import AnalysisRequest
    from unipool_jax.config.words import from_words

    request = from_words(AnalysisRequest, [f"run={run}", *settings])
    if request.tasks is not None:
        raise ConfigError(["tasks=: not measured here; use `unipool analyse`"])
    return analyse_run(request, open_run(request))
