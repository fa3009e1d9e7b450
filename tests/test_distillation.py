"""Learning from a teacher: the loss against NumPy, and runs that go on as they began."""

from __future__ import annotations

import functools
import json
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh

from oracles import softmax
from runner import assert_same, final_state, overrides
from tiny import tiny_batch, tiny_config, tiny_state
from unipool_jax.config.compose import compose_config
from unipool_jax.config.files import FileError
from unipool_jax.config.schema import MeshConfig
from unipool_jax.data.tokenizer import load_tokenizer
from unipool_jax.model.transformer import forward
from unipool_jax.parallel import head
from unipool_jax.parallel.head import Head
from unipool_jax.parallel.mesh import make_mesh
from unipool_jax.training.distillation import Teacher
from unipool_jax.training.entry import run
from unipool_jax.training.run_folder import RunError
from unipool_jax.training.sharding import state_shardings, to_devices
from unipool_jax.training.step import make_train_step
from unipool_jax.training.teacher import TEACHER, open_teacher

pytestmark = [pytest.mark.filterwarnings("ignore:NormRouter over"), pytest.mark.usefixtures("steps_are_shared")]

VOCABULARY, WIDTH = 40, 8
DENSE = ("method=dense", "moe.experts_per_layer=1")


def heads(batch: int, length: int) -> tuple[Head, Head, np.ndarray, np.ndarray]:
    """A student, a teacher of another width, targets, and weights of which some are zero."""
    random = np.random.default_rng(0)

    def draw(width: int) -> Head:
        hidden, output = random.normal(size=(batch, length, width)), random.normal(size=(VOCABULARY, width))
        return Head(jnp.asarray(hidden, jnp.float32), jnp.asarray(output, jnp.float32))

    targets = random.integers(0, VOCABULARY, (batch, length), dtype=np.int32)
    return draw(WIDTH), draw(WIDTH + 3), targets, (random.integers(0, 3, (batch, length)) / 2).astype(np.float32)


def logits(of: Head) -> np.ndarray:
    hidden, output = (np.asarray(array, np.float64) for array in of)
    return hidden @ output.T


def oracle(
    ours: np.ndarray, theirs: np.ndarray, targets: np.ndarray, weight: float, temperature: float
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Cross-entropy and T^2 KL(p || q) of each position, and the gradient of their mixture by the student's logits.

    Of T^2 sum p (log p - log q) with q = softmax(z / T): T^2 / T (q - p).
    """
    text = -np.log(np.take_along_axis(softmax(ours), targets[..., None], -1))[..., 0]
    p, q = softmax(theirs / temperature), softmax(ours / temperature)
    apart = temperature**2 * (p * (np.log(p) - np.log(q))).sum(-1)
    one_hot = np.eye(ours.shape[-1])[targets]
    return text, apart, (1 - weight) * (softmax(ours) - one_hot) + weight * temperature * (q - p)


@pytest.mark.parametrize(("weight", "temperature"), [(0.3, 2.0), (1.0, 1.0)])
@pytest.mark.parametrize("over_mesh", [False, True])
def test_loss_and_gradients(
    weight: float, temperature: float, over_mesh: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In chunks of 8 of 28 positions on one device; over a mesh with a split vocabulary whole."""
    monkeypatch.setattr(head, "CHUNK", 8)
    student, teacher, targets, weights = heads(4, 7)
    text, apart, grad = oracle(logits(student), logits(teacher), targets, weight, temperature)
    grad *= weights[..., None]

    # A factor on the loss: what is saved belongs to a cotangent of one.
    @jax.jit
    def run(student: Head, teacher: Head, weights: jax.Array) -> tuple:
        def loss(student: Head, teacher: Head, weights: jax.Array) -> tuple[jax.Array, tuple[jax.Array, ...]]:
            total, *parts = student.distilled_loss(teacher, targets, weights, weight, temperature)
            return 3 * total, tuple(parts)

        return jax.value_and_grad(loss, (0, 1, 2), has_aux=True)(student, teacher, weights)

    if over_mesh:
        with jax.set_mesh(make_mesh(MeshConfig(data=2, tensor=2), jax.devices()[:4])):
            found = run(student, teacher, weights)
    else:
        found = run(student, teacher, weights)
    (total, parts), (to_student, to_teacher, to_weights) = jax.device_get(found)
    mixed = (1 - weight) * text + weight * apart
    np.testing.assert_allclose(parts, [(text * weights).sum(), (apart * weights).sum()], rtol=1e-5)
    np.testing.assert_allclose(total, 3 * (mixed * weights).sum(), rtol=1e-5)
    np.testing.assert_allclose(to_student.hidden_BSD, 3 * grad @ student.output_VD, rtol=1e-4, atol=1e-5)
    expected = 3 * np.einsum("bsv,bsd->vd", grad, student.hidden_BSD)
    np.testing.assert_allclose(to_student.output_VD, expected, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(to_weights, 3 * mixed, rtol=1e-4, atol=1e-5)
    assert not any(leaf.any() for leaf in jax.tree.leaves(to_teacher))


def test_no_array_holds_the_logits_of_a_batch() -> None:
    """Those of student and teacher for 32,768 positions and 4,096 tokens would be 537 MB each."""
    shapes = [
        Head._make(jax.ShapeDtypeStruct(size, jnp.float32) for size in ((32, 1024, width), (4096, width)))
        for width in (WIDTH, WIDTH + 3)
    ]
    targets, weights = (jax.ShapeDtypeStruct((32, 1024), dtype) for dtype in (jnp.int32, jnp.float32))
    step = jax.jit(jax.value_and_grad(lambda s, t, y, w: s.distilled_loss(t, y, w, 0.5, 2.0)[0]))
    memory = step.lower(*shapes, targets, weights).compile().memory_analysis()
    assert memory is not None
    assert memory.temp_size_in_bytes < 96e6


def test_a_step_learns_from_the_teacher() -> None:
    """Two micro-batches; the teacher is a pool and wider than the dense student. Losses by hand from both logits."""
    words = ("model.num_layers=2", "model.compute_dtype=float32")
    learns = ("distill.teacher=a", "distill.weight=0.25", "distill.temperature=2", "train.microbatch_size=4")
    config = tiny_config("dense", *words, *learns, "model.hidden_size=8")
    taught = tiny_config("unipool", *words)
    state, its, batch = tiny_state(config), tiny_state(taught, 1), tiny_batch(config)
    ours, theirs = (
        np.asarray(jax.jit(functools.partial(forward, c))(s.params, batch.inputs, s.balance.expert_bias_GNE)[0], float)
        for c, s in ((config, state), (taught, its))
    )
    text, apart, _ = oracle(ours, theirs, np.asarray(batch.targets), 0.25, 2.0)
    new, metrics = make_train_step(config)(state, batch, Teacher(taught, its.params, its.balance))
    assert int(new.step) == 1
    found = {name: float(value) for name, value in metrics.items() if name.startswith("loss/")}
    assert found["loss/lm"] == pytest.approx(text.mean(), rel=1e-4)
    assert found["loss/distill"] == pytest.approx(apart.mean(), rel=1e-4)
    assert found["loss/total"] == pytest.approx(0.75 * text.mean() + 0.25 * apart.mean(), rel=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("words", [(), ("moe.top_k=2", "train.microbatch_size=4", "loss.switch_group_sequences=4")])
def test_several_devices_learn_as_one(words: tuple[str, ...]) -> None:
    """Student and teacher, pools both, over all axes of a mesh of eight devices."""
    config = tiny_config(
        "unipool", "distill.teacher=a", "model.compute_dtype=float32", "mesh.capacity_factor=8", *words
    )
    taught = tiny_config("unipool", "model.hidden_size=8", "model.compute_dtype=float32")
    mesh, its = make_mesh(MeshConfig(data=1, fsdp=2, expert=2, tensor=2), jax.devices()[:8]), tiny_state(taught, 1)

    def steps(mesh: Mesh | None) -> list[dict[str, float]]:
        state, teacher, step = (
            tiny_state(config),
            Teacher(taught, its.params, its.balance),
            make_train_step(config, mesh),
        )
        found = []
        if mesh is not None:
            state = jax.device_put(state, state_shardings(config, mesh, state))
            teacher = jax.device_put(teacher, state_shardings(taught, mesh, teacher))
        for seed in range(3):
            batch = tiny_batch(config, seed)
            placed = batch if mesh is None else to_devices(mesh, batch, config.train.batch_size)
            state, metrics = step(state, placed, teacher)
            found.append(
                {name: float(metrics[name]) for name in ("loss/lm", "loss/distill", "loss/total", "grad_norm")}
            )
        return found

    with jax.set_mesh(mesh):
        together = steps(mesh)
    for ours, theirs in zip(together, steps(None), strict=True):
        assert ours == pytest.approx(theirs, rel=2e-5)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A teacher of 4 steps, `runs/teacher`."""
    folder = tmp_path_factory.mktemp("distillation")
    assert run(compose_config(overrides(folder, *DENSE, "run.name=teacher", "train.steps=4"))) == 0
    return folder


def student(folder: Path, *more: str) -> list[str]:
    words = [f"distill.teacher={folder / 'runs' / 'teacher'}", "run.name=student", "train.steps=4", "train.log_every=1"]
    return overrides(folder, *DENSE, *words, "train.checkpoint_every=2", "distill.temperature=2", *more)


def test_a_run_resumes_with_the_checkpoint_that_it_began_with(folder: Path) -> None:
    """Bit for bit, also where the teacher has been trained on; a teacher that was replaced is refused."""
    config, teacher, own = compose_config(student(folder)), folder / "runs" / "teacher", folder / "runs" / "student"
    assert run(config) == 0
    noted = json.loads((own / TEACHER).read_text())
    assert (noted["run"], noted["step"]) == (str(teacher), 4)
    lines = [json.loads(line) for line in (own / "metrics.jsonl").read_text().splitlines()]
    losses = [line["loss/distill"] for line in lines if line["kind"] == "train"]
    assert len(losses) == 4
    whole = final_state(config, own)

    saved = teacher / "checkpoints"
    shutil.copytree(saved / "4", saved / "5")
    shutil.rmtree(own / "checkpoints" / "4")
    (own / "summary.json").unlink()
    assert run(config) == 0
    assert_same(final_state(config, own), whole)
    assert json.loads((own / TEACHER).read_text()) == noted
    again = [json.loads(line) for line in (own / "metrics.jsonl").read_text().splitlines()]
    assert [line["loss/distill"] for line in again if line["kind"] == "train"] == losses
    shutil.rmtree(saved / "5")

    shutil.rmtree(own / "checkpoints" / "4")
    (own / "summary.json").unlink()
    (own / TEACHER).write_text(json.dumps(noted | {"sha256": "0" * 64}))
    with pytest.raises(RunError, match="is not the checkpoint that this run began to learn from"):
        run(config)
    (own / TEACHER).unlink()
    with pytest.raises(FileError, match=TEACHER):
        run(config)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("model.vocab_size=300",), r"model\.vocab_size: 257 there, 300 here"),
        (("data.sequence_length=32",), r"data\.sequence_length=32: it reads 16 positions"),
        (("data.document_mask=true",), r"data\.document_mask: False there, True here"),
        (("distill.teacher=nowhere",), r"distill\.teacher=nowhere: no run here"),
        (("data.tokenizer=demo", "model.vocab_size=8192"), r"data\.tokenizer: bytes \(sha256 .* there, demo"),
        (("mesh.tensor=2",), r"its mesh\.tensor=2: must divide model\.num_kv_heads=1"),
    ],
)
def test_a_teacher_of_other_tokens_is_refused(folder: Path, words: tuple[str, ...], message: str) -> None:
    config = compose_config(student(folder, *words))
    with pytest.raises(RunError, match=message):
        open_teacher(config, folder, False, load_tokenizer(config.data.tokenizer).sha256)
