"""A checkpoint answers prompts, which are tokens of its template."""

from __future__ import annotations

from collections.abc import Sequence

import jax
import numpy as np

from unipool_jax.evaluation.scoring import LanguageModel, padded_length
from unipool_jax.model.sampling import Sampling, generate
from unipool_jax.moe.lock import score_factors


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
            for number, tokens in zip(chosen, self._batch([prompts[n] for n in chosen], rows, width), strict=True):
                found[number] = tokens
        return found

    def _batch(self, prompts: Sequence[np.ndarray], rows: int, width: int) -> list[np.ndarray]:
        """Drawn tokens of prompts in a batch of `[rows, width]`; rows without a prompt repeat the last one."""
        filled = [*prompts, *[prompts[-1]] * (rows - len(prompts))]
        tokens_BS = np.stack([np.pad(prompt, (0, width - len(prompt))) for prompt in filled]).astype(np.int32)
        lengths_B = np.array([len(prompt) for prompt in filled], np.int32)
        model = self._model
        self._key, key = jax.random.split(self._key)
        factors, bias = score_factors(model.config, model.balance.lock), model.balance.expert_bias_GNE
        generated = generate(model.config, model.params, bias, tokens_BS, lengths_B, key, self._sampling, factors)
        tokens_BT, ends_B = jax.device_get(generated)
        return [tokens_BT[row, lengths_B[row] : ends_B[row]] for row in range(len(prompts))]
