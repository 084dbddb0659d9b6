"""`sae-run cache`: run a model once over a dataset and keep activations of one or many sites."""

import logging
from itertools import groupby
from pathlib import Path

from sae_runner import files
from sae_runner.commands.job import Job
from sae_runner.commands.pipeline import Pipeline
from sae_runner.data.base import Dataset
from sae_runner.errors import ConfigError, StoreError
from sae_runner.log import working
from sae_runner.models.base import SiteInfo
from sae_runner.store.manifest import REMEDY, STORE_SCHEMA, is_complete, read_json
from sae_runner.store.reader import ActivationStore
from sae_runner.store.writer import begin_store, estimate_bytes, write_selections

log = logging.getLogger("sae_runner")


def check(job: Job) -> None:
    """Refuse what can be refused ahead."""
    pipeline = Pipeline(job.cfg, job.choices)
    pipeline.check(train=False)
    if pipeline.store_options.kind == "stream":
        raise ConfigError("store=stream keeps nothing on disk; `cache` needs store=disk")
    require_space(pipeline, force=pipeline.root.force)


@working("cache")
def main(job: Job) -> None:
    """Write the store of a composed config."""
    check(job)
    pipeline = Pipeline(job.cfg, job.choices)
    ensure_store(pipeline, force=pipeline.root.force)


def ensure_store(pipeline: Pipeline, *, force: bool = False) -> None:
    """Write the selections that are not there yet; several processes wait for each other.

    Raises:
        StoreError: the store that is there was written from other data or other local weights.
    """
    infos, folder = pipeline.infos, pipeline.store_dir
    if not force and is_cached(pipeline):
        check_unchanged(pipeline)
        log.info("store %s is complete", folder)
        return
    require_space(pipeline, force=force)
    with files.locked(folder):
        found = [info for info in infos if is_complete(pipeline.selection_dir(info))]
        missing = infos if force else [info for info in infos if info not in found]
        if not missing:
            log.info("store %s is complete: another process wrote it", folder)
            return
        model, dataset = pipeline.model, pipeline.dataset
        files.require_space(pipeline.outputs, bytes_of(pipeline, missing, dataset), "store needs")
        names = {"model": pipeline.choices["model"], "dataset": pipeline.choices["dataset"]}
        if force and missing == infos and not _others(pipeline):
            files.remove(folder / "store.json")  # Nothing else in the store is of its old source.
        begin_store(folder, model, dataset, pipeline.store_identity, names, pipeline.source)
        if force:
            for info in missing:
                files.remove(pipeline.selection_dir(info))
        # Sites whose examples give the same tokens share windows, row order and one pass.
        missing.sort(key=pipeline.layout)
        for _, group in groupby(missing, key=pipeline.layout):
            write(pipeline, list(group))
    log.info("store %s holds %d selection%s", folder, len(infos), "s" * (len(infos) != 1))


def is_cached(pipeline: Pipeline) -> bool:
    """Whether every selection is written to its end."""
    return all(is_complete(pipeline.selection_dir(info)) for info in pipeline.infos)


def _others(pipeline: Pipeline) -> list[Path]:
    """Selections in the store that this command does not name."""
    own = {pipeline.selection_dir(info) for info in pipeline.infos}
    return [p.parent for p in pipeline.store_dir.glob("*/manifest.json") if p.parent not in own]


def write(pipeline: Pipeline, sites: list[SiteInfo]) -> None:
    """One pass of the model over the data for sites that share rows."""
    log.info("caching %s", ", ".join(info.name for info in sites))
    options, loading = pipeline.store_options, pipeline.loading
    write_selections(
        pipeline.store_dir, pipeline.model, pipeline.dataset, sites, pipeline.selection,
        pipeline.plan(sites[0]), dtype=options.dtype, batch_size=loading.batch_size,
        workers=loading.workers, max_bad=loading.max_bad,
    )  # fmt: skip


@working("comparing the store with its source")
def check_unchanged(pipeline: Pipeline) -> None:
    """Compare the source of a finished store with the data and local weights there are now.

    Raises:
        StoreError: they differ, or the store is damaged, as far as that is seen without its rows.
    """
    for info in pipeline.infos:
        ActivationStore(pipeline.selection_dir(info))
    store = read_json(pipeline.store_dir / "store.json", STORE_SCHEMA, "activation store")
    for what, now in pipeline.source.items():
        if store.get("source", {}).get(what, now) != now:
            raise StoreError(
                f"{pipeline.store_dir} was written from other {what} than there are now: {REMEDY}, "
                "or set outputs=DIR"
            )


def require_space(pipeline: Pipeline, *, force: bool = False) -> int:
    """Refuse rows that will not fit, as far as that is known ahead; the bytes that are to come.

    Raises:
        InputError: they will not.
    """
    if pipeline.store_options.kind == "stream" or pipeline.raw_dataset.modality == "text":
        return 0  # What text gives is known once it is packed.
    missing = [i for i in pipeline.infos if force or not is_complete(pipeline.selection_dir(i))]
    needed = bytes_of(pipeline, missing, pipeline.raw_dataset)
    files.require_space(pipeline.outputs, needed, "store needs")
    return needed


def bytes_of(pipeline: Pipeline, missing: list[SiteInfo], dataset: Dataset) -> int:
    """What is not yet on disk of selections; of text only what is sure to be written counts."""
    needed, dtype = 0, pipeline.store_options.dtype
    for info in missing:
        rows = pipeline.rows_per_example(info) if info.n_tokens else 1
        needed += estimate_bytes(pipeline.plan(info, dataset), rows, info.d, dtype)
        folder = pipeline.selection_dir(info)
        needed -= files.folder_bytes(folder) if folder.exists() else 0
    return needed
