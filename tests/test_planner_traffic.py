"""Memory traffic, FLOPs and times of the planner against a ledger: every array of a step, how often it is moved.

The ledger is written from the table in `docs/planner.md`, with the sizes of one small model as literal numbers.
"""

from __future__ import annotations

import jax
import pytest

from planned import small
from unipool_jax.config.chips import Topology, parse_topology
from unipool_jax.config.schema import Config
from unipool_jax.moe.capacity import capacity
from unipool_jax.planner import links, roofline, work
from unipool_jax.planner.collectives import parse
from unipool_jax.training.state import init_state

# Four layers, D = 256, F = 640, V = 1024; 32 experts; two micro-batches of 8 x 256 tokens on four devices.
LAYERS, D, F, V, EXPERTS, MICRO, TOKENS = 4, 256, 640, 1024, 32, 2, 512
SIZES = {"data": 1, "fsdp": 2, "expert": 2, "tensor": 1}
SPLIT = {"data": 1, "fsdp": 1, "expert": 2, "tensor": 2}
TOPOLOGY = parse_topology("v5p:2x2x1")
HALF, FULL = 2, 4
"""Bytes of a bfloat16 and of a float32 number."""


def counted(config: Config, sizes: dict[str, int]) -> dict[str, work.Work]:
    return {item.name: item for item in work.count(config, sizes, TOPOLOGY).work}


def moved(*ledger: tuple[float, float, float]) -> float:
    """Bytes of (elements, bytes of an element, times it is read or written)."""
    return sum(elements * size * times for elements, size, times in ledger)


@pytest.mark.parametrize("method", ["unipool", "vanilla"])
def test_the_optimizer_moves_eight_numbers_a_parameter(method: str) -> None:
    """The gradient is read for its norm and for the update; weight and two moments are read and written."""
    config = small(method)
    shapes = jax.eval_shape(lambda: init_state(config, jax.random.key(0)).params)
    sizes = {jax.tree_util.keystr(path): leaf.size for path, leaf in jax.tree_util.tree_leaves_with_path(shapes)}
    matrices = sum(size for name, size in sizes.items() if "scale" not in name and "norm" not in name)
    reads, writes = 2 + 1 + 2, 1 + 2
    one_device = counted(config, dict.fromkeys(SIZES, 1))["optimiser"]
    assert one_device.bytes == matrices * FULL * (reads + writes)
    assert (one_device.flops, one_device.unpadded_flops) == (0, 0)
    # Over fsdp every matrix is halved, over the expert axis the experts once more.
    bank = 3 * D * F * EXPERTS
    assert counted(config, SIZES)["optimiser"].bytes == ((matrices - bank) / 2 + bank / 4) * 32


@pytest.mark.parametrize("sizes", [SIZES, SPLIT], ids=["fsdp", "tensor"])
def test_the_output_head_moves_its_logits(sizes: dict[str, int]) -> None:
    """22 bytes a logit: written, read for maximum and sum, read again backward, and its bfloat16 gradient."""
    config, tensor = small("unipool"), sizes["tensor"]
    tokens = 8 * 256 / (sizes["data"] * sizes["fsdp"] * sizes["expert"])
    logits, matrix = tokens * V / tensor, V * D / tensor
    head = counted(config, sizes)["output head and loss"]
    assert head.bytes == MICRO * moved(
        (logits, FULL, 3),  # written, and read twice: for the softmax and for the target
        (logits, FULL, 1),  # read backward
        (logits, HALF, 3),  # their gradient: written, and read for two products
        (matrix, HALF, 3),  # one product forward, two backward
    )
    assert head.flops == head.unpadded_flops == MICRO * 3 * 2 * tokens * D * V / tensor
    embedding = counted(config, sizes)["embedding"]
    assert embedding.bytes == MICRO * moved((V * D, HALF, 2), (tokens * D, HALF, 4))
    assert embedding.flops == 0


@pytest.mark.parametrize(
    ("remat", "mixture", "layer"),
    # One pass forward and one that counts tokens before the gradient; recomputation adds one.
    [("none", 2, 2), ("moe", 3, 2), ("full", 3, 3)],
)
@pytest.mark.parametrize("top_k", [1, 2])
def test_a_layer_moves_what_the_ledger_says(remat: str, mixture: int, layer: int, top_k: int) -> None:
    config = small("unipool", f"model.remat={remat}", f"moe.top_k={top_k}", "model.num_kv_heads=2")
    found, times = counted(config, SIZES), LAYERS * MICRO
    rows, kv = TOKENS * top_k, 128
    # Room for three times the rows that arrive under even routing, but never more than all rows of both devices.
    buffer = min(3 * rows, 2 * rows)

    weights = D * D + 2 * D * kv + D * D
    activations = TOKENS * (4 * D + 2 * kv)
    assert found["projections"].bytes == times * (layer + 2) * moved((weights, HALF, 1), (activations, HALF, 1))
    assert found["projections"].flops == times * (layer + 2) * 2 * TOKENS * weights

    # Four blocks of 64 queries, of which block i sees 64 (i + 1) keys: 5/8 of all.
    scores = TOKENS / 256 * 4 * sum(64 * 64 * (block + 1) for block in range(4))
    assert found["attention scores"].bytes == times * moved((scores, FULL, 2 * layer), (scores, FULL, 5))
    # Scores twice and values once forward; four backward, and the scores again unless full recomputation has them.
    products = 3 * layer + 4 + (remat != "full")
    assert found["attention scores"].unpadded_flops == times * products * 2 * scores * 64
    # Heads of 64 channels fill half of a matrix unit of 128.
    assert found["attention scores"].flops == 2 * found["attention scores"].unpadded_flops

    assert found["norms and sums"].bytes == times * (layer + 2) * moved((TOKENS * D, HALF, 10))
    router = moved((TOKENS * D, HALF, 1), (TOKENS * EXPERTS, FULL, 4))
    assert found["router"].bytes == times * (mixture + 2) * router
    assert found["router"].flops == times * (mixture + 2) * 2 * TOKENS * D * EXPERTS

    # Sorted, sent, received and combined: each read and written. The receive buffer is cleared, and written.
    dispatch = moved((rows * D, HALF, 4 * 2), (buffer * D, HALF, 2))
    assert found["dispatch"].bytes == times * (mixture + 1) * dispatch

    bank = 3 * D * F * EXPERTS / 2
    forward = moved(
        (bank, HALF, 1),
        (rows * D, HALF, 1),  # into gate and up
        (rows * F, HALF, 1),  # into down
        (rows * F, HALF, 3),  # gate, up and their product
        (buffer * D, HALF, 1),  # written for rows of no expert too
    )
    backward = moved(
        (bank, HALF, 1),
        (rows * D, HALF, 1),  # gradient of the output
        (rows * F, HALF, 4),  # gate and up, and their gradients
        (rows * F, HALF, 3),
        (buffer * D, HALF, 1),
        (rows * D, HALF, 3),  # operands of the bank's three gradients
        (rows * F, HALF, 3),
        (bank, FULL, 2),  # the running gradient, read and written
    )
    assert found["experts forward"].bytes == times * mixture * forward
    assert found["experts backward"].bytes == times * backward
    flops = 2 * rows * 3 * D * F
    assert found["experts forward"].unpadded_flops == times * mixture * flops
    assert found["experts backward"].unpadded_flops == times * 2 * flops
    padding = found["experts backward"].flops / found["experts backward"].unpadded_flops
    assert padding == found["experts forward"].flops / found["experts forward"].unpadded_flops > 1

    traffic = work.count(config, SIZES, TOPOLOGY).bank_traffic_bytes
    assert traffic == times * moved((bank, HALF, mixture + 1), (bank, FULL, 2))


@pytest.mark.parametrize(
    ("experts", "rows"),
    # A receive buffer of both devices' rows, two for each token; a row for each token; none.
    [("norm_then_gate", 2 * 2 * TOKENS), ("post", TOKENS), ("none", 0)],
)
def test_norms_behind_blocks_move_what_they_normalize(experts: str, rows: int) -> None:
    words = ("model.norm=sandwich", f"model.post_norm_experts={experts}", "moe.top_k=2")
    config, plain = small("unipool", *words), small("unipool", "moe.top_k=2")
    found, times = counted(config, SIZES)["norms behind blocks"], LAYERS * MICRO
    # Full recomputation: forward, counting tokens, again, and two of the backward pass; each reads and writes.
    assert found.bytes == times * 5 * moved((TOKENS + rows, HALF * D, 2))
    assert "norms behind blocks" not in counted(plain, SIZES)

    sums, usual = (
        {m.name: m for m in work.count(c, SPLIT, TOPOLOGY).messages if m.axes == ("tensor",)} for c in (config, plain)
    )
    assert usual["tensor sums"].times == times * 2 * 4
    if experts == "norm_then_gate":
        # Two devices of a group add up their buffers of 2 x 2 x 1024 rows; gradients of what experts are given too.
        assert sums["outputs of experts, summed"].times == times * 4
        assert sums["outputs of experts, summed"].sent_bytes == 2 * 4096 * D * HALF / 2
        assert sums["tensor sums"] == usual["tensor sums"]._replace(times=times * 4)
    else:
        assert sums == usual


@pytest.mark.parametrize("remat", ["moe", "full"])
def test_each_kind_of_attention_computes_its_own_scores(remat: str) -> None:
    """A window of 64 in 256 positions: four blocks of 64 queries, each compared with itself and the block before."""
    kinds = (
        ("attention.kind=full",),
        ("attention.kind=window", "attention.window=64"),
        (*("attention.kind=alternating", "attention.window=64", "attention.full_layers=[1]"),),
    )
    full, window, alternating = (
        counted(small("unipool", f"model.remat={remat}", *kind), SIZES)["attention scores"] for kind in kinds
    )
    fraction = 4 * 64 * 128 / (64 * 64 * (1 + 2 + 3 + 4))
    for field in ("flops", "unpadded_flops", "bytes"):
        assert getattr(window, field) == fraction * getattr(full, field)
    # Products alone: counted once and three times a pass, and five backward, of which one is a recomputation.
    again = {"moe": (2 * 3 + 3 + 4) / (2 * 3 + 5), "full": 1.0}[remat]
    assert alternating.flops == pytest.approx((1 + 3 * fraction) / 4 * again * full.flops)
    for name in ("projections", "norms and sums", "router"):
        assert counted(small("unipool", *kinds[1]), SIZES)[name] == counted(small("unipool"), SIZES)[name]


@pytest.mark.parametrize(("remat", "again", "forward"), [("none", 0, 2), ("full", 0, 3), ("moe", 1, 2)])
def test_kernels_of_attention_move_tiles_and_no_scores(remat: str, again: int, forward: int) -> None:
    """512 positions are one tile, 1024 are two by two, of which the mask hides one; a window of 400 hides no more.

    Each of two sequences of four heads, of 64 channels. Alternating layers compute the product once more themselves.
    """
    kinds = ("attention.kind=alternating", "attention.window=400") if again else ()
    more = ("data.sequence_length=1024", *kinds)
    found = counted(small("unipool", "kernels.attention=auto", f"model.remat={remat}", *more), SIZES)[
        "attention scores"
    ]
    tiles, matrix = 4 * 2 * 3, 2 * 4 * 1024 * 64
    products = 2 * (forward + again) + 4 + 3
    assert found.unpadded_flops == LAYERS * MICRO * tiles * products * 2 * 512 * 512 * 64
    # A tile needs keys and values, in the backward kernel of those queries and gradients instead.
    read = moved((tiles * 512 * 64, HALF, 2 * (forward + again) + 2 + 2))
    # Queries and results; backward, the gradient of results, of queries, keys and values, and what belongs to rows.
    assert found.bytes == LAYERS * MICRO * (read + moved((matrix, HALF, 2 * (forward + again) + 6)))


def test_receive_buffers_of_all_layers_are_not_cleared() -> None:
    """On v5p, rows of 512 channels and one micro-batch; with the products recomputed there are no such buffers."""
    wide = ("model.hidden_size=512", "train.microbatch_size=16")
    together, apart = (counted(small("unipool", f"model.remat={remat}", *wide), SIZES) for remat in ("none", "experts"))
    rows = capacity(16 * 256 // 4, 2, None)
    difference = apart["dispatch"].bytes - together["dispatch"].bytes
    assert difference == LAYERS * moved((rows * 512, HALF, 2))


@pytest.mark.parametrize(
    ("method", "remat", "in_place"),
    [("unipool", "moe", 2), ("unipool", "full", 2), ("vanilla", "moe", 2), ("vanilla", "full", 0)],
)
def test_a_recomputed_layer_clears_no_receive_buffers(method: str, remat: str, in_place: int) -> None:
    """On v5p, of three passes over buffers of 512 channels; v6e clears all. Not where the pool is recomputed too."""
    wide = ("model.hidden_size=512", "train.microbatch_size=16", "loss.switch_group_sequences=8")
    config = small(method, f"model.remat={remat}", *wide)
    found, others = (
        {item.name: item for item in work.count(config, SIZES, parse_topology(topology)).work}["dispatch"].bytes
        for topology in ("v5p:2x2x1", "v6e:2x2")
    )
    rows = capacity(16 * 256 // 4, 2, None)
    assert others - found == LAYERS * moved((rows * 512, HALF, in_place))


def test_one_device_has_no_receive_buffer() -> None:
    config, alone = small("unipool"), dict.fromkeys(SIZES, 1)
    assert counted(config, alone)["dispatch"].bytes == LAYERS * MICRO * (3 + 1) * moved((8 * 256 * D, HALF, 8))


def test_a_dense_model_dispatches_nothing() -> None:
    found = counted(small("dense"), SIZES)
    assert not {"router", "dispatch"} & set(found)
    # No router counts tokens first: one pass, and one of recomputation. Its block is whole on every device.
    rows, bank = TOKENS, 3 * D * F
    expected = moved((bank, HALF, 1), (rows * D, HALF, 2), (rows * F, HALF, 4))
    assert found["experts forward"].bytes == LAYERS * MICRO * 2 * expected
    assert found["experts forward"].flops == LAYERS * MICRO * 2 * 2 * rows * bank


def test_half_of_a_width_on_each_of_two_devices() -> None:
    """Over the tensor axis: projections, scores, and the width of an expert; norms and dispatch are whole."""
    whole, halves = (counted(small("unipool"), sizes) for sizes in (SIZES | {"fsdp": 1}, SPLIT))
    for name in ("projections", "attention scores", "output head and loss"):
        assert halves[name].bytes == whole[name].bytes / 2
        assert halves[name].flops == whole[name].flops / 2
    for name in ("norms and sums", "router", "dispatch", "embedding"):
        assert halves[name].bytes == whole[name].bytes
    assert halves["experts forward"].unpadded_flops == whole["experts forward"].unpadded_flops / 2


@pytest.mark.parametrize("micro", [4, 8, 16])
def test_micro_batches_move_weights_again_and_activations_once(micro: int) -> None:
    config = small("unipool", f"train.microbatch_size={micro}", "loss.pool_statistics=previous")
    found, times = counted(config, SIZES), 16 // micro
    head = moved((16 * 256 / 4 * V, 1, 22), (V * D * times, HALF, 3))
    assert found["output head and loss"].bytes == head
    assert found["optimiser"].bytes == counted(small("unipool"), SIZES)["optimiser"].bytes


# Memory


BUFFER = 2 * TOKENS
"""Rows of a receive buffer: of both devices, which is less than three times what arrives."""
SCORES = TOKENS / 256 * 4 * 64 * 64 * (1 + 2 + 3 + 4)


@pytest.mark.parametrize("remat", ["none", "moe", "full"])
def test_temporaries_are_weights_gradients_and_what_the_backward_pass_needs(remat: str) -> None:
    config = small("unipool", f"model.remat={remat}")
    matrices = 2 * V * D + LAYERS * (2 * D * D + 2 * D * 128)
    bank, hidden = 3 * D * F * EXPERTS / 2, TOKENS * D
    weights = moved(
        (bank, HALF + FULL, 1),  # gathered once for all layers, and its running gradient
        (
            matrices / 2 + LAYERS * EXPERTS * D / 2,
            FULL,
            2,
        ),  # gradients of the rest: of a micro-batch, and their sum
        (V * D, HALF, 2),  # both tables, gathered
    )
    of_a_layer = {
        "full": moved((hidden, HALF, 1)),  # its input
        "moe": moved((hidden, HALF, 8), (SCORES, 1, 6)),
        "none": moved((hidden, HALF, 10), (SCORES, 1, 6), (BUFFER * (F + D), HALF, 2)),
    }[remat]
    # The layer whose gradient is computed has everything; the logits, in two dtypes, are there at another time.
    working = moved((hidden, HALF, 10), (SCORES, 1, 8), (BUFFER * (8 * F + 4 * D), HALF, 1))
    logits = TOKENS * V * (FULL + HALF)
    assert working > logits
    found = work.count(config, SIZES, TOPOLOGY).temporary_bytes
    assert found == weights + LAYERS * of_a_layer + working


def test_temporaries_of_one_micro_batch_and_of_many_logits() -> None:
    """One gradient of everything else, and a vocabulary that outweighs a layer."""
    one, two = (
        work.count(small("unipool", f"train.microbatch_size={size}", "loss.pool_statistics=previous"), SIZES, TOPOLOGY)
        for size in (16, 8)
    )
    large = work.count(small("unipool", "model.vocab_size=65536"), SIZES, TOPOLOGY).temporary_bytes
    rest = moved((2 * V * D + LAYERS * (2 * D * D + 2 * D * 128) + LAYERS * EXPERTS * D, FULL, 1 / 2))
    doubled = LAYERS * moved((TOKENS * D, HALF, 1)) + moved(
        (TOKENS * D, HALF, 10), (SCORES, 1, 8), (BUFFER * (8 * F + 4 * D), HALF, 1)
    )
    assert one.temporary_bytes == two.temporary_bytes - rest + doubled
    more = 65536 - V
    grown = moved((2 * more * D, FULL, 2 / 2), (more * D, HALF, 2))
    working = moved((TOKENS * D, HALF, 10), (SCORES, 1, 8), (BUFFER * (8 * F + 4 * D), HALF, 1))
    small_one = work.count(small("unipool"), SIZES, TOPOLOGY).temporary_bytes
    assert large == small_one + grown - working + TOKENS * 65536 * (FULL + HALF)


def test_recomputing_a_part_costs_its_passes_and_frees_what_it_kept() -> None:
    """Products of experts, without another exchange; attention or routers, whose weights are gathered again."""
    none, router, experts, attention = (
        work.count(small("unipool", f"model.remat={remat}"), SIZES, TOPOLOGY)
        for remat in ("none", "router", "experts", "attention")
    )

    def more(found: work.Counts) -> dict[str, tuple[float, float]]:
        pairs = zip(found.work, none.work, strict=True)
        return {a.name: (a.unpadded_flops - b.unpadded_flops, a.bytes - b.bytes) for a, b in pairs if a != b}

    times, buffer, bank = LAYERS * MICRO, 2 * TOKENS, 3 * D * F * EXPERTS / 2
    products = moved((bank * 2 / 3, HALF, 1), (TOKENS * D, HALF, 1), (TOKENS * F, HALF, 3))
    assert more(experts) == {"experts backward": (times * 2 * 2 * TOKENS * D * F, pytest.approx(times * products))}
    assert experts.messages == none.messages
    assert none.temporary_bytes - experts.temporary_bytes == LAYERS * moved((buffer * F, HALF, 2))
    forward = {item.name: item for item in none.work}["projections"]
    # Two passes forward and two backward, of which one more is a quarter.
    assert more(attention)["projections"] == (forward.flops / 4, forward.bytes / 4)
    assert more(attention).keys() == {"projections", "attention scores"}
    (message,) = set(attention.messages) - set(none.messages)
    assert (message.name, message.times) == ("attention, gathered again", times)
    scores = {item.name: item for item in none.work}["router"]
    assert more(router) == {"router": (scores.flops / 4, scores.bytes / 4)}
    (message,) = set(router.messages) - set(none.messages)
    assert (message.name, message.times) == ("routers, gathered again", times)
    assert none.temporary_bytes - router.temporary_bytes == LAYERS * TOKENS * EXPERTS * (5 * FULL + 3)
    kept = moved((TOKENS * (2 * D + 2 * 128), HALF, 1), (SCORES, 1, 6))
    assert none.temporary_bytes - attention.temporary_bytes == LAYERS * kept


def test_plain_xla_stacks_what_layers_keep() -> None:
    """In and out of the stack of a scan, read and written each time; kernels write and read where it lies."""
    gpus = parse_topology("h100:4")

    def stacked(implementation: str, topology: Topology, remat: str) -> float:
        config = small("unipool", f"kernels.implementation={implementation}", f"model.remat={remat}")
        found = {item.name: item.bytes for item in work.count(config, SIZES, topology).work}
        return found.get("stacks of layers", 0.0)

    assert stacked("xla", gpus, "full") == MICRO * LAYERS * moved((TOKENS * D, HALF, 4))
    assert stacked("xla", gpus, "none") > stacked("xla", gpus, "moe") > 8 * stacked("xla", gpus, "full")
    assert stacked("auto", gpus, "full") == stacked("xla", TOPOLOGY, "full") == 0


@pytest.mark.parametrize(("remat", "held"), [("none", LAYERS), ("attention", LAYERS), ("full", 1)])
def test_banks_of_layers_are_held_one_at_a_time_unless_kept(remat: str, held: int) -> None:
    """Each layer its own eight experts: gathered banks, the gradient of one, and the shards of all gradients."""
    layers, pool = (
        work.count(small(method, f"model.remat={remat}", "loss.switch_group_sequences=8"), SIZES, TOPOLOGY)
        for method in ("vanilla", "unipool")
    )
    bank = 3 * D * F * EXPERTS / 2
    gathered = moved((bank / LAYERS * held, HALF, 1), (bank / LAYERS + bank / 2, FULL, 1))
    routers = LAYERS * (EXPERTS - EXPERTS / LAYERS) * D / 2
    expected = pool.temporary_bytes - moved((bank, HALF + FULL, 1), (routers, FULL, 2)) + gathered
    assert layers.temporary_bytes == expected


def test_an_evaluation_has_room_for_every_row() -> None:
    """Sixteen sequences at once, which is double a micro-batch: all rows of both devices may come to one."""
    config = small("unipool", "train.eval_batch_size=16")
    tokens, bank = 2 * TOKENS, 3 * D * F * EXPERTS / 2
    weights = moved((bank, HALF, 1), (V * D, HALF, 2))
    rows = moved((2 * tokens * (F + 2 * D), HALF, 1))
    scores = moved((tokens * 256 * 4 / 4, FULL, 1))  # one of four blocks of queries at a time
    assert rows > scores
    expected = weights + moved((tokens * D, HALF, 6)) + rows
    assert work.count(config, SIZES, TOPOLOGY).evaluation_bytes == expected
    # Four layers of their own: all gathered banks are there at once only where nothing is gathered.
    for fsdp, banks in ((2, 1), (1, LAYERS)):
        sizes = SIZES | {"fsdp": fsdp}
        ours, theirs = (
            work.count(small(m, "loss.switch_group_sequences=8"), sizes, TOPOLOGY) for m in ("unipool", "vanilla")
        )
        difference = moved((bank * (1 - banks / LAYERS), HALF, 1))
        assert ours.evaluation_bytes - theirs.evaluation_bytes == difference


def test_sequences_up_to_4096_are_bound_by_their_scores_in_evaluation() -> None:
    """Longer ones are computed in tiles, and take less."""

    def found(length: int) -> float:
        config = small("unipool", f"data.sequence_length={length}", "moe.top_k=1", "model.ffn_size=128")
        return work.count(config, SIZES, TOPOLOGY).evaluation_bytes

    tokens = 8 * 4096 / 4
    scores = moved((tokens * 4096 * 4 / 4, FULL, 1))  # of four heads, one of four blocks of queries at a time
    weights = moved((3 * D * 128 * EXPERTS / 2, HALF, 1), (V * D, HALF, 2))
    assert found(4096) == weights + moved((tokens * D, HALF, 6)) + scores
    assert found(8192) < found(4096)


# Times


def test_an_operation_takes_its_slower_resource(monkeypatch: pytest.MonkeyPatch) -> None:
    """Peak 100 FLOP/s and 10 B/s, of which nine tenths are reached; collectives are added in full."""
    topology = TOPOLOGY._replace(chip=TOPOLOGY.chip._replace(flops=100.0, hbm_bandwidth=10.0))
    items = (work.Work("a", 180.0, 90.0, 9.0), work.Work("b", 9.0, 9.0, 27.0), work.Work("c", 90.0, 90.0, 9.0))
    messages = (
        work.Message("x", "all-gather", ("fsdp",), 3, 5.0),
        work.Message("y", "all-gather", ("fsdp",), 1, 7.0),
        work.Message("z", "all-reduce", ("data", "expert"), 2, 1.0),
    )
    counts = work.Counts(items, messages, 0, 0, 0, 0)
    monkeypatch.setattr(roofline, "count", lambda *_: counts)
    monkeypatch.setattr(links, "span", lambda *_: None)
    monkeypatch.setattr(links, "seconds", lambda kind, sent, *_: sent / 4)
    config = small("unipool")
    found = roofline.estimate(config, SIZES, topology, None)
    assert [tuple(part) for part in found.parts] == [
        ("a", pytest.approx(2.0), "matrix unit"),
        ("b", pytest.approx(3.0), "memory"),
        ("c", pytest.approx(1.0), "matrix unit"),
        ("all-gather over fsdp", (3 * 5 + 7) / 4, "links"),
        ("all-reduce over data x expert", 2 / 4, "links"),
    ]
    assert found.seconds == pytest.approx(6 + 6)
    assert found.seconds_by_bound() == {
        "matrix unit": pytest.approx(3.0), "memory": pytest.approx(3.0), "links": pytest.approx(6.0)
    }  # fmt: skip
    assert found.tokens_per_second == pytest.approx(16 * 256 / 12)
    weights = LAYERS * (2 * D * D + 2 * D * 128 + 3 * D * F + D * EXPERTS) + D * V
    model = 6 * (weights + LAYERS * D * 256) * 16 * 256 / 4
    assert found.model_flops == model
    assert found.utilisation == pytest.approx(model / (12 * 100))
    # Hidden behind six seconds of work, as much again of links costs nothing.
    assert found.utilisation_with_hidden_links == pytest.approx(model / (6 * 100))


def test_what_was_compiled_replaces_what_was_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(links, "span", lambda *_: None)
    monkeypatch.setattr(links, "seconds", lambda kind, sent, *_: sent)
    module = parse("ENTRY %main (a: f32[]) -> f32[] {\n  %a = f32[] parameter(0)\n}\n")
    found = roofline.estimate(small("unipool"), SIZES, TOPOLOGY, None, module)
    assert not any(part.bound == "links" for part in found.parts)
    assert found.compiled_seconds == found.seconds


def test_a_compiled_step_is_longer_by_its_copies_and_shorter_by_what_it_hides(monkeypatch: pytest.MonkeyPatch) -> None:
    """A copy, and half of it beside a gather."""
    monkeypatch.setattr(links, "span", lambda *_: None)
    monkeypatch.setattr(links, "seconds", lambda kind, sent, *_: sent)
    copied = TOPOLOGY.chip.hbm_bandwidth * roofline.HBM_EFFICIENCY * 3 / 8
    size = int(copied)  # float32 numbers, read and written: three seconds
    module = parse(
        f"ENTRY %main (a: f32[{size}]) -> f32[] {{\n  %a = f32[{size}]{{0}} parameter(0)\n"
        "  %s = (f32[1]{0}, u8[4]{0}) all-gather-start(%a), replica_groups={{0,1},{2,3}}\n"
        f"  %c = f32[{size}]{{0}} copy(%a)\n  %d = u8[4]{{0}} all-gather-done(%s)\n}}\n"
    )
    config = small("unipool")
    plain, found = (roofline.estimate(config, SIZES, TOPOLOGY, None, given) for given in (None, module))
    computing = sum(part.seconds for part in plain.parts if part.bound != "links")
    # Half of four bytes goes to the other device of a pair, at a byte a second.
    assert found.seconds == pytest.approx(computing + 3 + 2)
    assert found.hidden_seconds == pytest.approx(2)
    assert found.compiled_seconds == pytest.approx(computing + 3)
    assert found.utilisation_as_compiled == pytest.approx(found.utilisation * found.seconds / found.compiled_seconds)


def test_kernels_of_a_layer_are_the_work_of_a_layer() -> None:
    """The calls of one layer and pass add up to what is counted of it, in FLOPs with padding and in bytes."""
    config = small("unipool", "model.remat=none", "kernels.attention=splash")
    calls = work.kernel_work(config, SIZES, TOPOLOGY)
    found, times = counted(config, SIZES), LAYERS * MICRO
    passes = {"expert_ffn_in": 2, "grouped_matmul": 2, "splash_mha_fwd": 2, "grouped_bank_gradient": 3}
    for field in ("flops", "bytes"):
        sums = {name: times * passes.get(name, 1) * getattr(one, field) for name, one in calls.items()}
        experts_ = sum(taken for name, taken in sums.items() if name.startswith(("expert", "grouped")))
        scores = sum(taken for name, taken in sums.items() if name.startswith("splash"))
        counts = [found[name] for name in ("experts forward", "experts backward")]
        assert experts_ == pytest.approx(sum(getattr(item, field) for item in counts))
        assert scores == pytest.approx(getattr(found["attention scores"], field))


def experts(config: Config, sizes: dict[str, int]) -> tuple[float, float, float]:
    """Padded FLOPs, FLOPs and bytes of all expert kernels."""
    found = counted(config, sizes)
    parts = [found[name] for name in ("experts forward", "experts backward")]
    return sum(w.flops for w in parts), sum(w.unpadded_flops for w in parts), sum(w.bytes for w in parts)


def test_a_layer_reads_the_experts_that_it_sees() -> None:
    """Four layers see 16, 24, 24 and 16 of 32 experts, on both devices alike; the bank is one."""
    whole, windows = small("unipool"), small("sliding")
    sparing = 1 - (16 + 24 + 24 + 16) / (4 * EXPERTS)
    padded, flops, moved_ = experts(windows, SIZES)
    padded_whole, flops_whole, moved_whole = experts(whole, SIZES)
    assert flops == flops_whole
    # More rows of an expert fill its tiles better.
    assert padded < padded_whole
    bank = 3 * D * F * EXPERTS / 2
    passes = 3 + 1  # forward, counted before, recomputed; and backward
    not_moved = LAYERS * MICRO * sparing * moved((bank, HALF, passes), (bank, FULL, 2))
    assert moved_ == pytest.approx(moved_whole - not_moved)
    traffic = [work.count(config, SIZES, TOPOLOGY).bank_traffic_bytes for config in (whole, windows)]
    assert traffic[0] - traffic[1] == pytest.approx(not_moved)
    sent = [{m.name: m.total_bytes for m in work.count(c, SIZES, TOPOLOGY).messages} for c in (whole, windows)]
    assert sent[0] == sent[1]


def test_a_layer_waits_for_its_busiest_device() -> None:
    """Consecutive experts: the windows of 8 of 32 lie on one of two devices."""
    tied = ("pool.starts=runs", "pool.span=1", "pool.groups=1", "pool.ends=0")
    strided, consecutive = small("ring", *tied), small("ring", *tied, "mesh.expert_placement=contiguous")
    assert [work.count(config, SIZES, TOPOLOGY).busiest for config in (strided, consecutive)] == [1, 2]
    assert experts(consecutive, SIZES)[1] == 2 * experts(strided, SIZES)[1]
    exchanged = []
    for config in (strided, consecutive):
        parts = roofline.estimate(config, SIZES, TOPOLOGY, None).parts
        exchanged.append(next(part.seconds for part in parts if part.name.startswith("ragged-all-to-all")))
    assert exchanged[1] == 2 * exchanged[0]
