"""One-shot scores by likelihood: how probable an anchor's answer is after a demonstration.

The published scores generate an answer and compare it, which models as small as those trained here get right by
accident only. The likelihood of the right answer is a number for any model, and a deviation from what was published.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import jax
import numpy as np

from unipool_jax.aptitude.scores import Shown
from unipool_jax.evaluation.scoring import LanguageModel, encode_pairs, plain_scores, score_windows


def demonstration(question: str, solution: str) -> str:
    """A question with its solution, as a model is shown them."""
    return f"Question: {question}\nAnswer: {solution}\n\n"


def one_shot(one: Shown) -> tuple[str, str]:
    """What a model reads, and what it is scored on; the same frame for both formats."""
    return f"{demonstration(one.question, one.solution)}Question: {one.anchor}\nAnswer:", f" {one.answer}"


class LikelihoodScorer:
    """Mean log-likelihood in nats of each token of an anchor's answer.

    Args:
      model: on one device.
    """

    def __init__(self, model: LanguageModel):
        self._model = model
        self._score_batch = plain_scores(model)

    def __call__(self, asked: Sequence[Shown]) -> list[float | None]:
        """A score for each; None for all where one is longer than the model can read, for nothing is cut away."""
        model = self._model
        windows = encode_pairs(model.tokenizer, [one_shot(one) for one in asked])
        # Without all of them there is no mean, so none is computed.
        if any(len(one.context) + len(one.continuation) > model.max_length + 1 for one in windows):
            return [None] * len(asked)
        totals_W = score_windows(model, windows, self._score_batch).log_likelihood_W
        return [float(total) / len(one.continuation) for total, one in zip(totals_W, windows, strict=True)]


def model_fingerprint(model: LanguageModel) -> str:
    """sha256 of everything that a model's likelihoods depend on but the precision of its products."""
    digest = hashlib.sha256(model.tokenizer.sha256.encode())
    for path, leaf in jax.tree_util.tree_leaves_with_path((model.params, model.balance)):
        array = np.asarray(jax.device_get(leaf))
        digest.update(f"{jax.tree_util.keystr(path)} {array.dtype} {array.shape}".encode())
        digest.update(np.ascontiguousarray(array).tobytes())
    return digest.hexdigest()
