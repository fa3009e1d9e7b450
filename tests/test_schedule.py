"""Schedules of compiled modules: what runs beside collectives, and what single instructions move and compute.

The modules are written by hand. Links pass 1 byte a second, memory 10, and products take 100 FLOP/s.
"""

from __future__ import annotations

import pytest

from unipool_jax.planner.collectives import Instruction, Module, parse
from unipool_jax.planner.instructions import Clock, Traffic, arrays
from unipool_jax.planner.schedule import Overlap, overlap

GROUPS = "replica_groups={{0,1},{2,3}}"


def module_of(entry: str, more: str = "") -> Module:
    lines = "\n".join(f"  {line}" for line in entry.strip().splitlines())
    return parse(f"{more}\nENTRY %main (a: f32[40]) -> f32[40] {{\n  %a = f32[40]{{0}} parameter(0)\n{lines}\n}}\n")


def walked(module: Module, kernels: dict[str, float] | None = None) -> Overlap:
    clock = Clock(Traffic(module), 100.0, 10.0, kernels or {})
    return overlap(module, clock, ("data", "expert"), (2, 2), lambda one: one.sent_bytes)


def work(name: str, after: str = "%a") -> str:
    """Four seconds: 20 bytes read and 20 written."""
    return f"%{name} = f32[5]{{0}} negate({after}.piece)"


def started(name: str, elements: int) -> str:
    """A gather of which a device sends half: 2 seconds an element."""
    return f"%{name} = (f32[1]{{0}}, f32[{elements}]{{0}}) all-gather-start(%a), {GROUPS}, dimensions={{0}}"


def done(name: str, start: str, elements: int) -> str:
    return f"%{name} = f32[{elements}]{{0}} all-gather-done(%{start})"


PIECE = "%a.piece = f32[5]{0} bitcast(%a)"


def schedule(*lines: str) -> Overlap:
    return walked(module_of("\n".join((PIECE, *lines))))


@pytest.mark.parametrize(
    ("lines", "seconds", "hidden"),
    [
        # Alone: 16 seconds of which nothing is hidden.
        ((f"%g = f32[8]{{0}} all-gather(%a), {GROUPS}", work("w")), 16, 0),
        # Four seconds of work between start and done of 16, then of 2.
        ((started("s", 8), work("w"), done("d", "s", 8)), 16, 4),
        ((started("s", 1), work("w"), done("d", "s", 1)), 2, 2),
        # Work in front of the start or behind the done hides nothing.
        ((work("v"), started("s", 8), done("d", "s", 8), work("w")), 16, 0),
        # Two at a time share the links: both end after 24 seconds, beside four of work.
        ((started("s", 8), started("t", 4), work("w"), done("d", "s", 8), done("e", "t", 4)), 24, 4),
        # The second waits for the links, which the first holds for 16 seconds: 12 beside work are hidden.
        (
            (started("s", 8), work("u"), work("v"), started("t", 4), work("w"), done("d", "s", 8), done("e", "t", 4)),
            24,
            12,
        ),
        # A synchronous one behind it waits for the links too.
        ((started("s", 8), work("w"), f"%g = f32[4]{{0}} all-gather(%a), {GROUPS}", done("d", "s", 8)), 24, 4),
    ],
)
def test_what_stands_between_start_and_done_is_hidden(lines: tuple[str, ...], seconds: float, hidden: float) -> None:
    found = schedule(*lines)
    assert (found.seconds, found.hidden_seconds) == (seconds, hidden)


def test_groups_of_one_device_are_no_collectives() -> None:
    assert schedule("%g = f32[8]{0} all-gather(%a), replica_groups={{0},{1},{2},{3}}").windows == ()


LOOP = f"""
%cond (p: (s32[])) -> pred[] {{
  %p = (s32[]) parameter(0)
  %n = s32[] constant(3)
  ROOT %lt = pred[] compare(%i, %n), direction=LT
}}

%wrapped (x: f32[8]) -> f32[8] {{
  %x = f32[8]{{0}} parameter(0)
  ROOT %r = f32[8]{{0}} all-reduce(%x), {GROUPS}, to_apply=%add
}}

%body (p: (s32[])) -> (s32[]) {{
  %a.piece = f32[5]{{0}} parameter(0)
  %s = ((), ()) async-start(), calls=%wrapped
  {work("early")}
  %u = ((f32[8]{{0}}), f32[8]{{0}}) async-update(%s, %a)
  {work("late")}
  ROOT %d = f32[8]{{0}} async-done(%u)
}}
"""


def test_a_sparse_core_runs_from_the_update_on_and_a_loop_as_often_as_it_turns() -> None:
    """Its start only loads the program: of two pieces of work the second is beside it."""
    found = walked(module_of("%w = (s32[]) while(%a), condition=%cond, body=%body", LOOP))
    # An all-reduce of 32 bytes over two devices sends 32.
    assert (found.seconds, found.hidden_seconds) == (3 * 32, 3 * 4)
    (window,) = found.windows
    assert (window.collective.kind, window.collective.times, window.between) == ("all-reduce", 3, 4)


def test_a_collective_within_fusions_runs_beside_all_of_them() -> None:
    parts = "\n".join(
        f"%part.{n} (p: f32[5]) -> f32[5] {{\n  %p = f32[5]{{0}} parameter(0)\n"
        f'  %g = f32[8]{{0}} all-gather(%p), {GROUPS}, frontend_attributes={{chain_id="7"}}\n'
        "  ROOT %n = f32[5]{0} negate(%p)\n}\n"
        for n in range(3)
    )
    calls = [f"%f.{n} = f32[5]{{0}} fusion(%a.piece), kind=kCustom, calls=%part.{n}" for n in range(3)]
    found = walked(module_of("\n".join((PIECE, *calls, work("w"))), parts))
    # Four seconds a fusion; what follows waits for the rest of the 16.
    assert (found.seconds, found.hidden_seconds, len(found.windows)) == (16, 12, 1)


def test_a_reduction_inside_a_fusion_is_the_fusion() -> None:
    inner = (
        "%all-reduce-scatter.1 (p: f32[8]) -> f32[4] {\n  %p = f32[8]{0} parameter(0)\n"
        f"  %r = f32[8]{{0}} all-reduce(%p), {GROUPS}, to_apply=%add\n  ROOT %s = f32[4]{{0}} slice(%r)\n}}\n"
    )
    found = walked(module_of("%f = f32[4]{0} fusion(%a), kind=kCustom, calls=%all-reduce-scatter.1", inner))
    assert (found.seconds, found.hidden_seconds) == (16, 0)
    assert found.windows[0].collective.kind == "reduce-scatter"


# Single instructions


def line_of(module: Module, name: str) -> Instruction:
    return next(line for line in module.computations["main"] if line.name == name)


def test_arrays_in_vector_memory_cost_nothing() -> None:
    found = arrays("(bf16[8,4]{1,0:T(8,128)(2,1)}, f32[2]{0:S(1)}, pred[6]{0}, f8e4m3fn[3]{0}, s32[]{:S(2)})")
    assert [(array.shape, array.bytes) for array in found] == [((8, 4), 64), ((2,), 0), ((6,), 6), ((3,), 3), ((), 0)]


def test_the_gpu_compiler_s_operands_and_memory() -> None:
    """It names elements of tuples in place, and writes `S(1)` of memory like any other."""
    given = "%pair = (f32[100]{0}, f32[8]{0:S(1)}) parameter(1)\n%x = f32[8]{0:S(1)} copy(%pair#1)"
    module = module_of(given)
    line = line_of(module, "x")
    assert Traffic(module, vector_memory=False).bytes("main", line) == 2 * 32
    assert Traffic(module).bytes("main", line) == 0


FUSED = """
%inner (p: f32[6,8], i: s32[]) -> f32[8] {
  %p = f32[6,8]{1,0} parameter(0)
  %i = s32[] parameter(1)
  %zero = s32[] constant(0)
  %next = s32[] add(%i, %zero)
  %row = f32[1,8]{1,0} dynamic-slice(%p, %next, %zero), dynamic_slice_sizes={1,8}
  ROOT %flat = f32[8]{0} bitcast(%row)
}

%update (stack: f32[6,8], row: f32[8], i: s32[]) -> f32[6,8] {
  %stack = f32[6,8]{1,0} parameter(0)
  %row = f32[8]{0} parameter(1)
  %i = s32[] parameter(2)
  %zero = s32[] constant(0)
  %one = f32[1,8]{1,0} bitcast(%row)
  ROOT %new = f32[6,8]{1,0} dynamic-update-slice(%stack, %one, %i, %zero)
}

%both (stack: f32[6,8], row: f32[8], i: s32[]) -> (f32[6,8], f32[8]) {
  %stack = f32[6,8]{1,0} parameter(0)
  %row = f32[8]{0} parameter(1)
  %i = s32[] parameter(2)
  %slice = f32[8]{0} fusion(%stack, %i), kind=kLoop, calls=%inner
  %sum = f32[8]{0} add(%slice, %row)
  %new = f32[6,8]{1,0} fusion(%stack, %sum, %i), kind=kLoop, calls=%update
  ROOT %results = (f32[6,8]{1,0}, f32[8]{0}) tuple(%new, %sum)
}

%narrowed (p: f32[8]) -> bf16[8] {
  %p = f32[8]{0} parameter(0)
  ROOT %c = bf16[8]{0} convert(%p)
}
"""
ARRAYS = """%stack = f32[6,8]{1,0} parameter(1)
%row = f32[8]{0} parameter(2)
%i = s32[]{:S(2)} parameter(3)
%near = f32[8]{0:S(1)} parameter(4)
"""


@pytest.mark.parametrize(
    ("line", "moved", "copies"),
    [
        # A row of 32 bytes, read and written, out of and into an array of 192.
        ("f32[1,8]{1,0} dynamic-slice(%stack, %i, %i)", 64, True),
        ("f32[6,8]{1,0} dynamic-update-slice(%stack, %row, %i, %i)", 64, True),
        ("f32[8]{0} fusion(%stack, %i), calls=%inner", 64 + 4, True),
        ("f32[6,8]{1,0} fusion(%stack, %row, %i), calls=%update", 64 + 4, True),
        # The slice is read, the row too, and both results are written; the sum is arithmetic.
        ("(f32[6,8]{1,0}, f32[8]{0}) fusion(%stack, %row, %i), calls=%both", 4 * 32 + 4, False),
        ("f32[6,8]{0,1} copy(%stack)", 2 * 192, True),
        ("f32[8,6]{1,0} transpose(%stack), dimensions={1,0}", 2 * 192, True),
        ("f32[8]{0:S(1)} copy(%row)", 32, True),
        ("f32[8]{0} add(%row, %near)", 64, False),
        ("f32[6,8]{1,0} broadcast(%i), dimensions={}", 192, False),
        ("bf16[8]{0} fusion(%row), calls=%narrowed", 48, False),
        ("f32[48]{0} bitcast(%stack)", 0, False),
        ("(f32[8]{0:S(1)}, f32[8]{0}, u32[]) copy-start(%row)", 0, False),
    ],
)
def test_what_an_instruction_moves(line: str, moved: float, copies: bool) -> None:
    module = module_of(f"{ARRAYS}%x = {line}", FUSED)
    traffic = Traffic(module)
    assert traffic.bytes("main", line_of(module, "x")) == moved
    assert traffic.moves("main", line_of(module, "x")) is copies
    found = walked(module)
    assert found.copy_seconds == (moved / 10 if copies else 0)


@pytest.mark.parametrize(
    ("line", "flops"),
    [
        ("f32[3,5]{1,0} dot(%l, %r), lhs_contracting_dims={1}, rhs_contracting_dims={0}", 2 * 3 * 5 * 4),
        ("f32[3,5]{1,0} convolution(%l, %r), dim_labels=bf_io->bf", 2 * 3 * 5 * 4),
        # A batch of seven products: their axis is a window of one place that slides over all of them.
        ("f32[3,5,7]{2,1,0} convolution(%lb, %rb), window={size=7}, dim_labels=bf0_io0->bf0", 2 * 3 * 5 * 4 * 7),
        ("f32[3,5]{1,0} add(%l, %r)", 0),
    ],
)
def test_flops_of_products(line: str, flops: float) -> None:
    given = (
        "%l = f32[3,4]{1,0} parameter(1)\n%r = f32[4,5]{1,0} parameter(2)\n"
        "%lb = f32[3,4,7]{2,1,0} parameter(3)\n%rb = f32[4,5,7]{2,1,0} parameter(4)\n"
    )
    module = module_of(f"{given}%x = {line}")
    assert Traffic(module).flops("main", line_of(module, "x")) == flops


def test_products_take_their_slower_resource() -> None:
    given = "%l = f32[3,400]{1,0:S(1)} parameter(1)\n%r = f32[400,5]{1,0:S(1)} parameter(2)\n"
    product = "%x = f32[3,5]{1,0} dot(%l, %r), lhs_contracting_dims={1}, rhs_contracting_dims={0}"
    module = module_of(given + product)
    clock = Clock(Traffic(module), 100.0, 10.0, {})
    assert clock.seconds("main", line_of(module, "x")) == max(2 * 3 * 5 * 400 / 100, 60 / 10)


def test_kernels_take_what_is_known_of_them() -> None:
    """By the beginning of their name, also inside a fusion; of others the traffic of their arrays is counted."""
    inner = (
        "%around (p: f32[5]) -> f32[5] {\n  %p = f32[5]{0} parameter(0)\n"
        '  ROOT %known.2 = f32[5]{0} custom-call(%p), custom_call_target="tpu_custom_call"\n}\n'
    )
    lines = (
        PIECE,
        '%known_too.1 = f32[5]{0} custom-call(%a.piece), custom_call_target="tpu_custom_call"',
        "%f = f32[5]{0} fusion(%a.piece), kind=kCustom, calls=%around",
        '%other.1 = f32[5]{0} custom-call(%a.piece), custom_call_target="tpu_custom_call"',
        '%buffer = f32[5]{0} custom-call(), custom_call_target="AllocateBuffer"',
    )
    module = module_of("\n".join(lines), inner)
    clock = Clock(Traffic(module), 100.0, 10.0, {"known": 7.0})
    times = {line.name: clock.seconds("main", line) for line in module.computations["main"]}
    assert times == {"a": 0, "a.piece": 0, "known_too.1": 7, "f": 7, "other.1": 4, "buffer": 0}
