"""Communication beside computation: the tie of two gradients, which changes no number, and SparseCores on request."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from planned import needs_compiler
from tiny import batch_shapes, slow_among, tiny_config
from unipool_jax.config.chips import parse_topology
from unipool_jax.config.compose import compose_config
from unipool_jax.config.schema import Config, ConfigError, MeshConfig
from unipool_jax.kernels.grouped_ffn import Bank
from unipool_jax.moe import mixture
from unipool_jax.moe.bank import Experts, gathered_bank, gradient_accumulator
from unipool_jax.moe.routing import route, scores
from unipool_jax.parallel.mesh import compiler_options, make_mesh, usable_mesh
from unipool_jax.planner.collectives import Module, kernel_inside, parse
from unipool_jax.planner.compilation import compile_step, topology_mesh
from unipool_jax.planner.roofline import schedule
from unipool_jax.planner.schedule import Window
from unipool_jax.training.state import state_shapes
from unipool_jax.training.step import make_train_step

N, D, F, E = 16, 8, 12, 4


def operands() -> tuple[jax.Array, Bank, jax.Array]:
    rng = np.random.default_rng(0)
    shapes = ((N, D), (E, D, F), (E, D, F), (E, F, D), (N, E))
    hidden_ND, gate, up, down, logits_NE = (jnp.asarray(rng.normal(size=shape), jnp.float32) for shape in shapes)
    return hidden_ND, Bank(gate, up, down), logits_NE


def loss(hidden_ND: jax.Array, bank: Bank, logits_NE: jax.Array) -> jax.Array:
    """Two layers over one bank."""
    experts = Experts(gathered_bank(bank, jnp.float32), gradient_accumulator(bank))
    routing = route(
        scores(logits_NE, "softmax", None, 1.0, 0.0), logits_NE, router="softmax", top_k=1, num_stat_groups=1
    )
    for _ in range(2):
        hidden_ND, experts, _ = mixture.moe_ffn(hidden_ND, routing, experts)
    return jnp.sum(jnp.sin(hidden_ND)) + passed(experts)


def passed(experts: Experts) -> jax.Array:
    """Zero; without it the accumulator would have no cotangent to add to."""
    assert experts.accumulator is not None
    return sum((0.0 * jnp.sum(sums) for sums in experts.accumulator), jnp.zeros(()))


def barriers(jaxpr: Any) -> list[list[tuple[int, ...]]]:
    """Shapes of the operands of every optimization barrier of a traced function, in order."""
    found = []
    for equation in jaxpr.eqns:
        if equation.primitive.name == "optimization_barrier":
            found.append([operand.aval.shape for operand in equation.invars])
        for part in jax.tree.leaves(tuple(equation.params.values()), is_leaf=lambda x: hasattr(x, "eqns")):
            inner = getattr(part, "jaxpr", part)
            found += barriers(inner) if hasattr(inner, "eqns") else []
    return found


def traced(function: Any, sizes: tuple[int, int, int, int] | None) -> Any:
    if sizes is None:
        return jax.make_jaxpr(function)(*operands())
    with jax.set_mesh(make_mesh(MeshConfig(*sizes), jax.devices()[:4])):
        return jax.make_jaxpr(function)(*operands())


def test_a_layer_ties_its_tokens_gradient_to_the_gradient_of_the_bank() -> None:
    """One barrier a layer over the hidden gradient and all three matrices, in the backward pass alone."""
    found = barriers(traced(jax.grad(loss, argnums=(0, 1)), (2, 1, 2, 1)).jaxpr)
    assert found == 2 * [[(N, D), (2, E, D, F), (2, E, D, F), (2, E, F, D)]]
    assert barriers(traced(loss, (2, 1, 2, 1)).jaxpr) == []


@pytest.mark.parametrize("sizes", [None, (2, 2, 1, 1), (2, 1, 1, 2)])
def test_without_an_exchange_nothing_is_tied(sizes: tuple[int, int, int, int] | None) -> None:
    assert barriers(traced(jax.grad(loss, argnums=(0, 1)), sizes).jaxpr) == []


@pytest.mark.parametrize("sizes", slow_among([(2, 1, 2, 1), (1, 2, 2, 1), (1, 1, 2, 2)], [(1, 2, 2, 1), (1, 1, 2, 2)]))
def test_the_tie_changes_no_bit(sizes: tuple[int, int, int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    results = []
    for tie in (mixture.tied, lambda *both: both):
        monkeypatch.setattr(mixture, "tied", tie)
        with jax.set_mesh(make_mesh(MeshConfig(*sizes), jax.devices()[:4])):
            # A new function, so that the trace of the other one is not found in the cache.
            results.append(jax.jit(lambda *given: jax.value_and_grad(loss, argnums=(0, 1, 2))(*given))(*operands()))
    for tied, apart in zip(*map(jax.tree.leaves, results), strict=True):
        assert np.any(np.asarray(tied))
        np.testing.assert_array_equal(tied, apart)


def step_barriers(*more: str, fsdp: int = 2) -> list[list[tuple[int, ...]]]:
    """`barriers` of a traced training step of four layers with two experts each, but for those of rotary positions."""
    mesh = make_mesh(MeshConfig(1, fsdp, 2, 1), jax.devices()[: 2 * fsdp])
    config = tiny_config("vanilla", "model.remat=none", *more)
    step: Any = make_train_step(config, mesh)
    with jax.set_mesh(mesh):
        found = barriers(step.trace(state_shapes(config, mesh), batch_shapes(config, mesh)).jaxpr.jaxpr)
    return [shapes for shapes in found if len(shapes) > 1]


def test_a_layer_gathers_and_scatters_its_own_experts_beside_its_attention() -> None:
    """Forward, gathered weights and what attention gives; backward, what it takes or gives and scattered gradients.

    The dense layer in front has no experts.
    """
    hidden, wide, narrow = (8, 8, 16), (2, 16, 24), (2, 24, 16)
    exchange = [(64, 16), (2, *wide), (2, *wide), (2, *narrow)]
    own = [[hidden, wide, wide, narrow], exchange, [hidden, wide], [hidden, wide, narrow]]
    assert step_barriers("moe.dense_layers=1", "pool.groups=3") == own


@pytest.mark.slow
def test_experts_of_several_layers_or_not_split_over_fsdp_are_gathered_before_them() -> None:
    for others in (step_barriers("pool.groups=2"), step_barriers(fsdp=1)):
        assert [shapes[0] for shapes in others] == [(64, 16)]


def test_sparse_cores_are_asked_for_and_refused_where_there_are_none() -> None:
    """Off, the step is compiled with no option at all; a CPU has no SparseCores."""
    assert compiler_options(MeshConfig()) == {}
    asked = MeshConfig(1, 1, 2, 1, sparse_core_collectives=True)
    assert set(compiler_options(asked).values()) == {True}
    kinds = {name.partition("offload_")[2] for name in compiler_options(asked)}
    assert kinds == {"all_gather", "reduce_scatter", "all_reduce", "2d_all_gather", "3d_all_gather"}
    config = tiny_config("unipool", "mesh.expert=2", "mesh.data=1", "mesh.sparse_core_collectives=true")
    with pytest.raises(ConfigError, match=r"mesh.sparse_core_collectives=true: CPU devices have no SparseCores"):
        usable_mesh(config)


def scheduled(config: Config) -> tuple[Module, Sequence[Window]]:
    """The compiled training step on 64 v5p chips, and its collectives with what stands beside them."""
    mesh = topology_mesh(config)
    module, sizes = parse(compile_step(config, mesh).text), {name: int(size) for name, size in mesh.shape.items()}
    return module, schedule(config, sizes, parse_topology("v5p:4x4x4"), mesh, module).windows


def beside(module: Module, window: Window) -> list[str]:
    """Kernels that stand between start and done."""
    lines = module.computations[window.sequence][window.start + 1 : window.done]
    return [kernel for line in lines if (kernel := kernel_inside(module, line)) is not None]


@needs_compiler
@pytest.mark.slow
def test_gathers_and_scatters_of_a_layers_own_experts_are_hidden_by_its_attention() -> None:
    """All gathers; of the gradients scattered, up and half of down or more. No gradient is summed whole."""
    settings = ["model.remat=none", "mesh.fsdp=16", "mesh.expert=4", "mesh.sparse_core_collectives=true"]
    config = compose_config(["mode=plan", "method=vanilla", "scale=978m", "mesh=v5p_64", *settings])
    windows = [window for window in scheduled(config)[1] if window.collective.times == 24]
    gathers = [w for w in windows if w.collective.kind == "all-gather" and "6144" in w.collective.shapes[0]]
    scatters = [w for w in windows if "6144" in w.collective.shapes[0] or "2,384,1536" in w.collective.shapes[0]]
    scatters = [w for w in scatters if w.collective.kind in ("reduce-scatter", "all-reduce")]
    assert len(gathers) == len(scatters) == 3
    assert {w.collective.kind for w in scatters} == {"reduce-scatter"}
    assert sum(min(w.between, w.seconds) for w in gathers) > 0.95 * sum(w.seconds for w in gathers)
    shares = sorted(min(w.between / w.seconds, 1.0) for w in scatters)
    assert shares[2] == 1.0
    assert shares[1] > 0.5


@needs_compiler
@pytest.mark.slow
def test_bank_gradients_stand_beside_both_exchanges_of_a_compiled_backward_layer() -> None:
    """One that the layer above left and two of the layer's own hide them whole; none is behind attention."""
    config = compose_config(["mode=plan", "scale=978m", "mesh=v5p_64", "model.remat=none"])
    module, windows = scheduled(config)
    exchanges = [window for window in windows if window.collective.kind == "ragged-all-to-all"]
    assert len(exchanges) == 4
    hidden = {beside(module, window).count("grouped_bank_gradient"): window for window in exchanges}
    assert set(hidden) == {0, 1, 2}
    assert all(hidden[gradients].between > hidden[gradients].seconds for gradients in (1, 2))
    # The banks are gathered once a step, outside all loops.
    banks = [
        w.collective for w in windows if w.collective.kind == "all-gather" and "12,1536,6144" in w.collective.shapes[0]
    ]
    assert [bank.times for bank in banks] == [1, 1]
