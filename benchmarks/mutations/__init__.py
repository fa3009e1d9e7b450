"""Mutation study: which faults, put into the code on purpose, do the tests notice? Results: `docs/testing.md`."""
