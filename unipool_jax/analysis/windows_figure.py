"""What each layer sees, one strip of layers by experts for each way to share them."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np

from unipool_jax.analysis.figures import ink, new_figure
from unipool_jax.config.schema import Config
from unipool_jax.moe.scope import visible_experts

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_MAP = "viridis_r"
_COLUMNS = 3


def windows_figure(designs: Mapping[str, Config]) -> Figure:
    """A strip for each design: a row is a layer, a column an expert of all banks, colored where the layer sees it.

    The color says how many layers see the expert. Experts are drawn to one scale, so the length of a strip is the
    number of experts.

    Args:
      designs: configurations by the name that stands over their strip.
    """
    from matplotlib import colormaps
    from matplotlib.patches import Patch

    maps = {name: visible_experts(config) for name, config in designs.items()}
    most = max(visible_LM.shape[1] for visible_LM in maps.values())
    counts = sorted({int(u) for visible_LM in maps.values() for u in visible_LM.sum(axis=0)})
    place = {count: 0.12 + 0.85 * number / max(len(counts) - 1, 1) for number, count in enumerate(counts)}
    colors = {count: colormaps[_MAP](place[count]) for count in counts}
    rows = math.ceil(len(maps) / _COLUMNS)
    figure = new_figure(0.5 + 1.75 * rows)
    panels = figure.subplots(rows, _COLUMNS, squeeze=False).reshape(-1)
    for axes in panels[len(maps) :]:
        axes.set_visible(False)
    for axes, (name, visible_LM) in zip(panels, maps.items(), strict=False):
        layers, experts = visible_LM.shape
        color_M4 = np.array([colors[int(u)] for u in visible_LM.sum(axis=0)])
        image = np.where(visible_LM[:, :, None], color_M4, np.zeros(4))
        axes.imshow(image, aspect="auto", interpolation="nearest", extent=(0, experts, layers, 0))
        axes.plot([0, experts, experts, 0, 0], [0, 0, layers, layers, 0], color=ink(), linewidth=0.8)
        axes.hlines(np.arange(1, layers), 0, experts, color=ink(), linewidth=0.2)
        axes.set_xlim(-0.01 * most, 1.01 * most)
        axes.set_ylim(layers + 0.2, -0.2)
        axes.spines[:].set_visible(False)
        axes.set_yticks([0.5, layers - 0.5], ["0", str(layers - 1)])
        axes.set_xticks([0, experts])
        axes.set_title(name, fontsize=9)
        axes.tick_params(labelsize=8, length=2)
    for axes in panels[::_COLUMNS]:
        axes.set_ylabel("layer", fontsize=9)
    for axes in panels[max(len(maps) - _COLUMNS, 0) : len(maps)]:
        axes.set_xlabel("expert", fontsize=9)
    handles = [Patch(facecolor=colors[count], label=str(count)) for count in counts]
    title = "layers that see an expert"
    figure.legend(handles=handles, title=title, ncols=len(counts), loc="outside lower center", fontsize=9)
    return figure
