"""Frozen networks under study, one kind of host per file; `type: name` is `models/<name>.py`."""

from sae_runner.config import Registry

MODELS = Registry("model", "sae_runner.models")
