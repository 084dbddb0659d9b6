"""The one pass over held-out rows that all evaluators share."""

import time
from collections.abc import Iterable, Mapping
from typing import Any

import torch

from sae_runner.evaluators.base import EvalContext, Evaluator, Findings, Rows
from sae_runner.log import Progress, working
from sae_runner.meters import peak_rss_mib


@torch.no_grad()
def shared_pass(
    evaluators: Mapping[str, Evaluator], rows: Iterable[Any], context: EvalContext
) -> tuple[dict[str, Findings], dict[str, Any]]:
    """Hand every evaluator the same rows, read and encoded once.

    Args:
        evaluators: by their names in the report.
        rows: batches with `x, example_id, position, label` on the CPU.
        context: what an evaluator may ask for besides.

    Returns:
        What each found, and the cost of the pass.
    """
    for evaluator in evaluators.values():
        evaluator.start(context)
    started = time.perf_counter()
    device = next(context.sae.parameters()).device
    with Progress("eval", context.n_rows, "rows") as progress:
        for batch in rows:
            stored = batch.x.to(device)
            x_hat, latents = context.sae(context.sae.input_of(stored))
            x = context.sae.target_of(stored)
            shared = Rows(x, latents, x_hat, batch.example_id, batch.position, batch.label)
            for evaluator in evaluators.values():
                evaluator.update(shared)
            progress.advance(len(x))
    n_rows = progress.done
    found = {}
    for name, evaluator in evaluators.items():
        with working(f"eval: {name}"):
            found[name] = evaluator.finish()
    cost = {
        "wall_s": round(time.perf_counter() - started, 3),
        "sae_encodes": n_rows,
        "shared_with": sorted(evaluators),
        "peak_rss_mib": peak_rss_mib(),
    }
    return found, cost
