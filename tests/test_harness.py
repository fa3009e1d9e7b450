"""Checkpoints under lm-eval: scores against NumPy, long texts, generation, and evaluations of local tasks."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import lm_eval
import numpy as np
import pytest
from lm_eval.api.instance import Instance
from lm_eval.tasks import TaskManager

from alphabet import alphabet_model, log_likelihood, random_model
from task_files import ALPHABET, DOUBTFUL, metrics, write_task
from unipool_jax.config.schema import ConfigError
from unipool_jax.evaluation import harness
from unipool_jax.evaluation.harness import (
    UniPoolLM,
    fitting_windows,
    harness_version,
    load_tasks,
    questions_fingerprint,
    run_tasks,
)
from unipool_jax.evaluation.requests import TaskRequest
from unipool_jax.evaluation.scoring import LanguageModel, Window
from unipool_jax.training.run_folder import RunError

EOD = 256


def requests(kind: Any, *arguments: tuple[Any, ...]) -> list[Instance]:
    return [Instance(kind, {}, args, number) for number, args in enumerate(arguments)]


def by_hand(model: LanguageModel, context: str, continuation: str) -> tuple[float, bool]:
    """As many bytes of the context as fit before the continuation."""
    tokens, kept = list(continuation.encode()), list(context.encode()) or [EOD]
    return log_likelihood(model, kept[-(model.max_length + 1 - len(tokens)) :], tokens)


TEXTS = [
    ("The pool", " is shared"),
    ("x" * 100, " too long a context"),
    ("", "no context"),
    ("a", "b"),
    ("blank at the end ", "moves"),
    ("abc", "n" * 48),
]


def test_log_likelihoods_in_the_order_of_requests() -> None:
    model = random_model()
    found = UniPoolLM(model).loglikelihood(requests("loglikelihood", *TEXTS))
    moved = [*TEXTS[:4], ("blank at the end", " moves"), TEXTS[5]]
    expected = [by_hand(model, *pair) for pair in moved]
    np.testing.assert_allclose([value for value, _ in found], [value for value, _ in expected], rtol=1e-4)
    assert all(type(value) is float and greedy is False for value, greedy in found)
    again = UniPoolLM(model).loglikelihood(requests("loglikelihood", *TEXTS[::-1]))
    np.testing.assert_allclose([value for value, _ in again[::-1]], [value for value, _ in found], rtol=1e-5)


def test_greedy_and_the_empty_continuation() -> None:
    lm = UniPoolLM(alphabet_model())
    asked = requests("loglikelihood", ("xa", "bc"), ("xa", "bd"), ("xa", ""), ("", ""))
    found = lm.loglikelihood(asked)
    assert [greedy for _, greedy in found] == [True, False, True, True]
    assert [value for value, _ in found[2:]] == [0.0, 0.0]
    assert lm.loglikelihood([]) == []


def test_windows_score_each_token_once_and_fit() -> None:
    tokens = np.arange(100, dtype=np.int32)
    for context, continuation in ((1, 1), (90, 5), (5, 8), (5, 9), (1, 30), (3, 8)):
        windows = fitting_windows(Window(tokens[:context], tokens[context : context + continuation]), 8)
        assert [t for window in windows for t in window.continuation] == list(range(context, context + continuation))
        for before, scored in windows:
            assert len(before) >= 1
            assert len(before) + len(scored) <= 9
            # The context is the text right before the scored tokens.
            assert list(before) == list(range(scored[0] - len(before), scored[0]))
    (cut,) = fitting_windows(Window(tokens[:90], tokens[90:95]), 8)
    assert list(cut.context) == [86, 87, 88, 89]
    assert fitting_windows(Window(tokens[:3], tokens[:0]), 8) == []


def test_a_long_continuation_is_scored_in_pieces() -> None:
    model = random_model()
    text = "".join(chr(97 + n % 26) for n in range(70))
    ((found, _),) = UniPoolLM(model).loglikelihood(requests("loglikelihood", ("ab", text)))
    tokens = list(text.encode())
    expected = log_likelihood(model, [ord("b")], tokens[:48])[0] + log_likelihood(model, tokens[21:48], tokens[48:])[0]
    assert found == pytest.approx(expected, rel=1e-4)


def test_rolling_likelihood_begins_behind_a_document() -> None:
    model = random_model()
    short, long = "State of the Union", "The state of the Union is what it is. " * 3
    tokens = list(long.encode())
    assert len(tokens) == 114
    found = UniPoolLM(model).loglikelihood_rolling(requests("loglikelihood_rolling", (short,), (long,), ("",)))
    assert found[0] == pytest.approx(log_likelihood(model, [EOD], list(short.encode()))[0], rel=1e-4)
    pieces = ([EOD], tokens[:48]), (tokens[47:48], tokens[48:96]), (tokens[65:96], tokens[96:])
    assert found[1] == pytest.approx(sum(log_likelihood(model, *piece)[0] for piece in pieces), rel=1e-4)
    assert found[2] == 0.0


def test_texts_end_at_the_first_stop_string() -> None:
    lm = UniPoolLM(alphabet_model())
    found = lm.generate_until(
        requests(
            "generate_until",
            ("za", {"until": ["h", "fg"], "max_gen_toks": 10}),
            ("za", {"until": "h", "max_gen_toks": 10}),
            ("k", {"until": [], "max_gen_toks": 10}),
            ("x" * 60 + "p", {"until": ["zzz"], "max_gen_toks": 4}),
            ("", {"until": [], "max_gen_toks": 10}),
        )
    )
    # What this model expects after the end of a document is padding; something else is drawn.
    assert found[:4] == ["bcde", "bcdefg", "lmnopqrstu", "qrst"]
    assert found[4]


def test_generation_is_greedy_unless_asked_and_refuses_what_it_does_not_know() -> None:
    lm = UniPoolLM(alphabet_model(scale=0.02))
    settings = {"until": [], "max_gen_toks": 10}
    hot = settings | {"do_sample": True, "temperature": 5.0, "top_p": 0.99}
    found = lm.generate_until(requests("generate_until", ("a", settings), ("a", hot), ("b", settings), ("a", hot)))
    assert (found[0], found[2]) == ("bcdefghijk", "cdefghijkl")
    assert len({found[0], found[1], found[3]}) == 3
    with pytest.raises(RunError, match=r"max_gen_toks=48: .* 48 positions .* set at most 47"):
        lm.generate_until(requests("generate_until", ("a", {"max_gen_toks": 48})))
    with pytest.raises(RunError, match="unknown num_beams"):
        lm.generate_until(requests("generate_until", ("a", settings | {"num_beams": 4})))


def test_the_end_of_a_document_ends_the_text() -> None:
    model = alphabet_model()
    output = model.params["output"]
    ended = model._replace(params=model.params | {"output": output.at[EOD].set(output[ord("d")] * 2)})
    settings = {"until": [], "max_gen_toks": 10}
    found = UniPoolLM(ended).generate_until(requests("generate_until", ("a", settings), ("e", settings)))
    assert found == ["bc", "fghijklmno"]


def test_answers_are_cached_where_the_harness_asks() -> None:
    lm, seen = UniPoolLM(alphabet_model()), []
    lm.cache_hook.add_partial = lambda *entry: seen.append(entry)  # type: ignore[method-assign]
    ((value, greedy),) = lm.loglikelihood(requests("loglikelihood", ("a", "b")))
    lm.loglikelihood_rolling(requests("loglikelihood_rolling", ("a",)))
    lm.generate_until(requests("generate_until", *[("a", {"max_gen_toks": 10})] * 2))
    assert seen[0] == ("loglikelihood", ("a", "b"), (value, greedy))
    assert [kind for kind, *_ in seen] == ["loglikelihood", "loglikelihood_rolling", *["generate_until"] * 2]


def test_an_evaluation_by_the_harness_itself(tmp_path: Path) -> None:
    """A model that knows the answers: all right by likelihood per character, one wrong by likelihood."""
    write_task(tmp_path, "letters", ALPHABET)
    found: Any = lm_eval.simple_evaluate(
        model=UniPoolLM(alphabet_model(DOUBTFUL)),
        tasks=["letters"],
        task_manager=TaskManager(include_path=str(tmp_path), include_defaults=False),
        bootstrap_iters=0,
        log_samples=False,
    )
    assert found["results"]["letters"]["acc,none"] == pytest.approx(2 / 3)
    assert found["results"]["letters"]["acc_norm,none"] == 1.0


def test_every_kind_of_request(tmp_path: Path) -> None:
    model = alphabet_model(DOUBTFUL)
    write_task(tmp_path, "letters", ALPHABET)
    words = [{"context": "ab", "word": "cd"}, {"context": "ab", "word": "dd"}]
    perplexity = {"metric": "perplexity", "aggregation": "perplexity", "higher_is_better": False}
    write_task(
        tmp_path,
        "last_word",
        words,
        output_type="loglikelihood",
        doc_to_target="word",
        metric_list=[*metrics("acc"), perplexity],
    )
    write_task(
        tmp_path,
        "spell",
        [{"context": "a", "answer": "bcd"}, {"context": "a", "answer": "xyz"}],
        output_type="generate_until",
        doc_to_target="answer",
        generation_kwargs={"until": ["e"], "max_gen_toks": 10},
        metric_list=metrics("exact_match"),
    )
    write_task(
        tmp_path,
        "rolling",
        [{"context": "", "text": "abcdefgh"}],
        output_type="loglikelihood_rolling",
        doc_to_text="",
        doc_to_target="text",
        metric_list=[{"metric": "bits_per_byte"}],
    )
    request = TaskRequest(("letters", "last_word", "spell", "rolling"), str(tmp_path))
    found, text = run_tasks(model, request, load_tasks(request), bootstrap=20)
    assert set(found) == set(request.tasks) == set(text)
    assert len(set(text.values())) == 4
    assert found["letters"]["documents"] == 3
    assert found["letters"]["acc_norm"] == 1.0
    assert found["letters"]["acc_stderr"] == pytest.approx(math.sqrt(2 / 3 * 1 / 3 / 2))
    assert found["last_word"]["acc"] == 0.5
    values = [log_likelihood(model, list(b"ab"), list(word["word"].encode()))[0] for word in words]
    assert found["last_word"]["perplexity"] == pytest.approx(math.exp(-np.mean(values)), rel=1e-4)
    assert found["last_word"]["perplexity_stderr"] is not None
    assert found["spell"]["exact_match"] == 0.5
    nats = log_likelihood(model, [EOD], list(b"abcdefgh"))[0]
    assert found["rolling"]["bits_per_byte"] == pytest.approx(-nats / 8 / math.log(2), rel=1e-4)


def test_limit_and_examples(tmp_path: Path) -> None:
    write_task(tmp_path, "letters", ALPHABET)
    request = TaskRequest((), str(tmp_path), limit=2, num_fewshot=1)
    found = run_tasks(alphabet_model(), request, load_tasks(request), bootstrap=0).metrics
    assert found["letters"]["documents"] == 2
    assert found["letters"]["acc_stderr"] is None


def test_what_was_asked_is_known_by_questions_and_answers(tmp_path: Path) -> None:
    def fingerprint(name: str, rows: Any, limit: int | None = None) -> str:
        write_task(tmp_path / name, "letters", rows)
        (task,) = load_tasks(TaskRequest(tasks_path=str(tmp_path / name)))
        task.build_all_requests(limit=limit, rank=0, world_size=1)
        assert questions_fingerprint(task.instances) == questions_fingerprint(reversed(task.instances))
        return questions_fingerprint(task.instances)

    same = fingerprint("here", ALPHABET)
    assert fingerprint("elsewhere", ALPHABET) == same
    others = [
        fingerprint("answers", [ALPHABET[0] | {"gold": 1}, *ALPHABET[1:]]),
        fingerprint("questions", [ALPHABET[0] | {"context": "another"}, *ALPHABET[1:]]),
        fingerprint("fewer", ALPHABET, limit=2),
    ]
    assert len({same, *others}) == 4


def test_tasks_that_cannot_be_loaded_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(RunError, match=r"tasks_path=.*nowhere: no tasks .* unipool tasks"):
        load_tasks(TaskRequest((), str(tmp_path / "nowhere")))
    write_task(tmp_path, "letters", ALPHABET)
    with pytest.raises(ConfigError, match=r"tasks=piqa: unknown; choose from letters[^,]*\n.*tasks=race"):
        load_tasks(TaskRequest(("piqa", "letters", "race"), str(tmp_path)))
    (tmp_path / "letters.jsonl").unlink()
    with pytest.raises(RunError, match=r"tasks=letters: its documents cannot be read .* export again"):
        load_tasks(TaskRequest(("letters",), str(tmp_path)))

    class Hub:
        """Built-in tasks without network."""

        all_tasks = ("arc_easy",)

        def __init__(self, include_path: str | None, include_defaults: bool) -> None:
            assert (include_path, include_defaults) == (None, True)

        def load(self, name: str) -> None:
            raise ConnectionError("Couldn't reach 'allenai/ai2_arc' on the Hub")

    Hub.all_subtasks = Hub.all_tasks  # type: ignore[attr-defined]
    monkeypatch.setattr(harness, "TaskManager", Hub)
    with pytest.raises(RunError, match=r"tasks=arc_easy: .*ConnectionError.*Without network, .* unipool tasks FOLDER"):
        load_tasks(TaskRequest(("arc_easy",)))
    with pytest.raises(ConfigError, match=rf"tasks=nonsense: unknown; {harness_version()} has no such task"):
        load_tasks(TaskRequest(("nonsense",)))
