"""Which balance losses can be run, and over which micro-batches."""

from __future__ import annotations

import math
from collections.abc import Iterator

from unipool_jax.config.divisors import divisors_of, shown_divisors
from unipool_jax.config.schema import Config


def expert_bias(config: Config) -> Iterator[str]:
    """Problems of balance by biases of experts."""
    loss, router = config.loss, config.moe.router
    if loss.balance != "expert_bias":
        return
    if router not in ("sigmoid", "none"):
        yield (
            f"loss.balance=expert_bias: needs moe.router=sigmoid, not {router}; "
            "set moe.router=sigmoid, or loss.balance=switch or pool"
        )
    if not loss.expert_bias_rate:
        yield "loss.expert_bias_rate=0.0: balances nothing; set a positive rate or loss.balance=none"


def switch(config: Config) -> Iterator[str]:
    """Problems of the Switch loss and the groups of sequences that it is computed over."""
    loss, microbatch = config.loss, config.train.microbatch_size
    if loss.balance != "switch":
        return
    if not loss.switch_coefficient:
        yield "loss.switch_coefficient=0.0: balances nothing; set a positive weight or loss.balance=none"
    if microbatch % loss.switch_group_sequences:
        group, batch = loss.switch_group_sequences, config.train.batch_size
        whole = [n for n in divisors_of(batch) if n % group == 0]
        near = min(whole, key=lambda n: abs(n - microbatch), default=None)
        first = "" if near is None else f"set train.microbatch_size={near}, or, for another loss, "
        yield (
            f"loss.switch_group_sequences={group}: must divide train.microbatch_size={microbatch}, as a Switch loss "
            "is computed over that many sequences of one micro-batch; "
            f"{first}choose one of {shown_divisors(microbatch)}"
        )


def pool(config: Config) -> Iterator[str]:
    """Problems of the pool loss, and of its settings where another loss is chosen."""
    loss = config.loss
    if loss.balance == "pool" and not loss.pool_coefficient:
        yield "loss.pool_coefficient=0.0: balances nothing; set a positive weight or loss.balance=none"
    of_maps = {"pool_scores": "raw", "scope": "component", "pressure": "scope", "balance_groups": 1}
    for name, default in {"pool_statistics": "current", **of_maps, "pool_warmup_fraction": 0.0}.items():
        value = getattr(loss, name)
        if loss.balance != "pool" and value != default:
            yield f"loss.{name}={value}: needs loss.balance=pool, not {loss.balance}; set loss.{name}={default}"
        elif config.lock.ownership != "none" and name in of_maps and value != default:
            yield (
                f"loss.{name}={value}: lock.ownership={config.lock.ownership} changes which layers share experts, for "
                f"the published loss only; set loss.{name}={default}"
            )


def balance_groups(config: Config) -> Iterator[str]:
    """Problems of groups of a batch over which the pool loss counts loads."""
    groups, batch, micros = config.loss.balance_groups, config.train.batch_size, config.num_microbatches
    if config.loss.balance != "pool" or groups == 1:
        return
    shown = f"loss.balance_groups={groups}"
    # A group is several whole micro-batches, or a micro-batch several whole groups.
    fitting = [n for n in divisors_of(batch) if n % micros == 0 or micros % n == 0]
    if groups not in fitting:
        near = min(fitting, key=lambda n: abs(n - groups))
        yield (
            f"{shown}: must divide train.batch_size={batch}, and divide or be a multiple of its {micros} "
            f"micro-batches; set {near}"
        )
    elif config.loss.pool_statistics == "previous":
        yield (
            f"{shown}: loss.pool_statistics=previous takes the fractions of the previous micro-batch; "
            "set loss.pool_statistics=current, or loss.balance_groups=1"
        )
    elif config.growth.layers and groups < micros:
        yield (
            f"{shown}: with growth.layers each of the {micros} micro-batches has its own depth; "
            f"set loss.balance_groups={micros} or 1"
        )


def microbatches(config: Config) -> Iterator[str]:
    """Problems of micro-batches that a batch or a Switch loss does not divide into."""
    batch, microbatch, group = config.train.batch_size, config.train.microbatch_size, config.loss.switch_group_sequences
    if batch % microbatch:
        fitting = [n for n in divisors_of(batch) if n <= microbatch]
        whole = [n for n in fitting if config.loss.balance != "switch" or n % group == 0]
        with_group = "" if whole else f", with loss.switch_group_sequences={math.gcd(group, fitting[-1])}"
        yield (
            f"train.microbatch_size={microbatch}: must divide train.batch_size={batch}; "
            f"the largest that fits is {(whole or fitting)[-1]}{with_group}"
        )
