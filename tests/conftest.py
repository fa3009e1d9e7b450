"""Settings of every test process; they must be in the environment before jax starts."""

from __future__ import annotations

import importlib.metadata
import os
import tempfile

from packaging.version import Version

os.environ["JAX_PLATFORMS"] = "cpu"
# The TPU's compiler works without a TPU: look for none, and let several processes compile at once.
os.environ.update(TPU_SKIP_MDS_QUERY="1", ALLOW_MULTIPLE_LIBTPU_LOAD="1")
# Tests compile many tiny programs and run each a few times: compiling fast matters, running fast does not.
_FLAGS = "--xla_backend_optimization_level=0 --xla_force_host_platform_device_count=8"
os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {_FLAGS}".strip()
# The older emitters halve the time of compiling; XLA removed them, and the flag, between jaxlib 0.11.0 and 0.11.1. The
# compiler for TPUs reads the same variable. Both end a process for a flag that they do not know, so this one is set
# where jaxlib knows it and is gone once JAX has read it.
_KEPT = os.environ["XLA_FLAGS"]
if Version(importlib.metadata.version("jaxlib")) < Version("0.11.1"):
    os.environ["XLA_FLAGS"] += " --xla_cpu_use_fusion_emitters=false"
import jax  # noqa: E402 - the environment comes first

jax.devices()
os.environ["XLA_FLAGS"] = _KEPT
# Tasks of lm-eval read their documents through a cache; no network, and nothing left in the home folder.
_CACHE = tempfile.TemporaryDirectory()
os.environ.update(HF_HUB_OFFLINE="1", HF_DATASETS_CACHE=_CACHE.name)
