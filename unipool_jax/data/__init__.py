"""Data: text files -> token store -> batches. Imports nothing of the model."""
