"""What each setting does to a run: one table, from which follows what may change when a run resumes, what two runs
must have in common to be compared, and what processes of one run must agree on.

A setting that changes what training computes, or what an evaluation reports, is frozen for the life of a run. Where
that depends on other settings, the entry is a function of the configuration. A setting that only changes the order of
sums (`rounding`) may follow the machine: losses then agree to rounding, not to the bit.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from unipool_jax.config.schema import Config, settings

When = bool | Callable[[Config], bool]
Kind = Literal["numbers", "measured", "place", "rounding", "free"]


@dataclass(frozen=True)
class Effect:
    """What a setting does."""

    numbers: When = False
    """Changes what training computes, or whether a run goes on."""
    measured: When = False
    """Changes what evaluations report: their text, or how it is cut."""
    place: bool = False
    """Says where text or tokenizer lie. What they hold is compared by fingerprint, so they may move."""
    rounding: bool = False
    """Changes only the order of sums."""
    local: bool = False
    """May differ between the processes of a run."""
    why: str | Callable[[Config], str] = ""
    """For people: why, where it is not plain."""


def feeds_back(config: Config) -> bool:
    """Whether evaluations decide what training computes: a partition, or which rows a measured placement drops."""
    decides = config.lock.ownership in ("learned", "random_at_lock")
    return decides or (drops(config) and config.mesh.expert_placement == "measured")


def drops(config: Config) -> bool:
    """Whether rows may be dropped, so that the mesh and its buffers change numbers."""
    return config.mesh.overflow == "drop" and config.mesh.expert != 1


def _fitted_drops(config: Config) -> bool:
    return drops(config) and config.mesh.capacity_factor is None


def _is_extended(config: Config) -> bool:
    return bool(config.train.earlier_steps)


def _moves(config: Config) -> bool:
    return config.train.eval_slice == "moving"


def _depends_on_microbatches(config: Config) -> bool:
    return config.microbatch_loss is not None or drops(config)


def _microbatch_reason(config: Config) -> str:
    return f"losses depend on it with {config.microbatch_loss}" if config.microbatch_loss else _DROPPED


_NUMBERS = Effect(numbers=True)
_FREE = Effect()
_LOCAL = Effect(local=True)
_PLACE = Effect(place=True, local=True, why="the fingerprint of what is there decides")
_TEXT = Effect(numbers=True, measured=True)
_DROPPED = "with mesh.overflow=drop it decides which rows are dropped"
_MESH = Effect(numbers=drops, rounding=True, why=_DROPPED)

TABLE: dict[str, Effect] = {
    **dict.fromkeys(
        (
            *("model.num_layers", "model.hidden_size", "model.num_heads", "model.num_kv_heads", "model.ffn_size"),
            "model.head_size",
            *("model.rope_scaling", "model.rope_factor", "model.rope_original_length", "model.rope_beta_fast"),
            *("model.rope_beta_slow", "model.rope_attention_factor"),
            *("model.vocab_size", "model.rope_base", "model.norm_epsilon", "model.init_std", "model.compute_dtype"),
            *("model.norm", "model.post_norm_attention", "model.post_norm_ffn", "model.post_norm_epsilon"),
            *("model.post_norm_experts", "model.init", "model.embedding_std"),
            *("attention.kind", "attention.window", "attention.full_layers", "attention.gate"),
            *("attention.switch_weight", "attention.switch_epsilon", "attention.switch_alpha"),
            *("attention.switch_weighting", "attention.disagreement"),
            *("moe.router", "moe.experts_per_layer", "moe.top_k", "moe.router_dtype"),
            *("moe.score_constant", "moe.score_epsilon", "moe.score_centering"),
            *("moe.shared_experts", "moe.shared_expert_gate", "moe.depth_vectors"),
            *("moe.dense_layers", "moe.dense_ffn_size"),
            *("pool.groups", "pool.fraction", "pool.experts", "pool.starts", "pool.window", "pool.span", "pool.ends"),
            "pool.opening",
            *("loss.balance", "loss.switch_coefficient", "loss.switch_group_sequences", "loss.pool_coefficient"),
            *("loss.pool_statistics", "loss.pool_scores", "loss.pool_warmup_fraction", "loss.scope", "loss.pressure"),
            "loss.balance_groups",
            *("loss.expert_bias_rate", "loss.z_coefficient"),
            *("distill.teacher", "distill.weight", "distill.temperature"),
            *("lock.ownership", "lock.lock_fraction", "lock.anneal_fraction", "lock.entropy_warmup_fraction"),
            *("lock.lock_step", "lock.anneal_steps", "lock.entropy_warmup_steps", "lock.entropy_coefficient"),
            *("lock.entropy_target", "lock.coverage_threshold", "lock.solver", "lock.max_loss_excess"),
            *("lock.excess_evaluations", "lock.count_lookback", "lock.count_smoothing"),
            *("growth.layers", "growth.ends", "growth.depth_law", "growth.depth_step", "growth.map", "growth.moments"),
            *("optimizer.learning_rate", "optimizer.min_learning_rate", "optimizer.warmup_fraction"),
            *("optimizer.beta1", "optimizer.beta2", "optimizer.epsilon", "optimizer.weight_decay"),
            *("optimizer.reuse_divisor", "optimizer.reuse_decay"),
            *("optimizer.clip_norm", "train.steps", "train.earlier_steps", "train.batch_size", "train.seed"),
        ),
        _NUMBERS,
    ),
    "model.remat": Effect(rounding=True, why="what is computed twice is the same"),
    "lock.solver_seconds": Effect(why="a run whose solver exceeds it stops"),
    "train.microbatch_size": Effect(numbers=_depends_on_microbatches, rounding=True, why=_microbatch_reason),
    "optimizer.extension": Effect(numbers=_is_extended, why="the run has been extended by it"),
    "train.log_every": _FREE,
    "train.eval_every": Effect(
        numbers=feeds_back, measured=_moves, why="evaluations decide a partition, or which text the next one reads"
    ),
    "train.eval_batches": Effect(numbers=feeds_back, measured=True, why="it decides the text of evaluations"),
    "train.eval_batch_size": Effect(rounding=True),
    "train.eval_slice": Effect(numbers=feeds_back, measured=True, why="it decides the text of evaluations"),
    "train.checkpoint_every": Effect(
        numbers=_fitted_drops, why="at checkpoints the buffers are fitted, from which mesh.overflow=drop drops rows"
    ),
    "train.keep_checkpoints": _FREE,
    "train.nonfinite": Effect(
        why="until a step is not finite both are the same; then `stop` has no way on but `skip`, and the step is logged"
    ),
    "data.source": Effect(place=True, why=_PLACE.why),
    **dict.fromkeys(("data.files", "data.stores", "data.tokenizer", "data.template"), _PLACE),
    **dict.fromkeys(("data.sequence_length", "data.split", "data.split_order"), _TEXT),
    # Not a setting of the text: the same tokens are predicted, so runs with and without it are compared.
    "data.document_mask": _NUMBERS,
    **dict.fromkeys(("data.cache_dir", "data.num_threads"), _LOCAL),
    **dict.fromkeys(("mesh.data", "mesh.fsdp", "mesh.expert", "mesh.expert_placement"), _MESH),
    **dict.fromkeys(
        (
            *("mesh.tensor", "mesh.transport", "mesh.expert_nodes", "mesh.sparse_core_collectives"),
            *("kernels.implementation", "kernels.attention"),
        ),
        Effect(rounding=True),
    ),
    **dict.fromkeys(("run.init_from", "run.allow_new"), Effect(numbers=True, why="a run starts once")),
    "mesh.topology": Effect(why="only mode=plan reads it"),
    **dict.fromkeys(("mesh.capacity_factor", "mesh.overflow"), Effect(numbers=drops, why=_DROPPED)),
    **dict.fromkeys(
        (
            *("distributed.launch", "distributed.coordinator", "distributed.process_id"),
            *("run.dir", "run.tensorboard"),
        ),
        _LOCAL,
    ),
    **dict.fromkeys(
        ("distributed.num_processes", "distributed.timeout_seconds", "distributed.start_timeout_seconds"), _FREE
    ),
    **dict.fromkeys(("plan.search", "plan.compiled", "plan.figure", "mode"), _FREE),
    **dict.fromkeys(("run.name", "run.resume", "scale_name", "method_name"), _FREE),
}
"""Every setting of the schema by its dotted name; a test fails for one that is missing."""


def kind(name: str, config: Config) -> Kind:
    """The strongest thing that setting `name` does in a run of `config`."""
    effect = TABLE[name]
    if _holds(effect.numbers, config):
        return "numbers"
    if _holds(effect.measured, config):
        return "measured"
    return "place" if effect.place else "rounding" if effect.rounding else "free"


def frozen_differences(stored: Config, wanted: Config, *, places: bool = True) -> list[str]:
    """Settings that differ although a run of `stored` must keep them, in the order of the schema.

    Args:
      stored, wanted: two configurations; a setting is frozen if it is so in either.
      places: whether places of text count; leave them out where fingerprints of the text are compared.
    """
    frozen = {"numbers", "measured", "place"} if places else {"numbers", "measured"}
    ours, theirs = settings(stored), settings(wanted)
    return [
        name
        for name, value in ours.items()
        if value != theirs[name] and not frozen.isdisjoint({kind(name, stored), kind(name, wanted)})
    ]


def reason(name: str, stored: Config, wanted: Config) -> str:
    """Why setting `name` is frozen in a run of `stored`, in brackets; empty where it always is."""
    effect = TABLE[name]
    if isinstance(effect.numbers, bool) or not effect.why:
        return ""
    frozen_in = stored if kind(name, stored) in ("numbers", "measured") else wanted
    return f" ({effect.why if isinstance(effect.why, str) else effect.why(frozen_in)})"


def measured_settings(config: Config) -> list[str]:
    """Settings that decide what an evaluation of `config` reports, besides the content of its text."""
    return [name for name, effect in TABLE.items() if _holds(effect.measured, config)]


def shared_settings() -> list[str]:
    """Settings that all processes of a run must have in common."""
    return [name for name, effect in TABLE.items() if not effect.local]


def _holds(when: When, config: Config) -> bool:
    return when if isinstance(when, bool) else when(config)
