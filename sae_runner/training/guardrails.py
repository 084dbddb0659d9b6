"""What tells a user early that a training goes astray: an end in one line, or one warning."""

import logging
import math

import torch
from torch import Tensor

from sae_runner.errors import ConfigError
from sae_runner.saes.base import SAE
from sae_runner.training.options import TrainOptions
from sae_runner.training.parts import Taken

log = logging.getLogger("sae_runner")
DIVERGED = 1e4
"""Squared error over squared norm of x: a reconstruction a hundred times too long is none. Wide
SAEs whose encoder is the decoder's copy begin at about (d_sae / 2 d_in)²."""
EXPLODED = 100.0
"""A loss so many times the least so far is worth a word."""
APART = 0.2
"""Relative difference of the L0 of training and of inference that is worth a word."""
MISSED = 0.1
"""Relative distance from an asked-for L0 that is worth a word, in the last batch."""
EARLY = 0.1
"""Share of training in which a threshold should have moved, wherever it went on from."""


class Guardrails:
    """Looks at what is logged and saved; each warning is given once."""

    def __init__(self, sae: SAE, options: TrainOptions, lr: float, revives: bool) -> None:
        self.sae, self.options, self.lr, self.revives = sae, options, lr, revives
        self.least = math.inf
        self.said = set[str]()
        self.first_thresholds: Tensor | None = None
        self.first_step = 0

    def warn(self, what: str, message: str) -> None:
        """Say something of a kind the first time."""
        if what not in self.said:
            self.said.add(what)
            log.warning(message)

    def check_sound(self, step: int, taken: Taken, grad_norm: Tensor | None) -> None:
        """Refuse to log or save a step of a training that went astray.

        Raises:
            ConfigError: the loss or its gradient is not finite, or the reconstruction is absurd.
        """
        fit = taken.fit
        found = {
            "loss": float(taken.total),
            "grad_norm": 0.0 if grad_norm is None else float(grad_norm),
            "squared error / squared norm": float(fit.error / fit.square.clamp_min(1e-12)),
        }
        limit = max(DIVERGED, (self.sae.d_sae / self.sae.d_in) ** 2)
        self._refuse(step, found, {"squared error / squared norm": limit})
        self.check_weights(step)

    def check_weights(self, step: int) -> None:
        """Refuse weights that are not finite.

        Raises:
            ConfigError: one is not.
        """
        weights = self.sae.named_parameters()
        self._refuse(step, {name: float(p.detach().sum()) for name, p in weights}, {})

    def _refuse(self, step: int, found: dict[str, float], limits: dict[str, float]) -> None:
        for name, value in found.items():
            if not abs(value) < limits.get(name, math.inf):
                raise ConfigError(
                    f"training diverged at step {step}: {name} is {value:.3g}; lower "
                    f"trainer.lr ({self.lr:.2g}) or trainer.clip_grad_norm "
                    f"({self.options.clip_grad_norm}); the last checkpoint stays"
                )

    def look(self, step: int, total: float, dead: Tensor) -> None:
        """Warn of what is odd in a step that is logged, by its loss and which latents are dead.

        Raises:
            ConfigError: every latent is dead, and nothing would revive one.
        """
        if total > EXPLODED * self.least > 0:
            self.warn(
                "loss",
                f"step {step}: the loss is {total:.3g}, {total / self.least:.0f} times its least; "
                f"lower trainer.lr ({self.lr:.2g}) or lengthen trainer.lr_warmup",
            )
        self.least = min(self.least, total)
        if bool(dead.all()):
            message = (
                f"step {step}: all {self.sae.d_sae} latents are dead; lower the penalty "
                "(sae.target_l0 finds it) or trainer.lr"
            )
            if not self.revives:
                raise ConfigError(f"{message}, or take sae/dead_latents=resample")
            self.warn("dead", message)
        self._look_at_thresholds(step)

    def _look_at_thresholds(self, step: int) -> None:
        latents = torch.arange(self.sae.d_sae, device=self.sae.b_dec.device)
        thresholds = self.sae.thresholds(latents)
        if not thresholds.requires_grad:
            return
        now = thresholds.detach().cpu()
        if self.first_thresholds is None:
            self.first_thresholds, self.first_step = now.clone(), step
        elif step - self.first_step > EARLY * self.options.n_steps:
            moved = (now - self.first_thresholds).abs() > 1e-3 * self.first_thresholds.abs()
            if not bool(moved.any()):
                self.warn(
                    "threshold",
                    f"step {step}: no threshold has moved by a thousandth: no pre-activation comes "
                    "within sae.bandwidth of it; check sae.input_scaling and sae.bandwidth",
                )

    @torch.no_grad()
    def look_at_end(self, step: int, l0: float, used: SAE, x: Tensor) -> None:
        """Warn when an asked-for L0 was missed, or what is saved fires unlike what was trained.

        Args:
            step: the last.
            l0: of its batch, in training.
            used: what is saved for use.
            x: that batch, or its last part.
        """
        target = used.target_l0
        if target is not None and abs(l0 - target) > MISSED * target:
            self.warn(
                "target",
                f"step {step}: L0 is {l0:.3g}, and {target:g} was asked for; train for longer, or "
                "start from another coefficient",
            )
        if used.calibrates:
            self.compare_l0(step, l0, float(used.encode_sparse(x).counts.float().mean()))

    def compare_l0(self, step: int, training: float, inference: float) -> None:
        """Warn when what is saved fires unlike what is trained."""
        if abs(inference - training) > APART * max(training, 1e-9):
            self.warn(
                "l0",
                f"step {step}: L0 is {training:.3g} in training and {inference:.3g} at inference; "
                "raise trainer.n_calibration, or train for longer",
            )
