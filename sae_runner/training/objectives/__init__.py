"""What a step of training minimises, one objective per file."""

from sae_runner.config import Registry

OBJECTIVES = Registry("trainer.objective", "sae_runner.training.objectives")
