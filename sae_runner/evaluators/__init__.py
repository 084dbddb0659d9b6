"""Measurements of a trained SAE, one family per file; `type: name` is `evaluators/<name>.py`."""

from sae_runner.config import Registry

EVALUATORS = Registry("evaluators", "sae_runner.evaluators")
