"""Our model and the PyTorch twin compute the same numbers: two implementations of one paper, written apart."""

from __future__ import annotations

import jax
import numpy as np
import pytest

pytest.importorskip("torch", reason="the parity tests need PyTorch: make test-torch")

from tiny import METHODS, tiny_batch, tiny_config, tiny_state
from twin import by_name, in_our_structure, torch_batch, twin_of
from unipool_jax.model.transformer import forward
from unipool_jax.training.step import make_train_step

VARIANTS = {
    **{method: (method,) for method in METHODS},
    "unipool in 2 pools": ("unipool", "pool.groups=2"),
    "unipool, reduced pool": ("unipool", "pool.experts=5"),
    "unipool, c = 1": ("unipool", "moe.score_constant=one"),
    "unipool top-2": ("unipool", "moe.top_k=2"),
    "vanilla top-2": ("vanilla", "moe.top_k=2", "moe.experts_per_layer=4"),
    "sigmoid top-2": ("vanilla_aux_free", "moe.top_k=2", "moe.experts_per_layer=4"),
    "shared_pool_aux top-3 with z-loss": ("shared_pool_aux", "moe.top_k=3", "loss.z_coefficient=1e-2"),
    "previous": (
        "unipool",
        "loss.pool_statistics=previous",
        "train.microbatch_size=2",
        "loss.switch_group_sequences=2",
    ),
    "current, 4 micro-batches": ("unipool", "train.microbatch_size=2", "loss.switch_group_sequences=2"),
    "vanilla, 2 micro-batches": ("vanilla", "train.microbatch_size=4", "loss.switch_group_sequences=2"),
    "aux-free, 2 micro-batches": ("vanilla_aux_free", "train.microbatch_size=4"),
}


def relative(a: np.ndarray, b: np.ndarray) -> float:
    """Norm of the difference over the norm, over all entries."""
    scale = float(np.linalg.norm(np.asarray(b, np.float64)))
    return float(np.linalg.norm(np.asarray(a, np.float64) - b)) / max(scale, 1e-30)


@pytest.mark.parametrize("variant", VARIANTS)
def test_logits_losses_and_gradients(variant: str) -> None:
    # Gradients are read out of Adam's first moment, so nothing may be clipped.
    config = tiny_config(*VARIANTS[variant], "optimizer.clip_norm=1000")
    state, batch = tiny_state(config), tiny_batch(config)
    trainer = twin_of(config, state)
    tokens, targets = torch_batch(batch)

    ours = jax.jit(lambda params: forward(config, params, batch.inputs, state.balance.expert_bias_GNE)[0])(state.params)
    theirs = trainer.model(tokens)[0].detach().numpy()
    assert relative(theirs, np.asarray(ours)) < 1e-5

    step = make_train_step(config)
    # Two steps (the first has learning rate 0): the second one has seen an earlier micro-batch and a moved bias.
    beta = config.optimizer.beta1
    moments = [jax.tree.map(np.zeros_like, jax.device_get(state.params))]
    for _ in range(2):
        state, metrics = step(state, batch)
        losses = trainer.step(tokens, targets)
        for name in ("lm", "balance", "z", "total"):
            assert float(losses[name]) == pytest.approx(float(metrics[f"loss/{name}"]), rel=1e-4, abs=1e-9), name
        assert float(losses["grad_norm"]) == pytest.approx(float(metrics["grad_norm"]), rel=1e-4)
        moments.append(jax.device_get(state.opt_state[1][0].mu))
        gradients = by_name(jax.tree.map(lambda new, old: (new - beta * old) / (1 - beta), moments[-1], moments[-2]))
        found = in_our_structure(config, {n: p.grad for n, p in trainer.model.named_parameters()})
        errors = {name: relative(found[name], gradients[name]) for name in gradients}
        assert max(errors.values()) < 1e-4, errors


@pytest.mark.parametrize("method", METHODS)
def test_a_hundred_steps_stay_together(method: str) -> None:
    config = tiny_config(method, "train.steps=100")
    state = tiny_state(config)
    trainer = twin_of(config, state)
    step = make_train_step(config)
    gaps = []
    for number in range(100):
        batch = tiny_batch(config, seed=number % 4)
        state, metrics = step(state, batch)
        losses = trainer.step(*torch_batch(batch))
        gaps.append(abs(float(losses["total"]) - float(metrics["loss/total"])))
    found = in_our_structure(config, dict(trainer.model.named_parameters()))
    ours = by_name(state.params)
    errors = {name: relative(found[name], ours[name]) for name in ours}
    print(f"{method}: loss gap {max(gaps):.2e} nats, weights {max(errors.values()):.2e}")
    assert max(gaps) < 1e-3
    assert max(errors.values()) < 1e-2
