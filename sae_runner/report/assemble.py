"""report.json and features.parquet of one checkpoint, from what its evaluators left on disk."""

import importlib.metadata
import json
import logging
import platform
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sae_runner import __version__, files
from sae_runner.report.expected import judge
from sae_runner.report.schema import REPORT_SCHEMA, check_report, flat_ci, flat_metrics

if TYPE_CHECKING:
    from sae_runner.evaluators.base import Findings

log = logging.getLogger("sae_runner")
PACKAGES = ("torch", "numpy", "safetensors", "hydra-core", "open_clip_torch", "timm",
            "transformers", "transformer-lens", "datasets")  # fmt: skip
ENDINGS = {"tables": ".parquet", "arrays": ".safetensors", "texts": ""}
HEADLINE = (
    "sparsity.l0", "reconstruction.fvu", "reconstruction.explained_variance", "density.dead_frac",
    "recovery.mmcs_true_to_sae",
)  # fmt: skip
FURTHER = (
    "downstream_recon.fvu_mean", "downstream_loss.kl", "downstream_loss.ce_recovered_zero",
    "zeroshot.acc_recovered_zero", "ablation_sparsity.latent", "probes.excess",
    "autointerp.spearman_mean", "autointerp.detection_balacc",
    "absorption.mean_absorption_fraction_score", "human.total_median",
)  # fmt: skip
"""What is measured when it is asked for: named in full, as `report` wants it."""


def report_path(run_dir: Path, checkpoint: str, *, last: bool) -> Path:
    """Where a checkpoint's report is: the run's own one is that of the last checkpoint."""
    return run_dir / "report.json" if last else run_dir / "eval" / checkpoint / "report.json"


def write_report(
    path: Path,
    run_dir: Path,
    facts: Mapping[str, Any],
    checkpoint: str,
    *,
    config: dict[str, Any],
    choices: dict[str, str],
    overrides: list[str],
    wanted: list[str],
    extra_versions: Mapping[str, str],
    warnings: Sequence[str] = (),
) -> None:
    """Assemble the report of a checkpoint and check it against its schema.

    Args:
        path: the file to write; figures and features.parquet go beside it.
        run_dir: the run, with metrics.jsonl and eval/<checkpoint>/*.json.
        facts: the checkpoint's cfg.json.
        checkpoint: its folder's name.
        config: the resolved configuration of the run.
        choices: which option of each group was taken.
        overrides: what was typed.
        wanted: evaluators, in the order of the report; others found on disk follow.
        extra_versions: what only the caller knows, such as the number of threads.
        warnings: what went wrong while it was measured.
    """
    eval_dir = run_dir / "eval" / checkpoint
    found = [p.stem for p in sorted(eval_dir.glob("*.json")) if p.stem != "report"]
    names = [n for n in wanted if n in found] + [n for n in found if n not in wanted]
    envelopes = {name: json.loads((eval_dir / f"{name}.json").read_text()) for name in names}
    report = {
        "schema": REPORT_SCHEMA,
        "run": {
            "id": run_dir.name,
            "checkpoint": checkpoint,
            "step": facts["step"],
            "n_tokens": facts["n_tokens"],
            **{key: facts[key] for key in ("site", "tokens") if key in facts},
        },
        "config": config,
        "choices": choices,
        "overrides": overrides,
        "seed": int(config["seed"]),
        "versions": {**versions(), **extra_versions},
        "git": git_state(),
        "fingerprints": {
            "model": facts["model"]["fingerprint"],
            "dataset": facts["dataset"]["fingerprint"],
            "sae": facts["sha256"]["sae.safetensors"],
            "store": facts["store"],
        },
        "warnings": [*warnings_of(facts), *warnings],
        "training": metrics_at(run_dir / "metrics.jsonl", facts["step"]),
        "evaluators": envelopes,
        "expected": judge(
            config.get("expected") or [], flat_metrics(envelopes), flat_ci(envelopes)
        ),
        "cost": training_cost(run_dir),
    }
    check_report(report, str(path))
    files.write_json(path, report)
    join_columns(eval_dir, path.parent / "features.parquet")
    log.info("%s", headline(report))


def headline(report: Mapping[str, Any]) -> str:
    """The numbers a person looks at first, in one line."""
    metrics = flat_metrics(report["evaluators"])
    names = {name: name.partition(".")[2] for name in HEADLINE}
    for wanted in FURTHER:  # Of `autointerp_lm` beside `autointerp` too: see `flat_metrics`.
        names |= {name: name for name in metrics if name.rpartition("/")[2] == wanted}
    parts = [
        f"{shown} {value:.4g}"
        for name, shown in names.items()
        if (value := metrics.get(name)) is not None
    ]
    return "report: " + (", ".join(parts) or "no evaluators")


def write_columns(path: Path, columns: Mapping[str, Any]) -> None:
    """A parquet file with one row a latent, keyed by `feature`."""
    import pyarrow as pa

    n = len(next(iter(columns.values())))
    write_table(path, {"feature": pa.array(range(n), pa.int32()), **columns})


def write_table(path: Path, columns: Mapping[str, Any]) -> None:
    """A parquet file of columns of one length."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    table = pa.table(dict(columns))
    with files.atomic(path) as temporary:
        # Row groups of 8,192: any one latent is read in about a millisecond.
        pq.write_table(table, temporary, compression="zstd", row_group_size=8192)


def artifacts_of(name: str, findings: "Findings") -> dict[str, Any]:
    """Where `write_findings` puts what is no number, relative to the folder of the step."""
    found: dict[str, Any] = {"per_latent": f"{name}.parquet"} if findings.per_latent else {}
    for kind, ending in ENDINGS.items():
        if names := sorted(getattr(findings, kind)):
            found[kind] = {part: f"{name}/{part}{ending}" for part in names}
    return found


def write_findings(eval_dir: Path, name: str, findings: "Findings") -> None:
    """The per-latent columns, tables, tensors and texts of an evaluator.

    Columns, tables and tensors that it left earlier, with other options, and has no more are
    removed: nothing would say what they are of.
    """
    columns, folder = eval_dir / f"{name}.parquet", eval_dir / name
    if findings.per_latent:
        write_columns(columns, findings.per_latent)
    else:
        columns.unlink(missing_ok=True)
    for kind in ("tables", "arrays"):
        for left in folder.glob(f"*{ENDINGS[kind]}"):
            if left.stem not in getattr(findings, kind):
                left.unlink()
    for part, table in findings.tables.items():
        write_table(folder / f"{part}.parquet", table)
    for part, tensors in findings.arrays.items():
        files.write_tensors(folder / f"{part}.safetensors", tensors)
    for part, text in findings.texts.items():
        files.write_text(folder / part, text)


def join_columns(eval_dir: Path, path: Path) -> None:
    """All evaluators' per-latent columns side by side."""
    import pyarrow.parquet as pq

    columns: dict[str, Any] = {}
    for part in sorted(p for p in eval_dir.glob("*.parquet") if p.stem != "features"):
        table = pq.read_table(part)
        columns |= {n: table[n] for n in table.column_names if n not in columns}
    if columns:
        columns.pop("feature")
        write_columns(path, columns)


def warnings_of(facts: Mapping[str, Any]) -> list[str]:
    """What a reader of the report must not miss."""
    found = []
    if facts["model"].get("weights") == "random":
        found.append("MODEL WEIGHTS ARE RANDOM: these numbers say nothing about a trained model")
    if n := facts["dataset"].get("n_unreadable"):
        found.append(f"unreadable examples, left out of the data: {n:,}")
    if n := facts["dataset"].get("n_missing_rows"):
        found.append(f"rows that are not there, where an example has fewer tokens: {n:,}")
    return found


def json_lines(path: Path) -> list[dict[str, Any]]:
    """The lines of a .jsonl file; none if it is absent."""
    return [json.loads(line) for line in path.read_text().splitlines()] if path.is_file() else []


def metrics_at(path: Path, step: int) -> dict[str, Any]:
    """The last training metrics that were logged up to a step."""
    rows = [row for row in json_lines(path) if row["step"] <= step]
    return rows[-1] if rows else {}


def training_cost(run_dir: Path) -> dict[str, Any]:
    """Sums over timings.jsonl."""
    rows = json_lines(run_dir / "timings.jsonl")
    wall = sum(row["wall_s"] for row in rows)
    if not wall:
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
    return {**found, "platform": platform.platform()}


def git_state() -> dict[str, Any] | None:
    """Commit of the source this ran from, and whether it was changed; None outside a checkout."""
    here = Path(__file__).parent

    def git(*words: str) -> str:
        return subprocess.run(
            ["git", "-C", str(here), *words], capture_output=True, text=True, check=True
        ).stdout.strip()

    try:
        if not git("ls-files", Path(__file__).name):  # Installed inside somebody else's checkout.
            return None
        return {"commit": git("rev-parse", "HEAD"), "dirty": bool(git("status", "--porcelain"))}
    except (OSError, subprocess.CalledProcessError):
        return None
