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


@torch.no_grad()
def k_means(
    x: Float[Tensor, "n d"], n_centres: int, generator: torch.Generator, *, iterations: int = 20
) -> Float[Tensor, "m d"]:
    """Centres of the rows by Lloyd's iteration, from as many rows drawn at random.

    A centre that no row is nearest to stays where it is.
    """
    drawn = torch.randperm(len(x), generator=generator, device=generator.device)[:n_centres]
    centres = x[drawn.to(x.device)]
    for _ in range(iterations):
        nearest = torch.cat([torch.cdist(part, centres).argmin(1) for part in torch.split(x, 4096)])
        sums = torch.zeros_like(centres).index_add_(0, nearest, x)
        counts = torch.bincount(nearest, minlength=n_centres).unsqueeze(1)
        moved = torch.where(counts > 0, sums / counts.clamp_min(1), centres)
        if torch.equal(moved, centres):
            break
        centres = moved
    return centres
