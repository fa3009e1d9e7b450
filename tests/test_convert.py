"""Weights survive every conversion, and a file that is not exactly right is refused."""

from __future__ import annotations

from pathlib import Path

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from runner import overrides
from shared_steps import share_steps
from tiny import METHODS, tiny_config
from unipool_jax.cli.main import main
from unipool_jax.config.compose import compose_config
from unipool_jax.config.schema import Config
from unipool_jax.convert.errors import ConversionError
from unipool_jax.convert.files import read_file, write_file
from unipool_jax.convert.layouts import LAYOUT_NAMES, LayoutName, make_layout
from unipool_jax.convert.runs import read_run, write_run
from unipool_jax.convert.weights import Weights, empty_weights, expert_hashes
from unipool_jax.training.entry import run

pytestmark = pytest.mark.filterwarnings("ignore:NormRouter over")

VARIANTS = [
    *((method,) for method in METHODS),
    ("unipool", "pool.groups=2"),
    ("vanilla", "model.num_kv_heads=4", "model.head_size=6"),
    ("shared_layer_aux", "moe.shared_experts=2", "moe.shared_expert_gate=true"),
    ("vanilla", "pool.groups=1", "moe.dense_layers=2"),
]
NORMS = ("unipool", "model.norm=sandwich", "moe.dense_layers=1")


def random_weights(config: Config, seed: int = 0) -> Weights:
    random = np.random.default_rng(seed)

    def draw(leaf: np.ndarray) -> np.ndarray:
        return random.standard_normal(leaf.shape).astype(np.float32)

    weights = empty_weights(config)
    biased = config.loss.balance == "expert_bias"
    return Weights(jax.tree.map(draw, weights.params), draw(weights.expert_bias_GNE) * biased)


def assert_equal(a: Weights, b: Weights) -> None:
    jax.tree.map(np.testing.assert_array_equal, a, b)


@pytest.mark.parametrize(
    ("variant", "layout"), [*((variant, layout) for variant in VARIANTS for layout in LAYOUT_NAMES), (NORMS, "twin")]
)
def test_a_file_holds_everything_once(variant: tuple[str, ...], layout: LayoutName, tmp_path: Path) -> None:
    config = tiny_config(*variant)
    weights, path = random_weights(config), tmp_path / "model.safetensors"
    assert write_file(path, layout, config, weights) == config.total_experts
    assert_equal(read_file(path, layout, config), weights)
    stored = sum(array.size for array in load_file(path).values())
    biases = weights.expert_bias_GNE.size if config.loss.balance == "expert_bias" else 0
    assert stored == sum(leaf.size for leaf in jax.tree.leaves(weights.params)) + biases
    assert [p.name for p in tmp_path.iterdir()] == [path.name]


def test_depth_vectors_have_no_place_in_the_published_layout(tmp_path: Path) -> None:
    config = tiny_config("unipool", "moe.depth_vectors=true")
    weights, path = random_weights(config), tmp_path / "model.safetensors"
    with pytest.raises(ConversionError, match="layout=twin"):
        write_file(path, "megatron", config, weights)
    write_file(path, "twin", config, weights)
    assert_equal(read_file(path, "twin", config), weights)


def test_a_file_holds_the_router_rows_of_visible_experts(tmp_path: Path) -> None:
    config = tiny_config("sliding")  # windows of 4, 6, 6 and 4 experts
    weights, path = random_weights(config), tmp_path / "model.safetensors"
    write_file(path, "twin", config, weights)
    shapes = {name: array.shape for name, array in load_file(path).items()}
    assert [shapes[f"layers.{layer}.ffn.router.weight"] for layer in range(4)] == [(4, 16), (6, 16), (6, 16), (4, 16)]
    for layer in (0, 3):
        weights.params["pools"]["layers"]["mixture"]["router"][0, layer, 4:] = 0
    assert_equal(read_file(path, "twin", config), weights)
    with pytest.raises(ConversionError, match=r"pool.starts=sliding: .* use layout=twin"):
        write_file(tmp_path / "other.safetensors", "megatron", config, weights)


@pytest.mark.parametrize("layout", LAYOUT_NAMES)
def test_the_parts_are_views(layout: LayoutName) -> None:
    """A part that were a copy would lose what is written to it."""
    config = tiny_config("vanilla_aux_free")
    for name, tensor in make_layout(layout, config, empty_weights(config)).tensors.items():
        array = np.zeros(tensor.shape, np.float32)
        for part in tensor.parts:
            assert np.shares_memory(part.view(array), array), name
            assert part.view(array).shape == part.ours.shape, name
            part.view(array)[...] += 1
        assert (array == 1).all(), name


def test_the_published_names_and_shapes() -> None:
    config = tiny_config("unipool", "pool.groups=2")
    tensors = {n: t.shape for n, t in make_layout("megatron", config, empty_weights(config)).tensors.items()}
    layer = "decoder.layers.3"
    assert tensors["embedding.word_embeddings.weight"] == tensors["output_layer.weight"] == (64, 16)
    assert tensors[f"{layer}.self_attention.linear_qkv.weight"] == ((4 + 2 * 2) * 4, 16)
    assert tensors[f"{layer}.mlp.router.weight"] == (4, 16)
    assert tensors[f"{layer}.mlp.router.norm_scale"] == (1,)
    assert tensors["decoder.layers.2.mlp.experts.linear_fc1.weight3"] == (2 * 24, 16)
    assert tensors["decoder.layers.2.mlp.experts.linear_fc2.weight3"] == (16, 24)
    assert not any(name.startswith(f"{layer}.mlp.experts") for name in tensors)


def test_published_queries_keys_and_values_are_interleaved_by_group() -> None:
    """Rows of the fused projection, counted by hand: 2 groups of 2 queries, 1 key, 1 value, of 4 channels each."""
    config = tiny_config("dense")
    weights = random_weights(config)
    part = make_layout("megatron", config, weights).tensors["decoder.layers.1.self_attention.linear_qkv.weight"]
    rows = np.empty(part.shape, np.float32)
    for piece in part.parts:
        piece.view(rows)[...] = piece.ours
    attention = {key: value[1, 0] for key, value in weights.params["pools"]["layers"]["attention"].items()}
    np.testing.assert_array_equal(rows[0:8].T, attention["query"][:, 0:8])
    np.testing.assert_array_equal(rows[8:12].T, attention["key"][:, 0:4])
    np.testing.assert_array_equal(rows[12:16].T, attention["value"][:, 0:4])
    np.testing.assert_array_equal(rows[16:24].T, attention["query"][:, 8:16])
    np.testing.assert_array_equal(rows[24:28].T, attention["key"][:, 4:8])


def published(tmp_path: Path, config: Config) -> tuple[Path, dict[str, np.ndarray]]:
    path = tmp_path / "published.safetensors"
    write_file(path, "megatron", config, random_weights(config))
    return path, load_file(path)


def test_repeated_pool_experts_must_be_equal(tmp_path: Path) -> None:
    config = tiny_config("unipool")
    path, tensors = published(tmp_path, config)
    first, second = (f"decoder.layers.{layer}.mlp.experts.linear_fc2.weight1" for layer in (0, 2))
    tensors[second] = tensors[first].copy()
    save_file(tensors, path)
    read_file(path, "megatron", config)
    tensors[second][0, 0] += 1
    save_file(tensors, path)
    with pytest.raises(ConversionError, match=r"layers\.2.*differs from decoder\.layers\.0"):
        read_file(path, "megatron", config)


def test_partial_surplus_and_misshapen_files_are_refused_by_name(tmp_path: Path) -> None:
    config = tiny_config("unipool")
    path, tensors = published(tmp_path, config)
    del tensors["decoder.layers.0.mlp.experts.linear_fc1.weight7"]
    tensors["decoder.layers.0.mlp.experts.linear_fc1.weight8"] = np.zeros((48, 16), np.float32)
    tensors["output_layer.weight"] = np.zeros((63, 16), np.float32)
    tensors["decoder.final_layernorm.weight"] = np.zeros(16, np.int32)
    save_file(tensors, path)
    with pytest.raises(ConversionError) as caught:
        read_file(path, "megatron", config)
    message = str(caught.value)
    assert "linear_fc1.weight7: missing" in message
    assert "linear_fc1.weight8: not part of this model" in message
    assert "output_layer.weight: shape [63, 16], expected [64, 16]" in message
    assert "final_layernorm.weight: dtype I32, expected one of F32" in message


def test_experts_that_changed_on_the_way_are_refused(tmp_path: Path) -> None:
    config = tiny_config("unipool")
    path = tmp_path / "model.safetensors"
    weights = random_weights(config)
    write_file(path, "twin", config, weights)
    changed = bytearray(path.read_bytes())
    needle = weights.params["pools"]["bank"]["down"][0, 5].tobytes()
    changed[changed.index(needle)] ^= 1
    path.write_bytes(changed)
    with pytest.raises(ConversionError, match="weights differ from the source in pool 0 expert 5; nothing was kept"):
        read_file(path, "twin", config)


def test_a_truncated_or_pickled_file_is_refused(tmp_path: Path) -> None:
    config = tiny_config("unipool")
    path, _ = published(tmp_path, config)
    path.write_bytes(path.read_bytes()[:-10])
    with pytest.raises(ConversionError, match="not a readable safetensors file"):
        read_file(path, "megatron", config)
    path.write_bytes(b"\x80\x04N.")
    with pytest.raises(ConversionError, match=r"pickled objects.*re-save"):
        read_file(path, "megatron", config)


def test_low_precision_files_are_read(tmp_path: Path) -> None:
    config = tiny_config("vanilla")
    path, tensors = published(tmp_path, config)
    save_file({name: array.astype(jax.numpy.bfloat16) for name, array in tensors.items()}, path)
    read = read_file(path, "megatron", config).params["embedding"]
    original = tensors["embedding.word_embeddings.weight"]
    np.testing.assert_array_equal(read, original.astype(jax.numpy.bfloat16).astype(np.float32))


def test_expert_hashes_tell_experts_apart() -> None:
    weights = random_weights(tiny_config("vanilla"))
    before = expert_hashes(weights)
    assert len(set(before.values())) == len(before) == 8
    weights.params["pools"]["bank"]["up"][2, 1, 0, 0] += 1e-3
    assert [key for key, value in expert_hashes(weights).items() if value != before[key]] == [(2, 1)]


def test_a_failure_while_writing_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = tiny_config("unipool")
    weights = random_weights(config)
    other = expert_hashes(random_weights(config, seed=1))
    monkeypatch.setattr("unipool_jax.convert.files.expert_hashes", lambda _: dict(other))
    monkeypatch.setattr("unipool_jax.convert.files.read_file", lambda *_: (_ for _ in ()).throw(OSError("disk")))
    with pytest.raises(OSError, match="disk"):
        write_file(tmp_path / "model.safetensors", "twin", config, weights)
    hashes = iter([expert_hashes(weights), other])
    monkeypatch.setattr("unipool_jax.convert.runs.expert_hashes", lambda _: next(hashes))
    with pytest.raises(ConversionError, match="pool 0 expert 0"):
        write_run(tmp_path / "run", config, weights)
    hashes = iter([expert_hashes(weights)] * 2)
    monkeypatch.setattr(
        "unipool_jax.convert.runs.write_json", lambda *_, **__: (_ for _ in ()).throw(KeyboardInterrupt)
    )
    with pytest.raises(KeyboardInterrupt):
        write_run(tmp_path / "run", config, weights, documents={"report.json": {}})
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("layout", LAYOUT_NAMES)
def test_from_run_to_run_on_the_command_line(
    layout: LayoutName, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    config = tiny_config("vanilla_aux_free", "model.vocab_size=257")
    weights = random_weights(config)
    write_run(Path("runs/a"), config, weights)
    assert main(["convert", "export", "run=runs/a", "out=a.safetensors", f"layout={layout}"]) == 0
    assert main(["convert", "import", "file=a.safetensors", "run=runs/b"]) == 0
    found, read = read_run("runs/b")
    assert_equal(read, weights)
    assert found.run.name == "b"
    assert found.model == config.model
    assert "8 experts" in capsys.readouterr().out
    assert main(["convert", "export", "run=runs/a", "out=a.safetensors"]) == 1
    assert main(["convert", "import", "file=a.safetensors", "run=runs/b"]) == 1
    assert main(["convert", "import", "file=a.safetensors", "run=runs/c", "layout=hf"]) == 2
    assert main(["convert", "import", "file=a.safetensors", "run=runs/c", "method=unipool"]) == 1
    assert main(["convert", "upgrade"]) == main(["convert"]) == main(["convert", "export", "colour=red"]) == 2
    assert capsys.readouterr().err.count("already exists") == 2
    assert main(["convert", "export", "run=runs/a", "out=there/w.pt"]) == 2
    said = capsys.readouterr().err
    assert "out=there/w.pt: the file will hold safetensors; name it so, for example out=there/w.safetensors" in said


def test_training_and_evaluation_go_on_from_an_imported_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The optimizer and the data start anew, the weights do not."""
    share_steps(monkeypatch)
    first = overrides(tmp_path, "train.steps=4", "train.checkpoint_every=2", "run.name=first")
    assert run(compose_config(first)) == 0
    folder, file = tmp_path / "runs" / "imported", tmp_path / "model.safetensors"
    words = [str(tmp_path / "runs" / "first"), "step=2", f"out={file}", "layout=megatron"]
    assert main(["convert", "export", *words]) == 0
    assert main(["convert", "import", f"file={file}", f"run={folder}"]) == 0
    _, weights = read_run(str(tmp_path / "runs" / "first"), 2)
    assert_equal(read_run(str(folder))[1], weights)
    again = [word for word in first if not word.startswith("run.name")]
    assert run(compose_config([*again, "run.name=imported", "run.resume=required"])) == 0
    assert (folder / "summary.json").exists()
