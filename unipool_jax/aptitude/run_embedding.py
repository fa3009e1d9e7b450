"""Embeddings of questions by the hidden states of a run."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from unipool_jax.aptitude.likelihood import model_fingerprint
from unipool_jax.evaluation.requests import EvalRequest
from unipool_jax.evaluation.tasks_command import open_model
from unipool_jax.retrieval.embedding import embed, hidden_states


def embed_questions(run: str, step: int | None, questions: Sequence[str]) -> tuple[np.ndarray, str]:
    """Hidden states after the final norm, mean over the tokens of each question, and what they are called in a file.

    A question that is longer than the model reads loses its end; how many did is printed.

    Args:
      run: folder of the run.
      step: which checkpoint; None is the newest.
      questions: N of them.

    Returns:
      float64 `[N, D]`, and a name with the fingerprint of the weights.

    Raises:
      UserError: no such run.
    """
    model, title = open_model(EvalRequest(run, step=step))
    found = embed(model, hidden_states(model, None), questions, "mean")
    print(title)
    if found.cut:
        print(f"{found.cut:,} questions are longer than the model reads; their ends were not seen")
    return found.vectors_ND.astype(np.float64), f"mean hidden state of {model_fingerprint(model)}"
