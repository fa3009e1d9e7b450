"""`unipool convert`: weights out of a run, into a new run, or from one architecture to another."""

from __future__ import annotations

from pathlib import Path

from unipool_jax.config.compose import compose_config
from unipool_jax.config.rules import validate
from unipool_jax.config.schema import ConfigError
from unipool_jax.convert.files import read_description, read_file, write_file
from unipool_jax.convert.gguf import read_gguf
from unipool_jax.convert.layouts import LAYOUT_NAMES
from unipool_jax.convert.requests import ExportRequest, ImportRequest, UpcycleRequest
from unipool_jax.convert.runs import read_run, write_run
from unipool_jax.convert.upcycle import upcycle


def export_command(request: ExportRequest) -> int:
    """Write the weights of a run to a file.

    Raises:
      RunError, CheckpointError, ConversionError: with what to do about it.
    """
    config, weights = read_run(request.run, request.step)
    count = write_file(Path(request.out), request.layout, config, weights)
    print(f"{request.out}: {config.scale_name} {config.method_name} in the {request.layout} layout, {count} experts")
    return 0


def import_command(request: ImportRequest) -> int:
    """Make a run of a file.

    Raises:
      ConfigError, ConversionError: with what to do about it.
    """
    file, folder = Path(request.file), Path(request.run)
    if file.suffix == ".gguf":
        config, weights, tokenizer = read_gguf(file)
        write_run(folder, config, weights, tokenizer)
        print(f"{folder}: dense model of {config.model.num_layers} layers from {file}, at step 0")
        return 0
    noted_layout, noted_config = read_description(file)
    layout = request.layout or noted_layout
    if layout is None:
        raise ConfigError([f"layout=: {file} does not name its layout; choose one of {', '.join(LAYOUT_NAMES)}"])
    config = request.config or noted_config or compose_config()
    validate(config)
    count = write_run(folder, config, read_file(file, layout, config))
    print(f"{folder}: {config.scale_name} {config.method_name} from {file}, {count} experts, at step 0")
    return 0


def upcycle_command(request: UpcycleRequest) -> int:
    """Make a run of another architecture of a run.

    Raises:
      ConfigError, RunError, CheckpointError, ConversionError: with what to do about it.
    """
    target = request.config or compose_config()
    validate(target)
    config, weights = read_run(request.run, request.step)
    count = write_run(Path(request.out), target, upcycle(config, weights, target, request.noise))
    print(f"{request.out}: {target.scale_name} {target.method_name}, {count} experts, at step 0")
    return 0
