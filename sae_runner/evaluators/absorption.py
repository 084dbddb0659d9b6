"""Feature absorption: words whose first letter its own latent misses, and another one carries.

After Chanin et al. (2024) and SAEBench's `absorption`. Words are single tokens of the vocabulary,
each at the end of a prompt about first letters (`_first_letter`), 80% of them to train on. With x
the SAE's scaled input, d_j a decoder row (not at norm 1: f and d_j may trade a factor), and a probe
for each letter, of unit direction p̂, kept if its F1 on the test words is above 0.6:

    M     the latents that are the letter's feature (`_letter_probes.splits_of`)
    π_j = f_j · cos(p̂, d_j) · ‖d_j‖,   π = x · p̂,   main = Σ over M of π_j

over the test words of the letter that its probe finds, with π > 1e-6:

    full      no latent of M fires; the one of the largest π_j has cos ≥ 0.025 and π_j / π ≥ 0.4
    fraction  a = Σ of the ≤ 3 largest positive π_j outside M with cos ≥ 0.1; 0 if main ≥ π or
              a / π < 0.4; 1 if main ≤ 0; else α / (α + main), α = min(a, π − main)

Both are averaged over a letter's words, then over letters; `std_dev_*` is between letters (n − 1).
Fewer letters than `min_letters` are no measurement: the scores are null. What the score means is
established on language models of a billion parameters and more; on a smaller one it is refused
unless `force` asks for it.
"""

from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
from scipy import sparse

from sae_runner.config import NonNegative, Positive
from sae_runner.errors import ConfigError
from sae_runner.evaluators import EVALUATORS
from sae_runner.evaluators._first_letter import LETTERS, Words, prompts_for, shown, words_of
from sae_runner.evaluators._letter_probes import (
    N_EPOCHS,
    N_SPARSE_EPOCHS,
    SPARSE_L1,
    Splits,
    f1_of,
    fit_letters,
    splits_of,
)
from sae_runner.evaluators._numbers import Scalars
from sae_runner.evaluators.base import Columns, EvalContext, Evaluator, Findings, Setting
from sae_runner.log import Progress
from sae_runner.models._text import TakesPrompts

FEWEST_PARAMETERS = 10**9
TRAIN_SHARE, LEAST_F1, LEAST_TOTAL = 0.8, 0.6, 1e-6
FULL_COS, FRACTION_COS, LEAST_SHARE, N_ABSORBERS, SILENT = 0.025, 0.1, 0.4, 3, 1e-8
SCORES = {
    "full_absorption_score": "full",
    "absorption_fraction_score": "fraction",
    "num_split_features": "n_split",
}
Values = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]


class Seen(NamedTuple):
    """Words at the site."""

    x: Values
    latents: Any
    """[n, d_sae], CSR."""
    letter: Ints

    def some(self, rows: Ints) -> "Seen":
        """Some of the words."""
        return Seen(self.x[rows], self.latents[rows], self.letter[rows])


@EVALUATORS.register("absorption")
class Absorption(Evaluator):
    """First-letter features and what absorbs them.

    Args:
        n_words: tokens of the vocabulary, a seeded sample; None for all that are words.
        n_lines: lines before each word, fewer where the model reads no longer rows.
        min_letters: letters whose probe works, below which there is no score.
        batch_size: prompts at a time.
        force: also on a model of less than a billion parameters.
    """

    axis = "interpretability"
    sizes = ()

    def __init__(
        self,
        *,
        n_words: Positive | None,
        n_lines: NonNegative,
        min_letters: Positive,
        batch_size: Positive,
        force: bool,
    ) -> None:
        if min_letters > len(LETTERS):
            raise ConfigError(f"evaluators.absorption.min_letters={min_letters}: there are 26")
        self.n_words, self.n_lines, self.min_letters = n_words, n_lines, min_letters
        self.batch_size, self.force = batch_size, force

    def check(self, setting: Setting) -> None:
        """Refuse what goes on with no prompt, transcoders, and small models unless forced."""
        model = setting.shapes()
        if not isinstance(model, TakesPrompts) or model.output != "token_logits":
            raise ConfigError(
                "not applicable: it prompts a causal language model; use one, such as "
                "model=gemma_2_2b, or leave the evaluator out"
            )
        if setting.site.has_cls:
            raise ConfigError(
                "not applicable: an encoder goes on with no prompt; use a causal language model or "
                "leave the evaluator out"
            )
        if setting.target is not None:
            raise ConfigError("not applicable: a transcoder's latents do not make up its input")
        n = sum(p.numel() for p in model.parameters())
        if n < FEWEST_PARAMETERS and not self.force:
            raise ConfigError(
                f"force=false: the model has {n:,} parameters, and what the score means is known "
                "from a billion on; evaluators.absorption.force=true measures it all the same"
            )

    def start(self, context: EvalContext) -> None:
        """See `Evaluator.start`."""
        self.context = context

    def finish(self) -> Findings:
        """Category `absorption`, and table `letters`."""
        assert self.context.model is not None
        scalars, seed = Scalars("absorption"), self.context.seed
        model = self.context.model()
        assert isinstance(model, TakesPrompts)
        words = words_of(model, self.n_words, seed)
        scalars.put("n_words", len(words))
        if len(words) < 2 * len(LETTERS):
            detail = f"the vocabulary has {len(words)} words, at least {2 * len(LETTERS)}"
            return self._without_scores(scalars, [], detail)
        seen = self._see(words, model, scalars)
        order = np.random.default_rng(seed).permutation(len(words))
        n_train = int(TRAIN_SHARE * len(words))
        train, test = seen.some(order[:n_train]), seen.some(order[n_train:])
        rows = self._letters(train, test)
        working = [row for row in rows if row["probe_f1"] > LEAST_F1]
        scalars.put("mean_probe_f1", float(np.mean([row["probe_f1"] for row in rows])))
        scalars.put("n_letters", len(working))
        if len(working) < self.min_letters:
            detail = (
                f"{len(working)} letters whose probe has an F1 above {LEAST_F1} on the test words, "
                f"at least {self.min_letters}"
            )
            return self._without_scores(scalars, rows, detail)
        scored = [row for row in working if row["full"] is not None]
        if len(scored) < len(working):
            detail = f"{len(working) - len(scored)} letters left out: no test word or no latent"
            scalars.note("n_letters", "too_few_examples", detail)
        for name, column in SCORES.items():
            values = np.array([row[column] for row in scored], dtype=np.float64)
            scalars.ratio(f"mean_{name}", values.sum(), len(values), "no letter has a score")
            if len(values) > 1:
                scalars.put(f"std_dev_{name}", float(values.std(ddof=1)))
            else:
                scalars.null(f"std_dev_{name}", "too_few_examples", "fewer than two letters")
        return _findings(scalars, rows)

    def _without_scores(
        self, scalars: Scalars, rows: list[dict[str, Any]], detail: str
    ) -> Findings:
        for name in SCORES:
            for kind in ("mean", "std_dev"):
                scalars.null(f"{kind}_{name}", "too_few_examples", detail)
        return _findings(scalars, rows)

    def _see(self, words: Words, model: Any, scalars: Scalars) -> Seen:
        """Run the model on a prompt for each word."""
        assert self.context.setting is not None
        context, site = self.context, self.context.setting.site.name
        prompts, n_lines = prompts_for(words, model, self.n_lines, context.seed)
        scalars.put("n_lines", n_lines)
        if n_lines < min(self.n_lines, len(words) - 1):
            detail = f"{n_lines} lines instead of {self.n_lines} before a word: a row has "
            scalars.note("n_lines", "not_applicable", f"{detail}{model.context} tokens at most")
        x, latents = [], []
        with Progress("absorption", len(words), "words") as progress:
            context.spent["full_forwards"] += len(prompts)
            for part in shown(prompts, model, context.sae, site, self.batch_size):
                context.spent["sae_encodes"] += len(part.x)
                x.append(part.x.detach().cpu().double().numpy())
                values = part.latents.values.detach().cpu().double().numpy()
                where = (part.latents.indices.cpu().numpy(), part.latents.offsets.cpu().numpy())
                shape = (len(part.x), part.latents.d_sae)
                latents.append(sparse.csr_array((values, *where), shape=shape))
                progress.advance(len(part.x))
        return Seen(np.concatenate(x), sparse.vstack(latents, format="csr"), words.letter)

    def _letters(self, train: Seen, test: Seen) -> list[dict[str, Any]]:
        """What is found for each letter that both splits have."""
        seed = self.context.seed
        probes = fit_letters(train.x, train.letter, n_epochs=N_EPOCHS, l1=0.0, seed=seed)
        fired = np.unique(train.latents.indices)
        few = fit_letters(
            train.latents[:, fired], train.letter, n_epochs=N_SPARSE_EPOCHS, l1=SPARSE_L1, seed=seed
        )
        scores = probes.scores(test.x)
        decoder = self.context.sae.W_dec.detach().cpu().double().numpy()
        rows = []
        for i, letter in enumerate(LETTERS):
            y, y_test = train.letter == i, test.letter == i
            if not y.any() or y.all() or not y_test.any():
                continue
            f1 = f1_of(scores[:, i] > 0, y_test)
            row: dict[str, Any] = {
                "letter": letter, "n_train": int(y.sum()), "n_test": int(y_test.sum()),
                "probe_f1": f1, "n_split": None, "split_latents": [], "sparse_f1": [],
                "n_true_positives": None, "n_skipped": None, "full": None, "fraction": None,
            }  # fmt: skip
            if f1 > LEAST_F1:
                found = splits_of(few.w[i], train.latents[:, fired], y, test.latents[:, fired],
                                  y_test)  # fmt: skip
                splits = Splits(fired[found.latents].astype(np.int64), found.f1)
                hits = test.some((y_test & (scores[:, i] > 0)).nonzero()[0])
                row |= _scores(hits, probes.w[i], decoder, splits)
            rows.append(row)
        return rows


def _findings(scalars: Scalars, rows: list[dict[str, Any]]) -> Findings:
    tables: dict[str, Columns] = {}
    if rows:
        tables["letters"] = {name: [row[name] for row in rows] for name in rows[0]}
    return Findings({"absorption": scalars.values}, notes=scalars.notes, tables=tables)


def _scores(hits: Seen, probe: Values, decoder: Values, splits: Splits) -> dict[str, Any]:
    """Means over the words that a letter's probe finds; None where there is none."""
    unit = probe / np.linalg.norm(probe)
    along = decoder @ unit
    norms = np.linalg.norm(decoder, axis=1)
    cosines = np.divide(along, norms, out=np.zeros_like(along), where=norms > 0)
    full, fraction = [], []
    for word, total in enumerate((hits.x @ unit).tolist()):
        if total <= LEAST_TOTAL:
            continue
        begin, end = hits.latents.indptr[word : word + 2]
        latent, f = hits.latents.indices[begin:end], hits.latents.data[begin:end]
        share = f * along[latent]
        of_split = np.isin(latent, splits.latents)
        full.append(is_full(f, share, cosines[latent], of_split, total))
        absorbing = absorbers(share, cosines[latent], of_split)
        fraction.append(absorbed(total, float(share[of_split].sum()), absorbing))
    has_score = bool(full) and len(splits.latents) > 0
    return {
        "n_split": len(splits.latents), "split_latents": splits.latents.tolist(),
        "sparse_f1": splits.f1, "n_true_positives": len(full),
        "n_skipped": len(hits.letter) - len(full),
        "full": float(np.mean(full)) if has_score else None,
        "fraction": float(np.mean(fraction)) if has_score else None,
    }  # fmt: skip


def is_full(
    f: Values, share: Values, cosines: Values, of_split: npt.NDArray[np.bool_], total: float
) -> bool:
    """Whether the letter's latents are silent and another one carries its direction instead."""
    if not len(f) or (f[of_split] >= SILENT).any():
        return False
    top = int(share.argmax())
    return bool(cosines[top] >= FULL_COS and share[top] / total >= LEAST_SHARE)


def absorbers(share: Values, cosines: Values, of_split: npt.NDArray[np.bool_]) -> float:
    """What the strongest latents beside the letter's own carry of its direction."""
    able = ~of_split & (cosines >= FRACTION_COS) & (share > 0)
    return float(np.sort(share[able])[::-1][:N_ABSORBERS].sum())


def absorbed(total: float, main: float, absorbing: float) -> float:
    """Which fraction of the letter's direction is in absorbers instead of its own latents."""
    if main >= total or absorbing / total < LEAST_SHARE:
        return 0.0
    if main <= 0:
        return 1.0
    alpha = min(absorbing, total - main)
    return alpha / (alpha + main)
