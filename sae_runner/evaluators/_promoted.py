"""What a direction makes the model say: outputs that become more likely when more of it is there.

At the strongest token of some examples in which it is active, as much of the direction as is there
is added once more, and the model runs on from there. Shown are the outputs o with the greatest mean

    Δ_o = p(o | with more of it) − p(o | as it is) > 0

over those examples (of probabilities: of their logarithms what the model never says moves most):
next tokens of a language model (for an encoder, tokens at the place itself),
classes of a classifier, and of a model with a text tower the classes of the dataset, p the softmax
of its scaled similarities.
"""

from collections.abc import Callable, Sequence

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from sae_runner.data.base import Dataset
from sae_runner.models._text import ReadsTokens, TextTower, spoken
from sae_runner.models.base import Inputs, Model, SiteInfo
from sae_runner.splice import run


class Outputs:
    """The outputs of a model that have names.

    Args:
        model: with its weights.
        dataset: for the names of classes.
        site: where directions are added.
    """

    def __init__(self, model: Model, dataset: Dataset, site: SiteInfo) -> None:
        self.model, self.site = model, site
        self.name: Callable[[int], str] | None = None
        labels, output = dataset.label_names, model.output
        classes: Tensor | None = None
        if output == "token_logits" and isinstance(model, ReadsTokens):
            reader = model
            self.name = lambda i: reader.pieces([i])[0]
        elif output == "class_logits" and labels:
            self.name = lambda i: spoken(labels[i])
        elif isinstance(model, TextTower) and labels:
            with torch.no_grad():
                classes = model.logit_scale * model.class_embeddings([spoken(n) for n in labels])
            self.name = lambda i: spoken(labels[i])
        self.classes = classes

    def _probabilities(
        self, output: Tensor, position: Int64[Tensor, " n"]
    ) -> Float[Tensor, "n outputs"]:
        if self.model.output == "token_logits":
            output = output[torch.arange(len(output)), position.to(output.device)]
        if self.classes is not None:
            output = torch.nn.functional.normalize(output.float(), dim=-1)
            output = output @ self.classes.to(output).T
        return output.float().softmax(-1)

    @torch.no_grad()
    def promoted(
        self,
        inputs: Inputs,
        position: Int64[Tensor, " n"],
        direction: Float[Tensor, " d"],
        amounts: Float[Tensor, " n"],
        n: int,
    ) -> list[str]:
        """Up to n outputs that become more likely with `amounts` of a direction at positions."""
        assert self.name is not None
        inputs = inputs.to(self.model.device)
        clean = run(self.model, inputs, self.site)
        x = clean.sites[self.site.name].clone()
        rows = torch.arange(len(x), device=x.device)
        # A row that stands for a whole example has position -1: all its tokens are it.
        added = (amounts[:, None] * direction[None, :]).to(x)
        for i in rows.tolist():
            at = slice(None) if position[i] < 0 else int(position[i])
            x[i, at] += added[i]
        more = run(self.model, inputs, self.site, x)
        change = self._probabilities(more.output, position) - self._probabilities(
            clean.output, position
        )
        mean = change.mean(0).cpu()
        best = mean.argsort(descending=True, stable=True)[:n].tolist()
        return [self.name(i) for i in best if mean[i] > 0]


def names_of(pieces: Sequence[str]) -> list[str]:
    """Tokens as a list shows them: what is invisible is made visible."""
    return [piece.replace("\n", "↵").replace("\t", "⇥") for piece in pieces]
