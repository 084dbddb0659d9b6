"""What a model predicts, whichever way it says it: logits of tokens, of classes, of class names.

- A causal language model predicts the token that follows: logits [V] with token t + 1 as the
  target, at every t from the first replaced token on where t and t + 1 are no padding. What comes
  before it sees nothing of what is replaced: its predictions stay what they are (KL 0), and would
  only dilute the means, by 1/127 in rows of 128 tokens of which the first is never replaced
  (SAELens leaves out predictions at all tokens that it does not replace).
- A classifier predicts a class: logits [C] of each example, with its label as the target where the
  dataset's classes are as many as the model's.
- A model with a text tower predicts a class by its name: scale · cos(v, t_c) + bias of the image
  embedding v and the unit text embeddings t_c, with the model's own scale.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from jaxtyping import Bool, Float, Float64, Int64
from torch import Tensor

from sae_runner.data.base import Dataset
from sae_runner.errors import ConfigError
from sae_runner.models._text import TextTower, spoken
from sae_runner.models.base import Inputs, Model

Kind = Literal["tokens", "classes", "names"]
# Logits that are worked on at a time: 64 MB of float32.
CHUNK = 2**24


def predicts(model: Model, dataset: Dataset) -> Kind:
    """What kind of predictions a model (with weights or without) makes on a dataset.

    Raises:
        ConfigError: none.
    """
    if model.output == "class_logits":
        return "classes"
    if model.output == "token_logits":
        if model.causal:
            return "tokens"
        raise ConfigError(
            "not applicable: this model fills in masked tokens, and its logits predict no next "
            "one; use downstream_recon, which needs no logits"
        )
    if not isinstance(model, TextTower):
        raise ConfigError(
            "not applicable: this model gives no logits of trained weights; use downstream_recon, "
            "which needs only later blocks"
        )
    if not dataset.label_names:
        raise ConfigError(
            f"not applicable: dataset {dataset.name!r} has no labels to tell apart by their names; "
            "use a labelled one, or downstream_recon, which needs no labels"
        )
    return "names"


def precise(logits: Tensor) -> Tensor:
    """In float32 at least: softmax and differences lose too much in half precision."""
    return logits.to(torch.promote_types(logits.dtype, torch.float32))


class Places(NamedTuple):
    """Where a batch's logits are looked at."""

    example: Int64[Tensor, " m"]
    """Number within the batch."""
    position: Int64[Tensor, " m"] | None
    """Of the token; None where an example has one row of logits."""
    target: Int64[Tensor, " m"]
    """-1 where there is none."""

    def split(self, n: int) -> list["Places"]:
        """Parts of n places; one, of none, where there are none."""
        example, target = torch.split(self.example, n), torch.split(self.target, n)
        position: tuple[Tensor | None, ...] = (None,) * len(example)
        if self.position is not None:
            position = torch.split(self.position, n)
        return [Places(*part) for part in zip(example, position, target, strict=True)]

    def of(self, logits: Tensor) -> Float[Tensor, "m v"]:
        """The rows of [n, v] or [n, t, v] that lie there, in float32 at least."""
        if self.position is None:
            return precise(logits[self.example])
        return precise(logits[self.example, self.position])


@dataclass(frozen=True)
class Head:
    """How predictions are read from a model's output."""

    kind: Kind
    n_labels: int
    """Classes of the dataset; 0 where it has none."""
    classes: Float[Tensor, "c d"] | None = None
    """Unit embeddings of the classes' names."""
    scale: float = 1.0
    bias: float = 0.0

    def logits(self, output: Tensor) -> Tensor:
        """[n, t, vocab] or [n, classes]; those of names in float32 at least."""
        if self.classes is None:
            return output
        v = torch.nn.functional.normalize(precise(output), dim=1)
        return self.scale * (v @ self.classes.to(v).T) + self.bias

    def places(self, inputs: Inputs, logits: Tensor, replaced: Bool[Tensor, "n t"]) -> Places:
        """Every place that is predicted at and can be changed by what is `replaced`.

        An example in which nothing is has none: it has no rows, and says nothing of the SAE.
        """
        replaced = replaced.to(logits.device)
        if self.kind != "tokens":
            example = replaced.any(1).nonzero()[:, 0]
            if inputs.labels is None or self.unlabelled(logits):
                return Places(example, None, torch.full_like(example, -1))
            return Places(example, None, inputs.labels.to(logits.device)[example])
        tokens = inputs.tensors["tokens"].to(logits.device)
        own = torch.ones_like(tokens, dtype=torch.bool)
        if inputs.attended is not None:
            own = inputs.attended.to(logits.device)
        reached = replaced.cumsum(1) > 0
        predicted = (own & reached)[:, :-1] & own[:, 1:]
        example, position = predicted.nonzero(as_tuple=True)
        return Places(example, position, tokens[example, position + 1].long())

    def unlabelled(self, logits: Tensor) -> str:
        """Why the dataset's labels are no targets; empty where they are."""
        if self.kind == "tokens" or self.n_labels == logits.shape[-1]:
            return ""
        if not self.n_labels:
            return "the dataset has no labels"
        return f"the labels are of {self.n_labels} classes, the logits of {logits.shape[-1]}"


def head_of(model: Model, dataset: Dataset, templates: Sequence[str] | None) -> Head:
    """How the predictions of a model are read.

    Args:
        model: with its weights.
        dataset: whose classes are predicted.
        templates: sentences with {} for a class' name; None for the model's own.

    Raises:
        ConfigError: it makes none.
    """
    kind, names = predicts(model, dataset), dataset.label_names or ()
    if kind != "names":
        return Head(kind, len(names))
    assert isinstance(model, TextTower)
    with torch.no_grad():
        classes = model.class_embeddings([spoken(name) for name in names], templates)
    return Head(kind, len(names), classes.detach(), model.logit_scale, model.logit_bias)


class Judged(NamedTuple):
    """Two predictions at each place, in float64 on the CPU; p is the clean one, q the other."""

    kl: Float64[Tensor, " m"]
    """KL(p ‖ q), in nats."""
    tv: Float64[Tensor, " m"]
    """½ Σ |p − q|"""
    agree: Float64[Tensor, " m"]
    """1 where both have the same first choice."""
    ce_clean: Float64[Tensor, " m"]
    """−log p(target), in nats; 0 without a target, as what follows."""
    ce: Float64[Tensor, " m"]
    """−log q(target)"""
    right_clean: Float64[Tensor, " m"]
    """1 where the target is the first choice of p."""
    right: Float64[Tensor, " m"]
    """1 where the target is the first choice of q."""


def judge(clean: Tensor, spliced: Tensor, places: Places) -> Judged:
    """Compare logits [n, v] or [n, t, v] at `places`, some rows at a time."""
    n_rows = max(1, CHUNK // clean.shape[-1])
    parts = [_judge(p.of(clean), p.of(spliced), p.target) for p in places.split(n_rows)]
    return Judged(*(torch.cat(column) for column in zip(*parts, strict=True)))


def _judge(
    clean: Float[Tensor, "m v"], spliced: Float[Tensor, "m v"], target: Int64[Tensor, " m"]
) -> tuple[Tensor, ...]:
    log_p, log_q = clean.log_softmax(1), spliced.log_softmax(1)
    p, q = log_p.exp(), log_q.exp()
    # 0 log 0 is 0: a token that is masked out adds nothing.
    kl = torch.where(p > 0, p * (log_p - log_q), 0).sum(1)
    tv = (p - q).abs().sum(1) / 2
    known, at = target >= 0, target.clamp_min(0).unsqueeze(1)
    first, ours = clean.argmax(1), spliced.argmax(1)
    ce_clean, ce = (torch.where(known, -x.gather(1, at)[:, 0], 0) for x in (log_p, log_q))
    found = (kl, tv, first == ours, ce_clean, ce, first == target, ours == target)
    return tuple(values.cpu().double() for values in found)


def among_first(logits: Float[Tensor, "n c"], places: Places, n: int) -> Float64[Tensor, " m"]:
    """1 where the target is among the n first choices; all, where there are no more classes."""
    first = places.of(logits).topk(min(n, logits.shape[1])).indices
    return (first == places.target.unsqueeze(1)).any(1).cpu().double()
