"""The loss of a batch that is taken in parts, each with a backward pass of its own."""

from typing import Any

import torch
from torch import Tensor

from sae_runner.saes.base import Loss


def detached(loss: Loss) -> Loss:
    """The same numbers, without what a backward pass needs."""
    return Loss(*(_without_graph(field) for field in loss))


def _without_graph(field: Any) -> Any:
    if isinstance(field, dict):
        return {k: v.detach() for k, v in field.items()}
    return field.detach()


def merged(losses: list[Loss]) -> Loss:
    """The loss of a whole batch from those of its equal parts."""
    if len(losses) == 1:
        return losses[0]
    n = len(losses)

    def mean(name: str) -> Tensor:
        values = [getattr(loss, name) for loss in losses]
        return sum(values, torch.zeros_like(values[0])) / n

    return Loss(
        total=mean("total"),
        parts={k: torch.stack([loss.parts[k] for loss in losses]).mean() for k in losses[0].parts},
        x_hat=torch.cat([loss.x_hat for loss in losses]),
        fired=torch.stack([loss.fired for loss in losses]).sum(0),
        l0=torch.stack([loss.l0 for loss in losses]).mean(),
        residual=torch.cat([loss.residual for loss in losses]),
        x=torch.cat([loss.x for loss in losses]),
        error=mean("error"),
        rest=mean("rest"),
    )
