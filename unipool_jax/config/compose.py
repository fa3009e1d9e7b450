"""Compose a `Config` from `configs/` and command-line overrides; save and load it."""

from __future__ import annotations

import contextlib
import difflib
import itertools
import math
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from hydra._internal.config_loader_impl import ConfigLoaderImpl
from hydra._internal.utils import create_config_search_path
from hydra.core.config_loader import ConfigLoader
from hydra.core.config_search_path import SearchPathQuery
from hydra.core.config_store import ConfigStore
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException, OverrideParseException
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf, open_dict
from omegaconf.errors import OmegaConfBaseException

from unipool_jax.config.files import FileError, parse_yaml, read_text, read_yaml, write_text
from unipool_jax.config.parsing import bare, from_mapping
from unipool_jax.config.schema import Config, ConfigError, settings, to_mapping
from unipool_jax.config.words import NAMED, kind_of

_INSTALLED = Path(__file__).resolve().parents[1] / "configs"
CONFIG_DIR = _INSTALLED if _INSTALLED.is_dir() else _INSTALLED.parents[1] / "configs"
"""The shipped choices: inside the installed package, or at the top of a checkout."""

MAX_SWEEP = 1000
"""Command lines that a sweep makes at most; each is composed and checked before the first one starts."""

Folder = str | os.PathLike[str]


def compose_config(
    overrides: Sequence[str] = (), config_dir: Folder | None = None, base: Config | None = None
) -> Config:
    """The configuration of `unipool train OVERRIDES`; not yet validated.

    Args:
      overrides: as on the command line, for example `["scale=182m", "pool.fraction=0.5"]`.
      config_dir: folder of your own choices, laid over the shipped ones: a file there wins over the shipped file of the
        same name, and its groups add to the shipped groups.
      base: values of settings that no choice sets; None is the schema's defaults.

    Raises:
      ConfigError: an override that Hydra cannot apply, an unknown key, a value of the wrong type, or a file of
        `config_dir` that cannot be read.
    """
    loader = _loader(config_dir, base)
    try:
        node = loader.load_configuration("config", [_as_text(word) for word in overrides], RunMode.RUN)
    except _HYDRA_ERRORS as error:
        raise ConfigError(_unknown(overrides, config_dir) or [_summary(error)]) from error
    with open_dict(node):
        del node["hydra"]
    return config_from_omegaconf(node)


@dataclass(frozen=True)
class Choices:
    """Choices and settings of a command line, to be laid over a configuration."""

    words: tuple[str, ...]
    config_dir: Folder | None = None

    def onto(self, base: Config) -> Config:
        """`base` with these choices and settings; what they do not name stays. Not yet validated.

        A choice of `scale` or `mesh` leaves the text alone: only `data=CHOICE` and `data.NAME=VALUE` change it.

        Raises:
          ConfigError: as `compose_config`.
        """
        named = {word.partition("=")[0].lstrip("+~") for word in self.words}
        groups = {"data", "mesh", "scale", "method"}
        # A scale overrides the choice of data, for which there must be one.
        left_out = groups - named - ({"data"} if "scale" in named else set())
        found = compose_config([*(f"~{group}" for group in sorted(left_out)), *self.words], self.config_dir, base)
        before, data = to_mapping(base)["data"], to_mapping(found)["data"]
        if "data" not in named:
            data = before | {name: value for name, value in data.items() if f"data.{name}" in named}
        if data["source"] != before["source"]:
            # The lists of the source before are of no use to the new one, which would refuse them.
            data |= {name: () for name in ("files", "stores") if f"data.{name}" not in named}
        return from_mapping(to_mapping(found) | {"data": data})

    def names(self, group: str) -> bool:
        """Whether they choose from `group`."""
        return any(word.partition("=")[0].lstrip("+") == group for word in self.words)


def sweep(overrides: Sequence[str], config_dir: Folder | None = None) -> list[list[str]]:
    """The command lines that one with several values makes: all combinations, the last one varying fastest.

    `train.seed=1,2,3`, `train.seed=range(1,4)`, `method=glob(shared_*)`: the sweeps of Hydra that are finite.

    Raises:
      ConfigError: for an override that cannot be read, or has no value or infinitely many, and for more than
        `MAX_SWEEP` command lines.
    """
    problems: list[str] = []
    found: list[list[str]] = []
    parser = OverridesParser.create(config_loader=_loader(config_dir))
    for word in overrides:
        try:
            (override,) = parser.parse_overrides([word])
            if not override.is_sweep_override():
                found.append([word])
            elif override.is_discrete_sweep():
                key = override.get_key_element()
                found.append([f"{key}={value}" for value in override.sweep_string_iterator()])
                if not found[-1]:
                    problems.append(f"{word}: names no value, so nothing would be trained; name at least one")
            else:
                problems.append(f"{word}: has no end of values; list them: NAME=1,2,3 or NAME=range(1,4)")
        except _HYDRA_ERRORS as error:
            problems.append(_summary(error))
    if (count := math.prod(map(len, found))) > MAX_SWEEP:
        problems.append(f"{count:,} combinations of values; at most {MAX_SWEEP:,} can be trained by one command")
    if problems:
        raise ConfigError(problems)
    return [list(words) for words in itertools.product(*found)]


def check_config_dir(folder: Folder) -> None:
    """Raise ConfigError unless `folder` is one of choices, with every file of it that cannot be used."""
    if not Path(folder).is_dir():
        raise ConfigError([f"--config-dir {folder}: no such folder; it holds files such as scale/mine.yaml"])
    problems = []
    for path in sorted([*Path(folder).glob("*.yaml"), *Path(folder).glob("*/*.yaml")]):
        try:
            text = read_text(path, "mend or remove it")
            found = parse_yaml(text, str(path), "mend or remove it")
            if path.parent.name in ("method", "scale") and "@package" not in text:
                # Hydra would put the settings into a section of the name of the group, and these have none.
                problems.append(f"{path}: its first line must be `# @package _global_`, as in the shipped choices")
            elif not isinstance(found, dict | None):
                problems.append(f"{path}: expected settings such as `model:`, found {type(found).__name__}")
            elif found:
                section = "" if "@package" in text or path.parent == Path(folder) else f"{path.parent.name}."
                problems += [f"{path}: {problem}" for problem in _unknown_keys(found, section)]
        except FileError as error:
            problems.append(str(error))
    if problems:
        raise ConfigError(problems, f"--config-dir {folder}")


def _unknown_keys(mapping: Mapping[Any, Any], section: str) -> Iterator[str]:
    """What a file of choices sets and the schema has not; `section` is that of its settings, with a dot."""
    names = settings(Config())
    for key, value in mapping.items():
        name = f"{section}{key}"
        if isinstance(value, Mapping) and any(known.startswith(f"{name}.") for known in names):
            yield from _unknown_keys(value, f"{name}.")
        elif name not in names and key != "defaults" and not name.startswith("hydra"):
            near = difflib.get_close_matches(name, names, n=1)
            yield f"{name}: no such setting" + (f"; did you mean {near[0]}?" if near else "")


def choice_files(config_dir: Folder | None = None) -> dict[str, dict[str, Path]]:
    """Files of the choices by group and name (`scale`, `182m`), those of `config_dir` among them."""
    found: dict[str, dict[str, Path]] = {}
    for folder in (CONFIG_DIR, *([] if config_dir is None else [Path(config_dir)])):
        for path in sorted(folder.glob("*/*.yaml")):
            found.setdefault(path.parent.name, {})[path.stem] = path
    return found


# The last two escape from Hydra for an override without a setting ("=3", "+=3") and for "scale=3".
_HYDRA_ERRORS = (HydraException, OmegaConfBaseException, ValueError, AssertionError)


def _loader(config_dir: Folder | None, base: Config | None = None) -> ConfigLoader:
    """Hydra's loader of configurations; `config_dir` comes before `configs/`."""
    # Because the schema holds every key, each can be overridden without `+`, and Hydra refuses a key that is not there.
    ConfigStore.instance().store(name="schema", node=OmegaConf.create(to_mapping(base or Config())))
    path = create_config_search_path(str(CONFIG_DIR))
    if config_dir is not None:
        check_config_dir(config_dir)
        # Not with Hydra's own `hydra.searchpath`: what is named there comes last.
        path.prepend("user", f"file://{Path(config_dir).absolute()}", SearchPathQuery(provider="main"))
    # Not with `hydra.compose`: it goes through a global state that a notebook may use itself.
    return ConfigLoaderImpl(path)


def config_from_omegaconf(node: DictConfig) -> Config:
    """The `Config` of a composed node, with interpolations resolved.

    Raises:
      ConfigError: an interpolation that does not resolve, an unknown key, or a value of the wrong type.
    """
    try:
        mapping = OmegaConf.to_container(node, resolve=True, throw_on_missing=True)
    except OmegaConfBaseException as error:
        raise ConfigError([_summary(error)]) from error
    assert isinstance(mapping, dict)
    return from_mapping({str(key): value for key, value in mapping.items()})


def config_yaml(config: Config) -> str:
    """`config` as the text of a YAML file."""
    return yaml.safe_dump(_plain(to_mapping(config)), sort_keys=False, allow_unicode=True)


def save_config(config: Config, path: str | os.PathLike[str]) -> None:
    """Write `config` as YAML, atomically: a reader sees the previous file or all of the new one."""
    write_text(Path(path), config_yaml(config))


def load_config(path: str | os.PathLike[str]) -> Config:
    """Read a configuration written by `save_config`.

    Raises:
      FileError: the file cannot be read, or is no YAML.
      ConfigError: the file is not a configuration of this version.
    """
    mapping = read_yaml(Path(path))
    mesh = mapping.get("mesh")
    if isinstance(mesh, dict) and "receive_factor" in mesh:  # its name until 0.1.0
        mesh["capacity_factor"] = mesh.pop("receive_factor")
    try:
        return from_mapping(mapping)
    except ConfigError as error:
        raise ConfigError([f"{path}: {problem}" for problem in error.problems]) from error


def differences(a: Config, b: Config) -> list[str]:
    """Dotted names of the settings whose values differ, in the order of the schema."""
    values = settings(b)
    return [name for name, value in settings(a).items() if value != values[name]]


def overrides_from(base: Config, config: Config) -> list[str]:
    """The Hydra overrides `SETTING=VALUE` that turn `base` into `config`."""
    values = settings(config)
    return [f"{name}={hydra_value(values[name])}" for name in differences(base, config)]


_LITERALS = {"null", "true", "false", "inf", "nan"}
"""Words that are no text to Hydra."""


def hydra_value(value: Any) -> str:
    if isinstance(value, tuple):
        return f"[{','.join(map(hydra_value, value))}]"
    if not isinstance(value, str):
        return "null" if value is None else repr(value).lower()
    if re.fullmatch(r"(?!\.\d)[A-Za-z_./][\w./:-]*", value) and value.lower() not in _LITERALS:
        return value
    # Inside Hydra's quotes only a backslash before a quote is an escape; double those that precede one.
    return "'" + re.sub(r"(\\*)('|$)", lambda found: found[1] * 2 + ("\\'" if found[2] else ""), value) + "'"


def _plain(value: Any) -> Any:
    """Tuples as lists: YAML's safe subset has no tuple."""
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, tuple) else value


def _as_text(word: str) -> str:
    """`word`, its value quoted where its setting is text and the value looks like a number or a truth value.

    A run may be called 1e5 or true, and Hydra would not say later what was typed.
    """
    match = NAMED.fullmatch(word)
    if match is None or match[1] not in settings(Config()) or bare(kind_of(match[1])) is not str:
        return word
    with contextlib.suppress(*_HYDRA_ERRORS):
        override = OverridesParser.create().parse_override(word)
        if not override.is_sweep_override() and isinstance(override.value(), int | float):
            return f"{match[1]}={hydra_value(match[2].strip())}"
    return word


def _unknown(overrides: Sequence[str], config_dir: Folder | None) -> list[str]:
    """One message for each override of an unknown setting, group or choice; Hydra names only the first."""
    names = list(settings(Config()))
    choices = {group: list(files) for group, files in choice_files(config_dir).items()}
    problems = []
    for override in overrides:
        key, _, value = override.partition("=")
        key = key.lstrip("+~")
        if not key:
            problems.append(f"{override!r}: no setting named; write SETTING=VALUE")
        elif key in choices:
            if value not in choices[key] and not value.startswith("["):
                problems.append(f"{key}={value}: no such choice; choose one of {', '.join(choices[key])}")
        elif any(name.startswith(f"{key}.") for name in names):
            problems.append(f"{key}: a section, not a setting; override its settings: {key}.NAME=VALUE")
        elif key in names and "=" not in override and not override.startswith("~"):
            problems.append(f"{key}: no value given; write {key}=VALUE")
        elif key not in names and not key.startswith("hydra"):
            near = difflib.get_close_matches(key, [*names, *choices], n=3)
            hint = f"did you mean {' or '.join(near)}?" if near else "`unipool train --help` lists all settings"
            problems.append(f"{key}: no such setting or group; {hint}")
    return problems


def _summary(error: Exception) -> str:
    """Hydra's message on one line, without search path and links."""
    text = str(error).partition("\nConfig search path:")[0].partition("\nSee https:")[0]
    text, _, rest = text.partition("\n    full_key: ")
    where = f"{rest.splitlines()[0]}: " if rest else ""
    if several := re.search(r"Ambiguous value for argument '(([^=]*)=(.*))'$", text, re.MULTILINE):
        word, name, values = several.groups()
        return (
            f"{word}: several values; a list is {name}=[{values}], a text is \"{name}='{values}'\", and "
            "`unipool train --multirun` trains with one after another"
        )
    if isinstance(error, OverrideParseException):
        where = f"{error.override}: cannot be parsed as SETTING=VALUE; a value with special characters needs quotes: "
    return where + " ".join(text.split())
