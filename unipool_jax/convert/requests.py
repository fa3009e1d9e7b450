"""Settings of the commands below `convert`: export, import, upcycle, grow and merge."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from unipool_jax.config.compose import Choices
from unipool_jax.config.ranges import Range
from unipool_jax.config.schema import GrowthMap
from unipool_jax.config.words import Composed, Positional

LayoutName = Literal["twin", "megatron"]

_STEP = Range(0, 1_000_000_000)


@dataclass(frozen=True, kw_only=True)
class ExportRequest:
    """Write the weights of a checkpoint to a file of safetensors.

    The file names its layout and holds the configuration, so `unipool convert import` needs nothing else.

        unipool convert export runs/demo out=demo.safetensors
        unipool convert export runs/182m out=back.safetensors layout=megatron step=200
    """

    run: Annotated[str, Positional()] = "latest"
    """Folder of a run, or `latest`, the run below runs/ that was saved to last."""
    step: Annotated[int | None, _STEP] = None
    """Which checkpoint of the run; null is the newest."""
    out: str
    """File to write, for example model.safetensors; it must not exist."""
    layout: LayoutName = "twin"
    """Names and shapes of the tensors: those of the PyTorch twin, or of Megatron-LM."""
    absorb_postnorm: bool = False
    """Replace the norms behind blocks (model.norm) by constants in the weights, means over the run's text; prints what
    that does to the loss. Not where layers share experts and have norms behind them."""
    tokens: Annotated[int, Range(1, 1_000_000_000)] = 262_144
    """Tokens of the train split for these means; at most one epoch."""

    def problems(self) -> Iterator[str]:
        """A name that says something else than the file holds."""
        name = Path(self.out).name
        if not name.endswith(".safetensors"):
            stem = name.removesuffix(Path(name).suffix) or "model"
            yield (
                f"out={self.out}: the file will hold safetensors; name it so, for example "
                f"out={Path(self.out).with_name(stem)}.safetensors (PyTorch reads it with safetensors.torch.load_file)"
            )


@dataclass(frozen=True, kw_only=True)
class ImportRequest:
    """Make a run of a file of weights, at step 0 with a fresh optimizer.

    A file that `convert export` wrote names its own layout and configuration. For other files give the layout and the
    settings of the model as for `unipool train`. A GGUF file (LLaMA-style, dense) describes itself; its text, length of
    training and optimizer are for you to choose.

        unipool convert import demo.safetensors run=runs/imported
        unipool convert import published.safetensors layout=megatron run=runs/182m scale=182m method=unipool
        unipool convert import SmolLM2-135M.gguf run=runs/smollm2 data=text data.files=[notes.jsonl]
    """

    file: Annotated[str, Positional()]
    """File of weights, for example model.safetensors or model.gguf."""
    run: str
    """Folder of the new run, for example runs/imported; it must not exist."""
    layout: LayoutName | None = None
    """Names and shapes of the tensors; null is what the file says."""
    config: Annotated[Choices | None, Composed()] = None
    """Choices and settings, as for `unipool train`; over those that the file holds."""

    def problems(self) -> Iterator[str]:
        """What does not go together."""
        if Path(self.file).suffix == ".gguf" and self.layout is not None:
            yield f"file={self.file}: a GGUF file describes its model; leave layout={self.layout} out"


@dataclass(frozen=True, kw_only=True)
class UpcycleRequest:
    """Make a model of another architecture that computes the same, if there is one, as a new run at step 0.

    Give what is new as for `unipool train`; text, tokenizer, length of training and all else are those of the run. With
    NormRouter, layers of such a model never come to share experts; noise gives up equality for that.

        unipool convert upcycle runs/dense out=runs/mixture method=vanilla moe.experts_per_layer=4
        unipool convert upcycle runs/dense out=runs/pool method=unipool noise=0.01
    """

    run: Annotated[str, Positional()] = "latest"
    """Folder of a run, or `latest`, the run below runs/ that was saved to last."""
    step: Annotated[int | None, _STEP] = None
    """Which checkpoint of the run; null is the newest."""
    out: str
    """Folder of the new run, for example runs/mixture; it must not exist."""
    noise: Annotated[float, Range(0, 1e6)] = 0.0
    """Standard deviation of what is added to the weights of the experts; 0 computes the same as before."""
    config: Annotated[Choices | None, Composed()] = None
    """Choices and settings of the new model, as for `unipool train`; all others are those of the run."""


@dataclass(frozen=True, kw_only=True)
class GrowRequest:
    """Make a deeper model of a trained one, as a new run at step 0 with a fresh optimizer.

    Its layers are copies of those of the run. A pool that layers share keeps its size and its experts, so a deeper
    UniPool costs attention, norms and routers; layers with experts of their own bring copies of them. Training that
    grows by stages, with moments and rehearsed depths, is `growth.layers` of `unipool train`.

        unipool convert grow runs/pool out=runs/deep model.num_layers=24
        unipool convert grow runs/pool out=runs/stacked model.num_layers=24 map=stack
    """

    run: Annotated[str, Positional()] = "latest"
    """Folder of a run, or `latest`, the run below runs/ that was saved to last."""
    step: Annotated[int | None, _STEP] = None
    """Which checkpoint of the run; null is the newest."""
    out: str
    """Folder of the new run, for example runs/deep; it must not exist."""
    map: GrowthMap = "extend"
    """Which layer of N stands at place i of D. `extend`: floor(i N / D), copies beside each other. `stack`: all layers
    in order, again and again."""
    config: Annotated[Choices | None, Composed()] = None
    """model.num_layers, and whatever is to change of training, as for `unipool train`; all else is that of the run."""


@dataclass(frozen=True, kw_only=True)
class MergeRequest:
    """Make a model with fewer experts of a trained one: layers come to share banks, experts matched on data.

    Say what is shared as for `unipool train`: pool.groups, or pool.starts=runs. Without that it is one pool. Each layer
    sees as many experts as before; of the banks that become one, that of the first layer stays. Reads the run's text,
    prints errors and losses, and writes them to merge.json of the new run, which is at step 0 with a fresh optimizer.

        unipool convert merge runs/vanilla out=runs/pool
        unipool convert merge runs/vanilla out=runs/pairs pool.groups=3 prefit=2000
        unipool convert merge runs/vanilla out=runs/inner pool.starts=runs pool.span=2 pool.ends=1 matching=identity
    """

    run: Annotated[str, Positional()] = "latest"
    """Folder of a run, or `latest`, the run below runs/ that was saved to last."""
    step: Annotated[int | None, _STEP] = None
    """Which checkpoint of the run; null is the newest."""
    out: str
    """Folder of the new run, for example runs/merged; it must not exist."""
    matching: Literal["outputs", "identity"] = "outputs"
    """How experts are paired. `outputs`: with the kept one whose outputs are nearest on the inputs of the dropped one.
    `identity`: with the one of the same number, as a control."""
    tokens: Annotated[int, Range(1, 1_000_000_000)] = 2_000_000
    """Tokens of the train split from which inputs of experts are drawn; at most one epoch."""
    rows: Annotated[int, Range(2, 1_000_000)] = 512
    """Inputs kept of each expert. 80% are for matching and prefit; errors are measured on the others, which are of
    other sequences."""
    prefit: Annotated[int, Range(0, 10_000_000)] = 0
    """Steps of AdamW that fit each merged bank to the outputs of the banks that it replaces; 0 keeps the experts of one
    as they are."""
    prefit_rate: Annotated[float, Range(0, 1, open_low=True)] = 1e-4
    """Learning rate of prefit."""
    seed: Annotated[int, Range(0, 2**32 - 1)] = 0
    """Of the text, of the inputs that are kept and of prefit."""
    config: Annotated[Choices | None, Composed()] = None
    """Choices and settings of the new model, as for `unipool train`; all others are those of the run."""
