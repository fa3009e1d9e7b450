"""Grouped expert kernels: arrays in, arrays out. Layer 0 of the package; imports only jax and numpy."""
