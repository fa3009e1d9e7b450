"""Training of the twin: losses of one micro-batch, AdamW, the schedule, and one optimizer step."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.pytorch_baseline.model import Gates, Transformer
from benchmarks.pytorch_baseline.moe import Mixture, Statistics, set_loss, switch_loss
from benchmarks.pytorch_baseline.settings import Settings
from benchmarks.pytorch_baseline.sharing import balance_sets, counted_through, seen_experts


def learning_rate(settings: Settings, completed: int) -> float:
    """Of the update after `completed` steps: linear from 0 to the peak, then half a cosine to the minimum."""
    warmup = max(1, round(settings.warmup_fraction * settings.steps)) if settings.warmup_fraction else 0
    if completed < warmup:
        return settings.learning_rate * completed / warmup
    progress = min((completed - warmup) / max(settings.steps - warmup, 1), 1.0)
    span = settings.learning_rate - settings.min_learning_rate
    return settings.min_learning_rate + span * 0.5 * (1.0 + math.cos(math.pi * progress))


def make_optimizer(model: Transformer) -> torch.optim.AdamW:
    """Fused AdamW; matrices decay, gains and router scales do not."""
    settings = model.settings
    matrices = [p for p in model.parameters() if p.ndim >= 2]
    others = [p for p in model.parameters() if p.ndim < 2]
    return torch.optim.AdamW(
        [{"params": matrices, "weight_decay": settings.weight_decay}, {"params": others, "weight_decay": 0.0}],
        lr=settings.learning_rate,
        betas=(settings.beta1, settings.beta2),
        eps=settings.epsilon,
        fused=True,
    )


def gate_penalty(settings: Settings, gates: list[Gates], losses_BS: Tensor) -> Tensor:
    """Penalty on full attention, the mean over tokens and layers (arXiv 2603.26380); 0 without routers."""
    if not gates:
        return torch.zeros((), device=losses_BS.device)
    of_layers = []
    for logit_BS, disagreement_BS in gates:
        scale = settings.switch_epsilon + losses_BS + settings.switch_alpha * disagreement_BS
        weight = settings.switch_weight / (torch.ones_like(scale) if settings.switch_fixed else scale)
        of_layers.append((weight * F.softplus(logit_BS)).mean())
    return torch.stack(of_layers).mean()


@dataclass
class Losses:
    """Means over the tokens of a micro-batch, in nats."""

    lm: Tensor
    balance: Tensor
    z: Tensor
    switch: Tensor

    @property
    def total(self) -> Tensor:
        """What is differentiated."""
        return self.lm + self.balance + self.z + self.switch


class Trainer:
    """A model, its optimizer and the state of expert balancing.

    Args:
      model: on its device.
      compiled: run the model through `torch.compile`.
    """

    def __init__(self, model: Transformer, *, compiled: bool = False):
        self.model, self.settings = model, model.settings
        self.run = torch.compile(model) if compiled else model
        self.optimizer = make_optimizer(model)
        self.sets = balance_sets(self.settings)
        self.seen = [seen_experts(self.settings, layer) for layer in range(self.settings.mixture_layers)]
        self.completed = 0
        self.previous_counts_SM: Tensor | None = None

    def micro_losses(
        self,
        tokens_BS: Tensor,
        targets_BS: Tensor,
        mean_counts_SM: Tensor | None = None,
        open_LM: Tensor | None = None,
    ) -> tuple[Losses, list[Statistics]]:
        """Losses of one micro-batch.

        `mean_counts_SM` are the choices per expert that the pool loss uses, averaged over the layers of each set; None
        takes those of this micro-batch.
        """
        settings = self.settings
        logits_BSV, statistics, gates = self.run(tokens_BS, open_LM)
        losses_BS = F.cross_entropy(logits_BSV.transpose(1, 2), targets_BS, reduction="none")
        lm, switch = losses_BS.mean(), gate_penalty(settings, gates, losses_BS.detach())
        balance = z = torch.zeros((), device=lm.device)
        if settings.balance == "switch":
            tokens = settings.switch_group_sequences * tokens_BS.shape[1]
            widths = [len(experts) for experts in self.seen]
            balance = switch_loss(statistics, widths, tokens, settings.top_k, settings.switch_coefficient)
        elif settings.balance == "pool":
            counts_SM = self.mean_counts(statistics) if mean_counts_SM is None else mean_counts_SM
            for members, counts_M in zip(self.sets, counts_SM, strict=True):
                balance = balance + set_loss(
                    settings, members, statistics, counts_M, tokens_BS.numel(), self.pool_coefficient()
                )
        if settings.z_coefficient:
            z = settings.z_coefficient * torch.stack([layer.z_square_mean for layer in statistics]).sum()
        return Losses(lm, balance, z, switch), statistics

    def pool_coefficient(self) -> float:
        """Weight of the pool loss in this step."""
        risen = self.completed / (self.settings.pool_warmup_fraction * self.settings.steps or 1)
        return self.settings.pool_coefficient * (min(risen, 1.0) if self.settings.pool_warmup_fraction else 1.0)

    def mean_counts(self, statistics: list[Statistics]) -> Tensor:
        """Choices per expert of all pools averaged over the layers of each set, float32 `[S, M]`."""
        counts_LM = torch.stack(
            [counted_through(self.settings, at, layer.counts_AM.sum(0)) for at, layer in enumerate(statistics)]
        ).float()
        return torch.stack([counts_LM[members.layers].mean(0) for members in self.sets])

    @torch.no_grad()
    def count(self, micros: list[tuple[Tensor, Tensor]], open_LM: Tensor | None) -> Tensor:
        """Mean choices per expert over all micro-batches: the exact pool loss needs them before any gradient."""
        return torch.stack([self.mean_counts(self.run(tokens, open_LM)[1]) for tokens, _ in micros]).mean(0)

    def step(self, tokens_BS: Tensor, targets_BS: Tensor, open_LM: Tensor | None = None) -> dict[str, Tensor]:
        """One optimizer step over a batch. With windows that open, `open_LM` are the open experts of each layer, bool.

        Returns:
          Losses (means over micro-batches), the norm of the gradient, and the choices per layer and expert, `counts`.
        """
        settings = self.settings
        size = settings.microbatch_size
        micros = list(zip(tokens_BS.split(size), targets_BS.split(size), strict=True))
        use_SM = None
        if settings.balance == "pool" and settings.pool_statistics == "current" and len(micros) > 1:
            use_SM = self.count(micros, open_LM)

        self.optimizer.zero_grad()
        sums: dict[str, Tensor] = {}
        counts_LM: Tensor | None = None
        for tokens, targets in micros:
            if settings.balance == "pool" and settings.pool_statistics == "previous":
                # Nothing is known before the first micro-batch, and counts of zero make the loss zero.
                shape = (len(self.sets), settings.num_pools * settings.experts_per_pool)
                fresh_SM = torch.zeros(shape, device=tokens.device)
                use_SM = fresh_SM if self.previous_counts_SM is None else self.previous_counts_SM
            losses, statistics = self.micro_losses(tokens, targets, use_SM, open_LM)
            (losses.total / len(micros)).backward()
            if statistics:
                self.previous_counts_SM = self.mean_counts(statistics)
                micro_counts_LM = torch.stack([layer.counts_AM.sum(0) for layer in statistics])
                counts_LM = micro_counts_LM if counts_LM is None else counts_LM + micro_counts_LM
            for name in ("lm", "balance", "z", "switch", "total"):
                part = getattr(losses, name).detach() / len(micros)
                sums[name] = sums[name] + part if name in sums else part

        sums["grad_norm"] = torch.nn.utils.clip_grad_norm_(self.model.parameters(), settings.clip_norm)
        self._update()
        if counts_LM is not None:
            sums["counts"] = counts_LM
            if settings.balance == "expert_bias":
                self._update_expert_bias(counts_LM.float())
        self.completed += 1
        return sums

    @torch.no_grad()
    def _update(self) -> None:
        """One step of AdamW; of experts that u layers see, a step over u or its root."""
        settings, rate = self.settings, learning_rate(self.settings, self.completed)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        divided = settings.reuse_divisor != "none"
        before = [matrix.clone() for pool in self.model.experts for matrix in pool.parameters()] if divided else []
        self.optimizer.step()
        if not divided:
            return
        uses = torch.zeros(settings.experts_per_pool)
        for experts in self.seen[: settings.layers_per_pool]:
            uses[experts] += 1
        divisor_M11 = (uses.sqrt() if settings.reuse_divisor == "sqrt" else uses).view(-1, 1, 1)
        undivided = rate * settings.weight_decay if settings.reuse_decay == "compensated" else 0.0
        matrices = [matrix for pool in self.model.experts for matrix in pool.parameters()]
        for matrix, old in zip(matrices, before, strict=True):
            decayed = old - undivided * old
            matrix.copy_(decayed + (matrix - decayed) / divisor_M11.to(old.device))

    @torch.no_grad()
    def _update_expert_bias(self, counts_LM: Tensor) -> None:
        """`b += rate * sign(mean count - count)` with the counts of the full batch, for the experts of each layer."""
        layers = self.model.layers[self.settings.dense_layers :]
        for layer, experts, counts_M in zip(layers, self.seen, counts_LM, strict=True):
            assert isinstance(layer.ffn, Mixture)
            counts_W = counts_M[experts]
            layer.ffn.router.expert_bias[experts] += (
                self.settings.expert_bias_rate * (counts_W.mean() - counts_W).sign()
            )
