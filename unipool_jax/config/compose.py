"""Compose a `Config` from `configs/` and command-line overrides; save and load it.

An entry point with Hydra's own command line writes

    register_schema()

    @hydra.main(config_path="configs", config_name="config", version_base="1.3")
    def main(node: DictConfig) -> None:
        config = config_from_omegaconf(node)
        validate(config)

Everything else calls `compose_config`.
"""

from __future__ import annotations

import difflib
import os
import re
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml
from hydra import compose, initialize_config_dir
from hydra.core.config_store import ConfigStore
from hydra.core.global_hydra import GlobalHydra
from hydra.errors import HydraException, OverrideParseException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from unipool_jax.config.parsing import from_mapping
from unipool_jax.config.schema import Config, ConfigError, settings, to_mapping

CONFIG_DIR = Path(__file__).resolve().parents[2] / "configs"


def register_schema() -> None:
    """Register the settings with Hydra as `schema`, the first entry of the defaults list in `configs/config.yaml`.

    Because it holds every key, overrides need no `+`, and Hydra rejects unknown keys.
    """
    ConfigStore.instance().store(name="schema", node=OmegaConf.create(to_mapping(Config())))


def compose_config(overrides: Sequence[str] = (), config_dir: str | os.PathLike[str] = CONFIG_DIR) -> Config:
    """The configuration of `python train.py OVERRIDES`, not validated.

    Args:
      overrides: as on the command line, for example `["scale=182m", "pool.fraction=0.5"]`.
      config_dir: folder that holds `config.yaml` and its groups.

    Raises:
      ConfigError: an override that Hydra cannot apply, an unknown key, or a value of the wrong type.
    """
    register_schema()
    # Hydra's state is global; restore that of a surrounding hydra.main or notebook.
    previous = GlobalHydra.instance().hydra
    GlobalHydra.instance().clear()
    try:
        with initialize_config_dir(os.path.abspath(config_dir), version_base="1.3"):
            node = compose("config", overrides=list(overrides))
    except (HydraException, OmegaConfBaseException, ValueError, AssertionError) as error:
        # Hydra raises the last two for an override without a key ("=3", "+=3") and for "scale=3".
        raise ConfigError(_unknown(overrides, Path(config_dir)) or [_summary(error)]) from error
    finally:
        GlobalHydra.instance().hydra = previous
    return config_from_omegaconf(node)


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


def save_config(config: Config, path: str | os.PathLike[str]) -> None:
    """Write `config` as YAML, atomically: a reader sees the previous file or all of the new one."""
    target = Path(path)
    text = yaml.safe_dump(_plain(to_mapping(config)), sort_keys=False, allow_unicode=True)
    descriptor, temporary = tempfile.mkstemp(dir=target.parent, prefix=f".{target.name}.")
    try:
        with os.fdopen(descriptor, "w", encoding="utf-8") as stream:
            stream.write(text)
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(temporary, target)
    except BaseException:
        os.unlink(temporary)
        raise


def load_config(path: str | os.PathLike[str]) -> Config:
    """Read a configuration written by `save_config`.

    Raises:
      FileNotFoundError: there is no such file.
      ConfigError: the file is not a configuration of this version.
    """
    text = Path(path).read_text(encoding="utf-8")
    try:
        mapping = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ConfigError([f"{path}: not a YAML file: {' '.join(str(error).split())}"]) from error
    if not isinstance(mapping, dict):
        raise ConfigError([f"{path}: expected the sections of a configuration, found {type(mapping).__name__}"])
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
    return [f"{name}={_hydra_value(values[name])}" for name in differences(base, config)]


def _hydra_value(value: Any) -> str:
    if isinstance(value, tuple):
        return f"[{','.join(map(_hydra_value, value))}]"
    if not isinstance(value, str):
        return "null" if value is None else repr(value).lower()
    if re.fullmatch(r"[A-Za-z_./][\w./:-]*", value) and value.lower() not in {"null", "true", "false", "inf", "nan"}:
        return value
    # Inside Hydra's quotes only a backslash before a quote is an escape; double those that precede one.
    return "'" + re.sub(r"(\\*)('|$)", lambda found: found[1] * 2 + ("\\'" if found[2] else ""), value) + "'"


def _plain(value: Any) -> Any:
    """Tuples as lists: YAML's safe subset has no tuple."""
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, tuple) else value


def _unknown(overrides: Sequence[str], config_dir: Path) -> list[str]:
    """One message for each override of an unknown setting, group or choice; Hydra names only the first."""
    names = list(settings(Config()))
    choices: dict[str, list[str]] = {}
    for path in sorted(config_dir.glob("*/*.yaml")):
        choices.setdefault(path.parent.name, []).append(path.stem)
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
        elif key not in names and not key.startswith("hydra"):
            near = difflib.get_close_matches(key, [*names, *choices], n=3)
            hint = f"did you mean {' or '.join(near)}?" if near else "unipool_jax/config/schema.py lists all settings"
            problems.append(f"{key}: no such setting or group; {hint}")
    return problems


def _summary(error: Exception) -> str:
    """Hydra's message on one line, without search path and links."""
    text = str(error).partition("\nConfig search path:")[0].partition("\nSee https:")[0]
    text, _, rest = text.partition("\n    full_key: ")
    where = f"{rest.splitlines()[0]}: " if rest else ""
    if isinstance(error, OverrideParseException):
        where = f"{error.override}: cannot be parsed as SETTING=VALUE; a value with special characters needs quotes: "
    return where + " ".join(text.split())
