"""What a compiled step does while its collectives run.

The text of a TPU module is its schedule: lines stand in the order in which they execute. A collective in one line is
synchronous. One with a start and a done runs beside what stands between the two.
"""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Callable, Iterator
from typing import NamedTuple

from unipool_jax.planner.collectives import Collective, Instruction, Module, chain, collective, collective_inside
from unipool_jax.planner.instructions import Clock, operands


class Window(NamedTuple):
    """One collective of a sequence of instructions."""

    collective: Collective
    seconds: float
    """Of one execution, alone on the links."""
    sequence: str
    """The computation in whose lines it starts and ends."""
    start: int
    """Where it starts: index of an instruction."""
    done: int
    """The instruction that waits for it; `start` if it is synchronous."""
    between: float
    """Seconds of what stands between start and done."""


class Overlap(NamedTuple):
    """Collectives of a step, as compiled."""

    seconds: float
    """Of all collectives, one after another."""
    hidden_seconds: float
    """Of them, what runs beside other instructions."""
    copy_seconds: float
    """Of instructions that only copy, slice or lay out arrays anew."""
    instruction_seconds: float
    """Of all instructions but collectives, copies among them, by their shapes."""
    windows: tuple[Window, ...]


def overlap(
    module: Module,
    clock: Clock,
    axis_names: tuple[str, ...],
    axis_sizes: tuple[int, ...],
    taken: Callable[[Collective], float],
) -> Overlap:
    """Walk through the schedule of a module.

    A walk adds up the instructions of a sequence (the entry, the body of a loop). Collectives use the links one at a
    time, in the order in which they start; a `done` waits. What is hidden is a bound: a collective is taken to slow no
    computation beside it.

    Args:
      module: as parsed.
      clock: seconds of the other instructions.
      axis_names: of the mesh that it was compiled for.
      axis_sizes: of these axes.
      taken: seconds of a collective alone.
    """
    total = hidden = copies = instructions = 0.0
    found: list[Window] = []
    read = functools.partial(collective, module, axis_names=axis_names, axis_sizes=axis_sizes)
    for name, times in sequences(module).items():
        lines = module.computations[name]
        seconds = [clock.seconds(name, line) for line in lines]
        windows = [
            Window(one, taken(one), name, start, done, sum(seconds[start + 1 : done]))
            for source, start, done in _spans(module, name)
            if (one := read(*source, times)) is not None
        ]
        found += windows
        alone = sum(window.seconds for window in windows)
        total += times * alone
        hidden += times * (alone + sum(seconds) - _walk(seconds, windows))
        copies += times * sum(clock.copies(name, line) for line in lines)
        instructions += times * sum(
            taken for taken, line in zip(seconds, lines, strict=True) if line.opcode not in _CALLS
        )
    return Overlap(total, hidden, copies, instructions, tuple(found))


_CALLS = ("while", "call", "conditional")
"""Instructions whose work is in other sequences."""


def sequences(module: Module) -> Counter[str]:
    """Computations whose lines execute one after another, and executions of each per step: not those inside fusions."""
    found: Counter[str] = Counter()

    def visit(name: str, times: int) -> None:
        found[name] += times
        for line in module.computations[name]:
            if line.opcode in _CALLS:
                for inner, factor in module.called(line):
                    visit(inner, times * factor)

    visit(next(iter(module.runs)), 1)
    return found


def _walk(seconds: list[float], windows: list[Window]) -> float:
    """Seconds of a sequence with its collectives."""
    starts = {window.start: window for window in windows}
    ends: dict[int, float] = {}
    now = links_free = 0.0
    for place, taken in enumerate(seconds):
        now = max(now, ends.get(place, 0.0))
        if place in starts:
            window = starts[place]
            links_free = max(links_free, now) + window.seconds
            if window.done == place:
                now = links_free
            else:
                ends[window.done] = max(ends.get(window.done, 0.0), links_free)
        now += taken
    return max(now, links_free)


def _spans(module: Module, name: str) -> Iterator[tuple[tuple[str, Instruction], int, int]]:
    """Each collective of a sequence with its computation, and where it starts and is waited for."""
    lines = module.computations[name]
    parts: dict[str, tuple[tuple[str, Instruction], int, int]] = {}
    for place, line in enumerate(lines):
        source = collective_inside(module, name, line)
        if source is None:
            continue
        if (number := chain(source[1])) is not None:
            # Its fusions run a part of it each; what comes behind the last one waits.
            first, start, _ = parts.get(number, (source, place, place))
            parts[number] = first, start, place + 1
        elif line.opcode.endswith("-start"):
            yield source, *_pair(lines, place)
        else:
            yield source, place, place
    yield from parts.values()


def _pair(lines: list[Instruction], place: int) -> tuple[int, int]:
    """Where the collective of a start begins to run, and the line that waits for it.

    On a SparseCore, a start without operands only loads the program; the update behind it brings them.
    """
    start, name = place, lines[place].name
    for later in range(place + 1, len(lines)):
        line = lines[later]
        if name not in operands(line)[:1]:
            continue
        if line.opcode.endswith("-done"):
            return start, later
        if line.opcode == "async-update":
            name = line.name
            start = later if start == place and not operands(lines[place]) else start
    return start, len(lines)
