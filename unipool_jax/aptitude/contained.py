"""What runs in the process of an executor: it gives up its rights, then runs the program on its standard input.

It is handed to `python -I -c` as text and imports nothing of this project. Rights are given up by limits of resources
and by a filter of system calls (seccomp), which neither the program nor anything it loads can take back. The filter
names what is allowed: to compute, to read files and to write to what is open. Everything else fails with "Operation not
permitted", so also what a later kernel adds.
"""

from __future__ import annotations

import ctypes
import os
import resource
import struct
import sys

MACHINE, _AUDIT = "x86_64", 0xC000003E
"""The machine whose numbers of calls these are, and its own number in the kernel's audit."""

_ALLOWED = (
    *(0, 1, 3, 4, 5, 6, 7, 8, 19, 20, 17, 21, 89, 262, 267, 332, 439),  # read, write, close; what is at a path
    *(9, 10, 11, 12, 25, 28),  # memory
    *(13, 14, 15, 131, 158, 186, 202, 204, 218, 273, 274, 334),  # signals and threads of its own
    *(22, 23, 24, 32, 33, 270, 271, 293),  # pipes, and waiting for them
    *(35, 96, 98, 99, 100, 201, 228, 229, 230),  # clocks
    *(39, 63, 79, 97, 102, 104, 107, 108, 110, 78, 217, 318),  # who and where it is, folders, random bytes
    *(60, 231),  # exit
)
_WRITING = 0o3 | os.O_CREAT | os.O_TRUNC | os.O_APPEND | 0o20000000
"""Flags of `open` that must be 0: any writing, and O_TMPFILE without the bit that it shares with O_DIRECTORY."""
_OPENING = {2: 1, 257: 2}
"""`open` and `openat`, and which argument has the flags."""
_FCNTL, _COMMANDS = 72, (0, 1, 2, 3, 1030)
"""What `fcntl` may do: copy descriptors, read flags, close on exec. Others can have a signal sent to any process."""

_LOAD, _JUMP_EQUAL, _AND, _RETURN = 0x20, 0x15, 0x54, 0x06
_ALLOW, _REFUSE, _KILL = 0x7FFF0000, 0x00050001, 0x80000000


def program() -> bytes:
    """The filter in classic BPF: load the number of the call, compare it with each that is allowed.

    In `struct seccomp_data` the number is at byte 0, the machine at 4, and the low half of argument i at 16 + 8 i.
    A comparison jumps over as many lines as its two last numbers say.
    """

    def line(code: int, value: int, equal: int = 0, other: int = 0) -> bytes:
        return struct.pack("HBBI", code, equal, other, value)

    found = [line(_LOAD, 4), line(_JUMP_EQUAL, _AUDIT, 1, 0), line(_RETURN, _KILL), line(_LOAD, 0)]
    for call, argument in _OPENING.items():
        found += [
            line(_JUMP_EQUAL, call, 0, 5),
            line(_LOAD, 16 + 8 * argument),
            line(_AND, _WRITING),
            line(_JUMP_EQUAL, 0, 0, 1),
            line(_RETURN, _ALLOW),
            line(_RETURN, _REFUSE),
        ]
    found += [line(_JUMP_EQUAL, _FCNTL, 0, 2 + 2 * len(_COMMANDS)), line(_LOAD, 16 + 8)]
    for command in _COMMANDS:
        found += [line(_JUMP_EQUAL, command, 0, 1), line(_RETURN, _ALLOW)]
    found.append(line(_RETURN, _REFUSE))
    for call in _ALLOWED:
        found += [line(_JUMP_EQUAL, call, 0, 1), line(_RETURN, _ALLOW)]
    return b"".join([*found, line(_RETURN, _REFUSE)])


def give_up_rights(cpu_seconds: int, memory_bytes: int) -> None:
    """Limits and filter, for good; raises OSError where the kernel has no filter."""
    for kind, most in (
        (resource.RLIMIT_CPU, cpu_seconds),
        (resource.RLIMIT_AS, memory_bytes),
        (resource.RLIMIT_FSIZE, 0),
        (resource.RLIMIT_CORE, 0),
        (resource.RLIMIT_NOFILE, 64),
    ):
        resource.setrlimit(kind, (most, most))
    library = ctypes.CDLL(None, use_errno=True)
    code = program()
    text = ctypes.create_string_buffer(code, len(code))
    header = struct.pack("HxxxxxxP", len(code) // 8, ctypes.addressof(text))
    zero = ctypes.c_ulong(0)
    set_no_new_privileges, set_seccomp, mode_filter = 38, 22, ctypes.c_ulong(2)
    if library.prctl(set_no_new_privileges, ctypes.c_ulong(1), zero, zero, zero) or library.prctl(
        set_seccomp, mode_filter, ctypes.create_string_buffer(header, len(header)), zero, zero
    ):
        raise OSError(ctypes.get_errno(), "seccomp")


def main(cpu_seconds: int, memory_bytes: int) -> None:
    """Run the program within limits of processor time and of address space."""
    source = sys.stdin.read()
    give_up_rights(cpu_seconds, memory_bytes)
    exec(compile(source, "program.py", "exec"), {"__name__": __name__})
