"""Read shuffled batches of 4,096 rows: ours, raw sequential, a DataLoader on the same rows.

Then train on them, and say which share of the time training waited for data: a TopK SAE of 8 d
latents with the options of `sae-run train`, from the timings.jsonl that it writes.
"""

import argparse
import itertools
import json
from pathlib import Path
from typing import Any

import torch

from benchmarks.results import Ratio, Result, in_turn, rates
from benchmarks.rows import random_store
from benchmarks.trainers import trainer_on
from sae_runner.store.prefetch import Prefetched
from sae_runner.store.reader import ActivationStore

BATCH = 4096


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Its own options."""
    parser.add_argument("--rows", type=int, default=393_216, help="rows of the store")
    parser.add_argument("--d", type=int, default=768, help="width of a row")
    parser.add_argument("--train-steps", type=int, default=60)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")


def run(options: argparse.Namespace, folder: Path) -> Result:
    """See the module."""
    store = random_store(folder / "store", options.rows, options.d)
    n_batches = options.rows // BATCH
    print(f"{options.rows:,} rows x {options.d} float32, warm, batches of {BATCH}")
    found = rates(
        in_turn(sides_of(store, n_batches), options.repeats),
        "rows", n_batches * BATCH, "raw sequential",
    )  # fmt: skip
    shuffled, loader = found["shuffled"], found["torch DataLoader (rows in RAM)"]
    waited = waiting(store, options, folder)
    print(f"\ntraining, {options.train_steps} steps of {BATCH} rows on {options.device}:")
    for line in waited:
        print(
            f"  to step {line['step']}: {line['rows_per_s']:,.0f} rows/s, "
            f"{100 * line['wait_fraction']:.2f}% of the time waiting for data"
        )
    share = sum(line["wait_fraction"] * line["wall_s"] for line in waited)
    share /= sum(line["wall_s"] for line in waited)
    faster = shuffled["median"] / loader["median"]
    return Result(
        f"shuffled reading: {shuffled['ratio']:.2f} of raw sequential, {faster:.1f}x a DataLoader; "
        f"a step waits {100 * share:.2f}% of its time for data",
        [
            Ratio("shuffled:raw", shuffled["ratio"], "least"),
            Ratio("shuffled:dataloader", faster, "least"),
            Ratio("waiting", share, "most"),
        ],
        {**found, "training": waited},
    )


def sides_of(store: ActivationStore, n_batches: int) -> dict[str, Any]:
    """The readers that are compared, by name."""

    def sequential() -> None:
        for index in range(store.n_windows("train")):
            x = store.window("train", index)["activations"]
            for start in range(0, len(x) - len(x) % BATCH, BATCH):
                x[start : start + BATCH].clone()

    def shuffled() -> None:
        for _ in itertools.islice(store.shuffled(BATCH, seed=0), n_batches):
            pass

    def prefetched() -> None:
        batches = Prefetched(store.shuffled(BATCH, seed=0), 4)
        for _ in range(n_batches):
            next(batches)
        batches.close()

    everything = torch.cat(
        [store.window("train", i)["activations"] for i in range(store.n_windows("train"))]
    )
    rows = torch.utils.data.TensorDataset(everything)

    def dataloader() -> None:
        generator = torch.Generator().manual_seed(0)
        loader = torch.utils.data.DataLoader(
            rows, batch_size=BATCH, shuffle=True, generator=generator, drop_last=True
        )
        for _ in loader:
            pass

    return {
        "raw sequential": sequential, "shuffled": shuffled, "shuffled, prefetched": prefetched,
        "torch DataLoader (rows in RAM)": dataloader,
    }  # fmt: skip


def waiting(
    store: ActivationStore, options: argparse.Namespace, folder: Path
) -> list[dict[str, float]]:
    """The lines of timings.jsonl of a training on the store."""
    run_dir = folder / "run"
    run_dir.mkdir()
    n_steps = options.train_steps
    trainer = trainer_on(
        store, run_dir, {"expansion": 8}, {
            "n_tokens": n_steps * BATCH, "batch_size": BATCH, "log_every": max(1, n_steps // 3),
            "save_every": None, "keep_state": False,
        }, device=options.device, prefetch=4,
    )  # fmt: skip
    trainer.run()
    lines = (run_dir / "timings.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]
