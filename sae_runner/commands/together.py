"""The jobs of a `train` sweep in one process: those that share a store share its batches."""

import contextlib
import itertools
import json
import logging
from collections.abc import Iterator, Sequence
from typing import Any

from sae_runner import files
from sae_runner.commands import memory, objectives
from sae_runner.commands.cache import ensure_store
from sae_runner.commands.eval import evaluate
from sae_runner.commands.job import Job
from sae_runner.commands.pipeline import Pipeline
from sae_runner.commands.train import (
    begin_run,
    check,
    is_trained,
    make_room,
    remove_if_empty,
    trainer_of,
)
from sae_runner.config import resolve_device
from sae_runner.errors import ConfigError
from sae_runner.log import log_to, speaking, working
from sae_runner.store.activations import Activations
from sae_runner.training.together import run_together
from sae_runner.training.trainer import Trainer

log = logging.getLogger("sae_runner")
SHARE = 0.8
"""Of the memory that is free, so much is filled."""


class Run:
    """One job on its way: what it is, where it lies, and what went wrong with it."""

    def __init__(self, job: Job) -> None:
        self.job, self.error = job, None
        self.pipeline = Pipeline(job.cfg, job.choices)
        self.folder = self.pipeline.run_dir
        self.trainer: Trainer | None = None

    error: Exception | None

    @contextlib.contextmanager
    def attempt(self) -> Iterator[None]:
        """Keep what goes wrong inside the block; the log is this run's."""
        with speaking(self.folder / "run.log"):
            try:
                yield
            except Exception as error:
                log.debug("failed", exc_info=True)
                self.error = error
                remove_if_empty(self.folder)

    @property
    def stream(self) -> str:
        """Equal for runs that see the same batches on the same device."""
        pipeline = self.pipeline
        facts = {
            "sites": [str(pipeline.selection_dir(info)) for info in pipeline.infos],
            "reading": pipeline.store_options._asdict(),
            "batch_size": pipeline.train_options.batch_size,
            "device": resolve_device(pipeline.root.device),
        }
        return json.dumps(facts, sort_keys=True, default=str)


@working("train")
def main(jobs: Sequence[Job], memory_gb: float | None) -> list[Exception | None]:
    """Train and evaluate all jobs; what each failed of, or None.

    Args:
        jobs: of one `train` sweep.
        memory_gb: what the SAEs that train at once may take; None: most of what is free.

    Raises:
        ConfigError: a job trains on inputs, not on rows that others could share.
    """
    runs = [Run(job) for job in jobs]
    if any(objectives.runs_the_model(run.pipeline) for run in runs):
        raise ConfigError(
            "hydra/launcher=together: trainer/objective=e2e has no batches to share; use basic"
        )
    for run in runs:
        with run.attempt():
            check(run.job)
            if run.pipeline.store_options.kind == "disk":
                ensure_store(run.pipeline)
                run.pipeline.release_model()
    once = {run.folder: run for run in runs if run.error is None}  # Two jobs may be one run.
    going = sorted(once.values(), key=lambda run: run.stream)
    for _, sharing in itertools.groupby(going, key=lambda run: run.stream):
        for group in groups_that_fit(list(sharing), memory_gb):
            train_group(group)
    for run in runs:
        run.error = run.error or once[run.folder].error if run.folder in once else run.error
    return [run.error for run in runs]


def groups_that_fit(runs: list[Run], memory_gb: float | None) -> list[list[Run]]:
    """Runs in the order given, cut where their estimates add up to more than there is."""
    device = resolve_device(runs[0].pipeline.root.device)
    free = memory.free_on(device) if device != "cpu" else memory.free_memory()
    limit = memory_gb * 1e9 if memory_gb is not None else SHARE * (free or float("inf"))
    groups: list[list[Run]] = []
    taken = 0.0
    for run in runs:
        sae = run.pipeline.build_sae(run.pipeline.site.d, device="meta")
        needed = memory.sum_on_device(memory.training(run.pipeline, sae, 0))
        if not groups or taken + needed > limit:
            groups.append([])
            taken = 0.0
        groups[-1].append(run)
        taken += needed
    return groups


def train_group(runs: list[Run]) -> None:
    """Train runs that share a stream, then evaluate each."""
    runs = sorted(runs, key=lambda run: run.folder)  # Locks in one order: no two wait in a ring.
    with contextlib.ExitStack() as held:
        for run in runs:
            held.enter_context(files.locked(run.folder))
            with run.attempt():
                make_room(run.folder, run.pipeline.root.force)
                held.enter_context(log_to(run.folder / "run.log"))
                begin_run(run.folder, run.pipeline, run.job)
        train([run for run in runs if run.error is None])
        for run in runs:
            if run.error is None:
                with run.attempt():
                    evaluate(run.folder, run.pipeline, force=False)
                    log.info("run %s", run.folder)


def train(runs: list[Run]) -> None:
    """Train those that are not trained; those that stand at one place of the stream together."""
    store: Activations | None = None
    for run in runs:
        with run.attempt():
            if not is_trained(run.folder, run.pipeline):
                store = store or run.pipeline.open_store()
                run.trainer = trainer_of(run.folder, run.pipeline, store)
    waiting = {run.trainer: run for run in runs if run.trainer is not None and run.error is None}

    def failed(trainer: Trainer, error: Exception) -> None:
        waiting[trainer].error = error

    def place(trainer: Trainer) -> tuple[Any, ...]:
        return trainer.step, trainer.position.epoch, trainer.position.group, trainer.position.offset

    for _, together in itertools.groupby(sorted(waiting, key=place), key=place):
        run_together(list(together), failed)
    for run in runs:
        run.trainer = None  # Its memory goes to the next group.
