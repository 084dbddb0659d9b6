"""`hydra/launcher=together`: the jobs of a `train` sweep in one process, over shared batches."""

from dataclasses import dataclass

from hydra.core.config_store import ConfigStore
from hydra_plugins.sae_runner_together.launcher import TogetherLauncher as TogetherLauncher


@dataclass
class TogetherConf:
    """Options of the launcher."""

    _target_: str = "hydra_plugins.sae_runner_together.launcher.TogetherLauncher"
    memory_gb: float | None = None
    """What the SAEs that train at once may take; null: most of what is free."""


ConfigStore.instance().store(
    group="hydra/launcher", name="together", node=TogetherConf, provider="sae_runner"
)
