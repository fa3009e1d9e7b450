"""Where a model with Switch Attention attends to everything: the section of the report, and its heat map."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np

from unipool_jax.analysis.figures import new_figure, whole_ticks
from unipool_jax.analysis.history import last_map
from unipool_jax.analysis.page import Part
from unipool_jax.config.schema import Config

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def gates(config: Config, history: Sequence[Mapping[str, Any]]) -> list[Part]:
    """The section, from the newest training line that tells of gates; none for other kinds of attention.

    Raises:
      FileError: that line is damaged.
    """
    share_LP = last_map(history, "train", "switch/full_map", config.model.num_layers)
    if config.attention.kind != "switch" or share_LP is None:
        return []
    mean_L = np.ma.filled(share_LP.mean(axis=1), 0.0)
    most, least = int(mean_L.argmax()), int(mean_L.argmin())
    words = [
        "Each row is a layer, each column a part of the sequence. Bright means that many of its tokens attend to all "
        f"positions before them; the others see the last {config.attention.window}. Parts in which no token has a "
        "choice are blank. From the last training step that was logged.",
        f"Layer {most} attends to everything most often ({100 * mean_L[most]:.1f}%), layer {least} least often "
        f"({100 * mean_L[least]:.1f}%); over all layers it is {100 * mean_L.mean():.1f}%.",
    ]
    figure = partial(gates_figure, share_LP)
    return [Part("Who attends to everything", words, ("gates", figure), "Heat map of full attention by layer.")]


def gates_figure(share_LP: np.ma.MaskedArray) -> Figure:
    """Share of full attention by layer and part of the sequence; masked where no token has a choice."""
    figure = new_figure(1.8 + min(0.2 * len(share_LP), 5.0))
    axes = figure.subplots()
    image = axes.imshow(100 * share_LP, aspect="auto", cmap="cividis", interpolation="nearest", vmin=0, vmax=100)
    axes.spines[:].set_visible(False)
    whole_ticks(axes.xaxis)
    whole_ticks(axes.yaxis)
    axes.set(xlabel=f"part of the sequence, of {share_LP.shape[1]}", ylabel="layer")
    figure.colorbar(image, ax=axes, label="tokens with full\nattention (%)", pad=0.015, fraction=0.05)
    return figure
