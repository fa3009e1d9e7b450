"""Typed schema of the whole configuration.

The dataclasses below are the only place where a setting, its type, its default and its meaning are written down.
The files in `configs/` hold choices (a scale, a method, a data source), never defaults. Defaults are the published
182M recipe (arXiv 2605.06665).

`parsing.from_mapping` makes a `Config` of a composed plain mapping and reports every unknown key and wrong type at
once; `rules.validate` then reports every impossible combination, before any array exists.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Any, Literal

DType = Literal["float32", "bfloat16"]


class ConfigError(ValueError):
    """A configuration that cannot be run; the message lists every problem, one a line."""

    def __init__(self, problems: list[str]):
        self.problems = list(problems)
        count = len(self.problems)
        heading = f"{count} problem{'s' if count != 1 else ''} in the configuration:"
        super().__init__("\n".join([heading, *(f"  - {problem}" for problem in self.problems)]))


@dataclass(frozen=True)
class ModelConfig:
    """The LLaMA-style backbone."""

    num_layers: int = 12
    """Transformer layers L; every layer holds one attention and one feed-forward (or mixture) block."""
    hidden_size: int = 768
    """Model width D."""
    num_heads: int = 12
    """Query heads; each has hidden_size / num_heads channels."""
    num_kv_heads: int = 4
    """Key and value heads (grouped-query attention); must divide num_heads."""
    ffn_size: int = 3072
    """Width F of one expert, or of the dense feed-forward block."""
    vocab_size: int = 51200
    """Rows of the embedding and of the output head, padding included. Pad rows are ordinary parameters."""
    rope_base: float = 1_000_000.0
    """Base of the rotary position frequencies."""
    norm_epsilon: float = 1e-5
    """Added to the mean square inside RMSNorm."""
    init_std: float = 0.01
    """Standard deviation of the initial weights; the two output projections of a layer use init_std / sqrt(2 L)."""
    compute_dtype: DType = "bfloat16"
    """Dtype of activations and of weights at use. Parameters and optimiser state are always float32."""
    remat: Literal["none", "moe", "full"] = "moe"
    """What the backward pass recomputes: nothing, the mixture block of each layer, or each whole layer."""


@dataclass(frozen=True)
class MoEConfig:
    """How a layer chooses experts."""

    router: Literal["none", "softmax", "sigmoid", "norm"] = "norm"
    """`norm` is NormRouter; `none` is the dense model (one expert per layer, no router)."""
    experts_per_layer: int = 8
    """Expert budget per layer: the whole model holds experts_per_layer x num_layers experts before any reduction."""
    top_k: int = 1
    """Experts each token visits in each layer."""
    router_dtype: DType = "float32"
    """Dtype of the router from its logits on; `bfloat16` reproduces the official runs."""
    score_constant: Literal["monte_carlo", "one"] = "monte_carlo"
    """NormRouter's fixed constant c: the published Monte Carlo estimate, or 1."""
    score_epsilon: float = 1e-8
    """Added to the norm of the logits in NormRouter."""


@dataclass(frozen=True)
class PoolConfig:
    """Which layers share which experts."""

    groups: int = 1
    """Number of pools G: 1 is UniPool, num_layers is the ordinary per-layer mixture. Must divide num_layers."""
    fraction: float = 1.0
    """Share of the expert budget kept: the pools hold round(fraction x experts_per_layer x num_layers) experts."""
    experts: int | None = None
    """Experts in all pools together; overrides `fraction` when set."""


@dataclass(frozen=True)
class LossConfig:
    """Balance of expert use. The language-model loss is always reported without these terms."""

    balance: Literal["none", "switch", "pool", "expert_bias"] = "pool"
    """`switch`: per-layer Switch loss; `pool`: pool-level loss; `expert_bias`: sigmoid selection bias, no loss."""
    switch_coefficient: float = 1e-2
    """Weight of the Switch loss of each layer."""
    switch_group_sequences: int = 16
    """Sequences over which one Switch loss is computed; divides train.microbatch_size."""
    pool_coefficient: float = 1e-2
    """Weight of the pool loss (1e-2 at 182M, 2e-2 at the larger scales)."""
    pool_statistics: Literal["current", "previous"] = "current"
    """Routing fractions in the pool loss: of this very batch (exact), or of the micro-batch before (as published)."""
    expert_bias_rate: float = 1e-3
    """Step of the selection bias after each optimiser step."""
    z_coefficient: float = 0.0
    """Weight of the mean squared logsumexp of the router logits of each layer; 0 is off."""


@dataclass(frozen=True)
class LockConfig:
    """UniPool-lock: all layers share the pool at first, then every expert belongs to one layer.

    Boundaries are fractions of train.steps, so that they scale with the run; a number of steps overrides its fraction.
    """

    ownership: Literal["none", "learned", "random_at_lock", "random_from_start"] = "none"
    """`learned`: assigned by expert use in the shared phase. Controls: a random partition at the same moment and with
    the same fade, or from step 0 on. `none` is a run without a lock."""
    lock_fraction: float = 2 / 60
    """Share of train.steps after which experts are private."""
    anneal_fraction: float = 1 / 60
    """Length of the fade before the lock, as a share of train.steps; the partition is frozen where it begins."""
    entropy_warmup_fraction: float = 1 / 60
    """Share of train.steps over which the entropy coefficient rises linearly from 0."""
    lock_step: int | None = None
    """Step of the lock; overrides lock_fraction."""
    anneal_steps: int | None = None
    """Steps of the fade; overrides anneal_fraction."""
    entropy_warmup_steps: int | None = None
    """Steps of the warm-up; overrides entropy_warmup_fraction."""
    entropy_coefficient: float = 5e-3
    """Weight of the squared distance of a layer's score entropy (nats) from ln(entropy_target); stays on to the end. As
    published, the entropy is that of the mean scores of one micro-batch: it depends on train.microbatch_size."""
    entropy_target: float = 8.0
    """Number of experts that each layer is drawn towards using, from 1 to the experts a layer will own."""
    coverage_threshold: float = 0.95
    """Share of a layer's routed tokens that its own experts should have had when the partition is frozen."""
    solver: Literal["auto", "r2_exact"] = "auto"
    """`auto` maximises the routed share, and looks for a partition with full coverage where that one has not;
    `r2_exact` solves the published integer programs."""
    solver_seconds: float = 30.0
    """Time limit of one integer program; a run stops where it is not enough."""
    max_loss_excess: float = 0.05
    """A validation loss (nats) this far above the one at the freeze counts towards stopping the run."""
    excess_evaluations: int = 2
    """Such evaluations in a row that stop it."""
    count_lookback: int = 5
    """Evaluations whose routing counts enter the assignment."""
    count_smoothing: float = 0.5
    """Weight of the newest counts: an evaluation of age a weighs count_smoothing (1 - count_smoothing)^a."""


@dataclass(frozen=True)
class OptimizerConfig:
    """AdamW with linear warm-up and cosine decay."""

    learning_rate: float = 5e-4
    """Peak learning rate."""
    min_learning_rate: float = 5e-5
    """Learning rate at the last step."""
    warmup_fraction: float = 0.01
    """Share of train.steps spent in linear warm-up from 0."""
    beta1: float = 0.9
    """Decay of the first moment."""
    beta2: float = 0.999
    """Decay of the second moment."""
    epsilon: float = 1e-8
    """Added to the root of the second moment."""
    weight_decay: float = 0.01
    """Decoupled decay of every tensor that is a matrix (not of norm gains and router scales)."""
    clip_norm: float = 1.0
    """Global gradient norm above which gradients are scaled down."""


@dataclass(frozen=True)
class TrainConfig:
    """Length, batch and rhythm of a run."""

    steps: int = 60_000
    """Optimiser steps."""
    batch_size: int = 512
    """Sequences per optimiser step, over all devices."""
    microbatch_size: int = 16
    """Sequences per forward and backward pass, over all devices; divides batch_size (gradient accumulation). Losses do
    not depend on it, but with loss.pool_statistics=previous and for the entropy loss of a lock."""
    seed: int = 1234
    """Seed of the initial weights and of the data order."""
    log_every: int = 10
    """Steps between lines of metrics."""
    eval_every: int = 1000
    """Steps between evaluations on the valid split; 0 evaluates only at the end."""
    eval_batches: int | None = 100
    """Length of one evaluation during training: this many times train.batch_size sequences; null is the whole split."""
    eval_batch_size: int = 512
    """Sequences per evaluation batch; results do not depend on it."""
    eval_slice: Literal["fixed", "moving"] = "fixed"
    """Same text at every evaluation, or the next slice of the shuffled valid split each time (as published)."""
    checkpoint_every: int = 1000
    """Steps between checkpoints; 0 saves only at the end or when interrupted."""
    keep_checkpoints: int = 3
    """Newest checkpoints kept."""
    nonfinite: Literal["stop", "skip"] = "stop"
    """On a non-finite loss or gradient: stop with a report, or leave the state as it was and go on."""


@dataclass(frozen=True)
class DataConfig:
    """Where text comes from and how it is cut."""

    source: Literal["demo", "files", "stores"] = "demo"
    """The embedded corpus, text files (tokenised once into cache_dir), or finished token stores."""
    files: tuple[str, ...] = ()
    """Text, jsonl(.gz/.zst/.xz) or parquet files, for source=files."""
    stores: tuple[str, ...] = ()
    """Directories made by `python -m unipool_jax.data`, or Megatron prefixes (PREFIX.bin and PREFIX.idx)."""
    tokenizer: str = "demo"
    """`bytes`, `demo`, `gpt2`, or the path of a tokenizer.json."""
    sequence_length: int = 1024
    """Tokens per sequence S."""
    split: tuple[int, ...] = (969, 30, 1)
    """Weights of the train, valid and test splits, by document (files, demo and Megatron stores)."""
    split_order: Literal["contiguous", "interleaved"] = "contiguous"
    """Whether splits are consecutive ranges of documents or dealt round by round."""
    cache_dir: str = ".cache/tokens"
    """Where stores made from `files` or from the embedded corpus are kept."""
    num_threads: int = 2
    """Threads that read and prefetch batches."""


@dataclass(frozen=True)
class MeshConfig:
    """The device mesh: sizes of its axes, whose product is the number of devices, and how experts use it."""

    data: int = -1
    """Batch parallelism. -1, allowed for one axis, means what the other axes leave of the devices."""
    fsdp: int = 1
    """Batch parallelism with parameters and optimiser state sharded over model width."""
    expert: int = 1
    """Expert parallelism: batch parallelism with the experts of each pool dealt out over devices."""
    tensor: int = 1
    """Tensor parallelism over attention heads, expert width and vocabulary."""
    topology: str | None = None
    """Devices that mode=plan plans for, such as `v5p:4x4x4` or `gpu:8`; training takes those that there are."""
    transport: Literal["auto", "all_gather", "ragged"] = "auto"
    """How tokens reach experts on other devices: gather all tokens of the expert group (works everywhere), or send
    each to its expert with a ragged all-to-all (TPU and GPU); `auto` takes `ragged` where it exists."""
    receive_factor: float | None = None
    """Rows a device can receive in one layer, over the mean; the size of the expert group is always enough. null: 3 at
    first, and from every checkpoint on what the steps before it needed, and a quarter more."""
    overflow: Literal["stop", "drop"] = "stop"
    """When more rows arrive: stop with a report, or go on without their experts and count them as `overflow`: in
    metrics.jsonl those since the line before, in summary.json all of the run."""
    expert_placement: Literal["contiguous", "measured"] = "contiguous"
    """Which experts share a device: neighbours, or, when a run is resumed, those whose loads in its last evaluation
    even out over devices layer by layer. Checkpoints and metrics keep the order of the experts."""


@dataclass(frozen=True)
class DistributedConfig:
    """Several processes, one per host or per device; see docs/clusters.md."""

    launch: Literal["auto", "cluster", "single"] = "auto"
    """`auto` joins other processes where a Slurm step, Open MPI or Cloud TPU hosts announce them; `cluster` always
    asks JAX to find them (Cloud TPU slices without such an announcement); `single` is one process."""
    coordinator: str | None = None
    """Address host:port of process 0; set it, num_processes and process_id where nothing announces them."""
    num_processes: int | None = None
    """Processes in all, with `coordinator`."""
    process_id: int | None = None
    """Number of this process from 0, with `coordinator`."""
    timeout_seconds: int = 60
    """A process not heard from for this long is taken for dead, and the others stop."""
    start_timeout_seconds: int = 300
    """How long the processes wait for each other at the start."""


@dataclass(frozen=True)
class KernelsConfig:
    """Implementation of the grouped expert matmuls."""

    implementation: Literal["auto", "reference", "xla", "pallas_tpu", "pallas_gpu"] = "auto"
    """`auto` takes the best one for the platform; the choice is printed at start."""


@dataclass(frozen=True)
class PlanConfig:
    """What `mode=plan` does besides compiling the step as configured."""

    search: bool = False
    """Search micro-batch, rematerialisation and mesh shape for the best modelled throughput that fits."""
    compiled: int = 2
    """How many of the best candidates of a search are compiled."""
    figure: str = "plan.png"
    """File of the figure of a search."""


@dataclass(frozen=True)
class RunConfig:
    """Where results go."""

    dir: str = "runs"
    """Folder of all runs."""
    name: str | None = None
    """Folder of this run inside `dir`; null makes it from scale, method, steps and seed."""
    resume: Literal["auto", "never", "required"] = "auto"
    """Go on from the newest complete checkpoint if there is one, refuse an existing run, or demand one."""
    tensorboard: bool = True
    """Also write TensorBoard event files."""


@dataclass(frozen=True)
class Config:
    """Everything `train.py` needs to know."""

    model: ModelConfig = field(default_factory=ModelConfig)
    moe: MoEConfig = field(default_factory=MoEConfig)
    pool: PoolConfig = field(default_factory=PoolConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    lock: LockConfig = field(default_factory=LockConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    data: DataConfig = field(default_factory=DataConfig)
    mesh: MeshConfig = field(default_factory=MeshConfig)
    distributed: DistributedConfig = field(default_factory=DistributedConfig)
    kernels: KernelsConfig = field(default_factory=KernelsConfig)
    plan: PlanConfig = field(default_factory=PlanConfig)
    run: RunConfig = field(default_factory=RunConfig)
    scale_name: str = "custom"
    """Set by the scale file; part of the default run name."""
    method_name: str = "custom"
    """Set by the method file; part of the default run name."""
    mode: Literal["train", "describe", "plan"] = "train"
    """`describe` prints the parameter report and stops; `plan` says what a step costs on the devices of mesh.topology,
    which need not be there."""

    @property
    def total_experts(self) -> int:
        """M, the experts in all pools together."""
        if self.pool.experts is not None:
            return self.pool.experts
        return round(self.pool.fraction * self.moe.experts_per_layer * self.model.num_layers)

    @property
    def experts_per_pool(self) -> int:
        """E, what each layer's router chooses from."""
        return self.total_experts // self.pool.groups

    @property
    def router_width(self) -> int:
        """Logits of each layer's router: E, and with UniPool-lock M before and after the lock."""
        return self.experts_per_pool if self.lock.ownership == "none" else self.total_experts

    @property
    def locked(self) -> bool:
        """Whether this is the structure of a model after its lock, see `after_lock`."""
        return self.lock.ownership != "none" and self.pool.groups == self.model.num_layers

    def after_lock(self) -> Config:
        """The model that a run with a lock ends as: G = L pools of K = M / L experts behind routers of M logits."""
        return dataclasses.replace(self, pool=dataclasses.replace(self.pool, groups=self.model.num_layers))

    @property
    def layers_per_pool(self) -> int:
        """Adjacent layers that share one pool, L / G."""
        return self.model.num_layers // self.pool.groups

    @property
    def head_size(self) -> int:
        """Channels of one attention head."""
        return self.model.hidden_size // self.model.num_heads

    @property
    def num_microbatches(self) -> int:
        """Forward and backward passes per optimiser step."""
        return self.train.batch_size // self.train.microbatch_size

    @property
    def microbatch_loss(self) -> str | None:
        """The setting, with its value, that makes a loss one of micro-batches, so that their size decides the numbers;
        None where all losses are those of the whole batch."""
        if self.loss.balance == "pool" and self.loss.pool_statistics == "previous":
            return "loss.pool_statistics=previous"
        if self.lock.ownership != "none" and self.lock.entropy_coefficient:
            return f"lock.entropy_coefficient={self.lock.entropy_coefficient:g}"
        return None

    @property
    def tokens_per_step(self) -> int:
        """Tokens per optimiser step."""
        return self.train.batch_size * self.data.sequence_length


def to_mapping(config: Config) -> dict[str, Any]:
    """The configuration as nested plain dictionaries, ready for YAML or JSON."""
    return dataclasses.asdict(config)


def settings(section: Any, prefix: str = "") -> dict[str, Any]:
    """Every setting by its dotted name (`model.num_layers`), in the order of the schema."""
    found: dict[str, Any] = {}
    for entry in dataclasses.fields(section):
        value = getattr(section, entry.name)
        if dataclasses.is_dataclass(value):
            found |= settings(value, f"{prefix}{entry.name}.")
        else:
            found[prefix + entry.name] = value
    return found
