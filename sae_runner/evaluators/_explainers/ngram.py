"""N-gram templates as explanations: they need no other model than the host itself.

Of every example to explain, the text up to its most active token is what `_templates` makes a
template of. Rows are made up: the host's own frame (BOS, or CLS and SEP) around some tokens, and
the activation is read at the last of these. A token that would be no row of the SAE (the first
position, where the selection drops it) counts as inactive.

In an encoder a token sees what follows it too. There the row ends after it, [CLS] … token [SEP]:
templates say what to the left suffices, and what the right adds is lost. `not_reproduced_frac`
is the share of the examples for which no suffix, cut so, keeps half of the activation.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, cast

import numpy as np
import numpy.typing as npt
import torch
from jaxtyping import Float
from torch import Tensor

from sae_runner.config import Positive
from sae_runner.data.base import Example
from sae_runner.errors import ConfigError
from sae_runner.evaluators._explainers import EXPLAINERS
from sae_runner.evaluators._explainers._templates import (
    WILDCARD,
    Document,
    Template,
    Trie,
    find_templates,
)
from sae_runner.evaluators._explainers.base import (
    Case,
    Encode,
    Explainer,
    Explanation,
    Shown,
    Verdict,
)
from sae_runner.evaluators._showing import Showing
from sae_runner.evaluators.base import EvalContext, Setting
from sae_runner.log import Progress
from sae_runner.models._text import ReadsTokens
from sae_runner.saes.base import Latents

TOKENS_AT_ONCE = 16_384


@EXPLAINERS.register("ngram")
class NGram(Explainer):
    """Templates of tokens that make a latent fire.

    Args:
        longest: tokens of a template at most.
    """

    modality = "text"

    def __init__(self, *, longest: Positive) -> None:
        self.longest = longest

    def check(self, setting: Setting) -> None:
        """See `Explainer.check`."""
        if setting.selection.tokens not in ("all", "random_k", "last"):
            raise ConfigError(
                f"site.tokens={setting.selection.tokens}: n-gram templates say on which token a "
                "latent fires, and need an SAE of single tokens: site.tokens=all"
            )
        if not isinstance(setting.shapes(), ReadsTokens):
            raise ConfigError(
                "n-gram templates need a model of text; for images use evaluators=[autointerp_clip]"
            )

    def start(self, context: EvalContext, showing: Showing) -> None:
        """Learn the frame that the host puts around a text."""
        self.context, self.model = context, showing.model
        self.turn_to(showing, self._encoded)
        self.n_documents = self.n_not_reproduced = 0
        assert context.setting is not None
        self.selection = replace(context.setting.selection, tokens="all")
        framed = self.model.prepare([Example(0, "a")])
        tokens = framed.tensors["tokens"][0].tolist()
        special = torch.zeros(len(tokens), dtype=torch.bool)
        special = special if framed.special is None else framed.special[0]
        first, last = (int(i) for i in (~special).nonzero().flatten()[[0, -1]])
        self.prefix, self.suffix = tokens[:first], tokens[last + 1 :]
        room = getattr(self.model, "context", 2**31) - len(self.prefix) - len(self.suffix) - 1
        self.reach = max(1, min(self.longest, room))

    def turn_to(self, showing: Showing, encode: Encode) -> None:
        """See `Explainer.turn_to`."""
        self.site, self.encode = showing.site, encode

    def explain(self, cases: Sequence[Case]) -> list[Explanation | None]:
        """See `Explainer.explain`; the texts of all latents are run together."""
        documents = [self._document(case.latent, shown) for case in cases for shown in case.explain]
        reader = cast(ReadsTokens, self.model)
        n_steps = 2 * self.reach + 1
        with Progress("n-gram templates", n_steps * len(documents), "texts at most") as progress:
            self.progress = progress
            found = find_templates(documents, self.activations, reader.filler, self.reach)
        self.n_documents += len(documents)
        self.n_not_reproduced += found.n_not_reproduced
        explanations: list[Explanation | None] = []
        templates = iter(found.templates)
        for case in cases:
            own = [next(templates) for _ in case.explain]
            explanations.append(Explanation(self._in_words(own), Trie(own)))
        return explanations

    def verdict(self, explanation: Explanation, case: Case) -> Verdict:
        """See `Explainer.verdict`; no model is run."""
        predicted = [self._predicted(explanation.rule, shown) for shown in case.score]
        return Verdict(predicted, np.array([bool((p > 0).any()) for p in predicted]))

    def kept(self, explanation: Explanation) -> list[Template]:
        """See `Explainer.kept`: the templates, in the order in which the trie takes them."""
        trie: Trie = explanation.rule
        return list(trie.templates)

    def recalled(self, text: str, rule: Any) -> Explanation:
        """See `Explainer.recalled`."""
        templates = [
            Template(tuple(map(int, tokens)), float(value), bool(at_start))
            for tokens, value, at_start in rule
        ]
        return Explanation(text, Trie(templates))

    def counts(self) -> dict[str, float]:
        """Share of the texts that keep less than half of their activation in every suffix."""
        if not self.n_documents:
            return {}
        return {"not_reproduced_frac": self.n_not_reproduced / self.n_documents}

    def _document(self, latent: int, shown: Shown) -> Document:
        assert shown.window is not None
        window = shown.window
        peak = int(window.acts.argmax())
        tokens = [*window.before.tolist(), *window.tokens[: peak + 1].tolist()]
        return Document(latent, tuple(self._body(tokens)), shown.act)

    def _body(self, tokens: list[int]) -> list[int]:
        """A text without the frame's beginning."""
        n = len(self.prefix)
        return tokens[n:] if tokens[:n] == self.prefix else tokens

    def _predicted(self, trie: Trie, shown: Shown) -> npt.NDArray[np.float64]:
        assert shown.window is not None
        window = shown.window
        tokens = [*window.before.tolist(), *window.tokens.tolist()]
        body = self._body(tokens)
        found = np.zeros(len(window.tokens))
        begin = len(window.before) - (len(tokens) - len(body))  # Of the window, in the body.
        values = trie.predict(body, max(begin, 0))
        found[len(found) - len(values) :] = values
        predicted: npt.NDArray[np.float64] = found[window.read.numpy()]
        return predicted

    def _in_words(self, templates: Sequence[Template]) -> str:
        """The different templates of a latent, the strongest first."""
        reader = cast(ReadsTokens, self.model)
        words: dict[str, None] = {}
        for template in sorted(templates, key=lambda t: -t.value):
            pieces = iter(reader.pieces([t for t in template.tokens if t != WILDCARD]))
            text = "".join("(*)" if t == WILDCARD else next(pieces) for t in template.tokens)
            words[("(^)" if template.at_start else "") + text] = None
        return " | ".join(words)

    # -- The host --------------------------------------------------------------------------------

    def activations(
        self, latents: Sequence[int], rows: Sequence[Sequence[int]]
    ) -> npt.NDArray[np.float64]:
        """Each latent's activation at the last token of its row, short rows first."""
        found = np.zeros(len(rows))
        order = sorted(range(len(rows)), key=lambda i: len(rows[i]))
        frame = len(self.prefix) + len(self.suffix)
        while order:
            width = frame + len(rows[order[0]])
            n = 0
            while n < len(order) and (n + 1) * width <= max(TOKENS_AT_ONCE, width):
                width = frame + len(rows[order[n]])
                n += 1
            part, order = order[:n], order[n:]
            found[part] = self._run([latents[i] for i in part], [rows[i] for i in part])
            self.progress.advance(len(part))
        return found

    def _encoded(self, x: Float[Tensor, "n d"]) -> Latents:
        self.context.spent["sae_encodes"] += len(x)
        sae = self.context.sae
        latents: Latents = sae(x.to(sae.b_dec)).latents
        return latents

    def _run(
        self, latents: Sequence[int], rows: Sequence[Sequence[int]]
    ) -> npt.NDArray[np.float64]:
        reader, device = cast(ReadsTokens, self.model), self.model.device
        inputs = reader.token_rows([[*self.prefix, *row, *self.suffix] for row in rows])
        self.context.spent["full_forwards"] += len(rows)
        with torch.no_grad():
            x = self.model.record(inputs.to(device), [self.site.name])[self.site.name]
            last = torch.tensor([len(self.prefix) + len(row) - 1 for row in rows])
            place = torch.arange(len(rows))
            read = self.selection.mask(self.site, inputs, x.shape[1])[place, last]
            chosen = x[place.to(x.device), last.to(x.device)]
            found = picked(self.encode(chosen), torch.tensor(latents))
        values: npt.NDArray[np.float64] = (found * read).double().numpy()
        return values


def picked(latents: Latents, wanted: torch.Tensor) -> torch.Tensor:
    """[n]: of each row the activation of one latent."""
    mine = latents.indices.cpu() == wanted.repeat_interleave(latents.counts.cpu())
    found = torch.zeros(len(latents))
    found[latents.rows.cpu()[mine]] = latents.values.detach().cpu().float()[mine]
    return found
