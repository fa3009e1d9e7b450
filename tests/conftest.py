"""Settings of every test process; they must be in the environment before jax starts."""

from __future__ import annotations

import os

os.environ["JAX_PLATFORMS"] = "cpu"
# Tests compile many tiny programs and run each a few times: compiling fast matters, running fast does not.
os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_backend_optimization_level=0".strip()
