"""A run as it is found: its folder may have been moved, and the working folder may be another than that of training.

Relative paths in a run's configuration are relative to the folder that its training started in. That folder is found
from the run's own, if the two moved together, or is the recorded one; the working folder comes last. What a run needs
to be used, such as its tokenizer, is inside it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from unipool_jax.config.data_rules import TOKENIZER_SIZES
from unipool_jax.config.parsing import from_mapping
from unipool_jax.config.paths import expanded, named_files
from unipool_jax.config.schema import Config

TOKENIZER = "tokenizer.json"
"""In the folder of a run, if its tokenizer is not a built-in one."""


def opened_config(folder: Path, meta: Mapping[str, Any]) -> Config:
    """The configuration in the meta document of a checkpoint of the run in `folder`, as `relocated`."""
    return relocated(folder, from_mapping(meta["config"]), meta.get("started_in"))


def relocated(folder: Path, config: Config, started_in: str | None = None) -> Config:
    """The configuration of the run in `folder`, with paths that are valid in the working folder.

    Args:
      folder: of the run, wherever it lies now.
      config: as it was stored.
      started_in: the folder that its training started in, if that is known.
    """
    data, bases = config.data, list(_bases(folder, config, started_in))
    tokenizer = data.tokenizer
    if tokenizer not in TOKENIZER_SIZES:
        own = folder / TOKENIZER
        tokenizer = str(own) if own.is_file() else _placed((tokenizer,), bases, Path.is_file)[0]
    data = dataclasses.replace(
        data,
        files=_placed(data.files, bases, lambda path: bool(named_files(str(path)))),
        stores=_placed(data.stores, bases, lambda path: path.is_dir() or Path(f"{path}.idx").is_file()),
        template=_placed((data.template,), bases, Path.is_file)[0],
        cache_dir=_placed((data.cache_dir,), bases, Path.is_dir)[0],
        tokenizer=tokenizer,
    )
    return dataclasses.replace(
        config, data=data, run=dataclasses.replace(config.run, dir=str(folder.parent), name=folder.name)
    )


def _bases(folder: Path, config: Config, started_in: str | None) -> Iterator[Path]:
    """Folders that relative paths may be relative to, the likeliest first."""
    parts, above = Path(config.run.dir).parts, folder.resolve().parent
    if not Path(config.run.dir).is_absolute() and (not parts or above.parts[-len(parts) :] == parts):
        yield above.parents[len(parts) - 1] if parts else above
    if started_in is not None:
        yield Path(started_in)


def _placed(words: tuple[str, ...], bases: list[Path], there: Callable[[Path], bool]) -> tuple[str, ...]:
    """`words` below the first base that has all of them; unchanged if there is none, or it is the working folder."""
    for base in bases:
        if base == Path.cwd():
            return words
        # An absolute word stays as it is, and so does one below the home folder.
        paths = [expanded(word) if word.startswith("~") else base / word for word in words]
        try:
            if all(map(there, paths)):
                return tuple(str(path) for path in paths)
        except (OSError, ValueError):
            continue
    return words
