"""Mixture-of-Experts language models that share one pool of experts across depth, in JAX and Flax."""
