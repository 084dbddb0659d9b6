"""`sae-run eval`: measure a checkpoint on held-out data in shared passes; write report.json."""

import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from sae_runner import files
from sae_runner.checkpoint import find_checkpoint, load_sae, read_facts, step_dirs
from sae_runner.commands.cache import ensure_store
from sae_runner.commands.entries import read_config
from sae_runner.commands.envelopes import envelope_of, is_current
from sae_runner.commands.foreign import (
    GROUP,
    WITHOUT_TRAINING,
    as_run,
    foreign_pipeline,
    is_elsewhere,
)
from sae_runner.commands.job import Job
from sae_runner.commands.passes import context_of, input_pass
from sae_runner.commands.pipeline import Pipeline
from sae_runner.config import resolve_device
from sae_runner.errors import ConfigError, Incomplete, InputError, StoreError
from sae_runner.evaluators._shared_pass import measure
from sae_runner.evaluators.base import Evaluator, Findings
from sae_runner.log import log_to, working
from sae_runner.report.assemble import report_path, write_findings, write_report
from sae_runner.report.figures import draw_run
from sae_runner.report.schema import check_envelope, load_report

log = logging.getLogger("sae_runner")

# What config.yaml keeps besides the configuration.
RECORD_KEYS = ("identity", "choices", "overrides", "code_version")
SETTLED = ("d_sae", "expansion", "k")
"""Options of an SAE that its run's identity has in one form, however they were typed."""


def check(job: Job) -> None:
    """Refuse what can be refused ahead."""
    pipeline_of(job).check()


@working("eval")
def main(job: Job) -> None:
    """Evaluate the checkpoint that `checkpoint=` names, with the evaluators of this command."""
    pipeline = pipeline_of(job)
    pipeline.check()
    folder = find_checkpoint(asked_checkpoint(job))
    is_foreign = is_elsewhere(folder, job)
    run_dir = pipeline.run_dir if is_foreign else folder.parent.parent
    with files.locked(run_dir):
        run_dir.mkdir(parents=True, exist_ok=True)
        with log_to(run_dir / "run.log"):
            rows = is_foreign or bool(unmeasured(run_dir, pipeline, folder, pipeline.root.force))
            if rows and pipeline.store_options.kind == "disk":
                ensure_store(pipeline)
                pipeline.release_model()
            if is_foreign:
                folder = as_run(folder, run_dir, pipeline, job)
            evaluate(run_dir, pipeline, force=pipeline.root.force, folder=folder)


def asked_checkpoint(job: Job) -> str:
    """What `checkpoint=` means: a path, or the name of a run below `outputs`."""
    checkpoint = job.cfg.get("checkpoint")
    if not checkpoint:
        raise ConfigError(
            "'checkpoint' needs a value: checkpoint=RUN_DIR (`sae-run ls` lists them)"
        )
    given, runs = str(checkpoint), Path(str(job.cfg.get("outputs") or "outputs")) / "train"
    is_name = not Path(given).exists() and not set(given) & set("/:") and runs.is_dir()
    return str(runs / given) if is_name else given


def run_record(run_dir: Path) -> dict[str, Any]:
    """config.yaml of a run.

    Raises:
        StoreError: it is absent or damaged.
    """
    path = run_dir / "config.yaml"
    if not path.is_file():
        raise StoreError(f"checkpoint={run_dir}: it has no config.yaml, so its data are unknown")
    record = read_config(path)
    if record is None or not record.keys() >= set(RECORD_KEYS):
        raise StoreError(
            f"{path} is damaged: `sae-run rm {run_dir}` removes the run, and `sae-run train` with "
            "force=true begins it again"
        )
    return record


def pipeline_of(job: Job) -> Pipeline:
    """The pipeline of the run that a checkpoint belongs to, with this command's options.

    Another library's SAE belongs to none, and with `model=` one of ours is measured elsewhere: the
    command says whose activations these are.
    """
    folder = find_checkpoint(asked_checkpoint(job))
    elsewhere = is_elsewhere(folder, job)
    pipeline = foreign_pipeline(folder, job) if elsewhere else _of_run(folder, job)
    pipeline.measured = str(read_facts(folder)["sha256"]["sae.safetensors"])
    return pipeline


def _of_run(folder: Path, job: Job) -> Pipeline:
    """The activations that a checkpoint was trained on."""
    if given := [word for word in job.overrides if GROUP.match(word)]:
        raise ConfigError(
            f"{given[0]}: {job.cfg['checkpoint']} is measured on what it was trained on; "
            "model=… with dataset=… names something else"
        )
    run = {**WITHOUT_TRAINING, **run_record(folder.parent.parent)}
    # What has become an option of training since says nothing about what was trained.
    run["trainer"] = {**WITHOUT_TRAINING["trainer"], **run["trainer"]}
    own = {key: job.cfg[key] for key in ("evaluators", "eval", "device", "force")}
    outputs = job.cfg.get("outputs") or run["outputs"]
    # A run's start may be gone by now; what it was is in its identity.
    cfg = {k: v for k, v in run.items() if k not in (*RECORD_KEYS, "init_from")}
    return Pipeline({**cfg, **own, "outputs": outputs}, run["choices"])


def evaluate(run_dir: Path, pipeline: Pipeline, *, force: bool, folder: Path | None = None) -> None:
    """Run the evaluators that have not been run on a checkpoint yet, then write the report."""
    folder = folder or find_checkpoint(run_dir)
    eval_dir, facts = run_dir / "eval" / folder.name, read_facts(folder)
    todo = unmeasured(run_dir, pipeline, folder, force)
    for name in pipeline.evaluators:
        if name not in todo:
            log.info("evaluator %s is done", name)
    path = report_path(run_dir, folder.name, last=folder.name == step_dirs(run_dir)[-1].name)
    if not todo and _is_reported(path, eval_dir, pipeline):
        if path.parent == run_dir and not (run_dir / "figures").is_dir():
            draw_run(run_dir)  # It was stopped between the two.
        return log.info("report is there: %s", path)
    failures, unfinished = measured(todo, pipeline, folder, eval_dir) if todo else ({}, {})
    record = run_record(run_dir)
    write_report(
        path,
        run_dir,
        facts,
        folder.name,
        config={
            **{k: v for k, v in record.items() if k not in RECORD_KEYS},
            "sae": {**record["sae"], **settled(record)},
            "evaluators": {**record["evaluators"], **pipeline.cfg["evaluators"]},
            "eval": pipeline.cfg["eval"],
            "expected": pipeline.cfg.get("expected"),
        },
        choices=pipeline.choices,
        overrides=list(record["overrides"]),
        wanted=list(pipeline.evaluators),
        extra_versions={"threads": str(torch.get_num_threads())},
        warnings=[
            *(f"evaluator {name} failed: {first_line(e)}" for name, e in failures.items()),
            *(f"evaluator {name} is incomplete: {why}" for name, why in unfinished.items()),
        ],
    )
    if path.parent == run_dir:
        draw_run(run_dir)
    refuse_failures(failures, unfinished)


def measured(
    todo: Mapping[str, Evaluator], pipeline: Pipeline, folder: Path, eval_dir: Path
) -> tuple[dict[str, Exception], dict[str, str]]:
    """Run evaluators on a checkpoint and keep what each finds; what failed, and what did in part.

    Raises:
        StoreError: the checkpoint is not of these activations.
    """
    store, facts = pipeline.open_store(), read_facts(folder)
    if store.d_in != facts["d_in"]:
        raise StoreError(
            f"checkpoint={folder}: its d_in is {facts['d_in']}, the store's is {store.d_in}"
        )
    sae = load_sae(folder).to(resolve_device(pipeline.root.device))
    options, context = pipeline.eval_options, context_of(sae, store, pipeline)
    unfinished: dict[str, str] = {}

    def keep(name: str, findings: Findings, cost: dict[str, Any]) -> None:
        envelope = envelope_of(name, todo[name], findings, pipeline, facts, folder, cost)
        check_envelope(envelope, name)
        write_findings(eval_dir, name, findings)
        files.write_json(eval_dir / f"{name}.json", envelope)
        for part in findings.texts:  # Which are there to be opened.
            log.info("%s: %s", name, eval_dir / name / part)
        if findings.incomplete:
            unfinished[name] = findings.incomplete

    failures = measure(
        todo,
        store.rows("heldout", options.batch_size, options.n_rows),
        context,
        keep,
        inputs=input_pass(store, pipeline, len(context.example_ids)),
        keep_bytes=options.keep_bytes,
        folder=eval_dir,
    )
    for name, error in failures.items():
        known = isinstance(error, InputError)
        log.error("evaluator %s failed: %s", name, error, exc_info=None if known else error)
    return failures, unfinished


def refuse_failures(failures: Mapping[str, Exception], unfinished: Mapping[str, str]) -> None:
    """End the command with what could not be measured, once all the rest is written.

    Raises:
        InputError: what was given is all that is wrong.
        Incomplete: something else went wrong.
    """
    lines = [f"evaluators.{name}: {first_line(error)}" for name, error in failures.items()]
    lines += [f"evaluators.{name}: {why}" for name, why in unfinished.items()]
    if not lines:
        return
    what = "; ".join(lines) + "; the others' results are kept"
    bad_input = not unfinished and all(isinstance(e, InputError) for e in failures.values())
    raise (ConfigError(what) if bad_input else Incomplete(what))


def first_line(error: Exception) -> str:
    """What an error says, in a line; its class where that is all there is."""
    text = " ".join(str(error).split())
    return text if isinstance(error, InputError) else f"{type(error).__name__}: {text}"


def unmeasured(
    run_dir: Path, pipeline: Pipeline, folder: Path, force: bool
) -> dict[str, Evaluator]:
    """The evaluators that have not been run on a checkpoint yet, or all."""
    eval_dir, facts = run_dir / "eval" / folder.name, read_facts(folder)
    return {
        name: evaluator
        for name, evaluator in pipeline.evaluators.items()
        if force or not is_current(eval_dir / f"{name}.json", pipeline, name, evaluator, facts)
    }


def settled(record: Mapping[str, Any]) -> dict[str, Any]:
    """Width and k of a run's SAE, as numbers."""
    return {key: value for key, value in record["identity"]["sae"].items() if key in SETTLED}


def _is_reported(path: Path, eval_dir: Path, pipeline: Pipeline) -> bool:
    """Whether the report is there, sound, and says what the evaluators' files say."""
    try:
        report = load_report(path)
    except StoreError:
        return False
    on_disk = {p.stem: json.loads(p.read_text()) for p in eval_dir.glob("*.json")}
    on_disk.pop("report", None)
    same: bool = report["run"]["checkpoint"] == eval_dir.name and report["evaluators"] == on_disk
    return same and report["config"].get("expected") == pipeline.cfg.get("expected")
