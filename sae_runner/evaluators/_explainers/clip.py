"""Words of a vocabulary as explanations of image latents, by a text tower beside the images.

With v_i the unit embedding of image i by the model as it is, v̄ the mean of them over a sample of
the data, and t_c the unit embedding of concept c (the mean over the sentences that stand for it):

    w = Σ_i∈E1 a_i (v_i − v̄)          where the images that a latent is active on lie
    explanation: the concepts with the greatest cos(w, t_c)
    ŝ_i = max over them of (v_i − v̄)·t_c      its sign: more like the concept than the mean image

`centre` takes the mean over the vocabulary from every t_c first, and normalises again: texts lie in
a narrow cone, apart from the images. v̄ moves ŝ of a concept by a constant, which changes no rank.

The model whose latents these are embeds images and words itself, and so judges its own latents;
with a `judge`, another CLIP's embeddings predict, and the host's only explain.
"""

from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import normalize

from sae_runner import files
from sae_runner.config import Positive
from sae_runner.errors import ConfigError
from sae_runner.evaluators._activating import LATENTS, uniform
from sae_runner.evaluators._explainers import EXPLAINERS
from sae_runner.evaluators._explainers._judge import build_judge, hash_of_weights, judge_options
from sae_runner.evaluators._explainers.base import (
    Case,
    Encode,
    Explainer,
    Explanation,
    Verdict,
)
from sae_runner.evaluators._showing import Showing
from sae_runner.evaluators.base import EvalContext, Note, Setting
from sae_runner.log import Progress
from sae_runner.models._text import TextTower
from sae_runner.models.base import Model

AT_ONCE = 256


@EXPLAINERS.register("clip")
class Clip(Explainer):
    """Concepts of a vocabulary that the images of a latent are like.

    Args:
        vocabulary: file with one concept a line; None for the names of the dataset's classes.
        templates: sentences that stand for a concept, with {} for it; None for the model's own.
        centre: take the mean text from each concept.
        n_concepts: how many best concepts explain a latent together.
        n_reference: images whose mean embedding is v̄.
        judge: the CLIP that predicts: a `model` preset by its name, or that with options of its
            own, {preset: clip_vit_b16, weights: FILE}; None for the host itself.
    """

    modality = "image"

    def __init__(
        self,
        *,
        vocabulary: str | None,
        templates: list[str] | None,
        centre: bool,
        n_concepts: Positive,
        n_reference: Positive,
        judge: Any,
    ) -> None:
        self.vocabulary, self.templates, self.centre = vocabulary, templates, centre
        self.n_concepts, self.n_reference = n_concepts, n_reference
        self.judge = None if judge is None else judge_options(judge)

    def check(self, setting: Setting) -> None:
        """See `Explainer.check`."""
        if not isinstance(setting.shapes(), TextTower):
            raise ConfigError(
                "this model has no text tower beside its images: use a CLIP model, or for text "
                "evaluators=[autointerp]"
            )
        n = len(self._vocabulary(setting))
        if n < max(2, self.n_concepts):
            raise ConfigError(f"backend.vocabulary={self.vocabulary}: {n} concepts are too few")
        if self.judge is not None:
            build_judge(self.judge, torch.device("cpu"), meta=True)

    def reads(self) -> dict[str, str]:
        """Hashes of the vocabulary, and of the judge's weights where they are here."""
        found = {}
        if self.vocabulary is not None:
            try:
                found["vocabulary"] = files.sha256(Path(self.vocabulary).expanduser())
            except OSError as error:
                raise self._unreadable(error) from None
        if self.judge is not None and (known := hash_of_weights(self.judge)):
            found["judge"] = known
        return found

    def _vocabulary(self, setting: Setting) -> list[str]:
        """The concepts; those of the other evaluation where explanations are taken over.

        Raises:
            ConfigError: see `concepts`.
        """
        if self.shared is not None:
            return list(self.shared["words"])
        return self.concepts(setting.dataset.label_names)

    def _unreadable(self, error: OSError) -> ConfigError:
        return ConfigError(f"backend.vocabulary={self.vocabulary}: {error.strerror}")

    def concepts(self, label_names: Sequence[str] | None) -> list[str]:
        """The vocabulary.

        Raises:
            ConfigError: the file cannot be read, or there is neither file nor class names.
        """
        if self.vocabulary is not None:
            try:
                lines = Path(self.vocabulary).expanduser().read_text().splitlines()
            except OSError as error:
                raise self._unreadable(error) from None
        elif label_names is None:
            raise ConfigError(
                "backend.vocabulary=null: this dataset names no classes; give a file with one "
                "concept a line"
            )
        else:
            lines = [name.replace("_", " ") for name in label_names]
        return list(dict.fromkeys(line.strip() for line in lines if line.strip()))

    def start(self, context: EvalContext, showing: Showing) -> None:
        """Embed the vocabulary and the images of reference."""
        assert context.setting is not None
        self.margins: list[float] = []
        self.labels: set[str] = set()
        self.words = self._vocabulary(context.setting)
        every = showing.codes.example_ids.numpy()
        drawn = np.argsort(uniform(2, every, context.seed, LATENTS), kind="stable")
        reference = drawn[: self.n_reference].tolist()

        self.terms = self.shared or {"templates": self.templates, "centre": self.centre}

        def eye_of(model: Model) -> Eye:
            tower = cast(TextTower, model)
            texts = embed_concepts(tower, self.words, self.terms["templates"] or tower.templates)
            texts = normalize(texts - texts.mean(0), dim=1) if self.terms["centre"] else texts
            return Eye(model, showing, texts, reference, context.spent)

        self.eye = self.judging = eye_of(showing.model)
        if self.judge is not None:
            self.judging = eye_of(build_judge(self.judge, showing.model.device))

    def turn_to(self, showing: Showing, encode: Encode) -> None:
        """See `Explainer.turn_to`."""
        for eye in (self.eye, self.judging):
            eye.turn_to(showing)

    def explain(self, cases: Sequence[Case]) -> list[Explanation | None]:
        """See `Explainer.explain`."""
        shown = {shown.slot for case in cases for shown in case.explain}
        scored = {shown.slot for case in cases for shown in case.score}
        self.eye.see(shown | scored if self.judging is self.eye else shown)
        self.judging.see(scored)
        found: list[Explanation | None] = []
        for case in cases:
            acts = torch.tensor([shown.act for shown in case.explain])
            centred = self.eye.centred([shown.slot for shown in case.explain])
            cosines = self.eye.texts @ normalize(acts @ centred, dim=0)
            best = cosines.topk(max(2, self.n_concepts))
            self.margins.append(float(best.values[0] - best.values[1]))
            chosen = best.indices[: self.n_concepts].tolist()
            self.labels.add(self.words[chosen[0]])
            found.append(Explanation(" | ".join(self.words[i] for i in chosen), chosen))
        return found

    def common(self) -> dict[str, Any]:
        """See `Explainer.common`: the vocabulary and how it is embedded."""
        return {**self.terms, "words": self.words}

    def kept(self, explanation: Explanation) -> list[int]:
        """See `Explainer.kept`: numbers in the vocabulary."""
        return list(explanation.rule)

    def recalled(self, text: str, rule: Any) -> Explanation:
        """See `Explainer.recalled`."""
        words = [str(self.shared["words"][i]) for i in rule]
        if text != " | ".join(words) or {"templates", "centre"} - self.shared.keys():
            raise ValueError(f"{text!r} is not what its rule says: {words}")
        return Explanation(text, [*map(int, rule)])

    def take_over(
        self, explanations: Sequence[Explanation], cases: Sequence[Case]
    ) -> list[Explanation | None]:
        """See `Explainer.take_over`; the images of all latents are embedded together."""
        self.judging.see({shown.slot for case in cases for shown in case.score})
        self.labels.update(self.words[explanation.rule[0]] for explanation in explanations)
        return list(explanations)

    def verdict(self, explanation: Explanation, case: Case) -> Verdict:
        """See `Explainer.verdict`."""
        centred = self.judging.centred([shown.slot for shown in case.score])
        likeness = (centred @ self.judging.texts[explanation.rule].T).amax(1).double().numpy()
        each = [likeness[i : i + 1] for i in range(len(likeness))]
        return Verdict(each, likeness > 0)

    def counts(self) -> dict[str, float]:
        """How many concepts explain anything, and by how much the first is ahead (cosine)."""
        margin = {"margin_mean": float(np.mean(self.margins))} if self.margins else {}
        return {"n_labels": len(self.labels), **margin} if self.labels else {}

    def remarks(self) -> list[Note]:
        """Who judges, where it is the host; and a judge that is the host again."""
        if self.judge is None:
            detail = "same model judges: images and words are compared by the host's own embeddings"
        elif self.judging.model.fingerprint() == self.eye.model.fingerprint():
            detail = "same model judges: the judge has the host's own weights"
        else:
            return []
        return [Note("not_applicable", "autointerp.spearman_mean", detail)]


class Eye:
    """Images and concepts as one CLIP sees them.

    Args:
        model: embeds the images.
        showing: loads them.
        texts: unit embeddings of the concepts [V, d].
        reference: numbers in the codes of the images whose mean is v̄.
        spent: told how many images were run.
    """

    def __init__(
        self,
        model: Model,
        showing: Showing,
        texts: Float[Tensor, "v d"],
        reference: Sequence[int],
        spent: Counter[str],
    ) -> None:
        self.model, self.showing, self.texts, self.spent = model, showing, texts, spent
        self.embedded: dict[int, Tensor] = {}
        self.mean = self.images(reference).mean(0)

    def turn_to(self, showing: Showing) -> None:
        """Look at the examples of other codes, by their numbers there; v̄ stays."""
        self.showing = showing
        self.embedded.clear()

    def centred(self, slots: Sequence[int]) -> Float[Tensor, "n d"]:
        """v_i − v̄."""
        return self.images(slots) - self.mean

    def images(self, slots: Sequence[int]) -> Float[Tensor, "n d"]:
        """Unit embeddings of examples by their numbers in the codes."""
        self.see(slots)
        return torch.stack([self.embedded[slot] for slot in slots])

    def see(self, slots: Iterable[int]) -> None:
        """Embed those images that are not yet, many at a time."""
        wanted = sorted(set(slots) - self.embedded.keys())
        with Progress("autointerp: images", len(wanted), "images") as progress, torch.no_grad():
            for start in range(0, len(wanted), AT_ONCE):
                part = wanted[start : start + AT_ONCE]
                inputs = self.model.prepare(self.showing.load(part)).to(self.model.device)
                vectors = normalize(self.model.splice(inputs, {}).float(), dim=1).cpu()
                self.embedded |= dict(zip(part, vectors, strict=True))
                self.spent["full_forwards"] += len(part)
                progress.advance(len(part))


def embed_concepts(
    tower: TextTower, words: Sequence[str], templates: Sequence[str]
) -> Float[Tensor, "n d"]:
    """`TextTower.class_embeddings` of many words, by batches of their sentences."""
    step, parts = max(1, AT_ONCE // len(templates)), list[Any]()
    with torch.no_grad():
        for start in range(0, len(words), step):
            part = words[start : start + step]
            sentences = [template.format(word) for word in part for template in templates]
            vectors = normalize(tower.encode_text(sentences).float(), dim=1).cpu()
            means = vectors.view(len(part), len(templates), -1).mean(1)
            parts.append(normalize(means, dim=1))
    return torch.cat(parts)
