"""Usage analyses against brute force, token by token, and against routings whose answers are known."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest

from unipool_jax.analysis import usage
from unipool_jax.config.visibility import RULES, Windows
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


def pools(layers: int, groups: int, experts: int) -> np.ndarray:
    """Whether a layer sees an expert of uniform pools, bool `[L, M]`."""
    return np.kron(np.eye(groups, dtype=bool), np.ones((layers // groups, experts), bool))


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
    assert usage.chance_unique(np.ones((layers, experts), bool), 1) == pytest.approx(chance, abs=0.005)


@pytest.mark.parametrize(("layers", "groups", "experts", "top_k"), SHAPES)
def test_chance_levels_are_those_of_even_random_choices(layers: int, groups: int, experts: int, top_k: int) -> None:
    random = np.random.default_rng(5)
    tokens = 20_000
    choices = random.random((layers, tokens, experts)).argsort(axis=2)[:, :, :top_k].astype(np.int32)
    unique = usage.unique_experts(choices, groups, experts)
    error = max(unique.std(), 0.01) / math.sqrt(tokens)
    assert abs(unique.mean() - usage.chance_unique(pools(layers, groups, experts), top_k)) < 5 * error
    observed = usage.same_expert(choices, groups)
    expected = usage.chance_same_expert(usage.expert_counts(choices, experts), groups, tokens)
    np.testing.assert_allclose(observed, expected, rtol=0.15)


def test_vanilla_meets_one_expert_per_layer_and_choice() -> None:
    assert usage.chance_unique(pools(12, 12, 8), 1) == pytest.approx(12)
    assert usage.chance_unique(pools(12, 12, 16), 2) == pytest.approx(24)


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


# Six layers, except where starts are listed; widths are alike in some and differ in others.
WINDOWS = {
    "ring": RULES["ring"](6, 4, 3, 0),
    "sliding": RULES["sliding"](6, 4, 3, 0),
    "tied inner layers": RULES["runs"](6, 4, 2, 1),
    "wide inner layers": RULES["wide_runs"](6, 4, 4, 1),
    "cyclic": RULES["cyclic"](6, 4, 2, 1),
    "listed": Windows((0, 5, 7, 2), (2, 3, 3, 4), 8),
    "private": Windows((0, 2, 4), (2, 2, 2), 6),
}


def windowed(windows: Windows) -> tuple[np.ndarray, list[set[int]]]:
    """Counts that keep to windows, and what each layer sees as sets."""
    starts = zip(windows.starts, windows.widths, strict=True)
    seen = [{(start + n) % windows.experts for n in range(width)} for start, width in starts]
    random = np.random.default_rng(7)
    counts = np.zeros((len(seen), windows.experts), np.int64)
    for layer, experts in enumerate(seen):
        # Of some visible experts a layer makes no use: they must rank before the hidden ones.
        for expert in sorted(experts):
            counts[layer, expert] = random.integers(0, 3) * random.integers(1, 40)
        counts[layer, min(experts)] += 1
    return counts, seen


@pytest.mark.parametrize("name", WINDOWS)
def test_a_layer_is_compared_with_what_it_sees(name: str) -> None:
    windows = WINDOWS[name]
    _, seen = windowed(windows)
    visible, layers = windows.visible(), range(len(seen))
    even = usage.even_shares(visible)
    for layer, expert in itertools.product(layers, range(windows.experts)):
        assert even[layer, expert] == (1 / len(seen[layer]) if expert in seen[layer] else 0.0)
    for expert, share in enumerate(usage.even_owner_share(visible)):
        sent = [1 / len(experts) for experts in seen if expert in experts]
        assert share == pytest.approx(max(sent) / sum(sent))
    pairs = [[i != j and bool(seen[i] & seen[j]) for j in layers] for i in layers]
    assert usage.sharing_pairs(visible).tolist() == pairs
    for top_k in (1, 2):
        met = 0.0
        for expert in range(windows.experts):
            # Of the sets of k experts that a layer may choose, those without this one.
            missed = [math.comb(len(s) - 1, top_k) / math.comb(len(s), top_k) for s in seen if expert in s]
            met += 1 - math.prod(missed)
        assert usage.chance_unique(visible, top_k) == pytest.approx(met)


def test_two_layers_without_common_experts_never_meet() -> None:
    windows = WINDOWS["sliding"]
    counts, seen = windowed(windows)
    chance = usage.chance_same_expert(counts, 1, 100)
    pairs = usage.sharing_pairs(windows.visible())
    assert not chance[~pairs & ~np.eye(6, dtype=bool)].any()
    assert pairs.sum(axis=1).tolist() == [2, 3, 4, 4, 3, 2] == [sum(bool(a & b) for b in seen) - 1 for a in seen]


@pytest.mark.parametrize("name", WINDOWS)
def test_diagnostics_of_windows_by_counting(name: str) -> None:
    """Sets of busiest experts are subsets of windows, and unions are beside the largest that windows allow."""
    windows = WINDOWS[name]
    counts, seen = windowed(windows)
    found = routing_diagnostics(counts, 1, windows.visible())
    layers = range(len(seen))
    ranked = [sorted(seen[x], key=lambda e, x=x: (-counts[x, e], e)) for x in layers]  # type: ignore[misc]
    top = [set(row[:16]) for row in ranked]
    overlaps = [
        len(top[i] & top[j]) / len(top[i] | top[j]) for i in layers for j in layers if i != j and seen[i] & seen[j]
    ]
    assert found["routing/jaccard"] == (pytest.approx(np.mean(overlaps)) if overlaps else None)
    widest = max(windows.widths)
    for size in (1, 2, 3, 5, 8, 10, 16, 20, 32, 48, 64):
        if size > widest:
            assert f"routing/union_size_{size}" not in found
            continue
        union = len(set().union(*(row[:size] for row in ranked)))
        assert found[f"routing/union_size_{size}"] == union
        # Koenig: the most distinct experts that K places a layer can hold. Places of some layers, and all that the
        # others see, bound it; the least such bound is reached.
        bounds = [
            len(set().union(*(seen[x] for x in chosen))) + size * (len(seen) - len(chosen))
            for count in range(len(seen) + 1)
            for chosen in itertools.combinations(layers, count)
        ]
        assert found[f"routing/saturation_{size}"] == pytest.approx(union / min(bounds))
        on_top = [sum(counts[x, e] for e in ranked[x][:size]) / counts[x].sum() for x in layers]
        assert found[f"routing/token_coverage_{size}_mean"] == pytest.approx(np.mean(on_top))


def test_windows_that_are_pools_have_the_numbers_of_pools() -> None:
    windows = RULES["wide_runs"](6, 2, 3, 0)
    counts_LM, _ = windowed(windows)
    counts_LE = np.concatenate([counts_LM[:3, :6], counts_LM[3:, 6:]])
    of_pools, of_windows = routing_diagnostics(counts_LE, 2), routing_diagnostics(counts_LM, 1, windows.visible())
    # Pools compare layers that share nothing too.
    pairs_of_pools, pairs_of_windows = of_pools.pop("routing/jaccard"), of_windows.pop("routing/jaccard")
    assert of_pools.keys() == of_windows.keys()
    for name, value in of_pools.items():
        assert of_windows[name] == pytest.approx(value), name
    assert isinstance(pairs_of_pools, float)
    assert pairs_of_windows == pytest.approx(pairs_of_pools * 30 / 12)


def test_windows_are_dealt_out_by_stride() -> None:
    counts = np.array([[4, 3, 2, 1, 0, 0, 0, 0], [0, 0, 0, 0, 1, 1, 7, 3]])
    # Devices hold experts {0,4}, {1,5}, {2,6}, {3,7}: loads (4,3,2,1) and (1,1,7,3).
    found = usage.device_load(counts, 4, strided=True)
    np.testing.assert_allclose(found.by_layer_L, [4 / 2.5, 7 / 3])
    assert found.whole_model == pytest.approx(9 / 5.5)
