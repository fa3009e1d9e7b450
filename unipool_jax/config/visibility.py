"""Which experts of one bank each layer sees: every map of sharing across depth is a start and a width per layer.

Layer l sees the experts `start_l, start_l + 1, ..., start_l + W_l - 1` of a bank of M, modulo M. `pool.starts` gives
the starts as a list or as one of the rules below, `pool.window` the widths. Pools of equal size that share nothing
(`pool.groups`) keep a bank each and need no map.

The rules are functions of the depth L, the budget E = moe.experts_per_layer, n = pool.span and `pool.ends`:

    runs       layers in runs of n share the E experts of the run; the first and last `pool.ends` layers own theirs
    wide_runs  the same, and a run of n layers shares n E experts: as many parameters as without sharing
    cyclic     n banks of E experts used in turn; the first and last `pool.ends` layers own theirs
    ring       layer l sees n E experts from its own E on, modulo M: every expert serves n layers
    sliding    layer l sees the experts of the n layers around it, fewer at the ends
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import TYPE_CHECKING, Literal, NamedTuple, get_args

if TYPE_CHECKING:
    import numpy as np

Rule = Literal["runs", "wide_runs", "cyclic", "ring", "sliding"]


class Windows(NamedTuple):
    """A window of consecutive experts for each layer."""

    starts: tuple[int, ...]
    """First expert of each layer."""
    widths: tuple[int, ...]
    """Experts W_l that each layer sees."""
    experts: int
    """M, experts of the bank."""

    def _offsets(self) -> np.ndarray:
        """How far each expert lies behind a layer's start, int64 `[L, M]`."""
        import numpy as np

        return (np.arange(self.experts) - np.array(self.starts)[:, None]) % self.experts

    def visible(self) -> np.ndarray:
        """Whether a layer sees an expert, bool `[L, M]`."""
        import numpy as np

        return self._offsets() < np.array(self.widths)[:, None]

    def exposure(self) -> np.ndarray:
        """u, the number of layers that see each expert, int64 `[M]`."""
        return self.visible().sum(axis=0)

    def slots(self) -> np.ndarray:
        """Row of a layer's router for each expert of the bank, int32 `[L, M]`; max W, one past the last, if hidden."""
        import numpy as np

        return np.where(self.visible(), self._offsets(), max(self.widths)).astype(np.int32)


def _runs(layers: int, budget: int, span: int, ends: int) -> Windows:
    return _from_banks(_banks_of_runs(layers, span, ends), budget, wide=False)


def _wide_runs(layers: int, budget: int, span: int, ends: int) -> Windows:
    return _from_banks(_banks_of_runs(layers, span, ends), budget, wide=True)


def _banks_of_runs(layers: int, span: int, ends: int) -> list[int]:
    """The bank of each layer, banks counted in the order of their first layer; the last run may be short."""
    inner = range(max(layers - 2 * ends, 0))
    banks = [*range(min(ends, layers)), *(ends + layer // span for layer in inner)]
    return [*banks, *range(banks[-1] + 1, banks[-1] + 1 + layers - len(banks))]


def _cyclic(layers: int, budget: int, span: int, ends: int) -> Windows:
    inner = max(layers - 2 * ends, 0)
    used = min(span, inner)
    banks = [*range(min(ends, layers)), *(ends + layer % used for layer in range(inner))]
    return _from_banks([*banks, *range(ends + used, ends + used + layers - len(banks))], budget, wide=False)


def _from_banks(banks: list[int], budget: int, *, wide: bool) -> Windows:
    sizes = [budget * (banks.count(bank) if wide else 1) for bank in range(max(banks) + 1)]
    first = [0, *itertools.accumulate(sizes)]
    return Windows(tuple(first[bank] for bank in banks), tuple(sizes[bank] for bank in banks), first[-1])


def _ring(layers: int, budget: int, span: int, ends: int) -> Windows:
    del ends
    return Windows(tuple(budget * layer for layer in range(layers)), (budget * span,) * layers, budget * layers)


def _sliding(layers: int, budget: int, span: int, ends: int) -> Windows:
    del ends
    # An even span reaches one layer further back than forward.
    spans = [(max(layer - span // 2, 0), min(layer + (span - 1) // 2, layers - 1)) for layer in range(layers)]
    starts = tuple(budget * first for first, _ in spans)
    return Windows(starts, tuple(budget * (last + 1 - first) for first, last in spans), budget * layers)


RULES: dict[Rule, Callable[[int, int, int, int], Windows]] = {
    "runs": _runs,
    "wide_runs": _wide_runs,
    "cyclic": _cyclic,
    "ring": _ring,
    "sliding": _sliding,
}
"""Named rules of `pool.starts`: from L, E, n and `pool.ends` to the windows."""
assert set(RULES) == set(get_args(Rule))
