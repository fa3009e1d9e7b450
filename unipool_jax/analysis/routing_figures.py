"""Figures of the routing of one checkpoint: heat maps use cividis, whose lightness grows evenly."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from unipool_jax.analysis.figures import PALETTE, ink, new_figure, whole_ticks
from unipool_jax.analysis.probe import Probe
from unipool_jax.analysis.usage import column_shares, even_shares, ownership_order, row_shares, total_shares

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_MAP = "cividis"


def _heat(axes: Axes, values: np.ndarray, label: str, limits: tuple[float, float] | None = None) -> None:
    """A heat map; what is masked in `values` is left blank, as nothing could be there."""
    low, high = limits or (0.0, float(np.ma.filled(values.max(), 0.0)) or 1.0)
    image = axes.imshow(values, aspect="auto", cmap=_MAP, interpolation="nearest", vmin=low, vmax=high)
    axes.spines[:].set_visible(False)
    whole_ticks(axes.xaxis)
    whole_ticks(axes.yaxis)
    axes.figure.colorbar(image, ax=axes, label=label, pad=0.015, fraction=0.05)  # type: ignore[union-attr]


def usage_figure(counts_LM: np.ndarray, visible_LM: np.ndarray | None = None) -> Figure:
    """Use of each expert by each layer, and by all layers together beside even use (method M8.3).

    Args:
      counts_LM: routing counts per layer and expert.
      visible_LM: whether a layer sees an expert, which is left blank otherwise; None: all see all.
    """
    layers, experts = counts_LM.shape
    figure = new_figure(3.2 + min(0.16 * layers, 4.5))
    bars, heat = figure.subplots(2, 1, height_ratios=[1.3, 0.8 + 0.12 * layers], sharex=True)
    share_M = 100 * total_shares(counts_LM)
    bars.bar(np.arange(experts), share_M, width=0.85, color=PALETTE[0])
    seen_LM = np.ones(counts_LM.shape, bool) if visible_LM is None else visible_LM
    even_M = 100 * even_shares(seen_LM).mean(axis=0)
    edges, uniform = np.arange(experts + 1) - 0.5, np.allclose(even_M, even_M[0])
    bars.stairs(even_M, edges, baseline=None, color=PALETTE[1], linestyle="--", linewidth=1.6)
    bars.set_ylim(0, max(float(share_M.max()), float(even_M.max())) * 1.25)
    said = f"dashed: even use, {even_M[0]:.2f}%" if uniform else "dashed: if each layer used all it sees evenly"
    bars.text(0.995, 0.97, said, transform=bars.transAxes, ha="right", va="top", color=ink())
    bars.set_ylabel("share of all\nchoices (%)")
    bars.set_title("All layers together")
    _heat(heat, np.ma.masked_where(~seen_LM, 100 * row_shares(counts_LM)), "share of the layer's\nchoices (%)")
    heat.set_title("Layer by layer" if seen_LM.all() else "Layer by layer (blank: not seen by the layer)")
    heat.set_ylabel("layer")
    heat.set_xlabel("expert")
    return figure


def ownership_figure(counts_LM: np.ndarray, visible_LM: np.ndarray | None = None) -> Figure:
    """Where the tokens of each expert come from: share of its choices by layer, experts sorted by their main layer.

    Arguments as of `usage_figure`.
    """
    layers, order_M = len(counts_LM), ownership_order(counts_LM)
    hidden_LM = np.zeros(counts_LM.shape, bool) if visible_LM is None else ~visible_LM
    figure = new_figure(2.2 + min(0.2 * layers, 5.0))
    axes = figure.subplots()
    _heat(
        axes,
        np.ma.masked_where(hidden_LM, 100 * column_shares(counts_LM))[:, order_M],
        "share of the expert's\nchoices (%)",
        (0, 100),
    )
    axes.set_ylabel("layer")
    axes.set_xlabel("place of the expert, sorted by the layer that uses it most (unused ones last)")
    return figure


def layers_figure(
    entropy_L: np.ndarray, coverage_L: np.ndarray, load_L: np.ndarray, width_L: np.ndarray, devices: int
) -> Figure:
    """Three numbers per layer: entropy of its choices, coverage of its 16 busiest experts, and load of devices.

    `width_L` is how many experts each layer sees, from which the dashed lines of even use follow.
    """
    layers = np.arange(len(entropy_L))
    figure = new_figure(2.9)
    entropy, coverage, load = figure.subplots(1, 3)
    top, bits_L = min(16, int(width_L.max())), np.log2(width_L)
    bits = f"even, {bits_L[0]:.2f}" if (width_L == width_L[0]).all() else "even"
    panels = (
        (entropy, entropy_L, bits_L, "entropy (bits)", f"Entropy (dashed: {bits})"),
        (
            coverage,
            100 * coverage_L,
            100 * np.minimum(top / width_L, 1),
            "share of choices (%)",
            f"On the {top} busiest (dashed: even)",
        ),
        (
            load,
            load_L,
            np.ones(len(layers)),
            "busiest over mean",
            f"Load of {devices} device{'s' * (devices > 1)} (dashed: even)",
        ),
    )
    edges = np.arange(len(layers) + 1) - 0.5
    for number, (axes, values, even_L, label, title) in enumerate(panels):
        axes.bar(layers, values, color=PALETTE[number], width=0.8)
        axes.stairs(even_L, edges, baseline=None, color=ink(), linestyle="--", linewidth=1)
        axes.set_ylim(0, max(float(np.max(values)), float(even_L.max()), 1e-3) * 1.1)
        axes.set_xlabel("layer")
        axes.set_ylabel(label)
        axes.set_title(title, fontsize=9.5)
        whole_ticks(axes.xaxis, 8)
    return figure


def coverage_figure(
    sizes: Sequence[int], union: Sequence[float], most: Sequence[float], tokens: Sequence[float]
) -> Figure:
    """Unions of the layers' K busiest experts, and the share of choices on them, against K (method M8.4)."""
    figure = new_figure(3.0)
    left, right = figure.subplots(1, 2)
    left.plot(sizes, union, color=PALETTE[0], marker="o", label="this model")
    left.plot(
        sizes, most, color=PALETTE[1], linestyle="--", marker="s", fillstyle="none", label="the most there can be"
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
        whole_ticks(axes.xaxis, 9)
        axes.grid(alpha=0.6)
    return figure


def unique_figure(counts_U: np.ndarray, mean: float, chance: float) -> Figure:
    """Distribution of the number of distinct experts of a token, with its mean and chance level (method M8.2)."""
    most = len(counts_U) - 1
    figure = new_figure(2.7)
    axes = figure.subplots()
    axes.bar(np.arange(most + 1), 100 * counts_U / max(counts_U.sum(), 1), color=PALETTE[0], width=0.85)
    axes.axvline(mean, color=ink(), linewidth=1.4, label=f"mean {mean:.2f}")
    axes.axvline(chance, color=PALETTE[1], linestyle="--", label=f"chance {chance:.2f}")
    axes.set_xlim(0.4, most + 0.6)
    axes.set_ylim(0, axes.get_ylim()[1] * 1.05)
    whole_ticks(axes.xaxis)
    axes.set_xlabel("distinct experts of a token")
    axes.set_ylabel("share of tokens (%)")
    axes.legend(loc="upper left", bbox_to_anchor=(1.0, 1.0))
    return figure


def co_use_figure(observed_LL: np.ndarray, expected_LL: np.ndarray, pairs_LL: np.ndarray | None = None) -> Figure:
    """Share of choices that two layers have in common, observed and for layers that choose independently.

    Pairs outside of `pairs_LL` have no expert in common and are left blank; None: every pair has.
    """
    figure = new_figure(3.7)
    off = ~np.eye(len(observed_LL), dtype=bool) if pairs_LL is None else pairs_LL
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


def similarity_figure(cosine_GEE: np.ndarray, together_GEE: np.ndarray | None = None) -> Figure:
    """Cosine between the weights of pairs of experts of one pool: all pairs, and the pairs of the first pool.

    Pairs outside of `together_GEE`, which no layer sees both of, are left out; None: all are in.
    """
    groups, experts, _ = cosine_GEE.shape
    figure = new_figure(3.3)
    left, right = figure.subplots(1, 2)
    compared_GEE = np.broadcast_to(~np.eye(experts, dtype=bool), cosine_GEE.shape)
    if together_GEE is not None:
        compared_GEE = compared_GEE & together_GEE
    left.hist(cosine_GEE[np.triu(compared_GEE)], bins=40, color=PALETTE[0])
    left.axvline(0, color=ink(), linestyle="--", linewidth=1)
    left.set_xlabel("cosine")
    left.set_ylabel("pairs of experts")
    whole = bool((compared_GEE.sum(axis=(1, 2)) == experts * (experts - 1)).all())
    left.set_title("All pairs within a pool" if whole else "Pairs that some layer sees both of")
    shown = np.ma.masked_where(~compared_GEE[0], cosine_GEE[0])
    _heat(right, shown, "cosine", (float(shown.min()), float(shown.max())))
    right.set_aspect("equal")
    one = "The pool" if whole else "The bank (blank: seen by no layer together)"
    right.set_title(one if groups == 1 else f"The first of {groups} pools")
    right.set_xlabel("expert")
    right.set_ylabel("expert")
    return figure


def probe_figure(probe: Probe, full: str = "full pool") -> Figure:
    """Loss added by random choices in one layer, for every condition, with one standard error.

    `full` names all experts that a layer sees.
    """
    figure = new_figure(3.1)
    axes = figure.subplots()
    names = {"full_pool": full, "top_8": "layer's 8 busiest"}
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
            edgecolor=ink(),
            linewidth=0.4,
            ecolor=ink(),
            capsize=2,
            label=f"from the {names[condition.candidates]}, {rules[condition.gates]}",
        )
    axes.axhline(0, color=ink(), linewidth=0.8)
    axes.set_xticks(places, [*(f"layer {layer}" for layer in probe.layers), "average"])
    axes.set_ylabel("added loss (nats per token)")
    figure.legend(loc="outside lower center", ncols=2)
    return figure


def zero_gates_figure(share_L: np.ndarray, steps_T: np.ndarray, over_time_LT: np.ndarray) -> Figure:
    """Tokens that no expert computes for: share per layer on held-out text, and per layer over training.

    Args:
      share_L: of a checkpoint.
      steps_T: steps at which training measured it; may be empty.
      over_time_LT: the shares in training batches at these steps.
    """
    figure = new_figure(2.9)
    if not len(steps_T):
        _zero_gate_bars(figure.subplots(), share_L)
        return figure
    left, right = figure.subplots(1, 2, width_ratios=[1, 1.7])
    _zero_gate_bars(left, share_L)
    # Each column reaches from halfway to the step before to halfway to the next.
    middle = (steps_T[1:] + steps_T[:-1]) / 2
    edges_x = np.concatenate([steps_T[:1] - 0.5, middle, steps_T[-1:] + 0.5])
    edges_y = np.arange(len(share_L) + 1) - 0.5
    top = max(100 * float(np.nanmax(over_time_LT)), 1.0)
    mesh = right.pcolormesh(edges_x, edges_y, 100 * over_time_LT, cmap=_MAP, vmin=0, vmax=top)
    right.invert_yaxis()
    right.spines[:].set_visible(False)
    figure.colorbar(mesh, ax=right, label="share of tokens (%)", pad=0.015, fraction=0.05)
    right.set_title("In training")
    right.set_xlabel("step")
    right.set_ylabel("layer")
    whole_ticks(right.xaxis, 8)
    whole_ticks(right.yaxis)
    return figure


def _zero_gate_bars(axes: Axes, share_L: np.ndarray) -> None:
    axes.bar(np.arange(len(share_L)), 100 * share_L, color=PALETTE[1], width=0.8)
    axes.set_ylim(0, max(100 * float(share_L.max()), 1.0) * 1.1)
    axes.set_xlabel("layer")
    axes.set_ylabel("share of tokens (%)")
    axes.set_title("On the text of this page")
    whole_ticks(axes.xaxis, 8)
