"""A checkpoint as a policy: it goes on with the text of a state."""

from __future__ import annotations

from collections.abc import Sequence

import jax
import numpy as np

from unipool_jax.evaluation.scoring import (
    LanguageModel,
    encode_pairs,
    padded_length,
    row_count,
    score_windows,
)
from unipool_jax.model.sampling import Sampling, generate
from unipool_jax.moe.lock import score_factors
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
        groups: dict[int, list[int]] = {}
        for number, tokens in enumerate(prompts):
            if len(tokens) <= room:
                groups.setdefault(padded_length(len(tokens), room), []).extend([number] * count)
            else:
                self.too_long += 1
        answers: list[list[str]] = [[] for _ in states]
        for width, members in sorted(groups.items()):
            rows = row_count(len(members), max(1, self._model.batch_tokens // (width + self._sampling.max_tokens)))
            for start in range(0, len(members), rows):
                chosen = members[start : start + rows]
                texts = self._continued([prompts[number] for number in chosen], rows, width)
                for number, text in zip(chosen, texts, strict=True):
                    answers[number].append(text)
        return answers

    def _continued(self, prompts: Sequence[np.ndarray], rows: int, width: int) -> list[str]:
        """What the model says after prompts, padded to `[rows, width]`; rows of padding repeat the last."""
        model = self._model
        tokens_BS, lengths_B = np.zeros((rows, width), np.int32), np.zeros(rows, np.int32)
        for row in range(rows):
            tokens = prompts[min(row, len(prompts) - 1)]
            tokens_BS[row, : len(tokens)], lengths_B[row] = tokens, len(tokens)
        self._key, key = jax.random.split(self._key)
        factors = score_factors(model.config, model.balance.lock)
        bias = model.balance.expert_bias_GNE
        found = generate(model.config, model.params, bias, tokens_BS, lengths_B, key, self._sampling, factors)
        tokens_BT, ends_B = jax.device_get(found)
        drawn = [tokens_BT[row, lengths_B[row] : ends_B[row]] for row in range(len(prompts))]
        end = self._sampling.end_token
        return [
            model.tokenizer.decode_after(tokens, row[row != end]).strip()
            for tokens, row in zip(prompts, drawn, strict=True)
        ]

    def score(self, pairs: Sequence[tuple[State, str]]) -> list[float]:
        """Log-probability in nats of each text after its state, without the end of the document."""
        windows = encode_pairs(self._model.tokenizer, [(prompt(state), f" {text}") for state, text in pairs])
        scored = [window for window in windows if len(window.continuation)]
        found = iter(score_windows(self._model, scored).log_likelihood_W)
        return [float(next(found)) if len(window.continuation) else -np.inf for window in windows]
