"""Command line: weights out of a run, into a new run, or from one architecture to another.

python -m unipool_jax.convert export run=runs/demo out=demo.safetensors [step=200] [layout=twin|megatron]
python -m unipool_jax.convert import file=demo.safetensors run=runs/imported
python -m unipool_jax.convert import file=published.safetensors layout=megatron run=runs/182m scale=182m method=unipool
python -m unipool_jax.convert import file=SmolLM2-135M.gguf run=runs/smollm2
python -m unipool_jax.convert upcycle run=runs/dense out=runs/mixture method=vanilla moe.experts_per_layer=4
python -m unipool_jax.convert upcycle run=runs/dense out=runs/pool method=unipool noise=0.01

A file that `export` wrote names its own layout and configuration; for other files give the layout and the settings of
the model as for `train.py`; a GGUF file (LLaMA-style, dense) describes itself. `upcycle` makes a model of another
architecture that computes the same, if there is one; give its settings as for `train.py`. With NormRouter, layers of
such a model never come to share experts; `noise=STD` gives up equality for that. A new run starts at step 0 with a
fresh optimiser.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from pathlib import Path

from unipool_jax.config.compose import compose_config
from unipool_jax.config.rules import validate
from unipool_jax.config.schema import ConfigError
from unipool_jax.convert.errors import ConversionError
from unipool_jax.convert.files import read_description, read_file, write_file
from unipool_jax.convert.gguf import read_gguf
from unipool_jax.convert.layouts import LAYOUT_NAMES, LayoutName
from unipool_jax.convert.runs import read_run, write_run
from unipool_jax.convert.upcycle import upcycle
from unipool_jax.training.entry import EXIT_FAILED, guarded


def _take(words: list[str], *names: str) -> dict[str, str]:
    """The `NAME=VALUE` words of these names, taken out of `words`."""
    found = {}
    for word in list(words):
        name, equals, value = word.partition("=")
        if equals and name in names:
            found[name] = value
            words.remove(word)
    return found


def _need(options: dict[str, str], name: str, example: str) -> str:
    if not options.get(name):
        raise ConfigError([f"{name}=...: missing; for example {name}={example}"])
    return options[name]


def _step(options: dict[str, str]) -> int | None:
    step = options.get("step")
    if step is not None and not step.isdigit():
        raise ConfigError([f"step={step}: expected the number of a checkpoint"])
    return None if step is None else int(step)


def _noise(options: dict[str, str]) -> float:
    text = options.get("noise", "0")
    try:
        noise = float(text)
    except ValueError:
        noise = math.nan
    if not 0 <= noise < math.inf:
        raise ConfigError([f"noise={text}: expected a standard deviation, 0 or more; for example noise=0.01"])
    return noise


def _layout(options: dict[str, str], default: LayoutName | None) -> LayoutName:
    wanted = options.get("layout", default)
    for name in LAYOUT_NAMES:
        if name == wanted:
            return name
    raise ConfigError([f"layout={wanted}: choose one of {', '.join(LAYOUT_NAMES)}"])


def _export(words: list[str]) -> None:
    options = _take(words, "run", "step", "out", "layout")
    if words:
        raise ConfigError([f"{word}: not understood; use run= step= out= layout=" for word in words])
    out, layout = Path(_need(options, "out", "model.safetensors")), _layout(options, "twin")
    config, weights = read_run(options.get("run", "latest"), _step(options))
    count = write_file(out, layout, config, weights)
    print(f"{out}: {config.scale_name} {config.method_name} in the {layout} layout, {count} experts")


def _import(words: list[str]) -> None:
    options = _take(words, "file", "run", "layout")
    file, folder = Path(_need(options, "file", "model.safetensors")), Path(_need(options, "run", "runs/imported"))
    if file.suffix == ".gguf":
        if words:
            raise ConfigError([f"{word}: not understood; a GGUF file describes its model" for word in words])
        config, weights, tokenizer = read_gguf(file)
        write_run(folder, config, weights, tokenizer)
        print(f"{folder}: dense model of {config.model.num_layers} layers from {file}, at step 0")
        return
    noted_layout, noted_config = read_description(file)
    layout = _layout(options, noted_layout)
    config = noted_config if noted_config is not None and not words else compose_config(words)
    validate(config)
    count = write_run(folder, config, read_file(file, layout, config))
    print(f"{folder}: {config.scale_name} {config.method_name} from {file}, {count} experts, at step 0")


def _upcycle(words: list[str]) -> None:
    options = _take(words, "run", "step", "out", "noise")
    folder = Path(_need(options, "out", "runs/mixture"))
    noise = _noise(options)
    config, weights = read_run(options.get("run", "latest"), _step(options))
    target = compose_config(words)
    validate(target)
    count = write_run(folder, target, upcycle(config, weights, target, noise))
    print(f"{folder}: {target.scale_name} {target.method_name}, {count} experts, at step 0")


_COMMANDS = {"export": _export, "import": _import, "upcycle": _upcycle}


def main(arguments: Sequence[str]) -> int:
    """Run the command line; returns the exit code: 0, 1 for weights that do not fit, 2 for a wrong command line."""
    words = list(arguments)

    def run() -> int:
        if not words or words[0] not in _COMMANDS:
            raise ConfigError([f"{words[0] if words else 'no command'}: choose one of {', '.join(_COMMANDS)}"])
        try:
            _COMMANDS[words[0]](words[1:])
        except ConversionError as error:
            print(error, file=sys.stderr)
            return EXIT_FAILED
        return 0

    return guarded(run)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
