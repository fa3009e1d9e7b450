"""From the words of a command line to a dataclass of settings, and back.

A command declares its settings as the schema does: a frozen dataclass with a docstring under each field. Markers say
what a plain type cannot, for example:

    run: Annotated[str, Positional()] = "latest"            # may be given without its name
    top_p: Annotated[float, Range(0, 1, open_low=True)] = 0.95
    overrides: Annotated[Overrides, Accepts("data.", "train.eval_batches")] = ()

A field that holds a dataclass adds the fields of that one. A method `problems` finds what does not go together.
"""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import functools
import os
import re
import typing
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any, TypeVar

from unipool_jax.config.parsing import bare, parse_value
from unipool_jax.config.ranges import Range
from unipool_jax.config.schema import Config, ConfigError, settings

Overrides = tuple[tuple[str, Any], ...]
"""Settings of the schema by dotted name, with values of the right type."""

NAMED = re.compile(r"([+~]*[A-Za-z_][\w.@]*)=(.*)", re.DOTALL)
"""A word that gives a setting a value; anything else is a value without a name."""


@dataclass(frozen=True)
class Positional:
    """Words without a name fill this field: the first of them, or all that are left where it holds several."""


@dataclass(frozen=True)
class Verbatim:
    """Each word is one item of this tuple, also where it looks like a list."""


class Accepts:
    """This field collects settings of the schema: those with one of these names, or below a name that ends in a dot."""

    def __init__(self, *names: str):
        self.names = names

    def __contains__(self, name: object) -> bool:
        return any(name == known or (known.endswith(".") and str(name).startswith(known)) for known in self.names)


@dataclass(frozen=True)
class Composed:
    """This field is the `Choices` that no other field takes; None without such words."""


@dataclass(frozen=True)
class Field:
    """One setting of a command."""

    name: str
    kind: Any
    """Its type, without markers."""
    markers: tuple[Any, ...]
    default: Any
    """`dataclasses.MISSING` where it must be given."""
    owner: type
    """The dataclass that declares it."""

    def marker(self, kind: type[T]) -> T | None:
        """Its marker of this kind."""
        return next((marker for marker in self.markers if isinstance(marker, kind)), None)

    @property
    def several(self) -> bool:
        """Whether it holds any number of values."""
        return typing.get_origin(bare(self.kind)) is tuple


T = TypeVar("T")


@functools.cache
def kind_of(name: str) -> Any:
    """The type of a setting of the schema, by its dotted name."""
    section, _, setting = name.rpartition(".")
    hints = typing.get_type_hints(Config)
    return typing.get_type_hints(hints[section])[setting] if section else hints[setting]


@functools.cache
def fields_of(kind: type) -> tuple[Field, ...]:
    """Every setting of a command's dataclass, those of nested ones among them."""
    hints = typing.get_type_hints(kind, include_extras=True)
    found: list[Field] = []
    for entry in dataclasses.fields(kind):
        hint, markers = hints[entry.name], tuple[Any, ...]()
        if typing.get_origin(hint) is Annotated:
            hint, markers = typing.get_args(hint)[0], hint.__metadata__
        if dataclasses.is_dataclass(inner := bare(hint)) and not any(isinstance(m, Composed) for m in markers):
            assert isinstance(inner, type)
            found += fields_of(inner)
        else:
            found.append(Field(entry.name, hint, markers, entry.default, kind))
    return tuple(found)


def from_words(kind: type[T], words: Sequence[str], config_dir: str | os.PathLike[str] | None = None) -> T:
    """The settings that the words of a command line make.

    Args:
      kind: the command's dataclass.
      words: `NAME=VALUE`, or values of the fields marked `Positional`.
      config_dir: a user's folder of choices, for a field marked `Composed`.

    Raises:
      ConfigError: with every word that is not understood, every value that is not allowed and every setting that is
        missing.
    """
    reader = _Reader(kind)
    for word in words:
        reader.take(word)
    return reader.finish(kind, config_dir)


class _Reader:
    """The values found so far, by field, and what is wrong with them."""

    def __init__(self, kind: type):
        self.fields = {field.name: field for field in fields_of(kind)}
        self.accepts = next((field for field in self.fields.values() if field.marker(Accepts)), None)
        self.composed = next((field for field in self.fields.values() if field.marker(Composed)), None)
        special = {field.name for field in (self.accepts, self.composed) if field is not None}
        self.named = {name: field for name, field in self.fields.items() if name not in special}
        self.values: dict[str, Any] = {}
        self.overrides: dict[str, Any] = {}
        self.left: list[str] = []
        self.problems: list[str] = []

    def take(self, word: str) -> None:
        """Read one word."""
        match = NAMED.fullmatch(word)
        if match is None:
            self.take_value(word)
        elif (field := self.named.get(match[1])) is not None:
            self.set(field, match[2], listed=True)
        elif self.composed is not None:
            self.left.append(word)
        elif self.accepts is not None and match[1] in settings(Config()):
            self.override(*match.groups())
        else:
            self.problems.append(f"{word}: not understood; {self.hint(match[1])}")

    def take_value(self, word: str) -> None:
        """Read a word without a name."""
        positional = [field for field in self.named.values() if field.marker(Positional)]
        for field in positional:
            if field.several or field.name not in self.values:
                self.set(field, word, listed=False)
                return
        given = f"{', '.join(f'{field.name}=' for field in positional)} given already; " if positional else ""
        self.problems.append(f"{word}: not understood; {given}settings are written NAME=VALUE; {self.hint('')}")

    def set(self, field: Field, text: str, *, listed: bool) -> None:
        """Give `field` the value that `text` is."""
        if not field.several:
            if field.name in self.values:
                self.problems.append(f"{field.name}={text}: {field.name} is given twice; leave one out")
            self.values[field.name] = self.value(field, field.kind, text)
            return
        item = typing.get_args(bare(field.kind))[0]
        if listed and not field.marker(Verbatim) and (text.startswith("[") or _is_null(field.kind, text)):
            values = self.value(field, field.kind, text) or ()
        else:
            values = (self.value(field, item, text),)
        # Null, the default of such a field, is no value at all.
        self.values[field.name] = ((self.values.get(field.name) or ()) + tuple(values)) or None

    def value(self, field: Field, kind: Any, text: str) -> Any:
        """`text` as a `kind`, within the range of `field`; None with a problem noted."""
        literal = bare(kind) is str or typing.get_origin(bare(kind)) is typing.Literal
        if not text:
            self.problems.append(f"{field.name}=: empty; {self.about(field)}")
            return None
        if _is_null(kind, text):
            return None
        before = len(self.problems)
        given = text if literal else self.parsed(field.name, text)
        value = parse_value(kind, given, field.name, self.problems) if len(self.problems) == before else None
        if value == ():
            self.problems.append(f"{field.name}=[]: an empty list; leave it out, or name something")
        allowed = field.marker(Range)
        if allowed is not None and value is not None and value not in allowed:
            self.problems.append(f"{field.name}={text}: must be {allowed}")
        return value

    def override(self, name: str, text: str) -> None:
        """Read a setting of the schema."""
        assert self.accepts is not None
        accepts = self.accepts.marker(Accepts)
        assert accepts is not None
        if name not in accepts:
            self.problems.append(f"{name}={text}: not a setting that can be replaced here; {self.hint('')}")
            return
        before = len(self.problems)
        given = self.parsed(name, text)
        if len(self.problems) == before:
            self.overrides[name] = parse_value(kind_of(name), given, name, self.problems)

    def parsed(self, name: str, text: str) -> Any:
        """The value of `NAME=text` in the grammar of Hydra, as for the settings of the schema."""
        from hydra.core.override_parser.overrides_parser import OverridesParser
        from hydra.errors import HydraException

        with contextlib.suppress(HydraException):
            read = OverridesParser.create().parse_override(f"{name}={text}")
            if not read.is_sweep_override():
                return read.value()
        self.problems.append(f"{name}={text}: cannot be read; a list is {name}=[a,b]")
        return None

    def hint(self, name: str) -> str:
        """Which names there are."""
        accepts = None if self.accepts is None else self.accepts.marker(Accepts)
        near = difflib.get_close_matches(name, [*self.named, *(settings(Config()) if accepts else ())], n=2)
        if near:
            return f"did you mean {' or '.join(near)}?"
        names = [f"{known}=" for known in self.named]
        if accepts is not None:
            names += [f"{known}NAME=" if known.endswith(".") else f"{known}=" for known in accepts.names]
        positional = [
            field.name for field in self.named.values() if field.several and field.marker(Positional) is not None
        ]
        escape = f"; for a value that has an = in it, {positional[0]}='{name}=...'" if name and positional else ""
        return f"use {', '.join(names)}{escape}"

    def about(self, field: Field) -> str:
        """What `field` is, from its docstring."""
        from unipool_jax.config.docs import field_docs

        return field_docs(field.owner)[field.name].partition(". ")[0].rstrip(".")

    def finish(self, kind: type[T], config_dir: str | os.PathLike[str] | None) -> T:
        """The settings; raises ConfigError with every problem."""
        for field in self.named.values():
            if field.owner is kind and field.default is dataclasses.MISSING and field.name not in self.values:
                self.problems.append(f"{field.name}=: missing; {self.about(field)}")
        if self.accepts is not None:
            self.values[self.accepts.name] = tuple(self.overrides.items())
        if self.composed is not None and self.left:
            from unipool_jax.config.compose import Choices, compose_config

            self.values[self.composed.name] = Choices(tuple(self.left), config_dir)
            try:
                compose_config(self.left, config_dir)
            except ConfigError as error:
                self.problems += error.problems
        if not self.problems:
            made = self.build(kind)
            self.problems += getattr(made, "problems", lambda: ())()
            if not self.problems:
                return made
        raise ConfigError(self.problems, "the command line")

    def build(self, kind: type[T]) -> T:
        """A `kind` of the values found; a nested dataclass is None without any of its own."""
        hints = typing.get_type_hints(kind)
        composed = () if self.composed is None else (self.composed.name,)
        found: dict[str, Any] = {}
        for entry in dataclasses.fields(kind):  # type: ignore[arg-type]
            inner = bare(hints[entry.name])
            if dataclasses.is_dataclass(inner) and entry.name not in composed:
                assert isinstance(inner, type)
                if any(self.values.get(field.name) is not None for field in fields_of(inner)):
                    found[entry.name] = self.build(inner)
            elif entry.name in self.values:
                found[entry.name] = self.values[entry.name]
        return kind(**found)


def _is_null(kind: Any, text: str) -> bool:
    """Whether `text` is the null of a setting that may be null."""
    return text == "null" and type(None) in typing.get_args(kind)


def to_words(request: Any) -> list[str]:
    """The words that make `request`, a command's dataclass; what has its default is left out."""
    from unipool_jax.config.compose import hydra_value

    kind: type = type(request)
    fields = fields_of(kind)
    first = next((field for field in fields if field.marker(Positional)), None)
    unnamed: list[str] = []
    named: list[str] = []
    for field in fields:
        value = _get(request, field)
        if value is None or value == field.default:
            continue
        if field.marker(Accepts):
            named += [f"{name}={hydra_value(one)}" for name, one in value]
        elif not (field.marker(Positional) or isinstance(value, str)):
            named.append(f"{field.name}={hydra_value(value)}")
        else:
            for text in [value] if isinstance(value, str) else value:
                # Without its name a word goes to the first such field, if it does not look like something else.
                alone = field is first and NAMED.fullmatch(text) is None and not text.startswith("-")
                (unnamed if alone else named).append(text if alone else f"{field.name}={text}")
    return [*unnamed, *named]


def _get(request: Any, field: Field) -> Any:
    """The value of a field of `request` or of a dataclass in it; None where that one is None."""
    if isinstance(request, field.owner):
        return getattr(request, field.name)
    nested = (getattr(request, entry.name) for entry in dataclasses.fields(request))
    return next((getattr(inner, field.name) for inner in nested if isinstance(inner, field.owner)), None)
