"""Converts weights to and from other code bases, and between our own architectures."""
