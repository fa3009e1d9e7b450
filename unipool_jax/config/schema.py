"""Typed schema of the whole configuration.

The dataclasses below are the only place that defines a setting: its type, default and meaning. `configs/` holds
choices (a scale, a method, a data source), never defaults. The defaults are the published 182M recipe
(arXiv 2605.06665). The text under each field is its `--help`.

`parsing.from_mapping` builds a `Config` from a plain mapping and checks keys and types; `rules.validate` checks values
and combinations. Both report all problems at once, before any array is allocated.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from unipool_jax.config import visibility
from unipool_jax.config.errors import UserError

if TYPE_CHECKING:
    import numpy as np

DType = Literal["float32", "bfloat16"]
Remat = Literal["none", "router", "experts", "attention", "moe", "full"]
Router = Literal["softmax", "sigmoid", "norm"]
"""Routers of a mixture; `norm` is NormRouter."""
GrowthMap = Literal["extend", "stack"]
"""How few layers become many."""


class ConfigError(UserError, ValueError):
    """A configuration that cannot be run. The message lists every problem, one per line."""

    exit_code = 2

    def __init__(self, problems: list[str], where: str = "the configuration"):
        self.problems = list(problems)
        count = len(self.problems)
        heading = f"{count} problem{'s' if count != 1 else ''} in {where}:"
        super().__init__("\n".join([heading, *(f"  - {problem}" for problem in self.problems)]))


@dataclass(frozen=True)
class ModelConfig:
    """The LLaMA-style transformer."""

    num_layers: int = 12
    """Transformer layers L, each an attention block and a feed-forward or mixture-of-experts block."""
    hidden_size: int = 768
    """Model width D."""
    num_heads: int = 12
    """Query heads H; must divide model.hidden_size unless model.head_size is given."""
    num_kv_heads: int = 4
    """Key and value heads (grouped-query attention); must divide model.num_heads."""
    head_size: int | None = None
    """Channels of a head, an even number; null is hidden_size / num_heads. A pruned model has the heads of its source,
    whatever its width."""
    ffn_size: int = 3072
    """Hidden width F of one expert, or of the dense feed-forward block."""
    vocab_size: int = 51200
    """Rows V of the embedding and of the output head, at least the tokenizer's vocabulary; padding rows are trained."""
    rope_base: float = 1_000_000.0
    """Base (theta) of the rotary position frequencies."""
    rope_scaling: Literal["none", "linear", "yarn"] = "none"
    """Scaling of rotary positions to sequences longer than model.rope_original_length; see docs/attention.md. `linear`:
    every frequency over model.rope_factor. `yarn`: only the slow ones, and sharper attention (arXiv 2309.00071)."""
    rope_factor: float = 1.0
    """Scaling factor s: the model reads s x model.rope_original_length positions."""
    rope_original_length: int | None = None
    """Sequence length that the model was trained on before its positions were scaled; needed by a scaling."""
    rope_beta_fast: float = 32.0
    """Frequencies with more turns than this in the original length are kept, with model.rope_scaling=yarn."""
    rope_beta_slow: float = 1.0
    """Frequencies with fewer turns than this in the original length are interpolated, with model.rope_scaling=yarn."""
    rope_attention_factor: float | None = None
    """Factor on rotated queries and keys, with model.rope_scaling=yarn; null is 0.1 ln(rope_factor) + 1."""
    norm: Literal["pre", "sandwich", "depth_scaled_sandwich"] = "pre"
    """Norms around the blocks of a layer; see docs/depth.md. `pre`: of the input of each. `sandwich`: also of its
    output, with gains that start at 1. `depth_scaled_sandwich`: the same with gains that start at
    model.post_norm_attention / sqrt(L) and model.post_norm_ffn / sqrt(L) (arXiv 2504.07866)."""
    norm_epsilon: float = 1e-5
    """Epsilon added to the mean square in RMSNorm."""
    post_norm_attention: float = 0.283
    """First gain of the norm behind attention, times sqrt(L), with model.norm=depth_scaled_sandwich."""
    post_norm_ffn: float = 0.432
    """First gain of the norm behind the feed-forward or mixture block, times sqrt(L), with
    model.norm=depth_scaled_sandwich."""
    post_norm_epsilon: float = 1e-8
    """Epsilon of the norms behind blocks, whose first outputs are far smaller than hidden states."""
    post_norm_experts: Literal["norm_then_gate", "post", "none"] = "norm_then_gate"
    """What the norm behind a mixture takes: `norm_then_gate`: the output of each expert, before its gate. `post`: the
    gated sum; it hides the gates from the loss where a token has one expert. `none`: nothing, the block has no such
    norm."""
    init: Literal["base", "tiny"] = "base"
    """Initial weights. `base`: model.init_std, and init_std / sqrt(2 L) for the output projections of both blocks.
    `tiny`: sqrt(1 / (2 D L)) for every matrix, routers aside (TinyInit, arXiv 2504.07866)."""
    init_std: float = 0.01
    """Standard deviation of the initial weights, with model.init=tiny only of routers and gates."""
    embedding_std: float | None = None
    """Standard deviation of the initial embedding; null: model.init_std, with model.init=tiny 0.5."""
    compute_dtype: DType = "bfloat16"
    """Dtype of activations and matrix products. Parameters and optimizer state are always float32."""
    remat: Remat = "moe"
    """What the backward pass recomputes: nothing, scores and choices of routers, the gate and up products of experts,
    the attention block, the mixture block of each layer, or each whole layer. With several pools over mesh.fsdp, `moe`
    and `full` also gather the weights of each pool again."""

    @property
    def matrix_std(self) -> float:
        """Standard deviation of the initial weights of projections, experts and output head."""
        return self.init_std if self.init == "base" else 1 / math.sqrt(2 * self.hidden_size * self.num_layers)

    @property
    def output_std(self) -> float:
        """That of the projections that write to the residual stream: of attention, and down in a feed-forward block."""
        return self.init_std / math.sqrt(2 * self.num_layers) if self.init == "base" else self.matrix_std

    @property
    def table_std(self) -> float:
        """That of the embedding."""
        default = self.init_std if self.init == "base" else 0.5
        return default if self.embedding_std is None else self.embedding_std

    def post_norm_gain(self, constant: float) -> float:
        """First gain of a norm behind a block whose constant this is: model.post_norm_attention or post_norm_ffn."""
        return constant / math.sqrt(self.num_layers) if self.norm == "depth_scaled_sandwich" else 1.0


@dataclass(frozen=True)
class AttentionConfig:
    """Which of the positions before it a token attends to; see docs/attention.md."""

    kind: Literal["full", "window", "alternating", "switch"] = "full"
    """`full`: all positions before, in every layer. `window`: the last attention.window, in every layer. `alternating`:
    all in attention.full_layers, the window in the others. `switch`: a router of each layer chooses for each token
    (Switch Attention)."""
    window: int = 128
    """Positions w that a token sees in a layer with a window, its own among them; less than data.sequence_length."""
    full_layers: int | tuple[int, ...] = 4
    """Layers that see all positions, with attention.kind=alternating: every n-th (4: layers 3, 7, 11, ..., counted from
    0), or a list of layers."""
    gate: Literal["learned", "full", "window"] = "learned"
    """With attention.kind=switch: what the router says, or, to compare with, the same for every token."""
    switch_weight: float = 1e-3
    """Weight of the penalty on full attention, the mean over layers and tokens of softplus(router logit) x weight /
    (switch_epsilon + the token's loss + switch_alpha x disagreement). As published; small models need more."""
    switch_epsilon: float = 0.1
    """What is added to the loss in nats there."""
    switch_alpha: float = 100.0
    """Weight of the disagreement of full attention and window there."""
    switch_weighting: Literal["adaptive", "fixed"] = "adaptive"
    """`fixed` is a control: the penalty of every token has the weight attention.switch_weight."""
    disagreement: Literal["mean", "sum", "relative"] = "mean"
    """Squared difference of the two results of a token, before the output projection: its mean over channels, its sum,
    or over the squared norms of both."""


@dataclass(frozen=True)
class MoEConfig:
    """Experts and how a layer routes tokens to them."""

    router: Literal["none", Router] = "norm"
    """Score function of the router. `norm` is NormRouter; `none` is the dense model: one block per layer, no router."""
    experts_per_layer: int = 8
    """Expert budget per layer: pool.fraction=1 gives the model as many times the number of layers that have experts."""
    top_k: int = 1
    """Experts k that each token is routed to in each layer."""
    router_dtype: DType = "float32"
    """Dtype of router logits and scores; `bfloat16` reproduces the published runs. Gates are the chosen scores, kept in
    float32."""
    score_constant: Literal["monte_carlo", "one"] = "monte_carlo"
    """NormRouter's constant scale c: its published Monte Carlo estimate, or 1."""
    score_epsilon: float = 1e-8
    """Epsilon added to the norm of the logits in NormRouter."""
    score_centering: bool = False
    """Whether NormRouter subtracts from a token's logits their mean over experts. Unlike as published, no token is then
    left without a positive score."""
    shared_experts: int = 0
    """Experts n of each layer that every token visits besides those it is routed to: one SwiGLU block of width
    n x model.ffn_size, private to the layer, without a gate and without a part in load balancing."""
    shared_expert_gate: bool = False
    """Whether the output of moe.shared_experts is multiplied by the sigmoid of a learned projection of the layer's
    input to one number, as in Qwen2-MoE."""
    depth_vectors: bool = False
    """Whether each layer adds a learned vector of its own, zero at first, to what its router and its experts see, so
    that an expert can tell the layers that share it apart, as in MoRE."""
    dense_layers: int = 0
    """First layers that have one dense block instead of experts. Of experts, pools and losses they are no part, and
    lists with one entry per layer (pool.starts, pool.window) leave them out."""
    dense_ffn_size: int | None = None
    """Hidden width of the blocks of moe.dense_layers; null: as wide as all experts that a token visits in another
    layer, (moe.top_k + moe.shared_experts) x model.ffn_size."""


@dataclass(frozen=True)
class PoolConfig:
    """How layers share experts."""

    groups: int = 1
    """Number of pools G; must divide the layers that have experts, model.num_layers without moe.dense_layers. 1 is
    UniPool, as many as layers the ordinary mixture of experts."""
    fraction: float = 1.0
    """Fraction of the expert budget: all pools hold round(fraction x experts_per_layer x layers with experts)."""
    experts: int | None = None
    """Experts M in all pools together; null takes pool.fraction of the expert budget, or what a rule of pool.starts
    needs."""
    starts: tuple[int, ...] | visibility.Rule | None = None
    """First expert that each layer sees of one bank; null: layers see all experts of their pool. A list with one entry
    per layer, or a rule with E = moe.experts_per_layer and n = pool.span. `runs`: n layers share E experts.
    `wide_runs`: n layers share n E. `cyclic`: n banks of E, used in turn. `ring`: n E experts from the layer's own E
    on. `sliding`: the experts of the n layers around it."""
    window: int | tuple[int, ...] | None = None
    """Experts that each layer sees from its pool.starts on, modulo M: one number, or one per layer; null is what the
    rule says."""
    span: int = 2
    """Layers n of a rule of pool.starts."""
    opening: tuple[float, ...] | None = None
    """Two fractions of train.steps, between which windows open in training: until the first a layer routes to
    moe.experts_per_layer of the experts it sees, from the second on to all; which of them is drawn anew each step."""
    ends: int = 0
    """Layers at each end that own E experts, with pool.starts=runs, wide_runs or cyclic."""


@dataclass(frozen=True)
class LossConfig:
    """Load balancing. The language-model loss is always reported without these terms."""

    balance: Literal["none", "switch", "pool", "expert_bias"] = "pool"
    """`switch`: auxiliary loss per layer; `pool`: auxiliary loss per pool; `expert_bias`: a selection bias for
    moe.router=sigmoid, without an auxiliary loss."""
    switch_coefficient: float = 1e-2
    """Weight of each layer's Switch loss, with loss.balance=switch."""
    switch_group_sequences: int = 16
    """Sequences over which one Switch loss is computed; must divide train.microbatch_size."""
    pool_coefficient: float = 1e-2
    """Weight of the pool loss, with loss.balance=pool (published: 1e-2 at 182M, 2e-2 at larger scales)."""
    pool_statistics: Literal["current", "previous"] = "current"
    """Routing fractions in the pool loss: of the current batch (exact), or of the previous micro-batch (published)."""
    pool_scores: Literal["raw", "normalized"] = "raw"
    """Scores in the pool loss: as the router gives them (published), or over their sum per token. NormRouter's do not
    sum to 1, so the published loss also falls when they fall to zero."""
    pool_warmup_fraction: float = 0.0
    """Fraction of train.steps over which loss.pool_coefficient rises linearly from 0."""
    scope: Literal["component", "layer", "bank"] = "component"
    """Layers over which the pool loss averages: those that share experts, directly or through others (published: the
    layers of a pool); each layer by itself; or all layers."""
    pressure: Literal["scope", "layer"] = "scope"
    """Whether loss.pool_coefficient weighs each set of layers of loss.scope (published), or each layer, so that maps
    with sets of other sizes push a layer equally hard."""
    balance_groups: int = 1
    """Equal runs of consecutive sequences of a batch, over each of which the pool loss takes its load fractions. 1: the
    whole batch (exact); train.batch_size / train.microbatch_size: a micro-batch; that times mesh.data x mesh.fsdp: the
    tokens that share the devices of mesh.expert; train.batch_size: a sequence. Every mesh computes the same loss."""
    expert_bias_rate: float = 1e-3
    """Change of an expert's selection bias per optimizer step, with loss.balance=expert_bias."""
    z_coefficient: float = 0.0
    """Weight of each layer's router z-loss, the mean squared logsumexp of its logits; 0 turns it off."""


@dataclass(frozen=True)
class DistillConfig:
    """Learning from another model's distribution of the next token; see docs/depth.md."""

    teacher: str | None = None
    """Run, or one checkpoint (RUN/checkpoints/STEP), that teaches this one; it is evaluated on every batch and not
    trained. It must have the same tokenizer and model.vocab_size."""
    weight: float = 0.5
    """Weight w of the divergence from the teacher in the loss, (1 - w) x cross-entropy + w x divergence; 1: the teacher
    alone."""
    temperature: float = 1.0
    """Temperature T of both distributions; the divergence is T^2 KL(teacher || model) in nats."""


@dataclass(frozen=True)
class LockConfig:
    """UniPool-lock: all layers share one pool at first; later each expert belongs to one layer.

    Phases are given as fractions of train.steps, so that they scale with the run, or as a number of steps. An extension
    of the run moves none.
    """

    ownership: Literal["none", "learned", "random_at_lock", "random_from_start"] = "none"
    """How experts are assigned to layers. `none`: no lock. `learned`: by their use in the shared phase. Controls:
    `random_at_lock`, a random partition on the same schedule; `random_from_start`, one from step 0."""
    lock_fraction: float = 2 / 60
    """Fraction of train.steps after which experts are private."""
    anneal_fraction: float = 1 / 60
    """Length of the fade before the lock, as a fraction of train.steps. The partition is fixed when the fade begins."""
    entropy_warmup_fraction: float = 1 / 60
    """Fraction of train.steps over which the entropy coefficient rises linearly from 0."""
    lock_step: int | None = None
    """Optimizer step of the lock; null uses lock.lock_fraction."""
    anneal_steps: int | None = None
    """Length of the fade in optimizer steps; null uses lock.anneal_fraction."""
    entropy_warmup_steps: int | None = None
    """Length of the entropy warm-up in optimizer steps; null uses lock.entropy_warmup_fraction."""
    entropy_coefficient: float = 5e-3
    """Weight of (entropy - ln(entropy_target))^2 in each layer, after the warm-up and to the end of the run. As
    published, the entropy (nats) is that of a micro-batch's mean scores, so it depends on train.microbatch_size."""
    entropy_target: float = 8.0
    """Effective number of experts each layer is driven to use; from 1 to the experts a layer owns after the lock."""
    coverage_threshold: float = 0.95
    """Fraction of a layer's routed tokens that the experts assigned to it should cover when the partition is fixed."""
    solver: Literal["auto", "r2_exact"] = "auto"
    """How the partition is found. `auto` maximizes the routed tokens it covers; where a layer misses
    lock.coverage_threshold, it searches for a partition that reaches it. `r2_exact` solves the published integer
    programs."""
    solver_seconds: float = 30.0
    """Time limit of one integer program in seconds; a run whose solver exceeds it stops."""
    max_loss_excess: float = 0.05
    """Tolerated rise of the validation loss (nats) over its value at the freeze; see lock.excess_evaluations."""
    excess_evaluations: int = 2
    """Consecutive evaluations above lock.max_loss_excess that stop the run."""
    count_lookback: int = 5
    """Number of most recent evaluations whose routing counts decide the assignment."""
    count_smoothing: float = 0.5
    """Weight s of the newest routing counts; those of a evaluations ago weigh s (1 - s)^a."""


@dataclass(frozen=True)
class GrowthConfig:
    """Growth in depth (Apollo): few layers at first, used as a deeper network of random depth; see docs/depth.md."""

    layers: tuple[int, ...] = ()
    """Layers N of each stage, ascending to model.num_layers; empty for a run that has all from the start. A shared pool
    has its full size from the first step."""
    ends: tuple[float, ...] = ()
    """End of each stage as a fraction of train.steps; the last is 1. An extension of the run moves none."""
    depth_law: Literal["lvps", "uniform", "sigmoid", "final", "stage"] = "lvps"
    """How deep a network each micro-batch sees, from N to L = model.num_layers. `lvps`: low depths are the likely ones,
    as published. `uniform`: all alike. `sigmoid`: mostly near N or near L. `final`: always L. `stage`: always N, which
    with growth.map=stack is stacking."""
    depth_step: int = 1
    """Depths are rounded down to L minus a multiple of this, at least N: fewer programs to compile. With pool.groups
    between 1 and model.num_layers, a multiple of it."""
    map: GrowthMap = "extend"
    """Which layer stands at place i of D, in the unrolled network and at growth. `extend`: floor(i N / D). `stack`: all
    layers in order, again and again."""
    moments: Literal["copy", "official", "zero"] = "copy"
    """Optimizer moments of layers at growth. `copy`: those of the layer that is copied. `official`: as in the published
    code, layer j keeps the moments of the old layer j, new ones have none. `zero`: none."""


@dataclass(frozen=True)
class OptimizerConfig:
    """AdamW with linear warm-up and cosine decay."""

    learning_rate: float = 5e-4
    """Peak learning rate."""
    min_learning_rate: float = 5e-5
    """Learning rate at the last step."""
    warmup_fraction: float = 0.01
    """Fraction of train.steps over which the learning rate rises linearly from 0."""
    beta1: float = 0.9
    """Decay rate of the first moment."""
    beta2: float = 0.999
    """Decay rate of the second moment."""
    epsilon: float = 1e-8
    """Epsilon added to the square root of the second moment."""
    weight_decay: float = 0.01
    """Decoupled weight decay of all matrices; norm gains, router scales and depth vectors are not decayed."""
    clip_norm: float = 1.0
    """Gradients are scaled down to this global norm where theirs is larger."""
    reuse_divisor: Literal["none", "sqrt", "linear"] = "none"
    """What the update of an expert is divided by: nothing, the square root of the number of layers that see it, or that
    number. One update changes all those layers at once."""
    reuse_decay: Literal["scaled", "compensated"] = "scaled"
    """Whether optimizer.reuse_divisor divides the weight decay of an expert with its update, or leaves it whole."""
    extension: Literal["constant", "rewarm"] = "constant"
    """Learning rate of the steps by which a finished run is extended. `constant` stays at min_learning_rate; `rewarm`
    rises to learning_rate again over warmup_fraction of the new steps and falls by another cosine."""


@dataclass(frozen=True)
class TrainConfig:
    """Length of a run, batch sizes, and how often it logs, evaluates and saves."""

    steps: int = 60_000
    """Optimizer steps of the run. `unipool train RUN train.steps=+N` extends a finished run."""
    earlier_steps: tuple[int, ...] = ()
    """Lengths of this run before it was extended, oldest first; written by the command that extends it."""
    batch_size: int = 512
    """Sequences per optimizer step, over all devices."""
    microbatch_size: int = 16
    """Sequences per forward and backward pass, over all devices; must divide train.batch_size (gradient accumulation).
    Losses depend on it only with loss.pool_statistics=previous or the entropy loss of lock.ownership."""
    seed: int = 1234
    """Seed of the initial weights and of the data order."""
    log_every: int = 10
    """Steps between training lines in metrics.jsonl and on the terminal."""
    eval_every: int = 1000
    """Steps between evaluations on the valid split; 0 evaluates only after the last step."""
    eval_batches: int | None = 100
    """Length of an evaluation during training, in batches of train.batch_size sequences; null is the full split."""
    eval_batch_size: int = 512
    """Sequences per evaluation batch, over all devices; results do not depend on it."""
    eval_slice: Literal["fixed", "moving"] = "fixed"
    """`fixed` evaluates on the same text each time; `moving` on the next slice of the shuffled valid split, as
    published."""
    checkpoint_every: int = 1000
    """Steps between checkpoints; 0 saves only after the last step or when interrupted."""
    keep_checkpoints: int = 3
    """Number of most recent checkpoints that are kept."""
    nonfinite: Literal["stop", "skip"] = "stop"
    """On a non-finite loss or gradient norm: stop with a report, or skip the update and continue."""

    @property
    def lengths(self) -> tuple[int, ...]:
        """Steps of the run as it began and after each extension. Schedules and the order of text are planned for the
        first, and go on from there with each of the others."""
        return (*self.earlier_steps, self.steps)


@dataclass(frozen=True)
class DataConfig:
    """Where text comes from and how it is split."""

    source: Literal["demo", "files", "stores", "conversations"] = "demo"
    """`demo`: the corpus in the package; `files`: data.files, tokenized once into data.cache_dir; `stores`:
    data.stores; `conversations`: prompts and responses in data.files, of which only responses are learned."""
    files: tuple[str, ...] = ()
    """Files (.txt, .text, .md, .markdown, .rst, .jsonl with or without .gz, .zst or .xz, .parquet), folders of them, or
    patterns, with data.source=files; .jsonl files with data.source=conversations. Fewer than twenty documents of
    data.source=files are cut into pieces, see docs/data.md."""
    stores: tuple[str, ...] = ()
    """Token stores built by `unipool data`, or prefixes of Megatron pairs (PREFIX.bin and PREFIX.idx),
    with data.source=stores."""
    template: str = "plain"
    """How messages become a prompt, with data.source=conversations: `prompt`, `plain`, `chatml`, or the path of a
    Jinja template."""
    tokenizer: str = "demo"
    """`bytes`, `demo`, `gpt2`, or the path of a tokenizer.json file."""
    sequence_length: int = 1024
    """Tokens S per sequence."""
    document_mask: bool = False
    """Whether documents in one sequence are kept apart: attention does not cross their borders, and positions count
    from the beginning of each. Off as published."""
    split: tuple[int, ...] = (969, 30, 1)
    """Relative sizes of the train, valid and test splits in documents; our own stores keep the split they were built
    with."""
    split_order: Literal["contiguous", "interleaved"] = "contiguous"
    """`contiguous` splits are consecutive ranges of documents; `interleaved` ones repeat the split every
    sum(data.split) documents."""
    cache_dir: str = ".cache/tokens"
    """Folder of the tokens of data.files, or of the demo corpus."""
    num_threads: int = 2
    """Threads that read and prefetch batches."""


@dataclass(frozen=True)
class MeshConfig:
    """The device mesh, whose axis sizes multiply to the number of devices, and how experts use it."""

    data: int = -1
    """Data parallelism. One axis of the mesh may be -1: the devices that the other axes leave."""
    fsdp: int = 1
    """Fully sharded data parallelism: parameters and optimizer state are sharded along model.hidden_size, matrices from
    expert width to model width along model.ffn_size, which mesh.fsdp x mesh.tensor must divide."""
    expert: int = 1
    """Expert parallelism: the batch and the experts of each pool are sharded over these devices."""
    tensor: int = 1
    """Tensor parallelism: attention heads, expert width and vocabulary are sharded."""
    topology: str | None = None
    """Devices that mode=plan plans for, such as `v5p:4x4x4` or `h100:16`; training uses the devices it finds."""
    transport: Literal["auto", "all_gather", "ragged"] = "auto"
    """How tokens reach experts on other devices. `all_gather`: each device gathers all tokens of its expert group (any
    platform). `ragged`: a ragged all-to-all (TPU and GPU). `auto`: `ragged` where it exists."""
    expert_nodes: int = 1
    """Nodes that the devices of an expert group are in, as many in each. 1: rows go straight to the devices of their
    experts. More: a token crosses to each other node once, goes to its experts inside, and one sum of outputs returns,
    which pays over slow links where moe.top_k is above this number; see docs/sharding.md."""
    capacity_factor: float | None = None
    """Capacity factor: rows a device can receive in one layer, relative to the mean; mesh.expert always suffices. null:
    3 at first, then, from each checkpoint on, 1.25 times what the steps before it needed."""
    overflow: Literal["stop", "drop"] = "stop"
    """When a device would receive more rows: stop with a report, or drop the rows of its last experts and count them as
    `overflow`, in metrics.jsonl since the previous line and in summary.json over the run."""
    expert_placement: Literal["auto", "contiguous", "strided", "measured"] = "auto"
    """Which experts share a device. `contiguous`: consecutive ones. `strided`: expert e is on device e modulo
    mesh.expert, so that every window is spread over all devices. `auto`: strided with pool.starts, else contiguous.
    `measured`: each time a run resumes, the placement that best balances the devices layer by layer under the loads of
    the last evaluation. Checkpoints and metrics keep the experts' order."""
    sparse_core_collectives: bool = False
    """On TPUs with SparseCores (v5p, v6e, 7x), gathers and reductions run there, beside the TensorCores. What that may
    gain is in docs/planner.md; no TPU has confirmed it."""


@dataclass(frozen=True)
class DistributedConfig:
    """Training in several processes, one per host or per device; see docs/clusters.md."""

    launch: Literal["auto", "cluster", "single"] = "auto"
    """`auto` connects processes where Slurm, Open MPI or the variables of Cloud TPU hosts announce them; `cluster`
    always asks JAX to find them (Cloud TPU slices without those variables); `single` is one process."""
    coordinator: str | None = None
    """HOST:PORT of process 0. Set it with distributed.num_processes and distributed.process_id where no launcher
    announces the processes."""
    num_processes: int | None = None
    """Number of processes, with distributed.coordinator."""
    process_id: int | None = None
    """Index of this process, counted from 0, with distributed.coordinator."""
    timeout_seconds: int = 60
    """Seconds without a heartbeat after which a process counts as dead and the others stop."""
    start_timeout_seconds: int = 300
    """Seconds that processes wait for each other at the start."""


@dataclass(frozen=True)
class KernelsConfig:
    """Implementation of the experts' grouped matrix products, and of attention."""

    implementation: Literal["auto", "reference", "xla", "pallas_tpu", "pallas_gpu", "mosaic_gpu"] = "auto"
    """`auto` takes the one made for the platform (docs/kernels.md); the choice is printed at the start of a run.
    `mosaic_gpu` is for one H100 or H200, with JAX 0.11."""
    attention: Literal["auto", "blocks", "splash", "cudnn"] = "auto"
    """Attention of whole sequences: `blocks` of queries, on any device; JAX's `splash` attention on TPU; `cudnn` on
    NVIDIA GPUs, with model.compute_dtype=bfloat16. `auto` takes that of the platform, and is printed too."""


@dataclass(frozen=True)
class PlanConfig:
    """What mode=plan does besides compiling the configured step."""

    search: bool = False
    """Search micro-batch size, rematerialization, mesh shape and, between nodes, mesh.expert_nodes for the highest
    modelled throughput that fits in memory."""
    compiled: int = 2
    """Number of the search's best candidates to compile."""
    figure: str = "plan.png"
    """File that the search draws its figure to."""


@dataclass(frozen=True)
class RunConfig:
    """Where a run keeps its results."""

    dir: str = "runs"
    """Folder that holds all runs."""
    name: str | None = None
    """Folder of this run inside run.dir; null derives it from scale, method, steps, seed, text and run.init_from."""
    init_from: str | None = None
    """Run, or one checkpoint (RUN/checkpoints/STEP), whose parameters a new run starts with; optimizer state, schedule
    and step are new. Everything of the architecture must be the same, but for the kind of attention."""
    allow_new: tuple[str, ...] = ()
    """What may be new in a run that starts from run.init_from: parameters that its parent does not have, which are
    initialized as in any run, and settings of the architecture with other values. Names or patterns, such as
    `pools.layers.mixture.scale` or `model.rope_*`; anything else must be the same."""
    resume: Literal["auto", "never", "required"] = "auto"
    """`auto` resumes from the newest complete checkpoint if there is one; `never` refuses a run that exists; `required`
    refuses to start a new one."""
    tensorboard: bool = True
    """Also write TensorBoard event files."""


@dataclass(frozen=True)
class Config:
    """All settings of a run."""

    model: ModelConfig = field(default_factory=ModelConfig)
    attention: AttentionConfig = field(default_factory=AttentionConfig)
    moe: MoEConfig = field(default_factory=MoEConfig)
    pool: PoolConfig = field(default_factory=PoolConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    lock: LockConfig = field(default_factory=LockConfig)
    growth: GrowthConfig = field(default_factory=GrowthConfig)
    distill: DistillConfig = field(default_factory=DistillConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    data: DataConfig = field(default_factory=DataConfig)
    mesh: MeshConfig = field(default_factory=MeshConfig)
    distributed: DistributedConfig = field(default_factory=DistributedConfig)
    kernels: KernelsConfig = field(default_factory=KernelsConfig)
    plan: PlanConfig = field(default_factory=PlanConfig)
    run: RunConfig = field(default_factory=RunConfig)
    scale_name: str = "custom"
    """Name of the scale, set by the file in configs/scale; part of the default run name."""
    method_name: str = "custom"
    """Name of the method, set by the file in configs/method; part of the default run name."""
    mode: Literal["train", "describe", "plan"] = "train"
    """`describe` prints the parameter report; `plan` reports what a step costs on the devices of mesh.topology, which
    need not be present."""

    @property
    def total_experts(self) -> int:
        """M, the number of experts in all pools together."""
        if self.pool.experts is not None:
            return self.pool.experts
        if isinstance(self.pool.starts, str):
            return self._ruled_windows(self.pool.starts).experts
        return round(self.pool.fraction * self.moe.experts_per_layer * self.mixture_layers)

    @property
    def experts_per_pool(self) -> int:
        """E, the number of experts each layer's router chooses from."""
        return self.total_experts // self.pool.groups

    def _ruled_windows(self, rule: visibility.Rule) -> visibility.Windows:
        layers, budget = self.mixture_layers, self.moe.experts_per_layer
        return visibility.RULES[rule](layers, budget, self.pool.span, self.pool.ends)

    @property
    def windows(self) -> visibility.Windows | None:
        """What each layer sees of one bank; None where layers see all experts of their pool."""
        starts, window = self.pool.starts, self.pool.window
        if starts is None:
            return None
        if isinstance(starts, str):
            ruled = self._ruled_windows(starts)
            starts, window = ruled.starts, ruled.widths if window is None else window
        widths = (window or 0,) * len(starts) if isinstance(window, int | None) else window
        return visibility.Windows(starts, widths, self.total_experts)

    @property
    def widths(self) -> tuple[int, ...] | None:
        """Experts that each layer sees; None where all layers see all experts of their pool."""
        return None if self.windows is None else self.windows.widths

    @property
    def visible(self) -> np.ndarray | None:
        """Whether a layer sees an expert of the bank, bool `[L, M]`; None where all layers see all of their pool."""
        return None if self.windows is None else self.windows.visible()

    @property
    def router_width(self) -> int:
        """Rows of each layer's router: E; with windows the widest; with UniPool-lock M, before and after the lock."""
        if self.widths is not None:
            return max(self.widths)
        return self.experts_per_pool if self.lock.ownership == "none" else self.total_experts

    @property
    def sees_all(self) -> tuple[bool, ...]:
        """Whether tokens of each layer attend to all positions before, or may, not only to attention.window of them."""
        kind, full = self.attention.kind, self.attention.full_layers
        if kind != "alternating":
            return (kind != "window",) * self.model.num_layers
        layers = range(full - 1, self.model.num_layers, full) if isinstance(full, int) else full
        return tuple(layer in layers for layer in range(self.model.num_layers))

    @property
    def locked(self) -> bool:
        """Whether this configures a model after its lock; see `after_lock`."""
        return self.lock.ownership != "none" and self.pool.groups == self.mixture_layers

    def after_lock(self) -> Config:
        """The configuration after the lock: G = L pools of K = M / L experts behind routers of M logits."""
        return dataclasses.replace(self, pool=dataclasses.replace(self.pool, groups=self.mixture_layers))

    @property
    def shared_width(self) -> int:
        """Width of each layer's always-on experts together."""
        return self.moe.shared_experts * self.model.ffn_size

    @property
    def dense_width(self) -> int:
        """Hidden width of the blocks of moe.dense_layers."""
        active = (self.moe.top_k + self.moe.shared_experts) * self.model.ffn_size
        return active if self.moe.dense_ffn_size is None else self.moe.dense_ffn_size

    @property
    def mixture_layers(self) -> int:
        """Layers that have a pool, and rows of routing statistics: all but the first moe.dense_layers."""
        return self.model.num_layers - self.moe.dense_layers

    @property
    def layers_per_pool(self) -> int:
        """Adjacent layers that share one pool, L / G."""
        return self.mixture_layers // self.pool.groups

    @property
    def positions(self) -> int:
        """Positions that the model can read: those of training, or more with scaled rotary positions."""
        original = self.model.rope_original_length
        if self.model.rope_scaling == "none" or original is None:
            return self.data.sequence_length
        return int(self.model.rope_factor * original)

    @property
    def head_size(self) -> int:
        """Channels of one attention head."""
        model = self.model
        return model.hidden_size // model.num_heads if model.head_size is None else model.head_size

    @property
    def norms_experts(self) -> bool:
        """Whether the output of each routed expert is normalized, before its gate."""
        model = self.model
        return model.norm != "pre" and self.moe.router != "none" and model.post_norm_experts == "norm_then_gate"

    @property
    def num_microbatches(self) -> int:
        """Forward and backward passes per optimizer step."""
        return self.train.batch_size // self.train.microbatch_size

    @property
    def balance_parts(self) -> int:
        """Balance groups of a micro-batch; 1 where it is in one."""
        return max(self.loss.balance_groups // self.num_microbatches, 1)

    @property
    def balance_sequences(self) -> int:
        """Sequences of a micro-batch over which one balance loss is computed, where it has several of them."""
        if self.loss.balance == "pool" and self.balance_parts > 1:
            return self.train.microbatch_size // self.balance_parts
        return self.loss.switch_group_sequences

    @property
    def recomputes_attention(self) -> bool:
        """Whether the backward pass computes the attention block of a layer again."""
        return self.model.remat in ("attention", "full")

    @property
    def microbatch_loss(self) -> str | None:
        """The setting, with its value, that makes losses depend on train.microbatch_size; None where none does."""
        if self.loss.balance == "pool" and self.loss.pool_statistics == "previous":
            return "loss.pool_statistics=previous"
        if self.lock.ownership != "none" and self.lock.entropy_coefficient:
            return f"lock.entropy_coefficient={self.lock.entropy_coefficient:g}"
        return None

    @property
    def tokens_per_step(self) -> int:
        """Tokens per optimizer step."""
        return self.train.batch_size * self.data.sequence_length


def to_mapping(config: Config) -> dict[str, Any]:
    """The configuration as nested dictionaries of plain values."""
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
