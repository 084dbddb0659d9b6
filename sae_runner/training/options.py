"""The `trainer` group: typed, in range, and what follows from it alone."""

from dataclasses import dataclass
from typing import Literal

import torch

from sae_runner.config import (
    Fraction,
    Memory,
    NonNegative,
    NonNegativeFloat,
    Positive,
    PositiveFloat,
    ProperFraction,
)
from sae_runner.errors import ConfigError
from sae_runner.kernels.selection import Precision, multiplies_bf16


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
    lr_decay_shape: Literal["linear", "cosine"]
    penalty_warmup: float
    clip_grad_norm: float | None
    precision: Literal["auto", "fp32", "screened", "bf16"]
    cuda_graph: bool
    dead_window: int
    n_calibration: int
    log_every: int
    save_every: float | None
    checkpoints: int | list[int]
    checkpoint_spacing: Literal["even", "exponential"]
    checkpoint_interventions: bool
    keep_state: bool
    ema: float | None

    @classmethod
    def from_config(
        cls,
        *,
        n_tokens: Positive,
        batch_size: Positive,
        micro_batch_size: Positive | None,
        lr: PositiveFloat | Literal["auto"],
        beta1: Memory,
        beta2: Memory,
        eps: PositiveFloat,
        lr_warmup: Fraction,
        lr_decay: Fraction,
        lr_decay_shape: Literal["linear", "cosine"],
        penalty_warmup: Fraction,
        clip_grad_norm: PositiveFloat | None,
        precision: Literal["auto", "fp32", "screened", "bf16"],
        cuda_graph: bool,
        dead_window: Positive,
        n_calibration: Positive,
        log_every: Positive,
        save_every: NonNegativeFloat | None,
        checkpoints: NonNegative | list[Positive],
        checkpoint_spacing: Literal["even", "exponential"],
        checkpoint_interventions: bool,
        keep_state: bool,
        ema: ProperFraction | None,
    ) -> "TrainOptions":
        """Typed and in range; refuses what makes no step at all."""
        values = {key: value for key, value in locals().items() if key != "cls"}
        if batch_size > n_tokens:
            raise ConfigError(
                f"trainer.batch_size={batch_size}: more than trainer.n_tokens={n_tokens}"
            )
        if micro_batch_size is not None and batch_size % micro_batch_size:
            raise ConfigError(
                f"trainer.micro_batch_size={micro_batch_size}: must divide "
                f"trainer.batch_size={batch_size}"
            )
        if lr_warmup + lr_decay > 1:
            raise ConfigError(
                f"trainer.lr_decay={lr_decay:g}: with trainer.lr_warmup={lr_warmup:g} more than "
                "all steps"
            )
        n_steps = n_tokens // batch_size
        for step in checkpoints if isinstance(checkpoints, list) else ():
            if step > n_steps:
                raise ConfigError(f"trainer.checkpoints={step}: there are only {n_steps} steps")
        return cls(**values)

    @property
    def n_steps(self) -> int:
        """Whole batches in the budget of rows."""
        return self.n_tokens // self.batch_size

    @property
    def half(self) -> bool:
        """Whether the loss is computed in half precision, where that is safe."""
        return self.precision == "bf16"

    def precision_on(self, device: torch.device) -> Precision:
        """How encoders choose latents; `auto` screens where bfloat16 products are fast."""
        if self.precision != "auto":
            return self.precision
        return "screened" if multiplies_bf16(device) else "fp32"

    @property
    def n_parts(self) -> int:
        """In how many parts a batch is taken."""
        return -(-self.batch_size // (self.micro_batch_size or self.batch_size))

    def checkpoint_steps(self) -> set[int]:
        """Steps after which a checkpoint is kept; the last one comes always.

        So many of them, evenly spread or in equal ratios (dense early), or those that are listed.
        """
        if isinstance(self.checkpoints, list):
            return set(self.checkpoints)
        n, n_steps = self.checkpoints, self.n_steps
        shares = [(i + 1) / (n + 1) for i in range(n)]
        if self.checkpoint_spacing == "exponential":
            return {round(n_steps**share) for share in shares} - {0, n_steps}
        return {round(n_steps * share) for share in shares} - {0}
