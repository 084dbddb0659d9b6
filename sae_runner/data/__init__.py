"""Inputs of the models, one kind of dataset per file; `type: name` is `data/<name>.py`."""

from typing import TYPE_CHECKING, Any

from sae_runner.config import Registry, plain

if TYPE_CHECKING:
    from sae_runner.data.base import Dataset

DATASETS = Registry("dataset", "sae_runner.data")

# Read by whoever loads in the background, not by the datasets: the share of unreadable examples
# that is tolerated, and the number of loading threads.
COMMON_KEYS = frozenset({"max_bad", "workers"})


def build_dataset(cfg: Any, **runtime: Any) -> "Dataset":
    """The dataset that a `dataset` config describes. Run-time objects: `outputs` (Path)."""
    whole = plain(cfg)
    options = {k: v for k, v in whole.items() if k not in COMMON_KEYS}
    dataset: Dataset = DATASETS.build(options, **runtime)
    if "max_bad" in whole:
        dataset.max_bad = whole["max_bad"]
    return dataset
