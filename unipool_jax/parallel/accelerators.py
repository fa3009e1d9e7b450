"""Accelerators that are in this machine although JAX computes on its CPU, and what to do about it."""

from __future__ import annotations

import functools
import importlib.metadata
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import jax

from unipool_jax.config.schema import ConfigError

_GOOGLE = "0x1ae0"
_TPU_CHIPS = {"0x0027", "0x0056", "0x005e", "0x0062", "0x0063", "0x006f", "0x0076"}
"""PCI devices of Google that are TPUs (v2 to TPU7x); others are network cards and disks of its virtual machines."""
_TPU_VARIABLES = ("TPU_WORKER_ID", "TPU_WORKER_HOSTNAMES", "TPU_ACCELERATOR_TYPE")


class Accelerator(NamedTuple):
    """A kind of accelerator that is there."""

    name: str
    sign: str
    """What shows that it is there."""
    extra: str
    """Of the package jax, which installs the plugin."""
    plugins: tuple[str, ...]
    """Packages, one of which JAX needs to use it."""
    advice: str = ""
    """What else may be in the way."""


def _first(root: Path, *patterns: str) -> str | None:
    """The first path below `root` that matches one of the patterns."""
    return next((f"/{path.relative_to(root)}" for pattern in patterns for path in sorted(root.glob(pattern))), None)


def _read(path: Path) -> str:
    try:
        return path.read_text().strip()
    except OSError:
        return ""


def _nvidia(root: Path, environment: Mapping[str, str]) -> Accelerator | None:
    if environment.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0] in ("", "-1"):
        return None
    plugins, name = ("jax-cuda12-plugin", "jax-cuda13-plugin"), "an NVIDIA GPU"
    sign = _first(root, "dev/nvidia[0-9]*")
    if sign is None and _first(root, "usr/lib/wsl/lib/libcuda.so*"):
        sign = _first(root, "dev/dxg")
    if sign is not None:
        return Accelerator(name, sign, "cuda12", plugins)
    if (sign := _first(root, "proc/driver/nvidia/gpus/*")) is not None:
        advice = "This process cannot open it, perhaps in a container: docker run --gpus all."
        return Accelerator(name, sign, "cuda12", plugins, advice)
    return None


def _tpu(root: Path, environment: Mapping[str, str]) -> Accelerator | None:
    sign = _first(root, "dev/accel[0-9]*")
    for vendor in sorted(root.glob("sys/bus/pci/devices/*/vendor")):
        if sign is None and _read(vendor) == _GOOGLE and _read(vendor.with_name("device")) in _TPU_CHIPS:
            sign = f"PCI device {vendor.parent.name}"
    named = [name for name in _TPU_VARIABLES if environment.get(name)]
    if sign is None and named:
        sign = f"the environment sets {named[0]}"
    return None if sign is None else Accelerator("a TPU", sign, "tpu", ("libtpu",))


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def idle_accelerator(
    backend: str, asked: str | None, root: Path = Path("/"), environment: Mapping[str, str] = os.environ
) -> str | None:
    """What to do about an accelerator of this machine that JAX does not use; None where there is none.

    Args:
      backend: that JAX uses.
      asked: `jax_platforms`, the choice of the user; for the CPU, nothing is said.
      root: of the file system.
      environment: of this process.
    """
    if backend != "cpu" or (asked or "").split(",")[0] == "cpu":
        return None
    found = _nvidia(root, environment) or _tpu(root, environment)
    if found is None:
        return None
    return (
        f"warning: this machine has {found.name} ({found.sign}), but JAX computes on the CPU: {_why(found)}\n"
        "JAX_PLATFORMS=cpu computes on the CPU without this warning."
    )


def _install(extra: str) -> str:
    return f'{sys.executable} -m pip install "jax[{extra}]=={jax.__version__}"'


def _why(found: Accelerator) -> str:
    """Why JAX does not use an accelerator, and the command that helps."""
    install = _install(found.extra)
    advice = f"\n{found.advice}" if found.advice else ""
    versions = {plugin: version for plugin in found.plugins if (version := _version(plugin))}
    if not versions:
        return f"{found.plugins[0]} is not installed.\n    {install}{advice}"
    plugin, version = next(iter(versions.items()))
    if found.extra.startswith("cuda") and version != jax.__version__:
        return f"{plugin} {version} is not that of JAX {jax.__version__}.\n    {install}{advice}"
    platform = "tpu" if found.extra == "tpu" else "cuda"
    trial = f"JAX_PLATFORMS={platform} {sys.executable} -c 'import jax; jax.devices()'"
    return f"{plugin} {version} is installed, but does not start; this says why:\n    {trial}{advice}"


@functools.cache
def warn_of_idle_accelerator() -> None:
    """Say once if JAX does not use an accelerator of this machine. Starts JAX's devices."""
    if warning := idle_accelerator(jax.default_backend(), jax.config.values["jax_platforms"]):
        print(warning, file=sys.stderr)


def check_platforms() -> None:
    """Start JAX's devices.

    Raises:
      ConfigError: JAX_PLATFORMS asks for what cannot be used.
    """
    try:
        jax.devices()
    except (RuntimeError, AssertionError) as error:  # the second one for cuda without its plugin
        asked = jax.config.values["jax_platforms"]
        reason = (str(error).strip() or "no such device or no plugin for it").splitlines()[0]
        extra = "tpu" if "tpu" in (asked or "") else "cuda12"
        raise ConfigError(
            [f"JAX_PLATFORMS={asked}: {reason}; {_install(extra)}, or set it to cpu"], "the environment"
        ) from error
