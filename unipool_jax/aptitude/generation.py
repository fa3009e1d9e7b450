"""One-shot scores by generation: whether the model's own answer to an anchor is right, programs included."""

from __future__ import annotations

from collections.abc import Sequence

import jax
import numpy as np

from unipool_jax.aptitude.executor import unavailable
from unipool_jax.aptitude.likelihood import one_shot
from unipool_jax.aptitude.scores import Shown
from unipool_jax.aptitude.tools import answers, final_answer, same_answer
from unipool_jax.config.errors import UserError
from unipool_jax.evaluation.scoring import LanguageModel, padded_length, row_count
from unipool_jax.model.sampling import Sampling, generate
from unipool_jax.moe.lock import score_factors


class GenerationScorer:
    """1 where the answer that a model generates greedily is the anchor's, else 0.

    Args:
      model: on one device.
      max_tokens: of each continuation.

    Raises:
      UserError: no room for a prompt beside them, or nothing here contains programs.
    """

    def __init__(self, model: LanguageModel, max_tokens: int):
        if (why := unavailable()) is not None:
            raise UserError(f"by=generation: {why}")
        if max_tokens >= model.max_length:
            raise UserError(
                f"max_tokens={max_tokens}: the model reads {model.max_length} tokens, prompt included; give fewer"
            )
        self._model = model
        self._sampling = Sampling(model.tokenizer.vocab_size, model.tokenizer.eod, max_tokens, temperature=0.0)

    def __call__(self, asked: Sequence[Shown]) -> list[float | None]:
        """A score for each; None for a prompt that is too long. A later continuation without room ends the answer."""
        found = answers([one_shot(one)[0] for one in asked], self.complete)
        return [
            None if text is None else float(same_answer(final_answer(text), one.answer))
            for one, text in zip(asked, found, strict=True)
        ]

    def complete(self, prompts: Sequence[str]) -> list[str | None]:
        """The greedy continuation of each prompt, the end of the document excluded; None where there is no room."""
        room = self._model.max_length - self._sampling.max_tokens
        tokens = self._model.tokenizer.encode_batch(prompts)
        found: list[str | None] = [None] * len(prompts)
        groups: dict[int, list[int]] = {}
        for number, one in enumerate(tokens):
            if len(one) <= room:
                groups.setdefault(padded_length(len(one), room), []).append(number)
        for width, members in sorted(groups.items()):
            most = max(1, self._model.batch_tokens // (width + self._sampling.max_tokens))
            rows = row_count(len(members), most)
            for start in range(0, len(members), rows):
                chosen = members[start : start + rows]
                for number, text in zip(chosen, self._batch([tokens[n] for n in chosen], rows, width), strict=True):
                    found[number] = text
        return found

    def _batch(self, prompts: Sequence[np.ndarray], rows: int, width: int) -> list[str]:
        """Continuations of prompts padded to `[rows, width]`; rows of padding repeat the last."""
        model, end = self._model, self._sampling.end_token
        tokens_BS, lengths_B = np.zeros((rows, width), np.int32), np.zeros(rows, np.int32)
        for row in range(rows):
            prompt = prompts[min(row, len(prompts) - 1)]
            tokens_BS[row, : len(prompt)], lengths_B[row] = prompt, len(prompt)
        factors = score_factors(model.config, model.balance.lock)
        bias = model.balance.expert_bias_GNE
        key = jax.random.key(0)  # greedy: nothing is drawn
        found = jax.device_get(
            generate(model.config, model.params, bias, tokens_BS, lengths_B, key, self._sampling, factors)
        )
        drawn = [found.tokens_BT[row, lengths_B[row] : found.lengths_B[row]] for row in range(len(prompts))]
        return [
            model.tokenizer.decode_after(prompt, own[own != end]) for prompt, own in zip(prompts, drawn, strict=True)
        ]
