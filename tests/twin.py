"""The PyTorch twin beside our model: same settings, same weights, and its gradients in our structure."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import torch

from benchmarks.pytorch_baseline.model import Transformer
from benchmarks.pytorch_baseline.train import Trainer
from benchmarks.twin_settings import twin_settings
from tiny import END
from unipool_jax.config.schema import Config
from unipool_jax.convert.files import to_tensors
from unipool_jax.convert.layouts import make_layout
from unipool_jax.convert.runs import as_numpy
from unipool_jax.convert.weights import empty_weights
from unipool_jax.data.pipeline import Batch
from unipool_jax.training.optimizer import GAIN_NAMES, run_optimizer
from unipool_jax.training.state import TrainState, init_balance

# Threads that wait for each other cost more than they bring at these sizes.
torch.set_num_threads(1)


def twin_of(config: Config, state: TrainState) -> Trainer:
    """The twin with the weights of `state`."""
    model = Transformer(twin_settings(config, END), max_length=config.data.sequence_length)
    tensors = to_tensors(make_layout("twin", config, as_numpy(state.params, state.balance.expert_bias_GNE)))
    model.load_state_dict({name: torch.from_numpy(array) for name, array in tensors.items()})
    return Trainer(model)


def random_state(config: Config, seed: int = 0) -> TrainState:
    """A training state with normal weights, made without compiling anything."""
    random = np.random.default_rng(seed)

    def draw(path: Any, leaf: np.ndarray) -> np.ndarray:
        if jax.tree_util.keystr(path[-1:], simple=True) in GAIN_NAMES:
            return random.uniform(0.5, 1.5, leaf.shape).astype(np.float32)
        return random.normal(0, config.model.init_std, leaf.shape).astype(np.float32)

    params = jax.tree_util.tree_map_with_path(draw, empty_weights(config).params)
    for layer, width in enumerate(config.widths or ()):
        params["pools"]["layers"]["mixture"]["router"][0, layer, width:] = 0  # rows of no expert, which the twin lacks
    params = jax.tree.map(jnp.asarray, params)
    opt_state = run_optimizer(config).init(params)
    return TrainState(jnp.zeros((), jnp.int32), params, opt_state, init_balance(config))


def torch_batch(batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
    """Inputs and targets, int64."""
    return torch.from_numpy(np.asarray(batch.inputs)).long(), torch.from_numpy(np.asarray(batch.targets)).long()


def in_our_structure(config: Config, tensors: dict[str, torch.Tensor]) -> dict[str, np.ndarray]:
    """Arrays named like the twin's parameters (weights or gradients), by the names of our parameter tree."""
    weights = empty_weights(config)
    for name, tensor in make_layout("twin", config, weights).tensors.items():
        for part in tensor.parts:
            if name in tensors:
                part.ours[...] = part.view(tensors[name].detach().numpy())
    return by_name(weights.params)


def by_name(tree: Any) -> dict[str, np.ndarray]:
    """Leaves by dotted name."""
    leaves = jax.tree_util.tree_leaves_with_path(jax.device_get(tree))
    return {jax.tree_util.keystr(path, simple=True, separator="."): np.asarray(leaf) for path, leaf in leaves}
