"""Our configuration as settings of the PyTorch twin; loads neither JAX nor PyTorch."""

from __future__ import annotations

from benchmarks.pytorch_baseline.settings import Settings
from unipool_jax.config.schema import Config


def twin_settings(config: Config, end_of_document: int | None = None) -> Settings:
    """The twin's settings that mean the same; with data.document_mask, `end_of_document` is the token that ends one."""
    if config.data.document_mask and end_of_document is None:
        raise ValueError("data.document_mask=true: the twin needs the end-of-document token")
    model, moe, loss, optimizer = config.model, config.moe, config.loss, config.optimizer
    attention = config.attention
    if attention.kind == "switch" and (attention.gate, attention.disagreement) != ("learned", "mean"):
        raise ValueError("attention.kind=switch: the twin has attention.gate=learned and attention.disagreement=mean")
    if model.remat == "router" or model.remat == "experts" or model.remat == "attention":
        raise ValueError(f"model.remat={model.remat}: the twin has none, moe and full")
    if loss.balance_groups != 1:
        raise ValueError(
            f"loss.balance_groups={loss.balance_groups}: the twin takes load fractions over the whole batch"
        )
    return Settings(
        num_layers=model.num_layers,
        hidden_size=model.hidden_size,
        num_heads=model.num_heads,
        head_channels=model.head_size,
        num_kv_heads=model.num_kv_heads,
        ffn_size=model.ffn_size,
        vocab_size=model.vocab_size,
        rope_base=model.rope_base,
        rope_scaling=model.rope_scaling,
        rope_factor=model.rope_factor,
        rope_original_length=model.rope_original_length or config.data.sequence_length,
        rope_beta_fast=model.rope_beta_fast,
        rope_beta_slow=model.rope_beta_slow,
        rope_attention_factor=model.rope_attention_factor,
        end_of_document=end_of_document if config.data.document_mask else None,
        norm_epsilon=model.norm_epsilon,
        windows=tuple(None if sees_all else attention.window for sees_all in config.sees_all),
        switch_window=attention.window if attention.kind == "switch" else None,
        switch_weight=attention.switch_weight,
        switch_epsilon=attention.switch_epsilon,
        switch_alpha=attention.switch_alpha,
        switch_fixed=attention.switch_weighting == "fixed",
        norm=model.norm,
        post_norm_attention=model.post_norm_attention,
        post_norm_ffn=model.post_norm_ffn,
        post_norm_epsilon=model.post_norm_epsilon,
        post_norm_experts=model.post_norm_experts,
        init=model.init,
        init_std=model.init_std,
        embedding_std=model.embedding_std,
        dtype=model.compute_dtype,
        recompute=model.remat,
        router=moe.router,
        num_pools=config.pool.groups,
        experts_per_pool=config.experts_per_pool,
        starts=None if config.windows is None else config.windows.starts,
        widths=config.widths,
        top_k=moe.top_k,
        router_dtype=moe.router_dtype,
        score_constant=moe.score_constant,
        score_epsilon=moe.score_epsilon,
        score_centering=moe.score_centering,
        shared_experts=moe.shared_experts,
        shared_expert_gate=moe.shared_expert_gate,
        depth_vectors=moe.depth_vectors,
        dense_layers=moe.dense_layers,
        dense_width=config.dense_width,
        balance=loss.balance,
        scope=loss.scope,
        pressure=loss.pressure,
        pool_scores=loss.pool_scores,
        pool_warmup_fraction=loss.pool_warmup_fraction,
        pool_statistics=loss.pool_statistics,
        switch_coefficient=loss.switch_coefficient,
        switch_group_sequences=loss.switch_group_sequences,
        pool_coefficient=loss.pool_coefficient,
        z_coefficient=loss.z_coefficient,
        expert_bias_rate=loss.expert_bias_rate,
        steps=config.train.steps,
        microbatch_size=config.train.microbatch_size,
        learning_rate=optimizer.learning_rate,
        min_learning_rate=optimizer.min_learning_rate,
        warmup_fraction=optimizer.warmup_fraction,
        beta1=optimizer.beta1,
        beta2=optimizer.beta2,
        epsilon=optimizer.epsilon,
        weight_decay=optimizer.weight_decay,
        clip_norm=optimizer.clip_norm,
        reuse_divisor=optimizer.reuse_divisor,
        reuse_decay=optimizer.reuse_decay,
    )
