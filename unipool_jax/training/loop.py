"""The training loop, from a new state or the newest checkpoint to the summary of the run."""

from __future__ import annotations

import contextlib
import io
import math
import sys
import time
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from unipool_jax.config.files import write_array
from unipool_jax.config.growth_schedule import with_layers
from unipool_jax.config.schema import Config
from unipool_jax.config.version import VERSION, git_commit
from unipool_jax.data.corpus import Corpus, open_corpus
from unipool_jax.data.identity import text_identity
from unipool_jax.data.pipeline import Batch, WindowSource, training_batches
from unipool_jax.data.splits import SplitName
from unipool_jax.moe.lock_lifecycle import LossExcessError
from unipool_jax.parallel.mesh import usable_mesh
from unipool_jax.parallel.processes import broadcast_from_process_0, is_process_0, must_agree, process_0_first
from unipool_jax.training.announcing import announce, num_devices, print_summary
from unipool_jax.training.checkpoint import Checkpoints, make_meta
from unipool_jax.training.console import LOG, Progress, copied_to
from unipool_jax.training.distillation import Teacher
from unipool_jax.training.evaluate import EvalResult, Evaluator, TextBatches, unigram_baseline
from unipool_jax.training.flops import flops_spent, utilization
from unipool_jax.training.growing import Growing, open_growth, per_use
from unipool_jax.training.growth_step import GrowthStep
from unipool_jax.training.initial import initial_state, mesh_document
from unipool_jax.training.locking import Locking, open_lock
from unipool_jax.training.metrics import (
    MetricsWriter,
    device_loads,
    load_metrics,
    perplexity,
    routing_diagnostics,
)
from unipool_jax.training.placement import Placement, measured, newest_counts, strided, with_placement
from unipool_jax.training.receive_buffers import OverflowedError, ReceiveBuffers
from unipool_jax.training.run_folder import RunFolder
from unipool_jax.training.sessions import Session, command_line, utc_now
from unipool_jax.training.sharding import process_rows, to_devices
from unipool_jax.training.speed import Speed
from unipool_jax.training.spikes import WATCHED, Spikes
from unipool_jax.training.state import TrainState
from unipool_jax.training.step import TrainStep, make_train_step
from unipool_jax.training.stopping import InterruptedRunError, StopRequest
from unipool_jax.training.switching import switch_values
from unipool_jax.training.teacher import teachers_of
from unipool_jax.training.zero_gates import zero_gate_warning

EXIT_NONFINITE = 3
"""Exit code after a non-finite loss or gradient, or an overflow of receive buffers. A signal gives 128 + its number."""

EXIT_LOSS_EXCESS = 4
"""Exit code of a run that `lock.max_loss_excess` stopped."""


class NonFiniteError(RuntimeError):
    """A loss or gradient was not finite, with `train.nonfinite=stop`; the step was not applied."""


def train(config: Config) -> int:
    """Train the run of `config`, resuming from its newest checkpoint.

    Returns:
      Exit code: 0 if the run is complete, `EXIT_NONFINITE`, `EXIT_LOSS_EXCESS`, or 128 + signal number after a clean
      interruption.

    Raises:
      ConfigError, RunError, CheckpointError, DataError, LockError, AssignmentError: something the user can correct;
        earlier checkpoints are intact.
      PeerError: the processes do not run the same thing, or one was lost.
    """
    mesh = usable_mesh(config)
    with contextlib.ExitStack() as stack:
        if mesh is not None:
            stack.enter_context(jax.set_mesh(mesh))
        folder = stack.enter_context(process_0_first(lambda: RunFolder(config, writes=is_process_0())))
        summary = folder.read_summary()
        if summary is not None:
            if is_process_0():
                print(
                    f"{folder.path} is finished; to extend it: unipool train {folder.path} train.steps=+N; to train "
                    "again, set another run.name or delete the folder"
                )
                print_summary(config, summary)
            return 0
        if is_process_0():
            stack.enter_context(copied_to(folder.path / LOG, f"{utc_now()} {command_line()}"))
        corpus = process_0_first(lambda: open_corpus(config.data, config.model.vocab_size))
        text = process_0_first(lambda: text_identity(corpus))
        must_agree({"text of the run (fingerprint)": text["fingerprint"]})
        checkpoints = stack.enter_context(Checkpoints(folder.checkpoints, config.train.keep_checkpoints))
        teachers = teachers_of(config, folder.path, bool(checkpoints.steps()), corpus.tokenizer.sha256, mesh)
        state = initial_state(config, checkpoints, corpus, mesh)
        process_0_first(lambda: folder.record(config, text, corpus.tokenizer.definition))
        start = int(jax.device_get(state.step))
        meta = checkpoints.meta(start) if checkpoints.steps() else None
        growth = open_growth(config, start, mesh)
        lock = open_lock(with_layers(config, config.model.num_layers), folder.path, meta, start, mesh)
        if lock is not None and (growth is None or growth.done):
            state = lock.start(state)
        writer = stack.enter_context(
            contextlib.closing(
                MetricsWriter(
                    folder.path,
                    start,
                    tensorboard=config.run.tensorboard,
                    writes=is_process_0(),
                    first_layer=config.moe.dense_layers,
                )
            )
        )
        session = stack.enter_context(process_0_first(lambda: Session(folder.path, start, writes=is_process_0())))
        stop = stack.enter_context(StopRequest().listening())
        buffers = ReceiveBuffers(config, mesh, folder.path, meta)
        run = _Run(
            *(config, folder, checkpoints, corpus, writer, session, stop, start, mesh, lock, buffers),
            growth=growth,
            teachers=teachers,
            spikes=Spikes(meta),
        )
        announce(config, folder.path, state, mesh, start, run.progress, buffers, growth)
        try:
            state = run.place(state)
            state = run.steps(state)
            summary = run.finish(state)
            if is_process_0():
                print_summary(config, summary)
        except (NonFiniteError, OverflowedError, LossExcessError) as error:
            run.progress.message("")
            if is_process_0():
                print(error, file=sys.stderr)
            return session.ended(EXIT_LOSS_EXCESS if isinstance(error, LossExcessError) else EXIT_NONFINITE)
        except InterruptedRunError as interruption:
            run.progress.message(
                f"{interruption}: saved step {checkpoints.steps()[-1]} in {folder.path}; the same command resumes there"
            )
            return session.ended(128 + interruption.signum)
        return session.ended(0)


class _Run:
    """The loop of one run and its state between steps; `start` is the number of steps completed before."""

    def __init__(
        self,
        config: Config,
        folder: RunFolder,
        checkpoints: Checkpoints,
        corpus: Corpus,
        writer: MetricsWriter,
        session: Session,
        stop: StopRequest,
        start: int,
        mesh: Mesh | None,
        lock: Locking | None,
        buffers: ReceiveBuffers,
        *,
        growth: Growing | None,
        teachers: tuple[Teacher, ...],
        spikes: Spikes,
    ):
        self.config, self.folder, self.checkpoints, self.corpus = config, folder, checkpoints, corpus
        self.writer, self.session, self.stop, self.start, self.mesh = writer, session, stop, start, mesh
        self.whole_lock, self.buffers, self.growth = lock, buffers, growth
        self.teachers, self.spikes = teachers, spikes
        self.validated = broadcast_from_process_0("yes" if "valid" in writer.kinds_at_resume else "") == "yes"
        self.placement: Placement | None = None
        self.progress = Progress(config.train.steps, None if is_process_0() else io.StringIO())
        names: list[SplitName] = ["valid", "test"]
        # `valid` is always included, so that a run without validation text fails before its first step.
        self.splits = [name for name in names if name == "valid" or name in corpus.splits()]
        self.evaluator = Evaluator(self.structure, corpus, self.splits, limited=True, mesh=mesh)
        self.speed = Speed(config.tokens_per_step, writer.intervals)
        self.deep_evaluator: Evaluator | None = None
        self.valid: EvalResult | None = None
        self.compiling = 0.0

    @property
    def lock(self) -> Locking | None:
        """The lock of the run, which begins when all layers are there."""
        return self.whole_lock if self.growth is None or self.growth.done else None

    @property
    def stage(self) -> Config:
        """The configuration of the current model, with experts as they are shared before a lock."""
        return self.config if self.growth is None else self.growth.structure

    @property
    def structure(self) -> Config:
        """The configuration of the current model, which growth and a lock change, with the placement in use."""
        return with_placement(self.stage if self.lock is None else self.lock.structure, self.mesh)

    def place(self, state: TrainState) -> TrainState:
        """`state` with its experts where mesh.expert_placement says."""
        structure = self.structure
        if structure.mesh.expert_placement == "contiguous" or self.mesh is None:
            return state
        if structure.mesh.expert_placement == "strided":
            self.placement = strided(structure, self.mesh)
            return self.placement.apply(state)
        counts_LE = newest_counts(self.folder.path / "routing", self.start)
        if counts_LE is None:
            self.progress.message("expert placement: no loads measured yet, so consecutive experts share a device")
            return state
        self.placement = measured(self.config, self.mesh, counts_LE)
        return self.placement.apply(state)

    def steps(self, state: TrainState) -> TrainState:
        """Run the remaining steps."""
        settings, start = self.config.train, self.start
        compiled = start + 1
        pending: tuple[int, dict[str, jax.Array]] | None = None
        seen = self.validated and (self.lock is None or self.lock.has_seen(start))
        if start and self.due(start, settings.eval_every) and not seen:
            # The run was interrupted between this step and its evaluation, or between that and the next checkpoint.
            state = self.validate(state, start)
        built = self.buffers.configured(self.structure)
        train_step = self.make_step(built, start)
        self.compile(self.session.compile_seconds)
        for step, batch in enumerate(self.batches(), start + 1):
            placed = self.on_devices(batch)
            grows = self.growth is not None and self.growth.due(step - 1)
            if grows or (isinstance(train_step, GrowthStep) and train_step.compiles and step != compiled):
                if pending is not None:
                    self.report(*pending)
                pending, compiled = None, step
                if grows:
                    state = self.grow(state, step - 1)
                    built = self.buffers.configured(self.structure)
                    train_step = self.make_step(built, step - 1)
                self.compile(None)
            if self.lock is not None:
                self.lock.check(step - 1)
            with jax.transfer_guard("disallow"):
                state, metrics = train_step(state, placed, *self.teachers)
            # Read the metrics one step late, so that the device never waits for the host. A non-finite update is not
            # applied, so nothing is lost.
            if pending is not None:
                self.report(*pending)
            pending = step, metrics
            self.checkpoints.check()
            self.stop.agree()

            # Read once, because a signal may arrive at any line: after the save, it must wait for the next step's.
            stopping = self.stop.requested()
            first, last = step == compiled, step == settings.steps
            evaluate = last or self.due(step, settings.eval_every)
            save = last or self.due(step, settings.checkpoint_every)
            if first or evaluate or save or stopping:
                self.report(*pending)
                pending = None
                if first:
                    self.compiled(step)
            if evaluate and not stopping:
                state = self.validate(state, step)
                stopping = self.stop.requested()
            if save or stopping:
                state = self.save(state, step)
            if stopping:
                self.raise_if_interrupted()
            if (evaluate or save) and not last and (wanted := self.buffers.configured(self.structure)) != built:
                # A lock, fixed in an evaluation, or buffers, fitted at a save, change shapes: compile again.
                built, compiled = wanted, step + 1
                train_step = self.make_step(built, step)
                self.compile(None)
        return state

    def make_step(self, built: Config, completed: int) -> TrainStep:
        """The training step of the model `built`, which is called first after `completed` steps."""
        if self.growth is None or self.growth.done:
            return make_train_step(built, self.mesh)
        return self.growth.step(built, completed)

    def grow(self, state: TrainState, completed: int) -> TrainState:
        """The state with the layers of the next stage."""
        assert self.growth is not None
        before = self.growth.layers
        state = self.growth.grow(state, completed)
        self.progress.message(f"step {completed}: grown from {before} to {self.growth.layers} layers")
        self.evaluator = Evaluator(self.structure, self.corpus, self.splits, limited=True, mesh=self.mesh)
        return state if self.lock is None else self.lock.start(state)

    def compile(self, expected: float | None) -> None:
        """Say that the next step is compiled first, which took `expected` seconds before."""
        self.speed.drop()
        about = "" if expected is None else f", about {expected:.0f} s as the last time"
        self.progress.message(f"compiling the training step{about}")
        self.compiling = time.perf_counter()

    def compiled(self, step: int) -> None:
        """Say how long that took, and begin to measure speed."""
        seconds = time.perf_counter() - self.compiling
        self.progress.message(f"compiled after {seconds:.1f} s, with step {step}")
        if step == self.start + 1:
            self.session.compiled(seconds)
        self.speed.start(step)

    def due(self, step: int, every: int) -> bool:
        """Whether `step` is a multiple of `every` (0: never)."""
        return every > 0 and step % every == 0

    def on_devices(self, batch: Batch) -> Batch:
        """The global training batch on devices, from the rows that this process loaded."""
        if self.mesh is None:
            return jax.device_put(batch)
        return to_devices(self.mesh, batch, self.config.train.batch_size)

    def batches(self) -> Iterator[Batch]:
        """This process's rows of the remaining training batches."""
        config = self.config
        num_windows = [steps * config.train.batch_size for steps in config.train.lengths]
        data, seed = config.data, config.train.seed
        source = WindowSource(
            self.corpus.stores, "train", data.sequence_length, num_windows, seed, document_mask=data.document_mask
        )
        return training_batches(
            source,
            batch_size=config.train.batch_size,
            start_step=self.start,
            end_step=config.train.steps,
            rows=None if self.mesh is None else process_rows(self.mesh, config.train.batch_size),
            num_threads=config.data.num_threads,
        )

    def report(self, step: int, metrics: dict[str, jax.Array]) -> None:
        """Check one step, and write its metrics every `train.log_every` steps.

        Raises:
          NonFiniteError, OverflowedError: the settings say to stop.
        """
        if not jax.device_get(metrics["finite"]):
            self.report_nonfinite(step, metrics)
        self.buffers.add(step, metrics)
        self.spikes.add(jax.device_get({name: metrics[name] for name in WATCHED.values()}))
        if not self.due(step, self.config.train.log_every) and step != self.config.train.steps:
            return
        host = jax.device_get(metrics)
        values: dict[str, Any] = {key: host[key] for key in sorted(host) if np.ndim(host[key]) == 0 and key != "finite"}
        loss = float(host["loss/lm"])
        measured = self.speed.interval(step)
        rate, seconds = (None, None) if measured is None else measured
        values |= {"perplexity": perplexity(loss), "tokens": step * self.config.tokens_per_step}
        values |= {"flops": flops_spent(self.config, step)}
        values |= {"tokens_per_second": rate, "seconds": seconds, "mfu": self.utilization(rate)}
        if self.growth is not None:
            host = per_use(host, self.config.num_microbatches)
            values |= self.growth.values(step)
        if "router_scale_L" in host:
            values["router_scale"] = host["router_scale_L"]
        zero_gates_L = host["zero_gates_L"] / self.config.tokens_per_step
        values["routing/zero_gates"] = zero_gates_L.tolist()
        values |= switch_values(self.stage, host)
        values |= self.spikes.shares()
        values |= self.loads(host) | {"overflow": self.buffers.take_overflow()}
        self.writer.write("train", step, values)
        left = self.speed.left(step, self.config.train.steps)
        self.progress.step(step, loss, float(host["learning_rate"]), rate, left, float(zero_gates_L.mean()))

    def utilization(self, rate: float | None) -> float | None:
        """Model FLOPs utilization at `rate` tokens per second."""
        return utilization(self.config, rate, jax.local_devices()[0].device_kind, num_devices(self.mesh))

    def loads(self, metrics: dict[str, Any]) -> dict[str, Any]:
        """Load balance of experts and, with expert parallelism, of devices."""
        config, counts_LE = self.stage, metrics["counts_LE"]
        values = load_metrics(self.in_pool_order(counts_LE), config.pool.groups, config.visible)
        if self.mesh is not None and self.mesh.shape["expert"] > 1:
            values["load/device"] = device_loads(counts_LE, self.mesh.shape["expert"])
            values["load/received"] = self.buffers.loads(metrics).tolist()
        return values

    def in_pool_order(self, counts_LE: np.ndarray) -> np.ndarray:
        """Counts of the current model in the experts' original order, over each layer's pool."""
        if self.placement is not None:
            return self.placement.counts(counts_LE)
        return counts_LE if self.lock is None else self.lock.in_pool_order(counts_LE)

    def report_nonfinite(self, step: int, metrics: dict[str, jax.Array]) -> None:
        """Write the losses and the gradient norm; raise `NonFiniteError` unless such steps are skipped."""
        names = [name for name in metrics if name.startswith("loss/")] + ["grad_norm"]
        found = {name: float(jax.device_get(metrics[name])) for name in names}
        shown = ", ".join(f"{name} {value:g}" for name, value in found.items())
        skip = self.config.train.nonfinite == "skip"
        texts = {name: value if math.isfinite(value) else str(value) for name, value in found.items()}
        self.writer.write("skipped" if skip else "nonfinite", step, texts)
        if skip:
            self.progress.message(f"step {step} skipped: {shown}")
            return
        self.checkpoints.wait()
        saved = self.checkpoints.steps()
        newest = f"{self.checkpoints.path(saved[-1])}" if saved else "none yet"
        raise NonFiniteError(
            f"stopped at step {step}: its loss or gradient is not finite: {shown}\n"
            f"The step was not applied and nothing was saved after it. Newest checkpoint: {newest}\n"
            "Set train.nonfinite=skip to skip such steps (the same command resumes from that checkpoint), or "
            "start a new run with a lower optimizer.learning_rate."
        )

    def validate(self, state: TrainState, step: int) -> TrainState:
        """Evaluate on the valid split and write the result; writes nothing if a signal interrupts it.

        Returns:
          The state to continue with: an evaluation can fix or lock the ownership of experts.
        """
        config = self.config
        self.speed.pause()
        if not self.evaluator.compiled:
            self.progress.message("compiling the evaluation")
        if config.train.eval_slice == "moving":
            batches = self.evaluator.moving(math.ceil(step / (config.train.eval_every or step)) - 1)
        else:
            batches = self.evaluator.fixed("valid")
        found = self.evaluator.evaluate(state.params, state.balance, batches, self.stop.requested)
        self.valid = None if found is None else found._replace(counts_LE=self.in_pool_order(found.counts_LE))
        deep = self.at_full_depth(state, batches)
        owned = {} if self.lock is None or self.valid is None else self.lock.observe(step, self.valid)
        # A run killed between its last checkpoint and its summary has already written this line.
        if self.valid is not None and not (step == self.start and self.validated):
            counts, groups = self.valid.counts_LE, self.stage.pool.groups
            dense = config.moe.router == "none"
            routing = {} if dense else routing_diagnostics(counts, groups, config.visible)
            routing["routing/zero_gates"] = self.valid.zero_gates_L.tolist()
            self.writer.write(
                "valid",
                step,
                self.valid.as_json() | load_metrics(counts, groups, config.visible) | routing | owned | deep,
            )
            if is_process_0():
                write_array(self.folder.path / "routing" / f"{step}.npy", counts)
            self.progress.message(
                f"step {step}  valid loss {self.valid.loss:.4f}  {self.valid.perplexity:.3f} perplexity"
            )
            if (warning := zero_gate_warning(self.valid.zero_gates_L, config.moe.dense_layers)) is not None:
                self.progress.message(warning)
        self.speed.resume()
        if self.lock is not None:
            before, state = self.structure, self.lock.apply(state)
            if self.structure != before:
                self.evaluator = Evaluator(self.structure, self.corpus, self.splits, limited=True, mesh=self.mesh)
        return state

    def at_full_depth(self, state: TrainState, batches: TextBatches) -> dict[str, float]:
        """Loss and perplexity of the layers of this stage unrolled to all that there will be; empty without growth."""
        deep = None if self.growth is None else self.growth.at_full_depth
        if deep is None or self.valid is None:
            return {}
        if self.deep_evaluator is None:
            config = with_placement(deep.config, self.mesh)
            self.deep_evaluator = Evaluator(config, self.corpus, self.splits, limited=True, mesh=self.mesh)
        seen = jax.jit(deep.unroll)(state)
        found = self.deep_evaluator.evaluate(seen.params, seen.balance, batches, self.stop.requested)
        if found is None:
            self.valid = None
            return {}
        return {"loss/full_depth": found.loss, "perplexity/full_depth": found.perplexity}

    def save(self, state: TrainState, step: int) -> TrainState:
        """Start saving a checkpoint, after the metrics of all earlier steps are on disk.

        Returns:
          The state to continue with.
        """
        self.speed.pause()
        self.writer.sync()
        text = text_identity(self.corpus)
        meta = (
            make_meta(self.config, step, self.corpus.tokenizer.sha256, text)
            | self.buffers.document()
            | self.spikes.document()
        )
        meta |= mesh_document(self.mesh)
        if self.growth is not None:
            meta |= self.growth.document()
        if self.whole_lock is not None:
            meta |= self.whole_lock.document(step)
        if self.placement is not None:
            state = self.placement.undo(state)
        self.checkpoints.save(step, state._asdict(), meta)
        if self.placement is not None:
            state = self.placement.apply(state)
        if self.buffers.resize():
            self.progress.message(f"receive buffers: new capacity factor {self.buffers.factor:g}")
        self.speed.resume()
        return state

    def raise_if_interrupted(self) -> None:
        """Raise `InterruptedRunError` after a signal, when the last checkpoint is complete on disk."""
        if self.stop.signum is not None:
            self.checkpoints.wait()
            raise InterruptedRunError(self.stop.signum)

    def finish(self, state: TrainState) -> dict[str, Any]:
        """Evaluate the final model, and write and return the summary of the run."""
        self.speed.pause()
        self.checkpoints.wait()
        if self.valid is None:
            self.validate(state, self.config.train.steps)
        results: dict[str, EvalResult | None] = {"valid": self.valid}
        if "test" in self.splits:
            batches = self.evaluator.fixed("test")
            results["test"] = self.evaluator.evaluate(state.params, state.balance, batches, self.stop.requested)
        self.raise_if_interrupted()
        found = {name: result for name, result in results.items() if result is not None}
        windows = {str(name): self.evaluator.windows(name) for name in self.splits}
        loads = load_metrics(found["valid"].counts_LE, self.config.pool.groups, self.config.visible)
        summary = {
            "step": self.config.train.steps,
            "tokens": self.config.train.steps * self.config.tokens_per_step,
            "flops": flops_spent(self.config, self.config.train.steps),
            "results": {name: result.as_json() for name, result in found.items()},
            "text": text_identity(self.corpus),
            "unigram": unigram_baseline(self.corpus, windows),
            "tokens_per_second": self.speed.mean,
            "tokens_per_second_median": self.speed.median,
            "mfu": self.utilization(self.speed.mean),
            "experts_used": loads["experts/used"],
            "experts_total": self.config.total_experts,
            "busiest_over_mean": loads["load/busiest_over_mean"],
            "skipped_steps": self.writer.kinds["skipped"],
            "overflow": self.buffers.total,
            **self.spikes.shares(),
            "version": VERSION,
            "git_commit": git_commit(),
        }
        if is_process_0():
            self.folder.write_summary(summary)
        return summary
