"""Roofline plots: the rate that compute and memory bandwidth allow at the arithmetic intensity of kernels."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np

from unipool_jax.analysis.figures import Series, curves_figure

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def roofline_figure(roofs: Mapping[str, tuple[float, float]], intensities: Mapping[str, float]) -> Figure:
    """The rate that each chip allows against arithmetic intensity, and the intensities of some kernels as uprights.

    Args:
      roofs: per chip, peak in FLOP/s and bandwidth of its memory in bytes/s.
      intensities: FLOPs for each byte of memory traffic, by name.
    """
    marks = [*intensities.values(), *(peak / bandwidth for peak, bandwidth in roofs.values())]
    x = np.geomspace(min(marks) / 4, max(marks) * 4, 400)
    lines = {name: Series(x, np.minimum(peak, x * bandwidth)[None] / 1e12) for name, (peak, bandwidth) in roofs.items()}
    figure = curves_figure(
        lines, "attainable TFLOP/s", "arithmetic intensity (FLOPs per byte of memory traffic)", log="xy"
    )
    (axes,) = figure.axes
    axes.set_xlim(x[0], x[-1])
    # Room for the names of the uprights below the lowest roof.
    axes.set_ylim(bottom=min(bandwidth for _, bandwidth in roofs.values()) * x[0] / 1e12 / 6)
    ink = axes.xaxis.label.get_color()
    for name, intensity in intensities.items():
        axes.axvline(intensity, color=ink, linewidth=1.2, linestyle=":")
        axes.text(
            intensity, 0.03, f"{name} ", rotation=90, ha="right", va="bottom", transform=axes.get_xaxis_transform()
        )
    return figure
