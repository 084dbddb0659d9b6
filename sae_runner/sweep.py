"""The jobs of a sweep, composed without running any, as Hydra's basic sweeper will run them."""

from collections.abc import Sequence
from typing import Any

from sae_runner.commands.job import Job, chosen


def composed_jobs(command: str, words: Sequence[str]) -> list[Job]:
    """Every job that a command line means: one, or the product of its sweeps.

    Raises:
        HydraException, OmegaConfBaseException: a job does not compose.
    """
    from hydra import compose, initialize_config_dir
    from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
    from hydra._internal.utils import get_args_parser
    from hydra.core.global_hydra import GlobalHydra
    from hydra.core.override_parser.overrides_parser import OverridesParser

    from sae_runner.config import config_dir

    arguments = get_args_parser().parse_args(list(words))
    overrides = list(arguments.overrides)
    parser = OverridesParser.create()
    GlobalHydra.instance().clear()
    searchpath = []
    if arguments.config_dir:
        searchpath = [f"hydra.searchpath=[file://{_absolute(arguments.config_dir)}]"]
    try:
        with initialize_config_dir(config_dir(), version_base="1.3"):
            name = arguments.config_name or command
            parsed = parser.parse_overrides(overrides)
            fixed = [str(o.input_line) for o in parsed if not o.is_sweep_override()]
            cfg = compose(name, [*fixed, *searchpath], return_hydra_config=True)
            params = cfg.hydra.sweeper.get("params") or {}
            if not arguments.multirun and "MULTIRUN" not in str(cfg.hydra.mode):
                return [
                    job_of_composed(
                        compose(name, [*overrides, *searchpath], return_hydra_config=True)
                    )
                ]
            every = [f"{key}={value}" for key, value in params.items()] + overrides
            batches = BasicSweeper.split_arguments(parser.parse_overrides(every), None)
            return [
                job_of_composed(compose(name, [*job, *searchpath], return_hydra_config=True))
                for batch in batches
                for job in batch
            ]
    finally:
        GlobalHydra.instance().clear()


def _absolute(path: str) -> str:
    from pathlib import Path

    return str(Path(path).absolute())


def job_of_composed(cfg: Any) -> Job:
    """The job of a config that was composed together with Hydra's own part."""
    from omegaconf import OmegaConf, open_dict

    choices = chosen(cfg.hydra.runtime.choices)
    overrides = list(cfg.hydra.overrides.task)
    with open_dict(cfg):
        del cfg["hydra"]
    values: Any = OmegaConf.to_container(cfg, resolve=True)
    return Job(values, choices, overrides)
