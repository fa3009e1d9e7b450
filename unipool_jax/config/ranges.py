"""Allowed range of every number in the configuration."""

from __future__ import annotations

from typing import NamedTuple

MAX_EXPERTS = 16_384
"""Experts in all pools together; the published models have at most 384."""


class Range(NamedTuple):
    """An interval; `open_low` and `open_high` exclude the bounds."""

    low: float
    high: float
    open_low: bool = False
    open_high: bool = False

    def __contains__(self, value: object) -> bool:
        assert isinstance(value, int | float)
        above = value > self.low if self.open_low else value >= self.low
        return above and (value < self.high if self.open_high else value <= self.high)

    def __str__(self) -> str:
        low = f"more than {self.low:g}" if self.open_low else f"at least {self.low:.10g}"
        return f"{low} and {'less than' if self.open_high else 'at most'} {self.high:.10g}"


_COEFFICIENT = Range(0, 1000)
_AXIS = Range(-1, 1_048_576)
_EPSILON = Range(1e-30, 1)  # float32 underflows to 0 near 1e-38, and the division would be unprotected

RANGES = {
    "model.num_layers": Range(1, 1024),
    "model.hidden_size": Range(2, 65_536),
    "model.num_heads": Range(1, 1024),
    "model.num_kv_heads": Range(1, 1024),
    "model.head_size": Range(2, 65_536),
    "model.ffn_size": Range(1, 1_048_576),
    "model.vocab_size": Range(2, 4_194_304),
    "model.rope_base": Range(1, 1e12, open_low=True),
    "model.rope_factor": Range(1, 1024),
    "model.rope_original_length": Range(2, 1_048_576),
    "model.rope_beta_fast": Range(0, 1e6, open_low=True),
    "model.rope_beta_slow": Range(0, 1e6, open_low=True),
    "model.rope_attention_factor": Range(0, 100, open_low=True),
    "model.norm_epsilon": _EPSILON,
    "model.post_norm_attention": Range(0, 100, open_low=True),
    "model.post_norm_ffn": Range(0, 100, open_low=True),
    "model.post_norm_epsilon": _EPSILON,
    "model.init_std": Range(0, 10, open_low=True),
    "model.embedding_std": Range(0, 10, open_low=True),
    "attention.window": Range(1, 1_048_575),
    "attention.full_layers": Range(0, 1023),
    "attention.switch_weight": _COEFFICIENT,
    "attention.switch_epsilon": Range(0, 1000, open_low=True),
    "attention.switch_alpha": Range(0, 1e6),
    "moe.experts_per_layer": Range(1, MAX_EXPERTS),
    "moe.top_k": Range(1, MAX_EXPERTS),
    "moe.score_epsilon": _EPSILON,
    "moe.shared_experts": Range(0, 1024),
    "moe.dense_layers": Range(0, 1023),
    "moe.dense_ffn_size": Range(1, 1_048_576),
    "pool.groups": Range(1, 1024),
    "pool.fraction": Range(0, 1, open_low=True),
    "pool.experts": Range(1, MAX_EXPERTS),
    "pool.starts": Range(0, MAX_EXPERTS - 1),
    "pool.window": Range(1, MAX_EXPERTS),
    "pool.span": Range(1, 1024),
    "pool.ends": Range(0, 512),
    "pool.opening": Range(0, 1),
    "loss.switch_coefficient": _COEFFICIENT,
    "loss.switch_group_sequences": Range(1, 1_048_576),
    "loss.balance_groups": Range(1, 1_048_576),
    "loss.pool_coefficient": _COEFFICIENT,
    "loss.pool_warmup_fraction": Range(0, 1),
    "loss.expert_bias_rate": Range(0, 1),
    "loss.z_coefficient": _COEFFICIENT,
    "distill.weight": Range(0, 1, open_low=True),
    "distill.temperature": Range(0, 1000, open_low=True),
    "lock.lock_fraction": Range(0, 1, open_low=True, open_high=True),
    "lock.anneal_fraction": Range(0, 1, open_low=True, open_high=True),
    "lock.entropy_warmup_fraction": Range(0, 1, open_low=True, open_high=True),
    "lock.lock_step": Range(1, 1_000_000_000),
    "lock.anneal_steps": Range(1, 1_000_000_000),
    "lock.entropy_warmup_steps": Range(1, 1_000_000_000),
    "lock.entropy_coefficient": _COEFFICIENT,
    "lock.entropy_target": Range(1, MAX_EXPERTS),
    "lock.coverage_threshold": Range(0, 1, open_low=True),
    "lock.solver_seconds": Range(0, 86_400, open_low=True),
    "lock.max_loss_excess": Range(0, 1000),
    "lock.excess_evaluations": Range(1, 1_000_000),
    "lock.count_lookback": Range(1, 1000),
    "lock.count_smoothing": Range(0, 1, open_low=True),
    "growth.layers": Range(1, 1024),
    "growth.ends": Range(0, 1, open_low=True),
    "growth.depth_step": Range(1, 1023),
    "optimizer.learning_rate": Range(0, 10, open_low=True),
    "optimizer.min_learning_rate": Range(0, 10),
    "optimizer.warmup_fraction": Range(0, 1, open_high=True),
    "optimizer.beta1": Range(0, 1, open_high=True),
    "optimizer.beta2": Range(0, 1, open_high=True),
    "optimizer.epsilon": _EPSILON,
    "optimizer.weight_decay": Range(0, 10),
    "optimizer.clip_norm": Range(0, 1e6, open_low=True),
    "train.steps": Range(1, 1_000_000_000),
    "train.batch_size": Range(1, 1_048_576),
    "train.microbatch_size": Range(1, 1_048_576),
    "train.seed": Range(0, 2**32 - 1),  # what NumPy's RandomState takes
    "train.log_every": Range(1, 1_000_000_000),
    "train.eval_every": Range(0, 1_000_000_000),
    "train.eval_batches": Range(1, 1_000_000_000),
    "train.eval_batch_size": Range(1, 1_048_576),
    "train.checkpoint_every": Range(0, 1_000_000_000),
    "train.keep_checkpoints": Range(1, 10_000),
    "data.sequence_length": Range(2, 1_048_576),
    "data.num_threads": Range(1, 256),
    "mesh.data": _AXIS,
    "mesh.fsdp": _AXIS,
    "mesh.expert": _AXIS,
    "mesh.tensor": _AXIS,
    "mesh.expert_nodes": Range(1, 65_536),
    "mesh.capacity_factor": Range(1, 1_048_576),
    "plan.compiled": Range(1, 64),
    "distributed.num_processes": Range(1, 1_048_576),
    "distributed.process_id": Range(0, 1_048_575),
    "distributed.timeout_seconds": Range(5, 86_400),
    "distributed.start_timeout_seconds": Range(5, 86_400),
}
"""Range of every number in the schema, by its dotted name."""
