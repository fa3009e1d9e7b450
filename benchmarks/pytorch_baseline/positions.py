"""Rotary positions of the twin: frequencies, their scaling, and tables of cosines and sines."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from benchmarks.pytorch_baseline.settings import Settings


def frequencies(settings: Settings) -> Tensor:
    """Radians a position, float64 `[C/2]`; `yarn` as in the code of its authors (arXiv 2309.00071)."""
    pairs = torch.arange(settings.head_size // 2, dtype=torch.float64)
    plain = settings.rope_base ** (-2 * pairs / settings.head_size)
    if settings.rope_scaling == "none":
        return plain
    if settings.rope_scaling == "linear":
        return plain / settings.rope_factor
    # A pair whose frequency is f turns L f / 2 pi times; solved for the index of the pair.
    low, high = (
        settings.head_size / 2 * math.log(settings.rope_original_length / (2 * math.pi * turns), settings.rope_base)
        for turns in (settings.rope_beta_fast, settings.rope_beta_slow)
    )
    first, last = max(math.floor(low), 0), min(math.ceil(high), settings.head_size - 1)
    kept = 1 - ((pairs - first) / max(last - first, 0.001)).clamp(0, 1)
    return plain * kept + plain / settings.rope_factor * (1 - kept)


def tables(settings: Settings, length: int) -> tuple[Tensor, Tensor]:
    """Cosines and sines of `length` positions, float32 `[S, C/2]`, both times the attention factor."""
    angles = torch.outer(torch.arange(length, dtype=torch.float32), frequencies(settings).float())
    factor = settings.rope_attention_factor
    if factor is None:
        factor = 0.1 * math.log(settings.rope_factor) + 1
    factor = factor if settings.rope_scaling == "yarn" else 1.0
    return angles.cos() * factor, angles.sin() * factor


def document_positions(tokens_BS: Tensor, end: int) -> tuple[Tensor, Tensor]:
    """Position of each token in its document, `[B, S]`, and which positions are of one document, bool `[B, S, S]`.

    A document ends with the token `end`; row by row and token by token, slow and obvious.
    """
    positions, documents = torch.zeros_like(tokens_BS), torch.zeros_like(tokens_BS)
    for row, tokens in enumerate(tokens_BS.tolist()):
        position = document = 0
        for index, token in enumerate(tokens):
            positions[row, index], documents[row, index] = position, document
            position, document = (0, document + 1) if token == end else (position + 1, document)
    return positions, documents[:, :, None] == documents[:, None, :]
