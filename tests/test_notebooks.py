"""The notebooks run, and show what they say they show.

Each has one cell tagged `parameters`, its settings by name. A cell put behind it replaces some of them, as papermill
does, here by small ones; 02 looks at the run that 01 has trained.
"""

from __future__ import annotations

import html
import importlib.util
import json
import os
import re
from pathlib import Path

import nbformat
import numpy as np
import pytest
from nbclient import NotebookClient

from runner import write_text

ROOT = Path(__file__).parent.parent
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
STEPS = 24
SMALL = (
    "model.num_layers=4 model.hidden_size=32 model.num_heads=2 model.num_kv_heads=1 model.ffn_size=32 "
    "model.vocab_size=257 moe.experts_per_layer=4 data.source=files data.tokenizer=bytes data.sequence_length=128 "
    "train.batch_size=8 train.microbatch_size=8 train.eval_batches=2 train.eval_batch_size=8 train.log_every=4 "
    "train.checkpoint_every=0 run.tensorboard=false mesh=single"
)
COMPILED = (
    "mesh.topology=v5p:2x2x1 mesh.data=1 mesh.fsdp=2 mesh.expert=2 model.num_layers=2 model.hidden_size=128 "
    "model.num_heads=2 model.num_kv_heads=2 model.ffn_size=128 model.vocab_size=1024 model.compute_dtype=bfloat16 "
    "data.sequence_length=128 data.tokenizer=bytes train.batch_size=8 train.microbatch_size=8 train.eval_batch_size=8"
)


class Executed:
    """What a notebook showed."""

    def __init__(self, notebook: nbformat.NotebookNode):
        self.outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]

    @property
    def text(self) -> str:
        """Everything printed."""
        return "".join(output.text for output in self.outputs if output.output_type == "stream")

    @property
    def images(self) -> int:
        """Figures shown."""
        return sum("image/png" in output.get("data", {}) for output in self.outputs)

    @property
    def tables(self) -> list[list[list[str]]]:
        """Tables shown, each with its head as the first row."""
        pages = [output.data["text/html"] for output in self.outputs if "text/html" in output.get("data", {})]
        return [
            [
                [html.unescape(cell) for cell in re.findall(r"<t[hd][^>]*>(.*?)</t[hd]>", row, re.DOTALL)]
                for row in re.findall(r"<tr>(.*?)</tr>", page, re.DOTALL)
            ]
            for page in pages
            if "<table>" in page
        ]

    def table(self, *head: str) -> list[list[str]]:
        """Rows of the only table whose head begins like this."""
        (found,) = (table for table in self.tables if table[0][: len(head)] == list(head))
        assert len(found) > 1
        return found[1:]


def execute(name: str, folder: Path, **settings: object) -> Executed:
    """Run a notebook in its own folder, as Jupyter does, with some of its settings replaced."""
    path = ROOT / "notebooks" / f"{name}.ipynb"
    notebook = nbformat.read(path, as_version=4)
    (index,) = (i for i, cell in enumerate(notebook.cells) if "parameters" in cell.metadata.get("tags", []))
    unknown = [key for key in settings if not re.search(rf"^{key}\b", notebook.cells[index].source, re.MULTILINE)]
    assert not unknown, f"{name} has no such settings: {unknown}"
    lines = [f"{key} = {value!r}" for key, value in settings.items()]
    notebook.cells.insert(index + 1, nbformat.v4.new_code_cell("\n".join(lines)))
    # One device, like the machine of someone who reads a notebook; nothing is left in the home folder.
    flags = os.environ["XLA_FLAGS"].replace("_device_count=8", "_device_count=1")
    environment = os.environ | {
        "XLA_FLAGS": flags,
        "IPYTHONDIR": str(folder / "ipython"),
        # Programs that several of them compile.
        "JAX_COMPILATION_CACHE_DIR": str(folder / "programs"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
    }
    client = NotebookClient(notebook, timeout=300, resources={"metadata": {"path": str(path.parent)}})
    client.execute(env=environment)
    shown = Executed(notebook)
    assert not [output for output in shown.outputs if output.output_type == "error"]
    return shown


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("notebooks")


@pytest.fixture(scope="module")
def tour(folder: Path) -> Executed:
    text = write_text(folder / "text.jsonl", documents=400)
    places = [f"run.dir={folder}", f"data.cache_dir={folder / 'cache'}", f"data.files=[{text}]"]
    return execute("01_tour", folder, RUN="tour", STEPS=STEPS, MORE=[*SMALL.split(), *places])


def test_the_tour_trains_a_pool_and_looks_inside(tour: Executed, folder: Path) -> None:
    assert "3 problems in the configuration" in tour.text
    lines = [json.loads(line) for line in (folder / "tour" / "metrics.jsonl").read_text().splitlines()]
    losses = [line["loss/lm"] for line in lines if line["kind"] == "train"]
    assert losses[-1] < losses[0] - 0.5
    rows = tour.table("step", "valid loss")
    assert [int(row[0]) for row in rows] == [6, 12, 18, 24]
    assert float(rows[-1][1]) < float(rows[0][1])
    assert all(1 <= int(row[2]) <= 16 and 1 <= float(row[3]) <= 16 and 0 <= float(row[4]) <= 4 for row in rows)
    assert all(0 <= float(row[6].rstrip("%")) <= 100 for row in rows)
    assert tour.images == 3
    assert {row[0] for row in tour.table("setting")} > {"moe.router", "pool.groups", "loss.balance"}
    for prompt in ("The state of the Union is", "My fellow citizens,", "Congress must"):
        assert prompt in tour.text


def test_the_tour_follows_one_expert_through_the_layers(tour: Executed, folder: Path) -> None:
    rows = tour.table("layer", "tokens", "share")
    counts = np.load(folder / "tour" / "routing" / f"{STEPS}.npy")
    (expert,) = re.findall(r"^expert (\d+):", tour.text, re.MULTILINE)
    assert [int(row[1].replace(",", "")) for row in rows] == counts[:, int(expert)].tolist()
    assert all(row[3] for row, count in zip(rows, counts[:, int(expert)], strict=True) if count)


def test_the_anatomy_has_every_analysis_of_that_run(tour: Executed, folder: Path) -> None:
    before = (folder / "tour" / "metrics.jsonl").read_text()
    shown = execute("02_pool_anatomy", folder, RUN=str(folder / "tour"), DEVICES=4)
    assert (folder / "tour" / "metrics.jsonl").read_text() == before, "it trained although there was a run"
    assert "L = 4, G = 1, E = 16, k = 1" in shown.text
    assert shown.images == 11
    (valid,) = (row for row in shown.table("", "this checkpoint") if row[0].startswith("loss on this text"))
    assert float(valid[1]) == pytest.approx(float(tour.table("step", "valid loss")[-1][1]), abs=2e-4)
    by_layer = shown.table("layer", "entropy (bits)")
    assert len(by_layer) == 4
    assert all(float(row[2]) == pytest.approx(2 ** float(row[1]), rel=0.05) for row in by_layer)
    assert [row[0] for row in shown.table("devices", "critical path")] == ["2", "4", "8", "16"]
    assert all(float(path) >= float(whole) for _, path, whole in shown.table("devices", "critical path"))
    chance = {(row[1], row[2]): row[4] for row in shown.table("", "L", "M")}
    assert (chance["12", "96"], chance["36", "128"]) == ("11.34", "31.49")  # method M9.7
    assert len(shown.table("added loss (nats per token)")) == 4
    assert (folder / "tour" / "analysis" / str(STEPS) / "report.html").exists()


@pytest.mark.slow
def test_routers_and_losses_have_their_exact_values(folder: Path) -> None:
    shown = execute("03_routers_and_losses", folder, TOKENS=2000, SCALES=("182m",))
    assert shown.images == 4
    for row in shown.table("router", "logits"):
        if row[0] == "NormRouter":
            assert row[2:] == ["0.2308", "0.3077", "0.0000", "0.0000", "1"]
    gradients = {row[0]: [float(value) for value in row[1:]] for row in shown.table("gradient of the gate by")}
    assert gradients["NormRouter, z, times 2197"] == pytest.approx([-12, 153, 0, 48], abs=1e-3)
    assert not any(gradients["NormRouter, all logits zero"])
    constants = {(row[0], row[1]): row[2:4] for row in shown.table("M", "k", "c")}
    assert constants.pop(("8", "1")) == ["1.825847", "inf"]
    assert all(float(found) == pytest.approx(float(published), abs=2e-6) for found, published in constants.values())
    assert "the published constant is infinite" in shown.text
    assert shown.table("routing", "Switch / alpha, a layer", "pool / alpha") == [
        ["even", "1.0000", "1.0000", "1.0000", "3.0000"],
        ["divided", "4.0000", "1.0000", "1.0000", "1.0000"],
        ["same two", "4.0000", "4.0000", "4.0000", "1.0000"],
        ["one layer greedy", "2.7500", "1.4375", "2.7500", "2.2500"],
        ["flat scores", "1.0000", "1.0000", "8.0000", "0.0000"],
    ]
    assert [row[1] for row in shown.table("", "expert 0")] == ["32/32", "4/32", "11/32", "11/32"]
    private = shown.table("routing", "Switch / alpha, a layer", "pool / alpha with G = L, a pool")
    assert all(switch == pool for _, switch, pool in private)
    ((_, predicted, expected, norm, softmax),) = shown.table("M", "c sqrt(M / 2 pi)")
    assert float(predicted) == pytest.approx(float(expected), rel=0.01)
    assert float(norm) == pytest.approx(float(expected), rel=0.02)
    assert softmax == "1.00"
    assert [row[3] for row in shown.table("sigma")] == ["1.000000"] * 3
    assert shown.table("scale", "L", "M")[0][-1] == "0.0131"  # method M4.5
    silent = shown.table("mean logit")
    # All of 8 normal logits below 3: 0.99865^8.
    assert float(silent[-1][1].rstrip("%")) == pytest.approx(98.9, abs=1.5)
    assert [row[2] for row in silent] == ["0.0%"] * 4


@pytest.mark.parametrize("compiled", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_scaling_plans_and_rooflines(folder: Path, compiled: bool) -> None:
    shown = execute("04_scaling", folder, COMPILE=COMPILED.split() if compiled else [])
    assert shown.images == 4
    assert "978m unipool on h100:8: 8 devices" in shown.text
    assert [row[0] for row in shown.table("scale", "GB a device")] == ["182m", "469m", "650m", "830m", "978m"]
    (gathered,) = (row for row in shown.table("collective", "pool") if row[0] == "experts, gathered (all-gather)")
    assert gathered[1].startswith("1 x ")
    assert gathered[2].startswith(f"{24 * 4 * 2} x ")  # layers, micro-batches, forward and backward
    kernels = {row[0]: row for row in shown.table("", "rows of an expert", "FLOPs a byte")}
    assert [kernels[name][1] for name in ("182m, pool", "182m, per layer")] == ["171", "2048"]
    assert 0.5 * 171 < float(kernels["182m, pool"][2]) < 171
    for _, tile, chosen, _, large in shown.table("rows of an expert", "tile chosen, v5p"):
        assert int(tile) % 16 == 0
        assert 1 <= float(chosen) <= float(large) + 0.01
    if importlib.util.find_spec("libtpu"):
        assert "978m unipool at the published batch on v5p:4x4x4" in shown.text
        if compiled:
            assert "; compiled" in shown.text
            assert [row[0] for row in shown.table("of a device")] == ["temporaries, GB", "sent in a step, GB"]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_what_is_stored_is_text_alone(path: Path) -> None:
    """Outputs would make every difference unreadable, and nothing keeps them true; the tests above make them anew."""
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert all(cell.outputs == [] and cell.execution_count is None for cell in code)
    assert all(set(cell.metadata) <= {"tags"} for cell in notebook.cells)
    assert len({cell.id for cell in notebook.cells}) == len(notebook.cells)
    assert notebook.metadata == {
        "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
        "language_info": {"name": "python"},
    }
    assert notebook.cells[0].cell_type == "markdown"
    assert not re.search(r"(?<![\w.*$/])(/\w+/|[A-Z]:\\)", path.read_text(encoding="utf-8")), "an absolute path"


def test_files_that_the_notebooks_name_exist() -> None:
    cells = [cell for path in NOTEBOOKS for cell in nbformat.read(path, as_version=4).cells]
    text = "".join(cell.source for cell in cells if cell.cell_type == "markdown")
    named = set(re.findall(r"`([\w/.]+\.(?:py|md|json|ipynb))`", text))
    folders = (ROOT, ROOT / "notebooks", ROOT / "unipool_jax")
    assert named
    assert not [name for name in named if not any((folder / name).exists() for folder in folders)]
