"""The collectives of a bank that only one layer uses, beside the attention of that layer.

A per-layer mixture over fsdp gathers the experts of every layer and scatters their gradients, in every layer. A mixture
has little to hide them behind: what it computes needs the experts, or makes the gradients. So its layer gathers the
experts while it attends, and in the backward pass attends while it scatters. Unlike gathering a layer ahead, that needs
no memory. Where collectives are synchronous, as on TPUs without `mesh.sparse_core_collectives`, it changes nothing but
their place.

The compiler starts a collective as late as it may, and the SparseCores run one at a time. So `layer` in
`model.transformer` calls one function before attention and one behind it, each of which ends the time that a
collective has.
"""

from __future__ import annotations

import jax

from unipool_jax.kernels.grouped_ffn import Bank
from unipool_jax.moe.bank import Experts, gathered_bank, gradient_accumulator
from unipool_jax.moe.overlap import awaited, tied


def before_attention(normed_BSD: jax.Array, bank: Bank) -> tuple[jax.Array, Bank]:
    """The input of attention and the parameters of the layer's bank, unchanged.

    The backward pass of attention ends only when the gradients of up and down, which are there last, are scattered.
    """
    normed_BSD, (up_EDF, down_EFD) = tied(normed_BSD, (bank.up_EDF, bank.down_EFD))
    return normed_BSD, bank._replace(up_EDF=up_EDF, down_EFD=down_EFD)


def behind_attention(attended_BSD: jax.Array, bank: Bank, dtype: jax.typing.DTypeLike) -> tuple[jax.Array, Experts]:
    """The output of attention, unchanged, and the experts of the bank, gathered by then, in `dtype`.

    The backward pass of attention begins only when the gradient of gate, which is there first, is scattered.
    """
    attended_BSD, gate_EDF = tied(attended_BSD, bank.gate_EDF)
    bank = bank._replace(gate_EDF=gate_EDF)
    attended_BSD, weights = awaited(attended_BSD, gathered_bank(bank, dtype))
    return attended_BSD, Experts(weights, gradient_accumulator(bank))
