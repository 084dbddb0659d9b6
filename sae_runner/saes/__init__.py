"""Sparse autoencoders, one architecture per file; `type: name` in YAML is `saes/<name>.py`."""

from sae_runner.config import Registry

SAES = Registry("sae", "sae_runner.saes")
