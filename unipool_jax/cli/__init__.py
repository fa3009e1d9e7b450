"""The command line: `unipool COMMAND`, which is `python -m unipool_jax COMMAND`."""
