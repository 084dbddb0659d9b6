"""Recovery of a known dictionary: directions by cosine, activity by F1.

Mean max cosine similarity (Sharkey et al. 2022), both ways, between the true unit directions and
the decoder rows of latents that fired at least once on the rows seen.
"""

from typing import Any, ClassVar, Protocol, runtime_checkable

import numpy as np
import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor

from sae_runner.data.base import Ids
from sae_runner.errors import ConfigError
from sae_runner.evaluators import EVALUATORS
from sae_runner.evaluators.base import (
    Axis,
    EvalContext,
    Evaluator,
    Findings,
    Note,
    Rows,
    Setting,
)
from sae_runner.saes.base import Latents

RECOVERED = 0.9  # Cosine above which a true feature counts as found.


@runtime_checkable
class KnownDictionary(Protocol):
    """What a dataset offers when it knows what an SAE should find."""

    dictionary: Float[Tensor, "n_features d"]
    """Unit rows."""

    def codes(self, ids: Ids) -> Float[Tensor, "n n_features"]:
        """True non-negative codes of examples."""
        ...


@EVALUATORS.register("recovery")
class Recovery(Evaluator):
    """The SAE's dictionary and firing against the true ones.

    Args:
        hungarian: also match one latent to each true feature, at the greatest total cosine.
    """

    axis: ClassVar[Axis] = "both"

    def __init__(self, *, hungarian: bool) -> None:
        self.hungarian = hungarian
        self.seed = 0
        self.dataset: KnownDictionary
        self.cosines: Float[Tensor, "n_features d_sae"]
        self.both: Int64[Tensor, " n_features_times_d_sae"]
        """Rows in which a true feature and a latent were active together, flat."""
        self.n_active: Int64[Tensor, " n_features"]
        self.n_fired: Int64[Tensor, " d_sae"]

    def check(self, setting: Setting) -> None:
        """See `Evaluator.check`: the true dictionary must be known."""
        dataset = setting.dataset
        if not isinstance(dataset, KnownDictionary):
            raise ConfigError(
                f"not applicable: dataset {dataset.name!r} has no true dictionary; "
                "use dataset=toy or leave the evaluator out"
            )

    def start(self, context: EvalContext) -> None:
        """See `Evaluator.start`.

        Raises:
            ConfigError: the dataset knows no true dictionary, or one of another width.
        """
        dataset = context.dataset() if context.dataset else None
        if not isinstance(dataset, KnownDictionary):
            raise ConfigError("evaluators.recovery: not applicable: no true dictionary")
        n_features, d = dataset.dictionary.shape
        if d != context.sae.d_in:
            raise ConfigError(
                f"evaluators.recovery: not applicable: the true dictionary has {d} dimensions, the "
                f"SAE reads {context.sae.d_in}; record the dataset's own rows (model=toy)"
            )
        self.dataset, self.seed = dataset, context.seed
        decoder = context.sae.W_dec.detach().float().cpu()
        self.cosines = unit(dataset.dictionary.float()) @ unit(decoder).T
        self.both = torch.zeros(n_features * len(decoder), dtype=torch.int64)
        self.n_active = torch.zeros(n_features, dtype=torch.int64)
        self.n_fired = torch.zeros(len(decoder), dtype=torch.int64)

    def update(self, rows: Rows) -> None:
        """See `Evaluator.update`."""
        codes = self.dataset.codes(rows.example_id.cpu().numpy())
        row, feature = codes.nonzero(as_tuple=True)
        self.n_active += torch.bincount(feature, minlength=len(self.n_active))
        fired = rows.latents.indices.cpu().long()
        self.n_fired += torch.bincount(fired, minlength=len(self.n_fired))
        count_pairs(self.both, row, feature, rows.latents)

    def finish(self) -> Findings:
        """See `Evaluator.finish`."""
        n_features = len(self.n_active)
        alive = self.n_fired > 0
        seen = self.n_active > 0
        findings = Findings(
            {
                "recovery": {
                    "n_true_features": n_features,
                    "n_true_features_seen": int(seen.sum()),
                    "n_alive_latents": int(alive.sum()),
                }
            }
        )
        self._directions(findings, alive)
        self._firing(findings, alive, seen)
        return findings

    def _directions(self, findings: Findings, alive: Bool[Tensor, " d_sae"]) -> None:
        names = ["mmcs_true_to_sae", "mmcs_sae_to_true", "mmcs_true_to_sae_random",
                 "fraction_recovered"]  # fmt: skip
        metrics = findings.metrics["recovery"]
        if self.hungarian:
            names.append("hungarian_cosine")
        if not alive.any():
            metrics |= dict.fromkeys(names)
            findings.notes += [
                Note("zero_denominator", f"recovery.{name}", "no latent fired") for name in names
            ]
            return
        cosines = self.cosines[:, alive]
        best = cosines.max(1).values
        metrics["mmcs_true_to_sae"] = float(best.double().mean())
        metrics["mmcs_sae_to_true"] = float(cosines.max(0).values.double().mean())
        metrics["mmcs_true_to_sae_random"] = self._chance(int(alive.sum()))
        metrics["fraction_recovered"] = float((best > RECOVERED).double().mean())
        if self.hungarian:
            metrics["hungarian_cosine"] = matched_cosine(cosines)
        findings.series["recovery_cosine"] = best.tolist()
        nearest = self.cosines.max(0)
        findings.per_latent["recovery_feature"] = nearest.indices.numpy().astype(np.int32)
        findings.per_latent["recovery_cosine"] = nearest.values.numpy()

    def _chance(self, n: int) -> float:
        """What n random directions would score: the value to beat."""
        generator = torch.Generator().manual_seed(self.seed)
        dictionary = self.dataset.dictionary.float()
        drawn = unit(torch.randn(n, dictionary.shape[1], generator=generator))
        return float((unit(dictionary) @ drawn.T).max(1).values.double().mean())

    def _firing(
        self,
        findings: Findings,
        alive: Bool[Tensor, " d_sae"],
        seen: Bool[Tensor, " n_features"],
    ) -> None:
        """F1, precision and recall of each seen feature's nearest alive latent, averaged."""
        names = ("f1_firing", "precision_firing", "recall_firing")
        metrics = findings.metrics["recovery"]
        if not (alive.any() and seen.any()):
            reason = "no true feature was active" if alive.any() else "no latent fired"
            metrics |= dict.fromkeys(names)
            findings.notes += [
                Note("zero_denominator", f"recovery.{name}", reason) for name in names
            ]
            return
        both = self.both.view(self.cosines.shape)
        latent = self.cosines.masked_fill(~alive, -2.0).argmax(1)
        hits = both.gather(1, latent.unsqueeze(1)).squeeze(1)[seen].double()
        fired, active = self.n_fired[latent][seen], self.n_active[seen]
        f1 = 2 * hits / (fired + active)
        values = (f1, hits / fired, hits / active)
        metrics |= {n: float(v.mean()) for n, v in zip(names, values, strict=True)}
        if not seen.all():
            detail = f"{int((~seen).sum())} true features never active in these rows are left out"
            findings.notes += [Note("dead_feature", f"recovery.{name}", detail) for name in names]
        every: list[Any] = [None] * len(seen)
        for feature, value in zip(seen.nonzero().flatten().tolist(), f1.tolist(), strict=True):
            every[feature] = value
        findings.series["recovery_f1"] = every
        nearest = self.cosines.argmax(0)
        hits_of_latent = both[nearest, torch.arange(len(nearest))].double()
        total = (self.n_fired + self.n_active[nearest]).clamp_min(1)
        findings.per_latent["recovery_f1"] = (2 * hits_of_latent / total).float().numpy()


def unit(rows: Float[Tensor, "n d"]) -> Float[Tensor, "n d"]:
    """Rows of norm 1; a row of zeros stays zero."""
    return torch.nn.functional.normalize(rows, dim=1)


def count_pairs(
    both: Int64[Tensor, " n_features_times_d_sae"],
    row: Int64[Tensor, " nnz"],
    feature: Int64[Tensor, " nnz"],
    latents: Latents,
) -> None:
    """Add to `both[feature · d_sae + latent]` the rows in which a feature and a latent are active.

    `row` and `feature` are the entries of the true codes.
    """
    counts = latents.counts.cpu()[row]
    start = latents.offsets.cpu()[:-1][row]
    # Entry i of the codes meets the `counts[i]` latents of its row, which begin at `start[i]`.
    within = torch.arange(int(counts.sum())) - (counts.cumsum(0) - counts).repeat_interleave(counts)
    latent = latents.indices.cpu().long()[start.repeat_interleave(counts) + within]
    cell = feature.repeat_interleave(counts) * latents.d_sae + latent
    both.index_add_(0, cell, torch.ones_like(cell))


def matched_cosine(cosines: Float[Tensor, "n_features n_latents"]) -> float:
    """Mean cosine of the one-to-one matching with the greatest sum; unmatched features count 0."""
    from scipy.optimize import linear_sum_assignment

    matrix = cosines.double().numpy()
    chosen = linear_sum_assignment(matrix, maximize=True)
    return float(matrix[chosen].sum() / len(matrix))
