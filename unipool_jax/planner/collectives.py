"""Parses the text of a compiled module: its collectives and kernels, and how often a step runs each."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

COLLECTIVES = ("all-gather", "all-reduce", "reduce-scatter", "ragged-all-to-all", "all-to-all", "collective-permute")
_BITS = {"pred": 8, "bf16": 16, "f16": 16, "s4": 4, "u4": 4}
_HEADER = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\{$")
_INSTRUCTION = re.compile(r"^\s*(?:ROOT )?%?([\w.\-]+) = (\(.*?\)|[a-z]\w*\[[^\]]*\]\S*) ([\w\-]+)\((.*)$")
_ARRAY = re.compile(r"\b([a-z]+\d*)\[([\d,]*)\]")

_ELEMENT = re.compile(r"%([\w.\-]+)#(\d+)")


class Collective(NamedTuple):
    """One collective instruction of one device's program."""

    kind: str
    shapes: tuple[str, ...]
    """Result shapes as XLA writes them: `bf16[12,1536,6144]`."""
    axes: tuple[str, ...]
    """Mesh axes that it communicates over."""
    devices: int
    """Devices of a group."""
    times: int
    """Executions per step."""
    sent_bytes: float
    """Bytes a device sends per execution: for a gather its shard to every other device, for a reduction those of a ring
    algorithm, for a ragged all-to-all those of balanced routing."""
    source: str
    """`op_name` of the traced operation; empty where the compiler dropped it."""

    @property
    def total_bytes(self) -> float:
        """Bytes that a device sends in a step."""
        return self.sent_bytes * self.times


class Instruction(NamedTuple):
    """One line of a computation."""

    name: str
    type: str
    opcode: str
    rest: str


class Module(NamedTuple):
    """Computations by name, and executions of each per step."""

    computations: dict[str, list[Instruction]]
    runs: Counter[str]

    def instructions(self) -> Iterator[tuple[Instruction, str, int]]:
        """Every executed instruction, its computation, and its executions per step."""
        for name, times in self.runs.items():
            for instruction in self.computations[name]:
                yield instruction, name, times

    def called(self, instruction: Instruction) -> Iterator[tuple[str, int]]:
        """Computations that an instruction calls, and how often; without the combiners of reductions."""
        yield from _called(instruction, self.computations)


def parse(text: str) -> Module:
    """Parse a compiled module; executions inside a loop are multiplied by its trip count.

    Loops come from scans: a counter from 0 is compared with a constant. The GPU compiler may hide the constant in a
    fusion, but writes the number of trips beside the loop. A loop with neither counts once.
    """
    computations: dict[str, list[Instruction]] = {}
    entry, current = "", ""
    for line in text.splitlines():
        if header := _HEADER.match(line):
            current = header[2]
            computations[current] = []
            entry = current if header[1] else entry
        elif current and (found := _INSTRUCTION.match(line)):
            computations[current].append(Instruction(*found.groups()))
    if "#" in text:
        computations = {name: _with_elements(lines) for name, lines in computations.items()}
    runs: Counter[str] = Counter()

    def visit(name: str, times: int) -> None:
        runs[name] += times
        for instruction in computations[name]:
            for called, factor in _called(instruction, computations):
                visit(called, times * factor)

    visit(entry, 1)
    return Module(computations, runs)


def _with_elements(lines: list[Instruction]) -> list[Instruction]:
    """The lines of a computation with those that take elements of tuples, where operands name these as `%tuple#3`."""
    types = {line.name: line.type for line in lines}
    found: list[Instruction] = []
    taken: set[str] = set()
    for line in lines:
        for name, index in _ELEMENT.findall(line.rest):
            if f"{name}.element_{index}" not in taken and name in types:
                taken.add(f"{name}.element_{index}")
                part = _elements(types[name])[int(index)]
                found.append(
                    Instruction(f"{name}.element_{index}", part, "get-tuple-element", f"%{name}), index={index}")
                )
        found.append(line._replace(rest=_ELEMENT.sub(r"%\1.element_\2", line.rest)))
    return found


def _elements(type_text: str) -> list[str]:
    """The types of the elements of a tuple."""
    parts, depth = [""], 0
    for character in type_text[1:-1]:
        depth += (character in "([{") - (character in ")]}")
        if character == "," and depth == 0:
            parts.append("")
        else:
            parts[-1] += character
    return parts


def _called(instruction: Instruction, computations: dict[str, list[Instruction]]) -> Iterator[tuple[str, int]]:
    """`Module.called`, before there is a module."""
    if instruction.opcode == "while":
        condition, body = (re.search(rf"{part}=%?([\w.\-]+)", instruction.rest) for part in ("condition", "body"))
        assert condition is not None
        assert body is not None
        known = re.search(r'"known_trip_count":\{"n":"(\d+)"', instruction.rest)
        yield body[1], int(known[1]) if known else _trips(computations[condition[1]])
    elif instruction.opcode in ("fusion", "call", "async-start"):
        for name in re.findall(r"(?:calls|to_apply)=%?([\w.\-]+)", instruction.rest):
            yield name, 1
    elif instruction.opcode in ("conditional", "custom-call"):
        # On 7x chips, collectives are computations that a custom call runs on a separate core.
        for names in re.findall(r"(?:branch|called)_computations=\{([^}]*)\}", instruction.rest):
            yield from ((name.strip(" %"), 1) for name in names.split(","))
        for name in re.findall(r"(?:true|false)_computation=%?([\w.\-]+)", instruction.rest):
            yield name, 1


def _trips(condition: list[Instruction]) -> int:
    constants = [
        int(value[1])
        for line in condition
        if line.opcode == "constant" and (value := re.match(r"(\d+)\)", line.rest)) is not None
    ]
    return max(constants, default=1)


def element_bits(dtype: str) -> int:
    """Bits of an element; of `f8e4m3fn` the first number."""
    number = re.search(r"\d+", dtype)
    return _BITS.get(dtype) or (0 if number is None else int(number[0]))


def array_bytes(type_text: str) -> list[int]:
    """Bytes of each array of an instruction's type, unpadded."""
    sizes = []
    for dtype, shape in _ARRAY.findall(type_text):
        sizes.append(math.prod(int(size) for size in shape.split(",") if size) * element_bits(dtype) // 8)
    return sizes


def collectives(module: Module, axis_names: tuple[str, ...], axis_sizes: tuple[int, ...]) -> list[Collective]:
    """The collectives of a module that was compiled for a mesh of these axes, without those of a single device."""
    found = []
    chains: set[str] = set()
    for instruction, computation, times in module.instructions():
        if instruction.opcode.removesuffix("-start") not in COLLECTIVES:
            continue
        # A collective that overlaps several fusions appears in each of them.
        if (number := chain(instruction)) is not None:
            if number in chains:
                continue
            chains.add(number)
        if (one := collective(module, computation, instruction, times, axis_names, axis_sizes)) is not None:
            found.append(one)
    return found


def chain(instruction: Instruction) -> str | None:
    """The number that the parts of one collective in several fusions share."""
    found = re.search(r'chain_id="(\d+)"', instruction.rest)
    return None if found is None else found[1]


def collective(
    module: Module,
    computation: str,
    instruction: Instruction,
    times: int,
    axis_names: tuple[str, ...],
    axis_sizes: tuple[int, ...],
) -> Collective | None:
    """One instruction of a module as a collective; None if its groups are single devices."""
    kind = instruction.opcode.removesuffix("-start")
    group = _first_group(instruction.rest, math.prod(axis_sizes))
    if len(group) == 1:
        return None
    places = np.array(np.unravel_index(group, axis_sizes))
    axes = tuple(name for name, row in zip(axis_names, places, strict=True) if len(set(row.tolist())) > 1)
    arrays = array_bytes(instruction.type)
    if instruction.opcode.endswith("-start") and instruction.type.startswith("(") and kind != "all-reduce":
        arrays = [max(arrays)]
    size, others = float(sum(arrays)), (len(group) - 1) / len(group)
    if kind == "all-reduce":
        # The TPU compiler fuses an all-reduce and the slice of its result into this computation, a reduce-scatter.
        scattered = computation.startswith("all-reduce-scatter")
        kind = "reduce-scatter" if scattered else kind
        sent = size * others * (1 if scattered else 2)
    elif kind == "reduce-scatter":
        sent = size * len(group) * others
    elif kind == "ragged-all-to-all":
        types = {line.name: line.type for line in module.computations[computation]}
        operands = re.findall(r"%([\w.\-]+)", instruction.rest.partition(")")[0])
        sent = min(sum(array_bytes(types[operand])) for operand in operands[:2]) * others
    else:
        sent = size * (1 if kind == "collective-permute" else others)
    shapes = tuple(f"{dtype}[{shape}]" for dtype, shape in _ARRAY.findall(instruction.type))
    source = re.search(r'op_name="([^"]*)"', instruction.rest)
    return Collective(kind, shapes, axes, len(group), times, sent, source[1] if source else "")


def collective_inside(module: Module, computation: str, line: Instruction) -> tuple[str, Instruction] | None:
    """The collective that an instruction runs or starts, itself or inside a fusion, and the computation around it."""
    if line.opcode.removesuffix("-start") in COLLECTIVES:
        return computation, line
    if line.opcode not in ("async-start", "fusion", "custom-call"):
        return None
    parts = ((inner, part) for inner, _ in module.called(line) for part in module.computations[inner])
    return next((found for part in parts if (found := collective_inside(module, *part)) is not None), None)


def kernel_inside(module: Module, line: Instruction) -> str | None:
    """The name of the Pallas kernel, or of cuDNN's, that an instruction is or that a fusion is made around."""
    if line.opcode == "custom-call":
        target = re.search(r'custom_call_target="([^"]*)"', line.rest)
        called = "" if target is None else target[1]
        if called == "tpu_custom_call":
            # The compiler adds to a kernel's name, always behind a dot: `expert_ffn_in.5`, `expert_ffn_in.5.refs_7_`.
            return line.name.partition(".")[0]
        if "triton" in called and (name := re.search(r'[ {]name = "([^"]*)"', line.rest)):
            return name[1]
        # Behind Mosaic's kernels in the path of names is that of the function that calls them.
        if called.startswith("mosaic_gpu") and (name := re.search(r'op_name="(?:[^"]*/)?([^"/]+)/[^"/]+"', line.rest)):
            return name[1]
        return called.removeprefix("__cudnn$") if called.startswith("__cudnn$") else None
    if line.opcode != "fusion":
        return None
    parts = (part for inner, _ in module.called(line) for part in module.computations[inner])
    return next((found for part in parts if (found := kernel_inside(module, part)) is not None), None)


def kernels(module: Module) -> Counter[str]:
    """Executions per step of each Pallas kernel and each of cuDNN's attention, by name."""
    found: Counter[str] = Counter()
    for instruction, _, times in module.instructions():
        if instruction.opcode == "custom-call" and (name := kernel_inside(module, instruction)) is not None:
            found[name] += times
    return found


def _first_group(rest: str, num_devices: int) -> NDArray[np.int64]:
    """Devices of the first group, from any of XLA's notations of groups."""
    everyone = np.arange(num_devices)
    if listed := re.search(r"replica_groups=\{\{([\d,]+)\}", rest):
        return np.array([int(device) for device in listed[1].split(",")])
    if iota := re.search(r"replica_groups=\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", rest):
        shape, dims = (tuple(map(int, iota[i].split(","))) for i in (1, 2))
        order = tuple(map(int, iota[3].split(","))) if iota[3] else tuple(range(len(dims)))
        return everyone.reshape(dims).transpose(order).reshape(shape)[0]
    if mesh := re.search(r"replica_groups=mesh\[([^\]]*)\](?:[^{]*?)\{([^}]*)\}", rest):
        sizes = {name: int(size) for name, size in re.findall(r"'([^']+)'=(\d+)", mesh[1])}
        over = re.findall(r"'([^']+)'", mesh[2])
        index = tuple(slice(None) if name in over else 0 for name in sizes)
        return everyone.reshape(tuple(sizes.values()))[index].reshape(-1)
    if pairs := re.search(r"source_target_pairs=\{(.*?)\}\}", rest):
        moves = [pair for pair in re.findall(r"(\d+),(\d+)", pairs[1]) if pair[0] != pair[1]]
        return np.array(moves[0] if moves else [0], np.int64)
    return everyone
