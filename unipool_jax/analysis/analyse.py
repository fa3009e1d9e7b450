"""All analyses of a checkpoint on a text, as values that figures and report are made from."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import jax
import numpy as np

from unipool_jax.analysis import usage
from unipool_jax.analysis.observe import make_observed_step, text_positions
from unipool_jax.analysis.probe import Probe, deep_half, language_model_loss, probe
from unipool_jax.config.schema import Config
from unipool_jax.data.pipeline import Batch
from unipool_jax.moe.scope import visible_experts
from unipool_jax.training.metrics import load_metrics, plain_json, routing_diagnostics
from unipool_jax.training.state import BalanceState

if TYPE_CHECKING:
    from unipool_jax.analysis.task_probe import TaskProbe


@dataclass(frozen=True)
class Analysis:
    """Analyses of a checkpoint. L layers, G pools of E experts, M = G E, k experts per token and layer.

    With windows over one bank a layer sees W of its pool's E experts; everything it is compared with keeps to them.
    """

    config: Config
    tokens: int
    """Predicted tokens of the text."""
    loss: float
    """Language-model loss, nats per token."""
    counts_LE: np.ndarray
    """Routing counts per layer and expert of the layer's pool, int64, without padding."""
    unique_U: np.ndarray
    """Number of tokens that visit 0, 1, 2, ... distinct experts, int64."""
    common_LL: np.ndarray
    """Fraction of choices that two layers have in common, float64."""
    zero_gates_L: np.ndarray
    """Share of tokens whose gates are all zero, so that no expert computes for them, float64."""
    batch_load: tuple[float, float]
    """Means of `DeviceLoad.critical_path` and `.whole_model` over batches, each as often as it has tokens."""
    cosine_GEE: np.ndarray
    """Cosine between the experts of each pool."""
    devices: int
    """Size of the expert-parallel group that device load is computed for."""
    probe: Probe | None
    task_probe: TaskProbe | None = None

    @property
    def usage_map(self) -> np.ndarray:
        """Routing counts per layer and expert of all pools, int64 `[L, M]`."""
        return usage.usage_map(self.counts_LE, self.config.pool.groups)

    @functools.cached_property
    def visible(self) -> np.ndarray:
        """Whether a layer sees an expert, bool `[L, M]`."""
        return visible_experts(self.config)

    @property
    def even_load(self) -> np.ndarray:
        """Share of all choices of each expert if every layer routes evenly over what it sees, `[M]`."""
        return np.asarray(usage.even_shares(self.visible).mean(axis=0))

    @property
    def shares_experts(self) -> bool:
        """Whether any expert is seen by more than one layer."""
        return bool((self.visible.sum(axis=0) > 1).any())

    @property
    def seen_together(self) -> np.ndarray:
        """Whether some layer sees both of two different experts of a pool, bool `[G, E, E]`."""
        experts = self.config.experts_per_pool
        seen_EE = np.ones((experts, experts), bool)
        if (visible_LE := self.config.visible) is not None:
            seen_EE = np.asarray(visible_LE.T @ visible_LE)
        return np.broadcast_to(seen_EE & ~np.eye(experts, dtype=bool), self.cosine_GEE.shape)

    @property
    def load(self) -> usage.DeviceLoad:
        """Device load over the full text."""
        return usage.device_load(self.counts_LE, self.devices, strided=self.config.windows is not None)

    @property
    def diagnostics(self) -> dict[str, Any]:
        """Routing diagnostics (method M8.4)."""
        return routing_diagnostics(self.counts_LE, self.config.pool.groups, self.config.visible)

    @property
    def expected_common(self) -> np.ndarray:
        """Expected `common_LL` if layers choose independently, `[L, L]`."""
        tokens = int(self.unique_U.sum())
        expected_LL = usage.chance_same_expert(self.counts_LE, self.config.pool.groups, tokens)
        return expected_LL / (tokens * self.config.moe.top_k)

    @property
    def unique_mean(self) -> float:
        """Mean number of distinct experts of a token."""
        return float(np.arange(len(self.unique_U)) @ self.unique_U / self.unique_U.sum())

    @property
    def unique_chance(self) -> float:
        """Expected `unique_mean` for uniform independent routing."""
        return usage.chance_unique(self.visible, self.config.moe.top_k)

    def as_json(self) -> dict[str, Any]:
        """All results as a JSON document."""
        config, counts_LM = self.config, self.usage_map
        layers, load = config.model.num_layers, self.load
        pairs = self.cosine_GEE[np.triu(self.seen_together)]
        document = {
            "model": {
                "scale": config.scale_name,
                "method": config.method_name,
                "layers": layers,
                "pools": config.pool.groups,
                "experts_per_pool": config.experts_per_pool,
                "top_k": config.moe.top_k,
                "windows": None if config.windows is None else config.windows._asdict(),
            },
            "tokens": self.tokens,
            "loss": self.loss,
            "usage": {
                "counts": self.counts_LE,
                "share_of_all_choices": usage.total_shares(counts_LM),
                "dead_experts": usage.dead_experts(counts_LM),
                "owner": usage.owners(counts_LM),
            },
            "load": load_metrics(self.counts_LE, config.pool.groups, config.visible),
            "routing": self.diagnostics | {"routing/zero_gates": self.zero_gates_L},
            "unique_experts": {
                "mean": self.unique_mean,
                "mean_per_layer": self.unique_mean / layers,
                "chance": self.unique_chance,
                "chance_per_layer": self.unique_chance / layers,
                "tokens_by_number": self.unique_U,
            },
            "co_use": {"observed": self.common_LL, "independent": self.expected_common},
            "expert_similarity": {
                "what": "cosine of gate, up and down weights, one vector per expert",
                "mean": float(pairs.mean()) if pairs.size else None,
                "largest": float(pairs.max()) if pairs.size else None,
                "cosine": self.cosine_GEE,
            },
            "device_load": {
                "expert_parallel": self.devices,
                "by_layer": load.by_layer_L,
                "critical_path": load.critical_path,
                "whole_model": load.whole_model,
                "mean_over_batches": dict(zip(("critical_path", "whole_model"), self.batch_load, strict=True)),
            },
            "probe": None if self.probe is None else _probe_json(self.probe, "language-model loss, nats per token"),
            "task_probe": None if self.task_probe is None else _task_probe_json(self.task_probe),
        }
        return dict(plain_json(document))


def _task_probe_json(result: TaskProbe) -> dict[str, Any]:
    tasks = {
        name: {
            "questions": result.questions[name],
            "text": result.text[name],
            **_probe_json(found, result.metrics[name]),
        }
        for name, found in result.by_task.items()
    }
    return {"tasks": tasks, "average": _probe_json(result.average, "accuracy, mean over tasks")}


def _probe_json(result: Probe, measure: str) -> dict[str, Any]:
    return {
        "measure": measure,
        "learned": result.learned,
        "layers": result.layers,
        "draws": result.draws,
        "conditions": [
            {
                "candidates": condition.candidates,
                "gates": condition.gates,
                "by_layer": [value._asdict() for value in condition.by_layer],
                "average": condition.average._asdict(),
            }
            for condition in result.conditions
        ],
    }


def analyse(
    config: Config,
    params: Any,
    balance: BalanceState,
    batches: Callable[[], Iterable[Batch]],
    *,
    devices: int = 1,
    draws: int = 1,
    seed: int = 0,
) -> Analysis:
    """Analyse a model with routers on text.

    Args:
      config: the model.
      params: its parameters.
      balance: its balance state.
      batches: returns the same batches at each call, all of one shape.
      devices: size of the expert-parallel group for device load; must divide the experts of a pool.
      draws: random draws of the randomization probe; 0 skips the probe.
      seed: of the probe.
    """
    groups, experts, top_k = config.pool.groups, config.experts_per_pool, config.moe.top_k
    layers = config.model.num_layers
    step = make_observed_step(config)
    loss, tokens = 0.0, 0
    counts_LE = np.zeros((layers, experts), np.int64)
    unique_U = np.zeros(layers * top_k + 1, np.int64)
    common_LL = np.zeros((layers, layers), np.int64)
    zero_gates_L = np.zeros(layers, np.int64)
    load_sums = np.zeros(2)
    for batch in batches():
        seen = jax.device_get(step(params, balance, jax.device_put(batch), None))
        text_N = text_positions(batch)
        experts_LNK = seen.experts_LNK[:, text_N]
        loss += float(seen.loss_BS.sum(dtype=np.float64))
        tokens += int(text_N.sum())
        batch_counts_LE = usage.expert_counts(experts_LNK, experts)
        counts_LE += batch_counts_LE
        unique_U += np.bincount(usage.unique_experts(experts_LNK, groups, experts), minlength=len(unique_U))
        common_LL += usage.same_expert(experts_LNK, groups)
        zero_gates_L += seen.zero_gates_L
        load = usage.device_load(batch_counts_LE, devices, strided=config.windows is not None)
        load_sums += np.array([load.critical_path, load.whole_model]) * text_N.sum()
    bank = params["pools"]["bank"]
    cosine_GEE = usage.expert_similarity(*(np.asarray(bank[name]) for name in ("gate", "up", "down")))
    probed = None
    if draws:
        measure = language_model_loss(config, params, balance, batches, seed, step)
        probed = probe(measure, counts_LE, top_k, deep_half(layers), draws, config.visible)
    return Analysis(
        config=config,
        tokens=tokens,
        loss=loss / tokens,
        counts_LE=counts_LE,
        unique_U=unique_U,
        common_LL=common_LL / (tokens * top_k),
        zero_gates_L=zero_gates_L / tokens,
        batch_load=(float(load_sums[0] / tokens), float(load_sums[1] / tokens)),
        cosine_GEE=cosine_GEE,
        devices=devices,
        probe=probed,
    )
