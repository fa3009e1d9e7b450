"""Smaller models cut out of trained ones: layers, heads, channels, neurons and experts."""
