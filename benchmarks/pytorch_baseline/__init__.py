"""The PyTorch twin: dense, per-layer mixture and UniPool models, written from the paper and not from `unipool_jax`.

It is what this code base is compared with, in numbers and in speed, so it imports nothing of it. Weights go back and
forth through safetensors files: `unipool convert`.
"""
