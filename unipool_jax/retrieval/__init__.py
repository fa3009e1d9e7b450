"""Code retrieval: documents found by the hidden states of a model, what that is worth, and how a model learns it."""
