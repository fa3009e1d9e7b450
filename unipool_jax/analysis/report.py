"""The report of a checkpoint's analyses: explanations, figures and tables."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np

from unipool_jax.analysis import figures, usage
from unipool_jax.analysis.analyse import Analysis
from unipool_jax.analysis.history import series_of
from unipool_jax.analysis.page import Part, Table
from unipool_jax.analysis.paired import paired_of
from unipool_jax.analysis.probe import Condition, Difference, Probe
from unipool_jax.config.schema import Config

if TYPE_CHECKING:
    from unipool_jax.analysis.task_probe import TaskProbe

_SETS = (1, 2, 3, 5, 8, 10, 16, 20, 32, 48, 64)


def facts(analysis: Analysis) -> dict[str, str]:
    """The numbers at the top of the page, by label."""
    config, counts_LM = analysis.config, analysis.usage_map
    dead = len(usage.dead_experts(counts_LM))
    busiest = float(usage.total_shares(counts_LM).max()) * config.total_experts
    found = {
        "loss on this text (nats per token)": f"{analysis.loss:.4f}",
        "experts in use": f"{config.total_experts - dead} of {config.total_experts}",
        "busiest expert over mean load": f"{busiest:.2f}",
        f"distinct experts of a token over {config.mixture_layers} layers": f"{analysis.unique_mean:.2f}",
    }
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
    if analysis.config.layers_per_pool > 1:
        sections += [_ownership(analysis), _co_use(analysis), _sets(analysis)]
    sections += [_layers(analysis), _unique(analysis)]
    if analysis.config.experts_per_pool > 1:
        sections.append(_similarity(analysis))
    if analysis.probe is not None:
        sections.append(_probe(analysis.probe, analysis.config))
    if analysis.task_probe is not None:
        sections.append(_task_probe(analysis.task_probe))
    first = analysis.config.moe.dense_layers
    return [_numbered(section, first) for section in sections] + _training(history)


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
    experts, dead = config.total_experts, usage.dead_experts(counts_LM)
    order = np.argsort(-total_M, kind="stable")
    tenth = max(1, round(experts / 10))
    words = [
        "Each row of the heat map is a layer, each column an expert; bright means that the layer routes many of its "
        "tokens there. The bars above sum over all layers; the dashed line is uniform use.",
        f"The busiest expert, number {order[0]}, gets {_percent(total_M[order[0]])} of all tokens, "
        f"{total_M[order[0]] * experts:.1f} times the mean. The busiest {tenth} of {experts} get "
        f"{_percent(float(total_M[order[:tenth]].sum()))}.",
    ]
    if dead:
        shown = ", ".join(str(expert) for expert in dead[:20]) + (", ..." if len(dead) > 20 else "")
        words.append(f"No layer uses {len(dead)} of the experts: {shown}.")
    else:
        words.append("Every expert is used by some layer.")
    if config.pool.groups > 1:
        words.append(f"Layers can use only the {config.experts_per_pool} experts of their own pool, hence the blocks.")
    draw = partial(figures.usage_figure, counts_LM, config.pool.groups)
    return Part("Who uses which experts", words, ("usage", draw), "Heat map of expert use by layer under a bar chart.")


def _ownership(analysis: Analysis) -> Part:
    counts_LM = analysis.usage_map
    share_M = usage.column_shares(counts_LM).max(axis=0)
    used = counts_LM.sum(axis=0) > 0
    owned = int((share_M[used] > 0.5).sum())
    even = 1 / analysis.config.layers_per_pool
    words = [
        "Which layers do the tokens of an expert come from? Experts are sorted by the layer that uses them most, so a "
        "bright staircase means that layers have divided the pool among themselves, and uniform columns mean that "
        "experts serve all depths.",
        f"On average the main layer of an expert sends {_percent(float(share_M[used].mean()))} of its tokens (uniform "
        f"sharing: {_percent(even)}), and {owned} of {int(used.sum())} used experts get more than half from one layer.",
    ]
    draw = partial(figures.ownership_figure, counts_LM)
    return Part("Who owns the experts", words, ("ownership", draw), "Heat map of where each expert's tokens come from.")


def _co_use(analysis: Analysis) -> Part:
    observed, expected = analysis.common_LL, analysis.expected_common
    size, first = analysis.config.layers_per_pool, analysis.config.moe.dense_layers
    pool = np.arange(len(observed)) // size
    pairs = (pool[:, None] == pool[None, :]) & ~np.eye(len(observed), dtype=bool)
    mean, chance = float(observed[pairs].mean()), float(expected[pairs].mean())
    best = np.unravel_index(np.argmax(np.where(pairs, observed - expected, -1.0)), observed.shape)
    words = [
        "How often does a token visit the same expert in two layers? Left: observed. Right: expected if the two layers "
        "routed independently, each with its own expert frequencies.",
        f"Over all pairs of layers that share a pool, {100 * mean:.2f}% of choices are common, against an expected "
        f"{100 * chance:.2f}%. Layers {first + min(best)} and {first + max(best)} differ most: "
        f"{_percent(float(observed[best]))} instead of {_percent(float(expected[best]))}.",
    ]
    draw = partial(figures.co_use_figure, observed, expected)
    return Part("The same expert twice", words, ("co_use", draw), "Two heat maps of common choices of pairs of layers.")


def _sets(analysis: Analysis) -> Part:
    config, found = analysis.config, analysis.diagnostics
    sizes = [size for size in _SETS if size <= config.experts_per_pool]
    union = [found[f"routing/union_size_{size}"] for size in sizes]
    most = [min(size * config.mixture_layers, config.total_experts) for size in sizes]
    tokens = [found[f"routing/token_coverage_{size}"] for size in sizes]
    top = min(8, sizes[-1])
    jaccard = found["routing/jaccard"]
    words = [
        "Take the K busiest experts of every layer. Left: how many distinct experts they are; at the dashed line no "
        "two layers have one in common. Right: the fraction of tokens that these experts process.",
        f"With K = {top}, the busiest experts of all layers are {found[f'routing/union_size_{top}']} distinct experts, "
        f"which process {_percent(found[f'routing/token_coverage_{top}'])} of all tokens.",
    ]
    if jaccard is not None:
        words.append(
            f"The {min(16, config.experts_per_pool)} busiest experts of two layers overlap with a mean Jaccard index "
            f"of {jaccard:.2f}: 0 is no overlap, 1 the same set."
        )
    draw = partial(figures.coverage_figure, sizes, union, most, tokens)
    alt = "Experts in the union of the layers' busiest experts, and fraction of tokens on them, against K."
    return Part("Favourites", words, ("favourites", draw), alt)


def _layers(analysis: Analysis) -> Part:
    found, experts = analysis.diagnostics, analysis.config.experts_per_pool
    entropy_L, coverage_L = np.array(found["routing/entropy_bits"]), np.array(found["routing/top16_coverage"])
    load, devices, first = analysis.load, analysis.devices, analysis.config.moe.dense_layers
    narrow = int(entropy_L.argmin())
    words = [
        f"Entropy measures how widely a layer spreads its tokens: {np.log2(experts):.2f} bits is uniform use of all "
        f"{experts} experts; each bit less halves the effective number of experts. Layer {first + narrow} has the "
        f"lowest, {entropy_L[narrow]:.2f} bits, about {2 ** entropy_L[narrow]:.0f} experts.",
    ]
    if devices > 1:
        words.append(
            f"If the experts of a pool are sharded over {devices} devices, the busiest device of a layer gets "
            f"{load.by_layer_L.mean():.2f} times the mean load on average, and {load.by_layer_L.max():.2f} times in "
            "the worst layer. As each layer waits for its busiest device, the expert part of a pass takes "
            f"{load.critical_path:.2f} times as long as with balanced load."
        )
        if analysis.config.layers_per_pool > 1 and load.critical_path > 1.1 * load.whole_model:
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
    draw = partial(figures.layers_figure, entropy_L, coverage_L, load.by_layer_L, experts, devices)
    return Part("Layer by layer", words, ("layers", draw), "Entropy, coverage and device load of each layer.")


def _unique(analysis: Analysis) -> Part:
    config = analysis.config
    mean, chance, layers = analysis.unique_mean, analysis.unique_chance, config.mixture_layers
    words = [
        f"On its way through {layers} layers a token visits {mean:.2f} distinct experts, {mean / layers:.1%} of the "
        f"number of layers. Uniform independent routing would give {chance:.2f}.",
    ]
    if config.layers_per_pool == 1:
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
    if config.layers_per_pool == 1:
        return Part(title, words)
    draw = partial(figures.unique_figure, analysis.unique_U, mean, chance)
    return Part(title, words, ("unique", draw), "Distribution of distinct experts per token.")


def _similarity(analysis: Analysis) -> Part:
    cosine = analysis.cosine_GEE
    experts = cosine.shape[1]
    above = np.triu(np.ones((experts, experts), bool), 1)
    pairs = cosine[:, above]
    pool, first, second = np.unravel_index(np.argmax(np.where(above, cosine, -2.0)), cosine.shape)
    words = [
        "Are some experts copies of each other? Each expert is one vector (gate, up and down weights); the cosine is 1 "
        "for copies and near 0 for unrelated weights. Experts that compute the same function with permuted hidden "
        "units are not found this way.",
        f"The mean over all pairs is {pairs.mean():.4f}; the closest are experts {pool * experts + first} and "
        f"{pool * experts + second} with {cosine[pool, first, second]:.4f}.",
    ]
    draw = partial(figures.similarity_figure, cosine)
    return Part("Do experts look alike?", words, ("similarity", draw), "Histogram and heat map of cosines.")


def _probe(probe: Probe, config: Config) -> Part:
    first = probe.conditions[0]
    added = paired_of(first.average.mean, first.average.standard_error, probe.items)
    words = [
        "Does it matter which expert a token visits? One layer of the deep half at a time routes every token at "
        "random; the bars are the loss that this adds, with one standard error over windows of text. Large bars mean "
        "that the learned routing carries information; bars near zero mean that any expert would do.",
    ]
    _, interval, _, reading = added.cells()
    words.append(
        f"Random experts from the full pool, with the gates of the learned routing, add {_signed(first.average)} nats "
        f"per token to the loss of {probe.learned:.4f}, on average over layers {probe.layers[0]} to "
        f"{probe.layers[-1]}. 95% interval over {probe.items} windows of text: {interval}; that the choice matters is "
        f"{reading}."
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
    rows = [[_name(c), *(_signed(value) for value in c.by_layer), _signed(c.average)] for c in probe.conditions]
    table = Table(["added loss (nats per token)", *(f"layer {layer}" for layer in probe.layers), "average"], rows)
    draw = partial(figures.probe_figure, probe)
    return Part("Random choices in one layer", words, ("probe", draw), "Bars of added loss per layer.", table)


def _name(condition: Condition) -> str:
    candidates = {"full_pool": "full pool", "top_8": "8 busiest"}[condition.candidates]
    return f"{candidates}, {condition.gates} gates"


def _task_probe(found: TaskProbe) -> Part:
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
        rows.append([_name(same[0]), *(_points(condition.average) for condition in same)])
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
            "Load of the busiest expert over the mean load, summed over the layers that share the pool, per batch. 1 "
            f"is perfect balance; it ends at {busiest.y[0, -1]:.2f}, with a maximum of {busiest.y.max():.2f}."
        ]
        draw = partial(figures.curves_figure, {"train": busiest}, "busiest expert over mean load")
        found.append(Part("Balance over time", words, ("load", draw), "Load of the busiest expert over steps."))
    return found
