"""What an evaluator is: a subscriber to passes that all evaluators share.

    start(context) → update(rows) for every batch of stored rows
                   → update_spliced(batch) for every batch of inputs the model is run on
                   → finish() → Findings

An evaluator takes part in a pass by overriding its method; nobody re-reads the store or re-runs the
model on its own account where a pass would do. Metric names are fixed once and mean the same for
every architecture; sums are kept in float64 and ratios are taken at the end.
"""

from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal, NamedTuple

import numpy as np
import numpy.typing as npt
from jaxtyping import Bool, Float, Int64
from torch import Tensor

from sae_runner.data.base import Dataset, Split
from sae_runner.evaluators._codes import Codes
from sae_runner.models.base import Inputs, Model, SiteInfo
from sae_runner.saes.base import SAE, Latents
from sae_runner.site import TokenSelection
from sae_runner.splice import Run

Axis = Literal["faithfulness", "interpretability", "both"]
SpliceKind = Literal["clean", "recon", "zero", "mean"]
"""What stands at the selected tokens: what did before, which takes no other run of the model; the
reconstruction; zeros; or the training rows' mean."""


class Rows(NamedTuple):
    """One batch of stored rows, encoded; on the CPU or the GPU."""

    x: Float[Tensor, "n d_in"]
    latents: Latents
    x_hat: Float[Tensor, "n d_in"]
    example_id: Int64[Tensor, " n"]
    position: Int64[Tensor, " n"]
    """Token position within the example."""
    label: Int64[Tensor, " n"] | None
    """Class, -1 where an example has none; None where the dataset has no classes."""
    read: Float[Tensor, "n d_read"] | None = None
    """What the SAE reads, where that is another site than `x`: a transcoder's."""

    @property
    def source(self) -> Tensor:
        """What the SAE reads, [n, d_read]."""
        return self.x if self.read is None else self.read


class Spliced(NamedTuple):
    """One batch of inputs, run as it is and with something in the site's place."""

    kind: SpliceKind
    inputs: Inputs
    replaced: Bool[Tensor, "n t"]
    """The tokens of the site that are replaced: those that the SAE was trained on."""
    clean: Run
    run: Run
    """`clean` where that is the kind. Watched sites are recorded there and for `recon` alone; the
    site itself always."""


@dataclass(frozen=True)
class Setting:
    """What is known before anything runs: what an evaluator may refuse."""

    dataset: Dataset
    """As it is configured; running text is not packed yet."""
    shapes: Callable[[], Model]
    """The model without its weights, built when asked."""
    site: SiteInfo
    selection: TokenSelection
    target: SiteInfo | None = None
    """What a transcoder predicts."""
    sae: Callable[[], SAE] | None = None
    """The SAE without its weights, built when asked."""
    keep_bytes: int = 2 * 10**9
    """What an evaluator may keep of rows in memory: `eval.keep_gb`."""
    weights: str | None = None
    """Hash of the SAE that is measured; None where it is still to be trained."""

    @property
    def spliced_site(self) -> SiteInfo:
        """Where a reconstruction goes."""
        return self.target or self.site


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
    """Loads the dataset as the model reads it, when asked."""
    model: Callable[[], Model] | None = None
    """Loads the model, when asked."""
    setting: Setting | None = None
    n_latents: int = 1000
    """Latents to sample where they are looked at one by one."""
    rows: Callable[[Split, int], Iterator[Rows]] | None = None
    """Encoded rows of the first n examples that the store visits (a seeded sample), whole."""
    rows_of: Callable[[Dataset, Split], Iterator[Rows]] | None = None
    """Encoded rows of other data: what the model makes of them at the same site and tokens."""
    codes: Callable[[], Codes] | None = None
    """At the end of the pass: its latents by example, where `keeps_codes`."""
    folder: Path | None = None
    """Where this evaluator may keep what it need not do again; it is made when first written."""
    spent: Counter[str] = field(default_factory=Counter)
    """What this evaluator itself ran: the model on examples (`full_forwards`, `partial_forwards`),
    the SAE on rows (`sae_encodes`; those that `rows` and `rows_of` give are counted there)."""


class Note(NamedTuple):
    """Why a number is null or to be read with care."""

    code: str
    """zero_denominator, negative_denominator, constant_feature, dead_feature, single_class,
    too_few_examples, missing_dependency, not_applicable."""
    metric: str
    detail: str


Columns = Mapping[str, Any]
"""Arrays or lists of one length, by name."""


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
    tables: dict[str, Columns] = field(default_factory=dict)
    """Other tables by name, each a parquet file: one row a task, a latent that was sampled, …"""
    arrays: dict[str, Mapping[str, Tensor]] = field(default_factory=dict)
    """Named tensors, each group a safetensors file."""
    texts: dict[str, str] = field(default_factory=dict)
    """Text files by name, such as `pack.html`."""
    left_out: bool = False
    """Whether `eval.keep_gb` left examples out, so that another value finds something else."""
    incomplete: str = ""
    """What went wrong in part, in a line: the findings stand, and the command says so at its end
    (exit code 1). A later run measures again."""


class Evaluator(ABC):
    """One family of metrics. Options come from its YAML by keyword."""

    axis: ClassVar[Axis]
    version: ClassVar[str] = "1"
    sizes: ClassVar[tuple[str, ...]] = ("n_rows",)
    """The sizes of the `eval` block that its findings depend on."""
    splices: ClassVar[tuple[SpliceKind, ...]] = ()
    """What `update_spliced` is to be called with."""
    keeps_codes: ClassVar[bool] = False
    """Whether `finish` asks for `EvalContext.codes`."""

    def check(self, setting: Setting) -> None:  # noqa: B027 - most have nothing to refuse
        """Before anything runs: refuse what this evaluator cannot measure on.

        Raises:
            ConfigError: what is missing, and what to use instead.
        """

    def reads(self) -> dict[str, str]:
        """What decides the findings besides options, rows and weights: hashes of files read."""
        return {}

    def watches(self, setting: Setting) -> Sequence[SiteInfo]:
        """The later sites that `update_spliced` wants to see."""
        return ()

    @abstractmethod
    def start(self, context: EvalContext) -> None:
        """Before the first batch; also clears what an earlier pass left."""

    def update(self, rows: Rows) -> None:  # noqa: B027 - a pass that is not taken part in
        """Take one batch of stored rows into account."""

    def update_spliced(self, batch: Spliced) -> None:  # noqa: B027 - likewise
        """Take one batch of inputs into account; `clean` comes first of its kinds, then `recon`."""

    @abstractmethod
    def finish(self) -> Findings:
        """After the last batch."""

    @classmethod
    def reads_rows(cls) -> bool:
        """Whether it takes part in the pass over stored rows."""
        return cls.keeps_codes or cls.update is not Evaluator.update
