"""Figures, drawn with matplotlib without a display.

A function here returns a `Figure`; `png` draws it in a light or a dark theme. Series differ in colour (Okabe and Ito's
palette, safe for colour-blind readers), in line style and in marker, so that they can be read in grey.
`routing_figures` has those of one checkpoint.
"""

from __future__ import annotations

import base64
import io
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import numpy as np

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Draw = Callable[[], "Figure"]

PALETTE = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#8C6BB1", "#7F7F7F")
_STYLES: tuple[Any, ...] = ("-", "--", "-.", ":", (0, (5, 1, 1, 1, 1, 1)))
_MARKERS = "osD^vPX*<>"
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

    colour = _INK_DARK if dark else _INK_LIGHT
    names = ("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color", "legend.labelcolor")
    theme: dict[str, Any] = dict.fromkeys(names, colour) | (_DARK if dark else _LIGHT)
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


def new_figure(height: float) -> Figure:
    """An empty figure of the width of a page, `height` inches high."""
    from matplotlib.figure import Figure

    return Figure(figsize=(_WIDTH, height), layout="constrained")


def whole_ticks(axis: Any, most: int = 14) -> None:
    """At most so many ticks, at whole numbers."""
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


def ink() -> str:
    """The colour of text in the theme that is being drawn."""
    import matplotlib

    return str(matplotlib.rcParams["text.color"])


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
    figure = new_figure(3.6)
    axes = figure.subplots()
    _lines(axes, groups)
    _clip(axes, groups.values(), low)
    if all(np.issubdtype(x.dtype, np.integer) for x, _ in groups.values()):
        whole_ticks(axes.xaxis)
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
    figure = new_figure(6.2)
    upper, lower = figure.subplots(2, 1, sharex=True)
    _lines(upper, groups)
    _clip(upper, groups.values(), 0.05)
    upper.set_ylabel(f"{label}\n(nats per token)")
    lower.axhline(0, color=ink(), linewidth=0.8)
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
    figure = new_figure(3.4)
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
    axes.axhline(0, color=ink(), linestyle="--", linewidth=1)
    axes.text(0.995, 0, f"{baseline} ", transform=axes.get_yaxis_transform(), ha="right", va="bottom")
    axes.set_xlabel(f"experts in the pool (% of those of {baseline})")
    axes.set_ylabel("loss difference\n(nats per token)")
    axes.grid(alpha=0.6)
    if len(points) > 1:
        _legend_below(figure, axes)
    return figure


def granularity_figure(points: Mapping[str, Sequence[tuple[str, float, float | None]]]) -> Figure:
    """Loss against granularity, experts per layer / experts per token (figure 2b of the paper), one line per method."""
    figure = new_figure(3.4)
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
