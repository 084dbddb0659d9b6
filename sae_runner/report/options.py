"""Options of `sae-run report`, as configs/report.yaml sets them: typed and in range."""

from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

from sae_runner.config import Name, NonNegative, Positive, Range, construct
from sae_runner.errors import ConfigError

Compared = Literal["similarity", "firing", "attribution", "retention", "proxy"]
Cosine = Annotated[float, Range(ge=-1, le=1)]
AtLeastThree = Annotated[int, Range(ge=3)]
FEWEST_RESAMPLES = 40
"""Below, the 2.5% and 97.5% points are no more than the extremes."""


class SimilarityOptions(NamedTuple):
    """The `similarity` block of configs/report.yaml."""

    thresholds: list[float]
    shared_cosine: float
    exact_up_to: int
    seed: int

    @classmethod
    def from_config(
        cls, *, thresholds: list[Cosine], shared_cosine: Cosine, exact_up_to: Positive,
        seed: NonNegative,
    ) -> "SimilarityOptions":  # fmt: skip
        """Typed and in range."""
        return cls(thresholds, shared_cosine, exact_up_to, seed)


class FiringOptions(NamedTuple):
    """The `firing` block of configs/report.yaml."""

    n_rows: int
    batch_size: int
    neurons: bool
    seed: int

    @classmethod
    def from_config(
        cls, *, n_rows: Positive, batch_size: Positive, neurons: bool, seed: NonNegative
    ) -> "FiringOptions":
        """Typed and in range."""
        return cls(n_rows, batch_size, neurons, seed)


class AttributionOptions(NamedTuple):
    """The `attribution` block of configs/report.yaml."""

    neurons: bool
    seed: int

    @classmethod
    def from_config(cls, *, neurons: bool, seed: NonNegative) -> "AttributionOptions":
        """Typed and in range."""
        return cls(neurons, seed)


class ProxyOptions(NamedTuple):
    """The `proxy` block of configs/report.yaml."""

    x: list[str] | None
    y: list[str] | None
    group_by: str | None
    min_runs: int
    n_bootstrap: int
    seed: int

    @classmethod
    def from_config(
        cls, *, x: list[str] | str | None, y: list[str] | str | None, group_by: str | None,
        min_runs: AtLeastThree, n_bootstrap: NonNegative, seed: NonNegative,
    ) -> "ProxyOptions":  # fmt: skip
        """Typed and in range; a lone metric need not be a list.

        Raises:
            ConfigError: too few resamples for an interval.
        """
        if 0 < n_bootstrap < FEWEST_RESAMPLES:
            raise ConfigError(
                f"proxy.n_bootstrap={n_bootstrap}: a 95% interval needs {FEWEST_RESAMPLES} or "
                "more; proxy.n_bootstrap=0 for none"
            )
        x, y = ([names] if isinstance(names, str) else names for names in (x, y))
        return cls(x, y, group_by, min_runs, n_bootstrap, seed)


class ReportOptions(NamedTuple):
    """What configs/report.yaml sets."""

    outputs: Path
    runs: list[str]
    out: Path | None
    x: str
    y: str
    metrics: list[str]
    compare: list[str]
    similarity: SimilarityOptions
    firing: FiringOptions
    attribution: AttributionOptions
    proxy: ProxyOptions

    @classmethod
    def from_config(
        cls, *, outputs: Name, runs: list[str] | str, out: str | None, x: str, y: str,
        metrics: list[str] | str, compare: list[Compared] | Compared,
        similarity: dict[str, Any], firing: dict[str, Any], attribution: dict[str, Any],
        proxy: dict[str, Any],
    ) -> "ReportOptions":  # fmt: skip
        """Typed; a lone run, metric or comparison need not be a list."""
        return cls(
            Path(outputs).expanduser(), [runs] if isinstance(runs, str) else runs,
            Path(out).expanduser() if out else None, x, y,
            [metrics] if isinstance(metrics, str) else metrics,
            [compare] if isinstance(compare, str) else list(dict.fromkeys(compare)),
            construct(SimilarityOptions.from_config, similarity, where="similarity"),
            construct(FiringOptions.from_config, firing, where="firing"),
            construct(AttributionOptions.from_config, attribution, where="attribution"),
            construct(ProxyOptions.from_config, proxy, where="proxy"),
        )  # fmt: skip
