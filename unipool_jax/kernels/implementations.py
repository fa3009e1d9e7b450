"""Which implementation of the grouped products runs: the one table of platforms and names."""

from typing import Literal, get_args

import jax

Implementation = Literal["auto", "reference", "xla", "pallas_tpu", "pallas_gpu"]

# What "auto" means on each platform; a platform not named here uses "xla".
PLATFORM_IMPLEMENTATION: dict[str, Implementation] = {
    "cpu": "xla",
    "tpu": "pallas_tpu",
    "gpu": "pallas_gpu",
}


def resolve(implementation: Implementation) -> Implementation:
    """The implementation that `implementation` stands for on the default backend.

    Code compiled ahead of time for another platform should name its implementation instead of "auto".

    Raises:
        ValueError: if it is not one of `Implementation`.
    """
    if implementation not in get_args(Implementation):
        allowed = ", ".join(map(repr, get_args(Implementation)))
        raise ValueError(f"kernels.implementation is {implementation!r}; expected one of {allowed}")
    if implementation == "auto":
        return PLATFORM_IMPLEMENTATION.get(jax.default_backend(), "xla")
    return implementation


def platform_problem(implementation: Implementation) -> str | None:
    """Why a model should not be run with `implementation` on this machine, if that is so."""
    platform = jax.default_backend()
    homes = {name: home for home, name in PLATFORM_IMPLEMENTATION.items() if name.startswith("pallas")}
    if homes.get(implementation, platform) == platform:
        return None
    return (
        f"kernels.implementation={implementation}: made for {homes[implementation]}; on {platform} these kernels are "
        "only interpreted, for tests; use kernels.implementation=auto"
    )


def target_device_kind() -> str:
    """The kind of device that is traced for: that of the mesh in use, else the default device's.

    Compiling ahead of time for a device that is not there, trace under `jax.set_mesh` with a mesh of such devices.
    """
    device = jax.sharding.get_abstract_mesh().abstract_device
    return device.device_kind if device else jax.devices()[0].device_kind
