"""Grouped matrix products of experts: functions of arrays. Imports only JAX and NumPy."""
