"""Choice of the implementation of the grouped products, and of attention, by platform."""

import re
from typing import Literal, get_args

import jax

Implementation = Literal["auto", "reference", "xla", "pallas_tpu", "pallas_gpu", "mosaic_gpu"]

# The meaning of "auto" on each platform; other platforms use "xla".
PLATFORM_IMPLEMENTATION: dict[str, Implementation] = {
    "cpu": "xla",
    "tpu": "pallas_tpu",
    "gpu": "pallas_gpu",
}

Attention = Literal["auto", "blocks", "splash", "cudnn"]

# The same for attention of whole sequences; other platforms use "blocks". Attention to a cache is not chosen.
PLATFORM_ATTENTION: dict[str, Attention] = {
    "cpu": "blocks",
    "tpu": "splash",
    "gpu": "cudnn",
}
_CUDNN_HEAD = 128
"""Channels of a head that cuDNN supports on every GPU that has its fused attention."""


def resolve(implementation: Implementation) -> Implementation:
    """`implementation`, with "auto" resolved for the default backend.

    To compile ahead of time for another platform, name its implementation instead of "auto".

    Raises:
        ValueError: not one of `Implementation`.
    """
    if implementation not in get_args(Implementation):
        allowed = ", ".join(map(repr, get_args(Implementation)))
        raise ValueError(f"kernels.implementation={implementation!r}: expected one of {allowed}")
    if implementation == "auto":
        return PLATFORM_IMPLEMENTATION.get(jax.default_backend(), "xla")
    return implementation


def resolve_attention(implementation: Attention, dtype: str, head_size: int, platform: str | None = None) -> Attention:
    """`implementation`, with "auto" resolved for a platform.

    Args:
      implementation: as configured.
      dtype: of the activations.
      head_size: channels of a head. cuDNN takes 16-bit operands and heads of a multiple of 8 channels up to 128; for
        others "auto" is "blocks".
      platform: that of the default backend if None.
    """
    if implementation != "auto":
        return implementation
    found = PLATFORM_ATTENTION.get(platform or jax.default_backend(), "blocks")
    if found == "cudnn" and (dtype != "bfloat16" or head_size % 8 or head_size > _CUDNN_HEAD):
        return "blocks"
    return found


def attention_problem(implementation: Attention) -> str | None:
    """A message if `implementation` is a library's for another platform than this one, else None."""
    platform = jax.default_backend()
    homes: dict[str, str] = {name: home for home, name in PLATFORM_ATTENTION.items() if name != "blocks"}
    if homes.get(implementation, platform) == platform:
        return None
    return f"kernels.attention={implementation}: made for {homes[implementation]}, not {platform}; set it to auto"


def platform_problem(implementation: Implementation) -> str | None:
    """A message if `implementation` would only be interpreted on this platform, or does not run on it; else None."""
    platform = jax.default_backend()
    homes = {name: home for home, name in PLATFORM_IMPLEMENTATION.items() if name.startswith("pallas")}
    homes["mosaic_gpu"] = "gpu"
    if homes.get(implementation, platform) != platform:
        return (
            f"kernels.implementation={implementation}: made for {homes[implementation]}; on {platform} these kernels "
            "are interpreted, which is only for tests; set kernels.implementation=auto"
        )
    return hopper_problem(jax.devices()[0].device_kind) if implementation == "mosaic_gpu" else None


def hopper_problem(device_kind: str) -> str | None:
    """A message if kernels made for NVIDIA's Hopper cannot be compiled for this kind of device, else None."""
    if jax.__version_info__ < (0, 11):
        return (
            f"kernels.implementation=mosaic_gpu: needs JAX 0.11, and this is {jax.__version__}; install it with "
            "Python 3.12 or newer, or set kernels.implementation=auto"
        )
    if not re.search(r"\bG?H(100|200|800|20)\b", device_kind):
        return (
            f"kernels.implementation=mosaic_gpu: made for Hopper (H100, H200), not {device_kind}; "
            "set kernels.implementation=auto"
        )
    return None


def target_device_kind() -> str:
    """`device_kind` of the devices that are traced for: those of the mesh in use, else the default device.

    To compile ahead of time for absent devices, trace under `jax.set_mesh` with a mesh of them.
    """
    device = jax.sharding.get_abstract_mesh().abstract_device
    return device.device_kind if device else jax.devices()[0].device_kind
