"""What each latent says for the token that comes next: latents by their effect, for comparisons.

Attribution of latent j at token t = activation × logit weight of the next token y = token t + 1,

    a_j(t) = f_j(t) · W_dec[j] · L_t (W_U[:, y] − mean_v W_U[:, v])

after Bricken et al. 2023 (attribution vectors of their logit similarity). The path is the direct
one: f_j adds W_dec[j] to the last residual stream r_t, past the blocks in between. L_t is the final
norm's gain, and centring where it centres, over its scale at r_t as the model has it: that scale is
held, so that what is added to the stream sums to its logit (its derivative would have the whole
stream sum to 0, as a norm undoes what makes it longer). Without a final norm, or behind it, L_t is
one. The mean over the vocabulary is taken off: logits say nothing of a constant in all of them.
A cap on the logits (Gemma 2) is undone first.

That a site's vectors are summands of the stream is taken for granted. Hosts that scale what blocks
write (Granite) or norm the embedding first (BLOOM) have `attn_out`, `mlp_out` and `embed` in other
units; `resid_*` is right there too.

Neurons, the raw coordinates of the site that the SAE writes to (a transcoder's target), say x_i h_i
likewise, with h the weights that W_dec[j] is multiplied by above: over i they sum to all that the
site says directly. They are what latents are compared with.

Group `attributions`, a safetensors file: rows of whole examples in the order of the pass, at whose
tokens the SAE was trained and a token follows. example_id, position, next_token [n]; row t owns the
entries of `indices` (latents) and `values` from offsets[t] to offsets[t + 1]; neurons [n, d] in
float16, which is exact to 1/2048 of a value or to 3e-8 of a logit: they are dense, and in float32
would be most of the file for nothing.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from jaxtyping import Bool, Float, Float16, Int64
from torch import Tensor

from sae_runner.config import NonNegative, Positive
from sae_runner.errors import ConfigError
from sae_runner.evaluators import EVALUATORS
from sae_runner.evaluators._bootstrap import (
    ClusterSums,
    checked_resamples,
    intervals,
    ratio_of,
)
from sae_runner.evaluators._direct_logits import DirectLogits, last_stream
from sae_runner.evaluators._numbers import NO_ROWS, Scalars
from sae_runner.evaluators._predictions import precise
from sae_runner.evaluators.base import EvalContext, Evaluator, Findings, Setting, Spliced
from sae_runner.models.base import Inputs, SiteInfo
from sae_runner.saes.base import Latents

N_LOGITS = 2**25
"""Logits that have a gradient at a time: 128 MB of float32; those of an example at least."""
RATIOS = {
    "direct": ("direct", "rows"), "logit": ("logit", "rows"),
    "positive_frac": ("positive", "entries"),
}  # fmt: skip
"""Metrics, and what they are ratios of."""
ENTRY_BYTES, ROW_BYTES, NEURON_BYTES = 8, 24, 2


class Batch(NamedTuple):
    """Attributions of the rows of some examples."""

    example_id: Int64[Tensor, " n"]
    position: Int64[Tensor, " n"]
    next_token: Int64[Tensor, " n"]
    logit: Float[Tensor, " n"]
    """ℓ_y"""
    latents: Latents
    """With attributions as their values."""
    neurons: Float16[Tensor, "n d"]
    """d = 0 where they are left out."""

    def first(self, n: int) -> "Batch":
        """The first n rows."""
        offsets = self.latents.offsets[: n + 1]
        end, d_sae = int(offsets[-1]), self.latents.d_sae
        kept = Latents(offsets, self.latents.indices[:end], self.latents.values[:end], d_sae)
        return Batch(
            self.example_id[:n], self.position[:n], self.next_token[:n], self.logit[:n], kept,
            self.neurons[:n],
        )  # fmt: skip


@EVALUATORS.register("attribution")
class Attribution(Evaluator):
    """Attributions of latents to the next token, on as many held-out rows as fit.

    Args:
        n_rows: rows at most, of whole examples; `eval.keep_gb` bounds them too.
        neurons: whether attributions of raw coordinates are kept too.
        n_bootstrap: resamples of the examples for the intervals; 0 for none.
    """

    axis = "faithfulness"
    version = "2"  # 1 kept no neurons, and gave no intervals.
    sizes = ("n_examples",)
    splices = ("clean",)

    def __init__(self, *, n_rows: Positive, neurons: bool, n_bootstrap: NonNegative) -> None:
        self.n_rows, self.neurons = n_rows, neurons
        self.n_bootstrap = checked_resamples(n_bootstrap, "attribution")

    def check(self, setting: Setting) -> None:
        """See `Evaluator.check`: a causal language model, its residual stream, tokens of it."""
        model = setting.shapes()
        if model.output != "token_logits" or not model.causal:
            raise ConfigError(
                "not applicable: it attributes the next token, which takes the logits of a causal "
                "language model; `sae-run report compare=[firing]` compares latents of any"
            )
        setting.selection.check_replaceable("this evaluator")
        if setting.selection.tokens == "last":
            raise ConfigError("site.tokens=last: no token comes after the last; use all")
        self.watches(setting)

    def watches(self, setting: Setting) -> Sequence[SiteInfo]:
        """See `Evaluator.watches`: the last residual stream, which is not seen anyhow."""
        last = last_stream(setting.shapes(), setting.spliced_site)
        return [] if last == setting.spliced_site else [last]

    def start(self, context: EvalContext) -> None:
        """Forget earlier rows."""
        assert context.setting is not None
        self.context = context
        self.last = last_stream(context.setting.shapes(), context.setting.spliced_site)
        self.batches: list[Batch] = []
        self.rows_left, self.bytes_left = self.n_rows, context.setting.keep_bytes
        self.is_full = False
        self.head: DirectLogits | None = None

    def update_spliced(self, batch: Spliced) -> None:
        """Keep the attributions of a batch, some examples at a time."""
        n_tokens, n_vocab = batch.clean.output.shape[1:]
        size = max(1, N_LOGITS // (n_tokens * n_vocab))
        keep = batch.replaced & has_next(batch.inputs, n_tokens).to(batch.replaced.device)
        for begin in range(0, len(batch.inputs), size):
            part = slice(begin, begin + size)
            if not self.is_full and keep[part].any():
                self._keep(self._attributed(batch, part, keep[part]))

    def _attributed(self, batch: Spliced, part: slice, keep: Bool[Tensor, "n t"]) -> Batch:
        """The attributions of some of a batch's examples."""
        context = self.context
        assert context.model is not None and context.setting is not None
        model, setting = context.model(), context.setting
        inputs = batch.inputs.map(lambda tensor: tensor[part])
        x, y = (
            precise(batch.clean.sites[site.name][part][keep])
            for site in (setting.site, setting.spliced_site)
        )
        stream = batch.clean.sites[self.last.name][part]
        latents = context.sae.encode_sparse(x)
        context.spent["sae_encodes"] += len(x)
        context.spent["partial_forwards"] += len(inputs)
        example, position = keep.nonzero(as_tuple=True)
        token = inputs.tensors["tokens"].to(keep.device)[example, position + 1]
        if self.head is None:
            self.head = DirectLogits(model, self.last, inputs, stream)
        weight, logit = self.head.weights(inputs, stream, example, position, token)
        with torch.enable_grad():
            values = latents.values.detach().requires_grad_()
            written = context.sae.decode_scaled(latents.with_values(values))
            written = context.sae.unscaled(written, x)
            (slope,) = torch.autograd.grad(written, values, weight.to(written))
        attributed = (latents.values.detach() * slope).cpu().float()
        neurons = in_half(y * weight) if self.neurons else in_half(y[:, :0])
        return Batch(
            inputs.ids.cpu()[example.cpu()], position.cpu(), token.cpu(), logit.cpu(),
            Latents(
                latents.offsets.cpu(), latents.indices.cpu().int(), attributed, latents.d_sae
            ),
            neurons.cpu(),
        )  # fmt: skip

    def _keep(self, batch: Batch) -> None:
        """Keep the examples of a batch that there is room for; none after one that is left out."""
        rows = torch.arange(1, len(batch.position) + 1)
        row_bytes = ROW_BYTES + NEURON_BYTES * batch.neurons.shape[1]
        n_bytes = row_bytes * rows + ENTRY_BYTES * batch.latents.offsets[1:]
        ends = torch.ones(len(rows), dtype=torch.bool)  # Rows that are the last of an example.
        ends[:-1] = batch.example_id.diff() != 0
        fit = ends & (rows <= self.rows_left) & (n_bytes <= self.bytes_left)
        n = int(rows[fit].max()) if fit.any() else 0
        self.is_full = n < len(rows)
        if n:
            self.batches.append(batch.first(n))
            self.rows_left -= n
            self.bytes_left -= int(n_bytes[n - 1])

    def finish(self) -> Findings:
        """Category `attribution` with intervals, and the arrays of this module's head."""
        scalars = Scalars("attribution")
        n = sum(len(batch.position) for batch in self.batches)
        scalars.put("n_tokens", n)
        if not n:
            full = "the first example takes more than n_rows or eval.keep_gb allow; raise them"
            for name in RATIOS:
                scalars.null(name, "zero_denominator", full if self.is_full else NO_ROWS)
            return Findings(
                {"attribution": scalars.values}, notes=scalars.notes, left_out=self.is_full
            )
        batches, self.batches = self.batches, []
        columns = zip(*(batch[:4] for batch in batches), strict=True)
        example_id, position, next_token, logit = map(torch.cat, columns)
        latents = Latents.concatenate([batch.latents for batch in batches])
        sums = sums_of(example_id, logit, latents)
        scalars.put("n_latents", int((latents.fired > 0).sum()))
        for name, (above, below) in RATIOS.items():
            scalars.ratio(name, sums[above].sum(), sums[below].sum(), "no latent is active")
        known = {f"attribution.{name}": ratio_of(*columns) for name, columns in RATIOS.items()
                 if scalars.values[name] is not None}  # fmt: skip
        ci, notes = intervals(sums, known, n_resamples=self.n_bootstrap, seed=self.context.seed)
        if self.is_full:
            detail = "further examples are left out; raise n_rows, or eval.keep_gb, to have more"
            scalars.note("n_tokens", "too_few_examples", detail)
        arrays = {
            "example_id": example_id, "position": position.int(), "next_token": next_token.int(),
            "offsets": latents.offsets, "indices": latents.indices, "values": latents.values,
        }  # fmt: skip
        if self.neurons:
            arrays["neurons"] = torch.cat([batch.neurons for batch in batches])
        return Findings(
            {"attribution": scalars.values}, ci, [*scalars.notes, *notes],
            arrays={"attributions": arrays}, left_out=self.is_full,
        )  # fmt: skip


def sums_of(
    example_id: Int64[Tensor, " n"], logit: Float[Tensor, " n"], latents: Latents
) -> dict[str, npt.NDArray[np.float64]]:
    """What `RATIOS` are of, summed over the rows of each example."""
    clusters = ClusterSums(np.unique(example_id.numpy()), sorted({*sum(RATIOS.values(), ())}))
    clusters.add(example_id, rows=torch.ones_like(logit), logit=logit)
    of_entry, values = example_id[latents.rows], latents.values
    clusters.add(of_entry, direct=values, entries=torch.ones_like(values), positive=values > 0)
    return clusters.seen("rows")


def has_next(inputs: Inputs, n_tokens: int) -> Bool[Tensor, "n t"]:
    """Where a token and the one after it are no padding, on the CPU."""
    own = torch.ones(len(inputs), n_tokens, dtype=torch.bool)
    own = own if inputs.attended is None else inputs.attended.cpu()
    return own & torch.nn.functional.pad(own[:, 1:], (0, 1))


def in_half(x: Float[Tensor, "n d"]) -> Float16[Tensor, "n d"]:
    """In half precision, without the infinities that it makes of what is too large for it."""
    most = torch.finfo(torch.float16).max
    return x.clamp(-most, most).half()
