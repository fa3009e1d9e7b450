"""Model FLOPs per token and peak FLOP/s of devices, for model FLOPs utilization (MFU)."""

from __future__ import annotations

import numpy as np

from unipool_jax.config.chips import CHIPS
from unipool_jax.config.growth_schedule import at_depth, depths, grows
from unipool_jax.config.schema import Config

PEAK_BF16_FLOPS: dict[str, float] = {
    # Keys are `jax.Device.device_kind` in lower case, or a part of it; the longest match wins.
    **{chip.device_kind.lower(): chip.flops for chip in CHIPS.values()},
    "tpu v4": 275e12,
    "tpu v5e": CHIPS["v5e"].flops,
    "tpu v5p": CHIPS["v5p"].flops,
    "tpu v6e": CHIPS["v6e"].flops,
    "a100": 312e12,
    "h100": CHIPS["h100"].flops,
    "h100 pcie": 756e12,
    "h200": 989e12,
    "b200": CHIPS["b200"].flops,
}
"""Dense bfloat16 FLOP/s of one JAX device, from vendors' data sheets."""


def flops_per_token(config: Config) -> float:
    """Training FLOPs per token: forward and backward, without recomputation.

    6 FLOPs per weight of every matrix product (2 forward, 4 backward), counting `top_k` experts per layer and those
    that are always on, plus `6 L D S` for attention: half of the usual `12 L D S`, because the causal mask keeps half
    of the scores. A layer with a window w keeps `w - w^2 / (2 S)` of them per token instead of `S / 2`. The embedding
    lookup is free. Recomputation is not model work, so remat lowers the MFU.
    """
    model = config.model
    width, head = model.hidden_size, config.head_size
    attention = 2 * width * model.num_heads * head + 2 * width * model.num_kv_heads * head
    experts_visited = 1 if config.moe.router == "none" else config.moe.top_k
    widths = config.widths or (config.router_width,) * config.mixture_layers
    routers = 0 if config.moe.router == "none" else width * sum(widths)
    gates = width if config.moe.shared_expert_gate else 0
    per_mixture = 3 * width * (experts_visited * model.ffn_size + config.shared_width) + gates
    blocks = config.mixture_layers * per_mixture + config.moe.dense_layers * 3 * width * config.dense_width
    weights = model.num_layers * attention + blocks + routers + width * model.vocab_size
    length, window = config.data.sequence_length, config.attention.window
    seen = sum(length if sees_all else 2 * window - window**2 / length for sees_all in config.sees_all)
    scores = seen * model.num_heads * head
    return 6.0 * weights + 6.0 * scores


def flops_spent(config: Config, steps: int, first: int = 0) -> float:
    """Training FLOPs of the model in the updates after `first` to `steps` - 1 steps, whether or not they were applied.

    In a run that grows those of the depths that its micro-batches drew, exactly: depths are a function of the step.
    """
    if not grows(config):
        return flops_per_token(config) * config.tokens_per_step * (steps - first)
    per_micro = config.train.microbatch_size * config.data.sequence_length
    times = np.bincount(depths(config, first, steps - first).reshape(-1), minlength=1)
    return sum(float(n) * per_micro * flops_per_token(at_depth(config, depth)) for depth, n in enumerate(times) if n)


def share_spent(config: Config, steps: int, first: int = 0) -> float:
    """`flops_spent` over what a model that has all layers from the start spends in as many steps."""
    return flops_spent(config, steps, first) / (flops_per_token(config) * config.tokens_per_step * (steps - first))


def peak_flops(device_kind: str) -> float | None:
    """Peak dense bfloat16 FLOP/s of one device; None for unknown devices, such as CPUs.

    Args:
      device_kind: `jax.devices()[0].device_kind`, for example `TPU v5 lite` or `NVIDIA H100 80GB HBM3`.
    """
    kind = device_kind.lower()
    matches = [name for name in PEAK_BF16_FLOPS if all(part in kind.split() or name in kind for part in name.split())]
    return PEAK_BF16_FLOPS[max(matches, key=len)] if matches else None


def utilization(config: Config, tokens_per_second: float | None, device_kind: str, devices: int) -> float | None:
    """Model FLOPs utilization (MFU) of all `devices` together; None without a speed, or a peak of such devices."""
    peak = peak_flops(device_kind)
    if tokens_per_second is None or peak is None:
        return None
    return flops_per_token(config) * tokens_per_second / (peak * devices)
