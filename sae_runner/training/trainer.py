"""The training loop: batches in, a trained SAE, checkpoints and a log of metrics out.

It knows the SAE's interface, an objective and a stream of batches, and none of them by name.
"""

import copy
import itertools
import logging
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sae_runner import signals
from sae_runner.errors import ConfigError
from sae_runner.log import Progress
from sae_runner.models.base import Inputs
from sae_runner.saes.base import SAE, TrainState
from sae_runner.store.activations import Activations, Batch, Position
from sae_runner.store.inputs import InputBatch
from sae_runner.store.prefetch import Prefetched
from sae_runner.training import saving, schedules
from sae_runner.training.calibration import Calibration
from sae_runner.training.dead_latents import DEAD_LATENTS
from sae_runner.training.dead_latents.base import DeadLatents
from sae_runner.training.ema import AveragedWeights
from sae_runner.training.guardrails import Guardrails
from sae_runner.training.intervention import intervene
from sae_runner.training.journal import Journal, LogSink
from sae_runner.training.objectives import OBJECTIVES
from sae_runner.training.objectives.base import Objective, Source
from sae_runner.training.options import TrainOptions as TrainOptions
from sae_runner.training.parts import Taken
from sae_runner.training.recording import Recorded
from sae_runner.training.target_l0 import DESCENT, TargetL0
from sae_runner.training.update import Update

log = logging.getLogger("sae_runner")
Stepped = tuple[Taken, Tensor | None]
"""The loss of a step, and its gradient's norm if that was found."""


class Trainer:
    """Steps one SAE; `run` returns when the budget is spent or a stop is asked for.

    Batches come from `source` and are judged by `objective`: by default rows of the store, by the
    SAE's own loss. Statistics, resampling and thresholds are of the store's rows in any case.
    """

    def __init__(
        self,
        sae: SAE,
        store: Activations,
        options: TrainOptions,
        run_dir: Path,
        *,
        seed: int,
        data_seed: int,
        device: torch.device,
        facts: dict[str, Any],
        dead_latents: dict[str, Any] | None = None,
        objective: Objective | None = None,
        source: Source | None = None,
        prefetch: int = 2,
        sinks: tuple[LogSink, ...] = (),
    ) -> None:
        self.sae, self.store, self.options, self.run_dir = sae.to(device), store, options, run_dir
        self.seed, self.data_seed, self.device = seed, data_seed, device
        self.facts, self.prefetch = facts, prefetch
        self.objective: Objective = objective or OBJECTIVES.build({"type": "local"}, sae=sae)
        self.source: Source = source or store
        self.lr = schedules.learning_rate(options.lr, sae.d_sae)
        sae.selector.precision = options.precision_on(device)
        self.update = Update(sae, options, self.lr)
        self.optimizer = self.update.optimizer
        self.recorded: Recorded[Stepped] | None = None
        if options.cuda_graph:
            self.recorded = Recorded(sae.selector.buffers, device)
        self.dead: DeadLatents = DEAD_LATENTS.build(
            dead_latents or {"type": "none"}, sae=sae, window=options.dead_window
        )
        self.intervention_steps = frozenset(self.dead.steps(options.n_steps))
        if self.intervention_steps and store.in_order:
            raise ConfigError(
                "sae/dead_latents=resample: reads training rows again, which a stream in order "
                "cannot give; use store=disk"
            )
        self.calibration = Calibration(store, options) if sae.calibrates else None
        self.target_l0 = TargetL0(sae.target_l0) if sae.penalised and sae.target_l0 else None
        self.step, self.position = 0, Position()
        self.mean = torch.zeros(sae.d_out, device=device)
        self.journal = Journal(run_dir, options.batch_size, sinks)
        self.guardrails = Guardrails(sae, options, self.lr, self.dead.revives)
        self.keep_at = options.checkpoint_steps()
        if options.checkpoint_interventions:
            self.keep_at |= self.dead.milestones(options.n_steps)
        self.averaged: AveragedWeights | None = None
        self.used = sae  # What is saved for use, once training is over.
        self.saved_step, self.saved_at = 0, time.monotonic()

    # -- Where to start --------------------------------------------------------------------------

    def initialise(self) -> None:
        """Draw the weights from `seed` and the activations' statistics."""
        stats = self.store.stats()
        stats = stats._replace(mean=stats.mean.to(self.device), sample=stats.sample.to(self.device))
        # Drawn on the CPU: other devices draw other numbers from the same seed.
        generator = torch.Generator().manual_seed(self.seed)
        with torch.no_grad():
            self.sae.initialise(stats, generator)
        self.begin_average()

    def begin_average(self) -> None:
        """Average from the weights that are there, if averaged weights are asked for."""
        if self.options.ema is not None:
            self.averaged = AveragedWeights(self.sae, self.options.ema)

    def restore(
        self, state: dict[str, Any], weights: dict[str, Tensor], optimizer: dict[str, Tensor]
    ) -> None:
        """Go on exactly where a checkpoint was written.

        Raises:
            StoreError: something that this configuration needs is not in it.
        """
        saving.restore(self, state, weights, optimizer)

    # -- The loop --------------------------------------------------------------------------------

    def run(self) -> None:
        """Train to the end of the budget.

        Raises:
            Interrupted: a stop was asked for; the state is saved.
            ConfigError: training diverged.
        """
        options = self.options
        batches = Prefetched(self.batches(), self.prefetch)
        size = options.batch_size
        progress = Progress("train", options.n_steps * size, "rows", done=self.step * size)
        try:
            with signals.deferred() as stop:
                while self.step < options.n_steps:
                    batch = batches.next_unless(stop)
                    if batch is None:  # Waiting for a window of a stream can take minutes.
                        self.save(batches.wait_s)
                        self._interrupt(stop)
                        break
                    row = self.advance(batch, batches.wait_s, stop)
                    if row:
                        note = f"loss {row['loss']:.4g} fvu {row['fvu']:.3f} l0 {row['l0']:.1f}"
                        progress.advance(0, note)
                    progress.advance(size)
        finally:
            progress.close()
            batches.close()

    def begin(self) -> None:
        """Start the clocks, and learn what metrics need of the data."""
        # Before anything is read ahead: a stream is read front to back.
        mean = self.store.stats(1).mean.to(self.device)
        self.mean = self.sae.target_of(mean.unsqueeze(0))[0]
        if self.calibration is not None:
            self.calibration.begin()
        if self.target_l0 is not None:
            self.target_l0.read(self.store, self.options.n_tokens)
        self.journal.begin(self.step)
        self.saved_at = time.monotonic()

    def batches(self) -> Iterator[Batch | InputBatch]:
        """The batches that are still to come, after `begin`."""
        self.begin()
        size = self.options.batch_size
        shuffled = self.source.shuffled(
            size, self.data_seed, start=self.position, device=self.device
        )
        # No more than will be used: a stream must not keep the model busy once training is over.
        return itertools.islice(shuffled, self.options.n_steps - self.step)

    def advance(
        self,
        batch: Batch | InputBatch,
        wait_s: float = 0.0,
        stop: signals.StopRequest | None = None,
    ) -> dict[str, float] | None:
        """Take a step on a batch, and log and save what is due; the line of metrics.jsonl if any.

        Raises:
            Interrupted: `stop` is true; the state is saved.
            ConfigError: training diverged.
        """
        taken, grad_norm, lr = self.take_step(batch.x.to(self.device))
        self.step, self.position = self.step + 1, batch.position
        row, last = None, self.step == self.options.n_steps
        if self.is_logged(self.step):
            row = self.log_metrics(taken, grad_norm, lr)
            self.journal.timings(self.step, wait_s)
        stopping = bool(stop)  # A signal that comes later waits for the next step.
        if self.step in self.keep_at or last or stopping or self.save_is_due():
            self.guardrails.check_sound(self.step, taken, grad_norm)
            self.save(wait_s)
        if last:
            x = self.sae.input_of(taken.last.x)
            l0 = float(taken.l0) * (1.0 if self.target_l0 is None else self.target_l0.ratio)
            self.guardrails.look_at_end(self.step, l0, self.used, x)
        if stop is not None and (stopping or (last and stop)):
            self._interrupt(stop)
        return row

    def _interrupt(self, stop: signals.StopRequest) -> None:
        stop.interrupt(f"stopped at step {self.step}; type the same command to go on")

    def is_logged(self, step: int) -> bool:
        """Whether a line of metrics.jsonl is written after so many steps."""
        return step % self.options.log_every == 0 or step == self.options.n_steps

    def take_step(self, x: Tensor | Inputs) -> tuple[Taken, Tensor | None, float]:
        """One update on a batch of rows [n, d_in] or of inputs: its loss, gradient norm, lr.

        The norm may not be known where nothing is clipped and no line is logged.
        """
        options, sae = self.options, self.sae
        if self.step in self.intervention_steps:  # A checkpoint of this step is from before.
            intervene(self)
        lr_factor = schedules.lr_factor(
            self.step, options.n_steps, warmup_fraction=options.lr_warmup,
            decay_fraction=options.lr_decay, shape=options.lr_decay_shape,
        ) * self.dead.lr_factor(self.step, options.n_steps)  # fmt: skip
        lr = self.lr * lr_factor
        warmup = min(options.penalty_warmup, 1.0 if self.target_l0 is None else DESCENT)
        penalty = schedules.warmup(self.step, warmup * options.n_steps)
        if self.target_l0 is not None:
            penalty *= self.target_l0.factor
        state = TrainState(penalty, self.step / options.n_steps, 1 / options.n_steps)
        measured = self.is_logged(self.step + 1)
        if self.recorded is None:
            taken, grad_norm = self._take(x, state, lr, measured=measured)
        else:
            assert isinstance(x, Tensor)
            lr_there, adds = self.recorded.lr.fill_(lr), self.dead.adds_now
            take = partial(self._take, state=state, lr=lr_there, measured=measured, adds=adds)
            # Of weights that were changed by hand a record has no copy in bfloat16.
            alone = measured or adds or self.step in self.intervention_steps
            taken, grad_norm = take(x) if alone else self.recorded(take, x)
        if self.averaged is not None:
            self.averaged.update(sae)
        self.dead.update(taken.fired, taken.n_rows)
        if self.target_l0 is not None:
            self.target_l0.update(float(taken.l0), state.progress)
            if self.target_l0.compares_at(self.step, options.n_steps):
                self.target_l0.compare(self.target_l0.heldout_l0(self.for_inference()))
        return taken, grad_norm, lr

    def _take(
        self, x: Tensor | Inputs, state: TrainState, lr: float | Tensor, *, measured: bool,
        adds: bool = True,
    ) -> Stepped:  # fmt: skip
        """Go back through the loss of a batch, and update the weights.

        A record is made of it: with `adds` false the dead add nothing.
        """
        taken = Taken(self.sae, self.mean)
        with self.update.gradients():
            parts = x.split(-(-len(x) // self.options.n_parts))
            for part, share in zip(parts, self.objective.shares(parts), strict=True):
                taken.shed()
                with torch.autocast(self.device.type, torch.bfloat16, enabled=self.options.half):
                    loss = self.objective.loss(part, state, share)
                    if adds:
                        loss = self.dead.add_to(loss, self.sae.input_of(loss.x))
                (loss.total * share.rows).backward()  # type: ignore[no-untyped-call]
                taken.add(loss)
            return taken, self.update.step(lr, measured=measured)

    # -- What is kept ----------------------------------------------------------------------------

    def log_metrics(self, taken: Taken, grad_norm: Tensor | None, lr: float) -> dict[str, float]:
        """Append one line to metrics.jsonl and hand it to the loggers."""
        assert grad_norm is not None  # Of a step that is logged it was measured.
        fit = taken.fit
        row: dict[str, float] = {
            "step": self.step,
            "n_tokens": self.step * self.options.batch_size,
            "loss": float(taken.total),
            **{name: float(value) for name, value in taken.parts.items()},
            "l0": float(taken.l0),
            "fvu": float(fit.error / fit.deviation.clamp_min(1e-12)),
            "dead_fraction": float(self.dead.dead.float().mean()),
            "lr": lr,
            "grad_norm": float(grad_norm),
        }
        if self.target_l0 is not None:
            row["penalty_factor"] = self.target_l0.factor
        self.guardrails.check_sound(self.step, taken, grad_norm)
        self.guardrails.look(self.step, float(taken.total), self.dead.dead)
        self.journal.metrics(row)
        return row

    def save_is_due(self) -> bool:
        """Whether a kill would now cost more than `save_every` minutes."""
        minutes = self.options.save_every
        return minutes is not None and time.monotonic() - self.saved_at >= 60 * minutes

    def for_inference(self, *, is_kept: bool = False) -> SAE:
        """A copy of the SAE as it is to be used: averaged, k of this step, a measured threshold.

        `is_kept` measures it on all rows that `n_calibration` asks for.
        """
        sae = copy.deepcopy(self.sae) if self.averaged is None else self.averaged.applied(self.sae)
        sae.settle(self.step / self.options.n_steps)
        if self.calibration is not None:
            self.calibration.measure(sae, on_all=is_kept)
        return sae

    def save(self, wait_s: float = 0.0) -> None:
        """Write a checkpoint, then remove those that neither `checkpoints` nor a resume needs.

        While training goes on the one before is kept too, should the newest turn out damaged.

        Raises:
            ConfigError: a weight is not finite.
        """
        saving.save(self, wait_s)
