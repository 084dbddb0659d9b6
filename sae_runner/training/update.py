"""The update of the weights: Adam, on dense gradients or latent by latent.

Where a kind's gradients are sparse products (`kernels.autograd`), no gradient matrix is made: its
row of each latent is summed, clipped and used by Adam at once. The numbers are those of
`torch.optim.Adam` but for the order of sums; so is the state that a resume needs.
"""

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from sae_runner.kernels.autograd import Tape, taped
from sae_runner.kernels.base import Factor
from sae_runner.kernels.choice import fused, ops_for
from sae_runner.saes.base import SAE
from sae_runner.training.options import TrainOptions


class Update:
    """Adam for all weights of one SAE.

    Args:
        sae: what is trained; its weights are where they stay.
        options: of Adam and of clipping; gradients of parts of a batch are accumulated densely.
        lr: the peak learning rate.
    """

    def __init__(self, sae: SAE, options: TrainOptions, lr: float) -> None:
        self.sae, self.options = sae, options
        device = sae.b_dec.device.type
        self.optimizer = torch.optim.Adam(
            sae.parameters(), lr=lr, betas=(options.beta1, options.beta2), eps=options.eps,
            fused=device in ("cpu", "cuda"),
        )  # fmt: skip
        self.ops = ops_for(sae.b_dec)
        self.by_rows = options.n_parts == 1 and fused(self.ops, sae.b_dec.device)
        self.tape: Tape | None = None
        # Of weights whose last step was by rows, its number: a device is not asked at every step.
        self._steps = dict[Tensor, Any]()

    @contextlib.contextmanager
    def gradients(self) -> Iterator[None]:
        """Losses of a step are computed, and gone back through, within it."""
        self.optimizer.zero_grad(set_to_none=True)
        with taped() if self.by_rows else contextlib.nullcontext() as self.tape:
            yield

    @torch.no_grad()
    def step(self, lr: float | Tensor, *, measured: bool) -> Tensor | None:
        """Take the gradients that were found; their norm before clipping, if `measured` or clipped.

        Clipping is that of `torch.nn.utils.clip_grad_norm_`. With `lr` in float32 on a device, the
        number of the step is read there too, so that the same work serves other steps.
        """
        for group in self.optimizer.param_groups:
            group["lr"] = lr
            group["capturable"] = isinstance(lr, Tensor) and _is_recording(lr.device)
        factors = self._factors()
        self.sae.before_step()
        bound = self.options.clip_grad_norm
        clip: float | Tensor = 1.0
        norm = self._norm(factors) if measured or bound is not None else None
        if bound is not None and norm is not None:
            clip = (bound / (norm + 1e-6)).clamp_max(1.0)
            for parameter in self.sae.parameters():
                if parameter.grad is not None:
                    parameter.grad.mul_(clip)
        self.sae.selector.forget_shadow()  # PyTorch's fused Adam counts no version.
        self.optimizer.step()
        self._steps = {W: self._step_rows(W, parts, lr, clip) for W, parts in factors.items()}
        self.sae.after_step(normalised=any(self._is_unit(W) for W in factors))
        return norm

    def _factors(self) -> dict[Tensor, list[Factor]]:
        """What is kept on the tape, less what has a dense gradient besides."""
        found = {} if self.tape is None else dict(self.tape.factors)
        for W in [W for W in found if W.grad is not None]:
            for factor in found.pop(W):
                W.grad += self.ops.weight_gradient(factor, len(W))  # type: ignore[operator]
        self.tape = None
        return found

    def _is_unit(self, W: Tensor) -> bool:
        return self.sae.decoder_norm == "unit" and W is self.sae.W_dec

    def _norm(self, factors: dict[Tensor, list[Factor]]) -> Tensor:
        squares = [
            p.grad.double().square().sum() if p.numel() < 2**16 else p.grad.norm().double().square()
            for p in self.sae.parameters()
            if p.grad is not None
        ]
        for W, parts in factors.items():
            squares.append(self.ops.gradient_norm2(parts, W if self._is_unit(W) else None))
        return torch.stack(squares).sum().sqrt().float()

    def _step_rows(
        self, W: Tensor, parts: list[Factor], lr: float | Tensor, clip: float | Tensor
    ) -> int | Tensor:
        """Adam's step by rows, and which one it was of W."""
        state = self.optimizer.state[W]
        if not state:
            on_cpu = W.device.type == "cpu"
            state["step"] = torch.zeros((), device="cpu" if on_cpu else W.device)
            state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(W), torch.zeros_like(W)
        state["step"] += 1
        step: int | Tensor = state["step"]
        if not isinstance(lr, Tensor):
            step = 1 + self._steps[W] if W in self._steps else int(step)
        selector, shadow = self.sae.selector, None
        if W is self.sae.W_enc_rows and selector.precision != "fp32":
            shadow = selector.shadow_of(W)
        self.ops.adam_(
            W, state["exp_avg"], state["exp_avg_sq"], parts, lr=lr, beta1=self.options.beta1,
            beta2=self.options.beta2, eps=self.options.eps, step=step, scale=clip,
            unit=self._is_unit(W), shadow=shadow,
        )  # fmt: skip
        if shadow is not None:
            selector.shadow_written(W)
        return step


def _is_recording(device: torch.device) -> bool:
    """Whether a device's work is recorded just now, and not done."""
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()
