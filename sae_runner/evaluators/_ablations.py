"""One latent at one token taken out of the model, many such pairs in a run; and what that moves."""

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float, Float64, Int64
from torch import Tensor

from sae_runner.evaluators._predictions import Head, precise
from sae_runner.models.base import Inputs, Model
from sae_runner.saes.base import SAE, Latents

REMOVED = ("latent", "channel", "random")
"""What is taken out at the token: a latent, a channel of the site, a random vector as long."""


class Pairs(NamedTuple):
    """Tokens of a batch, each with a latent that is active there; on the model's device."""

    example: Int64[Tensor, " p"]
    """Number within the batch."""
    position: Int64[Tensor, " p"]
    latent: Int64[Tensor, " p"]
    activation: Float[Tensor, " p"]
    channel: Int64[Tensor, " p"]
    removed: Float[Tensor, "p 3 d"]
    """What is taken from the site at the token, by REMOVED."""

    def part(self, start: int, stop: int) -> "Pairs":
        """Some of them."""
        return Pairs(*(column[start:stop] for column in self))


def draw_pairs(
    sae: SAE,
    x: Float[Tensor, "n t d_in"],
    y: Float[Tensor, "n t d"],
    keep: Bool[Tensor, "n t"],
    ahead: Int64[Tensor, "n t"],
    ids: Int64[Tensor, " n"],
    counts: Mapping[int, int],
    seed: int,
) -> Pairs:
    """Draw pairs in each example, by its own id: batches do not matter.

    Args:
        sae: its latents are drawn from those active at the tokens.
        x: what it reads.
        y: the site that is edited; x but for a transcoder.
        keep: tokens that may be drawn.
        ahead: how many outputs each token has; only those with the most in an example are drawn.
        ids: of the examples.
        counts: how many pairs each is to give, by id; fewer where fewer latents are active.
        seed: of all draws.
    """
    keep = keep.cpu()
    place = keep.nonzero()
    rows = x[keep.to(x.device)]
    rows = rows.to(torch.promote_types(rows.dtype, torch.float32))
    latents = sae.encode_sparse(rows)
    row_of_entry, best = latents.rows.cpu(), torch.where(keep, ahead.cpu(), -1).amax(1)
    drawable = (ahead.cpu()[place[:, 0], place[:, 1]] == best[place[:, 0]])[row_of_entry]
    drawable &= (latents.values != 0).cpu()
    example_of_entry = place[row_of_entry, 0]
    entries, channels, directions = [], [], []
    for number, example in enumerate(ids.tolist()):
        candidates = (drawable & (example_of_entry == number)).nonzero()[:, 0].numpy()
        rng = np.random.default_rng([seed, example])
        chosen = rng.permutation(candidates)[: counts[example]]
        entries.append(torch.from_numpy(chosen))
        channels.append(torch.from_numpy(rng.integers(y.shape[2], size=len(chosen))))
        directions.append(torch.from_numpy(rng.standard_normal((len(chosen), y.shape[2]))))
    entry = torch.cat(entries)
    row, channel = row_of_entry[entry], torch.cat(channels).to(y.device)
    example, position = place[row].T.to(y.device)
    entry = entry.to(rows.device)
    latent, activation = latents.indices[entry].long(), latents.values[entry]
    alone = part_of_latents(sae, rows[row.to(rows.device)], latent, activation)
    whole = y[example, position].to(alone.dtype)
    one_channel = torch.zeros_like(alone)
    one_channel.scatter_(1, channel.unsqueeze(1), whole.gather(1, channel.unsqueeze(1)))
    direction = torch.nn.functional.normalize(torch.cat(directions).to(alone), dim=1)
    random = direction * alone.norm(dim=1, keepdim=True)
    removed = torch.stack([alone, one_channel, random], dim=1)
    return Pairs(example, position, latent, activation, channel, removed)


def part_of_latents(
    sae: SAE,
    x: Float[Tensor, "p d_in"],
    latent: Int64[Tensor, " p"],
    activation: Float[Tensor, " p"],
) -> Float[Tensor, "p d"]:
    """What one latent adds to the reconstruction of each row: a decoder is affine in latents."""
    ends = torch.arange(len(x) + 1, device=latent.device)
    one = Latents(ends, latent, activation, sae.d_sae)
    none = Latents(torch.zeros_like(ends), latent[:0], activation[:0], sae.d_sae)
    with_it, without = (sae.unscaled(sae.decode_scaled(part), x) for part in (one, none))
    return with_it - without


class Changes(NamedTuple):
    """How the logits of pairs change, less the median over each position's vocabulary."""

    delta: Float64[Tensor, "p 3 t v"]
    counted: Bool[Tensor, "p t"]
    """The positions that there are."""
    rounding: Float64[Tensor, " p"]
    """Of a logit: its precision times the root mean square of the logits."""
    n_outputs: int
    """Numbers that the model gave for each pair."""


def changes(
    model: Model,
    head: Head,
    inputs: Inputs,
    site: str,
    y: Float[Tensor, "n t d"],
    pairs: Pairs,
    n_positions: int,
) -> Changes:
    """Run the model from `site` with each pair's three edits, and as it is, in one batch."""
    n = 1 + len(REMOVED)
    state = inputs.map(lambda tensor: tensor[pairs.example.to(tensor.device)])
    x = y[pairs.example].repeat_interleave(n, dim=0)
    first = torch.arange(len(state), device=y.device) * n
    for kind in range(len(REMOVED)):
        at = (first + 1 + kind, pairs.position)
        x[at] = (x[at].to(pairs.removed.dtype) - pairs.removed[:, kind]).to(x.dtype)
    output = model.resume_from(site, x, state)
    logits = head.logits(output)
    logits = logits.view(len(state), n, *logits.shape[1:])
    if head.kind == "tokens":
        ahead = pairs.position.unsqueeze(1) + torch.arange(n_positions, device=y.device)
        counted = ahead < logits.shape[2]
        ahead = ahead.clamp_max(logits.shape[2] - 1)
        if state.attended is not None:
            counted = counted & state.attended.to(y.device).gather(1, ahead)
        pair = torch.arange(len(state), device=y.device).unsqueeze(1)
        logits = logits[pair, :, ahead].transpose(1, 2)
    else:
        logits = logits.unsqueeze(2)
        counted = torch.ones(len(state), 1, dtype=torch.bool, device=y.device)
    logits = precise(logits)
    clean = logits[:, :1]
    rounding = clean.square().mean((1, 2, 3)).sqrt() * torch.finfo(output.dtype).eps
    delta = (logits[:, 1:] - clean).cpu().double()
    delta -= median(delta)
    return Changes(delta, counted.cpu(), rounding.cpu().double(), output.numel() // len(state))


def median(x: Float[Tensor, "*n v"]) -> Float[Tensor, "*n 1"]:
    """Over the last axis; between the two in the middle where there are two."""
    low, high = x.median(-1, keepdim=True).values, -(-x).median(-1, keepdim=True).values
    return (low + high) / 2


def effective_share(
    delta: Float64[Tensor, "p k t v"], counted: Bool[Tensor, "p t"]
) -> tuple[Float64[Tensor, "p k"], Float64[Tensor, "p k"]]:
    """(Σ|Δ|)² / (Σ Δ² · n) over the n numbers at counted positions, and their root mean square.

    The share is NaN where Δ is 0.
    """
    delta = delta * counted[:, None, :, None]
    n = counted.sum(1, keepdim=True) * delta.shape[-1]
    square = delta.square().sum((2, 3))
    return delta.abs().sum((2, 3)).square() / (square * n), (square / n).sqrt()
