"""Networks that `model.type=torch_module` can build, by name.

A constructor takes what the data decide (`channels`, `image_size`, `n_classes`; those it declares)
as positional parameters and its options by keyword, typed, without defaults.
"""

import inspect
from collections import OrderedDict
from collections.abc import Callable, Mapping
from importlib.metadata import entry_points
from itertools import pairwise
from typing import Annotated, Any

from jaxtyping import Float
from torch import Tensor, nn

from sae_runner.config import Range, checked_options
from sae_runner.errors import ConfigError, did_you_mean

Constructor = Callable[..., nn.Module]

CONSTRUCTORS: dict[str, Constructor] = {}
GROUP = "sae_runner.constructors"
"""Entry-point group through which other distributions add theirs."""


def constructor(name: str) -> Callable[[Constructor], Constructor]:
    """Decorator: make a function or class available as `model.constructor=name`."""

    def add(target: Constructor) -> Constructor:
        CONSTRUCTORS[name] = target
        return target

    return add


def construct_network(name: str, options: Mapping[str, Any], **from_data: int) -> nn.Module:
    """The untrained network that a constructor makes.

    Raises:
        ConfigError: there is no such constructor, or its options are wrong.
    """
    others = {entry.name: entry for entry in entry_points(group=GROUP)}
    if name not in CONSTRUCTORS and name not in others:
        near = did_you_mean(name, {*CONSTRUCTORS, *others})
        raise ConfigError(f"model.constructor={name}: no such constructor.{near}")
    if name not in CONSTRUCTORS:
        CONSTRUCTORS[name] = others[name].load()
    target = CONSTRUCTORS[name]
    checked = checked_options(target, options, where="model.options")
    known = inspect.signature(target).parameters
    return target(**checked, **{k: v for k, v in from_data.items() if k in known})


@constructor("mnist_mlp")
class MLP(nn.Module):
    """Pixels, hidden ReLU layers, class logits.

    Args:
        channels: of the image.
        image_size: side of the image in pixels.
        n_classes: how many logits.
        widths: neurons of each hidden layer.
    """

    def __init__(
        self,
        channels: int,
        image_size: int,
        n_classes: int,
        *,
        widths: Annotated[list[int], Range(gt=0)],
    ) -> None:
        super().__init__()
        if not widths:
            raise ConfigError("model.options.widths=[]: at least one hidden layer is needed")
        sizes = [channels * image_size**2, *widths]
        self.hidden = nn.Sequential(
            *(
                nn.Sequential(OrderedDict(linear=nn.Linear(n, m), act=nn.ReLU()))
                for n, m in pairwise(sizes)
            )
        )
        self.head = nn.Linear(sizes[-1], n_classes)

    def forward(self, pixels: Float[Tensor, "n c h w"]) -> Float[Tensor, "n n_classes"]:
        """Class logits."""
        logits: Tensor = self.head(self.hidden(pixels.flatten(1)))
        return logits
