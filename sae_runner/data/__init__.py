"""Inputs of the models, one kind of dataset per file; `type: name` is `data/<name>.py`."""

from sae_runner.config import Registry

DATASETS = Registry("dataset", "sae_runner.data")
