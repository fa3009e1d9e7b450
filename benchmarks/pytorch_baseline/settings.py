"""Settings of the twin: one flat dataclass, with the published 182M UniPool recipe as defaults."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Settings:
    """A model, its balance losses and its optimizer."""

    num_layers: int = 12
    hidden_size: int = 768
    num_heads: int = 12
    head_channels: int | None = None
    """Of an attention head; None is hidden_size / num_heads."""
    num_kv_heads: int = 4
    ffn_size: int = 3072
    vocab_size: int = 51200
    rope_base: float = 1e6
    rope_scaling: Literal["none", "linear", "yarn"] = "none"
    rope_factor: float = 1.0
    rope_original_length: int = 1024
    rope_beta_fast: float = 32.0
    rope_beta_slow: float = 1.0
    rope_attention_factor: float | None = None
    end_of_document: int | None = None
    """The token behind which another document begins that does not see this one; None: a row is one text."""
    norm_epsilon: float = 1e-5
    norm: Literal["pre", "sandwich", "depth_scaled_sandwich"] = "pre"
    """Norms of the input of each block; of its output too; of its output with gains that start small."""
    post_norm_attention: float = 0.283
    post_norm_ffn: float = 0.432
    post_norm_epsilon: float = 1e-8
    post_norm_experts: Literal["norm_then_gate", "post", "none"] = "norm_then_gate"
    """What is normalized behind a mixture: the output of each expert before its gate, their sum, or nothing."""
    windows: tuple[int | None, ...] = ()
    """Of each layer, the positions that a token attends to, its own among them; None, or no entry, is all before it."""
    switch_window: int | None = None
    """With Switch Attention, the positions of its window; None: no router chooses what a token attends to."""
    switch_weight: float = 1e-3
    """Of the penalty on full attention."""
    switch_epsilon: float = 0.1
    switch_alpha: float = 100.0
    switch_fixed: bool = False
    """Whether all tokens have that weight, not one over switch_epsilon + their loss + switch_alpha x disagreement."""
    init: Literal["base", "tiny"] = "base"
    """`tiny`: weights with variance 1 / (2 D L), routers aside."""
    init_std: float = 0.01
    embedding_std: float | None = None
    """None: init_std, or 0.5 with `tiny`."""
    dtype: Literal["float32", "bfloat16"] = "bfloat16"
    """Of activations, and of weights at use; parameters and optimizer state are float32."""
    recompute: Literal["none", "moe", "full"] = "moe"
    """What the backward pass recomputes: nothing, the mixture of each layer, or each full layer."""

    router: Literal["none", "softmax", "sigmoid", "norm"] = "norm"
    """`none` is the dense model."""
    num_pools: int = 1
    """1 is UniPool, num_layers the ordinary mixture."""
    experts_per_pool: int = 96
    starts: tuple[int, ...] | None = None
    """With one pool, the first expert that each layer sees; None: all layers see all experts of their pool."""
    widths: tuple[int, ...] | None = None
    """With starts, how many experts each layer sees, around the end of the bank."""
    top_k: int = 1
    router_dtype: Literal["float32", "bfloat16"] = "float32"
    score_constant: Literal["monte_carlo", "one"] = "monte_carlo"
    score_epsilon: float = 1e-8
    score_centering: bool = False
    """Whether the mean over the experts of a layer is taken from its router's logits."""
    shared_experts: int = 0
    """Experts of every layer that all tokens visit: one block of their width together."""
    shared_expert_gate: bool = False
    """Whether a sigmoid of the input scales what they add."""
    depth_vectors: bool = False
    """Whether a layer adds a vector of its own to the input of its router and experts."""
    dense_layers: int = 0
    """First layers with one block in place of experts."""
    dense_width: int = 0
    """Hidden width of that block."""

    balance: Literal["none", "switch", "pool", "expert_bias"] = "pool"
    pool_statistics: Literal["current", "previous"] = "current"
    scope: Literal["component", "layer", "bank"] = "component"
    """Layers over which the pool loss averages: those that share experts, each layer, or all layers."""
    pressure: Literal["scope", "layer"] = "scope"
    """Whether the pool loss of some layers is weighed by their share of all layers."""
    pool_scores: Literal["raw", "normalized"] = "raw"
    """Scores in the pool loss, or scores over their sum per token."""
    pool_warmup_fraction: float = 0.0
    """Part of the steps over which the coefficient of the pool loss rises from 0."""
    switch_coefficient: float = 1e-2
    switch_group_sequences: int = 16
    pool_coefficient: float = 1e-2
    z_coefficient: float = 0.0
    expert_bias_rate: float = 1e-3

    steps: int = 60_000
    microbatch_size: int = 16
    learning_rate: float = 5e-4
    min_learning_rate: float = 5e-5
    warmup_fraction: float = 0.01
    beta1: float = 0.9
    beta2: float = 0.999
    epsilon: float = 1e-8
    weight_decay: float = 0.01
    clip_norm: float = 1.0
    reuse_divisor: Literal["none", "sqrt", "linear"] = "none"
    """What the update of an expert is divided by: nothing, or the number of layers that see it, or its root."""
    reuse_decay: Literal["scaled", "compensated"] = "scaled"
    """Whether the weight decay of an expert is divided too."""
    seed: int = 1234

    @property
    def layers_per_pool(self) -> int:
        """Adjacent layers that share one pool."""
        return self.mixture_layers // self.num_pools

    @property
    def mixture_layers(self) -> int:
        """Layers that have experts."""
        return self.num_layers - self.dense_layers

    def window(self, layer: int) -> int | None:
        """Positions that a token attends to in a layer; None is all before it."""
        return self.windows[layer] if self.windows else None

    @property
    def head_size(self) -> int:
        """Channels of one attention head."""
        return self.hidden_size // self.num_heads if self.head_channels is None else self.head_channels
