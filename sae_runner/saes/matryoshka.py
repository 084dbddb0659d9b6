"""Matryoshka BatchTopK SAE (Bussmann, Nabeshima, Karvonen and Nanda 2025, arXiv 2503.17547)."""

import itertools
from typing import Literal, Unpack

import torch
from jaxtyping import Float
from torch import Tensor

from sae_runner.config import Fraction, PositiveFloat
from sae_runner.errors import ConfigError
from sae_runner.saes import SAES
from sae_runner.saes.base import Common, Latents, Loss, width
from sae_runner.saes.batch_topk import BatchTopK


@SAES.register("matryoshka")
class Matryoshka(BatchTopK):
    """BatchTopK whose first m_1 < m_2 < … < m_G = d_sae latents each reconstruct x by themselves.

    With f selected once, over all latents, and E the squared error, reduced,

        x_hat_g = f_{≤ m_g} W_dec_{≤ m_g} + b_dec,    L = Σ_g E(x, x_hat_g)

    so that early latents learn what is common and later ones add detail. `group_fractions` are the
    shares of d_sae that each group of latents adds to the ones before. `group_reduction: mean`
    divides the sum by G. Very small first groups make latents absorb what they cannot tell apart.

    Raises:
        ConfigError: the fractions do not sum to 1, or leave a group without a latent.
    """

    kind = "matryoshka"
    end_to_end_refused = "each prefix of its latents reconstructs the site itself; take batch_topk"

    def __init__(
        self,
        d_in: int,
        *,
        group_fractions: list[PositiveFloat],
        group_reduction: Literal["sum", "mean"],
        k: PositiveFloat,
        k_start: PositiveFloat | None,
        k_anneal: Fraction,
        **common: Unpack[Common],
    ) -> None:
        d_sae = width(d_in, common["d_sae"], common["expansion"])
        self.widths = nested_widths(group_fractions, d_sae)
        self.group_reduction = group_reduction
        super().__init__(d_in, k=k, k_start=k_start, k_anneal=k_anneal, **common)
        own = {"group_fractions": group_fractions, "group_reduction": group_reduction}
        self.options = {**self.options, **own}

    def loss_from(
        self,
        x: Float[Tensor, "n d_in"],
        scaled: Float[Tensor, "n d_in"],
        centred: Float[Tensor, "n d_in"],
        latents: Latents,
    ) -> Loss:
        """See `BatchTopK.loss_from`; the error of each prefix of m latents is logged as `first_m`.

        The residual, which AuxK predicts, is that of all latents.
        """
        rows, terms = latents.rows, {}
        base: Tensor = self.b_dec
        for start, stop in itertools.pairwise([0, *self.widths]):
            own = (latents.indices >= start) & (latents.indices < stop)
            added = Latents.from_entries(
                rows[own], latents.indices[own], latents.values[own], len(x), self.d_sae
            )
            found = self.reconstruct(added, scaled, base, centred)
            base = found.x_hat
            if stop < self.d_sae:
                terms[f"first_{stop}"] = (1.0, self.error(found.square, scaled)[1])
        fired = torch.bincount(latents.indices, minlength=self.d_sae)
        loss = self.loss_of(x, scaled, found, fired, **terms)
        share = 1 / len(self.widths) if self.group_reduction == "mean" else 1.0
        return loss._replace(total=share * loss.total)


def nested_widths(fractions: list[float], d_sae: int) -> list[int]:
    """m_1 < … < m_G = d_sae: the sums of the first fractions, in whole latents.

    Raises:
        ConfigError: the fractions do not sum to 1, or leave a group without a latent.
    """
    text = f"sae.group_fractions={[round(share, 6) for share in fractions]}"
    if abs(sum(fractions) - 1) > 1e-6:
        raise ConfigError(f"{text}: must sum to 1, not {sum(fractions):g}")
    widths = [round(share * d_sae) for share in itertools.accumulate(fractions)]
    for group, (start, stop) in enumerate(itertools.pairwise([0, *widths])):
        if start == stop:
            raise ConfigError(
                f"{text}: group {group + 1} has no latent of d_sae={d_sae}; merge it with its "
                "neighbour"
            )
    return widths
