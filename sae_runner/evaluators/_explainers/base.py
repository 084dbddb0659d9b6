"""What a back-end of `autointerp` is: it explains latents from examples and predicts others.

    check(setting) → start(context, showing) → explain(cases) → predict(explanations, cases)

Both take all latents at once, so that what runs a model can batch. What could not be had is None.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, NamedTuple

import numpy as np
import numpy.typing as npt
from torch import Tensor

from sae_runner.evaluators._showing import Showing, TextWindow
from sae_runner.evaluators.base import EvalContext, Note, Setting
from sae_runner.saes.base import Latents

Encode = Callable[[Tensor], Latents]
Predicted = npt.NDArray[np.float64]


class Shown(NamedTuple):
    """One example, as it is shown."""

    slot: int
    """Its number in the codes."""
    example_id: int
    act: float
    """The latent's strongest activation in it; 0 where it is silent."""
    window: TextWindow | None
    """Of a text; images are loaded when they are needed."""

    @property
    def acts(self) -> Predicted:
        """What is to be predicted: each token that the SAE reads, or the example."""
        if self.window is None:
            return np.array([self.act])
        acts: Predicted = self.window.acts[self.window.read].double().numpy()
        return acts


class Case(NamedTuple):
    """One latent: examples to explain it by, and others to score the explanation on."""

    latent: int
    explain: list[Shown]
    score: list[Shown]


class Explanation(NamedTuple):
    """What a latent responds to."""

    text: str
    """In words."""
    rule: Any = None
    """The same, as the back-end applies it."""


@dataclass
class Verdict:
    """What an explanation says of the scored examples."""

    predicted: list[Predicted] | None = None
    """For each of `Shown.acts`, a number that should rank with it."""
    said: npt.NDArray[np.bool_] | None = None
    """Whether the latent is active in the example."""
    fuzzed: tuple[npt.NDArray[np.bool_], npt.NDArray[np.bool_]] | None = None
    """Whether the marks of an excerpt are where the latent is active, and what was said of it."""


class Explainer(ABC):
    """A back-end. Options come from the evaluator's YAML, below `backend`, by keyword."""

    modality: ClassVar[Literal["text", "image"]]
    incomplete: str = ""
    """Why some latents have no explanation or verdict, in a line."""
    shared: Any = None
    """Of explanations that are taken over: what `common` gave where they were made."""

    @abstractmethod
    def check(self, setting: Setting) -> None:
        """Before anything runs: refuse what this back-end cannot work on.

        Raises:
            ConfigError: what is missing, and what to use instead.
        """

    def reads(self) -> dict[str, str]:
        """What decides the findings besides options: hashes of files, versions of wordings."""
        return {}

    @abstractmethod
    def start(self, context: EvalContext, showing: Showing) -> None:
        """Before the first latent; also clears what an earlier measurement left."""

    def turn_to(self, showing: Showing, encode: Encode) -> None:  # noqa: B027 - few need to
        """After `start`: explain other units of the same model from here on, such as neurons.

        Args:
            showing: of their activations.
            encode: rows of `showing.site` to these.
        """

    @abstractmethod
    def explain(self, cases: Sequence[Case]) -> list[Explanation | None]:
        """An explanation of each latent from its examples to explain."""

    def common(self) -> Any:
        """What all explanations predict by besides their own rules, as JSON."""
        return None

    def kept(self, explanation: Explanation) -> Any:
        """The rule of an explanation as JSON; None where the text is all there is."""
        return None

    def recalled(self, text: str, rule: Any) -> Explanation:
        """An explanation from what was kept of it.

        Raises:
            LookupError, TypeError, ValueError: it is damaged.
        """
        return Explanation(text)

    def take_over(
        self, explanations: Sequence[Explanation], cases: Sequence[Case]
    ) -> list[Explanation | None]:
        """Explanations of another evaluation, as far as they can be scored; for `explain`."""
        return list(explanations)

    def predict(
        self,
        explanations: Sequence[Explanation | None],
        cases: Sequence[Case],
        *,
        control: bool = False,
    ) -> list[Verdict | None]:
        """What each explanation says of the examples to score of the case beside it.

        For `control` the explanations are those of other latents.
        """
        return [
            None if explanation is None else self.verdict(explanation, case)
            for explanation, case in zip(explanations, cases, strict=True)
        ]

    def verdict(self, explanation: Explanation, case: Case) -> Verdict:
        """What one explanation says, where none has to wait for another."""
        raise NotImplementedError

    def counts(self) -> dict[str, float]:
        """Metrics of the explaining itself."""
        return {}

    def remarks(self) -> list[Note]:
        """What a reader of the findings must know."""
        return []
