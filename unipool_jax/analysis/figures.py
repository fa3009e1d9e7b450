"""Figures, drawn with matplotlib without a display.

A function here returns a `Figure`; `png` draws it in a light or a dark theme. Series differ in colour (Okabe and Ito's
palette, safe for colour-blind readers), in line style and in marker, so that they can be read in grey; heat maps use
cividis, whose lightness grows evenly.
"""

from __future__ import annotations

import base64
import io
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import numpy as np

from unipool_jax.analysis.probe import Probe
from unipool_jax.analysis.usage import column_shares, ownership_order, row_shares, total_shares

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Draw = Callable[[], "Figure"]

PALETTE = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#8C6BB1", "#7F7F7F")
_STYLES: tuple[Any, ...] = ("-", "--", "-.", ":", (0, (5, 1, 1, 1, 1, 1)))
_MARKERS = "osD^vPX*<>"
_MAP = "cividis"
_LIGHT = {"figure.facecolor": "#ffffff", "axes.facecolor": "#ffffff", "grid.color": "#d9d9d9"}
_INK_LIGHT, _INK_DARK = "#1a1a1a", "#e6e6e6"
_DARK = {"figure.facecolor": "#16181c", "axes.facecolor": "#16181c", "grid.color": "#3a3f47"}
_WIDTH = 8.6  # inches


class Series(NamedTuple):
    """One line of a plot, or a group of them: one row per seed."""

    x: np.ndarray
    """Shape `[X]`."""
    y: np.ndarray
    """Shape `[S, X]`."""


def png(draw: Draw, *, dark: bool = False) -> bytes:
    """The figure that `draw` returns, as the bytes of a PNG file, in the light or the dark theme."""
    import matplotlib
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    ink = _INK_DARK if dark else _INK_LIGHT
    names = ("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color", "legend.labelcolor")
    theme: dict[str, Any] = dict.fromkeys(names, ink) | (_DARK if dark else _LIGHT)
    theme |= {"font.size": 10, "axes.titlesize": 11, "axes.titlelocation": "left", "legend.frameon": False}
    theme |= {"axes.spines.top": False, "axes.spines.right": False, "lines.linewidth": 1.6, "lines.markersize": 4.5}
    # Start from the defaults, so that figures do not depend on the user's matplotlibrc.
    settings: Any = dict(matplotlib.rcParamsDefault) | theme | {"backend": "agg"}
    with matplotlib.rc_context(settings):
        figure = draw()
        stream = io.BytesIO()
        FigureCanvasAgg(figure)
        figure.savefig(stream, format="png", dpi=130, facecolor=figure.get_facecolor(), metadata={"Software": None})
    return stream.getvalue()


def data_uri(image: bytes) -> str:
    """A PNG file as a `data:` URI, to embed in a page."""
    return "data:image/png;base64," + base64.b64encode(image).decode("ascii")


def _figure(height: float) -> Figure:
    from matplotlib.figure import Figure

    return Figure(figsize=(_WIDTH, height), layout="constrained")


def _whole_ticks(axis: Any, most: int = 14) -> None:
    from matplotlib.ticker import MaxNLocator

    axis.set_major_locator(MaxNLocator(nbins=most, integer=True, min_n_ticks=1))


def _logarithmic(axes: Axes, direction: str) -> None:
    """A logarithmic scale with ticks at 1, 2, 5, 10, ..., as plain numbers."""
    from matplotlib.ticker import LogLocator, NullLocator

    axes.set(**{f"{direction}scale": "log"})
    axis = axes.xaxis if direction == "x" else axes.yaxis
    axis.set_major_locator(LogLocator(subs=(1, 2, 5), numticks=30))
    axis.set_minor_locator(NullLocator())
    axis.set_major_formatter(lambda value, _: f"{value:,g}")


def _ink() -> str:
    import matplotlib

    return str(matplotlib.rcParams["text.color"])


def _heat(axes: Axes, values: np.ndarray, label: str, limits: tuple[float, float] | None = None) -> None:
    low, high = limits or (0.0, float(values.max()) or 1.0)
    image = axes.imshow(values, aspect="auto", cmap=_MAP, interpolation="nearest", vmin=low, vmax=high)
    axes.spines[:].set_visible(False)
    _whole_ticks(axes.xaxis)
    _whole_ticks(axes.yaxis)
    axes.figure.colorbar(image, ax=axes, label=label, pad=0.015, fraction=0.05)  # type: ignore[union-attr]


def layers_from(first: int, draw: Draw) -> Figure:
    """The figure of `draw` with axes of layers that begin at number `first` instead of 0."""
    figure = draw()
    for axes in figure.axes:
        for axis, label in ((axes.xaxis, axes.get_xlabel()), (axes.yaxis, axes.get_ylabel())):
            if label == "layer":
                axis.set_major_formatter(lambda value, _: f"{first + value:g}")
    return figure


def usage_figure(counts_LM: np.ndarray, groups: int) -> Figure:
    """Use of each expert by each layer, and by all layers together beside even use (method M8.3)."""
    layers, experts = counts_LM.shape
    figure = _figure(3.2 + min(0.16 * layers, 4.5))
    bars, heat = figure.subplots(2, 1, height_ratios=[1.3, 0.8 + 0.12 * layers], sharex=True)
    share_M = 100 * total_shares(counts_LM)
    bars.bar(np.arange(experts), share_M, width=0.85, color=PALETTE[0])
    even = 100 / experts
    bars.axhline(even, color=PALETTE[1], linestyle="--")
    bars.set_ylim(0, max(float(share_M.max()), even) * 1.25)
    bars.text(
        0.995, 0.97, f"dashed: even use, {even:.2f}%", transform=bars.transAxes, ha="right", va="top", color=_ink()
    )
    bars.set_ylabel("share of all\nchoices (%)")
    bars.set_title("All layers together")
    _heat(heat, 100 * row_shares(counts_LM), "share of the layer's\nchoices (%)")
    for pool in range(1, groups):
        heat.axvline(pool * experts / groups - 0.5, color="#ffffff", linewidth=0.8)
    heat.set_title("Layer by layer")
    heat.set_ylabel("layer")
    heat.set_xlabel("expert" if groups == 1 else f"expert ({groups} pools of {experts // groups}, side by side)")
    return figure


def ownership_figure(counts_LM: np.ndarray) -> Figure:
    """Where the tokens of each expert come from: share of its choices by layer, experts sorted by their main layer."""
    layers = len(counts_LM)
    figure = _figure(2.2 + min(0.2 * layers, 5.0))
    axes = figure.subplots()
    _heat(
        axes,
        100 * column_shares(counts_LM)[:, ownership_order(counts_LM)],
        "share of the expert's\nchoices (%)",
        (0, 100),
    )
    axes.set_ylabel("layer")
    axes.set_xlabel("place of the expert, sorted by the layer that uses it most (unused ones last)")
    return figure


def layers_figure(
    entropy_L: np.ndarray, coverage_L: np.ndarray, load_L: np.ndarray, experts: int, devices: int
) -> Figure:
    """Three numbers per layer: entropy of its choices, coverage of its 16 busiest experts, and load of devices."""
    layers = np.arange(len(entropy_L))
    figure = _figure(2.9)
    entropy, coverage, load = figure.subplots(1, 3)
    top = min(16, experts)
    panels = (
        (
            entropy,
            entropy_L,
            math.log2(max(experts, 2)),
            "entropy (bits)",
            f"Entropy (dashed: even, {math.log2(experts):.2f})",
        ),
        (
            coverage,
            100 * coverage_L,
            100 * top / experts,
            "share of choices (%)",
            f"On the {top} busiest (dashed: even)",
        ),
        (load, load_L, 1.0, "busiest over mean", f"Load of {devices} device{'s' * (devices > 1)} (dashed: even)"),
    )
    for number, (axes, values, even, label, title) in enumerate(panels):
        axes.bar(layers, values, color=PALETTE[number], width=0.8)
        axes.axhline(even, color=_ink(), linestyle="--", linewidth=1)
        axes.set_ylim(0, max(float(np.max(values)), even) * 1.1)
        axes.set_xlabel("layer")
        axes.set_ylabel(label)
        axes.set_title(title, fontsize=9.5)
        _whole_ticks(axes.xaxis, 8)
    return figure


def coverage_figure(
    sizes: Sequence[int], union: Sequence[float], most: Sequence[float], tokens: Sequence[float]
) -> Figure:
    """Unions of the layers' K busiest experts, and the share of choices on them, against K (method M8.4)."""
    figure = _figure(3.0)
    left, right = figure.subplots(1, 2)
    left.plot(sizes, union, color=PALETTE[0], marker="o", label="this model")
    left.plot(
        sizes, most, color=PALETTE[1], linestyle="--", marker="s", fillstyle="none", label="no overlap between layers"
    )
    left.set_ylabel("experts")
    left.set_ylim(0, max(most) * 1.35)
    left.set_title("In the union of the layers' K busiest")
    left.legend(loc="upper left")
    right.plot(sizes, [100 * t for t in tokens], color=PALETTE[2], marker="D")
    right.set_ylim(0, 105)
    right.set_ylabel("share of choices (%)")
    right.set_title("On the layer's own K busiest")
    for axes in (left, right):
        axes.set_xlabel("K")
        _whole_ticks(axes.xaxis, 9)
        axes.grid(alpha=0.6)
    return figure


def unique_figure(counts_U: np.ndarray, mean: float, chance: float) -> Figure:
    """Distribution of the number of distinct experts of a token, with its mean and chance level (method M8.2)."""
    most = len(counts_U) - 1
    figure = _figure(2.7)
    axes = figure.subplots()
    axes.bar(np.arange(most + 1), 100 * counts_U / max(counts_U.sum(), 1), color=PALETTE[0], width=0.85)
    axes.axvline(mean, color=_ink(), linewidth=1.4, label=f"mean {mean:.2f}")
    axes.axvline(chance, color=PALETTE[1], linestyle="--", label=f"chance {chance:.2f}")
    axes.set_xlim(0.4, most + 0.6)
    axes.set_ylim(0, axes.get_ylim()[1] * 1.05)
    _whole_ticks(axes.xaxis)
    axes.set_xlabel("distinct experts of a token")
    axes.set_ylabel("share of tokens (%)")
    axes.legend(loc="upper left", bbox_to_anchor=(1.0, 1.0))
    return figure


def co_use_figure(observed_LL: np.ndarray, expected_LL: np.ndarray) -> Figure:
    """Share of choices that two layers have in common, observed and for layers that choose independently."""
    figure = _figure(3.7)
    off = ~np.eye(len(observed_LL), dtype=bool)
    high = 100 * max(float(observed_LL[off].max()), float(expected_LL[off].max()), 1e-6)
    titles = ("Observed", "If layers chose independently")
    for axes, values, title in zip(figure.subplots(1, 2), (observed_LL, expected_LL), titles, strict=True):
        shown = np.where(off, 100 * values, np.nan)
        _heat(axes, np.ma.masked_invalid(shown), "common choices (%)", (0, high))
        axes.set_aspect("equal")
        axes.set_title(title)
        axes.set_xlabel("layer")
        axes.set_ylabel("layer")
        if len(values) <= 12:
            for i, j in zip(*np.nonzero(off), strict=True):
                ink = "#ffffff" if shown[i, j] < 0.6 * high else "#1a1a1a"
                axes.text(j, i, f"{shown[i, j]:.0f}", ha="center", va="center", fontsize=8, color=ink)
    return figure


def similarity_figure(cosine_GEE: np.ndarray) -> Figure:
    """Cosine between the weights of pairs of experts of one pool: all pairs, and the pairs of the first pool."""
    groups, experts, _ = cosine_GEE.shape
    figure = _figure(3.3)
    left, right = figure.subplots(1, 2)
    pairs = cosine_GEE[:, *np.triu_indices(experts, 1)].reshape(-1)
    left.hist(pairs, bins=40, color=PALETTE[0])
    left.axvline(0, color=_ink(), linestyle="--", linewidth=1)
    left.set_xlabel("cosine")
    left.set_ylabel("pairs of experts")
    left.set_title("All pairs within a pool")
    shown = np.ma.masked_where(np.eye(experts, dtype=bool), cosine_GEE[0])
    _heat(right, shown, "cosine", (float(shown.min()), float(shown.max())))
    right.set_aspect("equal")
    right.set_title("The pool" if groups == 1 else f"The first of {groups} pools")
    right.set_xlabel("expert")
    right.set_ylabel("expert")
    return figure


def probe_figure(probe: Probe) -> Figure:
    """Loss added by random choices in one layer, for every condition, with one standard error."""
    figure = _figure(3.1)
    axes = figure.subplots()
    names = {"full_pool": "full pool", "top_8": "layer's 8 busiest"}
    rules = {"learned": "gates of the learned choice", "own": "gates of their own"}
    width = 0.8 / len(probe.conditions)
    places = np.arange(len(probe.layers) + 1)
    for number, condition in enumerate(probe.conditions):
        values = [*condition.by_layer, condition.average]
        axes.bar(
            places + (number - (len(probe.conditions) - 1) / 2) * width,
            [value.mean for value in values],
            width * 0.92,
            yerr=[value.standard_error or 0.0 for value in values],
            color=PALETTE[number],
            hatch=("", "//", "..", "xx")[number],
            edgecolor=_ink(),
            linewidth=0.4,
            ecolor=_ink(),
            capsize=2,
            label=f"from the {names[condition.candidates]}, {rules[condition.gates]}",
        )
    axes.axhline(0, color=_ink(), linewidth=0.8)
    axes.set_xticks(places, [*(f"layer {layer}" for layer in probe.layers), "average"])
    axes.set_ylabel("added loss (nats per token)")
    figure.legend(loc="outside lower center", ncols=2)
    return figure


def curves_figure(
    groups: Mapping[str, Series],
    label: str,
    x_label: str = "step",
    low: float = 0.0,
    log: Literal["", "x", "y", "xy"] = "",
) -> Figure:
    """Lines over time or another quantity, one colour per group: thin for each seed, thick for their mean.

    Args:
      groups: lines by name.
      label: of the vertical axis, with unit.
      x_label: of the horizontal axis.
      low: share of the values, the largest first, that may leave the plot at its top (the first steps of a loss).
      log: axes with a logarithmic scale.
    """
    figure = _figure(3.6)
    axes = figure.subplots()
    _lines(axes, groups)
    _clip(axes, groups.values(), low)
    if all(np.issubdtype(x.dtype, np.integer) for x, _ in groups.values()):
        _whole_ticks(axes.xaxis)
    for direction in log:
        _logarithmic(axes, direction)
    axes.set_xlabel(x_label)
    axes.set_ylabel(label)
    axes.grid(alpha=0.6)
    if len(groups) > 1:
        _legend_below(figure, axes)
    return figure


def paired_figure(
    groups: Mapping[str, Series], differences: Mapping[str, Series], baseline: str, label: str = "validation loss"
) -> Figure:
    """Loss of groups of runs, and below it the paired difference to the baseline with a band of one standard error."""
    figure = _figure(6.2)
    upper, lower = figure.subplots(2, 1, sharex=True)
    _lines(upper, groups)
    _clip(upper, groups.values(), 0.05)
    upper.set_ylabel(f"{label}\n(nats per token)")
    lower.axhline(0, color=_ink(), linewidth=0.8)
    for number, name in enumerate(groups):
        if name not in differences:
            continue
        x, y = differences[name]
        colour, mean = PALETTE[number % len(PALETTE)], y.mean(axis=0)
        lower.plot(
            x, mean, color=colour, linestyle=_STYLES[number % len(_STYLES)], marker=_MARKERS[number % len(_MARKERS)]
        )
        if len(y) > 1:
            error = y.std(axis=0, ddof=1) / math.sqrt(len(y))
            lower.fill_between(x, mean - error, mean + error, color=colour, alpha=0.2, linewidth=0)
    lower.set_ylabel(f"difference to {baseline}\n(nats per token, paired by seed)")
    lower.set_xlabel("step")
    for axes in (upper, lower):
        axes.grid(alpha=0.6)
    _legend_below(figure, upper)
    return figure


def fraction_figure(points: Mapping[str, Sequence[tuple[float, float, float | None]]], baseline: str) -> Figure:
    """Paired loss difference to the baseline against the size of the pool (method M9.5).

    Args:
      points: per line of the plot, (share of the baseline's experts, mean difference, standard error).
      baseline: name of the baseline.
    """
    figure = _figure(3.4)
    axes = figure.subplots()
    for number, (name, values) in enumerate(points.items()):
        x, y, error = zip(*sorted(values), strict=True)
        axes.errorbar(
            [100 * v for v in x],
            y,
            [e or 0.0 for e in error],
            color=PALETTE[number % len(PALETTE)],
            linestyle=_STYLES[number % len(_STYLES)],
            marker=_MARKERS[number % len(_MARKERS)],
            capsize=3,
            label=name,
        )
    axes.axhline(0, color=_ink(), linestyle="--", linewidth=1)
    axes.text(0.995, 0, f"{baseline} ", transform=axes.get_yaxis_transform(), ha="right", va="bottom")
    axes.set_xlabel(f"experts in the pool (% of those of {baseline})")
    axes.set_ylabel("loss difference\n(nats per token)")
    axes.grid(alpha=0.6)
    if len(points) > 1:
        _legend_below(figure, axes)
    return figure


def granularity_figure(points: Mapping[str, Sequence[tuple[str, float, float | None]]]) -> Figure:
    """Loss against granularity, experts per layer / experts per token (figure 2b of the paper), one line per method."""
    figure = _figure(3.4)
    axes = figure.subplots()
    ticks = sorted(
        {x for values in points.values() for x, _, _ in values}, key=lambda text: [int(p) for p in text.split("/")]
    )
    for number, (name, values) in enumerate(points.items()):
        by_tick = {x: (y, error) for x, y, error in values}
        shown = [tick for tick in ticks if tick in by_tick]
        axes.errorbar(
            [ticks.index(tick) for tick in shown],
            [by_tick[tick][0] for tick in shown],
            [by_tick[tick][1] or 0.0 for tick in shown],
            color=PALETTE[number % len(PALETTE)],
            linestyle=_STYLES[number % len(_STYLES)],
            marker=_MARKERS[number % len(_MARKERS)],
            capsize=3,
            label=name,
        )
    axes.set_xticks(range(len(ticks)), ticks)
    axes.set_xlabel("experts per layer / experts per token")
    axes.set_ylabel("validation loss\n(nats per token)")
    axes.grid(alpha=0.6)
    _legend_below(figure, axes)
    return figure


def _lines(axes: Axes, groups: Mapping[str, Series]) -> None:
    for number, (name, (x, y)) in enumerate(groups.items()):
        colour = PALETTE[number % len(PALETTE)]
        style = _STYLES[number % len(_STYLES)]
        marker = _MARKERS[number % len(_MARKERS)] if len(x) <= 40 else ""
        if len(y) > 1:
            for row in y:
                axes.plot(x, row, color=colour, linewidth=0.6, alpha=0.6)
        axes.plot(x, y.mean(axis=0), color=colour, linestyle=style, marker=marker, label=name)


def _clip(axes: Axes, series: Iterable[Series], share: float) -> None:
    """Limit the y axis so that this fraction of the values, the largest, lies above the plot."""
    values = np.concatenate([y.reshape(-1) for _, y in series])
    values = values[np.isfinite(values)]
    bottom, top = float(values.min()), float(np.quantile(values, 1 - share))
    if share and top > bottom:
        axes.set_ylim(bottom - 0.05 * (top - bottom), top + 0.05 * (top - bottom))


def _legend_below(figure: Figure, axes: Axes) -> None:
    handles, labels = axes.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=min(3, len(labels)))
