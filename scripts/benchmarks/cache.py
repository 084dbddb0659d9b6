"""Cache one site, beside a loop of the same forwards and loader that keeps nothing."""

import argparse
import itertools
from collections.abc import Iterator
from pathlib import Path

import torch

from benchmarks.results import Ratio, Result, in_turn, rates
from sae_runner.commands.pipeline import Pipeline
from sae_runner.composition import composed_jobs
from sae_runner.data.base import SPLITS, Split
from sae_runner.store.loading import load_batches
from sae_runner.store.writer import write_selections


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Its own options; further words are `key=value` of `sae-run train`."""
    parser.add_argument("--examples", type=int, default=2048)
    parser.add_argument("--model", default="minilm", help="model option")


def run(options: argparse.Namespace, folder: Path) -> Result:
    """See the module."""
    words = [f"model={options.model}", *options.overrides]
    if not any(word.startswith("dataset.n_examples") for word in words):
        words.append(f"dataset.n_examples={options.examples}")
    pipeline = composed(words, folder)
    model, dataset, info = pipeline.model, pipeline.dataset, pipeline.site
    plan, loading = pipeline.plan(info), pipeline.loading
    count = itertools.count()

    def forwards(split: Split) -> Iterator[None]:
        for window in range(plan.n_windows(split)):
            ids = plan.examples(split, window)
            for loaded in load_batches(dataset, model, ids, loading.batch_size, loading.workers):
                if loaded.inputs is not None:
                    with torch.no_grad():
                        model.record(loaded.inputs.to(model.device), [info.name])
                yield

    def bare() -> None:
        for split in SPLITS:
            for _ in forwards(split):
                pass

    def cache() -> None:
        write_selections(
            folder / f"store{next(count)}", model, dataset, [info], pipeline.selection, plan,
            dtype=pipeline.store_options.dtype, batch_size=loading.batch_size,
            workers=loading.workers, max_bad=loading.max_bad,
        )  # fmt: skip

    n = sum(map(len, plan.ids.values()))
    print(f"{options.model}, {info.name}, {n:,} examples, batches of {loading.batch_size}")
    sides = {"bare loop": bare, "cache": cache}
    found = rates(in_turn(sides, options.repeats), "examples", n, "bare loop")
    cost = 1 / found["cache"]["ratio"] - 1
    return Result(
        f"caching costs {100 * cost:+.1f}% over the bare loop of the same forwards",
        [Ratio("cost", cost, "most")],
        found,
    )


def composed(words: list[str], folder: Path) -> Pipeline:
    """The pipeline of `sae-run train WORDS`, writing below `folder`."""
    job = composed_jobs("train", [*words, f"outputs={folder}"])[0]
    return Pipeline(job.cfg, job.choices)
