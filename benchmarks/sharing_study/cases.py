"""The runs of the sharing study: a small model on mixed text, where the per-layer mixture beats the dense model."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from benchmarks.sharing_study.text import TOKENIZER, VOCAB_SIZE
from unipool_jax.config.compose import compose_config
from unipool_jax.config.schema import Config

RESULTS = Path(__file__).resolve().parents[2] / "results" / "sharing_study"
SEEDS = (1, 2, 3, 4, 5)
RATES = (2e-3, 4e-3, 8e-3)
STEPS = 4880
"""10 million tokens in steps of 2,048; the training split has more than 30 million, so no run reads a text twice."""
LOG_EVERY = 122
EVALUATIONS = 4

SETTINGS = (
    "scale=demo",
    "model.num_layers=4",
    "model.hidden_size=96",
    "model.ffn_size=192",
    f"model.vocab_size={VOCAB_SIZE}",
    "model.init_std=0.04",
    "data.source=stores",
    "data.sequence_length=128",
    "train.batch_size=16",
    "train.microbatch_size=16",
    "train.eval_batches=null",
    "train.eval_batch_size=256",
    f"train.log_every={LOG_EVERY}",
    f"train.steps={STEPS}",
    "loss.switch_group_sequences=16",
    "loss.pool_coefficient=1e-3",
    "run.tensorboard=false",
)


@dataclass(frozen=True)
class Case:
    """One line of the study."""

    name: str
    overrides: tuple[str, ...]
    part: str = "why"
    rate: float = 4e-3
    """Peak learning rate; the last is 0.075 of it."""
    initial_scale: float = 1.0
    """Factor of all initial weights."""

    def config(self, text: Path, seed: int = 1) -> Config:
        """Settings of one run on the text in this folder."""
        place = [f"data.stores=[{text / 'mix'}]", f"data.tokenizer={text / TOKENIZER}", f"train.seed={seed}"]
        rates = [f"optimizer.learning_rate={self.rate}", f"optimizer.min_learning_rate={0.075 * self.rate}"]
        return compose_config([*SETTINGS, *rates, *self.overrides, *place])


def _at_every_rate(name: str, *overrides: str) -> tuple[Case, ...]:
    return tuple(Case(f"{name}_{rate:g}", overrides, "main", rate) for rate in RATES)


def _at_higher_rates(name: str, *overrides: str) -> tuple[Case, ...]:
    return tuple(Case(f"{name}_{rate:g}", overrides, rate=rate) for rate in (8e-3, 16e-3))


UNIPOOL = "method=unipool"
MAPS = ("loss.pressure=layer",)
"""Maps are compared at equal pressure for each layer."""
TWICE = (f"train.steps={2 * STEPS}",)
DEEP = ("model.num_layers=8",)

CASES = (
    *_at_every_rate("dense", "method=dense"),
    *_at_every_rate("vanilla", "method=vanilla"),
    Case("vanilla_0.016", ("method=vanilla",), "main", 16e-3),
    *_at_every_rate("unipool", UNIPOOL),
    *_at_every_rate("unipool_centered", "method=unipool_centered", "loss.pool_coefficient=1e-2"),
    # The loss.
    Case("unipool_published", (UNIPOOL, "loss.pool_coefficient=1e-2")),
    Case("unipool_normalized", (UNIPOOL, "loss.pool_coefficient=1e-2", "loss.pool_scores=normalized")),
    Case("shared_pool_aux", ("method=shared_pool_aux",)),
    Case("vanilla_normrouter", ("method=vanilla_normrouter",)),
    *_at_higher_rates("unipool_published", UNIPOOL, "loss.pool_coefficient=1e-2"),
    *_at_higher_rates("shared_pool_aux", "method=shared_pool_aux"),
    # How much is shared, by how many.
    Case("half_pool", (UNIPOOL, "pool.experts=16")),
    Case("double_pool", (UNIPOOL, "pool.experts=64")),
    Case("two_pools", (UNIPOOL, "pool.groups=2", *MAPS)),
    Case("ring_16_of_32", ("method=ring", "pool.span=2", *MAPS)),
    Case("tied_inner_32", ("method=tied_inner", "pool.starts=wide_runs", "pool.ends=1", "pool.span=2")),
    # Two experts a token; of cs_moe one is the layer's own and always on.
    Case("vanilla_top2", ("method=vanilla", "moe.top_k=2")),
    Case("unipool_top2", (UNIPOOL, "moe.top_k=2")),
    Case("cs_moe", ("method=cs_moe",)),
    # Twice the layers, with a pool of 64.
    Case("vanilla_8_layers", ("method=vanilla", *DEEP)),
    Case("unipool_8_layers", (UNIPOOL, *DEEP)),
    # Twice the tokens.
    Case("vanilla_20m", ("method=vanilla", *TWICE)),
    Case("unipool_20m", (UNIPOOL, *TWICE)),
    # The noise of a run.
    Case("vanilla_again", ("method=vanilla",), initial_scale=1 + 1e-6),
    Case("unipool_again", (UNIPOOL,), initial_scale=1 + 1e-6),
)
