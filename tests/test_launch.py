"""The launch recipes: the Slurm script starts real processes, the GKE manifest and the image match the project."""

from __future__ import annotations

import configparser
import math
import os
import random
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import yaml

from runner import overrides
from unipool_jax.config.chips import parse_topology
from unipool_jax.config.compose import compose_config

ROOT = Path(__file__).parents[1]

SRUN = """#!{python}
# What Slurm's own does on one node: the variables of a step, and a bad exit ends all tasks.
import os, subprocess, sys
command = [argument for argument in sys.argv[1:] if not argument.startswith("--")]
assert "--kill-on-bad-exit=1" in sys.argv[1:]
step = {{"SLURM_STEP_NODELIST": "localhost", "SLURM_NTASKS": "2", "SLURM_STEP_NUM_TASKS": "2"}}
tasks = [
    subprocess.Popen(command, env=os.environ | step | {{"SLURM_PROCID": str(i), "SLURM_LOCALID": str(i)}})
    for i in range(2)
]
sys.exit(max(task.wait() for task in tasks))
"""


def test_the_slurm_script_trains_in_two_processes(tmp_path: Path) -> None:
    programs = tmp_path / ".venv" / "bin"
    programs.mkdir(parents=True)
    (programs / "srun").write_text(SRUN.format(python=sys.executable))
    (programs / "python").write_text(f'#!/bin/bash\nexec {sys.executable} "$@"\n')
    (programs / "activate").write_text(f'PATH="{programs}:$PATH"\n')
    for program in ("srun", "python"):
        (programs / program).chmod(0o755)
    for name in ("train.py", "configs"):
        (tmp_path / name).symlink_to(ROOT / name)
    environment = os.environ | {
        "SLURM_SUBMIT_DIR": str(tmp_path),
        "SLURM_JOB_ID": str(random.randrange(1_000_000)),  # JAX makes a port of it
        "XLA_FLAGS": os.environ["CPU_XLA_FLAGS"].replace("_device_count=8", "_device_count=1"),
        "PYTHONPATH": str(ROOT),
    }
    settings = overrides(tmp_path, "mesh.data=2", "train.steps=2", "distributed.timeout_seconds=20")
    script = ["bash", str(ROOT / "launch" / "slurm.sbatch"), *settings]
    ended = subprocess.run(script, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    assert "mesh data 2 x fsdp 1 x expert 1 x tensor 1, 2 process(es)" in ended.stdout
    assert (tmp_path / "runs" / "tiny" / "summary.json").exists()


def job() -> dict[str, Any]:
    manifest = yaml.safe_load((ROOT / "launch" / "gke_tpu.yaml").read_text())
    assert manifest["kind"] == "JobSet"
    return manifest["spec"]["replicatedJobs"][0]["template"]["spec"]


def test_the_gke_job_has_the_hosts_and_chips_of_its_preset() -> None:
    pod = job()["template"]["spec"]
    container = pod["containers"][0]
    config = compose_config([*container["args"], "mode=plan"])
    assert config.mesh.topology is not None
    chips = math.prod(int(size) for size in pod["nodeSelector"]["cloud.google.com/gke-tpu-topology"].split("x"))
    assert chips == parse_topology(config.mesh.topology).num_devices
    per_host = container["resources"]["limits"]["google.com/tpu"]
    assert job()["parallelism"] == job()["completions"] == chips // per_host
    mounts = {mount["name"]: mount["mountPath"] for mount in container["volumeMounts"]}
    assert set(mounts) == {volume["name"] for volume in pod["volumes"]}
    assert config.run.dir.startswith(mounts["data"])
    assert all(store.startswith(mounts["data"]) for store in config.data.stores)


def test_the_image_runs_the_same_program() -> None:
    text = (ROOT / "Dockerfile").read_text()
    assert 'ENTRYPOINT ["python", "train.py"]' in text
    assert job()["template"]["spec"]["containers"][0]["command"] == ["python", "train.py"]
    for name in re.findall(r"^COPY (\S+) ", text, re.MULTILINE):
        assert (ROOT / name).exists(), name


def test_recipes_name_an_environment_with_the_plugin() -> None:
    """Which is one of the extras of JAX that setup.cfg, the Makefile and the image offer."""
    assert "make venv ACCELERATOR=cuda12" in (ROOT / "launch" / "slurm.sbatch").read_text()
    manifest, image = (
        (ROOT / "launch" / "gke_tpu.yaml").read_text(),
        job()["template"]["spec"]["containers"][0]["image"],
    )
    assert f"docker build --build-arg JAX_EXTRA=tpu -t {image} ." in manifest
    assert '"jax[$JAX_EXTRA]==' in (ROOT / "Dockerfile").read_text()
    setup = configparser.ConfigParser()
    setup.read(ROOT / "setup.cfg")
    for plugin in ("cuda12", "cuda13", "tpu"):
        assert setup["options.extras_require"][plugin].strip() == f"jax[{plugin}]"


def test_make_adds_the_plugin_of_an_accelerator(tmp_path: Path) -> None:
    def dry(accelerator: str) -> subprocess.CompletedProcess[str]:
        words = ["make", "--dry-run", "venv", f"VENV={tmp_path}", f"ACCELERATOR={accelerator}"]
        return subprocess.run(words, cwd=ROOT, capture_output=True, text=True, check=False)

    assert '"jax[tpu]==' in dry("tpu").stdout
    assert "jax[" not in dry("").stdout
    wrong = dry("cuda")
    assert wrong.returncode
    assert "ACCELERATOR=cuda: there are cuda12 cuda13 tpu" in wrong.stderr
