"""Settings of `unipool prune`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

from unipool_jax.config.compose import Choices
from unipool_jax.config.ranges import Range
from unipool_jax.config.words import Composed, Positional

Gains = Literal["slnp", "dimension", "kept"]
"""What happens to the gains of norms when channels go."""


@dataclass(frozen=True, kw_only=True)
class PruneRequest:
    """Make a smaller model of a trained one: fewer layers, channels, heads, neurons of an expert, or experts.

    Give the sizes of the new model as for `unipool train`; all that is not given is that of the run. What stays is what
    matters most on the run's text. Prints losses, and writes every choice to prune.json and a page of the new run,
    which is at step 0 with a fresh optimizer. Train it to recover: run.init_from, or go on with it by its name.

        unipool prune runs/pool out=runs/half model.hidden_size=384 model.num_kv_heads=2 model.ffn_size=1536
        unipool prune runs/pool out=runs/shallow model.num_layers=10
        unipool prune runs/pool out=runs/fewer pool.experts=64 importance=random
    """

    run: Annotated[str, Positional()] = "latest"
    """Folder of a run, or `latest`, the run below runs/ that was saved to last."""
    step: Annotated[int | None, Range(0, 1_000_000_000)] = None
    """Which checkpoint of the run; null is the newest."""
    out: str
    """Folder of the new run, for example runs/half; it must not exist."""
    importance: Literal["text", "magnitude", "random"] = "text"
    """What stays. `text`: what is active on the train split. Controls: `magnitude`, what has the largest weights, and
    `random`."""
    layers: Literal["loss", "similarity"] = "loss"
    """Which layers go, with importance=text. `loss`: one after the other, each time the one without which the loss is
    smallest. `similarity`: those whose output is most like their input."""
    merge_attention: bool = True
    """Whether the heads of a layer that goes compete with those of the layer below that stays (CLAP), or go too."""
    gains: Gains = "slnp"
    """How gains of norms make up for channels that go. `slnp`: they keep their length. `dimension`: by the square root
    of the widths' ratio. `kept`: not at all."""
    adopt: bool = True
    """Whether an expert that was used almost only by layers that go gets the router row of one of them in a layer that
    stays."""
    tokens: Annotated[int, Range(1, 1_000_000_000)] = 262_144
    """Tokens of the train split to measure on; at most one epoch."""
    seed: Annotated[int, Range(0, 2**32 - 1)] = 0
    """Of the text, and of importance=random."""
    config: Annotated[Choices | None, Composed()] = None
    """Sizes of the new model and other settings, as for `unipool train`; all others are those of the run."""
