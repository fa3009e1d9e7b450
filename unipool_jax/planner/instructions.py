"""FLOPs and memory traffic of single instructions of a compiled module, from the shapes that stand in its text.

A slice moves what it takes and an update in place what it writes, whatever the size of the array around them. Arrays in
vector memory, `S(1)` in a layout, cost no traffic.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from typing import NamedTuple

from unipool_jax.planner.collectives import (
    COLLECTIVES,
    Instruction,
    Module,
    chain,
    collective_inside,
    element_bits,
    kernel_inside,
)

_ARRAY = re.compile(r"\b([a-z]+\d*[a-z0-9]*)\[([\d,]*)\](\{[^}]*\})?")
_OPERAND = re.compile(r"%([\w.\-]+)")
_FREE = (
    *("after-all", "bitcast", "constant", "get-tuple-element", "opt-barrier", "parameter", "partition-id", "tuple"),
    *("async-start", "async-update", "async-done", "copy-start", "copy-done", "slice-start", "slice-done"),
)
"""Nothing to execute, or started by another instruction: copies to vector memory run beside what stands around them."""
_MOVING = ("concatenate", "copy", "dynamic-slice", "dynamic-update-slice", "pad", "reshape", "slice", "transpose")


class Array(NamedTuple):
    """One array of an instruction's type."""

    shape: tuple[int, ...]
    bytes: float
    """Of the array in high-bandwidth memory, unpadded; 0 in vector memory."""

    @property
    def size(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)


def arrays(type_text: str) -> list[Array]:
    """The arrays of an instruction's type."""
    found = []
    for dtype, sizes, layout in _ARRAY.findall(type_text):
        shape = tuple(int(size) for size in sizes.split(",") if size)
        memory = math.prod(shape) * element_bits(dtype) / 8
        found.append(Array(shape, 0.0 if re.search(r"S\([1-9]", layout) else memory))
    return found


def operands(instruction: Instruction) -> list[str]:
    """Names of the operands of an instruction."""
    depth = 1
    for end, character in enumerate(instruction.rest):
        depth += (character == "(") - (character == ")")
        if depth == 0:
            return _OPERAND.findall(instruction.rest[:end])
    return _OPERAND.findall(instruction.rest)


class Traffic:
    """FLOPs and bytes of the instructions of a module.

    Args:
      module: as parsed.
      vector_memory: whether `S(1)` in a layout is a TPU's vector memory; on GPUs, where it is that of buffers for
        collectives, it is memory like any other.
    """

    def __init__(self, module: Module, *, vector_memory: bool = True) -> None:
        self.module = module
        self._vector_memory = vector_memory
        self._types = {name: {line.name: line.type for line in lines} for name, lines in module.computations.items()}

    def flops(self, computation: str, instruction: Instruction) -> float:
        """FLOPs of the products of an instruction, or of those inside a fusion; other arithmetic is not counted."""
        if instruction.opcode == "dot":
            return self._dot(computation, instruction)
        if instruction.opcode == "convolution":
            return self._convolution(computation, instruction)
        inner = self._inside(instruction) if instruction.opcode == "fusion" else None
        return 0.0 if inner is None else sum(self.flops(inner, line) for line in self.module.computations[inner])

    def bytes(self, computation: str, instruction: Instruction) -> float:
        """Bytes that an instruction reads from and writes to high-bandwidth memory."""
        opcode = instruction.opcode
        if opcode in _FREE or opcode.removesuffix("-start").removesuffix("-done") in COLLECTIVES:
            return 0.0
        if opcode == "fusion":
            return self._fusion(instruction)
        written = sum(array.bytes for array in self._arrays(instruction.type))
        names = operands(instruction)
        if opcode == "dynamic-update-slice":
            return 2 * self._bytes_of(computation, names[1])
        if opcode in ("dynamic-slice", "slice", "gather"):
            return 2 * written
        return written + sum(self._bytes_of(computation, name) for name in names)

    def moves(self, computation: str, instruction: Instruction) -> bool:
        """Whether an instruction copies, slices or lays out arrays anew, and computes nothing but indices."""
        if instruction.opcode == "fusion":
            inner = self._inside(instruction)
            lines = self.module.computations[inner]
            return all(self._moves_inside(inner, line) for line in lines)
        return instruction.opcode in _MOVING

    def _inside(self, fusion: Instruction) -> str:
        """The computation that a fusion runs."""
        return next(name for name, _ in self.module.called(fusion))

    def _moves_inside(self, computation: str, line: Instruction) -> bool:
        scalar = all(array.shape == () for array in self._arrays(line.type))
        return scalar or line.opcode in _FREE or self.moves(computation, line)

    def _arrays(self, type_text: str) -> list[Array]:
        return arrays(type_text if self._vector_memory else _without_layouts(type_text))

    def _operand(self, computation: str, name: str) -> list[Array]:
        return self._arrays(self._types[computation].get(name, ""))

    def _bytes_of(self, computation: str, operand: str) -> float:
        return sum(array.bytes for array in self._operand(computation, operand))

    def _shapes(self, computation: str, instruction: Instruction) -> Iterator[tuple[int, ...]]:
        for name in operands(instruction)[:2]:
            yield self._operand(computation, name)[0].shape

    def _dot(self, computation: str, instruction: Instruction) -> float:
        left, _ = self._shapes(computation, instruction)
        summed = re.search(r"lhs_contracting_dims=\{([\d,]*)\}", instruction.rest)
        terms = math.prod(left[int(axis)] for axis in summed[1].split(",") if axis) if summed else 1
        return 2.0 * self._arrays(instruction.type)[0].size * terms

    def _convolution(self, computation: str, instruction: Instruction) -> float:
        """The TPU compiler writes matrix products as convolutions, with batch axes as spatial ones."""
        left, right = self._shapes(computation, instruction)
        labels = re.search(r"dim_labels=(\w+)_(\w+)->(\w+)", instruction.rest)
        result = self._arrays(instruction.type)[0]
        if labels is None:
            return 0.0
        terms = right[labels[2].index("i")]
        for axis in filter(str.isdigit, labels[3]):
            sizes = left[labels[1].index(axis)], right[labels[2].index(axis)], result.shape[labels[3].index(axis)]
            # An axis of one size in all three is a batch axis; along any other the window is summed.
            terms *= 1 if len(set(sizes)) == 1 else min(sizes[:2])
        return 2.0 * result.size * terms

    def _fusion(self, instruction: Instruction) -> float:
        inner = self._inside(instruction)
        lines = self.module.computations[inner]
        total = sum(self._read(inner, line) for line in lines if line.opcode == "parameter")
        updates = list(self._updates(inner))
        for array in self._arrays(instruction.type):
            update = next((item for item in updates if item[0] == array.size), None)
            if update is not None:
                updates.remove(update)
            total += array.bytes if update is None else min(update[1], array.bytes)
        return total

    def _read(self, computation: str, parameter: Instruction) -> float:
        """Bytes that a fused computation reads of a parameter: what its slices take if it is only sliced."""
        whole = sum(array.bytes for array in self._arrays(parameter.type))
        taken, names = 0.0, [parameter.name]
        while names:
            name = names.pop()
            for line in self.module.computations[computation]:
                used = operands(line)
                if line.opcode == "parameter" or name not in used:
                    continue
                first = used.index(name) == 0
                if line.opcode == "bitcast":
                    names.append(line.name)
                elif line.opcode in ("dynamic-slice", "slice", "gather") and first:
                    taken += sum(array.bytes for array in self._arrays(line.type))
                elif line.opcode == "fusion":
                    inner = self._inside(line)
                    taken += self._read(inner, self._parameter(inner, used.index(name)))
                elif line.opcode != "tuple" and not (line.opcode == "dynamic-update-slice" and first):
                    return whole
        return min(whole, taken)

    def _parameter(self, computation: str, number: int) -> Instruction:
        return next(
            line
            for line in self.module.computations[computation]
            if line.opcode == "parameter" and line.rest.partition(")")[0] == str(number)
        )

    def _updates(self, computation: str) -> Iterator[tuple[int, float]]:
        """Elements of each array that a fused computation updates in place, and bytes of the update."""
        for line in self.module.computations[computation]:
            if line.opcode == "dynamic-update-slice":
                update = self._types[computation].get(operands(line)[1], "")
                # A value inside a fusion has no place of its own, whatever its layout says.
                yield self._arrays(line.type)[0].size, sum(array.bytes for array in arrays(_without_layouts(update)))
            elif line.opcode == "fusion":
                yield from self._updates(self._inside(line))


def _without_layouts(type_text: str) -> str:
    return re.sub(r"\{[^}]*\}", "", type_text)


class Clock(NamedTuple):
    """Seconds of instructions: the slower of arithmetic and traffic."""

    traffic: Traffic
    flops: float
    """FLOP/s that products reach."""
    bandwidth: float
    """Bytes/s that high-bandwidth memory reaches."""
    kernels: Mapping[str, float]
    """Seconds of one call of a hand-written kernel, by the beginning of its name."""

    def seconds(self, computation: str, instruction: Instruction) -> float:
        """Of one execution; a collective takes none here, and a loop all of its trips."""
        module, opcode = self.traffic.module, instruction.opcode
        if opcode in ("while", "call", "conditional"):
            return sum(
                times * self.seconds(name, line)
                for name, times in module.called(instruction)
                for line in module.computations[name]
            )
        source = collective_inside(module, computation, instruction)
        if source is not None and chain(source[1]) is None:
            return 0.0
        kernel = kernel_inside(module, instruction)
        known = [taken for name, taken in self.kernels.items() if kernel is not None and kernel.startswith(name)]
        if known:
            return known[0]
        if opcode == "custom-call" and kernel is None:
            return 0.0
        traffic = self.traffic
        return max(
            traffic.flops(computation, instruction) / self.flops,
            traffic.bytes(computation, instruction) / self.bandwidth,
        )

    def copies(self, computation: str, instruction: Instruction) -> float:
        """The same of an instruction that moves and computes nothing, 0 of others."""
        return self.seconds(computation, instruction) if self.traffic.moves(computation, instruction) else 0.0
