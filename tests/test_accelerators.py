"""An accelerator that JAX does not use is named, with the command that installs its plugin; in trees of files."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import jax
import pytest

from unipool_jax.parallel.accelerators import idle_accelerator

PCI = "sys/bus/pci/devices/0000:00:05.0"


def tree(root: Path, files: Mapping[str, str]) -> Path:
    for name, content in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(content)
    return root


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """Plugins by their version."""
    versions: dict[str, str] = {}
    monkeypatch.setattr("unipool_jax.parallel.accelerators._version", versions.get)
    return versions


@pytest.mark.parametrize(
    ("files", "environment", "sign", "extra"),
    [
        ({"dev/nvidiactl": "", "dev/nvidia0": "", "dev/nvidia1": ""}, {}, "an NVIDIA GPU (/dev/nvidia0)", "cuda12"),
        ({"dev/nvidia3": ""}, {"CUDA_VISIBLE_DEVICES": "0"}, "/dev/nvidia3", "cuda12"),
        ({"proc/driver/nvidia/gpus/0000:01:00.0/information": ""}, {}, "docker run --gpus all", "cuda12"),
        ({"dev/dxg": "", "usr/lib/wsl/lib/libcuda.so.1": ""}, {}, "/dev/dxg", "cuda12"),
        ({"dev/accel0": ""}, {}, "a TPU (/dev/accel0)", "tpu"),
        ({"dev/vfio/0": "", f"{PCI}/vendor": "0x1ae0\n", f"{PCI}/device": "0x0063\n"}, {}, "a TPU (PCI device", "tpu"),
        ({}, {"TPU_WORKER_HOSTNAMES": "a,b"}, "a TPU (the environment sets TPU_WORKER_HOSTNAMES)", "tpu"),
    ],
)
def test_an_accelerator_without_its_plugin(
    tmp_path: Path,
    installed: dict[str, str],
    files: Mapping[str, str],
    environment: Mapping[str, str],
    sign: str,
    extra: str,
) -> None:
    del installed
    said = idle_accelerator("cpu", None, tree(tmp_path, files), environment)
    assert said is not None
    assert sign in said
    assert f'{sys.executable} -m pip install "jax[{extra}]=={jax.__version__}"' in said


@pytest.mark.parametrize(
    ("files", "environment"),
    [
        ({"dev/null": ""}, {}),
        ({"dev/nvidia0": ""}, {"CUDA_VISIBLE_DEVICES": ""}),
        ({"dev/nvidia0": ""}, {"CUDA_VISIBLE_DEVICES": "-1"}),
        ({"dev/nvidiactl": "", "dev/nvidia-uvm": ""}, {}),
        # A network card of a virtual machine at Google, and an accelerator of another maker.
        ({f"{PCI}/vendor": "0x1ae0\n", f"{PCI}/device": "0x0042\n"}, {}),
        ({f"{PCI}/vendor": "0x1234\n", f"{PCI}/device": "0x0063\n", "dev/accel/accel0": "", "dev/vfio/0": ""}, {}),
        ({"dev/dxg": ""}, {}),
    ],
)
def test_nothing_to_say(tmp_path: Path, files: Mapping[str, str], environment: Mapping[str, str]) -> None:
    assert idle_accelerator("cpu", None, tree(tmp_path, files), environment) is None


def test_what_the_user_asked_for_and_what_is_used_is_no_surprise(tmp_path: Path) -> None:
    root = tree(tmp_path, {"dev/nvidia0": ""})
    assert idle_accelerator("cpu", "cpu", root, {}) is None
    assert idle_accelerator("gpu", None, root, {}) is None
    assert idle_accelerator("cpu", "cuda,cpu", root, {}) is not None


def test_a_plugin_that_does_not_work(tmp_path: Path, installed: dict[str, str]) -> None:
    root = tree(tmp_path, {"dev/nvidia0": ""})
    installed["jax-cuda13-plugin"] = "0.0.1"
    assert f"jax-cuda13-plugin 0.0.1 is not that of JAX {jax.__version__}" in str(idle_accelerator("cpu", "", root, {}))
    installed["jax-cuda13-plugin"] = jax.__version__
    said = str(idle_accelerator("cpu", "", root, {}))
    assert "does not start; this says why:\n    JAX_PLATFORMS=cuda " in said
    assert "pip install" not in said


def test_a_platform_that_cannot_be_used_is_named() -> None:
    program = "import sys; from unipool_jax.cli.main import main; sys.exit(main(sys.argv[1:]))"
    ended = subprocess.run(
        [sys.executable, "-c", program, "train"],
        env=os.environ | {"JAX_PLATFORMS": "cuda"},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert ended.returncode == 2
    assert "JAX_PLATFORMS=cuda: " in ended.stderr
    assert "pip install" in ended.stderr
    assert "Traceback" not in ended.stderr
