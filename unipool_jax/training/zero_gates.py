"""How many tokens no expert adds anything to.

NormRouter's scores can all be zero, and the published pool loss, whose scores are not normalized, falls when they are.
Such a token is counted for the expert of lowest index, so a load looks uneven where in truth nothing is routed.
"""

from __future__ import annotations

import numpy as np

WARN_ABOVE = 0.05
"""Share of tokens without a gate in a layer from which on a run says so."""


def zero_gate_warning(shares_L: np.ndarray, first: int = 0) -> str | None:
    """A sentence if a layer leaves more than `WARN_ABOVE` of its tokens without an expert.

    Args:
      shares_L: share of tokens whose gates are all zero, per layer with experts.
      first: number of the first of these layers.
    """
    worst = int(np.argmax(shares_L))
    if shares_L[worst] <= WARN_ABOVE:
        return None
    return (
        f"{shares_L[worst]:.0%} of the tokens in layer {first + worst} ({np.mean(shares_L):.0%} over all layers) have "
        "no gate above zero, so no expert computes for them; moe.score_centering=true prevents it, a lower "
        "loss.pool_coefficient or loss.pool_warmup_fraction=0.5 makes it rarer"
    )
