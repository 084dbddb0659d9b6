"""`sae-run eval`: measure a checkpoint on held-out rows in one shared pass; write report.json."""

import datetime
import importlib.metadata
import json
import logging
import platform
import resource
import subprocess
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

from sae_runner import __version__, files
from sae_runner.checkpoint import find_checkpoint, load_sae, read_facts
from sae_runner.commands.job import Job
from sae_runner.commands.pipeline import Pipeline
from sae_runner.config import plain, resolve_device
from sae_runner.errors import ConfigError, StoreError
from sae_runner.evaluators.base import EvalContext, Evaluator, Findings, Rows
from sae_runner.log import Progress, log_to
from sae_runner.report.expected import judge
from sae_runner.report.schema import (
    EVAL_SCHEMA,
    REPORT_SCHEMA,
    check_envelope,
    check_report,
    flat_ci,
    flat_metrics,
    load_report,
)
from sae_runner.saes.base import SAE
from sae_runner.store.reader import Activations, ActivationStore

log = logging.getLogger("sae_runner")
RECORD_KEYS = ("identity", "choices", "overrides", "code_version")
PACKAGES = ("torch", "numpy", "safetensors", "hydra-core", "open_clip_torch", "timm",
            "transformers", "transformer-lens", "datasets")  # fmt: skip


def check(job: Job) -> None:
    """Refuse what can be refused ahead."""
    find_checkpoint(_asked(job))
    pipeline_of(job).check()


def main(job: Job) -> None:
    """Evaluate the checkpoint that `checkpoint=` names, with the evaluators of this command."""
    pipeline = pipeline_of(job)
    pipeline.check()
    folder = find_checkpoint(_asked(job))
    run_dir = folder.parent.parent
    with files.locked(run_dir), log_to(run_dir / "run.log"):
        if pipeline.store_options.kind == "disk":
            from sae_runner.commands.cache import ensure_store

            ensure_store(pipeline)
        evaluate(
            run_dir, pipeline, job.cfg["evaluators"], force=bool(job.cfg["force"]), folder=folder
        )


def _asked(job: Job) -> str:
    checkpoint = job.cfg.get("checkpoint")
    if not checkpoint:
        raise ConfigError(
            "'checkpoint' needs a value: checkpoint=RUN_DIR (`sae-run ls` lists them)"
        )
    return str(checkpoint)


def pipeline_of(job: Job) -> Pipeline:
    """The pipeline of the run that a checkpoint belongs to, with this command's options."""
    from omegaconf import OmegaConf

    run_dir = find_checkpoint(_asked(job)).parent.parent
    path = run_dir / "config.yaml"
    if not path.is_file():
        raise StoreError(f"checkpoint={_asked(job)}: {run_dir} has no config.yaml")
    run: Any = OmegaConf.to_container(OmegaConf.load(path))
    own = {key: job.cfg[key] for key in ("evaluators", "eval", "device", "force")}
    outputs = job.cfg.get("outputs") or run["outputs"]
    return Pipeline({**run, **own, "outputs": outputs}, run["choices"])


def evaluate(
    run_dir: Path,
    pipeline: Pipeline,
    wanted: dict[str, Any],
    *,
    force: bool,
    folder: Path | None = None,
) -> None:
    """Run the evaluators that have not been run on a checkpoint yet, then write the report."""
    folder = folder or find_checkpoint(run_dir)
    eval_dir = run_dir / "eval" / folder.name
    facts = read_facts(folder)
    todo = {}
    for name, evaluator in pipeline.evaluators.items():
        path = eval_dir / f"{name}.json"
        if not force and _is_current(path, pipeline, name, evaluator):
            log.info("evaluator %s is done", name)
        else:
            todo[name] = evaluator
    store = pipeline.open_store()
    if store.d_in != facts["d_in"]:
        raise StoreError(
            f"checkpoint={folder}: its d_in is {facts['d_in']}, the store's is {store.d_in}"
        )
    if todo:
        sae = load_sae(folder).to(resolve_device(pipeline.cfg["device"]))
        found, cost = shared_pass(sae, store, todo, pipeline)
        for name, findings in found.items():
            envelope = envelope_of(name, todo[name], findings, pipeline, facts, folder, cost)
            check_envelope(envelope, name)
            if findings.per_latent:
                envelope["artifacts"]["per_latent"] = f"{name}.parquet"
                write_columns(eval_dir / f"{name}.parquet", findings.per_latent)
            files.write_json(eval_dir / f"{name}.json", envelope)
    elif _reported(run_dir, folder, list(wanted)):
        return log.info("report is there: %s", run_dir / "report.json")
    write_report(run_dir, pipeline, facts, folder, list(wanted))


def _reported(run_dir: Path, folder: Path, wanted: list[str]) -> bool:
    """Whether report.json is there, sound, and of this checkpoint and these evaluators."""
    try:
        report = load_report(run_dir)
    except StoreError:
        return False
    same: bool = report["run"]["checkpoint"] == folder.name
    return same and set(wanted) <= set(report["evaluators"])


def _is_current(path: Path, pipeline: Pipeline, name: str, evaluator: Evaluator) -> bool:
    """Whether an envelope was made by the same evaluator, options and rows."""
    try:
        envelope = json.loads(path.read_text())
        check_envelope(envelope, str(path))
    except FileNotFoundError:
        return False
    except ValueError as error:
        log.warning("%s is measured again: %s", name, error)
        return False
    same: bool = envelope["evaluator_version"] == evaluator.version and envelope[
        "config"
    ] == _config_of(pipeline, name)
    return same


def _config_of(pipeline: Pipeline, name: str) -> dict[str, Any]:
    return {**plain(pipeline.cfg["evaluators"][name]), "eval": pipeline.eval_options._asdict()}


@torch.no_grad()
def shared_pass(
    sae: SAE, store: Activations, evaluators: dict[str, Evaluator], pipeline: Pipeline
) -> tuple[dict[str, Findings], dict[str, Any]]:
    """Hand every evaluator the same held-out rows, read and encoded once."""
    options = pipeline.eval_options
    n_rows = min(options.n_rows or store.n_rows("heldout"), store.n_rows("heldout"))
    ids = (
        store.example_ids("heldout")
        if isinstance(store, ActivationStore)
        else np.sort(pipeline.dataset.ids("heldout"))
    )
    mean = store.heldout_mean()
    device = next(sae.parameters()).device
    context = EvalContext(
        sae=sae,
        n_rows=n_rows,
        example_ids=ids,
        seed=options.seed,
        mean=None if mean is None else mean.to(device),
        n_prefix=store.site.n_prefix,
        has_cls=store.site.has_cls,
        dataset=lambda: pipeline.dataset,
        model=lambda: pipeline.model,
    )
    for evaluator in evaluators.values():
        evaluator.start(context)
    started = time.perf_counter()
    progress = Progress("eval", n_rows, "rows")
    for rows in store.rows("heldout", options.batch_size, options.n_rows):
        x = rows.x.to(device)
        output = sae(x)
        shared = Rows(x, output.latents, output.x_hat, rows.example_id, rows.position, rows.label)
        for evaluator in evaluators.values():
            evaluator.update(shared)
        progress.advance(len(x))
    progress.close()
    found = {name: evaluator.finish() for name, evaluator in evaluators.items()}
    cost = {
        "wall_s": round(time.perf_counter() - started, 3),
        "sae_encodes": n_rows,
        "shared_with": sorted(evaluators),
        "peak_rss_mib": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024, 1),
    }
    return found, cost


def envelope_of(
    name: str,
    evaluator: Evaluator,
    findings: Findings,
    pipeline: Pipeline,
    facts: dict[str, Any],
    folder: Path,
    cost: dict[str, Any],
) -> dict[str, Any]:
    """An evaluator's findings with everything needed to know what they are of."""
    site = pipeline.site
    return {
        "schema": EVAL_SCHEMA,
        "evaluator": name,
        "type": str(pipeline.cfg["evaluators"][name]["type"]),
        "evaluator_version": evaluator.version,
        "axis": evaluator.axis,
        "run_id": folder.parent.parent.name,
        "timestamp_utc": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "seed": pipeline.eval_options.seed,
        "host": facts["model"],
        "site": {"name": site.name, "module": site.module, "d": site.d, "tokens": facts["tokens"]},
        "sae": {
            **facts["sae"],
            "checkpoint": folder.name,
            "sha256": facts["sha256"]["sae.safetensors"],
        },
        "data": {**facts["dataset"], "split": "heldout"},
        "config": _config_of(pipeline, name),
        "metrics": findings.metrics,
        "ci": findings.ci,
        "notes": [note._asdict() for note in findings.notes],
        "series": findings.series,
        "artifacts": {},
        "cost": cost,
    }  # fmt: skip


def write_columns(path: Path, columns: dict[str, Any]) -> None:
    """One row a latent, keyed by `feature`."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    n = len(next(iter(columns.values())))
    table = pa.table({"feature": np.arange(n, dtype=np.int32), **columns})
    with files.atomic(path) as temporary:
        pq.write_table(table, temporary, compression="zstd", row_group_size=8192)


def write_report(
    run_dir: Path, pipeline: Pipeline, facts: dict[str, Any], folder: Path, wanted: list[str]
) -> None:
    """Assemble report.json, features.parquet and figures from what the evaluators left."""
    eval_dir = run_dir / "eval" / folder.name
    envelopes = {}
    # What an earlier command measured stays in the report.
    others = sorted(p.stem for p in eval_dir.glob("*.json") if p.stem not in wanted)
    for name in [*wanted, *others]:
        if (eval_dir / f"{name}.json").is_file():
            envelopes[name] = json.loads((eval_dir / f"{name}.json").read_text())
    config = pipeline.cfg
    report = {
        "schema": REPORT_SCHEMA,
        "run": {
            "id": run_dir.name,
            "checkpoint": folder.name,
            "step": facts["step"],
            "n_tokens": facts["n_tokens"],
        },
        "config": {k: v for k, v in config.items() if k not in RECORD_KEYS},
        "choices": pipeline.choices,
        "overrides": _overrides(run_dir),
        "seed": int(config["seed"]),
        "versions": versions(),
        "git": git_state(),
        "fingerprints": {
            "model": facts["model"]["fingerprint"],
            "dataset": facts["dataset"]["fingerprint"],
            "sae": facts["sha256"]["sae.safetensors"],
            "store": facts["store"],
        },
        "warnings": report_warnings(facts),
        "training": last_line(run_dir / "metrics.jsonl"),
        "evaluators": envelopes,
        "expected": judge(
            config.get("expected") or [], flat_metrics(envelopes), flat_ci(envelopes)
        ),
        "cost": training_cost(run_dir),
    }  # fmt: skip
    check_report(report, str(run_dir / "report.json"))
    files.write_json(run_dir / "report.json", report)
    join_columns(eval_dir, run_dir / "features.parquet")
    from sae_runner.report.figures import draw_run

    draw_run(run_dir)
    log.info("%s", headline(report))


def _overrides(run_dir: Path) -> list[str]:
    from omegaconf import OmegaConf

    record: Any = OmegaConf.to_container(OmegaConf.load(run_dir / "config.yaml"))
    return list(record.get("overrides") or [])


def headline(report: dict[str, Any]) -> str:
    """The numbers a person looks at first, in one line."""
    parts = []
    for envelope in report["evaluators"].values():
        for metrics in envelope["metrics"].values():
            for key in ("l0", "fvu", "explained_variance", "dead_frac", "mmcs_true_to_sae"):
                if isinstance(metrics.get(key), int | float):
                    parts.append(f"{key} {metrics[key]:.4g}")
    return "report: " + (", ".join(parts) or "no evaluators")


def join_columns(eval_dir: Path, path: Path) -> None:
    """All evaluators' per-latent columns side by side."""
    import pyarrow.parquet as pq

    columns: dict[str, Any] = {}
    for part in sorted(eval_dir.glob("*.parquet")):
        for name, column in pq.read_table(part).to_pydict().items():
            columns.setdefault(name, column)
    if columns:
        columns.pop("feature")
        write_columns(path, columns)


def report_warnings(facts: dict[str, Any]) -> list[str]:
    """What a reader of the report must not miss."""
    if facts["model"].get("weights") == "random":
        return ["MODEL WEIGHTS ARE RANDOM: these numbers say nothing about a trained model"]
    return []


def last_line(path: Path) -> dict[str, Any]:
    """The last metrics of training."""
    if not path.is_file():
        return {}
    lines = path.read_text().splitlines()
    row: dict[str, Any] = json.loads(lines[-1]) if lines else {}
    return row


def training_cost(run_dir: Path) -> dict[str, Any]:
    """Sums over timings.jsonl."""
    path = run_dir / "timings.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()] if path.is_file() else []
    wall = sum(row["wall_s"] for row in rows)
    if not rows or not wall:
        return {}
    n_rows = sum(row["rows_per_s"] * row["wall_s"] for row in rows)
    wait = sum(row["wait_fraction"] * row["wall_s"] for row in rows)
    return {
        "train_wall_s": round(wall, 2),
        "rows_per_s": round(n_rows / wall, 1),
        "wait_fraction": round(wait / wall, 4),
        "peak_rss_mib": max(row["peak_rss_mib"] for row in rows),
    }


def versions() -> dict[str, str]:
    """Of this tool, Python and the libraries that decide numbers."""
    found = {"sae_runner": __version__, "python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return {**found, "platform": platform.platform(), "threads": str(torch.get_num_threads())}


def git_state() -> dict[str, Any] | None:
    """Commit of the source this ran from, and whether it was changed; None outside a checkout."""
    here = Path(__file__).parent

    def git(*words: str) -> str:
        return subprocess.run(
            ["git", "-C", str(here), *words], capture_output=True, text=True, check=True
        ).stdout.strip()

    try:
        return {"commit": git("rev-parse", "HEAD"), "dirty": bool(git("status", "--porcelain"))}
    except (OSError, subprocess.CalledProcessError):
        return None
