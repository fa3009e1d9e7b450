"""FLOPs and memory traffic of each hand-written kernel, in one call on one device."""

from __future__ import annotations

from typing import NamedTuple

from unipool_jax.planner.attention import WIDE, AttentionCost


class KernelWork(NamedTuple):
    """One call, or the calls of one kind in a layer."""

    flops: float
    """Without padding."""
    bytes: float
    """Traffic to and from high-bandwidth memory."""


class ExpertShapes(NamedTuple):
    """What the products of the experts of a layer work on."""

    rows: float
    """Rows that are read."""
    written: float
    """Rows that are written: those of no expert too, as zeros."""
    inner: float
    """The same in arrays that only kernels of the experts read. On TPUs those have nothing for rows of no expert."""
    width: int
    hidden: float
    matrix: float
    """Weights moved for a product with one of the three matrices, each as often as it is moved."""
    sums: float
    """The same of weights of one whose gradient is read and written."""
    narrow: int
    """Bytes of an activation, and of a weight in a product."""


def expert_forward(shapes: ExpertShapes) -> dict[str, KernelWork]:
    """The kernels of a forward pass, by name: gate, up and their product in one, then down."""
    return {
        "expert_ffn_in": _row_pass(shapes, 2, shapes.width, shapes.inner * 3 * shapes.hidden),
        "grouped_matmul": _row_pass(shapes, 1, shapes.hidden, shapes.written * shapes.width),
    }


def expert_backward(shapes: ExpertShapes) -> dict[str, KernelWork]:
    """The kernels of a backward pass, by name; one call of the last, of which there are three."""
    rows, width, hidden, narrow = shapes.rows, shapes.width, shapes.hidden, shapes.narrow
    return {
        # Beside the gradient of the output it reads the gate and up products.
        "expert_ffn_gate_gradient": _row_pass(shapes, 1, width + 2 * hidden, shapes.inner * 3 * hidden),
        "expert_ffn_rows_gradient": _row_pass(shapes, 2, 2 * hidden, shapes.written * width),
        # The running gradient is read and written in float32.
        "grouped_bank_gradient": KernelWork(
            2 * rows * width * hidden, narrow * rows * (width + hidden) + 2 * WIDE * shapes.sums
        ),
    }


BANK_GRADIENTS = 3
"""Calls of `grouped_bank_gradient` in a backward pass."""


def _row_pass(shapes: ExpertShapes, matrices: int, read: float, written: float) -> KernelWork:
    """Rows times so many matrices; `read` is numbers a row, `written` of all rows."""
    flops = matrices * 2 * shapes.rows * shapes.width * shapes.hidden
    moved = matrices * shapes.matrix + shapes.rows * read + written
    return KernelWork(flops, shapes.narrow * moved)


def attention_kernels(one: AttentionCost, two: AttentionCost, repeated: int) -> dict[str, KernelWork]:
    """The kernels of a layer's attention by the beginning of their names.

    Args:
      one: the cost with one forward pass.
      two: with two.
      repeated: forward passes within `one` beyond the first.
    """
    forward = KernelWork(two.flops - one.flops, two.bytes - one.bytes)
    flops, moved = (one[field] - (1 + repeated) * forward[field] for field in (0, 1))
    return {
        "splash_mha_fwd": forward,
        # Four products for keys and values, three for queries.
        "splash_mha_dkv": KernelWork(flops * 4 / 7, moved / 2),
        "splash_mha_dq": KernelWork(flops * 3 / 7, moved / 2),
        "fmhaSoftmaxBackward": KernelWork(flops, moved),
        "fmhaSoftmax": forward,
    }
