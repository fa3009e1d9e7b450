"""Does a model that chooses its attention token by token find what lies far back? Retrieval from synthetic text.

    python -m benchmarks.switch_study                      # trains what is missing, prints the tables, draws the curve
    python -m benchmarks.switch_study --out /tmp/try --seeds 1 --parent-steps 20 --steps 10

A sequence is a noisy cycle of filler tokens. At random positions stand notes, each one token that gives one of `KEYS` a
value; later each key is asked for once, and the token behind the question is its value. A question is far where the
window no longer reaches its note. A model with full attention is trained, and goes on with each kind of attention.
Everything is paired by seed: initial weights, text and parent.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.intervals import Losses, difference_cells, markdown_table
from unipool_jax.analysis.paired import CELLS
from unipool_jax.config.compose import compose_config
from unipool_jax.config.files import RESTORE, read_json, write_json
from unipool_jax.config.schema import Config
from unipool_jax.data.pipeline import Batch
from unipool_jax.model.switch import Switched
from unipool_jax.model.transformer import apply
from unipool_jax.training.checkpoint import flatten, unflatten
from unipool_jax.training.state import TrainState, init_state, layer_inputs, new_state
from unipool_jax.training.step import make_train_step

RESULTS = Path(__file__).resolve().parents[1] / "results" / "switch_attention"
RUNS = "runs.json"
SEEDS = (1, 2, 3)
KEYS, VALUES, FILLER = 4, 8, 16
LENGTH, WINDOW, BATCH = 64, 8, 16
PARENT_STEPS, STEPS = 600, 200
CYCLE = 0.9
"""Probability that a filler token follows the one before it in the cycle; otherwise it is any."""
HELD_OUT = 256
"""Sequences of the evaluation, the same for all runs."""

SETTINGS = (
    "scale=demo",
    "method=dense",
    "model.num_layers=3",
    "model.hidden_size=64",
    "model.num_heads=4",
    "model.num_kv_heads=2",
    "model.ffn_size=128",
    "model.vocab_size=128",
    "model.init_std=0.15",
    "data.tokenizer=bytes",
    f"data.sequence_length={LENGTH}",
    f"train.batch_size={BATCH}",
    f"train.microbatch_size={BATCH}",
    f"loss.switch_group_sequences={BATCH}",
    "optimizer.warmup_fraction=0.05",
)
PARENT_RATE, RATE = 5e-3, 1e-3
_WINDOW = f"attention.window={WINDOW}"


def _switch(weighting: str, weight: float) -> tuple[str, ...]:
    chosen = (f"attention.switch_weighting={weighting}", f"attention.switch_weight={weight:g}")
    return ("attention.kind=switch", _WINDOW, *chosen)


ARMS: dict[str, tuple[str, ...]] = {
    "full": (),
    "window": ("attention.kind=window", _WINDOW),
    **{
        f"alternating_{layer}": ("attention.kind=alternating", _WINDOW, f"attention.full_layers=[{layer}]")
        for layer in range(3)
    },
    "adaptive_3e-2": _switch("adaptive", 3e-2),
    "adaptive_1e-1": _switch("adaptive", 1e-1),
    "adaptive_3e-1": _switch("adaptive", 3e-1),
    "fixed_1e-2": _switch("fixed", 1e-2),
    "fixed_3e-2": _switch("fixed", 3e-2),
    "fixed_1e-1": _switch("fixed", 1e-1),
}
"""Kinds of attention: `alternating_n` has layer n full; Switch Attention has both weightings at three weights each."""


class Text(NamedTuple):
    """Sequences, and where they ask."""

    tokens_BS: np.ndarray
    """int32, one more than a model reads."""
    far_BS: np.ndarray
    """Positions of questions whose note is outside of their window, bool."""
    near_BS: np.ndarray
    """Of the other questions."""


def make_text(rows: int, seed: int) -> Text:
    """Random sequences. Token ids: filler, then questions by key, answers by value, notes by key and value."""
    random = np.random.default_rng(seed)
    jump = random.random((rows, LENGTH + 1)) > CYCLE
    step = np.where(jump, random.integers(0, FILLER, jump.shape), 1)
    tokens = (np.cumsum(step, axis=1) % FILLER).astype(np.int32)
    far, near = np.zeros((rows, LENGTH), bool), np.zeros((rows, LENGTH), bool)
    for row in range(rows):
        # Two positions for each question, the answer behind it; all apart from each other.
        places = np.sort(random.choice(LENGTH // 2, 2 * KEYS, replace=False)) * 2
        open_keys, unused = list[tuple[int, int, int]](), list(random.permutation(KEYS))
        for index, place in enumerate(places):
            left = 2 * KEYS - index
            must_ask, must_note = len(open_keys) == left, not open_keys
            if must_note or (not must_ask and unused and random.random() < 0.5):
                key, value = int(unused.pop()), int(random.integers(VALUES))
                tokens[row, place] = FILLER + KEYS + VALUES + key * VALUES + value
                open_keys.append((key, value, int(place)))
            else:
                key, value, noted = open_keys.pop(int(random.integers(len(open_keys))))
                tokens[row, place : place + 2] = FILLER + key, FILLER + KEYS + value
                (far if place - noted >= WINDOW else near)[row, place] = True
    return Text(tokens, far, near)


def configuration(arm: str | None, steps: int) -> Config:
    """Settings of an arm, or of the parent."""
    rate = PARENT_RATE if arm is None else RATE
    rates = [f"optimizer.learning_rate={rate}", f"optimizer.min_learning_rate={0.1 * rate}"]
    return compose_config([*SETTINGS, *rates, *(() if arm is None else ARMS[arm]), f"train.steps={steps}"])


def continued(config: Config, parent: Any, seed: int) -> TrainState:
    """The state before the first step of a model with the parent's parameters; what it has besides them is new."""
    fresh = init_state(config, jax.random.key(seed))
    params = unflatten(fresh.params, flatten(fresh.params) | flatten(parent))
    return new_state(config, params, fresh.balance.expert_bias_GNE)


def train(step: Callable[..., Any], state: TrainState, steps: int, seed: int) -> TrainState:
    """The state after these steps on text that is never repeated."""
    weights = np.ones((BATCH, LENGTH), np.float32)
    for number in range(steps):
        tokens = make_text(BATCH, 1_000_000 * seed + number).tokens_BS
        state, metrics = step(state, Batch(tokens[:, :-1], tokens[:, 1:], weights))
    assert bool(metrics["finite"])
    return state


def make_evaluation(config: Config) -> Callable[[Any], dict[str, float]]:
    """A function of parameters: loss over all positions, recall, and what the gates do where they have a choice."""
    text = make_text(HELD_OUT, 0)
    inputs_BS, targets_BS = text.tokens_BS[:, :-1], text.tokens_BS[:, 1:]
    position_S = np.arange(LENGTH)

    @jax.jit
    def run(state: TrainState) -> tuple[jax.Array, jax.Array, Switched | None]:
        output = apply(config, state.params, inputs_BS, layer_inputs(config, state.balance))
        answers_BSV = output.head.logits()
        return output.head.token_losses(targets_BS), jnp.argmax(answers_BSV, axis=-1), output.switched

    def takes_full(switched: Switched | None) -> np.ndarray:
        shape = (config.model.num_layers, *inputs_BS.shape)
        if switched is not None:
            return np.asarray(switched.full_BS).reshape(shape)
        return np.broadcast_to(np.array(config.sees_all)[:, None, None], shape)

    def evaluate(state: TrainState) -> dict[str, float]:
        losses_BS, answers_BS, switched = jax.device_get(run(state))
        free_BS = np.broadcast_to(position_S >= WINDOW, inputs_BS.shape)
        full_LBS, right_BS = takes_full(switched), answers_BS == targets_BS
        reads = np.where(full_LBS, position_S + 1, np.minimum(position_S + 1, WINDOW))
        return {
            "loss": float(losses_BS.mean()),
            "far_recall": float(right_BS[text.far_BS].mean()),
            "near_recall": float(right_BS[text.near_BS].mean()),
            "share": float(full_LBS[:, free_BS].mean()),
            "share_far": float(full_LBS[:, text.far_BS & free_BS].mean()),
            "keys_read": float(reads.mean()),
        }

    return evaluate  # type: ignore[return-value]


def run(seeds: Sequence[int], out: Path, parent_steps: int, steps: int) -> list[dict[str, Any]]:
    """Train what is not among the results in this folder, seed by seed; returns all results."""
    out.mkdir(parents=True, exist_ok=True)
    found: list[dict[str, Any]] = read_json(out / RUNS, RESTORE)["runs"] if (out / RUNS).exists() else []
    parent_config = configuration(None, parent_steps)
    parent_step, programs = make_train_step(parent_config), dict[str, tuple[Any, ...]]()
    for seed in seeds:
        there = {line["arm"] for line in found if line["seed"] == seed}
        if there >= {"parent", *ARMS}:
            continue
        start = time.process_time()
        state = train(parent_step, init_state(parent_config, jax.random.key(seed)), parent_steps, seed)
        parent = jax.device_get(state.params)
        if "parent" not in there:
            found.append({"arm": "parent", "seed": seed, **make_evaluation(parent_config)(state)})
        for arm in ARMS:
            if arm in there:
                continue
            config = configuration(arm, steps)
            if arm not in programs:
                programs[arm] = make_train_step(config), make_evaluation(config)
            step, evaluate = programs[arm]
            # Another text than the parent's.
            end = train(step, continued(config, parent, seed), steps, seed + 500)
            found.append({"arm": arm, "seed": seed, **evaluate(end)})
            write_json(out / RUNS, {"runs": found}, indent=1)
            print(f"{found[-1]}  {time.process_time() - start:.0f} CPU-seconds of this seed", flush=True)
    return found


MEASURES = ("loss", "far_recall", "near_recall", "share", "share_far", "keys_read")
NAMES = {"loss": "loss", "far_recall": "far recall", "share": "share of full"}
HEAD = ("arm", "seeds", "loss", "far recall", "near recall", "share of full", "at far questions", "keys read")
PAIRS = (
    ("window", "full"),
    *((f"alternating_{layer}", "full") for layer in range(3)),
    ("adaptive_3e-1", "full"),
    ("fixed_1e-1", "full"),
    ("adaptive_3e-1", "window"),
    ("adaptive_3e-1", "alternating_0"),
)
WEIGHTINGS = (
    ("adaptive_3e-2", "fixed_1e-2"),
    ("adaptive_1e-1", "fixed_3e-2"),
    ("adaptive_3e-1", "fixed_1e-1"),
)


def by_seed(found: Sequence[dict[str, Any]], measure: str) -> Losses:
    """A measure by arm and seed."""
    there = {line["arm"] for line in found}
    arms = [arm for arm in ("parent", *ARMS) if arm in there]
    return {arm: {line["seed"]: line[measure] for line in found if line["arm"] == arm} for arm in arms}


def tables(found: Sequence[dict[str, Any]]) -> list[str]:
    """What each arm reached, as means over seeds; differences of kinds, and of the two weightings, paired by seed."""
    columns = {measure: by_seed(found, measure) for measure in MEASURES}
    rows = []
    for arm, seeds in columns["loss"].items():
        means = [statistics.fmean(columns[measure][arm].values()) for measure in MEASURES]
        rows.append(
            [arm, str(len(seeds)), f"{means[0]:.4f}", *(f"{mean:.3f}" for mean in means[1:5]), f"{means[5]:.1f}"]
        )
    found_tables = [markdown_table(HEAD, rows)]
    for pairs, second in ((PAIRS, "far_recall"), (WEIGHTINGS, "share")):
        differences = [
            [f"{arm} - {minus}", NAMES[measure], *difference_cells(columns[measure], arm, minus)]
            for measure in ("loss", second)
            for arm, minus in pairs
            if {arm, minus} <= columns[measure].keys()
        ]
        found_tables.append(markdown_table(["difference", "of", *CELLS], differences))
    return found_tables


def draw(found: Sequence[dict[str, Any]], path: Path) -> None:
    """Loss against the share of full attention: a point a run."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.4, 4.0), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    for kind in ("full", "window", "alternating", "adaptive", "fixed"):
        lines = [line for line in found if line["arm"].partition("_")[0] == kind]
        axes.plot([line["share"] for line in lines], [line["loss"] for line in lines], "o", label=kind)
    axes.set(xlabel="share of full attention, where the window is shorter", ylabel="loss, nats per token")
    axes.legend(frameon=False)
    figure.savefig(path)


def main() -> int:
    """Run what is missing, print the tables, draw the curve."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--seeds", type=int, nargs="+", default=list(SEEDS))
    parser.add_argument("--parent-steps", type=int, default=PARENT_STEPS)
    parser.add_argument("--steps", type=int, default=STEPS)
    arguments = parser.parse_args()
    found = run(arguments.seeds, arguments.out, arguments.parent_steps, arguments.steps)
    print("\n".join(tables(found)), end="")
    draw(found, arguments.out / "curve.png")
    return 0


if __name__ == "__main__":
    sys.exit(main())
