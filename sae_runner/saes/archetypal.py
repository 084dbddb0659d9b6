"""Relaxed archetypal SAE, RA-SAE (Fel et al. 2025, arXiv 2502.12892)."""

from typing import Literal, Unpack

import torch
from jaxtyping import Float
from torch import Tensor, nn

from sae_runner.config import Fraction, NonNegativeFloat, Positive
from sae_runner.errors import ConfigError, DataError
from sae_runner.saes import SAES
from sae_runner.saes._initialisation import k_means, random_directions
from sae_runner.saes._weights import Weights
from sae_runner.saes.base import Common
from sae_runner.saes.topk import TopK
from sae_runner.statistics import ActivationStats


@SAES.register("archetypal")
class Archetypal(TopK):
    """TopK whose decoder rows are mixtures of points of the data.

    W_dec = exp(m) (W C + Λ),    W ≥ 0 with rows that sum to 1,    ‖Λ_i‖ ≤ δ.

    C [n_candidates, d_in] are k-means centres of scaled activations less the b_dec of the start
    (the paper has no b_dec), and stay. W (`mixture`), Λ (`relaxation`) and m (`log_scale`, one
    number) are trained; after each step W and Λ are brought back to where they may be: negative
    weights are cut and rows divided by their sum, Λ_i shortened to δ. The authors' code does the
    same before each step. An encoder of its own, as `topk` has it.

    Two forms of one kind. In training the decoder is computed from those four at each use, and the
    training state keeps them. `fold` writes it out: what is saved for use has a plain W_dec and
    exactly topk's tensors (C and W are far larger); `n_candidates: null` in its config says so.
    Trained with null it is `topk`. A folded one cannot go back: `init_from` refuses it.

    Raises:
        ConfigError: decoder rows are asked to have norm 1.
    """

    kind = "archetypal"
    resampling_refused = "decoder rows are mixtures of candidates, not free to be pointed"

    mixture: Tensor
    relaxation: Tensor
    log_scale: Tensor
    candidates: Tensor

    def __init__(
        self,
        d_in: int,
        *,
        k: Positive,
        selection: Literal["topk", "groupmax", "abstopk"],
        multi_topk: NonNegativeFloat,
        k_start: Positive | None,
        k_anneal: Fraction,
        n_candidates: Positive | None,
        delta: NonNegativeFloat,
        **common: Unpack[Common],
    ) -> None:
        if common["decoder_norm"] == "unit":
            raise ConfigError(
                "sae.decoder_norm=unit: rows of norm 1 need not be mixtures of candidates; set it "
                "to free"
            )
        self.n_candidates, self.delta = n_candidates, delta
        super().__init__(
            d_in, k=k, selection=selection, multi_topk=multi_topk, k_start=k_start,
            k_anneal=k_anneal, **common,
        )  # fmt: skip
        self.options = {**self.options, "n_candidates": n_candidates, "delta": delta}

    def make_weights(self) -> None:
        """See `SAE.make_weights`."""
        self.W_enc_rows = nn.Parameter(torch.empty(self.d_sae, self.d_in))
        self.b_enc = nn.Parameter(torch.zeros(self.d_sae))
        self.b_dec = nn.Parameter(torch.zeros(self.d_in))
        if self.n_candidates is None:
            self._keep_plain(torch.empty(self.d_sae, self.d_in))
            return
        self.mixture = nn.Parameter(torch.empty(self.d_sae, self.n_candidates))
        self.relaxation = nn.Parameter(torch.zeros(self.d_sae, self.d_in))
        self.log_scale = nn.Parameter(torch.zeros(()))
        self.register_buffer("candidates", torch.empty(self.n_candidates, self.d_in))

    @property
    def W_dec(self) -> Tensor:  # type: ignore[override]
        """The decoder: computed, with its gradient, or as `fold` wrote it."""
        plain = self._parameters.get("W_dec")
        if plain is not None:
            return plain
        with torch.autocast(self.candidates.device.type, enabled=False):
            mixed = self.mixture @ self.candidates + self.relaxation
            return self.log_scale.exp() * mixed

    def _keep_plain(self, decoder: Float[Tensor, "d_sae d_in"]) -> None:
        # Not by assignment: there is a property of that name.
        self._parameters["W_dec"] = nn.Parameter(decoder)

    @torch.no_grad()
    def initialise_weights(self, stats: ActivationStats, generator: torch.Generator) -> None:
        """Each decoder row is one candidate, all scaled to a mean norm of `decoder_init_norm`.

        Rows beyond the number of candidates start half way between two of them.

        Raises:
            DataError: there are fewer rows than candidates.
        """
        if self.n_candidates is None:
            super().initialise_weights(stats, generator)
            return
        self.initialise_b_dec(stats)
        rows = self.scaled(stats.sample) - self.b_dec
        if len(rows) < self.n_candidates:
            raise DataError(
                f"sae.n_candidates={self.n_candidates}: there are {len(rows)} rows to find them in"
            )
        self.candidates.copy_(k_means(rows, self.n_candidates, generator))
        n, device = self.d_sae, generator.device
        order = torch.randperm(self.n_candidates, generator=generator, device=device)
        pairs = torch.randint(self.n_candidates, (n, 2), generator=generator, device=device)
        pairs[: len(order)] = order[:n].unsqueeze(1)
        halves = torch.full((n, 2), 0.5, device=self.mixture.device)
        self.mixture.zero_().scatter_add_(1, pairs.to(halves.device), halves.to(self.mixture))
        self.relaxation.zero_()
        self.log_scale.zero_()
        norm = self.options["decoder_init_norm"]
        self.log_scale.copy_((norm / self.W_dec.norm(dim=1).mean().clamp_min(1e-12)).log())
        self.W_enc_rows.copy_(self.W_dec)
        if self.options["encoder_init"] == "random":
            self.W_enc_rows.copy_(norm * random_directions(n, self.d_in, generator))
        self.b_enc.zero_()
        if self.options["encoder_init"] == "matched":
            self.match_encoder(stats.sample[:1024])

    @torch.no_grad()
    def after_step(self, *, normalised: bool = False) -> None:
        """See `SAE.after_step`; a row of W without a positive weight becomes its largest one."""
        if self.n_candidates is None:
            return
        best = self.mixture.argmax(1, keepdim=True)
        self.mixture.relu_()
        empty = (self.mixture.sum(1, keepdim=True) <= 0).to(self.mixture)
        self.mixture.scatter_add_(1, best, empty)
        self.mixture.div_(self.mixture.sum(1, keepdim=True))
        length = self.relaxation.norm(dim=1, keepdim=True).clamp_min(1e-12)
        self.relaxation.mul_((self.delta / length).clamp_max(1))

    @torch.no_grad()
    def fold(self) -> Weights:
        """See `SAE.fold`; the decoder is written out."""
        if self.n_candidates is not None:
            decoder = self.W_dec.clone()
            del self.mixture, self.relaxation, self.log_scale, self.candidates
            self._keep_plain(decoder)
            self.n_candidates = None
            self.options = {**self.options, "n_candidates": None}
        return super().fold()
