"""The language model of the twin: pre-norm LLaMA-style layers over one or more expert pools."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from benchmarks.pytorch_baseline.dense import Linear, RMSNorm, SwiGLU, post_norm
from benchmarks.pytorch_baseline.moe import ExpertPool, Mixture, Statistics
from benchmarks.pytorch_baseline.positions import document_positions, tables
from benchmarks.pytorch_baseline.settings import Settings


class Gates(NamedTuple):
    """What the router of Switch Attention decided in one layer."""

    logit_BS: Tensor
    """Above 0 is full attention; float32, with gradient."""
    disagreement_BS: Tensor
    """Mean squared difference of full attention and window, float32, without gradient."""


class Attention(nn.Module):
    """Causal grouped-query attention; one projection makes queries, keys and values.

    With a window, a position sees only so many of those before it, itself among them. With Switch Attention both are
    computed, and a router chooses for each token.
    """

    def __init__(self, settings: Settings, window: int | None = None):
        super().__init__()
        self.window, self.switch_window = window, settings.switch_window
        switches = self.switch_window is not None
        self.switch = nn.Parameter(0.02 * torch.randn(settings.hidden_size)) if switches else None
        self.heads, self.kv_heads, self.head_size = settings.num_heads, settings.num_kv_heads, settings.head_size
        self.qkv = Linear(settings.hidden_size, (self.heads + 2 * self.kv_heads) * self.head_size)
        self.out = Linear(self.heads * self.head_size, settings.hidden_size)

    def forward(
        self, x_BSD: Tensor, cos: Tensor, sin: Tensor, same_BSS: Tensor | None, places: Tensor
    ) -> tuple[Tensor, Gates | None]:
        """`cos` and `sin` are `[S, C]`, or `[B, 1, S, C]`; `same_BSS` says which positions are of one document, and
        `places`, `[S]` or `[B, S]`, where in it they are."""
        batch, length, _ = x_BSD.shape
        heads_BHSC = self.qkv(x_BSD).view(batch, length, -1, self.head_size).transpose(1, 2)
        query, key, value = heads_BHSC.split((self.heads, self.kv_heads, self.kv_heads), dim=1)
        query, key = rotate(query, cos, sin), rotate(key, cos, sin)

        def attend(window: int | None) -> Tensor:
            seen = None
            if window is not None or same_BSS is not None:
                ones = torch.ones(length, length, dtype=torch.bool, device=x_BSD.device)
                seen = ones.tril() if window is None else ones.tril() & ones.triu(1 - window)
                seen = seen if same_BSS is None else seen & same_BSS[:, None]
            mixed_BHSC = F.scaled_dot_product_attention(
                query, key, value, attn_mask=seen, is_causal=seen is None, enable_gqa=True
            )
            return mixed_BHSC.transpose(1, 2).flatten(2)

        if self.switch is None or self.switch_window is None:
            return self.out(attend(self.window)), None
        to_all_BSD, to_window_BSD = attend(None), attend(self.switch_window)
        logit_BS = x_BSD.float() @ self.switch
        apart_BSD = to_all_BSD - to_window_BSD
        full_BS1 = ((logit_BS > 0) & (places >= self.switch_window))[..., None]
        soft_BS1 = torch.sigmoid(logit_BS)[..., None]
        # One of the two, with the gradient of a mixture.
        passed_BSD = (soft_BS1 - soft_BS1.detach()).to(x_BSD.dtype) * apart_BSD
        mixed_BSD = torch.where(full_BS1, to_all_BSD, to_window_BSD) + passed_BSD
        return self.out(mixed_BSD), Gates(logit_BS, apart_BSD.detach().float().square().mean(-1))


def rotate(x_BHSC: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary positions in the half-rotation layout: channel i turns with channel i + C/2. Angles are float32."""
    first, second = x_BHSC.float().chunk(2, dim=-1)
    turned = torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)
    return turned.to(x_BHSC.dtype)


class Layer(nn.Module):
    """One transformer layer. A mixture is handed the bank of its pool, so a pool is registered once.

    Behind a mixture the norm of its output is the mixture's to apply: to each expert's, or to their sum.
    """

    def __init__(self, settings: Settings, index: int):
        super().__init__()
        self.recompute = settings.recompute
        self.attention_norm = RMSNorm(settings.hidden_size, settings.norm_epsilon)
        self.attention = Attention(settings, settings.window(index))
        self.ffn_norm = RMSNorm(settings.hidden_size, settings.norm_epsilon)
        place = index - settings.dense_layers  # among the layers with experts
        hidden = settings.dense_width if place < 0 else settings.ffn_size
        dense = place < 0 or settings.router == "none"
        self.ffn: SwiGLU | Mixture = SwiGLU(settings.hidden_size, hidden) if dense else Mixture(settings, place)
        has_depth = settings.depth_vectors and not dense
        self.depth = nn.Parameter(torch.zeros(settings.hidden_size)) if has_depth else None
        self.attention_post_norm = post_norm(settings, settings.post_norm_attention)
        without = not dense and settings.post_norm_experts == "none"
        self.ffn_post_norm = None if without else post_norm(settings, settings.post_norm_ffn)

    def forward(
        self,
        x_BSD: Tensor,
        cos: Tensor,
        sin: Tensor,
        same_BSS: Tensor | None,
        places: Tensor,
        bank: tuple[Tensor, Tensor] | None,
        num_groups: int,
        open_M: Tensor | None = None,
    ) -> tuple[Tensor, Statistics | None, Gates | None]:
        attended_BSD, gates = self.attention(self.attention_norm(x_BSD), cos, sin, same_BSS, places)
        if self.attention_post_norm is not None:
            attended_BSD = self.attention_post_norm(attended_BSD)
        x_BSD = x_BSD + attended_BSD
        normed_BSD = self.ffn_norm(x_BSD)
        if self.depth is not None:
            normed_BSD = (normed_BSD.float() + self.depth).to(normed_BSD.dtype)
        if bank is None:
            output_BSD = self.ffn(normed_BSD)
            return x_BSD + (output_BSD if self.ffn_post_norm is None else self.ffn_post_norm(output_BSD)), None, gates
        run = recomputed if self.recompute == "moe" and torch.is_grad_enabled() else call
        output_BSD, statistics = run(self.ffn, normed_BSD, *bank, num_groups, open_M, self.ffn_post_norm)
        return x_BSD + output_BSD, statistics, gates


def first_std(settings: Settings, name: str) -> float:
    """init_std, or init_std / sqrt(2 L) for what writes to the residual stream; `tiny`: sqrt(1 / (2 D L)) but for the
    embedding and for routers."""
    std, tiny = settings.init_std, settings.init == "tiny"
    if name == "embedding.weight":
        default = 0.5 if tiny else std
        return default if settings.embedding_std is None else settings.embedding_std
    if name.endswith(("router.weight", "shared.gate.weight")):
        return std
    if tiny:
        return math.sqrt(1 / (2 * settings.hidden_size * settings.num_layers))
    last = name.endswith(("attention.out.weight", "down.weight", ".down"))
    return std / math.sqrt(2 * settings.num_layers) if last else std


def call(function: Callable[..., Any], *arguments: Any) -> Any:
    """`function(*arguments)`."""
    return function(*arguments)


def recomputed(function: Callable[..., Any], *arguments: Any) -> Any:
    """`function(*arguments)`, run again in the backward pass instead of keeping its activations."""
    return checkpoint(function, *arguments, use_reentrant=False, preserve_rng_state=False)


class Transformer(nn.Module):
    """Tokens `[B, S]` to logits `[B, S, V]` (float32), the statistics of each mixture layer, and the gates of every
    layer with Switch Attention.

    `open_LM` are the experts that each layer may choose in this step, bool; None: all that it sees.
    """

    cos: Tensor
    sin: Tensor

    def __init__(self, settings: Settings, max_length: int = 1024):
        super().__init__()
        self.settings = settings
        self.dtype = getattr(torch, settings.dtype)
        pooled = settings.router != "none"
        self.embedding = nn.Embedding(settings.vocab_size, settings.hidden_size)
        self.layers = nn.ModuleList(Layer(settings, index) for index in range(settings.num_layers))
        self.experts = nn.ModuleList(ExpertPool(settings) for _ in range(settings.num_pools if pooled else 0))
        self.norm = RMSNorm(settings.hidden_size, settings.norm_epsilon)
        self.output = Linear(settings.hidden_size, settings.vocab_size)
        cos, sin = tables(settings, max_length)
        self.register_buffer("cos", cos, persistent=False)
        self.register_buffer("sin", sin, persistent=False)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Normal weights with the standard deviations of `first_std`; gains stay what they are."""
        generator = torch.Generator().manual_seed(self.settings.seed)
        for name, parameter in self.named_parameters():
            if parameter.ndim > 1:
                nn.init.normal_(parameter, std=first_std(self.settings, name), generator=generator)

    def forward(self, tokens_BS: Tensor, open_LM: Tensor | None = None) -> tuple[Tensor, list[Statistics], list[Gates]]:
        settings = self.settings
        batch, length = tokens_BS.shape
        cos, sin, same_BSS = self.cos[:length], self.sin[:length], None
        places = torch.arange(length, device=tokens_BS.device)
        if settings.end_of_document is not None:
            places, same_BSS = document_positions(tokens_BS, settings.end_of_document)
            cos, sin = cos[places][:, None], sin[places][:, None]
        # Group statistics need full groups; evaluation may use any batch size.
        group = min(settings.switch_group_sequences, batch)
        num_groups = batch // group if settings.balance == "switch" and batch % group == 0 else 1
        banks = [pool(self.dtype) for pool in self.experts]

        x_BSD = self.embedding(tokens_BS).to(self.dtype)
        statistics, gates = [], []
        for index, layer in enumerate(self.layers):
            place = index - settings.dense_layers
            bank = banks[place // settings.layers_per_pool] if banks and place >= 0 else None
            run = recomputed if settings.recompute == "full" and torch.is_grad_enabled() else call
            open_M = None if open_LM is None or place < 0 else open_LM[place]
            x_BSD, layer_statistics, layer_gates = run(
                layer, x_BSD, cos, sin, same_BSS, places, bank, num_groups, open_M
            )
            if layer_statistics is not None:
                statistics.append(layer_statistics)
            if layer_gates is not None:
                gates.append(layer_gates)
        return self.output(self.norm(x_BSD)).float(), statistics, gates
