"""TopK SAE (Gao et al. 2024, arXiv 2406.04093), with GroupMax and AbsTopK as other selections."""

from typing import Any, Literal, Unpack

import torch
from jaxtyping import Float, Int, Int64
from torch import Tensor

from sae_runner.config import Fraction, NonNegativeFloat, Positive
from sae_runner.errors import ConfigError
from sae_runner.kernels.selection import Entries
from sae_runner.saes import SAES
from sae_runner.saes.base import SAE, Common, Latents, Loss, TrainState, width

Chosen = tuple[Float[Tensor, "n k"], Int64[Tensor, "n k"]]


@SAES.register("topk")
class TopK(SAE):
    """The k largest pre-activations of each row, where positive.

    z = (s x − b_dec) W_enc + b_enc,    f = ReLU(TopK_k(z)),    x_hat = (f W_dec + b_dec) / s,
    with decoder rows of norm 1 (Gao et al. 2024, §2.3 and appendix A).

    `selection: groupmax` takes the largest of each of k groups of neighbours (as sparsify does);
    `abstopk` the k largest in absolute value, with their signs (arXiv 2510.00404).
    `multi_topk` adds that much of the error with 4 k latents (Gao et al., appendix A.6: 1/8).
    `k_start` begins with so many latents and comes down to k over the first `k_anneal` of training.

    Raises:
        ConfigError: more latents are to be chosen than there are, or groups are of unequal size.
    """

    kind = "topk"
    sparse = True
    pre_act_refused = "a latent fires by being among the k largest, not by passing a threshold"

    def __init__(
        self,
        d_in: int,
        *,
        k: Positive,
        selection: Literal["topk", "groupmax", "abstopk"],
        multi_topk: NonNegativeFloat,
        k_start: Positive | None,
        k_anneal: Fraction,
        **common: Unpack[Common],
    ) -> None:
        self.k, self.k_start, self.k_anneal = chosen_k(d_in, k, k_start, common), k_start, k_anneal
        self.selection, self.multi_topk = selection, multi_topk
        options = {
            "k": self.k, "selection": selection, "multi_topk": multi_topk, "k_start": k_start,
            "k_anneal": k_anneal,
        }  # fmt: skip
        super().__init__(d_in, options=options, **common)
        self.recording_refused = "k comes down from sae.k_start; set it to null" if k_start else ""
        if multi_topk:
            self.end_to_end_refused = "sae.multi_topk is a second error of the site; set it to 0"
        if selection == "groupmax":
            if self.d_sae % self.k:
                raise ConfigError(f"sae.k={self.k}: groupmax needs a divisor of d_sae={self.d_sae}")
            if multi_topk or k_start:
                key = "multi_topk" if multi_topk else "k_start"
                raise ConfigError(f"sae.{key}: groupmax has one k; set it to null or 0")

    def choose(self, pre_acts: Float[Tensor, "n d_sae"], k: int) -> Chosen:
        """Values and indices of exactly k latents of each row; values may be zero."""
        if self.selection == "groupmax":
            values, places = pre_acts.reshape(len(pre_acts), k, self.d_sae // k).max(dim=2)
            starts = torch.arange(0, self.d_sae, self.d_sae // k, device=places.device)
            return values.relu(), places + starts
        return self.strongest(pre_acts, k)

    def strongest(self, pre_acts: Float[Tensor, "n m"], k: int) -> Chosen:
        """See `SAE.strongest`."""
        if self.selection == "abstopk":
            indices = pre_acts.abs().topk(k, dim=1, sorted=False).indices
            return pre_acts.gather(1, indices), indices
        return super().strongest(pre_acts, k)

    def encode(self, x: Float[Tensor, "n d_in"]) -> Float[Tensor, "n d_sae"]:
        """See `SAE.encode`."""
        pre_acts = self.pre_activations(self.scaled(x))
        values, indices = self.choose(pre_acts, self.k)
        return torch.zeros_like(pre_acts).scatter(1, indices, values)

    def encode_chunk(self, x: Float[Tensor, "n d_in"]) -> Latents:
        """See `SAE.encode_chunk`; no dense latents are made."""
        scaled = self.scaled(x)
        centred = self.centred(scaled)
        pre_acts, indices = self.select(scaled, centred, self.k)
        latents = self.chosen(scaled, centred, pre_acts, indices)
        return Latents.from_topk(latents.values.view_as(indices), indices.long(), self.d_sae)

    def select(
        self, scaled: Float[Tensor, "n d_in"], centred: Float[Tensor, "n d_in"], k: int
    ) -> tuple[Float[Tensor, "n k"], Int[Tensor, "n k"]]:
        """Pre-activations and indices of the k latents that are chosen in training; no gradient."""
        if self.selection == "topk":
            return self.selector.top(centred, self.W_enc_rows, self.b_enc, k)
        parts = []
        with torch.no_grad():
            for part in self.chunks(scaled):
                pre_acts = self.pre_activations(part)
                indices = self.choose(pre_acts, k)[1]
                parts.append((pre_acts.gather(1, indices), indices))
        return torch.cat([z for z, _ in parts]), torch.cat([where for _, where in parts])

    def chosen(
        self,
        scaled: Float[Tensor, "n d_in"],
        centred: Float[Tensor, "n d_in"],
        pre_acts: Float[Tensor, "n k"],
        indices: Int[Tensor, "n k"],
    ) -> Latents:
        """Latents that were selected, with their gradient; values may be zero."""
        n, k = indices.shape
        offsets = torch.arange(0, n * k + 1, k, device=indices.device)
        entries = Entries(offsets, indices.flatten().int(), pre_acts.flatten())
        latents = self.scored(scaled, centred, entries)
        signed = self.selection == "abstopk"
        return latents if signed else latents.with_values(latents.values.relu())

    def loss(self, x: Float[Tensor, "n width"], state: TrainState) -> Loss:
        """The reduced squared error on scaled activations, plus that with 4 k latents."""
        scaled = self.scaled(self.input_of(x))
        target = self.target_for(x, scaled)
        k = round(annealed(self.k, self.k_start, self.k_anneal, state.progress))
        base, terms, centred = self.base_of(scaled), {}, self.centred(scaled)
        own = centred if target is scaled else None
        if self.multi_topk > 0:
            pre_acts, indices = self.select(scaled, centred, min(4 * k, self.d_sae))
            more = self.chosen(scaled, centred, pre_acts, indices)
            error = self.error(self.reconstruct(more, target, base, own).square, target)[1]
            terms["multi_topk"] = (self.multi_topk, error)
            size = pre_acts.abs() if self.selection == "abstopk" else pre_acts
            best = size.topk(k, dim=1, sorted=False).indices
            pre_acts, indices = pre_acts.gather(1, best), indices.gather(1, best)
        else:
            pre_acts, indices = self.select(scaled, centred, k)
        latents = self.chosen(scaled, centred, pre_acts, indices)
        found = self.reconstruct(latents, target, base, own)
        return self.loss_of(x, target, found, latents.fired, **terms)

    def settle(self, progress: float) -> None:
        """See `SAE.settle`."""
        self.k = round(annealed(self.k, self.k_start, self.k_anneal, progress))
        self.options = with_k(self.options, self.k)

    def target_for(
        self, x: Float[Tensor, "n width"], scaled: Float[Tensor, "n d_in"]
    ) -> Float[Tensor, "n d_out"]:
        """What the reconstruction of scaled rows of x is compared with."""
        return scaled

    def base_of(self, scaled: Float[Tensor, "n d_in"]) -> Tensor:
        """What is predicted of scaled rows when no latent fires."""
        return self.b_dec


def chosen_k(d_in: int, k: int, k_start: int | None, common: Common) -> int:
    """See `k_or_target`; a row can only have a whole number of latents.

    Raises:
        ConfigError: it is no whole number, or larger than d_sae.
    """
    target = common["target_l0"]
    if target is not None and not float(target).is_integer():
        raise ConfigError(f"sae.target_l0={target:g}: k is a whole number here")
    return int(k_or_target(d_in, k, k_start, common))


def k_or_target(d_in: int, k: float, k_start: float | None, common: Common) -> float:
    """k, or the target L0, which is the same by the name that every kind accepts.

    Raises:
        ConfigError: it, or where it starts, is larger than d_sae; it would grow.
    """
    n_latents = width(d_in, common["d_sae"], common["expansion"])
    target = common["target_l0"]
    chosen = k if target is None else target
    for key, number in (("k" if target is None else "target_l0", chosen), ("k_start", k_start)):
        if number is not None and number > n_latents:
            raise ConfigError(f"sae.{key}={number:g}: must be <= d_sae={n_latents}")
    if k_start is not None and k_start < chosen:
        raise ConfigError(f"sae.k_start={k_start:g}: k comes down from it; must be >= {chosen:g}")
    return chosen


def with_k(options: dict[str, Any], k: float) -> dict[str, Any]:
    """`options` with another k, under both of its names."""
    names = ["k", *(["target_l0"] if options["target_l0"] is not None else [])]
    return options if k == options["k"] else {**options, **dict.fromkeys(names, k)}


def annealed(k: float, start: float | None, share: float, progress: float) -> float:
    """K at this point of training: linear from `start` to `k` over the first `share` of it."""
    if start is None or progress >= share:
        return k
    return start + (k - start) * progress / share
