"""The launcher itself. Hydra imports it to list plugins, so torch is imported only to launch."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hydra.core.utils import JobReturn, JobStatus, configure_log, filter_overrides, setup_globals
from hydra.plugins.launcher import Launcher
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig, open_dict


class TogetherLauncher(Launcher):
    """Trains all jobs that share a store over one stream of its batches."""

    def __init__(self, memory_gb: float | None = None) -> None:
        self.memory_gb = memory_gb
        self.config: DictConfig | None = None
        self.hydra_context: HydraContext | None = None

    def setup(
        self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig
    ) -> None:
        """Take what Hydra hands over; jobs are not run through the task function."""
        self.config, self.hydra_context = config, hydra_context

    def launch(
        self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int
    ) -> Sequence[JobReturn]:
        """Run the jobs of one batch of the sweep."""
        from sae_runner.cli import run_together

        setup_globals()
        assert self.config is not None and self.hydra_context is not None
        configure_log(self.config.hydra.hydra_logging, self.config.hydra.verbose)
        Path(str(self.config.hydra.sweep.dir)).mkdir(parents=True, exist_ok=True)
        loader = self.hydra_context.config_loader
        composed: list[Any] = []
        for index, overrides in enumerate(job_overrides):
            cfg = loader.load_sweep_config(self.config, list(overrides))
            with open_dict(cfg):
                cfg.hydra.job.id = cfg.hydra.job.num = initial_job_idx + index
            composed.append(cfg)
        found = []
        for cfg, overrides in zip(composed, job_overrides, strict=True):
            result = JobReturn(filter_overrides(overrides), cfg, cfg.hydra)
            # What fails is said, and is in the exit code: Hydra would raise it once more.
            result.status, result.return_value = JobStatus.COMPLETED, None
            found.append(result)
        run_together(str(self.config.hydra.job.name), composed, self.memory_gb)
        return found
