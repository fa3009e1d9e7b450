"""Every command: its name, its settings and the function that runs it. Nothing is imported before it is needed."""

from __future__ import annotations

import pkgutil
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from unipool_jax.config.schema import Config


@dataclass(frozen=True)
class Option:
    """A word that begins with dashes."""

    name: str
    """Without the dashes."""
    help: str
    value: str | None = None
    """What its value is called; None for an option without one."""


HELP = Option("help", "Show this page.")
CONFIG_DIR = Option("config-dir", "Folder of your own choices, laid over the shipped ones.", "DIR")
PRINT_CONFIG = Option("print-config", "Print the composed configuration as YAML and stop.")
MULTIRUN = Option("multirun", "Train every combination of values with commas (train.seed=1,2,3), one after another.")


@dataclass(frozen=True)
class Command:
    """One command of `unipool`."""

    name: str
    """One word or two."""
    summary: str
    settings: str
    """`MODULE:CLASS` of the dataclass of its settings."""
    function: str
    """`MODULE:FUNCTION` that takes them and returns an exit code."""
    options: tuple[Option, ...] = ()
    """Besides `--help`."""
    failure: int | None = None
    """Exit code for every error, where it is not the error's own."""
    mode: str | None = None
    """Value of the setting `mode`, for a command that composes a whole configuration."""

    def load_settings(self) -> type:
        """The dataclass of its settings."""
        kind = pkgutil.resolve_name(self.settings)
        assert isinstance(kind, type)
        return kind

    def load_function(self) -> Callable[[Any], int]:
        """The function that runs it."""
        function: Callable[[Any], int] = pkgutil.resolve_name(self.function)
        return function

    @property
    def composes(self) -> bool:
        """Whether its settings are those of the whole schema, composed from the choices in configs/."""
        return self.load_settings() is Config


_SCHEMA = "unipool_jax.config.schema:Config"
_TRAINING = "unipool_jax.cli.training"

COMMANDS = (
    Command(
        "train",
        "Train a model, or go on with a run, or extend a finished one (`train.steps=+N`).",
        _SCHEMA,
        f"{_TRAINING}:start",
        (CONFIG_DIR, MULTIRUN, PRINT_CONFIG),
    ),
    Command(
        "eval",
        "Measure a checkpoint: loss on text, or zero-shot tasks.",
        "unipool_jax.evaluation.requests:EvalRequest",
        "unipool_jax.evaluation.text:evaluate_command",
    ),
    Command(
        "generate",
        "Let a trained model go on with a text.",
        "unipool_jax.evaluation.requests:GenerateRequest",
        "unipool_jax.evaluation.generate:generate_command",
    ),
    Command(
        "analyse",
        "Look inside a checkpoint: who uses which experts, as numbers, figures and a page.",
        "unipool_jax.analysis.requests:AnalysisRequest",
        "unipool_jax.analysis.command:analyse_command",
    ),
    Command(
        "compare",
        "Compare finished runs, paired by seed.",
        "unipool_jax.analysis.requests:CompareRequest",
        "unipool_jax.analysis.compare_command:compare_command",
    ),
    Command(
        "convert export",
        "Write the weights of a checkpoint to a file.",
        "unipool_jax.convert.requests:ExportRequest",
        "unipool_jax.convert.command:export_command",
    ),
    Command(
        "convert import",
        "Make a run of a file of weights.",
        "unipool_jax.convert.requests:ImportRequest",
        "unipool_jax.convert.command:import_command",
        (CONFIG_DIR,),
    ),
    Command(
        "convert upcycle",
        "Make a model of another architecture of a run.",
        "unipool_jax.convert.requests:UpcycleRequest",
        "unipool_jax.convert.command:upcycle_command",
        (CONFIG_DIR,),
    ),
    Command(
        "convert grow",
        "Make a deeper model of a run.",
        "unipool_jax.convert.requests:GrowRequest",
        "unipool_jax.convert.grow:grow_command",
        (CONFIG_DIR,),
    ),
    Command(
        "convert merge",
        "Make a model with fewer experts of a trained one.",
        "unipool_jax.convert.requests:MergeRequest",
        "unipool_jax.convert.merge_command:merge_command",
        (CONFIG_DIR,),
    ),
    Command(
        "prune",
        "Make a smaller model of a trained one.",
        "unipool_jax.pruning.requests:PruneRequest",
        "unipool_jax.pruning.command:prune_command",
        (CONFIG_DIR,),
    ),
    Command(
        "data",
        "Tokenise files of text into a token store, or check a store.",
        "unipool_jax.data.requests:DataRequest",
        "unipool_jax.data.command:data_command",
        failure=2,
    ),
    Command(
        "tokenizer",
        "Train a tokenizer.",
        "unipool_jax.data.requests:TokenizerRequest",
        "unipool_jax.data.train_tokenizer:tokenizer_command",
        failure=2,
    ),
    Command(
        "tasks",
        "Write benchmarks of an installed package as local tasks for `unipool eval`.",
        "unipool_jax.evaluation.requests:TaskExportRequest",
        "unipool_jax.evaluation.export_tasks:export_command",
    ),
    Command(
        "trig data",
        "Make trigonometric equations with proofs, to train on and to solve.",
        "unipool_jax.rewriting.requests:TrigDataRequest",
        "unipool_jax.rewriting.command:data_command",
    ),
    Command(
        "trig eval",
        "Let a model prove trigonometric equations.",
        "unipool_jax.rewriting.requests:TrigEvalRequest",
        "unipool_jax.rewriting.command:eval_command",
    ),
    Command(
        "steps check",
        "Prove the steps of answers one by one.",
        "unipool_jax.verification.requests:CheckRequest",
        "unipool_jax.verification.command:check_command",
    ),
    Command(
        "steps train",
        "Train what tells right answers from the states of their steps.",
        "unipool_jax.verification.requests:AggregatorRequest",
        "unipool_jax.verification.command:train_command",
    ),
    Command(
        "steps select",
        "Choose the best of several answers to each problem.",
        "unipool_jax.verification.requests:SelectRequest",
        "unipool_jax.verification.command:select_command",
    ),
    Command(
        "retrieval data",
        "Make retrieval tasks of the standard library's own source.",
        "unipool_jax.retrieval.requests:RetrievalDataRequest",
        "unipool_jax.retrieval.command:data_command",
    ),
    Command(
        "retrieval eval",
        "Let a model find documents, beside BM25 and chance.",
        "unipool_jax.retrieval.requests:RetrievalEvalRequest",
        "unipool_jax.retrieval.command:eval_command",
    ),
    Command(
        "retrieval tune",
        "Teach a model to find documents: contrastive fine-tuning.",
        "unipool_jax.retrieval.requests:RetrievalTuneRequest",
        "unipool_jax.retrieval.command:tune_command",
    ),
    Command(
        "aptitude anchors",
        "Choose questions that stand for each source of a file of candidates.",
        "unipool_jax.aptitude.requests:AnchorsRequest",
        "unipool_jax.aptitude.command:anchors_command",
    ),
    Command(
        "aptitude score",
        "Score how much solutions, in text and as programs, help a trained model.",
        "unipool_jax.aptitude.requests:AptitudeScoreRequest",
        "unipool_jax.aptitude.score_command:score_command",
    ),
    Command(
        "aptitude select",
        "Select by scores which solutions, in text or as programs, to fine-tune on.",
        "unipool_jax.aptitude.requests:AptitudeSelectRequest",
        "unipool_jax.aptitude.command:select_command",
    ),
    Command(
        "plan",
        "Say what a training step costs on devices that need not be there.",
        _SCHEMA,
        f"{_TRAINING}:start",
        (CONFIG_DIR, PRINT_CONFIG),
        mode="plan",
    ),
    Command(
        "describe",
        "Report the parameters of a model, nothing allocated.",
        _SCHEMA,
        f"{_TRAINING}:start",
        (CONFIG_DIR, PRINT_CONFIG),
        mode="describe",
    ),
    Command(
        "completion",
        "Print the completion script of a shell.",
        "unipool_jax.cli.completion:CompletionRequest",
        "unipool_jax.cli.completion:completion_command",
    ),
)


def find(words: list[str]) -> tuple[Command | None, list[str]]:
    """The command that a command line begins with, and the words after its name."""
    for command in COMMANDS:
        name = command.name.split()
        if words[: len(name)] == name:
            return command, words[len(name) :]
    return None, words
