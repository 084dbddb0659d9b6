"""How weights may start: random directions, and a robust centre of the activations."""

import torch
from jaxtyping import Float
from torch import Tensor, nn


def random_directions(n: int, d: int, generator: torch.Generator) -> Float[Tensor, "n d"]:
    """Unit vectors, uniform on the sphere, on the generator's device."""
    drawn = torch.randn(n, d, generator=generator, device=generator.device)
    return nn.functional.normalize(drawn, dim=1)


@torch.no_grad()
def geometric_median(
    x: Float[Tensor, "n d"], *, iterations: int = 100, tolerance: float = 1e-6
) -> Float[Tensor, " d"]:
    """The point with the least summed distance to the rows, by Weiszfeld's iteration.

    Stops when it moves by less than `tolerance` times the mean distance.
    """
    centre = x.mean(0)
    for _ in range(iterations):
        distance = (x - centre).norm(dim=1)
        typical = distance.mean()
        # A row that the centre lies on would divide by zero and hold it there for ever.
        weights = 1 / distance.clamp_min(1e-6 * typical).clamp_min(torch.finfo(x.dtype).tiny)
        moved = (weights / weights.sum()) @ x
        step, centre = (moved - centre).norm(), moved
        if step <= tolerance * typical:
            break
    return centre
