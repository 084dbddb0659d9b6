"""Train 8 SAEs of 4,096 latents over one store: together, and one after another."""

import argparse
from collections.abc import Iterator
from pathlib import Path

from benchmarks.results import Ratio, Result, in_turn, rates
from benchmarks.rows import random_store
from benchmarks.trainers import trainer_on
from sae_runner import files
from sae_runner.training.together import run_together
from sae_runner.training.trainer import Trainer

N_SAES = 8


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Its own options."""
    parser.add_argument("--rows", type=int, default=65_536, help="rows of the store")
    parser.add_argument("--d", type=int, default=768, help="width of a row")
    parser.add_argument("--d-sae", type=int, default=4096)


def run(options: argparse.Namespace, folder: Path) -> Result:
    """See the module."""
    store = random_store(folder / "store", options.rows, options.d)
    own = {"n_tokens": options.rows, "save_every": None, "keep_state": False}

    def initialised(name: str) -> Iterator[Trainer]:
        for seed in range(N_SAES):
            run_dir = folder / name / str(seed)
            files.remove(run_dir)
            run_dir.mkdir(parents=True)
            yield trainer_on(store, run_dir, {"d_sae": options.d_sae}, own, seed=seed)

    def one_after_another() -> None:
        for trainer in initialised("alone"):
            trainer.run()

    def failed(_: Trainer, error: Exception) -> None:
        raise error

    def together() -> None:
        run_together(list(initialised("together")), failed)

    sides = {"8 runs in a row": one_after_another, "together": together}
    amount = N_SAES * options.rows
    found = rates(in_turn(sides, options.repeats), "rows", amount, "8 runs in a row")
    ratio = found["together"]["ratio"]
    return Result(
        f"8 SAEs together: {ratio:.2f} times as fast as 8 runs in a row",
        [Ratio("together:in_a_row", ratio, "least")],
        found,
    )
