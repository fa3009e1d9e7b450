"""`unipool generate`: let a trained model go on with a text."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Sequence

import jax
import numpy as np

from unipool_jax.config.rules import validate
from unipool_jax.config.schema import Config, ConfigError
from unipool_jax.data.losses import given_back, measure
from unipool_jax.data.tokenizer import Tokenizer, load_tokenizer
from unipool_jax.evaluation.requests import GenerateRequest
from unipool_jax.evaluation.target import check_tokenizer, with_overrides
from unipool_jax.model.sampling import Sampling, generate
from unipool_jax.moe.lock import score_factors
from unipool_jax.training.checkpoint import Checkpoints, restore_model
from unipool_jax.training.opening import opened_config
from unipool_jax.training.run_folder import CHECKPOINTS, find_run

DEFAULT_TOKENS = 64
"""Tokens drawn for each prompt, where the model has the positions for them."""


def encode_prompts(
    prompts: Sequence[str], tokenizer: Tokenizer, config: Config, max_tokens: int | None
) -> tuple[np.ndarray, np.ndarray, int]:
    """Tokens of the prompts, int32 `[B, S]` padded with zeros, their lengths, int32 `[B]`, and the tokens to draw.

    Raises:
      ConfigError: a prompt without tokens, or one that leaves fewer than `max_tokens` of the model's positions.
    """
    rows, positions = tokenizer.encode_batch(prompts), config.positions
    scaled = config.model.rope_scaling != "none"
    length = "model.rope_factor x model.rope_original_length" if scaled else "data.sequence_length"
    wanted = max_tokens or max(1, min(DEFAULT_TOKENS, positions - max(len(row) for row in rows)))
    room, lower = positions - wanted, "" if wanted == 1 else " or lower max_tokens"
    problems = [
        f"prompt={text!r}: {len(row)} tokens; with max_tokens={wanted} a prompt can have 1 to {max(room, 0)}, as "
        f"the model reads {positions} positions ({length}); shorten the prompt{lower}"
        for text, row in zip(prompts, rows, strict=True)
        if not 1 <= len(row) <= room
    ]
    if problems:
        raise ConfigError(problems)
    for text, row, changed in zip(prompts, rows, measure(tokenizer, prompts, rows).changed, strict=True):
        if changed:
            print(f"prompt={text!r}: the model sees {given_back(tokenizer, row)!r}", file=sys.stderr)
    lengths_B = np.array([len(row) for row in rows], np.int32)
    return np.stack([np.pad(row, (0, int(lengths_B.max()) - len(row))) for row in rows]), lengths_B, wanted


def generate_texts(request: GenerateRequest) -> list[str]:
    """The continuation of each prompt, without the end-of-document token.

    Raises:
      ConfigError, RunError, CheckpointError, DataError: with what to do about it.
    """
    run = find_run(request.run)
    with Checkpoints(run / CHECKPOINTS, read_only=True) as checkpoints:
        step = checkpoints.find(request.step)
        meta = checkpoints.meta(step)
        config = with_overrides(opened_config(run, meta), request.overrides)
        validate(dataclasses.replace(config, mode="describe"))
        tokenizer = load_tokenizer(config.data.tokenizer)
        check_tokenizer(tokenizer, meta, checkpoints.path(step))
        prompts_BS, lengths_B, max_tokens = encode_prompts(request.prompt, tokenizer, config, request.max_tokens)
        config, params, balance = restore_model(checkpoints, config, step)
    sampling = Sampling(tokenizer.vocab_size, tokenizer.eod, max_tokens, request.temperature, request.top_p)
    key, factors = jax.random.key(request.seed), score_factors(config, balance.lock)
    generated = jax.device_get(
        generate(config, params, balance.expert_bias_GNE, prompts_BS, lengths_B, key, sampling, factors)
    )
    rows = [
        (tokens[:start], tokens[start:end])
        for tokens, start, end in zip(generated.tokens_BT, lengths_B, generated.lengths_B, strict=True)
    ]
    return [tokenizer.decode_after(prompt, row[row != tokenizer.eod]) for prompt, row in rows]


def generate_command(request: GenerateRequest) -> int:
    """Print each prompt with what follows it; raises as `generate_texts`."""
    for number, (prompt, text) in enumerate(zip(request.prompt, generate_texts(request), strict=True)):
        if number:
            print("-" * 40)
        print(prompt + text)
    return 0
