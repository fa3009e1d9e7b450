"""Choice of the implementation of the grouped products, by platform."""

from typing import Literal, get_args

import jax

Implementation = Literal["auto", "reference", "xla", "pallas_tpu", "pallas_gpu"]

# The meaning of "auto" on each platform; other platforms use "xla".
PLATFORM_IMPLEMENTATION: dict[str, Implementation] = {
    "cpu": "xla",
    "tpu": "pallas_tpu",
    "gpu": "pallas_gpu",
}


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


def platform_problem(implementation: Implementation) -> str | None:
    """A message if `implementation` would only be interpreted on this platform, else None."""
    platform = jax.default_backend()
    homes = {name: home for home, name in PLATFORM_IMPLEMENTATION.items() if name.startswith("pallas")}
    if homes.get(implementation, platform) == platform:
        return None
    return (
        f"kernels.implementation={implementation}: made for {homes[implementation]}; on {platform} these kernels are "
        "interpreted, which is only for tests; set kernels.implementation=auto"
    )


def target_device_kind() -> str:
    """`device_kind` of the devices that are traced for: those of the mesh in use, else the default device.

    To compile ahead of time for absent devices, trace under `jax.set_mesh` with a mesh of them.
    """
    device = jax.sharding.get_abstract_mesh().abstract_device
    return device.device_kind if device else jax.devices()[0].device_kind
