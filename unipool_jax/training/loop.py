"""Training from the first step, or from the newest complete checkpoint, to the summary of the run."""

from __future__ import annotations

import contextlib
import functools
import math
import os
import signal
import sys
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import jax
import numpy as np

from unipool_jax.config import Config
from unipool_jax.corpus import Corpus, open_corpus
from unipool_jax.data.pipeline import Batch, WindowSource, training_batches
from unipool_jax.data.splits import SplitName
from unipool_jax.kernels.implementations import resolve
from unipool_jax.moe.lock_lifecycle import LossExcessError, structure
from unipool_jax.training.checkpoint import Checkpoints, make_meta
from unipool_jax.training.evaluate import EvalResult, Evaluator, print_results, unigram_baseline
from unipool_jax.training.flops import flops_per_token, peak_flops
from unipool_jax.training.locking import Locking, open_lock
from unipool_jax.training.metrics import (
    MetricsWriter,
    Progress,
    Stopwatch,
    load_metrics,
    perplexity,
    routing_diagnostics,
)
from unipool_jax.training.run_folder import RunError, RunFolder
from unipool_jax.training.step import TrainState, counts_before_gradient, init_state, make_train_step

EXIT_NONFINITE = 3
"""Exit code of a run that a non-finite loss or gradient stopped. A signal gives 128 + its number (130, 143)."""

EXIT_LOSS_EXCESS = 4
"""Exit code of a run with UniPool-lock that `lock.max_loss_excess` stopped."""


class NonFiniteError(RuntimeError):
    """A loss or gradient was not finite and `train.nonfinite=stop`; nothing was changed or saved because of it."""


class InterruptedRunError(RuntimeError):
    """A signal asked to stop; the state is saved."""

    def __init__(self, signum: int):
        super().__init__(signal.Signals(signum).name)
        self.signum = signum


class StopRequest:
    """Remembers the first SIGTERM or SIGINT; the second one ends the process at once."""

    def __init__(self) -> None:
        self.signum: int | None = None

    def requested(self) -> bool:
        """Whether a signal has arrived."""
        return self.signum is not None

    @contextlib.contextmanager
    def listening(self) -> Iterator[StopRequest]:
        """Handle the two signals inside the block."""

        def handle(signum: int, frame: Any) -> None:
            del frame
            self.signum = signum
            for number in (signal.SIGTERM, signal.SIGINT):
                signal.signal(number, signal.SIG_DFL)
            # os.write, as print may be in the middle of its own buffer when a signal arrives.
            os.write(2, b"\nstopping after this step and saving; once more ends it at once\n")

        previous = {number: signal.signal(number, handle) for number in (signal.SIGTERM, signal.SIGINT)}
        try:
            yield self
        finally:
            for number, handler in previous.items():
                signal.signal(number, handler)


def train(config: Config) -> int:
    """Train as `config` says, going on where the run folder left off.

    Returns:
      Exit code: 0 when the run is complete, `EXIT_NONFINITE`, `EXIT_LOSS_EXCESS`, or 128 + signal number after a clean
      interruption.

    Raises:
      RunError, CheckpointError, DataError, LockError, AssignmentError: with what to do about it; earlier checkpoints
        are intact.
    """
    with contextlib.ExitStack() as stack:
        folder = stack.enter_context(RunFolder(config))
        summary = folder.read_summary()
        if summary is not None:
            print(f"{folder.path} is finished; to train again, choose another run.name or delete the folder")
            _print_summary(config, summary)
            return 0
        corpus = open_corpus(config.data, config.model.vocab_size)
        checkpoints = stack.enter_context(Checkpoints(folder.checkpoints, config.train.keep_checkpoints))
        state = initial_state(config, checkpoints, corpus)
        start = int(jax.device_get(state.step))
        lock = open_lock(config, folder.path, checkpoints.meta(start) if checkpoints.steps() else None, start)
        if lock is not None:
            state = lock.start(state)
        writer = stack.enter_context(
            contextlib.closing(MetricsWriter(folder.path, start, tensorboard=config.run.tensorboard))
        )
        stop = stack.enter_context(StopRequest().listening())
        run = _Run(config, folder, checkpoints, corpus, writer, stop, start, lock)
        run.announce()
        try:
            state = run.steps(state)
            _print_summary(config, run.finish(state))
        except NonFiniteError as error:
            run.progress.message("")
            print(error, file=sys.stderr)
            return EXIT_NONFINITE
        except LossExcessError as error:
            run.progress.message("")
            print(error, file=sys.stderr)
            return EXIT_LOSS_EXCESS
        except InterruptedRunError as interruption:
            run.progress.message(
                f"{interruption}: saved step {checkpoints.steps()[-1]} in {folder.path}; the same command goes on there"
            )
            return 128 + interruption.signum
    return 0


def initial_state(config: Config, checkpoints: Checkpoints, corpus: Corpus) -> TrainState:
    """The state of the newest complete checkpoint, or a new one from `train.seed`.

    Raises:
      RunError: if the checkpoint was trained on ids of another tokenizer, or there is none with `run.resume=required`.
      CheckpointError: if it cannot be used.
    """
    key = jax.random.key(config.train.seed)
    init = jax.jit(functools.partial(init_state, config))
    if not checkpoints.steps():
        if config.run.resume == "required":
            raise RunError(f"run.resume=required, but {checkpoints.directory} holds no complete checkpoint")
        return init(key)

    def target(meta: Mapping[str, Any]) -> dict[str, Any]:
        return jax.eval_shape(functools.partial(init_state, structure(config, meta)), key)._asdict()

    restored = checkpoints.restore(target)
    trained_with = restored.meta["tokenizer_sha256"]
    if trained_with != corpus.tokenizer.sha256:
        raise RunError(
            f"data.tokenizer={config.data.tokenizer}: its definition (sha256 {corpus.tokenizer.sha256[:12]}) is not "
            f"the one this run was trained with ({str(trained_with)[:12]}); put that tokenizer back or start a new run"
        )
    return TrainState(**restored.items)


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
        lock: Locking | None,
    ):
        self.config, self.folder, self.checkpoints, self.corpus = config, folder, checkpoints, corpus
        self.writer, self.stop, self.start, self.lock = writer, stop, start, lock
        self.progress = Progress(config.train.steps)
        names: list[SplitName] = ["valid", "test"]
        # Without valid text the evaluator says so before the first step, not after the last.
        self.splits = [name for name in names if name == "valid" or name in corpus.splits()]
        self.evaluator = Evaluator(self.structure, corpus, self.splits, limited=True)
        self.watch = Stopwatch()
        self.mark: _Reported | None = None
        self.rate: float | None = None
        self.valid: EvalResult | None = None
        peak = peak_flops(jax.local_devices()[0].device_kind)
        self.peak = None if peak is None else peak * jax.device_count()

    @property
    def structure(self) -> Config:
        """The configuration of the model as it is now: a lock divides its pool."""
        return self.config if self.lock is None else self.lock.structure

    def announce(self) -> None:
        """Say what is about to happen."""
        config, device = self.config, jax.local_devices()[0]
        self.progress.message(
            f"{self.folder.path}: {config.scale_name} {config.method_name} on {jax.device_count()} x "
            f"{device.device_kind}, {config.total_experts} experts in {config.pool.groups} pool(s), "
            f"{config.tokens_per_step:,} tokens a step, {resolve(config.kernels.implementation)} kernels"
        )
        if counts_before_gradient(config):
            self.progress.message(
                f"the exact pool loss over {config.num_microbatches} micro-batches costs one more forward pass a step; "
                "train.microbatch_size=train.batch_size or loss.pool_statistics=previous avoids it"
            )
        if self.start:
            self.progress.message(f"going on after step {self.start}")

    def steps(self, state: TrainState) -> TrainState:
        """Train from `start` completed steps to the last one."""
        settings, start = self.config.train, self.start
        compiling = start + 1
        pending: tuple[int, dict[str, jax.Array]] | None = None
        if start and self.due(start, settings.eval_every) and "valid" not in self.writer.kinds_at_resume:
            # The interruption fell between the step and its evaluation.
            state = self.validate(state, start)
        structure = self.structure
        train_step = make_train_step(structure)
        for step, batch in enumerate(self.batches(), start + 1):
            if self.lock is not None:
                self.lock.check(step - 1)
            with jax.transfer_guard("disallow"):
                state, metrics = train_step(state, jax.device_put(batch))
            # A non-finite update was never applied, so looking one step late loses nothing and keeps the device busy.
            if pending is not None:
                self.report(*pending)
            pending = step, metrics
            self.checkpoints.check()

            first, last = step == compiling, step == settings.steps
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
                if self.structure != structure:
                    structure = self.structure
                    train_step, compiling, self.mark = make_train_step(structure), step + 1, None
                    self.evaluator = Evaluator(structure, self.corpus, self.splits, limited=True)
            if save or self.stop.requested():
                self.save(state, step)
            self.leave_if_asked()
        return state

    def due(self, step: int, every: int) -> bool:
        """Whether something done every `every` steps (0: never) is done after `step`."""
        return every > 0 and step % every == 0

    def batches(self) -> Iterator[Batch]:
        """The training batches that are left."""
        config = self.config
        num_windows = config.train.steps * config.train.batch_size
        length, seed = config.data.sequence_length, config.train.seed
        source = WindowSource(self.corpus.stores, "train", length, num_windows, seed)
        return training_batches(
            source,
            batch_size=config.train.batch_size,
            start_step=self.start,
            end_step=config.train.steps,
            num_threads=config.data.num_threads,
        )

    def report(self, step: int, metrics: dict[str, jax.Array]) -> None:
        """Look at one step: stop or note it if it was not finite, and write its metrics if it is time to."""
        if not jax.device_get(metrics["finite"]):
            self.report_nonfinite(step, metrics)
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
        values |= load_metrics(self.in_pool_order(host["counts_LE"]), self.config.pool.groups)
        self.writer.write("train", step, values)
        left = None
        if self.rate is not None:
            left = (self.config.train.steps - step) * self.config.tokens_per_step / self.rate
        self.progress.step(step, loss, float(host["learning_rate"]), self.rate, left)

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

    def in_pool_order(self, counts_LE: np.ndarray) -> np.ndarray:
        """Counts over the experts of each layer's pool as it was before a lock divided it."""
        return counts_LE if self.lock is None else self.lock.in_pool_order(counts_LE)

    def validate(self, state: TrainState, step: int) -> TrainState:
        """Evaluate on the valid split and write the result; leaves no trace if a signal arrives on the way.

        Returns:
          The state to go on with: an evaluation can freeze or lock the ownership of experts.

        Raises:
          LossExcessError: if a lock has done the run no good.
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
        if self.valid is not None and not (step == self.start and "valid" in self.writer.kinds_at_resume):
            counts, groups = self.valid.counts_LE, config.pool.groups
            routing = {} if config.moe.router == "none" else routing_diagnostics(counts, groups)
            self.writer.write("valid", step, self.valid.as_json() | load_metrics(counts, groups) | routing | owned)
            folder = self.folder.path / "routing"
            folder.mkdir(exist_ok=True)
            np.save(folder / f"{step}.npy", counts)
            self.progress.message(
                f"step {step}  valid loss {self.valid.loss:.4f}  {self.valid.perplexity:.3f} perplexity"
            )
        if self.mark is not None:
            self.watch.start()
        return state if self.lock is None else self.lock.apply(state)

    def save(self, state: TrainState, step: int) -> None:
        """Start saving a checkpoint; everything written about earlier steps is on disk before it."""
        self.watch.stop()
        self.writer.sync()
        meta = make_meta(self.config, step, self.corpus.tokenizer.sha256)
        if self.lock is not None:
            meta |= self.lock.document(step)
        self.checkpoints.save(step, state._asdict(), meta)
        self.watch.start()

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
        }
        self.folder.write_summary(summary)
        return summary


def _print_summary(config: Config, summary: dict[str, Any]) -> None:
    rate = summary["tokens_per_second"]
    facts = {
        "tokens per second": "not measured" if rate is None else f"{rate:,.0f}",
        "experts in use": f"{summary['experts_used']} of {summary['experts_total']}",
        "busiest expert over mean load": f"{summary['busiest_over_mean']:.2f}",
    }
    title = f"{config.scale_name} {config.method_name} after {summary['step']} steps, {summary['tokens']:,} tokens"
    print_results(summary["results"], summary["unigram"], facts, title)
