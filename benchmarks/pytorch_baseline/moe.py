"""Routers, the shared expert bank, and the balance losses (arXiv 2605.06665).

Shape suffixes: N tokens, K experts per token, M experts of a pool, D model width, F expert width, R = N K rows,
A token groups of the Switch loss.
"""

from __future__ import annotations

import functools
import math
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.pytorch_baseline.dense import Linear, SwiGLU
from benchmarks.pytorch_baseline.settings import Settings


class Statistics(NamedTuple):
    """Statistics of one layer and micro-batch for the balance losses."""

    counts_AM: Tensor
    """Choices per expert, int64."""
    score_sum_AM: Tensor
    """Scores summed over tokens, float32, with gradient."""
    z_square_mean: Tensor
    """Mean over tokens of the squared logsumexp of the logits, float32, with gradient."""


@functools.cache
def monte_carlo_constant(num_experts: int, top_k: int, draws: int = 100_000) -> float:
    """NormRouter's c (algorithm 1): the mean of 1 / |top-k of relu(x / |x|)| over Gaussian x.

    The seed is the published one. A draw without a positive entry makes the mean infinite (it happens below about 20
    experts); the root-mean-square estimate 1 / sqrt(E |top-k|^2) is used instead.
    """
    x = torch.from_numpy(np.random.RandomState(42).randn(draws, num_experts))
    positive = F.normalize(x, dim=1).relu_()
    norms = positive.topk(top_k, dim=1).values.norm(dim=1)
    if bool((norms > 0).all()):
        return norms.reciprocal().mean().item()
    return 1.0 / math.sqrt(norms.square().mean().item())


class Router(nn.Module):
    """One layer's router: scores of all experts, the chosen ones, and their gates."""

    expert_bias: Tensor

    def __init__(self, settings: Settings):
        super().__init__()
        self.kind, self.top_k = settings.router, settings.top_k
        self.dtype = getattr(torch, settings.router_dtype)
        self.epsilon = settings.score_epsilon
        self.weight = nn.Parameter(torch.empty(settings.experts_per_pool, settings.hidden_size))
        if self.kind == "norm":
            self.scale = nn.Parameter(torch.ones(()))
            exact = settings.score_constant == "monte_carlo"
            self.constant = monte_carlo_constant(settings.experts_per_pool, settings.top_k) if exact else 1.0
        self.biased = settings.balance == "expert_bias"
        if self.biased:
            self.register_buffer("expert_bias", torch.zeros(settings.experts_per_pool))

    def scores(self, logits_NM: Tensor) -> Tensor:
        """Softmax or sigmoid in float32, or `scale * c * relu(z / (|z| + eps))`."""
        if self.kind == "norm":
            norm_N1 = torch.linalg.vector_norm(logits_NM, dim=-1, keepdim=True, dtype=torch.float32).to(self.dtype)
            return self.scale.to(self.dtype) * self.constant * F.relu(logits_NM / (norm_N1 + self.epsilon))
        wide_NM = logits_NM.float()
        if self.kind == "softmax":
            return wide_NM.softmax(-1).to(self.dtype)
        if self.kind == "sigmoid":
            return wide_NM.sigmoid().to(self.dtype)
        raise NotImplementedError(self.kind)

    def choose(self, scores_NM: Tensor) -> Tensor:
        """The k best experts of each token, `[N, K]`; among equals the lowest index."""
        key_NM = scores_NM.detach()
        if self.biased:
            key_NM = key_NM.float() + self.expert_bias
        if self.top_k == 1:
            return key_NM.argmax(-1, keepdim=True)
        # topk leaves the order of equals open, and NormRouter makes many zeros.
        return torch.sort(key_NM, dim=-1, descending=True, stable=True).indices[:, : self.top_k]

    def forward(self, hidden_ND: Tensor, num_groups: int) -> tuple[Tensor, Tensor, Statistics]:
        """Experts `[N, K]`, gates `[N, K]` float32 and statistics per each of `num_groups` groups of tokens."""
        # Operands in the compute dtype, sums in float32: exact products either way.
        logits_NM = F.linear(hidden_ND.float(), self.weight.to(hidden_ND.dtype).float()).to(self.dtype)
        scores_NM = self.scores(logits_NM)
        experts_NK = self.choose(scores_NM)
        gates_NK = scores_NM.gather(1, experts_NK).float()
        if self.kind == "sigmoid" and self.top_k > 1:
            gates_NK = gates_NK / (gates_NK.sum(-1, keepdim=True) + 1e-20)

        num_experts = scores_NM.shape[1]
        # Not bincount: it would wait for the device to learn the largest index.
        counts_AM = torch.zeros(num_groups, num_experts, dtype=torch.int64, device=experts_NK.device)
        grouped_AR = experts_NK.reshape(num_groups, -1)
        counts_AM.scatter_add_(1, grouped_AR, torch.ones_like(grouped_AR))
        statistics = Statistics(
            counts_AM,
            scores_NM.float().reshape(num_groups, -1, num_experts).sum(1),
            logits_NM.float().logsumexp(-1).square().mean(),
        )
        return experts_NK, gates_NK, statistics


# torch.compile refuses to trace float32 grouped products (torch 2.13), which run well outside it.
_untraced_grouped_mm = torch.compiler.disable(F.grouped_mm)


def grouped_mm(rows_RD: Tensor, weights_MDF: Tensor, offsets_M: Tensor) -> Tensor:
    """Each run of rows times its expert's matrix, `[R, F]`; `offsets_M` (int32) are the ends of the runs."""
    multiply = F.grouped_mm if rows_RD.dtype == torch.bfloat16 else _untraced_grouped_mm
    return multiply(rows_RD, weights_MDF, offs=offsets_M)


class ExpertPool(nn.Module):
    """SwiGLU experts that one or more layers use; gate and up projections are one matrix, gate first.

    Matrices are stored input-major: on a CPU the gradient of a grouped product is several times faster that way.
    """

    def __init__(self, settings: Settings):
        super().__init__()
        experts, width, ffn = settings.experts_per_pool, settings.hidden_size, settings.ffn_size
        self.gate_up = nn.Parameter(torch.empty(experts, width, 2 * ffn))
        self.down = nn.Parameter(torch.empty(experts, ffn, width))

    def forward(self, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Both matrices in the dtype of use: once per pass, not once per layer."""
        return self.gate_up.to(dtype), self.down.to(dtype)


class SharedExperts(nn.Module):
    """A layer's own block that all tokens visit, scaled by a sigmoid of the input if there is a gate."""

    def __init__(self, settings: Settings):
        super().__init__()
        self.block = SwiGLU(settings.hidden_size, settings.shared_experts * settings.ffn_size)
        self.gate = Linear(settings.hidden_size, 1) if settings.shared_expert_gate else None

    def forward(self, hidden_ND: Tensor) -> Tensor:
        output_ND = self.block(hidden_ND)
        if self.gate is None:
            return output_ND
        # Operands in the compute dtype, sums in float32, as for the router.
        share_N1 = F.linear(hidden_ND.float(), self.gate.weight.to(hidden_ND.dtype).float()).sigmoid()
        return (output_ND.float() * share_N1).to(hidden_ND.dtype)


class Mixture(nn.Module):
    """Feed-forward block of a layer that draws from a pool."""

    def __init__(self, settings: Settings):
        super().__init__()
        self.router = Router(settings)
        self.shared = SharedExperts(settings) if settings.shared_experts else None

    def forward(
        self, hidden_BSD: Tensor, gate_up_MDF: Tensor, down_MFD: Tensor, num_groups: int
    ) -> tuple[Tensor, Statistics]:
        hidden_ND = hidden_BSD.flatten(0, 1)
        experts_NK, gates_NK, statistics = self.router(hidden_ND, num_groups)

        order_R = torch.argsort(experts_NK.flatten(), stable=True)
        inverse_R = torch.empty_like(order_R)
        inverse_R[order_R] = torch.arange(len(order_R), device=order_R.device)
        offsets_M = statistics.counts_AM.sum(0).cumsum(0).int()
        sorted_RD = hidden_ND.index_select(0, order_R // self.router.top_k)
        gate_RF, up_RF = grouped_mm(sorted_RD, gate_up_MDF, offsets_M).chunk(2, dim=-1)
        output_RD = grouped_mm(F.silu(gate_RF) * up_RF, down_MFD, offsets_M)

        output_NKD = output_RD.index_select(0, inverse_R).view(*experts_NK.shape, -1)
        mixed_ND = (output_NKD * gates_NK.unsqueeze(-1)).sum(1).to(hidden_ND.dtype)
        if self.shared is not None:
            mixed_ND = mixed_ND + self.shared(hidden_ND)
        return mixed_ND.view_as(hidden_BSD), statistics


def switch_loss(layers: list[Statistics], tokens_per_group: int, top_k: int, coefficient: float) -> Tensor:
    """Per layer and group `coefficient * M * sum_i f_i P_i`; summed over layers, averaged over groups."""
    total = layers[0].score_sum_AM.new_zeros(())
    for layer in layers:
        fraction_AM = layer.counts_AM / (top_k * tokens_per_group)
        mean_score_AM = layer.score_sum_AM / tokens_per_group
        total = total + coefficient * fraction_AM.shape[1] * (fraction_AM * mean_score_AM).sum(-1).mean()
    return total


def pool_loss(layers: list[Statistics], mean_counts_M: Tensor, tokens: int, top_k: int, coefficient: float) -> Tensor:
    """The loss of one pool, as it is accumulated layer by layer: `alpha M / (k T^2 L) sum_i n_i S_li` for each l.

    Args:
      layers: statistics of the L layers that share the pool, of one micro-batch of T tokens.
      mean_counts_M: n, choices per expert per micro-batch, averaged over those layers (and micro-batches).
      tokens: T.
      top_k: experts per token.
      coefficient: alpha.
    """
    factor = coefficient * len(mean_counts_M) / (top_k * tokens**2 * len(layers))
    return torch.stack([factor * (mean_counts_M * layer.score_sum_AM.sum(0)).sum() for layer in layers]).sum()
