"""What a model on one device says after many prompts, drawn in padded batches."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import jax
import numpy as np

from unipool_jax.evaluation.scoring import LanguageModel, padded_length, row_count
from unipool_jax.model.sampling import Sampling, generate
from unipool_jax.moe.lock import score_factors


def draw_batch(
    model: LanguageModel, prompts: Sequence[np.ndarray], rows: int, width: int, key: jax.Array, sampling: Sampling
) -> list[np.ndarray]:
    """The tokens drawn after each prompt, int32, the end token included where it was drawn.

    Args:
      model: the checkpoint.
      prompts: at most `rows`, of at most `width` tokens and at least one. Rows of padding repeat the last, so that they
        end when it does.
      rows, width: shape of the batch; each shape is compiled once.
      key: of the draws.
      sampling: how they are made.
    """
    tokens_BS, lengths_B = np.zeros((rows, width), np.int32), np.zeros(rows, np.int32)
    for row in range(rows):
        prompt = prompts[min(row, len(prompts) - 1)]
        tokens_BS[row, : len(prompt)], lengths_B[row] = prompt, len(prompt)
    factors, bias = score_factors(model.config, model.balance.lock), model.balance.expert_bias_GNE
    found = jax.device_get(generate(model.config, model.params, bias, tokens_BS, lengths_B, key, sampling, factors))
    return [found.tokens_BT[row, lengths_B[row] : found.lengths_B[row]] for row in range(len(prompts))]


def draw_all(
    model: LanguageModel, prompts: Sequence[np.ndarray], sampling: Sampling, next_key: Callable[[], jax.Array]
) -> list[np.ndarray | None]:
    """`draw_batch` for any number of prompts, those of like length together, the shortest first.

    Args:
      next_key: gives the key of each batch.

    Returns:
      The drawn tokens of each prompt; None where it leaves no room for them.
    """
    room = model.max_length - sampling.max_tokens
    groups: dict[int, list[int]] = {}
    for number, prompt in enumerate(prompts):
        if len(prompt) <= room:
            groups.setdefault(padded_length(len(prompt), room), []).append(number)
    found: list[np.ndarray | None] = [None] * len(prompts)
    for width, members in sorted(groups.items()):
        rows = row_count(len(members), max(1, model.batch_tokens // (width + sampling.max_tokens)))
        for start in range(0, len(members), rows):
            chosen = members[start : start + rows]
            drawn = draw_batch(model, [prompts[number] for number in chosen], rows, width, next_key(), sampling)
            for number, tokens in zip(chosen, drawn, strict=True):
                found[number] = tokens
    return found


def drawn_text(model: LanguageModel, prompt: np.ndarray, drawn: np.ndarray, sampling: Sampling) -> str:
    """The text of drawn tokens after their prompt, without the end token."""
    return model.tokenizer.decode_after(prompt, drawn[drawn != sampling.end_token])
