"""The randomization probe on tasks: a model that answers by its routing, and one whose routing does not matter."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from alphabet import alphabet_model, log_likelihood, random_model
from task_files import ALPHABET, DOUBTFUL, metrics, write_task
from unipool_jax.analysis.probe import Condition, Difference, Intervention, Probe
from unipool_jax.analysis.task_probe import forced_scores, mean_probe, probe_tasks, task_measure
from unipool_jax.config.schema import ConfigError
from unipool_jax.evaluation.harness import load_tasks
from unipool_jax.evaluation.requests import TaskRequest
from unipool_jax.evaluation.scoring import LanguageModel, Window, score_windows


def only_task(folder: Path, rows: Any, **settings: Any) -> Any:
    write_task(folder, "letters", rows, **settings)
    (task,) = load_tasks(TaskRequest(tasks_path=str(folder)))
    return task


def everywhere(model: LanguageModel, layer: int = 2, draw: int = 0) -> Intervention:
    return Intervention(layer, np.ones(model.config.experts_per_pool, bool), "learned", draw)


def test_accuracies_are_those_of_likelihoods_in_numpy(tmp_path: Path) -> None:
    model, random = random_model(), np.random.default_rng(0)
    words = ["".join(random.choice(list("abcdefg"), size=int(n))) for n in random.integers(1, 9, 90)]
    rows: list[dict[str, Any]] = [
        {"context": "Q: " + words[3 * n], "choices": words[3 * n + 1 : 3 * n + 3], "gold": n % 2} for n in range(30)
    ]
    for names, normalize in ((("acc", "acc_norm"), True), (("acc",), False)):
        folder = tmp_path / str(normalize)
        found = task_measure(model, only_task(folder, rows, metric_list=metrics(*names)))
        assert (found.name, found.metric, found.questions) == ("letters", names[-1], 30)
        items = found.accuracy(None)
        right = []
        for row in rows:
            values = [log_likelihood(model, list(row["context"].encode()), list(c.encode()))[0] for c in row["choices"]]
            scaled = [v / len(c) if normalize else v for v, c in zip(values, row["choices"], strict=True)]
            right.append(float(np.argmax(scaled) == row["gold"]))
        assert items.sums_I.tolist() == right
        assert items.weights_I.tolist() == [1.0] * 30


def test_the_same_draws_for_a_question_whatever_is_asked_beside_it(tmp_path: Path) -> None:
    model = random_model()
    rows = [{"context": f"Q{n}", "choices": ["ab", "cd", "ef"], "gold": 0} for n in range(40)]
    task = only_task(tmp_path, rows)
    many, few = task_measure(model, task), task_measure(model, task, limit=11)
    choice = everywhere(model)
    assert many.accuracy(choice).sums_I[:11].tolist() == few.accuracy(choice).sums_I.tolist()
    assert many.accuracy(choice).sums_I.tolist() == many.accuracy(choice).sums_I.tolist()
    other = [task_measure(model, task, seed=1).accuracy(choice), many.accuracy(everywhere(model, draw=1))]
    assert all(items.sums_I.tolist() != many.accuracy(choice).sums_I.tolist() for items in other)


def test_routing_that_does_not_matter_makes_no_difference(tmp_path: Path) -> None:
    """The alphabet is in the embedding; the experts of that model do nothing."""
    model = alphabet_model(DOUBTFUL)
    found = task_measure(model, only_task(tmp_path, ALPHABET))
    experts = model.config.experts_per_pool
    result = probe_tasks([found], np.ones((4, experts), np.int64), model.config.moe.top_k)
    assert result.by_task["letters"].learned == result.average.learned == 1.0
    assert [(c.candidates, c.gates) for c in result.average.conditions][::2] == [
        ("full_pool", "learned"),
        ("top_8", "learned"),
    ]
    for condition in result.average.conditions:
        assert [difference.mean for difference in condition.by_layer] == [0.0, 0.0]
    assert (result.metrics, result.questions) == ({"letters": "acc_norm"}, {"letters": 3})


def test_routing_that_decides_is_missed(tmp_path: Path) -> None:
    """Labels that are the model's own answers: it is always right, and less often with random choices in a layer."""
    model = random_model()
    words = ["".join(chr(97 + (7 * n + i * i) % 26) for i in range(6)) for n in range(80)]
    rows: list[dict[str, Any]] = [
        {"context": f"Q {n} {words[n]}", "choices": words[n : n + 3], "gold": 0} for n in range(77)
    ]
    for row in rows:
        context = list(row["context"].encode())
        values = [log_likelihood(model, context, list(f" {c}".encode()))[0] for c in row["choices"]]
        row["gold"] = int(np.argmax(values))
    task = only_task(tmp_path, rows, target_delimiter=" ", metric_list=metrics("acc"))
    measure = task_measure(model, task)
    assert measure.accuracy(None).sums_I.mean() == 1.0
    counts = np.ones((4, model.config.experts_per_pool), np.int64)
    (first, *_) = probe_tasks([measure], counts, model.config.moe.top_k).average.conditions
    assert first.average.standard_error is not None
    assert first.average.mean < -3 * first.average.standard_error < 0


def test_only_multiple_choice(tmp_path: Path) -> None:
    task = only_task(
        tmp_path,
        [{"context": "a", "word": "b"}],
        output_type="loglikelihood",
        doc_to_target="word",
        metric_list=metrics("acc"),
    )
    with pytest.raises(ConfigError, match="tasks=letters: the probe needs multiple-choice"):
        task_measure(alphabet_model(), task)


def test_means_over_tasks_by_hand() -> None:
    def of(learned: float, mean: float, error: float | None) -> Probe:
        value = Difference(mean, error)
        return Probe(learned, [2], 1, [Condition("full_pool", "own", [value], value)], 10)

    found = mean_probe([of(0.5, -0.1, 0.03), of(0.7, -0.3, 0.04)])
    assert found.learned == pytest.approx(0.6)
    (condition,) = found.conditions
    assert (condition.candidates, condition.gates) == ("full_pool", "own")
    assert condition.average.mean == condition.by_layer[0].mean == pytest.approx(-0.2)
    assert condition.average.standard_error == pytest.approx(0.025)
    assert mean_probe([of(0.5, -0.1, 0.03), of(0.7, -0.3, None)]).conditions[0].average.standard_error is None


def test_padding_and_its_choices_reach_no_window() -> None:
    """Scores of windows beside padding, and of the same windows in full batches."""
    model = random_model()
    windows = [Window([97, number], [98, 99]) for number in range(5)]  # two batches of three rows, one of them padding
    forced = forced_scores(model, everywhere(model), seed=0)
    some = score_windows(model, windows, forced).log_likelihood_W
    more = score_windows(model, [*windows, Window([100], [101])], forced).log_likelihood_W
    np.testing.assert_allclose(some, np.asarray(more)[:5], rtol=1e-5)
    # Draws belong to the number of a window, not to its row: batches of three rows repeat nothing.
    assert len(np.unique(score_windows(model, [Window([97, 98], [99, 100])] * 6, forced).log_likelihood_W)) > 3
    assert not np.allclose(some, score_windows(model, windows, forced_scores(model, None, 0)).log_likelihood_W)
