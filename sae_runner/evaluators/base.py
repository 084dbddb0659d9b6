"""What an evaluator is: a subscriber to the one pass over held-out rows.

    start(context) → update(rows) for every batch → finish() → Findings

Nobody re-reads the store or re-runs the model on its own. Metric names are fixed once and mean the
same for every architecture; sums are kept in float64 and ratios are taken at the end.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal, NamedTuple

import numpy as np
import numpy.typing as npt
from jaxtyping import Float, Int64
from torch import Tensor

from sae_runner.data.base import Dataset
from sae_runner.models.base import Model
from sae_runner.saes.base import SAE, Latents

Axis = Literal["faithfulness", "interpretability", "both"]


class Rows(NamedTuple):
    """One batch of the shared pass, on the CPU or the GPU."""

    x: Float[Tensor, "n d_in"]
    latents: Latents
    x_hat: Float[Tensor, "n d_in"]
    example_id: Int64[Tensor, " n"]
    position: Int64[Tensor, " n"]
    """Token position within the example."""
    label: Int64[Tensor, " n"] | None
    """Class, -1 where an example has none; None where the dataset has no classes."""


@dataclass(frozen=True)
class EvalContext:
    """What an evaluator may ask for besides the rows."""

    sae: SAE
    n_rows: int
    """The most rows that will come; all those of an example, or none."""
    example_ids: npt.NDArray[np.int64]
    """Ids of the examples that they may come from, ascending."""
    seed: int
    n_prefix: int = 0
    """Class and register tokens of the site (positions below it are no patches)."""
    has_cls: bool = False
    mean: Float[Tensor, " d_in"] | None = None
    """Mean of the held-out rows, where the store knows it before the pass (float64 if it can)."""
    dataset: Callable[[], Dataset] | None = None
    """Loads the dataset, when asked."""
    model: Callable[[], Model] | None = None
    """Loads the model, when asked."""


class Note(NamedTuple):
    """Why a number is null or to be read with care."""

    code: str
    """zero_denominator, constant_feature, dead_feature, single_class, too_few_examples,
    missing_dependency, not_applicable."""
    metric: str
    detail: str


@dataclass
class Findings:
    """What an evaluator found. Null (None) with a note stands for what cannot be computed."""

    metrics: dict[str, dict[str, float | int | None]]
    """Category, then metric."""
    ci: dict[str, dict[str, float | int]] = field(default_factory=dict)
    """`category.metric` to se, lo, hi (95%) and n, the number of clusters."""
    notes: list[Note] = field(default_factory=list)
    series: dict[str, Any] = field(default_factory=dict)
    """Histograms and curves for figures: lists of numbers by name."""
    per_latent: dict[str, npt.NDArray[Any]] = field(default_factory=dict)
    """Columns of features.parquet, one value for each latent."""


class Evaluator(ABC):
    """One family of metrics. Options come from its YAML by keyword."""

    axis: ClassVar[Axis]
    version: ClassVar[str] = "1"

    def check(self, dataset: Dataset) -> None:  # noqa: B027 - most have nothing to refuse
        """Before anything runs: refuse a dataset that this evaluator cannot measure on.

        Raises:
            ConfigError: what is missing, and what to use instead.
        """

    @abstractmethod
    def start(self, context: EvalContext) -> None:
        """Before the first batch; also clears what an earlier pass left."""

    @abstractmethod
    def update(self, rows: Rows) -> None:
        """Take one batch into account."""

    @abstractmethod
    def finish(self) -> Findings:
        """After the last batch."""
