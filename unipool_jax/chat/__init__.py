"""Talking to a fine-tuned model, and how many questions it answers exactly."""
