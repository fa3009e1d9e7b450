"""Training from the first step, or from the newest complete checkpoint, to the summary of the run."""

from __future__ import annotations

import contextlib
import io
import math
import sys
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh

from unipool_jax.config.schema import Config
from unipool_jax.data.corpus import Corpus, open_corpus
from unipool_jax.data.errors import DataError
from unipool_jax.data.pipeline import Batch, WindowSource, training_batches
from unipool_jax.data.splits import SplitName
from unipool_jax.kernels.implementations import resolve
from unipool_jax.moe.dispatch import transport_for
from unipool_jax.moe.lock_lifecycle import LossExcessError
from unipool_jax.parallel.mesh import usable_mesh
from unipool_jax.parallel.processes import is_main, main_first, told_by_main
from unipool_jax.training.checkpoint import Checkpoints, make_meta
from unipool_jax.training.evaluate import EvalResult, Evaluator, print_results, unigram_baseline
from unipool_jax.training.flops import flops_per_token, peak_flops
from unipool_jax.training.initial import initial_state
from unipool_jax.training.locking import Locking, open_lock
from unipool_jax.training.metrics import (
    MetricsWriter,
    Progress,
    Stopwatch,
    device_loads,
    load_metrics,
    perplexity,
    routing_diagnostics,
)
from unipool_jax.training.placement import Placement, measured, newest_counts
from unipool_jax.training.receive_buffers import OverflowedError, ReceiveBuffers
from unipool_jax.training.run_folder import RunError, RunFolder
from unipool_jax.training.sharding import misplaced_banks, process_rows, report, to_devices
from unipool_jax.training.state import TrainState
from unipool_jax.training.step import counts_before_gradient, make_train_step
from unipool_jax.training.stopping import InterruptedRunError, StopRequest

EXIT_NONFINITE = 3
"""Exit code of a run that a non-finite loss or gradient stopped. A signal gives 128 + its number (130, 143)."""

EXIT_LOSS_EXCESS = 4
"""Exit code of a run with UniPool-lock that `lock.max_loss_excess` stopped."""


class NonFiniteError(RuntimeError):
    """A loss or gradient was not finite and `train.nonfinite=stop`; nothing was changed or saved because of it."""


def train(config: Config) -> int:
    """Train as `config` says, going on where the run folder left off.

    Returns:
      Exit code: 0 when the run is complete, `EXIT_NONFINITE` (also when receive buffers overflowed),
      `EXIT_LOSS_EXCESS`, or 128 + signal number after a clean interruption.

    Raises:
      ConfigError, RunError, CheckpointError, DataError, LockError, AssignmentError: with what to do about it; earlier
        checkpoints are intact.
      PeerError: when process 0 raised one of these.
    """
    mesh = usable_mesh(config)
    with contextlib.ExitStack() as stack:
        if mesh is not None:
            stack.enter_context(jax.set_mesh(mesh))
        folder = stack.enter_context(main_first(lambda: RunFolder(config, writes=is_main()), (RunError, OSError)))
        summary = folder.read_summary()
        if summary is not None:
            if is_main():
                print(f"{folder.path} is finished; to train again, choose another run.name or delete the folder")
                _print_summary(config, summary)
            return 0
        corpus = main_first(lambda: open_corpus(config.data, config.model.vocab_size), (DataError, OSError))
        checkpoints = stack.enter_context(Checkpoints(folder.checkpoints, config.train.keep_checkpoints))
        state = initial_state(config, checkpoints, corpus, mesh)
        start = int(jax.device_get(state.step))
        meta = checkpoints.meta(start) if checkpoints.steps() else None
        lock = open_lock(config, folder.path, meta, start, mesh)
        if lock is not None:
            state = lock.start(state)
        writer = stack.enter_context(
            contextlib.closing(
                MetricsWriter(folder.path, start, tensorboard=config.run.tensorboard, main=is_main()),
            )
        )
        stop = stack.enter_context(StopRequest().listening())
        buffers = ReceiveBuffers(config, mesh, folder.path, meta)
        run = _Run(config, folder, checkpoints, corpus, writer, stop, start, mesh, lock, buffers)
        run.announce(state)
        try:
            state = run.place(state)
            state = run.steps(state)
            summary = run.finish(state)
            if is_main():
                _print_summary(config, summary)
        except (NonFiniteError, OverflowedError, LossExcessError) as error:
            run.progress.message("")
            if is_main():
                print(error, file=sys.stderr)
            return EXIT_LOSS_EXCESS if isinstance(error, LossExcessError) else EXIT_NONFINITE
        except InterruptedRunError as interruption:
            run.progress.message(
                f"{interruption}: saved step {checkpoints.steps()[-1]} in {folder.path}; the same command goes on there"
            )
            return 128 + interruption.signum
    return 0


class _Reported(NamedTuple):
    """A point in training at which the throughput was looked at."""

    step: int
    seconds: float


class _Run:
    """What the steps of one run share; `start` is the number of steps completed before."""

    def __init__(
        self,
        config: Config,
        folder: RunFolder,
        checkpoints: Checkpoints,
        corpus: Corpus,
        writer: MetricsWriter,
        stop: StopRequest,
        start: int,
        mesh: Mesh | None,
        lock: Locking | None,
        buffers: ReceiveBuffers,
    ):
        self.config, self.folder, self.checkpoints, self.corpus = config, folder, checkpoints, corpus
        self.writer, self.stop, self.start, self.mesh, self.lock = writer, stop, start, mesh, lock
        self.buffers = buffers
        self.validated = told_by_main("yes" if "valid" in writer.kinds_at_resume else "") == "yes"
        self.placement: Placement | None = None
        self.progress = Progress(config.train.steps, None if is_main() else io.StringIO())
        names: list[SplitName] = ["valid", "test"]
        # Without valid text the evaluator says so before the first step, not after the last.
        self.splits = [name for name in names if name == "valid" or name in corpus.splits()]
        self.evaluator = Evaluator(self.structure, corpus, self.splits, limited=True, mesh=mesh)
        self.watch = Stopwatch()
        self.mark: _Reported | None = None
        self.rate: float | None = None
        self.valid: EvalResult | None = None
        peak = peak_flops(jax.local_devices()[0].device_kind)
        self.peak = None if peak is None else peak * self.num_devices

    @property
    def num_devices(self) -> int:
        """Devices that train."""
        return 1 if self.mesh is None else self.mesh.size

    @property
    def structure(self) -> Config:
        """The configuration of the model as it is now: a lock divides its pool."""
        return self.config if self.lock is None else self.lock.structure

    def announce(self, state: TrainState) -> None:
        """Say what is about to happen, and where every large array is."""
        config, device = self.config, jax.local_devices()[0]
        self.progress.message(
            f"{self.folder.path}: {config.scale_name} {config.method_name} on {self.num_devices} x "
            f"{device.device_kind}, {config.total_experts} experts in {config.pool.groups} pool(s), "
            f"{config.tokens_per_step:,} tokens a step, {resolve(config.kernels.implementation)} kernels"
        )
        if counts_before_gradient(config):
            self.progress.message(
                f"the exact pool loss over {config.num_microbatches} micro-batches costs one more forward pass a step; "
                "train.microbatch_size=train.batch_size or loss.pool_statistics=previous avoids it"
            )
        if self.num_devices < jax.device_count():
            self.progress.message(f"{jax.device_count()} devices are here; mesh.data=-1 would use them all")
        if self.mesh is not None:
            sizes = " x ".join(f"{axis} {size}" for axis, size in self.mesh.shape.items())
            transport = transport_for(config.mesh, self.mesh.shape["expert"])
            room = "" if transport == "local" else f" with room for {self.buffers.factor:g} times the mean"
            self.progress.message(
                f"mesh {sizes}, {jax.process_count()} process(es), {transport} transport{room}\n{report(state)}"
            )
            if misplaced := misplaced_banks(config, self.mesh, state):
                raise RunError(
                    f"mesh {sizes}: expert weights are not split as it says: {', '.join(misplaced)} a device"
                )
        if self.start:
            self.progress.message(f"going on after step {self.start}")

    def place(self, state: TrainState) -> TrainState:
        """Lay the experts of a resumed run out for even device loads, if that is asked for and was measured."""
        if self.config.mesh.expert_placement == "contiguous" or self.mesh is None or self.mesh.shape["expert"] == 1:
            return state
        counts_LE = newest_counts(self.folder.path / "routing", self.start)
        if counts_LE is None:
            self.progress.message("expert placement: nothing measured yet, neighbours share a device")
            return state
        self.placement = measured(self.config, self.mesh, counts_LE)
        return self.placement.apply(state)

    def steps(self, state: TrainState) -> TrainState:
        """Train from `start` completed steps to the last one."""
        settings, start = self.config.train, self.start
        compiled = start + 1
        pending: tuple[int, dict[str, jax.Array]] | None = None
        if start and self.due(start, settings.eval_every) and not self.validated:
            # The interruption fell between the step and its evaluation.
            state = self.validate(state, start)
        built = self.buffers.of(self.structure)
        train_step = make_train_step(built, self.mesh)
        for step, batch in enumerate(self.batches(), start + 1):
            placed = self.on_devices(batch)
            if self.lock is not None:
                self.lock.check(step - 1)
            with jax.transfer_guard("disallow"):
                state, metrics = train_step(state, placed)
            # A non-finite update was never applied, so looking one step late loses nothing and keeps the device busy.
            if pending is not None:
                self.report(*pending)
            pending = step, metrics
            self.checkpoints.check()
            self.stop.agree()

            first, last = step == compiled, step == settings.steps
            evaluate = last or self.due(step, settings.eval_every)
            save = last or self.due(step, settings.checkpoint_every)
            if first or evaluate or save or self.stop.requested():
                self.report(*pending)
                pending = None
                if first:
                    # Compilation is over: from here on time is throughput.
                    self.watch.start()
                    self.mark = _Reported(step, self.watch.seconds)
            if evaluate and not self.stop.requested():
                state = self.validate(state, step)
            if save or self.stop.requested():
                state = self.save(state, step)
            self.leave_if_asked()
            if (wanted := self.buffers.of(self.structure)) != built and not last:
                # A lock, or buffers of another size: another program from here on.
                built, compiled, self.mark = wanted, step + 1, None
                train_step = make_train_step(built, self.mesh)
        return state

    def due(self, step: int, every: int) -> bool:
        """Whether something done every `every` steps (0: never) is done after `step`."""
        return every > 0 and step % every == 0

    def on_devices(self, batch: Batch) -> Batch:
        """This process's rows of a training batch, on their devices."""
        if self.mesh is None:
            return jax.device_put(batch)
        return to_devices(self.mesh, batch, self.config.train.batch_size)

    def batches(self) -> Iterator[Batch]:
        """This process's rows of the training batches that are left."""
        config = self.config
        num_windows = config.train.steps * config.train.batch_size
        length, seed = config.data.sequence_length, config.train.seed
        source = WindowSource(self.corpus.stores, "train", length, num_windows, seed)
        return training_batches(
            source,
            batch_size=config.train.batch_size,
            start_step=self.start,
            end_step=config.train.steps,
            rows=None if self.mesh is None else process_rows(self.mesh, config.train.batch_size),
            num_threads=config.data.num_threads,
        )

    def report(self, step: int, metrics: dict[str, jax.Array]) -> None:
        """Look at one step: stop or note it if it was not finite, and write its metrics if it is time to."""
        if not jax.device_get(metrics["finite"]):
            self.report_nonfinite(step, metrics)
        self.buffers.add(step, metrics)
        if not self.due(step, self.config.train.log_every) and step != self.config.train.steps:
            return
        host = jax.device_get(metrics)
        values: dict[str, Any] = {key: host[key] for key in sorted(host) if np.ndim(host[key]) == 0 and key != "finite"}
        loss = float(host["loss/lm"])
        self.measure_rate(step)
        mfu = None
        if self.rate is not None and self.peak is not None:
            mfu = flops_per_token(self.config) * self.rate / self.peak
        values |= {"perplexity": perplexity(loss), "tokens": step * self.config.tokens_per_step}
        values |= {"tokens_per_second": self.rate, "mfu": mfu}
        if "router_scale_L" in host:
            values["router_scale"] = host["router_scale_L"]
        values |= self.loads(host) | {"overflow": self.buffers.take()}
        self.writer.write("train", step, values)
        left = None
        if self.rate is not None:
            left = (self.config.train.steps - step) * self.config.tokens_per_step / self.rate
        self.progress.step(step, loss, float(host["learning_rate"]), self.rate, left)

    def loads(self, metrics: dict[str, Any]) -> dict[str, Any]:
        """How even the use of experts is, and of devices where experts are dealt out over them."""
        config, counts_LE = self.config, metrics["counts_LE"]
        values = load_metrics(self.in_pool_order(counts_LE), config.pool.groups)
        if self.mesh is not None and self.mesh.shape["expert"] > 1:
            values["load/device"] = device_loads(counts_LE, self.mesh.shape["expert"])
            values["load/received"] = self.buffers.loads(metrics).tolist()
        return values

    def in_pool_order(self, counts_LE: np.ndarray) -> np.ndarray:
        """Counts of the model as it is now, over the experts of each layer's pool in their own order."""
        if self.placement is not None:
            return self.placement.counts(counts_LE)
        return counts_LE if self.lock is None else self.lock.in_pool_order(counts_LE)

    def measure_rate(self, step: int) -> None:
        """Update the tokens per second since the last look."""
        if self.mark is None or step <= self.mark.step:
            return
        now = _Reported(step, self.watch.seconds)
        elapsed = max(now.seconds - self.mark.seconds, 1e-9)
        self.rate = (now.step - self.mark.step) * self.config.tokens_per_step / elapsed
        self.mark = now

    def report_nonfinite(self, step: int, metrics: dict[str, jax.Array]) -> None:
        """Write what was not finite; raise `NonFiniteError` unless such steps are skipped."""
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
        good = f"{self.checkpoints.path(saved[-1])}" if saved else "none yet"
        raise NonFiniteError(
            f"stopped at step {step}, its loss or gradient is not finite: {shown}\n"
            f"The step was not applied and nothing was saved after it. Last good checkpoint: {good}\n"
            "Use train.nonfinite=skip to leave such steps out (the same command goes on from that checkpoint), or "
            "start a new run with a lower optimizer.learning_rate."
        )

    def validate(self, state: TrainState, step: int) -> TrainState:
        """Evaluate on the valid split and write the result; leaves no trace if a signal arrives on the way.

        Returns:
          The state to go on with: an evaluation can freeze or lock the ownership of experts.
        """
        config = self.config
        self.watch.stop()
        if config.train.eval_slice == "moving":
            batches = self.evaluator.moving(math.ceil(step / (config.train.eval_every or step)) - 1)
        else:
            batches = self.evaluator.fixed("valid")
        found = self.evaluator.evaluate(state.params, state.balance, batches, self.stop.requested)
        self.valid = None if found is None else found._replace(counts_LE=self.in_pool_order(found.counts_LE))
        owned = {} if self.lock is None or self.valid is None else self.lock.observe(step, self.valid)
        # A run that was killed between its last checkpoint and its summary has the line already.
        if self.valid is not None and not (step == self.start and self.validated):
            counts, groups = self.valid.counts_LE, config.pool.groups
            routing = {} if config.moe.router == "none" else routing_diagnostics(counts, groups)
            self.writer.write("valid", step, self.valid.as_json() | load_metrics(counts, groups) | routing | owned)
            if is_main():
                folder = self.folder.path / "routing"
                folder.mkdir(exist_ok=True)
                np.save(folder / f"{step}.npy", counts)
            self.progress.message(
                f"step {step}  valid loss {self.valid.loss:.4f}  {self.valid.perplexity:.3f} perplexity"
            )
        if self.mark is not None:
            self.watch.start()
        if self.lock is not None:
            before, state = self.structure, self.lock.apply(state)
            if self.structure != before:
                self.evaluator = Evaluator(self.structure, self.corpus, self.splits, limited=True, mesh=self.mesh)
        return state

    def save(self, state: TrainState, step: int) -> TrainState:
        """Start saving a checkpoint; everything written about earlier steps is on disk before it.

        Returns:
          The state to go on with.
        """
        self.watch.stop()
        self.writer.sync()
        meta = make_meta(self.config, step, self.corpus.tokenizer.sha256) | self.buffers.document()
        if self.lock is not None:
            meta |= self.lock.document(step)
        if self.placement is not None:
            state = self.placement.undo(state)
        self.checkpoints.save(step, state._asdict(), meta)
        if self.placement is not None:
            state = self.placement.apply(state)
        if self.buffers.resize():
            self.progress.message(f"receive buffers: room for {self.buffers.factor:g} times the mean from here on")
        self.watch.start()
        return state

    def leave_if_asked(self) -> None:
        """Raise `InterruptedRunError`, with the last checkpoint complete on disk, if a signal has arrived."""
        if self.stop.signum is not None:
            self.checkpoints.wait()
            raise InterruptedRunError(self.stop.signum)

    def finish(self, state: TrainState) -> dict[str, Any]:
        """Evaluate the final model and write the summary of the run."""
        self.watch.stop()
        self.checkpoints.wait()
        if self.valid is None:
            self.validate(state, self.config.train.steps)
        results: dict[str, EvalResult | None] = {"valid": self.valid}
        if "test" in self.splits:
            batches = self.evaluator.fixed("test")
            results["test"] = self.evaluator.evaluate(state.params, state.balance, batches, self.stop.requested)
        self.leave_if_asked()
        found = {name: result for name, result in results.items() if result is not None}
        windows = {str(name): self.evaluator.windows(name) for name in self.splits}
        loads = load_metrics(found["valid"].counts_LE, self.config.pool.groups)
        summary = {
            "step": self.config.train.steps,
            "tokens": self.config.train.steps * self.config.tokens_per_step,
            "results": {name: result.as_json() for name, result in found.items()},
            "unigram": unigram_baseline(self.corpus, windows),
            "tokens_per_second": self.rate,
            "experts_used": loads["experts/used"],
            "experts_total": self.config.total_experts,
            "busiest_over_mean": loads["load/busiest_over_mean"],
            "overflow": self.buffers.total,
        }
        if is_main():
            self.folder.write_summary(summary)
        return summary


def _print_summary(config: Config, summary: dict[str, Any]) -> None:
    rate = summary["tokens_per_second"]
    facts = {
        "tokens per second": "not measured" if rate is None else f"{rate:,.0f}",
        "experts in use": f"{summary['experts_used']} of {summary['experts_total']}",
        "busiest expert over mean load": f"{summary['busiest_over_mean']:.2f}",
    }
    # A summary of an earlier version counted none.
    if dropped := summary.get("overflow"):
        facts["rows without their expert (mesh.overflow=drop)"] = f"{dropped:,}"
    title = f"{config.scale_name} {config.method_name} after {summary['step']} steps, {summary['tokens']:,} tokens"
    print_results(summary["results"], summary["unigram"], facts, title)
