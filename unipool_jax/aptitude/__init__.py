"""Aptitude selection: whether a model is better taught by text or by programs, query by query."""
