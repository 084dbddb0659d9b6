"""The training loop: rows in, a trained SAE, checkpoints and a log of metrics out.

It knows the SAE's interface and a stream of batches, and no architecture by name.
"""

import copy
import itertools
import logging
import time
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sae_runner import files, signals
from sae_runner.checkpoint import save_checkpoint, step_dirs
from sae_runner.errors import ConfigError, StoreError
from sae_runner.log import Progress
from sae_runner.saes.base import SAE, Loss, TrainState
from sae_runner.store.activations import Activations, Batch, Position
from sae_runner.store.prefetch import Prefetched
from sae_runner.training import schedules
from sae_runner.training.dead_latents import DEAD_LATENTS
from sae_runner.training.dead_latents.base import DeadLatents
from sae_runner.training.ema import AveragedWeights
from sae_runner.training.guardrails import Guardrails
from sae_runner.training.journal import Journal, LogSink
from sae_runner.training.options import TrainOptions as TrainOptions
from sae_runner.training.target_l0 import TargetL0

log = logging.getLogger("sae_runner")
RESAMPLE_SEED = 0x726573  # "res"


class Trainer:
    """Steps one SAE over a store; `run` returns when the budget is spent or a stop is asked for."""

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
        prefetch: int = 2,
        sinks: tuple[LogSink, ...] = (),
    ) -> None:
        self.sae, self.store, self.options, self.run_dir = sae.to(device), store, options, run_dir
        self.seed, self.data_seed, self.device = seed, data_seed, device
        self.facts, self.prefetch = facts, prefetch
        self.lr = schedules.learning_rate(options.lr, sae.d_sae)
        self.optimizer = torch.optim.Adam(
            sae.parameters(),
            lr=self.lr,
            betas=(options.beta1, options.beta2),
            eps=options.eps,
            fused=device.type in ("cpu", "cuda"),
        )
        self.dead: DeadLatents = DEAD_LATENTS.build(
            dead_latents or {"type": "none"}, sae=sae, window=options.dead_window
        )
        self.intervention_steps = frozenset(self.dead.steps(options.n_steps))
        if self.intervention_steps and store.in_order:
            raise ConfigError(
                "sae/dead_latents=resample: reads training rows again, which a stream in order "
                "cannot give; use store=disk"
            )
        controlled = sae.target_l0 if sae.penalised else None
        self.target_l0 = None if controlled is None else TargetL0(controlled)
        self.step, self.position = 0, Position()
        self.mean = torch.zeros(sae.d_in)
        self.journal = Journal(run_dir, options.batch_size, sinks)
        self.guardrails = Guardrails(sae, options, self.lr, self.dead.revives)
        self.keep_at = options.checkpoint_steps()
        if options.checkpoint_interventions:
            self.keep_at |= self.dead.milestones(options.n_steps)
        self.averaged: AveragedWeights | None = None
        self.used = sae
        """What is saved for use, once training is over."""
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
        self._begin_average()

    def _begin_average(self) -> None:
        if self.options.ema is not None:
            self.averaged = AveragedWeights(self.sae, self.options.ema)

    def restore(
        self, state: dict[str, Any], weights: dict[str, Tensor], optimizer: dict[str, Tensor]
    ) -> None:
        """Go on exactly where a checkpoint was written.

        Raises:
            StoreError: something that this configuration needs is not in it.
        """
        try:
            self._restore(state, weights, optimizer)
            self.position = Position(**state["position"])
            self.step = self.saved_step = state["step"]  # Last: what failed before begins anew.
        except KeyError as error:
            raise StoreError(f"checkpoint of step {state.get('step')} lacks {error}") from None
        self.journal.go_back_to(self.step)

    def _restore(
        self, state: dict[str, Any], weights: dict[str, Tensor], optimizer: dict[str, Tensor]
    ) -> None:
        self.sae.load_tensors(weights)
        self.dead.rows_since_fired.copy_(optimizer.pop("dead.rows_since_fired"))
        self._begin_average()
        if self.averaged is not None:
            self.averaged.restore(optimizer)
        if self.target_l0 is not None:
            self.target_l0.restore(state["target_l0"])
        for name, parameter in self.sae.named_parameters():
            slots = {k.split("/")[1]: v for k, v in optimizer.items() if k.startswith(name + "/")}
            self.optimizer.state[parameter] = {
                k: v if k == "step" and self.device.type == "cpu" else v.to(self.device)
                for k, v in slots.items()
            }

    # -- The loop --------------------------------------------------------------------------------

    def run(self) -> None:
        """Train to the end of the budget.

        Raises:
            Interrupted: a stop was asked for; the state is saved.
            ConfigError: training diverged.
        """
        options = self.options
        batches = Prefetched(self.batches(), self.prefetch)
        progress = Progress(
            "train",
            options.n_steps * options.batch_size,
            "rows",
            done=self.step * options.batch_size,
        )
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
                    progress.advance(len(batch.x))
        finally:
            progress.close()
            batches.close()

    def begin(self) -> None:
        """Start the clocks, and learn what metrics need of the data."""
        # Before anything is read ahead: a stream is read front to back.
        mean = self.store.stats(1).mean.to(self.device)
        self.mean = self.sae.target_of(mean.unsqueeze(0))[0]
        self.journal.begin(self.step)
        self.saved_at = time.monotonic()

    def batches(self) -> Iterator[Batch]:
        """The batches that are still to come, after `begin`."""
        self.begin()
        shuffled = self.store.shuffled(self.options.batch_size, self.data_seed, start=self.position)
        # No more than will be used: a stream must not keep the model busy once training is over.
        return itertools.islice(shuffled, self.options.n_steps - self.step)

    def advance(
        self, batch: Batch, wait_s: float = 0.0, stop: signals.StopRequest | None = None
    ) -> dict[str, float] | None:
        """Take a step on a batch, and log and save what is due; the line of metrics.jsonl if any.

        Raises:
            Interrupted: `stop` is true; the state is saved.
            ConfigError: training diverged.
        """
        loss, grad_norm, lr = self.take_step(batch.x.to(self.device))
        self.step, self.position = self.step + 1, batch.position
        row, last = None, self.step == self.options.n_steps
        if self.step % self.options.log_every == 0 or last:
            row = self.log_metrics(batch.x, loss, grad_norm, lr)
            self.journal.timings(self.step, wait_s)
        stopping = bool(stop)  # A signal that comes later waits for the next step.
        if self.step in self.keep_at or last or stopping or self.save_is_due():
            target = self.sae.target_of(batch.x.to(self.device))
            self.guardrails.check_sound(self.step, target, loss, grad_norm)
            self.save(wait_s)
        if last:
            x = self.sae.input_of(batch.x.to(self.device))
            self.guardrails.look_at_end(self.step, float(loss.l0), self.used, x)
        if stop is not None and (stopping or (last and stop)):
            self._interrupt(stop)
        return row

    def intervene(self) -> None:
        """Let the strategy for dead latents change weights, by rows of an order of its own."""
        seed = self.data_seed + RESAMPLE_SEED + self.step
        rows = (x.to(self.device) for x in self.epoch(seed))
        generator = torch.Generator().manual_seed(self.seed + seed)
        n_dead = int(self.dead.dead.sum())
        if self.sae.calibrates:  # Now, whenever it was last saved: what is drawn rests on its map.
            self.calibrate(self.sae)
        self.dead.intervene(rows, self.optimizer, generator)
        self.sae.after_step()
        log.info("step %d: %d dead latents pointed at badly reconstructed rows", self.step, n_dead)

    def epoch(self, seed: int) -> Iterator[Tensor]:
        """Every training row once, in batches, in the order of `seed`."""
        left = self.store.n_rows("train")
        for batch in self.store.shuffled(self.options.batch_size, seed):
            yield batch.x[:left]
            left -= len(batch.x)
            if left <= 0:
                return

    def _interrupt(self, stop: signals.StopRequest) -> None:
        stop.interrupt(f"stopped at step {self.step}; type the same command to go on")

    def take_step(self, x: Tensor) -> tuple[Loss, Tensor, float]:
        """One update on a batch [n, d_in]: the loss of its last part, gradient norm, lr."""
        options, sae = self.options, self.sae
        if self.step in self.intervention_steps:  # A checkpoint of this step is from before.
            self.intervene()
        lr_factor = schedules.lr_factor(
            self.step,
            options.n_steps,
            warmup_fraction=options.lr_warmup,
            decay_fraction=options.lr_decay,
            shape=options.lr_decay_shape,
        ) * self.dead.lr_factor(self.step, options.n_steps)
        lr = self.lr * lr_factor
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        penalty = schedules.warmup(self.step, options.penalty_warmup * options.n_steps)
        if self.target_l0 is not None:
            penalty *= self.target_l0.factor
        state = TrainState(penalty, self.step / options.n_steps)
        self.optimizer.zero_grad(set_to_none=True)
        parts = torch.split(x, options.micro_batch_size or len(x))
        losses = []
        for part in parts:
            with torch.autocast(
                self.device.type, torch.bfloat16, enabled=options.precision == "bf16"
            ):
                loss = self.dead.add_to(sae.loss(part, state), sae.input_of(part))
            (loss.total * (len(part) / len(x))).backward()  # type: ignore[no-untyped-call]
            losses.append(Loss(*(_detached(field) for field in loss)))
        sae.before_step()
        # An unreachable bound measures without clipping.
        grad_norm = torch.nn.utils.clip_grad_norm_(
            sae.parameters(), options.clip_grad_norm or float("inf")
        )
        self.optimizer.step()
        sae.after_step()
        if self.averaged is not None:
            self.averaged.update(sae)
        whole = _merged(losses)
        self.dead.update(whole.fired, len(x))
        if self.target_l0 is not None:
            self.target_l0.update(float(whole.l0), state.progress)
        return whole, grad_norm, lr

    # -- What is kept ----------------------------------------------------------------------------

    def log_metrics(self, x: Tensor, loss: Loss, grad_norm: Tensor, lr: float) -> dict[str, float]:
        """Append one line to metrics.jsonl and hand it to the loggers."""
        x = self.sae.target_of(x.to(self.device))
        error = (x - loss.x_hat).square().sum()
        variance = (x - self.mean).square().sum()
        row: dict[str, float] = {
            "step": self.step,
            "n_tokens": self.step * self.options.batch_size,
            "loss": float(loss.total),
            **{name: float(value) for name, value in loss.parts.items()},
            "l0": float(loss.l0),
            "fvu": float(error / variance.clamp_min(1e-12)),
            "dead_fraction": float(self.dead.dead.float().mean()),
            "lr": lr,
            "grad_norm": float(grad_norm),
        }
        if self.target_l0 is not None:
            row["penalty_factor"] = self.target_l0.factor
        self.guardrails.check_sound(self.step, x, loss, grad_norm)
        self.guardrails.look(self.step, loss, self.dead.dead)
        self.journal.metrics(row)
        return row

    def save_is_due(self) -> bool:
        """Whether a kill would now cost more than `save_every` minutes."""
        minutes = self.options.save_every
        return minutes is not None and time.monotonic() - self.saved_at >= 60 * minutes

    def for_inference(self) -> SAE:
        """A copy of the SAE as it is to be used: averaged, with its threshold measured."""
        sae = copy.deepcopy(self.sae) if self.averaged is None else self.averaged.applied(self.sae)
        if sae.calibrates:
            self.calibrate(sae)
        return sae

    def calibrate(self, sae: SAE) -> float:
        """Measure the threshold of `sae` on held-out rows; their mean L0 with it."""
        n = self.options.n_calibration
        heldout = self.store.rows("heldout", self.options.batch_size, n)
        return sae.calibrate((rows.x.to(self.device) for rows in heldout), n)

    def save(self, wait_s: float = 0.0) -> None:
        """Write a checkpoint, then remove those that neither `checkpoints` nor a resume needs.

        While training goes on the one before is kept too, should the newest turn out damaged.

        Raises:
            ConfigError: a weight is not finite.
        """
        folder = self.run_dir / "checkpoints" / f"step_{self.step:08d}"
        if self.step == self.saved_step and folder.is_dir():
            return
        self.guardrails.check_weights(self.step)
        used = self.for_inference()
        self.used = used if self.step == self.options.n_steps else self.sae
        self.journal.timings(self.step, wait_s)
        self.journal.flush()  # On disk before the step they reach to.
        last = self.step == self.options.n_steps
        state: dict[str, Any] = {"step": self.step, "position": asdict(self.position)}
        if self.target_l0 is not None:
            state["target_l0"] = self.target_l0.state()
        tensors = {"dead.rows_since_fired": self.dead.rows_since_fired}
        if self.averaged is not None:
            tensors |= self.averaged.tensors()
        for name, parameter in self.sae.named_parameters():
            for slot, value in self.optimizer.state[parameter].items():
                tensors[f"{name}/{slot}"] = value
        keep_state = not last or self.options.keep_state
        save_checkpoint(
            folder,
            self.sae,
            {**self.facts, "step": self.step, "n_tokens": self.step * self.options.batch_size},
            state=state if keep_state else None,
            optimizer=tensors if keep_state else None,
            inference=used,
        )
        kept = self.keep_at | {self.step}
        if not last:
            kept.add(self.saved_step)
        self.saved_step, self.saved_at = self.step, time.monotonic()
        for other in step_dirs(self.run_dir):
            if int(other.name[5:]) not in kept:
                files.remove(other)
        log.debug("saved %s", folder)


def _detached(field: Any) -> Any:
    if isinstance(field, dict):
        return {k: v.detach() for k, v in field.items()}
    return field.detach()


def _merged(losses: list[Loss]) -> Loss:
    """The loss of a whole batch from those of its equal parts."""
    if len(losses) == 1:
        return losses[0]
    n = len(losses)
    return Loss(
        sum((loss.total for loss in losses), torch.zeros_like(losses[0].total)) / n,
        {k: torch.stack([loss.parts[k] for loss in losses]).mean() for k in losses[0].parts},
        torch.cat([loss.x_hat for loss in losses]),
        torch.stack([loss.fired for loss in losses]).sum(0),
        torch.stack([loss.l0 for loss in losses]).mean(),
        torch.cat([loss.residual for loss in losses]),
    )
