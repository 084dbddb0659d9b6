"""The `trainer` group: typed, in range, and what follows from it alone."""

from dataclasses import dataclass
from typing import Literal

from sae_runner.config import Fraction, NonNegative, NonNegativeFloat, Positive, PositiveFloat
from sae_runner.errors import ConfigError


@dataclass(frozen=True)
class TrainOptions:
    """The `trainer` group; see configs/trainer for what each means."""

    n_tokens: int
    batch_size: int
    micro_batch_size: int | None
    lr: float | Literal["auto"]
    beta1: float
    beta2: float
    eps: float
    lr_warmup: float
    lr_decay: float
    penalty_warmup: float
    clip_grad_norm: float | None
    precision: Literal["fp32", "bf16"]
    dead_window: int
    n_calibration: int
    log_every: int
    save_every: float | None
    checkpoints: int
    keep_state: bool

    @classmethod
    def from_config(
        cls,
        *,
        n_tokens: Positive,
        batch_size: Positive,
        micro_batch_size: Positive | None,
        lr: PositiveFloat | Literal["auto"],
        beta1: Fraction,
        beta2: Fraction,
        eps: NonNegativeFloat,
        lr_warmup: Fraction,
        lr_decay: Fraction,
        penalty_warmup: Fraction,
        clip_grad_norm: PositiveFloat | None,
        precision: Literal["fp32", "bf16"],
        dead_window: Positive,
        n_calibration: Positive,
        log_every: Positive,
        save_every: NonNegativeFloat | None,
        checkpoints: NonNegative,
        keep_state: bool,
    ) -> "TrainOptions":
        """Typed and in range; refuses what makes no step at all."""
        if batch_size > n_tokens:
            raise ConfigError(
                f"trainer.batch_size={batch_size}: more than trainer.n_tokens={n_tokens}"
            )
        if micro_batch_size is not None and batch_size % micro_batch_size:
            raise ConfigError(
                f"trainer.micro_batch_size={micro_batch_size}: must divide "
                f"trainer.batch_size={batch_size}"
            )
        values = dict(locals())
        values.pop("cls")
        return cls(**values)

    @property
    def n_steps(self) -> int:
        """Whole batches in the budget of rows."""
        return self.n_tokens // self.batch_size

    def checkpoint_steps(self) -> set[int]:
        """Steps after which a checkpoint is kept: evenly spread; the last one comes always."""
        n = self.checkpoints
        return {round(self.n_steps * (i + 1) / (n + 1)) for i in range(n)} - {0}
