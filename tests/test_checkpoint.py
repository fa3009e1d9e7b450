"""Checkpoints are complete or absent, exact, and say clearly what is wrong with them."""

from __future__ import annotations

import functools
import resource
import shutil
import signal
import sys
import time
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest

from unipool_jax.config.schema import Config
from unipool_jax.training.checkpoint import CheckpointError, Checkpoints, flatten, layout, make_meta
from unipool_jax.training.late_errors import hush_late_errors

OPTIMIZER = optax.adamw(1e-3, mask=lambda params: jax.tree.map(lambda x: x.ndim > 1, params))


class Balance(NamedTuple):
    bias: jax.Array
    unused: jax.Array


class State(NamedTuple):
    step: jax.Array
    params: Any
    opt_state: Any
    balance: Balance


def make_state(seed: int = 0, width: int = 64) -> State:
    params = {"layers": {"weight": jax.random.normal(jax.random.key(seed), (width, 1024))}, "gain": jnp.ones(width)}
    balance = Balance(bias=jnp.arange(3.0), unused=jnp.zeros((0, 4)))
    return State(jnp.int32(seed), params, OPTIMIZER.init(params), balance)


def items(state: State) -> dict[str, Any]:
    return state._asdict()


def target(width: int = 64) -> dict[str, Any]:
    return items(jax.eval_shape(functools.partial(make_state, width=width)))


def save(checkpoints: Checkpoints, *steps: int) -> None:
    for step in steps:
        checkpoints.save(step, items(make_state(step)), make_meta(Config(), step, "abc"))
    checkpoints.wait()


def assert_equal(a: Any, b: Any) -> None:
    structures: list[Any] = [jax.tree.structure(tree) for tree in (a, b)]
    assert structures[0] == structures[1]
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        assert x.dtype == y.dtype
        np.testing.assert_array_equal(x, y)


def test_everything_comes_back_bit_for_bit(tmp_path: Path) -> None:
    with Checkpoints(tmp_path / "checkpoints", keep=3) as checkpoints:
        save(checkpoints, 1, 2)
    with Checkpoints(tmp_path / "checkpoints", keep=3) as checkpoints:
        restored = checkpoints.restore(target())
    assert restored.step == 2
    assert_equal(restored.items, items(make_state(2)))
    assert restored.meta == make_meta(Config(), 2, "abc")
    assert restored.meta["data_position"]["sequences"] == 2 * Config().train.batch_size
    assert restored.meta["versions"]["jax"] == jax.__version__


def test_parameters_can_be_read_alone_and_beside_a_writer(tmp_path: Path) -> None:
    with Checkpoints(tmp_path, keep=3) as checkpoints:
        save(checkpoints, 5)
        with Checkpoints(tmp_path, read_only=True) as reader:
            restored = reader.restore({"params": target()["params"]})
    assert list(restored.items) == ["params"]
    assert_equal(restored.items["params"], make_state(5).params)


def test_only_the_newest_are_kept(tmp_path: Path) -> None:
    with Checkpoints(tmp_path, keep=2) as checkpoints:
        save(checkpoints, 1, 2, 3, 4)
        assert checkpoints.steps() == [3, 4]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["3", "4"]


def test_a_donated_state_is_saved_as_it_was(tmp_path: Path) -> None:
    update = jax.jit(lambda s: jax.tree.map(lambda x: x + 1, s), donate_argnums=0)
    state = jax.tree.map(jnp.zeros_like, jax.jit(functools.partial(make_state, width=2048))())
    with Checkpoints(tmp_path, keep=None) as checkpoints:
        for step in range(1, 31):
            state = update(state)
            if step % 10 == 0:
                checkpoints.save(step, items(state), make_meta(Config(), step, None))
        checkpoints.wait()
        for step in (10, 20, 30):
            for leaf in jax.tree.leaves(checkpoints.restore(target(2048), step).items):
                assert leaf.size == 0 or set(np.unique(leaf)) == {step}


def test_an_unfinished_save_is_ignored_and_cleaned_up(tmp_path: Path) -> None:
    with Checkpoints(tmp_path, keep=3) as checkpoints:
        save(checkpoints, 1)
    # What a process killed in the middle of a save leaves: the temporary name, part of the files.
    unfinished = tmp_path / "2.orbax-checkpoint-tmp"
    (unfinished / "params").mkdir(parents=True)
    with Checkpoints(tmp_path, read_only=True) as reader:
        assert reader.steps() == [1]
        assert unfinished.exists()
    with Checkpoints(tmp_path, keep=3) as checkpoints:
        assert checkpoints.restore(target()).step == 1
        save(checkpoints, 2)
        assert checkpoints.steps() == [1, 2]
    assert not unfinished.exists()


def _damage(checkpoint: Path, how: str) -> None:
    files = sorted(path for path in checkpoint.rglob("*") if path.is_file())
    if how == "truncated data":
        for path in files:
            if path.parent.name == "d":
                with path.open("r+b") as stream:
                    stream.truncate(path.stat().st_size // 2)
    elif how == "missing data":
        for path in files:
            if path.parent.name == "d":
                path.unlink()
    elif how == "empty meta":
        for path in files:
            if path.parent.name == "meta":
                path.write_bytes(b"")
    elif how == "empty item":
        for path in files:
            if "params" in path.parts:
                path.write_bytes(b"")
    else:
        raise ValueError(how)


@pytest.mark.parametrize("how", ["truncated data", "missing data", "empty meta", "empty item"])
def test_a_damaged_newest_checkpoint_gives_way_to_the_one_before(tmp_path: Path, how: str) -> None:
    with Checkpoints(tmp_path, keep=3) as checkpoints:
        save(checkpoints, 1, 2)
    _damage(tmp_path / "2", how)
    with Checkpoints(tmp_path, read_only=True) as reader, pytest.raises(CheckpointError, match=r"2.*\n.*step 1"):
        reader.restore(target(), step=2)
    with Checkpoints(tmp_path, keep=3) as checkpoints:
        with pytest.warns(UserWarning, match=r"damaged.*resuming from step 1"):
            restored = checkpoints.restore(target())
        assert restored.step == 1
        assert_equal(restored.items, items(make_state(1)))
        assert (tmp_path / "2.damaged").is_dir()
        save(checkpoints, 2)
        assert checkpoints.restore(target()).step == 2


def _flip(path: Path, byte: int) -> None:
    content = bytearray(path.read_bytes())
    content[byte] ^= 8
    path.write_bytes(content)


def _folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


def _document(checkpoint: Path) -> Path:
    return checkpoint / "meta" / "metadata"


def _flip_all(folder: Path, byte: int) -> None:
    """Small arrays lie beside indices of their size, of which some are superseded and never read."""
    for path in folder.rglob("d/*"):
        if path.is_file() and path.stat().st_size > byte:
            _flip(path, byte)


def _largest(folder: Path) -> Path:
    return max((path for path in folder.rglob("d/*") if path.is_file()), key=lambda path: path.stat().st_size)


@pytest.mark.parametrize(
    "damage",
    [
        pytest.param(lambda step: _flip(_largest(step / "params"), 1000), id="a bit of an array"),
        pytest.param(lambda step: _flip(_largest(step / "params"), -1000), id="another bit of it"),
        pytest.param(lambda step: _flip_all(step / "opt_state", 200), id="a bit of compressed zeros"),
        pytest.param(lambda step: _flip(step / "meta" / "metadata", 40), id="a bit of the document"),
        pytest.param(lambda step: _document(step).write_text('{"a": ' * 100_000), id="a deep document"),
        pytest.param(lambda step: _document(step).write_text("[]"), id="a list for a document"),
        pytest.param(lambda step: _folder(_document(step)), id="a folder for a document"),
        pytest.param(lambda step: _flip(step / "params" / "_METADATA", 30), id="a bit of an index"),
        pytest.param(lambda step: _flip(step / "params" / "manifest.ocdbt", 60), id="a bit of the manifest"),
        pytest.param(lambda step: _replace(step.parent / "1" / "params", step / "params"), id="parameters of step 1"),
        pytest.param(lambda step: _replace(step.parent / "1" / "meta", step / "meta"), id="the document of step 1"),
        pytest.param(lambda step: _replace(step.parent / "1", step), id="all of step 1 under another name"),
    ],
)
def test_no_damage_is_silent(tmp_path: Path, damage: Callable[[Path], None], capfd: pytest.CaptureFixture[str]) -> None:
    with Checkpoints(tmp_path, keep=3) as checkpoints:
        save(checkpoints, 1, 2)
    damage(tmp_path / "2")
    capfd.readouterr()
    with Checkpoints(tmp_path, read_only=True) as reader:
        with pytest.raises(CheckpointError, match=r"2: .*\nTry step 1 instead"):
            reader.restore(target(), step=2)
        with pytest.warns(UserWarning, match=r"damaged.*resuming from step 1"):
            assert_equal(reader.restore(target()).items, items(make_state(1)))
    assert "Traceback" not in capfd.readouterr().err


def test_errors_that_nobody_waits_for_are_not_printed(monkeypatch: pytest.MonkeyPatch) -> None:
    shown: list[str] = []
    monkeypatch.setattr(sys, "unraisablehook", lambda unraisable: shown.append(str(unraisable.exc_value)))
    hush_late_errors.cache_clear()
    hush_late_errors()
    for text in ("Event loop is closed", "Encountered error. See full TensorStore details", "another"):
        sys.unraisablehook(types.SimpleNamespace(exc_value=RuntimeError(text)))  # type: ignore[arg-type]
    assert shown == ["another"]
    hush_late_errors.cache_clear()


def _replace(source: Path, place: Path) -> None:
    shutil.rmtree(place)
    shutil.copytree(source, place)


def test_items_of_two_saves_of_one_step_are_not_mixed(tmp_path: Path) -> None:
    for name in ("a", "b"):
        with Checkpoints(tmp_path / name) as checkpoints:
            save(checkpoints, 1)
    _replace(tmp_path / "a" / "1" / "opt_state", tmp_path / "b" / "1" / "opt_state")
    with Checkpoints(tmp_path / "b", read_only=True) as reader:
        assert_equal(reader.restore({"params": target()["params"]}).items["params"], make_state(1).params)
        with pytest.raises(CheckpointError, match="opt_state is not of the same save as meta"):
            reader.restore(target())


def test_checkpoints_of_earlier_versions_are_read(tmp_path: Path) -> None:
    """They have no checksums, no hash and no number of a save."""
    meta = make_meta(Config(), 1, "abc")
    arrays = {name: ocp.args.StandardSave(flatten(tree)) for name, tree in items(make_state(1)).items()}
    document = ocp.args.JsonSave({**meta, "layout": layout(items(make_state(1)))})
    with ocp.CheckpointManager(tmp_path) as manager:
        manager.save(1, args=ocp.args.Composite(**arrays, meta=document))
    with Checkpoints(tmp_path, read_only=True) as reader:
        restored = reader.restore(target())
    assert_equal(restored.items, items(make_state(1)))
    assert restored.meta == meta


def test_a_second_damaged_checkpoint_of_a_step_has_a_name_of_its_own(tmp_path: Path) -> None:
    for name in ("2.damaged", "2.damaged.2"):
        (tmp_path / name / "params").mkdir(parents=True)
    with Checkpoints(tmp_path, keep=3) as checkpoints:
        save(checkpoints, 1, 2)
        _damage(tmp_path / "2", "truncated data")
        with pytest.warns(UserWarning, match=r"renamed to 2\.damaged\.3"):
            assert checkpoints.restore(target()).step == 1
    assert (tmp_path / "2.damaged.3" / "params").is_dir()


def test_nothing_is_renamed_when_all_are_damaged(tmp_path: Path) -> None:
    with Checkpoints(tmp_path, keep=3) as checkpoints:
        save(checkpoints, 1, 2)
    for step in ("1", "2"):
        _damage(tmp_path / step, "truncated data")
    with Checkpoints(tmp_path, keep=3) as checkpoints, pytest.raises(CheckpointError, match="damaged"):
        checkpoints.restore(target())
    assert sorted(path.name for path in tmp_path.iterdir()) == ["1", "2"]


def test_another_model_is_refused_by_name(tmp_path: Path) -> None:
    with Checkpoints(tmp_path, keep=3) as checkpoints:
        save(checkpoints, 1, 2)
        with pytest.raises(CheckpointError) as error:
            checkpoints.restore(target(width=32))
        assert checkpoints.steps() == [1, 2]
    message = str(error.value)
    assert "params.layers.weight: float32[64, 1024] in the checkpoint, float32[32, 1024] expected" in message
    assert "run.name" in message


def test_missing_checkpoints_are_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no such folder"):
        Checkpoints(tmp_path / "nothing", read_only=True)
    with Checkpoints(tmp_path, keep=3) as checkpoints:
        with pytest.raises(CheckpointError, match="no complete checkpoint"):
            checkpoints.restore(target())
        save(checkpoints, 4)
        with pytest.raises(CheckpointError, match=r"step 3; choose one of \[4\]"):
            checkpoints.restore(target(), step=3)


@pytest.fixture
def full_disk() -> Iterator[Any]:
    """A function that makes every file of this process larger than 64 KiB fail to write, as on a full disk."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    yield lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (64 * 1024, limits[1]))
    resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    signal.signal(signal.SIGXFSZ, handler)


def _train_on_while_saving(checkpoints: Checkpoints) -> None:
    checkpoints.save(2, items(make_state(2, width=2048)), make_meta(Config(), 2, None))
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline:
        checkpoints.check()
        time.sleep(0.001)


def test_a_failed_background_save_surfaces_and_leaves_the_others_intact(tmp_path: Path, full_disk: Any) -> None:
    with Checkpoints(tmp_path, keep=1) as checkpoints:
        save(checkpoints, 1)
    checkpoints = Checkpoints(tmp_path, keep=1)
    full_disk()
    with pytest.raises(CheckpointError, match=r"newest complete checkpoint is step 1.*free space"):
        _train_on_while_saving(checkpoints)
    resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))
    with Checkpoints(tmp_path, keep=1) as after:
        assert after.steps() == [1]
        assert_equal(after.restore(target()).items, items(make_state(1)))
        save(after, 2)
        assert after.steps() == [2]
