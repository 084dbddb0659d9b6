"""What a vector at a place of the last residual stream adds to the logits: weights of tokens."""

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from sae_runner.errors import ConfigError
from sae_runner.evaluators._predictions import precise
from sae_runner.models.base import Inputs, Model, SiteInfo
from sae_runner.splice import run

IN_STREAM = ("embed", "resid_pre", "attn_out", "resid_mid", "mlp_out", "resid_post")
"""Kinds of sites whose vectors are summands, or partial sums, of the last residual stream."""
NORMED = "final_norm"
UNCAPPED = 1 - 1e-6
"""Of a cap: what is nearer to it is rounded to it."""
EQUAL = 1e-3
"""Logits that differ by less of the largest are those of one stream."""


class DirectLogits:
    """Logits, less their mean over the vocabulary, as they are read from the last residual stream.

    With a norm's scale held, they are affine in the stream: ℓ(r) = h·r + ℓ(0). The gradient g at r
    is h without its part along r (along r less its mean, where the norm centres), which the norm
    takes off; that part is what g·r lacks of ℓ(r) − ℓ(0).

    Args:
        model: with its weights.
        last: the last residual stream.
        inputs: a batch, whose first example is run.
        stream: what `last` holds of the batch.
    """

    def __init__(
        self, model: Model, last: SiteInfo, inputs: Inputs, stream: Float[Tensor, "n t d"]
    ) -> None:
        self.model, self.last = model, last
        inputs, stream = inputs.map(lambda tensor: tensor[:1]), stream[:1]
        nothing, equal = (
            self._logits(inputs, torch.full_like(stream, fill))[0, 0] for fill in (0.0, 1.0)
        )
        self.of_nothing: Float[Tensor, " v"] = nothing - nothing.mean()
        """ℓ(0)"""
        size = self._logits(inputs, stream).abs().max()
        self.centres = bool((equal - nothing).abs().max() <= EQUAL * size)
        """Whether the final norm takes its mean from the stream."""

    def _logits(self, inputs: Inputs, stream: Float[Tensor, "n t d"]) -> Float[Tensor, "n t v"]:
        found = precise(run(self.model, inputs, self.last, stream).output)
        if (cap := self.model.logit_cap) is None:
            return found
        return cap * torch.atanh((found / cap).clamp(-UNCAPPED, UNCAPPED))

    def weights(
        self,
        inputs: Inputs,
        stream: Float[Tensor, "n t d"],
        example: Int64[Tensor, " m"],
        position: Int64[Tensor, " m"],
        token: Int64[Tensor, " m"],
    ) -> tuple[Float[Tensor, "m d"], Float[Tensor, " m"]]:
        """The weights h of a token at each place of a batch, and its logit."""
        with torch.enable_grad():
            leaf = stream.detach().requires_grad_()
            logits = self._logits(inputs, leaf)[example, position]
            logit = logits.gather(1, token.unsqueeze(1))[:, 0] - logits.mean(1)
            (slope,) = torch.autograd.grad(logit.sum(), leaf)
        logit = logit.detach()
        r, g = (precise(tensor[example, position]) for tensor in (stream, slope))
        along = r - r.mean(1, keepdim=True) if self.centres else r
        lacking = logit - self.of_nothing[token] - (g * r).sum(1)
        share = lacking / along.square().sum(1).clamp_min(torch.finfo(r.dtype).tiny)
        return g + share.unsqueeze(1) * along, logit


def last_stream(model: Model, site: SiteInfo) -> SiteInfo:
    """The residual stream after the last block, which a site must be a part of.

    What logits are read from after the final norm is a stream of its own.

    Raises:
        ConfigError: the model has none, or the site is no part of it.
    """
    if site.name == NORMED:
        return site
    streams = [info for name, info in model.sites().items() if name.endswith(".resid_post")]
    kind = site.name.rpartition(".")[2]
    if not streams or kind not in IN_STREAM or site.d != streams[-1].d:
        raise ConfigError(
            f"not applicable: {site.name} adds nothing to a residual stream that logits are read "
            f"from; use a site of {', '.join((*IN_STREAM, NORMED))}"
        )
    return streams[-1]
