"""The grouped products on a GPU: results against float32, times beside XLA's and PyTorch's. Needs a GPU.

    python -m benchmarks.gpu_kernels                            # 96 experts, 768 -> 3072, 16,384 rows
    python -m benchmarks.gpu_kernels --experts 192 --width 1024 --hidden 4096 --skew 0.6
    python -m benchmarks.gpu_kernels --tiles                    # other tile sizes of the kernels, one at a time

All variants take turns in one process, so a slow moment meets them alike. The floor is the larger of the arithmetic at
the peak and the bytes, each operand and result once, at the bandwidth; both are measured first, by a large product and
a large copy. Errors are relative to float32 products at full precision.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.grouped_matmul import environment, group_sizes
from unipool_jax.kernels import gpu_tiles, pallas_gpu
from unipool_jax.kernels.gpu_tiles import GpuTile
from unipool_jax.kernels.group_plan import make_group_plan
from unipool_jax.kernels.grouped_ffn import Bank, accumulating_ffn, grouped_ffn

Run = Callable[[], Any]
QUEUED = 5
"""Calls that wait on the device at once, so that launching them costs no time that is measured."""


def seconds_each(runs: Mapping[str, Run], rounds: int) -> dict[str, float]:
    """Median seconds of one call, the variants taking turns."""
    found: dict[str, list[float]] = {name: [] for name in runs}
    for run in runs.values():
        jax.block_until_ready(run())
    for _ in range(rounds):
        for name, run in runs.items():
            start = time.perf_counter()
            jax.block_until_ready([run() for _ in range(QUEUED)])
            found[name].append((time.perf_counter() - start) / QUEUED)
    return {name: float(np.median(values)) for name, values in found.items()}


def ceilings() -> tuple[float, float]:
    """FLOP/s of a large bfloat16 product and bytes/s, read and written, of a large copy."""
    square = jax.random.normal(jax.random.key(0), (8192, 8192), jnp.bfloat16)
    big = jnp.ones(2**30 // 4, jnp.float32)
    product, copy = jax.jit(jnp.matmul), jax.jit(lambda x: x + 1)
    times = seconds_each({"product": lambda: product(square, square), "copy": lambda: copy(big)}, 5)
    return 2 * 8192**3 / times["product"], 2 * big.nbytes / times["copy"]


class Problem:
    """One grouped FFN: rows sorted by expert, a bank, and the gradient that arrives from above."""

    def __init__(self, rows: int, experts: int, width: int, hidden: int, skew: float):
        keys = iter(jax.random.split(jax.random.key(1), 5))

        def array(*shape: int, scale: float = 1.0) -> jax.Array:
            return (scale * jax.random.normal(next(keys), shape)).astype(jnp.bfloat16)

        self.x, self.grad = array(rows, width), array(rows, width)
        self.bank = Bank(
            array(experts, width, hidden, scale=width**-0.5),
            array(experts, width, hidden, scale=width**-0.5),
            array(experts, hidden, width, scale=hidden**-0.5),
        )
        self.sizes = jnp.asarray(group_sizes(rows, experts, skew))
        self.weights = experts * width * hidden * 3
        self.products = 3 * 2 * rows * width * hidden

    def floor(self, peak: float, bandwidth: float, *, backward: bool) -> float:
        """Seconds: forward reads a bank; backward does twice the arithmetic, reads it again, adds to one in float32."""
        size = (2 + 2 + 8) * self.weights if backward else 2 * self.weights
        moved = size + self.x.nbytes * (6 if backward else 2)
        return max((3 if backward else 1) * self.products / peak, moved / bandwidth)

    def ours(self, implementation: Any) -> tuple[Run, Run]:
        """Forward, and a backward pass that adds to a gradient of the bank, which it donates and gets back."""
        rows = self.x.shape[0]
        plan = jax.jit(lambda sizes: make_group_plan(sizes, rows, implementation=implementation))(self.sizes)
        forward = jax.jit(lambda x, bank, plan: grouped_ffn(x, bank, plan))

        def step(x: jax.Array, bank: Bank, plan: Any, grad: jax.Array, total: Bank) -> tuple[jax.Array, Bank]:
            zero = jax.tree.map(lambda w: jnp.zeros(w.shape, jnp.float32), bank)
            _, pullback = jax.vjp(lambda x, acc: accumulating_ffn(x, bank, acc, plan), x, zero)
            found: tuple[jax.Array, Bank] = pullback((grad, total))
            return found

        both = jax.jit(step, donate_argnums=4)
        held = [jax.tree.map(lambda w: jnp.zeros(w.shape, jnp.float32), self.bank)]

        def backward() -> jax.Array:
            x_grad, held[0] = both(self.x, self.bank, plan, self.grad, held[0])
            return x_grad

        return lambda: forward(self.x, self.bank, plan), backward

    def ragged(self) -> tuple[Run, Run]:
        """The same by `jax.lax.ragged_dot`; its gradient of the bank is a new array in bfloat16."""

        def ffn(x: jax.Array, bank: Bank) -> jax.Array:
            def dot(x: jax.Array, weights: jax.Array) -> jax.Array:
                return jax.lax.ragged_dot(x, weights, self.sizes)

            return dot(jax.nn.silu(dot(x, bank.gate_EDF)) * dot(x, bank.up_EDF), bank.down_EFD)

        forward = jax.jit(ffn)
        both = jax.jit(lambda x, bank, grad: jax.vjp(ffn, x, bank)[1](grad))
        return lambda: forward(self.x, self.bank), lambda: both(self.x, self.bank, self.grad)

    def dense(self) -> tuple[Run, Run]:
        """One expert for all rows: the same arithmetic without the bank."""

        def ffn(x: jax.Array, gate: jax.Array, up: jax.Array, down: jax.Array) -> jax.Array:
            return (jax.nn.silu(x @ gate) * (x @ up)) @ down

        one = [weights[0] for weights in self.bank]
        forward = jax.jit(ffn)
        both = jax.jit(lambda x, grad, *one: jax.vjp(ffn, x, *one)[1](grad))
        return lambda: forward(self.x, *one), lambda: both(self.x, self.grad, *one)

    def exact(self) -> tuple[jax.Array, jax.Array]:
        """Output and gradient of the rows from float32 products, expert by expert."""
        ends = np.cumsum(np.asarray(self.sizes))

        @jax.jit
        def one(x: jax.Array, grad: jax.Array, bank: Bank, expert: jax.Array) -> tuple[jax.Array, jax.Array]:
            gate, up, down = (weights[expert].astype(jnp.float32) for weights in bank)

            def ffn(x: jax.Array) -> jax.Array:
                return (jax.nn.silu(x @ gate) * (x @ up)) @ down

            out, pullback = jax.vjp(ffn, x)
            return out, pullback(grad)[0]

        most = int(np.max(np.asarray(self.sizes)))
        out, x_grad = np.zeros(self.x.shape, np.float32), np.zeros(self.x.shape, np.float32)
        x, grad = np.asarray(self.x, np.float32), np.asarray(self.grad, np.float32)
        with jax.default_matmul_precision("highest"):
            for expert, (start, end) in enumerate(zip([0, *ends[:-1]], ends, strict=True)):
                padded = [np.zeros((most, x.shape[1]), np.float32) for _ in range(2)]
                padded[0][: end - start], padded[1][: end - start] = x[start:end], grad[start:end]
                found = one(*map(jnp.asarray, padded), self.bank, jnp.int32(expert))
                out[start:end], x_grad[start:end] = (np.asarray(a)[: end - start] for a in found)
        return jnp.asarray(out), jnp.asarray(x_grad)


def torch_median(run: Run, rounds: int) -> float:
    """Median seconds of one call of PyTorch on the GPU, after two rounds that warm up."""
    import torch

    times = []
    for turn in range(rounds + 2):
        torch.cuda.synchronize()
        start = time.perf_counter()
        for _ in range(QUEUED):
            run()
        torch.cuda.synchronize()
        if turn > 1:
            times.append((time.perf_counter() - start) / QUEUED)
    return float(np.median(times))


def torch_seconds(problem: Problem, rounds: int) -> dict[str, tuple[float, float]]:
    """Forward, and forward with backward, of PyTorch's `grouped_mm`; nothing without PyTorch or its CUDA."""
    try:
        import torch
    except ImportError:
        return {}
    if not torch.cuda.is_available() or not hasattr(torch.nn.functional, "grouped_mm"):
        return {}

    def tensor(array: jax.Array) -> Any:
        return torch.tensor(np.asarray(array, np.float32)).to("cuda", torch.bfloat16).requires_grad_()

    x, gate, up, down = map(tensor, (problem.x, *problem.bank))
    grad = tensor(problem.grad).detach()
    ends = torch.cumsum(torch.tensor(np.asarray(problem.sizes)), 0).to("cuda", torch.int32)

    def ffn() -> Any:
        def dot(x: Any, weights: Any) -> Any:
            return torch.nn.functional.grouped_mm(x, weights, offs=ends)

        return dot(torch.nn.functional.silu(dot(x, gate)) * dot(x, up), down)

    def forward() -> None:
        with torch.no_grad():
            ffn()

    def both() -> None:
        torch.autograd.grad(ffn(), (x, gate, up, down), grad)

    return {"torch grouped_mm": (torch_median(forward, rounds), torch_median(both, rounds))}


def error(found: jax.Array, exact: jax.Array) -> float:
    """Relative error in the norm over all numbers."""
    return float(jnp.linalg.norm(found.astype(jnp.float32) - exact) / jnp.linalg.norm(exact))


def compare(problem: Problem, rounds: int) -> None:
    """Print the milliseconds of each variant, also as multiples of ours, and its errors."""
    peak, bandwidth = ceilings()
    print(f"measured: {peak / 1e12:.0f} TFLOP/s in a bfloat16 product, {bandwidth / 1e12:.2f} TB/s in a copy")
    variants = {"dense, one expert": problem.dense(), "pallas_gpu": problem.ours("pallas_gpu")}
    variants |= {"xla": problem.ours("xla"), "jax.lax.ragged_dot": problem.ragged()}
    forward = seconds_each({name: runs[0] for name, runs in variants.items()}, rounds)
    backward = seconds_each({name: runs[1] for name, runs in variants.items()}, rounds)
    times = {name: (forward[name], backward[name]) for name in variants} | torch_seconds(problem, rounds)
    ours = times["pallas_gpu"]
    floors = problem.floor(peak, bandwidth, backward=False), problem.floor(peak, bandwidth, backward=True)
    print(f"floor: {1e3 * floors[0]:.3f} ms forward, {1e3 * floors[1]:.3f} ms forward and backward")
    print(f"{'':24}{'forward ms':>11}{'/ ours':>8}{'both ms':>10}{'/ ours':>8}")
    for name, (one, two) in times.items():
        print(f"{name:24}{1e3 * one:11.3f}{one / ours[0]:8.2f}{1e3 * two:10.3f}{two / ours[1]:8.2f}", flush=True)
    out, x_grad = problem.exact()
    for name in list(variants)[1:]:
        found = variants[name][1]()
        found = found[0] if isinstance(found, tuple) else found
        errors = f"{error(variants[name][0](), out):.1e}, of the gradient of the rows {error(found, x_grad):.1e}"
        print(f"{name:24}error of the output {errors}", flush=True)


@contextmanager
def other_tiles(row_pass: dict[str, int], bank: dict[str, int]) -> Iterator[None]:
    """The kernels with these sizes instead of those of `gpu_tiles`."""

    def row_tile(*arguments: Any) -> GpuTile:
        return gpu_tiles.row_pass_tile(*arguments)._replace(**row_pass)

    def bank_tile(*arguments: Any) -> GpuTile:
        return gpu_tiles.bank_tile(*arguments)._replace(**bank)

    with mock.patch.multiple(pallas_gpu, row_pass_tile=row_tile, bank_tile=bank_tile):
        yield


ROW_TILES: tuple[dict[str, int], ...] = (
    {},
    {"num_warps": 4},
    {"num_stages": 2},
    {"num_stages": 4},
    {"contraction": 32},
    {"contraction": 128, "num_stages": 2},
    {"columns": 64},
    {"columns": 128},
    {"columns": 256, "num_warps": 8},
)
BANK_TILES: tuple[dict[str, int], ...] = (
    {},
    {"rows": 128},
    {"rows": 128, "columns": 128, "num_warps": 8},
    {"columns": 64},
    {"columns": 256, "num_warps": 8},
    {"contraction": 64},
    {"num_stages": 4},
    {"num_stages": 2},
)


def try_tiles(problem: Problem, rounds: int) -> None:
    """Print the times of other tile sizes; those that do not compile are said to."""
    runs: dict[str, tuple[Run, Run]] = {}
    for row_pass, bank in [(tile, {}) for tile in ROW_TILES] + [({}, tile) for tile in BANK_TILES[1:]]:
        name = f"row pass {row_pass}" if row_pass else f"bank {bank}" if bank else "as they are"
        try:
            with other_tiles(row_pass, bank):
                runs[name] = problem.ours("pallas_gpu")
                for run in runs[name]:
                    jax.block_until_ready(run())
        except jax.errors.JaxRuntimeError as problem_found:
            print(f"{name}: {str(problem_found).splitlines()[0][:120]}")
            runs.pop(name, None)
    forward = seconds_each({name: pair[0] for name, pair in runs.items()}, rounds)
    backward = seconds_each({name: pair[1] for name, pair in runs.items()}, rounds)
    for name in runs:
        print(f"{name:60}{1e3 * forward[name]:10.3f}{1e3 * backward[name]:10.3f}", flush=True)


def main() -> None:
    """Read the command line and run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=16384)
    parser.add_argument("--experts", type=int, default=96)
    parser.add_argument("--width", type=int, default=768)
    parser.add_argument("--hidden", type=int, default=3072)
    parser.add_argument("--skew", type=float, default=0.0, help="spread of expert popularity (log-normal width)")
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--tiles", action="store_true", help="try other tile sizes instead")
    arguments = parser.parse_args()
    print(f"{environment()}, {jax.devices()[0].device_kind}")
    problem = Problem(arguments.rows, arguments.experts, arguments.width, arguments.hidden, arguments.skew)
    (try_tiles if arguments.tiles else compare)(problem, arguments.rounds)


if __name__ == "__main__":
    main()
