"""Code retrieval: ranking documents for queries by the hidden states of a model, and what such a ranking is worth."""
