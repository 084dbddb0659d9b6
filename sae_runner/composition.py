"""Configs composed without running a job; of a sweep all, as the basic sweeper will run them."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from string import Template
from typing import Any

from sae_runner.commands.job import Job, chosen, typed
from sae_runner.config import config_dir


class Composer:
    """Composes the configs that a command line means."""

    def __init__(self, command: str, words: Sequence[str]) -> None:
        from hydra._internal.utils import get_args_parser
        from hydra.core.override_parser.overrides_parser import OverridesParser

        self.arguments = get_args_parser().parse_args(list(words))
        self.name = self.arguments.config_name or command
        self.overrides = list(self.arguments.overrides)
        self.parser = OverridesParser.create()
        self.folders = [Path(config_dir())]
        if self.arguments.config_dir:
            self.folders.append(Path(self.arguments.config_dir).absolute())

    @property
    def fixed(self) -> list[str]:
        """The overrides that every job of a sweep has."""
        parsed = self.parser.parse_overrides(self.overrides)
        return [str(o.input_line) for o in parsed if not o.is_sweep_override()]

    def compose(self, overrides: Sequence[str]) -> Any:
        """One config, Hydra's own part included.

        Raises:
            HydraException, OmegaConfBaseException: it does not compose.
        """
        from hydra import compose

        searchpath = [f"hydra.searchpath=[file://{folder}]" for folder in self.folders[1:]]
        return compose(self.name, [*overrides, *searchpath], return_hydra_config=True)


@contextmanager
def composing(command: str, words: Sequence[str]) -> Iterator[Composer]:
    """Hydra, ready to compose; nothing of it stays."""
    from hydra import initialize_config_dir
    from hydra.core.global_hydra import GlobalHydra

    GlobalHydra.instance().clear()
    try:
        with initialize_config_dir(config_dir(), version_base="1.3"):
            yield Composer(command, words)
    finally:
        GlobalHydra.instance().clear()


def composed_jobs(command: str, words: Sequence[str]) -> list[Job]:
    """Every job that a command line means: one, or the product of its sweeps.

    Raises:
        HydraException, OmegaConfBaseException: a job does not compose.
    """
    from hydra._internal.core_plugins.basic_sweeper import BasicSweeper

    with composing(command, words) as composer:
        hydra = composer.compose(composer.fixed).hydra
        if not composer.arguments.multirun and "MULTIRUN" not in str(hydra.mode):
            return [job_of_composed(composer.compose(composer.overrides))]
        params = hydra.sweeper.get("params") or {}
        every = [f"{key}={value}" for key, value in params.items()] + composer.overrides
        batches = BasicSweeper.split_arguments(composer.parser.parse_overrides(every), None)
        return [job_of_composed(composer.compose(job)) for batch in batches for job in batch]


def keys_of(command: str) -> list[str]:
    """The keys and groups that a command takes."""
    with composing(command, []) as composer:
        cfg = composer.compose([])
    return sorted({*map(str, cfg), *chosen(cfg.hydra.runtime.choices)} - {"hydra"})


def help_page(command: str, words: Sequence[str]) -> str:
    """What `sae-run COMMAND --help` prints: groups, options and the composed config.

    It is Hydra's own page, by the templates of `hydra.help`; Hydra takes twice as long, most of it
    for copying its search path once for every group.
    """
    from omegaconf import OmegaConf, open_dict

    with composing(command, words) as composer:
        cfg = composer.compose(composer.fixed)
        template = Template(cfg.hydra.help.template)
        with open_dict(cfg):
            del cfg["hydra"]
        return template.substitute(
            APP_CONFIG_GROUPS=groups_of(composer.folders), CONFIG=OmegaConf.to_yaml(cfg)
        )


def groups_of(folders: Sequence[Path]) -> str:
    """A line for every config group below `folders`, with its options."""
    groups: dict[str, set[str]] = {}
    for folder in folders:
        for path in folder.glob("*/**/*.yaml"):
            group = path.parent.relative_to(folder).as_posix()
            if group.partition("/")[0] != "hydra":
                groups.setdefault(group, set()).add(path.stem)
    return "".join(f"{group}: {', '.join(sorted(groups[group]))}\n" for group in sorted(groups))


def job_of_composed(cfg: Any) -> Job:
    """The job of a config that was composed together with Hydra's own part."""
    from omegaconf import OmegaConf, open_dict

    choices = chosen(cfg.hydra.runtime.choices)
    overrides = typed(cfg.hydra.overrides.task)
    with open_dict(cfg):
        del cfg["hydra"]
    values: Any = OmegaConf.to_container(cfg, resolve=True)
    return Job(values, choices, overrides)
