"""End-to-end training (Braun et al. 2024, arXiv 2405.12241): what counts is what comes out."""

from collections.abc import Sequence
from typing import ClassVar

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from sae_runner.config import NonNegativeFloat
from sae_runner.errors import ConfigError
from sae_runner.models.base import Inputs, Model, SiteInfo
from sae_runner.saes.base import SAE, Loss, TrainState
from sae_runner.site import TokenSelection
from sae_runner.splice import Run, kl_divergence, later_sites, rows_of, run
from sae_runner.training.objectives import OBJECTIVES
from sae_runner.training.objectives.base import WHOLE, Objective, Share

SITES = "trainer.objective.downstream_sites"
OTHERWISE = ", or set trainer.objective.downstream_coefficient=0"


@OBJECTIVES.register("e2e")
class EndToEnd(Objective):
    """The frozen model is run as it is, and with the reconstruction spliced in for the site.

    With p and q its distributions then, a_k and â_k its activations at |D| later sites, E the SAE's
    own error and S the other terms of its own loss (sparsity with its own coefficient or target L0;
    none for top-k kinds; a gate's own error),

        L = κ KL(p ‖ q) + γ / |D| Σ_k mean (a_k − â_k)² + ρ E + S

    SAE_e2e is γ = ρ = 0, SAE_e2e+ds is ρ = 0 (§2). KL, in nats, is a mean over tokens that are no
    padding, or over examples where the model has one output each; the squared difference over
    those tokens and the width: the mean of the authors' code, whose numbers the recipes are, where
    the paper's equation has a squared norm.

    Only selected tokens are replaced. The model stays in its own precision under autocast.

    Args:
        sae: what is trained.
        model: the model, frozen; without weights it serves to check options.
        site: what is reconstructed.
        selection: which of its tokens.
        kl_coefficient: κ.
        downstream_coefficient: γ.
        downstream_sites: D, by names or globs; None for `resid_post` of every later block (the
            paper leaves out the last block's).
        reconstruction_coefficient: ρ.

    Raises:
        ConfigError: a kind of SAE or a selection of tokens that cannot be trained so; nothing to
            minimise; a model whose output is no distribution; sites that are absent or not later.
    """

    on_inputs: ClassVar[bool] = True

    def __init__(
        self,
        sae: SAE,
        model: Model,
        site: SiteInfo,
        selection: TokenSelection,
        *,
        kl_coefficient: NonNegativeFloat,
        downstream_coefficient: NonNegativeFloat,
        downstream_sites: list[str] | None,
        reconstruction_coefficient: NonNegativeFloat,
    ) -> None:
        super().__init__(sae)
        self.model, self.site, self.selection = model, site, selection
        self.kl_coefficient = kl_coefficient
        self.downstream_coefficient = downstream_coefficient
        self.reconstruction_coefficient = reconstruction_coefficient
        self._check()
        wanted = downstream_coefficient > 0
        self.downstream = (
            later_sites(model, site, downstream_sites, SITES, OTHERWISE) if wanted else []
        )

    def _check(self) -> None:
        if self.sae.end_to_end_refused:
            raise ConfigError(
                f"trainer/objective=e2e: sae={self.sae.kind}: {self.sae.end_to_end_refused}"
            )
        self.selection.check_replaceable("trainer/objective=e2e")
        coefficients = (
            self.kl_coefficient, self.downstream_coefficient, self.reconstruction_coefficient
        )  # fmt: skip
        if not any(coefficients):
            raise ConfigError(
                "trainer.objective.kl_coefficient=0: nothing is left to minimise: all others are 0"
            )
        if self.kl_coefficient and self.model.output == "features":
            raise ConfigError(
                f"trainer.objective.kl_coefficient={self.kl_coefficient:g}: not applicable: this "
                "model gives no logits of trained weights; set it to 0 (the differences at later "
                "sites, trainer.objective.downstream_coefficient, need none)"
            )

    # -- The loss --------------------------------------------------------------------------------

    def loss(self, x: Tensor | Inputs, state: TrainState, share: Share = WHOLE) -> Loss:
        """See `Objective.loss`."""
        assert isinstance(x, Inputs)
        with torch.no_grad():
            clean = self.run(x)
        found = clean.sites[self.site.name]
        keep = self.selection.mask(self.site, x, found.shape[1]).to(found.device)
        rows = found[keep]
        own = self.sae.loss(rows.to(torch.promote_types(rows.dtype, torch.float32)), state)
        total, parts = own.rest, dict(own.parts)
        if self.reconstruction_coefficient:
            total = total + self.reconstruction_coefficient * own.error
        for name, coefficient, value in self.judged(x, clean, keep, own.x_hat):
            # The trainer weights all by rows, and these are means over something else.
            by_token = name == "downstream" or self.model.output == "token_logits"
            value = value * ((share.tokens if by_token else share.examples) / share.rows)
            total, parts[name] = total + coefficient * value, value.detach()
        return own._replace(total=total, parts=parts)

    def judged(
        self, inputs: Inputs, clean: Run, keep: Bool[Tensor, "n t"], x_hat: Float[Tensor, "m d"]
    ) -> list[tuple[str, float, Float[Tensor, ""]]]:
        """What the model makes of the reconstruction: name, coefficient and value of each term."""
        if not (self.kl_coefficient or self.downstream_coefficient):
            return []

        found = clean.sites[self.site.name]
        spliced = self.run(inputs, found.index_put((keep,), x_hat.to(found.dtype)))
        terms = []
        if self.kl_coefficient:
            valid = inputs.attended if self.model.output == "token_logits" else None
            value = kl_divergence(rows_of(clean.output, valid), rows_of(spliced.output, valid))
            terms.append(("kl", self.kl_coefficient, value))
        if self.downstream_coefficient:
            value = torch.stack([
                mean_square_difference(clean, spliced, info, inputs) for info in self.downstream
            ]).mean()  # fmt: skip
            terms.append(("downstream", self.downstream_coefficient, value))
        return terms

    def run(self, inputs: Inputs, x: Float[Tensor, "n t d"] | None = None) -> Run:
        """The model's output and later sites; see `splice.run`."""
        return run(self.model, inputs, self.site, x, watched=self.downstream)

    def shares(self, parts: Sequence[Tensor | Inputs]) -> list[Share]:
        """See `Objective.shares`; how many rows there are is known ahead of running the model."""
        if len(parts) == 1:
            return [WHOLE]
        counts = [self._counts(part) for part in parts]
        sums = [sum(column) for column in zip(*counts, strict=True)]
        return [Share(*(n / total for n, total in zip(own, sums, strict=True))) for own in counts]

    def _counts(self, part: Tensor | Inputs) -> tuple[int, int, int]:
        assert isinstance(part, Inputs)
        n = len(part)
        n_tokens = n if part.attended is None else int(part.attended.sum())
        length = self.site.n_tokens
        if length is None:
            assert part.attended is not None  # Of texts.
            length = part.attended.shape[1]
        return int(self.selection.mask(self.site, part, length).sum()), n_tokens, n


def mean_square_difference(
    clean: Run, spliced: Run, info: SiteInfo, inputs: Inputs
) -> Float[Tensor, ""]:
    """Over the tokens of a later site that are no padding, and over its width."""
    valid = inputs.attended if info.kind == "tokens" else None  # Which images do not have.
    a, b = (rows_of(run.sites[info.name], valid) for run in (clean, spliced))
    return (a - b).square().mean()
