"""Each grouped product on a GPU: checked against float32, then timed, beside the other kernels and cuBLAS.

    python -m benchmarks.gpu_products                      # 96 experts, 768 -> 3072; 4,096, 16,384 and 65,536 rows
    python -m benchmarks.gpu_products --tiles              # then other tiles of the Mosaic GPU kernels
    python -m benchmarks.gpu_products --rows 16384 --kernels mosaic_gpu --seconds 300

Kernels that have never run may crash the driver's context or hang. So they run in a process of their own: when it dies,
or says nothing for a minute, another goes on with the next kernel. After `--seconds` nothing more is begun.

One expert has no rows, and 40 rows of no expert hold NaN. Errors are relative to float32 products, in the norm over all
numbers; rows of no expert must be zero. "cublas" multiplies groups of equal size in one batched product, which reads
the same matrices; "dense" is one product of as many FLOPs with one matrix. TB/s counts each operand and result once.
"""

from __future__ import annotations

import argparse
import os
import queue
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from typing import Any, NamedTuple
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.grouped_matmul import environment, group_sizes
from unipool_jax.kernels import mosaic_gpu, mosaic_tiles, pallas_gpu
from unipool_jax.kernels.group_plan import GroupPlan, make_group_plan

KERNELS: dict[str, Any] = {"mosaic_gpu": mosaic_gpu, "pallas_gpu": pallas_gpu}
TAIL = 40
QUEUED, ROUNDS = 10, 5
CUBLAS: dict[str, Any] = {"xla_gpu_enable_triton_gemm": False}
"""How XLA compiles a product to cuBLAS, and searches for nothing else."""
SILENCE = 60
"""Seconds without a line after which the process counts as hanging."""

ROW_TILES: tuple[dict[str, int], ...] = (
    {"blocks": 132},
    {"stages": 3},
    {"columns": 64},
    {"columns": 128},
    {"columns": 128, "blocks": 132, "stages": 5},
    {"rows": 64},
    {"rows": 96},
    {"rows": 128},
    {"rows": 176, "columns": 64},
)
BANK_TILES: tuple[dict[str, int], ...] = (
    {"blocks": 132},
    {"rows": 128},
    {"columns": 64, "blocks": 396},
    {"columns": 64, "blocks": 528},
    {"depth": 128, "columns": 64},
    {"stages": 3},
)
"""Sizes of `mosaic_tiles` that `--tiles` tries, one set at a time."""


class Case(NamedTuple):
    """One thing to run."""

    rows: int
    product: str
    kernels: str
    tile: tuple[tuple[str, int], ...] = ()

    def name(self) -> str:
        """The first columns of its line."""
        tile = " ".join(f"{key}={value}" for key, value in self.tile)
        return f"{self.rows:6} rows  {self.product:17} {self.kernels:11}{tile}"


PRODUCTS = ("forward", "rows gradient", "bank gradient", "gate, up and SiLU", "FFN, both passes")


class Problem:
    """Operands of every product for one number of rows, and what comes out in float32."""

    def __init__(self, rows: int, experts: int, width: int, hidden: int):
        keys = iter(jax.random.split(jax.random.key(1), 8))

        def array(*shape: int, scale: float = 1.0) -> jax.Array:
            return (scale * jax.random.normal(next(keys), shape)).astype(jnp.bfloat16)

        sizes = group_sizes(rows - TAIL, experts, 0.0)
        sizes[0], sizes[1] = sizes[0] + sizes[1], 0
        self.rows, self.sizes = rows, jnp.asarray(sizes)
        self.x, self.grad = (array(rows, width).at[-TAIL:].set(jnp.nan) for _ in range(2))
        self.wide_grad = array(rows, hidden).at[-TAIL:].set(jnp.nan)
        self.gate, self.up = (array(experts, width, hidden, scale=width**-0.5) for _ in range(2))
        self.down = array(experts, hidden, width, scale=hidden**-0.5)
        index = np.cumsum(sizes)[:, None] - sizes[:, None] + np.arange(sizes.max())
        self.valid = jnp.asarray(np.arange(sizes.max()) < sizes[:, None])
        self.index = jnp.asarray(np.minimum(index, rows - 1))

    def by_expert(self, rows: jax.Array) -> jax.Array:
        """`[E, M, C]` float32, the rows of each expert and zeros."""
        return jnp.where(self.valid[..., None], rows[self.index].astype(jnp.float32), 0)

    def operands(self, product: str) -> tuple[tuple[jax.Array, ...], tuple[jax.Array, ...]]:
        """What a product takes, and the gradients that it adds to and gives back."""
        banks = self.gate, self.up, self.down
        return {
            "forward": ((self.x, self.gate), ()),
            "rows gradient": ((self.wide_grad, self.gate), ()),
            "bank gradient": ((self.x, self.wide_grad), (self.gate,)),
            "gate, up and SiLU": ((self.x, self.gate, self.up), ()),
            "FFN, both passes": ((self.x, self.grad, *banks), banks),
        }[product]

    def exact(self, product: str) -> list[jax.Array]:
        """The same products in float32: arrays of rows as `[E, M, C]`, banks as they are."""
        with jax.default_matmul_precision("highest"):
            operands = [self.by_expert(a) if a.ndim == 2 else a.astype(jnp.float32) for a in self.operands(product)[0]]
            exact = jax.jit(_EXACT[product], compiler_options=CUBLAS | {"xla_gpu_autotune_level": 0})
            return list(exact(*operands))

    def plan(self, implementation: Any) -> GroupPlan:
        """The plan of the rows."""
        # A new function each time: the size of the tiles is not among its arguments.
        make = jax.jit(lambda sizes: make_group_plan(sizes, self.rows, implementation=implementation))
        found: GroupPlan = make(self.sizes)
        return found


def _gated(x: jax.Array, gate: jax.Array, up: jax.Array) -> jax.Array:
    return jax.nn.silu(x @ gate) * (x @ up)


def _ffn_gradients(x: jax.Array, grad: jax.Array, *banks: jax.Array) -> tuple[jax.Array, ...]:
    out, pullback = jax.vjp(lambda x, gate, up, down: _gated(x, gate, up) @ down, x, *banks)
    return out, *pullback(grad)


_EXACT: dict[str, Callable[..., tuple[jax.Array, ...]]] = {
    "forward": lambda x, gate: (x @ gate,),
    "rows gradient": lambda grad, gate: (grad @ gate.mT,),
    "bank gradient": lambda x, grad: (x.mT @ grad,),
    "gate, up and SiLU": lambda x, gate, up: (_gated(x, gate, up),),
    "FFN, both passes": _ffn_gradients,
}


def _grouped(kernels: Any, product: str) -> Callable[..., Any]:
    """`(plan, operands, sums) -> (results, sums)` of one implementation."""

    def run(plan: GroupPlan, operands: tuple[jax.Array, ...], sums: tuple[jax.Array, ...]) -> Any:
        if product == "forward":
            return [kernels.matmul(*operands, plan, transpose_bank=False)], ()
        if product == "rows gradient":
            return [kernels.matmul(*operands, plan, transpose_bank=True)], ()
        if product == "bank gradient":
            return [], (kernels.bank_gradient(*operands, plan, sums[0]),)
        if product == "gate, up and SiLU":
            # The third product is not used, and left out by the compiler.
            x, gate, up = operands
            return [_hidden(kernels, x, gate, up, plan)], ()
        x, grad, *banks = operands
        out, kept = kernels.ffn_forward(x, *banks, plan, keep_products=True)
        rows_grad, sums = kernels.ffn_backward(grad, x, *banks, plan, kept, sums)
        return [out, rows_grad], sums

    return run


def _hidden(kernels: Any, x: jax.Array, gate: jax.Array, up: jax.Array, plan: GroupPlan) -> jax.Array:
    """What `ffn_forward` multiplies with the third bank."""
    with mock.patch.object(kernels, "matmul", lambda hidden, *_, **__: hidden):
        found: jax.Array = kernels.ffn_forward(x, gate, up, up, plan, keep_products=False)[0]
    return found


def _plain(kernels: str, product: str) -> Callable[..., Any]:
    """The same of cuBLAS: with one matrix, or with groups of equal size."""

    def run(_: GroupPlan, operands: tuple[jax.Array, ...], sums: tuple[jax.Array, ...]) -> Any:
        experts = next(a.shape[0] for a in (*operands, *sums) if a.ndim == 3)
        if kernels == "dense":
            operands = tuple(a[0] if a.ndim == 3 else a for a in operands)
        else:
            operands = tuple(
                a[: len(a) // experts * experts].reshape(experts, -1, a.shape[1]) if a.ndim == 2 else a
                for a in operands
            )
        results = _EXACT[product](*operands)
        if not sums:
            return list(results), ()
        new = results[len(results) - len(sums) :]
        if kernels == "dense":
            return [*results], sums
        return list(results[: -len(sums)]), tuple(s + n.astype(jnp.float32) for s, n in zip(sums, new, strict=True))

    return run


def lowered(case: Case, problem: Problem) -> tuple[Any, GroupPlan]:
    """The program of a case, to be compiled, and the plan that it takes."""
    sizes = dict(case.tile)
    of_bank = case.product == "bank gradient"
    name = "bank_tile" if of_bank else "row_tile"
    plain = getattr(mosaic_gpu, name)
    rows = sizes["rows"] if "rows" in sizes and not of_bank else None
    with ExitStack() as stack:
        stack.enter_context(mock.patch.object(mosaic_gpu, name, lambda *a: plain(*a)._replace(**sizes)))
        if rows is not None:
            stack.enter_context(mock.patch.object(mosaic_tiles, "tile_rows", return_value=rows))
        ours = case.kernels in KERNELS
        plan = problem.plan(case.kernels if ours else "pallas_gpu")
        run = _grouped(KERNELS[case.kernels], case.product) if ours else _plain(case.kernels, case.product)
        operands, into = problem.operands(case.product)
        sums = tuple(jax.ShapeDtypeStruct(a.shape, jnp.float32) for a in into)
        options = None if ours else CUBLAS
        return jax.jit(run, donate_argnums=2, compiler_options=options).lower(plan, operands, sums), plan


def error(found: jax.Array, exact: jax.Array) -> float:
    """Relative error in the norm over all numbers."""
    return float(jnp.linalg.norm(found.astype(jnp.float32) - exact) / jnp.linalg.norm(exact))


def check(run: Callable[..., Any], plan: GroupPlan, problem: Problem, product: str, exact: list[jax.Array]) -> str:
    """Errors of all results; gradients are added to ones, and zero rows of no expert are asked for."""
    operands, into = problem.operands(product)
    results, sums = run(plan, operands, tuple(jnp.ones(a.shape, jnp.float32) for a in into))
    errors = [error(problem.by_expert(result), wanted) for result, wanted in zip(results, exact, strict=False)]
    errors += [error(total - 1, wanted) for total, wanted in zip(sums, exact[len(results) :], strict=True)]
    wrong = "" if max(errors) < 1e-2 else " WRONG"
    if any(bool((result[-TAIL:] != 0).any()) for result in results):
        wrong += " ROWS OF NO EXPERT ARE NOT ZERO"
    return f"error {' '.join(f'{value:.1e}' for value in errors)}{wrong}"


def seconds(run: Callable[..., Any], plan: GroupPlan, problem: Problem, product: str) -> float:
    """Median seconds of one call, several of them waiting on the device at once."""
    operands, into = problem.operands(product)
    sums = tuple(jnp.zeros(a.shape, jnp.float32) for a in into)
    found = []
    for _ in range(ROUNDS + 1):
        jax.block_until_ready(sums)
        start = time.perf_counter()
        for _ in range(QUEUED):
            results, sums = run(plan, operands, sums)
        jax.block_until_ready((results, sums))
        found.append((time.perf_counter() - start) / QUEUED)
    return float(np.median(found[1:]))


def work(problem: Problem, product: str) -> tuple[float, float]:
    """FLOPs, and bytes with each operand and result once."""
    operands, into = problem.operands(product)
    (_, width, hidden), narrow = problem.gate.shape, 2
    products = {"gate, up and SiLU": 2, "FFN, both passes": 9}.get(product, 1)
    out = {"forward": hidden, "gate, up and SiLU": hidden, "rows gradient": width, "FFN, both passes": 2 * width}
    moved = sum(a.nbytes for a in operands) + sum(8 * a.size for a in into)
    return 2.0 * products * problem.rows * width * hidden, moved + narrow * problem.rows * out.get(product, 0)


def groups(arguments: argparse.Namespace) -> Iterator[tuple[int, list[Case]]]:
    """What is run for each number of rows, those that may crash behind the others; other tiles behind all."""
    for rows in arguments.rows:
        every = [
            (product, kernels) for product in PRODUCTS for kernels in ("dense", "cublas", "pallas_gpu", "mosaic_gpu")
        ]
        yield rows, [Case(rows, *one) for one in every if one[1] in arguments.kernels]
    for rows in arguments.rows if arguments.tiles else ():
        of_rows = [(product, tile) for product in ("forward", "gate, up and SiLU") for tile in ROW_TILES]
        every_tile = of_rows + [("bank gradient", tile) for tile in BANK_TILES]
        yield rows, [Case(rows, product, "mosaic_gpu", tuple(tile.items())) for product, tile in every_tile]


def run_cases(arguments: argparse.Namespace) -> None:
    """Run and print what is not to be left out. Before each a line says what begins; dots are signs of life."""
    end = time.monotonic() + arguments.seconds
    with ThreadPoolExecutor(max_workers=os.cpu_count()) as pool:
        for rows, of_rows in groups(arguments):
            left = [case for case in of_rows if case.name() not in arguments.leave_out]
            if not left:
                continue
            problem = Problem(rows, arguments.experts, arguments.width, arguments.hidden)
            programs: dict[Case, tuple[Future[Any], GroupPlan]] = {}
            for case in left:
                print(f"... {case.name()}", flush=True)
                try:
                    program, plan = lowered(case, problem)
                    programs[case] = pool.submit(program.compile), plan
                except Exception as found:  # whatever is wrong with one kernel, the others go on
                    print(f"{case.name()}  does not lower: {first_line(found)}", flush=True)
            for case, (future, _) in programs.items():
                # What compiles beside it would disturb what is timed.
                future.exception()
                print(f"... {case.name()}", flush=True)
            exact: dict[str, list[jax.Array]] = {}
            for case, (future, plan) in programs.items():
                if time.monotonic() > end:
                    print(f"{arguments.seconds:g} seconds are over", flush=True)
                    os._exit(0)
                print(f"begin {case.name()}", flush=True)
                if case.product not in exact:
                    exact = {case.product: problem.exact(case.product)}
                run_case(case, problem, future, plan, exact[case.product])


def run_case(case: Case, problem: Problem, program: Future[Any], plan: GroupPlan, exact: list[jax.Array]) -> None:
    """Check one, time it, and print its line."""
    try:
        run = program.result()
        checked = check(run, plan, problem, case.product, exact) if case.kernels in KERNELS else ""
        took = seconds(run, plan, problem, case.product)
    except Exception as found:  # as above
        print(f"{case.name()}  fails: {first_line(found)}", flush=True)
        if "CUDA" in str(found):
            os._exit(1)  # the context is lost, and every later call would fail
        return
    flops, moved = work(problem, case.product)
    rates = f"{flops / took / 1e12:6.0f} TFLOP/s {moved / took / 1e12:6.2f} TB/s"
    print(f"{case.name():75}{1e3 * took:9.3f} ms {rates}  {checked}", flush=True)


def first_line(found: BaseException | None) -> str:
    """What went wrong, short."""
    return f"{type(found).__name__}: {str(found).splitlines()[0][:160]}" if str(found) else type(found).__name__


def supervise(arguments: list[str], seconds: float) -> None:
    """Run the cases in another process, and in one more without the case in which it died or hung."""
    end, done = time.monotonic() + seconds, list[str]()
    with tempfile.TemporaryDirectory() as cache:
        # What the next process needs again is compiled.
        settings = os.environ | {"JAX_COMPILATION_CACHE_DIR": cache, "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}
        while (left := end - time.monotonic()) > 0:
            more = ["--seconds", str(int(left)), "--alone", "--leave-out", *done]
            command = [sys.executable, "-m", "benchmarks.gpu_products", *arguments, *more]
            process = subprocess.Popen(
                command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=settings
            )
            lines: queue.Queue[str | None] = queue.Queue()
            threading.Thread(target=_read, args=(process.stdout, lines), daemon=True).start()
            begun = None
            try:
                while (line := lines.get(timeout=min(SILENCE, max(1.0, end + 5 - time.monotonic())))) is not None:
                    if line.startswith("begin "):
                        begun = line.removeprefix("begin ").rstrip("\n")
                        done.append(begun)
                    elif not line.startswith("..."):
                        print(line, end="", flush=True)
            except queue.Empty:
                process.kill()
                if time.monotonic() > end:
                    print(f"{seconds:g} seconds are over", flush=True)
                    return
                print(f"{begun}  hangs", flush=True)
            process.kill()
            if process.wait() == 0:
                return
            print(f"{begun}  ended its process ({process.returncode}); the rest in another one", flush=True)
            if begun is None:
                return


def _read(stream: Any, lines: queue.Queue[str | None]) -> None:
    for line in stream:
        lines.put(line)
    lines.put(None)


def main() -> None:
    """Read the command line and run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, nargs="+", default=[16384, 4096, 65536])
    parser.add_argument("--experts", type=int, default=96)
    parser.add_argument("--width", type=int, default=768)
    parser.add_argument("--hidden", type=int, default=3072)
    everything = ["dense", "cublas", *KERNELS]
    parser.add_argument("--kernels", nargs="+", choices=everything, default=everything)
    parser.add_argument("--tiles", action="store_true", help="try other tile sizes too")
    parser.add_argument("--seconds", type=float, default=110, help="after which nothing is begun")
    parser.add_argument("--alone", action="store_true", help="in this process")
    parser.add_argument("--leave-out", nargs="*", default=[], help="cases, by the first columns of their lines")
    arguments = parser.parse_args()
    if arguments.alone:
        if not arguments.leave_out:
            print(f"{environment()}, {jax.devices()[0].device_kind}", flush=True)
        run_cases(arguments)
    else:
        supervise(sys.argv[1:], arguments.seconds)


if __name__ == "__main__":
    main()
