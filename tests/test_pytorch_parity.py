"""Our model and the PyTorch twin compute the same numbers: two implementations of one paper, written apart."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from benchmarks.pytorch_baseline.model import Transformer, first_std
from benchmarks.pytorch_baseline.positions import frequencies
from benchmarks.pytorch_baseline.settings import Settings
from benchmarks.pytorch_baseline.sharing import balance_sets
from benchmarks.pytorch_baseline.train import Trainer
from benchmarks.twin_settings import twin_settings
from tiny import METHODS, WINDOWS, slow_among, tiny_batch, tiny_config
from twin import by_name, in_our_structure, random_state, torch_batch, twin_of
from unipool_jax.config.schema import Config, ModelConfig
from unipool_jax.data.pipeline import Batch
from unipool_jax.model.rope import slowdown
from unipool_jax.model.transformer import forward
from unipool_jax.moe.opening import open_experts
from unipool_jax.moe.scope import pool_scope
from unipool_jax.parallel.head import Head
from unipool_jax.training.state import TrainState
from unipool_jax.training.step import make_train_step

pytestmark = pytest.mark.filterwarnings("ignore:NormRouter over")

METHOD_STEPS, SURE_STEPS, OTHER_STEPS = 100, 40, 3
_SMALL = ("train.microbatch_size=2", "loss.switch_group_sequences=2")
VARIANTS = {
    **{method: (method, *(() if method == "dense" else ("moe.experts_per_layer=4",))) for method in METHODS},
    "unipool in 2 pools, z-loss": ("unipool", "pool.groups=2", "loss.z_coefficient=1e-3"),
    "unipool top-2, reduced pool, c = 1, heads of 6 channels": (
        *("unipool", "moe.top_k=2", "pool.experts=5", "moe.score_constant=one", "model.head_size=6"),
    ),
    "vanilla top-2, micro-batches": ("vanilla", "moe.top_k=2", "moe.experts_per_layer=4", *_SMALL),
    "aux-free top-2, micro-batches": ("vanilla_aux_free", "moe.top_k=2", "moe.experts_per_layer=4", *_SMALL),
    "shared_pool_aux top-3, z-loss": ("shared_pool_aux", "moe.top_k=3", "loss.z_coefficient=1e-2"),
    "unipool top-2, one micro-batch behind": ("unipool", "moe.top_k=2", "loss.pool_statistics=previous", *_SMALL),
    "unipool, exact, micro-batches": ("unipool", *_SMALL),
    "documents apart, YaRN": (
        *("unipool", "moe.experts_per_layer=4", "data.document_mask=true", "data.sequence_length=16"),
        *("model.rope_scaling=yarn", "model.rope_factor=2", "model.rope_original_length=8", "model.rope_base=10"),
    ),
    "windows and one full layer": (
        *("unipool", "moe.experts_per_layer=4", "attention.kind=alternating", "attention.window=3"),
        "attention.full_layers=[1]",
    ),
    "switch attention, documents apart, dense layer": (
        *("unipool", "moe.experts_per_layer=4", "moe.dense_layers=1", "attention.kind=switch", "attention.window=3"),
        *("attention.switch_weight=0.1", "data.document_mask=true"),
    ),
}

# With settings that the methods leave alone.
SHARING = {
    "unipool_centered": (),
    "ring": ("loss.pool_scores=normalized", "loss.pool_warmup_fraction=0.05", "loss.pressure=layer"),
    "sliding": ("moe.top_k=2", "loss.z_coefficient=1e-3", "optimizer.reuse_divisor=linear", *_SMALL),
    "rexmoe": ("pool.opening=[0.005,0.025]",),
    "tied_inner": ("optimizer.reuse_decay=compensated",),
    "bank_runs": ("moe.top_k=2",),
    "cyclic": (),
    "cs_moe": ("moe.shared_experts=2", "moe.shared_expert_gate=true"),
    "more": ("moe.dense_layers=1", "moe.dense_ffn_size=20", *_SMALL),
}

NORMS = {
    "dense, sandwich": ("dense", "model.norm=sandwich", "model.post_norm_epsilon=1e-5"),
    "norms of experts": (
        *("unipool", "model.norm=depth_scaled_sandwich", "moe.top_k=2", "moe.dense_layers=1"),
        *("moe.shared_experts=1", "moe.shared_expert_gate=true"),
    ),
    "norms of sums": ("vanilla", "model.norm=sandwich", "model.post_norm_experts=post", "moe.top_k=2"),
    "norms around attention": ("unipool", "model.norm=sandwich", "model.post_norm_experts=none"),
}

ROPE = (
    {"rope_scaling": "yarn", "rope_base": 1e6, "rope_original_length": 1024, "rope_factor": 4.0},
    {"rope_scaling": "yarn", "rope_original_length": 256, "rope_beta_fast": 16.0, "rope_beta_slow": 2.0},
    {"rope_scaling": "linear", "rope_original_length": 64, "rope_factor": 2.0},
)

SLOW_VARIANTS = {
    "vanilla_normrouter",
    "shared_layer_aux",
    "unipool in 2 pools, z-loss",
    "vanilla top-2, micro-batches",
    "aux-free top-2, micro-batches",
    "shared_pool_aux",
    "shared_pool_aux top-3, z-loss",
    "unipool top-2, reduced pool, c = 1, heads of 6 channels",
    "documents apart, YaRN",
    "switch attention, documents apart, dense layer",
    "unipool_centered",
    "tied_inner",
    "cyclic",
    "ring",
    "bank_runs",
    *(name for name in NORMS if name != "norms of experts"),
}


def relative(a: np.ndarray, b: np.ndarray) -> float:
    """Norm of the difference over the norm, over full arrays."""
    wide = np.asarray(b, np.float64)
    return float(np.linalg.norm(a - wide)) / max(float(np.linalg.norm(wide)), 1e-30)


def logits(config: Config, state: TrainState, batch: Batch) -> np.ndarray:
    bias = state.balance.expert_bias_GNE
    run = jax.jit(lambda params: forward(config, params, batch.inputs, bias, None, batch.segments)[0])
    return np.asarray(run(state.params))


def moments(state: TrainState) -> dict[str, np.ndarray]:
    """Adam's first moments: from one step to the next they tell the gradient, as it was after clipping."""
    return by_name(state.opt_state[1][0].mu)


def weights_gap(config: Config, trainer: Trainer, state: TrainState) -> float:
    """The largest relative difference of a parameter."""
    found, ours = in_our_structure(config, dict(trainer.model.named_parameters())), by_name(state.params)
    return max(relative(found[name], ours[name]) for name in ours)


@pytest.mark.parametrize(
    "variant",
    slow_among(VARIANTS, SLOW_VARIANTS),
)
def test_float32(variant: str) -> None:
    """Logits, losses and gradients agree, and 100 steps of each method stay together.

    Both choose experts by comparing float32 scores, so sooner or later a near tie falls differently and one token
    takes another expert. Until that happens the gap in the loss grows slowly from 1e-6 nats: to 1e-5 in most methods,
    to 1e-3 with NormRouter over four experts.
    """
    steps = METHOD_STEPS if variant in METHODS else OTHER_STEPS
    # Strong decay, so that 40 steps tell which tensors it reaches.
    config = tiny_config(*VARIANTS[variant], "train.steps=100", "optimizer.weight_decay=0.1")
    state = random_state(config)
    trainer = twin_of(config, state)
    batch = tiny_batch(config)
    theirs = trainer.model(torch_batch(batch)[0])[0].detach().numpy()
    assert relative(theirs, logits(config, state, batch)) < 1e-5
    gaps, last = compare_steps(config, state, trainer, steps)
    print(f"{variant}: {len(gaps)} steps together, gap in the loss {max(gaps):.1e} nats, in the weights {last:.1e}")
    assert len(gaps) >= min(steps, SURE_STEPS)
    assert max(gaps[:SURE_STEPS]) < 1e-4
    assert max(gaps) < 1e-2
    assert last < 3e-2


FEW_STEPS = {**{name: (name, *WINDOWS.get(name, ()), *words) for name, words in SHARING.items()}, **NORMS}


@pytest.mark.parametrize("variant", slow_among(FEW_STEPS, SLOW_VARIANTS))
def test_methods_of_sharing_and_norms(variant: str) -> None:
    """Losses, gradients and new weights of three steps; which experts are open in them is drawn by us alone."""
    words = ("train.steps=100", "optimizer.weight_decay=0.1", "optimizer.warmup_fraction=0")
    config = tiny_config(*FEW_STEPS[variant], *words)
    state = random_state(config)
    gaps, last = compare_steps(config, state, twin_of(config, state), OTHER_STEPS)
    assert len(gaps) == OTHER_STEPS
    assert max(gaps) < 1e-5
    assert last < 1e-4


@pytest.mark.parametrize("words", [(), ("model.init=tiny", "model.norm=depth_scaled_sandwich")], ids=str)
def test_both_begin_with_weights_of_the_same_size(words: tuple[str, ...]) -> None:
    config = tiny_config("unipool", "moe.shared_experts=1", "moe.dense_layers=1", "model.embedding_std=0.4", *words)
    settings, model, found = twin_settings(config), config.model, dict[str, float]()
    for name in dict(Transformer(settings, max_length=8).named_parameters()):
        found[name.split(".", 2)[2] if name.startswith("layers.2.") else name] = first_std(settings, name)
    expected = {
        "embedding.weight": 0.4,
        "output.weight": model.matrix_std,
        "attention.qkv.weight": model.matrix_std,
        "attention.out.weight": model.output_std,
        "ffn.router.weight": model.init_std,
        "ffn.shared.block.down.weight": model.output_std,
        "experts.0.gate_up": model.matrix_std,
        "experts.0.down": model.output_std,
    }
    assert {name: found[name] for name in expected} == pytest.approx(expected)


@pytest.mark.parametrize("pressure", ["scope", "layer"])
@pytest.mark.parametrize("scope", ["layer", "component", "bank"])
@pytest.mark.parametrize("words", ["pool.starts=ring", "pool.starts=sliding", "pool.starts=wide_runs", "pool.groups=2"])
def test_both_balance_over_the_same_layers_and_shares(words: str, scope: str, pressure: str) -> None:
    config = tiny_config("unipool", words, f"loss.scope={scope}", f"loss.pressure={pressure}")
    table = pool_scope(config)
    if table is None:  # the published loss, in which the twin has the same sets as below
        return
    sets = sorted(balance_sets(twin_settings(config)))
    assert [members.layers for members in sets] == [np.flatnonzero(row).tolist() for row in table.mean_SL]
    for members, weight_M in zip(sets, table.weight_SM, strict=True):
        expected = np.zeros(config.total_experts)
        for expert, share in members.target.items():
            expected[expert] = members.weight / share
        np.testing.assert_allclose(weight_M, expected, rtol=1e-6)


def compare_steps(config: Config, state: TrainState, trainer: Trainer, steps: int) -> tuple[list[float], float]:
    """Train both until they choose other experts, with losses and gradients compared over the first steps.

    Returns:
      The gap in the loss of each step, nats, and the largest relative gap of a parameter at the end.
    """
    step, beta, gaps = make_train_step(config), config.optimizer.beta1, list[float]()
    old = {name: np.zeros_like(value) for name, value in moments(state).items()}
    for number in range(steps):
        batch = tiny_batch(config, seed=number % 4)
        opened = open_experts(config, jnp.int32(number))
        open_LM = None if opened is None else torch.from_numpy(np.asarray(opened[0]) > 0)
        state, metrics = step(state, batch)
        losses = trainer.step(*torch_batch(batch), open_LM)
        if "counts" in losses and not np.array_equal(losses["counts"], metrics["counts_LE"]):
            break
        gaps.append(abs(float(losses["total"]) - float(metrics["loss/total"])))
        if number + 1 == SURE_STEPS:
            assert weights_gap(config, trainer, state) < 1e-4
        if number >= OTHER_STEPS:
            continue
        for name in ("lm", "balance", "z", "total"):
            assert float(losses[name]) == pytest.approx(float(metrics[f"loss/{name}"]), rel=1e-5, abs=1e-9), name
        assert float(losses["grad_norm"]) == pytest.approx(float(metrics["grad_norm"]), rel=1e-4)
        new = moments(state)
        found = in_our_structure(
            config, {name: p.grad for name, p in trainer.model.named_parameters() if p.grad is not None}
        )
        errors = {name: relative(found[name], (new[name] - beta * old[name]) / (1 - beta)) for name in new}
        assert max(errors.values()) < 1e-4, errors
        old = new
    return gaps, weights_gap(config, trainer, state)


BFLOAT16 = {
    "dense": ("dense",),
    "unipool": ("unipool",),
    "unipool, every expert": ("unipool", "moe.top_k=8"),
}


@pytest.mark.parametrize("variant", BFLOAT16)
def test_bfloat16(variant: str) -> None:
    """With bfloat16 activations (8 bits of precision) two orders of operations differ by a few roundings.

    A token whose best experts are nearly equal may then take either, so where there is a choice the typical position
    is compared, and gradients where there is none.
    """
    config = tiny_config(*BFLOAT16[variant], "model.compute_dtype=bfloat16", "moe.router_dtype=bfloat16")
    state, batch = random_state(config), tiny_batch(config)
    trainer = twin_of(config, state)
    tokens, targets = torch_batch(batch)
    theirs, ours = trainer.model(tokens)[0].detach().numpy(), logits(config, state, batch)
    per_position = np.linalg.norm(theirs - ours, axis=-1) / np.linalg.norm(ours, axis=-1)

    state, metrics = make_train_step(config)(state, batch)
    losses = trainer.step(tokens, targets)
    loss_gap = abs(float(losses["total"]) / float(metrics["loss/total"]) - 1)
    new = moments(state)
    found = in_our_structure(
        config, {name: p.grad for name, p in trainer.model.named_parameters() if p.grad is not None}
    )
    gradient = np.concatenate([new[name].ravel() for name in new]) / (1 - config.optimizer.beta1)
    gradient_gap = relative(np.concatenate([found[name].ravel() for name in new]), gradient)
    print(
        f"{variant}: logits {np.median(per_position):.1e} (largest {per_position.max():.1e}), "
        f"loss {loss_gap:.1e}, gradient {gradient_gap:.1e}"
    )
    assert np.median(per_position) < 0.04
    assert loss_gap < 2e-3
    if variant in ("dense", "unipool, every expert"):
        assert gradient_gap < 0.12


@pytest.mark.parametrize("temperature", [1.0, 3.0])
def test_both_learn_the_same_of_a_teacher(temperature: float) -> None:
    """The loss with a teacher, and its gradient, against PyTorch's cross-entropy and Kullback-Leibler divergence."""
    random, weight = np.random.default_rng(0), 0.3
    hidden, output, theirs = (random.normal(size=size).astype(np.float32) for size in ((2, 5, 8), (40, 8), (2, 5, 40)))
    targets, weights = random.integers(0, 40, (2, 5)), random.integers(0, 3, (2, 5)).astype(np.float32)
    teacher = Head(jnp.asarray(theirs), jnp.eye(40))

    x, table, known = (
        torch.tensor(hidden, requires_grad=True),
        torch.tensor(output, requires_grad=True),
        torch.tensor(theirs),
    )
    logits = x @ table.T
    text = torch.nn.functional.cross_entropy(
        logits.flatten(0, 1), torch.from_numpy(targets).flatten(), reduction="none"
    )
    ours, told = ((values / temperature).log_softmax(-1) for values in (logits, known))
    apart = torch.nn.functional.kl_div(ours, told, reduction="none", log_target=True).sum(-1) * temperature**2
    loss = ((1 - weight) * text.view(2, 5) + weight * apart).mul(torch.from_numpy(weights)).sum()
    loss.backward()

    def learned(head: Head) -> jax.Array:
        return head.distilled_loss(teacher, targets, weights, weight, temperature)[0]

    value, grads = jax.jit(jax.value_and_grad(learned))(Head(jnp.asarray(hidden), jnp.asarray(output)))
    assert float(value) == pytest.approx(loss.item(), rel=1e-5)
    assert x.grad is not None
    assert table.grad is not None
    assert relative(np.asarray(grads.hidden_BSD), x.grad.numpy()) < 1e-5
    assert relative(np.asarray(grads.output_VD), table.grad.numpy()) < 1e-5


@pytest.mark.parametrize("settings", ROPE)
def test_both_scale_the_same_frequencies(settings: dict[str, Any]) -> None:
    model, channels = ModelConfig(**settings), 64
    plain = model.rope_base ** (-np.arange(0, channels, 2) / channels)
    theirs = frequencies(Settings(hidden_size=channels, num_heads=1, **settings | {"rope_base": model.rope_base}))
    np.testing.assert_allclose(plain * slowdown(model, channels), theirs, rtol=1e-6)
