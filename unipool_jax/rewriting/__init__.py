"""Provable sequences: trigonometric equations, the rules that prove them, and how far a model proves them."""
