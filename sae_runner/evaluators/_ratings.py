"""Scores and agreement of raters, by where items are from."""

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from sae_runner.evaluators._numbers import Scalars
from sae_runner.evaluators._rater_agreement import (
    interval_alpha,
    mann_whitney,
    weighted_kappa,
)
from sae_runner.evaluators._responses import SCORES, Response
from sae_runner.evaluators.base import Findings

LATENT = "latent"
CONTROLS = ("neuron", "direction", "untrained")
NO_RESPONSES = (
    "no responses yet: raters open pack.html; then give what they save as "
    "evaluators.human.responses=PATH"
)


class Origin(NamedTuple):
    """Where an item is from: what the pack does not say."""

    source: str
    id: int
    quartile: int
    """Of log frequency, from 0; -1 for what is no latent."""


class Ratings:
    """What raters say of items whose origin is known.

    Args:
        responses: of the pack's items; none as long as nobody has rated.
        origins: where each item is from.
        total_of: the scores that make up the total.
        n_bootstrap: resamples of the items.
        seed: of the resamples.
    """

    def __init__(
        self,
        responses: Sequence[Response],
        origins: "Mapping[str, Origin]",
        total_of: Sequence[str],
        n_bootstrap: int,
        seed: int,
    ) -> None:
        self.origins, self.total_of = origins, list(total_of)
        self.fields = [*total_of, "interpretable"]
        self.first = [r for r in responses if not r.repeat]
        self.again = [r for r in responses if r.repeat]
        self.n_bootstrap, self.seed = n_bootstrap, seed
        self.scalars = Scalars("human")
        self.ci: dict[str, dict[str, float | int]] = {}

    def score(self, response: Response, name: str) -> int | None:
        """One score of a response, or its total."""
        return response.total(self.total_of) if name == "total" else response.scores[name]

    def by_item(self, name: str, source: str | None = None) -> dict[str, list[int]]:
        """All raters' scores of each item, repeats aside."""
        found: dict[str, list[int]] = {}
        for response in self.first:
            score = self.score(response, name)
            if score is not None and source in (None, self.origins[response.item].source):
                found.setdefault(response.item, []).append(score)
        return found

    def item_scores(self, name: str, source: str) -> list[float]:
        """The median over raters of each item of a source."""
        return [float(np.median(v)) for v in self.by_item(name, source).values()]

    def findings(self) -> Findings:
        """Category `human`; the tables `items` and `responses` only when somebody has rated."""
        put = self.scalars.put
        put("n_items", len(self.origins))
        put("n_responses", len(self.first) + len(self.again))
        put("n_raters", len({r.rater for r in self.first}))
        put("total_max", sum(SCORES[name] for name in self.total_of))
        sources = [s for s in (LATENT, *CONTROLS) if s in {o.source for o in self.origins.values()}]
        for source in sources:
            self._of_source(source)
        for source in sources[1:]:
            self._against(source)
        self._agreement()
        self._repeats()
        tables: dict[str, Any] = {}
        if self.first:
            tables = {"items": self._items(), "responses": self._responses()}
        return Findings({"human": self.scalars.values}, self.ci, self.scalars.notes, tables=tables)

    def _null(self, name: str, otherwise: str, code: str = "too_few_examples") -> None:
        if self.first:
            self.scalars.null(name, code, otherwise)
        else:
            self.scalars.null(name, "not_applicable", NO_RESPONSES)

    def _of_source(self, source: str) -> None:
        suffix = "" if source == LATENT else f"_{source}"
        totals = self.item_scores("total", source)
        self.scalars.put(f"n_rated{suffix}", len(totals))
        for name, statistic in (("total_median", np.median), ("total_mean", np.mean)):
            self._statistic(f"{name}{suffix}", totals, statistic)
        for name in self.fields:
            key = "interpretable_frac" if name == "interpretable" else f"{name}_mean"
            self._statistic(f"{key}{suffix}", self.item_scores(name, source), np.mean)

    def _statistic(self, name: str, scores: Sequence[float], statistic: Any) -> None:
        """A statistic over items, with its interval over resamples of them."""
        if not scores:
            return self._null(name, "no item of this kind was rated")
        self.scalars.put(name, float(statistic(scores)))
        if self.n_bootstrap and len(scores) > 1:
            generator = np.random.default_rng(self.seed)
            drawn = generator.integers(0, len(scores), (self.n_bootstrap, len(scores)))
            values = statistic(np.asarray(scores)[drawn], axis=1)
            low, high = np.quantile(values, [0.025, 0.975])
            self.ci[f"human.{name}"] = {
                "se": float(values.std(ddof=1)), "lo": float(low), "hi": float(high),
                "n": len(scores),
            }  # fmt: skip

    def _against(self, source: str) -> None:
        """Latents' totals against a control's."""
        found = mann_whitney(self.item_scores("total", LATENT), self.item_scores("total", source))
        for i, name in enumerate(("u", "p", "superiority")):
            if found is None:
                self._null(f"{name}_{source}", "nothing rated on one side, or all totals equal")
            else:
                self.scalars.put(f"{name}_{source}", found[i])

    def _agreement(self) -> None:
        """α of every score and of the total, κ where there are two raters."""
        raters = sorted({r.rater for r in self.first})
        levels = {**{f: SCORES[f] + 1 for f in self.fields},
                  "total": sum(SCORES[f] for f in self.total_of) + 1}  # fmt: skip
        for name in ("total", *self.fields):
            alpha = interval_alpha(list(self.by_item(name).values()))
            if alpha is None:
                self._null(f"alpha_{name}", "no item has two raters, or nothing varies",
                           "zero_denominator")  # fmt: skip
            else:
                self.scalars.put(f"alpha_{name}", alpha)
            kappa = self._kappa(name, raters, levels[name]) if len(raters) == 2 else None
            if kappa is None:
                code = "zero_denominator" if len(raters) == 2 else "not_applicable"
                detail = "not two raters, no item that both rated, or nothing varies"
                self._null(f"kappa_{name}", detail, code)
            else:
                self.scalars.put(f"kappa_{name}", kappa)

    def _kappa(self, name: str, raters: Sequence[str], n_levels: int) -> float | None:
        scores: list[dict[str, int]] = [{}, {}]
        for response in self.first:
            score = self.score(response, name)
            if score is not None:
                scores[raters.index(response.rater)][response.item] = score
        both = sorted(scores[0].keys() & scores[1].keys())
        return weighted_kappa(
            [scores[0][item] for item in both], [scores[1][item] for item in both], n_levels
        )

    def _repeats(self) -> None:
        """What a rater says of an item that comes twice."""
        before = {(r.rater, r.item): r for r in self.first}
        apart = []
        for response in self.again:
            first = before.get((response.rater, response.item))
            scores = [self.score(r, "total") for r in (first, response) if r is not None]
            if len(scores) == 2 and scores[0] is not None and scores[1] is not None:
                apart.append(abs(scores[0] - scores[1]))
        self.scalars.put("n_repeats", len(apart))
        for name, value in (("repeat_exact", [float(v == 0) for v in apart]),
                            ("repeat_mean_abs_diff", apart)):  # fmt: skip
            if value:
                self.scalars.put(name, float(np.mean(value)))
            else:
                self._null(name, "no item was rated twice by one rater")

    def _items(self) -> dict[str, Any]:
        """Unblinded: where each item is from, and what it got."""
        items = sorted(self.origins)
        columns: dict[str, Any] = {"item": items}
        for key in ("source", "id", "quartile"):
            columns[key] = [getattr(self.origins[item], key) for item in items]
        for name in ("total", *self.fields):
            scores = self.by_item(name)
            columns[name] = [float(np.median(scores[i])) if i in scores else None for i in items]
        counts = Counter(response.item for response in self.first)
        columns["n_ratings"] = [counts[item] for item in items]
        return columns

    def _responses(self) -> dict[str, Any]:
        """Every response, as it was given, with what it is of."""
        responses = [*self.first, *self.again]
        columns: dict[str, Any] = {
            name: [getattr(r, name) for r in responses]
            for name in ("rater", "item", "repeat", "interpretation", "seconds")
        }
        columns["source"] = [self.origins[r.item].source for r in responses]
        columns["id"] = [self.origins[r.item].id for r in responses]
        return columns | {name: [r.scores[name] for r in responses] for name in SCORES}
