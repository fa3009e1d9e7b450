"""Weights to and from other code bases, and between our own architectures: `python -m unipool_jax.convert`."""
