"""Processes that restore together settle on one checkpoint, also where only one of them finds damage."""

from __future__ import annotations

import shutil
import sys
import warnings
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from processes import join, run_two
from unipool_jax.config.schema import Config
from unipool_jax.training.checkpoint import CheckpointError, Checkpoints, make_meta


def test_damage_that_one_process_sees_sends_all_to_the_checkpoint_before(tmp_path: Path) -> None:
    run_two(__file__, 1, str(tmp_path))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["1", "2.damaged", "3.damaged"]


def check_agreement(folder: Path) -> None:
    """Three checkpoints, of which process 1 has lost its part of the third and process 0 its part of the second."""
    place = NamedSharding(Mesh(np.array(jax.devices()), ("rows",)), PartitionSpec("rows"))
    # Large enough that each process writes its rows to its own file.
    shape = (2, 1 << 16)
    target = {"params": {"weight": jax.ShapeDtypeStruct(shape, jnp.float32, sharding=place)}}
    with Checkpoints(folder, keep=3) as checkpoints:
        for step in (1, 2, 3):
            random = np.random.default_rng(step).standard_normal(shape, np.float32)
            weight = jax.make_array_from_callback(shape, place, random.__getitem__)
            checkpoints.save(step, {"params": {"weight": weight}}, make_meta(Config(), step, None))
        checkpoints.wait()
    if jax.process_index() == 0:
        shutil.rmtree(folder / "3" / "params" / "ocdbt.process_1" / "d")
        shutil.rmtree(folder / "2" / "params" / "ocdbt.process_0" / "d")
    multihost_utils.sync_global_devices("damaged")
    with Checkpoints(folder, keep=3) as checkpoints:
        with pytest.raises(CheckpointError, match=r"damaged checkpoint:\n.*3.*\n.*step 2"):
            checkpoints.restore(target, step=3)
        with warnings.catch_warnings(record=True) as found:
            warnings.simplefilter("always")
            restored = checkpoints.restore(target)
        texts = [str(warning.message) for warning in found if "is damaged" in str(warning.message)]
        assert len(texts) == 2, texts
        # Each process has found one of them damaged itself.
        assert sum("another process" in text for text in texts) == 1, texts
        assert restored.step == 1
        wanted = np.random.default_rng(1).standard_normal(shape, np.float32)
        for shard in restored.items["params"]["weight"].addressable_shards:
            np.testing.assert_array_equal(shard.data, wanted[shard.index])
        assert checkpoints.steps() == [1]


if __name__ == "__main__":
    check_agreement(Path(join()[0]))
    sys.stdout.flush()
