"""Evaluation of a checkpoint: loss on text, zero-shot tasks, generated text."""
