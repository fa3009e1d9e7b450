"""A checkpoint answers prompts, which are tokens of its template."""

from __future__ import annotations

from collections.abc import Sequence

import jax
import numpy as np

from unipool_jax.evaluation.continuing import draw_batch
from unipool_jax.evaluation.scoring import LanguageModel, padded_length
from unipool_jax.model.sampling import Sampling


class Answerer:
    """Draws answers from a model on one device.

    Args:
      model: the checkpoint.
      max_tokens: of an answer, its end included.
      temperature, top_p: as in `Sampling`.
      seed: of the draws, which also depend on which prompts share a batch.
    """

    def __init__(self, model: LanguageModel, max_tokens: int, temperature: float, top_p: float, seed: int):
        self._model = model
        self._sampling = Sampling(model.tokenizer.vocab_size, model.tokenizer.eod, max_tokens, temperature, top_p)
        self._key = jax.random.key(seed)
        self.room = model.max_length - max_tokens
        """Tokens that a prompt can have."""

    def answers(self, prompts: Sequence[np.ndarray]) -> list[np.ndarray | None]:
        """The drawn tokens after each prompt, int32, the end token included where it was drawn; None without room."""
        found: list[np.ndarray | None] = [None] * len(prompts)
        fitting = [number for number, prompt in enumerate(prompts) if len(prompt) <= self.room]
        if not fitting:
            return found
        # One shape for all batches, as each is a compilation.
        width = padded_length(max(len(prompts[number]) for number in fitting), self.room)
        rows = max(1, min(len(fitting), self._model.batch_tokens // (width + self._sampling.max_tokens)))
        for start in range(0, len(fitting), rows):
            chosen = fitting[start : start + rows]
            self._key, key = jax.random.split(self._key)
            drawn = draw_batch(self._model, [prompts[number] for number in chosen], rows, width, key, self._sampling)
            for number, tokens in zip(chosen, drawn, strict=True):
                found[number] = tokens
        return found
