"""Time of the grouped product and the expert FFN, relative to one dense product of equal FLOPs.

    python -m benchmarks.grouped_matmul --rows 4096 --experts 96 --in 256 --out 1024

All variants of a table run in turn within one process, so a slow moment of the machine meets them alike; the
ratio is the median over the rounds of (variant / dense in the same round). Group sizes are one draw of even
random routing, or of uneven routing with `--skew`. The row "fresh bank" only writes zeros of the bank's size: the
price of a new gradient array, which the dense product does not pay. On Linux most of it is page faults, and
`GLIBC_TUNABLES=glibc.malloc.hugetlb=1` in the environment removes most of those.

The last tables are what training does: the FFN in a scan over layers that share one bank, so buffers are used again,
with `accumulating_ffn` adding to one gradient or with the gradient that plain autodiff makes and adds for every layer.
"""

import argparse
import os
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from numpy.typing import NDArray

from unipool_jax.kernels.group_plan import GroupPlan, make_group_plan
from unipool_jax.kernels.grouped_ffn import Bank, accumulating_ffn, grouped_ffn
from unipool_jax.kernels.grouped_matmul import grouped_matmul

Case = Callable[[], Any]


def group_sizes(rows: int, experts: int, skew: float, seed: int = 0) -> NDArray[np.int32]:
    """Rows per expert when each row picks one at random, expert popularities being log-normal with width `skew`."""
    rng = np.random.default_rng(seed)
    popularity = np.exp(skew * rng.standard_normal(experts))
    return rng.multinomial(rows, popularity / popularity.sum()).astype(np.int32)


def measure(
    cases: Mapping[str, Case], repeats: int, slow: Sequence[str] = (), slow_repeats: int = 3
) -> dict[str, list[float]]:
    """Seconds of each case in each round, the cases taking turns; a slow one sits out after `slow_repeats` rounds."""
    seconds: dict[str, list[float]] = {name: [] for name in cases}
    for run in cases.values():
        run()
    for turn in range(repeats):
        for name, run in cases.items():
            if name in slow and turn >= slow_repeats:
                continue
            start = time.perf_counter()
            run()
            seconds[name].append(time.perf_counter() - start)
    return seconds


def report(title: str, seconds: Mapping[str, list[float]]) -> None:
    """Print one table; the first case is the dense product that the others are divided by."""
    dense, *_ = seconds.values()
    print(f"\n{title:<38}{'median ms':>10}{'ratio':>8}{'ratio of minima':>17}{'rounds':>8}")
    for name, values in seconds.items():
        ratio = np.median([value / base for value, base in zip(values, dense, strict=False)])
        minima = min(values) / min(dense)
        print(f"  {name:<36}{1e3 * np.median(values):>10.2f}{ratio:>8.2f}{minima:>17.2f}{len(values):>8}")


def compiled(function: Callable[..., jax.Array], *operands: Any) -> Case:
    """Run a forward pass to its end."""
    run = jax.jit(function)
    return lambda: jax.block_until_ready(run(*operands))


def compiled_with_gradients(function: Callable[..., jax.Array], cotangent: jax.Array, *operands: Any) -> Case:
    """Run a forward and a backward pass to their end, gradients of all operands included."""

    @jax.jit
    def run(cotangent: jax.Array, *operands: Any) -> tuple[Any, ...]:
        output, pullback = jax.vjp(function, *operands)
        return output, *pullback(cotangent)

    return lambda: jax.block_until_ready(run(cotangent, *operands))


def torch_cases(
    rows: jax.Array, bank: jax.Array, cotangent: jax.Array, sizes: NDArray[np.int32]
) -> tuple[dict[str, Case], dict[str, Case]]:
    """`torch.nn.functional.grouped_mm` and torch's own dense product; nothing where torch is not installed."""
    try:
        import torch
    except ImportError:
        return {}, {}
    if not hasattr(torch.nn.functional, "grouped_mm"):
        return {}, {}
    dtype = {"float32": torch.float32, "bfloat16": torch.bfloat16}[rows.dtype.name]
    rows_t, bank_t, cotangent_t = (
        torch.tensor(np.asarray(array, np.float32)).to(dtype) for array in (rows, bank, cotangent)
    )
    ends = torch.tensor(np.cumsum(sizes), dtype=torch.int32)
    weight_t = bank_t[0].clone()

    def gradients(function: Callable[..., Any], *operands: Any) -> Case:
        leaves = [operand.clone().requires_grad_() for operand in operands]
        return lambda: torch.autograd.grad(function(*leaves), leaves, cotangent_t)

    def grouped(rows: Any, bank: Any) -> Any:
        return torch.nn.functional.grouped_mm(rows, bank, offs=ends)

    forward = {"torch dense": lambda: rows_t @ weight_t, "torch grouped_mm": lambda: grouped(rows_t, bank_t)}
    both = {
        "torch dense": gradients(torch.matmul, rows_t, weight_t),
        "torch grouped_mm": gradients(grouped, rows_t, bank_t),
    }
    return forward, both


def dense_ffn(rows: jax.Array, gate: jax.Array, up: jax.Array, down: jax.Array) -> jax.Array:
    """The same gated network with one matrix for all rows."""
    return (jax.nn.silu(rows @ gate) * (rows @ up)) @ down


def scanned_ffn(
    rows: int, experts: int, width: int, hidden: int, layers: int, dtype: jnp.dtype, skew: float
) -> tuple[dict[str, Case], dict[str, Case]]:
    """Forward, and forward with backward, of `layers` residual FFNs that share their weights."""
    rng = np.random.default_rng(2)

    def array(*shape: int) -> jax.Array:
        return jnp.asarray(rng.standard_normal(shape, np.float32) * 0.05, dtype)

    x, cotangent = array(rows, width), array(rows, width)
    bank = Bank(array(experts, width, hidden), array(experts, width, hidden), array(experts, hidden, width))
    one_expert = Bank(*(weights[0] for weights in bank))
    sizes = jnp.stack([jnp.asarray(group_sizes(rows, experts, skew, seed)) for seed in range(layers)])
    plans: GroupPlan = jax.vmap(lambda sizes_E: make_group_plan(sizes_E, rows))(sizes)

    def dense(x: jax.Array, weights: Bank) -> jax.Array:
        return jax.lax.scan(lambda x, _: (x + dense_ffn(x, *weights), None), x, None, length=layers)[0]

    def autodiff(x: jax.Array, bank: Bank) -> jax.Array:
        return jax.lax.scan(lambda x, plan: (x + grouped_ffn(x, bank, plan), None), x, plans)[0]

    def accumulating(x: jax.Array, accumulator: Bank) -> jax.Array:
        bank = jax.lax.stop_gradient(accumulator.astype(dtype))

        def layer(carry: tuple[jax.Array, Bank], plan: GroupPlan) -> tuple[tuple[jax.Array, Bank], None]:
            x, accumulator = carry
            out, accumulator = accumulating_ffn(x, bank, accumulator, plan)
            return (x + out, accumulator), None

        return jax.lax.scan(layer, (x, accumulator.astype(jnp.float32)), plans)[0][0]

    weights = {"dense": one_expert, "accumulating_ffn": bank, "grouped_ffn, plain autodiff": bank}
    functions = dict(zip(weights, (dense, accumulating, autodiff), strict=True))
    forward = {name: compiled(functions[name], x, weights[name]) for name in ("dense", "accumulating_ffn")}
    both = {
        name: compiled_with_gradients(function, cotangent, x, weights[name]) for name, function in functions.items()
    }
    return forward, both


def environment() -> str:
    """What the numbers depend on besides the arguments."""
    command = ["git", "-C", str(Path(__file__).parent), "rev-parse", "--short", "HEAD"]
    try:
        commit = subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        commit = "unknown"
    tunables = os.environ.get("GLIBC_TUNABLES", "not set")
    return (
        f"jax {jax.__version__} on {jax.default_backend()}, {os.cpu_count()} CPUs, commit {commit}, "
        f"GLIBC_TUNABLES {tunables}"
    )


def run(arguments: argparse.Namespace) -> None:
    """Measure and print the tables: product, FFN and a scan of FFNs, each forward and forward with backward."""
    rows, experts, width, hidden = arguments.rows, arguments.experts, arguments.width, arguments.hidden
    dtype = jnp.dtype(arguments.dtype)
    sizes = group_sizes(rows, experts, arguments.skew)
    plan: GroupPlan = make_group_plan(jnp.asarray(sizes), rows)
    rng = np.random.default_rng(1)

    def array(*shape: int) -> jax.Array:
        return jnp.asarray(rng.standard_normal(shape, np.float32) * 0.1, dtype)

    x, gate, up, down = (
        array(rows, width), array(experts, width, hidden), array(experts, width, hidden), array(experts, hidden, width),
    )  # fmt: skip
    wide, narrow = array(rows, hidden), array(rows, width)
    fresh = compiled(lambda: jnp.zeros(gate.shape, dtype))
    print(environment())
    print(
        f"{rows} rows, {experts} experts of {sizes.min()} to {sizes.max()} rows, {width} -> {hidden}, {dtype}; "
        f"dense is one product of {rows} rows"
    )

    def product(x: jax.Array, bank: jax.Array) -> jax.Array:
        return grouped_matmul(x, bank, plan)

    def ragged(x: jax.Array, bank: jax.Array) -> jax.Array:
        return jax.lax.ragged_dot(x, bank, plan.group_sizes)

    def ffn(x: jax.Array, gate: jax.Array, up: jax.Array, down: jax.Array) -> jax.Array:
        return grouped_ffn(x, Bank(gate, up, down), plan)

    torch_forward, torch_both = torch_cases(x, gate, wide, sizes)
    forward = {"dense": compiled(jnp.matmul, x, gate[0]), "grouped_matmul": compiled(product, x, gate), **torch_forward}
    both = {
        "dense": compiled_with_gradients(jnp.matmul, wide, x, gate[0]),
        "grouped_matmul": compiled_with_gradients(product, wide, x, gate),
        "fresh bank": fresh,
        **torch_both,
    }
    if arguments.ragged_repeats:
        forward["jax.lax.ragged_dot"] = compiled(ragged, x, gate)
        both["jax.lax.ragged_dot"] = compiled_with_gradients(ragged, wide, x, gate)
    slow = ["jax.lax.ragged_dot"]
    report("product, forward", measure(forward, arguments.repeats, slow, arguments.ragged_repeats))
    report("product, forward and backward", measure(both, arguments.repeats, slow, arguments.ragged_repeats))

    one_expert = (gate[0], up[0], down[0])
    forward = {"dense": compiled(dense_ffn, x, *one_expert), "grouped_ffn": compiled(ffn, x, gate, up, down)}
    both = {
        "dense": compiled_with_gradients(dense_ffn, narrow, x, *one_expert),
        "grouped_ffn": compiled_with_gradients(ffn, narrow, x, gate, up, down),
        "fresh bank, one of three": fresh,
    }
    report("FFN, forward", measure(forward, arguments.repeats))
    report("FFN, forward and backward", measure(both, arguments.repeats))

    layers = arguments.layers
    forward, both = scanned_ffn(rows, experts, width, hidden, layers, dtype, arguments.skew)
    report(f"{layers} FFNs, forward", measure(forward, arguments.repeats))
    report(f"{layers} FFNs, forward and backward", measure(both, arguments.repeats))


def main() -> None:
    """Read the command line and run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=4096, help="rows of the sorted buffer")
    parser.add_argument("--experts", type=int, default=96)
    parser.add_argument("--in", dest="width", type=int, default=256, help="width of a row")
    parser.add_argument("--out", dest="hidden", type=int, default=1024, help="width of an expert")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--skew", type=float, default=0.0, help="spread of expert popularity (log-normal width)")
    parser.add_argument("--layers", type=int, default=12, help="layers that share the bank in the last tables")
    parser.add_argument("--repeats", type=int, default=20, help="rounds of every table")
    parser.add_argument("--ragged-repeats", type=int, default=2, help="rounds of jax.lax.ragged_dot; 0 leaves it out")
    run(parser.parse_args())


if __name__ == "__main__":
    main()
