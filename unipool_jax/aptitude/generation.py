"""One-shot scores by generation: whether the model's own answer to an anchor is right, programs included."""

from __future__ import annotations

from collections.abc import Sequence

import jax

from unipool_jax.aptitude.executor import unavailable
from unipool_jax.aptitude.likelihood import one_shot
from unipool_jax.aptitude.scores import Shown
from unipool_jax.aptitude.tools import answers, final_answer, same_answer
from unipool_jax.config.errors import UserError
from unipool_jax.evaluation.continuing import draw_all, drawn_text
from unipool_jax.evaluation.scoring import LanguageModel
from unipool_jax.model.sampling import Sampling


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
        model, tokens = self._model, self._model.tokenizer.encode_batch(prompts)
        # Greedy: nothing is drawn with the key.
        found = draw_all(model, tokens, self._sampling, lambda: jax.random.key(0))
        return [
            None if drawn is None else drawn_text(model, prompt, drawn, self._sampling)
            for prompt, drawn in zip(tokens, found, strict=True)
        ]
