# docker build --build-arg JAX_EXTRA=tpu -t unipool_jax:tpu .      (or cuda12, cuda13; without it, for CPU)
# Python 3.12 and newer get the newest JAX of the lock.
FROM python:3.13-slim
ARG JAX_EXTRA=
WORKDIR /unipool
COPY requirements.lock .
RUN python -m pip install --no-cache-dir --require-hashes --requirement requirements.lock
# The accelerator's plugin, in the version that belongs to the locked JAX.
RUN if [ -n "$JAX_EXTRA" ]; then \
      python -m pip install --no-cache-dir "jax[$JAX_EXTRA]==$(python -c 'import jax; print(jax.__version__)')"; \
    fi
COPY . .
# exec form: signals reach Python, which saves before it leaves.
ENTRYPOINT ["python", "train.py"]
