"""`unipool convert`: weights out of a run, into a new run, or from one architecture to another."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from unipool_jax.config.compose import Choices, compose_config
from unipool_jax.config.rules import validate
from unipool_jax.config.schema import Config, ConfigError, MeshConfig
from unipool_jax.convert.absorb import absorb, absorbed_config
from unipool_jax.convert.calibration import HeldOut, calibration_windows, inherited, passes
from unipool_jax.convert.files import read_description, read_file, write_file
from unipool_jax.convert.gguf import read_gguf
from unipool_jax.convert.inheritance import Origin, imported_config, origin_of, same_text, upcycled_config
from unipool_jax.convert.layouts import LAYOUT_NAMES
from unipool_jax.convert.requests import ExportRequest, ImportRequest, UpcycleRequest
from unipool_jax.convert.runs import read_run, write_run
from unipool_jax.convert.upcycle import upcycle
from unipool_jax.convert.weights import Weights
from unipool_jax.data.corpus import open_corpus


def export_command(request: ExportRequest) -> int:
    """Write the weights of a run to a file.

    Raises:
      RunError, CheckpointError, ConversionError: with what to do about it.
    """
    config, weights = read_run(request.run, request.step)
    origin = origin_of(request.run, request.step)
    if request.absorb_postnorm:
        config, weights = _absorbed(config, weights, origin, request.tokens)
    count = write_file(Path(request.out), request.layout, config, weights, origin)
    print(f"{request.out}: {config.scale_name} {config.method_name} in the {request.layout} layout, {count} experts")
    return 0


def _absorbed(config: Config, weights: Weights, origin: Origin, tokens: int) -> tuple[Config, Weights]:
    """The model without norms behind its blocks; prints its loss."""
    target = absorbed_config(config)
    _validate(target)
    corpus = open_corpus(config.data, config.model.vocab_size)
    inherited(origin, config, target, corpus, "export")
    before, after = (dataclasses.replace(c, mesh=MeshConfig(data=1)) for c in (config, target))
    found = absorb(before, weights, passes(calibration_windows(before, corpus, tokens, seed=0)))
    source, absorbed = HeldOut(before, corpus), HeldOut(after, corpus)
    if source.split is not None:
        losses = f"{source.result(weights).loss:.4f}, with norms absorbed {absorbed.result(found).loss:.4f}"
        print(f"loss on {source.split} (nats per token): {losses}")
    return target, found


def import_command(request: ImportRequest) -> int:
    """Make a run of a file.

    Raises:
      ConfigError, ConversionError: with what to do about it.
    """
    file, folder, choices = Path(request.file), Path(request.run), request.config
    if file.suffix == ".gguf":
        described, weights, tokenizer = read_gguf(file)
        config = imported_config(described, choices, str(file))
        _validate(config)
        write_run(folder, config, weights, Origin(tokenizer))
        print(f"{folder}: dense model of {config.model.num_layers} layers from {file}, at step 0; {_text_of(config)}")
        return 0
    noted_layout, noted_config, origin = read_description(file)
    layout = request.layout or noted_layout
    if layout is None:
        raise ConfigError([f"layout=: {file} does not name its layout; choose one of {', '.join(LAYOUT_NAMES)}"])
    if noted_config is None:
        config = compose_config() if choices is None else compose_config(choices.words, choices.config_dir)
    else:
        config = noted_config if choices is None else choices.onto(noted_config)
        if not same_text(config.data, noted_config.data):
            kept = origin.tokenizer if config.data.tokenizer == noted_config.data.tokenizer else None
            origin = Origin(kept)
    _validate(config)
    count = write_run(folder, config, read_file(file, layout, config), origin)
    print(
        f"{folder}: {config.scale_name} {config.method_name} from {file}, {count} experts, at step 0; "
        f"{_text_of(config)}"
    )
    return 0


def upcycle_command(request: UpcycleRequest) -> int:
    """Make a run of another architecture of a run.

    Raises:
      ConfigError, RunError, CheckpointError, ConversionError: with what to do about it.
    """
    config, weights = read_run(request.run, request.step)
    origin = origin_of(request.run, request.step)
    choices = request.config or Choices(("method=unipool",))
    target = upcycled_config(config, choices)
    _validate(target)
    kept = Origin(text=origin.text if same_text(config.data, target.data) else None, parent=origin.parent)
    count = write_run(Path(request.out), target, upcycle(config, weights, target, request.noise), kept)
    print(f"{request.out}: {target.scale_name} {target.method_name}, {count} experts, at step 0; {_text_of(target)}")
    return 0


def _validate(config: Config) -> None:
    """Raises ConfigError for what cannot be run; text is read later, perhaps on another machine."""
    validate(dataclasses.replace(config, mode="describe"))


def _text_of(config: Config) -> str:
    """Which text training will read."""
    data = config.data
    names = ["the demo corpus"] if data.source == "demo" else [*data.files, *data.stores]
    return f"its text is {', '.join(names)}"
