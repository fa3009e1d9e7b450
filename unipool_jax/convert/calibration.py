"""What conversions that look at text have in common: which text, in which pieces, and losses before and after."""

from __future__ import annotations

from collections.abc import Iterator

import jax
import jax.numpy as jnp

from unipool_jax.config.schema import Config
from unipool_jax.convert.errors import ConversionError
from unipool_jax.convert.inheritance import Origin, same_text
from unipool_jax.convert.weights import Weights
from unipool_jax.data.corpus import Corpus
from unipool_jax.data.identity import text_differences, text_identity
from unipool_jax.data.pipeline import Batch, WindowSource, evaluation_batches
from unipool_jax.training.evaluate import EvalResult, Evaluator
from unipool_jax.training.state import init_balance

_PASS_TOKENS = 8192
"""Tokens of a pass: what all layers give their experts is in memory at once."""


def inherited(origin: Origin, config: Config, target: Config, corpus: Corpus, conversion: str) -> Origin:
    """What the new run takes over.

    Args:
      origin: of the source.
      config: of the source.
      target: of the new run.
      corpus: the text of `target`.
      conversion: what it is called in `lineage.json`.

    Raises:
      ConversionError: the text or the tokenizer is not that of the run, although no other was named.
    """
    if corpus.tokenizer.definition != origin.tokenizer:
        raise ConversionError(
            f"data.tokenizer={target.data.tokenizer}: the model was trained with another; leave it out"
        )
    parent = None if origin.parent is None else origin.parent | {"conversion": conversion}
    if not same_text(config.data, target.data):
        return Origin(parent=parent)
    if origin.text is not None and (changed := text_differences(origin.text, text_identity(corpus))):
        listed = "\n".join(f"  - {line}" for line in changed)
        raise ConversionError(
            f"the run was trained on another text:\n{listed}\nRestore that one, or name the text with data.files=[...]"
        )
    return Origin(text=origin.text, parent=parent)


def calibration_windows(config: Config, corpus: Corpus, tokens: int, seed: int) -> WindowSource:
    """About `tokens` tokens of the train split in random order, at most one epoch."""
    data = config.data
    tokens = min(tokens, corpus.num_tokens("train") - 1)
    windows, mask = max(tokens // data.sequence_length, 1), data.document_mask
    return WindowSource(corpus.stores, "train", data.sequence_length, windows, seed, document_mask=mask)


def passes(windows: WindowSource) -> Iterator[Batch]:
    """The windows in batches of one shape."""
    rows = max(min(_PASS_TOKENS // windows.sequence_length, len(windows)), 1)
    return evaluation_batches(windows, batch_size=rows)


class HeldOut:
    """Evaluates weights on the first split that is held out, as long as an evaluation in training."""

    def __init__(self, config: Config, corpus: Corpus):
        self._config = config
        self.split = next((split for split in corpus.splits() if split != "train"), None)
        """None where no text is held out."""
        self._evaluator = None if self.split is None else Evaluator(config, corpus, [self.split], limited=True)

    def result(self, weights: Weights) -> EvalResult:
        """Loss and routing counts; only where there is a split."""
        assert self._evaluator is not None
        assert self.split is not None
        balance = init_balance(self._config)._replace(expert_bias_GNE=jnp.asarray(weights.expert_bias_GNE))
        params = jax.tree.map(jnp.asarray, weights.params)
        found = self._evaluator.evaluate(params, balance, self._evaluator.fixed(self.split))
        assert found is not None
        return found
