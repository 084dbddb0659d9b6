"""Who explains latents and predicts from explanations, one back-end per file."""

from sae_runner.config import Registry

EXPLAINERS = Registry("backend", "sae_runner.evaluators._explainers")
