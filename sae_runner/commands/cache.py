"""`sae-run cache`: run a model once over a dataset and keep activations of one or many sites."""

import logging
from itertools import groupby

from sae_runner import files
from sae_runner.commands.job import Job
from sae_runner.commands.pipeline import Pipeline
from sae_runner.errors import ConfigError
from sae_runner.store.manifest import is_complete
from sae_runner.store.writer import begin_store, estimate_bytes, write_selections

log = logging.getLogger("sae_runner")


def check(job: Job) -> None:
    """Refuse what can be refused ahead."""
    Pipeline(job.cfg, job.choices).check(train=False)


def main(job: Job) -> None:
    """Write the store of a composed config."""
    pipeline = Pipeline(job.cfg, job.choices)
    pipeline.check(train=False)
    if pipeline.store_options.kind == "stream":
        raise ConfigError("store=stream keeps nothing on disk; `cache` needs store=disk")
    ensure_store(pipeline, force=bool(job.cfg["force"]))


def ensure_store(pipeline: Pipeline, *, force: bool = False) -> None:
    """Write the selections that are not there yet; several processes wait for each other."""
    infos = pipeline.infos
    if not force and all(is_complete(pipeline.selection_dir(info)) for info in infos):
        log.info("store %s is complete", pipeline.store_dir)
        return
    with files.locked(pipeline.store_dir):
        if force:
            for info in infos:
                files.remove(pipeline.selection_dir(info))
        missing = [info for info in infos if not is_complete(pipeline.selection_dir(info))]
        if not missing:
            log.info("store %s is complete: another process wrote it", pipeline.store_dir)
            return
        model, dataset = pipeline.model, pipeline.dataset
        options, loading = pipeline.store_options, pipeline.loading
        names = {"model": pipeline.choices["model"], "dataset": pipeline.choices["dataset"]}
        needed = sum(
            estimate_bytes(
                pipeline.plan(i), pipeline.rows_per_example(i), i.d, pipeline.store_options.dtype
            )
            for i in missing
        )
        written = sum(
            files.folder_bytes(pipeline.selection_dir(i))
            for i in missing
            if pipeline.selection_dir(i).exists()
        )
        files.require_space(pipeline.outputs, needed - written, "store")
        begin_store(pipeline.store_dir, model, dataset, pipeline.store_identity, names)
        # Sites whose examples give equally many rows share windows, row order and one pass.
        missing.sort(key=pipeline.rows_per_example)
        for _, group in groupby(missing, key=pipeline.rows_per_example):
            sites = list(group)
            log.info("caching %s", ", ".join(info.name for info in sites))
            write_selections(
                pipeline.store_dir, model, dataset, sites, pipeline.selection,
                pipeline.plan(sites[0]), dtype=options.dtype, batch_size=loading.batch_size,
                workers=loading.workers, max_bad=loading.max_bad,
            )  # fmt: skip
    log.info("store %s holds %d selections", pipeline.store_dir, len(infos))
