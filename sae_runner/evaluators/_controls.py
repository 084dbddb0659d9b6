"""What latents are rated beside: neurons, random directions, latents of an untrained SAE.

Each is a direction with an activation for every row, and so gets examples as a latent does:

- neuron j: max(x_j, 0), a coordinate of the site; with `centre` max(x_j − m_j, 0), m the mean of
  the rows: what lies above it, of a coordinate that is far from 0 on every row;
- random direction r: max(x · r, 0), r uniform on the sphere;
- untrained: latents of the same SAE as it was before its first step (drawn anew).
"""

from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from jaxtyping import Float
from torch import Tensor

from sae_runner.evaluators._activating import uniform
from sae_runner.evaluators._codes import Codes
from sae_runner.evaluators._collecting import CodesCollector
from sae_runner.evaluators.base import EvalContext, Rows
from sae_runner.saes import SAES
from sae_runner.saes.base import SAE, Latents
from sae_runner.statistics import ActivationStats

KEEP_BYTES = 2**29
"""Memory for the controls' activations; of more rows, examples are kept by their hash."""
N_SAMPLE_EXAMPLES = 256
N_QUARTILES = 4
_NEURONS, _DIRECTIONS, _UNTRAINED = (0x68756D + i for i in range(3))  # "hum"
Numbers = npt.NDArray[np.int64]


class Control(NamedTuple):
    """One direction beside the latents."""

    source: str
    """`neuron`, `direction` or `untrained`."""
    id: int
    """Number of the coordinate, the direction or the latent."""
    direction: Float[Tensor, " d"]
    """What an activation of 1 adds to the site."""


class Controls:
    """Directions that are followed through a pass as latents are."""

    def __init__(
        self,
        context: EvalContext,
        *,
        n_neurons: int,
        n_directions: int = 0,
        n_untrained: int = 0,
        centre: bool = False,
    ) -> None:
        self.seed = context.seed
        self.collector = CodesCollector(KEEP_BYTES, context.seed)
        d = context.sae.d_out
        self.neurons = torch.from_numpy(
            np.sort(np.random.default_rng([self.seed, _NEURONS]).permutation(d)[:n_neurons])
        )
        centres = mean_of(context) if centre else torch.zeros(d)
        self.centre = centres[self.neurons]
        drawn = np.random.default_rng([self.seed, _DIRECTIONS]).standard_normal((n_directions, d))
        self.directions = torch.nn.functional.normalize(torch.from_numpy(drawn), dim=1).float()
        self.untrained, self.chosen = self._untrained(context, n_untrained)
        axes = torch.eye(d)[self.neurons]
        self.all = [
            *(Control("neuron", j, v) for j, v in zip(self.neurons.tolist(), axes, strict=True)),
            *(Control("direction", i, v) for i, v in enumerate(self.directions)),
        ]
        if self.untrained is not None:
            rows = self.untrained.W_dec.detach().cpu()
            self.all += [Control("untrained", j, rows[j]) for j in self.chosen.tolist()]

    def _untrained(self, context: EvalContext, n: int) -> tuple[SAE | None, Tensor]:
        """The SAE before training, and n of the latents that fire on training rows."""
        none = torch.zeros(0, dtype=torch.int64)
        if not n or context.rows is None:
            return None, none
        sample = list(context.rows("train", N_SAMPLE_EXAMPLES))
        read = torch.cat([rows.source for rows in sample]).cpu()
        x = None if sample[0].read is None else torch.cat([rows.x for rows in sample]).cpu()
        sae = untrained_like(context.sae, read, self.seed, target=x)
        fired = sae(read).latents.fired.cpu().numpy()
        return sae.to(context.sae.b_dec.device), torch.from_numpy(
            by_frequency(np.flatnonzero(fired), fired, n, self.seed)
        )

    def update(self, rows: Rows) -> None:
        """Keep the controls' activations on a batch of rows."""
        latents = self.latents(rows.x, rows.source)
        self.collector.add(rows._replace(latents=latents))

    def latents(self, x: Float[Tensor, "n d"], source: Float[Tensor, "n d_read"]) -> Latents:
        """The controls' activations on rows of the site, and on what the SAE reads."""
        x, neurons = x.float(), self.neurons.to(x.device)
        parts = [
            (x[:, neurons] - self.centre.to(x)).relu(), (x @ self.directions.to(x).T).relu()
        ]  # fmt: skip
        if self.untrained is not None:
            found = self.untrained(source.float()).latents
            parts.append(columns(found, self.chosen.to(x.device)))
        return Latents.from_entries(*entries_of(torch.cat(parts, 1)))

    def finish(self) -> tuple[list[Control], Codes]:
        """The controls, and their activations: column i of the codes is that of control i."""
        return self.all, self.collector.finish()


def mean_of(context: EvalContext) -> Float[Tensor, " d"]:
    """The mean of the site's rows: where the store does not know it, of some that train."""
    d = context.sae.d_out
    if context.mean is not None and len(context.mean) == d:
        return context.mean.float().cpu()
    if context.rows is None:
        return torch.zeros(d)
    parts = [rows.x.double().cpu() for rows in context.rows("train", N_SAMPLE_EXAMPLES)]
    return torch.cat(parts).mean(0).float()


def entries_of(acts: Float[Tensor, "n m"]) -> tuple[Any, ...]:
    """Rows, columns and values of what is not 0, and the shape; few columns, so made from dense."""
    rows, indices = acts.nonzero(as_tuple=True)
    return rows, indices, acts[rows, indices], *acts.shape


def columns(latents: Latents, chosen: Tensor) -> Float[Tensor, "n m"]:
    """Some latents of sparse ones, dense."""
    place = torch.full((latents.d_sae,), -1, device=chosen.device)
    place[chosen] = torch.arange(len(chosen), device=chosen.device)
    at = place[latents.indices.long()]
    found = latents.values.new_zeros(len(latents), len(chosen))
    found[latents.rows[at >= 0], at[at >= 0]] = latents.values[at >= 0]
    return found.float()


def untrained_like(
    sae: SAE,
    x: Float[Tensor, "n d_in"],
    seed: int,
    *,
    target: Float[Tensor, "n d_out"] | None = None,
) -> SAE:
    """An SAE of the same options, initialised on rows `x` as training would, and never trained.

    A transcoder's weights depend on the rows of its `target` too.
    """
    fresh: SAE = SAES.build(sae.config(), d_in=sae.d_in, d_out=sae.d_out)
    norms = x.norm(dim=1)
    stored = x if target is None else torch.cat([x, target], 1)
    square = float(norms.square().mean())
    stats = ActivationStats(stored.mean(0), float(norms.mean()), square, stored)
    fresh.initialise(stats, torch.Generator().manual_seed(seed + _UNTRAINED))
    fresh.settle(1.0)
    if fresh.calibrates:
        fresh.calibrate(_once(x), len(x))
    return fresh.eval().requires_grad_(False)


def _once(x: Tensor) -> Iterator[Tensor]:
    yield x


def by_frequency(among: Numbers, frequency: npt.NDArray[Any], n: int, seed: int) -> Numbers:
    """Up to n of some latents, as many from each quartile of their (log) frequency; ascending."""
    ordered = among[np.argsort(frequency[among], kind="stable")]
    quotas = np.diff(np.linspace(0, n, N_QUARTILES + 1).round().astype(int))
    drawn = []
    for part, quota in zip(np.array_split(ordered, N_QUARTILES), quotas, strict=True):
        drawn.append(part[np.argsort(uniform(0, part, seed, _UNTRAINED), kind="stable")[:quota]])
    return np.sort(np.concatenate(drawn))
