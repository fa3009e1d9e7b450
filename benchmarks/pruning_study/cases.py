"""The runs of the pruning study: parents, what is cut out of them and trained on, and small models from scratch."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from pathlib import Path

from benchmarks.sharing_study.text import TOKENIZER, VOCAB_SIZE
from unipool_jax.config.compose import Choices, compose_config
from unipool_jax.config.schema import Config
from unipool_jax.pruning.target import pruned_config
from unipool_jax.training.flops import flops_per_token

RESULTS = Path(__file__).resolve().parents[2] / "results" / "pruning_study"
SEEDS = (1, 2, 3)
PARENT_STEPS = 400
RECOVERY_STEPS = 80
TOKENS = 16_384
"""Of calibration."""

SETTINGS = (
    *("scale=demo", "model.num_layers=8", "model.hidden_size=96", "model.ffn_size=192", "moe.experts_per_layer=4"),
    *(f"model.vocab_size={VOCAB_SIZE}", "data.source=stores", "data.sequence_length=128"),
    *("train.batch_size=16", "train.microbatch_size=16", "train.eval_batches=8", "train.eval_batch_size=128"),
    *("train.log_every=20", "train.eval_every=0", "train.keep_checkpoints=1", "run.tensorboard=false", "mesh=single"),
    *("loss.switch_group_sequences=16", "loss.pool_coefficient=1e-3"),
)

RATE, RECOVERY_RATE = 4e-3, 1e-3
"""Peak learning rates; the last of a run is a tenth of it."""

RANDOM, MAGNITUDE = ("importance=random",), ("importance=magnitude",)
PLAIN = ("merge_attention=false", "gains=kept")
"""Importance on text, without CLAP and without SLNP."""


@dataclass(frozen=True)
class Axis:
    """What is smaller, by about a half or, jointly, by a quarter each, and the ways to choose what stays."""

    name: str
    sizes: tuple[str, ...]
    arms: tuple[tuple[str, tuple[str, ...]], ...]


CONTROLS = (("random", (*RANDOM, *PLAIN)), ("magnitude", (*MAGNITUDE, *PLAIN)), ("importance", PLAIN))
CLAP, SLNP = ("merge_attention=true", "gains=kept"), ("merge_attention=false", "gains=slnp")

AXES = (
    Axis("layers", ("model.num_layers=4",), (*CONTROLS, ("clap", CLAP), ("similarity", (*PLAIN, "layers=similarity")))),
    Axis(
        "channels",
        ("model.hidden_size=48",),
        (*CONTROLS, ("slnp", SLNP), ("dimension", ("merge_attention=false", "gains=dimension"))),
    ),
    Axis("heads", ("model.num_kv_heads=1",), CONTROLS),
    Axis("neurons", ("model.ffn_size=96",), CONTROLS),
    Axis("experts", ("pool.experts=16",), CONTROLS),
    Axis(
        "joint",
        ("model.num_layers=6", "model.hidden_size=72", "model.ffn_size=144", "pool.experts=24"),
        (*CONTROLS, ("slnp", SLNP), ("clap", CLAP), ("both", ("merge_attention=true", "gains=slnp"))),
    ),
)

PARENTS = {"unipool": ("method=unipool",), "vanilla": ("method=vanilla",)}
KEPT = (24, 16, 8)
"""Experts that are left of 32 in the study of pools, which are not trained on."""
POOL_ARMS = {"random": RANDOM, "magnitude": MAGNITUDE, "importance": ()}


def parent_words(method: str, text: Path, seed: int) -> tuple[str, ...]:
    """Settings of a parent on the text in this folder."""
    place = (f"data.stores=[{text / 'mix'}]", f"data.tokenizer={text / TOKENIZER}", f"train.seed={seed}")
    return (*PARENTS[method], *SETTINGS, *place, *_length(PARENT_STEPS, RATE))


def _length(steps: int, rate: float) -> tuple[str, ...]:
    return (
        f"train.steps={steps}",
        f"train.checkpoint_every={steps}",
        f"optimizer.learning_rate={rate}",
        f"optimizer.min_learning_rate={0.1 * rate}",
    )


@functools.cache
def parent_config(text: Path, seed: int) -> Config:
    """Of the parent that is trained on."""
    return compose_config(list(parent_words("unipool", text, seed)))


@functools.cache
def small_config(axis: Axis, text: Path, seed: int) -> Config:
    """The model that is left."""
    return pruned_config(parent_config(text, seed), Choices(axis.sizes))


def size_words(config: Config) -> tuple[str, ...]:
    """The sizes of a pruned model as settings."""
    model = config.model
    names = ("num_layers", "hidden_size", "num_heads", "num_kv_heads", "head_size", "ffn_size")
    sizes = (f"model.{name}={getattr(model, name)}" for name in names if getattr(model, name) is not None)
    return (*sizes, f"pool.experts={config.total_experts}")


def recovery_words(axis: Axis, text: Path, seed: int) -> tuple[str, ...]:
    """Settings of the training of a pruned model, without where it starts."""
    words = (*parent_words("unipool", text, seed), *size_words(small_config(axis, text, seed)))
    # Another order of text than the parent's.
    return (*words, f"train.seed={seed + 100}", *_length(RECOVERY_STEPS, RECOVERY_RATE))


def scratch_words(axis: Axis, text: Path, seed: int) -> tuple[str, ...]:
    """Settings of the small model from scratch, for as many FLOPs as parent and recovery took together."""
    small = small_config(axis, text, seed)
    words = (*parent_words("unipool", text, seed), *size_words(small))
    return (*words, *_length(scratch_steps(parent_config(text, seed), small), RATE))


def scratch_steps(parent: Config, small: Config) -> int:
    """Steps of the small model that cost as much as those of parent and recovery; calibration is left out."""
    return round(PARENT_STEPS * flops_per_token(parent) / flops_per_token(small)) + RECOVERY_STEPS
