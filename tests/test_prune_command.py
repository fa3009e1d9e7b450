"""`unipool prune` on the command line: an ordinary run comes out, with a report of every choice."""

from __future__ import annotations

import json
from pathlib import Path

import jax
import numpy as np
import pytest

from runner import final_state, overrides
from test_upcycle import scaled
from unipool_jax.cli.main import execute
from unipool_jax.config.compose import compose_config
from unipool_jax.config.schema import MeshConfig
from unipool_jax.convert.errors import ConversionError
from unipool_jax.convert.inheritance import Origin
from unipool_jax.convert.runs import read_locked, read_run, write_run
from unipool_jax.data.corpus import open_corpus
from unipool_jax.data.identity import text_identity
from unipool_jax.moe.lock import router_order
from unipool_jax.moe.lock_lifecycle import new_record
from unipool_jax.parallel.mesh import make_mesh
from unipool_jax.training.checkpoint import Checkpoints, restore_model
from unipool_jax.training.entry import run
from unipool_jax.training.lineage import read_lineage
from unipool_jax.training.locking import open_lock

pytestmark = [pytest.mark.filterwarnings("ignore:NormRouter over"), pytest.mark.usefixtures("steps_are_shared")]

SIZES = ["model.num_layers=2", "model.hidden_size=12", "model.ffn_size=8", "pool.experts=4"]


@pytest.fixture(scope="module")
def parent(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of three layers and six experts that was never trained."""
    place = tmp_path_factory.mktemp("prune")
    config = compose_config(overrides(place, "model.num_layers=3", "train.steps=1", "train.eval_batches=null"))
    text = text_identity(open_corpus(config.data, config.model.vocab_size))
    write_run(place / "runs" / "parent", config, scaled(config), Origin(text=text))
    return place / "runs" / "parent"


@pytest.fixture(scope="module")
def pruned(parent: Path) -> Path:
    out = parent.with_name("pruned")
    assert execute(["prune", f"run={parent}", f"out={out}", *SIZES, "tokens=300"]) == 0
    return out


def test_the_report_has_every_choice(parent: Path, pruned: Path, capsys: pytest.CaptureFixture[str]) -> None:
    report = json.loads((pruned / "prune.json").read_text())
    assert report["layers"]["kept"] == [0, 2]
    assert report["layers"]["removals"][0]["removed"] == [1]
    assert len(report["channels"]["kept"]) == 12
    (pool,) = report["pools"]
    assert np.shape(pool["neurons"]) == (4, 8)
    assert sorted(pool["kept"] + pool["dropped"]) == list(range(6))
    # Three layers send every one of 18 windows of 16 tokens to one expert.
    assert sum(pool["tokens"]) == 3 * report["tokens"] == 3 * 18 * 16
    assert [entry["layer"] for entry in report["attention"]] == [0, 2]
    assert {entry["groups"][0]["layer"] for entry in report["attention"]} <= {0, 1, 2}
    assert report["router_constant"]["source"] != report["router_constant"]["pruned"]
    # The losses of the report are those of `unipool eval`.
    for folder, name in ((parent, "source"), (pruned, "pruned")):
        assert execute(["eval", str(folder), "splits=[valid]"]) == 0
        loss = json.loads(capsys.readouterr().out.splitlines()[-1])["results"]["valid"]["loss"]
        assert loss == pytest.approx(report["loss"][name], abs=1e-6)
    page = (pruned / "prune" / "report.html").read_text()
    assert "What was pruned: pruned" in page
    assert "model.hidden_size" in page
    (event,) = read_lineage(pruned)
    assert (event["event"], event["conversion"], event["parent"]) == ("converted", "prune", str(parent))


def test_a_pruned_run_restores_onto_a_mesh(pruned: Path) -> None:
    config, weights = read_run(str(pruned))
    assert (config.model.head_size, config.model.num_heads, config.total_experts) == (8, 2, 4)
    mesh = make_mesh(MeshConfig(data=1, fsdp=2, expert=4))
    with Checkpoints(pruned / "checkpoints", read_only=True) as checkpoints:
        model = restore_model(checkpoints, config, 0, mesh)
    assert len(model.params["pools"]["bank"]["gate"].sharding.device_set) == 8
    jax.tree.map(np.testing.assert_array_equal, model.params, weights.params)


@pytest.mark.slow
def test_training_starts_from_a_pruned_run(pruned: Path, tmp_path: Path) -> None:
    """And its weights go into a file and come back."""
    place = pruned.parents[1]
    words = [*overrides(place, *SIZES, "model.head_size=8", "train.steps=3", "train.eval_batches=null")]
    config = compose_config([*words, f"run.dir={tmp_path}", f"run.init_from={pruned}"])
    run(config)
    (step,) = {int(path.name) for path in (tmp_path / "tiny" / "checkpoints").iterdir() if path.name.isdigit()}
    before, after = final_state(config, pruned, 0), final_state(config, tmp_path / "tiny", step)
    moved = {name for name in before if "params" in name and not np.array_equal(before[name], after[name])}
    assert moved >= {name for name in before if name.startswith("['params']") and "bank" in name}
    assert execute(["convert", "export", str(pruned), f"out={tmp_path / 'a.safetensors'}"]) == 0
    assert execute(["convert", "import", str(tmp_path / "a.safetensors"), f"run={tmp_path / 'back'}"]) == 0
    jax.tree.map(np.testing.assert_array_equal, read_run(str(tmp_path / "back"))[1], read_run(str(pruned))[1])


def test_a_locked_run_loses_layers_with_their_experts(parent: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Other layers keep their experts and the logits of all experts that are left; the lock is that of fewer layers."""
    place, out = parent.parents[1], parent.with_name("unlocked")
    words = overrides(place, "model.num_layers=3", "train.steps=1", "train.eval_batches=null", "lock.entropy_target=2")
    locked = ["method=unipool_lock", *(word for word in words if not word.startswith("method="))]
    config = compose_config([*locked, "lock.ownership=random_from_start", "lock.entropy_warmup_steps=1"])
    record, weights = new_record(config), scaled(config.after_lock())
    write_run(parent.with_name("locked"), config, weights, lock=record)
    command = ["prune", str(parent.with_name("locked")), f"out={out}", "tokens=300"]
    with pytest.raises(ConversionError, match=r"only model\.num_layers can be smaller"):
        execute([*command, "model.num_layers=2", "model.ffn_size=8"])
    with pytest.raises(ConversionError, match=r"pool\.experts=5: the experts of the source belong to layers"):
        execute([*command, "model.num_layers=2", "pool.experts=5"])
    assert execute([*command, "model.num_layers=2"]) == 0
    found = read_locked(str(out))
    assert found is not None
    pruned, after, kept = found
    assert (pruned.total_experts, pruned.model.num_layers, kept.stage) == (4, 2, 2)
    old, new = record.expert_ids, kept.expert_ids
    assert old is not None
    assert new is not None
    left = np.sort(np.concatenate([old[0], old[2]]))
    for layer, source in ((0, 0), (1, 2)):
        np.testing.assert_array_equal(left[new[layer]], old[source])
        for name, bank in after.params["pools"]["bank"].items():
            np.testing.assert_array_equal(bank[layer], weights.params["pools"]["bank"][name][source])
        # Rows by expert, as every layer had them before the lock.
        rows, before = np.zeros((4, 16)), np.zeros((6, 16))
        rows[router_order(new)[layer]] = after.params["pools"]["layers"]["mixture"]["router"][layer, 0]
        before[router_order(old)[source]] = weights.params["pools"]["layers"]["mixture"]["router"][source, 0]
        np.testing.assert_array_equal(rows, before[left])
    report = json.loads((out / "prune.json").read_text())
    assert execute(["eval", str(out), "splits=[valid]"]) == 0
    loss = json.loads(capsys.readouterr().out.splitlines()[-1])["results"]["valid"]["loss"]
    assert loss == pytest.approx(report["loss"]["pruned"], abs=1e-6)
    # Training goes on behind the lock.
    meta_file = Checkpoints(out / "checkpoints", read_only=True)
    lock = open_lock(pruned, out, meta_file.meta(0), 0)
    assert lock is not None
    assert lock.structure.locked


@pytest.mark.slow
def test_norms_are_absorbed_on_the_way_into_a_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """What is imported has the loss that the export printed, and no norms behind its blocks."""
    words = [word for word in overrides(tmp_path, "method=vanilla", "model.norm=sandwich") if word != "method=unipool"]
    config = compose_config([*words, "train.eval_batches=null"])
    write_run(tmp_path / "runs" / "sandwich", config, scaled(config))
    command = ["convert", "export", str(tmp_path / "runs" / "sandwich"), f"out={tmp_path / 'a.safetensors'}"]
    assert execute([*command, "absorb_postnorm=true", "tokens=300"]) == 0
    printed = float(capsys.readouterr().out.split("with norms absorbed ")[1].split()[0])
    assert execute(["convert", "import", str(tmp_path / "a.safetensors"), f"run={tmp_path / 'plain'}"]) == 0
    assert read_run(str(tmp_path / "plain"))[0].model.norm == "pre"
    capsys.readouterr()
    assert execute(["eval", str(tmp_path / "plain"), "splits=[valid]"]) == 0
    found = json.loads(capsys.readouterr().out.splitlines()[-1])["results"]["valid"]["loss"]
    assert found == pytest.approx(printed, abs=1e-4)


def test_what_exists_is_not_overwritten(parent: Path, pruned: Path) -> None:
    with pytest.raises(ConversionError, match="already exists"):
        execute(["prune", str(parent), f"out={pruned}", *SIZES])
