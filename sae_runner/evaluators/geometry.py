"""How the directions of a dictionary lie to each other.

With d̂_j and ê_j the decoder and encoder rows of latent j at norm 1:

    max_cos_dec_j = max over k ≠ j of d̂_j · d̂_k          max_cos_enc_j likewise
    enc_dec_cos_j = ê_j · d̂_j

over the latents that fired at least once on the rows seen (`of: alive`), or over all of them. An
orthonormal dictionary has 0, a duplicated latent 1. `max_cos_dec_mean` and `max_cos_enc_mean` are
what SAEBench calls average_max_decoder_cosine_sim and average_max_encoder_cosine_sim.
"""

from collections.abc import Callable
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch
from jaxtyping import Float, Int64
from torch import Tensor

from sae_runner.evaluators import EVALUATORS
from sae_runner.evaluators._directions import ROWS_AT_ONCE, max_cosines, unit_rows
from sae_runner.evaluators._numbers import Scalars
from sae_runner.evaluators.base import EvalContext, Evaluator, Findings, Rows

STATISTICS: dict[str, Callable[[Any], Any]] = {
    "mean": np.mean,
    "median": np.median,
    "p95": lambda values: np.quantile(values, 0.95),
}


@EVALUATORS.register("geometry")
class Geometry(Evaluator):
    """Largest cosines between latents, and the cosine of each encoder with its decoder.

    Args:
        of: `alive`, the latents that fired on the rows seen, or `all`.
    """

    axis = "both"

    def __init__(self, *, of: Literal["alive", "all"]) -> None:
        self.of = of

    def start(self, context: EvalContext) -> None:
        """See `Evaluator.start`."""
        self.sae = context.sae
        self.fired = torch.zeros(context.sae.d_sae, dtype=torch.bool)

    def update(self, rows: Rows) -> None:
        """See which latents fire."""
        latents = rows.latents
        self.fired[latents.indices[latents.values != 0].cpu().long()] = True

    def finish(self) -> Findings:
        """Category `geometry`; columns of features.parquet are null where a latent is left out."""
        chosen = self.fired if self.of == "alive" else torch.ones_like(self.fired)
        which = chosen.nonzero().squeeze(1)
        scalars = Scalars("geometry")
        scalars.put("n_latents", len(which))
        sides = {"dec": self.sae.W_dec, "enc": self.sae.W_enc_rows}
        found, units = {}, {}
        for side, rows in sides.items():
            unit, kept = unit_rows(rows.detach()[which.to(rows.device)])
            units[side] = (unit, which[kept.cpu()])
            scalars.put(f"n_zero_{side}", len(which) - len(kept))
            if len(kept) > 1:
                found[f"max_cos_{side}"] = (units[side][1], max_cosines(unit).cpu())
        if self.sae.W_dec.shape[1] == self.sae.W_enc_rows.shape[1]:
            found["enc_dec_cos"] = own_cosines(*units["enc"], *units["dec"])
        columns: dict[str, npt.NDArray[Any]] = {}
        for name in ("max_cos_dec", "max_cos_enc", "enc_dec_cos"):
            latents, cosines = found.get(name, (which[:0], torch.zeros(0)))
            for statistic, of in STATISTICS.items():
                if len(cosines):
                    scalars.put(f"{name}_{statistic}", float(of(cosines.double().numpy())))
                else:
                    scalars.null(f"{name}_{statistic}", "not_applicable", self._why_not(name))
            column = np.ma.MaskedArray(np.zeros(len(chosen), np.float32), mask=True)
            column[latents.numpy()] = cosines.numpy()
            columns[name] = column
        return Findings({"geometry": scalars.values}, notes=scalars.notes, per_latent=columns)

    def _why_not(self, name: str) -> str:
        if name == "enc_dec_cos":
            if self.sae.W_dec.shape[1] != self.sae.W_enc_rows.shape[1]:
                return "encoder and decoder are of different spaces"
            return "no latent has both directions"
        return "fewer than two latents with a direction" + (
            " have fired" if self.of == "alive" else ""
        )


def own_cosines(
    enc: Float[Tensor, "n d"],
    enc_latents: Int64[Tensor, " n"],
    dec: Float[Tensor, "m d"],
    dec_latents: Int64[Tensor, " m"],
) -> tuple[Int64[Tensor, " k"], Float[Tensor, " k"]]:
    """ê_j · d̂_j of the latents that have both."""
    of_enc = torch.isin(enc_latents, dec_latents).nonzero().squeeze(1)
    of_dec = torch.searchsorted(dec_latents, enc_latents[of_enc])
    parts = (torch.split(at.to(enc.device), ROWS_AT_ONCE) for at in (of_enc, of_dec))
    cosines = [torch.linalg.vecdot(enc[i], dec[j]) for i, j in zip(*parts, strict=True)]
    return enc_latents[of_enc], torch.cat(cosines).cpu()
