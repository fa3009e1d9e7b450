"""Parse nested plain mappings into a typed `Config`, reporting all unknown keys and wrong types at once."""

from __future__ import annotations

import dataclasses
import types
import typing
from collections.abc import Mapping
from typing import Any, Literal

from unipool_jax.config.schema import Config, ConfigError


def from_mapping(mapping: Mapping[str, Any]) -> Config:
    """The `Config` of nested plain mappings; missing keys take their defaults.

    Raises:
      ConfigError: unknown keys and values of the wrong type, all of them.
    """
    problems: list[str] = []
    config = parse_value(Config, mapping, "", problems)
    if problems:
        raise ConfigError(problems)
    return config


KIND_NAMES = {int: "a whole number", float: "a number", bool: "true or false", str: "text"}


def alternatives(kind: Any) -> list[Any]:
    """The types that a setting may have, without null."""
    if typing.get_origin(kind) in (typing.Union, types.UnionType):
        return [argument for argument in typing.get_args(kind) if argument is not type(None)]
    return [kind]


def bare(kind: Any) -> Any:
    """`X` of `X | None`."""
    return alternatives(kind)[0]


def as_written(value: Any) -> Any:
    """A value of a setting as messages show it: a tuple is written as a list."""
    return list(value) if isinstance(value, tuple) else value


def parse_value(kind: Any, value: Any, path: str, problems: list[str]) -> Any:
    """`value` as a `kind`, or None with an entry in `problems`; `path` is the name of the setting."""
    if dataclasses.is_dataclass(kind) and isinstance(kind, type):
        return _parse_section(kind, value, path, problems)
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin in (typing.Union, types.UnionType):
        if value is None and type(None) in arguments:
            return None
        # Of a list and a single value, the one that was given.
        several = isinstance(value, list | tuple)
        kinds = alternatives(kind)
        fitting = [one for one in kinds if (typing.get_origin(one) is tuple) == several]
        return parse_value((fitting or kinds)[0], value, path, problems)
    if origin is Literal:
        if value in arguments and isinstance(value, str):
            return value
        problems.append(f"{path}={value!r}: choose one of {', '.join(arguments)}")
    elif origin is tuple:
        if isinstance(value, str) and arguments[0] is str:
            value = [value]  # one file needs no brackets
        if isinstance(value, list | tuple):
            return tuple(parse_value(arguments[0], item, f"{path}[{i}]", problems) for i, item in enumerate(value))
        problems.append(f"{path}={value!r}: expected a list, for example {path}=[a,b]")
    elif kind is float and isinstance(value, int | float) and not isinstance(value, bool):
        return float(value)
    elif isinstance(value, kind) and (kind is bool or not isinstance(value, bool)):
        return value
    elif kind is int and isinstance(value, float) and value.is_integer():
        problems.append(f"{path}={value!r}: expected a whole number; write {path}={int(value)}")
    elif kind is str and isinstance(value, int | float):
        # Of an item of a list the name is that of the list.
        name, _, item = path.partition("[")
        quoted = f"['{value}']" if item else f"'{value}'"
        problems.append(f'{path}={value!r}: expected text; quote it, on a command line twice: "{name}={quoted}"')
    else:
        given = "null" if value is None else repr(value)
        problems.append(f"{path}={given}: expected {KIND_NAMES[kind]}")
    return None


def _parse_section(kind: Any, value: Any, path: str, problems: list[str]) -> Any:
    if not isinstance(value, Mapping):
        problems.append(f"{path}={value!r}: expected a section with settings")
        return None
    hints = typing.get_type_hints(kind)
    prefix = f"{path}." if path else ""
    for key in value:
        if key not in hints:
            problems.append(f"{prefix}{key}: no such setting; choose one of {', '.join(sorted(hints))}")
    found = {key: parse_value(hints[key], value[key], prefix + key, problems) for key in hints if key in value}
    return None if problems else kind(**found)
