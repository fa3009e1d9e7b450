"""Devices and processes: the mesh, sharded linear algebra, and what processes agree on."""
