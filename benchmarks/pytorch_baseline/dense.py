"""Layers without a choice: a projection, norms, and the SwiGLU block that every token visits."""

from __future__ import annotations

import math

import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.pytorch_baseline.settings import Settings


class RMSNorm(nn.RMSNorm):
    """Computed in float32, returned in the dtype of the input."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.float()).to(x.dtype)


def post_norm(settings: Settings, constant: float) -> RMSNorm | None:
    """The norm of a block's output, if there is one; with depth scaling its gain starts at `constant / sqrt(L)`."""
    if settings.norm == "pre":
        return None
    norm = RMSNorm(settings.hidden_size, settings.post_norm_epsilon)
    if settings.norm == "depth_scaled_sandwich":
        nn.init.constant_(norm.weight, constant / math.sqrt(settings.num_layers))
    return norm


class Linear(nn.Linear):
    """Without bias; the float32 weight is used in the dtype of the input."""

    def __init__(self, inputs: int, outputs: int):
        super().__init__(inputs, outputs, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight.to(x.dtype))


class SwiGLU(nn.Module):
    """Gate and up projections are one matrix, gate first."""

    def __init__(self, width: int, hidden: int):
        super().__init__()
        self.gate_up = Linear(width, 2 * hidden)
        self.down = Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.gate_up(x).chunk(2, dim=-1)
        return self.down(F.silu(gate) * up)
