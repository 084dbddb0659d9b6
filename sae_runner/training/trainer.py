"""The training loop: rows in, a trained SAE, checkpoints and a log of metrics out.

It knows the SAE's interface and a stream of batches, and no architecture by name.
"""

import itertools
import json
import logging
import math
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from sae_runner import files, signals
from sae_runner.checkpoint import save_checkpoint, step_dirs
from sae_runner.errors import ConfigError
from sae_runner.log import Progress
from sae_runner.meters import peak_rss_mib
from sae_runner.saes.base import SAE, Loss, TrainState
from sae_runner.store.activations import Activations, Position
from sae_runner.store.prefetch import Prefetched
from sae_runner.training import schedules
from sae_runner.training.dead_latents import DeadLatents
from sae_runner.training.options import TrainOptions as TrainOptions

log = logging.getLogger("sae_runner")
DIVERGED = 1e4
"""Squared error over squared norm of x: a reconstruction a hundred times too long is none."""
LogSink = Callable[[dict[str, float]], None]


class _Logged(NamedTuple):
    """When timings were logged last."""

    step: int
    at: float
    wait_s: float = 0.0


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
        prefetch: int = 2,
        sinks: tuple[LogSink, ...] = (),
    ) -> None:
        self.sae, self.store, self.options, self.run_dir = sae.to(device), store, options, run_dir
        self.seed, self.data_seed, self.device = seed, data_seed, device
        self.facts, self.prefetch, self.sinks = facts, prefetch, sinks
        self.lr = schedules.learning_rate(options.lr, sae.d_sae)
        self.optimizer = torch.optim.Adam(
            sae.parameters(),
            lr=self.lr,
            betas=(options.beta1, options.beta2),
            eps=options.eps,
            fused=device.type in ("cpu", "cuda"),
        )
        self.dead = DeadLatents(sae.d_sae, options.dead_window, device)
        self.step, self.position = 0, Position()
        self.mean = torch.zeros(sae.d_in)
        self.logged = _Logged(0, time.perf_counter())
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

    def restore(
        self, state: dict[str, Any], weights: dict[str, Tensor], optimizer: dict[str, Tensor]
    ) -> None:
        """Go on exactly where a checkpoint was written."""
        self.step, self.position = state["step"], Position(**state["position"])
        self.saved_step = self.step
        self.sae.load_tensors(weights)
        self.dead.rows_since_fired.copy_(optimizer.pop("dead.rows_since_fired"))
        for name, parameter in self.sae.named_parameters():
            slots = {k.split("/")[1]: v for k, v in optimizer.items() if k.startswith(name + "/")}
            self.optimizer.state[parameter] = {
                k: v if k == "step" and self.device.type == "cpu" else v.to(self.device)
                for k, v in slots.items()
            }
        self._truncate("metrics.jsonl")
        self._truncate("timings.jsonl")

    def _truncate(self, name: str) -> None:
        """Forget what was logged after the step that is gone back to."""
        path = self.run_dir / name
        if path.is_file():
            lines = [line for line in path.read_text().splitlines() if line.endswith("}")]
            kept = [line for line in lines if json.loads(line)["step"] <= self.step]
            files.write_text(path, "".join(line + "\n" for line in kept))

    # -- The loop --------------------------------------------------------------------------------

    def run(self) -> None:
        """Train to the end of the budget.

        Raises:
            Interrupted: a stop was asked for; the state is saved.
            ConfigError: training diverged.
        """
        options = self.options
        keep_at = options.checkpoint_steps()
        # Before anything is read ahead: a stream is read front to back.
        self.mean = self.store.stats(1).mean.to(self.device)
        shuffled = self.store.shuffled(options.batch_size, self.data_seed, start=self.position)
        # No more than will be used: a stream must not keep the model busy once training is over.
        batches = Prefetched(itertools.islice(shuffled, options.n_steps - self.step), self.prefetch)
        progress = Progress(
            "train",
            options.n_steps * options.batch_size,
            "rows",
            done=self.step * options.batch_size,
        )
        self.logged = _Logged(self.step, time.perf_counter())
        self.saved_at = time.monotonic()
        try:
            with signals.deferred() as stop:
                while self.step < options.n_steps:
                    batch = batches.next_unless(stop)
                    if batch is None:  # Waiting for a window of a stream can take minutes.
                        self.log_timings(batches.wait_s)
                        self.save()
                        self._interrupt(stop)
                        break
                    loss, grad_norm, lr = self.take_step(batch.x.to(self.device))
                    self.step, self.position = self.step + 1, batch.position
                    last = self.step == options.n_steps
                    logging_now = self.step % options.log_every == 0 or last
                    if logging_now:
                        row = self.log_metrics(batch.x, loss, grad_norm, lr)
                        note = f"loss {row['loss']:.4g} fvu {row['fvu']:.3f} l0 {row['l0']:.1f}"
                        progress.advance(0, note)
                    progress.advance(len(batch.x))
                    stopping = bool(stop)  # A signal that comes later waits for the next step.
                    saving = self.step in keep_at or last or stopping or self.save_is_due()
                    if saving or logging_now:
                        self.log_timings(batches.wait_s)
                    if saving:
                        self.check_sound(batch.x, loss, grad_norm)
                        self.save()
                    if stopping or (last and stop):
                        self._interrupt(stop)
        finally:
            progress.close()
            batches.close()

    def _interrupt(self, stop: signals.StopRequest) -> None:
        stop.interrupt(f"stopped at step {self.step}; type the same command to go on")

    def take_step(self, x: Tensor) -> tuple[Loss, Tensor, float]:
        """One update on a batch [n, d_in]: the loss of its last part, gradient norm, lr."""
        options, sae = self.options, self.sae
        lr = self.lr * schedules.lr_factor(
            self.step,
            options.n_steps,
            warmup_fraction=options.lr_warmup,
            decay_fraction=options.lr_decay,
        )
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        penalty = schedules.warmup(self.step, options.penalty_warmup * options.n_steps)
        state = TrainState(self.dead.dead, penalty)
        self.optimizer.zero_grad(set_to_none=True)
        parts = torch.split(x, options.micro_batch_size or len(x))
        losses = []
        for part in parts:
            with torch.autocast(
                self.device.type, torch.bfloat16, enabled=options.precision == "bf16"
            ):
                loss = sae.loss(part, state)
            (loss.total * (len(part) / len(x))).backward()  # type: ignore[no-untyped-call]
            losses.append(Loss(*(_detached(field) for field in loss)))
        sae.before_step()
        # An unreachable bound measures without clipping.
        grad_norm = torch.nn.utils.clip_grad_norm_(
            sae.parameters(), options.clip_grad_norm or float("inf")
        )
        self.optimizer.step()
        sae.after_step()
        whole = _merged(losses)
        self.dead.update(whole.fired, len(x))
        return whole, grad_norm, lr

    # -- What is kept ----------------------------------------------------------------------------

    def log_metrics(self, x: Tensor, loss: Loss, grad_norm: Tensor, lr: float) -> dict[str, float]:
        """Append one line to metrics.jsonl and hand it to the loggers."""
        x = x.to(self.device)
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
        self.check_sound(x, loss, grad_norm)
        self._append("metrics.jsonl", row)
        for sink in self.sinks:
            sink(row)
        return row

    def check_sound(self, x: Tensor, loss: Loss, grad_norm: Tensor) -> None:
        """Refuse to log or save a step of a training that went astray.

        Raises:
            ConfigError: the loss or its gradient is not finite, or the reconstruction is absurd.
        """
        x = x.to(self.device)
        size = x.square().sum().clamp_min(1e-12)
        found = {
            "loss": float(loss.total),
            "grad_norm": float(grad_norm),
            "squared error / squared norm": float((x - loss.x_hat).square().sum() / size),
        }
        found |= {name: float(p.detach().sum()) for name, p in self.sae.named_parameters()}
        limits = {"squared error / squared norm": DIVERGED}
        for name, value in found.items():
            if not abs(value) < limits.get(name, math.inf):
                raise ConfigError(
                    f"training diverged at step {self.step}: {name} is {value:.3g}; lower "
                    f"trainer.lr ({self.lr:.2g}) or trainer.clip_grad_norm "
                    f"({self.options.clip_grad_norm}); the last checkpoint stays"
                )

    def log_timings(self, wait_s: float) -> None:
        """Append one line to timings.jsonl: what clocks and a memory meter say since the last.

        `wait_s` is how long training has waited for batches since it began.
        """
        before, self.logged = self.logged, _Logged(self.step, time.perf_counter(), wait_s)
        if self.step == before.step:
            return
        seconds = max(self.logged.at - before.at, 1e-9)
        row = {
            "step": self.step,
            "rows_per_s": round((self.step - before.step) * self.options.batch_size / seconds, 1),
            "wait_fraction": round((wait_s - before.wait_s) / seconds, 4),
            "wall_s": round(seconds, 3),
            "peak_rss_mib": peak_rss_mib(),
        }
        self._append("timings.jsonl", row)

    def _append(self, name: str, row: dict[str, float]) -> None:
        with (self.run_dir / name).open("a") as file:
            file.write(json.dumps(row) + "\n")

    def save_is_due(self) -> bool:
        """Whether a kill would now cost more than `save_every` minutes."""
        minutes = self.options.save_every
        return minutes is not None and time.monotonic() - self.saved_at >= 60 * minutes

    def save(self) -> None:
        """Write a checkpoint, then remove those that neither `checkpoints` nor a resume needs.

        While training goes on the one before is kept too, should the newest turn out damaged.
        """
        for name in ("metrics.jsonl", "timings.jsonl"):  # On disk before the step they reach to.
            if (self.run_dir / name).is_file():
                files.flush(self.run_dir / name)
        last = self.step == self.options.n_steps
        state = {"step": self.step, "position": asdict(self.position)}
        tensors = {"dead.rows_since_fired": self.dead.rows_since_fired}
        for name, parameter in self.sae.named_parameters():
            for slot, value in self.optimizer.state[parameter].items():
                tensors[f"{name}/{slot}"] = value
        folder = self.run_dir / "checkpoints" / f"step_{self.step:08d}"
        keep_state = not last or self.options.keep_state
        save_checkpoint(
            folder,
            self.sae,
            {**self.facts, "step": self.step, "n_tokens": self.step * self.options.batch_size},
            state=state if keep_state else None,
            optimizer=tensors if keep_state else None,
        )
        kept = self.options.checkpoint_steps() | {self.step}
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
    )
