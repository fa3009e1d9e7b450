"""The report of a checkpoint's analyses: explanations, figures and tables."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np

from unipool_jax.analysis import figures, routing_figures, usage
from unipool_jax.analysis.analyse import Analysis
from unipool_jax.analysis.history import layers_of, series_of
from unipool_jax.analysis.page import Part, Table
from unipool_jax.analysis.paired import paired_of
from unipool_jax.analysis.probe import Condition, Difference, Probe
from unipool_jax.analysis.switch_report import gates
from unipool_jax.config.schema import Config

if TYPE_CHECKING:
    from unipool_jax.analysis.task_probe import TaskProbe

_SETS = (1, 2, 3, 5, 8, 10, 16, 20, 32, 48, 64)
_JACCARD_TOP = 16
"""Experts in the sets of `routing/jaccard`; a layer that sees no more has only one such set, whatever it prefers."""


def facts(analysis: Analysis) -> dict[str, str]:
    """The numbers at the top of the page, by label."""
    config, counts_LM = analysis.config, analysis.usage_map
    dead = len(usage.dead_experts(counts_LM))
    busiest = float((usage.total_shares(counts_LM) / analysis.even_load).max())
    found = {
        "loss on this text (nats per token)": f"{analysis.loss:.4f}",
        "experts in use": f"{config.total_experts - dead} of {config.total_experts}",
        "busiest expert over mean load": f"{busiest:.2f}",
        f"distinct experts of a token over {config.mixture_layers} layers": f"{analysis.unique_mean:.2f}",
    }
    if _can_be_zero(analysis):
        worst = int(analysis.zero_gates_L.argmax())
        share, most = _percent(float(analysis.zero_gates_L.mean())), _percent(float(analysis.zero_gates_L[worst]))
        worst += config.moe.dense_layers
        found[f"tokens without an expert, mean over layers (layer {worst}: {most})"] = share
    if analysis.probe is not None:
        added = analysis.probe.conditions[0].average.mean
        found["added loss when a deep layer routes at random"] = f"{added:+.4f}"
    return found


def parts(analysis: Analysis, history: Sequence[Mapping[str, Any]]) -> list[Part]:
    """The sections of the page.

    Args:
      analysis: of the checkpoint.
      history: lines of the run's metrics file; may be empty.
    """
    sections = [_usage(analysis)]
    if _can_be_zero(analysis):
        sections.append(_zero_gates(analysis, history))
    if analysis.shares_experts:
        sections += [_ownership(analysis), _co_use(analysis), _sets(analysis)]
    sections += [_layers(analysis), _unique(analysis)]
    if analysis.seen_together.any():
        sections.append(_similarity(analysis))
    if analysis.probe is not None:
        rows = np.array(analysis.probe.layers) - analysis.config.moe.dense_layers
        without = float(analysis.zero_gates_L[rows].mean())
        sections.append(_probe(analysis.probe, analysis.config, without))
    if analysis.task_probe is not None:
        sections.append(_task_probe(analysis.task_probe, analysis.config))
    first = analysis.config.moe.dense_layers
    numbered = [_numbered(section, first) for section in sections]
    return numbered + gates(analysis.config, history) + _training(history)


def _numbered(section: Part, first: int) -> Part:
    """A section whose figure numbers layers from `first` on: those before have no experts."""
    if section.figure is None or not first:
        return section
    name, draw = section.figure
    return section._replace(figure=(name, partial(figures.layers_from, first, draw)))


def _signed(value: Difference) -> str:
    error = "" if value.standard_error is None else f" ± {value.standard_error:.4f}"
    return f"{value.mean:+.4f}{error}"


def _percent(share: float) -> str:
    return f"{100 * share:.1f}%"


def _usage(analysis: Analysis) -> Part:
    config, counts_LM = analysis.config, analysis.usage_map
    total_M = usage.total_shares(counts_LM)
    over_M = total_M / analysis.even_load
    experts, dead, busiest = config.total_experts, usage.dead_experts(counts_LM), int(over_M.argmax())
    order = np.argsort(-total_M, kind="stable")
    tenth = max(1, round(experts / 10))
    words = [
        "Each row of the heat map is a layer, each column an expert; bright means that the layer routes many of its "
        "tokens there. The bars above sum over all layers; the dashed line is uniform use.",
        f"The busiest expert, number {busiest}, gets {_percent(total_M[busiest])} of all tokens, "
        f"{over_M[busiest]:.1f} times its even share. The {tenth} of {experts} with most tokens get "
        f"{_percent(float(total_M[order[:tenth]].sum()))}.",
    ]
    if dead:
        shown = ", ".join(str(expert) for expert in dead[:20]) + (", ..." if len(dead) > 20 else "")
        words.append(f"No layer uses {len(dead)} of the experts: {shown}.")
    else:
        words.append("Every expert is used by some layer.")
    if config.pool.groups > 1:
        words.append(f"Layers can use only the {config.experts_per_pool} experts of their own pool, hence the blocks.")
    if (windows := config.windows) is not None:
        words.append(
            f"A layer sees {_range(windows.widths)} of the {experts} experts, and an expert is seen by "
            f"{_range(windows.exposure().tolist())} of the {len(counts_LM)} layers; what a layer does not see "
            "is blank. Uniform use, and the mean load of an expert here and below, is that of layers that choose "
            "evenly among what they see."
        )
    draw = partial(routing_figures.usage_figure, counts_LM, analysis.visible)
    return Part("Who uses which experts", words, ("usage", draw), "Heat map of expert use by layer under a bar chart.")


def _range(values: Sequence[int]) -> str:
    """`4`, or `4 to 12`."""
    low, high = min(values), max(values)
    return str(low) if low == high else f"{low} to {high}"


def _can_be_zero(analysis: Analysis) -> bool:
    """Whether a token can have no expert: NormRouter's scores can be zero, probabilities are not."""
    return analysis.config.moe.router == "norm" or bool(analysis.zero_gates_L.any())


def _zero_gates(analysis: Analysis, history: Sequence[Mapping[str, Any]]) -> Part:
    config, share_L = analysis.config, analysis.zero_gates_L
    worst, mean = config.moe.dense_layers + int(share_L.argmax()), float(share_L.mean())
    over_time = layers_of(history, "train", "routing/zero_gates", len(share_L))
    words = [
        "NormRouter's scores of a token can all be zero. Then no expert adds anything to it in that layer. It is still "
        "sent to the expert of the lowest number that the layer sees, and counted in its load above.",
        f"Of the tokens of this text {_percent(mean)} have no expert, on average over layers; in layer {worst} it is "
        f"{_percent(float(share_L.max()))}.",
        _balance_words(config),
    ]
    draw = partial(routing_figures.zero_gates_figure, share_L, over_time.x, over_time.y)
    alt = "Share of tokens without an expert, by layer and over steps."
    return Part("Tokens without an expert", words, ("zero_gates", draw), alt)


def _balance_words(config: Config) -> str:
    """What of the settings decides how many tokens lose all gates."""
    if config.moe.score_centering:
        return (
            "Logits are centered over experts before the norm (moe.score_centering=true), so that one score is "
            "positive unless all logits are equal."
        )
    if config.loss.balance != "pool":
        return f"No loss pays for scores of zero here (loss.balance={config.loss.balance})."
    if config.loss.pool_scores == "normalized":
        return (
            "The pool loss is computed on scores over their sum (loss.pool_scores=normalized): zeros do not lower it."
        )
    return (
        f"The pool loss is the published one, with coefficient {config.loss.pool_coefficient:g}: it falls when scores "
        "fall to zero. moe.score_centering=true and loss.pool_scores=normalized are ways out, see docs/sharing.md."
    )


def _ownership(analysis: Analysis) -> Part:
    counts_LM, visible_LM = analysis.usage_map, analysis.visible
    share_M = usage.column_shares(counts_LM).max(axis=0)
    used = (counts_LM.sum(axis=0) > 0) & (visible_LM.sum(axis=0) > 1)
    owned = int((share_M[used] > 0.5).sum())
    even = float(usage.even_owner_share(visible_LM)[used].mean())
    words = [
        "Which layers do the tokens of an expert come from? Experts are sorted by the layer that uses them most, so a "
        "bright staircase means that layers have divided the pool among themselves, and uniform columns mean that "
        "experts serve all depths.",
        f"On average the main layer of an expert sends {_percent(float(share_M[used].mean()))} of its tokens (uniform "
        f"sharing: {_percent(even)}), and {owned} of {int(used.sum())} used experts get more than half from one layer.",
    ]
    if private := int((visible_LM.sum(axis=0) == 1).sum()):
        words.append(
            f"Not counted are {private} experts that one layer alone sees; what a layer does not see is blank."
        )
    draw = partial(routing_figures.ownership_figure, counts_LM, visible_LM)
    return Part("Who owns the experts", words, ("ownership", draw), "Heat map of where each expert's tokens come from.")


def _co_use(analysis: Analysis) -> Part:
    observed, expected = analysis.common_LL, analysis.expected_common
    pairs, first = usage.sharing_pairs(analysis.visible), analysis.config.moe.dense_layers
    mean, chance = float(observed[pairs].mean()), float(expected[pairs].mean())
    best = np.unravel_index(np.argmax(np.where(pairs, observed - expected, -1.0)), observed.shape)
    words = [
        "How often does a token visit the same expert in two layers? Left: observed. Right: expected if the two layers "
        "routed independently, each with its own expert frequencies.",
        f"Over all pairs of layers that share experts, {100 * mean:.2f}% of choices are common, against an expected "
        f"{100 * chance:.2f}%. Layers {first + min(best)} and {first + max(best)} differ most: "
        f"{_percent(float(observed[best]))} instead of {_percent(float(expected[best]))}.",
    ]
    if not pairs.any(axis=1).all() or pairs.sum() < pairs.size - len(pairs):
        words.append("Pairs of layers that see no expert in common are blank.")
    draw = partial(routing_figures.co_use_figure, observed, expected, pairs)
    return Part("The same expert twice", words, ("co_use", draw), "Two heat maps of common choices of pairs of layers.")


def _sets(analysis: Analysis) -> Part:
    found, width_L = analysis.diagnostics, analysis.visible.sum(axis=1)
    sizes = [size for size in _SETS if size <= width_L.max()]
    union = [found[f"routing/union_size_{size}"] for size in sizes]
    most = [round(size / found[f"routing/saturation_{sets}"]) for sets, size in zip(sizes, union, strict=True)]
    tokens = [found[f"routing/token_coverage_{size}"] for size in sizes]
    top = min(8, sizes[-1])
    jaccard = found["routing/jaccard"]
    words = [
        "Take the K busiest experts of every layer. Left: how many distinct experts they are, below the most that "
        "could be. Right: the fraction of tokens that these experts process.",
        f"With K = {top}, the busiest experts of all layers are {found[f'routing/union_size_{top}']} distinct experts, "
        f"which process {_percent(found[f'routing/token_coverage_{top}'])} of all tokens.",
    ]
    if jaccard is not None and width_L.min() > _JACCARD_TOP:
        words.append(
            f"The {_JACCARD_TOP} busiest experts of two layers that share experts overlap with a mean Jaccard index of "
            f"{jaccard:.2f}: 0 is no overlap, 1 the same set."
        )
    draw = partial(routing_figures.coverage_figure, sizes, union, most, tokens)
    alt = "Experts in the union of the layers' busiest experts, and fraction of tokens on them, against K."
    return Part("Favourites", words, ("favourites", draw), alt)


def _layers(analysis: Analysis) -> Part:
    found, width_L = analysis.diagnostics, analysis.visible.sum(axis=1)
    entropy_L, coverage_L = np.array(found["routing/entropy_bits"]), np.array(found["routing/top16_coverage"])
    load, devices, first = analysis.load, analysis.devices, analysis.config.moe.dense_layers
    narrow = int((entropy_L - np.log2(width_L)).argmin())
    bits = " to ".join(f"{np.log2(width):.2f}" for width in sorted({int(width_L.min()), int(width_L.max())}))
    words = [
        f"Entropy measures how widely a layer spreads its tokens: {bits} bits is uniform use of all "
        f"{_range(width_L.tolist())} experts that a layer sees; each bit less halves the effective number of experts. "
        f"Layer {first + narrow} is furthest below, with {entropy_L[narrow]:.2f} bits, about "
        f"{2 ** entropy_L[narrow]:.0f} of {width_L[narrow]} experts.",
    ]
    placed = "" if analysis.config.windows is None else f", expert e on device e modulo {devices}"
    if devices > 1:
        words.append(
            f"If the experts of a pool are sharded over {devices} devices{placed}, the busiest device of a layer gets "
            f"{load.by_layer_L.mean():.2f} times the mean load on average, and {load.by_layer_L.max():.2f} times in "
            "the worst layer. As each layer waits for its busiest device, the expert part of a pass takes "
            f"{load.critical_path:.2f} times as long as with balanced load."
        )
        if analysis.shares_experts and load.critical_path > 1.1 * load.whole_model:
            words.append(
                f"Summed over all layers the busiest device has only {load.whole_model:.2f} times the mean: balance "
                "over the pool is not balance in each layer."
            )
        words.append(
            f"These are averages over the full text; within single batches the factors are "
            f"{analysis.batch_load[0]:.2f} and {analysis.batch_load[1]:.2f}."
        )
    else:
        words.append("A single device has no load to balance; expert_parallel=4, for example, shows that of four.")
    draw = partial(routing_figures.layers_figure, entropy_L, coverage_L, load.by_layer_L, width_L, devices)
    return Part("Layer by layer", words, ("layers", draw), "Entropy, coverage and device load of each layer.")


def _unique(analysis: Analysis) -> Part:
    config = analysis.config
    mean, chance, layers = analysis.unique_mean, analysis.unique_chance, config.mixture_layers
    words = [
        f"On its way through {layers} layers a token visits {mean:.2f} distinct experts, {mean / layers:.1%} of the "
        f"number of layers. Uniform independent routing would give {chance:.2f}.",
    ]
    if not analysis.shares_experts:
        words.append("Layers with private experts cannot share one: both numbers are equal by definition.")
    elif mean < chance - 0.005:
        words.append(
            "Fewer than by chance: tokens return to the same experts, because layers prefer the same experts, or "
            "because layers route the same token alike (see above)."
        )
    elif mean > chance + 0.005:
        words.append("More than by chance: layers have divided the pool rather than sharing it token by token.")
    else:
        words.append("That is the chance level: no sign that tokens return to the same experts.")
    title = "Distinct experts of one token"
    if float(analysis.zero_gates_L.mean()) > 0.01:
        words.append("A token without an expert in a layer is counted as if it visited one there.")
    if not analysis.shares_experts:
        return Part(title, words)
    draw = partial(routing_figures.unique_figure, analysis.unique_U, mean, chance)
    return Part(title, words, ("unique", draw), "Distribution of distinct experts per token.")


def _similarity(analysis: Analysis) -> Part:
    cosine, together = analysis.cosine_GEE, analysis.seen_together
    experts = cosine.shape[1]
    above = np.triu(together)
    pairs, only = cosine[above], "" if analysis.config.windows is None else " that some layer sees both of"
    pool, first, second = np.unravel_index(np.argmax(np.where(above, cosine, -2.0)), cosine.shape)
    words = [
        "Are some experts copies of each other? Each expert is one vector (gate, up and down weights); the cosine is 1 "
        "for copies and near 0 for unrelated weights. Experts that compute the same function with permuted hidden "
        "units are not found this way.",
        f"The mean over all pairs{only} is {pairs.mean():.4f}; the closest are experts {pool * experts + first} and "
        f"{pool * experts + second} with {cosine[pool, first, second]:.4f}.",
    ]
    draw = partial(routing_figures.similarity_figure, cosine, together)
    return Part("Do experts look alike?", words, ("similarity", draw), "Histogram and heat map of cosines.")


def _probe(probe: Probe, config: Config, without: float) -> Part:
    """The section of the probe; `without` is the share of tokens without an expert in the probed layers."""
    first = probe.conditions[0]
    added = paired_of(first.average.mean, first.average.standard_error, probe.items)
    words = [
        "Does it matter which expert a token visits? One layer of the deep half at a time routes every token at "
        "random; the bars are the loss that this adds, with one standard error over windows of text. Large bars mean "
        "that the learned routing carries information; bars near zero mean that any expert would do.",
    ]
    _, interval, _, reading = added.cells()
    words.append(
        f"Random experts from the {_full(config)}, with the gates of the learned routing, add "
        f"{_signed(first.average)} nats per token to the loss of {probe.learned:.4f}, on average over layers "
        f"{probe.layers[0]} to {probe.layers[-1]}. 95% interval over {probe.items} windows of text: {interval}; "
        f"that the choice matters is {reading}."
    )
    if without > 0.01:
        words.append(
            f"{_percent(without)} of the tokens have no expert in these layers. With the gates of the learned routing "
            "nothing changes for them, which keeps these bars low."
        )
    if len(probe.conditions) > 2:
        words.append(
            "Drawing only from the layer's 8 busiest experts makes the test comparable with a mixture of 8 experts per "
            "layer."
        )
    if config.moe.router == "norm":
        words.append(
            "With their own gates, random experts with score zero contribute nothing, so these bars include the loss "
            "of skipping the layer for such tokens."
        )
    rows = [[_name(c, config), *(_signed(value) for value in c.by_layer), _signed(c.average)] for c in probe.conditions]
    table = Table(["added loss (nats per token)", *(f"layer {layer}" for layer in probe.layers), "average"], rows)
    draw = partial(routing_figures.probe_figure, probe, _full(config))
    return Part("Random choices in one layer", words, ("probe", draw), "Bars of added loss per layer.", table)


def _full(config: Config) -> str:
    return "full pool" if config.windows is None else "layer's window"


def _name(condition: Condition, config: Config) -> str:
    candidates = {"full_pool": _full(config), "top_8": "8 busiest"}[condition.candidates]
    return f"{candidates}, {condition.gates} gates"


def _task_probe(found: TaskProbe, config: Config) -> Part:
    probes = [*found.by_task.values(), found.average]
    names = [f"{task} ({found.metrics[task]})" for task in found.by_task]
    asked = ", ".join(f"{number:,} of {task}" for task, number in found.questions.items())
    words = [
        "The same random routing while the model answers multiple-choice questions. The first row is its accuracy "
        "without intervention; the others are what random routing adds to it, in percentage points with one standard "
        "error over questions, averaged over the layers of the deep half, each randomized separately.",
        f"Questions: {asked}. The 8 busiest experts are those on the text of this page.",
    ]
    rows = [["no intervention", *(f"{100 * probe.learned:.2f}" for probe in probes)]]
    for same in zip(*(probe.conditions for probe in probes), strict=True):
        rows.append([_name(same[0], config), *(_points(condition.average) for condition in same)])
    table = Table(["accuracy (percent)", *names, "mean"], rows)
    return Part("Random choices and zero-shot tasks", words, table=table)


def _points(value: Difference) -> str:
    error = "" if value.standard_error is None else f" ± {100 * value.standard_error:.2f}"
    return f"{100 * value.mean:+.2f}{error}"


def _training(history: Sequence[Mapping[str, Any]]) -> list[Part]:
    """Loss and load over steps, where the run has written them."""
    found = []
    losses = {"train": series_of(history, "train", "loss/lm"), "valid": series_of(history, "valid", "loss")}
    curves = {name: series for name, series in losses.items() if series is not None}
    if curves:
        words = ["Language-model loss over steps; that of the first steps exceeds the plot."]
        draw = partial(figures.curves_figure, curves, "loss (nats per token)", low=0.05)
        found.append(Part("Training", words, ("loss", draw), "Loss over steps."))
    busiest = series_of(history, "train", "load/busiest_over_mean")
    if busiest is not None and float(busiest.y.max()) > 1:
        words = [
            "Load of the busiest expert over the mean load, summed over the layers that see it, per batch. 1 "
            f"is perfect balance; it ends at {busiest.y[0, -1]:.2f}, with a maximum of {busiest.y.max():.2f}."
        ]
        draw = partial(figures.curves_figure, {"train": busiest}, "busiest expert over mean load")
        found.append(Part("Balance over time", words, ("load", draw), "Load of the busiest expert over steps."))
    return found
