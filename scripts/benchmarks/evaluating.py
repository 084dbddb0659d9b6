"""All evaluators in one pass over made-up rows: rows a second, and memory for 1x and 10x of them.

A TopK SAE with random weights encodes each row once; sparsity, reconstruction, density and their
intervals over examples of 16 rows are of its sparse latents. Each size is a process of its own.
Memory beyond the weights is what a batch takes, and 8 bytes for each example and each of the sums
that intervals are resampled from.
"""

import argparse
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.results import Ratio, Result, spread
from benchmarks.rows import Directions, HeldRows
from benchmarks.trainers import topk_options
from benchmarks.visits import Visited
from sae_runner.config import preset
from sae_runner.evaluators import EVALUATORS
from sae_runner.evaluators._shared_pass import measure
from sae_runner.evaluators.base import EvalContext
from sae_runner.meters import peak_rss_mib
from sae_runner.saes import SAES
from sae_runner.store.activations import StoredRows

NAMES = ("sparsity", "reconstruction", "density")
ROWS_PER_EXAMPLE = 16
FACTOR = 10


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Its own options."""
    parser.add_argument("--rows", type=int, default=8192, help="of the smaller pass")
    parser.add_argument("--d", type=int, default=256)
    parser.add_argument("--d-sae", type=int, default=65_536)
    parser.add_argument("--k", type=int, default=32)
    parser.add_argument("--batch-size", type=int, default=4096)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")


def run(options: argparse.Namespace, folder: Path) -> Result:
    """See the module."""
    print(f"d_sae {options.d_sae:,}, d_in {options.d}, k {options.k}: {', '.join(NAMES)}")
    print(f"{'rows':>12}{'rows/s':>10}{'min':>10}{'max':>10}{'peak MiB':>10}{'encode alone':>14}")
    sides = dict[str, Any]()
    for factor in (1, FACTOR):
        asked = {key: getattr(options, key) for key in ("d", "d_sae", "k", "batch_size", "device")}
        # The larger pass is one repeat: it is that much longer.
        repeats = options.repeats if factor == 1 else 1
        with Visited("evaluating", {**asked, "n_rows": factor * options.rows}) as process:
            visits = [process.visit() for _ in range(repeats)]
        row = spread([visit["rows_per_s"] for visit in visits])
        row |= {"peak_mib": visits[-1]["peak_mib"], "of_encoding": visits[-1]["of_encoding"]}
        sides[f"{factor}x"] = row
        print(
            f"{factor * options.rows:>12,}{row['median']:>10,.0f}{row['min']:>10,.0f}"
            f"{row['max']:>10,.0f}{row['peak_mib']:>10,.0f}{100 * row['of_encoding']:>13.0f}%"
        )
    growth = sides[f"{FACTOR}x"]["peak_mib"] / sides["1x"]["peak_mib"]
    return Result(
        f"{FACTOR} times the rows: {growth:.3f}x the peak memory; "
        f"{sides[f'{FACTOR}x']['median']:,.0f} rows/s",
        [
            Ratio("10x:1x", growth, "most"),
            Ratio("peak_mib", sides[f"{FACTOR}x"]["peak_mib"], "most"),
            Ratio("rows_per_s", sides[f"{FACTOR}x"]["median"], "least"),
            Ratio("of_encoding", sides[f"{FACTOR}x"]["of_encoding"], "least"),
        ],
        sides,
    )


def prepare(asked: dict[str, Any]) -> Callable[[], dict[str, Any]]:
    """See `visits`: a visit is one pass."""
    source, n_rows = Directions(asked["d"]), asked["n_rows"]
    held = HeldRows(source.rows(1024))
    options = topk_options({"d_sae": asked["d_sae"], "k": asked["k"]})
    sae = SAES.build(options, d_in=asked["d"])
    sae.initialise(held.stats(), torch.Generator().manual_seed(0))
    sae.to(asked["device"])
    evaluators = {
        name: EVALUATORS.build(options_of(name), where=f"evaluators.{name}") for name in NAMES
    }
    n_examples = -(-n_rows // ROWS_PER_EXAMPLE)

    def batches() -> Iterator[StoredRows]:
        for start in range(0, n_rows, asked["batch_size"]):
            row = torch.arange(start, min(start + asked["batch_size"], n_rows))
            x = source.rows(len(row))
            yield StoredRows(x, row // ROWS_PER_EXAMPLE, row % ROWS_PER_EXAMPLE, None)

    def visit() -> dict[str, Any]:
        context = EvalContext(
            sae=sae, n_rows=n_rows, example_ids=np.arange(n_examples), seed=0, mean=held.x.mean(0)
        )
        costs: list[dict[str, Any]] = []
        failures = measure(evaluators, batches(), context, lambda *found: costs.append(found[2]))
        for error in failures.values():
            raise error
        cost = costs[-1]
        start = time.perf_counter()
        n_encoded = 0
        with torch.no_grad():
            for batch in batches():
                sae(batch.x.to(asked["device"]))
                n_encoded += len(batch.x)
                if 4 * n_encoded >= n_rows:  # A quarter is enough to know its speed.
                    break
        alone = (time.perf_counter() - start) / n_encoded
        return {
            "rows_per_s": n_rows / cost["wall_s"], "peak_mib": peak_rss_mib(),
            "of_encoding": alone * n_rows / cost["wall_s"],
        }  # fmt: skip

    return visit


def options_of(name: str) -> dict[str, Any]:
    """The options of an evaluator's own YAML."""
    found = preset("evaluators", name)
    return dict(next(iter(found.values()))) if "type" not in found else found
