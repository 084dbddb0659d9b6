"""An average of the weights over the steps, which is what is saved for use."""

import copy

import torch
from jaxtyping import Bool
from torch import Tensor

from sae_runner.saes.base import SAE


class AveragedWeights:
    """Exponential moving average with the bias of its start corrected.

    a_t = a_{t−1} + (1 − β) / (1 − β^t) · (w_t − a_{t−1}), so a_1 = w_1 and the start has no weight
    of its own (Gao et al. 2024 use β = 0.999).
    """

    def __init__(self, sae: SAE, decay: float) -> None:
        self.decay, self.n = decay, 0
        self.weights = {name: p.detach().clone() for name, p in sae.named_parameters()}

    @torch.no_grad()
    def update(self, sae: SAE) -> None:
        """Take in the weights after a step."""
        self.n += 1
        share = (1 - self.decay) / (1 - self.decay**self.n)
        for name, parameter in sae.named_parameters():
            self.weights[name].lerp_(parameter, share)

    @torch.no_grad()
    def begin_again(self, sae: SAE, latents: Bool[Tensor, " d_sae"]) -> None:
        """Forget what these latents were before they were pointed elsewhere."""
        for name in sae.rows_by_latent():
            self.weights[name][latents] = sae.get_parameter(name)[latents]

    @torch.no_grad()
    def applied(self, sae: SAE) -> SAE:
        """A copy of `sae` with the averaged weights, its constraints restored."""
        averaged = copy.deepcopy(sae)
        for name, parameter in averaged.named_parameters():
            parameter.copy_(self.weights[name])
        averaged.after_step()
        return averaged

    def tensors(self) -> dict[str, Tensor]:
        """What a checkpoint keeps."""
        kept = {f"ema.{name}": tensor for name, tensor in self.weights.items()}
        return {**kept, "ema.n": torch.tensor(self.n)}

    def restore(self, tensors: dict[str, Tensor]) -> None:
        """Take from `tensors` what `tensors()` gave."""
        self.n = int(tensors.pop("ema.n"))
        for name, weight in self.weights.items():
            weight.copy_(tensors.pop(f"ema.{name}"))
