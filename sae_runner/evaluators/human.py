"""What people make of latents: a blinded pack to rate, and the scores once raters hand it back.

Rubric (Bricken et al. 2023): confidence 0–3, activation consistency 0–5, consistency with the
outputs that are promoted 0–3 (left out where the model's outputs have no names), specificity 0–3;
their sum is the total, at most `total_max`: 14, or 11. `interpretable` (0 or 1) stands apart.

The pack holds latents, as many from each quartile of log frequency, and controls: neurons, random
directions, latents of the same SAE before training. Each item shows up to `per_interval` examples
of each of `n_intervals` equal intervals of its activation. What is what is not in the pack; it is
worked out anew when `responses` are given, and stands in the table `items` from then on.

An item's score is the median over its raters, repeats aside. Metrics without a suffix are of
latents; others end in the source. `superiority_*`: share of pairs (latent, control) in which the
latent's total is higher, ties by half; `u_*` and `p_*` Mann–Whitney's. Intervals resample items.
"""

import hashlib
import logging
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sae_runner.config import Fraction, NonNegative, Positive
from sae_runner.errors import ConfigError
from sae_runner.evaluators import EVALUATORS
from sae_runner.evaluators._activating import strata
from sae_runner.evaluators._bootstrap import checked_resamples
from sae_runner.evaluators._codes import Codes
from sae_runner.evaluators._controls import Control, Controls, by_frequency
from sae_runner.evaluators._given_files import given_files
from sae_runner.evaluators._pack import Pack, Pictures, item_id, plan
from sae_runner.evaluators._promoted import Outputs, names_of
from sae_runner.evaluators._ratings import Origin, Ratings
from sae_runner.evaluators._responses import SCORES, TOTAL, read_responses
from sae_runner.evaluators._showing import ImageView, Showing, TextWindow
from sae_runner.evaluators.base import EvalContext, Evaluator, Findings, Rows, Setting
from sae_runner.models._text import ReadsTokens

log = logging.getLogger("sae_runner")
N_LABELS, N_PROMPTED = 9, 4
"""Outputs that are named, and examples that they are measured on."""


@EVALUATORS.register("human")
class Human(Evaluator):
    """A pack for raters, and what they say.

    Args:
        n_latents: latents of the SAE in the pack.
        n_neurons: coordinates of the site.
        n_directions: random directions.
        n_untrained: latents of the SAE before training.
        n_intervals: equal intervals between 0 and an item's maximum.
        per_interval: examples shown of each, at most.
        radius: tokens on each side of the strongest, of a text.
        image_size: pixels of an image's longer side, at most.
        n_raters: how many raters there are.
        shared: share of the items that all of them rate; the rest is dealt out.
        repeated: share of a rater's items that come twice.
        n_bootstrap: resamples of the items; 0 for no intervals.
        responses: files of raters, or globs of these.
    """

    axis = "interpretability"
    keeps_codes = True

    def __init__(
        self,
        *,
        n_latents: Positive,
        n_neurons: NonNegative,
        n_directions: NonNegative,
        n_untrained: NonNegative,
        n_intervals: Positive,
        per_interval: Positive,
        radius: NonNegative,
        image_size: Positive,
        n_raters: Positive,
        shared: Fraction,
        repeated: Fraction,
        n_bootstrap: NonNegative,
        responses: list[str] | str | None,
    ) -> None:
        self.n_latents = n_latents
        self.controls_of: dict[str, Any] = {
            "n_neurons": n_neurons, "n_directions": n_directions, "n_untrained": n_untrained
        }  # fmt: skip
        self.n_intervals, self.per_interval = n_intervals, per_interval
        self.radius, self.image_size = radius, image_size
        self.n_raters, self.shared, self.repeated = n_raters, shared, repeated
        self.n_bootstrap = checked_resamples(n_bootstrap, "human")
        self.wanted = [responses] if isinstance(responses, str) else list(responses or [])

    def check(self, setting: Setting) -> None:
        """See `Evaluator.check`: a person must be able to look at the data; files must be sound."""
        modality = setting.dataset.modality
        if modality == "rows":
            raise ConfigError(
                f"not applicable: dataset {setting.dataset.name!r} holds rows of numbers; use one "
                "of images or texts, or leave the evaluator out"
            )
        if modality != "image" and not isinstance(setting.shapes(), ReadsTokens):
            raise ConfigError("not applicable: the model's tokens are no pieces of text")
        read_responses(given_files("responses", self.wanted))

    def reads(self) -> dict[str, str]:
        """The response files' hashes."""
        return {
            path.name: hashlib.sha256(path.read_bytes()).hexdigest()
            for path in given_files("responses", self.wanted)
        }

    def start(self, context: EvalContext) -> None:
        """See `Evaluator.start`.

        Raises:
            ConfigError: responses to another pack than the one that is there.
        """
        self.context = context
        self.responses = read_responses(given_files("responses", self.wanted))
        folder = context.folder or Path()
        items = folder / "items.jsonl"
        if not self.responses and (folder / "items.parquet").is_file():
            log.warning("human: scores that are there are dropped, as no responses are given")
        if self.responses and items.is_file():
            first = items.read_text("utf-8")[: 2 * len('{"pack": ""') + 64]
            if f'"{self.responses[0].pack}"' not in first:
                self._refuse(items, "; if another has taken its place, make it again first")
        self.controls = Controls(context, **self.controls_of)

    def _refuse(self, where: object, hint: str = "") -> None:
        given = self.responses[0].pack
        raise ConfigError(
            f"responses={self.wanted[0]}: they are of pack {given}, not of {where}; use the "
            f"options and the eval sizes that the pack was made with{hint}"
        )

    def update(self, rows: Rows) -> None:
        """Follow the controls."""
        self.controls.update(rows)

    def finish(self) -> Findings:
        """The pack, and where responses are given, category `human`.

        Raises:
            ConfigError: responses to another pack, or to what is no item of it.
        """
        context = self.context
        assert context.codes and context.dataset and context.model and context.setting
        codes, (controls, beside) = context.codes(), self.controls.finish()
        site = context.setting.spliced_site
        pictures = Pictures(self.image_size)
        outputs = Outputs(context.model(), context.dataset(), site)
        items, origins = [], {}
        for origin, found, column, direction in self._units(codes, controls, beside):
            showing = Showing(found, context.dataset(), context.model(), site)
            name = item_id(context.seed, origin.source, origin.id)
            item = self._item(showing, column, direction, pictures, outputs)
            items.append({"item": name, **item})
            origins[name] = origin
        fields = [f for f in SCORES if f != "logit_consistency" or outputs.name is not None]
        sources = {name: origin.source for name, origin in origins.items()}
        turns = plan(sources, self.n_raters, self.shared, self.repeated, context.seed)
        kind = "image" if context.setting.dataset.modality == "image" else "text"
        pack = Pack.of(kind, fields, items, turns, pictures.data)
        if self.responses and {r.pack for r in self.responses} != {pack.id}:
            self._refuse(f"pack {pack.id}")
        if unknown := sorted({r.item for r in self.responses} - origins.keys()):
            raise ConfigError(
                f"responses={self.wanted[0]}: {unknown[0]} is no item of their pack {pack.id}; was "
                "the file changed?"
            )
        total = [name for name in TOTAL if name in fields]
        ratings = Ratings(self.responses, origins, total, self.n_bootstrap, context.seed)
        findings = ratings.findings()
        findings.texts = {"pack.html": pack.page(), "items.jsonl": pack.lines()}
        return findings

    def _units(
        self, codes: Codes, controls: Sequence[Control], beside: Codes
    ) -> Iterator[tuple[Origin, Codes, int, Tensor]]:
        """What is rated: where it is from, its activations and the column that holds them."""
        fired = codes.n_examples_fired.numpy()
        alive, n_fired = np.flatnonzero(fired), codes.n_fired.numpy()
        edges = np.quantile(n_fired[alive], (0.25, 0.5, 0.75)) if len(alive) else np.zeros(3)
        rows = self.context.sae.W_dec.detach().cpu()
        for j in by_frequency(alive, n_fired, self.n_latents, self.context.seed).tolist():
            quartile = int(np.searchsorted(edges, n_fired[j], side="left"))
            yield Origin("latent", j, quartile), codes, j, rows[j]
        fired = beside.n_examples_fired.numpy() if len(beside) else np.zeros(len(controls))
        for i, control in enumerate(controls):
            if fired[i]:  # One that is never active has nothing to show.
                yield Origin(control.source, control.id, -1), beside, i, control.direction

    def _item(
        self, showing: Showing, column: int, direction: Tensor, pictures: Pictures, outputs: Outputs
    ) -> dict[str, Any]:
        """What a rater sees of a unit: the strongest interval first."""
        n, codes = self.n_intervals, showing.codes
        chosen = strata(
            codes, column, column + 1, n_intervals=n, per_interval=self.per_interval,
            seed=self.context.seed,
        )  # fmt: skip
        places = [(b, k) for b in reversed(range(n)) for k in range(self.per_interval)
                  if chosen.slot[0, b, k] >= 0]  # fmt: skip
        slots = [int(chosen.slot[0, b, k]) for b, k in places]
        positions = [int(chosen.position[0, b, k]) for b, k in places]
        amounts = [float(chosen.value[0, b, k]) for b, k in places]
        largest = float(codes.firing(column).value.max())
        shown: list[dict[str, Any]]
        if self.context.setting and self.context.setting.dataset.modality == "image":
            views = showing.images(column, slots)
            shown = [image_example(view, largest, pictures) for view in views]
        else:
            windows = showing.texts(column, slots, positions, self.radius)
            shown = [text_example(w, p, largest) for w, p in zip(windows, positions, strict=True)]
        intervals: dict[int, list[dict[str, Any]]] = {}
        for (b, _), example in zip(places, shown, strict=True):
            intervals.setdefault(b, []).append(example)
        item: dict[str, Any] = {
            "intervals": [
                {"low": round(100 * b / n), "high": round(100 * (b + 1) / n), "examples": examples}
                for b, examples in intervals.items()
            ]
        }
        if outputs.name is not None:
            inputs = showing.model.prepare(showing.load(slots[:N_PROMPTED]))
            item["labels"] = names_of(
                outputs.promoted(
                    inputs, torch.tensor(positions[:N_PROMPTED]), direction,
                    torch.tensor(amounts[:N_PROMPTED]), N_LABELS,
                )
            )  # fmt: skip
        return item


def text_example(window: TextWindow, position: int, largest: float) -> dict[str, Any]:
    """Pieces of text, each with its share of the unit's largest activation (255)."""
    peak = position - window.begin
    return {
        "example": window.example_id,
        "pieces": window.pieces,
        "acts": shares(window.acts, largest),
        "peak": peak if 0 <= peak < len(window.pieces) else None,
    }


def image_example(view: ImageView, largest: float, pictures: Pictures) -> dict[str, Any]:
    """A picture, and where in it the unit is active, if its rows are patches."""
    shown: dict[str, Any] = {
        "example": view.example_id, "image": pictures.place(view.example_id, view.image)
    }  # fmt: skip
    if view.heat is not None:
        shown |= {"heat": shares(view.heat.flatten(), largest), "grid": list(view.heat.shape)}
    return shown


def shares(acts: Tensor, largest: float) -> list[int]:
    """Activations as bytes, 255 for the largest; whoever sees them cannot tell their unit."""
    found: list[int] = (255 * acts.clamp_min(0) / largest).round().clamp(0, 255).int().tolist()
    return found
