"""Neuron resampling (Bricken et al. 2023, Towards Monosemanticity, appendix)."""

from collections.abc import Iterator

import torch
from jaxtyping import Float
from torch import Tensor

from sae_runner.config import Fraction, Positive, PositiveFloat
from sae_runner.errors import ConfigError
from sae_runner.saes.base import SAE
from sae_runner.training.dead_latents import DEAD_LATENTS
from sae_runner.training.dead_latents.base import DeadLatents


@DEAD_LATENTS.register("resample")
class Resample(DeadLatents):
    """Points dead latents at inputs that are reconstructed badly, at certain steps.

    Of `n_rows` training rows one is drawn for each dead latent, with odds in proportion to its
    squared loss. The latent's decoder row becomes the unit vector along it (less b_dec where the
    encoder subtracts that), its encoder row the same at `encoder_norm` times the mean norm of the
    living, its bias 0; what the optimizer remembers of those rows is forgotten. No row is drawn
    twice.

    Raises:
        ConfigError: a share in `at` is none, or this kind of SAE cannot be resampled.
    """

    def __init__(
        self,
        sae: SAE,
        window: int,
        *,
        at: list[Fraction],
        n_rows: Positive,
        encoder_norm: PositiveFloat,
        lr_warmup: Fraction,
    ) -> None:
        super().__init__(sae, window)
        if sae.resampling_refused:
            raise ConfigError(f"sae/dead_latents=resample: {sae.resampling_refused}")
        if not at:
            raise ConfigError("sae.dead_latents.at=[]: needs a share of training; or take none")
        self.at, self.n_rows = sorted(at), n_rows
        self.encoder_norm, self.lr_warmup = encoder_norm, lr_warmup

    def steps(self, n_steps: int) -> list[int]:
        """See `DeadLatents.steps`; never after the last, which nothing would follow."""
        return sorted({s for share in self.at if 0 < (s := round(share * n_steps)) < n_steps})

    def lr_factor(self, step: int, n_steps: int) -> float:
        """Linear from 0 to 1 after each resampling."""
        length = self.lr_warmup * n_steps
        since = min((step - s for s in self.steps(n_steps) if step >= s), default=None)
        return 1.0 if since is None or length < 1 else min(1.0, (since + 1) / length)

    def milestones(self, n_steps: int) -> set[int]:
        """Before each resampling, and after its re-warm-up."""
        length = round(self.lr_warmup * n_steps)
        steps = self.steps(n_steps)
        return {*steps, *(s + length for s in steps if length and s + length < n_steps)}

    @torch.no_grad()
    def intervene(
        self,
        batches: Iterator[Float[Tensor, "n d_in"]],
        optimizer: torch.optim.Optimizer,
        generator: torch.Generator,
    ) -> None:
        """See `DeadLatents.intervene`."""
        dead = self.dead.nonzero().squeeze(1)
        if len(dead) == 0:
            return
        sae = self.sae
        rows = draw_rows(sae, batches, len(dead), self.n_rows, generator)
        dead = dead[: len(rows)]
        centred = rows - sae.b_dec if sae.apply_b_dec_to_input else rows
        directions = torch.nn.functional.normalize(centred, dim=1)
        living = ~self.dead
        norms = sae.W_enc_rows[living if living.any() else slice(None)].norm(dim=1)
        sae.reset_latents(dead, directions, self.encoder_norm * float(norms.mean()))
        for parameter in map(sae.get_parameter, sae.rows_by_latent()):
            for slot in optimizer.state.get(parameter, {}).values():
                if isinstance(slot, Tensor) and slot.shape == parameter.shape:
                    slot[dead] = 0
        self.rows_since_fired[dead] = 0


def draw_rows(
    sae: SAE,
    batches: Iterator[Float[Tensor, "n d_in"]],
    n: int,
    n_rows: int,
    generator: torch.Generator,
) -> Float[Tensor, "m d_in"]:
    """At most n scaled rows, without replacement, odds in proportion to the square of the loss.

    The n largest of log odds + Gumbel noise are such a draw (Efraimidis and Spirakis 2006): one
    pass, and no more memory than the rows drawn.
    """
    kept, keys, seen = sae.b_dec.new_zeros(0, sae.d_in), sae.b_dec.new_zeros(0), 0
    for x in batches:
        x = x[: n_rows - seen].to(sae.b_dec.device)
        seen += len(x)
        scaled = sae.scaled(x)
        loss = (scaled - sae.decode_scaled(sae.encode_sparse(x))).square().sum(1)
        uniform = torch.rand(len(x), generator=generator, dtype=torch.float64).clamp_min(1e-300)
        gumbel = -(-uniform.log()).log()
        key = 2 * loss.clamp_min(1e-30).log() + gumbel.to(loss)
        kept, keys = torch.cat([kept, scaled]), torch.cat([keys, key])
        best = keys.topk(min(n, len(keys))).indices
        kept, keys = kept[best], keys[best]
        if seen >= n_rows:
            break
    return kept
