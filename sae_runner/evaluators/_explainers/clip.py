"""Words of a vocabulary as explanations of image latents, by a text tower beside the images.

With v_i the unit embedding of image i by the model as it is, v̄ the mean of them over a sample of
the data, and t_c the unit embedding of concept c (the mean over the sentences that stand for it):

    w = Σ_i∈E1 a_i (v_i − v̄)          where the images that a latent is active on lie
    explanation: the concepts with the greatest cos(w, t_c)
    ŝ_i = max over them of (v_i − v̄)·t_c      its sign: more like the concept than the mean image

`centre` takes the mean over the vocabulary from every t_c first, and normalises again: texts lie in
a narrow cone, apart from the images. v̄ moves ŝ of a concept by a constant, which changes no rank.

The model whose latents these are embeds images and words itself: it judges its own latents.
"""

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
from sae_runner.evaluators._explainers.base import Case, Explainer, Explanation, Verdict
from sae_runner.evaluators._showing import Showing
from sae_runner.evaluators.base import EvalContext, Note, Setting
from sae_runner.log import Progress
from sae_runner.models._text import TextTower

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
    ) -> None:
        self.vocabulary, self.templates, self.centre = vocabulary, templates, centre
        self.n_concepts, self.n_reference = n_concepts, n_reference

    def check(self, setting: Setting) -> None:
        """See `Explainer.check`."""
        if not isinstance(setting.shapes(), TextTower):
            raise ConfigError(
                "this model has no text tower beside its images: use a CLIP model, or for text "
                "evaluators=[autointerp]"
            )
        n = len(self.concepts(setting.dataset.label_names))
        if n < max(2, self.n_concepts):
            raise ConfigError(f"backend.vocabulary={self.vocabulary}: {n} concepts are too few")

    def reads(self) -> dict[str, str]:
        """The vocabulary's hash."""
        if self.vocabulary is None:
            return {}
        try:
            return {"vocabulary": files.sha256(Path(self.vocabulary).expanduser())}
        except OSError as error:
            raise self._unreadable(error) from None

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
        self.showing, self.embedded = showing, dict[int, Tensor]()
        self.margins: list[float] = []
        self.labels: set[str] = set()
        self.words = self.concepts(context.setting.dataset.label_names)
        tower = cast(TextTower, showing.model)
        texts = embed_concepts(tower, self.words, self.templates or tower.templates)
        self.texts = normalize(texts - texts.mean(0), dim=1) if self.centre else texts
        every = showing.codes.example_ids.numpy()
        drawn = np.argsort(uniform(2, every, context.seed, LATENTS), kind="stable")
        self.mean = self.images(drawn[: self.n_reference].tolist()).mean(0)

    def explain(self, cases: Sequence[Case]) -> list[Explanation | None]:
        """See `Explainer.explain`."""
        self._embed({shown.slot for case in cases for shown in (*case.explain, *case.score)})
        found: list[Explanation | None] = []
        for case in cases:
            acts = torch.tensor([shown.act for shown in case.explain])
            centred = self.images([shown.slot for shown in case.explain]) - self.mean
            cosines = self.texts @ normalize(acts @ centred, dim=0)
            best = cosines.topk(max(2, self.n_concepts))
            self.margins.append(float(best.values[0] - best.values[1]))
            chosen = best.indices[: self.n_concepts].tolist()
            self.labels.add(self.words[chosen[0]])
            found.append(Explanation(" | ".join(self.words[i] for i in chosen), chosen))
        return found

    def verdict(self, explanation: Explanation, case: Case) -> Verdict:
        """See `Explainer.verdict`."""
        centred = self.images([shown.slot for shown in case.score]) - self.mean
        likeness = (centred @ self.texts[explanation.rule].T).amax(1).double().numpy()
        each = [likeness[i : i + 1] for i in range(len(likeness))]
        return Verdict(each, likeness > 0)

    def counts(self) -> dict[str, float]:
        """How many concepts explain anything, and by how much the first is ahead (cosine)."""
        if not self.margins:
            return {}
        return {"n_labels": len(self.labels), "margin_mean": float(np.mean(self.margins))}

    def remarks(self) -> list[Note]:
        """Who judges."""
        detail = "same model judges: images and words are compared by the host's own embeddings"
        return [Note("not_applicable", "autointerp.spearman_mean", detail)]

    # -- Images ----------------------------------------------------------------------------------

    def images(self, slots: Sequence[int]) -> Float[Tensor, "n d"]:
        """Unit embeddings of examples by their numbers in the codes."""
        self._embed(slots)
        return torch.stack([self.embedded[slot] for slot in slots])

    def _embed(self, slots: Iterable[int]) -> None:
        wanted, model = sorted(set(slots) - self.embedded.keys()), self.showing.model
        with Progress("autointerp: images", len(wanted), "images") as progress, torch.no_grad():
            for start in range(0, len(wanted), AT_ONCE):
                part = wanted[start : start + AT_ONCE]
                inputs = model.prepare(self.showing.load(part)).to(model.device)
                vectors = normalize(model.splice(inputs, {}).float(), dim=1).cpu()
                self.embedded |= dict(zip(part, vectors, strict=True))
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
