"""Examples that show what each latent is active on: the strongest, some of every strength, none.

Array groups, each a safetensors file; a row is a latent, `id` is an example's id in the dataset,
`position` the token where it is strongest (class and register tokens counted). Slots that no
example fills hold id -1, act 0 and position -1, and `count` says how many are filled.

    topk     id, act, position [F, k]; count [F]; the strongest example first, one entry an example
    strata   id, act, position [F, n_intervals, per_interval]; count [F, n_intervals];
             evenly drawn from equal intervals of (0, max]; silent [F, per_interval]: ids of
             examples in which the latent is active nowhere
    hist     counts [F, 64] of the rows' activations above 0, log-spaced edges [65]; n_zero [F]

With `heat` the groups have `heat` [..., P] too, bytes from 0 to 255 = the slot's largest
activation, which is `heat_scale` [...]: of the patches (row by row) of an image; of a text of the
tokens from `radius` before `position` to `radius` after.
"""

import math
from typing import Any, Literal

import torch
from jaxtyping import Int64
from torch import Tensor

from sae_runner.config import NonNegative, Positive
from sae_runner.evaluators import EVALUATORS
from sae_runner.evaluators._activating import Chosen, chunks, silent, strata, top
from sae_runner.evaluators._codes import Codes
from sae_runner.evaluators._numbers import Scalars
from sae_runner.evaluators._showing import grid_of
from sae_runner.evaluators.base import EvalContext, Evaluator, Findings

N_BINS = 64
Arrays = dict[str, Tensor]


@EVALUATORS.register("top_examples")
class TopExamples(Evaluator):
    """Top examples, examples over intervals of activation, and silent ones, of every latent.

    Args:
        k: strongest examples of a latent.
        n_intervals: equal intervals between 0 and a latent's maximum.
        per_interval: examples drawn from each, and silent ones.
        heat: which groups have activations around the peak: none, those of the top examples, all.
        radius: tokens on each side of the peak, of a text.
    """

    axis = "interpretability"
    keeps_codes = True

    def __init__(
        self,
        *,
        k: Positive,
        n_intervals: Positive,
        per_interval: NonNegative,
        heat: Literal["none", "top", "all"],
        radius: NonNegative,
    ) -> None:
        self.k, self.n_intervals, self.per_interval = k, n_intervals, per_interval
        self.heat, self.radius = heat, radius

    def start(self, context: EvalContext) -> None:
        """Only the codes are needed."""
        self.context = context

    def finish(self) -> Findings:
        """Category `top_examples`, the table `top` and the arrays of this module's head."""
        assert self.context.codes is not None
        codes = self.context.codes()
        scalars = Scalars("top_examples")
        scalars.put("n_examples", codes.n_examples)
        parts = [self._of(codes, begin, end) for begin, end in chunks(codes)]
        if not parts:  # Not one row.
            return Findings({"top_examples": scalars.values})
        groups: dict[str, Arrays] = {
            group: {name: torch.cat([part[group][name] for part in parts]) for name in arrays}
            for group, arrays in parts[0].items()
        }
        groups["hist"] = histograms(codes)
        counts = groups["topk"]["count"]
        scalars.put("n_alive", int((counts > 0).sum()))
        scalars.put("n_full", int((counts == self.k).sum()))
        if codes.n_left_out:
            detail = (
                f"{codes.n_left_out} examples were left out, drawn by hash; raise eval.keep_gb to "
                "see all"
            )
            scalars.note("n_examples", "too_few_examples", detail)
        return Findings(
            {"top_examples": scalars.values},
            notes=scalars.notes,
            per_latent={"n_examples_fired": codes.n_examples_fired.numpy()},
            tables={"top": table(groups["topk"])},
            arrays={**groups},
        )

    def _of(self, codes: Codes, begin: int, end: int) -> dict[str, Arrays]:
        """The groups `topk` and `strata` of some latents."""
        seed, r = self.context.seed, self.per_interval
        best = top(codes, begin, end, self.k)
        drawn = strata(codes, begin, end, n_intervals=self.n_intervals, per_interval=r, seed=seed)
        none = silent(codes, begin, end, r, seed)
        found = {"topk": arrays_of(codes, best), "strata": arrays_of(codes, drawn)}
        found["strata"]["silent"] = ids_of(codes, none)
        shown = {"none": {}, "top": {"topk": best}, "all": {"topk": best, "strata": drawn}}
        for group, chosen in shown[self.heat].items():
            if heat := self._heat(codes, begin, end, chosen):
                found[group] |= heat
        return found

    def _heat(self, codes: Codes, begin: int, end: int, chosen: Chosen) -> Arrays:
        """`heat` and `heat_scale` of what was chosen; nothing where a row is a whole example."""
        setting = self.context.setting
        if setting is None or setting.selection.tokens in ("cls", "mean", "last"):
            return {}
        grid = grid_of(setting.site)
        if grid is not None:
            first = torch.full_like(chosen.position, setting.site.n_prefix)
            return heat_of(codes, begin, end, chosen, first, grid[0] * grid[1])
        if setting.dataset.modality in ("text", "tokens"):
            first = chosen.position - self.radius
            return heat_of(codes, begin, end, chosen, first, 2 * self.radius + 1)
        return {}


def ids_of(codes: Codes, slots: Int64[Tensor, "*shape"]) -> Int64[Tensor, "*shape"]:
    """Ids of examples by their numbers in the codes; -1 stays."""
    ids = torch.cat([codes.example_ids, torch.tensor([-1])])
    return ids[slots]  # The last one is what -1 means.


def arrays_of(codes: Codes, chosen: Chosen) -> Arrays:
    """What was chosen, as it is written."""
    return {
        "id": ids_of(codes, chosen.slot),
        "act": chosen.value,
        "position": chosen.position.int(),
        "count": (chosen.slot >= 0).sum(-1).int(),
    }


def table(topk: Arrays) -> dict[str, Any]:
    """The filled slots of the top examples, one a row: feature, rank, example, position, value."""
    feature, rank = (topk["id"] >= 0).nonzero(as_tuple=True)
    columns = {"example": "id", "position": "position", "value": "act"}
    found = {name: topk[source][feature, rank].numpy() for name, source in columns.items()}
    return {"feature": feature.numpy(), "rank": rank.numpy(), **found}


def heat_of(
    codes: Codes,
    begin: int,
    end: int,
    chosen: Chosen,
    first: Int64[Tensor, "n *places"],
    width: int,
) -> Arrays:
    """Activations at `width` positions of each chosen example, from position `first` on."""
    latent, row, value = codes.firing_between(begin, end)
    heat = torch.zeros((chosen.slot.numel(), width), dtype=torch.uint8)
    filled = (chosen.slot >= 0).flatten()
    slot, peak = chosen.slot.flatten()[filled], chosen.value.flatten()[filled]
    own = torch.arange(begin, end).view(-1, *[1] * (chosen.slot.ndim - 1)).expand_as(chosen.slot)
    base = own.flatten()[filled] * len(codes)
    keys = latent * len(codes) + row
    low = torch.searchsorted(keys, base + codes.example_offsets[slot])
    counts = torch.searchsorted(keys, base + codes.example_offsets[slot + 1]) - low
    place = torch.arange(len(slot)).repeat_interleave(counts)
    within = torch.arange(int(counts.sum())) - (counts.cumsum(0) - counts).repeat_interleave(counts)
    entry = low[place] + within
    column = codes.position[row[entry]] - first.flatten()[filled][place]
    seen = (column >= 0) & (column < width)
    share = (value[entry] / peak[place]).clamp(0, 1)
    where = filled.nonzero().squeeze(1)[place[seen]]
    heat[where, column[seen]] = (255 * share[seen]).round().to(torch.uint8)
    shape = (*chosen.slot.shape, width)
    return {"heat": heat.view(shape), "heat_scale": chosen.value.clone()}


def histograms(codes: Codes) -> Arrays:
    """Of each latent's activations above 0, over rows, in bins that all latents share."""
    above = codes.values[codes.values > 0].double()
    low, high = (float(above.min()), float(above.max())) if len(above) else (1.0, 1.0)
    edges = torch.logspace(math.log10(low), math.log10(high), N_BINS + 1, dtype=torch.float64)
    counts = torch.zeros(codes.d_sae * N_BINS, dtype=torch.int32)
    n_above = torch.zeros(codes.d_sae, dtype=torch.int64)
    for begin, end in chunks(codes):
        latent, _, value = codes.firing_between(begin, end)
        latent, value = latent[value > 0], value[value > 0]
        bins = torch.bucketize(value.double(), edges[1:-1], right=True)
        counts.index_add_(0, latent * N_BINS + bins, torch.ones(len(bins), dtype=torch.int32))
        n_above.index_add_(0, latent, torch.ones_like(latent))
    return {
        "counts": counts.view(codes.d_sae, N_BINS),
        "edges": edges.float(),
        "n_zero": len(codes) - n_above,
    }
