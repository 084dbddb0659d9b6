"""The SAE's own loss: how well it reconstructs the site, and how sparsely."""

from torch import Tensor

from sae_runner.models.base import Inputs
from sae_runner.saes.base import SAE, Loss, TrainState
from sae_runner.training.objectives import OBJECTIVES
from sae_runner.training.objectives.base import WHOLE, Objective, Share


@OBJECTIVES.register("local")
class Local(Objective):
    """`SAE.loss` of stored rows; the model has no part in it."""

    def __init__(self, sae: SAE) -> None:
        super().__init__(sae)

    def loss(self, x: Tensor | Inputs, state: TrainState, share: Share = WHOLE) -> Loss:
        """See `Objective.loss`."""
        assert isinstance(x, Tensor)
        return self.sae.loss(x, state)
