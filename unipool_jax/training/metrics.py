"""Metrics derived from routing counts, and the files they are written to."""

from __future__ import annotations

import json
import math
import os
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from unipool_jax.config.files import FileError, Line, read_lines, write_atomically, writing
from unipool_jax.training.events import Events
from unipool_jax.training.sessions import utc_now
from unipool_jax.training.speed import Interval

Value = float | int | bool | str | None | list[Any]

CLOCKED = ("time", "seconds", "tokens_per_second", "mfu")
"""What depends on the clock in a line of metrics; the rest of a resumed run is that of an uninterrupted one."""

_COVERAGE_TOP = 16
_SET_SIZES = (1, 2, 3, 5, 8, 10, 16, 20, 32, 48, 64)


def pool_counts(counts_LE: np.ndarray, groups: int) -> np.ndarray:
    """Routing counts per pool and expert, int64 `[G, E]`: the sum over the L/G adjacent layers that share a pool."""
    return pool_layers(counts_LE, groups).sum(axis=1)


def pool_layers(counts_LE: np.ndarray, groups: int) -> np.ndarray:
    """Routing counts per pool, layer of the pool and expert, int64 `[G, L/G, E]`."""
    layers, experts = counts_LE.shape
    return counts_LE.astype(np.int64).reshape(groups, layers // groups, experts)


def _busiest_over_mean(counts: np.ndarray) -> np.ndarray:
    """Maximum over mean along the last axis; 0 where the mean is 0."""
    mean = counts.mean(axis=-1)
    return np.divide(counts.max(axis=-1), mean, out=np.zeros_like(mean), where=mean > 0)


def load_metrics(counts_LE: np.ndarray, groups: int, visible_LE: np.ndarray | None = None) -> dict[str, Value]:
    """Load balance of experts.

    Args:
      counts_LE: routing counts per layer and expert of the layer's pool, integers `[L, E]`.
      groups: number of pools G; layer l uses pool `l // (L/G)`.
      visible_LE: with windows, the experts that each layer sees, bool. The load of an expert is then over what uniform
        routing of every layer within its window would give it.

    Returns:
      `load/layer` and `load/pool`: maximum over mean load per layer and per pool (1 is perfect balance);
      `load/busiest_over_mean`: the same over the experts of all pools; `experts/dead`: number of experts that no token
      was routed to; `experts/used`: number of the others.
    """
    counts_GE = pool_counts(counts_LE, groups)
    dead = int((counts_GE == 0).sum())
    if visible_LE is None:
        layer_L, pool_G = _busiest_over_mean(counts_LE.astype(np.int64)), _busiest_over_mean(counts_GE)
        busiest = float(_busiest_over_mean(counts_GE.reshape(-1)))
    else:
        even_LE = visible_LE / visible_LE.sum(axis=1, keepdims=True) * counts_LE.sum(axis=1, keepdims=True)
        layer_L = _busiest_over_even(counts_LE, even_LE)
        pool_G = _busiest_over_even(counts_GE, even_LE.sum(axis=0, keepdims=True))
        busiest = float(pool_G[0])
    return {
        "load/layer": layer_L.tolist(),
        "load/pool": pool_G.tolist(),
        "load/busiest_over_mean": busiest,
        "experts/dead": dead,
        "experts/used": counts_GE.size - dead,
    }


def _busiest_over_even(counts_XE: np.ndarray, even_XE: np.ndarray) -> np.ndarray:
    """Maximum of load over even load along the last axis; 0 where there is none."""
    return np.divide(counts_XE, even_XE, out=np.zeros(even_XE.shape), where=even_XE > 0).max(axis=-1)


def device_loads(counts_LE: np.ndarray, devices: int) -> list[float]:
    """Per layer, maximum over mean load of `devices`, each of which holds consecutive experts.

    A layer waits for its busiest device, so the mean of these numbers is the compute overhead of expert parallelism.
    """
    loads_LP = counts_LE.astype(np.int64).reshape(len(counts_LE), devices, -1).sum(axis=2)
    return _busiest_over_mean(loads_LP).tolist()


def routing_diagnostics(counts_LE: np.ndarray, groups: int, visible_LE: np.ndarray | None = None) -> dict[str, Value]:
    """How layers share experts. Sets of experts of layers in different pools are disjoint.

    Args:
      counts_LE: routing counts per layer and expert of the layer's pool, integers `[L, E]`.
      groups: number of pools G.
      visible_LE: with windows, the experts that each layer sees, bool. The top-K set of a layer that sees fewer than K
        is its window.

    Returns:
      `routing/top16_coverage` `[L]`: fraction of a layer's tokens on its 16 most used experts;
      `routing/entropy_bits` `[L]`: entropy of a layer's counts;
      `routing/jaccard`: mean Jaccard index of the top-16 sets over ordered pairs of different layers, with windows of
      those that see an expert in common (None without such pairs); for K in 1 .. 64 up to E, or to the widest window:
      `routing/union_size_K`, experts in the union of the layers' top-K sets, `routing/pool_coverage_K`, its fraction of
      all experts, `routing/saturation_K`, its fraction of the largest possible union, and `routing/token_coverage_K`,
      the fraction of all tokens on their layer's top-K experts, with `_mean`, `_min`, `_median`, `_max` over layers.
      Ties rank by id.
    """
    counts_LE = counts_LE.astype(np.int64)
    layers, experts = counts_LE.shape
    seen_LE = np.ones(counts_LE.shape, bool) if visible_LE is None else visible_LE
    compared_LL = np.ones((layers, layers), bool) if visible_LE is None else visible_LE @ visible_LE.T
    width_L = seen_LE.sum(axis=1)
    # What a layer does not see ranks behind what it sees and did not use.
    order_LE = np.argsort(np.where(seen_LE, -counts_LE, 1), axis=1, kind="stable")
    pool_offset = (np.arange(layers) // (layers // groups) * experts)[:, None]
    sums_L = np.maximum(counts_LE.sum(axis=1), 1)
    ranked_LE = np.take_along_axis(counts_LE, order_LE, axis=1)

    def top_sets(size: int) -> list[set[int]]:
        rows = zip(order_LE + pool_offset, width_L, strict=True)
        return [set(row[: min(size, width)].tolist()) for row, width in rows]

    share_LE = counts_LE / sums_L[:, None]
    sets = top_sets(min(_COVERAGE_TOP, experts))
    pairs = zip(*np.nonzero(compared_LL & ~np.eye(layers, dtype=bool)), strict=True)
    jaccard = [len(sets[i] & sets[j]) / len(sets[i] | sets[j]) for i, j in pairs]
    result: dict[str, Value] = {
        "routing/top16_coverage": (ranked_LE[:, :_COVERAGE_TOP].sum(axis=1) / sums_L).tolist(),
        "routing/entropy_bits": np.abs(-(share_LE * np.log2(np.maximum(share_LE, 1e-12))).sum(axis=1)).tolist(),
        "routing/jaccard": float(np.mean(jaccard)) if jaccard else None,
    }
    for size in (k for k in _SET_SIZES if k <= width_L.max()):
        union, total = len(set().union(*top_sets(size))), experts * groups
        most = min(size * layers, total) if visible_LE is None else _largest_union(visible_LE, size)
        result |= {
            f"routing/union_size_{size}": union,
            f"routing/pool_coverage_{size}": union / total,
            f"routing/saturation_{size}": union / most,
        }
        result |= _token_coverage(ranked_LE[:, :size].sum(axis=1), counts_LE.sum(axis=1), size)
    return result


def _token_coverage(on_top_L: np.ndarray, tokens_L: np.ndarray, size: int) -> dict[str, Value]:
    """`routing/token_coverage_K` and its statistics over layers, from each layer's choices of its top-K experts."""
    coverage_L = on_top_L / np.maximum(tokens_L, 1)
    name = f"routing/token_coverage_{size}"
    return {
        name: float(on_top_L.sum() / max(tokens_L.sum(), 1)),
        f"{name}_mean": float(coverage_L.mean()),
        f"{name}_min": float(coverage_L.min()),
        f"{name}_median": float(np.median(coverage_L)),
        f"{name}_max": float(coverage_L.max()),
    }


def _largest_union(visible_LE: np.ndarray, size: int) -> int:
    """The most experts that sets of `size` visible ones for each layer, or of all it sees, have in their union."""
    from scipy.sparse import csr_array
    from scipy.sparse.csgraph import maximum_bipartite_matching

    # One row for each place in a set: a matching gives different places different experts.
    places = np.repeat(visible_LE, size, axis=0)
    return int((maximum_bipartite_matching(csr_array(places), perm_type="column") >= 0).sum())


def perplexity(loss: float) -> float:
    """exp(loss); infinity if that overflows, NaN for NaN."""
    return math.inf if loss >= 700 else math.exp(loss)


def plain_json(value: Any) -> Any:
    """`value` for JSON: arrays become lists, NaN and infinity null."""
    if isinstance(value, np.ndarray | np.generic):
        value = value.tolist()
    if isinstance(value, Mapping):
        return {key: plain_json(item) for key, item in value.items()}
    if isinstance(value, list):
        return [plain_json(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


class MetricsWriter:
    """Writes `metrics.jsonl` (one JSON object per line: kind, step, time, values) and TensorBoard events.

    On resume, lines of later steps and an incomplete last line are dropped, so that the file equals that of an
    uninterrupted run but for what is `CLOCKED`. `kinds_at_resume` holds the kinds of the remaining lines of
    `resume_step`, `intervals` what they tell of the speed so far, and `kinds` the number of lines of each kind, those
    written later included.

    Args:
      folder: the run folder.
      resume_step: completed steps of the state that training resumes from; 0 for a new run.
      tensorboard: also write event files.
      writes: whether this process writes; in the others every method does nothing.

    Raises:
      FileError: from every method, if the disk is full or the file is damaged.
    """

    def __init__(self, folder: Path, resume_step: int, *, tensorboard: bool, writes: bool = True):
        self.path = folder / "metrics.jsonl" if writes else Path(os.devnull)
        tensorboard = tensorboard and writes
        kept = _drop_later_lines(self.path, resume_step) if writes else []
        self.kinds_at_resume = {str(line.get("kind")) for line in kept if line.get("step") == resume_step}
        self.kinds = Counter(str(line.get("kind")) for line in kept)
        self.intervals = [found for line in kept if (found := _interval(line)) is not None]
        with writing(self.path):
            self._stream = self.path.open("a", encoding="utf-8")
        self._events: Events | None = None
        if tensorboard:
            self._events = Events(folder / "tensorboard", resume_step + 1)

    def write(self, kind: str, step: int, values: Mapping[str, Any]) -> None:
        """Append a line, and a TensorBoard scalar for each number and each element of a list."""
        self.kinds[kind] += 1
        line = {"kind": kind, "step": step, "time": utc_now()} | plain_json(values)
        with writing(self.path):
            self._stream.write(json.dumps(line) + "\n")
            self._stream.flush()
        if self._events is None:
            return
        for key, value in line.items():
            if key in ("kind", "step"):
                continue
            parts = {f"{key}/{i:02d}": x for i, x in enumerate(value)} if isinstance(value, list) else {key: value}
            for name, number in parts.items():
                if isinstance(number, int | float):
                    self._events.add_scalar(f"{kind}/{name}", number, step)

    def sync(self) -> None:
        """Flush everything written so far to disk; a checkpoint must not be newer than the metrics on disk."""
        if self.path != Path(os.devnull):
            with writing(self.path):
                os.fsync(self._stream.fileno())
        if self._events is not None:
            self._events.flush()

    def close(self) -> None:
        """Flush and close the files."""
        with writing(self.path):
            self._stream.close()
        if self._events is not None:
            self._events.close()


def _interval(line: Mapping[str, Any]) -> Interval | None:
    """The speed that a line tells; None where it tells none, as those of earlier versions."""
    rate, seconds = line.get("tokens_per_second"), line.get("seconds")
    if line.get("kind") != "train" or not isinstance(rate, int | float) or not isinstance(seconds, int | float):
        return None
    return Interval(float(rate), float(seconds))


def _drop_later_lines(path: Path, step: int) -> list[dict[str, Any]]:
    """Keep only the complete lines of `path` up to `step`, and return their content.

    Raises:
      FileError: a line among those to keep is damaged.
    """
    if not path.exists():
        return []
    kept: list[Line] = []
    problem: FileError | None = None
    for line in read_metrics(path):
        if line.problem is not None:
            problem = line.problem
        elif line.record["step"] <= step and line.text.endswith(b"\n"):
            # Damage behind these lines is what a crash leaves; before them, a line of the past would be lost.
            if problem is not None:
                raise problem
            kept.append(line)
    write_atomically(path, b"".join(line.text for line in kept))
    return [line.record for line in kept]


def read_metrics(path: Path) -> Iterator[Line]:
    """The lines of a metrics file; raises FileError if it cannot be read."""
    return read_lines(path, {"kind": str, "step": int}, "correct or delete that line")
