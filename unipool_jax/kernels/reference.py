"""The reference implementation, one masked dense product per expert: the oracle of every test.

Slow (E times the FLOPs), float32 throughout, differentiated by autodiff. Rows are masked with `where` before a product
as well as after, so that NaNs in other groups' rows, or in rows of no group, reach neither values nor gradients.
"""

import jax
import jax.numpy as jnp
from jax import lax

from unipool_jax.kernels.group_plan import GroupPlan


def grouped_matmul(rows_RK: jax.Array, bank_EKN: jax.Array, plan: GroupPlan) -> jax.Array:
    """`out[r] = rows[r] @ bank[group of r]`, zero for rows of no group. `[R, K]`, `[E, K, N]` -> `[R, N]`."""
    index_R1 = jnp.arange(rows_RK.shape[0])[:, None]

    def add_expert(out_RN: jax.Array, expert: tuple[jax.Array, jax.Array, jax.Array]) -> tuple[jax.Array, None]:
        weight_KN, start, end = expert
        in_group_R1 = (start <= index_R1) & (index_R1 < end)
        group_rows_RK = jnp.where(in_group_R1, rows_RK, 0).astype(jnp.float32)
        product_RN = jnp.matmul(group_rows_RK, weight_KN, precision=lax.Precision.HIGHEST)
        return out_RN + jnp.where(in_group_R1, product_RN, 0), None

    # zeros_like, not zeros: inside shard_map the carry must vary over the same mesh axes as the rows.
    out_RN = jnp.zeros_like(rows_RK, jnp.float32, shape=(rows_RK.shape[0], bank_EKN.shape[2]))
    experts = (bank_EKN.astype(jnp.float32), plan.offsets[:-1], plan.offsets[1:])
    return lax.scan(add_expert, out_RN, experts)[0].astype(rows_RK.dtype)


def grouped_ffn(
    rows_RD: jax.Array,
    gate_EDF: jax.Array,
    up_EDF: jax.Array,
    down_EFD: jax.Array,
    plan: GroupPlan,
) -> jax.Array:
    """`(silu(x Wg) * (x Wu)) Wd` with each row's own expert, zero for rows of no group. `[R, D]` -> `[R, D]`."""
    rows_f32 = rows_RD.astype(jnp.float32)
    gate_RF = grouped_matmul(rows_f32, gate_EDF, plan)
    up_RF = grouped_matmul(rows_f32, up_EDF, plan)
    return grouped_matmul(jax.nn.silu(gate_RF) * up_RF, down_EFD, plan).astype(rows_RD.dtype)
