"""What probes found on tasks: their means, with intervals, over all tasks and over each family.

Intervals are over tasks: that an average of so few tasks moves with the tasks is what they show.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from sae_runner.evaluators._bootstrap import intervals, ratio_of
from sae_runner.evaluators._numbers import Scalars
from sae_runner.evaluators._probe_task import Measured
from sae_runner.evaluators.base import Findings

# Columns of a task's row that are no numbers to average.
NOT_AVERAGED = ("task", "family", "best_latent", "w", "b", "llm_full_C", "sae_full_C")
NO_INTERVAL = ("n_train", "n_test", "positive_rate_test", "n_constant")
FEW_TASKS = 10


def findings_of(
    main: Scalars, measured: Sequence[Measured], n_bootstrap: int, seed: int
) -> Findings:
    """Means over tasks, table `tasks`, and array `losses`: each latent's loss on each task."""
    rows = [m.row for m in measured]
    families = sorted({row["family"] for row in rows})
    groups = {main: rows}
    if len(families) > 1:
        groups |= {
            Scalars(f"probes_{f}"): [row for row in rows if row["family"] == f] for f in families
        }
    findings = Findings({})
    for scalars, of in groups.items():
        _average(scalars, of, findings, n_bootstrap, seed)
    for m in measured:
        _note_task(main, m)
    findings.notes += [note for scalars in groups for note in scalars.notes]
    if rows:
        findings.tables["tasks"] = {name: [row[name] for row in rows] for name in rows[0]}
        tasks = [row["task"] for row in rows]
        names = [task if tasks.count(task) == 1 else f"{row['family']}/{task}"
                 for task, row in zip(tasks, rows, strict=True)]  # fmt: skip
        losses = np.stack([m.losses for m in measured]).astype(np.float32)
        findings.arrays["losses"] = losses_by_task(names, losses)
    return findings


def _average(
    scalars: Scalars,
    rows: Sequence[dict[str, Any]],
    findings: Findings,
    n_bootstrap: int,
    seed: int,
) -> None:
    """Mean of every number over tasks, with an interval over tasks."""
    findings.metrics[scalars.category] = scalars.values
    if not rows:
        for name in ("probe_loss_test", "probe_loss_train_min", "excess", "gap_to_full"):
            scalars.null(name, "too_few_examples", "no task is left; see the notes on n_tasks")
        return
    columns = {}
    for name in rows[0]:
        if name in NOT_AVERAGED:
            continue
        values = [row[name] for row in rows if row[name] is not None]
        if len(values) < len(rows):
            scalars.null(name, "too_few_examples", "no latent tells some task's classes apart")
            continue
        scalars.put(name, float(np.mean(values)))
        if name not in NO_INTERVAL:
            columns[name] = np.array(values, dtype=np.float64)
    if not n_bootstrap:
        return
    if len(rows) < 2:
        scalars.note("probe_loss_test", "too_few_examples", "no interval: one task")
        return
    if len(rows) < FEW_TASKS:
        detail = f"{len(rows)} tasks: means and intervals depend on which ones they are"
        scalars.note("probe_loss_test", "too_few_examples", detail)
    statistics = {f"{scalars.category}.{name}": ratio_of(name, "task") for name in columns}
    found, notes = intervals(
        {"task": np.ones(len(rows)), **columns}, statistics,
        n_resamples=n_bootstrap, seed=seed,
    )  # fmt: skip
    findings.ci |= found
    findings.notes += notes


def _note_task(main: Scalars, measured: Measured) -> None:
    task = measured.row["task"]
    if measured.row["best_latent"] is None:
        detail = f"task {task}: every latent is constant; its loss is that of the base rate"
        main.note("probe_loss_test", "constant_feature", detail)
    if measured.few:
        k = ", ".join(map(str, measured.few))
        detail = f"task {task}: fewer than k latents differ between the classes, k = {k}"
        main.note(f"sae_top_{measured.few[0]}_test_accuracy", "too_few_examples", detail)
    for name in measured.not_converged:
        detail = f"task {task}: 1000 iterations did not reach the minimum"
        main.note(f"{name}_full_loss", "not_applicable", detail)


def losses_by_task(names: Sequence[str], losses: npt.NDArray[np.float32]) -> dict[str, Any]:
    """Train losses of every latent's probe, by the task's name."""
    import torch

    return {name: torch.from_numpy(row.copy()) for name, row in zip(names, losses, strict=True)}
