"""A checkpoint as a policy: it goes on with the text of a state."""

from __future__ import annotations

from collections.abc import Sequence

import jax
import numpy as np

from unipool_jax.evaluation.continuing import draw_all, drawn_text
from unipool_jax.evaluation.scoring import LanguageModel, encode_pairs, score_windows
from unipool_jax.model.sampling import Sampling
from unipool_jax.rewriting.moves import State
from unipool_jax.rewriting.text import prompt


class ModelPolicy:
    """Moves drawn from a model, on one device.

    Args:
      model: the checkpoint.
      max_tokens: of a move.
      temperature: of the draws; 0 gives the most probable move.
      seed: of the draws, which also depend on which states are in one batch.
    """

    def __init__(self, model: LanguageModel, max_tokens: int, temperature: float, seed: int):
        self._model = model
        tokenizer = model.tokenizer
        self._sampling = Sampling(tokenizer.vocab_size, tokenizer.eod, max_tokens, temperature)
        self._key = jax.random.key(seed)
        self.too_long = 0
        """States that the model could not read, for which it proposed nothing."""

    def propose(self, states: Sequence[State], count: int) -> list[list[str]]:
        """`count` texts for each state; none for a state that leaves no room for a move."""
        room = self._model.max_length - self._sampling.max_tokens
        prompts = self._model.tokenizer.encode_batch([prompt(state) for state in states])
        self.too_long += sum(len(tokens) > room for tokens in prompts)
        repeated = [tokens for tokens in prompts for _ in range(count)]
        answers: list[list[str]] = [[] for _ in states]
        for number, drawn in enumerate(draw_all(self._model, repeated, self._sampling, self._next_key)):
            if drawn is not None:
                text = drawn_text(self._model, repeated[number], drawn, self._sampling)
                answers[number // count].append(text.strip())
        return answers

    def _next_key(self) -> jax.Array:
        self._key, key = jax.random.split(self._key)
        return key

    def score(self, pairs: Sequence[tuple[State, str]]) -> list[float]:
        """Log-probability in nats of each text after its state, without the end of the document."""
        windows = encode_pairs(self._model.tokenizer, [(prompt(state), f" {text}") for state, text in pairs])
        scored = [window for window in windows if len(window.continuation)]
        found = iter(score_windows(self._model, scored).log_likelihood_W)
        return [float(next(found)) if len(window.continuation) else -np.inf for window in windows]
