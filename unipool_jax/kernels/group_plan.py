"""The plan of a grouped product: which rows of a sorted buffer belong to which expert.

A plan is made once per MoE layer and shared by all of that layer's grouped products, forward and backward.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp


class GroupPlan(NamedTuple):
    """Where each group lies in a buffer of R rows sorted by group. A pytree of arrays.

    Attributes:
        group_sizes: `[E]` int32, rows of each group; zero is allowed.
        offsets: `[E + 1]` int32, exclusive prefix sums: group e owns rows `offsets[e]:offsets[e + 1]`.
            Rows from `offsets[E]` on belong to no group: products leave zeros there and never read them.
    """

    group_sizes: jax.Array
    offsets: jax.Array


def make_group_plan(group_sizes_E: jax.Array, num_rows: int) -> GroupPlan:
    """Plan for groups laid one after another from row 0 of a buffer.

    Args:
        group_sizes_E: `[E]` integer array, rows of each group.
        num_rows: R, rows of the buffer. The sizes must sum to at most R. That sum is a traced value, so it
            is not checked: whatever runs past the buffer is cut off, so no product leaves the buffer.

    Raises:
        ValueError: if `group_sizes_E` is not a non-empty vector of integers, or `num_rows` is negative.

    Example:
        >>> make_group_plan(jnp.array([2, 0, 3]), num_rows=8).offsets.tolist()
        [0, 2, 2, 5]
    """
    group_sizes_E = jnp.asarray(group_sizes_E)
    if group_sizes_E.ndim != 1 or group_sizes_E.shape[0] == 0:
        raise ValueError(
            f"group_sizes_E has shape {group_sizes_E.shape}; expected [E] with at least one group"
        )
    if not jnp.issubdtype(group_sizes_E.dtype, jnp.integer):
        raise ValueError(
            f"group_sizes_E has dtype {group_sizes_E.dtype}; expected an integer dtype"
        )
    if num_rows < 0:
        raise ValueError(f"num_rows is {num_rows}; expected zero or more rows")
    ends_E = jnp.minimum(jnp.cumsum(group_sizes_E.astype(jnp.int32)), num_rows)
    offsets = jnp.concatenate([jnp.zeros_like(ends_E, shape=(1,)), ends_E])
    return GroupPlan(group_sizes=jnp.diff(offsets), offsets=offsets)


def sort_by_group(group_ids_R: jax.Array, num_groups: int) -> tuple[jax.Array, jax.Array]:
    """Stable order that brings the rows of each group together, and the groups' sizes.

    Args:
        group_ids_R: `[R]` integer group of each row. Ids of `num_groups` or more mean "no group": their rows
            come last and are counted nowhere, which is how a caller drops rows.
        num_groups: E.

    Returns:
        `order_R` int32, such that `group_ids_R[order_R]` ascends, ties in their original order; and
        `group_sizes_E` int32.

    Raises:
        ValueError: if `group_ids_R` is not an integer vector or `num_groups` is not positive.

    Example:
        >>> order, sizes = sort_by_group(jnp.array([1, 0, 1]), num_groups=2)
        >>> order.tolist(), sizes.tolist()
        ([1, 0, 2], [1, 2])
    """
    if group_ids_R.ndim != 1 or not jnp.issubdtype(group_ids_R.dtype, jnp.integer):
        raise ValueError(
            f"group_ids_R has shape {group_ids_R.shape} and dtype {group_ids_R.dtype}; "
            "expected an integer vector [R]"
        )
    if num_groups < 1:
        raise ValueError(f"num_groups is {num_groups}; expected at least 1")
    order_R = jnp.argsort(group_ids_R, stable=True).astype(jnp.int32)
    group_sizes_E = jnp.bincount(group_ids_R, length=num_groups).astype(jnp.int32)
    return order_R, group_sizes_E
