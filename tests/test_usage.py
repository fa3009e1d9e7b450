"""Usage analyses against brute force, token by token, and against routings whose answers are known."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest

from unipool_jax.analysis import usage
from unipool_jax.training.metrics import routing_diagnostics

# (layers, pools, experts of a pool, experts per token)
SHAPES = [(4, 1, 6, 1), (4, 2, 5, 2), (6, 3, 3, 1), (3, 3, 4, 2), (6, 1, 20, 3)]


def planted(layers: int, experts: int, top_k: int, tokens: int = 50, seed: int = 0) -> np.ndarray:
    """Uneven random choices without repetition within a layer, int32 `[L, N, k]`."""
    random = np.random.default_rng(seed)
    weights = random.random((layers, experts)) ** 3 + 1e-3
    rows = [[random.choice(experts, size=top_k, replace=False, p=w / w.sum()) for _ in range(tokens)] for w in weights]
    return np.array(rows, np.int32)


def pool_of(layer: int, layers: int, groups: int) -> int:
    return layer // (layers // groups)


def visits(experts: np.ndarray, groups: int) -> list[list[set[tuple[int, int]]]]:
    """Experts as (pool, expert) that token t visits in layer l."""
    layers, tokens, _ = experts.shape
    return [
        [{(pool_of(layer, layers, groups), int(e)) for e in experts[layer, token]} for token in range(tokens)]
        for layer in range(layers)
    ]


@pytest.mark.parametrize(("layers", "groups", "experts", "top_k"), SHAPES)
def test_maps_and_shares_by_counting(layers: int, groups: int, experts: int, top_k: int) -> None:
    choices = planted(layers, experts, top_k)
    seen = visits(choices, groups)
    found = usage.usage_map(usage.expert_counts(choices, experts), groups)
    assert found.shape == (layers, groups * experts)
    for layer, pool, expert in itertools.product(range(layers), range(groups), range(experts)):
        count = sum((pool, expert) in token for token in seen[layer])
        assert found[layer, pool * experts + expert] == count
    total = 0
    for column in range(groups * experts):
        used = [int(found[layer, column]) for layer in range(layers)]
        total += sum(used)
        owner = int(usage.owners(found)[column])
        assert owner == (used.index(max(used)) if sum(used) else -1)
        assert (column in usage.dead_experts(found)) == (sum(used) == 0)
        for layer in range(layers):
            assert usage.row_shares(found)[layer, column] == pytest.approx(used[layer] / found[layer].sum())
            expected = used[layer] / sum(used) if sum(used) else 0.0
            assert usage.column_shares(found)[layer, column] == pytest.approx(expected)
        assert usage.total_shares(found)[column] == pytest.approx(sum(used) / (layers * 50 * top_k))
    assert total == layers * 50 * top_k


@pytest.mark.parametrize(("layers", "groups", "experts", "top_k"), SHAPES)
def test_paths_of_tokens_by_counting(layers: int, groups: int, experts: int, top_k: int) -> None:
    choices = planted(layers, experts, top_k, seed=1)
    seen = visits(choices, groups)
    unique = usage.unique_experts(choices, groups, experts)
    assert unique.tolist() == [len(set().union(*(seen[layer][t] for layer in range(layers)))) for t in range(50)]
    common = usage.same_expert(choices, groups)
    chance = usage.chance_same_expert(usage.expert_counts(choices, experts), groups, 50)
    for i, j in itertools.product(range(layers), repeat=2):
        assert common[i, j] == sum(len(a & b) for a, b in zip(seen[i], seen[j], strict=True))
        if i == j:
            assert common[i, j] == chance[i, j] == 50 * top_k
        else:
            # Independent layers: every token of one layer meets every token of the other.
            assert chance[i, j] == pytest.approx(sum(len(a & b) for a in seen[i] for b in seen[j]) / 50)


@pytest.mark.parametrize(("layers", "groups", "experts", "top_k"), SHAPES)
def test_diagnostics_by_counting(layers: int, groups: int, experts: int, top_k: int) -> None:
    """The figures of method M8.4 from sets and loops, ranks by (count, id)."""
    counts = usage.expert_counts(planted(layers, experts, top_k, seed=2), experts)
    found = routing_diagnostics(counts, groups)
    entropies, coverages = found["routing/entropy_bits"], found["routing/top16_coverage"]
    assert isinstance(entropies, list)
    assert isinstance(coverages, list)
    # A stable sort: of equal counts the lowest id comes first.
    ranked = [sorted(range(experts), key=[-count for count in row].__getitem__) for row in counts.tolist()]
    for layer, row in enumerate(counts.tolist()):
        shares = [count / sum(row) for count in row]
        entropy = -sum(p * math.log2(p) for p in shares if p)
        assert entropies[layer] == pytest.approx(entropy)
        assert coverages[layer] == pytest.approx(sum(sorted(shares)[::-1][:16]))
    for size in (1, 2, 3, 5, 8, 10, 16, 20, 32, 48, 64):
        if size > experts:
            assert f"routing/union_size_{size}" not in found
            continue
        sets = [{(pool_of(x, layers, groups), e) for e in ranked[x][:size]} for x in range(layers)]
        union = len(set().union(*sets))
        assert found[f"routing/union_size_{size}"] == union
        assert found[f"routing/pool_coverage_{size}"] == pytest.approx(union / (groups * experts))
        assert found[f"routing/saturation_{size}"] == pytest.approx(union / min(size * layers, groups * experts))
        on_top = [sum(counts[x, e] for e in ranked[x][:size]) / counts[x].sum() for x in range(layers)]
        for name, value in (
            ("", np.mean(on_top)),
            ("_mean", np.mean(on_top)),
            ("_min", min(on_top)),
            ("_median", np.median(on_top)),
            ("_max", max(on_top)),
        ):
            assert found[f"routing/token_coverage_{size}{name}"] == pytest.approx(value)
    top = [{(pool_of(x, layers, groups), e) for e in ranked[x][:16]} for x in range(layers)]
    overlaps = [len(a & b) / len(a | b) for a, b in itertools.permutations(top, 2)]
    assert found["routing/jaccard"] == pytest.approx(sum(overlaps) / len(overlaps))


def test_a_divided_pool_is_seen_as_divided() -> None:
    """Layer l uses experts 2l and 2l+1 only: private ownership inside one pool."""
    random = np.random.default_rng(0)
    choices = (2 * np.arange(4)[:, None, None] + random.integers(0, 2, (4, 200, 1))).astype(np.int32)
    counts = usage.expert_counts(choices, 9)
    assert usage.unique_experts(choices, 1, 9).tolist() == [4] * 200
    assert usage.same_expert(choices, 1)[~np.eye(4, dtype=bool)].sum() == 0
    assert usage.owners(usage.usage_map(counts, 1)).tolist() == [0, 0, 1, 1, 2, 2, 3, 3, -1]
    assert usage.dead_experts(usage.usage_map(counts, 1)) == [8]
    assert usage.ownership_order(usage.usage_map(counts, 1))[-1] == 8
    assert usage.column_shares(usage.usage_map(counts, 1)).max(axis=0).tolist() == [1.0] * 8 + [0.0]


def test_layers_that_repeat_each_other_are_seen() -> None:
    one = np.random.default_rng(0).integers(0, 8, (1, 300, 1)).astype(np.int32)
    choices = np.repeat(one, 5, axis=0)
    assert usage.unique_experts(choices, 1, 8).tolist() == [1] * 300
    assert (usage.same_expert(choices, 1) == 300).all()
    # In separate pools the same indices are different experts.
    assert usage.unique_experts(choices, 5, 8).tolist() == [5] * 300
    assert usage.same_expert(choices, 5).tolist() == (300 * np.eye(5, dtype=int)).tolist()


@pytest.mark.parametrize(
    ("layers", "experts", "chance"),
    [(12, 96, 11.34), (12, 64, 11.02), (12, 48, 10.72), (24, 192, 22.62), (24, 96, 21.33), (36, 288, 33.90)],
)
def test_chance_of_unique_experts_is_the_published_column(layers: int, experts: int, chance: float) -> None:
    assert usage.chance_unique(layers, 1, experts, 1) == pytest.approx(chance, abs=0.005)


@pytest.mark.parametrize(("layers", "groups", "experts", "top_k"), SHAPES)
def test_chance_levels_are_those_of_even_random_choices(layers: int, groups: int, experts: int, top_k: int) -> None:
    random = np.random.default_rng(5)
    tokens = 20_000
    choices = random.random((layers, tokens, experts)).argsort(axis=2)[:, :, :top_k].astype(np.int32)
    unique = usage.unique_experts(choices, groups, experts)
    error = max(unique.std(), 0.01) / math.sqrt(tokens)
    assert abs(unique.mean() - usage.chance_unique(layers, groups, experts, top_k)) < 5 * error
    observed = usage.same_expert(choices, groups)
    expected = usage.chance_same_expert(usage.expert_counts(choices, experts), groups, tokens)
    np.testing.assert_allclose(observed, expected, rtol=0.15)


def test_vanilla_meets_one_expert_per_layer_and_choice() -> None:
    assert usage.chance_unique(12, 12, 8, 1) == pytest.approx(12)
    assert usage.chance_unique(12, 12, 16, 2) == pytest.approx(24)


def test_similarity_by_loops_and_planted_copies() -> None:
    random = np.random.default_rng(0)
    gate, up = random.standard_normal((2, 2, 5, 3, 4))
    down = random.standard_normal((2, 5, 4, 3))
    gate[1, 3], up[1, 3], down[1, 3] = 2 * gate[1, 0], 2 * up[1, 0], 2 * down[1, 0]
    gate[0, 2], up[0, 2], down[0, 2] = -gate[0, 1], -up[0, 1], -down[0, 1]
    found = usage.expert_similarity(gate, up, down)
    for pool, i, j in itertools.product(range(2), range(5), range(5)):
        a, b = (np.concatenate([w[pool, e].ravel() for w in (gate, up, down)]) for e in (i, j))
        assert found[pool, i, j] == pytest.approx(a @ b / np.linalg.norm(a) / np.linalg.norm(b))
    assert found[1, 0, 3] == pytest.approx(1.0)
    assert found[0, 1, 2] == pytest.approx(-1.0)


def test_device_load_by_hand() -> None:
    counts = np.array([[4, 0, 2, 2], [0, 0, 0, 8], [1, 1, 1, 1]])
    found = usage.device_load(counts, 2)
    # Devices hold experts {0,1} and {2,3}: loads (4,4), (0,8), (2,2).
    assert found.by_layer_L.tolist() == [1.0, 2.0, 1.0]
    assert found.critical_path == pytest.approx((4 + 8 + 2) / (4 + 4 + 2))
    assert found.whole_model == pytest.approx(14 / 10)
    assert usage.device_load(counts, 1).by_layer_L.tolist() == [1.0, 1.0, 1.0]
    assert usage.device_load(counts, 4).by_layer_L.tolist() == [2.0, 4.0, 1.0]
    assert usage.device_load(np.zeros((2, 4), int), 2).by_layer_L.tolist() == [0.0, 0.0]
    with pytest.raises(ValueError, match=r"4 experts .* 3 devices; choose one of \[1, 2, 4\]"):
        usage.device_load(counts, 3)


def test_balance_over_the_pool_can_hide_imbalance_in_every_layer() -> None:
    """Each layer uses one device only, another one each time: perfect in sum, worst case layer by layer."""
    counts = np.kron(np.eye(4, dtype=int), np.full((1, 2), 5))
    found = usage.device_load(counts, 4)
    assert found.by_layer_L.tolist() == [4.0] * 4
    assert (found.critical_path, found.whole_model) == (4.0, 1.0)
