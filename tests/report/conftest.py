"""Run directories as `sae-run train` leaves them, made of numbers instead of training."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest


@pytest.fixture
def make_run(tmp_path: Path) -> Callable[..., Path]:
    """Writes a run directory below tmp_path/train and returns its path; see `write_run`."""

    def make(name: str = "toy-topk-00000001", **changes: Any) -> Path:
        folder = tmp_path / "train" / name
        write_run(folder, **changes)
        return folder

    return make


def write_run(
    folder: Path,
    *,
    config: dict[str, Any] | None = None,
    metrics: dict[str, float | int | None] | None = None,
    ci: dict[str, dict[str, float]] | None = None,
    notes: list[dict[str, str]] | None = None,
    fingerprints: dict[str, str] | None = None,
    site: dict[str, Any] | None = None,
    data: dict[str, Any] | None = None,
    report: dict[str, Any] | None = None,
    with_report: bool = True,
    with_series: bool = True,
    n_steps: int = 60,
) -> None:
    """`config` and `metrics` change dotted keys; `report` replaces top-level entries."""
    cfg = nested(flat_config() | (config or {}))
    values = default_metrics() | (metrics or {})
    intervals = default_ci() if ci is None else ci
    envelopes = {
        name: envelope(name, cfg, values, intervals, notes or [], site, data)
        for name in ("sparsity", "reconstruction", "density")
    }
    for name, series in default_series().items() if with_series else []:
        envelopes[name]["series"] = series
    whole = {
        "schema": "sae-run.report/1",
        "run": {"id": folder.name, "checkpoint": "step_00000060", "step": 60, "n_tokens": 61440},
        "config": cfg,
        "choices": {"model": "toy", "sae": cfg["sae"]["type"], "dataset": "toy"},
        "overrides": [f"sae={cfg['sae']['type']}"],
        "seed": 0,
        "versions": {"sae_runner": "0.1.0", "python": "3.11.2", "torch": "2.15.0"},
        "git": {"commit": "0123456789abcdef", "dirty": False},
        "fingerprints": {"model": "a" * 64, "dataset": "b" * 64, "sae": "c" * 64, "store": "s"}
        | (fingerprints or {}),
        "warnings": [],
        "training": {"step": 60, "loss": 0.1},
        "evaluators": envelopes,
        "expected": [],
        "cost": {"train_wall_s": 12.5},
    } | (report or {})
    write_json(folder / "config.yaml", cfg)  # JSON is YAML.
    lines = [json.dumps(row) for row in metric_rows(n_steps)]
    (folder / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    for name, value in envelopes.items():
        write_json(folder / "eval" / "step_00000060" / f"{name}.json", value)
    if with_report:
        write_json(folder / "report.json", whole)


def write_json(path: Path, value: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value))


def flat_config() -> dict[str, Any]:
    return {
        "model.type": "toy", "model.batch_size": 4096, "site.name": None, "site.tokens": None,
        "dataset.type": "toy", "dataset.seed": 0, "sae.type": "topk", "sae.k": 32,
        "sae.d_sae": None, "sae.expansion": 8, "trainer.n_tokens": 61440, "trainer.lr": 4e-4,
        "evaluators.sparsity.type": "sparsity", "seed": 0, "device": "auto", "outputs": "outputs",
    }  # fmt: skip


def nested(flat: dict[str, Any]) -> dict[str, Any]:
    tree: dict[str, Any] = {}
    for key, value in flat.items():
        *path, last = key.split(".")
        branch = tree
        for part in path:
            branch = branch.setdefault(part, {})
        branch[last] = value
    return tree


def default_metrics() -> dict[str, float | int | None]:
    return {
        "sparsity.l0": 31.4, "sparsity.l0_p05": 22, "sparsity.l1": 13.9,
        "reconstruction.fvu": 0.1234, "reconstruction.explained_variance": 0.8766,
        "reconstruction.cosine": 0.951, "reconstruction.mse": 0.0271,
        "density.dead_frac": 0.25, "density.dead_upper_bound": 3 / 8192, "density.n_tokens": 8192,
    }  # fmt: skip


def default_ci() -> dict[str, dict[str, float]]:
    return {
        "sparsity.l0": {"se": 0.05, "lo": 31.3, "hi": 31.5, "n": 512},
        "reconstruction.fvu": {"se": 0.002, "lo": 0.1194, "hi": 0.1274, "n": 512},
    }


def default_series() -> dict[str, dict[str, Any]]:
    rng = np.random.default_rng(0)
    edges = np.linspace(-8, 0, 81)
    counts = np.histogram(rng.normal(-2.4, 0.6, 384).clip(-3.9, -0.1), edges)[0]
    l0, n = np.unique(rng.poisson(31.4, 8192), return_counts=True)
    position = np.arange(17)
    errors = np.linspace(-4, 2, 61)
    return {
        "density": {
            "log10_hist": {"edges": edges.tolist(), "counts": counts.tolist(), "n_dead": 128}
        },
        "sparsity": {"l0_histogram": {"l0": l0.tolist(), "counts": n.tolist()}},
        "reconstruction": {
            "error_by_position": {
                "position": position.tolist(),
                "fvu": [None, *(0.1 + 0.04 * np.sin(position[1:] / 3)).tolist()],
                "mse": (0.02 + 0.0 * position).tolist(),
                "n": [481] * 17,
            },
            "error_histogram": {
                "edges": errors.tolist(),
                "counts": np.histogram(rng.normal(-0.9, 0.3, 8162), errors)[0].tolist(),
                "n_below": 5, "n_above": 0, "n_skipped": 10,
            },
        },
    }  # fmt: skip


def envelope(
    name: str,
    config: dict[str, Any],
    metrics: dict[str, float | int | None],
    ci: dict[str, dict[str, float]],
    notes: list[dict[str, str]],
    site: dict[str, Any] | None,
    data: dict[str, Any] | None,
) -> dict[str, Any]:
    def own(key: str) -> bool:
        return key.split(".")[0] == name

    return {
        "schema": "sae-run.eval/1", "evaluator": name, "type": name, "evaluator_version": "1",
        "axis": "interpretability", "run_id": "run", "timestamp_utc": "2025-01-01T00:00:00+00:00",
        "seed": 0, "host": {"name": "toy"},
        "site": site or {"name": "activations", "module": "", "d": 64, "tokens": "all"},
        "sae": {"type": config["sae"]["type"], "d_sae": 512},
        "data": {"name": "toy", "split": "heldout", "n_heldout": 512} | (data or {}),
        "config": {"type": name, "eval": {"n_rows": 8192, "batch_size": 4096, "seed": 0}},
        "metrics": {name: {k.split(".")[1]: v for k, v in metrics.items() if own(k)}},
        "ci": {k: v for k, v in ci.items() if own(k)},
        "notes": [note for note in notes if own(note["metric"])],
        "series": {}, "artifacts": {}, "cost": {"wall_s": 0.5},
    }  # fmt: skip


def metric_rows(n_steps: int) -> list[dict[str, float]]:
    rng = np.random.default_rng(1)
    rows = []
    for step in range(1, n_steps + 1):
        decay = 0.05 + float(np.exp(-step / (n_steps / 5)) * rng.uniform(0.9, 1.1))
        rows.append({
            "step": step, "n_tokens": step * 1024, "loss": 64 * decay, "mse": 62 * decay,
            "auxk": 2 * decay, "l0": 32.0 - float(rng.uniform(0, 1)), "fvu": decay,
            "dead_fraction": 0.25 * step / n_steps, "lr": 4e-4 * (1 - step / (n_steps + 1)),
            "grad_norm": 3 * decay,
        })  # fmt: skip
    return rows
