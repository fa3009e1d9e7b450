"""From the states of an answer's steps to the probability that the answer is right: a small LSTM.

Two layers of 64 read the states as one-hot vectors; the output after the last step gives the logit (arXiv 2506.04592).
With one bias vector for each gate, as Flax has it, these are 50,753 parameters.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from safetensors import SafetensorError
from safetensors.numpy import load, save

from unipool_jax.config.errors import UserError
from unipool_jax.config.files import read_bytes, write_atomically
from unipool_jax.verification.states import StepState

HIDDEN, LAYERS = 64, 2
STATES = len(StepState)


class Aggregator(nn.Module):
    """The LSTM.

    Args of a call:
      states_BT: numbers of `StepState`, int32; what lies behind a row's length means nothing.
      lengths_B: steps of each answer, 1 to T, int32.

    Returns of a call:
      Logits of an answer being right, float32 `[B]`.
    """

    hidden: int = HIDDEN
    layers: int = LAYERS

    @nn.compact
    def __call__(self, states_BT: jax.Array, lengths_B: jax.Array) -> jax.Array:
        """Logits; see the class."""
        outputs_BTH: Any = jax.nn.one_hot(states_BT, STATES)
        for layer in range(self.layers):
            outputs_BTH = nn.RNN(nn.OptimizedLSTMCell(self.hidden, name=f"layer_{layer}"))(outputs_BTH)
        # An LSTM reads forward: what lies behind the last step has not been seen there.
        last_BH = jnp.take_along_axis(outputs_BTH, (lengths_B - 1)[:, None, None], axis=1)[:, 0]
        return nn.Dense(1, name="head")(last_BH)[:, 0]


class Traces(NamedTuple):
    """Answers as their steps' states."""

    states_NT: np.ndarray
    """Numbers of `StepState`, int32, padded with any."""
    lengths_N: np.ndarray
    """Steps, int32."""
    right_N: np.ndarray
    """Whether the final answer is right, bool."""
    problems_N: np.ndarray
    """Which problem it answers, int."""


def pad(sequences: Sequence[Sequence[int]]) -> tuple[np.ndarray, np.ndarray]:
    """States `[N, T]`, padded with zeros to the longest, and lengths `[N]`; both int32."""
    lengths_N = np.array([len(one) for one in sequences], np.int32)
    states_NT = np.zeros((len(sequences), max(1, int(lengths_N.max(initial=0)))), np.int32)
    for row, one in enumerate(sequences):
        states_NT[row, : len(one)] = one
    return states_NT, lengths_N


def weighted_loss(logits_B: jax.Array, right_B: jax.Array, share: float) -> jax.Array:
    """Binary cross-entropy in which right and wrong answers weigh the same in total; a scalar, nats.

    Args:
      logits_B: of being right.
      right_B: whether they are.
      share: of right answers in the training set, between 0 and 1.
    """
    weights_B = jnp.where(right_B, 0.5 / share, 0.5 / (1 - share))
    return jnp.mean(weights_B * optax.sigmoid_binary_cross_entropy(logits_B, right_B.astype(jnp.float32)))


def balanced_accuracy(logits_N: np.ndarray, right_N: np.ndarray) -> float:
    """Mean of the shares of right and of wrong answers that are told, at a probability of 0.5."""
    told_N = (logits_N > 0) == right_N
    return float((told_N[right_N].mean() + told_N[~right_N].mean()) / 2)


@dataclass(frozen=True)
class Training:
    """How the aggregator is trained; defaults are those of the paper's code, whose batches vary in size."""

    learning_rate: float = 1e-4
    batch: int = 32
    epochs: int = 200
    seed: int = 0
    validation: float = 0.2
    """Share of the problems that is held out; all answers to a problem are on one side."""
    patience: int = 5
    """Training ends after so many epochs in a row with a training accuracy above 0.9 and 0.2 above validation."""


class Trained(NamedTuple):
    """An aggregator."""

    params: Any
    epoch: int
    """Of which it is: the one with the best balanced accuracy on validation."""
    accuracy: float
    """That accuracy."""


def split_by_problem(traces: Traces, share: float, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Rows to train on and rows held out: those of a random `share` of the problems, at least one.

    Raises:
      UserError: fewer than two problems.
    """
    problems = np.unique(traces.problems_N)
    if len(problems) < 2:
        raise UserError(f"{len(problems)} problem: an aggregator needs at least two, one of them held out; add answers")
    held = np.random.default_rng(seed).permutation(problems)[
        : min(len(problems) - 1, max(1, round(share * len(problems))))
    ]
    outside_N = np.isin(traces.problems_N, held)
    return np.flatnonzero(~outside_N), np.flatnonzero(outside_N)


def train_aggregator(traces: Traces, how: Training) -> Trained:
    """Train on most problems and keep the epoch that is best on the others.

    Args:
      traces: of which answers without steps are left out.
      how: settings.

    Raises:
      UserError: too few problems, or a side of the split on which all answers are right or all are wrong.
    """
    traces = Traces(*(part[traces.lengths_N > 0] for part in traces))
    train, held = split_by_problem(traces, how.validation, how.seed)
    for name, rows in (("training", train), ("held-out", held)):
        if len(set(traces.right_N[rows].tolist())) < 2:
            raise UserError(f"{len(rows)} {name} answers are all right or all wrong; add answers of the other kind")
    params, optimizer = initial_params(how.seed), optax.adam(how.learning_rate)
    epoch_of = _make_epoch(optimizer, float(traces.right_N[train].mean()))
    state, best, overfitted = optimizer.init(params), Trained(params, 0, 0.0), 0
    rng, batch = np.random.default_rng(how.seed), min(how.batch, len(train))
    for epoch in range(1, how.epochs + 1):
        order = rng.permutation(train)[: len(train) // batch * batch].reshape(-1, batch)
        params, state = epoch_of(params, state, *(part[order] for part in traces[:3]))
        logits_N = np.asarray(logits(params, traces.states_NT, traces.lengths_N))
        accuracies = [balanced_accuracy(logits_N[rows], traces.right_N[rows]) for rows in (train, held)]
        if accuracies[1] > best.accuracy:
            best = Trained(params, epoch, accuracies[1])
        overfitted = overfitted + 1 if accuracies[0] > 0.9 and accuracies[0] - accuracies[1] > 0.2 else 0
        if overfitted == how.patience:
            break
    return best


def _make_epoch(optimizer: optax.GradientTransformation, share: float) -> Any:
    """The jitted function `(params, state, states [X, B, T], lengths [X, B], right [X, B]) -> (params, state)`."""

    def loss(params: Any, states_BT: jax.Array, lengths_B: jax.Array, right_B: jax.Array) -> jax.Array:
        return weighted_loss(logits(params, states_BT, lengths_B), right_B, share)

    def step(carry: tuple[Any, Any], batch: tuple[jax.Array, ...]) -> tuple[tuple[Any, Any], None]:
        params, state = carry
        updates, state = optimizer.update(jax.grad(loss)(params, *batch), state)
        return (optax.apply_updates(params, updates), state), None

    return jax.jit(lambda params, state, *batches: jax.lax.scan(step, (params, state), batches)[0])


@jax.jit
def initial_params(seed: int) -> Any:
    """Parameters before training."""
    return Aggregator().init(jax.random.key(seed), jnp.zeros((1, 1), jnp.int32), jnp.ones(1, jnp.int32))


@jax.jit
def logits(params: Any, states_BT: jax.Array | np.ndarray, lengths_B: jax.Array | np.ndarray) -> jax.Array:
    """Logits of `Aggregator`, `[B]`; compiled once for each shape."""
    logits_B: Any = Aggregator().apply(params, states_BT, lengths_B)
    return jnp.asarray(logits_B)


def probabilities(params: Any, sequences: Sequence[Sequence[int]]) -> list[float]:
    """Probability that each answer is right, from the states of its steps; 0 for an answer without steps."""
    states_NT, lengths_N = pad(sequences)
    logits_N = np.asarray(logits(params, states_NT, np.maximum(lengths_N, 1)), np.float64)
    return [
        float(1 / (1 + np.exp(-logit))) if length else 0.0 for logit, length in zip(logits_N, lengths_N, strict=True)
    ]


def save_aggregator(path: Path, trained: Trained) -> None:
    """Write the parameters as safetensors."""
    write_atomically(path, save({name: np.asarray(array) for name, array in _named(trained.params).items()}))


def load_aggregator(path: Path) -> Any:
    """The parameters in a file.

    Raises:
      FileError: it cannot be read.
      UserError: it holds no aggregator.
    """
    shapes = jax.eval_shape(initial_params, 0)
    try:
        found = load(read_bytes(path))
    except SafetensorError as error:
        raise UserError(f"{path}: not a safetensors file ({error}); make one with unipool steps train") from error
    if {name: array.shape for name, array in found.items()} != {name: x.shape for name, x in _named(shapes).items()}:
        raise UserError(f"{path}: not the arrays of an aggregator; make one with unipool steps train")
    return jax.tree_util.tree_map_with_path(lambda place, _: found[jax.tree_util.keystr(place)], shapes)


def _named(params: Any) -> dict[str, Any]:
    return {jax.tree_util.keystr(place): leaf for place, leaf in jax.tree_util.tree_leaves_with_path(params)}
