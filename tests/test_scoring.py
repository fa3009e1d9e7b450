"""Scores of texts against the model in NumPy; cuts of context and continuation; batches and their shapes."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from lm_eval.api.model import TemplateLM

from alphabet import alphabet_model, log_likelihood, random_model
from unipool_jax.data.tokenizer import load_tokenizer
from unipool_jax.evaluation.scoring import (
    LanguageModel,
    Window,
    bucket_lengths,
    encode_pairs,
    make_score_step,
    padded_length,
    row_count,
    score_windows,
    window_batches,
)

GPT2 = load_tokenizer("gpt2")


def random_windows(model: LanguageModel, lengths: Sequence[tuple[int, int]], seed: int = 0) -> list[Window]:
    random = np.random.default_rng(seed)
    return [Window(*(random.integers(0, 257, n, dtype=np.int32) for n in pair)) for pair in lengths]


LENGTHS = ((1, 1), (3, 9), (30, 2), (31, 2), (20, 20), (48, 1), (1, 48), (5, 5))


def test_scores_are_those_of_the_model_in_numpy() -> None:
    model = random_model()
    windows = random_windows(model, LENGTHS)
    found = score_windows(model, windows)
    expected = [log_likelihood(model, list(context), list(continuation)) for context, continuation in windows]
    np.testing.assert_allclose(found.log_likelihood_W, [value for value, _ in expected], rtol=1e-4)
    assert not np.any(found.greedy_W)


def test_greedy_is_every_token_of_the_continuation_and_none_of_the_context() -> None:
    model = alphabet_model()
    texts = [("zzza", "bcd"), ("a", "bcx"), ("a", "bxd"), ("a", "xcd"), ("x" * 30, "yz{|}"), ("b", "c")]
    windows = [Window(list(a.encode()), list(b.encode())) for a, b in texts]
    found = score_windows(model, windows)
    assert found.greedy_W.tolist() == [True, False, False, False, True, True]
    expected = [log_likelihood(model, list(context), list(continuation)) for context, continuation in windows]
    np.testing.assert_allclose(found.log_likelihood_W, [value for value, _ in expected], rtol=1e-4, atol=1e-5)
    assert [greedy for _, greedy in expected] == found.greedy_W.tolist()


def test_order_and_batching_do_not_matter() -> None:
    model = random_model()
    windows = random_windows(model, LENGTHS * 3, seed=1)
    together = score_windows(model, windows).log_likelihood_W
    order = np.random.default_rng(2).permutation(len(windows))
    shuffled = score_windows(model, [windows[number] for number in order]).log_likelihood_W
    np.testing.assert_allclose(shuffled, np.asarray(together)[order], rtol=1e-5)


def test_pad_columns_have_probability_but_are_never_the_best() -> None:
    """As in training (method M1.5) the softmax is over the padded vocabulary; decoding never draws padding."""
    model = alphabet_model()
    window = Window(list(b"a"), list(b"bcd"))
    (before,) = score_windows(model, [window]).log_likelihood_W
    # A pad token that is twice as probable as the right answer after `a`.
    output = model.params["output"].at[270].set(model.params["output"][ord("b")] * 1.2)
    padded = model._replace(params=model.params | {"output": output})
    found = score_windows(padded, [window])
    assert found.log_likelihood_W[0] < before - 1
    assert found.log_likelihood_W[0] == pytest.approx(log_likelihood(padded, *map(list, window))[0], rel=1e-4)
    assert found.greedy_W.tolist() == [True]


def test_one_trace_per_shape_and_few_shapes() -> None:
    """However many texts of whatever lengths: one program per bucket in a call, and no new one for the same texts."""
    model = random_model()
    lengths = [(int(a), int(b)) for a, b in np.random.default_rng(3).integers(1, 24, (150, 2))]
    batches = window_batches(random_windows(model, lengths), model.max_length, 400)
    assert len({batch.inputs.shape for _, batch in batches}) == len(bucket_lengths(model.max_length)) == 2
    step: Any = make_score_step(model.config, model.tokenizer.vocab_size)
    score_windows(model, random_windows(model, LENGTHS))
    traces = step._cache_size()
    score_windows(model, random_windows(model, [(b, a) for a, b in LENGTHS], seed=4))
    assert step._cache_size() == traces


@given(st.integers(1, 2000), st.integers(1, 300))
def test_rows_are_few_numbers_and_little_padding(items: int, most: int) -> None:
    rows = row_count(items, most)
    assert 1 <= rows <= most
    batches = -(-items // rows)
    assert batches == -(-items // most)
    assert batches * rows - items <= batches * -(-most // 8)


def test_numbers_of_rows_are_bounded() -> None:
    for most in (1, 5, 8, 64, 170, 256):
        assert len({row_count(items, most) for items in range(1, 3000)}) <= 8


def test_buckets() -> None:
    assert bucket_lengths(1024) == [32, 48, 64, 96, 128, 192, 256, 384, 512, 768, 1024]
    assert bucket_lengths(8) == [8]
    assert bucket_lengths(100) == [32, 48, 64, 96, 100]
    assert [padded_length(n, 100) for n in (1, 32, 33, 97, 100)] == [32, 32, 48, 100, 100]


def test_every_window_is_in_one_row_and_weights_mark_continuations() -> None:
    model = random_model()
    windows = random_windows(model, LENGTHS * 5)
    seen: list[int] = []
    lengths = []
    for numbers, batch in window_batches(windows, 48, 150):
        assert len(numbers) == len(batch.inputs)
        lengths.append(batch.inputs.shape[1])
        for row, number in enumerate(numbers):
            if number < 0:
                assert not batch.weights[row].any()
                continue
            context, continuation = windows[number]
            marked = batch.weights[row] > 0
            assert batch.targets[row][marked].tolist() == list(continuation)
            assert int(marked.argmax()) == len(context) - 1
            assert batch.inputs[row][: len(context)].tolist() == list(context)
            seen.append(int(number))
    assert sorted(seen) == list(range(len(windows)))
    assert lengths == sorted(lengths, reverse=True)


def pieces(window: Window) -> tuple[str, str]:
    return GPT2.decode(window.context), GPT2.decode(window.continuation)


@pytest.mark.parametrize(
    ("context", "continuation", "expected"),
    [
        ("The capital of France is", " Paris", ("The capital of France is", " Paris")),
        # The blank belongs to the word behind it: two tokens would be a text that training never shows.
        ("The capital of France is ", "Paris", ("The capital of France is", " Paris")),
        ("Answer:\n", "yes", ("Answer:", "\nyes")),
        # `hel` + `lo` is one token, which is scored as one.
        ("say hel", "lo", ("say", " hello")),
        ("say hel", "lo there", ("say", " hello there")),
        ("", "Paris", ("<|endoftext|>", "Paris")),
        ("  ", "Paris", ("<|endoftext|>", "  Paris")),
        ("hel", "lo", ("<|endoftext|>", "hello")),
        ("Paris", "", ("Paris", "")),
        ("", "", ("<|endoftext|>", "")),
        # Spelled-out special tokens are text.
        ("a<|endoftext|>", "b", ("a<|endoftext|>", "b")),
    ],
)
def test_cuts(context: str, continuation: str, expected: tuple[str, str]) -> None:
    (window,) = encode_pairs(GPT2, [(context, continuation)])
    assert pieces(window) == expected
    if context.startswith("a<"):
        assert GPT2.eod not in window.context


@given(st.text(st.sampled_from("ab 1.'é\n"), max_size=8), st.text(st.sampled_from("ab 1.'é\n"), min_size=1, max_size=8))
def test_nothing_is_lost_and_nothing_is_empty(context: str, continuation: str) -> None:
    (window,) = encode_pairs(GPT2, [(context, continuation)])
    assert len(window.context) > 0
    assert len(window.continuation) > 0
    text = context + continuation
    joined = [*window.context, *window.continuation]
    assert joined in (GPT2.encode_batch([text])[0].tolist(), [GPT2.eod, *GPT2.encode_batch([text])[0].tolist()])


def test_cuts_are_those_of_the_harness_for_its_own_kind_of_text() -> None:
    """Contexts that end where a token ends: lm-eval counts tokens of the context, which is the same there."""
    encode = SimpleNamespace(tok_encode=lambda text: GPT2.encode_batch([text])[0].tolist(), backend="causal")
    pairs = [
        ("Question: Which?\nAnswer:", " the formation of acid rain"),
        ("Roof shingle removal: A man is sitting on a roof. He", "  is 12 ripping."),
        ("so Sarah", " always got the easier cases."),
        ("trailing blanks  ", "two"),
    ]
    for pair, window in zip(pairs, encode_pairs(GPT2, pairs), strict=True):
        mine = list(window.context), list(window.continuation)
        assert mine == TemplateLM._encode_pair(encode, *pair)  # type: ignore


def test_a_tokenizer_that_drops_white_space_still_leaves_a_token_to_score() -> None:
    lossy = SimpleNamespace(
        encode_batch=lambda texts: [np.arange(len(t.split()), dtype=np.int32) for t in texts], eod=9
    )
    (window,) = encode_pairs(lossy, [("a b", " ")])  # type: ignore[arg-type]
    assert (list(window.context), list(window.continuation)) == ([0], [1])


def test_large_batches_give_the_same_scores() -> None:
    model = random_model()
    windows = random_windows(model, LENGTHS[:5])
    train = dataclasses.replace(model.config.train, eval_batch_size=5)
    large = model._replace(config=dataclasses.replace(model.config, train=train))
    assert (model.batch_tokens, large.batch_tokens) == (96, 240)
    np.testing.assert_allclose(
        score_windows(large, windows).log_likelihood_W, score_windows(model, windows).log_likelihood_W, rtol=1e-5
    )
